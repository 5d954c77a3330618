"""Build the documentation, or README.md, from the notebooks and the outputs they hold.

    python docs/build.py [--out DIR] [sphinx-build options]    # docs/_build/html
    python docs/build.py --readme [--out DIR]                  # README.md and its pictures in docs/readme_files

A page is its notebook, with every exported cell shown as the signature, the docstring and the documented parameters
of what it defines, and its source folded below. A `name` in backticks links to where it is defined. Links between
notebooks and to files above nbs/ are written for the repository (`02_operators.ipynb`, `../LICENSE`) and carried over.
The contents are in the order of the numbers: tutorials first, then the book. The tables of index.ipynb must have a line
for every notebook.
"""
import argparse
import ast
import io
import re
import shutil
import sys
import tokenize
from configparser import ConfigParser
from inspect import cleandoc
from pathlib import Path

from execnb.nbio import mk_cell, nb2str, write_nb
from nbdev.process import NBProcessor
from nbdev.processors import filter_stream_, hide_, hide_line, rm_header_dash, strip_ansi

ROOT = Path(__file__).resolve().parents[1]
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
PROPERTY = {"property", "cached_property"}


def read(path: Path):
    "A notebook as a reader sees it: no hidden cells, no directives (they are in `cell.directives_`)."
    def plain(cell):
        if cell.cell_type == "code": cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.MULTILINE)
    nb = NBProcessor(path, procs=[hide_, hide_line, filter_stream_, rm_header_dash, strip_ansi, plain], process=True).nb
    nb.module_ = "".join(f"dip_uq.{module}" for cell in nb.cells for module in cell.directives_.get("default_exp", []))
    nb.cells = [cell for cell in nb.cells if cell.source.strip()]
    return nb


# What an exported cell defines, as directives of Sphinx's Python domain

def name_of(node) -> str:
    "The name of a function, a class, or a constant in capitals; of other statements nothing."
    if isinstance(node, (*FUNCTION, ast.ClassDef)): return node.name
    target = node.targets[0] if isinstance(node, ast.Assign) else None
    return target.id if isinstance(target, ast.Name) and target.id.isupper() else ""

def is_public(node) -> bool:
    name = name_of(node)
    return name in ("__call__", "__getitem__") or bool(name) and name[0] != "_"

def public(cell) -> list:
    "The public functions, classes and constants that a cell exports."
    return [node for node in ast.parse(cell.source).body if is_public(node)] if "export" in cell.directives_ else []

def members(node) -> list:
    "The documented public methods and properties of a class."
    if not isinstance(node, ast.ClassDef): return []
    return [f for f in node.body if isinstance(f, FUNCTION) and is_public(f) and ast.get_docstring(f)]

def init(node) -> list: return [f for f in node.body if isinstance(f, FUNCTION) and f.name == "__init__"]

def fields(node) -> list: return [f for f in node.body if isinstance(f, ast.AnnAssign)]

def decorators(node) -> set: return {ast.unparse(d).split("(")[0].split(".")[-1] for d in node.decorator_list}

def signature(node) -> str:
    if isinstance(node, FUNCTION):
        args = re.sub(r"^(self|cls)(, |$)", "", ast.unparse(node.args))
        return f"{node.name}({args})" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")
    if "dataclass" in decorators(node): return f"{node.name}({', '.join(map(ast.unparse, fields(node)))})"
    return node.name + "".join(signature(f).removeprefix("__init__").removesuffix(" -> None") for f in init(node))

def comments_in(source: str) -> dict:
    "Line → comment."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}

def parameters(node, source: str) -> str:
    "A table of the comments after the parameters of a function or the fields of a class."
    comments = {line: comment.replace("|", r"\|") for line, comment in comments_in(source).items()}
    if isinstance(node, ast.ClassDef): named = [(f"`{ast.unparse(f.target)}`", f) for f in fields(node)]
    else:
        a = node.args
        named = [(f"`{arg.arg}`", arg) for arg in (*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg) if arg]
        named += [("*returns*", node.returns)] if node.returns else []
    names = {what.end_lineno: name for name, what in named}  # of several in one line, the comment is the last one's
    rows = [f"| {name} | {comments[line]} |" for line, name in names.items() if line in comments]
    return "\n".join(["| parameter | meaning |", "|:--|:--|", *rows]) if rows else ""

def describe_constant(node, source: str, module: str, names: dict) -> str:
    "Its value, if one line holds it, and the comment after it."
    value, text = ast.unparse(node.value), link(comments_in(source).get(node.end_lineno, ""), names)
    quoted = value.replace("'", "''")  # options are YAML
    options = [f":module: {module}"] + ([f":value: '{quoted}'"] if len(value) < 88 else [])
    return "\n".join([f"```{{py:data}} {name_of(node)}", *options, "", text, "```"])

def describe(node, source: str, module: str, names: dict, kind: str = "function") -> str:
    if isinstance(node, ast.Assign): return describe_constant(node, source, module, names)
    head, options = signature(node), [f":module: {module}"]
    body = [cleandoc(ast.get_docstring(node) or ""), parameters(node, source)]
    parts = [link(part, names) for part in body]
    if isinstance(node, ast.ClassDef):
        kind = "class"
        parts += [link(parameters(f, source), names) for f in init(node)]
        parts += [describe(f, source, module, names, "method") for f in members(node)]
    elif decorators(node) & PROPERTY:
        kind, head = "property", node.name
        options += [f":type: {ast.unparse(node.returns)}"] if node.returns else []
    else: options += [f":{d}:" for d in decorators(node) & {"classmethod", "staticmethod"}]
    text = "\n\n".join(filter(None, parts))
    fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`{3,}", text))])
    head = re.sub(r"(: |-> )'([^']+)'", r"\1\2", head)  # types written as strings
    return "\n".join([f"{fence}{{py:{kind}}} {head}", *options, "", text, fence])


# Links

def known(notebooks: list) -> dict:
    "What a backticked name can mean: as written → (role, full name)."
    names = {}
    for nb in notebooks:
        if nb.module_: names[nb.module_] = ("mod", nb.module_)
        for node in sum(map(public, nb.cells), []):
            for name in [name_of(node), *(f"{name_of(node)}.{f.name}" for f in members(node))]:
                full = f"{nb.module_}.{name}"
                names |= {written: ("obj", full) for written in (name, full, full.split(".", 1)[1])}
    return names

def link(text: str, names: dict) -> str:
    "Link the backticked names of markdown outside of code blocks, headings and other links."
    def role(match):
        kind, full = names.get(match[1].removesuffix("()"), ("", ""))
        return f"{{py:{kind}}}`{match[1]} <{full}>`" if kind else match[0]
    blocks = re.split(r"(^ *```.*?^ *```|^#.*?$)", text, flags=re.MULTILINE | re.DOTALL)
    blocks[::2] = [re.sub(r"(?<![`\[}\w])`([^`\s]+)`(?![`\]])", role, block) for block in blocks[::2]]
    return "".join(blocks)

def page(name: str) -> str: return re.sub(r"^\d+_", "", name)

def carry(text: str, notebook, above: str) -> str:
    "Point links to notebooks (`notebook`: name → target) and to files above nbs/ to where the reader finds these."
    absent = [file for file in re.findall(r"\]\(\.\./([^)#]+)", text) if not (ROOT / file).exists()]
    if absent: raise ValueError(f"links to files that are not there: {absent}")
    return re.sub(r"\]\((\w+)\.ipynb", lambda m: f"]({notebook(m[1])}", text).replace("](../", f"]({above}")


def launch(path: Path, settings) -> str:
    "Where the notebook can be run without installing anything: on Binder; on Colab too, if a cell installs what it needs."
    place = f"{settings['user']}/{settings['repo']}"
    binder = f"[Binder](https://mybinder.org/v2/gh/{place}/{settings['branch']}?labpath=nbs/{path.name})"
    colab = f"[Colab](https://colab.research.google.com/github/{place}/blob/{settings['branch']}/nbs/{path.name})"
    return f"Run it on {binder}" + (f" or {colab}" if "google.colab" in path.read_text("utf-8") else "")


# The two products

def adapt(nb, names: dict, repository: str) -> None:
    "Turn a notebook into the source of its page."
    cells = []
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = carry(link(cell.source, names), lambda name: f"{page(name)}.ipynb", repository)
        if "export" in cell.directives_:
            cell.metadata["tags"] = ["hide-input"]
            text = "\n\n".join(describe(node, cell.source, nb.module_, names) for node in public(cell))
            if text: cells.append(mk_cell(text, "markdown"))
        cells.append(cell)
    if nb.module_: cells.insert(1, mk_cell(f"```{{py:module}} {nb.module_}\n```", "markdown"))
    nb.cells = cells

def contents(index, names: list) -> str:
    "The tables of contents, by number: tutorials (from 50 on), then the book; the index must link to all of them."
    text = "".join(cell.source for cell in index.cells if cell.cell_type == "markdown")
    linked, names = re.findall(r"\]\((\d\w*)\.ipynb\)", text), sorted(names)
    if absent := [name for name in names if name not in linked]: raise ValueError(f"index.ipynb has no link to {absent}")
    parts = {"Tutorials": [n for n in names if n >= "50"], "The book": [n for n in names if n < "50"]}
    return "\n\n".join("\n".join([f"```{{toctree}}\n:hidden:\n:caption: {caption}\n", *map(page, part), "```"])
                       for caption, part in parts.items())

def html(out: Path, options: list) -> int:
    "Write the pages and run Sphinx over them."
    from sphinx.cmd.build import main
    settings = ConfigParser()
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    settings = settings["DEFAULT"]
    repository = f"{settings['git_url']}/blob/{settings['branch']}/"
    paths = [ROOT / "nbs/index.ipynb", *sorted(ROOT.glob("nbs/[0-9]*.ipynb"))]
    notebooks = [read(path) for path in paths]
    names, toctrees = known(notebooks), contents(notebooks[0], [path.stem for path in paths[1:]])
    for part in ("pages", "doctrees", "html"): shutil.rmtree(out / part, ignore_errors=True)
    (out / "pages").mkdir(parents=True)
    for path, nb in zip(paths, notebooks):
        adapt(nb, names, repository)
        if path.stem != "index": nb.cells.insert(1, mk_cell(launch(path, settings), "markdown"))
        else: nb.cells.append(mk_cell(toctrees, "markdown"))
        write_nb(nb, out / "pages" / f"{page(path.stem)}.ipynb")
    return main(["-W", "--keep-going", "-q", "-c", str(ROOT / "docs"), "-d", str(out / "doctrees"), *options,
                 str(out / "pages"), str(out / "html")])

def readme(out: Path) -> int:
    "Write README.md from the index notebook."
    import nbformat
    from nbconvert import MarkdownExporter
    nb = nbformat.reads(nb2str(read(ROOT / "nbs/index.ipynb")), as_version=4)
    nb.metadata["language_info"] = {"name": "python"}  # the language of its code blocks
    text, resources = MarkdownExporter().from_notebook_node(nb, {"output_files_dir": "docs/readme_files"})
    shutil.rmtree(out / "docs/readme_files", ignore_errors=True)
    for name, picture in resources["outputs"].items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(picture)
    note = "<!-- Made from nbs/index.ipynb by `python docs/build.py --readme`. -->\n\n"
    text = re.sub(r"\n( *\n){2,}", "\n\n", note + carry(text, "nbs/{}.ipynb".format, "").strip() + "\n")
    (out / "README.md").write_text(text, "utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true", help="write README.md instead of the pages")
    parser.add_argument("--out", type=Path, help="folder to write to")
    args, options = parser.parse_known_args()
    if args.readme: sys.exit(readme(args.out or ROOT))
    sys.exit(html((args.out or ROOT / "docs/_build").resolve(), options))

"""One notebook, one module: NN_name.ipynb exports dip_uq/name.py, and NN is the reading order, which nothing runs against.

A rule is a function that returns what is wrong with a house; none finds anything in this one, and each finds what is
wrong with a house that was built to break it.
"""
import ast
import re
from pathlib import Path

import pytest
from execnb.nbio import read_nb
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).parents[1]
TUTORIALS = 50  # the number of the first
LINES = 400  # that notebooks export to a module, at most


def number(notebook): return int(re.match(r"\d+", notebook)[0])

def name(notebook): return re.sub(r"^\d+_", "", notebook)

def directives(source):
    "What a cell says about its export: [(directive, module that it names)]."
    return re.findall(r"^#\s*\|\s*(default_exp|export\w*)\b[ \t]*(.*?)\s*$", source, re.MULTILINE)

def imported(source):
    "The modules of the package, by name, that a source imports anywhere in it."
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): found += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            package = "dip_uq" if node.level else ""
            path = ".".join(filter(None, (package, node.module)))
            found += [f"{path}.{alias.name}" for alias in node.names]
    return {path.split(".")[1] for path in found if path.startswith("dip_uq.")}


# The rules: notebooks are name → sources of the code cells, modules are name → source

def badly_numbered(notebooks):
    "Chapters count from 0 and tutorials from 50, without gaps or doubles."
    numbers = sorted(map(number, notebooks))
    chapters, tutorials = ([n for n in numbers if (n >= TUTORIALS) == late] for late in (False, True))
    wanted = [*range(len(chapters)), *range(TUTORIALS, TUTORIALS + len(tutorials))]
    return [f"{n} where {w} should be" for n, w in zip(chapters + tutorials, wanted) if n != w]

def badly_exported(notebooks):
    "A notebook with exports begins the module of its own name, once, and exports to no other."
    wrong = []
    for notebook, cells in notebooks.items():
        found = [directive for cell in cells for directive in directives(cell)]
        begun = [module for kind, module in found if kind == "default_exp"]
        if found and begun != [name(notebook)]: wrong.append(f"{notebook} begins {begun or 'no module'}")
        wrong += [f"{notebook} exports to {module}" for kind, module in found if kind != "default_exp" and module]
    return wrong

def without_counterpart(notebooks, modules):
    "Every module has its notebook, and every notebook with exports its module."
    exporting = {name(notebook) for notebook, cells in notebooks.items() if any(map(directives, cells))}
    return sorted(exporting ^ modules.keys())

def exported(source): return [line for line in source.splitlines() if line.strip() and not line.startswith("# %%")]

def too_long(modules):
    return [f"{module}: {n} lines" for module, source in modules.items() if (n := len(exported(source))) > LINES]

def modules_against_the_order(notebooks, modules):
    "A module imports from modules of lower numbers only."
    place = {name(notebook): number(notebook) for notebook in notebooks}
    return [f"{module} imports {other}" for module, source in modules.items() for other in sorted(imported(source))
            if place.get(other, -1) >= place.get(module, TUTORIALS)]  # __version__, say, is no module and has no place

def cells_against_the_order(notebooks):
    "What a notebook shows needs no module of a later one."
    place = {name(notebook): number(notebook) for notebook in notebooks}
    return [f"{notebook} imports {other}" for notebook, cells in notebooks.items() for cell in cells
            for other in sorted(imported(cell)) if place.get(other, -1) > number(notebook)]


# This house

def cells_of(path):
    plain = TransformerManager().transform_cell  # magics and shell commands as Python
    return [plain(cell.source) for cell in read_nb(path).cells if cell.cell_type == "code"]

@pytest.fixture(scope="module")
def notebooks(): return {path.stem: cells_of(path) for path in sorted(ROOT.glob("nbs/[0-9]*.ipynb"))}

@pytest.fixture(scope="module")
def modules(): return {path.stem: path.read_text("utf-8") for path in sorted(ROOT.glob("dip_uq/[!_]*.py"))}

def test_numbers(notebooks): assert not badly_numbered(notebooks)

def test_exports(notebooks): assert not badly_exported(notebooks)

def test_every_module_has_its_notebook(notebooks, modules): assert not without_counterpart(notebooks, modules)

def test_no_module_is_too_long(modules): assert not too_long(modules)

def test_modules_follow_the_order(notebooks, modules): assert not modules_against_the_order(notebooks, modules)

def test_cells_follow_the_order(notebooks): assert not cells_against_the_order(notebooks)


# Houses that are not in order

GOOD = {"00_a": ["#| default_exp a", "#| export\nx = 1"], "01_b": ["#| default_exp b", "#|export\nfrom dip_uq.a import x"],
        "02_words": ["from dip_uq.b import x"], "50_story": ["from dip_uq import a"]}
MODULES = {"a": "x = 1", "b": "from . import __version__\nfrom .a import x"}

def test_a_house_in_order():
    assert not (badly_numbered(GOOD) or badly_exported(GOOD) or without_counterpart(GOOD, MODULES) or too_long(MODULES)
                or modules_against_the_order(GOOD, MODULES) or cells_against_the_order(GOOD))

@pytest.mark.parametrize("notebooks, complaint", [
    (["00_a", "02_b"], "2 where 1 should be"), (["01_a", "02_b"], "1 where 0 should be"),
    (["00_a", "01_b", "01_c"], "1 where 2 should be"), (["00_a", "51_story"], "51 where 50 should be"),
    (["00_a", "50_story", "50_tale"], "50 where 51 should be")])
def test_numbers_are_seen(notebooks, complaint): assert complaint in badly_numbered(notebooks)

@pytest.mark.parametrize("cells, complaint", [
    (["#| default_exp other", "#| export\nx = 1"], "00_a begins ['other']"), (["#| export\nx = 1"], "00_a begins no module"),
    (["#| default_exp a"] * 2, "00_a begins ['a', 'a']"), (["#| default_exp a", "#| export b\nx = 1"], "00_a exports to b"),
    (["#| default_exp a", "#|exporti b\nx = 1"], "00_a exports to b")])
def test_exports_are_seen(cells, complaint): assert badly_exported({"00_a": cells}) == [complaint]

def test_missing_counterparts_are_seen():
    assert without_counterpart(GOOD, MODULES | {"c": ""}) == ["c"]
    assert without_counterpart(GOOD, {"a": ""}) == ["b"]

def test_length_is_seen(): assert too_long({"a": "x = 1\n" * LINES, "b": "x = 1\n" * (LINES + 1)}) == ["b: 401 lines"]

@pytest.mark.parametrize("source", ["from .b import x", "from . import b", "import dip_uq.b", "from dip_uq.b import x",
                                    "from dip_uq import b", "def f():\n    from .b import x", "from .a import x",
                                    "class A:\n    def f(self):\n        import dip_uq.b as later"])
def test_imports_against_the_order_are_seen(source):
    other = "a" if ".a" in source else "b"
    assert modules_against_the_order(GOOD, MODULES | {"a": source}) == [f"a imports {other}"]

def test_cells_against_the_order_are_seen():
    "Also in chapters without a module, and behind a magic; a notebook may import what it exports itself."
    ahead = {"00_words": ["%matplotlib inline\nfrom dip_uq.a import x"], "01_a": ["#| default_exp a\nfrom dip_uq.a import x"]}
    plain = TransformerManager().transform_cell
    assert cells_against_the_order({n: list(map(plain, cells)) for n, cells in ahead.items()}) == ["00_words imports a"]

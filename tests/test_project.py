"""The project as a whole: notebooks, package, README and documentation belong together."""
import ast
import base64
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from execnb.nbio import read_nb

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("nbs/[!_.]*.ipynb"))
FIGURE_BYTES = 100_000
README_BYTES = 200_000
LINE_LENGTH = 120


def run(*command, cwd=ROOT):
    env = {name: value for name, value in os.environ.items() if name != "IN_TEST"}
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def texts(folder, pattern): return {path.name: path.read_text("utf-8") for path in Path(folder).glob(pattern)}


@pytest.fixture(scope="module")
def regenerated(tmp_path_factory):
    "A copy of the notebooks, cleaned, and the package as exported from them alone."
    copy = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "nbs", copy / "nbs")
    (copy / "dip_uq").mkdir()
    by_hand = "dip_uq/__init__.py", "dip_uq/__main__.py"  # nbdev cannot make the second: a notebook is named as its module
    for name in ("settings.ini", "pyproject.toml", *by_hand): shutil.copy(ROOT / name, copy / name)
    run("-c", "from nbdev.doclinks import nbdev_export as export; from nbdev.clean import nbdev_clean as clean; "
              "export.__wrapped__(); clean.__wrapped__()", cwd=copy)
    return copy


def test_package_is_in_sync(regenerated):
    committed, exported = texts(ROOT / "dip_uq", "*.py"), texts(regenerated / "dip_uq", "*.py")
    assert len(exported) > 2  # the export did something: there is more than __init__.py and _modidx.py
    assert committed.keys() == exported.keys(), "run nbdev_export; delete modules that no notebook exports"
    differ = [name for name in exported if exported[name] != committed[name]]
    assert not differ, "run nbdev_export"


def test_notebooks_are_clean(regenerated):
    cleaned = texts(regenerated / "nbs", "*.ipynb")
    differ = [path.name for path in NOTEBOOKS if cleaned[path.name] != path.read_text("utf-8")]
    assert not differ, "run tools/execute.py or nbdev_clean"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs(path):
    nb = read_nb(path)
    assert "widgets" not in nb.metadata, "the state of widgets changes at every run: run tools/execute.py"
    for cell in nb.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error", f"an error stands in the outputs of\n{cell.source}"
            shown = {"text/plain": output.get("text", ""), **output.get("data", {})}
            for mime, content in shown.items():
                content = content if isinstance(content, str) else "".join(map(str, content))
                if mime in ("image/png", "image/jpeg"):
                    size = len(base64.b64decode(content))
                    assert size <= FIGURE_BYTES, f"a figure of {size} bytes, draw it smaller:\n{cell.source}"
                else:
                    leak = re.search(r"/home/|/Users/|\\Users\\|/work/|/tmp/|/root/|site-packages|ipykernel_", content)
                    assert not leak, f"a path of this machine ({leak[0]}) in the output of\n{cell.source}"


def test_line_length():
    "Without the lines that nbdev writes: the list of exported names."
    modules = {name: re.sub(r"^__all__ = .*?\]$", "", text, flags=re.MULTILINE | re.DOTALL)
               for name, text in texts(ROOT / "dip_uq", "[!_]*.py").items()}
    long = [f"{name}: {line}" for name, text in modules.items()
            for line in text.splitlines() if len(line) > LINE_LENGTH]
    assert not long


@pytest.mark.skipif(sys.version_info < (3, 11), reason="hints are checked against those of the pinned versions")
def test_type_hints(): run("-m", "mypy")


def test_imports_are_declared():
    "What the package imports is in `requirements` of settings.ini, or in those of an extra, not only installed by chance."
    def normal(name): return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name)[0]).lower()
    nodes = [node for text in texts(ROOT / "dip_uq", "*.py").values() for node in ast.walk(ast.parse(text))]
    imported = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    settings = ConfigParser()
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    needed = " ".join(settings["DEFAULT"][key] for key in ("requirements", "scans_requirements", "volumes_requirements"))
    declared = {normal(requirement) for requirement in needed.split()}
    known = packages_distributions()
    missing = [name for name in imported - sys.stdlib_module_names - {"dip_uq"}
               if not declared & {normal(package) for package in known.get(name, [name])}]
    assert not missing, "add them to requirements in settings.ini"


def test_versions_agree():
    settings = ConfigParser()
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    version = settings["DEFAULT"]["version"]
    assert f'__version__ = "{version}"' in (ROOT / "dip_uq/__init__.py").read_text("utf-8")
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text("utf-8")


def test_readme_is_in_sync(tmp_path):
    run("docs/build.py", "--readme", "--out", tmp_path)
    made = {path.relative_to(tmp_path): path for path in tmp_path.rglob("*") if path.is_file()}
    committed = {Path("README.md"), *(path.relative_to(ROOT) for path in ROOT.glob("docs/readme_files/*"))}
    differ = [str(name) for name in made.keys() | committed if name not in made or name not in committed
              or made[name].read_bytes() != (ROOT / name).read_bytes()]
    assert not differ, "run python docs/build.py --readme"
    assert sum(path.stat().st_size for path in made.values()) <= README_BYTES

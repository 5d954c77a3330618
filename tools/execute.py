"""Execute notebooks in place and clean them, so that two runs give the same bytes.

    python tools/execute.py                      # all of nbs/
    python tools/execute.py nbs/13_dip.ipynb     # the named ones
    python tools/execute.py --slow nbs/index.ipynb # with the cells marked `#| slow`

Cells that nbdev would not test (`#| eval: false`, the `tst_flags` of settings.ini) are left out and keep the outputs
they have.
A notebook that fails stays as it was.
"""
import io
import os
import subprocess
import sys
from base64 import b64decode, b64encode
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WIDGET = "application/vnd.jupyter.widget-view+json"
STEADY = dict(OMP_NUM_THREADS="1", PYTHONHASHSEED="0", SOURCE_DATE_EPOCH="0", IN_TEST="1", PYTHONPATH=str(ROOT))
FIGURES = """
import matplotlib
matplotlib.rcParams["svg.hashsalt"] = "dip_uq"
set_matplotlib_formats("png", metadata={"Software": None})
"""


def tidy(outputs: list) -> list:
    "The `outputs` without progress bars and widgets, which differ from run to run; of a widget its picture stays."
    for output in outputs:
        if "image/png" in output.get("data", {}): output["data"].pop(WIDGET, None)
    def varies(output): return "\r" in "".join(output.get("text", "")) or WIDGET in output.get("data", {})
    return [output for output in outputs if not varies(output)]


def compact(png: str, limit: int = 100_000) -> str:
    "A base64 PNG with 256 colours if it is larger than `limit` bytes, as it is otherwise."
    from PIL import Image
    if len(data := b64decode(png)) <= limit: return png
    Image.open(io.BytesIO(data)).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small := io.BytesIO(), "PNG")
    return b64encode(small.getvalue()).decode()


def execute(path: Path, slow: bool) -> None:
    "Run one notebook in this process, on request its slow cells too, and write it back, clean."
    from execnb.nbio import write_nb
    from execnb.shell import CaptureShell
    from nbdev.clean import clean_nb
    from nbdev.config import get_config
    from nbdev.process import NBProcessor

    skip_flags = set() if slow else set(get_config().tst_flags.split())

    def skip(cell):
        flags = cell.directives_
        if cell.cell_type != "code" or "nbdev_export(" in cell.source or flags.keys() & skip_flags: return True
        if flags.get("eval:", [""])[0].lower() == "false": return True
        cell.outputs = []

    def keep(cell):
        if cell.cell_type != "code": return
        cell.outputs = tidy(cell.outputs)
        for data in (output["data"] for output in cell.outputs if "image/png" in output.get("data", {})):
            data["image/png"] = compact(data["image/png"])

    os.chdir(path.parent)
    nb = NBProcessor(path, rm_directives=False).nb
    shell = CaptureShell(path, mpl_format="png")
    shell.run(FIGURES)
    try: shell.run_all(nb, exc_stop=True, preproc=skip, postproc=keep)
    except BaseException: sys.exit(shell.prettytb(path))
    clean_nb(nb)
    nb.metadata.pop("widgets", None)
    write_nb(nb, path)


def start(path: Path, *options: str) -> int:
    "Run one notebook in a fresh process."
    code = subprocess.run([sys.executable, __file__, "--here", path, *options], env=os.environ | STEADY).returncode
    print(path.name, "failed" if code else "done", flush=True)
    return code


if __name__ == "__main__":
    options = [a for a in sys.argv[1:] if a == "--slow"]
    names = [a for a in sys.argv[1:] if a not in ("--slow", "--here")]
    if "--here" in sys.argv: sys.exit(execute(Path(names[0]), bool(options)))
    paths = [Path(name).resolve() for name in names] or sorted(ROOT.glob("nbs/[!_.]*.ipynb"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sys.exit(any(list(pool.map(lambda path: start(path, *options), paths))))

"""What the live figure costs: its share of the processor time of a fit with `progress="live"` in a real Jupyter kernel.

    python benchmarks/live.py --out live.json [--iterations 400] [--rounds 3]

96² pixels, U-Net 4 × 16, one thread. The time inside the callback that draws and sends the figure is set against the rest
of the same run, since the difference of two runs is smaller than the noise of either.
"""
import json
from statistics import median

import nbformat
from common import arguments, write
from nbclient import NotebookClient

CODE = """
import json
from time import process_time
import numpy as np, torch
import dip_uq.dip as dip
from dip_uq.data import simulate, walnut
from dip_uq.networks import UNet
from dip_uq.rays import fan_beam

torch.set_num_threads(1)
A = fan_beam(np.linspace(0, 2 * np.pi, 30, endpoint=False), (96, 96), 105, 1.4, 288, 144)
scan, runs, follow = simulate(walnut(96), A, 0.05), [], dip.follow
def timed(scan):
    draw = follow(scan)
    def act(run):
        began = process_time()
        draw(run)
        runs[-1]["drawing"] += process_time() - began
    return act
dip.follow = timed
dip.reconstruct(scan, UNet(4, 16), iterations=20, progress=False)
for _ in range({rounds}):
    runs.append(dict(drawing=0.0))
    began = process_time()
    dip.reconstruct(scan, UNet(4, 16), iterations={iterations}, progress="live")
    runs[-1]["all"] = process_time() - began
print(json.dumps(runs))
"""

if __name__ == "__main__":
    args = arguments(__doc__, iterations=400, rounds=3)
    cell = nbformat.v4.new_code_cell(CODE.format(iterations=args.iterations, rounds=args.rounds))
    NotebookClient(notebook := nbformat.v4.new_notebook(cells=[cell]), timeout=None).execute()
    outputs = notebook.cells[0].outputs
    runs = json.loads(next(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout"))
    cost = median(r["drawing"] / (r["all"] - r["drawing"]) for r in runs)
    write(dict(seconds=runs, cost=cost, figures_shown=sum("image/png" in o.get("data", {}) for o in outputs)), args.out)

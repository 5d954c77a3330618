"""Stacks of slices: what neighbours are worth, what workers are worth, and how many tasks a scheduler hands out.

    python benchmarks/volumes.py --out volumes.json [--cases stack48 stack64 scheduler] [--slices 8] [--every 1 4] [--workers 1 2]

stack…      consecutive slices from the middle of a nut of 48³ or 64³ voxels, 30 parallel projections, 5 % noise, 2,000 steps
scheduler   10,000 tasks that do nothing, on threads of this process
"""
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
import torch
from common import arguments, some, timed, write

from dip_uq.data import simulate
from dip_uq.files import versions
from dip_uq.networks import UNet
from dip_uq.rays import parallel_beam
from dip_uq.volumes import solve_volume


def nut(n):
    "Shell, gap, septum, kernel with a hole, air: (n, n, n)."
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, n)] * 3, indexing="ij")
    radius = np.sqrt((x / 0.8)**2 + (y / 0.85)**2 + (z / 0.9)**2) * (1 + 0.06 * np.sin(5 * np.arctan2(y, x)))
    image = np.select([radius >= 1, radius >= 0.82, radius >= 0.74, abs(x + 0.2 * y) < 0.06], [0, 1, 0.1, 0.1], 0.6)
    image[(x - 0.3)**2 + (y - 0.2)**2 + (z + 0.1)**2 < 0.02] = 0
    return torch.from_numpy(image).float()


def stack(size, slices, every, workers):
    "Seconds of the whole, and of a slice by whether it was fitted from fresh weights."
    A, first = parallel_beam(np.arange(30) * np.pi / 30, (size, size), round(1.42 * size)), (size - slices) // 2
    scans = [simulate(x, A, noise=0.05, seed=i) for i, x in enumerate(nut(size)[first:first + slices])]
    with TemporaryDirectory() as folder:
        told, seconds = timed(solve_volume, scans, Path(folder) / "nut.zarr", UNet(4, 16), every, workers, progress=False)
    if failed := [note["error"] for note in told if "error" in note]: raise SystemExit(failed[0])
    def of(key, notes): return [float(np.mean([note[key] for note in notes])), float(np.std([note[key] for note in notes]))]
    groups = dict(fresh=told[::every], following=[note for i, note in enumerate(told) if i % every])
    return dict(seconds=seconds, slices_per_minute=60 * slices / seconds) | {
        name: {key: of(key, notes) for key in ("psnr", "psnr_tv", "zstd", "coverage95", "seconds")} for name, notes in groups.items() if notes}


def nothing(i): return i


def scheduler(tasks=10_000):
    from dask.distributed import Client, wait
    with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=None) as client:
        began = perf_counter()
        futures = client.map(nothing, range(tasks), pure=False)
        handed = perf_counter() - began
        wait(futures)
        seconds = perf_counter() - began
    return dict(tasks=tasks, seconds_to_submit=handed, tasks_per_second=tasks / seconds)


def main():
    args = arguments(__doc__, cases=some(["stack48", "stack64", "scheduler"]), slices=8, every=[1, 4], workers=[1, 2])
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    for case in args.cases:
        size = case.removeprefix("stack")
        if size == case: works = {case: scheduler}
        else: works = {f"{case}, every {e}, {w} workers": lambda e=e, w=w: stack(int(size), args.slices, e, w) for e in args.every for w in args.workers}
        for name, work in works.items():
            if name in found: continue
            found[name] = dict(versions=versions()) | work()
            write(found, args.out)


if __name__ == "__main__": main()

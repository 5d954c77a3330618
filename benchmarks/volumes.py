"""Volumes: what neighbours and workers are worth to a stack, how many tasks a scheduler hands out, and true cone beams.

    python benchmarks/volumes.py --out volumes.json [--cases stack48 stack64 scheduler cone24 cone48 cone64] [--slices 8]
                                 [--every 1 4] [--workers 1 2] [--seeds 0 1 2] [--starts tv noise] [--iterations 1000]

stack…      consecutive slices from the middle of a nut of 48³ or 64³ voxels, 30 parallel projections, 5 % noise, 2,000 steps
scheduler   10,000 tasks that do nothing, on threads of this process
cone…       a nut of 24³, 48³ or 64³ voxels by 20 views of a cone beam, a third more bins than voxels on a side, 5 % noise: `solve`
            with UNet(3, 8), from the flattest image or from noise, beside FDK and the best of 14 weights of TV, chosen by the truth.
            Each is a process of its own, so that its peak of memory is its own.
"""
import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, process_time

import numpy as np
from common import arguments, best_tv, some, timed, write

from dip_uq.data import simulate
from dip_uq.files import peak_memory_mb, versions
from dip_uq.networks import UNet
from dip_uq.pipeline import solve
from dip_uq.pretraining import cone_scanner, nut
from dip_uq.rays import parallel_beam
from dip_uq.variation import psnr
from dip_uq.volumes import solve_volume


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


def cone(size, seed, start, iterations):
    scan, began = simulate(nut(size, seed), cone_scanner(size), noise=0.05, seed=seed), process_time()
    s = solve(scan, UNet(3, 8, dims=3), iterations=iterations, learning_rate=1e-2, start=start, seed=seed)
    cpu, memory, found = process_time() - began, peak_memory_mb(), s.summary()
    return dict(seconds=s.seconds, cpu_seconds=cpu, peak_memory_mb=memory, psnr_fdk=found["psnr_fbp"], psnr_tv=best_tv(scan, partial(psnr, truth=scan.truth)),
                psnr_tv_heldout=found["psnr_tv"], rays=found["d_y"], kept=found["evidence"]["rays"], voxels=found["d_x"],
                **{k: found[k] for k in ("psnr", "psnr_dip", "ssim", "zstd", "coverage95", "log_likelihood", "miscalibration", "heldout_zstd",
                                         "verdict", "doubts", "parameters")})


def apart(*case):
    "What `cone` finds, in a process of its own."
    with ProcessPoolExecutor(1, get_context("spawn")) as pool: return pool.submit(cone, *case).result()


def main():
    args = arguments(__doc__, cases=some(["stack48", "stack64", "scheduler", "cone24", "cone48", "cone64"]), slices=8, every=[1, 4],
                     workers=[1, 2], seeds=[0, 1, 2], starts=some(["tv", "noise"]), iterations=1000)
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    for case in args.cases:
        size = int("".join(filter(str.isdigit, case)) or 0)
        if case == "scheduler": works = {case: scheduler}
        elif case.startswith("stack"):
            works = {f"{case}, every {e}, {w} workers": lambda e=e, w=w: stack(size, args.slices, e, w) for e in args.every for w in args.workers}
        else: works = {f"{case}, {start}, nut {seed}": lambda seed=seed, start=start: apart(size, seed, start, args.iterations)
                       for seed in args.seeds for start in args.starts}
        for name, work in works.items():
            if name in found: continue
            found[name] = dict(versions=versions()) | work()
            write(found, args.out)


if __name__ == "__main__": main()

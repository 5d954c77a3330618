"""Are error bars honest where a ray counts 5, 50 or 500 photons? Many simulated scans, each with an image of its own.

    python benchmarks/counts.py --out counts.jsonl [--photons 5 50 500] [--scans 200] [--kinds transmission logarithm]

Walnuts, ellipses and disks of 16² pixels in turn, 12 parallel projections of 24 bins, at most 1.5 absorption lengths; a blank ray
counts that many photons. `transmission` gives the counts to `solve`, `logarithm` their logarithms with the noise of each, and no
reading where nothing was counted; `emission` has a mean of that many counts in a ray that crosses the middle. Called again, it
goes on where it stopped. The table: means over scans with their standard errors; z is the root of the mean square.
"""
import math
import warnings
from dataclasses import replace
from statistics import mean, stdev

import numpy as np
import torch
from common import Lines, arguments, print_table, some

from dip_uq.data import Scan, ellipses, rectangles, walnut
from dip_uq.networks import UNet
from dip_uq.pipeline import solve
from dip_uq.rays import parallel_beam

SIZE, KINDS = 16, ("transmission", "logarithm", "emission")
A = parallel_beam(np.arange(12) * np.pi / 12, (SIZE, SIZE), 24)


def scan_of(kind, photons, seed):
    truth = (walnut, ellipses, rectangles)[seed % 3](SIZE, seed).clamp(0, 1)
    draw = torch.Generator().manual_seed(seed)
    if kind == "emission":
        B = A.weighted(torch.full(A.range_shape, photons / SIZE))
        return Scan(torch.poisson(B(truth), generator=draw), B, truth, poisson=True)
    dim = 1.5 / SIZE * truth
    counts = torch.poisson(photons * torch.exp(-A(dim)), generator=draw)
    scan = Scan(counts, A, dim, blank=torch.full((24,), float(photons)))
    if kind == "transmission": return scan
    return replace(scan.logged, noise_std=counts.clamp(min=1).rsqrt(), valid=counts > 0)


def run(kind, photons, seed):
    solution = solve(scan_of(kind, photons, seed), UNet(2, 8), iterations=400, progress=False)
    s = solution.summary()
    return {key: s[key] for key in ("psnr", "psnr_dip", "zstd", "coverage95", "log_likelihood", "heldout_zstd", "share")}


def pair(values, root=False):
    values = [v * v for v in values] if root else values
    m, error = mean(values), stdev(values) / len(values)**0.5 if len(values) > 1 else math.nan
    return f"{m**0.5:.2f} ± {error / 2 / m**0.5:.2f}" if root else f"{m:.3f} ± {error:.3f}"


def main():
    args = arguments(__doc__, photons=[5, 50, 500], scans=200, kinds=some(KINDS))
    warnings.simplefilter("ignore")
    lines = Lines(args.out, "kind", "photons", "seed")
    for case in lines.missing((k, p, s) for s in range(args.scans) for p in args.photons for k in args.kinds):
        lines.add(case, run(*case))
    rows = []
    for kind in args.kinds:
        for photons in args.photons:
            found = [d for d in lines if (d["kind"], d["photons"]) == (kind, photons) and d["seed"] < args.scans]
            rows.append((kind, photons, len(found), pair([d["coverage95"] for d in found]), pair([d["zstd"] for d in found], True),
                         *(f"{mean(d[key] for d in found):.2f}" for key in ("psnr", "psnr_dip", "log_likelihood"))))
    print_table(("readings", "photons", "scans", "coverage of 95 %", "z", "PSNR", "PSNR of the fit", "log likelihood"), rows)


if __name__ == "__main__": main()

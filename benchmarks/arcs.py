"""A missing wedge: error bars of limited arcs, with what is held out at the ends of the arc, or evenly spread within it.

    python benchmarks/arcs.py --out arcs.jsonl [--arcs 90 60] [--size 48] [--iterations 600]

24 parallel projections of simulated images, 5 % noise, and 24 fan-beam projections of the disc ta (from $DIP_UQ_DATA). `spread` is `solve` with every sixth
projection held out, `ends` what it does by itself. UNet(4, 16), all else by default; scores of the field of view. The rule was chosen on walnut and ellipses. One line of
JSON for each; called again with the same file, it goes on where it stopped, and prints the table.
"""
from dataclasses import replace

import numpy as np
import torch
from common import Lines, arguments, print_table, timed
from reliability import KINDS

from dip_uq.data import Scan, _spread, simulate
from dip_uq.networks import UNet
from dip_uq.pipeline import solve
from dip_uq.rays import parallel_beam
from dip_uq.scans import load_htc2022

VIEWS = 24


def scan_of(kind, arc, size):
    "24 projections of this kind over an arc of so many degrees."
    if kind == "ta":
        full = load_htc2022("ta", 720, size)
        index = np.arange(VIEWS) * 2 * arc // VIEWS # two a degree
        return Scan(full.measurement[index], full.operator[index], full.truth, pixel_size=full.pixel_size, unit=full.unit)
    A = parallel_beam(np.deg2rad(np.arange(VIEWS) * arc / VIEWS), (size, size), round(1.45 * size))
    return simulate(KINDS[kind](size, 3), A, 0.05, 3)


def case(kind, arc, rule, size, iterations):
    scan = scan_of(kind, arc, size)
    if rule == "spread": scan = replace(scan, held_out=_spread(np.ones(VIEWS, int), VIEWS // 6))
    s, seconds = timed(solve, scan, UNet(4, 16), iterations=iterations, progress=False)
    scores = s.scores(s.std, s.judged)
    return dict(psnr=s.summary()["psnr"], psnr_dip=s.summary()["psnr_dip"], z=scores["zstd"], coverage=scores["coverage95"],
                miscalibration=scores["miscalibration"], heldout_z=s.check.z_std, share=s.posterior.share, seconds=seconds)


def main():
    args = arguments(__doc__, kinds=["walnut", "ellipses", "rectangles", "discs", "ta"], arcs=[90, 60], size=48, iterations=600)
    torch.set_num_threads(1)
    lines = Lines(args.out, "kind", "arc", "rule")
    for found in lines.missing((kind, arc, rule) for kind in args.kinds for arc in args.arcs for rule in ("ends", "spread")):
        lines.add(found, case(*found, args.size, args.iterations))
    keys = "psnr_dip", "psnr", "z", "coverage", "miscalibration", "heldout_z"
    print_table(("kind", "arc", "held out", *keys), [(*lines.case(d), *(f"{d[key]:.2f}" for key in keys)) for d in lines])


if __name__ == "__main__": main()

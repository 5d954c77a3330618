"""Scanners' own files: filtered back-projection, total variation and `solve` from few views, against FBP of all views.

    python benchmarks/scanners.py --out scanners.jsonl [--names tooth stxm] [--sizes 64 128] [--iterations 2000]

The files lie in $DIP_UQ_DATA/measured and are read as they are. The reference is FBP (Hann window) of all views and bins, in as many pixels,
averaged over larger ones. It is no truth: it has noise, rings and streaks of its own. Scores are of the field of view. One line of JSON for each case; called again with
the same file, it goes on where it stopped, and prints the table.

tv          the best of five weights, chosen by the reference, which favours it; held_out: the weight chosen by held-out projections
solve       the defaults of the command line; z of its pixels against the reference, and of four views that it never saw, by
            themselves and jointly, with the share that the image, not the noise, has in the predicted variance
all views   the same network fitted to all views: PSNR against the reference, and z of the pixels of `solve` against it
"""
import os
import warnings
from pathlib import Path

import torch
from common import Lines, arguments, print_table, some, timed
from torch.nn.functional import adaptive_avg_pool2d

from dip_uq.calibration import coverage, z_std
from dip_uq.fbp import fbp
from dip_uq.networks import UNet
from dip_uq.pipeline import solve, solve_image
from dip_uq.rays import field_of_view
from dip_uq.scans import load_scan
from dip_uq.scores import miscalibration
from dip_uq.variation import flattest, linear, psnr

FOLDER = Path(os.environ.get("DIP_UQ_DATA", "")) / "measured"
CASES = dict( # name: file, views, how it is read, pixels that its detector gives
    tooth=("tooth.h5", 30, dict(row=0), 640), pet=("pet_transmission_ecat921.npz", 24, dict(counts=True), 160),
    stxm=("stxm_i18_52x101.npz", 26, {}, 112), haadf=("haadf_needle_etspy_x128.npz", 26, {}, 256))
WEIGHTS = 0.3, 0.1, 0.03, 0.01, 0.003 # of the largest entry of Aᵀ y


def total_variations(scan):
    "Images for all weights, from the largest on."
    scan = linear(scan)
    top = float(scan.operator.T(scan.measurement).max())
    return zip(WEIGHTS, flattest(scan.operator, scan.measurement, [weight * top for weight in WEIGHTS], steps=300))


def referenced(name, size):
    "A scan of few views, FBP of all of them, the scan of all, the scan as it was recorded, and what was told while it was read."
    file, views, how, _ = CASES[name]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        every = load_scan(FOLDER / file, **how)
        scan, full = (load_scan(FOLDER / file, angles=n, size=size, **how) for n in (views, None))
    alike = every.logged.white
    return scan, adaptive_avg_pool2d(fbp(alike.operator, alike.measurement, "hann")[None], size)[0], full, every, told


def case(name, size, iterations):
    "The findings of one scan at one size."
    scan, reference, full, every, told = referenced(name, size)
    seen = field_of_view(scan.operator)
    def score(x): return psnr(x[seen], reference[seen])
    solution, seconds = timed(solve, scan, UNet(5, 32), iterations=iterations, progress=False)
    error, std, check = (solution.image - reference)[seen], solution.std[seen], solution.check
    same = solve_image(full, UNet(5, 32), iterations=iterations, progress=False).image
    best, weight = max((score(x), weight) for weight, x in total_variations(scan))
    return dict(views=CASES[name][1], of=len(every.measurement), bins=scan.measurement.shape[1], psnr_fbp=score(solution.fbp),
                psnr_tv=best, tv_weight=weight, psnr_tv_held_out=score(solution.tv), psnr_dip=score(solution.recon.image), psnr=score(solution.image),
                z=z_std(error, std), coverage=coverage(error, std),
                psnr_all=score(same), z_all=z_std((solution.image - same)[seen], std),
                miscalibration=miscalibration(error, std), heldout_z=check.z_std, heldout_share=check.image_share, unused_z=solution.unused.z_std, unused_joint_z=solution.unused.joint_z,
                unused_share=solution.unused.image_share, verdict=solution.verdict, seconds=seconds, doubts=solution.doubts, notes=[str(t.message) for t in told[:1]])


def main():
    args = arguments(__doc__, names=some(CASES), sizes=[64, 128], iterations=2000)
    torch.set_num_threads(1)
    lines = Lines(args.out, "name", "size")
    for name, size in lines.missing((name, size) for size in args.sizes for name in args.names if size <= CASES[name][3]):
        lines.add((name, size), case(name, size, args.iterations))
    keys = ("psnr_fbp", "psnr_tv", "psnr_tv_held_out", "psnr_dip", "psnr", "z", "coverage", "psnr_all", "z_all", "miscalibration", "heldout_z",
            "heldout_share", "unused_z", "unused_joint_z", "unused_share")
    print_table(("scan", "size", "views", *keys, "verdict", "seconds"),
                [(*lines.case(d), f"{d['views']} of {d['of']}", *(f"{d[k]:.2f}" for k in keys), d["verdict"], f"{d['seconds']:.0f}")
                 for d in lines])


if __name__ == "__main__": main()

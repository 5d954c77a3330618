"""Measured scans: filtered back-projection, CGLS, total variation and the deep image prior, with the same projections.

    python benchmarks/measured.py --out measured.jsonl [--names ta tb] [--angles 30 60] [--sizes 128 256]
                                   [--methods fbp dip+tv] [--iterations 2000]

The scans are from the Helsinki Tomography Challenge 2022; the truth is the published reconstruction from all 720 angles. One
line of JSON for each case and method; called again with the same file, it goes on where it stopped, and prints the table.

cgls, tv-oracle   have the number of steps or the weight that is best against the truth, each figure the best for itself
tv-held-out       chooses its weight on every sixth projection, and takes all of them for the image
dip, dip+tv       the defaults of `reconstruct`, without and with TV; nothing is chosen by the truth

`psnr` and `ssim` are of the whole image, `psnr_seen` is of the field of view: outside it the published image holds an offset
where there is air, and whoever has none pays for it.
"""
from functools import lru_cache

import torch
from common import Lines, arguments, print_table, some, timed
from skimage.metrics import structural_similarity

from dip_uq.dip import reconstruct
from dip_uq.fbp import fbp
from dip_uq.operators import cgls
from dip_uq.rays import field_of_view
from dip_uq.scans import load_htc2022
from dip_uq.variation import flattest, psnr, tv_reconstruction

METHODS = "fbp", "cgls", "tv-oracle", "tv-held-out", "dip", "dip+tv"
WEIGHTS = torch.logspace(0.75, -1.5, 10).tolist()


def tv_sweep(scan):
    "For each weight the image, and the seconds of all that lead to it."
    weights = [0.04 * weight for weight in WEIGHTS]  # 0.04 / mm: the disc
    images, seconds = timed(list, flattest(scan.operator, scan.measurement, weights))
    return [dict(image=x, seconds=seconds / len(weights), weight=weight) for x, weight in zip(images, weights)]


def methods(scan, iterations):
    "What gives the images of each method: a list of dictionaries with `image`, of which the best ones count."
    A, y = scan.operator, scan.measurement

    def image(work, *args, **more):
        found, seconds = timed(work, A, y, *args)
        return dict(image=found, seconds=seconds, **more)

    def tv_held_out():
        (found, weight), seconds = timed(tv_reconstruction, scan)
        return [dict(image=found, seconds=seconds, weight=weight)]

    def dip(tv):
        recon, seconds = timed(reconstruct, scan, tv=tv, iterations=iterations, progress=False)
        chosen, quality = recon.settings["iteration"], recon.history["psnr"]
        return [dict(image=recon.image, seconds=seconds, iteration=chosen,
                     lost_by_stopping=float(quality.max() - quality[chosen]))]

    return dict(zip(METHODS, (lambda: [image(fbp, "hann")], lambda: [image(cgls, k, steps=k) for k in range(5, 40, 5)],
                              lambda: tv_sweep(scan), tv_held_out, lambda: dip(0.0), lambda: dip(None))))


def scores(scan, images):
    "The best figures of some images; what belongs to the best PSNR comes along."
    truth, seen = scan.truth, field_of_view(scan.operator)
    span = float(truth.max() - truth.min())
    rows = [{k: v for k, v in found.items() if k != "image"} | dict(
        psnr=psnr(found["image"], truth), psnr_seen=psnr(found["image"][seen], truth[seen]),
        ssim=float(structural_similarity(truth.numpy(), found["image"].numpy(), data_range=span))) for found in images]
    best = max(rows, key=lambda row: row["psnr"])
    return best | {k: max(row[k] for row in rows) for k in ("psnr", "psnr_seen", "ssim")}


def main():
    args = arguments(__doc__, names=["ta", "tb"], angles=[30, 60], sizes=[128, 256], methods=some(METHODS), iterations=2000)
    lines, load = Lines(args.out, "name", "angles", "size", "method"), lru_cache(1)(load_htc2022)
    for name, angles, size, method in lines.missing((name, angles, size, method) for size in args.sizes
                                                    for name in args.names for angles in args.angles
                                                    for method in args.methods):
        scan = load(name, angles, size)
        lines.add((name, angles, size, method), scores(scan, methods(scan, args.iterations)[method]()))
    print_table(("scan", "angles", "size", "method", "PSNR", "in the field of view", "SSIM", "seconds"),
                [(*lines.case(d), f"{d['psnr']:.2f}", f"{d['psnr_seen']:.2f}", f"{d['ssim']:.3f}", f"{d['seconds']:.1f}")
                 for d in lines])


if __name__ == "__main__": main()

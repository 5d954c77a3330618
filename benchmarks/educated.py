"""What education is worth: the deep image prior from fresh and from educated weights, on the same scans.

    python benchmarks/educated.py --out educated.jsonl [--scans walnut ta tb] [--seeds 5] [--size 64] [--angles 30]
                                  [--weights FILE] [--methods dip edip]

Scans: simulated walnuts (5 % noise; each seed is another nut, another noise, other weights), the discs ta and tb of the Helsinki
Tomography Challenge 2022 (each seed other weights), and, to ask what an education is worth on things of another kind, ellipses, a printed
page and the head phantom of Shepp and Logan (5 % noise; each seed is another noise and other weights). All methods have the same U-Net with 4 scales of 16 channels, TV of
the default weight, and all projections. One line of JSON for each fit; called again with the same file it goes on where it stopped,
and prints the tables.

dip          fresh weights, noise as input, 1000 iterations: the defaults of `reconstruct`
dip-200      the same, but 200 iterations are all it gets: what is gained by the schedule alone
dip-fbp      fresh weights, FBP as input, 1000 iterations
dip-fbp-200  fresh weights with the input, the rate and the iterations of edip: what is gained without any education
edip         educated weights, FBP as input, 200 iterations: the defaults of `fine_tune`
edip-decoder, edip-svd    the same, but only the decoder or the singular values are trained
supervised   one pass of the educated network

Without fresh weights nothing is random on a measured scan: one run counts for all seeds. Seconds are processor time of this
process, so that other work on the machine does not count.
"""
from functools import lru_cache, partial
from pathlib import Path
from statistics import median
from time import process_time

import torch
from common import Lines, arguments, print_table, timed
from skimage import data as skimage_data
from skimage.transform import resize_local_mean

from dip_uq.data import ellipses, shepp_logan, simulate, walnut
from dip_uq.dip import reconstruct
from dip_uq.networks import UNet
from dip_uq.pretraining import FINE, Pretrained, fan_scanner, fine_tune
from dip_uq.rays import field_of_view
from dip_uq.reuse import acceleration
from dip_uq.scans import load_htc2022
from dip_uq.variation import psnr


def methods(taught):
    dip, edip = partial(reconstruct, net=UNet(4, 16)), partial(fine_tune, pretrained=taught)
    return {"dip": partial(dip, iterations=1000), "dip-200": partial(dip, iterations=200),
            "dip-fbp": partial(dip, iterations=1000, start="fbp"), "dip-fbp-200": partial(dip, start="fbp", **FINE),
            "edip": edip,
            "edip-decoder": partial(edip, train="decoder"), "edip-svd": partial(edip, train="singular values"),
            "supervised": taught}


@lru_cache(1)
def load(name, size, angles, seed):
    "The scan called `name`, see above."
    if name in ("ta", "tb"): return load_htc2022(name, angles, size)
    images = dict(walnut=lambda: walnut(size, seed), ellipses=lambda: ellipses(size, 10_000 + seed),
                  shepp_logan=lambda: shepp_logan(size), page=lambda: page(size))
    return simulate(images[name](), fan_scanner(size, angles), 0.05, seed)


def page(size):
    "A square of a printed page, ink 1 and paper about 0, inside a disc."
    image = torch.from_numpy(1 - resize_local_mean(skimage_data.page()[:, :191] / 255, (size, size))).float()
    x = torch.linspace(-1, 1, size)
    return torch.where(x[:, None]**2 + x**2 < 0.9, image.clamp(0, 1), 0)


def measure(scan, method, seed):
    "PSNR of all iterates (one, where nothing is fitted), that of the last in the field of view, and the seconds."
    options = {} if isinstance(method, Pretrained) else dict(stop="fixed", seed=seed, progress=False)
    found, seconds = timed(method, scan, clock=process_time, **options)
    image, seen = found.image if options else found, field_of_view(scan.operator)
    last = psnr(image, scan.truth)
    return dict(seconds=seconds, last=last, seen=psnr(image[seen], scan.truth[seen]),
                history=found.history["psnr"].tolist() if options else [last])


def table(lines, name):
    "A row for each method of the scan `name`: PSNR, rise in iterations and seconds, and both as shares of DIP's."
    mine = {m: [d for d in lines if (d["scan"], d["method"]) == (name, m)] for m in {d["method"]: 0 for d in lines}}
    rows = acceleration({m: [d["history"] for d in found] for m, found in mine.items() if found}, "dip")
    for row in rows:
        found = mine[row["name"]]
        row |= dict(last=median(d["last"] for d in found), seen=median(d["seen"] for d in found))
        step = median(d["seconds"] / len(d["history"]) for d in found)
        row["rise_seconds"] = None if row["rise"] is None else step * row["rise"]
        if row["name"] == "dip": whole = row
    for row in rows:
        for key, unit in (("rise", "share"), ("rise_seconds", "share_seconds")):
            row[unit] = None if None in (row[key], whole[key]) else row[key] / whole[key]
    return rows


def main():
    weights = dict(type=Path, help="a file of dip-uq pretrain, instead of the shipped one")
    args = arguments(__doc__, scans=["walnut", "ta", "tb"], seeds=5, size=64, angles=30, weights=weights,
                     methods=dict(nargs="+"))
    lines, works = Lines(args.out, "scan", "seed", "method"), methods(Pretrained.load(args.weights))
    def random(name, method): return name not in ("ta", "tb") or method.startswith("dip")
    cases = [(name, seed, method) for seed in range(args.seeds) for name in args.scans
             for method in args.methods or works if not seed or random(name, method)]
    for name, seed, method in lines.missing(cases):
        scan = load(name, args.size, args.angles, seed)
        lines.add((name, seed, method), measure(scan, works[method], seed))
    heads = ("method", "runs", "steady PSNR", "last", "in the field of view", "max − steady", "rise", "of DIP's", "rise [s]",
             "of DIP's")
    digits = dict(name="", runs="", steady=".2f", last=".2f", seen=".2f", overfitting=".2f", rise=".0f", share=".2f",
                  rise_seconds=".1f", share_seconds=".2f")
    for name in args.scans:
        print(f"\n{name}, {args.size}², {args.angles} projections\n")
        print_table(heads, [["–" if r[key] is None else f"{r[key]:{form}}" for key, form in digits.items()]
                            for r in table(lines, name)])


if __name__ == "__main__": main()

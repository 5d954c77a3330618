"""Which iterate? The rules of `reconstruct` on 3 images × 3 instruments × 3 noise levels, with and without TV.

    python benchmarks/stopping.py --out stopping.json

For every case two runs: one on all readings, of which "discrepancy", "variance" and "fixed" choose an iterate, and one
that holds every sixth out. Lost is what the chosen iterate's PSNR is below the best iterate's of its own run; for "heldout"
also below the best of the run on all readings, which includes the price of the readings that were not fitted.
"heldout, then all" takes the run on all readings at the iteration that the held-out ones chose.
"""
import itertools
from statistics import median

import torch
from common import arguments, write

from dip_uq.data import ellipses, shepp_logan, simulate, walnut
from dip_uq.dip import noise_level, reconstruct
from dip_uq.networks import UNet
from dip_uq.operators import blur, mask
from dip_uq.pretraining import fan_scanner

SIZE, ITERATIONS, NOISE = 48, 400, (0.025, 0.05, 0.1)


def instruments():
    keep = torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(0)) < 0.5
    return dict(tomography=fan_scanner(SIZE, 20),
                deblurring=blur((SIZE, SIZE), 1.5), inpainting=mask(keep))


def fit(scan, stop, tv):
    return reconstruct(scan, UNet(4, 16), tv, ITERATIONS, stop, progress=False)


def losses(scan, tv):
    "PSNR lost by each rule."
    every, part = fit(scan, "variance", tv), fit(scan, "heldout", tv)
    quality, enough = every.history["psnr"], every.history["data"] <= noise_level(scan)
    chosen = dict(variance=every.settings["iteration"], discrepancy=enough.argmax() if enough.any() else -1, fixed=-1)
    best, own = quality.max(), part.history["psnr"]
    lost = {rule: float(best - quality[i]) for rule, i in chosen.items()}
    found = own[part.settings["iteration"]]
    return lost | {"heldout": float(own.max() - found), "heldout, all readings": float(best - found),
                   "heldout, then all": float(best - quality[part.settings["iteration"]])}, float(best)


if __name__ == "__main__":
    out = arguments(__doc__).out
    images = dict(walnut=walnut(SIZE), shepp_logan=shepp_logan(SIZE), ellipses=ellipses(SIZE, 1))
    cases = []
    for image, (name, A), noise in itertools.product(images, instruments().items(), NOISE):
        scan = simulate(images[image], A, noise, seed=len(cases))
        for weight, tv in (("default", None), ("none", 0.0)):
            lost, best = losses(scan, tv)
            cases.append(dict(image=image, instrument=name, noise=noise, tv=weight, best=best, lost=lost))
            print(image, name, noise, f"TV {weight}: best {best:.2f} dB;",
                  ", ".join(f"{rule} {-value:+.2f}" for rule, value in lost.items()), flush=True)
    table = {weight: {rule: dict(median=median(v := [c["lost"][rule] for c in cases if c["tv"] == weight]), worst=max(v))
                      for rule in cases[0]["lost"]} for weight in ("default", "none")}
    write(dict(table=table, cases=cases), out)
    for weight, rules in table.items():
        for rule, lost in rules.items():
            print(f"TV {weight:8} {rule:22} median {lost['median']:.2f} dB, worst {lost['worst']:.2f} dB")

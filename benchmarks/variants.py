"""What changes to the plain deep image prior are worth: other inputs, jitter, self-guidance, subsets, averages.

    python benchmarks/variants.py --out variants.json

One loop, written out below, fits 3 images × 3 instruments (those of `stopping.py`, 5 % noise) with and without TV. Each
variant changes one thing. Its PSNR, at the last iteration and at the best, is compared with the plain loop's in the same case.

rough        the input is a rough reconstruction (CGLS; blurred where not all is measured by rays), not uniform noise
jitter       noise is added to the input in every iteration (Ulyanov et al. 2018)
sequential   from the rough input on, every second iteration the output becomes the input, and is tied to it by 0.1 or 0.01
             times mean (f(z) − z)² / mean z² (aSeqDIP, Alkhouri et al. 2024)
subsets      each iteration fits one sixth of the readings, in turn
average      the mean image with weights 0.99ⁿ over the iterations is returned (an option of Ulyanov et al. 2018)
constant     a constant learning rate, a third of the peak of the cycle
"""
import argparse
import itertools
import json
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from stopping import ITERATIONS, SIZE, instruments

from dip_uq.data import ellipses, shepp_logan, simulate, walnut
from dip_uq.dip import first_guess, picture, psnr, total_variation, tv_for_noise
from dip_uq.networks import UNet, fresh
from dip_uq.rays import RayTransform

VARIANTS = {"plain": {}, "rough": dict(rough=True), "jitter": dict(jitter=0.03),
            "sequential 0.1": dict(tie=0.1, rough=True), "sequential 0.01": dict(tie=0.01, rough=True),
            "subsets": dict(parts=6), "average": dict(decay=0.99), "constant": dict(constant=True)}


def fit(scan, tv, rough=False, jitter=0.0, tie=0.0, parts=1, decay=0.0, constant=False, rate=5e-3):
    "PSNR of every iterate (or of the average), and the seconds of one iteration."
    rays = isinstance(scan.operator, RayTransform)
    z, scale = first_guess(scan, "noise" if not rough else "cgls" if rays else "smooth")
    net, n = fresh(UNet(4, 16), 0), len(scan.measurement)
    adam = torch.optim.Adam(net.parameters(), rate / 3 if constant else rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, rate, total_steps=ITERATIONS)
    whole = [(scan.operator, scan.measurement / scale)]
    operators = whole if parts == 1 else [(scan.operator[list(range(i, n, parts))], scan.measurement[i::parts] / scale)
                                          for i in range(parts)]
    usual, draw = 0.01, torch.Generator().manual_seed(0)
    power, image, quality = (scan.measurement / scale).square().mean(), 0, []
    began = perf_counter()
    for i in range(ITERATIONS):
        A, y = operators[i % parts]
        x = picture(net, z + jitter * torch.randn(z.shape, generator=draw))
        loss = (A(x) - y).square().mean() / power + tv * total_variation(x)
        loss = loss + tie * (x - z[0, 0]).square().mean() / z.square().mean()
        image = decay * image + (1 - decay) * x.detach()
        quality.append(psnr(scale * image / (1 - decay**(i + 1)), scan.truth))
        adam.zero_grad()
        loss.backward()
        norm = min(float(torch.nn.utils.clip_grad_norm_(net.parameters(), 1.2 * usual)), 1.2 * usual)
        usual = 0.95 * usual + 0.05 * norm
        adam.step()
        if not constant: schedule.step()
        if tie and i % 2: z = x.detach()[None, None]
    return quality, (perf_counter() - began) / ITERATIONS


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the figures")
    out = parser.parse_args().out
    images, cases = dict(walnut=walnut(SIZE), shepp_logan=shepp_logan(SIZE), ellipses=ellipses(SIZE, 1)), []
    for image, (name, A) in itertools.product(images, instruments().items()):
        scan = simulate(images[image], A, 0.05, seed=len(cases))
        for weight, tv in (("default", tv_for_noise(scan)), ("none", 0.0)):
            for variant, options in VARIANTS.items():
                if variant == "subsets" and name != "tomography": continue
                quality, seconds = fit(scan, tv, **options)
                case = dict(image=image, instrument=name, tv=weight, variant=variant,
                            last=quality[-1], best=max(quality), seconds=seconds)
                cases.append(case)
                print(*case.values(), flush=True)
    plain = {(c["image"], c["instrument"], c["tv"]): c for c in cases if c["variant"] == "plain"}
    table = {}
    for weight, variant in itertools.product(("default", "none"), VARIANTS):
        mine = [(c, plain[c["image"], c["instrument"], c["tv"]]) for c in cases
                if (c["tv"], c["variant"]) == (weight, variant)]
        gains = {k: [c[k] - p[k] for c, p in mine] for k in ("last", "best")}
        table[f"TV {weight}, {variant}"] = dict(
            **{f"{k}_{name}": f(v) for k, v in gains.items() for name, f in (("median", median), ("worst", min))},
            end_below_best=median(c["best"] - c["last"] for c, _ in mine),
            seconds_ratio=median(c["seconds"] / p["seconds"] for c, p in mine))
    out.write_text(json.dumps(dict(table=table, cases=cases), indent=2))
    for name, row in table.items(): print(f"{name:24}", ", ".join(f"{k} {v:+.2f}" for k, v in row.items()))

"""Measured scans: filtered back-projection, CGLS, total variation and the deep image prior, with the same projections.

    python benchmarks/measured.py --out measured.jsonl [--names ta tb] [--angles 30 60] [--sizes 128 256]
                                   [--methods fbp dip+tv] [--iterations 1000]

The scans are from the Helsinki Tomography Challenge 2022; the truth is the published reconstruction from all 720 angles. One
line of JSON for each case and method; called again with the same file, it goes on where it stopped, and prints the table.

cgls, tv-oracle   have the number of steps or the weight that is best against the truth, each figure the best for itself
tv-held-out       chooses its weight on every sixth projection, and takes all of them for the image
dip, dip+tv       the defaults of `reconstruct`, without and with TV; nothing is chosen by the truth

`psnr` and `ssim` are of the whole image, `psnr_seen` is of the field of view: outside it the published image holds an offset
where there is air, and whoever has none pays for it.
"""
import argparse
import json
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from skimage.metrics import structural_similarity
from torch.nn.functional import pad

from dip_uq.dip import psnr, reconstruct
from dip_uq.dip import total_variation as variation
from dip_uq.operators import cgls
from dip_uq.rays import fbp, field_of_view
from dip_uq.scans import load_htc2022

WEIGHTS = torch.logspace(0.75, -1.5, 10).tolist()


def differences(x):
    return torch.stack([pad(x.diff(dim=0), (0, 0, 0, 1)), pad(x.diff(dim=1), (0, 1))])


def operator_norm(A, steps=30):
    x = torch.ones(A.domain_shape)
    for _ in range(steps): x = A.T(A(x / x.norm()))
    return x.norm().sqrt()


def total_variation(A, y, weight, x, iterations, balance=30):
    "argmin ½‖Ax − y‖² + weight |x|_TV over x ≥ 0, from `x` on, by the primal-dual method of Chambolle and Pock (2011)."
    size = operator_norm(A)
    _, differences_adjoint = torch.func.vjp(differences, x)
    ray = y / size  # A / size and D / √8 both have norm 1, so any steps with product 1/2 converge
    p, q, ahead = torch.zeros_like(y), torch.zeros(2, *A.domain_shape), x
    up, down, root8 = 0.7 / balance, 0.7 * balance, 8**0.5
    for _ in range(iterations):
        p = (p + up * (A(ahead) / size - ray)) / (1 + up)
        q = (q + up * differences(ahead) / root8).clamp(-weight * root8 / size**2, weight * root8 / size**2)
        new = (x - down * (A.T(p) / size + differences_adjoint(q)[0] / root8)).clamp(min=0)
        x, ahead = new, 2 * new - x
    return x


def tv_sweep(scan, iterations=300):
    "For each weight the image, the seconds, and how far the objective still falls if the iterations go on."
    found, x = [], torch.zeros(scan.operator.domain_shape)
    for weight in WEIGHTS:
        weight, began = weight * 0.04, perf_counter()  # 0.04 / mm: the disc
        x = total_variation(scan.operator, scan.measurement, weight, x, iterations)
        seconds = perf_counter() - began
        def objective(x): return float((scan.operator(x) - scan.measurement).square().sum() / 2 + weight * variation(x))
        longer = total_variation(scan.operator, scan.measurement, weight, x, iterations)
        found.append(dict(image=x, seconds=seconds, weight=weight, unconverged=objective(x) / objective(longer) - 1))
    return found


def methods(scan, iterations):
    "What gives the images of each method: a list of dictionaries with `image`, of which the best ones count."
    A, y = scan.operator, scan.measurement

    def timed(work, **more):
        began = perf_counter()
        return dict(image=work(), seconds=perf_counter() - began, **more)

    def tv_held_out():
        part = scan.hold_out(round(len(y) / 6))
        sweep, rest = tv_sweep(part.training), part.validation
        errors = [float((rest.operator(s["image"]) - rest.measurement).square().sum()) for s in sweep]
        best = sweep[errors.index(min(errors))]
        return [timed(partial(total_variation, A, y, best["weight"], best["image"], 300), weight=best["weight"])]

    def dip(tv):
        began = perf_counter()
        recon = reconstruct(scan, tv=tv, iterations=iterations, progress=False)
        quality = recon.history["psnr"]
        return [dict(image=recon.image, seconds=perf_counter() - began, iteration=recon.settings["iteration"],
                     lost_by_stopping=float(quality.max() - quality[recon.settings["iteration"]]))]

    return {"fbp": lambda: [timed(partial(fbp, A, y, "hann"))],
            "cgls": lambda: [timed(partial(cgls, A, y, k), steps=k) for k in range(5, 40, 5)],
            "tv-oracle": lambda: tv_sweep(scan), "tv-held-out": tv_held_out,
            "dip": lambda: dip(0.0), "dip+tv": lambda: dip(None)}


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--names", nargs="+", default=["ta", "tb"])
    parser.add_argument("--angles", nargs="+", type=int, default=[30, 60])
    parser.add_argument("--sizes", nargs="+", type=int, default=[128, 256])
    parser.add_argument("--methods", nargs="+", default=["fbp", "cgls", "tv-oracle", "tv-held-out", "dip", "dip+tv"])
    parser.add_argument("--iterations", type=int, default=1000)
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    done = {(d["name"], d["angles"], d["size"], d["method"]) for d in lines}
    for size in args.sizes:
        for name in args.names:
            for angles in args.angles:
                scan = load_htc2022(name, angles, size)
                for method, work in methods(scan, args.iterations).items():
                    if method not in args.methods or (name, angles, size, method) in done: continue
                    line = dict(name=name, angles=angles, size=size, method=method, **scores(scan, work()))
                    with args.out.open("a") as f: print(json.dumps(line), file=f)
                    lines.append(line)
    print("| scan | angles | size | method | PSNR | in the field of view | SSIM | seconds |\n" + "|---" * 8 + "|")
    for d in lines:
        print(f"| {d['name']} | {d['angles']} | {d['size']} | {d['method']} | {d['psnr']:.2f} | {d['psnr_seen']:.2f} | "
              f"{d['ssim']:.3f} | {d['seconds']:.1f} |")


if __name__ == "__main__": main()

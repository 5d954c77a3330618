"""A measured scan: the deep image prior beside total variation with its best weight, in one run.

python benchmarks/measured.py [--name ta] [--angles 30] [--size 128] [--iterations 3000] [--out FILE]

The scan is from the Helsinki Tomography Challenge 2022; the truth is the published reconstruction from all 720 angles.
Total variation gets the weight that is best against this truth (an oracle), the deep image prior chooses everything by
itself. `psnr_seen` is the PSNR in the field of view: outside it the published image holds an offset where there is air.
"""
import argparse
import json
from pathlib import Path
from time import perf_counter

import torch
from skimage.metrics import structural_similarity
from torch.nn.functional import pad

from dip_uq.data import load_htc2022
from dip_uq.dip import psnr
from dip_uq.networks import UNet
from dip_uq.operators import cgls, fbp, field_of_view
from dip_uq.pipeline import solve


def differences(x):
    return torch.stack([pad(x.diff(dim=0), (0, 0, 0, 1)), pad(x.diff(dim=1), (0, 1))])


def operator_norm(A, steps=30):
    x = torch.ones(A.domain_shape)
    for _ in range(steps): x = A.T(A(x / x.norm()))
    return x.norm().sqrt()


def total_variation(A, y, weight, iterations=2000):
    "argmin ½‖Ax − y‖² + weight |x|_TV over x ≥ 0 by the primal-dual method of Chambolle and Pock (2011)."
    size = operator_norm(A)
    x = torch.zeros(A.domain_shape)
    _, differences_adjoint = torch.func.vjp(differences, x)
    ray = y / size  # A / size and D / √8 both have norm 1
    p, q, ahead = torch.zeros_like(y), torch.zeros(2, *A.domain_shape), x
    step, root8 = 0.7, 8**0.5
    for _ in range(iterations):
        p = (p + step * (A(ahead) / size - ray)) / (1 + step)
        q = (q + step * differences(ahead) / root8).clamp(-weight * root8 / size**2, weight * root8 / size**2)
        new = (x - step * (A.T(p) / size + differences_adjoint(q)[0] / root8)).clamp(min=0)
        x, ahead = new, 2 * new - x
    return x


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="ta")
    parser.add_argument("--angles", type=int, default=30)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--iterations", type=int, default=3000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    scan = load_htc2022(args.name, args.angles, args.size)
    A, y, truth = scan.operator, scan.measurement, scan.truth
    seen = field_of_view(A)

    def score(image, seconds, **more):
        ssim = structural_similarity(truth.numpy(), image.numpy(), data_range=float(truth.max() - truth.min()))
        return dict(psnr=psnr(image, truth), psnr_seen=psnr(image[seen], truth[seen]), ssim=float(ssim),
                    seconds=seconds, **more)

    found = dict(fbp_hann=score(fbp(A, y, "hann"), 0.0),
                 cgls_oracle=max((score(cgls(A, y, k), 0.0, iterations=k) for k in range(5, 40, 5)),
                                 key=lambda s: s["psnr"]), tv_sweep=[])
    for weight in torch.logspace(-3, 0.5, 15).tolist():
        start = perf_counter()
        image = total_variation(A, y, weight * float(truth.max()))
        found["tv_sweep"].append(score(image, perf_counter() - start, weight=weight))
    found["tv_oracle"] = max(found["tv_sweep"], key=lambda s: s["psnr"])
    solution = solve(scan, UNet(5, 32), iterations=args.iterations)
    fitted = args.angles - len(solution.recon.scan.held_out)
    found["dip"] = score(solution.recon.image, solution.seconds["dip"], projections_fitted=fitted)
    found["posterior_mean"] = score(solution.image, solution.seconds["total"], **solution.scores(solution.std))
    text = json.dumps(found, indent=2)
    if args.out: args.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__": main()

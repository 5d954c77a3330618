"""Does the equivariant bootstrap see errors that the linearised network does not?

    python benchmarks/second_opinion.py [--nuts 3] [--size 48] [--draws 20] [--angles 18] [--noise 0.05] [--iterations 300]

Simulated walnuts, a fan beam, a U-Net with 3 scales of 8 channels; all fits are those of `solve`, to the same projections.

linearised    image and bars as by `solve`, from the network alone: no free pixels
bootstrap     the image of the same fit; for each draw a new measurement of it is simulated, A x̂ + noise, and reconstructed
              from fresh weights to x̂*. The bars are the root mean squares of x̂* − x̂
equivariant   as bootstrap, but the image is moved before the new measurement, and x̂* is moved back: by a random
              rotation by a multiple of 90°, a flip, and a shift of at most `REACH` pixels (Tachella and Pereyra 2023)
both          the image of linearised; the mean of the variances of linearised and equivariant

Walnuts and their moved copies both are walnuts. But the pixels that rays determine badly differ from one to the other,
unless the movement is a symmetry of the scan: with 18 projections, a quarter turn is none.

z, coverage of 95 % intervals, log likelihood per pixel, the same after all bars were multiplied by z (which only the
truth can tell: what is left is where the bars are long), rank correlation of bars and |error|, PSNR. Seconds are
processor time.
"""
import argparse
from dataclasses import replace
from statistics import mean
from time import process_time

import numpy as np
import torch
from scipy.stats import spearmanr

from dip_uq.calibration import check_held_out, coverage, log_likelihood, z_std
from dip_uq.data import simulate, walnut
from dip_uq.dip import psnr, reconstruct
from dip_uq.evidence import fit_evidence
from dip_uq.linearization import Linearization
from dip_uq.networks import UNet
from dip_uq.posterior import Posterior
from dip_uq.rays import fan_beam

REACH = 2  # pixels: the margin of air around a nut


def instrument(size, angles):
    turn = np.linspace(0, 2 * np.pi, angles, endpoint=False)
    return fan_beam(turn, (size, size), round(1.25 * size), 1.2, source_origin=3 * size, origin_detector=1.5 * size)


def move(image, turns, flip, shift):
    "Turn by `turns` · 90°, then flip left and right if `flip`, then shift by whole pixels; what leaves comes in again."
    image = torch.rot90(image, turns)
    return torch.roll(image.flip(1) if flip else image, shift, (0, 1))


def move_back(image, turns, flip, shift):
    "The inverse of `move`."
    image = torch.roll(image, [-s for s in shift], (0, 1))
    return torch.rot90(image.flip(1) if flip else image, -turns)


def movements(n, seed):
    rng = np.random.default_rng(seed)
    return [(int(rng.integers(4)), bool(rng.integers(2)), rng.integers(-REACH, REACH + 1, 2).tolist()) for _ in range(n)]


def linearised(scan, net, fit):
    "The fit, the image, and the bars with the correction by held-out rays."
    recon = reconstruct(scan, net, stop="heldout", progress=False, **fit)
    evidence = fit_evidence(Linearization(recon), progress=False)
    posterior = Posterior(evidence, check_held_out(evidence).correction)
    return recon, posterior.mean, posterior.std()


def bootstrap(recon, net, fit, moved):
    "Errors x̂* − x̂ of the image, one for each of the movements `moved`."
    scan, found = recon.scan, []
    for seed, how in enumerate(moved):
        noise = scan.noise_std * torch.randn(scan.measurement.shape, generator=torch.Generator().manual_seed(seed))
        again = replace(scan, measurement=scan.operator(move(recon.image, *how)) + noise, truth=None)
        found.append(move_back(reconstruct(again, net, stop="heldout", progress=False, **fit).image, *how) - recon.image)
    return torch.stack(found)


def marks(image, std, truth):
    error = image - truth
    z = z_std(error, std)
    return dict(z=z, coverage=coverage(error, std), log_likelihood=log_likelihood(error, std),
                at_best_factor=log_likelihood(error, z * std),
                rank_correlation=float(spearmanr(error.abs().flatten(), std.flatten())[0]), psnr=psnr(image, truth))


def timed(work, *args, **options):
    began = process_time()
    found = work(*args, **options)
    return found, process_time() - began


def one(nut, args):
    "Method → marks, and the seconds of each."
    scan, net = simulate(walnut(args.size, nut), instrument(args.size, args.angles), args.noise, seed=nut), UNet(3, 8)
    fit = dict(iterations=args.iterations, learning_rate=2e-3)
    (recon, image, std), seconds = timed(linearised, scan, net, fit)
    still, moved = [(0, False, [0, 0])] * args.draws, movements(args.draws, nut)
    (plain, plain_s), (turned, turned_s) = (timed(bootstrap, recon, net, fit, how) for how in (still, moved))
    plain, turned = (errors.square().mean(0).sqrt() for errors in (plain, turned))
    forecasts = {"linearised": (image, std, seconds), "bootstrap": (recon.image, plain, plain_s),
                 "equivariant": (recon.image, turned, turned_s),
                 "both": (image, ((std**2 + turned**2) / 2).sqrt(), seconds + turned_s)}
    return {name: marks(image, std, scan.truth) | dict(seconds=s) for name, (image, std, s) in forecasts.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nuts", type=int, default=3)
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--angles", type=int, default=18)
    parser.add_argument("--noise", type=float, default=0.05)
    parser.add_argument("--iterations", type=int, default=300)
    args = parser.parse_args()
    found = []
    for nut in range(args.nuts):
        found.append(one(nut, args))
        for name, m in found[-1].items(): print(nut, f"{name:16}", *(f"{k} {v:.2f}" for k, v in m.items()), flush=True)
    keys = list(found[0]["linearised"])
    print("\n| mean over the nuts | " + " | ".join(keys) + " |\n" + "|---" * (1 + len(keys)) + "|")
    for name in found[0]:
        print(f"| {name} | " + " | ".join(f"{mean(f[name][k] for f in found):.2f}" for k in keys) + " |")


if __name__ == "__main__": main()

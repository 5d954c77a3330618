"""Why are error bars too short or too long on KMNIST? One change at a time to one scan of `kmnist.py`.

    python benchmarks/kmnist_why.py [--image 0] [--angles 5] [--noise 0.05] [--iterations 600]
                                    [--changes hyperparameters sigmoid pixels]

hyperparameters   MLL and TV-MAP as they are; with the true noise; with the way of the weights from their random start
                  in place of the weights; in a box with 100 times the largest variance and a tenth of the shortest
                  length; and the joint evidence
sigmoid           the same network without a sigmoid at its end, so that no pixel is blind
pixels            the network alone, and `solve`, which adds free pixels; no floor is added

One line each: log likelihood per pixel, z of all pixels and of those with bars above the floor, share of blind pixels,
PSNR.
"""
import argparse
import math
from dataclasses import replace
from unittest.mock import patch

import torch
from kmnist import PIXELS, Case, floor, scores

from dip_uq.evidence import best_weights, log_parameters, maximise
from dip_uq.networks import UNet, fresh
from dip_uq.posterior import Posterior


def show(name, case, middle, C, least=None, **more):
    s = scores(middle.view(28, 28), C, case.scan.truth, floor(case.scan) if least is None else least)
    print(f"{name:30} log likelihood {s['log_likelihood']:7.2f}, z {s['z']:5.2f} ({s['z_uncertain']:5.2f}), "
          f"blind {s['blind']:.3f}, PSNR {s['psnr']:5.2f}", *(f"{k} {v:.3g}" for k, v in more.items()), sep=", ",
          flush=True)


def fitted(name, case, evidence, least=None, **more):
    ratio = evidence.noise_std / case.scan.noise_std
    show(name, case, *Posterior(evidence).predict(PIXELS), least, noise=ratio, **more)


def hyperparameters(case):
    model, known = case.model, case.scan.noise_std
    first = dict(fresh(case.net, 0).named_modules())
    start = torch.cat([first[name].weight.detach().flatten() for name in case.lin.convs])
    moved = replace(model, theta=best_weights(case.lin) - start)
    print(f"squared norms: weights {best_weights(case.lin).square().sum():.0f}, start {start.square().sum():.0f}, "
          f"way {moved.theta.square().sum():.0f}")

    def wide(model, noise_std):
        at, bounds = log_parameters(model, noise_std)
        b = len(model.blocks)
        return at, ([(low, high + math.log(100)) for low, high in bounds[:b]]
                    + [(low - math.log(10), high) for low, high in bounds[b:2 * b]] + bounds[2 * b:])
    for name, tv in (("mll", None), ("tv-map", case.tv)):
        fitted(name, case, maximise(model, "paper", None, tv=tv))
        fitted(f"{name}, true noise", case, maximise(model, "paper", known, tv=tv))
        fitted(f"{name}, true noise, way", case, maximise(moved, "paper", known, tv=tv))
        with patch("dip_uq.evidence.log_parameters", wide):
            fitted(f"{name}, wide box", case, maximise(model, "paper", None, tv=tv))
    fitted("joint, true noise", case, maximise(model, "joint", known))


def sigmoid(case):
    other = Case(*case.settings)
    other.net = UNet(3, 32, norm=False, sigmoid=False)
    for name in ("mll", "tv-map"):
        tv = other.tv if name == "tv-map" else None
        fitted(f"{name}, no sigmoid", other, maximise(other.model, "paper", None, tv=tv))
    fitted("network, no sigmoid", other, other.alone)


def pixels(case):
    for name, evidence in (("network", case.alone), ("solve", case.solution.posterior.evidence)):
        fitted(f"{name}, no floor", case, evidence, 0.0, evidence=evidence.value)


CHANGES = dict(hyperparameters=hyperparameters, sigmoid=sigmoid, pixels=pixels)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=int, default=0)
    parser.add_argument("--angles", type=int, default=5)
    parser.add_argument("--noise", type=float, default=0.05)
    parser.add_argument("--iterations", type=int, default=600)
    parser.add_argument("--changes", nargs="+", choices=CHANGES, default=list(CHANGES))
    args = parser.parse_args()
    case = Case(args.image, args.angles, args.noise, args.iterations)
    for change in args.changes: CHANGES[change](case)

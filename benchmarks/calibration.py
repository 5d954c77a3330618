"""How should hyperparameters be chosen, how much be held out, and does a fit to all projections pay?

    python benchmarks/calibration.py --out calibration.jsonl [--parts choose refit pixels few folds blocks error]
                                     [--scans walnut-3 walnut-4 disks shepp-logan ta tb] [--noise 0.05 0.02 0.1]
                                     [--shares 10 3 6] [--size 32] [--angles 20] [--few 5 8] [--iterations 600]

A U-Net of 29.7 k weights (4 scales × 16 channels), fitted as by `solve`, every 6th projection held out. Four
simulated images, fan beam, with each level of noise; and two discs of the Helsinki Tomography Challenge 2022, whose
noise nobody knows, with the published image of 720 projections for the truth (in the folder DIP_UQ_DATA). One line of
JSON for each scan and method; called again with the same file it goes on where it stopped, and prints the tables. All
of it takes about an hour of one core.

choose  every 10th, 3rd, 6th projection held out, no free pixels; the hyperparameters by conditional evidence, rays
        jointly or ray by ray, and for every 6th by the joint evidence and the paper's objective, with the noise that
        `fit_evidence` takes, or with noise that the evidence chooses
pixels  as choose, by conditional evidence, with free pixels: their variance chosen at once with the rest, or in turn,
        after it, as `solve` does; that also as if the noise were unknown
refit   solve: the mean of DIP, moved by what is held out. again: a new fit to all projections, with as many steps as
        were chosen. warm: 150 steps with all projections from the weights that were chosen. For both, hyperparameters
        and correction are those of solve
few     refit with few projections; only with the first level of noise, as folds
folds   as `solve`, for three sets of held-out projections, and with the mean log hyperparameters of the three fits
blocks  with a variance and a length for each block of the network, without and with free pixels
error   measured scans; the noise of the instrument (from all 720 projections), that of the fitted rays, errors of rays
        of variance c², correlated along the detector by exp(−bins / ρ), with the ρ of highest evidence, or free pixels

All figures are of the pixels in the field of view: z and coverage of 95 % of their errors, gain = log likelihood less
that of the best constant bar, which only the truth can tell, PSNR. rays_z is that of the held-out rays; `_corrected`
is with the bars as they have corrected them. off is how far z is from 1, |log z|.
"""
import argparse
import json
import math
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple
from unittest.mock import patch

import torch
from tqdm import tqdm

from dip_uq import evidence as evidences
from dip_uq.calibration import check_held_out, coverage, log_likelihood, z_std
from dip_uq.data import shepp_logan, simulate, walnut
from dip_uq.dip import psnr, reconstruct
from dip_uq.evidence import Model, fitted_first, fitted_noise, maximise, prior_of
from dip_uq.linearization import FREE, Linearization, class_grams
from dip_uq.networks import UNet
from dip_uq.operators import mask
from dip_uq.pretraining import disks, fan_scanner
from dip_uq.priors import network_blocks, one_block
from dip_uq.rays import field_of_view
from dip_uq.scans import load_htc2022

RATE = 2e-3
IMAGES = {"walnut-3": partial(walnut, seed=3), "walnut-4": partial(walnut, seed=4), "disks": partial(disks, seed=1),
          "shepp-logan": shepp_logan}
MEASURED = "ta", "tb"
LENGTHS = 1, 3, 10, 30  # ρ, in bins


class Setting(NamedTuple):
    name: str
    noise: float | None  # None: measured
    angles: int
    share: int  # every `share`-th projection is held out
    size: int
    iterations: int

    def scan(self):
        if self.noise is None: return load_htc2022(self.name, self.angles, self.size)
        return simulate(IMAGES[self.name](self.size), fan_scanner(self.size, self.angles), self.noise, seed=1)


def by_ray(model):
    "The conditional evidence of each held-out ray by itself."
    t, r = model.training, model.residual[model.training:]
    def nll(K, noise, *prior):
        variance = torch.linalg.cholesky(K)[t:, t:].square().sum(1)
        return 0.5 * (r.square() / variance + (2 * math.pi * variance).log()).sum()
    return nll


class Fit:
    "One reconstruction, linearised, with the class Grams of all pixels; those of rays are A G Aᵀ."
    def __init__(self, recon, blocks=one_block):
        self.lin, self.seen = Linearization(recon), field_of_view(recon.scan.operator)
        J, names = self.lin.rows(mask(torch.ones_like(recon.image, dtype=torch.bool))), blocks(self.lin)
        operator, residual, t = fitted_first(self.lin)
        self.A = torch.from_numpy(operator.matrix.toarray()).double()
        self.grams, grams = [], {}
        for b, convolutions in names.items():
            distances, own = class_grams(self.lin, J, convolutions)
            self.grams.extend(own)
            grams[b] = distances, torch.stack([self.A @ G @ self.A.T for G in own])
        self.model = Model(self.lin, names, operator, self.A.float() @ J, residual, t, grams)

    def posterior(self, evidence):
        "Mean (H, W) and covariance (pixels, pixels); as `Posterior`, but in terms of pixels."
        K, r = sum(w * G for w, G in zip(evidence.weights.tolist(), self.grams)), evidence.model.residual.clone()
        for name in ("pixels", FREE): K = K + evidence.prior.variance.get(name, 0.0) * torch.eye(len(K)).to(K)
        r[:evidence.model.training] = 0
        cross = torch.linalg.solve_triangular(evidence.factor, self.A @ K, upper=False)
        moved = torch.linalg.solve_triangular(evidence.factor, r[:, None], upper=False)[:, 0] @ cross
        image = self.lin.recon.image
        return image + moved.view(image.shape).to(image), K - cross.T @ cross

    def scores(self, evidence, correction=None):
        "All figures of one choice of hyperparameters; `correction` None: by its own held-out rays."
        middle, C = self.posterior(evidence)
        truth, std, more = self.lin.recon.scan.truth[self.seen], C.diagonal().clamp(min=1e-12).sqrt(), {}
        error, std = (middle[self.seen] - truth).double(), std.view(middle.shape)[self.seen]
        constant = log_likelihood(error, torch.full_like(error, float(error.square().mean().sqrt())))
        if correction is None:
            check = check_held_out(evidence)
            correction, more = check.correction, dict(rays_z=check.z_std, scale=check.scale, error=check.scale_error)
        for end, s in ("", 1), ("_corrected", correction):
            z = z_std(error, s * std)
            more |= {f"z{end}": z, f"off{end}": abs(math.log(z)), f"coverage95{end}": coverage(error, s * std),
                     f"gain{end}": log_likelihood(error, s * std) - constant}
        prior = evidence.prior
        return more | dict(correction=correction, psnr=psnr(middle[self.seen], truth), noise_std=evidence.noise_std,
                           value=evidence.value, variance=[*prior.variance.values()], length=[*prior.length.values()],
                           iteration=self.lin.recon.settings["iteration"])


@lru_cache(1)
def reconstructed(s, shift=0):
    "The DIP that leaves out every `share`-th projection, `shift` later than `hold_out` would choose."
    scan = s.scan()
    held_out = scan.hold_out(max(1, round(s.angles / s.share))).held_out
    scan = replace(scan, held_out=tuple(sorted((i + shift) % s.angles for i in held_out)))
    options = dict(iterations=s.iterations, stop="heldout", learning_rate=RATE, progress=False)
    return reconstruct(scan, UNet(4, 16), **options)


@lru_cache(1)
def fitted(s, shift=0, blocks=one_block):
    return Fit(reconstructed(s, shift), blocks)


def best(model, objective="conditional"):
    "The hyperparameters of highest evidence, with the noise that `fit_evidence` takes."
    noise = model.lin.recon.scan.noise_std
    if noise is None and objective not in ("joint", "paper"): noise = fitted_noise(model.lin)
    return maximise(model, objective, noise)


def with_pixels(fit, name=FREE):
    "The model with free pixels, whose variance is chosen in turn, or, under another name, at once with the rest."
    return with_block(fit.model, name, fit.A @ fit.A.T)


def choose(s):
    fit = fitted(s)
    with patch.dict(evidences.OBJECTIVES, {"by ray": by_ray}):
        for objective in ("conditional", "by ray", "joint", "paper")[:4 if s.share == 6 else 2]:
            yield dict(method=objective, **fit.scores(best(fit.model, objective)))
            if objective == "conditional" or objective == "joint" and s.noise is not None:
                yield dict(method=f"{objective}, noise fitted", **fit.scores(maximise(fit.model, objective, None)))


def refits(recon):
    "What fits all projections, given a fit that left some out."
    scan, steps = replace(recon.scan, held_out=()), recon.settings["iteration"] + 1
    options = dict(stop="fixed", progress=False, tv=recon.settings["tv"])
    return {"again": partial(reconstruct, scan, UNet(4, 16), iterations=steps, learning_rate=RATE, **options),
            "warm": partial(reconstruct, scan, recon.net, educated=True, iterations=150, learning_rate=RATE / 2,
                            **options)}


def refit(s):
    fit = fitted(s)
    evidence = best(with_pixels(fit))
    first = fit.scores(evidence)
    yield dict(method="solve", **first)
    for method, work in refits(fit.lin.recon).items():
        other = Fit(work())
        yield dict(method=method, **other.scores(replace(evidence, model=with_pixels(other)), first["correction"]))


def pixels(s):
    fit = fitted(s)
    free = with_pixels(fit)
    yield dict(method="at once", **fit.scores(best(with_pixels(fit, "pixels"))))
    yield dict(method="in turn", **fit.scores(best(free)))
    unknown = {"fitted": None} | ({} if s.noise is None else {"of fitted rays": fitted_noise(fit.lin)})
    for which, noise in unknown.items():
        yield dict(method=f"in turn, noise {which}", **fit.scores(maximise(free, "conditional", noise)))


def folds(s):
    shifts = [k * s.share // 3 for k in (0, -1, 1)]
    fits = [fitted(s, shift) for shift in shifts]
    found = [best(with_pixels(fit)) for fit in fits]
    variance, length = ([math.exp(mean(math.log(getattr(e.prior, which)[block]) for e in found))
                         for block in found[0].model.blocks] for which in ("variance", "length"))
    for fit, evidence in zip(fits, found):
        yield dict(method="own fold", **fit.scores(evidence))
        averaged = replace(evidence, prior=prior_of(evidence.model, variance, length))
        yield dict(method="mean of folds", **fit.scores(averaged))


def blocks(s):
    fit = fitted(s, blocks=network_blocks)
    yield dict(method="per block", **fit.scores(best(fit.model)))
    yield dict(method="per block, free pixels", **fit.scores(best(with_pixels(fit))))


def with_block(model, name, G):
    "The model with one more block, whose share of K_yy is its variance times `G`."
    own = torch.zeros(1, dtype=torch.float64), G[None]
    return replace(model, blocks=model.blocks | {name: []}, grams=model.grams | {name: own})


def correlated(model, length):
    "Errors of the rays that are correlated by exp(−|i − j| / `length`) within a projection."
    projections, bins = model.operator.range_shape
    lag = torch.arange(bins).double()
    return torch.block_diag(*[torch.exp(-(lag[:, None] - lag).abs() / length)] * projections)


def instrument_noise(y):
    "From second differences over neighbouring projections, of 720 in `y`: rms / √6, resistant to edges by medians."
    return float((y[2:] - 2 * y[1:-1] + y[:-2]).abs().median()) / 0.6745 / 6**0.5


def error(s):
    fit, noise = fitted(s), instrument_noise(load_htc2022(s.name, 720, s.size).measurement.double())
    yield dict(method="noise of the instrument", **fit.scores(maximise(fit.model, "conditional", noise)))
    yield dict(method="noise of fitted rays", **fit.scores(best(fit.model)))
    models = {rho: with_block(fit.model, "error", correlated(fit.model, rho)) for rho in LENGTHS}
    tried = {rho: best(model) for rho, model in models.items()}
    rho = max(tried, key=lambda rho: tried[rho].value)
    yield dict(method="correlated errors", **fit.scores(tried[rho]), rho=rho, c=tried[rho].prior.variance["error"]**0.5)
    yield dict(method="free pixels", **fit.scores(best(with_pixels(fit))))


PARTS = dict(choose=choose, refit=refit, pixels=pixels, few=refit, folds=folds, blocks=blocks, error=error)


def tasks(args):
    "Parts and settings; the parts of one scan in a row, so that they share a fit."
    for level in args.noise:
        for name in args.scans:
            noise = None if name in MEASURED else level
            if noise is None and level != args.noise[0]: continue
            for part in args.parts:
                if part == "error" and noise is not None: continue
                if part in ("few", "folds") and level != args.noise[0]: continue
                for angles in args.few if part == "few" else [args.angles]:
                    for share in args.shares if part == "choose" else [6]:
                        yield part, Setting(name, noise, angles, share, args.size, args.iterations)


def table(lines, keys):
    "Median over the scans, in brackets the lowest and the highest, for each method in each setting."
    groups = {}
    about = "part", "share", "angles", "kind", "method"
    for d in lines: groups.setdefault(tuple(d[k] for k in about), []).append(d)
    print("| part | 1 in | projections | scans | method | " + " | ".join(keys) + " |")
    print("|---" * (5 + len(keys)) + "|")
    for (part, share, angles, kind, method), found in groups.items():
        cells = []
        for values in ([d[key] for d in found if d.get(key) is not None] for key in keys):
            span = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
            cells.append(f"{median(values):.2f}{span}" if values else "–")
        print(f"| {part} | {share} | {angles} | {len(found)} {kind} | {method} | " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--scans", nargs="+", choices=[*IMAGES, *MEASURED], default=[*IMAGES, *MEASURED])
    parser.add_argument("--noise", nargs="+", type=float, default=[0.05, 0.02, 0.1])
    parser.add_argument("--shares", nargs="+", type=int, default=[10, 3, 6])
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--angles", type=int, default=20)
    parser.add_argument("--few", nargs="+", type=int, default=[5, 8])
    parser.add_argument("--iterations", type=int, default=600)
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    def task_of(d): return d["part"], Setting(*(d[k] for k in Setting._fields))
    wanted, done = list(tasks(args)), set(map(task_of, lines))
    for part, setting in tqdm([task for task in wanted if task not in done]):
        about = dict(part=part, kind="simulated" if setting.noise else "measured", **setting._asdict())
        found = [about | line for line in PARTS[part](setting)]
        with args.out.open("a") as f: print(*map(json.dumps, found), sep="\n", file=f)
        lines += found
    shown = [d for d in lines if task_of(d) in wanted]
    for measures in (("z", "off", "coverage95", "gain", "rays_z", "psnr"),
                     ("correction", "z_corrected", "off_corrected", "coverage95_corrected", "gain_corrected")):
        print()
        table(shown, measures)
    print()
    for d in shown:
        if d["part"] == "error":
            print({k: d.get(k) for k in ("name", "angles", "method", "value", "noise_std", "c", "rho", "rays_z", "z",
                                         "coverage95", "gain", "psnr")})


if __name__ == "__main__": main()

"""Whose error bars can be believed? The experiment of arXiv:2203.00479 on the images of KMNIST.

    python benchmarks/kmnist.py --out kmnist.jsonl [--images 10] [--angles 5 10 20 30] [--noise 0.05 0.1]
                                [--methods constant dropout mll tv-map network solve carried] [--iterations 600] [--workers N]

28² pixels, parallel beam, 41 rays in a projection; a U-Net of 76.6 k weights: 3 scales × 32 channels, no normalisation,
sigmoid. Needs kmnist/kmnist_test_first50.npz in the folder DIP_UQ_DATA. One line of JSON for each image, setting and
method, and all settings of an image before the next image; called again with the same file it goes on where it stopped,
and prints the tables.

constant       the image of DIP, and one number for all bars: the best one, which only the truth can tell
constant-rays  the image of DIP without the projections that are held out, and one number for all bars from these
dropout        MC dropout, 5 % of the features, 1024 samples
mll            linearised DIP; the noise, and a variance and a length for each block, by the paper's objective
tv-map         as mll, with the TV prior over the lengths
joint          as mll, by the joint evidence; not among the defaults
network        one variance and one length by the conditional evidence, corrected by the held-out rays
solve          `solve`: the same, and then free pixels
carried        the variance and the length of `network`, for the image of DIP from all projections

`angles` is the budget of every method: what is held out comes out of it. All fits have the learning rate of `solve`.
Those to all projections stop as soon as the data error is that of the noise, the others take the iterate that is best
on what they hold out.

A network that ends in a sigmoid has pixels without any slope, whose bars are zero: see `floor`, which is added to all
variances but the constant ones before they are scored. z_uncertain is the z-std of the pixels whose bars are longer
than the floor; blind is the share of pixels that have shorter ones and err by more than four floors. below_tv_map is
how much lower the log likelihood is than that of tv-map on the same scan. Seconds are processor time; what methods
share counts for the first of them.
"""
import math
import os
from dataclasses import replace
from functools import cached_property, partial
from itertools import groupby
from multiprocessing import get_context
from statistics import mean, stdev
from time import process_time

import numpy as np
import torch
from common import Lines, arguments, print_table, some, timed
from common import kmnist as image
from torch.distributions import MultivariateNormal
from tqdm import tqdm

from dip_uq.baselines import mc_dropout
from dip_uq.calibration import check_held_out, coverage, log_likelihood, z_std
from dip_uq.covariance import Model
from dip_uq.data import simulate
from dip_uq.dip import reconstruct
from dip_uq.evidence import fit_evidence, log_parameters, maximise, prior_of
from dip_uq.linearization import Linearization
from dip_uq.networks import UNet
from dip_uq.operators import mask
from dip_uq.pipeline import solve
from dip_uq.posterior import Posterior
from dip_uq.priors import TVPrior
from dip_uq.rays import parallel_beam
from dip_uq.scores import crps, patches_of
from dip_uq.variation import psnr

PIXELS = mask(torch.ones(28, 28, dtype=torch.bool))  # all of them, seen directly


def floor(scan):
    "Noise as seen by a pixel: σ_y² mean diag (AᵀA)⁺, by the 100 largest singular values as in the paper's code."
    singular = torch.linalg.svdvals(torch.from_numpy(scan.operator.matrix.toarray()).double())[:100]
    return scan.noise_std**2 * float((1 / singular**2).sum()) / scan.operator.matrix.shape[1]


class Case:
    "One scan, and what the methods share. A method returns its mean (28, 28), its covariance (784, 784), and remarks."
    def __init__(self, index, angles, noise, iterations):
        A = parallel_beam(np.linspace(0, np.pi, angles, endpoint=False), (28, 28), 41)
        self.scan, self.net, self.seconds = simulate(image(index), A, noise, seed=index), UNet(3, 32, norm=False), {}
        self.settings, self.fit = (index, angles, noise, iterations), dict(iterations=iterations, learning_rate=2e-3)

    def timed(self, step, work, *args, **options):
        found, self.seconds[step] = timed(work, *args, clock=process_time, **options)
        return found

    @cached_property
    def lin(self):
        fit = dict(stop="discrepancy", progress=False, **self.fit)
        return Linearization(self.timed("dip", reconstruct, self.scan, self.net, **fit))

    @cached_property
    def model(self): return self.timed("jacobian", Model.build, self.lin, shared=False)

    @cached_property
    def tv(self): return self.timed("tv", TVPrior.build, self.lin, self.model.blocks)

    @cached_property
    def solution(self):  # one sample for its bars, which are not used: `conditional` computes them all, with covariances
        return self.timed("solve", solve, self.scan, self.net, samples=1, progress=False, **self.fit)

    @cached_property
    def alone(self): return self.timed("evidence", fit_evidence, Linearization(self.solution.recon), progress=False)

    def constant(self):
        x, settings = self.lin.recon.image, self.lin.recon.settings
        return x, (x - self.scan.truth).square().mean() * torch.eye(x.numel()), dict(iteration=settings["iteration"])

    def constant_rays(self):
        "mean r_h² = σ_y² + s² mean ‖a_h‖² for independent errors of the pixels; s² is at least what would be seen."
        recon, noise = self.solution.recon, self.scan.noise_std**2
        rest = recon.scan.validation
        r = rest.operator(recon.image) - rest.measurement
        surplus = max(float(r.square().mean()) - noise, noise * math.sqrt(2 / r.numel()))
        variance = surplus * r.numel() / float(rest.operator.matrix.power(2).sum())
        return recon.image, variance * torch.eye(recon.image.numel()), {}

    def dropout(self):
        found = self.timed("dropout", mc_dropout, self.scan, self.net, samples=1024, stop="discrepancy", **self.fit)
        return found.mean, torch.cov(found.samples.flatten(1).T), {}

    def linearised(self, objective, tv=False):
        model, prior = self.model, self.tv if tv else None
        found = self.timed("evidence", maximise, model, objective, None, tv=prior)
        hyper = [*found.prior.variance.values(), *found.prior.length.values(), found.noise_std**2]
        bounds = log_parameters(model, None)[1]
        at_bound = [min(abs(math.log(h) - end) for end in ends) < 0.01 for h, ends in zip(hyper, bounds)]
        middle, C = self.timed("posterior", Posterior(found).predict, PIXELS)
        more = dict(variance=found.prior.variance, length=found.prior.length, at_bound=sum(at_bound),
                    noise_ratio=found.noise_std / self.scan.noise_std)
        return middle.view(28, 28), C, more

    def conditional(self, evidence):
        check, prior = check_held_out(evidence), evidence.prior
        middle, C = self.timed("posterior", Posterior(evidence, check.correction).predict, PIXELS)
        return middle.view(28, 28), C, dict(variance=prior.variance, length=prior.length, scale=check.scale,
                                            scale_error=check.scale_error, correction=check.correction,
                                            iteration=self.solution.recon.settings["iteration"])

    def network(self): return self.conditional(self.alone)

    def solve(self): return self.conditional(self.solution.posterior.evidence)

    def carried(self):
        b, chosen = len(self.model.blocks), self.alone.prior
        prior = prior_of(self.model, [chosen.variance["all"]] * b, [chosen.length["all"]] * b)
        middle, C = self.timed("posterior", Posterior(replace(self.alone, model=self.model, prior=prior)).predict, PIXELS)
        return middle.view(28, 28), C, {}


METHODS = {"constant": Case.constant, "constant-rays": Case.constant_rays, "dropout": Case.dropout,
           "mll": partial(Case.linearised, objective="paper"),
           "tv-map": partial(Case.linearised, objective="paper", tv=True),
           "joint": partial(Case.linearised, objective="joint"),
           "network": Case.network, "solve": Case.solve, "carried": Case.carried}


def patch_density(C, error, size):
    "log N(error; 0, C) per pixel of square patches, mean over the patches."
    where = patches_of(torch.arange(error.numel()).view(1, *error.shape), size)[:, 0]
    e = error.flatten().double()[where]
    of_patches = MultivariateNormal(torch.zeros_like(e), C[where[:, :, None], where[:, None]])
    return float(of_patches.log_prob(e).mean()) / size**2


def scores(middle, C, truth, least):
    "All figures of a forecast; `least` is added to its variances."
    C, error = C.double(), middle - truth
    raw = C.diagonal().view(truth.shape)
    C = (C + C.T) / 2 + (least + 1e-9) * torch.eye(len(C))
    std, root = C.diagonal().view(truth.shape).clamp(min=1e-9).sqrt(), max(least, 1e-9)**0.5
    uncertain = raw > root**2
    return dict(log_likelihood=log_likelihood(error, std), z=z_std(error, std), coverage95=coverage(error, std),
                crps=crps(error, std), psnr=psnr(middle, truth), uncertain=float(uncertain.float().mean()),
                z_uncertain=z_std(error[uncertain], std[uncertain]) if uncertain.any() else None,
                blind=float((~uncertain & (error.abs() > 4 * root)).float().mean()),
                log_likelihood_2=patch_density(C, error, 2), log_likelihood_10=patch_density(C, error, 10))


def run(task):
    "The findings of one image and setting, and of which case each is."
    settings, names = task
    case, found = Case(*settings), []
    for name in names:
        case.seconds = {}
        middle, C, more = METHODS[name](case)
        least = 0.0 if name.startswith("constant") else floor(case.scan)
        figures = dict(**scores(middle, C, case.scan.truth, least), floor=least**0.5, seconds=case.seconds, **more)
        found.append(((*settings, name), figures))
    return found


def compare(lines):
    "Add to each line how far its log likelihood is below that of tv-map on the same scan, or None."
    def scan(d): return d["image"], d["angles"], d["noise"]
    best = {scan(d): d["log_likelihood"] for d in lines if d["method"] == "tv-map"}
    return [d | dict(below_tv_map=best[scan(d)] - d["log_likelihood"] if scan(d) in best else None) for d in lines]


def table(lines, settings, names, key):
    "Mean and standard error over the images."
    def cell(name, setting):
        found = [d[key] for d in lines if (d["angles"], d["noise"], d["method"]) == (*setting, name)]
        found = [value for value in found if value is not None]
        if not found: return "–"
        return f"{mean(found):.3f}" + (f" ± {stdev(found) / len(found)**0.5:.3f}" if len(found) > 1 else "")
    print(f"\n{key}\n")
    print_table(["projections, noise", *names],
                [[f"{a}, {p:.0%}", *(cell(name, (a, p)) for name in names)] for a, p in settings])


def seconds(lines, names):
    "Mean of each step of each method."
    print("\nseconds\n")
    for name in names:
        found = [d["seconds"] for d in lines if d["method"] == name]
        steps = {step: mean(d[step] for d in found if step in d) for step in dict.fromkeys(s for d in found for s in d)}
        print(f"{name}: " + ", ".join(f"{step} {s:.1f}" for step, s in steps.items()))


def main():
    args = arguments(__doc__, images=dict(type=int, default=10, choices=range(1, 51), metavar="N", help="the first N"),
                     angles=[5, 10, 20, 30], noise=[0.05, 0.1], methods=some(METHODS, [m for m in METHODS if m != "joint"]),
                     iterations=600, workers=dict(type=int, default=os.cpu_count(), help="processes of one thread each"))
    lines = Lines(args.out, "image", "angles", "noise", "iterations", "method")
    settings = [(a, p) for p in args.noise for a in args.angles]
    missing = lines.missing((index, *setting, args.iterations, method) for index in range(args.images)
                            for setting in settings for method in args.methods)
    todo = [(case, [method for *_, method in cases]) for case, cases in groupby(missing, lambda case: case[:-1])]
    with get_context("spawn").Pool(args.workers, torch.set_num_threads, (1,)) as pool:
        for found in tqdm(pool.imap_unordered(run, todo), total=len(todo)):
            for case, figures in found: lines.add(case, figures)
        pool.close()
        pool.join()
    shown = compare([d for d in lines if d["iterations"] == args.iterations and d["image"] < args.images])
    print(f"{len({d['image'] for d in shown})} images, at most {args.iterations} iterations")
    for key in ("log_likelihood", "below_tv_map", "log_likelihood_2", "log_likelihood_10", "z", "z_uncertain", "blind",
                "coverage95", "crps", "psnr"): table(shown, settings, args.methods, key)
    seconds(shown, args.methods)


if __name__ == "__main__": main()

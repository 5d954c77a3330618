"""How far can the error bars of measured discs be trusted, and what do they not know of?

    python benchmarks/discs.py --out discs.jsonl [--parts solve one-ray fine-pixels profile reference]
                               [--names ta tb] [--angles 30 60] [--seeds 0]

Discs of the Helsinki Tomography Challenge 2022 at 64² pixels and 70 bins, from the folder DIP_UQ_DATA; the published
image of 720 projections is the truth, for scores only. A U-Net of 4 scales of 16 channels, all else by default. One
line of JSON for each case; called again with the same file it goes on where it stopped, and prints them. One to three
minutes of one core for each.

solve        `solve`; fitted and held_out are root mean squares of what the image of DIP leaves of these rays
one-ray      the same with one ray through the middle of each bin, rather than the mean of eight
fine-pixels  the same with 128² pixels and 70 bins; scores of means over 2 × 2 pixels, by 256 samples
profile      log evidence and scores where the free pixels have a given standard deviation, the hyperparameters of the
             network as `solve` has chosen them
reference    only with the first seed: root mean square differences inside the disc (33 of its 35 mm): of the published
             image from our filtered back-projection of 720 projections at 512² pixels, averaged; from the same network
             fitted to 360 projections ("more"); of this one from `solve`, and the error bars there. And of what the
             fit to 360 leaves of all 720: its correlation over 0.5° and 6°, and the noise of the instrument, by second
             differences over neighbouring projections
"""
from dataclasses import replace
from functools import lru_cache

import torch
from common import Lines, arguments, some
from torch.nn.functional import avg_pool2d

from dip_uq.calibration import check_held_out, coverage, log_likelihood, z_std
from dip_uq.dip import reconstruct
from dip_uq.evidence import conditional_objective, prior_of
from dip_uq.fbp import fbp
from dip_uq.linearization import FREE
from dip_uq.networks import UNet
from dip_uq.pipeline import solve
from dip_uq.posterior import Posterior
from dip_uq.rays import fan_beam, field_of_view
from dip_uq.scans import load_htc2022
from dip_uq.scores import miscalibration
from dip_uq.variation import psnr

SIZE, BINS = 64, 70
STDS = 1e-4, 3e-4, 5e-4, 7e-4, 1e-3, 1.4e-3  # 1/mm


def scores(mean, std, truth, seen):
    "Of the pixels that every projection sees."
    e, s = (mean - truth)[seen], std[seen]
    return dict(psnr=psnr(mean[seen], truth[seen]), z=z_std(e, s), coverage95=coverage(e, s),
                log_likelihood=log_likelihood(e, s), miscalibration=miscalibration(e, s))


def rms(x): return float(x.double().square().mean().sqrt())


@lru_cache(1)
def solved(name, angles, seed, fine=1, rays=None):
    scan = load_htc2022(name, angles, fine * SIZE, BINS)
    if rays is not None:
        g = scan.operator.geometry
        beam = fan_beam(g.angles, scan.operator.domain_shape, g.bins, g.bin_size, g.source_origin, g.origin_detector,
                        g.pixel_size, rays)
        scan = replace(scan, operator=beam)
    return solve(scan, UNet(4, 16), samples=0 if fine == 1 else 2, seed=seed, progress=False)


def about(solution):
    "What needs no truth."
    evidence = solution.posterior.evidence
    r, t, tau = evidence.model.residual, evidence.model.training, evidence.prior.variance[FREE]**0.5 * solution.recon.scale
    return dict(rays_z=solution.check.z_std, fitted=rms(r[:t]), held_out=rms(r[t:]), free_pixels=tau,
                value=evidence.value, correction=solution.check.correction, verdict=solution.verdict,
                unused_z=solution.unused.z_std, unused_joint_z=solution.unused.joint_z, unused_share=solution.unused.image_share)


def instrument_noise(y):
    "From second differences over neighbouring projections, of 720 in `y`: rms / √6, resistant to edges by medians."
    return float((y[2:] - 2 * y[1:-1] + y[:-2]).abs().median()) / 0.6745 / 6**0.5


def seen_by_averaged(name, angles): return field_of_view(load_htc2022(name, angles, SIZE, BINS).operator)


def plain(name, angles, seed, rays=None):
    s = solved(name, angles, seed, rays=rays)
    yield about(s) | scores(s.image, s.std, s.scan.truth, seen_by_averaged(name, angles))


def one_ray(name, angles, seed): return plain(name, angles, seed, rays=1)


def fine_pixels(name, angles, seed):
    s = solved(name, angles, seed, fine=2)
    mean, truth, samples = (avg_pool2d(x[:, None], 2)[:, 0]
                            for x in (s.image[None], s.scan.truth[None], s.posterior.sample(256)))
    yield about(s) | scores(mean[0], samples.std(0), truth[0], seen_by_averaged(name, angles))


def profile(name, angles, seed):
    s = solved(name, angles, seed)
    evidence, scale = s.posterior.evidence, s.recon.scale
    prior, nll = evidence.prior, conditional_objective(evidence.model)
    for tau in STDS:
        variance, length = [prior.variance["all"], (tau / scale)**2], [prior.length["all"], 1.0]
        found = replace(evidence, prior=prior_of(evidence.model, variance, length))
        posterior = Posterior(found, share=s.posterior.share)
        yield dict(free_pixels=tau, value=-float(nll(found.covariance)), rays_z=check_held_out(found).z_std) | scores(
            posterior.mean, posterior.std(progress=False), s.scan.truth, seen_by_averaged(name, angles))


def reference(name, angles, seed):
    s, full = solved(name, angles, seed), load_htc2022(name, 720, SIZE, BINS)
    fine = load_htc2022(name, 720, 512, 560)
    place = (torch.arange(SIZE) - (SIZE - 1) / 2) * full.pixel_size  # mm
    inside = torch.hypot(place[:, None], place) < 33
    back = avg_pool2d(fbp(fine.operator, fine.measurement)[None, None], 512 // SIZE)[0, 0]
    image = reconstruct(load_htc2022(name, 360, SIZE, BINS), UNet(4, 16), iterations=1500, stop="heldout", seed=seed,
                        learning_rate=2e-3, progress=False).image
    y = full.measurement
    left = (full.operator(image) - y) * (y > 0.2)  # rays through the disc
    def correlation(steps): return float((left * left.roll(steps, 0)).sum() / left.square().sum())
    def apart(a, b): return rms((a - b)[inside])
    published = s.scan.truth
    yield dict(fbp_from_published=apart(back, published), more_from_published=apart(image, published),
               solve_from_published=apart(s.image, published), solve_from_more=apart(s.image, image),
               std=rms(s.std[inside]), left=rms(left[y > 0.2]), correlation_half_degree=correlation(1),
               correlation_six_degrees=correlation(12),
               instrument=instrument_noise(y.double()))


PARTS = {"solve": plain, "one-ray": one_ray, "fine-pixels": fine_pixels, "profile": profile, "reference": reference}


def main():
    args = arguments(__doc__, parts=some(PARTS), names=["ta", "tb"], angles=[30, 60], seeds=[0])
    wanted = [(part, name, angles, seed) for name in args.names for angles in args.angles for seed in args.seeds
              for part in args.parts if part != "reference" or seed == args.seeds[0]]
    lines = Lines(args.out, "part", "name", "angles", "seed")
    for part, *case in lines.missing(wanted): lines.add((part, *case), *PARTS[part](*case))
    for d in lines:
        if lines.case(d) in wanted:
            print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else str(v) for k, v in d.items()))


if __name__ == "__main__": main()

"""Real size: the whole way from a scan to error bars, and whether combinations of rays say the same as all rays.

    python benchmarks/scale.py --out scale.jsonl [--cases 64 128 256 512 walnut60 walnut120 agree64 agree96 agree128] [--channels 32]
                               [--phantoms 0]

64 … 512    `solve` of a walnut: 30 projections up to 128², 60 for 256², 120 for 512², 1.1 bins for a pixel, 5 % noise
walnut…     the talk's: 501² pixels, 60 or 120 projections of 128 bins
agree…      one fit; hyperparameters, error bars of 500 pixels, image and held-out check by all rays and by combinations

Each case is a process of its own, so that its peak of memory is its own. One line of JSON for each; called again with the
same file, it goes on where it stopped, and prints the tables. Seconds are wall clock; cpu_seconds tell how much of it
the machine was busy with others. `predicted` is what `solve` told beforehand.
"""
import subprocess
import sys
from dataclasses import replace
from time import perf_counter, process_time

import numpy as np
import torch
from common import Lines, arguments, print_table, some

import dip_uq.covariance as covariance
from dip_uq.calibration import check_held_out, coverage, z_std
from dip_uq.covariance import forecast
from dip_uq.data import simulate, walnut
from dip_uq.dip import reconstruct
from dip_uq.evidence import conditional_nll, fit_evidence
from dip_uq.files import peak_memory_mb
from dip_uq.linearization import Linearization, unit_vectors
from dip_uq.networks import UNet
from dip_uq.pipeline import solve
from dip_uq.posterior import Posterior
from dip_uq.rays import fan_beam

WHOLE = {str(size): (size, angles, round(1.1 * size), 1.5) for size, angles in ((64, 30), (96, 30), (128, 30), (256, 60), (512, 120))} | {
    f"walnut{angles}": (501, angles, 128, 1.4 * 501 / 128) for angles in (60, 120)} # pixels along an axis, projections, bins, width of a bin
CASES = [*(case for case in WHOLE if case != "96"), *(f"agree{size}" for size in (64, 96, 128))]


def scan_of(size, angles, bins, width, seed=0):
    "A walnut, whole, from all around."
    A = fan_beam(np.linspace(0, 2 * np.pi, angles, endpoint=False), (size, size), bins, width, source_origin=3 * size, origin_detector=1.5 * size)
    return simulate(walnut(size, seed), A, noise=0.05, seed=seed)


def whole(case, seed, channels):
    scan, net, began = scan_of(*WHOLE[case], seed), UNet(5 if channels > 16 else 4, channels), process_time()
    told = forecast(scan, net, 2000, 512 if scan.truth.numel() > 5000 else 0)
    s = solve(scan, net, seed=seed)
    error, found, seconds = s.image - scan.truth, s.summary(), s.seconds
    return dict(seconds=dict(fit=seconds["dip"], covariance=seconds["jacobian"], evidence=seconds["evidence"], posterior=seconds["posterior"],
                             total=seconds["total"]), cpu_seconds=process_time() - began, peak_memory_mb=peak_memory_mb(), predicted=told,
                method="rays" if found["evidence"]["rays"] == found["d_y"] else "combinations", kept=found["evidence"]["rays"],
                **{k: found[k] for k in ("psnr", "psnr_dip", "psnr_tv", "psnr_fbp", "zstd", "coverage95", "log_likelihood", "miscalibration",
                                         "heldout_zstd", "verdict", "doubts", "parameters", "prior")},
                rays=found["d_y"], pixels=error.numel())


def deviations(evidence, pixels):
    "The exact standard deviation of some pixels."
    lin, shape, found = evidence.model.lin, evidence.model.lin.recon.image.shape, []
    for i in pixels.split(10):
        prior, explained = evidence.covariance.explained(lin.vjp(torch.cat([unit_vectors(shape, range(j, j + 1), lin.recon.image) for j in i.tolist()])))
        found.append((prior.diagonal() - explained.diagonal()).sqrt())
    return torch.cat(found)


def agreement(case, seed, channels):
    scan = scan_of(*WHOLE[case], seed)
    size = len(scan.truth)
    lin = Linearization(reconstruct(scan, UNet(4, channels), stop="heldout", seed=seed, progress=False), free_pixels=True)
    pixels, found = torch.randperm(size**2, generator=torch.Generator().manual_seed(0))[:500], {}
    for name, few in (("rays", 10**6), ("combinations", 0)):
        covariance.FEW, began = few, perf_counter()
        evidence = fit_evidence(lin, progress=False)
        seconds, check = perf_counter() - began, check_held_out(evidence)
        std, mean = deviations(evidence, pixels), Posterior(evidence).mean
        error = (mean - scan.truth).flatten()[pixels]
        found[name] = dict(evidence=evidence, std=std, mean=mean.flatten()[pixels], seconds=seconds, kept=len(evidence.model.residual),
                           z=z_std(error, std), coverage=coverage(error, std), check_z=check.z_std, check_scale=check.scale)
    rays, few = found["rays"], found["combinations"]
    theirs = replace(rays["evidence"], prior=few["evidence"].prior).covariance
    lost = float(conditional_nll(theirs, theirs.residual, rays["evidence"].model.training)) + rays["evidence"].value
    ratio = few["std"] / rays["std"]
    def told(d): return dict(variance=d["evidence"].prior.variance, length=d["evidence"].prior.length) | {
        k: d[k] for k in ("seconds", "kept", "z", "coverage", "check_z", "check_scale")}
    return dict(rays=told(rays), combinations=told(few), nats_lost=lost, std_ratio=[float(ratio.quantile(q)) for q in (0.05, 0.5, 0.95)],
                mean_moved=float(((few["mean"] - rays["mean"]) / rays["std"]).square().mean().sqrt()), peak_memory_mb=peak_memory_mb())


def main():
    args = arguments(__doc__, cases=some(CASES), channels=32, phantoms=[0], alone=dict(help="of one case, in this process", nargs=2))
    lines = Lines(args.out, "case", "phantom", "channels")
    if args.alone:
        case, seed = args.alone[0], int(args.alone[1])
        study, size = (agreement, case[5:]) if case.startswith("agree") else (whole, case)
        return lines.add((case, seed, args.channels), study(size, seed, args.channels))
    for case, seed, channels in lines.missing((case, seed, args.channels) for case in args.cases for seed in args.phantoms):
        subprocess.run([sys.executable, __file__, "--out", args.out, "--channels", str(channels), "--alone", case, str(seed)], check=True)
    lines = Lines(args.out, "case", "phantom", "channels")
    print_table(("size", "phantom", "weights", "rays", "kept", "minutes (predicted)", "of these fit", "CPU minutes", "GB", "PSNR", "TV", "FBP", "z", "coverage"),
                [(d["case"], d["phantom"], d["parameters"], d["rays"], d["kept"],
                  f"{d['seconds']['total'] / 60:.1f} ({(d['predicted']['fit'] + d['predicted']['bars']) / 60:.1f})", f"{d['seconds']['fit'] / 60:.1f}",
                  f"{d['cpu_seconds'] / 60:.1f}", f"{d['peak_memory_mb'] / 1000:.1f}", *(f"{d[k]:.1f}" for k in ("psnr", "psnr_tv", "psnr_fbp")),
                  f"{d['zstd']:.2f}", f"{d['coverage95']:.2f}") for d in lines if "kept" in d])
    print_table(("case", "phantom", "kept of rays", "seconds", "nats lost", "σ², τ²: ratio", "std: ratio 5, 50, 95 %", "mean moved, std", "z", "coverage"),
                [(d["case"], d["phantom"], f"{d['combinations']['kept']} of {d['rays']['kept']}",
                  " / ".join(f"{d[k]['seconds']:.0f}" for k in ("rays", "combinations")), f"{d['nats_lost']:.2f}",
                  ", ".join(f"{few / all:.2f}" for few, all in zip(d["combinations"]["variance"].values(), d["rays"]["variance"].values())),
                  ", ".join(f"{r:.3f}" for r in d["std_ratio"]), f"{d['mean_moved']:.3f}",
                  " / ".join(f"{d[k]['z']:.2f}" for k in ("rays", "combinations")), " / ".join(f"{d[k]['coverage']:.3f}" for k in ("rays", "combinations")))
                 for d in lines if "nats_lost" in d])


if __name__ == "__main__": main()

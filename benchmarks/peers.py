"""The same scan through the field: filtered back-projection, total variation, other deep image priors, other error bars.

    python -m venv peers && peers/bin/pip install . deepinv laplace-torch && peers/bin/python benchmarks/peers.py --out peers.jsonl
                                                 [--methods …] [--seeds 3] [--size 64] [--memory 16]

A walnut, 30 fan-beam projections, noise of 5 % of the mean reading, its standard deviation known. Each method has a process of its
own, one thread, and at most `memory` GB; one whose package is absent is skipped with a word. Scores are of all pixels: PSNR, SSIM,
z (1 is ideal), coverage of 95 % intervals, mean log likelihood, miscalibration (0 is ideal), seconds of the processor, peak memory.
One line of JSON for each seed and method; called again with the same file, it goes on where it stopped.
"""
import json
import os
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from time import process_time

import numpy as np
import torch
from common import Lines, arguments, print_table, some
from skimage.metrics import structural_similarity

from dip_uq.baselines import ensemble, langevin, mc_dropout, pixel_prior
from dip_uq.calibration import coverage, log_likelihood, z_std
from dip_uq.data import simulate, walnut
from dip_uq.dip import reconstruct
from dip_uq.fbp import fbp
from dip_uq.files import peak_memory_mb
from dip_uq.networks import UNet
from dip_uq.pipeline import solve
from dip_uq.pretraining import Pretrained, fan_scanner
from dip_uq.scores import miscalibration
from dip_uq.variation import flattest, linear, psnr, tv_reconstruction

NET = 4, 16
FIT = dict(iterations=1200, progress=False)


def image_only(image): return image, None

def answered(forecast): return forecast.mean, forecast.std()

def tv_bootstrap(scan, times=30):
    "Reconstructions of what the first one would have measured, with new noise (parametric bootstrap, Efron 1979)."
    image, weight = tv_reconstruction(scan)
    rays, generator = scan.operator(image), torch.Generator().manual_seed(0)
    def again():
        y = rays + scan.noise_std * torch.randn(rays.shape, generator=generator)
        *_, x = flattest(scan.operator, y, [8 * weight, 3 * weight, weight])
        return x
    return image, torch.stack([again() for _ in range(times)]).std(0).clamp(min=1e-6)

def deepinverse(scan, iterations, rate):
    "`DeepImagePrior` of DeepInverse with its `ConvDecoder` of 64 channels, as in its demonstration."
    import deepinv
    torch.manual_seed(0)
    A, shape = scan.operator, (1, *scan.operator.domain_shape)
    size = float(linear(scan).operator.matrix.power(2).sum(1).max())**0.5  # readings of about 1, as the package expects
    physics = deepinv.physics.LinearPhysics(A=lambda x: A(x[:, 0])[:, None] / size, A_adjoint=lambda y: A.T(y[:, 0])[:, None] / size)
    decoder = deepinv.models.ConvDecoder(img_size=shape, in_size=(2, 2), channels=64)
    model = deepinv.models.DeepImagePrior(decoder, img_size=(64, 2, 2), iterations=iterations, learning_rate=rate)
    return model(scan.measurement[None, None] / size, physics).detach()[0, 0]

def laplace_torch(scan):
    "All weights of the linearised network, with a prior precision by the marginal likelihood: its full Hessian."
    import laplace
    recon = reconstruct(scan, UNet(*NET), stop="fixed", **FIT)
    class Rays(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = recon.net
        def forward(self, z): return scan.operator(recon.lowest + recon.scale * self.net(z)[:, 0]).flatten(1)
    class Image(Rays):
        def forward(self, z): return (recon.lowest + recon.scale * self.net(z)[:, 0]).flatten(1)
    model = Rays()
    la = laplace.Laplace(model, "regression", subset_of_weights="all", hessian_structure="full", sigma_noise=float(scan.noise_std))
    la.fit(torch.utils.data.DataLoader([(recon.z[0], scan.measurement.flatten())], batch_size=1))
    la.optimize_prior_precision(method="marglik")
    la.model.__class__ = Image
    mean, variance = la(recon.z, pred_type="glm")
    return mean.view_as(recon.image), variance[0].diagonal().sqrt().view_as(recon.image)

def ours(scan, net=None, **options):
    solution = solve(scan, net or UNet(*NET), **FIT | options)
    return solution.image, solution.std


METHODS = {
    "filtered back-projection, Hann": lambda scan: image_only(fbp(scan.operator, scan.measurement, "hann")),
    "total variation": lambda scan: image_only(tv_reconstruction(scan)[0]),
    "DeepInverse, DIP, its defaults": lambda scan: image_only(deepinverse(scan, 2500, 1e-2)),
    "DeepInverse, DIP, 10,000 steps": lambda scan: image_only(deepinverse(scan, 10_000, 1e-2)),
    "DIP + TV, fit alone": lambda scan: image_only(reconstruct(scan.apart(), UNet(*NET), stop="heldout", **FIT).image),
    "bootstrap of total variation": tv_bootstrap,
    "Gaussian process of pixels": lambda scan: answered(pixel_prior(scan)),
    "five networks": lambda scan: answered(ensemble(scan, UNet(*NET), stop="fixed", **FIT)),
    "dropout": lambda scan: answered(mc_dropout(scan, UNet(*NET), stop="fixed", **FIT)),
    "Langevin": lambda scan: answered(langevin(scan, UNet(*NET), stop="fixed", **FIT)),
    "laplace-torch, full": laplace_torch,
    "dip_uq": ours,
    "dip_uq, educated": lambda scan: ours(scan, (taught := Pretrained.load()).net, **taught.options),
}
PACKAGES = {"DeepInverse": "deepinv", "laplace-torch": "laplace-torch"}


def package(method): return next((name for word, name in PACKAGES.items() if method.startswith(word)), "dip_uq")

def installed(method):
    "Is its package there? If not, that is said."
    try: return bool(version(package(method)))
    except PackageNotFoundError: print(f"{method}: skipped, as {package(method)} is not installed")

def scan_of(seed, size): return simulate(walnut(size, seed), fan_scanner(size, 30), noise=0.05, seed=seed)

def scored(method, seed, size):
    "The line of one method, in this process."
    scan, began = scan_of(seed, size), process_time()
    image, std = METHODS[method](scan)
    seconds, truth = process_time() - began, scan.truth
    found = dict(package=f"{package(method)} {version(package(method))}", torch=torch.__version__, psnr=psnr(image, truth),
                 ssim=float(structural_similarity(truth.numpy(), image.numpy(), data_range=1.0)), cpu_seconds=seconds, memory_mb=peak_memory_mb())
    if std is None: return found
    error = image - truth
    scores = dict(zstd=z_std, coverage95=coverage, log_likelihood=log_likelihood, miscalibration=miscalibration)
    return found | {name: score(error, std) for name, score in scores.items()}

def run(method, seed, size, memory):
    "The same in a process of its own; why there is nothing, where there is."
    limit = round(memory * 2**30)
    command = [sys.executable, __file__, "--out", "-", "--one", method, "--seeds", str(seed), "--size", str(size)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))
    if done.returncode == 0: return json.loads(done.stdout.splitlines()[-1])
    said = [line for line in done.stderr.splitlines() if line.strip()] or [f"ended by {done.returncode}"]
    return dict(failed=f"with {memory:g} GB: {said[-1][:200]}")

def table(lines):
    "Means over the seeds, a row for each method."
    names = dict(psnr=".1f", ssim=".2f", zstd=".2f", coverage95=".2f", log_likelihood=".2f", miscalibration=".2f", cpu_seconds=".0f", memory_mb=".0f")
    rows = []
    for method in METHODS:
        of = [d for d in lines if d["method"] == method]
        done = [d for d in of if "psnr" in d]
        if done: rows.append([f"{method} ({len(done)} of {len(of)})" if len(done) < len(of) else method] + [format(np.mean([d[k] for d in done]), f) if k in done[0] else "" for k, f in names.items()] + [done[0]["package"]])
        elif of: rows.append([method, of[0]["failed"]] + [""] * len(names))
    print_table(["method", *names, "package"], rows)

def main():
    args = arguments(__doc__, methods=some(METHODS), seeds=3, size=64, memory=16.0, one="")
    if args.one:
        torch.set_num_threads(1)
        return print(json.dumps(scored(args.one, args.seeds, args.size)))
    lines = Lines(args.out, "method", "seed", "size")
    for case in lines.missing([(method, seed, args.size) for seed in range(args.seeds) for method in args.methods if installed(method)]):
        lines.add(case, run(*case, args.memory))
    table([d for d in lines if d["size"] == args.size])


if __name__ == "__main__": main()

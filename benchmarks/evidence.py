"""How long the hyperparameters take, from a fitted network to the optimum: rows of AJ, Grams, search.

    python benchmarks/evidence.py [--case NAME] --out FILE

kmnist28:   28², 20 angles, 820 rays, U-Net of 76.6 k weights, a variance and a length for each block, TV prior, noise unknown
lowrank128: 128², 4200 rays: exact against a basis, in time and evidence
growth:     time against rays, pixels and weights, with fitted exponents
walnut:     501², 7680 rays, U-Net of 2.96 M weights on a GPU

Times are wall-clock seconds of this process; cpu_seconds beside them tell how much of it the machine was busy with others.
"""
import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
import torch

from dip_uq.data import ellipses, simulate, walnut
from dip_uq.dip import reconstruct
from dip_uq.evidence import Model, fitted_first, maximise
from dip_uq.linearization import Linearization, class_grams
from dip_uq.networks import UNet
from dip_uq.operators import fan_beam, parallel_beam
from dip_uq.pipeline import peak_memory_mb, versions
from dip_uq.priors import TVPrior, network_blocks, one_block
from dip_uq.spectral import jacobian_svd


class Laps:
    "Seconds of one step after the other."
    def __init__(self): self.seconds, self.wall, self.cpu = {}, perf_counter(), process_time()

    def __call__(self, name):
        now, cpu = perf_counter(), process_time()
        self.seconds |= {f"seconds_{name}": now - self.wall, f"cpu_seconds_{name}": cpu - self.cpu}
        self.wall, self.cpu = now, cpu

    def total(self):
        return {f"{kind}_total": sum(v for k, v in self.seconds.items() if k.startswith(f"{kind}_"))
                for kind in ("seconds", "cpu_seconds")}


def exact(lin, shared, laps):
    operator, residual, t = fitted_first(lin)
    rows = lin.rows(operator)
    laps("rows")
    blocks = (one_block if shared else network_blocks)(lin)
    grams = {b: class_grams(lin, rows, names) for b, names in blocks.items()}
    laps("grams")
    return Model(lin, blocks, operator, rows, residual, t, grams)


def low_rank(lin, shared, laps, tolerance=1e-3):
    svd = jacobian_svd(lin, fitted_first(lin)[0], tolerance=tolerance, power=0, rank=10_000)
    laps("rows")
    model = Model.build(lin, shared, svd=svd)
    laps("grams")
    return model


def fit(lin, build, objective, noise, shared=True, tv=False, steps=200):
    laps = Laps()
    model = build(lin, shared, laps)
    prior = TVPrior.build(lin, model.blocks) if tv else None
    if tv: laps("tv")
    found = maximise(model, objective, noise, steps, tv=prior)
    laps("evidence")
    return dict(d_x=lin.recon.image.numel(), d_y=lin.recon.scan.measurement.numel(), parameters=lin.parameters,
                directions=len(model.residual), method=found.method, objective=objective, tv=tv, **laps.seconds,
                **laps.total(), evidence=found.value, evaluations=found.evaluations, noise_std=found.noise_std,
                variance=found.prior.variance, length=found.prior.length, neglected=found.neglected,
                peak_memory_mb=peak_memory_mb())


def kmnist(folder):
    "A digit of KMNIST-test where the data are at hand, otherwise ellipses of the same size."
    file = Path(folder) / "kmnist/kmnist_test_first50.npz"
    if not file.exists(): return ellipses(28, 0), "phantom"
    return torch.from_numpy(np.load(file)["images"][0]).float() / 255, "kmnist-test 0"


def kmnist28():
    image, name = kmnist(os.environ.get("DIP_UQ_DATA", ""))
    A = parallel_beam(np.linspace(0, np.pi, 20, endpoint=False), (28, 28), 41)
    recon = reconstruct(simulate(image, A, noise=0.05), UNet(3, 32, norm=False), iterations=500, stop="fixed", progress=False)
    return dict(image=name) | fit(Linearization(recon), exact, "paper", None, shared=False, tv=True)


def lowrank128(steps=12):
    "The same few steps of the search for both, as exact ones take long; the evidence is compared where each ends."
    A = fan_beam(np.linspace(0, 2 * np.pi, 28, endpoint=False), (128, 128), 150, 1.3, 384, 192)
    scan = simulate(walnut(128), A, noise=0.05)
    recon = reconstruct(scan, UNet(3, 16, norm=False), iterations=200, stop="fixed", progress=False)
    lin = Linearization(recon)
    low = fit(lin, low_rank, "joint", scan.noise_std, steps=steps)
    full = fit(lin, exact, "joint", scan.noise_std, steps=steps)
    return dict(low_rank=low, exact=full, ratio=low["seconds_total"] / full["seconds_total"],
                relative_difference=abs(low["evidence"] / full["evidence"] - 1))


def one_size(size, angles, channels):
    A = fan_beam(np.linspace(0, 2 * np.pi, angles, endpoint=False), (size, size), 40, size / 30, 3 * size, 1.5 * size)
    scan = simulate(walnut(size), A, noise=0.05)
    recon = reconstruct(scan, UNet(3, channels, norm=False), iterations=20, stop="fixed", progress=False)
    return fit(Linearization(recon), exact, "joint", scan.noise_std, steps=5)


def growth():
    "One size changes, the others stay; exponents of the time for rows, Grams and one evaluation by least squares."
    series = dict(d_y=[(64, a, 8) for a in (10, 20, 40, 80)], d_x=[(s, 20, 8) for s in (32, 64, 128, 256)],
                  parameters=[(64, 20, c) for c in (8, 16, 32, 64)])
    result = {}
    for name, sizes in series.items():
        runs = [one_size(*s) for s in sizes]
        for run in runs: run["cpu_seconds_evaluation"] = run["cpu_seconds_evidence"] / run["evaluations"]
        x = np.log([run[name] for run in runs])
        result[name] = dict(sizes=[run[name] for run in runs], runs=runs, exponents={
            step: float(np.polyfit(x, np.log([run[f"cpu_seconds_{step}"] for run in runs]), 1)[0])
            for step in ("rows", "grams", "evaluation")})
    return result


def walnut_case():
    if not torch.cuda.is_available(): return dict(skipped="needs a GPU with about 130 GB, and none is at hand")
    A = fan_beam(np.linspace(0, 2 * np.pi, 60, endpoint=False), (501, 501), 128, 5.9, 1503, 752)
    scan = simulate(walnut(501), A, noise=0.05)
    scan = replace(scan, measurement=scan.measurement.cuda(), truth=None)
    recon = reconstruct(scan, UNet(6, 128), iterations=50, stop="fixed", progress=False)
    return dict(device=torch.cuda.get_device_name()) | fit(Linearization(recon), exact, "joint", scan.noise_std)


CASES = dict(kmnist28=kmnist28, lowrank128=lowrank128, growth=growth, walnut=walnut_case)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help="one of the cases; all without it")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the figures")
    given = parser.parse_args()
    found = dict(versions=versions(), threads=torch.get_num_threads(), load=os.getloadavg()[0])
    for name in [given.case] if given.case else CASES:
        found[name] = CASES[name]()
        given.out.write_text(json.dumps(found, indent=2))
        print(name, json.dumps({k: v for k, v in found[name].items() if not isinstance(v, dict)}), flush=True)

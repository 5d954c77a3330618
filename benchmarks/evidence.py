"""How long the hyperparameters take, from a fitted network to the optimum: rows of AJ, Grams, search.

    python benchmarks/evidence.py --out FILE

An image of 28² pixels, 20 angles, 820 rays, a U-Net of 76.6 k weights, a variance and a length for each block,
TV prior, noise unknown.

Times are wall-clock seconds of this process; cpu_seconds beside them tell how much of it the machine was busy with
others.
"""
import argparse
import json
import os
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
import torch

from dip_uq.data import ellipses, simulate
from dip_uq.dip import reconstruct
from dip_uq.evidence import Model, fitted_first, maximise
from dip_uq.linearization import Linearization, class_grams
from dip_uq.networks import UNet
from dip_uq.operators import parallel_beam
from dip_uq.pipeline import peak_memory_mb, versions
from dip_uq.priors import TVPrior, network_blocks


class Laps:
    "Seconds of one step after the other."
    def __init__(self): self.seconds, self.wall, self.cpu = {}, perf_counter(), process_time()

    def __call__(self, name):
        now, cpu = perf_counter(), process_time()
        self.seconds |= {f"seconds_{name}": now - self.wall, f"cpu_seconds_{name}": cpu - self.cpu}
        self.wall, self.cpu = now, cpu


def fit(lin):
    "The paper's objective, step by step."
    laps, blocks, (operator, residual, t) = Laps(), network_blocks(lin), fitted_first(lin)
    rows = lin.rows(operator)
    laps("rows")
    grams = {b: class_grams(lin, rows, names) for b, names in blocks.items()}
    laps("grams")
    tv = TVPrior.build(lin, blocks)
    laps("tv")
    found = maximise(Model(lin, blocks, operator, rows, residual, t, grams), "paper", None, tv=tv)
    laps("evidence")
    total = sum(v for k, v in laps.seconds.items() if k.startswith("seconds_"))
    return dict(d_x=lin.recon.image.numel(), d_y=len(residual), parameters=lin.parameters, **laps.seconds,
                seconds_total=total, evidence=found.value, evaluations=found.evaluations, noise_std=found.noise_std,
                variance=found.prior.variance, length=found.prior.length, peak_memory_mb=peak_memory_mb())


def kmnist(folder):
    "A digit of KMNIST-test where the data are at hand, otherwise ellipses of the same size."
    file = Path(folder) / "kmnist/kmnist_test_first50.npz"
    if not file.exists(): return ellipses(28, 0), "phantom"
    return torch.from_numpy(np.load(file)["images"][0]).float() / 255, "kmnist-test 0"


def kmnist28():
    image, name = kmnist(os.environ.get("DIP_UQ_DATA", ""))
    A = parallel_beam(np.linspace(0, np.pi, 20, endpoint=False), (28, 28), 41)
    scan = simulate(image, A, noise=0.05)
    recon = reconstruct(scan, UNet(3, 32, norm=False), iterations=500, stop="fixed", progress=False)
    return dict(image=name) | fit(Linearization(recon))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the figures")
    given = parser.parse_args()
    found = dict(versions=versions(), threads=torch.get_num_threads(), load=os.getloadavg()[0], kmnist28=kmnist28())
    given.out.write_text(json.dumps(found, indent=2))
    print(json.dumps(found["kmnist28"]))

"""How long the hyperparameters take, from a fitted network to the optimum: rows of AJ, Grams, search.

    python benchmarks/evidence.py --out FILE [--case kmnist28 growth largest]

kmnist28     28² pixels, 20 angles, 820 rays, a U-Net of 76.6 k weights, a variance and a length for each block, TV prior,
             noise unknown: the setting of arXiv:2203.00479
growth       seconds for more rays, pixels and weights, and the exponents of the power laws through them
largest      11,070 rays, which take 13 GB

Times are wall-clock seconds of this process; cpu_seconds beside them tell how much of it the machine was busy with
others. In FILE a case replaces its former figures.
"""
import json
import os
from time import perf_counter, process_time

import numpy as np
import torch
from common import KMNIST, arguments, kmnist, some

from dip_uq.compression import fitted_first
from dip_uq.covariance import Model
from dip_uq.data import ellipses, simulate, walnut
from dip_uq.dip import reconstruct
from dip_uq.evidence import maximise
from dip_uq.files import peak_memory_mb, versions
from dip_uq.linearization import Linearization, class_grams
from dip_uq.networks import UNet
from dip_uq.priors import TVPrior, network_blocks, one_block
from dip_uq.rays import parallel_beam


class Laps:
    "Seconds of one step after the other."
    def __init__(self): self.seconds, self.wall, self.cpu = {}, perf_counter(), process_time()

    def __call__(self, name):
        if torch.cuda.is_available(): torch.cuda.synchronize()
        now, cpu = perf_counter(), process_time()
        self.seconds |= {f"seconds_{name}": now - self.wall, f"cpu_seconds_{name}": cpu - self.cpu}
        self.wall, self.cpu = now, cpu
        print(name, {k: round(v, 1) for k, v in self.seconds.items() if k.endswith(f"_{name}")}, flush=True)


def fit(lin, objective, blocks, noise_std, tv=False, chunk=8):
    "The exact method, step by step."
    laps, rays = Laps(), fitted_first(lin)
    rows = lin.rows(rays.operator, chunk)
    laps("rows")
    grams = {b: class_grams(lin, rows, names) for b, names in blocks.items()}
    laps("grams")
    prior = TVPrior.build(lin, blocks) if tv else None
    laps("tv")
    found = maximise(Model(**vars(rays), lin=lin, blocks=blocks, rows=rows, grams=grams), objective, noise_std, tv=prior)
    laps("evidence")
    total = sum(v for k, v in laps.seconds.items() if k.startswith("seconds_"))
    return found, dict(d_x=lin.recon.image.numel(), d_y=rays.readings, parameters=lin.parameters, **laps.seconds,
                       seconds_total=total, evidence=found.value, evaluations=found.evaluations,
                       noise_std=found.noise_std, variance=found.prior.variance, length=found.prior.length,
                       peak_memory_mb=peak_memory_mb())


def small(image, angles, bins, channels, iterations=500, norm=False):
    A = parallel_beam(np.linspace(0, np.pi, angles, endpoint=False), image.shape, bins)
    scan = simulate(image, A, noise=0.05)
    net = UNet(3, channels, norm=norm)
    return Linearization(reconstruct(scan, net, iterations=iterations, stop="fixed", progress=False))


def kmnist28():
    image, name = (kmnist(0), "kmnist-test 0") if KMNIST.exists() else (ellipses(28, 0), "phantom")
    lin = small(image, 20, 41, 32)
    return dict(image=name) | fit(lin, "paper", network_blocks(lin), None, tv=True)[1]


def timed_fit(size, angles, channels, norm=False):
    lin = small(walnut(size), angles, 41, channels, iterations=50, norm=norm)
    figures = fit(lin, "joint", one_block(lin), lin.recon.scan.noise_std)[1]
    figures["seconds_evaluation"] = figures["seconds_evidence"] / figures["evaluations"]
    print(figures, flush=True)
    return figures


def largest(): return timed_fit(28, 270, 32)


def growth():
    "Each of three sizes by itself; what it multiplies is in `per`."
    found = {}
    cases = dict(rays=[(28, angles, 32) for angles in (10, 20, 40, 80, 160)], pixels=[(size, 20, 16) for size in (32, 64, 128, 256)],
                 weights=[(28, 20, channels) for channels in (8, 16, 32, 64, 128)])
    for name, sizes in cases.items():
        rows = [timed_fit(*case, norm=name == "weights") for case in sizes]
        key = dict(rays="d_y", pixels="d_x", weights="parameters")[name]
        slopes = {part: float(np.polyfit(np.log([r[key] for r in rows]), np.log([r[f"seconds_{part}"] for r in rows]), 1)[0])
                  for part in ("rows", "grams", "evaluation")}
        found[name] = dict(exponents=slopes, cases=rows)
    return found


CASES = dict(kmnist28=kmnist28, growth=growth, largest=largest)

if __name__ == "__main__":
    given = arguments(__doc__, case=some(CASES, ["kmnist28"]))
    for name in given.case:
        found = json.loads(given.out.read_text()) if given.out.exists() else {}
        found[name] = dict(versions=versions(), threads=torch.get_num_threads(), load=os.getloadavg()[0]) | CASES[name]()
        given.out.write_text(json.dumps(found, indent=2))
        print(json.dumps({name: found[name]}), flush=True)

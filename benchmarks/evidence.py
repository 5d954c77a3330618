"""How long the hyperparameters take, from a fitted network to the optimum: rows of AJ, Grams, search.

    python benchmarks/evidence.py --out FILE [--case kmnist28 lowrank128 growth largest methods half walnut]

kmnist28     28² pixels, 20 angles, 820 rays, a U-Net of 76.6 k weights, a variance and a length for each block, TV prior,
             noise unknown: the setting of arXiv:2203.00479
lowrank128   128² pixels, 4,200 rays, U-Net 5 × 32: exact, and bases of 200 to 600 draws, seconds and log evidence, also the
             exact one at the hyperparameters that a basis found; 500 draws: within 0.1 % in a quarter to a fifth of the time
growth       seconds for more rays, pixels and weights, and the exponents of the power laws through them
largest      11,070 rays, which take 13 GB
methods      the four methods of `fit_evidence` on 16² pixels; a figure, evidence over evaluations and seconds, beside FILE
half         what products in 16 bits do to the iterative evidence of the same problem
walnut       501² pixels, 7,680 rays, U-Net 6 × 128: needs a GPU with 110 GB

Times are wall-clock seconds of this process; cpu_seconds beside them tell how much of it the machine was busy with
others. In FILE a case replaces its former figures.
"""
import json
import math
import os
from time import perf_counter, process_time

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import KMNIST, arguments, kmnist, some

from dip_uq.data import ellipses, simulate, walnut
from dip_uq.dip import reconstruct
from dip_uq.evidence import (OBJECTIVES, Correction, Model, draw_rays, fit_evidence, fitted_first, log_parameters,
                             maximise, value_and_gradient)
from dip_uq.linearization import Linearization, class_grams
from dip_uq.networks import UNet
from dip_uq.pipeline import peak_memory_mb, versions
from dip_uq.pretraining import fan_scanner
from dip_uq.priors import TVPrior, network_blocks, one_block
from dip_uq.rays import fan_beam, parallel_beam


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
    laps, (operator, residual, t) = Laps(), fitted_first(lin)
    rows = lin.rows(operator, chunk)
    laps("rows")
    grams = {b: class_grams(lin, rows, names) for b, names in blocks.items()}
    laps("grams")
    prior = TVPrior.build(lin, blocks) if tv else None
    laps("tv")
    found = maximise(Model(lin, blocks, operator, rows, residual, t, grams), objective, noise_std, tv=prior)
    laps("evidence")
    total = sum(v for k, v in laps.seconds.items() if k.startswith("seconds_"))
    return found, dict(d_x=lin.recon.image.numel(), d_y=len(residual), parameters=lin.parameters, **laps.seconds,
                       seconds_total=total, evidence=found.value, evaluations=found.evaluations,
                       noise_std=found.noise_std, variance=found.prior.variance, length=found.prior.length,
                       peak_memory_mb=peak_memory_mb())


def small(image, angles, bins, channels, iterations=500, norm=False):
    A = parallel_beam(np.linspace(0, np.pi, angles, endpoint=False), image.shape, bins)
    scan = simulate(image, A, noise=0.05)
    net = UNet(3, channels, norm=norm)
    return Linearization(reconstruct(scan, net, iterations=iterations, stop="fixed", progress=False))


def kmnist28(out):
    image, name = (kmnist(0), "kmnist-test 0") if KMNIST.exists() else (ellipses(28, 0), "phantom")
    lin = small(image, 20, 41, 32)
    return dict(image=name) | fit(lin, "paper", network_blocks(lin), None, tv=True)[1]


def timed_fit(size, angles, channels, norm=False):
    lin = small(walnut(size), angles, 41, channels, iterations=50, norm=norm)
    figures = fit(lin, "joint", one_block(lin), lin.recon.scan.noise_std)[1]
    figures["seconds_evaluation"] = figures["seconds_evidence"] / figures["evaluations"]
    print(figures, flush=True)
    return figures


def largest(out): return timed_fit(28, 270, 32)


def growth(out):
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


def lowrank128(out, ranks=(200, 400, 500, 600)):
    turn = np.linspace(0, 2 * np.pi, 30, endpoint=False)
    scan = simulate(walnut(128), fan_beam(turn, (128, 128), 140, 1.4, 384, 192), 0.05).hold_out(5)
    lin = Linearization(reconstruct(scan, UNet(), iterations=300, stop="heldout", learning_rate=2e-3, progress=False))
    exact, figures = fit(lin, "conditional", one_block(lin), scan.noise_std)
    model, bases = exact.model, {}
    total, joint = float(model.grams["all"][1][0].trace()), maximise(model, "joint", scan.noise_std)
    def true_value(found): # the exact log evidence of what a basis found
        p = np.log([*found.prior.variance.values(), *found.prior.length.values()])
        return -value_and_gradient(p, model, scan.noise_std, OBJECTIVES[found.objective](model))[0]
    for rank in ranks:
        laps = Laps()
        found = fit_evidence(lin, "conditional", progress=False, method="low rank", rank=rank)
        laps("total")
        left = sum(n * float(g[0]) for (n, _), g in zip(found.model.outside, found.model.unseen))
        low = maximise(found.model, "joint", scan.noise_std)
        bases[rank] = dict(tail=math.sqrt(left / total), evidence=found.value, exact_evidence_there=true_value(found),
                           variance=found.prior.variance, length=found.prior.length, parts=found.seconds, **laps.seconds,
                           ratio=laps.seconds["seconds_total"] / figures["seconds_total"],
                           joint=low.value, exact_joint_there=true_value(low), joint_neglected=low.neglected)
        print(rank, bases[rank], flush=True)
    return dict(exact=figures | dict(joint=joint.value), bases=bases)


def toy():
    scan = simulate(walnut(16), fan_scanner(16, 10), noise=0.03).hold_out(2)
    return Linearization(reconstruct(scan, UNet(2, 6, 2), tv=1e-5, iterations=200, stop="heldout", start="cgls",
                                     learning_rate=5e-3, progress=False))


def methods(out):
    lin, found = toy(), {}
    fig, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained", sharey=True)
    for method, options in {"exact": {}, "low rank": {}, "iterative": dict(tolerance=0.01), "sampling": {}}.items():
        fit = fit_evidence(lin, "joint", progress=False, method=method, **options)
        steps = np.arange(len(fit.history)) + 1
        seconds = fit.seconds["jacobian"] + fit.seconds["evidence"] * steps / len(steps)
        axes[0].plot(steps, fit.history, "o-", ms=3, label=method + (" (g-prior)" if method == "sampling" else ""))
        axes[1].plot(seconds, fit.history, "o-", ms=3)
        found[method] = dict(evidence=fit.value, evaluations=fit.evaluations, seconds=fit.seconds, history=fit.history)
    axes[0].set(xlabel="evaluation", ylabel="joint log evidence")
    axes[1].set(xlabel="seconds, preparation included")
    axes[0].legend(fontsize=8)
    fig.savefig(out.with_suffix(".png"), dpi=120)
    return found


def half(out):
    lin, found = toy(), {}
    plain, exact = lin.tapped, Model.build(lin)
    lin.tapped = lambda taps: plain(taps).float()
    p = np.append(log_parameters(exact, None)[0][:2] - [3, 0], math.log(lin.recon.scan.noise_std**2))
    for tolerance in (0.1, 0.01):
        rough = Model.build(lin, draws=draw_rays(lin, tolerance)[0])
        for name, objective in OBJECTIVES.items():
            true = value_and_gradient(p, exact, None, objective(exact))[0]
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                correction = Correction(rough, name)
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    correction.products.pull, correction.products.push = lin.pullback(17), lin.pushforward(17)
                value = value_and_gradient(p, rough, None, objective(rough), correction)[0]
                found[f"{name}, tolerance {tolerance}, {dtype}"] = value - true
    return found


def walnut501(out):
    if not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 110e9:
        raise SystemExit("walnut: needs a CUDA device with 110 GB: AJ of 7,680 rays × 2.96 M weights alone takes 91 GB")
    A = fan_beam(np.linspace(0, 2 * np.pi, 60, endpoint=False), (501, 501), 128, 5.5, 1503, 752)
    scan = simulate(walnut(501), A, 0.05).hold_out(10).to("cuda")
    recon = reconstruct(scan, UNet(6, 128), iterations=300, stop="heldout", progress=False)
    lin = Linearization(recon)
    return fit(lin, "conditional", one_block(lin), scan.noise_std)[1]


CASES = dict(kmnist28=kmnist28, lowrank128=lowrank128, growth=growth, largest=largest, methods=methods, half=half, walnut=walnut501)

if __name__ == "__main__":
    given = arguments(__doc__, case=some(CASES, ["kmnist28"]))
    for name in given.case:
        found = json.loads(given.out.read_text()) if given.out.exists() else {}
        found[name] = dict(versions=versions(), threads=torch.get_num_threads(), load=os.getloadavg()[0]) | CASES[name](given.out)
        given.out.write_text(json.dumps(found, indent=2))
        print(json.dumps({name: found[name]}), flush=True)

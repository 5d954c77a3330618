"""How fast the path from scan to error bars is, as ratios to baselines measured in the same run.

    python benchmarks/first_light.py [--case products dip rows evidence] [--out FILE]

products: the ray transform against SciPy's product with its matrix, and 64 images at once against 64 single ones
dip:      one step of `reconstruct` against a bare PyTorch loop over the same network, operator and loss
rows:     rows of AJ per second against torch.func's vmap(vjp), its best chunk; share of measured sgemm, and the ratio
          that rows at the speed of sgemm would have
evidence: one evaluation with gradient against d_y, with the fitted exponent
"""
import math
from pathlib import Path
from statistics import median

import numpy as np
import torch
from common import arguments, some, timed, write
from torch import nn

from dip_uq.covariance import Model
from dip_uq.data import simulate, walnut
from dip_uq.dip import Run, descend, first_guess, fresh, reconstruct
from dip_uq.evidence import conditional_objective, log_parameters, value_and_gradient
from dip_uq.linearization import Linearization, unit_vectors
from dip_uq.networks import UNet
from dip_uq.rays import fan_beam
from dip_uq.variation import total_variation


def scan(size=128, angles=30, bins=140):
    turn = np.linspace(0, 2 * np.pi, angles, endpoint=False)
    A = fan_beam(turn, (size, size), bins, 1.5 * size / bins, 3 * size, 1.5 * size)
    return simulate(walnut(size, 0), A, 0.05).hold_out(angles // 6)


def seconds(work): return timed(work)[1]


def bare_steps(net, z, A, y, fitted, gamma):
    "What anyone would write: forward, loss, backward, clip, Adam, schedule."
    adam = torch.optim.Adam(net.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, 5e-3, total_steps=10_000)
    power = y[fitted].square().mean()
    while True:
        x = net(z)[0, 0]
        loss = (A(x) - y)[fitted].square().mean() / power + gamma * total_variation(x)
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        adam.step()
        schedule.step()
        yield


def dip(repeats=40):
    s = scan()
    z, scale = first_guess(s)
    net = fresh(UNet(5, 32), 0)
    fitted = torch.tensor([i not in s.held_out for i in range(len(s.measurement))])
    ours = descend(Run(fresh(net, 0), 5e-3, 10_000), z, scale, s, 1e-6)
    bare = bare_steps(fresh(net, 0), z, s.operator, s.measurement / scale, fitted, 1e-6)
    steps = {"ours": ours, "bare": bare}
    for step in steps.values(): [next(step) for _ in range(3)]
    times = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items(): times[name].append(seconds(lambda: next(step)))
    return dict(seconds_step=median(times["ours"]), seconds_bare=median(times["bare"]),
                ratio=median(a / b for a, b in zip(times["ours"], times["bare"])))


def sgemm_rate(n=2048):
    a = torch.randn(n, n)
    a @ a
    return 2 * n**3 / median(seconds(lambda: a @ a) for _ in range(5))


def forward_flops(lin):
    return sum(2 * math.prod(shape) * conv.weight[0].numel() for conv, shape in zip(lin.convs.values(), lin.shapes))


def plain_rows(recon, operator, indices, chunk):
    "vmap(vjp) of the network as a function of its convolution weights, chunked by torch itself."
    lin = Linearization(recon)
    weights = {f"{name}.weight": conv.weight.detach() for name, conv in lin.convs.items()}
    def rays(w): return operator(recon.scale * torch.func.functional_call(recon.net, w, (recon.z,))[0, 0])
    _, pull = torch.func.vjp(rays, weights)
    e = unit_vectors(operator.range_shape, indices, recon.image)
    parts = torch.func.vmap(lambda u: pull(u)[0], chunk_size=chunk)(e)
    return torch.cat([p.flatten(1) for p in parts.values()], 1)


def rows(count=64, repeats=3):
    s = scan()
    recon = reconstruct(s, UNet(5, 32), iterations=5, stop="heldout", progress=False)
    lin, A = Linearization(recon), s.operator
    def ours(chunk):
        pull = lin.pullback(chunk)
        for i in range(0, count, chunk): pull(A.T(unit_vectors(A.range_shape, range(i, i + chunk), recon.image)))
    works = {f"ours {c}": lambda c=c: ours(c) for c in (8, 16, 32)}
    works |= {f"plain {c}": lambda c=c: plain_rows(recon, A, range(count), c) for c in (4, 8, 16, 32, 64)}
    times, rates = {name: [] for name in works}, []
    for work in works.values(): work()
    for _ in range(repeats):
        rates.append(sgemm_rate())
        for name, work in works.items(): times[name].append(seconds(work))
    per_second = {name: count / median(t) for name, t in times.items()}
    best = {kind: max(v for k, v in per_second.items() if k.startswith(kind)) for kind in ("ours", "plain")}
    reference = plain_rows(recon, A, range(8), 8)
    error = (lin.vjp(A.T(unit_vectors(A.range_shape, range(8), recon.image))) - reference).norm() / reference.norm()
    flops = 2 * forward_flops(lin)
    return dict(rows_per_second=per_second, ratio=best["ours"] / best["plain"], gflop_per_row=flops / 1e9,
                sgemm_gflops=median(rates) / 1e9, share_of_sgemm=best["ours"] * flops / median(rates),
                ratio_at_sgemm=median(rates) / flops / best["plain"],
                relative_difference=float(error.detach()))


def evidence(angles=(12, 18, 30, 48, 72, 96), bins=42, repeats=3):
    sizes, times = [], []
    for n in angles:
        s = scan(48, n, bins)
        lin = Linearization(reconstruct(s, UNet(3, 8), iterations=5, stop="heldout", progress=False))
        model = Model.build(lin)
        start, _ = log_parameters(model, s.noise_std)
        def evaluate():
            value_and_gradient(start, model, s.noise_std, conditional_objective(model))
        evaluate()
        sizes.append(len(model.residual))
        times.append(median(seconds(evaluate) for _ in range(repeats)))
    exponent = np.polyfit(np.log(sizes), np.log(times), 1)[0]
    return dict(d_y=sizes, seconds=times, exponent=float(exponent),
                exponent_largest=float(np.polyfit(np.log(sizes[-3:]), np.log(times[-3:]), 1)[0]))


def products(repeats=25):
    s, built = timed(scan)
    A, x, batch = s.operator, torch.rand(128, 128), torch.rand(64, 128, 128)
    matrix = A.matrix.astype(np.float32)
    works = dict(ours=lambda: A(x), scipy=lambda: matrix @ x.numpy().ravel(), batch=lambda: A(batch))
    for work in works.values(): work()
    times = {name: median(seconds(work) for _ in range(repeats)) for name, work in works.items()}
    return dict(seconds_scan=built, **{f"seconds_{k}": v for k, v in times.items()}, ratio=times["ours"] / times["scipy"],
                ratio_batch=times["batch"] / 64 / times["ours"])


CASES = dict(products=products, dip=dip, rows=rows, evidence=evidence)


def main():
    args = arguments(__doc__, case=some(CASES), out=dict(type=Path, help="write the JSON here as well"))
    write(dict(threads=torch.get_num_threads(), torch=torch.__version__) | {case: CASES[case]() for case in args.case},
          args.out)


if __name__ == "__main__": main()

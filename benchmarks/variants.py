"""Variants of the deep image prior in the field, with their published settings, beside ours: PSNR over time from the same scans.

    python benchmarks/variants.py --out variants.jsonl [--scans walnut ta tb tooth] [--seeds 3] [--methods dip aseq …] [--rates 1e-4 1e-3]
                                  [--steps 10000] [--seconds 90] [--figure FILE.png]

All have the network of ours, UNet(4, 16), but the decoder, which is DeepDecoder(5, 32); all grey values lie between 0 and the range that
`reconstruct` finds, and all projections are fitted (walnut: 30, a fan beam, 5 % noise; ta, tb and tooth: 30). A fit ends after `steps` or
`seconds` of processor time, whichever comes first; gradients are clipped to a norm of 1. Scores are of the field of view, after every fiftieth
step. No setting of a rival was chosen by them; those of ours were, with walnuts and discs like these and the tooth in view.
One line of JSON for each fit; called again with the same file it goes on where it stopped, and prints the tables.

ours          `reconstruct` as it is: noise as input, total variation matched to the noise, 2,000 steps of a rate that rises to 5e-3 and falls again
dip           least squares from FBP as input (Ulyanov et al. 2018; here as in arXiv:2602.14709: rate 1e-4, 10,000 steps, Σ((Ax − y) / ‖A‖)²);
dip, average  the moving average of its images, 0.99 (Ulyanov et al. 2018)
dip, variance its image of least moving variance (100 images, patience 1,000, a new least one by 2 %; Wang et al. 2021); the time that this
              takes, a quarter of the steps, is in the seconds of dip
dip-tv        + 1e-5 Σ|∇x| (Baguer et al. 2020; weight of arXiv:2602.14709)
aseq          + 0.01 d_y / d_x Σ(x − z)², and after every five steps z = x (Alkhouri et al. 2024)
guided        z is fitted too, at a rate of 1e-2: x̄ of four images from z + noise, uniform up to 1 % of its maximum; + 0.01 Σ(x̄ − z)²; the
              moving average, 0.99, is returned (Liang et al. 2024)
decoder       deep decoder, rate 1e-2 whatever is asked for (Heckel and Hand 2019)
"""
from collections import deque
from pathlib import Path
from time import process_time

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import Lines, arguments, print_table, some
from images import SIMULATED, measured

from dip_uq.dip import Run, choose_iterate, descend, first_guess, moving_variance, picture, range_and_weight
from dip_uq.networks import DeepDecoder, UNet, fresh
from dip_uq.rays import field_of_view
from dip_uq.variation import linear, operator_norm, psnr, total_variation

RIVALS = "dip", "dip-tv", "aseq", "guided", "decoder"
OWN_RATE = dict(ours=5e-3, decoder=1e-2)
EVERY, WINDOW, PATIENCE, CLEARLY = 50, 100, 1000, 0.98


def load(name, seed, size=64):
    "A scan, its readings in numbers of equal noise, and what it is scored by."
    scan, truth = measured(name, 0.05 if name in SIMULATED else 30, seed, size)
    return linear(scan), truth


def ours(scan, seed, watch, iterations=2000):
    "The image of `reconstruct(scan, UNet(4, 16), seed=seed)`; `watch` is shown the image of every step."
    z, scale = first_guess(scan, "noise", seed)
    net = fresh(UNet(4, 16), seed).to(z)
    lowest, scale, tv = range_and_weight(scan, scale, None)
    run = Run(net, OWN_RATE["ours"], iterations, seed)
    choose_iterate(run, descend(run, z, scale, scan, tv, lowest=lowest), "variance", 0, [lambda run: watch(lowest + run.image)])
    net.load_state_dict(run.weights)
    with torch.no_grad(): return lowest + scale * picture(net, z)


def rival(scan, method, rate, seed, steps):
    "The images of a rival, one after the other."
    z, rough = first_guess(scan, "fbp", seed)
    A, scale = scan.operator, range_and_weight(scan, rough, 0.0)[1]
    z = z * rough / scale # in the unit of the network's output, which two variants tie to it
    y, norm, guide = scan.measurement / scale, operator_norm(A, scan.measurement), torch.Generator().manual_seed(seed)
    net, guided = fresh(DeepDecoder(5, 32) if method == "decoder" else UNet(4, 16), seed).to(z), method == "guided"
    optimizers = [torch.optim.Adam(net.parameters(), rate, foreach=True)]
    if guided: optimizers.append(torch.optim.Adam([z.requires_grad_()], 1e-2))
    for i in range(steps):
        noise = 0.01 * float(z.detach().max()) * torch.rand((4, *z.shape[1:]), generator=guide).to(z) if guided else 0.0
        x = net(z + noise).mean((0, 1))
        yield scale * x.detach()
        loss = ((A(x) - y) / norm).square().sum()
        if method == "dip-tv": loss = loss + 1e-5 * total_variation(x)
        if method == "aseq": loss = loss + 0.01 * len(y.flatten()) / len(x.flatten()) * (x - z[0, 0]).square().sum()
        if guided: loss = loss + 0.01 * (x - z[0, 0]).square().sum()
        for optimizer in optimizers: optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
            optimizer.step()
        if method == "aseq" and i % 5 == 4: z = net(z).detach()


class Curve(list):
    "Processor seconds since it was begun, and the scores of images and of their moving average, after every fiftieth step."
    def __init__(self, score):
        self.score, self.began, self.steps, self.average = score, process_time(), 0, None

    @property
    def seconds(self): return process_time() - self.began

    def add(self, x):
        self.average = x if self.average is None else 0.99 * self.average + 0.01 * x
        self.steps += 1
        if self.steps % EVERY == 0: self.append([self.seconds, self.score(x), self.score(self.average)])


def chosen(images, seconds, curve, watched=True):
    "Go through the images; where variance stops: the score of its choice, the step of that, and the seconds; None if it never does."
    recent, least, best, stopped = deque(maxlen=WINDOW), np.inf, (0, None), None
    for i, x in enumerate(images):
        curve.add(x)
        recent.append(x)
        if watched and stopped is None:
            variance = moving_variance(recent, WINDOW)
            if variance < CLEARLY * least: least, best = variance, (i, x)
            if i >= best[0] + PATIENCE and best[1] is not None: stopped = [curve.score(best[1]), best[0], curve.seconds]
        if curve.seconds > seconds: break
    return stopped


def case(name, seed, method, rate, steps, seconds):
    "The findings of one fit."
    scan, truth = load(name, seed)
    seen = field_of_view(scan.operator)
    curve = Curve(lambda x: psnr(x[seen], truth[seen]))
    if method == "ours":
        image = ours(scan, seed, curve.add)
        found = dict(last=curve.score(image), stopped=None)
    else: found = dict(stopped=chosen(rival(scan, method, rate, seed, steps), seconds, curve, method == "dip"), last=curve[-1][1])
    return found | dict(seconds=curve.seconds, steps=curve.steps, curve=curve)


def rows(lines):
    "For each method of one scan, and each rate: the findings of all seeds, at the seconds that ours takes and at the end."
    budget = np.median([d["seconds"] for d in lines if d["method"] == "ours"])
    def at(d, column): return max((point for point in d["curve"] if point[0] <= budget), default=d["curve"][0])[column]
    for method, rate in dict.fromkeys((d["method"], d["rate"]) for d in lines):
        mine = [d for d in lines if (d["method"], d["rate"]) == (method, rate)]
        column, one = (2 if method == "guided" else 1), method == "ours"
        yield dict(name=method, rate=rate, then=[d["last"] if one else at(d, column) for d in mine], seconds=[d["seconds"] for d in mine],
                   last=[d["last"] if one else d["curve"][-1][column] for d in mine], best=[max(p[column] for p in d["curve"]) for d in mine])
        if method != "dip": continue
        yield dict(name="dip, average", rate=rate, then=[at(d, 2) for d in mine], last=[d["curve"][-1][2] for d in mine],
                   best=[max(p[2] for p in d["curve"]) for d in mine], seconds=[d["seconds"] for d in mine])
        stops = [d["stopped"] or [d["curve"][-1][1], None, d["seconds"]] for d in mine]  # the last image, if it never does
        yield dict(name="dip, variance", rate=rate, then=[s[0] if s[2] <= budget else at(d, 1) for s, d in zip(stops, mine)],
                   last=[s[0] for s in stops], best=[s[0] for s in stops], seconds=[s[2] for s in stops])


def draw(lines, path):
    "PSNR over processor seconds, the median of the seeds, a panel for each scan."
    names = list(dict.fromkeys(d["scan"] for d in lines))
    fig, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.4), squeeze=False, layout="constrained")
    for ax, name in zip(axes[0], names):
        for row in rows([d for d in lines if d["scan"] == name]):
            if row["name"].startswith("dip, "): continue
            mine = [np.array(d["curve"]) for d in lines if (d["scan"], d["method"], d["rate"]) == (name, row["name"], row["rate"])]
            short, column = min(map(len, mine)), 2 if row["name"] == "guided" else 1
            seconds, curve = np.median([m[:short, [0, column]] for m in mine], axis=0).T
            ours = row["name"] == "ours"
            ax.plot(seconds, curve, "k" if ours else "", lw=2 if ours else 1, label=f"{row['name']}, rate {row['rate']:g}")
        ax.set(title=name, xlabel="processor seconds", ylabel="PSNR [dB]")
    axes[0, -1].legend(fontsize=7)
    fig.savefig(path, dpi=120)


def main():
    args = arguments(__doc__, scans=["walnut", "ta", "tb", "tooth"], seeds=3, methods=some(RIVALS), rates=[1e-4, 1e-3], steps=10_000,
                     seconds=90.0, figure=dict(type=Path))
    torch.set_num_threads(1)
    lines = Lines(args.out, "scan", "seed", "method", "rate")
    works = [(method, rate) for method in ["ours", *args.methods] for rate in ([OWN_RATE[method]] if method in OWN_RATE else args.rates)]
    for wanted in lines.missing((name, seed, *work) for seed in range(args.seeds) for name in args.scans for work in works):
        lines.add(wanted, case(*wanted, args.steps, args.seconds))
    def middle(values): return f"{np.median(values):.2f} ({min(values):.1f} to {max(values):.1f})"
    behind = {}
    for name in args.scans:
        print(f"\n{name}\n")
        found = list(rows([d for d in lines if d["scan"] == name]))
        print_table(("method", "rate", "PSNR at the seconds of ours", "at the end", "best, by the truth", "seconds"),
                    [(r["name"], f"{r['rate']:g}", *(middle(r[k]) for k in ("then", "last", "best")), f"{np.median(r['seconds']):.0f}")
                     for r in found])
        for r in found: behind.setdefault((r["name"], r["rate"]), []).append([np.median(found[0][k]) - np.median(r[k]) for k in ("then", "last")])
    print("\nours ahead, in the median of the scans: at equal seconds, at the end [dB]\n")
    print_table(("method", "rate", "equal", "end"), [(m, f"{r:g}", *(f"{v:+.2f}" for v in np.median(gaps, axis=0)))
                                                     for (m, r), gaps in behind.items()])
    if args.figure: draw(lines, args.figure)


if __name__ == "__main__": main()

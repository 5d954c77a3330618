"""Which projection next: chosen by the deep image prior, by a model of white pixels, evenly, by the golden angle, at random.

    python benchmarks/design.py --out design.jsonl [--kinds bars ellipses walnut region limited] [--ways …] [--seeds 10]
                                [--size 64] [--most 40] [--quick 1]

Parallel beam, 5 % noise, 5 pilot projections, evenly (limited: within 60°), then 5 at a time out of 180 after a new fit.
bars: three with nearly one direction; region: a walnut of which a disc matters. Each set of projections is scored by PSNR
of TV (weight by held-out projections) and of the fit; truth has no part in any choice but that of the oracle, which tries what
TV will make of each. --quick: 2 images of a kind at 48²,
up to 20 projections, fits of 600 steps, four ways. One line of JSON for each image, way and number of projections; called again with the
same file, it goes on where it stopped, and writes what it found beside it, as design.json.
"""
import math
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from os import cpu_count
from types import SimpleNamespace

import numpy as np
import torch
from common import Lines, arguments, print_table, some, write

from dip_uq.calibration import check_held_out
from dip_uq.data import Scan, ellipses, walnut
from dip_uq.design import GAINS, Design
from dip_uq.dip import reconstruct
from dip_uq.evidence import fit_evidence
from dip_uq.linearization import Linearization
from dip_uq.networks import UNet
from dip_uq.posterior import Posterior
from dip_uq.rays import parallel_beam
from dip_uq.variation import flattest, linear, tv_reconstruction

VIEWS, PILOTS, BATCH = 180, 5, 5
WAYS = [*GAINS, "pixels", "even", "golden", "random", "oracle"]
OURS = GAINS[0]
TARGETS = 0.04, 0.06, 0.08, 0.1  # root mean square errors to stop at; images go from 0 to 1


def places(size): return np.meshgrid(np.linspace(1, -1, size), np.linspace(-1, 1, size), indexing="ij")


def bars(size, seed):
    "Three bars along one direction, each turned by some 3° more or less, as in arXiv:2207.05714."
    rng, (y, x) = np.random.default_rng(seed), places(size)
    image, direction = np.zeros((size, size)), rng.uniform(0, np.pi)
    for place, length, width, grey in ((-0.45, 0.5, 0.09, 1.0), (0.0, 0.7, 0.13, 0.6), (0.42, 0.45, 0.07, 0.8)):
        turn = direction + rng.normal(0, 0.05)
        along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
        image[(abs(along) < length) & (abs(across - place) < width)] = grey
    return torch.tensor(image, dtype=torch.float32)


KINDS = dict(bars=bars, ellipses=ellipses, walnut=walnut, region=walnut, limited=walnut)


class Bench:
    "One image, and a scanner that measures what it is asked for; a view has the same noise whenever it is measured."
    def __init__(self, kind, seed, size):
        self.kind, self.seed, self.truth, self.bins = kind, seed, KINDS[kind](size, seed), round(1.5 * size)
        self.angles = np.arange(VIEWS) * np.pi / VIEWS
        self.candidates = self.scanner(self.angles)
        self.noise = 0.05 * float(self.candidates(self.truth).abs().mean())
        y, x = places(size)
        self.region = torch.from_numpy((x - 0.2)**2 + (y - 0.1)**2 < 0.25**2) if kind == "region" else torch.ones_like(self.truth, dtype=torch.bool)
        self.pilots = (np.arange(PILOTS) * 15 if kind == "limited" else np.arange(PILOTS) * VIEWS // PILOTS).tolist()

    def scanner(self, angles): return parallel_beam(angles, self.truth.shape, self.bins)

    def scan(self, angles):
        A = self.scanner(angles)
        drawn = [torch.randn(self.bins, generator=torch.Generator().manual_seed(10**6 * self.seed + round(float(a) * 1e4))) for a in angles]
        return Scan(A(self.truth) + self.noise * torch.stack(drawn), A, noise_std=self.noise)

    def psnr(self, image):
        "In the region, of the range of the whole truth."
        return 10 * math.log10(float(self.truth.max())**2 / float((image - self.truth)[self.region].square().mean()))


def fit_of(scan, iterations):
    held = scan.hold_out(max(1, len(scan.measurement) // 6))
    return reconstruct(held, UNet(4, 16), iterations=iterations, stop="heldout", progress=False)


def posterior_of(recon):
    "Its error bars as long as the held-out projections ask for."
    evidence = fit_evidence(Linearization(recon, free_pixels=True), progress=False)
    return Posterior(evidence, check_held_out(evidence).correction)


def white_pixels(scan):
    "What `Design` asks of a posterior, of an image of white noise of the size of a first reconstruction."
    x = tv_reconstruction(scan)[0]
    n, A, spread = len(scan.measurement.flatten()), torch.tensor(scan.operator.matrix.toarray()).float(), float(x.square().mean())**0.5
    def deviations(count, progress=False):
        g = torch.Generator().manual_seed(0)
        drawn = spread * torch.randn(count, x.numel(), generator=g)
        rays = drawn @ A.T + scan.noise_std * torch.randn(count, n, generator=g)
        told = torch.linalg.solve(spread**2 * A @ A.T + scan.noise_std**2 * torch.eye(n), rays.T).T
        yield (drawn - spread**2 * told @ A).view(-1, *x.shape)
    return SimpleNamespace(deviations=deviations, evidence=SimpleNamespace(noise_std=scan.noise_std),
                           lin=SimpleNamespace(recon=SimpleNamespace(image=x, scan=scan)))


def fixed(bench, way, n):
    "Angles that need no image."
    if way == "even": return np.arange(n) * np.pi / n
    if way == "golden": return np.mod(np.arange(n) * np.pi * (5**0.5 - 1) / 2, np.pi)
    more = np.random.default_rng(bench.seed).permutation(np.setdiff1d(np.arange(VIEWS), bench.pilots))
    return bench.angles[bench.pilots + more[:n - PILOTS].tolist()]


def oracle(bench, views, weight, count):
    "Every fourth view is tried: that after which TV, of this weight, is nearest to the truth is next."
    def told(view):
        scan = linear(bench.scan(bench.angles[[*views, view]]))
        *_, image = flattest(scan.operator, scan.measurement, [3 * weight, weight])
        return bench.psnr(image)
    views = list(views)
    for _ in range(count): views.append(max(sorted(set(range(0, VIEWS, 4)) - set(views)), key=told))
    return views[-count:]


def study(kind, seed, way, size, most, iterations):
    "A line for each number of projections."
    torch.set_num_threads(1)
    bench, lines = Bench(kind, seed, size), []
    views, whole, adaptive = list(bench.pilots), torch.ones_like(bench.region), way in (*GAINS, "pixels", "oracle")
    for n in range(PILOTS, most + 1, BATCH):
        scan = bench.scan(bench.angles[views] if adaptive else fixed(bench, way, n))
        recon, (tv, weight) = fit_of(scan, iterations), tv_reconstruction(scan)
        line = dict(n=n, psnr=bench.psnr(recon.image), psnr_tv=bench.psnr(tv))
        if way == "oracle": views += oracle(bench, views, weight, BATCH)
        elif adaptive:
            model = white_pixels(scan) if way == "pixels" else posterior_of(recon)
            gain, region = (OURS, bench.region) if way in (OURS, "pixels") else (way, whole)
            plan = Design(model, bench.candidates, gain, region, samples=2048 if way == "pixels" else 1024) # white noise has more to tell
            mean = recon.image if way == "pixels" else model.mean
            line |= dict(predicted=plan.error, rms=float((mean - bench.truth)[bench.region].square().mean())**0.5)
            views += [choice.view for choice in plan.next(BATCH)]
            line |= dict(next=views[-BATCH:])
        lines.append(line)
    return lines


def reached(lines, goal, key):
    "How many projections it takes to reach a PSNR, between those tried; the most tried where it is not."
    n, values = zip(*sorted((d["n"], d[key]) for d in lines))
    for a, b, low, high in zip(n, n[1:], values, values[1:]):
        if high >= goal: return a + (b - a) * np.clip((goal - low) / max(high - low, 1e-9), 0, 1)
    return n[-1]


def found(lines, most, key="psnr_tv"):
    "The figures of each kind of image."
    table, heads = {}, sorted({d["n"] for d in lines})
    for kind in dict.fromkeys(d["kind"] for d in lines):
        of = {way: [d for d in lines if d["kind"] == kind and d["way"] == way] for way in WAYS}
        seeds = sorted({d["seed"] for d in lines if d["kind"] == kind})
        def one(way, seed): return [d for d in of[way] if d["seed"] == seed]
        def at(way, n): return np.array([d[key] for d in of[way] if d["n"] == n])
        late = [n for n in heads if n >= most / 2]
        table[kind] = dict(images=len(seeds)) | {f"psnr_{way}": {n: float(at(way, n).mean()) for n in heads if len(at(way, n))} for way in WAYS if of[way]}
        table[kind] |= {f"spread_{way}": {n: float(at(way, n).std(ddof=1)) for n in heads if len(at(way, n)) > 1} for way in WAYS if of[way]}
        if of["even"] and of[OURS]:
            goals = {seed: max(d[key] for d in one("even", seed) if d["n"] == most) for seed in seeds}
            table[kind]["share_of_equidistant"] = float(np.mean([reached(one(OURS, seed), goals[seed], key) / most for seed in seeds]))
        if of["golden"] and of[OURS]: table[kind]["excess_db_over_golden"] = float(np.mean([at(OURS, n) - at("golden", n) for n in late]))
        if of["even"] and of[OURS] and of["oracle"]: # at three quarters of all projections
            at_n = min(heads, key=lambda n: abs(n - 0.75 * most))
            table[kind]["gain_of_oracle"] = float((at(OURS, at_n) - at("even", at_n)).mean() / (at("oracle", at_n) - at("even", at_n)).mean())
        ratios = [d["rms"] / d["predicted"] for d in of[OURS]]
        if ratios: table[kind] |= dict(rms_over_predicted=[float(np.quantile(ratios, q)) for q in (0.1, 0.5, 0.9)]) | stopped(one(OURS, seed) for seed in seeds)
    return table


def stopped(studies):
    "For each target: of how many images the predicted error meets it in time, how many of these are as good in truth, and after how many projections."
    studies, found = [sorted(study, key=lambda d: d["n"]) for study in studies], {}
    for target in TARGETS:
        ends = [end for study in studies if (end := next((d for d in study if d["predicted"] <= target), None))]
        if ends: found[target] = dict(images=len(ends), below_target=float(np.mean([d["rms"] <= target for d in ends])), projections=float(np.mean([d["n"] for d in ends])))
    return dict(stopping=found, below_target=float(np.average([f["below_target"] for f in found.values()], weights=[f["images"] for f in found.values()])) if found else None)


def main():
    args = arguments(__doc__, kinds=some(KINDS), ways=some(WAYS), seeds=10, size=64, most=40, iterations=1000, quick=0, workers=cpu_count())
    if args.quick:
        args.seeds, args.size, args.most, args.iterations = 2, 48, 20, 600
        args.ways = [way for way in args.ways if way in (OURS, "even", "golden", "oracle")]
    lines = Lines(args.out, "kind", "seed", "way", "size")
    cases = lines.missing([(kind, seed, way, args.size) for seed in range(args.seeds) for kind in args.kinds for way in args.ways])
    with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
        jobs = {pool.submit(study, *case, args.most, args.iterations): case for case in cases}
        for job in as_completed(jobs): lines.add(jobs[job], *job.result())
    table = found(lines, args.most)
    for kind, d in table.items():
        heads = list(d[f"psnr_{OURS}"])
        print_table((kind, *heads), [(way, *(f"{v:.1f}" for v in d[f"psnr_{way}"].values())) for way in WAYS if f"psnr_{way}" in d])
    write(table, args.out.with_suffix(".json"))


if __name__ == "__main__": main()

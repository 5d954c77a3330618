"""The best image: filtered back-projection, total variation and `solve` from the same few projections, simulated and measured.

    python benchmarks/images.py --out images.jsonl [--names wires ta] [--starts noise tv | --educated] [--size 64] [--iterations 2000] [--seeds 1]

wires, low, texture, text, walnut and ellipses are simulated by the fan scanner (30 projections over a full turn, 1 and 5 % noise): high
contrast, low contrast, fine texture, letters, and two kinds like those that the educated network has seen. ta and tb are discs of the Helsinki
Tomography Challenge 2022 (30 and 60 projections), scored by their published reconstruction; the others are those of scanners.py, scored by FBP of
all their views. The range of the network, the weight of total variation where the noise is not known, and the number of steps were chosen on the
kinds that are marked; the others had no part in that. Scores are of the field of view, and of the discs also inside 33 of their 35 mm. One line of
JSON for each case; called again with the same file, it goes on where it stopped, and prints the table.

tv            the best of fourteen weights, chosen by the truth, which favours it, from all projections
tv_held_out   `tv_reconstruction`: the weight that predicts held-out projections best
dip, solve    the network's fit (UNet(4, 16), 5/6 of the projections), and the image that `solve` returns; from several starts the one that was
              chosen. That an image stands beside noise at a quarter of its size, and the rate of its fit, were chosen on wires and texture
--educated    from the weights that come with the package, by their own steps, in place of fresh ones; nothing of it was chosen on any of these scans.
              Other options want another FILE
"""
from pathlib import Path

import matplotlib
import numpy as np
import torch
from common import Lines, arguments, best_tv, print_table, some, timed
from PIL import Image, ImageDraw, ImageFont
from reliability import KINDS
from scanners import CASES, referenced
from torch.nn.functional import avg_pool2d

from dip_uq.calibration import coverage, z_std
from dip_uq.data import _grid, _pixels, ellipses, simulate, walnut
from dip_uq.dip import STARTS
from dip_uq.networks import UNet
from dip_uq.pipeline import solve
from dip_uq.pretraining import Pretrained, fan_scanner
from dip_uq.rays import field_of_view
from dip_uq.scans import load_htc2022
from dip_uq.scores import miscalibration
from dip_uq.variation import psnr


def low(size, seed):
    "A disc with eight round inclusions that differ from it by 4 to 8 %."
    rng, (x, y) = np.random.default_rng(seed), _grid(size)
    image = np.where(x**2 + y**2 < 0.85**2, 1.0, 0)
    for _ in range(8):
        place, radius = 0.6 * rng.uniform()**0.5 * np.exp(2j * np.pi * rng.uniform()), rng.uniform(0.06, 0.2)
        image[abs(x + 1j * y - place) < radius] = rng.choice([0.93, 0.96, 1.04, 1.08])
    return _pixels(image, size)


def text(size, seed):
    "Three short words, drawn at four times the size."
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans-Bold.ttf"), 17 * size // 20)
    page = Image.new("L", (4 * size, 4 * size))
    for line, word in enumerate(("prior image noise", "angle slice bars", "deep TV ray")[seed % 3].split()):
        ImageDraw.Draw(page).text((0.7 * size, (0.5 + line) * size), word, fill=255, font=font)
    return avg_pool2d(torch.from_numpy(np.array(page, dtype=np.float32))[None] / 255, 4)[0]


SIMULATED = dict(wires=KINDS["wires"], texture=KINDS["texture"], low=low, text=text, walnut=walnut,
                 ellipses=lambda size, seed: ellipses(size, 10_000 + seed))
CHOSEN_ON = "wires", "texture", "ta", "tooth", "stxm"
NAMES = [*SIMULATED, "ta", "tb", *CASES]


def variants(name, seeds):
    "What a name stands for: noise and seed of the simulated, projections of the discs."
    if name in SIMULATED: return [(noise, seed) for noise in (0.01, 0.05) for seed in range(seeds)]
    return [(30, 0), (60, 0)] if name in ("ta", "tb") else [(CASES[name][1], 0)]


def measured(name, which, seed, size):
    "A scan, and what it is scored by."
    if name in SIMULATED: scan = simulate(SIMULATED[name](size, seed), fan_scanner(size, 30), which, seed)
    elif name in ("ta", "tb"): scan = load_htc2022(name, which, size)
    else: return referenced(name, size)[:2]
    return scan, scan.truth


def inside(scan):
    "The pixels within 33 of the 35 mm of a disc; around it the published image is not zero, as air is."
    place = (torch.arange(len(scan.truth)) - (len(scan.truth) - 1) / 2) * scan.pixel_size
    return torch.hypot(place[:, None], place) < 33


def case(name, which, seed, size, iterations, starts, educated):
    "The findings of one scan."
    scan, truth = measured(name, which, seed, size)
    seen = field_of_view(scan.operator)
    def score(x): return psnr(x[seen], truth[seen])
    net, fit = UNet(4, 16, inputs=len(starts)), dict(start=starts, iterations=iterations)
    if educated: net, fit = (taught := Pretrained.load()).net, taught.options
    s, seconds = timed(solve, scan, net, seed=seed, progress=False, **fit)
    flat, seconds_tv = timed(lambda: s.tv)
    def scores(where):
        error, std = (s.image - truth)[where], s.std[where]
        return dict(psnr=psnr(s.image[where], truth[where]), z=z_std(error, std), coverage=coverage(error, std),
                    miscalibration=miscalibration(error, std))
    return dict(psnr_fbp=score(s.fbp), psnr_tv=best_tv(scan, score), psnr_tv_held_out=score(flat), psnr_dip=score(s.recon.image),
                **scores(seen), inside=scores(inside(scan)) if name in ("ta", "tb") else None,
                verdict=s.verdict, left=s.fit_rms_over_noise, **{k: s.recon.settings.get(k) for k in ("start", "tried", "iteration")},
                seconds_tv=seconds_tv, seconds_fit=s.seconds["dip"], seconds=seconds)


def main():
    args = arguments(__doc__, names=some(NAMES), starts=some(STARTS, ["noise"]), educated=dict(action="store_true"), size=64,
                     iterations=2000, seeds=1)
    torch.set_num_threads(1)
    lines = Lines(args.out, "name", "which", "seed")
    for scan in lines.missing((name, *variant) for name in args.names for variant in variants(name, args.seeds)):
        lines.add(scan, case(*scan, args.size, args.iterations, args.starts, args.educated))
    keys = "psnr_fbp", "psnr_tv", "psnr_tv_held_out", "psnr_dip", "psnr", "z", "coverage", "miscalibration"
    print_table(("scan", "noise or projections", "seed", *keys, "start", "seconds: TV, fit, all"),
                [(d["name"] + " (chosen on)" * (d["name"] in CHOSEN_ON), d["which"], d["seed"], *(f"{d[k]:.2f}" for k in keys), d["start"],
                  f"{d['seconds_tv']:.0f}, {d['seconds_fit']:.0f}, {d['seconds']:.0f}") for d in lines])
    if discs := [d for d in lines if d.get("inside")]:
        print_table(("inside the disc", "projections", *discs[0]["inside"]),
                    [(d["name"], d["which"], *(f"{v:.2f}" for v in d["inside"].values())) for d in discs])
    for chosen in (True, False):
        ahead = [d["psnr"] - d["psnr_tv"] for d in lines if (d["name"] in CHOSEN_ON) == chosen]
        if ahead: print(f"{'chosen on' if chosen else 'held back'}: solve − TV {np.median(ahead):+.2f} dB in the median, {min(ahead):+.2f} at worst")


if __name__ == "__main__": main()

"The benchmarks go on where they stopped, and their figures are those of independent formulas."
import importlib
import json
import math
import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from dip_uq.dip import reconstruct
from dip_uq.networks import UNet

FOLDER = Path(__file__).parents[1] / "benchmarks"
DATA = Path(os.environ.get("DIP_UQ_DATA", "")) / "kmnist/kmnist_test_first50.npz"
DISC = Path(os.environ.get("DIP_UQ_DATA", "")) / "htc2022/htc2022_ta_full.mat"


def test_findings_are_kept(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(FOLDER)
    common, path, cases = importlib.import_module("common"), tmp_path / "found.jsonl", [("a", 1), ("a", 2), ("b", 1)]
    lines = common.Lines(path, "name", "seed")
    assert lines.missing(cases) == cases
    lines.add(("a", 2), dict(z=0.5), dict(z=1.5))
    again = common.Lines(path, "name", "seed")
    assert again == lines == [dict(name="a", seed=2, z=0.5), dict(name="a", seed=2, z=1.5)]
    assert again.missing(cases) == [("a", 1), ("b", 1)]


@pytest.fixture
def kmnist(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("kmnist")


@pytest.mark.skipif(not DATA.exists(), reason="the images of KMNIST are not in DIP_UQ_DATA")
def test_kmnist_goes_on_where_it_stopped(kmnist, tmp_path, monkeypatch, capsys):
    out = tmp_path / "kmnist.jsonl"
    monkeypatch.setattr(kmnist, "get_context", lambda method: multiprocessing.get_context("forkserver"))  # starts sooner
    def run(*methods):
        part = "--images 1 --angles 5 --noise 0.1 --iterations 20 --workers 1 --methods".split()
        monkeypatch.setattr(sys, "argv", ["kmnist.py", "--out", str(out), *part, *methods])
        kmnist.main()
        return out.read_text().splitlines(), capsys.readouterr().out
    first, _ = run("constant")
    more, tables = run("constant", "constant-rays")
    assert more[:1] == first and len(more) == 2  # nothing is computed twice
    lines = {d["method"]: d for d in map(json.loads, more)}
    d = lines["constant"]  # of an image between 0 and 1, so that PSNR is −20 log10 of the root mean square error
    expected = d["psnr"] * math.log(10) / 20 - 0.5 * math.log(2 * math.pi) - 0.5
    assert d["log_likelihood"] == pytest.approx(expected, abs=1e-4)
    assert d["z"] == pytest.approx(1, abs=1e-4)
    assert lines["constant-rays"]["log_likelihood"] != d["log_likelihood"]
    shown = [f"{lines[m]['log_likelihood']:.3f}" for m in ("constant", "constant-rays")]
    assert f"| 5, 10% | {' | '.join(shown)} |" in tables


def test_density_of_patches(kmnist):
    generator = torch.Generator().manual_seed(0)
    B, error = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((36, 50), (6, 6)))
    C = B @ B.T
    found = kmnist.patch_density(C, error, 3)
    parts = [error[i:i + 3, j:j + 3].flatten() for i in (0, 3) for j in (0, 3)]
    where = [np.ravel_multi_index(np.mgrid[i:i + 3, j:j + 3].reshape(2, -1), (6, 6)) for i in (0, 3) for j in (0, 3)]
    expected = [multivariate_normal(np.zeros(9), C[np.ix_(w, w)].numpy()).logpdf(e) / 9 for w, e in zip(where, parts)]
    assert found == pytest.approx(np.mean(expected), rel=1e-8)


def test_a_table_holds_mean_and_standard_error(kmnist, capsys):
    lines = [dict(angles=5, noise=0.05, method="mll", z=z) for z in (1.0, 2.0, 4.5)]
    kmnist.table(lines, [(5, 0.05), (10, 0.05)], ["mll"], "z")
    assert "| 5, 5% | 2.500 ± 1.041 |\n| 10, 5% | – |" in capsys.readouterr().out


@pytest.mark.skipif(not DISC.exists(), reason="the discs of HTC 2022 are not in DIP_UQ_DATA")
def test_discs_go_on_where_they_stopped(tmp_path, monkeypatch, capsys):
    "At 16² pixels; the profile of the free pixels holds what `solve` has found, where their size is the same."
    monkeypatch.syspath_prepend(FOLDER)
    discs, out = importlib.import_module("discs"), tmp_path / "discs.jsonl"
    monkeypatch.setattr(discs, "SIZE", 16)
    monkeypatch.setattr(discs, "BINS", 16)
    monkeypatch.setattr(discs, "UNet", lambda scales, channels: UNet(2, 4))
    def run(*parts):
        part = "--names ta --angles 8 --parts".split()
        monkeypatch.setattr(sys, "argv", ["discs.py", "--out", str(out), *part, *parts])
        discs.main()
        return list(map(json.loads, out.read_text().splitlines()))
    first, = run("solve")
    monkeypatch.setattr(discs, "STDS", (first["free_pixels"], 1.0))
    again, one, *profile = run("solve", "one-ray", "profile")
    assert again == first and one["held_out"] != first["held_out"]
    for key in "value", "rays_z", "z", "coverage95": assert profile[0][key] == pytest.approx(first[key], rel=1e-3)
    assert profile[1]["z"] < 0.1 and profile[1]["value"] < first["value"]
    assert "rays_z" in capsys.readouterr().out


@pytest.fixture
def variants(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("variants")


def test_ours_among_the_variants_is_ours(variants):
    scan, _ = variants.load("walnut", 0, 32)
    seen = []
    image = variants.ours(scan, 3, seen.append, iterations=12)
    assert len(seen) == 12 and torch.equal(image, reconstruct(scan, UNet(4, 16), iterations=12, seed=3, progress=False).image)


def test_variants_differ_as_they_should(variants):
    "The first image is that of fresh weights, whatever is minimised; the second one depends on it."
    scan, _ = variants.load("walnut", 0, 32)
    fits = {method: list(variants.rival(scan, method, 1e-2, 0, 7)) for method in ("dip", "dip-tv", "aseq")}
    assert torch.equal(fits["dip"][0], fits["aseq"][0]) and torch.equal(fits["dip"][0], fits["dip-tv"][0])
    assert not torch.equal(fits["dip"][2], fits["aseq"][2])
    A, y = scan.operator, scan.measurement
    for method in variants.RIVALS:
        first, *_, last = variants.rival(scan, method, 1e-2, 0, 60)
        assert (A(last) - y).norm() < 0.7 * (A(first) - y).norm(), method


def test_variance_stops_where_images_stay_alike(variants):
    "Images that move less and less until the 150th, and then more and more: a window of 100 is stillest soon after the 200th."
    place = torch.arange(2000.)
    images = (place - 150).square()[:, None, None] * torch.ones(2, 2) * 1e-3
    curve = variants.Curve(lambda x: float(x.mean()))
    score, at, _ = variants.chosen(images, 1e6, curve)
    assert abs(at - 199) <= 1 and score == pytest.approx(float(images[at].mean()))
    assert curve.steps == 2000 and len(curve) == 40

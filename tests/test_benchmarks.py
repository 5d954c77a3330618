"The KMNIST benchmark goes on where it stopped, and its scores are those of independent formulas."
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

SCRIPT = Path(__file__).parents[1] / "benchmarks/kmnist.py"
DATA = Path(os.environ.get("DIP_UQ_DATA", "")) / "kmnist/kmnist_test_first50.npz"


@pytest.fixture(scope="module")
def kmnist():
    spec = importlib.util.spec_from_file_location("kmnist_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not DATA.exists(), reason="the images of KMNIST are not in DIP_UQ_DATA")
def test_kmnist_goes_on_where_it_stopped(tmp_path):
    out = tmp_path / "kmnist.jsonl"
    def run(*methods):
        part = "--images 1 --angles 5 --noise 0.1 --iterations 20 --workers 1 --methods".split()
        done = subprocess.run([sys.executable, SCRIPT, "--out", out, *part, *methods], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return out.read_text().splitlines(), done.stdout
    first, _ = run("constant", "mll")
    more, tables = run("constant", "mll", "constant-rays")
    assert more[:2] == first and len(more) == 3  # nothing is computed twice
    lines = {d["method"]: d for d in map(json.loads, more)}
    d = lines["constant"]  # of an image between 0 and 1, so that PSNR is −20 log10 of the root mean square error
    expected = d["psnr"] * math.log(10) / 20 - 0.5 * math.log(2 * math.pi) - 0.5
    assert d["log_likelihood"] == pytest.approx(expected, abs=1e-4)
    assert d["z"] == pytest.approx(1, abs=1e-4)
    assert lines["mll"]["psnr"] == d["psnr"] and lines["mll"]["log_likelihood"] != d["log_likelihood"]
    shown = [f"{lines[m]['log_likelihood']:.3f}" for m in ("constant", "mll", "constant-rays")]
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

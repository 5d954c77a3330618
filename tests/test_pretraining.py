"""Pretraining: what is too bulky for its notebook. Power cuts, several processes, every way to fine-tune, files."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dip_uq import pretraining
from dip_uq.data import simulate, walnut
from dip_uq.files import load_tensors
from dip_uq.networks import UNet
from dip_uq.pretraining import TRAINED, Pretrained, fan_scanner, fine_tune, plain, pretrain, trained

INSTRUMENTS = [fan_scanner(16, n) for n in (6, 9)]
OPTIONS = dict(net=UNet(2, 4), iterations=20, batch=4, progress=False)
SCAN = simulate(walnut(16), fan_scanner(16, 8), noise=0.05)


def weights(net): return torch.cat([v.flatten().double() for v in net.state_dict().values()])


@pytest.fixture(scope="module")
def whole(): return pretrain(INSTRUMENTS, **OPTIONS)


@pytest.mark.parametrize("cut", (1, 7, 19))
def test_resumed_is_uninterrupted(whole, cut, tmp_path, monkeypatch):
    "The power fails in the middle of a step; what is on disk then leads to the same bits."
    step, state = pretraining.Course.step, tmp_path / "state.safetensors"

    def failing(course, loss):
        if len(course.losses) == cut: raise RuntimeError("power cut")
        step(course, loss)

    with monkeypatch.context() as m:
        m.setattr(pretraining, "STATE_SECONDS", 0)
        m.setattr(pretraining, "every", lambda seconds, act: act)  # a state after each step
        m.setattr(pretraining.Course, "step", failing)
        with pytest.raises(RuntimeError, match="power cut"): pretrain(INSTRUMENTS, resume=state, **OPTIONS)
    assert len(load_tensors(state)[0]["losses"]) == cut
    resumed = pretrain(INSTRUMENTS, resume=state, **OPTIONS)
    assert torch.equal(weights(resumed.net), weights(whole.net)) and resumed.card == whole.card
    for key, values in whole.history.items(): np.testing.assert_array_equal(resumed.history[key], values)


def test_a_finished_state_is_taken_up(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "every", lambda seconds, act: act)
    for _ in range(2): again = pretrain(INSTRUMENTS, resume=tmp_path / "state.safetensors", **OPTIONS)
    assert torch.equal(weights(again.net), weights(whole.net))
    with pytest.raises(ValueError, match="holds the state of another training"):
        pretrain(INSTRUMENTS, resume=tmp_path / "state.safetensors", **OPTIONS | dict(seed=1))


def test_seed_decides_and_global_chance_does_not(whole):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    again, other = (pretrain(INSTRUMENTS, seed=seed, **OPTIONS) for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weights(again.net), weights(whole.net)) and not torch.equal(weights(other.net), weights(whole.net))
    np.testing.assert_array_equal(again.history["loss"], whole.history["loss"])


def test_interrupted(whole, monkeypatch):
    step = pretraining.Course.step

    def impatient(course, loss):
        if len(course.losses) == 5: raise KeyboardInterrupt
        step(course, loss)

    monkeypatch.setattr(pretraining.Course, "step", impatient)
    part = pretrain(INSTRUMENTS, **OPTIONS)
    assert (part.card["stopped"], part.card["steps"]) == ("interrupted", 5)
    np.testing.assert_array_equal(part.history["loss"], whole.history["loss"][:5])


SCRIPT = """
import sys
from accelerate import Accelerator
from dip_uq.networks import UNet
from dip_uq.pretraining import fan_scanner, pretrain
taught = pretrain([fan_scanner(16, n) for n in (6, 9)], UNet(2, 4), iterations=20, batch=4, progress=False)
assert Accelerator().num_processes == 2
if Accelerator().is_main_process: taught.save(sys.argv[1])
"""


def test_two_processes_learn_what_one_learns(whole, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", tmp_path / "script.py"]
    env = os.environ | dict(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1",
                            PYTHONPATH=os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run([sys.executable, *map(str, launch), str(tmp_path / "taught.safetensors")], env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shared = Pretrained.load(tmp_path / "taught.safetensors")
    np.testing.assert_allclose(shared.history["loss"], whole.history["loss"], rtol=1e-4)  # but for the order of sums
    torch.testing.assert_close(weights(shared.net), weights(whole.net), rtol=0, atol=1e-3)


@pytest.mark.parametrize("train", TRAINED)
def test_what_moves(whole, train):
    recon = fine_tune(SCAN, whole, train, iterations=15, stop="fixed", progress=False)
    before, after = whole.net.state_dict(), recon.net.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    expected = dict(all=lambda name: True, decoder=lambda name: not name.startswith(("first", "down")))
    if train in expected: assert moved == {name for name in before if expected[train](name)}
    else:
        convolutions = {name for name, v in before.items() if v.ndim == 4}
        assert moved == convolutions
        for name in convolutions: assert_same_singular_vectors(before[name], after[name])
    with torch.no_grad(): torch.testing.assert_close(recon.scale * recon.net(recon.z)[0, 0], recon.image)
    assert before.keys() == after.keys() and all(p.requires_grad for p in recon.net.parameters())


def assert_same_singular_vectors(before, after):
    "Uᵀ W V stays diagonal, with the U and V of the weights before, up to rounding."
    U, _, Vh = torch.linalg.svd(before.flatten(1), full_matrices=False)
    inside = U.T @ after.flatten(1) @ Vh.T
    torch.testing.assert_close(U @ inside.diagonal().diag() @ Vh, after.flatten(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("train", TRAINED)
def test_gradients(whole, train):
    "Those of the misfit with respect to all that moves, against central differences."
    net = trained(whole.net, train).double()
    z, x = (torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (0, 1))
    free = [p for p in net.parameters() if p.requires_grad]
    gradients = torch.autograd.grad((net(z) - x).square().sum(), free)
    g = torch.Generator().manual_seed(2)
    directions = [torch.randn(p.shape, generator=g, dtype=torch.float64) for p in free]

    def moved(step):
        with torch.no_grad():
            for p, d in zip(free, directions): p += step * d
            loss = float((net(z) - x).square().sum())
            for p, d in zip(free, directions): p -= step * d
        return loss

    slope = sum(float((a * d).sum()) for a, d in zip(gradients, directions))
    assert slope == pytest.approx((moved(1e-6) - moved(-1e-6)) / 2e-6, rel=1e-5)


@pytest.mark.parametrize("train", TRAINED)
def test_preparing_changes_no_image(whole, train):
    z = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for net in (trained(whole.net, train), plain(trained(whole.net, train))):
            torch.testing.assert_close(net(z), whole.net(z), rtol=0, atol=1e-5)


def test_files(whole, tmp_path):
    whole.save(tmp_path / "taught.safetensors")
    loaded = Pretrained.load(tmp_path / "taught.safetensors")
    assert torch.equal(weights(loaded.net), weights(whole.net)) and loaded.card == whole.card
    for key, values in whole.history.items(): np.testing.assert_array_equal(loaded.history[key], values)
    assert torch.equal(loaded(SCAN), whole(SCAN))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "taught.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a complete file"): Pretrained.load(tmp_path / "cut.safetensors")


def test_the_shipped_network():
    "It is small, it says what it has seen, and it makes much more of a nut that it has not seen than its input."
    taught = Pretrained.load()
    assert Path(pretraining.__file__).with_name(pretraining.SHIPPED).stat().st_size < 2e6
    assert taught.card["steps"] == taught.card["iterations"] and taught.card["images"] == [p.__name__ for p in pretraining.PHANTOMS]
    scan = simulate(walnut(64, seed=1), fan_scanner(64, 30), noise=0.05, seed=1)
    z, scale = pretraining.first_guess(scan, "fbp")
    assert pretraining.psnr(taught(scan), scan.truth) > pretraining.psnr(scale * z[0, 0], scan.truth) + 4

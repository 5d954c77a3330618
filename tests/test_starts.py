"Several starts: what the network is given, and which fit is returned."
import json
import math

import pytest
import torch

from dip_uq import dip, starts
from dip_uq.data import simulate, walnut
from dip_uq.dip import first_guess, reconstruct
from dip_uq.networks import UNet
from dip_uq.pipeline import solve, solve_image
from dip_uq.pretraining import fan_scanner
from dip_uq.starts import reconstruct_from, starts_of
from dip_uq.variation import tv_reconstruction

SCAN = simulate(walnut(16, seed=1), fan_scanner(16, 9), noise=0.05, seed=1)
FIT = dict(iterations=12, progress=False)
BOTH = "noise", "tv"


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_an_image_stands_beside_noise(channels):
    z, scale = first_guess(SCAN, "tv", 3, channels)
    noise, image = first_guess(SCAN, "noise", 3, channels)[0], tv_reconstruction(SCAN)[0]
    assert z.shape == (1, channels, 16, 16) and torch.equal(z[:, :-1], noise[:, :-1])
    torch.testing.assert_close(z[0, -1] * scale * (1 if channels == 1 else 4), image)
    own = torch.rand(16, 16)
    torch.testing.assert_close(first_guess(SCAN, own, 3, channels)[0][0, -1] * scale * (1 if channels == 1 else 4), own)


def test_what_counts_as_several():
    image = torch.ones(2, 2)
    assert starts_of(None) == [None] and starts_of("tv") == ["tv"] and starts_of(["noise", "tv"]) == list(BOTH) and starts_of(("tv",)) == ["tv"]
    assert starts_of(image)[0] is image and starts_of([[1.0, 2.0]]) == [[[1.0, 2.0]]]


@pytest.mark.parametrize("act", [reconstruct_from, solve_image, solve])
def test_unknown_starts_are_told_before_any_fit(act, monkeypatch):
    def never(*args, **options): raise AssertionError("fitted")
    monkeypatch.setattr(starts, "reconstruct", never)
    with pytest.raises(ValueError, match="start: 'warm' is unknown; choose one of noise, cgls, smooth, fbp, tv"):
        act(SCAN, UNet(2, 4), start=("noise", "warm"), progress=False)


@pytest.mark.parametrize("names", [("noise", "tv"), ("tv", "noise"), ("cgls", "fbp", "smooth")])
def test_the_order_of_starts_changes_nothing(names):
    found = reconstruct_from(SCAN, UNet(2, 4, inputs=2), names, **FIT)
    tried = found.settings["tried"]
    assert tuple(tried) == names and tried[found.settings["start"]] == min(tried.values()) == found.history["held_out"].min()
    alone = reconstruct(SCAN, UNet(2, 4, inputs=2), stop="heldout", start=found.settings["start"], **FIT,
                        learning_rate=2e-2 if found.settings["start"] == "tv" else 5e-3)
    assert torch.equal(found.image, alone.image)


def test_a_rate_that_is_given_is_that_of_all(monkeypatch):
    rates = []
    def noted(*args, **options):
        rates.append(options.get("learning_rate"))
        return reconstruct(*args, **options)
    monkeypatch.setattr(starts, "reconstruct", noted)
    for rate in {}, dict(learning_rate=1e-3): reconstruct_from(SCAN, UNet(2, 4), BOTH, **rate, **FIT)
    assert rates == [None, 2e-2, 1e-3, 1e-3]


class Stops(UNet):
    "Is interrupted in a step of the second fit."
    steps, until = 0, math.inf
    def forward(self, z):
        Stops.steps += torch.is_grad_enabled()
        if torch.is_grad_enabled() and Stops.steps == Stops.until: raise KeyboardInterrupt
        return super().forward(z)


def test_an_interruption_ends_it_with_the_best_so_far():
    Stops.steps, Stops.until = 0, 18
    found = reconstruct_from(SCAN, Stops(2, 4), ("noise", "cgls", "tv"), **FIT)
    assert found.settings["stopped"] == "interrupted" and list(found.settings["tried"]) == ["noise", "cgls"]


def test_solve_goes_on_where_the_second_fit_was_interrupted(tmp_path):
    whole = solve_image(SCAN, UNet(2, 4), start=BOTH, **FIT)
    Stops.steps, Stops.until = 0, 18
    with pytest.raises(KeyboardInterrupt): solve_image(SCAN, Stops(2, 4), start=BOTH, state=tmp_path, **FIT)
    assert {p.name for p in tmp_path.iterdir()} == {"fit_noise.safetensors"}
    resumed = solve_image(SCAN, Stops(2, 4), start=BOTH, state=tmp_path, **FIT)
    assert torch.equal(resumed.image, whole.image) and resumed.recon.settings == whole.recon.settings


def test_a_fit_goes_on_where_threads_add_up_in_another_order(tmp_path, monkeypatch):
    "What total variation finds is another then, by rounding; the first one counts."
    options = dict(net=UNet(2, 4), start="tv", stop="heldout", resume=tmp_path / "fit.safetensors")
    whole = reconstruct(SCAN, **options | dict(resume=None), **FIT)
    reconstruct(SCAN, **options, **FIT)
    monkeypatch.setattr(dip, "first_guess", lambda *args: (first_guess(*args)[0] + 1e-6, first_guess(*args)[1]))
    again = reconstruct(SCAN, **options, **FIT)
    assert torch.equal(again.z, whole.z) and torch.equal(again.image, whole.image)
    monkeypatch.setattr(dip, "first_guess", lambda *args: (first_guess(*args)[0] + 0.1, first_guess(*args)[1]))
    with pytest.raises(ValueError, match="a run on another scan; repeat its arguments"): reconstruct(SCAN, **options, **FIT)


def test_a_result_says_what_was_tried(tmp_path):
    found = solve(SCAN, start=BOTH, samples=2, **FIT)
    assert found.recon.net.settings["inputs"] == 2 and found.recon.z.shape[1] == 2
    found.save(tmp_path)
    told = json.loads((tmp_path / "summary.json").read_text())["reconstruction"]
    assert told["tried"] == found.recon.settings["tried"] and told["start"] in BOTH

"""The deep image prior: what is too bulky for its notebook. Every rule, operator, interruption and file."""
import multiprocessing
from contextlib import suppress
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import scipy.sparse.linalg as spl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio
from torch import nn

from dip_uq import dip
from dip_uq.cone import cone_beam
from dip_uq.data import ellipses, simulate
from dip_uq.dip import Reconstruction, first_guess, reconstruct
from dip_uq.files import load_tensors, save_tensors
from dip_uq.networks import UNet
from dip_uq.operators import LinearOperator, as_operator
from dip_uq.rays import fan_beam, parallel_beam
from dip_uq.variation import psnr, total_variation, tv_reconstruction

SHAPE = 14, 16
TRUTH = torch.nn.functional.pad(ellipses(14, 1), (1, 1))
STOPS = "heldout", "discrepancy", "variance", "fixed"
NET = UNet(2, 4, sigmoid=False)


def blur(x): return torch.nn.functional.avg_pool2d(x[:, None], 3, 1, padding=1)[:, 0]


def sensing(rows):
    return torch.randn(rows, 224, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 15


OPERATORS = dict(
    rays=fan_beam(np.arange(12) * np.pi / 6, SHAPE, bins=16, bin_size=1.5, source_origin=60., origin_detector=30.),
    blur=as_operator((blur, blur), SHAPE),
    sensing=as_operator(sensing(100), SHAPE),
    scipy=as_operator(spl.aslinearoperator(sensing(60).numpy()), SHAPE, (6, 10)),
)


@pytest.fixture(params=OPERATORS)
def scan(request): return simulate(TRUTH, OPERATORS[request.param], noise=0.1)


def fit(scan, net=NET, **options):
    return reconstruct(scan, net, **dict(tv=1e-4, iterations=25, learning_rate=0.02, start="cgls", progress=False) | options)


def weights(recon): return torch.cat([p.detach().flatten() for p in recon.net.parameters()])


def assert_same(a, b):
    assert torch.equal(weights(a), weights(b)) and torch.equal(a.image, b.image)


def assert_consistent(recon):
    "The image, the network, the history and the settings speak of the same iterate."
    k, power = recon.settings["iteration"], recon.scan.training.measurement.square().mean()
    with torch.no_grad():
        assert torch.equal(recon.scale * recon.net(recon.z)[0, 0], recon.image)
        for part, key in ((recon.scan.training, "data"), (recon.scan.validation if recon.scan.held_out else None, "held_out")):
            if part is None: continue
            error = (part.operator(recon.image) - part.measurement).square().mean() / power
            assert recon.history[key][k] == pytest.approx(float(error), rel=1e-4)
    assert recon.history["psnr"][k] == pytest.approx(psnr(recon.image, recon.scan.truth), abs=1e-3)
    loss = recon.history["data"] + recon.settings["tv"] * recon.history["tv"]
    np.testing.assert_allclose(recon.history["loss"], loss, rtol=1e-5)


# Every operator


@pytest.mark.parametrize("stop", STOPS)
def test_every_operator(scan, stop):
    if stop == "discrepancy": scan = simulate(TRUTH, scan.operator, noise=0.4)
    recon = fit(scan, stop=stop, iterations=200 if stop == "discrepancy" else 25)
    assert_consistent(recon)
    iterate, errors = recon.settings["iteration"], recon.history
    if stop in ("fixed", "variance"): assert iterate == 24 and len(errors["loss"]) == 25  # too short for a window of 100
    if stop == "heldout":
        assert iterate == errors["held_out"].argmin()
        assert len(recon.scan.held_out) == round(len(scan.measurement) / 6)
    if stop == "discrepancy":
        limit = scan.noise_std * scan.measurement.numel()**0.5
        misfits = np.sqrt(errors["data"]) * float(scan.measurement.norm())
        assert recon.settings["stopped"] == "discrepancy reached"
        assert iterate > 0 and misfits[iterate] <= limit and (misfits[:iterate] > limit).all()
    else: assert errors["data"][iterate] < 0.5


def test_held_out_and_truth_have_no_influence(scan):
    scan = scan.hold_out(2)
    spoilt = scan.measurement.clone()
    spoilt[list(scan.held_out)] = 1e3
    assert_same(fit(scan, stop="fixed"), fit(replace(scan, measurement=spoilt, truth=None), stop="fixed"))
    assert_same(fit(scan), fit(replace(scan, truth=1 - TRUTH)))
    touched = scan.measurement.clone()
    touched[0] += 0.1
    assert not torch.equal(fit(scan, stop="fixed").image, fit(replace(scan, measurement=touched), stop="fixed").image)


def test_float64(scan, tmp_path):
    recon = fit(replace(scan, measurement=scan.measurement.double()))
    assert recon.image.dtype == weights(recon).dtype == torch.float64
    recon.save(tmp_path / "a")
    assert_same(recon, Reconstruction.load(tmp_path / "a", recon.scan))


RAYS = simulate(TRUTH, OPERATORS["rays"], noise=0.1)


@pytest.mark.parametrize("iterations", [1, 2, 3, 4, 5])
def test_few_iterations(iterations):
    for stop in STOPS:
        recon = fit(RAYS, iterations=iterations, stop=stop)
        assert_consistent(recon)
        assert len(recon.history["loss"]) <= iterations


def test_one_projection_can_be_fitted():
    one = replace(RAYS, measurement=RAYS.measurement[:1], operator=RAYS.operator[:1])
    assert_consistent(fit(one, stop="fixed"))
    with pytest.raises(ValueError, match="needs at least 2 projections, and the scan has 1"): fit(one, stop="heldout")


# Randomness


def test_repeatable_whatever_the_global_state():
    torch.manual_seed(1)
    one = fit(RAYS, None, iterations=3)  # the default network is drawn inside
    state = torch.manual_seed(2).get_state()
    two = fit(RAYS, None, iterations=3)
    assert_same(one, two)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(one.image, fit(RAYS, None, iterations=3, seed=1).image)


def test_the_given_network_is_not_touched():
    before = {k: v.clone() for k, v in NET.state_dict().items()}
    fit(RAYS)
    assert NET.training and all(torch.equal(v, before[k]) for k, v in NET.state_dict().items())


def test_dropout_and_batchnorm():
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 1, 1))
    state = torch.get_rng_state()
    one, two = fit(RAYS, net), fit(RAYS, net)
    assert_same(one, two)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad(): assert torch.equal(one.scale * one.net(one.z)[0, 0], one.image)  # without dropout


# Interruption


class Interrupted(LinearOperator):
    "The operator of `RAYS`; the product number `left` after arming, also of some rows, is interrupted."
    def __init__(self, A):
        super().__init__(A.domain_shape, A.range_shape, self.product, A.T)
        self.A, self.left = A, 0

    def product(self, x):
        self.left -= 1
        if self.left == 0: raise KeyboardInterrupt
        return self.A(x)


@cache
def uninterrupted(stop):
    "A fit, and how many products come before its first step, as rough images come first."
    scan = replace(RAYS, operator=Interrupted(RAYS.operator), held_out=(2, 7))
    whole = fit(scan, stop=stop)
    return whole, -scan.operator.left - len(whole.history["loss"])


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("at", [2, 3, 9, 25])
def test_interruption_returns_the_best_so_far(stop, at):
    scan, (whole, before) = replace(RAYS, operator=Interrupted(RAYS.operator), held_out=(2, 7)), uninterrupted(stop)
    scan.operator.left = before + at
    recon = fit(scan, stop=stop)
    scan.operator.left = 0
    assert recon.settings["stopped"] == "interrupted" or len(whole.history["loss"]) < at
    seen = len(recon.history["loss"])
    np.testing.assert_array_equal(recon.history["loss"], whole.history["loss"][:seen])
    assert recon.settings["iteration"] == (recon.history["held_out"].argmin() if stop == "heldout" else seen - 1)
    assert_consistent(recon)


def test_interruption_before_there_is_anything():
    scan = replace(RAYS, operator=Interrupted(RAYS.operator), held_out=(2, 7))
    steps = len(fit(scan).history["loss"])
    scan.operator.left = 1 - scan.operator.left - steps
    with pytest.raises(KeyboardInterrupt): fit(scan)


# Power cuts


OPTIONS = dict(tv=1e-4, iterations=150, learning_rate=0.02, stop="variance", jitter=0.1, progress=False)


def run_with_state(path):
    torch.set_num_threads(1)  # the parent's rounding
    dip.STATE_SECONDS = 0.0
    reconstruct(RAYS, UNet(3, 8), resume=path, **OPTIONS)


def test_killed_again_and_again(tmp_path):
    "A process that is killed at random moments comes to an end, and to the bits of one that was left alone."
    processes, state = multiprocessing.get_context("forkserver"), tmp_path / "state"
    rng, kills = np.random.default_rng(0), 0
    for _ in range(20):
        process = processes.Process(target=run_with_state, args=(state,))
        process.start()
        process.join(rng.uniform(0.1, 0.7) if kills < 8 else 120)
        if process.exitcode == 0: break
        process.kill()
        process.join()
        kills += 1
    assert process.exitcode == 0 and kills == 8, kills
    resumed, whole = reconstruct(RAYS, UNet(3, 8), resume=state, **OPTIONS), reconstruct(RAYS, UNet(3, 8), **OPTIONS)
    assert_same(resumed, whole)
    for key in whole.history: np.testing.assert_array_equal(resumed.history[key], whole.history[key])


@cache
def with_dropout(stop):
    "A scan, a network that draws, and the fit that nobody cuts short."
    scan, net = simulate(TRUTH, RAYS.operator, noise=0.05), nn.Sequential(UNet(2, 4), nn.Dropout(0.05))
    return scan, net, reconstruct(scan, net, **OPTIONS | dict(stop=stop))


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("at", [3, 120, 149])
def test_resumed_at_any_iterate(stop, at, tmp_path, monkeypatch):
    (scan, net, whole), options = with_dropout(stop), OPTIONS | dict(stop=stop)

    def cut(seconds, act):
        def look(run):
            if run.iteration == at:
                act(run)
                raise RuntimeError("power cut")
        return look

    with monkeypatch.context() as patched, suppress(RuntimeError):
        patched.setattr(dip, "every", cut)
        reconstruct(scan, net, resume=tmp_path / "state", **options)
        return  # the discrepancy was reached before
    assert load_tensors(tmp_path / "state")[1]["iteration"] == at
    resumed = reconstruct(scan, net, resume=tmp_path / "state", **options)
    assert_same(resumed, whole)
    for key in whole.history: np.testing.assert_array_equal(resumed.history[key], whole.history[key])
    again = reconstruct(scan, net, resume=tmp_path / "state", **options)
    assert_same(again, whole)


def test_states_are_seldom_and_cheap(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(dip, "perf_counter", lambda: clock[0])
    acts = []

    def act(run):
        acts.append(clock[0])
        clock[0] += 2

    watch = dip.every(10, act)
    while clock[0] < 1000:
        watch(None)
        clock[0] += 1
    assert acts[0] == 10 and len(acts) == 9  # the second after 200 s, since 4 s are 2 % of that, and so on to 900 s
    assert all(50 * 2 * (k + 1) <= t < 50 * 2 * (k + 1) + 3 for k, t in enumerate(acts) if k)


def test_state_of_another_network(tmp_path, monkeypatch):
    monkeypatch.setattr(dip, "STATE_SECONDS", 0.0)
    fit(RAYS, resume=tmp_path / "state")
    with pytest.raises(ValueError, match="the state of another run"): fit(RAYS, UNet(2, 8), resume=tmp_path / "state")


def test_live_figure(monkeypatch):
    "It is drawn in place while the run goes on, changes nothing, and asks for Jupyter elsewhere."
    class Handle(list):
        def update(self, figure): self.append(len(figure.axes[0].lines[0].get_xdata()))

    handle = Handle()
    monkeypatch.setattr(dip, "FIGURE_SECONDS", 0.0)
    monkeypatch.setattr(dip, "display", lambda display_id: handle)
    assert_same(fit(RAYS, progress="live"), fit(RAYS))
    assert handle and all(1 <= n <= 25 for n in handle)
    monkeypatch.setattr(dip, "display", lambda display_id: None)  # as IPython does in plain Python
    with pytest.raises(ValueError, match="plain Python; True shows a bar"): fit(RAYS, progress="live")


def test_counts_need_a_positive_mean():
    counts = replace(RAYS, measurement=RAYS.measurement.clamp(min=0), noise_std=None, poisson=True)
    with pytest.raises(ValueError, match="end the network in a sigmoid"): fit(counts)  # NET is linear


# Files


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    recon = fit(RAYS, seed=np.int64(3), tv=np.float32(1e-4), iterations=np.int32(5))
    path = tmp_path_factory.mktemp("files") / "new" / "folder" / "recon.safetensors"
    recon.save(path)
    return recon, path


def test_round_trip(saved):
    recon, path = saved
    state = torch.get_rng_state()
    loaded = Reconstruction.load(path, RAYS)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(loaded, recon)
    assert (loaded.settings, loaded.scale, loaded.scan.held_out) == (recon.settings, recon.scale, recon.scan.held_out)
    assert loaded.net.settings == recon.net.settings and not loaded.net.training
    for key, values in recon.history.items(): np.testing.assert_array_equal(loaded.history[key], values)
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing half-written beside it


def test_another_operator_of_the_same_shape(tmp_path, monkeypatch):
    "It is refused, with how far it is from the one that was used, by files and by states; rounding is not."
    monkeypatch.setattr(dip, "STATE_SECONDS", 0.0)
    fit(RAYS, start="noise", resume=tmp_path / "state").save(tmp_path / "recon")
    A = RAYS.operator
    turned = fan_beam(A.angles + 0.01, SHAPE, A.geometry.bins, A.geometry.bin_size, A.geometry.source_origin,
                      A.geometry.origin_detector, A.geometry.pixel_size)
    for other in (turned, LinearOperator(A.domain_shape, A.range_shape, lambda x: 1.001 * A(x), lambda y: 1.001 * A.T(y))):
        scan = replace(RAYS, operator=other)
        with pytest.raises(ValueError, match="scan: .*recon was made with another operator of this shape.*differ by 0.*pass"):
            Reconstruction.load(tmp_path / "recon", scan)
    with pytest.raises(ValueError, match="resume: .*state' was made with another operator"):
        fit(replace(RAYS, operator=turned), start="noise", resume=tmp_path / "state")
    same = LinearOperator(A.domain_shape, A.range_shape, lambda x: A(x) * (1 + 1e-6), A.T)
    Reconstruction.load(tmp_path / "recon", replace(RAYS, operator=same, measurement=RAYS.measurement.double()))
    tensors, about = load_tensors(tmp_path / "recon")
    del tensors["fingerprint"]  # as files were before there were fingerprints
    save_tensors(tmp_path / "old", tensors, about)
    Reconstruction.load(tmp_path / "old", RAYS)


def test_fits_where_gradients_are_off():
    "And of tensors that were made there."
    for context in torch.no_grad, torch.inference_mode:
        with context():
            scan = replace(RAYS, measurement=RAYS.measurement.clone(), truth=RAYS.truth.clone())
            assert_same(fit(scan), fit(RAYS))
        assert_same(fit(scan), fit(RAYS))
    assert_same(fit(replace(RAYS, measurement=RAYS.measurement.clone().requires_grad_() * 1)), fit(RAYS))


@pytest.mark.parametrize("factor, message", [(1e20, "readings reach .*e.*, too far from 1"), (1e-22, "too far from 1"),
                                             (0, "all rays to be fitted are zero")])
def test_readings_that_float32_cannot_square(factor, message):
    with pytest.raises(ValueError, match=f"^scan.measurement: .*{message}"): fit(replace(RAYS, measurement=factor * RAYS.measurement))


@pytest.mark.parametrize("factor", [2.0**-60, 2.0**48])
def test_units_do_not_matter(factor):
    "Powers of two do not even change the rounding."
    scaled = replace(RAYS, measurement=factor * RAYS.measurement, truth=factor * RAYS.truth, noise_std=factor * RAYS.noise_std)
    assert torch.equal(fit(scaled).image, factor * fit(RAYS).image)


def test_other_networks_are_passed(tmp_path):
    class Small(UNet): pass
    recon = fit(RAYS, Small(2, 4))
    recon.save(tmp_path / "a")
    with pytest.raises(ValueError, match="the file holds a Small; pass such a network"): Reconstruction.load(tmp_path / "a", RAYS)
    given = Small(2, 4)
    before = given.first[0].weight.clone()
    assert_same(Reconstruction.load(tmp_path / "a", RAYS, given), recon)
    assert torch.equal(given.first[0].weight, before)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_file(saved, share):
    _, path = saved
    content = path.read_bytes()
    cut = path.with_name("cut")
    cut.write_bytes(content[:int(share * len(content))])
    with pytest.raises(ValueError, match="cut' is not a complete file"): Reconstruction.load(cut, RAYS)
    cut.unlink()


def test_foreign_files(saved, tmp_path):
    recon, path = saved
    for other in (replace(RAYS, measurement=RAYS.measurement + 0.1),
                  simulate(TRUTH, OPERATORS["sensing"]), simulate(TRUTH.T, as_operator(sensing(192), SHAPE[::-1], (12, 16)))):
        with pytest.raises(ValueError, match="made from another one"): Reconstruction.load(path, other)
    nearly = replace(RAYS, measurement=RAYS.measurement * (1 + 1e-6))  # another machine's rounding
    assert torch.equal(Reconstruction.load(path, nearly).image, recon.image)
    with pytest.raises(ValueError, match="not a complete file"): load_tensors(tmp_path)
    save_tensors(tmp_path / "b", {"x": torch.ones(2, 3).T}, {"a": [1]})
    tensors, about = load_tensors(tmp_path / "b")
    assert torch.equal(tensors["x"], torch.ones(3, 2)) and about == {"a": [1]}


# Scores


@settings(max_examples=50, deadline=None, derandomize=True)
@given(shape=st.lists(st.integers(1, 6), min_size=2, max_size=3), seed=st.integers(0, 99))
def test_total_variation_and_psnr(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    tv = sum(np.abs(np.diff(x.numpy(), axis=k)).sum() for k in range(len(shape)))
    assert float(total_variation(x)) == pytest.approx(tv, rel=1e-12)
    assert float(total_variation(3 - 2 * x)) == pytest.approx(2 * tv, rel=1e-12)
    if x.numel() > 1:
        expected = peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=float(x.max() - x.min()))
        assert psnr(y, x) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("options, message", [
    (dict(tv=float("nan")), "tv has 1 NaN"), (dict(tv="much"), "tv must hold numbers"),
    (dict(iterations=2.5), "iterations must be a whole number"), (dict(learning_rate=float("inf")), "learning_rate has 1 NaN"),
    (dict(seed=-1), "seed=-1 is out of range"), (dict(stop=None), "stop: None is unknown"), (dict(net=3), "net is 3, expected"),
    (dict(progress="bar"), "progress='bar': choose True"), (dict(net=nn.Conv2d(1, 1, 3)), r"maps \(1, 1, 14, 16\) to \(1, 1, 12, 14\); it must keep the shape"),
    (dict(net=UNet(2, 4).requires_grad_(False)), "nothing to fit; call net.requires_grad_"), (dict(iterations=True), "got True"),
    (dict(net=nn.Identity()), "nothing to fit"), (dict(start=3), r"start has shape \(\)"),
])
def test_bad_arguments(options, message):
    with pytest.raises((ValueError, TypeError), match=message): fit(RAYS, **options)


def test_a_start_may_be_an_array():
    image = np.random.default_rng(0).random(RAYS.operator.domain_shape)
    again = [fit(RAYS, start=start, iterations=2).image for start in (image, torch.from_numpy(image))]
    assert torch.equal(*again)


def test_noiseless_scan_has_no_discrepancy():
    with pytest.raises(ValueError, match="needs scan.noise_std above 0, not 0.0"):
        fit(replace(RAYS, noise_std=0), stop="discrepancy")


def test_the_range_is_that_of_the_field_of_view_where_the_image_reaches_far_beyond_it():
    "Of a truncated scan the rest of the image is dark and wide, and must not take the light from the middle."
    turn, bright = np.arange(24) * np.pi / 24, ellipses(48, 1)  # up to 0.96
    A = parallel_beam(turn, (48, 48), 32)
    _, scale = first_guess(simulate(bright, A, noise=0.03, seed=1))
    assert 0.8 < scale / float(bright.max()) < 1


def test_the_flattest_image_as_input_knows_no_held_out_ray(tmp_path):
    "It is that of the readings to be fitted, in units of the scale; a fit from it is loaded as it was saved."
    scan = simulate(TRUTH, OPERATORS["rays"], noise=0.05, seed=1).hold_out(3)
    z, scale = first_guess(scan, "tv")
    torch.testing.assert_close(scale * z[0, 0], tv_reconstruction(scan.training)[0])
    wrong = scan.measurement.clone()
    wrong[list(scan.held_out)] = 99.0
    torch.testing.assert_close(first_guess(replace(scan, measurement=wrong), "tv")[0], z)
    recon = fit(scan, start="tv", stop="heldout")
    recon.save(tmp_path / "recon")
    assert_same(Reconstruction.load(tmp_path / "recon", recon.scan), recon)
    single = simulate(TRUTH, OPERATORS["rays"][:1], noise=0.05)
    assert torch.equal(first_guess(single, "tv")[0], first_guess(single, "cgls")[0])


def test_volumes_start_from_the_flattest_image_and_images_from_noise():
    turn = np.arange(8) / 8 * 2 * np.pi
    volume = simulate(torch.rand(6, 6, 6), cone_beam(turn, (6, 6, 6), 8, 8, 1.7, 18., 9.), noise=0.05)
    def start(scan, net, **options): return reconstruct(scan, net, iterations=2, progress=False, **options).settings["start"]
    assert start(volume, UNet(2, 4, dims=3)) == "tv" and start(volume, UNet(2, 4, dims=3), start="noise") == "noise"
    assert start(volume, UNet(2, 4, dims=3), educated=True) == start(simulate(TRUTH, OPERATORS["rays"], noise=0.05), UNet(2, 4)) == "noise"

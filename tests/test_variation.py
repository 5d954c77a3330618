"Total variation: the flattest image is a minimum, knows no units, and takes counts and volumes; the range follows it."
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dip_uq.data import simulate, walnut
from dip_uq.operators import as_operator, blur, downsample, mask
from dip_uq.networks import UNet
from dip_uq.pipeline import solve_image
from dip_uq.rays import fan_beam
from dip_uq.variation import chosen_weights, flattest, image_range, linear, psnr, total_variation, tv_reconstruction

A = fan_beam(np.linspace(0, 2 * np.pi, 18, endpoint=False), (24, 24), 30, 1.2, source_origin=72, origin_detector=36)
SCAN = simulate(walnut(24, 1), A, noise=0.05, seed=1)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), weight=st.floats(0.1, 3), lowest=st.sampled_from([0.0, -np.inf, 0.1]))
@example(seed=249, weight=0.125, lowest=-np.inf)  # where steps that are rebalanced for ever go round in circles
def test_nothing_near_the_flattest_image_is_better(seed, weight, lowest):
    "The function is convex: what no small step lowers is the minimum. Steps along single pixels, regions and random images."
    rng = np.random.default_rng(seed)
    matrix, y = torch.from_numpy(rng.normal(size=(12, 30))), torch.from_numpy(rng.normal(size=12))
    def value(x): return float((matrix @ x.flatten() - y).square().sum() / 2 + weight * total_variation(x))
    *_, x = flattest(as_operator(matrix, domain_shape=(5, 6)), y, [10 * weight, 3 * weight, weight], lowest, steps=2000)
    assert x.min() >= lowest
    steps = [*torch.eye(30, dtype=torch.float64).view(30, 5, 6), *torch.from_numpy(rng.normal(size=(10, 5, 6))),
             *(torch.from_numpy(rng.random((10, 5, 6)) < 0.5)).double()]
    for step in steps:
        for size in (1e-3, -1e-3, 0.1, -0.1): assert value((x + size * step).clamp(min=lowest)) > (1 - 1e-6) * value(x)


@pytest.mark.parametrize("factor", [2.0**-60, 2.0**40])
def test_units_do_not_matter(factor):
    "Powers of two do not even change the rounding."
    scaled = replace(SCAN, measurement=factor * SCAN.measurement, noise_std=factor * SCAN.noise_std)
    (image, weight), (other, its_weight) = map(tv_reconstruction, (SCAN, scaled))
    assert torch.equal(other, factor * image) and its_weight == factor * weight


def test_noise_that_differs_from_reading_to_reading():
    "Half of the bins ten times as noisy: with their noise told, the image is better than with one level for all."
    noise = torch.where(torch.arange(30) % 2 == 0, 0.02, 0.5).expand(18, 30) * SCAN.measurement.mean()
    y = A(SCAN.truth) + noise * torch.randn(18, 30, generator=torch.Generator().manual_seed(0))
    told = tv_reconstruction(replace(SCAN, measurement=y, noise_std=noise))[0]
    alike = tv_reconstruction(replace(SCAN, measurement=y, noise_std=None))[0]
    assert psnr(told, SCAN.truth) > psnr(alike, SCAN.truth) + 3


def test_missing_readings_have_no_part():
    valid = torch.rand(18, 30, generator=torch.Generator().manual_seed(0)) < 0.9
    one, other = (replace(SCAN, measurement=SCAN.measurement.where(valid, wrong), valid=valid) for wrong in (0.0, 1e3))
    assert all(torch.equal(a, b) for a, b in zip(tv_reconstruction(one)[:1], tv_reconstruction(other)[:1]))


def test_volumes():
    ball = torch.zeros(6, 8, 8)
    ball[2:4, 2:6, 2:6] = 1
    seen = torch.rand(6, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.7
    image, _ = tv_reconstruction(simulate(ball, mask(seen), noise=0.05, seed=0))
    assert psnr(image, ball) > 20  # 7 dB where the missing voxels are 0


def test_wires_are_as_bright_as_they_are():
    "Five pixels of 576 four times as bright as all else: with the range of a rough image the network could not write them."
    image = torch.zeros(24, 24)
    image[6:18, 6:18], image[8, 8], image[10, 14:16], image[15, 9:11] = 0.25, 1, 1, 1
    scan = simulate(image, A, noise=0.01, seed=0)
    lowest, span, _ = image_range(scan.apart())
    assert lowest == 0 and span == pytest.approx(1, abs=0.2)
    found = solve_image(scan, UNet(3, 8), progress=False)
    assert found.image.max() > 0.8 and psnr(found.image, image) > 30


def test_weights_by_the_errors_of_all():
    "Of sixteen weights, each by itself: the best predicts best, and the other one is the largest within a standard error of it."
    for seed in range(3):
        part = linear(simulate(walnut(24, seed), A, noise=0.1, seed=seed)).apart()
        fitted, rest, weights = part.training, part.validation, chosen_weights(part)
        path = [0.3 * float(fitted.operator.T(fitted.measurement).abs().max()) / 2**k for k in range(16)]
        images = flattest(fitted.operator, fitted.measurement, path)
        errors = np.array([(rest.operator(x) - rest.measurement).square().mean(1).double().numpy() for x in images]) # (16, projections)
        best = errors.mean(1).argmin()
        excess = errors - errors[best]
        as_good = excess.mean(1) <= excess.std(1) / errors.shape[1]**0.5
        assert weights == pytest.approx((path[as_good.argmax()], path[best]))


def test_one_projection_has_no_flattest_image():
    with pytest.raises(ValueError, match="1 projection, but 2"): tv_reconstruction(simulate(SCAN.truth, A[[0]], noise=0.05))


@pytest.mark.parametrize("name", ["downsample", "blur", "mask"])
@pytest.mark.parametrize("noise", [0.02, 0.2])
def test_photographs_are_as_bright_as_they_are(name, noise):
    "Lines that are held out of a coarse photograph favour an image that is too flat: 0.59 for 1 before."
    operator = dict(downsample=downsample((48, 48), 2), blur=blur((48, 48), 1.5),
                    mask=mask(torch.rand(48, 48, generator=torch.Generator().manual_seed(0)) < 0.4))[name]
    for seed in (1, 2):
        lowest, span, _ = image_range(simulate(walnut(48, seed), operator, noise=noise, seed=0))
        assert lowest == 0 and 0.8 < span < 1.4


def test_operators_with_parameters_leave_no_graph():
    "Of a user's module, say, whose parameters want gradients."
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.linspace(0.5, 1.5, 64).view(1, 8, 8))
        def A(self, x): return self.w * x
        def A_adjoint(self, y): return self.w * y
    scan = simulate(torch.rand(8, 8, generator=torch.Generator().manual_seed(0)), as_operator(Scaled(), (8, 8)), noise=0.05)
    image, _ = tv_reconstruction(scan)
    assert not image.requires_grad and psnr(image, scan.truth) > 15

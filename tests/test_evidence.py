"The TV prior over wide ranges of its inputs, and the evidence where matrices are nearly singular."
import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.integrate import quad
from scipy.stats import norm

from dip_uq.covariance import Covariance, Model, require_dense
from dip_uq.data import simulate, walnut
from dip_uq.dip import reconstruct
from dip_uq.evidence import (OBJECTIVES, conditional_nll, fit_evidence, fitted_noise, joint_nll, log_parameters, maximise,
                             value_and_gradient)
from dip_uq.linearization import FREE, Linearization
from dip_uq.networks import UNet
from dip_uq.posterior import Posterior
from dip_uq.priors import TVPrior, folded_excess
from dip_uq.rays import fan_beam


@settings(max_examples=100, deadline=None)
@given(st.floats(-1e3, 1e3), st.floats(-6, 3))
def test_mean_of_a_folded_normal(mean, log_std):
    "E|m + sε| − |m| = 2 ∫ (sx − |m|) φ(x) dx over x > |m|/s; what is below 10⁻¹³ s may be lost in rounding."
    m, s = abs(mean), 10.0**log_std
    expected, error = quad(lambda x: 2 * (s * x - m) * norm.pdf(x), m / s, m / s + 12, epsabs=1e-14 * s, epsrel=1e-10)
    found = float(folded_excess(*torch.tensor([mean, s], dtype=torch.float64)))
    assert abs(found - expected) < 1e-9 * expected + 1e-13 * s + error


unit = st.floats(0, 1, width=32)


@settings(max_examples=60, deadline=None)
@given(arrays(float, 12, elements=st.floats(-1, 1, width=32)), arrays(float, (3, 12), elements=unit), st.floats(-9, 3),
       st.floats(-1, 1.5))
def test_kappa_and_its_slope(mean, q, log_variance, log_length):
    "κ by Gauss–Hermite sums over each difference, ∂κ/∂ℓ by autograd of κ; q of any size, zeros included."
    q[0] += 1e-3  # the distance 0: a sum of squares, without which the others cannot be
    r = torch.tensor([0.0, 1.0, math.sqrt(2)], dtype=torch.float64)
    prior = TVPrior(torch.tensor(mean), {"all": (r, torch.tensor(q))}, 0.5, float(abs(mean).sum()) / 0.5)
    variance, length = (torch.tensor([10.0**x], dtype=torch.float64).requires_grad_() for x in (log_variance, log_length))
    s = torch.sqrt((variance.detach() * torch.exp(-r / length.detach())) @ torch.tensor(q)).numpy()
    grid = np.linspace(-9, 9, 36001)
    each = [np.trapezoid(abs(m + b * grid) * norm.pdf(grid), grid) for m, b in zip(mean, s)]
    kappa = prior.kappa(variance, length)
    assert abs(kappa.item() - sum(each) / 0.5) < 1e-6 * (1 + kappa.item())  # steps of 5e-4 at the kink
    by_autograd, = torch.autograd.grad(kappa.sum(), length)
    slope = prior.slope(variance, length)
    assert torch.allclose(slope, by_autograd, rtol=1e-6, atol=1e-12 * float(s.max()))


class Toy:
    "Six rays, two blocks with three Grams in all, the second of which is no covariance by itself."
    training, blocks = 3, {"a": ["a"], "b": ["b"]}

    def __init__(self, seed):
        draw = torch.Generator().manual_seed(seed)
        A, B, C, self.residual = (torch.randn(*shape, generator=draw, dtype=torch.float64)
                                  for shape in ((6, 9), (6, 6), (6, 9), (6,)))
        self.grams = {"a": (torch.arange(2.0).double(), torch.stack([A @ A.T, 0.1 * (B + B.T)])),
                      "b": (torch.zeros(1).double(), (C @ C.T)[None])}

    weights = Model.weights

    @property
    def left(self): return float(self.residual[:self.training].square().mean())

    def covariance(self, *hyperparameters): return Covariance(self, *hyperparameters)


@pytest.mark.parametrize("t", [0, 3])
def test_derivatives_of_the_densities(t):
    "In variances, lengths and noise, against finite differences; a second derivative is refused."
    toy = Toy(t)
    def nll(variance, length, noise):
        K = toy.covariance(variance, length, noise)
        return joint_nll(K, toy.residual) if t == 0 else conditional_nll(K, toy.residual, t)
    h = [torch.tensor(v, dtype=torch.float64).requires_grad_() for v in ([1.2, 0.3], [0.4, 2.0], 0.8)]
    assert torch.autograd.gradcheck(nll, h)
    with pytest.raises(RuntimeError, match="finite differences of its slopes"):
        torch.autograd.grad(nll(*h), h[0], create_graph=True)


def test_derivatives_of_what_held_out_rays_confirm():
    "α depends on the hyperparameters, and its slope is part of the evidence's; where noise may be all, it is zero."
    toy = Toy(4)
    noise = torch.tensor(0.8, dtype=torch.float64)
    def confirmed(*h): return toy.covariance(*h, noise).confirmed
    def nll(*h):
        K = toy.covariance(*h, noise)
        return conditional_nll(K, K.residual, 3)
    h = [torch.tensor(v, dtype=torch.float64).requires_grad_() for v in ([1.2, 0.3], [0.4, 2.0])]
    first = 40 * toy.residual[:3]
    toy.residual = torch.cat([first, 0.6 * toy.covariance(*h, noise).predicted(first).detach()])
    assert 0.05 < confirmed(*h) < 0.95 and torch.autograd.gradcheck(confirmed, h) and torch.autograd.gradcheck(nll, h)
    assert toy.covariance(*h, float(first.square().mean()) * torch.ones_like(noise)).confirmed == 0
    K = toy.covariance(*h, noise)
    K.residual.sum().backward()
    gone = weakref.ref(K)
    del K
    assert gone() is None  # a graph that K held would hold K, where no collector looks


@pytest.fixture(scope="module")
def lin():
    A = fan_beam(np.linspace(0, 2 * np.pi, 8, endpoint=False), (16, 16), 16, 1.5, source_origin=48, origin_detector=24)
    scan = simulate(walnut(16), A, noise=0.05).hold_out(2)
    return Linearization(reconstruct(scan, UNet(2, 4, 2), iterations=150, stop="heldout", progress=False))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("log_length", [math.log(1e-3), math.log(1e4)])
@pytest.mark.parametrize("noise", [1e-3, 1e3])
def test_extreme_hyperparameters_are_finite(lin, objective, log_length, noise):
    "Lengths and noise levels far outside the box: taps independent or all equal, noise next to nothing or all there is."
    model = Model.build(lin, shared=False)
    p, b = log_parameters(model, None)[0], len(model.blocks)
    p[b:2 * b], p[-1] = log_length, math.log((noise * lin.recon.scan.noise_std)**2)
    value, slope = value_and_gradient(p, model, None, OBJECTIVES[objective](model))
    assert math.isfinite(value) and np.isfinite(slope).all()


@pytest.mark.parametrize("objective", ["conditional", "joint"])
def test_blocks_that_move_nothing_change_nothing(lin, objective):
    "A block whose Grams are all zero has no slope, and stays finite somewhere in its box."
    whole = Model.build(lin, shared=False)
    first, *rest = whole.blocks
    silent = replace(whole, grams=whole.grams | {first: (whole.grams[first][0], 0 * whole.grams[first][1])})
    found = maximise(silent, objective, lin.recon.scan.noise_std)
    p = np.log([*found.prior.variance.values(), *found.prior.length.values()])
    nll, b = OBJECTIVES[objective](silent), len(whole.blocks)
    _, slope = value_and_gradient(p, silent, lin.recon.scan.noise_std, nll)
    assert abs(slope[0]) < 1e-10 and abs(slope[b]) < 1e-10
    assert all(math.isfinite(v) for v in found.prior.variance.values())


def test_unknown_noise_is_what_the_fitted_rays_leave(lin):
    scan = replace(lin.recon.scan, noise_std=None)
    fitted = [i for i in range(8) if i not in scan.held_out]
    left = (scan.operator(lin.recon.image) - scan.measurement)[fitted]
    found = fit_evidence(Linearization(replace(lin.recon, scan=scan)), progress=False)
    assert found.noise_std == pytest.approx(float(left.square().mean().sqrt()), rel=1e-6) == fitted_noise(lin)
    joint = fit_evidence(Linearization(replace(lin.recon, scan=scan)), "joint", progress=False)
    assert joint.noise_std != pytest.approx(found.noise_std, rel=1e-3)  # it hears the fitted rays, so it may choose


def test_rays_that_miss_nothing_leave_a_little_to_free_pixels(lin):
    """Held-out residuals of zero: any error of a pixel lowers the evidence, yet no variance is zero.

    log evidence + 0.3 log τ is stationary in τ; so with a density ∝ τ^0.3 the log evidence, a parabola in τ at its
    maximum in zero, has fallen by 0.15 where the estimate is (Chung et al. 2013, section 3: ∝ τ, by 1/2).
    """
    model, noise = Model.build(Linearization(lin.recon, free_pixels=True)), lin.recon.scan.noise_std
    silent = replace(model, residual=1e-3 * model.residual)
    found = maximise(silent, "conditional", noise)
    nll = OBJECTIVES["conditional"](silent)
    def log_evidence(log_tau):
        p = np.log([*found.prior.variance.values(), *found.prior.length.values()])
        p[1] = 2 * log_tau
        return -value_and_gradient(p, silent, noise, nll)[0]
    log_tau = math.log(found.prior.variance[FREE]) / 2
    assert log_evidence(log_tau) == pytest.approx(found.value, abs=1e-8)
    slope = (log_evidence(log_tau + 1e-3) - log_evidence(log_tau - 1e-3)) / 2e-3
    assert slope + 0.3 == pytest.approx(0, abs=0.02)
    assert 0.12 < log_evidence(log_tau - 6) - found.value < 0.18


def test_projections_that_are_measured_twice(lin):
    "K_yy of duplicated rays is singular without noise; the evidence must be that of dense matrices all the same."
    scan, twice = lin.recon.scan, list(range(8)) * 2
    held = [i for i, j in enumerate(twice) if j in scan.held_out]
    double = replace(scan, operator=scan.operator[twice], measurement=scan.measurement[twice], held_out=held)
    again = Linearization(replace(lin.recon, scan=double))
    found = fit_evidence(again, "joint", progress=False)
    weights = torch.cat([m.weight.detach().flatten() for m in again.convs.values()])
    r = (found.model.residual + (found.model.rows @ weights).double())[:found.model.training]
    rows = found.model.rows[:len(r)]
    K = (found.prior.apply(again, rows) @ rows.T).double() + scan.noise_std**2 * torch.eye(len(r))
    K = (K + K.T) / 2  # rows are float32
    expected = float(torch.distributions.MultivariateNormal(torch.zeros_like(r), K).log_prob(r))
    assert abs(found.value - expected) < 1e-3 * abs(expected)
    assert torch.isfinite(Posterior(found).std()).all()


def test_what_does_not_fit_is_refused_before_rows_are_computed(lin, monkeypatch):
    "The prediction counts rows, seven Grams (six of the network, one of free pixels), and what comes and goes."
    import dip_uq.operators as operators
    n, weights, widest = lin.recon.scan.measurement.numel(), lin.weights, max(lin.sizes)
    needed = 4 * n * weights + 8 * n * (7 * n + max(widest + 2 * n, 3 * n))
    def with_memory(count): monkeypatch.setattr(operators.psutil, "virtual_memory",
                                                lambda: type("Memory", (), dict(available=count)))
    monkeypatch.setattr(Linearization, "rows", lambda *args, **options: pytest.fail("rows of AJ"))
    with_memory(needed - 1)
    with pytest.raises(ValueError, match=f"the covariance of {n} rays and {weights} weights needs about"): Model.build(lin)
    with_memory(needed)
    require_dense(lin.convs, n)


def test_hyperparameters_go_by_the_name_of_their_block(lin):
    "A prior whose blocks stand in another order is the same; one of another family is refused, and so are too few numbers."
    found = fit_evidence(Linearization(lin.recon, free_pixels=True), progress=False)
    prior = found.prior
    turned = replace(prior, variance=dict(reversed(prior.variance.items())), length=dict(reversed(prior.length.items())))
    assert torch.equal(replace(found, prior=turned).covariance.matrix, found.covariance.matrix)
    with pytest.raises(ValueError, match="prior.family: 'rbf'"): replace(found, prior=replace(prior, family="rbf")).covariance
    one = torch.ones(1, dtype=torch.float64)
    with pytest.raises(ValueError, match="1 and 1 values, but the model has the blocks all, free pixels"):
        found.model.covariance(one, one, 0.1)


def test_free_pixels_that_no_ray_meets(lin):
    "A detector of four bins looks past the corners, and only they may move."
    A = fan_beam(np.linspace(0, 2 * np.pi, 8, endpoint=False), (16, 16), 4, 1.5, source_origin=48, origin_detector=24)
    recon = replace(lin.recon, scan=simulate(walnut(16), A, noise=0.05).hold_out(2))
    corners = (A.T(torch.ones(8, 4)) == 0).float()
    assert corners.any()
    with pytest.raises(ValueError, match="no ray meets a pixel that may move"):
        fit_evidence(Linearization(recon, free_pixels=corners), progress=False)

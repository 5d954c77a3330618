"On a CUDA device all is as on the CPU, up to rounding. DIP_UQ_TEST_DEVICE=cpu rehearses these tests without one."
import os

import numpy as np
import pytest
import torch

import dip_uq.covariance as covariance
import dip_uq.dip as dip
from dip_uq.covariance import Model
from dip_uq.data import simulate, walnut
from dip_uq.dip import Reconstruction, reconstruct
from dip_uq.evidence import conditional_nll
from dip_uq.fbp import fbp
from dip_uq.linearization import FREE, Linearization
from dip_uq.networks import UNet
from dip_uq.operators import adjoint_error
from dip_uq.pipeline import solve
from dip_uq.posterior import Posterior
from dip_uq.rays import fan_beam

DEVICE = os.environ.get("DIP_UQ_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device")
SIZE = 24


@pytest.fixture(scope="module")
def scan():
    A = fan_beam(np.linspace(0, 2 * np.pi, 18, endpoint=False), (SIZE, SIZE), 40, 1.0, source_origin=72, origin_detector=36)
    return simulate(walnut(SIZE, 1), A, noise=0.05, seed=0)


@pytest.fixture(scope="module")
def fits(scan, tmp_path_factory):
    "One fit, linearised on either device."
    path = tmp_path_factory.mktemp("fit") / "fit.safetensors"
    reconstruct(scan, UNet(3, 8), iterations=200, stop="heldout", progress=False).save(path)
    return [Linearization(Reconstruction.load(path, scan.to(d)), free_pixels=True) for d in ("cpu", DEVICE)]


@pytest.fixture(scope="module", params=[2000, 400], ids=["all rays", "combinations"])
def models(fits, request):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("FEW", "MOST"): patch.setattr(covariance, name, request.param)
        return [Model.build(lin) for lin in fits]


def at(model):
    "K at hyperparameters that are neither found nor special."
    ones = torch.ones(len(model.blocks), dtype=torch.float64)
    return model.covariance(1e-3 * ones, 2 * ones, 1.5 * model.left)


def off(theirs, ours):
    "How far the devices differ, over the largest value."
    return float((theirs.cpu().double() - ours.double()).abs().max() / ours.double().abs().max())


def test_rays_and_backprojections(scan):
    there = scan.to(DEVICE)
    assert there.measurement.device.type == torch.device(DEVICE).type
    x = torch.rand(SIZE, SIZE)
    assert off(there.operator(x.to(DEVICE)), scan.operator(x)) < 1e-6
    assert off(there.operator.T(there.measurement), scan.operator.T(scan.measurement)) < 1e-6
    assert off(fbp(there.operator, there.measurement), fbp(scan.operator, scan.measurement)) < 1e-5
    assert adjoint_error(there.operator, torch.float32) < 1e-5


def test_products_with_the_jacobian(fits, scan):
    "Convolutions add up 9 × 12 products in another order: 1e-6 of the largest value, and not more than ten times it."
    here, there = fits
    v = torch.randn(5, here.parameters, generator=torch.Generator().manual_seed(0))
    u = torch.randn(5, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    assert off(there.jvp(v.to(DEVICE)), here.jvp(v)) < 1e-5
    assert off(there.vjp(u.to(DEVICE)), here.vjp(u)) < 1e-5
    assert off(there.rows(there.scan.operator), here.rows(here.scan.operator)) < 1e-5


def test_evidence_and_its_slopes(models):
    "Combinations are of the same spaces, though not the same vectors."
    found = []
    for model in models:
        variance = torch.full((len(model.blocks),), 1e-3, dtype=torch.float64, requires_grad=True)
        K = model.covariance(variance, 2 * torch.ones_like(variance), 1.5 * model.left)
        value = conditional_nll(K, K.residual, model.training)
        value.backward()
        found.append((float(value.detach()), variance.grad, len(model.residual)))
    (value, slopes, kept), (its_value, its_slopes, its_kept) = found
    assert abs(its_value - value) < 0.05 + abs(its_kept - kept)  # nats of a few hundred
    assert off(its_slopes, slopes) < 0.01


def test_the_mean_and_pixels_bars(fits, models):
    here, there = (at(model) for model in models)
    some = torch.eye(SIZE * SIZE)[::97].view(-1, SIZE, SIZE)
    def bars(K, lin): return torch.sub(*(C.diagonal() for C in K.explained(lin.vjp(some.to(lin.recon.z)), 1.0))).sqrt()
    ours = bars(here, fits[0])
    assert off(bars(there, fits[1]), ours) < 1e-3
    mean = [lin.jvp(K.weights_given(K.residual[:, None]))[0].flatten()[::97].cpu() for K, lin in zip((here, there), fits)]
    assert ((mean[1] - mean[0]) / ours.cpu()).abs().max() < 0.01


def test_the_grams_of_free_pixels_are_equal(models):
    here, there = (model.grams[FREE][1][0].diagonal().sort()[0].sum() for model in models)
    assert float(there) == pytest.approx(float(here), rel=1e-2)


def test_solve_reports_saves_and_is_read_on_the_cpu(scan, tmp_path):
    "Fits drift apart, step by step; what was found is the same file on either device."
    there, here = (solve(scan.to(d), UNet(3, 8), iterations=200, samples=16, progress=False) for d in (DEVICE, "cpu"))
    assert abs(there.summary()["psnr"] - here.summary()["psnr"]) < 1
    there.save(tmp_path)
    again = Posterior.load(tmp_path / "posterior.safetensors", scan, progress=False)
    assert torch.equal(again.lin.recon.image, there.recon.image.cpu())
    assert ((again.mean - there.image.cpu()) / there.std.cpu()).abs().max() < 0.02
    assert off(there.std, again.sampled_std(16)) < 0.01


def test_a_fit_goes_on_from_its_state(scan, tmp_path):
    path, there = tmp_path / "run.safetensors", scan.to(DEVICE)
    def stop(self, *_):
        if self.iteration == 30: raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dip, "STATE_SECONDS", 0.0), patch.setattr(dip, "SHARE", 1e9)
        step = dip.Run.step
        patch.setattr(dip.Run, "step", lambda self, loss: (stop(self), step(self, loss)))
        reconstruct(there, UNet(3, 8), iterations=40, stop="fixed", progress=False, resume=path)
    assert path.exists()
    resumed, whole = (reconstruct(there, UNet(3, 8), iterations=40, stop="fixed", progress=False, resume=p) for p in (path, None))
    assert len(resumed.history["loss"]) == 40 and off(resumed.image, whole.image.cpu()) < 0.01

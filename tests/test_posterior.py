"Evidence, posterior and held-out check against dense matrices in float64, for every objective and kind of prior."
import copy
import pickle
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from unittest.mock import MagicMock, patch

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

from dip_uq.calibration import check_held_out
from dip_uq.data import Scan, simulate
from dip_uq.dip import reconstruct
from dip_uq.evidence import fit_evidence, maximise
from dip_uq.linearization import FREE, Linearization, likely_errors
from dip_uq.networks import UNet
from dip_uq.operators import as_operator, blur, mask
from dip_uq.pipeline import solve
from dip_uq.posterior import Posterior
from dip_uq.rays import fan_beam

ANGLES, BINS = 8, 20


def fan(angles):
    return fan_beam(angles, (16, 16), BINS, 1.0, source_origin=40, origin_detector=40)


def in_float64(recon):
    "The same reconstruction in double precision: its scan keeps the measurement, everything computed from it is exact."
    net = copy.deepcopy(recon.net).double()
    with torch.no_grad(): image = recon.scale * net(recon.z.double())[0, 0]
    return replace(recon, net=net, z=recon.z.double(), image=image)


@pytest.fixture(scope="module")
def recon():
    truth = torch.zeros(16, 16)
    truth[4:12, 5:11], truth[6:9, 7:9] = 1, 0.5
    scan = simulate(truth, fan(np.linspace(0, 2 * np.pi, ANGLES, endpoint=False)), noise=0.03).hold_out(2)
    scan = replace(scan, noise_std=None)  # so that it is fitted
    return in_float64(reconstruct(scan, UNet(3, 6, 2), iterations=150, stop="heldout", progress=False))


def conv_layers(net):
    return {name: m for name, m in net.named_modules() if isinstance(m, torch.nn.Conv2d)}


def dense_prior(net, prior):
    "Σ_θ, filter by filter from its definition."
    filters = []
    for name, m in conv_layers(net).items():
        block, = (b for b, names in prior.blocks.items() if name in names)
        taps = np.array([(i, j) for i in range(m.kernel_size[0]) for j in range(m.kernel_size[1])])
        distance = np.linalg.norm(taps[:, None] - taps, axis=-1)
        kernel = torch.tensor(prior.variance[block] * np.exp(-distance / prior.length[block]))
        filters += [kernel] * (m.weight.shape[0] * m.weight.shape[1])
    return torch.block_diag(*filters)


class Dense:
    "All that the library computes by structure, from the matrices J, A and Σ_θ."
    def __init__(self, recon, evidence):
        scan, weights = recon.scan, [m.weight for m in conv_layers(recon.net).values()]
        out = recon.scale * recon.net(recon.z)[0, 0].flatten()
        rows = torch.autograd.grad(out, weights, torch.eye(len(out), dtype=torch.float64), is_grads_batched=True)
        J = torch.cat([g.flatten(1) for g in rows], 1)
        order = [i for i in range(ANGLES) if i not in scan.held_out] + list(scan.held_out)
        A = torch.tensor(scan.operator.matrix.toarray(), dtype=torch.float64).view(ANGLES, BINS, -1)
        A = A[order].flatten(0, 1)
        self.fitted = BINS * (ANGLES - len(scan.held_out))
        self.residual = scan.measurement[order].double().flatten() - A @ recon.image.flatten()
        self.shifted = self.residual + A @ J @ torch.cat([w.detach().flatten() for w in weights])  # y − A (x̂ − Jθ*)
        K_xx = J @ dense_prior(recon.net, evidence.prior) @ J.T
        self.K_xy = K_xx @ A.T
        self.noise = evidence.noise_std
        self.K_yy = A @ self.K_xy + self.noise**2 * torch.eye(len(A), dtype=torch.float64)
        self.covariance = K_xx - self.K_xy @ torch.linalg.solve(self.K_yy, self.K_xy.T)
        self.confirmed = self.part()
        self.held = torch.cat([self.confirmed * self.residual[:self.fitted], self.residual[self.fitted:]])  # (α r_t, r_h)

    def part(self):
        "α of what the fit leaves of its own rays, by generalised least squares."
        t, K, r = self.fitted, self.K_yy, self.residual
        if r[:t].square().mean() <= 1.0001 * self.noise**2: return 0.0
        back = torch.linalg.solve(K[:t, :t], torch.cat([r[:t, None], K[:t, t:]], 1))
        p, S = K[t:, :t] @ back[:, 0], K[t:, t:] - K[t:, :t] @ back[:, 1:]
        information = p @ torch.linalg.solve(S, p)
        best = float(p @ torch.linalg.solve(S, r[t:]) / information)
        return min(best**3 / (best**2 + 9 / float(information)), 1.0) if best > 0 else 0.0

    def log_evidence(self, objective):
        def density(r, K): return float(MultivariateNormal(torch.zeros_like(r), K).log_prob(r))
        t = self.fitted
        if objective == "joint": return density(self.shifted[:t], self.K_yy[:t, :t])
        return density(self.held, self.K_yy) - density(self.held[:t], self.K_yy[:t, :t])


@pytest.fixture(scope="module", params=[(o, s) for o in ("conditional", "joint") for s in (True, False)],
                ids=lambda p: f"{p[0]}-{'shared' if p[1] else 'blocks'}")
def case(request, recon):
    objective, shared = request.param
    evidence = fit_evidence(Linearization(recon), objective, shared, progress=False)
    return Posterior(evidence), Dense(recon, evidence), objective


def close(a, b, relative=1e-5):  # rays are float32 in the operator, all else is float64
    assert float((a - b).abs().max()) < relative * float(b.abs().max())


def test_ray_covariance(case):
    posterior, dense, _ = case
    close(posterior.evidence.covariance.matrix, dense.K_yy)


def test_log_evidence(case):
    posterior, dense, objective = case
    assert abs(posterior.evidence.value - dense.log_evidence(objective)) < 1e-3


def test_variances_below_rounding_are_told(recon):
    "A prior so wide that what the rays leave of it is less than its rounding."
    posterior = Posterior(fit_evidence(Linearization(recon), progress=False))
    covariance = posterior.evidence.covariance
    prior, explained = covariance.explained(posterior.lin.rows(recon.scan.operator[[0]], free_pixels=True), posterior.part)
    more = prior * (1 + 1e-7)
    with patch.object(type(covariance), "explained", lambda *args: (prior, more)), pytest.warns(UserWarning, match="lost in rounding"):
        _, found = posterior.predict(recon.scan.operator[[0]])
    assert (found.diagonal() == 0).all()

def test_mean(case):
    posterior, dense, _ = case
    moved = dense.K_xy @ torch.linalg.solve(dense.K_yy, dense.held)
    close(posterior.mean.flatten() - posterior.lin.recon.image.flatten(), moved)
    assert (dense.confirmed > 0.1) == (posterior.evidence.objective == "joint")  # the joint evidence finds less noise than is left


def test_std(case):
    posterior, dense, _ = case
    close(posterior.std().flatten(), dense.covariance.diagonal().sqrt())
    close(posterior.std(chunk=7), posterior.std(chunk=16), 1e-10)


def test_prediction_of_new_rays(case):
    posterior, dense, _ = case
    new = fan([0.3, 2.0])
    N = torch.tensor(new.matrix.toarray(), dtype=torch.float64)
    mean, covariance = posterior.predict(new)
    close(mean.flatten(), N @ posterior.mean.flatten())
    close(covariance, N @ dense.covariance @ N.T)


def test_samples(case):
    posterior, dense, _ = case
    n = 500
    d, C = torch.cat([x.flatten(1) for x in posterior.deviations(n, seed=1)]), dense.covariance
    error = ((C.diagonal().outer(C.diagonal()) + C**2) / n).sqrt()  # Monte-Carlo standard error of each entry
    assert 0.6 < float(((d.T @ d / n - C) / error).square().mean().sqrt()) < 1.5  # 1, but the entries are correlated
    off = (posterior.sampled_std(n) / posterior.std() - 1).square().mean().sqrt()
    assert 0.6 < float(off) * (2 * n)**0.5 < 1.5


def simulated(posterior, seed):
    "The evidence with residuals drawn from its own model: r_t = 0, and r_h given that."
    model, L = posterior.evidence.model, posterior.evidence.covariance.factor
    white = torch.randn(len(L), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    white[:model.training] = 0
    return replace(posterior.evidence, model=replace(model, residual=L @ white))


def test_scale_of_the_models_own_residuals(case):
    posterior = case[0]
    checks = [check_held_out(simulated(posterior, seed)) for seed in range(200)]
    L, noise = posterior.evidence.covariance.factor, posterior.evidence.noise_std**2
    L = L[posterior.model.training:, posterior.model.training:]
    P = L @ L.T - noise * torch.eye(len(L), dtype=torch.float64)
    error = 2**0.5 * float((L @ L.T).norm()) / float(P.trace())  # standard error of s² from one draw
    floor = noise * (2 / len(L))**0.5 * len(L) / float(P.trace())
    squares = np.array([c.scale**2 for c in checks])
    raw = np.array([float(simulated(posterior, s).model.residual[posterior.model.training:].square().mean()) - noise
                    for s in range(200)]) * len(L) / float(P.trace())  # s² before the floor: unbiased
    assert abs(raw.mean() - 1) < 4 * error / 200**0.5
    np.testing.assert_allclose(squares, np.maximum(raw, min(1, floor)), rtol=1e-9)
    z = np.array([c.z_std**2 for c in checks])
    R = L @ L.T / (L @ L.T).diagonal().sqrt().outer((L @ L.T).diagonal().sqrt())  # correlations of the rays
    assert abs(z.mean() - 1) < 4 * (2 * float(R.square().sum()))**0.5 / len(R) / 200**0.5


def test_the_conditional_fit_recovers_the_variance(recon):
    "40 draws from the model, known noise: log σ² has no bias beyond four standard errors of the mean."
    posterior = Posterior(fit_evidence(Linearization(recon), progress=False))
    true = posterior.evidence.prior.variance["all"]
    noise = posterior.evidence.noise_std
    found = [maximise(simulated(posterior, seed).model, "conditional", noise) for seed in range(40)]
    off = np.log([f.prior.variance["all"] / true for f in found])
    assert abs(np.median(off)) < 4 * 1.25 * off.std() / 40**0.5  # 1.25: a median varies more than a mean
    assert off.std() < 1.5


def test_without_held_out_projections(recon):
    scan = replace(recon.scan, held_out=())
    evidence = fit_evidence(Linearization(replace(recon, scan=scan)), "joint", progress=False)
    posterior = Posterior(evidence)
    assert torch.equal(posterior.mean, posterior.lin.recon.image)  # nothing was kept back that could move it
    with pytest.raises(ValueError, match="no projection was held out"): check_held_out(evidence)


def test_any_operator_will_do():
    "Nothing below `Scan` asks for rays: a random matrix with twelve 'projections' of ten numbers."
    matrix = torch.randn(120, 256, generator=torch.Generator().manual_seed(0)) / 16
    A = as_operator(matrix, domain_shape=(16, 16), range_shape=(12, 10))
    truth = torch.zeros(16, 16)
    truth[4:12, 5:11] = 1
    measured = A(truth) + 0.02 * torch.randn(12, 10, generator=torch.Generator().manual_seed(1))
    scan = Scan(measured, A, truth, 0.02).hold_out(3)
    recon = reconstruct(scan, UNet(2, 4), iterations=100, stop="heldout", progress=False)
    posterior = Posterior(fit_evidence(Linearization(recon), progress=False))
    assert posterior.std().isfinite().all() and (posterior.std() > 0).all()
    assert posterior.predict(A)[1].shape == (120, 120)


UNEQUAL = torch.rand(16, 16, generator=torch.Generator().manual_seed(0)).double()
UNEQUAL[:4] = 0


@pytest.mark.parametrize("free_pixels", [True, UNEQUAL], ids=["likely errors", "a map, zero in places"])
def test_free_pixels_against_dense_matrices(recon, free_pixels):
    "The conditional mean and covariance of the joint Gaussian of pixels and rays, the free pixels as σ² diag(w²)."
    evidence = fit_evidence(Linearization(recon, free_pixels=free_pixels), progress=False)
    prior, t, plain = evidence.prior, evidence.model.training, Linearization(recon)
    evidence = replace(evidence, prior=replace(prior, variance=prior.variance | {FREE: 0.01}))
    w = (likely_errors(recon.image, recon.lowest) if free_pixels is True else free_pixels).flatten()
    J = plain.vjp(torch.eye(256).double().view(-1, 16, 16))
    K = torch.block_diag(*(torch.kron(torch.eye(c.weight[..., 0, 0].numel()).double(), prior.kernel(plain, name))
                           for name, c in plain.convs.items()))
    S = J @ K @ J.T + 0.01 * recon.scale**2 * torch.diag(w**2)
    M = torch.from_numpy(evidence.model.operator.matrix.toarray()).double()
    r = torch.cat([torch.zeros(t).double(), evidence.model.residual[t:]])
    K_yy = M @ S @ M.T + evidence.noise_std**2 * torch.eye(len(M))
    gain = torch.linalg.solve(K_yy, M @ S).T
    close(evidence.covariance.matrix, K_yy)
    posterior = Posterior(evidence)
    middle, C = posterior.predict(mask(torch.ones(16, 16, dtype=torch.bool)))
    assert torch.allclose(C, S - gain @ M @ S, atol=1e-6)
    assert torch.allclose(middle.flatten(), recon.image.flatten() + gain @ r, atol=1e-6)
    assert torch.allclose(posterior.std().flatten(), C.diagonal().sqrt(), atol=1e-6)


class Chain(nn.Module):
    "A network whose forward pass goes through whatever children it has."
    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.LeakyReLU(), nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, z):
        for layer in self.children(): z = layer(z)
        return z


NETWORKS = {"sequential": lambda: nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.LeakyReLU(),
                                                nn.Conv2d(4, 1, 3, padding=1), nn.Sigmoid()), "children": Chain}


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_any_network_of_convolutions(recon, make):
    solution = solve(recon.scan, make(), iterations=30, progress=False)
    assert (solution.std > 0).all() and solution.summary()["prior"].keys() == {"all", FREE}


class Slope(nn.Module):
    "Its forward pass multiplies by a weight of its own."
    def __init__(self):
        super().__init__()
        self.conv, self.slope = nn.Conv2d(1, 1, 3, padding=1), nn.Parameter(torch.ones(1))

    def forward(self, z): return self.slope * self.conv(z)


def tied():
    net = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Tanh(), nn.Conv2d(1, 1, 3, padding=1))
    net[2].weight = net[0].weight
    return net


class Unused(Chain):
    "A convolution that only some inputs would meet."
    def __init__(self):
        super().__init__()
        self.spare = nn.Conv2d(1, 1, 1)

    def forward(self, z): return self.last(self.act(self.first(z)))


def in_place():
    net = Chain()
    net.compile()
    return net


REFUSED = {"'slope' is neither": Slope, "'1.weight' is neither": lambda: nn.Sequential(nn.Conv2d(1, 1, 1), nn.PReLU()),
           "are one tensor": tied, "it is compiled": lambda: torch.compile(Chain()), "net: it is compiled": in_place,
           "is used 0 times": Unused}


@pytest.mark.parametrize("message", REFUSED)
def test_networks_are_refused_before_the_fit(recon, message, monkeypatch):
    monkeypatch.setattr("dip_uq.pipeline.reconstruct_from", lambda *args, **options: pytest.fail("the fit has begun"))
    with pytest.raises(ValueError, match=message): solve(recon.scan, REFUSED[message](), progress=False)


def test_the_default_network_is_made_only_after_the_arguments_are_checked(recon, monkeypatch):
    "And leaves the random numbers of everybody else alone."
    with pytest.raises(ValueError, match="educated=True keeps the weights of net, but net is None"):
        solve(recon.scan, educated=True)
    line = as_operator(torch.eye(12), domain_shape=(12,), range_shape=(12,))
    with pytest.raises(ValueError, match=r"images have shape \(12,\)"): solve(Scan(torch.ones(12), line, noise_std=0.1))
    monkeypatch.setattr("dip_uq.pipeline.reconstruct_from", lambda *args, **options: pytest.fail("the fit has begun"))
    before = torch.get_rng_state()
    with pytest.raises(pytest.fail.Exception): solve(recon.scan, progress=False)
    assert torch.equal(torch.get_rng_state(), before)


def summary_of(solution): return solution.summary()["heldout_zstd"], solution.image, solution.posterior.sample(2)


@pytest.mark.parametrize("operator", ["rays", "blur"])
def test_results_travel_to_another_process(recon, operator):
    scan = recon.scan
    if operator == "blur":  # an operator that is no matrix
        A, truth = blur((12, 12), 1.0), torch.rand(12, 12, generator=torch.Generator().manual_seed(0))
        scan = Scan(A(truth), A, truth, 0.01).hold_out(2)
    solution = solve(scan, UNet(2, 4), iterations=30, progress=False)
    one_thread = dict(initializer=torch.set_num_threads, initargs=(1,))  # as here: the same rounding
    with ProcessPoolExecutor(1, get_context("forkserver"), **one_thread) as pool: found = pool.submit(summary_of, solution).result()
    for there, here in zip(found, summary_of(solution)): assert torch.equal(torch.as_tensor(there), torch.as_tensor(here))
    assert torch.equal(pickle.loads(pickle.dumps(solution.scan)).measurement, scan.measurement)


def test_a_posterior_of_another_operator(tmp_path):
    "Of the same shape: its mean would be wrong, and so would every bar."
    scan = simulate(torch.eye(8), blur((8, 8), 1)).hold_out(2)
    solution = solve(scan, UNet(2, 4), iterations=20, progress=False)
    solution.posterior.save(tmp_path / "posterior")
    assert torch.equal(Posterior.load(tmp_path / "posterior", scan, progress=False).mean, solution.posterior.mean)
    with pytest.raises(ValueError, match="was made with another operator of this shape: .* differ by 0"):
        Posterior.load(tmp_path / "posterior", replace(scan, operator=blur((8, 8), 1.1)), progress=False)


def test_bars_where_gradients_are_off():
    scan, net = simulate(torch.eye(8), blur((8, 8), 1)).hold_out(2), UNet(2, 4)
    usual = solve(scan, net, iterations=20, progress=False)
    for context in torch.no_grad, torch.inference_mode:
        with context(): found = solve(scan, net, iterations=20, progress=False)
        assert torch.equal(found.image, usual.image) and torch.equal(found.std, usual.std)


def test_std_against_laplace_torch():
    """The full generalised Gauss–Newton posterior of the same weights, by another library, with filters of independent taps.

    The network is not linear in its weights, so this compares two linearisations; what is left is rounding of float32.
    """
    stubs = {f"torchvision{part}": MagicMock() for part in ("", ".models", ".transforms")}
    with patch.dict(sys.modules, stubs): # laplace-torch requires torchvision but needs none of it here, and its binaries
        laplace = pytest.importorskip("laplace") # fit one build of torch only
    truth = torch.zeros(16, 16)
    truth[4:12, 5:11] = 1
    scan = simulate(truth, fan(np.linspace(0, 2 * np.pi, ANGLES, endpoint=False)), noise=0.05).hold_out(2)
    recon = reconstruct(scan, UNet(2, 4, 4), iterations=200, stop="heldout", progress=False)
    lin = Linearization(recon)
    assert lin.parameters == 776
    evidence = fit_evidence(lin, progress=False)
    variance, length = 0.02, 1e-3
    evidence = replace(evidence, prior=replace(evidence.prior, variance={"all": variance}, length={"all": length}))

    net = copy.deepcopy(recon.net)
    for p in net.parameters(): p.requires_grad_(p.ndim == 4)  # filters alone, as we do
    class Rays(nn.Module):
        def __init__(self, measure):
            super().__init__()
            self.net, self.measure = net, measure
        def forward(self, z): return self.measure(recon.scale * self.net(z)[:, 0])
    la = laplace.Laplace(Rays(lambda x: evidence.model.operator(x).flatten(1)), "regression", subset_of_weights="all",
                         hessian_structure="full", sigma_noise=evidence.noise_std, prior_precision=1 / variance)
    y = scan.measurement.flatten()[None]
    la.fit(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(recon.z, y)))
    J = lin.vjp(torch.eye(256).view(-1, 16, 16)) # the order of weights is that of the network's parameters
    expected = (J @ la.posterior_covariance @ J.T).diagonal().sqrt()
    off = float((Posterior(evidence).std().flatten() / expected - 1).abs().max())
    assert off < 2e-4  # 5e-5 where it was measured


def test_wrong_numbers_are_refused_by_name(case, tmp_path):
    posterior, _, _ = case
    with pytest.raises(TypeError, match="n must be a whole number, got 1.5"): posterior.sample(1.5)
    with pytest.raises(ValueError, match="chunk=0 is out of range: choose 1 or more"): posterior.std(chunk=0)
    posterior.save(tmp_path / "p")
    with pytest.raises(TypeError, match="scan is a NoneType; pass the Scan of the file"): Posterior.load(tmp_path / "p", None)

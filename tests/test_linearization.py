"""Checks of the linearised network and its prior too bulky for their notebooks: random convolutions and networks."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from scipy.ndimage import gaussian_filter
from torch.func import functional_call, jacrev

from dip_uq.linearization import (Linearization, class_grams, convolutions, exactly, likely_errors, patches, stencil_basis,
                                  tap_distances)
from dip_uq.networks import DeepDecoder, UNet
from dip_uq.operators import as_operator
from dip_uq.priors import FilterPrior, network_blocks, one_block


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_weights(net, seed=0):
    g = torch.Generator().manual_seed(seed)
    net = net.double().eval().requires_grad_(False)
    for p in net.parameters(): p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype) / max(1, p[0].numel())**.5)
    return net


def linearised(net, *shape, scale=1.7):
    "The network with random weights around a random input, and its Jacobian by torch.func."
    net, z = random_weights(net), numbers(1, 1, *shape, seed=1)
    recon = SimpleNamespace(net=net, z=z, scale=scale, lowest=-0.3, image=scale * net(z)[0, 0] - 0.3)
    weights = {f"{name}.weight": m.weight for name, m in convolutions(net).items()}
    dense = jacrev(lambda w: scale * functional_call(net, w, (z,))[0, 0])(weights)
    return Linearization(recon), torch.cat([j.flatten(len(shape)).flatten(0, -2) for j in dense.values()], 1)


def assert_close(a, b, relative=1e-11):  # sums of at most some thousand products in float64, with a wide margin
    assert a.shape == b.shape
    assert (a - b).abs().max() <= relative * b.abs().max()


@st.composite
def convolution(draw):
    n = draw(st.integers(2, 3))
    kernel, stride = (tuple(draw(st.lists(st.integers(1, top), min_size=n, max_size=n))) for top in (4, 3))
    padding = tuple(draw(st.integers(0, 3)) for _ in kernel)
    shape = [draw(st.integers(max(1, k - 2 * p), 7)) for k, p in zip(kernel, padding)]
    channels = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    conv = (nn.Conv2d, nn.Conv3d)[n - 2](*channels, kernel, stride, padding, bias=draw(st.booleans()))
    return conv.double().requires_grad_(False), numbers(1, channels[0], *shape)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(convolution())
def test_a_convolution_is_its_weights_times_the_patches(example):
    conv, a = example
    out, P = conv(a), patches(a, conv)
    product = (conv.weight.flatten(1) @ P).view(1, *out.shape[1:])
    if conv.bias is not None: product += conv.bias.view(-1, *[1] * (out.ndim - 2))
    assert P.shape == (conv.weight[0].numel(), out[0, 0].numel())
    assert (product - out).abs().max() < 1e-12  # values of order 1
    if out.ndim == 4: assert torch.equal(P, nn.functional.unfold(a, conv.kernel_size, 1, conv.padding, conv.stride)[0])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=2) | st.lists(st.integers(1, 3), min_size=3, max_size=3))
def test_the_stencil_basis_loses_nothing_and_splits_every_class(kernel):
    distances, index = tap_distances(kernel)
    places = torch.tensor(list(itertools.product(*map(range, kernel)))).double()
    assert_close(distances[index] + 1, torch.cdist(places, places) + 1)
    assert (distances.diff() > 0).all() and index.unique().tolist() == list(range(len(distances)))
    Q = stencil_basis(kernel)
    assert_close(Q.T @ Q, torch.eye(len(index)).double())
    linked = torch.stack([(Q.T @ (index == r).double() @ Q).abs() for r in range(len(distances))]).amax(0)
    assert ((linked < 1e-11) | (linked > 1e-7)).all()  # the threshold of 1e-9 separates rounding from numbers
    flips = 2**sum(k > 1 for k in kernel)  # parities do not mix: at most one block for each
    flipped = [Q.view(*kernel, -1).flip(d).flatten(0, -2) for d in range(len(kernel))]
    parities = torch.stack([(f * Q).sum(0).round() for f in flipped])
    mixed = (parities[:, :, None] != parities[:, None]).any(0)
    assert linked[mixed].numel() == 0 or linked[mixed].max() < 1e-11
    assert len(parities.T.unique(dim=0)) <= flips


NETS = {
    "unet": (lambda: UNet(2, 4, 2, sigmoid=False), (9, 7)),
    "no norm, no skip, sigmoid": (lambda: UNet(3, 3, 0, norm=False), (8, 11)),
    "deep decoder": (lambda: DeepDecoder(3, 4), (9, 7)),
    "volume unet": (lambda: UNet(2, 4, dims=3), (4, 5, 6)),
    "one scale": (lambda: UNet(1, 2, sigmoid=False), (5, 6)),
    "large and flat filters": (lambda: nn.Sequential(nn.Conv2d(1, 2, (1, 5), padding=(0, 2)), nn.Tanh(),
                                                     nn.Conv2d(2, 1, 5, padding=2, bias=False)), (6, 8)),
    "volume": (lambda: nn.Sequential(nn.Conv3d(1, 2, 3, 2, 1), nn.Softplus(), nn.Upsample(scale_factor=2),
                                     nn.Conv3d(2, 1, (1, 3, 2), padding=(0, 1, 0)), nn.ConstantPad1d((0, 1), 0.)),
               (4, 4, 6)),
    "batch norm in evaluation mode": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2),
                                                            nn.ReLU(inplace=True), nn.Conv2d(2, 1, 1)), (5, 5)),
}


@pytest.mark.parametrize("make, shape", NETS.values(), ids=NETS)
def test_products_rows_and_grams_against_the_dense_jacobian(make, shape):
    lin, J = linearised(make(), *shape)
    assert J.shape == (math.prod(shape), lin.parameters)
    u, v = numbers(3, *shape, seed=2), numbers(3, lin.parameters, seed=3)
    assert_close(lin.vjp(u), u.flatten(1) @ J)
    assert_close(lin.vjp(u[:2]), u[:2].flatten(1) @ J)  # another size of batch
    assert_close(lin.jvp(v), (v @ J.T).view(-1, *shape))
    A = numbers(11, math.prod(shape), seed=4)
    rows = lin.rows(as_operator(A, shape), chunk=4)  # 11 = 4 + 4 + 3
    assert_close(rows, A @ J)
    for blocks in one_block(lin), network_blocks(lin):
        variance = {b: 0.3 + i for i, b in enumerate(blocks)}
        prior = FilterPrior(blocks, variance, {b: 3 / (1 + i) for i, b in enumerate(blocks)})
        K = sum(torch.einsum("r,rnm->nm", variance[b] * torch.exp(-r / prior.length[b]), G)
                for b, (r, G) in ((b, class_grams(lin, rows, names)) for b, names in blocks.items()))
        assert_close(K, A @ J @ prior.apply(lin, A @ J).T)


def test_float32_agrees_with_float64():
    lin, J = linearised(UNet(3, 4, sigmoid=False), 16, 16)
    recon = lin.recon
    single = Linearization(SimpleNamespace(net=recon.net.float(), z=recon.z.float(), scale=recon.scale, lowest=recon.lowest,
                                           image=recon.image.float()))
    u, v = numbers(2, 16, 16), numbers(2, lin.parameters)
    # rounding of 6e-8 through twelve layers, and rarely an activation that crosses the kink of LeakyReLU
    assert (single.vjp(u.float()) - u.flatten(1) @ J).norm() < 1e-3 * (u.flatten(1) @ J).norm()
    assert (single.jvp(v.float()).flatten(1) - v @ J.T).norm() < 1e-3 * (v @ J.T).norm()
    assert single.vjp(u.float()).dtype == torch.float32
    distances, grams = class_grams(single, single.vjp(u.float()), list(single.convs))
    assert grams.dtype == distances.dtype == torch.float64


def test_nothing_global_changes_and_the_network_stays_as_it_was():
    net = UNet(2, 4).double().eval()
    z = numbers(1, 1, 8, 8)
    with torch.no_grad(): image = net(z)[0, 0]
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.random.get_rng_state()
    lin = Linearization(SimpleNamespace(net=net, z=z, scale=1., lowest=0., image=image))
    lin.vjp(numbers(2, 8, 8))
    FilterPrior(one_block(lin), {"all": 1.}, {"all": 1.}).sample(lin, 2, torch.Generator().manual_seed(0))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters()) and not any(m._forward_hooks for m in net.modules())
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("length", [0.3, 1., 3.])
@pytest.mark.parametrize("kernel", [(5, 5), (3, 3, 3)])
def test_sample_covariance_of_larger_filters(kernel, length):
    conv = (nn.Conv2d, nn.Conv3d)[len(kernel) - 2](1, 1, kernel)
    lin = SimpleNamespace(filters={"c": kernel}, sizes=[conv.weight.numel()], parameters=conv.weight.numel(),
                          recon=SimpleNamespace(z=numbers(1)))
    prior = FilterPrior({"c": ["c"]}, {"c": 2.}, {"c": length})
    x, K = prior.sample(lin, 100_000, torch.Generator().manual_seed(0)), prior.kernel(lin, "c")
    error = ((K**2 + K.diagonal()[:, None] * K.diagonal()) / len(x)).sqrt()
    assert ((x.T @ x / len(x) - K) / error).abs().max() < 4.5  # of 378 entries, the seed is fixed


@pytest.mark.parametrize("shape", [(5, 6), (3, 4, 5), (1, 7)])
def test_likely_errors_by_hand(shape):
    "Half of each squared difference goes to either neighbour, is blurred by a pixel, and added to the squared height."
    image, squares = numbers(*shape).abs() + 2, torch.zeros(shape, dtype=torch.float64)
    for place in itertools.product(*map(range, shape)):
        for axis in range(len(shape)):
            there = tuple(p + (d == axis) for d, p in enumerate(place))
            if there[axis] == shape[axis]: continue
            for end in (place, there): squares[end] += (image[place] - image[there])**2 / 2
    blurred, heights = torch.from_numpy(gaussian_filter(squares.numpy(), 1)), (image - 2)**2
    expected = blurred / blurred.mean() + heights / heights.mean()
    found = likely_errors(image, 2.0)
    ratio = found / (expected + 0.3)
    assert torch.allclose(ratio, ratio.mean().expand(shape), rtol=1e-9) and abs(found.square().mean() - 1) < 1e-9


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="PyTorch before 2.9")
@pytest.mark.parametrize("chosen", [None, "tf32", "ieee"])
def test_products_leave_the_precision_of_convolutions_as_it_was(chosen):
    "Whether somebody has chosen it or not."
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    try:
        if chosen: conv.fp32_precision = chosen
        with exactly(): assert conv.fp32_precision == "ieee"
        assert conv.fp32_precision == (chosen or before)
    finally: conv.fp32_precision = before
    assert torch.backends.cudnn.allow_tf32 in (True, False)

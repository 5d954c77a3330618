"""Networks of every kind, size and dimension: shapes, seeds, settings, gradients; too bulky for their notebook."""
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dip_uq.networks import NETWORKS, DeepDecoder, UNet, fresh


def noise(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights(net): return torch.cat([p.detach().flatten() for p in net.parameters()])


def sizes(dims): return st.lists(st.integers(1, 40 if dims == 2 else 12), min_size=dims, max_size=dims)


@st.composite
def unet(draw):
    "A U-Net and an input for it; not one channel alone, since a single pixel of it cannot be normalised."
    dims, inputs = draw(st.integers(2, 3)), draw(st.integers(1, 3))
    net = UNet(draw(st.integers(1, 5)), draw(st.integers(2, 8)), draw(st.sampled_from([0, 2, 3, 4])),
               draw(st.booleans()), draw(st.booleans()), dims, inputs)
    return fresh(net, 0), noise(draw(st.integers(1, 2)), inputs, *draw(sizes(dims)))


@st.composite
def decoder(draw):
    "A deep decoder and an input for it that leaves more than one pixel on the coarsest grid."
    dims, scales = draw(st.integers(2, 3)), draw(st.integers(1, 4))
    size = draw(sizes(dims).filter(lambda size: max(size) > 2**(scales - 1)))
    return fresh(DeepDecoder(scales, draw(st.integers(1, 8)), dims), 0), noise(draw(st.integers(1, 2)), 1, *size)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(unet() | decoder())
def test_every_size_goes_through(example):
    net, z = example
    with torch.no_grad(): x = net(z)
    assert x.shape == (len(z), 1, *z.shape[2:]) and x.isfinite().all()
    if net.settings.get("sigmoid", True): assert 0 <= x.min() and x.max() <= 1


@settings(max_examples=50, deadline=None, derandomize=True)
@given(unet() | decoder())
def test_settings_and_weights_are_the_network(example):
    net, z = example
    with torch.device("meta"): again = NETWORKS[type(net).__name__](**net.settings)
    again.load_state_dict(copy.deepcopy(net).state_dict(), assign=True)
    assert again.settings == net.settings
    with torch.no_grad(): assert torch.equal(again(z), net(z))


NETS = dict(unet=UNet(3, 4), wide=UNet(2, 4, 0, norm=False, sigmoid=False, inputs=5), volume=UNet(3, 4, dims=3),
            decoder=DeepDecoder(3, 5), volume_decoder=DeepDecoder(2, 5, dims=3))


def batch(net, n, dtype=torch.float32):
    return noise(n, net.settings.get("inputs", 1), *(9, 14, 11)[:net.settings["dims"]]).to(dtype)


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_a_gradient_reaches_every_weight(net):
    net = fresh(net, 0).double()
    net(batch(net, 1, torch.float64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 1e-9 for p in net.parameters())


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_a_seed_decides_the_weights_and_the_image(net):
    one, same, other, z = fresh(net, 1), fresh(net, 1), fresh(net, 2), batch(net, 1)
    assert torch.equal(weights(one), weights(same)) and not torch.equal(weights(one), weights(other))
    with torch.no_grad(): assert torch.equal(one(z), same(z)) and not torch.equal(one(z), other(z))


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_images_of_a_batch_do_not_see_each_other(net):
    net = fresh(net, 0).double()
    z = batch(net, 3, torch.float64)
    with torch.no_grad(): assert (net(z)[1:2] - net(z[1:2])).abs().max() < 1e-12  # values of order 1


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_forward_draws_nothing_from_global_generators(net):
    state = torch.get_rng_state()
    with torch.no_grad(): net(batch(net, 1))
    assert torch.equal(torch.get_rng_state(), state)


def test_saved_networks_and_seeds_keep_their_meaning():
    "Names, order and weights of a network for images, as they were before there were volumes; and the decoder's noise."
    net = fresh(UNet(2, 4, 1, sigmoid=False), 0)
    blocks = ["first.0", "first.1", "down.0.0", "down.0.1", "down.0.3", "down.0.4", "skip.0.0", "skip.0.1", "up.0.0",
              "up.0.1", "up.0.3", "up.0.4", "last"]
    assert list(net.state_dict()) == [f"{b}.{kind}" for b in blocks for kind in ("weight", "bias")]
    drawn = weights(net).double()
    assert [len(drawn), drawn.sum(), drawn.abs().sum()] == pytest.approx([720, 21.07745, 82.15641], rel=1e-6)
    z = torch.linspace(-1, 1, 30).view(1, 1, 5, 6)
    with torch.no_grad():
        assert net(z)[0, 0, 2, :3].tolist() == pytest.approx([0.109921, 0.501800, 0.538816], abs=1e-5)
        x = fresh(DeepDecoder(2, 3), 0)(z)
        assert x[0, 0, 2, :3].tolist() == pytest.approx([0.523040, 0.504022, 0.396033], abs=1e-5)


@pytest.mark.parametrize("kind", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("arguments, error, message", [
    (dict(dims=4), ValueError, "dims=4 is out of range: choose 2 to 3"),
    (dict(dims=1), ValueError, "dims=1 is out of range"), (dict(dims=2.5), TypeError, "dims must be a whole number"),
    (dict(scales=0), ValueError, "scales=0 is out of range"),
    (dict(channels=0), ValueError, "channels=0 is out of range"),
])
def test_bad_arguments(kind, arguments, error, message):
    with pytest.raises(error, match=message): kind(**arguments)


@pytest.mark.parametrize("net, shape, message", [
    (UNet(1, 1), (1, 1, 4, 4, 4), r"\(N, 1, H, W\) is needed: one image is z\[None, None\]"),
    (UNet(1, 1, inputs=2), (1, 1, 4, 4), r"\(N, 2, H, W\) is needed: one image is z\[None\]"),
    (UNet(1, 1, dims=3), (1, 1, 4, 4), r"\(N, 1, D, H, W\) is needed: one volume is z\[None, None\]"),
    (DeepDecoder(1, 1), (1, 2, 4, 4), r"\(N, 1, H, W\) is needed"),
    (DeepDecoder(4, 2), (1, 1, 8, 7), "one pixel is left after halving it 3 times: choose fewer scales"),
])
def test_inputs_of_another_shape(net, shape, message):
    with pytest.raises(ValueError, match=message): net(torch.zeros(shape))

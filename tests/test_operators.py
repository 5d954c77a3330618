"""Checks of the operators too bulky for their notebooks: random shapes and geometries, ASTRA, PyLops, measured data,
speed."""

import os
import pickle
import re
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from skimage.transform import downscale_local_mean, iradon

from dip_uq.cone import cone_beam, vector_cone
from dip_uq.data import Scan, simulate
from dip_uq.fbp import _angle_shares, _counts, circular, fbp, has_fbp
from dip_uq.operators import (LinearOperator, MatrixOperator, adjoint_error, as_operator, blur, cgls, downsample, fourier,
                              mask)
from dip_uq.rays import fan_beam, parallel_beam, ray_matrix, vector_beam

coordinate = st.floats(-8, 8, allow_nan=False) | st.integers(-8, 8).map(float) | st.sampled_from([1e-12, -1e-12, 0.])
sizes = st.floats(.25, 3) | st.just(1.)


def length_inside(start, end, half):
    "Length of the segment inside the closed box |coordinate| <= half: the closed form of a row's sum."
    t0, t1 = 0., 1.
    for s, e, h in zip(start, end, half):
        if s == e:
            if abs(s) > h: return 0.
            continue
        a, b = sorted(((-h - s) / (e - s), (h - s) / (e - s)))
        t0, t1 = max(t0, a), min(t1, b)
    return max(t1 - t0, 0.) * float(np.linalg.norm(np.subtract(end, start)))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_row_sums_are_the_length_inside_the_box(data):
    dim = data.draw(st.integers(2, 3))
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=dim, max_size=dim)))
    pixel = data.draw(sizes)
    point = st.tuples(*[coordinate] * dim)
    start, end = data.draw(point), data.draw(point)
    row = ray_matrix([start], [end], shape, pixel)
    half, rounding = np.array(shape[::-1]) * pixel / 2, 1e-7 * pixel
    inner, outer = (length_inside(start, end, half + d) for d in (-1e-8, 1e-8))  # along a side rounding decides
    assert inner - rounding <= row.sum() <= outer + rounding
    assert row.nnz == 0 or row.data.min() > 0
    assert row.nnz == 0 or row.data.max() <= pixel * dim**.5 + rounding
    assert row.nnz <= sum(shape) * 2**(dim - 1)  # along edges a ray belongs to two or four pixels


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.tuples(coordinate, coordinate), st.tuples(coordinate, coordinate))
def test_a_ray_has_no_direction(start, end):
    there, back = ray_matrix([start], [end], (6, 7)), ray_matrix([end], [start], (6, 7))
    # rays close to a grid line may fall on either side of it by rounding: their sums agree, their pixels need not
    assert abs(there.sum() - back.sum()) < 1e-7
    distance = min(abs(np.subtract(start, end)))
    if distance > 1e-3: assert abs(there - back).max() < 1e-8


def exact_row(start, end, shape, pixel_size):
    "Intersection lengths in rational arithmetic, apart from one square root."
    p = Fraction(pixel_size)
    (h, w), (sx, sy, ex, ey) = shape, [Fraction(float(v)) / p for v in (*start, *end)]
    sx, ex, sy, ey = sx + Fraction(w, 2), ex + Fraction(w, 2), Fraction(h, 2) - sy, Fraction(h, 2) - ey
    vx, vy = ex - sx, ey - sy
    cuts = {Fraction(0), Fraction(1)} | {(i - sx) / vx for i in range(w + 1)} | {(i - sy) / vy for i in range(h + 1)}
    cuts, row = sorted(t for t in cuts if 0 <= t <= 1), np.zeros(shape)
    for a, b in zip(cuts, cuts[1:]):
        x, y = sx + (a + b) / 2 * vx, sy + (a + b) / 2 * vy
        if 0 <= x < w and 0 <= y < h: row[int(y), int(x)] += float(b - a)
    return row * float(vx**2 + vy**2)**.5 * pixel_size


def astra_matrix(geometry, shape, kernel="line"):
    "The matrix of one of ASTRA's kernels; ASTRA computes in float32."
    astra = pytest.importorskip("astra")
    (h, w), g = shape, geometry
    half = g.pixel_size / 2
    volume = astra.create_vol_geom(h, w, -w * half, w * half, -h * half, h * half)
    rays = astra.create_proj_geom("fanflat", g.bin_size, g.bins, g.angles, g.source_origin, g.origin_detector) \
        if g.fan else astra.create_proj_geom("parallel", g.bin_size, g.bins, g.angles)
    projector = astra.create_projector(f"{kernel}_fanflat" if g.fan else kernel, rays, volume)
    identifier = astra.projector.matrix(projector)
    matrix = sp.csr_array(astra.matrix.get(identifier), dtype=float)
    astra.matrix.delete(identifier)
    astra.projector.delete(projector)
    return matrix


def frobenius(matrix): return float(np.sqrt((matrix.data**2).sum()))


def check_against_exact_lengths(A, theirs, limit):
    "The matrices differ by `limit` of their norm at most, and where they differ most ours is exact."
    difference = (A.matrix - theirs).tocsr()
    assert frobenius(difference) < limit * frobenius(A.matrix)
    starts, ends = (p.reshape(-1, 2) for p in A.geometry.rays(np.hypot(*A.domain_shape) * A.geometry.pixel_size))
    worst = np.argsort(np.asarray(difference.power(2).sum(1)).ravel())[::-1][:5]
    for ray in worst:
        ours = A.matrix[[ray]].toarray().reshape(A.domain_shape)
        exact = exact_row(starts[ray], ends[ray], A.domain_shape, A.geometry.pixel_size)
        assert np.abs(ours - exact).max() < 1e-10  # float64 rounding of t, times the ray's length


ANGLES = np.sort(np.random.default_rng(0).uniform(0, 2 * np.pi, 30))
SCANS = {
    "parallel 60x47": (parallel_beam(ANGLES, (60, 47), 91, .7), 1e-4),
    "parallel 60x47, pixel 0.6": (parallel_beam(ANGLES, (60, 47), 91, .7, .6), 1e-4),
    "parallel 128x128": (parallel_beam(ANGLES, (128, 128), 183), 1e-3),
    "fan 128x128 (HTC)": (fan_beam(ANGLES, (128, 128), 140, .8, 410.66, 143.08, .5932), 1e-3),
}


@pytest.mark.parametrize("name", SCANS)
def test_astra(name):
    """The difference is ASTRA's own float32 error: the entries that differ most agree with exact arithmetic here.

    It grows with the image's size and as rays come close to an axis, hence 1e-3 at 128 x 128.
    """
    A, limit = SCANS[name]
    check_against_exact_lengths(A, astra_matrix(A.geometry, A.domain_shape), limit)


AXES = {"parallel": parallel_beam(ANGLES, (60, 47), 91, .7, .6, centre=31.27),
        "fan": fan_beam(ANGLES, (60, 47), 91, 1.1, 90., 60., centre=60.6),
        "fan, tilted": fan_beam(ANGLES, (60, 47), 91, 1.1, 90., 60., .8, centre=40.3, tilt=-.25)}


@pytest.mark.parametrize("name", AXES)
def test_astra_with_the_axis_anywhere(name):
    "By ASTRA's geometries of free vectors, which know of no axis."
    A = AXES[name]
    assert frobenius((A.matrix - astra_views(A)).tocsr()) < 3e-4 * frobenius(A.matrix)


def anywhere(fan, shape=(60, 47), bins=91, pixel_size=.6, views=30, shift=0., turn=0., seed=0, **more):
    """Views around the image, each source, detector and step of which is a little elsewhere, and bins of its own width.

    The whole scanner is turned by `turn`, and then shifted.
    """
    rng, angles = np.random.default_rng(seed), np.sort(np.random.default_rng(seed).uniform(0, 2 * np.pi, views))
    u, r = (np.stack([np.cos(angles + k), np.sin(angles + k)], 1) for k in (0, np.pi / 2))
    source = rng.uniform(.1, 9, (views, 1)) * r
    if fan: source = -rng.uniform(70, 110, (views, 1)) * r + rng.normal(0, 5, r.shape)
    detector = rng.uniform(50, 80, (views, 1)) * r + rng.normal(0, 5, r.shape)
    step = rng.uniform(.7, 1.3, (views, 1)) * u + rng.normal(0, .1, u.shape)
    turned = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    return vector_beam(source @ turned + shift * fan, detector @ turned + shift, step @ turned, shape, bins, pixel_size,
                       fan, **more)


def astra_views(A):
    "The matrix of ASTRA's line kernel for any views of ours, in square pixels."
    astra, g, (h, w) = pytest.importorskip("astra"), A.geometry, A.domain_shape
    half = g.pixel_size / 2
    projector = astra.create_projector("line_fanflat" if g.fan else "line", astra.create_proj_geom(
        "fanflat_vec" if g.fan else "parallel_vec", g.bins, np.concatenate(g.vectors(), 1)),
        astra.create_vol_geom(h, w, -w * half, w * half, -h * half, h * half))
    return sp.csr_array(astra.matrix.get(astra.projector.matrix(projector)), dtype=float)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fan", [False, True])
def test_astra_with_views_by_themselves(fan, seed):
    A = anywhere(fan, seed=seed)
    check_against_exact_lengths(A, astra_views(A), 5e-4)
    assert adjoint_error(A, torch.float64) < 1e-13


@pytest.mark.parametrize("fan", [False, True])
def test_arrows_that_astra_makes_of_its_own_geometries(fan):
    "ASTRA lets parallel rays go the other way; it is the same scan, and has the same filtered back-projection."
    astra = pytest.importorskip("astra")
    A = SCANS["fan 128x128 (HTC)" if fan else "parallel 128x128"][0]
    g = A.geometry
    distances = (g.source_origin, g.origin_detector) if fan else ()
    made = astra.geom_2vec(astra.create_proj_geom("fanflat" if fan else "parallel", g.bin_size, g.bins, g.angles, *distances))
    V = vector_beam(*made["Vectors"].reshape(-1, 3, 2).swapaxes(0, 1), A.domain_shape, g.bins, g.pixel_size, fan)
    y = A(torch.rand(A.domain_shape, dtype=torch.float64))
    assert abs(V.matrix - A.matrix).max() < 1e-6 and np.array_equal(V.geometry.directions, g.directions)
    assert (fbp(V, y) - fbp(A, y)).abs().max() < 1e-6


BEAMS = {name: A for name, (A, _) in SCANS.items()} | AXES | {
    "rays per bin": fan_beam(ANGLES, (20, 30), 21, 3., 90., 60., rays_per_bin=4)}

@pytest.mark.parametrize("name", BEAMS)
def test_standard_beams_are_views_too(name):
    A, g = BEAMS[name], BEAMS[name].geometry
    V = vector_beam(*g.vectors(), A.domain_shape, g.bins, g.pixel_size, g.fan, g.rays_per_bin)
    assert abs(V.matrix - A.matrix).max() < 1e-12 and np.array_equal(V.geometry.directions, g.directions)
    assert abs(V.geometry.reach - g.reach) < 1e-9 and np.abs(np.sin(V.angles - A.angles)).max() < 1e-12
    assert np.array_equal(V[3:5].geometry.source, V.geometry.source[3:5])
    assert abs(V[[7, 3]].matrix - A[[7, 3]].matrix).max() < 1e-12
    found, y = circular(V.geometry), A(torch.rand(A.domain_shape, dtype=torch.float64))
    for key in "bin_size", "source_origin", "origin_detector", "centre", "tilt":
        assert getattr(found, key) == pytest.approx(getattr(g, key), abs=1e-9)
    assert (fbp(V, y) - fbp(A, y)).abs().max() < 1e-9


def test_only_circles_have_fbp():
    "Neither a source that wanders by a twentieth of a bin, nor a detector read the other way round, nor another centre."
    A = AXES["fan"]
    source, detector, step = A.geometry.vectors()
    rng, shape = np.random.default_rng(0), (A.domain_shape, A.geometry.bins, A.geometry.pixel_size)
    assert has_fbp(vector_beam(source + rng.normal(0, 1e-4, source.shape), detector, step, *shape))
    for other in ((source + rng.normal(0, .05, source.shape), detector, step), (source, detector, -step),
                  (source + 1, detector + 1, step), (source * rng.uniform(1, 1.01, (30, 1)), detector, step)):
        B = vector_beam(*other, *shape)
        assert not has_fbp(B)
        with pytest.raises(ValueError, match="use cgls"): fbp(B, torch.zeros(B.range_shape))
    for fan in (False, True): assert not has_fbp(anywhere(fan))
    with pytest.raises(ValueError, match="use cgls"): fbp(anywhere(False), torch.zeros(30, 91))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.booleans(), st.integers(0, 10**6), st.floats(-6.3, 6.3), st.floats(-8, 8))
def test_chords_of_a_disc_from_anywhere_and_object_and_scanner_move_together(fan, seed, turn, shift):
    "Of a disc made of pixels they are right to a fifth of a pixel in the mean, wherever disc and scanner are moved to."
    n, centre, radius = 64, np.array([4., -3.]), 17.
    turned = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    sums = []
    for turn, shift, place in ((0., 0., centre), (turn, shift, centre @ turned + shift)):
        A = anywhere(fan, (n, n), 91, 1., 8, shift, turn, seed)
        starts, ends = A.geometry.rays(0.) if fan else A.geometry.rays(1.)
        way = (ends - starts) / np.linalg.norm(ends - starts, axis=-1, keepdims=True)
        q = ((place - starts) * way[..., ::-1] * [1, -1]).sum(-1)
        chord = 2 * np.sqrt((radius**2 - q**2).clip(0))
        c = (np.arange(n * 4) + .5) / 4 - n / 2
        fine = (c - place[0])**2 + (-c[:, None] - place[1])**2 < radius**2
        y = A(torch.tensor(fine.reshape(n, 4, n, 4).mean((1, 3)))).numpy()
        assert np.abs(y - chord).mean() < .2
        sums.append((chord, y))
    assert np.abs(sums[0][0] - sums[1][0]).max() < 1e-6  # the closed form knows no pixels, so it must not move at all
    assert np.abs(sums[0][1] - sums[1][1]).mean() < .4


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.booleans(), st.integers(1, 9), st.integers(1, 9), sizes, sizes)
def test_rays_in_oblong_pixels(seed, fan, height, width, down, across):
    "A row's sum is the length in the rectangle; and pixels of two by one are pairs of square ones."
    A = anywhere(fan, (height, width), 11, (down, across), 4, seed=seed)
    rays = [p.reshape(-1, 2) for p in A.geometry.rays(100.)]
    inside = ray_matrix(*rays, (1, 1), (height * down, width * across)).toarray()[:, 0]
    assert np.abs(A.matrix.sum(1) - inside).max() < 1e-6
    tall = anywhere(fan, (height, width), 11, (2 * across, across), 4, seed=seed).matrix.toarray().reshape(-1, height, width)
    square = anywhere(fan, (2 * height, width), 11, across, 4, seed=seed).matrix.toarray().reshape(-1, height, 2, width)
    assert np.abs(tall - square.sum(2)).max() < 1e-6
    assert adjoint_error(A, torch.float64) < 1e-13


def test_voxels_may_be_thick():
    thick = ray_matrix([(-9, -8, -7)], [(8, 9, 7.5)], (3, 4, 5), (2., 1., 1.)).toarray().reshape(3, 4, 5)
    cubes = ray_matrix([(-9, -8, -7)], [(8, 9, 7.5)], (6, 4, 5)).toarray().reshape(3, 2, 4, 5)
    assert np.abs(thick - cubes.sum(1)).max() < 1e-9 and thick.sum() > 5


BAD_VIEWS = dict(
    source=(dict(source=[(0., np.nan)]), "source has shape (1, 2): give finite"),
    flat=(dict(step=[1., 0.]), "step has shape (2,)"),
    none=(dict(source=np.zeros((0, 2)), detector=np.zeros((0, 2)), step=np.zeros((0, 2))), "source has shape (0, 2)"),
    three=(dict(source=[(0., 0., -9.)]), "source has shape (1, 3)"),
    counts=(dict(detector=[(0., 9.)] * 2), "detector has shape (2, 2)"),
    zero=(dict(step=[(0., 0.)]), "step=[0. 0.]"), line=(dict(source=[(-20., 9.)]), "the source is on the detector's line"),
    same=(dict(source=[(0., 9.)]), "of view 0"),
    near=(dict(source=[(0., -3.)]), "the source of view 0 is inside the image, 8 high"),
    behind=(dict(detector=[(0., 3.)]), "the detector of view 0 is inside"), bins=(dict(bins=0), "bins=0"),
    rays=(dict(rays_per_bin=0), "rays_per_bin=0"), pixel=(dict(pixel_size=(1., -1.)), "pixel_size=-1.0: give a positive number"),
    pixels=(dict(pixel_size=(1., 1., 1.)), "pixel_size=(1.0, 1.0, 1.0): give one number, or 2"),
    still=(dict(fan=False, source=[(0., 0.)]), "source=[0. 0.] of view 0"),
    along=(dict(fan=False, source=[(-1., 0.)]), "step=[1. 0.]"))

@pytest.mark.parametrize("case", BAD_VIEWS)
def test_views_that_cannot_be(case):
    changes, message = BAD_VIEWS[case]
    with pytest.raises(ValueError) as error:
        vector_beam(**dict(source=[(0., -9.)], detector=[(0., 9.)], step=[(1., 0.)], shape=(8, 8), bins=9) | changes)
    assert message in str(error.value) and "\n" not in str(error.value)


quarter_scans = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.sampled_from([.5, 1., 1.5, 2.]),
                          st.booleans())


def quarter_scan(height, width, bins, bin_size, fan):
    "All four quarter turns of a scanner whose rays may run along edges, and an image."
    angles, image = np.arange(4) * np.pi / 2, np.random.default_rng(0).random((height, width))
    def beam(shape):
        scan = angles, shape, bins, bin_size
        return fan_beam(*scan, 30., 20.) if fan else parallel_beam(*scan)
    return beam, torch.tensor(image)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(quarter_scans)
def test_image_and_scanner_turn_and_are_mirrored_together(scan):
    beam, x = quarter_scan(*scan)
    y, turned = beam(x.shape)(x), torch.rot90(x)
    assert (beam(turned.shape)(turned)[[1, 2, 3, 0]] - y).abs().max() < 1e-6
    mirrored = beam(x.shape)(x.flip(1))  # left and right: the bins of 0° and 180°, the turn of 90° and 270°
    assert (mirrored[[0, 3, 2, 1]] - y.flip(1)).abs().max() < 1e-6


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 5), st.sampled_from([1., .5, .25]))
def test_a_row_of_the_detector_keeps_the_mass(height, width, more, bin_size):
    "Where bins divide pixels, on their edges (odd bins, even image) or between them; the detector is wide enough."
    A = parallel_beam(np.arange(4) * np.pi / 2, (height, width), int(9 / bin_size) + 2 + more, bin_size)
    x = random_image((height, width))
    assert (A(torch.tensor(x)).sum(1) * bin_size - x.sum()).abs().max() < 1e-10


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_rays_along_edges_are_the_mean_of_those_beside_them(data):
    "Of two in an image, of two or four in a volume; also at the rim, where those outside are empty."
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=3)))
    dim, half = len(shape), np.array(shape[::-1]) / 2
    along = data.draw(st.lists(st.booleans(), min_size=dim, max_size=dim).filter(lambda a: any(a) and not all(a)))
    start, end = (np.array(data.draw(st.tuples(*[st.floats(-6, 6)] * dim))) for _ in range(2))
    for a in np.flatnonzero(along): start[a] = end[a] = data.draw(st.integers(0, int(2 * half[a]))) - half[a]
    free = ~np.array(along)
    if np.abs(start - end)[free].min() < 1e-2: return
    signs = np.array(np.meshgrid(*[[-1e-7, 1e-7] if a else [0.] for a in along])).reshape(dim, -1).T
    beside = ray_matrix(start + signs, end + signs, shape).toarray().mean(0)
    assert np.abs(ray_matrix([start], [end], shape).toarray()[0] - beside).max() < 1e-6


def test_astra_gives_edges_to_one_side():
    "ASTRA's line kernel knows the same lengths, but decides for one neighbour; ours is the mean with its mirror image."
    A = parallel_beam([0.], (6, 6), 7)
    theirs = astra_matrix(A.geometry, (6, 6)).toarray().reshape(7, 6, 6)
    assert np.abs((theirs + theirs[::-1, :, ::-1]) / 2 - A.matrix.toarray().reshape(7, 6, 6)).max() < 1e-6


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 6.3), min_size=1, max_size=3), st.integers(1, 9), st.integers(1, 7), sizes, st.booleans())
def test_a_bin_is_the_mean_of_the_bins_of_a_finer_detector(angles, bins, k, bin_size, fan):
    beam = (lambda *args, **more: fan_beam(*args, 30., 20., .7, **more)) if fan else parallel_beam
    A = beam(angles, (5, 6), bins, bin_size, rays_per_bin=k)
    fine = beam(angles, (5, 6), bins * k, bin_size / k).matrix.toarray()
    assert A.range_shape == (len(angles), bins) and A[[0]].geometry.rays_per_bin == k
    assert np.abs(A.matrix.toarray() - fine.reshape(-1, k, 30).mean(1)).max() < 1e-6
    assert adjoint_error(A, torch.float64) < 1e-13


def test_many_rays_in_a_bin_are_a_strip():
    "ASTRA knows the area of a pixel inside the strip that a bin sees; over the width of the bin it is their mean length."
    lines = parallel_beam(ANGLES, (12, 9), 11, 1.7, .8, rays_per_bin=200)
    strips = astra_matrix(lines.geometry, (12, 9), "strip").toarray()
    few = parallel_beam(ANGLES, (12, 9), 11, 1.7, .8, rays_per_bin=4).matrix.toarray()
    assert np.abs(lines.matrix.toarray() - strips).max() < .01  # one of 200 rays more or less meets the pixel
    assert .05 < np.abs(few - strips).max() < .4


shapes = st.lists(st.integers(1, 9), min_size=2, max_size=3).map(tuple)


def random_image(shape): return np.random.default_rng(0).normal(size=shape)


def random_pattern(shape, seed):
    "A boolean array with at least one True."
    keep = np.random.default_rng(seed).random(shape) < .5
    keep.flat[seed % keep.size] = True
    return keep


def check_operator(A, x, expected):
    "A(x) against an independent result; batches, adjoint, derivatives, dtypes, a device without data."
    batch = torch.tensor(np.stack([x, 2 * x]))
    assert np.abs(A(batch)[0].numpy() - expected).max() < 1e-12  # sums of up to 729 numbers near 1
    assert torch.allclose(A(batch)[1], 2 * A(batch)[0])
    assert adjoint_error(A) < 1e-6 and adjoint_error(A, torch.float64) < 1e-14
    assert torch.allclose(torch.func.vjp(A, batch[0])[1](A(batch[0]))[0], A.T(A(batch[0])))
    for dtype in (torch.float32, torch.float64):
        y = A(torch.zeros(3, 0, *A.domain_shape, dtype=dtype))
        assert y.shape == (3, 0, *A.range_shape) and A.T(y).dtype == dtype
    y = A(torch.zeros(A.domain_shape, device="meta"))
    assert y.device.type == A.T(y).device.type == "meta"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shapes, st.floats(.05, 4))
def test_blur(shape, sigma):
    sigma, x = min(sigma, max(shape)), random_image(shape)
    check_operator(blur(shape, sigma), x, gaussian_filter(x, sigma, mode="wrap", truncate=9))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shapes, st.integers(0, 1000))
def test_mask(shape, seed):
    keep, x = random_pattern(shape, seed), random_image(shape)
    check_operator(mask(keep), x, x[keep])
    check_operator(mask(torch.tensor(keep)), x, x[keep])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=3), st.integers(1, 4))
def test_downsample(small, factor):
    shape = tuple(n * factor for n in small)
    x = random_image(shape)
    check_operator(downsample(shape, factor), x, downscale_local_mean(x, (factor,) * len(shape)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shapes, st.integers(0, 1000))
def test_fourier(shape, seed):
    keep, x = random_pattern(shape, seed), random_image(shape)
    samples = np.fft.fftshift(np.fft.fftn(x, norm="ortho"))[keep]
    check_operator(fourier(keep), x, np.stack([samples.real, samples.imag], -1))
    every = fourier(np.ones(shape, bool))  # orthonormal: nothing is lost
    assert np.abs(every.T(every(torch.tensor(x))).numpy() - x).max() < 1e-12


def test_astra_operator():
    astra = pytest.importorskip("astra")
    angles = np.arange(20) * np.pi / 20
    projector = astra.create_projector("linear", astra.create_proj_geom("parallel", 1., 30, angles),
                                       astra.create_vol_geom(20, 24))
    A = as_operator(astra.OpTomo(projector))
    assert (A.domain_shape, A.range_shape) == ((20, 24), (20, 30))
    assert adjoint_error(A) < 1e-5
    matrix = sp.csr_array(astra.matrix.get(astra.projector.matrix(projector)))
    x = torch.rand(3, 20, 24, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(A(x), MatrixOperator(matrix, (20, 24), (20, 30))(x), rtol=1e-5)
    pull = torch.func.vjp(A, x[0])[1]
    assert torch.func.vmap(pull)(A(x))[0].shape == (3, 20, 24)


def test_astra_fbp():
    "Against ASTRA's filtered back-projection: same units and orientation; another interpolation, so 3 % of the norm."
    astra = pytest.importorskip("astra")
    angles, n = np.arange(180) * np.pi / 180, 64
    A = parallel_beam(angles, (n, n), 95)
    y, x = np.mgrid[:n, :n]
    image = ((x - 40)**2 + (y - 20)**2 < 12**2) + .5 * ((x - 20)**2 / 80 + (y - 40)**2 / 200 < 1)
    sinogram = A(torch.tensor(image, dtype=torch.float32))
    volume, rays = astra.create_vol_geom(n, n), astra.create_proj_geom("parallel", 1., 95, angles)
    data, out = astra.data2d.create("-sino", rays, sinogram.numpy()), astra.data2d.create("-vol", volume)
    settings_ = astra.astra_dict("FBP")
    settings_ |= {"ProjectorId": astra.create_projector("linear", rays, volume), "ProjectionDataId": data,
                  "ReconstructionDataId": out, "FilterType": "Ram-Lak"}
    astra.algorithm.run(astra.algorithm.create(settings_))
    theirs, ours = astra.data2d.get(out), fbp(A, sinogram).numpy()
    assert np.linalg.norm(ours - theirs) < .03 * np.linalg.norm(theirs)


SHORT = np.pi + 2 * np.arctan(95 * 1.6 / 2 / 180)  # half a turn and the angle of the fan of `fan_of`


def parallel_of(angles): return parallel_beam(angles, (64, 64), 95)
def fan_of(angles): return fan_beam(angles, (64, 64), 95, 1.6, 120., 60.)


def spread(seed, kind):
    "So many angles, in units of a half or full turn, as scans may have them."
    rng = np.random.default_rng(seed)
    return {"random": lambda: rng.uniform(0, 1, 100),
            "clustered": lambda: np.concatenate([c + rng.normal(0, .01, 40) for c in np.arange(6) / 6 + .05]),
            "dense and sparse": lambda: np.append(np.arange(0, .5, .01), np.arange(.5, 1, .05)),
            "repeats": lambda: np.repeat(np.arange(60) / 60, rng.integers(1, 5, 60)),
            "two turns": lambda: np.arange(90) / 45 + .01,
            "two turns, shuffled": lambda: rng.permutation(np.arange(90) / 45),
            "both ends": lambda: np.linspace(0, 1, 61),
            "gaps": lambda: np.delete(np.arange(90) / 90, [4, 5, 30, 60, 61])}[kind]()


def disc_amplitude(A):
    "FBP of a disc of value 1 from its exact chords: mean and scatter well inside."
    g, (cx, cy), radius = A.geometry, (4., -6.), 20.
    starts, ends = g.rays(200.)
    way = (ends - starts) / np.linalg.norm(ends - starts, axis=-1, keepdims=True)
    aside = (cx - starts[..., 0]) * way[..., 1] - (cy - starts[..., 1]) * way[..., 0]
    x = fbp(A, torch.tensor(2 * np.sqrt((radius**2 - aside**2).clip(0))))
    c = np.arange(64) - 31.5
    inner = x[torch.tensor((c - cx)**2 + (-c[:, None] - cy)**2 < 14**2)]
    return float(inner.mean()), float(inner.std())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["random", "clustered", "dense and sparse", "repeats", "two turns",
                                  "two turns, shuffled", "both ends", "gaps"])
def test_fbp_keeps_the_amplitude_for_any_angles(kind, seed):
    for beam, turn in (parallel_of, np.pi), (fan_of, 2 * np.pi):
        assert abs(disc_amplitude(beam(spread(seed, kind) * turn))[0] - 1) < .02


@pytest.mark.parametrize("start", [0, 45, 100, 222, 359])
@pytest.mark.parametrize("arc", [SHORT, 1.3 * np.pi, 1.6 * np.pi, 1.95 * np.pi])
def test_fbp_keeps_the_amplitude_for_fans_that_turn_less_than_once(start, arc):
    even = np.deg2rad(start) + np.arange(120) / 120 * arc
    uneven = np.deg2rad(start) + np.random.default_rng(start).uniform(0, arc, 160)
    shuffled = np.random.default_rng(0).permutation(even)
    for angles, scatter in (even, .02), (even[::-1], .02), (shuffled, .02), (uneven, .2):
        mean, std = disc_amplitude(fan_of(angles))
        assert abs(mean - 1) < .02 and std < scatter
    shares, way, covered = _angle_shares(even, 2 * np.pi)
    counted = shares @ _counts(fan_of(even).geometry, way, covered)
    assert abs(covered - arc) < 1e-9
    assert np.abs(counted + counted[::-1] - 2 * np.pi).max() < .02  # a line's two readings lie in opposite bins


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 3599), min_size=1, max_size=25), st.integers(0, 1000), st.booleans())
def test_fbp_knows_no_order_of_projections(tenths, seed, fan):
    "Nor, for parallel rays, which of its two ends a line is seen from."
    angles, rng = np.deg2rad(np.array(tenths) / 10), np.random.default_rng(seed)
    def beam(a): return fan_beam(a, (16, 16), 23, 1.5, 30., 20.) if fan else parallel_beam(a, (16, 16), 23)
    y, order = torch.tensor(rng.normal(size=(len(angles), 23))), rng.permutation(len(angles))
    image = fbp(beam(angles), y)
    assert (fbp(beam(angles[order]), y[order]) - image).abs().max() < 1e-9
    if fan: return
    turned = torch.tensor(rng.random(len(angles)) < .5)
    other = torch.where(turned[:, None], y.flip(1), y)
    assert (fbp(beam(angles + np.pi * turned.numpy()), other) - image).abs().max() < 1e-9


@pytest.mark.parametrize("count", [30, 61, 180])
def test_fbp_of_even_angles_is_scikit_images(count):
    A = parallel_beam(np.arange(count) * np.pi / count, (33, 33), 33)
    y = torch.tensor(np.random.default_rng(0).normal(size=(count, 33)))
    y[:, [0, -1]] = 0  # what is not truncated
    c = np.arange(33) - 16
    circle = c**2 + c[:, None]**2 < 15**2
    theirs = iradon(y.T.numpy(), theta=np.rad2deg(A.angles), filter_name="ramp", circle=True)
    assert np.abs(theirs - fbp(A, y).numpy())[circle].max() < 1e-12


def test_pylops_operator():
    pylops = pytest.importorskip("pylops")
    A = as_operator(pylops.FirstDerivative((6, 8), axis=1, dtype="float64"))
    assert (A.domain_shape, A.range_shape) == ((6, 8), (6, 8))
    x = torch.rand(2, 6, 8, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(A(x)[:, :, 1:-1], (x[:, :, 2:] - x[:, :, :-2]) / 2)
    assert torch.autograd.gradcheck(A, x, check_forward_ad=True)
    jacobian = torch.func.jacrev(A)(x[0].detach())
    assert torch.allclose(torch.func.jacfwd(A)(x[0].detach()), jacobian)
    units = torch.eye(48, dtype=torch.float64).reshape(48, 6, 8)
    assert torch.allclose(jacobian.reshape(48, 48), A(units).reshape(48, 48).T)
    with pytest.raises(TypeError, match="complex"): as_operator(pylops.signalprocessing.FFT(8))


@pytest.mark.parametrize("beam", SCANS)
def test_adjoint(beam):
    A = SCANS[beam][0]
    assert adjoint_error(A) < 1e-6
    assert adjoint_error(A, torch.float64) < 1e-14


class Pooling(torch.nn.Module):
    "Physics in the style of DeepInverse."
    def A(self, x): return torch.nn.functional.avg_pool2d(x, 2)
    def A_adjoint(self, y): return torch.nn.functional.interpolate(y, scale_factor=2) / 4


def shift(x): return x.roll(1, -1)
def shift_back(y): return y.roll(-1, -1)


MATRIX = sp.random_array((63, 64), density=.2, rng=np.random.default_rng(0))
KINDS = {
    "blur": blur((8, 8), 1.5), "mask": mask(random_pattern((8, 8), 0)), "downsample": downsample((8, 8), 2),
    "fourier": fourier(random_pattern((8, 8), 0)), "matrix": as_operator(MATRIX, (8, 8), (7, 9)),
    "SciPy": as_operator(sp.linalg.aslinearoperator(MATRIX), (8, 8), (7, 9)),
    "physics": as_operator(Pooling(), (8, 8)), "callables": as_operator((shift, shift_back), (8, 8)),
    "rays": fan_beam(ANGLES, (8, 8), 13, 1.5, 20., 10.),
}


def sent(A): return pickle.loads(pickle.dumps(A))


@pytest.mark.parametrize("kind", KINDS)
def test_pickled_operators_are_the_same(kind):
    "Each kind, its rows, the transposes and their rows, bit by bit; the cached transpose is not taken along."
    for A in KINDS[kind], KINDS[kind][1:3], KINDS[kind][[3, 1, 1]][1:]:
        size = len(pickle.dumps(A))
        for B, again in (A, sent(A)), (A.T, sent(A).T), (A.T, sent(A.T)), (A.T[2:5], sent(A.T[2:5])):
            assert type(again) is type(B) and (again.domain_shape, again.range_shape) == (B.domain_shape, B.range_shape)
            for x in torch.rand(2, 3, *B.domain_shape), torch.rand(B.domain_shape, dtype=torch.float64):
                assert torch.equal(again(x), B(x))
        assert len(pickle.dumps(A)) == size


def test_operators_and_scans_in_another_process():
    "Unpickled where nothing but the library is there."
    rays, holes = KINDS["rays"], KINDS["mask"]
    scan, x = simulate(torch.rand(8, 8), rays).hold_out(4), torch.rand(8, 8)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        for A, given in ((rays[3:9], x), (holes, x), (holes.T, holes(x))):
            assert torch.equal(pool.submit(A, given).result(), A(given))
        there = pool.submit(Scan.hold_out, scan, 3).result()
    assert torch.equal(there.measurement, scan.measurement) and torch.equal(there.truth, scan.truth)
    assert (there.held_out, there.noise_std, there.pixel_size) == (scan.hold_out(3).held_out, scan.noise_std, 1.)
    assert torch.equal(there.training.operator(x), scan.hold_out(3).training.operator(x))


def htc(name):
    folder = Path(os.environ.get("DIP_UQ_DATA", "")) / "htc2022"
    if not (folder / name).exists(): pytest.skip("DIP_UQ_DATA does not name a folder with the HTC 2022 scans")
    return scipy.io.loadmat(folder / name, squeeze_me=True)


def test_measured_scan_has_the_published_orientation():
    "A real fan-beam scan: FBP agrees with the published reconstruction, without any flip."
    scan = htc("htc2022_ta_full.mat")["CtDataFull"]
    published = htc("htc2022_ta_full_recon_fbp.mat")["reconFullFbp"].reshape(128, 4, 128, 4).mean((1, 3))
    sinogram, angles = scan["sinogram"].item()[:720:4], np.deg2rad(scan["parameters"].item()["angles"].item()[:720:4])
    A = fan_beam(angles, (128, 128), 560, .2, 410.66, 553.74 - 410.66, 4 * .1483)
    image = fbp(A, torch.tensor(sinogram, dtype=torch.float32), "hann").numpy()

    def correlation(x): return np.corrcoef(x.ravel(), published.ravel())[0, 1]
    assert correlation(image) > .99
    assert max(map(correlation, (image[::-1], image[:, ::-1], image.T, image[::-1, ::-1]))) < .9


def test_cgls_on_a_singular_problem_stays_finite():
    "Fewer rays than pixels, many iterations, float32: the residual reaches rounding and nothing blows up."
    A = parallel_beam(np.arange(5), (16, 16), 11)
    y = A(torch.rand(16, 16, generator=torch.Generator().manual_seed(0)))
    x = cgls(A, y, 300)
    assert (A(x) - y).norm() < 1e-4 * y.norm()
    minimum = torch.tensor(np.linalg.lstsq(A.matrix.toarray(), y.numpy().ravel(), rcond=1e-9)[0]).reshape(16, 16)
    assert (x - minimum).norm() < 1e-3 * minimum.norm()  # the solution of least norm, as from x = 0 it must be


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-3), (torch.float64, 1e-8)])
def test_cgls_stays_where_it_has_converged(dtype, limit):
    "More rays than pixels, many iterations: without a stop at rounding level x grows by up to 1e12."
    A = parallel_beam(np.arange(60) * np.pi / 60, (12, 12), 17)
    y = torch.rand(20, 60, 17, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    minimum = torch.tensor(np.linalg.lstsq(A.matrix.toarray(), y.flatten(1).T.numpy())[0]).T.reshape(20, 12, 12)
    assert (cgls(A, y.to(dtype), 1000) - minimum).norm() < limit * minimum.norm()


# Maps that are no operators

def turn(x): return x.flip(-1)

@pytest.mark.parametrize("bent, size", [
    (lambda x: turn(x).clamp(min=0), 0.9), (lambda x: turn(x).square(), 1.), (lambda x: turn(x) + 0.1, 0.04),
    (lambda x: turn(x).abs(), 1.),
    (lambda x: turn(x).log1p(), float("nan"))], ids=["clamp", "square", "offset", "abs", "logarithm"])
@pytest.mark.parametrize("backwards", [False, True])
def test_what_is_not_linear_is_refused_with_its_error(bent, size, backwards):
    "Also where it is linear as long as nothing is negative."
    pair, name = ((turn, bent), "adjoint") if backwards else ((bent, turn), "forward")
    with pytest.raises(ValueError, match=f"^{name} is not linear: ") as error: as_operator(pair, (6, 7), (6, 7))
    found = float(re.search(r"differ by (\S+) of the norms", str(error.value))[1])
    assert found == pytest.approx(size, rel=0.5, nan_ok=True)


def test_adjoint_error_sees_a_clamp():
    clamped = LinearOperator((6, 7), (6, 7), lambda x: turn(x).clamp(min=0), turn)
    assert adjoint_error(clamped) > 0.3 and adjoint_error(clamped, torch.float64) > 0.3


def test_linear_maps_of_any_precision_are_taken():
    "Zero, tiny and huge ones, and with parameters that could be trained."
    weight = torch.nn.Parameter(torch.rand(12, 12))
    def matrix(w): return lambda x: x @ w.T, lambda y: y @ w
    kinds = [matrix(torch.rand(12, 12) * gain) for gain in (0, 1e-15, 1, 1e15)] + [matrix(weight)]
    for pair in kinds: as_operator(pair, (12,), (12,))


@pytest.mark.parametrize("thing, message", [
    (sp.linalg.LinearOperator((64, 64), matvec=lambda v: v, dtype=np.float64), "adjoint fails on a batch .*rmatvec"),
    ((lambda x: x.numpy(), lambda y: y), "forward returns a ndarray, expected a torch tensor"),
    ((lambda x: x, lambda y: y.numpy()), "adjoint returns a ndarray, expected a torch tensor"),
    ((lambda x: x.view(8, 8), lambda y: y), r"forward fails on a batch of shape \(2, 8, 8\)"),
    ((lambda x: x[0], lambda y: y), r"forward maps a batch of shape \(2, 8, 8\) to \(8, 8\)")])
def test_functions_that_are_no_operator_are_named(thing, message):
    with pytest.raises((TypeError, ValueError), match=message): as_operator(thing, (8, 8), (8, 8))


@pytest.mark.parametrize("shape", [16, (16,), (4, 4, 4)])
def test_a_beam_needs_height_and_width(shape):
    with pytest.raises(ValueError, match=r"expected \(H, W\), such as \(128, 128\)"): parallel_beam([0.0, 1.0], shape, 8)


# Volumes: views of their own

def test_cones_are_refused_early():
    source, detector, across, along = np.array([[0., -90, 0]]), np.array([[0., 60, 0]]), np.array([[1., 0, 0]]), np.array([[0., 0, 1]])
    def cone(**other):
        vectors = dict(source=source, detector=detector, across=across, along=along) | other
        return vector_cone(**vectors, shape=(4, 5, 6), rows=7, bins=8)
    assert cone().range_shape == (1, 7, 8) and cone().domain_shape == (4, 5, 6)
    for wrong, words in ((dict(across=along), "along each other"), (dict(source=np.array([[50., 60, 9]])), "in the detector's plane"),
                         (dict(detector=detector[0]), "detector has shape (3,)"), (dict(source=np.full((1, 3), np.nan)), "finite"),
                         (dict(along=np.zeros((1, 3))), "steps are zero"),
                         (dict(source=np.array([[1., -2, 1]])), "the source of view 0 is inside the volume")):
        with pytest.raises(ValueError, match=re.escape(words)): cone(**wrong)
    with pytest.raises(ValueError, match="expected \\(D, H, W\\)"): vector_cone(source, detector, across, along, (5, 6), 7, 8)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(-6, 6), st.floats(-3, 3), st.booleans(), st.integers(0, 10**6))
def test_in_the_plane_of_the_source_fdk_is_fbp(level, off, short, seed):
    "Wherever the axis is, whichever slice the source turns in, over a full turn or just enough; rows are 1.5 slices apart on the axis."
    rng = np.random.default_rng(seed)
    turn = np.sort(rng.uniform(0, 4 if short else 2 * np.pi, 40))
    plane = fan_beam(turn, (12, 14), 25, 1.4, 40., 20., (1.1, .9), centre=12 + off)
    cone = cone_beam(turn, (15, 12, 14), 9, 25, (2.25 * .8, 1.4), 40., 20., (.8, 1.1, .9), centre=12 + off, heights=level * .8)
    y = torch.from_numpy(rng.random((2, 40, 9, 25)))
    assert (fbp(cone, y)[:, 7 + level] - fbp(plane, y[:, :, 4])).abs().max() < 1e-9 * fbp(plane, y[:, :, 4]).abs().max()


def test_level_parallel_rays_are_slices():
    "One row for each slice: FBP of each by itself. Rays that climb have none."
    turn = np.arange(20) * np.pi / 20
    way, u, up = (np.stack(v, 1) for v in ((-np.sin(turn), np.cos(turn), 0 * turn), (np.cos(turn), np.sin(turn), 0 * turn), (0 * turn, 0 * turn, 1 + 0 * turn)))
    plane, y = parallel_beam(turn, (16, 16), 25), torch.rand(20, 5, 25, dtype=torch.float64)
    def volume(way): return vector_cone(way, 0 * way, u, up, (5, 16, 16), 5, 25, cone=False)
    for k in range(5): torch.testing.assert_close(fbp(volume(way), y)[k], fbp(plane, y[:, k]))
    assert not has_fbp(volume(way + .01 * up)) and not has_fbp(volume(.001 * (way + .01 * up)))
    assert has_fbp(volume(1000 * way + .1 * up))  # how long a direction is means nothing


def test_cones_without_a_plane_have_no_fbp():
    "A helix, a detector that leans, rows that rise, a source beside its circle: a hundredth of a bin is the limit."
    turn = np.arange(30) / 30 * 2 * np.pi
    g = cone_beam(turn, (4, 6, 6), 5, 9, 1.5, 40., 20.).geometry
    def again(**other):
        vectors = dict(source=g.source, detector=g.detector, across=g.across, along=g.along) | other
        return vector_cone(**vectors, shape=(4, 6, 6), rows=5, bins=9)
    rise = np.linspace(0, 1, 30)[:, None] * [0, 0, 1]
    assert has_fbp(again()) and has_fbp(again(along=-g.along)) and has_fbp(again(source=g.source + .001 * rise))
    for other in (dict(source=g.source + rise, detector=g.detector + rise), dict(along=g.along + .1 * g.across),
                  dict(along=g.along + .05 * g.source / 40), dict(across=g.across + [0, 0, .1]), dict(source=g.source * 1.1 + [1, 0, 0])):
        assert not has_fbp(again(**other)), other
        with pytest.raises(ValueError, match="use cgls"): fbp(again(**other), torch.zeros(30, 5, 9))


def test_a_volume_that_moves_with_its_scanner_reads_the_same():
    "Turned by a quarter about z, source, detector and volume."
    rng = np.random.default_rng(0)
    volume, turn = torch.from_numpy(rng.random((6, 8, 8))), np.array([[0., -1, 0], [1, 0, 0], [0, 0, 1]])
    vectors = [rng.normal(size=(5, 3)) * much + place for much, place in
               ((5, [0, -90, 0]), (3, [0, 60, 0]), (0.1, [1, 0, 0]), (0.1, [0, 0, 1]))]
    still, moved = (vector_cone(*(v @ T.T for v in vectors), (6, 8, 8), 9, 12) for T in (np.eye(3), turn))
    np.testing.assert_allclose(moved(volume.rot90(1, (1, 2))), still(volume), atol=1e-6)


def test_bad_points_are_named():
    o = np.ones((3, 2))
    with pytest.raises(ValueError, match="detector must hold numbers"): vector_beam(o, "far", o, (4, 4), 4)
    with pytest.raises(ValueError, match="step must hold numbers"): vector_beam(o, o, [[1, 2], [3]], (4, 4), 4)
    with pytest.raises(ValueError, match="across must hold numbers"): vector_cone(np.ones((3, 3)), np.ones((3, 3)), "x", 1, (4, 4, 4), 4, 4)
    with pytest.raises(ValueError, match=r"give one number, or 3, \(depth, height, width\)"):
        ray_matrix([0, 0, -9], [0, 0, 9], (4, 4, 4), (1, 2))
    with pytest.raises(ValueError) as error: parallel_beam(np.full(99, np.nan), (4, 4), 4)
    assert str(error.value).startswith("angles of (99,)") and "\n" not in str(error.value)

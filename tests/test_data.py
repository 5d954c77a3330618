"""Scans, phantoms and files: what is too bulky for the notebook. Everything malformed must say so, and nothing else."""
import http.server
import os
import pickle
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pooch
import pytest
import scipy.sparse as sp
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.io import loadmat, savemat
from skimage.transform import resize_local_mean

import dip_uq.scans as scans
from dip_uq.data import Scan, ellipses, gaussian_noise, poisson_noise, rectangles, shepp_logan, simulate, walnut
from dip_uq.doubts import doubts, in_the_other_unit, limited, widened
from dip_uq.operators import MatrixOperator, as_operator, mask
from dip_uq.rays import Geometry, RayTransform, Views, _thinned, fan_beam, parallel_beam, vector_beam
from dip_uq.scans import import_fields, load_htc2022, load_scan, save_scan

HTC = Path(os.environ.get("DIP_UQ_DATA", "none")) / "htc2022"
needs_htc = pytest.mark.skipif(not HTC.is_dir(), reason="set DIP_UQ_DATA to a folder with htc2022/*.mat")
A = fan_beam(np.arange(12) * np.pi / 6, (16, 16), bins=24, bin_size=1.2, source_origin=60., origin_detector=30.)
Y = A(ellipses(16, 1))


# Scan


BAD_SCANS = dict(
    nan=(dict(measurement=Y * float("nan")), "measurement has 288 NaN or infinite numbers out of 288"),
    infinite=(dict(measurement=Y / 0), "NaN or infinite"),
    beyond_float32=(dict(measurement=Y.double().numpy() + 1e300), "measurement has 288 numbers too large for torch.float32 in this unit"),
    complex_tensor=(dict(measurement=Y + 0j), "measurement is complex"),
    complex_array=(dict(measurement=Y.numpy() + 0j), "measurement is complex"),
    text=(dict(measurement=[["a"]]), "measurement must hold numbers"),
    nothing=(dict(measurement=None), "measurement must hold numbers"),
    ragged=(dict(measurement=[[1, 2], [3]]), "measurement is not a rectangular array"),
    swapped=(dict(measurement=Y.T), "(24, 12), but (12, 24) is needed: its axes are swapped"),
    angles_missing=(dict(measurement=Y[1:]), "(11, 24), but (12, 24) is needed: pass data and operator that belong"),
    flat=(dict(measurement=Y.ravel()), "(288,), but (12, 24)"),
    empty=(dict(measurement=Y[:0]), "measurement is empty (shape (0, 24))"),
    not_an_operator=(dict(operator=A.matrix), "wrap it by dip_uq.operators.as_operator"),
    truth_shape=(dict(truth=np.zeros((15, 16))), "truth has shape (15, 16), but (16, 16) is needed"),
    truth_nan=(dict(truth=np.full((16, 16), np.nan)), "truth has 256 NaN"),
    negative_noise=(dict(noise_std=-1), "noise_std=-1 is out of range: it must be zero or more"),
    nan_noise=(dict(noise_std=float("nan")), "noise_std has 1 NaN"),
    noise_shape=(dict(noise_std=torch.ones(12)), "noise_std has shape (12,), but (12, 24) is needed"),
    noise_zero=(dict(noise_std=torch.arange(24)), "noise_std is 0 for some readings"),
    noise_below=(dict(noise_std=torch.arange(24) - 3), "noise_std has values below 0, the lowest -3"),
    valid_numbers=(dict(valid=np.ones(24)), "valid holds torch.float64; pass True and False"),
    valid_shape=(dict(valid=np.ones(12, bool)), "valid has shape (12,), but (12, 24) is needed"),
    nothing_valid=(dict(valid=np.zeros(24, bool)), "valid is False everywhere"),
    blank_shape=(dict(blank=torch.ones(3)), "blank has shape (3,)"),
    zero_pixel=(dict(pixel_size=0), "pixel_size=0 is out of range: it must be positive"),
    held_out_beyond=(dict(held_out=(12,)), "held_out=12 is out of range: choose 0 to 11"),
    held_out_negative=(dict(held_out=(-1,)), "held_out=-1 is out of range"),
    held_out_twice=(dict(held_out=(3, 3)), "held_out=(3, 3) names a projection twice"),
    held_out_all=(dict(held_out=range(12)), "are all projections: leave at least one"),
    held_out_number=(dict(held_out=3), "held_out=3 is no list of projections"),
    held_out_fraction=(dict(held_out=(1.5,)), "held_out must be a whole number, got 1.5"),
    held_out_flag=(dict(held_out=(True,)), "held_out must be a whole number, got True"),
    noise_flag=(dict(noise_std=True), "noise_std must be a number, got True"),
    counts_as_numbers=(dict(poisson=np.ones(12)), "pass True or False"),
    sparse=(dict(measurement=Y.to_sparse()), "measurement is a sparse, quantised or meta tensor"),
    meta=(dict(measurement=Y.to("meta")), "measurement is a sparse, quantised or meta tensor"),
    neighbour_noise=(dict(neighbour_noise=-1.0), "neighbour_noise=-1 is out of range"),
    unused_readings=(dict(unused=Y), "unused is a Tensor; pass a Scan"),
    unused_image=(dict(unused=Scan(torch.ones(2, 3), as_operator(torch.ones(6, 4), (2, 2), (2, 3)))),
                  "unused.operator.domain_shape has shape (2, 2), but (16, 16) is needed"),
)


@pytest.mark.parametrize("case", BAD_SCANS)
def test_bad_scan(case):
    fields, message = BAD_SCANS[case]
    with pytest.raises((ValueError, TypeError)) as error: Scan(**(dict(measurement=Y, operator=A) | fields))
    assert message in str(error.value)


def test_a_changed_scan_is_checked_again():
    scan = Scan(Y, A)
    with pytest.raises(ValueError, match="axes are swapped"): replace(scan, measurement=Y.T)
    with pytest.raises(AttributeError): scan.name = "changed"


@pytest.mark.parametrize("array", [Y.numpy()[::-1, ::-1], Y.numpy().astype(">f8"), Y.tolist(), Y.half(), Y.int()],
                         ids=["negative strides", "big-endian", "list", "half", "int"])
def test_arrays_become_float32(array):
    measurement = Scan(array, A).measurement
    assert measurement.dtype == torch.float32
    np.testing.assert_array_equal(measurement, np.asarray(array, np.float32))


@given(count=st.integers(2, 60), share=st.floats(0, 1))
def test_hold_out_partitions_and_spreads(count, share):
    scan = Scan(torch.arange(count * 3.).reshape(count, 3), as_operator(np.ones((count * 3, 4)), (2, 2), (count, 3)))
    n = round(share * (count - 1))
    scan = scan.hold_out(n)
    assert len(set(scan.held_out)) == n
    rows = [scan.training.measurement] + ([scan.validation.measurement] if n else [])
    assert sorted(torch.cat(rows)[:, 0].tolist()) == scan.measurement[:, 0].tolist()
    gaps = np.diff([-1, *scan.held_out, count])
    assert gaps.max() <= count / max(n, 1) + 1  # nowhere is a stretch without a check longer than a share


def test_parts_explain_their_measurements():
    truth = ellipses(16, 1)
    scan = simulate(truth, A, noise=0).hold_out(4)
    for part in scan.training, scan.validation:
        torch.testing.assert_close(part.operator(truth), part.measurement)


# Directions: position in a file means nothing

PERIOD = dict(parallel=180, fan=360)

def scan_of(kind, degrees, bins=200):
    "A scan with these angles, whose readings do not matter: half a degree apart its rays part by 0.9 pixels at the rim."
    g = Geometry(np.deg2rad(degrees), bins, 1., 1., *([600., 300.] if kind == "fan" else []))
    return Scan(np.zeros((len(degrees), bins)), RayTransform(sp.csr_array((len(degrees) * bins, 4)), (2, 2), g))


@st.composite
def repeated_angles(draw):
    "Some of 40 directions, each measured once or more, in any order, a few turns (or half ones, parallel) on."
    kind = draw(st.sampled_from(sorted(PERIOD)))
    one = draw(st.lists(st.integers(0, 39), min_size=2, max_size=20, unique=True))
    steps = draw(st.permutations(one + draw(st.lists(st.sampled_from(one), max_size=20))))
    turns = draw(st.lists(st.integers(-3, 3), min_size=len(steps), max_size=len(steps)))
    return kind, np.array(steps) * PERIOD[kind] / 40 + np.array(turns) * PERIOD[kind], draw(st.permutations(range(len(steps))))


def along(kind, degrees): return np.round(degrees * 40 / PERIOD[kind]).astype(int) % 40


@settings(deadline=None)
@given(repeated_angles(), st.floats(0, 1))
@example(("fan", np.array([0, 9, 18, 27, 36, 45, 54, 99, 135, 189.]), [9, 1, 2, 3, 4, 5, 6, 7, 8, 0]), 1.0)  # 9° and 189°: one place
def test_whole_directions_are_held_out_in_any_order(scanned, share):
    kind, degrees, order = scanned
    n = round(share * (len(degrees) - 1))
    scan, other = (scan_of(kind, d).hold_out(n) for d in (degrees, degrees[list(order)]))
    where = along(kind, degrees)
    held, fitted = set(where[list(scan.held_out)]), set(np.delete(where, scan.held_out))
    assert not held & fitted and scan.twins == 0
    assert len(held) == min(max(round(n * len(set(where)) / len(where)), n > 0), len(set(where)) - 1)
    assert held == set(along(kind, degrees[list(order)])[list(other.held_out)])


@settings(deadline=None)
@given(repeated_angles(), st.floats(0, 1))
def test_thinning_takes_directions_evenly_in_any_order(scanned, share):
    kind, degrees, order = scanned
    n = 1 + round(share * (len(degrees) - 1))
    times = []
    for d in degrees, degrees[list(order)]:
        which = along(kind, d)
        chosen = _thinned(scan_of(kind, d).directions, n)
        assert len(set(chosen)) == n
        times.append(np.bincount(which[chosen], minlength=40))
    assert np.array_equal(*times)
    stored, k = np.bincount(along(kind, degrees), minlength=40), times[0].max()
    assert (times[0] >= np.minimum(stored, k - 1)).all()  # none has k before each has k - 1, as far as there are so many


@given(st.sampled_from(sorted(PERIOD)), st.integers(2, 400), st.floats(0.1, 1), st.floats(0, 1))
def test_angles_in_order_from_zero_measured_once_go_by_position(kind, count, part, share):
    degrees = np.arange(count) / count * PERIOD[kind] * part
    n = round(share * (count - 1))
    scan = scan_of(kind, degrees).hold_out(n)
    if limited(scan.operator):
        ends = max(1, n // 4) if n > 2 else n // 2
        assert {*range(ends), *range(count - ends, count)} <= {*scan.held_out} and len(scan.held_out) == n
        inner, gap = np.array(scan.held_out)[ends:n - ends], (count - 2 * ends) / max(n - 2 * ends, 1)
        assert n < 3 or np.allclose(np.diff(inner), gap, atol=1)
    else: assert scan.held_out == tuple((2 * k + 1) * count // (2 * n) for k in range(n))
    np.testing.assert_array_equal(_thinned(scan.directions, n), np.arange(n) * count // max(n, 1))


@pytest.mark.parametrize("kind, offset, twins", [
    ("parallel", 180, True), ("parallel", 180.02, True), ("parallel", 181, False), ("parallel", 360, True),
    ("fan", 180, False), ("fan", 360.02, True), ("fan", 361, False)])
def test_what_twins_are(kind, offset, twins):
    "At the rim, 0.02° are 0.03 pixels and 1° is 1.7."
    degrees = np.arange(0, 160, 16.)
    assert scan_of(kind, np.append(degrees, degrees + offset)).directions.max() + 1 == (10 if twins else 20)


def test_opposite_views_of_a_narrow_fan_are_twins():
    "The rays of opposite views part by up to 12² pixels over the distance: half a pixel, or two."
    opposite = np.arange(20) * np.pi / 10
    far, near = (Geometry(opposite, 24, 1., 1., distance, 1e-6).directions for distance in (288., 72.))
    assert far.tolist() == 2 * list(range(10)) and near.tolist() == list(range(20))


def test_one_direction_alone_is_held_out_by_position_and_told():
    scan = scan_of("parallel", [30., 210., 30., 390.]).hold_out(1)
    assert (scan.held_out, scan.twins) == ((2,), 1)


STEPS = np.arange(0, 180, 3)
TO_THIN = {"interlaced": (np.concatenate([STEPS[k::15] for k in range(15)]), 15, STEPS[::4]),
           "two turns": (np.arange(60) * 12, 20, np.arange(30)[np.arange(20) * 30 // 20] * 12 % 180),
           "full turn": (np.arange(60) * 6, 30, np.arange(30) * 6)}


@pytest.mark.parametrize("case", TO_THIN)
def test_files_are_thinned_by_direction(case, tmp_path):
    "By position, interlaced angles gave 0 … 42° only, and two turns of 12° ten directions for twenty angles."
    degrees, n, expected = TO_THIN[case]
    np.savez(tmp_path / "scan.npz", measurement=np.outer(degrees, np.ones(24)), angles=degrees, geometry="parallel", bin_size=1,
             pixel_size=1, size=24)
    scan = load_scan(tmp_path / "scan.npz", angles=n)
    found = np.rad2deg(scan.operator.angles)
    np.testing.assert_allclose(scan.measurement[:, 0], found, rtol=1e-6, atol=1e-5)  # each with its own readings
    if case != "two turns": assert np.round(sorted(found % 180)).tolist() == sorted(expected)
    else: assert len(set(np.round(found % 180))) == 15  # of a parallel beam there are no more


def test_two_turns_of_a_fan_are_thinned_as_one(tmp_path):
    np.savez(tmp_path / "scan.npz", measurement=np.ones((60, 24)), angles=np.arange(60) * 12, geometry="fan", bin_size=1,
             pixel_size=1, size=24, source_origin=60, origin_detector=30)
    found = np.rad2deg(load_scan(tmp_path / "scan.npz", angles=20).operator.angles)
    assert sorted(np.round(found) % 360) == [12 * (k * 30 // 20) for k in range(20)]


# Phantoms and noise

@pytest.mark.parametrize("phantom", [ellipses, rectangles, walnut])
@settings(max_examples=15, deadline=None)
@given(size=st.integers(1, 50), seed=st.integers(0, 2**32))
def test_phantoms_at_any_size_and_seed(phantom, size, seed):
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    image = phantom(size, seed)
    assert image.shape == (size, size) and image.dtype == torch.float32
    assert 0 <= image.min() <= image.max() <= 1
    assert torch.equal(image, phantom(size, seed))
    assert np.array_equal(before[0], np.random.get_state()[1]) and torch.equal(before[1], torch.get_rng_state())


def test_walnuts_differ_and_hold_four_grey_values():
    nuts = [walnut(64, seed) for seed in range(6)]
    for i in range(6):
        for j in range(i): assert (nuts[i] - nuts[j]).abs().mean() > 0.1
    fine = walnut(256, 0)
    pure = sum(((fine - value).abs() < 1e-6).float().mean() for value in (0, 0.55, 0.75, 1))
    assert pure > 0.75  # the others lie on edges
    for value in 0, 0.55, 0.75, 1: assert ((fine - value).abs() < 1e-6).float().mean() > 0.005


def test_walnuts_stay_in_the_field_of_view():
    c = (torch.arange(96) + 0.5) / 48 - 1
    outside = torch.hypot(c[:, None], c[None]) > 1
    assert all(walnut(96, seed)[outside].max() == 0 for seed in range(16))


@pytest.mark.parametrize("call, message", [
    (lambda: shepp_logan(0), "size=0 is out of range: choose 1 or more"),
    (lambda: ellipses(-3), "size=-3"),
    (lambda: walnut(12.5), "size must be a whole number, got 12.5"),
    (lambda: gaussian_noise(Y, -0.1), "rel=-0.1 is out of range"),
    (lambda: gaussian_noise(Y / 0), "clean has"),
    (lambda: poisson_noise(Y, 0), "photons=0 is out of range: it must be positive"),
    (lambda: simulate(A, ellipses(16)), "operator is no LinearOperator"), (lambda: simulate(ellipses(16), A, seed=-1), "seed=-1 is out"),
    (lambda: simulate(ellipses(16), A, seed=1.5), "seed must be a whole number, got 1.5"),
    (lambda: poisson_noise(Y, seed=None), "seed must be a whole number, got None"),
    (lambda: simulate(ellipses(15), A), "truth has shape (15, 15), but (16, 16) is needed"),
    (lambda: simulate(ellipses(16), A, noise=-0.05), "noise=-0.05 is out of range: it must be zero or more"),
    (lambda: Scan(Y, A).hold_out(12), "n=12 is out of range: choose 0 to 11"),
    (lambda: Scan(Y, A).hold_out(-1), "n=-1 is out of range"),
    (lambda: Scan(Y, A).validation, "call scan.hold_out(n) first"),
])
def test_bad_arguments(call, message):
    with pytest.raises((ValueError, TypeError)) as error: call()
    assert message in str(error.value)


def test_rays_without_photons_are_finite():
    noisy, std = poisson_noise(torch.full((100,), 20.), photons=10)
    assert torch.equal(noisy, torch.full((100,), float(np.log(10)))) and std.isfinite().all()


# More than numbers: a mask, a unit, coordinates

MASKED = np.ma.masked_greater(Y.numpy(), float(Y.max()) / 2)


class Metres(np.ndarray): unit = "m"  # like astropy's


class Pint:
    "Like pint's: wraps an array, and lets numpy take it out."
    units = "degree"
    def __array__(self, *args, **kwargs): return np.arange(12.) * 30


class Labelled:
    "Like xarray's."
    dims, coords = ("angle", "bin"), {"angle": [0.]}
    def __array__(self, *args, **kwargs): return Y.numpy()


@pytest.mark.parametrize("call, message", [
    (lambda: Scan(list(MASKED), A), "measurement is masked"),
    (lambda: Scan(Y, A, noise_std=np.ma.masked), "noise_std is masked"),
    (lambda: Scan(Y, A, np.ma.masked_less(np.eye(16), 1)), "truth is masked"),
    (lambda: simulate(np.ma.masked_less(np.eye(16), 1), A), "truth is masked"),
    (lambda: gaussian_noise(MASKED), "clean is masked"), (lambda: poisson_noise(MASKED), "clean is masked"),
    (lambda: parallel_beam(np.ma.array([0, 1.], mask=[0, 1]), (4, 4), 5), "angles is masked"),
    (lambda: as_operator(np.ma.masked_less(np.eye(16), 1)), "matrix is masked"),
    (lambda: MatrixOperator(np.ma.masked_less(np.eye(16), 1), (4, 4), (16,)), "matrix is masked"),
    (lambda: mask(np.ma.array(np.ones((4, 4), bool), mask=np.eye(4))), "keep is masked"),
    (lambda: Scan(Y.numpy().view(Metres), A), "measurement is a Metres with a unit, which would be lost"),
    (lambda: as_operator(np.eye(16).view(Metres)), "matrix is a Metres with a unit"),
    (lambda: parallel_beam(Pint(), (4, 4), 5), "angles is a Pint with units, which would be lost"),
    (lambda: Scan(Labelled(), A), "measurement is a Labelled with coordinates, which would be lost")])
def test_more_than_numbers_is_refused(call, message):
    with pytest.raises(TypeError) as error: call()
    assert message in str(error.value) and ("leave these readings out" in str(error.value)) == ("masked" in message)


def test_masked_readings_are_missing():
    masked = Scan(MASKED, A, valid=np.arange(24) != 5)
    expected = ~np.ma.getmaskarray(MASKED) & (np.arange(24) != 5)
    assert np.array_equal(masked.valid, expected) and not masked.measurement[~masked.valid].any()
    assert torch.equal(masked.measurement[masked.valid], torch.as_tensor(MASKED.data)[masked.valid])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.floats(0.01, 100))
def test_noise_is_evened_out_once(seed, level):
    "Weighted squares are those of the scan with equal noise; parts and permutations of it, too; a second time nothing changes."
    rng = np.random.default_rng(seed)
    noise, valid, x = level * rng.uniform(0.1, 10, Y.shape), rng.random(Y.shape) < 0.8, torch.rand(16, 16)
    scan = Scan(np.where(valid, Y.numpy(), np.nan), A, noise_std=noise, valid=valid)
    expected = (((A(x) - Y).numpy() / noise)**2)[valid].sum()
    white, order = scan.white, rng.permutation(12)
    assert float(((white.operator(x) - white.measurement) / white.noise_std).square().sum()) == pytest.approx(expected, rel=1e-4)
    assert torch.equal(white.white.measurement, white.measurement) and white.white.noise_std == white.noise_std
    part = scan._part(order.tolist()[:7])
    left = scan.hold_out(3)
    total = sum(float((((s.operator(x) - s.measurement) * s.valid) / s.noise_std).square().sum()) for s in (left.training, left.validation))
    assert total == pytest.approx(expected, rel=1e-4) and torch.equal(part.valid, scan.valid[order[:7]])


def test_arrays_that_are_numbers_alone_are_read(tmp_path):
    "Also those in which nothing is masked, and files of numbers that are mapped into memory."
    np.save(tmp_path / "y.npy", Y.numpy())
    for array in np.ma.array(Y.numpy()), np.load(tmp_path / "y.npy", mmap_mode="r"), np.matrix(Y.numpy()):
        assert torch.equal(Scan(array, A).measurement, Y)


# Numbers in other clothes

def test_one_number_in_an_array_is_a_number(npz, tmp_path):
    "And one held-out projection is a list of one, as MATLAB writes them."
    scan = Scan(Y, A, noise_std=torch.tensor([[0.5]]), pixel_size=[1.5], held_out=np.array(3))
    assert (scan.noise_std, scan.pixel_size, scan.held_out) == (0.5, 1.5, (3,))
    np.savez(tmp_path / "scan.npz", **dict(np.load(npz)) | dict(held_out=3, pixel_size=[[1.]], noise_std=[0.1]))
    scan = load_scan(tmp_path / "scan.npz")
    assert (scan.noise_std, scan.pixel_size, scan.held_out) == (0.1, 1, (3,))
    with pytest.raises(TypeError, match="held_out must be a whole number"): Scan(Y, A, held_out=np.array(3.5))


def test_measurements_have_no_gradient():
    "They are what was measured; what made them is not part of the fit."
    scan = Scan(Y.clone().requires_grad_() * 1, A, torch.zeros(16, 16, requires_grad=True))
    assert not scan.measurement.requires_grad and not scan.truth.requires_grad and torch.equal(scan.measurement, Y)


def test_a_scan_keeps_its_own_truth():
    truth = ellipses(16, 1)
    scan = Scan(Y, A, truth)
    truth += 1
    assert torch.equal(scan.truth, ellipses(16, 1))


# Files: .npz

def test_what_is_no_path_is_refused():
    with pytest.raises(TypeError, match="path=None is no path; pass a string or a Path"): load_scan(None)
    with pytest.raises(TypeError, match="path=None is no path; pass a string or a Path"): save_scan(Scan(Y, A), None)


def test_a_full_disk_leaves_the_earlier_scan(tmp_path, monkeypatch):
    "Written whole or not at all, in a new folder if need be."
    save_scan(Scan(Y, A), path := tmp_path / "new" / "scan.npz")
    def full(part, data): raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"): save_scan(Scan(2 * Y, A), path)
    assert torch.equal(load_scan(path).measurement, Y) and list(path.parent.iterdir()) == [path]


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    path = tmp_path_factory.mktemp("npz") / "scan.npz"
    save_scan(replace(simulate(ellipses(16, 1), A, 0.05), unit="1/mm", name="small").hold_out(2), path)
    return path


@settings(max_examples=20, deadline=None)
@given(fan=st.booleans(), count=st.integers(2, 9), bins=st.integers(1, 9), size=st.integers(1, 9),
       bin_size=st.floats(0.1, 3), noise=st.none() | st.floats(0, 1), held=st.integers(0, 1), truth=st.booleans(),
       rays=st.integers(1, 3))
def test_round_trip(tmp_path_factory, fan, count, bins, size, bin_size, noise, held, truth, rays):
    beam = partial(fan_beam, source_origin=70., origin_detector=20.) if fan else parallel_beam
    operator = beam(np.arange(count) / 3, (size, size), bins, bin_size=bin_size, pixel_size=0.7, rays_per_bin=rays)
    image = ellipses(size, 3)
    scan = Scan(operator(image), operator, image if truth else None, noise, range(held), 0.7, "1/mm", "µ")
    path = tmp_path_factory.mktemp("trip") / "scan.npz"
    save_scan(scan, path)
    again = load_scan(path)
    assert torch.equal(again.measurement, scan.measurement)
    assert (again.truth is None) == (not truth) and (not truth or torch.allclose(again.truth, image, atol=1e-6))
    for key in "noise_std", "held_out", "pixel_size", "unit", "name": assert getattr(again, key) == getattr(scan, key)
    torch.testing.assert_close(again.operator(image), operator(image), rtol=1e-4, atol=1e-4)


def jittering(count, bins, shape, pixel_size, fan, rays=1, seed=0):
    "A scanner that turns, as well as it can."
    rng, angles = np.random.default_rng(seed), np.arange(count) / 3
    distances = (70., 20.) if fan else ()
    source, detector, step = Geometry(angles, bins, 1.2, 1., *distances).vectors()
    moved = ((source, .1), (detector, 1), (step, .1))
    source, detector, step = (v + size * rng.standard_normal(v.shape) for v, size in moved)
    return vector_beam(source, detector, step, shape, bins, pixel_size, fan, rays)


@settings(max_examples=20, deadline=None)
@given(fan=st.booleans(), count=st.integers(2, 9), bins=st.integers(1, 9),
       shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
       pixel_size=st.floats(0.3, 2) | st.tuples(st.floats(0.3, 2), st.floats(0.3, 2)), rays=st.integers(1, 3))
def test_round_trip_of_views_by_themselves(tmp_path_factory, fan, count, bins, shape, pixel_size, rays):
    operator, path = jittering(count, bins, shape, pixel_size, fan, rays), tmp_path_factory.mktemp("trip") / "scan.npz"
    image = torch.from_numpy(np.random.default_rng(0).random(shape).astype("float32"))
    save_scan(Scan(operator(image), operator, image), path)
    again = load_scan(path)
    assert torch.equal(again.operator(image), operator(image)) and again.operator.geometry.fan == fan
    assert torch.allclose(again.truth, image, atol=1e-6) and np.all(again.pixel_size == np.array(pixel_size))


@pytest.mark.parametrize("counts", [False, True])
def test_what_is_left_out_is_a_witness(counts, tmp_path):
    "Four projections along none of the directions that are used; with the same bins, noise and missing readings."
    operator = parallel_beam(np.arange(24) * np.pi / 12, (16, 16), 24)  # a full turn, so each direction twice
    y, valid = operator(ellipses(16, 1)), np.arange(24) != 7
    kind = dict(blank=500.0, counts=500 * np.exp(-y.numpy())) if counts else dict(measurement=y, noise_std=np.linspace(1, 2, 24))
    np.savez(tmp_path / "scan.npz", angles=np.arange(24) * 15., geometry="parallel", bin_size=1., pixel_size=1., size=16,
             valid=valid, **kind)
    scan = load_scan(tmp_path / "scan.npz", angles=6, bins=12)
    used, unused = (np.round(np.rad2deg(s.operator.angles) % 180).astype(int) for s in (scan, scan.unused))
    assert len(unused) == 4 and not {*used} & {*unused}
    rows = np.round(np.rad2deg(scan.unused.operator.angles) / 15).astype(int)
    expected = operator(ellipses(16, 1))[rows].view(4, 12, 2).mean(-1) * torch.from_numpy(valid.reshape(12, 2).all(1))
    if not counts: assert torch.allclose(scan.unused.measurement, expected, atol=1e-5)
    assert (scan.unused.valid == scan.valid[0]).all() and scan.unused.poisson == counts and scan.unused.truth is None
    assert load_scan(tmp_path / "scan.npz").unused is None and widened(scan).unused.operator.domain_shape == (24, 24)
    few = load_scan(tmp_path / "scan.npz", angles=11)  # of twelve directions
    assert len({round(a, 6) for a in few.unused.operator.angles % np.pi}) == 1


BAD_VIEWS = dict(
    no_detector=(dict(detector=None), "has no 'detector'"),
    short=(dict(step=np.ones((11, 2))), "step has shape (11, 2), but (12, 2)"),
    turned=(dict(step=np.ones((2, 12))), "step has shape (2, 12), but (12, 2) is needed: its axes are swapped"),
    nan=(dict(source=np.full((12, 2), np.nan)), "source has 24 NaN"),
    text=(dict(source=np.full((12, 2), "a")), "must hold numbers"),
    zero=(dict(step=np.zeros((12, 2))), "step=[0. 0.] and source="),
    inside=(dict(source=np.zeros((12, 2))), "source of view 0 is inside"),
    angles=(dict(angles=np.arange(12)), "angles and source, detector, step both say"),
    geometry=(dict(geometry="cone"), "geometry='cone' must be"), bins=(dict(measurement=np.ones(12)), "(views, bins) are needed"))

@pytest.mark.parametrize("case", BAD_VIEWS)
def test_bad_views(case, tmp_path):
    operator, (changes, message) = jittering(12, 24, (8, 16), (2., 1.), True), BAD_VIEWS[case]
    save_scan(Scan(torch.ones(12, 24), operator), tmp_path / "scan.npz")
    fields = {k: v for k, v in (dict(np.load(tmp_path / "scan.npz")) | changes).items() if v is not None}
    np.savez(tmp_path / "bad.npz", **fields)
    with pytest.raises((ValueError, TypeError)) as error: load_scan(tmp_path / "bad.npz")
    assert message in str(error.value) and "bad.npz" in str(error.value) and "\n" not in str(error.value)


def test_views_by_themselves_are_thinned_and_held_out_by_direction(tmp_path):
    "Also where a view was measured twice, from the two sides (parallel) or from one (fan)."
    for fan in (False, True):
        g = jittering(12, 24, (8, 16), (2., 1.), fan).geometry
        twice = Views(*(np.concatenate([v, v if fan or k else -v]) for k, v in enumerate(g.vectors())), 24, (2., 1.), fan)
        assert np.array_equal(twice.directions, np.tile(g.directions, 2)) and len(set(g.directions)) == 12
        operator = vector_beam(*twice.vectors(), (8, 16), 24, (2., 1.), fan)
        scan = Scan(operator(torch.ones(8, 16)), operator).hold_out(4)
        assert scan.twins == 0 and {k % 12 for k in scan.held_out} == set(scan.held_out[:len(scan.held_out) // 2])
        save_scan(scan, tmp_path / "scan.npz")
        few = load_scan(tmp_path / "scan.npz", angles=6)
        assert len(set(few.operator.geometry.directions)) == 6 and not limited(operator)
        assert not any(word in doubt for doubt in doubts(few) for word in ("wedge", "units"))
        assert abs(operator.geometry.gaps.sum() - np.pi) < 1e-9


def test_files_of_views_are_no_business_of_import(tmp_path):
    save_scan(Scan(torch.ones(12, 24), jittering(12, 24, (8, 16), 1., True)), tmp_path / "scan.npz")
    with pytest.raises(ValueError, match="scan.npz: this says where each view's source and detector are"):
        import_fields(tmp_path / "scan.npz")


@pytest.mark.parametrize("beam", [partial(parallel_beam, bin_size=1.5),
                                  partial(fan_beam, bin_size=2., source_origin=90., origin_detector=60.)])
def test_the_axis_is_kept_to_a_fraction_of_a_bin(beam, tmp_path):
    "A shift by less than half a bin used to be lost."
    operator = beam(np.arange(9) / 3, (16, 16), 24, centre=11.8)
    save_scan(Scan(torch.ones(9, 24), operator), tmp_path / "scan.npz")
    assert load_scan(tmp_path / "scan.npz").operator.geometry.centre == 11.8


REQUIRED = "measurement", "angles", "geometry", "bin_size", "pixel_size", "size", "source_origin", "origin_detector"
BAD_NPZ = {f"no {key}": ({key: None}, f"has no {key!r}") for key in REQUIRED} | dict(
    nan=(dict(measurement=np.full((12, 24), np.nan)), "measurement has 288 NaN"),
    complex=(dict(measurement=np.ones((12, 24)) * 1j), "measurement is complex"),
    text=(dict(measurement=np.full((12, 24), "1")), "measurement must hold numbers"),
    zero_rays=(dict(measurement=np.zeros((0, 24)), angles=np.zeros(0)), "measurement is empty (shape (0, 24))"),
    one_row=(dict(measurement=np.zeros(24)), "one row of bins per angle is needed"),
    angle_count=(dict(angles=np.arange(11)), "one angle per row is needed"),
    swapped=(dict(measurement=np.zeros((24, 12))), "its axes are swapped, transpose it"),
    angles_nan=(dict(angles=np.full(12, np.nan)), "angles has 12 NaN"),
    geometry=(dict(geometry="cone"), "geometry='cone' must be 'parallel' or 'fan'"),
    bin_size=(dict(bin_size=0), "bin_size=0 is out of range: it must be positive"),
    pixel_size=(dict(pixel_size=-2.), "pixel_size=-2 is out of range"),
    pixel_sizes=(dict(pixel_size=[1., 1., 1.]), "pixel_size has shape (3,), but () is needed"),
    flat_pixels=(dict(pixel_size=[1., 0.]), "pixel_size=0 is out of range"),
    sizes=(dict(size=[16, 16, 16]), "size=[16, 16, 16]: give one number, or rows and columns"),
    oblong=(dict(size=[8, 16], truth=np.zeros((16, 8))), "truth has shape (16, 8), but (8, 16) is needed: its axes"),
    step_alone=(dict(step=np.ones((12, 2)), angles=None, bin_size=None, source_origin=None, origin_detector=None,
                     centre=None), "has no 'source'"),
    both=(dict(source=np.ones((12, 2)), centre=None),
          "angles, bin_size, origin_detector, source_origin and source, detector, step both say"),
    rays=(dict(rays_per_bin=0), "rays_per_bin=0 is out of range: choose 1 or more"),
    rays_fraction=(dict(rays_per_bin=1.5), "rays_per_bin must be a whole number"),
    source=(dict(source_origin=np.inf), "source_origin has 1 NaN or infinite"),
    size=(dict(size=0), "size=0 is out of range"),
    size_fraction=(dict(size=16.5), "size must be a whole number"),
    truth=(dict(truth=np.zeros((15, 16))), "truth has shape (15, 16), but (16, 16)"),
    noise=(dict(noise_std=-1), "noise_std=-1 is out of range"),
    unknown=(dict(noise=0.1), "unknown field 'noise', did you mean 'noise_std';"),
    unknown_too=(dict(detector_offset=1., comment="x"), "unknown field 'comment'"),
    spelling=(dict(rays_per_bins=2), "unknown field 'rays_per_bins', did you mean 'rays_per_bin';"),
    held_out_scalar=(dict(held_out=12), "held_out=12 is out of range: choose 0 to 11"),
    held_out=(dict(held_out=[12]), "held_out=12 is out of range: choose 0 to 11"),
    pickled=(dict(truth=np.array([{}])), "cannot be read as .npz: Object arrays cannot be loaded"),
)


@pytest.mark.parametrize("case", BAD_NPZ)
def test_bad_npz(case, npz, tmp_path):
    changes, message = BAD_NPZ[case]
    fields = {key: value for key, value in (dict(np.load(npz)) | changes).items() if value is not None}
    np.savez(tmp_path / "bad.npz", **fields)
    with pytest.raises((ValueError, TypeError)) as error: load_scan(tmp_path / "bad.npz")
    assert message in str(error.value) and "bad.npz" in str(error.value)


@pytest.mark.parametrize("options, message", [
    (dict(angles=13), "angles=13 is out of range: choose 1 to 12"), (dict(angles=0), "angles=0 is out of range"),
    (dict(angles=2.5), "angles must be a whole number"), (dict(size=0), "size=0 is out of range: choose 1 to 16"),
    (dict(size=17), "size=17 is out of range: choose 1 to 16"), (dict(size=-4), "size=-4"),
    (dict(bins=7), "bins=7 does not divide the 24 bins"), (dict(bins=0), "bins=0 is out of range"),
])
def test_bad_options(npz, options, message):
    with pytest.raises((ValueError, TypeError)) as error: load_scan(npz, **options)
    assert message in str(error.value)


def test_bad_files(npz, tmp_path):
    (tmp_path / "empty.npz").touch()
    (tmp_path / "text.npz").write_text("measurement = 1")
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(dict(measurement=1)))
    (tmp_path / "scan.csv").write_bytes(npz.read_bytes())
    np.save(tmp_path / "array.npy", np.ones(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    messages = {"none.npz": "is not a file", "": "there are no TIFF files", "empty.npz": "is empty (0 bytes)",
                "text.npz": "is no .npz archive", "pickle.npz": "is no .npz archive", "array.npz": "is no .npz archive",
                "scan.csv": "ends in '.csv'; use one of folder, .tif"}
    for name, message in messages.items():
        with pytest.raises(ValueError) as error: load_scan(tmp_path / name)
        assert message in str(error.value) and name in str(error.value)


class Trap:
    def __reduce__(self): return open, (os.environ["TRAP"], "w")


def test_a_file_runs_no_code(npz, tmp_path, monkeypatch):
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    trap = np.empty(1, object)
    trap[0] = Trap()
    np.savez(tmp_path / "trap.npz", **(dict(np.load(npz)) | dict(name=trap)))
    with pytest.raises(ValueError, match="allow_pickle=False"): load_scan(tmp_path / "trap.npz")
    assert not (tmp_path / "sprung").exists()
    np.load(tmp_path / "trap.npz", allow_pickle=True)["name"]
    assert (tmp_path / "sprung").exists()  # the trap works, had the file been trusted


def attempt(path):
    "A scan, or an error that names the file."
    try: return load_scan(path)
    except (ValueError, TypeError) as error: assert path.name in str(error), error


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_npz(npz, share):
    content = npz.read_bytes()
    cut = npz.with_name("cut.npz")
    cut.write_bytes(content[:int(share * len(content))])
    assert attempt(cut) is None


@settings(max_examples=60, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_damaged_npz(npz, where, value):
    content = bytearray(npz.read_bytes())
    content[int(where * len(content))] = value
    damaged = npz.with_name("damaged.npz")
    damaged.write_bytes(content)
    attempt(damaged)


def test_what_does_not_fit_the_layout(tmp_path):
    matrix = as_operator(A.matrix, (16, 16), (12, 24))
    with pytest.raises(ValueError, match="only a RayTransform fits"): save_scan(Scan(Y, matrix), tmp_path / "scan.npz")
    with pytest.raises(ValueError, match="must end in .npz"): save_scan(Scan(Y, A), tmp_path / "scan.mat")
    assert not list(tmp_path.iterdir())


def test_averaged_bins_have_averaged_rays(npz):
    "The rays of the bins that were stored, also where these were means already."
    stored, some = load_scan(npz), load_scan(npz, bins=8)
    y = stored.operator(stored.truth)
    assert torch.allclose(some.operator(stored.truth), y.view(len(y), 8, 3).mean(-1), atol=1e-5)
    assert some.operator.geometry.rays_per_bin == 3 * stored.operator.geometry.rays_per_bin


def test_angles_leave_out_held_out(npz):
    assert load_scan(npz).held_out == (3, 9)
    less = load_scan(npz, angles=4)
    assert less.held_out == ()
    np.testing.assert_allclose(np.rad2deg(less.operator.angles), [0, 90, 180, 270], atol=1e-9)


# Files: Helsinki Tomography Challenge

@pytest.fixture(scope="module")
def mat(tmp_path_factory):
    "A small file like those of the challenge: 25 projections of 140 bins, the last repeats the first; truth 512 × 512."
    folder, pixel = tmp_path_factory.mktemp("mat"), 0.2 * 410.66 / 553.74
    beam = fan_beam(np.deg2rad(np.arange(25) * 15.), (64, 64), 140, 0.2, 410.66, 553.74 - 410.66, 8 * pixel)
    truth = ellipses(512, 1) * 0.01
    small = torch.from_numpy(resize_local_mean(truth.numpy(), (64, 64)))
    parameters = dict(angles=np.arange(25) * 15., distanceSourceOrigin=410.66, distanceSourceDetector=553.74,
                      pixelSizePost=0.2)
    struct = {"type": "2d", "sinogram": beam(small).double().numpy(), "parameters": parameters}
    savemat(folder / "htc2022_zz_full.mat", dict(CtDataFull=struct), do_compression=True)
    published = dict(reconFullFbp=truth.double().numpy() * pixel)
    savemat(folder / "htc2022_zz_full_recon_fbp.mat", published, do_compression=True)
    return folder / "htc2022_zz_full.mat"


def test_mat(mat):
    scan = load_scan(mat, angles=24, size=64, bins=140)
    assert scan.name == "htc2022_zz" and scan.unit == "1/mm" and scan.noise_std is None
    np.testing.assert_allclose(np.rad2deg(scan.operator.angles), np.arange(24) * 15., atol=1e-9)  # 360° repeats 0°
    assert scan.pixel_size == pytest.approx(8 * 0.2 * 410.66 / 553.74)
    torch.testing.assert_close(scan.operator(scan.truth), scan.measurement, rtol=1e-4, atol=1e-4)  # made by that model


def test_mat_without_reconstruction(mat, tmp_path):
    (tmp_path / mat.name).write_bytes(mat.read_bytes())
    assert load_scan(tmp_path / mat.name, angles=3, size=16).truth is None


BAD_MAT = {f"no {key}": ({}, {key: None}, f"has no {key!r}") for key in
           ("angles", "distanceSourceOrigin", "distanceSourceDetector", "pixelSizePost")} | dict(
    no_sinogram=(dict(sinogram=None), {}, "has no 'sinogram'"),
    no_parameters=(dict(parameters=5.), {}, "has no 'angles'"),
    swapped=(dict(sinogram=np.ones((140, 25))), {}, "its axes are swapped"),
    rows=(dict(sinogram=np.ones((24, 140))), {}, "one angle per row is needed"),
    nan=(dict(sinogram=np.full((25, 140), np.nan)), {}, "measurement has 3500 NaN"),
    complex=(dict(sinogram=np.ones((25, 140)) * 1j), {}, "measurement is complex"),
    text=(dict(sinogram="many numbers"), {}, "measurement must hold numbers"),
    empty=(dict(sinogram=np.zeros((0, 140))), dict(angles=np.zeros(0)), "measurement is empty"),
    distance=({}, dict(distanceSourceOrigin=-1.), "distanceSourceOrigin=-1 is out of range"),
    detector=({}, dict(distanceSourceDetector=400.), "origin_detector=-10.66 is out of range"),
    words=({}, dict(pixelSizePost="small"), "pixelSizePost must hold numbers"),
)


@pytest.mark.parametrize("case", BAD_MAT)
def test_bad_mat(case, mat, tmp_path):
    data_changes, parameter_changes, message = BAD_MAT[case]
    struct = loadmat(mat, simplify_cells=True)["CtDataFull"]
    parameters = {k: v for k, v in (struct["parameters"] | parameter_changes).items() if v is not None}
    struct = {k: v for k, v in (struct | dict(parameters=parameters) | data_changes).items() if v is not None}
    savemat(tmp_path / "bad.mat", dict(CtDataFull=struct), do_compression=True)
    with pytest.raises((ValueError, TypeError)) as error: load_scan(tmp_path / "bad.mat", angles=3, size=8)
    assert message in str(error.value) and "bad.mat" in str(error.value)


def test_other_mat(mat, tmp_path):
    savemat(tmp_path / "other.mat", dict(x=1), do_compression=True)
    savemat(tmp_path / "raw.mat", dict(CtDataFull=1))
    (tmp_path / "text.mat").write_text("not MATLAB\n" * 50)
    (tmp_path / "empty.mat").touch()
    (tmp_path / "v73.mat").write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(600))
    for name, message in {"other.mat": "has no 'CtDataFull'", "text.mat": "cannot be read as a MATLAB file",
                          "empty.mat": "is empty", "v73.mat": "not MATLAB's format 5", "raw.mat": "not compressed",
                          "none.mat": "is not a file"}.items():
        with pytest.raises(ValueError) as error: load_scan(tmp_path / name)
        assert message in str(error.value) and name in str(error.value)
    (tmp_path / mat.name).write_bytes(mat.read_bytes())
    savemat(tmp_path / f"{mat.stem}_recon_fbp.mat", dict(reconFullFbp=np.zeros((256, 512))), do_compression=True)
    with pytest.raises(ValueError, match="but .512, 512. is needed"): load_scan(tmp_path / mat.name, angles=3)


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_mat(mat, share):
    content = mat.read_bytes()
    cut = mat.with_name("cut.mat")
    cut.write_bytes(content[:int(share * len(content))])
    with pytest.raises(ValueError, match="cut.mat"): load_scan(cut, angles=2, size=4)


@settings(max_examples=40, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_damaged_mat(mat, where, value):
    content = bytearray(mat.read_bytes())
    content[int(where * len(content))] = value
    damaged = mat.with_name("damaged.mat")
    damaged.write_bytes(content)
    try: load_scan(damaged, angles=2, size=4)
    except (ValueError, TypeError) as error: assert "damaged.mat" in str(error), error


@pytest.mark.parametrize("options, message", [
    (dict(angles=25), "angles=25 is out of range: choose 1 to 24"), (dict(size=513), "size=513 is out of range"),
    (dict(size=0), "size=0"), (dict(bins=9), "bins=9 does not divide the 140 bins"),
    (dict(angles=None), "angles must be"),
])
def test_bad_htc_options(mat, options, message):
    with pytest.raises((ValueError, TypeError)) as error: load_htc2022(mat, **(dict(angles=3, size=8) | options))
    assert message in str(error.value)


def test_htc_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DIP_UQ_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="htc2022_ta_full.mat is not a file"): load_htc2022("ta")
    with pytest.raises(ValueError, match="elsewhere.*htc2022_tb_full.mat is not"):
        load_htc2022("tb", folder=tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="tz is not a file"): load_htc2022("tz")


@pytest.fixture
def server(tmp_path, monkeypatch):
    "A place to download from, instead of Zenodo; its folder."
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), dict(log_message=lambda *_: None))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path))) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        monkeypatch.delenv("DIP_UQ_DATA", raising=False)
        monkeypatch.setattr(scans._HTC, "base_url", f"http://127.0.0.1:{http_server.server_address[1]}/")
        monkeypatch.setattr(scans._HTC, "path", tmp_path / "cache")
        monkeypatch.setattr(scans._HTC, "retry_if_failed", 0)
        yield tmp_path
        http_server.shutdown()


def test_download(server, mat, monkeypatch):
    registry = {}
    for file in mat, mat.with_name(f"{mat.stem}_recon_fbp.mat"):
        name = file.name.replace("zz", "ta")
        (server / name).write_bytes(file.read_bytes())
        registry[name] = pooch.file_hash(file)
    monkeypatch.setattr(scans._HTC, "registry", registry)
    scan = load_htc2022("ta", angles=4, size=16)
    assert scan.truth is not None and scan.measurement.shape[0] == 4
    assert len(list((server / "cache").iterdir())) == 2


def test_download_fails(server):
    with pytest.raises(ValueError, match="could not be downloaded .*DIP_UQ_DATA"): load_htc2022("ta")
    (server / "htc2022_tb_full.mat").write_bytes(b"something else")
    with pytest.raises(ValueError, match="could not be downloaded .*hash"): load_htc2022("tb")


@needs_htc
@pytest.mark.parametrize("name, share", [("ta", 0.035), ("tb", 0.040)])
def test_htc_units_and_orientation(name, share):
    "The published image explains the measurement in 1/mm as it is; turned, mirrored or off by one angle it does not."
    scan = load_htc2022(name, folder=HTC)
    def misfit(image): return ((scan.operator(image) - scan.measurement).norm() / scan.measurement.norm()).item()
    assert misfit(scan.truth) == pytest.approx(share, abs=0.002)
    others = [scan.truth.rot90(k) for k in (1, 2, 3)] + [scan.truth.flip(0), scan.truth.flip(1), scan.truth.T]
    assert min(map(misfit, others)) > 2 * share


@needs_htc
def test_htc_numbers():
    raw = loadmat(HTC / "htc2022_ta_full.mat", simplify_cells=True)["CtDataFull"]["sinogram"]
    scan = load_htc2022("ta", angles=7, size=32, folder=HTC)
    assert scan.measurement.shape == (7, 35)  # the divisor of 560 next to 1.1 × 32
    rows = np.arange(7) * 720 // 7
    np.testing.assert_allclose(scan.measurement, raw[rows].reshape(7, 35, 16).mean(-1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.rad2deg(scan.operator.angles), rows / 2, atol=1e-9)
    published = loadmat(HTC / "htc2022_ta_full_recon_fbp.mat")["reconFullFbp"]
    blocks = published.reshape(32, 16, 32, 16).mean((1, 3)) / 0.1483223173330444
    np.testing.assert_allclose(scan.truth, blocks, rtol=1e-4, atol=1e-6)
    assert load_htc2022("ta", angles=2, size=128, folder=HTC).measurement.shape == (2, 140)


@needs_htc
def test_htc_disc_has_no_truth():
    assert load_htc2022("solid_disc", angles=2, size=16, folder=HTC).truth is None


@needs_htc
def test_htc_hashes():
    for name, known in scans._HTC.registry.items(): assert pooch.file_hash(HTC / name) == known


def test_directions_of_an_arc_that_is_seen_from_both_sides():
    "102 projections along 51 lines, 20 degrees wide: rounding at the end of the half turn must not make them one."
    d = np.arange(-10, 10.01, 0.4)
    g = parallel_beam(np.deg2rad(np.r_[d, 180 + d]), (64, 64), 128).geometry
    assert len(set(g.directions)) == 51 and (np.bincount(g.directions) == 2).all()


def test_dense_angles_are_not_one_direction():
    "A hundred angles within ten degrees, a hundred in the rest: neighbours may be twins, but not all of a long row."
    degrees = np.r_[np.linspace(0, 10, 100), np.linspace(10.9, 180, 100, endpoint=False)]
    g = parallel_beam(np.deg2rad(degrees), (128, 128), 180).geometry
    for k in range(g.directions.max() + 1): assert np.ptp(degrees[g.directions == k]) < np.rad2deg(1 / 90)


def test_what_is_held_out_was_measured_least():
    "Of 14 directions one was measured 101 times: two of the others are held out, wherever it is."
    for often in range(14):
        A = parallel_beam(np.r_[np.arange(14), [often] * 100] * np.pi / 14, (8, 8), 12)
        scan = simulate(walnut(8), A).apart()
        assert len(scan.held_out) <= 3 and often not in scan.held_out


def test_distances_are_not_ignored_where_rays_are_said_to_be_parallel(tmp_path):
    np.savez(tmp_path / "scan.npz", measurement=np.ones((6, 24)), angles=np.arange(6) * 30, geometry="parallel", bin_size=1,
             pixel_size=1, size=16, source_origin=80)
    with pytest.raises(ValueError, match="source_origin is for geometry='fan', but geometry is 'parallel'"):
        load_scan(tmp_path / "scan.npz")


def test_a_scan_stays_as_it_was_made():
    "Whatever becomes of the tensor that it was made from, and of torch's default type; its texts are texts."
    A = parallel_beam(np.arange(6) * np.pi / 6, (8, 8), 12)
    y = torch.ones(6, 12)
    scan = Scan(y, A)
    y.mul_(5)
    assert scan.measurement.max() == 1
    mark = scan.fingerprint()
    torch.set_default_dtype(torch.float64)
    try: assert torch.equal(scan.fingerprint(), mark)
    finally: torch.set_default_dtype(torch.float32)
    for field in "name", "unit":
        with pytest.raises(TypeError, match=f"^{field}=.*: pass a string"): replace(scan, **{field: ["no", "text"]})


# What the tester of the library met

HEALTHY = [np.deg2rad(np.arange(n) * arc / n) for n in (3, 5, 12, 30, 181, 720) for arc in (40, 90, 120, 150, 180, 220, 360, 720)]
HEALTHY += [np.deg2rad(np.arange(300) * 111.246), np.deg2rad(np.arange(-76, 77, 2)), np.deg2rad(np.arange(0, 179.01, 0.994))]
HEALTHY += [np.deg2rad(np.random.default_rng(seed).uniform(0, 180, n)) for seed in range(5) for n in (5, 20, 100)]


def test_units_of_angles():
    "Degrees where radians are needed, and the other way round; never where they are right."
    assert not any(map(in_the_other_unit, HEALTHY))
    spans = [(180, 180), (180, 9), (360, 50), (360, 36), (90, 30)]
    degrees = [np.linspace(0, span, n, endpoint=end) for span, n in spans[:4] for end in (True, False)] + [np.arange(30) * 3.0]
    radians = [np.deg2rad(np.linspace(0, turns * np.pi, 20, endpoint=end)) for turns in (1, 2, 4) for end in (True, False)]
    assert all(map(in_the_other_unit, degrees + radians))


@pytest.mark.parametrize("arc, expected", [(40, True), (100, True), (140, True), (160, False), (180, False), (360, False)])
def test_a_missing_wedge_is_told(arc, expected):
    A = parallel_beam(np.deg2rad(np.arange(18) * arc / 18), (16, 16), 24)
    told = doubts(simulate(ellipses(16, 3), A, 0.05))
    assert limited(A) == expected == any("looks along a wedge" in doubt for doubt in told)


def test_few_projections_are_no_wedge():
    assert not any(limited(parallel_beam(np.arange(n) * np.pi / n, (8, 8), 9)) for n in range(2, 9))
    assert not limited(fan_beam(np.deg2rad(np.arange(40) * 5), (8, 8), 9, 1.0, 30, 30))
    assert limited(fan_beam(np.deg2rad(np.arange(40) * 3), (8, 8), 9, 1.0, 30, 30))


@pytest.mark.parametrize("level", [0.6, 0.7, 0.8])
def test_a_saturated_detector_is_told(level):
    scan = simulate(walnut(24, 1), parallel_beam(np.arange(20) * np.pi / 20, (24, 24), 36), 0.05)
    told = doubts(replace(scan, measurement=scan.measurement.clamp(max=level * scan.measurement.max()), noise_std=None))
    assert any("is the detector saturated" in doubt for doubt in told) and not any("dead" in doubt for doubt in told)
    assert doubts(scan) == []


def test_whole_turns_change_nothing():
    "Nor does half a turn of a parallel beam: the same projections are held out."
    angles, rng = np.arange(18) * np.pi / 18, np.random.default_rng(0)
    def held(a): return Scan(torch.ones(18, 24), parallel_beam(a, (16, 16), 24)).hold_out(3).held_out
    for period in (np.pi, 2 * np.pi):
        for _ in range(20): assert held(angles + period * rng.integers(-3, 4, 18)) == held(angles)

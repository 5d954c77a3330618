"""Corrections whose parameters the scan itself tells: found within their standard errors, or refused."""
import numpy as np
import pytest
import scipy.sparse as sp
import torch

from dip_uq.cli import main
from dip_uq.corrections import air_offset, beam_drift, find_hardening, refine_centre, straightened, stripes
from dip_uq.data import Scan, ellipses, rectangles, simulate, walnut
from dip_uq.fbp import fbp
from dip_uq.operators import MatrixOperator
from dip_uq.rays import fan_beam, parallel_beam, vector_beam
from dip_uq.scans import import_fields

SHAPE = 40, 40

def beam(fans, views, centre, rays=1, bins=60):
    turn = np.arange(views) * (1 + fans) * np.pi / views
    if fans: return fan_beam(turn, SHAPE, bins, 1.5, 150., 75., centre=centre, rays_per_bin=rays)
    return parallel_beam(turn, SHAPE, bins, centre=centre, rays_per_bin=rays)

def bent(fans, seed, b, noise=0.01):
    "Readings up to 3 that a beam that hardens by b gives, and the geometry."
    rng = np.random.default_rng(seed)
    A = beam(fans, 120 if fans else 90, 29.5 + rng.uniform(-3, 3), 3)
    p = A([ellipses, rectangles][seed % 2](40, seed)).double().numpy()
    p *= 3 / p.max()
    q = (np.sqrt(1 + 4 * b * p) - 1) / (2 * b) if b else p
    return q + noise * q.mean() * rng.standard_normal(q.shape), A.geometry


# The axis

@pytest.mark.parametrize("fans", [False, True])
def test_the_axis_is_refined(fans):
    for seed, exact in enumerate((27.3, 33.6)):
        A = beam(fans, 24 + 12 * fans, exact, 4)
        y = simulate([walnut, ellipses][seed](40, seed), A, 0.02, seed).measurement
        found, std = refine_centre(Scan(y, beam(fans, 24 + 12 * fans, exact + (1.3, -0.9)[seed])))
        assert abs(found - exact) < (0.02 if fans else 0.15) and abs(found - exact) < 4 * std

def test_an_axis_that_is_not_determined_is_refused():
    A = beam(True, 30, 29.5)
    noise = torch.from_numpy(np.random.default_rng(0).normal(size=(30, 60)))
    with pytest.raises(ValueError, match="as well for any axis"): refine_centre(Scan(noise, A))
    with pytest.raises(ValueError, match="3 directions are too few"): refine_centre(Scan(noise[:3], A[:3]))
    with pytest.raises(TypeError, match="MatrixOperator"):
        refine_centre(Scan(torch.ones(4), MatrixOperator(sp.csr_array(np.eye(4)), (2, 2), (4,))))
    views = vector_beam(*(np.tile(v, (8, 1)) for v in ([0., -90], [0., 60], [1., 0])), (9, 9), 20)
    with pytest.raises(TypeError, match="views of their own, and so no axis"): refine_centre(Scan(torch.ones(8, 20), views))

def test_missing_readings_and_counts_will_do():
    A, start = beam(True, 36, 31.2, 4), beam(True, 36, 30.)
    line = A(walnut(40)).double() / 20
    counts = torch.from_numpy(np.random.default_rng(0).poisson(3000 * np.exp(-line.numpy())))
    valid = torch.ones(36, 60, dtype=torch.bool)
    valid[:, 20] = False
    for scan in (Scan(line, start, valid=valid), Scan(counts, start, blank=torch.full((60,), 3000.))):
        assert refine_centre(scan)[0] == pytest.approx(31.2, abs=0.05)

def test_a_fan_is_imported_with_the_axis_that_its_readings_say(tmp_path):
    A = fan_beam(np.arange(36) * np.pi / 18, SHAPE, 80, 1.0, 150., 75., centre=41.3, rays_per_bin=3)
    y = simulate(walnut(40), A, 0.02).measurement.numpy()
    np.savez(tmp_path / "fan.npz", measurement=y, angles=np.arange(36) * 10., geometry="fan", bin_size=1., size=40,
             source_origin=150., origin_detector=75., pixel_size=1.)
    fields, told = import_fields(tmp_path / "fan.npz", centre="auto")
    assert fields["centre"] == pytest.approx(41.3, abs=0.1)
    assert any("the axis is at bin 41." in line for line in told)


# Beam hardening

@pytest.mark.parametrize("fans", [False, True])
def test_hardening_is_found(fans):
    z, off, doubts = [], [], 0
    for seed, b in enumerate(np.linspace(0, 0.15, 20)):
        found, std, doubt = find_hardening(*bent(fans, seed, b))
        doubts += doubt > ""
        z.append((found - b) / std)
        off.append(found - b)
    assert (np.abs(z) < 2).sum() >= 17 and np.abs(z).max() < 5 and np.sqrt(np.mean(np.square(off))) < 0.02
    assert doubts < 4  # edges between bins are no noise, either
    assert abs(np.mean(off)) < 0.005

def test_offset_and_rings_do_not_look_like_hardening():
    q, g = bent(False, 1, 0.0)
    own = 0.05 * np.random.default_rng(0).standard_normal(q.shape[1])
    found, std, _ = find_hardening(q + own, g)
    assert abs(found) < 4 * std + 0.01

def test_no_hardening_is_told_of_what_does_not_show_it():
    rows, cols = np.mgrid[:40, :40] - 19.5
    disc = torch.tensor((np.hypot(rows, cols) < 14) * 1., dtype=torch.float32)
    A = beam(False, 90, 29.5, 3)
    noise = 0.2 * np.random.default_rng(0).standard_normal(A.range_shape)
    with pytest.raises(ValueError, match="differ too little"): find_hardening(A(disc).double().numpy() + noise, A.geometry)
    with pytest.raises(ValueError, match="too few"): find_hardening(np.ones((8, 60)), beam(False, 8, 29.5).geometry)

def test_drift_is_doubted():
    q, g = bent(False, 3, 0.05)
    assert "disagree" in find_hardening(q * np.linspace(1, 1.03, len(q))[:, None], g)[2]

def test_straight_stays_straight():
    q = torch.linspace(0, 3, 7)
    assert straightened(q, 0).equal(q) and straightened(q, 0.1)[-1] == pytest.approx(3.9)


# Stripes and air

def test_stripes_go_and_nothing_else():
    A = beam(False, 90, 29.5, 2)
    line = A(ellipses(40, 3)).double().numpy()
    rng = np.random.default_rng(0)
    clean = line + 0.1 * rng.standard_normal(line.shape)
    wrong = np.where(np.arange(60) % 11 == 4, 0.8, 0)
    def error(y): return float((fbp(A, torch.from_numpy(y)) - ellipses(40, 3)).square().mean())**0.5
    assert error(clean - stripes(clean)) < 1.02 * error(clean)
    striped = clean + wrong
    assert error(striped - stripes(striped)) < 1.15 * error(clean) < error(striped)
    assert np.ptp(np.diff(striped - (striped - stripes(striped)), axis=0)) < 1e-12  # the same in all views

def test_air_has_a_standard_error():
    z = []
    for seed in range(20):
        A = beam(False, 40, 29.5)
        y = simulate(ellipses(40, seed), A, 0.05, seed).measurement.numpy()
        offset, std, doubt = air_offset(y + 0.3)
        assert not doubt
        z.append((offset - 0.3) / std)
    assert (np.abs(z) < 2).sum() >= 17


def test_import_finds_the_axis_of_a_fan(tmp_path, capsys):
    "Asked for by --centre auto; otherwise the middle is taken, as the file says no other."
    scan = simulate(walnut(40, 2), beam(True, 90, 27.3, 3), 0.01, 0)
    np.savez(tmp_path / "fan.npz", sinogram=scan.measurement.numpy(), theta=np.arange(90) * 4.)
    fan = "--geometry fan --source-origin 150 --origin-detector 75 --bin-size 1.5".split()
    assert main(["import", str(tmp_path / "fan.npz"), *fan, "--centre", "auto", "--out", str(tmp_path / "out.npz")]) == 0
    assert "the axis is at bin 27.3" in capsys.readouterr().out
    with np.load(tmp_path / "out.npz") as f: assert f["centre"] == pytest.approx(27.3, abs=0.05)


def test_the_beam_is_steadied(tmp_path):
    "What air on both sides has in common is the beam; without a drift nothing is found, in 40 scans of noise."
    rng = np.random.default_rng(0)
    y = beam(False, 90, 29.5)(ellipses(40, 1)).numpy()
    y /= 1.5 * y.mean()
    drift = 0.05 * np.cos(np.arange(90) / 7)
    drift -= drift.mean()
    noisy = y + 0.02 * rng.standard_normal(y.shape)
    found = beam_drift(noisy + drift[:, None])
    assert np.abs(found - drift).max() < 0.05 and (found - drift).std() < 0.012  # 4 bins of air: 0.02 / 2 = 0.01
    assert not any(beam_drift(rng.standard_normal((90, 60))).any() for _ in range(40))
    flat, counts = np.full((1, 60), 5e4), rng.poisson(5e4 * np.exp(-(y + drift[:, None])))
    np.savez(tmp_path / "s.npz", counts=counts, blank=flat[0], theta=np.arange(90) * 2.)
    for photons in (False, True):
        fields, told = import_fields(tmp_path / "s.npz", counts=photons, air=True, centre=29.5)
        left = np.log(fields["blank"] / fields["counts"]) if photons else fields["measurement"]
        assert any("beam varies between views by 0.03" in word for word in told)
        assert np.abs(left - y).mean() < 0.006  # noise of 0.0045 to 0.01
    assert any("air=True subtracts it" in word for word in import_fields(tmp_path / "s.npz", centre=29.5)[1])


@pytest.mark.parametrize("y, words", [
    (np.ones((60, 30)), "differ too little"), (np.zeros((60, 30)), "differ too little"), (np.ones((60, 29)), "of shape (60, 30)"),
    (np.full((60, 30), np.nan), "finite line integrals")])
def test_readings_that_say_nothing_of_hardening(y, words):
    with pytest.raises(ValueError) as error: find_hardening(y, parallel_beam(np.arange(60) * np.pi / 60, (20, 20), 30).geometry)
    assert words in str(error.value)
    vectors = vector_beam(*parallel_beam(np.arange(60.), (20, 20), 30).geometry.vectors(), (20, 20), 30, fan=False)
    with pytest.raises(TypeError, match="views of their own"): find_hardening(y, vectors.geometry)

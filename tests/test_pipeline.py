"What `solve` gives for whatever can be measured: nothing may fail after the last step, and doubts are told."
import copy
import json
import os
import warnings
from dataclasses import replace

import numpy as np
import pytest
import tifffile
import torch

from dip_uq.calibration import check_unused
from dip_uq.covariance import Model
from dip_uq.data import Scan, difference_noise, ellipses, rectangles, shepp_logan, simulate, walnut
from dip_uq.dip import reconstruct
from dip_uq.doubts import doubts, negative_range, noise_excess
from dip_uq.linearization import Linearization
from dip_uq.networks import UNet
from dip_uq.operators import as_operator, blur, fourier, mask
from dip_uq.pipeline import solve, solve_image
from dip_uq.posterior import Posterior
from dip_uq.rays import Geometry, fan_beam, parallel_beam, vector_beam
from dip_uq.scans import load_htc2022, load_scan, save_scan
from dip_uq.scores import headline
from dip_uq.variation import psnr

FILES = {"posterior.safetensors", "result.safetensors", "summary.json", "image.tif", "std.tif", "interval68.tif", "interval95.tif", "samples.npz",
         "report.png", "result.nxs"}


def random(*shape): return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def ball(*shape):
    x = torch.zeros(shape)
    x[tuple(slice(n // 4, n - n // 4) for n in shape)] = 1
    return x


def beam(size, bins, bin_size=1.5): return parallel_beam(np.arange(40) * np.pi / 40, (size, size), bins, bin_size)


CASES = {"mask": (mask(random(24, 24) < 0.6), walnut(24)), "blur": (blur((24, 24), 1.0), walnut(24)),
         "flat sinogram": (as_operator(random(200, 576) / 24, domain_shape=(24, 24)), walnut(24)),
         "one bin": (beam(24, 1, 30.0), walnut(24)),
         "six pixels": (beam(6, 8), ball(6, 6)), "two pixels": (beam(2, 3), torch.tensor([[0.0, 1.0], [0.5, 0.2]])),
         "volume": (mask(torch.ones(8, 8, 8, dtype=torch.bool)), ball(8, 8, 8)),
         "thin volume": (mask(torch.ones(3, 12, 10, dtype=torch.bool)), ball(3, 12, 10))}


def solved(A, truth, **options):
    measured = A(truth) + 0.02 * torch.randn(A.range_shape, generator=torch.Generator().manual_seed(1))
    net = UNet(1 if min(A.domain_shape) < 4 else 2, 4, dims=len(A.domain_shape))
    return solve(Scan(measured, A, truth, 0.02), net, iterations=20, progress=False, **options)


@pytest.mark.parametrize("case", CASES)
def test_everything_can_be_saved(case, tmp_path):
    A, truth = CASES[case]
    solution = solved(A, truth)
    solution.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["ssim"] is None) == (min(truth.shape) < 3)
    assert summary["psnr"] == pytest.approx(-10 * np.log10(float((solution.image - truth).square().mean()))
                                            + 20 * np.log10(float(truth.max() - truth.min())), abs=1e-3)
    assert torch.equal(Posterior.load(tmp_path / "posterior.safetensors", solution.scan, progress=False).mean, solution.image)


def test_a_picture_that_fails_costs_only_the_picture(tmp_path, monkeypatch):
    solution = solved(beam(12, 12), ball(12, 12))
    monkeypatch.setattr("dip_uq.pipeline.draw_report", lambda s: 1 / 0)
    with pytest.warns(UserWarning, match="report.png could not be drawn .ZeroDivisionError"): solution.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES - {"report.png"}


def test_a_name_may_hold_what_a_picture_cannot_show(scan, tmp_path, recwarn):
    "A dollar sign begins a formula in Matplotlib; a file's name that is not UTF-8 has surrogates in Python."
    solve_image(replace(scan, name="$5 \udcff _{"), UNet(2, 4), iterations=3, progress=False).save(tmp_path)
    assert (tmp_path / "report.png").exists() and not [w for w in recwarn if "report.png" in str(w.message)]


def test_a_full_disk_costs_no_more_than_what_it_cannot_hold(tmp_path, monkeypatch):
    solution = solved(beam(12, 12), ball(12, 12))
    def full(path, data): raise OSError(28, "No space left on device")
    monkeypatch.setattr("dip_uq.pipeline.write_whole", full)
    with pytest.raises(OSError, match="No space left"): solution.save(tmp_path)
    assert {"posterior.safetensors", "result.safetensors"} == {path.name for path in tmp_path.iterdir()}
    monkeypatch.undo()
    solution.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES


@pytest.fixture(scope="module")
def scan():
    A = fan_beam(np.linspace(0, 2 * np.pi, 16, endpoint=False), (24, 24), 30, 1.2, source_origin=72, origin_detector=36)
    return simulate(walnut(24), A, noise=0.05)


def answered(scan): return solve(scan, UNet(3, 8), iterations=300, progress=False)


@pytest.fixture(scope="module")
def plain(scan):
    "What `solve` makes of the scan as it is."
    return answered(scan)


@pytest.mark.parametrize("off", [0, 12])
def test_fine_readings_tell_what_coarse_ones_cannot(off, tmp_path):
    "An axis three coarse bins beside its place leaves more than neighbours differ by, of which coarse ones know nothing."
    A = fan_beam(np.linspace(0, 2 * np.pi, 48, endpoint=False), (96, 96), 120, 1.2, source_origin=288, origin_detector=144)
    fine = simulate(walnut(96), A, noise=0.01)
    save_scan(replace(fine, noise_std=None), tmp_path / "fine.npz")
    fields = dict(np.load(tmp_path / "fine.npz"))
    np.savez(tmp_path / "axis.npz", **fields | dict(centre=59.5 + off))
    scan = load_scan(tmp_path / "axis.npz", angles=24, size=24, bins=30)
    found = solve_image(scan, UNet(3, 8), iterations=300, learning_rate=1e-2, progress=False)
    assert scan.neighbour_noise < difference_noise(scan.measurement) / 3
    assert any("times as neighbours scatter" in doubt for doubt in found.doubts) == (off > 0)


def test_no_doubt_where_all_is_right(plain): assert plain.summary()["doubts"] == []


@pytest.mark.parametrize("factor", [1 / 2, 1 / 3, 1 / 30])
def test_noise_that_is_understated_is_told(scan, factor):
    found = answered(replace(scan, noise_std=factor * scan.noise_std)).summary()
    assert found["fit_rms_over_noise"] > 1.25
    assert any(f"{found['fit_rms_over_noise']:.2f} times noise_std" in doubt for doubt in found["doubts"])


def test_noise_that_is_overstated_is_told_and_not_believed(scan):
    loud, louder = (replace(scan, noise_std=factor * scan.noise_std) for factor in (3, 30))
    found, unknown = answered(loud), answered(replace(scan, noise_std=None))
    assert "times as large as noise can be" in found.doubts[0] and found.doubts[0] in doubts(loud)
    assert noise_excess(louder) == pytest.approx(10 * noise_excess(loud)) # so this one is not believed either
    assert torch.equal(found.image, unknown.image) and torch.equal(found.std, unknown.std)


LOUD = {"pixels": mask(torch.ones(1, 110, dtype=torch.bool)), "few rays": parallel_beam(np.arange(12) * np.pi / 12, (64, 64), 90),
        "many rays": parallel_beam(np.arange(60) * np.pi / 60, (12, 12), 16), "blur": blur((24, 24), 1.5),
        "Fourier": fourier(torch.rand(24, 24, generator=torch.Generator().manual_seed(0)) > 0.5)}


@pytest.mark.parametrize("name", LOUD)
def test_noise_is_not_called_overstated_by_chance(name):
    "Scans of nothing but noise, told as it is: one in a thousand may be called overstated. Four times as much is for most."
    A = LOUD[name]
    draws = torch.randn(100, *A.range_shape, generator=torch.Generator().manual_seed(0))
    found = np.array([noise_excess(Scan(y, A, noise_std=1.0)) for y in draws])
    assert (found > 1).sum() <= 1 and (4 * found > 1).mean() > 0.9, (found.max(), found.min())


def test_a_check_that_sees_nothing_says_so(scan):
    "With noise as large as the signal the rays cannot tell anything about the image."
    noisy = simulate(scan.truth, scan.operator, noise=5.0, seed=1)
    solution = answered(noisy)
    assert not solution.check.sees and "these are untested" in " ".join(solution.doubts)
    assert solution.verdict == solution.summary()["verdict"] == "cannot tell" and "bars: cannot tell" in headline(solution.summary())


def test_projections_that_were_not_used_decide(scan, plain):
    "Honest where they are of the same object and scanner; too short where they are not."
    other = fan_beam(np.array([0.1, 1.3, 4.0]), scan.operator.domain_shape, *scan.operator.range_shape[1:], 1.2, 72., 36.)
    seen = simulate(scan.truth, other, noise=0.05, seed=3)
    wrong = replace(seen, measurement=seen.measurement.roll(4, 1))
    found = answered(replace(scan, unused=replace(seen, truth=None)))
    assert found.verdict == found.summary()["verdict"] == "honest", found.unused
    assert found.image.equal(plain.image) and found.std.equal(plain.std) and not found.doubts  # no part in anything
    counted = Scan(torch.poisson(400 * torch.exp(-0.1 * scan.operator(scan.truth))), scan.operator, blank=torch.full((30,), 400.0),
                   unused=Scan(torch.poisson(400 * torch.exp(-0.1 * other(scan.truth))), other, blank=torch.full((30,), 400.0)))
    assert 0.7 < answered(counted).unused.z_std < 1.3  # counts are made Gaussian like those that were used

    wide = {block: 1e6 * variance for block, variance in found.posterior.evidence.prior.variance.items()}
    evidence = replace(found.posterior.evidence, prior=replace(found.posterior.evidence.prior, variance=wide))
    with warnings.catch_warnings(): # of variances that are lost in rounding, which must not stop it
        warnings.simplefilter("ignore")
        assert np.isfinite(check_unused(Posterior(evidence)).z_std)
    recon, lin = found.recon, found.posterior.lin
    net, z = copy.deepcopy(recon.net).double(), recon.z.double()
    exact = replace(recon, net=net, z=z, image=(recon.lowest + recon.scale * net(z)[0, 0]).detach())
    model = Model.of(Linearization(exact, free_pixels=lin.pixels.double() / recon.scale), evidence.prior.blocks)
    assert check_unused(Posterior(replace(evidence, model=model))).z_std < 1  # where nothing is lost

    moved = replace(wrong, truth=None), found.posterior
    moved[1].lin.recon = replace(found.recon, scan=replace(found.recon.scan, unused=moved[0]))
    lost = replace(found, unused=check_unused(moved[1]))
    assert lost.verdict == "too short" and "projections that were not used are" in str(lost.doubts)


def test_noise_that_neighbours_share_is_not_called_overstated():
    "Means over neighbouring bins."
    A = parallel_beam(np.arange(20) * np.pi / 20, (24, 24), 60)
    white = torch.randn(20, 63, generator=torch.Generator().manual_seed(0))
    for width in (1, 2, 3, 4):
        y = white.unfold(1, width, 1).mean(-1)[:, :60]
        assert noise_excess(Scan(y, A, noise_std=float(y.std()))) < 1


def test_no_noise_at_all_is_not_believed(scan):
    found = answered(replace(scan, noise_std=0.0))
    assert "noise_std is 0, but no measurement is exact" in " ".join(found.doubts)
    assert found.summary()["noise_std"] > 0 and (found.std > 0).all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_result_can_be_used_where_gradients_are_off(mode, tmp_path):
    with mode():
        solution = solved(beam(12, 12), ball(12, 12))
        solution.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES


def test_images_below_zero():
    "The same object, a little below zero: told, and nearly as good; that air is 0 is worth a decibel or two."
    A, truth = parallel_beam(np.arange(24) * np.pi / 24, (24, 24), 30, 1.5), walnut(24, seed=1)
    high, low = (answered(simulate(image, A, noise=0.01, seed=1)) for image in (truth, truth - 0.2))
    assert low.summary()["psnr"] > high.summary()["psnr"] - 2 # 7 without the range
    assert "values below zero" in low.doubts[0] and "below zero" not in str(high.doubts)
    assert 0.7 < low.summary()["zstd"] / high.summary()["zstd"] < 1.4


def test_half_above_and_half_below_zero():
    "The first steps of Landweber's iteration must not be too long for an image that looks like no other."
    A, image = parallel_beam(np.arange(20) * np.pi / 20, (32, 32), 46), torch.ones(32, 32)
    image[:, 16:] = -1
    for noise, seed in ((0.01, 3), (0.01, 5), (0.05, 3)):
        scan = simulate(image, A, noise, seed)
        assert noise_excess(scan) < 1 and negative_range(scan)[0] == pytest.approx(-1, rel=0.5)


def test_a_dead_bin_is_not_below_zero():
    A = parallel_beam(np.arange(14) * np.pi / 14, (20, 20), 29)
    for noise in (0.02, 0.6):
        for seed in range(4):
            scan = simulate(walnut(20, seed), A, noise, seed)
            dead = scan.measurement.where(torch.arange(29) != 12, 0)
            for told in (replace(scan, measurement=dead), replace(scan, noise_std=scan.noise_std / 30)):
                assert negative_range(told) is None
            assert "of bins 12 every reading is the same" in str(doubts(replace(scan, measurement=dead)))


def test_signed_readings_of_an_image_below_zero():
    "Half of k-space: with the wrong range the image had 9 dB."
    A = fourier(torch.rand(24, 24, generator=torch.Generator().manual_seed(0)) < 0.5)
    assert negative_range(simulate(walnut(24), A, 0.02)) is None
    assert negative_range(simulate(walnut(24) - 0.5, A, 0.02))[0] == pytest.approx(-0.5, rel=0.5)


@pytest.mark.parametrize("A, noise", [(parallel_beam(np.arange(60) * np.pi / 60, (16, 16), 5, 4.0), 0.1), (blur((24, 24), 2.0), 0.02)])
def test_what_readings_leave_open_is_told(A, noise):
    "A few wide bins, or pixels that a blur ties to their neighbours: bars as long as the image's range, and the fit is kept."
    found = solve(simulate(walnut(A.domain_shape[0], 1), A, noise), UNet(2, 8), iterations=150, progress=False)
    assert "as long as the values of the image are apart" in str(found.doubts)
    assert found.posterior.share == 0 and torch.allclose(found.image, found.recon.image, atol=1e-6)


@pytest.mark.parametrize("seed", [1, 3, 4])
def test_bars_of_a_fit_that_has_stopped_early(seed):
    "A blur in 150 slow steps: the fit leaves 1.3 to 1.5 σ. Taken for noise, bars were 30 times too long, as little was left to explain."
    found = solve(simulate(walnut(24, seed), blur((24, 24), 2.0), 0.05), UNet(2, 8), iterations=150, learning_rate=2e-3, progress=False)
    assert 1 < found.fit_rms_over_noise < 1.5 and found.posterior.evidence.covariance.confirmed > 0.5
    assert 0.6 < found.scores(found.std)["zstd"] < 1.4
    if seed == 3:  # held-out rays agree, so the image follows
        assert psnr(found.image, found.scan.truth) > psnr(found.recon.image, found.scan.truth) + 0.5


def test_an_image_alone_leaves_no_bars_of_another_scan(tmp_path):
    scan = simulate(ball(12, 12), beam(12, 12))
    options = dict(net=UNet(2, 4), iterations=20, progress=False)
    solve(scan, **options).save(tmp_path)
    solve_image(scan, **options).save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"result.safetensors", "summary.json", "image.tif", "report.png", "result.nxs"}


def test_flat_readings_of_unknown_noise_can_be_doubted(recwarn):
    "Second differences of what is the same everywhere are zero, and nothing is divided by them."
    A = beam(24, 24)
    flat_readings = Scan(torch.ones(A.range_shape), A)
    assert isinstance(solve_image(flat_readings, UNet(2, 4), iterations=3, progress=False).doubts, list)


def test_tiffs_know_the_pixel_size(scan, tmp_path):
    solve_image(replace(scan, pixel_size=0.25), UNet(2, 4), iterations=3, progress=False).save(tmp_path)
    with tifffile.TiffFile(tmp_path / "image.tif") as tif:
        tags, across = tif.pages[0].tags, tif.pages[0].tags["XResolution"].value
        assert across[0] / across[1] == 40 and tags["ResolutionUnit"].value == tifffile.RESUNIT.CENTIMETER  # per cm


def test_oblong_pixels_and_a_scanner_that_jitters(tmp_path):
    "No filtered back-projection is shown; all the rest goes its way, in both directions of a file."
    source, detector, step = Geometry(np.arange(16) * np.pi / 8, 40, 1.6, 1., 60., 40.).vectors()
    source = source + np.random.default_rng(0).normal(0, 2, source.shape)
    A = vector_beam(source, detector, step, (12, 20), 40, (2.5, 1.25))
    scan = simulate(ellipses(20, 3)[4:16], A, 0.02)
    solution = solve(scan, UNet(2, 4), iterations=30, start="fbp", progress=False)
    assert solution.fbp is None and solution.summary()["psnr_fbp"] is None and solution.image.shape == (12, 20)
    solution.save(tmp_path)
    assert FILES == {file.name for file in tmp_path.iterdir()}
    with tifffile.TiffFile(tmp_path / "image.tif") as tif:
        x, y = (tif.pages[0].tags[key].value for key in ("XResolution", "YResolution"))
        assert (x[0] / x[1], y[0] / y[1]) == (8, 4)  # pixels to a centimetre
    steady = vector_beam(*Geometry(np.arange(16) * np.pi / 8, 40, 1.6, 1., 60., 40.).vectors(), (12, 20), 40, (2.5, 1.25))
    shown = solve_image(simulate(scan.truth, steady), UNet(2, 4), iterations=3, progress=False)
    assert shown.fbp.shape == (12, 20) and shown.summary()["psnr_fbp"] is not None


def test_volumes_are_grey(tmp_path):
    "Four slices are four pages, not one picture of four colours."
    solved(mask(torch.ones(4, 12, 12, dtype=torch.bool)), ball(4, 12, 12)).save_figures(tmp_path)
    with tifffile.TiffFile(tmp_path / "image.tif") as tif: assert [page.shape for page in tif.pages] == [(12, 12)] * 4


# Directions

TURN = np.arange(15) * np.pi / 15
AGAIN = {"each twice": np.tile(TURN, 2), "a full turn": np.arange(30) * np.pi / 15}


@pytest.mark.parametrize("case", AGAIN)
def test_lines_measured_twice_leave_error_bars_right(case):
    "With fitted twins of held-out projections the bars were up to 40 times too long: z of pixels 0.07, bars of 3.6."
    A = parallel_beam(AGAIN[case], (24, 24), 36)
    found = solve(simulate(walnut(24), A, noise=0.05), UNet(3, 8), iterations=300, progress=False)
    assert 0.5 < found.summary()["zstd"] < 1.3 and found.std.mean() < 0.25
    assert found.recon.scan.held_out == (3, 11, 18, 26)  # two of fifteen lines, with both of their projections


def test_twins_chosen_by_the_user_are_kept_and_told(scan):
    twice = scan.operator[np.tile(np.arange(16), 2)]
    told = replace(simulate(scan.truth, twice), held_out=(3, 8, 24))
    assert told.held_out == (3, 8, 24)
    doubt, = doubts(told)
    assert doubt.startswith("1 held-out projections are along the lines of fitted ones")
    assert doubts(replace(told, held_out=())) == doubts(told.hold_out(5)) == []


# What reaches beyond detector or image

PHANTOMS = {"walnut": walnut, "ellipses": ellipses, "rectangles": rectangles, "head": lambda size, seed: shepp_logan(size)}
VIEWS = np.arange(20) * np.pi / 20


@pytest.mark.parametrize("noise", [0.01, 0.2])
@pytest.mark.parametrize("phantom", PHANTOMS)
def test_truncated_projections_are_told(phantom, noise):
    A = parallel_beam(VIEWS, (48, 48), 24)
    for seed in range(5):
        doubt, = doubts(simulate(PHANTOMS[phantom](48, seed), A, noise, seed))
        assert "truncated" in doubt


@pytest.mark.parametrize("phantom", PHANTOMS)
def test_an_object_larger_than_the_image_is_told(phantom):
    A, small = (parallel_beam(VIEWS, (side, side), 72) for side in (48, 24))
    for seed in range(5):
        whole = simulate(PHANTOMS[phantom](48, seed), A, 0.05, seed)
        doubt, = doubts(Scan(whole.measurement, small, noise_std=whole.noise_std))
        assert "larger than the image" in doubt


@pytest.mark.parametrize("make, fault", [(lambda y: 1e4 * torch.exp(-y / y.max()), "logarithm"),
                                         (lambda y: y + y.mean(), "background")])
def test_counts_and_backgrounds_are_one_doubt(make, fault):
    for phantom in PHANTOMS.values():
        whole = simulate(phantom(48, 1), parallel_beam(VIEWS, (48, 48), 72), 0.01)
        doubt, = doubts(replace(whole, measurement=make(whole.measurement), noise_std=None))
        assert fault in doubt.split("or is the object")[0]


def test_nothing_is_told_of_scans_that_are_right():
    "None of 240: 8 phantoms, 6 scanners, 5 levels of noise."
    fan = dict(source_origin=144, origin_detector=72)
    beams = [parallel_beam(VIEWS, (48, 48), *bins) for bins in ((48,), (72,), (24, 2.0))]
    beams += [parallel_beam(VIEWS[::4], (48, 48), 49), fan_beam(2 * VIEWS, (48, 48), 48, 1.5, **fan),
              fan_beam(2 * VIEWS, (48, 48), 72, 1.5, **fan)]
    truths = [phantom(48, seed) for phantom in PHANTOMS.values() for seed in range(2)]
    found = [doubts(simulate(truth, A, noise, seed)) for seed, truth in enumerate(truths) for A in beams
             for noise in (0, 0.01, 0.05, 0.2, 1.0)]
    assert len(found) == 240 and not any(found)


@pytest.mark.skipif("DIP_UQ_DATA" not in os.environ, reason="set DIP_UQ_DATA to a folder with htc2022/*.mat")
@pytest.mark.parametrize("name", ["ta", "tb", "solid_disc"])
def test_nothing_is_told_of_measured_discs(name):
    for angles, size in ((10, 64), (30, 128), (120, 32)): assert doubts(load_htc2022(name, angles, size)) == []


@pytest.mark.parametrize("call", [solve, solve_image])
def test_a_single_projection_is_refused_with_what_works(call):
    "And it does work."
    scan = simulate(walnut(16), parallel_beam([0.3], (16, 16), 16))
    with pytest.raises(ValueError, match=r"1 projection, but 2 or more are needed.*; for the image alone take reconstruct\(scan\)"):
        call(scan, progress=False)
    assert reconstruct(scan, UNet(2, 4), iterations=5, progress=False).image.isfinite().all()

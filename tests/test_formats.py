"""Files of scanners: each format written here and read back, and everything malformed told in one line."""
import os
from functools import lru_cache
from pathlib import Path

import h5py
import mrcfile
import numpy as np
import pytest
import tifffile
import torch
from scipy.io import savemat

from dip_uq.cli import main
from dip_uq.corrections import air_offset, find_centre, line_integrals, transmission, valid_readings
from dip_uq.data import Scan, ellipses, walnut
from dip_uq.doubts import cramped, doubts, widened
from dip_uq.formats import READERS, midplane, read_fields, write_nexus
from dip_uq.operators import MatrixOperator
from dip_uq.rays import fan_beam, parallel_beam, ray_matrix, vector_beam
from dip_uq.scans import import_fields, load_scan, save_scan

MEASURED = Path(os.environ.get("DIP_UQ_DATA", "none")) / "measured"
needs_measured = pytest.mark.skipif(not MEASURED.is_dir(), reason="set DIP_UQ_DATA to a folder with measured/")

VIEWS, ROWS, BINS = 12, 5, 16
RNG = np.random.default_rng(0)
VOLUME = RNG.random((VIEWS, ROWS, BINS)).astype("float32")
COUNTS = RNG.poisson(500, (VIEWS, ROWS, BINS)).astype("uint16")
FLAT, DARK = RNG.poisson(900, (3, ROWS, BINS)).astype("uint16"), RNG.poisson(20, (2, ROWS, BINS)).astype("uint16")
DEGREES = np.arange(VIEWS) * 15.


# Each format, written small; each returns what is to be read

def exchange(folder):
    with h5py.File(folder / "scan.h5", "w") as f:
        for name, data in dict(data=COUNTS, data_white=FLAT, data_dark=DARK, theta=np.deg2rad(DEGREES)).items():
            f.create_dataset(f"exchange/{name}", data=data, compression="gzip")
        f["exchange/theta"].attrs["units"] = np.bytes_("radians")
    return folder / "scan.h5", dict(counts=COUNTS, flat=FLAT, dark=DARK)

def nxtomo(folder):
    "Flats first, darks last, a void image in between; the entry lies one deeper, and the pixel size in µm."
    with h5py.File(folder / "scan.nxs", "w") as f:
        entry = f.create_group("entry1/tomo_entry")
        entry["instrument/detector/data"] = np.concatenate([FLAT, COUNTS[:6], COUNTS[:1], COUNTS[6:], DARK])
        entry["instrument/detector/image_key"] = [1] * 3 + [0] * 6 + [3] + [0] * 6 + [2] * 2
        entry["sample/rotation_angle"] = np.concatenate([[0] * 3, DEGREES[:6], [7], DEGREES[6:], [0] * 2])
        entry["instrument/detector/x_pixel_size"] = 6.5
        entry["instrument/detector/x_pixel_size"].attrs["units"] = np.bytes_("um")
    return folder / "scan.nxs", dict(counts=COUNTS, flat=FLAT, dark=DARK, bin_size=0.0065, unit="1/mm")

def stack(folder):
    tifffile.imwrite(folder / "scan.tif", VOLUME, compression="zlib")
    return folder / "scan.tif", dict(measurement=VOLUME)

def pictures(folder):
    "In an order that only people understand, with flats and darks among them."
    (folder / "views").mkdir()
    for name, images in dict(view=COUNTS, flat=FLAT, dark=DARK).items():
        for i, image in enumerate(images): tifffile.imwrite(folder / "views" / f"{name}_{i}.tif", image)
    return folder / "views", dict(counts=COUNTS, flat=FLAT, dark=DARK)

def nikon(folder):
    lines = dict(Name="nut", SrcToObject=50, SrcToDetector=200, DetectorPixelSizeX=0.4, VoxelSizeX=0.1, MaskRadius=2.0,
                 WhiteLevel=60000, InitialAngle=0, AngularStep=15, CentreOfRotationTop=0.8, CentreOfRotationBottom=0.8)
    text = "\r\n".join(["[XTekCT]", *(f"{key}={value}" for key, value in lines.items()), "[CTPro]", "Shuttling=False"])
    (folder / "nut.xtekct").write_text(text)
    for i, image in enumerate(COUNTS): tifffile.imwrite(folder / f"nut_{i + 1:04}.tif", image)
    tifffile.imwrite(folder / "nutty_0001.tif", COUNTS[0])
    return folder / "nut.xtekct", dict(counts=COUNTS, blank=60000, geometry="fan", source_origin=50, origin_detector=150,
                                       bin_size=0.4, pixel_size=0.1, unit="1/mm", name="nut", centre=7.5 + 2)

def mrc(folder):
    with mrcfile.new(folder / "scan.st") as f:
        f.set_data(VOLUME)
        f.voxel_size = 20
    (folder / "scan.rawtlt").write_text("\n".join(f" {angle:.2f}" for angle in DEGREES))
    return folder / "scan.st", dict(measurement=VOLUME, bin_size=2, pixel_size=2, unit="1/nm")

def npy(folder):
    np.save(folder / "scan.npy", VOLUME)
    return folder / "scan.npy", dict(measurement=VOLUME)

def npz(folder):
    np.savez(folder / "scan.npz", counts=COUNTS, blank=900, theta=DEGREES, center=8.25, comment="ours")
    return folder / "scan.npz", dict(counts=COUNTS, blank=900, centre=8.25, comment="ours")

def mat(folder):
    savemat(folder / "scan.mat", dict(m=VOLUME[:, 2], angles=DEGREES), do_compression=True)
    return folder / "scan.mat", dict(measurement=VOLUME)

def htc(folder):
    parameters = dict(angles=DEGREES, distanceSourceOrigin=400., distanceSourceDetector=600., pixelSizePost=0.3)
    struct = dict(sinogram=VOLUME[:, 2], parameters=parameters)
    savemat(folder / "htc2022_09z_limited.mat", dict(CtDataLimited=struct), do_compression=True)
    return folder / "htc2022_09z_limited.mat", dict(measurement=VOLUME, geometry="fan", bin_size=0.3, source_origin=400,
                                                    origin_detector=200, unit="1/mm")

FORMATS = exchange, nxtomo, stack, pictures, nikon, mrc, npy, npz, mat, htc
WITHOUT_ANGLES = stack, pictures, npy

@pytest.mark.parametrize("write", FORMATS)
def test_read_back_equal(write, tmp_path):
    path, expected = write(tmp_path)
    fields = read_fields(path, angles=(0, 165) if write in WITHOUT_ANGLES else None)
    np.testing.assert_allclose(fields.pop("angles"), DEGREES, atol=1e-4)
    assert fields.keys() == expected.keys()
    for key, value in expected.items():
        wanted = value[:, ROWS // 2] if np.ndim(value) == 3 else value
        if isinstance(wanted, str): assert fields[key] == wanted
        else: np.testing.assert_allclose(fields[key], wanted, rtol=1e-6)

@pytest.mark.parametrize("write", [exchange, nxtomo, stack, pictures, nikon, mrc, npy])
def test_rows(write, tmp_path):
    path, expected = write(tmp_path)
    how = dict(angles=(0, 165)) if write in WITHOUT_ANGLES else {}
    for row in 0, 4:
        fields = read_fields(path, row, **how)
        for key in {"measurement", "counts", "flat", "dark"} & fields.keys():
            np.testing.assert_array_equal(fields[key], expected[key][:, row])
    with pytest.raises(ValueError, match="row=5 is out of range: choose 0 to 4"): read_fields(path, 5, **how)
    with pytest.raises(ValueError, match="row=-1"): read_fields(path, -1, **how)

def test_a_volume_is_read_view_by_view(tmp_path, monkeypatch):
    "Never more than one picture at a time."
    path, _ = pictures(tmp_path)
    opened = []
    original = tifffile.TiffFile.__enter__
    monkeypatch.setattr(tifffile.TiffFile, "__enter__", lambda self: opened.append(self.filehandle.name) or original(self))
    read_fields(path, 2, angles=(0, 165))
    assert [name for name in opened if name.startswith("view")][1:] == [f"view_{i}.tif" for i in range(VIEWS)]

def test_flats_and_angles_from_elsewhere(tmp_path):
    path, _ = stack(tmp_path)
    for name, images in dict(flat=FLAT, dark=DARK).items():  # three, say, as if they were red, green and blue
        tifffile.imwrite(tmp_path / f"{name}s.tif", images, **(dict(photometric="rgb", planarconfig="separate") if len(images) == 3 else {}))
    tifffile.imwrite(tmp_path / "one.tif", FLAT[0])
    np.save(tmp_path / "angles.npy", DEGREES)
    (tmp_path / "angles.csv").write_text("# degrees\n" + ",".join(map(str, DEGREES)))
    for angles in tmp_path / "angles.npy", str(tmp_path / "angles.csv"), DEGREES, [0, 165]:
        fields = read_fields(path, 1, angles, tmp_path / "flats.tif", tmp_path / "darks.tif")
        np.testing.assert_allclose(fields["angles"], DEGREES)
        np.testing.assert_array_equal(fields["flat"], FLAT[:, 1])
        np.testing.assert_array_equal(fields["dark"], DARK[:, 1])
    np.testing.assert_array_equal(read_fields(path, 1, (0, 165), tmp_path / "one.tif")["flat"], FLAT[:1, 1])

@pytest.mark.parametrize("names, degrees", [
    (["a_10.5deg", "a_2deg", "a_-3.25deg"], [-3.25, 2, 10.5]), (["scan-003", "scan-020", "scan-100"], [3, 20, 100])])
def test_pictures_named_after_their_angles(names, degrees, tmp_path):
    for name in names: tifffile.imwrite(tmp_path / f"{name}.TIFF", VOLUME[0])
    assert sorted(read_fields(tmp_path, angles="names")["angles"]) == degrees

def test_a_single_picture_is_a_sinogram(tmp_path):
    tifffile.imwrite(tmp_path / "sinogram.tif", VOLUME[:, 0])
    np.testing.assert_array_equal(read_fields(tmp_path / "sinogram.tif", angles=(0, 165))["measurement"], VOLUME[:, 0])

def test_a_variable_by_name(tmp_path):
    savemat(tmp_path / "two.mat", dict(m=VOLUME[:, 2], A=VOLUME[:, 1], angles=DEGREES), do_compression=True)
    with pytest.raises(ValueError, match="two.mat: this has no 'CtDataFull'; variable= may name one of m, A"):
        read_fields(tmp_path / "two.mat")
    np.testing.assert_array_equal(read_fields(tmp_path / "two.mat", variable="A")["measurement"], VOLUME[:, 1])
    with h5py.File(tmp_path / "any.h5", "w") as f: f["a/b"] = VOLUME
    with pytest.raises(ValueError, match="name the array of the views by variable="): read_fields(tmp_path / "any.h5")
    with pytest.raises(ValueError, match="this has no array of numbers 'a'"): read_fields(tmp_path / "any.h5", variable="a")
    fields = read_fields(tmp_path / "any.h5", variable="a/b", angles=(0, 165))
    np.testing.assert_array_equal(fields["measurement"], VOLUME[:, 2])

def test_a_scanner_of_ones_own(tmp_path, monkeypatch):
    "Whoever has another format adds a reader."
    def text(path, variable): yield dict(measurement=np.loadtxt(path), angles=DEGREES)
    monkeypatch.setitem(READERS, ".txt", text)
    np.savetxt(tmp_path / "scan.txt", VOLUME[:, 0])
    np.testing.assert_allclose(read_fields(tmp_path / "scan.txt")["measurement"], VOLUME[:, 0])


# Malformed, truncated, foreign and missing

def told(path, **how):
    "Whether `path` is read; otherwise the error must be of one line, and name the file."
    try: read_fields(path, **how)
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        assert "\n" not in text and str(path) in text, text
        return text
    return ""

@pytest.mark.parametrize("write", FORMATS)
def test_what_is_no_file(write, tmp_path):
    path, _ = write(tmp_path)
    if path.is_dir():
        (tmp_path / "none").mkdir()
        assert "there are no TIFF files" in told(tmp_path / "none")
        next(path.iterdir()).write_bytes(b"II*\0 but not really")
        return
    assert "is not a file" in told(path.with_name("missing" + path.suffix))
    for content, words in ((b"", "is empty"), (b"hello, world\n" * 40, "")):
        path.write_bytes(content)
        assert (text := told(path, angles=(0, 165))) and words in text
    path.rename(path.with_suffix(".docx"))
    assert "ends in '.docx'; use one of folder, .tif" in told(path.with_suffix(".docx"))

def damaged(path, count, seed=0):
    "`count` times, a file with some bytes changed, cut out, or cut off."
    whole, rng = path.read_bytes(), np.random.default_rng(seed)
    for i in range(count):
        content = bytearray(whole)
        where = rng.integers(0, len(whole), rng.integers(1, 9)) if i % 2 else rng.integers(0, min(len(whole), 2048), 3)
        if i % 5 == 0: del content[where[0]:]
        elif i % 5 == 1: del content[where[0]:where[0] + 9]
        else:
            for k in where: content[k] = rng.integers(0, 256)
        path.write_bytes(content)
        yield path
    path.write_bytes(whole)

DAMAGED = int(os.environ.get("DIP_UQ_DAMAGED", 120))  # files of each format; thousands by hand

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("write", FORMATS)
def test_damaged_files_are_told(write, tmp_path):
    path, _ = write(tmp_path)
    file, how = (path / "view_3.tif" if path.is_dir() else path), dict(angles=(0, 165)) if write in WITHOUT_ANGLES else {}
    for i, _ in enumerate(damaged(file, DAMAGED)):
        try: read_fields(path, **how)
        except (ValueError, FileNotFoundError) as error: assert "\n" not in str(error) and str(path) in str(error), (i, error)

@needs_measured
@pytest.mark.filterwarnings("ignore")
def test_damaged_txrm_is_told(tmp_path):
    (path := tmp_path / "scan.txrm").write_bytes((MEASURED / "txrm_test_chip_tomo.txrm").read_bytes())
    for _ in damaged(path, DAMAGED // 4): told(path)

@pytest.mark.parametrize("content, words", [
    ("", "is empty"), ("[Other]\nx=1", "no section [XTekCT]"), ("no section at all", "cannot be read as .xtekct"),
    ("[XTekCT]\nName=nut\nSrcToObject=5", "this has no 'SrcToDetector'"),
    ("[XTekCT]\nName=nut\nSrcToObject=x", "SrcToObject must hold numbers, got 'x'"),
    ("[XTekCT]\nName=nut\nSrcToObject=-5", "SrcToObject=-5 is out of range: it must be positive"),
    ("[XTekCT]\nName=other", "there are no TIFF files named other"),
    ("[XTekCT]\nName=nut\nSrcToObject=5\nSrcToDetector=9\nDetectorPixelSizeX=1", "this has no angles")])
def test_bad_nikon(content, words, tmp_path):
    path, _ = nikon(tmp_path)
    path.write_text(content)
    assert words in told(path)

def test_bad_hdf5(tmp_path):
    with h5py.File(tmp_path / "scan.h5", "w") as f:
        f["exchange/data"], f["exchange/theta"] = np.full((3, 2, 4), b"text"), DEGREES[:3]
    assert "this has no array of numbers 'data'" in told(tmp_path / "scan.h5")
    with h5py.File(tmp_path / "scan.h5", "w") as f:
        f["exchange/data"], f["exchange/theta"] = VOLUME, DEGREES[:5]
    assert "measurement has shape (12, 16) and angles (5,): one angle per row is needed" in told(tmp_path / "scan.h5")
    with h5py.File(tmp_path / "scan.h5", "w") as f: f["exchange/data"] = h5py.ExternalLink("elsewhere.h5", "data")
    assert told(tmp_path / "scan.h5")
    with h5py.File(tmp_path / "scan.h5", "w") as f:
        f.create_dataset("exchange/data", (2**20, 2, 2**20), "float32", chunks=(1, 1, 1024))
    assert "no slice has so many readings" in told(tmp_path / "scan.h5")
    path, _ = nxtomo(tmp_path)
    with h5py.File(path, "a") as f:
        del f["entry1/tomo_entry/sample/rotation_angle"]
        f["entry1/tomo_entry/sample/rotation_angle"] = DEGREES
    assert "18 images have 18 keys and 12 angles" in told(path)

@pytest.mark.parametrize("unit, factor", [("radians", 57.29578), (["rad"], 57.29578), ("degree", 1), (7, 1)])
def test_units_of_angles(unit, factor, tmp_path):
    "In a text of variable length, which a process of its own reads; a list of one; or no text."
    with h5py.File(tmp_path / "scan.h5", "w") as f:
        f["exchange/data"], f["exchange/theta"] = VOLUME, DEGREES
        f["exchange/theta"].attrs["units"] = unit
    np.testing.assert_allclose(read_fields(tmp_path / "scan.h5")["angles"], DEGREES * factor, rtol=1e-6)

def test_bad_angles(tmp_path):
    path, _ = stack(tmp_path)
    (tmp_path / "words.txt").write_text("zero one two")
    for angles, words in {None: "this has no angles; give them, in degrees, as a file", "names": "no pictures are named after their angles",
                          str(tmp_path / "words.txt"): "is no file of numbers", str(tmp_path / "none"): "is not a file",
                          range(16): "its axes are swapped, transpose it"}.items():
        with pytest.raises(ValueError) as error: read_fields(path, angles=angles)
        assert words in str(error.value)

def test_an_uncompressed_mat_is_not_to_be_copied_again(tmp_path):
    savemat(tmp_path / "raw.mat", dict(m=VOLUME[:, 2], angles=DEGREES))
    assert (text := told(tmp_path / "raw.mat")).endswith("so damage would go unnoticed; save it with -v7")
    assert "copy" not in text

def test_published_reconstructions_are_found_by_their_names(tmp_path):
    "Of training discs they are named after the scan, of test discs after the disc."
    path, _ = htc(tmp_path)
    full = dict(sinogram=VOLUME[:, 2], parameters=dict(angles=DEGREES, distanceSourceOrigin=400., distanceSourceDetector=600.,
                                                       pixelSizePost=0.3))
    savemat(tmp_path / "htc2022_09z_full.mat", dict(CtDataFull=full), do_compression=True)
    for name in "htc2022_09z_recon_fbp.mat", "htc2022_09z_full_recon_fbp.mat":
        for scan in path, tmp_path / "htc2022_09z_full.mat":
            assert load_scan(scan, angles=3, size=8).truth is None
            savemat(tmp_path / name, dict(reconFullFbp=np.ones((512, 512))), do_compression=True)
            assert load_scan(scan, angles=3, size=8).truth.mean().item() == pytest.approx(1 / (0.3 * 400 / 600))
            (tmp_path / name).unlink()


# Corrections

def test_low_counts_are_missing_and_not_infinite():
    counts = np.random.default_rng(1).poisson(3, (40, 30)).astype(float)
    y, std, valid = line_integrals(counts, np.full(30, 9.))
    assert np.isfinite(y).all() and np.isfinite(std).all() and (valid == (counts > 0)).all()
    np.testing.assert_allclose(y[valid], -np.log(counts[valid] / 9))
    np.testing.assert_allclose(std[valid], counts[valid]**-0.5)

def test_frames_are_averaged():
    light, beam = transmission(COUNTS[:, 0].astype(float), FLAT[:, 0], DARK[:, 0])
    np.testing.assert_allclose(light, COUNTS[:, 0] - DARK[:, 0].mean(0))
    np.testing.assert_allclose(beam, FLAT[:, 0].mean(0) - DARK[:, 0].mean(0))
    with pytest.raises(ValueError, match="dark has shape"): transmission(COUNTS[:, 0], FLAT[:, 0], DARK[:, 0, :3])

@lru_cache(2)
def tenths_of_bins(views, arc): return parallel_beam(np.deg2rad(np.arange(views) * arc / views), (64, 64), 4001, 0.1)

def scanned(phantom, views, arc, centre, bins, noise, seed):
    "A sinogram with the axis at `centre`, by summing tenths of bins, and its angles."
    degrees, first = np.arange(views) * arc / views, round(5 * 400 - 10 * centre - 5)
    fine = tenths_of_bins(views, arc)(phantom(64, seed)).numpy()
    y = fine[:, first:first + 10 * bins].reshape(views, bins, 10).mean(-1)
    exact = (2000 - (first + 4.5)) / 10
    return y + noise * np.abs(y).mean() * np.random.default_rng(seed).standard_normal(y.shape), degrees, exact

@pytest.mark.parametrize("phantom", [walnut, ellipses])
@pytest.mark.parametrize("views, arc", [(60, 180), (90, 360)])
def test_the_axis_is_found(phantom, views, arc):
    "24 scans, 100 bins, 2 % noise, the axis up to 15 bins beside the middle: within 0.1 bins, and the standard error is right."
    z = []
    for seed, offset in enumerate(np.linspace(-15, 15, 6)):
        y, degrees, exact = scanned(phantom, views, arc, 49.5 + offset, 100, 0.02, seed)
        assert valid_readings(y).all()
        shuffled = np.random.default_rng(seed).permutation(views)
        found, std = find_centre(y[shuffled] + 0.3, degrees[shuffled])  # in any order, whatever the offset
        assert abs(found - exact) < 0.1
        z.append((found - exact) / std)
    assert np.abs(z).max() < 5

def test_an_arc_and_irregular_angles_will_do():
    y, degrees, exact = scanned(ellipses, 80, 180, 46.3, 100, 0.02, 3)
    arc = np.r_[0:30:2, 30:66, 66:78:3]
    assert abs(find_centre(y[arc], degrees[arc])[0] - exact) < 0.3

def test_dead_and_hot():
    y, _, _ = scanned(walnut, 60, 180, 49.5, 100, 0.02, 1)
    broken = y.copy()
    broken[:, 40], broken[:, 55], broken[7, 30] = 0, broken[:, 55] + 3 * y.std(), 9 * y.max()
    valid = valid_readings(broken)
    assert np.argwhere(~valid).tolist() == [[i, j] for i in range(60) for j in (30, 40, 55) if j != 30 or i == 7]

def test_air_is_nothing():
    y, _, _ = scanned(ellipses, 60, 180, 49.5, 100, 0.02, 1)
    offset, _, doubt = air_offset(y + 0.39)
    assert offset == pytest.approx(0.39, abs=0.05) and not doubt
    assert "no air" in air_offset(y[:, 35:65])[2]


# Measured scans of other instruments

@needs_measured
@pytest.mark.parametrize("row", [0, 1])
def test_the_axis_of_the_tooth(row):
    fields = read_fields(MEASURED / "tooth.h5", row)
    y = line_integrals(*transmission(fields["counts"], fields["flat"], fields["dark"]))[0]
    centre, std = find_centre(y, fields["angles"])
    assert abs(centre - 295.75) < 0.25 and std < 0.05

@needs_measured
@pytest.mark.parametrize("name, fields", [
    ("pet_transmission_ecat921.npz", "angles blank centre counts geometry pixel_size pixel_unit"),
    ("stxm_i18_52x101.npz", "angles centre geometry intensity measurement monitor pixel_size pixel_unit"),
    ("haadf_needle_etspy_x128.npz", "angles centre geometry measurement note pixel_size pixel_unit"),
    ("txrm_test_chip_tomo.txrm", "angles bin_size measurement pixel_size unit x_shifts")])
def test_foreign_names(name, fields): assert " ".join(sorted(read_fields(MEASURED / name))) == fields

@needs_measured
def test_txrm():
    fields = read_fields(MEASURED / "txrm_test_chip_tomo.txrm", row=10)
    assert fields["measurement"].shape == (7, 256) and fields["bin_size"] == pytest.approx(1.5578948e-4)
    np.testing.assert_allclose(fields["angles"], np.arange(-45, 46, 15), atol=0.05)


def test_a_foreign_archive_may_know_its_bins(tmp_path):
    np.savez(tmp_path / "some.npz", sinogram=VOLUME[:, 2], theta=DEGREES, bin_size=0.3)
    with pytest.warns(UserWarning): scan = load_scan(tmp_path / "some.npz")
    assert scan.operator.geometry.bin_size == 0.3 and scan.measurement.shape == (VIEWS, BINS)


# The command

def imported(capsys, *argv):
    code = main(["import", *map(str, argv)])
    return code, *capsys.readouterr()

@pytest.mark.parametrize("write", FORMATS)
def test_import(write, tmp_path, capsys):
    path, _ = write(tmp_path)
    how = ("--angles", 0, 165) if write in WITHOUT_ANGLES else ()
    code, out, err = imported(capsys, path, *how, "--centre", 7.25, "--out", tmp_path / "new" / "out.npz")
    assert (code, err) == (0, "") and "views           12\n" in out and "bin 7.25, the middle is 7.5" in out
    with np.load(tmp_path / "new" / "out.npz", allow_pickle=False) as f: fields = dict(f)
    assert {"measurement", "angles", "geometry", "bin_size", "pixel_size", "size", "centre", "name"} <= fields.keys()
    assert not fields.keys() & {"counts", "flat", "dark", "blank", "comment"}
    assert fields["measurement"].shape == (VIEWS, BINS) and np.isfinite(fields["measurement"]).all()
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["out.npz", "out.png"]
    if write is htc: return  # whose angles, size and bins have other defaults
    with pytest.warns(UserWarning, match="air|outermost"): scan = load_scan(path, centre=7.25, degrees=how[1:] or None)
    written = load_scan(tmp_path / "new" / "out.npz")
    assert torch.equal(scan.measurement, written.measurement)
    assert repr(scan.operator.geometry) == repr(written.operator.geometry)

def test_import_of_photons(tmp_path, capsys):
    y, degrees, exact = scanned(walnut, 60, 180, 41.7, 100, 0, 2)
    rng = np.random.default_rng(0)
    counts = rng.poisson(300 * np.exp(-y / y.max() * 2)).astype("uint16")
    counts[:, 60] = 0
    tifffile.imwrite(tmp_path / "s.tif", counts)
    tifffile.imwrite(tmp_path / "f.tif", rng.poisson(300, (20, 100)).astype("uint16"))
    np.savetxt(tmp_path / "a.txt", degrees)
    code, out, err = imported(capsys, tmp_path / "s.tif", "--angles", tmp_path / "a.txt", "--flat", tmp_path / "f.tif", "--counts",
                              "--bin-size", 0.5, "--size", 50, "--out", tmp_path / "out.npz")
    assert (code, err) == (0, "")
    for words in "of photons", "counts, with 20 flat frames", "60 of 6000", "bins [60] are dead or hot": assert words in out
    with np.load(tmp_path / "out.npz") as f:
        assert abs(f["centre"] - exact) < 0.1 and f["pixel_size"] == 1 and f["size"] == 50
        assert np.flatnonzero(~f["valid"].any(0)).tolist() == [60]
        assert "measurement" not in f and np.array_equal(f["counts"][:, :60], counts[:, :60])
        expected = f["blank"] * np.exp(-y / y.max() * 2)
        z = ((f["counts"] - expected) / expected**0.5)[f["valid"]]
        assert z.std() == pytest.approx(1, abs=0.15)
    scan = load_scan(tmp_path / "out.npz", angles=30, bins=50)
    assert scan.poisson and int((~scan.valid).sum()) == 30 and scan.operator.geometry.centre == pytest.approx(exact / 2 - 0.25, abs=0.1)

@needs_measured
def test_import_of_the_tooth(tmp_path, capsys):
    code, out, err = imported(capsys, MEASURED / "tooth.h5", "--row", 0, "--out", tmp_path / "tooth.npz")
    assert (code, err) == (0, "") and "counts, with 10 flat and 10 dark frames" in out and "nothing is known about lengths" in out
    with np.load(tmp_path / "tooth.npz") as f: assert abs(f["centre"] - 295.75) < 0.25
    with pytest.warns(UserWarning, match=r"the axis is at bin 295\.8. ± 0\.\d+, as the readings say"):
        scan = load_scan(MEASURED / "tooth.h5", angles=60, size=256)
    assert scan.measurement.shape == (60, 320) and scan.operator.geometry.centre == pytest.approx(295.75 / 2 - 0.25, abs=0.13)

def test_reconstruct_takes_what_a_scanner_wrote(tmp_path, capsys):
    "As far as nothing has to be said about it; what was guessed is told."
    stack(tmp_path)
    assert main(["reconstruct", str(tmp_path / "scan.tif"), "--out", str(tmp_path / "out")]) == 2
    assert "this has no angles; give them, in degrees" in capsys.readouterr().err and not (tmp_path / "out").exists()
    path, _ = exchange(tmp_path)
    small = "--image-only --iterations 3 --channels 8 --scales 2 --quiet".split()
    assert main(["reconstruct", str(path), *small, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert "scan.h5: readings are counts, with 3 flat and 2 dark frames; " in said and "the axis is at bin" in said
    assert (tmp_path / "out" / "summary.json").exists()

def test_truncated_projections_get_room(tmp_path, capsys):
    "1.5 times the field of view: by default for a scanner's files, for our own layout on the command line."
    degrees = np.arange(24) * 7.5
    A = parallel_beam(np.deg2rad(degrees), (48, 48), 32)
    np.save(tmp_path / "cut.npy", y := A(walnut(48)).numpy())
    with pytest.warns(UserWarning, match="projections seem to be truncated, and the image is 1.5 times as wide"):
        scan = load_scan(tmp_path / "cut.npy", degrees=degrees, centre=15.5)
    assert scan.operator.domain_shape == (48, 48) and scan.pixel_size == 1 and not cramped(scan)
    assert any("in the field of view only" in doubt for doubt in doubts(scan))
    own = Scan(torch.from_numpy(y), parallel_beam(A.angles, (32, 32), 32), noise_std=torch.full((24, 32), 0.1))
    assert cramped(own) and any("widened(scan) gives the image room" in doubt for doubt in doubts(own))
    wide = widened(own)
    assert torch.equal(wide.operator(walnut(48)), A(walnut(48))) and torch.equal(wide.white.measurement, own.white.measurement)
    save_scan(own, tmp_path / "own.npz")
    small = "--image-only --iterations 3 --channels 8 --scales 2 --quiet".split()
    assert main(["reconstruct", str(tmp_path / "own.npz"), *small, "--out", str(tmp_path / "out")]) == 0
    assert "truncated, so the image is 1.5 times as wide" in capsys.readouterr().err
    assert tifffile.imread(tmp_path / "out" / "image.tif").shape == (48, 48)
    with pytest.raises(TypeError, match="is a MatrixOperator, not a RayTransform"):
        widened(Scan(torch.ones(4, 4), MatrixOperator(np.eye(16), (4, 4), (4, 4))))

def test_a_detector_that_sees_one_half_needs_no_room_but_its_image_does(tmp_path):
    "The axis near an end, a full turn: the object is in front of one end of the detector in every view."
    degrees, image = np.arange(36) * 10, walnut(48)
    y = parallel_beam(np.deg2rad(degrees), (48, 48), 30, centre=4.)(image).numpy()
    np.save(tmp_path / "half.npy", y)
    with pytest.warns(UserWarning) as told: scan = load_scan(tmp_path / "half.npy", degrees=degrees, centre=4.0)
    assert "truncated" not in str(told[0].message) and scan.operator.domain_shape == (51, 51)
    assert not any("outermost" in doubt for doubt in doubts(scan))

@pytest.mark.parametrize("argv, words", [
    (("missing.h5",), "missing.h5 is not a file"), (("scan.tif",), "this has no angles"),
    (("scan.tif", "--angles", "0", "165", "--row", "7"), "row=7 is out of range"),
    (("scan.tif", "--angles", "0", "x"), "could not convert string to float: 'x'; give a file, the first and the last, or names"),
    (("scan.tif", "--angles", "0", "165", "--counts"), "give it as flat"),
    (("scan.tif", "--angles", "0", "165", "--dark", "scan.tif"), "give it as flat"),
    (("scan.tif", "--angles", "0", "165", "--geometry", "fan"), "a fan beam needs bin_size and origin_detector and"),
    (("scan.tif", "--angles", "0", "165", "--bin-size", "-1"), "bin_size=-1 is out of range"),
    (("scan.tif", "--angles", "0", "165", "--centre", "400"), "centre=400 is not one of the 16 bins"),
    (("scan.tif", "--angles", "0", "165", "--size", "0"), "size=0 is out of range"),
    (("scan.tif", "--angles", "0", "165", "--size", "1000"), "size=1000 is out of range: choose 1 to 800"),
    (("scan.tif", "--angles", "0", "165", "--flat", "none.tif"), "none.tif is not a file")])
def test_import_refuses_in_one_line(argv, words, tmp_path, capsys, monkeypatch):
    stack(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, out, err = imported(capsys, *argv, "--out", "new/out.npz")
    assert (code, out, err.count("\n")) == (2, "", 1) and words in err and not (tmp_path / "new").exists()

def test_import_writes_npz_only(tmp_path, capsys):
    stack(tmp_path)
    with pytest.raises(SystemExit): main(["import", "scan.tif", "--out", "out.npz", "--centre", "left"])
    assert "argument --centre: invalid auto_or_bin value: 'left'" in capsys.readouterr().err
    code, _, err = imported(capsys, tmp_path / "scan.tif", "--angles", 0, 165, "--out", tmp_path / "out.h5")
    assert code == 2 and "must end in .npz" in err


# A fan beam out of a cone beam

def cone_rays(g, heights):
    "Those of a circular cone beam, (views, rows, bins, 3): of `g` in the plane of the source, other rows at `heights`."
    starts, ends = (np.repeat(p[:, None], len(heights), 1) for p in g.rays(0.))
    high = np.broadcast_to(np.asarray(heights, float)[:, None], starts.shape[:-1])
    return np.stack([*np.moveaxis(starts, -1, 0), 0 * high], -1), np.stack([*np.moveaxis(ends, -1, 0), high], -1)


@pytest.mark.parametrize("middle", [4, 3.5, 4.3])
def test_the_midplane_of_a_cone_is_a_fan(middle):
    "Of an object that is the same at all heights, rays that climb by a row are longer by 1/5000."
    A = fan_beam(np.arange(7) * 0.9, (16, 16), 24, 1.3, 60., 40.)
    x = np.random.default_rng(0).random((16, 16))
    cone = ray_matrix(*cone_rays(A.geometry, 2. * (np.arange(9) - middle)), (10, 16, 16))
    views = (cone @ np.repeat(x[None], 10, 0).ravel()).reshape(7, 9, 24)
    plane = A(torch.tensor(x)).numpy()
    assert np.abs(midplane(views, middle) - plane).max() < 1e-4 * plane.max()
    assert np.abs(midplane(views, np.full(7, middle)) - midplane(views, middle)).max() == 0
    if middle == 4: assert np.array_equal(midplane(views), views[:, 4])


def test_the_midplane_follows_a_detector_that_moves():
    "The row of the plane differs from view to view; a ball beside the axis, by its chords."
    g = fan_beam(np.arange(24) * np.pi / 12, (16, 16), 60, 1.2, 100., 60.).geometry
    rows, plane = np.random.default_rng(0).uniform(8, 12, 24), chords(*g.rays(0.), [5., 3.], 9.)
    views = np.stack([chords(*(p[k] for p in cone_rays(g, 0.5 * (np.arange(21) - row))), [5., 3., 0.], 9.)
                      for k, row in enumerate(rows)])
    def off(found): return np.abs(found - plane).mean() / plane.mean()
    assert off(midplane(views, rows)) < 4e-4
    assert min(off(midplane(views)), off(midplane(views, rows.mean()))) > 5 * off(midplane(views, rows))

def chords(starts, ends, centre, radius):
    "The length of rays in a ball, or in a disc."
    way = (ends - starts) / np.linalg.norm(ends - starts, axis=-1, keepdims=True)
    along = ((centre - starts) * way).sum(-1, keepdims=True)
    return 2 * np.sqrt((radius**2 - ((centre - starts - along * way)**2).sum(-1)).clip(0))


@pytest.mark.parametrize("views, row, message", [
    (np.ones((3, 4)), None, "views: shape (3, 4), not (views, rows, bins)"),
    (np.ones((3, 4, 5)), 3.1, "row=3.1: give one number from 0 to 3"),
    (np.ones((3, 4, 5)), -1, "row=-1"), (np.ones((3, 4, 5)), [1, 2], "or 3 of them, one for each view"),
    (np.ones((3, 4, 5)), np.nan, "row=nan"), (np.ones((3, 4, 5)) * 1j, None, "must hold real numbers"),
    (np.ones((0, 4, 5)), None, "shape (0, 4, 5)")])
def test_no_midplane(views, row, message):
    with pytest.raises(ValueError) as error: midplane(views, row)
    assert message in str(error.value)


# What was read, and then silently taken for something else, or told in words that do not help

@pytest.fixture
def foreign(tmp_path):
    "Writes a sinogram of 24 views and 40 bins, whose axis is at bin 20.3, with what else a file may say."
    degrees = np.arange(24) * 7.5
    y = parallel_beam(np.deg2rad(degrees), (32, 32), 40, centre=20.3)(walnut(32)).numpy()
    def write(**fields):
        np.savez(tmp_path / "foreign.npz", **(dict(sinogram=y, theta=degrees) | fields))
        return tmp_path / "foreign.npz"
    write.y = y
    return write

@pytest.mark.parametrize("centre", [17, 17.0, np.float32(17), np.int64(17), np.array(17.0)])
def test_a_centre_that_is_given_is_taken(centre, foreign): assert import_fields(foreign(), centre=centre)[0]["centre"] == 17
def test_the_first_bin_is_a_centre(foreign): assert import_fields(foreign(), centre=0)[0]["centre"] == 0

@pytest.mark.parametrize("given, words", [
    (dict(centre="left"), "centre='left': give a bin, or \"auto\""), (dict(geometry="cone"), "geometry='cone' must be"),
    (dict(flat=0), "flat=0 is out of range"), (dict(flat=np.float32(np.nan)), "flat=nan"),
    (dict(degrees=(0, np.inf)), "angles has NaN or infinite numbers")])
def test_bad_arguments_are_named(given, words, foreign):
    with pytest.raises(ValueError) as error: import_fields(foreign(), **given)
    assert words in str(error.value) and "\n" not in str(error.value)

def test_bad_fields_are_named_with_the_file(foreign):
    bad = [(dict(valid=np.ones(7, bool)), "valid has shape (7,) and holds bool"), (dict(center="left"), "centre must hold"),
           (dict(valid=np.ones(40, int)), "valid has shape (40,) and holds int64"), (dict(pixel_size=[1, 2]), "pixel_size has two"),
           (dict(counts=foreign.y), "give it as flat"), (dict(counts=foreign.y, blank=0), "reads nothing; check flat"),
           (dict(sinogram=foreign.y[:0], theta=[]), "has shape (0, 40)")]
    for fields, words in bad:
        with pytest.raises(ValueError) as error: load_scan(foreign(**fields), bins=40)
        assert words in str(error.value) and "foreign.npz: " in str(error.value)

def test_a_number_for_the_beam_goes_before_frames_in_the_file(tmp_path):
    path, _ = pictures(tmp_path)
    fields = read_fields(path, angles=(0, 165), flat=np.int64(700))
    assert fields["blank"] == 700 and "flat" not in fields
    dark = DARK[:, ROWS // 2].mean(0)
    y = import_fields(path, (0, 165), flat=700, centre=8)[0]["measurement"]
    np.testing.assert_allclose(y, -np.log((COUNTS[:, ROWS // 2] - dark) / (700 - dark)), atol=1e-5)

def test_the_axis_of_readings_without_their_minus(foreign):
    plus, minus = (find_centre(y, np.arange(24) * 7.5) for y in (foreign.y, 3 - foreign.y))
    assert plus == pytest.approx(minus, abs=1e-3) and abs(plus[0] - 20.3) < 0.2

@pytest.mark.parametrize("y", [np.ones((24, 40)), np.zeros((24, 40))])
def test_readings_that_say_nothing_of_an_axis(y, foreign):
    fields, told = import_fields(foreign(sinogram=y))
    assert fields["centre"] == 19.5 and "the readings do not show where the axis is" in "".join(told)

def test_of_a_limited_arc_no_axis_is_found(tmp_path):
    "Views of it are consistent for many axes, up to 24 bins beside the truth, each with a small standard error."
    y, degrees, _ = scanned(ellipses, 80, 120, 46.3, 100, 0.02, 3)
    np.savez(tmp_path / "arc.npz", sinogram=y, theta=degrees)
    fields, told = import_fields(tmp_path / "arc.npz")
    assert fields["centre"] == 49.5 and any("so the axis is open; give it as centre; it is taken" in t for t in told)
    with pytest.raises(ValueError, match="a wedge of 6[12]°"): import_fields(tmp_path / "arc.npz", centre="auto")

def test_an_image_whose_width_is_given_is_not_said_to_be_wider(foreign):
    cut = foreign.y[:, 8:32]
    assert import_fields(foreign(sinogram=cut))[0]["size"] == 36
    for given in dict(size=24, pixel_size=1.0), dict(truth=np.ones((24, 24))):
        fields, told = import_fields(foreign(sinogram=cut, **({} if "size" in given else given)), **(given if "size" in given else {}))
        assert (fields["size"], fields["pixel_size"]) == (24, 1) and any("truncated" in doubt for doubt in told)
        assert not any("wide" in doubt for doubt in told)

@pytest.mark.filterwarnings("error")
def test_one_view_is_read_without_complaints_of_numpy(foreign):
    assert import_fields(foreign(sinogram=foreign.y[:1], theta=[0]))[0]["measurement"].shape == (1, 40)

def test_half_a_detector_in_vectors_is_known_too():
    "The same scanner said in another way: no false alarm, and no wider image."
    for A in (fan_beam(np.arange(36) * np.pi / 18, (32, 32), 30, 1.6, 100., 50., centre=4.),
              parallel_beam(np.arange(36) * np.pi / 18, (32, 32), 20, centre=3.)):
        g = A.geometry
        V = vector_beam(*g.vectors(), (32, 32), g.bins, fan=g.fan)
        for B in A, V:
            scan = Scan(B(walnut(32)), B)
            assert not cramped(scan) and not any("outermost" in doubt for doubt in doubts(scan))

def test_nexus_of_any_name(tmp_path):
    "Text in HDF5 ends with a null; a run must not fail for it when all is done."
    write_nexus(tmp_path / "r.nxs", np.ones((2, 3)), pixel_size=(2.0, 1.0), unit="1/m\0m", name="a\0b")
    with h5py.File(tmp_path / "r.nxs") as f:
        assert f["entry/title"][()] == b"ab" and f["entry/data/data"].attrs["units"] == "1/mm"
        assert f["entry/data/y"][()].tolist() == [1, -1] and f["entry/data/x"][()].tolist() == [-1, 0, 1]

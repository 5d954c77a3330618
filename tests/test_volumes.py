"Stacks of slices: each as it would be alone, whatever fails or is killed, in a file that others open."
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from dip_uq.cli import main
from dip_uq.data import simulate, walnut
from dip_uq.formats import count_rows
from dip_uq.networks import UNet
from dip_uq.pipeline import solve
from dip_uq.rays import parallel_beam
from dip_uq.volumes import create_volume, finish_volume, level_shapes, part_of, read_note, solve_slice, solve_volume, stack_of

zarr = pytest.importorskip("zarr", reason="zarr is not installed")
dask = pytest.importorskip("distributed", reason="dask.distributed is not installed").dask
SIZE, FIT = 16, dict(iterations=30, seed=0)


def scan_of(i):
    return simulate(walnut(SIZE, 3), parallel_beam(np.arange(10) * np.pi / 10, (SIZE, SIZE), 23), noise=0.05, seed=i)


def on_disk(i, path):
    if not Path(path).exists(): raise OSError("the disk is lost")
    return scan_of(i)


def net(): return UNet(2, 4)


@pytest.fixture(autouse=True)
def forked():
    "Workers come from a process that has imported everything before; those that are killed below are spawned, as usual."
    forkserver.ensure_running()  # before Dask says what is to be imported
    with dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}): yield


def test_slices_are_as_they_would_be_alone_and_failures_cost_nothing_else(tmp_path):
    "And begun again, only what failed is done; the rest is not even read."
    threads, out, disk = torch.get_num_threads(), tmp_path / "stack.zarr", tmp_path / "disk"
    slices = [scan_of(0), partial(on_disk, 1, str(disk)), scan_of(2)]
    def run(**more): return solve_volume(slices, out, net(), workers=1, progress=False, **FIT | more)
    told = run()
    assert [note.get("error") for note in told] == [None, "OSError: the disk is lost", None]
    torch.set_num_threads(1)
    try: alone = solve(scan_of(2), net(), progress=False, **FIT)
    finally: torch.set_num_threads(threads)
    x = zarr.open_array(out / "0")[:]
    np.testing.assert_array_equal(x[:, 2], torch.stack([alone.image, alone.std]).numpy())
    assert np.isnan(x[:, 1]).all() and told[2]["zstd"] == alone.summary()["zstd"]
    disk.touch()
    again = run()
    assert again[::2] == told[::2] and "error" not in again[1]
    assert np.isfinite(zarr.open_array(out / "0")[:]).all() and not out.with_name("stack.zarr.state").exists()
    disk.unlink()
    assert run() == again  # all is there
    with pytest.raises(ValueError, match="holds another volume"): run(iterations=31)
    slices[0] = scan_of(5)
    with pytest.raises(ValueError, match="holds another volume"): run()


class Never:
    "A client that must not be asked."


def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path):
    def refused(match, slices=(scan_of(0),), kind=ValueError, **options):
        with pytest.raises(kind, match=match):
            solve_volume(slices, tmp_path / "v.zarr", client=Never(), progress=False, **dict(net=net()) | options)
        assert not list(tmp_path.glob("**/0"))
    refused("there are none", [])
    refused("iterationz= is unknown", kind=TypeError, iterationz=3)
    refused("state= is unknown", kind=TypeError, state="run")
    refused("every=0 is out of range", every=0)
    refused("net", net=torch.nn.Linear(2, 2))
    refused("the disk is lost", [partial(on_disk, 0, "nowhere")], kind=OSError)


def test_slices_of_another_size_fail_and_notes_of_another_volume_do_not_count(tmp_path):
    out, other = tmp_path / "v.zarr", simulate(walnut(18, 3), parallel_beam([0.0, 1.0], (18, 18), 23), noise=0.05)
    create_volume(out, 2, scan_of(0), dict(a=1))
    assert "of the volume [16, 16, 1.0, 1.0]" in solve_slice(other, 0, out, net(), FIT)["error"]
    assert "error" not in solve_slice(scan_of(0), 0, out, net(), FIT) and read_note(out, 0)["slice"] == 0
    shutil.rmtree(out)
    create_volume(out, 2, scan_of(0), dict(a=1))
    assert read_note(out, 0) is None  # though it is there
    with pytest.raises(ValueError, match="holds another volume"): create_volume(out, 2, scan_of(0), dict(a=2))


def test_neighbours_educate(tmp_path):
    "A fifth of the steps, from the weights of the slice that was finished; from fresh ones where that failed."
    out, seen = tmp_path / "stack.zarr", []
    create_volume(out, 3, scan_of(0), {})
    def spy(scan, net, **options):
        seen.append((options["iterations"], options.get("educated", False), net.last.weight.detach().clone()))
        return solve(scan, net, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dip_uq.volumes.solve", spy)
        for i, near in (0, None), (1, 0), (2, 7): assert "error" not in solve_slice(scan_of(i), i, out, net(), FIT, near)
    assert [s[:2] for s in seen] == [(30, False), (6, True), (30, False)]
    kept = solve(scan_of(0), net(), progress=False, **FIT).recon.net.last.weight
    assert torch.allclose(seen[1][2], kept, atol=1e-4) and not torch.equal(seen[2][2], seen[1][2])


def test_the_pyramid_is_of_means_and_opens_elsewhere(tmp_path):
    scan = simulate(walnut(97, 0), parallel_beam([0.0], (97, 97), 10, pixel_size=0.5), noise=0.05)
    scan = replace(scan, unit="1/mm")
    out, fine = tmp_path / "v.zarr", torch.rand(2, 2, 97, 97)
    create_volume(out, 2, scan, {}, distance=2.0)
    group = zarr.open_group(out)
    group["0"][:] = fine.numpy()
    finish_volume(out, [])
    assert level_shapes((97, 97)) == [(97, 97), (49, 49)] and level_shapes((40, 300)) == [(40, 300), (20, 150), (10, 75), (5, 38)]
    coarse = group["1"][:]
    np.testing.assert_allclose(coarse[..., :48, :48], fine[..., :96, :96].unflatten(2, (48, 2)).unflatten(4, (48, 2)).mean((3, 5)), rtol=1e-5)
    np.testing.assert_allclose(coarse[..., 48, 48], fine[..., 96, 96], rtol=1e-6)  # a corner is its own mean, not a quarter of it
    first, second = group.attrs["ome"]["multiscales"][0]["datasets"]
    assert [axis.get("unit") for axis in group.attrs["ome"]["multiscales"][0]["axes"]] == [None, *3 * ["millimeter"]]
    assert second["coordinateTransformations"] == [dict(type="scale", scale=[1.0, 2.0, 1.0, 1.0]), dict(type="translation", translation=[0, 0, 0.25, 0.25])]
    reader, io = (pytest.importorskip(f"ome_zarr.{name}", reason="ome-zarr is not installed") for name in ("reader", "io"))
    found, = (node for node in reader.Reader(io.parse_url(out))() if node.data)
    assert [level.shape for level in found.data] == [(2, 2, 97, 97), (2, 2, 49, 49)]
    np.testing.assert_array_equal(np.asarray(found.data[0]), fine)


KILLED = """
from pathlib import Path
import sys
sys.path.insert(0, {tests!r})
from test_volumes import *
if __name__ == "__main__": solve_volume([scan_of(i) for i in range(4)], {out!r}, net(), workers=2, progress=False, **FIT)
"""


def test_killed_workers_and_clients(tmp_path):
    "A worker, then the program itself; begun again, all slices are there, and as they would be alone."
    script, out, kills = tmp_path / "run.py", tmp_path / "stack.zarr", ["client", "worker"]
    script.write_text(KILLED.format(tests=str(Path(__file__).parent), out=str(out)))
    for attempt in range(4):
        run = subprocess.Popen([sys.executable, script], stderr=subprocess.DEVNULL)
        while kills and run.poll() is None:
            time.sleep(0.2)
            if not list(part_of(out, 0, "json").parent.glob("*.json")): continue
            workers = [p for p in psutil.Process(run.pid).children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]
            if kills.pop() == "client": os.kill(run.pid, signal.SIGKILL)
            elif workers: workers[-1].kill()
        if run.wait() == 0: break
    threads, x = torch.get_num_threads(), zarr.open_array(out / "0")[:]
    torch.set_num_threads(1)
    try: alone = [solve(scan_of(i), net(), progress=False, **FIT) for i in range(4)]
    finally: torch.set_num_threads(threads)
    np.testing.assert_array_equal(x, torch.stack([torch.stack([s.image, s.std]) for s in alone], 1).numpy())


def test_the_command_reads_a_file_row_by_row(tmp_path, capsys):
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    line = torch.stack([scan_of(i).measurement for i in range(3)], 1).numpy()
    with h5py.File(path := tmp_path / "stack.h5", "w") as f:
        f["exchange/data"], f["exchange/theta"] = line, np.arange(10) * 18.0
    assert count_rows(path) == 3
    some = [given() for given in stack_of(path)]
    np.testing.assert_allclose(some[2].measurement, line[:, 2], rtol=1e-5)
    assert len({s.operator.geometry.centre for s in some}) == 1  # of the middle one, for all
    small = "--scales 2 --channels 4 --iterations 20 --workers 1 --quiet".split()
    assert main(["volume", str(path), "--rows", "1", "2", *small, "--out", str(tmp_path / "v.zarr")]) == 0
    assert "written: 2 slices" in capsys.readouterr().out
    known = json.loads((tmp_path / "v.zarr" / "zarr.json").read_text())["attributes"]["dip_uq"]
    assert [note["slice"] for note in known["slices"]] == [0, 1]
    assert main(["volume", str(path), *small, "--out", str(tmp_path / "v.zarr")]) == 2
    assert "holds another volume" in capsys.readouterr().err
    assert main(["volume", str(path), "--rows", "1", "3", *small, "--out", str(tmp_path / "w.zarr")]) == 2
    assert "choose some of 0 to 2" in capsys.readouterr().err

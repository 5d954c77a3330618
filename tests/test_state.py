"""Runs that are killed, interrupted, or run beside each other: they go on, say so, and end with the same bits.

The processes here run the command line, and are stopped in every stage. `benchmarks/killed.py` does the same at random
moments, at size.
"""
import json
import multiprocessing
import os
import re
import signal
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from dip_uq import cli, dip, files, pipeline
from dip_uq.cli import demo_scan
from dip_uq.dip import reconstruct
from dip_uq.files import load_tensors
from dip_uq.networks import UNet
from dip_uq.pipeline import solve

DEMO = "demo --size 20 --angles 8 --iterations 60 --channels 4 --scales 2 --quiet".split()
STAGES = "fit", "rows", "evidence", "std"  # what the pieces of each are called
SECONDS = 3.0  # until a process has ended: two, and one more where the machine is busy
VARIES = "seconds", "peak_memory_mb", "command"


def command(folder, stuck=False):
    "The command line as a process of its own, with its errors in a file; `stuck`: after the fit, one endless product."
    torch.set_num_threads(1)  # the parent's rounding
    dip.STATE_SECONDS, dip.SHARE = 0.0, np.inf
    os.dup2(os.open(f"{folder}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    def endless(*args, **options):
        left, right = torch.ones(10**4, 10**4), torch.ones(10**4, 10**5)
        Path(f"{folder}.stuck").touch()
        return left @ right
    if stuck: pipeline.fit_evidence = endless
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where pytest runs in the background, it is ignored
    sys.argv = ["dip-uq", *DEMO, "--out", str(folder)]
    sys.exit(cli.main())


def start(*args):
    process = multiprocessing.get_context("forkserver").Process(target=command, args=args)
    process.start()
    return process


def wait_for(process, folder, piece):
    "Until the state in `folder` has a piece of that stage; False where the process ends before."
    while process.is_alive():
        if any(Path(folder, "state").glob(f"{piece}*.safetensors")): return True
        time.sleep(0.001)
    return False


def contents(folder):
    "All results, without what differs from run to run."
    found = {}
    for path in sorted(Path(folder).iterdir()):
        if path.suffix == ".safetensors": found |= {(path.name, k): v for k, v in load_tensors(path)[0].items()}
        elif path.suffix == ".npz":
            with np.load(path) as arrays: found[path.name] = arrays["samples"]
        elif path.suffix == ".json":
            found[path.name] = {k: v for k, v in json.loads(path.read_text()).items() if k not in VARIES}
        elif path.suffix == ".tif": found[path.name] = path.read_bytes()
        else: found[path.name] = None
    return found


def assert_same(folder, whole):
    found = contents(folder)
    assert found.keys() == whole.keys()
    for name, value in whole.items():
        assert found[name] == value if isinstance(value, (dict, bytes, type(None))) else np.array_equal(found[name], value), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The results of a run that was left in peace."
    folder = tmp_path_factory.mktemp("state") / "whole"
    process = start(folder)
    process.join(60)
    assert process.exitcode == 0
    return contents(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are no signals there")
def test_stopped_in_every_stage(whole, tmp_path):
    """Killed in two, interrupted in the others: the same command goes on each time, and at the end removes its state.

    Ctrl-C ends it within two seconds, with exit code 130, one line and no traceback.
    """
    out = tmp_path / "out"
    for stage, how in zip(STAGES, (signal.SIGKILL, signal.SIGINT) * 2):
        process = start(out)
        assert wait_for(process, out, stage), stage
        os.kill(process.pid, how)
        began = time.perf_counter()
        process.join(10)
        assert process.exitcode == (-how if how == signal.SIGKILL else 130) and time.perf_counter() - began < SECONDS
        assert (out / "state" / "fit.safetensors").exists() and not (out / "result.safetensors").exists()
    said = Path(f"{out}.err").read_text().split("\n\n")
    for words, line in zip(("the (rows of AJ|error bars).*", "the error bars"), said, strict=True):
        assert re.fullmatch(rf"\n?dip-uq: interrupted during {words}; begun again, it goes on from {out}/state\n?", line), said
    process = start(out)
    process.join(60)
    assert process.exitcode == 0
    assert_same(out, whole)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are no signals there")
def test_interrupted_where_python_cannot_see_it(tmp_path):
    "In a product of matrices that takes minutes."
    process = start(tmp_path / "out", True)
    while not (tmp_path / "out.stuck").exists(): time.sleep(0.01)
    time.sleep(0.5)  # to be inside
    os.kill(process.pid, signal.SIGINT)
    began = time.perf_counter()
    process.join(20)
    assert process.exitcode == 130 and 1 < time.perf_counter() - began < SECONDS
    goes_on = f"interrupted; the same command goes on from what {tmp_path}/out/state holds"
    assert Path(f"{tmp_path}/out.err").read_text() == f"\ndip-uq: {goes_on}\n"


# In Python


SCAN, OPTIONS = demo_scan(16, 8), dict(iterations=40, progress=False)


def result(**options): return solve(SCAN, UNet(2, 4), **OPTIONS | options)


def test_a_state_is_used_by_its_own_run_alone(tmp_path):
    "Other arguments of the fit, another scan or network are refused; other bars of the same fit go on from it."
    one = result(state=tmp_path)
    steps = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dip.Run, "step", lambda *args: steps.append(1))
        pieces = sorted(tmp_path.iterdir())
        again = result(state=tmp_path)
        assert sorted(tmp_path.iterdir()) == pieces
        sampled = result(state=tmp_path, samples=20)
        assert {path.name.split("-")[0] for path in {*tmp_path.iterdir()} - {*pieces}} == {"samples"}
    assert not steps and torch.equal(again.image, one.image) and torch.equal(again.std, one.std)
    assert torch.equal(sampled.std, result(samples=20).std) and not torch.equal(sampled.std, one.std)
    for change in dict(seed=1), dict(iterations=41), dict(learning_rate=1e-3):
        with pytest.raises(ValueError, match="of another run, .*remove the file to begin anew"): result(state=tmp_path, **change)
    with pytest.raises(ValueError, match="of another run"): solve(SCAN, UNet(2, 8), state=tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match="on another scan"): solve(demo_scan(16, 8, seed=1), UNet(2, 4), tv=one.recon.settings["tv"],
                                                                   state=tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match="pass one of the two"): result(state=tmp_path, resume=tmp_path / "other")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="choose a folder that can be written"): result(state=tmp_path / "file")


def test_what_comes_after_the_fit_depends_on_the_noise(tmp_path):
    "The noise has no part in a fit whose weight of TV is given, so it is not refused; but its error bars are its own."
    options = OPTIONS | dict(tv=1e-5, iterations=80)
    levels = 4 * SCAN.noise_std, 5.5 * SCAN.noise_std # so short a fit leaves 4 times the noise; both can be believed
    one, other = (solve(replace(SCAN, noise_std=s), UNet(2, 4), **options, state=tmp_path) for s in levels)
    assert torch.equal(one.recon.image, other.recon.image)
    alone = solve(replace(SCAN, noise_std=levels[1]), UNet(2, 4), **options)
    assert torch.equal(other.std, alone.std) and torch.equal(other.image, alone.image) and not torch.equal(one.std, other.std)


def test_a_full_disk_does_not_end_a_run(tmp_path, monkeypatch):
    whole = result()
    def full(*args): raise OSError(28, "No space left on device")
    monkeypatch.setattr(files, "write_whole", full)
    monkeypatch.setattr(dip, "STATE_SECONDS", 0.0)
    with warnings.catch_warnings(record=True) as told: found = result(state=tmp_path)
    assert torch.equal(found.image, whole.image) and torch.equal(found.std, whole.std)
    assert any("could not be written (No space left on device)" in str(w.message) for w in told)


@pytest.mark.parametrize("stage", ["reconstruct", "fit_evidence", "check_held_out"])
@pytest.mark.parametrize("state", [False, True])
def test_an_interruption_goes_on_up(stage, state, tmp_path, monkeypatch):
    "Also one that `reconstruct` caught to return the best so far."
    if stage == "reconstruct":
        def step(run, loss):
            if run.iteration == 20: raise KeyboardInterrupt
            original(run, loss)
        original = dip.Run.step
        monkeypatch.setattr(dip.Run, "step", step)
        monkeypatch.setattr(dip, "STATE_SECONDS", 0.0)
    else: monkeypatch.setattr(pipeline, stage, lambda *args, **options: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(dip, "SHARE", np.inf)
    with pytest.raises(KeyboardInterrupt, match="interrupted during .*; " + ("begun again" if state else "nothing is kept; with state")):
        result(state=tmp_path if state else None)


# Threads


def test_two_threads_are_as_one_after_the_other():
    "Dropout and jitter draw in every iteration, solve draws weights, samples and inputs; the global state stays as it was."
    net = UNet(2, 4)
    works = [lambda seed: reconstruct(SCAN, nn.Sequential(net, nn.Dropout(0.1)), jitter=0.05, seed=seed, **OPTIONS).image,
             lambda seed: solve(SCAN, net, samples=20, seed=seed, **OPTIONS).std]
    jobs = [(work, seed) for seed in range(3) for work in works]
    before = torch.get_rng_state()
    alone = [work(seed) for work, seed in jobs]
    together = Barrier(3)

    def beside(job):
        torch.set_num_threads(1)
        together.wait(60)  # three at a time, all of them under way
        return job[0](job[1])

    with ThreadPoolExecutor(3) as pool: found = list(pool.map(beside, jobs))
    for one, other in zip(alone, found): assert torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)
    assert len({float(x.sum()) for x in alone}) == len(jobs)  # the seeds matter


def test_pieces_whose_bits_were_changed_are_made_again(tmp_path):
    "Told by a digest; a fit that is not whole begins anew, and ends as the first did."
    whole = result(state=tmp_path)
    for path in [next(tmp_path.glob(f"{kind}*")) for kind in ("fit", "rows", "std")]:
        content = bytearray(path.read_bytes())
        content[-5] ^= 0x40
        path.write_bytes(content)
    with pytest.warns(UserWarning, match="its numbers were changed, so .* is made again"): again = result(state=tmp_path)
    assert torch.equal(again.image, whole.image) and torch.equal(again.std, whole.std)


# A folder that is shared


def demo(out, *more): return cli.main([*DEMO, "--out", str(out), *more])


def test_a_folder_of_the_same_name_is_left_alone(tmp_path, capsys):
    "Whatever is in it, a piece beside it or not; refused before the run, in one line, with the folder's name and a remedy."
    state, elsewhere = tmp_path / "out" / "state", tmp_path / "elsewhere"
    def refused(words):
        assert demo(tmp_path / "out") == 2 and not (tmp_path / "out" / "summary.json").exists()
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and str(state) in said and words in said and "another folder" in said
    state.mkdir(parents=True)
    for name in "thesis.tex", "weights.safetensors", "fit.safetensors.bak", "dip_uq.lock.txt":
        (state / name).write_text("mine")
        refused(f"holds {name!r}, which dip_uq did not write; move that")
        assert (state / name).read_text() == "mine"
        (state / name).unlink()
    (state / "fit.safetensors").mkdir()
    refused("holds 'fit.safetensors'")
    (state / "fit.safetensors").rmdir()
    state.rmdir()
    elsewhere.mkdir()
    (elsewhere / "fit.safetensors").write_text("mine")
    state.symlink_to(elsewhere)
    refused("is a link; remove it")
    assert (elsewhere / "fit.safetensors").read_text() == "mine"


def test_only_pieces_are_removed(tmp_path):
    "Also halves that a killed process left, of this version or an earlier one, in the state and beside the results."
    (tmp_path / "out" / "state").mkdir(parents=True)
    for name in "state/fit.safetensors.part", "state/std-0-0123456789abcdef.safetensors.01234567.part", "state/dip_uq.lock", \
                "image.tif.01234567.part", "mine.tif.01234567.part", "image.tif.part":
        (tmp_path / "out" / name).touch()
    assert demo(tmp_path / "out") == 0
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"mine.tif.01234567.part", "image.tif.part", "summary.json"} < found and not {"state", "image.tif.01234567.part"} & found


@pytest.mark.skipif(sys.platform == "win32", reason="signals are no signals there")
def test_one_process_at_a_time(tmp_path, capsys):
    "The second ends before the fit; where the first is killed, its lock is gone as well."
    process = start(tmp_path / "out")
    assert wait_for(process, tmp_path / "out", "evidence")
    os.kill(process.pid, signal.SIGSTOP)
    while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED: time.sleep(0.01)  # it may be writing yet
    pieces = sorted((tmp_path / "out" / "state").iterdir())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cli, "solve", lambda *args, **options: pytest.fail("it runs"))
        assert demo(tmp_path / "out") == 2
    said = f"dip-uq: --out: another process is writing to '{tmp_path}/out/state'; wait, or choose another folder\n"
    assert capsys.readouterr().err == said and sorted((tmp_path / "out" / "state").iterdir()) == pieces
    os.kill(process.pid, signal.SIGKILL)
    process.join(20)
    assert (tmp_path / "out" / "state" / files.LOCK).exists()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dip.Run, "step", lambda *args: pytest.fail("a step is repeated"))
        assert demo(tmp_path / "out") == 0
    assert not (tmp_path / "out" / "state").exists()


def test_a_lock_that_is_being_removed_is_no_lock(tmp_path):
    "Whoever opened its file before, and locks it afterwards, would have a lock that nobody else sees."
    with (tmp_path / files.LOCK).open("ab") as file:
        (tmp_path / files.LOCK).unlink()
        assert not files.take_lock(file.fileno())


def test_halves_do_not_meet(tmp_path, monkeypatch):
    "Of two that write the same file at the same time, neither publishes the other's half."
    path, original = tmp_path / "file", os.replace
    def meanwhile(part, target):
        monkeypatch.setattr(os, "replace", original)
        files.write_whole(path, b"the other's")
        assert path.read_bytes() == b"the other's"
        original(part, target)
    monkeypatch.setattr(os, "replace", meanwhile)
    files.write_whole(path, b"one's own")
    assert path.read_bytes() == b"one's own" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_pieces_that_were_exchanged_are_made_again(tmp_path):
    whole = result(state=tmp_path)
    first, second = sorted(tmp_path.glob("std-*"))[:2]
    for source, target in (first, tmp_path / "aside"), (second, first), (tmp_path / "aside", second): source.rename(target)
    with pytest.warns(UserWarning, match="holds the piece 'std-.*', so it is made again"): again = result(state=tmp_path)
    assert torch.equal(again.std, whole.std)


@pytest.mark.parametrize("digit", [b'"seed": 0', b'"lowest": 0.0'])
def test_a_header_that_was_changed_is_refused(digit, tmp_path):
    "Settings are numbers, too; files of before, whose digest is one of the tensors alone, are read."
    path, recon = tmp_path / "recon", reconstruct(SCAN, UNet(2, 4), **OPTIONS)
    recon.save(path)
    content = path.read_bytes()
    escaped = digit.replace(b'"', b'\\"')
    assert escaped in content
    path.write_bytes(content.replace(escaped, escaped.replace(b"0", b"7", 1)))
    with pytest.raises(ValueError, match="its numbers were changed"): load_tensors(path)
    tensors, about = recon.parts()
    old = {"about": json.dumps(about), "digest": files.digest(tensors)}
    path.write_bytes(files.save({k: v.contiguous() for k, v in tensors.items()}, old))
    assert load_tensors(path)[1]["settings"] == about["settings"]


def test_a_state_that_is_no_path_is_refused():
    with pytest.raises(ValueError, match="state: embedded null byte; choose a folder"): result(state="a\0b")


@pytest.mark.parametrize("kind", ["none", "closed", "broken"])
def test_nobody_needs_to_hear(kind, monkeypatch, tmp_path):
    "Bars and messages of Python, where the standard error is not there, or its reader has gone."
    stream = None if kind == "none" else (tmp_path / "closed").open("w")
    if kind == "closed": stream.close()
    if kind == "broken":
        reader, writer = os.pipe()
        os.close(reader)
        stream = os.fdopen(writer, "w", 1)
    monkeypatch.setattr(sys, "stderr", stream)
    assert torch.equal(result(progress=True).std, result().std)
    if kind == "broken": os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # or closing it would fail

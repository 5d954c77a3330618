"""The command line where the terminal, the machine or the program is at fault. Mistakes of its user are in the notebook."""
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from dip_uq import cli
from dip_uq.cli import demo_scan, in_one_line, main
from dip_uq.pretraining import Pretrained
from dip_uq.scans import save_scan

SMALL = "--iterations", "4", "--channels", "4", "--scales", "2", "--quiet"


@pytest.fixture
def dip_uq(monkeypatch):
    "Exit code and both outputs, as bytes, where the terminal has another encoding."
    def run(*argv, encoding):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
        with monkeypatch.context() as patched:
            for name, stream in zip(("stdout", "stderr"), streams): patched.setattr(sys, name, stream)
            try: code = main([*map(str, argv)])
            except SystemExit as end: code = end.code  # of --help
        for stream in streams: stream.flush()
        return code, *(stream.buffer.getvalue() for stream in streams)
    return run


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp932", "utf-8"])
def test_any_encoding_will_do(encoding, dip_uq, tmp_path):
    "Help, results and errors, with letters that it does not have; the exit code says what happened, nothing else."
    code, out, err = dip_uq("reconstruct", "--help", encoding=encoding)
    assert (code, err) == (0, b"") and b"SCAN" in out and (encoding != "utf-8" or "I₀".encode() in out)
    save_scan(replace(demo_scan(8, 6), name="λ² · 漢"), path := tmp_path / "λ².npz")
    code, out, err = dip_uq("reconstruct", path, *SMALL, "--out", tmp_path / "out", encoding=encoding)
    assert code == 0 and b"PSNR" in out
    code, out, err = dip_uq("reconstruct", tmp_path / "λ² 漢.npz", "--out", tmp_path / "none", encoding=encoding)
    assert (code, out) == (2, b"") and err.startswith(b"dip-uq: ") and len(err.splitlines()) == 1


def test_module_is_the_command():
    "In a process of its own, with an output that has only ASCII."
    command = [sys.executable, "-m", "dip_uq.cli", "demo", "--help"]
    done = subprocess.run(command, env=os.environ | dict(PYTHONIOENCODING="ascii"), capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout.startswith(b"usage: dip-uq demo")


def test_package_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dip-uq", "info"])
    with pytest.raises(SystemExit, match="0"): runpy.run_module("dip_uq", run_name="__main__")
    assert capsys.readouterr().out.startswith("dip_uq ")


@pytest.mark.parametrize("error, message", [
    (MemoryError(), "out of memory; take a smaller --size"),
    (MemoryError("Unable to allocate 8 TiB"), "out of memory (Unable to allocate 8 TiB); take a smaller --size"),
    (AssertionError(), "AssertionError"), (AssertionError("a < b"), "AssertionError a < b"), (ValueError(), "ValueError"),
    (RuntimeError("CUDA error:\n  out of memory\n"), "CUDA error: out of memory"), (ValueError("size=0"), "size=0")])
def test_every_failure_is_one_line(error, message, tmp_path, capsys):
    assert in_one_line(error).startswith(message)
    with patch.object(cli, "solve", side_effect=error):
        assert main(["demo", "--size", "8", "--angles", "4", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"dip-uq: {in_one_line(error)}\n" and not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "meta"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a CUDA device")
def test_a_missing_device_is_told_before_any_work(device, tmp_path, capsys):
    "Even before the file is looked for."
    assert main(["reconstruct", "missing.npz", "--device", device, "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"dip-uq: --device {device}: ") and err.endswith("; choose one of cpu\n") and err.count("\n") == 1


def test_pretraining_that_is_interrupted_is_no_result(tmp_path, monkeypatch, capsys):
    taught = SimpleNamespace(card=dict(stopped="interrupted", steps=3), save=lambda path: path.touch())
    monkeypatch.setattr("dip_uq.cli.pretrain", lambda *args, **options: taught)
    assert main(["pretrain", "--out", str(tmp_path / "weights"), "--quiet"]) == 130
    assert not list(tmp_path.iterdir()) and "the same command starts anew, as nothing was kept yet" in capsys.readouterr().err
    (tmp_path / "weights.state").touch()
    assert main(["pretrain", "--out", str(tmp_path / "weights"), "--quiet"]) == 130
    assert f"the same command goes on from what {tmp_path}/weights.state holds" in capsys.readouterr().err


def test_a_network_for_volumes_is_taught(tmp_path, capsys):
    out = tmp_path / "weights.safetensors"
    small = "--size", "12", "--iterations", "20", "--channels", "4", "--scales", "2"
    assert main(["pretrain", "--volumes", *small, "--out", str(out), "--quiet"]) == 0
    taught = Pretrained.load(out)
    assert taught.net.settings["dims"] == 3 and taught.card["images"] == ["ellipsoids"]
    with pytest.raises(SystemExit): main(["pretrain", "--volumes", "--phantoms", "walnut", "--out", str(out)])
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize("argv, message", [
    (["--out", "."], "--out . is a folder; name a file, such as weights.safetensors"),
    (["--out", "there"], "--out there is a folder; name a file, such as there/weights.safetensors"),
    (["--out", "weights", "--size", "0"], "--size=0 is out of range: choose 1 or more")])
def test_pretraining_that_cannot_end_well_does_not_begin(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dip_uq.cli.pretrain", lambda *args, **options: pytest.fail("it begins"))
    (tmp_path / "there").mkdir()
    assert main(["pretrain", "--quiet", *argv]) == 2 and capsys.readouterr().err == f"dip-uq: {message}\n"


DEMO = f"{sys.executable} -m dip_uq demo --size 8 --angles 4 {' '.join(SMALL[:-1])} --out out"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is always full")
@pytest.mark.parametrize("streams", ["2>&1 | head -1", "2>/dev/full", ">&- 2>&-"])
def test_outputs_that_fail_cost_no_run(streams, tmp_path):
    "Missing, full or broken: the results are files, and the exit code is theirs."
    done = subprocess.run(["bash", "-c", f"{DEMO} {streams}; exit ${{PIPESTATUS[0]}}"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"Error" not in done.stderr and (tmp_path / "out" / "report.png").exists() and not (tmp_path / "out" / "state").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is always full")
def test_information_that_nobody_gets_is_an_error():
    done = subprocess.run(["bash", "-c", f"{sys.executable} -m dip_uq info >/dev/full"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "dip-uq: [Errno 28] No space left on device\n")


@pytest.mark.skipif(sys.platform == "win32", reason="signals are no signals there")
def test_an_interruption_after_the_results_is_none(tmp_path):
    "Whoever sees that all is written may press Ctrl-C."
    child = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from dip_uq.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", child, *DEMO.split()[3:], "--quiet"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not process.stdout.readline().startswith("written:"): pass
        for _ in range(20):
            process.send_signal(signal.SIGINT)
            time.sleep(0.02)
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == 0


def test_several_starts(tmp_path, capsys):
    "Each is fitted, the summary says which was better, and nothing but the result is left."
    assert not main(["demo", "--size", "16", "--angles", "9", *SMALL, "--image-only", "--start", "noise,tv", "--out", str(tmp_path)])
    told = json.loads((tmp_path / "summary.json").read_text())["reconstruction"]
    assert told["start"] == min(told["tried"], key=told["tried"].get) and list(told["tried"]) == ["noise", "tv"]
    assert not any((tmp_path / "state").glob("*.safetensors"))
    with pytest.raises(SystemExit): main(["demo", "--start", "noise,ttv"])
    assert "argument --start: 'ttv' is unknown; choose from noise, " in capsys.readouterr().err

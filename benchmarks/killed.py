"""Kill the command line at random moments of its whole run, go on, and compare all results with those of a run left in peace.

    python benchmarks/killed.py --out killed.json                     # 20 times SIGKILL, some ten minutes
    python benchmarks/killed.py --out interrupted.json --how INT      # the same by Ctrl-C: how long does it take to end?

The moments are spread over the run, one in each twentieth of it, at random. Each stopped run has a folder of its own, and goes on
until it ends by itself.
"""
import json
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
from common import arguments, write

from dip_uq.files import load_tensors

# The state of the fit is written as often as possible, so that every run has something to go on from
CHILD = """
import signal, sys
from dip_uq import dip
signal.signal(signal.SIGINT, signal.default_int_handler) # where this runs in the background, it is ignored
dip.STATE_SECONDS = 0.5
from dip_uq.cli import main
print("ready", flush=True)
sys.exit(main())
"""
VARIES = "seconds", "peak_memory_mb", "command"


def start(options, folder):
    "The command in a process of its own, as soon as all is imported."
    command = [sys.executable, "-c", CHILD, *options, "--quiet", "--out", folder]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def finish(options, folder):
    "Seconds until it is done."
    process, began = start(options, folder), perf_counter()
    _, error = process.communicate()
    if process.returncode: raise SystemExit(error)
    return perf_counter() - began


def contents(folder):
    "All results, without what differs from run to run, and without the picture, which has its figures from the summary."
    found = {}
    for path in folder.iterdir():
        if path.suffix == ".safetensors": found |= {f"{path.name} {k}": v.numpy().tobytes() for k, v in load_tensors(path)[0].items()}
        if path.suffix == ".tif": found[path.name] = path.read_bytes()
        if path.suffix == ".npz": found[path.name] = np.load(path)["samples"].tobytes()
        if path.suffix == ".json": found[path.name] = {k: v for k, v in json.loads(path.read_text()).items() if k not in VARIES}
    return found


def stage(folder):
    "How far a run had come: its last kind of piece, and how many of them there are."
    for kind in "samples", "std", "evidence", "rows", "fit":
        if n := len(list((folder / "state").glob(f"{kind}*"))): return f"{kind} {n}"
    return "results" if (folder / "result.safetensors").exists() else "nothing yet"


def stop_once(options, folder, moment, how):
    process = start(options, folder)
    try: process.wait(moment)
    except subprocess.TimeoutExpired: process.send_signal(how)
    began = perf_counter()
    _, error = process.communicate()
    return dict(moment=round(moment, 2), stage=stage(folder), exit=process.returncode, seconds_to_end=round(perf_counter() - began, 2),
                traceback="Traceback" in error)


if __name__ == "__main__":
    args = arguments(__doc__, how=dict(choices=["KILL", "INT"], default="KILL"), times=20, seed=0, size=48, angles=20, iterations=200,
                     channels=8, scales=3)
    options = ["demo"] + [f"--{k}={getattr(args, k)}" for k in ("size", "angles", "iterations", "channels", "scales")]
    rng, found = np.random.default_rng(args.seed), []
    with TemporaryDirectory() as folder:
        seconds = finish(options, Path(folder) / "whole")
        whole = contents(Path(folder) / "whole")
        for k in range(args.times):
            out = Path(folder) / str(k)
            line = stop_once(options, out, (k + rng.random()) / args.times * seconds, getattr(signal, f"SIG{args.how}"))
            line["seconds_to_finish"] = round(finish(options, out), 2)
            found.append(line | dict(same=contents(out) == whole, files=sorted(path.name for path in out.iterdir())))
            print(found[-1], file=sys.stderr, flush=True)
    write(dict(options=options, seconds=seconds, all_same=all(line["same"] for line in found), runs=found), args.out)

"What the benchmarks share: arguments, findings that a second call goes on with, seconds, tables, the best TV, the images of KMNIST."
import argparse
import json
import os
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from dip_uq.variation import flattest, linear

KMNIST = Path(os.environ.get("DIP_UQ_DATA", "")) / "kmnist/kmnist_test_first50.npz"


def arguments(doc, **options):
    "The command line: --out FILE, and `options`, each given by its default or by the keywords of `add_argument`."
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, given in (dict(out=dict(type=Path, required=True)) | options).items():
        if isinstance(given, list): given = dict(nargs="+", type=type(given[0]), default=given)
        if not isinstance(given, dict): given = dict(type=type(given), default=given)
        parser.add_argument(f"--{name}", **given)
    return parser.parse_args()


def some(names, default=None):
    "An option that takes several of `names`, all by default."
    return dict(nargs="+", choices=names, default=list(default or names))


class Lines(list):
    "Findings of cases, kept as lines of JSON; what the file holds of an earlier call is there already."
    def __init__(self, path, *keys):
        self.path, self.keys = path, keys
        super().__init__(map(json.loads, path.read_text().splitlines()) if path.exists() else ())

    def case(self, line): return tuple(line[key] for key in self.keys)

    def missing(self, cases):
        done = set(map(self.case, self))
        return [case for case in cases if case not in done]

    def add(self, case, *found):
        found = [dict(zip(self.keys, case)) | line for line in found]
        with self.path.open("a") as f: print(*map(json.dumps, found), sep="\n", file=f)
        self.extend(found)


def write(found, out):
    "Print figures as JSON, and write them to the file `out`, if any."
    text = json.dumps(found, indent=2)
    if out: out.write_text(text + "\n")
    print(text)


def print_table(heads, rows):
    for row in (heads, ["---"] * len(heads), *rows): print(f"| {' | '.join(map(str, row))} |")


def timed(work, *args, clock=perf_counter, **options):
    "What `work` returns, and the seconds that it takes."
    def now():
        if torch.cuda.is_available(): torch.cuda.synchronize()
        return clock()
    began = now()
    found = work(*args, **options)
    return found, now() - began


def best_tv(scan, score):
    "The best score of total variation of fourteen weights, which no one has who does not know the truth."
    scan = linear(scan)
    top = 0.3 * float(scan.operator.T(scan.measurement).abs().max())
    return max(map(score, flattest(scan.operator, scan.measurement, [top / 2**k for k in range(14)])))


def kmnist(index):
    "A character of KMNIST-test, grey values from 0 to 1."
    if not KMNIST.exists(): raise SystemExit(f"{KMNIST} is missing; set DIP_UQ_DATA to the folder that holds kmnist/")
    return torch.from_numpy(np.load(KMNIST)["images"][index]).float() / 255

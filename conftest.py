"""pytest runs every notebook of nbs/ as one test, by nbdev's own rules and in this process."""
import gc
import multiprocessing
import os
import random
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import matplotlib
import matplotlib.pyplot as plt
import nbdev.test
import numpy as np
import pytest
import torch
from execnb.shell import CaptureShell
from IPython.core.interactiveshell import InteractiveShell
from nbdev.config import get_config

from dip_uq.formats import READERS
from tools.execute import tidy

# so that processes which tests start need not import them: the optimisers of PyTorch import its compiler
multiprocessing.set_forkserver_preload(["dip_uq.cli", "torch._dynamo", "distributed", "zarr"])
torch.set_num_threads(1)  # as in tools/execute.py: the same rounding, and small problems gain nothing from more
NBS = Path(__file__).resolve().parent / "nbs"


def pytest_addoption(parser):
    parser.addoption("--nbflags", default="", help="also run the notebook cells with these flags, as in --nbflags slow")


def pytest_collection_modifyitems(items):
    """What starts an app or builds the book comes first, so that no other worker takes over, and does so again; and what
    takes longest, so that at the end no worker waits for another."""
    items.sort(key=lambda item: item.path.stem not in ("test_browser", "test_docs", "test_volumes"))


def pytest_collect_file(file_path, parent):
    if file_path.suffix == ".ipynb" and file_path.parent == NBS and file_path.name[0] not in "_.":
        return NotebookFile.from_parent(parent, path=file_path)


def pytest_collection_finish():
    "What is here by now will not become garbage; after each notebook Python would look through all of it."
    gc.freeze()


class NotebookFile(pytest.File):
    def collect(self): yield Notebook.from_parent(self, name=self.path.stem)


class NotebookError(Exception): pass


class Notebook(pytest.Item):
    def runtest(self):
        shell = None

        def make_shell(path):
            nonlocal shell
            shell = Shell(path)
            return shell

        flags = dict(skip_flags=get_config().tst_flags.split(), force_flags=self.config.getoption("nbflags").split())
        with isolated(), patch.object(nbdev.test, "CaptureShell", make_shell):
            passed, _ = nbdev.test.test_nb(self.path, showerr=False, **flags)
            if not passed: raise shell.failure()
            if shell.unexecuted:
                remedy = f"cells hold no outputs, run `python tools/execute.py nbs/{self.path.name}`"
                raise NotebookError("\n\n".join([remedy, *shell.unexecuted]))

    def repr_failure(self, excinfo):
        if isinstance(excinfo.value, NotebookError): return f"{self.path.name}: {excinfo.value}"
        return super().repr_failure(excinfo)

    def reportinfo(self): return self.path, 0, self.name


class Shell(CaptureShell):
    "nbdev's shell; it remembers which cell failed, and which show something now but hold no outputs in the file."
    def __init__(self, path):
        super().__init__(path)
        self.unexecuted = []

    def cell(self, cell, **kwargs):
        committed, cell.outputs = cell.get("outputs"), []
        self.source, self.number = cell.source, cell.idx_ + 1
        super().cell(cell, **kwargs)
        flagged = cell.directives_.keys() & set(get_config().tst_flags.split())
        if not committed and not flagged and tidy(cell.outputs): self.unexecuted.append(cell.source)

    def failure(self):
        if isinstance(self.exc, KeyboardInterrupt): return self.exc
        tb = self.exc.__traceback__  # from here on without the frames of the shell
        while tb and not tb.tb_frame.f_code.co_filename.startswith("<ipython"): tb = tb.tb_next
        lines = "".join(traceback.format_exception(type(self.exc), self.exc, tb)).splitlines()[-20:]
        return NotebookError("\n".join([f"cell {self.number} failed", "", self.source, "", *lines]))


@contextmanager
def isolated():
    "Let a notebook start from the same state always, and leave no trace in this process."
    dtype, threads, main = torch.get_default_dtype(), torch.get_num_threads(), sys.modules["__main__"]
    environment, path, readers = dict(os.environ), sys.path.copy(), dict(READERS)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    try:
        with matplotlib.rc_context(): yield
    finally:
        plt.close("all")
        plt.switch_backend("agg")
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        sys.modules["__main__"], sys.path[:] = main, path
        READERS.update(readers)
        os.environ.clear()
        os.environ.update(environment)  # without IN_TEST, under which nbdev_export would do nothing
        if InteractiveShell.initialized():
            InteractiveShell._instance.reset(new_session=False)
            InteractiveShell.clear_instance()

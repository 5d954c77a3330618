"""A headless Chromium, a server for it to look at, and the patience that both need on a busy machine."""
import os
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium drives the browser")
from selenium.webdriver.common.by import By

ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no Chromium with its driver; on Debian "
                                    "install chromium and chromium-driver")
PATIENCE = 400  # seconds: a busy machine is slow, not broken


def wait(condition, what, patience=PATIENCE):
    "Until `condition()` holds; its value."
    end = monotonic() + patience
    while monotonic() < end:
        if value := condition(): return value
        sleep(0.1)
    raise TimeoutError(what)


@contextmanager
def served(*module, cwd=ROOT, **env):
    "The address where `python -m module … PORT` listens; the port is put in the place of {port}."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)) | env
    command = [sys.executable, "-m", *(word.format(port=port) for word in module)]
    server = subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    def up():
        assert server.poll() is None, f"{module[0]} ended with {server.returncode}"
        with socket.socket() as s: return s.connect_ex(("127.0.0.1", port)) == 0
    try:
        wait(up, f"{module[0]} does not listen")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        try: server.wait(10)
        except subprocess.TimeoutExpired: server.kill()  # JupyterLab may wait for its kernel for ever


@contextmanager
def chromium(address, size="1100,900"):
    "A browser that is opening the address, in a window of this size."
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--window-size={size}"):
        options.add_argument(flag)
    options.page_load_strategy = "none"  # a page is complete once what `wait` is told is there
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        browser.get(address)
        yield browser
    finally: browser.quit()


def find(within, css): return within.find_elements(By.CSS_SELECTOR, css)

def errors(page):
    "What stands in the console of the browser in red."
    return [entry["message"] for entry in page.get_log("browser") if entry["level"] == "SEVERE"]

def picture(box): return find(box, "img.widget-image")[0].get_attribute("src")

def message(box): return find(box, ":scope > .widget-html")[0].text.strip()

def press(box, control, *keys):
    "Send the keys to a control of an explorer, and wait for another picture."
    before = picture(box)
    control.send_keys(*keys)
    wait(lambda: picture(box) != before, f"no new picture after {keys}; the message is {message(box)!r}")
    assert not message(box)

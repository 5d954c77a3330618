"""The explorers as a person meets them: a Voila app in a headless Chromium, worked with the keyboard."""
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep

import pytest

pytest.importorskip("voila", reason="the explorers are tested as a Voila app")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium drives the browser")
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no Chromium with its driver; on Debian "
                                "install chromium and chromium-driver")
PATIENCE = 400  # seconds: a busy machine is slow, not broken

# The explorers in the order of the notebook: how many of their controls are sliders, choices, numbers to type, players
EXPLORERS = dict(wave=(2, 0, 0, 1), train=(1, 0, 0, 1), weights=(3, 0, 0, 0), dreams=(14, 1, 0, 0), hills=(1, 0, 1, 0),
                 places=(4, 0, 0, 1), honest=(1, 1, 0, 0))


def wait(condition, what):
    "Until `condition()` holds; its value."
    end = monotonic() + PATIENCE
    while monotonic() < end:
        if value := condition(): return value
        sleep(0.1)
    raise TimeoutError(what)


@pytest.fixture(scope="module")
def app():
    "The address of the notebook as an app."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    command = [sys.executable, "-m", "voila", "14_widgets.ipynb", "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1"]
    server = subprocess.Popen(command, cwd=ROOT / "nbs", env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    def up():
        assert server.poll() is None, f"voila ended with {server.returncode}"
        with socket.socket() as s: return s.connect_ex(("127.0.0.1", port)) == 0
    try:
        wait(up, "voila does not listen")
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def page(app):
    "A browser that has opened it."
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1100,900"):
        options.add_argument(flag)
    options.page_load_strategy = "none"  # the page is complete once the notebook has run, which `wait` has patience for
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        browser.get(app)
        wait(lambda: len(find(browser, ".widget-image")) >= len(EXPLORERS), "the explorers do not appear")
        yield browser
    finally: browser.quit()


def find(within, css): return within.find_elements(By.CSS_SELECTOR, css)

def explorer(page, name):
    boxes = [e for e in find(page, ".widget-vbox") if find(e, ":scope > .widget-gridbox")]
    assert len(boxes) == len(EXPLORERS)
    return boxes[list(EXPLORERS).index(name)]

def picture(box): return find(box, "img.widget-image")[0].get_attribute("src")

def message(box): return find(box, ":scope > .widget-html")[0].text.strip()

def press(box, control, *keys):
    "Send the keys to a control of the explorer, and wait for another picture."
    before = picture(box)
    control.send_keys(*keys)
    wait(lambda: picture(box) != before, f"no new picture after {keys}; the message is {message(box)!r}")
    assert not message(box)


@pytest.mark.parametrize("name", EXPLORERS)
def test_every_control_answers(page, name):
    box = explorer(page, name)
    controls = [find(box, css) for css in (".noUi-handle", "select", "input[type=number]", ".widget-play")]
    sliders, choices, numbers, players = controls
    assert tuple(map(len, controls)) == EXPLORERS[name]
    for handle in sliders:
        at_end = handle.get_attribute("aria-valuenow") == handle.get_attribute("aria-valuemax")
        press(box, handle, Keys.LEFT if at_end else Keys.RIGHT)
    for choice in choices: press(box, choice, Keys.DOWN)
    for number in numbers: press(box, number, Keys.CONTROL, "a", Keys.NULL, "7", Keys.ENTER)
    for player in players:
        play = find(player, "button")[0]
        press(box, play, Keys.ENTER)
        before = picture(box)
        wait(lambda: picture(box) != before, "the player stands still")
        play.send_keys(Keys.ENTER)


def test_a_bad_value_gets_a_message(page):
    box = explorer(page, "hills")
    number, before = find(box, "input[type=number]")[0], picture(box)
    number.send_keys(Keys.CONTROL, "a", Keys.NULL, "0", Keys.ENTER)
    wait(lambda: message(box) == "depth: 0.0 must be positive, in nats", "no message")
    assert picture(box) == before and "Traceback" not in box.text
    press(box, number, Keys.CONTROL, "a", Keys.NULL, "12", Keys.ENTER)


def test_no_errors_in_the_console(page):
    "Nor in a cell of the notebook; comes last. (Voila takes the icon font from the network, where there is one.)"
    severe = [entry["message"] for entry in page.get_log("browser") if entry["level"] == "SEVERE"]
    assert not [text for text in severe if "/@fortawesome/" not in text]
    assert "Traceback" not in page.find_element(By.TAG_NAME, "body").text

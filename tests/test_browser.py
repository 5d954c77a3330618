"""The explorers as a person meets them, worked with the keyboard in a browser: a Voila app, and JupyterLab."""
import base64
import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
from browser import PATIENCE, ROOT, By, chromium, errors, find, message, needs_chromium, picture, press, served, wait
from execnb.nbio import read_nb, write_nb
from matplotlib.colors import to_rgb
from selenium.webdriver.common.keys import Keys

pytestmark = needs_chromium
NOTEBOOK = "33_widgets.ipynb"

# The explorers in the order of the notebook: how many of their controls are sliders, choices, numbers to type, players
EXPLORERS = dict(wave=(2, 0, 0, 1), train=(1, 0, 0, 1), weights=(3, 0, 0, 0), dreams=(14, 1, 0, 0), hills=(1, 0, 1, 0),
                 places=(4, 0, 0, 1), honest=(1, 1, 0, 0), next_angle=(0, 1, 0, 0))


@pytest.fixture(scope="module")
def page():
    "A browser that has opened the notebook as an app."
    pytest.importorskip("voila", reason="the explorers are tested as a Voila app")
    command = "voila", NOTEBOOK, "--no-browser", "--port={port}", "--Voila.ip=127.0.0.1"
    with served(*command, cwd=ROOT / "nbs") as address, chromium(address) as browser:
        def shown(): return len(find(browser, ".widget-image")) >= len(EXPLORERS)
        try: wait(shown, "a kernel that a busy machine starts too late leaves an empty page", PATIENCE / 3)
        except TimeoutError: browser.get(address)  # once more
        wait(shown, "the explorers do not appear")
        yield browser


def explorer(page, name):
    boxes = [e for e in find(page, ".widget-vbox") if find(e, ":scope > .widget-gridbox")]
    assert len(boxes) == len(EXPLORERS)
    return boxes[list(EXPLORERS).index(name)]


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


def test_a_click_chooses_a_pixel(page):
    "The sliders follow, and the square is drawn around the mouse, which on a narrower page is at the same place of it."
    box, place = explorer(page, "places"), (21, 12)
    pixels, image = find(box, ".widget-button"), find(box, "img.widget-image")[0]
    assert len(pixels) == 32 * 32
    row, column, radius, _ = find(box, ".noUi-handle")
    radius.send_keys(Keys.END)  # a square that is large enough to be found
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", image)
    chosen, before = pixels[32 * place[0] + place[1]], picture(box)
    chosen.click()
    wait(lambda: picture(box) != before, "no new picture after a click")
    def values(): return tuple(int(float(handle.get_attribute("aria-valuenow"))) for handle in (row, column))
    wait(lambda: values() == place, "the sliders stay")
    def under_the_mouse():
        "The middle of the button from the corner of the picture: down, right, in units of its size."
        button, frame = chosen.rect, image.rect
        return [(button[o] + button[s] / 2 - frame[o]) / frame[s] for o, s in (("y", "height"), ("x", "width"))]
    def square():
        "The middle of what is orange in the first of the four images."
        colours = plt.imread(io.BytesIO(base64.b64decode(image.screenshot_as_base64)))[..., :3]
        found = np.nonzero((np.abs(colours - to_rgb("C1")).max(-1) < 0.3)[:, :colours.shape[1] // 5])
        return [v.mean() / n if v.size else np.inf for v, n in zip(found, colours.shape)]
    wide = under_the_mouse()
    wait(lambda: np.abs(np.subtract(square(), wide)).max() < 0.02, "the square is elsewhere")  # a pixel is 0.021 high
    full = image.rect["width"]
    narrow = dict(width=500, height=900, deviceScaleFactor=1, mobile=False)
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", narrow)
    wait(lambda: image.rect["width"] < 0.6 * full, "the picture does not shrink")
    assert np.abs(np.subtract(under_the_mouse(), wide)).max() < 0.01  # places are rounded to a pixel of the screen
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_bad_value_gets_a_message(page):
    box = explorer(page, "hills")
    number, before = find(box, "input[type=number]")[0], picture(box)
    number.send_keys(Keys.CONTROL, "a", Keys.NULL, "0", Keys.ENTER)
    wait(lambda: message(box) == "depth: 0.0 must be positive, in nats", "no message")
    assert picture(box) == before and "Traceback" not in box.text
    press(box, number, Keys.CONTROL, "a", Keys.NULL, "12", Keys.ENTER)


def test_no_errors_in_the_console(page):
    "Nor in a cell of the notebook; comes last. (Voila takes the icon font from the network, where there is one.)"
    assert not [text for text in errors(page) if "/@fortawesome/" not in text]
    assert "Traceback" not in page.find_element(By.TAG_NAME, "body").text


@pytest.fixture
def first_cells(tmp_path):
    "A folder with the notebook up to its first explorer."
    nb = read_nb(ROOT / "nbs" / NOTEBOOK)
    last = next(i for i, cell in enumerate(nb.cells) if "Explorer(draw_wave" in cell.source)
    nb.cells = nb.cells[:last + 1]
    for cell in nb.cells:
        if cell.cell_type == "code": cell.outputs = []
    write_nb(nb, tmp_path / NOTEBOOK)
    return tmp_path


def test_jupyterlab(first_cells):
    "A student opens a notebook, runs all its cells, and moves a slider."
    pytest.importorskip("jupyterlab", reason="the notebooks are tested in JupyterLab")
    own = {f"{name}_DIR": str(first_cells / name) for name in ("JUPYTER_CONFIG", "JUPYTER_DATA", "JUPYTER_RUNTIME",
           "JUPYTERLAB_SETTINGS", "JUPYTERLAB_WORKSPACES", "IPYTHON")}  # leave those of the user alone
    command = ("jupyterlab", "--no-browser", "--allow-root", "--port={port}", "--ip=127.0.0.1", "--IdentityProvider.token=t",
               "--LabApp.news_url=None", "--LabApp.extension_manager=readonly")
    with served(*command, cwd=first_cells, **own) as address, chromium(f"{address}/lab/tree/{NOTEBOOK}?token=t") as page:
        def ready(): return find(page, ".jp-Notebook .jp-CodeCell") and "Idle" in find(page, "#jp-bottom-panel")[0].text
        wait(ready, "the kernel does not start")
        next(item for item in find(page, ".lm-MenuBar-item") if item.text == "Run").click()
        wait(lambda: find(page, "[data-command='runmenu:run-all']"), "no menu")[0].click()
        wait(lambda: find(page, ".jp-OutputArea .widget-image"), "the explorer does not appear")
        box, = (e for e in find(page, ".widget-vbox") if find(e, ":scope > .widget-gridbox"))
        for handle in find(box, ".noUi-handle"): press(box, handle, Keys.LEFT)
        assert "Traceback" not in page.find_element(By.TAG_NAME, "body").text
        assert not errors(page)

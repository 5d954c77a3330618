"The page of results as a person meets it, with the mouse and with the keyboard: what it says is what the files hold."
import json
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from browser import PATIENCE, ROOT, By, chromium, errors, find, needs_chromium, served, wait

from dip_uq.explore import Result, answer
from dip_uq.files import save_tensors

SIZE = 64


def write(folder, shape, samples, seed):
    "A result as `save` writes it, of noise; without error bars where there are no samples."
    g = torch.Generator().manual_seed(seed)
    image, std = torch.rand(shape, generator=g), 0.1 + torch.rand(shape, generator=g)
    tensors, summary = dict(image=image), dict(name=folder.name, held_out=[1], psnr=None, doubts=[], unit="1/cm", unused_z_std=None)
    if samples:
        ends = {f"interval{level}": torch.stack([image - k * std, image + k * std]) for level, k in ((68, 1), (95, 2))}
        tensors |= dict(std=std) | ends
        summary |= dict(heldout_zstd=1.0, verdict="honest", doubts=["<b>angles</b> in radians?"], tenths=[0.5] * 5 + [2.0] * 5)
        drawn = image + std * torch.randn(samples, *shape, generator=g)
        drawn[..., 20:31, 10:21] += 2 * torch.randn(samples, *[1] * len(shape), generator=g)  # these go up and down together
        np.savez(folder / "samples.npz", samples=drawn.numpy(), held_out_z=torch.randn(500, generator=g).numpy())
    save_tensors(folder / "result.safetensors", tensors, summary)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "Three results: one, one without error bars, and one of half the size with fewer samples."
    cases = dict(first=((SIZE, SIZE), 64, 0), second=((SIZE // 2, SIZE), 0, 1), third=((SIZE // 2, SIZE // 2), 16, 2))
    return [write(tmp_path_factory.mktemp(name, numbered=False), *case) for name, case in cases.items()]


@pytest.fixture(scope="module")
def page(folders):
    "A browser that has opened all."
    command = "dip_uq", "explore", *map(str, folders), "--port={port}", "--no-browser"
    with served(*command) as address, chromium(address) as browser:
        wait(lambda: find(browser, "body[data-ready]"), "the page is not ready", PATIENCE / 2)
        yield browser


def said(page): return [e.text for e in find(page, ".found")]

def pixels(page, number=0):
    "The colours of a canvas, row by row."
    return page.execute_script("const c = document.querySelectorAll('canvas')[arguments[0]];"
                               "return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]", number)

def expect(page, *words):
    "Until the sentence of the first result has all these words."
    wait(lambda: all(word in said(page)[0] for word in words), f"{words} is not in {said(page)}", 30)


@needs_chromium
def test_the_page_says_what_the_files_hold(page, folders):
    first = Result.load(folders[0])
    expect(page, f"row {SIZE // 2}, column {SIZE // 2}:", f"{first.images['image'][SIZE // 2, SIZE // 2]:.4g} ± ", "1/cm")
    assert "±" not in said(page)[1] and said(page)[1].startswith(f"row {SIZE // 4}, column {SIZE // 2}:")
    doubts = [e.text for e in find(page, ".doubt")]
    assert doubts == ["Doubt: <b>angles</b> in radians?"] * 2  # as text
    image = first.images["image"]
    grey = np.array(pixels(page)).reshape(SIZE, SIZE, 4)[..., 0]
    everything = np.concatenate([Result.load(folder).images["image"].ravel() for folder in folders])
    low, high = everything.min(), everything.max()
    assert np.abs(grey - 255 * (image - low) / (high - low)).max() <= 1
    assert not errors(page)


@needs_chromium
def test_keys_move_a_pixel_a_rectangle_and_a_line(page):
    stage = find(page, ".stage")[0]
    expect(page, f"row {SIZE // 2}, column {SIZE // 2}:")
    stage.send_keys("\ue012")  # left
    expect(page, f"row {SIZE // 2}, column {SIZE // 2 - 1}:")
    find(page, "[value=rectangle]")[0].click()
    for _ in range(3): page.execute_script("arguments[0].dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowDown', shiftKey: true}))", stage)
    expect(page, f"rows {SIZE // 2}–{SIZE // 2 + 3}, columns {SIZE // 2 - 1}–{SIZE // 2 - 1}: mean")
    find(page, "[value=line]")[0].click()
    stage.send_keys("\ue014")  # right: both ends
    wait(lambda: f"from ({SIZE // 2},{SIZE // 2}) to ({SIZE // 2 + 3},{SIZE // 2})" in find(page, ".chart")[0].get_attribute("aria-label"), "no profile", 30)
    find(page, "[value=pixel]")[0].click()
    expect(page, f"row {SIZE // 2}, column {SIZE // 2}:")


@needs_chromium
def test_the_mouse_draws_a_rectangle_around_the_pixels_under_it(page, folders):
    from selenium.webdriver.common.action_chains import ActionChains
    stage = find(page, ".stage")[0]
    find(page, "[value=rectangle]")[0].click()
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", stage)
    side = stage.rect["width"]
    at = [round((n + 0.5) / SIZE * side - side / 2) for n in (10, 20, 30)]  # from the middle
    ActionChains(page).move_to_element_with_offset(stage, at[0], at[1]).click_and_hold().move_to_element_with_offset(
        stage, at[1], at[2]).release().perform()
    expect(page, "rows 20–30, columns 10–20: mean")
    mean = Result.load(folders[0]).images["image"][20:31, 10:21].mean()
    expect(page, f"mean {mean:.4g} ± ")
    wait(lambda: said(page)[2].startswith("rows 10–15, columns 5–10: mean"), f"not the same area: {said(page)}", 30)
    assert said(page)[1].startswith("rows 10–15, columns 10–20: mean")  # of a result that is half as high
    map_ = np.array(pixels(page, 1)).reshape(SIZE, SIZE, 4)
    strong = map_[..., 0] < 200  # blue
    assert strong[20:31, 10:21].mean() > 0.95 > 0.05 > strong[40:].mean()  # white: what chance may do


@needs_chromium
def test_views_and_the_film(page):
    from selenium.webdriver.support.ui import Select
    before = pixels(page)
    Select(page.find_element(By.ID, "view")).select_by_visible_text("standard deviation")
    wait(lambda: pixels(page) != before, "the picture stays", 30)
    play, slider = page.find_element(By.ID, "play"), page.find_element(By.ID, "sample")
    play.click()
    wait(lambda: int(slider.get_attribute("value")) >= 2, "the film stands still", 30)
    play.click()
    stopped = slider.get_attribute("value")
    caption = find(page, "figcaption")[0]
    wait(lambda: f"sample {stopped} of 64" in caption.text, "the caption is another's", 30)
    assert play.get_attribute("aria-pressed") == "false" and not errors(page)
    page.execute_script("arguments[0].value = 37; arguments[0].dispatchEvent(new Event('input'))", slider)
    captions = find(page, ".stage:first-child ~ figcaption")
    wait(lambda: "sample 37 of 64" in captions[0].text, "no sample 37", 30)
    wait(lambda: any("sample 5 of 16" in c.text for c in captions), "fewer samples begin anew", 30)  # 37 − 2 · 16
    assert not page.find_element(By.ID, "trouble").text


@needs_chromium
def test_oblong_images_fit_the_window(tmp_path):
    "A hundred times as high as wide, and the other way round."
    for name in "high", "flat": (tmp_path / name).mkdir()
    command = "dip_uq", "explore", str(write(tmp_path / "high", (300, 3), 16, 0)), str(write(tmp_path / "flat", (3, 300), 16, 0))
    with served(*command, "--port={port}", "--no-browser") as address, chromium(address) as browser:
        wait(lambda: find(browser, "body[data-ready]"), "the page is not ready", PATIENCE / 2)
        sizes = [(stage.rect["width"], stage.rect["height"]) for stage in find(browser, ".stage")]
        assert all(30 <= height <= 900 for _, height in sizes), sizes


@needs_chromium
def test_a_volume_is_gone_through_slice_by_slice(tmp_path):
    "By the slider and by keys, in slices of the deepest; one of half the depth shows that at the same place, an image its only one."
    shapes = dict(flat=(32, 32), fine=(8, 32, 32), coarse=(4, 32, 32))
    for name in shapes: (tmp_path / name).mkdir()
    command = ["dip_uq", "explore", *(str(write(tmp_path / name, shape, 64, 3)) for name, shape in shapes.items())]
    image = Result.load(tmp_path / "fine").images["image"]
    with served(*command, "--port={port}", "--no-browser") as address, chromium(address) as browser:
        wait(lambda: find(browser, "body[data-ready]"), "the page is not ready", PATIENCE / 2)
        def expect_slice(number, half):
            words = f"slice {number}, row 16, column 16: {image[number, 16, 16]:.4g} ± "
            wait(lambda: said(browser)[0].startswith("row 16") and said(browser)[1].startswith(words)
                 and said(browser)[2].startswith(f"slice {half}, "), f"{words} is not in {said(browser)}", 30)
        expect_slice(4, 2)
        browser.execute_script("const s = document.getElementById('slice'); s.value = 6; s.dispatchEvent(new Event('input'))")
        expect_slice(6, 3)
        stage = find(browser, ".stage")[0]
        for key in "\ue00e", "\ue00e", "\ue00e", "\ue00f", "\ue00f": stage.send_keys(key)  # Page Up to the end, and down
        expect_slice(5, 2)
        everything = np.concatenate([Result.load(tmp_path / name).images["image"].ravel() for name in shapes])
        low, high = everything.min(), everything.max()
        wait(lambda: "slice 5 of 8" in find(browser, "figcaption")[2].text, "the caption is another's", 30)
        grey = np.array(pixels(browser, 2)).reshape(32, 32, 4)[..., 0]
        assert np.abs(grey - 255 * (image[5] - low) / (high - low)).max() <= 1
        assert not errors(browser)


def test_the_command_serves_until_it_is_interrupted(folders):
    "It says where, only this machine is answered, and Ctrl-C is how it ends, so no failure."
    command = [sys.executable, "-m", "dip_uq", "explore", str(folders[0]), "--no-browser"]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    address = re.match(r"http://127\.0\.0\.1:\d+/", run.stdout.readline())
    assert address
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 0


def test_large_images_are_answered_by_one_product():
    "Of 512² pixels and 64 samples, so that nothing is larger than D."
    shape = 512, 512
    g = torch.Generator().manual_seed(0)
    image = torch.rand(shape, generator=g)
    std = torch.ones(shape)
    ends = torch.stack([image - 1, image + 1])
    shared = torch.randn(64, 1, 1, generator=g)  # by which all pixels deviate alike
    draws = dict(samples=(image + shared).numpy())
    result = Result.made("large", dict(image=image, std=std, interval68=ends, interval95=ends), draws, dict(doubts=[], unit=""))
    kind, body = answer([result], "/correlation/0/0/3/4/100/200")
    assert (kind, len(body)) == ("application/octet-stream", 4 * 512**2)
    np.testing.assert_allclose(np.frombuffer(body, "<f4"), 1, atol=1e-4)  # all of them are wrong together
    expected = float(shared.square().mean())**0.5  # and averaging does not help
    assert result.deviation(3, 4, 100, 200)[1] == pytest.approx(expected, rel=1e-4)
    assert json.loads(answer([result], "region/0/0/3/4/3/4")[1])["words"].startswith("row 3, column 4: ")

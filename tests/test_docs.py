"""The documentation: it builds, nothing it links to is missing, and a browser shows it without a network."""
import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlparse

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The folder of the pages; the build fails on any warning, so on any broken link between them."
    out = tmp_path_factory.mktemp("docs")
    env = {name: value for name, value in os.environ.items() if name != "IN_TEST"}
    done = subprocess.run([sys.executable, ROOT / "docs/build.py", "--out", out], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out / "html"


class Page(HTMLParser):
    "What a page loads, links to and can be linked to."
    def __init__(self, path):
        super().__init__()
        self.loads, self.links, self.anchors = [], [], {""}
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors |= {given[key] for key in ("id", "name") if given.get(key)}
        if given.get("src"): self.loads.append(given["src"])
        if given.get("href"): (self.loads if tag == "link" else self.links).append(given["href"])


def test_pages_are_whole(site):
    "Every notebook has a page, every link has its target, and nothing is loaded from elsewhere."
    pages = {path.name: Page(path) for path in site.glob("*.html")}
    assert pages.keys() >= {re.sub(r"^\d+_", "", path.stem) + ".html" for path in ROOT.glob("nbs/[!_.]*.ipynb")}
    assert not [(name, url) for name, page in pages.items() for url in page.loads if urlparse(url).netloc]
    broken = []
    for name, page in pages.items():
        for url in map(urlparse, page.loads + page.links):
            if url.scheme or url.netloc: continue
            target = unquote(url.path) or name
            there = (site / target).exists()
            if target in pages: there = unquote(url.fragment) in pages[target].anchors
            if not there: broken.append((name, url.geturl()))
    assert not broken


def test_sidebar_is_in_the_order_of_the_book(site):
    names = sorted(path.stem for path in ROOT.glob("nbs/[0-9]*.ipynb"))
    book, tutorials = ([name for name in names if (name >= "50") == late] for late in (False, True))
    entry = r'caption-text">(.*?)<|toctree-l1[^"]*"><a class="reference internal" href="(\w+)\.html"'
    shown = [caption or page for caption, page in re.findall(entry, (site / "index.html").read_text("utf-8"))]
    pages = (re.sub(r"^\d+_", "", name) for name in ("Tutorials", *tutorials, "The book", *book))
    assert shown == list(pages)


def test_order_of_links_is_irrelevant():
    spec = importlib.util.spec_from_file_location("documentation", ROOT / "docs/build.py")
    spec.loader.exec_module(build := importlib.util.module_from_spec(spec))
    names = ["50_story", "02_c", "00_a", "51_tale", "10_b"]
    def contents(*linked):
        text = " ".join(f"[it]({name}.ipynb)" for name in linked)
        return build.contents(SimpleNamespace(cells=[SimpleNamespace(cell_type="markdown", source=text)]), names)
    found = contents("51_tale", "10_b", "00_a", "02_c", "50_story", "00_a")
    assert re.findall("^(?:[a-z]|:caption:).*", found, re.MULTILINE) == [
        ":caption: Tutorials", "story", "tale", ":caption: The book", "a", "c", "b"]
    with pytest.raises(ValueError, match=r"no link to \['02_c', '51_tale'\]"): contents("00_a", "10_b", "50_story")


def test_names_lead_to_their_definitions(site):
    text = (site / "pipeline.html").read_text("utf-8")
    for name in ("dip.html#dip_uq.dip.reconstruct", "data.html#dip_uq.data.Scan", "#dip_uq.pipeline.Solution"):
        assert f'href="{name}"' in text


def test_in_the_browser(site):
    "On a phone and on a desk, light and dark: formulas are set, nothing is wider than the screen, search finds a name."
    import browser
    if not (browser.CHROMIUM and browser.DRIVER): pytest.skip(browser.needs_chromium.kwargs["reason"])
    wait, find = browser.wait, browser.find
    with browser.served("http.server", "{port}", "--bind", "127.0.0.1", cwd=site) as address, \
            browser.chromium(f"{address}/index.html") as page:
        for width, name, theme in ((390, "index", "dark"), (390, "evidence", "light"), (1280, "operators", "dark")):
            page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                                 dict(width=width, height=844, deviceScaleFactor=1, mobile=width < 600))
            page.execute_cdp_cmd("Emulation.setEmulatedMedia",
                                 dict(features=[dict(name="prefers-color-scheme", value=theme)]))
            page.get(f"{address}/{name}.html")
            wait(lambda: page.current_url.endswith(f"{name}.html") and find(page, "footer"), "no page")
            if name != "index": wait(lambda: find(page, "mjx-container"), "no formulas")
            assert not find(page, "mjx-merror")
            assert page.execute_script("return document.documentElement.dataset.theme") == theme
            assert page.execute_script("return document.documentElement.scrollWidth") <= width
        page.get(f"{address}/search.html?q=load_scan")
        results = wait(lambda: find(page, "#search-results li a"), "nothing found")
        assert results[0].get_attribute("href").split("?")[0].split("#")[0].endswith("/scans.html")
        assert not browser.errors(page)

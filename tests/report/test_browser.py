"""The page of a report in a real browser: Chromium without a window, spoken to through a pipe (DevTools protocol).

The pictures it takes are kept in build/report-page/.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.evaluations import record_of
from helpers.reports import write_whole


def find_browser() -> str | None:
    """The first that answers: on some systems a script of that name only tells how to get one."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        path = shutil.which(name)
        if path and subprocess.run([path, "--version"], capture_output=True, timeout=60).returncode == 0:
            return path
    return None


BROWSER = find_browser()
PICTURES = Path(__file__).parents[2] / "build" / "report-page"
OPTIONS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-pipe"),
]
PHONE, DESK, WIDE = 390, 1280, 1920

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium; apt-get install chromium")


class Browser:
    """One page of a browser, which reads commands from its file descriptor 3 and answers on 4."""

    def __init__(self, profile: Path) -> None:
        (theirs_in, self.to), (self.back, theirs_out) = os.pipe(), os.pipe()
        assert BROWSER is not None
        become = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self.process = subprocess.Popen(
            ["/bin/bash", "-c", become, "browser", BROWSER, *OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.number, self.rest = 0, b""
        self.events: list[dict[str, Any]] = []
        self.session: str | None = None
        pages = [t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        self.session = self("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends a command and returns its result; events that come in between are kept."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self.number:
                assert "error" not in found, (method, found["error"])
                result: dict[str, Any] = found["result"]
                return result
            self.events.append(found)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            assert select.select([self.back], [], [], 120)[0], "the browser has been silent for two minutes"
            chunk = os.read(self.back, 1 << 20)
            assert chunk, f"the browser has gone, with status {self.process.poll()}"
            self.rest += chunk
        message, _, self.rest = self.rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def open(self, page: Path, width: int = DESK, *, dark: bool = False) -> None:
        """Loads a page at a width; forgets what was noted before."""
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", media="screen", features=[theme])
        self(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=844, deviceScaleFactor=1, mobile=width == PHONE,
        )  # fmt: skip
        self.events.clear()
        self("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def value(self, script: str) -> Any:
        """What a script of the page says, as JSON."""
        found = self("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self, name: str) -> Path:
        """The whole page as a file."""
        height = self.value("Math.ceil(document.documentElement.getBoundingClientRect().height)")
        clip = {"x": 0, "y": 0, "width": self.value("innerWidth"), "height": height, "scale": 1}
        found = self("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        return self._keep(name, found["data"])

    def pdf(self, name: str) -> Path:
        """The page as it is printed on A4."""
        self("Emulation.setEmulatedMedia", media="print", features=[])
        found = self("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, printBackground=False)
        return self._keep(name, found["data"])

    def _keep(self, name: str, data: str) -> Path:
        PICTURES.mkdir(parents=True, exist_ok=True)
        path = PICTURES / name
        path.write_bytes(base64.b64decode(data))
        print(f"written: {path}")
        return path

    def close(self) -> None:
        """Ends the browser."""
        try:
            self.session = None
            self("Browser.close")
            self.process.wait(20)
        except (AssertionError, OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        os.close(self.to)
        os.close(self.back)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whole(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def long_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = ("unbroken_name_of_a_model_" * 3, "a model whose name is several words long")
    return write_whole(tmp_path_factory.mktemp("long"), names)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def troubles(browser: Browser) -> list[str]:
    """Errors and warnings of the console, and requests for anything that is not in the page."""
    found = []
    for event in browser.events:
        method, told = event.get("method"), event.get("params", {})
        if method in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
            found.append(json.dumps(told))
        if method == "Network.requestWillBeSent" and not told["request"]["url"].startswith(("file:", "data:")):
            found.append(told["request"]["url"])
    return found


def test_the_page_loads_whole_and_asks_for_nothing_else(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert troubles(browser) == []
    requests = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    assert [url for url in requests if not url.startswith("data:")] == [page.as_uri()]
    headings = browser.value("[...document.querySelectorAll('h2')].map(h => h.id)")
    assert headings == ["findings", "results", "failures", "margins", "examples", "checks", "method", "settings"]
    assert browser.value("document.querySelector('#verdict').innerText").startswith("No sign of hidden gradients")
    broken = "[...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).length"
    assert browser.value("document.images.length") > 5
    assert browser.value(broken) == 0
    outside = (
        "[...document.querySelectorAll('[src], [href]')].map(e => e.getAttribute('src') ?? e.getAttribute('href'))"
    )
    assert {link.partition(":")[0] for link in browser.value(outside)} == {"data", "#checks", "#results"}
    assert browser.value("document.querySelector(location.hash = '#checks').getBoundingClientRect().top") < 844
    rows = browser.value("[...document.querySelectorAll('#results ~ .card tr')].map(r => r.innerText)")
    attacks = record_of(page.parent)["results"]["ADI"]["models"]["AMAT"]["attacks"]
    assert [text.split()[0] for text in rows[1:]] == ["Model", *(w for a in attacks for w in (a, "STD", "AMAT"))]
    low, high = attacks["pgd100"]["intervals"][-1]
    assert f"{attacks['pgd100']['values'][-1]:.4f}" in rows[4]
    assert f"{low:.4f} to {high:.4f}" in rows[4]


OVERFLOW = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, picture'))
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""


@pytest.mark.parametrize("width", [PHONE, 768, DESK, WIDE])
@pytest.mark.parametrize("long", [False, True])
def test_nothing_hangs_over_the_edge(browser: Browser, page: Path, long_page: Path, width: int, long: bool) -> None:
    browser.open(long_page if long else page, width)
    assert browser.value("innerWidth") == width
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value(OVERFLOW) == []
    # In every table, the first column leaves room for the numbers beside it.
    firsts = "[...document.querySelectorAll('tbody th[scope=row]')].map(e => e.getBoundingClientRect().width)"
    if not long:
        assert max(browser.value(firsts)) <= 0.92 * width
    if width >= DESK and not long:
        hidden = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length"
        assert browser.value(hidden) == 0  # at a desk no table needs scrolling


@pytest.mark.parametrize("long", [False, True])
def test_a_phone_shows_the_worst_attack_without_scrolling_sideways(
    browser: Browser, page: Path, long_page: Path, long: bool
) -> None:
    """Model, clean value and AUC_robust with their intervals; all at a glance, and the model stays where it is."""
    browser.open(long_page if long else page, PHONE)
    rows = """[...document.querySelectorAll('%s tr:not(.attack)')].map(r => [...r.children].slice(0, 3)
        .map(c => { const range = document.createRange(); range.selectNodeContents(c);
                    const [box, card] = [range, c.closest('.card')].map(e => e.getBoundingClientRect());
                    return [box.left - card.left, card.right - box.right, box.width] }))"""
    for place in (".glance tbody", "#results ~ .card tbody:nth-of-type(1)"):
        found = browser.value(rows % place)
        assert len(found) == 2
        for cells in found:
            assert len(cells) == 3
            assert all(left > 0 and right > 0 and width > 0 for left, right, width in cells), place
    assert browser.value("(e => e.scrollWidth <= e.clientWidth)(document.querySelector('.glance'))") or long
    order = "[...document.querySelectorAll('#results ~ .card tr.attack')].map(e => e.innerText.trim())"
    assert browser.value(order) == ["pgd100", "ifgsm10", "gaussian noise (control)"]
    first = "document.querySelector('#results ~ .card tbody th[scope=row]').getBoundingClientRect().left"
    before = browser.value(first)
    moved = "(e => (e.scrollLeft = 60, e.scrollLeft))(document.querySelector('#results ~ .card'))"
    assert browser.value(moved) > 30
    assert before - 20 < browser.value(first) <= before, "the model's name stays beside the numbers"


def test_words_are_not_broken(browser: Browser, page: Path) -> None:
    """A verdict and the name of an attack stand on one line, at a desk and on a phone."""
    for width in (DESK, PHONE):
        browser.open(page, width)
        lines = """[...document.querySelectorAll('td.passed, .attacks tbody th')].map(e => {
            const range = document.createRange(); range.selectNodeContents(e);
            return new Set([...range.getClientRects()].map(r => r.top)).size })"""
        assert set(browser.value(lines)) == {1}


def test_pictures_for_the_eye(browser: Browser, page: Path) -> None:
    """Light, dark, on a phone and on paper: the dark page is dark, the picture of a curve too."""
    brightness = {}
    for name, width, dark in (("light", DESK, False), ("dark", DESK, True), ("phone", PHONE, False)):
        browser.open(page, width, dark=dark)
        brightness[name] = browser.value("getComputedStyle(document.body).backgroundColor")
        sources = browser.value("document.querySelector('#results ~ .curves img').currentSrc.length")
        brightness[name + " curve"] = sources
        assert browser.picture(f"{name}.png").stat().st_size > 50_000
        assert troubles(browser) == []
    assert brightness["light"] == brightness["phone"] == "rgb(246, 246, 244)"
    assert brightness["dark"] == "rgb(18, 19, 22)"
    assert brightness["light curve"] != brightness["dark curve"]
    browser.open(page)
    paper = browser.pdf("paper.pdf").read_bytes()
    assert paper.startswith(b"%PDF")
    assert 3 <= paper.count(b"/Type /Page\n") + paper.count(b"/Type/Page/") <= 14


def test_text_is_readable_on_its_ground(browser: Browser, page: Path) -> None:
    """Contrast of 4.5 to 1 or more (WCAG 2.2, 1.4.3), in both themes."""
    script = """(() => {
      const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b };
      const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
        if (!/, 0\\)$|transparent/.test(c)) return c } return 'rgb(255, 255, 255)' };
      return [...document.querySelectorAll('body *')]
        .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()))
        .map(e => { const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
          return [(a + 0.05) / (b + 0.05), e.className + ' ' + e.textContent.trim().slice(0, 40)] })
        .filter(([contrast]) => contrast < 4.5) })()"""
    for dark in (False, True):
        browser.open(page, dark=dark)
        assert browser.value(script) == []

"""The page of a report in a real browser: Chromium without a window, spoken to through a pipe (DevTools protocol).

The pictures it takes are kept in build/report-page/.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from advmed.evaluation.checks import QUESTIONS, Check
from advmed.evaluation.metric import Metric
from advmed.report import Entry, Example, View, write_report
from helpers.evaluations import by_hand


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
        # Above 4, so that neither is overwritten while they become 3 and 4.
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)]

        def become() -> None:
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        assert BROWSER is not None
        self.process = subprocess.Popen(
            [BROWSER, *OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(3, 4),
            preexec_fn=become,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in (theirs_in, theirs_out, *high):
            os.close(fd)
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


ACCURACY = Metric(
    "accuracy", lambda s: float(s["right"].mean()), per_sample=lambda s: s["right"], fails_at=0.5, is_mean=True,
    description="Share of images whose class is predicted.",
)  # fmt: skip
LOSS = Metric(
    "cross-entropy", lambda s: float(s["loss"].mean()), False, per_sample=lambda s: s["loss"], is_mean=True, unit="nat"
)
LEVELS = (0.0, 0.2, 0.4, 0.8)
NAMES = ("STD", "SAT")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, chest: SimpleNamespace) -> Callable[[tuple[str, ...]], Path]:
    """A whole report of two models, by whatever names they go: chances of the right class that fall with the level."""
    folder: Path = tmp_path_factory.mktemp("page")
    random = np.random.default_rng(0)
    sound = [Check(name, question, "passed", "So it is.", {"share": 1.0}) for name, question in QUESTIONS.items()]

    def entry(name: str, slope: float, margins: Any) -> Entry:
        clean = random.uniform(0.45, 1, 60)
        curves = {
            attack: [np.clip(clean - slope * part * level, 0.01, 1) for level in LEVELS]
            for attack, part in (("pgd10", 0.9), ("apgd10", 1.0), ("gaussian", 0.1))
        }
        how = {"scores": lambda v: {"right": (v > 0.5) * 1.0, "loss": -np.log(v)}, "ids": [f"{k}" for k in range(60)]}
        return Entry(name, by_hand(curves, LEVELS, fingerprint=f"sha of {name}", **how), margins, sound)

    def example(names: tuple[str, ...], number: int) -> Example:
        image = chest.xrays()[0][number, 0].numpy()
        views = [
            View(name, "pgd10", level, image + level / 14 * random.normal(size=image.shape), note="pneumonia 90 %")
            for name in names
            for level in LEVELS
        ]
        return Example(f"xray_{number:03d} (pneumonia)", image, None, views)

    @cache
    def make(names: tuple[str, ...]) -> Path:
        models = [entry(names[0], 1.5, None), entry(names[1], 0.6, random.gamma(4, 0.1, 320))]
        return write_report(
            folder / names[0][:20], models, [ACCURACY, LOSS], examples=[example(names, number) for number in (0, 1)],
            title=" or ".join(names), level_unit="L2 norm of the noise over the image in [0, 1]",
            settings={"data set": "PneumoniaMNIST, 14 x 14 pixels", "checkpoints": dict.fromkeys(names, "last.ckpt")},
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def page(report: Callable[[tuple[str, ...]], Path]) -> Path:
    return report(NAMES)


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
    assert browser.value("document.title") == "STD or SAT"
    headings = browser.value("[...document.querySelectorAll('h2')].map(h => h.id)")
    assert headings == ["findings", "results", "failures", "margins", "examples", "checks", "method", "settings"]
    assert browser.value("document.querySelector('#verdict').innerText").startswith("No sign of hidden gradients")
    broken = "[...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).length"
    assert browser.value("document.images.length") > 20
    assert browser.value(broken) == 0
    outside = (
        "[...document.querySelectorAll('[src], [href]')].map(e => e.getAttribute('src') ?? e.getAttribute('href'))"
    )
    assert {link.partition(":")[0] for link in browser.value(outside)} == {"data", "#checks"}
    assert browser.value("document.querySelector(location.hash = '#checks').getBoundingClientRect().top") < 844
    assert browser.value("document.querySelectorAll('script').length") == 0
    rows = "[...document.querySelectorAll('table')[0].querySelectorAll('tr')].map(r => r.innerText)"
    found = browser.value(rows)
    record = json.loads((page.parent / "report.json").read_text())
    assert [text.split()[0] for text in found[1:]] == [
        *("Model", "pgd10", "STD", "SAT", "apgd10", "STD", "SAT", "gaussian", "STD", "SAT")
    ]
    last = record["results"]["accuracy"]["models"]["SAT"]["attacks"]["apgd10"]
    assert f"{last['values'][-1]:.4f}" in found[7]
    assert f"{last['intervals'][-1][0]:.4f} to {last['intervals'][-1][1]:.4f}" in found[7]


OVERFLOW = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, picture'))
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""


@pytest.mark.parametrize("width", [PHONE, 768, DESK, WIDE])
@pytest.mark.parametrize("long", [False, True])
def test_nothing_hangs_over_the_edge(
    browser: Browser, report: Callable[[tuple[str, ...]], Path], width: int, long: bool
) -> None:
    names = ("unbroken_name_of_a_model_" * 3, "a model whose name is several words long") if long else NAMES
    browser.open(report(names), width)
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

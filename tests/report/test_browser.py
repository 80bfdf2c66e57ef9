"""The page of a report in a real browser.

The pictures it takes are kept in build/report-page/.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.browser import DESK, PHONE, WIDE, Browser, needs_browser, troubles
from helpers.evaluations import record_of
from helpers.reports import write_whole

PICTURES = Path(__file__).parents[2] / "build" / "report-page"
pytestmark = needs_browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whole(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def long_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = ("unbroken_name_of_a_model_" * 3, "a model whose name is several words long")
    return write_whole(tmp_path_factory.mktemp("long"), names)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"), PICTURES)
    yield opened
    opened.close()


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

"""All that draws does so in a style of its own: pictures are the same whatever the process has set."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import matplotlib
import numpy as np
import pytest

from advmed.report import Table, tabulate
from advmed.report.comparison import Row, Section, draw
from advmed.report.failures import count_failures
from advmed.report.figures import DARK, LIGHT, ExamplePictures, curve, curves, failure_curves, margin_histogram
from advmed.search.curve import Curve
from advmed.search.table import Table as Searched
from helpers.examples import landmarks, segmented
from helpers.reports import DICE, LEVELS, entries

ABSURD: dict[str, Any] = {
    "axes.facecolor": "#000000",
    "axes.linewidth": 9.0,
    "axes.prop_cycle": matplotlib.cycler(color=["#ff0000"]),
    "axes.spines.top": False,
    "axes.grid": True,
    "figure.dpi": 31.0,
    "figure.facecolor": "#000000",
    "figure.constrained_layout.w_pad": 1.0,
    "font.family": ["monospace"],
    "font.size": 40.0,
    "grid.linestyle": ":",
    "hatch.linewidth": 7.0,
    "image.cmap": "hot",
    "image.origin": "lower",
    "legend.loc": "lower center",
    "lines.antialiased": False,
    "lines.markeredgewidth": 6.0,
    "path.simplify": False,
    "path.sketch": (9.0, 90.0, 2.0),
    "savefig.bbox": "tight",
    "savefig.dpi": 31.0,
    "savefig.format": "svg",
    "savefig.transparent": True,
    "text.color": "#ffffff",
    "text.usetex": True,  # needs LaTeX, which is not there
    "xtick.color": "#ffffff",
    "xtick.labelsize": 33.0,
}


def table() -> Table:
    (made,) = tabulate(entries(noise={"gaussian": (0.9, 0.9, 0.89)}), [DICE])
    return made


def compared() -> bytes:
    rows = [Row("one", name, np.array([0.9, v, 0.1]), None, (), 0, False, ()) for name, v in (("a", 0.5), ("b", 0.7))]
    return draw([Section("ADI", "", True, "pgd100", "L2 norm", LEVELS, 1.0, tuple(rows))])


def searched() -> bytes:
    facts = {"metric": "ADI", "attack": "pgd100", "higher_is_better": True}
    trials = [SimpleNamespace(setting={"delta": x}, curve=Curve(LEVELS, (0.9, 0.5, x / 10), facts)) for x in (1.0, 2.0)]
    plan = SimpleNamespace(space={"delta": [1.0, 2.0]}, objective="auc_robust")
    drawn = Searched(cast(Any, plan), cast(Any, trials), 1.0).picture()
    assert drawn is not None
    return drawn


def failing() -> bytes:
    failures = count_failures(entries(), [DICE])
    assert failures is not None
    return failure_curves(failures, LIGHT)


PICTURES: dict[str, Callable[[], bytes]] = {
    "curves": lambda: curves([table()]),
    "curve": lambda: curve(table(), "pgd100", DARK),
    "failures": failing,
    "margins": lambda: margin_histogram(entries(), LEVELS, LIGHT),
    "example": lambda: ExamplePictures(segmented(), [1]).prediction(segmented().views[0]),
    "points": lambda: ExamplePictures(landmarks(), []).truth(),
    "comparison": compared,
    "search": searched,
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_do_not_follow_the_settings_of_the_process_nor_change_them(name: str) -> None:
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        plain = PICTURES[name]()
    with matplotlib.rc_context(ABSURD):
        before = dict(matplotlib.rcParams)
        assert PICTURES[name]() == plain
        assert dict(matplotlib.rcParams) == before
        assert matplotlib.rcParams["text.usetex"]


def test_settings_are_back_after_a_picture_that_could_not_be_drawn() -> None:
    with matplotlib.rc_context(ABSURD):
        with pytest.raises(ValueError):
            curve(table(), "another", LIGHT)
        assert matplotlib.rcParams["font.size"] == 40


def test_no_window_system_and_no_pyplot_are_needed() -> None:
    """With a backend that does not work here, in a process where nothing else has imported Matplotlib."""
    code = (
        "import sys, matplotlib; from advmed.report import figures, tabulate\n"
        "from helpers.reports import entries, DICE\n"
        "assert figures.curves(tabulate(entries(), [DICE], resample=False)).startswith(b'\\x89PNG')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert dict.__getitem__(matplotlib.rcParams, 'backend').lower() == 'wxagg'\n"
    )
    places = ":".join(path for path in sys.path if path)
    environment = {"PYTHONPATH": places, "PATH": "/usr/bin:/bin", "MPLBACKEND": "wxagg"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

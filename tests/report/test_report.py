"""Reports: the numbers in every file, the page as a browser would read it, and what is refused."""

from __future__ import annotations

import base64
import platform
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from advmed.attacks import PGD
from advmed.evaluation.auc import auc_robust
from advmed.evaluation.checks import Check
from advmed.evaluation.intervals import interval, seed_of
from advmed.evaluation.worst import WorstOf
from advmed.report import Entry, Metric, findings, format_table, tabulate
from advmed.report.figures import ExamplePictures
from advmed.report.summary import cautions, verdict
from helpers.evaluations import by_hand, record_of
from helpers.examples import landmarks, segmented
from helpers.hosts import table as rows_of
from helpers.reports import AMAT, DICE, IDS, LEVELS, MEAN, STD, UNIT, entries, evaluation, write_whole
from helpers.reports import write as write_page

FORMAT = (Path(__file__).parents[2] / "docs" / "report-format.md").read_text(encoding="utf-8")


class Page(HTMLParser):
    """Reads a page and insists that every element is closed where it should be."""

    VOID = frozenset({"meta", "img", "source", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def write(*given: Any, **changes: Any) -> Page:
    return Page(write_page(*given, **changes).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report with everything in it, drawn once."""
    return write_whole(tmp_path_factory.mktemp("report")).parent


# The files


def test_the_record(folder: Path) -> None:
    record = record_of(folder)
    assert record["format"] == "advmed.report/2"
    assert set(record["versions"]) == {"advmed", "python", "torch", "numpy"}
    assert record["configuration"]["models"] == {"STD": "sha-of-0", "AMAT": "sha-of-1"}
    assert record["configuration"]["evaluation"]["seed"] == 0
    assert record["checks"]["STD"][0]["figures"] == {"gain": 0.0, "share": None}
    assert record["configuration"]["level_unit"] == UNIT
    assert record["configuration"]["settings"] == {"data set": "Task02_Heart", "folder": "models"}
    with np.load(folder / "draws.npz", allow_pickle=False) as archive:  # there to compare models
        assert archive.files == ["ADI"]
        draws = archive["ADI"].astype(np.float64)
    assert (draws.shape, record["results"]["ADI"]["units"]) == ((1000, 2, 3, 3), 12)
    for m, (name, curves) in enumerate((("STD", STD), ("AMAT", AMAT))):
        model = record["results"]["ADI"]["models"][name]
        assert model["clean"] == pytest.approx(curves["pgd100"][0])
        for a, (attack, curve) in enumerate(curves.items()):
            found, mean = model["attacks"][attack], (curve[1] + curve[2]) / 2
            assert found["levels"] == list(LEVELS)
            assert found["values"] == pytest.approx(curve)
            assert found["attacked_mean"] == pytest.approx(mean)
            assert found["auc_robust"] == pytest.approx(auc_robust(LEVELS, curve))
            np.testing.assert_allclose(np.transpose(found["intervals"]), interval(draws[:, m, a], units=12), rtol=1e-5)
            low, high = found["auc_robust_interval"]
            assert low < auc_robust(LEVELS, curve) < high
            wanted = interval(draws[:, m, a, 1:].mean(1), units=12)
            assert found["attacked_mean_interval"] == pytest.approx(wanted.tolist(), rel=1e-5)
        assert model["clean_interval"] == pytest.approx(interval(draws[:, m, 0, 0], units=12).tolist(), rel=1e-5)
    assert (record["results"]["ADI"]["draws"], record["results"]["ADI"]["scale"]) == (1000, 1)
    std, amat = np.moveaxis(draws[:, :, 0, 2], 1, 0)  # under PGD at the last level
    found = record["results"]["ADI"]["models"]["AMAT"]["attacks"]["pgd100"]["intervals"][2]
    assert found == pytest.approx(interval(amat, units=12).tolist(), rel=1e-5)
    np.testing.assert_allclose(amat - std, 0.7594 - 0.1997, atol=1e-6)
    seed = seed_of(IDS, [str(k) for k in range(12)])
    assert record["bootstrap"] == {"confidence": 0.95, "least_units": 10, "seed": seed, "groups": 12}
    assert record["verdict"]["trusted"] is True
    assert record["failures"] == {
        "criterion": "ADI below 0.5",
        "levels": list(LEVELS),
        "share": {"STD": [0, 0, 1], "AMAT": [0, 0, 0]},
        "median": {"STD": 10, "AMAT": None},
        "smallest_level": {"STD": dict.fromkeys(IDS, 10), "AMAT": dict.fromkeys(IDS)},
    }
    assert record["attacks"]["AMAT"]["ifgsm10"] == {
        "access": "white box",
        "description": "10 gradient steps of level x 0.1 from the input; largest loss",
        "recipe": None,
        "queries_per_image": 1,
        "gradients_per_image": 10,
        "seconds": [5, 10],
        "mean_loss": [0.375, 0.375],
        "mean_norm": [5, 10],
        "nonfinite_steps": [0, 0],
    }
    assert list(record["margins"]) == ["AMAT"]
    assert record["margins"]["AMAT"]["n"] == 25
    assert record["margins"]["AMAT"]["quantiles"] == {"0": 0, "0.25": 3, "0.5": 6, "0.75": 9, "1": 12}


def test_the_tables(folder: Path) -> None:
    rows = rows_of(folder / "samples.csv")
    assert list(rows[0]) == [
        *("model", "id", "attack", "level", "norm", "loss", "nonfinite"),
        *("ADI", "dice", "tp[0]", "tp[1]"),
    ]
    assert len(rows) == 2 * 12 * 7  # models, samples, clean and three attacks at two levels
    key = ("model", "id", "attack", "level")
    (row,) = [row for row in rows if [row[name] for name in key] == ["AMAT", "case_b", "pgd100", "10"]]
    assert float(row["ADI"]) == pytest.approx(0.7694)
    assert (row["norm"], row["loss"], row["nonfinite"], row["tp[0]"], row["tp[1]"]) == ("10", "0.25", "0", "5", "6")
    assert {row["level"] for row in rows if row["attack"] == "clean"} == {"0"}

    std, amat = rows_of(folder / "table.csv")
    assert (std["model"], amat["model"]) == ("STD", "AMAT")
    assert float(amat["clean"]) == pytest.approx(0.9148)
    assert float(amat["pgd100 10"]) == pytest.approx(0.7594)
    assert float(std["ifgsm10 mean"]) == pytest.approx((0.6930 + 0.6238) / 2)
    assert float(std["pgd100 AUC_robust"]) == pytest.approx(auc_robust(LEVELS, STD["pgd100"]))

    rows = rows_of(folder / "results.csv")  # one number per row
    assert len(rows) == 2 * 3 * 3  # models, attacks, levels
    (row,) = [row for row in rows if (row["model"], row["attack"], row["level"]) == ("AMAT", "pgd100", "10")]
    assert (row["metric"], row["access"]) == ("ADI", "attack")
    found = record_of(folder)["results"]["ADI"]["models"]["AMAT"]["attacks"]["pgd100"]["intervals"][2]
    assert [float(row[name]) for name in ("value", "low", "high")] == pytest.approx([0.7594, *found])
    assert {row["access"] for row in rows if row["attack"] == "gaussian"} == {"none"}


def paths(value: Any, path: str = "") -> Iterator[str]:
    """All keys of a record as the documentation writes them, with names replaced by what they are names of."""
    given = ("configuration.settings", "configuration.evaluation.attacks.<attack>", "configuration.evaluation.versions")
    if path in given or path.endswith((".figures", ".quantiles", "smallest_level.<model>")):
        yield path  # its keys are whatever they are
    elif isinstance(value, dict):
        for key, one in value.items():
            kind = {"STD": "<model>", "AMAT": "<model>", "ADI": "<metric>", "pgd100": "<attack>"}
            kind |= {"ifgsm10": "<attack>", "gaussian": "<attack>"}
            yield from paths(one, f"{path}.{kind.get(key, key)}".strip("."))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        yield from paths(value[0], f"{path}[]")
    else:
        yield path


def test_the_format_is_documented(folder: Path) -> None:
    """docs/report-format.md names every key and every column that there is, and none that there is not."""
    record = record_of(folder)
    for part in ("checks", "failures", "margins", "bootstrap", "cautions"):
        assert record[part] is not None
    found = set(paths(record))
    assert len(found) > 50
    named = FORMAT.partition("## report.json")[2].partition("## results.csv")[0]
    rows = [line.split("|")[1] for line in named.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall("`(.+?)`", row)} == found
    assert f"`{record['format']}`" in FORMAT
    for name in ("results.csv", "samples.csv", "table.csv"):
        text = FORMAT.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        first = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
        columns = list(rows_of(folder / name)[0])
        if name == "samples.csv":  # the others are the host's
            columns = columns[: columns.index("ADI")]
        if name == "table.csv":
            columns = [re.sub(r"^\w+ (?=\S+$)", "<attack> ", column) for column in columns]
            columns = list(dict.fromkeys(re.sub(r" [\d.]+$", " <level>", column) for column in columns))
        assert sorted(word for cell in first for word in re.findall("`(.+?)`", cell)) == sorted(columns), name
    for file in folder.iterdir():
        assert f"| `{file.name}` |" in FORMAT, file.name


# The page


def test_the_page_stands_alone_and_reads_well(folder: Path) -> None:
    text, record = (folder / "report.html").read_text(), record_of(folder)
    page = Page(text)
    assert not [word for word in ("http", "url(", "@import") if word in text]
    assert not page.all("script") + page.all("link") + page.all("iframe")
    pictures = [attributes["src"] for attributes in page.all("img")] + [a["srcset"] for a in page.all("source")]
    # Two attacks, failures and a histogram in two themes; input, truth, two predictions and one noise.
    assert len(pictures) == 2 * 4 + 5
    for picture in pictures:
        assert picture is not None
        kind, _, data = picture.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    alternatives = [attributes["alt"] or "" for attributes in page.all("img")]
    assert all(alternatives)
    assert len([text for text in alternatives if "over the noise level" in text]) == 2  # none of the control
    assert len(page.all("caption")) == len(page.all("table")) == 7
    assert len(page.all("h1")) == 1
    assert page.all("html")[0]["lang"] == "en"
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    for words in (
        *(UNIT, "left atrium", "level x 0.05", "level x 0.1", "sha-of-1", "Dice 0.00", "median 6"),
        *record["findings"],
        f"{record['verdict']['text']} What was checked",
        "A sample fails with ADI below 0.5, under whichever attack succeeds first.",
        "STD 0 % 0 % 100 % 10 AMAT 0 % 0 % 0 % never",
        "Twice the steps do not help. passed They do not.",
        "0.7594 {:.4f} to {:.4f}".format(
            *record["results"]["ADI"]["models"]["AMAT"]["attacks"]["pgd100"]["intervals"][2]
        ),
    ):
        assert words in page.text, words
    attacks = [word for word in page.words if word in ("pgd100", "ifgsm10", "gaussian noise (control)")]
    assert "pgd100 ifgsm10 gaussian noise (control)" in " ".join(attacks)
    height, width, _ = imread(folder / "curves.png").shape
    assert width > 2 * height  # a picture of all attacks


@pytest.mark.usefixtures("undrawn")
def test_a_report_without_checks_failures_and_groups(tmp_path: Path) -> None:
    page, record = write(tmp_path), record_of(tmp_path)
    assert record["verdict"] == {"trusted": None, "text": "Whether the attacks are strong enough was not checked."}
    assert record["checks"] == {"STD": [], "AMAT": []}
    assert record["failures"] is None  # this metric knows none
    assert record["bootstrap"]["groups"] is None
    assert len(page.all("caption")) == len(page.all("table")) == 4
    # The best of each column is marked: AMAT, in all columns of both attacks.
    assert len([a for a in page.all("td") if "best" in (a.get("class") or "")]) == 2 * 5
    single = write(tmp_path / "single", entries()[:1])
    assert not [a for a in single.all("td") if "best" in (a.get("class") or "")]


@pytest.mark.usefixtures("undrawn")
def test_texts_are_escaped(tmp_path: Path) -> None:
    nasty = '<script>alert("x")</script>&amp;'
    models = [replace(entry, name=entry.name + nasty) for entry in entries()]
    shown = replace(segmented(), sample=nasty, views=[replace(view, note=nasty) for view in segmented().views])
    more = {"title": nasty, "level_unit": nasty, "settings": {nasty: nasty}, "class_names": {1: nasty}}
    page = write(tmp_path, models, examples=[shown], **more)
    assert not page.all("script")
    assert f"AMAT{nasty}" in page.text  # as text, with its entity still spelled out
    assert page.text.count(nasty) > 10
    assert any(nasty in (attributes["alt"] or "") for attributes in page.all("img"))


@pytest.mark.usefixtures("undrawn")
def test_the_page_shows_points_and_says_what_they_are(tmp_path: Path) -> None:
    example = landmarks()
    draw = ExamplePictures(example, [])
    page = write(tmp_path, examples=[example])
    for words in ("true landmark", "found landmark, with a line to the true one", "Truth"):
        assert words in page.text
    assert "white line: outline of the truth" not in page.text
    shown = [str(a["style"]) for a in page.all("span") if "swatch" in (a.get("class") or "")]
    assert shown == ["background: #00be82", "background: #f0e442"]
    pictures = [base64.b64decode(str(a["src"]).partition(",")[2]) for a in page.all("img")]
    for wanted in (draw.clean(), draw.truth(), draw.prediction(example.views[0])):
        assert any(picture == wanted for picture in pictures)
    other = write(tmp_path / "other", examples=[replace(example, points=None)])
    assert "landmark" not in other.text
    assert "Truth" not in other.text


@pytest.mark.usefixtures("undrawn")
def test_what_a_page_says_of_single_attacks(tmp_path: Path) -> None:
    page = write(tmp_path / "control", [Entry("a", evaluation({"gaussian": (0.9, 0.8, 0.7)}))])
    assert len([a for a in page.all("img") if "over the noise level of gaussian" in (a["alt"] or "")]) == 1
    measured = evaluation({"pgd100": AMAT["pgd100"]}, attacks={"pgd100": PGD(100, 5.0, np.inf, 1.0)})
    shown = "L∞ the model 100 gradient steps of level x 0.05 from a random point of the ball; last step 100 1"
    assert shown in write(tmp_path / "linf", [Entry("AMAT", measured)]).text


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("higher", [True, False])
def test_the_page_shows_first_what_hurts_most_and_files_keep_the_order(tmp_path: Path, higher: bool) -> None:
    """The control last, however much it hurts; in each block AUC_robust beside the clean value."""
    given = {
        "gaussian": (0.8, 0.1, 0.0),
        "ifgsm10": (0.8, 0.6, 0.5),
        "pgd100": (0.8, 0.5, 0.2),
        "pgd20": (0.8, 0.5, 0.4),
    }
    curves = {name: curve if higher else tuple(1 - v for v in curve) for name, curve in given.items()}
    models = [Entry("a", evaluation(curves)), Entry("b", evaluation(curves))]
    metric = replace(MEAN, resamples=0, higher_is_better=higher, scale=1.0)
    page, record = write(tmp_path, models, metric), record_of(tmp_path)

    def row(attack: str) -> str:
        curve = curves[attack]
        numbers = (
            curve[0],
            auc_robust(LEVELS, curve, higher_is_better=higher, scale=1),
            *curve[1:],
            (curve[1] + curve[2]) / 2,
        )
        return " ".join(f"{number:.4f}" for number in numbers)

    findings_, _, results = page.text.partition("Results")
    heads = ("Model clean AUC robust 5 10 mean", *(f"{attack} a {row(attack)} b" for attack in ("pgd100", "pgd20")))
    places = [results.index(text) for text in (*heads, f"ifgsm10 a {row('ifgsm10')}", "gaussian noise (control) a")]
    assert places == sorted(places)
    assert f"gaussian noise (control) a {row('gaussian')}" in results
    words = row("pgd100").split()
    assert f"Model clean AUC robust at 10 a {' '.join([*words[:2], words[3]])} b" in findings_
    assert "under pgd100, the attack that hurts most" in findings_
    pictures = [str(a["alt"]).partition(",")[0] for a in page.all("img") if "over the noise level" in str(a["alt"])]
    assert pictures == [f"ADI over the noise level of {attack}" for attack in ("pgd100", "pgd20", "ifgsm10")]
    for found in (record["attacks"]["a"], record["results"]["ADI"]["models"]["a"]["attacks"]):
        assert list(found) == list(given)
    columns = list(rows_of(tmp_path / "table.csv")[0])[3:]
    assert columns == [f"{attack} {what}" for attack in given for what in ("5", "10", "mean", "AUC_robust")]
    assert list(dict.fromkeys(r["attack"] for r in rows_of(tmp_path / "results.csv"))) == list(given)


@pytest.mark.usefixtures("undrawn")
def test_models_whose_checks_failed_are_marked_in_the_tables(tmp_path: Path) -> None:
    bad = [Check("steps", "", "failed", "", {})]
    page = write(tmp_path, [entries()[0], replace(entries()[1], checks=bad)])
    assert page.text.count("AMAT checks failed 0.") == 3  # at a glance, and under each of two attacks
    assert page.text.count("checks failed") == 3


@pytest.mark.usefixtures("undrawn")
def test_how_it_was_measured_is_told(tmp_path: Path) -> None:
    """Versions of the host, devices of the batches, the kind of machine and a recipe; not whose machine it is."""

    class Recipe(PGD):
        recipe = "advmed-standard/2"

    curves = {name: AMAT["pgd100"] for name in ("pgd20", "pgd100")}
    attacks = {"pgd20": Recipe(20, 5.0), "pgd100": PGD(100, 5.0)}
    made = [evaluation(curves, attacks=attacks) for _ in range(3)]
    configuration = made[0].configuration | {"versions": {**made[0].configuration["versions"], "nnunetv2": "2.6.2"}}
    devices = ("NVIDIA H100", "cpu", "cpu")
    models = [
        Entry(name, replace(one, configuration=configuration, clean=replace(one.clean, device=device)))
        for name, one, device in zip("abc", made, devices, strict=True)
    ]
    page, record = write(tmp_path, models), record_of(tmp_path)
    assert record["versions"] | {"nnunetv2": "2.6.2", "python": platform.python_version()} == record["versions"]
    assert record["devices"] == dict(zip("abc", devices, strict=True))
    assert record["platform"] == {"system": platform.system(), "machine": platform.machine()}
    assert [effort["recipe"] for effort in record["attacks"]["b"].values()] == ["advmed-standard/2", None]
    method = page.text.partition("How it was measured")[2].partition("Settings")[0]
    assert "Measured on NVIDIA H100, cpu. Written with advmed " in method
    assert f"numpy {np.__version__}, on {platform.system()} ({platform.machine()})." in method
    assert "nnunetv2 2.6.2" in method
    assert method.count("(recipe advmed-standard/2 )") == 1
    for name in ("report.json", "report.html"):
        assert str(Path.home()) not in (tmp_path / name).read_text()


@pytest.mark.usefixtures("undrawn")
def test_a_value_that_is_missing(tmp_path: Path) -> None:
    gap = {"pgd100": (0.9, 0.8, np.nan), "ifgsm10": (0.9, 0.85, 0.8)}
    page = write(tmp_path, [entries()[0], Entry("gap", evaluation(gap))])
    record = record_of(tmp_path)
    attack = record["results"]["ADI"]["models"]["gap"]["attacks"]["pgd100"]
    assert attack["values"] == [pytest.approx(0.9), pytest.approx(0.8), None]
    assert attack["attacked_mean"] is None
    assert attack["auc_robust"] is None
    assert "–" in page.text
    assert record["findings"][0].startswith("STD is the most robust")


# What is renewed, and what is refused


@pytest.mark.usefixtures("undrawn")
def test_a_report_is_renewed_and_another_one_is_refused_and_stays(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()  # other files do not matter
    write(tmp_path, title="first")
    assert "second" in write(tmp_path, title="second").text
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "parts"}
    assert sorted(files) == [
        *("curves.png", "draws.npz", "report.html", "report.json", "results.csv", "samples.csv", "table.csv")
    ]
    changed = [entries()[0], Entry("AMAT", evaluation(AMAT, "sha-of-another"))]
    with pytest.raises(FileExistsError, match=r"another configuration \(it differs in models\)"):
        write(tmp_path, changed)
    with pytest.raises(FileExistsError, match=r"it differs in level_unit, settings\)"):
        write(tmp_path, level_unit="mm", settings={"fold": 1})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "parts"} == files
    assert "sha-of-another" in write(tmp_path, changed, overwrite=True).text


@pytest.mark.parametrize("record", [None, "{", "[]", '{"format": "other"}'])
@pytest.mark.usefixtures("undrawn")
def test_files_of_unknown_origin_are_refused(tmp_path: Path, record: str | None) -> None:
    (tmp_path / "report.html").write_text("precious")
    if record is not None:
        (tmp_path / "report.json").write_text(record)
    with pytest.raises(FileExistsError, match=r"may be of another report \(.*report\.html\)"):
        write(tmp_path)
    assert (tmp_path / "report.html").read_text() == "precious"


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([Entry("other", evaluation(AMAT, ids=("case_a", "case_c")))], r"other and STD were not .* they differ in ids"),
        ([Entry("other", evaluation({"pgd100": AMAT["pgd100"]}))], "they differ in attacks"),
        (entries()[:1], "models of different names"),
    ],
)
def test_models_must_be_evaluated_alike(tmp_path: Path, models: list[Entry], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path, [entries()[0], *models])
    assert not list(tmp_path.iterdir())


def test_tables_need_metrics_and_margins_numbers() -> None:
    with pytest.raises(ValueError, match="metrics of different names, got"):
        tabulate(entries(), [])
    for margins in ([], [1.0, np.nan]):
        with pytest.raises(ValueError, match="margins of AMAT must be one or more finite numbers"):
            Entry("AMAT", evaluation(AMAT), np.array(margins))


# What it says


def test_attacks_in_another_order_fill_the_same_columns() -> None:
    turned = evaluation(dict(reversed(AMAT.items())))
    (table,) = tabulate([entries()[0], Entry("AMAT", turned)], [MEAN])
    np.testing.assert_allclose(table.values, [[STD["pgd100"], STD["ifgsm10"]], [AMAT["pgd100"], AMAT["ifgsm10"]]])


def test_lower_is_better_scales_by_the_largest_value() -> None:
    curves = {"pgd100": (1.637, 2.247, 3.870)}, {"pgd100": (1.773, 2.044, 2.426)}
    models = [Entry(name, evaluation(curve)) for name, curve in zip(("weak", "robust"), curves, strict=True)]
    metric = Metric("MRE", lambda scores: scores["dice"].mean(), higher_is_better=False, unit="mm")
    (table,) = tabulate(models, [metric], resample=False)
    assert table.scale == pytest.approx(3.870)
    expected = [auc_robust(LEVELS, c["pgd100"], higher_is_better=False, scale=3.870) for c in curves]
    np.testing.assert_allclose(table.auc[:, 0], expected)
    assert table.best.tolist() == [[True, False, False, False, False], [False, True, True, True, True]]
    assert findings(table) == [
        "robust is the most robust of 2 models under pgd100: "
        f"AUC_robust {expected[1]:.4f}, followed by weak with {expected[0]:.4f}.",
        "At noise level 10, MRE (mm) is 2.426 for robust and 3.870 for weak.",
        "On clean images, robust has MRE (mm) 1.773, worse than the best of the others (weak, 1.637).",
    ]
    (fixed,) = tabulate(models, [replace(metric, scale=10.0)])
    assert "95 % interval" in findings(fixed)[0]
    np.testing.assert_allclose(fixed.auc[:, 0], np.array(expected) * 3.870 / 10)


def noisy(curves: Any, seed: int, count: int = 12) -> Any:
    """An evaluation of samples of other hardness each."""
    generator = np.random.default_rng(seed)
    values = {name: np.array(c)[:, None] + generator.normal(0, 0.05, (1, count)) for name, c in curves.items()}
    return by_hand(values, LEVELS, scores=lambda value: {"dice": value}, ids=[f"s{k}" for k in range(count)])


def test_findings_speak_of_the_strongest_attack() -> None:
    (table,) = tabulate(entries(), [MEAN])
    assert findings(table)[1:] == [
        "At noise level 10, ADI is 0.7594 for AMAT and 0.1997 for STD.",
        "On clean images, AMAT has ADI 0.9148, better than the best of the others (STD, 0.7954).",
    ]
    assert "under pgd100: AUC_robust" in findings(table)[0]
    area, (low, high) = auc_robust(LEVELS, STD["pgd100"]), interval(table.auc_draws[:, 0, 0], units=12)
    within = f"AUC_robust is {area:.4f} (95 % interval {low:.4f} to {high:.4f})."
    told = "ADI goes from 0.7954 on clean images to 0.1997 under pgd100 at noise level 10; "
    (alone,) = tabulate(entries()[:1], [MEAN])
    assert findings(alone) == [told + within]
    # Of equal models none is the most robust; nor is there one of too few samples.
    equal = [Entry(name, evaluation(AMAT)) for name in ("a", "b")]
    worse = {name: tuple(v - 0.001 * k for v in curve) for k, (name, curve) in enumerate(AMAT.items(), 1)}
    close = [Entry("a", noisy(AMAT, 1)), Entry("b", noisy(worse, 2))]
    for models, why in ((equal, "they are equal"), (close, "the 95 % interval of their difference holds 0")):
        (table,) = tabulate(models, [MEAN])
        assert "do not tell it from" in findings(table)[0]
        assert why in findings(table)[0]
    (table,) = tabulate(equal, [MEAN], resample=False)
    assert "they are equal" in findings(table)[0]
    few = [Entry(name, noisy(curve, 1, 9)) for name, curve in (("a", AMAT), ("b", STD))]
    (table,) = tabulate(few, [MEAN])
    assert "do not tell it from b with 0." in findings(table)[0]
    assert findings(table)[0].endswith("9 independent sample(s) are too few for an interval.")
    (plain,) = tabulate(entries()[:1], [MEAN], resample=False)
    assert findings(plain) == [f"{told}AUC_robust is {area:.4f}."]


def cautions_of(*models: Entry, metric: Metric = MEAN) -> list[str]:
    return cautions(models, tabulate(models, [metric], resample=False))


def test_cautions() -> None:
    assert cautions_of(*entries()) == []
    growing = evaluation({"pgd100": (0.8, 0.5, 0.6), "ifgsm10": (0.8, 0.5, 0.501)})
    broken = replace(growing.attacked["pgd100", 5.0], nonfinite=np.array([0, 7]))
    steps, masking = cautions_of(Entry("odd", replace(growing, attacked={**growing.attacked, ("pgd100", 5.0): broken})))
    assert steps.startswith("odd: 7 attack steps met a non-finite gradient")
    worst = WorstOf(tuple(growing.attacks), 2)  # the worst of both has their steps once more
    both = {**growing.attacked, ("pgd100", 5.0): broken, ("worst attack", 5.0): broken}
    counted = replace(growing, attacks={**growing.attacks, "worst attack": worst}, attacked=both)
    (note,) = [note for note in cautions([Entry("odd", counted)], ()) if "non-finite" in note]
    assert note.startswith("odd: 7 attack steps")
    assert masking.startswith("odd: ADI improves as the noise of pgd100 grows.")
    spread = cautions_of(Entry("odd", growing), metric=replace(MEAN, monotone=False))
    assert spread == [], "the spread of errors shrinks where all grow alike"
    # Noise that hurts more than the attack is not what the findings speak of, and may do good without a caution.
    curves = {"pgd100": (0.9, 0.8, 0.7), "gaussian": (0.9, 0.2, 0.6)}
    models = [Entry(name, evaluation(curves)) for name in ("a", "b")]
    (table,) = tabulate(models, [MEAN], resample=False)
    assert table.controls == ("gaussian",)
    assert findings(table)[0].startswith("Under pgd100, ")
    assert cautions(models, [table]) == []


def test_a_metric_that_no_attack_moves_is_pointed_out() -> None:
    """Of several models the one; not if only a control leaves it, nor for a metric that knows no failures."""
    still, moved = {"pgd100": (0.75, 0.75, 0.75)}, {"pgd100": (0.9, 0.9, 0.8)}
    controls = {"gaussian": (0.75, 0.75, 0.75)}
    models = [Entry("moved", evaluation(moved | controls)), Entry("still", evaluation(still | controls))]
    (note,) = cautions_of(*models, metric=DICE)
    assert note.startswith("still: ADI is 0.7500 at every noise level. Either the levels are too small")
    assert cautions_of(*models) == []
    controls["gaussian"] = (0.75, 0.7, 0.6)
    assert len(cautions_of(Entry("still", evaluation(still | controls)), metric=DICE)) == 1
    (note,) = cautions_of(Entry("odd", evaluation(controls | {"pgd100": (0.75, 0.75, 0.8)})), metric=DICE)
    assert note.startswith("odd: ADI improves as the noise of pgd100 grows.")


def test_verdicts() -> None:
    def entry(name: str, *verdicts: Any) -> Entry:
        return Entry(name, evaluation(AMAT), checks=[Check(f"c{k}", "", v, "", {}) for k, v in enumerate(verdicts)])

    good, half, none = entry("good", "passed", "passed"), entry("half", "passed", "not measured"), entry("none")
    sound = "No sign of hidden gradients or a weak attack in "
    assert verdict([good]) == (True, f"{sound}the model: all of 2 checks passed.")
    trusted, text = verdict([good, half])
    assert (trusted, text.startswith(f"{sound}any of the 2 models")) == (True, True)
    assert verdict([good, none])[0] is None
    trusted, text = verdict([good, entry("bad", "failed", "passed", "failed"), none])
    assert trusted is False
    assert text.endswith("checks of the attack failed for bad (c0, c2).")


def test_format_table() -> None:
    (table,) = tabulate(entries(), [MEAN])
    lines = format_table(table).splitlines()
    assert [line.split()[0] for line in (*lines[:1], *lines[2:])] == [
        "ADI",
        *("pgd100", "STD", "AMAT"),
        *("ifgsm10", "STD", "AMAT"),
        "*",
    ]
    assert lines[0].split() == ["ADI", "clean", "5", "10", "mean", "AUC_robust"]
    assert lines[3].split()[:4] == ["STD", "0.7954", "0.5197", "0.1997"]
    assert lines[4].split()[:4] == ["AMAT", "0.9148*", "0.8476*", "0.7594*"]
    assert lines[7].split()[:3] == ["AMAT", "0.9148*", "0.8834*"]
    # Numbers stand under each other, mark or not; a terminal of 80 columns is wide enough.
    assert lines[3].index("0.5197") == lines[4].index("0.8476") == lines[7].index("0.8834")
    assert max(map(len, lines)) < 80
    single = format_table(tabulate(entries()[:1], [MEAN])[0])
    assert "*" not in single
    # Ties are all best.
    close = {name: tuple(value + 1e-6 for value in curve) for name, curve in AMAT.items()}
    (table,) = tabulate([Entry("a", evaluation(AMAT)), Entry("b", evaluation(close))], [MEAN])
    assert table.best.all()

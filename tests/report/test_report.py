"""Reports: the numbers in every file, the page as a browser would read it, and what is refused."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from advmed.attacks import PGD
from advmed.attacks.names import parse_attacks
from advmed.evaluation.auc import auc_robust
from advmed.evaluation.checks import Check
from advmed.evaluation.intervals import seed_of
from advmed.evaluation.loop import Condition, Evaluation
from advmed.report import Entry, Example, Metric, View, figures, findings, format_table, tabulate, write_report
from advmed.report.figures import CLASS_COLOURS, FOUND_POINT, TRUE_POINT, ExamplePictures
from advmed.report.summary import cautions, verdict

LEVELS = (0.0, 5.0, 10.0)
IDS = ("case_a", "case_b")
UNIT = "L2 norm of the noise over the whole network input, in units of the normalised intensities"
# ADI of Heart under PGD and I-FGSM, rounded from Table 1 of the paper, clean first.
AMAT = {"pgd100": (0.9148, 0.8476, 0.7594), "ifgsm10": (0.9148, 0.8834, 0.8532)}
STD = {"pgd100": (0.7954, 0.5197, 0.1997), "ifgsm10": (0.7954, 0.6930, 0.6238)}
MEAN = Metric("ADI", lambda scores: scores["dice"].mean(), per_sample=lambda scores: scores["dice"])


def evaluation(curves: Mapping[str, tuple[float, ...]], fingerprint: str = "", **changes: Any) -> Evaluation:
    """An evaluation whose mean score is the curve; the two samples lie 0.01 above and below it."""

    def condition(value: float, level: float) -> Condition:
        scores = {
            "dice": np.array([value - 0.01, value + 0.01]),
            "tp": np.array([[3, 4], [5, 6]]),
            "boxes": np.zeros((2, 3, 4)),
        }
        return Condition(np.full(2, level), np.array([0.5, 0.25]), np.zeros(2, np.int64), scores, seconds=level)

    attacks = parse_attacks(curves)
    configuration = {
        "format": "advmed.evaluation/1",
        "attacks": {name: attack.gradients for name, attack in attacks.items()},
        "levels": list(LEVELS),
        "seed": 0,
        "bounds": None,
        "fingerprint": fingerprint,
    }
    clean = condition(next(iter(curves.values()))[0], 0)
    attacked = {
        (name, level): condition(value, level)
        for name, curve in curves.items()
        for level, value in zip(LEVELS[1:], curve[1:], strict=True)
    }
    return replace(Evaluation(configuration, attacks, LEVELS, IDS, clean, attacked), **changes)


def entries() -> list[Entry]:
    return [
        Entry("STD", evaluation(STD, "sha-of-std")),
        Entry("AMAT", evaluation(AMAT, "sha-of-amat"), margins=np.linspace(0, 12, 25)),
    ]


def example() -> Example:
    image = np.zeros((6, 8))
    image[:, 4:] = 1
    truth = np.zeros((6, 8), int)
    truth[2:4, 2:6] = 1
    views = [
        View("STD", "", 0, image, truth, "Dice 1.00"),
        View("STD", "pgd100", 5, image + 0.01 * truth, np.zeros_like(truth), "Dice 0.00"),
    ]
    return Example("case_a", image, truth, views)


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


def write(folder: Path, models: list[Entry] | None = None, **changes: Any) -> Page:
    settings: dict[str, Any] = {"title": "Heart", "level_unit": UNIT, **changes}
    return Page(write_report(folder, models or entries(), [MEAN], **settings).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole report, drawn once."""
    folder: Path = tmp_path_factory.mktemp("report")
    settings = {"data set": "Task02_Heart", "folder": Path("models")}
    write(folder, settings=settings, examples=[example()], class_names={1: "left atrium"})
    return folder


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the drawing of curves, which takes most of the time of a report."""
    for name in ("curves", "curve", "failure_curves", "margin_histogram"):
        monkeypatch.setattr(figures, name, lambda *arguments: b"not drawn")


def test_the_record(folder: Path) -> None:
    record = json.loads((folder / "report.json").read_text())
    assert record["format"] == "advmed.report/2"
    assert set(record["versions"]) == {"advmed", "python", "torch", "numpy"}
    assert record["configuration"]["models"] == {"STD": "sha-of-std", "AMAT": "sha-of-amat"}
    assert record["configuration"]["evaluation"]["seed"] == 0
    assert record["configuration"]["level_unit"] == UNIT
    assert record["configuration"]["settings"] == {"data set": "Task02_Heart", "folder": "models"}
    for name, curves in (("STD", STD), ("AMAT", AMAT)):
        model = record["results"]["ADI"]["models"][name]
        assert model["clean"] == pytest.approx(curves["pgd100"][0])
        for attack, curve in curves.items():
            assert model["attacks"][attack]["levels"] == list(LEVELS)
            assert model["attacks"][attack]["values"] == pytest.approx(curve)
            assert model["attacks"][attack]["attacked_mean"] == pytest.approx((curve[1] + curve[2]) / 2)
            assert model["attacks"][attack]["auc_robust"] == pytest.approx(auc_robust(LEVELS, curve))
            assert len(model["attacks"][attack]["intervals"]) == len(LEVELS)
            for (low, high), value in zip(model["attacks"][attack]["intervals"], curve, strict=True):
                assert (low, high) == pytest.approx((value - 0.01, value + 0.01))  # one sample twice, the other twice
            low, high = model["attacks"][attack]["auc_robust_interval"]
            assert low < auc_robust(LEVELS, curve) < high
            low, high = model["attacks"][attack]["attacked_mean_interval"]
            assert (low, high) == pytest.approx(((curve[1] + curve[2]) / 2 - 0.01, (curve[1] + curve[2]) / 2 + 0.01))
        assert model["clean_interval"] == pytest.approx([curves["pgd100"][0] - 0.01, curves["pgd100"][0] + 0.01])
    assert record["results"]["ADI"]["draws"] == 1000
    assert record["results"]["ADI"]["scale"] == 1
    assert record["verdict"] == {"trusted": None, "text": "Whether the attacks are strong enough was not checked."}
    assert record["checks"] == {"STD": [], "AMAT": []}
    assert record["failures"] is None  # this metric knows none
    assert record["attacks"]["AMAT"]["ifgsm10"] == {
        "access": "white box",
        "description": "10 gradient steps of level x 0.1 from the input; largest loss",
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


def test_the_numbers_of_every_sample(folder: Path) -> None:
    with (folder / "samples.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        *("model", "id", "attack", "level", "norm", "loss", "nonfinite"),
        *("ADI", "dice", "tp[0]", "tp[1]"),
    ]
    assert len(rows) == 2 * 2 * 5  # models, samples, clean and two attacks at two levels
    (row,) = [
        row
        for row in rows
        if (row["model"], row["id"], row["attack"], row["level"]) == ("AMAT", "case_b", "pgd100", "10")
    ]
    assert float(row["ADI"]) == pytest.approx(0.7694)
    assert (row["norm"], row["loss"], row["nonfinite"], row["tp[0]"], row["tp[1]"]) == ("10", "0.25", "0", "5", "6")
    assert {row["level"] for row in rows if row["attack"] == "clean"} == {"0"}


def test_the_table_as_csv(folder: Path) -> None:
    with (folder / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["STD", "AMAT"]
    assert float(rows[1]["clean"]) == pytest.approx(0.9148)
    assert float(rows[1]["pgd100 10"]) == pytest.approx(0.7594)
    assert float(rows[0]["ifgsm10 mean"]) == pytest.approx((0.6930 + 0.6238) / 2)
    assert float(rows[0]["pgd100 AUC_robust"]) == pytest.approx(auc_robust(LEVELS, STD["pgd100"]))


def test_the_page_stands_alone_and_reads_well(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert "http" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert not page.all("script") + page.all("link") + page.all("iframe")
    pictures = [attributes["src"] for attributes in page.all("img")] + [a["srcset"] for a in page.all("source")]
    # Two attacks and a histogram in two themes; input, truth, two predictions and one noise.
    assert len(pictures) == 2 * 3 + 5
    for picture in pictures:
        assert picture is not None
        kind, _, data = picture.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    assert all(attributes["alt"] for attributes in page.all("img"))
    assert len(page.all("caption")) == len(page.all("table")) == 3
    assert len(page.all("h1")) == 1
    assert page.all("html")[0]["lang"] == "en"
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    for words in (UNIT, "left atrium", "0.7594", "level x 0.05", "level x 0.1", "sha-of-amat", "Dice 0.00", "median 6"):
        assert words in page.text, words
    for finding in json.loads((folder / "report.json").read_text())["findings"]:
        assert finding in page.text


@pytest.mark.usefixtures("undrawn")
def test_the_best_of_each_column_is_marked(tmp_path: Path) -> None:
    best = [a for a in write(tmp_path).all("td") if "best" in (a.get("class") or "")]
    assert len(best) == 2 * 5  # AMAT, in all columns of both attacks
    single = write(tmp_path / "single", entries()[:1])
    assert not [a for a in single.all("td") if "best" in (a.get("class") or "")]


@pytest.mark.usefixtures("undrawn")
def test_texts_are_escaped(tmp_path: Path) -> None:
    nasty = '<script>alert("x")</script>&amp;'
    models = [replace(entry, name=entry.name + nasty) for entry in entries()]
    shown = replace(example(), sample=nasty, views=[replace(view, note=nasty) for view in example().views])
    page = write(
        tmp_path,
        models,
        title=nasty,
        level_unit=nasty,
        settings={nasty: nasty},
        examples=[shown],
        class_names={1: nasty},
    )
    assert not page.all("script")
    assert f"AMAT{nasty}" in page.text  # as text, with its entity still spelled out
    assert page.text.count(nasty) > 10
    assert any(nasty in (attributes["alt"] or "") for attributes in page.all("img"))


FORMAT = (Path(__file__).parents[2] / "docs" / "report-format.md").read_text(encoding="utf-8")
DICE = replace(MEAN, fails_at=0.5, is_mean=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything in it: a control, checks, failures, groups, margins."""
    folder: Path = tmp_path_factory.mktemp("whole")
    checked = [Check("steps", "Twice the steps do not help.", "passed", "They do not.", {"gain": 0.0})]
    noise = {"gaussian": (0.9, 0.9, 0.89)}
    models = [
        Entry("STD", evaluation({**STD, **noise}, "sha"), checks=checked),
        Entry("AMAT", evaluation({**AMAT, **noise}, "sha2"), margins=np.linspace(0, 12, 25), checks=checked),
    ]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("curves", "curve", "failure_curves", "margin_histogram"):
            patch.setattr(figures, name, lambda *arguments: b"not drawn")
        settings: dict[str, Any] = {"title": "Heart", "level_unit": UNIT, "settings": {"data set": "x"}}
        write_report(folder, models, [DICE], **settings, groups=["one", "other"])
    return folder


def paths(value: Any, path: str = "") -> Iterator[str]:
    """All keys of a record as the documentation writes them, with names replaced by what they are names of."""
    if path == "configuration.settings" or path.endswith((".figures", ".quantiles", "smallest_level.<model>")):
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


def test_the_format_is_documented(whole: Path) -> None:
    """docs/report-format.md names every key and every column that there is, and none that there is not."""
    record = json.loads((whole / "report.json").read_text())
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
        described = [
            n for line in text.splitlines() if line.startswith("| `") for n in re.findall("`(.+?)`", line.split("|")[1])
        ]
        columns = next(csv.reader((whole / name).open(newline="")))
        if name == "samples.csv":  # the others are the host's
            columns = columns[: columns.index("ADI")]
        if name == "table.csv":
            columns = list(dict.fromkeys(re.sub(r"^\w+ (?=\S+$)", "<attack> ", c) for c in columns))
            columns = list(dict.fromkeys(re.sub(r" [\d.]+$", " <level>", c) for c in columns))
        assert sorted(described) == sorted(columns), name
    for file in whole.iterdir():
        assert f"| `{file.name}` |" in FORMAT, file.name


def test_one_number_per_row(whole: Path) -> None:
    with (whole / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 3  # models, attacks, levels
    (row,) = [r for r in rows if (r["model"], r["attack"], r["level"]) == ("AMAT", "pgd100", "10")]
    assert (row["metric"], row["access"]) == ("ADI", "attack")
    assert [float(row[name]) for name in ("value", "low", "high")] == pytest.approx([0.7594, 0.7494, 0.7694])
    assert {r["access"] for r in rows if r["attack"] == "gaussian"} == {"none"}


def test_draws_are_there_to_compare_models(whole: Path) -> None:
    record = json.loads((whole / "report.json").read_text())
    with np.load(whole / "draws.npz", allow_pickle=False) as archive:
        draws = archive["ADI"]
        assert archive.files == ["ADI"]
    assert draws.shape == (1000, 2, 3, 3)
    assert draws.dtype == np.float32
    low, high = np.percentile(draws[:, 1, 0, 2], [2.5, 97.5])
    assert record["results"]["ADI"]["models"]["AMAT"]["attacks"]["pgd100"]["intervals"][2] == pytest.approx([low, high])
    np.testing.assert_allclose(draws[:, 1, 0, 2] - draws[:, 0, 0, 2], 0.7594 - 0.1997, atol=1e-6)
    assert record["bootstrap"] == {"confidence": 0.95, "seed": seed_of(IDS, ["one", "other"]), "groups": 2}


def test_failures_checks_and_controls_on_the_page(whole: Path) -> None:
    record = json.loads((whole / "report.json").read_text())
    assert record["failures"]["criterion"] == "ADI below 0.5"
    assert record["failures"]["share"] == {"STD": [0, 0, 1], "AMAT": [0, 0, 0]}
    assert record["failures"]["median"] == {"STD": 10, "AMAT": None}
    assert record["failures"]["smallest_level"]["STD"] == {"case_a": 10, "case_b": 10}
    assert record["failures"]["smallest_level"]["AMAT"] == {"case_a": None, "case_b": None}
    assert record["verdict"]["trusted"] is True
    page = Page((whole / "report.html").read_text())
    assert f"{record['verdict']['text']} What was checked" in page.text
    assert "pgd100 ifgsm10 gaussian noise (control)" in " ".join(
        word for word in page.words if word in ("pgd100", "ifgsm10", "gaussian noise (control)")
    )
    assert "A sample fails with ADI below 0.5, under whichever attack succeeds first." in page.text
    assert "STD 0 % 0 % 100 % 10 AMAT 0 % 0 % 0 % never" in page.text
    assert "Twice the steps do not help. passed They do not." in page.text
    assert "0.7594 0.7494 to 0.7694" in page.text
    assert len([a for a in page.all("img") if "over the noise level" in (a["alt"] or "")]) == 2  # none of the control


def test_controls_are_no_attacks() -> None:
    """Noise that hurts more than the attack is not what the findings speak of, and may do good without a caution."""
    curves = {"pgd100": (0.9, 0.8, 0.7), "gaussian": (0.9, 0.2, 0.6)}
    models = [Entry(name, evaluation(curves)) for name in ("a", "b")]
    tables = tabulate(models, [MEAN], resample=False)
    assert tables[0].controls == ("gaussian",)
    assert "under pgd100" in findings(tables[0])[0]
    assert cautions(models, tables) == []


@pytest.mark.usefixtures("undrawn")
def test_a_report_of_controls_alone_shows_their_curves(tmp_path: Path) -> None:
    page = write(tmp_path, [Entry("a", evaluation({"gaussian": (0.9, 0.8, 0.7)}))])
    assert len([a for a in page.all("img") if "over the noise level of gaussian" in (a["alt"] or "")]) == 1


def test_verdicts() -> None:
    def entry(name: str, *verdicts: Any) -> Entry:
        return Entry(name, evaluation(AMAT), checks=[Check(f"c{k}", "", v, "", {}) for k, v in enumerate(verdicts)])

    good, half = entry("good", "passed", "passed"), entry("half", "passed", "not measured")
    assert verdict([good]) == (
        True,
        "No sign of hidden gradients or a weak attack in the model: all of 2 checks passed.",
    )
    trusted, text = verdict([good, half])
    assert trusted is True
    assert text.startswith("No sign of hidden gradients or a weak attack in any of the 2 models")
    assert verdict([good, entry("none")])[0] is None
    trusted, text = verdict([good, entry("bad", "failed", "passed", "failed"), entry("none")])
    assert trusted is False
    assert text.endswith("checks of the attack failed for bad (c0, c2).")


def test_curves_are_a_picture_of_all_attacks(folder: Path) -> None:
    height, width, _ = imread(folder / "curves.png").shape
    assert width > 2 * height


@pytest.mark.usefixtures("undrawn")
def test_a_report_of_the_same_configuration_is_renewed(tmp_path: Path) -> None:
    write(tmp_path, title="first")
    assert "second" in write(tmp_path, title="second").text
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("curves.png", "draws.npz", "report.html", "report.json", "results.csv", "samples.csv", "table.csv")
    ]


@pytest.mark.usefixtures("undrawn")
def test_another_report_is_refused_and_stays(tmp_path: Path) -> None:
    write(tmp_path, title="first")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    changed = [entries()[0], Entry("AMAT", evaluation(AMAT, "sha-of-another"))]
    with pytest.raises(FileExistsError, match=r"another configuration \(it differs in models\)"):
        write(tmp_path, changed)
    with pytest.raises(FileExistsError, match=r"it differs in level_unit, settings\)"):
        write(tmp_path, level_unit="mm", settings={"fold": 1})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
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


@pytest.mark.usefixtures("undrawn")
def test_other_files_in_the_folder_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    write(tmp_path)
    assert (tmp_path / "parts").is_dir()


@pytest.mark.usefixtures("undrawn")
def test_models_must_be_evaluated_alike(tmp_path: Path) -> None:
    other_ids = Entry("other", evaluation(AMAT, ids=("case_a", "case_c")))
    with pytest.raises(ValueError, match=r"other and STD were not evaluated alike: they differ in ids"):
        write(tmp_path, [entries()[0], other_ids])
    fewer = Entry("other", evaluation({"pgd100": AMAT["pgd100"]}))
    with pytest.raises(ValueError, match="they differ in attacks"):
        write(tmp_path, [entries()[0], fewer])
    with pytest.raises(ValueError, match="models of different names"):
        write(tmp_path, [entries()[0]] * 2)
    with pytest.raises(ValueError, match="metrics of different names, got"):
        tabulate(entries(), [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("margins", [[], [1.0, np.nan]])
def test_margins_must_be_numbers(margins: list[float]) -> None:
    with pytest.raises(ValueError, match="margins of AMAT must be one or more finite numbers"):
        Entry("AMAT", evaluation(AMAT), np.array(margins))


def test_attacks_in_another_order_fill_the_same_columns() -> None:
    turned = evaluation(dict(reversed(AMAT.items())))
    (table,) = tabulate([entries()[0], Entry("AMAT", turned)], [MEAN])
    np.testing.assert_allclose(table.values, [[STD["pgd100"], STD["ifgsm10"]], [AMAT["pgd100"], AMAT["ifgsm10"]]])


@pytest.mark.usefixtures("undrawn")
def test_a_value_that_is_missing(tmp_path: Path) -> None:
    gap = {"pgd100": (0.9, 0.8, np.nan), "ifgsm10": (0.9, 0.85, 0.8)}
    page = write(tmp_path, [entries()[0], Entry("gap", evaluation(gap))])
    record = json.loads((tmp_path / "report.json").read_text())
    attack = record["results"]["ADI"]["models"]["gap"]["attacks"]["pgd100"]
    assert attack["values"] == [pytest.approx(0.9), pytest.approx(0.8), None]
    assert attack["attacked_mean"] is None
    assert attack["auc_robust"] is None
    assert "–" in page.text
    assert record["findings"][0].startswith("STD is the most robust")


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


def test_findings_speak_of_the_strongest_attack() -> None:
    (table,) = tabulate(entries(), [MEAN])
    assert findings(table)[1:] == [
        "At noise level 10, ADI is 0.7594 for AMAT and 0.1997 for STD.",
        "On clean images, AMAT has ADI 0.9148, better than the best of the others (STD, 0.7954).",
    ]
    assert "under pgd100: AUC_robust" in findings(table)[0]
    # Of two samples, 95 % of the draws lie between one of them alone and the other.
    area, low, high = (auc_robust(LEVELS, [v + shift for v in STD["pgd100"]]) for shift in (0, -0.01, 0.01))
    within = f"AUC_robust is {area:.4f} (95 % interval {low:.4f} to {high:.4f})."
    told = "ADI goes from 0.7954 on clean images to 0.1997 under pgd100 at noise level 10; "
    (alone,) = tabulate(entries()[:1], [MEAN])
    assert findings(alone) == [told + within]
    (plain,) = tabulate(entries()[:1], [MEAN], resample=False)
    assert findings(plain) == [f"{told}AUC_robust is {area:.4f}."]


def test_cautions() -> None:
    (table,) = tabulate(entries(), [MEAN])
    assert cautions(entries(), [table]) == []
    growing = evaluation({"pgd100": (0.8, 0.5, 0.6), "ifgsm10": (0.8, 0.5, 0.501)})
    broken = replace(growing.attacked["pgd100", 5.0], nonfinite=np.array([0, 7]))
    models = [Entry("odd", replace(growing, attacked={**growing.attacked, ("pgd100", 5.0): broken}))]
    steps, masking = cautions(models, tabulate(models, [MEAN]))
    assert steps.startswith("odd: 7 attack steps met a non-finite gradient")
    assert masking.startswith("odd: ADI improves as the noise of pgd100 grows.")


def test_a_metric_that_no_attack_moves_is_pointed_out() -> None:
    """Of several models the one; not if only a control leaves it, nor for a metric that knows no failures."""
    still, moved = {"pgd100": (0.75, 0.75, 0.75)}, {"pgd100": (0.9, 0.9, 0.8)}
    controls = {"gaussian": (0.75, 0.75, 0.75)}
    models = [Entry("moved", evaluation(moved | controls)), Entry("still", evaluation(still | controls))]
    (note,) = cautions(models, tabulate(models, [DICE], resample=False))
    assert note.startswith("still: ADI is 0.7500 at every noise level. Either the levels are too small")
    assert cautions(models, tabulate(models, [MEAN], resample=False)) == []
    controls["gaussian"] = (0.75, 0.7, 0.6)
    models = [Entry("still", evaluation(still | controls))]
    assert len(cautions(models, tabulate(models, [DICE], resample=False))) == 1
    improving = [Entry("odd", evaluation(controls | {"pgd100": (0.75, 0.75, 0.8)}))]
    (note,) = cautions(improving, tabulate(improving, [DICE], resample=False))
    assert note.startswith("odd: ADI improves as the noise of pgd100 grows.")


def test_format_table() -> None:
    (table,) = tabulate(entries(), [MEAN])
    lines = format_table(table).splitlines()
    assert len(lines) == 5
    assert lines[0].split() == ["pgd100", "ifgsm10"]
    assert lines[1].split() == ["ADI", "clean", "5", "10", "mean", "AUC_robust", "5", "10", "mean", "AUC_robust"]
    assert lines[3].split()[:4] == ["STD", "0.7954", "0.5197", "0.1997"]
    assert lines[4].split()[:4] == ["AMAT", "0.9148*", "0.8476*", "0.7594*"]
    # Numbers stand under each other, mark or not.
    assert lines[3].index("0.5197") == lines[4].index("0.8476")


def test_ties_are_all_best() -> None:
    close = {name: tuple(value + 1e-6 for value in curve) for name, curve in AMAT.items()}
    (table,) = tabulate([Entry("a", evaluation(AMAT)), Entry("b", evaluation(close))], [MEAN])
    assert table.best.all()


def pixels(png: bytes) -> Any:
    return (imread(io.BytesIO(png))[..., :3] * 255).round().astype(int)


def test_pictures_show_grey_values_labels_and_outlines() -> None:
    draw = ExamplePictures(example(), [1])
    width, height = draw.size
    zoom = width // 8
    clean = pixels(draw.clean())
    assert clean.shape == (height, width, 3)
    assert (clean[:, : 4 * zoom] == 0).all()
    assert (clean[:, 4 * zoom :] == 255).all()
    inside = (5 * zoom // 2, 5 * zoom // 2)  # pixel (2, 2): black image, label 1
    truth = pixels(draw.truth())
    np.testing.assert_allclose(truth[inside], 0.35 * CLASS_COLOURS[0], atol=1)
    np.testing.assert_array_equal(truth[2 * zoom, 3 * zoom], CLASS_COLOURS[0])  # its rim
    np.testing.assert_array_equal(truth[0, 0], 0)
    missed = pixels(draw.prediction(example().views[1]))  # predicts nothing: only the outline of the truth is drawn
    assert (missed[2 * zoom, 3 * zoom] == 255).all()
    assert missed[inside].max() < 10


POINTS = np.array([(2.0, 1.0), (np.nan, np.nan), (13.0, 6.5)])
FOUND = np.array([(6.0, 1.0), (3.0, 8.0), (13.0, 6.5)])


def landmarks(height: int = 10, width: int = 16, scale: float = 1.0, *, colour: bool = False) -> Example:
    """Three landmarks, one of them not known; one is found four pixels too far right, one where it is."""
    image = np.full((height, width, 3) if colour else (height, width), 0.5)
    image[0, 0], image[-1, -1] = 0, 1
    views = [View("own", "", 0, image, points=FOUND * scale, note="MRE 2.00 px")]
    return Example("skull", image, None, views, points=POINTS * scale)


def place(draw: ExamplePictures, x: float, y: float) -> tuple[int, int]:
    """Row and column of a point in a picture; (0, 0) is the centre of the top left pixel."""
    factor = draw.size[0] / draw.example.image.shape[1]
    return round((y + 0.5) * factor - 0.5), round((x + 0.5) * factor - 0.5)


@pytest.mark.parametrize("colour", [False, True])
def test_points_are_dots_where_they_are(colour: bool) -> None:
    draw = ExamplePictures(landmarks(colour=colour), [])
    assert draw.size == (16 * 24, 10 * 24)
    assert place(draw, 0, 0) in ((11, 11), (12, 12))
    plain, truth, found = (pixels(png) for png in (draw.clean(), draw.truth(), draw.prediction(draw.example.views[0])))
    first, second = place(draw, 2, 1), place(draw, 13, 6.5)
    for row, column in (first, second):
        np.testing.assert_array_equal(truth[row, column], TRUE_POINT)
        rows, columns = np.ogrid[: truth.shape[0], : truth.shape[1]]
        away = np.hypot(rows - row, columns - column)
        assert (truth[away <= 2] == TRUE_POINT).all()  # three pixels, and a rim of one
        assert (truth[(away > 3.7) & (away < 3.9)] == 0).all()
        np.testing.assert_array_equal(truth[(away > 5) & (away < 12)], plain[(away > 5) & (away < 12)])
    changed = (truth != plain).any(2)
    assert 2 * 40 < changed.sum() < 2 * 64  # two dots and no third
    np.testing.assert_array_equal(found[first], TRUE_POINT)
    np.testing.assert_array_equal(found[place(draw, 6, 1)], FOUND_POINT)
    np.testing.assert_array_equal(found[second], FOUND_POINT)  # on the true one
    np.testing.assert_array_equal(found[place(draw, 3, 8)], FOUND_POINT)  # found, though the truth is not known


def test_a_line_joins_what_was_found_with_the_truth() -> None:
    draw = ExamplePictures(landmarks(), [])
    plain, found = pixels(draw.clean()), pixels(draw.prediction(draw.example.views[0]))
    row, start = place(draw, 2, 1)
    _, end = place(draw, 6, 1)
    here = slice(0, 4 * row)  # the third point is below
    between = found[here, start + 6 : end - 5]
    yellow = (between == FOUND_POINT).all(2)
    assert (yellow.sum(0) == yellow.sum(0)[0]).all()
    assert 2 <= yellow.sum(0)[0] <= 3  # a thin one
    assert set(np.nonzero(yellow)[0]) <= {row - 1, row, row + 1}
    np.testing.assert_array_equal(between[~yellow], plain[here, start + 6 : end - 5][~yellow])
    np.testing.assert_array_equal(found[:, : start - 6], plain[:, : start - 6])  # it ends at the points
    np.testing.assert_array_equal(found[: row - 6], plain[: row - 6])
    # No line leads to or from a point that is not known: around the third, found alone, there is nothing.
    low, left = place(draw, 3, 8)
    rows, columns = np.ogrid[: found.shape[0], : found.shape[1]]
    away = np.hypot(rows - low, columns - left)
    np.testing.assert_array_equal(found[(away > 5) & (away < 60)], plain[(away > 5) & (away < 60)])


def test_lines_are_drawn_in_every_direction() -> None:
    image = np.tile(np.linspace(0, 1, 20), (20, 1))
    corners = np.array([(3.0, 3.0), (16.0, 3.0), (9.0, 2.0)])
    ends = np.array([(12.0, 15.0), (5.0, 14.0), (9.0, 17.0)])
    view = View("own", "", 0, image, points=ends)
    draw = ExamplePictures(Example("cross", image, None, [view], points=corners), [])
    found = pixels(draw.prediction(view))
    for (x1, y1), (x2, y2) in zip(corners, ends, strict=True):
        for part in (0.3, 0.7):
            spot = place(draw, x1 + part * (x2 - x1), y1 + part * (y2 - y1))
            np.testing.assert_array_equal(found[spot], FOUND_POINT)


def test_points_of_pictures_that_are_thinned() -> None:
    draw = ExamplePictures(landmarks(1000, 1600, 100.0), [])
    assert draw.size == (534, 334)  # every third pixel
    truth = pixels(draw.truth())
    marked = np.argwhere((truth == TRUE_POINT).all(2))
    for x, y in POINTS[[0, 2]] * 100:
        near = marked[np.hypot(marked[:, 0] - y / 3, marked[:, 1] - x / 3) < 8]
        np.testing.assert_allclose(near.mean(0), ((y + 0.5) / 3 - 0.5, (x + 0.5) / 3 - 0.5), atol=0.5)
    assert len(marked) <= 2 * 32


def test_truth_is_drawn_under_predictions_of_points_only() -> None:
    """A model that gives no points, such as a classifier, keeps its image."""
    example = landmarks()
    bare = replace(example.views[0], points=None)
    draw = ExamplePictures(replace(example, views=[bare]), [])
    np.testing.assert_array_equal(pixels(draw.prediction(bare)), pixels(draw.clean()))
    unknown = replace(example, points=None)
    found = pixels(ExamplePictures(unknown, []).prediction(example.views[0]))
    assert not (found == TRUE_POINT).all(2).any()
    dots = (found == FOUND_POINT).all(2).sum()
    assert 3 * 20 < dots <= 3 * 32  # three dots, no lines


def test_points_outside_of_the_image_and_those_that_are_none_do_no_harm() -> None:
    far = np.array([(-30.0, 4.0), (200.0, 200.0), (np.nan, 3.0)])
    view = View("own", "", 0, np.zeros((10, 16)), points=far)
    draw = ExamplePictures(Example("far", np.zeros((10, 16)), None, [view], points=far), [])
    np.testing.assert_array_equal(pixels(draw.prediction(view)), pixels(draw.clean()))


@pytest.mark.usefixtures("undrawn")
def test_the_page_shows_points_and_says_what_they_are(tmp_path: Path) -> None:
    example = landmarks()
    draw = ExamplePictures(example, [])
    page = write(tmp_path, examples=[example])
    assert "true landmark" in page.text
    assert "found landmark, with a line to the true one" in page.text
    assert "white line: outline of the truth" not in page.text
    assert "Truth" in page.text
    shown = [str(a["style"]) for a in page.all("span") if "swatch" in (a.get("class") or "")]
    assert shown == ["background: #00be82", "background: #f0e442"]
    pictures = [base64.b64decode(str(a["src"]).partition(",")[2]) for a in page.all("img")]
    for wanted in (draw.clean(), draw.truth(), draw.prediction(example.views[0])):
        assert any(picture == wanted for picture in pictures)
    other = write(tmp_path / "other", examples=[replace(example, points=None)])
    assert "landmark" not in other.text
    assert "Truth" not in other.text


def test_noise_is_amplified_by_a_round_factor_around_grey() -> None:
    draw = ExamplePictures(example(), [1])
    assert draw.amplification == 50  # 0.01 of the grey range becomes half of it
    noise = pixels(draw.noise(example().views[1]))
    zoom = draw.size[0] // 8
    assert abs(noise[0, 0] - 127.5).max() <= 0.5
    assert (noise[5 * zoom // 2, 5 * zoom // 2] == 255).all()
    still = ExamplePictures(replace(example(), views=example().views[:1]), [1])
    assert still.amplification == 1


def test_pictures_of_large_and_of_colour_images() -> None:
    generator = np.random.default_rng(0)
    image = generator.random((900, 2000, 3))
    view = View("STD", "pgd5", 1, np.clip(image + 0.1, 0, 1), None)
    draw = ExamplePictures(Example("photo", image, None, [view]), [])
    assert draw.size == (667, 300)
    assert pixels(draw.prediction(view)).shape == (300, 667, 3)
    assert np.ptp(pixels(draw.clean()), axis=2).max() > 100  # still in colour


def test_examples_that_do_not_fit() -> None:
    shape = r"must be \(H, W\) or \(H, W, 3\), got \(6, 8, 2\)"
    with pytest.raises(ValueError, match=f"case_a {shape}"):
        ExamplePictures(replace(example(), image=np.zeros((6, 8, 2))), [1])
    with pytest.raises(ValueError, match="case_a must be finite and of one shape"):
        ExamplePictures(replace(example(), truth=np.zeros((5, 8), int)), [1])
    with pytest.raises(ValueError, match="case_a must be finite and of one shape"):
        ExamplePictures(replace(example(), image=np.full((6, 8), np.nan)), [1])


@pytest.mark.usefixtures("undrawn")
def test_infinite_norm_is_shown(tmp_path: Path) -> None:
    attack = {"pgd100": PGD(100, 5.0, np.inf, 1.0)}
    measured = evaluation({"pgd100": AMAT["pgd100"]}, attacks=attack)
    shown = "L∞ the model 100 gradient steps of level x 0.05 from a random point of the ball; last step 100 1"
    assert shown in write(tmp_path, [Entry("AMAT", measured)]).text

"""The commands of every page beside the how-to pages, and of the README: each is one that its parser takes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from helpers.hosts import ROOT, blocks
from helpers.howto import blocks_of, check_command, clone, commands_of, parsed_by

PAGES = [ROOT / "README.md", *sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "docs/results").glob("*.md")])]
TYPED = {
    path: [words for block in found for words in commands_of(block)]
    for path in PAGES
    if (found := [block for block in blocks_of(path.read_text("utf-8")) if block.language in ("console", "bash")])
}


@pytest.mark.slow
@pytest.mark.parametrize("path", TYPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_commands_of_a_page_are_understood(path: Path, tmp_path: Path) -> None:
    assert TYPED[path]
    with clone(tmp_path):
        for text in blocks(path.read_text("utf-8"), "yaml"):
            if text.startswith("study:"):  # of the page, with a configuration of the reader's
                Path("study.yaml").write_text(text)
                Path("base.yaml").write_bytes(Path("pneumoniamnist.yaml").read_bytes())
        for words in TYPED[path]:
            check_command(words, tmp_path)


def test_pages_that_are_to_be_typed_are_among_them() -> None:
    named = {str(path.relative_to(ROOT)) for path in TYPED}
    assert {f"docs/{name}.md" for name in ("nnunet", "yolo", "classify", "landmark", "evaluate", "compare")} <= named
    assert {"README.md", "docs/search.md", "docs/installation.md", "docs/results/search.md"} <= named


@pytest.mark.parametrize(
    "line",
    [
        "nnUNetv2_plan_and_preprocess -d 4 -c 2d --verify_integrity",
        "nnUNetv2_predict -d 4 -c 2d -f 0 -tr nnUNetTrainerAMATT -i images -o predictions",
        "nnUNetv2_find_best_configuration 4 -c 2d -trainer nnUNetTrainerAMAT",
        "nnUNetv2_train_all 4",
        "adv-nnunet evaluate -d 4 -c 2d -f 0 -tr nnUNetTrainerAMATT -o report",
        "adv-nnunet evaluate -d 4 -c 2d -f 0 -tr nnUNetTrainerAMAT --levles 0 1 -o report",
        "yolo detect train model=yolov8n.yaml data=data.yaml imgz=320",
        "yolo settings run_dir=runs",
        "adv-classify init mine --overwritten",
        "advmed compare a b --rpeats",
        "python benchmarks/speed.py --thread-count 1",
        "python examples/demo_nnunet.py --no-such-option",
        "python benchmarks/standard.py REPORT -- adv-yolo evaluate model=a.pt data=a.yaml attack=pgd100",
        "make demo-all",
    ],
)
@pytest.mark.slow
def test_a_command_that_no_parser_takes_fails(line: str, tmp_path: Path) -> None:
    with clone(tmp_path), pytest.raises((Exception, SystemExit)):
        check_command(line.split(), tmp_path)


def test_a_study_with_a_wrong_command_fails(tmp_path: Path) -> None:
    text = (ROOT / "adv_nnunet/configurations/search_nnunet.yaml").read_text("utf-8")
    assert " -o " in text
    with clone(tmp_path):
        Path("study.yaml").write_text(text.replace(" -o ", " --no-such-option "))
        check_command(["advmed", "search", "search_nnunet.yaml"], tmp_path)
        with pytest.raises(SystemExit):
            check_command(["advmed", "search", "study.yaml"], tmp_path)


def test_a_program_that_reads_no_words_is_not_taken_for_one_that_does() -> None:
    with pytest.raises(AssertionError, match="has read no words"):
        parsed_by("program", ["--option"], lambda: None)


# nnU-Net's page


@pytest.mark.slow
def test_nnunet_finds_the_trainer_of_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file in the folder of external trainers, by the host's own look; its base is the host's."""
    from nnunetv2.utilities import find_objects

    (code,) = blocks((ROOT / "docs/nnunet.md").read_text("utf-8"), "python")
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    found = find_objects.recursive_find_trainer_class_by_name("MyTrainer")
    assert found.__name__ == "MyTrainer"
    assert [kind.__name__ for kind in found.__mro__[1:3]] == ["AdversarialTraining", "nnUNetTrainerNoMirroring"]
    assert found.method_name == "AMAT"

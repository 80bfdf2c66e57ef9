"""A host whose numbers are known in closed form, for the search: ``toy_host.py train|evaluate FOLDER name=value ...``.

What ``values.json`` beside the folders of the trials holds goes before the values of the command: a test so changes
what a command does without changing the command.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


def train(folder: Path, values: Mapping[str, str]) -> None:
    """Waits for the file ``wait``, fails for the delta ``broken``, and leaves the values as the model."""
    mode = values.get("mode", "new")
    note(folder, f"train {folder.name} {mode}")
    busy = folder / "busy"
    if mode == "new":
        busy.open("w" if "again" in values else "x").close()  # two trainings in one folder would find this
    (folder / "begun.ckpt").touch()
    print("epoch 1", flush=True)
    end = time.monotonic() + 600
    while values.get("wait") and not Path(values["wait"]).exists() and time.monotonic() < end:
        time.sleep(0.02)
    if values.get("broken") == values["delta"]:
        sys.exit("CUDA out of memory: a toy's")
    (folder / "model.json").write_text(json.dumps(values))
    busy.unlink(missing_ok=True)


def evaluate(folder: Path, values: Mapping[str, str]) -> None:
    """Writes a report, unless it is ``silent``: the curve of the file ``curves``, or one that is best at delta = 1."""
    note(folder, f"evaluate {folder.name}")
    delta = json.loads((folder / "model.json").read_text())["delta"]
    levels = [float(level) for level in values.get("levels", "0,1,2").split(",")]
    clean = 0.9 - 0.1 * (float(delta) - 1) ** 2
    curve: list[float | None] = [clean * (1 - level / 4) for level in levels]
    if "curves" in values:
        curve = json.loads(Path(values["curves"]).read_text())[delta]
    if values.get("nan") == delta:
        curve[1:] = [None] * len(curve[1:])
    attacks = {name: {"levels": levels, "values": curve} for name in ("pgd100", "ifgsm10")}
    models = {name: {"clean": curve[0], "attacks": attacks} for name in values.get("models", "model").split(",")}
    report = {
        "format": "advmed.report/1",
        "configuration": {
            "evaluation": {"attacks": {"pgd100": {"steps": 100}}, "levels": levels, "seed": 0, "bounds": None},
            "metrics": {"accuracy": {"higher_is_better": values.get("better") != "lower", "scale": None, "unit": ""}},
            "samples": list(values.get("samples", "abc")),
            "models": {name: json.dumps({"truth": values["truth"]} if "truth" in values else {}) for name in models},
            "level_unit": "L2",
        },
        "results": {"accuracy": {"scale": 1.0, "models": models}},
    }
    if "silent" not in values:
        (folder / "report.json").write_text(json.dumps(report))


def note(folder: Path, call: str) -> None:
    with (folder.parent / "calls.txt").open("a") as calls:
        calls.write(f"{call}\n")


def main(words: Sequence[str]) -> None:
    folder, values = Path(words[1]), dict(word.split("=", 1) for word in words[2:])
    first = folder.parent / "values.json"
    values |= json.loads(first.read_text()) if first.exists() else {}
    {"train": train, "evaluate": evaluate}[words[0]](folder, values)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Attacks the trained networks of zoo/ on the embedded validation data: no training, a report for each host.

python examples/attack_zoo.py [--work build/attack-zoo]      `make zoo` runs this.

Segmentation of the hippocampus (nnU-Net), detection of blood cells (YOLO), classification of chest X-rays (timm), each
by a standard network and its robust siblings, through the commands that a user types. Steps that are finished are
skipped when it is called again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

from steps import Command, Steps

# --- what one may want to change -------------------------------------------------------------------------------------

ATTACK = "pgd10"  # quick; the cards were written by `standard`, which is much stronger
SAMPLES = {"hippocampus": 24, "bccd": 12, "pneumonia": 100}
LEVELS = {"hippocampus": ("0", "2", "6", "10"), "bccd": ("0", "2", "4", "8"), "pneumonia": ("0", "0.2", "0.4", "0.8")}

EXPECTED = (1, 35, 60, 30)
"""Seconds of the steps on a machine with two cores; what is said of the time left follows the machine."""

# ---------------------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]
ZOO, DATA = ROOT / "zoo", ROOT / "examples" / "data"
IMAGE_SIZE = 256
METHODS = {"hippocampus": ("STD", "SAT", "AMAT"), "bccd": ("STD", "SAT", "AMAT")}
METHODS["pneumonia"] = ("STD", "SAT", "AMAT", "DPAAT")


class Attack(Steps):
    """The steps."""

    def __init__(self, work: Path) -> None:
        (work / "settings").mkdir(parents=True, exist_ok=True)
        self.data = work / "data"
        super().__init__(work, {"YOLO_CONFIG_DIR": str(work / "settings"), "YOLO_OFFLINE": "true"}, EXPECTED)

    def copy_data(self) -> None:
        """The validation volumes in a folder of their own, and a copy of the photographs beside their labels' cache."""
        shutil.rmtree(self.data, ignore_errors=True)
        source = DATA / "Dataset004_Hippocampus"
        for case in json.loads((source / "splits_final.json").read_text())[0]["val"]:
            for folder, ending in (("images", "_0000.nii.gz"), ("labels", ".nii.gz")):
                (self.data / folder).mkdir(parents=True, exist_ok=True)
                shutil.copy(source / f"{folder}Tr" / f"{case}{ending}", self.data / folder)
        shutil.copytree(DATA / "bccd", self.data / "bccd")

    def words(self, task: str) -> list[str]:
        """The command that attacks the networks of a task."""
        folders = {method: ZOO / task / method for method in METHODS[task]}
        levels, samples, out = LEVELS[task], str(SAMPLES[task]), str(self.work / task)
        if task == "hippocampus":
            words = ["adv-nnunet", "evaluate", "-d", "4", "-c", "2d", "-i", str(self.data / "images")]
            words += ["-l", str(self.data / "labels"), "-m", *(f"{name}={path}" for name, path in folders.items())]
            words += ["--levels", *levels, "--attacks", ATTACK, "--samples", samples, "--checks", "0"]
            return [*words, "-device", "cpu", "-o", out]
        if task == "bccd":
            models = ",".join(str(path / "weights.pt") for path in folders.values())
            words = ["adv-yolo", "evaluate", f"model={models}", f"names={','.join(folders)}", "device=cpu", "checks=0"]
            words += [f"data={self.data / 'bccd' / 'bccd.yaml'}", f"imgsz={IMAGE_SIZE}", f"samples={samples}"]
            return [*words, f"levels={','.join(levels)}", f"attacks={ATTACK}", "batch=8", f"out={out}"]
        words = ["adv-classify", "evaluate", *(str(path / "model.ckpt") for path in folders.values())]
        words += ["--config", str(ZOO / task / "config.yaml"), "--norm", "[2]", "--checks", "0"]
        words += ["--data.file", str(DATA / "pneumoniamnist" / "pneumoniamnist.npz")]
        words += ["--levels", f"[{','.join(levels)}]", "--attacks", f"[{ATTACK}]", "--samples", samples]
        return [*words, "--device", "cpu", "--out", out]

    def report(self, task: str) -> Path:
        """The folder of a task's report; the tools on Lightning have one for each norm."""
        return self.work / task / "L2" if (self.work / task / "L2").is_dir() else self.work / task

    def run(self) -> None:
        """All steps in their order, and the table of each task."""
        self.step("data", "1/4 validation data", self.copy_data, str(DATA))
        decides = json.dumps([ATTACK, SAMPLES, LEVELS])
        titles = {"hippocampus": "nnU-Net, hippocampus MRI", "bccd": "YOLO, blood cells", "pneumonia": "timm, X-rays"}
        for number, (task, title) in enumerate(titles.items(), 2):
            self.commands(f"{number}/4 attack {title}", [Command(task, self.words(task), decides, self.work / task)])
        for task, title in titles.items():
            report = self.report(task)
            found = json.loads((report / "report.json").read_text())["results"]
            metric, result = next(iter(found.items()))
            print(f"\n{title}: {metric} under {ATTACK} at {', '.join(LEVELS[task])} (L2)")
            for name, model in result["models"].items():
                values = " ".join(f"{value:.3f}" for value in model["attacks"][ATTACK]["values"])
                print(f"  {name:6} {values}   AUC_robust {model['attacks'][ATTACK]['auc_robust']:.3f}")
            print(f"  {report / 'report.html'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/attack-zoo"), help="default: build/attack-zoo")
    start, options = time.monotonic(), parser.parse_args()
    Attack(options.work.resolve()).run()
    print(f"\n{time.monotonic() - start:.0f} s in all. What each network is: zoo/TASK/METHOD/CARD.md, or advmed zoo")


if __name__ == "__main__":
    main()

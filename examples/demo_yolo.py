"""From microscope images to a robustness report with YOLO, through the commands that a user types. `make demo-yolo`.

python examples/demo_yolo.py [--work build/demo-yolo]

Trains a small YOLOv8 on real blood cell images three times (standard, fixed noise, adaptive margins), attacks all
three, and writes a report with the boxes before and after. Steps that are finished are skipped when it is called again.
`rm -r build/demo-yolo` starts from nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

from steps import Command, Steps, executable

# --- what one may want to change -------------------------------------------------------------------------------------

IMAGE_SIZE = 160
MODEL = "yolov8n.yaml"
# The standard network is trained from nothing; the other two start from its weights and take a quarter of its epochs,
# AMAT with thresholds that are measured on it.
STANDARD = ["epochs=60", "lr0=0.002", "warmup_epochs=1"]
ATTACK = ["lr0=0.001", "warmup_epochs=0"]
# eps: L2 norm over an image in [0, 1]; AMAT's margins may be eight times as large. rule: how much loss a sample may
# have under its noise; more is more robust, and less accurate on clean images.
METHODS = {"SAT": ["method=sat", "eps=2"], "AMAT": ["method=amat", "eps=2", "rule=mean+4std"]}
COMMON = ["optimizer=AdamW", "mosaic=0", "batch=16", "val=False", "plots=False", "amp=False", "device=cpu"]
# Seconds of the steps on a machine with two cores; what is said of the time left follows the machine.
EXPECTED = (1, 220, 200, 160)
EVALUATE = ["levels=0,1,2,4", "attacks=pgd20", "checks=2", "batch=12", "device=cpu"]
# Ultralytics leaves a core to the system: of two cores a process uses one, so that two processes share the attacks.
TOGETHER = ["torchrun", "--standalone", "--nproc-per-node", "2", "--no-python"]

# ---------------------------------------------------------------------------------------------------------------------

SOURCE = Path(__file__).resolve().parent / "data" / "bccd"


class Demo(Steps):
    """The steps of this demo."""

    def __init__(self, work: Path, seed: int) -> None:
        self.seed = seed
        (work / "settings").mkdir(parents=True, exist_ok=True)
        # The user's own settings of Ultralytics stay untouched, and nothing is asked of a network.
        super().__init__(work, {"YOLO_CONFIG_DIR": str(work / "settings"), "YOLO_OFFLINE": "true"}, EXPECTED)
        self.data, self.runs = work / "bccd", work / "runs"

    def copy_data(self) -> None:
        """A copy of the embedded images: Ultralytics writes a cache beside the labels."""
        if self.data.exists():
            shutil.rmtree(self.data)
        shutil.copytree(SOURCE, self.data)

    def weights(self, name: str) -> Path:
        """The checkpoint that a training ends with."""
        return self.runs / name / "weights" / "last.pt"

    def run(self) -> Path:
        """All steps in their order; the folder of the report."""
        self.step("data", "1/4 blood cells, 96 + 24 images", self.copy_data, str(SOURCE))
        data = f"data={self.data / 'bccd.yaml'}"
        common = [data, f"imgsz={IMAGE_SIZE}", *COMMON, f"seed={self.seed}", f"project={self.runs}", "exist_ok=True"]
        train = ["adv-yolo", "detect", "train"]
        words = [*train, f"model={MODEL}", *STANDARD, *common, "name=STD"]
        self.commands("2/4 train STD", [Command("STD", words, output=self.runs / "STD")])
        standard = self.weights("STD")
        decides = json.dumps([MODEL, STANDARD, self.seed])
        trainings = []
        for method, arguments in METHODS.items():
            words = [*train, f"model={standard}", *ATTACK, *arguments, *common, f"name={method}"]
            trainings.append(Command(method, words, decides, self.runs / method))
        self.commands(f"3/4 train {' and '.join(METHODS)}, side by side", trainings)
        report = self.work / "report"
        models = ",".join(str(self.weights(name)) for name in ("STD", *METHODS))
        evaluate = [*TOGETHER, str(executable("adv-yolo")), "evaluate", f"model={models}", data]
        evaluate += [f"imgsz={IMAGE_SIZE}", *EVALUATE, f"out={report}"]
        trained = json.dumps([MODEL, STANDARD, ATTACK, METHODS, COMMON, self.seed])
        self.commands("4/4 attack all three", [Command("evaluate", evaluate, trained, report)])
        return report


def main() -> None:
    """Read the command line, run the demo, and say where the report is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/demo-yolo"), help="default: build/demo-yolo")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and augmentation (default: 0)")
    start, options = time.monotonic(), parser.parse_args()
    demo = Demo(options.work.resolve(), options.seed)
    report = demo.run()
    log = (demo.logs / "evaluate.log").read_text(errors="replace")
    print(
        f"\n{log[log.index('mAP50-95') :].strip()}\n\nA demonstration, no comparison of methods: SAT and AMAT started "
        f"from STD and were trained a little more.\n{time.monotonic() - start:.0f} s in all."
    )
    assert (report / "report.html").exists()


if __name__ == "__main__":
    main()

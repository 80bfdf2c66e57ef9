"""From chest X-rays to a robustness report, through the commands that a user types. `make demo-classify`.

python examples/demo_classify.py [--work build/demo-classify]

Trains a small ResNet on real X-rays three times (standard, fixed noise, DPAAT), attacks all three in L2 and in Linf,
and writes a report for each, with Grad-CAM before and after. Steps that are finished are skipped when it is called
again. `rm -r build/demo-classify` starts from nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import yaml
from steps import Steps

# --- what one may want to change -------------------------------------------------------------------------------------

NETWORK = "test_resnet"  # the smallest ResNet of timm; any other name of timm's will do
EPOCHS = 10
# eps: L2 norm over an image in [0, 1]. 0.22 is 2/255 in every value.
METHODS = {"STD": {}, "SAT": {"eps": 0.4}, "DPAAT": {"eps": 0.4}}
STEPS = 8
EVALUATE = ["--attacks", "[pgd20,ifgsm10]", "--levels", "[0,0.2,0.4,0.8]", "--device", "cpu"]

# ---------------------------------------------------------------------------------------------------------------------

SOURCE = Path(__file__).resolve().parent / "data" / "pneumoniamnist" / "pneumoniamnist.npz"


class Demo(Steps):
    """The steps of this demo."""

    def __init__(self, work: Path) -> None:
        super().__init__(work, {})
        self.configuration = work / "demo.yaml"

    def write_configuration(self) -> None:
        """What all three trainings have in common."""
        data = {"file": str(SOURCE), "classes": ["normal", "pneumonia"], "batch_size": 64, "flip": 0, "workers": 0}
        content = {
            "model": {"network": {"name": NETWORK}, "attack": {"steps": STEPS}, "lr": 3e-3},
            "data": {"class_path": "adv_classify.data.MedMNIST", "init_args": data | {"rotate": 10, "zoom": 0.1}},
            "trainer": {"max_epochs": EPOCHS, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
        }
        self.configuration.write_text(yaml.safe_dump(content, sort_keys=False))

    def checkpoint(self, name: str) -> Path:
        """The checkpoint that a training ends with."""
        return self.work / name / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"

    def run(self) -> Path:
        """All steps in their order; the folder of the reports."""
        decides = json.dumps([NETWORK, EPOCHS, METHODS, STEPS])
        self.step("data", "1/5 chest X-rays, 1600 + 400 images", self.write_configuration, decides)
        for number, (name, arguments) in enumerate(METHODS.items(), start=2):
            command = ["adv-classify", "fit", "--config", str(self.configuration), "--model.method.name", name]
            command += [word for key, value in arguments.items() for word in (f"--model.method.{key}", str(value))]
            command += ["--trainer.default_root_dir", str(self.work / name)]
            self.command(name, f"{number}/5 train {name}", command, decides, self.work / name)
        report = self.work / "report"
        evaluate = ["adv-classify", "evaluate", *(str(self.checkpoint(name)) for name in METHODS)]
        evaluate += ["--names", f"[{','.join(METHODS)}]", *EVALUATE, "--out", str(report)]
        self.command("evaluate", "5/5 attack all three", evaluate, decides, report)
        return report


def main() -> None:
    """Read the command line, run the demo, and say where the reports are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/demo-classify"), help="default: build/demo-classify")
    start = time.monotonic()
    demo = Demo(parser.parse_args().work.resolve())
    report = demo.run()
    log = (demo.logs / "evaluate.log").read_text(errors="replace")
    print(f"\n{log[log.index('mAP ') :].strip()}\n\n{time.monotonic() - start:.0f} s in all.")
    assert (report / "L2" / "report.html").exists()


if __name__ == "__main__":
    main()

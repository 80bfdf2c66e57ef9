"""From raw MRI to a robustness report, through the same console commands that a user types. `make demo` runs this.

python examples/demo_nnunet.py [--work build/demo]

Prepares the embedded hippocampus data, trains the same small 2D network three times (standard, fixed noise, adaptive
margins), attacks all three, and writes a report. Steps that are finished are skipped when it is called again; a step
is done again when its command or the settings below have changed. `rm -r build/demo` starts from nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path

from steps import Command, Steps

# --- what one may want to change -------------------------------------------------------------------------------------

# The settings file of each trainer. The standard network is trained first; the other two start from its weights and
# take a quarter of its epochs, which is the preset of all trainers. Seeds make two runs on one machine agree.
SHORT: dict[str, object] = {"iterations_per_epoch": 50, "val_iterations_per_epoch": 2}
SETTINGS: dict[str, dict[str, object]] = {
    # learning rate: ten times nnU-Net's, which would need twice as long to a useful network
    "nnUNetTrainerSTD": {**SHORT, "epochs": 20, "initial_lr": 0.1},
    # eps: radius of the noise, L2 over one slice in z-score units.
    "nnUNetTrainerSAT": {**SHORT, "initial_lr": 0.03, "eps": 3.5},
    # empty_samples: slices without a structure, a quarter of them, bear any noise, and are trained with little.
    "nnUNetTrainerAMAT": {
        **SHORT,
        "initial_lr": 0.03,
        "rule": "mean+2std",
        "threshold_samples": 640,
        "empty_samples": "floor",
    },
}
# The network, smaller than nnU-Net plans it for this data.
BATCH_SIZE = 16
FEATURES = (12, 24, 48, 96)  # one per stage; deeper stages repeat the last
# The evaluation: the paper's noise levels for this data set, fewer attack steps (the paper: pgd100), some slices only.
EVALUATE = ["--levels", "0", "2", "6", "10", "--attacks", "pgd20", "ifgsm10", "--samples", "64", "--checks", "16"]

# Seconds of the steps on a machine with two cores; what is said of the time left follows the machine.
EXPECTED = (1, 40, 1, 155, 200, 130)

TRAINERS = tuple(SETTINGS)
DATASET, NAME, CONFIGURATION, FOLD = "4", "Dataset004_Hippocampus", "2d", "0"
PLANS = "nnUNetPlans_small"
COMMON = ("-p", PLANS, "-device", "cpu", "-tr")

# ---------------------------------------------------------------------------------------------------------------------

SOURCE = Path(__file__).resolve().parent / "data" / NAME


class Demo(Steps):
    """The steps of this demo."""

    def __init__(self, work: Path, seed: int) -> None:
        self.seed = seed
        self.raw, self.preprocessed, self.results = (work / f"nnUNet_{n}" for n in ("raw", "preprocessed", "results"))
        for folder in (self.raw, self.preprocessed, self.results):
            folder.mkdir(parents=True, exist_ok=True)
        environment = {
            "nnUNet_raw": str(self.raw),
            "nnUNet_preprocessed": str(self.preprocessed),
            "nnUNet_results": str(self.results),
            "nnUNet_def_n_proc": os.environ.get("nnUNet_def_n_proc", "2"),
            # One worker process for augmentation. 0 is no choice: planning would set its threads to 0 and fail.
            "nnUNet_n_proc_DA": os.environ.get("nnUNet_n_proc_DA", "1"),
            "nnUNet_compile": "f",  # slower than no compilation on a CPU
        }
        super().__init__(work, environment, EXPECTED)

    def link_data(self) -> None:
        """Put the embedded data where nnU-Net looks; a link where the file system has links, else a copy."""
        target = self.raw / NAME
        if target.is_symlink():
            target.unlink()
        elif target.exists():
            shutil.rmtree(target)
        try:
            target.symlink_to(SOURCE, target_is_directory=True)
        except OSError:
            shutil.copytree(SOURCE, target)

    def write_small_plans(self) -> None:
        """A copy of nnU-Net's plans with a smaller batch and network; the preprocessed data stays the same."""
        folder = self.preprocessed / NAME
        plans = json.loads((folder / "nnUNetPlans.json").read_text())
        plans["plans_name"] = PLANS
        configuration = plans["configurations"][CONFIGURATION]
        configuration["batch_size"] = BATCH_SIZE
        network = configuration["architecture"]["arch_kwargs"]
        network["features_per_stage"] = [FEATURES[min(i, len(FEATURES) - 1)] for i in range(network["n_stages"])]
        (folder / f"{PLANS}.json").write_text(json.dumps(plans, indent=4) + "\n")

    def prepare_training(self) -> None:
        """Split, small plans and settings, in the preprocessed data set's folder."""
        shutil.copy(SOURCE / "splits_final.json", self.preprocessed / NAME)
        self.write_small_plans()
        for trainer, settings in SETTINGS.items():
            lines = "".join(f"{key}: {value}\n" for key, value in {**settings, "seed": self.seed}.items())
            self.settings_file(trainer).write_text(lines)

    def settings_file(self, trainer: str) -> Path:
        """Where the settings of a trainer are; one file for all would be adversarial.yaml in the same folder."""
        return self.preprocessed / NAME / f"adversarial_{trainer}.yaml"

    def run(self) -> Path:
        """All steps in their order; the folder of the report."""
        self.step("data", "1/6 hippocampus MRI, 74 volumes", self.link_data, str(SOURCE))
        plan = ["nnUNetv2_plan_and_preprocess", "-d", DATASET, "-c", CONFIGURATION, "--verify_dataset_integrity"]
        self.commands("2/6 plan and preprocess", [Command("preprocess", [*plan, "-np", "2"])])
        # What decides about a result is part of its stamp, so that a change above never mixes with old results.
        choices = json.dumps([SETTINGS, BATCH_SIZE, FEATURES, self.seed])
        self.step("prepare", "3/6 split, small plans, settings", self.prepare_training, choices)
        standard, *others = [self._training(trainer) for trainer in TRAINERS]
        self.commands(f"4/6 train {standard.name}", [standard])
        self.commands(f"5/6 train {' and '.join(other.name for other in others)}, side by side", others)
        report = self.work / "report"
        evaluate = ["adv-nnunet", "evaluate", "-d", DATASET, "-c", CONFIGURATION, "-f", FOLD, *COMMON, *TRAINERS]
        evaluate += [*EVALUATE, "-o", str(report)]
        self.commands("6/6 attack all three", [Command("evaluate", evaluate, choices, report)])
        return report

    def _training(self, trainer: str) -> Command:
        return Command(
            trainer,
            ["nnUNetv2_train", DATASET, CONFIGURATION, FOLD, *COMMON, trainer],
            json.dumps([SETTINGS[TRAINERS[0]], SETTINGS[trainer], BATCH_SIZE, FEATURES, self.seed]),
            self.results / NAME / f"{trainer}__{PLANS}__{CONFIGURATION}" / f"fold_{FOLD}",
            {"nnUNet_adversarial": str(self.settings_file(trainer))},
        )


def main() -> None:
    """Read the command line, run the demo, and say where the report is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="working folder (default: build/demo)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and augmentation (default: 0)")
    start, options = time.monotonic(), parser.parse_args()
    demo = Demo(options.work.resolve(), options.seed)
    report = demo.run()
    lines = (demo.logs / "evaluate.log").read_text(errors="replace").splitlines()
    table = "\n".join(line for line in lines if not line.startswith("perform_everything_on_device")).strip()
    print(
        f"\n{table}\n\nA demonstration, no comparison of methods: SAT and AMAT started from STD and were trained for a "
        f"quarter of its epochs.\n{time.monotonic() - start:.0f} s in all. The report:"
    )
    for path in sorted(report.glob("*.html")) or [report]:
        print(f"  {path}")


if __name__ == "__main__":
    main()

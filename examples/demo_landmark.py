"""From MRI slices with landmarks to a robustness report, through the commands that a user types. `make demo-landmark`.

python examples/demo_landmark.py [--work build/demo-landmark]

Trains a small multi-task U-Net on real MRI slices, then, from its weights, by fixed noise and by AMAT, attacks all
three in L2, and writes a report with the landmarks found before and after. Steps that are finished are skipped when it
is called again. `rm -r build/demo-landmark` starts from nothing.
"""

from __future__ import annotations

from pathlib import Path

from steps import LightningDemo

# --- what one may want to change -------------------------------------------------------------------------------------

ENCODER = "tu-test_resnet"  # the smallest ResNet of timm; vgg19 is the paper's, with BatchNorm by default
EPOCHS = 60
# The other two start from the standard network, and take a quarter of its epochs.
FROM_STANDARD = {"model.network.weights": "{STD}", "trainer.max_epochs": EPOCHS // 4}
# eps: L2 norm over an image in [-1, 1]; AMAT's margins may be eight times as large. rule: how much loss a sample may
# have under its noise; more is more robust, and less accurate on clean images.
NOISE = {**FROM_STANDARD, "model.method.eps": 1.0}
METHODS = {"STD": {}, "SAT": NOISE, "AMAT": {**NOISE, "model.method.rule": "mean+4std"}}
EVALUATE = ["--attacks", "[pgd20,ifgsm10]", "--levels", "[0,0.5,1,2]", "--checks", "16", "--device", "cpu"]

EXPECTED = (1, 110, 120, 140)
"""Seconds of the steps on a machine with two cores; what is said of the time left follows the machine."""

# ---------------------------------------------------------------------------------------------------------------------

SOURCE = Path(__file__).resolve().parent / "data" / "hippocampus_landmarks"
DATA = {"root": str(SOURCE), "spacing": 1.0, "batch_size": 16, "rotate": 10, "zoom": 0.1, "shift": 0.05, "workers": 0}
CONTENT = {
    "model": {
        "network": {"encoder": ENCODER, "decoder_channels": [64, 32, 32, 16, 16]},
        "lr": 3e-3,
    },
    "data": {"class_path": "adv_landmark.data.LandmarkTable", "init_args": DATA},
    "trainer": {"max_epochs": EPOCHS, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
}

if __name__ == "__main__":
    title = "MRI slices, 179 + 42 images with 4 landmarks"
    words = ("adv-landmark", title, CONTENT, METHODS, EVALUATE)
    LightningDemo.main(__doc__, "build/demo-landmark", *words, expected=EXPECTED)

"""From chest X-rays to a robustness report, through the commands that a user types. `make demo-classify`.

python examples/demo_classify.py [--work build/demo-classify]

Trains a small ResNet on real X-rays, then, from its weights, by fixed noise and by DPAAT, attacks all three in L2 and
in Linf, and writes a report for each, with Grad-CAM before and after. Steps that are finished are skipped when it is
called again. `rm -r build/demo-classify` starts from nothing.
"""

from __future__ import annotations

from pathlib import Path

from steps import LightningDemo

# --- what one may want to change -------------------------------------------------------------------------------------

NETWORK = "test_resnet"  # the smallest ResNet of timm; any other name of timm's will do
EPOCHS = 20
# The other two start from the standard network, and take a quarter of its epochs. eps: L2 norm over an image in [0, 1];
# 0.22 is 2/255 in every value.
FROM_STANDARD = {"model.network.weights": "{STD}", "trainer.max_epochs": EPOCHS // 4, "model.method.eps": 0.4}
METHODS = {"STD": {}, "SAT": FROM_STANDARD, "DPAAT": FROM_STANDARD}
EVALUATE = ["--attacks", "[pgd20,ifgsm10]", "--levels", "[0,0.2,0.4,0.8]", "--checks", "16", "--device", "cpu"]

EXPECTED = (1, 45, 60, 165)
"""Seconds of the steps on a machine with two cores; what is said of the time left follows the machine."""

# ---------------------------------------------------------------------------------------------------------------------

SOURCE = Path(__file__).resolve().parent / "data" / "pneumoniamnist" / "pneumoniamnist.npz"
DATA = {"file": str(SOURCE), "classes": ["normal", "pneumonia"], "batch_size": 64, "flip": 0, "workers": 0}
CONTENT = {
    "model": {"network": {"name": NETWORK}, "lr": 3e-3},
    "data": {"class_path": "adv_classify.data.MedMNIST", "init_args": DATA | {"rotate": 10, "zoom": 0.1}},
    "trainer": {"max_epochs": EPOCHS, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
}

if __name__ == "__main__":
    title = "chest X-rays, 1600 + 400 images"
    words = ("adv-classify", title, CONTENT, METHODS, EVALUATE)
    LightningDemo.main(__doc__, "build/demo-classify", *words, expected=EXPECTED)

"""The stock hosts predict with the networks of zoo/, on the embedded validation data. Nothing here imports Advmed.

    python examples/stock.py zoo/hippocampus/AMAT       nnU-Net: Dice, mean over volumes and labels
    python examples/stock.py zoo/bccd/AMAT              Ultralytics: mAP50-95
    python examples/stock.py zoo/pneumonia/AMAT         timm: accuracy

Of several networks, a line for each. The number is that of the network's card.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch

DATA = Path(__file__).resolve().parent / "data"


def segmentation(network: Path, data: Path, work: Path) -> float:
    """Mean Dice of nnU-Net's own evaluation, over the foreground labels and the validation cases of fold 0.

    Args:
        network: nnU-Net's model folder.
        data: in nnU-Net's raw layout, with splits_final.json.
        work: an empty folder.
    """
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ.setdefault(name, str(work))  # nnU-Net warns of their absence, and needs none of them here
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder_simple
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    cases = json.loads((data / "splits_final.json").read_text())[0]["val"]
    truth, predicted = work / "labels", work / "predictions"
    for folder in (truth, predicted):
        folder.mkdir()
    for case in cases:
        shutil.copy(data / "labelsTr" / f"{case}.nii.gz", truth)
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(network), use_folds=(0,))
    images = [[str(data / "imagesTr" / f"{case}_0000.nii.gz")] for case in cases]
    predictor.predict_from_files_sequential(images, [str(predicted / case) for case in cases])
    for name in ("dataset.json", "plans.json"):
        shutil.copy(network / name, predicted)
    compute_metrics_on_folder_simple(str(truth), str(predicted), [1, 2], num_processes=1)
    summary = json.loads((predicted / "summary.json").read_text())
    return float(summary["foreground_mean"]["Dice"])


def detection(network: Path, data: Path, work: Path) -> float:
    """mAP50-95 of Ultralytics' own validation.

    Args:
        network: folder with weights.pt.
        data: with bccd.yaml; it is copied, because Ultralytics writes a cache beside the labels.
        work: an empty folder.
    """
    os.environ.setdefault("YOLO_OFFLINE", "true")
    os.environ.setdefault("YOLO_CONFIG_DIR", str(work))
    from ultralytics import YOLO

    shutil.copytree(data, work / "data")
    model = YOLO(network / "weights.pt")
    found = model.val(
        data=str(work / "data" / "bccd.yaml"), device="cpu", project=str(work), plots=False, verbose=False
    )
    return float(found.box.map)


def classifier(network: Path) -> torch.nn.Sequential:
    """The model of timm with the weights of the checkpoint, for images in [0, 1], shape (N, 1, 28, 28).

    Args:
        network: folder with model.ckpt.
    """
    import timm
    from torchvision.transforms.v2 import Normalize

    weights = torch.load(network / "model.ckpt", map_location="cpu", weights_only=True)["state_dict"]
    own = {
        key.removeprefix("network.model."): value for key, value in weights.items() if key.startswith("network.model.")
    }
    model = timm.create_model("test_resnet", num_classes=2, in_chans=1)
    model.load_state_dict(own)
    mean, std = (weights[f"network.{name}"].flatten().tolist() for name in ("mean", "std"))
    return torch.nn.Sequential(Normalize(mean, std), model).eval()


def classification(network: Path, data: Path) -> float:
    """Accuracy of a model of timm with the weights of the checkpoint.

    Args:
        network: folder with model.ckpt.
        data: a file of MedMNIST.
    """
    import numpy as np

    with np.load(data) as archive:
        images, labels = archive["val_images"], archive["val_labels"].reshape(-1)
    batch = torch.from_numpy(images).unsqueeze(1).float() / 255  # (N, 1, 28, 28)
    with torch.no_grad():
        scores = classifier(network)(batch)
    return float((scores.argmax(1).numpy() == labels).mean())


def measure(network: Path) -> float:
    """The number of a network's card, which is told by its files."""
    with tempfile.TemporaryDirectory() as work:
        if (network / "plans.json").exists():
            return segmentation(network, DATA / "Dataset004_Hippocampus", Path(work))
        if (network / "weights.pt").exists():
            return detection(network, DATA / "bccd", Path(work))
        return classification(network, DATA / "pneumoniamnist" / "pneumoniamnist.npz")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "networks", type=Path, nargs="+", metavar="NETWORK", help="a folder, such as zoo/pneumonia/AMAT"
    )
    for network in parser.parse_args().networks:
        if network.is_file():  # of zoo/TASK/*, what networks share
            continue
        print(f"{network}: {measure(network):.4f}", flush=True)


if __name__ == "__main__":
    main()

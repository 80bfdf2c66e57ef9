"""The command ``adv-nnunet``: thresholds, evaluate, settings."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

DESCRIPTION = "Adversarial training for nnU-Net v2. Train with: nnUNetv2_train DATASET 2d 0 -tr nnUNetTrainerAMAT"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; prints one clear line for a mistake of the user, and returns the exit status."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        if args.debug:
            raise
        print(f"adv-nnunet {args.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("adv-nnunet", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True)

    t = commands.add_parser(
        "thresholds",
        help="make thresholds for AMAT from a fold's finished standard training",
        description="Measures a finished standard training on its clean training samples and writes thresholds.json "
        "beside its checkpoint, where nnUNetTrainerAMAT finds it. (The trainer does this by itself, too.)",
    )
    _dataset_arguments(t)
    t.add_argument("-tr", default=None, help="trainer of the standard training (default: nnUNetTrainer)")
    t.add_argument("--rule", default=None, help="mean or mean+2std (default: that of the settings, else mean)")
    t.add_argument("--terms", default=None, choices=["sum", "separate"], help="one threshold, or one per loss term")
    t.add_argument("--samples", type=int, default=None, help="number of training samples to measure")
    t.add_argument("-o", default=None, metavar="FILE", help="write this file instead")
    t.set_defaults(run=_thresholds)

    e = commands.add_parser(
        "evaluate",
        help="attack trained models and write a report",
        description="Attacks the models' networks on the fold's validation cases, or on raw files, and writes a report "
        "(report.html, report.json, results.csv, samples.csv and others). A killed run goes on when called again.",
    )
    _dataset_arguments(e)
    e.add_argument(
        "-tr", nargs="+", default=None, metavar="TRAINER", help="trainers of the models (default: nnUNetTrainerAMAT)"
    )
    e.add_argument(
        "-m", nargs="+", default=None, metavar="[NAME=]FOLDER", help="model folders, instead of -tr; stock ones, too"
    )
    e.add_argument("-i", default=None, metavar="FOLDER", help="raw images instead of the validation cases")
    e.add_argument("-l", default=None, metavar="FOLDER", help="their labels")
    e.add_argument("-o", required=True, metavar="FOLDER", help="output folder")
    e.add_argument("-chk", default="checkpoint_final.pth", help="checkpoint file (default: checkpoint_final.pth)")
    e.add_argument(
        "--attacks",
        nargs="+",
        default=["pgd100", "ifgsm10"],
        help="the strongest first: pgd100, pgd20x3, apgd100, square1000, ... (default: pgd100 ifgsm10)",
    )
    e.add_argument(
        "--levels",
        nargs="+",
        type=float,
        default=None,
        help="noise levels, 0 first (default: 0 and 0.04, 0.12, 0.2 times the square root of the patch's size)",
    )
    e.add_argument("--norm", default="2", choices=["2", "inf"], help="norm of the noise (default: 2)")
    e.add_argument("--samples", type=int, default=None, help="evaluate only so many samples, at even distances")
    e.add_argument(
        "--examples", type=int, default=4, help="samples shown as pictures: those that fail first and last (default: 4)"
    )
    e.add_argument(
        "--checks", type=int, default=32, help="samples that the attack itself is checked on, 0 for none (default: 32)"
    )
    e.add_argument("--batch_size", type=int, default=32, help="slices at a time, 2d only (default: 32)")
    e.add_argument("-step_size", type=float, default=0.5, help="as in nnUNetv2_predict (default: 0.5)")
    e.add_argument("--seed", type=int, default=0, help="seed of random starts (default: 0)")
    e.add_argument("--overwrite", action="store_true", help="replace what another evaluation left in the folder")
    e.set_defaults(run=_evaluate)

    s = commands.add_parser("settings", help="print the default settings, to be edited and saved as adversarial.yaml")
    s.set_defaults(run=_settings)
    for command in (t, e, s):
        command.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    return parser


def _dataset_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", required=True, metavar="ID", help="data set, id or name")
    parser.add_argument("-c", required=True, metavar="CONFIGURATION", help="2d, 3d_fullres or 3d_lowres")
    parser.add_argument("-f", default="0", metavar="FOLD", help="fold, a number or 'all' (default: 0)")
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="plans (default: nnUNetPlans)")
    parser.add_argument("-device", default="cuda", choices=["cuda", "cpu", "mps"], help="default: cuda")


def _settings(args: argparse.Namespace) -> None:
    from adv_nnunet.settings import Settings
    from advmed.training.settings import settings_text

    print(settings_text(Settings(), see="docs/nnunet.md for what each of them does; null takes the default"), end="")


def _thresholds(args: argparse.Namespace) -> None:
    from adv_nnunet import calibration as standard

    _require_environment()
    device = _device(args.device)
    overrides = {"rule": args.rule, "terms": args.terms, "threshold_samples": args.samples, "std_trainer": args.tr}
    real_results = os.environ["nnUNet_results"]
    # A trainer makes an output folder and a log file for itself; this one trains nothing and should leave none.
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["nnUNet_results"] = scratch
        try:
            trainer = _trainer(args, device, overrides)
        finally:
            os.environ["nnUNet_results"] = real_results
        trainer.output_folder_base = str(Path(real_results) / trainer.plans_manager.dataset_name / "-")
        checkpoint = standard.find_checkpoint(trainer)
        if checkpoint is None:
            folders = " or ".join(str(folder) for folder in standard.standard_folders(trainer))
            raise FileNotFoundError(
                f"there is no finished standard training ({standard.CHECKPOINT}) in {folders}. Train it with "
                f"nnUNetv2_train {args.d} {args.c} {args.f} -p {args.p}, or name its trainer with -tr."
            )
        trainer.initialize()
        measured = standard.measure(trainer, checkpoint)
    path = Path(args.o) if args.o else checkpoint.parent / standard.FILE
    measured.save(path)
    assert measured.mean is not None
    assert measured.std is not None
    print(f"{measured.n} clean training samples of {checkpoint}")
    for name, value, mean, std in zip(measured.names, measured.values, measured.mean, measured.std, strict=True):
        print(f"  {name}: threshold {value:.4f} ({measured.rule}; mean {mean:.4f}, std {std:.4f})")
    dice = measured.notes["training_dice"]
    print(f"Mean Dice of that network on these samples: {dice:.3f}.")
    if dice < 0.6:
        print("WARNING: this network is poorly trained; thresholds from it are too lenient or too strict by luck.")
    print(f"Written to {path}")


def _trainer(args: argparse.Namespace, device: Any, overrides: dict[str, Any]) -> Any:
    """An AMAT trainer for data set, configuration and fold, with settings of the command line."""
    from dataclasses import replace

    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    from adv_nnunet.trainer import nnUNetTrainerAMAT

    name = maybe_convert_to_dataset_name(args.d)
    folder = Path(os.environ["nnUNet_preprocessed"]) / name
    for needed in (folder / f"{args.p}.json", folder / "dataset.json"):
        if not needed.is_file():
            raise FileNotFoundError(f"there is no {needed}: run nnUNetv2_plan_and_preprocess -d {args.d} first")
    plans = json.loads((folder / f"{args.p}.json").read_text())
    plans["continue_training"] = False
    fold = args.f if args.f == "all" else int(args.f)
    dataset = json.loads((folder / "dataset.json").read_text())
    trainer = nnUNetTrainerAMAT(plans, args.c, fold, dataset, device)
    trainer.settings = replace(trainer.settings, **{k: v for k, v in overrides.items() if v is not None})
    return trainer


def _evaluate(args: argparse.Namespace) -> None:
    from adv_nnunet import evaluate as host
    from advmed.attacks.names import parse_attacks
    from advmed.evaluation.auc import check_levels
    from advmed.evaluation.subjects import Subject, check_numbers, compare

    if (args.i is None) != (args.l is None):
        raise ValueError("-i and -l belong together: raw images and their labels")
    check_numbers(samples=args.samples, examples=args.examples, checks=args.checks)
    if args.levels is not None:
        check_levels(args.levels)
    attacks = parse_attacks(args.attacks, norm=float(args.norm))
    _require_environment(raw=False)
    device = _device(args.device)
    fold = args.f if args.f == "all" else int(args.f)
    models = [
        host.load_model(name, folder, fold, device, file=args.chk, tile_step_size=args.step_size)
        for name, folder in _model_folders(args).items()
    ]
    first = models[0]
    levels = check_levels(args.levels or _default_levels(first, args.norm))
    cases, samples = {}, {}
    for model in models:
        if (model.planar, model.labels.label_dict) != (first.planar, first.labels.label_dict):
            raise ValueError(f"{model.name} and {first.name} do not predict the same: other labels, or 2D against 3D")
        cases[model.name] = (
            host.raw_cases(model, Path(args.i), Path(args.l)) if args.i else host.validation_cases(model, fold)
        )
        samples[model.name] = host.list_samples(model, cases[model.name], args.samples)
    subjects = []
    for model in models:
        batches = host.make_batches(model, cases[model.name], samples[model.name], args.batch_size)
        few = partial(host.few, model, cases[model.name], samples[model.name], args.batch_size)
        subjects.append(Subject(model.name, model.checkpoint, batches, model.margins, few))
    norm = "Linf" if args.norm == "inf" else "L2"
    sample = "slice" if first.planar else "case"
    compare(
        Path(args.o),
        subjects,
        attacks,
        levels,
        host.metrics(first.planar),
        examples=partial(host.make_examples, models, cases, samples[first.name], seed=args.seed),
        shown=args.examples,
        checks=args.checks,
        groups=(lambda id_: id_.rpartition(":")[0]) if first.planar else None,  # the slices of a case are alike
        fingerprint={"step_size": args.step_size, "images": args.i or "validation"},
        seed=args.seed,
        overwrite=args.overwrite,
        title=f"Robustness of {', '.join(model.name for model in models)} on "
        f"{first.predictor.plans_manager.dataset_name}",
        level_unit=f"{norm} norm of the noise over a whole {sample} as the network receives it, in units of the "
        f"normalised intensities",
        class_names={
            value: name for name, value in first.labels.label_dict.items() if isinstance(value, int) and value > 0
        },
        settings={
            "data set": first.predictor.plans_manager.dataset_name,
            "configuration": first.predictor.configuration_manager.data_identifier,
            "fold": str(fold),
            "samples": f"{len(samples[first.name])} {sample}s of "
            + ("raw files" if args.i else f"the fold's {len(cases[first.name])} validation cases"),
            "prediction": f"tiles (step {args.step_size:g}) inside the attacked function, no mirroring",
            "checkpoints": {model.name: _short(model.checkpoint) for model in models},
        },
    )


def _model_folders(args: argparse.Namespace) -> dict[str, Path]:
    """Model folders by the name they are shown with."""
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    if args.m and args.tr:
        raise ValueError("-m and -tr both name the models; give one of them")
    folders: dict[str, Path] = {}
    if args.m:
        for text in args.m:
            name, _, folder = text.rpartition("=")
            folders[name or Path(folder).name.split("__")[0]] = Path(folder)
        given = args.m
    else:
        if not os.environ.get("nnUNet_results"):
            raise RuntimeError("the environment variable nnUNet_results is not set; set it, or name folders with -m")
        name = maybe_convert_to_dataset_name(args.d)
        given = args.tr or ["nnUNetTrainerAMAT"]
        for trainer in given:
            short = trainer.removeprefix("nnUNetTrainer") or "STD"
            folders[short] = Path(os.environ["nnUNet_results"]) / name / f"{trainer}__{args.p}__{args.c}"
    if len(folders) < len(given):
        raise ValueError("two models have the same name; give names with -m NAME=FOLDER")
    return folders


def _default_levels(model: Any, norm: str) -> list[float]:
    """The paper's levels for hippocampus (2, 6, 10 on 56 x 40 pixels), scaled to the patch."""
    size = 1.0 if norm == "inf" else math.sqrt(math.prod(model.window.patch_size))
    return [0.0, *(float(f"{factor * size:.2g}") for factor in (0.04, 0.12, 0.2))]


def _short(checkpoint: Path) -> str:
    """Trainer folder, fold and file; not where the user keeps them."""
    return "/".join(checkpoint.parts[-3:])


def _device(name: str) -> Any:
    import torch

    from advmed.distributed import device_of_rank

    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA device here; choose another with -device cpu")
    return torch.device(device_of_rank(name))


def _require_environment(raw: bool = True) -> None:
    from adv_nnunet.trainer import require_environment

    require_environment(raw)


if __name__ == "__main__":
    sys.exit(main())

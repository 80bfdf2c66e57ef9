"""The command ``adv-nnunet``: init, thresholds, evaluate, settings."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from advmed.cli import init, options, runner
from advmed.cli.completion import add_completion
from advmed.documentation import page

PLANS = "nnUNetPlans"
DESCRIPTION = "Adversarial training for nnU-Net v2. Train with: nnUNetv2_train DATASET 2d 0 -tr nnUNetTrainerAMAT"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command, see :func:`advmed.cli.runner.run`."""
    return runner.run("adv-nnunet", _dispatch, arguments, extra="nnunet", subcommands=COMMANDS)


def _dispatch(argv: list[str]) -> None:
    args = _parser().parse_args(argv)
    COMMANDS[args.command](args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "adv-nnunet",
        description=DESCRIPTION,
        epilog=f"The page of the documentation: {page('nnunet.md')}\n{runner.DEBUG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # another would break the path
    )
    add_completion(parser)
    commands = parser.add_subparsers(dest="command", required=True)

    t = commands.add_parser(
        "thresholds",
        help="make thresholds for AMAT from a fold's finished standard training",
        description="Measures a finished standard training on its clean training samples and writes thresholds.json "
        "beside its checkpoint, where nnUNetTrainerAMAT finds it. (The trainer does this by itself, too.)",
        epilog=runner.DEBUG,
    )
    _dataset_arguments(t)
    t.add_argument("-tr", default=None, help="trainer of the standard training (default: nnUNetTrainer)")
    options.add_options(t, options.THRESHOLDS, out="-o")
    t.add_argument("--terms", default=None, choices=["sum", "separate"], help="one threshold, or one per loss term")
    t.add_argument("--samples", type=int, default=None, help="number of training samples to measure")

    e = commands.add_parser(
        "evaluate",
        help="attack trained models and write a report",
        description="Attacks the models' networks on the fold's validation cases, or on raw files, and writes a report "
        "(report.html, report.json, results.csv, samples.csv and others). A killed run goes on when called again.",
        epilog=runner.DEBUG,
    )
    _dataset_arguments(e, plans=None)
    e.add_argument(
        "-tr", nargs="+", default=None, metavar="TRAINER", help="trainers of the models (default: nnUNetTrainerAMAT)"
    )
    e.add_argument(
        "-m", nargs="+", default=None, metavar="[NAME=]FOLDER", help="model folders, instead of -tr; stock ones, too"
    )
    e.add_argument("-i", default=None, metavar="FOLDER", help="raw images instead of the validation cases")
    e.add_argument("-l", default=None, metavar="FOLDER", help="their labels")
    e.add_argument("-chk", default="checkpoint_final.pth", help="checkpoint file (default: checkpoint_final.pth)")
    options.add_options(e, options.with_defaults(options.EVALUATE, out=None), out="-o")
    e.add_argument("--batch_size", type=int, default=32, help="slices at a time, 2d only (default: 32)")
    e.add_argument("-step_size", type=float, default=0.5, help="as in nnUNetv2_predict (default: 0.5)")

    i = commands.add_parser("init", help=init.LINE, description=f"{init.LINE.capitalize()}.", epilog=runner.DEBUG)
    init.add_arguments(i)

    commands.add_parser(
        "settings",
        help="print all settings with their defaults",
        epilog=runner.DEBUG,
    )
    return parser


def _dataset_arguments(parser: argparse.ArgumentParser, plans: str | None = PLANS) -> None:
    parser.add_argument("-d", required=True, metavar="ID", help="data set, id or name")
    parser.add_argument("-c", required=True, metavar="CONFIGURATION", help="2d, 3d_fullres or 3d_lowres")
    parser.add_argument("-f", default="0", metavar="FOLD", help="fold, a number or 'all' (default: 0)")
    parser.add_argument("-p", default=plans, metavar="PLANS", help=f"plans (default: {PLANS})")
    parser.add_argument("-device", default="cuda", choices=["cuda", "cpu", "mps"], help="default: cuda")


def _init(args: argparse.Namespace) -> None:
    init.write("adv_nnunet", args.folder, args.overwrite, page="nnunet.md")


def _settings(args: argparse.Namespace) -> None:
    from adv_nnunet.settings import Settings
    from advmed.training.settings import settings_text

    print(
        settings_text(Settings(), see=f"{page('nnunet.md')} for what each of them does; null takes the default"), end=""
    )


def _thresholds(args: argparse.Namespace) -> None:
    from adv_nnunet import calibration as standard
    from advmed.cli.thresholds import Quality, ThresholdsOptions, write_thresholds

    chosen = ThresholdsOptions.of(vars(args))
    _require_environment("nnUNet_preprocessed", "nnUNet_results")
    device = _device(args.device)
    overrides = {"rule": chosen.rule, "terms": args.terms, "threshold_samples": args.samples, "std_trainer": args.tr}
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
            raise FileNotFoundError(
                f"there is no finished standard training ({standard.CHECKPOINT}) in {standard.searched(trainer)}. "
                f"Train it with nnUNetv2_train {args.d} {args.c} {args.f} -p {args.p}, or name its trainer with -tr."
            )
        path = chosen.destination(checkpoint.parent / standard.FILE)
        trainer.initialize()
        measured = standard.measure(trainer, checkpoint)
    write_thresholds(
        measured,
        path,
        of=f"clean training samples of {checkpoint}",
        quality=Quality("Mean Dice", measured.notes["training_dice"], least=0.6),
    )


def _trainer(args: argparse.Namespace, device: Any, overrides: dict[str, Any]) -> Any:
    """An AMAT trainer for data set, configuration and fold, with settings of the command line."""
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    kind = _amat_before(args.tr or "nnUNetTrainer")
    name = maybe_convert_to_dataset_name(args.d)
    folder = Path(os.environ["nnUNet_preprocessed"]) / name
    for needed in (folder / f"{args.p}.json", folder / "dataset.json"):
        if not needed.is_file():
            raise FileNotFoundError(f"there is no {needed}: run nnUNetv2_plan_and_preprocess -d {args.d} first")
    plans = json.loads((folder / f"{args.p}.json").read_text())
    plans["continue_training"] = False
    dataset = json.loads((folder / "dataset.json").read_text())
    trainer = kind(plans, args.c, _fold(args.f), dataset, device)
    trainer.settings = replace(trainer.settings, **{k: v for k, v in overrides.items() if v is not None})
    return trainer


def _amat_before(name: str) -> Any:
    """The AMAT trainer whose samples and loss are those of a standard training's trainer, named as its folder is."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from adv_nnunet.host import find_trainer
    from adv_nnunet.trainer import TRAINERS, AdversarialTraining

    own = {kind.__name__: kind for kind in TRAINERS.values()}
    names = [name, name.rpartition("_")[0]]  # a run with a 'tag' has it after its trainer's name
    found = next((kind for n in names if n and (kind := own.get(n) or find_trainer(n)) is not None), None)
    if found is None:
        raise ValueError(
            f"nnU-Net finds no trainer {name!r}, whose samples and loss thresholds are to be measured with. Correct "
            f"-tr, or put the trainer's file into a folder that nnUNet_extTrainer names."
        )
    bases = (found,) if issubclass(found, AdversarialTraining) else (AdversarialTraining, found)
    # It trains nothing: a training step of the base's own is no hindrance.
    return type(f"{found.__name__}AMAT", bases, {"method_name": "AMAT", "train_step": nnUNetTrainer.train_step})


def _evaluate(args: argparse.Namespace) -> None:
    from adv_nnunet.evaluate import SegmentationEvaluation
    from advmed.cli.evaluate import EvaluationOptions, evaluate_models

    if (args.i is None) != (args.l is None):
        raise ValueError("-i and -l belong together: raw images and their labels")
    folders = _model_folders(args)
    chosen = EvaluationOptions.of(
        vars(args), [name for name, _ in folders], models="models", option="--names, or with -m NAME=FOLDER"
    )
    _require_environment(*([] if args.i else ["nnUNet_preprocessed"]))
    host = SegmentationEvaluation(
        folders={name: folder for name, (_, folder) in zip(chosen.names, folders, strict=True)},
        fold=_fold(args.f),
        device=_device(args.device),
        checkpoint=args.chk,
        step_size=args.step_size,
        batch_size=args.batch_size,
        samples=chosen.samples,
        raw=None if args.i is None else (args.i, args.l),
        dataset=args.d,
        configuration=args.c,
        plans=args.p,
    )
    evaluate_models(host, chosen)


def _model_folders(args: argparse.Namespace) -> list[tuple[str, Path]]:
    """The models' folders, each with the name that it is shown with."""
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    if args.m and args.tr:
        raise ValueError("-m and -tr both name the models; give one of them")
    if args.m:
        pairs = [text.rpartition("=") for text in args.m]
        return [(name or Path(folder).name.split("__")[0], Path(folder)) for name, _, folder in pairs]
    _require_environment("nnUNet_results")
    results = Path(os.environ["nnUNet_results"]) / maybe_convert_to_dataset_name(args.d)
    return [
        (
            trainer.removeprefix("nnUNetTrainer").lstrip("_") or "STD",
            results / f"{trainer}__{args.p or PLANS}__{args.c}",
        )
        for trainer in args.tr or ["nnUNetTrainerAMAT"]
    ]


def _fold(text: str) -> Any:
    """A number, or "all"."""
    if text != "all" and not text.isdigit():
        raise ValueError(f"-f must be the number of a fold, from 0 on, or 'all', got {text!r}")
    return text if text == "all" else int(text)


def _device(name: str) -> Any:
    import torch

    from advmed.distributed import device_of_rank

    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA device here; choose another with -device cpu")
    return torch.device(device_of_rank(name))


def _require_environment(*names: str) -> None:
    from adv_nnunet.host import require_environment

    require_environment(*names)


COMMANDS = {"init": _init, "thresholds": _thresholds, "evaluate": _evaluate, "settings": _settings}


if __name__ == "__main__":
    sys.exit(main())

"""The command ``adv-classify``: LightningCLI around :class:`RobustClassifier`, thresholds, and evaluation under attack.

``adv-classify fit|validate|test|predict --config FILE`` are LightningCLI's own; ``thresholds`` and ``evaluate`` ours.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OWN = ("thresholds", "evaluate")
CONFIG = "config.yaml"
"""What LightningCLI leaves in a run's folder."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; prints one clear line for a mistake of the user, and returns the exit status."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in argv
    argv = [argument for argument in argv if argument != "--debug"]
    try:
        if argv and argv[0] in OWN:
            (_thresholds if argv[0] == "thresholds" else _evaluate)(argv[1:])
        else:
            _lightning(argv)
    except Exception as error:
        if debug or not isinstance(error, _mistakes()):
            raise
        print(f"adv-classify: {_message(error)}", file=sys.stderr)
        return 1
    return 0


def _mistakes() -> tuple[type[Exception], ...]:
    """What a user's mistake is raised as, by us, by timm (AssertionError), by Lightning and by jsonargparse."""
    from argparse import ArgumentError

    from lightning.fabric.utilities.exceptions import MisconfigurationException

    own = (OSError, ValueError, TypeError, RuntimeError, AssertionError, ImportError)
    return (*own, MisconfigurationException, ArgumentError)


def _message(error: BaseException) -> str:
    """The mistake itself, where jsonargparse reports it as one of several types that the value is not."""
    where = ""
    while "Does not validate against any of the Union" in str(error) and error.__cause__ is not None:
        first = str(error).split("\n")[0]
        where = f"{first} " if first.startswith("Parser key") else where
        error = error.__cause__
    text = where + str(error)
    if "in DataLoader worker process" in text:  # PyTorch wraps what a worker raises into its traceback
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return text


def _lightning(argv: list[str]) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    from adv_classify.data import ClassificationData
    from adv_classify.module import PREDICTIONS, RobustClassifier, gathered, write_predictions

    class Command(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
            parser.set_defaults(
                {
                    "checkpoint.monitor": "val/mAP",
                    "checkpoint.mode": "max",
                    "checkpoint.filename": "best",
                }
            )
            for name in ("num_classes", "channels", "class_counts"):
                parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")

        def after_instantiate_classes(self) -> None:
            # The option save_last of a callback that monitors writes a file only when there is a new best.
            if self.trainer.checkpoint_callbacks:
                folder = self.trainer.checkpoint_callbacks[0].dirpath
                last = ModelCheckpoint(
                    folder, filename="last", save_on_train_epoch_end=True, enable_version_counter=False
                )
                self.trainer.callbacks.append(last)

        def _parse_ckpt_path(self) -> None:
            # Of a checkpoint that is resumed, Lightning would put the settings in the place of the user's.
            if self.config.get("subcommand") != "fit":
                super()._parse_ckpt_path()

        def _run_subcommand(self, subcommand: str) -> None:
            if subcommand != "fit" and not self._get(self.config, "ckpt_path"):
                raise ValueError(f"{subcommand} needs a trained network: name its checkpoint with --ckpt_path")
            super()._run_subcommand(subcommand)

        def predict(self, model: Any, datamodule: Any, **how: Any) -> None:
            found = self.trainer.predict(model, datamodule, **how) or []
            if self.trainer.world_size > 1:  # every process has predicted a part
                found = [batch for part in gathered(found) for batch in part]
            path = Path(self.trainer.log_dir or ".") / PREDICTIONS
            if self.trainer.is_global_zero:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_predictions(path, found, datamodule.class_names)
                print(f"Predictions: {path}")

    quiet = {"exit_on_error": False}  # mistakes are for main to report, without a page of usage
    Command(
        RobustClassifier,
        ClassificationData,
        subclass_mode_data=True,
        args=None if argv == sys.argv[1:] else argv,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"prog": "adv-classify", **quiet, **dict.fromkeys(LightningCLI.subcommands(), quiet)},
    )


# Thresholds and evaluation


def _parser(command: str, description: str) -> Any:
    from jsonargparse import ArgumentParser

    from adv_classify.data import ClassificationData

    parser = ArgumentParser(prog=f"adv-classify {command}", description=description, exit_on_error=False)
    parser.add_argument("--config", type=str, default=None, help="a configuration whose data section is used")
    parser.add_subclass_arguments(
        ClassificationData, "data", required=False, help="the data; default: that of the (first) checkpoint's run"
    )
    parser.add_argument("--split", type=str, default="val" if command == "evaluate" else "train", help="split")
    parser.add_argument("--device", type=str, default=None, help="cpu, cuda, ...; default: a GPU where there is one")
    return parser


def _parsed(parser: Any, argv: Sequence[str], checkpoints: str) -> tuple[Any, Any]:
    """The arguments and the data module: of ``--data``, else of ``--config``, else of the checkpoint's run."""
    import yaml

    given = parser.parse_args(argv)
    if given.data is None:
        first = given[checkpoints][0] if isinstance(given[checkpoints], list) else given[checkpoints]
        path = Path(given.config) if given.config else Path(first).parent.parent / CONFIG
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no configuration {path}; name one with --config, or the data with --data"
            )
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or "data" not in content:
            raise ValueError(f"{path} has no data section")
        given = parser.parse_object({"data": content["data"]}, cfg_base=given)
    return given, parser.instantiate_classes(given).data


def _device(name: str | None) -> Any:
    import torch

    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _thresholds(argv: Sequence[str]) -> None:
    from adv_classify import thresholds as standard
    from common.thresholds import DEFAULT_RULE, std_factor

    parser = _parser("thresholds", "Thresholds for AMAT from a trained standard classifier.")
    parser.add_argument("checkpoint", type=str, help="a checkpoint of adv-classify, of a standard training")
    parser.add_argument("--rule", type=str, default=DEFAULT_RULE, help="mean or mean+2std")
    parser.add_argument("--out", type=str, default=None, help="the file; default: beside the checkpoint")
    given, data = _parsed(parser, argv, "checkpoint")
    std_factor(given.rule)
    measured = standard.measure(
        given.checkpoint, data, rule=given.rule, device=_device(given.device), split=given.split
    )
    path = Path(given.out or Path(given.checkpoint).with_name(standard.FILE))
    measured.save(path)
    print(f"{measured.n} clean images of the split {given.split}: {measured}\nWritten to {path}")


def _evaluate(argv: Sequence[str]) -> None:
    from adv_classify import evaluate as host
    from common.evaluation import evaluate_with_bar
    from common.metrics import check_levels
    from common.report import Entry, format_table, tabulate, write_report
    from common.thresholds import sha256

    parser = _parser("evaluate", "Trained classifiers under attack, in one report for each norm.")
    parser.add_argument("checkpoints", type=str, nargs="+", help="checkpoints of adv-classify")
    parser.add_argument("--names", type=list[str], default=None, help="names of the models; default: their folders")
    parser.add_argument("--norm", type=list[float | str], default=[2, "inf"], help="2, inf, or both")
    parser.add_argument("--levels", type=list[float], default=None, help="L2 levels; default: by the images' size")
    parser.add_argument("--levels_inf", type=list[float], default=None, help="Linf levels; default: 0, 2, 4, 8 / 255")
    parser.add_argument(
        "--attacks", type=list[str], default=["pgd100", "ifgsm10"], help="pgd100, pgd20x3, ifgsm10, autoattack, ..."
    )
    parser.add_argument("--samples", type=int, default=None, help="number of images; default: all")
    parser.add_argument("--gradcam", type=bool, default=True, help="compare Grad-CAM of clean and attacked images")
    parser.add_argument("--examples", type=int, default=3, help="images shown")
    parser.add_argument("--seed", type=int, default=0, help="of the random starts")
    parser.add_argument("--out", type=str, default="report", help="folder of the reports")
    parser.add_argument("--overwrite", type=bool, default=False, help="forget what an earlier run has measured")
    given, data = _parsed(parser, argv, "checkpoints")
    names = given.names or [run_name(path) for path in given.checkpoints]
    if len(names) != len(given.checkpoints) or len(set(names)) != len(names):
        raise ValueError(
            f"{len(given.checkpoints)} checkpoints need {len(given.checkpoints)} different names, got {names}; set "
            f"them with --names"
        )
    norms = {name: _norm(name) for name in given.norm}
    attacks = {name: host.parse(given.attacks, norm) for name, norm in norms.items()}
    values = data.dataset(given.split)[0]["image"].numel()
    levels = {name: list(check_levels(_levels(given, norm, values))) for name, norm in norms.items()}
    models = [
        host.load_model(name, path, data, given.split, _device(given.device), gradcam=given.gradcam)
        for name, path in zip(names, given.checkpoints, strict=True)
    ]
    for name, norm in norms.items():
        kind = "Linf" if norm == float("inf") else "L2"
        folder = Path(given.out) / kind
        entries = []
        for model in models:
            measured = evaluate_with_bar(
                model.name,
                host.make_batches(model, given.samples),
                attacks[name],
                levels[name],
                folder=folder,
                overwrite=given.overwrite,
                bounds=host.BOUNDS,
                seed=given.seed,
                fingerprint=json.dumps({"checkpoint": sha256(model.path), "split": given.split, "cam": given.gradcam}),
            )
            entries.append(Entry(model.name, measured, model.margins))
        strongest = next(iter(attacks[name]))
        page = write_report(
            folder,
            entries,
            host.metrics(given.gradcam),
            title=f"Robustness of {', '.join(names)} in {kind}",
            level_unit=f"{kind} norm of the noise over the image in [0, 1] ({values} values)",
            examples=host.make_examples(
                models,
                data.class_names,
                (strongest, attacks[name][strongest]),
                levels[name][1:],
                number=given.examples,
                seed=given.seed,
            ),
            settings={
                "data": type(data).__name__,
                "split": f"{given.split}, {len(entries[0].evaluation.ids)} images",
                "checkpoints": {model.name: "/".join(model.path.parts[-4:]) for model in models},
            },
            overwrite=given.overwrite,
        )
        for table in tabulate(entries, host.metrics(given.gradcam)):
            print(f"\n{format_table(table)}")
        print(f"\nReport: {page}")


def _norm(name: float | str) -> float:
    from common.norms import check_norm

    try:
        return check_norm(float(name))
    except ValueError as error:
        raise ValueError(f"norm must be 2 or inf, got {name!r}") from error


def _levels(given: Any, norm: float, values: int) -> list[float]:
    """Levels as given, or the same noise in every value whatever the norm: 0, 2, 4 and 8 / 255."""
    chosen = given.levels_inf if norm == float("inf") else given.levels
    if chosen is not None:
        return list(chosen)
    scale = 1.0 if norm == float("inf") else values**0.5
    return [round(level / 255 * scale, 4 if scale > 1 else 8) for level in (0, 2, 4, 8)]


def run_name(path: str) -> str:
    """The run's folder for ``RUN/checkpoints/best.ckpt``, or of ``RUN/lightning_logs/version_0/checkpoints/...``."""
    folders = [part for part in Path(path).parts[:-1] if part not in ("checkpoints", "lightning_logs")]
    named = [part for part in folders if not part.startswith("version_")]
    return named[-1] if named and named[-1] != "/" else Path(path).stem


if __name__ == "__main__":
    sys.exit(main())

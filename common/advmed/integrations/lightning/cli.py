"""The command of a Lightning host: LightningCLI's ``fit|validate|test|predict``, and ``thresholds`` and ``evaluate``.

A host says what is particular to it in a subclass of :class:`Tool`, and imports its packages where they are needed, so
that a mistyped command is answered at once.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch

    from advmed.attacks import Attack
    from advmed.evaluation.subjects import Subject
    from advmed.integrations.lightning import RobustModule, SampleData
    from advmed.report import Example, Metric
    from advmed.thresholds import Thresholds

OWN = ("thresholds", "evaluate")
CONFIG = "config.yaml"
"""What LightningCLI leaves in a run's folder."""


@dataclass(frozen=True)
class Study:
    """What a host brings to an evaluation.

    Attributes:
        subjects: the models, and what each of them is evaluated on.
        metrics: the metrics, the most important first.
        examples: makes the pictures: (attack with its name, levels above 0, ids, ``seed=``).
        bounds: lowest and highest value of an input.
        input: what a noise level is the norm over, completing "L2 norm of the noise over ...".
        settings: what a reader of the report should know.
        fingerprint: what the numbers depend on beside checkpoint and split.
        class_names: for the legend of the pictures.
    """

    subjects: Sequence[Subject]
    metrics: Sequence[Metric]
    examples: Callable[..., Sequence[Example]]
    bounds: tuple[float, float]
    input: str
    settings: Mapping[str, Any]
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    class_names: Mapping[int, str] = field(default_factory=dict)


class Tool(ABC):
    """The command of a host; :meth:`main` runs it."""

    name: ClassVar[str]
    """Of the command."""
    monitor: ClassVar[tuple[str, str]]
    """The validation metric that the best checkpoint is chosen by, and "max" or "min"."""
    links: ClassVar[tuple[str, ...]]
    """Arguments of the module that the data knows."""
    norms: ClassVar[tuple[float | str, ...]]
    """The norms that are evaluated where the user names none."""

    # What a host gives

    @abstractmethod
    def classes(self) -> tuple[type[RobustModule], type[SampleData]]:
        """The module and the data module (subclasses of the latter can be chosen)."""

    @abstractmethod
    def write_predictions(self, folder: Path, batches: Sequence[Any], model: Any, data: Any) -> Path:
        """Writes what ``predict`` found into the run's folder; returns the file to be named."""

    @abstractmethod
    def measure(self, path: str, data: Any, *, rule: str, device: torch.device, split: str) -> Thresholds:
        """Thresholds of a trained standard model."""

    @property
    @abstractmethod
    def rule(self) -> str:
        """The rule that thresholds are made by where the user names none."""

    @abstractmethod
    def default_levels(self, norm: float, data: Any, split: str) -> list[float]:
        """Noise levels where the user names none, 0 first."""

    def parse_attacks(self, names: Sequence[str], norm: float) -> Mapping[str, Attack]:
        """Attacks by their names.

        Raises:
            ValueError: for a name that is none.
        """
        from advmed.attacks.names import parse_attacks

        return parse_attacks(names, norm=norm)

    def add_evaluate_arguments(self, parser: Any) -> None:  # noqa: B027 - most hosts have none
        """Adds arguments that only this host's evaluation has."""

    @abstractmethod
    def study(self, given: Any, names: Sequence[str], data: Any, device: torch.device) -> Study:
        """Loads the checkpoints of an evaluation."""

    # The command

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Runs the command; prints one clear line for a mistake of the user, and returns the exit status."""
        argv = list(sys.argv[1:] if arguments is None else arguments)
        debug = "--debug" in argv
        argv = [argument for argument in argv if argument != "--debug"]
        try:
            if argv and argv[0] in OWN:
                (self._thresholds if argv[0] == "thresholds" else self._evaluate)(argv[1:])
            else:
                self._lightning(argv)
        except Exception as error:
            if debug or not isinstance(error, _mistakes()):
                raise
            print(f"{self.name}: {_message(error)}", file=sys.stderr)
            return 1
        return 0

    def _lightning(self, argv: list[str]) -> None:
        from advmed.distributed import gathered
        from lightning.pytorch.callbacks import ModelCheckpoint
        from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

        tool = self

        class Command(LightningCLI):
            def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
                parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
                metric, mode = tool.monitor
                parser.set_defaults(
                    {"checkpoint.monitor": metric, "checkpoint.mode": mode, "checkpoint.filename": "best"}
                )
                # The attack of validation_steps needs gradients, which inference mode forbids.
                parser.set_defaults({"trainer.inference_mode": False})
                for name in tool.links:
                    parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")

            def after_instantiate_classes(self) -> None:
                # The option save_last of a callback that monitors writes a file only when there is a new best.
                trainer: Any = self.trainer
                if trainer.checkpoint_callbacks:
                    folder = trainer.checkpoint_callbacks[0].dirpath
                    last = ModelCheckpoint(
                        folder, filename="last", save_on_train_epoch_end=True, enable_version_counter=False
                    )
                    trainer.callbacks.append(last)

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
                folder = Path(self.trainer.log_dir or ".")
                if self.trainer.is_global_zero:
                    folder.mkdir(parents=True, exist_ok=True)
                    print(f"Predictions: {tool.write_predictions(folder, found, model, datamodule)}")

        module, data = self.classes()
        quiet = {"exit_on_error": False}  # mistakes are for main to report, without a page of usage
        Command(
            module,
            data,
            subclass_mode_data=True,
            args=None if argv == sys.argv[1:] else argv,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"prog": self.name, **quiet, **dict.fromkeys(LightningCLI.subcommands(), quiet)},
        )

    # Thresholds and evaluation

    def _parser(self, command: str, description: str) -> Any:
        from jsonargparse import ArgumentParser

        parser = ArgumentParser(prog=f"{self.name} {command}", description=description, exit_on_error=False)
        parser.add_argument("--config", type=str, default=None, help="a configuration whose data section is used")
        parser.add_subclass_arguments(
            self.classes()[1], "data", required=False, help="the data; default: that of the (first) checkpoint's run"
        )
        parser.add_argument("--split", type=str, default="val" if command == "evaluate" else "train", help="split")
        parser.add_argument("--device", type=str, default=None, help="cpu, cuda, ...; default: a GPU if there is one")
        return parser

    def _parsed(self, parser: Any, argv: Sequence[str], checkpoints: str) -> tuple[Any, Any]:
        """The arguments and the data module: of ``--data``, else of ``--config``, else of the checkpoint's run.

        ``--data.NAME`` alone changes what the configuration says.
        """
        import yaml

        words, about_data = _split(argv)
        given = parser.parse_args(words)
        paths = given[checkpoints] if isinstance(given[checkpoints], list) else [given[checkpoints]]
        for path in paths:
            if not Path(path).is_file():
                raise FileNotFoundError(f"there is no checkpoint {path}")
        if not any(word.partition("=")[0] in ("--data", "--data.class_path") for word in about_data):
            path = Path(given.config) if given.config else Path(paths[0]).parent.parent / CONFIG
            if not path.is_file():
                raise FileNotFoundError(
                    f"there is no configuration {path}; name one with --config, or the data with --data"
                )
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or "data" not in content:
                raise ValueError(f"{path} has no data section")
            parser.set_defaults({"data": content["data"]})
        given = parser.parse_args(argv)
        # jsonargparse 4.49 has renamed it, and 5 will have the new name only.
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
        return given, instantiate(given).data

    def _thresholds(self, argv: Sequence[str]) -> None:
        from advmed.integrations.lightning.calibration import FILE
        from advmed.thresholds import std_factor

        parser = self._parser("thresholds", "Thresholds for AMAT from a trained standard model.")
        parser.add_argument("checkpoint", type=str, help=f"a checkpoint of {self.name}, of a standard training")
        parser.add_argument("--rule", type=str, default=self.rule, help="mean or mean+2std")
        parser.add_argument("--out", type=str, default=None, help="the file; default: beside the checkpoint")
        given, data = self._parsed(parser, argv, "checkpoint")
        std_factor(given.rule)
        measured = self.measure(
            given.checkpoint, data, rule=given.rule, device=_device(given.device), split=given.split
        )
        path = Path(given.out or Path(given.checkpoint).with_name(FILE))
        measured.save(path)
        print(f"{measured.n} clean images of the split {given.split}: {measured}\nWritten to {path}")

    def _evaluate(self, argv: Sequence[str]) -> None:
        from functools import partial

        from advmed.evaluation.auc import check_levels
        from advmed.evaluation.subjects import check_numbers, compare

        parser = self._parser("evaluate", "Trained models under attack, in one report for each norm.")
        parser.add_argument("checkpoints", type=str, nargs="+", help=f"checkpoints of {self.name}")
        parser.add_argument("--names", type=list[str], default=None, help="names of the models; default: their folders")
        parser.add_argument("--norm", type=list[float | str], default=list(self.norms), help="2, inf, or both")
        parser.add_argument("--levels", type=list[float], default=None, help="L2 levels; default: by the images' size")
        parser.add_argument("--levels_inf", type=list[float], default=None, help="Linf levels; default: fixed ones")
        parser.add_argument(
            "--attacks",
            type=list[str],
            default=["pgd100", "ifgsm10"],
            help="the strongest first: pgd100, pgd20x3, apgd100, square1000, ...",
        )
        parser.add_argument("--samples", type=int, default=None, help="number of images; default: all")
        parser.add_argument("--examples", type=int, default=4, help="images shown: those that fail first and last")
        parser.add_argument(
            "--checks", type=int, default=32, help="number of images that the attack itself is checked on; 0: none"
        )
        parser.add_argument("--seed", type=int, default=0, help="of the random starts")
        parser.add_argument("--out", type=str, default="report", help="folder of the reports")
        parser.add_argument("--overwrite", type=bool, default=False, help="forget what an earlier run has measured")
        self.add_evaluate_arguments(parser)
        given, data = self._parsed(parser, argv, "checkpoints")
        names = given.names or [run_name(path) for path in given.checkpoints]
        if len(names) != len(given.checkpoints) or len(set(names)) != len(names):
            raise ValueError(
                f"{len(given.checkpoints)} checkpoints need {len(given.checkpoints)} different names, got {names}; set "
                f"them with --names"
            )
        check_numbers(samples=given.samples, examples=given.examples, checks=given.checks)
        norms = {name: _norm(name) for name in given.norm}
        attacks = {name: self.parse_attacks(given.attacks, norm) for name, norm in norms.items()}
        levels = {}
        for name, norm in norms.items():
            chosen = given.levels_inf if norm == float("inf") else given.levels
            levels[name] = check_levels(self.default_levels(norm, data, given.split) if chosen is None else chosen)
        study = self.study(given, names, data, _device(given.device))
        images = sum(len(batch.ids) for batch in study.subjects[0].batches)
        for name, norm in norms.items():
            kind = "Linf" if norm == float("inf") else "L2"
            compare(
                Path(given.out) / kind,
                study.subjects,
                attacks[name],
                levels[name],
                study.metrics,
                examples=partial(study.examples, seed=given.seed),
                shown=given.examples,
                checks=given.checks,
                fingerprint={"split": given.split, "truth": data.fingerprint(given.split), **study.fingerprint},
                bounds=study.bounds,
                seed=given.seed,
                overwrite=given.overwrite,
                title=f"Robustness of {', '.join(names)} in {kind}",
                level_unit=f"{kind} norm of the noise over {study.input}",
                class_names=study.class_names,
                settings={
                    "data": type(data).__name__,
                    "split": f"{given.split}, {images} images",
                    **study.settings,
                    "checkpoints": {s.name: "/".join(s.checkpoint.parts[-4:]) for s in study.subjects},
                },
            )


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of a command line without those of ``--data`` and ``--data.NAME``, and those."""
    words: tuple[list[str], list[str]] = ([], [])
    value = False
    for word in argv:
        option = word.partition("=")[0]
        about_data = option == "--data" or option.startswith("--data.")
        words[about_data or (value and not word.startswith("--"))].append(word)
        value = about_data and "=" not in word
    return words


def run_name(path: str) -> str:
    """The run's folder for ``RUN/checkpoints/best.ckpt``, or of ``RUN/lightning_logs/version_0/checkpoints/...``."""
    folders = [part for part in Path(path).parts[:-1] if part not in ("checkpoints", "lightning_logs")]
    named = [part for part in folders if not part.startswith("version_")]
    return named[-1] if named and named[-1] != "/" else Path(path).stem


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


def _device(name: str | None) -> Any:
    import torch

    from advmed.distributed import device_of_rank

    return torch.device(device_of_rank(name or ("cuda" if torch.cuda.is_available() else "cpu")))


def _norm(name: float | str) -> float:
    from advmed.norms import check_norm

    try:
        return check_norm(float(name))
    except ValueError as error:
        raise ValueError(f"norm must be 2 or inf, got {name!r}") from error

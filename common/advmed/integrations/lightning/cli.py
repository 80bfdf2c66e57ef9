"""The command of a Lightning host: LightningCLI's ``fit|validate|test|predict``, and ``init|thresholds|evaluate``.

A host says what is particular to it in a subclass of :class:`LightningCommand`, and imports its packages where they are
needed, so that a request for help and a mistyped command are answered at once.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, cast

from advmed.cli import init, options, runner
from advmed.cli.completion import add_completion, asks_for_completion
from advmed.documentation import page

if TYPE_CHECKING:
    from advmed.integrations.lightning import RobustModule, SampleData
    from advmed.integrations.lightning.evaluation import LightningEvaluation

OWN = {
    "thresholds": "Thresholds for AMAT from a trained standard model.",
    "evaluate": "Trained models under attack, in one report for each norm.",
}
INIT = "init"
LIGHTNING = {
    "fit": "train",
    "validate": "measure a checkpoint on the validation split",
    "test": "measure a checkpoint on the test split",
    "predict": "write what a checkpoint predicts",
}
BEST = "best"
"""Name of the checkpoint of the best epoch."""
AUTO = "auto"
"""The mode that fits the monitor."""
EACH = "{epoch}"
"""Name of those of the best epochs, where several are kept."""
CONFIG = "config.yaml"
"""What LightningCLI leaves in a run's folder."""


class LightningCommand(ABC):
    """The command of a host; :meth:`main` runs it."""

    name: ClassVar[str]
    """Of the command."""
    extra: ClassVar[str]
    """The extra of advmed that installs what it needs; also the name of the host's page in the documentation."""
    description: ClassVar[str]
    """One line for the help."""
    example: ClassVar[str]
    """A data section on the command line, for the help."""
    monitor: ClassVar[tuple[str, str]]
    """The validation metric that the best checkpoint of a standard training is chosen by, and "max" or "min"."""
    links: ClassVar[tuple[str, ...]]
    """Arguments of the module that the data knows."""
    norms: ClassVar[tuple[float | str, ...]]
    """The norms that are evaluated where the user names none."""
    evaluate_options: ClassVar[tuple[options.Option, ...]] = ()
    """Options that only this host's evaluation has."""

    # What a host gives

    @abstractmethod
    def classes(self) -> tuple[type[RobustModule], type[SampleData]]:
        """The module and the data module (subclasses of the latter can be chosen)."""

    @abstractmethod
    def write_predictions(self, folder: Path, batches: Sequence[Any], model: Any, data: Any) -> Path:
        """Writes what ``predict`` found into the run's folder; returns the file to be named."""

    @property
    @abstractmethod
    def rule(self) -> str:
        """The rule that thresholds are made by where the user names none."""

    @abstractmethod
    def evaluation(self) -> type[LightningEvaluation]:
        """What the host's models are evaluated by."""

    def mode_of(self, monitor: str) -> str:
        """Whether the best checkpoint is that with the largest or the smallest value.

        Raises:
            ValueError: for a value of which that is not known.
        """
        ours = {self.monitor[0]: self.monitor[1], "epoch": "max", "step": "max"}
        mode = self.classes()[0].mode_of(monitor) or ours.get(monitor)
        if mode is None:
            raise ValueError(f"whether {monitor} is better when larger or smaller is not known: set checkpoint.mode")
        return mode

    # The command

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Runs the command, see :func:`advmed.cli.runner.run`."""
        return runner.run(self.name, self._dispatch, arguments, extra=self.extra)

    def _dispatch(self, argv: list[str]) -> None:
        help_wanted = "--help" in argv or "-h" in argv
        if asks_for_completion(argv):
            self._completion().parse_args(argv)
        elif argv and argv[0] in OWN:
            if help_wanted:
                self._parser(argv[0], full=False).print_help()
            else:
                (self._thresholds if argv[0] == "thresholds" else self._evaluate)(argv[1:])
        elif argv and argv[0] == INIT:
            init.main(self.name, self.name.replace("-", "_"), argv[1:], page=self._page)
        elif help_wanted:
            print(self._help(argv[0] if argv[0] in LIGHTNING else None))
        else:
            if "--help-all" in argv:
                argv = ["--help" if word == "--help-all" else word for word in argv]
                sys.argv[1:] = argv  # LightningCLI warns where it is given others
            try:
                self._lightning(argv)
            except argparse.ArgumentError as error:
                if not (told := self._told(runner.message(error), *argv[:1])):
                    raise
                raise argparse.ArgumentError(None, told) from error

    def _told(self, text: str, subcommand: str = "") -> str:
        """What to do about a mistake of which jsonargparse says only that it is one; nothing for all others."""
        if section := re.match(r"""Parser key "(model\.\w+)":\s+Unable to load config ['"](.*)['"]""", text):
            key, value = section.groups()
            first = "steps" if key == "model.attack" else "name"
            return f"--{key} takes a YAML file, and there is no file {value}; single settings: --{key}.{first} {value}"
        if option := re.match(r"""Parser key "data": Problem with given class_path '(.+)':\s+(Option .+)$""", text):
            kind, wrong = option.groups()
            return f"{wrong} by {kind}: {self.name} {subcommand} --data.help {kind} lists what is"
        return ""

    @property
    def _page(self) -> str:
        """Of the documentation."""
        return f"{self.extra}.md"

    def _help(self, subcommand: str | None) -> str:
        """A short help: to list every option of Lightning's takes the import of all of Lightning."""
        told = self._page
        if subcommand is None:
            names = {INIT: init.LINE, **LIGHTNING, **{name: text[0].lower() + text[1:-1] for name, text in OWN.items()}}
            lines = [
                f"usage: {self.name} {{{','.join(names)}}} ...",
                "",
                self.description,
                "",
                *(f"  {name:<12}{text}" for name, text in names.items()),
                "",
                f"{', '.join(LIGHTNING)} are LightningCLI's. {self.name} NAME --help says more of each.",
            ]
        else:
            checkpoint = "" if subcommand == "fit" else " --ckpt_path CHECKPOINT"
            seed = (
                ["  --seed_everything   seed of weights and augmentation (default: 0)"] if subcommand == "fit" else []
            )
            resume = "go on with the training of this checkpoint" if subcommand == "fit" else "the checkpoint; required"
            lines = [
                f"usage: {self.name} {subcommand} [--config FILE]{checkpoint} [--SECTION.NAME VALUE ...]",
                "",
                f"{LIGHTNING[subcommand].capitalize()}. Every value of a configuration can be given as an option, too.",
                "",
                "  --config FILE       a YAML file of the sections below; one that a run left is one",
                "  --data CLASS        the data, and --data.NAME its arguments: " + told,
                f"  --ckpt_path FILE    {resume}",
                "  --model.network     the network",
                f"  --model.method      the training method and its sizes: {told}",
                f"  --model.attack      the attack of the training: {told}",
                *seed,
                "  --trainer           epochs, devices, precision, loggers, ...: Lightning's Trainer",
                "  --print_config      print the whole configuration with its defaults, and do nothing",
                "  --help-all          print every option, as Lightning does (takes some seconds)",
                "",
                "examples:",
                f"  {self.name} {subcommand} --config config.yaml{checkpoint}",
                f"  {self.name} {subcommand} {self.example}{checkpoint}"
                + (" --model.method.name AMAT --trainer.max_epochs 50" if subcommand == "fit" else ""),
            ]
        return "\n".join([*lines, f"{told}, of the documentation: {page(told)}", runner.DEBUG])

    def _completion(self) -> argparse.ArgumentParser:
        """A parser of argparse's with the names of all subcommands and options, for the shell.

        jsonargparse has a completion of its own, which writes out every class that could be the value of an option: of
        these commands it makes a file of 224 MB, which no shell reads in time, and without our subcommands.
        """
        from jsonargparse import ArgumentParser
        from lightning.pytorch import Trainer

        from advmed.integrations.lightning.callbacks import BestCheckpoint

        module, data = self.classes()
        known = ArgumentParser()
        for name in ("config", "ckpt_path", "seed_everything", "data", "print_config", "help-all"):
            known.add_argument(f"--{name}", nargs="?" if name in ("print_config", "help-all") else None)
        for kind in (data, *data.__subclasses__()):
            for name, about in inspect.signature(kind).parameters.items():
                if about.kind is not about.VAR_KEYWORD and f"--data.{name}" not in known._option_string_actions:
                    known.add_argument(f"--data.{name}")
        known.add_class_arguments(module, "model")
        known.add_class_arguments(Trainer, "trainer")
        known.add_class_arguments(BestCheckpoint, "checkpoint")
        parser = argparse.ArgumentParser(self.name)
        add_completion(parser)
        commands = parser.add_subparsers(dest="command")
        init.add_arguments(commands.add_parser(INIT, help=init.LINE))
        for name, text in {**LIGHTNING, **OWN}.items():
            command = commands.add_parser(name, help=text)
            for action in (known if name in LIGHTNING else self._parser(name, full=False))._actions:
                names = [word for word in action.option_strings if word.startswith("--") and not word.endswith("+")]
                if names and "--help" not in names:
                    command.add_argument(*names, choices=action.choices, nargs=action.nargs)
        return parser

    def _lightning(self, argv: list[str]) -> None:
        from lightning.pytorch.callbacks import ModelCheckpoint
        from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

        from advmed.distributed import gathered
        from advmed.files import check_whole
        from advmed.integrations.lightning.callbacks import BestCheckpoint, waiting
        from advmed.integrations.lightning.module import ROBUST, folder_of, is_adversarial, validation_steps_of

        host = self

        class Configuration(SaveConfigCallback):
            """Leaves the configuration in the run's folder, and lets a file be that is the user's."""

            def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
                if self.already_saved:
                    return
                path = Path(folder_of(trainer) or ".", CONFIG)
                read = [Path(str(given)) for given in self.config.get("config") or ()]
                there, strange = trainer.strategy.broadcast((path.is_file(), _is_the_users(path, read)))
                if strange and stage == "fit":
                    raise ValueError(
                        f"the training would write its configuration over {path}, which is yours: give the run a "
                        f"folder of its own with trainer.default_root_dir"
                    )
                if there and stage != "fit":
                    return
                place = {"log_dir": str(path.parent), "is_global_zero": trainer.is_global_zero}
                super().setup(cast(Any, SimpleNamespace(**place, strategy=trainer.strategy)), pl_module, stage)

        class Command(LightningCLI):
            def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
                parser.add_lightning_class_args(BestCheckpoint, "checkpoint")
                # Without a monitor, one is chosen by the method, see below.
                parser.set_defaults({"checkpoint.mode": AUTO, "checkpoint.filename": BEST})
                # The attack of validation_steps needs gradients, which inference mode forbids.
                parser.set_defaults({"trainer.inference_mode": False})
                for name in host.links:
                    parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")

            def before_instantiate_classes(self) -> None:
                given = self.config[self.config.subcommand]
                self.as_given = {name: given.checkpoint[name] for name in ("monitor", "mode", "filename")}
                if given.checkpoint.monitor is None:
                    method, steps = given.model.method.name, given.model.validation_steps
                    robust = is_adversarial(method) and validation_steps_of(method, steps) > 0
                    metric = host.monitor[0]
                    given.checkpoint.monitor = metric.replace("val/", ROBUST) if robust else metric
                if given.checkpoint.mode == AUTO:
                    given.checkpoint.mode = host.mode_of(given.checkpoint.monitor)
                self.best = None
                if given.checkpoint.filename in (BEST, EACH) and given.checkpoint.save_top_k not in (0, 1):
                    # Of several, best.ckpt would be the first that was kept: they have their epochs for names.
                    self.best = BestCheckpoint(
                        given.checkpoint.dirpath, BEST, given.checkpoint.monitor, mode=given.checkpoint.mode
                    )
                    given.checkpoint.filename = EACH

            def instantiate_classes(self) -> None:
                super().instantiate_classes()
                # The settings of a trained network are those of its checkpoint, which only the Trainer can find.
                given = self.config[self.config.subcommand]
                if (word := given.get("ckpt_path")) in ("best", "last"):
                    given.ckpt_path = newest(self.trainer, word)
                    self._parse_ckpt_path()
                    super().instantiate_classes()

            def after_instantiate_classes(self) -> None:
                # What is saved is the user's choice: with another method, a resolved one would be that of this method.
                for name, value in self.as_given.items():
                    self.config[self.config.subcommand].checkpoint[name] = value
                # The option save_last of a callback that monitors writes a file only when there is a new best.
                trainer: Any = self.trainer
                trainer.callbacks[:] = [waiting(callback) for callback in trainer.callbacks]
                if self.best is not None:
                    trainer.callbacks.append(self.best)
                if trainer.checkpoint_callbacks:
                    folder = trainer.checkpoint_callbacks[0].dirpath
                    last = ModelCheckpoint(
                        folder, filename="last", save_on_train_epoch_end=True, enable_version_counter=False
                    )
                    trainer.callbacks.append(last)
                # Behind the checkpoints, whose folder is known when they are set up.
                trainer.callbacks.sort(key=lambda callback: isinstance(callback, Configuration))

            def _parse_ckpt_path(self) -> None:
                # Of a checkpoint that is resumed, Lightning would put the settings in the place of the user's.
                if (subcommand := self.config.get("subcommand")) == "fit" or not subcommand:
                    return
                wanted = dict(self.config[subcommand].model.items())
                super()._parse_ckpt_path()
                model = self.config[subcommand].model
                for name in (name for name in wanted if _is_given(name, argv) and wanted[name] != model.get(name)):
                    if name == "validation_steps" or name.startswith(("method.", "attack.")):
                        model[name] = wanted[name]
                    elif name != "network.weights":  # which those of the checkpoint replace
                        raise ValueError(
                            f"--model.{name} is {wanted[name]}, and the checkpoint was trained with {model.get(name)}: "
                            f"leave it out. Of a trained network, {subcommand} can change validation_steps, method "
                            f"and attack"
                        )

            def _run_subcommand(self, subcommand: str) -> None:
                if subcommand != "fit" and not self._get(self.config, "ckpt_path"):
                    raise ValueError(f"{subcommand} needs a trained network: name its checkpoint with --ckpt_path")
                if Path(path := str(self._get(self.config, "ckpt_path") or "")).is_file():
                    check_whole(path)
                super()._run_subcommand(subcommand)

            def predict(self, model: Any, datamodule: Any, **how: Any) -> None:
                found = self.trainer.predict(model, datamodule, **how) or []
                if self.trainer.world_size > 1:  # every process has predicted a part
                    found = [batch for part in gathered(found) for batch in part]
                folder = Path(folder_of(self.trainer) or ".")
                if self.trainer.is_global_zero:
                    folder.mkdir(parents=True, exist_ok=True)
                    print(f"Predictions: {host.write_predictions(folder, found, model, datamodule)}")

        module, data = self.classes()
        quiet = {"exit_on_error": False}  # mistakes are for run to report, without a page of usage
        Command(
            module,
            data,
            subclass_mode_data=True,
            args=None if argv == sys.argv[1:] else argv,
            seed_everything_default=0,
            save_config_callback=Configuration,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"prog": self.name, **quiet, **dict.fromkeys(LightningCLI.subcommands(), quiet)},
        )

    # Thresholds and evaluation

    def _parser(self, command: str, *, full: bool) -> Any:
        """The parser of a command of ours; for a help text, without what only the data classes know."""
        from jsonargparse import ArgumentParser

        about_data = "the data; default: that of the (first) checkpoint's run"
        parser = ArgumentParser(
            prog=f"{self.name} {command}", description=OWN[command], epilog=runner.DEBUG, exit_on_error=False
        )
        parser.add_argument("--config", type=str, default=None, help="a configuration whose data section is used")
        if full:
            parser.add_subclass_arguments(self.classes()[1], "data", required=False, help=about_data)
        else:
            parser.add_argument(
                "--data",
                metavar="CLASS",
                help=f"{about_data}. --data.NAME are its arguments, --data.help CLASS says which",
            )
        parser.add_argument("--split", type=str, default="val" if command == "evaluate" else "train", help="split")
        parser.add_argument("--device", type=str, default=None, help="cpu, cuda, ...; default: a GPU if there is one")
        if command == "thresholds":
            parser.add_argument("checkpoint", type=str, help=f"a checkpoint of {self.name}, of a standard training")
            options.add_typed_options(parser, options.THRESHOLDS)
        else:
            parser.add_argument("checkpoints", type=str, nargs="+", help=f"checkpoints of {self.name}")
            table = options.with_defaults(options.EVALUATE, norm=list(self.norms))
            options.add_typed_options(parser, (*table, *self.evaluate_options))
        return parser

    def _parsed(self, command: str, argv: Sequence[str]) -> tuple[Any, list[str], Any]:
        """The arguments, the checkpoints, and the data module: of ``--data``, ``--config``, or the checkpoint's run.

        ``--data.NAME`` alone changes what the configuration says.
        """
        import yaml

        parser = self._parser(command, full=True)
        words, about_data = _split(argv)
        given = parser.parse_args(words)
        paths = given.checkpoints if command == "evaluate" else [given.checkpoint]
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
        return given, paths, instantiate(given).data

    def _thresholds(self, argv: Sequence[str]) -> None:
        from advmed.cli.thresholds import ThresholdsOptions, write_thresholds
        from advmed.integrations.lightning.calibration import FILE, measure, quality

        given, (checkpoint,), data = self._parsed("thresholds", argv)
        chosen = ThresholdsOptions.of(given)
        path = chosen.destination(Path(checkpoint).with_name(FILE))
        standard, rule = self.classes()[0].standard(checkpoint, data), chosen.rule or self.rule
        measured = measure(standard, checkpoint, data, rule=rule, device=_device(given.device), split=given.split)
        how = f"{measured.notes['measured']}; {quality(measured)}"
        write_thresholds(measured, path, of=f"draws from the split {given.split} ({how})")

    def _evaluate(self, argv: Sequence[str]) -> None:
        from advmed.cli.evaluate import EvaluationOptions, evaluate_models

        given, paths, data = self._parsed("evaluate", argv)
        names = [run_name(path) for path in paths]
        chosen = EvaluationOptions.of(given, names, models="checkpoints", option="--names")
        models = dict(zip(chosen.names, map(Path, paths), strict=True))
        evaluate_models(self.evaluation()(given, models, data, _device(given.device)), chosen)


def newest(trainer: Any, word: str) -> str:
    """The checkpoint that Lightning means by ``last``: the one last written, of those in the folder of this run.

    Raises:
        FileNotFoundError: if there is none, as in a run's new folder; for ``best``, which no run knows at its start.
    """
    found: list[str] = []
    for callback in trainer.checkpoint_callbacks:
        found += callback._find_last_checkpoints(trainer)
    if word == "last" and found:
        return max(found, key=lambda path: Path(path).stat().st_mtime)
    others = sorted(Path(trainer.default_root_dir).rglob(f"{word}.ckpt"), key=lambda path: path.stat().st_mtime)
    hint = f", such as {others[-1]}" if others else ""
    raise FileNotFoundError(f"--ckpt_path {word} finds no checkpoint in the folder of this run: name the file{hint}")


def _is_the_users(path: Path, read: Sequence[Path]) -> bool:
    """Whether a file is none that a run of Lightning has left, or one that this run is told to read."""
    if not path.is_file():
        return False
    left = path.read_text(encoding="utf-8", errors="replace").startswith("# lightning.pytorch")
    return not left or any(given.exists() and given.samefile(path) for given in read)


def _is_given(name: str, argv: Sequence[str]) -> bool:
    """Whether an argument of the module is an option of a command line, alone or within its section."""
    options = {word.partition("=")[0] for word in argv if word.startswith("--model")}
    return any(f"--model.{name}.".startswith(f"{option}.") for option in options)


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


def _device(name: str | None) -> Any:
    import torch

    from advmed.distributed import device_of_rank

    return torch.device(device_of_rank(name or ("cuda" if torch.cuda.is_available() else "cpu")))

"""Writes docs/commands.md and docs/settings.md, from the parsers of the commands and the docstrings of the settings.

``python docs/_site/reference.py`` in an environment with all hosts (``make env``) writes them anew; a test compares.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from docstring_parser import DocstringStyle, parse

DOCS = Path(__file__).resolve().parents[1]
FIRST = "<!-- Written by docs/_site/reference.py; change the parsers or the docstrings, and run it again. -->\n\n"


def main() -> None:
    """Writes the pages."""
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """The pages by the names of their files."""
    return {"commands.md": FIRST + "\n".join(_commands()), "settings.md": FIRST + "\n".join(_settings())}


# Markdown


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |"
    yield ""


def _plain(text: str | None) -> str:
    """A docstring or a help text in one line of Markdown, in which signs of Markdown's own mean nothing."""
    text = re.sub(r":\w+:`~?(?:advmed\.)?([^`]+)`", r"`\1`", " ".join((text or "").split())).replace("``", "`")
    parts = text.split("`")
    return "`".join(re.sub(r"([*<\[])", r"\\\1", part) if k % 2 == 0 else part for k, part in enumerate(parts))


def _sentence(text: str | None) -> str:
    found = _plain(text)
    return found[:1].upper() + found[1:] + ("" if found.endswith((".", ".)")) else ".") if found else ""


def _value(value: Any) -> str:
    """As YAML has it."""
    words = {None: "null", True: "true", False: "false", "": "empty"}
    if isinstance(value, (list, tuple)):
        return "`[" + ", ".join(map(str, value)) + "]`"
    return f"`{words[value] if value is None or isinstance(value, bool) or value == '' else value}`"


# Commands


def _commands() -> Iterator[str]:
    from adv_nnunet.cli import _parser as nnunet
    from adv_yolo import cli as yolo
    from advmed.cli.completion import OPTION
    from advmed.cli.main import COMMANDS
    from advmed.cli.main import _parser as advmed

    yield "# Commands"
    yield ""
    yield "Every command of ours with its options; of `fit`, the sections of a configuration: `fit --help-all`"
    yield "prints what is in them, and what else Lightning has. Each answers `--help`, and `--debug` behind any of"
    yield "them shows the whole traceback of an error. The exit status is 0; 1 after an error, which is said in one"
    yield "line; 2, behind the usage, where `advmed`, `adv-nnunet` or an `init` does not know an option or misses"
    yield "one; 130 if `advmed search` was interrupted. Settings of a training are [another page](settings.md)."
    yield ""
    completion = f"`{OPTION} SHELL` prints the completion of a shell ([how](installation.md))."
    yield from _section(
        "advmed", f"What concerns every host: reports side by side, and the choice of settings. {completion}"
    )
    for name in COMMANDS:
        yield from _argparse(f"advmed {name}", _subparsers(advmed([name]))[name])
    yield from _section("adv-nnunet", f"Beside the stock `nnUNetv2_*` commands ([nnU-Net](nnunet.md)). {completion}")
    for name, parser in _subparsers(nnunet()).items():
        helps = {action.dest: action.help for action in _subparsers_action(nnunet())._choices_actions}
        parser.description = parser.description or helps[name]
        yield from _argparse(f"adv-nnunet {name}", parser)
    yield from _yolo(yolo)
    for package, title in (("adv_classify", "Classification"), ("adv_landmark", "Landmarks")):
        yield from _lightning(import_module(f"{package}.cli").main.__self__, title)


def _section(name: str, text: str) -> Iterator[str]:
    yield from (f"## {name}", "", *([text, ""] if text else []))


def _subparsers_action(parser: argparse.ArgumentParser) -> Any:
    (found,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return found


def _subparsers(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    return dict(_subparsers_action(parser).choices)


def _argparse(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    yield from (f"### {name}", "", _sentence(parser.description), "")
    actions = [action for action in parser._actions if action.dest != "help"]
    if not actions:
        yield from ("It has no options.", "")
        return
    yield from _table(("option", "what it is"), [(_spelling(action), _help(action)) for action in actions])


def _init(name: str) -> Iterator[str]:
    from advmed.cli import init

    parser = argparse.ArgumentParser(description=init.LINE)
    init.add_arguments(parser)
    yield from _argparse(f"{name} init", parser)


def _spelling(action: argparse.Action) -> str:
    """How it is typed, with a word for its value."""
    names = [text for text in action.option_strings if not text.endswith("+")] or [""]
    value = "" if action.nargs == 0 else str(action.metavar or ("" if action.choices else action.dest.upper()))
    if action.choices:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    more = " ..." if action.nargs == "+" else ""
    typed = [f"{text} {value}{more}".strip() for text in names]
    return ", ".join(f"`{text}`" for text in typed)


def _help(action: argparse.Action) -> str:
    text = _plain(action.help)
    if action.required:
        text += " (required)"
    elif "default" not in text and action.nargs != 0 and action.default is not None:
        text += f" (default: {_value(action.default)})"
    return text


def _yolo(cli: Any) -> Iterator[str]:
    yield from _section(
        "adv-yolo",
        "`yolo` with adversarial training: everything that is not listed here is handed to it as it is "
        "([Ultralytics YOLO](yolo.md)). Options are `NAME=VALUE`, lists have commas.",
    )
    yield from (
        "### adv-yolo detect train",
        "",
        "The host's command with `method=amat`, `sat`, `at`, `fat`, `trades` or `dpaat`, and the arguments of "
        "[settings](settings.md#ultralytics-yolo) beside the host's.",
        "",
    )
    yield from _init("adv-yolo")
    texts = {
        "thresholds": "Thresholds for AMAT from a trained standard model.",
        "evaluate": "Trained models under attack, in one report for each norm.",
    }
    for name, options in cli.OWN.items():
        yield from (f"### adv-yolo {name}", "", texts[name], "")
        rows = [
            (f"`{o.name}=...`", _plain(o.text(",")) + (" (required)" if o.default is None and not o.unset else ""))
            for o in options
        ]
        yield from _table(("option", "what it is"), rows)
        more = ", `seed`, and those of augmentation and loss weights" if name == "thresholds" else ""
        yield from ("Of the host's arguments it takes " + ", ".join(f"`{name}`" for name in cli.HOST) + more + ".", "")


def _lightning(command: Any, title: str) -> Iterator[str]:
    from advmed.cli.completion import OPTION
    from advmed.integrations.lightning import cli

    name, page = command.name, f"[{title}]({command.extra}.md)"
    yield from _section(
        name,
        f"[LightningCLI](https://lightning.ai/docs/pytorch/stable/cli/lightning_cli.html) with three commands of ours "
        f"({page}). `{name} fit --help-all` prints every option of Lightning's, too. `{OPTION} SHELL` prints the "
        f"completion of a shell ([how](installation.md)).",
    )
    yield from _init(name)
    anchor = f"[settings](settings.md#{title.lower()})"
    for subcommand, text in cli.LIGHTNING.items():
        yield from (f"### {name} {subcommand}", "", _sentence(text), "")
        if subcommand == "fit":
            found = [re.match(r"  (--\S+(?: [A-Z]+)?)\s{2,}(.*)", line) for line in command._help("fit").splitlines()]
            said = [(m[1], _plain(m[2]).replace(f"{command.extra}.md", anchor)) for m in found if m]
            yield from _table(("option", "what it is"), [(f"`{option}`", text) for option, text in said])
        else:
            yield from (f"Options are those of `{name} fit`; `--ckpt_path CHECKPOINT` is required.", "")
    for own in cli.OWN:
        parser = command._parser(own, full=False)
        yield from _argparse(f"{name} {own}", parser)


# Settings

HEAD = ("setting", "values", "default", "meaning")
CORE = {
    "RunSettings": "The run",
    "RadiusSettings": "The noise level",
    "AttackSettings": "The attack",
    "AMATSettings": "AMAT",
    "DPAATSettings": "DPAAT",
    "TRADESSettings": "TRADES",
    "MARTSettings": "MART",
    "FATSettings": "FAT",
}
"""The classes that the settings of every host are made of, and their headings."""
NOTES = {
    "RunSettings": "On Lightning, `seed` and `backward` are [others](#classification-modelmethod). FAT needs no "
    "thresholds for classification, where it sees whether the class is wrong.",
    "RadiusSettings": "AMAT has a use for `eps`, too: a margin's first estimate is `eps` at most, and its cap 8 `eps` "
    "by default (classification: 2 `eps`). And with every adversarial method, validation images are attacked at "
    "`eps`. The host's default is in the tables of the hosts.",
}
"""What the tables of the classes leave out."""
ELSEWHERE = {
    "refinement": "what a visit makes of a margin (lines 10 to 12 of the paper's algorithm 1): "
    "[the four rules](presets.md#margins)."
}
"""Settings whose docstring is too long for a cell, as another page has it in full."""


def _settings() -> Iterator[str]:
    import adv_classify
    import adv_landmark
    from adv_nnunet.settings import Settings as NnUNet
    from adv_yolo.settings import _HOST as KEPT
    from adv_yolo.settings import _RENAMED as RENAMED
    from adv_yolo.settings import Settings as Yolo
    from advmed import TrainingSettings

    yield "# Settings"
    yield ""
    yield "Every setting of a training, with the values that it takes. What is `null` is chosen by the `preset`"
    yield "([presets](presets.md)), by the host, or as its line says. An unknown name and a value out of its range are"
    yield "errors before a training starts, and what the settings resolved to is written beside its results."
    yield ""
    yield from _table(
        ("host", "where settings are written"),
        [
            ("[nnU-Net](nnunet.md#settings)", "`adversarial.yaml`; `adv-nnunet settings` prints all of them"),
            ("[Ultralytics YOLO](yolo.md#arguments)", "arguments beside the host's, `delta=3.5`"),
            ("[Classification](classify.md#a-configuration), [landmarks](landmark.md#what-is-trained)",
             "the sections `model.method` and `model.attack` of a configuration"),
            ("your own loop", "`advmed.TrainingSettings(delta=0.5)`"),
        ],
    )  # fmt: skip
    yield from _section("On every host", "")
    kinds = {kind.__name__: kind for kind in TrainingSettings.__mro__ if inspect.get_annotations(kind)}
    assert kinds.keys() == CORE.keys(), "a class of settings without a heading"
    for name, heading in CORE.items():
        yield from (f"### {heading}", "")
        yield from _table(HEAD, _fields(kinds[name]))
        if name in NOTES:
            yield from (NOTES[name], "")
    yield from _section("nnU-Net", f"{_summary(NnUNet)} All of the above, and:")
    yield from _table(HEAD, _fields(NnUNet))
    names = ", ".join(f"`{ours}` for `{field}`" for ours, field in RENAMED.items())
    yield from _section("Ultralytics YOLO", f"{_summary(Yolo)} All of the above, and those of the next table.")
    yield f"Its own names: {names}. {', '.join(f'`{name}`' for name in KEPT)} is the host's own argument."
    yield ""
    yield from _table(HEAD, _fields(Yolo))
    yield from _of_lightning("Classification", adv_classify, "RobustClassifier", "ClassifierAttack",
                             ("ImageTable", "MedMNIST", "ImageFolder"))  # fmt: skip
    yield from _of_lightning("Landmarks", adv_landmark, "RobustLandmarks", "LandmarkAttack",
                             ("LandmarkTable", "ISBI2015", "Images"))  # fmt: skip


def _of_lightning(title: str, package: Any, module: str, attack: str, data: Sequence[str]) -> Iterator[str]:
    sections = {"network", "method", "attack"}
    yield from _section(title, f"The sections of a configuration of `{package.__name__.replace('_', '-')}`.")
    yield from (f"### {title}: model", "", "Numbers of classes and the like are taken from the data.", "")
    yield from _table(HEAD, _arguments(getattr(package, module), without=sections))
    yield from (f"### {title}: model.network", "")
    yield from _table(HEAD, _fields(package.Network))
    yield from (
        f"### {title}: model.method",
        "",
        "The run, the noise level and the methods of [every host](#on-every-host), and:",
        "",
    )
    yield from _table(HEAD, _fields(package.MethodOptions))
    bounds = _value(getattr(package, attack)().bounds)
    yield from (f"### {title}: model.attack", "", f"[The attack](#the-attack) of every host; `bounds` is {bounds}.", "")
    for name in data:
        kind = getattr(package, name)
        yield from (f"### {title}: data, {name}", "", f"`{kind.__module__}.{name}`. {_summary(kind)}", "")
        yield from _table(HEAD, _arguments(kind))


def _summary(kind: type) -> str:
    return _sentence(parse(inspect.cleandoc(kind.__doc__ or ""), DocstringStyle.GOOGLE).short_description)


def _described(kind: type) -> dict[str, str]:
    """What the docstring of a class says of its attributes or arguments."""
    found = parse(inspect.cleandoc(kind.__doc__ or ""), DocstringStyle.GOOGLE).params
    return {param.arg_name: re.sub(r"\bNone\b", "null", _plain(param.description)) for param in found}


def _fields(kind: type) -> Iterator[tuple[str, str, str, str]]:
    """The settings that a dataclass adds to its bases or describes anew.

    Raises:
        ValueError: for one that its docstring does not describe.
    """
    texts, hints = _described(kind), get_type_hints(kind)
    own = set(inspect.get_annotations(kind))
    for field in dataclasses.fields(kind):
        if field.name not in own | texts.keys():
            continue
        if field.name not in texts:
            raise ValueError(f"the docstring of {kind.__name__} does not say what {field.name} is")
        default = field.default_factory() if callable(field.default_factory) else field.default
        yield (
            f"`{field.name}`",
            _words(hints[field.name]),
            _value(default),
            ELSEWHERE.get(field.name, texts[field.name]),
        )


def _arguments(kind: type, without: Iterable[str] = ()) -> Iterator[tuple[str, str, str, str]]:
    """The arguments of a class of Lightning's, and of ours that it derives from, where ``**options`` hands them on."""
    seen = set(without)
    for base in kind.__mro__:
        if base.__module__.startswith("lightning") or "__init__" not in base.__dict__:
            continue
        texts, hints = _described(base), get_type_hints(base.__init__)
        parameters = inspect.signature(base.__init__).parameters.values()
        for parameter in parameters:
            name = parameter.name
            if name == "self" or parameter.kind is parameter.VAR_KEYWORD or name in seen:
                continue
            seen.add(name)
            if name not in texts:
                raise ValueError(f"the docstring of {base.__name__} does not say what {name} is")
            if texts[name] == "from the data.":
                continue
            default = "required" if parameter.default is parameter.empty else _value(parameter.default)
            yield f"`{name}`", _words(hints[name]), default, texts[name]
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break


def _words(hint: Any) -> str:
    """A type, in words."""
    known = {int: "whole number", float: "number", str: "text", bool: "true, false", type(None): "null", Path: "path"}
    origin, given = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in given)
    if origin in (Union, UnionType):
        return ", ".join(_words(one) for one in given)
    if origin is None:
        return known.get(hint) or f"`{hint.__name__}`"
    if origin is tuple and len(given) == 2 and given[0] is given[1]:
        return f"pair of {_words(given[0])}s"
    if issubclass(origin, (list, tuple, Sequence)):
        return f"list of {_words(given[0])}s"
    return "mapping" if issubclass(origin, Mapping) else "function"


if __name__ == "__main__":
    main()

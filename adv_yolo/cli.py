"""The command ``adv-yolo``: ``yolo`` with adversarial training, thresholds and evaluation under attack.

``adv-yolo detect train ... method=amat delta=3.5`` trains; every other ``adv-yolo detect val|predict|export|...`` is
handed to the host as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

HELP = """
    adv-yolo is 'yolo' with adversarial training. Syntax and arguments are those of 'yolo'; it adds:

    1. method=amat|sat|at|trades|dpaat to train, with arguments of its own (null: a default that fits the image size):
        adv-yolo detect train data=data.yaml model=yolov8n.yaml imgsz=320 method=amat thresholds=std_best.pt
{arguments}
    2. Thresholds for AMAT from a trained standard model:
        adv-yolo thresholds model=runs/detect/train/weights/best.pt data=data.yaml [rule=mean+2std] [out=FILE]

    3. Trained models under attack, in one report:
        adv-yolo evaluate model=a.pt,b.pt data=data.yaml split=val levels=0,5,10,15 [attacks=pgd100,ifgsm10]
                          [norm=2] [samples=100] [names=STD,AMAT] [out=FOLDER] [examples=4] [checks=32] [seed=0]
                          [overwrite=True]

    Everything else is what 'yolo' does: adv-yolo detect val|predict|export ...; see 'yolo help'.
"""

THRESHOLDS = {"model": None, "data": None, "rule": None, "split": "train", "out": None}
EVALUATE = {
    "model": None,
    "data": None,
    "split": "val",
    "levels": None,
    "attacks": "pgd100,ifgsm10",
    "norm": 2,
    "samples": None,
    "names": None,
    "out": "runs/evaluate",
    "examples": 4,
    "checks": 32,
    "seed": 0,
    "overwrite": False,
}
HOST = ("imgsz", "batch", "device", "conf", "iou", "max_det", "nms", "workers", "single_cls")
"""The host's arguments that our own commands take, too."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; prints one clear line for a mistake of the user, and returns the exit status."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in argv
    argv = [argument for argument in argv if argument != "--debug"]
    try:
        _dispatch(argv)
    except (OSError, ValueError, TypeError, RuntimeError, SyntaxError, AssertionError) as error:
        if debug:
            raise
        print(f"adv-yolo: {error}", file=sys.stderr)
        return 1
    return 0


def _dispatch(argv: list[str]) -> None:
    from ultralytics.utils import LOGGER

    if not argv or argv[0] in {"help", "-h", "--help", "-help"}:
        LOGGER.info(HELP.format(arguments=_argument_help()))
        return
    if argv[0] == "thresholds":
        _thresholds(_own(argv[1:], THRESHOLDS, "thresholds"))
        return
    if argv[0] == "evaluate":
        _evaluate(_own(argv[1:], EVALUATE, "evaluate"))
        return
    if "train" in argv or "mode=train" in argv:
        trained = _train(argv)
        if trained:
            return
    _host(argv)


def _host(argv: Sequence[str]) -> None:
    """The host's own command; from a text it would lose arguments with spaces, so it reads sys.argv where it can."""
    from ultralytics.cfg import entrypoint

    entrypoint("" if list(argv) == sys.argv[1:] else " ".join(["yolo", *argv]))


def _argument_help() -> str:
    from adv_yolo.settings import Settings, arguments_of

    pairs = [f"{name}={'null' if value is None else value}" for name, value in arguments_of(Settings()).items()]
    rows = [pairs[i : i + 4] for i in range(0, len(pairs), 4)]
    return "\n".join("            " + " ".join(row) for row in rows) + "\n"


def _parse(argv: Sequence[str], known: dict[str, Any]) -> dict[str, Any]:
    """``key=value`` words, tasks and modes, as the host reads them; ``known`` are all keys with their defaults."""
    from ultralytics.cfg import MODES, TASKS, check_dict_alignment, merge_equals_args, parse_key_value_pair
    from ultralytics.utils import DEFAULT_CFG_DICT, YAML, checks

    found: dict[str, Any] = {}
    for word in merge_equals_args(list(argv)):
        text = word.removeprefix("--").removesuffix(",")
        if "=" in text:
            key, value = parse_key_value_pair(text)
            if key == "cfg" and value is not None:
                content = YAML.load(checks.check_yaml(value))
                found = {**{k: v for k, v in content.items() if k != "cfg"}, **found}
            else:
                found[key] = value
        elif text in TASKS and "task" in known:
            found["task"] = text
        elif text in MODES and "mode" in known:
            found["mode"] = text
        elif isinstance(DEFAULT_CFG_DICT.get(text), bool) or isinstance(known.get(text), bool) or text == "resume":
            found[text] = True
        else:
            check_dict_alignment(known, {text: ""})
            raise SyntaxError(f"'{text}' is missing an '=' sign to set its value, i.e. {text}={known[text]}")
    check_dict_alignment(known, found)
    return found


def _own(argv: Sequence[str], defaults: dict[str, Any], command: str) -> dict[str, Any]:
    """The arguments of a command of ours."""
    from ultralytics.utils import DEFAULT_CFG_DICT

    known = {**{name: DEFAULT_CFG_DICT[name] for name in HOST}, **defaults}
    found = _parse(argv, known)
    for name in ("model", "data"):
        if not found.get(name):
            raise SyntaxError(f"{command} needs {name}=..., for example {command} model=best.pt data=data.yaml")
    return {**defaults, **found}


# Training


def _train(argv: Sequence[str]) -> bool:
    """Trains with a method of ours; False where this is a training for the host."""
    from ultralytics import YOLO
    from ultralytics.utils import DEFAULT_CFG_DICT

    from adv_yolo.settings import argument_names, split_arguments
    from adv_yolo.trainer import TRAINERS

    special = {"method": None, "task": None, "mode": None}
    found = _parse(argv, {**DEFAULT_CFG_DICT, **dict.fromkeys(argument_names()), **special})
    method = str(found.pop("method", "") or "").lower()
    resumed = _method_of(found)
    if resumed:
        if method and method != resumed:
            raise ValueError(f"the checkpoint is a run of method={resumed}, it cannot be resumed with method={method}")
        method = resumed
    if method in {"", "std"}:
        _, own = split_arguments(found)
        if own:
            raise SyntaxError(f"{', '.join(own)}: these arguments need method=, one of {', '.join(TRAINERS)}")
        if method == "std":
            _host([word for word in argv if not word.startswith("method")])
            return True
        return False
    if method not in TRAINERS:
        raise SyntaxError(f"method={method} is unknown; there are {', '.join(TRAINERS)} and std")
    found.pop("mode", None)
    task = found.pop("task", None)
    model = found.pop("model", None)
    if model is None and isinstance(found.get("resume"), str):
        model = found["resume"]
    if model is None:
        raise SyntaxError("train needs model=..., for example model=yolov8n.yaml or a .pt file")
    if not found.get("data") and not found.get("resume"):
        raise SyntaxError("train needs data=..., the YAML file of your data set")
    YOLO(model, task=task).train(trainer=TRAINERS[method], **found)
    return True


def _method_of(found: dict[str, Any]) -> str | None:
    """The method of the checkpoint that is to be resumed, if it is one of ours."""
    from ultralytics.nn.tasks import load_checkpoint

    from adv_yolo.trainer import STATE

    resume = found.get("resume")
    path = resume if isinstance(resume, str) else found.get("model") if resume else None
    if path is None or not Path(path).is_file():
        return None
    state = getattr(load_checkpoint(path)[0], STATE, None)
    return None if state is None else str(state["method"]["method"]).lower()


# Thresholds and evaluation


def _data(name: str, split: str, single_class: bool = False) -> dict[str, Any]:
    from ultralytics.data.utils import check_det_dataset

    path = Path(name)
    if path.suffix in {".yaml", ".yml"} and path.parent != Path() and not path.is_file():
        raise FileNotFoundError(f"there is no data set file {name}")
    data: dict[str, Any] = check_det_dataset(name, autodownload=False)
    if not data.get(split):
        raise ValueError(f"{name} has no split {split!r}")
    if single_class:  # as the host's trainer has it
        data["names"], data["nc"] = {0: "item"}, 1
    return data


def _arguments(found: dict[str, Any], network_arguments: dict[str, Any]) -> dict[str, Any]:
    """The host's arguments of a command; the image size is the one that the model was trained with."""
    given = {name: found[name] for name in HOST if found.get(name) is not None}
    given.setdefault("imgsz", network_arguments.get("imgsz", 640))
    return given


def _device(found: dict[str, Any], arguments: dict[str, Any]) -> Any:
    import torch
    from ultralytics.utils.torch_utils import select_device

    from advmed.distributed import device_of_rank

    arguments.pop("device", None)
    device = select_device(found.get("device") or "", verbose=False)
    mine = device_of_rank(device.type)
    return device if mine == device.type else torch.device(mine)


def _network_arguments(path: str) -> dict[str, Any]:
    from ultralytics.nn.tasks import load_checkpoint

    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no model {path}")
    return dict(load_checkpoint(path)[0].args)


def _thresholds(found: dict[str, Any]) -> None:
    from ultralytics.cfg import get_cfg
    from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER

    from adv_yolo import calibration as standard
    from adv_yolo.settings import RULE
    from advmed.thresholds import std_factor

    rule = found["rule"] or RULE
    std_factor(rule)
    arguments = _arguments(found, _network_arguments(found["model"]))
    device = _device(found, arguments)
    data = _data(found["data"], found["split"], bool(found.get("single_cls")))
    args = get_cfg(DEFAULT_CFG_DICT, arguments)
    measured = standard.measure(found["model"], data, args, rule=rule, device=device, split=found["split"])
    path = Path(found["out"] or Path(found["model"]).with_name(standard.FILE))
    measured.save(path)
    assert measured.mean is not None
    assert measured.std is not None
    LOGGER.info(f"{measured.n} clean images of the split {found['split']}, {found['model']}")
    for name, value, mean, std in zip(measured.names, measured.values, measured.mean, measured.std, strict=True):
        LOGGER.info(f"  {name}: threshold {value:.4f} ({measured.rule}; mean {mean:.4f}, std {std:.4f})")
    LOGGER.info(f"Written to {path}. Train with: method=amat thresholds={path}")


def _evaluate(found: dict[str, Any]) -> None:
    from ultralytics.utils import LOGGER

    from adv_yolo import evaluate as host
    from advmed.attacks.names import parse_attacks
    from advmed.evaluation.auc import check_levels
    from advmed.evaluation.subjects import Subject, check_numbers, compare

    paths = _listed(found["model"])
    names = _listed(found["names"]) if found["names"] else [_name(path) for path in paths]
    if len(names) != len(paths) or len(set(names)) != len(names):
        raise ValueError(f"{len(paths)} models need {len(paths)} different names, got {names}; set them with names=A,B")
    check_numbers(samples=found["samples"], examples=found["examples"], checks=found["checks"])
    attacks = parse_attacks(_listed(found["attacks"]), norm=float(found["norm"]))
    arguments = _arguments(found, _network_arguments(paths[0])) | {"split": found["split"]}
    device = _device(found, arguments)
    scale = 1 if float(found["norm"]) == float("inf") else int(arguments["imgsz"]) / 320
    levels = [float(x) for x in _listed(found["levels"])] if found["levels"] is not None else None
    if levels is None:
        levels = [0, 2 / 255, 4 / 255, 8 / 255] if float(found["norm"]) == float("inf") else [0, 5, 10, 15]
        levels = [round(level * scale, 6) for level in levels]
    levels = list(check_levels(levels))
    data = _data(found["data"], found["split"], bool(found.get("single_cls")))
    folder = Path(found["out"])
    models = [
        host.load_model(name, path, data, arguments, device, folder) for name, path in zip(names, paths, strict=True)
    ]
    root = data.get("path")
    subjects = []
    for model in models:
        batches = partial(host.make_batches, model, root, found["samples"])
        subjects.append(Subject(model.name, model.path, batches(), model.margins, few=batches))
    class_names = {int(k): str(v) for k, v in models[0].network.names.items()}
    norm = "Linf" if float(found["norm"]) == float("inf") else "L2"
    seed = int(found["seed"])
    compare(
        folder,
        subjects,
        attacks,
        levels,
        host.metrics(class_names),
        examples=partial(host.make_examples, models, root, seed=seed),
        shown=found["examples"],
        checks=found["checks"],
        fingerprint={"arguments": arguments},
        bounds=(0.0, 1.0),
        seed=seed,
        overwrite=bool(found["overwrite"]),
        say=LOGGER.info,
        title=f"Robustness of {', '.join(names)} on {Path(found['data']).stem}",
        level_unit=f"{norm} norm of the noise over the image tensor in [0, 1] ({arguments['imgsz']} pixels)",
        class_names={label + 1: name for label, name in class_names.items()},
        settings={
            "data set": Path(found["data"]).name,
            "split": f"{found['split']}, {sum(len(batch.ids) for batch in subjects[0].batches)} images",
            "host arguments": {name: value for name, value in arguments.items() if name != "split"},
            "checkpoints": {model.name: "/".join(model.path.parts[-3:]) for model in models},
        },
    )


def _listed(value: Any) -> list[Any]:
    """Values separated by commas, however the host's parser read them."""
    if isinstance(value, (list, tuple)):
        return list(value)
    return [part.strip() for part in str(value).split(",") if part.strip()]


def _name(path: str) -> str:
    """The run's folder for ``RUN/weights/best.pt``, else the file's stem."""
    file = Path(path)
    return file.parent.parent.name if file.parent.name == "weights" and file.parent.parent.name else file.stem


if __name__ == "__main__":
    sys.exit(main())

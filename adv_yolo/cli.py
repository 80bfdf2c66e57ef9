"""The command ``adv-yolo``: ``yolo`` with adversarial training, thresholds and evaluation under attack.

``adv-yolo detect train ... method=amat delta=3.5`` trains; every other ``adv-yolo detect val|predict|export|...`` is
handed to the host as it is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from advmed.cli import init, options, runner
from advmed.cli.options import Option
from advmed.documentation import page

HELP = """
    adv-yolo is 'yolo' with adversarial training. Syntax and arguments are those of 'yolo'; it adds:

    1. method=amat|sat|at|fat|trades|dpaat to train, with arguments of its own (null: by the preset, or the image size):
        adv-yolo detect train data=data.yaml model=yolov8n.yaml imgsz=320 method=amat thresholds=std_best.pt
            preset=fast thresholds=auto rule=null awp=0.0 ramp=0.0 decay=host clean_epochs=null backward=together
            eps=null tau=1 kl_weight=5.0 eps_min=null eps_max=null step_size=null sync_weight=1.0 average=batch beta=6.0
            delta=null refinement=null train_on=null start=null margin_of=own empty_samples=as_others
            margin_min=null margin_max=null steps=null step_scale=null schedule=null share_gradient=null norm=2.0
            random_start=0.0 bounds=[0.0, 1.0] bn=clean robust_batches=4

    2. Thresholds for AMAT from a trained standard model; see adv-yolo thresholds --help:
        adv-yolo thresholds model=runs/detect/train/weights/best.pt data=data.yaml [rule=mean+2std] [out=FILE]

    3. Trained models under attack, in one report for each norm; see adv-yolo evaluate --help:
        adv-yolo evaluate model=a.pt,b.pt data=data.yaml split=val levels=0,5,10,15
                          {evaluate}

    4. A commented study for advmed search, into a folder of yours:
        adv-yolo init [FOLDER]

    Everything else is what 'yolo' does: adv-yolo detect val|predict|export ...; see 'yolo help'.
    The page of the documentation: {page}
"""
"""The arguments of ``method=`` stand here as text, as their settings import PyTorch; a test compares them."""

MODELS = (
    Option("model", str, "a trained model; for evaluate one or more: a.pt,b.pt"),
    Option("data", str, "the YAML file of the data set"),
)
THRESHOLDS = (*MODELS, Option("split", str, "split of the data set", "train"), *options.THRESHOLDS)
EVALUATE = (
    *MODELS,
    Option("split", str, "split of the data set", "val"),
    *options.with_defaults(options.EVALUATE, out="runs/evaluate"),
)
OWN = {"thresholds": THRESHOLDS, "evaluate": EVALUATE}
HOST = ("imgsz", "batch", "device", "conf", "iou", "max_det", "nms", "workers", "single_cls", "classes")
"""The host's arguments that our own commands take, too."""
NO_TUNE = (
    "there is no tune here: Ultralytics' tuner takes no trainer and no argument of ours, and chooses by clean images. "
    "'advmed search STUDY.yaml' chooses delta, or any other argument, by AUC_robust; begin with "
    "search_yolo.yaml, which adv-yolo init writes"
)
_ASKED = {"help", "-h", "--help", "-help"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command, see :func:`advmed.cli.runner.run`.

    The host's telemetry and its look for updates are off unless ``YOLO_OFFLINE`` says otherwise; what a user names and
    does not have (``model=yolov8n.pt``) is downloaded by the host all the same.
    """
    os.environ.setdefault("YOLO_OFFLINE", "true")  # before anything imports the host
    return runner.run("adv-yolo", _dispatch, arguments, extra="yolo")


def _dispatch(argv: list[str]) -> None:
    if not argv or argv[0] in _ASKED:
        own = " ".join(f"[{o.name}=]" for o in EVALUATE[3:] if o.name != "levels")
        print(HELP.format(evaluate=own, page=page("yolo.md")))
    elif argv[0] == "init":
        init.main("adv-yolo", "adv_yolo", argv[1:], page="yolo.md")
    elif argv[0] in OWN:
        if _ASKED & set(argv):
            print(_help_of(argv[0]))
        else:
            (_thresholds if argv[0] == "thresholds" else _evaluate)(_own(argv[1:], argv[0]))
    elif "tune" in argv or "mode=tune" in argv:
        raise SyntaxError(NO_TUNE)
    elif not (("train" in argv or "mode=train" in argv) and _train(argv)):
        _host(argv)


def _help_of(command: str) -> str:
    return "\n".join(
        [
            f"usage: adv-yolo {command} model=... data=... [NAME=VALUE ...]",
            "",
            options.key_value_help(OWN[command]),
            "",
            f"Of the host's arguments it takes {', '.join(HOST)}"
            + (
                ", seed, and those of augmentation and loss weights (scale, fliplr, mosaic, box, ...), which are to be "
                "those of the adversarial training; by default, those of the model's own, without mosaic."
                if command == "thresholds"
                else "."
            ),
            runner.DEBUG,
        ]
    )


def _host(argv: Sequence[str]) -> None:
    """The host's own command, which reads the words of this process: from a text it would lose those with spaces."""
    from ultralytics.cfg import entrypoint
    from ultralytics.utils import ARGV

    typed = ARGV[1:]
    ARGV[1:] = argv
    try:
        entrypoint()
    finally:
        ARGV[1:] = typed


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


def _own(argv: Sequence[str], command: str) -> dict[str, Any]:
    """The arguments of a command of ours."""
    from ultralytics.utils import DEFAULT_CFG_DICT

    table, host = OWN[command], list(HOST)
    if command == "thresholds":
        from adv_yolo.calibration import AUGMENTATION, GAINS

        host += [*AUGMENTATION, *GAINS, "seed"]
    known = {**{name: DEFAULT_CFG_DICT[name] for name in host}, **{o.name: o.default for o in table}}
    found = _parse(argv, known)
    for name in ("model", "data"):
        if not found.get(name):
            raise SyntaxError(f"{command} needs {name}=..., for example {command} model=best.pt data=data.yaml")
    return {**found, **options.key_values(table, found)}


# Training


def _train(argv: Sequence[str]) -> bool:
    """Trains with a method of ours; False where this is a training for the host."""
    from ultralytics import YOLO
    from ultralytics.utils import DEFAULT_CFG_DICT

    from adv_yolo.checkpoint import read_checkpoint
    from adv_yolo.settings import argument_names, split_arguments
    from adv_yolo.trainer import TRAINERS

    special = {"method": None, "task": None, "mode": None}
    found = _parse(argv, {**DEFAULT_CFG_DICT, **dict.fromkeys(argument_names()), **special})
    method = str(found.pop("method", "") or "").lower()
    if found.get("resume"):
        resumed = _method_of(found)
        if method and method != resumed:
            raise ValueError(
                f"the checkpoint is a run of method={resumed or 'std'}, it cannot be resumed with method={method}"
            )
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
    file = Path(str(model))
    # Of a bare name that is not here (yolov8n.pt) the host knows where to have it.
    if file.suffix == ".pt" and (file.is_file() or file.parent != Path()):
        read_checkpoint(model)  # says what is wrong with it
    YOLO(model, task=task).train(trainer=TRAINERS[method], **found)
    return True


def _method_of(found: dict[str, Any]) -> str:
    """The method of the unfinished training that is to be resumed; nothing for the host's own.

    Raises:
        ValueError: if the training is finished: the host would begin a new one, and a standard one.
    """
    from adv_yolo.checkpoint import MARKED, STATE, complete, read_checkpoint

    resume = found["resume"]
    path = resume if isinstance(resume, (str, Path)) else found.get("model")
    if path is None:
        raise SyntaxError(
            "train resume needs model=..., the last.pt of the run: train resume model=RUN/weights/last.pt"
        )
    ended = complete(Path(path))
    network, checkpoint = read_checkpoint(path)
    state, summary = getattr(network, STATE, None), checkpoint.get(STATE)
    if ended:
        what = f"a finished {summary['method']} training" if summary else "a finished training"
        raise ValueError(
            f"{path} is {what}, there is nothing to resume. To train on from its weights, leave out resume: "
            f"adv-yolo detect train model={path} data=... method=..."
        )
    if state is None and isinstance(mark := network.args.get(MARKED), str):
        raise ValueError(f"{path}: {mark}")
    return "" if state is None else str(state["method"]["method"]).lower()


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


def _arguments(found: dict[str, Any], networks: Mapping[str, Any]) -> dict[str, Any]:
    """The host's arguments of a command; image size and classes are those that the models were trained with.

    Args:
        found: the command line.
        networks: in the checkpoints, by their paths.

    Raises:
        ValueError: if the models were trained with different ones, and the command line does not say which.
    """
    from adv_yolo.calibration import image_size, labels

    given = {name: found[name] for name in HOST if found.get(name) is not None}
    trained = {path: {"imgsz": net.args.get("imgsz", 640), **labels(net.args)} for path, net in networks.items()}
    for name, value in next(iter(trained.values())).items():
        if name not in given and any(other[name] != value for other in trained.values()):
            values = ", ".join(f"{path}: {name}={other[name]}" for path, other in trained.items())
            raise ValueError(f"the models were trained with different values of {name} ({values}); say {name}=...")
        if value:
            given.setdefault(name, value)
    given["imgsz"] = max(image_size(given["imgsz"], network) for network in networks.values())
    return given


def _device(found: dict[str, Any], arguments: dict[str, Any]) -> Any:
    import torch
    from ultralytics.utils.torch_utils import select_device

    from advmed.distributed import device_of_rank

    arguments.pop("device", None)
    asked = found.get("device")  # 0 is one
    device = select_device("" if asked is None else asked, verbose=False)
    mine = device_of_rank(device.type)
    return device if mine == device.type else torch.device(mine)


def _networks(paths: Sequence[str]) -> dict[str, Any]:
    """The networks in checkpoints, by their paths, with the arguments that they were trained with."""
    from adv_yolo.checkpoint import read_checkpoint
    from adv_yolo.objective import check_model

    return {path: check_model(read_checkpoint(path)[0]) for path in paths}


def _thresholds(found: dict[str, Any]) -> None:
    from ultralytics.cfg import get_cfg
    from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER

    from adv_yolo import calibration as standard
    from adv_yolo.settings import RULE
    from advmed.cli.thresholds import Quality, ThresholdsOptions, write_thresholds

    chosen = ThresholdsOptions.of(found)
    networks = _networks([found["model"]])
    path = chosen.destination(Path(found["model"]).with_name(standard.FILE))
    own = networks[found["model"]].args
    names = (*standard.AUGMENTATION, standard.CUSTOM, *standard.GAINS, "seed", "batch")
    # AMAT trains without mosaic, unless told otherwise.
    as_trained = {**{name: own[name] for name in names if own.get(name) is not None}, "mosaic": 0.0}
    given = {name: found[name] for name in names if found.get(name) is not None}
    arguments = {**as_trained, **given, **_arguments(found, networks)}
    device = _device(found, arguments)
    data = _data(found["data"], found["split"], bool(arguments.get("single_cls")))
    args = get_cfg(DEFAULT_CFG_DICT, arguments)
    rule = chosen.rule or RULE
    measured = standard.measure(found["model"], data, args, rule=rule, device=device, split=found["split"])
    write_thresholds(
        measured,
        path,
        of=f"images of the split {found['split']}, augmented as in training",
        quality=Quality("mAP50 (plain images)", measured.notes["mAP50"], standard.MEDIOCRE),
        hint=f"Train with: method=amat thresholds={path}",
        say=LOGGER.info,
    )


def _evaluate(found: dict[str, Any]) -> None:
    from ultralytics.utils import LOGGER

    from adv_yolo.evaluate import DetectionEvaluation
    from advmed.cli.evaluate import EvaluationOptions, evaluate_models

    paths = options.listed(found["model"]) or []
    chosen = EvaluationOptions.of(found, [_name(path) for path in paths], models="models", option="names=A,B")
    if not paths:
        raise SyntaxError("evaluate needs model=..., one or more trained models: model=a.pt,b.pt")
    arguments = _arguments(found, _networks(paths)) | {"split": found["split"]}
    host = DetectionEvaluation(
        paths=dict(zip(chosen.names, map(Path, paths), strict=True)),
        data=_data(found["data"], found["split"], bool(arguments.get("single_cls"))),
        data_file=Path(found["data"]),
        device=_device(found, arguments),
        arguments=arguments,
        samples=chosen.samples,
        folder=chosen.out,
    )
    evaluate_models(host, chosen, say=LOGGER.info)


def _name(path: str) -> str:
    """The run's folder for ``RUN/weights/best.pt``, else the file's stem."""
    file = Path(path)
    return file.parent.parent.name if file.parent.name == "weights" and file.parent.parent.name else file.stem


if __name__ == "__main__":
    sys.exit(main())

"""How the Dice of trained nnU-Net models falls under attack: ours or stock ones, on validation cases or raw files.

What is attacked is what nnU-Net predicts with: the preprocessed image, padded to the patch where it is smaller, goes
in; overlapping tiles are part of the attacked function, and the loss is that of the stitched logits. In 2D a sample is
a slice, in 3D a case. As in training, the noise may use the padding; scores do not count it. There is no test-time
mirroring.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from adv_nnunet.checkpoints import read_checkpoint
from adv_nnunet.data import declaration, undeclared
from adv_nnunet.host import channels
from adv_nnunet.objective import SampleTerms, inference_loss, training_target
from adv_nnunet.scores import segmentation_counts
from adv_nnunet.settings import STATE
from advmed.attacks import Attack
from advmed.cli.evaluate import EvaluationHost
from advmed.distributed import place
from advmed.evaluation.dice import Counts, adi, dice_per_sample, tvdi
from advmed.evaluation.loop import EvaluationBatch, LoadedBatch, at_levels
from advmed.evaluation.metric import Metric
from advmed.evaluation.subjects import Subject, spread
from advmed.objective import ClassScores
from advmed.progress import watched
from advmed.report import Example, View

Case = Callable[[], tuple[np.ndarray, np.ndarray]]
"""Loads a case as the network receives it, preprocessed and padded: image (C, z, y, x), segmentation (1, z, y, x)."""

PADDING = -2
"""Marks padding in a segmentation; -1 is nnU-Net's mark for what preprocessing found outside of the body."""


class SlidingWindow(nn.Module):
    """nnU-Net's prediction of a whole image, differentiable: overlapping tiles, Gaussian weights, stitching.

    Args:
        network: the network, without deep supervision.
        patch_size: of the plans.
        tile_step_size: as nnU-Net's ``-step_size``, a fraction of the patch.
    """

    def __init__(self, network: nn.Module, patch_size: Sequence[int], tile_step_size: float = 0.5) -> None:
        super().__init__()
        self.network = network
        self.patch_size = tuple(int(n) for n in patch_size)
        self.tile_step_size = tile_step_size

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (B, heads, *spatial) for images of shape (B, C, *spatial), of any size."""
        size = images.shape[2:]
        pads = _pads(size, self.patch_size)
        padded = functional.pad(images, [n for pair in reversed(pads) for n in pair])
        steps = compute_steps_for_sliding_window(tuple(padded.shape[2:]), self.patch_size, self.tile_step_size)
        tiles = [
            tuple(slice(low, low + n) for low, n in zip(corner, self.patch_size, strict=True))
            for corner in itertools.product(*steps)
        ]
        logits = self.network(padded) if len(tiles) == 1 else self._stitched(padded, tiles)
        inner: Any = (..., *(slice(low, low + n) for (low, _), n in zip(pads, size, strict=True)))
        return logits[inner]

    def _stitched(self, padded: Tensor, tiles: list[tuple[slice, ...]]) -> Tensor:
        # Every tile's activations at once would not fit for large cases: they are computed again when the gradient
        # needs them, so that the memory is that of one tile.
        recompute = len(tiles) > 2 and torch.is_grad_enabled() and padded.requires_grad
        weight = compute_gaussian(
            self.patch_size, sigma_scale=1 / 8, value_scaling_factor=10, dtype=torch.float32, device=padded.device
        )
        total, weights = None, torch.zeros(padded.shape[2:], device=padded.device)
        for tile in tiles:
            place: Any = (..., *tile)
            patch = padded[place]
            logits = checkpoint(self.network, patch, use_reentrant=False) if recompute else self.network(patch)
            if total is None:
                total = logits.new_zeros((*logits.shape[:2], *padded.shape[2:]), dtype=torch.float32)
            total[place] += logits * weight
            weights[tile] += weight
        assert total is not None
        return total / weights


class InferenceObjective:
    """The loss terms of a batch of whole images under a :class:`SlidingWindow`: ``images -> (B, 2)``."""

    names = ("ce", "dice")

    def __init__(self, window: SlidingWindow, terms: SampleTerms, target: Tensor) -> None:
        self.model: SlidingWindow = window
        self.terms, self.target = terms, target

    def __call__(self, images: Tensor) -> Tensor:
        """Cross-entropy and negative Dice of every image, (B, 2)."""
        return self.terms.at_full_resolution(self.model(images), self.target)

    def take(self, rows: Tensor) -> InferenceObjective:
        """The objective of some images of the batch, by their numbers."""
        return InferenceObjective(self.model, self.terms, self.target[rows])

    def predictions(self, images: Tensor) -> Tensor:
        """The logits, (B, heads, *spatial)."""
        return self.model(images)

    def class_scores(self, predictions: Tensor) -> ClassScores:
        """The classes of the voxels."""
        return self.terms.class_scores(predictions, self.target)


@dataclass(frozen=True)
class TrainedModel:
    """A trained nnU-Net model folder, loaded.

    Attributes:
        name: as shown in the report.
        checkpoint: the file it was loaded from.
        window: its network as a whole-image predictor, in evaluation mode, on the device.
        predictor: the host's predictor, for plans and labels.
        configuration: its name in the plans.
        margins: the margins that its training ended with, or None.
    """

    name: str
    checkpoint: Path
    window: SlidingWindow
    predictor: Any
    configuration: str
    margins: np.ndarray | None

    @property
    def terms(self) -> SampleTerms:
        """The loss that is attacked, split by sample."""
        return SampleTerms(inference_loss(self.labels), "separate")

    @property
    def planar(self) -> bool:
        """Whether the network sees slices (2D) rather than volumes."""
        return len(self.window.patch_size) == 2

    @property
    def labels(self) -> Any:
        """The host's label manager."""
        return self.predictor.label_manager


def load_model(
    name: str, folder: Path, fold: int | str, device: torch.device, *, file: str, tile_step_size: float = 0.5
) -> TrainedModel:
    """Loads a model folder as nnU-Net writes it (``trainer__plans__configuration``), with one fold.

    Raises:
        FileNotFoundError: naming what is missing.
        ValueError: for a damaged checkpoint.
    """
    path = folder / f"fold_{fold}" / file
    for needed in (folder, folder / "plans.json", folder / "dataset.json", path):
        if not needed.exists():
            raise FileNotFoundError(
                f"model {name!r}: there is no {needed}. Expected a folder that nnUNetv2_train wrote, with fold {fold} "
                f"finished; -chk names another checkpoint file."
            )
    content = read_checkpoint(path)  # before the host, which runs what a checkpoint holds
    with redirect_stdout(io.StringIO()):  # what it prints of devices and of where it looked for the trainer
        on_device = device.type == "cuda"
        predictor = nnUNetPredictor(device=device, perform_everything_on_device=on_device, allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(folder), (fold,), file)
    network = predictor.network.to(device).eval()
    window = SlidingWindow(network, predictor.configuration_manager.patch_size, tile_step_size).eval()
    state = content.get(STATE)
    margins = state["method"].get("margins", {}).get("values") if state else None
    configuration = content["init_args"]["configuration"]
    return TrainedModel(name, path, window, predictor, configuration, np.asarray(margins) if margins else None)


def validation_cases(model: TrainedModel, fold: int | str) -> dict[str, Case]:
    """The validation cases of the model's fold, as preprocessed for its plans.

    Raises:
        FileNotFoundError: if they are not preprocessed, or the split is unknown.
        ValueError: if the split has no such fold, or none of its cases to validate on.
    """
    base = Path(os.environ["nnUNet_preprocessed"]) / model.predictor.plans_manager.dataset_name
    folder = base / model.predictor.configuration_manager.data_identifier
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no {folder}: preprocess the data set with nnUNetv2_plan_and_preprocess, or give raw files with "
            f"-i and -l"
        )
    kind = infer_dataset_class(str(folder))
    if fold == "all":
        names = list(kind.get_identifiers(str(folder)))
    else:
        splits = base / "splits_final.json"
        if not splits.is_file():
            raise FileNotFoundError(f"there is no {splits}, which says what fold {fold} validates on")
        folds = json.loads(splits.read_text())
        if int(fold) >= len(folds):
            raise ValueError(f"{splits} has {len(folds)} fold(s), there is no fold {fold}")
        names = list(folds[int(fold)]["val"])
        if not names:
            raise ValueError(f"{splits}: fold {fold} has no case to validate on; give raw files with -i and -l")
    missing = sorted(set(names) - set(kind.get_identifiers(str(folder))))
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} case(s) of fold {fold} are not in {folder}: {', '.join(missing[:10])}. Preprocess them "
            f"(nnUNetv2_preprocess), or take them out of {base / 'splits_final.json'}"
        )
    dataset = kind(str(folder), names)

    def load(name: str) -> tuple[np.ndarray, np.ndarray]:
        image, segmentation, _, _ = dataset.load_case(name)
        return _padded(model, np.asarray(image[:]), np.asarray(segmentation[:]))

    return {name: partial(load, name) for name in names}


def raw_cases(model: TrainedModel, images: Path, labels: Path) -> dict[str, Case]:
    """Raw files in nnU-Net's naming (``case_0000.nii.gz`` and ``case.nii.gz``), preprocessed for the model's plans.

    Raises:
        FileNotFoundError: if a folder is missing or holds nothing, or an image has no label file.
        ValueError: for images of other channels than the model's.
    """
    ending = model.predictor.dataset_json["file_ending"]
    for folder in (images, labels):
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}")
    lists = create_lists_from_splitted_dataset_folder(str(images), ending, num_processes=1)
    if not lists:
        raise FileNotFoundError(f"{images} holds no image that ends with _0000{ending}")
    cases = {Path(files[0]).name.removesuffix(f"_0000{ending}"): files for files in lists}
    missing = [name for name in cases if not (labels / f"{name}{ending}").is_file()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} image(s) have no label file in {labels}: {', '.join(missing[:10])}")
    plans, config = model.predictor.plans_manager, model.predictor.configuration_manager
    needed = channels(model.predictor)
    for name in {len(files): name for name, files in cases.items()}.values():  # one for every number of files
        found = len(plans.image_reader_writer_class().read_images(cases[name])[0])
        if found != needed:
            raise ValueError(f"{name} in {images} has {found} channel(s), the model {model.name!r} takes {needed}")
    preprocessor = config.preprocessor_class(verbose=False)
    reader = plans.image_reader_writer_class()

    def load(name: str) -> tuple[np.ndarray, np.ndarray]:
        label = labels / f"{name}{ending}"
        image, properties = reader.read_images(cases[name])
        truth, _ = reader.read_seg(str(label))
        if image.shape[1:] != truth.shape[1:]:
            raise ValueError(
                f"{label} has another shape than its image, {tuple(truth.shape[1:])} for {tuple(image.shape[1:])}"
            )
        given = (image, truth, properties, plans, config, model.predictor.dataset_json)
        data, segmentation, _ = preprocessor.run_case_npy(*given)
        return _padded(model, data, segmentation)

    return {name: partial(load, name) for name in cases}


def _pads(size: Sequence[int], patch_size: Sequence[int]) -> list[tuple[int, int]]:
    """How many voxels nnU-Net puts before and behind, so that an image is no smaller than a patch."""
    missing = [max(0, p - n) for p, n in zip(patch_size, size, strict=True)]
    return [(m // 2, m - m // 2) for m in missing]


def _padded(model: TrainedModel, image: np.ndarray, segmentation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Image and segmentation padded to the patch, in the plane only for a 2D network."""
    patch = model.window.patch_size
    widths = [(0, 0)] * (4 - len(patch)) + _pads(image.shape[-len(patch) :], patch)
    return np.pad(image, widths), np.pad(segmentation.astype(np.int16), widths, constant_values=PADDING)


@dataclass(frozen=True)
class Sample:
    """One thing the network predicts: a slice of a case, or the whole case (``index`` None); ``size`` when padded."""

    case: str
    index: int | None
    size: tuple[int, ...] = ()

    @property
    def id(self) -> str:
        """``case:slice``, or the case."""
        return self.case if self.index is None else f"{self.case}:{self.index}"


def list_samples(model: TrainedModel, cases: dict[str, Case], limit: int | None = None) -> list[Sample]:
    """The samples of the cases, or ``limit`` of them at even distances.

    Raises:
        ValueError: for a case with labels that the model's data set does not declare; they would count as background.
    """
    sizes = {}
    for name in watched(cases, "reading the cases", "cases", shown=place()[0] == 0):
        image, segmentation = cases[name]()
        if strange := undeclared({*np.unique(segmentation).tolist()} - {PADDING}, model.labels):
            raise ValueError(
                f"the segmentation of {name} holds the label(s) {', '.join(map(str, strange))}, which dataset.json "
                f"does not declare; declared are {declaration(model.labels)}. Mend it"
            )
        sizes[name] = image.shape[1:]
    samples = [
        Sample(name, index, size[1:] if model.planar else size)
        for name, size in sizes.items()
        for index in (range(size[0]) if model.planar else [None])
    ]
    return samples if limit is None else spread(samples, limit)


def make_batches(
    model: TrainedModel, cases: dict[str, Case], samples: Sequence[Sample], batch_size: int
) -> list[EvaluationBatch]:
    """Batches of neighbouring slices of one size (once padded, most have the patch's); a case is a batch in 3D.

    The order of the samples stays, so that models with other patches are evaluated on the same list.
    """
    batches = []
    for _, group in itertools.groupby(samples, key=lambda sample: sample.size):
        members = list(group)
        number = batch_size if model.planar else 1
        for start in range(0, len(members), number):
            part = members[start : start + number]
            batches.append(EvaluationBatch([s.id for s in part], partial(_load, model, cases, part)))
    return batches


def subset(
    model: TrainedModel, cases: dict[str, Case], samples: Sequence[Sample], batch_size: int, number: int
) -> list[EvaluationBatch]:
    """Batches of so many of the samples, at even distances."""
    return make_batches(model, cases, spread(samples, number), batch_size)


def _load(model: TrainedModel, cases: dict[str, Case], samples: Sequence[Sample]) -> LoadedBatch:
    device = next(model.window.parameters()).device
    pieces = []
    for case, group in itertools.groupby(samples, key=lambda sample: sample.case):
        image, segmentation = cases[case]()
        for sample in group:
            part = slice(None) if sample.index is None else sample.index
            pieces.append((image[:, part], segmentation[:, part]))
    images, truth = (torch.from_numpy(np.stack(arrays)).to(device) for arrays in zip(*pieces, strict=True))
    images, padding = images.float(), (truth == PADDING)[:, 0]
    target = training_target(model.labels, truth.long().clamp_min(0))  # the training reads -1 as background, too
    objective = InferenceObjective(model.window, model.terms, target)

    def score(inputs: Tensor) -> dict[str, Tensor]:
        return segmentation_counts(model.labels, model.window(inputs), target, padding)._asdict()

    return LoadedBatch(images, objective, score, [truth])


def metrics(planar: bool) -> list[Metric]:
    """Dice as the paper has it: ADI over slices and TVDI in 2D, Dice over cases in 3D."""
    sample = "slice" if planar else "case"
    mean = Metric(
        "ADI" if planar else "Dice",
        lambda scores: adi(Counts.of(scores)),
        description=f"Dice of every {sample}, averaged over the classes that occur in truth or prediction, then over "
        f"{sample}s (arXiv 2206.01736, eq. 3).",
        per_sample=lambda scores: dice_per_sample(Counts.of(scores)).numpy(),
        fails_at=0.5,
        lost_at=0.0,
        is_mean=True,
    )
    total = Metric(
        "TVDI",
        lambda scores: tvdi(Counts.of(scores)),
        description="Dice of the voxels of all samples together, per class, then averaged (eq. 5).",
    )
    return [mean, total] if planar else [mean]


def make_examples(
    models: Sequence[TrainedModel],
    cases: dict[str, dict[str, Case]],
    samples: Sequence[Sample],
    attack: tuple[str, Attack],
    levels: Sequence[float],
    ids: Sequence[str],
    *,
    seed: int = 0,
) -> list[Example]:
    """Samples by their ids, clean and attacked, with every model's predictions.

    The pictures are of an attack of their own with the settings of the evaluation, not of its very noise.

    Args:
        models: the models.
        cases: the cases as preprocessed for each model, by the model's name.
        samples: the samples of the evaluation.
        attack: name and attack.
        levels: noise levels > 0 to show.
        ids: of the samples to show.
        seed: of the random starts.
    """
    first = models[0]
    if first.labels.has_regions:
        return []  # overlapping regions are no label map
    by_id = {sample.id: sample for sample in samples}
    chosen = [by_id[id_] for id_ in ids]
    views: dict[str, list[View]] = {sample.id: [] for sample in chosen}
    pictures: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    name, method = attack
    for model in models:
        for sample in chosen:
            loaded = _load(model, cases[model.name], [sample])
            _, segmentation = cases[model.name][sample.case]()
            middle = _middle(segmentation) if sample.index is None else None
            truth = segmentation[0, sample.index if middle is None else middle]
            pictures.setdefault(sample.id, (_plane(loaded.images, middle), np.maximum(truth, 0)))
            for level, images in at_levels(loaded, method, levels, seed=seed):
                with torch.no_grad():
                    labels = model.window(images).argmax(1)[0].cpu().numpy()
                    dice = float(dice_per_sample(Counts.of(loaded.score(images)))[0])
                views[sample.id].append(
                    View(
                        model.name,
                        name if level > 0 else "",
                        level,
                        _plane(images, middle),
                        labels if middle is None else labels[middle],
                        f"Dice {dice:.2f}",
                    )
                )
    return [Example(sample, *pictures[sample], views=shown) for sample, shown in views.items()]


def _middle(segmentation: np.ndarray) -> int:
    """The slice of a case with most foreground."""
    return int((segmentation[0] > 0).sum((1, 2)).argmax())


def _plane(images: Tensor, middle: int | None) -> np.ndarray:
    """The first channel of the first image, (H, W): a slice, or the given slice of a volume."""
    image = images[0, 0].cpu().numpy()
    return image if middle is None else image[middle]


def _id(dataset: str) -> int | None:
    """Of a data set's name, Dataset004_Hippocampus."""
    digits = dataset.removeprefix("Dataset")[:3]
    return int(digits) if digits.isdigit() else None


def _units(model: TrainedModel) -> tuple[Any, ...]:
    """What the intensities of a model's input are measured in, and its voxels."""
    configuration, plans = model.predictor.configuration_manager, model.predictor.plans_manager
    schemes = list(configuration.normalization_schemes)
    fixed = plans.foreground_intensity_properties_per_channel if "CTNormalization" in schemes else None
    return list(configuration.spacing), schemes, list(configuration.use_mask_for_norm), fixed


@dataclass
class SegmentationEvaluation(EvaluationHost):
    """What nnU-Net's models give to an evaluation.

    Attributes:
        folders: model folders as nnU-Net writes them, by the models' names.
        fold: of each.
        device: where the models are evaluated.
        checkpoint: name of the file in the fold's folder.
        step_size: of the tiles.
        batch_size: slices at a time, in 2D.
        samples: how many are evaluated, None for all.
        raw: folders of images and labels as the user wrote them, in the place of the fold's validation cases.
        dataset: id or name of the data set that the user named.
        configuration: that the user named.
        plans: that the user named, if any.
    """

    packages = ("nnunetv2",)
    task = "segmentation"

    folders: Mapping[str, Path]
    fold: int | str
    device: torch.device
    checkpoint: str
    step_size: float
    batch_size: int
    samples: int | None
    raw: tuple[str, str] | None
    dataset: str
    configuration: str
    plans: str | None = None

    @cached_property
    def models(self) -> list[TrainedModel]:
        """The models, loaded; they predict the same labels, and are what the user named.

        Raises:
            ValueError: if they do not, or are not.
        """
        models = [
            load_model(name, folder, self.fold, self.device, file=self.checkpoint, tile_step_size=self.step_size)
            for name, folder in self.folders.items()
        ]
        first = models[0]
        for model in models:
            self._require_named(model)
            if (model.planar, model.labels.label_dict) != (first.planar, first.labels.label_dict):
                raise ValueError(
                    f"{model.name} and {first.name} do not predict the same: other labels, or 2D against 3D"
                )
        return models

    def _require_named(self, model: TrainedModel) -> None:
        of = str(model.predictor.plans_manager.dataset_name)
        # Raw files may be of anywhere.
        if self.raw is None and not (of == self.dataset or (self.dataset.isdigit() and int(self.dataset) == _id(of))):
            raise ValueError(
                f"the model {model.name!r} was trained on {of}, and its validation cases would be measured, not those "
                f"of -d {self.dataset}. Name its data set, or give raw files with -i and -l"
            )
        if model.configuration != self.configuration:
            raise ValueError(
                f"the model {model.name!r} is of the configuration {model.configuration}, not of -c "
                f"{self.configuration}. Name its own"
            )
        plans = model.predictor.plans_manager.plans_name
        if self.plans is not None and plans != self.plans:
            raise ValueError(
                f"the model {model.name!r} has the plans {plans}, not {self.plans} of -p. Leave -p out, or name its own"
            )

    @property
    def first(self) -> TrainedModel:
        """The first model, which speaks for all of them."""
        return self.models[0]

    @cached_property
    def cases(self) -> dict[str, dict[str, Case]]:
        """The cases as preprocessed for each model, by the model's name."""
        if self.raw is None:
            return {model.name: validation_cases(model, self.fold) for model in self.models}
        return {model.name: raw_cases(model, *map(Path, self.raw)) for model in self.models}

    @cached_property
    def listed(self) -> dict[str, list[Sample]]:
        """The samples of each model, by the model's name.

        Raises:
            ValueError: if one noise level is not the same for all models: inputs of other sizes or units.
        """
        listed = {model.name: list_samples(model, self.cases[model.name], self.samples) for model in self.models}
        first = self.first
        for model in self.models:
            if listed[model.name] != listed[first.name]:
                pairs = zip(listed[model.name], listed[first.name], strict=False)
                example = next((f", {a.id}: {a.size} and {b.size}" for a, b in pairs if a != b), "")
                raise ValueError(
                    f"{model.name} and {first.name} see inputs of other sizes{example}: a noise level is a norm over "
                    f"the whole input, and not the same for both. Evaluate them apart"
                )
            if _units(model) != _units(first):
                raise ValueError(
                    f"the plans of {model.name} and {first.name} resample or normalise images in other ways, so that a "
                    f"noise level is not the same for both. Evaluate them apart"
                )
        return listed

    @cached_property
    def subjects(self) -> list[Subject]:
        """See :attr:`EvaluationHost.subjects`."""
        found = []
        for model in self.models:
            given = (model, self.cases[model.name], self.listed[model.name], self.batch_size)
            batches = make_batches(*given)
            found.append(Subject(model.name, model.checkpoint, batches, model.margins, partial(subset, *given)))
        return found

    def default_levels(self, norm: float) -> list[float]:
        """The paper's levels for hippocampus (2, 6, 10 on 56 x 40 values), scaled to channels x patch."""
        values = channels(self.first.predictor) * math.prod(self.first.window.patch_size)
        size = 1.0 if norm == math.inf else math.sqrt(values)
        return [0.0, *(float(f"{factor * size:.2g}") for factor in (0.04, 0.12, 0.2))]

    @property
    def metrics(self) -> list[Metric]:
        """See :func:`metrics`."""
        return metrics(self.first.planar)

    def examples(
        self, attack: tuple[str, Attack], levels: Sequence[float], ids: Sequence[str], *, seed: int
    ) -> list[Example]:
        """See :func:`make_examples`."""
        return make_examples(self.models, self.cases, self.listed[self.first.name], attack, levels, ids, seed=seed)

    @property
    def groups(self) -> Callable[[str], str] | None:
        """The slices of a case are alike."""
        return (lambda id_: id_.rpartition(":")[0]) if self.first.planar else None

    @property
    def data_name(self) -> str:
        """Of the data set."""
        return str(self.first.predictor.plans_manager.dataset_name)

    @property
    def measured_over(self) -> str:
        """See :attr:`EvaluationHost.measured_over`."""
        sample = "slice" if self.first.planar else "case"
        return f"a whole {sample} as the network receives it, in units of the normalised intensities"

    @property
    def fingerprint(self) -> dict[str, Any]:
        """See :attr:`EvaluationHost.fingerprint`."""
        return {"step_size": self.step_size, "images": "validation" if self.raw is None else self.raw[0]}

    @property
    def class_names(self) -> dict[int, str]:
        """The foreground labels that are single ones."""
        names = self.first.labels.label_dict
        return {value: name for name, value in names.items() if isinstance(value, int) and value > 0}

    @property
    def settings(self) -> dict[str, Any]:
        """See :attr:`EvaluationHost.settings`; of files no more than what is no secret of the user's."""
        sample, name = "slice" if self.first.planar else "case", self.first.name
        source = f"the fold's {len(self.cases[name])} validation cases" if self.raw is None else "raw files"
        return {
            "data set": self.data_name,
            "configuration": self.first.predictor.configuration_manager.data_identifier,
            "fold": str(self.fold),
            "samples": f"{len(self.listed[name])} {sample}s of {source}",
            "prediction": f"tiles (step {self.step_size:g}) inside the attacked function, no mirroring",
            "checkpoints": {model.name: "/".join(model.checkpoint.parts[-3:]) for model in self.models},
        }

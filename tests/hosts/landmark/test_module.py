"""Training against a plain loop, errors and predictions against NumPy, and what else is the landmarks' own."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from PIL import Image
from torch import Tensor

from adv_landmark.maps import encode
from adv_landmark.module import Network, RobustLandmarks, write_predictions
from advmed.testing.lightning import runs, watched_steps
from advmed.training.settings import TrainingSettings
from helpers.hosts import table
from helpers.landmark import NAMES, RADIUS, TINY, Landmark, plain_terms, scaled, write_csv, write_table
from helpers.mistakes import told


def module(**changes: Any) -> RobustLandmarks:
    given = {"network": Network(**TINY), "landmark_names": ["a", "b"], "channels": 1, "size": (32, 48), **changes}
    with torch.random.fork_rng():
        return RobustLandmarks(**given)


def stock() -> smp.Unet:
    """The plain network of the library."""
    return smp.Unet(TINY["encoder"], encoder_weights=None, in_channels=1, classes=9, decoder_channels=(16, 16, 8, 8, 8))


def widened(images: Tensor) -> Tensor:
    """The edge is continued to 64 columns."""
    return torch.cat([images, images[..., -1:].expand(-1, -1, -1, 16)], -1)


def perfect(points: Tensor, size: tuple[int, int] = (32, 48), radius: float = RADIUS) -> Tensor:
    """The maps that a network ought to give."""
    targets = encode(points, size, radius)
    wide = [part.expand(-1, -1, *size) for part in (targets.offset_y, targets.offset_x)]
    return torch.cat([torch.where(targets.disk > 0, 20.0, -20.0), *wide], 1)


# Training


@pytest.mark.slow
@pytest.mark.parametrize(("heatmap", "given", "weight"), [("dice", None, 0.5), ("bce", None, 2.0), ("dice", 1.5, 1.5)])
def test_standard_training_is_the_plain_loop(
    host: Landmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heatmap: str, given: float | None, weight: float
) -> None:
    """PyTorch, the U-Net of the library, and nothing else."""
    watched, begin = watched_steps(monkeypatch, host.module), tmp_path / "begin.pth"
    torch.save(stock().encoder.model.state_dict(), begin)
    changes = {"model__network__weights": begin, "model__heatmap": heatmap, "model__heatmap_weight": given}
    changes |= {"optimizer": "SGD", "optimizer__lr": 0.05, "optimizer__momentum": 0.9, "trainer__max_epochs": 2}
    run = host.fit(tmp_path, **changes)
    start, met = watched.start, watched.ids
    assert [len(ids) for ids in met] == [4] * 4
    assert [sorted(i for ids in part for i in ids) for part in (met[:2], met[2:])] == [sorted(host.ids("train"))] * 2
    for key, value in torch.load(begin, weights_only=True).items():
        name = f"network.model.encoder.model.{key}"
        assert name not in start or torch.equal(start[name], value)
    model, small = stock(), {sample["id"]: sample["image"] for sample in host.read().dataset("train")}
    for name, parameter in model.named_parameters():
        parameter.data.copy_(start[f"network.model.{name}"])
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    model.train()
    for ids in met:
        optimizer.zero_grad()
        maps = model(widened(torch.stack([small[i] for i in ids])))[..., :48]
        points = scaled(host.truth(*ids))
        losses = [plain_terms(m, p, heatmap, weight).sum() for m, p in zip(maps, points, strict=True)]
        torch.stack(losses).mean().backward()
        optimizer.step()
    found = run.weights()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[f"network.model.{name}"], value, atol=2e-4, rtol=1e-3)
    assert max(float((found[name] - value).abs().max()) for name, value in start.items()) > 1e-2


@pytest.mark.slow
def test_a_standard_training_learns_where_the_landmarks_are(host: Landmark, tmp_path: Path) -> None:
    """As a checkpoint shows that is loaded into the plain network of the library, and the table of predictions."""
    losses = host.standard.logged("train/loss")
    assert np.mean(losses[-4:]) < 0.4 * np.mean(losses[:4])
    ours, batch = RobustLandmarks.from_checkpoint(host.standard.last), host.batch("train")
    assert np.nanmedian(host.errors(ours, batch["image"], batch["id"])) < 1  # mm, of 19
    plain, weights = stock(), host.standard.weights()
    assert all(name.startswith("network.model.") for name in weights)
    plain.load_state_dict({name.removeprefix("network.model."): value for name, value in weights.items()})
    images = host.batch("val")["image"]
    torch.testing.assert_close(plain.eval()(widened(images))[..., :48], ours(images))

    words = ["--ckpt_path", host.standard.last, "--trainer.default_root_dir"]
    host.ok("predict", *host.reading(), *words, tmp_path / "usual")
    (usual,) = runs(tmp_path / "usual")
    rows = usual.table("predictions.csv")
    assert [(row["image"], row["landmark_index"]) for row in rows] == [(i, k) for i in host.ids("test") for k in NAMES]
    found = np.array([[float(row["x"]), float(row["y"])] for row in rows]).reshape(3, 3, 2)
    away = np.linalg.norm(found - host.truth(*host.ids("test")), axis=2)
    assert np.median(away) < 3  # pixels of the file
    assert all(0 < float(row["confidence"]) <= 1 for row in rows)
    assert sorted(p.name for p in (usual.folder / "overlays").iterdir()) == [f"{i}.png" for i in host.ids("test")]

    # New images without landmarks, of another size, some in a folder of their own
    (tmp_path / "new" / "second").mkdir(parents=True)
    for name in ("test1.png", "second/test2.png"):
        whole = Image.open(host.root / "images" / Path(name).name)
        whole.resize((96, 80), Image.Resampling.NEAREST).save(tmp_path / "new" / name)
    images = ["--data", "Images", "--data.root", tmp_path / "new", "--data.landmarks", f"[{','.join(NAMES)}]"]
    images += ["--data.size", "[32,48]", "--data.workers", 0, "--trainer.accelerator", "cpu"]
    host.ok("predict", *images, *words, tmp_path / "images")
    (own,) = runs(tmp_path / "images")
    old = {(row["image"], row["landmark_index"]): row for row in rows}
    rows = own.table("predictions.csv")
    assert [row["image"] for row in rows] == ["second/test2.png"] * 3 + ["test1.png"] * 3
    same = [old[Path(row["image"]).name, row["landmark_index"]] for row in rows]
    apart = [abs(float(row[x]) - 2 * float(one[x]) - 0.5) for row, one in zip(rows, same, strict=True) for x in "xy"]
    assert np.median(apart) < 1.5  # the image's edges stay its edges
    overlays = {path.relative_to(own.folder / "overlays").as_posix() for path in own.folder.rglob("overlays/**/*.png")}
    assert overlays == {"second/test2.png.png", "test1.png.png"}
    message = host.fails("evaluate", host.standard.last, *images[:-4], "--split", "test")
    assert message == "no image of the split test has a known landmark to compare with"


@pytest.mark.slow
def test_colour_images_at_their_own_size_train_as_well(host: Landmark, tmp_path: Path) -> None:
    """And with errors in pixels, where there is no SDR, because no spacing is known."""
    root = write_table(tmp_path / "own", mode="RGB", spacing=None)
    changes = {"data__root": root, "data__size": None, "model__method__name": "DPAAT", "model__attack__steps": 1}
    run = host.fit(tmp_path, **changes, model__network__encoder="resnet18")
    model = RobustLandmarks.from_checkpoint(run.last)
    assert (model.hparams["channels"], model.size, model.unit) == (3, (40, 48), "px")
    assert run.yaml("adversarial.yaml")["eps"] == round((3 * 40 * 48 / 96000) ** 0.5, 5)
    assert model(torch.zeros(1, 3, 40, 48)).shape == (1, 9, 40, 48)
    assert "val/MRE" in run.table()[0]
    assert not [name for name in run.table()[0] if "SDR" in name]
    message = host.refused(data__root=root, data__unit="mm")
    assert message.endswith("errors in mm need the pixel spacing: set spacing, mm per pixel, or take unit px")


# Settings


def test_noise_levels_are_the_papers_for_every_value_of_an_image() -> None:
    for values, level in ((3 * 200 * 160, 1), (4 * 3 * 200 * 160, 2)):
        found = RobustLandmarks.resolved(TrainingSettings(), values)
        assert (found.eps, found.delta) == (level, level)
    kept = RobustLandmarks.resolved(TrainingSettings(eps=0.0, delta=0.3), 96000)
    assert (kept.eps, kept.delta) == (0.0, 0.3)
    assert "1 in L2 for an image of 3 x 200 x 160 values" in " ".join((inspect.getdoc(RobustLandmarks) or "").split())


@pytest.mark.parametrize(("given", "radius"), [(None, RADIUS), (1, 1.0), (5.5, 5.5), (15.9, 15.9)])
def test_the_radius_is_a_twentieth_of_the_longer_side(given: float | None, radius: float) -> None:
    model = module(radius=given)
    assert model.radius == radius == model.hparams["radius"]
    disk = model.objective_of(torch.zeros(1, 1, 32, 48), torch.full((1, 2, 2), 9.0)).targets.disk
    assert disk.sum() == 2 * sum((9 - x) ** 2 + (9 - y) ** 2 <= radius**2 for x in range(48) for y in range(32))


@pytest.mark.parametrize(
    ("radius", "size", "shown"),
    [(0.99, (32, 48), "0.99"), (16, (32, 48), "16"), (-3, (32, 48), "-3"), (math.nan, (32, 48), "nan"),
     (None, (16, 19), "0.95"), (None, (8, 200), "10")],
)  # fmt: skip
def test_a_radius_that_does_not_fit_is_refused(radius: float | None, size: tuple[int, int], shown: str) -> None:
    message = (
        f"the radius of a landmark, {shown} pixels, must be at least 1 and fit into the images, which are resized "
    )
    told(
        ValueError, lambda: module(radius=radius, size=size), f"{message}to {size[0]} x {size[1]}: choose another size"
    )


def test_the_weight_of_the_heatmaps() -> None:
    for heatmap, given, weight in (("dice", None, 0.5), ("bce", None, 2.0), ("dice", 3.0, 3.0), ("bce", 0.1, 0.1)):
        model = module(heatmap=heatmap, heatmap_weight=given)
        objective = model.objective_of(torch.zeros(2, 1, 32, 48), torch.full((2, 2, 2), 9.0))
        assert model.heatmap_weight == weight
        assert (objective.heatmap, objective.heatmap_weight) == (heatmap, weight)
        assert (model.hparams["heatmap"], model.hparams["heatmap_weight"]) == (heatmap, given)
    for given in (0.0, -1.0, math.inf, math.nan):
        told(ValueError, lambda given=given: module(heatmap_weight=given), f"heatmap_weight must be > 0, got {given}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__heatmap": "gauss"}, "Got value: gauss"),
        ({"model__heatmap_weight": 0}, "heatmap_weight must be > 0, got 0"),
        ({"model__landmark_names": "[a]"}, "landmark_names"),  # the data's
        ({"model__network__decoder_channels": "[8,8]"}, "decoder_channels must be five numbers >= 1, got [8, 8]"),
        ({"model__network__encoder": "resnet81"}, "there is no encoder 'resnet81'; near names are"),
        ({"model__network__encoder": "qqqq"}, "there is no encoder 'qqqq'; see smp.encoders.get_encoder_names()"),
        ({"model__network__weights": "none.pth"}, "there is no file of weights none.pth"),
        ({"model__radius": 16}, "the radius of a landmark, 16 pixels, must be at least 1 and fit into the images"),
        ({"model__radius": 0.5}, "the radius of a landmark, 0.5 pixels, must be at least 1"),
        ({"data__size": "[16,16]"}, "the radius of a landmark, 0.8 pixels, must be at least 1"),
        ({"data__size": "[0,16]"}, "size must be >= 1, got (0, 16)"),
        ({"data__root": "none"}, "there is no table none/landmarks.csv"),
        ({"data__colour": 1}, "given class_path 'adv_landmark.LandmarkTable'"),
        ({"data__rotate": 200}, "rotate must be between 0 and 180, got 200"),
        ({"data__channels": 2}, "channels must be 1 or 3, got 2"),
        ({"data__origin": "edge"}, "edge"),
        ({"data__spacing": 0}, "spacing must be mm per pixel, > 0"),
    ],
)
def test_mistakes(host: Landmark, changes: dict[str, Any], message: str) -> None:
    assert message in host.refused(**changes)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_whoever_reads_it(host: Landmark, tmp_path: Path, workers: int) -> None:
    root = write_table(tmp_path / "own")
    path = root / "images" / "train3.png"
    path.write_bytes(path.read_bytes()[:-400])
    message = host.fails("fit", *host.words(tmp_path, data__root=root, data__workers=workers))
    assert "images/train3.png cannot be read as an image" in message
    assert "\n" not in message


@pytest.mark.slow
def test_other_landmarks_and_another_loss_are_refused_by_every_command(host: Landmark, tmp_path: Path) -> None:
    checkpoint, two = host.standard.last, write_table(tmp_path / "two", names=("dot", "end"))
    here = f"a U-Net on {TINY['encoder']} for 3 landmarks (corner, dot, end), 1 channel(s), radius 2.4"
    there = here.replace("3 landmarks (corner, dot, end)", "2 landmarks (dot, end)")
    for command in ("validate", "test", "predict"):
        message = host.fails(command, *host.reading(root=two), "--ckpt_path", checkpoint)
        assert message == f"the checkpoint is of {here}, and cannot be loaded into {there}"
    resumed = {"ckpt_path": host.adaptive.last, "trainer__max_epochs": 5, "model__method__name": "AMAT"}
    for changes, other in (
        ({"data__root": write_table(tmp_path / "other", names=("corner", "dot", "middle"))}, ("end", "middle")),
        ({"data__channels": 3}, ("1 channel", "3 channel")),
        ({"model__radius": 4.5}, ("2.4", "4.5")),
        ({"model__network__encoder": "tu-test_resnet"}, (TINY["encoder"], "tu-test_resnet")),
    ):
        message = f"the checkpoint is of {here}, and cannot be loaded into {here.replace(*other)}"
        assert host.refused(**{**resumed, **changes}) == message
    measured = {"model__method__name": "AMAT", "model__method__thresholds": checkpoint}
    compared = "their losses cannot be compared"
    for changes, message in (
        ({"data__root": two}, "finds 3 landmarks (corner, dot, end), the data has 2 (dot, end)"),
        ({"data__channels": 3}, "takes images of 1 channel(s), the data has 3"),
        ({"data__size": "[34,48]"}, "was trained on images of (32, 48), the data's are resized to (34, 48)"),
        (
            {"model__heatmap": "bce", "model__heatmap_weight": 0.5},
            f"was trained with heatmap dice, this training has bce: {compared}",
        ),
        ({"model__heatmap_weight": 1}, f"was trained with heatmap_weight 0.5, this training has 1.0: {compared}"),
        ({"model__radius": 3}, f"was trained with radius 2.4, this training has 3.0: {compared}"),
    ):
        assert host.refused(**measured, **changes) == f"{checkpoint} {message}"
        if all(name.startswith("data") for name in changes):
            words = [word for name, value in changes.items() for word in (f"--{name.replace('__', '.')}", value)]
            for command in ("thresholds", "evaluate"):
                assert host.fails(command, checkpoint, *words) == f"{checkpoint} {message}"


def test_many_landmarks_are_not_all_named_in_a_message() -> None:
    values = {"network": {"encoder": "vgg19"}, "landmark_names": [f"m{k}" for k in range(30)], "channels": 3}
    text = RobustLandmarks.made_of({**values, "radius": 2.5}) or ""
    assert text.startswith("a U-Net on vgg19 for 30 landmarks (m0, m1, ")
    assert text.endswith(", m19, ...), 3 channel(s), radius 2.5")
    assert RobustLandmarks.made_of(values) is None


# Errors and predictions


def test_a_landmark_at_the_radius_itself_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, values = module(unit="mm"), {}
    errors = torch.tensor([[2.0, math.nan], [2.5, 4.0], [0.5, 9.0]])
    monkeypatch.setattr(model, "_all_scores", lambda: {"clean": errors, "attacked": errors + 0.5})
    monkeypatch.setattr(model, "log_dict", lambda given, **_: values.update(given))
    model.on_test_epoch_end()
    assert {name: float(value) for name, value in values.items()} == pytest.approx({
        "test/MRE": 3.6, "test/SDR_2mm": 0.4, "test/SDR_2.5mm": 0.6, "test/SDR_3mm": 0.6, "test/SDR_4mm": 0.8,
        "test/robust_MRE": 4.1, "test/robust_SDR_2mm": 0.2, "test/robust_SDR_2.5mm": 0.4,
        "test/robust_SDR_3mm": 0.6, "test/robust_SDR_4mm": 0.6,
    })  # fmt: skip


def test_errors_of_maps_that_are_true(host: Landmark) -> None:
    """Half a disk to the right and a whole one down, in the unit of the data."""
    batch = host.batch("val")
    known = ~torch.isnan(batch["points"]).any(2)
    model = module(landmark_names=["corner", "dot", "end"], unit="mm")
    for move, unit, wanted in (
        ((0.0, 0.0), "mm", 0.0),
        ((1.2, 0.0), "px", 1.2),
        ((0.0, -2.4), "px", 2.4 / 0.8),
        ((1.2, -2.4), "mm", math.hypot(1.2 * 0.4, 2.4 / 0.8 * 0.5)),
    ):
        model.unit = unit
        error = model.errors(perfect(batch["points"] + torch.tensor(move)), batch)
        assert torch.equal(~torch.isnan(error), known)
        torch.testing.assert_close(error[known], torch.full_like(error[known], wanted), atol=2e-4, rtol=1e-4)


def write_spots(root: Path, origin: float) -> dict[str, np.ndarray]:
    """Two spots in each image, one left and one right; returns their centres as pixels of the file count from 0."""
    places: dict[str, np.ndarray] = {}
    (root / "images").mkdir(parents=True)
    rows, columns = np.ogrid[:40, :48]
    marks, splits = [], []
    for i, split in enumerate(("train", "train", "val", "test", "test")):
        centres = np.array([(7.0 + 2 * i, 9.0 + 3 * i), (39.0 - i, 30.0 - 4 * i)])
        image = sum(np.where((abs(columns - x) <= 2) & (abs(rows - y) <= 2), 255, 0) for x, y in centres)
        Image.fromarray(image.astype(np.uint8)).save(root / "images" / f"{i}.png")
        places[f"{i}.png"] = centres
        splits.append({"image": f"{i}.png", "split": split})
        for landmark, (x, y) in zip("ab", centres, strict=True):
            marks.append({"image": f"{i}.png", "landmark_index": landmark, "x": x + origin, "y": y + origin})
    write_csv(root / "landmarks.csv", marks)
    write_csv(root / "split.csv", splits)
    return places


def spots(images: Tensor) -> Tensor:
    """The centre of mass of the light in the left and in the right half, in pixels of what the network receives."""
    light, halves = (images[:, 0] + 1) / 2, []
    for start, stop in ((0, light.shape[2] // 2), (light.shape[2] // 2, light.shape[2])):
        part = light[:, :, start:stop]
        x, y = torch.arange(start, stop).float(), torch.arange(light.shape[1]).float()
        total = part.sum((1, 2))
        halves.append(torch.stack([(part.sum(1) * x).sum(1) / total, (part.sum(2) * y).sum(1) / total], 1))
    return torch.stack(halves, 1)


@pytest.mark.slow
@pytest.mark.parametrize("origin", ["centre", "corner"])
@pytest.mark.parametrize("size", ["[40,48]", "[80,96]", "[20,48]"])
def test_predictions_of_a_perfect_network_lie_on_the_pixels_of_the_file(
    host: Landmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, origin: str, size: str
) -> None:
    """It sees nothing but images, and its points come back in the table's own coordinates."""
    root = tmp_path / "spots"
    centres = write_spots(root, 0.5 if origin == "corner" else 0.0)
    own = {"data__root": root, "data__origin": origin, "data__size": size, "model__radius": 3}
    checkpoint = host.fit(tmp_path, **own).last

    def forward(self: RobustLandmarks, images: Tensor) -> Tensor:
        return perfect(spots(images), tuple(images.shape[2:]), self.radius)

    monkeypatch.setattr(RobustLandmarks, "forward", forward)
    words = host.words(tmp_path / "found", ckpt_path=checkpoint, **own)
    host.ok("predict", *words)
    (run,) = runs(tmp_path / "found")
    rows = run.table("predictions.csv")
    assert list(rows[0]) == ["image", "landmark_index", "x", "y", "confidence"]
    assert [(row["image"], row["landmark_index"]) for row in rows] == [(i, k) for i in ("3.png", "4.png") for k in "ab"]
    wanted = [row for row in table(root / "landmarks.csv") if row["image"] in ("3.png", "4.png")]
    for row, true in zip(rows, wanted, strict=True):
        for axis in "xy":
            assert float(row[axis]) == pytest.approx(float(true[axis]), abs=0.0101 if size != "[20,48]" else 0.1)
        assert 0.85 < float(row["confidence"]) <= 1
    for name, places in list(centres.items())[3:]:
        shown = np.array(Image.open(run.folder / "overlays" / f"{name}.png"))
        assert shown.shape == (40, 48, 3)
        assert all(tuple(shown[y, x]) == (230, 60, 30) for x, y in places.astype(int))
    host.ok("test", *words)  # the same network has no error in the data's unit
    assert runs(tmp_path / "found")[-1].logged("test/MRE")[0] < 0.05


def test_predictions_of_validation_images_where_there_are_no_others(tmp_path: Path) -> None:
    """Names of images may hold folders, and names of landmarks may be anything."""
    image = tmp_path / "a.png"
    Image.fromarray(np.zeros((6, 400), np.uint8)).save(image)

    class Data:
        landmark_names = ("x,y", "b")

        class Part:
            ids, images = ["sub/a.png"], [image]

        splits: ClassVar = {"val": Part}

    batch = {"id": ["sub/a.png"], "points": torch.tensor([[[1.234, 2.0], [200, -3]]]), "confidence": torch.ones(1, 2)}
    path = write_predictions(tmp_path, [batch], Data)
    assert path == tmp_path / "predictions.csv"
    assert table(path) == [
        {"image": "sub/a.png", "landmark_index": "x,y", "x": "1.23", "y": "2.00", "confidence": "1.0000"},
        {"image": "sub/a.png", "landmark_index": "b", "x": "200.00", "y": "-3.00", "confidence": "1.0000"},
    ]
    assert Image.open(tmp_path / "overlays" / "sub" / "a.png.png").size == (400, 6)

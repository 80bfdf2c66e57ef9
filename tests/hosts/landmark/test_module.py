"""Training against a plain loop, errors and predictions against NumPy, and what else is the landmarks' own."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import default_collate

from adv_landmark.data import LandmarkTable
from adv_landmark.maps import encode
from adv_landmark.module import Network, RobustLandmarks, write_predictions
from advmed.testing.lightning import in_words, runs
from helpers.hosts import table
from helpers.landmark import NAMES, RADIUS, TINY, Landmark, plain_terms, scaled, write_table
from helpers.lightning import check_plain_loop
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


# Training


@pytest.mark.slow
@pytest.mark.parametrize(("heatmap", "given", "weight"), [("dice", 1.5, 1.5), ("bce", None, 2.0)])
def test_standard_training_is_the_plain_loop(
    host: Landmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heatmap: str, given: float | None, weight: float
) -> None:
    """PyTorch, the U-Net of the library, and nothing else."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        maps, points = model(widened(batch["image"]))[..., :48], scaled(host.truth(*batch["id"]))
        return torch.stack([plain_terms(m, p, heatmap, weight).sum() for m, p in zip(maps, points, strict=True)]).mean()

    changes = {"model__heatmap": heatmap, "model__heatmap_weight": given}
    check_plain_loop(host, tmp_path, monkeypatch, host.read(), "encoder.model", stock(), loss, **changes)


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


@pytest.mark.parametrize(("given", "radius"), [(None, RADIUS), (1, 1.0), (5.5, 5.5), (15.9, 15.9)])
def test_the_radius_is_a_twentieth_of_the_longer_side(given: float | None, radius: float) -> None:
    model = module(radius=given)
    assert model.radius == radius == model.hparams["radius"]
    disk = model.objective_of(torch.zeros(1, 1, 32, 48), torch.full((1, 2, 2), 9.0)).targets.disk
    assert disk.sum() == 2 * sum((9 - x) ** 2 + (9 - y) ** 2 <= radius**2 for x in range(48) for y in range(32))


def test_the_weight_of_the_heatmaps() -> None:
    for heatmap, given, weight in (("dice", None, 0.5), ("bce", None, 2.0), ("dice", 3.0, 3.0), ("bce", 0.1, 0.1)):
        model = module(heatmap=heatmap, heatmap_weight=given)
        objective = model.objective_of(torch.zeros(2, 1, 32, 48), torch.full((2, 2, 2), 9.0))
        assert model.heatmap_weight == weight
        assert (objective.heatmap, objective.heatmap_weight) == (heatmap, weight)
        assert (model.hparams["heatmap"], model.hparams["heatmap_weight"]) == (heatmap, given)


RADIUS_IS = "the radius of a landmark, {} pixels, must be at least 1 and fit into the images, which are resized to {}: "


@pytest.mark.parametrize(
    ("given", "message"),
    [
        *(
            ({"heatmap_weight": bad}, f"heatmap_weight must be > 0, got {bad}")
            for bad in (0.0, -1.0, math.inf, math.nan)
        ),
        *(({"radius": bad}, RADIUS_IS.format(f"{bad:g}", "32 x 48")) for bad in (0.99, 16, -3, math.nan)),
        ({"size": (16, 19)}, RADIUS_IS.format("0.95", "16 x 19")),
        ({"size": (8, 200)}, RADIUS_IS.format("10", "8 x 200")),
    ],
)
def test_a_weight_and_a_radius_that_do_not_fit_are_refused(given: dict[str, Any], message: str) -> None:
    told(ValueError, lambda: module(**given), message)


@pytest.mark.slow
def test_other_landmarks_and_another_loss_are_refused_by_every_command(host: Landmark, tmp_path: Path) -> None:
    checkpoint, two = host.standard.last, write_table(tmp_path / "two", names=("dot", "end"))
    here = f"a U-Net on {TINY['encoder']} for 3 landmarks (corner, dot, end), 1 channel(s), radius 2.4"
    refused = f"the checkpoint is of {here}, and cannot be loaded into "
    there = here.replace("3 landmarks (corner, dot, end)", "2 landmarks (dot, end)")
    for command in ("validate", "test", "predict"):
        assert host.fails(command, *host.reading(root=two), "--ckpt_path", checkpoint) == refused + there
    resumed = {"ckpt_path": host.adaptive.last, "trainer__max_epochs": 5, "model__method__name": "AMAT"}
    other = write_table(tmp_path / "other", names=("corner", "dot", "middle"))
    for changes, replaced in (
        ({"data__root": other}, ("end", "middle")),
        ({"data__channels": 3}, ("1 channel", "3 channel")),
        ({"model__radius": 4.5}, ("2.4", "4.5")),
    ):
        assert host.refused(**{**resumed, **changes}) == refused + here.replace(*replaced)
    measured = {"model__method__name": "AMAT", "model__method__thresholds": checkpoint}
    for changes, message in (
        ({"data__root": two}, "finds 3 landmarks (corner, dot, end), the data has 2 (dot, end)"),
        ({"data__channels": 3}, "takes images of 1 channel(s), the data has 3"),
        ({"data__size": "[34,48]"}, "was trained on images of (32, 48), the data's are resized to (34, 48)"),
    ):
        assert host.refused(**measured, **changes) == f"{checkpoint} {message}"
        for command in ("thresholds", "evaluate"):
            assert host.fails(command, checkpoint, *in_words(changes)) == f"{checkpoint} {message}"
    for changes, message in (
        ({"model__heatmap": "bce", "model__heatmap_weight": 0.5}, "heatmap dice, this training has bce"),
        ({"model__heatmap_weight": 1}, "heatmap_weight 0.5, this training has 1.0"),
        ({"model__radius": 3}, "radius 2.4, this training has 3.0"),
    ):
        wanted = f"{checkpoint} was trained with {message}: their losses cannot be compared"
        assert host.refused(**measured, **changes) == wanted


def test_images_of_another_size_are_refused_by_every_command(host: Landmark, tmp_path: Path) -> None:
    run = host.fit(tmp_path)
    last = ["--ckpt_path", run.last, "--trainer.default_root_dir", tmp_path]
    wanted = "the checkpoint was trained on images of (32, 48), the data's are resized to (34, 48)"
    for command in ("validate", "test", "predict"):
        assert host.fails(command, *host.reading(size="[34,48]"), *last) == wanted
    assert host.refused(data__size="[34,48]", ckpt_path=run.last, trainer__max_epochs=2) == wanted
    host.ok("validate", *host.reading(), *last)


def test_many_landmarks_are_not_all_named_in_a_message() -> None:
    values = {"network": {"encoder": "vgg19"}, "landmark_names": [f"m{k}" for k in range(30)], "channels": 3}
    text = RobustLandmarks.made_of({**values, "radius": 2.5}) or ""
    assert text.startswith("a U-Net on vgg19 for 30 landmarks (m0, m1, ")
    assert text.endswith(", m19, ...), 3 channel(s), radius 2.5")
    assert RobustLandmarks.made_of(values) is None


# Errors and predictions


def test_a_landmark_at_the_radius_itself_is_found() -> None:
    """Of landmarks that are known; in pixels there are no radii."""
    errors = torch.tensor([[2.0, math.nan], [2.5, 4.0], [0.5, 9.0]])
    wanted = {"MRE": 3.6, "SDR_2mm": 0.4, "SDR_2.5mm": 0.6, "SDR_3mm": 0.6, "SDR_4mm": 0.8}
    for unit, names in (("mm", list(wanted)), ("px", ["MRE"])):
        found = module(unit=unit).metrics(errors, {})
        assert {name: float(value) for name, value in found.items()} == pytest.approx({n: wanted[n] for n in names})


def test_a_network_is_judged_beside_one_that_does_not_look() -> None:
    """Of landmarks that are in their image; here the mean places are (4, 0) and (7, 7), 4 and 2 mm away on average."""
    place = torch.tensor([[[0.0, 0.0], [5.0, 7.0]], [[8.0, 0.0], [9.0, 7.0]], [[math.nan] * 2] * 2])
    for error, untrained, mediocre in ((1.4, False, False), (1.6, False, True), (2.2, False, True), (2.3, True, True)):
        errors = torch.tensor([[error, error], [error, error], [math.nan, math.nan]])
        judged = module(unit="mm").judge({"error": errors, "place": place})
        assert (judged.untrained, judged.mediocre, judged.value) == (untrained, mediocre, pytest.approx(error))
        assert str(judged) == f"MRE {error} (mm; 3 for every landmark at its mean place)"
    batch = {"points": torch.tensor([[[3.0, 2.0], [-9.0, 2.0]]]), "file_size": torch.tensor([[96.0, 32.0]])}
    batch |= {"image": torch.zeros(1, 1, 32, 48), "spacing": torch.tensor([[0.5, 1.0]])}
    model = module(unit="mm")
    found = model.evidence(model.objective_of(batch["image"], batch["points"]), torch.zeros(1, 6, 32, 48), batch)
    assert found["place"][0, 0].tolist() == [3.0, 2.0]  # 48 pixels are 96 of the file
    assert found["place"][0, 1].isnan().all()
    assert found["error"].isnan().tolist() == [[False, True]]
    truth = model.truth(batch)
    assert truth["place"].tolist() == [[[3.0, 2.0], [-9.0, 2.0]]]
    assert model.evidence_of(found["error"], truth) is None  # one image has no mean place but its own
    both = model.evidence_of(found["error"].repeat(2, 1), {"place": truth["place"].repeat(2, 1, 1)})
    assert both is not None
    assert both["error"].shape == (2, 2)
    assert both["place"].isnan().any(2).tolist() == [[False, True]] * 2


@pytest.mark.parametrize("origin", ["centre", "corner"])
@pytest.mark.parametrize("size", [(40, 48), (80, 96), (20, 48)])
def test_predictions_of_a_perfect_network_are_the_rows_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, origin: Any, size: tuple[int, int]
) -> None:
    """In the table's own coordinates; what is shown lies on the pixels of the files."""
    root = write_table(tmp_path / "own")
    data = LandmarkTable(str(root), origin=origin, size=size, workers=0)
    batch = default_collate(list(data.dataset("test")))
    model = module(landmark_names=NAMES, size=size, radius=3)
    targets = encode(batch["points"], size, 3.0)
    wide = [part.expand(-1, -1, *size) for part in (targets.offset_y, targets.offset_x)]
    maps = torch.cat([torch.where(targets.disk > 0, 20.0, -20.0), *wide], 1)
    monkeypatch.setattr(model, "forward", lambda images: maps)
    path = write_predictions(tmp_path, [model.predict_step(batch, 0)], data)
    assert path == tmp_path / "predictions.csv"
    assert list(table(path)[0]) == ["image", "landmark_index", "x", "y", "confidence"]
    wanted = [row for row in table(root / "landmarks.csv") if row["image"] in batch["id"]]
    for row, true in zip(table(path), wanted, strict=True):
        assert (row["image"], row["landmark_index"]) == (true["image"], true["landmark_index"])
        assert [float(row[axis]) for axis in "xy"] == pytest.approx([float(true[axis]) for axis in "xy"], abs=0.0101)
        assert 0 < float(row["confidence"]) <= 1
        if row["landmark_index"] == "end":  # the last: no name of another is written over it
            shown = np.array(Image.open(tmp_path / "overlays" / f"{row['image']}.png"))
            x, y = (int(float(true[axis]) - data.origin) for axis in "xy")
            assert (shown.shape, tuple(shown[y, x])) == ((40, 48, 3), (230, 60, 30))


def test_predictions_of_validation_images_where_there_are_no_others(tmp_path: Path) -> None:
    """Names of images may hold folders, and names of landmarks may be anything."""
    Image.fromarray(np.zeros((6, 400), np.uint8)).save(tmp_path / "a.png")
    part = SimpleNamespace(ids=["sub/a.png"], images=[tmp_path / "a.png"])
    data = SimpleNamespace(landmark_names=("x,y", "b"), splits={"val": part})
    batch = {"id": ["sub/a.png"], "points": torch.tensor([[[1.234, 2.0], [200, -3]]]), "confidence": torch.ones(1, 2)}
    assert [list(row.values()) for row in table(write_predictions(tmp_path, [batch], data))] == [
        ["sub/a.png", "x,y", "1.23", "2.00", "1.0000"],
        ["sub/a.png", "b", "200.00", "-3.00", "1.0000"],
    ]
    assert Image.open(tmp_path / "overlays" / "sub" / "a.png.png").size == (400, 6)

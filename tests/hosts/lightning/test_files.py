"""What hosts on Lightning share: weights and images from files, and images in batches."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from advmed.integrations.lightning.evaluation import in_batches, picture
from advmed.integrations.lightning.images import header, read_image, tell_of_others
from advmed.integrations.lightning.weights import load_weights
from helpers.mistakes import told


def net(classes: int = 3, channels: int = 2) -> nn.Module:
    return nn.ModuleDict(
        {"body": nn.Sequential(nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4)), "fc": nn.Linear(4, classes)}
    )


@pytest.mark.parametrize(
    ("source", "classes", "lost", "missing"),
    [
        (net(), 5, "", "2 of 9 tensors are missing or have another shape, such as fc.bias, fc.weight"),
        (net(channels=1), 3, "", "1 of 9 tensors are missing or have another shape, such as body.0.weight"),
        (net(), 3, "body.1.running_mean", "such as body.1.running_mean"),
        (nn.Linear(2, 2), 3, "", "9 of 9 tensors"),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, source: nn.Module, classes: int, lost: str, missing: str) -> None:
    """The network stays as it was."""
    path, model = tmp_path / "own.pth", net(classes)
    torch.save({key: value for key, value in source.state_dict().items() if key != lost}, path)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    parts = (f"{path} holds weights of another network", missing)
    told(ValueError, lambda: load_weights(model, path, prefixes=()), *parts)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("content", [b"", b"these are no weights", [1, 2], nn.Linear(2, 2)])
@pytest.mark.parametrize("name", ["own.pth", "own.safetensors"])
def test_files_that_hold_no_weights(tmp_path: Path, name: str, content: Any) -> None:
    path = tmp_path / name
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    message = told(ValueError, lambda: load_weights(net(), path, prefixes=()), str(path))
    assert "cannot be read as a file of weights" in message or "is no file of weights: it holds a list" in message
    path.unlink()
    told(FileNotFoundError, lambda: load_weights(net(), path, prefixes=()), f"there is no file of weights {path}")


# Images


@pytest.mark.parametrize("mode", ["LA", "P", "RGBA", "CMYK"])
def test_an_image_of_every_kind_is_read(tmp_path: Path, mode: str) -> None:
    """As one of colour, with the same greys; what else there is, the data of both hosts are tested with."""
    path = tmp_path / ("own.tif" if mode == "CMYK" else "own.png")
    grey = np.random.default_rng(0).integers(0, 256, (12, 16), dtype=np.uint8)
    Image.fromarray(grey).convert("L" if mode in ("LA", "P") else "RGB").convert(mode).save(path)
    assert (header(path).size, header(path).channels) == ((12, 16), 3)
    for channels in (1, 3):
        image = read_image(path, channels)
        assert (image.shape, image.dtype) == ((channels, 12, 16), torch.uint8)
        np.testing.assert_allclose(image.numpy(), np.broadcast_to(grey, image.shape), atol=1)


def test_images_of_floating_point_numbers_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 12), np.float32)).save(tmp_path / "own.tif")
    message = "own.tif has floating-point pixels, whose range is not known"
    told(ValueError, lambda: read_image(tmp_path / "own.tif", 1), message)


def test_images_that_would_be_read_in_part_are_refused(tmp_path: Path) -> None:
    """All pages but the first, and half of the bits of colours, would be lost."""
    random = np.random.default_rng(0)
    pages = [Image.fromarray(random.integers(0, 256, (8, 12), dtype=np.uint8)) for _ in range(3)]
    for suffix in (".tif", ".png", ".webp"):
        path = tmp_path / f"pages{suffix}"
        pages[0].save(path, save_all=True, append_images=pages[1:])
        message = "has 3 pages, of which only the first would be read: save each as its own image"
        told(ValueError, lambda path=path: header(path), f"{path} {message}")
        pages[0].save(path)
        assert header(path).size == (8, 12)
    deep = random.integers(0, 65536, (8, 12, 4), dtype=np.uint16)
    for kind, channels in (("RGB", 3), ("RGBA", 4), ("LA", 2), ("L", 1)):
        path = tmp_path / f"{kind}.png"
        path.write_bytes(png16(deep[..., :channels]))
        if kind == "L":
            assert header(path).deep
            np.testing.assert_allclose(read_image(path, 1)[0].numpy(), deep[..., 0] / 65535, atol=1e-6)
        else:
            told(ValueError, lambda path=path: header(path), f"{path} has colours, or transparency, of 16 bits")


def png16(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits, (H, W, C), by the specification; Pillow writes none in colour."""
    height, width, channels = pixels.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)), (b"IDAT", zlib.compress(rows))]
    chunks = (
        struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in [*parts, (b"IEND", b"")]
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_files_that_are_not_read_are_counted_in_one_warning(tmp_path: Path) -> None:
    """Notes beside the images are none."""
    for name in ("a.png", "b.gif", "deep/c.JFIF", "deep/d", "notes.txt", "Thumbs.db", ".hidden.heic"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.warns(UserWarning) as caught:
        tell_of_others([tmp_path, tmp_path / "none"], deep=True)
    (message,) = [str(warning.message) for warning in caught]
    assert message.startswith(f"3 file(s) are left out, such as {tmp_path}/b.gif: only .bmp, .jpeg, ")
    with pytest.warns(UserWarning, match=r"1 file\(s\) are left out"):
        tell_of_others([tmp_path])
    (tmp_path / "deep" / "e.DCM").write_bytes(b"")
    message = f"1 file(s) are DICOM, which is not read, such as {tmp_path}/deep/e.DCM: convert them to PNG of 16 bits"
    told(ValueError, lambda: tell_of_others([tmp_path], deep=True), message)


def test_images_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    """None at all, cut off behind their header, or broken in their middle."""
    path = tmp_path / "own.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 400), dtype=np.uint8)).save(path)
    content = path.read_bytes()
    second = content.index(b"IDAT", content.index(b"IDAT") + 4)
    middle = content[:second] + b"\0\1\2\3" + content[second + 4 :]
    for spoilt in (b"no picture", content[:-200], middle):
        path.write_bytes(spoilt)
        told(ValueError, lambda: read_image(path, 1), f"{path} cannot be read as an image: ")
        if spoilt != b"no picture":
            assert header(path).size == (400, 400)
        else:
            told(ValueError, lambda: header(path), f"{path} cannot be read as an image: ")


def test_a_picture_is_grey_or_colour() -> None:
    images = torch.rand(2, 3, 4, 5)
    np.testing.assert_array_equal(picture(images[:, :1]), images[0, 0])
    np.testing.assert_array_equal(picture(images)[2, 3], images[0, :, 2, 3])


# Batches


def test_some_images_are_at_even_distances() -> None:
    def load(indices: Any) -> Any:
        return indices

    def numbers(*limits: int | None) -> list[list[int]]:
        batches = in_batches([f"i{k}" for k in range(12)], 5, load, *limits)
        assert [batch.load() for batch in batches] == [[int(i[1:]) for i in batch.ids] for batch in batches]
        return [list(map(int, batch.load())) for batch in batches]

    assert numbers(None) == numbers(12) == numbers(99) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]
    assert numbers(4) == [[0, 3, 7, 11]]
    assert numbers(1) == [[0]]
    assert numbers(4, 3) == [[0, 3, 11]]  # of those that are evaluated, some are checked
    assert numbers(None, 3) == [[0, 5, 11]]
    assert numbers(4, 32) == numbers(4)
    assert [len(part) for part in numbers(11)] == [5, 5, 1]

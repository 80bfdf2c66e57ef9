"""Files of images: where they are, what they are, and their pixels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from advmed.distributed import from_first_rank, gathered, place
from advmed.files import remember, remembered, state_of
from advmed.progress import watched

DICOM = (".dcm", ".dicom")
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_BESIDE = (".csv", ".db", ".ini", ".json", ".md", ".txt", ".xml", ".yaml", ".yml")
"""Of files that lie beside images and are none, as everybody knows."""
_UNREADABLE = (OSError, ImportError, SyntaxError, ValueError, Image.DecompressionBombError)
"""Pillow's plugins fail each in its own manner."""
_GREY = ("1", "L", "I", "I;16", "I;16B", "I;16L")
_ORIENTATION = 0x0112
"""The tag of EXIF that says how a camera was held."""
_DEEP = 16
_LOOKED_AT = 16
"""Images whose pixels are looked at to tell how many bits they use."""


# Folders


def hidden(path: Path) -> bool:
    """Whether a path in the folder of the data is some program's own: ``.ipynb_checkpoints``, ``._a.png``."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def image_files(folder: Path, *, deep: bool = False) -> list[Path]:
    """The images in a folder, or also in the folders in it, in the order of their names; hidden ones are none."""
    found = folder.rglob("*") if deep else folder.iterdir()
    return sorted(p for p in found if p.suffix.lower() in SUFFIXES and not hidden(p.relative_to(folder)))


def tell_of_others(folders: Iterable[Path], *, deep: bool = False) -> None:
    """Says in one warning what else there is in folders of images, or also in the folders in them, and is not read.

    Raises:
        ValueError: for DICOM files.
    """
    found = [
        path
        for folder in folders
        if folder.is_dir()
        for path in (folder.rglob("*") if deep else folder.iterdir())
        if path.is_file() and not hidden(path.relative_to(folder))
    ]
    others = sorted(path for path in found if path.suffix.lower() not in (*SUFFIXES, *_BESIDE))
    dicom = [path for path in others if path.suffix.lower() in DICOM]
    if dicom:
        raise ValueError(
            f"{len(dicom)} file(s) are DICOM, which is not read, such as {dicom[0]}: convert them to PNG of 16 bits"
        )
    if others:
        rank_zero_warn(
            f"{len(others)} file(s) are left out, such as {others[0]}: only {', '.join(SUFFIXES)} are read as images. "
            f"Convert those that are some"
        )


def files_of(names: Iterable[str], folder: Path) -> dict[str, Path]:
    """The images of a folder by the names that a table has for them, with or without suffix; those that there are.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: for a name without suffix that several images have.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder of images {folder}")
    files = {path.name: path for path in image_files(folder)}
    stems: dict[str, list[Path]] = {}
    for path in files.values():
        stems.setdefault(path.stem, []).append(path)
    found = {}
    for name in names:
        own = [files[name]] if name in files else stems.get(name, [])
        if len(own) > 1:
            shown = ", ".join(path.name for path in own)
            raise ValueError(f"{name} may be any of {shown} in {folder}: write its suffix in the table, too")
        if own:
            found[name] = own[0]
    return found


# Headers


@dataclass(frozen=True)
class Header:
    """What a file says of its image.

    Attributes:
        size: (height, width), turned as viewers show it.
        channels: 1 for a grey image, 3 for colour.
        deep: whether a pixel has more than 8 bits.
        turned: whether the file asks viewers to turn it (EXIF).
    """

    size: tuple[int, int]
    channels: int
    deep: bool
    turned: bool


def header(path: Path) -> Header:
    """Reads only the header of an image.

    Raises:
        ValueError: if it cannot be read as an image, would be read only in part (several pages, colours of 16 bits), or
            has pixels whose range is not known.
    """
    try:
        with Image.open(path) as opened:
            mode, (width, height), orientation = opened.mode, opened.size, _orientation(opened)
            halved, pages = _is_halved(opened), getattr(opened, "n_frames", 1)
            pages = 1 if opened.format == "MPO" else pages  # what cameras put behind their picture is a smaller one
    except _UNREADABLE as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    _check_mode(path, mode)
    if pages > 1:
        raise ValueError(f"{path} has {pages} pages, of which only the first would be read: save each as its own image")
    if halved:
        raise ValueError(
            f"{path} has colours, or transparency, of 16 bits, read with 8: save it with 8 bits, or grey with 16"
        )
    size = (width, height) if orientation >= 5 else (height, width)
    return Header(size, 1 if mode in _GREY else 3, mode.startswith("I"), orientation != 1)


def headers_of(paths: Sequence[Path]) -> list[tuple[Path, Header]]:
    """The paths, each with its header; see :func:`header`."""
    shown = place()[0] == 0
    return [(path, header(path)) for path in watched(paths, "reading headers", "images", shown=shown)]


def common_channels(headers: Sequence[tuple[Path, Header]]) -> int:
    """The channels that all images have.

    Raises:
        ValueError: if some are grey and some in colour.
    """
    first = {head.channels: path for path, head in reversed(headers)}
    if len(first) > 1:
        grey = sum(head.channels == 1 for _, head in headers)
        raise ValueError(
            f"{grey} image(s) are grey, such as {first[1]}, and {len(headers) - grey} in colour, such as {first[3]}: "
            f"set channels to 1 or 3, which all are converted to"
        )
    return next(iter(first))


def common_bits(headers: Sequence[tuple[Path, Header]], bits: int | None) -> int:
    """Bits that the images of more than 8 bits use.

    Args:
        headers: of all images.
        bits: as the user says; None: 16, as the files say.

    Raises:
        ValueError: if pixels are beyond them, or, where the user does not say, use no more than a quarter of the range.
    """
    if bits is not None and not 8 <= bits <= _DEEP:
        raise ValueError(f"bits must be between 8 and {_DEEP}, got {bits}")
    deep = [path for path, head in headers if head.deep]
    looked_at = deep[:: -(-len(deep) // _LOOKED_AT) or 1]
    highest = max((int(_deep_pixels(path, bits or _DEEP).max()) for path in looked_at), default=0)
    used = max(8, highest.bit_length())
    if bits is None and highest and used <= _DEEP - 2:
        raise ValueError(
            f"{len(deep)} image(s) are stored with {_DEEP} bits, such as {deep[0]}, but no pixel of the "
            f"{len(looked_at)} that were looked at is above {highest}: they would use 1/{2 ** (_DEEP - used)} of their "
            f"range. Set bits to what they have ({used + used % 2}, say), or to {_DEEP} if they are meant to be so dark"
        )
    return bits or _DEEP


# Pixels


def open_image(path: Path) -> Image.Image:
    """The decoded file, turned as its header (EXIF) asks.

    Raises:
        ValueError: if it cannot be read as an image.
    """
    try:
        opened = Image.open(path)
        turned, size = _orientation(opened) != 1, opened.size
        opened.load()
    except _UNREADABLE as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    if opened.size != size:  # Pillow 13 reads the pixels of an uncompressed TIFF into rows of the turned image
        raise ValueError(f"{path} cannot be read as an image: Pillow garbles it in turning it; save it as it is shown")
    return ImageOps.exif_transpose(opened) if turned else opened


def read_image(path: Path, channels: int, bits: int = _DEEP) -> Tensor:
    """The pixels, (C, H, W): uint8, or, of an image of 16 bits, float32 in [0, 1].

    Args:
        path: the file.
        channels: 1 or 3; others are converted.
        bits: that an image of 16 bits uses.

    Raises:
        ValueError: if it cannot be read as an image, or has pixels whose range is not known or that are beyond it.
    """
    with open_image(path) as opened:
        _check_mode(path, opened.mode)
        deep = opened.mode.startswith("I")
        array = np.array(opened if deep else opened.convert("L" if channels == 1 else "RGB"))
    if deep:
        grey = torch.from_numpy(_within(path, array, bits).astype(np.float32) / (2**bits - 1))
        return grey[None].expand(channels, -1, -1)
    pixels = torch.from_numpy(array)
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def check_files(paths: Sequence[Path], threads: int, memory: Sequence[Path] = ()) -> None:
    """Reads every image once, for a training must not be the first to find one that is cut off.

    Several processes share the work, and all raise what one of them finds.

    Args:
        paths: of the images.
        threads: that read.
        memory: see :func:`advmed.files.remember`; an image that was read in the state that it is in is not read again.

    Raises:
        ValueError: naming those that cannot be read.
    """
    rank, size = place()
    known = from_first_rank(remembered(memory))
    states = [state_of(path) for path in paths]
    unread = [path for path, state in zip(paths, states, strict=True) if state not in known]
    own = unread[rank::size]
    with ThreadPoolExecutor(max(1, threads)) as pool:
        said = watched(pool.map(_mistake, own), "reading all images once", "images", total=len(own), shown=rank == 0)
        found = [mistake for mistake in said if mistake is not None]
    every = [mistake for part in gathered(found) for mistake in part]
    if every:
        more = f" (and {len(every) - 1} more image(s))" if len(every) > 1 else ""
        raise ValueError(f"{every[0]}{more}")
    if rank == 0 and unread:
        remember(known | dict.fromkeys(states, True), memory)


def _mistake(path: Path) -> str | None:
    try:
        open_image(path).close()
    except ValueError as error:
        return str(error)
    return None


def _deep_pixels(path: Path, bits: int) -> NDArray[Any]:
    with open_image(path) as opened:
        return _within(path, np.array(opened), bits)


def _within(path: Path, pixels: NDArray[Any], bits: int) -> NDArray[Any]:
    if pixels.min() < 0 or pixels.max() >= 2**bits:
        raise ValueError(
            f"{path} has pixels from {pixels.min()} to {pixels.max()}, where {bits} bits hold 0 to {2**bits - 1}"
        )
    return pixels


def _check_mode(path: Path, mode: str) -> None:
    if mode == "F":
        raise ValueError(f"{path} has floating-point pixels, whose range is not known: save it with 8 or 16 bits")


def _is_halved(opened: Image.Image) -> bool:
    """Whether Pillow makes 8 bits of 16, which it does where there is more than one channel."""
    if opened.mode.startswith("I") or opened.format not in ("PNG", "TIFF"):
        return False
    raw = [args if isinstance(args, tuple) else (args,) for _, _, _, args in getattr(opened, "tile", ())]
    return any(";16" in part for args in raw for part in args if isinstance(part, str))


def _orientation(opened: Image.Image) -> int:
    """1: as it is. Pillow turns a TIFF itself; to ask a PNG without such a header would be to decode it."""
    if opened.format == "TIFF" or (opened.format == "PNG" and "exif" not in opened.info):
        return 1
    found = opened.getexif().get(_ORIENTATION, 1)
    return found if found in range(1, 9) else 1

"""What checks say where something is not as promised; unlike ``assert`` also under ``python -O``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def expect(condition: bool | Tensor, message: str) -> None:
    """Raises AssertionError with the message unless the condition, or every entry of it, is true."""
    if not bool(torch.as_tensor(condition).all()):
        raise AssertionError(message)


def expect_same(found: Tensor, expected: Tensor, message: str) -> None:
    """Raises AssertionError unless two tensors agree bit for bit (NaN with NaN, and -0 is not 0)."""
    expect(found.dtype == expected.dtype and found.shape == expected.shape, f"{message}: another type or shape")
    expect(_bits(found) == _bits(expected), message)


def expect_close(found: Tensor, expected: Tensor, message: str, *, rtol: float, atol: float) -> None:
    """Raises AssertionError unless two tensors agree up to rounding."""
    torch.testing.assert_close(
        found, expected, rtol=rtol, atol=atol, equal_nan=True, msg=lambda details: f"{message}: {details}"
    )


def expect_error(kind: type[Exception], function: Callable[[], Any], message: str) -> None:
    """Raises AssertionError unless the function raises an error of that kind."""
    try:
        function()
    except kind:
        return
    except Exception as error:
        raise AssertionError(f"{message}: {type(error).__name__} in place of {kind.__name__}") from error
    raise AssertionError(f"{message}: no {kind.__name__}")


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()

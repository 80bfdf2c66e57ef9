"""What the two Lightning hosts share: module, data, weights, thresholds, evaluation and command.

The one part of ``advmed`` that imports a host framework, and is imported by nothing else in it.
"""

from typing import TYPE_CHECKING

from advmed.lazy import lazy

if TYPE_CHECKING:
    from advmed.integrations.lightning.data import SampleData
    from advmed.integrations.lightning.module import MARGINS, MethodOptions, RobustModule, plain, say

__getattr__ = lazy(
    __name__,
    {"SampleData": "data", **dict.fromkeys(("MARGINS", "MethodOptions", "RobustModule", "plain", "say"), "module")},
)

__all__ = ["MARGINS", "MethodOptions", "RobustModule", "SampleData", "plain", "say"]

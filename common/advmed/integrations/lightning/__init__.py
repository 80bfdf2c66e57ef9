"""What the two Lightning hosts share: module, data, weights, thresholds and command.

The one part of ``common`` that imports a host framework, and is imported by nothing else in ``common``.
"""

from advmed.integrations.lightning.data import SampleData
from advmed.integrations.lightning.module import MARGINS, MethodOptions, RobustModule, plain, say

__all__ = ["MARGINS", "MethodOptions", "RobustModule", "SampleData", "plain", "say"]

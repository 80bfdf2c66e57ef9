"""What the two Lightning hosts share: module, data, weights, thresholds and command.

The one part of ``common`` that imports a host framework, and is imported by nothing else in ``common``.
"""

from common.lightning.data import SampleData
from common.lightning.module import MARGINS, Method, RobustModule, gathered, plain, say

__all__ = ["MARGINS", "Method", "RobustModule", "SampleData", "gathered", "plain", "say"]

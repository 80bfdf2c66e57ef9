"""Training methods: one file per method, each a ``step`` from (objective, images, ids) to a training loss."""

from common.methods.amat import AMAT
from common.methods.at import AT
from common.methods.base import AdaptiveRadiusMethod, AdversarialMethod, Method, Step
from common.methods.dpaat import DPAAT
from common.methods.sat import SAT
from common.methods.std import STD
from common.methods.trades import TRADES

__all__ = ["AMAT", "AT", "DPAAT", "SAT", "STD", "TRADES", "AdaptiveRadiusMethod", "AdversarialMethod", "Method", "Step"]

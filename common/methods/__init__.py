"""Training methods: one file per method, each a ``step`` from (objective, images, ids) to a training loss."""

from common.methods.amat import AMAT
from common.methods.at import AT
from common.methods.base import AdversarialMethod, Method, Step
from common.methods.sat import SAT
from common.methods.std import STD

__all__ = ["AMAT", "AT", "SAT", "STD", "AdversarialMethod", "Method", "Step"]

"""The public names of the host nnU-Net, the one list of them."""

from .objective import SampleTerms as SampleTerms
from .objective import SegmentationObjective as SegmentationObjective
from .settings import Settings as Settings
from .trainer import AdversarialTraining as AdversarialTraining
from .trainer import nnUNetTrainerAMAT as nnUNetTrainerAMAT
from .trainer import nnUNetTrainerAT as nnUNetTrainerAT
from .trainer import nnUNetTrainerDPAAT as nnUNetTrainerDPAAT
from .trainer import nnUNetTrainerFAT as nnUNetTrainerFAT
from .trainer import nnUNetTrainerMART as nnUNetTrainerMART
from .trainer import nnUNetTrainerSAT as nnUNetTrainerSAT
from .trainer import nnUNetTrainerSTD as nnUNetTrainerSTD
from .trainer import nnUNetTrainerTRADES as nnUNetTrainerTRADES

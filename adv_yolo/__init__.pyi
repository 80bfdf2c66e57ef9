"""The public names of the host Ultralytics, the one list of them."""

from .api import attack as attack
from .objective import DetectionObjective as DetectionObjective
from .objective import ImageTerms as ImageTerms
from .objective import per_image_losses as per_image_losses
from .settings import Settings as Settings
from .trainer import AdversarialTraining as AdversarialTraining
from .trainer import AMATDetectionTrainer as AMATDetectionTrainer
from .trainer import ATDetectionTrainer as ATDetectionTrainer
from .trainer import DPAATDetectionTrainer as DPAATDetectionTrainer
from .trainer import FATDetectionTrainer as FATDetectionTrainer
from .trainer import SATDetectionTrainer as SATDetectionTrainer
from .trainer import TRADESDetectionTrainer as TRADESDetectionTrainer

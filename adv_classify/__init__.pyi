"""The public names of the classifiers, the one list of them."""

from .callbacks import BestCheckpoint as BestCheckpoint
from .callbacks import BestStopping as BestStopping
from .data import ClassificationData as ClassificationData
from .data import ImageFolder as ImageFolder
from .data import ImageTable as ImageTable
from .data import MedMNIST as MedMNIST
from .data import Samples as Samples
from .module import ClassifierAttack as ClassifierAttack
from .module import MethodOptions as MethodOptions
from .module import Network as Network
from .module import RobustClassifier as RobustClassifier
from .objective import ClassificationObjective as ClassificationObjective

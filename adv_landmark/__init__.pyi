"""The public names of the landmark detectors, the one list of them."""

from .callbacks import BestCheckpoint as BestCheckpoint
from .callbacks import BestStopping as BestStopping
from .data import ISBI2015 as ISBI2015
from .data import Images as Images
from .data import LandmarkData as LandmarkData
from .data import LandmarkTable as LandmarkTable
from .data import Samples as Samples
from .maps import decode as decode
from .maps import encode as encode
from .module import LandmarkAttack as LandmarkAttack
from .module import MethodOptions as MethodOptions
from .module import Network as Network
from .module import RobustLandmarks as RobustLandmarks
from .objective import LandmarkObjective as LandmarkObjective

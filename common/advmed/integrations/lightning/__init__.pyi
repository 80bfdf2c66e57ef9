"""What the Lightning hosts take from here, the one list of it."""

from .callbacks import BestCheckpoint as BestCheckpoint
from .callbacks import BestStopping as BestStopping
from .data import SampleData as SampleData
from .module import MARGINS as MARGINS
from .module import MethodOptions as MethodOptions
from .module import RobustModule as RobustModule
from .module import plain as plain
from .module import say as say

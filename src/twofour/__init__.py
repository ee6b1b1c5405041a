"""2:4 structured sparsity that is really faster: prune, compress, run, measure.

>>> import torch, twofour
>>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
>>> report = twofour.prune(model, "2:4")
>>> twofour.check(model, "2:4").summary["holds"]
True
"""

from . import errors as errors
from . import kernels as kernels
from . import masks as masks
from . import solvers as solvers
from . import training as training
from .errors import CalibrationError as CalibrationError
from .errors import DeviceError as DeviceError
from .errors import FormatError as FormatError
from .errors import ModelError as ModelError
from .errors import PatternError as PatternError
from .errors import ShapeError as ShapeError
from .errors import TrainingError as TrainingError
from .errors import TwofourError as TwofourError
from .errors import UnsupportedError as UnsupportedError
from .format import SparseMatrix as SparseMatrix
from .format.file import load_matrices as load_matrices
from .format.file import save_matrices as save_matrices
from .nn import QuantizedSparseLinear as QuantizedSparseLinear
from .nn import SparseLinear as SparseLinear
from .nn.fused import unfuse as unfuse
from .pattern import Pattern as Pattern
from .report import Report as Report
from .workflows import check as check
from .workflows import compress as compress
from .workflows import explain as explain
from .workflows import fuse as fuse
from .workflows import load as load
from .workflows import measure as measure
from .workflows import permute as permute
from .workflows import prune as prune
from .workflows import save as save
from .workflows import sensitivity as sensitivity

__version__ = "0.1.0"

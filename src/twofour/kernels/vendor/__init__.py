"""NVIDIA's own kernels by way of torch's operations: cuSPARSELt, and CUTLASS on compute capability 8.x.

A layer holds two tensors. For cuSPARSELt: its compressed buffer, which is opaque behind the values, and the canonical
metadata. For CUTLASS: the values, and its words of metadata (`cutlass_layout.py`). The dtype of the second tells which.

Which places are kept is decided by the canonical metadata alone. NVIDIA's compressor finds them by looking for non-zeros,
so it is never shown the weight: it compresses markers, non-zero at every kept place, and the values are written over them.
"""

from .packing import copy as copy
from .packing import pack as pack
from .packing import to_dense as to_dense
from .packing import unpack as unpack
from .products import linear as linear
from .products import linear_int8 as linear_int8
from .products import products as products
from .support import cusparselt_why_not as cusparselt_why_not
from .support import label as label
from .support import version as version
from .support import why_not as why_not

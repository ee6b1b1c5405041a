"""Modules that join format and kernels."""

from .linear import SparseLinear as SparseLinear
from .linear import SparseWeight as SparseWeight
from .quantized import WEIGHTS as WEIGHTS
from .quantized import QuantizedSparseLinear as QuantizedSparseLinear
from .quantized import quantize_rows as quantize_rows

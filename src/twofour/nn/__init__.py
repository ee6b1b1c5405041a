"""Modules that join format and kernels."""

from .linear import SparseLinear as SparseLinear
from .linear import SparseWeight as SparseWeight

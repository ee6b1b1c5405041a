"""How an N:M matrix is stored: SPEC.md in prose, pack.py in torch, matrix.py the record, file.py on disk."""

from .matrix import SparseMatrix as SparseMatrix
from .pack import pad as pad

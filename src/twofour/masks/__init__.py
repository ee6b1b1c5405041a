"""Which weights survive."""

from .check import PatternCheck as PatternCheck
from .check import check_pattern as check_pattern
from .permute import efficacy as efficacy
from .permute import kept_score as kept_score
from .permute import search_permutation as search_permutation
from .scores import magnitude as magnitude
from .select import keep_best as keep_best
from .select import nm_mask as nm_mask
from .soft import soft_threshold as soft_threshold

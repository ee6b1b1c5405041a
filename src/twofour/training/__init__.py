"""Training with N:M sparsity: what was pruned stays pruned while the rest learns."""

from .fixed import FixedMasks as FixedMasks
from .fixed import keep_masks as keep_masks
from .fixed import masks_of as masks_of

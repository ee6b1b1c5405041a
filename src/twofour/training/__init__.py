"""Training with N:M sparsity: what was pruned stays pruned while the rest learns."""

from .adapters import adapter_parameters as adapter_parameters
from .adapters import adapter_state_dict as adapter_state_dict
from .adapters import add_adapters as add_adapters
from .adapters import load_adapter_state_dict as load_adapter_state_dict
from .adapters import remove_adapters as remove_adapters
from .fixed import FixedMasks as FixedMasks
from .fixed import keep_masks as keep_masks
from .fixed import masks_of as masks_of
from .lora import AdaptedLinear as AdaptedLinear
from .merge import merge_adapters as merge_adapters

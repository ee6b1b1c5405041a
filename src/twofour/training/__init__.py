"""Training with N:M sparsity: from the start, or after pruning with what was pruned held at zero."""

from .activation import SquaredReLU as SquaredReLU
from .activation import squared_relu as squared_relu
from .activation_linear import squared_relu_linear as squared_relu_linear
from .activation_linear import why_dense as why_dense
from .activation_statistics import ActivationObserver as ActivationObserver
from .activation_statistics import ActivationSparsity as ActivationSparsity
from .activation_statistics import activation_sparsity as activation_sparsity
from .activation_statistics import observe_activations as observe_activations
from .adapters import adapter_parameters as adapter_parameters
from .adapters import adapter_state_dict as adapter_state_dict
from .adapters import add_adapters as add_adapters
from .adapters import load_adapter_state_dict as load_adapter_state_dict
from .adapters import remove_adapters as remove_adapters
from .estimate import mvue as mvue
from .fixed import FixedMasks as FixedMasks
from .fixed import keep_masks as keep_masks
from .fixed import masks_of as masks_of
from .lora import AdaptedLinear as AdaptedLinear
from .merge import merge_adapters as merge_adapters
from .moving import MovingMasks as MovingMasks
from .moving import finish_copy as finish_copy
from .moving import move_masks as move_masks
from .schedule import Phase as Phase
from .schedule import Schedule as Schedule
from .sparsify import sparsify_activations as sparsify_activations

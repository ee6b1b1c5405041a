"""Inputs that break kernels, and checks that notice: for tests of your own kernels as for ours.

`strategies` needs hypothesis and is imported on its own: `from twofour.testing import strategies`.
"""

from .cases import hostile_tensor as hostile_tensor
from .cases import hostile_values as hostile_values
from .cases import integer_tensor as integer_tensor
from .cases import random_mask as random_mask
from .cases import sizes_around as sizes_around
from .tolerances import assert_same_bits as assert_same_bits
from .tolerances import assert_within_bound as assert_within_bound

"""The whole-model verbs."""

from .check import check as check
from .compress import compress as compress
from .explain import explain as explain
from .files import load as load
from .files import save as save
from .fuse import fuse as fuse
from .measure import measure as measure
from .permute import permute as permute
from .prune import prune as prune
from .sensitivity import sensitivity as sensitivity

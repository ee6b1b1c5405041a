"""One-shot pruning of one matrix: mask and new weights from the statistics of its inputs."""

from .hessian import Hessian as Hessian
from .solve import METHODS as METHODS
from .solve import Recipe as Recipe
from .solve import Solution as Solution
from .solve import solve as solve

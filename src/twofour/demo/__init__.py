"""The whole way on a real model, offline: prune, compress, save, load, measure all-MiniLM-L6-v2; then a page."""

from .walk import DemoResult as DemoResult
from .walk import run as run

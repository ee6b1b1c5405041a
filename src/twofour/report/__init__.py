"""One record type that every verb returns, and its three faces: table, JSON, HTML."""

from .environment import environment as environment
from .record import Column as Column
from .record import Report as Report

"""Change a model for good: swap its attention for local attention, save it, load it."""

from nearfield.convert.report import Report
from nearfield.convert.store import load, save
from nearfield.convert.swap import convert

__all__ = ["Report", "convert", "load", "save"]

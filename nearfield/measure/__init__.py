"""How local a model's attention is, and what a local pattern would cost it."""

from nearfield.measure.command import run
from nearfield.measure.locality import HeadLocality, Locality, SiteLocality, measure
from nearfield.measure.statistics import HeadStatistics, attention_statistics

__all__ = [
    "HeadLocality",
    "HeadStatistics",
    "Locality",
    "SiteLocality",
    "attention_statistics",
    "measure",
    "run",
]

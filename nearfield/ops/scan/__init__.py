"""Selective scans: the recurrences of Mamba, over sequences and grids, and of Mamba-2."""

from nearfield.ops.scan.grid import selective_scan_2d
from nearfield.ops.scan.selective import ScanResult, selective_scan
from nearfield.ops.scan.ssd import ssd

__all__ = ["ScanResult", "selective_scan", "selective_scan_2d", "ssd"]

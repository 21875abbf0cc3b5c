"""The log of a run: one line of JSON a record, cut back where a run goes on from a checkpoint."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Log:
    """Records in memory, and in a file if there is one to write. `until` is the last step that counts."""

    def __init__(self, path: Path | None, *, until: int, writes: bool):
        self.records: list[Record] = []
        self.path = path
        self.writes = writes and path is not None
        if path is None:
            return
        if path.is_file():
            self.records = [r for r in _read(path) if r["step"] <= until]
        if self.writes:
            partial = path.with_name(f".{path.name}.{os.getpid()}.part")
            partial.write_text("".join(_line(record) for record in self.records), encoding="utf-8")
            partial.replace(path)

    def add(self, record: Record) -> None:
        """Append a record; it is on disk when this returns."""
        self.records.append(record)
        if self.writes and self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(record))


def _line(record: Record) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, ensure_ascii=False) + "\n"


def _read(path: Path) -> list[Record]:
    """The whole lines of a log; what a killed run left half written is no record."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records

"""Results of a bench: the rows, where they were made, and two of them side by side. Needs no torch."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nearfield.core import library

Row = dict[str, Any]
ADVICE = "Give a file that `nearfield bench --json` wrote."
ROW_FIELDS = (
    "case", "direction", "dtype", "backend", "threads", "seconds", "min", "max", "predicted_seconds",
    "useful_gflops", "gemm_gflops", "ratio_to_gemm", "rivals",
)  # fmt: skip
ORIGIN = ("op", "device", "machine", "threads", "versions", "commit", "date")


@dataclass(frozen=True)
class BenchResult:
    """Rows of a bench with the machine, versions, commit, threads and date that made them."""

    op: str
    rows: tuple[Row, ...]
    device: str = "cpu"
    machine: str = ""
    threads: int = 1
    versions: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    date: str = ""
    left_out: tuple[str, ...] = ()

    def json(self) -> dict[str, Any]:
        """One document: provenance, then `rows`, and the rows that time ran out for."""
        document = {**_origin(self), "rows": [dict(row) for row in self.rows]}
        return {**document, "left_out": list(self.left_out)} if self.left_out else document

    def save(self, path: str | Path) -> None:
        """Writes the document; a killed write leaves no half of it behind."""
        path = Path(path)
        partial = path.with_name(f"{path.name}.{os.getpid()}.part")
        partial.write_text(json.dumps(self.json(), indent=1) + "\n")
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> BenchResult:
        """A result that `save` or `nearfield bench --json` wrote. Raises `ValueError` for anything else."""
        try:
            document = json.loads(Path(path).read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no JSON document ({error}). {ADVICE}") from None
        rows = document.get("rows") if isinstance(document, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path} holds no bench rows. {ADVICE}")
        for row in rows:
            missing = [name for name in ROW_FIELDS if name not in row]
            if missing:
                raise ValueError(f"{path}: a row lacks {', '.join(missing)}. {ADVICE}")
        origin = {name: document[name] for name in ORIGIN if name in document}
        left = tuple(document.get("left_out", ()))
        return cls(**{"op": "", **origin}, rows=tuple(rows), left_out=left)

    def __rich__(self) -> Any:
        from nearfield.bench.table import result_table

        return result_table(self)


@dataclass(frozen=True)
class Comparison:
    """Two results row by row: `ratio` = seconds of b / seconds of a, below 1 where b is faster."""

    a: BenchResult
    b: BenchResult
    rows: tuple[Row, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    differs: dict[str, tuple[Any, Any]]

    def json(self) -> dict[str, Any]:
        """One document: paired rows, what stands in one only, and what differs in how they were made."""
        return {
            "a": _origin(self.a),
            "b": _origin(self.b),
            "rows": [dict(row) for row in self.rows],
            "only_a": list(self.only_a),
            "only_b": list(self.only_b),
            "differs": {name: list(pair) for name, pair in self.differs.items()},
        }

    def __rich__(self) -> Any:
        from nearfield.bench.table import comparison_table

        return comparison_table(self)


def compare(a: BenchResult | str | Path, b: BenchResult | str | Path) -> Comparison:
    """Two results, or the files that hold them, side by side.

    Rows are paired by case, direction, dtype, threads and backend; where a problem stands once in each
    result, the backends may differ ("tiled" against "native"). `gemm_relative` compares the rows' shares of
    GEMM, which survive a change of machine better than seconds do.
    """
    a, b = (each if isinstance(each, BenchResult) else BenchResult.load(each) for each in (a, b))
    left, right = _by_key(a.rows), _by_key(b.rows)
    pairs = {key: key for key in left if key in right}
    for key in left.keys() - pairs.keys():
        mine = [other for other in left if other[:-1] == key[:-1]]
        theirs = [other for other in right if other[:-1] == key[:-1]]
        if len(mine) == len(theirs) == 1:
            pairs[key] = theirs[0]
    rows = tuple(_pair(left[key], right[pairs[key]]) for key in left if key in pairs)
    return Comparison(
        a,
        b,
        rows,
        only_a=tuple(_words(key) for key in left if key not in pairs),
        only_b=tuple(_words(key) for key in right if key not in pairs.values()),
        differs={
            name: (getattr(a, name), getattr(b, name))
            for name in ORIGIN[:5]  # another commit and date are what a comparison is for
            if getattr(a, name) != getattr(b, name)
        },
    )


def provenance(device: str, threads: int) -> dict[str, Any]:
    """Where a result is made: machine, versions, commit and date."""
    import torch

    machine = torch.cuda.get_device_name() if device == "cuda" else _processor()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("nearfield", "natten", "triton", "flash-attn-4", "spas_sage_attn"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    if device == "cpu":
        versions["kernels"] = library.isa()
    return {
        "device": device,
        "machine": machine,
        "threads": threads,
        "versions": versions,
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    """The processor by name, its threads and its vector instructions."""
    name = platform.processor() or platform.machine()
    flags: set[str] = set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            label, _, text = line.partition(":")
            if label.strip() == "model name":
                name = text.strip()
            elif label.strip() == "flags":
                flags = set(text.split())
    except OSError:
        pass  # another system than Linux: the plain name will do
    vector = [isa for isa in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if isa in flags]
    return ", ".join([name, f"{os.cpu_count()} threads", *vector])


def _commit() -> str | None:
    """The commit of the checkout around this package, "-dirty" if its files differ; None when installed."""
    package = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        command = ["git", "-C", str(package), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != package.parent:
            return None
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", str(package))
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return None


Key = tuple[str, str, str, int, str]


def _by_key(rows: tuple[Row, ...]) -> dict[Key, Row]:
    names = ("case", "direction", "dtype", "threads", "backend")
    return {tuple(row[name] for name in names): row for row in rows}


def _words(key: Key) -> str:
    case, direction, dtype, threads, backend = key
    return f"{case} {direction} {dtype} ({backend}, {threads} thread{'s' if threads != 1 else ''})"


def _pair(a: Row, b: Row) -> Row:
    return {
        **{name: a[name] for name in ("case", "direction", "dtype", "threads")},
        "backend_a": a["backend"],
        "backend_b": b["backend"],
        "seconds_a": a["seconds"],
        "seconds_b": b["seconds"],
        "ratio": b["seconds"] / a["seconds"],
        "ratio_to_gemm_a": a["ratio_to_gemm"],
        "ratio_to_gemm_b": b["ratio_to_gemm"],
        "gemm_relative": b["ratio_to_gemm"] / a["ratio_to_gemm"],
        # ranges that do not touch: the difference is more than the spread of the repeats
        "is_clear": a["max"] < b["min"] or b["max"] < a["min"],
    }


def _origin(result: BenchResult) -> dict[str, Any]:
    return {name: getattr(result, name) for name in ORIGIN}

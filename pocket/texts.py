"""What the pocket language models read: the prose of docstrings that installed packages carry.

Read by `ast`, never imported. A paragraph that occurs twice is kept once; every twentieth file is held out.
"""

from __future__ import annotations

import ast
import inspect
import re
import sysconfig
import zlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

LICENCES = {
    "python": "PSF-2.0",
    "numpy": "BSD-3-Clause",
    "scipy": "BSD-3-Clause",
    "sklearn": "BSD-3-Clause",
    "skimage": "BSD-3-Clause",
    "sympy": "BSD-3-Clause",
    "networkx": "BSD-3-Clause",
    "matplotlib": "PSF-based (Matplotlib licence)",
    "torch": "BSD-3-Clause",
}
LEFT_OUT = {"test", "tests", "site-packages", "idlelib", "lib2to3", "turtledemo"}
HELD_OUT_EACH = 20


def documents() -> tuple[list[str], list[str]]:
    """Documents to learn from and documents held out, one a file, in the order of packages and paths."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    parts: tuple[list[str], list[str]] = ([], [])
    sources = [(f"topics/{name}", [text]) for name, text in sorted(topics.items())]
    for name, docstrings in (*sources, *_files()):
        kept = [paragraph for text in docstrings for paragraph in _prose(text, seen)]
        if kept:
            parts[zlib.crc32(name.encode()) % HELD_OUT_EACH == 0].append("\n\n".join(kept))
    return parts


def _files() -> Iterator[tuple[str, list[str]]]:
    for package in LICENCES:
        root = Path(sysconfig.get_paths()["stdlib"])
        if package != "python":
            spec = find_spec(package)
            if spec is None or not spec.submodule_search_locations:
                raise ModuleNotFoundError(f"The texts need {package}: pip install 'nearfield[dev,plot]'.")
            root = Path(next(iter(spec.submodule_search_locations)))
        for path in sorted(root.rglob("*.py")):
            place = path.relative_to(root)
            if LEFT_OUT.isdisjoint(place.parts):
                yield f"{package}/{place.as_posix()}", _docstrings(path)


def _docstrings(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_text("utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, documented))
    return [inspect.cleandoc(text) for text in found if text]


def _prose(text: str, seen: set[str]) -> Iterator[str]:
    """The paragraphs that are mostly words, without those that came before."""
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = paragraph.strip("\n")
        canonical = " ".join(paragraph.split())
        words = sum(character.isalpha() or character in " \n,.'" for character in paragraph)
        if len(paragraph) < 40 or ">>>" in paragraph or words < 0.9 * len(paragraph) or canonical in seen:
            continue
        seen.add(canonical)
        yield paragraph

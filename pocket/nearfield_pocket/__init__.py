"""Small trained models to study attention on, without a download: where their files are, and their cards.

Read them with transformers: `LlavaForConditionalGeneration.from_pretrained(path("vlm"), dtype="float32")`.
"""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any

NAMES = ("lm-base", "lm-chat", "vlm")
__version__ = "0.1.0"


def path(name: str) -> Path:
    """The folder of a model, with weights, config, tokenizer and card."""
    if name not in NAMES:
        near = get_close_matches(name, NAMES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"There is no pocket model {name!r}. Choose {', '.join(NAMES)}.{hint}")
    folder = Path(__file__).parent / name.replace("-", "_")
    if not (folder / "model.safetensors").is_file():
        script = "train_vlm.py" if name == "vlm" else "train_lm.py"
        raise FileNotFoundError(f"{folder} holds no weights yet. Train them: python pocket/{script}")
    return folder


def card(name: str) -> dict[str, Any]:
    """What a model was trained on and how, what it can do, and under which licence it is."""
    return json.loads((path(name) / "card.json").read_text(encoding="utf-8"))

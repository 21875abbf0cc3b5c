"""`nearfield measure MODEL`: a model by name, something real to read or look at, and its locality."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from nearfield.data import pictures
from nearfield.data.text import documents
from nearfield.hosts import packaged
from nearfield.measure.locality import Locality, measure
from nearfield.measure.statistics import Rows, Window

TOKENS = 1024
CHARACTERS_A_TOKEN = 16  # more than any tokenizer's average, so that a cut of the text is long enough


def run(
    model: str,
    *,
    tokens: int | None = None,
    text: str | None = None,
    image: str | Path | None = None,
    windows: Sequence[Window] | None = None,
    rows: Rows = "all",
    out: str | Path | None = None,
    progress: Callable[[str, float, float], None] | None = None,
) -> Locality:
    """The locality of a packaged model, a folder, or a hub name that is on this machine.

    Language models read `tokens` tokens of `text` ("python", "wiki" or a file), picture encoders look at
    `image` or at a picture that an installed package carries. `locality.json` and `locality.png` go to `out`.
    """
    tell = progress or (lambda what, done, total: None)
    tell("load the model", 0, 1)
    opened = packaged.find(model)
    host: Any = opened.model
    tell("load the model", 1, 1)
    inputs: dict[str, Any] = {}
    if opened.kind == "image-encoder":
        _refuse("pictures", text=text, tokens=tokens)
        inputs["pixel_values"] = pictures.tensor(image or pictures.shipped()[0], host.config.image_size)[None]
    else:
        _refuse("text", image=image)
        inputs["input_ids"] = token_ids(opened.processor, host.config, tokens, text)
        if opened.kind == "decoder":
            inputs.update(use_cache=False, logits_to_keep=1)
    total = host.config.get_text_config().num_hidden_layers
    done: list[str] = []

    def heard(site: str) -> None:
        done.append(site)
        tell("measure attention", len(done), max(total, len(done)))

    locality = measure(host, windows=windows, rows=rows, progress=heard, name=model, **inputs)
    if out is not None:
        locality.save(out)
    return locality


def token_ids(tokenizer: Any, config: Any, tokens: int | None, text: str | None) -> Tensor:
    """`[1, tokens]` ids from the front of a text source."""
    most = getattr(config, "max_position_embeddings", None)
    if tokens is not None and most is not None and tokens > most:
        raise ValueError(
            f"The model has {most:,} positions and cannot read {tokens:,} tokens. Give --tokens {most}."
        )
    wanted = tokens or min(TOKENS, most or TOKENS)
    source = "\n\n".join(documents(text or "python"))[: wanted * CHARACTERS_A_TOKEN]
    ids = tokenizer(source, return_tensors="pt", truncation=True, max_length=wanted).input_ids
    if ids.shape[1] < (tokens or 2):
        raise ValueError(
            f"The text has {ids.shape[1]:,} tokens, fewer than the {wanted:,} asked. "
            "Give a longer one, or fewer --tokens."
        )
    return ids


def _refuse(kind: str, **options: Any) -> None:
    given = [f"--{name}" for name, value in options.items() if value is not None]
    if given:
        raise ValueError(
            f"The model takes {kind}: {' and '.join(given)} has no meaning for it. Leave it out."
        )

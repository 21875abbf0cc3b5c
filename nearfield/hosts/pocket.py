"""The pocket models of nearfield-pocket, for what is tried on trained ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nearfield.core.errors import MissingPackage, require

SIDE = 16  # of its grid of image tokens


def weights(name: str) -> Path:
    """The folder of a pocket model. Raises `MissingPackage` where it is not installed or not trained."""
    try:
        return Path(require("nearfield_pocket", package="nearfield-pocket").path(name))
    except FileNotFoundError as error:
        raise MissingPackage(str(error)) from None


class Pocket:
    """The vision-language model, its words, and inputs for it."""

    def __init__(self) -> None:
        folder, transformers = weights("vlm"), require("transformers", extra="hf")
        net = transformers.LlavaForConditionalGeneration
        self.model: Any = net.from_pretrained(folder, dtype=torch.float32).eval()
        self.words = transformers.AutoTokenizer.from_pretrained(folder)

    def inputs(self, pixels: Float[Tensor, "b 3 y x"], question: str, answer: str = "") -> dict[str, Tensor]:
        """The same question on normalised pictures, up to a place in the answer."""
        said = f"<user> {question} <assistant>" + f" {answer}" * bool(answer)
        text = "<bos>" + SIDE * SIDE * "<image>" + said
        ids = torch.tensor([self.words(text, add_special_tokens=False)["input_ids"]]).expand(len(pixels), -1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}

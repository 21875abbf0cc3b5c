"""The pocket vision-language model of nearfield-pocket, for what is tried on a trained one."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nearfield.core.errors import MissingPackage, require

SIDE = 16  # of its grid of image tokens


class Pocket:
    """The model, its words, inputs for it. Raises `MissingPackage` where it is not installed or trained."""

    def __init__(self) -> None:
        package = require("nearfield_pocket", package="nearfield-pocket")
        transformers = require("transformers", extra="hf")
        try:
            folder = package.path("vlm")
        except FileNotFoundError as error:
            raise MissingPackage(str(error)) from None
        net = transformers.LlavaForConditionalGeneration
        self.model: Any = net.from_pretrained(folder, dtype=torch.float32).eval()
        self.words = transformers.AutoTokenizer.from_pretrained(folder)

    def inputs(self, pixels: Float[Tensor, "b 3 y x"], question: str, answer: str = "") -> dict[str, Tensor]:
        """The same question on normalised pictures, up to a place in the answer."""
        said = f"<user> {question} <assistant>" + f" {answer}" * bool(answer)
        text = "<bos>" + SIDE * SIDE * "<image>" + said
        ids = torch.tensor([self.words(text, add_special_tokens=False)["input_ids"]]).expand(len(pixels), -1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}

"""Generation from several branches of one model: contrastive decoding, guidance, assembled logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nearfield.core import require

LEFT_OUT = ("num_beams", "return_dict_in_generate", "prompt_lookup_num_tokens", "assistant_model", "streamer")


@dataclass
class Branch:
    """One way of reading: what `model.generate` would be given, and a context that its forwards run in.

    Branch({"input_ids": ids, "pixel_values": masked}, within=lambda: boost(model))
    """

    inputs: Mapping[str, Any]
    within: Callable[[], AbstractContextManager[Any]] = nullcontext


def generate(
    model: nn.Module,
    branches: Sequence[Branch],
    combine: Callable[[list[Float[Tensor, "b vocab"]]], Float[Tensor, "b vocab"]],
    **options: Any,
) -> Int[Tensor, "b tokens"]:
    """Tokens `[B, prompt + new]` of the first branch, each chosen from what all branches expect next.

        def fuse(logits):
            whole, masked = logits
            return (whole + 2 * masked).masked_fill(whole < whole.amax(-1, keepdim=True) + log(0.5), -inf)

        generate(model, [Branch(whole), Branch(masked)], fuse, max_new_tokens=64, do_sample=True)

    `combine` turns the next-token logits of all branches into those that processors, sampling and greedy
    choice see. Every branch has its own prompt, padding, image and cache, and is fed the tokens chosen. If
    the first branch's logits are returned, the tokens are those of `model.generate(**inputs, **options)`,
    draws included. Beams, assistants, streamers and dictionaries are not offered.
    """
    require("transformers", extra="hf")
    _check(model, branches, options)
    with torch.no_grad():
        runs = [_Run(model, branch, options) for branch in branches]
        lead = runs[0]
        tokens, config = lead.tokens, lead.config
        open_rows = torch.ones(len(tokens), dtype=torch.long, device=tokens.device)
        stops_at_eos = any(hasattr(criterion, "eos_token_id") for criterion in lead.criteria)
        scores = ()
        while open_rows.any():
            logits = combine([run.logits() for run in runs])
            if logits.shape != lead.last_shape:
                raise ValueError(
                    f"combine gave {list(logits.shape)}. Give logits of shape {list(lead.last_shape)}."
                )
            weights = lead.processors(tokens, logits)
            if config.do_sample:
                chosen = torch.multinomial(weights.softmax(-1), num_samples=1)[:, 0]
            else:
                chosen = weights.argmax(-1)
            if stops_at_eos:  # rows that have ended are filled up
                chosen = chosen * open_rows + config._pad_token_tensor.to(chosen.device) * (1 - open_rows)
            tokens = torch.cat([tokens, chosen[:, None]], dim=-1)
            for run in runs:
                run.feed(chosen)
            open_rows = open_rows & ~lead.criteria(tokens, scores)
    return tokens


@dataclass
class _Prepared:
    """What `model.generate` hands to its decoding method."""

    tokens: Tensor
    processors: Any
    criteria: Any
    config: Any
    kwargs: dict[str, Any]


class _Run:
    """A branch under way: its tokens and its cache."""

    def __init__(self, model: Any, branch: Branch, options: Mapping[str, Any]):
        self.model = model
        self.branch = branch

        def prepared(
            model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, **rest: Any
        ) -> _Prepared:
            config = rest.pop("generation_config")
            return _Prepared(input_ids, logits_processor, stopping_criteria, config, rest)

        with branch.within():
            given: _Prepared = self.model.generate(**branch.inputs, custom_generate=prepared, **options)
        self.tokens, self.config, self.kwargs = given.tokens, given.config, given.kwargs
        self.processors, self.criteria = given.processors, given.criteria
        self.is_first = True
        self.last_shape = torch.Size()

    def logits(self) -> Tensor:
        """What the branch expects after its tokens."""
        with self.branch.within():
            if self.is_first:
                out = self.model._prefill(self.tokens, self.config, self.kwargs, is_first_iteration=True)
            else:
                length = 1 if self.kwargs.get("use_cache") else None
                given = self.model.prepare_inputs_for_generation(
                    self.tokens, next_sequence_length=length, **self.kwargs
                )
                out = self.model(**given, return_dict=True)
        self.is_first = False
        self.kwargs = self.model._update_model_kwargs_for_generation(out, self.kwargs)
        logits = out.logits[:, -1].to(copy=True, dtype=torch.float32, device=self.tokens.device)
        self.last_shape = logits.shape
        return logits

    def feed(self, chosen: Tensor) -> None:
        self.tokens = torch.cat([self.tokens, chosen[:, None].to(self.tokens.device)], dim=-1)


def _check(model: Any, branches: Sequence[Branch], options: Mapping[str, Any]) -> None:
    from transformers import GenerationMixin

    if not isinstance(model, GenerationMixin):
        raise NotImplementedError(
            f"A {type(model).__name__} has no language head that generates. Give the model with its head, "
            "such as LlamaForCausalLM."
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise NotImplementedError(
            f"{type(model).__name__} keeps its prompt in an encoder. Branches are for decoders only."
        )
    if not branches:
        raise ValueError("branches is empty. Give one Branch at least; the first one's tokens are returned.")
    config = options.get("generation_config") or model.generation_config
    given = {name: options.get(name, getattr(config, name, None)) for name in LEFT_OUT}
    wanted = [name for name, value in given.items() if value and not (name == "num_beams" and value == 1)]
    if wanted:
        raise NotImplementedError(
            f"{', '.join(wanted)} cannot be had from several branches. Leave it out: greedy choice and "
            "sampling are offered."
        )

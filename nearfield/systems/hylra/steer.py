"""Decoding in which few layers choose key blocks and others reuse the choice, as long as a `with` lasts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor, nn

from nearfield.plan.reuse import ReusePolicy
from nearfield.steer import Site, Steer

if TYPE_CHECKING:
    from nearfield.hosts.transformers_blocks import BlockReuse


@dataclass(eq=False)
class HyLRA(Steer):
    """A decoder whose steps behind a filled cache read a part of the keys, by a policy.

    Prompts are read densely.

        policy = hylra_policy(model, input_ids, num_tokens=1024)
        with HyLRA(policy)(model):
            model.generate(input_ids, max_new_tokens=100)

    Layers of the policy that are full, and steps with fewer than `policy.least_tokens` keys, are the host's.
    Nest it with other steers, `with HyLRA(policy)(model), other(model)`: a sum does not tell it the caches.
    """

    policy: ReusePolicy
    sites: str = "self"
    _entered: list[_Entered] = field(default_factory=list, init=False, repr=False)

    def takes(self, site: Site) -> bool:
        entered = self._here()
        return super().takes(site) and site.is_causal and (entered is None or site.layer in entered.layers)

    def attend(
        self,
        site: Site,
        query: Float[Tensor, "b n heads d"],
        key: Float[Tensor, "b m kv_heads d"],
        value: Float[Tensor, "b m kv_heads dv"],
        mask: Tensor | None,
        scale: float,
    ) -> Tensor | None:
        entered, layer = self._here(), site.layer
        if not self.policy.selecting:
            return None
        if entered is None:
            raise RuntimeError(
                "HyLRA is part of a sum, or another thread's. Enter it by itself: with HyLRA(policy)(model), "
                "others(model)."
            )
        if layer is None or self.policy.sources[layer] is None or key.shape[1] < self.policy.least_tokens:
            return None
        return entered.reuse.attend(layer, query, key, value, mask, scale)

    @contextmanager
    def __call__(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model, decoding by the policy in this thread until the `with` ends."""
        from nearfield.hosts.transformers_blocks import block_caches, sparse_layers

        with ExitStack() as stack:
            if not self.policy.selecting:  # nothing to choose, so that caches may stay what they are
                yield stack.enter_context(super().__call__(model))
                return
            reuse = stack.enter_context(block_caches(model, self.policy))
            entered = _Entered(threading.get_ident(), reuse, frozenset(sparse_layers(model)))
            self._entered.append(entered)
            stack.callback(self._entered.remove, entered)
            yield stack.enter_context(super().__call__(model))

    def _here(self) -> _Entered | None:
        """What this thread has entered last."""
        thread = threading.get_ident()
        return next((each for each in reversed(self._entered) if each.thread == thread), None)


@dataclass(eq=False)
class _Entered:
    """A `with` that is under way: its thread, what its steps have chosen, the layers that can be sparse."""

    thread: int
    reuse: BlockReuse
    layers: frozenset[int]

"""The swap itself: patterns into the sites of a model, and back out exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from nearfield.catalog import unknown
from nearfield.convert.report import Report
from nearfield.hosts import seam
from nearfield.hosts.seam import Site
from nearfield.ops.neighborhood import Neighborhood
from nearfield.plan.pattern import SitePlan
from nearfield.plan.reuse import ReusePolicy

# On a converted instance, what `save` writes: site name -> SitePlan, or a ReusePolicy.
PLAN, POLICY = "nearfield_plan", "nearfield_policy"
NUM_SINKS = 4  # first tokens that converted decoders keep in sight unless the pattern says otherwise


def convert(
    model: nn.Module,
    pattern_or_plan: Neighborhood | Mapping[str, SitePlan] | Sequence[SitePlan] | ReusePolicy,
    where: str = "*",
    *,
    example: Mapping[str, Any] | Sequence[Any] | None = None,
) -> Report:
    """The model made local in place, and what changed; `report.restore()` puts everything back.

        report = convert(model, Neighborhood(1024, is_causal=True, num_sinks=4), where="model.layers.1?.*")

    `pattern_or_plan` is one pattern for all heads of the sites whose names match the glob `where`, or a plan
    that names sites itself. transformers models need nothing more; for other hosts `example` (arguments of
    one forward: a mapping, or a sequence) lets their sites be found. A `ReusePolicy` instead leaves prompts
    as they are and makes a transformers decoder's steps read few blocks of its cache.

    Raises `ValueError` where nothing matches, or a pattern does not suit a site; then nothing has changed.
    """
    if getattr(model, PLAN, None) is not None or getattr(model, POLICY, None) is not None:
        raise ValueError("The model is converted already. Call restore() of that conversion's report first.")
    if isinstance(pattern_or_plan, ReusePolicy):
        return _decoding(model, pattern_or_plan)
    found = {site.name: site for site in attention_sites(model, example)}
    skipped: dict[str, str] = {}
    if isinstance(pattern_or_plan, Neighborhood):
        plan = {}
        for name, site in found.items():
            if not fnmatchcase(name, where):
                skipped[name] = f"does not match {where!r}"
            elif site.role != "self":
                skipped[name] = f"is {site.role} attention"
            else:
                plan[name] = SitePlan.uniform(name, site.num_kv_heads, pattern_or_plan)
        if not plan:
            raise ValueError(
                f"No self-attention site matches {where!r}. The sites are: {', '.join(found) or 'none'}."
            )
    else:
        given = pattern_or_plan.values() if isinstance(pattern_or_plan, Mapping) else pattern_or_plan
        plan = {site.name: site for site in given if fnmatchcase(site.name, where)}
        strange = [name for name in plan if found and name not in found]
        if strange:
            raise ValueError(unknown("site", strange[0], found, "The plan belongs to another model."))
        if not plan:
            raise ValueError(f"The plan names no site that matches {where!r}. It must name one at least.")
        skipped = {name: "is not in the plan" for name in found if name not in plan}
    local = {name: site for name, site in plan.items() if not site.is_full}
    return Report(tuple(plan.values()), skipped, _marked(model, PLAN, dict(plan), _install(model, local)))


def _decoding(model: nn.Module, policy: ReusePolicy) -> Report:
    if not is_transformers(model):
        raise NotImplementedError(
            f"A {type(model).__name__} keeps no cache that is known here. Decoding by blocks is for the "
            "decoders of transformers."
        )
    from nearfield.hosts.transformers_blocks import install_reuse

    return Report((), {}, _marked(model, POLICY, policy, install_reuse(model, policy)), policy)


def _marked(model: nn.Module, name: str, what: Any, undo: Callable[[], None]) -> Callable[[], None]:
    """Notes on the model how it is converted; the result undoes both, once."""
    setattr(model, name, what)

    def restore() -> None:
        if getattr(model, name, None) is not None:
            undo()
            delattr(model, name)

    return restore


def attention_sites(model: nn.Module, example: Mapping[str, Any] | Sequence[Any] | None = None) -> list[Site]:
    """The sites of a host: read off a transformers model, or watched in one forward with `example`."""
    if example is not None:
        args, kwargs = ((), example) if isinstance(example, Mapping) else (tuple(example), {})
        return seam.sites(model, *args, **kwargs)
    if is_transformers(model):
        from nearfield.hosts import transformers

        return transformers.sites(model)
    raise ValueError(
        f"The attention sites of a {type(model).__name__} show when it runs. Give example=, the arguments of "
        "one forward."
    )


def is_transformers(model: nn.Module) -> bool:
    """Whether the host is entered through transformers' own door."""
    return "" in seam._transformers_parts(model)


def _install(model: nn.Module, plan: dict[str, SitePlan]) -> Any:
    if is_transformers(model):
        from nearfield.hosts import transformers

        return transformers.install(model, plan)
    from nearfield.hosts import torch_nn

    return torch_nn.install(model, plan)


def default_pattern(site: Site, kernel_size: int | tuple[int, ...]) -> Neighborhood:
    """What `--to neighborhood --kernel-size K` gives a site: a causal window with sinks, or one on a grid."""
    if site.is_causal:
        return Neighborhood(kernel_size, is_causal=True, num_sinks=NUM_SINKS)
    one_dimensional = site.grid is not None and len(site.grid) == 1
    return Neighborhood(kernel_size, border="truncate" if one_dimensional else "shift")


def positions(model: nn.Module) -> int | None:
    """The most tokens that the host was made for, None where it does not say."""
    config = getattr(model, "config", None)
    return getattr(config, "max_position_embeddings", None) if config is not None else None

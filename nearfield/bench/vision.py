"""For `nearfield bench vision`: windows on a map, stages, whole models; beside torch's own and timm's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from nearfield.bench.cases import DIRECTIONS, Direction
from nearfield.bench.resolution import equal_vit, model_macs
from nearfield.bench.rivals import Unfit
from nearfield.build import create
from nearfield.core.backend import VARIABLE
from nearfield.core.errors import MissingPackage, require
from nearfield.measure.flops import count_flops
from nearfield.ops.window import window_attention

RIVALS = ["sdpa", "tiled", "timm", "vit", "vit-tiled"]
ANOTHER = ("timm", "vit", "vit-tiled")  # their weights are not ours
WINDOW, HEAD_DIM = 7, 32
TILES = "b (y v) (x w) h d -> (b y x) h (v w) d"
TWINS = {  # timm's name of the same model
    "convit_small": "convit_small",
    "davit_tiny": "davit_tiny",
    "halonet_h1": "halonet_h1",
    "tnt_small": "tnt_s_legacy_patch16_224",
}
Call = Callable[..., Tensor]


@dataclass(frozen=True)
class Vision:
    """One problem, on `batch` pictures or maps of `side` places.

    `kind` says what runs: attention in windows of 7 on a map of `heads` heads of 32 channels, one stage of a
    model, the first being 0, on what it gets of a picture, or a whole model with its `options`.
    """

    id: str
    kind: Literal["window", "stage", "model"]
    side: int = 224
    batch: int = 1
    heads: int = 0
    model: str = ""
    options: tuple[tuple[str, Any], ...] = ()
    stage: int = 0
    directions: tuple[Direction, ...] = DIRECTIONS
    device: str = "cpu"
    is_hidden: bool = False


def _windows(side: int, heads: int, batch: int) -> Vision:
    return Vision(f"window-{side}-h{heads}-b{batch}", "window", side, batch, heads=heads)


def _stages(model: str, *stages: int) -> tuple[Vision, ...]:
    return tuple(Vision(f"{model}-stage-{n + 1}-b8", "stage", 224, 8, model=model, stage=n) for n in stages)


def _large(model: str, **options: Any) -> Vision:
    """A model where attention over all tokens hurts: only forward, a backward takes most machines' memory."""
    given = tuple(options.items())
    return Vision(f"{model}-896", "model", 896, model=model, options=given, directions=("forward",))


MODELS = (
    "convit_small", "davit_tiny", "ela_resnet50", "halonet_h1", "inline_swin_tiny", "l2vit_tiny",
    "litv2_small", "tnt_small", "uniformer_small",
)  # fmt: skip
CASES: tuple[Vision, ...] = (
    *(_windows(side, heads, b) for b in (1, 8) for side, heads in ((56, 3), (28, 6), (14, 12), (7, 24))),
    *_stages("davit_tiny", 0, 1, 2, 3),
    *_stages("l2vit_tiny", 0, 1, 2, 3),
    *_stages("litv2_small", 2, 3),
    *(
        Vision(f"{model}-224-b{b}", "model", 224, b, model=model, directions=("forward",))
        for model in MODELS
        for b in (1, 8)
    ),
    *map(_large, ("davit_tiny", "l2vit_tiny", "litv2_small")),
    *map(_large, ("inline_swin_tiny", "inline_cswin_tiny", "inline_pvt_tiny")),
    _large("uniformer_small", blocks=("local", "local", "window", "global")),
    Vision("tiny-window", "window", 14, 2, heads=2, is_hidden=True),
    Vision("tiny-stage", "stage", 64, 1, model="davit_tiny", stage=3, is_hidden=True),
    Vision("tiny-model", "model", 32, 2, model="ela_resnet8", is_hidden=True),
)


class Contender(NamedTuple):
    """What is timed: a function of tensors, and the parameters whose gradients a backward wants besides."""

    call: Call
    parameters: tuple[nn.Parameter, ...] = ()


@dataclass(frozen=True)
class Problem:
    """A case made: tensors, and those who compute with them."""

    id: str
    flops: float
    tensors: list[Tensor]
    ours: Contender
    rivals: Mapping[str, Callable[[], Contender]]

    def useful_flops(self, direction: Direction) -> float:
        """Floating point operations; backward twice the forward's, for a product has two factors."""
        return self.flops * (2 if direction == "backward" else 1)


def problem(case: Vision, dtype: str, device: str, backend: str) -> Problem:
    """The case in one dtype on one device; models have random weights and are in evaluation."""
    torch.manual_seed(0)
    kind: dict[str, Any] = {"device": device, "dtype": getattr(torch, dtype)}
    if case.kind == "window":
        shape = (case.batch, case.side, case.side, case.heads, HEAD_DIM)
        tensors = [torch.randn(shape).to(**kind) for _ in range(3)]
        attend = Contender(partial(window_attention, window_size=WINDOW, backend=backend))
        flops = 4.0 * case.batch * case.side**2 * WINDOW**2 * case.heads * HEAD_DIM
        return Problem(case.id, flops, tensors, attend, {"sdpa": lambda: Contender(_in_tiles)})

    make = partial(create, case.model, **dict(case.options))
    net = make().eval()
    flops = 2.0 * case.batch * model_macs(net, (3, case.side, case.side))
    net = net.to(**kind)
    x = torch.randn(case.batch, 3, case.side, case.side).to(**kind)
    if case.kind == "stage":
        with torch.no_grad():
            x = net.embed(x)
            for part in net.stages[: case.stage]:
                x = part(x)
        net = net.stages[case.stage]
        flops = float(count_flops(lambda: net(x)))
    rivals: dict[str, Callable[[], Contender]] = {"tiled": lambda: _on("tiled", net)}
    if case.kind == "model" and case.model in TWINS:
        rivals["timm"] = lambda: _on("auto", _timm(TWINS[case.model], case.side).to(**kind))
    if case.side > 224:
        rivals |= {
            "vit": lambda: _on("auto", equal_vit(make()).eval().to(**kind)),
            "vit-tiled": lambda: _on("tiled", equal_vit(make()).eval().to(**kind)),
        }
    return Problem(case.id, flops, [x], _on(backend, net), rivals)


def _on(backend: str, net: nn.Module) -> Contender:
    """The net with all its operators on one backend; "auto" leaves each its choice."""

    def call(*given: Tensor) -> Tensor:
        with _backend(backend):
            return net(*given)

    return Contender(call, tuple(net.parameters()))


@contextmanager
def _backend(name: str) -> Iterator[None]:
    before = os.environ.get(VARIABLE)
    try:
        if name != "auto":
            os.environ[VARIABLE] = name
        yield
    finally:
        os.environ.pop(VARIABLE, None)
        if before is not None:
            os.environ[VARIABLE] = before


def _in_tiles(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same windows as they are written without a kernel: cut, attended by torch, put together."""
    q, k, v = (rearrange(x, TILES, v=WINDOW, w=WINDOW) for x in (query, key, value))
    batch, rows, columns = (x // s for x, s in zip(query.shape, (1, WINDOW, WINDOW), strict=False))
    out = F.scaled_dot_product_attention(q, k, v)
    whole = "(b y x) h (v w) d -> b (y v) (x w) h d"
    return rearrange(out, whole, b=batch, y=rows, x=columns, v=WINDOW)


def _timm(name: str, side: int) -> nn.Module:
    try:
        models = require("timm", extra="vision")
    except MissingPackage:
        raise Unfit("timm is not installed here") from None
    except RuntimeError as error:  # torchvision of another build of torch
        raise Unfit(f"timm cannot be imported here: {str(error).splitlines()[0]}") from None
    if side != 224:
        raise Unfit("timm's model takes pictures of 224 pixels only")
    return models.create_model(name).eval()

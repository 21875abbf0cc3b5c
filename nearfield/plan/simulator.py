"""What a pattern on a grid costs, before it runs: bounds on the speed-up, from integers alone.

The analysis is that of GNA (arXiv 2504.16922). FLOP-wise: all pairs / visible pairs, what a kernel without
waste gains over full attention. Tile-wise: all tile pairs / visited ones, what a kernel of tiles can gain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nearfield.ops.neighborhood.geometry import Border, Bound, Neighborhood, Tiles
from nearfield.plan.roofline import predict
from nearfield.plan.tiles import Tile, best_tile, permutation_bytes


@dataclass(frozen=True)
class Cost:
    """The cost of a bound pattern in given tiles; `seconds` (ours, full attention) if a device was named."""

    bound: Bound
    q_tile: Tile
    kv_tile: Tile
    tiles: Tiles
    permutation_bytes: int
    seconds: tuple[float, float] | None = None

    @property
    def kept(self) -> float:
        """Visible pairs / all pairs."""
        return self.bound.kept

    @property
    def flop_wise(self) -> float:
        """All pairs / visible pairs."""
        return 1 / self.kept

    @property
    def tile_wise_static(self) -> float:
        """All tile pairs / visited ones, key tiles on a fixed lattice."""
        return self.tiles.dense / self.tiles.static

    @property
    def tile_wise_dynamic(self) -> float:
        """All tile pairs / visited ones, key tiles laid from each window's start."""
        return self.tiles.dense / self.tiles.dynamic

    @property
    def block_sparse(self) -> bool:
        """Whether no visited tile needs a mask."""
        return self.bound.is_block_sparse(self.q_tile, self.kv_tile)

    @property
    def partial_share(self) -> float:
        """Visited tiles that need a mask / visited tiles."""
        return self.tiles.partial_share

    def json(self) -> dict[str, Any]:
        """The machine-readable answer of `nearfield plan`."""
        return {
            "flop_wise": self.flop_wise,
            "tile_wise_static": self.tile_wise_static,
            "tile_wise_dynamic": self.tile_wise_dynamic,
            "block_sparse": self.block_sparse,
            "kept": self.kept,
            "tile": {"q": list(self.q_tile), "kv": list(self.kv_tile)},
            "partial_share": self.partial_share,
            "permutation_bytes": self.permutation_bytes,
        }

    def __rich__(self) -> Any:
        """A table for people."""
        from rich.table import Table

        pattern, axes = self.bound.pattern, self.bound.axes
        settings = [f"kernel size {_sides(axis.kernel_size for axis in axes)}"]
        for word in ("stride", "dilation"):
            if any(getattr(axis, word) > 1 for axis in axes):
                settings.append(f"{word} {_sides(getattr(axis, word) for axis in axes)}")
        settings += ["causal"] if any(axis.is_causal for axis in axes) else []
        settings += [f"{pattern.num_sinks} sinks"] if pattern.num_sinks else []
        table = Table(title=f"{_sides(self.bound.grid)} tokens, {', '.join(settings)}", title_justify="left")
        table.add_column("")
        table.add_column("", justify="right")
        table.add_column("meaning", style="dim")
        where = f"query tile {_sides(self.q_tile)}, key tile {_sides(self.kv_tile)}"
        rows = [
            ("kept", f"{self.kept:.2%}", "visible pairs / all pairs"),
            ("FLOP-wise", f"{self.flop_wise:.1f}×", "speed-up without any waste"),
            ("tile-wise, static", f"{self.tile_wise_static:.1f}×", f"{where}, on a lattice"),
            (
                "tile-wise, dynamic",
                f"{self.tile_wise_dynamic:.1f}×",
                "key tiles laid from each window's start",
            ),
            ("masked tiles", f"{self.partial_share:.0%}", "of the visited ones"),
            ("block-sparse", "yes" if self.block_sparse else "no", "no masks needed"),
            ("permutation", f"{self.permutation_bytes / 2**20:,.0f} MiB", "moved a sample for tile order"),
        ]
        if len(axes) == 1 and axes[0].is_causal:
            tokens = self.bound.num_keys
            half = self.flop_wise * (tokens + 1) / (2 * tokens)
            rows.insert(
                2, ("against causal", f"{half:.1f}×", "FLOP-wise, full causal attention being half already")
            )
        if self.seconds is not None:
            ours, dense = self.seconds
            rows.append(
                ("predicted", f"{ours * 1e3:.3g} ms", f"{dense / ours:.1f}× faster than full attention")
            )
        for row in rows:
            table.add_row(*row)
        return table


def cost(
    tokens: int | tuple[int, ...],
    kernel_size: int | tuple[int, ...],
    *,
    stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
    is_causal: bool | tuple[bool, ...] = False,
    border: Border = "shift",
    num_sinks: int = 0,
    q_tile: int | tuple[int, ...] | None = None,
    kv_tile: int | tuple[int, ...] | None = None,
    heads: int = 1,
    kv_heads: int | None = None,
    head_dim: int = 64,
    value_dim: int | None = None,
    dtype: str = "float16",
    device: str | None = None,
    gemm_gflops: float | None = None,
) -> Cost:
    """What neighborhood attention on a grid of `tokens` costs; a tile that is not given is the best one.

    `heads` and what follows matter to bytes and seconds only. `device` ("h100", "h200", "a100", or "cpu" with
    `gemm_gflops`) adds predicted seconds.
    """
    pattern = Neighborhood(kernel_size, stride, dilation, is_causal, border, num_sinks)
    bound = pattern.on(tokens)
    given = {
        "q_tile": None if q_tile is None else bound.tile_sides("q_tile", q_tile),
        "kv_tile": None if kv_tile is None else bound.tile_sides("kv_tile", kv_tile),
    }
    chosen = best_tile(bound, **given)
    kv_heads, value_dim = kv_heads or heads, value_dim or head_dim
    moved = permutation_bytes(
        bound, *chosen, heads=heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim, dtype=dtype
    )
    seconds = None
    if device is not None:
        sizes: dict[str, Any] = {
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "value_dim": value_dim,
        }
        machine: dict[str, Any] = {"dtype": dtype, "device": device, "gemm_gflops": gemm_gflops}
        ours: dict[str, Any] = {"backend": "native"}  # which has boxes of its own
        if device != "cpu":
            ours = {"backend": "triton", **given}
        seconds = (
            predict(bound, **sizes, **machine, **ours),
            predict(bound, **sizes, **machine, backend="dense"),
        )
    return Cost(bound, *chosen, bound.tiles(*chosen), moved, seconds)


def _sides(sides: Any) -> str:
    return "×".join(map(str, sides))

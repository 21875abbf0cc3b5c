"""The `nearfield` command: parses arguments, calls one function, prints a table or JSON.

Exit status: 0 done, 1 could not be done (one sentence on stderr), 2 wrong usage. With `--json`, stdout holds
one JSON document and nothing else; progress and messages go to stderr.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from nearfield import catalog
from nearfield.ops.neighborhood.geometry import BORDERS

UNITS = {"": 1, "k": 1024, "m": 1024**2}
Progress = Callable[[str, float, float], None]  # what is going on, how much is done, of how much

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `nearfield` command. Always ends in `SystemExit`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        app(arguments, prog_name="nearfield")
    except BrokenPipeError:  # whoever read our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if "--traceback" in arguments:
            raise
        sys.stderr.write(f"nearfield: {sentence(error)}\n")
        sys.exit(1)


def sentence(error: Exception) -> str:
    """What went wrong, for a reader who did not write the code."""
    from nearfield.core.errors import BackendUnavailable

    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    told = (BackendUnavailable, ImportError, LookupError, NotImplementedError, OSError, TypeError, ValueError)
    if isinstance(error, told) and not isinstance(error, (KeyError, IndexError)) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error} (unforeseen; `nearfield --traceback ...` shows where)"


# What an option's text means. A text that means nothing is wrong usage: `typer.BadParameter`, exit status 2.


def count(text: str) -> int:
    """A number of tokens: `4096`, `8k` (8,192), `1m`."""
    found = re.fullmatch(r"(\d+)([km]?)", text.strip().lower())
    if not found or not int(found[1]):
        raise typer.BadParameter(f"{text!r} is no number of tokens. Write 4096, 8k or 1m.")
    return int(found[1]) * UNITS[found[2]]


def counts(text: str) -> tuple[int, ...]:
    """Numbers of tokens: `8k,32k,128k`."""
    return tuple(count(part) for part in text.split(","))


def grid(text: str) -> tuple[int, ...]:
    """Sides of a token grid: `56x56`, `30x48x80`, `32k`."""
    sides = tuple(count(part) for part in text.lower().split("x"))
    if len(sides) > 3:
        raise typer.BadParameter(f"{text!r} has {len(sides)} sides. Write one to three, such as 30x48x80.")
    return sides


def sizes(text: str, sides: tuple[int, ...]) -> tuple[int, ...]:
    """One size per side: `7`, `18x24x24`; `full` is the whole side."""
    parts = text.lower().replace("full", "*").split("x")
    if len(parts) == 1:
        parts *= len(sides)
    if len(parts) != len(sides):
        raise typer.BadParameter(f"{text!r} has {len(parts)} sizes for a grid of {len(sides)} sides.")
    return tuple(side if part == "*" else count(part) for part, side in zip(parts, sides, strict=True))


def share(text: str) -> str:
    """A budget such as `1%` or `0.01`, checked."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(%?)", text.strip())
    if not found or not (found[2] or float(found[1]) < 1):
        raise typer.BadParameter(f"{text!r} is no share. Write 1% or 0.01.")
    return text.strip()


# How an answer reaches the reader.


def say(answer: Any, as_json: bool) -> None:
    """Print `answer.json()` as JSON, or what `answer.__rich__()` shows."""
    if as_json:
        typer.echo(json.dumps(finite(answer.json()), indent=2, ensure_ascii=False, allow_nan=False))
        return
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=int(os.environ.get("COLUMNS", 110)))
    console.print(answer)


def finite(value: Any) -> Any:
    """`value` with null where JSON has no number."""
    if isinstance(value, dict):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def working() -> Iterator[Progress]:
    """A function that shows progress on stderr. Whatever prints to stdout meanwhile lands there too."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with (
        contextlib.redirect_stdout(sys.stderr),
        Progress(*columns, console=Console(stderr=True), redirect_stdout=False, transient=False) as bars,
    ):
        tasks: dict[str, Any] = {}

        def show(what: str, done: float, total: float) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield show


Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout and nothing else.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder for what is written.")]
Text = Annotated[str | None, typer.Option("--text", metavar="FILE", help="A text file, or `wiki`.")]
Tokens = Annotated[str | None, typer.Option("--tokens", metavar="N", help="Tokens per sequence, such as 8k.")]
Budget = Annotated[
    str, typer.Option("--budget", metavar="SHARE", help="Quality that may be lost.", parser=share)
]


@app.callback()
def _options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")] = False,
) -> None:
    """Local attention: convert models to it, measure how local they are, plan what it costs."""


@app.command("list")
def list_(
    kind: Annotated[str | None, typer.Option(help=f"Only this kind: {', '.join(catalog.KINDS)}.")] = None,
    domain: Annotated[str | None, typer.Option(help="Only this domain, such as vision.")] = None,
    json_: Json = False,
) -> None:
    """The systems: one a paper."""
    if kind is not None and kind not in catalog.KINDS:
        raise typer.BadParameter(
            catalog.unknown("kind", kind, catalog.KINDS, "See --help."), param_hint="--kind"
        )
    say(catalog.listing(kind=kind, domain=domain), json_)


@app.command()
def show(
    system: str,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="Whose stages are shown.")
    ] = None,
    json_: Json = False,
) -> None:
    """What one system offers and claims; of a model of pictures also its stages, by default of the first."""
    card = catalog.find(system)
    if model is not None and model not in card.params:
        hint = f"{card.slug} has {', '.join(card.params) or 'none'}."
        raise LookupError(catalog.unknown("model", model, card.params, hint))
    if model is None and not (card.params and "vision" in card.domain):
        say(card, json_)
        return
    from nearfield.measure.outline import shown

    say(shown(card, model), json_)


@app.command()
def run(
    system: str,
    claim: Annotated[str | None, typer.Option(metavar="ID", help="Only this claim.")] = None,
    full: Annotated[bool, typer.Option("--full", help="The long form of the experiments.")] = False,
    out: Out = None,
    json_: Json = False,
) -> None:
    """The experiments behind a system's claims. A claim that fails or is skipped is a result, no error."""
    card = catalog.find(system)
    from nearfield import systems

    with working() as progress:
        report = systems.run(card, claim=claim, full=full, progress=progress)
        if out is not None:
            report.save(out)
    say(report, json_)


@app.command()
def measure(
    model: Annotated[str, typer.Argument(help="A folder, a hub name, or a packaged model.")],
    text: Text = None,
    tokens: Tokens = None,
    image: Annotated[
        str | None, typer.Option("--image", metavar="FILE", help="For models of pictures.")
    ] = None,
    windows: Annotated[
        str | None, typer.Option(metavar="W,W", help="Windows whose share of mass is shown.")
    ] = None,
    out: Out = None,
    json_: Json = False,
) -> None:
    """How local every attention site and head of a model is."""
    length = None if tokens is None else count(tokens)
    inside = None if windows is None else counts(windows)
    from nearfield.measure import run as look

    with working() as progress:
        report = look(
            model, text=text, tokens=length, image=image, windows=inside, out=out, progress=progress
        )
    say(report, json_)


@app.command()
def plan(
    model: Annotated[
        str | None, typer.Argument(help="A model, or its config.json; none for a grid of tokens.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(metavar="N", help="30x48x80 for a grid; 8k,32k for a model.")
    ] = None,
    kernel_size: Annotated[str | None, typer.Option(metavar="K", help="18x24x24; `full` is a size.")] = None,
    stride: Annotated[str, typer.Option(metavar="S", help="Queries that share a window.")] = "1",
    dilation: Annotated[str, typer.Option(metavar="D", help="Distance between keys of a window.")] = "1",
    causal: Annotated[bool, typer.Option("--causal", help="Keys before the query only.")] = False,
    border: Annotated[str, typer.Option(help="shift, truncate or pad.")] = "shift",
    sinks: Annotated[int, typer.Option(min=0, help="First tokens that all see (one dimension).")] = 0,
    tile: Annotated[str | None, typer.Option(metavar="T", help="Tile of queries and of keys.")] = None,
    q_tile: Annotated[str | None, typer.Option(metavar="T", help="Tile of queries.")] = None,
    kv_tile: Annotated[str | None, typer.Option(metavar="T", help="Tile of keys.")] = None,
    budget: Budget = "1%",
    text: Text = None,
    json_: Json = False,
) -> None:
    """What local attention costs, before running it: of a pattern on a grid, of a config.json, of a model."""
    if model is None:
        say(
            _plan_grid(tokens, kernel_size, stride, dilation, causal, border, sinks, tile, q_tile, kv_tile),
            json_,
        )
    elif kernel_size is not None:
        raise typer.BadParameter(
            "is for a grid of tokens. For a model give --tokens and --budget.", param_hint="--kernel-size"
        )
    elif model.endswith(".json"):
        lengths = counts(tokens or "8k,32k,128k")
        from nearfield.plan.config import ceiling

        say(ceiling(Path(model), lengths), json_)
    else:
        length = None if tokens is None else count(tokens)
        from nearfield.convert.main import plan_only

        with working() as progress:
            report = plan_only(model, budget=budget, text=text, tokens=length, progress=progress)
        say(report, json_)


def _plan_grid(
    tokens: str | None,
    kernel_size: str | None,
    stride: str,
    dilation: str,
    causal: bool,
    border: Any,
    sinks: int,
    tile: str | None,
    q_tile: str | None,
    kv_tile: str | None,
) -> Any:
    if border not in BORDERS:
        raise typer.BadParameter(
            f"{border!r} is unknown. Choose {', '.join(BORDERS)}.", param_hint="--border"
        )
    if tokens is None or kernel_size is None:
        raise typer.BadParameter("Give a MODEL, or --tokens and --kernel-size.", param_hint="plan")
    if tile is not None and (q_tile or kv_tile):
        raise typer.BadParameter("stands for --q-tile and --kv-tile. Give it or them.", param_hint="--tile")
    if (q_tile is None) != (kv_tile is None):
        raise typer.BadParameter("--q-tile and --kv-tile belong together.", param_hint="--q-tile")
    sides = grid(tokens)
    tiles = [None if t is None else sizes(t, sides) for t in (tile or q_tile, tile or kv_tile)]
    from nearfield.plan import cost

    return cost(
        sides,
        sizes(kernel_size, sides),
        stride=sizes(stride, sides),
        dilation=sizes(dilation, sides),
        is_causal=causal,
        border=border,
        num_sinks=sinks,
        q_tile=tiles[0],
        kv_tile=tiles[1],
    )


@app.command()
def convert(
    model: Annotated[str | None, typer.Argument(help="A folder, a hub name, or a packaged model.")] = None,
    to: Annotated[str, typer.Option(help="`auto`, `neighborhood`, or a plan's JSON file.")] = "auto",
    kernel_size: Annotated[str | None, typer.Option(metavar="K", help="With --to neighborhood.")] = None,
    budget: Budget = "1%",
    text: Text = None,
    tokens: Tokens = None,
    out: Out = None,
    quick: Annotated[bool, typer.Option("--quick", help="2,048 tokens and fewer slices: minutes.")] = False,
    purpose: Annotated[
        str, typer.Option("--for", help="prefill, or decode: steps that read few blocks of a long cache.")
    ] = "prefill",
    json_: Json = False,
) -> None:
    """Make a model local: measure, plan within the quality budget, swap, compare, save."""
    if purpose not in ("prefill", "decode"):
        raise typer.BadParameter(f"{purpose!r} is unknown. Choose prefill or decode.", param_hint="--for")
    if purpose == "decode" and kernel_size is not None:
        raise typer.BadParameter("is for prefill: a step reads blocks instead.", param_hint="--kernel-size")
    if (to == "neighborhood") != (kernel_size is not None):
        raise typer.BadParameter("--to neighborhood and --kernel-size belong together.", param_hint="--to")
    if to not in ("auto", "neighborhood") and not to.endswith(".json"):
        raise typer.BadParameter(
            f"{to!r} is unknown. Choose auto, neighborhood, or a .json plan.", param_hint="--to"
        )
    kernel = None if kernel_size is None else grid(kernel_size)
    length = None if tokens is None else count(tokens)
    from nearfield.convert.main import run as make_local

    with working() as progress:
        report = make_local(
            model,
            to=to,
            budget=budget,
            text=text,
            tokens=length,
            out=out,
            quick=quick,
            kernel_size=kernel if kernel is None or len(kernel) > 1 else kernel[0],
            purpose=purpose,
            progress=progress,
        )
    say(report, json_)


@app.command()
def train(
    system: Annotated[str, typer.Argument(help="A system with a recipe, or a recipe's own TOML file.")],
    data: Annotated[
        str | None, typer.Option(metavar="DIR|NAME", help="Data, for recipes that let you choose.")
    ] = None,
    out: Out = None,
    steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Steps, instead of the recipe's.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Another setting: lr=1e-3; may be given again."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Go on from the last checkpoint, or begin anew.")
    ] = True,
    json_: Json = False,
) -> None:
    """Train a system by its recipe. Several processes: `accelerate launch -m nearfield train SYSTEM`."""
    from nearfield.train.command import run as train_system

    with working() as progress:
        result = train_system(
            system,
            data=data,
            out=out,
            steps=steps,
            settings=tuple(settings or ()),
            resume=resume,
            progress=progress,
        )
    if result is not None:  # only the first of several processes answers
        say(result, json_)


@app.command()
def bench(
    op: Annotated[
        str, typer.Argument(help="The operators: neighborhood, linear, lla, scan, or vision models.")
    ] = "neighborhood",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    case: Annotated[
        list[str] | None, typer.Option("--case", metavar="ID", help="Only this case; may be given again.")
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option("--dtype", help="float32, bfloat16, float16.")] = None,
    direction: Annotated[list[str] | None, typer.Option("--direction", help="forward, backward.")] = None,
    backend: Annotated[str, typer.Option("--backend", help="The backend that is timed.")] = "auto",
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads.")] = 1,
    rivals: Annotated[bool, typer.Option("--rivals", help="Time rivals beside it.")] = False,
    rival: Annotated[
        list[str] | None, typer.Option("--rival", metavar="NAME", help="Only this rival; may be given again.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option("--minutes", min=0, help="No row and no rival begins after so long.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="A file that after every row holds what was measured."),
    ] = None,
    against: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--compare", metavar="A B", help="Two result files side by side, nothing timed."),
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Measure boxes and executors on this GPU, and keep the fastest.")
    ] = False,
    tune_seconds: Annotated[
        float, typer.Option("--tune-seconds", min=1, help="Nothing new is measured after so long.")
    ] = 120.0,
    json_: Json = False,
) -> None:
    """Timed beside predicted cost, and beside a matrix product of the same machine."""
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{device!r} is unknown. Choose cpu or cuda.", param_hint="--device")
    if against is not None:
        from nearfield.bench import compare

        say(compare(*against), json_)
        return
    chosen: dict[str, Any] = {"dtypes": tuple(dtype or ()), "directions": tuple(direction or ())}
    chosen = {name: given for name, given in chosen.items() if given}
    if tune:
        if op != "neighborhood":
            raise typer.BadParameter(f"{op!r} has nothing to tune. Choose neighborhood.", param_hint="--tune")
        from nearfield.bench.tune import tune as measure_candidates

        with working() as progress:
            found = measure_candidates(
                device=device, cases=case, seconds=tune_seconds, progress=progress, **chosen
            )
        say(found, json_)
        return
    from nearfield.bench import run as time_cases

    with working() as progress:
        report = time_cases(
            op,
            device=device,
            cases=case,
            backend=backend,
            rivals=tuple(rival) if rival else rivals,
            threads=threads,
            minutes=minutes,
            out=out,
            progress=progress,
            **chosen,
        )
    say(report, json_)

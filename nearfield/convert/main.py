"""`nearfield convert`: measure every attention site, plan within a quality budget, swap, compare, save.

The plan is made on a calibration passage (text that hides pass keys), tried there, and judged on text and
lookup prompts that it never saw. A plan that is judged over the budget is tightened and judged again; how
often is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import log1p
from pathlib import Path
from statistics import median
from typing import Any

from torch import nn

from nearfield.convert.decoder import Decoder, Judged, Judgement, Trial, judge
from nearfield.convert.decoding_report import DecodeConversion, decode_page
from nearfield.convert.report import Conversion, EncoderConversion, Planned, Point
from nearfield.convert.search import Planner, planner_of
from nearfield.convert.store import save
from nearfield.convert.swap import NUM_SINKS, attention_sites, convert, default_pattern, positions
from nearfield.hosts import packaged
from nearfield.ops.neighborhood import Neighborhood
from nearfield.plan.pattern import SitePlan, plan_from_json, read_json
from nearfield.plan.reuse import ReusePolicy

DEFAULT_MODEL = "smollm2-135m"
PURPOSES = ("prefill", "decode")
DEFAULT_TOKENS, QUICK_TOKENS = 8192, 2048
TRIALS = 3  # real runs of whole plans on the calibration passage, before the judgement
JUDGEMENTS = 4  # of ever more careful plans; the last is full attention everywhere
AIM = 0.45  # share of the budget to use on the passage that the plan was made for: other text loses more
LEAST_TOKENS = 512  # below, prompts of an eighth of that leave no text around their keys
ANSWER_LIMIT = 0.05  # nats per token of a pass key that a plan may add on the calibration passage
RECALL_WEIGHT = 0.3  # nats of text loss that a nat of answer loss counts for, at first

Tell = Callable[[str, float, float], None]


def run(
    model: str | None = None,
    *,
    to: str = "auto",
    budget: str | float = "1%",
    text: str | None = None,
    tokens: int | None = None,
    out: str | Path | None = None,
    quick: bool = False,
    kernel_size: int | tuple[int, ...] | None = None,
    seed: int = 0,
    purpose: str = "prefill",
    progress: Tell | None = None,
) -> Conversion | EncoderConversion | DecodeConversion:
    """The main job: MODEL made local within `budget`, and what that changed.

    `to` is "auto", "neighborhood" (one pattern of `kernel_size` everywhere) or a plan's JSON file; `budget`
    the largest relative rise of perplexity (for encoders: mean 1 - cosine of features). `out`, if given,
    receives the converted model, report.json and report.html.

    `purpose="decode"` leaves prompts as they are and makes a decoder's steps read few blocks of its cache;
    `to` is then "auto" or a policy's JSON file.
    """
    share = _share(budget)
    if purpose not in PURPOSES:
        raise ValueError(f"purpose={purpose!r} is unknown. Choose {' or '.join(PURPOSES)}.")
    if purpose == "decode" and (to == "neighborhood" or kernel_size is not None):
        raise ValueError(
            "For decoding there is no kernel_size: steps read blocks that a policy chooses. Leave it out, or "
            "convert for prefill."
        )
    if (to == "neighborhood") != (kernel_size is not None):
        raise ValueError(
            f"to={to!r} with kernel_size={kernel_size!r}: `neighborhood` and a size belong together."
        )
    tell = progress or (lambda what, done, total: None)
    if out is not None:
        _check_out(Path(out))
    tell("load the model", 0, 1)
    opened = packaged.find(model or DEFAULT_MODEL)
    tell("load the model", 1, 1)
    found: Conversion | EncoderConversion | DecodeConversion
    if purpose == "decode":
        found = _decode(opened, to, text, tokens, share, quick, seed, tell)
    elif opened.kind != "decoder":
        from nearfield.convert.encoder import run as run_encoder

        found = run_encoder(
            opened,
            to=to,
            budget=share,
            source=text,
            tokens=tokens,
            quick=quick,
            kernel_size=kernel_size,
            tell=tell,
            read_plan=_read_plan,
        )
    else:
        job = _Job(opened, text or "python", _tokens(opened.model, tokens, quick), share, quick, seed, tell)
        found = job.run(to, kernel_size)
    if out is not None:
        _write(found, opened, Path(out), tell)
    return found


def _decode(
    opened: packaged.Packaged,
    to: str,
    text: str | None,
    tokens: int | None,
    budget: float,
    quick: bool,
    seed: int,
    tell: Tell,
) -> DecodeConversion:
    if opened.kind != "decoder":
        raise NotImplementedError(
            f"{opened.name} is an encoder: it reads its input at once and has no steps to make cheaper. Give "
            "a language model, or leave out --for decode."
        )
    policy = None if to == "auto" else _read_policy(Path(to))
    from nearfield.convert.decoding import DecodeJob

    length = _tokens(opened.model, tokens, quick)
    return DecodeJob(opened, text or "python", length, budget, quick, seed, tell).run(policy)


def plan_only(
    model: str,
    *,
    budget: str | float = "1%",
    text: str | None = None,
    tokens: int | None = None,
    progress: Tell | None = None,
) -> Planned:
    """The plan that `run` would take, from predictions alone: nothing is converted or judged."""
    tell = progress or (lambda what, done, total: None)
    tell("load the model", 0, 1)
    opened = packaged.find(model)
    tell("load the model", 1, 1)
    if opened.kind != "decoder":
        raise NotImplementedError(
            f"Planning a {opened.kind} without converting it. `nearfield convert {model}` plans and shows."
        )
    share = _share(budget)
    job = _Job(opened, text or "python", _tokens(opened.model, tokens, False), share, False, 0, tell)
    planner = job.planner()
    plan, choice = planner.choose(AIM * log1p(share))
    return Planned(opened.name, job.task.tokens, share, plan, planner, choice)


@dataclass
class _Job:
    """The main job on one decoder."""

    opened: packaged.Packaged
    text: str
    tokens: int
    budget: float
    quick: bool
    seed: int
    tell: Tell
    task: Decoder = field(init=False)

    def __post_init__(self) -> None:
        self.tell("read the text", 0, 1)
        self.task = Decoder(self.model, self.opened.processor, self.text, self.tokens, seed=self.seed)
        self.tell("read the text", 1, 1)
        self.trials: list[tuple[Mapping[str, SitePlan], Trial]] = []
        self.predicted = 0.0

    @property
    def model(self) -> nn.Module:
        return self.opened.model

    def planner(self) -> Planner:
        """Damage predicted per site and group, seconds measured per pattern."""
        name = "measure attention (one forward, one backward)"
        damages = self.task.damages(lambda done, total: self.tell(name, done, total))
        return planner_of(damages, self.tokens, self.tell, RECALL_WEIGHT)

    def run(self, to: str, kernel_size: int | tuple[int, ...] | None) -> Conversion:
        planner = None
        if to == "neighborhood":
            plan = self._everywhere(kernel_size)
        elif to == "auto":
            planner = self.planner()
            plan = self._tried(planner)
        else:
            plan = _read_plan(Path(to))
        judged, before = self._judge(plan, None, planner is not None)
        judgements = [judged]
        while planner is not None and not judged.holds(self.budget):
            plan = self._tightened(planner, judged, len(judgements))
            judged, before = self._judge(plan, before, True)
            judgements.append(judged)
        points = self._controls(planner, plan, before) if planner is not None else []
        report = convert(self.model, plan)
        return Conversion(
            model=self.opened.name,
            kind="decoder",
            text=self.text,
            tokens=self.tokens,
            budget=self.budget,
            judgements=judgements,
            plan=plan,
            planner=planner,
            points=points,
            passkeys=len(self.task.passage.answers),
            quick=self.quick,
            report=report,
        )

    def _everywhere(self, kernel_size: int | tuple[int, ...] | None) -> dict[str, SitePlan]:
        assert kernel_size is not None  # the command line's rule, and run's
        return {
            site.name: SitePlan.uniform(site.name, site.num_kv_heads, default_pattern(site, kernel_size))
            for site in attention_sites(self.model)
        }

    def _try(self, plan: Mapping[str, SitePlan]) -> Trial:
        """The plan run on the calibration passage; one that was run already is not run again."""
        for tried, trial in self.trials:
            if tried == plan:
                return trial
        report = convert(self.model, plan)
        try:
            trial = self.task.trial()
        finally:
            report.restore()
        self.trials.append((plan, trial))
        self.tell("try plans", len(self.trials), max(len(self.trials), TRIALS + 2))
        return trial

    def _tried(self, planner: Planner) -> dict[str, SitePlan]:
        """The last plan that held in real runs on the calibration passage, or else a more careful one."""
        limit = log1p(self.budget)
        self._calibrate(planner)
        self.predicted = AIM * limit
        plan, held = planner.choose(self.predicted)[0], None
        for _ in range(TRIALS):
            trial = self._try(plan)
            share = trial.added / (AIM * limit)
            remembers = trial.added_to_answers <= ANSWER_LIMIT
            if share <= 1.15 and remembers:
                held = plan
                if share >= 0.8:
                    break
            if not remembers:
                planner.recall_weight *= 4
            self.predicted *= min(max(1 / max(share, 1e-6), 1 / 3), 1.5)
            plan = planner.choose(self.predicted)[0]
        return held or plan

    def _calibrate(self, planner: Planner) -> None:
        """Scales predictions for the earlier and for the later half of the sites by one real run of each."""
        plan = planner.choose(AIM * log1p(self.budget))[0]
        names = [damage.site.name for damage in planner.damages]
        for half in (names[: len(names) // 2], names[len(names) // 2 :]):
            part = {name: plan[name] for name in half}
            predicted = planner.predicted(part)[0]
            if predicted > 0:
                ratio = self._try(part).added / predicted
                planner.scale.update(dict.fromkeys(half, min(max(ratio, 0.25), 4.0)))

    def _tightened(self, planner: Planner, judgement: Judgement, judgements: int) -> dict[str, SitePlan]:
        """A more careful plan; ever more so, and at last full attention, which always holds."""
        over = max(log1p(max(judgement.perplexity.high, 0.0)) / log1p(self.budget), 1.0)
        self.predicted *= 0.8 / over
        if judgement.recall is not None and not judgement.recall.kept:
            planner.recall_weight *= 4
        return planner.choose(self.predicted if judgements < JUDGEMENTS - 1 else 0.0)[0]

    def _judge(
        self, plan: Mapping[str, SitePlan], known: Judged | None, tighten: bool
    ) -> tuple[Judgement, Judged]:
        holder: list[Any] = []

        def converted(on: bool) -> None:
            if on and not holder:
                holder.append(convert(self.model, plan))
            elif not on and holder:
                holder.pop().restore()

        try:
            return judge(
                self.task,
                converted,
                known=known,
                budget=self.budget if tighten else None,
                progress=lambda done, total: self.tell("judge on held-out text and prompts", done, total),
            )
        finally:
            converted(False)

    def _controls(self, planner: Planner, plan: dict[str, SitePlan], before: Judged) -> list[Point]:
        """Other ways to spend the same kind of money, each run on the calibration passage."""
        window = Neighborhood(self.tokens // 4, is_causal=True, num_sinks=NUM_SINKS)
        narrow = Neighborhood(self.tokens // 8, is_causal=True, num_sinks=NUM_SINKS)
        kept = sum(
            plan[d.site.name].pattern_of(group) is None
            for d in planner.damages
            for group in range(d.site.num_kv_heads)
        )
        kept = max(kept, 1)
        tries = {
            f"uniform {window.kernel_size}": ("uniform", planner.uniform(window)),
            f"uniform {narrow.kernel_size}": ("narrow", planner.uniform(narrow)),
        }
        for by in ("random", "needle", "sensitivity"):
            order = planner.ranked(by, window, seed=self.seed)[:kept]
            tries[f"{kept} {by} groups full, rest {window.kernel_size}"] = (
                by,
                planner.keeping(order, window),
            )
        if not self.quick:  # at length a run is long, and the plan is judged against the wider one
            del tries[f"uniform {narrow.kernel_size}"]
        tries["the plan"] = ("plan", plan)
        found = []
        for at, (name, (kind, tried)) in enumerate(tries.items()):
            trial = self._try(tried)
            found.append(
                Point(name, kind, trial.added, trial.added_to_answers, trial.answered, trial.seconds)
            )
            self.tell("controls", at + 1, len(tries))
        seconds = median(reading.seconds for reading in before.readings)  # the passage was read with a graph
        return [Point("full attention", "full", 0.0, 0.0, self.task.answered(), seconds), *found]


def _share(budget: str | float) -> float:
    """A budget such as "1%" or 0.01 as a number."""
    text = str(budget).strip()
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise ValueError(f"budget={budget!r} is no share of quality. Give one such as 1% or 0.01.")
    return share


def _tokens(model: nn.Module, tokens: int | None, quick: bool) -> int:
    most = positions(model)
    if most is not None and most < LEAST_TOKENS:
        raise ValueError(
            f"The model has {most:,} positions, which is too few to judge it: prompts that hide keys need "
            f"{LEAST_TOKENS:,}. Give a model that was made for longer texts."
        )
    wanted = tokens or min(QUICK_TOKENS if quick else DEFAULT_TOKENS, most or DEFAULT_TOKENS)
    if wanted < LEAST_TOKENS or (most is not None and wanted > most):
        limit = f"{LEAST_TOKENS:,} to {most:,}" if most is not None else f"at least {LEAST_TOKENS:,}"
        raise ValueError(f"--tokens {wanted:,} is outside what can be judged with this model: {limit}.")
    return wanted


def _read_plan(path: Path) -> dict[str, SitePlan]:
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no plan {path}. Give auto, neighborhood, or the .json file of a plan."
        )
    data = read_json(path.read_bytes())
    return plan_from_json(data["plan"] if isinstance(data, dict) and "plan" in data else data)


def _read_policy(path: Path) -> ReusePolicy:
    if not path.is_file():
        raise FileNotFoundError(f"There is no policy {path}. Give auto, or the .json file of a policy.")
    data = read_json(path.read_bytes())
    return ReusePolicy.from_json(data["policy"] if isinstance(data, dict) and "policy" in data else data)


def _check_out(out: Path) -> None:
    """Refuses before the work, not after it, a folder that could not be written."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(
            f"{out} is there and not empty. Choose a new folder for --out, or empty this one."
        )


def _write(
    found: Conversion | EncoderConversion | DecodeConversion, opened: packaged.Packaged, out: Path, tell: Tell
) -> None:
    from nearfield.convert.page import encoder_page, page

    tell("write the folder", 0, 1)
    if isinstance(found, DecodeConversion):
        shown = decode_page(found)
    else:
        shown = page(found) if isinstance(found, Conversion) else encoder_page(found)
    extra = {"report.json": found.text_json(), "report.html": shown}
    save(opened.model, out, tokenizer=opened.processor, extra=extra)
    found.folder = out
    tell("write the folder", 1, 1)

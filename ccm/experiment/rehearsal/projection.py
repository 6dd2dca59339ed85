"""What a rehearsal measured, and how long the full run would take; pure arithmetic, and its table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from textwrap import wrap

from ccm.errors import listed
from ccm.experiment.clock import Per

PUBLISHED_FACTS = 4688  # rows of the released ParaRel statements (Method 3)


@dataclass(frozen=True)
class Stage:
    """The time of one stage, which grows along a straight line through two runs."""

    name: str
    seconds: float  # as measured
    peak_bytes: int  # highest while it ran, of the memory that `Rehearsal.memory` describes
    per: Per  # unit of its work
    items: int  # facts or prompts it was measured on; 1 for a run
    few_items: int = 0  # those of the smaller run; 0 if there is none: then all of the time grows
    few_seconds: float = 0.0
    in_run: bool = True  # False: for comparison only, no part of `ccm run`
    most: int | None = None  # most items that a run does it for; None: all

    def beside(self, few: "Stage") -> "Stage":
        """Add what the smaller run measured for the same stage.

        If a stage is done once per run, the longer time counts. A smaller run of as many items is
        ignored.
        """
        if self.per == "run":
            return max(few, self, key=lambda stage: stage.seconds)
        if few.items >= self.items:
            return self
        return replace(self, few_items=few.items, few_seconds=few.seconds)

    @property
    def per_item(self) -> float:
        """Seconds per additional fact or prompt; neither these nor the fixed seconds are below 0.

        >>> Stage("decode", 5.0, 0, "prompt", items=10, few_items=5, few_seconds=3.0).per_item
        0.4
        """
        slope = (self.seconds - self.few_seconds) / (self.items - self.few_items)
        return min(max(slope, 0.0), self.seconds / self.items)

    @property
    def fixed_seconds(self) -> float:
        """Seconds that do not depend on how many items there are."""
        if self.per == "run":
            return self.seconds
        return max(0.0, self.seconds - self.per_item * self.items)  # rounding may lead below 0

    def projected(self, items: int) -> float:
        """Project the seconds to a number of facts or prompts.

        >>> Stage("decode", 5.0, 0, "prompt", items=10, few_items=5, few_seconds=3.0).projected(100)
        41.0
        """
        if self.per == "run":
            return self.seconds
        items = items if self.most is None else min(items, self.most)
        return self.fixed_seconds + self.per_item * items


@dataclass(frozen=True)
class Projection:
    """Seconds that the full run would take on the machine that was measured."""

    facts: int
    prompts: int
    stages: Mapping[str, float]  # of those that a run has
    total: float


def project(stages: tuple[Stage, ...], facts: int, prompts: int) -> Projection:
    """Project every stage of a run to a number of facts and prompts."""
    count = {"run": 1, "fact": facts, "prompt": prompts}
    seconds = {s.name: s.projected(count[s.per]) for s in stages if s.in_run}
    return Projection(facts, prompts, seconds, sum(seconds.values()))


@dataclass(frozen=True)
class Rehearsal:
    """Everything a rehearsal found out, with what it was measured on."""

    model: str
    parameters: int
    weight_bytes: int
    device: str
    device_name: str
    threads: int  # of the CPU, per operation
    dtype: str
    seed: int
    memory: str  # what `Stage.peak_bytes` counts
    tokenizer: str
    facts_name: str
    facts: int  # asked for their objects
    prompts: int
    few_prompts: int  # of the smaller run
    mean_prompt_tokens: float  # BOS included
    mean_fact_prompt_tokens: float  # of the prompts that ask for an object
    first_prompt_tokens: list[int]
    ablation_values: list[str]
    controls: int
    matched_controls: int
    entropy_neurons: list[int]
    stages: tuple[Stage, ...]
    work: Mapping[str, Mapping[str, int]]  # stage -> counts of `ccm.decoding.results.Work`
    published: Projection
    versions: Mapping[str, str]

    @property
    def n_sets(self) -> int:
        """Neuron sets of the grid, the plain run not counted."""
        return len(self.ablation_values) * (1 + self.controls + self.matched_controls)


def duration(seconds: float) -> str:
    """Write a time to about three digits, in the unit that people would use.

    >>> duration(0.0412), duration(75.2), duration(8000.0)
    ('0.041 s', '75.2 s', '2 h 13 min')
    """
    if seconds < 10:
        return f"{seconds:.3f} s" if seconds < 1 else f"{seconds:.2f} s"
    if seconds < 600:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _size(n_bytes: int) -> str:
    return f"{n_bytes / (1 << 30):.2f} GiB"


def _values(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 3 else f"{len(names)} ablation values"


def _row(name: str, of: str, seconds: str, peak: str, projected: str) -> str:
    return f"{name:34s}{of:>14s}{seconds:>12s}{peak:>12s}{projected:>14s}"


def rehearsal_table(r: Rehearsal) -> str:
    """Write a rehearsal as text: what was measured, what is projected, and on what that rests."""
    lines = [
        f"{r.model}, random weights (seed {r.seed}): {r.parameters:,} parameters, "
        f"{_size(r.weight_bytes)} in {r.dtype}",
        f"on {r.device}: {r.device_name}" + (f", {r.threads} threads" if r.device == "cpu" else ""),
        f"{r.prompts} probing prompts, {r.mean_prompt_tokens:.1f} tokens on average, of {r.facts_name} "
        "facts;",
        f"{r.facts} facts asked in {r.mean_fact_prompt_tokens:.1f} tokens; tokenizer: {r.tokenizer}",
        f"grid: {_values(r.ablation_values)}, the entropy set, {r.controls} controls and "
        f"{r.matched_controls} matched ones each: {r.n_sets} sets",
        "",
        _row("stage", "measured on", "measured", "peak memory", "projected"),
    ]
    for s in r.stages:
        of = "the model" if s.per == "run" else f"{s.items} {s.per}s"
        projected = duration(r.published.stages[s.name]) if s.in_run else "-"
        lines.append(_row(s.name, of, duration(s.seconds), _size(s.peak_bytes), projected))
    still = [s.name for s in r.stages if s.in_run and s.few_items and not s.per_item]
    measured = sum(s.seconds for s in r.stages if s.in_run)
    lines.append(_row("a whole run", "", duration(measured), "", duration(r.published.total)))
    lines += [
        "",
        f"peak memory: {r.memory}",
        f"projected: {r.published.facts:,} facts and {r.published.prompts:,} prompts, the published "
        "numbers, on this machine.",
        "What is done once counts once; all else follows, stage by stage, the straight line through",
        f"two runs, of {r.few_prompts} and of {r.prompts} prompts. Reading real weights replaces",
        "building them. Random weights decode all 10 tokens of every set; real ones may branch more",
        "or less, and end earlier.",
    ]
    if still:
        lines += wrap(f"too few prompts, or a busy machine: no growth was seen of {listed(still)}", 96)
    lines.append("")
    for name, work in r.work.items():
        counts = ", ".join(
            f"{work[k]:,} {k.replace('_', ' ')}"
            for k in ("forward_tokens", "nodes", "certified", "shortlisted", "full_rows", "refereed")
        )
        lines.append(f"work of {name}: {counts}")
    lines += wrap(", ".join(f"{name} {number}" for name, number in r.versions.items()), 96)
    return "\n".join(lines)

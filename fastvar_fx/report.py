"""What a transformed model does and why, as data that prints as a table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from passes.refusal import Refusal

if TYPE_CHECKING:
    from fastvar_fx.plan import Plan


@dataclass(frozen=True)
class Row:
    """One branch of one block at one step.

    Attributes:
        step: 0-based step.
        layer: Index of the block.
        block: Its module path.
        branch: The branch's module path in it; empty if the whole block stays dense.
        kind: "attention", "cross_attention" or "ffn"; empty if the whole block stays dense.
        tokens: Tokens of the step, L.
        kept: Tokens the branch runs on.
        flops: FLOPs of matrix products and attention, dense, for the whole batch, with the keys
            cached by then: pruned steps before this one have left fewer than a dense run would.
        pruned_flops: The same as it runs.
        program: Number of the program; blocks with equal numbers share it. None if there is none.
        refusal: Why it stays dense, if it was refused.
    """

    step: int
    layer: int
    block: str
    branch: str
    kind: str
    tokens: int
    kept: int
    flops: int
    pruned_flops: int
    program: int | None
    refusal: Refusal | None

    def as_dict(self) -> dict[str, Any]:
        """Returns the row as plain data."""
        data = {k: v for k, v in vars(self).items() if k != "refusal"}
        return data | {"refusal": _refusal_dict(self.refusal)}


@dataclass(frozen=True)
class Report:
    """What every block and branch does at the cache step and the pruned steps met so far.

    Attributes:
        rows: One per block, step and branch.
        cache_step: The step whose branch outputs are captured.
        prunes: Whether the schedule prunes any step.
        unmet: Token counts of pruned steps that no run came to yet, by step.
        dense_calls: Calls of blocks by token count that were none of these steps.
        early_calls: Calls with a pruned step's token count that came before the capture of their
            generation, such as source tokens of an editing model; they ran dense.
        trace_seconds: Time spent on tracing, analysis, rewriting and checking.
    """

    rows: tuple[Row, ...]
    cache_step: int
    prunes: bool
    unmet: dict[int, int]
    dense_calls: dict[int, int]
    early_calls: dict[int, int]
    trace_seconds: float

    @classmethod
    def of(cls, plan: Plan) -> Report:
        """Returns the report on a plan's records."""
        records = sorted(plan.records.values(), key=lambda r: (r.step, r.layer))
        met = {r.step for r in records}
        rows = []
        for r in records:
            place = (r.step, r.layer, r.block)
            if r.refusal is not None:
                rows.append(Row(*place, "", "", r.tokens, r.tokens, 0, 0, None, r.refusal))
            for b in r.branches:
                kept = r.tokens if b.kept is None else b.kept
                counts = (r.tokens, kept, b.flops, b.pruned_flops)
                rows.append(Row(*place, b.name, b.kind, *counts, r.program, b.refusal))
        return cls(
            tuple(rows),
            plan.schedule.cache_step,
            bool(plan.pruned_steps),
            {s: plan.schedule.tokens(s) for s in plan.pruned_steps if s not in met},
            dict(sorted(plan.dense_calls.items())),
            dict(sorted(plan.early_calls.items())),
            plan.trace_seconds,
        )

    @property
    def refusals(self) -> tuple[Row, ...]:
        """The rows that were refused."""
        return tuple(row for row in self.rows if row.refusal is not None)

    def flops(self, step: int) -> tuple[int, int]:
        """Returns the branches' FLOPs at a step, (dense, as it runs)."""
        rows = [row for row in self.rows if row.step == step]
        return sum(row.flops for row in rows), sum(row.pruned_flops for row in rows)

    def to_json(self) -> str:
        """Returns the report as a JSON object with the keys of its attributes."""
        data = vars(self) | {"rows": [row.as_dict() for row in self.rows]}
        return json.dumps(data)

    def __str__(self) -> str:
        """A table; blocks that do the same share a line."""
        if not self.rows:
            return _empty(self)
        lines = [_HEADER, *(_line(group) for group in _grouped(self.rows))]
        for step in sorted({row.step for row in self.rows}):
            dense, pruned = self.flops(step)
            if dense != pruned:
                lines.append(
                    f"step {step}: {_flops(dense)} -> {_flops(pruned)} FLOPs, "
                    f"limit {dense / max(pruned, 1):.2f}x"
                )
        lines += _notes(self)
        return "\n".join(lines)


_HEADER = (
    f"{'step':>4}  {'blocks':<16} {'branch':<12} {'kind':<16} {'tokens':>6} {'kept':>6} "
    f"{'FLOPs':>8} {'as run':>8} {'program':>7}"
)


def _grouped(rows: Iterable[Row]) -> list[list[Row]]:
    """Groups rows of neighbouring blocks that do the same."""

    def key(row: Row) -> tuple[Any, ...]:
        same = (row.branch, row.kind, row.tokens, row.kept, row.flops, row.pruned_flops)
        return (row.step, *same, row.program if row.program is not None else -1, str(row.refusal))

    ordered = sorted(rows, key=lambda row: (*_first(key(row)), row.layer))
    return sorted(
        (list(group) for _, group in groupby(ordered, key)),
        key=lambda group: (group[0].step, group[0].layer),
    )


def _first(key: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(f"{part:>12}" if isinstance(part, int) else str(part) for part in key)


def _line(group: list[Row]) -> str:
    row = group[0]
    ran = row.kept < row.tokens
    text = (
        f"{row.step:>4}  {_blocks(group):<16} {row.branch or '-':<12} {row.kind or '-':<16} "
        f"{row.tokens:>6} {row.kept if ran else 'dense':>6} {_flops(row.flops):>8} "
        f"{_flops(row.pruned_flops):>8} {'-' if row.program is None else row.program:>7}"
    )
    return text if row.refusal is None else f"{text}\n{_explain(row.refusal)}"


def _blocks(group: list[Row]) -> str:
    first, last = group[0], group[-1]
    if len(group) == 1:
        return first.block
    layers = [row.layer for row in group]
    if layers != list(range(layers[0], layers[-1] + 1)):
        return f"{first.block} (+{len(group) - 1})"
    owner, _, number = last.block.rpartition(".")
    return f"{first.block}..{number if first.block.rpartition('.')[0] == owner else last.block}"


def _explain(refusal: Refusal) -> str:
    where = f"  {refusal.where}" if refusal.where else ""
    op = f" [{refusal.op}]" if refusal.op else ""
    return (
        f"      {refusal.code}  {refusal.title}{where}\n"
        f"        why   {refusal.reason}{op}\n"
        f"        hint  {refusal.hint}"
    )


def _notes(report: Report) -> list[str]:
    notes = [
        f"step {step} ({tokens} tokens) was not met yet; dense calls so far had "
        f"{', '.join(map(str, report.dense_calls)) or 'no'} tokens"
        for step, tokens in report.unmet.items()
    ]
    if report.early_calls:
        counts = ", ".join(f"{n} of {tokens} tokens" for tokens, n in report.early_calls.items())
        notes.append(f"dense, before their generation's capture: {counts}")
    notes.append(f"tracing took {report.trace_seconds:.2f} s")
    return notes


def _empty(report: Report) -> str:
    if not report.prunes:
        return "the schedule prunes nothing: the model runs as it is"
    if not report.dense_calls:
        return "no step of the schedule was run yet; run a generation, or fastvar_fx.trace"
    seen = ", ".join(map(str, report.dense_calls))
    return f"no step that captures or prunes was met; blocks saw token counts {seen}"


def _flops(count: int) -> str:
    value = float(count)
    for unit in ("", "K", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}P"


def _refusal_dict(refusal: Refusal | None) -> dict[str, str] | None:
    if refusal is None:
        return None
    return vars(refusal) | {"title": refusal.title, "hint": refusal.hint}

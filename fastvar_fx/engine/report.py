"""What a transformed model does and why, as data that prints as a table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fastvar_fx.engine import report_text
from fastvar_fx.engine.executor import Compiled, Packaged
from passes.refusal import Refusal

if TYPE_CHECKING:
    from fastvar_fx.engine.engine import Engine
    from fastvar_fx.engine.plan import Plan
    from fastvar_fx.engine.store import StepRecord
    from fastvar_fx.measuring.compare import Comparison
    from fastvar_fx.ops import Scale
    from fastvar_fx.schedule import Schedule
    from passes.analyse.costs import BranchReport


@dataclass(frozen=True, kw_only=True)
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
            cached so far: fewer than in a dense run, if steps before this one were pruned.
        unguided_flops: The same of the rows of the batch that it runs: half of them at a step
            without guidance.
        pruned_flops: The same as it runs.
        program: Number of the program; blocks with equal numbers share it. None if there is none.
        refusal: Why it stays dense, if it was refused.
    """

    step: int
    layer: int
    block: str
    branch: str = ""
    kind: str = ""
    tokens: int
    kept: int
    flops: int = 0
    unguided_flops: int = 0
    pruned_flops: int = 0
    program: int | None
    refusal: Refusal | None


@dataclass(frozen=True, kw_only=True)
class Skipping:
    """What is saved by leaving steps out of the loop.

    Attributes:
        steps: The skipped steps.
        tokens: Their tokens, of one image.
        all_tokens: The tokens of all steps.
        flops: FLOPs of matrix products and attention, for the whole batch, that the steps would
            take with every step dense. A skipped step is never traced, so these are scaled from
            the cache step: by tokens, and in self-attention by tokens times keys, where keys
            beyond the step's own count as a cache that grows at every step. None if the
            cache step was not traced.
        blocks: How many blocks `flops` is of: those that prune and could be traced.
        all_blocks: How many there are.
    """

    steps: tuple[int, ...]
    tokens: int
    all_tokens: int
    flops: int | None
    blocks: int
    all_blocks: int

    @classmethod
    def of(cls, engine: Engine) -> Skipping:
        """Returns what a model skips."""
        plan, found = engine.plan, engine.store.records.values()
        schedule, steps = plan.schedule, plan.skipped_steps
        tokens = [schedule.tokens(step) for step in range(schedule.steps)]
        records = [r for r in found if r.step == schedule.cache_step and r.branches]
        caching = {
            (r.layer, b.index)
            for r in found
            for b in r.branches
            if b.keys is not None and b.keys > r.tokens
        }
        flops = sum(
            _dense_flops(schedule, step, record, branch, (record.layer, branch.index) in caching)
            for step in steps
            for record in records
            for branch in record.branches
        )
        return cls(
            steps=steps,
            tokens=sum(tokens[step] for step in steps),
            all_tokens=sum(tokens),
            flops=flops if records else None,
            blocks=len(records),
            all_blocks=len(plan.blocks),
        )


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """What is saved by leaving out the unconditional half of the batch.

    Attributes:
        steps: The steps without guidance that the loop draws.
        flops: FLOPs of the branches at these steps as met so far, dense, as in `Row`.
        unguided_flops: The same of the conditional half.
    """

    steps: tuple[int, ...]
    flops: int
    unguided_flops: int

    @classmethod
    def of(cls, plan: Plan, rows: Iterable[Row]) -> Guidance:
        """Returns what a model leaves out."""
        late = [row for row in rows if row.step in plan.unguided_steps]
        return cls(
            steps=plan.unguided_steps,
            flops=sum(row.flops for row in late),
            unguided_flops=sum(row.unguided_flops for row in late),
        )


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """What is saved by dropping tokens from steps that the loop draws.

    Attributes:
        steps: The pruned steps.
        tokens: Their tokens, of one image.
        dropped: How many of them a branch that prunes leaves out; where ratios differ by layer or
            kind, on average over the branches met so far that were not refused.
        flops: FLOPs of the branches at these steps as met so far, dense, as in `Row`; of half of
            the batch where guidance is off.
        pruned_flops: The same as they run.
    """

    steps: tuple[int, ...]
    tokens: int
    dropped: int
    flops: int
    pruned_flops: int

    @classmethod
    def of(cls, plan: Plan, rows: Iterable[Row]) -> Pruning:
        """Returns what a model prunes."""
        schedule, steps = plan.schedule, plan.pruned_steps
        late = [row for row in rows if row.step in steps]
        tokens = sum(schedule.tokens(step) for step in steps)
        return cls(
            steps=steps,
            tokens=tokens,
            dropped=tokens - sum(kept_by_branch(schedule, step, late) for step in steps),
            flops=sum(row.unguided_flops for row in late),
            pruned_flops=sum(row.pruned_flops for row in late),
        )


@dataclass(frozen=True, kw_only=True)
class Caches:
    """KV caches that blocks grow by `cat`, of the blocks that were traced.

    Attributes:
        buffered: How many grow in place, in buffers of their final length.
        copied: Why others are copied as they grow, by module path and place in the block.
        appended: How often a cache has grown in place so far.
        moved: How often one was copied to a new buffer, which is once per generation unless the
            loop replaces the cache.
    """

    buffered: int
    copied: dict[str, str]
    appended: int
    moved: int

    @classmethod
    def of(cls, engine: Engine) -> Caches | None:
        """Returns how a model's caches grow; None with `kv_buffer=False`."""
        buffers = engine.buffers
        if buffers is None:
            return None
        found: dict[str, str | None] = {}
        for record in engine.store.records.values():
            for place, reason in record.caches.items():
                name = f"{record.block}.{place}"
                found[name] = found.get(name) or reason
        copied = {name: reason for name, reason in found.items() if reason is not None}
        return cls(
            buffered=len(found) - len(copied),
            copied=copied,
            appended=buffers.appended,
            moved=buffers.moved,
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """What every block and branch does at the cache step and the pruned steps met so far.

    Attributes:
        rows: One per block, step and branch.
        scales: The token maps of the schedule that it is a report on.
        schedules: How many schedules the model was transformed with.
        cache_step: The step whose branch outputs are captured.
        prunes: Whether the schedule prunes any step, or ends guidance at one.
        unmet: Token counts of these steps that no run came to yet, by step.
        dense_calls: Calls of blocks by token count that were none of these steps.
        early_calls: Calls with a pruned step's token count that came before the capture of their
            generation, such as source tokens of an editing model; they ran dense.
        trace_seconds: Time spent on tracing, analysis, rewriting and checking.
        skipping: What is saved by leaving steps out.
        guidance: What is saved by leaving out the unconditional half of the batch.
        pruning: What is saved by dropping tokens.
        captured_bytes: Bytes of captured outputs held now.
        peak_captured_bytes: The most held in a generation so far; compiled blocks do not count it.
        caches: How the KV caches grow; None with `kv_buffer=False`.
        compiled: What `fastvar_fx.compile` has compiled so far; None if it was not called.
        packages: The packages that a model runs which `fastvar_fx.load` returned; else None.
        step_times: What `fastvar_fx.measure` found, by pruned step; empty if it was not called.
        outside_share: The share, from 0 to 1, that the head, the decoder and all else outside the
            blocks that prune has in the FLOPs of a generation whose drawn steps are all dense: of
            matrix products, convolutions and attention. It is counted in the last run of
            `fastvar_fx.trace`, and its blocks' FLOPs are those they ran plus what pruning saved, as
            in `Row`. None without `trace`, if the blocks are compiled, or if they ran in
            threads of the loop's.
    """

    rows: tuple[Row, ...]
    scales: tuple[Scale, ...]
    schedules: int
    cache_step: int
    prunes: bool
    unmet: dict[int, int]
    dense_calls: dict[int, int]
    early_calls: dict[int, int]
    trace_seconds: float
    skipping: Skipping
    guidance: Guidance
    pruning: Pruning
    captured_bytes: int
    peak_captured_bytes: int
    caches: Caches | None = None
    compiled: Compiled | None = None
    packages: Packaged | None = None
    step_times: dict[int, Comparison] = field(default_factory=dict)
    outside_share: float | None = None

    @classmethod
    def of(cls, engine: Engine) -> Report:
        """Returns the report on a model so far."""
        plan, generation, store = engine.plan, engine.generation, engine.store
        records = sorted(store.records.values(), key=lambda r: (r.step, r.layer))
        met = {r.step for r in records}
        rows = tuple(row for record in records for row in _rows(record))
        return cls(
            rows=rows,
            scales=plan.schedule.scales,
            schedules=len(engine.family.engines),
            cache_step=plan.schedule.cache_step,
            prunes=bool(plan.changed_steps),
            unmet={s: plan.schedule.length(s) for s in plan.changed_steps if s not in met},
            dense_calls=dict(sorted(generation.dense_calls.items())),
            early_calls=dict(sorted(generation.early_calls.items())),
            trace_seconds=store.trace_seconds,
            skipping=Skipping.of(engine),
            guidance=Guidance.of(plan, rows),
            pruning=Pruning.of(plan, rows),
            captured_bytes=generation.captured_bytes,
            peak_captured_bytes=generation.peak_captured_bytes,
            caches=Caches.of(engine),
            compiled=engine.executor.compiled,
            packages=engine.executor.packages,
            step_times=engine.step_times,
            outside_share=engine.outside_share,
        )

    @property
    def refusals(self) -> tuple[Row, ...]:
        """The rows that were refused."""
        return tuple(row for row in self.rows if row.refusal is not None)

    @property
    def slower_steps(self) -> tuple[int, ...]:
        """The steps that pruning makes no faster, of those that `fastvar_fx.measure` timed."""
        return tuple(step for step, times in self.step_times.items() if not times.pays)

    def flops(self, step: int) -> tuple[int, int]:
        """Returns the branches' FLOPs at a step, (dense, as it runs)."""
        rows = [row for row in self.rows if row.step == step]
        return sum(row.flops for row in rows), sum(row.pruned_flops for row in rows)

    def to_json(self) -> str:
        """Returns the report as a JSON object with the keys of its attributes."""
        return json.dumps(vars(self), default=_plain)

    def __str__(self) -> str:
        """A table; blocks that do the same share a line."""
        return report_text.table(self)


def kept_by_branch(schedule: Schedule, step: int, rows: Iterable[Row]) -> int:
    """Returns how many tokens a branch keeps at a step; on average, where the ratios differ.

    Args:
        schedule: The schedule.
        step: The step.
        rows: What branches do at all steps.
    """
    counts = schedule.kept_counts(step)
    found = [row.kept for row in rows if row.step == step and row.refusal is None]
    return counts[0] if len(counts) == 1 or not found else round(sum(found) / len(found))


def _plain(value: Any) -> Any:
    """Returns a part of the report as plain data."""
    return value.as_dict() if hasattr(value, "as_dict") else vars(value)


def _rows(record: StepRecord) -> list[Row]:
    whole = Row(
        step=record.step,
        layer=record.layer,
        block=record.block,
        tokens=record.tokens,
        kept=record.tokens,
        program=record.program,
        refusal=record.refusal,
    )
    branches = [
        replace(
            whole,
            branch=branch.name,
            kind=branch.kind,
            kept=record.tokens if branch.kept is None else branch.kept,
            flops=branch.flops * (1 if record.guided else 2),
            unguided_flops=branch.flops,
            pruned_flops=branch.pruned_flops,
            refusal=branch.refusal,
        )
        for branch in record.branches
    ]
    return branches if record.refusal is None else [whole, *branches]


def _dense_flops(
    schedule: Schedule, step: int, traced: StepRecord, branch: BranchReport, caches: bool
) -> int:
    """Returns a branch's FLOPs at a step, dense, scaled from a traced one where all was dense."""
    now, then = traced.tokens, schedule.length(step)
    keys = max(branch.keys or 0, now)
    since = sum(schedule.tokens(s) for s in range(traced.step + 1, step + 1))
    later = keys + since if caches else then
    alone = (branch.flops - branch.attended_flops) * then // now
    return alone + branch.attended_flops * then * later // (now * keys)

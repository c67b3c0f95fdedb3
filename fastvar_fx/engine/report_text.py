"""A report as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvar_fx.engine.report import Caches, Guidance, Pruning, Report, Row, Skipping
    from passes.refusal import Refusal

_HEADER = (
    f"{'step':>4}  {'blocks':<16} {'branch':<12} {'kind':<16} {'tokens':>6} {'kept':>6} "
    f"{'FLOPs':>8} {'as run':>8} {'program':>7}"
)


def table(report: Report) -> str:
    """Returns a table; blocks that do the same share a line."""
    lines = [_HEADER, *(_line(group) for group in grouped(report.rows))] if report.rows else []
    return "\n".join([*lines, *remarks(report)])


def remarks(report: Report) -> list[str]:
    """Returns the lines below the table, or in its place if the report has no rows."""
    saved = savings(report)
    if report.schedules > 1:
        scales = " ".join("x".join(map(str, scale)) for scale in report.scales)
        saved.insert(0, f"the schedule of scales {scales}, one of {report.schedules}")
    if report.outside_share is not None:
        share = f"{100 * report.outside_share:.1f} %"
        whole = "of the matrix-product FLOPs of a dense generation"
        saved.append(f"outside the blocks: {share} {whole}")
    if not report.rows:
        return [_empty(report), *saved, *_compiled_notes(report), *_packages_notes(report)]
    changes = []
    for step in sorted({row.step for row in report.rows}):
        dense, pruned = report.flops(step)
        if dense != pruned:
            changes.append(f"step {step}: {_change(dense, pruned)}")
    return [*changes, *saved, *_notes(report), *_payoff(report)]


def savings(report: Report) -> list[str]:
    """Returns what each of the three ways to save computation saves."""
    return [
        _skipping_line(report.skipping),
        _guidance_line(report.guidance),
        _pruning_line(report.pruning),
    ]


def branch_counts(report: Report) -> tuple[int, int]:
    """Returns how many branches prune, and how many there are, over blocks and pruned steps."""
    rows = [row for row in report.rows if row.step in report.pruning.steps]
    return sum(row.kept < row.tokens for row in rows), len(rows)


def grouped(rows: Iterable[Row]) -> list[list[Row]]:
    """Groups rows of neighbouring blocks that do the same."""

    def key(row: Row) -> tuple[Any, ...]:
        same = (row.branch, row.kind, row.tokens, row.kept, row.flops, row.pruned_flops)
        return (row.step, *same, row.program if row.program is not None else -1, str(row.refusal))

    ordered = sorted(rows, key=lambda row: (*key(row), row.layer))
    return sorted(
        (list(group) for _, group in groupby(ordered, key)),
        key=lambda group: (group[0].step, group[0].layer),
    )


def _line(group: list[Row]) -> str:
    row = group[0]
    ran = row.kept < row.tokens
    text = (
        f"{row.step:>4}  {block_names(group):<16} {row.branch or '-':<12} {row.kind or '-':<16} "
        f"{row.tokens:>6} {row.kept if ran else 'dense':>6} {flops_text(row.flops):>8} "
        f"{flops_text(row.pruned_flops):>8} {'-' if row.program is None else row.program:>7}"
    )
    return text if row.refusal is None else f"{text}\n{_explain(row.refusal)}"


def block_names(group: Sequence[Row]) -> str:
    """Returns the module paths of a group's blocks, in short."""
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
    near = f"        near  {refusal.nearest}\n" if refusal.nearest else ""
    return (
        f"      {refusal.code}  {refusal.title}{where}\n"
        f"        why   {refusal.reason}{op}\n{near}"
        f"        hint  {refusal.hint}"
    )


def _notes(report: Report) -> list[str]:
    notes = [
        f"step {step} ({tokens} tokens) was not met yet; dense calls so far had "
        f"{', '.join(map(str, report.dense_calls)) or 'no'} tokens"
        for step, tokens in report.unmet.items()
    ]
    pruned = {row.step for row in report.rows if row.kept < row.tokens}
    dense = {row.tokens for row in report.rows if row.step not in pruned} | {*report.dense_calls}
    if dense:
        notes.append(f"longest sequence that ran dense: {max(dense)} tokens")
    if report.peak_captured_bytes:
        held, peak = _bytes(report.captured_bytes), _bytes(report.peak_captured_bytes)
        notes.append(f"captured features: {held} held now, {peak} at most")
    notes += _cache_lines(report.caches)
    if report.early_calls:
        counts = ", ".join(f"{n} of {tokens} tokens" for tokens, n in report.early_calls.items())
        notes.append(f"dense, before their generation's capture: {counts}")
    did = "tracing" if report.packages is None else "comparing with what was exported"
    notes.append(f"{did} took {report.trace_seconds:.2f} s")
    return [*notes, *_compiled_notes(report), *_packages_notes(report)]


def _cache_lines(caches: Caches | None) -> list[str]:
    if caches is None or not (caches.buffered or caches.copied):
        return []
    text = (
        f"KV caches: {caches.buffered} in buffers, grown in place {caches.appended} times and "
        f"moved {caches.moved} times"
    )
    lines = [text]
    by_reason: dict[str, list[str]] = {}
    for name, reason in caches.copied.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, (name, *more) in by_reason.items():
        lines.append(f"copied as it grows: {name}{f' (+{len(more)})' * bool(more)}, for {reason}")
    return lines


def _compiled_notes(report: Report) -> list[str]:
    compiled = report.compiled
    if compiled is None:
        return []
    total, counts = sum(compiled.graphs.values()), len(compiled.graphs)
    text = f"torch.compile: {total} graphs for calls of {counts} token counts"
    failures = (f"not compiled, so eager: {failure}" for failure in compiled.failures)
    return [text, *filter(None, [compiled.linears]), *failures]


def _packages_notes(report: Report) -> list[str]:
    packages = report.packages
    if packages is None:
        return []
    text = f"packages of {packages.folder}: {packages.used} of {packages.packages} used"
    return [text, *(f"eager: {failure}" for failure in packages.failures)]


def _payoff(report: Report) -> list[str]:
    lines = []
    for step, times in report.step_times.items():
        dense, pruned = (f"{1e3 * spread.median:.3g} ms" for spread in (times.dense, times.pruned))
        verdict = (
            f"{times.speedup:.2f}x"
            if times.pays
            else f"pruning does not pay here; schedule.without({step}) leaves the step dense"
        )
        lines.append(f"step {step}: {dense} dense, {pruned} pruned: {verdict}")
    return lines


def _skipping_line(skipping: Skipping) -> str:
    if not skipping.steps:
        return "step skipping: none"
    share = 100 * skipping.tokens / skipping.all_tokens
    text = (
        f"step skipping: {steps_text(skipping.steps)} left out, {skipping.tokens} of "
        f"{skipping.all_tokens} tokens ({share:.1f} %)"
    )
    if skipping.flops is None:
        return f"{text}, FLOPs not traced"
    text += f", {flops_text(skipping.flops)} FLOPs"
    whole = skipping.blocks == skipping.all_blocks
    return text if whole else f"{text} in {skipping.blocks} of {skipping.all_blocks} blocks"


def _guidance_line(guidance: Guidance) -> str:
    if not guidance.steps:
        return "guidance off: none"
    text = f"guidance off: {steps_text(guidance.steps)} run the conditional half of the batch"
    change = _change(guidance.flops, guidance.unguided_flops)
    return f"{text}, {change}" if guidance.flops else text


def _pruning_line(pruning: Pruning) -> str:
    if not pruning.steps:
        return "token pruning: none"
    text = (
        f"token pruning: {steps_text(pruning.steps)} pruned, {pruning.dropped} of {pruning.tokens} "
        f"tokens ({100 * pruning.dropped / pruning.tokens:.1f} %)"
    )
    return f"{text}, {_change(pruning.flops, pruning.pruned_flops)}" if pruning.flops else text


def _change(dense: int, pruned: int) -> str:
    limit = f", limit {dense / pruned:.2f}x" if pruned else ""
    return f"{flops_text(dense)} -> {flops_text(pruned)} FLOPs{limit}"


def steps_text(steps: tuple[int, ...]) -> str:
    """Returns steps in words."""
    return f"step{'s' * (len(steps) > 1)} {', '.join(map(str, steps))}"


def _empty(report: Report) -> str:
    if not report.prunes:
        skips = "only skips steps" if report.skipping.steps else "prunes nothing"
        return f"the schedule {skips}: what is drawn runs as it is"
    if not report.dense_calls:
        return "no step of the schedule was run yet; run a generation, or fastvar_fx.trace"
    seen = ", ".join(map(str, report.dense_calls))
    return f"no step that captures or prunes was met; blocks saw token counts {seen}"


def _scaled(count: float, base: int, digits: int, units: Sequence[str]) -> str:
    for unit in units[:-1]:
        if count < base:
            return f"{count:.{digits}g}{unit}"
        count /= base
    return f"{count:.{digits}g}{units[-1]}"


flops_text = partial(_scaled, base=1000, digits=3, units=("", "K", "M", "G", "T", "P"))
_bytes = partial(_scaled, base=1024, digits=4, units=(" B", " KiB", " MiB", " GiB"))

"""The command line: `fastvar-fx presets | explain | demo | bench`.

Exit codes: 0 done; 1 it could not be done and stderr says why; 2 the command line is wrong, or
packages of the extra `cli` are missing. With `--json`, stdout holds JSON and nothing else.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import platform
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from functools import partial
from importlib.util import find_spec
from math import inf
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn

import torch
from torch import Tensor, nn

from fastvar_fx import bench
from fastvar_fx.demo import (
    Comparison,
    Measurement,
    StepResult,
    draw_comparison,
    draw_kept_tokens,
    measure,
    phases,
)
from fastvar_fx.errors import FastVARError, ModelError, RunError, ScheduleError
from fastvar_fx.models.var import CONFIGS, VAR, VAR_512, build
from fastvar_fx.ops import Scale
from fastvar_fx.schedule import Schedule, presets
from fastvar_fx.timing import Spread, Subject
from fastvar_fx.transform import trace, transform

if TYPE_CHECKING:
    from rich.table import Table

_EXTRA: Final = {"typer": "typer", "rich": "rich", "matplotlib": "matplotlib", "PIL": "pillow"}
_RATIOS: Final = (0.5, 0.75)
_REPEATS: Final = 3
_PATIENCE: Final = 60.0
"""Seconds that measuring may take; repeats are left out for it unless their number was asked."""
_WIDTH: Final = 100
"""Columns of a table that goes to a file or a pipe."""

_DEMO: Final = "demo"
"""The demo's own model: large enough for pruning to pay, small enough for two cores."""
_DEMO_SIZES: Final[dict[str, Any]] = {
    "depth": 6,
    "width": 512,
    "heads": 8,
    "num_classes": 10,
}
_NAMES: Final = ", ".join((_DEMO, *CONFIGS))


class _OnFull(Enum):
    SKIP = "skip"
    CACHE = "cache"


try:
    import typer
except ImportError:
    pass  # `main` says how to get it; the annotations below are only read by typer
else:
    ModelName = Annotated[
        str,
        typer.Argument(
            help=f"One of {_NAMES} (random weights), or package.module:factory, "
            f"where factory() returns a model in eval mode."
        ),
    ]
    DemoModelName = Annotated[
        str,
        typer.Option(
            "--model",
            help=f"One of {_NAMES} (random weights), or package.module:factory.",
        ),
    ]
    PresetName = Annotated[str | None, typer.Option("--preset", help="Name of a schedule.")]
    ScheduleFile = Annotated[
        Path | None,
        typer.Option("--schedule", exists=True, dir_okay=False, help="JSON file of a schedule."),
    ]
    Ratios = Annotated[
        str | None,
        typer.Option("--ratios", help="Pruning ratios of the last steps, such as 0.5,0.75."),
    ]
    Blocks = Annotated[
        str | None,
        typer.Option("--blocks", help="Module path of the transformer blocks; else found."),
    ]
    OnFullName = Annotated[
        _OnFull,
        typer.Option("--on-full", help="Whether the last steps of ratio 1 are left out, or run."),
    ]
    Run = Annotated[
        str | None,
        typer.Option(
            "--run",
            help="package.module:function, where function(model) runs one generation and (for the "
            "demo) returns images (B, 3, H, W) in [0, 1]. Needed for a model of your own.",
        ),
    ]
    Batch = Annotated[int | None, typer.Option("--batch", min=1, help="Images at once.")]
    Seed = Annotated[int, typer.Option("--seed", help="Seed of the draws.")]
    BenchPreset = Annotated[
        str, typer.Option("--preset", help=f"One of {', '.join(bench.PRESETS)}.")
    ]
    BenchBatch = Annotated[int, typer.Option("--batch", min=1, help="Images at once.")]
    BenchRepeats = Annotated[int, typer.Option("--repeats", min=1, help="Timed runs of each row.")]
    Compiled = Annotated[
        bool, typer.Option("--compile/--no-compile", help="Whether to measure compiled rows too.")
    ]
    Steps = Annotated[bool, typer.Option("--steps", help="Also print the time of every step.")]
    Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
    Out = Annotated[Path, typer.Option("--out", file_okay=False, help="Folder for the pictures.")]
    Repeats = Annotated[
        int | None,
        typer.Option(
            "--repeats",
            min=1,
            help=f"Timed runs of each model; {_REPEATS}, or fewer on a slow machine.",
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Args:
        arguments: Without the program's name; None takes those of the process.
    """
    missing = [package for module, package in _EXTRA.items() if find_spec(module) is None]
    if missing:
        needed, found = ", ".join(_EXTRA.values()), ", ".join(missing)
        _say(f'needs {needed}; not installed: {found}; run pip install "fastvar-fx[cli]"')
        return 2
    try:
        with _current_directory_importable():
            _commands()(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except (FastVARError, OSError) as error:
        _say(str(error))
        return 1
    return 0


def _commands() -> Callable[[Sequence[str] | None], object]:
    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        help="Prunes cached tokens in next-scale (VAR) image generators.",
    )
    app.command("presets")(_presets)
    app.command("explain")(_explain)
    app.command("demo")(_demo)
    app.command("bench")(_bench)
    return partial(typer.main.get_command(app).main, prog_name="fastvar-fx")


def _say(message: str) -> None:
    print(f"fastvar-fx: {message}", file=sys.stderr)


def _usage(message: str) -> NoReturn:
    raise typer.BadParameter(message)


# --- commands ---------------------------------------------------------------------------------


def _presets(as_json: Json = False) -> None:
    """List the named schedules."""
    if as_json:
        print(json.dumps({name: _as_dict(schedule) for name, schedule in presets().items()}))
        return
    names = (
        "preset",
        "scales",
        "ratios",
        "cache\nstep",
        "layers",
        "tokens",
        "late",
        "saved",
        "skipped",
    )
    table = _table(*names, left=2)
    for name, schedule in presets().items():
        table.add_row(name, *_preset_cells(schedule))
    _print(table)
    _print(
        "Steps and layers count from 0. tokens: of one image, all steps. late: share of them in "
        "pruned steps. saved: share that the branches of the pruning layers do not compute. "
        "skipped: share of the steps that the loop leaves out."
    )


def _explain(
    model: ModelName = "tiny",
    preset: PresetName = None,
    schedule: ScheduleFile = None,
    ratios: Ratios = None,
    blocks: Blocks = None,
    run: Run = None,
    batch: Batch = None,
    on_full: OnFullName = _OnFull.SKIP,
    as_json: Json = False,
) -> None:
    """Say what every branch does at the cache step and the pruned steps, and why."""
    asked = _Asked(model, preset, schedule, ratios, blocks, run, batch)
    subject = asked.subject()
    fast = transform(subject.model, subject.schedule, blocks=blocks, on_full=on_full.value)
    report = trace(fast, subject.generate)
    print(report.to_json() if as_json else f"{_headline(subject)}\n\n{report}")


def _demo(
    out: Out = Path("demo"),
    model: DemoModelName = _DEMO,
    preset: PresetName = None,
    schedule: ScheduleFile = None,
    ratios: Ratios = None,
    blocks: Blocks = None,
    run: Run = None,
    batch: Batch = None,
    seed: Seed = 0,
    repeats: Repeats = None,
    as_json: Json = False,
) -> None:
    """Generate a batch dense and pruned, compare the times, and draw both."""
    started = perf_counter()
    asked = _Asked(model, preset, schedule, ratios, blocks, run, batch, seed)
    times, patience = (_REPEATS, _PATIENCE) if repeats is None else (repeats, inf)
    with _progress(phases(times) + 2) as progress:
        progress("building the model")
        subject = asked.subject()
        out.mkdir(parents=True, exist_ok=True)
        result = measure(subject, repeats=times, patience=patience, progress=progress)
        progress("drawing")
        files = _draw(subject, result, out)
    seconds = perf_counter() - started
    if as_json:
        print(json.dumps(_demo_dict(subject, result, files, seconds)))
    else:
        _print_demo(subject, result, files, seconds)


def _bench(
    preset: BenchPreset = "var-tiny",
    batch: BenchBatch = 1,
    repeats: BenchRepeats = 5,
    compiled: Compiled = True,
    steps: Steps = False,
    as_json: Json = False,
) -> None:
    """Measure a model dense and pruned, eager and compiled, by turns in one process."""
    chosen = bench.preset(preset)
    with _progress(bench.phases(chosen, repeats, compiled=compiled)) as progress:
        result = bench.measure(
            preset, batch=batch, repeats=repeats, compiled=compiled, progress=progress
        )
    if as_json:
        print(json.dumps(_bench_dict(result, with_steps=steps)))
    else:
        _print_bench(result, with_steps=steps)


# --- what was asked for -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    """The options that say which model, which schedule and how to run it."""

    model: str
    preset: str | None
    schedule_file: Path | None
    ratios: str | None
    blocks: str | None
    run: str | None
    batch: int | None
    seed: int = 0

    def subject(self) -> Subject:
        """Builds the model and its schedule."""
        return self._own_model() if ":" in self.model else self._named_model()

    def _named_model(self) -> Subject:
        if self.run is not None:
            _usage(f"--run goes with package.module:factory; {self.model} brings its own run")
        schedule = self._schedule(self._named_scales())
        sides = _square_sides(schedule)
        name, sizes = ("tiny", _DEMO_SIZES) if self.model == _DEMO else (self.model, {})
        try:
            var = build(name, scales=sides, **sizes)
        except (TypeError, ValueError) as error:
            raise ModelError(f"{self.model} cannot be built: {error}") from error
        name = f"VAR, {var.depth} blocks, width {var.width}"
        note = "random weights: the pictures show texture, no objects"
        run = partial(_run_var, batch=self.batch or 2, seed=self.seed)
        return Subject(name, var, schedule, run, self.blocks, self.seed, note)

    def _named_scales(self) -> tuple[int, ...]:
        if self.model == _DEMO:
            return VAR_512
        if self.model not in CONFIGS:
            names = (_DEMO, *CONFIGS)
            close = get_close_matches(self.model, names) or names
            raise ModelError(
                f"no model is named {self.model!r}; did you mean {' or '.join(close)}? A model of "
                f"your own is given as package.module:factory"
            )
        return CONFIGS[self.model].scales

    def _own_model(self) -> Subject:
        if self.run is None:
            _usage(
                f"{self.model} needs --run package.module:function, which runs one generation, "
                f"such as  def run(model): return model.generate(batch=2)"
            )
        if self.batch is not None:
            _usage("--batch is for the named models; your --run function decides the batch")
        schedule = self._schedule(None)
        run = _users_code(f"--run {self.run}", RunError)(_load(self.run, "--run"))
        return Subject(self.model, _call_factory(self.model), schedule, run, self.blocks, self.seed)

    def _schedule(self, own: Sequence[int] | None) -> Schedule:
        if self.preset is not None and self.schedule_file is not None:
            _usage("--preset and --schedule exclude each other")
        if self.preset is not None:
            base = Schedule.preset(self.preset)
        elif self.schedule_file is not None:
            base = Schedule.from_json(self.schedule_file.read_text(encoding="utf-8"))
        elif own is not None:
            base = Schedule(own, _RATIOS)
        else:
            _usage(f"{self.model} needs --preset NAME or --schedule FILE with the scales it draws")
        return base if self.ratios is None else _with_ratios(base, self.ratios)


def _with_ratios(schedule: Schedule, text: str) -> Schedule:
    """Returns a schedule with other ratios; their number moves the cache step along."""
    try:
        ratios = [float(part) for part in text.split(",")]
    except ValueError:
        _usage(f"--ratios takes numbers in [0, 1] with commas, such as 0.5,0.75; found {text!r}")
    kept_step = schedule.cache_step if len(ratios) == len(schedule.ratios) else None
    return Schedule(schedule.scales, ratios, cache_step=kept_step, layers=schedule.layers)


def _square_sides(schedule: Schedule) -> tuple[int, ...]:
    if any(len(scale) != 2 or scale[0] != scale[1] for scale in schedule.scales):
        raise ScheduleError(
            f"the named models draw square maps; found {schedule.scales}. Give a model of your own "
            f"as package.module:factory"
        )
    return tuple(scale[0] for scale in schedule.scales)


def _run_var(model: VAR, *, batch: int, seed: int) -> Tensor:
    return model.autoregressive_infer_cfg(batch, None, g_seed=seed, top_k=100, top_p=0.95)


# --- the user's code --------------------------------------------------------------------------


def _call_factory(path: str) -> nn.Module:
    factory = _load(path, "MODEL")
    with _users_code(path, ModelError):
        model = factory()
    if not isinstance(model, nn.Module):
        raise ModelError(f"{path} must return a torch.nn.Module; found {type(model).__name__}")
    return model


def _load(path: str, what: str) -> Callable[..., Any]:
    """Returns the callable at `package.module:name`."""
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        _usage(f"{what} is given as package.module:name; found {path!r}")
    with _users_code(f"{what} {path}: importing {module_name}", ModelError):
        found: Any = importlib.import_module(module_name)
    names = [key for key, value in vars(found).items() if callable(value)]
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        close = get_close_matches(name, names) or names[:8]
        hint = f"did you mean {' or '.join(close)}?" if close else "it defines no function"
        raise ModelError(f"{what} {path}: {module_name} has no callable {name!r}; {hint}")
    return found  # type: ignore[no-any-return]


@contextmanager
def _users_code(what: str, kind: type[FastVARError]) -> Iterator[None]:
    """Turns what the user's own code raises into one message that says where."""
    try:
        yield
    except (FastVARError, KeyboardInterrupt):
        raise
    except Exception as error:
        message = f"{what} failed: {type(error).__name__}: {error}"
        raise kind(message + _place(error)) from error


def _place(error: Exception) -> str:
    """Returns where the user's code, or what it called, raised; nothing if it was not reached."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = (__file__, contextlib.__file__, importlib.__file__)
    reached = [f for f in frames if f.filename not in ours and not f.filename.startswith("<")]
    return f" ({reached[-1].filename}:{reached[-1].lineno})" if reached else ""


@contextmanager
def _current_directory_importable() -> Iterator[None]:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)


# --- text -------------------------------------------------------------------------------------


def _headline(subject: Subject) -> str:
    schedule = subject.schedule
    ratios = ", ".join(f"{ratio:g}" for ratio in schedule.ratios) or "none"
    return (
        f"{subject.name}; {schedule.steps} scales, {_sides(schedule.scales[0])} to "
        f"{_sides(schedule.scales[-1])}; ratios {ratios}; cache step {schedule.cache_step}"
    )


def _sides(scale: Scale) -> str:
    return "x".join(map(str, scale))


def _preset_cells(schedule: Schedule) -> tuple[str, ...]:
    data = _as_dict(schedule)
    square = all(len(set(scale)) == 1 for scale in schedule.scales)
    maps = [str(scale[0]) if square else _sides(scale) for scale in schedule.scales]
    layers = schedule.layers
    return (
        " ".join(maps),
        " ".join(f"{ratio:g}" for ratio in schedule.ratios),
        str(schedule.cache_step),
        "all" if layers is None else f"{layers[0]}..{layers[-1]}",
        str(data["tokens"]),
        f"{data['late_share']:.0%}",
        f"{data['saved_share']:.0%}",
        f"{data['skipped_share']:.0%}",
    )


def _as_dict(schedule: Schedule) -> dict[str, Any]:
    """Returns a schedule with its token counts, as plain data."""
    pruned = [step for step in schedule.pruned_steps if step not in schedule.full_steps]
    late, kept = (sum(map(count, pruned)) for count in (schedule.tokens, schedule.kept))
    skipped = sum(map(schedule.tokens, schedule.full_steps))
    tokens = sum(map(schedule.tokens, range(schedule.steps)))
    data: dict[str, Any] = json.loads(schedule.to_json())
    return data | {
        "tokens": tokens,
        "late_share": late / tokens,
        "saved_share": (late - kept) / tokens,
        "skipped_share": skipped / tokens,
    }


def _environment(subject: Subject) -> dict[str, Any]:
    weight = subject.weight
    device = str(weight.device)
    if weight.device.type == "cuda":
        device = f"{device} ({torch.cuda.get_device_name(weight.device)})"
    return {
        "device": device,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _environment_line(subject: Subject, batch: int) -> str:
    data = _environment(subject)
    return (
        f"{data['device']}, {data['dtype']}, batch {batch}, "
        f"{data['threads']} threads, torch {data['torch']}, Python {data['python']}"
    )


def _demo_dict(
    subject: Subject, result: Measurement, files: Sequence[Path], seconds: float
) -> dict[str, Any]:
    return {
        "model": subject.name,
        "note": subject.note,
        "seed": subject.seed,
        **_environment(subject),
        "schedule": json.loads(subject.schedule.to_json()),
        **result.as_dict(),
        "files": [str(path) for path in files],
        "seconds": round(seconds, 1),
    }


def _print_demo(
    subject: Subject, result: Measurement, files: Sequence[Path], seconds: float
) -> None:
    _print(_headline(subject))
    _print(_environment_line(subject, len(result.dense_images)))
    _print(_step_table(result))
    _print(_speedup_table(result))
    for line in _remarks(subject, result):
        _print(line)
    print(f"wrote {', '.join(map(str, files))}; {seconds:.0f} s in all")


def _step_table(result: Measurement) -> Table:
    measured = ("ms\ndense", "ms\npruned", "GFLOP\ndense", "GFLOP\npruned")
    table = _table("step", "scale", "tokens", "kept", *measured, "speed-up", "limit")
    for step in result.steps:
        table.add_row(*_step_cells(step))
    return table


def _step_cells(step: StepResult) -> tuple[str, ...]:
    pruned = step.kept < step.tokens
    return (
        str(step.step),
        _sides(step.scale),
        str(step.tokens),
        str(step.kept) if pruned else "all",
        _milliseconds(step.dense),
        _milliseconds(step.pruned),
        f"{step.dense_flops / 1e9:.1f}",
        f"{step.pruned_flops / 1e9:.1f}",
        f"{step.speedup:.2f}x",
        _times(step.limit) if pruned else "",
    )


def _speedup_table(result: Measurement) -> Table:
    table = _table("", "ms dense", "ms pruned", "speed-up", "limit", "of limit", left=1)
    parts = {
        "transformer, pruned steps": result.pruned_steps,
        "transformer, all steps": result.transformer,
        "whole run with image decoder": result.total,
    }
    for name, part in parts.items():
        table.add_row(name, *_comparison_cells(part))
    return table


def _comparison_cells(part: Comparison) -> tuple[str, ...]:
    share = part.share_of_limit
    return (
        _milliseconds(part.dense),
        _milliseconds(part.pruned),
        f"{part.speedup:.2f}x",
        _times(part.limit),
        "-" if share is None else f"{share:.0%}",
    )


def _remarks(subject: Subject, result: Measurement) -> Iterator[str]:
    several = f"median of {result.repeats} alternating runs after a warm-up, ± half of max - min"
    yield (
        f"ms: {several if result.repeats > 1 else 'one run after a warm-up'}. "
        f"limit: dense FLOPs / pruned FLOPs of the blocks' matrix products; for the whole run, all "
        f"else taking as long as in the dense run."
    )
    pruned, branches = result.branch_counts
    refused = "" if pruned == branches else "; fastvar-fx explain says why the others do not"
    yield f"{pruned} of {branches} branches prune{refused}. Step skipping: none."
    if result.repeats == 1:
        yield "one run shows no spread, and what else ran meanwhile counts in full; see --repeats"
    elif result.unsteady:
        yield "the times spread by more than 20 %: something else was running; measure again"
    if result.slower_steps:
        yield f"slower than dense at steps {', '.join(map(str, result.slower_steps))}"
    if result.repeat_difference > 0:
        yield (
            f"two dense runs differ by up to {result.repeat_difference:.2g}: the run is not "
            f"deterministic, and the difference picture holds that too"
        )
    if subject.note:
        yield subject.note


def _milliseconds(time: Spread) -> str:
    middle, half = 1e3 * time.median, 1e3 * (time.high - time.low) / 2
    digits = 0 if middle >= 100 else 1
    return f"{middle:.{digits}f}" + (f" ±{half:.{digits}f}" if half else "")


def _times(factor: float | None) -> str:
    return "-" if factor is None else f"{factor:.2f}x"


def _bench_dict(result: bench.Result, *, with_steps: bool) -> dict[str, Any]:
    data = {
        **_environment(result.subject),
        "preset": result.subject.name,
        "batch": result.batch,
        "repeats": result.repeats,
        "schedule": json.loads(result.subject.schedule.to_json()),
        "rows": [row.as_dict() for row in result.rows],
        "total_ms": {row.name: 1e3 * row.total.median for row in result.rows},
        "speedup_over_dense_compiled": {row.name: row.compiled_speedup for row in result.rows},
    }
    if with_steps:
        data["step_ms"] = {row.name: [1e3 * s.median for s in row.steps] for row in result.rows}
    return data


def _print_bench(result: bench.Result, *, with_steps: bool) -> None:
    _print(_headline(result.subject))
    _print(_environment_line(result.subject, result.batch))
    times = ("ms", "iqr", "total\nms", "x dense\neager", "x dense\ncompiled")
    table = _table("", *times, "limit", "of\nlimit", "peak\nMiB", "KV\nMiB", left=1)
    for row in result.rows:
        table.add_row(row.name, *_bench_cells(row))
    _print(table)
    if with_steps:
        _print(_bench_steps(result))
    _print(
        f"ms: transformer blocks over one generation, median of {result.repeats} alternating runs "
        f"after warm-up; iqr: distance of the quartiles; total: the whole run, with sampling and, "
        f"for VAR, the image decoder. limit: dense FLOPs / FLOPs of the blocks; of limit: against "
        f"the dense row of the same kind, eager or compiled. peak: of the token loop, without "
        f"weights. skip: steps of ratio 1 are left out, else they run on no tokens. peer: the "
        f"authors' argsort, interpolation and scatter. Random weights."
    )


def _bench_cells(row: bench.Row) -> tuple[str, ...]:
    return (
        f"{1e3 * row.transformer.median:.1f}",
        f"{1e3 * row.transformer.iqr:.1f}",
        f"{1e3 * row.total.median:.1f}",
        f"{row.speedup:.2f}",
        "-" if row.compiled_speedup is None else f"{row.compiled_speedup:.2f}",
        f"{row.limit:.2f}",
        f"{row.limit_fraction:.0%}",
        f"{row.peak_mib:.1f}",
        f"{row.kv_mib:.1f}",
    )


def _bench_steps(result: bench.Result) -> Table:
    """Returns the time in the blocks per step, in ms."""
    schedule = result.subject.schedule
    names = [row.name.replace("-", "\n") for row in result.rows]
    table = _table("step", "scale", "tokens", "kept", *names)
    for step, scale in enumerate(schedule.scales):
        times = [f"{1e3 * row.steps[step].median:.1f}" for row in result.rows]
        counts = (str(schedule.tokens(step)), str(schedule.kept(step)))
        table.add_row(str(step), _sides(scale), *counts, *times)
    return table


# --- pictures ---------------------------------------------------------------------------------


def _draw(subject: Subject, result: Measurement, out: Path) -> list[Path]:
    comparison, kept = out / "demo.png", out / "kept_tokens.png"
    about = f"{_environment_line(subject, len(result.dense_images))}, seed {subject.seed}"
    note = f"{about}; {subject.note}" if subject.note else about
    draw_comparison(result, _headline(subject), note, comparison)
    draw_kept_tokens(result, _headline(subject), note, kept)
    return [comparison, kept]


# --- terminal ---------------------------------------------------------------------------------


def _table(*columns: str, left: int = 0) -> Table:
    """Returns a table whose columns from `left` on are aligned to the right."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < left else "right", vertical="bottom")
    return table


def _print(what: object) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _WIDTH
    console.print(what)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """Shows what is being done on stderr: a bar on a terminal, else a line each.

    The bar moves only between runs, so that no thread draws while something is timed.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: _say(text)
        return
    columns = (BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as bar:
        task = bar.add_task("starting", total=total)

        def show(text: str) -> None:
            bar.update(task, description=text, advance=1, refresh=True)

        yield show

"""What goes to the terminal: tables, texts and progress."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table

from fastvar_fx.cli import say
from fastvar_fx.measuring.runs import Budget, Progress
from fastvar_fx.measuring.subject import Subject
from fastvar_fx.ops import Scale
from fastvar_fx.schedule import span_text

_WIDTH: Final = 100
"""Columns of a table that goes to a file or a pipe."""


def usage(message: str) -> NoReturn:
    """Ends with a message on what is wrong with the command line."""
    raise typer.BadParameter(message)


def make_folder(folder: Path) -> None:
    """Makes a folder for pictures.

    Raises:
        OSError: If it cannot be made, with what to do.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"asked to write pictures to {folder}, which cannot be made: {error.strerror}; give "
            f"another folder"
        ) from error


def headline(subject: Subject) -> str:
    """Returns a line on the model and its schedule."""
    return f"{subject.name}; {schedule_line(subject)}"


def schedule_line(subject: Subject) -> str:
    """Returns a line on the schedule."""
    schedule = subject.schedule
    first = schedule.steps - len(schedule.ratios)
    late = map(schedule.ratios_at, range(first, schedule.steps))
    ratios = ", ".join(map(span_text, late)) or "none"
    return (
        f"{schedule.steps} scales, {sides_text(schedule.scales[0])} to "
        f"{sides_text(schedule.scales[-1])}; ratios {ratios}; cache step {schedule.cache_step}"
    )


def sides_text(scale: Scale) -> str:
    """Returns a scale as `h x w`."""
    return "x".join(map(str, scale))


def environment(subject: Subject) -> dict[str, Any]:
    """Returns what the times depend on, as plain data."""
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


def environment_line(subject: Subject, batch: int | None = None) -> str:
    """Returns what the times depend on, as one line; without a batch that is not known."""
    data = environment(subject)
    of_batch = "" if batch is None else f"batch {batch}, "
    return (
        f"{data['device']}, {data['dtype']}, {of_batch}"
        f"{data['threads']} threads, torch {data['torch']}, Python {data['python']}"
    )


def new_table(*columns: str, left: int = 0) -> Table:
    """Returns a table whose columns from `left` on are aligned to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < left else "right", vertical="bottom")
    return table


def show(what: object) -> None:
    """Prints a table or a text to stdout."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _WIDTH
    console.print(what)


@contextmanager
def show_progress(budget: Budget | None = None) -> Iterator[Progress]:
    """Shows the work and the time spent and left on stderr: a bar on a terminal, else lines.

    The bar moves only between runs, so that no thread draws while something is timed.

    Args:
        budget: The time that all of it may take; None for no bound.
    """
    budget = budget or Budget()
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: say(f"{_clock(budget)}: {text}")
        return
    columns = (BarColumn(), TextColumn("{task.description}"))
    total = budget.seconds if isfinite(budget.seconds) else None
    with ProgressBar(*columns, console=console, auto_refresh=False, transient=True) as bar:
        task = bar.add_task("starting", total=total)

        def advance(text: str) -> None:
            description = f"{_clock(budget)}: {text}"
            bar.update(task, description=description, completed=budget.spent, refresh=True)

        yield advance


def _clock(budget: Budget) -> str:
    """Returns the time spent and, where it is bounded, the time left."""
    left = budget.seconds - budget.spent
    return f"{budget.spent:.0f} s" + (f", {max(left, 0):.0f} s left" if isfinite(left) else "")

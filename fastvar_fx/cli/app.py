"""The commands, put together."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from fastvar_fx.cli.bench import run_bench
from fastvar_fx.cli.calibrate import run_calibrate
from fastvar_fx.cli.demo import run_demo
from fastvar_fx.cli.evaluate import run_evaluate
from fastvar_fx.cli.explain import run_explain
from fastvar_fx.cli.presets import run_presets
from fastvar_fx.cli.sample import run_sample
from fastvar_fx.cli.user_code import current_directory_importable


def run(arguments: Sequence[str] | None) -> None:
    """Runs the command that the arguments name, None being those of the process.

    Raises:
        SystemExit: Always, when it is done.
    """
    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        help="Prunes cached tokens in next-scale (VAR) image generators.",
    )
    app.command("presets")(run_presets)
    app.command("explain")(run_explain)
    app.command("demo")(run_demo)
    app.command("bench")(run_bench)
    app.command("evaluate")(run_evaluate)
    app.command("sample")(run_sample)
    app.command("calibrate")(run_calibrate)
    with current_directory_importable():
        typer.main.get_command(app).main(arguments, prog_name="fastvar-fx")

"""The command line, a module for each command: `fastvar-fx --help` lists them.

Exit codes: 0 done; 1 it could not be done and stderr says why; 2 the command line is wrong, or
packages of the extra `cli` are missing. With `--json`, stdout holds JSON and nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Final

from fastvar_fx.errors import FastVARError

_EXTRA: Final = {
    "typer": "typer",
    "rich": "rich",
    "jinja2": "jinja2",
    "matplotlib": "matplotlib",
    "PIL": "pillow",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Args:
        arguments: Without the program's name; None takes those of the process.
    """
    missing = [package for module, package in _EXTRA.items() if find_spec(module) is None]
    if missing:
        needed, found = ", ".join(_EXTRA.values()), ", ".join(missing)
        say(f'needs {needed}; not installed: {found}; run pip install "fastvar-fx[cli]"')
        return 2
    from fastvar_fx.cli.app import run

    try:
        run(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except (FastVARError, OSError) as error:
        say(str(error))
        return 1
    return 0


def say(message: str) -> None:
    """Prints a line to stderr."""
    print(f"fastvar-fx: {message}", file=sys.stderr)

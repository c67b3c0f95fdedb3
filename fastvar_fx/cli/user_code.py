"""Loads the user's functions, given as `package.module:name`, and reports what they raise."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from fastvar_fx.cli.terminal import usage
from fastvar_fx.errors import FastVARError, ModelError, did_you_mean, user_line


def call_factory(path: str) -> nn.Module:
    """Returns the model that the function at `package.module:name` returns."""
    factory = load(path, "MODEL")
    with users_code(path, ModelError):
        model = factory()
    if not isinstance(model, nn.Module):
        raise ModelError(f"{path} must return a torch.nn.Module; found {type(model).__name__}")
    return model


def load(path: str, what: str) -> Callable[..., Any]:
    """Returns the callable at `package.module:name`."""
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        usage(f"{what} is given as package.module:name; found {path!r}")
    with users_code(f"{what} {path}: importing {module_name}", ModelError):
        found: Any = importlib.import_module(module_name)
    names = [key for key, value in vars(found).items() if callable(value)]
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        hint = did_you_mean(name, names) if names else "it defines no functions"
        raise ModelError(f"{what} {path}: {module_name} has no callable {name!r}; {hint}")
    return found  # type: ignore[no-any-return]


@contextmanager
def users_code(what: str, kind: type[FastVARError]) -> Iterator[None]:
    """Raises what the user's code raises as one error that names the place."""
    try:
        yield
    except (FastVARError, KeyboardInterrupt):
        raise
    except Exception as error:
        line = user_line(error)
        at = f" ({line})" if line else ""
        raise kind(f"{what} failed: {type(error).__name__}: {error}{at}") from error


@contextmanager
def current_directory_importable() -> Iterator[None]:
    """Makes modules in the current directory importable."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)

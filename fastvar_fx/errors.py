"""The errors that users meet. Every message says what was asked, what was found, what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import NoReturn

from passes.user_frames import error_line, is_users


class FastVARError(Exception):
    """Base of all errors of this package."""


class ArgumentError(FastVARError, ValueError):
    """An argument that is unknown, out of its range, or does not fit the others."""


class ScheduleError(FastVARError, ValueError):
    """A schedule that contradicts itself, or cannot be read."""


class ModelError(FastVARError, ValueError):
    """A model that cannot be loaded or transformed: no blocks, training mode, transformed twice."""


class RunError(FastVARError, RuntimeError):
    """A generation that does not follow the schedule."""


class CaptureMismatchError(RunError):
    """Captured outputs that do not fit the live call: another batch, dtype or device."""


class CompileError(FastVARError, RuntimeError):
    """A program or a block's forward that torch.compile cannot compile."""


class GraphError(FastVARError, RuntimeError):
    """A generation that no CUDA graph can record, or a replay that does not fit the recording."""


class PackageError(FastVARError, RuntimeError):
    """A model that cannot be exported, or a folder of packages that does not fit the model."""


class NothingPrunedError(FastVARError, RuntimeError):
    """A schedule that prunes, and a model or run in which nothing could be."""


def raise_to_compiler(message: str) -> NoReturn:
    """Raises a `RunError` while `torch.compile` traces, which lets only its own errors pass."""
    from torch._dynamo.exc import Unsupported

    raise type("RunError", (RunError, Unsupported), {"__module__": __name__})(message)


# Dynamo calls it as it is, as if `torch.compiler.assume_constant_result` were around it.
raise_to_compiler._dynamo_marked_constant = True  # type: ignore[attr-defined]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns "did you mean A or B?" with the known names closest to `name`, or the first eight."""
    names = list(known)
    return f"did you mean {' or '.join(get_close_matches(name, names) or names[:8])}?"


def user_line(error: BaseException) -> str:
    """Returns the innermost `file:line` of the user's code or of a model that an error passed.

    It is empty if the error passed neither.
    """
    return error_line(error, _is_users)


def _is_users(module: str) -> bool:
    ours = module.partition(".")[0] == "fastvar_fx" and not module.startswith("fastvar_fx.models")
    return is_users(module) and not ours

"""Finds the user's line: the innermost code that is not torch's or the compiler's."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Final

from torch.fx import Node

_LIBRARIES: Final = frozenset({"torch", "einops", "passes", "contextlib", "importlib"})
_GENERATED: Final = "<eval_with_key>"
"""How torch.fx names the files of the code that it generates."""
_FRAME: Final = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')

IsUsers = Callable[[str], bool]
"""Whether the code of a Python module, given by its dotted name, is the user's."""


def is_users(module: str) -> bool:
    """Whether a module belongs to neither torch, einops, this compiler nor the import system."""
    return module.partition(".")[0] not in _LIBRARIES


def innermost_user_frame() -> str:
    """Returns the user's innermost frame on the running stack, as a line of a stack trace."""
    for frame, line in traceback.walk_stack(sys._getframe(1)):
        if _is_users_frame(frame, is_users):
            return f'File "{frame.f_code.co_filename}", line {line}, in {frame.f_code.co_name}\n'
    return ""


def error_line(error: BaseException, users: IsUsers = is_users) -> str:
    """Returns the innermost `file:line` of the user that an error passed, or an empty string.

    Args:
        error: A caught error.
        users: Whose modules count as the user's; a library on top of the compiler excludes its own.
    """
    passed = user_frames(error, users)
    return f"{passed[-1][0].f_code.co_filename}:{passed[-1][1]}" if passed else ""


def user_frames(
    error: BaseException, users: IsUsers = is_users
) -> list[tuple[FrameType, int, int]]:
    """Returns the user's frames that an error passed: frame, line, index of the instruction."""
    found = []
    passed = error.__traceback__
    while passed is not None:
        if _is_users_frame(passed.tb_frame, users):
            found.append((passed.tb_frame, passed.tb_lineno, passed.tb_lasti))
        passed = passed.tb_next
    return found


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message."""
    return str(error).strip().partition("\n")[0]


def where(node: Node) -> str:
    """Returns the `file:line` of the user's code that made `node`, or an empty string."""
    return line_of(node.stack_trace or "")


def line_of(frame: str) -> str:
    """Returns the `file:line` of a line of a stack trace, or an empty string."""
    match = _FRAME.search(frame)
    return f"{match['file']}:{match['line']}" if match else ""


def _is_users_frame(frame: FrameType, users: IsUsers) -> bool:
    generated = frame.f_code.co_filename.startswith(_GENERATED)
    return not generated and users(str(frame.f_globals.get("__name__", "")))

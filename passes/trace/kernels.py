"""Recognizes kernels that read the memory of their tensors, which stand-ins do not have."""

from __future__ import annotations

import ast
import linecache
import sys
from types import FrameType
from typing import Any, Final

from passes.user_frames import is_users, user_frames

_READS_MEMORY: Final = ("data pointer", ".numpy() is not supported", "custom kernel")
"""What torch's errors say when something asks a stand-in for its memory."""
_NOT_KERNELS: Final = {"numpy", "triton"} | sys.stdlib_module_names


def kernel_advice(error: BaseException) -> str:
    """Returns how to declare the kernel that raised an error; empty if it was no kernel."""
    if not any(sign in str(error) for sign in _READS_MEMORY):
        return ""
    calls = [_called(frame, instruction) for frame, _, instruction in user_frames(error)]
    name = next((call for call in reversed(calls) if call), "kernel")
    line = f'{name} = register_opaque({name}, fake=..., axes="tokenwise")'
    return f"declare the kernel before the model runs: {line}"


def _called(frame: FrameType, instruction: int) -> str:
    """Returns the dotted name of the function that a frame was calling, if it may be a kernel."""
    code = frame.f_code
    line, end, start, stop = list(code.co_positions())[instruction // 2]
    if line is None or line != end:
        return ""
    text = linecache.getline(code.co_filename, line).encode()[start:stop].decode()
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError:
        return ""
    name = ast.unparse(tree.func) if isinstance(tree, ast.Call) else ""
    return name if _may_be_kernel(_resolved(name, frame)) else ""


def _resolved(name: str, frame: FrameType) -> Any:
    """Returns the value of a dotted name in a frame, or None."""
    first, *rest = name.split(".")
    value = frame.f_locals.get(first, frame.f_globals.get(first))
    for part in rest:
        value = getattr(value, part, None)
    return value


def _may_be_kernel(function: Any) -> bool:
    bound_to = type(getattr(function, "__self__", ""))
    owner = str(getattr(function, "__module__", None) or bound_to.__module__)
    own = is_users(owner) and owner.partition(".")[0] not in _NOT_KERNELS
    return callable(function) and own

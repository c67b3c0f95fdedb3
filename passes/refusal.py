"""Why something stays dense: a failed match is a value that carries its reason."""

from __future__ import annotations

import ast
import linecache
import re
import sys
import traceback
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, NoReturn

if TYPE_CHECKING:
    from torch.fx import Node

CODES: Final[dict[str, str]] = {
    "FVX001": "the block could not be traced",
    "FVX002": "the captured graph does not reproduce the block",
    "FVX003": "no residual stream leads through the block",
    "FVX004": "the block holds no residual branch",
    "FVX010": "an op has no axis rule",
    "FVX011": "the token axis is reshaped",
    "FVX012": "the branch reads the token axis by position",
    "FVX013": "the branch mixes tokens other than by attention",
    "FVX014": "a value of the branch is used outside it",
    "FVX015": "the branch writes in place into a value it does not own",
    "FVX016": "the branch has no captured output",
    "FVX017": "the rewritten graph does not reproduce the block",
    "FVX018": "the rewritten op does not run on the kept tokens",
    "FVX019": "the graph depends on a size that varies",
    "FVX020": "the compiler failed on the block",
    "FVX021": "a later step has a value for every key, pruned or not",
}
"""Stable refusal codes and what each means; the reason of a refusal adds the case at hand."""

_HINTS: Final[dict[str, str]] = {
    "FVX001": "keep control flow free of tensor values; declare fused kernels with register_opaque",
    "FVX002": "look for state that the block reads from outside itself, such as a module global",
    "FVX003": "a block takes a (B, L, C) tensor and returns one; name other modules with blocks=",
    "FVX004": "name the modules that hold the residual adds with blocks=",
    "FVX010": "teach the op with fastvar_fx.axis_rule, or leave this kind dense with branches=",
    "FVX011": "none needed: this branch stays dense, the rest prunes",
    "FVX012": "none needed: this branch stays dense, the rest prunes",
    "FVX013": "none needed: this branch stays dense, the rest prunes",
    "FVX014": "leave this kind dense with branches=, or do not return that value",
    "FVX015": "assign the updated tensor to the attribute instead of writing into it",
    "FVX016": "capture a step at which the block runs the same branches (cache_step=)",
    "FVX017": "check the axis rules and opaque kernels you declared: one leaves something out",
    "FVX019": "none needed: every such size gets a graph of its own",
    "FVX020": "please report it with the logged traceback",
    "FVX021": "none needed: it prunes at the last step, whose keys no later step reads",
    "FVX018": "teach the op with fastvar_fx.axis_rule, or leave this kind dense with branches=",
}

_NOT_USERS: Final = frozenset({"torch", "einops", "passes"})
_NOT_KERNELS: Final = _NOT_USERS | {"numpy", "triton"} | sys.stdlib_module_names
_READS_MEMORY: Final = ("data pointer", ".numpy() is not supported", "custom kernel")
"""What an error says if something reached for the memory of a tensor that has none."""
_FRAME: Final = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


@dataclass(frozen=True)
class Refusal:
    """A branch or block that stays dense, and why.

    Attributes:
        code: Stable code, a key of `CODES`.
        reason: The case at hand, in words.
        op: The op at fault, such as `aten.conv1d.default`; empty if there is none.
        where: The user's `file:line` that called it; empty if unknown.
        advice: What the user can do about this case, if it is more than about any of this code.
    """

    code: str
    reason: str
    op: str = ""
    where: str = ""
    advice: str = ""

    @property
    def title(self) -> str:
        """What the code means."""
        return CODES[self.code]

    @property
    def hint(self) -> str:
        """What the user can do about it."""
        return self.advice or _HINTS[self.code]

    def __str__(self) -> str:
        at = f" at {self.where}" if self.where else ""
        op = f" ({self.op})" if self.op else ""
        return f"{self.code} {self.title}: {self.reason}{op}{at}. Hint: {self.hint}."


class RefusedError(Exception):
    """Raised inside an analysis to refuse; caught by the pass that asked, never by the user."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


def refuse(code: str, reason: str, node: Node | None = None) -> NoReturn:
    """Refuses with `code`, naming the op and the user's line of `node`."""
    if node is None:
        raise RefusedError(Refusal(code, reason))
    raise RefusedError(Refusal(code, reason, op=str(node.target), where=where(node)))


def where(node: Node) -> str:
    """Returns the `file:line` of the user's code that made `node`, or an empty string."""
    return line_of(node.stack_trace or "")


def line_of(frame: str) -> str:
    """Returns the `file:line` of a line of a stack trace, or an empty string."""
    match = _FRAME.search(frame)
    return f"{match['file']}:{match['line']}" if match else ""


def innermost_user_frame() -> str:
    """Returns the innermost frame of the running stack outside torch, as a stack trace line."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _package(frame) in _NOT_USERS:
        frame = frame.f_back
    if frame is None:
        return ""
    code = frame.f_code
    return f'File "{code.co_filename}", line {frame.f_lineno}, in {code.co_name}\n'


def error_line(error: BaseException) -> str:
    """Returns the innermost `file:line` outside torch that an error passed, or an empty string."""
    lines = [
        f"{frame.f_code.co_filename}:{number}"
        for frame, number in traceback.walk_tb(error.__traceback__)
        if _package(frame) not in _NOT_USERS
    ]
    return lines[-1] if lines else ""


def kernel_advice(error: BaseException) -> str:
    """Returns how to declare the kernel that an error comes from; empty if it is not a kernel's.

    A kernel that reads the memory of its tensors cannot be traced, for stand-ins have none.
    """
    if not any(sign in str(error) for sign in _READS_MEMORY):
        return ""
    calls = [_called(*place) for place in _places(error)]
    name = next((call for call in reversed(calls) if call), "kernel")
    line = f'{name} = fastvar_fx.register_opaque({name}, fake=..., axes="tokenwise")'
    return f"declare the kernel before the model runs: {line}"


def _places(error: BaseException) -> list[tuple[FrameType, int]]:
    """Returns the frames that an error passed outside torch, each with its instruction."""
    places = []
    passed = error.__traceback__
    while passed is not None:
        if _package(passed.tb_frame) not in _NOT_USERS:
            places.append((passed.tb_frame, passed.tb_lasti))
        passed = passed.tb_next
    return places


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
    """Returns what a dotted name stands for in a frame, or None."""
    first, *rest = name.split(".")
    value = frame.f_locals.get(first, frame.f_globals.get(first))
    for part in rest:
        value = getattr(value, part, None)
    return value


def _may_be_kernel(function: Any) -> bool:
    owner = (
        getattr(function, "__module__", None) or type(getattr(function, "__self__", "")).__module__
    )
    return callable(function) and str(owner).partition(".")[0] not in _NOT_KERNELS


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]

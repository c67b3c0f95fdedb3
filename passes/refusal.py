"""Why a branch or a block stays dense: a failed match is a falsy value that carries its reason."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, NoReturn

from torch.fx import Node

from passes.user_frames import where


class Code(NamedTuple):
    """What a refusal code means, and what a user can do about it."""

    title: str
    hint: str


_NOTHING: Final = "none needed: this branch stays dense, the rest prunes"

CODES: Final = {
    "FVX001": Code(
        "the block could not be traced",
        "keep control flow free of tensor values; declare fused kernels with register_opaque",
    ),
    "FVX002": Code(
        "the captured graph does not reproduce the block",
        "look for state that the block reads from outside itself, such as a module global",
    ),
    "FVX003": Code(
        "no residual stream leads through the block",
        "a block takes a (B, L, C) tensor and returns one; choose other modules as blocks",
    ),
    "FVX004": Code(
        "the block holds no residual branch", "choose the modules that hold the adds as blocks"
    ),
    "FVX010": Code("no axis rule covers the call of an op", _NOTHING),
    "FVX011": Code("the token axis is reshaped", _NOTHING),
    "FVX012": Code("the branch reads the token axis by position", _NOTHING),
    "FVX013": Code("the branch mixes tokens other than by attention", _NOTHING),
    "FVX014": Code(
        "a value of the branch is used outside it",
        "leave this kind dense, or neither return nor store it",
    ),
    "FVX015": Code(
        "the branch writes in place into a value it does not own",
        "assign the updated tensor to the attribute instead of writing into it",
    ),
    "FVX016": Code(
        "the branch has no captured output", "capture at a step that runs the same branches"
    ),
    "FVX017": Code(
        "the rewritten graph does not reproduce the block",
        "look for a value that depends on the number or the order of the tokens",
    ),
    "FVX018": Code("the rewritten op does not run on the kept tokens", _NOTHING),
    "FVX019": Code(
        "the graph depends on a size that varies", "none needed: every size gets its own graph"
    ),
    "FVX020": Code("the compiler failed on the block", "report it with the logged traceback"),
    "FVX021": Code(
        "a later step needs every key, pruned or not",
        "none needed: it prunes at the last step, whose keys no later step reads",
    ),
    "FVX022": Code(
        "a number that is made of the token count enters the values",
        "none needed: this branch stays dense. Numbers that are attributes stay as they are",
    ),
    "FVX023": Code(
        "the block does not run on the kept tokens alone",
        "hand in what has an entry per token, or keep it in an attribute of the block",
    ),
    "FVX024": Code(
        "half of the batch cannot be dropped", "leave guidance_until out of the schedule"
    ),
    "FVX025": Code(
        "a part of the block changes the residual stream itself",
        "none needed: this part stays dense, the rest prunes. Parts that are added to the stream, "
        "as in x + part(x), may prune",
    ),
}
"""Stable refusal codes; the reason of a refusal adds the case at hand."""


@dataclass(frozen=True)
class Refusal:
    """A branch or block that stays dense, and why; it is false.

    A refusal may outlive the graph that it is about, in a report. So it holds the op and the line
    as text, and the node only weakly: `node` is None once the graph is gone.

    Attributes:
        code: Stable code, a key of `CODES`.
        reason: The case at hand, in words.
        op: The op at fault, such as `aten.conv1d.default`; empty if there is none.
        where: The user's `file:line` that called it; empty if unknown.
        advice: What the user can do in this case; if empty, the hint of the code applies.
        nearest: What came closest to being accepted; empty if unknown.
    """

    code: str
    reason: str
    op: str = ""
    where: str = ""
    advice: str = ""
    nearest: str = ""
    _node: weakref.ref[Node] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def at(
        cls, node: Node, code: str, reason: str, *, advice: str = "", nearest: str = ""
    ) -> Refusal:
        """Returns a refusal because of one node; for the arguments see `refuse`."""
        op, line, held = str(node.target), where(node), weakref.ref(node)
        return cls(code, reason, op, line, advice, nearest, held)

    def __bool__(self) -> bool:
        return False

    @property
    def node(self) -> Node | None:
        """The node at fault, while its graph lives."""
        return self._node() if self._node is not None else None

    @property
    def title(self) -> str:
        """What the code means."""
        return CODES[self.code].title

    @property
    def hint(self) -> str:
        """What the user can do about it."""
        return self.advice or CODES[self.code].hint

    def as_dict(self) -> dict[str, str]:
        """Returns its texts by name, for JSON."""
        named = {key: value for key, value in vars(self).items() if key != "_node"}
        return named | {"title": self.title, "hint": self.hint}

    def __str__(self) -> str:
        at = f" at {self.where}" if self.where else ""
        op = f" ({self.op})" if self.op else ""
        nearest = f" Nearest: {self.nearest}." if self.nearest else ""
        return f"{self.code} {self.title}: {self.reason}{op}{at}.{nearest} Hint: {self.hint}."

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_node": None}  # a weak reference can be neither pickled nor copied


class RefusedError(Exception):
    """Raised inside a pass to refuse the whole block."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


class BranchRefusedError(RefusedError):
    """Raised inside a pass to refuse one branch; the rest may still prune.

    Attributes:
        branch: Its index.
    """

    def __init__(self, branch: int, refusal: Refusal) -> None:
        super().__init__(refusal)
        self.branch = branch


def refuse(
    code: str, reason: str, node: Node | None = None, *, advice: str = "", nearest: str = ""
) -> NoReturn:
    """Refuses with `code`, naming the op and the user's line of `node`.

    Args:
        code: A key of `CODES`.
        reason: The case at hand.
        node: The node at fault.
        advice: What the user can do in this case; if empty, the hint of the code applies.
        nearest: What came closest to being accepted.
    """
    if node is None:
        raise RefusedError(Refusal(code, reason, advice=advice, nearest=nearest))
    raise RefusedError(Refusal.at(node, code, reason, advice=advice, nearest=nearest))

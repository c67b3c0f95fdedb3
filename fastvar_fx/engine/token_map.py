"""Finds which argument of a block's call is its (B, L, C) token map."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fastvar_fx.errors import ModelError, RunError
from passes import Call, LeakedTensorError, fingerprint, reference
from passes.analyse.branches import find_branches
from passes.refusal import RefusedError
from passes.trace.capture import BlockProgram, capture
from passes.trace.state import Path, get


def find_token_map(
    forward: Callable[..., Any], block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Path:
    """Returns the path of the (B, L, C) token map from the roots of a call.

    If several arguments could be it, it is the one that the residual stream starts from.

    Args:
        forward: The block's own forward, bound to it.
        block: The block.
        args: The call's arguments.
        kwargs: The call's keyword arguments.

    Raises:
        RunError: If no argument can be the token map.
        passes.LeakedTensorError: If the forward keeps a tensor where it cannot be seen.
    """
    places = [("args", i) for i, value in enumerate(args) if _is_map(value)]
    named = [("kwargs", name) for name, value in kwargs.items() if _is_map(value)]
    paths: list[Path] = [(("item", root), ("item", key)) for root, key in (*places, *named)]
    if not paths:
        raise RunError(
            f"a block of {type(block).__name__} was called without a (B, L, C) token map; found "
            f"{_describe(args, kwargs)}. Name the transformer blocks with blocks="
        )
    if len(paths) == 1:
        return paths[0]
    call = Call(forward, block, args, kwargs)
    results, _ = reference(call)
    shapes = {result.shape for result in results}
    likely = [path for path in paths if get(call.roots(), path).shape in shapes] or paths
    if len(likely) == 1:
        return likely[0]
    try:
        fingerprint(call)  # a capture does not notice tensors that the forward keeps elsewhere
        program = capture(call)
    except RefusedError:
        return likely[0]
    return next((path for path in likely if _carries_trunk(program, path)), likely[0])


@contextmanager
def naming_leaks(block: str) -> Iterator[None]:
    """Within it, a tensor that a forward keeps where it cannot be seen is an error of the model.

    Raises:
        ModelError: With the block's name and what to do.
    """
    try:
        yield
    except LeakedTensorError as error:
        raise ModelError(
            f"{block} cannot be traced: {error}. Keep such state in attributes, lists or dicts of "
            f"the block, or hand in the object that holds it, not a function that does; then "
            f"transform the model anew"
        ) from error


def _carries_trunk(program: BlockProgram, path: Path) -> bool:
    try:
        find_branches(program, path)
    except RefusedError:
        return False
    return True


def _is_map(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point()


def _describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    named = {**{str(i): a for i, a in enumerate(args)}, **kwargs}
    return ", ".join(f"{k}: {_shape_text(v)}" for k, v in named.items()) or "no arguments"


def _shape_text(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__

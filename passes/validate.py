"""Runs a captured graph against the real call; a graph that was not checked is never used.

Translation: the graph, unpruned, gives what the call gave. Permutation: the rewritten graph, with
all tokens in another order, gives every branch's output again; a position that is read and not
gathered shows here. Subset: a branch that does not attend to other tokens gives the same for the
tokens it keeps, however many; a value that depends on the token count shows here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.prune import Scale
from passes.refusal import Refusal

_TRANSLATION: Final = {torch.float64: 1e-12, torch.float32: 1e-5}
_PERMUTATION: Final = {torch.float64: 1e-8, torch.float32: 1e-3}


class PermutedTokens:
    """Operators that keep every token, in an order of each sample's own, and note the outputs.

    Attributes:
        outputs: Each branch's full output, in the order of the graph.
    """

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []
        self.restores_anew = False

    def select(self, x: Tensor, kept: int) -> Tensor:
        """Returns `kept` tokens, shuffled; the same for the same shape."""
        generator = torch.Generator().manual_seed(kept)
        order = torch.rand(*x.shape[:2], generator=generator).argsort(dim=1)[:, :kept]
        return order.to(x.device) + torch.zeros_like(x[:, :kept, 0], dtype=torch.int64)

    def take(self, x: Tensor, index: Tensor) -> Tensor:
        """Returns x (B, L, C) at `index` (B, L)."""
        return torch.take_along_dim(x, index.unsqueeze(-1), 1)

    def restore(
        self, kept: Tensor, index: Tensor, cached: Tensor, cached_scale: Scale, scale: Scale
    ) -> Tensor:
        """Puts the tokens back in order."""
        full = torch.take_along_dim(kept, index.argsort(dim=1).unsqueeze(-1), 1)
        self.outputs.append(full)
        return full


class SomeTokens(PermutedTokens):
    """Operators that keep some tokens, and go on with the dense output of every branch."""

    def restore(
        self, kept: Tensor, index: Tensor, cached: Tensor, cached_scale: Scale, scale: Scale
    ) -> Tensor:
        """Notes what the branch gave, written over its dense output; returns the latter."""
        place = index.unsqueeze(-1).expand_as(kept)
        self.outputs.append(cached.scatter(1, place, kept))
        return cached


def check_translation(made: Sequence[Tensor], expected: Sequence[Tensor]) -> Refusal | None:
    """Compares a captured graph's outputs with the real call's."""
    if len(made) != len(expected):
        return Refusal("FVX002", f"{len(made)} outputs, the block gives {len(expected)}")
    for place, (a, b) in enumerate(zip(made, expected, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return Refusal("FVX002", f"output {place} is {_meta(a)}, the block gives {_meta(b)}")
        error = _largest_difference(a, b)
        if not error <= _tolerance([b.dtype], _TRANSLATION, 4):
            text = f"output {place} differs by {error:.1e} (relative) at {_place(a, b)}"
            return Refusal("FVX002", text)
    return None


def check_permutation(
    made: Sequence[Tensor], expected: Sequence[Tensor], graph_module: GraphModule
) -> tuple[int, Refusal] | None:
    """Compares each branch's output under permuted tokens; returns the first that differs."""
    dtypes = [n.meta["val"].dtype for n in graph_module.graph.nodes if _is_float(n.meta.get("val"))]
    limit = _tolerance(dtypes, _PERMUTATION, 16)
    for place, (a, b) in enumerate(zip(made, expected, strict=True)):
        error = _largest_difference(a, b)
        if not error <= limit:
            at = _place(a, b)
            text = f"with permuted tokens it differs by {error:.1e} (relative) at {at}"
            return place, Refusal("FVX017", text)
    return None


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _tolerance(
    dtypes: Sequence[torch.dtype], known: dict[torch.dtype, float], epsilons: int
) -> float:
    floats = [dtype for dtype in dtypes if dtype.is_floating_point]
    return max((known.get(d, epsilons * torch.finfo(d).eps) for d in floats), default=0.0)


def _largest_difference(a: Tensor, b: Tensor) -> float:
    """Returns the largest difference relative to the largest value of b."""
    if not b.numel():
        return 0.0
    if not (b.is_floating_point() or b.is_complex()):
        return float(not torch.equal(a, b))
    a, b = a.detach(), b.detach()
    wide = torch.promote_types(b.dtype, torch.float32)
    quick = float((a.to(wide) - b.to(wide)).abs().amax() / b.abs().amax())
    if math.isfinite(quick):
        return quick
    difference, scale = _differences(a, b)
    return float(difference.amax() / scale)


def _differences(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns all differences, none where both are NaN or equal, and the largest finite b."""
    wide = torch.complex128 if b.is_complex() else torch.float64
    difference = (a.to(wide) - b.to(wide)).abs()
    both_nan = a.isnan() & b.isnan()
    difference = torch.where(both_nan | (a == b), torch.zeros_like(difference), difference)
    scale = b.to(wide).abs().nan_to_num(0.0, 0.0).amax()
    return difference, scale.clamp_min(torch.finfo(torch.float64).tiny)


def _place(a: Tensor, b: Tensor) -> tuple[int, ...]:
    """Returns where two tensors differ most."""
    difference, _ = _differences(a.detach(), b.detach())
    return tuple(int(i) for i in torch.unravel_index(difference.argmax().cpu(), b.shape))


def _meta(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"

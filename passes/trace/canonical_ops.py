"""Torch calls that are replaced, while tracing, by equivalent ops that have axis rules.

Each replacement computes the same; the translation check of every program covers it too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention
from torch.nn.attention.flex_attention import _identity, noop_mask
from torch.overrides import TorchFunctionMode

from passes.refusal import Refusal, RefusedError
from passes.user_frames import innermost_user_frame, line_of


class CanonicalOps(TorchFunctionMode):
    """While it is on, calls that have a canonical form are made in that form."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _CANONICAL.get(func, func)(*args, **(kwargs or {}))


def _flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor],
    block_mask: tuple[Any, ...],
    scale: float,
    *_: Any,
) -> tuple[Tensor, None, None]:
    """Scaled dot-product attention, if the scores are not modified.

    A graph would run FlexAttention unfused, with all scores in memory. So a block whose
    FlexAttention reads positions is refused as a whole, and runs as the user compiled it.
    """
    if score_mod is not _identity or block_mask[-1] is not noop_mask:
        reason = "flex_attention has a score_mod or a block_mask, which read positions by number"
        hint = (
            "give scaled_dot_product_attention the mask as a tensor: it is gathered at the kept "
            "tokens"
        )
        where = line_of(innermost_user_frame())
        raise RefusedError(Refusal("FVX012", reason, "flex_attention", where, hint))
    grouped = query.shape[-3] != key.shape[-3]
    out = F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=grouped)
    return out, None, None


def _addcmul(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    """A residual add of a gated branch, which makes the branch's output a value of the graph."""
    return input + _scaled(tensor1 * tensor2, value)


def _addcmul_(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    return input.add_(_scaled(tensor1 * tensor2, value))


def _scaled(product: Tensor, value: float) -> Tensor:
    return product if value == 1 else product * value


_CANONICAL: Final[dict[Any, Callable[..., Any]]] = {
    flex_attention: _flex_attention,
    torch.addcmul: _addcmul,
    Tensor.addcmul: _addcmul,
    Tensor.addcmul_: _addcmul_,
}

"""How the models draw token ids from logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

TOP_K: Final = 100
TOP_P: Final = 0.95
CFG: Final = 1.5
"""How the commands of the package sample from VAR."""


def sample_top_k_top_p(
    logits: Tensor,
    top_k: int = 0,
    top_p: float = 0.0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Returns one id drawn per token, int64 (B, L).

    Args:
        logits: Unnormalized log-probabilities, (B, L, V).
        top_k: Draw among the k likeliest ids (ties with the k-th included); 0 for all.
        top_p: Draw among the likeliest ids that together reach this probability; 0 for all.
        generator: Source of randomness, one for the batch or B for one each; None for torch's
            global one of the device.
    """
    B, L, V = logits.shape
    if top_k > 0:
        kth = logits.topk(top_k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p > 0:
        ascending, order = logits.sort(dim=-1)
        drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= (1 - top_p)
        drop[..., -1].fill_(False)  # the likeliest id always stays
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -math.inf)
    probabilities = logits.softmax(dim=-1)  # (B, L, V)
    if isinstance(generator, Sequence):
        each = zip(probabilities, generator, strict=True)
        return torch.cat([_draw(image, own) for image, own in each]).view(B, L)
    return _draw(probabilities.view(-1, V), generator).view(B, L)  # (B * L, 1) -> (B, L)


def _draw(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """Returns one id per row, int64 (N, 1), for probabilities (N, V)."""
    return torch.multinomial(probabilities, 1, replacement=True, generator=generator)


def spread_classes(classes: int, count: int) -> tuple[int, ...]:
    """Returns the classes of a batch, spread evenly from the first to the last.

    Args:
        classes: Number of classes, at least 1.
        count: Size of the batch, at least 1; classes repeat where it is larger than their number.

    Example:
        >>> spread_classes(25, 5)
        (0, 6, 12, 18, 24)
    """
    spread = torch.linspace(0, classes - 1, min(count, classes)).int().tolist()
    return tuple(spread[i % len(spread)] for i in range(count))

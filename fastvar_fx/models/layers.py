"""Layers that VAR and Infinity share. B batch, L tokens, C width."""

from __future__ import annotations

import math
from typing import Final

from torch import Tensor, nn

MAX_LOG_SCALE: Final = math.log(100)
"""Upper limit of the learned logarithmic scale of unit queries."""


class FFN(nn.Module):
    """Two linear layers with a tanh-approximated GELU between them.

    Args:
        width: Width C in and out.
        hidden: Width between the layers.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (B, L, C) for `x` (B, L, C)."""
        y: Tensor = self.fc2(self.act(self.fc1(x)))
        return y


class SharedAdaLin(nn.Linear):
    """One linear layer that makes the AdaLN values of all blocks.

    Args:
        width: Width C.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, 6 * width)

    def forward(self, cond: Tensor) -> Tensor:
        """Returns (B, 1, 6, C) for `cond` (B, C)."""
        return super().forward(cond).view(cond.shape[0], 1, 6, -1)  # (B, 6C) -> (B, 1, 6, C)


class AdaLNBeforeHead(nn.Module):
    """The AdaLN between the last block and the classifier; it has no gamma.

    Args:
        width: Width C.
        norm_eps: Epsilon of the layer norm.
    """

    def __init__(self, width: int, norm_eps: float) -> None:
        super().__init__()
        self.width = width
        self.ln_wo_grad = nn.LayerNorm(width, eps=norm_eps, elementwise_affine=False)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Returns (B, L, C) for `x` (B, L, C) and the class embedding `cond` (B, C)."""
        scale, shift = self.ada_lin(cond).view(-1, 1, 2, self.width).unbind(2)  # 2 of (B, 1, C)
        y: Tensor = self.ln_wo_grad(x).mul(scale.add(1)).add_(shift)
        return y

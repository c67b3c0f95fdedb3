"""The two operators as the authors of FastVAR wrote them, for comparison."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastvar_fx.ops import Scale


def peer_selection(x: Tensor, kept: int) -> Tensor:
    """Returns the kept tokens (B, kept) as the authors' code finds them: it sorts all scores."""
    scores = (x - x.mean(dim=1, keepdim=True)).pow(2).sum(dim=-1)  # (B, L)
    return scores.argsort(dim=1, descending=True)[:, :kept]


def peer_restoration(
    kept: Tensor, index: Tensor, cached: Tensor, cached_scale: Scale, scale: Scale
) -> Tensor:
    """Returns a branch's output (B, L, C) as the authors' code does: interpolate, then scatter."""
    image = cached.transpose(1, 2).reshape(*cached.shape[::2], *cached_scale)  # (B, C, h, w)
    full = F.interpolate(image, size=scale, mode="area").flatten(2).transpose(1, 2).contiguous()
    return full.scatter_(1, index.unsqueeze(-1).expand(-1, -1, kept.shape[-1]), kept)

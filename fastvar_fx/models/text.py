"""Text features, a padded batch (B, T, Ct), their bool mask (B, T), and attention to them.

The mask is True where a prompt has a token. H heads are c wide each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvar_fx.errors import ArgumentError


def check_text(
    text: Tensor, width: int, length: int, *, mask: Tensor | None = None, batch: int | None = None
) -> None:
    """Checks that features of prompts fit a model, their mask and a batch.

    The values of a mask on a GPU are not checked, since reading them would wait for the GPU.

    Args:
        text: The features.
        width: Features per token that the model reads.
        length: Most tokens of a prompt.
        mask: bool mask of the tokens.
        batch: How many prompts there must be; None for any number.

    Raises:
        ArgumentError: If they do not fit.
    """
    asked = ("B" if batch is None else batch, "T", width)
    if text.ndim != 3 or text.shape[2] != width or text.shape[0] != (batch or text.shape[0]):
        raise ArgumentError(
            f"the model reads text features ({', '.join(map(str, asked))}), one row per token of a "
            f"prompt; found shape {tuple(text.shape)}"
        )
    if not 1 <= text.shape[1] <= length:
        raise ArgumentError(
            f"a prompt has 1 to {length} tokens; found {text.shape[1]}. Truncate it, or build the "
            f"model with text_length={text.shape[1]}"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != text.shape[:2]):
        raise ArgumentError(
            f"the mask of text {tuple(text.shape)} is bool {tuple(text.shape[:2])}, True where "
            f"there is a token; found {mask.dtype} {tuple(mask.shape)}"
        )
    if mask is not None and not mask.is_cuda and not bool(mask.any(dim=1).all()):
        raise ArgumentError(
            f"a prompt has at least one token; found {mask.sum(dim=1).tolist()} tokens. Give an "
            f"empty prompt the tokens that the text encoder makes of it"
        )


def mask_of(text: Tensor, mask: Tensor | None) -> Tensor:
    """Returns the given mask of a text (B, T, Ct), or one of all its tokens, bool (B, T)."""
    if mask is None:
        return torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
    return mask


def joined(texts: Sequence[Tensor], masks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns texts and masks of any lengths as one batch, padded at the end."""
    longest = max(text.shape[1] for text in texts)
    text = torch.cat([F.pad(text, (0, 0, 0, longest - text.shape[1])) for text in texts])
    return text, torch.cat([F.pad(mask, (0, longest - mask.shape[1])) for mask in masks])


class TextAttention(nn.Module):
    """What both attentions to the text share: keys and values of it, and the output layer.

    Args:
        width: Width C of the output.
        text_width: Width of the text features.
        heads: Number of heads H.
    """

    zero_k_bias: Tensor

    def __init__(self, width: int, text_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.mat_kv = nn.Linear(text_width, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def attend(self, q: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Returns (B, L, C) for queries (B, H, L, c), text (B, T, .) and its mask (B, 1, 1, T)."""
        bias = torch.cat((self.zero_k_bias, self.v_bias))
        kv = F.linear(text, self.mat_kv.weight, bias)  # (B, T, 2C)
        kv = kv.view(*text.shape[:2], 2, self.heads, -1)  # (B, T, 2, H, c)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)  # 2 of (B, H, T, c)
        out = F.scaled_dot_product_attention(q.type_as(k), k, v, attn_mask=mask)
        projected: Tensor = self.proj(out.transpose(1, 2).flatten(2))  # (B, H, L, c) -> (B, L, C)
        return projected


class CrossAttention(TextAttention):
    """Attention of the tokens to the text; see `TextAttention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, width, heads)
        self.mat_q = nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Returns (B, L, C) for `x` (B, L, C), text (B, T, C) and its mask (B, 1, 1, T)."""
        q = self.mat_q(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2)  # (B, H, L, c)
        return self.attend(q, text, mask)


class AttentivePool(TextAttention):
    """Attention of one learned query to the text; see `TextAttention`."""

    def __init__(self, width: int, text_width: int, heads: int) -> None:
        super().__init__(width, text_width, heads)
        self.mat_q = nn.Parameter(torch.randn(1, heads, width // heads))

    def forward(self, text: Tensor, mask: Tensor) -> Tensor:
        """Returns the pooled text, (B, C), for text (B, T, Ct) and its mask (B, 1, 1, T)."""
        q = self.mat_q.unsqueeze(2).expand(text.shape[0], -1, -1, -1)  # (B, H, 1, c)
        return self.attend(q, text, mask).squeeze(1)

"""Text features, a padded batch (B, T, Ct), and their bool mask (B, T), True at the tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def check_text(
    text: Tensor, width: int, length: int, *, mask: Tensor | None = None, batch: int | None = None
) -> None:
    """Raise unless features of prompts fit a model, their mask and a batch.

    Args:
        text: the features.
        width: features per token that the model reads.
        length: most tokens of a prompt.
        mask: bool mask of the tokens.
        batch: how many prompts there must be; None for any number.

    Raises:
        ValueError: they do not fit.
    """
    asked = ("B" if batch is None else batch, "T", width)
    if text.ndim != 3 or text.shape[2] != width or text.shape[0] != (batch or text.shape[0]):
        raise ValueError(
            f"asked: text of shape {tuple(text.shape)}\nfound: a model that reads "
            f"({', '.join(map(str, asked))}) features\n"
            f"do: give one row of text encoder features per prompt token"
        )
    if not 1 <= text.shape[1] <= length:
        raise ValueError(
            f"asked: a prompt of {text.shape[1]} tokens\nfound: a text length of {length}\n"
            f"do: truncate the prompt, or build the model with text_length={text.shape[1]}"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != text.shape[:2]):
        raise ValueError(
            f"asked: a mask of {mask.dtype} and shape {tuple(mask.shape)}\nfound: text of shape "
            f"{tuple(text.shape)}\ndo: give a bool mask {tuple(text.shape[:2])}, True where there "
            f"is a token"
        )


def mask_of(text: Tensor, mask: Tensor | None) -> Tensor:
    """Return the given mask of a text (B, T, Ct), or one of all its tokens, bool (B, T)."""
    if mask is None:
        return torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
    return mask


def joined(texts: Sequence[Tensor], masks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return texts and masks of any lengths as one batch, padded at the end."""
    longest = max(text.shape[1] for text in texts)
    text = torch.cat([F.pad(text, (0, 0, 0, longest - text.shape[1])) for text in texts])
    return text, torch.cat([F.pad(mask, (0, longest - mask.shape[1])) for mask in masks])

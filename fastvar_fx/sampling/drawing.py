"""How a batch is drawn: of the packaged models, and by a function of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from fastvar_fx.errors import RunError
from fastvar_fx.models.sampling import TOP_K, TOP_P, sample_top_k_top_p
from fastvar_fx.models.var import VAR

Draw = Callable[[Any, Sequence[int], Sequence[Any]], Tensor]
"""Draws a batch: (model, seeds, classes or prompts) -> images (B, 3, H, W).

The images are float in [0, 1] or uint8. Image i has to depend on its own seed and its own
class or prompt only.
"""

_OUTSIDE = 1e-3
"""How far rounding may take a value out of [0, 1]."""


def one_by_one(draw: Callable[[Any, int, Any], Tensor]) -> Draw:
    """Returns a function for batches that draws the images of a batch one after the other.

    It is for loops that take one seed for the whole batch, or none: torch's global generators are
    seeded before each image.

    Args:
        draw: Draws one image, (model, seed, class or prompt) -> (3, H, W) or (1, 3, H, W).

    Example:
        >>> @one_by_one
        ... def draw(model, seed, label):
        ...     return model.autoregressive_infer_cfg(1, label, g_seed=seed)
    """

    def draw_batch(model: Any, seeds: Sequence[int], conditions: Sequence[Any]) -> Tensor:
        images = []
        for seed, condition in zip(seeds, conditions, strict=True):
            torch.manual_seed(seed)
            image = draw(model, seed, condition)
            images.append(image if image.ndim == 4 else image.unsqueeze(0))
        return torch.cat(images)

    return draw_batch


def draw_var(model: VAR, seeds: Sequence[int], classes: Sequence[int]) -> Tensor:
    """Returns images (B, 3, H, W) in [0, 1]; the tokens of each come from its own seed."""
    device = model.lvl_1L.device
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def choose(step: int, logits: Tensor) -> Tensor:
        return sample_top_k_top_p(logits, min(TOP_K, logits.shape[-1]), TOP_P, generators)

    latents = model.infer_fhat(len(seeds), torch.tensor(classes), choose=choose)
    images: Tensor = model.vae.decode(latents)
    return images


def pixels_of(images: Any, batch: int) -> Tensor:
    """Returns what a draw returned as pixels on the CPU, uint8 (B, H, W, 3).

    Raises:
        RunError: If these are no images of this batch size, or of values outside of [0, 1].
    """
    asked = f"a batch is drawn as images ({batch}, 3, H, W), float in [0, 1] or uint8"
    if not isinstance(images, Tensor):
        raise RunError(f"{asked}; found {type(images).__name__}")
    if images.ndim != 4 or images.shape[:2] != (batch, 3):
        raise RunError(f"{asked}; found shape {tuple(images.shape)}")
    if images.is_floating_point():
        images = images.detach().float()
        low, high = (float(bound) for bound in images.aminmax())
        if not (low >= -_OUTSIDE and high <= 1 + _OUTSIDE):  # nor is NaN
            raise RunError(f"{asked}; found values {low:.3g} to {high:.3g}: scale or clamp them")
        images = (images * 255).round().clamp(0, 255).to(torch.uint8)
    elif images.dtype != torch.uint8:
        raise RunError(f"{asked}; found {images.dtype}")
    pixels: Tensor = images.permute(0, 2, 3, 1).contiguous().cpu()  # (B, H, W, 3)
    return pixels


def fingerprint(*models: nn.Module) -> str:
    """Returns a checksum of names, shapes and some values of all weights, in hexadecimal digits."""
    digest = sha256()
    for model in models:
        for name, value in model.state_dict().items():
            if not isinstance(value, Tensor):
                continue
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            if type(value) in (Tensor, nn.Parameter):  # subclasses hold values in ways of their own
                some = value.detach().flatten()[:: max(1, value.numel() // 1024)]
                digest.update(some.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]

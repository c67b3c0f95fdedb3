"""The weights that are part of the package, those of the model `demo`, and its held-out pictures.

See `weights/README.md` for how they were made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from fastvar_fx.errors import ModelError
from fastvar_fx.models.configs import check_sizes
from fastvar_fx.models.scenes import HELD_OUT, pictures

NAME: Final = "demo"
"""The model, a key of `fastvar_fx.models.var.CONFIGS`."""

WEIGHTS: Final = Path(__file__).with_name("weights") / "demo.safetensors"
"""Its parameters in float16, named `var.*` and `vae.*`."""


def weights() -> dict[str, dict[str, Tensor]]:
    """Returns the state dicts `var` and `vae`, float32; buffers of fixed values are left out.

    Raises:
        FileNotFoundError: If the weights were not installed.
        ModelError: If their file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        flat = load_file(WEIGHTS)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"there is no file {WEIGHTS} with the weights of {NAME!r}; install the package again. "
            f"A checkout without large files lacks them"
        ) from error
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{WEIGHTS}, the weights of {NAME!r}, is a file which safetensors cannot read "
            f"({error}); it may be incomplete: install the package again"
        ) from error
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in flat.items():
        part, _, key = name.partition(".")
        parts.setdefault(part, {})[key] = tensor.float()
    return parts


def held_out(count: int = 8) -> tuple[Tensor, Tensor]:
    """Returns pictures that the model `demo` never saw, and their classes.

    Args:
        count: Number of pictures, at least 1; the first n are the same for every count.

    Returns:
        Images, float32 (N, 3, 256, 256) in [-1, 1], and labels, int64 (N,).

    Raises:
        TypeError: If `count` is no int.
        ArgumentError: If it is below 1.

    Example:
        >>> images, labels = held_out()
        >>> images.shape[1:]
        torch.Size([3, 256, 256])
    """
    check_sizes(count=count)
    images, labels = pictures(range(HELD_OUT, HELD_OUT + count))
    return images.float() / 127.5 - 1, labels


def read_image(file: Path) -> Tensor:
    """Returns the pixels of an image file, uint8 (3, H, W).

    Raises:
        ImportError: If pillow, of the extra `cli`, is not installed.
        OSError: If pillow cannot read the file.
    """
    from PIL import Image

    with Image.open(file) as picture:
        width, height = picture.size
        pixels = bytearray(picture.convert("RGB").tobytes())
    return torch.frombuffer(pixels, dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1)

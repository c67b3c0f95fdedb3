"""The files that are part of the package: weights of the model `demo`, and photographs.

See `weights/README.md` for how they were made, and for the authors of the photographs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from fastvar_fx.errors import ModelError

NAME: Final = "demo"
"""The model, a key of `fastvar_fx.models.var.CONFIGS`."""

WEIGHTS: Final = Path(__file__).with_name("weights") / "demo.safetensors"
"""Its parameters in float16, named `var.*` and `vae.*`."""

CLASSES: Final = ("sky and water", "hills and woods", "leaves and grass", "flowers", "things")
"""What its classes show."""

PHOTOGRAPHS: Final = WEIGHTS.with_name("held_out")
"""Folder of photographs that the model was not trained on; a file's name begins with its class."""


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


def held_out() -> tuple[Tensor, Tensor]:
    """Returns photographs that the model `demo` never saw, and their classes.

    Returns:
        Images, float32 (N, 3, 256, 256) in [-1, 1], and labels, int64 (N,).

    Raises:
        ImportError: If pillow, of the extra `cli`, is not installed.
        FileNotFoundError: If the photographs were not installed.

    Example:
        >>> images, labels = held_out()
        >>> images.shape[1:]
        torch.Size([3, 256, 256])
    """
    files = sorted(PHOTOGRAPHS.glob("*.jpg"))
    if not files:
        raise FileNotFoundError(
            f"there are no held-out photographs in {PHOTOGRAPHS}; install the package again"
        )
    images = torch.stack([read_image(file) for file in files])
    labels = [int(file.name.partition("-")[0]) for file in files]
    return images.float() / 127.5 - 1, torch.tensor(labels)


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

"""What comes along with the package: the weights of the model ``demo``, and photographs.

How they were made, and whose photographs these are, says ``weights/README.md``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

NAME: Final = "demo"
"""The model, a key of ``fastvar_fx.models.var.CONFIGS``."""

WEIGHTS: Final = Path(__file__).with_name("weights") / "demo.safetensors"
"""Its parameters in float16, named ``var.*`` and ``vae.*``."""

CLASSES: Final = ("sky and water", "hills and woods", "leaves and grass", "flowers", "things")
"""What its classes show."""

PHOTOGRAPHS: Final = WEIGHTS.with_name("held_out")
"""Folder of photographs that the model never saw; the name of a file begins with its class."""


def weights() -> dict[str, dict[str, Tensor]]:
    """Return the state dicts ``var`` and ``vae``, float32; buffers of fixed values are left out.

    Raises:
        FileNotFoundError: the weights were not installed.
        ValueError: their file is damaged.
    """
    try:
        flat = load_file(WEIGHTS)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"asked: the weights of {NAME!r}\nfound: no file {WEIGHTS}\n"
            "do: install the package again; a checkout without large files lacks them"
        ) from error
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"asked: the weights of {NAME!r}\nfound: {WEIGHTS}, which safetensors cannot read "
            f"({error})\ndo: install the package again; the file may be incomplete"
        ) from error
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in flat.items():
        part, _, key = name.partition(".")
        parts.setdefault(part, {})[key] = tensor.float()
    return parts


def held_out() -> tuple[Tensor, Tensor]:
    """Return photographs that the model ``demo`` never saw, and their classes.

    Returns:
        Images, float32 (N, 3, 256, 256) in [-1, 1], and labels, int64 (N,).

    Raises:
        ImportError: pillow, of the extra ``cli``, is not installed.
        FileNotFoundError: the photographs were not installed.

    Example:
        >>> images, labels = held_out()
        >>> images.shape[1:]
        torch.Size([3, 256, 256])
    """
    import numpy as np
    from PIL import Image

    files = sorted(PHOTOGRAPHS.glob("*.jpg"))
    if not files:
        raise FileNotFoundError(
            f"asked: the held-out photographs\nfound: none in {PHOTOGRAPHS}\n"
            "do: install the package again"
        )
    images = []
    for file in files:
        with Image.open(file) as picture:
            pixels = torch.from_numpy(np.array(picture.convert("RGB")))
        images.append(pixels.permute(2, 0, 1).float() / 127.5 - 1)  # (h, w, 3) -> (3, h, w)
    labels = [int(file.name.partition("-")[0]) for file in files]
    return torch.stack(images), torch.tensor(labels)

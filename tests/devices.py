"""Where tests run: on the CPU, or on what pytest's `--device` names."""

from __future__ import annotations

import torch

DEVICE = torch.device("cpu")
"""Where the tests run that can run anywhere."""

GPU = torch.device("cuda", 0)
"""Where the tests marked `cuda` run: the CPU stands in for it under `--device double`."""


def choose(name: str) -> None:
    """Takes the name given to `--device`; modules that import the constants come later."""
    global DEVICE, GPU
    if name == "double":
        GPU = torch.device("cpu")
    elif name == "cuda":
        DEVICE = GPU
    else:
        DEVICE = torch.device(name)

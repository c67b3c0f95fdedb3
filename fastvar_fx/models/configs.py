"""What the models share: checked sizes, configurations by name, random weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from fastvar_fx.errors import ArgumentError, did_you_mean

Config = TypeVar("Config")
Model = TypeVar("Model", bound=nn.Module)


def check_sizes(**sizes: object) -> None:
    """Checks that each size is an int of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, int):
            raise TypeError(f"{name} is an int; found {size!r}, a {type(size).__name__}")
        if size < 1:
            raise ArgumentError(f"{name} is at least 1; found {size}")


def check_heads(width: int, heads: int, *, multiple_of: int = 1) -> None:
    """Checks that heads divide a width, and that the quotient is a multiple of a number."""
    if width % heads:
        raise ArgumentError(f"heads must divide the width; found width={width}, heads={heads}")
    if width // heads % multiple_of:
        raise ArgumentError(
            f"the width of a head is a multiple of {multiple_of}; found {width // heads} for "
            f"width={width}, heads={heads}"
        )


def configured(configs: Mapping[str, Config], name: str, overrides: Mapping[str, Any]) -> Config:
    """Returns a named configuration, a dataclass, with some of its fields replaced.

    Raises:
        TypeError: If an override is no field.
        ArgumentError: If `name` is unknown, or the configuration refuses the values.
    """
    if name not in configs:
        raise ArgumentError(f"no model is named {name!r}; {did_you_mean(name, configs)}")
    config: Any = configs[name]
    fields = [field.name for field in dataclasses.fields(config)]
    for key in overrides:
        if key not in fields:
            raise TypeError(f"there is no size {key!r} to override; {did_you_mean(key, fields)}")
    replaced: Config = dataclasses.replace(config, **overrides)
    return replaced


def with_random_weights(
    make: Callable[[], Model], fill: Callable[[Model, torch.Generator], None], seed: int
) -> Model:
    """Returns a model on the CPU, in eval mode, without gradients, filled from `seed` alone.

    Args:
        make: Constructs the model; it is called on the meta device.
        fill: Sets every parameter and buffer.
        seed: Seed of the generator given to `fill`.
    """
    # On the meta device torch's own initialization, soon overwritten, costs neither time nor draws.
    with torch.device("meta"):
        model = make()
    model.to_empty(device="cpu")
    fill(model, torch.Generator().manual_seed(seed))
    return model.eval().requires_grad_(False)


@torch.no_grad()
def draw_weights(model: nn.Module, generator: torch.Generator) -> None:
    """Fills a model with values for which its branches contribute to the output.

    Linear layers have standard deviation 1 / sqrt(inputs) and no bias, norms are the identity,
    buffers zero, and all else (embeddings, biases of queries and values) is drawn with 0.5.
    """
    for buffer in model.buffers():
        buffer.zero_()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                parameter.fill_(float(name == "weight"))
            elif isinstance(module, nn.Linear) and name == "bias":
                parameter.zero_()
            elif isinstance(module, nn.Linear):
                std = 1 / math.sqrt(module.in_features)
                parameter.normal_(0, std, generator=generator)
            else:
                parameter.normal_(0, 0.5, generator=generator)

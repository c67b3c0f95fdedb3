"""The models that the benchmark measures: random weights, each with its schedule and loop."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor, nn

from fastvar_fx.errors import ModelError, did_you_mean
from fastvar_fx.measuring.subject import Subject
from fastvar_fx.models import hart, infinity, var
from fastvar_fx.models.maps import template
from fastvar_fx.models.sampling import TOP_K, TOP_P
from fastvar_fx.schedule import Schedule

_GIB: Final = 2**30
_TEXT_TOKENS: Final = 30


@dataclass(frozen=True)
class Preset:
    """A model with random weights, its schedule and its loop.

    Attributes:
        bare: Constructs the model without filling in weights, to be called on the meta device.
        schedule: The scales that it draws, and the pruning ratios.
        prompt: Makes what a generation is conditioned on, (model, batch) -> a tensor.
        draw: Runs its token loop, (model, prompt, seed) -> latents (B, C, H, W); without a seed,
            it draws on from the device's generator.
        at: Returns the same model for another schedule.
        decode: Makes images of latents, (model, latents); None where the package has no decoder.
    """

    bare: Callable[[], nn.Module]
    schedule: Schedule
    prompt: Callable[[Any, int], Tensor]
    draw: Callable[[Any, Tensor, int | None], Tensor]
    at: Callable[[Schedule], Preset]
    decode: Callable[[Any, Tensor], Tensor] | None = None

    def build(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> nn.Module:
        """Returns the model with random weights of seed 0, in eval mode, without gradients.

        The weights are drawn on the device in the dtype; there is no copy of another kind.
        """
        with torch.device("meta"):
            model = self.bare()
        # A VAR holds its VQ-VAE without owning it. Both are drawn from the same generator.
        parts: list[Any] = [model.vae, model] if isinstance(model, var.VAR) else [model]
        generator = torch.Generator(device).manual_seed(0)
        for part in parts:
            part.to(dtype).to_empty(device=device)
            with torch.device(device):
                part.init_weights(generator)
            part.eval().requires_grad_(False)
        return model


def _var(schedule: Schedule, name: str, **sizes: int) -> Preset:
    sides = tuple(height for height, _ in schedule.scales)

    def prompt(model: var.VAR, batch: int) -> Tensor:
        return torch.ones(batch, dtype=torch.int64, device=model.word_embed.weight.device)

    def draw(model: var.VAR, classes: Tensor, seed: int | None) -> Tensor:
        return model.infer_fhat(len(classes), classes, g_seed=seed, top_k=TOP_K, top_p=TOP_P)

    def decode(model: var.VAR, latents: Tensor) -> Tensor:
        return model.vae.decode(latents)

    def bare() -> var.VAR:
        config = replace(var.CONFIGS[name], scales=sides, **sizes)  # type: ignore[arg-type]
        return var.VAR(config.new_vae(), config)

    return Preset(bare, schedule, prompt, draw, lambda s: _var(s, name, **sizes), decode)


def _from_text(
    kind: Callable[[Any], nn.Module], configs: Mapping[str, Any], schedule: Schedule, name: str
) -> Preset:
    def draw(model: Any, text: Tensor, seed: int | None) -> Tensor:
        latents: Tensor = model.autoregressive_infer_cfg(text, schedule.scales, g_seed=seed)
        return latents

    bare = partial(kind, configs[name])
    at = partial(_from_text, kind, configs, name=name)
    return Preset(bare, schedule, random_text, draw, at)


_infinity = partial(_from_text, infinity.Infinity, infinity.CONFIGS)
_hart = partial(_from_text, hart.HART, hart.CONFIGS)


def random_text(model: infinity.Infinity | hart.HART, batch: int, seed: int = 0) -> Tensor:
    """Returns features of a prompt (B, T, Ct); of HART's padded length, else of a usual one."""
    config, weight = model.config, model.word_embed.weight
    tokens = config.text_length if isinstance(model, hart.HART) else _TEXT_TOKENS
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(batch, tokens, config.text_width, generator=generator)
    return text.to(weight.device, weight.dtype)


PRESETS: Final[Mapping[str, Preset]] = MappingProxyType(
    {
        "var-tiny": _var(Schedule.preset("var-256"), "tiny"),
        "infinity-tiny": _infinity(Schedule(template(1.0, "0.06M"), (0.4, 0.5, 1.0)), "tiny"),
        "infinity-tiny-1024": _infinity(Schedule(template(1.0), (0.4, 0.5, 1.0, 1.0)), "tiny"),
        "hart-tiny": _hart(Schedule((1, 2, 3, 4, 5, 7, 9, 12, 16), (0.5, 0.75)), "tiny"),
        "var-small-512": _var(Schedule.preset("var-512"), "tiny", depth=6, width=512, heads=8),
        "var-d16-256": _var(Schedule.preset("var-256"), "d16"),
        "var-d16-512": _var(Schedule.preset("var-512"), "d16"),
        "var-d30-256": _var(Schedule.preset("var-256"), "d30"),
        "var-d30-512": _var(Schedule.preset("var-512"), "d30"),
        "hart-0.7b-1024": _hart(Schedule.preset("hart-1024"), "0.7b"),
        "infinity-2b-1024": _infinity(Schedule.preset("infinity-1024"), "2b"),
    }
)
"""What can be measured; the tiny and small ones take a minute or two on two CPU cores.

In the tiny ones, the cost of launching ops hides what pruning saves.
"""
PIXELS: Final = 16
"""Pixels along the side of a token, in all presets."""


def preset(name: str) -> Preset:
    """Returns a preset by name.

    Raises:
        ModelError: If there is no such preset; the message offers close names.
    """
    if name not in PRESETS:
        close = did_you_mean(name, PRESETS)
        raise ModelError(f"no benchmark preset is named {name!r}; {close}")
    return PRESETS[name]


def subject_of(name: str, chosen: Preset, batch: int, device: torch.device) -> Subject:
    """Returns a preset's model on a device, with how to run its token loop."""
    model = chosen.build(device, dtype_on(device))
    prompt = chosen.prompt(model, batch)

    def run(model: nn.Module) -> Tensor:
        return chosen.draw(model, prompt, 0)

    return Subject(name, model, chosen.schedule, run, blocks="blocks")


def needed_bytes(chosen: Preset, batch: int, dtype: torch.dtype) -> int:
    """Returns about how much memory a preset takes; guidance doubles the batch.

    Counted are weights and buffers, the keys and values of all steps, and eight token maps of the
    last step, four of them of the inner width of the feed-forward branch.
    """
    with torch.device("meta"):
        model: Any = chosen.bare()
    width = model.word_embed.out_features
    tokens = [chosen.schedule.tokens(step) for step in range(chosen.schedule.steps)]
    weights = sum(tensor.numel() for tensor in chain(model.parameters(), model.buffers()))
    keys = 2 * len(model.blocks) * 2 * batch * sum(tokens) * width
    maps = (4 + 4 * 4) * 2 * batch * tokens[-1] * width
    return int((weights + keys + maps) * dtype.itemsize)


def check_fits(name: str, batch: int, device: torch.device) -> None:
    """Raises where a preset is too large for a device.

    Raises:
        ModelError: With what it needs, what there is, and which presets fit.
    """
    dtype = dtype_on(device)
    free = free_bytes(device)
    needed = {key: needed_bytes(each, batch, dtype) for key, each in PRESETS.items()}
    if needed[name] > free:
        smaller = [key for key, size in needed.items() if size <= free]
        hint = f"these fit: {', '.join(smaller)}" if smaller else "use a smaller batch"
        raise ModelError(
            f"preset {name} at batch {batch} needs about {needed[name] / _GIB:.1f} GiB in "
            f"{str(dtype).removeprefix('torch.')}; {device} has {free / _GIB:.1f} GiB free; {hint}"
        )


def default_device() -> torch.device:
    """Returns the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype_on(device: torch.device) -> torch.dtype:
    """Returns the dtype that models are measured in."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def free_bytes(device: torch.device) -> int:
    """Returns how much memory of a device is free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux: what is installed
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    (kibibytes,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return 1024 * int(kibibytes)

"""The training loop: learning rate, progress, and checkpoints to resume from."""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WARM_UP = 50
SAVE_EVERY = 60.0
"""Seconds between checkpoints."""
SAY_EVERY = 25
"""Steps between lines of progress."""

Loss = Callable[[int], tuple[Tensor, str]]
"""(index of a step) -> its loss, a scalar, and a text for the progress line."""


def rate(step: int, steps: int) -> float:
    """Returns the learning rate's share of its peak: linear warm-up, then a cosine to zero."""
    return min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def train(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    loss_of: Loss,
    *,
    peak_rate: float,
    steps: int,
) -> None:
    """Trains until the given step, from the checkpoint on if there is one.

    Args:
        path: The checkpoint's file.
        model: The model, whose parameters and buffers are in the checkpoint.
        optimizer: Its optimizer; the learning rate is set here.
        tensors: Further tensors of the checkpoint; changed in place.
        loss_of: Computes a step's loss.
        peak_rate: Highest learning rate.
        steps: Total number of steps, those before the checkpoint included.

    Raises:
        SystemExit: If the checkpoint is damaged.
    """
    start = _resume(path, model, optimizer, tensors) if path.exists() else 0
    said = saved = time.monotonic()
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = peak_rate * rate(step, steps)
        loss, words = loss_of(step)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % SAY_EVERY == 0:
            pace = (time.monotonic() - said) / SAY_EVERY
            print(f"step {step} of {steps}: {words}, {pace:.2f} s a step", flush=True)
            said = time.monotonic()
        if time.monotonic() - saved > SAVE_EVERY or step == steps - 1:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            write(path, state | tensors | {"step": step + 1})
            saved = time.monotonic()


def write(path: Path, contents: dict[str, Any]) -> None:
    """Writes a checkpoint; a reader finds the old one or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    torch.save(contents, unfinished)
    unfinished.replace(path)


def read(path: Path, verb: str) -> dict[str, Any]:
    """Returns a checkpoint.

    Args:
        path: Its file.
        verb: The command of `train.py` that writes it.

    Raises:
        SystemExit: If there is none, or it is damaged.
    """
    try:
        contents: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise SystemExit(f"there is no file {path}; run `train.py {verb}` first") from error
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise SystemExit(
            f"the checkpoint {path} is a damaged file of {path.stat().st_size} bytes "
            f"({type(error).__name__}); delete it and run `train.py {verb}` from step 0"
        ) from error
    return contents


def _resume(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> int:
    """Fills the model, the optimizer and the tensors; returns the step to resume from."""
    state = read(path, path.stem)
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for name, tensor in tensors.items():
            tensor.copy_(state[name])
        start = int(state["step"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise SystemExit(
            f"the checkpoint {path} is one of another model ({error}); train in another folder, or "
            f"delete it"
        ) from error
    print(f"{path}: resuming from step {start}", flush=True)
    return start

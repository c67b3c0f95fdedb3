"""Checkpoints that survive being stopped at any moment."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch


def write(path: Path, contents: dict[str, Any]) -> None:
    """Writes a checkpoint; a reader finds the old one or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    torch.save(contents, unfinished)
    unfinished.replace(path)


def read(path: Path, made_by: str) -> dict[str, Any]:
    """Returns a checkpoint.

    Args:
        path: its file.
        made_by: the command that writes it, for the message.

    Raises:
        SystemExit: there is none, or it is damaged.
    """
    try:
        contents: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise SystemExit(
            f"asked: {path}\nfound: no such file\ndo: run `train.py {made_by}` first"
        ) from error
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise SystemExit(
            f"asked: the checkpoint {path}\nfound: a damaged file of {path.stat().st_size} bytes "
            f"({type(error).__name__})\ndo: delete it; the training then starts anew"
        ) from error
    return contents

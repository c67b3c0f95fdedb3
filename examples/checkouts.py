"""Shared by the examples on upstream checkouts: error messages, imports, timing, the picture."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image
from torch import Tensor, nn

import fastvar_fx

HERE = Path(__file__).parent.resolve()


def stop(asked: str, found: str, to_do: str) -> NoReturn:
    """Ends the script with what was asked for, what was found and what to do."""
    raise SystemExit(f"asked for {asked}; found {found}. To do: {to_do}")


def check_path(option: str, path: Path, what: str, *, holds: str = "") -> None:
    """Stops unless `path` exists and, if `holds` is given, is a folder with that in it."""
    to_do = f"give {option} the path of {what}"
    if not path.exists():
        stop(f"{option} {path}", "nothing at that path", to_do)
    if holds and not (path / holds).exists():
        stop(f"{option} {path}", f"no {holds} in it", to_do)


def check_device() -> torch.device:
    """Returns the CUDA device, which the fused kernels of the checkouts need."""
    if not torch.cuda.is_available():
        stop("a CUDA device", f"none that torch {torch.__version__} can use", "run it on a GPU")
    return torch.device("cuda")


def load(checkout: Path, module: str) -> Any:
    """Imports a module of a checkout, or one that it requires."""
    # This folder's infinity.py and hart.py would hide the checkouts' packages of those names.
    others = [place for place in sys.path if Path(place).resolve() not in (HERE, checkout)]
    sys.path[:] = [str(checkout), *others]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        found = f"no module {error.name!r}"
        stop(f"{module} for {checkout}", found, "install what the checkout requires")


def read_weights(option: str, path: Path, what: str, key: str) -> dict[str, Any]:
    """Reads a file of tensors that has to hold `key`."""
    to_do = f"give {option} the file of {what}"
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # errors of any kind, on a file of another format
        stop(f"{option} {path}", f"a file that torch cannot read: {error!r:.200}", to_do)
    if not isinstance(weights, dict) or key not in weights:
        kind = list(weights)[:5] if isinstance(weights, dict) else type(weights).__name__
        stop(f"{option} {path}", f"no {key!r} in it, but {kind}", to_do)
    return weights


def compare(
    draw: Callable[[Any], Tensor], model: nn.Module, fast: nn.Module, picture: Path
) -> None:
    """Draws (h, w, 3) uint8 with both, prints times and the report, saves them side by side."""
    drawn = []
    for name, each in (("dense", model), ("pruned", fast)):
        draw(each).cpu()  # compiles kernels and makes programs
        begun = time.perf_counter()
        drawn.append(draw(each).cpu())
        print(f"{name}: {time.perf_counter() - begun:.2f} s")
    print(fastvar_fx.explain(fast))
    Image.fromarray(torch.cat(drawn, dim=1).numpy()).save(picture)
    print(f"dense (left) and pruned (right): {picture}")

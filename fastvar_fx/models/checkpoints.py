"""Trained weights of VAR: those that the package contains, and the published files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fastvar_fx.errors import ModelError
from fastvar_fx.models import demo_weights
from fastvar_fx.models.configs import configured
from fastvar_fx.models.var import CONFIGS, VAR, VARConfig
from fastvar_fx.models.vqvae import VQVAEDecoder


def load(name: str, var_path: str | Path | None = None, vae_path: str | Path | None = None) -> VAR:
    """Returns a named model with trained weights, in eval mode, without gradients, on the CPU.

    The weights of `demo` are part of the package, and its `.vae` is a whole `VQVAE`. Those of the
    published models are downloads.

    Args:
        name: A key of `CONFIGS`.
        var_path: The transformer of a published model, for example `var_d16.pth`.
        vae_path: Its whole VQ-VAE, `vae_ch160v4096z32.pth`; its encoder is not kept.

    Raises:
        FileNotFoundError: If a file does not exist.
        TypeError: If the model needs both files, or none.
        ArgumentError: If `name` is unknown.
        ModelError: If a file is damaged, is no state dict, or does not fit the named model.

    Example:
        >>> load("demo").num_classes
        5
    """
    config = configured(CONFIGS, name, {})
    packaged = name == demo_weights.NAME
    if (var_path is None) != (vae_path is None) or (var_path is None) != packaged:
        raise TypeError(
            f"load({name!r}): the weights of {demo_weights.NAME!r} are in the package and take "
            f"no file; the other models need var_path and vae_path"
        )
    if var_path is None or vae_path is None:
        return _load_packaged(config)
    vae_state, var_state = _read_state(vae_path), _read_state(var_path)
    try:
        vae = VQVAEDecoder.from_state_dict(vae_state)
    except ValueError as error:
        raise ModelError(f"{vae_path}: {error}") from error
    with torch.device("meta"):
        var = VAR(vae, config)
    try:
        var.load_state_dict(var_state, strict=True, assign=True)
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"{var_path} does not hold the model {name!r}: {error}") from error
    return var.eval().requires_grad_(False)


def _load_packaged(config: VARConfig) -> VAR:
    """Returns the model whose weights are part of the package."""
    parts = demo_weights.weights()
    with torch.device("meta"):
        vae = config.new_whole_vae()
        var = VAR(vae, config)
    # What follows from the sizes is not in the file: levels, mask, zeros.
    var.to_empty(device="cpu").init_weights(torch.Generator())
    try:
        vae.load_state_dict(parts["vae"], strict=True, assign=True)
        var.load_state_dict(dict(var.named_buffers()) | parts["var"], strict=True)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{demo_weights.WEIGHTS} does not hold the packaged weights; install the package "
            f"again: {error}"
        ) from error
    vae.eval().requires_grad_(False)
    return var.eval().requires_grad_(False)


def _read_state(path: str | Path) -> dict[str, Tensor]:
    """Returns the state dict in a file written by `torch.save`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {path}; download it from huggingface.co/FoundationVision/var, or "
            f"correct the path"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises errors of any kind
        raise ModelError(
            f"{path} is a file of {path.stat().st_size} bytes that torch cannot read "
            f"({type(error).__name__}); it may be incomplete: download it again"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        kind = f"keys {list(state)[:4]}" if isinstance(state, dict) else type(state).__name__
        raise ModelError(
            f"{path} holds {kind}, not a dict of tensors; take the state dict out of the training "
            f"checkpoint first"
        )
    return state

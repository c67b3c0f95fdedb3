"""What to do about tools that change a block in a way that cannot be traced, by their package."""

from __future__ import annotations

from typing import Any, Final

from passes.user_frames import user_frames

_RECIPES: Final = {
    "accelerate": (
        "accelerate moves weights inside the block: let it move whole blocks, with "
        'cpu_offload or dispatch_model(..., preload_module_classes=["<class of the block>"])'
    ),
    "diffusers": (
        "a hook of diffusers moves or casts weights inside the block: offload whole blocks, with "
        'apply_group_offloading(..., offload_type="block_level"); cast the model in the place of '
        "layerwise casting"
    ),
}
SCRIPTED: Final = (
    "use the module that was scripted or traced, not its torch.jit form, inside a block; "
    "fastvar_fx.compile makes blocks fast"
)
"""What to do about modules of torch.jit in a block."""
PACKED: Final = (
    "quantise the block with torchao (quantize_) in the place of torch.ao.quantization: its "
    "weights are tensors, and prune"
)
"""What to do about weights that are packed into an object of TorchScript."""
SHARDED: Final = (
    "transform the whole model first, then fully_shard its blocks; tensor parallelism is not "
    "supported"
)
"""What to do about a block whose weights are sharded."""


def recipe_for_error(error: BaseException) -> str:
    """Returns the recipe for the tool whose code an error passed; empty if there is none."""
    frames = [str(frame.f_globals.get("__name__", "")) for frame, _, _ in user_frames(error)]
    return next((text for name in reversed(frames) if (text := _recipe(name))), "")


def recipe_for_kind(kind: type[Any]) -> str:
    """Returns the recipe for the tool that a class belongs to; empty if there is none."""
    return _recipe(kind.__module__)


def _recipe(module: str) -> str:
    return _RECIPES.get(module.partition(".")[0], "")

"""Hooks of diffusers: they wrap forwards of modules, and may move or cast their weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvar_fx import NothingPrunedError
from tests.compose.toy import LABELS, Toy, When, assert_prunes, at_any_time, by_hand, transformed

pytest.importorskip("diffusers", reason="needs the extra `compose`: diffusers")

from diffusers.hooks import (
    HookRegistry,
    ModelHook,
    apply_group_offloading,
    apply_layerwise_casting,
)

pytestmark = pytest.mark.compose

CPU = torch.device("cpu")


class Scale(ModelHook):  # type: ignore[misc]
    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return 0.9 * output


class Instead(ModelHook):  # type: ignore[misc]
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return 0.9 * self.fn_ref.original_forward(*args, **kwargs)


def hooked(kind: type[ModelHook], *paths: str) -> Callable[[Any], Any]:
    def edit(model: Any) -> Any:
        for path in paths:
            module = model.get_submodule(path)
            HookRegistry.check_if_exists_or_initialize(module).register_hook(kind(), "scale")
        return model

    return edit


kinds = pytest.mark.parametrize("kind", [Scale, Instead])


@kinds
@at_any_time
def test_hooks_on_linear_layers(when: When, kind: type[ModelHook]) -> None:
    edit = hooked(kind, "blocks.0.attn.q", "blocks.1.ffn.up")
    fast = when(Toy(), edit)
    assert_prunes(fast, by_hand(edit(Toy())))
    other = Toy(seed=1)
    fast.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    assert_prunes(fast, by_hand(edit(other)))


@at_any_time
def test_hooks_on_blocks(when: When) -> None:
    fast = when(Toy(), hooked(Scale, "blocks.0", "blocks.1"))
    assert_prunes(fast, by_hand(Toy(), around=lambda x: 0.9 * x))
    for block in fast.blocks:
        block._diffusers_hook.remove_hook("scale")
    assert_prunes(fast, by_hand(Toy()))


@kinds
def test_hooks_on_the_model(kind: type[ModelHook]) -> None:
    assert_prunes(transformed(hooked(kind, "")(Toy())), 0.9 * by_hand(Toy()))


@kinds
def test_hooks_on_blocks_before_transform(kind: type[ModelHook]) -> None:
    fast = transformed(hooked(kind, "blocks.0", "blocks.1")(Toy()))
    assert_prunes(fast, by_hand(Toy(), around=lambda x: 0.9 * x))


def offloaded(**how: Any) -> Callable[[Any], Any]:
    def edit(model: Any) -> Any:
        apply_group_offloading(model, onload_device=CPU, offload_device=CPU, **how)
        return model

    return edit


@at_any_time
def test_whole_blocks_are_offloaded(when: When) -> None:
    edit = offloaded(offload_type="block_level", num_blocks_per_group=1)
    assert_prunes(when(Toy(), edit), by_hand(Toy()))


def cast(model: Any) -> Any:
    apply_layerwise_casting(model, storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    return model


@at_any_time
@pytest.mark.parametrize("edit", [offloaded(offload_type="leaf_level"), cast])
def test_weights_that_move_inside_blocks_are_refused_by_name(
    when: When, edit: Callable[[Any], Any]
) -> None:
    fast = when(Toy(), edit)
    for _ in range(2):
        with pytest.raises(NothingPrunedError, match="a hook of diffusers moves or casts weights"):
            fast(LABELS)


def test_the_recipe_for_casting() -> None:
    fast = transformed(Toy().bfloat16())
    assert_prunes(fast, by_hand(Toy().bfloat16()))

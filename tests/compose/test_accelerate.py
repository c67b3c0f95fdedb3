"""Hooks of accelerate: they wrap forwards of modules, and may move their weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastvar_fx
from fastvar_fx import NothingPrunedError
from tests.compose.toy import LABELS, Toy, When, assert_prunes, at_any_time, by_hand, transformed

accelerate = pytest.importorskip("accelerate", reason="needs the extra `compose`: accelerate")

from accelerate.hooks import (  # noqa: E402
    ModelHook,
    add_hook_to_module,
    remove_hook_from_module,
)

pytestmark = pytest.mark.compose

Edit = Callable[[Any], Any]


class Scale(ModelHook):  # type: ignore[misc]
    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return 0.9 * output


def hooked(*paths: str) -> Edit:
    def edit(model: Any) -> Any:
        for path in paths:
            add_hook_to_module(model.get_submodule(path), Scale(), append=True)
        return model

    return edit


@at_any_time
def test_hooks_on_linear_layers(when: When) -> None:
    edit = hooked("blocks.0.attn.q", "blocks.1.ffn.up")
    assert_prunes(when(Toy(), edit), by_hand(edit(Toy())))


@at_any_time
def test_hooks_on_blocks(when: When) -> None:
    edit = hooked("blocks.0", "blocks.1")
    fast = when(Toy(), edit)
    assert_prunes(fast, by_hand(Toy(), around=lambda x: 0.9 * x))
    edit(fast)  # a second hook on each
    assert_prunes(fast, by_hand(Toy(), around=lambda x: 0.81 * x))
    for block in fast.blocks:
        remove_hook_from_module(block)
    assert_prunes(fast, by_hand(Toy()))


@at_any_time
def test_hooks_on_the_model(when: When) -> None:
    fast = when(Toy(), hooked(""))
    assert_prunes(fast, 0.9 * by_hand(Toy()))
    remove_hook_from_module(fast)
    assert_prunes(fast, by_hand(Toy()))


def test_hooks_that_are_removed_after_transform() -> None:
    model = hooked("blocks.0.attn.q", "blocks.1.ffn.up")(Toy())
    fast = transformed(model)
    fast(LABELS)
    remove_hook_from_module(fast, recurse=True)
    assert_prunes(fast, by_hand(Toy()))


def offloaded(model: Any) -> Any:
    return accelerate.cpu_offload(model, torch.device("cpu"), preload_module_classes=["Block"])


@at_any_time
def test_whole_blocks_are_offloaded(when: When) -> None:
    fast = when(Toy(), offloaded)
    assert_prunes(fast, by_hand(Toy()))
    assert next(fast.blocks[0].parameters()).is_meta


@at_any_time
def test_whole_blocks_are_offloaded_to_disk(when: When, tmp_path: Path) -> None:
    def edit(model: Any) -> Any:
        accelerate.disk_offload(
            model, str(tmp_path), torch.device("cpu"), preload_module_classes=["Block"]
        )
        return model

    assert_prunes(when(Toy(), edit), by_hand(Toy()))


@at_any_time
def test_dispatched_blocks(when: When) -> None:
    places = {"": "cpu"}

    def edit(model: Any) -> Any:
        for block in model.blocks:
            accelerate.dispatch_model(block, places, main_device="cpu", force_hooks=True)
        return model

    assert_prunes(when(Toy(), edit), by_hand(Toy()))


@at_any_time
@pytest.mark.filterwarnings("ignore:The following device_map keys")  # a parameter is no module
def test_a_dispatched_model(when: When, tmp_path: Path) -> None:
    places = {"emb": "cpu", "pos": "cpu", "blocks.0": "disk", "blocks.1": "cpu", "head": "cpu"}

    def edit(model: Any) -> Any:
        return accelerate.dispatch_model(
            model,
            places,
            main_device="cpu",
            offload_dir=str(tmp_path),
            force_hooks=True,
            preload_module_classes=["Block"],
        )

    assert_prunes(when(Toy(), edit), by_hand(Toy()))


@at_any_time
def test_weights_that_move_inside_blocks_are_refused_by_name(when: When) -> None:
    fast = when(Toy(), lambda model: accelerate.cpu_offload(model, torch.device("cpu")))
    for _ in range(2):
        with pytest.raises(NothingPrunedError, match=r"preload_module_classes"):
            fast(LABELS)
    remove_hook_from_module(fast, recurse=True)
    assert_prunes(fast, by_hand(Toy()))


def test_offloaded_blocks_are_compiled() -> None:
    fast = fastvar_fx.compile(transformed(offloaded(Toy())), backend="aot_eager")
    assert_prunes(fast, by_hand(Toy()))


def test_what_is_refused_runs_dense_without_strict() -> None:
    fast = transformed(Toy(), strict=False)
    accelerate.cpu_offload(fast, torch.device("cpu"))
    torch.testing.assert_close(fast(LABELS), Toy()(LABELS))
    assert "hint  accelerate moves weights inside the block" in str(fastvar_fx.explain(fast))

"""What torch itself offers: pruning masks, parametrizations, quantisation, TorchScript, devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastvar_fx
from fastvar_fx import ModelError, NothingPrunedError, RunError
from tests.compose.toy import (
    LABELS,
    FeedForward,
    Toy,
    When,
    assert_prunes,
    at_any_time,
    by_hand,
    transformed,
)


def around(fast: Any) -> Any:
    """FastVAR by hand around the submodules of a transformed model."""
    plain = Toy()
    for name, child in fast.named_children():
        if name != "blocks":
            plain.add_module(name, child)
    plain.pos = fast.pos
    for own, theirs in zip(plain.blocks, fast.blocks, strict=True):
        for name, child in theirs.named_children():
            own.add_module(name, child)
    return by_hand(plain)


# --- masks and parametrizations -------------------------------------------------------------------


def test_pruning_masks() -> None:
    model = Toy()
    prune.l1_unstructured(model.blocks[0].ffn.up, "weight", 0.5)  # type: ignore[no-untyped-call]
    fast = transformed(model)
    assert_prunes(fast, by_hand(model))
    prune.random_unstructured(fast.blocks[1].attn.q, "weight", 0.5)  # type: ignore[no-untyped-call]
    assert_prunes(fast, around(fast))
    prune.remove(fast.blocks[0].ffn.up, "weight")  # type: ignore[no-untyped-call]
    assert_prunes(fast, around(fast))


@pytest.mark.slow
def test_parametrizations() -> None:
    model = Toy()
    parametrizations.weight_norm(model.blocks[0].ffn.up)
    fast = transformed(model)
    assert_prunes(fast, by_hand(model))
    parametrizations.orthogonal(fast.blocks[1].attn.k)
    with parametrize.cached():
        assert_prunes(fast, around(fast))
    parametrize.remove_parametrizations(fast.blocks[0].ffn.up, "weight")
    fast.blocks[0].ffn.up.weight.mul_(1.5)
    assert_prunes(fast, around(fast))


# --- weights and code that are no tensors and no Python -------------------------------------------


quantize_dynamic: Any = torch.ao.quantization.quantize_dynamic


def packed(model: Any) -> Any:
    for block in model.blocks:
        quantize_dynamic(block, inplace=True)
    return model


def scripted(model: Any) -> Any:
    for block in model.blocks:
        block.ffn = torch.jit.script(block.ffn)
    return model


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "packed weights": (packed, "an object of TorchScript(?s:.*)quantise the block with torchao"),
    "scripted layers": (scripted, r"ffn is a module of torch\.jit"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(("edit", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_traced_is_refused_by_name(edit: Callable[[Any], Any], reason: str) -> None:
    fast = transformed(Toy())
    fast(LABELS)
    edit(fast)
    for _ in range(2):
        with pytest.raises(NothingPrunedError, match=reason):
            fast(LABELS)
    for own, other in zip(fast.blocks, Toy().blocks, strict=True):
        own.attn, own.ffn = other.attn, other.ffn
    assert_prunes(fast, by_hand(Toy()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_blocks_and_models_are_refused() -> None:
    model: Any = Toy()
    model.blocks[1] = torch.jit.script(FeedForward())
    with pytest.raises(ModelError, match=r"blocks\.1 is a module of torch\.jit: use the module"):
        transformed(model, blocks="blocks")
    with pytest.raises(ModelError, match=r"is a module of torch\.jit"):
        transformed(torch.jit.script(nn.Sequential(FeedForward(), FeedForward()).eval()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_decoder_beside_the_blocks() -> None:
    model: Any = Toy()
    model.decoder = torch.jit.script(nn.Linear(64, 3))
    fast: Any = transformed(model)
    assert_prunes(fast, by_hand(Toy()))
    assert fast.decoder is model.decoder


@at_any_time
def test_graph_modules_in_blocks(when: When) -> None:
    def edit(model: Any) -> Any:
        for block in model.blocks:
            block.ffn = torch.fx.symbolic_trace(block.ffn)
        return model

    assert_prunes(when(Toy(), edit), by_hand(Toy()))


# --- devices and threads --------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["meta"])
def test_the_default_device_while_programs_are_made(device: str) -> None:
    fast = transformed(Toy())
    with torch.device(device):
        fast(LABELS)
    assert_prunes(fast, by_hand(Toy()))


# --- torch.compile by the user --------------------------------------------------------------------


def compiled_model(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def compiled_loop(model: Any) -> Any:
    model.draw = torch.compile(model.draw, backend="eager")
    return model


def compiled_blocks(model: Any) -> Any:
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend="eager")
    return model


def blocks_compiled_in_place(model: Any) -> Any:
    for block in model.blocks:
        block.compile(backend="eager")
    return model


def compiled_layers(model: Any) -> Any:
    for block in model.blocks:
        block.ffn.compile(backend="eager")
        block.attn = torch.compile(block.attn, backend="eager")
    return model


COMPILED = (
    compiled_model,
    compiled_in_place,
    compiled_loop,
    compiled_blocks,
    blocks_compiled_in_place,
    compiled_layers,
)
ways = pytest.mark.parametrize("edit", COMPILED, ids=lambda edit: edit.__name__)


@pytest.fixture(autouse=True)
def dynamo_forgets() -> None:
    torch._dynamo.reset()


@ways
def test_compiled_before_transform(
    edit: Callable[[Any], Any], caplog: pytest.LogCaptureFixture
) -> None:
    fast = transformed(edit(Toy()))
    assert_prunes(fast, by_hand(Toy()))
    told = [record for record in caplog.records if "left out of the copy" in record.message]
    assert len(told) == (edit is not compiled_layers)


@pytest.mark.slow
@ways
def test_compiled_after_trace(edit: Callable[[Any], Any]) -> None:
    fast = transformed(Toy())
    fastvar_fx.trace(fast, lambda model: model(LABELS))
    torch.testing.assert_close(edit(fast)(LABELS), by_hand(Toy()), rtol=0, atol=1e-5)


@pytest.mark.slow
@ways
def test_compiled_before_trace(edit: Callable[[Any], Any]) -> None:
    fast = transformed(Toy())
    compiled = edit(fast)
    if edit is compiled_layers:
        assert_prunes(fast, by_hand(Toy()))
        return
    with pytest.raises(RunError, match=r"run fastvar_fx\.trace\(model, run\)"):
        compiled(LABELS)
    if edit is compiled_model:
        fastvar_fx.trace(fast, lambda model: model(LABELS))
        torch.testing.assert_close(compiled(LABELS), by_hand(Toy()), rtol=0, atol=1e-5)

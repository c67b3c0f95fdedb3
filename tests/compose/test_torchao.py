"""Weights quantised by torchao are tensor subclasses: the tensors that they wrap are inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fastvar_fx
from tests.compose.toy import LABELS, Toy, When, assert_prunes, at_any_time, by_hand, transformed

torchao = pytest.importorskip("torchao", reason="needs the extra `compose`: torchao")

from torchao import quantization  # noqa: E402
from torchao.utils import unwrap_tensor_subclass  # noqa: E402

pytestmark = pytest.mark.compose

INT4: Any = torch.int4  # type: ignore[attr-defined]
CONFIGS = {
    "int8 weights": lambda: quantization.Int8WeightOnlyConfig(),
    "int8 weights and activations": lambda: quantization.Int8DynamicActivationInt8WeightConfig(),
    "int4 weights in int8": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=INT4),
    "int4 weights, int8 activations": lambda: quantization.Int8DynamicActivationIntxWeightConfig(
        weight_dtype=INT4
    ),
    "float8 weights": lambda: quantization.Float8WeightOnlyConfig(),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def in_blocks(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "blocks" in name


def quantised(model: Any, config: Any) -> Any:
    quantization.quantize_(model, config, filter_fn=in_blocks)
    return model


@configs
def test_before_transform(config: Any) -> None:
    want = by_hand(quantised(Toy(), config()))
    assert not torch.equal(want, by_hand(Toy()))
    assert_prunes(transformed(quantised(Toy(), config())), want)


@at_any_time
def test_at_any_time(when: When) -> None:
    config = quantization.Int8WeightOnlyConfig()
    want = by_hand(quantised(Toy(), config))
    assert_prunes(when(Toy(), lambda model: quantised(model, config)), want)


@configs
def test_unwrapped_before_transform(config: Any) -> None:
    want = by_hand(quantised(Toy(), config()))
    model = quantised(Toy(), config())
    unwrap_tensor_subclass(model)
    assert_prunes(transformed(model), want)


def test_weights_of_the_same_shapes_wrapped_in_another_way() -> None:
    """Programs depend on what a subclass does with its tensors, not on their shapes alone."""
    weight_only = quantization.Int8WeightOnlyConfig()
    dynamic = quantization.Int8DynamicActivationInt8WeightConfig()
    fast: Any = transformed(quantised(Toy(), weight_only))
    fast(LABELS)
    other = quantised(Toy(), dynamic)
    for own, theirs in zip(fast.modules(), other.modules(), strict=True):
        if isinstance(own, nn.Linear):
            own.weight = theirs.weight
    assert_prunes(fast, by_hand(other))


def test_quantised_weights_that_change() -> None:
    config = quantization.Int8WeightOnlyConfig()
    fast: Any = transformed(quantised(Toy(), config))
    fast(LABELS)
    other = quantised(Toy(seed=1), config)
    fast.load_state_dict(other.state_dict(), assign=True)
    assert_prunes(fast, by_hand(other))
    programs = {row.program for row in fastvar_fx.explain(fast).rows}
    assert len(programs) == 3


def test_equal_blocks_share_programs_and_their_products_are_counted() -> None:
    config = quantization.Int8DynamicActivationInt8WeightConfig()
    fast: Any = transformed(quantised(Toy(), config))
    fast(LABELS)
    plain: Any = transformed(Toy())
    plain(LABELS)
    ours, theirs = (fastvar_fx.explain(model).rows for model in (fast, plain))
    assert [row.program for row in ours] == [row.program for row in theirs]
    assert [row.flops for row in ours] == [row.flops for row in theirs]


def test_one_quantised_layer_leaves_the_other_programs_shared() -> None:
    fast: Any = transformed(Toy())
    fast(LABELS)
    config = quantization.Int8WeightOnlyConfig()
    quantization.quantize_(fast.blocks[0].ffn, config)
    want = Toy()
    quantization.quantize_(want.blocks[0].ffn, config)
    assert_prunes(fast, by_hand(want))


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear")  # such layers cannot be merged
def test_adapters_on_quantised_layers() -> None:
    peft = pytest.importorskip("peft", reason="needs the extra `compose`: peft")

    def adapted() -> Any:
        model = quantised(Toy(), quantization.Int8WeightOnlyConfig())
        how = peft.LoraConfig(r=4, target_modules=["q", "up"], init_lora_weights=False)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            peft.inject_adapter_in_model(how, model)
        return model.eval()

    assert_prunes(transformed(adapted()), by_hand(adapted()))


def test_compiled() -> None:
    config = quantization.Int8DynamicActivationInt8WeightConfig()
    want = by_hand(quantised(Toy(), config))
    fast = fastvar_fx.compile(transformed(quantised(Toy(), config)), backend="aot_eager")
    assert_prunes(fast, want)

"""Adapters of peft: added, merged, switched and removed, before and after the first generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.compose.toy import LABELS, Toy, When, assert_prunes, at_any_time, by_hand, transformed

peft = pytest.importorskip("peft", reason="needs the extra `compose`: peft")

pytestmark = [
    pytest.mark.compose,
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
]


def config(**options: Any) -> Any:
    targets = ["q", "up"]
    return peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, **options
    )


def adapted(model: Any, name: str = "default", **options: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(len(name))
        peft.inject_adapter_in_model(config(**options), model, adapter_name=name)
    return model.eval()


def layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def activated(model: Any, *names: str) -> Any:
    for layer in layers(model):
        layer.set_adapter(list(names))
    return model


@at_any_time
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_added(when: When, dora: bool) -> None:
    want = by_hand(adapted(Toy(), use_dora=dora))
    assert_prunes(when(Toy(), lambda model: adapted(model, use_dora=dora)), want)


def test_adapters_are_merged_and_unmerged() -> None:
    fast = transformed(adapted(Toy()))
    want = by_hand(adapted(Toy()))
    assert_prunes(fast, want)
    for layer in layers(fast):
        layer.merge()
    assert_prunes(fast, want)
    for layer in layers(fast):
        layer.unmerge()
    assert_prunes(fast, want)


def test_adapters_are_switched_in_every_order() -> None:
    fast = transformed(adapted(adapted(Toy()), "other"))
    plain = adapted(adapted(Toy()), "other")
    for names in (("default",), ("default", "other"), ("other",), ("other", "default")):
        assert_prunes(activated(fast, *names), by_hand(activated(plain, *names)))
    for layer in layers(fast):
        layer.enable_adapters(False)
    assert_prunes(fast, by_hand(Toy()))
    for layer in layers(fast):
        layer.enable_adapters(True)
    assert_prunes(fast, by_hand(plain))


def test_a_second_adapter_after_the_first_generation() -> None:
    fast: Any = transformed(adapted(Toy()))
    fast(LABELS)
    adapted(fast, "other")
    want = activated(adapted(adapted(Toy()), "other"), "default", "other")
    assert_prunes(activated(fast, "default", "other"), by_hand(want))


def test_a_peft_model_around_the_transformed_one() -> None:
    fast = transformed(Toy())
    fast(LABELS)
    with torch.random.fork_rng():
        torch.manual_seed(len("default"))
        model = peft.get_peft_model(fast, config()).eval()
    want = by_hand(adapted(Toy()))
    assert_prunes(fast, want, lambda _: model(LABELS))
    merged = model.merge_and_unload()
    assert merged is fast
    assert_prunes(fast, want)


def test_a_peft_model_is_transformed() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(len("default"))
        model = peft.get_peft_model(Toy(), config()).eval()
    assert_prunes(transformed(model), by_hand(adapted(Toy())))


def test_strengths() -> None:
    fast, plain = transformed(adapted(Toy())), adapted(Toy())
    for strength in (1.0, 0.5, 0.0):
        for model in (fast, plain):
            for layer in layers(model):
                layer.set_scale("default", strength)
        assert_prunes(fast, by_hand(plain))

"""KV caches of transformers, one for all layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastvar_fx
from tests.compose.toy import (
    DEPTH,
    HEADS,
    LABELS,
    SIDES,
    WIDTH,
    Toy,
    assert_prunes,
    by_hand,
    transformed,
)

transformers = pytest.importorskip("transformers", reason="needs the extra `compose`: transformers")

pytestmark = pytest.mark.compose


@pytest.mark.parametrize("kv_buffer", [True, False])
def test_a_dynamic_cache(kv_buffer: bool) -> None:
    fast = transformed(Toy(), kv_buffer=kv_buffer)
    want = by_hand(Toy(), transformers.DynamicCache())
    assert_prunes(fast, want, lambda model: model.draw(LABELS, transformers.DynamicCache()))


def test_a_static_cache_leaves_attention_dense() -> None:
    class Settings(transformers.PretrainedConfig):  # type: ignore[misc, name-defined]
        num_hidden_layers = DEPTH
        num_attention_heads = num_key_value_heads = HEADS
        head_dim = WIDTH // HEADS

    def cache() -> Any:
        return transformers.StaticCache(Settings(), max_cache_len=sum(s * s for s in SIDES))

    fast: Any = transformed(Toy())
    only_ffn: Any = transformed(Toy(), branches=("ffn",))
    want: Tensor = only_ffn.draw(LABELS, cache())
    for _ in range(2):
        torch.testing.assert_close(fast.draw(LABELS, cache()), want, rtol=0, atol=1e-5)
    rows = [row for row in fastvar_fx.explain(fast).rows if row.step == len(SIDES) - 1]
    assert {row.kind for row in rows if row.kept < row.tokens} == {"ffn"}

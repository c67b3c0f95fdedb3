"""Transformed models go on to torch.compile: whole graphs, compiled once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastvar_fx
from fastvar_fx import RunError, Schedule
from fastvar_fx.models.var import VAR, VAR_256, build

LABELS = torch.tensor([1, 2])


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def transformed(depth: int) -> VAR:
    """All K = 10 steps of the 256 schedule, traced."""
    model = build("tiny", depth=depth)
    fast = fastvar_fx.transform(model, Schedule(VAR_256, (0.5, 0.75)))
    fastvar_fx.trace(fast, lambda m: m.infer_fhat(2, LABELS, g_seed=0))
    return fast


def compile_blocks(fast: VAR, backend: str) -> None:
    for block in fast.blocks:
        block.compile(fullgraph=True, backend=backend)


def token_loop(model: VAR, label: Tensor) -> Tensor:
    """A generation without sampling: every map is the last one's output, resized."""
    cond = model.class_emb(label)
    x = cond[:, None] + model.pos_start
    outputs, length = [], 1
    model.kv_caching(True)
    for side, following in zip(VAR_256, (*VAR_256[1:], None), strict=True):
        for block in model.blocks:
            x = block(x, cond)
        outputs.append(x)
        if following is not None:
            image = x.transpose(1, 2).unflatten(2, (side, side))
            resized = F.interpolate(image, (following, following), mode="area")
            tokens = following * following
            x = resized.flatten(2).transpose(1, 2) + model.pos_1LC[:, length : length + tokens]
            length += tokens
    model.kv_caching(False)
    return torch.cat(outputs, 1)


def test_compiled_blocks_equal_eager_ones_and_never_compile_again() -> None:
    fast = transformed(2)
    want = [fast.infer_fhat(2, LABELS, g_seed=seed) for seed in (0, 1)]
    compile_blocks(fast, "eager")
    assert torch.equal(fast.infer_fhat(2, LABELS, g_seed=0), want[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        got = [fast.infer_fhat(2, LABELS, g_seed=seed) for seed in (0, 1)]
    assert all(map(torch.equal, got, want))


def test_dynamo_takes_the_whole_token_loop() -> None:
    fast = transformed(1)
    want = [token_loop(fast, labels) for labels in (LABELS, LABELS + 1)]
    assert not torch.equal(want[0], token_loop(build("tiny", depth=1), LABELS))
    compiled = torch.compile(token_loop, fullgraph=True, backend="eager")
    assert torch.equal(compiled(fast, LABELS), want[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        got = [compiled(fast, labels) for labels in (LABELS, LABELS + 1)]
    assert all(map(torch.equal, got, want))


def test_compiling_before_tracing_says_so() -> None:
    fast = fastvar_fx.transform(build("tiny", depth=1), Schedule(VAR_256, (0.5,)))
    compile_blocks(fast, "eager")
    with pytest.raises((RunError, torch._dynamo.exc.Unsupported), match=r"fastvar_fx\.trace"):
        fast.infer_fhat(2, LABELS, g_seed=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of Inductor itself
def test_inductor_agrees_and_never_compiles_again() -> None:
    fast = transformed(1)
    want = token_loop(fast, LABELS)
    compile_blocks(fast, "inductor")
    torch.testing.assert_close(token_loop(fast, LABELS), want, rtol=1e-4, atol=1e-4)
    with torch.compiler.set_stance("fail_on_recompile"):
        token_loop(fast, LABELS + 1)
        torch.testing.assert_close(token_loop(fast, LABELS), want, rtol=1e-4, atol=1e-4)

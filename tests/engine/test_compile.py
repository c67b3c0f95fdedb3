"""Transformed models go on to torch.compile: whole graphs, compiled once."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import fastvar_fx
from fastvar_fx import CompileError, ModelError, RunError, Schedule
from fastvar_fx.models import VAR, VAR_256, build, infinity
from fastvar_fx.models.maps import template
from tests.engine.test_family import FAMILY, counts
from tests.engine.test_family import Net as Family
from tests.engine.test_stored import SCALES, Block, C, Model, call
from tests.marks import mostly_slow

LABELS = torch.tensor([1, 2])


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def transformed(depth: int, scales: tuple[int, ...] = VAR_256) -> VAR:
    """All steps of a schedule, traced."""
    model = build("tiny", depth=depth, scales=scales)
    fast = fastvar_fx.transform(model, Schedule(scales, (0.5, 0.75)))
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


@pytest.mark.slow
def test_dynamo_takes_the_whole_token_loop() -> None:
    fast = transformed(1)
    want = [token_loop(fast, labels) for labels in (LABELS, LABELS + 1)]
    assert not torch.equal(want[0], token_loop(build("tiny", depth=1), LABELS))
    compiled = torch.compile(token_loop, fullgraph=True, backend="eager")
    assert torch.equal(compiled(fast, LABELS), want[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        got = [compiled(fast, labels) for labels in (LABELS, LABELS + 1)]
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("around", mostly_slow(["model", "method", "block", "loop"], quick=1))
def test_compiling_before_tracing_says_so(around: str) -> None:
    """And after it, it works."""
    scales = FAMILY[0].scales
    want = fastvar_fx.transform(Unseeded(), FAMILY[0]).draw(scales)
    fast = fastvar_fx.transform(Unseeded(), FAMILY)
    fastvar_fx.use(fast, FAMILY[0])
    options: Any = {"fullgraph": True, "backend": "eager"}

    def run() -> list[Tensor]:
        torch._dynamo.reset()
        if around == "method":
            return torch.compile(fast.draw, **options)(scales)
        if around == "model":
            return torch.compile(fast, **options)(scales)  # type: ignore[no-any-return]
        if around == "loop":
            drawing = torch.compile(lambda: list(map(fast.sized, counts(scales))), **options)
            return drawing()
        for block in fast.blocks:
            block.compile(**options)
        return fast.draw(scales)

    with pytest.raises(RunError, match=r"fastvar_fx\.trace"):
        run()
    for block in fast.blocks:
        block._compiled_call_impl = None
    fastvar_fx.trace(fast, lambda fast: fast.draw(scales))
    assert all(map(torch.equal, run(), want))
    torch._dynamo.reset()


class Unseeded(Family):
    """Dynamo takes no generators of random numbers."""

    def forward(self, scales: Any) -> list[Tensor]:
        return self.draw(scales)

    def sized(self, tokens: int, handed: Any = None) -> Tensor:
        x = torch.sin(torch.arange(8 * tokens).double()).reshape(1, tokens, 8)
        for block in self.blocks:
            x = block(x, handed)
        return x


# --- fastvar_fx.compile -----------------------------------------------------------------------


FEW = (1, 2, 3, 4)


def graphs(fast: nn.Module) -> dict[int, int]:
    compiled = fastvar_fx.explain(fast).compiled
    assert compiled is not None
    return compiled.graphs


def generate(fast: VAR, seed: int) -> Tensor:
    return fast.infer_fhat(2, LABELS, g_seed=seed)


@pytest.mark.slow
def test_one_graph_per_step_serves_all_blocks_and_never_compiles_again() -> None:
    fast = transformed(9)  # more blocks than Dynamo compiles one code for
    want = [generate(fast, seed) for seed in (0, 1)]
    assert fastvar_fx.compile(fast, backend="eager") is fast
    assert graphs(fast) == {}
    assert torch.equal(generate(fast, 0), want[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        got = [generate(fast, seed) for seed in (0, 1)]
    assert all(map(torch.equal, got, want))
    assert graphs(fast) == {side * side: 1 for side in VAR_256}
    assert "torch.compile: 10 graphs for calls of 10 token counts" in str(fastvar_fx.explain(fast))
    assert json.loads(fastvar_fx.explain(fast).to_json())["compiled"]["failures"] == []


def test_blocks_that_do_not_prune_share_a_graph_too() -> None:
    schedule = Schedule(FEW, (0.5,), layers=[1])
    model = build("tiny", depth=3, scales=FEW)
    fast = fastvar_fx.transform(model, schedule)
    want = generate(fast, 0)
    fastvar_fx.compile(fast, backend="eager")
    assert torch.equal(generate(fast, 0), want)
    assert type(fast.blocks[0]) is not type(model.blocks[0])
    assert [set(vars(block)) for block in model.blocks] == 3 * [set(vars(build("tiny").blocks[0]))]
    # Block 1 runs its program at the cache step and the pruned one, the others their forward.
    assert graphs(fast) == {1: 1, 4: 1, 9: 2, 16: 2}


def test_a_schedule_that_prunes_nothing_compiles_the_dense_model() -> None:
    model = build("tiny", depth=2, scales=FEW)
    fast = fastvar_fx.compile(fastvar_fx.transform(model, Schedule(FEW, ())), backend="eager")
    assert torch.equal(generate(fast, 0), generate(model, 0))
    assert graphs(fast) == {1: 1, 4: 1, 9: 1, 16: 1}


@pytest.mark.slow
def test_blocks_that_differ_in_what_they_read_get_graphs_of_their_own() -> None:
    model = build("tiny", depth=9, scales=(1, 2))
    for layer, block in enumerate(model.blocks):
        norm: Any = block.ln_wo_grad
        norm.eps = 1e-6 * (1 + layer)
    fast = fastvar_fx.transform(model, Schedule((1, 2), ()))
    want = generate(fast, 0)
    fastvar_fx.compile(fast, backend="eager")
    assert torch.equal(generate(fast, 0), want)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(generate(fast, 0), want)
    assert graphs(fast) == {1: 9, 4: 9}


@pytest.mark.slow
def test_a_new_batch_or_a_new_model_compiles_its_own() -> None:
    fast = fastvar_fx.compile(transformed(1, FEW), backend="eager")
    generate(fast, 0)
    copied = copy.deepcopy(fast)
    fast.infer_fhat(1, 3, g_seed=0)
    assert set(graphs(fast).values()) == {2}
    assert graphs(copied) == {}
    assert torch.equal(generate(copied, 0), generate(fast, 0))
    assert set(graphs(copied).values()) == {1}


@pytest.mark.slow
def test_skipped_steps_and_prompts_of_any_length() -> None:
    scales = template(1.0, "0.06M")
    model = infinity.build("tiny", depth=2)
    fast = fastvar_fx.transform(model, Schedule(scales, (0.5, 1.0)))
    texts = [torch.randn(1, n, 64, generator=torch.Generator().manual_seed(n)) for n in (3, 5, 6)]
    want = [fast.autoregressive_infer_cfg(text, scales, g_seed=0) for text in texts]
    fastvar_fx.compile(fast, backend="eager")
    first = [fast.autoregressive_infer_cfg(text, scales, g_seed=0) for text in texts[:2]]
    with torch.compiler.set_stance("fail_on_recompile"):
        last = fast.autoregressive_infer_cfg(texts[2], scales, g_seed=0)
    assert all(map(torch.equal, [*first, last], want))
    assert max(graphs(fast).values()) <= 2


@pytest.mark.slow
def test_a_users_compile_around_it_wins() -> None:
    fast = fastvar_fx.compile(transformed(1), backend="eager")
    want = token_loop(fast, LABELS)
    made = graphs(fast)
    compiled = torch.compile(token_loop, fullgraph=True, backend="eager")
    assert torch.equal(compiled(fast, LABELS), want)
    assert graphs(fast) == made


def broken_from(step: int) -> Callable[..., Any]:
    """A backend that compiles the graphs of all steps before one."""
    left = iter(range(step))

    def backend(graph_module: GraphModule, _: object) -> Any:
        if next(left, None) is None:
            raise NotImplementedError("no kernel for aten.topk")
        return graph_module.forward

    return backend


@pytest.mark.parametrize(("step", "tokens"), [(0, 1), (2, 9)])
def test_a_failure_names_step_and_op_and_leaves_the_model_usable(step: int, tokens: int) -> None:
    fast = transformed(1, FEW)
    want = generate(fast, 0)
    fastvar_fx.compile(fast, backend=broken_from(step))
    message = rf"blocks\.0 at step {step} \({tokens} tokens\)[^$]*no kernel for aten\.topk"
    with pytest.raises(CompileError, match=message):
        generate(fast, 0)
    fastvar_fx.compile(fast, backend="eager")
    assert torch.equal(generate(fast, 0), want)


def test_fallback_runs_what_fails_eagerly_and_says_so() -> None:
    fast = transformed(2, FEW)
    want = generate(fast, 0)
    fastvar_fx.compile(fast, fallback=True, backend=broken_from(2))
    assert torch.equal(generate(fast, 0), want)
    failures = [line for line in str(fastvar_fx.explain(fast)).splitlines() if "so eager" in line]
    assert [re.findall("step [0-9]+", line) for line in failures] == [["step 2"], ["step 3"]]
    assert graphs(fast) == {1: 1, 4: 1}


def test_what_cannot_be_compiled_as_asked_is_told_at_once() -> None:
    with pytest.raises(ModelError, match="not transformed"):
        fastvar_fx.compile(build("tiny", depth=1))
    with pytest.raises(TypeError, match="colour"):
        fastvar_fx.compile(transformed(1, FEW), colour="red")


@pytest.mark.slow
def test_inductors_front_end_agrees() -> None:
    fast = transformed(2, FEW)
    want = generate(fast, 0)
    fastvar_fx.compile(fast, backend="aot_eager")
    torch.testing.assert_close(generate(fast, 0), want, rtol=1e-4, atol=1e-4)
    assert graphs(fast) == {1: 1, 4: 1, 9: 1, 16: 1}


@pytest.mark.slow
@pytest.mark.parametrize("compile_model", [compile_blocks, fastvar_fx.compile])
def test_inductor_agrees_and_never_compiles_again(compile_model: Callable[..., object]) -> None:
    fast = transformed(1)
    want = token_loop(fast, LABELS)
    compile_model(fast, backend="inductor")
    torch.testing.assert_close(token_loop(fast, LABELS), want, rtol=1e-4, atol=1e-4)
    with torch.compiler.set_stance("fail_on_recompile"):
        token_loop(fast, LABELS + 1)
        torch.testing.assert_close(token_loop(fast, LABELS), want, rtol=1e-4, atol=1e-4)


# --- forwards that Dynamo cannot take -------------------------------------------------------------


class Offset(nn.Module):
    """A block that computes where its positions begin with NumPy, as upstream Infinity's does."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.positions = nn.Parameter(torch.randn(30, 8))
        self.scales = [(1, 1), (2, 2), (3, 3), (4, 4)]

    def forward(self, x: Tensor) -> Tensor:
        step = [h * w for h, w in self.scales].index(x.shape[1])
        start = np.sum([h * w for h, w in self.scales[:step]]) if step else 0
        out: Tensor = x + self.proj(x) * self.positions[start : start + x.shape[1]]
        return out


class Offsets(nn.Module):
    blocks: Any

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Offset() for _ in range(3))

    def forward(self, seed: int) -> list[Tensor]:
        drawn = []
        for side in (1, 2, 3, 4):
            x = torch.randn(2, side * side, 8, generator=torch.Generator().manual_seed(seed))
            for block in self.blocks:
                x = block(x)
            drawn.append(x)
        return drawn


def test_a_forward_that_dynamo_cannot_take_is_compiled_as_traced() -> None:
    model = Offsets().eval()
    schedule = Schedule((1, 2, 3, 4), (0.5,))
    plain = fastvar_fx.transform(model, schedule)
    fast = fastvar_fx.compile(fastvar_fx.transform(model, schedule), backend="aot_eager")
    for seed in (0, 1):
        torch.testing.assert_close(fast(seed), plain(seed))
    report = fastvar_fx.explain(fast)
    assert report.compiled is not None
    assert report.compiled.failures == ()
    assert sum(report.compiled.graphs.values()) == 4  # one a step, for all blocks
    with torch.no_grad():
        for block in model.blocks:
            block.proj.weight.mul_(2)  # the weights are shared
    torch.testing.assert_close(fast(0), plain(0))


@pytest.mark.slow
def test_a_block_that_is_edited_is_traced_again() -> None:
    schedule = Schedule((1, 2, 3, 4), (0.5,))
    plain = fastvar_fx.transform(Offsets().eval(), schedule)
    fast = fastvar_fx.compile(fastvar_fx.transform(Offsets().eval(), schedule), backend="aot_eager")
    fast(0)
    for model in (plain, fast):
        model.blocks[1].proj.register_forward_hook(lambda module, args, out: 3 * out)
    torch.testing.assert_close(fast(0), plain(0))


class Unlucky(Offset):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        return out if float(out.sum()) < 1e9 else x


@pytest.mark.slow
def test_a_forward_that_cannot_be_traced_either_is_an_error() -> None:
    model = Offsets()
    model.blocks = nn.ModuleList(Unlucky() for _ in range(2))
    schedule = Schedule((1, 2, 3, 4), (0.5,))
    fast = fastvar_fx.compile(
        fastvar_fx.transform(model.eval(), schedule, strict=False), backend="aot_eager"
    )
    with pytest.raises(CompileError, match=r"torch\.compile failed on"):
        fast(0)
    fast = fastvar_fx.compile(
        fastvar_fx.transform(model.eval(), schedule, strict=False),
        backend="aot_eager",
        fallback=True,
    )
    for ours, dense in zip(fast(0), model(0), strict=True):
        torch.testing.assert_close(ours, dense)


class Casts(Block):
    """Its first call gives a weight the dtype of the token map."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(C))

    def attend(self, x: Tensor, shared: dict[str, Any]) -> Tensor:
        self.weight.data = self.weight.data.to(x)
        return super().attend(x * self.weight.data, shared)


@pytest.mark.slow
@pytest.mark.parametrize(("compiled", "cache_step"), [(False, 0), (True, 2)])
def test_weights_that_the_first_call_casts(compiled: bool, cache_step: int) -> None:
    torch.manual_seed(0)
    model = Model(Casts, 3).eval().bfloat16()
    schedule = Schedule(SCALES, (0.5, 0.6), cache_step=cache_step)
    for block in model.blocks:
        block.register_parameter("weight", nn.Parameter(torch.randn(C)))
    cast_before = fastvar_fx.transform(copy.deepcopy(model), schedule)
    for block in cast_before.blocks:
        block.bfloat16()
    fast = fastvar_fx.transform(model, schedule)
    if compiled:
        fastvar_fx.compile(fast, backend="eager")
    for seed in (0, 1):
        want, got = (m.generate(seed, call_in_bfloat16) for m in (cast_before, fast))
        assert torch.equal(got, want)
    assert {block.weight.dtype for block in model.blocks} == {torch.bfloat16}


def call_in_bfloat16(layer: int, block: Any, x: Tensor, shared: Any) -> Tensor:
    return call(layer, block, x.bfloat16(), shared)

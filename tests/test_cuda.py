"""What only a GPU can show: recorded generations, fused attention, no waiting, memory.

`--device double` runs most of them on the CPU with a double of the CUDA graph, to find mistakes in
the tests themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastvar_fx
from fastvar_fx import GraphError, Schedule, ops
from fastvar_fx import cuda_graphs as recording
from fastvar_fx.cli import main
from fastvar_fx.measuring.clock import peak_bytes
from fastvar_fx.models import VAR, VAR_256, build, hart, infinity
from passes.rewrite.side_input import take_side
from tests.by_hand import fixed_draws
from tests.devices import GPU
from tests.graph_double import doubled

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        GPU.type == "cuda" and not torch.cuda.is_available(), reason="torch finds no GPU"
    ),
    pytest.mark.usefixtures("_graph"),
]
on_gpu = pytest.mark.skipif(GPU.type != "cuda", reason="the double would show nothing")

FEW = (1, 2, 3, 4)
SCALES = VAR_256 if GPU.type == "cuda" else FEW


@pytest.fixture
def _graph() -> Iterator[None]:
    if GPU.type == "cuda":
        yield
    else:
        with doubled():
            yield


def original(dtype: torch.dtype = torch.float32, scales: tuple[int, ...] = SCALES) -> VAR:
    model = build("tiny", depth=2, scales=scales).to(GPU, dtype)
    model.vae.to(GPU, dtype)
    return model


def transformed(dtype: torch.dtype = torch.float32, scales: tuple[int, ...] = SCALES) -> VAR:
    return fastvar_fx.transform(original(dtype, scales), Schedule(scales, (0.5, 0.75)))


def labels(*values: int) -> Tensor:
    return torch.tensor(values, device=GPU)


def draw(model: VAR, label: Tensor) -> Tensor:
    return model.autoregressive_infer_cfg(2, label, top_k=50, top_p=0.9)


def eager(fast: nn.Module, run: Callable[..., Tensor], x: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return run(fast, x)


def generator() -> torch.Generator:
    """The GPU's own."""
    return recording.CudaGraph(GPU).default_generator


# --- recordings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replays_equal_eager_generations(dtype: torch.dtype) -> None:
    fast = transformed(dtype)
    replay = fastvar_fx.cuda_graph(fast, draw, labels(1, 2))
    for label, seed in ((labels(1, 2), 0), (labels(3, 4), 0), (labels(3, 4), 7)):
        torch.testing.assert_close(replay(label, seed=seed), eager(fast, draw, label, seed))
    assert not torch.equal(replay(labels(1, 2)), replay(labels(1, 2)))


def test_a_seed_leaves_the_generator_of_the_device_as_it_was() -> None:
    replay = fastvar_fx.cuda_graph(transformed(scales=FEW), draw, labels(1, 2))
    state = generator().get_state()
    replay(labels(1, 2), seed=7)
    assert torch.equal(generator().get_state(), state)


def test_a_generator_of_the_model_is_counted_and_seeded() -> None:
    fast: Any = transformed(scales=FEW)
    fast.rng = torch.Generator(GPU)

    def run(model: Any, label: Tensor) -> Tensor:
        draw(model, label)
        return torch.rand(8, device=GPU, generator=model.rng)

    replay = fastvar_fx.cuda_graph(fast, run, labels(1, 2))
    first, second = replay(labels(1, 2), seed=1), replay(labels(1, 2), seed=2)
    assert torch.equal(replay(labels(1, 2), seed=1), first)
    assert not torch.equal(first, second)
    assert not torch.equal(replay(labels(1, 2)), replay(labels(1, 2)))


@pytest.mark.parametrize("ratios", [(), (0.5, 0.75)], ids=["dense", "pruned"])
def test_a_replay_equals_the_original_loop(ratios: tuple[float, ...]) -> None:
    model = original()
    fast = fastvar_fx.transform(model, Schedule(SCALES, ratios))
    replay = fastvar_fx.cuda_graph(fast, draw, labels(1, 2))
    image = replay(labels(3, 4), seed=5)
    torch.testing.assert_close(image, eager(fast, draw, labels(3, 4), 5))
    dense = eager(model, draw, labels(3, 4), 5)
    assert torch.allclose(image, dense, atol=1e-3) == (not ratios)


@pytest.mark.parametrize(
    ("name", "ratios"),
    [("infinity", (0.5, 0.75)), ("infinity", (0.5, 1.0)), ("hart", (0.5, 0.75))],
)
def test_text_models_are_recorded(name: str, ratios: tuple[float, ...]) -> None:
    fast, run = text_model(name, ratios)
    one, other = text_of(fast, 2)
    replay = fastvar_fx.cuda_graph(fast, run, one)
    torch.testing.assert_close(replay(other, seed=3), eager(fast, run, other, 3))


def text_model(name: str, ratios: tuple[float, ...]) -> tuple[Any, Callable[..., Tensor]]:
    build_model: Any = {"infinity": infinity.build, "hart": hart.build}[name]
    fast = fastvar_fx.transform(build_model("tiny", depth=2).to(GPU), Schedule(FEW, ratios))

    def run(model: Any, text: Tensor) -> Tensor:
        image: Tensor = model.autoregressive_infer_cfg(text, [(n, n) for n in FEW], top_p=0.9)
        return image

    return fast, run


def text_of(model: Any, count: int) -> list[Tensor]:
    return list(torch.randn(count, 1, 5, model.config.text_width, device=GPU))


@pytest.mark.slow
@on_gpu
def test_compiled_programs_are_recorded() -> None:
    fast = fastvar_fx.compile(transformed(scales=FEW))
    replay = fastvar_fx.cuda_graph(fast, draw, labels(1, 2))
    with torch.compiler.set_stance("fail_on_recompile"):
        image = replay(labels(3, 4), seed=5)
    torch.testing.assert_close(image, eager(fast, draw, labels(3, 4), 5))


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        pytest.param(lambda x: x.cpu(), marks=on_gpu),
        lambda x: x[x > 0],
        lambda x: torch.tensor([1.0], device=GPU),
    ],
)
def test_the_error_names_the_line_that_waits_for_the_gpu(wait: Callable[[Tensor], Any]) -> None:
    fast = transformed(scales=FEW)

    def run(model: VAR, label: Tensor) -> Tensor:
        image = draw(model, label)
        wait(image)
        return image

    with pytest.raises(GraphError, match="waits for the GPU") as raised:
        fastvar_fx.cuda_graph(fast, run, labels(1, 2))
    assert f"{__file__}:{wait.__code__.co_firstlineno}" in str(raised.value)
    check_usable(fast)


@on_gpu
def test_a_loop_that_seeds_is_refused() -> None:
    fast = transformed(scales=FEW)
    with pytest.raises(GraphError, match="pass seed= to the replay"):
        fastvar_fx.cuda_graph(fast, lambda m, x: m.infer_fhat(2, x, g_seed=0), labels(1, 2))
    check_usable(fast)


@on_gpu
def test_out_of_memory_says_how_much_was_asked_and_frees_it() -> None:
    fast, runs = transformed(scales=FEW), 0

    def run(model: VAR, label: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        if runs == 3:
            torch.empty(2**42, dtype=torch.uint8, device=GPU)
        return draw(model, label)

    before = torch.cuda.memory_allocated()
    with pytest.raises(GraphError, match=r"no memory for the recording.*Tried to allocate 4096"):
        fastvar_fx.cuda_graph(fast, run, labels(1, 2))
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= before + 2**24
    check_usable(fast)


def check_usable(fast: VAR) -> None:
    """The model draws, holds no features, and can be recorded."""
    image = eager(fast, draw, labels(1, 2), 0)
    assert fastvar_fx.explain(fast).captured_bytes == 0
    replay = fastvar_fx.cuda_graph(fast, draw, labels(1, 2))
    torch.testing.assert_close(replay(labels(1, 2), seed=0), image)


# --- generations --------------------------------------------------------------------------------


@pytest.mark.parametrize("ratios", [(), (0.0, 0.0)])
def test_ratio_0_is_bit_identical_with_flash_attention(ratios: tuple[float, ...]) -> None:
    model = original(torch.bfloat16)
    fast = fastvar_fx.transform(model, Schedule(SCALES, ratios))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        images = [eager(each, draw, labels(1, 2), 0) for each in (fast, model)]
    assert torch.equal(*images)


def test_pruned_steps_run_with_flash_attention() -> None:
    fast = transformed(torch.bfloat16)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        image = eager(fast, draw, labels(1, 2), 0)
    assert image.isfinite().all()
    assert not fastvar_fx.explain(fast).refusals


@pytest.mark.parametrize("name", ["var", "infinity", "hart"])
def test_no_step_waits_for_the_gpu(name: str) -> None:
    if name == "var":
        fast: Any = transformed(scales=FEW)
        run, example = draw, labels(1, 2)
    else:
        fast, run = text_model(name, (0.5, 0.75))
        (example,) = text_of(fast, 1)
    run(fast, example)
    recording.CudaGraph(GPU).rehearse(lambda: run(fast, example))


@pytest.mark.slow
def test_compiled_equals_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvar_fx.models.var.sample_top_k_top_p", drawn_by_count(512))
    fast, compiled = transformed(scales=FEW), fastvar_fx.compile(transformed(scales=FEW))
    images = [draw(each, labels(1, 2)) for each in (fast, compiled)]
    torch.testing.assert_close(*images, rtol=1e-3, atol=1e-3)


def drawn_by_count(classes: int) -> Callable[..., Tensor]:
    """Draws that rounding cannot change."""
    draws = fixed_draws(classes)
    return lambda logits, *more: draws(logits, *more).to(logits.device)


def test_measuring_by_step() -> None:
    fast = transformed(scales=FEW)
    report = fastvar_fx.measure(fast, lambda m: draw(m, labels(1, 2)), repeats=2)
    assert sorted(report.step_times) == [2, 3]
    assert all(t.dense.low > 0 and t.pruned.low > 0 for t in report.step_times.values())


@on_gpu
def test_captured_features_are_all_that_pruning_adds_to_memory() -> None:
    model = original()
    fast = fastvar_fx.transform(model, Schedule(SCALES, (0.5, 0.75)))
    run = partial(draw, label=labels(1, 2))
    run(fast)  # traces
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    dense, pruned = (peak_bytes(partial(run, each), GPU) for each in (model, fast))
    captured = fastvar_fx.explain(fast).peak_captured_bytes
    assert captured > 0
    assert pruned <= dense + captured + 2**20
    assert torch.cuda.memory_allocated() <= before + 2**20


# --- operators ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_operators_equal_eager_ones(dtype: torch.dtype) -> None:
    x = torch.randn(2, 36, 64, device=GPU, dtype=dtype)
    cached = torch.randn(2, 16, 64, device=GPU, dtype=dtype)
    side = torch.randn(36, 8, device=GPU, dtype=dtype)
    layout = (None, None, None), ((1, 36, 0),), 0, (2, -1, -1)

    def run(x: Tensor, cached: Tensor, side: Tensor) -> tuple[Tensor, ...]:
        index = ops.pivotal_token_selection(x, 9)
        kept = ops.take_tokens(x, index)
        full = ops.cached_token_restoration(kept, index, cached, (4, 4), (6, 6))
        return index, kept, full, take_side(side, index, *layout)

    got, want = torch.compile(run, fullgraph=True)(x, cached, side), run(x, cached, side)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


# --- the command line ---------------------------------------------------------------------------


@on_gpu
def test_evaluate_runs_on_the_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "demo", "--seeds", "1", "--repeats", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["device"].startswith("cuda")

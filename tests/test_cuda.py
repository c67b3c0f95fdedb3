"""Recorded generations on a GPU; skipped without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastvar_fx
from fastvar_fx import GraphError, Schedule
from fastvar_fx.models import VAR, VAR_256, build, hart, infinity

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]

FEW = (1, 2, 3, 4)


def transformed(dtype: torch.dtype = torch.float32, scales: tuple[int, ...] = VAR_256) -> VAR:
    model = build("tiny", depth=2, scales=scales).to("cuda", dtype)
    model.vae.to("cuda", dtype)
    return fastvar_fx.transform(model, Schedule(scales, (0.5, 0.75)))


def labels(*values: int) -> Tensor:
    return torch.tensor(values, device="cuda")


def draw(model: VAR, label: Tensor) -> Tensor:
    return model.autoregressive_infer_cfg(2, label, top_k=50, top_p=0.9)


def eager(fast: nn.Module, run: Callable[..., Tensor], x: Tensor, seed: int) -> Tensor:
    torch.cuda.manual_seed(seed)
    return run(fast, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replays_equal_eager_generations(dtype: torch.dtype) -> None:
    fast = transformed(dtype)
    recording = fastvar_fx.cuda_graph(fast, draw, labels(1, 2))
    for label, seed in ((labels(1, 2), 0), (labels(3, 4), 0), (labels(3, 4), 7)):
        torch.testing.assert_close(recording(label, seed=seed), eager(fast, draw, label, seed))
    assert not torch.equal(recording(labels(1, 2)), recording(labels(1, 2)))


def test_a_seed_leaves_the_generator_of_the_device_as_it_was() -> None:
    recording = fastvar_fx.cuda_graph(transformed(scales=FEW), draw, labels(1, 2))
    state = torch.cuda.get_rng_state()
    recording(labels(1, 2), seed=7)
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_a_generator_of_the_model_is_counted_and_seeded() -> None:
    fast: Any = transformed(scales=FEW)
    fast.rng = torch.Generator("cuda")

    def run(model: Any, label: Tensor) -> Tensor:
        draw(model, label)
        return torch.rand(8, device="cuda", generator=model.rng)

    recording = fastvar_fx.cuda_graph(fast, run, labels(1, 2))
    first, second = recording(labels(1, 2), seed=1), recording(labels(1, 2), seed=2)
    assert torch.equal(recording(labels(1, 2), seed=1), first)
    assert not torch.equal(first, second)
    assert not torch.equal(recording(labels(1, 2)), recording(labels(1, 2)))


@pytest.mark.parametrize("name", ["infinity", "hart"])
def test_text_models_are_recorded(name: str) -> None:
    build_model: Any = {"infinity": infinity.build, "hart": hart.build}[name]
    model = build_model("tiny", depth=2).cuda()
    fast = fastvar_fx.transform(model, Schedule(FEW, (0.5, 0.75)))
    width = model.config.text_width
    one, other = torch.randn(2, 1, 5, width, device="cuda")

    def run(model: Any, text: Tensor) -> Tensor:
        image: Tensor = model.autoregressive_infer_cfg(text, [(n, n) for n in FEW], top_p=0.9)
        return image

    recording = fastvar_fx.cuda_graph(fast, run, one)
    torch.testing.assert_close(recording(other, seed=3), eager(fast, run, other, 3))


@pytest.mark.slow
def test_compiled_programs_are_recorded() -> None:
    fast = fastvar_fx.compile(transformed())
    recording = fastvar_fx.cuda_graph(fast, draw, labels(1, 2))
    with torch.compiler.set_stance("fail_on_recompile"):
        image = recording(labels(3, 4), seed=5)
    torch.testing.assert_close(image, eager(fast, draw, labels(3, 4), 5))


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: torch.tensor([1.0], device="cuda"),
    ],
)
def test_a_run_that_waits_for_the_gpu_is_told_its_line(wait: Callable[[Tensor], Any]) -> None:
    fast = transformed(scales=FEW)

    def run(model: VAR, label: Tensor) -> Tensor:
        image = draw(model, label)
        wait(image)
        return image

    with pytest.raises(GraphError, match="waits for the GPU") as raised:
        fastvar_fx.cuda_graph(fast, run, labels(1, 2))
    assert f"{__file__}:{wait.__code__.co_firstlineno}" in str(raised.value)
    check_usable(fast)


def test_a_loop_with_a_seed_is_told_to_leave_it_to_the_replay() -> None:
    fast = transformed(scales=FEW)
    with pytest.raises(GraphError, match="pass seed= to the replay"):
        fastvar_fx.cuda_graph(fast, lambda m, x: m.infer_fhat(2, x, g_seed=0), labels(1, 2))
    check_usable(fast)


def test_out_of_memory_says_how_much_was_asked_and_frees_it() -> None:
    fast, runs = transformed(scales=FEW), 0

    def run(model: VAR, label: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        if runs == 3:
            torch.empty(2**42, dtype=torch.uint8, device="cuda")
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
    recording = fastvar_fx.cuda_graph(fast, draw, labels(1, 2))
    torch.testing.assert_close(recording(labels(1, 2), seed=0), image)

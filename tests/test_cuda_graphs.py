"""Recorded generations, on a double of the CUDA graph that runs the generation again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor, nn

import fastvar_fx
from fastvar_fx import GraphError, ModelError, Schedule
from fastvar_fx.cuda_graphs import Run
from fastvar_fx.models import hart, infinity
from fastvar_fx.models.var import VAR, build
from tests.graph_double import OfCompiled, Rerun, record

FEW = (1, 2, 3, 4)
ONES, TWOS = torch.tensor([1, 1]), torch.tensor([2, 2])


def transformed(depth: int = 1) -> VAR:
    model = build("tiny", depth=depth, scales=FEW)
    return fastvar_fx.transform(model, Schedule(FEW, (0.5, 0.75)))


@functools.cache
def traced() -> VAR:
    """One model for all tests that leave it as it was."""
    return transformed()


def draw(model: VAR, label: Tensor) -> Tensor:
    return model.infer_fhat(2, label)


# --- replays ------------------------------------------------------------------------------------


def test_a_replay_is_the_eager_generation_of_its_inputs_and_seed() -> None:
    fast = traced()
    recording = record(fast, draw, ONES)
    for label, seed in ((ONES, 0), (TWOS, 0), (TWOS, 5)):
        torch.manual_seed(seed)
        assert torch.equal(recording(label, seed=seed), draw(fast, label))


def test_results_are_copies_and_outlive_the_next_replay() -> None:
    recording = record(traced(), lambda m, x: (draw(m, x["label"]), "kept"), {"label": ONES})
    first, kept = recording({"label": ONES}, seed=0)
    before = first.clone()
    assert not torch.equal(recording({"label": TWOS}, seed=1)[0], first)
    assert torch.equal(first, before)
    assert kept == "kept"


def test_a_seed_leaves_the_generators_as_they_were_and_without_one_they_continue() -> None:
    torch.manual_seed(3)
    recording = record(traced(), draw, ONES)
    state = torch.get_rng_state()
    assert torch.initial_seed() == 3
    recording(ONES, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(recording(ONES), recording(ONES))


def test_generators_of_the_model_and_of_the_inputs_are_seeded() -> None:
    fast: Any = transformed()
    fast.rng = torch.Generator()
    handed_in = torch.Generator()

    def run(model: Any, generator: torch.Generator) -> Tensor:
        noise = torch.rand(2, generator=model.rng) + torch.rand(2, generator=generator)
        return noise + draw(model, ONES).sum() * 0

    recording = record(fast, run, handed_in)
    assert torch.equal(recording(handed_in, seed=1), recording(handed_in, seed=1))
    assert not torch.equal(recording(handed_in, seed=1), recording(handed_in, seed=2))
    with pytest.raises(GraphError, match="generators are part of a recording"):
        recording(torch.Generator())


def test_state_that_the_loop_leaves_on_the_model_is_not_that_of_the_recording() -> None:
    fast: Any = transformed()
    fast.left = [torch.zeros(1)]

    class Marking(Rerun):
        def capture(self, call: Callable[[], Any], generators: Sequence[torch.Generator]) -> Any:
            before = fast.left[0]
            try:
                return super().capture(call, generators)
            finally:
                assert fast.left[0] is not before
                seen.append(before)

    def run(model: Any, label: Tensor) -> Tensor:
        image = draw(model, label)
        model.left[0] = image.clone()
        return image

    seen: list[Tensor] = []
    record(fast, run, ONES, graph=Marking())
    assert fast.left[0] is seen[0]
    assert fastvar_fx.explain(fast).captured_bytes == 0


@pytest.mark.slow
def test_compiled_programs_are_recorded_too() -> None:
    torch._dynamo.reset()
    fast = fastvar_fx.compile(transformed(), backend="eager")

    recording = record(fast, draw, ONES, graph=OfCompiled())
    with torch.compiler.set_stance("fail_on_recompile"):
        image = recording(TWOS, seed=0)
    torch.manual_seed(0)
    assert torch.equal(image, draw(fast, TWOS))
    torch._dynamo.reset()


# --- in-tree loops --------------------------------------------------------------------------------


def text(width: int) -> Tensor:
    return torch.randn(1, 4, width, generator=torch.Generator().manual_seed(0))


LOOPS: dict[str, tuple[Callable[[], nn.Module], Run, Tensor]] = {
    "var": (
        lambda: build("tiny", depth=1, scales=FEW),
        lambda m, label: m.autoregressive_infer_cfg(2, label, top_k=9, top_p=0.9),
        ONES,
    ),
    "infinity": (
        lambda: infinity.build("tiny", depth=1),
        lambda m, x: m.autoregressive_infer_cfg(x, [(n, n) for n in FEW], top_p=0.9),
        text(64),
    ),
    "hart": (
        lambda: hart.build("tiny", depth=1),
        lambda m, x: m.autoregressive_infer_cfg(x, [(n, n) for n in FEW], top_k=9),
        text(48),
    ),
}


@pytest.mark.parametrize(
    ("name", "ratios"),
    [(name, (0.5, 0.75)) for name in LOOPS] + [("var", (0.5, 1.0)), ("infinity", (0.5, 1.0))],
)
def test_no_in_tree_loop_waits_for_the_gpu(name: str, ratios: tuple[float, ...]) -> None:
    make, run, example = LOOPS[name]
    fast = fastvar_fx.transform(make(), Schedule(FEW, ratios))
    image = record(fast, run, example)(example, seed=0)
    torch.manual_seed(0)
    assert torch.equal(image, run(fast, example))


# --- refusals -------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_where_the_model_is() -> None:
    with pytest.raises(GraphError, match="needs the model on a CUDA device; it is on cpu"):
        fastvar_fx.cuda_graph(traced(), draw, ONES)
    with pytest.raises(ModelError, match="is not transformed"):
        fastvar_fx.cuda_graph(build("tiny", depth=1), draw, ONES)


def test_inputs_that_do_not_fit_are_refused_and_nothing_is_copied() -> None:
    recording = record(traced(), lambda m, label, _: draw(m, label), ONES, 4)
    want = recording(ONES, 4, seed=0)
    for inputs, message in (
        ((TWOS[:1], 4), r"input \[0\] was recorded as \(2,\) int64 on cpu; found \(1,\) int64"),
        ((TWOS.int(), 4), r"found \(2,\) int32 on cpu. A recording holds for one shape"),
        ((TWOS.to("meta"), 4), "found .* on meta"),
        ((TWOS, 5), r"input \[1\] was recorded as 4; found 5. Plain values"),
        ((TWOS, TWOS), r"input \[1\] was recorded as 4; found \(2,\) int64"),
        ((TWOS,), "Give inputs of the recorded structure"),
    ):
        with pytest.raises(GraphError, match=message):
            recording(*inputs, seed=0)
    assert torch.equal(recording(ONES, 4, seed=0), want)
    with pytest.raises(GraphError, match=r"input \[0\] is .* on meta, but the generation runs on"):
        record(traced(), draw, ONES.to("meta"))


def test_weights_may_take_new_values_but_not_new_memory() -> None:
    fast = transformed()
    recording = record(fast, draw, ONES)
    fast.load_state_dict(
        {k: v * 2 if k == "head.bias" else v for k, v in fast.state_dict().items()}
    )
    torch.manual_seed(0)
    assert torch.equal(recording(ONES, seed=0), draw(fast, ONES))
    fast.head.weight.data = fast.head.weight.data.clone()
    with pytest.raises(GraphError, match=r"^head\.weight was moved, cast or replaced"):
        recording(ONES)
    fast.double()
    with pytest.raises(GraphError, match=r"and \d+ others was moved"):
        recording(ONES)


def test_training_mode_is_refused() -> None:
    fast = transformed()
    recording = record(fast, draw, ONES)
    fast.train()
    with pytest.raises(ModelError, match=r"call eval\(\) first"):
        recording(ONES)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: torch.tensor([1.0]),
        lambda x: print(bool(x.sum() > 0)),
    ],
)
def test_the_error_names_the_line_that_waits_for_the_gpu(wait: Callable[[Tensor], Any]) -> None:
    fast = traced()

    def run(model: VAR, label: Tensor) -> Tensor:
        image = draw(model, label)
        wait(image)
        return image

    with pytest.raises(GraphError, match="waits for the GPU") as raised:
        record(fast, run, ONES)
    line = wait.__code__.co_firstlineno
    assert f"at {__file__}:{line}, which" in str(raised.value)
    check_intact(fast)


def test_a_block_that_waits_gets_an_error_that_names_its_line_not_ours() -> None:
    class Reading(nn.GELU):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * float(x.sum() != 0)

    model = build("tiny", depth=2, scales=FEW)
    model.blocks[1].ffn.act = Reading(approximate="tanh")  # type: ignore[union-attr]
    fast = fastvar_fx.transform(model, Schedule(FEW, (0.5,)))
    with pytest.raises(GraphError, match="waits for the GPU") as raised:
        record(fast, draw, ONES)
    line = Reading.forward.__code__.co_firstlineno + 1
    assert f"at {__file__}:{line}, which" in str(raised.value)


def test_a_run_that_seeds_is_refused() -> None:
    fast = traced()

    def run(model: VAR, label: Tensor) -> Tensor:
        torch.manual_seed(0)
        return draw(model, label)

    state = torch.get_rng_state()
    with pytest.raises(GraphError, match=r"the run seeds a generator.*pass seed= to the replay"):
        record(fast, run, ONES)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of "
                "79.10 GiB of which 1.00 GiB is free. Including non-PyTorch memory, ..."
            ),
            r"no memory for the recording at .*Tried to allocate 2\.00 GiB.*1\.00 GiB is free\. A",
        ),
        (
            RuntimeError("Cannot construct a new CUDAGeneratorImpl during CUDA graph capture."),
            r"makes or seeds a generator.*(?s:.*)Give the loop no seed",
        ),
        (
            RuntimeError("CUDA error: operation not permitted when stream is capturing\nlong text"),
            r"could not be recorded at .*: CUDA error: operation not permitted .*\nA CUDA graph",
        ),
    ],
)
def test_a_failed_capture_says_why_and_leaves_the_model_usable(
    error: RuntimeError, message: str
) -> None:
    fast, runs = traced(), 0

    def run(model: VAR, label: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        blocks = model.blocks[-1]
        fail = runs == 3 and blocks.register_forward_hook(after_capture)
        try:
            return draw(model, label)
        finally:
            if fail:
                fail.remove()

    def after_capture(_: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
        if args[0].shape[1] == FEW[1] ** 2:
            assert fastvar_fx.explain(fast).captured_bytes > 0
            raise error

    with pytest.raises(GraphError, match=message):
        record(fast, run, ONES)
    check_intact(fast)


def check_intact(fast: VAR) -> None:
    """The model holds no features, and draws as an untouched one does."""
    assert fastvar_fx.explain(fast).captured_bytes == 0
    torch.manual_seed(0)
    assert torch.equal(draw(fast, ONES), untouched_image())


@functools.cache
def untouched_image() -> Tensor:
    torch.manual_seed(0)
    return draw(transformed(), ONES)


def test_a_run_has_to_return_its_tensors() -> None:
    with pytest.raises(GraphError, match="returned no tensor but NoneType"):
        record(traced(), lambda m, label: [draw(m, label)].clear(), ONES)
    with pytest.raises(GraphError, match="a tensor on meta"):
        record(traced(), lambda m, label: draw(m, label).to("meta"), ONES)


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "reduce-overhead"},
        {"mode": "max-autotune"},
        {"options": {"triton.cudagraphs": True}},
        {"backend": "cudagraphs"},
    ],
)
def test_graphs_of_torch_compile_inside_are_refused(options: dict[str, Any]) -> None:
    fast = fastvar_fx.compile(transformed(), **options)
    with pytest.raises(GraphError, match="record CUDA graphs of its own"):
        record(fast, draw, ONES)


def test_other_errors_of_the_run_stay_what_they_are() -> None:
    def run(model: VAR, label: Tensor) -> NoReturn:
        draw(model, label)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        record(traced(), run, ONES)

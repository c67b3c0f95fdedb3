"""Linear layers of compiled regions on a CPU go to the faster library, and give the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.utils import run_and_get_code
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from fastvar_fx import Schedule
from fastvar_fx.engine.compiled import Compilation
from passes import linears
from passes.linears import FasterLinears, onednn_wins

LARGE, SMALL = (256, 512, 128), (255, 256, 128)
"""Rows, outputs and inputs, on either side of the least size."""


@pytest.fixture(autouse=True)
def _onednn_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "onednn_wins", torch.backends.mkldnn.is_available)


def parts(sizes: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    rows, outputs, inputs = sizes
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, inputs), (outputs, inputs), (outputs,)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def as_inductor_sees(function: Any, *inputs: Tensor) -> GraphModule:
    return make_fx(function, select_decomp_table(), tracing_mode="fake")(*inputs)


def moved(graph_module: GraphModule) -> int:
    op = torch.ops.fastvar_fx.onednn_linear.default
    return len(graph_module.graph.find_nodes(op="call_function", target=op))


@pytest.mark.parametrize("biased", [False, True])
def test_a_large_linear_layer_moves_and_gives_the_same(biased: bool) -> None:
    x, weight, bias = parts(LARGE)
    graph_module = as_inductor_sees(
        lambda x, weight, bias: F.linear(x, weight, bias if biased else None).relu(),
        *(x.unsqueeze(0), weight, bias),
    )
    FasterLinears()(graph_module.graph)
    graph_module.recompile()
    assert moved(graph_module) == 1
    expected = F.linear(x, weight, bias if biased else None).relu()
    torch.testing.assert_close(graph_module(x.unsqueeze(0), weight, bias)[0], expected)


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (F.linear, parts(SMALL)),
        (F.linear, parts(LARGE, torch.float64)),
        (F.linear, parts(LARGE, torch.bfloat16)),
        (lambda x, w, _: x @ w.mT.contiguous(), parts(LARGE)),
        (lambda x, w, b: torch.addmm(b.expand(x.shape[0], -1).contiguous(), x, w.T), parts(LARGE)),
        (lambda x, w, b: torch.addmm(b, x, w.T, beta=2), parts(LARGE)),
        (lambda x, w, b: F.linear(x[:, ::2], w[:, ::2], b), parts((512, 512, 256))),
    ],
    ids=["small", "float64", "bfloat16", "matmul", "bias per row", "scaled", "strided"],
)
def test_what_is_not_a_large_float32_linear_layer_stays(function: Any, inputs: Any) -> None:
    graph_module = as_inductor_sees(function, *inputs)
    FasterLinears()(graph_module.graph)
    assert moved(graph_module) == 0


def test_it_stays_where_blas_is_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "onednn_wins", lambda: False)
    graph_module = as_inductor_sees(F.linear, *parts(LARGE))
    FasterLinears()(graph_module.graph)
    assert moved(graph_module) == 0


def test_measuring_leaves_torchs_generator_alone() -> None:
    before = torch.random.get_rng_state()
    assert onednn_wins.__wrapped__() in (False, True)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"mode": "default"}, {"options": {"cpp.threads": 1}}])
def test_compiled_programs_run_it(options: dict[str, Any]) -> None:
    inputs = parts(LARGE)
    result, code = compiled(options, inputs)
    assert "onednn_linear" in code
    torch.testing.assert_close(result, F.linear(*inputs))


@pytest.mark.slow
def test_a_users_own_pass_stays() -> None:
    met: list[Graph] = []
    _, code = compiled({"options": {"post_grad_custom_pre_pass": met.append}}, parts(LARGE))
    assert len(met) == 1
    assert "onednn_linear" not in code


def compiled(options: dict[str, Any], inputs: list[Tensor]) -> tuple[Tensor, str]:
    torch._dynamo.reset()
    program = as_inductor_sees(F.linear, *inputs)
    compilation = Compilation(Schedule((1, 2), ()), options, fallback=False)
    result, codes = run_and_get_code(compilation.run_program, program, inputs, "block", 4)
    return result, "".join(codes)

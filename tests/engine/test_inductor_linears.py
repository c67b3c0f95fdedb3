"""Linear layers of compiled regions on a CPU run in the faster library, and give the same."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.utils import run_and_get_code
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import fastvar_fx
from fastvar_fx import Schedule
from fastvar_fx.engine.call import BlockCall, BlockSite
from fastvar_fx.engine.compiled import Compilation
from fastvar_fx.engine.inductor_linears import Machine, choice_in, move_linears, with_pass
from fastvar_fx.models import VAR_256, build

LARGE, SMALL = (256, 512, 128), (255, 256, 128)
"""Rows, outputs and inputs, on either side of the least size."""

AMD = Machine("AMD", "AVX512", mkl=True, onednn=True)
INTEL = AMD._replace(vendor="Intel")


@pytest.fixture
def on_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an AMD CPU, whatever this one is; what runs is the same."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(Machine, "here", lambda: AMD)


# -- the rule -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        (AMD._replace(isa="AVX2"), "as fast without AVX-512"),
        (AMD._replace(isa="DEFAULT"), "as fast without AVX-512"),
        (AMD._replace(mkl=False), "BLAS is not MKL"),
        (AMD._replace(onednn=False), "without oneDNN"),
        (AMD._replace(vendor=""), "MKL on another CPU"),
        (INTEL, "MKL on Intel CPU"),
    ],
)
def test_layers_stay(machine: Machine, reason: str) -> None:
    assert reason in machine.reason_to_stay
    assert f"torch's own library ({machine.reason_to_stay})" in machine.choice


def test_layers_move() -> None:
    assert not AMD.reason_to_stay
    assert "oneDNN" in AMD.choice
    assert "MKL, does not use AVX-512" in AMD.choice


@pytest.mark.parametrize(
    ("told", "vendor"),
    [
        ("vendor_id\t: AuthenticAMD\n", "AMD"),
        ("vendor_id\t: GenuineIntel\n", "Intel"),
        ("CPU implementer\t: 0x41\n", ""),
    ],
)
def test_linux_tells_the_vendor(monkeypatch: pytest.MonkeyPatch, told: str, vendor: str) -> None:
    monkeypatch.setattr("pathlib.Path.read_text", lambda _: told)
    assert Machine.here().vendor == vendor


def test_other_systems_tell_the_vendor_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr("pathlib.Path.read_text", missing)
    told = "Intel64 Family 6 Model 143 Stepping 8, GenuineIntel"
    monkeypatch.setattr("platform.processor", lambda: told)
    assert Machine.here().vendor == "Intel"


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="oneDNN has no bfloat16 here"
)
def test_bfloat16_runs_in_onednn_already(capfd: pytest.CaptureFixture[str]) -> None:
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):  # type: ignore[no-untyped-call]
        F.linear(*parts(LARGE, torch.bfloat16))
    assert "matmul" in capfd.readouterr().out


# -- the pass -------------------------------------------------------------------------------------


def parts(sizes: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    rows, outputs, inputs = sizes
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, inputs), (outputs, inputs), (outputs,)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def as_inductor_sees(function: Any, *inputs: Tensor) -> GraphModule:
    return make_fx(function, select_decomp_table(), tracing_mode="fake")(*inputs)


def moved(graph_module: GraphModule) -> int:
    return sum("onednn_linear" in str(node.target) for node in graph_module.graph.nodes)


@pytest.mark.usefixtures("on_amd")
@pytest.mark.parametrize("biased", [False, True])
def test_a_large_linear_layer_moves_and_gives_the_same(biased: bool) -> None:
    x, weight, bias = parts(LARGE)
    graph_module = as_inductor_sees(
        lambda x, weight, bias: F.linear(x, weight, bias if biased else None).relu(),
        *(x.unsqueeze(0), weight, bias),
    )
    move_linears(graph_module.graph, AMD)
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
        (F.linear, parts(LARGE, torch.float16)),
        (lambda x, w, _: x @ w.mT.contiguous(), parts(LARGE)),
        (lambda x, w, b: torch.addmm(b.expand(x.shape[0], -1).contiguous(), x, w.T), parts(LARGE)),
        (lambda x, w, b: torch.addmm(b, x, w.T, beta=2), parts(LARGE)),
        (lambda x, w, b: F.linear(x[:, ::2], w[:, ::2], b), parts((512, 512, 256))),
    ],
    ids=["small", "float64", "bfloat16", "float16", "matmul", "bias per row", "scaled", "strided"],
)
def test_what_is_not_a_large_float32_linear_layer_stays(function: Any, inputs: Any) -> None:
    graph_module = as_inductor_sees(function, *inputs)
    move_linears(graph_module.graph, AMD)
    assert moved(graph_module) == 0


def test_it_stays_where_blas_is_as_fast() -> None:
    graph_module = as_inductor_sees(F.linear, *parts(LARGE))
    move_linears(graph_module.graph, INTEL)
    assert moved(graph_module) == 0


# -- in options of torch.compile ------------------------------------------------------------------


def uuid_on(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(Machine, "here", lambda: machine)
    return with_pass({})["options"]["post_grad_custom_pre_pass"].uuid()


def test_the_choice_is_part_of_inductors_key(monkeypatch: pytest.MonkeyPatch) -> None:
    amd, intel, amd_anew = (uuid_on(m, monkeypatch) for m in (AMD, INTEL, AMD._replace()))
    assert amd == amd_anew != intel


def test_options_are_equal_each_time(on_amd: None) -> None:
    assert with_pass({"mode": "default"}) == with_pass({"mode": "default"})


def test_the_choice_is_told(on_amd: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choice_in(with_pass({})) == (
        "CPU linears of 2**23 and more float32 products: oneDNN "
        "(AMD CPU, on which torch's BLAS, MKL, does not use AVX-512)"
    )
    monkeypatch.setattr(Machine, "here", lambda: INTEL)
    text = "CPU linears: torch's own library (MKL on Intel CPU)"
    assert choice_in(with_pass({"mode": "default"})) == text


def test_explain_tells_it(on_amd: None) -> None:
    fast = fastvar_fx.transform(build("tiny", depth=1), Schedule(VAR_256, (0.5,)))
    told = choice_in(with_pass({}))
    assert told is not None
    assert told not in str(fastvar_fx.explain(fast))
    report = fastvar_fx.explain(fastvar_fx.compile(fast))
    assert told in str(report).splitlines()
    assert json.loads(report.to_json())["compiled"]["linears"] == told
    report = fastvar_fx.explain(fastvar_fx.compile(fast, backend="eager"))
    assert json.loads(report.to_json())["compiled"]["linears"] is None


@pytest.mark.parametrize(
    "options",
    [{"backend": "eager"}, {"options": {"post_grad_custom_pre_pass": Graph.lint}}],
    ids=["another backend", "a pass of the user's"],
)
def test_nothing_is_told_where_the_pass_is_not_used(options: dict[str, Any]) -> None:
    assert choice_in(with_pass(options)) is None
    assert with_pass(options) == options


def test_a_pass_in_the_users_config_stays() -> None:
    with torch._inductor.config.patch(post_grad_custom_pre_pass=Graph.lint):
        options = with_pass({})
        assert options["options"]["post_grad_custom_pre_pass"] is Graph.lint
        assert choice_in(options) is None


@pytest.mark.slow
@pytest.mark.usefixtures("on_amd")
@pytest.mark.parametrize("options", [{}, {"mode": "default"}, {"options": {"cpp.threads": 1}}])
def test_compiled_programs_run_it(options: dict[str, Any]) -> None:
    inputs = parts(LARGE)
    result, code = compiled(options, inputs)
    assert "onednn_linear" in code
    torch.testing.assert_close(result, F.linear(*inputs))


@pytest.mark.slow
@pytest.mark.usefixtures("on_amd")
def test_a_users_own_pass_stays() -> None:
    met: list[Graph] = []
    _, code = compiled({"options": {"post_grad_custom_pre_pass": met.append}}, parts(LARGE))
    assert len(met) == 1
    assert "onednn_linear" not in code


def compiled(options: dict[str, Any], inputs: list[Tensor]) -> tuple[Tensor, str]:
    torch._dynamo.reset()
    program = as_inductor_sees(F.linear, *inputs)
    compilation = Compilation(Schedule((1, 2), ()), options, fallback=False)
    site = BlockSite(0, "block", nn.Identity.forward, {}, prunes=True)
    call = BlockCall(site, nn.Identity(), (torch.zeros(1, 4, 8),), {})
    result, codes = run_and_get_code(compilation.run_program, program, inputs, call)
    return result, "".join(codes)

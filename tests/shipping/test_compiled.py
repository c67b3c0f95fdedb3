"""Real packages: compiled here, and run here or by a process that has no compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import fastvar_fx
from fastvar_fx import Schedule
from fastvar_fx.models.var import VAR, build
from fastvar_fx.shipping.package import Package, compile_package, example_of

ROOT = Path(__file__).parents[2]


def run(command: str, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.shipping.processes", command, str(folder)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_one_process_compiles_and_another_needs_no_compiler(tmp_path: Path) -> None:
    run("export", tmp_path / "toy")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["toy"]
    names = sorted(file.name for file in (tmp_path / "toy").iterdir())
    assert names == ["000.pt2", "001.pt2", "002.pt2", "manifest.json"]
    assert "right" in run("load", tmp_path / "toy", CXX="/bin/false")


def deep() -> VAR:
    """Two pruned steps and two blocks: what a method carries from one to the next counts."""
    model = build("tiny", scales=(1, 2, 3, 4), depth=2, width=32, heads=1)
    for parameter in model.blocks.parameters():
        parameter.data *= 2  # so that each block would select other tokens
    return model


def pruned(method: str) -> VAR:
    return fastvar_fx.transform(deep(), Schedule((1, 2, 3, 4), (0.5, 0.75)), method=method)


def draw(model: VAR) -> Tensor:
    return model.infer_fhat(2, 1, g_seed=0)


@pytest.mark.slow
def test_packages_carry_what_a_method_keeps_between_calls(tmp_path: Path) -> None:
    fastvar_fx.export(pruned("lazyvar"), tmp_path / "lazyvar", draw)
    fast = fastvar_fx.load(deep(), tmp_path / "lazyvar")
    for _ in range(2):
        torch.testing.assert_close(draw(fast), draw(pruned("lazyvar")))
    packages = fastvar_fx.explain(fast).packages
    assert packages is not None
    assert packages.failures == ()
    assert not torch.allclose(draw(fast), draw(pruned("fastvar")))


TABLE = torch.linspace(0, 1, 8)


def layer(x: Tensor, weight: Tensor, cache: Tensor, by: float) -> list[Tensor]:
    out = torch.nn.functional.linear(x, weight) * TABLE
    cache.narrow(1, 2, 1).copy_(out)
    return [torch.nn.functional.linear(cache, weight) * by, cache]


@pytest.mark.slow
def test_compiled_code_keeps_numbers_constants_autocast_and_writes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    cache = torch.randn(2, 8, 5).mT[:, :3]
    inputs = [torch.randn(2, 1, 8), torch.randn(8, 8), cache]
    graph = make_fx(layer, pre_dispatch=True)(*inputs, 3.0)
    assert list(graph.graph.find_nodes(op="get_attr"))
    examples, surrounding = [*map(example_of, inputs), 3.0], (torch.bfloat16, None)
    file = tmp_path / "it.pt2"
    made = Package(file, compile_package(graph, examples, file, surrounding))
    other = [2 * x for x in inputs]
    for strided in (cache, cache.contiguous()):  # the compiled form, and another
        given = [*other[:2], strided.mul_(2)]
        alike = strided.clone()
        with torch.autocast("cpu", torch.bfloat16):
            out, grown = made.forward(*given, 3.0)
            want, _ = layer(other[0], other[1], alike, 3.0)
        assert grown is strided
        assert out.dtype is torch.bfloat16
        torch.testing.assert_close(out, want, rtol=0.05, atol=0.05 * float(want.abs().max()))
        torch.testing.assert_close(strided, alike, rtol=0.05, atol=0.05)

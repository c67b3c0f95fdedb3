"""One package: how inputs reach compiled code, and what counts as another result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fastvar_fx import PackageError, RunError
from fastvar_fx.shipping import export
from fastvar_fx.shipping.package import Package, compile_package, disagreement

pytestmark = pytest.mark.usefixtures("uncompiled")


def appended(x: Tensor, cache: Tensor, by: Any) -> list[Tensor]:
    cache.narrow(1, 2, 1).copy_(x)
    return [x * by, cache, cache.mul_(1), cache.sum(1)]


def example() -> tuple[Tensor, Tensor]:
    return torch.arange(4.0).reshape(2, 1, 2), torch.ones(2, 3, 2)


def package(tmp_path: Path) -> Package:
    graph = make_fx(appended)(*example(), 2)
    for unused in graph.graph.find_nodes(op="placeholder")[2:]:
        graph.graph.erase_node(unused)
    graph.recompile()
    file = tmp_path / "it.pt2"
    return Package(file, vars(export)["compile_package"](graph, example(), file, (None, None)))


def test_inputs_are_written_and_returned(tmp_path: Path) -> None:
    made = package(tmp_path)
    assert made.signature.written == (1,)
    assert made.signature.same == ((1, 1), (2, 1))
    x, cache = example()
    out, grown, again, total = made.forward(x, cache)
    assert grown is again is cache
    assert torch.equal(out, 2 * x)
    assert torch.equal(cache[:, 2:], x)
    assert torch.equal(total, 2 + x[:, 0])


def test_inputs_of_other_strides_are_copied_and_what_is_written_comes_back(tmp_path: Path) -> None:
    made = package(tmp_path)
    x, _ = example()
    cache = torch.ones(2, 2, 5).mT[:, :3]
    assert cache.stride() != (6, 2, 1)
    out, grown, _, total = made.forward(x.mT.contiguous().mT, cache)
    assert grown is cache
    assert torch.equal(cache[:, 2:], x)
    assert torch.equal(total, 2 + x[:, 0])
    assert torch.equal(out, 2 * x)


@pytest.mark.parametrize(
    "wrong", [torch.ones(2, 4, 2), torch.ones(2, 3, 2).double(), torch.ones(3, 2)]
)
def test_other_inputs_are_an_error(tmp_path: Path, wrong: Tensor) -> None:
    with pytest.raises(RunError, match=r"it.pt2 was compiled for \[2, 3, 2\] torch.float32 as inp"):
        package(tmp_path).forward(example()[0], wrong)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("made", "expected", "told"),
    [
        ([1.0, 2.0], [1.0, 2.0001], ""),
        ([1.0, 2.0], [1.0, 2.1], "50 % of output 0"),
        ([NAN, -INF], [NAN, -INF], ""),
        ([NAN, 1.0], [1.0, 1.0], "50 % of output 0"),
        ([INF, 1.0], [-INF, 1.0], "50 % of output 0"),
        ([1, 2], [1, 2], ""),
        ([1, 2], [1, 3], "50 % of output 0"),
        ([1, 2], [1.0, 2.0], "output 0 is [2] torch.int64, not [2] torch.float32"),
        ([1.0], [1.0, 2.0], "output 0 is [1] torch.float32, not [2] torch.float32"),
        ([], [], ""),
    ],
)
def test_what_differs_is_told(made: Any, expected: Any, told: str) -> None:
    assert disagreement([torch.tensor(made)], [torch.tensor(expected)], "float32") == told


def test_what_may_differ_depends_on_what_is_computed_in() -> None:
    one, other = torch.ones(4), torch.full((4,), 1.02)
    assert disagreement([other], [one], "float32") == "100 % of output 0"
    assert disagreement([other], [one], "bfloat16") == ""


def test_a_share_may_differ_and_the_count_may_not() -> None:
    one, other = torch.ones(100), torch.ones(100)
    other[:5] = 2
    assert disagreement([other], [one], "float32", 0.05) == ""
    assert "6 % of output 0" in disagreement(
        [other], [torch.cat([one[:99], -one[:1]])], "float32", 0.05
    )
    assert disagreement([one], [one, one], "float32") == "1 outputs, of which 2 are expected"


def test_what_cannot_be_compiled_is_told(tmp_path: Path) -> None:
    graph = torch.fx.symbolic_trace(lambda x: [x.no_such_method()])
    with pytest.raises(PackageError, match="no_such_method"):
        compile_package(graph, [torch.ones(2)], tmp_path / "it.pt2", (None, None))

"""Kernels that cannot be traced: what the refusal says to write, and what declaring them does."""
# mypy: disable-error-code="no-any-return, no-untyped-call"

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastvar_fx
from passes.refusal import RefusedError
from tests.passes.test_rules import (
    F64,
    HEADS,
    Host,
    N,
    Side,
    assert_prunes,
    captured,
    found_in,
    host_of,
)


def through_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(np.tanh(x.numpy()))


def through_an_array(x: Tensor) -> Tensor:
    return torch.from_numpy(np.tanh(np.asarray(x)))


def through_a_pointer(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    ctypes.memmove(out.data_ptr(), x.data_ptr(), x.numel() * x.element_size())
    return out.tanh_()


kernels = SimpleNamespace()


def wrapper(x: Tensor) -> Tensor:
    return kernels.tanh(x.contiguous())


def looked_up(x: Tensor) -> Tensor:
    return {"tanh": kernels.tanh}["tanh"](x)


@pytest.mark.parametrize("kernel", [through_numpy, through_an_array, through_a_pointer])
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda m, h: kernels.tanh(h), "kernels.tanh"),
        (lambda m, h: wrapper(h), "kernels.tanh"),
        (lambda m, h: looked_up(h), "looked_up"),
        (lambda m, h: through_numpy(m.out(h)), "through_numpy"),
    ],
)
def test_the_refusal_shows_the_line_to_write(
    kernel: Callable[[Tensor], Tensor], call: Callable[..., Tensor], name: str
) -> None:
    kernels.tanh = kernel
    with pytest.raises(RefusedError) as caught:
        captured(host_of(call), torch.randn(N, N, N, dtype=F64), [])
    refusal = caught.value.refusal
    assert refusal.code == "FVX001"
    assert f'{name} = register_opaque({name}, fake=..., axes="tokenwise")' in refusal.hint
    assert "memory of its tensors" in refusal.reason
    assert refusal.where.partition(".py:")[0].endswith("test_opaque")


def test_other_errors_keep_the_plain_hint() -> None:
    with pytest.raises(RefusedError, match="keep control flow free"):
        captured(host_of(lambda m, h: h if h.sum() > 0 else -h), torch.randn(N, N, N), [])


# -- declared -----------------------------------------------------------------------------------


def shaped_like_the_first(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


def opaque(function: Callable[..., Any], schema: str, axes: Any = "tokenwise") -> Any:
    return fastvar_fx.register_opaque(
        function, fake=shaped_like_the_first, axes=axes, schema=schema
    )


class FusedNorm(nn.Module):
    """A module whose forward is a kernel."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(N)), eps

    def forward(self, x: Tensor) -> Tensor:
        values, weight = x.numpy(), self.weight.detach().numpy()
        size = np.sqrt((values**2).mean(-1, keepdims=True) + self.eps)
        return torch.from_numpy(values / size * weight)


def test_a_module_class_is_declared() -> None:
    declared = opaque(FusedNorm, "(Tensor x, Tensor weight, float eps) -> Tensor")
    assert issubclass(declared, FusedNorm)
    norm = declared(1e-3).double()
    x = torch.randn(N, N, N, dtype=F64)
    torch.testing.assert_close(norm(x), FusedNorm.forward(norm, x))
    assert_prunes(lambda m, h: norm(h), (), N, 5)
    norm.eps = 1.0
    torch.testing.assert_close(norm(x), FusedNorm.forward(norm, x))


def test_a_module_class_needs_its_schema() -> None:
    with pytest.raises(ValueError, match="the arguments of forward, then the attributes"):
        fastvar_fx.register_opaque(FusedNorm, fake=torch.empty_like, axes="tokenwise")


@pytest.mark.parametrize("schema", ["(Tensor(a!) out, Tensor x) -> Tensor", "(Tensor x) -> ()"])
def test_a_kernel_that_writes_into_an_argument_is_refused(schema: str) -> None:
    with pytest.raises(ValueError, match="through_numpy writes into an argument"):
        opaque(through_numpy, schema)


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """x (B, L, H, c) by angles (L, 1, c) or, as some kernels take them, (L, c)."""
    turns = angles.numpy() if angles.dim() > 2 else angles.numpy()[:, None]
    return torch.from_numpy(x.numpy() * np.cos(turns))


ROTATED = opaque(rotated, "(Tensor x, Tensor angles) -> Tensor")


def rotate(m: Host, h: Tensor, angles: Tensor) -> Tensor:
    return ROTATED(h.unflatten(-1, (HEADS, -1)), angles).flatten(-2)


def test_a_table_that_broadcasts_is_gathered() -> None:
    assert_prunes(rotate, (Side((N, 1, N // HEADS), tokens=(0,)),), 1, 5)


def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return ((q @ k.mT + mask) / math.sqrt(N)).softmax(-1) @ v


ATTENDED = opaque(attended, "(Tensor q, Tensor k, Tensor v, Tensor mask) -> Tensor", "attention")


def attend(m: Host, h: Tensor, mask: Tensor) -> Tensor:
    return ATTENDED(h, h, h, mask)


@pytest.mark.parametrize(
    ("function", "name", "shape"),
    [(rotate, "angles", (N, N // HEADS)), (attend, "mask", (N, N)), (attend, "mask", (1, 1, N))],
)
def test_a_token_axis_that_cannot_be_told(
    function: Callable[..., Tensor], name: str, shape: tuple[int, ...]
) -> None:
    side = torch.randn(shape, dtype=F64)
    found = found_in(captured(host_of(function), torch.randn(2, N, N, dtype=F64), [side]))
    assert found.refusal is not None
    assert found.refusal.code == "FVX012"
    told = f"`{name}` of shape {list(shape)} may have an entry per token, and its token axis is"
    assert told in found.refusal.reason


def test_a_tensor_with_no_entry_per_token_is_fine() -> None:
    side = torch.randn(1, dtype=F64)
    found = found_in(captured(host_of(attend), torch.randn(2, N, N, dtype=F64), [side]))
    assert found.refusal is None
    assert found.kind == "attention"


class Rotating(nn.Module):
    """x + a kernel that takes its table as (L, 1, c) only, not as one per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(N, N)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        h: Tensor = self.fc(x).unflatten(-1, (HEADS, -1))
        return x + ONE_TABLE(h, angles).flatten(-2)


def one_table(x: Tensor, angles: Tensor) -> Tensor:
    if angles.dim() != 3:
        raise ValueError("the table is (L, 1, c)")
    return rotated(x, angles)


ONE_TABLE = opaque(one_table, "(Tensor x, Tensor angles) -> Tensor")


def test_a_kernel_that_does_not_take_the_gathered_table_is_refused() -> None:
    net = nn.Module()
    net.blocks = nn.ModuleList([Rotating()])
    schedule = fastvar_fx.Schedule(((2, 2), (4, 4)), (0.5,))
    fast = fastvar_fx.transform(net.eval(), schedule, blocks="blocks", strict=False)
    for tokens in (4, 16):
        x, angles = torch.randn(2, tokens, N), torch.randn(tokens, 1, N // HEADS)
        got = fast.get_submodule("blocks.0")(x, angles)
        torch.testing.assert_close(got, net.get_submodule("blocks.0")(x, angles))
    (row,) = fastvar_fx.explain(fast).refusals
    assert row.refusal is not None
    assert row.refusal.code == "FVX017"
    assert "ValueError: the table is (L, 1, c)" in row.refusal.reason
    assert "check what you declared for fastvar_fx_opaque.one_table" in row.refusal.hint

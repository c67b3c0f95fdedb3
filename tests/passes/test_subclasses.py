"""Tensor subclasses that wrap tensors: the wrapped ones are a program's inputs."""

from __future__ import annotations

from typing import Any, Self

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passes.refusal import RefusedError
from passes.trace.calls import Call, reference
from passes.trace.capture import capture
from passes.trace.state import Snapshot


class Halves(torch.Tensor):
    """A weight of which two halves are kept; linear layers add their products."""

    first: Tensor
    second: Tensor

    @staticmethod
    def __new__(cls, first: Tensor, second: Tensor, scale: float) -> Self:
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls, first.shape, dtype=first.dtype, device=first.device
        )
        return made  # type: ignore[no-any-return]

    def __init__(self, first: Tensor, second: Tensor, scale: float) -> None:
        self.first, self.second, self.scale = first, second, scale

    def __tensor_flatten__(self) -> tuple[list[str], float]:
        return ["first", "second"], self.scale

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], scale: float, *_: Any) -> Halves:
        return Halves(inner["first"], inner["second"], scale)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, *_ = args
            return (F.linear(x, weight.first) + F.linear(x, weight.second)) * weight.scale
        return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(func)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4, bias=False)
        self.proj.weight = nn.Parameter(
            Halves(torch.randn(4, 4), torch.randn(4, 4), 2.0), requires_grad=False
        )

    def forward(self, x: Tensor) -> Any:
        return x + self.proj(x)


class Returning(Block):
    def forward(self, x: Tensor) -> Any:
        return self.proj.weight


class Keeping(Block):
    def forward(self, x: Tensor) -> Any:
        self.kept = self.proj.weight
        return x


def called(block: nn.Module) -> Call:
    return Call(block, block, (torch.randn(2, 3, 4),), {})


def test_wrapped_tensors_are_inputs() -> None:
    block = Block()
    call = called(block)
    weight = block.proj.weight
    program = capture(call)
    assert block.proj.weight is weight
    places = [".".join(str(key) for _, key in path) for path in program.inputs]
    assert places == ["module.proj.weight.first", "module.proj.weight.second", "args.0"]
    held: Any = weight
    (made,) = program.graph_module(held.first, held.second, *call.args)
    torch.testing.assert_close(made, block(*call.args))
    (other,) = program.graph_module(held.first + 1, held.second, *call.args)
    assert not torch.allclose(other, made)


def test_one_tensor_in_two_subclasses_is_one_input() -> None:
    held: Any = Block().proj.weight
    block = Block()
    block.proj.weight = nn.Parameter(Halves(held.first, held.first, 1.0), requires_grad=False)
    assert len(capture(called(block)).inputs) == 2


def test_a_real_call_sees_the_subclass() -> None:
    block = Block()
    call = called(block)
    (result,), written = reference(call)
    torch.testing.assert_close(result, block(*call.args))
    assert not written


def test_the_snapshot_holds_the_subclass() -> None:
    block = Block()
    snapshot = Snapshot(called(block).roots())
    assert any(tensor is block.proj.weight for tensor in snapshot.tensors.values())


@pytest.mark.parametrize("kind", [Returning, Keeping])
def test_a_subclass_that_leaves_the_block_is_refused(kind: type[Block]) -> None:
    with pytest.raises(RefusedError, match="it returns or stores a Halves, a tensor subclass"):
        capture(called(kind()))

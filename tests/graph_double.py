"""A double of the CUDA graph, for machines without one: it runs the generation again instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastvar_fx import cuda_graphs as recording
from fastvar_fx.cuda_graphs import Recording, Run


class Waiting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises what torch raises for an op that waits for the GPU, where that is forbidden."""

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        aten = torch.ops.aten
        masks = [t for t in pytree.tree_leaves(args[1:]) if isinstance(t, Tensor)]
        by_mask = op is aten.index.Tensor and any(m.dtype == torch.bool for m in masks)
        reads = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.lift_fresh)
        if by_mask or op.overloadpacket in reads:
            raise RuntimeError("called a synchronizing CUDA operation")
        return op(*args, **(kwargs or {}))


def end_at_op(error: RuntimeError) -> None:
    """Takes the frame of `Waiting` off a traceback: on a GPU, ops raise without one."""
    passed = error.__traceback__
    while passed is not None:
        following = passed.tb_next
        if following is not None and following.tb_frame.f_code.co_name == "__torch_dispatch__":
            passed.tb_next = following = None
        passed = following


class Rerun:
    """Stands in for a CUDA graph: a replay runs the generation again, into the same memory."""

    device = torch.device("cpu")
    default_generator = torch.default_generator

    def warm_up(self, call: Callable[[], Any]) -> None:
        call()

    def rehearse(self, call: Callable[[], Any]) -> None:
        # Loops and operators read values on a CPU that they would not read on a GPU.
        on_gpu = mock.patch.multiple(Tensor, create=True, is_cuda=True, is_cpu=False)
        try:
            with on_gpu, Waiting():  # type: ignore[no-untyped-call]
                call()
        except RuntimeError as error:
            end_at_op(error)
            raise

    def capture(self, call: Callable[[], Any], generators: Sequence[torch.Generator]) -> Any:
        self._call, self._output = call, call()
        return self._output

    def replay(self) -> None:
        for memory, value in zip(
            *map(pytree.tree_leaves, (self._output, self._call())), strict=True
        ):
            if isinstance(memory, Tensor):
                memory.copy_(value)


class OfCompiled(Rerun):
    """For compiled models: Dynamo leaves code alone under a mode such as `Waiting`."""

    rehearse = Rerun.warm_up


def record(fast: nn.Module, run: Run, *inputs: Any, graph: Rerun | None = None) -> Recording:
    return Recording(fast, run, inputs, graph or Rerun())  # type: ignore[arg-type]


@contextmanager
def doubled(double: type[Rerun] = Rerun) -> Iterator[None]:
    """`fastvar_fx.cuda_graph` works on the CPU, by the double."""
    with mock.patch.object(recording, "CudaGraph", side_effect=lambda _: double()):
        yield

"""What runs a graph on its inputs, and a block's own forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch.fx import GraphModule

from fastvar_fx.engine.call import BlockCall
from passes import StepProgram
from passes.refusal import Refusal


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What `fastvar_fx.compile` has compiled so far.

    Attributes:
        graphs: How many graphs, by the token count of the calls: 1 is one for all blocks of a step.
        failures: Which calls run eagerly because they could not be compiled, and why.
        linears: Which library large linear layers on a CPU run in, and why; None if that is left to
            the user's options.
    """

    graphs: dict[int, int]
    failures: tuple[str, ...]
    linears: str | None = None


@dataclass(frozen=True, kw_only=True)
class Packaged:
    """What a model runs that `fastvar_fx.load` returned.

    Attributes:
        folder: Where its packages are.
        packages: How many there are.
        used: How many of them were run so far.
        failures: Which calls run eagerly because there is no package for them, and why.
    """

    folder: str
    packages: int
    used: int
    failures: tuple[str, ...]


Ready = tuple[int, StepProgram | Refusal]
"""A program that need not be made, with its number; or why the block stays dense."""


class Executor:
    """Runs what the blocks run: this one eagerly, subclasses compiled or with a clock."""

    @property
    def compiled(self) -> Compiled | None:
        """What was compiled so far; None if nothing is to be compiled."""
        return None

    @property
    def makes_cuda_graphs(self) -> bool:
        """Whether programs are recorded as CUDA graphs, each by itself."""
        return False

    @property
    def packages(self) -> Packaged | None:
        """The packages that it runs; None if programs are made."""
        return None

    def packaged(self, call: BlockCall, step: int, schedule: int) -> Ready | None:
        """Returns the program that there is for a call already; None to make one.

        Args:
            call: The call.
            step: Its step.
            schedule: The index of the schedule that it belongs to.
        """
        return None

    def run_program(self, graph: GraphModule, inputs: Sequence[Any], call: BlockCall) -> Any:
        """Returns the outputs of a program's graph."""
        return graph.forward(*inputs)

    def run_dense(self, call: BlockCall) -> Any:
        """Returns what a block's own forward returns."""
        return call.site.forward(call.block, *call.args, **call.kwargs)

    def anew(self) -> Executor:
        """Returns one for a copy of the model."""
        return self


EAGER: Final = Executor()

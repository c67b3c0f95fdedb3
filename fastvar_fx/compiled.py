"""Regional compilation: `torch.compile` once per structure and step, not once per layer.

A program is compiled as it is, and the blocks that share it share what comes of it. A step without
a program runs the user's own forward, which is compiled once for each shape of the token map.
"""

from __future__ import annotations

import logging
import types
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
from torch.fx import GraphModule

from fastvar_fx import inductor_linears
from fastvar_fx.errors import CompileError
from fastvar_fx.schedule import Schedule

log = logging.getLogger(__name__)

_MOST_SHARED: Final = 4
"""Graphs of a region after which other blocks get a new one: Dynamo stops at 8 for one code."""


class _Region:
    """What one code object compiles to: a graph, or some if the blocks that share it differ."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        self.call = torch.compile(function, **options)
        self.graphs = 0
        self.fell_back = False


class Compilation:
    """The compiled regions of a transformed model; they are compiled at their first call.

    Attributes:
        graphs: How many graphs were compiled, by the token count of the calls.
        failures: Which calls run eagerly because compiling them failed, and why.
    """

    def __init__(self, schedule: Schedule, options: dict[str, Any], *, fallback: bool) -> None:
        self._schedule = schedule
        self._options = inductor_linears.with_pass(options)
        self._fallback = fallback
        self._programs: dict[GraphModule, _Region] = {}
        self._newest: dict[Any, _Region] = {}
        self._dense: dict[Any, _Region] = {}
        self._plain: dict[str, nn.Module] = {}
        self.graphs: Counter[int] = Counter()
        self.failures: list[str] = []
        _Region(_run_dense, self._options)  # torch checks the options' names

    @property
    def makes_cuda_graphs(self) -> bool:
        """Whether by its options `torch.compile` records CUDA graphs of its own."""
        mode, options = self._options.get("mode"), self._options.get("options") or {}
        chosen = (list_mode_options(mode) if mode else {}) | options
        default = inductor_config.triton.cudagraphs
        return self._options.get("backend") == "cudagraphs" or bool(
            chosen.get("triton.cudagraphs", default)
        )

    @property
    def linears(self) -> inductor_linears.Choice | None:
        """Which library large linear layers on a CPU run in; None if that is left to the user."""
        return inductor_linears.choice_in(self._options)

    def anew(self) -> Compilation:
        """Returns one with the same options and nothing compiled, for a copy of the model."""
        return Compilation(self._schedule, self._options, fallback=self._fallback)

    def run_program(
        self, graph_module: GraphModule, inputs: Sequence[Any], block: str, tokens: int
    ) -> Any:
        """Runs a program on its inputs, compiled.

        Raises:
            CompileError: If it cannot be compiled, and `fallback` was not asked for.
        """
        if graph_module not in self._programs:
            self._programs[graph_module] = _Region(graph_module.forward, self._options)
        return self._run(self._programs[graph_module], graph_module, inputs, block, tokens)

    def run_dense(
        self,
        name: str,
        forward: Callable[..., Any],
        block: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        x: Tensor,
    ) -> Any:
        """Runs a block's own forward, compiled.

        Args:
            name: The block's module path.
            forward: Its class's own forward.
            block: The transformed block.
            args: Arguments of the call.
            kwargs: Keyword arguments of the call.
            x: Which of them is the token map (B, L, C).

        Raises:
            CompileError: If it cannot be compiled, and `fallback` was not asked for.
        """
        if name not in self._plain:
            self._plain[name] = _without_runtime(block)
        inputs = (forward, self._plain[name], args, kwargs)
        kind = (forward, x.shape, x.dtype, x.device)
        region = self._dense.get((name, kind))
        if region is None:
            region = self._dense[name, kind] = self._shared_region(kind)
        return self._run(region, _run_dense, inputs, name, x.shape[1])

    def _shared_region(self, kind: Any) -> _Region:
        """Returns a region for a block that meets calls of a kind for the first time."""
        region = self._newest.get(kind)
        if region is None or region.graphs >= _MOST_SHARED:
            number = sum(len(found) for found in (self._newest, self._dense))
            function = with_own_code(_run_dense, f"dense_{id(self):x}_{number}")
            region = self._newest[kind] = _Region(function, self._options)
        return region

    def _run(
        self,
        region: _Region,
        eager: Callable[..., Any],
        inputs: Sequence[Any],
        block: str,
        tokens: int,
    ) -> Any:
        if region.fell_back:
            return eager(*inputs)
        before = _graphs_so_far()
        try:
            return region.call(*inputs)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            what = f"{block} at {self._place(tokens)}: {_reason(error)}"
            if not self._fallback:
                raise CompileError(
                    f"torch.compile failed on {what}\nNothing was written to the block. Pass "
                    f"fallback=True to run such calls eagerly, other options to compile them "
                    f"(fullgraph=False allows graph breaks), or transform the model anew"
                ) from error
            log.warning("not compiled, so eager from now on: %s", what)
            region.fell_back = True
            self.failures.append(what)
            return eager(*inputs)
        finally:
            made = _graphs_so_far() - before
            region.graphs += made
            if made:
                self.graphs[tokens] += made

    def _place(self, tokens: int) -> str:
        steps = range(self._schedule.steps)
        found = [str(step) for step in steps if self._schedule.tokens(step) == tokens]
        return f"step {' or '.join(found) or '-'} ({tokens} tokens)"


def with_own_code(function: Callable[..., Any], name: str) -> types.FunctionType:
    """Returns a function with a code object of its own.

    Dynamo counts compilations per code object, and takes a size for dynamic that differs between
    calls of codes of one name and place.
    """
    code = function.__code__.replace(co_name=name)
    return types.FunctionType(code, function.__globals__, name)


def _run_dense(
    forward: Callable[..., Any], block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    return forward(block, *args, **kwargs)


def _without_runtime(block: nn.Module) -> nn.Module:
    """Returns the block as an object of the user's own class, with the very same attributes.

    Transformed blocks have a class each, which would keep Dynamo from sharing what it compiles.
    """
    kind: Any = type(block).__base__
    plain: nn.Module = object.__new__(kind)
    object.__setattr__(plain, "__dict__", vars(block))
    return plain


def _graphs_so_far() -> int:
    return counters["stats"]["unique_graphs"]


def _reason(error: Exception) -> str:
    """Returns what torch says, which names the op, without its advice on debugging."""
    text = str(error).partition("\n\nSet TORCH")[0].strip()
    return f"{type(error).__name__}: {text}"

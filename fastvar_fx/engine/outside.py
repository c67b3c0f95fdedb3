"""How much of a generation lies outside the blocks, where pruning has no effect."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final

import torch
from torch._C import DispatchKey
from torch._ops import OpOverload
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode

from fastvar_fx.engine.call import BlockCall
from fastvar_fx.engine.executor import EAGER, Executor
from fastvar_fx.engine.family import Family
from passes.analyse.costs import flop_formulas

_COMPOSITE: Final = DispatchKey.CompositeImplicitAutograd


class Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the FLOPs of matrix products, convolutions and attention in one thread.

    Attributes:
        place: What runs now: "blocks" or "outside"; None for what is not counted.
        at: FLOPs by place; at "saved" those that pruned branches leave out.
        threads: The threads that ran blocks.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.place: str | None = "outside"
        self.at: Counter[str] = Counter()
        self.threads: set[int] = set()
        self._formulas = flop_formulas()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What the user has compiled stays compiled."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an op as it would run without this, and counts it."""
        kwargs = kwargs or {}
        formula = self._formulas.get(getattr(func, "overloadpacket", None))
        if self.place and formula is None and _is_composite(func):
            with self:  # not by its Python decomposition, whose results may differ
                return func._op_dk(_COMPOSITE, *args, **kwargs)
        made = func(*args, **kwargs)
        if self.place and formula is not None:
            self.at[self.place] += formula(*args, **kwargs, out_val=made)
        return made

    def outside_share(self) -> float | None:
        """Returns the share outside the blocks, from 0 to 1; None if it is unknown."""
        known = self.at["blocks"] and self.threads == {threading.get_ident()}
        return self.at["outside"] / self.at.total() if known else None


def _is_composite(func: Any) -> bool:
    """Whether an op on tensors is made of others, but reaches modes whole, as in inference mode.

    Ops that return no tensor, such as a subclass's device and sizes, have no FLOPs.
    """
    if not isinstance(func, OpOverload):
        return False
    name: str = func.name()  # type: ignore[no-untyped-call]
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(name, _COMPOSITE)
    return composite and any(isinstance(r.type, torch.TensorType) for r in func._schema.returns)


class _Counting(Executor):
    """Counts what the blocks run, and what their pruned programs save."""

    def __init__(self, flops: Flops) -> None:
        self._flops = flops

    def run_program(self, graph: GraphModule, inputs: Sequence[Any], call: BlockCall) -> Any:
        programs = (program for made in call.site.programs.values() for program in made)
        self._flops.at["saved"] += next(p.saves for p in programs if p.runs(graph))
        return self._count(super().run_program, graph, inputs, call)

    def run_dense(self, call: BlockCall) -> Any:
        return self._count(super().run_dense, call)

    def anew(self) -> Executor:
        return EAGER

    def _count(self, run: Callable[..., Any], *args: Any) -> Any:
        self._flops.place = "blocks"
        try:
            return run(*args)
        finally:
            self._flops.place = None


class _Uncounted:
    """The lock that a block holds while it runs: in it, only what the executor runs is counted."""

    def __init__(self, lock: AbstractContextManager[Any], flops: Flops) -> None:
        self._lock, self._flops = lock, flops

    def __enter__(self) -> None:
        self._lock.__enter__()
        self._flops.threads.add(threading.get_ident())
        self._flops.place = None

    def __exit__(self, *error: object) -> None:
        self._flops.place = "outside"
        self._lock.__exit__(*error)  # type: ignore[arg-type]


@contextmanager
def counting(family: Family) -> Iterator[Flops | None]:
    """Within it, the FLOPs of a transformed model's run are counted; None if it is compiled."""
    if any(engine.executor is not EAGER for engine in family.engines):
        yield None
        return
    flops = Flops()
    lock, family.lock = family.lock, _Uncounted(family.lock, flops)
    for engine in family.engines:
        engine.executor = _Counting(flops)
    try:
        with flops:
            yield flops
    finally:
        family.lock = lock
        for engine in family.engines:
            engine.executor = engine.executor.anew()

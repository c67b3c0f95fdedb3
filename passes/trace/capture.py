"""Capture: one call of a live module becomes one functional FX graph, a block program.

The graph's inputs are everything the call reads (parameters, buffers, state, tensor arguments),
its outputs the call's result followed by the state it wrote. No tensor is a constant of the graph,
so moving, casting and loading weights after the capture keep working, and blocks that run the same
ops on the same places share one program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule
from torch.fx.traceback import preserve_node_meta

from passes.analyse.rules.site import find_entry
from passes.base import Context, Draft
from passes.graph import drop_unread_inputs, has_effect
from passes.refusal import refuse
from passes.trace.calls import TRACING, Call, Facts, FakeCall
from passes.trace.fingerprint import layout
from passes.trace.state import Path, show
from passes.trace.symbols import at_sizes


@dataclass(frozen=True, kw_only=True)
class BlockProgram(Facts):
    """A captured call.

    Attributes:
        graph_module: Takes the tensors at `inputs`; returns those of the result, then the written.
        inputs: Where each input is read, in the order of the placeholders.
        earlier: The same program at the sizes of an earlier call, if some vary.
    """

    graph_module: GraphModule
    inputs: tuple[Path, ...]
    earlier: BlockProgram | None = field(default=None, repr=False)

    @property
    def result_count(self) -> int:
        """How many outputs of the graph are tensors of the result."""
        return self.result.count


class Capture:
    """Traces the call; the draft starts from its graph."""

    name = "capture"

    def run(self, context: Context, draft: Draft) -> Draft:
        """Returns the draft with the captured graph."""
        captured = capture(context.call)
        graph_module, inputs = captured.graph_module, captured.inputs
        return replace(draft, captured=captured, graph_module=graph_module, inputs=inputs)


def capture(call: Call) -> BlockProgram:
    """Traces a call into a block program; the module and the arguments stay as they are.

    Raises:
        RefusedError: FVX001, if the call cannot be traced, naming the user's line.
    """
    with TRACING:
        fake = FakeCall(call)
        try:
            graph_module = _trace(fake)
        finally:
            fake.clear_memos()
    symbols, facts = fake.symbols, fake.facts()
    paths = [*fake.tensors, *symbols.numbers]
    symbols.read_from_inputs(graph_module, paths)
    for path, node in zip(paths, graph_module.graph.find_nodes(op="placeholder"), strict=True):
        node.meta["fastvar"] = {"input": show(path[1:]), "root": path[0][1]}
    inputs = [paths[place] for place in drop_unread_inputs(graph_module.graph)]
    graph_module.recompile()
    program = BlockProgram(graph_module=graph_module, inputs=tuple(inputs), **vars(facts))
    conditions = facts.conditions
    if not conditions.places:
        return program
    if not conditions.hold(*symbols.earlier().values()):
        refuse("FVX019", f"an earlier call took another way, for it needs {conditions.text}")
    now, earlier = (at_sizes(graph_module, v) for v in (symbols.now(), symbols.earlier()))
    return replace(program, graph_module=now, earlier=replace(program, graph_module=earlier))


def _trace(call: FakeCall) -> GraphModule:
    import torch._dynamo.config  # imported late: loading Dynamo takes seconds
    from torch.fx.experimental.proxy_tensor import make_fx

    # A forward that calls compiled functions is traced through them.
    nested = torch._dynamo.config.patch(error_on_nested_fx_trace=False)
    with call.stand_ins() as fakes, preserve_node_meta(), nested:
        places = {_storage_key(f): i for i, f in enumerate(fakes) if isinstance(f, Tensor)}
        graph_module: GraphModule = make_fx(
            call.run,
            pre_dispatch=True,
            decomposition_table=_composites(),
            tracing_mode="real",  # the inputs are fake already, in a mode that knows the symbols
            _error_on_data_dependent_ops=False,
        )(*fakes)
    # Drops unread values, such as the indices of a max or a mask that allows all.
    graph_module.graph.eliminate_dead_code(is_impure_node=has_effect)
    _resolve_constants(graph_module, places)
    return graph_module


def _composites() -> dict[OpOverload, Callable[..., Any]]:
    """Returns decompositions of the ops of libraries that are made of others and have no axis rule.

    A trace ahead of autograd would keep them whole.
    """
    found = {}
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd"):
        namespace, _, rest = name.partition("::")
        if namespace != "aten":
            packet, _, overload = rest.partition(".")
            op = getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
            if find_entry(op) is None:
                found[op] = op.decompose
    return found


def _resolve_constants(graph_module: GraphModule, places: Mapping[Any, int]) -> None:
    """Maps constants that alias an input (`weight.data`) to it; refuses those made in tracing.

    Args:
        graph_module: The graph.
        places: Positions of the inputs by the memory that they had before the call ran.
    """
    graph = graph_module.graph
    placeholders = graph.find_nodes(op="placeholder")
    for node in graph.find_nodes(op="get_attr"):
        constant = getattr(graph_module, str(node.target))
        if not isinstance(constant, Tensor):
            continue
        in_vmap = torch._C._functorch.is_functorch_wrapped_tensor(constant)
        if not (in_vmap or isinstance(constant, FakeTensor)):
            continue
        place = None if in_vmap else places.get(_storage_key(constant))
        if place is None:
            refuse("FVX001", "it uses a tensor that was made while tracing", node)
        node.replace_all_uses_with(placeholders[place])
        graph.erase_node(node)
        delattr(graph_module, str(node.target))


def _storage_key(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.untyped_storage()._cdata, *layout(tensor))

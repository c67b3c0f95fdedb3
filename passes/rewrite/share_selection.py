"""Hands a selection from block to block. Rewrite only.

The graph of the first block of a step also returns what it selected; the graphs of the others take
that, and select nothing, or select knowing of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from passes.base import Context, Draft
from passes.graph import copy_graph, has_effect, outputs_of
from passes.rewrite.prune import Step


class ShareSelection:
    """Makes a graph return its selection, or take that of another block."""

    name = "share_selection"

    def run(self, context: Context, draft: Draft) -> Draft:
        """Returns the draft, whose graphs end with a selection among their outputs or inputs."""
        step, buffered = context.step, draft.buffered
        if step is None or step.selection == "own":
            return draft
        if buffered is not None:
            shared = share_selection(buffered.graph_module, step)
            buffered = replace(buffered, graph_module=shared)
        return replace(
            draft, graph_module=share_selection(draft.graph_module, step), buffered=buffered
        )


def share_selection(graph_module: GraphModule, step: Step) -> GraphModule:
    """Returns a copy of a pruned graph that returns its selection, or takes another one.

    Args:
        graph_module: The graph; it stays as it is. Its branches share one selection, or keep none.
        step: Its operators, and whether the selection is "given" or "taken": the tensors of the
            selection come last among the outputs or the inputs.
    """
    graph, _ = copy_graph(graph_module.graph)
    for selection in graph.find_nodes(op="call_function", target=step.operators.select):
        if step.selection == "given":
            with graph.inserting_before(graph.output_node()):
                parts = [*_parts(selection)]
            graph.output_node().args = ([*outputs_of(graph), *parts],)
        else:
            _take(selection)
    graph.eliminate_dead_code(is_impure_node=partial(has_effect, random=False))
    return GraphModule(graph_module, graph)


def _parts(selection: Node) -> Iterator[Node]:
    """Emits the tensors of a selection."""
    made: Any = selection.meta["val"]
    for number, value in enumerate(pytree.tree_leaves(made)):
        part = selection
        if not isinstance(made, Tensor):
            part = selection.graph.call_function(_part, (selection, number))
            part.meta = {**selection.meta, "val": value}
        yield part


def _take(selection: Node) -> None:
    """Replaces a selection by inputs, or hands them to it if it asks for "selected"."""
    graph, made = selection.graph, selection.meta["val"]
    *_, last = graph.find_nodes(op="placeholder")
    inputs: list[Node] = []
    for number, value in enumerate(pytree.tree_leaves(made)):
        with graph.inserting_after(inputs[-1] if inputs else last):
            taken = graph.placeholder(f"selected_{number}")
        taken.meta = {"val": value, "fastvar": {"input": "selection"}}
        inputs.append(taken)
    whole = inputs[0]
    if not isinstance(made, Tensor):
        nested = pytree.tree_unflatten(inputs, pytree.tree_structure(made))
        with graph.inserting_after(inputs[-1]):
            whole = graph.call_function(_whole, (nested,))
        whole.meta = dict(selection.meta)
    if "selected" in selection.kwargs:
        selection.update_kwarg("selected", whole)
        return
    selection.replace_all_uses_with(whole)
    graph.erase_node(selection)


def _part(selection: Any, number: int) -> Tensor:
    part: Tensor = pytree.tree_leaves(selection)[number]
    return part


def _whole(selection: Any) -> Any:
    return selection

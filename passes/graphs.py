"""Small questions about FX nodes that several passes ask."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from passes.rules import bind


def outputs_of(graph: Graph) -> list[Node]:
    """Returns the nodes that a captured graph returns; it returns nothing else."""
    (values,) = graph.output_node().args
    return [value for value in values if isinstance(value, Node)]  # type: ignore[union-attr]


def op_name(node: Node) -> str:
    """Returns `namespace::name` of a call, without overload and in-place mark; empty if no op."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return ""
    return target._schema.name.removesuffix("_")


def written(node: Node) -> list[Node]:
    """Returns the operands that an in-place op writes into."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return []
    names = {a.name for a in target._schema.arguments if a.alias_info and a.alias_info.is_write}
    return [v for name, v in bind(node).items() if name in names and isinstance(v, Node)]


def mutated(node: Node) -> Node | None:
    """Returns the operand that an in-place op writes into, the first if there are more, or None."""
    return next(iter(written(node)), None)


def memory_owner(node: Node) -> Node:
    """Follows views and in-place ops back to the value that owns the memory."""
    while node.op == "call_function":
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            if not any(r.alias_info is not None for r in target._schema.returns):
                return node
            source = mutated(node) or node.args[0]
        else:
            source = node.args[0] if node.args else None
        if not isinstance(source, Node):
            return node
        node = source
    return node


def example_values(args: Any) -> Any:
    """Replaces the nodes in call arguments by their example (fake) values."""
    return torch.fx.node.map_arg(args, lambda node: node.meta["val"])

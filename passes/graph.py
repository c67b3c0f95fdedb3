"""Small questions about FX graphs that several passes ask, and how to copy one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import Graph, Node

CATS: Final = {"aten::cat", "aten::concat", "aten::concatenate"}
_NUMBERS: Final = (int, float, complex)
_SMALL: Final = 64


def copy_graph(source: Graph) -> tuple[Graph, dict[Node, Node]]:
    """Returns a copy of a graph, to be edited, and the copy of each of its nodes."""
    graph, copies = Graph(), dict[Node, Node]()
    for node in source.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    return graph, copies


def outputs_of(graph: Graph) -> list[Node]:
    """Returns the nodes that a captured graph returns; it returns nothing else."""
    values: Any = graph.output_node().args[0]
    return list(values)


def computing(graph: Graph) -> list[Node]:
    """Returns the calls that compute tensors, and the constants; no sizes and other numbers."""
    nodes = (node for node in graph.nodes if node.op in ("call_function", "get_attr"))
    return [node for node in nodes if not is_number(node)]


def is_number(node: Node) -> bool:
    """Whether a node is a size or another number, and no tensor."""
    return isinstance(node.meta.get("val"), _NUMBERS)


def placeholder_of(program: Any, path: Any) -> Node | None:
    """Returns the placeholder of the input at `path`, or None if the graph does not read it.

    Args:
        program: Has a `graph_module` and, in the order of its placeholders, `inputs`.
        path: Where the input is read.
    """
    return placeholders_by_path(program).get(path)


def placeholders_by_path(program: Any) -> dict[Any, Node]:
    """Returns the placeholders of a program, see `placeholder_of`, by where they are read."""
    placeholders = program.graph_module.graph.find_nodes(op="placeholder")
    return dict(zip(program.inputs, placeholders, strict=True))


def drop_unread_inputs(graph: Graph) -> list[int]:
    """Erases the placeholders that nothing reads; returns the positions of the others."""
    placeholders = list(enumerate(graph.find_nodes(op="placeholder")))
    for _, node in placeholders:
        if not node.users:
            graph.erase_node(node)
    return [place for place, node in placeholders if node.users]


def op_name(node: Node) -> str:
    """Returns `namespace::name` of a call, without overload and in-place mark; empty if no op."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return ""
    return target._schema.name.removesuffix("_")


def bind(node: Node) -> dict[str, Any]:
    """Returns a call's arguments by the names of its schema, defaults filled in."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {str(i): value for i, value in enumerate(node.args)} | dict(node.kwargs)
    args: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):
        if position < len(node.args):
            args[argument.name] = node.args[position]
        else:
            args[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return args


def example_values(args: Any) -> Any:
    """Replaces the nodes in call arguments by their example (fake) values."""
    return torch.fx.node.map_arg(args, lambda node: node.meta["val"])


def plain(value: Any) -> Any:
    """Replaces sizes that are computed in the graph by their values."""
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Node) and isinstance(value.meta.get("val"), (int, float)):
        return value.meta["val"]
    return value


def numbers_of(node: Node, edited: Collection[str] = ()) -> list[Any]:
    """Returns the numbers of a call that are no sizes or places; or a small constant.

    Args:
        node: A call, or a constant.
        edited: Arguments that are left out.
    """
    if node.op == "get_attr":
        constant = getattr(node.graph.owning_module, str(node.target))
        small = isinstance(constant, Tensor) and constant.numel() <= _SMALL
        return [constant.tolist()] if small else []
    schema = getattr(node.target, "_schema", None)
    kinds = {each.name: str(each.type) for each in schema.arguments} if schema else {}
    bound = {name: plain(value) for name, value in bind(node).items() if name not in edited}
    numbers = {name: value for name, value in bound.items() if isinstance(value, _NUMBERS)}
    return [value for name, value in numbers.items() if "int" not in kinds.get(name, "")]


def draws_numbers(node: Node) -> bool:
    """Whether a call draws random numbers, as dropout does unless it is off or its rate is 0."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    args = bind(node)
    on = args.get("train") is not False and args.get("p", args.get("dropout_p", 1)) != 0
    return on and torch.Tag.nondeterministic_seeded in target.tags


def reach(start: Iterable[Node], following: Callable[[Node], Iterable[Node]]) -> Iterator[Node]:
    """Yields nodes and all that follow from them, depth first and each once."""
    stack, seen = list(start), set[Node]()
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            yield node
            stack += following(node)


def joined(cat: Node) -> list[Node]:
    """Returns what a `cat` joins."""
    return list(bind(cat)["tensors"])


def inputs_within(roots: Iterable[Node], within: set[Node]) -> set[Node]:
    """Returns the nodes of a set that `roots` are computed from, roots of the set included.

    In-place ops of the set that write into the memory of such a node are among them.
    """
    writers = [node for node in within if written(node)]
    found: set[Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node in within and node not in found:
            found.add(node)
            stack += node.all_input_nodes
        if not stack:
            late = (w for w in writers if w not in found)
            stack = [w for w in late if any(memory_owner(t) in found for t in written(w))]
    return found


def written(node: Node) -> list[Node]:
    """Returns the operands that an in-place op writes into."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return []
    names = {a.name for a in target._schema.arguments if a.alias_info and a.alias_info.is_write}
    return [v for name, v in bind(node).items() if name in names and isinstance(v, Node)]


def memory_owner(node: Node) -> Node:
    """Follows views and in-place ops back to the value that owns the memory."""
    while node.op == "call_function":
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            if not any(r.alias_info is not None for r in target._schema.returns):
                return node
        source = next(iter([*written(node), *node.args]), None)
        if not isinstance(source, Node):
            return node
        node = source
    return node


def has_effect(node: Node, *, random: bool = True) -> bool:
    """Whether a node matters even if nothing reads its value; for `eliminate_dead_code`.

    An in-place op does if its memory is read later or belongs to an input.

    Args:
        node: Any node.
        random: Whether advancing a random number generator is an effect.
    """
    targets = written(node)
    if not targets:
        return node.is_impure(impure_random=random)
    owners = {memory_owner(target) for target in targets}
    if any(owner.op != "call_function" for owner in owners):
        return True
    aliases = [other for other in node.graph.nodes if memory_owner(other) in owners]
    return any(node < user for alias in aliases for user in alias.users)

"""Gives Inductor the faster of a CPU's two libraries for linear layers in float32.

Inductor takes BLAS, and oneDNN only for weights that are constants of the graph; ours are inputs.
On some CPUs oneDNN is more than twice as fast, above all with few rows, such as kept tokens.
"""

from __future__ import annotations

from functools import cache
from time import perf_counter
from typing import Any, Final

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node
from torch.utils._python_dispatch import _disable_current_modes

_LEAST_PRODUCTS: Final = 2**23
"""Multiplications of a layer below which the call of oneDNN costs more than it saves."""

_OP: Final = "fastvar_fx::onednn_linear"


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def _fake_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


torch.library.define(_OP, "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
torch.library.impl(_OP, "cpu", _onednn_linear)
torch.library.register_fake(_OP, _fake_linear)


class FasterLinears(CustomGraphPass):
    """A pass for Inductor's `post_grad_custom_pre_pass`: linear layers go to oneDNN where it wins.

    Those of other dtypes and devices, and small ones, stay as they are.
    """

    def __call__(self, graph: Graph) -> None:
        """Rewrites a graph in place."""
        layers = {node: parts for node in graph.nodes if (parts := _linear_parts(node)) is not None}
        if not layers or not onednn_wins():
            return
        for node, parts in layers.items():
            with graph.inserting_before(node):
                linear = graph.call_function(torch.ops.fastvar_fx.onednn_linear.default, parts)
            linear.meta = dict(node.meta)
            node.replace_all_uses_with(linear)
            graph.erase_node(node)
        graph.eliminate_dead_code()

    def uuid(self) -> Any:
        """Returns what tells it apart in Inductor's cache of graphs."""
        return get_hash_for_files((__file__,))


def _linear_parts(node: Node) -> tuple[Any, Node, Any] | None:
    """Returns x (M, K), weight (N, K) and bias (N) of a large float32 linear layer on a CPU."""
    if node.target not in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default) or node.kwargs:
        return None
    operands: Any = node.args
    *biases, x, transposed = operands
    bias = biases[0] if biases else None
    if not _is_transposed(transposed) or (bias is not None and bias.meta["val"].dim() != 1):
        return None
    weight, made = transposed.args[0], node.meta["val"]
    if made.dtype is not torch.float32 or made.device.type != "cpu":
        return None
    products = made.numel() * weight.meta["val"].shape[1]
    if type(products) is not int or products < _LEAST_PRODUCTS:  # neither if it is symbolic
        return None
    return x, weight, bias


def _is_transposed(node: Any) -> bool:
    if not isinstance(node, Node) or node.target is not torch.ops.aten.permute.default:
        return False
    operands: Any = node.args
    weight, order = operands
    return list(order) == [1, 0] and weight.meta["val"].is_contiguous()


@cache
def onednn_wins() -> bool:
    """Returns whether oneDNN is clearly the faster one here, measured once on a small layer."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    with _disable_current_modes(), torch.no_grad():
        x, weight, bias = torch.ones(256, 512), torch.ones(512, 512), torch.ones(512)
        seconds = {
            linear: min(_seconds(linear, x, weight, bias) for _ in range(8))
            for linear in (_onednn_linear, torch.nn.functional.linear)
        }
    return seconds[_onednn_linear] < 0.9 * seconds[torch.nn.functional.linear]


def _seconds(linear: Any, *parts: Tensor) -> float:
    started = perf_counter()
    linear(*parts)
    return perf_counter() - started

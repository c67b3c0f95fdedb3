"""A pass for Inductor: large float32 linear layers on a CPU run in the faster of two libraries.

Inductor runs linear layers in torch's BLAS, and in oneDNN only where the weight is a constant of
the graph; here weights are inputs. Which library is faster follows from the machine, by a rule: a
measurement would depend on what else the machine is doing, and could not be repeated.

The rule, by GFLOPS on one core of an AMD EPYC (Zen 5), 512 rows, 256 inputs and 1024 outputs:

| instructions | MKL on an AMD CPU | MKL as on an Intel CPU | oneDNN |
|---|---|---|---|
| AVX-512 | 109 | 225 | 231 |
| AVX2 | 109 | 119 | 115 |

MKL runs AVX-512 code on Intel CPUs only. Other dtypes stay: torch's own linear layers run bfloat16
in oneDNN already, with AMX where the CPU has it, eagerly and compiled; oneDNN has no float64.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch.fx import Graph, Node

if TYPE_CHECKING:
    from torch._inductor.custom_graph_pass import CustomGraphPass

_LEAST_PRODUCTS: Final = 2**23
"""Multiplications of a layer below which the call of oneDNN costs more than it saves."""

_OPTION: Final = "post_grad_custom_pre_pass"
"""The option of Inductor that the pass is given as."""

_OP: Final = "fastvar_fx::onednn_linear"


class Machine(NamedTuple):
    """What the choice between the libraries depends on.

    Attributes:
        vendor: The CPU's: "AMD" or "Intel"; "" for any other, and if it is not known.
        isa: The widest vector instructions, as `torch.backends.cpu.get_cpu_capability` names them.
        mkl: Whether torch's BLAS is MKL.
        onednn: Whether torch was built with oneDNN.
    """

    vendor: str
    isa: str
    mkl: bool
    onednn: bool

    @classmethod
    def here(cls) -> Machine:
        """Returns what this process runs on."""
        return cls(
            _vendor(),
            torch.backends.cpu.get_cpu_capability(),
            torch.backends.mkl.is_available(),  # type: ignore[no-untyped-call]
            torch.backends.mkldnn.is_available(),  # type: ignore[no-untyped-call]
        )

    @property
    def reason_to_stay(self) -> str:
        """Why float32 layers run in the library that torch takes; empty if oneDNN is faster."""
        if not self.onednn:
            return "torch was built without oneDNN"
        if not self.mkl:
            return "torch's BLAS is not MKL"
        if self.vendor != "AMD":
            return f"MKL on {self.vendor or 'another'} CPU"
        return "" if self.isa == "AVX512" else "MKL is as fast without AVX-512"

    @property
    def choice(self) -> str:
        """The layers, the library and the reason, as a line for the user."""
        if self.reason_to_stay:
            return f"CPU linears: torch's own library ({self.reason_to_stay})"
        size = f"2**{_LEAST_PRODUCTS.bit_length() - 1}"
        return (
            f"CPU linears of {size} and more float32 products: oneDNN (AMD CPU, on which torch's "
            f"BLAS, MKL, does not use AVX-512)"
        )


def _vendor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        text = platform.processor()
    vendors = {"AuthenticAMD": "AMD", "GenuineIntel": "Intel"}
    return next((name for mark, name in vendors.items() if mark in text), "")


def with_pass(options: dict[str, Any]) -> dict[str, Any]:
    """Adds the pass to options of `torch.compile` for Inductor, unless the user gave another."""
    settings, mode = options.get("options"), options.get("mode")
    if options.get("backend", "inductor") != "inductor" or (settings and mode):
        return options
    from torch._inductor import config, list_mode_options

    linears = config.post_grad_custom_pre_pass or _inductor_pass(Machine.here())
    settings = settings or list_mode_options(mode or "default")
    others = {name: value for name, value in options.items() if name != "mode"}
    return {**others, "options": {_OPTION: linears, **settings}}


def choice_in(options: dict[str, Any]) -> str | None:
    """Returns what the pass in options of `torch.compile` chose; None if it is not among them."""
    machine = Machine.here()
    linears = (options.get("options") or {}).get(_OPTION)
    return machine.choice if linears is _inductor_pass(machine) else None


@cache
def _inductor_pass(machine: Machine) -> CustomGraphPass:
    """Returns the pass: one object, because Dynamo recompiles where options are not equal."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class FasterLinears(CustomGraphPass):
        def __call__(self, graph: Graph) -> None:
            move_linears(graph, machine)

        def uuid(self) -> bytes:
            """Returns a part of the key in Inductor's cache of graphs."""
            return get_hash_for_files((__file__,), repr((machine, machine.choice)))

    registered_op()  # a graph from Inductor's cache calls it too
    return FasterLinears()


def move_linears(graph: Graph, machine: Machine) -> None:
    """Rewrites a graph of ATen ops in place: its layers run in the library that is faster."""
    if machine.reason_to_stay:
        return
    layers = {node: parts for node in graph.nodes if (parts := _linear_parts(node)) is not None}
    for node, parts in layers.items():
        with graph.inserting_before(node):
            linear = graph.call_function(registered_op(), parts)
        linear.meta = dict(node.meta)
        node.replace_all_uses_with(linear)
        graph.erase_node(node)
    graph.eliminate_dead_code()


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
    if made.device.type != "cpu" or made.dtype is not torch.float32:
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
def registered_op() -> torch._ops.OpOverload:
    """Returns an op that Inductor calls as it is, registered at the first use.

    Inductor lowers torch's own op for oneDNN only if the weight is a constant.
    """
    torch.library.define(_OP, "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
    onednn = torch.ops.mkldnn._linear_pointwise
    torch.library.impl(_OP, "cpu", lambda x, w, bias: onednn(x, w, bias, "none", [], ""))
    torch.library.register_fake(_OP, lambda x, w, _: x.new_empty(x.shape[0], w.shape[0]))
    op: torch._ops.OpOverload = torch.ops.fastvar_fx.onednn_linear.default
    return op

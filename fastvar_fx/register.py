"""What users declare: axis rules of their ops, and kernels that cannot be traced."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import count
from typing import Any, Final, Literal

import torch
from torch import nn

from passes.analyse.rules import opaque
from passes.analyse.rules.site import Rule, rule

_NAMESPACE: Final = "fastvar_fx_opaque"


def axis_rule(*ops: str, attention: bool = False) -> Callable[[Rule], Rule]:
    """Registers an axis rule: what an op does to axes, and that tokens may be dropped through it.

    A rule gets the call as a `Site` and returns the axes of its result (a list for several
    results). With `Site.meet` and `Site.resize` it records what changes when tokens are dropped,
    with `Site.refuse` it refuses the call. Every program is checked with permuted tokens, which
    finds rules that allow too much.

    Args:
        ops: Names as "namespace::op"; a name covers all overloads and the in-place form.
        attention: Whether the op is an attention, whose keys are its second tensor: then the
            branch counts as attention or cross-attention.

    Raises:
        ValueError: If a name is not of this form.

    Example:
        >>> @axis_rule("mylib::scaled_gelu")
        ... def tokenwise(site):
        ...     return site.stream("x")
    """
    for name in ops:
        if name.count("::") != 1:
            raise ValueError(f'axis_rule takes op names as "namespace::op"; found {name!r}')
    return rule(*ops, attends=attention, declared=True)


def register_opaque(
    function: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    axes: Literal["tokenwise", "attention"] | Rule,
    schema: str | None = None,
) -> Callable[..., Any]:
    """Wraps a kernel that cannot be traced as an op that can; put the result in its place.

    Args:
        function: The kernel: takes and returns tensors and plain values, overwrites none of them.
            Or a module class with such a forward.
        fake: The same signature; returns empty tensors of the shape and dtype of the result.
        axes: "tokenwise": works on every token alone, on a first tensor that has the tokens;
            "attention": softmax attention of the first tensor (queries) over the second and third
            (keys, values), with tokens on the same dim of each; or an axis rule.
        schema: Its schema, such as "(Tensor x, Tensor weight, float eps) -> Tensor". None means
            that it is read from the annotations of `function`. For a module class, the arguments
            of forward, then the attributes that it reads, under their names.

    Returns:
        A function of the same signature, or a subclass: build the model with it.

    Raises:
        ValueError: If `axes` is unknown, the schema is unknown, or it says that the kernel
            writes into its arguments.

    Example:
        >>> kernels.rms_norm = register_opaque(  # doctest: +SKIP
        ...     kernels.rms_norm,
        ...     fake=lambda x, weight, eps: torch.empty_like(x),
        ...     axes="tokenwise",
        ...     schema="(Tensor x, Tensor weight, float eps) -> Tensor",
        ... )
    """
    if isinstance(function, type) and issubclass(function, nn.Module):
        return _opaque_class(function, fake=fake, axes=axes, schema=schema)
    rules: dict[str, Rule] = {"tokenwise": opaque.tokenwise, "attention": opaque.attention}
    chosen = axes if callable(axes) else rules.get(axes)
    if chosen is None:
        raise ValueError(f'axes is "tokenwise", "attention" or an axis rule; found {axes!r}')
    kernel = getattr(function, "__name__", "kernel")
    try:
        found = schema or torch.library.infer_schema(function, mutates_args=())
    except ValueError as error:
        raise ValueError(
            f"the schema of {function!r} is unknown ({error}); give it as "
            f'schema="(Tensor x, float eps) -> Tensor"'
        ) from error
    if "!" in found or found.rstrip().endswith("()"):
        raise ValueError(
            f"{kernel} writes into an argument: {found}; declare a function that makes the "
            f"result, lets {kernel} write into it and returns it"
        )
    name = f"{_NAMESPACE}::{_free_name(kernel)}"
    op = torch.library.custom_op(name, function, mutates_args=(), schema=found)
    op.register_fake(fake)
    rule(name, attends=chosen is opaque.attention, declared=True)(chosen)
    return op


def _opaque_class(kind: type[nn.Module], *, schema: str | None, **how: Any) -> type[nn.Module]:
    """Returns a subclass whose forward is one op of its arguments and own attributes."""
    if schema is None:
        raise ValueError(
            f"give the schema of {kind.__name__}: the arguments of forward, then the attributes "
            f'that it reads, such as schema="(Tensor x, Tensor weight, float eps) -> Tensor"'
        )
    taken = len(inspect.signature(kind.forward).parameters) - 1
    read = [a.name for a in torch._C.parse_schema(f"forward{schema}").arguments[taken:]]

    def run(*args: Any) -> Any:
        module = kind.__new__(kind)  # the op gets tensors only; its forward reads attributes
        nn.Module.__init__(module)
        for name, value in zip(read, args[taken:], strict=True):
            setattr(module, name, value)
        return kind.forward(module, *args[:taken])

    run.__name__ = kind.__name__
    op = register_opaque(run, schema=schema, **how)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return op(*args, **kwargs, **{name: getattr(self, name) for name in read})

    members = {"forward": forward, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), members)


def _free_name(wanted: str) -> str:
    taken = dir(getattr(torch.ops, _NAMESPACE))
    names = (f"{wanted}_{n}" if n > 1 else wanted for n in count(1))
    return next(name for name in names if name not in taken)

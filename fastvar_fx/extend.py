"""What users teach the compiler: axis rules for their ops, and kernels it cannot see into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal

import torch
from torch.fx import Node

from passes.attention import register_attention
from passes.axes import Axes, broadcast, has_tokens
from passes.rules import Rule, Site, attending, rule

_NAMESPACE: Final = "fastvar_fx_opaque"


def axis_rule(*ops: str, attention: bool = False) -> Callable[[Rule], Rule]:
    """Registers an axis rule: what an op does to axes, and that tokens may be dropped through it.

    A rule gets the call as a `passes.rules.Site` and returns the axes of its result (a list for
    several results); `Site.meet`, `Site.resize` and `Site.refuse` say the rest. Every program is
    checked with permuted tokens, so a rule that promises too much is found out.

    Args:
        ops: Names as "namespace::op"; a name covers all overloads and the in-place form.
        attention: Whether the op attends, its keys being its second tensor: then the branch
            counts as attention or cross-attention.

    Example:
        >>> @axis_rule("mylib::scaled_gelu")
        ... def tokenwise(site):
        ...     return site.stream("x")
    """
    for name in ops:
        if name.count("::") != 1:
            raise ValueError(f'axis_rule takes op names as "namespace::op"; found {name!r}')
        if attention:
            register_attention(name)
    return rule(*ops)


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
        fake: The same signature; returns empty tensors of the shape and dtype of the result.
        axes: "tokenwise": works on every token alone, on a first tensor that has the tokens;
            "attention": softmax attention of the first tensor (queries) over the second and third
            (keys, values), with tokens on the same dim of each; or an axis rule.
        schema: Its schema, such as "(Tensor x, Tensor weight, float eps) -> Tensor". None means
            that it is read from the annotations of `function`.

    Returns:
        A function of the same signature.

    Raises:
        ValueError: If `axes` is unknown or the schema cannot be told.

    Example:
        >>> kernels.rms_norm = register_opaque(  # doctest: +SKIP
        ...     kernels.rms_norm,
        ...     fake=lambda x, weight, eps: torch.empty_like(x),
        ...     axes="tokenwise",
        ...     schema="(Tensor x, Tensor weight, float eps) -> Tensor",
        ... )
    """
    rules: dict[str, Rule] = {"tokenwise": _tokenwise, "attention": _attention}
    chosen = axes if callable(axes) else rules.get(axes)
    if chosen is None:
        raise ValueError(f'axes is "tokenwise", "attention" or an axis rule; found {axes!r}')
    name = f"{_NAMESPACE}::{_free_name(getattr(function, '__name__', 'kernel'))}"
    try:
        op = torch.library.custom_op(name, function, mutates_args=(), schema=schema)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"the schema of {function!r} cannot be told ({error}); give it as "
            f'schema="(Tensor x, float eps) -> Tensor"'
        ) from error
    op.register_fake(fake)
    rule(name)(chosen)
    if chosen is _attention:
        register_attention(name)
    return op


def _free_name(wanted: str) -> str:
    taken = dir(getattr(torch.ops, _NAMESPACE))
    name, count = wanted, 1
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    return name


def _tensors(site: Site) -> list[str]:
    return [name for name, value in site.args.items() if isinstance(value, Node)]


def _tokenwise(site: Site) -> Axes:
    names = _tensors(site)
    axes = site.stream(names[0])
    for name in names[1:]:
        inside = site.axes(site.args[name])
        if inside is not None:
            broadcast([axes, inside])
        site.meet(name, axes)
    return axes


def _attention(site: Site) -> Axes:
    query, key, value = _tensors(site)[:3]
    q = site.axes(site.args[query])
    k, v = (site.axes(site.args[name]) for name in (key, value))
    inside = [axes for axes in (k, v) if axes is not None]
    keys = [tuple(f for dim in axes if has_tokens(dim) for f in dim) for axes in inside]
    return attending(site, q, keys)

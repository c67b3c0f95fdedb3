"""Axis rules of ops that work on every element alone, and of random ones, which are refused."""

from __future__ import annotations

from passes.analyse.axes import Axes
from passes.analyse.rules.site import Site, pointwise, rule
from passes.graph import draws_numbers


@rule(
    "aten::gelu", "aten::relu6", "aten::hardswish", "aten::contiguous", "aten::detach",
    "aten::alias", "aten::lift_fresh", "aten::to", "aten::_to_copy", "aten::type_as",
    "aten::zeros_like", "aten::ones_like", "aten::empty_like", "aten::full_like", "aten::conj",
    "aten::_conj", "aten::resolve_conj", "aten::resolve_neg", "aten::real", "aten::imag",
    "aten::zero", "aten::fill", "aten::positive",
)  # fmt: skip
def _unary(site: Site) -> Axes:
    """An op of its first operand; those that torch marks as pointwise need no rule."""
    return site.stream("self")


@rule("aten::dropout", "aten::feature_dropout", "aten::alpha_dropout",
      "aten::feature_alpha_dropout", "aten::native_dropout")  # fmt: skip
def _dropout(site: Site) -> Axes | list[Axes]:
    if draws_numbers(site.node):
        site.refuse(
            "FVX013",
            "dropout is active: random masks differ per token",
            advice="switch it off for inference, as model.eval() does for nn.Dropout",
        )
    return pointwise(site)


rule("aten::masked_fill", "aten::copy", "aten::expand_as")(pointwise)


@rule("aten::where")
def _where(site: Site) -> Axes | list[Axes]:
    if "self" not in site.args:
        site.refuse("FVX010", "it lists where a value is true: the list has no token axis")
    return pointwise(site)


@rule("aten::bernoulli", "aten::rand_like", "aten::randn_like", "aten::normal", "aten::uniform")
def _random(site: Site) -> Axes:
    site.refuse("FVX013", "it draws random numbers, which would differ on the kept tokens")

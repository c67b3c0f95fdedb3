"""Axis rules of ops that work on every element alone, and of random ones, which are refused."""

from __future__ import annotations

from passes.analyse.axes import Axes
from passes.analyse.rules.site import Site, pointwise, rule


@rule(
    "aten::silu", "aten::gelu", "aten::relu6", "aten::selu", "aten::hardswish", "aten::hardsigmoid",
    "aten::clone", "aten::contiguous", "aten::detach", "aten::alias", "aten::lift_fresh",
    "aten::to", "aten::_to_copy", "aten::type_as", "aten::float", "aten::zeros_like",
    "aten::ones_like", "aten::empty_like", "aten::full_like", "aten::softplus", "aten::square",
    "aten::conj", "aten::_conj", "aten::resolve_conj", "aten::resolve_neg", "aten::real",
    "aten::imag", "aten::zero", "aten::fill", "aten::nan_to_num", "aten::positive",
)  # fmt: skip
def _unary(site: Site) -> Axes:
    return site.stream("input" if "input" in site.args else "self")


@rule("aten::dropout", "aten::feature_dropout", "aten::alpha_dropout", "aten::native_dropout")
def _dropout(site: Site) -> Axes | list[Axes]:
    if site.args["train"]:
        site.refuse("FVX013", "dropout is active: random masks differ per token")
    axes = _unary(site)
    assert isinstance(axes, tuple)
    return [axes, axes] if isinstance(site.node.meta["val"], (tuple, list)) else axes


rule("aten::masked_fill", "aten::copy", "aten::where")(pointwise)


@rule("aten::bernoulli", "aten::rand_like", "aten::randn_like", "aten::normal", "aten::uniform")
def _random(site: Site) -> Axes:
    site.refuse("FVX013", "it draws random numbers, which would differ on the kept tokens")

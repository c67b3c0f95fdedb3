"""Axis rules of matrix products and convolutions."""

from __future__ import annotations

from passes.analyse.axes import Axes, Dim, broadcast, has_batch, has_tokens, plain_dim
from passes.analyse.rules.site import Site, filled, rule


def _contract(site: Site, left: Dim | None, right: Dim | None) -> None:
    """Refuses a sum over tokens unless both operands are tokens of the branch, as in attention."""
    dims = [dim for dim in (left, right) if dim is not None]
    if any(has_batch(dim) for dim in dims):
        site.refuse("FVX013", "it sums over the samples of the batch")
    if any(has_tokens(dim) for dim in dims):
        if left is None or right is None:
            site.refuse("FVX013", "it mixes the tokens with weights of a fixed length")
        if left != right:
            site.refuse("FVX013", "it sums over a token axis and another axis")


@rule("aten::linear")
def _linear(site: Site) -> Axes:
    axes = site.stream("input")
    if site.axes(site.args["weight"]) or site.axes(site.args["bias"]):
        site.refuse("FVX010", "its weights are computed from the tokens")
    _contract(site, axes[-1], None)
    return (*axes[:-1], plain_dim(site.out_shape[-1]))


@rule("aten::matmul", "aten::mm", "aten::bmm", "aten::mv", "aten::dot", "aten::_int_mm")
def _matmul(site: Site) -> Axes:
    return _product(site, *site.tensors)


@rule("aten::addmm", "aten::baddbmm", "aten::addmv")
def _matmul_added(site: Site) -> Axes:
    added, *factors = site.tensors
    product = _product(site, *factors)
    site.meet(added, product)
    inside = site.axes(site.args[added])
    return product if inside is None else broadcast([product, inside])


def _product(site: Site, left: str, right: str) -> Axes:
    a, b = site.axes(site.args[left]), site.axes(site.args[right])
    rank_a, rank_b = (len(site.args[name].meta["val"].shape) for name in (left, right))
    rows_b = -2 if rank_b > 1 else -1
    _contract(site, None if a is None else a[-1], None if b is None else b[rows_b])
    batched = broadcast([axes[:-2] for axes in (a, b) if axes is not None])
    out = list(site.out_shape)
    rows = [] if rank_a == 1 else [a[-2] if a is not None else plain_dim(out[-1 - (rank_b > 1)])]
    columns = [] if rank_b == 1 else [b[-1] if b is not None else plain_dim(out[-1])]
    for name, axes in ((left, a), (right, b)):
        if axes is None:  # its batch dims may be indexed by token; its last two never are
            site.meet(name, (*batched, (), ()))
    lead = out[: len(out) - len(rows) - len(columns)]
    return (*filled(batched[len(batched) - len(lead) :], lead), *rows, *columns)


@rule("aten::einsum")
def _einsum(site: Site) -> Axes:
    equation = site.args["equation"].replace(" ", "")
    inputs, arrow, output = equation.partition("->")
    if "." in equation or not arrow:
        site.refuse("FVX010", f"einsum equation {equation!r} has no explicit output or an ellipsis")
    terms = inputs.split(",")
    found: dict[str, Dim] = {}
    seen: dict[str, list[Dim | None]] = {}
    for letters, tensor in zip(terms, site.args["tensors"], strict=True):
        axes = site.axes(tensor)
        for position, letter in enumerate(letters):
            dim = None if axes is None else axes[position]
            seen.setdefault(letter, []).append(dim)
            if dim:
                found[letter] = broadcast([(dim,), (found.get(letter, ()),)])[0]
    for letter, dims in seen.items():
        if letter not in output and has_batch(found.get(letter, ())):
            site.refuse("FVX013", "it sums over the samples of the batch")
        if letter not in output and len(dims) == 1 and has_tokens(found.get(letter, ())):
            site.refuse("FVX013", "it reduces over the tokens")
        if letter not in output and len(dims) > 1:
            _contract(site, dims[0], dims[1])
    for index, letters in enumerate(terms):
        site.meet("tensors", tuple(found.get(letter, ()) for letter in letters), index)
    sizes = dict(zip(output, site.out_shape, strict=True))
    return tuple(found.get(letter) or plain_dim(sizes[letter]) for letter in output)


@rule("aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::convolution")
def _convolution(site: Site) -> Axes:
    axes = site.stream("input")
    kernel = site.args["weight"].meta["val"].shape[2:]
    if any(size != 1 for size in kernel) and any(has_tokens(dim) for dim in axes[2:]):
        site.refuse("FVX013", f"it convolves over the tokens with a kernel of {tuple(kernel)}")
    if has_tokens(axes[1]):
        site.refuse("FVX013", "it mixes the tokens with weights of a fixed length")
    if any(has_batch(dim) for dim in axes[1:]):
        site.refuse("FVX013", "it mixes the samples of the batch")
    if site.out_shape[2:] != list(site.args["input"].meta["val"].shape[2:]):
        site.refuse("FVX012", "it strides over or pads the tokens")
    return (axes[0], plain_dim(site.out_shape[1]), *axes[2:])

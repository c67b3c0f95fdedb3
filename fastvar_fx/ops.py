"""The operators, usable alone: pivotal token selection and cached token restoration.

`x` is (B, L, C): B samples, L = h * w tokens in row-major order, C features.

Source: FastVAR, arXiv 2503.23367, "pivotal token selection" and "cached token restoration".
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import lru_cache
from math import prod
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastvar_fx.errors import ArgumentError

Scale = tuple[int, ...]
"""A token map: (h, w), or (m, h, w) for m maps that are drawn jointly."""

Select = Callable[..., Any]
"""(x (B, L, C), kept) -> indices of the kept tokens (B, kept), int64, each at most once.

Or a tuple that starts with them, for a `Take` and a `Restore` that need to know more. Each of the
three may ask for more by keyword, see `fastvar_fx.Method`.
"""

Take = Callable[..., Tensor]
"""(x (B, L, C), what `Select` gave) -> the tokens that the branch runs on, (B, kept, C)."""

Restore = Callable[..., Tensor]
"""(kept (B, kept, C), what `Select` gave, cached (B, Lc, C), its scale, scale) -> (B, L, C)."""

Mode = Literal["nearest", "bilinear", "area"]
"""How a map is interpolated."""


def kept_tokens(tokens: int, ratio: float) -> int:
    """Returns how many of `tokens` are kept at pruning `ratio` in [0, 1]: L - int(L * ratio)."""
    return tokens - int(tokens * ratio)


def pivotal_scores(x: Tensor) -> Tensor:
    """Returns the frequency score (B, L) of every token: its distance to the mean token.

    The mean token is the lowest frequency of the map, so what is far from it is texture. The paper
    squares the distance; the ranking is the same, and a norm reads memory once less.
    Half-precision inputs are scored in float32.
    """
    x = _at_least_float32(x)
    scores: Tensor = torch.linalg.vector_norm(x - x.mean(dim=1, keepdim=True), dim=-1)
    return scores


def pivotal_token_selection(x: Tensor, kept: int) -> Tensor:
    """Returns the indices (B, kept) of the pivotal tokens of each sample, ascending, int64.

    Args:
        x: Residual stream (B, L, C), floating point.
        kept: How many tokens to keep, in [0, L]; see `kept_tokens`.

    Source: FastVAR, "pivotal token selection". The authors sort all scores; the order of the kept
    tokens is free, and ascending order keeps the gathers local.

    Example:
        >>> x = torch.tensor([[[0.0], [9.0], [1.0], [0.0]]])
        >>> pivotal_token_selection(x, 1)
        tensor([[1]])
    """
    return highest(pivotal_scores(x), kept)


def highest(scores: Tensor, kept: int) -> Tensor:
    """Returns the indices (B, kept) of the highest scores (B, L) of each sample, ascending."""
    return scores.topk(kept, dim=1, sorted=False).indices.sort(dim=1).values


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Returns the tokens (B, kept, C) of x (B, L, C) at `index` (B, kept)."""
    if torch.compiler.is_compiling():
        return _gathered(x, index)
    batch, tokens, width = x.shape
    rows = x.reshape(batch * tokens, width).index_select(0, _rows(index, tokens))
    return rows.view(*index.shape, width)


def as_maps(scale: Scale) -> tuple[int, int, int]:
    """Returns a scale as (m, h, w), m maps that are drawn jointly; m is 1 for (h, w)."""
    return cast("tuple[int, int, int]", (1, *scale)[-3:])


def resize_map(cached: Tensor, cached_scale: Scale, scale: Scale, mode: Mode = "area") -> Tensor:
    """Returns token maps (B, Lc, C) of `cached_scale`, interpolated to (B, L, C) of `scale`.

    Each of the maps that are drawn jointly is resized alone.
    """
    maps, h, w = as_maps(cached_scale)
    batch, _, width = cached.shape
    if mode == "area" and _sums_rows_faster(cached) and h <= scale[-2] and w <= scale[-1]:
        # In an enlarged map each token is the mean of 1, 2 or 4 tokens: the shares are powers of
        # two, and their sums, which take half the time of pooling, are those of `F.interpolate`
        # to the bit, except for subnormal numbers.
        bounds = _windows(batch * maps, (h, w), scale[-2:])
        index, shares, begins = (torch.as_tensor(each, device=cached.device) for each in bounds)
        rows = cached.reshape(-1, width)
        sums = F.embedding_bag(index, rows, begins, mode="sum", per_sample_weights=shares)
        return sums.view(batch, prod(scale), width)
    rows = cached.reshape(batch * maps, h, w, width)
    image = rows.permute(0, 3, 1, 2)  # channels last, also for one sample: no copy, a fast kernel
    sides = [operator.index(side) for side in scale[-2:]]  # constants: Inductor asks for them
    resized = F.interpolate(image, size=sides, mode=mode)
    return resized.permute(0, 2, 3, 1).reshape(batch, prod(scale), width)


def cached_token_restoration(
    kept: Tensor, index: Tensor, cached: Tensor, cached_scale: Scale, scale: Scale
) -> Tensor:
    """Returns a branch's full output (B, L, C) from what it computed and what was captured.

    Args:
        kept: The branch's output on the kept tokens (B, kept, C).
        index: Which tokens those are (B, kept), int64.
        cached: The branch's output captured at the cache step (B, Lc, C), Lc = prod(cached_scale).
        cached_scale: (h, w) or (m, h, w) of the cache step.
        scale: (h, w) or (m, h, w) of this step; as many maps as in `cached_scale`.

    Raises:
        ArgumentError: If the shapes or the dtypes do not fit each other.

    Source: FastVAR, "cached token restoration"; interpolation is `area`.

    Example:
        >>> cached = torch.tensor([[[5.0]]])
        >>> kept, index = torch.ones(1, 1, 1), torch.tensor([[2]])
        >>> out = cached_token_restoration(kept, index, cached, (1, 1), (2, 2))
        >>> out.flatten().tolist()
        [5.0, 5.0, 1.0, 5.0]
    """
    _check_shapes(kept, index, cached, cached_scale, scale)
    return put_tokens(resize_map(cached, cached_scale, scale), index, kept)


def drift_corrected_restoration(
    kept: Tensor, index: Tensor, cached: Tensor, cached_scale: Scale, scale: Scale
) -> Tensor:
    """Returns `cached_token_restoration` with the drift added to what was captured.

    The captured output is that of another step: of other conditioning, and with other earlier maps
    to attend to. The drift (B, 1, C) is what this changes on average, seen at the kept tokens: the
    mean over them of computed minus captured output. It is computed in float32 (float64 for
    float64), under autocast with its products in the dtype of autocast. Where no token is kept it
    is unknown, and nothing is added.

    Args:
        kept: The branch's output on the kept tokens (B, kept, C).
        index: Which tokens those are (B, kept), int64.
        cached: The branch's output captured at the cache step (B, Lc, C), Lc = prod(cached_scale).
        cached_scale: (h, w) or (m, h, w) of the cache step.
        scale: (h, w) or (m, h, w) of this step; as many maps as in `cached_scale`.

    Raises:
        ArgumentError: If the shapes or the dtypes do not fit each other.

    Source: not of the paper.

    Example:
        >>> cached = torch.tensor([[[5.0]]])
        >>> kept, index = torch.ones(1, 1, 1), torch.tensor([[2]])
        >>> out = drift_corrected_restoration(kept, index, cached, (1, 1), (2, 2))
        >>> out.flatten().tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    _check_shapes(kept, index, cached, cached_scale, scale)
    if kept.shape[1]:
        # Interpolation keeps constants, so the drift may be added to the smaller map.
        drift = _token_mean(kept) - _captured_mean(index, cached, cached_scale, scale)
        cached = (cached + drift).to(cached.dtype)
    return put_tokens(resize_map(cached, cached_scale, scale), index, kept)


def locally_corrected_restoration(
    kept: Tensor, index: Tensor, cached: Tensor, cached_scale: Scale, scale: Scale
) -> Tensor:
    """Returns `drift_corrected_restoration` with a drift (B, L, C) that differs by place.

    The drift of a token is the mean over the kept ones among the 3 x 3 tokens around it, to which
    the drift of the whole map is added once: where no token near is kept, it alone counts. This
    suits selections without large holes, such as an even grid. Drifts of half precision are
    rounded to it, and so are their means outside `torch.compile`; the drift of the whole map is
    computed in float32.

    Args:
        kept: The branch's output on the kept tokens (B, kept, C).
        index: Which tokens those are (B, kept), int64.
        cached: The branch's output captured at the cache step (B, Lc, C), Lc = prod(cached_scale).
        cached_scale: (h, w) or (m, h, w) of the cache step.
        scale: (h, w) or (m, h, w) of this step; as many maps as in `cached_scale`.

    Raises:
        ArgumentError: If the shapes or the dtypes do not fit each other.

    Source: not of the paper.

    Example:
        >>> cached = torch.tensor([[[5.0]]])
        >>> kept, index = torch.tensor([[[1.0], [3.0]]]), torch.tensor([[0, 3]])
        >>> out = locally_corrected_restoration(kept, index, cached, (1, 1), (1, 4))
        >>> out.flatten().tolist()  # of drifts -4 and -2, and -3 on average
        [1.0, 1.5, 2.5, 3.0]
    """
    _check_shapes(kept, index, cached, cached_scale, scale)
    full = resize_map(cached, cached_scale, scale)
    if kept.shape[1]:
        drifts = take_tokens(full, index).neg_().add_(kept)
        full += _drift_around(drifts, index, scale)
    return put_tokens(full, index, kept)


def _drift_around(drifts: Tensor, index: Tensor, scale: Scale) -> Tensor:
    """Returns the mean (B, L, C) of the drifts (B, kept, C) around each token and the whole map's.

    At the kept tokens, which are replaced, it leaves out their own drift.
    """
    batch, kept, width = drifts.shape
    mean = _token_mean(drifts)
    near = _kept_around(index, scale)
    shares = 1 / (1 + (near < kept).sum(dim=-1, keepdim=True, dtype=mean.dtype))
    if torch.compiler.is_compiling() or drifts.requires_grad:
        rows = F.pad(drifts, (0, 0, 0, 1))
        # One kernel sums what is gathered. The rows keep their dtype: beside float32 ones, Inductor
        # reads the captured map of half precision element by element.
        return sum((_gathered(rows, place) for place in near.unbind(-1)), start=mean) * shares
    rows = torch.cat([drifts, torch.zeros_like(drifts[:, :1]), mean.to(drifts.dtype)], dim=1)
    index = F.pad(near, (0, 1), value=kept + 1).flatten(1)
    index = _rows(index, kept + 2).view(-1, near.shape[-1] + 1)
    weights = shares.to(drifts.dtype).view(-1, 1).expand_as(index)
    sums = F.embedding_bag(index, rows.flatten(0, 1), mode="sum", per_sample_weights=weights)
    return sums.view(batch, -1, width)


def _kept_around(index: Tensor, scale: Scale) -> Tensor:
    """Returns which of the kept tokens are the 8 around each token (B, L, 8); `kept` for none."""
    batch, kept = index.shape
    h, w = scale[-2:]
    order = torch.arange(kept, device=index.device).expand_as(index)
    place = index.new_full((batch, prod(scale)), kept).scatter(1, index, order)
    maps = F.pad(place.view(batch, -1, h, w), (1, 1, 1, 1), value=kept)
    sides = [(i, j) for i in range(3) for j in range(3) if (i, j) != (1, 1)]
    near = [maps[..., i : i + h, j : j + w].reshape(batch, -1) for i, j in sides]
    return torch.stack(near, dim=-1)


def _captured_mean(index: Tensor, cached: Tensor, cached_scale: Scale, scale: Scale) -> Tensor:
    """Returns the mean (B, 1, C) of the captured output over the tokens at `index`."""
    wide = _at_least_float32(cached)
    chosen = wide.new_zeros(len(index), prod(scale)).scatter_(1, index, 1.0)
    sides = zip(cached_scale[-2:], scale[-2:], strict=True)
    rows, columns = (_shares(small, large, wide) for small, large in sides)
    maps = chosen.view(-1, *scale[-2:])  # (B * m, H, W)
    shares = rows @ maps @ columns.mT  # (B * m, h, w)
    return shares.view(len(index), 1, -1) @ wide / index.shape[1]


def _shares(small: int, large: int, like: Tensor) -> Tensor:
    """Returns the share of each of `small` places in each of `large` ones, (1, small, large)."""
    each = torch.eye(small, dtype=like.dtype, device=like.device)
    return F.interpolate(each.unsqueeze(0), size=large, mode="area")


def _token_mean(x: Tensor) -> Tensor:
    """Returns the mean token (B, 1, C) of x (B, L, C), in float32 or float64."""
    return x.mean(dim=1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def put_tokens(full: Tensor, index: Tensor, kept: Tensor) -> Tensor:
    """Returns `full` (B, L, C) with its tokens at `index` (B, kept) replaced by `kept`.

    Eagerly, it writes into the memory of `full`. Compiled, it gathers every token from where it is:
    unlike a scatter, this is fused with the ops that make `full` and with those that read the
    result.
    """
    if torch.compiler.is_compiling():
        return _chosen(full, index, kept)
    batch, tokens, width = full.shape
    rows, kept_rows = full.reshape(batch * tokens, width), kept.reshape(-1, width)
    target, source = _in_wide_elements(rows, kept_rows)
    target.index_copy_(0, _rows(index, tokens), source)
    return rows.view(full.shape)


def _chosen(full: Tensor, index: Tensor, kept: Tensor) -> Tensor:
    if not kept.shape[1]:
        return full
    order = torch.arange(kept.shape[1], device=index.device).expand_as(index)
    place = index.new_full(full.shape[:2], -1).scatter(1, index, order)  # among the kept, or -1
    return torch.where((place >= 0).unsqueeze(-1), _gathered(kept, place.clamp_min(0)), full)


def _gathered(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _rows(index: Tensor, tokens: int) -> Tensor:
    """Turns indices per sample (B, kept) into row numbers of the flattened (B * L) tokens."""
    first = torch.arange(0, index.shape[0] * tokens, tokens, device=index.device)
    return (index + first.unsqueeze(1)).flatten()


def _in_wide_elements(*rows: Tensor) -> tuple[Tensor, ...]:
    """Views rows (N, C) with elements of 16 bytes, if all of them allow it.

    `index_copy_` on a CPU copies rows element by element: four float32 at once take a third of the
    time. The bits stay. Such a view has no gradient.
    """
    fit = all(
        part.is_cpu
        and part.dtype == rows[0].dtype
        and part.is_contiguous()
        and not part.requires_grad
        and part.shape[1] * part.element_size() % 16 == 0
        and part.storage_offset() * part.element_size() % 16 == 0
        for part in rows
    )
    return tuple(part.view(torch.complex128) for part in rows) if fit else rows


def _sums_rows_faster(cached: Tensor) -> bool:
    eager = not (torch.compiler.is_compiling() or cached.requires_grad)
    return eager and cached.is_cpu and cached.dtype is torch.float32


@lru_cache(maxsize=64)
def _windows(maps: int, small: Scale, large: Scale) -> tuple[NDArray[Any], ...]:
    """Returns the tokens of small maps (h, w) that each token of the large maps is the mean of.

    Returns:
        The tokens' numbers, window by window, int64; their shares in the mean, float32; and where
        each window begins, (maps * H * W), int64. Arrays, because a tensor may be a fake one.
    """
    (rows, in_rows), (columns, in_columns) = map(_window, small, large)
    index = rows[:, None, :, None] * small[1] + columns[:, None, :]  # (H, W, 2, 2)
    inside = in_rows[:, None, :, None] & in_columns[:, None, :]
    index = np.arange(maps).reshape(-1, 1, 1, 1, 1) * prod(small) + index
    inside = np.broadcast_to(inside, index.shape)
    counts = inside.sum(axis=(-2, -1)).ravel()
    shares = np.repeat(1 / counts, counts).astype(np.float32)
    return index[inside], shares, np.cumsum(counts) - counts


def _window(small: int, large: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Returns the first and last place of each window on an axis (large, 2), and which count.

    The last place does not count where it is the first one.
    """
    place = np.arange(large)
    first, last = place * small // large, -(-(place + 1) * small // large) - 1
    counts = np.stack([np.full(large, fill_value=True), last > first], axis=1)
    return np.stack([first, last], axis=1), counts


def _check_shapes(
    kept: Tensor, index: Tensor, cached: Tensor, cached_scale: Scale, scale: Scale
) -> None:
    found = f"kept {tuple(kept.shape)}, index {tuple(index.shape)}, cached {tuple(cached.shape)}"
    if kept.dim() != 3 or cached.dim() != 3 or kept.shape[:2] != index.shape:
        raise ArgumentError(
            f"restoration needs kept (B, kept, C), index (B, kept) and cached "
            f"(B, Lc, C); found {found}"
        )
    if cached.shape[1] != prod(cached_scale) or kept.shape[::2] != cached.shape[::2]:
        raise ArgumentError(
            f"asked to restore from scale {cached_scale} of "
            f"{prod(cached_scale)} tokens; found {found}. Pass the scale of the cache step, and "
            f"tensors of one batch and width"
        )
    if kept.dtype != cached.dtype:
        raise ArgumentError(
            f"restoration needs kept and cached of one dtype; found {kept.dtype} and {cached.dtype}"
        )
    if as_maps(cached_scale)[0] != as_maps(scale)[0]:
        raise ArgumentError(
            f"restoration needs scales of equally many maps; found {cached_scale} and {scale}"
        )

"""How a branch is pruned: the paper's way, and those that it is compared with.

`transform` takes a name, or a `Method` of your own:

    fast = transform(model, schedule, method="tome")
    fast = transform(model, schedule, method=Method(select=methods.random_tokens))

The functions here are the parts that the named methods consist of.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from types import MappingProxyType
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvar_fx.errors import ArgumentError, did_you_mean
from fastvar_fx.ops import (
    Mode,
    Restore,
    Scale,
    Select,
    Take,
    as_maps,
    cached_token_restoration,
    drift_corrected_restoration,
    highest,
    locally_corrected_restoration,
    pivotal_scores,
    pivotal_token_selection,
    put_tokens,
    resize_map,
    take_tokens,
)
from passes.rewrite.prune import Rule

Once = Literal[False, "block", "step"]
"""How long a selection holds: for one branch, all branches of a block, or all blocks of a step."""

GIVEN: Final = (
    "cached",
    "cached_scale",
    "scale",
    "step",
    "layer",
    "layers",
    "kept_before",
    "selected",
)
"""What a function of a `Method` can ask for by the name of a keyword-only parameter."""

_RULES: Final[tuple[Rule, ...]] = ("select", "take", "restore")

_NEW_MEMORY: Final = (
    cached_token_restoration,
    drift_corrected_restoration,
    locally_corrected_restoration,
)

_SPREAD: Final = (0.7548776662466927, 0.5698402909980532)
"""Steps of the R2 sequence, whose multiples fill the unit square evenly (M. Roberts, 2018)."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a branch is pruned; the defaults are FastVAR's.

    Attributes:
        select: Selects the kept tokens, (x (B, L, C), kept) -> indices (B, kept), int64, each at
            most once. It may return a tuple that starts with them; `take` and `restore` then get
            the tuple in place of the indices.
        take: Makes what the branch runs on, (x (B, L, C), index (B, kept)) -> (B, kept, C).
        restore: Makes the branch's whole output, (kept (B, kept, C), index (B, kept), cached
            (B, Lc, C), its scale, scale) -> (B, L, C). At ratio 1, `kept` and `index` are empty.
        once: "block" if all branches of a block keep the tokens that its first branch selects,
            "step" if the branches of all blocks keep those that the first branch of the first block
            selects; False if each branch selects its own, as in the paper.

    Each function is also given what its keyword-only parameters name:

        cached        what the branch, or with `once` the first one, put out at the cache step
                      (B, Lc, C)
        cached_scale  the scale of the cache step
        scale         the scale of this step, (h, w) or (m, h, w)
        step          the index of this step
        layer         the index of the block; then blocks share no programs
        layers        the number of blocks
        kept_before   the shares of the maps that the branch kept at the pruned steps before, summed
        selected      what the first block of this step selected; None for that block. For `select`
                      alone, with once="step": each block then selects, knowing of the first one

    Functions without a name, such as partials, are stored wrapped in one that has a name: the code
    of a graph calls functions by their names.

    Raises:
        ArgumentError: If a function cannot be called or asks for something else, `once` has
            another value, or `selected` is asked for in vain.

    Example:
        >>> def first_tokens(x, kept, *, scale):
        ...     return torch.arange(kept).expand(x.shape[0], kept)
        >>> Method(select=first_tokens).asks["select"]
        ('scale',)
    """

    select: Select = pivotal_token_selection
    take: Take = take_tokens
    restore: Restore = cached_token_restoration
    once: Once = False

    def __post_init__(self) -> None:
        for name in _RULES:
            function = getattr(self, name)
            if not callable(function):
                raise ArgumentError(
                    f"{name} of a Method is a function; found {function!r}. A named method is "
                    f"given to transform by its name, without Method"
                )
            object.__setattr__(self, name, _with_name(function))
        if self.once is not False and self.once not in ("block", "step"):
            raise ArgumentError(
                f'once of a Method is False, "block" or "step"; found {self.once!r}'
            )
        wanting = [rule for rule, names in self.asks.items() if "selected" in names]
        if wanting and (wanting != ["select"] or self.once != "step"):
            raise ArgumentError(
                f'selected is for the select of a Method with once="step"; found that '
                f"{' and '.join(wanting)} ask for it, with once={self.once!r}"
            )

    @cached_property
    def asks(self) -> Mapping[Rule, Sequence[str]]:
        """The names of `GIVEN` that each function asks for."""
        return {rule: _asked_by(rule, getattr(self, rule)) for rule in _RULES}

    @property
    def restores_anew(self) -> bool:
        """Whether the result of `restore` is known to be new memory, which may be overwritten."""
        return self.restore in _NEW_MEMORY


def _with_name(function: Callable[..., Any]) -> Callable[..., Any]:
    if hasattr(function, "__name__"):
        return function

    def named(*args: Any, **asked: Any) -> Any:
        return function(*args, **asked)

    named.__wrapped__ = function  # type: ignore[attr-defined]  # whose signature it has
    return named


def _asked_by(rule: Rule, function: Callable[..., Any]) -> tuple[str, ...]:
    """Returns the names of `GIVEN` among the keyword-only parameters of a function."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # a function of C code, which has none
        return ()
    named = [each for each in parameters if each.kind is each.KEYWORD_ONLY]
    for each in named:
        if each.name not in GIVEN and each.default is each.empty:
            raise ArgumentError(
                f"{rule} of a Method asks for {each.name!r}, which is unknown; "
                f"{did_you_mean(each.name, GIVEN)} Give a parameter of your own a default"
            )
    return tuple(each.name for each in named if each.name in GIVEN)


# --- by name ----------------------------------------------------------------------------------


def names() -> tuple[str, ...]:
    """Returns the names of the methods that `transform` knows."""
    return tuple(METHODS)


def method_of(method: str | Method) -> Method:
    """Returns the method of a name; a `Method` is returned as it is.

    Raises:
        ArgumentError: If no method has this name, with close names in the message, or if it is
            neither a name nor a `Method`.
    """
    if isinstance(method, Method):
        return method
    if not isinstance(method, str):
        raise ArgumentError(
            f"method is a Method or one of {', '.join(METHODS)}; found {type(method).__name__}"
        )
    if method not in METHODS:
        raise ArgumentError(f"no method is named {method!r}; {did_you_mean(method, METHODS)}")
    return METHODS[method]


# --- selection --------------------------------------------------------------------------------


def random_tokens(x: Tensor, kept: int) -> Tensor:
    """Returns `kept` tokens (B, kept) drawn from torch's global generator, ascending, int64."""
    return highest(torch.rand_like(x[..., 0], dtype=torch.float32), kept)


def lowest_scores(x: Tensor, kept: int) -> Tensor:
    """Returns the tokens (B, kept) nearest to the mean token, ascending, int64: the smooth ones."""
    return highest(-pivotal_scores(x), kept)


def uniform_grid(x: Tensor, kept: int, *, scale: Scale) -> Tensor:
    """Returns tokens (B, kept) spread evenly over the map, whatever their values, ascending, int64.

    Maps that are drawn jointly are stacked vertically.

    Example:
        >>> uniform_grid(torch.zeros(1, 16, 8), 4, scale=(4, 4)).tolist()
        [[0, 2, 9, 11]]
    """
    return highest(-_grid_order(scale, x.device).expand(x.shape[:2]), kept)


def _grid_order(scale: Scale, device: torch.device) -> Tensor:
    """Returns numbers (L,) in [0, 1), float64, of which a threshold cuts out a lattice."""
    maps, height, width = as_maps(scale)
    rows = torch.arange(maps * height, device=device, dtype=torch.float64) * _SPREAD[0]
    columns = torch.arange(width, device=device, dtype=torch.float64) * _SPREAD[1]
    return (rows.unsqueeze(1) + columns).flatten() % 1


def high_pass_tokens(x: Tensor, kept: int, *, scale: Scale) -> Tensor:
    """Returns the tokens (B, kept) that differ most from the 3 x 3 tokens around them."""
    return highest(_high_pass(x, scale), kept)


def _with_anchors(scores: Tensor, kept: int, scale: Scale) -> Tensor:
    """Returns scores (B, L) that are infinite on an even grid of a quarter of the kept tokens."""
    anchors = uniform_grid(scores.unsqueeze(-1), kept // 4, scale=scale)
    return scores.scatter(1, anchors, torch.inf)


def _high_pass(x: Tensor, scale: Scale) -> Tensor:
    """Returns the distance (B, L) of every token to the mean of the 3 x 3 tokens around it."""
    maps = x.float().reshape(-1, *scale[-2:], x.shape[2]).permute(0, 3, 1, 2)
    around = F.avg_pool2d(maps, 3, stride=1, padding=1, count_include_pad=False)
    distances: Tensor = torch.linalg.vector_norm(maps - around, dim=1)
    return distances.reshape(x.shape[:2])


def _changed(cached: Tensor, cached_scale: Scale, scale: Scale) -> Tensor:
    """Returns how much (B, L) a branch added to every token at the cache step."""
    norms: Tensor = torch.linalg.vector_norm(cached.float(), dim=2, keepdim=True)
    return resize_map(norms, cached_scale, scale).squeeze(2)


# --- restoration ------------------------------------------------------------------------------


def zeros(kept: Tensor, index: Tensor, cached: Tensor, cached_scale: Scale, scale: Scale) -> Tensor:
    """Returns a branch's output (B, L, C) that is 0 at the tokens that were not kept."""
    full = cached.new_zeros(cached.shape[0], prod(scale), cached.shape[2])
    return put_tokens(full, index, kept)


def nearest_kept(
    kept: Tensor, index: Tensor, cached: Tensor, cached_scale: Scale, scale: Scale
) -> Tensor:
    """Returns a branch's output (B, L, C) in which each token has that of the nearest kept token.

    Distance is measured on the map; tokens of the same map are always nearer than those of another.

    Raises:
        ArgumentError: If no token is kept.
    """
    _check_some_kept(kept, "nearest_kept")
    places = _places(scale, cached.device)  # (L, 3)
    distances = torch.cdist(places, places[index])  # (B, L, kept)
    return take_tokens(kept, distances.argmin(dim=2))


def interpolated(mode: Mode) -> Restore:
    """Returns cached token restoration with another interpolation than `area`.

    Raises:
        ArgumentError: If the mode is unknown.
    """
    known = ("nearest", "bilinear", "area")
    if mode not in known:
        raise ArgumentError(f"interpolated takes a mode of {known}; found {mode!r}")
    return partial(_resize_and_put, mode)


def _resize_and_put(
    mode: Mode, kept: Tensor, index: Tensor, cached: Tensor, cached_scale: Scale, scale: Scale
) -> Tensor:
    return put_tokens(resize_map(cached, cached_scale, scale, mode), index, kept)


def _places(scale: Scale, device: torch.device) -> Tensor:
    """Returns the place of every token, float32 (L, 3): map, row and column."""
    maps, height, width = as_maps(scale)
    far = height + width
    axes = (torch.arange(n, device=device, dtype=torch.float32) for n in (maps, height, width))
    places = torch.cartesian_prod(*axes)  # (L, 3)
    return places * places.new_tensor([far, 1, 1])


# --- merging ----------------------------------------------------------------------------------


def token_merging() -> Method:
    """Returns ToMe, which merges tokens and uses no cache.

    A quarter of the tokens, spread evenly over the map, are destinations; if fewer are kept, as
    many as are kept. Of the others, those most similar to a destination are merged into it: the
    branch runs on the mean of the group, and its output is copied to all tokens of the group. Side
    inputs such as positions are those of the destination.

    A branch raises an `ArgumentError` if no token is kept.

    Source: bipartite soft matching of ToMe, arXiv 2210.09461, with the destinations and the
    unmerging of tomesd, arXiv 2303.17604. Similarity is the cosine of the residual stream. Here
    destinations lie on an even lattice, not at random in 2 x 2 windows, and means are not weighted.
    """
    return Method(select=_match, take=_merge, restore=_unmerge)


def _match(x: Tensor, kept: int, *, scale: Scale) -> tuple[Tensor, Tensor]:
    """Returns the tokens that stay (B, kept), and of every token which of them it is in (B, L)."""
    _check_some_kept(x[:, :kept], "token_merging")
    tokens = x.shape[1]
    into = uniform_grid(x, min(kept, max(tokens // 4, 1)), scale=scale)  # (B, D) destinations
    unit = F.normalize(x.float(), dim=-1)
    similarity = unit @ take_tokens(unit, into).mT  # (B, L, D)
    best = similarity.max(dim=2)
    merged_last = best.values.scatter(1, into, -torch.inf)  # a destination always stays
    stays = highest(-merged_last, kept)  # (B, kept)
    slots = torch.full_like(best.indices, -1)
    order = torch.arange(kept, device=x.device).expand_as(stays)
    slots = slots.scatter(1, stays, order)
    theirs = slots.gather(1, into.gather(1, best.indices))  # the slot of each one's destination
    return stays, torch.where(slots < 0, theirs, slots)


def _merge(x: Tensor, selection: tuple[Tensor, Tensor]) -> Tensor:
    """Returns the means (B, kept, C) of the groups."""
    stays, slots = selection
    place = slots.unsqueeze(-1).expand_as(x)
    means = x.new_zeros(*stays.shape, x.shape[2])
    return means.scatter_reduce(1, place, x, "mean", include_self=False)


def _unmerge(
    kept: Tensor,
    selection: tuple[Tensor, Tensor],
    cached: Tensor,
    cached_scale: Scale,
    scale: Scale,
) -> Tensor:
    """Returns a branch's output (B, L, C): each token has that of its group."""
    _check_some_kept(kept, "token_merging")
    return take_tokens(kept, selection[1])


# --- published rivals -------------------------------------------------------------------------


def stepvar() -> Method:
    """Returns StepVAR: keeps texture and structure, and copies the nearest kept token.

    The score of a token is its distance to the tokens around it, and its distance to the mean along
    the first principal component of the map; each is divided by its largest one.

    Source: StepVAR, arXiv 2603.01757: a high-pass filter and principal component analysis, and
    features from the nearest neighbour. That both count alike, and the filter, are choices made
    here; the component comes from four power iterations.
    """
    return Method(select=_structure_and_texture, restore=nearest_kept)


def _structure_and_texture(x: Tensor, kept: int, *, scale: Scale) -> Tensor:
    centred = x.float() - x.float().mean(dim=1, keepdim=True)
    component = take_tokens(centred, highest(pivotal_scores(x), 1))  # (B, 1, C)
    for _ in range(4):
        component = F.normalize((component @ centred.mT) @ centred, dim=2)
    texture, structure = _high_pass(x, scale), (centred @ component.mT).squeeze(2).abs()
    return highest(F.normalize(texture, torch.inf) + F.normalize(structure, torch.inf), kept)


def sparsevar() -> Method:
    """Returns SparseVAR: keeps anchors and what changed most, and copies the nearest kept token.

    Source: SparseVAR, arXiv 2507.20454: tokens of low frequency are found by their mean squared
    change, and tokens on a sparse uniform grid always stay. Here the change is what the branch
    added at the cache step, a quarter of the kept tokens are anchors, and the number of kept tokens
    is that of the schedule, not that of a threshold.
    """
    return Method(select=_anchored_changed, restore=nearest_kept)


def _anchored_changed(
    x: Tensor, kept: int, *, cached: Tensor, cached_scale: Scale, scale: Scale
) -> Tensor:
    scores = _changed(cached, cached_scale, scale)
    return highest(_with_anchors(scores, kept, scale), kept)


def fastervar() -> Method:
    """Returns the selection of FasterVAR: tokens drawn with probabilities like their squared norms.

    Draws are without replacement, from torch's global generator. Dropped tokens are restored from
    the cache step. FasterVAR also leaves out guidance at the last steps, which no method does.

    Source: FasterVAR (StageVAR), arXiv 2512.16483.
    """
    return Method(select=_drawn_by_norm)


def _drawn_by_norm(x: Tensor, kept: int) -> Tensor:
    weights = x.float().square().sum(dim=2)
    # The highest of log weights with Gumbel noise are such draws (arXiv 1903.06059).
    gumbel = -torch.empty_like(weights).exponential_().log()
    return highest(weights.log() + gumbel, kept)


def depthvar() -> Method:
    """Returns DepthVAR: every token runs in some of the layers, every layer on as many tokens.

    The first block ranks the tokens of a step. The share of the layers in which a token runs falls
    evenly with its rank, from at most 1 for the first one, and has the kept tokens of the schedule
    as its mean. Its layers are spread evenly; in the others it has the cached output. At each step
    the ranks begin where the kept tokens of the steps before end.

    Source: DepthVAR, arXiv 2604.17286: a depth for each token, rotated from scale to scale, and
    turned into a mask for each layer. The ranking by distance to the mean token, the even fall and
    how far ranks rotate are choices made here. DepthVAR also weights the codes that are drawn by
    the depth, which no method does.
    """
    return Method(select=_in_some_layers, take=_take, restore=_restore, once="step")


def _in_some_layers(
    x: Tensor, kept: int, *, selected: Any, kept_before: float, layer: int, layers: int
) -> tuple[Tensor, Tensor]:
    tokens = x.shape[1]
    ranks = _ranks(pivotal_scores(x), kept_before) if selected is None else selected[1]
    # Shares are integers, of tokens ** 2, so that they sum up to `kept` exactly.
    fall = min(kept, tokens - kept)
    shares = kept * tokens + fall * (tokens - 1 - 2 * ranks)
    ends = shares.cumsum(dim=1) + layer * tokens**2 // layers
    runs = ends // tokens**2 - (ends - shares) // tokens**2  # 1 if the token runs, else 0
    return highest(runs, kept), ranks


def _take(x: Tensor, selection: Any) -> Tensor:
    return take_tokens(x, selection[0])


def _restore(kept: Tensor, selection: Any, *cached: Any) -> Tensor:
    index = selection if isinstance(selection, Tensor) else selection[0]  # a tensor if none is kept
    return cached_token_restoration(kept, index, *cached)


def lazyvar() -> Method:
    """Returns LazyVAR: each step keeps other tokens than the pruned steps before.

    Tokens are ranked by what the first branch added to them at the cache step, which all steps see
    alike. The first step keeps the highest ranks, each later one those that come next; after the
    last rank comes the first again. Sets are disjoint up to their borders on maps of other sizes.

    Source: LazyVAR (CVPR 2026): scales update disjoint tokens, and more are pruned as the features
    of adjacent scales become more similar. The ranking is a choice made here, and the schedule
    says how many are pruned. LazyVAR also draws the last scales in one call, which no method does.
    """
    return Method(select=_those_next, once="step")


def _those_next(
    x: Tensor, kept: int, *, cached: Tensor, cached_scale: Scale, scale: Scale, kept_before: float
) -> Tensor:
    return highest(-_ranks(_changed(cached, cached_scale, scale), kept_before), kept)


def _ranks(scores: Tensor, kept_before: float) -> Tensor:
    """Returns the rank (B, L) of every token, int64; 0 follows those that steps before kept."""
    tokens = scores.shape[1]
    ranks = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (ranks - round(kept_before * tokens)) % tokens


def _check_some_kept(kept: Tensor, rule: str) -> None:
    if not kept.shape[1]:
        raise ArgumentError(f"{rule} needs at least one kept token; use a ratio below 1")


METHODS: Final[Mapping[str, Method]] = MappingProxyType(
    {
        "fastvar": Method(),
        "drift-corrected": Method(restore=drift_corrected_restoration),
        "drift-corrected-grid": Method(select=uniform_grid, restore=locally_corrected_restoration),
        "once-per-block": Method(once="block"),
        "once-per-step": Method(once="step"),
        "random": Method(select=random_tokens),
        "uniform-grid": Method(select=uniform_grid),
        "high-pass": Method(select=high_pass_tokens),
        "lowest-scores": Method(select=lowest_scores),
        "zeros": Method(restore=zeros),
        "nearest-kept": Method(restore=nearest_kept),
        "bilinear": Method(restore=interpolated("bilinear")),
        "nearest": Method(restore=interpolated("nearest")),
        "tome": token_merging(),
        "stepvar": stepvar(),
        "sparsevar": sparsevar(),
        "fastervar": fastervar(),
        "depthvar": depthvar(),
        "lazyvar": lazyvar(),
    }
)
"""The named methods."""

"""Pivotal token selection and cached token restoration, against plain implementations."""

import doctest
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastvar_fx import ops, schedule
from fastvar_fx.errors import ArgumentError
from fastvar_fx.ops import (
    Restore,
    Scale,
    cached_token_restoration,
    drift_corrected_restoration,
    kept_tokens,
    locally_corrected_restoration,
    pivotal_scores,
    pivotal_token_selection,
    put_tokens,
    resize_map,
    take_tokens,
)
from tests.devices import DEVICE

FAST = settings(deadline=None, max_examples=40, derandomize=True)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@pytest.fixture(params=["eager", "compiled"])
def _form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both forms of the operators: that of eager runs, and that which compilers are given."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: request.param == "compiled")


@pytest.mark.parametrize("module", [ops, schedule], ids=lambda module: module.__name__)
def test_docstrings(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


# -- selection ----------------------------------------------------------------------------------


def plain_scores(x: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return ((wide - wide.mean(dim=1, keepdim=True)) ** 2).sum(dim=2)


def assert_same_tokens(got: Tensor, want: Tensor, scores: Tensor) -> None:
    """A GPU sums a batch in another order than a sample, which may swap tokens of equal score."""
    if DEVICE.type == "cpu":
        assert torch.equal(got, want)
    else:
        torch.testing.assert_close(scores[got].sort().values, scores[want].sort().values)


@FAST
@given(
    batch=st.integers(1, 4),
    tokens=st.integers(1, 33),
    width=st.integers(1, 17),
    share=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_selection_is_the_first_of_all_scores_sorted(
    batch: int, tokens: int, width: int, share: float, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, width, generator=generator).to(DEVICE, dtype)
    kept = int(tokens * share)
    index = pivotal_token_selection(x, kept)
    assert index.shape == (batch, kept)
    assert index.dtype == torch.int64
    assert (index[:, 1:] > index[:, :-1]).all(), "ascending, so each token at most once"
    scores = plain_scores(x)
    for i in range(batch):
        best = scores[i].argsort(descending=True, stable=True)[:kept]
        torch.testing.assert_close(
            scores[i, index[i]].sort().values, scores[i, best].sort().values, rtol=1e-5, atol=1e-9
        )
        alone = pivotal_token_selection(x[i : i + 1], kept)[0]
        assert_same_tokens(alone, index[i], scores[i])


@pytest.mark.parametrize("dtype", DTYPES)
def test_selection_keeps_none_or_all(dtype: torch.dtype) -> None:
    x = torch.randn(3, 6, 5, dtype=dtype, device=DEVICE)
    assert pivotal_token_selection(x, 0).shape == (3, 0)
    assert torch.equal(pivotal_token_selection(x, 6), torch.arange(6, device=DEVICE).expand(3, 6))


def test_selection_finds_the_tokens_far_from_the_mean() -> None:
    x = torch.zeros(2, 6, 3, device=DEVICE)
    x[0, 1], x[0, 4] = 5.0, -5.0
    x[1, 0], x[1, 5] = -3.0, 3.0
    assert pivotal_token_selection(x, 2).tolist() == [[1, 4], [0, 5]]


def test_half_precision_is_scored_in_float32() -> None:
    x = torch.full((1, 3, 4096), 1.0, dtype=torch.bfloat16, device=DEVICE)
    x[0, 1] = 1.0078125
    assert pivotal_scores(x).dtype == torch.float32
    assert pivotal_token_selection(x, 1).tolist() == [[1]]


def test_selection_leaves_its_input_alone() -> None:
    x = torch.randn(2, 5, 3, device=DEVICE)
    before = x.clone()
    pivotal_token_selection(x, 2)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("tokens", "ratio", "kept"), [(9, 0.0, 9), (9, 1.0, 0), (9, 0.5, 5), (1, 0.99, 1), (3, 0.34, 2)]
)
def test_kept_tokens(tokens: int, ratio: float, kept: int) -> None:
    assert kept_tokens(tokens, ratio) == kept


# -- restoration --------------------------------------------------------------------------------


def plain_resize(cached: Tensor, cached_scale: Scale, scale: Scale) -> Tensor:
    """Each sample's maps one by one through F.interpolate."""
    (h, w), (H, W) = cached_scale[-2:], scale[-2:]
    samples = []
    for sample in cached:
        maps = [
            F.interpolate(part.T.reshape(1, -1, h, w), size=(H, W), mode="area")
            for part in sample.split(h * w)
        ]
        samples.append(torch.cat([m.flatten(2)[0].T for m in maps]))
    return torch.stack(samples)


SCALES: list[tuple[Scale, Scale]] = [
    ((2, 2), (4, 4)),
    ((2, 3), (5, 4)),
    ((3, 1), (7, 2)),
    ((4, 4), (4, 4)),
    ((1, 2, 3), (1, 4, 5)),
    ((3, 2, 1), (3, 3, 4)),
]


@pytest.mark.usefixtures("_form")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("cached_scale", "scale"), SCALES)
def test_restoration(cached_scale: Scale, scale: Scale, dtype: torch.dtype) -> None:
    tokens = torch.Size(scale).numel()
    generator = torch.Generator().manual_seed(tokens)
    cached = torch.randn(3, torch.Size(cached_scale).numel(), 5, generator=generator)
    cached = cached.to(DEVICE, dtype)
    expected = plain_resize(cached, cached_scale, scale)
    for count in {0, 1, tokens // 2, tokens}:
        rows = [torch.randperm(tokens, generator=generator)[:count] for _ in range(3)]
        index = torch.stack(rows).to(DEVICE)
        kept = torch.randn(3, count, 5, generator=generator).to(DEVICE, dtype)
        before = kept.clone(), index.clone(), cached.clone()
        full = cached_token_restoration(kept, index, cached, cached_scale, scale)
        assert full.shape == (3, tokens, 5)
        assert full.dtype == dtype
        for i in range(3):
            others = torch.ones(tokens, dtype=torch.bool, device=DEVICE)
            others.index_fill_(0, index[i], value=False)
            assert torch.equal(full[i, index[i]], kept[i])
            torch.testing.assert_close(full[i, others], expected[i, others])
        assert all(map(torch.equal, before, (kept, index, cached)))


def plainly_corrected(
    kept: Tensor, index: Tensor, cached: Tensor, cached_scale: Scale, scale: Scale
) -> Tensor:
    """Sample by sample in float64, over the whole resized map."""
    full = plain_resize(cached.double(), cached_scale, scale)
    for sample, own, places in zip(full, kept.double(), index, strict=True):
        if len(places):
            sample += (own - sample[places]).mean(0)
            sample[places] = own
    return full.to(cached.dtype)


def random_restoration(
    batch: int, width: int, share: float, scales: tuple[Scale, Scale], dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, Tensor, Scale, Scale]:
    """Returns the arguments of a restoration, with a drift of about 3 per channel."""
    generator = torch.Generator().manual_seed(seed)
    cached_scale, scale = scales
    tokens = torch.Size(scale).numel()
    count = round(share * tokens)
    cached = torch.randn(batch, torch.Size(cached_scale).numel(), width, generator=generator)
    drift = 3 * torch.randn(batch, 1, width, generator=generator)
    kept = drift + torch.randn(batch, count, width, generator=generator)
    rows = [torch.randperm(tokens, generator=generator)[:count] for _ in range(batch)]
    index = torch.stack(rows).to(DEVICE)
    return kept.to(DEVICE, dtype), index, cached.to(DEVICE, dtype), cached_scale, scale


def plainly_corrected_by_place(
    kept: Tensor, index: Tensor, cached: Tensor, cached_scale: Scale, scale: Scale
) -> Tensor:
    """Token by token in float64."""
    full = plain_resize(cached.double(), cached_scale, scale)
    h, w = scale[-2:]
    for sample, own, places in zip(full, kept.double(), index.tolist(), strict=True):
        drifts = {place: one - sample[place] for place, one in zip(places, own, strict=True)}
        if not drifts:
            continue
        mean = torch.stack([*drifts.values()]).mean(0)
        for token in range(len(sample)):
            near = [
                drift
                for place, drift in drifts.items()
                if place // (h * w) == token // (h * w)
                and abs(place // w - token // w) <= 1
                and abs(place % w - token % w) <= 1
            ]
            sample[token] += torch.stack([mean, *near]).mean(0)
        sample[places] = own
    return full.to(cached.dtype)


CORRECTIONS = [
    (drift_corrected_restoration, plainly_corrected),
    (locally_corrected_restoration, plainly_corrected_by_place),
]


@pytest.mark.usefixtures("_form")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(("restore", "plain"), CORRECTIONS)
def test_correction_of_the_drift(restore: Restore, plain: Restore, dtype: torch.dtype) -> None:
    """Both forms give what is restored by hand, to the rounding of the dtype."""

    @FAST
    @given(
        batch=st.integers(1, 3),
        width=st.integers(1, 9),
        share=st.floats(0, 1),
        small=st.tuples(*2 * [st.integers(1, 4)]),
        grown=st.tuples(*2 * [st.integers(0, 5)]),
        maps=st.sampled_from([(), (1,), (3,)]),
        seed=st.integers(0, 1000),
    )
    def check(
        batch: int,
        width: int,
        share: float,
        small: tuple[int, int],
        grown: tuple[int, int],
        maps: tuple[int, ...],
        seed: int,
    ) -> None:
        large = (small[0] + grown[0], small[1] + grown[1])
        scales = ((*maps, *small), (*maps, *large))
        given_ = random_restoration(batch, width, share, scales, dtype, seed)
        kept, index, cached, *_ = given_
        before = kept.clone(), index.clone(), cached.clone()
        full = restore(*given_)
        assert full.dtype == dtype
        assert all(map(torch.equal, before, (kept, index, cached)))
        assert torch.equal(take_tokens(full, index), kept), "kept tokens stay as computed"
        coarse = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(full, plain(*given_), rtol=coarse, atol=4 * coarse)
        assert torch.equal(full, restore(*given_)), "the same every time"

    check()


@pytest.mark.usefixtures("_form")
def test_the_drift_is_the_mean_difference_at_the_kept_tokens() -> None:
    cached = torch.tensor([[[1.0, 0.0], [5.0, 0.0]], [[0.0, 0.0], [0.0, 8.0]]], device=DEVICE)
    kept = torch.tensor([[[2.0, 1.0], [9.0, 2.0]], [[1.0, 1.0], [3.0, 1.0]]], device=DEVICE)
    index = torch.tensor([[0, 3], [1, 0]], device=DEVICE)
    full = drift_corrected_restoration(kept, index, cached, (1, 2), (1, 4))
    # Sample 0: (2 - 1, 9 - 5) and (1, 2) differ by 2.5 and 1.5 on average; sample 1 by 2 and 1.
    assert full[0].tolist() == [[2.0, 1.0], [3.5, 1.5], [7.5, 1.5], [9.0, 2.0]]
    assert full[1].tolist() == [[3.0, 1.0], [1.0, 1.0], [2.0, 9.0], [2.0, 9.0]]


@pytest.mark.usefixtures("_form")
def test_without_kept_tokens_nothing_is_corrected() -> None:
    given_ = random_restoration(2, 3, 0.0, ((2, 2), (3, 4)), torch.float32, 0)
    for restore, _ in CORRECTIONS:
        assert torch.equal(restore(*given_), cached_token_restoration(*given_))


@pytest.mark.usefixtures("_form")
def test_the_drift_of_half_precision_is_computed_in_float32() -> None:
    kept = torch.tensor([[[1.0], [1.0 + 2**-7]]]).to(DEVICE, torch.bfloat16)  # it rounds the mean
    cached = torch.tensor([[[1.0], [0.0]]]).to(DEVICE, torch.bfloat16)
    index = torch.tensor([[0, 1]], device=DEVICE)
    full = drift_corrected_restoration(kept, index, cached, (1, 2), (1, 4))
    assert full[0, 2:, 0].tolist() == [2**-8, 2**-8]


def test_gradients_pass_through_the_correction() -> None:
    with torch.enable_grad():
        kept, cached = (torch.ones(1, 1, 4, requires_grad=True) for _ in range(2))
        full = drift_corrected_restoration(kept, torch.tensor([[2]]), cached, (1, 1), (2, 2))
        found = torch.autograd.grad(full.sum(), (kept, cached))
    assert [part.flatten().tolist() for part in found] == [4 * [4.0], 4 * [0.0]]


def test_joint_maps_are_resized_each_by_itself() -> None:
    cached = torch.tensor([[[1.0], [2.0]]], device=DEVICE)  # two maps of one token
    assert resize_map(cached, (2, 1, 1), (2, 2, 1)).flatten().tolist() == [1.0, 1.0, 2.0, 2.0]


def test_rows_come_before_columns() -> None:
    cached = torch.arange(4.0, device=DEVICE).view(1, 4, 1)
    resized = resize_map(cached, (2, 2), (2, 4)).flatten().tolist()
    assert resized == [0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0]


@FAST
@given(
    scale=st.tuples(*2 * [st.integers(1, 9)]),
    grown=st.tuples(*2 * [st.integers(0, 20)]),
    maps=st.integers(1, 3),
    width=st.integers(1, 70),
    seed=st.integers(0, 1000),
)
def test_enlarged_maps_are_those_of_interpolate_to_the_bit(
    scale: tuple[int, int], grown: tuple[int, int], maps: int, width: int, seed: int
) -> None:
    h, w = scale
    large = (maps, h + grown[0], w + grown[1])
    generator = torch.Generator().manual_seed(seed)
    cached = torch.randn(2, maps * h * w, width, generator=generator)
    expected = plain_resize(cached, (maps, h, w), large)
    assert torch.equal(resize_map(cached, (maps, h, w), large), expected)


def test_resizing_keeps_infinite_values_to_their_windows() -> None:
    cached = torch.tensor([[[torch.inf], [1.0], [torch.nan], [2.0]]])
    resized = resize_map(cached, (1, 4), (1, 8)).flatten().tolist()
    assert resized[:4] == [torch.inf, torch.inf, 1.0, 1.0]
    assert resized[6:] == [2.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("width", [1, 3, 16])
def test_tokens_are_put_to_the_bit(dtype: torch.dtype, width: int) -> None:
    size = dtype.itemsize
    generator = torch.Generator().manual_seed(0)
    full, kept = (  # any bits, those of NaN among them
        torch.randint(-128, 128, (2, n, width * size), generator=generator, dtype=torch.int8)
        for n in (6, 3)
    )
    index = torch.tensor([[0, 2, 5], [1, 3, 4]])
    expected = full.scatter(1, index.unsqueeze(-1).expand_as(kept), kept)
    shifted = torch.empty(kept.numel() + size, dtype=torch.int8)[size:].view_as(kept).copy_(kept)
    apart = torch.cat([kept, kept[..., :size]], dim=2)[..., :-size]
    for part in (kept, apart, shifted):
        put = put_tokens(full.clone().view(dtype), index, part.view(dtype))
        assert torch.equal(put.view(torch.int8), expected)


def test_gradients_pass_through_restoration_twice() -> None:
    with torch.enable_grad():
        kept, cached = (torch.ones(1, 1, 4, requires_grad=True) for _ in range(2))
        factor, index = torch.ones((), requires_grad=True), torch.tensor([[2]])
        full = cached_token_restoration(kept, index, cached, (1, 1), (2, 2))
        first = torch.autograd.grad((factor * full).sum(), (kept, cached), create_graph=True)
        second = torch.autograd.grad(first[0].sum() + first[1].sum(), factor)
    assert [part.flatten().tolist() for part in first] == [4 * [1.0], 4 * [3.0]]
    assert [part.item() for part in second] == [16.0]


@pytest.mark.usefixtures("_form")
def test_take_and_put_are_per_sample() -> None:
    x = torch.arange(12.0, device=DEVICE).view(2, 3, 2)
    index = torch.tensor([[2, 0], [1, 2]], device=DEVICE)
    taken = take_tokens(x, index)
    assert taken.tolist() == [[[4.0, 5.0], [0.0, 1.0]], [[8.0, 9.0], [10.0, 11.0]]]
    assert torch.equal(put_tokens(x.clone(), index, taken), x)
    put = put_tokens(torch.zeros_like(x), index, taken)
    assert put[0, 1].tolist() == put[1, 0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "restore",
    [cached_token_restoration, drift_corrected_restoration, locally_corrected_restoration],
)
def test_what_compilers_are_given_scatters_no_features(restore: Restore) -> None:
    def add_restored(trunk: Tensor, kept: Tensor, index: Tensor, cached: Tensor) -> Tensor:
        full: Tensor = restore(kept, index, cached, (2, 2), (4, 4)).add_(trunk)
        return full

    def backend(graph_module: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        written = [n for n in graph_module.graph.nodes if "scatter" in str(n.target)]
        assert written
        assert {n.meta["example_value"].shape for n in written} == {(2, 16)}
        assert "index_copy" not in graph_module.code
        return graph_module.forward

    trunk, kept, cached = (torch.randn(2, n, 3, device=DEVICE) for n in (16, 5, 4))
    index = torch.stack([torch.randperm(16, device=DEVICE)[:5] for _ in range(2)])
    compiled = torch.compile(add_restored, backend=backend, fullgraph=True)
    expected = add_restored(trunk, kept, index, cached)
    torch.testing.assert_close(compiled(trunk, kept, index, cached), expected)


@pytest.mark.parametrize(
    ("kept", "index", "cached", "scales", "message"),
    [
        ((2, 3), (2, 3), (2, 4, 5), ((2, 2), (4, 4)), r"needs kept \(B, kept, C\).*found kept \(2"),
        ((2, 3, 5), (2, 4), (2, 4, 5), ((2, 2), (4, 4)), r"index \(2, 4\)"),
        ((2, 3, 5), (3,), (2, 4, 5), ((2, 2), (4, 4)), r"index \(3,\)"),
        ((2, 3, 5), (2, 3), (2, 20), ((2, 2), (4, 4)), r"cached \(2, 20\)"),
        ((2, 3, 5), (2, 3), (2, 4, 5), ((3, 2), (4, 4)), r"scale \(3, 2\) of 6 tokens.*\(2, 4, 5"),
        ((2, 3, 5), (2, 3), (2, 4, 6), ((2, 2), (4, 4)), "tensors of one batch and width"),
        ((2, 3, 5), (2, 3), (1, 4, 5), ((2, 2), (4, 4)), "tensors of one batch and width"),
        ((2, 3, 5), (2, 3), (2, 8, 5), ((2, 2, 2), (3, 4, 4)), "equally many maps"),
        ((2, 3, 5), (2, 3), (2, 8, 5), ((2, 2, 2), (4, 4)), "equally many maps"),
    ],
)
def test_restoration_refuses_shapes_that_do_not_fit(
    kept: tuple[int, ...],
    index: tuple[int, ...],
    cached: tuple[int, ...],
    scales: tuple[Scale, Scale],
    message: str,
) -> None:
    indices = torch.zeros(index, dtype=torch.int64)
    for restore in (cached_token_restoration, *(corrected for corrected, _ in CORRECTIONS)):
        with pytest.raises(ValueError, match=message):
            restore(torch.zeros(kept), indices, torch.zeros(cached), *scales)


def test_restoration_refuses_dtypes_that_differ() -> None:
    kept, index = torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.int64)
    for restore in (cached_token_restoration, *(corrected for corrected, _ in CORRECTIONS)):
        with pytest.raises(ArgumentError, match=r"one dtype; found torch.float32 and torch.bfloat"):
            restore(kept, index, torch.zeros(1, 4, 3, dtype=torch.bfloat16), (2, 2), (4, 4))


@pytest.mark.slow
@pytest.mark.parametrize(
    "restore",
    [cached_token_restoration, drift_corrected_restoration, locally_corrected_restoration],
)
def test_restorations_compile_where_sizes_vary(restore: Restore) -> None:
    compiled = torch.compile(restore, dynamic=True)
    for side, cached_side, count in ((8, 6, 16), (12, 8, 40)):
        index = pivotal_token_selection(torch.randn(2, side**2, 16), count)
        kept, cached = torch.randn(2, count, 16), torch.randn(2, cached_side**2, 16)
        given = (kept, index, cached, (cached_side, cached_side), (side, side))
        torch.testing.assert_close(compiled(*given), restore(*given))

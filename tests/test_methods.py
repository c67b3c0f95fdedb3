"""The methods to compare with, alone and inside a transformed model."""

import doctest
import subprocess
import sys
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import fastvar_fx
from fastvar_fx import ArgumentError, Method, methods
from fastvar_fx.models.var import VAR, build
from fastvar_fx.ops import Scale, put_tokens, take_tokens
from tests.graph_double import record
from tests.marks import mostly_slow

SCALES: tuple[Scale, ...] = ((1, 1), (2, 2), (3, 3), (4, 4))
SCHEDULE = fastvar_fx.Schedule(SCALES, (0.5,))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_docstrings() -> None:
    result = doctest.testmod(methods)
    assert result.attempted > 0
    assert result.failed == 0


# -- selection ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 1, 5, 12])
@pytest.mark.parametrize(
    "rule",
    [
        *("random", "lowest", "grid", "high-pass"),
        *("stepvar", "sparsevar", "fastervar", "depthvar", "lazyvar"),
    ],
)
def test_a_selection_is_ascending_and_of_the_asked_size(rule: str, kept: int) -> None:
    captured: Any = {"cached": noise(3, 4, 5), "cached_scale": (2, 2), "scale": (3, 4)}
    rules: dict[str, Any] = {
        "random": methods.random_tokens,
        "lowest": methods.lowest_scores,
        "grid": partial(methods.uniform_grid, scale=(3, 4)),
        "high-pass": partial(methods.high_pass_tokens, scale=(3, 4)),
        "stepvar": partial(methods.stepvar().select, scale=(3, 4)),
        "sparsevar": partial(methods.sparsevar().select, **captured),
        "fastervar": methods.fastervar().select,
        "depthvar": lambda x, kept: in_layer(x, kept, layer=1, layers=3)[0],
        "lazyvar": partial(methods.lazyvar().select, kept_before=0.5, **captured),
    }
    index = rules[rule](noise(3, 12, 5), kept)
    assert index.shape == (3, kept)
    assert index.dtype == torch.int64
    assert (index[:, 1:] > index[:, :-1]).all()
    assert ((index >= 0) & (index < 12)).all()


def test_random_tokens_follow_the_seed_and_differ_by_sample() -> None:
    x = torch.zeros(2, 100, 3, dtype=torch.bfloat16)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        index = methods.random_tokens(x, 50)
        torch.manual_seed(5)
        assert torch.equal(methods.random_tokens(x, 50), index)
    assert not torch.equal(index[0], index[1])


def test_the_lowest_scores_are_those_that_pivotal_selection_leaves() -> None:
    x = noise(2, 10, 4)
    both = torch.cat(
        [methods.lowest_scores(x, 4), fastvar_fx.ops.pivotal_token_selection(x, 6)], dim=1
    )
    assert torch.equal(both.sort(dim=1).values, torch.arange(10).expand(2, 10))


@pytest.mark.parametrize("kept", [16, 64, 128])
def test_the_grid_fills_every_quarter_of_the_map_alike(kept: int) -> None:
    index = methods.uniform_grid(torch.zeros(1, 256, 1), kept, scale=(16, 16))
    chosen = torch.zeros(256).index_fill(0, index[0], 1).view(2, 8, 2, 8)
    quarters = chosen.sum(dim=(1, 3)).flatten()
    assert (quarters - kept / 4).abs().max() <= 2


def test_the_grid_stacks_joint_maps() -> None:
    x = torch.zeros(1, 24, 1)
    joint, stacked = (methods.uniform_grid(x, 6, scale=scale) for scale in ((2, 3, 4), (6, 4)))
    assert torch.equal(joint, stacked)
    assert not torch.equal(joint, methods.uniform_grid(x, 6, scale=(4, 6)))


def test_high_pass_tokens_differ_from_those_around_them() -> None:
    x = torch.tensor([[[0.0], [0.0], [9.0], [9.0], [9.0], [5.0], [9.0], [9.0]]])
    assert methods.high_pass_tokens(x, 3, scale=(1, 8)).tolist() == [[1, 2, 5]]
    # As two maps of one row, the step between tokens 3 and 4 is between maps.
    x = torch.tensor([[[0.0], [0.0], [0.0], [0.0], [9.0], [9.0], [9.0], [8.0]]])
    assert methods.high_pass_tokens(x, 2, scale=(2, 1, 4)).tolist() == [[6, 7]]


def test_stepvar_adds_texture_and_structure() -> None:
    # Texture 0, 4/3, 8/3, 2 and structure 1, 1, 3, 1, each over the largest.
    x = torch.tensor([[[0.0], [0.0], [4.0], [0.0]]])
    step = methods.stepvar()
    assert [step.select(x, n, scale=(1, 4)).tolist() for n in (1, 2, 3)] == [
        [[2]],
        [[2, 3]],
        [[1, 2, 3]],
    ]
    assert step.restore is methods.nearest_kept


def test_the_structure_of_stepvar_is_the_first_principal_component() -> None:
    x = noise(3, 36, 5) * torch.tensor([9.0, 1, 1, 1, 1])
    centred = x - x.mean(1, keepdim=True)
    component = torch.linalg.svd(centred, full_matrices=False).Vh[:, :1]
    structure = (centred @ component.mT).squeeze(2).abs()
    maps = x.view(3, 6, 6, 5)
    around = torch.stack(
        [
            maps[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].mean((1, 2))
            for i in range(6)
            for j in range(6)
        ],
        dim=1,
    )
    texture = (x - around).norm(dim=2)
    scores = texture / texture.amax(1, keepdim=True) + structure / structure.amax(1, keepdim=True)
    want = scores.topk(9, dim=1).indices.sort(1).values
    assert torch.equal(methods.stepvar().select(x, 9, scale=(6, 6)), want)


def test_sparsevar_keeps_anchors_and_what_changed() -> None:
    cached = torch.arange(8.0).view(1, 8, 1) * torch.tensor([0.6, -0.8])
    sparse = methods.sparsevar()
    scales: Any = {"cached_scale": (1, 8), "scale": (1, 8)}
    index = sparse.select(torch.zeros(1, 8, 3), 4, cached=cached, **scales)
    assert index.tolist() == [[0, 5, 6, 7]], "the anchor of four kept tokens is the first token"
    assert sparse.restore is methods.nearest_kept


def test_fastervar_draws_by_squared_norms() -> None:
    draw_tokens = methods.fastervar().select
    x = torch.tensor([0.0, 2.0, 0.0, 1.0, 0.0, 3.0]).view(1, 6, 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert draw_tokens(x, 3).tolist() == [[1, 3, 5]]
        many = draw_tokens(torch.tensor([[3.0], [1.0]]).expand(4000, 2, 1), 1)
    assert many.float().mean().item() == pytest.approx(0.1, abs=0.02)


def in_layer(x: Tensor, kept: int, **given: Any) -> tuple[Tensor, Tensor]:
    """Returns what DepthVAR selects in a layer, at the first pruned step."""
    selected: tuple[Tensor, Tensor] = methods.depthvar().select(
        x, kept, **{"selected": None, "kept_before": 0.0, **given}
    )
    return selected


def test_depthvar_gives_tokens_layers_by_their_rank() -> None:
    x = torch.tensor([[[0.0], [9.0], [1.0], [2.0]]])  # 3, 6, 2 and 1 from the mean
    # Of two layers the tokens run in shares 10, 14, 6 and 2 of 16, which end at 10, 24, 30 and 32:
    # the first layer takes those that pass 16 or 32, the second those that pass 8 or 24.
    (first, ranks), (second, _) = (in_layer(x, 2, layer=layer, layers=2) for layer in (0, 1))
    assert ranks.tolist() == [[1, 0, 2, 3]]
    assert first.tolist() == [[1, 3]]
    assert second.tolist() == [[0, 1]]
    later, ranks = in_layer(x, 2, layer=0, layers=2, kept_before=0.5)
    assert ranks.tolist() == [[3, 2, 0, 1]], "those that were kept before come last"
    assert later.tolist() == [[2, 3]]
    again, known = in_layer(x + noise(1, 4, 1), 2, layer=0, layers=2, selected=(second, ranks))
    assert (again.tolist(), known.tolist()) == (later.tolist(), ranks.tolist()), "known already"


@pytest.mark.parametrize("kept", [1, 16, 40, 64])
def test_the_depths_of_depthvar_are_the_shares_of_the_layers(kept: int) -> None:
    x, layers, tokens = noise(2, 64, 5), 12, 64
    chosen = [in_layer(x, kept, layer=layer, layers=layers) for layer in range(layers)]
    depths = torch.zeros(2, tokens, dtype=torch.int64)
    for index, _ in chosen:
        assert all(len(set(each)) == kept for each in index.tolist())
        depths.scatter_add_(1, index, torch.ones_like(index))
    ranks = chosen[0][1]
    share = kept / tokens
    shares = share + min(share, 1 - share) * (tokens - 1 - 2 * ranks) / tokens
    assert ((depths - layers * shares).abs() < 1).all()
    assert depths.sum() == 2 * layers * kept


def test_lazyvar_keeps_other_tokens_at_each_step() -> None:
    norms = torch.tensor([5.0, 1, 8, 2, 7, 3, 6, 4])
    given: Any = {"cached": norms.view(1, 8, 1), "cached_scale": (1, 8)}
    lazy = methods.lazyvar()
    x = torch.zeros(1, 8, 3)
    select = partial(lazy.select, x, scale=(1, 8), **given)
    assert [select(kept, kept_before=k).tolist() for kept, k in ((3, 0.0), (4, 3 / 8))] == [
        [[2, 4, 6]],
        [[0, 3, 5, 7]],
    ]
    assert select(2, kept_before=7 / 8).tolist() == [[1, 2]], "after the last comes the first"
    larger = lazy.select(torch.zeros(1, 16, 3), 4, scale=(1, 16), kept_before=3 / 8, **given)
    assert larger.tolist() == [[0, 1, 14, 15]], "as the map of another step"
    assert lazy.once == "step"


# -- restoration --------------------------------------------------------------------------------


def test_zeros_leave_the_other_tokens_empty() -> None:
    kept, index = torch.ones(1, 1, 2), torch.tensor([[2]])
    full = methods.zeros(kept, index, torch.full((1, 1, 2), 9.0), (1, 1), (2, 2))
    assert full[0, :, 0].tolist() == [0, 0, 1, 0]


def test_the_nearest_kept_token_is_near_on_the_map_and_in_it() -> None:
    kept = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
    index = torch.tensor([[0, 7], [3, 4]])  # of a map of 2 x 4
    cached = torch.zeros(2, 1, 1)
    full = methods.nearest_kept(kept, index, cached, (1, 1), (2, 4))
    assert full[0, :, 0].tolist() == [1, 1, 2, 2, 1, 1, 2, 2]
    assert full[1, :, 0].tolist() == [4, 4, 3, 3, 4, 4, 3, 3]
    joint = methods.nearest_kept(kept[:1], index[:1], cached[:1], (2, 1, 1), (2, 2, 2))
    assert joint[0, :, 0].tolist() == [1, 1, 1, 1, 2, 2, 2, 2]


def test_interpolation_resizes_each_map_by_itself() -> None:
    cached = torch.tensor([[[1.0], [3.0]]])  # two maps of one token
    nothing = cached[:, :0], torch.zeros(1, 0, dtype=torch.int64)
    for mode in ("nearest", "bilinear", "area"):
        full = methods.interpolated(mode)(*nothing, cached, (2, 1, 1), (2, 1, 2))
        assert full.flatten().tolist() == [1, 1, 3, 3]
    bilinear = methods.interpolated("bilinear")(*nothing, cached, (1, 2), (1, 4))
    assert bilinear.flatten().tolist() == [1, 1.5, 2.5, 3]
    with pytest.raises(ValueError, match=r"found 'cubic'"):
        methods.interpolated("cubic")  # type: ignore[arg-type]


def test_rules_without_a_cache_need_a_kept_token() -> None:
    nothing = torch.zeros(1, 0, 2), torch.zeros(1, 0, dtype=torch.int64)
    cached = torch.zeros(1, 1, 2)
    with pytest.raises(ValueError, match="nearest_kept needs at least one"):
        methods.nearest_kept(*nothing, cached, (1, 1), (2, 2))
    with pytest.raises(ValueError, match="token_merging needs at least one"):
        methods.token_merging().restore(*nothing, cached, (1, 1), (2, 2))


# -- merging ------------------------------------------------------------------------------------


def test_merging_averages_the_most_similar_tokens_and_copies_the_result() -> None:
    # The evenly spread destination of a 2 x 2 map is its first token.
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [-1.0, 0.0]]])
    merging = methods.token_merging()
    selection = merging.select(x, 3, scale=(2, 2))
    stays, slots = selection
    assert stays.tolist() == [[0, 1, 3]]
    assert slots.tolist() == [[0, 1, 0, 2]]
    merged = merging.take(x, selection)
    torch.testing.assert_close(merged[0, 0], torch.tensor([0.95, 0.05]))
    assert torch.equal(merged[0, 1:], x[0, [1, 3]])
    full = merging.restore(merged, selection, x, (2, 2), (2, 2))
    assert torch.equal(full[0, 2], full[0, 0])


@pytest.mark.parametrize("kept", [1, 4, 7, 16])
def test_merging_keeps_the_asked_number_and_the_mean_of_constant_maps(kept: int) -> None:
    merging = methods.token_merging()
    x = noise(3, 16, 6)
    stays, slots = merging.select(x, kept, scale=(4, 4))
    assert stays.shape == (3, kept)
    assert slots.shape == (3, 16)
    own = slots.gather(1, stays)
    assert torch.equal(own, torch.arange(kept).expand_as(own)), "what stays is in its own group"
    constant = torch.full((3, 16, 6), 2.0)
    merged = merging.take(constant, (stays, slots))
    restored = merging.restore(merged, (stays, slots), x, (4, 4), (4, 4))
    assert torch.equal(restored, constant)


# -- inside the pass ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> VAR:
    return build("tiny", scales=(1, 2, 3, 4), depth=2, width=32, heads=2)


def draw(model: VAR) -> Tensor:
    return model.infer_fhat(2, 1, g_seed=0)


@pytest.mark.parametrize("name", methods.names()[1:])
def test_every_method_prunes_what_the_papers_prunes(model: VAR, name: str) -> None:
    plain, fast = (fastvar_fx.transform(model, SCHEDULE, method=m) for m in ("fastvar", name))
    images = [draw(fastvar_fx.transform(model, fastvar_fx.Schedule(SCALES, ()))), draw(plain)]
    other = draw(fast)
    assert all(not torch.equal(other, image) for image in images)
    kept = [[(r.step, r.branch, r.kept) for r in fastvar_fx.explain(m).rows] for m in (plain, fast)]
    assert kept[0] == kept[1]
    assert any(count == 8 for _, _, count in kept[0])


def test_the_papers_method_is_the_default(model: VAR) -> None:
    images = [
        draw(fastvar_fx.transform(model, SCHEDULE, **given))
        for given in ({}, {"method": "fastvar"}, {"method": Method()})
    ]
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])


def test_what_is_no_method(model: VAR) -> None:
    def transform(method: Any) -> None:
        fastvar_fx.transform(model, SCHEDULE, method=method)

    with pytest.raises(ArgumentError, match=r"named 'tomes'; did you mean tome\?"):
        transform("tomes")
    with pytest.raises(ArgumentError, match=r"did you mean fastvar or drift-corrected or"):
        transform("?")
    with pytest.raises(ArgumentError, match=r"or one of fastvar, .*; found function"):
        transform(methods.zeros)
    with pytest.raises(ArgumentError, match=r"select of a Method is a function; found 'random'"):
        Method(select="random")  # type: ignore[arg-type]
    for once in (True, 0, "steps"):
        with pytest.raises(ArgumentError, match=rf"\"block\" or \"step\"; found {once!r}"):
            Method(once=once)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="positional"):
        Method(methods.random_tokens)  # type: ignore[call-arg]


def test_functions_without_a_name_are_wrapped() -> None:
    x = noise(1, 12, 5)
    select = Method(select=partial(methods.lowest_scores)).select
    assert select.__name__
    assert torch.equal(select(x, 5), methods.lowest_scores(x, 5))
    assert Method(select=methods.lowest_scores).select is methods.lowest_scores


def test_only_restorations_of_the_package_are_known_to_be_new_memory() -> None:
    assert Method().restores_anew
    assert methods.method_of("drift-corrected").restores_anew
    assert not Method(restore=methods.interpolated("area")).restores_anew


def test_a_name_is_what_it_says() -> None:
    named = {name: methods.method_of(name) for name in methods.names()}
    restore = fastvar_fx.ops.drift_corrected_restoration
    assert named["drift-corrected"] == Method(restore=restore)
    assert named["drift-corrected-grid"] == Method(
        select=methods.uniform_grid, restore=fastvar_fx.ops.locally_corrected_restoration
    )
    assert named["high-pass"] == Method(select=methods.high_pass_tokens)
    assert named["once-per-block"] == Method(once="block")
    assert named["once-per-step"] == Method(once="step")
    assert named["random"] == Method(select=methods.random_tokens)
    assert named["lowest-scores"] == Method(select=methods.lowest_scores)
    assert named["zeros"] == Method(restore=methods.zeros)
    assert named["nearest-kept"] == Method(restore=methods.nearest_kept)
    x, cached = noise(2, 16, 5), noise(2, 9, 5, seed=1)
    assert named["uniform-grid"] == Method(select=methods.uniform_grid)
    index = methods.uniform_grid(x, 6, scale=(4, 4))
    kept = take_tokens(x, index)
    for mode in ("bilinear", "nearest"):
        want = methods.interpolated(mode)(kept, index, cached, (3, 3), (4, 4))
        assert torch.equal(named[mode].restore(kept, index, cached, (3, 3), (4, 4)), want)
    assert named["tome"] == methods.token_merging()


@pytest.mark.slow
def test_the_library_needs_torch_and_numpy_alone() -> None:
    code = """
import sys
for name in ("einops", "safetensors", "PIL", "matplotlib", "typer", "rich"):
    sys.modules[name] = None
import fastvar_fx
from fastvar_fx.models import build
model = build("tiny", scales=(1, 2, 3), depth=1, width=32, heads=1)
schedule = fastvar_fx.Schedule((1, 2, 3), (0.5,))
fastvar_fx.transform(model, schedule, method="tome").infer_fhat(1, 0)
assert fastvar_fx.methods.zeros
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


class Loop(nn.Module):
    """One linear branch, and a loop that draws given maps."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Residual()
        self.blocks = nn.ModuleList([self.block])

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [self.block(x) for x in maps]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.fc(x).relu()
        return y


@torch.no_grad()
def test_merging_runs_the_branch_on_the_means() -> None:
    loop = Loop().eval()
    maps = [noise(2, side**2, 6, seed=side) for side in (1, 2, 3, 4)]
    merging = methods.token_merging()
    fast = fastvar_fx.transform(loop, SCHEDULE, blocks="blocks", method="tome")
    out, x = fast(maps)[-1], maps[-1]
    selection = merging.select(x, 8, scale=(4, 4))
    branch = loop.block.fc(merging.take(x, selection)).relu()
    torch.testing.assert_close(out, x + take_tokens(branch, selection[1]))


def test_a_block_may_select_once_for_all_its_branches(model: VAR) -> None:
    seen: list[Tensor] = []

    def select(x: Tensor, kept: int) -> Tensor:
        index = fastvar_fx.ops.pivotal_token_selection(x, kept)
        seen.append(index)
        return index

    def put(
        kept: Tensor, index: Tensor, cached: Tensor, cached_scale: Scale, scale: Scale
    ) -> Tensor:
        used.append(index)
        full = fastvar_fx.ops.resize_map(cached, cached_scale, scale)
        return put_tokens(full, index, kept)

    counts: dict[methods.Once, int] = {False: 4, "block": 2}
    for once, selections in counts.items():
        method = Method(select=select, restore=put, once=once)
        fast = fastvar_fx.transform(model, SCHEDULE, method=method)
        used: list[Tensor] = []
        draw(fast)  # traces
        seen.clear()
        used.clear()
        draw(fast)
        assert len(seen) == selections
        shared = [torch.equal(a, b) for a, b in zip(used[::2], used[1::2], strict=True)]
        assert all(shared) if once else not all(shared)


GIVEN = {
    "cached": None, "cached_scale": (3, 3), "scale": (4, 4), "step": 3, "layer": 1, "layers": 2
}  # fmt: skip


@pytest.mark.parametrize("rule", ["select", "take", "restore"])
def test_rules_are_given_what_they_ask_for(model: VAR, rule: str) -> None:
    seen: list[dict[str, Any]] = []
    plain: Any = getattr(Method(), rule)

    def asking(
        *args: Any,
        cached: Tensor,
        cached_scale: Scale,
        scale: Scale,
        step: int,
        layer: int,
        layers: int,
        own: str = "left alone",
    ) -> Any:
        assert own == "left alone"
        given = {"cached_scale": cached_scale, "scale": scale, "step": step}
        seen.append(given | {"layer": layer, "layers": layers, "cached": cached})
        return plain(*args)

    def noting(kept: Tensor, index: Tensor, cached: Tensor, *scales: Scale) -> Tensor:
        captured.append(cached)
        return fastvar_fx.ops.cached_token_restoration(kept, index, cached, *scales)

    asked: Any = {rule: asking}
    method = Method(**asked)
    assert method.asks[rule] == tuple(GIVEN)  # type: ignore[index]
    fast, plainly = (
        fastvar_fx.transform(model, SCHEDULE, method=each)
        for each in (method, Method(restore=noting))
    )
    captured: list[Tensor] = []
    for each in (fast, plainly):
        draw(each)  # traces
    seen.clear()
    captured.clear()
    assert torch.equal(draw(fast), draw(plainly))
    assert [{**each, "cached": None} for each in seen] == [
        GIVEN | {"layer": layer} for layer in (0, 0, 1, 1)
    ]
    assert all(torch.equal(each["cached"], own) for each, own in zip(seen, captured, strict=True))


def test_blocks_share_programs_unless_a_rule_asks_for_the_layer(model: VAR) -> None:
    def by_scale(x: Tensor, kept: int, *, scale: Scale) -> Tensor:
        return fastvar_fx.ops.pivotal_token_selection(x, kept)

    def by_layer(x: Tensor, kept: int, *, layer: int) -> Tensor:
        return fastvar_fx.ops.pivotal_token_selection(x, kept)

    programs = []
    for select in (by_scale, by_layer):
        fast = fastvar_fx.transform(model, SCHEDULE, method=Method(select=select))
        draw(fast)
        rows = fastvar_fx.explain(fast).rows
        programs.append(len({row.program for row in rows if row.step == 3}))
    assert programs == [1, 2]


def test_what_a_rule_cannot_ask_for() -> None:
    def select(x: Tensor, kept: int, *, scales: Scale) -> Tensor:
        raise AssertionError

    with pytest.raises(ArgumentError, match=r"select of a Method asks for 'scales'.*mean scale"):
        Method(select=select)
    assert Method(select=partial(select, scales=(4, 4))).asks["select"] == ()

    def knowing(*_: Any, selected: Any) -> Tensor:
        raise AssertionError

    for given in ({"select": knowing}, {"restore": knowing, "once": "step"}):
        (rule, *_) = given
        with pytest.raises(ArgumentError, match=rf'with once="step"; found that {rule} ask'):
            Method(**given)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            {"restore": lambda kept, *_: kept},
            r"restore.*return \(4, 16, 32\) float32 for attn.*8 tokens.*it returned \(4, 8, 32\)",
        ),
        (
            {"restore": lambda *args: fastvar_fx.ops.cached_token_restoration(*args).double()},
            r"\(4, 16, 32\) float32 .*returned \(4, 16, 32\) float64",
        ),
        ({"restore": lambda *_: None}, "restore .*it returned None"),
        (
            {"select": lambda x, kept: torch.arange(kept)},
            r"select .*return \(4, 8\) int64.*it returned \(8,\) int64",
        ),
        ({"select": lambda x, kept: x[:, :kept, 0] > 0}, r"int64.*it returned \(4, 8\) bool"),
    ],
)
def test_a_rule_that_returns_something_else(model: VAR, rule: Any, message: str) -> None:
    for strict in (True, False):
        fast = fastvar_fx.transform(model, SCHEDULE, method=Method(**rule), strict=strict)
        with pytest.raises(ArgumentError, match=message):
            draw(fast)


def corrected_by_hand(
    kept: Tensor, index: Tensor, cached: Tensor, cached_scale: Scale, scale: Scale
) -> Tensor:
    full = fastvar_fx.ops.resize_map(cached, cached_scale, scale)
    drift = (kept - take_tokens(full, index)).mean(dim=1, keepdim=True)
    return full.add(drift).scatter(1, index.unsqueeze(-1).expand_as(kept), kept)


@pytest.mark.parametrize("once", mostly_slow([False, "block"], quick=1))
@pytest.mark.parametrize("path", ["eager", "compiled", "recorded", "several schedules"])
def test_the_corrected_method_on_every_path(model: VAR, path: str, once: methods.Once) -> None:
    method = replace(methods.method_of("drift-corrected"), once=once)
    by_hand = Method(restore=corrected_by_hand, once=once)
    want = draw(fastvar_fx.transform(model, SCHEDULE, method=by_hand))
    paper = draw(fastvar_fx.transform(model, SCHEDULE, method=Method(once=once)))
    several = (SCHEDULE, fastvar_fx.Schedule((*SCALES[:3], (3, 5)), (0.5,)))
    schedule = several if path == "several schedules" else SCHEDULE
    fast = fastvar_fx.transform(model, schedule, method=method)
    if path == "recorded":
        got = record(fast, lambda m, _: draw(m), torch.zeros(1))(torch.zeros(1))
    else:
        got = draw(fastvar_fx.compile(fast, backend="eager") if path == "compiled" else fast)
    torch.testing.assert_close(got, want)
    assert (paper - want).abs().max() > 1e-2


class Remembering:
    """A selection that the first branch of a generation makes and the others repeat, by hand."""

    def __init__(self, method: Method) -> None:
        self.made: list[Any] = []

        @wraps(method.select)
        def select(x: Tensor, kept: int, **asked: Any) -> Any:
            if isinstance(x, FakeTensor):  # a program is made
                return method.select(x, kept, **asked)
            if not self.made:
                self.made.append(method.select(x, kept, **asked))
            return self.made[0]

        self.method = replace(method, select=select)


@pytest.mark.parametrize("path", mostly_slow(["eager", "compiled", "recorded"], quick=1))
@pytest.mark.parametrize("name", ["fastvar", "drift-corrected", "tome"])
def test_all_blocks_of_a_step_may_share_a_selection(name: str, path: str) -> None:
    deep = build("tiny", scales=(1, 2, 3, 4), depth=3, width=32, heads=2)
    for parameter in deep.blocks.parameters():
        parameter.data *= 2  # so that each block would select other tokens
    chosen = methods.method_of(name)
    hand = Remembering(chosen)
    by_hand = fastvar_fx.transform(deep, SCHEDULE, method=hand.method)
    for _ in range(2):  # the first one traces
        hand.made.clear()
        want = draw(by_hand)
    if name != "tome":  # whose groups are the same in all of these blocks
        alone = draw(fastvar_fx.transform(deep, SCHEDULE, method=replace(chosen, once="block")))
        assert not torch.allclose(want, alone, atol=1e-3)
    fast = fastvar_fx.transform(deep, SCHEDULE, method=replace(chosen, once="step"))
    if path == "recorded":
        got = record(fast, lambda m, _: draw(m), torch.zeros(1))(torch.zeros(1))
    else:
        fast = fastvar_fx.compile(fast, backend="eager") if path == "compiled" else fast
        got = draw(fast)
        assert torch.equal(draw(fast), got)
    torch.testing.assert_close(got, want)
    rows = [row for row in fastvar_fx.explain(fast).rows if row.step == 3]
    assert {row.block: row.program for row in rows}.keys() == {f"blocks.{i}" for i in range(3)}
    first, *others = [row.program for row in rows if row.branch == rows[0].branch]
    assert first not in others
    assert len(set(others)) == 1, "blocks that take a selection share a program"


class DepthByHand:
    """DepthVAR that counts its layers and hands the ranks on by hand, drawn for the second time."""

    def __init__(self, layers: int) -> None:
        rule = methods.depthvar().select
        self.calls = 0
        ranks, before = None, 0.0

        def select(x: Tensor, kept: int) -> Tensor:
            nonlocal ranks, before
            layer = self.calls % layers
            self.calls += not isinstance(x, FakeTensor)
            before = before if self.calls > 1 else 0.0
            given = {"layer": layer, "layers": layers, "kept_before": before}
            index, ranks = rule(x, kept, selected=(None, ranks) if layer else None, **given)
            if layer == layers - 1:
                before += kept / x.shape[1]
            return index  # type: ignore[no-any-return]

        self.method = Method(select=select, once="block")


RIVALS = fastvar_fx.Schedule(SCALES, (0.5, 0.75))


@pytest.fixture(scope="module")
def deep() -> VAR:
    model = build("tiny", scales=(1, 2, 3, 4), depth=2, width=32, heads=2)
    for parameter in model.blocks.parameters():
        parameter.data *= 2  # so that each block would select other tokens
    return model


LATER = [pytest.param(path, marks=pytest.mark.slow) for path in ("recorded", "compiled")]


@pytest.mark.parametrize("path", ["eager", *LATER])
def test_the_ranks_of_depthvar_go_from_block_to_block(deep: VAR, path: str) -> None:
    hand = DepthByHand(layers=2)
    by_hand = fastvar_fx.transform(deep, RIVALS, method=hand.method)
    draw(by_hand)  # traces
    hand.calls = 0
    want = draw(by_hand)
    assert hand.calls == 4
    fast = fastvar_fx.transform(deep, RIVALS, method="depthvar")
    if path == "recorded":
        got = record(fast, lambda m, _: draw(m), torch.zeros(1))(torch.zeros(1))
    else:
        got = draw(fastvar_fx.compile(fast) if path == "compiled" else fast)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("path", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_the_steps_of_lazyvar_keep_other_tokens(deep: VAR, path: str) -> None:
    made: dict[int, list[Tensor]] = {}
    lazy = methods.lazyvar()

    @wraps(lazy.select)
    def select(x: Tensor, kept: int, **asked: Any) -> Tensor:
        index: Tensor = lazy.select(x, kept, **asked)
        made.setdefault(x.shape[1], []).append(index)
        assert asked["kept_before"] == (0 if x.shape[1] == 9 else 5 / 9)
        return index

    noting = fastvar_fx.transform(deep, RIVALS, method=replace(lazy, select=select))
    draw(noting)
    made.clear()
    want = draw(noting)
    assert {tokens: [x.shape[1] for x in each] for tokens, each in made.items()} == {
        9: [5],
        16: [4],
    }, "one selection for all blocks of a step"
    fast = fastvar_fx.transform(deep, RIVALS, method="lazyvar")
    if path == "compiled":
        fastvar_fx.compile(fast)
    torch.testing.assert_close(draw(fast), want)


@pytest.mark.slow
def test_a_batch_of_another_size_selects_anew(model: VAR) -> None:
    """Guidance as two calls of different batches, as where a loop drops some samples."""
    fast = fastvar_fx.transform(model, SCHEDULE, method="once-per-step")
    for batch in (2, 3, 2):
        plain = fastvar_fx.transform(model, SCHEDULE, method="once-per-step")
        want, got = (each.infer_fhat(batch, 1, g_seed=0) for each in (plain, fast))
        torch.testing.assert_close(got, want)


def test_a_selection_of_several_tensors_compiles(model: VAR) -> None:
    eager, compiled = (fastvar_fx.transform(model, SCHEDULE, method="tome") for _ in range(2))
    fastvar_fx.compile(compiled, backend="eager")
    torch.testing.assert_close(draw(compiled), draw(eager))

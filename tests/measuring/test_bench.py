"""`fastvar-fx bench`: its rows, its JSON, its FLOPs by hand, and what it refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from math import isnan
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastvar_fx import GraphError, Method, ModelError, Schedule, ScheduleError, transform
from fastvar_fx.cli import bench as cli_bench
from fastvar_fx.cli import main
from fastvar_fx.measuring import presets, resolutions
from fastvar_fx.measuring import rows as bench_rows
from fastvar_fx.measuring.compare import Comparison, Spread
from fastvar_fx.measuring.modules import (
    MODULES,
    ModuleClock,
    late_modules,
    measure_modules,
    module_of,
    with_marks,
)
from fastvar_fx.measuring.peer import peer_restoration, peer_selection
from fastvar_fx.measuring.presets import needed_bytes, preset, subject_of
from fastvar_fx.measuring.resolutions import (
    QUANTITIES,
    AtResolution,
    Cost,
    growth,
    measure_resolutions,
    schedule_at,
)
from fastvar_fx.measuring.rows import Result, Row, default_variants, measure_rows
from fastvar_fx.measuring.runs import Budget
from fastvar_fx.measuring.variants import VARIANTS, Variant
from fastvar_fx.models import hart, infinity, var
from fastvar_fx.ops import cached_token_restoration, pivotal_token_selection
from passes.rewrite.side_input import take_side
from tests.graph_double import record

ROW = [
    "name",
    "ms",
    "ms_iqr",
    "runs",
    "unusable",
    "reason",
    "total_ms",
    "speedup",
    "speedup_unusable",
    "limit",
    "limit_fraction",
    "peak_mib",
    "kv_mib",
]
DENSE, PRUNED, SKIP, PEER = (Variant(what) for what in ("dense", "pruned", "skip", "peer"))
HART = preset("hart-tiny").schedule


@pytest.fixture(scope="module")
def of_hart() -> Result:
    return measure_rows("hart-tiny", (PEER, PRUNED, DENSE), batch=2, repeats=2)


def by_hand(pruned: bool) -> tuple[int, int]:
    """FLOPs of all blocks, and elements of the keys and values: batch 2, doubled by guidance."""
    config = hart.CONFIGS["tiny"]
    hidden = 256
    width, keys, flops = config.width, 0, 0
    for step in range(HART.steps):
        tokens = HART.kept(step) if pruned else HART.tokens(step)
        tokens = tokens if step else config.text_length  # the first step runs on the prompt
        keys += tokens
        linear = 2 * tokens * width * (4 * width + 3 * hidden)  # qkv, projection, SwiGLU
        flops += linear + 4 * tokens * keys * width
    return 4 * config.depth * flops, 4 * config.depth * 2 * keys * width


def row_of(result: Result, variant: Variant) -> Row:
    (row,) = (row for row in result.rows if row.variant == variant)
    return row


def test_the_limit_is_the_flop_ratio_by_hand(of_hart: Result) -> None:
    limit = by_hand(pruned=False)[0] / by_hand(pruned=True)[0]
    assert row_of(of_hart, DENSE).limit == 1
    for variant in (PRUNED, PEER):
        row = row_of(of_hart, variant)
        assert row.comparison is not None
        assert row.limit == row.comparison.limit == pytest.approx(limit)
        assert row.comparison.limit_fraction == pytest.approx(row.comparison.speedup / limit)


def test_keys_and_values_by_hand(of_hart: Result) -> None:
    for variant, pruned in ((DENSE, False), (PRUNED, True)):
        row = row_of(of_hart, variant)
        assert row.kv_mib * 2**20 == 4 * by_hand(pruned)[1]
        assert row.peak_mib > row.kv_mib


def test_times_add_up(of_hart: Result) -> None:
    assert [row.variant for row in of_hart.rows] == [DENSE, PRUNED, PEER]
    dense = row_of(of_hart, DENSE)
    for row in of_hart.rows:
        assert 0 < row.transformer.median < row.total.median
        assert row.comparison is not None
        assert row.comparison.dense == dense.transformer
        assert row.comparison.pruned == row.transformer
        # With two runs, the median is the mean.
        total = sum(step.median for step in row.steps)
        assert row.transformer.median == pytest.approx(total)


@pytest.mark.slow
def test_rows_of_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph is compared with a graph, and timed as a whole."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(bench_rows, "recorder", lambda _: record)
    graphs = [Variant(what, graph=True) for what in ("dense", "pruned", "skip")]
    result = measure_rows("infinity-tiny", (*graphs, PRUNED), batch=2, repeats=2)
    pruned, dense_graph, pruned_graph, skip_graph = result.rows
    assert [row.variant for row in result.rows] == [PRUNED, *graphs]
    assert pruned.comparison is None
    assert pruned.limit == pruned_graph.limit > 1
    for row in (dense_graph, pruned_graph, skip_graph):
        assert row.steps == ()
        assert row.comparison is not None
        assert row.comparison.dense == dense_graph.transformer
        assert row.transformer == row.total
        assert row.peak_mib > 0
    assert [row.transformer.runs for row in result.rows] == [2] * 4


@pytest.mark.slow
def test_a_replay_goes_on_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    chosen = preset("infinity-tiny")
    subject = subject_of("infinity-tiny", chosen, 2, torch.device("cpu"))
    fast = transform(subject.model, chosen.schedule)
    replays, peak = bench_rows.record_replays(fast, chosen, 2, record)
    replays.time()
    drawn = replays.result
    torch.manual_seed(3)
    again = chosen.draw(fast, chosen.prompt(fast, 2), None)
    assert drawn.shape == again.shape
    assert not torch.equal(drawn, again)
    assert torch.equal(replays.call(seed=3), again)  # type: ignore[call-arg]
    assert peak > 0
    assert replays.loop.median == replays.seconds[0] > 0


def test_without_time_the_first_row_is_run_once() -> None:
    result = measure_rows("hart-tiny", (PEER, PRUNED, DENSE), repeats=3, budget=Budget(0))
    assert [(row.variant, row.transformer.runs) for row in result.rows] == [(DENSE, 1)]
    assert result.left_out == (PRUNED, PEER)


@pytest.mark.slow
def test_a_row_that_fails_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(bench_rows, "compile_regions", out_of_memory)
    asked = "--preset=hart-tiny --rows=dense-compiled,dense-eager --repeats=1"
    assert main(["bench", *asked.split(), "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in data["rows"]] == ["dense-eager"]
    assert data["failed"] == {"dense-compiled": "OutOfMemoryError: no memory left"}


@pytest.mark.slow
def test_long_runs_are_timed_while_their_memory_is_observed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither the number of timed runs nor the memory found depends on it."""
    monkeypatch.setattr(bench_rows, "compile_regions", lambda fast: fast)
    rows = {}
    for long in (0.0, 1e9):
        monkeypatch.setattr(bench_rows, "_LONG", long)
        told: list[str] = []
        variants = (DENSE, Variant("pruned", compiled=True))
        result = measure_rows("hart-tiny", variants, repeats=1, progress=told.append)
        rows[long] = row_of(result, variants[1])
        assert ("pruned-compiled, memory and first timed run" in told) == (long == 0)
    assert rows[0.0].transformer.runs == rows[1e9].transformer.runs == 1
    assert rows[0.0].kv_mib == rows[1e9].kv_mib
    assert rows[0.0].peak_mib == pytest.approx(rows[1e9].peak_mib, rel=0.01)


@pytest.mark.slow
def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    asked = "--no-compile --repeats 1 --steps --modules --resolutions 192,160"
    assert main(["bench", "--preset=infinity-tiny", *asked.split(), "--json"]) == 0
    data: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert {"device", "dtype", "batch", "threads", "torch", "rows"} <= data.keys()
    assert [list(row) for row in data["rows"]] == 4 * [ROW]
    rows = {row["name"]: row for row in data["rows"]}
    assert list(rows) == ["dense-eager", "pruned-eager", "skip-eager", "peer-eager"]
    assert rows["dense-eager"]["speedup"] == 1
    assert rows["skip-eager"]["limit"] >= rows["pruned-eager"]["limit"] > 1
    assert {name: len(steps) for name, steps in data["steps"].items()} == dict.fromkeys(rows, 7)
    assert data["steps"]["skip-eager"][-1] == 0
    assert rows["peer-eager"]["total_ms"] > rows["peer-eager"]["ms"]
    saved, steps = data["saved_ms"]["skip-eager"], data["steps"]
    assert saved["ratio_1_steps"] == steps["dense-eager"][-1]
    earlier = [steps["dense-eager"][s] - steps["skip-eager"][s] for s in (4, 5)]
    assert saved["pruned_steps"] == pytest.approx(sum(earlier))
    assert (data["left_out"], data["failed"]) == ([], {})
    assert data["modules"].keys() == {"dense-eager", "pruned-eager"}
    assert [set(step) for step in data["modules"]["pruned-eager"]] == 7 * [set(MODULES)]
    assert [row["pixels"] for row in data["resolutions"]] == [160, 192]
    assert data["resolutions"][1]["pruned-eager"].keys() == {"ms", "peak_mib", "gflops"}
    assert data["exponents"]["gflops"]["dense-eager"] > data["exponents"]["gflops"]["pruned-eager"]
    assert data["files"] == []


@pytest.mark.slow
def test_tables_and_pictures(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    asked = "--no-compile --repeats 1 --steps --modules --resolutions 160,320"
    folder = tmp_path / "made" / "here"
    assert main(["bench", "--preset=hart-tiny", *asked.split(), f"--plot={folder}"]) == 0
    out = capsys.readouterr().out
    assert all(f" {name} " in out for name in ("dense-eager", "pruned-eager", "peer-eager"))
    assert "batch 1" in out
    assert "PTS + CTR over the dense branches" in " ".join(out.split())
    assert re.search(r" 320 +400 +80 ", out)
    names = ("rows", "steps", "modules", "resolutions")
    wrote = re.sub(r"\s", "", out).partition("wrote")[2]
    assert wrote == ",".join(f"{folder}/{name}.png" for name in names)
    for name in names:
        with Image.open(folder / f"{name}.png") as image:
            assert min(image.size) > 300
    assert all(len(line) <= 100 for line in out.partition("wrote")[0].splitlines())


def test_a_step_where_pruning_does_not_pay(
    of_hart: Result, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, pruned = (row_of(of_hart, variant) for variant in (DENSE, PRUNED))
    twice, half = (
        replace(spread, median=f * spread.median)
        for f, spread in ((2, dense.steps[7]), (0.5, dense.steps[8]))
    )
    slower = replace(pruned, steps=(*pruned.steps[:7], twice, half))
    result = replace(of_hart, rows=(dense, slower))
    assert result.slower_steps == {PRUNED: (7,)}
    monkeypatch.setattr(cli_bench, "measure_rows", lambda *_, **__: result)
    assert main(["bench", "--preset=hart-tiny"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "step 7: pruned-eager is no faster than dense" in out
    assert "schedule.without(7)" in out
    assert "without(8)" not in out


def test_unusable_and_missing_figures_are_named(
    of_hart: Result, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, pruned = (row_of(of_hart, variant) for variant in (DENSE, PRUNED))
    steady, loaded = Spread.of([1.0, 1.0, 1.0]), Spread.of([0.5, 1.0, 1.5])
    alone = replace(dense, transformer=steady, total=steady, comparison=Comparison(steady, steady))
    compared = replace(pruned, transformer=loaded, comparison=Comparison(steady, loaded))
    lonely = replace(pruned, variant=replace(PRUNED, compiled=True), comparison=None)
    result = replace(of_hart, rows=(alone, compared, lonely), left_out=(PEER,))
    monkeypatch.setattr(cli_bench, "measure_rows", lambda *_, **__: result)
    assert main(["bench", "--preset=hart-tiny"]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in out.splitlines() if "-" in line}
    assert lines["dense-eager"][:6] == ["dense-eager", "3", "1000.0", "0.0", "1000.0", "1.00"]
    assert lines["pruned-eager"][:5] == ["pruned-eager", "3", "1000.0", "!", "500.0"]
    assert lines["pruned-eager"][6:8] == ["1.00", "!"]
    assert lines["pruned-compiled"][1:4:2] == ["2", "?"]
    assert lines["pruned-compiled"][5] == "-"
    text = " ".join(out.split())
    assert "! unusable: pruned-eager: interquartile range 50% of the median, above 20%" in text
    assert "spread unknown: fewer than 3 timed runs" in text
    assert "left out for lack of time: peer-eager; see --seconds" in text

    assert main(["bench", "--preset=hart-tiny", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    found = [
        (row["unusable"], row["speedup_unusable"], row["speedup"], row["limit_fraction"])
        for row in data["rows"]
    ]
    assert found == [(False, False, 1.0, None), (True, True, 1.0, None), (False, None, None, None)]
    assert data["rows"][1]["reason"].startswith("interquartile range 50%")
    assert data["left_out"] == ["peer-eager"]


def test_default_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    skipping = preset("infinity-tiny").schedule
    compiled = [Variant(what, compiled=True) for what in ("dense", "pruned", "skip")]
    assert default_variants(HART) == (DENSE, PRUNED, *compiled[:2], PEER)
    assert default_variants(skipping) == (DENSE, PRUNED, SKIP, *compiled, PEER)
    assert default_variants(skipping, compiled=False) == (DENSE, PRUNED, SKIP, PEER)
    monkeypatch.setattr(bench_rows, "recorder", lambda _: record)
    graphs = [replace(variant, graph=True) for variant in (DENSE, PRUNED, *compiled[:2])]
    assert set(default_variants(HART)) == {DENSE, PRUNED, PEER, *compiled[:2], *graphs}


def test_names_of_rows() -> None:
    assert [Variant.parse(str(variant)) for variant in VARIANTS] == list(VARIANTS)
    assert str(Variant("skip", compiled=True, graph=True)) == "skip-compiled-graph"
    assert Variant.parse("pruned-eager-graph") == Variant("pruned", graph=True)
    assert Variant("skip", compiled=True, graph=True).dense == Variant("dense", True, True)


def test_the_peer_does_what_our_operators_do() -> None:
    x, cached = torch.randn(2, 36, 8), torch.randn(2, 9, 8)
    index = peer_selection(x, 10)
    assert torch.equal(index.sort(dim=1).values, pivotal_token_selection(x, 10))
    call = (torch.randn(2, 10, 8), index, cached, (3, 3), (6, 6))
    torch.testing.assert_close(peer_restoration(*call), cached_token_restoration(*call))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            "--preset var-tinny",
            1,
            "no benchmark preset is named 'var-tinny'; did you mean var",
        ),
        (
            "--rows dense-eager,prune-eager",
            1,
            "no benchmark row is named 'prune-eager'; did you mean pruned-eager",
        ),
        ("--rows skip-eager", 1, "skips steps of ratio 1, but the ratios are (0.5, 0.75)"),
        ("--rows dense-eager --no-compile", 2, "exclude each other"),
        ("--batch 0", 2, "--batch"),
        ("--repeats 0", 2, "--repeats"),
        ("--resolutions 256,large", 2, "such as 256,512,1024; found '256,large'"),
        ("--resolutions 256,500", 1, "a multiple of 16 pixels"),
        ("--plot pyproject.toml", 2, "is a file"),
        ("--plot pyproject.toml/figures", 1, "Not a directory"),
        ("--plot pyproject.toml/figures", 1, "give another folder"),
    ],
)
def test_bad_input(
    capsys: pytest.CaptureFixture[str], arguments: str, code: int, message: str
) -> None:
    assert main(["bench", *arguments.split()]) == code
    err = re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().err)
    assert message in " ".join(err.split())


def test_bad_numbers() -> None:
    with pytest.raises(ModelError, match="batch is at least 1; found 0"):
        measure_rows("var-tiny", batch=0)
    with pytest.raises(ModelError, match="repeats is at least 1; found -1"):
        measure_rows("var-tiny", repeats=-1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are CUDA graphs")
def test_a_graph_without_a_gpu() -> None:
    with pytest.raises(GraphError, match=r"row pruned-eager-graph is a CUDA graph.*runs on cpu"):
        measure_rows("var-tiny", (DENSE, replace(PRUNED, graph=True)))
    with pytest.raises(ModelError, match="no row to measure; name some of dense-eager, "):
        measure_rows("var-tiny", ())


def test_what_does_not_fit_says_so_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "free_bytes", lambda _: 3 * 2**30)
    told: list[str] = []
    message = r"infinity-2b-1024 at batch 4 needs about .* GiB .* 3.0 GiB free; .*fit: var-tiny"
    with pytest.raises(ModelError, match=message):
        measure_rows("infinity-2b-1024", batch=4, progress=told.append)
    assert told == []


class Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the tensors that ops make: (device, dtype, elements)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tensors: list[tuple[str, torch.dtype, int]] = []

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = op(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor):
                self.tensors.append((t.device.type, t.dtype, t.numel()))
        return result


@pytest.mark.parametrize("name", ["var-tiny", "infinity-tiny", "hart-tiny"])
def test_weights_are_drawn_in_their_dtype(name: str) -> None:
    chosen = preset(name)
    with Made() as made:
        model: Any = chosen.build("cpu", torch.bfloat16)
    others = [model.vae] if name == "var-tiny" else []
    weights = [p for part in (model, *others) for p in part.parameters()]
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
    assert not any(weight.requires_grad or weight.is_meta for weight in weights)
    sizes = {weight.numel() for weight in weights if weight.numel() > 1}
    drawn = {dtype for device, dtype, numel in made.tensors if device == "cpu" and numel in sizes}
    assert torch.bfloat16 in drawn
    assert torch.float32 not in drawn


@pytest.mark.parametrize("name", ["var-tiny", "infinity-tiny", "hart-tiny"])
def test_weights_are_those_of_the_named_model(name: str) -> None:
    package: Any = {"var": var, "infinity": infinity, "hart": hart}[name.partition("-")[0]]
    found: Any = preset(name).build()
    expected = package.build("tiny")
    assert found.state_dict().keys() == expected.state_dict().keys()
    for key, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], value)
    if name == "var-tiny":
        for a, b in zip(found.vae.parameters(), expected.vae.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_weights_are_drawn_on_the_device() -> None:
    with Made() as made:
        model = preset("infinity-tiny").build("cuda", torch.bfloat16)
    assert {weight.device.type for weight in model.parameters()} == {"cuda"}
    assert [t for t in made.tensors if t[0] == "cpu" and t[2] > 1] == []


def test_memory_needed_is_about_what_the_parameters_and_the_cache_take() -> None:
    chosen = preset("hart-tiny")
    model = chosen.build()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    needed = [needed_bytes(chosen, batch, torch.float32) for batch in (1, 2, 3)]
    assert needed[0] > weights
    assert needed[2] - needed[1] == needed[1] - needed[0] > 0


# --- by module --------------------------------------------------------------------------------


def test_marks_are_set_where_the_module_changes() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    nodes = [graph.call_function(torch.relu, (x,)) for _ in range(4)]
    total = graph.call_function(torch.stack, (nodes,))
    graph.output(total)
    modules = dict(zip((*nodes, total), ("ffn", "ffn", "PTS", "ffn", "rest"), strict=True))
    told: list[str] = []
    marked = with_marks(torch.fx.GraphModule({}, graph), modules.__getitem__, told.append)
    assert torch.equal(marked(torch.tensor([-1.0, 2.0])), torch.tensor([[0.0, 2.0]] * 4))
    assert told == ["ffn", "PTS", "ffn", "rest"]


def test_what_a_call_belongs_to() -> None:
    operators = Method()
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    targets = (operators.select, operators.take, take_side, operators.restore, torch.relu)
    calls = [graph.call_function(target, (x,)) for target in targets]
    for call in calls:
        call.meta["fastvar"] = {"branch": 1, "kind": "ffn"}
    calls.append(graph.call_function(torch.add, (x, x)))
    found = [module_of(operators, call) for call in calls]
    assert found == ["PTS", "PTS", "PTS", "CTR", "ffn", "rest"]


@pytest.mark.slow
def test_every_module_takes_time_where_it_should(of_hart: Result) -> None:
    subject = of_hart.subject
    images = subject.generate(transform(subject.model, HART, on_full="cache"))
    told: list[str] = []
    modules = measure_modules(subject, 1, progress=told.append)
    assert len(told) == 4
    assert {variant: len(steps) for variant, steps in modules.items()} == {
        DENSE: HART.steps,
        PRUNED: HART.steps,
    }
    for variant, steps in modules.items():
        for step, times in enumerate(steps):
            pruned = variant == PRUNED and step in HART.pruned_steps
            assert times["attention"] + times["cross_attention"] > 0
            assert min(times["ffn"], times["rest"]) > 0
            assert (times["PTS"] > 0, times["CTR"] > 0) == (pruned, pruned)
    assert late_modules(modules, HART) == ["attention", "ffn", "PTS", "CTR", "rest"]
    fast = transform(subject.model, HART, on_full="cache")
    ModuleClock.of(fast, subject.weight.device)
    assert torch.equal(subject.generate(fast), images)


# --- by resolution ----------------------------------------------------------------------------


def test_a_schedule_for_other_sizes() -> None:
    schedule = Schedule((1, 2, 3, 4, 6, 9, 13, 18, 24, 32), (0.5, 0.75))
    same = schedule_at(schedule, 512)
    assert same == schedule
    larger = schedule_at(schedule, 1024)
    assert larger.scales[:10] == schedule.scales
    assert larger.scales[10:] == ((45, 45), (64, 64))
    assert [larger.kept(step) for step in (8, 9, 10, 11)] == [288, 256, 8 * 45, 8 * 64]
    assert larger.cache_step == schedule.cache_step
    smaller = schedule_at(schedule, 256)
    assert (smaller.scales[-2:], smaller.pruned_steps) == (((13, 13), (16, 16)), ())
    skipping = schedule_at(preset("infinity-2b-1024").schedule, 1024)
    kept = [skipping.kept(step) for step in range(9, 13)]
    assert kept == pytest.approx([615, 800, 20 * 48, 20 * 64], abs=1)
    assert skipping.layers == tuple(range(3, 28))


@pytest.mark.parametrize("pixels", [0, 16, 500])
def test_a_resolution_of_no_whole_tokens(pixels: int) -> None:
    with pytest.raises(ScheduleError, match=f"a multiple of 16 pixels.*found {pixels}$"):
        schedule_at(HART, pixels)


def test_growth_is_the_exponent() -> None:
    rows = [
        AtResolution(16 * n, Schedule((1, 2, n), (0.5,)), {DENSE: dense, PRUNED: pruned}, "")
        for n in (4, 8, 16)
        for dense, pruned in [(Cost(n**3, n, n**4), Cost(n, 1, n))]
    ]
    other = Cost(1e9, 1e9, 1e9)
    rows.append(AtResolution(32, Schedule((1, 2), ()), {DENSE: other, PRUNED: other}, ""))
    rows.append(AtResolution(512, Schedule((1, 2, 32), (0.5,)), {PRUNED: other}, ""))
    found = [growth(rows, DENSE, quantity) for quantity in QUANTITIES]
    assert found == pytest.approx([1.5, 0.5, 2.0])
    assert growth(rows, PRUNED, "ms") == pytest.approx(0.5)
    assert isnan(growth(rows[2:], PRUNED, "ms"))


@pytest.mark.slow
def test_what_is_too_large_or_too_slow_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolutions, "PATIENCE", 0.0)
    chosen = preset("infinity-tiny")
    free = needed_bytes(chosen.at(schedule_at(chosen.schedule, 192)), 1, torch.float32)
    monkeypatch.setattr(resolutions, "free_bytes", lambda _: free)
    rows = measure_resolutions("infinity-tiny", [512, 192, 160])
    assert [row.pixels for row in rows] == [160, 192, 512]
    assert rows[0].costs[PRUNED].gflops < rows[0].costs[DENSE].gflops
    assert [set(row.costs) for row in rows[1:]] == [set(), set()]
    assert "dense-eager would take 0 s, pruned-eager would take 0 s" in rows[1].note
    assert "GiB are free" in rows[2].note

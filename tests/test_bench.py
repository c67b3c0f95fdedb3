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

from fastvar_fx import ModelError, Schedule, ScheduleError, transform
from fastvar_fx.bench import presets, resolutions
from fastvar_fx.bench.modules import (
    MODULES,
    ModuleClock,
    late_modules,
    measure_modules,
    module_of,
    with_marks,
)
from fastvar_fx.bench.peer import peer_restoration, peer_selection
from fastvar_fx.bench.presets import needed_bytes, preset, subject_of
from fastvar_fx.bench.resolutions import (
    QUANTITIES,
    AtResolution,
    Cost,
    growth,
    measure_resolutions,
    schedule_at,
)
from fastvar_fx.bench.rows import Result, Row, measure, phases, record_replays
from fastvar_fx.cli import bench as cli_bench
from fastvar_fx.cli import main
from fastvar_fx.models import hart
from fastvar_fx.ops import Operators, cached_token_restoration, pivotal_token_selection
from fastvar_fx.timing import Runs
from passes.rewrite.side_input import take_side
from tests.graph_double import record

ROW = ["name", "ms", "ms_iqr", "speedup", "limit", "limit_fraction", "peak_mib", "kv_mib"]
HART = preset("hart-tiny").schedule


@pytest.fixture(scope="module")
def of_hart() -> Result:
    return measure("hart-tiny", batch=2, repeats=2, compiled=False)


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


def row_of(result: Result, name: str) -> Row:
    (row,) = (row for row in result.rows if row.name == name)
    return row


def test_the_limit_is_the_flop_ratio_by_hand(of_hart: Result) -> None:
    limit = by_hand(pruned=False)[0] / by_hand(pruned=True)[0]
    assert row_of(of_hart, "dense-eager").limit == 1
    for name in ("pruned-eager", "peer-eager"):
        row = row_of(of_hart, name)
        assert row.limit == pytest.approx(limit)
        assert row.limit_fraction == pytest.approx(row.speedup / limit)


def test_keys_and_values_by_hand(of_hart: Result) -> None:
    for name, pruned in (("dense-eager", False), ("pruned-eager", True)):
        row = row_of(of_hart, name)
        assert row.kv_mib * 2**20 == 4 * by_hand(pruned)[1]
        assert row.peak_mib > row.kv_mib


def test_times_add_up(of_hart: Result) -> None:
    assert [row.name for row in of_hart.rows] == ["dense-eager", "pruned-eager", "peer-eager"]
    dense = row_of(of_hart, "dense-eager")
    for row in of_hart.rows:
        assert 0 < row.transformer.median < row.total.median
        assert row.speedup == dense.transformer.median / row.transformer.median
        assert row.compiled_speedup is None
        # With two runs, the median is the mean.
        total = sum(step.median for step in row.steps)
        assert row.transformer.median == pytest.approx(total)


def test_a_replayed_loop_is_timed_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    chosen = preset("infinity-tiny")
    subject = subject_of("infinity-tiny", chosen, 2, torch.device("cpu"))
    source = Runs(subject, transform(subject.model, chosen.schedule))
    replays, peak = record_replays(source, chosen, 2, record)
    drawn = replays.time()
    torch.manual_seed(3)
    again = chosen.draw(source.model, chosen.prompt(source.model, 2), None)
    assert drawn.shape == again.shape
    assert not torch.equal(drawn, again)
    assert torch.equal(replays.draw(seed=3), again)  # type: ignore[call-arg]
    assert peak > 0
    assert replays.loop.median == replays.loop_seconds[0] <= replays.seconds[0]
    assert replays.by_step == ()


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    asked = "--no-compile --repeats 1 --steps --modules --resolutions 192,160"
    assert main(["bench", "--preset=infinity-tiny", *asked.split(), "--json"]) == 0
    data: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert {"device", "dtype", "batch", "threads", "torch", "rows"} <= data.keys()
    assert [list(row) for row in data["rows"]] == 4 * [ROW]
    rows = {row["name"]: row for row in data["rows"]}
    assert list(rows) == ["dense-eager", "pruned-eager", "pruned-eager-skip", "peer-eager"]
    assert rows["dense-eager"]["speedup"] == 1
    assert rows["pruned-eager-skip"]["limit"] >= rows["pruned-eager"]["limit"] > 1
    assert {name: len(steps) for name, steps in data["steps"].items()} == dict.fromkeys(rows, 7)
    assert data["steps"]["pruned-eager-skip"][-1] == 0
    assert data["total_ms"]["peer-eager"] > rows["peer-eager"]["ms"]
    assert data["modules"].keys() == {"dense-eager", "pruned-eager"}
    assert [set(step) for step in data["modules"]["pruned-eager"]] == 7 * [set(MODULES)]
    assert [row["pixels"] for row in data["resolutions"]] == [160, 192]
    assert data["resolutions"][1]["pruned"].keys() == {"ms", "peak_mib", "gflops"}
    assert data["exponents"]["gflops"]["dense"] > data["exponents"]["gflops"]["pruned"]
    assert data["files"] == []


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
    dense, pruned = (row_of(of_hart, name) for name in ("dense-eager", "pruned-eager"))
    twice, half = (
        replace(spread, median=f * spread.median)
        for f, spread in ((2, dense.steps[7]), (0.5, dense.steps[8]))
    )
    slower = replace(pruned, steps=(*pruned.steps[:7], twice, half))
    result = replace(of_hart, rows=(dense, slower))
    assert result.slower_steps == {"pruned-eager": (7,)}
    monkeypatch.setattr(cli_bench, "measure", lambda *_, **__: result)
    assert main(["bench", "--preset=hart-tiny"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "step 7: pruned-eager is no faster than dense" in out
    assert "schedule.without(7)" in out
    assert "without(8)" not in out


def test_rows_with_compiled_ones() -> None:
    schedule = preset("infinity-tiny")
    assert phases(schedule, 3, compiled=True) == 1 + 7 * 5
    assert phases(schedule, 3, compiled=False) == 1 + 4 * 5


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
        measure("var-tiny", batch=0)
    with pytest.raises(ModelError, match="repeats is at least 1; found -1"):
        measure("var-tiny", repeats=-1)


def test_what_does_not_fit_says_so_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "free_bytes", lambda _: 3 * 2**30)
    told: list[str] = []
    message = r"infinity-2b-1024 at batch 4 needs about .* GiB .* 3.0 GiB free; .*fit: var-tiny"
    with pytest.raises(ModelError, match=message):
        measure("infinity-2b-1024", batch=4, progress=told.append)
    assert told == []


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
    operators = Operators(pivotal_token_selection, cached_token_restoration)
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    targets = (operators.select, operators.take, take_side, operators.restore, torch.relu)
    calls = [graph.call_function(target, (x,)) for target in targets]
    for call in calls:
        call.meta["fastvar"] = {"branch": 1, "kind": "ffn"}
    calls.append(graph.call_function(torch.add, (x, x)))
    found = [module_of(operators, call) for call in calls]
    assert found == ["PTS", "PTS", "PTS", "CTR", "ffn", "rest"]


def test_every_module_takes_time_where_it_should(of_hart: Result) -> None:
    subject = of_hart.subject
    images = subject.generate(transform(subject.model, HART, on_full="cache"))
    told: list[str] = []
    modules = measure_modules(subject, 1, told.append)
    assert len(told) == 4
    assert {name: len(steps) for name, steps in modules.items()} == {
        "dense-eager": HART.steps,
        "pruned-eager": HART.steps,
    }
    for name, steps in modules.items():
        for step, times in enumerate(steps):
            pruned = name == "pruned-eager" and step in HART.pruned_steps
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
        AtResolution(16 * n, Schedule((1, 2, n), (0.5,)), {"dense": dense, "pruned": pruned}, "")
        for n in (4, 8, 16)
        for dense, pruned in [(Cost(n**3, n, n**4), Cost(n, 1, n))]
    ]
    other = Cost(1e9, 1e9, 1e9)
    rows.append(AtResolution(32, Schedule((1, 2), ()), {"dense": other, "pruned": other}, ""))
    rows.append(AtResolution(512, Schedule((1, 2, 32), (0.5,)), {"pruned": other}, ""))
    found = [growth(rows, "dense", quantity) for quantity in QUANTITIES]
    assert found == pytest.approx([1.5, 0.5, 2.0])
    assert growth(rows, "pruned", "ms") == pytest.approx(0.5)
    assert isnan(growth(rows[2:], "pruned", "ms"))


def test_what_is_too_large_or_too_slow_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolutions, "PATIENCE", 0.0)
    chosen = preset("infinity-tiny")
    free = needed_bytes(chosen.at(schedule_at(chosen.schedule, 192)), 1, torch.float32)
    monkeypatch.setattr(resolutions, "free_bytes", lambda _: free)
    rows = measure_resolutions("infinity-tiny", [512, 192, 160])
    assert [row.pixels for row in rows] == [160, 192, 512]
    assert rows[0].costs["pruned"].gflops < rows[0].costs["dense"].gflops
    assert [set(row.costs) for row in rows[1:]] == [set(), set()]
    assert "dense would take 0 s, pruned would take 0 s" in rows[1].note
    assert "GiB are free" in rows[2].note

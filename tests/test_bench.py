"""`fastvar-fx bench`: its rows, its JSON, its FLOPs by hand, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from fastvar_fx import ModelError
from fastvar_fx.bench import presets
from fastvar_fx.bench.peer import peer_restoration, peer_selection
from fastvar_fx.bench.presets import needed_bytes, preset
from fastvar_fx.bench.rows import Result, Row, measure, phases
from fastvar_fx.cli import main
from fastvar_fx.models import hart
from fastvar_fx.ops import cached_token_restoration, pivotal_token_selection

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


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "bench --preset infinity-tiny --no-compile --repeats 1 --steps --json"
    assert main(arguments.split()) == 0
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


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--preset=hart-tiny", "--no-compile", "--repeats=1", "--steps"]) == 0
    out = capsys.readouterr().out
    assert all(f" {name} " in out for name in ("dense-eager", "pruned-eager", "peer-eager"))
    assert "batch 1" in out
    assert all(len(line) <= 100 for line in out.splitlines())


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
    ],
)
def test_bad_input(
    capsys: pytest.CaptureFixture[str], arguments: str, code: int, message: str
) -> None:
    assert main(["bench", *arguments.split()]) == code
    assert message in capsys.readouterr().err


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

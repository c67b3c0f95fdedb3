"""The command line: what it prints, what it writes, its exit codes and its messages."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image

from fastvar_fx import Schedule, presets
from fastvar_fx.cli import main

SCALES = (1, 2, 3, 4, 6, 8)
MODELS = """
import torch
from fastvar_fx.models.var import build

def tiny():
    return build("tiny", scales=(1, 2, 3, 4, 6, 8), depth=2)

def run(model):
    return model.autoregressive_infer_cfg(1, 3)

def no_module():
    return "no module"

def broken():
    raise KeyError("weights")

def broken_run(model):
    raise ValueError("no prompt")

def no_images(model):
    model.infer_fhat(1, 3)
    return torch.zeros(3, 8)

class Mixer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.conv = torch.nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x):
        return x + self.conv(self.linear(x).transpose(1, 2)).transpose(1, 2)

class Mixers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Mixer(), Mixer()])

    def forward(self):
        for side in (1, 2, 3, 4, 6, 8):
            x = torch.zeros(1, side * side, 8)
            for block in self.blocks:
                x = block(x)

def only_mixers():
    return Mixers().eval()

def call(model):
    return model()
"""


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """What stderr says, without the frames and line breaks of a terminal."""
        return " ".join(re.sub(r"[│╭╮╰╯─]", " ", self.err).split())


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    def call(*arguments: str | Path) -> Outcome:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with models of the user's own and a schedule."""
    (tmp_path / "own_models.py").write_text(MODELS)
    (tmp_path / "syntax.py").write_text("def run(:\n")
    schedule = Schedule(SCALES, (0.5, 0.75))
    (tmp_path / "schedule.json").write_text(schedule.to_json())
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_models", raising=False)
    return tmp_path


OWN = ("own_models:tiny", "--run", "own_models:run", "--schedule", "schedule.json")


# --- presets ----------------------------------------------------------------------------------


def test_presets_as_a_table(cli: Cli) -> None:
    code, out, err = cli("presets")
    assert (code, err) == (0, "")
    assert all(name in out for name in presets())
    row = next(line for line in out.splitlines() if "var-256" in line)
    assert " ".join(row.split()) == "var-256 1 2 3 4 5 6 8 10 13 16 0.5 0.75 7 all 680 62% 41% 0%"


def test_presets_as_json(cli: Cli) -> None:
    code, out, err = cli("presets", "--json")
    assert (code, err) == (0, "")
    data = json.loads(out)
    assert data.keys() == presets().keys()
    assert data["infinity-1024"]["layers"] == list(range(3, 28))
    assert data["var-512"]["tokens"] == 2240
    assert data["var-512"]["late_share"] == pytest.approx(1600 / 2240)
    assert data["var-512"]["saved_share"] == pytest.approx((1600 - 288 - 256) / 2240)
    assert data["infinity-1024"]["late_share"] == pytest.approx(2624 / 10521)
    assert data["infinity-1024"]["skipped_share"] == pytest.approx(6400 / 10521)


# --- explain ----------------------------------------------------------------------------------


def test_explain_a_named_model(cli: Cli) -> None:
    code, out, _ = cli("explain", "tiny", "--batch", "1", "--json")
    assert code == 0
    data = json.loads(out)
    assert data["cache_step"] == 7
    late = {(r["kind"], r["tokens"], r["kept"]) for r in data["rows"] if r["step"] == 9}
    assert late == {("attention", 256, 64), ("ffn", 256, 64)}


def test_explain_another_method(cli: Cli) -> None:
    code, out, _ = cli("explain", "tiny", "--batch", "1", "--method", "drift-corrected", "--json")
    assert code == 0
    assert {r["kept"] for r in json.loads(out)["rows"] if r["step"] == 9} == {64}
    code, _, err = cli("explain", "--method", "drift-correct")
    assert code == 1
    assert "no method is named 'drift-correct'; did you mean drift-corrected or " in err


def test_explain_a_model_of_the_current_directory(cli: Cli, folder: Path) -> None:
    path = list(sys.path)
    code, out, err = cli("explain", *OWN)
    assert (code, err) == (0, "")
    assert out.startswith("own_models:tiny; 6 scales, 1x1 to 8x8; ratios 0.5, 0.75; cache step 3")
    assert "blocks.0..1" in out
    assert sys.path == path


def test_ratios_replace_those_of_the_schedule(cli: Cli, folder: Path) -> None:
    options = ("--ratios", "0.25,0.5,1", "--blocks", "blocks", "--on-full", "cache", "--json")
    code, out, _ = cli("explain", *OWN, *options)
    assert code == 0
    data = json.loads(out)
    kept = {(r["step"], r["tokens"], r["kept"]) for r in data["rows"]}
    assert kept == {(2, 9, 9), (3, 16, 12), (4, 36, 18), (5, 64, 0)}
    assert data["cache_step"] == 2


def test_steps_of_ratio_one_are_skipped(cli: Cli, folder: Path) -> None:
    code, out, _ = cli("explain", *OWN, "--ratios", "0.25,0.5,1", "--json")
    assert code == 0
    data = json.loads(out)
    assert {row["step"] for row in data["rows"]} == {2, 3, 4}
    skipping, pruning = data["skipping"], data["pruning"]
    assert (skipping["steps"], skipping["tokens"], skipping["all_tokens"]) == ([5], 64, 130)
    assert (pruning["steps"], pruning["tokens"], pruning["dropped"]) == ([3, 4], 52, 22)
    assert pruning["pruned_flops"] < pruning["flops"] < skipping["flops"]


def test_explain_writes_a_page(cli: Cli, folder: Path) -> None:
    code, out, err = cli("explain", *OWN, "--html", "report.html")
    assert (code, err) == (0, "")
    assert "blocks.0..1" in out
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "own_models:tiny" in page
    assert "6 scales, 1x1 to 8x8; ratios 0.5, 0.75" in page
    assert page.count("blocks.0..1") == 6
    assert not list(folder.glob(".*"))


def test_explain_writes_a_page_on_a_model_in_which_nothing_prunes(cli: Cli, folder: Path) -> None:
    options = ("--schedule", "schedule.json", "--blocks", "blocks", "--html", "report.html")
    outcome = cli("explain", "own_models:only_mixers", "--run", "own_models:call", *options)
    assert outcome.code == 1
    assert "no branch of any block could be pruned" in outcome.message
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "0 of 4" in page
    assert "FVX013" in page
    line = "return x + self.conv(self.linear(x).transpose(1, 2)).transpose(1, 2)"
    number = 1 + MODELS.splitlines().index(f"        {line}")
    assert f"{folder}/own_models.py:{number}" in page
    assert line in page


@pytest.mark.parametrize(
    ("file", "code", "message"),
    [
        (".", 2, "is a directory"),
        ("missing/report.html", 1, "which cannot be written: No such file or directory"),
        ("own_models.py/report.html", 1, "which cannot be written: Not a directory"),
        ("/dev/null", 1, "which cannot be written: it is no regular file"),
    ],
)
def test_a_page_that_cannot_be_written(
    cli: Cli, folder: Path, file: str, code: int, message: str
) -> None:
    outcome = cli("explain", *OWN, "--html", file)
    assert (outcome.code, outcome.out) == (code, "")
    assert message in outcome.message


def test_a_page_stays_as_it_was_if_the_run_fails(cli: Cli, folder: Path) -> None:
    page = folder / "report.html"
    page.write_text("older")
    outcome = cli("explain", OWN[0], "--run", "own_models:broken_run", *OWN[3:], "--html", page)
    assert outcome.code == 1
    assert "ValueError: no prompt" in outcome.message
    assert page.read_text() == "older"
    assert not list(folder.glob(".*"))


# --- demo -------------------------------------------------------------------------------------


@pytest.fixture
def demo_data(cli: Cli, folder: Path) -> dict[str, Any]:
    options = ("--schedule", "schedule.json", "--batch", "2", "--repeats", "2", "--seed", "4")
    code, out, err = cli("demo", "--model", "tiny", "--out", "made/here", *options, "--json")
    assert code == 0, err
    assert re.search(r"^fastvar-fx: \d+ s: pruned, run 2 of 2$", err, re.MULTILINE)
    data: dict[str, Any] = json.loads(out)
    return data


def test_demo(demo_data: dict[str, Any], folder: Path) -> None:
    data = demo_data
    assert (data["batch"], data["repeats"], data["seed"]) == (2, 2, 4)
    assert (data["device"], data["dtype"], data["threads"]) == ("cpu", "float32", 1)
    assert data["torch"] == torch.__version__
    assert data["note"].startswith("random weights")
    assert (data["pruned_branches"], data["branches"]) == (16, 16)
    assert (data["skipped_steps"], data["repeat_difference"]) == ([], 0)
    _check_steps(data["steps"])
    assert data["total"]["limit"] >= 1
    assert data["pruned_steps"]["limit"] > data["transformer"]["limit"] > data["total"]["limit"]
    for part in ("pruned_steps", "transformer", "total"):
        times = data[part]["ms_dense"]["median"] / data[part]["ms_pruned"]["median"]
        assert data[part]["speedup"] == pytest.approx(times, rel=1e-2)
    pictures = ["made/here/demo.png", "made/here/kept_tokens.png"]
    assert data["files"] == [*pictures, "made/here/index.html"]
    for name in pictures:
        _check_picture(folder / name)
    page = (folder / "made/here/index.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert data["note"] in page


def _check_steps(steps: Sequence[dict[str, Any]]) -> None:
    assert [step["scale"] for step in steps] == [[side, side] for side in SCALES]
    assert [step["role"] for step in steps] == ["dense"] * 3 + ["captures", "prunes", "prunes"]
    assert [step["kept"] for step in steps] == [1, 4, 9, 16, 18, 16]
    for step in steps:
        assert step["kept"] <= step["tokens"]
        times = step["ms_dense"], step["ms_pruned"]
        assert all(0 < t["min"] <= t["median"] <= t["max"] for t in times)
        pruned = step["role"] == "prunes"
        assert step["limit"] > 1 if pruned else step["dense_flops"] == step["pruned_flops"]


def _check_picture(path: Path) -> None:
    with Image.open(path) as image:
        width, height = image.size
        assert 1000 <= width <= 1400
        assert 300 <= height <= 2000
        assert all(low < high for low, high in image.convert("RGB").getextrema())  # type: ignore[misc]


@pytest.mark.slow
def test_demo_draws_with_trained_weights(cli: Cli, folder: Path) -> None:
    code, out, err = cli("demo", "--repeats", "1", "--batch", "1", "--json")
    assert code == 0, err
    data = json.loads(out)
    assert data["note"].startswith("trained on")
    assert data["schedule"]["scales"][-2:] == [[24, 24], [32, 32]]
    assert data["schedule"]["ratios"] == [0.5, 0.75]
    assert data["pruned_branches"] == data["branches"]
    assert (folder / "demo" / "index.html").stat().st_size < 3e6


def test_demo_needs_to_write_its_page(cli: Cli, folder: Path) -> None:
    (folder / "demo" / "index.html").mkdir(parents=True)
    outcome = cli("demo", "--model", *OWN)
    assert (outcome.code, outcome.out) == (1, "")
    assert "asked to write a page to demo/index.html" in outcome.message
    assert "warm-up" not in outcome.err


def test_demo_prints_tables_for_a_model_of_the_current_directory(cli: Cli, folder: Path) -> None:
    code, out, err = cli("demo", "--model", *OWN, "--repeats", "1")
    assert code == 0, err
    rows = [line.split() for line in out.splitlines()]
    last = next(row for row in rows if row[:2] == ["5", "8x8"])
    assert last[2:4] == ["64", "16"]
    assert any(line.startswith(" transformer, pruned steps") for line in out.splitlines())
    assert "8 of 8 branches prune. Step skipping: none." in out
    assert "one run after a warm-up" in out
    assert "random weights" not in out
    assert (folder / "demo" / "demo.png").exists()
    assert all(len(line) <= 100 for line in out.splitlines())


# --- what goes wrong --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("explain --preset var-255", 1, "no preset is named 'var-255'; did you mean var-256"),
        ("explain tinny", 1, "no model is named 'tinny'; did you mean tiny"),
        ("explain demo --preset var-256", 1, "--model random takes any"),
        ("explain --ratios 1.5", 1, "a pruning ratio lies in [0, 1]"),
        ("explain --ratios half", 2, "--ratios takes numbers with commas"),
        ("calibrate --speedup 2 --guidance 1.5", 2, "--guidance takes own for a named model"),
        ("calibrate --speedup 2 --out none/s.json", 1, "asked to write a schedule to none/s.json"),
        ("explain --preset var-256 --schedule schedule.json", 2, "exclude each other"),
        ("explain --schedule missing.json", 2, "does not exist"),
        ("explain --schedule own_models.py", 1, "a schedule is read from a JSON object"),
        ("explain --batch 0", 2, "--batch"),
        ("explain --run own_models:run", 2, "demo has its own generation loop"),
        ("explain own_models:tiny --preset var-256", 2, "needs --run package.module:function"),
        ("explain own_models:tiny --run own_models:run", 2, "needs --preset NAME or --schedule"),
        (
            "explain own_models: --preset var-256 --run own_models:run",
            2,
            "given as package.module:name",
        ),
        ("demo --ratios 0", 1, "nothing to compare"),
        ("demo --out own_models.py", 2, "is a file"),
        ("unknown", 2, "No such command"),
    ],
)
def test_wrong_arguments(cli: Cli, folder: Path, arguments: str, code: int, message: str) -> None:
    outcome = cli(*arguments.split())
    assert (outcome.code, outcome.out) == (code, "")
    assert message in outcome.message


@pytest.mark.parametrize(
    ("model", "run", "message"),
    [
        ("own_model:tiny", "own_models:run", "ModuleNotFoundError: No module named 'own_model'"),
        ("syntax:tiny", "own_models:run", "SyntaxError"),
        ("own_models:tinny", "own_models:run", "no callable 'tinny'; did you mean tiny"),
        ("own_models:no_module", "own_models:run", "must return a torch.nn.Module; found str"),
        ("own_models:broken", "own_models:run", "KeyError: 'weights' ({here}/own_models.py:15)"),
        ("own_models:tiny", "own_models:rnu", "no callable 'rnu'; did you mean run"),
        ("own_models:tiny", "own_models:broken_run", "ValueError: no prompt ({here}/own_models.py"),
        ("own_models:tiny", "own_models:no_images", "found torch.float32 (3, 8)"),
    ],
)
def test_own_code_that_fails(cli: Cli, folder: Path, model: str, run: str, message: str) -> None:
    outcome = cli("demo", "--model", model, "--run", run, "--schedule", "schedule.json", "--json")
    assert (outcome.code, outcome.out) == (1, "")
    assert message.format(here=folder) in outcome.message
    assert "Traceback" not in outcome.err


def test_a_schedule_that_the_run_does_not_follow(cli: Cli, folder: Path) -> None:
    outcome = cli("explain", *OWN[:3], "--preset", "var-256")
    assert outcome.code == 1
    assert "Give the schedule that the loop runs" in outcome.message


def test_missing_packages_are_named_without_a_traceback() -> None:
    script = (
        "import sys; sys.modules['typer'] = None; from fastvar_fx.cli import main; "
        "sys.exit(main(['presets']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert done.stderr.endswith(  # torch may have something to say before
        "fastvar-fx: needs typer, rich, jinja2, matplotlib, pillow; not installed: typer; "
        'run pip install "fastvar-fx[cli]"\n'
    )


def test_help_lists_the_commands(cli: Cli) -> None:
    code, out, _ = cli("--help")
    assert code == 0
    assert all(command in out for command in ("presets", "explain", "demo"))


# --- calibrate --------------------------------------------------------------------------------


@pytest.mark.slow
def test_calibrate_own_model(cli: Cli, folder: Path) -> None:
    (folder / "schedule.json").write_text(Schedule(SCALES, (0.5,)).to_json())
    options = ("--speedup", "1.2", "--levels", "0.75", "--seeds", "1", "--logits", "head")
    files = ("--out", "plan.json", "--keep", "measured.json", "--figure", "plan.png")
    code, out, err = cli("calibrate", *OWN, *options, *files)
    assert code == 0
    assert "layer 1 ffn 0.75 from step 4, run 1: 4 of 4" in err
    assert "the plan is 1." in err
    plan = Schedule.from_json((folder / "plan.json").read_text())
    assert plan.depth == 2
    assert plan.ratios_at(5) == (0.0, 0.75)
    assert "--schedule plan.json --method fastvar" in " ".join(out.split())
    with Image.open(folder / "plan.png") as picture:
        assert picture.width > 200
    guided = ("--guidance", "0.01", "--conditional", "first", "--out", "guided.json")
    code, out, err = cli("calibrate", *OWN, *options, *guided)
    assert code == 0
    plan_of_both = Schedule.from_json((folder / "guided.json").read_text())
    assert f"no guidance from step {plan_of_both.guidance_until} on" in out
    again = cli("calibrate", *OWN, *options[2:], *files, "--speedup", "9")
    assert again.code == 1
    assert "a speed-up of 9 cannot be met" in again.message
    assert Schedule.from_json((folder / "plan.json").read_text()) == plan

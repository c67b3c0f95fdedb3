"""The examples on upstream checkouts: what they say of a path that is absent or of other things."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import fastvar_fx

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.append(str(EXAMPLES))

import checkouts  # noqa: E402

sys.path.remove(str(EXAMPLES))  # its scripts are no modules for other tests

FILES = {
    "infinity": {
        "--checkout": "infinity/models/infinity.py",
        "--checkpoint": "",
        "--vae": "",
        "--text-encoder": "config.json",
    },
    "hart": {
        "--checkout": "hart/modules/models/transformer/hart_transformer_t2i.py",
        "--checkpoint": "ema_model.bin",
        "--vae": "config.json",
        "--text-encoder": "config.json",
    },
}
"""What each option of a script asks for: a file, or a folder that holds one."""

Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs an example with such paths; returns what it says when it stops."""

    def run(script: str, paths: dict[str, Path]) -> str:
        options = [text for option, path in paths.items() for text in (option, str(path))]
        monkeypatch.setattr(sys, "argv", [script, *options, "--prompt", "a fox"])
        monkeypatch.setattr(sys, "path", [*sys.path])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
        return str(stopped.value)

    return run


def prepare(script: str, folder: Path) -> dict[str, Path]:
    """Makes every path that a script asks for, of empty files."""
    paths = {}
    for option, holds in FILES[script].items():
        paths[option] = folder / option.strip("-")
        file = paths[option] / holds
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return paths


@pytest.mark.parametrize(
    ("script", "option"), [(script, option) for script in FILES for option in FILES[script]]
)
def test_an_absent_path(script: str, option: str, run: Run, tmp_path: Path) -> None:
    paths = prepare(script, tmp_path) | {option: tmp_path / "nowhere"}
    said = run(script, paths)
    assert said.startswith(
        f"asked for {option} {tmp_path / 'nowhere'}; found nothing at that path."
    )
    assert f"To do: give {option} the path of " in said


@pytest.mark.parametrize(
    ("script", "option", "holds"),
    [(script, *item) for script in FILES for item in FILES[script].items() if item[1]],
)
def test_a_folder_of_something_else(
    script: str, option: str, holds: str, run: Run, tmp_path: Path
) -> None:
    paths = prepare(script, tmp_path)
    (paths[option] / holds).unlink()
    assert f"{paths[option]}; found no {holds} in it." in run(script, paths)


def test_a_checkpoint_that_is_none(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkouts, "check_device", lambda: torch.device("cpu"))
    paths = prepare("infinity", tmp_path)
    assert "found a file that torch cannot read" in run("infinity", paths)
    torch.save({"trainer": {}}, paths["--checkpoint"])
    assert "found no 'pos_start' in it, but ['trainer']." in run("infinity", paths)


def test_a_missing_package_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "probe.py").write_text("import a_package_that_nobody_has")
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit, match="found no module 'a_package_that_nobody_has'"):
        checkouts.load(tmp_path, "probe")


def test_a_script_does_not_hide_the_package_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "infinity"
    package.mkdir()
    (package / "probe.py").write_text("found = True")
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    for name in ("infinity", "infinity.probe"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert checkouts.load(tmp_path, "infinity.probe").found
    monkeypatch.delitem(sys.modules, "infinity")
    monkeypatch.delitem(sys.modules, "infinity.probe")


def test_pictures_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))])
    fast = fastvar_fx.transform(model.eval(), fastvar_fx.Schedule((1, 2), (0.5,)))

    def draw(each: nn.Module) -> Tensor:
        return torch.full((4, 5, 3), 200 if each is fast else 100, dtype=torch.uint8)

    checkouts.compare(draw, model, fast, tmp_path / "both.png")
    with Image.open(tmp_path / "both.png") as picture:
        assert picture.size == (10, 4)
        assert picture.getpixel((4, 0)) == (100, 100, 100)
        assert picture.getpixel((5, 0)) == (200, 200, 200)
    said = capsys.readouterr().out
    assert re.match(r"dense: [\d.]+ s\npruned: [\d.]+ s\n", said)
    assert str(fastvar_fx.explain(fast)) in said

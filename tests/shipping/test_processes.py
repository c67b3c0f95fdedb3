"""Real packages: exported by one process, run by another that has no compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(command: str, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.shipping.processes", command, str(folder)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_one_process_compiles_and_another_needs_no_compiler(tmp_path: Path) -> None:
    run("export", tmp_path / "toy")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["toy"]
    names = sorted(file.name for file in (tmp_path / "toy").iterdir())
    assert names == ["000.pt2", "001.pt2", "002.pt2", "manifest.json"]
    assert "right" in run("load", tmp_path / "toy", CXX="/bin/false")

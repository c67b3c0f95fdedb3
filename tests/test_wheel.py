"""What the wheel holds."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The files of a wheel that is built from the checkout."""
    with ZipFile(_built("wheel", tmp_path_factory)) as archive:
        return set(archive.namelist())


def _built(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp(kind)
    build = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (file,) = folder.iterdir()
    return file


@pytest.mark.parametrize("package", ["fastvar_fx", "passes"])
def test_both_packages_are_typed(package: str, names: set[str]) -> None:
    assert {f"{package}/__init__.py", f"{package}/py.typed"} <= names


def test_every_module_of_both_packages_is_in_it(names: set[str]) -> None:
    files = [file for package in ("fastvar_fx", "passes") for file in (ROOT / package).rglob("*")]
    modules = {str(file.relative_to(ROOT)) for file in files if file.suffix == ".py"}
    assert len(modules) > 50
    assert modules == {name for name in names if name.endswith(".py")}


def test_the_templates_of_pages_are_in_it(
    names: set[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    parts = {f"fastvar_fx/page/page.{kind}" for kind in ("html", "css", "js")}
    assert parts <= names
    with tarfile.open(_built("sdist", tmp_path_factory)) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    assert parts <= sources


def test_it_holds_nothing_else_than_both_packages_and_metadata(names: set[str]) -> None:
    tops = {name.split("/")[0] for name in names}
    metadata = {top for top in tops if top.endswith(".dist-info")}
    assert len(metadata) == 1
    assert tops - metadata == {"fastvar_fx", "passes"}
    (folder,) = metadata
    assert f"{folder}/licenses/LICENSE" in names
    assert f"{folder}/entry_points.txt" in names

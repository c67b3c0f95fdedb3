"""The folder that packages are shipped in: compiled graphs and a manifest.

    manifest.json   the schedules, what each package was made for and by, and checksums
    007.pt2         one compiled graph

It is written under another name and then renamed, so that it is whole or not there. Reading it
unpickles nothing, but packages are compiled code.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

import fastvar_fx
from fastvar_fx.errors import PackageError

Manifest = dict[str, Any]

_MANIFEST: Final = "manifest.json"
_FORMAT: Final = "fastvar_fx packages 1"
_INSTRUCTIONS: Final = re.compile(
    r"(s?sse|avx|amx|fma|f16c|bmi|abm|adx|v?aes|sha|gfni|v?pcl|popcnt|movbe)"
)
"""What the names of instruction sets in /proc/cpuinfo begin with, on x86."""


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a folder that becomes `path` at the end; it is removed if an error is raised.

    Raises:
        PackageError: If `path` is there already, or cannot be made.
    """
    _check_absent(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    except OSError as error:
        raise PackageError(f"{path} cannot be written: {error}; give another folder") from error
    try:
        yield part
        part.chmod(0o755)  # `mkdtemp` lets the owner alone read it
        _check_absent(path)
        part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _check_absent(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise PackageError(
            f"{path} is there already, and export overwrites nothing; give a new folder, or remove "
            f"that one"
        )


def write_manifest(folder: Path, content: Manifest) -> None:
    """Writes the manifest, with the versions and the checksums of the folder's files."""
    files = {file.name: _checksum(file) for file in sorted(folder.iterdir())}
    manifest = {"format": _FORMAT, "versions": versions(), "files": files, **content}
    text = json.dumps({**manifest, "checksum": _checksum_of(manifest)}, indent=1)
    with (folder / _MANIFEST).open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a folder whose files are all there and as they were written.

    Raises:
        PackageError: If the folder is missing, incomplete or damaged, or was written by other
            versions.
    """
    try:
        data = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise PackageError(
            f"{folder} is no folder that fastvar_fx.export wrote: {_MANIFEST} cannot be read "
            f"({error.strerror})"
        ) from error
    except ValueError as error:
        raise PackageError(f"{folder / _MANIFEST} is damaged: {error}; {_AGAIN}") from error
    manifest: Manifest = data if isinstance(data, dict) else {}
    found = manifest.get("format")
    if found != _FORMAT:
        raise PackageError(f"{folder} is of the format {found!r}, not {_FORMAT!r}; {_AGAIN}")
    if manifest.pop("checksum", None) != _checksum_of(manifest):
        raise PackageError(f"{folder / _MANIFEST} is damaged: it lacks its checksum; {_AGAIN}")
    _check_equal("version", manifest["versions"], versions())
    for name, checksum in manifest["files"].items():
        _check_file(folder, name, checksum)
    return manifest


_AGAIN: Final = "export the model again, or copy the folder again"


def _check_file(folder: Path, name: str, checksum: str) -> None:
    if Path(name).name != name:
        raise PackageError(f"{folder / _MANIFEST} names {name!r}, which is no file of the folder")
    try:
        found = _checksum(folder / name)
    except OSError as error:
        raise PackageError(
            f"{folder} is incomplete: {name} cannot be read ({error.strerror}); {_AGAIN}"
        ) from error
    if found != checksum:
        raise PackageError(
            f"{folder / name} is damaged: its SHA-256 is {found}, and {checksum} was exported; "
            f"{_AGAIN}"
        )


def _checksum(file: Path) -> str:
    return sha256(file.read_bytes()).hexdigest()


def _checksum_of(manifest: Manifest) -> str:
    return sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


# --- where packages run ---------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Returns the versions that packages hold for: code is compared as Python's bytecode."""
    return {
        "fastvar_fx": fastvar_fx.__version__,
        "torch": torch.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
    }


def machine_of(model: nn.Module) -> dict[str, Any]:
    """Returns what compiled code depends on: the device of a model, and what it can do."""
    devices = {parameter.device for parameter in model.parameters()}
    kinds = sorted({device.type for device in devices})
    machine = {"device": ", ".join(kinds), "platform": f"{platform.system()} {platform.machine()}"}
    if "cuda" in kinds:
        found = {torch.cuda.get_device_capability(d) for d in devices if d.type == "cuda"}
        machine["capability"] = ", ".join(f"{major}.{minor}" for major, minor in sorted(found))
    return machine | {
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "instructions": _instructions(),
    }


def check_machine(exported: Mapping[str, Any], model: nn.Module) -> None:
    """Checks that packages run on the device of a model.

    Raises:
        PackageError: If they were compiled for another device or CPU.
    """
    here = machine_of(model)
    names = "instructions"
    missing = set(exported[names]) - set(here.pop(names))
    _check_equal("machine", {k: v for k, v in exported.items() if k != names}, here)
    if missing:
        raise PackageError(
            f"the packages were compiled for a CPU with {', '.join(sorted(missing))}, which this "
            f"one lacks; export the model on a machine like this one"
        )


def _check_equal(what: str, exported: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    differ = [
        f"{name} {exported.get(name, 'nothing')} there, {here.get(name, 'nothing')} here"
        for name in {**exported, **here}
        if exported.get(name) != here.get(name)
    ]
    if differ:
        raise PackageError(
            f"the packages were exported with another {what}: {'; '.join(differ)}. Export the "
            f"model again, with what it is to run with"
        )


def _instructions() -> list[str]:
    """Returns the instruction sets of the CPU; none where Linux does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    arm = flags.startswith("Features")
    return sorted(flag for flag in flags.split()[2:] if arm or _INSTRUCTIONS.match(flag))

"""What a calibration has measured so far; in a file, from which an interrupted one goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastvar_fx.calibration.reference import Losses
from fastvar_fx.errors import ArgumentError


class Found(NamedTuple):
    """What a generation loses and the FLOPs that pruning saves in it, by step."""

    loss: Losses
    saved: dict[int, float]


class Journal:
    """What was found so far, by what ran.

    Attributes:
        found: The findings.
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any]) -> None:
        """Reads what an earlier calibration has found.

        Args:
            path: The file; None to keep nothing.
            about: What the findings depend on, as plain data.

        Raises:
            ArgumentError: If the file holds something else, or has no folder.
        """
        self._path = path
        self._about: dict[str, Any] = {}
        self._before: dict[str, Any] | None = None
        self.found: dict[str, Found] = {}
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            what = "is a folder" if path.is_dir() else f"is in {path.parent}, which is no folder"
            raise ArgumentError(f"{path} {what}; give a file that can be written")
        if path is not None and path.exists():
            self._read(path)
        self.belongs_to(about)

    def _read(self, path: Path) -> None:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            self._before = dict(data["about"])
            self.found = {
                name: Found(*map(_by_step, parts)) for name, parts in data["found"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArgumentError(
                f"{path} holds no calibration; give another file, or delete it"
            ) from error

    @property
    def is_kept(self) -> bool:
        """Whether what is found goes into a file."""
        return self._path is not None

    def belongs_to(self, about: Mapping[str, Any]) -> None:
        """Adds what the findings depend on, as plain data.

        Raises:
            ArgumentError: If the file holds a calibration with something else.
        """
        added = json.loads(json.dumps(about))
        before = added if self._before is None else self._before
        differs = [key for key in added if before.get(key) != added[key]]
        if differs:
            raise ArgumentError(
                f"{self._path} holds a calibration with other {', '.join(differs)}; give another "
                f"file, or delete it"
            )
        self._about |= added

    def put(self, name: str, found: Found) -> None:
        """Adds what was found, and writes the file whole or not at all."""
        self.found[name] = found
        if self._path is None:
            return
        part = self._path.with_name(f"{self._path.name}.part")
        part.write_text(json.dumps({"about": self._about, "found": self.found}), encoding="utf-8")
        part.replace(self._path)


def _by_step(part: Mapping[str, float]) -> dict[int, float]:
    """Returns numbers by step, whose keys JSON has made text."""
    return {int(step): number for step, number in part.items()}

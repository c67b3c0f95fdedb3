"""The folder of a run: images, manifest, and what the run is.

    run.json            what the pictures depend on; another run is refused
    images/00000017.png one file for each image, named by its index
    manifest.jsonl      a line for each image, by index
    manifest-3.jsonl    while the run goes on: the lines of the process of rank 3

Files are written under another name and then renamed, so that each is whole or absent. Manifests of
processes grow by the lines of a whole batch, after its files are there; a line that was cut off is
ignored, and its batch is drawn again.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, Final
from zipfile import ZipFile

import numpy as np
from PIL import Image as Picture
from torch import Tensor

from fastvar_fx.errors import ArgumentError, RunError
from fastvar_fx.sampling.plan import Image

Record = dict[str, Any]
"""A line of the manifest: index, seed, class or prompt, file, bytes, sha256."""

_COMPRESSION: Final = 1
"""Of PNG, 0 to 9: on photographs, 6 takes three times as long for files 7 % smaller."""
_ENCODERS: Final = 4
"""Threads that encode the images of a batch."""


class Folder:
    """The folder of a run.

    Args:
        path: The folder; all processes of a run see the same one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._images = path / "images"
        self._run = path / "run.json"
        self._manifest = path / "manifest.jsonl"

    # --- beginning -----------------------------------------------------------------------------

    @contextmanager
    def claimed(self, run: Mapping[str, Any]) -> Iterator[None]:
        """Makes the folder, or takes up the run that it holds, for one process and those it leads.

        Args:
            run: What the pictures depend on.

        Raises:
            ArgumentError: If the folder holds other files or another run, or a run draws into it.
            OSError: If the folder cannot be written.
        """
        import fcntl  # not on Windows

        try:
            self._images.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise OSError(
                f"asked to write images to {self.path}, which cannot be made: {error.strerror}; "
                f"give another folder"
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ArgumentError(
                    f"another run is drawing into {self.path}; wait for its end, or give another "
                    f"folder"
                ) from error
            self._take_up(run)
            yield

    def _take_up(self, run: Mapping[str, Any]) -> None:
        if self._run.exists():
            self.check(run)
        else:
            own = {self._images.name, ".lock", f".{self._run.name}.part"}
            others = sorted(file.name for file in self.path.iterdir() if file.name not in own)
            others += sorted(file.name for file in self._images.iterdir())
            if others:
                raise ArgumentError(
                    f"{self.path} has no run.json, but other files, such as {others[0]}; give a "
                    f"new or empty folder"
                )
            with _written_whole(self._run) as file:
                file.write(json.dumps(run, indent=2).encode() + b"\n")
        for left in (*self.path.glob(".*.part"), *self._images.glob(".*.part")):
            left.unlink()  # a process was killed while it wrote

    def check(self, run: Mapping[str, Any]) -> None:
        """Checks that the folder holds this run.

        Raises:
            ArgumentError: If it holds another one; the message names what differs.
            RunError: If `run.json` is not there, or is not what a run writes.
        """
        try:
            found = json.loads(self._run.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise RunError(
                f"there is no {self._run} on this machine; give a folder that all processes see"
            ) from error
        except ValueError as error:
            raise RunError(f"{self._run} is no JSON file: {error}; give another folder") from error
        keys = run.keys() | (found.keys() if isinstance(found, dict) else set())
        asked = json.loads(json.dumps(run))
        differ = sorted(key for key in keys if key not in found or found[key] != asked.get(key))
        if differ:
            what = "; ".join(f"{k} {found.get(k)!r} there, {asked.get(k)!r} asked" for k in differ)
            raise ArgumentError(
                f"{self.path} holds another run: {what}. Give another folder, or the options of "
                f"that run"
            )

    # --- the manifest --------------------------------------------------------------------------

    def merge(self, ranks: Iterable[int] = ()) -> dict[int, Record]:
        """Puts the lines of all processes into the manifest and returns them, by index.

        Args:
            ranks: Processes that may have lines, also where listing the folder does not show it.

        Raises:
            RunError: If a line is not what a run writes.
        """
        parts = {*self.path.glob("manifest-*.jsonl"), *map(self._part, ranks)}
        records: dict[int, Record] = {}
        for file in (self._manifest, *sorted(parts)):
            records |= {record["index"]: record for record in _read_lines(file)}
        ordered = dict(sorted(records.items()))
        if ordered:
            with _written_whole(self._manifest) as merged:
                merged.writelines(_line(record) for record in ordered.values())
        for part in parts:
            part.unlink(missing_ok=True)
        return ordered

    def missing(self, records: Mapping[int, Record], count: int) -> list[int]:
        """Returns which of the first images have no line, or no file of the size in their line."""
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(self._images)}

        def there(index: int) -> bool:
            return index in records and sizes.get(_name(index)) == records[index]["bytes"]

        return [index for index in range(count) if not there(index)]

    def recorded(self, ranks: Iterable[int]) -> int:
        """Returns how many images these processes have recorded since the run began."""
        files = [part for rank in ranks if (part := self._part(rank)).exists()]
        return sum(file.read_bytes().count(b"\n") for file in files)

    def _part(self, rank: int) -> Path:
        return self.path / f"manifest-{rank}.jsonl"

    # --- images --------------------------------------------------------------------------------

    def write(self, rank: int, kind: str | None, images: Mapping[Image, Tensor]) -> None:
        """Writes images and then their lines.

        Args:
            rank: Of this process.
            kind: "class" or "prompt", what the images are of; None if neither.
            images: What they show, uint8 (H, W, 3) each.
        """
        records = []
        with ThreadPoolExecutor(_ENCODERS) as threads:
            files = list(threads.map(png, images.values()))
        for image, data in zip(images, files, strict=True):
            name = _name(image.index)
            with _written_whole(self._images / name) as file:
                file.write(data)
            condition = {} if kind is None else {kind: image.condition}
            records.append(
                {"index": image.index, "seed": image.seed}
                | condition
                | {"file": f"{self._images.name}/{name}", "bytes": len(data)}
                | {"sha256": sha256(data).hexdigest()}
            )
        _append(self._part(rank), b"".join(map(_line, records)))

    def write_npz(self, records: Mapping[int, Record], count: int) -> Path:
        """Writes the first images as one array `arr_0`, uint8 (count, H, W, 3), in `images.npz`.

        One image at a time is in memory.

        Raises:
            RunError: If a file is not what its line says, or the images differ in size.
        """
        target = self.path / "images.npz"
        first = self._pixels(records[0])
        shape = (count, *first.shape)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        with (
            _written_whole(target) as file,
            ZipFile(file, "w") as archive,
            archive.open("arr_0.npy", "w", force_zip64=True) as array,
        ):
            np.lib.format.write_array_header_1_0(array, header)
            for index in range(count):
                pixels = self._pixels(records[index])
                if pixels.shape != first.shape:
                    raise RunError(
                        f"an array holds images of one size, {first.shape[:2]} as the first; found "
                        f"{pixels.shape[:2]} in {records[index]['file']}. Leave out --npz"
                    )
                array.write(pixels.tobytes())
        return target

    def _pixels(self, record: Record) -> Any:
        file = self._images / _name(record["index"])
        data = file.read_bytes()
        if sha256(data).hexdigest() != record["sha256"]:
            raise RunError(
                f"{file} is not the image that the manifest names; remove it and run the same "
                f"command again, to draw it again"
            )
        with Picture.open(io.BytesIO(data), formats=("PNG",)) as picture:
            return np.asarray(picture)


def _name(index: int) -> str:
    return f"{index:08d}.png"


def png(pixels: Tensor) -> bytes:
    """Returns a PNG file of pixels, uint8 (H, W, 3) on the CPU."""
    buffer = io.BytesIO()
    Picture.fromarray(pixels.numpy()).save(buffer, "PNG", compress_level=_COMPRESSION)
    return buffer.getvalue()


def _line(record: Record) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _read_lines(file: Path) -> Iterator[Record]:
    """Yields the lines of a manifest, without one at the end that was cut off."""
    if not file.exists():
        return
    *lines, _ = file.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            known = all(isinstance(record[key], int) for key in ("index", "seed", "bytes"))
        except (ValueError, TypeError, KeyError):
            known = False
        if not known:
            raise RunError(
                f"{file}:{number} is no line of a manifest; remove the line, so that its image is "
                f"drawn again"
            )
        yield record


def _append(file: Path, data: bytes) -> None:
    """Appends to a file all of the data or, if it fails, nothing."""
    with file.open("ab", buffering=0) as end:
        size = end.tell()
        try:
            while data:
                data = data[end.write(data) :]
        except OSError:
            end.truncate(size)
            raise


@contextmanager
def _written_whole(file: Path) -> Iterator[IO[bytes]]:
    """Opens a file that takes its place when all of it is written."""
    part = file.with_name(f".{file.name}.part")
    try:
        with part.open("wb") as stream:
            yield stream
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise

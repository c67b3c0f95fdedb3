"""Builds the training set: crops of the photographs that `photographs.csv` lists.

The photographs are wallpapers of Debian packages under free licences. To fetch and unpack them:

    apt-get download mate-backgrounds plasma-workspace-wallpapers \
        lomiri-wallpapers-16.04 lomiri-wallpapers-20.04
    for file in *.deb; do dpkg-deb -x "$file" "packages/${file%%_*}"; done
    python examples/train/data.py packages set.safetensors

Each photograph is cut into 256 x 256 crops at several zooms; its class is its motif. All crops of a
held-out photograph are held out.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SIDE = 256
ZOOMS = (1.0, 1.5, 2.5)
"""Shorter side of the resized photograph, in units of `SIDE`."""

LIST = Path(__file__).with_name("photographs.csv")
TRAIN, HELD_OUT = "train", "held out"


@dataclass(frozen=True)
class Photograph:
    """A row of `photographs.csv`.

    Attributes:
        package: Debian package.
        file: Name of the file in it, or of the folder that holds it in several sizes.
        author: The photographer.
        licence: Its licence.
        motif: Its class.
        split: `TRAIN` or `HELD_OUT`.
    """

    package: str
    file: str
    author: str
    licence: str
    motif: str
    split: str


@dataclass(frozen=True)
class CropSet:
    """Crops and their classes.

    Attributes:
        images: Uint8 (N, 3, 256, 256).
        labels: int64 (N,).
        held_out: Uint8 (M, 3, 256, 256), of other photographs.
        held_out_labels: int64 (M,).
        motifs: Names of the classes.
    """

    images: Tensor
    labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor
    motifs: tuple[str, ...]

    def save(self, path: Path) -> None:
        """Writes a safetensors file."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "motifs"}
        save_file(tensors, path, {"motifs": json.dumps(self.motifs)})

    @classmethod
    def load(cls, path: Path) -> CropSet:
        """Reads what `save` wrote.

        Raises:
            SystemExit: If the file is missing, damaged or of another kind.
        """
        try:
            with safe_open(path, framework="pt") as file:
                motifs = tuple(json.loads((file.metadata() or {})["motifs"]))
                names = [f.name for f in fields(cls) if f.name != "motifs"]
                made = cls(**{name: file.get_tensor(name) for name in names}, motifs=motifs)
        except (OSError, KeyError, SafetensorError) as error:
            raise SystemExit(
                f"{path} is not a training set ({type(error).__name__}: {error}); build it with "
                f"examples/train/data.py"
            ) from error
        made._check(path)
        return made

    def _check(self, path: Path) -> None:
        for name in ("images", "held_out"):
            images = getattr(self, name)
            if images.dtype != torch.uint8 or images.shape[1:] != (3, SIDE, SIDE):
                raise SystemExit(
                    f"{name} of {path} are uint8 (N, 3, {SIDE}, {SIDE}); found {images.dtype} "
                    f"{tuple(images.shape)}. Build the set with examples/train/data.py"
                )


def photographs(path: Path = LIST) -> list[Photograph]:
    """Returns the rows of the list."""
    with path.open(encoding="utf-8", newline="") as file:
        return [Photograph(*row) for row in list(csv.reader(file))[1:]]


def motifs(listed: list[Photograph]) -> tuple[str, ...]:
    """Returns the names of the classes."""
    return tuple(dict.fromkeys(photograph.motif for photograph in listed))


def find(photograph: Photograph, packages: Path) -> Path:
    """Returns the largest picture of a photograph in the unpacked packages.

    Raises:
        SystemExit: If there is none.
    """
    inside = packages / photograph.package
    found = [
        path
        for path in inside.rglob("*")
        if path.suffix in {".jpg", ".png"}
        and photograph.file in {path.name, *path.parts}
        and path.stem != "screenshot"
    ]
    if not found:
        raise SystemExit(
            f"there is no picture {photograph.file} of {photograph.package} under {inside}; unpack "
            f"the package there, see the head of {Path(__file__).name}"
        )
    return max(found, key=lambda path: path.stat().st_size)


def opened(path: Path) -> Image.Image:
    """Returns a picture in RGB.

    Raises:
        SystemExit: If the file is no picture, or smaller than one crop.
    """
    try:
        with Image.open(path) as file:
            picture = file.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise SystemExit(
            f"{path} is a file that cannot be read as a picture ({error}); unpack the package again"
        ) from error
    if min(picture.size) < SIDE:
        raise SystemExit(
            f"crops have {SIDE} x {SIDE} pixels, but {path} has only {picture.size[0]} x "
            f"{picture.size[1]}; leave it out of the list"
        )
    return picture


def crops(picture: Image.Image, zooms: Sequence[float]) -> Iterator[Tensor]:
    """Yields crops of a picture, uint8 (3, 256, 256), at all zooms."""
    for zoom in zooms:
        resized = resize(picture, zoom)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)  # (h, w, 3) -> (3, h, w)
        for top in _starts(resized.height):
            for left in _starts(resized.width):
                yield pixels[:, top : top + SIDE, left : left + SIDE].clone()


def resize(picture: Image.Image, zoom: float) -> Image.Image:
    """Returns a picture whose shorter side is `zoom` crops long; it is never enlarged."""
    factor = min(zoom * SIDE / min(picture.size), 1.0)
    width, height = (round(side * factor) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def save_held_out(listed: list[Photograph], packages: Path, folder: Path) -> None:
    """Writes the middle of each held-out photograph as a JPEG whose name begins with its class."""
    folder.mkdir(parents=True, exist_ok=True)
    for photograph in listed:
        if photograph.split == HELD_OUT:
            picture = resize(opened(find(photograph, packages)), 1.5)
            left, top = (picture.width - SIDE) // 2, (picture.height - SIDE) // 2
            name = f"{motifs(listed).index(photograph.motif)}-{Path(photograph.file).stem}.jpg"
            middle = picture.crop((left, top, left + SIDE, top + SIDE))
            middle.save(folder / name, quality=90)


def build(listed: list[Photograph], packages: Path, zooms: Sequence[float] = ZOOMS) -> CropSet:
    """Returns the crops of all photographs of a list.

    Raises:
        SystemExit: If the folder is empty, or a photograph is missing, damaged or too small.
    """
    if not packages.is_dir() or not any(packages.iterdir()):
        raise SystemExit(
            f"{packages} has no photographs, it does not exist or is empty; unpack the packages "
            f"there, see the head of {Path(__file__).name}"
        )
    parts: dict[str, tuple[list[Tensor], list[int]]] = {TRAIN: ([], []), HELD_OUT: ([], [])}
    for photograph in listed:
        images, labels = parts[photograph.split]
        cut = list(crops(opened(find(photograph, packages)), zooms))
        images += cut
        labels += [motifs(listed).index(photograph.motif)] * len(cut)
        print(f"{photograph.file}: {len(cut)} crops, {photograph.split}", flush=True)
    (images, labels), (held_out, held_out_labels) = parts[TRAIN], parts[HELD_OUT]
    return CropSet(
        torch.stack(images),
        torch.tensor(labels),
        torch.stack(held_out),
        torch.tensor(held_out_labels),
        motifs(listed),
    )


def _starts(length: int) -> list[int]:
    """Returns evenly spaced starts of crops that cover a side and overlap by a quarter or more."""
    count = 1 + -(-4 * (length - SIDE) // (3 * SIDE))
    return [round(start) for start in np.linspace(0, length - SIDE, count)]


def main() -> None:
    """Builds the set from the command line."""
    parser = argparse.ArgumentParser(description="Build the training set from unpacked packages.")
    parser.add_argument("packages", type=Path, help="folder with one subfolder per package")
    parser.add_argument("out", type=Path, help="safetensors file to write")
    parser.add_argument("--held-out", type=Path, help="folder for held-out photographs as JPEGs")
    parser.add_argument(
        "--zooms",
        type=float,
        nargs="+",
        default=ZOOMS,
        metavar="ZOOM",
        help="shorter sides of the resized photographs, in crops",
    )
    args = parser.parse_args()
    if args.held_out:
        save_held_out(photographs(), args.packages, args.held_out)
    made = build(photographs(), args.packages, args.zooms)
    made.save(args.out)
    print(f"{args.out}: {len(made.images)} crops, {len(made.held_out)} held out, {made.motifs}")


if __name__ == "__main__":
    main()

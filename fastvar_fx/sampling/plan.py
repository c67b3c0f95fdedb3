"""What is drawn: the seed and the class or prompt of each image, and the batch that it is in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final, Literal

from fastvar_fx.errors import ArgumentError

Condition = int | str | None
"""A class, a prompt, or nothing for a model that takes neither."""

MOST_IMAGES: Final = 100_000_000
"""File names have eight digits."""

_MOST_PROMPTS: Final = 1_000_000
LONGEST_PROMPT: Final = 4096
"""Characters."""


@dataclass(frozen=True)
class Conditions:
    """What the images show: image i is of `values[i % len(values)]`.

    Attributes:
        kind: What the values are; None if the model takes neither.
        values: The classes or prompts; empty if `kind` is None.
    """

    kind: Literal["class", "prompt"] | None = None
    values: Sequence[int] | Sequence[str] = ()

    def of(self, index: int) -> Condition:
        """Returns the class or prompt of an image."""
        return self.values[index % len(self.values)] if self.values else None

    def __str__(self) -> str:
        if self.kind is None:
            return "none"
        name = {"class": "classes", "prompt": "prompts"}[self.kind]
        digest = sha256("\n".join(map(str, self.values)).encode()).hexdigest()
        return f"{len(self.values)} {name}, sha256 {digest[:16]}"


@dataclass(frozen=True)
class Image:
    """An image to draw."""

    index: int
    seed: int
    condition: Condition


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The images of a run and their batches.

    Batch b holds the images b * batch to (b + 1) * batch - 1, also where the last of them are
    beyond the count and are not kept. So the batch of an image, and with it the last bits of what
    is computed, depends neither on the number of processes nor on the count.

    Attributes:
        count: How many images are kept.
        batch: Images drawn at once.
        seed: That of image 0; image i has `seed + i`.
        conditions: What the images show.
    """

    count: int
    batch: int
    seed: int
    conditions: Conditions

    def images(self, batch: int) -> list[Image]:
        """Returns the images of a whole batch."""
        indices = range(batch * self.batch, (batch + 1) * self.batch)
        return [Image(i, self.seed + i, self.conditions.of(i)) for i in indices]


def read_prompts(file: Path) -> tuple[str, ...]:
    """Returns the prompts of a text file in UTF-8, one on each line.

    Raises:
        ArgumentError: If a line is empty or too long, or there are no or too many prompts.
    """
    try:
        with file.open(encoding="utf-8") as lines:
            prompts = tuple(line.strip() for line in lines)
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{file} holds prompts in UTF-8; {error}") from error
    if not 1 <= len(prompts) <= _MOST_PROMPTS:
        raise ArgumentError(
            f"{file} holds 1 to {_MOST_PROMPTS} prompts, one on each line; found {len(prompts)}"
        )
    for line, prompt in enumerate(prompts, start=1):
        if not 1 <= len(prompt) <= LONGEST_PROMPT:
            raise ArgumentError(
                f"{file}:{line}: a prompt has 1 to {LONGEST_PROMPT} characters; found {len(prompt)}"
            )
    return prompts

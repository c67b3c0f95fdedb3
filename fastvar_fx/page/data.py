"""What a page shows, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from passes.refusal import Refusal


@dataclass(frozen=True)
class Tile:
    """A figure at the top of the page.

    Attributes:
        label: What it is.
        value: The figure, with its unit.
        note: What it is made of.
    """

    label: str
    value: str
    note: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An image of the batch; pictures are data URIs.

    Attributes:
        dense: Drawn by the dense model.
        pruned: Drawn by the pruned model, from the same seed.
        difference: How far they are apart, in the colours of `Samples.colors`.
        psnr: The same as one number, in words.
    """

    dense: str
    pruned: str
    difference: str
    psnr: str


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Images of the batch.

    Attributes:
        images: The first of them.
        batch: How many there are.
        width: Pixels.
        height: Pixels.
        highest: The difference that has the last colour; colour values lie in 0 to 1.
        colors: CSS colours of differences from 0 to `highest`, evenly spaced.
    """

    images: tuple[Sample, ...]
    batch: int
    width: int
    height: int
    highest: float
    colors: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class KeptMap:
    """The tokens that a branch kept.

    Attributes:
        step: Index into `Kept.steps`.
        block: Index into `Kept.blocks`.
        branch: Index into `Kept.branches`.
        bits: A bit for each token in row-major order, as hexadecimal digits; 1 if it was kept.
    """

    step: int
    block: int
    branch: int
    bits: str


@dataclass(frozen=True, kw_only=True)
class KeptStep:
    """A pruned step.

    Attributes:
        label: Its index and its token map.
        kept: Tokens that a branch keeps.
        tokens: Tokens of the step.
        rows: Height of the map that is shown.
        columns: Its width.
    """

    label: str
    kept: int
    tokens: int
    rows: int
    columns: int


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The tokens that every branch kept, of the first image.

    Attributes:
        steps: The pruned steps.
        blocks: Module paths of the blocks that prune.
        branches: Module paths of their branches.
        maps: What they kept.
        joint: Whether several maps are drawn jointly, of which the first is shown.
    """

    steps: tuple[KeptStep, ...]
    blocks: tuple[str, ...]
    branches: tuple[str, ...]
    maps: tuple[KeptMap, ...]
    joint: bool


@dataclass(frozen=True, kw_only=True)
class GrownStep:
    """The first image after a step.

    Attributes:
        label: The step and what it does.
        dense: Data URI of what the dense model has drawn.
        pruned: The same of the pruned model.
    """

    label: str
    dense: str
    pruned: str


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A bar of a chart.

    Attributes:
        name: "dense" or "pruned".
        value: What it stands for, with its unit.
        length: Its length, from 0 to 1.
        limit: Where the FLOP limit lies, from 0 to 1; None without one.
    """

    name: str
    value: str
    length: float
    limit: float | None = None


@dataclass(frozen=True, kw_only=True)
class BarGroup:
    """Bars that are compared.

    Attributes:
        label: What they are of.
        note: More on it; may be empty.
        result: How they compare; may be empty.
        bars: The bars.
    """

    label: str
    note: str
    result: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Groups of bars on one scale.

    Attributes:
        title: What they show.
        note: How to read them.
        groups: From top to bottom.
    """

    title: str
    note: str
    groups: tuple[BarGroup, ...]


@dataclass(frozen=True, kw_only=True)
class Line:
    """What a branch does at a step, in blocks that do the same.

    Attributes:
        step: 0-based.
        blocks: The module paths of the blocks, in short.
        branch: The branch's module path; empty if the line is on whole blocks.
        kind: The kind of branch.
        kept: Tokens that it runs on, and of how many.
        flops: FLOPs, dense and as it runs.
        program: Number of the program; empty if there is none.
        refusal: Why it stays dense, if it was refused.
        source: The user's line of code that the refusal names; empty if it cannot be read.
    """

    step: int
    blocks: str
    branch: str
    kind: str
    kept: str
    flops: str
    program: str
    refusal: Refusal | None
    source: str


@dataclass(frozen=True, kw_only=True)
class Page:
    """A page; what is None or empty is left out.

    Attributes:
        title: What was run.
        subtitle: Its schedule, and what the times depend on.
        lines: The table of `fastvar_fx.explain`.
        remarks: The lines below that table.
        tiles: The most important figures.
        charts: Times and FLOPs.
        notes: How the figures were measured.
        doubt: Why the times are unusable or may be so.
        samples: Images, dense and pruned.
        kept: Kept tokens.
        growth: The image after each step.
    """

    title: str
    subtitle: tuple[str, ...]
    lines: tuple[Line, ...]
    remarks: tuple[str, ...]
    tiles: tuple[Tile, ...]
    charts: tuple[Chart, ...]
    notes: tuple[str, ...] = ()
    doubt: str = ""
    samples: Samples | None = None
    kept: Kept | None = None
    growth: tuple[GrownStep, ...] = ()

    @property
    def kept_data(self) -> dict[str, Any]:
        """What the script needs of `kept`."""
        assert self.kept is not None
        names = {"blocks": self.kept.blocks, "branches": self.kept.branches}
        return names | {
            "steps": [vars(step) for step in self.kept.steps],
            "maps": [vars(each) for each in self.kept.maps],
        }

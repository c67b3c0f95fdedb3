"""The ways to run a model that the benchmark compares, by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Final, Literal

from fastvar_fx.errors import ModelError, did_you_mean

What = Literal["dense", "pruned", "skip", "peer"]
"""What runs: "dense", without pruning; "pruned", where steps of ratio 1 run on no tokens; "skip",
where the loop leaves these steps out; "peer", as "pruned" with the operators of FastVAR's authors.
"""


@dataclass(frozen=True)
class Variant:
    """One way to run a model. As a string: `{what}-{eager|compiled}[-graph]`.

    Attributes:
        what: What runs.
        compiled: Whether the blocks are compiled by `fastvar_fx.compile`.
        graph: Whether the token loop is replayed as a CUDA graph.

    Example:
        >>> str(Variant("pruned", graph=True)), Variant.parse("dense-compiled").compiled
        ('pruned-eager-graph', True)
    """

    what: What
    compiled: bool = False
    graph: bool = False

    @classmethod
    def parse(cls, name: str) -> Variant:
        """Returns the variant of a name.

        Raises:
            ModelError: If there is none; the message offers close names.
        """
        if name not in _BY_NAME:
            close = did_you_mean(name, _BY_NAME)
            raise ModelError(f"no benchmark row is named {name!r}; {close}")
        return _BY_NAME[name]

    @property
    def dense(self) -> Variant:
        """The dense variant of the same kind: what this one is compared with."""
        return replace(self, what="dense")

    @property
    def played(self) -> Variant:
        """The variant without the CUDA graph: what is recorded."""
        return replace(self, graph=False)

    def __str__(self) -> str:
        """Its name."""
        mode = "compiled" if self.compiled else "eager"
        return f"{self.what}-{mode}{'-graph' * self.graph}"


def _all_variants() -> Iterator[Variant]:
    groups: tuple[tuple[What, ...], ...] = (("dense", "pruned", "skip"), ("peer",))
    for compared in groups:
        for compiled, graph, what in product((False, True), (False, True), compared):
            yield Variant(what, compiled, graph)


VARIANTS: Final = tuple(_all_variants())
"""All of them, kind by kind, dense first; the peer's come last."""
DENSE: Final = Variant("dense")
PRUNED: Final = Variant("pruned")
_BY_NAME: Final = {str(variant): variant for variant in VARIANTS}

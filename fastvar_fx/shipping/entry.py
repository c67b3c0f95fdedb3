"""What a manifest says of one kind of call: which package runs it, on what, and what that does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from fastvar_fx.errors import PackageError
from passes.analyse.caches import Copied, Growth
from passes.analyse.costs import BranchReport
from passes.refusal import Refusal
from passes.trace.state import Path, show

Key = tuple[int | None, int, int | None]
"""Schedule, layer and step; (None, layer, None) for calls that run dense."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One kind of call of a block, and what runs it.

    Attributes:
        schedule: The index of its schedule; None if it runs dense.
        layer: The index of the block.
        step: The step; None if it runs dense.
        tokens: The tokens of its map.
        form: How the call is written.
        token_map: Where the token map is.
        block: The digest of the description of the block.
        arguments: The same of the arguments.
        graph: The number of the package; None for the block's own forward.
        inputs: Where the inputs of the graph are read.
        features: The branches whose outputs the graph returns or takes.
        branches: A report on every branch.
        caches: The caches that the graph grows.
        outcome: How the result is made, and what is stored.
        more: How many outputs the graph has after those.
        refusal: Why the block stays dense.
    """

    schedule: int | None
    layer: int
    step: int | None
    tokens: int
    form: tuple[int, tuple[str, ...]]
    token_map: Path
    block: str
    arguments: str
    graph: int | None = None
    inputs: tuple[Path, ...] = ()
    features: tuple[int, ...] = ()
    branches: tuple[BranchReport, ...] = ()
    caches: tuple[Growth | Copied, ...] = ()
    outcome: tuple[str, ...] = ()
    more: int = 0
    refusal: Refusal | None = None

    @property
    def key(self) -> Key:
        """What it is looked up by."""
        return self.schedule, self.layer, self.step

    @property
    def growths(self) -> tuple[Growth, ...]:
        """The caches that grow in buffers."""
        return tuple(cache for cache in self.caches if isinstance(cache, Growth))

    def as_data(self) -> dict[str, Any]:
        """Returns it as plain data; what is empty is left out.

        Raises:
            PackageError: If an input is read by a key that is neither text nor an integer.
        """
        data = {each.name: getattr(self, each.name) for each in fields(self)}
        data |= {
            "inputs": [_path_data(path) for path in self.inputs],
            "token_map": _path_data(self.token_map),
            "branches": [
                {**vars(branch), "refusal": branch.refusal and _refusal_data(branch.refusal)}
                for branch in self.branches
            ],
            "caches": [asdict(cache) for cache in self.caches],
            "refusal": self.refusal and _refusal_data(self.refusal),
        }
        return {name: value for name, value in data.items() if value not in (None, [], ())}

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Entry:
        """Reads what `as_data` returned, also from JSON."""
        count, names = data["form"]
        return cls(
            schedule=data.get("schedule"),
            layer=int(data["layer"]),
            step=data.get("step"),
            tokens=int(data["tokens"]),
            form=(int(count), tuple(names)),
            token_map=_path(data["token_map"]),
            block=str(data["block"]),
            arguments=str(data["arguments"]),
            graph=data.get("graph"),
            inputs=tuple(map(_path, data.get("inputs", ()))),
            features=tuple(data.get("features", ())),
            branches=tuple(map(_branch, data.get("branches", ()))),
            caches=tuple(map(_cache, data.get("caches", ()))),
            outcome=tuple(data.get("outcome", ())),
            more=int(data["more"]),
            refusal=_refusal(data.get("refusal")),
        )


def _path_data(path: Path) -> list[Sequence[Any]]:
    for _, key in path:
        if type(key) not in (str, int):
            raise PackageError(
                f"{show(path[1:])} is read by a key of {type(key).__name__}, which a manifest "
                f"cannot hold; use text or integers as keys"
            )
    return list(path)


def _path(data: Any) -> Path:
    return tuple((str(kind), key) for kind, key in data)


def _refusal_data(refusal: Refusal) -> dict[str, str]:
    return {key: value for key, value in vars(refusal).items() if key != "_node"}


def _refusal(data: Any) -> Refusal | None:
    return None if data is None else Refusal(**data)


def _branch(data: dict[str, Any]) -> BranchReport:
    return BranchReport(**{**data, "refusal": _refusal(data.get("refusal"))})


def _cache(data: dict[str, Any]) -> Growth | Copied:
    return Copied(**data) if "reason" in data else Growth(**data)

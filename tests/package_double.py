"""Packages without a compiler: the folder, the manifest and all checks are real."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from fastvar_fx.shipping import export
from fastvar_fx.shipping.package import Package, Signature


class _Graphs:
    """Keeps graphs in memory, and runs them in the place of what a compiler would write."""

    def __init__(self) -> None:
        self.kept: dict[bytes, Any] = {}

    def write(
        self, graph: GraphModule, examples: Sequence[Any], file: Path, surrounding: Any
    ) -> Signature:
        content = f"graph {len(self.kept)} {surrounding}".encode()
        file.write_bytes(content)
        self.kept[content] = graph
        return Signature.of(graph, examples)

    def runner(self, package: Package, device: torch.device) -> Any:
        graph = self.kept[package.file.read_bytes()]

        class Runner:
            @staticmethod
            def boxed_run(tensors: list[Tensor]) -> list[Tensor]:
                layouts = [meta[:2] for meta in package.signature.inputs if meta]
                assert [(tuple(x.shape), x.stride()) for x in tensors] == layouts
                made: list[Tensor] = graph.forward(*tensors)
                return [x.clone() if any(x is y for y in tensors) else x for x in made]

        return Runner


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within it, packages are graphs in memory."""
    graphs = _Graphs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "compile_package", graphs.write)
        patch.setattr(Package, "_runner", lambda self, device: graphs.runner(self, device))
        yield

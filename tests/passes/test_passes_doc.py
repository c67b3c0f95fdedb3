"""The code in docs/passes.md runs, and its table lists the pipeline."""

import re
from pathlib import Path
from typing import Any

import torch

import passes

PAGE = (Path(__file__).parents[2] / "docs" / "passes.md").read_text(encoding="utf-8")


def test_the_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {"__name__": "docs_passes"}
    exec(compile(code, "docs/passes.md", "exec"), names)
    calls = names["program"].graph_module.graph.find_nodes
    assert not calls(op="call_function", target=torch.ops.aten.detach.default)
    assert calls(op="call_function", target=torch.ops.aten.linear.default)
    plain = passes.run(names["context"]).graph_module.graph
    assert plain.find_nodes(op="call_function", target=torch.ops.aten.detach.default)


def test_the_table_is_the_pipeline() -> None:
    rows = re.findall(r"^\| (`.*?`) \|", PAGE, re.MULTILINE)
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    order = []
    for each in passes.PIPELINE:
        inner = getattr(each, "passes", (each,))
        order += [type(one).__name__ for one in inner]
    assert listed == order

"""What `import fastvar_fx` imports beside torch: neither Dynamo nor Inductor nor sympy."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = (
    "torch._dynamo",
    "torch._inductor",
    "torch.fx.experimental.symbolic_shapes",
    "sympy",
    "matplotlib",
    "typer",
    "rich",
    "PIL",
)
"""Each of these takes from a tenth of a second to more than one to import."""

PROBE = """
import builtins, json, sys
import torch

heavy = set(json.loads(sys.argv[1])) - set(sys.modules)
importing = []
chains = {}
plain_import = builtins.__import__

def traced_import(name, namespace=None, *rest):
    importing.append((namespace or {}).get("__name__", "?"))
    try:
        return plain_import(name, namespace, *rest)
    finally:
        for found in heavy & set(sys.modules) - set(chains):
            chains[found] = [n for n in (*importing, found) if not n.startswith("importlib")]
        importing.pop()

builtins.__import__ = traced_import
import fastvar_fx
builtins.__import__ = plain_import
print(json.dumps(chains))
"""


def heavy_imports(*names: str) -> dict[str, list[str]]:
    """Returns which of the modules `import fastvar_fx` loads, each with who imports whom."""
    command = [sys.executable, "-c", PROBE, json.dumps(names)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    chains: dict[str, list[str]] = json.loads(done.stdout)
    return chains


def test_importing_the_package_does_not_import_compilers() -> None:
    chains = heavy_imports(*HEAVY)
    assert not chains, "\n".join(" imports ".join(chain) for chain in chains.values())


def test_the_probe_finds_what_is_imported() -> None:
    (chain,) = heavy_imports("fastvar_fx.schedule").values()
    assert chain[0] == "__main__"
    assert chain[-1] == "fastvar_fx.schedule"

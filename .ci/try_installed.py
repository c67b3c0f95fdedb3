"""Transforms the packaged model with the package as it was installed, outside of the checkout."""

from pathlib import Path

import fastvar_fx
import passes
from fastvar_fx.models import load

for package in (fastvar_fx, passes):
    assert "site-packages" in Path(package.__file__).parts, package.__file__
model = load("demo")
fast = fastvar_fx.transform(model, fastvar_fx.Schedule(model.scales, (0.5, 0.75)))
fast.autoregressive_infer_cfg(1, 3)
assert fastvar_fx.explain(fast).prunes

"""FastVAR as a compiler pass: prunes cached tokens in next-scale (VAR) image generators.

    fast = fastvar_fx.transform(model, schedule)

Source: FastVAR, arXiv 2503.23367.
"""

import passes as _passes

if getattr(_passes, "OWNER", None) != "fastvar_fx":
    raise ImportError(
        f"fastvar_fx needs its own folder `passes`, but `import passes` found {_passes.__file__}; "
        f"rename that module or put it behind fastvar_fx on sys.path"
    )

from fastvar_fx import methods
from fastvar_fx.calibration.calibrate import calibrate
from fastvar_fx.cuda_graphs import cuda_graph
from fastvar_fx.engine.report import Report
from fastvar_fx.errors import (
    ArgumentError,
    CaptureMismatchError,
    CompileError,
    FastVARError,
    GraphError,
    ModelError,
    NothingPrunedError,
    PackageError,
    RunError,
    ScheduleError,
)
from fastvar_fx.methods import Method
from fastvar_fx.register import axis_rule, register_opaque
from fastvar_fx.schedule import Schedule, presets
from fastvar_fx.shipping.export import export
from fastvar_fx.shipping.load import load
from fastvar_fx.transform import compile, explain, measure, reset, trace, transform, use

__version__ = "0.1.0"
__not_state__ = True  # what this package attaches to modules is no state of theirs

__all__ = [
    "ArgumentError",
    "CaptureMismatchError",
    "CompileError",
    "FastVARError",
    "GraphError",
    "Method",
    "ModelError",
    "NothingPrunedError",
    "PackageError",
    "Report",
    "RunError",
    "Schedule",
    "ScheduleError",
    "axis_rule",
    "calibrate",
    "compile",
    "cuda_graph",
    "explain",
    "export",
    "load",
    "measure",
    "methods",
    "presets",
    "register_opaque",
    "reset",
    "trace",
    "transform",
    "use",
]

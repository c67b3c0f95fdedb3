"""What users may rely on. A change here is a change for them: it belongs in CHANGELOG.md."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import fastvar_fx

API = """
ArgumentError: fastvar_fx.errors
    bases FastVARError, ValueError
CaptureMismatchError: fastvar_fx.errors
    bases RunError
CompileError: fastvar_fx.errors
    bases FastVARError, RuntimeError
FastVARError: fastvar_fx.errors
    bases Exception
GraphError: fastvar_fx.errors
    bases FastVARError, RuntimeError
Method: fastvar_fx.methods
    bases object
    *
    select: Select = fastvar_fx.ops.pivotal_token_selection
    take: Take = fastvar_fx.ops.take_tokens
    restore: Restore = fastvar_fx.ops.cached_token_restoration
    once: Once = False
    -> None
    cached_property asks
        -> Mapping[Rule, Sequence[str]]
    once = False
    function restore
        kept: Tensor
        index: Tensor
        cached: Tensor
        cached_scale: Scale
        scale: Scale
        -> Tensor
    property restores_anew
        -> bool
    function select
        x: Tensor
        kept: int
        -> Tensor
    function take
        x: Tensor
        index: Tensor
        -> Tensor
ModelError: fastvar_fx.errors
    bases FastVARError, ValueError
NothingPrunedError: fastvar_fx.errors
    bases FastVARError, RuntimeError
PackageError: fastvar_fx.errors
    bases FastVARError, RuntimeError
Report: fastvar_fx.engine.report
    bases object
    *
    rows: tuple[Row, ...]
    scales: tuple[Scale, ...]
    schedules: int
    cache_step: int
    prunes: bool
    unmet: dict[int, int]
    dense_calls: dict[int, int]
    early_calls: dict[int, int]
    trace_seconds: float
    skipping: Skipping
    guidance: Guidance
    pruning: Pruning
    captured_bytes: int
    peak_captured_bytes: int
    caches: Caches | None = None
    compiled: Compiled | None = None
    packages: Packaged | None = None
    step_times: dict[int, Comparison] = <factory>
    outside_share: float | None = None
    -> None
    caches = None
    compiled = None
    function flops
        step: int
        -> tuple[int, int]
    classmethod of
        engine: Engine
        -> Report
    outside_share = None
    packages = None
    property refusals
        -> tuple[Row, ...]
    property slower_steps
        -> tuple[int, ...]
    function to_json
        -> str
RunError: fastvar_fx.errors
    bases FastVARError, RuntimeError
Schedule: fastvar_fx.schedule
    bases object
    scales: Iterable[int | Sequence[int]]
    ratios: Iterable[GivenRatio | Sequence[GivenRatio]]
    *
    cache_step: int | None = None
    layers: Iterable[int] | None = None
    prefix: bool = False
    guidance_until: int | None = None
    -> None
    property depth
        -> int | None
    function entry
        step: int
        -> Ratio | tuple[Ratio, ...]
    function extend
        *scales: int | Sequence[int]
        ratio: float | None = None
        -> Schedule
    classmethod from_json
        text: str
        -> Schedule
    property full_steps
        -> tuple[int, ...]
    function guided
        step: int
        -> bool
    function kept
        step: int
        layer: int | None = None
        kind: str | None = None
        -> int
    function kept_counts
        step: int
        -> tuple[int, ...]
    function length
        step: int
        -> int
    classmethod preset
        name: str
        -> Schedule
    property pruned_steps
        -> tuple[int, ...]
    function prunes_layer
        layer: int
        -> bool
    function ratio
        step: int
        layer: int | None = None
        kind: str | None = None
        -> float
    function ratios_at
        step: int
        -> tuple[float, ...]
    property steps
        -> int
    function to_json
        -> str
    function tokens
        step: int
        -> int
    function without
        *steps: int
        -> Schedule
ScheduleError: fastvar_fx.errors
    bases FastVARError, ValueError
axis_rule: fastvar_fx.register
    *ops: str
    attention: bool = False
    -> Callable[[Rule], Rule]
calibrate: fastvar_fx.calibration.calibrate
    model: nn.Module
    run: Run | Sequence[Run]
    schedule: Schedule
    *
    speedup: float | None = None
    loss: float | None = None
    logits: str | None = None
    guidance: float | Sequence[float] | None = None
    levels: Sequence[float] = (0.5, 0.75, 0.9, 1.0)
    file: str | Path | None = None
    progress: Progress = fastvar_fx.measuring.runs.no_progress
    **options: Any
    -> Schedule
compile: fastvar_fx.transform
    fast: Model
    *
    fallback: bool = False
    fullgraph: bool = True
    **options: Any
    -> Model
cuda_graph: fastvar_fx.cuda_graphs
    fast: nn.Module
    run: Run
    *inputs: Any
    -> Recording
explain: fastvar_fx.transform
    fast: nn.Module
    -> Report
export: fastvar_fx.shipping.export
    fast: nn.Module
    folder: str | Path
    run: Callable[[Any], object] | None = None
    -> None
load: fastvar_fx.shipping.load
    model: Model
    folder: str | Path
    *
    step_of: StepOf | None = None
    on_full: OnFull | None = None
    method: str | Method | None = None
    fallback: bool = False
    -> Model
measure: fastvar_fx.transform
    fast: nn.Module
    run: Callable[[Any], object]
    *
    repeats: int = 5
    -> Report
methods: module
    Method
    depthvar
    fastervar
    high_pass_tokens
    interpolated
    lazyvar
    lowest_scores
    method_of
    names
    nearest_kept
    random_tokens
    sparsevar
    stepvar
    token_merging
    uniform_grid
    zeros
presets: fastvar_fx.schedule
    -> MappingProxyType[str, Schedule]
register_opaque: fastvar_fx.register
    function: Callable[..., Any]
    *
    fake: Callable[..., Any]
    axes: Literal['tokenwise', 'attention'] | Rule
    schema: str | None = None
    -> Callable[..., Any]
reset: fastvar_fx.transform
    fast: nn.Module
    -> None
trace: fastvar_fx.transform
    fast: nn.Module
    run: Callable[[Any], object]
    -> Report
transform: fastvar_fx.transform
    model: Model
    schedule: Schedule | Sequence[Schedule]
    *
    blocks: str | Sequence[nn.Module] | None = None
    branches: Iterable[str] | None = None
    step_of: StepOf | None = None
    on_full: OnFull = 'skip'
    live_rows: LiveRows | None = None
    conditional: LiveRows | None = None
    kv_buffer: bool = True
    strict: bool = True
    dump_dir: str | Path | None = None
    method: str | Method = 'fastvar'
    -> Model
use: fastvar_fx.transform
    fast: nn.Module
    schedule: Schedule | None
    -> None
"""


def described(name: str, value: Any) -> Iterator[str]:
    """Yields the lines on a public name: its module, its parameters, its members if a class."""
    if inspect.ismodule(value):
        yield f"{name}: module"
        yield from (f"    {key}" for key in defined_in(value))
        return
    yield f"{name}: {value.__module__}"
    if not inspect.isclass(value):
        yield from parameters(value)
        return
    yield f"    bases {', '.join(base.__name__ for base in value.__bases__)}"
    if "__init__" in vars(value):
        yield from parameters(value.__init__)
    for key, member in sorted(vars(value).items()):
        if not key.startswith("_"):
            yield from (f"    {line}" for line in described_member(key, member))


def defined_in(module: ModuleType) -> list[str]:
    """Returns the public functions and classes that a module defines."""
    public = {key: value for key, value in vars(module).items() if not key.startswith("_")}
    own = [k for k, v in public.items() if getattr(v, "__module__", "") == module.__name__]
    return sorted(own)


def described_member(name: str, member: Any) -> Iterator[str]:
    wrapped = (getattr(member, held, None) for held in ("fget", "func", "__func__"))
    function = next(filter(None, wrapped), member)
    if inspect.isfunction(function):
        yield f"{type(member).__name__} {name}"
        yield from parameters(function)
    else:
        yield f"{name} = {member!r}"


def parameters(function: Any) -> Iterator[str]:
    signature = inspect.signature(function)
    kinds = inspect.Parameter
    starred = False
    for parameter in signature.parameters.values():
        if parameter.kind is kinds.KEYWORD_ONLY and not starred:
            yield "    *"
        starred = starred or parameter.kind in (kinds.KEYWORD_ONLY, kinds.VAR_POSITIONAL)
        if parameter.name not in ("self", "cls"):
            yield f"    {written(parameter)}"
    if signature.return_annotation is not signature.empty:
        yield f"    -> {signature.return_annotation}"


def written(parameter: inspect.Parameter) -> str:
    """Returns a parameter as the head of its function has it."""
    stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(parameter.kind.name, "")
    default = parameter.default
    if inspect.isfunction(default):
        default = f"{default.__module__}.{default.__qualname__}"
    elif default is not parameter.empty:
        default = repr(default)
    given = "" if default is parameter.empty else f" = {default}"
    return f"{stars}{parameter.name}: {parameter.annotation}{given}"


def test_names_modules_and_signatures() -> None:
    found = ((name, getattr(fastvar_fx, name)) for name in fastvar_fx.__all__)
    lines = [line for name, value in found for line in described(name, value)]
    assert "\n".join(lines) == API.strip()


def test_every_public_name_is_announced() -> None:
    public = {name: value for name, value in vars(fastvar_fx).items() if not name.startswith("_")}
    submodules = {name for name, value in public.items() if isinstance(value, ModuleType)}
    assert public.keys() - submodules == set(fastvar_fx.__all__) - submodules
    assert list(fastvar_fx.__all__) == sorted(fastvar_fx.__all__)

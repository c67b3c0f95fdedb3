"""Exported models: what packages hold for, and what is refused, by name."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastvar_fx
import passes
from fastvar_fx import ModelError, PackageError, RunError, Schedule
from fastvar_fx.methods import METHODS, Method
from fastvar_fx.models.var import VAR, build
from fastvar_fx.shipping import folder as shipping_folder
from fastvar_fx.shipping.code import digest_of
from passes.trace import capture
from tests.compose.toy import LABELS, SCHEDULE, Block, Toy, assert_prunes, by_hand, transformed
from tests.engine.test_family import FAMILY
from tests.engine.test_family import Net as Family

pytestmark = pytest.mark.usefixtures("uncompiled")


def draw(model: Any) -> Tensor:
    image: Tensor = model(LABELS)
    return image


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, uncompiled: None) -> Path:
    """The packages of a toy model, which all tests share."""
    path = tmp_path_factory.mktemp("packages") / "toy"
    with torch.no_grad():
        fastvar_fx.export(transformed(Toy()), path, draw)
    return path


@pytest.fixture
def own_folder(folder: Path, tmp_path: Path) -> Path:
    """A copy of it, to damage."""
    return Path(shutil.copytree(folder, tmp_path / "toy"))


def small() -> VAR:
    """A model of one block and three steps, which are traced in no time."""
    return build("tiny", scales=(1, 2, 3), depth=1)


def pruned(**options: Any) -> VAR:
    return fastvar_fx.transform(small(), Schedule((1, 2, 3), (0.5,)), **options)


def infer(model: VAR, batch: int = 2) -> Tensor:
    return model.infer_fhat(batch, torch.arange(batch), g_seed=0)


def refused(folder: Path, model: nn.Module | None = None, **options: Any) -> str:
    with pytest.raises(PackageError) as found:
        fastvar_fx.load(model or Toy(), folder, **options)
    return str(found.value)


def refused_call(fast: nn.Module, run: Callable[[Any], object] = draw) -> str:
    with pytest.raises(PackageError) as found:
        run(fast)
    return str(found.value)


# --- running on packages --------------------------------------------------------------------------


def test_a_loaded_model_draws_the_same_and_makes_no_program(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = transformed(Toy(seed=1))  # with other weights than those of the export
    want = draw(traced)

    def fail(*_: Any) -> Any:
        raise AssertionError("something was traced")

    for name in ("run", "fingerprint"):
        monkeypatch.setattr(passes, name, fail)
    monkeypatch.setattr(capture, "FakeCall", fail)
    fast = fastvar_fx.load(Toy(seed=1), folder)
    for _ in range(3):
        assert torch.equal(draw(fast), want)
    rows = [(r.step, r.block, r.branch, r.kept, r.flops) for r in fastvar_fx.explain(fast).rows]
    assert rows == [
        (r.step, r.block, r.branch, r.kept, r.flops) for r in fastvar_fx.explain(traced).rows
    ]
    own, others = fastvar_fx.explain(fast).caches, fastvar_fx.explain(traced).caches
    assert own is not None
    assert others is not None
    assert (own.appended, own.moved) == (3 * others.appended, 3 * others.moved)
    assert_prunes(fast, by_hand(Toy(seed=1)))


def test_equal_blocks_share_packages_and_none_is_left_unused(folder: Path) -> None:
    assert len(list(folder.glob("*.pt2"))) == len(SCHEDULE.scales)
    fast = fastvar_fx.load(Toy(), folder)
    draw(fast)
    packages = fastvar_fx.explain(fast).packages
    assert packages is not None
    assert (packages.packages, packages.used) == (5, 5)
    assert f"packages of {folder}: 5 of 5 used" in str(fastvar_fx.explain(fast))


def test_programs_are_bound_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = fastvar_fx.load(Toy(), folder)
    draw(fast)
    monkeypatch.setattr(fastvar_fx.shipping.load, "describe_call", None)
    draw(fast)


def test_export_repeats_what_trace_ran(tmp_path: Path) -> None:
    fast = pruned()
    with pytest.raises(PackageError, match=r"call fastvar_fx.trace\(fast, run\) before"):
        fastvar_fx.export(fast, tmp_path / "a")
    fastvar_fx.trace(fast, infer)
    fastvar_fx.export(fast, tmp_path / "a")
    want = infer(pruned())
    assert torch.equal(infer(fastvar_fx.load(small(), tmp_path / "a")), want)
    assert torch.equal(infer(fast), want)  # as before


class Drawn(nn.Linear):
    """It notes that it was called, and nothing resets that."""

    drawn = False

    def forward(self, x: Tensor) -> Tensor:
        self.drawn = True
        return super().forward(x)


@pytest.mark.slow
def test_packages_hold_for_a_new_model_and_for_one_that_has_drawn(tmp_path: Path) -> None:
    model: Any = small()
    model.blocks[0].ffn.fc2.__class__ = Drawn
    model.blocks[0].ffn.fc2.drawn = False
    fast = fastvar_fx.transform(model, Schedule((1, 2, 3), (0.5,)))
    fastvar_fx.export(fast, tmp_path / "it", infer)
    loaded = fastvar_fx.load(model, tmp_path / "it")
    for _ in range(3):
        assert torch.equal(infer(loaded), infer(pruned()))


def test_a_copy_runs_on_the_packages_too(folder: Path) -> None:
    fast = copy.deepcopy(fastvar_fx.load(Toy(), folder))
    assert_prunes(fast, by_hand(Toy()))
    packages = fastvar_fx.explain(fast).packages
    assert packages is not None
    assert packages.used == 5


@pytest.mark.slow
def test_each_batch_size_has_its_packages(tmp_path: Path) -> None:
    """And none beyond those that were exported."""

    def run(model: Any) -> list[Tensor]:
        return [infer(model, batch) for batch in (1, 2)]

    want = run(pruned())
    fastvar_fx.export(pruned(), tmp_path / "it", run)
    fast = fastvar_fx.load(small(), tmp_path / "it")
    for _ in range(2):
        torch.testing.assert_close(run(fast), want)
    told = refused_call(fast, lambda fast: infer(fast, 3))
    for part in ("blocks.0", "argument 0", "[2, 1, 128]", "[4, 1, 128]", "float32 [6, 1, 128]"):
        assert part in told
    assert "fallback=True" in told


def test_without_a_package_calls_run_eagerly_where_that_is_asked_for(folder: Path) -> None:
    fast = fastvar_fx.load(Toy(), folder, fallback=True)
    labels = torch.arange(4)
    assert torch.equal(fast(labels), transformed(Toy())(labels))
    assert_prunes(fast, by_hand(Toy()))
    packages = fastvar_fx.explain(fast).packages
    assert packages is not None
    assert any("blocks.1" in failure and "[4, " in failure for failure in packages.failures)
    assert "eager: no package holds for blocks.0" in str(fastvar_fx.explain(fast))


def test_several_schedules(tmp_path: Path) -> None:
    def run(model: Any) -> list[Tensor]:
        return [image for schedule in FAMILY for image in model.draw(schedule.scales)]

    want = run(fastvar_fx.transform(Family(), FAMILY))
    fastvar_fx.export(fastvar_fx.transform(Family(), FAMILY), tmp_path / "family", run)
    fast = fastvar_fx.load(Family(), tmp_path / "family")
    for _ in range(2):
        assert all(map(torch.equal, run(fast), want))


def test_an_input_with_other_strides_is_brought_into_form(folder: Path) -> None:
    class Strided(Toy):
        def steps(self, *args: Any) -> Any:
            for block in self.blocks:
                block.register_forward_pre_hook(
                    lambda _, args: (args[0].mT.contiguous().mT, *args[1:])
                )
            return super().steps(*args)

    fast = fastvar_fx.load(Strided(), folder)
    torch.testing.assert_close(draw(fast), by_hand(Toy()))


def test_gradients_are_refused(folder: Path) -> None:
    fast = fastvar_fx.load(Toy(), folder)
    with torch.enable_grad(), pytest.raises(RunError, match=r"torch.no_grad\(\)"):
        draw(fast)
    assert_prunes(fast, by_hand(Toy()))


# --- another model --------------------------------------------------------------------------------


def with_wider_layer(model: Toy) -> Toy:
    model.blocks[1].ffn.up = nn.Linear(64, 128)
    model.blocks[1].ffn.down = nn.Linear(128, 64)
    return model


def with_other_dtype(model: Toy) -> Toy:
    return model.double()


def with_another_class(model: Toy) -> Toy:
    model.blocks[0].norm = nn.RMSNorm(64)
    return model


class OtherBlock(Block):
    def forward(self, x: Tensor, cond: Tensor, cache: Any = None) -> Tensor:
        out: Tensor = x + self.attn(self.norm(x) + cond[:, None], cache)
        return out


def with_other_code(model: Toy) -> Toy:
    model.blocks[0].__class__ = OtherBlock
    return model


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (with_wider_layer, "blocks.1 differs: ffn.up.weight: exported Parameter of float32 [256"),
        (with_other_dtype, "norm.weight: exported Parameter of float32 [64] on cpu, found Param"),
        (with_another_class, "found module torch.nn.modules.normalization.RMSNorm"),
        (with_other_code, "OtherBlock"),
    ],
)
def test_another_model_is_refused_when_it_is_loaded(
    folder: Path, edit: Callable[[Toy], Toy], told: str
) -> None:
    message = refused(folder, edit(Toy()))
    assert "of another model" in message
    assert told in message


def test_a_model_without_the_blocks_is_refused(folder: Path) -> None:
    assert "Sequential has no module blocks.0" in refused(folder, nn.Sequential(nn.Linear(2, 2)))


def with_eps(model: Any) -> None:
    model.blocks[1].norm.eps = 0.1


def with_setting(model: Any) -> None:
    model.blocks[1].attn.layer = 7


def with_hook(model: Any) -> None:
    model.blocks[1].ffn.register_forward_hook(lambda *args: args[-1] * 2)


def with_forward(model: Any) -> None:
    ffn = model.blocks[1].ffn
    ffn.forward = lambda x: 2 * type(ffn).forward(ffn, x)


def with_tied_weights(model: Any) -> None:
    attn = model.blocks[1].attn
    attn.k.weight = attn.q.weight


def with_dropout(model: Any) -> None:
    model.blocks[1].ffn.down = nn.Sequential(model.blocks[1].ffn.down, nn.Dropout(0.1))


@pytest.mark.parametrize(
    "edit", [with_eps, with_setting, with_hook, with_forward, with_tied_weights, with_dropout]
)
@pytest.mark.parametrize("when", ["before", "after a generation"])
def test_an_edited_block_is_refused(folder: Path, edit: Callable[[Any], None], when: str) -> None:
    model = Toy()
    if when == "before":
        edit(model)
        try:
            fast = fastvar_fx.load(model, folder)
        except PackageError:
            return
    else:
        fast = fastvar_fx.load(model, folder)
        draw(fast)
        edit(fast)
    assert "no package holds for blocks.1" in refused_call(fast)


def test_the_first_difference_is_named(folder: Path) -> None:
    model = Toy()
    with_eps(model)
    told = refused_call(fastvar_fx.load(model, folder))
    assert "norm.eps: exported 1e-05, found 0.1" in told


OUTSIDE = {"scale": 1.0}


class ReadsOutside(nn.Linear):
    """It reads a container outside of the model, which no description covers."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * OUTSIDE["scale"]


def test_a_change_that_no_description_shows_is_found_by_running_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = small()
    model.blocks[0].ffn.fc2.__class__ = ReadsOutside
    fast = fastvar_fx.transform(model, Schedule((1, 2, 3), (0.5,)))
    fastvar_fx.export(fast, tmp_path / "it", infer)
    infer(fastvar_fx.load(model, tmp_path / "it"))
    monkeypatch.setitem(OUTSIDE, "scale", 1.1)
    told = refused_call(fastvar_fx.load(model, tmp_path / "it"), infer)
    assert "computes something else than blocks.0" in told


# --- what transform was given ---------------------------------------------------------------------


def test_a_method_of_ones_own_is_given_again(tmp_path: Path) -> None:
    own = Method(select=lambda x, kept: METHODS["fastvar"].select(-x, kept))
    fastvar_fx.export(pruned(method=own), tmp_path / "own", infer)
    want = infer(pruned(method=own))
    assert "exported with method= of its own" in refused(tmp_path / "own", small())
    assert "another method" in refused(tmp_path / "own", small(), method="tome")
    fast = fastvar_fx.load(small(), tmp_path / "own", method=own)
    assert torch.equal(infer(fast), want)


def test_a_named_method_is_known(tmp_path: Path) -> None:
    name = "once-per-step"
    fastvar_fx.export(pruned(method=name), tmp_path / name, infer)
    want = infer(pruned(method=name))
    assert torch.equal(infer(fastvar_fx.load(small(), tmp_path / name)), want)
    assert "another method" in refused(tmp_path / name, small(), method="fastvar")


def test_a_function_that_tells_the_step_is_given_again(tmp_path: Path) -> None:
    def step_of(block: Any, args: Any, kwargs: Any) -> int:
        return [1, 4, 9].index(args[0].shape[1])

    fastvar_fx.export(pruned(step_of=step_of), tmp_path / "it", infer)
    assert "another step_of" in refused(tmp_path / "it", small())
    fast = fastvar_fx.load(small(), tmp_path / "it", step_of=step_of)
    assert torch.equal(infer(fast), infer(pruned()))


def test_a_loaded_model_is_not_compiled_or_exported(folder: Path, tmp_path: Path) -> None:
    fast = fastvar_fx.load(Toy(), folder)
    with pytest.raises(ModelError, match="runs on packages"):
        fastvar_fx.compile(fast)
    with pytest.raises(ModelError, match="runs on packages"):
        fastvar_fx.measure(fast, draw)
    with pytest.raises(ModelError, match="runs on packages"):
        fastvar_fx.export(fast, tmp_path / "again", draw)


# --- the folder -----------------------------------------------------------------------------------


def test_nothing_is_overwritten(folder: Path) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(PackageError, match="is there already"):
        fastvar_fx.export(transformed(Toy()), folder, draw)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise PackageError("no compiler")

    with pytest.raises(RuntimeError, match="stop"):
        fastvar_fx.export(pruned(), tmp_path / "a", stop)
    monkeypatch.setattr(fastvar_fx.shipping.export, "compile_package", fail)
    with pytest.raises(PackageError, match=r"blocks.0 at a call of 1 tokens cannot be exported"):
        fastvar_fx.export(pruned(), tmp_path / "a", infer)
    assert list(tmp_path.iterdir()) == []


def stop(_: Any) -> None:
    raise RuntimeError("stop")


def edited(folder: Path, edit: Callable[[Any], None]) -> None:
    """Edits a manifest as someone would who makes its checksum right."""
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["checksum"]
    edit(manifest)
    manifest["checksum"] = sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        (("format",), "fastvar_fx packages 9", "'fastvar_fx packages 9', not 'fastvar_fx"),
        (("versions", "torch"), "2.0.1", f"torch 2.0.1 there, {torch.__version__} here"),
        (("versions", "python"), "2.7", "python 2.7 there"),
        (("versions", "fastvar_fx"), "0.0.1", "fastvar_fx 0.0.1 there"),
        (("machine", "device"), "cuda", "device cuda there, cpu here"),
        (("machine", "capability"), "9.0", "capability 9.0 there, nothing here"),
        (("machine", "vector instructions"), "SVE", "vector instructions SVE there"),
        (("machine", "instructions"), ["avx1024"], "a CPU with avx1024, which this one lacks"),
        (("files", "../evil.pt2"), "00", "names '../evil.pt2', which is no file of the folder"),
        (("files", "999.pt2"), "00", "incomplete: 999.pt2 cannot be read"),
    ],
)
def test_what_was_exported_elsewhere_is_refused(
    own_folder: Path, place: tuple[str, ...], value: Any, told: str
) -> None:
    def edit(manifest: Any) -> None:
        for key in place[:-1]:
            manifest = manifest[key]
        manifest[place[-1]] = value

    edited(own_folder, edit)
    assert told in refused(own_folder)


def test_damage_is_refused(own_folder: Path, tmp_path: Path) -> None:
    folder = own_folder
    package, manifest = folder / "001.pt2", folder / "manifest.json"
    content, text = package.read_bytes(), manifest.read_text()
    package.write_bytes(content[:-1])
    assert "001.pt2 is damaged: its SHA-256 is" in refused(folder)
    package.unlink()
    assert "is incomplete: 001.pt2 cannot be read" in refused(folder)
    package.write_bytes(content)
    for broken in (text[: len(text) // 2], text.replace('"tokens": 16', '"tokens": 17'), "[]"):
        manifest.write_text(broken)
        message = refused(folder)
        assert "is damaged" in message or "is of the format None" in message
    manifest.unlink()
    assert "is no folder that fastvar_fx.export wrote" in refused(folder)
    assert "is no folder that fastvar_fx.export wrote" in refused(tmp_path / "nowhere")


def test_nothing_is_unpickled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    monkeypatch.setattr(pickle, "load", None)
    monkeypatch.setattr(pickle, "loads", None)
    monkeypatch.setattr(pickle, "Unpickler", None)
    monkeypatch.setattr(torch, "load", None)
    assert_prunes(fastvar_fx.load(Toy(), folder), by_hand(Toy()))


def test_instructions_of_this_cpu_are_known() -> None:
    found = shipping_folder.machine_of(Toy())["instructions"]
    assert found == sorted(set(found))


# --- digests of code ------------------------------------------------------------------------------


def helper(x: float) -> float:
    return x + 1


TABLE = torch.arange(3)


def test_digests_follow_what_code_leads_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def reads_helper(x: float) -> float:
        return helper(x)

    def reads_table() -> Tensor:
        return TABLE

    def scaled(by: float) -> Callable[[float], float]:
        return lambda x: x * by

    before = digest_of(reads_helper), digest_of(reads_table)
    assert digest_of(reads_helper) == before[0]
    assert digest_of(scaled(2)) != digest_of(scaled(3))
    monkeypatch.setitem(globals(), "helper", lambda x: x + 2)
    monkeypatch.setitem(globals(), "TABLE", torch.arange(3) + 1)
    assert digest_of(reads_helper) != before[0]
    assert digest_of(reads_table) != before[1]
    assert digest_of(torch.nn.Linear) == digest_of(torch.nn.Linear) != digest_of(torch.nn.GELU)

"""`fastvar-fx sample`: what it draws, writes and refuses, alone, cut off and in two processes."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastvar_fx import ArgumentError, RunError, transform
from fastvar_fx.cli import main, sample
from fastvar_fx.sampling import folder as folder_module
from fastvar_fx.sampling.drawing import draw_var, fingerprint, pixels_of
from fastvar_fx.sampling.folder import Folder
from fastvar_fx.sampling.loop import Pace, Sampler
from fastvar_fx.sampling.plan import Conditions, Plan, read_prompts
from fastvar_fx.sampling.processes import Processes
from tests.sampling import own

ROOT = Path(__file__).parents[2]
TOY = ("tests.sampling.own:toy", "--dense", "--draw", "tests.sampling.own:draw", "--out", "out")
PRUNED = (
    *("tests.sampling.own:var", "--draw", "tests.sampling.own:draw_var_and_die", "--count", "2"),
    *("--batch", "2", "--classes", "3"),
    *("--schedule", "schedule.json", "--method", "drift-corrected"),
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def schedule_file(here: Path) -> None:
    Path("schedule.json").write_text(own.SCHEDULE.to_json())


@pytest.fixture(scope="module")
def pruned_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two images of a pruned model."""
    folder = tmp_path_factory.mktemp("pruned")
    schedule = folder / "schedule.json"
    schedule.write_text(own.SCHEDULE.to_json())
    with torch.no_grad():
        assert cli(*PRUNED, "--schedule", schedule, "--out", folder / "out") == 0
    return folder / "out"


def cli(*arguments: object) -> int:
    return main(["sample", *map(str, arguments)])


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Returns what stderr says of a run that fails, without the frame of a terminal."""
    capsys.readouterr()
    assert cli(*arguments) != 0
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().err).split())


def images(out: str | Path = "out") -> dict[str, Any]:
    files = sorted(Path(out, "images").iterdir())
    return {file.name: np.asarray(Image.open(file)) for file in files}


def manifest(out: str | Path = "out") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(out, "manifest.jsonl").read_text().splitlines()]


def drawn_seeds() -> list[int]:
    log = Path("log")
    seeds = [int(line) for line in log.read_text().split()] if log.exists() else []
    log.write_text("")
    return seeds


def expected(index: int, condition: object, seed: int = 0) -> Any:
    shown = own.noise(own.Toy(), seed + index, condition)
    return (shown * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def check_records(out: str | Path = "out") -> list[int]:
    """Checks that each line of every manifest is of a file as it says; returns the indices."""
    lines = [
        json.loads(line)
        for file in Path(out).glob("manifest*.jsonl")
        for line in file.read_text().splitlines()
    ]
    for line in lines:
        data = Path(out, line["file"]).read_bytes()
        assert (line["bytes"], line["sha256"]) == (len(data), sha256(data).hexdigest())
    assert not list(Path(out).rglob(".*.part"))
    return sorted(line["index"] for line in lines)


def assert_equal_runs(one: str | Path, other: str | Path) -> None:
    assert Path(one, "manifest.jsonl").read_text() == Path(other, "manifest.jsonl").read_text()
    assert check_records(one) == check_records(other)
    assert {f.name for f in Path(one).iterdir()} == {f.name for f in Path(other).iterdir()}


# --- what is drawn and written ----------------------------------------------------------------


def test_images_manifest_and_array(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(*TOY, "--count", 5, "--batch", 2, "--classes", "0,7-8", "--seed", 10, "--npz") == 0
    classes = [0, 7, 8, 0, 7]
    shown = images()
    assert list(shown) == [f"{index:08d}.png" for index in range(5)]
    for index, pixels in enumerate(shown.values()):
        np.testing.assert_array_equal(pixels, expected(index, classes[index], seed=10))
    lines = manifest()
    assert [line["index"] for line in lines] == list(range(5))
    assert [line["seed"] for line in lines] == list(range(10, 15))
    assert [line["class"] for line in lines] == classes
    assert check_records() == list(range(5))
    with np.load("out/images.npz") as arrays:
        assert list(arrays) == ["arr_0"]
        assert arrays["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(arrays["arr_0"], np.stack(list(shown.values())))
    done = capsys.readouterr()
    assert "5 images in out, 5 of them drawn now" in done.out
    assert "5 of 5 images" in done.err


def test_the_last_batch_is_filled_up_and_not_kept() -> None:
    cli(*TOY, "--count", 3, "--batch", 2)
    assert drawn_seeds() == [0, 1, 2, 3]
    assert len(images()) == 3


def test_images_do_not_depend_on_the_batch() -> None:
    for batch in (1, 4):
        cli(*TOY, "--count", 6, "--batch", batch, "--out", f"by{batch}")
    assert manifest("by1") == manifest("by4")


def test_loops_that_take_no_seed() -> None:
    options = (*TOY, "--draw", "tests.sampling.own:draw_unseeded", "--count", 4)
    for batch in (1, 3):
        assert cli(*options, "--batch", batch, "--out", f"by{batch}") == 0
    assert manifest("by1") == manifest("by3")
    assert len({line["sha256"] for line in manifest("by1")}) == 4


def test_batches_drawn_from_the_global_generators_are_the_same_after_an_interruption() -> None:
    options = (*TOY, "--draw", "tests.sampling.own:draw_globally", "--count", 6, "--batch", 2)
    assert cli(*options, "--out", "whole") == 0
    assert cli(*options, "--count", 2) == 0
    assert cli(*options) == 0
    assert_equal_runs("out", "whole")
    assert len({line["sha256"] for line in manifest()}) == 6


def test_tokens_of_an_image_come_from_its_seed_alone() -> None:
    model = own.var()
    both = draw_var(model, [5, 6], [1, 2])
    torch.testing.assert_close(draw_var(model, [6], [2])[0], both[1], rtol=0, atol=1e-4)
    assert (draw_var(model, [7], [2])[0] - both[1]).abs().max() > 0.1


def test_prompts_are_data_only() -> None:
    prompts = ("../../evil.png", 'a "cat"; rm -rf /', "日本")
    Path("prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    cli(*TOY, "--count", 4, "--prompts", "prompts.txt")
    assert [line["prompt"] for line in manifest()] == [*prompts, prompts[0]]
    assert {path.name for path in Path().iterdir()} == {
        *("prompts.txt", "schedule.json", "out", "log")
    }
    assert list(images()) == [f"{index:08d}.png" for index in range(4)]
    np.testing.assert_array_equal(images()["00000001.png"], expected(1, prompts[1]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "1 to 1000000 prompts, one on each line; found 0"),
        (b"a\n\nb", "prompts.txt:2: a prompt has 1 to 4096 characters; found 0"),
        (b"a" * 4097, "prompts.txt:1: .* found 4097"),
        (b"\xff", "in UTF-8"),
    ],
)
def test_prompts_that_cannot_be_used(text: bytes, message: str) -> None:
    Path("prompts.txt").write_bytes(text)
    with pytest.raises(ArgumentError, match=message):
        read_prompts(Path("prompts.txt"))


def test_a_pruned_model_draws_what_its_transform_draws(pruned_run: Path) -> None:
    fast = transform(own.var(), own.SCHEDULE, method="drift-corrected")
    seeds, classes = [0, 1], [3, 3]
    batch = pixels_of(draw_var(fast, seeds, classes), 2)
    for pixels, want in zip(images(pruned_run).values(), batch, strict=True):
        np.testing.assert_array_equal(pixels, want.numpy())
    assert not torch.equal(batch, pixels_of(draw_var(own.var(), seeds, classes), 2))


@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        ([1], "found list"),
        (torch.zeros(2, 3, 4), r"found shape \(2, 3, 4\)"),
        (torch.zeros(1, 3, 4, 4), r"images \(2, 3, H, W\).*found shape \(1, 3, 4, 4\)"),
        (torch.full((2, 3, 4, 4), -0.5), "found values -0.5 to -0.5: scale or clamp them"),
        (torch.full((2, 3, 4, 4), torch.nan), "found values nan"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.int64), "found torch.int64"),
    ],
)
def test_what_is_no_batch_of_images(drawn: Any, message: str) -> None:
    with pytest.raises(RunError, match=message):
        pixels_of(drawn, 2)


def test_pixels_are_rounded_to_the_nearest() -> None:
    values = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 1.0005]).expand(1, 3, 1, 4)
    assert pixels_of(values.to(torch.float64), 1)[0, 0, :, 0].tolist() == [0, 0, 1, 255]
    assert pixels_of(torch.full((1, 3, 1, 1), 7, dtype=torch.uint8), 1).flatten()[0] == 7


# --- going on ---------------------------------------------------------------------------------


def test_nothing_is_drawn_twice() -> None:
    cli(*TOY, "--count", 5, "--batch", 2)
    assert drawn_seeds() == [0, 1, 2, 3, 4, 5]
    before = {line["index"]: line for line in manifest()}
    cli(*TOY, "--count", 8, "--batch", 2)  # image 5 was drawn, but not kept
    assert drawn_seeds() == [4, 5, 6, 7]
    Path("out/images/00000002.png").unlink()
    Path("out/images/00000006.png").write_bytes(b"cut off")
    written = Path("out/images/00000003.png").stat().st_mtime_ns
    cli(*TOY, "--count", 8, "--batch", 2)
    assert drawn_seeds() == [2, 3, 6, 7]
    assert Path("out/images/00000003.png").stat().st_mtime_ns == written
    cli(*TOY, "--count", 8, "--batch", 2, "--npz")
    assert drawn_seeds() == []
    assert check_records() == list(range(8))
    assert before.items() <= {line["index"]: line for line in manifest()}.items()


def test_a_line_that_was_cut_off_is_drawn_again() -> None:
    cli(*TOY, "--count", 4, "--batch", 2)
    whole = Path("out/manifest.jsonl").read_text()
    *lines, last = whole.splitlines(keepends=True)
    Path("out/manifest.jsonl").write_text("".join(lines[:1]))
    Path("out/manifest-7.jsonl").write_text("".join(lines[1:]) + last[:-9])
    Path("out/images/.00000003.png.part").write_bytes(b"\x89PNG")
    drawn_seeds()
    cli(*TOY, "--count", 4, "--batch", 2)
    assert drawn_seeds() == [2, 3]
    assert Path("out/manifest.jsonl").read_text() == whole
    assert {file.name for file in Path("out").iterdir()} == {
        ".lock",
        "images",
        "manifest.jsonl",
        "run.json",
    }
    assert check_records() == [0, 1, 2, 3]


def test_a_damaged_manifest_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    cli(*TOY, "--count", 2)
    Path("out/manifest.jsonl").write_text('{"index": 0}\n')
    assert "manifest.jsonl:1 is no line of a manifest" in error_of(capsys, *TOY, "--count", 2)


def test_a_changed_image_is_not_put_into_the_array(capsys: pytest.CaptureFixture[str]) -> None:
    cli(*TOY, "--count", 2, "--npz")
    array = Path("out/images.npz").read_bytes()
    file = Path("out/images/00000001.png")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    message = error_of(capsys, *TOY, "--count", 2, "--npz")
    assert "00000001.png is not the image that the manifest names" in message
    assert Path("out/images.npz").read_bytes() == array


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--batch 3", "batch 2 there, 3 asked"),
        ("--seed 1", "seed 0 there, 1 asked"),
        ("--classes 0-9", "images 'none' there, '10 classes, sha256"),
        ("--draw tests.sampling.own:draw_unseeded", "draw 'tests.sampling.own:draw' there"),
    ],
)
def test_another_run_is_refused(
    options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cli(*TOY, "--count", 2, "--batch", 2)
    before = manifest()
    told = error_of(capsys, *TOY, "--count", 2, "--batch", 2, *options.split())
    assert f"out holds another run: {message}" in told
    assert "Give another folder, or the options of that run" in told
    assert manifest() == before


def test_other_models_and_schedules_are_refused(
    pruned_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = error_of(capsys, *PRUNED, "--out", pruned_run, "--ratios", "0.25,0.75")
    assert "another run: ratios [0.5, 0.75] there, [0.25, 0.75] asked. Give" in told
    told = error_of(capsys, *PRUNED, "--out", pruned_run, "--method", "tome")
    assert "another run: method 'drift-corrected' there, 'tome' asked. Give" in told
    dense = (*PRUNED[: PRUNED.index("--schedule")], "--dense")
    told = error_of(capsys, *dense, "--out", pruned_run)
    assert "method 'drift-corrected' there, 'dense' asked" in told
    monkeypatch.setattr(own, "SEED", 1)
    told = error_of(capsys, *PRUNED, "--out", pruned_run)
    assert re.search("another run: weights '[0-9a-f]{16}' there, '[0-9a-f]{16}' asked", told)


def test_one_weight_changes_the_fingerprint() -> None:
    model = torch.nn.Linear(3, 4)
    before = fingerprint(model)
    assert fingerprint(model) == before
    model.bias[2] += 1e-3
    assert fingerprint(model) != before
    assert fingerprint(torch.nn.Linear(3, 4).bfloat16())


def test_a_folder_of_other_files_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out/thesis.tex").touch()
    told = error_of(capsys, *TOY, "--count", 2)
    assert "out has no run.json, but other files, such as thesis.tex" in told


def test_two_runs_do_not_draw_into_one_folder(capsys: pytest.CaptureFixture[str]) -> None:
    cli(*TOY, "--count", 2)
    with Folder(Path("out")).claimed(json.loads(Path("out/run.json").read_text())):
        told = error_of(capsys, *TOY, "--count", 2)
    assert "another run is drawing into out" in told


def test_a_folder_that_not_all_processes_see() -> None:
    with pytest.raises(RunError, match="give a folder that all processes see"):
        Folder(Path("elsewhere")).check({})


# --- failures ---------------------------------------------------------------------------------


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the batch of image 2 fail a number of times."""

    def fail(times: int) -> None:
        left = [times]

        def draw(model: own.Toy, seeds: Sequence[int], conditions: Sequence[Any]) -> Any:
            if 2 in seeds and left[0]:
                left[0] -= 1
                raise ValueError("out of luck")
            return own_draw(model, seeds, conditions)

        monkeypatch.setattr(own, "draw", draw)

    own_draw = own.draw
    return fail


def test_a_failing_batch_is_told_and_tried_again(
    failing: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    failing(1)
    assert cli(*TOY, "--count", 5, "--batch", 2) == 0
    told = capsys.readouterr().err
    assert "batch 1 (images 2 to 3) failed: --draw tests.sampling.own:draw failed: " in told
    assert "ValueError: out of luck" in told
    assert "trying once more" in told
    assert check_records() == [0, 1, 2, 3, 4]


def test_a_batch_that_fails_twice_ends_the_run(
    failing: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    failing(2)
    told = error_of(capsys, *TOY, "--count", 5, "--batch", 2)
    assert "batch 1 (images 2 to 3) failed twice" in told
    assert check_records() == [0, 1]
    drawn_seeds()
    assert cli(*TOY, "--count", 5, "--batch", 2) == 0
    assert drawn_seeds() == [2, 3, 4, 5]
    assert check_records() == [0, 1, 2, 3, 4]


class SmallDisk:
    """Binary files that may grow by so many bytes in all."""

    def __init__(self, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
        plain_open = Path.open

        def write(file: io.FileIO, data: Any) -> int:
            if not self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = io.FileIO.write(file, bytes(data)[: self.room])
            self.room -= written
            return written

        def limited(path: Path, mode: str = "r", buffering: int = -1, **options: Any) -> Any:
            if mode not in ("wb", "ab"):
                return plain_open(path, mode, buffering, **options)
            raw = type("Limited", (io.FileIO,), {"write": write})(path, mode)
            return raw if buffering == 0 else io.BufferedWriter(raw)

        self.room = room
        monkeypatch.setattr(Path, "open", limited)


def test_a_full_disk_stops_the_run_and_leaves_the_manifest_right(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = (*TOY, "--count", 6, "--batch", 2)
    assert cli(*run, "--out", "whole") == 0
    size = Path("whole/images/00000000.png").stat().st_size
    for room in range(100, 8 * size, 97):
        out = f"out{room}"
        with monkeypatch.context() as patch:
            SmallDisk(room, patch)
            code = cli(*run, "--out", out)
        told = capsys.readouterr().err
        assert "once more" not in told
        if code:
            assert f"no room to write to {out}: No space left on device. All that is" in told
        assert Path(out, "run.json").exists() or not list(Path(out).rglob("*.jsonl"))
        check_records(out)
        assert cli(*run, "--out", out) == 0
        assert_equal_runs(out, "whole")


def test_lines_are_appended_whole_or_not_at_all() -> None:
    file = Path("manifest-0.jsonl")
    file.write_bytes(b"first\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))  # then writes end in the middle
    try:
        with pytest.raises(OSError, match="too large"):
            folder_module._append(file, b"second\nthird\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == b"first\n"


# --- several processes ------------------------------------------------------------------------


def test_ranks_share_all_batches_and_know_their_machine() -> None:
    ranks = [Processes(rank, 4, rank % 2, 2) for rank in range(4)]
    shares = [rank.share(list(range(10)), rank.rank) for rank in ranks]
    assert sorted(chain(*shares)) == list(range(10))
    assert {len(share) for share in shares} == {2, 3}
    assert [list(rank.of_machine) for rank in ranks] == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_the_first_process_of_a_machine_shows_all_of_its_images() -> None:
    shown: list[Pace] = []
    folder = Folder(Path("out"))
    processes = [Processes(0, 3, 0, 2), Processes(1, 3, 1, 2), Processes(2, 3, 0, 1)]

    def sampler(rank: int) -> Sampler:
        return Sampler(
            plan=Plan(count=11, batch=2, seed=0, conditions=Conditions()),
            model=own.toy(),
            draw=own.draw,
            folder=folder,
            run={},
            processes=processes[rank],
            show=shown.append,
            tell=print,
        )

    todo = {batch: list(range(2 * batch, min(2 * batch + 2, 11))) for batch in range(6)}
    with folder.claimed({}):
        for rank in (2, 1, 0):
            sampler(rank)._draw_share(todo)
    assert [(pace.done, pace.total) for pace in shown] == [(2, 3), (3, 3), (6, 8), (8, 8)]
    assert shown[-2].per_second is None
    assert shown[-1].per_second is not None
    assert shown[-1].seconds_left == 0


def start(rank: int, world: int, port: int, *arguments: object) -> subprocess.Popen[str]:
    """Starts a process as torchrun does."""
    names = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": ROOT}
    environment = os.environ | {key: str(value) for key, value in (names | address).items()}
    command = [sys.executable, "-m", "fastvar_fx.cli", "sample", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE)


def run_processes(world: int, *arguments: object) -> list[tuple[int, str]]:
    """Returns exit code and stderr of each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = [start(rank, world, port, *arguments) for rank in range(world)]
    said = [process.communicate(timeout=300)[1] for process in running]
    return [(process.returncode, text) for process, text in zip(running, said, strict=True)]


needs_distributed = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch without distributed"
)


@pytest.mark.slow
@needs_distributed
def test_two_processes_one_of_them_killed_draw_what_one_draws() -> None:
    options = ("--draw", "tests.sampling.own:draw_and_die", "--count", 22, "--batch", 4, "--npz")
    assert cli(*TOY, *options, "--out", "alone") == 0
    drawn_seeds()
    (code, told), (killed, _) = run_processes(2, *TOY, *options)
    assert (code, killed) == (1, -9)
    assert "rank 0 waited for the other processes, but one of them ended" in told
    done = check_records()
    assert done == [*range(12), *range(16, 20)]  # rank 1 was killed in batch 3 of 1, 3, 5
    assert sorted(drawn_seeds()) == done
    assert cli(*TOY, *options) == 0
    assert sorted(drawn_seeds()) == [12, 13, 14, 15, 20, 21, 22, 23]
    assert_equal_runs("out", "alone")
    assert (
        Path("out/images.npz").read_bytes()[-200:] == Path("alone/images.npz").read_bytes()[-200:]
    )


@needs_distributed
@pytest.mark.slow
def test_torchrun_with_a_pruned_model_and_another_number_of_processes() -> None:
    options = ["tests.sampling.own:var", "--draw", "tests.sampling.own:draw_var_and_die"]
    options += ["--schedule", "schedule.json", "--count", "9", "--batch", "2", "--classes", "0-4"]
    assert cli(*options, "--out", "alone") == 0

    def torchrun(world: int) -> int:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={world}", "-m", "fastvar_fx.cli", "sample"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, *options, "--out", "out"], env=environment, timeout=600)
        return done.returncode

    assert torchrun(2) != 0
    assert not {6, 7} & set(check_records())
    Path("heal").touch()
    assert torchrun(3) == 0
    assert_equal_runs("out", "alone")


# --- the command line -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("tiny", 2, "Missing option '--count'"),
        ("tiny --count 0", 2, "greater than or equal to 1"),
        ("tiny --count 1 --draw a:b", 2, "--draw is for package.module:factory"),
        ("tiny --count 1 --dense --ratios 0.5", 2, "--dense prunes nothing"),
        ("tiny --count 1 --classes 1,x", 2, "numbers separated by commas, and ranges"),
        ("tiny --count 1 --classes 0-999999999999", 2, "1 to 100000 classes"),
        ("tiny --count 1 --classes 5-3", 2, "1 to 100000 classes"),
        ("tiny --count 1 --classes 3,1000", 1, "classes 0 to 999; found 1000"),
        ("tiny --count 1 --prompts prompts.txt", 2, "draw classes, not prompts"),
        ("tiny --count 1 --prompts prompts.txt --classes 1", 2, "exclude each other"),
        ("tinny --count 1", 1, "no model is named 'tinny'"),
        ("own:toy --count 1", 2, "needs --draw package.module:function"),
        ("own:toy --count 1 --draw own:draw", 2, "needs --preset NAME or --schedule FILE"),
    ],
)
def test_wrong_arguments(
    arguments: str, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("prompts.txt").write_text("a cat\n")
    assert cli(*arguments.split()) == code
    told = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().err).split())
    assert message in told
    assert not Path("samples").exists()


def test_the_pace_is_shown_with_the_time_left() -> None:
    assert sample._pace_text(Pace(2, 12, None)) == "2 of 12 images"
    assert sample._pace_text(Pace(2, 12, 0.125)) == "2 of 12 images, 0.125 images/s, 0:01:20 left"


def test_images_of_a_plan() -> None:
    plan = Plan(count=5, batch=2, seed=100, conditions=Conditions("prompt", ("a", "b", "c")))
    assert [(i.index, i.seed, i.condition) for i in plan.images(2)] == [
        (4, 104, "b"),
        (5, 105, "c"),
    ]

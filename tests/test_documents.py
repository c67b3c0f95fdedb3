"""What the documents show: their snippets run, and what they name exists."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvar_fx
import passes
from fastvar_fx.cli import main
from fastvar_fx.models import VAR_256, VAR_512, var
from tests import graph_double, package_double

ROOT: Final = Path(__file__).parent.parent
DOCUMENTS: Final = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
SECONDS: Final = 600
"""After which a command is taken to hang."""

NOT_RUN: Final = {
    "pip install": "needs the network; `.ci/run` does it",
    "git clone": "needs the network",
    "python -m pytest": "these very tests",
    "pytest": "these very tests",
    "ruff": "`.ci/run` does it",
    "mypy": "`.ci/run` does it",
    "lint-imports": "`.ci/run` does it",
    "fastvar-fx calibrate": "takes minutes; tests/cli/test_cli.py runs it on a small model",
    "fastvar-fx evaluate demo --schedule schedule.json": "takes what calibrate writes",
    ".ci/run": "runs these very tests",
    ".ci/gpu": "`.ci/run` rehearses it",
    "torchrun --nnodes": "needs several machines",
    "python examples/infinity.py": "needs a checkout and weights of Infinity",
    "python examples/hart.py": "needs a checkout and weights of HART",
    "python examples/ablations.py": "takes hours; tests/test_ablations.py runs it on a small model",
    "python examples/serve/": "serves until it is ended; tests/serve does both",
    "RAY_ADDRESS=auto python examples/serve/": "needs a cluster",
    "ray start": "needs several machines",
    "curl": "needs a server",
    "python examples/train/": "takes days; tests/test_training.py runs it on a small model",
}
"""Beginnings of commands that are shown and not run here, and why."""

SMALLER: Final = {
    "bench": "--preset var-tiny --repeats 1 --no-compile --resolutions ''",
    "evaluate": "--seeds 1 --repeats 1 --metrics psnr",
    "sample": "--count 2 --batch 1",
}
"""Options that are added to a command so that it takes seconds; of two, the last one counts."""

MODEL: Final = r"(?<=evaluate)( (demo|var)\S*)?(?= |$)"
"""What of a command of `evaluate` is replaced by a tiny model."""

OTHER_KEYWORDS: Final = {"seed"}  # of what `cuda_graph` returns
"""Keyword arguments that documents name and that no public name takes."""


class Snippet(NamedTuple):
    language: str
    line: int
    text: str


def snippets(document: Path) -> list[Snippet]:
    text = document.read_text()
    found = re.finditer(r"^```(\S*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Snippet(m[1], text.count("\n", 0, m.start()) + 2, m[2]) for m in found]


def commands(document: Path) -> list[str]:
    """Returns the lines of shell snippets, without comments."""
    shown = (s.text.replace("\\\n", " ") for s in snippets(document) if s.language == "bash")
    return [line for text in shown for line in without_comments(text)]


def without_comments(script: str) -> list[str]:
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in script.splitlines())
    return [line for line in lines if line]


def inline(document: Path) -> list[str]:
    """Returns what stands between single backquotes outside of snippets."""
    prose = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))


# --- what stands in for the reader's own -------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(F.scaled_dot_product_attention(*self.qkv(self.norm(x)).chunk(3, -1)))
        out: Tensor = x + self.down(F.gelu(self.up(x)))
        return out


class MyVAR(nn.Module):
    """A model that draws the maps of VAR's 512 schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def generate(self, labels: Tensor) -> Tensor:
        for side in VAR_512:
            x = labels[:, None, None].expand(-1, side * side, 16) + torch.rand(side * side, 16)
            for block in self.blocks:
                x = block(x)
        return x[..., :3].transpose(1, 2).reshape(-1, 3, side, side).sigmoid()


USERS_MODULE: Final = """
import torch
from tests.test_documents import MyVAR

def factory():
    return MyVAR().eval()

def generate(model):
    return model.generate(torch.tensor([1, 2]))

def draw(model, seeds, labels):
    return model.generate(torch.tensor(labels))
"""


def users_names() -> dict[str, Any]:
    """Returns what the snippets take for given."""
    model = var.build("tiny", scales=VAR_256, depth=2, num_classes=1000)
    labels = torch.tensor([3, 5])
    return {"fastvar_fx": fastvar_fx, "model": model, "MyVAR": MyVAR, "labels": labels}


# --- they run ----------------------------------------------------------------------------------


@pytest.mark.docs
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@documents
def test_python_snippets(
    document: Path, backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compile = functools.partial(fastvar_fx.compile, backend=backend)
    monkeypatch.setattr(fastvar_fx, "compile", compile)
    monkeypatch.setattr(fastvar_fx, "cuda_graph", graph_double.record)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fastvar_fx, "calibrate", uncalibrated)
    names = users_names()
    with package_double.uncompiled():
        for language, line, text in snippets(document):
            if language == "python":
                padded = "\n" * (line - 1) + text  # so that an error names the document's line
                exec(compile_snippet(padded, document), names)


CALIBRATE: Final = inspect.signature(fastvar_fx.calibrate)


def uncalibrated(*args: Any, **options: Any) -> Any:
    """Stands in for `calibrate`, which takes minutes: the schedule stays as it is."""
    given = CALIBRATE.bind(*args, **options).arguments
    assert all(map(callable, given["run"]))
    return given["schedule"]


def compile_snippet(text: str, document: Path) -> Any:
    return compile(text, document, "exec", dont_inherit=True)


@pytest.fixture
def shell(tmp_path: Path) -> Any:
    """A folder with `examples` and a module of the user's own, where `fastvar-fx` is installed."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "module.py").write_text(USERS_MODULE)
    script = tmp_path / "bin" / "fastvar-fx"
    script.parent.mkdir()
    script.write_text(
        f"#!{sys.executable}\nfrom fastvar_fx.cli import main\nraise SystemExit(main())\n"
    )
    script.chmod(0o755)
    path = f"{script.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(command: str) -> None:
        done = subprocess.run(
            command,
            shell=True,
            cwd=tmp_path,
            env=environment,
            timeout=SECONDS,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"

    return run


@pytest.mark.slow
@pytest.mark.docs
@documents
def test_commands(document: Path, shell: Any) -> None:
    for command in commands(document):
        if not any(command.startswith(beginning) for beginning in NOT_RUN):
            shell(smaller(command))


def smaller(command: str) -> str:
    for verb, options in SMALLER.items():
        if re.match(rf"(fastvar-fx|torchrun .* fastvar_fx.cli) {verb}", command):
            verb_and_options, *rest = re.split(r"(?=[|>&;])", command, maxsplit=1)
            tiny = re.sub(MODEL, " var-tiny", verb_and_options.strip())
            tiny = re.sub(r"(?<=--nproc-per-node )\d+", "2", tiny)
            return " ".join((tiny, options, *rest))
    return command


@documents
def test_snippets_are_of_a_language_that_is_run_or_of_none(document: Path) -> None:
    assert {snippet.language for snippet in snippets(document)} <= {"python", "bash", "text"}


# --- what they name exists ---------------------------------------------------------------------


def help_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main([*words, "--help"]) == 0
    return capsys.readouterr().out


@documents
def test_verbs_and_options(
    document: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    verbs = set(re.findall(r"^│ (\w+)  ", help_of(capsys).partition("Commands")[2], re.MULTILINE))
    options = {verb: options_in(help_of(capsys, verb)) for verb in verbs}
    assert len(options) > 3
    others = "".join(file.read_text() for file in scripts())
    known = {*options_in(others), *(option for of_verb in options.values() for option in of_verb)}
    for code in [*inline(document), *commands(document)]:
        words = code.split()
        if words[0] == "fastvar-fx" and len(words) > 1 and not words[1].startswith("-"):
            assert words[1] in verbs, code
            assert options_in(code) <= options[words[1]], code
        elif words[0].startswith(("--", "python examples")):
            assert options_in(code) <= known, code


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


def scripts() -> Iterator[Path]:
    yield from (ROOT / "examples").rglob("*.py")
    yield from (ROOT / ".ci").iterdir()
    yield ROOT / "tests" / "conftest.py"


@documents
def test_dotted_names(document: Path) -> None:
    pattern = r"(?<![\w/.])(?:fastvar_fx|passes)(?:\.[A-Za-z]\w*)+"
    for name in set(re.findall(pattern, document.read_text())):
        if not name.endswith((".md", ".py", ".json")):
            assert exists(name), f"{document.name} names {name}"


def exists(name: str) -> bool:
    """Whether a dotted name leads to a module or to what one holds."""
    package, *rest = name.split(".")
    found: Any = importlib.import_module(package)
    for part in rest:
        if not hasattr(found, part):
            try:
                importlib.import_module(f"{found.__name__}.{part}")
            except (AttributeError, ModuleNotFoundError):
                return False
        found = getattr(found, part)
    return True


@documents
def test_keyword_arguments(document: Path) -> None:
    known = OTHER_KEYWORDS | set(parameters_of_the_api())
    for code in inline(document):
        if re.match(r"\w+=|[\w.]+\(", code):
            for keyword in re.findall(r"(?<=[(,\s])(\w+)=(?!=)|^(\w+)=(?!=)", code):
                assert "".join(keyword) in known, code


def parameters_of_the_api() -> Iterator[str]:
    public = [(package, name) for package in (fastvar_fx, passes) for name in package.__all__]
    for package, name in public:
        value: Any = getattr(package, name)
        if not (inspect.isfunction(value) or inspect.isclass(value) or inspect.ismodule(value)):
            continue
        holds = inspect.isclass(value) or inspect.ismodule(value)
        members = [m for m in vars(value).values() if inspect.isfunction(m)]
        functions: list[Any] = members if holds else [value]
        for function in functions:
            yield from inspect.signature(function).parameters


@documents
def test_files_and_links(document: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text())
    for link in links:
        assert (document.parent / link).exists(), link
    tops = ("fastvar_fx/", "passes/", "examples/", "tests/", "docs/", ".ci/")
    for code in inline(document):
        if code.startswith(tops) and not re.search(r"[\s*{<]", code):
            assert (ROOT / code).exists(), code


def test_the_test_command_of_the_readme_is_that_of_ci() -> None:
    shown = [command for command in commands(ROOT / "README.md") if "pytest" in command]
    run = "\n".join(without_comments((ROOT / ".ci/run").read_text()))
    assert shown
    assert all(command in run for command in shown)


# --- the checks themselves ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (test_dotted_names, "`fastvar_fx.transfrom`"),
        (test_dotted_names, "`fastvar_fx.ops.take_token`"),
        (test_keyword_arguments, "`transform(model, brunches=)`"),
        (test_keyword_arguments, "`kv_bufer=False`"),
        (test_files_and_links, "`passes/captures.py`"),
        (test_files_and_links, "[passes](docs/nothing.md)"),
        (test_snippets_are_of_a_language_that_is_run_or_of_none, "```\nfastvar-fx demo\n```\n"),
    ],
)
def test_a_wrong_name_is_found(check: Any, text: str, tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text(text)
    with pytest.raises(AssertionError):
        check(document)


@pytest.mark.parametrize(
    "text",
    ["`fastvar-fx bench --present var-tiny`", "`fastvar-fx bnch`", "`--repeat`"],
)
def test_a_wrong_option_is_found(
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    document = tmp_path / "README.md"
    document.write_text(text)
    with pytest.raises(AssertionError):
        test_verbs_and_options(document, capsys, monkeypatch)

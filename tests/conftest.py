"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from fastvar_fx import Schedule
from fastvar_fx.measuring.subject import Subject
from fastvar_fx.models.var import VAR, build
from tests import devices

if TYPE_CHECKING:
    from fastvar_fx.measuring.demo import Measurement

settings.register_profile("local", deadline=None)
for profile in ("thorough", "long"):  # `zoo.examples` then draws more
    settings.register_profile(profile, deadline=None)
if settings.get_current_profile_name() != "ci":
    settings.load_profile("local")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default="cpu",
        metavar="cpu|cuda|double",
        help="where the tests run that can run anywhere; double: tests marked cuda run too, on the "
        "CPU and a double of the CUDA graph",
    )


def pytest_configure(config: pytest.Config) -> None:
    devices.choose(config.getoption("--device"))


@pytest.fixture(autouse=True)
def one_thread_and_no_grad() -> Iterator[None]:
    """Small tensors run fastest on one thread; generation needs no gradients."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def subject() -> Subject:
    """A tiny model that can be measured, and draws after each step too."""

    def run(model: VAR, **options: Any) -> Tensor:
        return model.autoregressive_infer_cfg(2, 3, g_seed=1, **options)

    def run_by_step(model: VAR) -> Tensor:
        latents: list[Tensor] = []
        run(model, on_step=lambda _, f_hat: latents.append(f_hat[:1]))
        return model.vae.decode(torch.cat(latents))

    scales = (1, 2, 3, 4, 6, 8)
    model = build("tiny", scales=scales, depth=2)
    return Subject("tiny", model, Schedule(scales, (0.5, 0.75)), run, run_by_step=run_by_step)


@pytest.fixture(scope="session")
def measured(subject: Subject) -> Iterator[Measurement]:
    """The tiny model, measured dense and pruned."""
    from fastvar_fx.measuring.demo import measure_both  # imports matplotlib

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield measure_both(subject, repeats=1)
    torch.set_num_threads(threads)

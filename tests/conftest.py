"""What all tests share."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from tests import devices

settings.register_profile("local", deadline=None)
settings.register_profile("thorough", deadline=None)  # `zoo.examples` then draws all
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

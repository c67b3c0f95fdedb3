"""Packages of graphs that were not compiled, for the tests that need no compiler."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import package_double


@pytest.fixture(scope="module")
def uncompiled() -> Iterator[None]:
    with package_double.uncompiled():
        yield

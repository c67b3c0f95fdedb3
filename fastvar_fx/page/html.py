"""Writes a page as one HTML file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EEXIST
from pathlib import Path
from typing import TextIO

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import fastvar_fx
from fastvar_fx.page.data import Page


def html(page: Page) -> str:
    """Returns a page as an HTML document, with its style, script and pictures inside."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    version = fastvar_fx.__version__
    return templates.get_template("page.html").render(page=page, version=version)


@contextmanager
def written_whole(path: Path, what: str = "a page") -> Iterator[TextIO]:
    """Opens a file that takes the place of the one at `path` when all of it is written.

    If the block raises, the file at `path` stays as it was.

    Args:
        path: The file.
        what: What is written, for the error.

    Raises:
        OSError: If `path` is a folder or cannot be written, before the block runs.
    """
    target = path.resolve()  # a link stays a link
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        if target.exists() and not target.is_file():
            raise FileExistsError(EEXIST, "it is no regular file")
        file = part.open("x", encoding="utf-8")
    except OSError as error:
        raise OSError(
            f"asked to write {what} to {path}, which cannot be written: {error.strerror}; give "
            f"another file, in a folder that exists"
        ) from error
    try:
        with file:
            yield file
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)

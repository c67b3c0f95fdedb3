"""The HTTP interface: the images endpoint that OpenAI's clients speak.

Requests are JSON, checked field by field; a picture comes back as base64 in the answer. Nothing of
a request becomes the name of a file, and nothing but JSON is read from it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus
from ray.util.metrics import Counter, Gauge
from replica import SEEDS, About, Picture
from starlette.requests import Request
from starlette.responses import JSONResponse

from fastvar_fx.sampling.plan import LONGEST_PROMPT, Condition

APPLICATION: Final = "fastvar_fx"
REPLICA: Final = "Replica"
_FIELDS: Final = ("prompt", "class", "n", "size", "seed", "model", "response_format", "user")
_NO_TEXT: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
_log = logging.getLogger("ray.serve")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may ask for.

    Attributes:
        images: Pictures of one request.
        prompt: Characters of a prompt.
        body: Bytes of a request.
        queue: Pictures that are asked for and not answered yet, of all requests.
        seconds: From the beginning of a request to its answer.
    """

    images: int = 8
    prompt: int = LONGEST_PROMPT
    body: int = 2**16
    queue: int = 256
    seconds: float = 120.0


class Refused(Exception):  # noqa: N818
    """An answer that is no picture, in the form of OpenAI's errors.

    Args:
        message: What was asked, what was found, what to do.
        param: The field at fault.
        status: Of HTTP.
        code: For programs.
    """

    def __init__(
        self, message: str, param: str | None = None, *, status: int = 400, code: str = "invalid"
    ) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code

    def response(self) -> JSONResponse:
        """Returns it as a response; where a later try may succeed, with the seconds to wait."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        headers = {"Retry-After": "1"} if self.status in (429, 503) else None
        return JSONResponse({"error": error}, self.status, headers)


# --- what is asked ----------------------------------------------------------------------------


def parse(body: bytes, about: About, limits: Limits) -> list[Picture]:
    """Returns the pictures that a request asks for.

    Raises:
        Refused: If it is not a request that this model can answer.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused('the body is no JSON; send an object such as {"prompt": "3"}') from error
    if not isinstance(fields, dict):
        raise Refused('the body is no JSON object; send one such as {"prompt": "3"}')
    fields = {name: value for name, value in fields.items() if value is not None}
    for name in fields:
        if name not in _FIELDS:
            raise Refused(f"asked for {name[:40]!r}; this server knows {', '.join(_FIELDS)}", name)
    _check_choice(fields, "model", about.model)
    _check_choice(fields, "size", about.size, "auto")
    _check_choice(fields, "response_format", "b64_json")
    count = _integer(fields.get("n", 1), "n", 1, limits.images)
    first = fields.get("seed", secrets.randbelow(SEEDS - count))
    first = _integer(first, "seed", 0, SEEDS - count)
    condition = _condition(fields, about, limits)
    return [Picture(seed, condition) for seed in range(first, first + count)]


def _check_choice(fields: dict[str, Any], name: str, *choices: str) -> None:
    if fields.get(name, choices[0]) not in choices:
        raise Refused(f"{name} is {' or '.join(choices)}; leave it out or give that", name)


def _integer(value: object, name: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise Refused(f"{name} is an integer from {low} to {high}", name)
    return value


def _condition(fields: dict[str, Any], about: About, limits: Limits) -> Condition:
    prompt, label = fields.get("prompt", ""), fields.get("class")
    if not isinstance(prompt, str) or len(prompt) > limits.prompt:
        raise Refused(f"prompt is a text of at most {limits.prompt} characters", "prompt")
    if about.classes is None and label is not None:
        raise Refused("the model takes no class; leave it out", "class")
    if about.takes == "nothing":
        if prompt:
            raise Refused("the model takes no prompt; give an empty one", "prompt")
        return None
    if about.takes == "prompt":
        if not prompt.strip() or _NO_TEXT.search(prompt):
            raise Refused("prompt is a text, without control characters", "prompt")
        return prompt
    assert about.classes is not None
    if (label is None) == (not prompt):
        raise Refused('the model draws classes; give one, as "class": 3 or as prompt "3"', "prompt")
    if label is None and prompt.isdecimal():
        label = int(prompt)
    return _integer(label, "class" if "class" in fields else "prompt", 0, about.classes - 1)


async def _body(request: Request, most: int) -> bytes:
    """Returns the body, read until it is longer than allowed."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which no web page can send here without being asked
        raise Refused("send the body as application/json", status=415, code="content_type")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise Refused(f"a body has at most {most} bytes", status=413, code="too_large")
    return bytes(body)


# --- what is answered -------------------------------------------------------------------------


class Images:
    """The deployment that answers HTTP requests.

    Args:
        replicas: Those that draw.
        limits: What a request may ask for.

    Attributes:
        waiting: Pictures that are asked for and not answered yet.
    """

    def __init__(self, replicas: DeploymentHandle, limits: Limits) -> None:
        self._replicas, self._limits = replicas, limits
        self._about: About | None = None
        self._ending = False
        self.waiting = 0
        self._requests = Counter("fastvar_fx_requests", "Requests, by status.", ("status",))
        self._queue = Gauge("fastvar_fx_queue", "Pictures asked for and not answered yet.")

    async def __call__(self, request: Request) -> JSONResponse:
        """Answers a request, in time."""
        try:
            async with asyncio.timeout(self._limits.seconds):
                response = JSONResponse(await self._answer(request))
        except Refused as refused:
            response = refused.response()
        except TimeoutError:
            response = Refused(
                f"no answer within {self._limits.seconds:g} s; ask for fewer pictures, or later",
                status=504,
                code="timeout",
            ).response()
        except Exception:
            _log.exception("a request failed")
            response = Refused(
                "the server failed; its log says why", status=500, code="failed"
            ).response()
        self._requests.inc(tags={"status": str(response.status_code)})
        return response

    def check_health(self) -> None:
        """Reports the queue: Ray calls this every few seconds."""
        self._queue.set(self.waiting)

    async def end(self) -> None:
        """Refuses new requests, and returns when those that came before are answered."""
        self._ending = True
        while self.waiting:
            await asyncio.sleep(0.05)

    async def _answer(self, request: Request) -> object:
        answers = {
            ("POST", "/v1/images/generations"): self._generate,
            ("GET", "/v1/models"): self._models,
            ("GET", "/healthz"): self._alive,
            ("GET", "/readyz"): self._ready,
        }
        path = request.url.path
        methods = [method for method, known in answers if known == path]
        if not methods:
            known = ", ".join(known for _, known in answers)
            raise Refused(f"there is no {path[:80]!r}; there are {known}", status=404, code="path")
        if request.method not in methods:
            raise Refused(f"{path} takes {methods[0]}", status=405, code="method")
        return await answers[request.method, path](request)

    async def _generate(self, request: Request) -> object:
        body = await _body(request, self._limits.body)
        about = await self._asked_model()
        pictures = parse(body, about, self._limits)
        files = await self._draw(pictures)
        images = [
            {"b64_json": b64encode(file).decode(), "seed": picture.seed}
            for file, picture in zip(files, pictures, strict=True)
        ]
        size, now = about.size, int(time.time())
        return {"created": now, "data": images, "output_format": "png", "size": size}

    async def _draw(self, pictures: Sequence[Picture]) -> list[bytes]:
        if self._ending:
            raise Refused("the server is ending; ask another one", status=503, code="ending")
        if self.waiting + len(pictures) > self._limits.queue:
            raise Refused(
                f"{self.waiting} pictures of at most {self._limits.queue} are waiting; ask later",
                status=429,
                code="queue_full",
            )
        self.waiting += len(pictures)
        drawn = [self._replicas.draw.remote(picture) for picture in pictures]
        try:
            files = await asyncio.gather(*drawn)
        except RayTaskError:  # which is a RayError, too, but the replica goes on
            raise
        except (RayError, RayServeException) as error:
            raise Refused(
                "the replica that drew this ended; ask again", status=503, code="replica_lost"
            ) from error
        finally:
            for each in drawn:
                each.cancel()  # what nobody waits for any more
            self.waiting -= len(pictures)
        if None in files:
            raise Refused(
                "a picture could not be drawn; the log of the server says why",
                status=500,
                code="not_drawn",
            )
        return files

    async def _asked_model(self) -> About:
        if self._about is None:
            self._about = await self._replicas.about.remote()
        return self._about

    async def _models(self, request: Request) -> object:
        about = await self._asked_model()
        model = {"id": about.model, "object": "model", "created": 0, "owned_by": "fastvar_fx"}
        return {"object": "list", "data": [model | {"size": about.size, "pruned": about.pruned}]}

    async def _alive(self, request: Request) -> object:
        return {"status": "alive", "waiting": self.waiting}

    async def _ready(self, request: Request) -> object:
        status = await asyncio.to_thread(serve.status)
        application = status.applications[APPLICATION]
        running = application.deployments[REPLICA].replica_states.get("RUNNING", 0)
        if not running or self._ending:
            raise Refused("no replica is ready", status=503, code="not_ready")
        healthy = application.status == ApplicationStatus.RUNNING
        return {"status": "ready", "replicas": running, "all": healthy}

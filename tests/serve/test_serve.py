"""The example of serving: what it answers, refuses and survives, with OpenAI's own client."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from base64 import b64decode
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastvar_fx import ArgumentError, explain
from fastvar_fx.cli.options import Asked
from tests.serve import own

ray = pytest.importorskip("ray", reason="needs the extra `serve`: ray")
openai = pytest.importorskip("openai")

EXAMPLE = Path(__file__).parents[2] / "examples" / "serve"
sys.path.append(str(EXAMPLE))
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Using extra keyword arguments on `Field`")  # in Ray
    import app
    import replica
sys.path.remove(str(EXAMPLE))

grpc = pytest.importorskip("grpc")
psutil = pytest.importorskip("psutil")  # Ray's own copy

pytestmark = pytest.mark.serve

ROOT = Path(__file__).parents[2]
SIZES = (2, 4)
MOST_IN_A_REPLICA = 2 * SIZES[-1]
QUEUE = 110
SIZE = "80x80"
MODEL = "tests.serve.own:var"
DRAW = "tests.serve.own:draw"


# --- a request and a batch, without a server --------------------------------------------------


ABOUT = replica.About(model="m", takes="class", classes=10, size=SIZE, pruned=0.5, seconds={1: 1.0})
PROMPTS = replica.About(
    model="m", takes="prompt", classes=None, size=SIZE, pruned=0.5, seconds={1: 1.0}
)
LIMITS = app.Limits(images=4, prompt=20)


def parse(fields: object, about: replica.About = ABOUT) -> list[replica.Picture]:
    return app.parse(json.dumps(fields).encode(), about, LIMITS)


def test_pictures_of_a_request() -> None:
    assert parse({"prompt": "3", "n": 2, "seed": 7}) == [(7, 3), (8, 3)]
    assert parse({"class": 3, "seed": 2**32 - 1, "n": None, "size": SIZE}) == [(2**32 - 1, 3)]
    assert parse({"prompt": "a cat", "seed": 1, "model": "m"}, PROMPTS) == [(1, "a cat")]
    assert parse({"prompt": "a\n👩‍🚀", "seed": 1}, PROMPTS) == [(1, "a\n👩‍🚀")]
    (one,), (other,) = parse({"class": 3}), parse({"class": 3})
    assert 0 <= one.seed < 2**32
    assert one.seed != other.seed


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ([], None, "no JSON object"),
        ({"n": 0, "class": 3}, "n", "from 1 to 4"),
        ({"n": 5, "class": 3}, "n", "from 1 to 4"),
        ({"n": True, "class": 3}, "n", "integer"),
        ({"n": 1.5, "class": 3}, "n", "integer"),
        ({"seed": -1, "class": 3}, "seed", "from 0 to 4294967295"),
        ({"seed": 2**32, "class": 3}, "seed", "from 0 to 4294967295"),
        ({"seed": 2**32 - 1, "n": 2, "class": 3}, "seed", "from 0 to 4294967294"),
        ({"seed": 10**400, "class": 3}, "seed", "integer"),
        ({"size": "1x1", "class": 3}, "size", f"{SIZE} or auto"),
        ({"size": [], "class": 3}, "size", f"{SIZE} or auto"),
        ({"model": "dall-e-3", "class": 3}, "model", "model is m"),
        ({"response_format": "url", "class": 3}, "response_format", "b64_json"),
        ({"quality": "hd", "class": 3}, "quality", "this server knows prompt, class"),
        ({}, "prompt", "draws classes; give one"),
        ({"prompt": "3", "class": 3}, "prompt", "give one"),
        ({"prompt": "a cat"}, "prompt", "from 0 to 9"),
        ({"prompt": "10"}, "prompt", "from 0 to 9"),
        ({"class": 10}, "class", "from 0 to 9"),
        ({"class": "3"}, "class", "integer"),
        ({"prompt": 3}, "prompt", "text of at most 20"),
        ({"prompt": "a" * 21}, "prompt", "text of at most 20"),
    ],
)
def test_requests_that_are_refused(fields: object, param: str | None, message: str) -> None:
    with pytest.raises(app.Refused, match=message) as refused:
        parse(fields)
    assert (refused.value.status, refused.value.param) == (400, param)


@pytest.mark.parametrize("prompt", ["", " \n", "a\0", "\x1b[0m", "\ud800", "a" * 21])
def test_prompts_that_are_refused(prompt: str) -> None:
    with pytest.raises(app.Refused):
        parse({"prompt": prompt}, PROMPTS)
    with pytest.raises(app.Refused, match="takes no class"):
        parse({"prompt": "a", "class": 3}, PROMPTS)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 60_000, b'{"n": ' + b"9" * 5000])
def test_bodies_that_are_no_json(body: bytes) -> None:
    with pytest.raises(app.Refused, match="no JSON"):
        app.parse(body, ABOUT, LIMITS)


@pytest.mark.parametrize(
    ("count", "seconds", "sizes"),
    [
        (0, {1: 1.0}, []),
        (3, {1: 1.0, 2: 1.9, 4: 3.7}, [2, 1]),  # time grows with the batch
        (3, {1: 1.0, 2: 1.1, 4: 1.2}, [4]),  # a batch costs what one picture does
        (5, {1: 1.0, 4: 1.2}, [4, 1]),
        (5, {4: 1.0}, [4, 4]),
    ],
)
def test_division_into_batches(count: int, seconds: dict[int, float], sizes: list[int]) -> None:
    assert replica.division(count, seconds) == sizes


def drawn_batches(folder: Path) -> list[list[int]]:
    log = folder / "batches"
    found = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    log.unlink(missing_ok=True)
    return found


def asked_for(model: str, schedule: Path | None = None) -> Asked:
    return Asked(
        model=model,
        preset=None,
        schedule_file=schedule,
        ratios=None,
        blocks=None,
        run=None,
        batch=None,
    )


def model_of(folder: Path, *sizes: int) -> tuple[replica.BatchedModel, list[Any]]:
    """Returns a model and what it has recorded."""
    schedule = folder / "schedule.json"
    schedule.write_text(own.SCHEDULE.to_json())
    recorded: list[Any] = []
    served = replica.Served(asked=asked_for(MODEL, schedule), draw=DRAW, classes=10, sizes=sizes)
    return replica.BatchedModel(served, lambda *batch: recorded.append(batch)), recorded


def pixels(file: bytes | None) -> Any:
    assert file is not None
    return np.asarray(Image.open(io.BytesIO(file))).astype(int)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of `tests.serve.own` in this process."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("here")
        patch.setenv("FOLDER", str(folder))
        yield folder


@pytest.fixture(scope="module")
def model(folder: Path) -> replica.BatchedModel:
    return model_of(folder, *SIZES)[0]


ASKED = [replica.Picture(seed, seed % 10) for seed in (3, 14, 25, 36)]


def test_a_picture_depends_on_its_own_seed_only(folder: Path) -> None:
    model, _ = model_of(folder, 4)
    alone = [model.draw([picture])[0] for picture in ASKED]
    assert len(set(alone)) == 4
    assert model.draw(ASKED) == alone  # bit by bit: the batch size is the same
    assert model.draw(ASKED[::-1]) == alone[::-1]
    assert model.draw([replica.Picture(99, 1), ASKED[2]])[1] == alone[2]


def test_a_picture_is_the_same_in_every_batch_size(model: replica.BatchedModel) -> None:
    alone = [pixels(model.draw([picture])[0]) for picture in ASKED]
    for count in (2, 3, 4):
        for file, want in zip(model.draw(ASKED[:count]), alone, strict=False):
            np.testing.assert_allclose(pixels(file), want, atol=1)


def test_batches_are_traced_at_the_start(folder: Path) -> None:
    model, recorded = model_of(folder, 2)
    assert model.about.pruned == (int(16 * 0.5) + int(25 * 0.75)) / (1 + 4 + 9 + 16 + 25)
    assert (model.about.size, model.about.classes, model.about.takes) == (SIZE, 10, "class")
    before = explain(model._model).trace_seconds
    model.draw([replica.Picture(1, 1)])
    assert explain(model._model).trace_seconds == before
    assert [batch[:2] for batch in recorded] == [(2, 1)]


def test_a_factory_returns_a_transformed_model(model: replica.BatchedModel) -> None:
    asked = asked_for("tests.serve.own:transformed")
    served = replica.Served(asked=asked, draw=DRAW, dense=True, classes=10, sizes=(2,))
    own_model = replica.BatchedModel(served, lambda *batch: None)
    assert own_model.about.pruned == model.about.pruned
    assert own_model.draw([replica.Picture(own.FAIL, 5)]) == [None]
    np.testing.assert_allclose(
        pixels(own_model.draw(ASKED[:1])[0]), pixels(model.draw(ASKED[:1])[0]), atol=1
    )


def test_a_picture_that_fails_fails_alone(model: replica.BatchedModel) -> None:
    (good,) = model.draw([replica.Picture(5, 5)])
    files = model.draw([replica.Picture(5, 5), replica.Picture(own.FAIL, 5)])
    np.testing.assert_allclose(pixels(files[0]), pixels(good), atol=1)
    assert files[1] is None
    assert not model.broken


def test_a_model_that_draws_nothing_any_more(folder: Path) -> None:
    model, _ = model_of(folder, 1)
    assert model.draw([replica.Picture(own.BREAK, 5)]) == [None]
    assert "no such picture" in model.broken


def test_a_model_takes_classes_or_prompts() -> None:
    served = replica.Served(asked=asked_for("tiny"), prompts=True)
    with pytest.raises(ArgumentError, match="give one of: a named model"):
        replica.BatchedModel(served, print)


# --- a server ---------------------------------------------------------------------------------


class Server:
    """A server in a process of its own, with a folder for `tests.serve.own`."""

    def __init__(self, folder: Path, *options: object) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        schedule = folder / "schedule.json"
        schedule.write_text(own.SCHEDULE.to_json())
        named = {"--draw": DRAW, "--schedule": schedule, "--classes": 10, "--cpus": 1}
        named |= {"--sizes": ",".join(map(str, SIZES)), "--port": self.port}
        texts = [str(part) for each in named.items() for part in each] + [*map(str, options)]
        self.log, self.told = folder / "log", False
        environment = {"FOLDER": str(folder), "RAY_metrics_report_interval_ms": "500"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(EXAMPLE / "server.py"), MODEL, *texts],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def started(self) -> Server:
        """Returns it when it serves."""
        until(lambda: "serving at" in self.log.read_text(), alive=self.process)
        drawn_batches(self.folder)
        return self

    def client(self, **options: Any) -> Any:
        url = f"http://127.0.0.1:{self.port}/v1"
        return openai.AsyncOpenAI(base_url=url, api_key="-", max_retries=0, **options)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return json.load(answer)

    def post(self, body: bytes, kind: str = "application/json") -> tuple[int, Any]:
        """Returns the status and the error of a request that is refused."""
        url = f"http://127.0.0.1:{self.port}/v1/images/generations"
        request = urllib.request.Request(url, body, {"Content-Type": kind})
        with pytest.raises(urllib.request.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=60)
        with refused.value as answer:
            return answer.code, json.load(answer)["error"]

    def ready(self) -> bool:
        try:
            return bool(self.get("/readyz")["replicas"])
        except urllib.request.HTTPError:
            return False

    def waiting(self, count: int) -> bool:
        found: int = self.get("/healthz")["waiting"]
        return found == count

    def replica(self) -> Any:
        """Returns the process that draws."""
        return psutil.Process(int((self.folder / "process").read_text()))

    def touch(self, name: str) -> None:
        (self.folder / name).touch()

    def end(self) -> int:
        if self.process.poll() is None and not self.told:
            self.tell()
        return self.process.wait(120)

    def tell(self) -> None:
        self.told = True
        self.process.send_signal(signal.SIGTERM)


def until(done: Callable[[], bool], alive: subprocess.Popen[bytes] | None = None) -> None:
    for _ in range(6000):
        if done():
            return
        assert alive is None or alive.poll() is None, "the server ended"
        time.sleep(0.05)
    raise AssertionError("nothing happened for five minutes")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("shared"), "--queue", QUEUE)
    try:
        yield server.started()
    finally:
        server.end()
        print(server.log.read_text())


@pytest.fixture
def server(shared: Server) -> Server:
    """The shared server, with nothing left to do."""
    shared.touch("go")  # for what a test that failed has left
    until(lambda: shared.waiting(0))
    (shared.folder / "go").unlink()
    drawn_batches(shared.folder)
    return shared


@pytest.fixture
def expected(model: replica.BatchedModel) -> Callable[[int], Any]:
    """Returns the pixels of a seed's picture, drawn here and alone."""
    return lambda seed: pixels(model.draw([replica.Picture(seed, seed % 10)])[0])


def generate(client: Any, seed: int, **fields: Any) -> Coroutine[Any, Any, Any]:
    extra = {"seed": seed, **fields.pop("extra_body", {})}
    coroutine: Coroutine[Any, Any, Any] = client.images.generate(
        **{"prompt": str(seed % 10), "extra_body": extra, **fields}
    )
    return coroutine


def picture(answer: Any, index: int = 0) -> Any:
    return pixels(b64decode(answer.data[index].b64_json))


async def all_of(client: Any, seeds: range) -> list[Any]:
    """Returns the answers and errors of requests at the same time."""
    asked = (generate(client, seed) for seed in seeds)
    return await asyncio.gather(*asked, return_exceptions=True)


def test_images(server: Server, expected: Callable[[int], Any]) -> None:
    async def run() -> None:
        async with server.client() as client:
            answer = await generate(client, 7, n=3, size=SIZE, response_format="b64_json")
            assert [each.seed for each in answer.data] == [7, 8, 9]
            assert (answer.size, answer.output_format) == (SIZE, "png")
            np.testing.assert_allclose(picture(answer), expected(7), atol=1)
            by_class = {"class": 7, "prompt": None}
            same = await generate(client, 7, prompt=openai.omit, extra_body=by_class)
            np.testing.assert_allclose(picture(same), expected(7), atol=1)
            assert [model.id async for model in client.models.list()] == [MODEL]

    asyncio.run(run())
    assert server.ready()


def test_a_hundred_requests_at_once(server: Server, expected: Callable[[int], Any]) -> None:
    async def run() -> list[Any]:
        async with server.client() as client:
            return await all_of(client, range(100))

    for seed, answer in enumerate(asyncio.run(run())):
        np.testing.assert_allclose(picture(answer), expected(seed), atol=1)
    batches = drawn_batches(server.folder)
    assert {len(batch) for batch in batches} <= set(SIZES)
    assert len(batches) < 75  # several at once
    assert {seed for batch in batches for seed in batch} == set(range(100))


def test_refusals_are_openai_errors(server: Server) -> None:
    async def run() -> None:
        async with server.client() as client:
            with pytest.raises(openai.BadRequestError, match="n is an integer from 1 to 8") as bad:
                await generate(client, 1, n=9)
            assert (bad.value.param, bad.value.type) == ("n", "invalid_request_error")
            with pytest.raises(openai.NotFoundError, match="/v1/images/generations"):
                await client.images.edit(image=b"", prompt="")

    asyncio.run(run())
    assert server.post(b"{")[1]["message"].startswith("the body is no JSON")
    assert server.post(b'{"class": 3}', "text/plain")[0] == 415
    status, error = server.post(b'{"prompt": "' + b"a" * 2**20)
    assert (status, error["code"]) == (413, "too_large")
    with pytest.raises(urllib.request.HTTPError, match="405"):
        server.get("/v1/images/generations")
    assert drawn_batches(server.folder) == []


def test_a_picture_that_cannot_be_drawn(server: Server, expected: Callable[[int], Any]) -> None:
    async def run() -> None:
        async with server.client() as client:
            with pytest.raises(openai.InternalServerError, match="could not be drawn") as failed:
                await generate(client, own.FAIL)
            assert failed.value.code == "not_drawn"
            np.testing.assert_allclose(picture(await generate(client, 5)), expected(5), atol=1)

    asyncio.run(run())


def test_a_full_queue(server: Server) -> None:
    async def run() -> None:
        async with server.client() as client:
            tasks = [asyncio.create_task(generate(client, own.WAIT))]
            tasks += [asyncio.create_task(generate(client, 8 * i, n=8)) for i in range(QUEUE // 8)]
            await asyncio.to_thread(until, lambda: server.waiting(1 + 8 * (QUEUE // 8)))
            with pytest.raises(openai.RateLimitError, match=f"at most {QUEUE} are waiting") as full:
                await generate(client, 0, n=8)
            assert full.value.response.headers["Retry-After"] == "1"
            server.touch("go")
            assert len(await asyncio.gather(*tasks)) == len(tasks)

    asyncio.run(run())


def test_a_client_that_left(server: Server) -> None:
    left = range(100, 130)

    async def run() -> None:
        async with server.client() as client:
            held = asyncio.create_task(generate(client, own.WAIT))
            await asyncio.to_thread(until, lambda: bool((server.folder / "batches").exists()))
            async with server.client() as leaving:
                tasks = [asyncio.create_task(generate(leaving, seed)) for seed in left]
                await asyncio.to_thread(until, lambda: server.waiting(1 + len(left)))
                for task in tasks:
                    task.cancel()
            await asyncio.to_thread(until, lambda: server.waiting(1))
            server.touch("go")
            await held
            await generate(client, 5)

    asyncio.run(run())
    drawn = {seed for batch in drawn_batches(server.folder) for seed in batch}
    assert drawn == {own.WAIT, 5}


def test_a_replica_that_is_killed(server: Server, expected: Callable[[int], Any]) -> None:
    """What it was drawing is answered with an error, and nothing else is lost."""
    seeds, half = range(40), MOST_IN_A_REPLICA // 2

    async def run() -> list[Any]:
        async with server.client() as client:
            drawing = asyncio.create_task(generate(client, own.WAIT, n=half))
            await asyncio.to_thread(until, lambda: server.waiting(half))
            in_part = asyncio.create_task(generate(client, 500, n=2 * half))
            await asyncio.to_thread(until, lambda: server.waiting(3 * half))
            others = asyncio.create_task(all_of(client, seeds))
            await asyncio.to_thread(until, lambda: server.waiting(3 * half + len(seeds)))
            server.replica().kill()
            for lost in await asyncio.gather(drawing, in_part, return_exceptions=True):
                assert isinstance(lost, openai.InternalServerError)
                assert (lost.status_code, lost.code) == (503, "replica_lost")
            return await others

    for seed, answer in enumerate(asyncio.run(run())):
        np.testing.assert_allclose(picture(answer), expected(seed), atol=1)
    drawn = {seed for batch in drawn_batches(server.folder) for seed in batch}
    assert not drawn & set(range(500, 500 + 2 * half))  # nor is the rest of a lost request drawn


def test_metrics(server: Server) -> None:
    async def run() -> None:
        async with server.client() as client:
            await generate(client, 1, n=3)
            with pytest.raises(openai.BadRequestError):
                await generate(client, 1, n=9)

    asyncio.run(run())
    address = re.search(r"metrics for Prometheus at (\S+)", server.log.read_text())
    assert address is not None
    names = [
        *(r"images(_total)?\{.*outcome=\"drawn\"", r"requests(_total)?\{.*status=\"400\""),
        *(r"queue\{", r"batch_size_bucket\{", r"seconds_per_image_sum\{", r"pruned_share\{"),
    ]

    def told() -> bool:
        with urllib.request.urlopen(address[1], timeout=60) as answer:
            text = answer.read().decode()
        values = [re.search(rf"^ray_fastvar_fx_{name}.* (\S+)$", text, re.M) for name in names]
        return all(values) and values[2] is not None and float(values[2][1]) == 0

    until(told)


def test_all_ports_are_on_loopback(server: Server) -> None:
    """But for one of Ray's, which answers nobody without the token of the cluster."""
    processes = psutil.Process(server.process.pid).children(recursive=True)
    found = [
        connection.laddr
        for process in (psutil.Process(server.process.pid), *processes)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert server.port in {port for _, port in found}
    open_ports = {port for ip, port in found if ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")}
    for port in open_ports:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
            with pytest.raises(grpc.RpcError) as refused:
                call(b"", timeout=20)
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_time_out_and_graceful_end(tmp_path: Path) -> None:
    server = Server(tmp_path, "--seconds", 10).started()

    async def run() -> None:
        async with server.client() as client:
            held = asyncio.create_task(generate(client, own.WAIT, n=8))
            await asyncio.to_thread(until, lambda: server.waiting(8))  # it is the first
            others = (generate(client, seed, n=8) for seed in (100, 200, 300))
            late = await asyncio.gather(held, *others, return_exceptions=True)
            for each in late:
                assert isinstance(each, openai.InternalServerError)
                assert (each.status_code, each.code) == (504, "timeout")
            server.touch("go")
            await generate(client, 1)
            drawn = {seed for batch in drawn_batches(server.folder) for seed in batch}
            assert not drawn & set(range(208, 308))  # what waited is not drawn any more
            (server.folder / "go").unlink()
            held = asyncio.create_task(generate(client, own.WAIT, n=2))
            await asyncio.to_thread(until, lambda: server.waiting(2))
            server.tell()

            await asyncio.to_thread(until, lambda: not server.ready())
            with pytest.raises(openai.InternalServerError, match="the server is ending"):
                await generate(client, 2)
            server.touch("go")
            assert len((await held).data) == 2

    try:
        asyncio.run(run())
    finally:
        assert server.end() == 0


def test_an_address_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = Server(tmp_path, "--port", taken.getsockname()[1])
        assert server.process.wait(300) == 1
    assert "Address already in use; give another --port" in server.log.read_text()


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    server = Server(tmp_path, "--draw", "tests.serve.own:absent")
    assert server.process.wait(300) == 1
    said = server.log.read_text()
    assert "no replica could start" in said
    assert "tests.serve.own has no callable 'absent'" in said

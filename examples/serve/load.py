"""Measures servers by alternating between them: requests per second, and how long each takes.

    python examples/serve/server.py demo --dense --port 8000
    python examples/serve/server.py demo --ratios 0.5,0.75 --port 8001
    python examples/serve/load.py http://127.0.0.1:8000/v1 http://127.0.0.1:8001/v1

Each round sends the same requests to every server, some at once: whenever one is answered, the next
is sent. The first server is the baseline. It needs the package `openai`.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median, quantiles

from openai import AsyncOpenAI


@dataclass
class Measured:
    """What was measured of a server with so many requests at once.

    Attributes:
        rates: Requests per second, by round.
        seconds: Of each request of all rounds.
    """

    rates: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


async def send(client: AsyncOpenAI, seeds: Iterator[int], seconds: list[float]) -> None:
    """Sends one request after the other until there are no seeds left."""
    for seed in seeds:
        began = time.perf_counter()
        await client.images.generate(prompt=str(seed % 10), extra_body={"seed": seed})
        seconds.append(time.perf_counter() - began)


async def one_round(client: AsyncOpenAI, seeds: range, at_once: int, measured: Measured) -> None:
    """Sends a request for each seed."""
    began, left = time.perf_counter(), iter(seeds)
    await asyncio.gather(*(send(client, left, measured.seconds) for _ in range(at_once)))
    measured.rates.append(len(seeds) / (time.perf_counter() - began))


async def measure(
    clients: list[AsyncOpenAI], requests: int, levels: list[int], rounds: int
) -> dict[tuple[int, int], Measured]:
    """Returns what was measured, by the requests at once and the index of the server."""
    found: dict[tuple[int, int], Measured] = defaultdict(Measured)
    for client in clients:  # the first request of a server opens connections
        await one_round(client, range(1), 1, Measured())
    for number in range(rounds):
        seeds = range(number * requests, (number + 1) * requests)
        for at_once in levels:
            for index, client in enumerate(clients):
                await one_round(client, seeds, at_once, found[at_once, index])
    return found


async def main() -> None:
    """Measures the servers that the command line names, and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("urls", nargs="+", help="base URLs of the servers, ending in /v1")
    parser.add_argument("--requests", type=int, default=32, help="requests of a round")
    parser.add_argument("--at-once", default="1,8", help="requests at once, such as 1,8")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    clients = [AsyncOpenAI(base_url=url, api_key="-", timeout=600) for url in args.urls]
    levels = [int(level) for level in args.at_once.split(",")]
    found = await measure(clients, args.requests, levels, args.rounds)
    models = [(await client.models.list()).data[0].to_dict() for client in clients]
    print(
        f"{'model':24} {'pruned':>6} {'at once':>8} {'req/s':>8} {'p50 s':>8} {'p95 s':>8} {'x':>6}"
    )
    for (at_once, index), measured in found.items():
        cuts, rate = quantiles(measured.seconds, n=20), median(measured.rates)
        times = f"{rate:8.3g} {cuts[9]:8.3g} {cuts[18]:8.3g}"
        model, ratio = models[index], rate / median(found[at_once, 0].rates)
        print(f"{model['id']:24} {model['pruned']:6.0%} {at_once:8} {times} {ratio:5.2f}x")


if __name__ == "__main__":
    asyncio.run(main())

"""Serves pictures over HTTP, on Ray Serve.

    python examples/serve/server.py demo --ratios 0.5,0.75 --sizes 1,2,4
    curl http://127.0.0.1:8000/v1/images/generations -H 'Content-Type: application/json' \\
        -d '{"class": 3, "seed": 7}'

SIGTERM or Ctrl-C ends it when the requests that it has accepted are answered. With RAY_ADDRESS set,
replicas are on the machines of that Ray cluster; else Ray starts on this one.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

# Ray reads these when it is imported. Its own ports take commands.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "token")
if "RAY_ADDRESS" not in os.environ:
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # loopback, on Linux too

import ray
import torch
from app import APPLICATION, REPLICA, Images, Limits
from ray import serve
from ray.serve.handle import DeploymentHandle
from replica import About, Replica, Served

from fastvar_fx.cli.options import DEMO, Asked
from fastvar_fx.cli.user_code import current_directory_importable

_OBJECTS: Final = 256 * 2**20
"""Bytes of Ray's object store: a picture is in it only on its way to the answer."""
_HEALTH_PERIOD: Final = 2.0


def application(
    served: Served, limits: Limits, replicas: tuple[int, int], resources: dict[str, int]
) -> serve.Application:
    """Returns the application: one deployment for HTTP, one that draws.

    Args:
        served: The model.
        limits: What a request may ask for.
        replicas: The least and the most replicas that draw.
        resources: What Ray gives each of them, `num_cpus` and `num_gpus`.
    """
    largest = max(served.sizes)
    shared: dict[str, Any] = {
        "logging_config": {"enable_access_log": False},
        "health_check_period_s": _HEALTH_PERIOD,
        "graceful_shutdown_timeout_s": limits.seconds,
    }
    drawing = serve.deployment(
        Replica,
        name=REPLICA,
        ray_actor_options=resources,
        max_ongoing_requests=2 * largest,  # a batch that is drawn, and the next one
        autoscaling_config={
            "min_replicas": replicas[0],
            "max_replicas": replicas[1],
            "target_ongoing_requests": largest,
        },
        **shared,
    )
    answering = serve.deployment(
        Images,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=2 * limits.queue + 100,  # those refused have to be answered, too
        **shared,
    )
    return answering.bind(drawing.bind(served), limits)


def main() -> None:
    """Serves until it is told to end."""
    args = arguments()
    served = Served(
        asked=Asked(
            model=args.model,
            preset=args.preset,
            schedule_file=args.schedule,
            ratios=args.ratios,
            blocks=args.blocks,
            run=None,
            batch=None,
        ),
        draw=args.draw,
        dense=args.dense,
        method=args.method,
        compiled=args.compile,
        prompts=args.prompts,
        classes=args.classes,
        sizes=args.sizes,
    )
    limits = Limits(images=args.images, queue=args.queue, seconds=args.seconds)
    resources = {"num_cpus": args.cpus, "num_gpus": args.gpus}
    check_free(args.host, args.port)
    with current_directory_importable():
        start_ray(args.metrics_port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        print(f"metrics for Prometheus at {metrics_address()}")
        serve.start(http_options=serve.HTTPOptions(host=args.host, port=args.port))
        handle = deployed(application(served, limits, args.replicas, resources))
        describe(serve.get_deployment_handle(REPLICA, APPLICATION).about.remote().result())
        with suppress(KeyboardInterrupt):
            print(f"serving at http://{args.host}:{args.port}/v1", flush=True)
            signal.pause()
        handle.end.remote().result(timeout_s=limits.seconds + 5)
    finally:
        serve.shutdown()
        ray.shutdown()


def check_free(host: str, port: int) -> None:
    """Ends if the address cannot be listened at, where Ray would try again for ever."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise SystemExit(
                f"asked to listen at {host}:{port}: {error.strerror}; give another --port or --host"
            ) from error


def deployed(app: serve.Application) -> DeploymentHandle:
    """Returns what answers requests, when replicas are ready."""
    try:
        return serve.run(app, name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        found = serve.status().applications[APPLICATION].deployments[REPLICA].message
        raise SystemExit(f"no replica could start: {found}") from error


def start_ray(metrics_port: int | None) -> None:
    """Starts Ray on this machine, or joins the cluster of RAY_ADDRESS."""
    if "RAY_ADDRESS" in os.environ:
        ray.init()
        return
    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=_OBJECTS,
        _metrics_export_port=metrics_port,
    )


def describe(about: About) -> None:
    batches = ", ".join(f"{size} in {seconds:.2g} s" for size, seconds in about.seconds.items())
    print(f"{about.model}, {about.size}, {about.pruned:.0%} of tokens pruned; batches: {batches}")


def metrics_address() -> str:
    node = ray.nodes()[0]
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", nargs="?", default=DEMO, help="a named model, or package.module:factory")
    add("--draw", help="package.module:function that draws a batch, for a factory")
    add("--classes", type=int, help="how many classes the model of a factory has")
    add("--prompts", action="store_true", help="the model of a factory takes prompts")
    add("--preset", help="name of a schedule")
    add("--schedule", type=Path, help="JSON file of a schedule")
    add("--ratios", help="pruning ratios of the last steps, such as 0.5,0.75")
    add("--blocks", help="module path of the transformer blocks")
    add("--method", default="fastvar", help="how branches are pruned")
    add("--dense", action="store_true", help="draw without pruning")
    add("--compile", action="store_true", help="compile the programs")
    add("--sizes", type=integers(","), default=(1, 2, 4), help="batch sizes, such as 1,2,4")
    add("--replicas", type=integers("-"), default=(1,), help="such as 1, or 1-4 to scale")
    add("--gpus", type=int, default=int(torch.cuda.is_available()), help="GPUs of a replica")
    add("--cpus", type=int, help="CPUs of a replica: 1 beside a GPU, else all if not given")
    add("--host", default="127.0.0.1", help="the address to listen at")
    add("--port", type=int, default=8000)
    add("--metrics-port", type=int, help="for Prometheus; chosen by Ray if not given")
    add("--images", type=int, default=Limits.images, help="most pictures of a request")
    add("--queue", type=int, default=Limits.queue, help="most pictures that wait")
    add("--seconds", type=float, default=Limits.seconds, help="most seconds of a request")
    args = parser.parse_args()
    pruning = (args.preset, args.schedule, args.ratios, args.blocks, args.compile)
    if args.dense and (any(pruning) or args.method != "fastvar"):
        parser.error("--dense prunes nothing: leave out the schedule, the method and --compile")
    args.replicas = args.replicas[0], args.replicas[-1]
    args.cpus = args.cpus or (1 if args.gpus else len(os.sched_getaffinity(0)))
    return args


def integers(separator: str) -> Any:
    """Returns what reads positive integers."""

    def read(text: str) -> tuple[int, ...]:
        found = tuple(int(part) for part in text.split(separator))
        if min(found) < 1:
            raise ValueError(text)
        return found

    return read


if __name__ == "__main__":
    main()

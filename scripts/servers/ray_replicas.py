"""Serve a bundle as a Ray Serve deployment of several replicas, and ask until each of them has answered.

    pip install 'mediator-merge[serve]' 'ray[serve]' openai
    python scripts/servers/ray_replicas.py demo/bundle --replicas 2

Each replica is a process with a copy of the model; Ray's proxy shares requests among them. What a cluster needs of
this file is `deployment`: `serve.run(deployment(...))` in a program that is connected to it, the bundle at the same
path on every node. A conversation may meet another replica at every turn, so pin nothing that a replica remembers.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.serve import Application
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

REPLICA_HEADER = "x-replica"


def deployment(bundle: Path, replicas: int, rows: int = 4) -> Application:
    """Make the Ray Serve application: `serve.run(deployment(...))` puts it up."""
    from ray import serve

    folder = str(bundle.resolve())

    def replica() -> ASGIApp:
        """Open the bundle in a process of its own and give the ASGI app, which names itself in a header."""
        from ray import serve

        from mediator_cli.runtime.open import open_bundle
        from mediator_cli.runtime.prompts import load_tokenizer
        from mediator_cli.serve.app import make_app
        from mediator_cli.serve.engine.engine import Limits
        from mediator_cli.serve.opened import start_serving

        place = Path(folder)
        serving = start_serving(place, open_bundle(place), load_tokenizer(place), Limits(rows=rows))
        app, name = make_app(serving.engine, serving.served), serve.get_replica_context().replica_id.unique_id

        async def named(scope: Scope, receive: Receive, send: Send) -> None:
            async def sent(message: Message) -> None:
                if message["type"] == "http.response.start":
                    header = (REPLICA_HEADER.encode(), name.encode())
                    message = {**message, "headers": [*message.get("headers", ()), header]}
                await send(message)

            await app(scope, receive, sent)

        return named

    settings = {"num_replicas": replicas, "ray_actor_options": {"num_cpus": 1}, "max_ongoing_requests": rows}
    return serve.deployment(name="mediator", **settings)(serve.ingress(replica)()).bind()


def ask(url: str, replicas: int, most: int) -> tuple[Counter[str], Counter[str]]:
    """Ask, `most` times at most, until every replica has answered; count answers by replica and by mixture."""
    from openai import OpenAI

    by_replica: Counter[str] = Counter()
    by_mixture: Counter[str] = Counter()
    questions = ("What is 3 + 4?", "Is this film any good?", "Oh great, another Monday.", "Translate: Guten Morgen")
    with OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60, max_retries=2) as client:
        model = client.models.list().data[0].id
        for number in range(most):
            turn = [{"role": "user", "content": questions[number % len(questions)]}]
            raw = client.chat.completions.with_raw_response.create(
                model=model, messages=turn, max_tokens=8, temperature=0
            )
            assert raw.parse().choices[0].message.content is not None  # noqa: S101
            by_replica[raw.headers[REPLICA_HEADER]] += 1
            by_mixture[raw.headers.get("x-mediator-mixture", "?")] += 1
            if len(by_replica) == replicas and number + 1 >= 4 * replicas:
                break
    return by_replica, by_mixture


def main() -> int:
    """Put the deployment up on loopback, ask it, take it down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--most", type=int, default=40, help="requests")
    wanted = parser.parse_args()
    import ray
    from ray import serve

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    port, started = free_port(), time.monotonic()
    by_replica, by_mixture = Counter[str](), Counter[str]()
    try:
        ray.init(
            num_cpus=wanted.replicas + 1, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
        )  # fmt: skip
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(deployment(wanted.bundle, wanted.replicas), name="mediator", route_prefix="/")
        print(f"{wanted.replicas} replicas are up after {time.monotonic() - started:.1f} s")  # noqa: T201
        by_replica, by_mixture = ask(f"http://127.0.0.1:{port}", wanted.replicas, wanted.most)
    finally:
        serve.shutdown()
        ray.shutdown()
    for name, count in (*by_replica.items(), *by_mixture.most_common()):
        print(f"{count:4d}  {name}")  # noqa: T201
    return 0 if len(by_replica) == wanted.replicas else 1


def free_port() -> int:
    """Find a port that nobody listens at."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())

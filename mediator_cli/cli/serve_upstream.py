"""`mediator serve --upstream`: the router alone, before another server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable
    from socket import socket

    from mediator_cli.serve.api.gate import Access
    from mediator_cli.serve.api.settings import Settings
    from mediator_cli.serve.router.proxy import Upstream

UpstreamOption = Annotated[
    str | None,
    typer.Option(
        "--upstream", metavar="URL", show_default=False,
        help="Decide who answers and let this server answer, such as vLLM with the experts as adapters.",
    ),
]  # fmt: skip
KindOption = Annotated[
    str,
    typer.Option(
        "--upstream-kind", metavar="KIND",
        help="openai: experts are names of models; llama.cpp: they are scales of adapters. With --upstream.",
    ),
]  # fmt: skip
ModelsOption = Annotated[
    str | None,
    typer.Option(
        "--upstream-models", metavar="PATTERN", show_default=False,
        help="How that server names experts, such as dense:{expert}.",
    ),
]  # fmt: skip
DenseOption = Annotated[
    str | None,
    typer.Option("--upstream-dense", metavar="NAME", show_default=False, help="How it names the dense expert."),
]
MixturesOption = Annotated[
    str,
    typer.Option(
        "--mixtures", metavar="HOW",
        help="top1: one expert answers, or the dense one; grid: also two, in quarters, as adapters that are built and "
        "loaded on demand. With --upstream.",
    ),
]  # fmt: skip
AdaptersOption = Annotated[
    Path | None,
    typer.Option("--adapters", metavar="DIR", show_default=False, help="Adapters of the experts, for --mixtures grid."),
]


def upstream_of(
    url: str, kind: str, models: str | None, dense: str | None, mixtures: str, adapters: Path | None
) -> Upstream:
    """Check what the options say; raise BundleError for values that are not known, or do not go together."""
    from mediator_cli.errors import BundleError, Problem, did_you_mean
    from mediator_cli.serve.router.proxy import Upstream

    if kind not in ("openai", "llama.cpp"):
        raise BundleError(Problem("--upstream-kind", f"no kind '{kind}'", did_you_mean(kind, ["openai", "llama.cpp"])))
    if mixtures not in ("top1", "grid"):
        raise BundleError(Problem("--mixtures", f"no way '{mixtures}'", did_you_mean(mixtures, ["top1", "grid"])))
    if mixtures == "grid" and kind == "llama.cpp":
        message = "is for servers that load adapters; llama.cpp mixes exactly by itself"
        raise BundleError(Problem("--mixtures grid", message, "leave it out"))
    return Upstream(
        url,
        kind="llama.cpp" if kind == "llama.cpp" else "openai",
        mixtures="grid" if mixtures == "grid" else "top1",
        adapters=adapters,
        dense=dense,
        models=models,
    )


def run_proxy(
    folder: Path,
    upstream: Upstream,
    settings: Settings,
    sock: socket,
    grace: float,
    log: Callable[[Access], None] | None,
    say: Callable[[str], None],
) -> None:
    """Serve until stopped; answers that run may finish."""
    import time

    from mediator_cli.serve.api.gate import Gate
    from mediator_cli.serve.api.settings import Life
    from mediator_cli.serve.listen import Turns, listen
    from mediator_cli.serve.router.proxy import Fronting, make_proxy, shown

    life = Life()
    proxy = make_proxy(folder, upstream, Fronting(max_body=settings.max_body, pin=settings.pin))
    app = Gate(proxy, settings, life, log or (lambda access: None))

    def stop() -> None:
        life.is_draining = True
        say(f"stopping; running answers may finish within {grace:g} s, Ctrl-C again does not wait")
        end = time.monotonic() + grace
        while proxy.running.n and time.monotonic() < end:
            time.sleep(0.05)

    def greet(url: str) -> None:
        say(f"the router answers at {url}/v1 and asks {shown(proxy.client.base_url)}")
        say(f"models: auto, {', '.join(proxy.router.models)}, dense, and whatever that server has")

    listen(app, sock, Turns(greet, stop, lambda: None))

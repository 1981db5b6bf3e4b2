"""`mediator serve`."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mediator_cli.cli.mixtures import CombineOption, combination
from mediator_cli.cli.options import QuietOption
from mediator_cli.cli.output import console, print_notices
from mediator_cli.cli.serve_upstream import (
    AdaptersOption,
    DenseOption,
    KindOption,
    MixturesOption,
    ModelsOption,
    UpstreamOption,
    run_proxy,
    upstream_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from socket import socket

    from mediator_cli.runtime.combine import Combine
    from mediator_cli.serve.api.gate import Access
    from mediator_cli.serve.api.settings import Settings
    from mediator_cli.serve.engine.engine import Limits
    from mediator_cli.serve.opened import Serving

KEY_VARIABLE = "MEDIATOR_API_KEY"

HostOption = Annotated[str, typer.Option("--host", help="Address to listen at; 0.0.0.0 = all networks.")]
PortOption = Annotated[int, typer.Option("--port", help="Port to listen at; 0 = any free one.")]
KeyFileOption = Annotated[
    Path | None,
    typer.Option(
        "--api-key-file", metavar="FILE", show_default=False, help=f"File with the API key; or set {KEY_VARIABLE}."
    ),
]
OriginOption = Annotated[
    list[str] | None,
    typer.Option("--allow-origin", metavar="URL", help="Web pages from there may ask (CORS); repeatable."),
]
GraceOption = Annotated[
    float, typer.Option("--grace", min=0, help="Seconds for running answers to finish when the server is stopped.")
]


def serve(
    folder: Annotated[
        Path,
        typer.Argument(help="A bundle; with --upstream also an exported router.", metavar="DIR", show_default=False),
    ],
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Requests answered at once.")] = 8,
    queue: Annotated[int, typer.Option("--queue", min=1, help="Requests that may wait; others get 429.")] = 256,
    context: Annotated[
        int | None,
        typer.Option(
            "--context", min=2, help="Most tokens of prompt and answer; default: the model's.", show_default=False
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer in tokens.")] = 4096,
    max_body: Annotated[str, typer.Option("--max-body", metavar="SIZE", help="Largest request.")] = "4MiB",
    memory: Annotated[
        str,
        typer.Option("--memory", metavar="SIZE", help="Memory for experts and mixtures beside the dense model."),
    ] = "1GiB",
    cache: Annotated[
        str, typer.Option("--cache", metavar="SIZE", help="Memory for prompts that begin like earlier ones; 0 = none.")
    ] = "256MiB",
    pin: Annotated[
        bool, typer.Option("--pin", help="Route conversations once, on their first turn, unless a request says more.")
    ] = False,
    combine: CombineOption = None,
    grace: GraceOption = 30,
    api_key_file: KeyFileOption = None,
    open_metrics: Annotated[bool, typer.Option("--open-metrics", help="Give /metrics without a key.")] = False,
    allow_origin: OriginOption = None,
    json_log: Annotated[bool, typer.Option("--json-log", help="Log a JSON object for each request.")] = False,
    upstream: UpstreamOption = None,
    upstream_kind: KindOption = "openai",
    upstream_models: ModelsOption = None,
    upstream_dense: DenseOption = None,
    mixtures: MixturesOption = "top1",
    adapters: AdaptersOption = None,
    quiet: QuietOption = False,
) -> None:
    """Answer OpenAI's API with a bundle, and show a chat page; Ctrl-C stops it. Needs the extra `serve`."""
    _check_extra()
    from mediator_cli.serve.api.settings import Settings
    from mediator_cli.serve.engine.engine import Limits
    from mediator_cli.serve.listen import bind

    how, settings = combination(combine), Settings(
        max_tokens=max_tokens, max_body=_bytes("--max-body", max_body), api_key=_api_key(api_key_file),
        open_metrics=open_metrics, origins=tuple(_origin(url) for url in allow_origin or ()), pin=pin,
        max_rows=min(128, queue),
    )  # fmt: skip
    limits = Limits(rows, queue, context, cache_bytes=0 if cache.strip() == "0" else _bytes("--cache", cache))
    if upstream is not None:
        behind = upstream_of(upstream, upstream_kind, upstream_models, upstream_dense, mixtures, adapters)
        sock = bind(host, port)
        try:
            _warn_of_open_door(sock, settings)
            run_proxy(folder, behind, settings, sock, grace, None if quiet else _log(as_json=json_log), _say)
        finally:
            sock.close()
        return
    _check_bundle(folder, pin=pin)
    sock = bind(host, port)
    try:
        _warn_of_open_door(sock, settings)
        serving = _opened(folder, how, _bytes("--memory", memory), limits)
        _run(serving, settings, sock, grace, (_silent, None) if quiet else (_say, _log(as_json=json_log)))
    finally:
        sock.close()


def _check_extra() -> None:
    from mediator_cli.errors import OutputError, Problem

    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        hint = "pip install 'mediator-merge[serve]'"
        raise OutputError(Problem("", f"serving needs {error.name}", hint)) from None


def _check_bundle(folder: Path, *, pin: bool) -> None:
    from mediator_cli.bundle.manifest import read_manifest
    from mediator_cli.errors import BundleError, Problem

    manifest = read_manifest(folder)
    if pin and (manifest.router is None or manifest.gates is not None):
        message = "there is no router that decides once for a conversation"
        raise BundleError(Problem("--pin", message, "leave it out"))


def _opened(folder: Path, how: Combine | None, memory: int, limits: Limits) -> Serving:
    from mediator_cli.cli.opening import opened
    from mediator_cli.serve.opened import start_serving

    model, tokenizer = opened(folder, how, memory)
    return start_serving(folder, model, tokenizer, limits)


def _run(
    serving: Serving,
    settings: Settings,
    sock: socket,
    grace: float,
    telling: tuple[Callable[[str], None], Callable[[Access], None] | None],
) -> None:
    """Serve until stopped; answers that run may finish. `telling` hears of the server, and of each request."""
    from mediator_cli.serve.api.settings import Life
    from mediator_cli.serve.app import make_app
    from mediator_cli.serve.listen import Turns, listen

    life, engine, (say, log) = Life(), serving.engine, telling
    app = make_app(engine, serving.served, settings, life, log)

    def stop() -> None:
        life.is_draining = True
        say(f"stopping; running answers may finish within {grace:g} s, Ctrl-C again does not wait")
        if not engine.drain(grace):
            say("answers that were not complete were broken off")

    try:
        listen(app, sock, Turns(lambda url: _greet(url, serving, settings, say), stop, engine.close))
    finally:
        engine.close()


def _greet(url: str, serving: Serving, settings: Settings, say: Callable[[str], None]) -> None:
    from mediator_cli.serve.api.models import model_names

    names = model_names(serving.served)
    body = json.dumps({"model": names[0], "messages": [{"role": "user", "content": "Hello"}]})
    key = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if settings.api_key else ""
    for line in (
        f"{serving.served.name} answers at {url}/v1, chat page at {url}",
        f"models: {', '.join(names)}",
        f"try: curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}",
    ):
        say(line)


def _say(line: str) -> None:
    # What a server says about itself is no result: nothing may be lost where nobody reads standard output.
    console(stderr=True).print(line, markup=False)


def _silent(line: str) -> None:
    """Say nothing."""


def _warn_of_open_door(sock: socket, settings: Settings) -> None:
    from mediator_cli.serve.listen import is_local

    if settings.api_key is None and not is_local(sock):
        print_notices([f"anybody on the network can use this server; set {KEY_VARIABLE}, or listen at 127.0.0.1 alone"])


def _log(*, as_json: bool) -> Callable[[Access], None]:
    """Write requests to standard error as they end, one line each."""
    return lambda access: print(_json_line(access) if as_json else _line(access), file=sys.stderr, flush=True)  # noqa: T201


def _json_line(access: Access) -> str:
    return json.dumps({"time": _now(), **asdict(access)})


def _line(access: Access) -> str:
    asked = f" {access.model}" if access.model else ""
    mixture = f" [{access.mixture}]" if access.mixture else ""
    return f"{_now()} {access.method} {access.path} {access.status} {access.milliseconds:.0f} ms{asked}{mixture}"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _bytes(place: str, text: str) -> int:
    from mediator_cli.errors import OutputError, Problem
    from mediator_cli.recipe.sizes import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise OutputError(Problem(place, str(error))) from None


def _api_key(file: Path | None) -> str | None:
    """Read the key; it is never an option, since every user of a machine sees those of every process."""
    from mediator_cli.errors import OutputError, Problem

    if file is None:
        return _sound(os.environ.get(KEY_VARIABLE, ""), KEY_VARIABLE) if os.environ.get(KEY_VARIABLE) else None
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise OutputError(Problem("--api-key-file", f"cannot read {file}", "give a text file with one line")) from None
    return _sound(text, "--api-key-file")


def _sound(key: str, place: str) -> str:
    from mediator_cli.errors import OutputError, Problem

    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise OutputError(Problem(place, "holds no key", "give one word of ASCII letters, digits and signs"))
    return key


def _origin(url: str) -> str:
    from mediator_cli.errors import OutputError, Problem

    scheme, _, rest = url.partition("://")
    if url != "*" and (scheme not in ("http", "https") or not rest or "/" in rest):
        hint = "give scheme, host and port alone, such as http://localhost:3000"
        raise OutputError(Problem("--allow-origin", f"'{url}' is no origin", hint))
    return url

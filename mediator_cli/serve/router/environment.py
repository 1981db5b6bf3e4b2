"""The router of a server that starts us by name alone: what to do is said by environment variables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from mediator_cli.errors import BundleError, Problem, did_you_mean
from mediator_cli.serve.router.decide import open_router
from mediator_cli.serve.router.front import Front
from mediator_cli.serve.router.meter import make_meter
from mediator_cli.serve.router.targets import TopOne

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mediator_cli.serve.router.decide import OpenRouter
    from mediator_cli.serve.router.receive import App
    from mediator_cli.serve.router.targets import Target

ROUTER = "MEDIATOR_ROUTER"
MIXTURES = "MEDIATOR_MIXTURES"
ADAPTERS = "MEDIATOR_ADAPTERS"
BUILT = "MEDIATOR_BUILT"
MOST_BUILT = "MEDIATOR_MOST_BUILT"
PIN = "MEDIATOR_PIN"
MAX_BODY = "MEDIATOR_MAX_BODY"


def front_from_environment(app: App, environment: Mapping[str, str] | None = None) -> Front:
    """Make what MEDIATOR_ROUTER (a folder) and the variables beside it say; see README.md.

    Raises BundleError for a folder that holds no router, and for values that are not known.
    """
    known = os.environ if environment is None else environment
    folder = known.get(ROUTER)
    if not folder:
        hint = "set it to a bundle, or to what `mediator export DIR --to router` wrote"
        raise BundleError(Problem(ROUTER, "is not set", hint))
    router = open_router(Path(folder))
    target = _target(app, router, known)
    pin = _one_of(known, PIN, ("turn", "conversation")) == "conversation"
    most = _count(known, MAX_BODY, 4 << 20)
    return Front(router, target, max_body=most, pin=pin, closed=target.paths, meter=make_meter())


def _target(app: App, router: OpenRouter, known: Mapping[str, str]) -> Target:
    top_one = TopOne(router.dense, router.models)
    if _one_of(known, MIXTURES, ("top1", "grid")) == "top1":
        return top_one
    import httpx

    from mediator_cli.serve.router.grid import make_grid

    adapters = Path(known.get(ADAPTERS) or router.folder.parent / "adapters")
    built = Path(known[BUILT]) if known.get(BUILT) else None
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server", timeout=None)
    return make_grid(top_one, adapters, client, built=built, most=_count(known, MOST_BUILT, 16))


def _one_of(known: Mapping[str, str], name: str, values: tuple[str, ...]) -> str:
    """Read a choice; the first one where nothing is said."""
    value = known.get(name) or values[0]
    if value not in values:
        raise BundleError(Problem(name, f"'{value}' is not known", did_you_mean(value, values)))
    return value


def _count(known: Mapping[str, str], name: str, usual: int) -> int:
    text = known.get(name) or str(usual)
    if not (text.isascii() and text.isdigit() and int(text)):
        raise BundleError(Problem(name, f"'{text}' is not a number above zero", f"the default is {usual}"))
    return int(text)

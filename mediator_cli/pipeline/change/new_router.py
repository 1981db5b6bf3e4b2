"""What becomes of a router when a bundle's experts change; nothing here takes long to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mediator_cli.bundle.router_record import RouterRecord
    from mediator_cli.pipeline.router import RouterJob
    from mediator_cli.runtime.fit import FittedRouter

NONE = "`mediator fit-router` fits one"


@dataclass(frozen=True)
class NewRouter:
    """A router for other experts, before it is written; `how` says what was done.

    `bare` is the record of one without arrays. With neither the bundle has no router then.
    `later` is fitted when the new bundle stands: a router for which the experts themselves are asked.
    """

    fitted: FittedRouter | None
    how: str
    notices: tuple[str, ...] = ()
    later: RouterJob | None = None
    bare: RouterRecord | None = None


def no_router(had_one: bool) -> NewRouter:
    """Leave a bundle without a router."""
    how = "left out, as asked" if had_one else "the bundle has none"
    return NewRouter(None, how, (f"the bundle has no router now; {NONE}",))

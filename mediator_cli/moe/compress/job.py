"""What was asked for: a method and its settings, checked against the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from mediator_cli.errors import MediatorError, Problem
from mediator_cli.moe.compress.ream import CAP

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mediator_cli.checkpoint.moe_layout import MoeLayout

Method = Literal["reap", "ream", "m_smoe", "hc_smoe", "sub_moe"]
RouterRule = Literal["dominant", "mean", "tied"]
METHODS: tuple[Method, ...] = get_args(Method)
ROUTER_RULES: tuple[RouterRule, ...] = get_args(RouterRule)
_ALIGNS: tuple[Method, ...] = ("ream", "m_smoe")
_ONE_ROW: tuple[Method, ...] = ("reap", "ream")


@dataclass(frozen=True)
class Job:
    """A compression: `n_experts` are left in each layer.

    `router` says what the gates of a group become: the row of its dominant expert, the mean of its rows with the
    merge's coefficients, or all rows as they were, each with a copy of the merged expert (tied), which saves nothing on
    disk. `rank` is the share of singular directions that Sub-MoE keeps, `cap` how many experts a REAM centroid takes.
    """

    method: Method
    n_experts: int
    router: RouterRule = "dominant"
    align: bool = False
    rank: float = 1.0
    cap: int = CAP
    seed: int = 0

    @property
    def every_token(self) -> bool:
        """Whether the method asks what experts give for tokens that they do not get."""
        return self.method in ("ream", "hc_smoe", "sub_moe")

    @property
    def is_sequential(self) -> bool:
        """Whether each layer is measured on what the compressed layers before it give: a pass of its own."""
        return self.method == "ream"

    def written(self, layout: MoeLayout) -> int:
        """Number of experts that each layer has on disk."""
        return layout.n_experts if self.router == "tied" else self.n_experts

    def top_k(self, layout: MoeLayout) -> int:
        """Experts that a token gets: as before, but no more than there are."""
        return min(layout.top_k, self.written(layout))


@dataclass(frozen=True)
class Wishes:
    """What a user wrote; None for what was left out."""

    method: Method
    experts: int | None = None
    keep: float | None = None
    router: RouterRule | None = None
    align: bool | None = None
    rank: float = 1.0
    cap: int = CAP
    seed: int = 0


def make_job(wishes: Wishes, place: str, layout: MoeLayout) -> Job:
    """Fit wishes to a model; raise MediatorError with all that is impossible."""
    n = layout.n_experts
    is_share = wishes.keep is not None and 0 < wishes.keep < 1
    count = max(1, round(wishes.keep * n)) if wishes.keep is not None and is_share else wishes.experts
    problems = list(_problems(wishes, count, place, layout))
    if problems or count is None:
        raise MediatorError(problems)
    align = wishes.method in _ALIGNS if wishes.align is None else wishes.align
    # Of the two that make a model smaller, the mean measured better: see README.md.
    router = wishes.router or ("dominant" if wishes.method in _ONE_ROW else "mean")
    return Job(wishes.method, count, router, align, wishes.rank, wishes.cap, wishes.seed)


def _problems(wishes: Wishes, count: int | None, place: str, layout: MoeLayout) -> Iterator[Problem]:
    yield from _count_problems(wishes, count, place, layout)
    method = wishes.method
    if not layout.format.expert:
        message = f"is {layout.format.name}, whose experts hold a few neurons each and lie in one tensor a layer"
        hint = "formats that can be compressed: mixtral, qwen2_moe, qwen3_moe"
        yield Problem(place, message, hint)
    elif layout.top_k > layout.n_experts:
        message = f"gives a token {layout.top_k} of {layout.n_experts} experts"
        yield Problem(place, message, f"mend {layout.format.top_k} in its config.json")
    elif not layout.layers:
        yield Problem(place, "has no layer with routed experts", "there is nothing to compress")
    if wishes.router not in (None, "dominant") and method in _ONE_ROW:
        message = f"{wishes.router} is not for {method}, which keeps the row of each expert that stays"
        yield Problem("--router", message, "leave it out")
    if wishes.align and method == "reap":
        yield Problem("--align", "is not for reap, which merges nothing", "leave it out")
    if wishes.rank != 1.0 and method != "sub_moe":
        yield Problem("--rank", f"is not for {method}", "leave it out, or use --method sub_moe")
    if wishes.cap != CAP and method != "ream":
        yield Problem("--cap", f"is not for {method}", "leave it out, or use --method ream")


def _count_problems(wishes: Wishes, count: int | None, place: str, layout: MoeLayout) -> Iterator[Problem]:
    n = layout.n_experts
    if (wishes.experts is None) == (wishes.keep is None):
        given = "both were given" if wishes.keep is not None else "how many experts shall be left?"
        yield Problem("--experts, --keep", given, "write one of --experts N and --keep SHARE, such as --keep 0.5")
    elif wishes.keep is not None and not 0 < wishes.keep < 1:
        yield Problem("--keep", f"{wishes.keep:g} is no share of the experts", "write a number between 0 and 1")
    elif count is None or not 0 < count < n:
        room = f"choose 1 to {n - 1}" if n > 1 else "there is nothing to compress"
        name = "--experts" if wishes.keep is None else "--keep"
        yield Problem(name, f"{count} experts shall be left, and {place} has {n} in a layer", room)

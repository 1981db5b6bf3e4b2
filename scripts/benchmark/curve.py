"""How time grows with bytes, and what follows for models that fit on no test machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import linear_regression
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmark.rounds import Outcome

EXPERTS = (2, 4, 8, 16, 24)
SIZES = ("0.5B", "1.5B", "3B")
N_EXPERTS = 4
"""Experts where sizes vary."""

LARGE_PARAMETERS, LARGE_EXPERTS = 70e9, 8
DISK = 2e9
"""Bytes a second."""


@dataclass(frozen=True)
class Fit:
    """wall = start + per_byte * (bytes of inputs and output), by least squares."""

    job: str
    start: float
    per_byte: float
    worst: float
    """The largest deviation of a point, as a share of it."""

    def seconds(self, n_bytes: float) -> float:
        """Tell how long a merge of so many bytes takes, when they are in the page cache."""
        return self.start + self.per_byte * n_bytes


@dataclass(frozen=True)
class Large:
    """Computed seconds of a large merge: from the fit, and of the disk alone."""

    job: str
    compute: float
    disk: float


def points(size: str) -> list[tuple[str, int]]:
    """List sizes and numbers of experts, the points of a curve whose experts vary at `size`.

    >>> points("tiny")
    [('tiny', 2), ('tiny', 4), ('tiny', 8), ('tiny', 16), ('tiny', 24)]
    """
    sizes = [other for other in SIZES if other != size] if size in SIZES else []
    return [(size, n) for n in EXPERTS] + [(other, N_EXPERTS) for other in sizes]


def moved(outcome: Outcome) -> int:
    """Add up the bytes of the inputs and the output."""
    return outcome.input_bytes + outcome.output_bytes


def fit(outcomes: Sequence[Outcome]) -> Fit:
    """Fit a line to the points of one job."""
    xs, ys = [moved(one) for one in outcomes], [one.ours.wall for one in outcomes]
    slope, start = linear_regression(xs, ys)
    worst = max(abs(start + slope * x - y) / y for x, y in zip(xs, ys, strict=True))
    return Fit(outcomes[0].job, start, slope, worst)


def large(found: Fit, outcomes: Sequence[Outcome]) -> Large:
    """Compute what the large merge takes; every pass over the inputs is read from disk, and outputs keep their share.

    The shares of what is read and written are those of the measured point with as many experts.
    """
    like = next(one for one in outcomes if one.experts == LARGE_EXPERTS)
    model = like.input_bytes / (like.experts + 1)
    scale = 2 * LARGE_PARAMETERS / model
    n_read, n_written = max(like.ours.read, like.input_bytes), max(like.ours.written, like.output_bytes)
    return Large(found.job, found.seconds(scale * moved(like)), scale * (n_read + n_written) / DISK)


def tell(found: Fit, computed: Large) -> str:
    """Write a fit and what follows from it."""
    law = f"{found.job}: seconds = {found.start:.2f} + {found.per_byte * 1e9:.3f} * GB of inputs and output"
    return (
        f"{law} (worst point {found.worst:.0%} off).\n"
        f"  Computed, not measured: {LARGE_EXPERTS} experts of {LARGE_PARAMETERS / 1e9:.0f} B parameters in bf16 take "
        f"{span(computed.compute)} by this law, with these cores; a disk of {DISK / 1e9:.0f} GB/s alone takes "
        f"{span(computed.disk)}. The merge takes the longer of the two if they overlap fully, at most their sum.\n"
    )


def span(seconds: float) -> str:
    """Write a time for people.

    >>> span(90), span(7200)
    ('1.5 minutes', '2.0 hours')
    """
    return f"{seconds / 60:.1f} minutes" if seconds < 3600 else f"{seconds / 3600:.1f} hours"


def as_json(found: Fit, computed: Large) -> dict[str, object]:
    """Give all numbers."""
    return {"fit": asdict(found), "large": asdict(computed)}

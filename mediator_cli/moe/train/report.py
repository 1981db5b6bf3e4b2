"""What a training did: data for JSON, a block of the model card, a note for the manifest."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mediator_cli.moe.train.measure import Measured
    from mediator_cli.moe.train.settings import TrainSettings

REPORT = "training.json"
"""The report's name in the model folder."""


@dataclass(frozen=True)
class TaskRows:
    """Rows of a task: how many were trained on, how many of these were drawn, and the digest of all that were given."""

    rows: int
    drawn: int
    sha256: str


@dataclass(frozen=True)
class TrainReport:
    """What a training did. `losses` are those of the steps, `before` and `after` those of held-out rows, by task."""

    settings: TrainSettings
    learning_rate: float
    n_parameters: int
    n_trained: int
    n_tensors: int
    tasks: Mapping[str, TaskRows]
    losses: tuple[float, ...]
    before: Mapping[str, Measured]
    after: Mapping[str, Measured]
    tokens: int
    seconds: float
    notices: tuple[str, ...]


def as_json(report: TrainReport) -> dict[str, Any]:
    """Give a report as JSON data; seconds and tokens of rows are those of the steps alone."""
    data = asdict(report)
    settings = data.pop("settings")
    shown = {name: settings[name] for name in settings if name not in ("learning_rate", "save_seconds")}
    return {**shown, **data, "losses": list(report.losses), "notices": list(report.notices)}


def note(report: TrainReport) -> str:
    """Tell a manifest what was trained, on what, how long."""
    rows = ", ".join(f"{task} {facts.sha256[:12]}" for task, facts in report.tasks.items())
    settings = report.settings
    return (
        f"trained: {settings.what}, {len(report.losses)} steps of {settings.batch} rows, learning rate "
        f"{report.learning_rate:g}, seed {settings.seed}; rows: {rows}; see {REPORT}"
    )


def card(report: TrainReport) -> str:
    """Tell of a training in the model card."""
    settings = report.settings
    rows = [
        f"| {task} | {facts.rows} | {facts.drawn} | `{facts.sha256[:12]}` | {_pair(report, task)} |"
        for task, facts in report.tasks.items()
    ]
    balance = f", load-balance loss × {settings.load_balance:g}" if settings.load_balance else ""
    return "\n".join([
        "## Training",
        "",
        f"Trained: {settings.what} ({report.n_trained:,} of {report.n_parameters:,} parameters), {len(report.losses)} "
        f"steps of {settings.batch} rows, learning rate {report.learning_rate:g}, loss on the {settings.loss_on}"
        f"{balance}, seed {settings.seed}. Loss in nats a token; exact: rows whose every token is the likeliest.",
        "",
        "| task | rows | drawn | digest | held out | loss before | after | exact before | after |",
        "|---|---|---|---|---|---|---|---|---|",
        *rows,
    ])  # fmt: skip


def _pair(report: TrainReport, task: str) -> str:
    if task not in report.after:
        return "0 | | | | "
    before, after = report.before[task], report.after[task]
    return f"{after.rows} | {before.loss:.3f} | {after.loss:.3f} | {before.exact:.1%} | {after.exact:.1%}"

"""A contest's report as a table of texts, with notes below. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mediator_cli.compare.contest_report import ContestReport
    from mediator_cli.compare.paired import Mean
    from mediator_cli.compare.result import Result

LEVEL, BEST = "≈", "★"


def cells(report: ContestReport) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Lay a report out: a row for each strategy, per cent with standard errors; names of number columns end with #."""
    has_held_out = bool(report.conditions.held_out)
    columns = ("strategy", "group", "", "seen#", *(["held out#"] if has_held_out else []), "-ln p#", "passes#", "MB#")
    rows = [_row(report, result, has_held_out=has_held_out) for result in report.results]
    return (*columns, "ms/answer#", "memory#", "fitted in#"), rows


def _row(report: ContestReport, result: Result, *, has_held_out: bool) -> tuple[str, ...]:
    cost = result.cost
    mark = BEST if result.name == report.best else LEVEL if result.is_level and not result.is_reference else ""
    return (
        result.name,
        result.group,
        mark,
        _share(result.seen),
        *([_share(result.held_out)] if has_held_out else []),
        "–" if result.seen is None else f"{result.seen.loss:.2f}",
        f"{cost.passes:.2f}",
        f"{cost.n_bytes / 1e6:.1f}",
        "–" if cost.seconds is None else f"{1000 * cost.seconds:.0f}",
        "–" if cost.memory is None else f"{cost.memory / 1e6:.0f}",
        f"{cost.fit_seconds:.1f} s",
    )


def _share(mean: Mean | None) -> str:
    if mean is None:
        return "–"
    error = "" if mean.standard_error is None else f" ± {100 * mean.standard_error:.1f}"
    return f"{100 * mean.accuracy:.1f}{error}"


def notes(report: ContestReport) -> Iterator[str]:
    """Say in sentences what the numbers are, and answer the questions."""
    own = report.conditions
    yield (
        f"Per cent of test rows answered exactly, mean over {_tasks(own.seen, 'seen')} ({_counts(own.seen)})"
        + (f" and {_tasks(own.held_out, 'held-out')} ({_counts(own.held_out)})" if own.held_out else "")
        + ", ± standard error; -ln p of an answer on seen tasks."
    )
    yield (
        f"passes: products with the base's weights for each token, low-rank factors by their share. MB: held beside "
        f"the base ({own.base_bytes / 1e6:.0f} MB), in float32. ms and memory (growth at the peak, MB): measured on "
        f"the same {own.timed_rows} rows, scored in batches, {own.threads} thread{'s' * (own.threads > 1)}."
    )
    if report.best is not None:
        yield f"{BEST} best on seen tasks ({report.best}); {LEVEL} not told apart from it (paired bootstrap, 95 %)."
    for each in report.conclusions:
        yield f"{each.question} {each.answer}."
    if report.winner is not None:
        yield f"Best on validation rows, which is what --write-best writes: {report.winner}."
    for name, reason in report.failed:
        yield f"{name} has no result: {reason}"


def _tasks(sizes: Mapping[str, int], kind: str) -> str:
    return f"{len(sizes)} {kind} task{'s' if len(sizes) > 1 else ''}"


def _counts(sizes: Mapping[str, int]) -> str:
    different = sorted(set(sizes.values()))
    return f"{different[0]} rows each" if len(different) == 1 else f"{different[0]} to {different[-1]} rows"


def markdown(report: ContestReport) -> str:
    """Write a report as Markdown."""
    lines = [*_markdown_table(*cells(report)), "", *(f"- {line}" for line in notes(report))]
    if report.selection:
        lines += ["", *_markdown_table(*selection_cells(report))]
    return "\n".join(lines) + "\n"


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    head = "| " + " | ".join(column.rstrip("#") for column in columns) + " |"
    rule = "|" + "|".join("---:" if column.endswith("#") else "---" for column in columns) + "|"
    return [head, rule, *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)]


def selection_cells(report: ContestReport) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Lay the selections out: a row for each selector and way of answering, accuracy on seen tasks by experts kept."""
    sizes = sorted({each.k for each in report.selection})
    found: dict[tuple[str, str], dict[int, str]] = {}
    for each in report.selection:
        name = each.selector if each.representative is None else f"{each.selector} ({each.representative})"
        found.setdefault((name, each.kind), {})[each.k] = _share(each.seen)
    rows = [(*names, *(by_size.get(k, "–") for k in sizes)) for names, by_size in found.items()]
    return ("kept by", "answer as", *(f"{k} kept#" for k in sizes)), rows

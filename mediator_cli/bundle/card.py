"""Marked blocks of a bundle's model card, which later commands write anew."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mediator_cli.bundle.router_record import RouterRecord

CARD = "README.md"
_MOST_SHOWN = 16
"""Experts up to which every pair has a place in a table."""
_PAIRS = 8


def with_block(card: str, name: str, text: str) -> str:
    r"""Put a text between the markers of a block, at the end of the card where it has no such block yet.

    >>> with_block("a\n", "x", "1")
    'a\n\n<!-- begin x -->\n1\n<!-- end x -->\n'
    >>> with_block(with_block("a\n", "x", "1"), "x", "2") == with_block("a\n", "x", "2")
    True
    """
    block = f"<!-- begin {name} -->\n{text.strip()}\n<!-- end {name} -->"
    pattern = re.compile(rf"<!-- begin {re.escape(name)} -->.*?<!-- end {re.escape(name)} -->", re.DOTALL)
    if pattern.search(card):
        return pattern.sub(lambda _: block, card, count=1)
    return f"{card.rstrip()}\n\n{block}\n"


def router_card(record: RouterRecord) -> str:
    """Tell of a router in the model card: what it reads, how often it is right, what it confuses."""
    report = record.report
    if record.features == "none":
        return f"## Router\n\nEvery prompt gets the same mixture of the experts: policy {record.policy.rule}."
    asked = (
        f"softmax of {record.features}" if record.classifier == "none" else f"{record.classifier} on {record.features}"
    )
    combined = "" if record.policy.combine == "parameters" else f", {record.policy.combine} combined"
    opening = f"For each prompt a router mixes the experts: {asked}, policy {record.policy.rule}{combined}. "
    if report is None:
        return f"## Router\n\n{opening}How often it is right was not measured."
    told = (
        f"{opening}Of {report.n_held_out} held-out prompts it takes {report.accuracy:.1%} for what they are; "
        f"calibration error {report.calibration_error:.3f}."
    )
    if len(record.experts) > _MOST_SHOWN:
        return f"## Router\n\n{told}\n\nMost often mistaken: {_mistakes(record)}."
    rows = [
        f"| {expert} | " + " | ".join(str(count) for count in counts) + " |"
        for expert, counts in zip(record.experts, report.confusion, strict=True)
    ]
    return "\n".join([
        "## Router",
        "",
        told,
        "",
        "| prompts of | " + " | ".join(f"taken for {expert}" for expert in record.experts) + " |",
        "|---|" + "---|" * len(record.experts),
        *rows,
    ])  # fmt: skip


def _mistakes(record: RouterRecord) -> str:
    """Name the pairs of experts that are taken for one another most often."""
    confusion = record.report.confusion if record.report is not None else ()
    pairs = [
        (count, record.experts[true], record.experts[taken])
        for true, counts in enumerate(confusion)
        for taken, count in enumerate(counts)
        if count and true != taken
    ]
    worst = sorted(pairs, key=lambda pair: -pair[0])[:_PAIRS]
    return "; ".join(f"{true} for {taken} ({count})" for count, true, taken in worst) or "none"

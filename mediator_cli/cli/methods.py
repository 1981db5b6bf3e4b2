"""`mediator methods`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mediator_cli.cli.options import JsonOption
from mediator_cli.cli.output import print_json, print_table, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mediator_cli.cli.method_pages import MethodPage


def methods(
    name: Annotated[
        str | None, typer.Argument(help="One method, in detail.", metavar="NAME", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the merge methods, or explain one: formula, parameters, when it is apt, an example recipe, reference."""
    from mediator_cli.cli.method_pages import page_of
    from mediator_cli.errors import MediatorError, Problem
    from mediator_cli.methods.registry import get_method
    from mediator_cli.methods.registry import methods as all_methods

    if name is None:
        pages = [page_of(method) for method in all_methods().values()]
        _list(pages) if not as_json else print_json([page.as_json() for page in pages])
        return
    try:
        page = page_of(get_method(name))
    except KeyError as error:
        raise MediatorError(Problem("", f"unknown merge method '{name}'", str(error.args[0]))) from None
    print_json(page.as_json()) if as_json else _explain(page)


def _list(pages: Sequence[MethodPage]) -> None:
    from mediator_cli.cli.method_pages import cost_in_words

    rows = [
        (page.name, page.summary, page.needs, page.scope, cost_in_words(page), short_reference(page.reference))
        for page in pages
    ]
    print_table(("method", "what it does", "needs", "scope", "cost", "reference"), rows)
    say(f"{len(pages)} methods. Next: mediator methods NAME")


def short_reference(url: str) -> str:
    """Write where a method comes from in few letters.

    >>> short_reference("https://arxiv.org/abs/2306.01708"), short_reference("https://doi.org/10.1145/325165.325242")
    ('arXiv 2306.01708', 'doi 10.1145/325165.325242')
    """
    for prefix, word in (("https://arxiv.org/abs/", "arXiv "), ("https://doi.org/", "doi ")):
        url = url.replace(prefix, word)
    return url.removeprefix("https://")


def _explain(page: MethodPage) -> None:
    say(f"{page.name}: {page.summary}\n")
    for head, text in page.sections:
        say(f"{head + ': ' if head else ''}{text}\n")
    if page.parameters:
        rows = [(each.name, each.values, each.default, each.meaning) for each in page.parameters]
        print_table(("parameter", "values", "default", "meaning"), rows)
    for preset, values in page.presets.items():
        say(f"preset {preset}: " + (", ".join(f"{k}={v}" for k, v in values.items()) or "the defaults"))
    say(f"needs {page.needs} · works on {page.works_on} · scope {page.scope} · {page.reference}\n")
    say(f"An example:\n\n{page.example}")

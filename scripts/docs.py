"""Write the generated parts of the docs: blocks between `<!-- begin NAME -->` and `<!-- end NAME -->`, and schemas.

`python scripts/docs.py` writes, `python scripts/docs.py --check` fails where something is out of date.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mediator_cli.bundle.conflict_report import ConflictReport
from mediator_cli.bundle.manifest import Manifest
from mediator_cli.cli.app import app
from mediator_cli.cli.method_pages import cost_in_words, page_of
from mediator_cli.cli.methods import short_reference
from mediator_cli.methods.registry import methods
from mediator_cli.plan.schema import recipe_schema
from mediator_cli.recipe.average import AverageSpec
from mediator_cli.recipe.compare import compare_schema
from mediator_cli.recipe.heterogeneous import heterogeneous_schema
from mediator_cli.strategies.registry import strategies

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic import BaseModel

    from mediator_cli.cli.method_pages import MethodPage

ROOT = Path(__file__).resolve().parent.parent
MARKED = (
    "README.md",
    "recipes/README.md",
    "mediator_cli/cli/README.md",
    "mediator_cli/methods/README.md",
    "mediator_cli/moe/heterogeneous/README.md",
    "mediator_cli/strategies/README.md",
)


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Lay a Markdown table out."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *lines])


def _commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def commands_block() -> str:
    """List the commands with one line each."""
    rows = [(f"`mediator {name}`", (command.help or "").split("\n")[0]) for name, command in _commands().items()]
    return table(("command", "what it does"), rows)


def options_block() -> str:
    """List arguments and options of every command."""
    parts = []
    for name, command in _commands().items():
        rows = []
        for parameter in command.params:
            if parameter.name == "help":
                continue
            is_argument = parameter.param_type_name == "argument"
            label = str(parameter.metavar or parameter.name).upper() if is_argument else ", ".join(parameter.opts)
            rows.append((f"`{label}`", getattr(parameter, "help", "") or ""))
        parts.append(f"### mediator {name}\n\n{command.help}\n\n{table(('option', 'meaning'), rows)}")
    return "\n\n".join(parts)


def methods_block() -> str:
    """List the merge methods with one line each."""
    pages = [page_of(method) for method in methods().values()]
    rows = [
        (f"[`{page.name}`](mediator_cli/methods/README.md#{page.name})", page.summary, page.needs, page.scope,
         cost_in_words(page), f"[{short_reference(page.reference)}]({page.reference})")
        for page in pages
    ]  # fmt: skip
    return table(("method", "what it does", "needs", "scope", "cost", "reference"), rows)


def method_pages_block() -> str:
    """Explain every merge method from its docstring and signature."""
    return "\n\n".join(_method_page(page_of(method)) for method in methods().values())


def _method_page(page: MethodPage) -> str:
    parts = [f"## {page.name}", page.summary]
    parts += [f"**{head}.** {text}" if head else text for head, text in page.sections]
    if page.parameters:
        rows = [(f"`{each.name}`", each.values, each.default, each.meaning) for each in page.parameters]
        parts.append(table(("parameter", "values", "default", "meaning"), rows))
    presets = [
        f"- preset `{name}`: {', '.join(f'{k}={v}' for k, v in values.items()) or 'the defaults'}"
        for name, values in page.presets.items()
    ]
    parts += ["\n".join(presets)] if presets else []
    parts.append(f"Needs {page.needs}; works on {page.works_on}; scope {page.scope}. Reference: <{page.reference}>")
    return "\n\n".join([*parts, f"```yaml\n{page.example}```"])


def recipe_fields_block() -> str:
    """List every field of a recipe with its default and meaning."""
    schema = recipe_schema()
    rows = list(_fields(schema, schema, ""))
    return table(("field", "default", "meaning"), rows)


def heterogeneous_fields_block() -> str:
    """List every field of a recipe of kind heterogeneous_moe."""
    schema = heterogeneous_schema()
    return table(("field", "default", "meaning"), list(_fields(schema, schema, "")))


def compare_fields_block() -> str:
    """List every field of a recipe of kind compare."""
    schema = compare_schema()
    rows = list(_fields(schema, schema, ""))
    after = next(at for at, row in enumerate(rows) if row[0] == "`tasks`") + 1
    rows[after:after] = _fields(schema, schema["$defs"]["CompareTask"], "tasks.NAME.")
    return table(("field", "default", "meaning"), rows)


def strategies_block() -> str:
    """List all strategies with their parameters, group by group."""
    parts: list[str] = []
    for group in ("reference", "ensemble", "merge", "route"):
        own = [each for each in strategies().values() if each.group == group]
        rows = [
            (f"`{each.name}`", each.summary, _parameters(each.schema),
             f"[{short_reference(each.reference)}]({each.reference})")
            for each in own
        ]  # fmt: skip
        parts.append(f"### {group}\n\n{table(('strategy', 'what it does', 'parameters', 'reference'), rows)}")
    return "\n\n".join(parts)


def _parameters(schema: type[BaseModel]) -> str:
    fields = schema.model_fields.items()
    told = [f"`{name}: {json.dumps(field.default)}` {field.description or ''}".rstrip() for name, field in fields]
    return "<br>".join(told)


def _fields(schema: dict[str, Any], node: dict[str, Any], prefix: str) -> Any:  # noqa: ANN401 - a generator of rows
    for name, facts in node.get("properties", {}).items():
        inner = _resolve(schema, facts)
        is_list = facts.get("type") == "array" or "items" in facts
        target = _resolve(schema, facts["items"]) if is_list and "items" in facts else inner
        field = f"{prefix}{name}{'[]' if is_list else ''}"
        if name == "average":
            # In an override, what is left out is not the default but what applies without it.
            target = {} if prefix else AverageSpec.model_json_schema()
        meaning = facts.get("description") or inner.get("description") or ""
        if not target.get("properties"):
            meaning = _with_values(schema, facts, meaning)
        default = json.dumps(facts["default"], ensure_ascii=False) if "default" in facts else "required"
        yield f"`{field}`", "" if target.get("properties") else f"`{default}`", meaning
        yield from _fields(schema, target, f"{field}.")


def _resolve(schema: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    options = facts.get("anyOf", [facts])
    chosen = next((option for option in options if option.get("type") != "null"), facts)
    if "$ref" in chosen:
        return _resolve(schema, schema["$defs"][chosen["$ref"].rsplit("/", 1)[1]])
    if "anyOf" in chosen:
        return _resolve(schema, chosen["anyOf"][-1])
    return dict(chosen)


def _with_values(schema: dict[str, Any], facts: dict[str, Any], meaning: str) -> str:
    values = _resolve(schema, facts).get("enum")
    listed = " One of " + ", ".join(f"`{value}`" for value in values) + "." if values else ""
    return (meaning + listed).strip()


BLOCKS: dict[str, Callable[[], str]] = {
    "commands": commands_block,
    "options": options_block,
    "methods": methods_block,
    "method pages": method_pages_block,
    "recipe fields": recipe_fields_block,
    "heterogeneous fields": heterogeneous_fields_block,
    "compare fields": compare_fields_block,
    "strategies": strategies_block,
}


def filled(text: str) -> str:
    """Fill every marked block of a page."""
    for name, block in BLOCKS.items():
        pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if pattern.search(text):
            content = block()
            text = pattern.sub(lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text)
    return text


def wanted() -> dict[Path, str]:
    """Return every generated file with what it should hold."""
    pages = {ROOT / name: filled((ROOT / name).read_text(encoding="utf-8")) for name in MARKED}
    schemas = {
        ROOT / "recipes" / "recipe.schema.json": recipe_schema(),
        ROOT / "recipes" / "heterogeneous.schema.json": heterogeneous_schema(),
        ROOT / "recipes" / "compare.schema.json": compare_schema(),
        ROOT / "mediator_cli" / "bundle" / "manifest.schema.json": Manifest.model_json_schema(),
        ROOT / "mediator_cli" / "bundle" / "conflicts.schema.json": ConflictReport.model_json_schema(),
    }
    return pages | {file: json.dumps(schema, indent=1, ensure_ascii=False) + "\n" for file, schema in schemas.items()}


def main() -> None:
    """Write, or with --check compare."""
    check = "--check" in sys.argv[1:]
    stale = [f for f, text in wanted().items() if not f.exists() or f.read_text(encoding="utf-8") != text]
    for file in stale:
        sys.stdout.write(f"{'out of date' if check else 'written'}: {file.relative_to(ROOT)}\n")
        if not check:
            file.write_text(wanted()[file], encoding="utf-8")
    if check and stale:
        sys.exit("run `make docs` and commit the result")


if __name__ == "__main__":
    main()

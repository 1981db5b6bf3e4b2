"""What an export came to, in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mediator_cli.cli.output import print_table, say
from mediator_cli.recipe.sizes import human_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pydantic import BaseModel

    from mediator_cli.cli.export_request import Request

_ORIGINS = {"source": "its model", "stored": "stored delta", "factors": "its factors"}
_SHOWN = 5


def print_report(request: Request, report: BaseModel, place: str, bundle: str, seconds: float) -> None:
    """Print a report: a table of the experts where there are several, what was written, and what comes next."""
    facts = report.model_dump(mode="json")
    experts = facts.get("adapters", facts).get("experts") or ()
    if experts and isinstance(experts[0], dict):
        _print_experts(experts, request.to)
        _print_left(experts)
    for name, value in _rows(request, facts, place):
        say(f"{name:<14}{value}")
    say(f"written in {seconds:.1f} s")
    if after := _next(request, facts, place, bundle):
        say(f"Next: {after}")


def _print_experts(experts: Sequence[dict[str, Any]], to: str) -> None:
    columns = ["expert", "made of", "rank#", "held#", "worst layer#", "matrices#", "size#", "left behind#"]
    measured = any(each["measured"] for each in experts)
    if to == "shira":
        columns = ["expert", "made of", "r#", "adapters#", "matrices#", "size#", "left behind#"]
    if measured:
        columns += ["rows#", "bundle#", "export#", "loss#", "loss here#"]
    print_table(tuple(columns), [tuple(_cells(each, to, measured=measured)) for each in experts])
    if measured:
        say("bundle, export: rows answered exactly, by the bundle's expert and by dense + adapter; loss in nats a row.")


def _cells(each: dict[str, Any], to: str, *, measured: bool) -> Iterator[str]:
    yield each["name"]
    yield _ORIGINS[each["origin"]]
    yield str(each["rank"])
    if to == "shira":
        yield str(each["n_adapters"])
    else:
        yield _share(each["energy"])
        yield _share(min(each["layers"].values(), default=1.0))
    yield str(each["n_targets"])
    yield human_bytes(each["bytes"])
    yield f"{len(each['not_carried'])} tensors" if each["not_carried"] else "nothing"
    if measured:
        found = each["measured"]
        yield from _measured(found) if found else ("", "", "", "", "")


def _measured(found: dict[str, Any]) -> Iterator[str]:
    yield str(found["rows"])
    yield f"{found['bundle_accuracy']:.1%}"
    yield f"{found['export_accuracy']:.1%}"
    yield f"{found['bundle_loss']:.3f}"
    yield f"{found['export_loss']:.3f}"


def _share(energy: float) -> str:
    """Write a share; one that rounding alone keeps from 1 is exact.

    >>> _share(0.7133), _share(0.999995), _share(0.9999)
    ('71.3%', 'exact', '99.9%')
    """
    if energy > 0.99999:
        return "exact"
    return f"{int(energy * 1000) / 10:.1f}%"


def _print_left(experts: Sequence[dict[str, Any]]) -> None:
    """Print what changes most of all that stays behind."""
    left = [(each["name"], tensor) for each in experts for tensor in each["not_carried"]]
    left.sort(key=lambda pair: -pair[1]["size"])
    if not left:
        return
    rows = [(name, one["tensor"], f"{one['size']:.2%}", one["reason"]) for name, one in left[:_SHOWN]]
    if len(left) > _SHOWN:
        rows.append(("", f"… and {len(left) - _SHOWN} more", "", "export.json lists them"))
    print_table(("expert", "tensor", "change#", "why it stays behind"), rows, title="changed, and not in the export")


def _rows(request: Request, facts: dict[str, Any], place: str) -> Iterator[tuple[str, str]]:
    yield "export", f"{place}  ({request.to})"
    if request.to == "dense":
        yield "model", _mixture(facts["mixture"])
        yield "tensors", f"{facts['n_tensors']}, bit by bit as the bundle mixes them"
    if request.to == "router":
        yield "router", f"reads {facts['features']}, chooses among {', '.join(facts['experts'])}"
    if request.to == "vllm":
        yield "router", f"reads {facts['router']['features']}"
        grid = facts["grid_rank"]
        yield "mixtures", f"of two experts, of rank {grid}" if grid else "none: vLLM takes none of such a rank"
    if request.to == "gguf":
        yield "model", f"{facts['model']}: {_mixture(facts['mixture'])}, {facts['out_type']}"
    if request.to == "moe":
        yield "format", f"{facts['architecture']}, {facts['experts_per_token']} experts for each token"
        yield "experts", f"{', '.join(facts['experts'])}, in {len(facts['layers'])} layers"
        yield "parameters", f"{facts['n_parameters'] / 1e6:,.1f}M, {facts['n_active'] / 1e6:,.1f}M active for a token"
    if "bytes" in facts:
        yield "size", human_bytes(facts["bytes"])


def _mixture(weights: dict[str, float]) -> str:
    return " + ".join(f"{name} {weight:g}" for name, weight in weights.items()) or "dense expert alone"


def _next(request: Request, facts: dict[str, Any], place: str, bundle: str) -> str:
    if request.to == "dense":
        return f"vllm serve {place}   ·   mediator evaluate {place} --tasks FILE"
    if request.to == "lora":
        first = facts["experts"][0]["name"]
        return f"mediator evaluate {place}/{first} --base {bundle} --tasks FILE   ·   mediator push {place} ORG/NAME"
    if request.to == "gguf":
        files = " ".join(f"--lora {place}/{each['folder']}" for each in facts["experts"])
        return f"llama-server -m {place}/{facts['model']} {files}".strip()
    if request.to == "vllm":
        return f"sh {place}/serve.sh"
    if request.to == "router":
        return f"read {place}/README.md"
    if request.to == "moe":
        return f"vllm serve {place}   ·   mediator gates {place} --tasks FILE"
    return ""

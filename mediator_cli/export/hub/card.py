"""The model card of what is pushed: metadata, parents, numbers, and how it is used from the Hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mediator_cli.bundle.card import with_block
from mediator_cli.bundle.licences import common_licence, licence_warnings
from mediator_cli.bundle.lineage import card_facts, licences_of, read_facts, with_facts, with_lineage
from mediator_cli.errors import some_names
from mediator_cli.export.hub.folder import is_causal
from mediator_cli.recipe.sizes import human_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mediator_cli.bundle.manifest import Manifest
    from mediator_cli.export.hub.folder import Found


def pushed_card(card: str, found: Found, repo_id: str, recipe: str = "") -> str:
    """Complete a card for the Hub; what its author wrote stays, and so do blocks of other commands.

    A recipe that the card does not quote yet is added.
    """
    text = card or f"# {repo_id.rpartition('/')[2]}\n\nA {found.kind}, written by mediator.\n"
    if found.parents:
        text = with_lineage(text, found.parents)
    if found.manifest is not None:
        text = with_block(text, "numbers", _numbers(found.manifest))
    if recipe.strip() and recipe.strip() not in text:
        text = with_block(text, "recipe", f"## Recipe\n\n```yaml\n{recipe.rstrip()}\n```")
    text = with_block(text, "use", _use(found, repo_id))
    return with_facts(text, _facts(found))


def _facts(found: Found) -> dict[str, Any]:
    is_peft = found.kind == "adapter"
    tags = ["merge", "mediator", *(["moe"] if "Mixture" in found.kind else []), *(["lora"] if is_peft else [])]
    facts: dict[str, Any] = {"library_name": "peft" if is_peft else "transformers"}
    if is_causal(found.folder) or is_peft:
        facts["pipeline_tag"] = "text-generation"
    return {**facts, "tags": tags, **(card_facts(found.parents) if found.parents else {})}


def _numbers(manifest: Manifest) -> str:
    """Tell of assignment, conflict and sizes."""
    routed = [unit for unit, decision in manifest.assignment.items() if decision == "route"]
    lines = ["## Numbers", ""]
    if manifest.assignment and manifest.moe is None:
        lines.append(f"- {len(manifest.assignment) - len(routed)} units are averaged, {len(routed)} are routed")
    if manifest.conflict is not None and (scores := manifest.conflict.scores):
        most, least = (pick(scores, key=lambda unit: scores[unit]) for pick in (max, min))
        told = f"{scores[least]:.3f} ({least}) to {scores[most]:.3f} ({most})"
        lines.append(f"- conflict by {manifest.conflict.measure}, by {manifest.conflict.unit}: {told}")
    lines += [f"- averaged by {m.method}: {m.n_tensors} tensors" for m in manifest.methods]
    if sizes := manifest.sizes:
        whole = f"{human_bytes(sizes.dense)} dense, {human_bytes(sizes.sparse)} of experts"
        lines.append(f"- {whole}; the experts as models of their own would be {human_bytes(sizes.full_models)}")
    return "\n".join([*lines, f"- made by {manifest.generator}, digest {manifest.digest[:16]}"])


def _use(found: Found, repo_id: str) -> str:
    name = repo_id.rpartition("/")[2]
    lines = ["## How to use", ""]
    if found.kind in ("bundle", "static merge", "model", "Mixture of Experts", "compressed Mixture of Experts"):
        what = "The dense expert alone" if found.kind == "bundle" else "The model"
        lines += [f"{what}, in transformers or vLLM:", "", *_code("python", _transformers(repo_id)), ""]
        lines += _code("sh", [f"vllm serve {repo_id}"])
    if found.kind == "adapter":
        loading = f'model = AutoPeftModelForCausalLM.from_pretrained("{repo_id}")'
        lines += [*_code("python", ["from peft import AutoPeftModelForCausalLM", "", loading])]
    if found.kind == "bundle":
        lines += ["", "All experts, mixed anew for each prompt:", ""]
        commands = [f"mediator pull {repo_id}", f'mediator generate {name} "…"', f"mediator serve {name}"]
        lines += _code("sh", ["pip install 'mediator-merge[serve]'", *commands])
    elif found.kind != "adapter":
        lines += [*([""] if lines[-1] else []), *_code("sh", [f"mediator pull {repo_id}"])]
    return "\n".join(lines)


def _transformers(repo_id: str) -> list[str]:
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{repo_id}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")',
    ]


def _code(language: str, lines: list[str]) -> list[str]:
    return [f"```{language}", *lines, "```"]


def card_warnings(card: str, found: Found) -> Iterator[str]:
    """Say what the finished card cannot tell, and what its author should know before others read it."""
    facts = read_facts(card)
    yield from licence_warnings(licences_of(found.parents))
    if not found.parents and "base_model" not in facts:
        yield "nothing in the folder says what it was made of: add base_model and license to README.md"
    near = [parent.name for parent in found.parents if parent.hub_id is None]
    if near and len(_names(facts.get("base_model"))) < len(found.parents):
        told = "came from folders, so the card names no repository of theirs"
        yield f"{some_names(near)} {told}: add what is on the Hub to base_model in README.md"
    shared = common_licence(licences_of(found.parents)) if found.parents else None
    if shared and str(facts.get("license")).lower() != shared:
        yield f"README.md says license {facts.get('license')}, all parents are under {shared}"


def _names(value: Any) -> list[Any]:  # noqa: ANN401 - any YAML
    return value if isinstance(value, list) else [value] if value else []

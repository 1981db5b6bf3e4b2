"""`mediator fit-router`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mediator_cli.cli.options import JsonOption
from mediator_cli.cli.output import print_json, print_notices, print_table, say

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mediator_cli.bundle.manifest import Manifest
    from mediator_cli.bundle.router_record import RouterRecord
    from mediator_cli.recipe.router import RouterSpec


def fit_router(
    folder: Annotated[Path, typer.Argument(help="A bundle.", metavar="DIR", show_default=False)],
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompts",
            metavar="NAME=FILE",
            help="JSON lines with a `prompt` each, for one expert; repeatable. Default: those that the bundle notes.",
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            "--features", help="embedding_mean, hidden_mean, text, perplexity or gradient.", show_default=False
        ),
    ] = None,
    layer: Annotated[
        int | None, typer.Option("--layer", help="Decoder layers that run, for hidden_mean.", show_default=False)
    ] = None,
    classifier: Annotated[
        str | None,
        typer.Option("--classifier", help="logistic, gaussian, prototype, ridge or none.", show_default=False),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            metavar="FIELD=VALUE",
            help="A field of router.policy, such as rule=top_k or k=2; repeatable. Other fields get their defaults.",
        ),
    ] = None,
    fields: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Another field of `router`, such as reads=prompt; repeatable."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fit the router of a bundle anew, on other prompts or with other settings, and put it in the old one's place."""
    from mediator_cli.bundle.manifest import read_manifest
    from mediator_cli.cli.opening import quiet_transformers

    old = read_manifest(folder)
    wishes = {"features": features, "layer": layer, "classifier": classifier, "policy": _values("--policy", policy)}
    wishes |= _values("--set", fields) or {}
    spec = _spec(old, {name: wish for name, wish in wishes.items() if wish is not None})
    files = {name: Path(file) for name, file in pairs("--prompts", prompts or ())}
    quiet_transformers()
    from mediator_cli.pipeline.router import refit_router

    manifest, notices = refit_router(folder, files, spec)
    if as_json:
        print_json(manifest.router.model_dump(mode="json") if manifest.router else None)
        return
    print_notices(notices)
    if manifest.router is not None:
        from mediator_cli.cli.merge import router_rows

        print_table(("router", "value"), router_rows(manifest.router))
    say(f'Next: mediator route {folder} "a prompt"')


def pairs(option: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    """Split NAME=FILE and FIELD=VALUE; raise BundleError with all that are not of this form."""
    from mediator_cli.errors import BundleError, Problem

    parts = [text.partition("=") for text in texts]
    if wrong := [text for text, (name, _, value) in zip(texts, parts, strict=True) if not name or not value]:
        wanted = "NAME=FILE" if option == "--prompts" else "FIELD=VALUE"
        raise BundleError([Problem(option, f"'{text}' is not {wanted}", f"write {option} {wanted}") for text in wrong])
    return [(name, value) for name, _, value in parts]


def _values(option: str, texts: Sequence[str] | None) -> dict[str, Any] | None:
    import yaml

    from mediator_cli.errors import BundleError, Problem

    if texts is None:
        return None
    try:
        return {name: yaml.safe_load(value) for name, value in pairs(option, texts)}
    except yaml.YAMLError:
        raise BundleError(Problem(option, "a value is not YAML", "quote it")) from None


def _spec(manifest: Manifest, wishes: Mapping[str, Any]) -> RouterSpec:
    """Take what the bundle's router has where nothing else is wished; raise BundleError for what does not fit."""
    from pydantic import ValidationError

    from mediator_cli.errors import BundleError, Problem
    from mediator_cli.recipe.router import RouterSpec

    old = _kept(manifest.router, wishes) if manifest.router is not None else {}
    try:
        return RouterSpec.model_validate(old | dict(wishes))
    except ValidationError as error:
        faults = [
            (".".join(map(str, item["loc"])), item["msg"].removeprefix("Value error, "))
            for item in error.errors(include_url=False)
        ]
        hint = "`mediator fit-router --help` and recipes/README.md list what fits"
        raise BundleError([Problem(f"--{place}".rstrip("-"), message, hint) for place, message in faults]) from None


def _kept(record: RouterRecord, wishes: Mapping[str, Any]) -> dict[str, Any]:
    """Give what stays of a bundle's router; nothing where one asks the experts and the other does not."""
    from mediator_cli.recipe.router import ASKING, POLICY_FIELDS

    features = wishes.get("features", record.features)
    if (features in ASKING) != record.asks:
        return {}
    names = ("rule", *POLICY_FIELDS[record.policy.rule])
    kept: dict[str, Any] = {
        "classifier": record.classifier,
        "policy": {name: getattr(record.policy, name) for name in names},
    }
    if record.asks:
        kept |= {"reads": record.reads, "first_token": record.first_token}
    if features == record.features:
        kept |= {"features": record.features, "layer": record.layer}
        if wishes.get("classifier", record.classifier) == "none":
            is_fitted = wishes.get("calibrate") == "temperature" or "temperature" in wishes
            kept |= {"form": record.form} | ({} if is_fitted else {"temperature": record.temperature})
    return kept

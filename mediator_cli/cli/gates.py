"""`mediator gates`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mediator_cli.cli.options import JsonOption, QuietOption

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from mediator_cli.errors import MediatorError
    from mediator_cli.moe.gates.look import GateLook
    from mediator_cli.moe.gates.report import GateFit
    from mediator_cli.moe.gates.settings import GateSettings
    from mediator_cli.plan.moe_plan import ExpertPrompts


def gates(
    folder: Annotated[
        Path,
        typer.Argument(
            help="A Mixture of Experts: Mixtral, Qwen2-MoE, Qwen3-MoE, GraniteMoeShared.",
            metavar="DIR",
            show_default=False,
        ),
    ],
    more: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            metavar="[NAME=]FILE…",
            help="JSON lines with a `prompt` each; a task each. Default: the experts' own prompts.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help="Prompts that are read of each file.", show_default="32; with --fit, 64"),
    ] = None,
    fit: Annotated[
        Literal[
            "random",
            "uniform_random",
            "hidden",
            "hidden_avg",
            "hidden_last",
            "cheap_embed",
            "centred",
            "ridge",
            "logistic",
        ]
        | None,
        typer.Option("--fit", help="First make all gates anew by this method, without training.", show_default=False),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompts",
            metavar="NAME=FILE",
            help="With --fit: JSON lines with a `prompt` each, for one expert. Default: those that the manifest notes.",
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option("--base", metavar="DIR", help="With --fit hidden… and cheap_embed: the base.", show_default=False),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", help="With --fit: below 1, the first expert gets more.", show_default=False),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option("--strength", help="With --fit ridge and logistic: the penalty.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="With --fit random and uniform_random.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="With --fit: where to write; default: in place.", show_default=False),
    ] = None,
    experts: Annotated[
        str | None,
        typer.Option(
            "--experts", metavar="NAME,NAME…", help="Names, in order; default: the manifest's.", show_default=False
        ),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Ask without the chat template.")] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Also draw the choices: FILE.html, .png, .svg or .pdf.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show which experts the gates of a Mixture of Experts choose on each task; or make the gates anew."""
    from mediator_cli.cli.heat.map import check_plot
    from mediator_cli.cli.output import Told, print_json
    from mediator_cli.cli.progress import shown_progress

    check_plot(plot)
    _check_wishes(fit, {"--prompts": prompts, "--base": base, "--temperature": temperature, "--output": output})
    names = _names(folder, experts)
    files = _prompt_files(folder, prompts, fit)
    shown = _read(_tasks([*(tasks or ()), *(more or ())]) or ({} if fit and plot is None else files or _noted(folder)))
    if not shown and (fit is None or plot is not None):
        raise _nothing_to_look_at(folder)
    from mediator_cli.cli.opening import quiet_transformers

    quiet_transformers()
    told, made, look, place = Told(quiet), None, None, output or folder
    with shown_progress(quiet or as_json) as progress:
        if fit is not None:
            settings = _settings(fit, temperature, strength, limit, seed, raw=raw)
            names = names or tuple(files)
            made = _refit(folder, place, base, files, settings, names, progress)
            told.tell(*made.report.notices)
        if shown:
            look = _look(place, shown, names, limit, progress, raw=raw)
    if look is not None and plot is not None:
        from mediator_cli.cli.heat.gates import draw_gates

        draw_gates(plot, look)
    if as_json:
        facts = {"folder": str(place), "fit": made.report.as_json() if made else None}
        print_json({**facts, "look": look.as_json() if look else None})
    elif not quiet:
        _print(place, made, look, plot)


def _check_wishes(fit: str | None, wishes: Mapping[str, object]) -> None:
    from mediator_cli.errors import Problem, RecipeError

    idle = [name for name, value in wishes.items() if value and fit is None]
    if idle:
        raise RecipeError([Problem(name, "goes with --fit METHOD only", "add --fit ridge") for name in idle])


def _names(folder: Path, given: str | None) -> tuple[str, ...]:
    """Name the experts as given or as the manifest does; empty where neither says."""
    from mediator_cli.moe.gates.refit import expert_names

    return expert_names(folder, given.split(",") if given else ())


def _settings(
    fit: str, temperature: float | None, strength: float | None, limit: int | None, seed: int, *, raw: bool
) -> GateSettings:
    from mediator_cli.moe.gates.settings import GateSettings

    return GateSettings(fit, temperature, strength, False if raw else None, limit, seed)  # type: ignore[arg-type]


def _tasks(texts: Iterable[str]) -> dict[str, Path]:
    """Name each file: NAME=FILE, or by the file's name up to the first dot."""
    from mediator_cli.errors import CheckpointError, Problem

    found: dict[str, Path] = {}
    for text in texts:
        name, is_named, file = text.partition("=")
        path = Path(file if is_named else text)
        name = name if is_named else path.name.split(".")[0]
        if not name or name in found:
            raise CheckpointError(Problem(text, f"a second task '{name}'" if name else "has no name", "NAME=FILE"))
        found[name] = path
    return found


def _prompt_files(folder: Path, texts: Sequence[str] | None, fit: str | None) -> dict[str, Path]:
    """Find the prompts that gates are made from: as given, else as the manifest notes them."""
    from mediator_cli.cli.fit_router import pairs
    from mediator_cli.recipe.moe import NO_PROMPTS

    files = {name: Path(file) for name, file in pairs("--prompts", texts or ())}
    return files if files or fit is None or fit in NO_PROMPTS else _noted(folder)


def _noted(folder: Path) -> dict[str, Path]:
    from mediator_cli.moe.gates.refit import manifest_of
    from mediator_cli.pipeline.router import find_prompts

    manifest = manifest_of(folder)
    sources = [source for source in (manifest.experts if manifest else ()) if source.prompts is not None]
    return {source.name: find_prompts(folder, source) for source in sources}


def _nothing_to_look_at(folder: Path) -> MediatorError:
    from mediator_cli.errors import CheckpointError, Problem

    return CheckpointError(Problem("--tasks", f"{folder} notes no prompts to look at", "give --tasks NAME=FILE"))


def _read(files: Mapping[str, Path]) -> dict[str, tuple[str, ...]]:
    from mediator_cli.plan.prompts import read_prompts

    return {name: read_prompts(file) for name, file in files.items()}


def _refit(
    folder: Path,
    target: Path,
    base: Path | None,
    files: Mapping[str, Path],
    settings: GateSettings,
    names: Sequence[str],
    progress: Callable[[str, int, int], None],
) -> GateFit:
    from mediator_cli.moe.gates.refit import refit_gates
    from mediator_cli.plan.moe_plan import ExpertPrompts

    prompts: dict[str, ExpertPrompts] = {name: ExpertPrompts(texts) for name, texts in _read(files).items()}
    return refit_gates(folder, target, prompts, settings, names=names, base=base, progress=progress)


def _look(
    folder: Path,
    texts: Mapping[str, Sequence[str]],
    names: Sequence[str],
    limit: int | None,
    progress: Callable[[str, int, int], None],
    *,
    raw: bool,
) -> GateLook:
    from mediator_cli.moe.gates.look import N_PROMPTS, look_at_gates

    return look_at_gates(folder, texts, names, chat=not raw, most=limit or N_PROMPTS, progress=progress)


def _print(folder: Path, made: GateFit | None, look: GateLook | None, plot: Path | None) -> None:
    from mediator_cli.cli.heat.gates import print_fit, print_look
    from mediator_cli.cli.output import say

    if made is not None:
        print_fit(made.report)
        say(f"gates written to {folder}")
    if look is not None:
        print_look(look)
    if plot is not None:
        say(f"picture written to {plot}")
    if look is None:
        say(f"Next: mediator gates {folder} --tasks NAME=FILE --plot gates.html")

"""Which of how many processes this one is, as the program that started it says in the environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mediator_cli.errors import OutputError, Problem

if TYPE_CHECKING:
    from collections.abc import Mapping

_NUMBERS = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("JOB_COMPLETION_INDEX", "MEDIATOR_WORLD_SIZE"),
)
PATIENCE = 600.0


@dataclass(frozen=True)
class Place:
    """Process `rank` of `world`, counted from 0; `run` is a word that only the processes of one start share."""

    rank: int
    world: int
    run: str


def find_place(environ: Mapping[str, str]) -> Place:
    """Read rank, world size and run from the environment of torchrun, SLURM, or an indexed job of Kubernetes.

    Raises OutputError that says what to set.
    """
    names = next((pair for pair in _NUMBERS if all(environ.get(name) for name in pair)), None)
    if names is None:
        raise _no_place(environ)
    rank, world = (_count(environ, name) for name in names)
    if not 0 <= rank < world:
        message = f"{rank} is not the number of one of {world} processes, counted from 0"
        raise OutputError(Problem(names[0], message, f"set {names[0]} and {names[1]} for each process"))
    return Place(rank, world, _run(environ))


def find_patience(environ: Mapping[str, str]) -> float:
    """Read how many seconds a process may give no sign of life: MEDIATOR_WAIT, or ten minutes."""
    text = environ.get("MEDIATOR_WAIT", "")
    try:
        patience = float(text) if text else PATIENCE
    except ValueError:
        patience = 0.0
    if not 0 < patience < float("inf"):
        raise OutputError(Problem("MEDIATOR_WAIT", f"'{text}' is no number of seconds", "set it to 600, for example"))
    return patience


def _no_place(environ: Mapping[str, str]) -> OutputError:
    if environ.get("JOB_COMPLETION_INDEX"):
        message = "is not set, so this process does not know how many there are"
        hint = "set it to the completions of the job"
        return OutputError(Problem("MEDIATOR_WORLD_SIZE", message, hint))
    message = "does not know which of how many processes this is"
    choices = ", or ".join(" and ".join(pair) for pair in _NUMBERS)
    return OutputError(Problem("--executor rank", message, f"set {choices}"))


def _count(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        message = f"'{environ[name]}' is no whole number"
        raise OutputError(Problem(name, message, "set it to a number for each process")) from None


def _run(environ: Mapping[str, str]) -> str:
    if own := environ.get("MEDIATOR_RUN"):
        return own
    if job := environ.get("SLURM_JOB_ID"):
        return f"slurm {job}.{environ.get('SLURM_STEP_ID', '')}"
    # torchrun writes "none" where it was given no name.
    if (elastic := environ.get("TORCHELASTIC_RUN_ID", "none")) != "none":
        return f"torchrun {elastic}"
    message = "is not set, so the processes cannot tell each other from those of another start"
    raise OutputError(Problem("MEDIATOR_RUN", message, "set it to the same word in all processes, a new one each time"))

"""What is asked of gates: the method, its numbers, and the prompts of each expert. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mediator_cli.errors import Problem, RecipeError, did_you_mean, some_names
from mediator_cli.plan.moe_plan import BASE, ExpertPrompts
from mediator_cli.recipe.moe import GATE_METHODS, NO_PROMPTS, OF_BASE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mediator_cli.recipe.moe import GateMethod

_N_PROMPTS = 64


@dataclass(frozen=True)
class GateSettings:
    """How gates are made.

    `temperature` divides the gates: below 1 the first expert of a token gets more of it. Gates that read the MoE's
    own states are calibrated first, so that at 1 their softmax is how likely a token is to come from an expert's
    prompts. `strength` is the penalty of ridge, as a share of the mean square of a state's entries, and of logistic,
    per token. `chat` tells whether prompts are put in the chat template; None: as they will be asked where the MoE
    reads them, bare where the base does, since behind a template all prompts end with the same token. `prompts` is the
    most that are read of each expert, taken evenly from its list. `seed` matters to random gates only. None is what
    suits the method.
    """

    method: GateMethod = "ridge"
    temperature: float | None = None
    strength: float | None = None
    chat: bool | None = None
    prompts: int | None = None
    seed: int = 0

    @property
    def base_chats(self) -> bool:
        """Whether the base reads prompts in the chat template."""
        return self.chat is True

    @property
    def mixture_chats(self) -> bool:
        """Whether the MoE reads prompts in the chat template."""
        return self.chat is not False

    @property
    def most_prompts(self) -> int:
        """The most prompts that are read of each expert."""
        return _N_PROMPTS if self.prompts is None else self.prompts


def check_settings(settings: GateSettings) -> None:
    """Raise RecipeError with all that is wrong with the settings."""
    problems = []
    if settings.method not in GATE_METHODS:
        problems.append(Problem("method", f"no gates '{settings.method}'", did_you_mean(settings.method, GATE_METHODS)))
    for name in ("temperature", "strength", "prompts"):
        value = getattr(settings, name)
        # The comparison is false for NaN too.
        if value is not None and not 0 < value < float("inf"):
            problems.append(Problem(name, f"is {value}", "give a number above 0"))
    if problems:
        raise RecipeError(problems)


def check_prompts(method: GateMethod, prompts: Mapping[str, ExpertPrompts], experts: Sequence[str]) -> None:
    """Raise RecipeError naming experts that lack prompts, are unknown, or have the same prompts as another."""
    if method in NO_PROMPTS:
        return
    problems = [
        Problem(name, "has prompts, but is no expert of this MoE", did_you_mean(name, experts))
        for name in prompts
        if name not in experts
    ]
    hint = f"give it prompts, or use gates that need none: {', '.join(NO_PROMPTS)}"
    given = [name for name in experts if prompts.get(name, ExpertPrompts()).positive]
    problems += [Problem(name, "this expert has no prompts", hint) for name in experts if name not in (*given, BASE)]
    if not given:
        problems = problems or [Problem("", "no expert has prompts", hint)]
    if method in OF_BASE and BASE in experts and BASE not in given:
        what = f"needs prompts with gates '{method}'"
        problems.append(Problem(BASE, what, "give it some, or use centred, ridge or logistic, which do without"))
    if problems:
        raise RecipeError(problems)
    _check_different(prompts, given)


def _check_different(prompts: Mapping[str, ExpertPrompts], given: Sequence[str]) -> None:
    same: dict[tuple[frozenset[str], ...], list[str]] = {}
    for name in given:
        own = prompts[name]
        same.setdefault((frozenset(own.positive), frozenset(own.negative)), []).append(name)
    problems = [
        Problem(some_names(names), "have the same prompts, so no gate can tell them apart", "give each its own")
        for names in same.values()
        if len(names) > 1
    ]
    if problems:
        raise RecipeError(problems)

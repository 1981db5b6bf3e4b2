"""What `mediator export` was asked for: its options together, and which of them belong to which target."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mediator_cli.errors import OutputError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Target = Literal["dense", "lora", "shira", "moe", "gguf", "router", "vllm"]
TARGETS: tuple[Target, ...] = ("dense", "lora", "shira", "moe", "gguf", "router", "vllm")
_MIXED: tuple[Target, ...] = ("dense", "gguf")
_LORA: tuple[Target, ...] = ("lora", "gguf", "vllm")
_TASKS: tuple[Target, ...] = ("lora", "vllm")
_OF: dict[str, tuple[Target, ...]] = {
    "expert": ("dense", "lora", "shira", "moe", "gguf", "vllm"),
    "mixture": _MIXED,
    "static": _MIXED,
    "shard_size": ("dense",),
    "rank": _LORA,
    "energy": _LORA,
    "source": _LORA,
    "dtype": _LORA,
    "warn_below": _LORA,
    "tasks": _TASKS,
    "limit": _TASKS,
    "max_adapters": ("shira",),
    "architecture": ("moe",),
    "experts_per_token": ("moe",),
    "gates": ("moe",),
    "prompts": ("moe",),
    "converter": ("gguf",),
    "python": ("gguf",),
    "timeout": ("gguf",),
    "outtype": ("gguf",),
}


@dataclass(frozen=True)
class Request:
    """The options that were given; None, empty and False are those that were not."""

    to: Target
    expert: tuple[str, ...] = ()
    mixture: str | None = None
    static: bool = False
    shard_size: str | None = None
    rank: int | None = None
    energy: float | None = None
    source: tuple[str, ...] = ()
    dtype: str | None = None
    warn_below: float | None = None
    tasks: tuple[Path, ...] = ()
    limit: int | None = None
    max_adapters: int | None = None
    architecture: str | None = None
    experts_per_token: int | None = None
    gates: str | None = None
    prompts: tuple[str, ...] = ()
    converter: Path | None = None
    python: str | None = None
    timeout: float | None = None
    outtype: str | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    """Those of `mixture`, read."""

    @property
    def is_mixed(self) -> bool:
        """Whether one mixture alone is asked for."""
        return self.static or self.mixture is not None or (bool(self.expert) and self.to in _MIXED)

    @property
    def chosen(self) -> dict[str, float]:
        """The mixture that is asked for; {} is the dense expert alone."""
        return dict(self.weights) if self.mixture is not None else dict.fromkeys(self.expert, 1.0)


def checked(request: Request) -> Request:
    """Read the mixture and give the request; raise OutputError with all that does not go together."""
    weights, faults = _weights(request.mixture)
    problems = [*_misplaced(request), *faults, *_conflicts(request)]
    if problems:
        raise OutputError(problems)
    given = {each.name: getattr(request, each.name) for each in fields(request)}
    return Request(**{**given, "weights": weights})


def option(name: str) -> str:
    """Write the name of a field as the option that it is."""
    return f"--{name.replace('_', '-')}"


def _misplaced(request: Request) -> Iterator[Problem]:
    for name, targets in _OF.items():
        if getattr(request, name) not in (None, (), False) and request.to not in targets:
            message = f"does not go with --to {request.to}, only with --to {', '.join(targets)}"
            yield Problem(option(name), message, "leave it out")


def _conflicts(request: Request) -> Iterator[Problem]:
    if request.to in _MIXED:
        asked = [name for name in ("expert", "mixture", "static") if getattr(request, name)]
        if len(asked) > 1:
            message = f"{' and '.join(map(option, asked))} say different things"
            yield Problem(option(asked[0]), message, "give one of them")
        if len(request.expert) > 1:
            hint = "--mixture a=0.5,b=0.5 mixes several"
            yield Problem("--expert", "one model has one expert", hint)
        if not asked and request.to == "dense":
            hint = "--expert NAME, --mixture a=0.7,b=0.3, or --static for the dense expert alone"
            yield Problem("--to dense", "does not say which model", hint)
    if request.rank is not None and request.energy is not None:
        yield Problem("--rank", "goes with no --energy, which finds the rank itself", "give one of them")
    if request.limit is not None and not request.tasks:
        yield Problem("--limit", "is the number of rows of --tasks, which is not given", "add --tasks FILE")


def _weights(text: str | None) -> tuple[dict[str, float], list[Problem]]:
    """Read `a=0.7,b=0.3`."""
    found: dict[str, float] = {}
    problems: list[Problem] = []
    for part in (text or "").split(",") if text is not None else ():
        name, separator, value = (piece.strip() for piece in part.partition("="))
        try:
            weight = float(value)
        except ValueError:
            weight = float("nan")
        if not separator or not name or weight != weight or name in found:
            message = f"'{part}' is given twice" if name in found else f"'{part}' is not NAME=WEIGHT"
            problems.append(Problem("--mixture", message, "write for example --mixture maths=0.7,code=0.3"))
        found[name] = weight
    return found, problems


def named_paths(name: str, texts: tuple[str, ...]) -> dict[str, Path]:
    """Read NAME=PATH; raise OutputError with all that are something else, or are given twice."""
    found: dict[str, Path] = {}
    problems = []
    for text in texts:
        key, separator, path = text.partition("=")
        if not separator or not key or not path:
            problems.append(Problem(option(name), f"'{text}' is not NAME=PATH", f"write {option(name)} maths=DIR"))
        elif key in found:
            problems.append(Problem(option(name), f"two are given for {key}", "give one"))
        found[key] = Path(path)
    if problems:
        raise OutputError(problems)
    return found

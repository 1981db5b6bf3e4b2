"""Merges that several processes share, each a thread or a program of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from mediator_cli import Settings, load_recipe, make_plan, merge
from mediator_cli.executors.place import Place
from mediator_cli.executors.rank import share_merge

STATIC = {"average": {"method": "ties", "density": 0.4, "trim": "model"}, "assign": {"rule": "none"}}
MEASURED = {"assign": {"rule": "top_k", "k": 2}, "extract": {"density": 0.3}}
OVER_MODEL = {"assign": {"rule": "all"}, "extract": {"density": 0.3, "over": "model"}}
SHARDED = {"output": {"shard_size": "1KB"}}


def merge_together(recipe: Path, out: Path, world: int, patience: float = 60, **how) -> list[BaseException | None]:
    """Merge in `world` threads of this program; give how each ended."""
    return merge_at([Place(rank, world, "test") for rank in range(world)], recipe, out, patience, **how)


def merge_at(
    places: Sequence[Place],
    recipe: Path,
    out: Path,
    patience: float = 60,
    changes: Mapping[int, tuple[str, ...]] = MappingProxyType({}),
    **how,
) -> list[BaseException | None]:
    """Merge in a thread for each place, the recipe changed for some; give how each ended."""
    ends: list[BaseException | None] = [None] * len(places)

    def work(place: Place) -> None:
        try:
            plan = make_plan(load_recipe(recipe, changes.get(place.rank, ())))
            merge(plan, out, settings=share_merge(plan, Settings(workers=1, **how), place, patience))
        except BaseException as error:  # noqa: BLE001 - given back
            ends[place.rank] = error

    threads = [threading.Thread(target=work, args=(place,)) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


def start_rank(folder: Path, rank: int, world: int, *words: str, program: str = "", **environ: str) -> subprocess.Popen:
    """Start `mediator merge recipe.yaml -o out --executor rank` as a program, behind some lines of another."""
    words = ("mediator", "merge", "recipe.yaml", "-o", "out", "--executor", "rank", "--workers", "1", *words)
    code = f"import sys\n{program}\nfrom mediator_cli.cli.app import main\nsys.argv = {list(words)!r}\nmain()\n"
    names = {"RANK": str(rank), "WORLD_SIZE": str(world), "MEDIATOR_RUN": "test", **environ}
    env = {**os.environ, **names, "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=env, **pipes)

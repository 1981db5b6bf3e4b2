"""Adapters into an adapter: factors of one module at a time; nothing of the base is read but its headers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import threadpool_limits

from mediator_cli.bundle.adapter import AdapterManifest, ModuleRecord
from mediator_cli.checkpoint.digest import Digests
from mediator_cli.checkpoint.header import DTYPE_BYTES, read_json
from mediator_cli.checkpoint.read import open_files, read_slab, widen
from mediator_cli.checkpoint.source import weight_files
from mediator_cli.engine.matrices import naming
from mediator_cli.engine.pool import run_all
from mediator_cli.engine.publish import can_resume, check_output, publish
from mediator_cli.engine.streams import RUNTIME_BYTES, Piece, draw, not_finite
from mediator_cli.engine.team import Alone
from mediator_cli.errors import OutputError, Problem, some_names
from mediator_cli.kernels.factors import Factors
from mediator_cli.pipeline.adapter_folder import (
    CONFIG,
    Shape,
    card_head,
    create_adapter_file,
    finish_folder,
    peft_config,
    source_record,
    source_table,
)
from mediator_cli.pipeline.download import download, far_files_of
from mediator_cli.pipeline.progress import counter
from mediator_cli.pipeline.record import method_records, package_version, recipe_record
from mediator_cli.pipeline.settings import output_folder
from mediator_cli.pipeline.sources import check_unchanged, identities, source_files
from mediator_cli.pipeline.upload import output_url

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from mediator_cli.checkpoint.adapter.pairs import Pair
    from mediator_cli.checkpoint.header import TensorInfo
    from mediator_cli.checkpoint.read import Handle
    from mediator_cli.kernels.arrays import Floats
    from mediator_cli.methods.statistics import Uniforms
    from mediator_cli.pipeline.settings import Settings
    from mediator_cli.plan.model import ModulePlan, Plan


def merge_adapters(plan: Plan, output: Path | str | None, conflicts: Path | None, run: Settings) -> Path:
    """Merge the adapters of a plan with modules into one; return its folder, which appears whole or not at all.

    Raises MediatorError for what the user can mend.
    """
    _check_options(plan, output, conflicts, run)
    target = output_folder(plan, output)
    mode = "overwrite" if run.overwrite and not can_resume(target) else run.mode
    check_output(target, mode)
    experts = without_base(plan)
    download(tuple(file for files in far_files_of(experts).values() for file in files), run.progress)
    files = identities(experts)
    key = {"the recipe": recipe_record(plan).sha256, "mediator's version": package_version()}
    with publish(target, mode, key | {f"the file {file}": facts for file, facts in files.items()}) as building:
        _build(plan, building.folder, target.name, run)
        check_unchanged(experts, files)
    return target


def _check_options(plan: Plan, output: Path | str | None, conflicts: Path | None, run: Settings) -> None:
    if output_url(plan, output) is not None:
        raise OutputError(Problem("--output", "an adapter is written into a folder", "choose one, then copy it"))
    if conflicts is not None:
        message = "no conflict is measured where adapters are merged into one"
        raise OutputError(Problem("--conflicts", message, "leave it out"))
    if not isinstance(run.team, Alone):
        message = "adapters are small: one process merges them"
        raise OutputError(Problem("--executor", message, "leave it out"))


def without_base(plan: Plan) -> Plan:
    """Leave the base's tensors out: none of them is read."""
    return replace(plan, base=replace(plan.base, tensors={}))


def _build(plan: Plan, folder: Path, title: str, run: Settings) -> None:
    shapes = [_shape(module) for module in plan.modules]
    with create_adapter_file(folder, plan.modules[0].dtype, [name for shape in shapes for name in shape.names]) as made:
        ranks, empty = _merge_all(plan, shapes, made.add_factors, run)
    if not ranks:
        message = "the merged adapter is zero in all modules"
        raise OutputError(Problem(str(folder), message, "look at weights and densities"))
    notices = plan.notices
    if empty:
        notices = (*notices, f"{len(empty)} modules have no entry, their merged change is zero: {some_names(empty)}")
        run.notify(notices[-1])
    first = _config_of(plan)
    config = peft_config(
        ranks, _base_name(plan, first), first.get("task_type"), plan.base.tensors, fan_in_fan_out=_is_flipped(plan)
    )
    finish_folder(folder, config, _card(plan, title, ranks), _manifest(plan, ranks, notices, run))


def _merge_all(
    plan: Plan, shapes: Sequence[Shape], add: Callable[[Shape, Factors], None], run: Settings
) -> tuple[dict[str, int], list[str]]:
    """Merge module by module, some at a time, and write in order; give the ranks, and the modules without a change."""
    advance = counter(run.progress, "merge adapters", sum(pair_bytes(module) for module in plan.modules))
    workers = workers_for(plan, run)
    ranks: dict[str, int] = {}
    with _open(plan) as handles, threadpool_limits(1, user_api="blas"):
        merging = _Merging(plan, handles)
        for first in range(0, len(shapes), workers):
            part = range(first, min(first + workers, len(shapes)))
            for at, factors in zip(part, merging.merge_some([plan.modules[at] for at in part]), strict=True):
                if factors.rank:
                    add(shapes[at], factors)
                    ranks[shapes[at].name] = factors.rank
                advance(pair_bytes(plan.modules[at]))
    return ranks, [shape.name for shape in shapes if shape.name not in ranks]


def _open(plan: Plan) -> Any:  # noqa: ANN401 - the context of open_files
    return open_files(file for expert in plan.experts for file in weight_files(expert.tensors))


@dataclass(frozen=True)
class _Merging:
    """What merges one module: the plan and the open files."""

    plan: Plan
    handles: Mapping[Path, Handle]

    def merge_some(self, modules: Sequence[ModulePlan]) -> list[Factors]:
        """Merge modules, each by a thread of its own; in their order."""
        found: dict[str, Factors] = {}

        def one(module: ModulePlan) -> None:
            found[module.name] = self.merge(module)

        run_all(one, modules, len(modules))
        return [found[module.name] for module in modules]

    def merge(self, module: ModulePlan) -> Factors:
        """Read what each adapter has of a module and combine it."""
        names = [expert.name for expert in self.plan.experts]
        adapters = [self._read(name, pair, module.like) for name, pair in zip(names, module.pairs, strict=True)]
        uniforms = drawing(self.plan.loaded.recipe.seed, names, module.name)
        with naming(module.name):
            return module.average.merge_factors(adapters, np.array(module.weights, np.float64), uniforms)

    def _read(self, who: str, pair: Pair | None, like: Pair) -> Factors:
        """Read the factors of one adapter; those of rank 0 where it leaves the module as it is."""
        if pair is None:
            columns, rows = like.a.size // like.a.shape[0], like.b.shape[0]
            return Factors(np.zeros((0, columns), np.float32), np.zeros((rows, 0), np.float32))
        a, b = self._matrix(who, pair.a), self._matrix(who, pair.b)
        return Factors(a.reshape(pair.rank, -1), b.reshape(-1, pair.rank), pair.scale)

    def _matrix(self, who: str, info: TensorInfo) -> Floats:
        values = np.empty(info.size, np.float32)
        if not widen(read_slab(self.handles, info, 0, info.size), info.dtype, values):
            raise not_finite(values, f"expert {who}", Piece(info.name, 0, info.size))
        return values


def drawing(seed: int, names: Sequence[str], module: str) -> Uniforms:
    """Make what draws the uniform numbers of a module for methods on adapters, which have these names."""

    def uniforms(n: int, which: str, shape: tuple[int, ...]) -> Floats:
        numbers = np.empty(shape, np.float32)
        draw(seed, names[n], Piece(f"{module}.{which}", 0, numbers.size), numbers.reshape(-1))
        return numbers

    return uniforms


def _shape(module: ModulePlan) -> Shape:
    like = module.like
    a_tail = like.a.shape[1:] if len(like.a.shape) > 2 else ()
    return Shape(module.name, like.is_embedding, a_tail, like.b.shape[2:])


def pair_bytes(module: ModulePlan) -> int:
    """Count the bytes that are read of all adapters for one module."""
    return sum(pair.a.n_bytes + pair.b.n_bytes for pair in module.pairs if pair is not None)


def workers_for(plan: Plan, run: Settings) -> int:
    """Choose how many modules are merged at a time, so that they fit in the memory that is given; one in any case."""
    room = (run.memory - RUNTIME_BYTES) // max(map(module_bytes, plan.modules))
    return int(max(1, min(run.workers, room)))


def module_bytes(module: ModulePlan) -> int:
    """Bound the memory of merging one module: float64 copies of its factors, of dense deltas where those are merged."""
    pairs = [pair for pair in module.pairs if pair is not None]
    rows, columns = pairs[0].b.shape[0], pairs[0].a.size // pairs[0].a.shape[0]
    stacked = sum(pair.rank for pair in pairs) * (rows + columns)
    if module.average.params.get("act_on") == "delta":
        return module.average.method.working_bytes(len(module.pairs), rows, columns) + 12 * stacked
    return 8 * 6 * stacked


def most_bytes(plan: Plan) -> int:
    """Bound the size of the weights: a rank that the method is given, or else the sum of all ranks."""
    total = 0
    for module in plan.modules:
        pairs = [pair for pair in module.pairs if pair is not None]
        rank = int(module.average.params.get("rank") or sum(pair.rank for pair in pairs))
        sides = pairs[0].b.shape[0] + pairs[0].a.size // pairs[0].a.shape[0]
        total += rank * sides * DTYPE_BYTES[module.dtype]
    return total


def _config_of(plan: Plan) -> dict[str, Any]:
    return read_json(plan.experts[0].source.path / CONFIG)


def _base_name(plan: Plan, first: Mapping[str, Any]) -> str:
    """Name the base as others can find it: the recipe's id on the Hub, else what the adapters say."""
    if plan.base.repo is not None:
        return plan.loaded.recipe.base.split("@")[0]
    return str(first.get("base_model_name_or_path") or plan.loaded.recipe.base)


def _is_flipped(plan: Plan) -> bool:
    return any(bool(read_json(expert.source.path / CONFIG).get("fan_in_fan_out")) for expert in plan.experts)


def _manifest(plan: Plan, ranks: Mapping[str, int], notices: tuple[str, ...], run: Settings) -> AdapterManifest:
    sources = source_files(without_base(plan), Digests(), run)
    specs = {spec.name: spec for spec in plan.loaded.recipe.experts}
    experts = (source_record(e.name, specs[e.name].model, e.source, sources, e.weight) for e in plan.experts)
    return AdapterManifest(
        generator="",
        made_by="merge",
        recipe=recipe_record(plan),
        base=source_record("base", plan.loaded.recipe.base, plan.base, {}),
        experts=tuple(experts),
        methods=tuple(method_records(plan)),
        seed=plan.loaded.recipe.seed,
        dtype=plan.modules[0].dtype,
        modules={name: ModuleRecord(rank=rank) for name, rank in ranks.items()},
        tensors={},
        files=(),
        digest="",
        notices=notices,
    )


def _card(plan: Plan, title: str, ranks: Mapping[str, int]) -> str:
    recipe = plan.loaded.recipe
    rows = [("base", recipe.base, plan.base.path)]
    rows += [(s.name, s.model, e.source.path) for s, e in zip(recipe.experts, plan.experts, strict=True)]
    low, high = min(ranks.values()), max(ranks.values())
    method = plan.modules[0].average.method
    changes = [f"Changed on the command line: {', '.join(f'`{c}`' for c in plan.loaded.changes)}", ""]
    return "\n".join([
        *card_head(title, plan.base, recipe.base, "merge"),
        f"A LoRA adapter, merged with mediator from {len(plan.experts)} adapters of one base by `{method.name}`:",
        f"{len(ranks)} modules, rank {low if low == high else f'{low} to {high}'}.",
        "",
        *source_table(rows),
        "",
        *(changes if plan.loaded.changes else ()),
        "```yaml",
        plan.loaded.text.rstrip("\n"),
        "```",
    ]) + "\n"  # fmt: skip

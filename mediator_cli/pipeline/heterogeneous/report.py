"""What `mediator plan` says of a heterogeneous Mixture of Experts before anything is written."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from mediator_cli.checkpoint.heterogeneous import EMBED, HEAD, HEAD_BIAS
from mediator_cli.pipeline.download import far_files, free_bytes
from mediator_cli.pipeline.heterogeneous.write import output_folder

if TYPE_CHECKING:
    from pathlib import Path

    from mediator_cli.pipeline.heterogeneous.model import HeterogeneousPlan, PlannedExpert


class ExpertReport(BaseModel):
    """One expert: its architecture, width, number of parameters of its body, and how many tokens it knows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    architecture: str
    width: int
    parameters: int
    tokens_known: int
    download_bytes: int


class HeterogeneousReport(BaseModel):
    """What will be written: bytes, parameters in all and for one sequence (at most), and where."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    experts: tuple[ExpertReport, ...]
    tokens: int
    tokenizer: str
    width: int
    tied: bool
    dtype: str
    top_k: int
    router: str
    projectors: str
    parameters: int
    shared_parameters: int
    active_parameters: int
    write_bytes: int
    read_bytes: int
    free_disk: int
    output: str
    notices: tuple[str, ...]


def describe_heterogeneous(plan: HeterogeneousPlan, output: Path | None) -> HeterogeneousReport:
    """Describe a plan."""
    target, recipe = output_folder(plan, output), plan.loaded.recipe
    experts = tuple(map(_expert, plan.experts))
    total = sum(prod(tensor.shape) for tensor in plan.tensors)
    shared = sum(prod(tensor.shape) for tensor in plan.tensors if tensor.name in (EMBED, HEAD, HEAD_BIAS))
    bodies = sorted((expert.parameters for expert in experts), reverse=True)
    beside = total - shared - sum(bodies)
    spec = recipe.projectors
    return HeterogeneousReport(
        experts=experts,
        tokens=plan.n_tokens,
        tokenizer=recipe.tokenizer_of,
        width=plan.width,
        tied=plan.is_tied,
        dtype=plan.dtype,
        top_k=recipe.top_k,
        router=plan.router_init,
        projectors=f"{spec.init}, {spec.depth} layer{'s' if spec.depth > 1 else ''}",
        parameters=total,
        shared_parameters=shared,
        active_parameters=shared + sum(bodies[: recipe.top_k]) + beside * recipe.top_k // len(experts),
        write_bytes=plan.n_bytes,
        read_bytes=sum(_read_bytes(expert) for expert in plan.experts),
        free_disk=free_bytes(target),
        output=str(target),
        notices=plan.notices,
    )


def _expert(expert: PlannedExpert) -> ExpertReport:
    return ExpertReport(
        name=expert.name,
        architecture=str(expert.source.config.get("model_type")),
        width=expert.body.width,
        parameters=sum(expert.info(name).size for name in expert.body.tensors.values()),
        tokens_known=int((expert.rows >= 0).sum()),
        download_bytes=sum(file.n_bytes for file in far_files(expert.source.tensors, expert.source.repo)),
    )


def _read_bytes(expert: PlannedExpert) -> int:
    names = {expert.body.embedding, expert.body.head, *expert.body.tensors.values()}
    return sum(expert.info(name).n_bytes for name in names)

"""Models of this project in lm-evaluation-harness, and its tasks on local files. Needs the extra `eval`.

A bundle is routed on the context of a request alone: all choices of a question are answered by one mixture. Text
without a context, as in perplexity tasks, is left to the dense expert.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from mediator_cli.errors import CheckpointError, Problem, did_you_mean
from mediator_cli.evaluate.forward import make_job
from mediator_cli.evaluate.layout import Query
from mediator_cli.evaluate.models import ORACLE, load_candidate
from mediator_cli.evaluate.routed import score_by_prompt
from mediator_cli.runtime.model import RoutedModel

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from contextlib import AbstractContextManager

    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mediator_cli.evaluate.models import Candidate

    Request = tuple[tuple[str, str] | None, list[int], list[int]]

TASK_FOLDER = Path(__file__).parent / "harness_tasks"
_BATCH = 16


class HarnessModel(HFLM):  # type: ignore[misc]
    """A loaded model for the harness; `mixture` fixes what a bundle answers with, None = its router decides."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, mixture: str | None = None) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=_BATCH)
        self.mixture = mixture

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Score continuations: requests of (context, continuation) as text and as tokens."""
        queries = [self._query(context, continuation) for _, context, continuation in requests]
        answers: dict[int, tuple[float, bool]] = {}
        is_bare = [text is None or not text[0] for text, _, _ in requests]
        for bare in (True, False):
            chosen = [index for index, state in enumerate(is_bare) if state == bare]
            mixture = "dense" if bare and self._routes() else self.mixture
            answers |= zip(chosen, self._score([queries[index] for index in chosen], mixture), strict=True)
        for index, (text, _, _) in enumerate(requests):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answers[index])
        return [answers[index] for index in range(len(requests))]

    def _query(self, context: list[int], continuation: list[int]) -> Query:
        """Cut what is too long from the left, as the harness does."""
        kept = [*context, *continuation][-(self.max_length + 1) :]
        return Query(tuple(kept[: -len(continuation)]), tuple(continuation), ends=False)

    def _routes(self) -> bool:
        return isinstance(self.model, RoutedModel) and self.mixture is None

    def _score(self, queries: list[Query], mixture: str | None) -> list[tuple[float, bool]]:
        prompts = {prompt: at for at, prompt in enumerate(dict.fromkeys(query.prompt for query in queries))}
        owners = [prompts[query.prompt] for query in queries]
        found = dict(score_by_prompt(make_job(self.model, queries, ()), owners, mixture))
        return [(found[index].log_prob, found[index].greedy) for index in range(len(queries))]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate as the harness does; a bundle's own `generate` routes each prompt."""
        with self._fixed():
            return super().generate_until(requests, disable_tqdm)  # type: ignore[no-any-return]

    def _fixed(self) -> AbstractContextManager[None]:
        is_fixed = isinstance(self.model, RoutedModel) and self.mixture is not None
        return self.model.mixing(self.mixture) if is_fixed else nullcontext()


def harness_results(
    candidate: Candidate, names: Sequence[str], files: Sequence[Path] = (), limit: int | None = None
) -> dict[str, dict[str, Any]]:
    """Load a model and run tasks of the harness; raise CheckpointError for what the harness cannot ask."""
    return run_harness(HarnessModel(*load_for_harness(candidate)), names, files, limit)


def load_for_harness(candidate: Candidate) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str | None]:
    """Load a model, its tokenizer and what fixes its mixture; raise CheckpointError for what cannot be asked."""
    if candidate.part == ORACLE:
        hint = "name an expert, or the bundle alone"
        raise CheckpointError(Problem(candidate.name, "the harness does not tell a model which task it asks", hint))
    return (*load_candidate(candidate), candidate.mixture(""))


def run_harness(
    model: HarnessModel, names: Sequence[str], files: Iterable[Path] = (), limit: int | None = None
) -> dict[str, dict[str, Any]]:
    """Run tasks of the harness by name and give its results by task; `mediator_*` tasks run on each of the files.

    Raises CheckpointError for names that the harness does not know.
    """
    local = {file.stem for file in TASK_FOLDER.glob("*.yaml")}
    # Reading the harness's own list of tasks takes ten seconds.
    manager = TaskManager(include_defaults=not all(name.startswith("mediator_") for name in names))
    tasks: list[str | dict[str, Any]] = []
    for name in names:
        if name in local:
            tasks += _local_tasks(name, files)
        elif name in manager.all_tasks:
            tasks.append(name)
        else:
            raise CheckpointError(
                Problem("--harness", f"no task '{name}'", _suggest(name, [*local, *manager.all_tasks]))
            )
    found = simple_evaluate(
        model=model, tasks=tasks, task_manager=manager, limit=limit, log_samples=False, bootstrap_iters=0,
        apply_chat_template=bool(model.tokenizer.chat_template), verbosity="ERROR",
    )  # fmt: skip
    return {name: dict(result) for name, result in found["results"].items()}


def _suggest(name: str, known: Sequence[str]) -> str:
    hint = did_you_mean(name, known)
    return hint if hint.startswith("did") else "`lm_eval ls tasks` lists those of the harness"


def _local_tasks(name: str, files: Iterable[Path]) -> list[dict[str, Any]]:
    """Fill a task of ours with local files, one task each."""
    text = (TASK_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    kind = name.removeprefix("mediator_")
    tasks = []
    for file in files:
        config: dict[str, Any] = yaml.safe_load(text)
        config["task"] = f"{file.name.split('.')[0]}_{kind}"
        config["dataset_kwargs"] = {"data_files": {"test": str(file.absolute())}}
        tasks.append(config)
    if not tasks:
        raise CheckpointError(Problem("--harness", f"{name} has no rows", "give files of rows: --tasks FILE"))
    return tasks

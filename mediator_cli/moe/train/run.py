"""Train a Mixture of Experts and write the folder anew: everything wrong is told before the first step."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from mediator_cli.bundle.card import CARD, with_block
from mediator_cli.bundle.retouch import check_new, retouch
from mediator_cli.checkpoint.header import identity
from mediator_cli.errors import MediatorError, OutputError, Problem
from mediator_cli.moe.train.lines import line_tokens
from mediator_cli.moe.train.measure import Measured, measure
from mediator_cli.moe.train.model import open_source, open_student
from mediator_cli.moe.train.report import REPORT, TaskRows, TrainReport, as_json, card, note
from mediator_cli.moe.train.rows import Encoder, digest, end_token, fitting, schedule, split
from mediator_cli.moe.train.select import trainable
from mediator_cli.moe.train.settings import TrainSettings, check_settings
from mediator_cli.moe.train.state import Progress, check_same, load_state, read_progress, state_file
from mediator_cli.moe.train.trainer import Course, NotFinite, make_optimizer, run_steps, unheard
from mediator_cli.runtime.prompts import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from mediator_cli.moe.train.model import Source, Student
    from mediator_cli.moe.train.rows import Example, Row, Tasks
    from mediator_cli.moe.train.trainer import Hear

Mode = Literal["new", "resume", "overwrite"]
"""What becomes of an interrupted training into the same folder: it is in the way, goes on, or is thrown away."""


@dataclass(frozen=True)
class _Work:
    """All that is known before the model is loaded."""

    source: Source
    names: tuple[str, ...]
    settings: TrainSettings
    given: Mapping[str, Sequence[Row]]
    steps: Sequence[Sequence[Example]]
    training: Tasks
    held: Tasks
    notices: tuple[str, ...]
    key: Mapping[str, Any]


def train(
    folder: Path,
    rows: Mapping[str, Sequence[Row]],
    target: Path,
    settings: TrainSettings | None = None,
    *,
    held_out: Mapping[str, Sequence[Row]] | None = None,
    mode: Mode = "new",
    hear: Hear = unheard,
) -> TrainReport:
    """Train a Mixture of Experts on rows, by task, and write it to `target`, which may be the folder itself.

    `held_out` are rows to measure on, by task; some of `rows` where none are given. A training that was interrupted,
    however it was, goes on with mode `resume` and gives the same bytes. Raises MediatorError for all that is wrong,
    before the first step or at one whose loss is not finite; the folder is then as it was.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise MediatorError(Problem("", "training needs accelerate", "pip install 'mediator-merge[train]'"))
    settings = settings or TrainSettings()
    file = state_file(target)
    done = _check_place(folder, target, file, mode)
    work = _prepare(folder, rows, held_out or {}, settings)
    if done is not None:
        check_same(file, done, work.key)
    else:
        file.unlink(missing_ok=True)
    longest = max(line_tokens([row]) for tasks in (work.training, work.held) for task in tasks.values() for row in task)
    student = open_student(work.source, work.names, settings, max(longest, settings.width))
    with _told_what_is_kept(file, settings.steps):
        report = _run(work, student, file, done, hear)
        _publish(folder, target, student, report)
    file.unlink(missing_ok=True)
    return report


def _run(work: _Work, student: Student, file: Path, done: Progress | None, hear: Hear) -> TrainReport:
    settings, optimizer = work.settings, make_optimizer(student, work.settings)
    if done is None:
        before = measure(student, work.held, settings, "measuring", hear)
        done = Progress(0, (), work.key, {task: asdict(found) for task, found in before.items()})
    else:
        load_state(file, student.parameters, optimizer)
    try:
        done = run_steps(Course(student, work.steps, settings, file, done, hear), optimizer)
    except NotFinite:
        # The same steps would end in the same place again.
        file.unlink(missing_ok=True)
        raise
    return _report(work, student, done, measure(student, work.held, settings, "measuring again", hear))


@contextmanager
def _told_what_is_kept(file: Path, steps: int) -> Iterator[None]:
    """Note on whatever ends a training early what it goes on from; the command line tells it."""
    try:
        yield
    except BaseException as error:
        if file.is_file():
            error.add_note(f"kept: {read_progress(file).step} of {steps} steps are kept")
        raise


def _check_place(folder: Path, target: Path, file: Path, mode: Mode) -> Progress | None:
    """Look at what stands at the output and beside it; gives how far an interrupted training is that goes on."""
    if target.resolve() != folder.resolve():
        check_new(folder, target)
    if mode == "resume":
        if not file.is_file():
            message = "no interrupted training to go on with"
            raise OutputError(Problem(str(target), message, "leave --resume out"))
        return read_progress(file)
    if mode == "new" and file.is_file():
        message = "an interrupted training into this folder can go on"
        raise OutputError(Problem(str(target), message, "give --resume, or --overwrite to throw its work away"))
    return None


def _prepare(
    folder: Path,
    rows: Mapping[str, Sequence[Row]],
    held_out: Mapping[str, Sequence[Row]],
    settings: TrainSettings,
) -> _Work:
    _check_tasks(rows, held_out)
    check_settings(settings, rows.keys())
    source = open_source(folder)
    names = trainable(str(folder), source.config, list(source.places), settings.what)
    tokenizer = load_tokenizer(folder)
    encoder = Encoder(tokenizer, end_token(folder, tokenizer), settings.loss_on)
    length = min(settings.length, _context(source.config) or settings.length)
    training, notices = fitting({task: encoder.encode(task, some) for task, some in rows.items()}, length)
    if held_out:
        held, more = fitting({task: encoder.encode(task, some) for task, some in held_out.items()}, length)
        notices += more
    else:
        training, held = split(training, settings.held_out, settings.seed)
    steps = schedule(training, settings)
    key = {
        "files": [[file.name, *identity(file)] for file in sorted({info.file for info in source.places.values()})],
        "rows": {task: digest(some) for task, some in rows.items()},
        "held_out rows": {task: digest(some) for task, some in held_out.items()},
        **{name: value for name, value in asdict(settings).items() if name != "save_seconds"},
    }
    return _Work(source, names, settings, rows, steps, training, held, tuple(notices), json.loads(json.dumps(key)))


def _context(config: Mapping[str, Any]) -> int | None:
    found = config.get("max_position_embeddings")
    return found if isinstance(found, int) else None


def _check_tasks(rows: Mapping[str, Sequence[Row]], held_out: Mapping[str, Sequence[Row]]) -> None:
    if not rows:
        raise MediatorError(Problem("--rows", "there is nothing to train on", "give --rows TASK=FILE"))
    problems = [Problem(task, "has no rows", "give some") for task, some in {**held_out, **rows}.items() if not some]
    if problems:
        raise MediatorError(problems)


def _report(work: _Work, student: Student, done: Progress, after: Mapping[str, Measured]) -> TrainReport:
    drawn = Counter(row.task for step in work.steps for row in step)
    return TrainReport(
        settings=work.settings,
        learning_rate=work.settings.peak,
        n_parameters=sum(parameter.numel() for parameter in student.model.parameters()),
        n_trained=student.n_trained,
        n_tensors=len(work.names),
        tasks={task: TaskRows(len(work.training[task]), drawn[task], digest(work.given[task])) for task in work.given},
        losses=done.losses,
        before={task: Measured(**found) for task, found in done.before.items()},
        after=after,
        tokens=done.tokens,
        seconds=round(done.seconds, 1),
        notices=work.notices,
    )


def _publish(folder: Path, target: Path, student: Student, report: TrainReport) -> None:
    file = folder / CARD
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    # What was done stands in the folder, and how long it took on some machine does not: the same gives the same bytes.
    same = as_json(replace(report, seconds=0.0))
    del same["seconds"]
    files = {
        CARD: with_block(text, "training", card(report)).encode(),
        REPORT: (json.dumps(same, indent=1, ensure_ascii=False) + "\n").encode(),
    }
    retouch(folder, target, student.trained, files=files, note=note(report))

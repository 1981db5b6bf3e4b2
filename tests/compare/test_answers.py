"""How far answers are apart: against each expert by itself, row by row, and in any number of parts."""

import numpy as np
import pytest
import torch
from conftest import write_adapter
from tiny_bundles import make_rows

from mediator_cli import Settings, load_recipe, make_plan
from mediator_cli.compare.answers import compare_answers
from mediator_cli.errors import CheckpointError
from mediator_cli.evaluate.models import find_candidates, load_candidate
from mediator_cli.evaluate.tasks import Row, Task
from mediator_cli.runtime.tokens import answer_tokens, prompt_tokens

TASKS = (Task("a", tuple(make_rows(3, 1))), Task("b", tuple(make_rows(2, 2))))


@pytest.fixture
def plan(shop):
    write_adapter(shop.folder / "other", 4)
    names = ("a", "lora", "other")
    recipe = shop.recipe(experts=[{"name": n, "model": f"./{n}"} for n in names])
    return make_plan(load_recipe(recipe))


def alone(folder, name, rows):
    """Give the probabilities of an expert at all compared positions, in float64 [positions, vocabulary]."""
    (found,) = find_candidates([str(folder / name)], ["a"], folder / "base")
    model, tokenizer = load_candidate(found)
    said = []
    for row in rows:
        (prompt,) = prompt_tokens(tokenizer, [row.prompt])
        (answer,) = answer_tokens(tokenizer, [prompt], [row.answer])
        with torch.no_grad():
            logits = model.float()(torch.tensor([[*prompt.ids, *answer]])).logits[0]
        said.append(torch.softmax(logits[len(prompt.ids) - 1 :].double(), -1))
    return torch.cat(said).numpy()


def divergence(p, q):
    mixed = (p + q) / 2
    return float((p * np.log(p / mixed) + q * np.log(q / mixed)).sum(1).mean() / 2)


def test_distances_are_those_of_each_expert_by_itself(plan, shop):
    rows = [TASKS[0].rows[0], TASKS[1].rows[0], TASKS[0].rows[1], TASKS[1].rows[1], TASKS[0].rows[2]]
    found = compare_answers(plan, TASKS, Settings(workers=1))
    said = [alone(shop.folder, name, rows) for name in ("a", "lora", "other")]
    assert found.n_positions == len(said[0])
    for i in range(3):
        for j in range(3):
            # An expert by itself is rounded to the base's bfloat16.
            assert found.distances[i, j] == pytest.approx(divergence(said[i], said[j]), rel=0.02, abs=1e-5)


def test_little_memory_takes_more_parts_and_changes_nothing(plan):
    totals = []
    found = []
    for memory in (1 << 30, 14_000):
        seen = {}
        run = Settings(
            workers=1, memory=memory, progress=lambda stage, done, total, seen=seen: seen.update({stage: total})
        )
        found.append(compare_answers(plan, (Task("a", tuple(make_rows(30, 1))),), run))
        totals.append(seen["answers"])
    assert totals[1] >= 2 * totals[0]
    np.testing.assert_allclose(found[1].distances, found[0].distances, rtol=1e-4, atol=1e-7)


def test_positions_are_no_more_than_asked(plan):
    few = compare_answers(plan, TASKS, Settings(workers=1), 3)
    assert few.n_positions == 3
    assert (np.diag(few.distances) == 0).all()


def test_rows_that_are_too_long_are_refused(plan):
    tasks = (Task("a", (Row(prompt="good " * 5000, answer="good"),)),)
    with pytest.raises(CheckpointError, match="the model reads"):
        compare_answers(plan, tasks, Settings(workers=1))

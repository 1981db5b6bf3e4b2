"""`mediator evaluate` from files to table, JSON, Markdown and model card."""

import json

import pytest
import torch
from tiny_bundles import make_rows, routed, write_rows
from tiny_tokens import word_tokenizer

from mediator_cli.evaluate import memory
from mediator_cli.evaluate.score import ScoreSettings, score_rows
from mediator_cli.runtime.open import load_dense, open_bundle


@pytest.fixture
def shop(shop):
    for name, seed in (("a", 1), ("b", 2)):
        write_rows(shop.folder / f"{name}.test.jsonl", make_rows(12, seed))
    return shop


def test_results_are_those_of_the_rows(shop, mediator):
    out = routed(shop)
    names = ("base", "out", "out::oracle", "out::dense")
    run = mediator("evaluate", *names, "--tasks", "a.test.jsonl", "b.test.jsonl", "--limit", "10", "--json")
    assert run.code == 0, run.err
    report = json.loads(run.out)
    models = {"base": load_dense(shop.folder / "base"), "out": open_bundle(out)}
    for name, found in zip(names, report["models"], strict=True):
        assert (found["name"], found["n_bytes"] > 0) == (name, True)
        folder, _, part = name.partition("::")
        for task, seed in zip(found["tasks"], (1, 2), strict=True):
            mixture = {"oracle": task["task"], "dense": "dense"}.get(part)
            scores = score_rows(
                models[folder], word_tokenizer(), make_rows(12, seed)[:10], ScoreSettings(mixture=mixture)
            )
            assert task["n"] == 10
            assert task["accuracy"] == pytest.approx(sum(s.exact for s in scores) / 10)
            # In bfloat16, by matrices or by products as earlier batches of the process had it.
            assert task["log_prob"] == pytest.approx(sum(s.log_prob for s in scores) / 10, rel=2e-2)
    assert [(d["model"], d["task"]) for d in report["differences"]] == [
        (name, task) for name in names[1:] for task in ("a", "b", None)
    ]


def test_markdown_and_card_hold_the_table(shop, mediator):
    out = routed(shop)
    before = (out / "README.md").read_text()
    words = ("evaluate", "out", "out::a", "--tasks", "a.test.jsonl", "--markdown", "r.md", "--card", "--quiet")
    assert mediator(*words).code == 0
    table = (shop.folder / "r.md").read_text()
    assert table.splitlines()[2].startswith("| out | ")
    card = (out / "README.md").read_text()
    assert card.startswith(before.rstrip())
    assert f"<!-- begin results -->\n## Results\n\n{table.strip()}\n<!-- end results -->" in card
    assert mediator("verify", "out").code == 0
    assert mediator(*words).code == 0
    assert (out / "README.md").read_text().count("begin results") == 1
    assert mediator("verify", "out").code == 0


def test_the_table_names_models_and_tasks(shop, mediator):
    run = mediator("evaluate", "a", "b", "--tasks", "a.test.jsonl", "--limit", "3")
    lines = run.out.splitlines()
    assert lines[1].split() == ["model", "a", "mean", "disk", "memory", "s/answer"]
    assert [line.split()[0] for line in lines[3:5]] == ["a", "b"]
    assert any(line.startswith("b against a on a: ") for line in lines)


@pytest.mark.parametrize(
    ("words", "place", "message"),
    [
        (("base",), "--tasks", "there is nothing to answer"),
        (("base", "--tasks", "none.jsonl"), "none.jsonl", "cannot read"),
        (("gone", "--tasks", "a.test.jsonl"), "", "no such folder"),
        (("base", "--tasks", "a.test.jsonl", "--markdown", "no/r.md"), "no/r.md", "cannot write"),
    ],
)
def test_mistakes_are_named(shop, mediator, words, place, message):
    run = mediator("evaluate", *words)
    assert run.code == 2
    assert place in run.err
    assert message in run.err


def test_a_row_too_long_is_named_with_model_and_task(shop, mediator):
    config = shop.folder / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 6}))
    run = mediator("evaluate", "base", "--tasks", "a.test.jsonl")
    assert run.code == 2
    assert "error: base on a, row " in run.err


def test_memory_counts_what_a_model_takes():
    held = memory.resident_bytes()
    memory.start_peak()
    if held is None:
        pytest.skip("this system does not tell")
    block = torch.ones(64 << 20, dtype=torch.uint8)
    del block
    assert (60 << 20) < memory.peak_bytes() - held < (200 << 20)
    assert memory.resident_bytes() - held < (30 << 20)

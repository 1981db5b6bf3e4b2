"""Several merges in one file: each in its turn, by name; or a refusal with its line."""

import json

import pytest
import torch
from safetensors.torch import load_file

from mediator_cli.errors import MediatorError
from mediator_cli.recipe.documents import read_steps

LAST = """\
merge_method: linear
models:
  - {model: half, parameters: {weight: 1}}
  - {model: ./b, parameters: {weight: 3}}
dtype: float32
"""
HALF = """\
name: half
merge_method: task_arithmetic
base_model: ./base
models: [{model: ./a, parameters: {weight: 0.5}}]
dtype: float32
"""


def test_later_merges_find_what_earlier_ones_wrote(workshop, mediator):
    (workshop.folder / "two.yaml").write_text(f"{LAST}---\n{HALF}")
    run = mediator("merge", "two.yaml", "-o", "out")
    assert run.code == 0, run.err
    assert f"merging half into {workshop.folder / 'out.steps' / 'half'}" in run.err
    found = load_file(workshop.folder / "out" / "model.safetensors")
    for name, base in workshop.base.items():
        a, b = (workshop.experts[each][name].float() for each in "ab")
        half = base.float() + 0.5 * (a - base.float())
        torch.testing.assert_close(found[name], (half + 3 * b) / 4, rtol=1e-5, atol=1e-6)
    card = (workshop.folder / "out.steps" / "half" / "README.md").read_text()
    assert HALF.strip() in card
    assert "models:\n  - {model: half" not in card


def test_resume_merges_only_what_is_not_finished(workshop, mediator):
    path = workshop.folder / "two.yaml"
    path.write_text(f"{HALF}---\n{LAST}")
    assert mediator("merge", "two.yaml", "-o", "out").code == 0
    manifest = workshop.folder / "out.steps" / "half" / "routing_manifest.json"
    before = manifest.stat().st_mtime_ns
    again = mediator("merge", "two.yaml", "-o", "out", "--overwrite", "--resume")
    assert again.code == 0, again.err
    assert manifest.stat().st_mtime_ns == before
    path.write_text(f"{HALF.replace('0.5', '0.25')}---\n{LAST}")
    assert mediator("merge", "two.yaml", "-o", "out", "--overwrite", "--resume").code == 0
    assert json.loads(manifest.read_text())["recipe"]["text"] == HALF.replace("0.5", "0.25")
    assert mediator("merge", "two.yaml", "-o", "out").code == 2


def test_a_fault_in_a_later_merge_is_told_before_the_first_is_carried_out(workshop, mediator):
    last = LAST.replace("linear", "linaer").replace("dtype: float32", "dtype: int64")
    (workshop.folder / "two.yaml").write_text(f"{HALF}---\n{last}")
    run = mediator("merge", "two.yaml", "-o", "out")
    assert run.code == 2
    assert "mergekit's method 'linaer' has no counterpart here" in run.err
    assert "did you mean 'linear'?" in run.err
    assert not (workshop.folder / "out.steps").exists()


def steps(tmp_path, *documents):
    path = tmp_path / "several.yaml"
    path.write_text("---\n".join(documents))
    return read_steps(path)


def test_merges_come_behind_those_that_they_use(tmp_path):
    other = LAST.replace("half", "other").replace("merge_method", "name: third\nmerge_method")
    found = steps(tmp_path, LAST.replace("./b", "third@main+./lora"), other, HALF, HALF.replace("half", "other"))
    assert [step.name for step in found] == ["half", "other", "third", None]
    assert [step.uses for step in found] == [(), (), ("other",), ("half", "third")]
    (alone,) = steps(tmp_path, LAST)
    assert alone.uses == ()


def test_names_become_folders_where_models_are_named_and_nowhere_else(tmp_path):
    text = """\
merge_method: linear
base_model: half
models: [{model: {model: {path: half}}, parameters: {weight: 1}}, {model: ./half, parameters: {weight: 1}}]
tokenizer: {source: half}
chat_template: half {{ messages }}
"""
    step = steps(tmp_path, HALF, text)[-1]
    recipe = step.load({"half": tmp_path / "out.steps" / "half"}).recipe
    assert recipe.base == str(tmp_path / "out.steps" / "half")
    assert [expert.model for expert in recipe.experts] == [recipe.base, "./half"]
    assert (recipe.tokenizer, recipe.chat_template) == ("base", "half {{ messages }}")


@pytest.mark.parametrize(
    ("documents", "line", "message"),
    [
        ([LAST, LAST], 7, "there is another merge without a name, in line 1"),
        ([HALF, HALF], 7, "the name 'half' is taken, in line 1"),
        ([HALF, "version: 1\nbase: ./base\n"], 7, "several documents in a file are for mergekit configurations"),
        ([HALF.replace("half", "a/b"), LAST], 1, "'a/b' is no name of a folder"),
        ([LAST.replace("merge_method", "name: half\nmerge_method", 1), ""], 1, "merges use each other: half"),
        ([HALF, "- a\n"], 7, "a recipe is a mapping of fields"),
    ],
)
def test_what_is_wrong_with_several_documents_is_told_with_its_line(tmp_path, documents, line, message):
    if documents[-1] == "":
        documents = [documents[0], LAST]
    with pytest.raises(MediatorError) as raised:
        steps(tmp_path, *documents)
    found = [(p.place.partition("several.yaml:")[2].split()[0], p.message) for p in raised.value.problems]
    assert [at for at, text in found if message in text] == [str(line)]


def test_other_commands_take_a_file_with_one_merge(workshop, mediator):
    (workshop.folder / "two.yaml").write_text(f"{HALF}---\n{LAST}")
    run = mediator("validate", "two.yaml")
    assert run.code == 2
    assert "two.yaml:7: the file holds 2 merges" in run.err
    shared = mediator("merge", "two.yaml", "-o", "out", "--executor", "ray")
    assert shared.code == 2
    assert "carried out by one process" in shared.err
    far = mediator("merge", "two.yaml", "-o", "s3://bucket/out")
    assert far.code == 2
    assert "needs a folder" in far.err
    assert not (workshop.folder / "out.steps").exists()


def test_flow_style_on_the_last_line_is_kept_whole(tmp_path):
    *_, last = steps(tmp_path, HALF, "{merge_method: linear, models: [{model: half}]}\n")
    assert last.document.text == "{merge_method: linear, models: [{model: half}]}\n"

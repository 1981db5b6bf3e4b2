"""`mediator init`: what it writes validates, merges like a recipe by hand, and says what is true."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path, PurePosixPath

import pytest
import yaml
from conftest import ROUTE_ALL, all_files, edit_json, with_prompts, write_adapter
from hypothesis import given
from hypothesis import strategies as st
from loopback_hub import joined
from tiny_architectures import write_family
from tiny_tokens import WORDS
from tiny_vocabularies import Tokens, write_source

from mediator_cli import load_recipe
from mediator_cli.bundle.manifest import read_manifest
from mediator_cli.errors import OutputError
from mediator_cli.pipeline.draft.choose import Asked, check_target, first_choices
from mediator_cli.pipeline.draft.names import expert_names
from mediator_cli.pipeline.draft.text import comment, scalar
from mediator_cli.recipe.load import parse_partly
from mediator_cli.recipe.names import RESERVED_NAMES
from mediator_cli.recipe.sizes import human_bytes


@pytest.fixture
def drafted(mediator, workshop):
    """Draft a recipe and give its text; nothing may be wrong with it."""

    def run(*words, output="recipe.yaml"):
        done = mediator("init", *words, "-o", output)
        assert done.code == 0, done.err
        checked = mediator("validate", output, "--json")
        assert checked.code == 0, checked.out
        return (workshop.folder / output).read_text()

    return run


def notices(mediator, recipe="recipe.yaml"):
    return json.loads(mediator("validate", recipe, "--json").out)["notices"]


def test_a_draft_validates_without_notices_and_is_short(drafted, mediator):
    text = drafted("base", "a", "b")
    assert notices(mediator) == []
    assert len(text.splitlines()) <= 50
    assert max(len(line) for line in text.splitlines()) <= 120


def test_a_draft_merges_like_the_recipe_written_by_hand(drafted, mediator, workshop):
    drafted("base", "a", "b", "lora")
    experts = [{"name": name, "model": f"./{name}"} for name in ("a", "b", "lora")]
    ours = read_manifest(workshop.merge("by-hand", experts=experts, assign={"rule": "all", "candidates": "layers"}))
    run = mediator("merge", "recipe.yaml", "-o", "drafted", "--json")
    assert run.code == 0, run.err
    theirs = read_manifest(workshop.folder / "drafted")
    assert theirs.tensors == ours.tensors
    assert theirs.experts == ours.experts
    assert json.loads(run.out)["assignment"] == ours.assignment
    assert list(ours.assignment.values()).count("route") == 3


def test_the_output_is_named_beside_the_recipe(drafted, mediator, workshop):
    drafted("base", "a", "b")
    assert mediator("merge", "recipe.yaml", "--quiet").code == 0
    assert (workshop.folder / "bundle" / "routing_manifest.json").is_file()


def test_the_numbers_of_the_comments_are_those_of_the_plan(drafted, mediator):
    text = drafted("base", "a", "b", "lora")
    plan = json.loads(mediator("plan", "recipe.yaml", "--json", "--no-calibrate").out)
    sparse = plan["sparse_bytes"][1]
    sizes = (plan["dense_bytes"] + sparse, plan["dense_bytes"], sparse)
    assert "{} of disk for the bundle ({} dense, {} sparse experts)".format(*map(human_bytes, sizes)) in text
    read = human_bytes(sum(plan["read_bytes"].values()))
    assert f"{human_bytes(plan['peak_memory'])} of memory; reads {read} in all" in text
    prices = []
    for density, values in ((0.2, "sign"), (1.0, "bf16")):
        changes = ("--set", f"extract.density={density}", "--set", f"extract.values={values}")
        other = json.loads(mediator("plan", "recipe.yaml", "--json", "--no-calibrate", *changes).out)
        prices.append(f"{density:g} with {values} {human_bytes(other['sparse_bytes'][1])}")
    assert f"density {', '.join(prices)}" in text


def test_json_tells_what_was_found(mediator, workshop):
    (workshop.folder / "a" / "chat_template.jinja").write_text("other")
    run = mediator("init", "base", "a", "lora", "--json")
    found = json.loads(run.out)
    assert (found["base"]["model_type"], found["n_layers"], found["base"]["n_tokens"]) == ("llama", 3, 20)
    assert [(e["name"], e["kind"], e["rank"], e["dtype"]) for e in found["experts"]] == [
        ("a", "full", None, "BF16"),
        ("lora", "lora", 2, "F32"),
    ]
    n_bytes = sum(t.numel() * 2 for t in workshop.experts["a"].values())
    assert (found["experts"][0]["n_bytes"], found["experts"][0]["n_tensors"]) == (n_bytes, 29)
    assert [(d["setting"], list(d["others"])) for d in found["differences"]] == [("chat_template", ["a"])]
    assert found["missing_prompts"] == ["a", "lora"]
    text = (workshop.folder / "recipe.yaml").read_text()
    assert "differs: chat_template, base wins over a" in text
    assert "LoRA adapter of rank 2, 42 tensors" in text


@pytest.mark.parametrize(
    ("base", "sources", "names"),
    [
        ("Qwen2.5-7B", ["Qwen2.5-7B-math", "x/Qwen2.5-7B_code"], ["math", "code"]),
        ("q/Qwen2.5-7B-Instruct", ["q/Qwen2.5-Coder-7B-Instruct", "q/Qwen2.5-Math-7B-Instruct"], ["Coder", "Math"]),
        ("m/Llama-3.1-8B", ["n/Hermes-3-Llama-3.1-8B", "m/Llama-3.1-8B"], ["Hermes-3", "Llama-3-1-8B"]),
        ("base", ["maths/final", "code/final", "lora"], ["maths-final", "code-final", "lora"]),
        ("base", ["runs/maths/checkpoint-500"], ["maths-checkpoint-500"]),
        ("m-1", ["m-2"], ["m-2"]),
        ("m", ["a/same", "b/SAME", "same"], ["a-same", "b-SAME", "same"]),
        ("m", ["router", "x/Dense", "base"], ["router-2", "x-Dense", "base-2"]),
        ("m", ["日本語", "<script>alert(1)</script>", "-"], ["expert", "script", "expert-2"]),
        ("m", ["x" * 70, "x" * 71], ["x" * 64, f"{'x' * 60}-2"]),
    ],
)
def test_names_are_short_legal_and_unique(base, sources, names):
    assert list(expert_names(PurePosixPath(base), [PurePosixPath(source) for source in sources])) == names


FOLDERS = st.lists(st.text(st.characters(exclude_characters="\0/"), min_size=1, max_size=12), min_size=1, max_size=3)


@given(FOLDERS, st.lists(FOLDERS, min_size=1, max_size=5))
def test_names_of_any_folders_are_what_a_recipe_takes(base, sources):
    names = expert_names(PurePosixPath(*base), [PurePosixPath(*parts) for parts in sources])
    assert len({name.lower() for name in names}) == len(sources)
    assert all(re.fullmatch("[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name) for name in names)
    assert not {name.lower() for name in names} & set(RESERVED_NAMES)


@given(st.text(st.characters(codec="utf-8"), min_size=1))
def test_any_text_comes_back_from_the_recipe(text):
    experts = "experts: [{name: a, model: b}]"
    loaded = parse_partly(
        Path("r.yaml"), f"version: 1\nbase: {scalar(text)}\n{experts}\n# {comment(text)}\n{comment(text)}"
    )
    assert (loaded.recipe.base, loaded.problems) == (text, ())


def test_paths_start_at_the_recipes_folder(drafted, workshop):
    (workshop.folder / "recipes").mkdir()
    lora = workshop.folder / "lora"
    recipe = yaml.safe_load(drafted("base", "./a", lora, output="recipes/one.yaml"))
    assert [recipe["base"], *(e["model"] for e in recipe["experts"])] == ["../base", "../a", str(lora)]
    assert recipe["output"]["path"] == "./bundle"


def test_a_linked_folder_is_not_left_by_its_text(drafted, workshop):
    (workshop.folder / "deep" / "real").mkdir(parents=True)
    (workshop.folder / "link").symlink_to(workshop.folder / "deep" / "real")
    shutil.copytree(workshop.folder / "a", workshop.folder / "deep" / "c")
    recipe = yaml.safe_load(drafted("base", "link/../c", output="link/one.yaml"))
    assert recipe["base"] == "../../base"
    assert recipe["experts"] == [{"name": "c", "model": "../c"}]


def test_the_folder_itself_may_be_a_source(mediator, workshop, monkeypatch):
    monkeypatch.chdir(workshop.folder / "a")
    assert mediator("init", "../base", ".", "../b", "-o", "../r.yaml").code == 0
    recipe = load_recipe(workshop.folder / "r.yaml").recipe
    assert [(e.name, e.model) for e in recipe.experts] == [("a", "./a"), ("b", "./b")]


def test_what_others_wrote_into_names_and_configs_adds_no_field(drafted, mediator, workshop):
    odd = 'b"\n# \N{LINE SEPARATOR}output: {path: "/x"} é'
    shutil.copytree(workshop.folder / "b", workshop.folder / odd)
    for name in ("base", "a", odd):
        edit_json(workshop.folder / name / "config.json", model_type="llama", eos_token_id=2)
    (workshop.folder / "lora" / "adapter_config.json").write_text(
        json.dumps(json.loads((workshop.folder / "lora" / "adapter_config.json").read_text())
                   | {"base_model_name_or_path": "x\nseed: 7\n"})
    )  # fmt: skip
    recipe = yaml.safe_load(drafted("base", "a", odd, "lora"))
    assert set(recipe) == {"version", "base", "experts", "assign", "average", "extract", "tokenizer", "output"}
    assert recipe["experts"][1]["model"] == f"./{odd}"
    assert recipe["output"]["path"] == "./bundle"


def test_a_recipe_is_overwritten_only_when_told(refused, mediator, workshop):
    workshop.recipe()
    refused("recipe.yaml", "exists already", "--force", "init", "base", "a", "b")
    assert mediator("init", "base", "a", "b", "--force").code == 0
    assert "Drafted by `mediator init`" in (workshop.folder / "recipe.yaml").read_text()


@pytest.mark.parametrize(("output", "message"), [("no/r.yaml", "no such folder"), ("base", "is a folder")])
def test_a_recipe_that_cannot_be_written_is_refused_before_looking(refused, output, message):
    refused(output, message, "-o", "init", "nothing", "here", "-o", output)


def test_a_target_is_checked_without_a_trace(workshop):
    before = all_files(workshop.folder)
    check_target(workshop.folder / "new.yaml", force=False)
    with pytest.raises(OutputError, match="no such folder"):
        check_target(workshop.folder / "x" / "new.yaml", force=True)
    assert all_files(workshop.folder) == before


def test_all_problems_of_all_sources_are_told_at_once(mediator, workshop):
    (workshop.folder / "a" / "config.json").write_text("{")
    edit_json(workshop.folder / "lora" / "adapter_config.json", peft_type="IA3")
    (workshop.folder / "bad.jsonl").write_text("{}\n")
    before = all_files(workshop.folder)
    run = mediator("init", "base", "./gone", "a", "lora", "b", "--prompts", "b=bad.jsonl")
    assert run.code == 2
    assert run.err.count("error: ") == 4
    assert "recipe.yaml" not in run.err
    for told in ("./gone: no such folder", "config.json: broken JSON", "IA3", "bad.jsonl:1: has no `prompt`"):
        assert told in run.err
    assert "name a repository of the Hub" in run.err
    assert all_files(workshop.folder) == before


def test_a_wrong_base_is_told_with_the_experts_problems(mediator):
    run = mediator("init", "./gone", "./lost", "a")
    assert (run.code, run.err.count("no such folder")) == (2, 2)


@pytest.mark.parametrize(
    ("prompts", "message", "hint"),
    [
        ("c=a.jsonl", "no expert is called 'c'", "known: a, b"),
        ("a.jsonl", "is not NAME=FILE", "--prompts a=train.jsonl"),
        ("a=", "is not NAME=FILE", "--prompts a=train.jsonl"),
    ],
)
def test_prompts_that_name_nothing_are_refused(refused, prompts, message, hint):
    refused(f"--prompts {prompts}", message, hint, "init", "base", "a", "b", "--prompts", prompts)


def test_prompts_given_twice_are_refused(refused):
    words = ("--prompts", "a=x.jsonl", "--prompts", "a=y.jsonl")
    refused("--prompts a=y.jsonl", "a has prompts already", "one file", "init", "base", "a", "b", *words)


def test_with_prompts_of_all_experts_a_router_is_fitted(shop, drafted, mediator):
    (shop.folder / "sub").mkdir()
    text = drafted("base", "a", "b", "--prompts", "a=a.jsonl", "--prompts", "b=./b.jsonl", output="sub/r.yaml")
    assert [e["prompts"] for e in yaml.safe_load(text)["experts"]] == ["../a.jsonl", "../b.jsonl"]
    assert "# prompts:" not in text
    assert notices(mediator, "sub/r.yaml") == []
    assert mediator("merge", "sub/r.yaml", "-o", "out", "--quiet").code == 0
    ours = read_manifest(shop.merge("by-hand", experts=with_prompts(), **ROUTE_ALL))
    assert read_manifest(shop.folder / "out").router.experts == ours.router.experts == ("a", "b")


def test_missing_prompts_are_a_comment_that_can_be_made_a_field(drafted):
    text = drafted("base", "a", "b")
    assert '{"prompt": "How many are left?"}' in text
    opened = yaml.safe_load(text.replace("# prompts:", "prompts:"))
    assert [e["prompts"] for e in opened["experts"]] == ["a.train.jsonl", "b.train.jsonl"]


def test_added_tokens_make_the_tokenizer_a_union(mediator, workshop):
    for name, added in (("own", ()), ("plus", ("<call>", "</call>")), ("same", ())):
        write_source(workshop.folder / name, Tokens(added=added))
    assert mediator("init", "own", "plus", "same").code == 0
    text = (workshop.folder / "recipe.yaml").read_text()
    assert yaml.safe_load(text)["tokenizer"] == "union"
    assert "<call>" in text
    assert mediator("merge", "recipe.yaml", "--quiet").code == 0
    assert json.loads((workshop.folder / "bundle" / "config.json").read_text())["vocab_size"] == 22


@pytest.mark.parametrize("other", [Tokens(words=[*WORDS[:-2], WORDS[-1], WORDS[-2]]), Tokens(padding=4)])
def test_the_same_tokens_in_other_rows_need_no_union(mediator, workshop, other):
    write_source(workshop.folder / "own")
    write_source(workshop.folder / "moved", other)
    assert mediator("init", "own", "moved").code == 0
    assert yaml.safe_load((workshop.folder / "recipe.yaml").read_text())["tokenizer"] == "base"
    assert mediator("merge", "recipe.yaml", "--quiet").code == 0


def test_what_cannot_be_routed_becomes_a_plain_merge(mediator, workshop):
    write_family(workshop.folder / "bert", "bert")
    run = mediator("init", "bert/base", "bert/a", "bert/b", "--json")
    assert run.code == 0, run.err
    assert "causal language model" in json.loads(run.out)["why_none"]
    text = (workshop.folder / "recipe.yaml").read_text()
    assert yaml.safe_load(text)["assign"] == {"rule": "none"}
    assert "extract:" not in text
    assert "prompts" not in text
    assert notices(mediator) == []
    assert mediator("merge", "recipe.yaml", "--quiet").code == 0


def test_hub_ids_are_written_as_given_and_nothing_but_headers_is_fetched(
    mediator, workshop, monkeypatch, tmp_path_factory
):
    cache = tmp_path_factory.mktemp("hf") / "hub"
    with joined(monkeypatch, cache) as hub:
        for name in ("base", "a"):
            hub.add(f"org/{name}", workshop.folder / name)
        run = mediator("init", "org/base", "org/a@main", "lora")
        assert run.code == 0, run.err
        recipe = yaml.safe_load((workshop.folder / "recipe.yaml").read_text())
        assert [recipe["base"], *(e["model"] for e in recipe["experts"])] == ["org/base", "org/a@main", "./lora"]
        assert [e["name"] for e in recipe["experts"]] == ["a", "lora"]
        assert list(cache.glob("*/snapshots/*/model.safetensors")) == []
        before = hub.served.copy()
        assert mediator("init", "org/base", "org/a", "--offline", "-o", "two.yaml").code == 2
        assert hub.served == before
        gone = mediator("init", "org/base", "org/gone", "-o", "three.yaml")
        assert gone.code == 2
        assert "org/gone" in gone.err
    assert not (workshop.folder / "three.yaml").exists()


def test_a_folder_beside_the_recipe_is_not_taken_for_a_repository(refused, workshop):
    (workshop.folder / "sub" / "org" / "a").mkdir(parents=True)
    words = ("init", "base", "org/a", "-o", "sub/r.yaml")
    refused("org/a", "sub/org/a beside the recipe would be taken", "-o", *words)


def test_one_expert_is_enough(drafted, mediator):
    assert yaml.safe_load(drafted("base", "a"))["experts"] == [{"name": "a", "model": "./a"}]
    assert notices(mediator) == []


def test_choices_know_their_recipe(tmp_path):
    made = first_choices(Asked("org/base", ("org/x", "org/y"), tmp_path / "r.yaml"))
    assert [(e.name, e.model) for e in made.experts] == [("x", "org/x"), ("y", "org/y")]
    assert made.fields()["assign"] == {"rule": "all", "candidates": "layers"}


def test_the_rank_of_an_adapter_is_its_own(mediator, workshop):
    write_adapter(workshop.folder / "wide", 4, rank=5)
    found = json.loads(mediator("init", "base", "lora", "wide", "--json").out)
    assert [e["rank"] for e in found["experts"]] == [2, 5]


def test_a_folder_of_adapters_is_named_once(drafted, workshop):
    for seed, name in enumerate(("task10", "task2")):
        write_adapter(workshop.folder / "both" / name, seed)
    text = drafted("base", "both/", "lora")
    assert "  - from: ./both  # the first: LoRA adapter of rank 2" in text
    experts = load_recipe(workshop.folder / "recipe.yaml").recipe.experts
    assert [(e.name, e.model) for e in experts] == [
        ("task2", "./both/task2"), ("task10", "./both/task10"), ("lora", "./lora")
    ]  # fmt: skip
    (workshop.folder / "rows.jsonl").write_text('{"prompt": "a"}\n')
    text = drafted("base", "both", "--prompts", "task2=rows.jsonl", output="with.yaml")
    assert "  - name: task2" in text
    assert "- from:" not in text


def test_names_of_folders_that_cannot_be_are_made_anew(drafted, workshop):
    for seed, name in enumerate(("v1.2", "lora")):
        write_adapter(workshop.folder / "both" / name, seed)
    assert [e["name"] for e in yaml.safe_load(drafted("base", "both"))["experts"]] == ["both-lora", "v1-2"]

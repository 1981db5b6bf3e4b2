"""`mediator generate`, `mediator chat` and `mediator ablate`: what they say, where, and what they refuse."""

import io
import json
from types import SimpleNamespace

import pytest
from conftest import ROUTE_ALL, edit_json, with_prompts
from tiny_bundles import make_rows, write_rows
from tiny_tokens import word_tokenizer

from mediator_cli.cli.mixtures import mixture_text
from mediator_cli.compare import run as compare_run
from mediator_cli.runtime.generate import Conversation, Sampling, answer, chat_ids, reply
from mediator_cli.runtime.open import open_bundle

SUM, FILM = "two plus three", "dull film plot"
SHORT = ("--max-new-tokens", "5")
SAMPLING = Sampling(max_new_tokens=5)
PLAIN = [{"name": n, "model": f"./{n}"} for n in ("a", "b")]


def ids_of(*texts, raw=False):
    return [chat_ids(word_tokenizer(), [{"role": "user", "content": text}], raw=raw) for text in texts]


def said(folder, mixture, *texts, sampling=SAMPLING, raw=False):
    return answer(open_bundle(folder), word_tokenizer(), ids_of(*texts, raw=raw), mixture, sampling)


def test_answers_are_those_of_the_mixture_that_the_router_chose(routed, mediator):
    run = mediator("generate", "out", SUM, FILM, "--json", *SHORT)
    assert run.code == 0, run.err
    found = json.loads(run.out)["answers"]
    model = open_bundle(routed)
    routing = model.route(ids_of(SUM, FILM))
    assert [one["answer"] for one in found] == said(routed, routing.weights, SUM, FILM)
    assert [one["prompt"] for one in found] == [SUM, FILM]
    for at, one in enumerate(found):
        weights = dict(zip("ab", routing.weights[at].tolist(), strict=True))
        assert one["mixture"] == {name: weight for name, weight in weights.items() if weight}
        assert list(one["probabilities"].values()) == pytest.approx(routing.probabilities[at].tolist())
        assert one["uncertainty"] == pytest.approx(float(routing.entropy[at]))
    assert run.err == ""


@pytest.mark.parametrize(
    ("words", "mixture"),
    [
        (("--expert", "b"), {"b": 1.0}),
        (("--expert", "dense"), {}),
        (("--mixture", "a=0.25, b=0.5"), {"a": 0.25, "b": 0.5}),
        (("--mixture", "a=-1"), {"a": -1.0}),
    ],
)
def test_a_mixture_that_is_asked_for_answers(routed, mediator, words, mixture):
    (found,) = json.loads(mediator("generate", "out", SUM, "--json", *SHORT, *words).out)["answers"]
    assert found["answer"] == said(routed, mixture or "dense", SUM)[0]
    assert (found["mixture"], found["probabilities"], found["uncertainty"]) == (mixture, None, None)


def test_into_a_file_goes_the_answer_alone(routed, mediator):
    expected = said(routed, "b", FILM)[0]
    run = mediator("generate", "out", FILM, "--expert", "b", *SHORT)
    assert (run.out.strip(), run.err) == (expected.strip(), "b 1.00\n")
    assert "\x1b" not in run.out
    run = mediator("generate", "out", FILM, "--expert", "b", "--quiet", *SHORT)
    assert (run.out.strip(), run.err) == (expected.strip(), "")


def test_several_answers_get_a_line_each(routed, mediator):
    run = mediator("generate", "out", SUM, FILM, "--mixture", "a=0.5,b=0.5", *SHORT)
    assert [line.strip() for line in run.out.splitlines()] == [
        text.strip() for text in said(routed, {"a": 0.5, "b": 0.5}, SUM, FILM)
    ]
    assert run.err == "a 0.50 + b 0.50\n" * 2


def test_what_is_drawn_hangs_on_the_seed(routed, mediator):
    words = ("generate", "out", SUM, "--expert", "a", "-q", "--temperature", "3", "--max-new-tokens", "12")
    runs = [mediator(*words, "--seed", seed).out for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    drawn = Sampling(12, 3.0, seed=1)
    assert runs[0].strip() == said(routed, "a", SUM, sampling=drawn)[0].strip()


def test_raw_text_goes_without_the_template(routed, mediator):
    run = mediator("generate", "out", SUM, "--raw", "--expert", "a", "-q", *SHORT)
    assert ids_of(SUM, raw=True) == [[5, 7, 6]]
    assert run.out.strip() == said(routed, "a", SUM, raw=True)[0].strip()


def test_a_static_merge_answers_without_a_router(shop, mediator):
    folder = shop.merge("out", experts=with_prompts(), assign={"rule": "none"})
    run = mediator("generate", "out", SUM, *SHORT)
    assert (run.code, run.err) == (0, "dense expert alone\n")
    assert run.out.strip() == said(folder, "dense", SUM)[0].strip()


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize(
    ("words", "place", "message", "hint"),
    [
        (("--expert", "bb"), "--expert", "no expert 'bb'", "did you mean 'b'?"),
        (("--mixture", "a=1,z=1"), "--mixture", "no expert 'z'", "known: a, b"),
        (("--expert", "a", "--mixture", "a=1"), "--expert", "cannot be used with --mixture", "one of the two"),
        (("--mixture", "a"), "--mixture", "'a' is not NAME=WEIGHT", "maths=0.7"),
        (("--mixture", "a=0.5,"), "--mixture", "'' is not NAME=WEIGHT", "maths=0.7"),
        (("--mixture", "a=much"), "--mixture", "'a=much' is not NAME=WEIGHT", "maths=0.7"),
        (("--mixture", "a=nan"), "--mixture", "'a=nan' is not NAME=WEIGHT", "maths=0.7"),
        (("--mixture", "=1"), "--mixture", "'=1' is not NAME=WEIGHT", "maths=0.7"),
        (("--mixture", "a=1,a=2"), "--mixture", "'a' is given twice", "maths=0.7"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused_before_anything_is_loaded(
    routed, refused, monkeypatch, command, words, place, message, hint
):
    monkeypatch.setattr("mediator_cli.cli.opening.opened", None)
    refused(place, message, hint, command, "out", *([SUM] if command == "generate" else []), *words)


@pytest.mark.parametrize("words", [("generate", "out", SUM), ("chat", "out")])
def test_a_bundle_without_a_router_needs_a_name(shop, refused, words):
    shop.merge("out", experts=PLAIN, **ROUTE_ALL)
    refused("out", "the bundle has no router", "--expert a", *words)


def test_a_static_merge_has_no_experts_to_name(shop, refused):
    shop.merge("out", experts=PLAIN, assign={"rule": "none"})
    refused("--expert", "no expert 'a'", "without options", "generate", "out", SUM, "--expert", "a")


def test_folders_and_prompts_that_cannot_be_answered_are_refused(shop, refused):
    refused("base", "has no routing_manifest.json", "is it a bundle?", "generate", "base", SUM)
    for name in ("base", "a", "b"):
        edit_json(shop.folder / name / "config.json", max_position_embeddings=16)
    shop.merge("out", experts=with_prompts(), **ROUTE_ALL)
    refused("prompt", "19 tokens, the model reads 16", "shorten it", "generate", "out", "two " * 17)


@pytest.fixture
def chat(mediator, monkeypatch):
    """Call `mediator chat out` with lines from standard input."""

    def call(*lines, words=()):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return mediator("chat", "out", *SHORT, *words)

    return call


def turns(folder, *steps):
    """Hold the same conversation by hand: (text, mixture) by turn, None = start over; give answers and mixtures."""
    model, conversation, told = open_bundle(folder), Conversation(), []
    for step in steps:
        if step is None:
            conversation = Conversation()
            continue
        text, mixture = step
        turn = reply(model, word_tokenizer(), conversation, text, SAMPLING, mixture=mixture)
        conversation = turn.conversation
        told.append((turn.text.strip(), mixture_text(conversation.weights[0].tolist(), model.expert_names)))
    return told


def told(run):
    assert run.code == 0, run.err
    return list(zip(map(str.strip, run.out.splitlines()), run.err.splitlines(), strict=True))


def test_a_chat_is_routed_turn_by_turn_until_told_otherwise(routed, chat):
    run = chat(SUM, FILM, "", "/expert b", "two", "/expert dense", "two", "/auto", SUM, "/new", FILM, "/quit", "two")
    expected = turns(routed, (SUM, None), (FILM, None), ("two", "b"), ("two", "dense"), (SUM, None), None, (FILM, None))
    assert told(run) == expected
    assert expected[2][1] == "b 1.00"
    assert expected[0][1] != expected[1][1]


def test_a_pinned_chat_keeps_its_first_mixture_until_it_starts_over(routed, chat):
    run = chat(SUM, FILM, "/new", FILM, SUM, "/expert a", SUM, "/auto", FILM, words=["--pin"])
    first, second = (open_bundle(routed).route(ids_of(text)).weights for text in (SUM, FILM))
    # After /auto the router decides anew: nobody asked for the expert to be kept.
    steps = [(SUM, first), (FILM, first), None, (FILM, second), (SUM, second), (SUM, "a"), (FILM, None)]
    assert told(run) == turns(routed, *steps)


def test_a_chat_may_start_with_an_expert_or_a_mixture(routed, chat):
    assert told(chat(SUM, words=["--expert", "b"])) == turns(routed, (SUM, "b"))
    assert told(chat(SUM, words=["--mixture", "a=0.5"])) == turns(routed, (SUM, {"a": 0.5}))


def test_words_that_a_chat_does_not_know_change_nothing(routed, chat):
    run = chat("/expert bb", "/help", SUM)
    assert run.code == 0
    assert run.err.splitlines()[:2] == ["error: /expert: no expert 'bb'", "  hint: did you mean 'b'?"]
    assert run.out.startswith("/new starts over, /expert NAME or /auto choose who answers, /quit ends\n")
    assert run.err.splitlines()[2] == turns(routed, (SUM, None))[0][1]


def test_a_bundle_without_router_stays_with_whom_it_was_told(shop, chat):
    folder = shop.merge("out", experts=PLAIN, **ROUTE_ALL)
    run = chat("/auto", SUM, words=["--expert", "a"])
    assert run.err.splitlines()[0] == "error: /auto: the bundle has no router"
    assert (run.out.strip(), run.err.splitlines()[-1]) == turns(folder, (SUM, "a"))[0]


def test_a_turn_that_is_too_long_ends_a_script_and_not_a_talk(shop, chat, monkeypatch):
    for name in ("base", "a", "b"):
        edit_json(shop.folder / name / "config.json", max_position_embeddings=16)
    folder = shop.merge("out", experts=with_prompts(), **ROUTE_ALL)
    run = chat("two " * 17, SUM)
    assert (run.code, run.out) == (2, "")
    assert "error: prompt: 19 tokens, the model reads 16" in run.err
    monkeypatch.setattr("mediator_cli.cli.chat._by_hand", lambda: True)
    run = chat("two " * 17, SUM)
    assert run.code == 0
    assert run.err.splitlines()[-1] == turns(folder, (SUM, None))[0][1]


@pytest.fixture
def bench(shop, monkeypatch):
    """A recipe that routes all, with rows for both experts."""
    # Tiny models need no collection, which takes longer than all else.
    monkeypatch.setattr(compare_run, "gc", SimpleNamespace(collect=lambda: 0))
    for name, seed in (("a", 1), ("b", 2)):
        write_rows(shop.folder / f"{name}.test.jsonl", make_rows(5, seed))
    shop.recipe(experts=with_prompts(), **ROUTE_ALL)
    return shop


ABLATE = ("ablate", "recipe.yaml", "--tasks", "a.test.jsonl", "b.test.jsonl")


def test_ablate_measures_and_goes_on_where_it_stopped(bench, mediator, monkeypatch):
    words = (*ABLATE, "--group", "dense expert", "--group", "mediator", "--limit", "3", "--json", "--set", "seed=1")
    run = mediator(*words, "--markdown", "t.md")
    assert run.code == 0, run.err
    report = json.loads(run.out)
    names = ["oracle experts", "base", "Mediator, router", "Mediator, oracle routing", "Mediator, dense expert alone"]
    names += ["dense average", "dense base"]
    assert [model["name"] for model in report["models"]] == names
    assert {task["n"] for model in report["models"] for task in model["tasks"]} == {3}
    assert {found["model"] for found in report["differences"]} == {*names} - {"oracle experts"}
    lines = run.err.splitlines()
    assert lines[0] == "measure conflict"
    assert [line for line in lines if " of 7: " in line] == lines[1:]
    assert lines[1] == "1 of 7: reference: base"
    assert len((bench.folder / "t.md").read_text().split("\n\n")[0].splitlines()) == 2 + len(names)
    assert sorted(path.name.split("-")[0] for path in (bench.folder / "ablation-recipe").iterdir()) == [
        "bundles", "conflicts", "facts", "scores",
    ]  # fmt: skip
    monkeypatch.setattr(compare_run, "score_rows", None)
    again = mediator(*words)
    assert again.out == run.out
    assert "measure conflict" not in again.err
    measured = mediator("evaluate", "a", "b", "--tasks", "a.test.jsonl", "b.test.jsonl", "--limit", "3", "--json")
    own = [json.loads(measured.out)["models"][at]["tasks"][at]["log_prob"] for at in (0, 1)]
    assert [task["log_prob"] for task in report["models"][0]["tasks"]] == pytest.approx(own)


def test_ablate_prints_a_plain_table_and_nothing_else_when_quiet(bench, mediator):
    run = mediator(*ABLATE, "--group", "dense expert", "--work", "w", "--quiet")
    assert (run.code, run.err) == (0, "")
    assert "\x1b" not in run.out
    lines = run.out.splitlines()
    assert lines[1].split() == ["model", "a", "b", "mean", "disk", "memory", "s/answer"]
    assert [line.split("  ")[0].strip() for line in lines[3:6]] == ["oracle experts", "base", "dense average"]
    assert any(line.startswith("dense base against oracle experts on the mean over tasks: ") for line in lines)
    assert (bench.folder / "w").is_dir()


def test_ablate_says_what_it_leaves_out(bench, mediator):
    bench.recipe(experts=PLAIN, **ROUTE_ALL)
    run = mediator("ablate", "recipe.yaml", "--tasks", "a.test.jsonl", "--group", "policy", "--limit", "1", "--json")
    assert [model["name"] for model in json.loads(run.out)["models"]] == ["oracle experts", "base"]
    assert "warning: the recipe fits no router: variants that need one are left out\n" in run.err
    assert "warning: no rows are given for b: means are over the other tasks\n" in run.err


@pytest.mark.parametrize(
    ("words", "place", "message", "hint"),
    [
        ((*ABLATE, "--group", "statics"), "--group", "no group 'statics'", "did you mean 'static'?"),
        ((*ABLATE, "gone.jsonl"), "gone.jsonl", "is no file of rows", "--tasks"),
        (("ablate", "recipe.yaml", "--tasks", "none.jsonl"), "none.jsonl", "cannot read", ""),
        (("ablate", "recipe.yaml", "--tasks", "c.jsonl"), "--tasks", "no expert is named like the task 'c'", "a, b"),
        ((*ABLATE, "--set", "assign.rule=none"), "--set assign.rule", "the recipe routes nothing", "nothing to ablate"),
        ((*ABLATE, "--set", "extract.density=2"), "--set extract.density", "less than or equal to 1", ""),
        ((*ABLATE, "--memory", "much"), "--memory", "is not a size", "2GiB"),
        (("ablate", "gone.yaml", *ABLATE[2:]), "gone.yaml", "cannot read", ""),
    ],
)
def test_ablate_refuses_what_it_cannot_measure(bench, refused, words, place, message, hint):
    write_rows(bench.folder / "c.jsonl", make_rows(2))
    refused(place, message, hint, *words)


def test_ablate_needs_rows(bench, mediator):
    run = mediator("ablate", "recipe.yaml")
    assert run.code == 2
    assert "--tasks" in run.err


def test_places_that_cannot_be_written_are_named(bench, mediator):
    run = mediator(*ABLATE, "--work", "base/config.json", "--limit", "1")
    assert run.code == 2
    assert "error: base/config.json/conflicts-" in run.err
    bench.recipe(experts=PLAIN, **ROUTE_ALL)
    run = mediator(*ABLATE, "--markdown", "no/t.md", "--limit", "1", "--group", "policy")
    assert run.code == 2
    assert "error: no/t.md: cannot write: no such file or directory" in run.err
    assert "oracle experts" in run.out

"""Routers in plans: when one is fitted, and every problem with its prompts told before anything is merged."""

import json

import pytest
from conftest import with_prompts

from mediator_cli import load_recipe, make_plan
from mediator_cli.errors import MediatorError
from mediator_cli.plan.prompts import read_prompts
from mediator_cli.recipe.router import RouterSpec

A, B = with_prompts("a", "b")
BARE = {"name": "b", "model": "./b"}


def plan_of(shop, *changes, **fields):
    return make_plan(load_recipe(shop.recipe(**fields), changes))


def problems(shop, **fields):
    with pytest.raises(MediatorError) as raised:
        plan_of(shop, **fields)
    start = f"{shop.folder}/recipe.yaml:"
    return [(p.place.removeprefix(start).replace(f"{shop.folder}/", ""), p.message) for p in raised.value.problems]


def test_prompts_of_all_experts_give_a_router_by_defaults(shop):
    plan = plan_of(shop, experts=[A, B])
    assert (plan.router, plan.notices) == (RouterSpec(), ())
    assert [expert.prompts for expert in plan.experts] == [shop.folder / "a.jsonl", shop.folder / "b.jsonl"]


def test_the_recipes_router_is_planned(shop):
    assert plan_of(shop, experts=[A, B], router={"features": "text"}).router == RouterSpec(features="text")


def test_without_prompts_and_router_nothing_is_said(shop):
    plan = plan_of(shop)
    assert (plan.router, plan.notices) == (None, ())


@pytest.mark.parametrize(
    ("fields", "notice"),
    [
        ({"experts": [A, BARE]}, "no prompts are given for b"),
        ({"experts": [A], "assign": {"rule": "all"}}, "the recipe has one expert"),
        ({"experts": [A, B], "assign": {"rule": "none"}}, "rule none routes no unit"),
        ({"experts": [A, B], "assign": {"rule": "none"}, "router": {}}, "rule none routes no unit"),
    ],
)
def test_why_no_router_is_fitted_is_said(shop, fields, notice):
    plan = plan_of(shop, **fields)
    assert (plan.router, plan.notices) == (None, (f"no router is fitted: {notice}",))


@pytest.mark.parametrize(
    ("fields", "place", "message"),
    [
        ({"experts": [A, BARE], "router": {}}, "4 router", "needs prompts of every expert, none are given for b"),
        ({"router": {}}, "4 router", "none are given for a, b"),
        (
            {"experts": [A], "router": {}, "assign": {"rule": "all"}},
            "4 router",
            "a router chooses between experts, the recipe has one",
        ),
        (
            {"experts": [A, B], "router": {"policy": {"rule": "top_k", "k": 3}}},
            "4 router.policy.k",
            "3 experts are to be mixed, the recipe has 2",
        ),
        (
            {"experts": [A, B], "router": {"policy": {"rule": "fixed", "weights": {"a": 0.5, "c": 1}}}},
            "4 router.policy.weights.c",
            "no expert 'c'",
        ),
        (
            {"experts": [A, B], "router": {"features": "hidden_mean", "layer": 4}},
            "4 router.layer",
            "4 layers are to run, the base has 3",
        ),
    ],
)
def test_a_router_that_does_not_fit_the_experts_is_refused(shop, fields, place, message):
    (found,) = problems(shop, **fields)
    assert found[0] == place
    assert message in found[1]


@pytest.mark.parametrize(
    ("data", "faults"),
    [
        (b"", [("", "holds no prompts")]),
        (b"\n \n", [("", "holds no prompts")]),
        (b'{"prompt": "x"}\n{"prompt": 3}\n', [(":2", "`prompt` is not a text")]),
        (b'{"question": "x"}\n', [(":1", "has no `prompt`")]),
        (b'["x"]\n', [(":1", "has no `prompt`")]),
        (b'{"prompt": " "}\n', [(":1", "`prompt` is empty")]),
        (b'{"prompt": "x"}\n\n{"prompt"\n', [(":3", "broken JSON")]),
        (b'{"prompt": "\xff"}\n', [(":1", "is not UTF-8 text")]),
        (b"[" * 5000 + b"\n", [(":1", "broken JSON")]),
        (
            b"x\n" * 7,
            [(":1", "broken JSON"), (":2", "broken JSON"), (":3", "broken JSON"), ("", "4 more lines are faulty")],
        ),
    ],
)
def test_faulty_prompts_are_refused_with_file_and_line(shop, data, faults):
    (shop.folder / "b.jsonl").write_bytes(data)
    found = problems(shop, experts=[A, B])
    assert [place for place, _ in found] == [f"3 experts[1].prompts: b.jsonl{line}" for line, _ in faults]
    assert all(message in text for (_, message), (_, text) in zip(faults, found, strict=True))


def test_prompts_are_checked_also_where_no_router_is_fitted(shop):
    (shop.folder / "a.jsonl").write_text("x\n")
    assert problems(shop, experts=[A, BARE])[0][0] == "3 experts[0].prompts: a.jsonl:1"


def test_prompts_are_checked_together_with_all_else(shop):
    (shop.folder / "a.jsonl").unlink()
    (shop.folder / "b.jsonl").write_text("")
    found = problems(shop, base="./gone", experts=[A, B], average={"method": "tise"}, router={})
    places = ["2 base: gone", "3 experts[0].prompts", "3 experts[1].prompts: b.jsonl", "4 average.method"]
    assert [place for place, _ in found] == places


def test_a_base_without_a_tokenizer_gets_no_router(shop):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (shop.folder / "base" / name).unlink()
    assert problems(shop, experts=[A, B]) == [
        ("3 experts", f"a router needs a tokenizer, {shop.folder}/base holds none")
    ]


def test_blank_lines_other_fields_and_any_text_are_read(tmp_path):
    prompts = ["line one\nline two", "a\u2028b", "你好"]
    lines = [json.dumps({"answer": 1, "prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    (tmp_path / "p.jsonl").write_bytes(("\n\r\n".join(lines)).encode())
    assert read_prompts(tmp_path / "p.jsonl") == tuple(prompts)

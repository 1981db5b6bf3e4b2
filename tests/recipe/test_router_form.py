"""What a recipe may say of the router: form, lines, and changes from the command line."""

import pytest

from mediator_cli.bundle.router_record import PolicyRecord, RouterRecord
from mediator_cli.errors import RecipeError
from mediator_cli.recipe.router import POLICY_FIELDS, PolicySpec, RouterSpec

TEXT = """version: 1
base: ./base
experts: [{name: a, model: ./a, prompts: ./a.jsonl}, {name: b, model: ./b, prompts: ./b.jsonl}]
router:
  features: hidden_mean
  layer: 2
  policy:
    rule: uncertainty
    cover: 0.8
"""


def test_a_router_is_read_with_its_lines(load):
    loaded = load(TEXT)
    assert loaded.recipe.router == RouterSpec(features="hidden_mean", layer=2, policy=PolicySpec(cover=0.8))
    assert loaded.lines[("router", "policy", "cover")] == 9


def test_a_recipe_without_a_router_has_none_and_an_empty_one_has_the_defaults(load):
    head = TEXT.split("router:")[0]
    assert load(head).recipe.router is None
    router = load(head + "router: {}\n").recipe.router
    assert (router.features, router.layer, router.classifier) == ("embedding_mean", None, "logistic")
    assert (router.held_out, router.max_prompts, router.outside_quantile) == (0.2, 1000, 0.99)


def test_a_policy_of_the_recipe_has_the_defaults_and_rules_of_the_manifest():
    assert PolicyRecord(**PolicySpec().model_dump()) == PolicyRecord()
    rules = PolicyRecord.model_json_schema()["properties"]["rule"]["enum"]
    assert PolicySpec.model_json_schema()["properties"]["rule"]["enum"] == rules == list(POLICY_FIELDS)
    for name in ("features", "classifier"):
        ours, theirs = (m.model_json_schema()["properties"][name]["enum"] for m in (RouterSpec, RouterRecord))
        # A router that reads nothing is written by `compare` alone.
        assert [*ours, *(["none"] if name == "features" else [])] == theirs


@pytest.mark.parametrize(
    ("old", "new", "place", "message"),
    [
        ("  layer: 2\n", "", "4 router", "features 'hidden_mean' needs layer"),
        ("hidden_mean", "text", "4 router", "features 'text' takes no layer"),
        ("hidden_mean", "embedding", "5 router.features", "should be 'embedding_mean'"),
        ("layer: 2", "layer: 0", "6 router.layer", "greater than or equal to 1"),
        ("layer: 2", "layers: 2", "6 router.layers", "unknown key 'layers'"),
        ("cover: 0.8", "cover: 0", "9 router.policy.cover", "greater than 0"),
        ("cover: 0.8", "sure: 1.5", "9 router.policy.sure", "less than or equal to 1"),
        ("cover: 0.8", "k: 2", "7 router.policy", "rule 'uncertainty' takes no k"),
        ("uncertainty", "argmax", "7 router.policy", "rule 'argmax' takes no cover"),
        ("uncertainty\n    cover: 0.8", "top_k", "7 router.policy", "rule 'top_k' needs k"),
        ("uncertainty\n    cover: 0.8", "fixed", "7 router.policy", "rule 'fixed' needs weights"),
        ("uncertainty\n    cover: 0.8", "fixed\n    weights: {a: .nan}", "9 router.policy.weights.a", "finite"),
        ("layer: 2", "layer: 2\n  max_prompts: 7", "7 router.max_prompts", "greater than or equal to 8"),
        ("layer: 2", "layer: 2\n  held_out: 1", "7 router.held_out", "less than 1"),
        ("layer: 2", "layer: 2\n  outside_quantile: 0", "7 router.outside_quantile", "greater than 0"),
    ],
)
def test_faults_of_form_are_told_with_their_line(load, tmp_path, old, new, place, message):
    with pytest.raises(RecipeError) as raised:
        load(TEXT.replace(old, new))
    (problem,) = raised.value.problems
    assert problem.place == f"{tmp_path}/recipe.yaml:{place}"
    assert message in problem.message


def test_a_new_policy_rule_drops_what_belonged_to_the_old_one(load):
    policy = load(TEXT + "    outside: ignore\n", "router.policy.k=2", "router.policy.rule=top_k").recipe.router.policy
    assert policy == PolicySpec(rule="top_k", k=2, outside="ignore")


def test_a_rule_of_the_policy_is_no_rule_of_the_assignment(load):
    text = TEXT + "assign: {rule: top_k, k: 3, candidates: all}\n"
    loaded = load(text, "router.policy={rule: argmax}", "router.features=text", "router.layer=null")
    assert loaded.recipe.assign.k == 3
    assert loaded.recipe.router == RouterSpec(features="text", policy=PolicySpec(rule="argmax"))

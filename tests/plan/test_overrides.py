"""Overrides and gradients: what holds for each tensor, checked against readings of its own; and what is refused."""

import json

import pytest
from conftest import write_checkpoint

from mediator_cli import load_recipe, make_plan, read_bundle
from mediator_cli.compare.key import model_key
from mediator_cli.errors import MediatorError
from mediator_cli.plan.gradients import value_at
from mediator_cli.plan.schema import recipe_schema

Q0, Q1, Q2 = (f"model.layers.{n}.self_attn.q_proj.weight" for n in range(3))
UP1 = "model.layers.1.mlp.up_proj.weight"
EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
TIES = {"method": "ties", "density": 0.2}


def plan_of(workshop, *changes, **fields):
    return make_plan(load_recipe(workshop.recipe(**fields), changes))


def tensors_of(workshop, *changes, **fields):
    return {tensor.name: tensor for tensor in plan_of(workshop, *changes, **fields).tensors}


def weighted(workshop, weight, **fields):
    """Plan with weights of expert a; all tensors."""
    experts = [{"name": "a", "model": "./a", "weight": weight}, {"name": "b", "model": "./b"}]
    return tensors_of(workshop, experts=experts, **fields)


def refusal(workshop, **fields):
    with pytest.raises(MediatorError) as raised:
        plan_of(workshop, **fields)
    return [str(problem).removeprefix(str(workshop.folder / "recipe.yaml")) for problem in raised.value.problems]


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [(1, {1}), ("1", {1}), ("0-1", {0, 1}), ("1 - 2", {1, 2}), ([0, 2], {0, 2}), (["0-1"], {0, 1})],
)
def test_layers_choose_the_tensors_of_these_layers_alone(workshop, layers, chosen):
    found = tensors_of(workshop, overrides=[{"layers": layers, "extract": {"density": 0.5}}])
    names = {name for name, tensor in found.items() if tensor.extract.density == 0.5}
    assert names == {name for name in workshop.base if any(f".layers.{n}." in name for n in chosen)}


def test_match_and_layers_choose_together(workshop):
    found = tensors_of(workshop, overrides=[{"match": "*_proj.weight", "layers": "1-2", "weights": {"b": 3}}])
    names = {name for name, tensor in found.items() if tensor.weights == (1.0, 3.0)}
    assert names == {name for name in workshop.base if name.endswith("_proj.weight") and ".layers.0." not in name}
    assert found[Q0].weights == (1.0, 1.0)


def test_parameters_alone_change_the_method_that_applies(workshop):
    overrides = [
        {"match": "*.mlp.*", "average": {"method": "dare_ties"}},
        {"layers": 1, "average": {"density": 0.5}},
        {"match": "*q_proj*", "average": {"lambda": 2.0}},
    ]
    found = tensors_of(workshop, average=TIES, overrides=overrides)
    facts = {name: (t.average.method.name, t.average.params["density"]) for name, t in found.items()}
    assert facts[NORM] == facts[Q0] == ("ties", 0.2)
    assert (facts[Q1], facts[UP1]) == (("ties", 0.5), ("dare_ties", 0.5))
    lambdas = {name: t.average.params["lambda"] for name, t in found.items()}
    assert [lambdas[name] for name in (Q0, Q1, UP1)] == [2.0, 2.0, 1.0]


def test_a_method_in_an_override_replaces_all_parameters(workshop):
    overrides = [{"match": "*", "average": {"density": 0.9}}, {"match": "*", "average": {"method": "ties"}}]
    assert tensors_of(workshop, average=TIES, overrides=overrides)[Q0].average.params["density"] == 0.2
    params = tensors_of(workshop, average={**TIES, "lambda": 3}, overrides=overrides[1:])[Q0].average.params
    assert params["lambda"] == 1.0


def test_later_weights_win_for_the_experts_that_they_name(workshop):
    overrides = [{"match": "*", "weights": {"a": 2, "b": 3}}, {"layers": 1, "weights": {"b": 5}}]
    found = tensors_of(workshop, overrides=overrides)
    assert (found[Q0].weights, found[Q1].weights) == ((2.0, 3.0), (2.0, 5.0))


@pytest.mark.parametrize("anchors", [[0.2, 1.0], [1.0, 0.0, 1.0], [3.0], [0.1, 0.9, 0.4, 0.7, 0.2]])
def test_anchors_are_joined_by_straight_lines_over_the_layers(workshop, anchors):
    found = weighted(workshop, anchors)
    for number in range(3):
        # mergekit's reading: position t of n layers is number / (n - 1), among len - 1 equal steps.
        scaled = number / 2 * (len(anchors) - 1)
        low = min(int(scaled), max(0, len(anchors) - 2))
        expected = anchors[low] + (scaled - low) * (anchors[min(low + 1, len(anchors) - 1)] - anchors[low])
        for name in workshop.base:
            if f".layers.{number}." in name:
                assert found[name].weights == (pytest.approx(expected, rel=1e-12), 1.0)
    assert (found[EMBED].weights[0], found[NORM].weights[0]) == (anchors[0], anchors[-1])


def test_an_untied_head_has_the_last_anchor_and_the_embedding_the_first(workshop):
    for source in ("base", "a", "b"):
        tensors = workshop.experts.get(source, workshop.base) | {HEAD: workshop.base[EMBED].clone()}
        write_checkpoint(workshop.folder / source, tensors, {"tie_word_embeddings": False})
    found = weighted(workshop, [0.25, 0.5, 0.75])
    assert [found[name].weights[0] for name in (EMBED, HEAD, NORM)] == [0.25, 0.75, 0.75]


def test_one_layer_has_the_last_anchor(workshop):
    for source in ("base", "a", "b"):
        tensors = workshop.experts.get(source, workshop.base)
        kept = {name: tensor for name, tensor in tensors.items() if ".layers." not in name or ".layers.0." in name}
        write_checkpoint(workshop.folder / source, kept, {"num_hidden_layers": 1})
    found = weighted(workshop, [0.25, 0.75])
    assert (found[Q0].weights[0], found[EMBED].weights[0]) == (0.75, 0.25)


def test_each_stack_of_layers_goes_from_the_first_anchor_to_the_last(workshop):
    names = [f"encoder.block.{n}.w.weight" for n in range(3)] + [f"decoder.block.{n}.w.weight" for n in range(5)]
    for source in ("base", "a", "b"):
        tensors = {name: workshop.base[Q0].clone() + len(source) for name in names}
        write_checkpoint(workshop.folder / source, tensors, {"num_hidden_layers": 3})
    found = weighted(workshop, [0, 4])
    assert [found[name].weights[0] for name in names] == [0, 2, 4, 0, 1, 2, 3, 4]


def test_gradients_of_parameters_and_of_overrides_are_resolved_per_tensor(workshop):
    overrides = [{"match": "*.mlp.*", "average": {"density": [0.5, 0.7]}}, {"match": "*", "weights": {"b": [0, 2]}}]
    found = tensors_of(workshop, average={**TIES, "density": [0.1, 0.3]}, overrides=overrides)
    assert [found[name].average.params["density"] for name in (Q0, Q1, Q2)] == [0.1, pytest.approx(0.2), 0.3]
    assert found[UP1].average.params["density"] == pytest.approx(0.6)
    assert [found[name].weights[1] for name in (EMBED, Q1, NORM)] == [0, 1, 2]
    assert all(isinstance(tensor.average.params["density"], float) for tensor in found.values())


def test_a_gradient_is_one_row_of_the_methods_as_it_was_written(workshop):
    experts = [{"name": "a", "model": "./a", "weight": [0.5, 1]}, {"name": "b", "model": "./b"}]
    average = {"method": "task_arithmetic", "lambda": [0.2, 0.4]}
    out = workshop.merge("out", experts=experts, assign={"rule": "none"}, average=average)
    manifest = json.loads((out / "routing_manifest.json").read_text())
    (row,) = manifest["methods"]
    assert (row["parameters"]["lambda"], row["n_tensors"]) == ([0.2, 0.4], len(workshop.base))
    assert [source["weight"] for source in manifest["experts"]] == [[0.5, 1.0], 1.0]
    assert read_bundle(out).manifest.experts[0].weight == (0.5, 1.0)


def test_a_comparison_tells_weights_by_pattern_and_gradients_apart(workshop):
    variants = [
        {}, {"overrides": [{"layers": 1, "weights": {"a": 2}}]}, {"overrides": [{"layers": 2, "weights": {"a": 2}}]},
        {"overrides": [{"layers": 1, "weights": {"a": [2, 3]}}]},
        {"average": TIES, "overrides": [{"layers": 1, "average": {"density": 0.3}}]},
        {"average": TIES, "overrides": [{"layers": 1, "average": {"method": "linear"}}]},
    ]  # fmt: skip
    keys = [model_key(plan_of(workshop, **fields), "bundle") for fields in variants]
    assert len(set(keys)) == len(variants)


def test_value_at_reaches_both_ends_exactly():
    anchors = (0.1, 0.7, 0.3)
    assert [value_at(anchors, at) for at in (0.0, 0.5, 1.0)] == [0.1, 0.7, 0.3]


def test_a_kept_tensor_is_no_target_of_an_override(workshop):
    fields = {"keep_base": ["*.mlp.*"], "overrides": [{"match": "*.mlp.*", "weights": {"a": 2}}]}
    (problem,) = refusal(workshop, **fields)
    assert "'*.mlp.*' matches no tensor" in problem


REFUSED = {
    "layer beyond the model": ({"layers": "1-3", "weights": {"a": 2}}, "layers", "the base has no layer 3", "0 to 2"),
    "no such tensor there": (
        {"match": "*.norm.*", "layers": 1, "weights": {"a": 2}},
        "",
        "'*.norm.*' matches no tensor in these layers",
        f"it matches {NORM}",
    ),
    "no such expert": ({"layers": 1, "weights": {"aa": 2}}, "weights.aa", "no expert 'aa'", "did you mean 'a'?"),
    "unknown parameter": (
        {"layers": 1, "average": {"desnity": 0.3}}, "average.desnity", "ties has no parameter 'desnity'", "'density'?",
    ),
    "parameter of another method": (
        {"layers": 1, "average": {"t": 0.3}}, "average.t", "ties has no parameter 't'", "known: density",
    ),
    "parameter out of bounds": (
        {"layers": 1, "average": {"density": 1.5}}, "average.density", "less than or equal to 1 (got 1.5)", "ties",
    ),
    "anchor out of bounds": (
        {"layers": 1, "average": {"density": [0.5, 0.2, 1.5, 0]}}, "average.density[2]", "equal to 1 (got 1.5)", "ties",
    ),
    "anchor that is a text": (
        {"layers": 1, "average": {"density": [0.5, "a"]}}, "average.density[1]", "valid number (got 'a')", "ties",
    ),
    "anchor of anchors": (
        {"layers": 1, "average": {"density": [[0.5], 0.5]}}, "average.density[0]", "valid number (got [0.5])", "ties",
    ),
    "anchors of a choice": (
        {"layers": 1, "average": {"merge": ["mean"]}}, "average.merge", "'merge' of ties is none", "methods ties",
    ),
    "no anchors": ({"layers": 1, "average": {"density": []}}, "average.density", "list of anchors is empty", "number"),
}  # fmt: skip


@pytest.mark.parametrize("row", REFUSED.values(), ids=REFUSED)
def test_an_override_that_means_nothing_here_is_refused_with_its_line(workshop, row):
    override, field, message, hint = row
    found = refusal(workshop, average=TIES, overrides=[override])
    (first,) = [text for text in found if message in text]
    place, _, rest = first.partition(": ")
    assert place == f":5 overrides[0]{'.' if field else ''}{field}"
    assert hint in rest.partition("\n  hint: ")[2]


def test_every_anchor_that_is_out_of_bounds_is_told(workshop):
    found = refusal(workshop, average={**TIES, "density": [0, 0.5, 2]})
    assert [text.split(":")[1] for text in found] == ["4 average.density[0]", "4 average.density[2]"]


def test_faults_of_parameters_are_told_together_with_those_of_sources(workshop):
    found = refusal(
        workshop,
        experts=[{"name": "a", "model": "./a"}, {"name": "b", "model": "./gone"}],
        overrides=[{"layers": 1, "average": {"densty": 0.3}}, {"layers": 7, "weights": {"z": 1}}],
    )
    words = ("no such folder", "no parameter 'densty'", "no expert 'z'", "no layer 7")
    assert [sum(word in text for text in found) for word in words] == [1, 1, 1, 1]


def test_weights_that_sum_to_zero_are_refused_where_they_do(workshop):
    (plain,) = refusal(workshop, overrides=[{"layers": 1, "weights": {"a": -1}}])
    assert plain.startswith(":4 overrides[0].weights: the weights sum to zero on model.layers.1.")
    experts = [{"name": "a", "model": "./a", "weight": [1, -1]}, {"name": "b", "model": "./b"}]
    (graded,) = refusal(workshop, experts=experts)
    assert graded.startswith(":3 experts: the weights sum to zero on model.layers.2.")
    plan_of(workshop, experts=experts, average={"method": "linear", "normalize": False})
    # Where nothing is merged, nothing is divided.
    overrides = [{"layers": 1, "weights": {"a": -1}}, {"match": "*.mlp.*", "weights": {"a": 1}}]
    plan_of(workshop, overrides=overrides, keep_base=["model.layers.1.self_attn.*", "model.layers.1.*layernorm*"])


def test_gradients_come_through_the_command_line(workshop):
    found = tensors_of(workshop, "experts[0].weight=[0, 2]", "average={method: ties, density: [0.2, 0.4]}")
    assert found[Q1].weights == (1.0, 1.0)
    assert found[Q1].average.params["density"] == pytest.approx(0.3)


def test_the_schema_knows_anchors_where_a_number_may_change_over_the_layers():
    defs = recipe_schema()["$defs"]

    def forms(definition, field):
        facts = defs[definition]["properties"][field]
        return [form.get("type") for form in facts.get("anyOf", [facts])]

    assert forms("ExpertSpec", "weight") == forms("average_slerp", "t") == forms("average_ties", "lambda")
    assert forms("average_slerp", "t") == ["number", "array"]
    # Experts may differ in it.
    assert forms("average_ties", "density") == ["number", "array", "object"]
    assert forms("average_ties", "merge") == ["string"]
    (density,) = [form for form in defs["average_ties"]["properties"]["density"]["anyOf"] if form["type"] == "array"]
    assert density["items"] == {"exclusiveMinimum": 0, "maximum": 1, "type": "number"}
    in_overrides = defs["OverrideSpec"]["properties"]["average"]["anyOf"]
    assert [form["$ref"] for form in in_overrides] == ["#/$defs/AverageSpec", "#/$defs/average_change"]
    change = defs["average_change"]["properties"]
    assert {"density", "lambda", "t", "normalize"} <= set(change)
    assert not {"method", "preset"} & set(change)

"""Second moments of experts: found, checked, read, and named where they are missing or wrong."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import edit_tensors, put
from safetensors.torch import load_file, save_file

from mediator_cli import MediatorError, Settings, load_recipe, make_plan, merge
from mediator_cli.checkpoint.hub.find import ONLINE
from mediator_cli.plan.moments import with_moments

OTA = {"method": "ota"}
NORM = "model.norm.weight"


@pytest.fixture
def studio(workshop):
    """A workshop with second moments of a and b: tensors of one number each, 1 and 9."""
    for name, value in {"a": 1.0, "b": 9.0}.items():
        moments = {key: torch.full(tensor.shape, value) for key, tensor in workshop.base.items()}
        save_file(moments, workshop.folder / f"{name}.safetensors")
    return workshop


def experts(**moments):
    return [{"name": n, "model": f"./{n}", **({"second_moments": m} if m else {})} for n, m in moments.items()]


BOTH = experts(a="./a.safetensors", b="./b.safetensors")


def plan_of(studio, **fields):
    return make_plan(
        load_recipe(studio.recipe(**{"experts": BOTH, "average": OTA, "assign": {"rule": "none"}, **fields}))
    )


def refused(studio, *words, **fields):
    with pytest.raises(MediatorError) as error:
        plan_of(studio, **fields)
    assert all(word in str(error.value) for word in words), str(error.value)
    return error.value.problems


def merged(studio, **fields):
    folder = merge(plan_of(studio, output={"dtype": "float32"}, **fields), studio.folder / "out", settings=Settings())
    return load_file(folder / "model.safetensors")


def expected(studio, name):
    base = studio.base[name].float()
    return base + sum(w * (studio.experts[e][name].float() - base) for e, w in {"a": 0.25, "b": 0.75}.items())


def test_experts_weigh_by_the_root_of_their_moments(studio):
    found = merged(studio)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected(studio, name), rtol=1e-6, atol=1e-7)


def test_moments_in_folders_of_several_files_and_with_a_suffix(studio):
    moments = load_file(studio.folder / "b.safetensors")
    (studio.folder / "vb").mkdir()
    parts = [dict(list(moments.items())[:5]), dict(list(moments.items())[5:])]
    places = {}
    for number, part in enumerate(parts, 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({f"{name}.exp_avg_sq": tensor for name, tensor in part.items()}, studio.folder / "vb" / file)
        places |= {f"{name}.exp_avg_sq": file for name in part}
    index = studio.folder / "vb" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    found = merged(studio, experts=experts(a="./a.safetensors", b="./vb"))
    torch.testing.assert_close(found[NORM], expected(studio, NORM), rtol=1e-6, atol=1e-7)


def test_files_with_moments_are_named_in_the_manifest_with_their_digests(studio):
    merged(studio)
    record = json.loads((studio.folder / "out" / "routing_manifest.json").read_text())
    files = {source["name"]: [file["name"] for file in source["files"]] for source in record["experts"]}
    assert files == {"a": ["model.safetensors", "a.safetensors"], "b": ["model.safetensors", "b.safetensors"]}
    assert all(file["xxh3"] for source in record["experts"] for file in source["files"])


def test_an_expert_without_moments_is_named(studio):
    (problem,) = refused(studio, experts=experts(a="./a.safetensors", b=None))
    assert "ota needs the second moments of every expert, b has none" in problem.message
    assert "experts[1]" in problem.place
    assert "recipe.yaml:" in problem.place


def test_an_override_alone_can_need_moments(studio):
    overrides = [{"match": "*norm*", "average": OTA}]
    problems = refused(studio, experts=experts(a=None, b=None), average={"method": "linear"}, overrides=overrides)
    assert len(problems) == 2


def test_only_tensors_that_need_moments_must_have_them(studio):
    for name in ("a", "b"):
        edit_tensors(studio.folder / f"{name}.safetensors", lambda tensors: tensors.pop("model.embed_tokens.weight"))
    refused(studio, "lacks the second moments of model.embed_tokens.weight", "experts[0].second_moments")
    overrides = [{"match": "*embed*", "average": {"method": "linear"}}]
    found = merged(studio, overrides=overrides)
    torch.testing.assert_close(found[NORM], expected(studio, NORM), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(3), "shape [3], the merged tensor has [8]"),
        (torch.ones(8, dtype=torch.int32), "dtype I32, floats are needed"),
    ],
)
def test_moments_that_do_not_fit_are_refused(tensor, message, studio):
    edit_tensors(studio.folder / "b.safetensors", put(NORM, tensor))
    (problem,) = refused(studio, message)
    assert "experts[1].second_moments" in problem.place
    assert NORM in problem.place


def test_a_path_that_is_not_there_is_refused(studio):
    (problem,) = refused(studio, experts=experts(a="./a.safetensors", b="./nowhere"))
    assert "experts[1].second_moments" in problem.place
    assert "nowhere" in problem.place


@pytest.mark.parametrize(
    ("value", "message"), [(-1.0, "is this exp_avg?"), (float("nan"), "second moment of b is nan")]
)
def test_moments_that_are_no_means_of_squares_stop_the_merge(value, message, studio):
    edit_tensors(studio.folder / "b.safetensors", lambda tensors: tensors[NORM].__setitem__(2, value))
    with pytest.raises(MediatorError, match="flat index 2") as error:
        merged(studio)
    assert message in str(error.value)


def test_moments_that_no_method_uses_are_told_and_not_opened(studio):
    missing = experts(a="./nowhere", b=None)
    plan = plan_of(studio, experts=missing, average={"method": "linear"})
    assert "second moments of a are ignored: no method uses them" in plan.notices
    assert plan.n_rows == 2


def test_moments_are_read_beside_their_experts(studio):
    plan = plan_of(studio)
    assert plan.n_rows == 4
    assert [Path(expert.moments.path).name for expert in plan.experts] == ["a.safetensors", "b.safetensors"]


def test_rows_that_follow_other_tokens_have_no_moments(studio):
    moved = replace(plan_of(studio), vocabulary={"b": {"model.embed_tokens.weight": ()}})
    with pytest.raises(MediatorError, match="the rows of expert b are arranged by the output's tokens") as error:
        with_moments(moved, ONLINE)
    (problem,) = error.value.problems
    assert problem.place.endswith("model.embed_tokens.weight")


def test_layers_that_are_stacked_have_no_moments(studio):
    stacked = replace(plan_of(studio), inputs={"": {NORM: ()}})
    with pytest.raises(MediatorError, match="layers from ranges of layers have no second moments"):
        with_moments(stacked, ONLINE)


def test_a_merge_tells_moments_that_are_changed_meanwhile(studio, monkeypatch):
    from mediator_cli.pipeline import merge as module

    real = module.check_unchanged

    def check(plan, before):
        edit_tensors(studio.folder / "b.safetensors", put("extra", torch.ones(5)))
        real(plan, before)

    monkeypatch.setattr(module, "check_unchanged", check)
    with pytest.raises(MediatorError, match=r"b\.safetensors.*was changed"):
        merged(studio)

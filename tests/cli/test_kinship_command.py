"""`mediator kinship`: what is measured, printed, written and refused."""

import json

import numpy as np
import pytest
from conftest import edit_tensors, fine_tune, put, write_adapter, write_checkpoint


@pytest.fixture
def report(workshop, mediator):
    """Call the command with --json and parse its answer."""

    def ask(*words, **fields):
        workshop.recipe(**fields)
        run = mediator("kinship", "recipe.yaml", "--json", *words)
        assert run.code == 0, run.err
        return json.loads(run.out)

    return ask


def deltas(workshop, name, unit=""):
    return np.concatenate(
        [
            (tensor.float() - workshop.base[key].float()).numpy().ravel().astype(np.float64)
            for key, tensor in workshop.experts[name].items()
            if key.startswith(unit)
        ]
    )


def test_every_unit_has_its_own_kinship(workshop, report):
    found = report()
    assert list(found["units"]) == ["model.embed_tokens", *(f"model.layers.{n}" for n in range(3)), "model.norm"]
    for unit, (pair,) in (*found["units"].items(), ("", found["pairs"])):
        a, b = (deltas(workshop, name, unit) for name in ("a", "b"))
        assert pair["pcc"] == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-9)
        assert pair["euclidean"] == pytest.approx(np.linalg.norm(a - b), rel=1e-9)


def test_units_are_those_of_the_recipe(report):
    found = report(conflict={"unit": "block"})
    assert "model.layers.0.self_attn" in found["units"]
    assert found["unit"] == "block"


def test_adapters_are_experts_too(workshop, report):
    write_adapter(workshop.folder / "other", 4)
    names = ("a", "lora", "other")
    found = report(experts=[{"name": name, "model": f"./{name}"} for name in names])
    assert found["experts"] == list(names)
    assert all(-0.2 < pair["pcc"] < 0.2 for pair in found["pairs"])
    assert found["units"]["model.norm"][0]["pcc"] is None


def relatives(workshop):
    """Experts x and y are near kin, z and w too, in another direction."""
    stems = [fine_tune(workshop.base, seed, 0.5) for seed in (11, 12)]
    for n, name in enumerate("xzyw"):
        write_checkpoint(workshop.folder / name, fine_tune(stems[n % 2], 20 + n, 0.1))
    return [{"name": name, "model": f"./{name}"} for name in "xzyw"]


def test_near_relatives_stand_side_by_side_and_strangers_are_proposed(workshop, report):
    found = report(experts=relatives(workshop))
    assert found["order"] in (["x", "y", "z", "w"], ["z", "w", "x", "y"])
    assert {frozenset(b["left"] + b["right"]) for b in found["tree"][:2]} == {frozenset("xy"), frozenset("zw")}
    lowest = min(found["pairs"], key=lambda pair: pair["pcc"])
    assert set(found["groups"][0]["experts"]) == set(lowest["experts"])
    assert found["groups"][0]["kinship"] == lowest["pcc"]
    assert [len(group["experts"]) for group in found["groups"]] == [2, 3, 4]
    far = report("--metric", "euclidean", experts=relatives(workshop))
    most = max(far["pairs"], key=lambda pair: pair["euclidean"])
    assert far["groups"][0] == {"experts": most["experts"], "kinship": most["euclidean"]}


def test_the_words_say_what_to_merge(workshop, mediator):
    workshop.recipe(experts=relatives(workshop))
    run = mediator("kinship", "recipe.yaml", "-o", "kin.json")
    assert run.code == 0
    assert run.out.startswith("kinship of all pairs: Pearson correlation of the deltas\n")
    assert "merge first: " in run.out
    assert "family tree: ((" in run.out
    assert "report written to kin.json" in run.out
    assert "kinship: " in run.err
    written = json.loads((workshop.folder / "kin.json").read_text())
    names = " + ".join(written["groups"][0]["experts"])
    assert f"merge first: {names}, kinship {written['groups'][0]['kinship']:.3f}, the lowest of all pairs" in run.out


def test_two_experts_have_a_table_of_all_three_numbers(workshop, mediator):
    workshop.recipe()
    run = mediator("kinship", "recipe.yaml", "--int8", "--split")
    assert (
        "kinship of a and b: Pearson correlation of the deltas, rounded to 8 bits, mean over tensors by size" in run.out
    )
    assert "distance" in run.out
    assert "\n all " in run.out


def test_quiet_prints_nothing(workshop, mediator):
    workshop.recipe()
    run = mediator("kinship", "recipe.yaml", "-q")
    assert (run.code, run.out, run.err) == (0, "", "")


@pytest.mark.parametrize("suffix", ["png", "svg"])
@pytest.mark.parametrize("metric", ["pcc", "euclidean"])
def test_a_picture_is_drawn(workshop, mediator, suffix, metric):
    workshop.recipe(experts=relatives(workshop))
    run = mediator("kinship", "recipe.yaml", "--metric", metric, "--plot", f"kin.{suffix}")
    assert run.code == 0, run.err
    picture = (workshop.folder / f"kin.{suffix}").read_bytes()
    assert picture.startswith(b"\x89PNG") if suffix == "png" else b"<svg" in picture


def test_an_expert_that_equals_the_base_is_told_and_takes_no_part(workshop, mediator):
    experts = [{"name": n, "model": f"./{m}"} for n, m in (("a", "a"), ("same", "base"), ("b", "b"))]
    workshop.recipe(experts=experts)
    run = mediator("kinship", "recipe.yaml", "--json")
    found = json.loads(run.out)
    assert "NaN" not in run.out
    assert "expert same equals the base: its delta is zero, so its PCC and cosine are undefined" in run.err
    assert [group["experts"] for group in found["groups"]] == [["a", "b"]]
    pair = next(pair for pair in found["pairs"] if pair["experts"] == ["a", "same"])
    assert (pair["pcc"], pair["cosine"]) == (None, None)
    assert pair["euclidean"] > 0
    assert "–" in mediator("kinship", "recipe.yaml").out
    workshop.recipe(experts=experts[:2])
    assert "nothing is proposed" in mediator("kinship", "recipe.yaml").out


def test_one_expert_has_no_kin(workshop, refused):
    workshop.recipe(experts=[{"name": "a", "model": "./a"}])
    refused("recipe.yaml:3 experts", "kinship is of at least two experts", "add an expert", "kinship", "recipe.yaml")


def test_what_is_not_finite_is_refused(workshop, refused):
    name = "model.layers.1.mlp.up_proj.weight"
    bad = workshop.experts["a"][name].clone()
    bad[0, 3] = float("nan")
    edit_tensors(workshop.folder / "a" / "model.safetensors", put(name, bad))
    workshop.recipe()
    refused(name, "expert a is nan at flat index 3", "diverged", "kinship", "recipe.yaml")


def test_nothing_to_compare_is_refused(workshop, refused):
    workshop.recipe(keep_base=["*"])
    refused("recipe.yaml:4 keep_base", "nothing is left to compare", "keep fewer", "kinship", "recipe.yaml")


@pytest.mark.parametrize("file", ["kin.html", "kin.bmp"])
def test_what_is_no_picture_is_refused(workshop, refused, file):
    workshop.recipe()
    refused(file, "drawn as a picture only", "use .png, .svg or .pdf", "kinship", "recipe.yaml", "--plot", file)

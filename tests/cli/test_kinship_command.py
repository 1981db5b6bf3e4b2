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
    tree = run.out.split("family tree:\n")[1].splitlines()
    assert sorted(line.split()[0] for line in tree[:4]) == ["w", "x", "y", "z"]
    assert tree[0].endswith("┐")
    assert "┘" in tree[3]
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


def adapters(workshop, **more):
    """Write plain adapters of different ranks and scalings, one of which leaves a layer as it is."""
    write_adapter(workshop.folder / "other", 4, rank=3, use_rslora=True)
    write_adapter(workshop.folder / "part", 5, rank=1)

    def leave_a_layer(tensors):
        for name in [name for name in tensors if "layers.1." in name]:
            del tensors[name]

    edit_tensors(workshop.folder / "part" / "adapter_model.safetensors", leave_a_layer)
    return [{"name": name, "model": f"./{name}"} for name in ("lora", "other", "part")]


def test_adapters_measured_by_their_factors_are_what_whole_deltas_give(workshop, report):
    experts = adapters(workshop)
    low = report(experts=experts)
    whole = report(experts=[*experts, {"name": "a", "model": "./a"}])
    assert (low["low_rank"], whole["low_rank"]) == (True, False)
    assert low["n_entries"] == whole["n_entries"]
    wanted = {unit: {tuple(pair["experts"]): pair for pair in pairs} for unit, pairs in whole["units"].items()}
    wanted["all"] = {tuple(pair["experts"]): pair for pair in whole["pairs"]}
    for unit, pairs in (*low["units"].items(), ("all", low["pairs"])):
        for pair in pairs:
            for name in ("pcc", "cosine", "euclidean"):
                assert pair[name] == pytest.approx(wanted[unit][tuple(pair["experts"])][name], abs=1e-5), (unit, name)
    assert all(0 <= pair["overlap"] <= 1 for pair in low["pairs"])
    assert low["units"]["model.layers.1"][1]["overlap"] is None


def test_adapters_of_other_matrices_have_nothing_in_common(workshop, report):
    experts = adapters(workshop)[:2]
    for name, kept in (("lora", "mlp"), ("other", "self_attn")):

        def leave(tensors, kept=kept):
            for key in [key for key in tensors if kept not in key]:
                del tensors[key]

        edit_tensors(workshop.folder / name / "adapter_model.safetensors", leave)
    (pair,) = report(experts=experts)["pairs"]
    assert (pair["cosine"], pair["overlap"], pair["overlap_in"]) == (0.0, 0.0, 0.0)
    assert pair["euclidean"] > 0


def test_one_adapter_twice_is_told(workshop, mediator):
    experts = [*adapters(workshop), {"name": "twin", "model": "./lora"}]
    workshop.recipe(experts=experts)
    run = mediator("kinship", "recipe.yaml", "--metric", "cosine", "--json")
    assert "lora and twin are the same adapter" in run.err
    found = json.loads(run.out)
    assert found["same"] == [["lora", "twin"]]
    pair = next(pair for pair in found["pairs"] if pair["experts"] == ["lora", "twin"])
    assert pair["euclidean"] == 0.0
    assert (pair["cosine"], pair["pcc"], pair["overlap"]) == pytest.approx((1.0, 1.0, 1.0))
    workshop.recipe(experts=[{"name": n, "model": "./a"} for n in ("x", "y")])
    assert "x and y are the same model" in mediator("kinship", "recipe.yaml").err


def test_overlap_is_of_plain_adapters_alone(workshop, refused, report):
    experts = adapters(workshop)
    found = report("--metric", "overlap", experts=experts)
    best = max(found["pairs"], key=lambda pair: pair["overlap"])
    assert set(found["tree"][0]["left"] + found["tree"][0]["right"]) == set(best["experts"])
    words = ("kinship", "recipe.yaml", "--metric", "overlap")
    refused("--int8", "rounds every entry", "leave it out", *words, "--int8")
    workshop.recipe(experts=[*experts, {"name": "a", "model": "./a"}])
    refused("recipe.yaml:3 experts[3].model", "a is a full checkpoint, no adapter", "extract-lora", *words)


def test_an_adapter_with_more_than_factors_is_compared_as_a_whole(workshop, report):
    experts = adapters(workshop)
    norm = "base_model.model.model.norm.weight"
    file = workshop.folder / "lora" / "adapter_model.safetensors"
    edit_tensors(file, put(norm, workshop.base["model.norm.weight"].float() + 1))
    (workshop.folder / "lora" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "modules_to_save": ["norm"]})
    )
    found = report(experts=experts)
    assert not found["low_rank"]
    assert found["pairs"][0]["overlap"] is None


def test_a_factor_that_is_not_finite_is_refused(workshop, refused):
    experts = adapters(workshop)
    name = "base_model.model.model.layers.2.mlp.up_proj.lora_B.weight"
    file = workshop.folder / "other" / "adapter_model.safetensors"
    edit_tensors(file, lambda tensors: tensors[name].fill_(float("nan")))
    workshop.recipe(experts=experts)
    place = f"{file}: model.layers.2.mlp.up_proj.weight"
    refused(place, "factor B of expert other holds NaN", "diverged", "kinship", "recipe.yaml")


def test_many_experts_are_told_by_their_ends(workshop, mediator):
    for n in range(14):
        write_adapter(workshop.folder / "many" / f"task{n}", n % 13)
    workshop.recipe(experts={"from": "./many"})
    run = mediator("kinship", "recipe.yaml", "--metric", "overlap", "--plot", "kin.png")
    assert run.code == 0, run.err
    assert run.out.startswith("kinship of all pairs: overlap of subspaces, from the adapters' factors\n")
    nearest = next(line for line in run.out.splitlines() if line.split()[:3] == ["task0", "+", "task13"])
    assert nearest.split()[3] == "1.000"
    tree = run.out.split("family tree:\n")[1].splitlines()[:14]
    assert sorted(line.split()[0] for line in tree) == sorted(f"task{n}" for n in range(14))


def test_answers_need_rows(workshop, refused):
    workshop.recipe()
    words = ("kinship", "recipe.yaml", "--metric", "output")
    refused("--metric output", "there is nothing to answer", "add --rows", *words)


def test_answers_are_compared_where_rows_are_given(shop, mediator):
    shop.recipe(experts=[{"name": n, "model": f"./{m}"} for n, m in (("a", "a"), ("lora", "lora"), ("twin", "lora"))])
    rows = [{"prompt": "two plus", "answer": "two"}, {"prompt": "a good film", "answer": "good"}]
    (shop.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = mediator("kinship", "recipe.yaml", "--metric", "output", "--rows", "rows.jsonl", "--positions", "3", "--json")
    assert run.code == 0, run.err
    found = json.loads(run.out)
    assert found["n_positions"] == 3
    distances = {tuple(pair["experts"]): pair["output"] for pair in found["pairs"]}
    assert distances["lora", "twin"] == 0.0
    assert distances["a", "lora"] == distances["a", "twin"] > 0
    assert found["tree"][0]["kinship"] == 0.0
    shown = mediator("kinship", "recipe.yaml", "--rows", "rows.jsonl")
    assert "answers compared at 4 tokens" in shown.out

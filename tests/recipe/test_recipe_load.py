"""Recipes: lines, changes from the command line, suggestions, what each rule takes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mediator_cli.errors import RecipeError
from mediator_cli.recipe.schema import AssignSpec
from mediator_cli.recipe.sizes import parse_size

TEXT = """# a comment
version: 1
base: ./base

experts:
- name: a
  model: ./a
- {name: b,
   model: ./b, weight: 2}
conflict:
  denoise: {top_fraction: 0.1}
overrides:
- match: "*"
  extract:
    density: 1e-3
"""


def problems(load, text, *changes):
    with pytest.raises(RecipeError) as caught:
        load(text, *changes)
    return caught.value.problems


@pytest.mark.parametrize(
    ("field", "line"),
    [
        (("version",), 2),
        (("base",), 3),
        (("experts", 0, "model"), 7),
        (("experts", 1, "name"), 8),
        (("experts", 1, "weight"), 9),
        (("conflict", "denoise", "top_fraction"), 11),
        (("overrides", 0, "extract", "density"), 15),
    ],
)
def test_every_field_has_its_line(load, field, line):
    assert load(TEXT).lines[field] == line


@pytest.mark.parametrize(
    ("field", "place"),
    [
        (("experts", 0, "weight"), "6 experts[0].weight"),
        (("assign", "rule"), "1 assign.rule"),
        (("conflict", "unit"), "10 conflict.unit"),
        (("overrides", 0, "average", "method"), "13 overrides[0].average.method"),
    ],
)
def test_a_field_that_is_not_in_the_file_gets_the_line_around_it(load, tmp_path, field, place):
    assert load(TEXT).place(*field) == f"{tmp_path}/recipe.yaml:{place}"


@pytest.mark.parametrize(("written", "value"), [("1e-3", 1e-3), ("1E+0", 1.0), ("5e-1", 0.5), ("0.25", 0.25), ("1", 1)])
def test_numbers_are_read_as_in_yaml_1_2(load, written, value):
    density = load(TEXT.replace("1e-3", written)).recipe.overrides[0].extract.density
    assert (density, type(density)) == (value, float)


@pytest.mark.parametrize("written", ["e3", "1e", "1e-", "'1e-3'"])
def test_what_only_looks_like_a_number_stays_a_text(load, written):
    assert "valid number" in problems(load, TEXT.replace("1e-3", written))[0].message


def test_defaults_stand_in_for_what_is_not_written(load):
    recipe = load("version: 1\nbase: b\nexperts: [{name: a, model: m}]\n").recipe
    assert (recipe.kind, recipe.seed, recipe.tokenizer, recipe.overrides) == ("mediator", 0, "base", ())
    assert (recipe.conflict.measure, recipe.conflict.unit, recipe.conflict.denoise.keep_above_std) == (
        "sign",
        "layer",
        1,
    )
    assert (recipe.assign.rule, recipe.assign.candidates, recipe.average.method) == ("all", "layers", "linear")
    assert (recipe.extract.density, recipe.extract.values, recipe.extract.rescale) == (0.05, "sign", None)
    assert (recipe.experts[0].weight, recipe.output.path, recipe.output.dtype) == (1.0, None, "base")


@pytest.mark.parametrize("denoise", ["none", "{}"])
def test_denoising_may_be_off(load, denoise):
    spec = load(TEXT.replace("{top_fraction: 0.1}", denoise)).recipe.conflict.denoise
    assert (spec.keep_above_std, spec.top_fraction) == (None, None)


def test_relative_paths_start_at_the_recipe(load, tmp_path):
    loaded = load(TEXT)
    assert loaded.resolve("./a") == tmp_path / "a"
    assert str(loaded.resolve("/models/a")) == "/models/a"


@pytest.mark.parametrize("written", ["$HOME/a", "~/a", "${HOME}"])
def test_variables_are_not_expanded(load, tmp_path, written):
    loaded = load(TEXT.replace("./base", written))
    assert str(loaded.resolve(loaded.recipe.base)) == f"{tmp_path}/{written}"


@pytest.mark.parametrize(
    ("change", "read", "value"),
    [
        ("experts[0].weight=2", lambda r: r.experts[0].weight, 2.0),
        ("experts[1].weight=-1e-3", lambda r: r.experts[1].weight, -1e-3),
        ("experts.1.model=./c", lambda r: r.experts[1].model, "./c"),
        ("assign.rule=all", lambda r: r.assign.rule, "all"),
        ("average={method: ties, density: 0.5}", lambda r: r.average.params, {"density": 0.5}),
        ("overrides=[]", lambda r: r.overrides, ()),
        ("overrides[0].extract.values=sign", lambda r: r.overrides[0].extract.values, "sign"),
        ("conflict.denoise=none", lambda r: r.conflict.denoise.top_fraction, None),
        ("output.path=a=b", lambda r: r.output.path, "a=b"),
        ("seed=7", lambda r: r.seed, 7),
    ],
)
def test_a_change_wins_over_the_file(load, change, read, value):
    loaded = load(TEXT, change)
    assert read(loaded.recipe) == value
    assert loaded.changes == (change,)
    assert loaded.text == TEXT


def test_changes_apply_in_their_order(load):
    assert load(TEXT, "seed=1", "seed=2").recipe.seed == 2


def test_a_new_rule_drops_what_belonged_to_the_old_one(load):
    text = TEXT + "assign: {rule: threshold, threshold: 0.4, candidates: all}\n"
    assert load(text, "assign.rule=none").recipe.assign == AssignSpec(rule="none")
    assert load(text, "assign.rule=all").recipe.assign == AssignSpec(rule="all", candidates="all")
    top = load(text, "assign.k=2", "assign.rule=top_k").recipe.assign
    assert top == AssignSpec(rule="top_k", k=2, candidates="all")


def test_a_new_method_drops_what_belonged_to_the_old_one(load):
    text = TEXT + "average: {method: ties, density: 0.5}\n"
    changed = load(text, "average.method=dare_ties", "average.lambda=2").recipe.average
    assert (changed.method, changed.params) == ("dare_ties", {"lambda": 2})


@pytest.mark.parametrize(
    ("old", "new", "field", "hint"),
    [
        ("version", "versoin", "versoin", "did you mean 'version'?"),
        ("name: a", "nmae: a", "experts[0].nmae", "did you mean 'name'?"),
        ("denoise", "denois", "conflict.denois", "did you mean 'denoise'?"),
        ("top_fraction", "fraction", "conflict.denoise.fraction", "did you mean 'top_fraction'?"),
        ("extract", "extrat", "overrides[0].extrat", "did you mean 'extract'?"),
        ("density", "desnity", "overrides[0].extract.desnity", "did you mean 'density'?"),
        (
            "density",
            "zzz",
            "overrides[0].extract.zzz",
            "known: mode, density, select, rescale, values, scale, mask_lambda, directions",
        ),
    ],
)
def test_an_unknown_key_gets_a_suggestion_wherever_it_stands(load, old, new, field, hint):
    found = {
        p.place.split(" ")[-1]: p.hint for p in problems(load, TEXT.replace(old, new, 1)) if "unknown" in p.message
    }
    assert found == {field: hint}


FIELDS = {"threshold": 0.5, "k": 1, "std": 1.0, "units": ["x"], "candidates": "all"}
TAKES = {
    "none": (),
    "all": ("candidates",),
    "threshold": ("threshold", "candidates"),
    "top_k": ("k", "candidates"),
    "mean_std": ("std", "candidates"),
    "listed": ("units",),
}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("rule", TAKES)
def test_a_rule_takes_its_own_fields_only(rule, field):
    needed = {name: FIELDS[name] for name in ("threshold", "k", "units") if name in TAKES[rule]}
    data = {"rule": rule, **needed, field: FIELDS[field]}
    if field in TAKES[rule]:
        assert getattr(AssignSpec.model_validate(data), field) in (FIELDS[field], tuple(needed.get("units", ())))
    else:
        with pytest.raises(ValueError, match=f"rule '{rule}' takes no {field}"):
            AssignSpec.model_validate(data)


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("5GB", 5 * 10**9),
        ("512MiB", 512 * 2**20),
        ("1.5 KiB", 1536),
        ("2gib", 2 * 2**30),
        ("10", 10),
        (7, 7),
        (" 1 TB ", 10**12),
        ("1e3", 1000),
        ("1B", 1),
    ],
)
def test_sizes_are_read_with_their_units(written, size):
    assert parse_size(written) == size


@pytest.mark.parametrize("written", ["", "GB", "five GB", "5 XB", "-1GB", "0", "0.5", "nan", "inf", "infGB", "1e400"])
def test_what_is_no_size_is_refused(written):
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(written)


@given(st.integers(1, 10**9), st.sampled_from(["KB", "KiB", "MB", "MiB", "GB", "GiB"]))
def test_a_whole_number_of_a_unit_is_that_many(number, unit):
    one = (1024 if "i" in unit else 1000) ** ("KMG".index(unit[0]) + 1)
    assert parse_size(f"{number}{unit}") == parse_size(f" {number} {unit.lower()}") == number * one

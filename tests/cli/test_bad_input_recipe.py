"""The bad-input table, recipes: exit code 2, one clear message at the right place, nothing written."""

import json

import pytest

HEAD = "version: 1\nbase: ./base\n"
EXPERTS = "experts: [{name: a, model: ./a}, {name: b, model: ./b}]\n"

BOMB = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9))

RAW = {
    "broken YAML": (HEAD + "experts: [{name: a\n", "recipe.yaml:4", "broken YAML: expected", "indentation"),
    "tab": (HEAD + "average:\n\tmethod: ties\n", "recipe.yaml:4", "broken YAML: found character", "indentation"),
    "control character": (HEAD + "# \x01\n", "recipe.yaml:3", "broken YAML: special characters", "control"),
    "duplicate key": (
        HEAD + EXPERTS + "seed: 1\nseed: 2\n",
        "recipe.yaml:5 seed",
        "given twice, first in line 4",
        "keep one",
    ),
    "nested duplicate": (
        HEAD + EXPERTS + "extract:\n  density: 1\n  density: 0.5\n",
        "recipe.yaml:6 extract.density",
        "given twice, first in line 5",
        "keep one",
    ),
    "python tag": (
        HEAD + EXPERTS + "seed: !!python/object/apply:os.getpid []\n",
        "recipe.yaml:4",
        "YAML tag tag:yaml.org,2002:python/object/apply:os.getpid is not allowed",
        "plain values",
    ),
    "own tag": (HEAD + EXPERTS + "seed: !mine 3\n", "recipe.yaml:4", "YAML tag !mine is not allowed", "plain values"),
    "tag that does not fit": (
        HEAD + EXPERTS + "seed: !!int abc\n",
        "recipe.yaml:4",
        "broken YAML: invalid literal",
        "quotes",
    ),
    "impossible date": (HEAD + EXPERTS + "seed: 2024-13-45\n", "recipe.yaml:4", "broken YAML: month must", "quotes"),
    "endless alias": (HEAD + "experts: &all [*all]\n", "recipe.yaml:3", "nested too deeply", "alias"),
    "alias bomb": (HEAD + BOMB, "recipe.yaml:3", "nested too deeply", "alias"),
    "endless brackets": ("[" * 2_000, "recipe.yaml", "nested too deeply", "is this a recipe?"),
    "list as key": (HEAD + "? [a, b]\n: 1\n", "recipe.yaml:3", "a key is not a text", "quote it"),
    "two documents": (HEAD + EXPERTS + "---\nversion: 1\n", "recipe.yaml:1", "and this is none", "one recipe a file"),
    "empty file": ("", "recipe.yaml:1", "a recipe is a mapping", "version: 1"),
    "list": ("- version: 1\n", "recipe.yaml:1", "a recipe is a mapping", "version: 1"),
    "number as key": (HEAD + EXPERTS + "7: 1\n", "recipe.yaml:4", "a key is not a text", "quote it"),
    "no base": ("version: 1\n" + EXPERTS, "recipe.yaml:1 base", "is required", "add `base`"),
    "no experts": (HEAD, "recipe.yaml:1 experts", "is required", "add `experts`"),
    "no version": ("base: ./base\n" + EXPERTS, "recipe.yaml:1 version", "is required", "add `version`"),
    "other version": ("version: 2\nbase: ./base\n" + EXPERTS, "recipe.yaml:1 version", "should be 1 (got 2)", "schema"),
    "other kind": (
        HEAD + EXPERTS + "kind: dense\n",
        "recipe.yaml:4 kind",
        "should be 'mediator' or 'moe' (got 'dense')",
        "schema",
    ),
    "empty experts": (HEAD + "experts: []\n", "recipe.yaml:3 experts", "at least 1 item", "schema"),
    "expert without model": (
        HEAD + "experts:\n- name: a\n",
        "recipe.yaml:4 experts[0].model",
        "is required",
        "`model`",
    ),
    "expert that is a text": (HEAD + "experts: [a]\n", "recipe.yaml:3 experts[0]", "(got 'a')", "schema"),
    "base that is a number": ("version: 1\nbase: 7\n" + EXPERTS, "recipe.yaml:2 base", "valid string (got 7)", ""),
    "weight that is a text": (
        HEAD + "experts:\n- name: a\n  model: ./a\n  weight: '1'\n",
        "recipe.yaml:6 experts[0].weight",
        "valid number (got '1')",
        "schema",
    ),
    "infinite weight": (
        HEAD + "experts:\n- {name: a, model: ./a, weight: .inf}\n",
        "recipe.yaml:4 experts[0].weight",
        "finite number (got inf)",
        "schema",
    ),
}


@pytest.mark.parametrize("row", RAW.values(), ids=RAW)
def test_a_recipe_that_cannot_be_read_is_refused(workshop, refused, row):
    text, place, message, hint = row
    (workshop.folder / "recipe.yaml").write_text(text)
    refused(place, message, hint)


FORM = {
    "unknown key": ({"averge": {"method": "ties"}}, "averge", "unknown key 'averge'", "did you mean 'average'?"),
    "nested unknown key": ({"extract": {"desnity": 1}}, "extract.desnity", "unknown key", "did you mean 'density'?"),
    "wrong type": ({"seed": "zero"}, "seed", "input should be a valid integer (got 'zero')", "schema"),
    "mapping where a text belongs": ({"tokenizer": {}}, "tokenizer", "input should be a valid string", "schema"),
    "negative seed": ({"seed": -1}, "seed", "greater than or equal to 0 (got -1)", "schema"),
    "extract density 0": ({"extract": {"density": 0}}, "extract.density", "greater than 0 (got 0)", "schema"),
    "extract density 1.5": ({"extract": {"density": 1.5}}, "extract.density", "equal to 1 (got 1.5)", "schema"),
    "extract density nan": ({"extract": {"density": float("nan")}}, "extract.density", "finite number", "schema"),
    "unknown codec": ({"extract": {"values": "int4"}}, "extract.values", "'int8' or 'sign' (got 'int4')", "schema"),
    "unknown rule": ({"assign": {"rule": "best"}}, "assign.rule", "'listed' (got 'best')", "schema"),
    "rule without its field": ({"assign": {"rule": "top_k"}}, "assign", "rule 'top_k' needs k", "schema"),
    "rule with a field of another": ({"assign": {"rule": "all", "k": 1}}, "assign", "'all' takes no k", "schema"),
    "two ways to denoise": (
        {"conflict": {"denoise": {"keep_above_std": 1, "top_fraction": 0.5}}},
        "conflict.denoise",
        "not both",
        "schema",
    ),
    "override of nothing": ({"overrides": [{"match": "*"}]}, "overrides[0]", "average, extract or weights", "schema"),
    "override of all": ({"overrides": [{"weights": {"a": 2}}]}, "overrides[0]", "needs match or layers", "schema"),
    "average of nothing": (
        {"overrides": [{"match": "*", "average": {}}]},
        "overrides[0]",
        "average sets nothing; give a method or parameters",
        "schema",
    ),
    "preset without its method": (
        {"overrides": [{"match": "*", "average": {"preset": "mergekit"}}]},
        "overrides[0]",
        "a preset replaces all parameters of its method",
        "schema",
    ),
    "layers that are none": (
        {"overrides": [{"layers": "0-x", "weights": {"a": 2}}]},
        "overrides[0].layers",
        "'0-x' names no layers; write 3, 0-10 or a list",
        "schema",
    ),
    "layers from last to first": (
        {"overrides": [{"layers": "2-0", "weights": {"a": 2}}]},
        "overrides[0].layers",
        "names no layer",
        "schema",
    ),
    "anchor of a weight": (
        {"overrides": [{"layers": 1, "weights": {"a": [1, "b"]}}]},
        "overrides[0].weights.a[1]",
        "valid number (got 'b')",
        "schema",
    ),
    "weights of nobody": (
        {"overrides": [{"layers": 1, "weights": {}}]},
        "overrides[0].weights",
        "at least 1",
        "schema",
    ),
    "tokenizer of nobody": ({"tokenizer": "expert:zoe"}, "tokenizer", "tokenizer names no expert: 'zoe'", "schema"),
    "tokenizer onion": ({"tokenizer": "onion"}, "tokenizer", "'onion' is not allowed", "base or expert:NAME"),
    "shard size": ({"output": {"shard_size": "5 apples"}}, "output.shard_size", "'5 apples' is not a size", "schema"),
    "unknown dtype": ({"output": {"dtype": "int8"}}, "output.dtype", "(got 'int8')", "schema"),
}


@pytest.mark.parametrize("row", FORM.values(), ids=FORM)
def test_a_field_of_wrong_form_is_refused(workshop, refused, row):
    fields, field, message, hint = row
    text = workshop.recipe(**fields)
    text.write_text(text.read_text().replace("NaN", ".nan"))
    refused(f"recipe.yaml:4 {field}", message, hint)


@pytest.mark.parametrize("name", ["a/b", "..", "", ".hidden", "a b", "a\\b", "x" * 65, "naïve"])
def test_an_unsafe_expert_name_is_refused(workshop, refused, name):
    workshop.recipe(experts=[{"name": name, "model": "./a"}, {"name": "b", "model": "./b"}])
    refused("recipe.yaml:3 experts[0].name", f"{name!r} is not allowed", "letters, digits")


@pytest.mark.parametrize("name", ["dense", "base", "auto", "router", "Dense"])
def test_a_reserved_expert_name_is_refused(workshop, refused, name):
    workshop.recipe(experts=[{"name": name, "model": "./a"}, {"name": "b", "model": "./b"}])
    refused("recipe.yaml:3 experts", f"reserved expert names: {name.lower()}", "schema")


@pytest.mark.parametrize("second", ["a", "A"])
def test_expert_names_that_are_one_file_name_are_refused(workshop, refused, second):
    workshop.recipe(experts=[{"name": "a", "model": "./a"}, {"name": second, "model": "./b"}])
    refused("recipe.yaml:3 experts", "expert names must differ, also on disks that ignore case: a", "schema")


MEANING = {
    "unknown method": ({"average": {"method": "tise"}}, "average.method", "unknown merge method 'tise'", "'ties'?"),
    "unknown parameter": (
        {"average": {"method": "ties", "desnity": 1}},
        "average.desnity",
        "ties has no parameter 'desnity'",
        "did you mean 'density'?",
    ),
    "parameter of a method without": (
        {"average": {"method": "linear", "density": 1}},
        "average.density",
        "linear has no parameter 'density'",
        "known: normalize",
    ),
    "unknown preset": (
        {"average": {"method": "ties", "preset": "mergkit"}},
        "average.preset",
        "ties has no preset 'mergkit'",
        "did you mean 'mergekit'?",
    ),
    "density 0": ({"average": {"method": "ties", "density": 0}}, "average.density", "greater than 0 (got 0)", "ties"),
    "density 1.5": ({"average": {"method": "ties", "density": 1.5}}, "average.density", "(got 1.5)", "methods ties"),
    "density nan": ({"average": {"method": "ties", "density": float("nan")}}, "average.density", "(got nan)", "ties"),
    "density as a text": ({"average": {"method": "ties", "density": "1"}}, "average.density", "(got '1')", "ties"),
    "infinite lambda": (
        {"average": {"method": "ties", "lambda": float("inf")}},
        "average.lambda",
        "finite number (got inf)",
        "methods ties",
    ),
    "method of an override": (
        {"overrides": [{"match": "*", "average": {"method": "slrp"}}]},
        "overrides[0].average.method",
        "unknown merge method 'slrp'",
        "did you mean 'slerp'?",
    ),
    "override that matches nothing": (
        {"overrides": [{"match": "*.attn.*", "extract": {"density": 1}}]},
        "overrides[0].match",
        "'*.attn.*' matches no tensor",
        "tensor names look like model.",
    ),
    "unknown unit": (
        {"assign": {"rule": "listed", "units": ["model.layers.0", "model.layers.7"]}},
        "assign.units[1]",
        "'model.layers.7' matches no unit",
        "did you mean 'model.layers.",
    ),
}


@pytest.mark.parametrize("row", MEANING.values(), ids=MEANING)
def test_a_field_that_means_nothing_here_is_refused(workshop, refused, row):
    fields, field, message, hint = row
    text = workshop.recipe(**fields)
    text.write_text(text.read_text().replace("NaN", ".nan").replace("Infinity", ".inf"))
    refused(f"recipe.yaml:4 {field}", message, hint)


def test_slerp_of_three_experts_is_refused(workshop, refused):
    experts = [{"name": n, "model": f"./{n}"} for n in ("a", "b", "lora")]
    workshop.recipe(experts=experts, average={"method": "slerp"})
    refused("recipe.yaml:3 experts", "slerp merges 2 experts, the recipe has 3", "choose another method")


@pytest.mark.parametrize(
    "rule", [{"rule": "mean_std"}, {"rule": "top_k", "k": 1}, {"rule": "threshold", "threshold": 0}]
)
def test_a_rule_that_compares_experts_is_refused_for_one(workshop, refused, rule):
    workshop.recipe(experts=[{"name": "a", "model": "./a"}], assign=rule)
    refused("recipe.yaml:4 assign.rule", f"rule {rule['rule']} compares experts, the recipe has one", "use rule none")


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "dare_linear"])
def test_weights_that_sum_to_zero_are_refused_where_they_are_normalised(workshop, refused, method):
    experts = [{"name": "a", "model": "./a", "weight": 0.3}, {"name": "b", "model": "./b", "weight": -0.3}]
    workshop.recipe(experts=experts, average={"method": method, "normalize": True})
    refused("recipe.yaml:3 experts", f"the weights sum to zero, and {method} divides by their sum", "normalize: false")


def test_a_missing_prompts_file_is_refused(workshop, refused):
    workshop.recipe(experts=[{"name": "a", "model": "./a", "prompts": "a.jsonl"}, {"name": "b", "model": "./b"}])
    refused("recipe.yaml:3 experts[0].prompts", f"no such file: {workshop.folder}/a.jsonl", "check the path")


SET = {
    "no value": ("assign.rule", "assign.rule", "is not field=value", "--set assign.rule=all"),
    "no field": ("=3", "=3", "is not field=value", "--set assign.rule=all"),
    "no field but brackets": ("[]=3", "[]=3", "is not field=value", "--set assign.rule=all"),
    "no such expert": ("experts[2].weight=1", "experts[2].weight=1", "has no field '2' there", "mediator schema"),
    "power as an index": ("experts[²].weight=1", "experts[²].weight=1", "has no field '²' there", "mediator schema"),
    "below a value": ("base.path=x", "base.path=x", "has no field 'path' there", "mediator schema"),
    "value that is not YAML": ("seed={", "seed={", "the value is not YAML", "quote it"),
    "value with a tag": ("seed=!!python/none", "seed=!!python/none", "the value is not YAML", "quote it"),
    "impossible date": ("seed=2024-13-45", "seed=2024-13-45", "the value is not YAML", "quote it"),
    "bad field": ("asign.rule=all", "asign", "unknown key 'asign'", "did you mean 'assign'?"),
    "bad value": ("assign.rule=best", "assign.rule", "(got 'best')", "schema"),
    "bad value in a list": ("experts[0].name=a/b", "experts[0].name", "'a/b' is not allowed", "letters"),
    "bad list": ("experts=[{name: a/b, model: ./a}]", "experts[0].name", "'a/b' is not allowed", "letters"),
    "bad parameter": ("average.density=2", "average.density", "linear has no parameter 'density'", "normalize"),
}


@pytest.mark.parametrize("row", SET.values(), ids=SET)
def test_a_change_on_the_command_line_is_refused_as_such(workshop, refused, row):
    change, place, message, hint = row
    workshop.recipe()
    refused(f"--set {place}", message, hint, "merge", "recipe.yaml", "-o", "out", "--set", change)


def test_a_missing_recipe_is_refused(refused):
    refused("no.yaml", "cannot read the recipe: no such file or directory", "check the path", "merge", "no.yaml")


def test_a_folder_is_not_a_recipe(refused):
    refused("base", "cannot read the recipe: is a directory", "check the path", "merge", "base")


def test_a_recipe_that_is_not_utf8_is_refused(workshop, refused):
    (workshop.folder / "recipe.yaml").write_bytes("version: 1 # für\n".encode("latin-1"))
    refused("recipe.yaml", "is not UTF-8 text", "save it as UTF-8")


def test_a_huge_file_is_not_read_as_a_recipe(workshop, refused):
    (workshop.folder / "recipe.yaml").write_bytes(b"#" * 1_000_001)
    refused("recipe.yaml", "is larger than 1 MB", "is this a recipe?")


MANY_FORM = (
    HEAD.replace("./base", "7") + "experts:\n- {name: a/b, model: ./a, wieght: 2}\nseed: x\nextract: {density: 2}\n"
)
MANY_MEANING = """version: 1
average: {method: tise}
experts:
- {name: a, model: ./gone}
- {name: b, model: ./lost, prompts: ./no.jsonl}
base: ./base
overrides: [{match: nothing, extract: {density: 1}}]
assign: {rule: listed, units: [nowhere]}
"""


def places(run):
    return [line.split(": ")[1] for line in run.err.splitlines() if line.startswith("error: ")]


def test_all_problems_of_form_are_told_in_the_order_of_lines(workshop, mediator):
    (workshop.folder / "recipe.yaml").write_text(MANY_FORM)
    fields = ["2 base", "4 experts[0].name", "4 experts[0].wieght", "5 seed", "6 extract.density"]
    run = mediator("merge", "recipe.yaml")
    assert run.code == 2
    assert places(run) == [f"recipe.yaml:{field}" for field in fields]


def test_all_problems_of_meaning_are_told_in_the_order_of_lines(workshop, mediator):
    (workshop.folder / "recipe.yaml").write_text(MANY_MEANING)
    fields = [
        "2 average.method",
        "4 experts[0].model",
        "5 experts[1].prompts",
        "5 experts[1].model",
        "7 overrides[0].match",
        "8 assign.units[0]",
    ]
    run = mediator("merge", "recipe.yaml")
    assert run.code == 2
    assert places(run) == [f"recipe.yaml:{field}" for field in fields]


@pytest.mark.parametrize("text", [MANY_FORM, MANY_MEANING])
def test_validate_lists_the_same_problems_as_json(workshop, mediator, text):
    (workshop.folder / "recipe.yaml").write_text(text)
    run, plain = mediator("validate", "recipe.yaml", "--json"), mediator("validate", "recipe.yaml")
    report = json.loads(run.out)
    assert (run.code, run.err, report["valid"]) == (2, "", False)
    assert [problem["place"].split(": ")[0] for problem in report["problems"]] == places(plain)
    assert all(problem["message"] and problem["hint"] for problem in report["problems"])


def test_nothing_is_written_while_there_are_problems(workshop, refused):
    (workshop.folder / "recipe.yaml").write_text(MANY_MEANING)
    refused("recipe.yaml:8 assign.units[0]", "'nowhere' matches no unit", "known: model.embed_tokens")

"""The pages of the methods: complete for every method, with examples that are recipes."""

import json

import pytest
import yaml

from mediator_cli.cli.method_pages import cost_in_words, page_of
from mediator_cli.methods.method import ResolvedMethod
from mediator_cli.methods.registry import methods, resolve_method
from mediator_cli.recipe.load import load_recipe

PAGES = {name: page_of(method) for name, method in methods().items()}
each_page = pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)


@each_page
def test_a_page_says_what_when_and_when_not(page):
    assert page.formula
    assert page.apt.startswith("Apt when")
    assert page.not_apt.startswith("Not apt when")
    assert page.reference.startswith("https://")


@each_page
def test_a_method_that_is_a_reading_says_what_is_uncertain(page):
    assert bool(page.uncertain) == page.name.endswith("_like")


@each_page
def test_linear_algebra_tells_its_cost(page):
    assert page.cost or page.scope != "matrix" or page.works_on == "adapters"


@each_page
def test_the_example_is_a_recipe_at_the_defaults(page, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(page.example)
    recipe = load_recipe(file).recipe
    given = {k: v for k, v in yaml.safe_load(page.example)["average"].items() if k != "method"}
    found = resolve_method(recipe.average.method, None, given, str)
    assert isinstance(found, ResolvedMethod)
    assert found.params == resolve_method(page.name, None, {}, str).params
    fewest, most = methods()[page.name].n_inputs
    assert fewest <= len(recipe.experts) <= (most or 2)


@pytest.mark.parametrize(
    ("name", "scope", "needs", "cost"),
    [
        ("linear", "element", "1+ experts", "1 pass"),
        ("ties", "model", "1+ experts, a base", "3 passes"),
        ("breadcrumbs", "row", "1+ experts, a base", "1 pass"),
        ("slerp", "tensor", "2 experts", "2 passes"),
        ("tsv_m", "matrix", "1+ experts, a base", "1 pass, matrices"),
        ("ota", "element", "1+ experts, a base, second moments", "1 pass"),
        ("lora_dare_ties", "matrix", "1+ experts, adapters, random numbers", "factors alone"),
    ],
)
def test_scope_needs_and_cost_are_told_in_words(name, scope, needs, cost):
    page = PAGES[name]
    assert (page.scope, page.needs, cost_in_words(page)) == (scope, needs, cost)


def test_the_list_has_every_method_as_json(mediator):
    found = json.loads(mediator("methods", "--json").out)
    assert [page["name"] for page in found] == sorted(PAGES)


def test_one_method_is_explained(mediator):
    told = mediator("methods", "tsv_m").out
    for text in ("Apt when", "Not apt when", "Elsewhere: ", "Cost: ", "rank", "shared | full", "method: tsv_m"):
        assert text in told
    assert "Apt: Apt" not in told

"""How servers are asked and what is said of it; no server runs here."""

import json
from pathlib import Path

import pytest

from scripts.servers import serving_report
from scripts.servers.ask import compare
from scripts.servers.environment import needed
from scripts.servers.reference import Reference
from scripts.servers.report import README, cell, with_tables
from scripts.servers.results import read_results
from scripts.servers.serving import RESULTS as SERVED
from scripts.serving import report as serving

CHECKOUT = Path(__file__).parents[1]
REFERENCE = Reference(tokens=[[1, 2], [3, 4]], logprobs=[[-1.0, -2.0], [-3.0, -4.0]], leads=[[0.5, 0.1], [0.7, 0.2]])


def test_the_readme_says_what_was_found():
    text = README.read_text(encoding="utf-8")
    assert with_tables(text, read_results()) == text


def test_tables_of_served_bundles_are_those_of_the_results():
    page, results = serving_report.README.read_text(encoding="utf-8"), json.loads(SERVED.read_text(encoding="utf-8"))
    assert serving_report.with_table(page, results) == page
    page = serving.README.read_text(encoding="utf-8")
    assert serving.with_tables(page, json.loads(serving.RESULTS.read_text(encoding="utf-8"))) == page


def test_packages_that_apply_are_kept_without_their_conditions():
    named = ["torch==2.13.0+cpu", "torchvision; python_version > '3'", "regex", "av; extra == 'audio'"]
    named += ["fastapi[standard]<1,>=0.1; python_version > '3'", "six; python_version < '3'"]
    assert needed(named) == ["regex", "fastapi[standard]<1,>=0.1"]


def test_the_same_answers_are_right():
    found = compare(REFERENCE, {"tokens": REFERENCE.tokens, "logprobs": [[-1.0001, -2.0], [-3.0, -4.0]]})
    assert (found.status, found.equal, found.first, found.lead) == ("right", 1.0, None, None)
    assert found.apart == pytest.approx(1e-4)


def test_other_answers_are_wrong_and_the_first_difference_is_named():
    found = compare(REFERENCE, {"tokens": [[1, 9], [3, 4]], "logprobs": [[-1.0, -2.5], [-3.0, -4.0]]})
    assert (found.status, found.apart, found.equal, found.first, found.lead) == ("wrong", 0.5, 0.5, 1, 0.1)


def test_answers_are_compared_up_to_their_end():
    reference = Reference([[1, 2, 7], [2, 5, 6]], [[-1.0] * 3] * 2, [[0.5] * 3] * 2, ends=(2,))
    same = {"tokens": [[1], [2, 9, 9]], "logprobs": reference.logprobs}
    assert compare(reference, same).equal == 1.0
    longer = compare(reference, {"tokens": [[1, 4], [2]], "logprobs": reference.logprobs})
    assert (longer.equal, longer.first, longer.lead) == (0.5, 1, 0.5)


def test_what_a_server_does_is_said_in_a_few_words():
    assert cell({"status": "right", "apart": 1e-5, "equal": 1.0}) == "right"
    assert cell({"status": "wrong", "apart": 3.0, "equal": 0.25}) == "**wrong**: 25% of the answers equal"
    assert cell({"status": "refused", "why": "ValueError: Can not map tensor 'x'"}).startswith("refused: the converter")


def test_results_are_valid_json_of_known_states():
    states = {result[server]["status"] for result in read_results().values() for server in ("vllm", "llama_cpp")}
    assert states <= {"right", "wrong", "refused"}
    assert json.dumps(read_results())

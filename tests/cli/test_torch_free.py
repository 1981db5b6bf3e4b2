"""What must start fast: help, inspect and schemas of bundles load without numpy, all that builds without torch."""

import os
import subprocess
import sys

import pytest

from mediator_cli.bundle.manifest import read_manifest

HEAVY = ("torch", "numba", "numpy", "transformers", "safetensors", "matplotlib")
SLOW = ("torch", "transformers", "fsspec", "sklearn")
COMMANDS = (
    "init", "validate", "plan", "analyze-conflicts", "kinship", "merge", "inspect", "verify", "fit-router", "route",
    "generate", "chat", "evaluate", "ablate", "methods", "schema", "extract-lora", "push", "pull", "export", "serve",
)  # fmt: skip
PROGRAM = """
import sys
{}
loaded = [name for name in {!r} if name in sys.modules]
assert not loaded, loaded
"""
CALLS = """
from mediator_cli.cli.app import main
for words in {!r}:
    sys.argv = ["mediator", *words]
    try:
        main()
    except SystemExit as exit_:
        assert not exit_.code, (words, exit_.code)
"""


def run_without(names, body, **environment):
    program = [sys.executable, "-c", PROGRAM.format(body, names)]
    return subprocess.run(program, capture_output=True, text=True, env=os.environ | environment)


def run_without_torch(body):
    return run_without(HEAVY, body)


def test_help_and_version_need_no_torch():
    calls = [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)]
    run = run_without_torch(CALLS.format(calls))
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("Usage: mediator") == 1 + len(COMMANDS)


def test_inspect_needs_no_torch(workshop):
    bundle = workshop.merge("out", assign={"rule": "all"})
    folders = [str(folder) for folder in (bundle, workshop.folder / "base", workshop.folder / "lora")]
    calls = [["inspect", folder, *more] for folder in folders for more in ([], ["--json"], ["--tensors"])]
    run = run_without_torch(CALLS.format(calls))
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(": bundle, 29 tensors") == 2


def test_the_schemas_of_a_bundle_need_no_torch():
    run = run_without_torch(CALLS.format([["schema", "manifest"], ["schema", "conflicts"]]))
    assert run.returncode == 0, run.stderr
    assert all(f'"title": "{name}"' in run.stdout for name in ("Manifest", "ConflictReport"))


@pytest.mark.parametrize("measures", ["--no-calibrate", pytest.param("--calibrate", marks=pytest.mark.slow)])
def test_what_looks_before_a_merge_needs_no_torch(workshop, measures):
    recipe = str(workshop.recipe())
    # What can be routed is found out with torch, once.
    workshop.merge("first")
    calls = [["validate", recipe], ["plan", recipe, measures], ["methods"], ["methods", "ties"], ["schema"]]
    run = run_without(SLOW, CALLS.format(calls))
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("rule", ["none", "all"])
def test_a_merge_needs_no_torch_once_it_is_known_what_can_be_routed(workshop, monkeypatch, rule):
    recipe, notes = str(workshop.recipe(assign={"rule": rule})), workshop.folder / "notes"
    if rule == "all":
        # What can be routed is found out with torch, which this process has loaded.
        monkeypatch.setenv("MEDIATOR_CACHE", str(notes))
        workshop.merge("first", assign={"rule": rule})
        assert (notes / "mixable").is_dir()
    out = str(workshop.folder / "out")
    calls = [["merge", recipe, "-o", out], ["push", out, "org/name", "--dry-run"]]
    run = run_without(SLOW, CALLS.format(calls), MEDIATOR_CACHE=str(notes))
    assert run.returncode == 0, run.stderr
    routed = [decision == "route" for decision in read_manifest(workshop.folder / "out").assignment.values()]
    assert routed
    assert all(routed) == any(routed) == (rule == "all")


@pytest.mark.parametrize(
    "modules",
    [
        "mediator_cli, mediator_cli.errors, mediator_cli.recipe.load, mediator_cli.checkpoint.header",
        "mediator_cli.bundle.manifest, mediator_cli.checkpoint.source, mediator_cli.checkpoint.adapter.open",
        "mediator_cli.checkpoint.layout, mediator_cli.checkpoint.write, mediator_cli.plan.sources",
    ],
)
def test_schemas_and_headers_need_no_torch(modules):
    run = run_without_torch(f"import {modules}")
    assert run.returncode == 0, run.stderr


def test_the_package_loads_its_names_when_asked():
    body = "import mediator_cli\nfrom mediator_cli import MediatorError, load_recipe\nassert load_recipe.__module__"
    assert run_without_torch(body).returncode == 0
    assert run_without_torch("import mediator_cli\nmediator_cli.nothing").stderr.endswith(
        "has no attribute 'nothing'\n"
    )

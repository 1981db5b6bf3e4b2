"""The example workflow: safe by the rules that GitHub gives, its commands exist, and its check does what it says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from mediator_cli.cli.app import app

FILE = Path(__file__).resolve().parent.parent / ".github" / "workflows" / "merge-example.yml"
TEXT = FILE.read_text(encoding="utf-8")
# YAML 1.1 reads the key `on` as true.
FLOW = {("on" if key is True else key): value for key, value in yaml.safe_load(TEXT).items()}
STEPS = [(job, step) for job, facts in FLOW["jobs"].items() for step in facts["steps"]]
GIT = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]


def script_of(name):
    (script,) = [step["run"] for _, step in STEPS if step.get("name") == name]
    return script


def test_it_runs_on_changed_recipes_and_on_tags_alone():
    assert set(FLOW) == {"name", "on", "permissions", "concurrency", "env", "jobs"}
    assert FLOW["on"] == {
        "pull_request": {"paths": ["recipes/**.yaml", "!recipes/smollm2/**"]},
        "push": {"tags": ["merge-**"]},
    }
    conditions = {job: facts["if"] for job, facts in FLOW["jobs"].items()}
    assert conditions == {"check": "github.event_name == 'pull_request'", "publish": "github.event_name == 'push'"}


def test_it_may_read_the_repository_and_nothing_else():
    assert FLOW["permissions"] == {"contents": "read"}
    assert not any("permissions" in job for job in FLOW["jobs"].values())
    checkouts = [step for _, step in STEPS if step.get("uses", "").startswith("actions/checkout@")]
    assert [step["with"]["persist-credentials"] for step in checkouts] == [False, False]


def test_every_step_runs_or_uses_and_actions_are_pinned_to_commits():
    assert all(("run" in step) != ("uses" in step) for _, step in STEPS)
    used = [step["uses"] for _, step in STEPS if "uses" in step]
    assert used
    assert all(re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", name) for name in used)
    assert len(re.findall(r"uses: \S+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", TEXT, flags=re.MULTILINE)) == len(used)


def test_the_token_is_seen_by_the_steps_that_need_it_and_never_by_pull_requests():
    seeing = [(job, step["name"]) for job, step in STEPS if "secrets." in str(step)]
    assert seeing == [("publish", "Merge"), ("publish", "Publish")]
    assert "secrets." not in str({key: value for key, value in FLOW.items() if key != "jobs"})
    assert FLOW["jobs"]["publish"]["environment"] == "hub"


def test_no_text_of_others_is_pasted_into_a_script():
    assert all("${{" not in step.get("run", "") for _, step in STEPS)


def commands():
    """Give every call of mediator in a script: its command and its options."""
    text = "\n".join(step.get("run", "") for _, step in STEPS).replace("\\\n", " ")
    for words in re.findall(r"\bmediator ([a-z-]+)([^\n|;>]*)", text):
        yield words[0], re.findall(r"(?<=\s)--?[a-z-]+", words[1])


def test_the_commands_exist_with_their_options():
    known = typer.main.get_command(app).commands
    found = list(commands())
    assert {name for name, _ in found} == {"validate", "plan", "merge", "verify", "inspect"}
    for name, options in found:
        assert set(options) <= {option for p in known[name].params for option in p.opts}, name


def test_the_upload_command_exists_with_its_options():
    (line,) = re.findall(r"^hf upload .*$", script_of("Publish"), flags=re.MULTILINE)
    hf = Path(sys.executable).with_name("hf")
    shown = subprocess.run([hf, "upload", "--help"], capture_output=True, text=True, check=True).stdout
    options = re.findall(r"--[a-z-]+", line)
    assert options
    assert all(option in shown for option in options)


@pytest.fixture
def change(tmp_path, workshop):
    """Make a repository whose head is the merge of a pull request that changes some recipes."""
    git = [*GIT, "-C", str(workshop.folder)]

    def make(**recipes):
        subprocess.run([*git, "init", "-q", "-b", "main"], check=True)
        (workshop.folder / "recipes" / "smollm2").mkdir(parents=True)
        (workshop.folder / "recipes" / "old.yaml").write_text("broken: [")
        for files in ({}, recipes):
            for name, text in files.items():
                (workshop.folder / "recipes" / name).write_text(text)
            subprocess.run([*git, "add", "recipes"], check=True)
            subprocess.run([*git, "commit", "-qm", "x"], check=True)
        return workshop.folder

    return make


def run_step(name, folder, **variables):
    summary, variable_file = folder / "summary.md", folder / "env.txt"
    bin_folder = Path(sys.executable).parent
    env = os.environ | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "GITHUB_STEP_SUMMARY": str(summary)}
    env |= {"GITHUB_ENV": str(variable_file), "OMP_NUM_THREADS": "1", **variables}
    words = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script_of(name)]
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
    told = {path: path.read_text() if path.exists() else "" for path in (summary, variable_file)}
    return done, told[summary], dict(line.split("=", 1) for line in told[variable_file].splitlines())


# A static merge, since only routing loads transformers, which takes seconds.
GOOD = """version: 1
base: ../base
experts:
  - {name: a, model: ../a}
  - {name: b, model: ../b}
assign: {rule: none}
"""
needs_shell = pytest.mark.skipif(not (shutil.which("bash") and shutil.which("git")), reason="needs bash and git")


@needs_shell
def test_changed_recipes_are_checked_with_a_note_at_each_faulty_line(change):
    bad = GOOD.replace("../b}", "../gone}").replace("version: 1", "version: 1\nexpets: 3")
    folder = change(**{"good one.yaml": GOOD, "bad,1.yaml": bad, "smollm2/x.yaml": "broken: ["})
    done, summary, _ = run_step("Check the changed recipes", folder)
    assert done.returncode == 1
    notes = [line for line in done.stderr.splitlines() if line.startswith("::")]
    assert [note.split("::")[1] for note in notes] == [
        "error file=recipes/bad%2C1.yaml,line=2",
        "error file=recipes/bad%2C1.yaml,line=6",
    ]
    assert "unknown key 'expets' (did you mean 'experts'?)" in notes[0]
    assert "### recipes/bad,1.yaml: not valid" in summary
    assert "### recipes/good one.yaml: valid" in summary
    assert summary.count("3 (5 units, 29 tensors)") == summary.count("```text") == 1
    assert "old.yaml" not in summary
    assert "smollm2" not in summary


@needs_shell
def test_without_changed_recipes_the_check_passes(change):
    folder = change(**{"notes.md": "text"})
    done, summary, _ = run_step("Check the changed recipes", folder)
    assert (done.returncode, summary) == (0, ""), done.stderr


@needs_shell
@pytest.mark.parametrize(
    ("tag", "recipe", "repo"),
    [("merge-one", "recipes/one.yaml", "me/one"), ("merge-llama/two@3", "recipes/llama/two.yaml", "me/llama-two")],
)
def test_a_tag_names_recipe_and_repository(tmp_path, tag, recipe, repo):
    (tmp_path / recipe).parent.mkdir(parents=True)
    (tmp_path / recipe).write_text(GOOD)
    name = "Find the recipe that the tag names"
    done, _, variables = run_step(name, tmp_path, GITHUB_REF_NAME=tag, HF_OWNER="me")
    assert done.returncode == 0, done.stderr
    assert (variables["RECIPE"], variables["REPO"]) == (recipe, repo)
    assert re.fullmatch("[0-9a-f]{16}", variables["SOURCES"])


@needs_shell
@pytest.mark.parametrize(
    ("tag", "owner", "told"), [("merge-no", "me", "does not exist"), ("merge-one", "", "HF_OWNER")]
)
def test_a_tag_that_names_nothing_fails(tmp_path, tag, owner, told):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "one.yaml").write_text(GOOD)
    done, _, variables = run_step("Find the recipe that the tag names", tmp_path, GITHUB_REF_NAME=tag, HF_OWNER=owner)
    assert done.returncode == 1
    assert told in done.stdout
    assert variables == {}

"""The examples of the README are valid, and the options in them exist."""

import re
import subprocess
from pathlib import Path

import pytest
import typer
import yaml

import mediator_cli.executors
from mediator_cli.cli.app import app
from mediator_cli.executors.place import find_place

README = (Path(mediator_cli.executors.__file__).parent / "README.md").read_text()
EXAMPLES = re.findall(r"```(bash|yaml)\n(.*?)```", README, re.S)


def options():
    merge = typer.main.get_command(app).commands["merge"]
    return {name for parameter in merge.params for name in parameter.opts}


def commands():
    script, job, ray = (text for _, text in EXAMPLES)
    container = yaml.safe_load(job)["spec"]["template"]["spec"]["containers"][0]
    return [
        script.replace("\\\n", " ").splitlines()[-1].removeprefix("srun ").replace('"$SLURM_CPUS_PER_TASK"', "32"),
        " ".join(container["command"] + container["args"]),
        yaml.safe_load(ray)["spec"]["entrypoint"],
    ]


@pytest.mark.parametrize("command", commands(), ids=["SLURM", "Kubernetes", "KubeRay"])
def test_the_options_of_each_example_exist(command):
    words = command.split()
    assert words[:2] == ["mediator", "merge"]
    assert {word for word in words if word.startswith("-")} <= options()
    assert typer.main.get_command(app).commands["merge"].make_context("merge", words[2:]).params["resume"]


def test_every_option_that_the_text_names_exists():
    assert set(re.findall(r"`(--[a-z-]+)", README)) <= options()


def test_the_script_for_slurm_is_one_of_bash():
    assert subprocess.run(["bash", "-n"], input=EXAMPLES[0][1], text=True, check=False).returncode == 0


def test_the_pods_of_kubernetes_know_their_place():
    job = yaml.safe_load(EXAMPLES[1][1])
    assert (job["kind"], job["spec"]["completionMode"]) == ("Job", "Indexed")
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    given = {
        entry["name"]: entry.get("value", "a word") for entry in job["spec"]["template"]["spec"]["containers"][0]["env"]
    }
    place = find_place(given | {"JOB_COMPLETION_INDEX": "3"})
    assert (place.rank, place.world) == (3, job["spec"]["completions"])


def test_the_workers_of_kuberay_all_fit():
    spec = yaml.safe_load(EXAMPLES[2][1])["spec"]
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert f"--ray-workers {group['replicas']} " in spec["entrypoint"]
    (container,) = group["template"]["spec"]["containers"]
    assert f"--workers {container['resources']['limits']['cpu']} " in spec["entrypoint"]
    assert f"ray=={spec['rayClusterSpec']['rayVersion']}\n" in Path("scripts/constraints.txt").read_text()

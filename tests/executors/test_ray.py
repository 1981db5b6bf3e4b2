"""Two workers on a Ray cluster of two nodes give the bytes of one process, whatever dies in the middle."""

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import all_files
from shared_merge import MEASURED, SHARDED

from mediator_cli import load_recipe
from mediator_cli.errors import OutputError
from mediator_cli.executors import ray_job
from mediator_cli.executors.ray_job import Cluster, Job, merge_on_ray

DRIVER = """
import sys
import ray_workers
from mediator_cli.executors import ray_job
ray_job.work = ray_workers.slow
from mediator_cli.cli.app import main
sys.argv = ["mediator", "merge", "recipe.yaml", "-o", "out", "--executor", "ray", "--address", sys.argv[1]]
main()
"""


def make_job(folder: Path, **changes) -> Job:
    loaded = load_recipe(folder / "recipe.yaml")
    facts = {"conflicts": None, "overwrite": False, "resume": False, "memory": 1 << 30, "patience": 60.0}
    return Job(loaded.path, loaded.text, (), folder / "out", **{**facts, **changes})


@pytest.fixture
def expected(workshop):
    workshop.merge("recipe", **MEASURED, **SHARDED)
    (workshop.folder / "recipe").rename(workshop.folder / "expected")
    return all_files(workshop.folder / "expected")


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one CPU, whose workers can import the tests' modules."""
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    found = importlib.import_module("ray.cluster_utils").Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    found.add_node(num_cpus=1)
    found.wait_for_nodes()
    yield found
    found.shutdown()
    os.environ.clear()
    os.environ.update(before)


def is_same(folder, expected):
    """But for the model card and the manifest, which have the name of the folder."""
    found = all_files(folder)
    different = {name for name in found | expected if found.get(name) != expected.get(name)}
    return different <= {"README.md", "routing_manifest.json"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_nodes_give_the_same_bytes(workshop, expected, cluster):
    merge_on_ray(make_job(workshop.folder), Cluster(cluster.address))
    assert is_same(workshop.folder / "out", expected)
    assert not list(workshop.folder.glob(".out*"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_worker_that_dies_is_started_anew(workshop, expected, cluster, monkeypatch):
    told = []
    monkeypatch.setattr(ray_job, "work", importlib.import_module("ray_workers").dying)
    merge_on_ray(make_job(workshop.folder), Cluster(cluster.address), told.append)
    assert len(told) == 1
    assert "worker 1 died" in told[0]
    assert is_same(workshop.folder / "out", expected)
    assert not list(workshop.folder.glob(".out*"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_after_the_driver_was_killed_another_goes_on(workshop, expected, cluster):
    words = [sys.executable, "-c", DRIVER, cluster.address]
    driver = subprocess.Popen(words, cwd=workshop.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = workshop.folder / ".out.journal" / "steps-00000.jsonl"
    while not (journal.is_file() and journal.read_bytes()):
        assert driver.poll() is None
        time.sleep(0.05)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    # Ray ends the workers of a driver that died a moment later; until then the folder is locked.
    for _ in range(100):
        with contextlib.suppress(OutputError):
            merge_on_ray(make_job(workshop.folder, resume=True), Cluster(cluster.address))
            break
        time.sleep(0.5)
    assert is_same(workshop.folder / "out", expected)
    assert not list(workshop.folder.glob(".out*"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_a_worker_cannot_do_is_told(workshop, cluster):
    workshop.recipe(**MEASURED)
    with pytest.raises(OutputError, match="3 workers of 1 CPUs do not fit on nodes of 1, 1 CPUs"):
        merge_on_ray(make_job(workshop.folder), Cluster(cluster.address, 3))
    workshop.merge("out")
    with pytest.raises(OutputError, match="give --overwrite"):
        merge_on_ray(make_job(workshop.folder), Cluster(cluster.address))


def test_without_the_package_it_says_what_to_install(workshop, mediator, monkeypatch):
    workshop.recipe(**MEASURED)
    monkeypatch.setitem(sys.modules, "ray", None)
    run = mediator("merge", "recipe.yaml", "-o", "out", "--executor", "ray")
    assert (run.code, "pip install 'mediator-merge[ray]'" in run.err) == (2, True)


@pytest.mark.parametrize("words", [("--address", "auto"), ("--ray-workers", "2")])
def test_options_of_ray_are_refused_elsewhere(workshop, mediator, words):
    workshop.recipe(**MEASURED)
    run = mediator("merge", "recipe.yaml", "-o", "out", *words)
    assert (run.code, f"{words[0]}: is for --executor ray alone" in run.err) == (2, True)


@pytest.mark.parametrize(
    ("cores", "workers", "threads", "expected"),
    [([1, 1], None, None, (2, 1)), ([8, 4], None, None, (2, 4)), ([8, 8], 4, None, (4, 4)), ([8], 2, 3, (2, 3))],
)
def test_all_workers_fit_at_the_same_time(cores, workers, threads, expected):
    nodes = [{"Alive": True, "Resources": {"CPU": float(n)}} for n in cores]
    shape = ray_job._shape([*nodes, {"Alive": False, "Resources": {}}], workers, threads)
    assert (shape.world, shape.threads) == expected

"""Which process this one is, from the environment."""

import pytest

from mediator_cli.errors import OutputError
from mediator_cli.executors.place import Place, find_patience, find_place

TORCH = {"RANK": "1", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "abc"}
SLURM = {"SLURM_PROCID": "2", "SLURM_NTASKS": "3", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0"}
KUBERNETES = {"JOB_COMPLETION_INDEX": "0", "MEDIATOR_WORLD_SIZE": "2", "MEDIATOR_RUN": "uid"}


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        (TORCH, Place(1, 4, "torchrun abc")),
        (SLURM, Place(2, 3, "slurm 77.0")),
        (KUBERNETES, Place(0, 2, "uid")),
        (SLURM | KUBERNETES, Place(2, 3, "uid")),
        (SLURM | {"RANK": "0", "WORLD_SIZE": "1"}, Place(0, 1, "slurm 77.0")),
        (SLURM | {"RANK": "0"}, Place(2, 3, "slurm 77.0")),
    ],
)
def test_the_environment_says_which_process_this_is(environ, place):
    assert find_place(environ) == place


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({}, "set RANK and WORLD_SIZE, or SLURM_PROCID and SLURM_NTASKS, or JOB_COMPLETION_INDEX and"),
        ({"JOB_COMPLETION_INDEX": "1"}, "MEDIATOR_WORLD_SIZE: is not set"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "MEDIATOR_RUN: is not set.*\n.*the same word in all processes"),
        (TORCH | {"TORCHELASTIC_RUN_ID": "none"}, "MEDIATOR_RUN: is not set"),
        (TORCH | {"RANK": "4"}, "RANK: 4 is not the number of one of 4 processes"),
        (TORCH | {"RANK": "-1"}, "RANK: -1 is not the number"),
        (TORCH | {"WORLD_SIZE": "two"}, "WORLD_SIZE: 'two' is no whole number"),
    ],
)
def test_what_is_missing_or_wrong_is_told(environ, message):
    with pytest.raises(OutputError, match=message):
        find_place(environ)


def test_patience_is_ten_minutes_or_what_is_set():
    assert find_patience({}) == 600
    assert find_patience({"MEDIATOR_WAIT": "2.5"}) == 2.5
    for text in ("soon", "0", "-1", "nan", "inf"):
        with pytest.raises(OutputError, match="is no number of seconds"):
            find_patience({"MEDIATOR_WAIT": text})


def test_the_command_line_says_what_to_set(workshop, mediator, monkeypatch):
    for name in ("RANK", "SLURM_PROCID", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    workshop.recipe()
    run = mediator("merge", "recipe.yaml", "--executor", "rank")
    assert (run.code, "set RANK and WORLD_SIZE" in run.err) == (2, True)

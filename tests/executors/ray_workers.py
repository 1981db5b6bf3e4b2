"""Work on a Ray cluster that a test disturbs; in a module that workers can import."""

import os
import time

from mediator_cli.engine.journal import Journal
from mediator_cli.executors import ray_job

WORK = ray_job.work


def dying(job, place, threads):
    """Like `work`, but worker 1 dies at its second step when it is started the first time."""
    if place.rank == 1 and not job.again:
        _before_each_step(lambda calls: os._exit(1) if calls == 2 else None)
    return WORK(job, place, threads)


def slow(job, place, threads):
    """Like `work`, but a second before each step."""
    _before_each_step(lambda calls: time.sleep(1))
    return WORK(job, place, threads)


def _before_each_step(act):
    write, calls = Journal.write, []

    def hooked(self, step, facts):
        calls.append(step)
        act(len(calls))
        write(self, step, facts)

    Journal.write = hooked

"""Progress of a training run: a bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Report = Callable[[int, int, float], None]

SECONDS_BETWEEN_LINES = 15
SMOOTHING = 0.9


@contextmanager
def reporting(console: Console) -> Iterator[Report]:
    """Yield a function that shows step, steps, loss and the time left."""
    if not console.is_terminal:
        yield _lines(console)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"), TimeElapsedColumn())
    with Progress("  ", *columns, TextColumn("left"), TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=None, loss=float("nan"))
        smooth = _smoother()
        yield lambda step, steps, loss: bar.update(task, completed=step, total=steps, loss=smooth(loss))


def clock(seconds: float) -> str:
    """Write a duration as minutes and seconds.

    >>> clock(272.6)
    '4:33'
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"


def _lines(console: Console) -> Report:
    begun = shown = time.monotonic()
    smooth = _smoother()

    def report(step: int, steps: int, loss: float) -> None:
        nonlocal shown
        now, level = time.monotonic(), smooth(loss)
        if step < steps and now - shown < SECONDS_BETWEEN_LINES:
            return
        shown = now
        left = (now - begun) / step * (steps - step)
        console.print(f"  step {step}/{steps}  loss {level:.3f}  {clock(left)} left")

    return report


def _smoother() -> Callable[[float], float]:
    level: float | None = None

    def smooth(value: float) -> float:
        nonlocal level
        level = value if level is None else SMOOTHING * level + (1 - SMOOTHING) * value
        return level

    return smooth

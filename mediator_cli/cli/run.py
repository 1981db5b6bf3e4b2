"""From options to pipeline settings."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from mediator_cli.pipeline.settings import Settings


def settings(
    memory: str,
    workers: int | None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    notify: Callable[[str], None] | None = None,
) -> Settings:
    """Read the options that say how to run; raise OutputError when the memory is not a size."""
    from mediator_cli.engine.pool import keep_freed_memory
    from mediator_cli.errors import OutputError, Problem
    from mediator_cli.kernels.jit import spare_scipy
    from mediator_cli.pipeline.progress import silent, unheard
    from mediator_cli.pipeline.settings import Settings
    from mediator_cli.recipe.sizes import parse_size

    try:
        n_bytes = parse_size(memory)
    except ValueError as error:
        raise OutputError(Problem("--memory", str(error), "write for example --memory 2GiB")) from None
    keep_freed_memory()
    spare_scipy()
    cores = workers or os.cpu_count() or 1
    return Settings(overwrite, n_bytes, cores, progress or silent, notify=notify or unheard, resume=resume)

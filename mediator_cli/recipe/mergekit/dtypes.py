"""The dtype that a configuration asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mediator_cli.errors import Problem
    from mediator_cli.recipe.mergekit.source import Draft

_DTYPES = ("float32", "float16", "bfloat16")


def write_dtype(draft: Draft, *fields: str) -> Iterator[Problem]:
    """Write the dtype of the output, as the first field that is given says; all arithmetic is in float32 anyway."""
    data = draft.source.data
    key = next((key for key in fields if data.get(key) is not None), None)
    if key is None:
        return
    wanted = str(data[key]).removeprefix("torch.")
    if wanted == "float64":
        draft.notice((key,), "all arithmetic is in float32, and so is what is written, not in float64")
        wanted = "float32"
    if wanted == "int64":
        yield draft.source.problem((key,), "weights are not written as int64", f"one of {', '.join(_DTYPES)}")
        return
    draft.data["output"] = {"dtype": wanted}
    draft.copy_lines((key,), ("output", "dtype"))

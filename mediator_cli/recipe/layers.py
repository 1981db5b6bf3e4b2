"""Numbers that change over the layers, and which layers are meant."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, WithJsonSchema, WrapValidator

from mediator_cli.recipe.strict import Finite

_DIGITS = 5
"""A layer number has at most as many; a range of more would only fill memory."""

_NUMBER: TypeAdapter[float] = TypeAdapter(Finite, config=ConfigDict(strict=True))
_ANCHORS: TypeAdapter[tuple[float, ...]] = TypeAdapter(
    Annotated[tuple[Finite, ...], Field(strict=False, min_length=1)], config=ConfigDict(strict=True)
)


def _number_or_anchors(value: Any, _: Any) -> float | tuple[float, ...]:  # noqa: ANN401 - YAML data
    # A plain union would tell of both forms when one of them is meant.
    return _ANCHORS.validate_python(value) if isinstance(value, list | tuple) else _NUMBER.validate_python(value)


Graded = Annotated[
    float | tuple[float, ...],
    WrapValidator(_number_or_anchors),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "array", "items": {"type": "number"}, "minItems": 1}]}),
]
"""A number, or anchors spread evenly over the layers with straight lines between them."""


def parse_layers(value: Any) -> tuple[int, ...]:  # noqa: ANN401 - YAML data
    """Read layer numbers: `3`, `0-10` with both ends, or a list of numbers; raise ValueError for anything else.

    >>> parse_layers("0-3"), parse_layers(7), parse_layers([4, 2])
    ((0, 1, 2, 3), (7,), (4, 2))
    """
    items = list(value) if isinstance(value, list | tuple) else [value]
    found = tuple(number for item in items for number in _range_of(item))
    if not found:
        raise ValueError("names no layer; write 3, 0-10 or a list of numbers")
    return found


def _range_of(item: Any) -> range:  # noqa: ANN401 - YAML data
    plain = item if isinstance(item, str | int) and not isinstance(item, bool) else ""
    first, dash, last = (part.strip() for part in str(plain).partition("-"))
    if not all(part.isascii() and part.isdigit() and len(part) <= _DIGITS for part in (first, last if dash else "0")):
        raise ValueError(f"{item!r} names no layers; write 3, 0-10 or a list of numbers")
    return range(int(first), int(last if dash else first) + 1)


Layers = Annotated[
    tuple[int, ...],
    Field(strict=False),
    BeforeValidator(parse_layers),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 0},
                {"type": "string", "pattern": "^[0-9]+( *- *[0-9]+)?$"},
                {"type": "array", "items": {"type": ["integer", "string"]}, "minItems": 1},
            ]
        }
    ),
]

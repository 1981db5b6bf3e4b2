"""What is known of how servers read each toy: results.json beside this file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results.json")


def read_results() -> dict[str, Mapping[str, Any]]:
    """Read what is known, by the toys' names."""
    return dict(json.loads(RESULTS.read_text(encoding="utf-8"))) if RESULTS.exists() else {}


def write_results(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Write all that is known."""
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

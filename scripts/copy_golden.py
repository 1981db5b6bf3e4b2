"""Copy golden numbers into tests/golden: `python scripts/copy_golden.py FOLDER`.

FOLDER holds index.json, inputs.safetensors and expected/<id>.safetensors, made by running the authors' and other
tools' code. What the tests do not read of the index is left out.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

TARGET = Path(__file__).resolve().parent.parent / "tests" / "golden"
CASE_FIELDS = ("id", "method", "source", "parameters", "tolerance", "quirks", "random")
INPUT_FIELDS = ("base", "models", "weights", "tensors")


def main(source: Path) -> None:
    """Replace the cases in tests/golden by those found in `source`; what other scripts keep there stays."""
    shutil.rmtree(TARGET / "expected", ignore_errors=True)
    (TARGET / "expected").mkdir(parents=True)
    index = json.loads((source / "index.json").read_text(encoding="utf-8"))
    shutil.copyfile(source / "inputs.safetensors", TARGET / "inputs.safetensors")
    cases = []
    for case in index["cases"]:
        facts = {field: case[field] for field in CASE_FIELDS}
        cases.append(facts | {field: case["inputs"][field] for field in INPUT_FIELDS})
        name = f"{case['id']}.safetensors"
        shutil.copyfile(source / "expected" / name, TARGET / "expected" / name)
    text = json.dumps({"tensors": index["tensors"], "cases": cases}, indent=1)
    (TARGET / "index.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

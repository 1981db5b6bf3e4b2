"""Copy the golden numbers of the registered methods into tests/golden: `python scripts/copy_golden.py FOLDER`.

FOLDER holds index.json, inputs.safetensors and expected/<id>.safetensors, made by running the authors' and other
tools' code. Only what the tests read is copied: base and experts, and the cases of the methods below.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

TARGET = Path(__file__).resolve().parent.parent / "tests" / "golden"
METHODS = {"linear": "linear", "task_arithmetic": "task_arithmetic", "ties": "ties", "dare": "dare_linear"}
METHODS |= {"dare_linear": "dare_linear", "dare_ties": "dare_ties", "slerp": "slerp"}
METHODS |= {"breadcrumbs": "breadcrumbs", "breadcrumbs_ties": "breadcrumbs_ties", "sce": "sce"}
METHODS |= {"della": "della", "della_linear": "della_linear", "della_noelect": "della_linear"}
CASE_FIELDS = ("id", "source", "parameters", "tolerance", "quirks", "random")
INPUT_FIELDS = ("base", "models", "weights")


def main(source: Path) -> None:
    """Replace tests/golden by the cases found in `source`."""
    shutil.rmtree(TARGET, ignore_errors=True)
    (TARGET / "expected").mkdir(parents=True)
    index = json.loads((source / "index.json").read_text(encoding="utf-8"))
    inputs = load_file(source / "inputs.safetensors")
    kept = {name: tensor for name, tensor in inputs.items() if name.split(".")[0] in index["models"]}
    save_file(kept, TARGET / "inputs.safetensors")
    cases = []
    for case in index["cases"]:
        if case["method"] in METHODS:
            facts = {"method": METHODS[case["method"]], **{field: case[field] for field in CASE_FIELDS}}
            cases.append(facts | {field: case["inputs"][field] for field in INPUT_FIELDS})
            name = f"{case['id']}.safetensors"
            shutil.copyfile(source / "expected" / name, TARGET / "expected" / name)
    text = json.dumps({"tensors": index["tensors"], "cases": cases}, indent=1)
    (TARGET / "index.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

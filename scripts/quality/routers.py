"""Every kind of router on prompts in three wordings and on foreign tasks: python -m scripts.quality.routers.

Routers are fitted on the experts' training prompts alone. Numbers land in demo/quality/routers.json.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console

from mediator_cli.bundle.record import FileRecord
from mediator_cli.bundle.router_record import PolicyRecord
from mediator_cli.evaluate.tasks import Task
from mediator_cli.runtime.calibrate import auroc, calibration_error, log_loss
from mediator_cli.runtime.classify import Classifier
from mediator_cli.runtime.features import FeatureSpec, model_reader
from mediator_cli.runtime.fit import FitSettings, FittedRouter, fit_router
from mediator_cli.runtime.open import load_dense
from mediator_cli.runtime.outside import OutsideModel
from mediator_cli.runtime.policy import mix
from mediator_cli.runtime.prompts import load_tokenizer, prompt_reader
from mediator_cli.runtime.router import Router
from scripts.demo.tasks import read_rows
from scripts.demo.wordings import WORDINGS
from scripts.quality.data import VERSIONS, foreign_tasks, version
from scripts.quality.validate import CHECKOUT, DATA, WORK

FEATURES = (("embedding_mean", None), ("text", None), ("hidden_mean", 1), ("hidden_mean", 4), ("hidden_mean", 15))
CLASSIFIERS = ("logistic", "gaussian", "prototype", "ridge")
FILE = FileRecord(name="router.safetensors", bytes=0, sha256="")


@dataclass(frozen=True)
class Texts:
    """Prompts of tasks with the number of the right expert; foreign ones have none."""

    prompts: list[list[int]]
    labels: np.ndarray


def main() -> None:
    """Fit and measure all routers, print one line for each."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    console = Console(soft_wrap=True, highlight=False)
    bundle = CHECKOUT / "demo/bundle"
    model, tokenizer = load_dense(bundle), load_tokenizer(bundle)
    reader = prompt_reader(tokenizer)
    training = {task: [row.prompt for row in read_rows(DATA / f"{task}.train.jsonl")] for task in WORDINGS}

    def texts(tasks: Sequence[Task]) -> Texts:
        labels = [list(WORDINGS).index(task.name) if task.name in WORDINGS else -1 for task in tasks for _ in task.rows]
        return Texts([reader.encode(row.prompt) for task in tasks for row in task.rows], np.array(labels))

    sets = {name: texts(version(DATA, name)) for name in ("valid", *VERSIONS)} | {"foreign": texts(foreign_tasks(0))}
    results = []
    for kind, layer in FEATURES:
        spec = FeatureSpec(kind, layer)
        features = model_reader(model, tokenizer, spec)
        started = time.perf_counter()
        read = {name: features.read(each.prompts) for name, each in sets.items()}
        seconds = (time.perf_counter() - started) / sum(len(each.prompts) for each in sets.values())
        for classifier in CLASSIFIERS:
            fitted = fit_router(features, reader.encode, training, FitSettings(spec, classifier))
            row = {"features": f"{kind}{layer or ''}", "classifier": classifier, "ms": round(1e3 * seconds, 3)}
            row |= measure(router_of(fitted), read, {name: each.labels for name, each in sets.items()})
            results.append(row)
            console.print(json.dumps(row))
    WORK.mkdir(parents=True, exist_ok=True)
    (WORK / "routers.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


def router_of(fitted: FittedRouter) -> Router:
    """Make a router of what was fitted, without a file."""

    def part(name: str) -> dict[str, np.ndarray]:
        return {key.partition(".")[2]: array for key, array in fitted.arrays.items() if key.startswith(f"{name}.")}

    classifier = Classifier(**part("classifier"), unit=fitted.settings.classifier == "prototype")
    return Router(fitted.record(FILE), classifier, OutsideModel(**part("outside")))


def measure(router: Router, features: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> dict[str, float]:
    """Return accuracy, calibration and recognition of foreign prompts, each as a number between 0 and 1."""
    routings = {name: router.route(rows) for name, rows in features.items()}
    found: dict[str, float] = {}
    for name, routing in routings.items():
        if name != "foreign":
            right = routing.probabilities.argmax(axis=1) == labels[name]
            found[name] = float(right.mean())
            found[f"{name} outside"] = float(routing.is_outside.mean())
    test, foreign = routings["test"], routings["foreign"]
    found["log loss"] = log_loss(test.probabilities, labels["test"])
    found["ece"] = calibration_error(test.probabilities, labels["test"])
    is_foreign = np.r_[np.zeros(len(test.score), bool), np.ones(len(foreign.score), bool)]
    found["auroc score"] = auroc(np.r_[test.score, foreign.score], is_foreign)
    found["auroc entropy"] = auroc(np.r_[test.entropy, foreign.entropy], is_foreign)
    found["foreign outside"] = float(foreign.is_outside.mean())
    weights = mix(test.probabilities, test.is_outside, PolicyRecord(), test.experts)
    found["right alone"] = float((weights[np.arange(len(weights)), labels["test"]] == 1).mean())
    return {name: round(value, 4) for name, value in found.items()}


if __name__ == "__main__":
    main()

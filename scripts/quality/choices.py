"""What is chosen on validation rows: the parameters of each static merge, and the shape of the bundle."""

from collections.abc import Iterator

from mediator_cli.compare.variants import Variant

STATIC_GRID = {
    "plain average": [("average.method=linear",)],
    "task arithmetic": [("average.method=task_arithmetic", f"average.lambda={x}") for x in (0.3, 0.4, 0.5, 0.7)],
    "TIES": [
        ("average.method=ties", f"average.density={density}", f"average.lambda={x}")
        for density in (0.1, 0.2, 0.5)
        for x in (0.7, 1.0, 1.3)
    ],
    "DARE": [
        ("average.method=dare_linear", f"average.density={density}", "average.normalize=false", f"average.lambda={x}")
        for density in (0.2, 0.8)
        for x in (0.3, 0.4, 0.5)
    ],
    "DARE-TIES": [
        ("average.method=dare_ties", f"average.density={density}", f"average.lambda={x}")
        for density in (0.5, 0.8)
        for x in (0.7, 1.0)
    ],
}

ALL_LAYERS = ("assign.rule=all", "assign.candidates=layers")
HALF_OF_LAYERS = ("assign.rule=mean_std",)
DENSE = {
    "base": ("extract.dense=base",),
    "linear": ("average.method=linear",),
    "task arithmetic 0.4": ("average.method=task_arithmetic", "average.lambda=0.4"),
    "ties 0.2": ("average.method=ties", "average.density=0.2"),
}
BUNDLE_GRID = {
    f"{rule} {values} {density:g} on {dense}": (
        *layers,
        f"extract.density={density}",
        f"extract.values={values}",
        *changes,
    )
    for dense, changes in DENSE.items()
    for rule, layers in {"all layers": ALL_LAYERS, "conflicted layers": HALF_OF_LAYERS}.items()
    for values, density in (("sign", 0.05), ("bf16", 0.1), ("sign", 0.1), ("sign", 0.02), ("bf16", 0.05))
    if dense in ("linear", "ties 0.2") or (values, density) == ("sign", 0.05)
}


def static_grid() -> Iterator[Variant]:
    """Give every static merge with all parameters that are tried."""
    for name, settings in STATIC_GRID.items():
        for changes in settings:
            label = " ".join(change.partition(".")[2] for change in changes[1:])
            yield Variant(name, f"{name} {label}".strip(), changes=("assign.rule=none", *changes), answer="dense")


def bundle_grid() -> Iterator[Variant]:
    """Give bundles with the recipe's method, by rule, stored values and density; right expert given."""
    for name, changes in BUNDLE_GRID.items():
        yield Variant("bundle", name, changes=changes)


CHOSEN_STATIC = {
    "linear": ("average.method=linear",),
    "task_arithmetic 0.3": ("average.method=task_arithmetic", "average.lambda=0.3"),
    "TIES 0.2, 0.7": ("average.method=ties", "average.density=0.2", "average.lambda=0.7"),
    "DARE 0.8, 0.5": ("average.method=dare_linear", "average.normalize=false", "average.lambda=0.5"),
    "DARE-TIES 0.8, 0.7": ("average.method=dare_ties", "average.density=0.8", "average.lambda=0.7"),
}
"""What did best on validation rows."""

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

BUNDLE_GRID = {
    f"{rule} {values} {density:g}": (
        f"assign.rule={rule}",
        f"extract.density={density}",
        f"extract.values={values}",
    )
    for rule in ("mean_std", "all")
    for values in ("bf16", "int8", "sign")
    for density in (0.1, 0.05, 0.02)
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

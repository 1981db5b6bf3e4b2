"""Selections of experts: clusters, greedy choices against brute force, representatives, and the curve over k."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from tiny_library import HIDDEN, INNER, random_change, taught_bench, toy_rows

from mediator_cli.bundle.factors import FactorDelta
from mediator_cli.errors import CheckpointError
from mediator_cli.recipe.names import check_expert_names
from mediator_cli.strategies import log_probs
from mediator_cli.strategies._clusters import cluster
from mediator_cli.strategies.bench import Bench
from mediator_cli.strategies.library import Change, summed
from mediator_cli.strategies.selection import curve as curves
from mediator_cli.strategies.selection import represent
from mediator_cli.strategies.selection.curve import curve
from mediator_cli.strategies.selection.gram import cosines, gram, leading
from mediator_cli.strategies.selection.groups import KINDS
from mediator_cli.strategies.selection.represent import medoid
from mediator_cli.strategies.selection.select import SELECTORS, Selection, _name, select
from mediator_cli.strategies.strategy import ByTask, Fitted, Fixed

NAMES = ("alpha", "beta", "gamma", "delta")
TOP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def bench() -> Bench:
    """Four trained experts with a task each, and a held-out task."""
    return taught_bench()


def changed(bench: Bench, experts: dict[str, Change], **fields: Any) -> Bench:
    """Make a bench with other experts and the same tasks, which shares nothing found."""
    library = replace(bench.library, experts=experts)
    tasks = tuple(
        replace(task, name=name, expert=name, valid=task.valid[:4])
        for task, name in zip(bench.seen * 2, experts, strict=False)
    )
    return replace(bench, library=library, found={}, tasks=tasks, **fields)


def dense(change: Change) -> dict[str, torch.Tensor]:
    return {name: delta.b.double() @ delta.a.double() for name, delta in change.items()}


def test_inner_products_are_those_of_whole_matrices() -> None:
    changes = [random_change(at) for at in range(5)]
    changes += [{}, {TOP: FactorDelta(torch.zeros(0, HIDDEN), torch.zeros(INNER, 0))}, changes[1]]
    found = gram(changes)
    whole = [dense(change) for change in changes]
    expected = [[sum(float((one[n] * two[n]).sum()) for n in one if n in two) for two in whole] for one in whole]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
    alike = cosines(found)
    assert alike[1, 7] == pytest.approx(1.0)
    assert not alike[5].any()
    assert not alike[6].any()
    np.testing.assert_allclose(np.diag(alike)[:5], 1.0)


def test_leading_directions_are_those_of_a_truncated_svd() -> None:
    rows = np.random.default_rng(0).normal(size=(9, 20))
    left, values, _ = np.linalg.svd(rows, full_matrices=False)
    cut = left[:, :4] * values[:4]
    np.testing.assert_allclose(leading(rows @ rows.T, 4), cut @ cut.T, atol=1e-9)
    np.testing.assert_array_equal(leading(rows @ rows.T, 9), rows @ rows.T)


def test_clusters_of_rows_that_stand_apart_and_of_equal_rows() -> None:
    rows = np.array([[0, 0], [5, 5], [0, 0.1], [5, 5.1], [9, 0.0]])
    assert cluster(rows, "abcde", 3, 0) == [("a", "c"), ("b", "d"), ("e",)]
    same = np.zeros((5, 2))
    for k in range(1, 6):
        found = cluster(same, "abcde", k, 0)
        assert len(found) == k
        assert sorted(name for group in found for name in group) == list("abcde")
    with pytest.raises(CheckpointError, match="6 of 5"):
        cluster(rows, "abcde", 6, 0)
    with pytest.raises(CheckpointError, match="0 of 5"):
        cluster(rows, "abcde", 0, 0)


@pytest.mark.parametrize("selector", ["mbc", "outputs"])
def test_duplicated_experts_come_into_one_cluster_and_the_first_stands_for_it(bench: Bench, selector: str) -> None:
    own = bench.library.experts
    twice = {"zeta": own["gamma"], **own, "again": dict(own["gamma"])}
    found = select(changed(bench, twice), selector, 4)
    assert found.clusters["zeta"] == ("zeta", "gamma", "again")
    assert set(found.library.names) == {"zeta", "alpha", "beta", "delta"}
    assert found.library.experts["zeta"] is own["gamma"]
    assert found.right["gamma"] == "zeta"


def test_experts_that_change_nothing_are_alike(bench: Bench) -> None:
    empty: dict[str, Change] = {"none": {}, "zero": {TOP: FactorDelta(torch.zeros(1, HIDDEN), torch.zeros(INNER, 1))}}
    still = changed(bench, {**bench.library.experts, **empty})
    for selector in ("mbc", "outputs"):
        assert ("none", "zero") in select(still, selector, 5).clusters.values()
        assert len(select(still, selector, 6).library.names) == 6


def test_the_medoid_is_most_like_the_others_and_ties_go_to_the_first() -> None:
    alike = np.array([[1, 0.5, 0.4, 0], [0.5, 1, 0.9, 0], [0.4, 0.9, 1, 0], [0, 0, 0, 1]])
    assert medoid(NAMES, ("alpha", "beta", "gamma"), alike) == "beta"
    assert medoid(NAMES, ("gamma", "beta"), alike) == "gamma"
    assert medoid(NAMES, ("delta",), alike) == "delta"


def loss_of(bench: Bench, names: tuple[str, ...], kind: str) -> float:
    """Measure a set of experts by the run time."""
    experts = bench.library.experts
    if kind == "merge":
        return loss_of_merge(bench, summed([(experts[name], 1 / len(names)) for name in names]))
    if kind == "ensemble":
        weights = Fixed({name: 1 / len(names) for name in names})
        return bench.loss(Fitted(experts, decision=weights, combine="probabilities"))
    return float(np.mean([min(loss_of_task(bench, name, task.name) for name in names) for task in bench.seen]))


@pytest.mark.parametrize("kind", ["ensemble", "merge", "route"])
def test_greedy_choices_are_those_of_brute_force(bench: Bench, kind: Any) -> None:
    found = select(bench, "greedy", 2, kind=kind, most_rows=3)
    chosen: tuple[str, ...] = ()
    for step in range(2):
        tried = {name: loss_of(bench, (*chosen, name), kind) for name in NAMES if name not in chosen}
        chosen = (*chosen, min(tried, key=lambda name: tried[name]))
        assert found.facts["losses"][step] == pytest.approx(tried[chosen[-1]], abs=1e-4)
    assert found.library.names == chosen
    # A choice of fewer is how a choice of more begins.
    assert select(bench, "greedy", 1, kind=kind, most_rows=3).library.names == chosen[:1]
    for task in NAMES:
        losses = {name: loss_of_task(bench, name, task) for name in chosen}
        assert found.right[task] == (task if task in chosen else min(losses, key=lambda name: losses[name]))


def loss_of_merge(bench: Bench, change: Change) -> float:
    return bench.loss(Fitted(folded=(change,)), {task.name: task.valid[:3] for task in bench.seen})


@cache
def loss_of_task(bench: Bench, expert: str, task: str) -> float:
    rows = next(own for own in bench.tasks if own.name == task).valid
    return bench.loss(Fitted(bench.library.experts, decision=Fixed({expert: 1.0})), {task: rows})


def test_a_soup_may_take_an_expert_again(bench: Bench) -> None:
    found = select(bench, "soup", 4, most_rows=3)
    chosen = found.facts["chosen"]
    assert len(found.library.names) == 4
    check_expert_names(found.library.names)
    counts = Counter(chosen)
    assert max(counts.values()) > 1
    soup = summed([(bench.library.experts[name], count / 4) for name, count in counts.items()])
    same = summed([(change, 0.25) for change in found.library.experts.values()])
    torch.testing.assert_close(dense(soup), dense(same))
    assert found.facts["losses"][-1] == pytest.approx(loss_of_merge(bench, soup), abs=1e-4)


def test_chance_is_seeded_and_fewer_are_among_more(bench: Bench) -> None:
    drawn = [set(select(bench, "random", k).library.names) for k in (1, 2, 3, 4)]
    assert drawn[0] < drawn[1] < drawn[2] < drawn[3] == set(NAMES)
    assert set(select(bench, "random", 2).library.names) == drawn[1]
    others = {select(replace(bench, seed=seed), "random", 1).library.names for seed in range(12)}
    assert len(others) > 1


def test_an_average_is_the_mean_of_the_whole_changes(bench: Bench) -> None:
    found = select(bench, "outputs", 2, representative="average")
    check_expert_names(found.library.names)
    for own, members in found.clusters.items():
        if len(members) > 1:
            assert own == "_".join(members)
            total: dict[str, torch.Tensor] = {}
            for name in members:
                for tensor, value in dense(bench.library.experts[name]).items():
                    total[tensor] = total.get(tensor, torch.zeros_like(value)) + value / len(members)
            torch.testing.assert_close(dense(found.library.experts[own]), total)
        else:
            assert own == members[0]
        assert [task.name for task in bench.seen if found.right[task.name] == own] == list(members)
    own_bench = found.bench(bench)
    assert {task.name: task.expert for task in own_bench.seen} == dict(found.right)
    by_task = Fitted(
        own_bench.library.experts, decision=ByTask({t.name: {t.expert or "": 1.0} for t in own_bench.seen})
    )
    assert own_bench.loss(by_task) > 0


def test_a_cluster_is_trained_anew_on_all_its_tasks(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    # So tiny a model needs larger steps.
    monkeypatch.setattr(represent, "_RATE", 0.05)
    found = select(bench, "mbc", 1, representative="retrained", steps=12)
    (name,) = found.library.names
    told = found.facts["training"][name]
    assert told["loss_last"] < told["loss_first"]
    change = found.library.experts[name]
    members = bench.library.experts.values()
    assert set(change) == {tensor for member in members for tensor in member}
    ranks = {tensor: max(len(member[tensor].a) for member in members if tensor in member) for tensor in change}
    assert {tensor: len(delta.a) for tensor, delta in change.items()} == ranks
    assert not any(delta.a.requires_grad or delta.b.requires_grad for delta in change.values())
    again = select(bench, "mbc", 1, representative="retrained", steps=12).library.experts[name]
    assert all(torch.equal(change[tensor].b, again[tensor].b) for tensor in change)
    assert bench.loss(Fitted(folded=(change,))) < bench.loss(Fitted())
    bare = replace(bench, tasks=tuple(replace(task, train=()) for task in bench.tasks), found={})
    with pytest.raises(CheckpointError, match="no train rows"):
        select(bare, "mbc", 1, representative="retrained")


def test_what_cannot_be_chosen_is_refused(bench: Bench) -> None:
    for name in SELECTORS:
        for k in (0, 5):
            with pytest.raises(CheckpointError, match=f"{k} of 4"):
                select(bench, name, k)
        if name not in ("mbc", "outputs"):
            with pytest.raises(CheckpointError, match="keeps experts as they are"):
                select(bench, name, 2, representative="average")
    with pytest.raises(CheckpointError, match="no selector 'mbcc'"):
        select(bench, "mbcc", 2)
    with pytest.raises(CheckpointError, match="none to combine"):
        select(changed(bench, {}), "mbc", 1)
    with pytest.raises(CheckpointError, match="is not in the library"):
        bench.with_library(bench.library.subset(["alpha"]))


def test_five_rows_and_tasks_all_alike(bench: Bench) -> None:
    rows = toy_rows("beta", 5)
    alike = replace(bench, tasks=tuple(replace(task, valid=rows) for task in bench.seen), found={})
    for name in SELECTORS:
        for kind in ("ensemble", "route"):
            found = select(alike, name, 2, kind=kind, most_rows=2)  # type: ignore[arg-type]
            assert len(found.library.names) == 2
            assert set(found.right) == set(NAMES)
            assert set(found.right.values()) <= set(found.library.names)


@pytest.mark.parametrize("n", [1, 2, 3, 12, 40])
def test_names_of_clusters_are_names_of_experts(n: int) -> None:
    for size in (3, 20, 64):
        members = [f"{'m' * (size - 3)}{at:03d}" for at in range(n)]
        check_expert_names([_name(members)])
        assert len(_name(members)) <= 64
        assert _name(members).startswith(members[0][:40])


def test_the_curve_is_what_the_run_time_gives_and_asks_each_expert_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = replace(bench, found={})
    swept: list[str] = []

    def counted(own: Bench, rows: Any, stage: str, n_kept: int) -> Any:
        swept.append(stage)
        return sweep_rows(own, rows, stage, n_kept)

    sweep_rows = log_probs.sweep_rows
    monkeypatch.setattr(log_probs, "sweep_rows", counted)
    points = list(curve(fresh, ("mbc", "random"), (2, 4)))
    # Validation and test rows of four tasks, and test rows of the held-out one.
    assert len(swept) <= 2 * len(bench.tasks)
    order = [(name, k, kind) for name in ("mbc", "random") for k in (2, 4) for kind in KINDS]
    assert [(point.selector, point.k, point.kind) for point in points] == order
    assert all(set(point.by_task) == {task.name for task in bench.tasks} for point in points)
    all_four = {(p.kind, round(p.valid_loss, 3)) for p in points if p.k == 4}
    assert len(all_four) == 3, "all selections of all experts are the same"
    for point in points[:3]:
        own = Selection("mbc", bench.library.subset(point.experts), {}, chosen_right(bench, point.experts)).bench(bench)
        fitted = curves.fit_kind(own, point.kind)
        for task in bench.tasks:
            expected = own.score(fitted, task, task.test)
            assert [s.exact for s in point.by_task[task.name]] == [s.exact for s in expected]
            found = [s.log_prob for s in point.by_task[task.name]]
            np.testing.assert_allclose(found, [s.log_prob for s in expected], atol=1e-4)


def chosen_right(bench: Bench, kept: tuple[str, ...]) -> dict[str, str]:
    """Give the mapping of tasks that model-based clustering finds for two clusters."""
    found = select(bench, "mbc", 2)
    assert found.library.names == kept
    return dict(found.right)

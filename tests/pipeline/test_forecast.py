"""What a merge will take: amounts from the plan, seconds from constants; and what is measured is kept."""

import json
import math
import time
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from conftest import fine_tune, random_tensors, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from mediator_cli import Settings, load_recipe, make_plan
from mediator_cli.checkpoint.adapter.read import AdapterReader
from mediator_cli.pipeline import calibrate, probe
from mediator_cli.pipeline.calibrate import constants_for, likely_cache, machine_key, read_machine
from mediator_cli.pipeline.cost import DIGEST, STAGES, Step, list_steps, list_tasks, read_step
from mediator_cli.pipeline.disks import cached_share
from mediator_cli.pipeline.estimate import amounts_of, describe_plan
from mediator_cli.pipeline.forecast import Amounts, Constants, Rate, disk_loads, forecast, speed, traffic_of

SIZE = 160 + 3 * (64 + 32 + 32 + 64 + 3 * 96 + 16) + 8
ROUTABLE = SIZE - 160 - 8
NORMS = 3 * 16 + 8
LINEAR = "average linear(normalize=True) n=2"


def plan_of(workshop, **fields):
    return make_plan(load_recipe(workshop.recipe(**fields)))


def constants(**fields):
    rates = defaultdict(lambda: Rate(1.0))
    rates.update(fields.pop("rates", {}))
    usual = {"start": 0.0, "cores": 4, "crowding": 1.0, "busy": 1.0, "read": 1e30, "write": 1e30, "room": 1e30}
    return Constants(rates=rates, **{**usual, **fields})


def amounts(plan, share=1.0):
    most = amounts_of(plan)[1]
    return Amounts(share * most.routed, share * most.sparse_bytes)


def by_step(plan, routed=0.0):
    """Sum elements and tensors by stage and step."""
    found = defaultdict(lambda: [0.0, 0.0])
    for task in list_tasks(plan, routed):
        found[task.stage, task.step.key][0] += task.elements
        found[task.stage, task.step.key][1] += task.tensors
    return {key: tuple(value) for key, value in found.items() if any(value)}


def test_a_plain_merge_is_an_average_and_digests(workshop):
    tasks = by_step(plan_of(workshop, assign={"rule": "none"}))
    assert tasks == {("merge", LINEAR): (SIZE, 29), ("merge", DIGEST.key): (3 * 2 * SIZE, 0)}


def test_a_routed_merge_measures_conflict_and_extracts_what_is_routed(workshop):
    plan = plan_of(workshop, assign={"rule": "all"}, extract={"density": 0.1})
    tasks = by_step(plan, ROUTABLE / 2)
    assert tasks["survey", "conflict keep_above_std n=2"] == (SIZE, 29)
    assert tasks["survey", DIGEST.key] == (3 * 2 * SIZE, 0)
    elements, n_tensors = tasks["merge", "extract magnitude 0.1 over tensor as sign n=1"]
    members = [tensor for tensor in plan.tensors if tensor.can_be_routed]
    share = ROUTABLE / 2 / sum(tensor.size for tensor in members)
    assert (elements, n_tensors) == (pytest.approx(2 * ROUTABLE / 2), pytest.approx(2 * len(members) * share))


def test_passes_that_conflict_and_thresholds_share_are_made_once(workshop):
    ties = {"method": "ties", "density": 0.5, "zero_sign": "positive"}
    plan = plan_of(workshop, average=ties, assign={"rule": "all"})
    tasks = by_step(plan)
    key = next(task.step.key for task in list_tasks(plan, 0) if task.step.kind == "statistics")
    assert tasks["survey", key] == (SIZE, 29)
    assert tasks["survey", "pass delta n=2"] == (-SIZE, 0)
    alone = by_step(plan_of(workshop, average=ties, assign={"rule": "none"}))
    assert "pass delta n=2" not in {key for _, key in alone}
    assert traffic_of(plan, Amounts(0, 0))["survey"].read == 2 * 3 * 2 * SIZE


def test_thresholds_of_each_tensor_belong_to_the_merge(workshop):
    plan = plan_of(workshop, average={"method": "ties", "trim": "tensor", "density": 0.5}, assign={"rule": "none"})
    stages = {stage for stage, _ in by_step(plan)}
    assert stages == {"merge"}
    assert traffic_of(plan, Amounts(0, 0))["merge"].read > 2 * 3 * 2 * SIZE


def test_an_adapter_adds_its_products(workshop):
    lora = [{"name": "a", "model": "./a"}, {"name": "lora", "model": "./lora"}]
    plan = plan_of(workshop, experts=lora, assign={"rule": "none"})
    tasks = by_step(plan)
    assert tasks["merge", "adapter rank 2 n=1"][0] == pytest.approx(ROUTABLE - 3 * 16)
    assert tasks["digest", DIGEST.key][0] == sum(info.n_bytes for info in plan.experts[1].tensors.values())
    assert tasks["merge", DIGEST.key][0] == 2 * 2 * SIZE


def test_other_dtypes_are_tasks_of_their_own(workshop):
    base = random_tensors(0)
    write_checkpoint(workshop.folder / "b", {name: tensor.float() for name, tensor in fine_tune(base, 2).items()})
    plan = plan_of(workshop, assign={"rule": "none"}, output={"dtype": "float32"})
    tasks = by_step(plan)
    assert tasks["merge", read_step("F32").key] == (SIZE, 0)
    assert tasks["merge", read_step("BF16").key] == (-SIZE, 0)
    assert tasks["merge", "copy F32 n=1"] == (SIZE, 0)
    assert tasks["merge", "copy BF16 n=1"] == (-SIZE, 0)


def test_seconds_are_what_the_tasks_take(workshop):
    plan = plan_of(workshop, assign={"rule": "none"})
    rates = {LINEAR: Rate(3.0, 1000.0), DIGEST.key: Rate(0.5)}
    found = forecast(plan, Settings(workers=1), constants(rates=rates, start=0.25, cores=1), amounts(plan))
    seconds = 1e-9 * (3 * SIZE + 29 * 1000 + 0.5 * 6 * SIZE)
    assert found.warm == pytest.approx({"start": 0.25, "survey": 0, "merge": seconds, "digest": 0, "publish": 0})
    assert found.seconds("warm") == pytest.approx(0.25 + seconds)


def test_seconds_grow_with_the_model(workshop):
    fields = {"assign": {"rule": "all"}, "average": {"method": "ties"}, "extract": {"density": 0.5}}
    plan = plan_of(workshop, **fields)

    def grown(tensors):
        return {name: replace(info, shape=(3, *info.shape), end=info.start + 3 * info.n_bytes)
                for name, info in tensors.items()}  # fmt: skip

    larger = replace(
        plan,
        tensors=tuple(replace(t, size=3 * t.size, shape=(3, *t.shape)) for t in plan.tensors),
        base=replace(plan.base, tensors=grown(plan.base.tensors)),
        experts=tuple(replace(e, source=replace(e.source, tensors=grown(e.source.tensors))) for e in plan.experts),
    )
    slow, amount = constants(read=1e3, write=1e5), amounts(plan)
    small = forecast(plan, Settings(), slow, amount)
    large = forecast(larger, Settings(), slow, Amounts(3 * amount.routed, 3 * amount.sparse_bytes))
    for stage in ("survey", "merge"):
        assert small.warm[stage] > 0
        assert large.warm[stage] == pytest.approx(3 * small.warm[stage])
    assert large.cold["survey"] == pytest.approx(3 * small.cold["survey"])


def test_more_that_is_routed_takes_longer(workshop):
    plan = plan_of(workshop, assign={"rule": "top_k", "k": 2})
    least, most = amounts_of(plan)
    assert 0 < least.routed == most.routed
    found = [forecast(plan, Settings(), constants(), amounts(plan, share)).seconds("warm") for share in (0, 0.5, 1)]
    assert found[1] - found[0] == pytest.approx(found[2] - found[1])
    assert found[0] < found[1]


@given(st.integers(1, 64), st.floats(1, 100), st.floats(0.01, 1))
def test_more_workers_are_never_slower(cores, crowding, busy):
    found = [speed(n, constants(cores=cores, crowding=crowding, busy=busy)) for n in range(1, 70)]
    assert found == sorted(found)
    assert found[0] == pytest.approx(crowding)
    assert found[cores - 1] == max(found)


def test_all_cores_are_worth_what_was_measured():
    assert speed(8, constants(cores=8, crowding=2.0, busy=0.75)) == pytest.approx(6.0)
    assert speed(99, constants(cores=8, crowding=2.0, busy=0.75)) == pytest.approx(6.0)


def test_a_slow_disk_bounds_the_stage_that_reads_first(workshop):
    once = 3 * 2 * SIZE
    routed, plain = plan_of(workshop, assign={"rule": "all"}), plan_of(workshop, assign={"rule": "none"})
    slow = constants(read=once / 100)
    found = forecast(routed, Settings(), slow, amounts(routed))
    assert (found.cold["survey"], found.cold["merge"]) == pytest.approx((100, found.warm["merge"]))
    assert forecast(plain, Settings(), slow, amounts(plain)).cold["merge"] == pytest.approx(100)
    assert forecast(plain, Settings(), slow, amounts(plain)).warm["merge"] < 1


def test_sources_larger_than_memory_come_in_every_pass_over_the_model(workshop):
    plan, once = plan_of(workshop, assign={"rule": "all"}), 3 * 2 * SIZE
    traffic = traffic_of(plan, amounts(plan))
    assert disk_loads(plan, traffic, once) == dict.fromkeys(STAGES, 0) | {"survey": once}
    assert disk_loads(plan, traffic, once - 1) == dict.fromkeys(STAGES, 0) | {"survey": 2 * once, "merge": once}


def test_the_last_batch_waits_for_the_disk(workshop):
    plan = plan_of(workshop, assign={"rule": "none"})
    found = forecast(plan, Settings(), constants(write=2 * SIZE / 10), amounts(plan))
    assert found.warm["merge"] == pytest.approx(10 + 10)


@pytest.fixture
def quick(workshop, monkeypatch, tmp_path):
    """Measure on a model of next to nothing, with a cache of its own."""
    monkeypatch.setenv("MEDIATOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(probe, "_LARGE", ((16, 32), 2))
    monkeypatch.setattr(probe, "REPEATS", 1)
    monkeypatch.setattr(calibrate, "_start", lambda: probe.Spent(0.5, 0.5))
    return workshop


@pytest.mark.slow
def test_all_that_a_plan_needs_can_be_measured(quick):
    experts = [{"name": "a", "model": "./a"}, {"name": "b", "model": "./b"}, {"name": "lora", "model": "./lora"}]
    overrides = [
        {"layers": "0", "average": {"method": "dare_linear", "density": 0.5}},
        {"layers": "1", "average": {"method": "task_arithmetic"}, "extract": {"density": 0.3, "values": "int8"}},
    ]
    plan = plan_of(quick, experts=experts, average={"method": "ties"}, overrides=overrides, assign={"rule": "all"})
    found = constants_for(plan, quick.folder / "out", print)
    assert {step.key for step in list_steps(plan)} <= set(found.rates)
    wanted = {"conflict", "statistics", "average", "extract", "adapter", "pass", "read", "digest"}
    assert {step.kind for step in list_steps(plan)} >= wanted
    for rate in found.rates.values():
        assert rate.element >= 0
        assert rate.tensor >= 0
        assert math.isfinite(rate.element + rate.tensor)
    assert found.crowding >= 1
    assert 0 < found.busy <= 1
    assert min(found.read, found.write, found.room) > 0


def test_a_machine_is_measured_once_and_a_new_recipe_measures_what_it_adds(quick, monkeypatch):
    measured, told = [], []
    monkeypatch.setattr(calibrate, "measure", lambda bench, step: measured.append(step.key) or Rate(1.0, 2.0))
    plan, out = plan_of(quick, assign={"rule": "none"}), quick.folder / "out"
    first = constants_for(plan, out, told.append)
    assert told.pop(0) == "measuring this machine once, a few seconds"
    told.clear()
    assert constants_for(plan, out, told.append) == replace(first, room=pytest.approx(first.room, rel=0.5))
    assert (told, measured.count(LINEAR)) == ([], 1)
    assert read_machine(machine_key()).rates[LINEAR] == Rate(1.0, 2.0)
    constants_for(plan_of(quick, assign={"rule": "none"}, average={"method": "task_arithmetic"}), out, told.append)
    assert told == ["measuring what this recipe needs once, a few seconds"]
    assert measured.count(LINEAR) == 1
    constants_for(plan, out, told.append, anew=True)
    assert measured.count(LINEAR) == 2


def test_the_start_that_is_measured_is_that_of_a_whole_merge(monkeypatch):
    """The command that is timed merges, and its processor time is what the machine counts as its own."""
    monkeypatch.setattr(calibrate, "REPEATS", 0)
    ended = []

    def once(function):
        began = time.monotonic()
        ended.append(function())
        return probe.Spent(0.0, time.monotonic() - began)

    monkeypatch.setattr(calibrate, "best_time", once)
    spent = calibrate._start()
    assert ended[0].returncode == 0, ended[0].stderr
    assert spent.cpu > 0
    assert spent.wall > 0


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"rates": 3, "disks": {}}', '{"rates": {}, "disks": {}}'])
def test_a_damaged_note_is_measured_anew(quick, text):
    (quick.folder / "cache" / "calibration").mkdir(parents=True)
    (quick.folder / "cache" / "calibration" / f"{machine_key()}.json").write_text(text)
    assert read_machine(machine_key()) is None


def test_the_plan_command_tells_the_time_or_leaves_it_out(quick, mediator, monkeypatch):
    monkeypatch.setattr(calibrate, "measure", lambda bench, step: Rate(1e6))
    quick.recipe(assign={"rule": "none"})
    first = mediator("plan", "recipe.yaml")
    assert "measuring this machine once" in first.err
    assert "\n time" in first.out
    again = mediator("plan", "recipe.yaml", "--json")
    assert again.err == ""
    report = json.loads(again.out)
    assert report["sources_are"] in ("warm", "cold")
    both = [sum(stage[state][1] for stage in report["stages"].values()) for state in ("warm", "cold")]
    assert report["seconds"][1] == pytest.approx(both[report["sources_are"] == "cold"])
    assert list(report["stages"]) == list(STAGES)
    assert report["stages"]["merge"]["written_bytes"] == [2 * SIZE] * 2
    without = mediator("plan", "recipe.yaml", "--no-calibrate")
    assert "\n time" not in without.out
    assert without.err == ""
    assert "measuring this machine once" in mediator("plan", "recipe.yaml", "--calibrate").err


def test_a_plan_without_constants_has_bytes_and_no_seconds(workshop):
    report = describe_plan(plan_of(workshop, assign={"rule": "none"}), None, Settings())
    assert report.seconds is None
    assert report.stages["merge"].warm is None
    assert report.stages["merge"].read_bytes == (3 * 2 * SIZE,) * 2
    assert report.read_bytes["average"] == 3 * 2 * SIZE
    assert report.read_bytes["digest sources"] == 0


def test_files_just_written_are_in_memory(workshop):
    assert cached_share([workshop.folder / "base" / "model.safetensors"]) == 1.0
    assert cached_share([]) == 1.0
    assert likely_cache(plan_of(workshop)) == "warm"


def test_the_adapter_that_is_measured_adds_products(quick):
    with probe.open_bench(quick.folder, 1) as bench:
        infos = {name: info for name, info in bench.base.items() if len(info.shape) > 1}
        reader = probe._adapter(bench, bench.streams(1).base, infos, 4)
        assert isinstance(reader, AdapterReader)
        products = [product for change in reader.adapter.changes.values() for product in change.products]
        assert len(products) == len(infos)
        assert all(product.left.shape[1] == 4 for product in products)
        assert isinstance(Step("read", "F32"), Step)
        assert np.isfinite(probe.measure(bench, Step("adapter", "rank 4", 1, 4)).element)

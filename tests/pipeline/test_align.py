"""`align`: experts whose hidden units were put in another order are merged as if nothing had happened."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_adapter
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file, save_file
from tiny_architectures import write_family
from tiny_vocabularies import Tokens, write_source

from mediator_cli import Settings, load_recipe, make_plan, merge, read_bundle
from mediator_cli.engine.align import Effort, Pair, axes_of, match_units
from mediator_cli.errors import OutputError, RecipeError
from mediator_cli.pipeline.align import align_words
from mediator_cli.pipeline.survey import analyze_conflicts
from mediator_cli.plan.align import find_units

IDS = torch.tensor([[5, 7, 9, 3, 11, 2, 8]])
EVERY = ["mlp", "heads", "residual"]
STATIC = {"rule": "none"}


@pytest.fixture(params=["llama", "qwen2"])
def family(request, tmp_path):
    return write_family(tmp_path, request.param)


@pytest.fixture
def llama(tmp_path):
    return write_family(tmp_path, "llama")


def units_of(family, groups):
    shapes = {name: tuple(tensor.shape) for name, tensor in family.stored("base").items()}
    config = json.loads((family.folder / "base" / "config.json").read_text())
    return find_units(shapes, config, groups)[0], shapes


def shuffle(family, name, groups=("mlp", "heads"), seed=0):
    """Put the hidden units of a member in another order, which changes none of its answers; give the orders."""
    units, shapes = units_of(family, groups)
    generator, tensors, orders = np.random.default_rng(seed), family.stored(name), {}
    for one in units:
        k = one.per_group
        groups_of = generator.permutation(one.size // k)
        orders[one.name] = np.concatenate([group * k + generator.permutation(k) for group in groups_of])
    for tensor, axes in axes_of(units, orders, shapes).items():
        rows = tensors[tensor] if axes.rows is None else tensors[tensor][torch.from_numpy(axes.rows)]
        tensors[tensor] = (rows if axes.columns is None else rows[..., torch.from_numpy(axes.columns)]).contiguous()
    save_file(tensors, family.folder / name / "model.safetensors", metadata={"format": "pt"})
    return orders


def planned(family, **fields):
    return make_plan(load_recipe(family.recipe(**{"assign": STATIC, **fields})))


def merged(family, name, settings=None, **fields):
    return merge(planned(family, **fields), family.folder / name, settings=settings or Settings(workers=2))


def logits(family, name):
    with torch.no_grad():
        return family.model(name)(input_ids=IDS).logits


def assert_same(one, other):
    found, wanted = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("groups", [("mlp",), ("mlp", "heads"), EVERY])
def test_shuffled_experts_are_merged_to_the_same_bytes(family, groups):
    straight = merged(family, "straight")
    before = logits(family, "a")
    orders = {name: shuffle(family, name, groups, seed) for seed, name in enumerate("ab")}
    torch.testing.assert_close(logits(family, "a"), before, atol=1e-5, rtol=0)
    crooked = merged(family, "crooked")
    assert not torch.equal(
        load_file(crooked / "model.safetensors")["model.layers.0.mlp.down_proj.weight"],
        load_file(straight / "model.safetensors")["model.layers.0.mlp.down_proj.weight"],
    )
    aligned = merged(family, "aligned", align={"groups": list(groups)})
    assert_same(aligned, straight)
    stored = load_arrays(aligned / "alignment.safetensors")
    assert stored
    for key, order in stored.items():
        name, _, units = key.partition("/")
        # What shuffled the units, undone.
        assert orders[name][units][order].tolist() == list(range(len(order)))


def test_the_merged_model_answers_like_that_of_straight_experts(llama):
    merged(llama, "straight")
    shuffle(llama, "b")
    aligned = merged(llama, "aligned", align={})
    torch.testing.assert_close(logits(llama, "aligned"), logits(llama, "straight"), atol=0, rtol=0)
    record = next(file for file in read_bundle(aligned).manifest.files if file.name == "alignment.safetensors")
    assert record.bytes == (aligned / "alignment.safetensors").stat().st_size


def test_any_method_and_sparse_experts_follow(llama):
    fields = {
        "assign": {"rule": "mean_std"},
        "average": {"method": "ties", "density": 0.4},
        "extract": {"density": 0.3, "values": "bf16"},
    }
    straight = merged(llama, "straight", **fields)
    shuffle(llama, "a")
    shuffle(llama, "b", seed=1)
    aligned = merged(llama, "aligned", align={}, **fields)
    assert read_bundle(aligned).manifest.digest == read_bundle(straight).manifest.digest


def test_conflict_is_measured_on_aligned_experts(llama):
    straight = analyze_conflicts(planned(llama))
    shuffle(llama, "a")
    crooked = analyze_conflicts(planned(llama))
    aligned = analyze_conflicts(planned(llama, align={}))
    assert aligned.units == straight.units
    assert crooked.units != straight.units
    assert (straight.align, aligned.align) == ("none", align_words(planned(llama, align={})))


def test_a_report_of_another_alignment_is_refused(llama):
    plan = planned(llama, assign={"rule": "mean_std"}, align={})
    report = llama.folder / "conflicts.json"
    report.write_text(analyze_conflicts(planned(llama)).model_dump_json())
    with pytest.raises(Exception, match="was measured with align: none"):
        merge(plan, llama.folder / "out", conflicts=report)
    report.write_text(analyze_conflicts(plan).model_dump_json())
    assert merge(plan, llama.folder / "out", conflicts=report).is_dir()


def test_experts_are_aligned_to_one_of_them_and_the_base_and_adapters_with_it(llama):
    shuffle(llama, "base")
    straight = merged(llama, "straight", experts=[{"name": n, "model": f"./{n}"} for n in "ab"], align={})
    told = []
    aligned = merged(llama, "aligned", Settings(notify=told.append), align={"to": "expert:a"})
    stored = load_arrays(aligned / "alignment.safetensors")
    assert {key.split("/")[0] for key in stored} == {"base"}
    assert any(line.startswith("align: of the base ") and "moved" in line for line in told)
    # The same model, in the order of a instead of the base's.
    torch.testing.assert_close(logits(llama, "aligned"), logits(llama, "straight"), atol=1e-5, rtol=0)
    assert not torch.equal(*(load_file(f / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
                             for f in (aligned, straight)))  # fmt: skip


def test_fine_tunes_of_one_base_are_told_to_be_in_order(llama):
    told = []
    straight = merged(llama, "straight")
    aligned = merged(llama, "aligned", Settings(notify=told.append), align={})
    assert_same(aligned, straight)
    assert load_arrays(aligned / "alignment.safetensors") == {}
    lines = [line for line in told if line.startswith("align: ")]
    assert len(lines) == 2
    assert lines[0].startswith(
        "align: of expert a 0 of 48 units of mlp, 0 of 8 units of heads moved; it is in that order"
    )
    assert set(lines) <= set(read_bundle(aligned).manifest.notices)


def test_noise_does_not_lead_astray(llama):
    generator = torch.Generator().manual_seed(5)
    noisy = {k: v + 0.02 * torch.randn(v.shape, generator=generator) for k, v in llama.stored("a").items()}
    save_file(noisy, llama.folder / "a" / "model.safetensors", metadata={"format": "pt"})
    straight = merged(llama, "straight")
    shuffle(llama, "a", EVERY, seed=3)
    assert_same(merged(llama, "aligned", align={"groups": EVERY}), straight)


@pytest.mark.parametrize("settings", [Settings(workers=1), Settings(workers=3, slab=32768)])
def test_threads_and_slabs_change_nothing(llama, settings):
    shuffle(llama, "a", EVERY)
    one = merged(llama, "one", align={"groups": EVERY})
    assert_same(merged(llama, "other", settings, align={"groups": EVERY}), one)


def test_an_interrupted_merge_goes_on_with_the_orders_it_had(llama, monkeypatch):
    shuffle(llama, "a")
    whole = merged(llama, "whole", align={})
    from mediator_cli.pipeline import merge as pipeline

    def stop(*words, **more):
        raise KeyboardInterrupt

    plan = planned(llama, align={})
    write_records = pipeline._write_records
    monkeypatch.setattr(pipeline, "_write_records", stop)
    with pytest.raises(KeyboardInterrupt):
        merge(plan, llama.folder / "out")
    monkeypatch.setattr(pipeline, "_write_records", write_records)
    monkeypatch.setattr("mediator_cli.pipeline.align.match_units", stop)
    resumed = merge(plan, llama.folder / "out", settings=Settings(resume=True))
    assert_same(resumed, whole)
    assert (resumed / "alignment.safetensors").read_bytes() == (whole / "alignment.safetensors").read_bytes()


def test_adapters_need_no_alignment(workshop):
    write_adapter(workshop.folder / "other", 5)
    experts = [{"name": name, "model": f"./{name}"} for name in ("lora", "other")]
    plan = make_plan(load_recipe(workshop.recipe(experts=experts, align={})))
    assert any("align has nothing to do" in notice for notice in plan.notices)
    out = merge(plan, workshop.folder / "out")
    assert not (out / "alignment.safetensors").exists()
    plain = workshop.merge("plain", experts=experts)
    assert read_bundle(out).manifest.digest == read_bundle(plain).manifest.digest


def test_adapters_are_read_in_the_order_that_the_base_gets(workshop):
    experts = [{"name": name, "model": f"./{name}"} for name in ("a", "lora")]
    plain = workshop.merge("plain", experts=experts, assign=STATIC)
    base = dict(workshop.base)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    for kind, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        name = f"model.layers.1.mlp.{kind}.weight"
        base[name] = base[name].index_select(axis, order).contiguous()
        for part in ("A", "B"):
            file = workshop.folder / "lora" / "adapter_model.safetensors"
            tensors = load_file(file)
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight"
            if (part == "B") == (axis == 0):
                tensors[key] = tensors[key].index_select(axis, order).contiguous()
            save_file(tensors, file)
    save_file(base, workshop.folder / "base" / "model.safetensors", metadata={"format": "pt"})
    aligned = workshop.merge("aligned", experts=experts, assign=STATIC, align={"to": "expert:a"})
    assert_same(aligned, plain)


def shuffle_stream(folder):
    """Put the residual stream of a stored model in another order."""
    tensors = load_file(folder / "model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    (stream,), faults = find_units(shapes, json.loads((folder / "config.json").read_text()), ["residual"])
    assert not faults
    order = torch.randperm(stream.size, generator=torch.Generator().manual_seed(2))
    for side in stream.sides:
        tensors[side.tensor] = tensors[side.tensor].index_select(side.axis, order).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("untied", [False, True])
def test_rows_that_come_from_other_sources_follow_the_order_of_theirs(tmp_path, untied):
    for name, added in (("base", ()), ("a", ("<a>",)), ("b", ("<b>", "<both>"))):
        write_source(tmp_path / name, Tokens(added=added, untied=untied, config={"rope_theta": 1e4}))
    layers = {k: v for k, v in load_file(tmp_path / "base" / "model.safetensors").items() if ".layers." in k}
    for seed, name in enumerate("ab"):
        file, generator = tmp_path / name / "model.safetensors", torch.Generator().manual_seed(seed)
        near = {k: v + 0.01 * torch.randn(v.shape, generator=generator) for k, v in layers.items()}
        save_file({**load_file(file), **near}, file, metadata={"format": "pt"})
    experts = [{"name": name, "model": f"./{name}"} for name in "ab"]
    recipe = {"version": 1, "base": "./base", "experts": experts, "assign": STATIC, "tokenizer": "union"}

    def merge_all(out, **fields):
        (tmp_path / f"{out}.yaml").write_text(json.dumps({**recipe, **fields}))
        return merge(make_plan(load_recipe(tmp_path / f"{out}.yaml")), tmp_path / out)

    straight = merge_all("straight")
    shuffle_stream(tmp_path / "b")
    assert_same(merge_all("aligned", align={"groups": ["residual"]}), straight)


def problems(family, **fields):
    with pytest.raises(RecipeError) as refused:
        planned(family, **fields)
    return [str(problem) for problem in refused.value.problems]


def test_what_cannot_be_aligned_is_refused_by_name(tmp_path):
    neox = write_family(tmp_path, "gpt_neox")
    found = problems(neox, align={})
    assert len(found) == 1
    assert "align.groups: heads: its units are not known in gpt_neox.layers.0.attention.dense.weight" in found[0]
    assert "leave heads out of `align.groups`" in found[0]
    assert merged(neox, "out", align={"groups": ["mlp"]}).is_dir()


def test_a_target_that_is_none_is_refused(llama, workshop):
    assert "align.to: 'c' is no expert" in problems(llama, align={"to": "expert:c"})[0]
    experts = [{"name": name, "model": f"./{name}"} for name in ("a", "lora")]
    with pytest.raises(RecipeError, match="adapter lora has the base's order"):
        make_plan(load_recipe(workshop.recipe(experts=experts, align={"to": "expert:lora"})))


@pytest.mark.parametrize(
    "align", [{"to": "a"}, {"groups": []}, {"groups": ["layers"]}, {"max_passes": 0}, {"method": "zipit"}, {"x": 1}]
)
def test_other_words_are_refused(llama, align):
    with pytest.raises(RecipeError, match="align"):
        planned(llama, align=align)


def test_the_recipe_of_the_page_is_one(tmp_path):
    page = (Path(__file__).parents[2] / "mediator_cli" / "stages" / "README.md").read_text(encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    assert load_recipe(tmp_path / "recipe.yaml").recipe.align.groups == tuple(EVERY)


class Arrays:
    def __init__(self, **arrays):
        self.arrays = arrays

    def read_into(self, name, start, stop, out):
        out[:] = self.arrays[name].ravel()[start:stop]
        return True


def test_too_little_memory_for_units_that_are_hard_to_match_is_told():
    from mediator_cli.plan.units import Side, Units

    units = [Units("hard", "mlp", 4, (Side("w", 0),))]
    ours = np.eye(4, dtype=np.float32)
    # Two places want the same unit.
    theirs = np.array([[9, 9, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], np.float32)
    pair = Pair(Arrays(w=ours), Arrays(w=theirs), ("base", "expert a"), {"w": (4, 4)}, frozenset("w"))
    with pytest.raises(OutputError, match="the 4 units of hard are hard to align and need a table of 1 MiB"):
        match_units(pair, units, Effort(1, 0, 1, 100), lambda n: None)
    found = match_units(pair, units, Effort(1, 0, 1, 1 << 27), lambda n: None)
    assert found["hard"].tolist() == [1, 0, 2, 3]


def test_progress_reaches_its_end(llama):
    seen = []
    merged(llama, "out", Settings(progress=lambda *words: seen.append(words)), align={"groups": EVERY})
    stages = list(dict.fromkeys(stage for stage, _, _ in seen))
    assert stages[0] == "align"
    *_, (_, done, total) = (one for one in seen if one[0] == "align")
    assert done == total > 0

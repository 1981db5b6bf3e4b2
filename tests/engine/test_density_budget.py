"""`extract: {over: model}`: one share of the largest entries of each expert over all its routed tensors."""

import json

import numpy as np
import pytest
import torch
from conftest import edit_tensors, write_checkpoint
from safetensors.torch import load_file

from mediator_cli import Settings, load_recipe, make_plan, merge, read_bundle
from mediator_cli.checkpoint.blocks import BLOCK
from mediator_cli.checkpoint.layout import natural_key

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.down_proj.weight"
STATIC_DENSE = {"assign": {"rule": "all"}, "output": {"dtype": "float32"}}


def over_model(density, **fields):
    return {"density": density, "over": "model", "values": "fp32", "rescale": False, **fields}


def deltas_of(workshop, out, name):
    """The deltas that were cut: expert minus dense, in the plan's order."""
    dense = load_file(out / "model.safetensors")
    names = sorted(workshop.base, key=natural_key)
    return {n: (workshop.experts[name][n].float() - dense[n]).flatten().numpy() for n in names}


def largest(deltas, count):
    """Mask the `count` largest entries of all tensors: equal ones by order of tensors, then by index; zeros never."""
    values = np.abs(np.concatenate(list(deltas.values())))
    order = np.argsort(-values, kind="stable")[:count]
    mask = np.zeros(len(values), dtype=bool)
    mask[order] = values[order] > 0
    cuts = np.cumsum([len(delta) for delta in deltas.values()])[:-1]
    return dict(zip(deltas, np.split(mask, cuts), strict=True))


@pytest.mark.parametrize("density", [0.001, 0.05, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("values", ["fp32", "bf16", "int8", "sign"])
def test_the_largest_entries_of_the_whole_expert_are_kept(workshop, density, values):
    out = workshop.merge("out", extract=over_model(density, values=values), **STATIC_DENSE)
    bundle = read_bundle(out)
    for name in "ab":
        deltas = deltas_of(workshop, out, name)
        size = sum(map(len, deltas.values()))
        expected = largest(deltas, max(1, round(density * size)))
        for tensor, mask in expected.items():
            assert bundle.experts[name].read(tensor).positions.tolist() == np.flatnonzero(mask).tolist()
        (record,) = [sparse for sparse in bundle.manifest.sparse if sparse.expert == name]
        assert sum(unit.n_kept for unit in record.units.values()) == sum(mask.sum() for mask in expected.values())


def moved(workshop, *tensors):
    """Let both experts differ from the base in these tensors alone, by steps of equal size and sign."""
    for name in "ab":
        changed = {n: t.clone() for n, t in workshop.base.items()}
        for tensor in tensors:
            changed[tensor] = changed[tensor].sign().where(changed[tensor] != 0, torch.ones(())).bfloat16() * 2
        write_checkpoint(workshop.folder / name, changed)
        workshop.experts[name] = changed
    base = {n: (t * 0 if n in tensors else t) for n, t in workshop.base.items()}
    write_checkpoint(workshop.folder / "base", base)
    return base


@pytest.mark.parametrize("shard_size", ["1GB", "1KB"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.75])
def test_equal_entries_are_kept_by_order_of_tensors_then_index(workshop, share, shard_size):
    moved(workshop, UP, DOWN)
    sizes = {name: workshop.base[name].numel() for name in (UP, DOWN)}
    total = sum(tensor.numel() for tensor in workshop.base.values())
    count = round(share * sum(sizes.values()))
    extract = over_model(count / total, dense="base")
    output = {"dtype": "float32", "shard_size": shard_size}
    bundle = read_bundle(workshop.merge("out", extract=extract, **STATIC_DENSE | {"output": output}))
    first, second = (bundle.experts["a"].read(name).positions.tolist() for name in (UP, DOWN))
    assert first == list(range(min(count, sizes[UP])))
    assert second == list(range(max(0, count - sizes[UP])))
    assert all(bundle.experts["a"].tensors[n].n_kept == 0 for n in workshop.base if n not in (UP, DOWN))


@pytest.mark.parametrize("values", ["fp32", "bf16", "fp16", "int8", "sign"])
def test_tensors_that_keep_nothing_or_all_come_back(workshop, values):
    moved(workshop, UP)
    density = workshop.base[UP].numel() / sum(tensor.numel() for tensor in workshop.base.values())
    bundle = read_bundle(
        workshop.merge("out", extract=over_model(density, values=values, dense="base"), **STATIC_DENSE)
    )
    sparse = bundle.experts["a"]
    for name, tensor in workshop.base.items():
        delta = sparse.read(name)
        assert len(delta.positions) == len(delta.values) == (tensor.numel() if name == UP else 0)
        mixed = delta.add_to(bundle.dense(name))
        expected = workshop.experts["a"][name].float() if name == UP else bundle.dense(name)
        torch.testing.assert_close(mixed, expected, rtol=1e-6, atol=1e-6)
    assert {sparse.tensors[name].index for name in workshop.base if name != UP} == {"gaps"}
    assert sparse.tensors[UP].index == "bitmap"


def test_a_tensor_is_coded_by_what_it_keeps(workshop):
    edit_tensors(workshop.folder / "a" / "model.safetensors", lambda t: t[UP].mul_(3))
    workshop.experts["a"][UP].mul_(3)
    bundle = read_bundle(workshop.merge("out", extract=over_model(0.08), **STATIC_DENSE))
    tensors = bundle.experts["a"].tensors
    shares = {name: spec.n_kept / workshop.base[name].numel() for name, spec in tensors.items()}
    assert shares[UP] > 0.5
    assert {name: spec.index for name, spec in tensors.items()} == {
        name: "bitmap" if share > 1 / 8 else "gaps" for name, share in shares.items()
    }
    assert {spec.index for spec in tensors.values()} == {"bitmap", "gaps"}


@pytest.mark.parametrize("values", ["sign", "int8"])
def test_scales_stay_per_tensor(workshop, values):
    out = workshop.merge("out", extract=over_model(0.3, values=values), **STATIC_DENSE)
    bundle = read_bundle(out)
    deltas = deltas_of(workshop, out, "a")
    scales = []
    for name, delta in deltas.items():
        spec, sparse = bundle.experts["a"].tensors[name], bundle.experts["a"].read(name)
        if not spec.n_kept:
            assert spec.scale == 1.0
            continue
        kept = delta[sparse.positions.numpy()].astype(np.float64)
        if values == "sign":
            assert spec.scale == pytest.approx(np.abs(kept).mean(), rel=1e-9)
        else:
            assert np.abs(kept).max() / 127 * 0.09 < spec.scale < np.abs(kept).max() / 127 * 1.02
            np.testing.assert_allclose(sparse.values.numpy(), kept, atol=np.abs(kept).max() * 0.6)
        scales.append(spec.scale)
    assert len(set(scales)) == len(scales) > 20


def test_overrides_of_density_or_selection_take_their_tensors_out(workshop):
    overrides = [
        {"match": "*.mlp.*", "extract": {"density": 0.5}},
        {"match": "*.v_proj.*", "extract": {"select": "random"}},
        {"match": "*.q_proj.*", "extract": {"values": "bf16"}},
    ]
    out = workshop.merge("out", extract=over_model(0.1), overrides=overrides, **STATIC_DENSE)
    bundle = read_bundle(out)
    alone = {name for name in workshop.base if ".mlp." in name or ".v_proj." in name}
    deltas = {name: delta for name, delta in deltas_of(workshop, out, "b").items() if name not in alone}
    expected = largest(deltas, round(0.1 * sum(map(len, deltas.values()))))
    for name in workshop.base:
        kept = bundle.experts["b"].read(name).positions.tolist()
        if ".mlp." in name:
            assert len(kept) == workshop.base[name].numel() // 2
        elif name not in alone:
            assert kept == np.flatnonzero(expected[name]).tolist()


def test_only_routed_tensors_share_what_is_kept(workshop):
    assign = {"rule": "listed", "units": ["model.layers.1"]}
    out = workshop.merge("out", extract=over_model(0.1), **STATIC_DENSE | {"assign": assign})
    deltas = {n: d for n, d in deltas_of(workshop, out, "a").items() if ".layers.1." in n}
    kept = sum(spec.n_kept for spec in read_bundle(out).experts["a"].tensors.values())
    assert kept == round(0.1 * sum(map(len, deltas.values())))


@pytest.mark.parametrize("values", ["sign", "int8", "bf16"])
def test_slabs_and_threads_change_no_bit(workshop, values):
    inner = BLOCK // 8 + 900
    for seed, source in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(seed)
        # Few different magnitudes, so that many entries just reach the threshold, in every slab.
        shape = {name: tuple(inner if side == 12 else side for side in t.shape) for name, t in workshop.base.items()}
        tensors = {name: torch.randint(-3, 4, sides, generator=generator).float() for name, sides in shape.items()}
        write_checkpoint(workshop.folder / source, tensors, {"intermediate_size": inner})
    fields = {"extract": over_model(0.21, values=values), **STATIC_DENSE}
    plan = make_plan(load_recipe(workshop.recipe(**fields)))
    found = []
    for workers, slab in ((1, 4 * BLOCK), (3, BLOCK)):
        out = merge(plan, workshop.folder / "out", settings=Settings(workers=workers, slab=slab, overwrite=True))
        manifest = json.loads((out / "routing_manifest.json").read_text())
        found.append((manifest["digest"], [file["xxh3"] for s in manifest["sparse"] for file in s["files"]]))
    assert found[0] == found[1]
    total = sum(tensor.size for tensor in plan.tensors)
    kept = sum(spec.n_kept for spec in read_bundle(out).experts["a"].tensors.values())
    assert kept == round(0.21 * total)


def test_density_one_over_the_model_is_lossless(workshop):
    extract = {"density": 1, "over": "model", "values": "bf16"}
    bundle = read_bundle(workshop.merge("out", assign={"rule": "all"}, extract=extract))
    for name, tensor in workshop.experts["b"].items():
        assert torch.equal(bundle.experts["b"].read(name).add_to(bundle.dense(name)), tensor)


def test_the_manifest_says_over_what_entries_were_ranked(workshop):
    for over in ("tensor", "model"):
        out = workshop.merge(over, assign={"rule": "all"}, extract={"over": over})
        assert read_bundle(out).manifest.extract.over == over


def test_random_selection_ranks_nothing(workshop, refused):
    workshop.recipe(extract={"over": "model", "select": "random"})
    refused("recipe.yaml:4 extract", "`select: random` ranks nothing, so it takes no `over: model`", "schema")

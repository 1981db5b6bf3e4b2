"""Whole folders: what is written, that it loads, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny_mixtures import edit, load, logits_of, make_mixture, make_rows, run, tensors_of

from mediator_cli.checkpoint.moe_layout import PROJECTIONS, moe_layout
from mediator_cli.errors import MediatorError
from mediator_cli.moe.compress.job import METHODS, Wishes, make_job
from mediator_cli.moe.compress.layout import size_of
from mediator_cli.moe.compress.run import open_job

MERGES = [method for method in METHODS if method != "reap"]
EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
GATES = "model.layers.{}.block_sparse_moe.gate.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Mixtral, a Qwen2-MoE, and a Qwen3-MoE with a dense layer, of six experts each."""
    top = tmp_path_factory.mktemp("folders")
    changes = {"mixtral": {}, "qwen2_moe": {"norm_topk_prob": True}, "qwen3_moe": {"mlp_only_layers": [0]}}
    return {kind: make_mixture(top / kind, kind, **facts) for kind, facts in changes.items()}


@pytest.fixture(scope="module")
def alike(tmp_path_factory, folders):
    """The same with all experts of a layer equal to the first; the gates still differ."""
    top = tmp_path_factory.mktemp("alike")
    for kind, folder in folders.items():
        layout = open_job(folder, Wishes("reap", 3)).layout

        def level(tensors, layout=layout):
            for layer in layout.layers:
                first, *others = layout.experts_of(layer)
                for names in others:
                    for projection in PROJECTIONS:
                        tensors[names[projection]] = tensors[first[projection]].clone()

        target = top / kind
        target.mkdir()
        for file in folder.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        edit(target, level)
    return top


@pytest.fixture(scope="module")
def answers(alike):
    """What the models of equal experts answer to the usual rows."""
    return {folder.name: logits_of(folder, make_rows()) for folder in alike.iterdir()}


@pytest.mark.parametrize(
    ("kind", "method"),
    [*(("mixtral", method) for method in METHODS), *((f"qwen{n}_moe", m) for n in (2, 3) for m in ("hc_smoe", "ream"))],
)
def test_equal_experts_answer_as_before(alike, answers, tmp_path, kind, method):
    report = run(alike / kind, tmp_path / "out", method, experts=2)
    assert report.after.n_experts == 2
    assert torch.allclose(logits_of(tmp_path / "out", make_rows()), answers[kind], atol=1e-5)


@pytest.mark.parametrize("wishes", [{"router": "mean"}, {"router": "tied"}, {"align": True}, {"keep": 0.5}])
def test_equal_experts_answer_as_before_with_other_settings(alike, answers, tmp_path, wishes):
    run(alike / "mixtral", tmp_path / "out", "hc_smoe", **{"experts": None if "keep" in wishes else 2, **wishes})
    assert torch.allclose(logits_of(tmp_path / "out", make_rows()), answers["mixtral"], atol=1e-5)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_reap_copies_what_it_keeps_and_all_else(folders, tmp_path, kind):
    report = run(folders[kind], tmp_path / "out", "reap", experts=4)
    old, new = tensors_of(folders[kind]), tensors_of(tmp_path / "out")
    job = open_job(folders[kind], Wishes("reap", 4))
    form, expected = job.layout.format, dict(old)
    for layer, record in report.layers.items():
        kept = [group.experts[0] for group in record.groups]
        assert kept == sorted(np.argsort(record.saliency)[2:].tolist())
        assert sorted(kept + list(record.dropped)) == list(range(6))
        expected[form.router_of(layer)] = old[form.router_of(layer)][kept]
        for projection in PROJECTIONS:
            for at in range(6):
                del expected[form.expert_of(layer, at, projection)]
            for at, expert in enumerate(kept):
                expected[form.expert_of(layer, at, projection)] = old[form.expert_of(layer, expert, projection)]
    assert new.keys() == expected.keys()
    assert all(torch.equal(new[name], tensor) for name, tensor in expected.items())
    assert any(record.dropped not in ((4, 5), ()) for record in report.layers.values())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config[form.n_experts], config[form.top_k]) == (4, 2)
    assert torch.isfinite(logits_of(tmp_path / "out", make_rows())).all()


@pytest.mark.parametrize("router", ["dominant", "mean"])
@pytest.mark.parametrize("method", MERGES)
def test_merged_experts_are_weighted_means(folders, tmp_path, method, router):
    if method == "ream" and router == "mean":
        pytest.skip("ream keeps the centroid's row")
    report = run(folders["mixtral"], tmp_path / "out", method, experts=3, align=False, router=router)
    old, new = tensors_of(folders["mixtral"]), tensors_of(tmp_path / "out")
    for layer, record in report.layers.items():
        assert sorted(e for group in record.groups for e in group.experts) == list(range(6))
        assert record.dropped == ()
        for at, group in enumerate(record.groups):
            worth = np.array([(record.saliency if method == "ream" else record.frequency)[e] for e in group.experts])
            weights = worth / worth.sum()
            for name in ("w1", "w2", "w3"):
                members = [old[EXPERT.format(layer, e, name)].double() for e in group.experts]
                mean = sum(w * m for w, m in zip(weights, members, strict=True))
                assert torch.allclose(new[EXPERT.format(layer, at, name)].double(), mean, atol=2e-5)
            rows = old[GATES.format(layer)][list(group.experts)].double()
            row = torch.from_numpy(weights) @ rows if router == "mean" else rows[0]
            assert torch.allclose(new[GATES.format(layer)][at].double(), row, atol=2e-5)


def test_tied_rows_answer_as_if_members_were_replaced(folders, tmp_path):
    rows = make_rows()
    report = run(folders["mixtral"], tmp_path / "out", "hc_smoe", rows, experts=2, router="tied")
    assert report.before == report.after
    assert "nothing gets smaller" in " ".join(report.notices)
    old, new = tensors_of(folders["mixtral"]), tensors_of(tmp_path / "out")
    for layer, record in report.layers.items():
        assert torch.equal(old[GATES.format(layer)], new[GATES.format(layer)])
        for group in record.groups:
            same = [new[EXPERT.format(layer, e, "w1")] for e in group.experts]
            assert all(torch.equal(each, same[0]) for each in same)


def test_a_truncated_subspace_is_written_and_single_experts_stay(folders, tmp_path):
    report = run(folders["mixtral"], tmp_path / "out", "sub_moe", experts=4, rank=0.25)
    old, new = tensors_of(folders["mixtral"]), tensors_of(tmp_path / "out")
    for layer, record in report.layers.items():
        for at, group in enumerate(record.groups):
            found = new[EXPERT.format(layer, at, "w1")]
            if len(group.experts) == 1:
                assert torch.equal(found, old[EXPERT.format(layer, group.experts[0], "w1")])
            else:
                assert torch.linalg.matrix_rank(found, rtol=1e-4) == 6


@pytest.mark.parametrize("method", METHODS)
def test_one_expert_left_takes_every_token(folders, tmp_path, method):
    report = run(folders["mixtral"], tmp_path / "out", method, experts=1)
    assert (report.before.top_k, report.after.top_k) == (2, 1)
    assert any("a token gets 1 of the experts instead of 2" in notice for notice in report.notices)
    assert load(tmp_path / "out").config.num_experts_per_tok == 1
    assert torch.isfinite(logits_of(tmp_path / "out", make_rows())).all()


@pytest.mark.parametrize("method", METHODS)
def test_the_same_bytes_again_and_from_kept_statistics(folders, tmp_path, method):
    def all_bytes(name):
        return {file.name: file.read_bytes() for file in (tmp_path / name).iterdir() if file.name != "README.md"}

    for name, seconds in (("a", {}), ("b", {}), ("c", {"statistics": tmp_path / "s.safetensors"})):
        if method == "ream" and seconds:
            continue
        run(folders["mixtral"], tmp_path / name, method, experts=3, **seconds)
    assert all_bytes("a") == all_bytes("b")
    if method != "ream":
        # A pass that is kept measures more, so only the weights have to be equal; read again, all is.
        run(folders["mixtral"], tmp_path / "d", method, experts=3, **seconds)
        assert all_bytes("c") == all_bytes("d")
        assert all(torch.equal(t, tensors_of(tmp_path / "c")[n]) for n, t in tensors_of(tmp_path / "a").items())


def test_many_experts_in_small_files(tmp_path):
    folder = make_mixture(tmp_path / "m", "qwen3_moe", 64, num_experts_per_tok=8)
    rows = make_rows(3)
    report = run(folder, tmp_path / "out", "ream", rows, experts=2, shard_size=6_000)
    sizes = [sorted(len(group.experts) for group in layer.groups) for layer in report.layers.values()]
    assert sizes == [[32, 32]] * 2
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert all(name.endswith(".mlp.gate.weight") for name in load_names(tmp_path / "out" / files[-1]))
    assert report.after.top_k == 2
    assert torch.isfinite(logits_of(tmp_path / "out", rows)).all()
    report = run(folder, tmp_path / "few", "hc_smoe", make_rows(1), experts=40)
    assert any("got no calibration token" in notice for notice in report.notices)
    assert torch.isfinite(logits_of(tmp_path / "few", rows)).all()


def load_names(file) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def test_half_precision_is_kept_and_merged_in_double(tmp_path):
    folder = make_mixture(tmp_path / "m")
    edit(folder, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    report = run(folder, tmp_path / "out", "ream", experts=2, align=False)
    old, new = tensors_of(folder), tensors_of(tmp_path / "out")
    assert {tensor.dtype for tensor in new.values()} == {torch.bfloat16}
    record = report.layers[0]
    for at, group in enumerate(record.groups):
        mean = sum(
            w * old[EXPERT.format(0, e, "w2")].double() for w, e in zip(group.weights, group.experts, strict=True)
        )
        found = new[EXPERT.format(0, at, "w2")].double()
        assert torch.allclose(found, mean, rtol=2**-8, atol=1e-5)


def test_sizes_are_told_from_headers_and_are_right(folders, tmp_path):
    for kind, folder in folders.items():
        job = open_job(folder, Wishes("reap", 3))
        before, after = (size_of(job.source, job.layout, n) for n in (6, 3))
        report = run(folder, tmp_path / kind, "reap", experts=3)
        assert (report.before.bytes, report.after.bytes) == (before.n_bytes, after.n_bytes)
        for path, size in ((folder, before), (tmp_path / kind, after)):
            tensors = tensors_of(path)
            assert size.n_bytes == sum(tensor.nbytes for tensor in tensors.values())
            assert size.n_parameters == sum(tensor.numel() for tensor in tensors.values())
            routed = sum(tensor.numel() for name, tensor in tensors.items() if ".experts." in name)
            assert size.n_active == size.n_parameters - routed + routed * 2 // size.n_experts


def test_the_folder_has_all_that_goes_with_a_model(folders, tmp_path):
    (tmp_path / "m").mkdir()
    for file in folders["mixtral"].iterdir():
        (tmp_path / "m" / file.name).write_bytes(file.read_bytes())
    report = run(tmp_path / "m", tmp_path / "out", "m_smoe", experts=4)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "config.json", "README.md", "compression.json"} <= names
    assert "routing_manifest.json" not in names
    stored = json.loads((tmp_path / "out" / "compression.json").read_text())
    assert stored == report.model_dump(mode="json")
    assert set(stored["tensors"]) == set(tensors_of(tmp_path / "out"))
    assert "m, 4 of 6 experts" in (tmp_path / "out" / "README.md").read_text()
    run(tmp_path / "m", tmp_path / "out", "reap", experts=3, mode="overwrite")
    assert json.loads((tmp_path / "out" / "compression.json").read_text())["method"] == "reap"


@pytest.mark.parametrize(
    ("method", "wishes", "message"),
    [
        ("reap", {"experts": 7}, "7 experts shall be left, and .* has 6 in a layer\n.*choose 1 to 5"),
        ("reap", {"experts": 6}, "6 experts shall be left"),
        ("reap", {"experts": 0}, "0 experts shall be left"),
        ("reap", {}, "how many experts shall be left"),
        ("reap", {"experts": 2, "keep": 0.5}, "both were given"),
        ("reap", {"keep": 1.5}, "1.5 is no share"),
        ("reap", {"keep": float("nan")}, "nan is no share"),
        ("reap", {"keep": 0.99}, "6 experts shall be left"),
        ("reap", {"experts": 2, "router": "mean"}, "mean is not for reap"),
        ("ream", {"experts": 2, "router": "tied"}, "tied is not for ream"),
        ("reap", {"experts": 2, "align": True}, "merges nothing"),
        ("m_smoe", {"experts": 2, "rank": 0.5}, "--rank: is not for m_smoe"),
        ("hc_smoe", {"experts": 2, "cap": 3}, "--cap: is not for hc_smoe"),
        ("ream", {"experts": 2, "statistics": "s"}, "--statistics: is not for ream"),
    ],
)
def test_what_is_impossible_is_refused(folders, tmp_path, method, wishes, message):
    if "statistics" in wishes:
        wishes = wishes | {"statistics": tmp_path / "s"}
    with pytest.raises(MediatorError, match=message):
        run(folders["mixtral"], tmp_path / "out", method, **wishes)
    assert not list(tmp_path.iterdir())


def test_statistics_of_another_model_are_refused(folders, tmp_path):
    file = tmp_path / "s.safetensors"
    run(folders["mixtral"], tmp_path / "a", "reap", experts=3, statistics=file)
    other = make_mixture(tmp_path / "other", seed=1)
    with pytest.raises(MediatorError, match="is of another model than"):
        run(other, tmp_path / "b", "reap", experts=3, statistics=file)
    with pytest.raises(MediatorError, match="holds no statistics of a calibration"):
        run(other, tmp_path / "b", "reap", experts=3, statistics=next(other.glob("*.safetensors")))
    assert not (tmp_path / "b").exists()


def test_experts_that_are_not_finite_are_refused(folders, tmp_path):
    folder = make_mixture(tmp_path / "m")
    file = tmp_path / "s.safetensors"
    run(folder, tmp_path / "a", "hc_smoe", experts=3, statistics=file)
    edit(folder, lambda t: t[EXPERT.format(1, 2, "w3")].__setitem__((0, 0), float("nan")))
    with pytest.raises(MediatorError, match=r"layer 1: what its experts give .* NaN"):
        run(folder, tmp_path / "b", "hc_smoe", experts=3)
    # With statistics from before, they are met when the weights are read.
    with pytest.raises(MediatorError, match=r"experts.\d.w3.weight.*holds NaN"):
        run(folder, tmp_path / "b", "hc_smoe", experts=1, statistics=file)
    assert not (tmp_path / "b").exists()
    assert not list(tmp_path.glob(".b*"))


def test_formats_that_cannot_be_compressed_are_named():
    config = {
        "model_type": "granitemoeshared",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 1,
    }
    layout = moe_layout("m", config, {"model.layers.0.block_sparse_moe.router.layer.weight"})
    with pytest.raises(MediatorError, match=r"is granitemoeshared, whose experts .*\n.*mixtral, qwen2_moe, qwen3_moe"):
        make_job(Wishes("reap", 2), "m", layout)

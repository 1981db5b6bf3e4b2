"""The router away from its bundle: it decides bit for bit as the bundle does, and what cannot leave is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROUTE_ALL, Workshop, add_prompts, all_files, edit_json, edit_tensors, make_workshop, with_prompts
from safetensors import safe_open
from tiny_tokens import FILMS, SUMS, task_prompts

from mediator_cli.bundle.manifest import read_manifest
from mediator_cli.bundle.read import read_bundle
from mediator_cli.bundle.router_folder import EMBEDDINGS, ROUTER_RECORD, read_router_folder
from mediator_cli.bundle.router_record import PolicyRecord, RouterRecord
from mediator_cli.errors import BundleError, OutputError
from mediator_cli.export.router import checked_router, export_router, write_router_folder
from mediator_cli.export.settings import Run
from mediator_cli.pipeline.router import route_texts
from mediator_cli.serve.router import open_router

TEXTS = [*task_prompts(SUMS)[::9], *task_prompts(FILMS)[::9], "two film", "the and of a", "is plot three left"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return add_prompts(make_workshop(tmp_path_factory.mktemp("export")))


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def same_as_bundle(bundle: Path, exported: Path) -> None:
    alone, inside = open_router(exported), open_router(bundle)
    for text in TEXTS:
        _, routing = route_texts(bundle, [text])
        found = alone.decide_chat(asked(text))
        assert list(found.probabilities.values()) == routing.probabilities[0].tolist()
        assert [found.weights.get(name, 0.0) for name in routing.experts] == routing.weights[0].tolist()
        assert (found.uncertainty, found.score) == (routing.entropy[0], routing.score[0])
        assert found.is_outside == routing.is_outside[0]
        assert found == inside.decide_chat(asked(text))


@pytest.mark.parametrize("features", ["embedding_mean", "text"])
def test_an_exported_router_decides_as_its_bundle_does(place: Workshop, routed_once: Path, features: str) -> None:
    bundle = routed_once
    if features == "text":
        bundle = place.merge("text", experts=with_prompts(), router={"features": "text"}, **ROUTE_ALL)
    target = place.folder / f"router-{features}"
    report = export_router(bundle, target, Run())
    same_as_bundle(bundle, target)
    has_table = (target / EMBEDDINGS).is_file()
    assert has_table == (report.embedding_bytes > 0) == (features == "embedding_mean")
    assert report.bytes == sum(file.stat().st_size for file in target.rglob("*") if file.name != "export.json")


def test_the_embeddings_keep_their_dtype_and_bits(place: Workshop, routed_once: Path) -> None:
    export_router(routed_once, place.folder / "bits", Run())
    with (
        safe_open(routed_once / "model.safetensors", "pt") as dense,
        safe_open(place.folder / "bits" / EMBEDDINGS, "pt") as table,
    ):
        assert torch.equal(dense.get_tensor("model.embed_tokens.weight"), table.get_tensor("embeddings"))
        assert table.get_tensor("embeddings").dtype == torch.bfloat16


def test_a_chat_is_read_by_its_last_user_turn_templated_or_not(place: Workshop, routed_once: Path) -> None:
    export_router(routed_once, place.folder / "turns", Run())
    router = open_router(place.folder / "turns")
    alone = router.decide_chat(asked("two plus three"))
    longer = [*asked("dull film plot"), {"role": "assistant", "content": "fine"}, *asked("two plus three")]
    assert router.decide_chat(longer) == alone
    assert router.decide_text("<|user|> two plus three <|bot|>") == alone
    assert router.decide_text("two plus three") == alone
    assert router.decide_ids([3, 5, 7, 6, 4]) == alone
    assert router.decide_chat([{"role": "system", "content": " "}]).weights == {}


def test_what_stands_in_the_folder_is_said_in_its_record(place: Workshop, routed_once: Path) -> None:
    target = place.folder / "record"
    export_router(routed_once, target, Run(), {"a": "expert-a", "b": "expert-b"})
    record = read_router_folder(target)
    assert record.bundle == read_manifest(routed_once).digest
    assert record.models == {"a": "expert-a", "b": "expert-b"}
    assert {file.name for file in record.files} >= {"tokenizer.json", "tokenizer_config.json"}
    config = yaml.safe_load((target / "semantic-router.yaml").read_text())
    names = [ref.get("lora_name") for one in config["routing"]["decisions"] for ref in one["modelRefs"]]
    assert names == ["expert-a", "expert-b", None]
    assert [lora["name"] for lora in config["routing"]["modelCards"][0]["loras"]] == names[:2]


@pytest.mark.slow
def test_an_exported_router_needs_no_torch(place: Workshop, routed_once: Path) -> None:
    export_router(routed_once, place.folder / "plain", Run())
    code = (
        "import sys; from pathlib import Path; from mediator_cli.serve.router.decide import _rows_of;"
        "from mediator_cli.bundle.router_folder import read_router_folder as read;"
        "folder = Path(sys.argv[1]); rows = _rows_of(folder, read(folder).embeddings);"
        "print(rows([0, 3]).sum(), 'torch' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(place.folder / "plain")],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    with safe_open(place.folder / "plain" / EMBEDDINGS, "pt") as table:
        expected = table.get_tensor("embeddings")[[0, 3]].float().numpy().sum()
    total, has_torch = run.stdout.split()
    assert (np.float32(total), has_torch) == (expected, "False")


def test_blind_routers_travel_without_tokenizer(routed_once: Path, tmp_path: Path) -> None:
    bundle = read_bundle(routed_once)
    policy = PolicyRecord(rule="fixed", weights={"a": 0.5, "b": 0.25})
    fields = {"features": "none", "classifier": "none", "policy": policy, "file": None, "size": 1, "report": None}
    record = RouterRecord.model_validate(bundle.manifest.router.model_dump() | fields | {"outside_above": None})
    write_router_folder(bundle, record, tmp_path)
    assert open_router(tmp_path).decide_text("x").weights == {"a": 0.5, "b": 0.25}
    assert not (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize(("features", "said"), [("hidden_mean", "runs the dense expert"), ("perplexity", "asks")])
def test_routers_that_need_the_bundle_are_refused(routed_once: Path, features: str, said: str) -> None:
    bundle = read_bundle(routed_once)
    router = bundle.manifest.router.model_copy(update={"features": features})
    bundle = replace(bundle, manifest=bundle.manifest.model_copy(update={"router": router}))
    with pytest.raises(BundleError) as error:
        checked_router(bundle)
    assert said in error.value.problems[0].message
    assert "--features embedding_mean" in error.value.problems[0].hint


def test_a_bundle_without_router_is_refused_and_nothing_is_left(place: Workshop) -> None:
    bundle = place.merge("unrouted", **ROUTE_ALL)
    before = all_files(place.folder)
    with pytest.raises(BundleError, match="no router"):
        export_router(bundle, place.folder / "never", Run())
    assert all_files(place.folder) == before


def test_an_output_that_stands_is_kept_unless_it_may_go(place: Workshop, routed_once: Path) -> None:
    target = place.folder / "twice"
    export_router(routed_once, target, Run())
    with pytest.raises(OutputError, match="exists"):
        export_router(routed_once, target, Run())
    export_router(routed_once, target, Run(overwrite=True))
    open_router(target)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / EMBEDDINGS).unlink(), "embeddings"),
        (lambda folder: edit_tensors(folder / EMBEDDINGS, lambda t: t.update(embeddings=torch.zeros(3, 8))), "is not"),
        (lambda folder: edit_json(folder / ROUTER_RECORD, models={"a": "a"}), "do not name every expert"),
        (lambda folder: edit_json(folder / ROUTER_RECORD, version=2), "not a"),
        (lambda folder: edit_json(folder / ROUTER_RECORD, embeddings=None), "are missing"),
        (lambda folder: (folder / "router.safetensors").write_bytes(b"x" * 100), "router.safetensors"),
        (lambda folder: _lead_out(folder), "unsafe file name"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(place: Workshop, routed_once: Path, damage, said, tmp_path) -> None:
    target = tmp_path / "router"
    export_router(routed_once, target, Run())
    damage(target)
    with pytest.raises(BundleError, match=said):
        open_router(target)


def _lead_out(folder: Path) -> None:
    table = json.loads((folder / ROUTER_RECORD).read_text())["embeddings"]
    table["file"]["name"] = "../embeddings.safetensors"
    edit_json(folder / ROUTER_RECORD, embeddings=table)

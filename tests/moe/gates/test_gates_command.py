"""`mediator gates`: what it shows against routers of the whole model, and gates made anew."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run, Workshop, edit_tensors, with_prompts
from safetensors.torch import load_file
from tiny_moe import tiny_moe
from tiny_tokens import FILMS, SUMS, task_prompts, word_tokenizer, write_prompts
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM

from mediator_cli.bundle.manifest import read_manifest
from mediator_cli.moe.gates.formulas import uniform_gates
from mediator_cli.moe.layerwise import router_of

PROMPTS = {"sums": task_prompts(SUMS, 12), "films": task_prompts(FILMS, 12), "fillers": ["and the is", "a of", "the"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral of three experts, with prompts of three tasks beside it."""
    root = tmp_path_factory.mktemp("gates")
    word_tokenizer().save_pretrained(tiny_moe(root / "model", "mixtral"))
    for name, prompts in PROMPTS.items():
        write_prompts(root / f"{name}.test.jsonl", prompts)
    return root


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "model", tmp_path / "model"))


def _files(made: Path) -> list[str]:
    return [str(made / f"{name}.test.jsonl") for name in PROMPTS]


def _note(layer: torch.nn.Module, seen: list[np.ndarray]) -> RemovableHandle:
    """Note the logits of a layer's router behind the first token, with which all prompts begin."""
    router = router_of(layer)
    assert router is not None
    return router.register_forward_hook(lambda _, __, out: seen.append(out[0].numpy()[1:]))


def _naive(folder: Path) -> tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]:
    """Share of first choices and mean weight [layers, experts] of each task, prompt by prompt."""
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    first: dict[str, np.ndarray] = {}
    weight: dict[str, np.ndarray] = {}
    tokenizer = word_tokenizer()
    for task, texts in PROMPTS.items():
        seen: list[list[np.ndarray]] = [[], [], []]
        hooks = [_note(layer, seen[at]) for at, layer in enumerate(whole.model.layers)]
        for text in texts:
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            with torch.no_grad():
                whole(ids["input_ids"])
        for hook in hooks:
            hook.remove()
        logits = np.stack([np.concatenate(own) for own in seen]).astype(np.float64)
        first[task] = np.stack([(logits.argmax(-1) == expert).mean(-1) for expert in range(3)], axis=-1)
        lowest = logits.argmin(-1)[..., None] == np.arange(3)
        powers = np.where(lowest, 0, np.exp(logits))
        weight[task] = (powers / powers.sum(-1, keepdims=True)).mean(axis=1)
    return first, weight


def test_what_is_shown_is_what_the_routers_do(made: Path, mediator: Callable[..., Run]) -> None:
    look = json.loads(mediator("gates", made / "model", "--tasks", *_files(made), "--json").out)["look"]
    first, weight = _naive(made / "model")
    assert look["experts"] == ["0", "1", "2"]
    for task in PROMPTS:
        np.testing.assert_allclose(look["tasks"][task]["first"], first[task], atol=1e-9)
        np.testing.assert_allclose(look["tasks"][task]["weight"], weight[task], atol=1e-5)
    np.testing.assert_allclose(look["load"], np.mean([weight[task] for task in PROMPTS], axis=0), atol=1e-5)
    assert look["own"] is None


def test_gates_are_made_anew_in_another_folder(made: Path, tmp_path: Path, mediator: Callable[..., Run]) -> None:
    pairs = [word for name in PROMPTS for word in ("--prompts", f"{name}={made}/{name}.test.jsonl")]
    target, page = tmp_path / "out", tmp_path / "gates.html"
    run = mediator("gates", made / "model", "--fit", "ridge", *pairs, "--raw", "-o", target, "--plot", page, "--json")
    assert run.code == 0, run.err
    told = json.loads(run.out)
    assert told["fit"]["experts"] == list(PROMPTS)
    before, after = (load_file(folder / "model.safetensors") for folder in (made / "model", target))
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {f"model.layers.{n}.block_sparse_moe.gate.weight" for n in range(3)}
    page_text = page.read_text()
    assert "<script" not in page_text
    assert page_text.count("<h2>") == 3
    assert page_text.count('class="cell') == 3 * 3 * 3


def test_gates_are_made_anew_in_place(model: Path, made: Path, mediator: Callable[..., Run]) -> None:
    run = mediator("gates", model, "--fit", "uniform_random", "--seed", "5", "--experts", ",".join(PROMPTS))
    assert run.code == 0, run.err
    assert "gates written to" in run.out
    gates = load_file(model / "model.safetensors")["model.layers.2.block_sparse_moe.gate.weight"]
    np.testing.assert_allclose(gates.numpy(), uniform_gates(3, 16, 5, 2), atol=1e-7)
    names = ",".join(PROMPTS)
    shown = mediator("gates", model, "--tasks", *_files(made), "--experts", names)
    assert "own: tokens that go first to the expert named like their task" in shown.out
    lines = [line.split() for line in shown.out.splitlines()]
    assert ["task", *PROMPTS, "entropy"] in lines
    assert [line[0] for line in lines if line][-5:-2] == ["0", "1", "2"]


def test_the_manifest_says_how_gates_were_made_anew(shop: Workshop, mediator: Callable[..., Run]) -> None:
    folder = shop.merge("moe", kind="moe", experts=with_prompts(), moe={"gates": {"method": "random"}})
    run = mediator("gates", folder, "--fit", "ridge", "--limit", "10", "--json")
    fit = json.loads(run.out)["fit"]
    assert fit["experts"] == ["a", "b"]
    manifest = read_manifest(folder)
    assert manifest.moe is not None
    assert manifest.moe.gates.method == "ridge"
    assert manifest.moe.gates.n_prompts == 20
    assert list(manifest.moe.gates.agreement.values()) == [round(each["agreement"], 6) for each in fit["layers"]]
    assert manifest.notices[-1] == "gates made anew with method ridge"
    assert "intact" in mediator("verify", folder).out
    shown = mediator("gates", folder).out
    assert "own: tokens that go first to the expert named like their task" in shown


def test_a_picture_is_drawn(made: Path, tmp_path: Path, mediator: Callable[..., Run]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "gates.png"
    run = mediator("gates", made / "model", "--tasks", f"one={_files(made)[0]}", "--plot", picture)
    assert run.code == 0, run.err
    assert picture.read_bytes().startswith(b"\x89PNG")


def _break_gates(folder: Path) -> None:
    edit_tensors(
        folder / "model.safetensors", lambda t: t["model.layers.2.block_sparse_moe.gate.weight"].fill_(torch.nan)
    )


def test_gates_of_nan_are_named_by_layer(model: Path, made: Path, refused: Callable[..., None]) -> None:
    _break_gates(model)
    hint = "mediator gates DIR --fit METHOD"
    refused("layer 2", "its gates choose nothing", hint, "gates", model, "--tasks", *_files(made))


@pytest.mark.parametrize(
    ("words", "place", "message", "hint"),
    [
        (["MODEL"], "--tasks", "notes no prompts to look at", "--tasks NAME=FILE"),
        (["MODEL", "--fit", "ridge"], "0", "this expert has no prompts", "random, uniform_random"),
        (["MODEL", "--temperature", "2"], "--temperature", "goes with --fit METHOD only", "--fit"),
        (["MODEL", "--fit", "random", "--experts", "a,b"], "MODEL", "has 3 experts; these are named: a, b", "order"),
        (["MODEL", "--fit", "random", "-o", "base"], "base", "exists", "another output"),
        (["MODEL", "--tasks", "absent.jsonl"], "absent.jsonl", "cannot read", "check the path"),
        (["MODEL", "--plot", "gates.doc"], "gates.doc", "is not a picture format", ".png"),
        (["base", "--fit", "random"], "base", "is no Mixture of Experts", "mixtral"),
        (["nowhere"], "nowhere/config.json", "cannot read", "check the path"),
    ],
)
def test_what_cannot_be_done_is_refused(
    words: list[str], place: str, message: str, hint: str, made: Path, refused: Callable[..., None]
) -> None:
    folder = str(made / "model")
    refused(place.replace("MODEL", folder), message, hint, "gates", *(w.replace("MODEL", folder) for w in words))

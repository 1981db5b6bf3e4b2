"""Fitted gates against a forward of the whole model, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import edit_tensors
from tiny_moe import KINDS, tiny_moe
from tiny_tokens import FILMS, SUMS, task_prompts, word_tokenizer
from transformers import AutoModelForCausalLM

from mediator_cli.errors import CheckpointError, RecipeError
from mediator_cli.moe.gates.fit import STRENGTHS, fit_gates
from mediator_cli.moe.gates.formulas import ridge_gates
from mediator_cli.moe.gates.settings import GateSettings
from mediator_cli.moe.layerwise import router_of
from mediator_cli.plan.moe_plan import ExpertPrompts

NAMES = ("sums", "films", "base")
WORDY = ("and", "the", "is", "a", "of")
PROMPTS = {
    "sums": ExpertPrompts(tuple(task_prompts(SUMS, 40)), ("the film",)),
    "films": ExpertPrompts(tuple(task_prompts(FILMS, 40)), ("two plus three",)),
    "base": ExpertPrompts(tuple(task_prompts(WORDY, 40))),
}
RIDGE = GateSettings("ridge", prompts=20)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """One folder of each format and a dense base, with a tokenizer of twenty words."""
    root = tmp_path_factory.mktemp("moe")
    found = {kind: tiny_moe(root / kind, kind) for kind in [*KINDS, "llama"]}
    for folder in found.values():
        word_tokenizer().save_pretrained(folder)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_gates_tell_the_tasks_apart_in_every_format(kind: str, folders: Mapping[str, Path]) -> None:
    # Bare, since what a template puts behind a prompt says little in a model of random weights.
    fit = fit_gates(folders[kind], None, PROMPTS, NAMES, GateSettings("ridge", chat=False, prompts=20))
    dense = KINDS[kind].get("mlp_only_layers", [])
    assert [layer.layer for layer in fit.report.layers] == [n for n in range(3) if n not in dense]
    assert all(rows.shape == (3, 16) and rows.dtype == np.float32 for rows in fit.gates.values())
    assert fit.report.held_out
    assert fit.report.agreement is not None
    # One choice in three would be right by chance; attention over random weights mixes tokens.
    assert fit.report.agreement > 0.6
    for layer in fit.report.layers:
        assert sum(layer.load or ()) == pytest.approx(1, abs=1e-6)


def _with_gates(folder: Path, gates: Mapping[str, np.ndarray]) -> torch.nn.Module:
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, rows in gates.items():
        router = router_of(whole.model.layers[int(name.split(".")[2])])
        router.weight.data = torch.from_numpy(rows)  # type: ignore[union-attr]
    return whole


@pytest.mark.parametrize("kind", ["mixtral", "granitemoeshared"])
def test_states_come_through_the_gates_made_before(kind: str, folders: Mapping[str, Path]) -> None:
    """The last layer's gates are those of states of the whole model, in which all gates before are the new ones."""
    settings = GateSettings("ridge", prompts=4)  # too few to hold any out
    fit = fit_gates(folders[kind], None, PROMPTS, NAMES, settings)
    assert not fit.report.held_out
    whole = _with_gates(folders[kind], fit.gates)
    seen: list[torch.Tensor] = []
    router = router_of(whole.model.layers[2])
    router.register_forward_pre_hook(lambda _, given: seen.append(given[0].reshape(-1, 16)))  # type: ignore[union-attr]
    tokenizer, labels = word_tokenizer(), []
    for at, name in enumerate(NAMES):
        for text in PROMPTS[name].positive[::10]:
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            with torch.no_grad():
                whole(ids["input_ids"])
            seen[-1] = seen[-1][1:]  # all prompts begin with <|user|>
            labels += [at] * len(seen[-1])
    wanted = ridge_gates(torch.cat(seen).numpy(), np.array(labels), 3, STRENGTHS["ridge"])
    made = list(fit.gates.values())[2]
    np.testing.assert_allclose(made / np.linalg.norm(made), wanted / np.linalg.norm(wanted), atol=1e-4)


@pytest.mark.parametrize("method", ["hidden", "hidden_avg", "hidden_last", "cheap_embed"])
def test_gates_of_mergekit_are_those_of_the_base(method: str, folders: Mapping[str, Path]) -> None:
    settings = GateSettings(method, chat=False)  # type: ignore[arg-type]
    fit = fit_gates(folders["mixtral"], folders["llama"], PROMPTS, NAMES, settings)
    whole = AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.float32).eval()

    def mean(texts: tuple[str, ...]) -> torch.Tensor:
        """Mean state [layers, hidden] of prompts run one by one."""
        found = []
        for text in texts:
            ids = torch.tensor([[1, *word_tokenizer().encode(text)]])
            with torch.no_grad():
                states = torch.cat(whole(ids, output_hidden_states=True).hidden_states[:-1])
            summed = whole.model.embed_tokens(ids).sum(dim=1).expand(3, -1)
            parts = {"hidden_avg": states.mean(dim=1), "cheap_embed": summed}
            found.append(parts.get(method, states[:, -1]))
        total = torch.stack(found).mean(dim=0) if found else torch.zeros(3, 16)
        return torch.nn.functional.normalize(total, dim=-1) if method == "cheap_embed" else total

    for at, name in enumerate(NAMES):
        wanted = torch.nn.functional.normalize(mean(PROMPTS[name].positive) - mean(PROMPTS[name].negative), dim=-1)
        for layer, rows in enumerate(fit.gates.values()):
            np.testing.assert_allclose(rows[at], wanted[layer].detach().numpy(), atol=1e-5)


def test_temperature_divides_gates_that_are_calibrated(folders: Mapping[str, Path]) -> None:
    warm, cold = (
        next(iter(fit_gates(folders["mixtral"], None, PROMPTS, NAMES, GateSettings("centred", t)).gates.values()))
        for t in (None, 0.25)
    )
    np.testing.assert_allclose(cold, 4 * warm, rtol=1e-5)


def test_the_base_may_go_without_prompts(folders: Mapping[str, Path]) -> None:
    two = {name: PROMPTS[name] for name in ("sums", "films")}
    for method in ("centred", "ridge", "logistic"):
        fit = fit_gates(folders["mixtral"], None, two, NAMES, GateSettings(method, prompts=10))  # type: ignore[arg-type]
        assert all(not rows[2].any() and rows[:2].any(axis=1).all() for rows in fit.gates.values())
        assert any("the base has no prompts" in notice for notice in fit.report.notices)


def test_gates_that_need_no_prompts(folders: Mapping[str, Path]) -> None:
    for method in ("random", "uniform_random"):
        settings = GateSettings(method, seed=3)  # type: ignore[arg-type]
        first, again = (fit_gates(folders["qwen2_moe"], None, {}, NAMES, settings) for _ in range(2))
        assert first.report.agreement is None
        assert list(first.gates) == ["model.layers.0.mlp.gate.weight", "model.layers.2.mlp.gate.weight"]
        for name, rows in first.gates.items():
            np.testing.assert_array_equal(rows, again.gates[name])


def test_the_same_prompts_give_the_same_gates(folders: Mapping[str, Path]) -> None:
    first, again = (fit_gates(folders["qwen3_moe"], None, PROMPTS, NAMES, RIDGE) for _ in range(2))
    for name, rows in first.gates.items():
        np.testing.assert_array_equal(rows, again.gates[name])


SAME = {**PROMPTS, "films": PROMPTS["sums"]}
NONE = {**PROMPTS, "films": ExpertPrompts()}
NO_BASE = {name: PROMPTS[name] for name in ("sums", "films")}


@pytest.mark.parametrize(
    ("settings", "prompts", "names", "message"),
    [
        (RIDGE, NONE, NAMES, "films: this expert has no prompts\n  hint: .*random, uniform_random"),
        (RIDGE, SAME, NAMES, "sums, films: have the same prompts"),
        (RIDGE, PROMPTS, ("sums", "film", "base"), "films: has prompts, but is no expert of this MoE"),
        (RIDGE, PROMPTS, ("sums", "films"), "has 3 experts, 2 names are given"),
        (RIDGE, {}, ("base", "b", "c"), "b: this expert has no prompts"),
        (GateSettings("hidden"), NO_BASE, NAMES, "base: needs prompts with gates 'hidden'"),
        (GateSettings("hidden"), PROMPTS, NAMES, "base: gates 'hidden' read the base model"),
        (GateSettings("ridged"), PROMPTS, NAMES, "no gates 'ridged'\n  hint: did you mean 'ridge'"),  # type: ignore[arg-type]
        (GateSettings(temperature=0.0), PROMPTS, NAMES, "temperature: is 0.0"),
        (GateSettings(strength=float("nan")), PROMPTS, NAMES, "strength: is nan"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    settings: GateSettings,
    prompts: Mapping[str, ExpertPrompts],
    names: tuple[str, ...],
    message: str,
    folders: Mapping[str, Path],
) -> None:
    with pytest.raises(RecipeError, match=message):
        fit_gates(folders["mixtral"], None, prompts, names, settings)


def test_a_base_of_another_width_is_refused(folders: Mapping[str, Path], tmp_path: Path) -> None:
    other = tiny_moe(tmp_path / "base", "llama", hidden_size=8)
    word_tokenizer().save_pretrained(other)
    with pytest.raises(CheckpointError, match="has 3 layers of width 8, the MoE 3 of 16"):
        fit_gates(folders["mixtral"], other, PROMPTS, NAMES, GateSettings("hidden"))


def test_states_that_are_not_finite_are_named_by_layer(tmp_path: Path) -> None:
    folder = tiny_moe(tmp_path / "m", "mixtral")
    word_tokenizer().save_pretrained(folder)
    edit_tensors(folder / "model.safetensors", lambda t: t["model.layers.1.self_attn.o_proj.weight"].fill_(torch.nan))
    with pytest.raises(CheckpointError, match="layer 1: its states are not finite"):
        fit_gates(folder, None, PROMPTS, NAMES, RIDGE)


def test_dense_models_have_no_gates(folders: Mapping[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="is no Mixture of Experts"):
        fit_gates(folders["llama"], None, PROMPTS, NAMES, RIDGE)

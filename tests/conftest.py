"""Tiny checkpoints, adapters and recipes, made in the test's own folder."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from safetensors.torch import load_file, save_file
from tiny_tokens import FILMS, SUMS, task_prompts, word_tokenizer, write_prompts

from mediator_cli import Settings, load_recipe, make_plan, merge
from mediator_cli.checkpoint.cache import write_note
from mediator_cli.cli.app import main
from mediator_cli.methods import registry
from mediator_cli.pipeline.calibrate import Machine, machine_key
from mediator_cli.recipe.load import LoadedRecipe

# The same examples in every run, and no limit of time: a busy machine is no failure.
hypothesis_settings.register_profile(
    "mediator", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
hypothesis_settings.load_profile("mediator")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave what the imports made out of every later search for garbage, and search as seldom as the program does."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def _own_notes(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what the package notes between runs out of the user's folder, and out of a test's own."""
    os.environ["MEDIATOR_CACHE"] = str(tmp_path_factory.mktemp("notes"))
    # What this machine takes to start and to share its memory is measured where that is the point: it takes long.
    write_note("calibration", machine_key(), json.dumps(asdict(Machine(1.0, 1.0, 1.0, {}, {}))))


@pytest.fixture(scope="session", autouse=True)
def _packages_stay_as_they_are() -> Iterator[None]:
    """Look only once through all installed packages for methods of their own: every plan does, and nothing changes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "entry_points", cache(registry.entry_points))
        yield


@pytest.fixture(scope="session", autouse=True)
def _commands_stay_as_they_are() -> Iterator[None]:
    """Read the options of all commands once, not at every call of `main`: that takes longer than most of the calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", cache(typer.main.get_command))
        yield


@pytest.fixture(scope="session", autouse=True)
def _disks_are_not_waited_for() -> Iterator[None]:
    """Let the disk write when it likes: no test cuts the power, and what fails or dies at a sync is made to here."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, lambda descriptor: None)
        yield


HIDDEN, INNER, VOCAB, LAYERS = 8, 12, 20, 3
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCAB,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def shapes(layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a tiny tied Llama."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for n in range(layers):
        layer = f"model.layers.{n}"
        found |= {
            f"{layer}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{layer}.self_attn.k_proj.weight": (HIDDEN // 2, HIDDEN),
            f"{layer}.self_attn.v_proj.weight": (HIDDEN // 2, HIDDEN),
            f"{layer}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{layer}.mlp.gate_proj.weight": (INNER, HIDDEN),
            f"{layer}.mlp.up_proj.weight": (INNER, HIDDEN),
            f"{layer}.mlp.down_proj.weight": (HIDDEN, INNER),
            f"{layer}.input_layernorm.weight": (HIDDEN,),
            f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
        }
    return found | {"model.norm.weight": (HIDDEN,)}


def random_tensors(seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Draw the tensors of a tiny base."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes().items()}


def fine_tune(base: dict[str, torch.Tensor], seed: int, size: float = 0.05) -> dict[str, torch.Tensor]:
    """Move every entry of a base a little."""
    generator = torch.Generator().manual_seed(seed)
    return {k: (v.float() + size * torch.randn(v.shape, generator=generator)).to(v.dtype) for k, v in base.items()}


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Path:
    """Write a model folder as transformers would."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "do_sample": False}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def write_adapter(folder: Path, seed: int, rank: int = 2, **config: Any) -> Path:
    """Write a LoRA adapter on the linear weights of all layers as PEFT would."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in shapes().items():
        if name.endswith("_proj.weight"):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = 0.2 * torch.randn(rank, shape[1], generator=generator)
            tensors[f"{module}.lora_B.weight"] = 0.2 * torch.randn(shape[0], rank, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    facts = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "base_model_name_or_path": "base", "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(facts | config))
    return folder


def edit_json(file: Path, **fields: Any) -> None:
    """Set fields of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a safetensors file."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def put(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    """Give a change for `edit_tensors` that sets one tensor."""
    return lambda tensors: tensors.update({name: tensor})


@dataclass(frozen=True)
class Workshop:
    """A folder with a base, two full experts, one adapter, and recipes over them."""

    folder: Path
    base: dict[str, torch.Tensor]
    experts: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    def recipe(self, name: str = "recipe.yaml", **fields: Any) -> Path:
        """Write a recipe over base and experts a, b; fields win."""
        experts = [{"name": n, "model": f"./{n}"} for n in ("a", "b")]
        data = {"version": 1, "base": "./base", "experts": experts, **fields}
        path = self.folder / name
        path.write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in data.items()) + "\n")
        return path

    def merge(self, name: str = "out", /, settings: Settings | None = None, **fields: Any) -> Path:
        """Write a recipe, plan it and merge."""
        plan = make_plan(load_recipe(self.recipe(f"{name}.yaml", **fields)))
        return merge(plan, self.folder / name, settings=settings or Settings(workers=2))


def make_workshop(folder: Path) -> Workshop:
    """Make base, experts a and b, and adapter `lora`."""
    base = random_tensors(0)
    made = Workshop(folder, base, {"a": fine_tune(base, 1), "b": fine_tune(base, 2)})
    write_checkpoint(folder / "base", base)
    for name, tensors in made.experts.items():
        write_checkpoint(folder / name, tensors)
    write_adapter(folder / "lora", 3)
    return made


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    """Make a workshop of the test's own."""
    return make_workshop(tmp_path)


ROUTE_ALL = {"assign": {"rule": "all"}, "extract": {"density": 0.5}}


def with_prompts(*names: str) -> list[dict[str, str]]:
    """Give the recipe's entries of experts with their prompts."""
    return [{"name": name, "model": f"./{name}", "prompts": f"./{name}.jsonl"} for name in names or ("a", "b")]


def add_prompts(workshop: Workshop) -> Workshop:
    """Give a workshop prompts for a and b, and a tokenizer of twenty words."""
    write_prompts(workshop.folder / "a.jsonl", task_prompts(SUMS))
    write_prompts(workshop.folder / "b.jsonl", task_prompts(FILMS))
    for name in ("base", "a", "b"):
        (workshop.folder / name / "chat_template.jinja").unlink()
        word_tokenizer().save_pretrained(workshop.folder / name)
    return workshop


@pytest.fixture
def shop(workshop: Workshop) -> Workshop:
    """A workshop with prompts for a and b, and a tokenizer of twenty words."""
    return add_prompts(workshop)


@pytest.fixture(scope="session")
def routed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Merge the bundle that `routed` copies; it has the same bytes wherever it is merged."""
    return add_prompts(make_workshop(tmp_path_factory.mktemp("routed"))).merge(
        "out", experts=with_prompts(), **ROUTE_ALL
    )


@pytest.fixture
def routed(shop: Workshop, routed_once: Path) -> Path:
    """A bundle with a router for a and b."""
    shop.recipe("out.yaml", experts=with_prompts(), **ROUTE_ALL)
    return shutil.copytree(routed_once, shop.folder / "out")


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., LoadedRecipe]:
    """Load a recipe from a text, with changes."""

    def from_text(text: str, *changes: str) -> LoadedRecipe:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return load_recipe(path, changes)

    return from_text


@dataclass(frozen=True)
class Run:
    """What one call of the command line gave."""

    code: int
    out: str
    err: str


@pytest.fixture
def mediator(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Run]:
    """Call `mediator` with some words, in the workshop's folder, through the entry point of the package."""
    monkeypatch.chdir(workshop.folder)

    def call(*words: object) -> Run:
        monkeypatch.setattr(sys, "argv", ["mediator", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        return Run(exit_.value.code or 0, *capsys.readouterr())

    return call


def all_files(folder: Path) -> dict[str, bytes | None]:
    """List a folder with all that it holds: the bytes of files, None for folders."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture
def refused(mediator: Callable[..., Run], workshop: Workshop) -> Callable[..., None]:
    """Call `mediator`, default `merge recipe.yaml -o out`, and expect one refusal that leaves no trace on disk."""

    def check(place: str, message: str, hint: str, *words: object) -> None:
        before = all_files(workshop.folder)
        run = mediator(*(words or ("merge", "recipe.yaml", "-o", "out")))
        assert run.code == 2
        assert "Traceback" not in run.err
        lines = run.err.splitlines()
        start = f"error: {place}: ".replace("error: : ", "error: ")
        found = [n for n, line in enumerate(lines) if line.startswith(start) and message in line]
        assert len(found) == 1, run.err
        assert not hint or (lines[found[0] + 1].startswith("  hint: ") and hint in lines[found[0] + 1]), run.err
        assert all_files(workshop.folder) == before

    return check

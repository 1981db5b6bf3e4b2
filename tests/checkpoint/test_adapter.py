"""LoRA adapters: what is supported is exact, everything else is refused by name."""

import math

import pytest
import torch
from conftest import random_tensors, write_adapter
from safetensors.torch import load_file, save_file

from mediator_cli.checkpoint.adapter.open import open_adapter
from mediator_cli.checkpoint.adapter.read import AdapterReader
from mediator_cli.checkpoint.header import TensorInfo, read_tensors
from mediator_cli.checkpoint.read import FullReader, open_files, read_floats
from mediator_cli.checkpoint.source import weight_files
from mediator_cli.errors import CheckpointError

Q = "model.layers.0.self_attn.q_proj"
MODULE = f"base_model.model.{Q}"


@pytest.fixture
def base(workshop):
    return read_tensors(workshop.folder / "base")


def refusal(folder, base):
    with pytest.raises(CheckpointError) as caught:
        open_adapter(folder, base)
    return "\n".join(f"{problem.place}: {problem.message}" for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 2.0),
        ({"lora_alpha": 3, "r": 2}, 1.5),
        ({"lora_alpha": 0.5}, 0.25),
        ({"use_rslora": True}, 4 / math.sqrt(2)),
        ({"use_rslora": False}, 2.0),
    ],
)
def test_the_scale_is_that_of_peft(tmp_path, base, config, scale):
    adapter = open_adapter(write_adapter(tmp_path / "x", 0, **config), base)
    assert {factor.scale for change in adapter.changes.values() for factor in change.products} == {scale}
    assert len(adapter.changes) == sum(name.endswith("_proj.weight") for name in base)
    assert adapter.base_name == "base"


HARMLESS = {
    "lora_dropout": 0.1, "inference_mode": True, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM",
    "use_dora": False, "modules_to_save": None, "rank_pattern": {}, "init_lora_weights": "gaussian",
    "target_parameters": [], "layer_replication": None, "fan_in_fan_out": False, "a_future_field": None,
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_settings_that_change_nothing_are_accepted(tmp_path, base, name):
    assert open_adapter(write_adapter(tmp_path / "x", 0, **{name: HARMLESS[name]}), base).changes


REFUSED = {
    "alora_invocation_tokens": ([1, 2], "acts only behind its invocation tokens", "leave it out"),
    "arrow_config": ({"top_k": 2}, "chooses adapters token by token", "one by one"),
    "layer_replication": ([[0, 2], [1, 2]], "gives the model more layers than the base has", "merge_and_unload"),
    "kasa_config": ({"beta": 1e-4}, "cuts singular values out of the base's weights", "merge_and_unload"),
    "use_qalora": (True, "fits a quantised base only", "float base"),
    "use_bdlora": ({"nblocks": 2}, "holds block-diagonal factors", "merge_and_unload"),
    "monteclora_config": ({"num_samples": 8}, "draws its weights at random", "merge_and_unload"),
    "megatron_config": ({"x": 1}, "belongs to Megatron's layers", "merge_and_unload"),
    "init_lora_weights": (
        "pissa_niter_16",
        "it changed the base's weights",
        "path_initial_model_for_weight_conversion",
    ),
    "a_future_field": ("on", "a_future_field='on' is not supported", "merge_and_unload"),
}
STARTS = {
    "olora": "it changed the base's weights", "corda": "it changed the base's weights", "pissa": "it changed",
    "lora_ga": "it changed the base's weights", "loftq": "a base quantised by LoftQ", "of_tomorrow": "is not supported",
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_no_merge_can_follow_are_refused_by_name(tmp_path, base, name):
    value, reason, hint = REFUSED[name]
    folder = write_adapter(tmp_path / "x", 0, **{name: value})
    with pytest.raises(CheckpointError) as caught:
        open_adapter(folder, base)
    (problem,) = caught.value.problems
    assert problem.place == f"{folder / 'adapter_config.json'} {name}"
    assert problem.message.startswith(f"{name}={value!r} is not supported")
    assert reason in problem.message
    assert hint in problem.hint


@pytest.mark.parametrize("start", STARTS)
def test_starts_that_change_the_base_are_refused_by_name(tmp_path, base, start):
    text = refusal(write_adapter(tmp_path / "x", 0, init_lora_weights=start), base)
    assert f"adapter_config.json init_lora_weights: init_lora_weights={start!r} is not supported" in text
    assert STARTS[start] in text


BROKEN = {
    "rank_pattern": [["q_proj"], {"q_proj": 0}, {"q_proj": 1.5}, {"(": 2}],
    "alpha_pattern": [3, {"q_proj": -1}, {"q_proj": "2"}, {"*": 2}],
    "modules_to_save": ["lm_head", [1]],
    "target_parameters": ["experts", {"a": 1}],
    "trainable_token_indices": [3, ["a"], {"embed_tokens": 3}, [True]],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BROKEN.items() for value in values])
def test_settings_of_another_form_are_refused_by_name(tmp_path, base, name, value):
    assert f"adapter_config.json {name}: " in refusal(write_adapter(tmp_path / "x", 0, **{name: value}), base)


@pytest.mark.parametrize("value", [0, -1, "8", None, True])
@pytest.mark.parametrize("name", ["r", "lora_alpha"])
def test_rank_and_alpha_must_be_positive_numbers(tmp_path, base, name, value):
    assert f"{name}: must be a positive number" in refusal(write_adapter(tmp_path / "x", 0, **{name: value}), base)


def test_every_refused_setting_is_reported_at_once(tmp_path, base):
    text = refusal(write_adapter(tmp_path / "x", 0, use_qalora=True, kasa_config={"beta": 1}, r=0), base)
    assert len(text.splitlines()) == 3


@pytest.mark.parametrize("kind", ["IA3", "LOHA", "ADALORA", "PROMPT_TUNING", "VERA", "OFT", "SHIRA", "XLORA", None])
def test_other_kinds_of_adapter_are_refused(tmp_path, base, kind):
    text = refusal(write_adapter(tmp_path / "x", 0, peft_type=kind), base)
    assert text.endswith(f"adapter_config.json peft_type: {kind} adapters are not supported")


def test_an_adapter_without_safetensors_is_refused(tmp_path, base):
    folder = write_adapter(tmp_path / "x", 0)
    (folder / "adapter_model.safetensors").unlink()
    assert "holds no adapter_model.safetensors" in refusal(folder, base)


def changed(folder, change):
    """Write an adapter whose tensors were changed."""
    file = write_adapter(folder, 0) / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)
    return folder


UNKNOWN = {
    "base_model.model.model.embed_tokens.lora_embedding_A": "model.embed_tokens: has lora_embedding_A alone",
    f"{MODULE}.lora_magnitude_vector": f"{Q}: has a magnitude but use_dora is not set in adapter_config.json",
    f"{MODULE}.lora_B.bias": f"{Q}: has a bias but lora_bias is not set in adapter_config.json",
    "base_model.model.lm_head.modules_to_save.weight": (
        "lm_head.weight: the base has no such tensor; its head is tied to its embeddings"
    ),
    f"{MODULE}.base_layer.weight": f"{Q}.weight: shape [2, 8], the base has [8, 8]",
    "base_model.model.score.weight": "score.weight: the base has no such tensor",
    f"{MODULE}.lora_A.other.weight": f"{MODULE}.lora_A.other.weight: tensor is not supported",
    f"{MODULE}.lora_diag": f"{MODULE}.lora_diag: tensor is not supported",
    f"{Q}.lora_A.weight": f"{Q}.lora_A.weight: tensor is not supported",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_tensor_without_a_place_is_refused_by_name(tmp_path, base, name):
    folder = changed(tmp_path / "x", lambda tensors: tensors.update({name: torch.ones(2, 8)}))
    assert f"adapter_model.safetensors: {UNKNOWN[name]}" in refusal(folder, base)


@pytest.mark.parametrize(("lost", "alone"), [("B", "A"), ("A", "B")])
def test_half_a_pair_is_refused(tmp_path, base, lost, alone):
    folder = changed(tmp_path / "x", lambda tensors: tensors.pop(f"{MODULE}.lora_{lost}.weight"))
    assert f"{Q}: has lora_{alone} alone" in refusal(folder, base)


SHAPES = {
    "too many columns": ("A", (2, 9), "B [8, 2] · A [2, 9] does not give [8, 8]"),
    "too many rows": ("B", (9, 2), "B [9, 2] · A [2, 8] does not give [8, 8]"),
    "other ranks": ("A", (3, 8), "B [8, 2] · A [3, 8] do not fit together"),
    "a convolution": ("A", (2, 8, 1), "A [2, 8, 1] does not give [8, 8]"),
    "a scalar": ("B", (), "B [] · A [2, 8] do not fit together"),
}


@pytest.mark.parametrize(("factor", "shape", "message"), SHAPES.values(), ids=SHAPES)
def test_factors_that_do_not_fit_the_base_are_refused(tmp_path, base, factor, shape, message):
    folder = changed(tmp_path / "x", lambda t: t.update({f"{MODULE}.lora_{factor}.weight": torch.ones(shape)}))
    assert f"{Q}.weight: " in refusal(folder, base)
    assert message in refusal(folder, base)


def test_a_module_that_the_base_lacks_is_refused(tmp_path, base):
    extra = {f"base_model.model.other.lora_{f}.weight": torch.ones(2, 2) for f in "AB"}
    text = refusal(changed(tmp_path / "x", lambda tensors: tensors.update(extra)), base)
    assert text.endswith("other.weight: the base has no such tensor, and a merge adds none")


def test_integer_factors_are_refused(tmp_path, base):
    name = f"{MODULE}.lora_A.weight"
    folder = changed(tmp_path / "x", lambda t: t.update({name: torch.ones(2, 8, dtype=torch.int8)}))
    assert f"{name}: dtype I8 is not a float type" in refusal(folder, base)


def test_names_of_the_default_adapter_are_read(tmp_path, base):
    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace(".weight", ".default.weight")] = tensors.pop(name)

    assert f"{Q}.weight" in open_adapter(changed(tmp_path / "x", rename), base).changes


def test_a_tiny_adapter_is_applied_to_every_linear_weight(workshop, base):
    adapter = open_adapter(workshop.folder / "lora", base)
    factors = load_file(adapter.file)
    with open_files([*weight_files(base), adapter.file]) as descriptors:
        reader = AdapterReader(FullReader(descriptors, base), descriptors, adapter)
        for name, tensor in random_tensors(0).items():
            module = f"base_model.model.{name.removesuffix('.weight')}"
            expected = tensor.double()
            if f"{module}.lora_A.weight" in factors:
                b, a = (factors[f"{module}.lora_{f}.weight"].double() for f in "BA")
                expected = expected + 2.0 * b @ a
            found = torch.from_numpy(read_floats(reader, name, 0, tensor.numel())).view(tensor.shape)
            assert torch.allclose(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_the_tensors_of_an_adapter_are_its_factors(workshop, base):
    adapter = open_adapter(workshop.folder / "lora", base)
    assert set(adapter.tensors) == set(load_file(adapter.file))
    assert all(isinstance(info, TensorInfo) and info.file == adapter.file for info in adapter.tensors.values())

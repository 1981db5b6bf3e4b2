"""Layers and units from names alone, for any architecture."""

import pytest

from mediator_cli.checkpoint.layout import Place, layers_of, missing_layers, place_of, unit_of

Q = "model.layers.11.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("name", "granularity", "unit"),
    [
        (Q, "layer", "model.layers.11"),
        (Q, "block", "model.layers.11.self_attn"),
        (Q, "tensor", Q),
        ("model.layers.3.input_layernorm.weight", "block", "model.layers.3.input_layernorm"),
        ("model.layers.3.mlp.experts.7.up_proj.weight", "layer", "model.layers.3"),
        ("model.layers.3.mlp.experts.7.up_proj.weight", "block", "model.layers.3.mlp"),
        ("transformer.h.0.attn.c_attn.bias", "layer", "transformer.h.0"),
        ("model.embed_tokens.weight", "layer", "model.embed_tokens"),
        ("model.norm.weight", "block", "model.norm"),
        ("lm_head.weight", "layer", "lm_head"),
        ("scale", "layer", "scale"),
        ("model.layers.2.scalar", "block", "model.layers.2"),
        ("encoder.block.0.layer.1.DenseReluDense.wi.weight", "layer", "encoder.block.0"),
        ("decoder.block.2.layer.1.EncDecAttention.q.weight", "block", "decoder.block.2.layer"),
        ("model.visual.blocks.1.attn.qkv.weight", "layer", "model.visual.blocks.1"),
        ("model.language_model.layers.1.mlp.up_proj.weight", "layer", "model.language_model.layers.1"),
        ("visual.merger.mlp.2.weight", "layer", "visual.merger.mlp.2"),
        ("backbone.layers.0.mixer.A_log", "block", "backbone.layers.0.mixer"),
    ],
)
def test_units(name, granularity, unit):
    assert unit_of(name, granularity) == unit


@pytest.mark.parametrize(
    ("name", "place", "kind"),
    [
        (Q, Place("model.layers.11", ("self_attn", "q_proj"), "weight"), "q_proj"),
        ("lm_head.weight", Place(None, ("lm_head",), "weight"), "lm_head"),
        ("model.layers.2.scalar", Place("model.layers.2", (), "scalar"), "scalar"),
        ("0.weight", Place(None, ("0",), "weight"), "0"),
        ("model.norm.2", Place(None, ("model", "norm"), "2"), "norm"),
    ],
)
def test_places_and_kinds(name, place, kind):
    assert place_of(name) == place
    assert place_of(name).kind == kind


def test_layers_are_ordered_by_number_stack_by_stack():
    names = [f"{stack}.{n}.w.weight" for stack in ("dec.block", "enc.block") for n in (10, 2, 0, 1)]
    expected = [f"{stack}.{n}" for stack in ("dec.block", "enc.block") for n in (0, 1, 2, 10)]
    assert layers_of([*names, "norm.weight"]) == tuple(expected)


def stack(*numbers, name="model.layers"):
    return [f"{name}.{n}.w.weight" for n in numbers]


@pytest.mark.parametrize("field", ["num_hidden_layers", "n_layer", "n_layers", "num_layers"])
def test_a_complete_stack_is_fine(field):
    assert missing_layers(stack(0, 1, 2), {field: 3}) is None


def test_a_gap_is_named():
    assert missing_layers(stack(0, 1, 3), {"num_hidden_layers": 4}) == "layer model.layers.2 is missing"


def test_layers_cut_off_at_the_end_are_noticed():
    fault = missing_layers(stack(0, 1), {"num_hidden_layers": 3})
    assert fault == "the config counts 3 layers, the tensors have 2 (model.layers)"


def test_a_second_stack_may_have_another_length():
    names = stack(0, 1, 2) + stack(0, 1, name="vision.blocks")
    assert missing_layers(names, {"num_hidden_layers": 3}) is None


def test_a_sequence_may_have_gaps():
    names = [*stack(0, 1), "visual.merger.mlp.0.weight", "visual.merger.mlp.2.weight", "visual.merger.mlp.2.bias"]
    assert missing_layers(names, {"num_hidden_layers": 2}) is None


@pytest.mark.parametrize(
    ("encoder", "decoder", "fault"),
    [
        ((0, 1), (0, 1, 2), None),
        ((0, 1), (0, 1), "the config counts 3 layers, the tensors have 2 (encoder.block)"),
        ((0,), (0, 1, 2), "the config counts 2 layers, the tensors have 3 (decoder.block)"),
        ((0, 1), (), "the config counts 3 layers, the tensors have 2 (encoder.block)"),
    ],
)
def test_encoder_and_decoder_are_counted_each(encoder, decoder, fault):
    names = stack(*encoder, name="encoder.block") + stack(*decoder, name="decoder.block")
    config = {"is_encoder_decoder": True, "num_layers": 2, "num_decoder_layers": 3}
    assert missing_layers(names, config) == fault
    bart = {"is_encoder_decoder": True, "encoder_layers": 2, "decoder_layers": 3, "num_hidden_layers": 2}
    assert missing_layers(names, bart) == fault


def test_a_decoder_that_the_config_does_not_count_is_as_deep_as_the_encoder():
    names = stack(0, 1, name="encoder.block") + stack(0, 1, name="decoder.block")
    config = {"is_encoder_decoder": True, "num_layers": 2, "num_decoder_layers": None}
    assert missing_layers(names, config) is None
    assert missing_layers(names[:-1], config) is not None


def test_the_language_part_of_a_model_that_sees_is_counted():
    names = stack(0, 1, 2, name="model.visual.blocks") + stack(0, 1, name="model.language_model.layers")
    config = {"text_config": {"num_hidden_layers": 2}, "vision_config": {"depth": 3}}
    assert missing_layers(names, config) is None
    assert missing_layers(names[:-1], config) is not None


def test_layers_that_predict_further_tokens_may_be_stored_behind_the_others():
    config = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    assert missing_layers(stack(0, 1), config) is None
    assert missing_layers(stack(0, 1, 2), config) is None
    assert missing_layers(stack(0, 1, 2, 3), config) is not None


def test_without_a_count_or_layers_nothing_is_missing():
    assert missing_layers(stack(0, 1), {}) is None
    assert missing_layers(["lm_head.weight"], {"num_hidden_layers": 3}) is None

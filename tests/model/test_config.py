"""The shape of a model: sizes of the paper's table, what cannot be built, and Hugging Face's way to write it."""

from dataclasses import FrozenInstanceError, fields, replace

import pytest

from tests.small import small_config
from whisper_nnx.model.config import (
    ALIASES,
    RELEASED,
    RELEASED_ALIGNMENT_HEADS,
    WhisperConfig,
    released_alignment_heads,
)


@pytest.mark.parametrize(
    ("name", "layers", "width", "heads"),  # Radford et al. 2022, table 1
    [
        ("tiny", 4, 384, 6),
        ("base", 6, 512, 8),
        ("small", 12, 768, 12),
        ("medium", 24, 1024, 16),
        ("large-v2", 32, 1280, 20),
    ],
)
def test_released_sizes_are_those_of_the_paper(name, layers, width, heads):
    config = RELEASED[name]
    assert (config.encoder_layers, config.decoder_layers) == (layers, layers)
    assert (config.d_model, config.encoder_attention_heads, config.decoder_attention_heads) == (width, heads, heads)
    assert (config.encoder_ffn_dim, config.decoder_ffn_dim) == (4 * width, 4 * width)
    assert (config.max_source_positions, config.max_target_positions) == (1500, 448)


def test_every_released_head_is_64_wide():
    assert {config.d_model / config.decoder_attention_heads for config in RELEASED.values()} == {64}


@pytest.mark.parametrize("name", ["tiny", "base", "small", "medium"])
def test_an_english_only_size_lacks_one_token(name):
    assert RELEASED[f"{name}.en"] == replace(RELEASED[name], vocab_size=RELEASED[name].vocab_size - 1)


def test_the_third_generation_hears_128_mels_and_knows_one_token_more():
    assert RELEASED["large-v3"] == replace(RELEASED["large-v2"], num_mel_bins=128, vocab_size=51866)
    assert RELEASED["large-v3-turbo"] == replace(RELEASED["large-v3"], decoder_layers=4)


def test_aliases_name_released_sizes():
    assert set(ALIASES.values()) <= set(RELEASED)


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_size_has_alignment_heads_and_is_known_by_its_shape(name):
    heads = RELEASED_ALIGNMENT_HEADS[name]
    assert replace(RELEASED[name], alignment_heads=heads).alignment_heads == heads  # they exist
    known = "large-v2" if name == "large-v1" else name  # their shapes are the same
    assert released_alignment_heads(replace(RELEASED[name], dropout=0.1)) == RELEASED_ALIGNMENT_HEADS[known]


def test_another_shape_is_no_released_size():
    assert released_alignment_heads(replace(RELEASED["tiny"], vocab_size=51870)) is None
    assert released_alignment_heads(replace(RELEASED["large-v3"], decoder_layers=2)) is None


def test_a_config_is_frozen_and_hashable():
    config = small_config(alignment_heads=[[0, 0], [1, 1]])
    assert {config: "found"}[small_config(alignment_heads=((0, 0), (1, 1)))] == "found"
    with pytest.raises(FrozenInstanceError):
        config.d_model = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"d_model": 0}, "d_model=0"),
        ({"d_model": -16}, "d_model=-16"),
        ({"d_model": 16.0}, "d_model=16.0"),
        ({"d_model": "16"}, "d_model='16'"),
        ({"d_model": 3, "encoder_attention_heads": 1, "decoder_attention_heads": 1}, "d_model=3"),
        ({"d_model": 2}, "d_model=2"),
        ({"encoder_layers": 0}, "encoder_layers=0"),
        ({"decoder_layers": True}, "decoder_layers=True"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"decoder_ffn_dim": -1}, "decoder_ffn_dim=-1"),
        ({"max_target_positions": 0}, "max_target_positions=0"),
        ({"encoder_attention_heads": 3}, "encoder_attention_heads=3"),
        ({"decoder_attention_heads": 5}, "decoder_attention_heads=5"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": float("nan")}, "dropout=nan"),
        ({"alignment_heads": [(2, 0)]}, r"\(2, 0\)"),
        ({"alignment_heads": [(0, 2)]}, r"\(0, 2\)"),
    ],
)
def test_an_impossible_shape_is_refused_with_its_value(changes, told):
    with pytest.raises(ValueError, match=told) as error:
        small_config(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", RELEASED)
def test_a_config_survives_hugging_faces_form(name):
    assert WhisperConfig.from_hf(RELEASED[name].to_hf()) == RELEASED[name]


def test_what_decides_no_shape_is_ignored_in_hugging_faces_form():
    config = small_config()
    assert WhisperConfig.from_hf({**config.to_hf(), "torch_dtype": "float16", "suppress_tokens": [1]}) == config


def test_alignment_heads_come_from_the_generation_config():
    heads = [[0, 1], [1, 0]]
    config = WhisperConfig.from_hf(small_config().to_hf(), {"alignment_heads": heads})
    assert config.alignment_heads == ((0, 1), (1, 0))
    assert WhisperConfig.from_hf(small_config().to_hf(), {}).alignment_heads is None


def test_the_generation_config_may_say_whether_to_tell_the_text_before():
    config, told = small_config().to_hf(), "condition_on_prev_tokens"
    assert WhisperConfig.from_hf(config, {told: False}).condition_on_prev_tokens is False
    assert WhisperConfig.from_hf(config, {told: True}).to_hf() == config
    for nothing in ({}, {told: None}, {told: "no"}):
        assert WhisperConfig.from_hf(config, nothing).condition_on_prev_tokens is None


def test_a_distilled_model_with_its_teachers_alignment_heads_still_loads():
    """Some are published so: two decoder layers, and the heads of a model of thirty-two."""
    with pytest.warns(UserWarning, match=r"\(25, 6\)"):
        config = WhisperConfig.from_hf(small_config().to_hf(), {"alignment_heads": [[1, 0], [25, 6]]})
    assert config.alignment_heads is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "wav2vec2"}, "wav2vec2"),
        ({"activation_function": "relu"}, "relu"),
        ({"d_model": None}, "d_model"),
        ({"vocab_size": None, "encoder_layers": None}, "encoder_layers, vocab_size"),
    ],
)
def test_a_config_that_is_no_whispers_is_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        WhisperConfig.from_hf({**small_config().to_hf(), **changes})


def test_every_field_of_the_shape_stands_in_hugging_faces_form():
    elsewhere = {"alignment_heads", "condition_on_prev_tokens"}
    assert {field.name for field in fields(WhisperConfig)} - elsewhere <= set(small_config().to_hf())

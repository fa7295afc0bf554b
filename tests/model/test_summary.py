"""`print(model)` is a page for any size and content; the functions that create models document themselves."""

import inspect
import pickle

import jax
import pytest
import treescope
from flax import nnx

import whisper_nnx
from tests.small import quick_compilation, small_model, small_tokenizer  # noqa: F401
from whisper_nnx.model.create import create_whisper
from whisper_nnx.model.quantized import quantize_model
from whisper_nnx.training.config import LoraConfig
from whisper_nnx.training.lora import add_lora


@pytest.mark.parametrize("layers", [(4, 4), (6, 1)])
def test_a_model_of_any_depth_is_a_page(layers):
    shape = {"encoder_layers": layers[0], "decoder_layers": layers[1]}
    text = str(nnx.eval_shape(lambda: create_whisper("large-v3", **shape)))
    assert len(text.splitlines()) < 50
    assert max(map(len, text.splitlines())) < 120
    assert f"layers: {layers[0]} x EncoderLayer(" in text
    assert f"layers: {layers[1]} x DecoderLayer(" in text


def test_the_first_line_counts_what_the_model_holds():
    first = str(nnx.eval_shape(lambda: create_whisper("tiny"))).splitlines()[0]
    assert first == "Whisper(  # 37,184,640 parameters, 151.0 MB (float32), computes in float32, no tokenizer"
    assert repr(small_model()).splitlines()[0].endswith(f"{small_model().tokenizer}")


def test_the_first_line_names_the_languages():
    assert str(small_model()).splitlines()[0].endswith(", Tokenizer(vocab_size=338, languages=4)")
    english = small_model(tokenizer=small_tokenizer(languages=()))
    assert str(english).splitlines()[0].endswith(", English only)")


def test_every_array_is_shown_with_its_type_and_shape():
    text = str(small_model())
    for array in ("kernel float32[3,8,16]", "embed_positions: float32[50,16]", "embedding float32[48,16]"):
        assert array in text
    assert text.count("MultiHeadAttention[2 heads](") == 3  # the two decoder layers are equal


def test_a_part_is_shown_as_the_whole_is():
    lines = str(small_model().encoder.layers[0].self_attn).splitlines()
    assert lines[0] == "MultiHeadAttention[2 heads](  # 1,072 parameters, 0.0 MB (float32)"
    assert sorted(line.split(":")[0].strip() for line in lines[1:-1]) == ["k_proj", "out_proj", "q_proj", "v_proj"]


def test_display_prints_the_page(capsys):
    model = small_model()
    nnx.display(model)
    assert capsys.readouterr().out == f"{model}\n"


def test_treescope_shows_the_modules_their_sizes_and_arrays():
    model = small_model()
    text = treescope.render_to_text(model)
    assert text.startswith("Whisper( # Param: ")
    assert f"tokenizer={model.tokenizer}" in text  # not its vocabulary
    shown = treescope.render_to_text(model.encoder.layers[0].self_attn)
    assert "heads=2" in shown
    assert shown.count("kernel=Param(value=<jax.Array float32(16, 16) ") == 4


def test_layers_that_differ_are_shown_one_by_one():
    model = small_model()
    model.decoder.layers[1].fc1 = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
    assert str(model).count("layers: 1 x DecoderLayer(") == 2


def test_replaced_layers_are_shown():
    model = small_model()
    assert "q_proj: LoraLinear(" in str(add_lora(model, LoraConfig(rank=2), nnx.Rngs(0)))
    quantize_model(model)
    assert "MB (float32, int8)" in str(model)
    assert "kernel int8[16,32]" in str(model)


def test_whatever_is_in_the_place_of_arrays_can_be_printed():
    model = small_model()
    assert "SingleDeviceSharding" in str(jax.tree.map(lambda x: x.sharding, model))
    seen = []
    jax.make_jaxpr(lambda model: seen.append(str(model)))(model)
    assert "float32[50,16]" in seen[0]


def test_each_creator_has_a_name_a_text_and_a_signature_of_its_own():
    texts = set()
    for name in ("tiny", "base", "small", "medium", "large", "turbo"):
        create = getattr(whisper_nnx, f"create_whisper_{name}")
        assert create.__name__ == f"create_whisper_{name}"
        assert list(inspect.signature(create).parameters) == ["rngs", "dtype", "param_dtype", "changes"]
        assert pickle.loads(pickle.dumps(create)) is create
        texts.add(inspect.getdoc(create))
    assert len(texts) == 6
    assert "width 384" in inspect.getdoc(whisper_nnx.create_whisper_tiny)

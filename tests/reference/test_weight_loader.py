"""Loaded and saved models against openai-whisper and transformers, in float32.

Tolerances: 2e-4 on the encoder's output and 1e-3 on logits are what sums of a thousand float32 products in another
order differ by, with room; a wrong axis, name or dtype is off by far more.
"""

import json
import wave

import jax
import numpy as np
import pytest
import torch
import transformers
import whisper
from flax import nnx

from tests.small import quick_compilation  # noqa: F401
from weight_loader import load_model, save_pretrained
from weight_loader.load import abstract_model
from weight_loader.names import parameters
from whisper_nnx.model.config import RELEASED

pytestmark = pytest.mark.filterwarnings("ignore:.*no tokenizer:")
IDS = np.array([[3, 14, 15, 92, 65, 35, 89, 79, 32, 38]])


def features(mels: int = 80, frames: int = 3000) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1, mels, frames), dtype=np.float32)


def assert_equal_outputs(ours, mel: np.ndarray, encoder_output: torch.Tensor, logits: torch.Tensor):
    encoded = jax.jit(type(ours).encode)(ours, mel)
    np.testing.assert_allclose(encoded, encoder_output.numpy(), atol=2e-4)
    np.testing.assert_allclose(jax.jit(type(ours).decode)(ours, IDS, encoded), logits.numpy(), atol=1e-3)


def transformers_outputs(model, mel: np.ndarray):
    with torch.no_grad():
        out = model.eval()(torch.tensor(mel), decoder_input_ids=torch.tensor(IDS))
    return out.encoder_last_hidden_state, out.logits


def openai_outputs(model, mel: np.ndarray):
    with torch.no_grad():
        encoded = model.embed_audio(torch.tensor(mel))
        return encoded, model.logits(torch.tensor(IDS), encoded)


def openai_dimensions(config) -> whisper.ModelDimensions:
    audio = (config.num_mel_bins, config.max_source_positions, config.d_model, config.encoder_attention_heads)
    text = (config.vocab_size, config.max_target_positions, config.d_model, config.decoder_attention_heads)
    return whisper.ModelDimensions(*audio, config.encoder_layers, *text, config.decoder_layers)


def random_transformers_model(seed: int = 0, **config):
    """Every array random, also those that start as zeros or ones: a pair of biases swapped would not show otherwise."""
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"), 0)
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**config, **ids))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.05).add_(1.0 if "norm.weight" in name else 0.0)
    return model


@pytest.fixture(scope="module")
def ours(digits):
    return load_model(digits)


def test_the_digits_checkpoint_computes_what_transformers_and_openai_whisper_do(digits, ours):
    theirs = transformers.WhisperForConditionalGeneration.from_pretrained(digits, dtype=torch.float32)
    assert_equal_outputs(ours, features(), *transformers_outputs(theirs, features()))
    reference = whisper.load_model(str(digits / "openai.pt"), device="cpu").float()
    assert_equal_outputs(ours, features(), *openai_outputs(reference, features()))


@pytest.mark.slow
def test_the_true_shape_of_tiny_computes_what_transformers_and_openai_whisper_do(tmp_path):
    config = RELEASED["tiny"]
    theirs = random_transformers_model(**config.to_hf())
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert_equal_outputs(ours, features(), *transformers_outputs(theirs, features()))
    reference = whisper.model.Whisper(openai_dimensions(config))
    weights = {**theirs.state_dict(), "model.decoder.embed_tokens.weight": theirs.proj_out.weight}
    reference.load_state_dict({row.stored["openai"].name: weights[row.stored["hf"].name] for row in parameters(config)})
    assert_equal_outputs(ours, features(), *openai_outputs(reference.eval(), features()))


@pytest.mark.parametrize(
    "name", [n if n in ("tiny.en", "large-v3-turbo") else pytest.param(n, marks=pytest.mark.slow) for n in RELEASED]
)
def test_every_released_size_has_the_references_number_of_parameters(name):
    sizes = tuple(vars(openai_dimensions(RELEASED[name])).values())
    with torch.device("meta"):
        reference = [whisper.model.AudioEncoder(*sizes[:5]), whisper.model.TextDecoder(*sizes[5:])]
    ours = nnx.state(abstract_model(RELEASED[name]), nnx.Param)
    theirs = sum(parameter.numel() for part in reference for parameter in part.parameters())
    assert sum(leaf.size for leaf in jax.tree.leaves(ours)) == theirs


SMALL = {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 96,
    "vocab_size": 100,
    "max_source_positions": 50,
}


@pytest.mark.parametrize(
    "shape",
    [
        {"decoder_layers": 2, "num_mel_bins": 128},  # as distil-whisper's
        {"tie_word_embeddings": False},
        {"vocab_size": 117},
        {"max_target_positions": 20},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "stored",
    [torch.float16, *(pytest.param(d, marks=pytest.mark.slow) for d in (torch.float32, torch.bfloat16))],
    ids=str,
)
def test_other_shapes_and_stored_dtypes_compute_what_transformers_does(tmp_path, shape, stored):
    random_transformers_model(**{**SMALL, **shape}).to(stored).save_pretrained(tmp_path)
    theirs = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    mel = features(shape.get("num_mel_bins", 80), 100)
    assert_equal_outputs(load_model(tmp_path), mel, *transformers_outputs(theirs, mel))


def test_a_vocabulary_that_a_fine_tune_extended_loads_with_its_tokens(digits, tmp_path):
    theirs = transformers.WhisperForConditionalGeneration.from_pretrained(digits, dtype=torch.float32)
    tokenizer = transformers.WhisperTokenizer.from_pretrained(digits)
    tokenizer.add_tokens(["flibbertigibbet", "<|noise|>"])
    theirs.resize_token_embeddings(len(tokenizer))
    for part in (theirs, tokenizer):
        part.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert ours.config.vocab_size == ours.tokenizer.vocab_size == 51867
    text = "a flibbertigibbet"
    assert ours.tokenizer.encode(text) == tokenizer.encode(text, add_special_tokens=False)
    assert_equal_outputs(ours, features(), *transformers_outputs(theirs, features()))


def test_shards_and_a_base_model_written_by_transformers_load(tmp_path):
    theirs = random_transformers_model(**SMALL)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    theirs.model.save_pretrained(tmp_path / "base")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for name in ("shards", "base"):
        outputs = transformers_outputs(theirs, features(frames=100))
        assert_equal_outputs(load_model(tmp_path / name), features(frames=100), *outputs)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"max_shard_size": "50KB"}], ids=str)
def test_transformers_computes_the_same_with_what_we_save(tmp_path, changes):
    shard = {"max_shard_size": changes.pop("max_shard_size")} if "max_shard_size" in changes else {}
    random_transformers_model(**{**SMALL, **changes}).save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    save_pretrained(ours, tmp_path / "ours", **shard)
    theirs, info = transformers.WhisperForConditionalGeneration.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info.values()), info
    assert_equal_outputs(ours, features(frames=100), *transformers_outputs(theirs, features(frames=100)))


def test_transformers_transcribes_the_same_with_the_digits_saved_again(digits, ours, shared, tmp_path):
    save_pretrained(ours, tmp_path)
    with wave.open(str(shared / "audio" / "en_8k_35s.wav")) as file:
        audio = np.repeat(np.frombuffer(file.readframes(8000 * 6), np.int16), 2) / np.float32(2**15)
    texts = []
    for folder in (digits, tmp_path):
        processor = transformers.WhisperProcessor.from_pretrained(folder)
        model = transformers.WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        mel = processor(audio, sampling_rate=16_000, return_tensors="pt").input_features
        assert mel.shape == (1, 80, 3000)
        ids = model.generate(mel, language="en", task="transcribe", max_new_tokens=12)
        texts.append(processor.batch_decode(ids, skip_special_tokens=True))
    assert texts[0] == texts[1]
    assert texts[0] != [""]


def test_saved_ids_are_those_of_the_vocabulary(digits, ours, tmp_path):
    save_pretrained(ours, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    vocabulary = transformers.WhisperTokenizerFast.from_pretrained(digits).get_vocab()
    assert config["decoder_start_token_id"] == vocabulary["<|startoftranscript|>"]
    assert {config[f"{end}_token_id"] for end in ("bos", "eos", "pad")} == {vocabulary["<|endoftext|>"]}
    assert config["dtype"] == "float32"

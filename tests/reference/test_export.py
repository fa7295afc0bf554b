"""What a training run exports, in transformers and, through its converter, in faster-whisper: float32 on both sides.

Tolerance: 1e-3 on logits, as in test_weight_loader.py; the greedy tokens are the same ones.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from tests.small import quick_compilation, small_model  # noqa: F401
from tests.training.recordings import write_manifest
from weight_loader import load_model, save_pretrained
from whisper_nnx.model.whisper import Whisper
from whisper_nnx.text.tokenizer import Tokenizer
from whisper_nnx.training.config import DataConfig, LoraConfig, LossConfig, ModelConfig, OptimizerConfig, TrainConfig
from whisper_nnx.training.run import train

converters = pytest.importorskip("ctranslate2.converters")
faster_whisper = pytest.importorskip("faster_whisper")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs
HEADS = ((1, 0), (0, 1))
LENGTH = 16  # of what is decoded


@pytest.fixture(scope="module", params=["full", pytest.param("lora", marks=pytest.mark.slow)])
def trained(request, digits, tmp_path_factory) -> tuple[Whisper, Path]:
    """A small model with the released vocabulary after two steps, and the folder that the run exported."""
    folder = tmp_path_factory.mktemp("export")
    config = TrainConfig(
        output=str(folder / "out"),
        steps=2,
        batch_size=2,
        model=ModelConfig(init="small"),
        data=DataConfig(train=(str(write_manifest(folder)),), window_s=2.0, max_label_length=24),
        loss=LossConfig(guide_weight=0.1, guide_heads=HEADS),
        lora=LoraConfig(rank=2 if request.param == "lora" else 0),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0),
    )
    sizes = {"max_source_positions": 1500, "max_target_positions": 448, "vocab_size": 51865, "num_mel_bins": 80}
    tokenizer = Tokenizer.from_folder(digits, sizes["vocab_size"])
    kept: list[Whisper] = []

    def export(model: Whisper, to: Path) -> None:
        kept.append(model)
        save_pretrained(model, to)

    before = small_model(tokenizer=tokenizer, d_model=32, **sizes)
    train(config, before, export)
    (model,) = kept
    moved = (
        model.decoder.layers[0].encoder_attn.q_proj.kernel[...] - before.decoder.layers[0].encoder_attn.q_proj.kernel
    )
    assert jnp.abs(moved).max() > 1e-4
    return model, folder / "out" / "export"


def mel(frames: int = 3000) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1, 80, frames), dtype=np.float32)


def greedy(model: Whisper, encoded: jax.Array, prompt: list[int]) -> list[int]:
    """The most probable tokens that follow, up to the end."""
    decode = jax.jit(type(model).decode)
    ids = [*prompt]
    while len(ids) < LENGTH and ids[-1] != model.tokenizer.special.eot:
        padded = np.array([ids + [0] * (LENGTH - len(ids))])  # what comes later is not seen
        ids.append(int(decode(model, padded, encoded)[0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


def test_transformers_computes_what_the_trained_model_does(trained):
    model, folder = trained
    theirs, info = transformers.WhisperForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    ids = np.array([[*model.tokenizer.sot_sequence("en"), *model.tokenizer.encode(" one two"), 50364]])
    with torch.no_grad():
        logits = theirs.eval()(torch.tensor(mel()), decoder_input_ids=torch.tensor(ids)).logits
    np.testing.assert_allclose(jax.jit(type(model).__call__)(model, mel(), ids), logits.numpy(), atol=1e-3)


def test_faster_whisper_decodes_what_the_trained_model_does(trained, tmp_path):
    model, folder = trained
    files = ["preprocessor_config.json", "tokenizer.json"]
    converters.TransformersConverter(str(folder), copy_files=files).convert(
        str(tmp_path / "ct2"), quantization="float32"
    )
    theirs = faster_whisper.WhisperModel(str(tmp_path / "ct2"), device="cpu", compute_type="float32", cpu_threads=1)
    prompt = [*model.tokenizer.sot_sequence("en", timestamps=False)]
    options = {"beam_size": 1, "max_length": LENGTH, "suppress_blank": False, "suppress_tokens": []}
    encoded = theirs.encode(mel()[0])
    [result] = theirs.model.generate(encoded, [prompt], **options)
    found = result.sequences_ids[0]
    ours = greedy(model, jax.jit(type(model).encode)(model, mel()), prompt)
    assert found == ours[: len(found)]  # they stop earlier, and do not tell the end
    assert len(set(found)) > 2  # not one token again and again


def test_tokenizer_and_alignment_heads_travel_with_the_weights(trained):
    model, folder = trained
    loaded = load_model(folder)
    assert loaded.config == model.config
    assert loaded.config.alignment_heads == HEADS
    assert loaded.tokenizer == model.tokenizer
    heads = transformers.GenerationConfig.from_pretrained(folder).alignment_heads
    assert heads == [list(head) for head in HEADS]
    text = "Hello, 東京 where être?"
    theirs = transformers.WhisperTokenizerFast.from_pretrained(folder)
    assert theirs.encode(text, add_special_tokens=False) == model.tokenizer.encode(text)

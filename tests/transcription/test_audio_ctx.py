"""Shorter windows: `audio_ctx` encoder positions each."""

from typing import Any

import jax
import numpy as np
import pytest

from tests.small import quick_compilation as quick_compilation
from tests.small import small_mel, small_model
from whisper_nnx import load_model, transcribe, with_audio_ctx
from whisper_nnx.audio.loading import SAMPLE_RATE

CTX = 20  # windows of 0.4 s, of a model that takes 1 s
OPTIONS: dict[str, Any] = {"language": "en", "temperature": 0.0, "no_speech_threshold": None, "audio_ctx": CTX}


@pytest.fixture(scope="module")
def model():
    return small_model()


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * SAMPLE_RATE)).astype(np.float32)


def placed(result: Any) -> list[tuple[Any, ...]]:
    return [(s["seek"], s["start"], s["end"], s["tokens"]) for s in result["segments"]]


def test_a_short_context_is_the_encoder_of_as_many_frames(model):
    short, mel = with_audio_ctx(model, CTX), small_mel(2)[..., : 2 * CTX]
    assert short.config.max_source_positions == CTX
    assert short.encoder.embed_positions.shape == (CTX, model.config.d_model)
    np.testing.assert_allclose(short.encode(mel), model.encode(mel), atol=1e-6)
    own, theirs = jax.tree.leaves(short.decoder), jax.tree.leaves(model.decoder)
    assert all(a is b for a, b in zip(own, theirs, strict=True))  # shared, not copied
    assert model.config.max_source_positions == 50
    assert with_audio_ctx(model, 0) is with_audio_ctx(model, None) is with_audio_ctx(model, 50) is model


def test_windows_follow_each_other_in_that_length_alone_and_in_a_batch(model):
    recordings = [noise(1.7), noise(0.3, 1), noise(0.9, 2)]
    alone = [transcribe(model, audio, **OPTIONS) for audio in recordings]
    together = transcribe(model, recordings, batch_size=2, **OPTIONS)
    assert [placed(result) for result in together] == [placed(result) for result in alone]
    for audio, result in zip(recordings, alone, strict=True):
        windows = sorted({segment["seek"] for segment in result["segments"]})
        assert max(np.diff([*windows, len(audio) // 160])) <= 2 * CTX  # nothing is left out between them
        assert all(s["end"] <= s["seek"] / 100 + CTX * 0.02 + 1e-6 for s in result["segments"])


@pytest.mark.slow
def test_no_timestamp_is_past_the_window(model):
    latest = model.tokenizer.special.timestamp_begin + CTX
    for beam_size in (None, 2):
        result = transcribe(model, noise(4.0), beam_size=beam_size, max_repeats=3, **OPTIONS)
        tokens = [token for segment in result["segments"] for token in segment["tokens"]]
        assert max(tokens) <= latest
        assert max(tokens) > model.tokenizer.special.timestamp_begin


def test_nothing_compiles_for_the_same_context_again(model, compilations):
    transcribe(model, noise(1.0), **OPTIONS)
    compilations.clear()
    transcribe(model, noise(1.3, 5), **OPTIONS)
    assert compilations == []


@pytest.mark.parametrize("audio_ctx", [5, 51, -1, 20.5])
def test_a_context_that_the_model_does_not_have_is_refused(model, audio_ctx):
    with pytest.raises(ValueError, match=f"audio_ctx={audio_ctx} must be"):
        transcribe(model, noise(1.0), audio_ctx=audio_ctx)


@pytest.mark.real
def test_a_short_recording_needs_no_window_of_30_s(real_tiny_en, real_speech):
    text = transcribe(load_model(real_tiny_en), real_speech("en_libri_5s.flac"), audio_ctx=512, temperature=0.0)["text"]
    assert "confused complaint" in text

"""English-only models: every option of `transcribe` works, or is refused because of the model."""

import io
import json
import wave
from dataclasses import fields

import jax.numpy as jnp
import numpy as np
import pytest

from tests.small import quick_compilation, small_config, small_model, small_tokenizer_files  # noqa: F401
from whisper_nnx import load_model, transcribe
from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.text.tokenizer import Tokenizer
from whisper_nnx.transcription.fallback import FallbackOptions
from whisper_nnx.transcription.longform import LongformOptions
from whisper_nnx.transcription.options import TranscribeOptions

WORKS = [
    {"condition_on_previous_text": False, "hotwords": "the one", "max_context": 3, "initial_prompt": "one two"},
    {"carry_initial_prompt": True, "initial_prompt": "one two", "prefix": "one", "max_initial_timestamp": None},
    {"clip_timestamps": "0,0.5,1,2.5", "independent_clips": True, "sampling_rate": 16_000},
    {"word_timestamps": True, "prepend_punctuations": "(", "append_punctuations": ")"},
    {"word_timestamps": True, "hallucination_silence_threshold": 5.0, "alignment_heads": ((1, 0),)},
    {"offset_s": 0.5, "duration_s": 1.5, "token_timestamps": True},
    {
        "temperature": (0.0, 0.5),
        "logprob_threshold": 0.0,
        "no_speech_threshold": None,
        "compression_ratio_threshold": 1,
    },
    {"temperature": 0.5, "best_of": 3, "n_best": 2, "seed": 7},
    {"beam_size": 3, "patience": 2.0, "length_penalty": 0.5, "n_best": 2, "temperature": 0.0},
    {"task": "transcribe", "language": "English", "sample_len": 9},
    {"max_new_tokens": 9, "suppress_tokens": "-1,3", "suppress_blank": False, "suppress_regex": "a+"},
    {"without_timestamps": True, "tinydiarize": True},
    {"bias": ["two"], "bias_weight": 5.0},
    {"choices": ["one", "two"]},
    {"regex": "(one|two)"},
    {"grammar": 'root ::= " one"', "grammar_rule": "root", "grammar_penalty": 0.1},
    {"json_schema": {"type": "boolean"}},
    {"lm": lambda tokens: jnp.zeros((len(tokens), small_config().vocab_size)), "lm_weight": 0.5},
    {"hallucination": "calm", "entropy_threshold": 2.4},
    {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "max_repeats": 2},
    {"vad_filter": True, "vad_parameters": {"threshold": 0.01}},
    {"diarize": True},
    {"refine_word_times": True, "word_timestamps": True, "fp16": False},
    {"audio_track": 0, "follow_timestamps": False, "max_hours": 1.0},
]
REFUSED = [
    {"task": "translate"},
    {"multilingual": True},
    {"allowed_languages": "en"},
    {"language_detection_segments": 2, "language_detection_threshold": 0.5},
]
OF_WINDOWS = {"prompt", "temperature", "longform", "fallback", "decoding"}  # `temperature` is the ladder's
SOUND = np.random.default_rng(0).normal(0, 0.1, 40_000).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    """Its files list languages, as those of the released English-only models do."""
    files = {**small_tokenizer_files(), "generation_config.json": json.dumps({"is_multilingual": False}).encode()}
    return small_model(tokenizer=Tokenizer.from_files(files, small_config().vocab_size), alignment_heads=((1, 1),))


def wav_of(samples):
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(16_000)
        writer.writeframes((32_767 * samples.clip(-1, 1)).astype("<i2").tobytes())
    return file.getvalue()


def name_of(options):
    return ",".join(options)


def test_the_table_holds_every_option_of_transcribe():
    kinds = (LongformOptions, FallbackOptions, DecodingOptions, TranscribeOptions)
    every = {field.name for kind in kinds for field in fields(kind)} - OF_WINDOWS - {"temperatures"} | {"temperature"}
    assert every == {name for options in [*WORKS, *REFUSED] for name in options}


@pytest.mark.parametrize("options", WORKS, ids=name_of)
def test_an_english_only_model_takes_the_option(model, options, monkeypatch):
    if "vad_filter" in options or "hallucination" in options:
        monkeypatch.setattr(
            "whisper_nnx.transcription.opening.speech_spans", lambda samples, options: [(0.2, 0.9), (1.5, 2.4)]
        )
    sound = np.stack([SOUND, SOUND[::-1]]) if "diarize" in options else SOUND
    if "audio_track" in options:
        sound = wav_of(SOUND)
    result = transcribe(model, sound, **options)
    assert result["segments"]
    assert result["language"] == "en"
    assert [result] == transcribe(model, [sound], **{"language": "en", **options})


@pytest.mark.parametrize("options", REFUSED, ids=name_of)
def test_what_needs_other_languages_is_refused(model, options):
    with pytest.raises(ValueError, match=r"this (model|checkpoint) (is English-only|only transcribes English)"):
        transcribe(model, SOUND, **options)


def test_another_language_is_warned_of(model):
    with pytest.warns(UserWarning, match="English-only, but language='de' was asked for"):
        assert transcribe(model, SOUND, language="German")["language"] == "en"


@pytest.mark.slow
@pytest.mark.real
def test_a_released_english_only_model_transcribes(real_tiny_en, real_speech):
    model, audio = load_model(str(real_tiny_en)), real_speech("en_libri_5s.flac")
    expected = " He began a confused complaint against the wizard, who had vanished behind the curtain on the left."
    for options in ({}, {"language": "en"}, {"word_timestamps": True, "vad_filter": True}):
        assert transcribe(model, audio, **options)["text"] == expected

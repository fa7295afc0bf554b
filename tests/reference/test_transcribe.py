"""Transcripts of whole recordings equal openai-whisper's: tokens and segment times the same, probabilities to 1e-3."""

import difflib
import itertools
import json
from statistics import median

import pytest

from tests.reference.placing import placed
from whisper_nnx import transcribe
from whisper_nnx.transcription.longform import parse_clips

pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file.*tiktoken:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*digital silence"),
    pytest.mark.filterwarnings("ignore:.*translation"),
    pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning"),  # numpy.argsort of a torch tensor
]

# The reference takes a tenth of the time of a recording, with beams three times as much.
MOST = ("de_40s", "en_mixed_75s", "en_pauses_60s", "en_quick_20s", "en_short_3s")
ALL_OVER = {
    "words": ({"word_timestamps": True}, (*MOST, "silence_12s", "noise_only_30s")),
    "beam 5, words": (
        {"beam_size": 5, "word_timestamps": True, "language": "en"},
        ("en_quick_20s", "en_short_3s", "silence_12s"),
    ),
}
ON_SOME = {
    "translate": {"task": "translate", "language": "de"},
    "clips": {"clip_timestamps": "0.5,1.5,2,2.75"},  # past a recording's end the reference would never stop
    "a clip without an end": {"clip_timestamps": [11.0]},
    "carried prompt": {"initial_prompt": "one two three", "carry_initial_prompt": True},
    "prompt, no history": {"initial_prompt": "one two three", "condition_on_previous_text": False},
    "without timestamps": {"without_timestamps": True},
    "prefix": {"prefix": "One two", "without_timestamps": True, "language": "en"},
    "length penalty": {"beam_size": 3, "patience": 2.0, "length_penalty": 0.6, "language": "en"},
    "no thresholds": {"no_speech_threshold": None, "logprob_threshold": None, "compression_ratio_threshold": None},
    "strict silence": {"no_speech_threshold": 0.1, "logprob_threshold": -0.2},
    "hallucinations": {"word_timestamps": True, "hallucination_silence_threshold": 1.0},
}
SLOW = ("beam 5, words", *(set(ON_SOME) - {"prefix"}))
ON_NOISE_TOO = ("no thresholds", "strict silence", "hallucinations", "prompt, no history")
WITHIN = {"start": 1e-6, "end": 1e-6, "avg_logprob": 1e-3, "no_speech_prob": 1e-3, "compression_ratio": 1e-9}


def marked(names):
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


def compare(model, reference, audio, ours=None, **options):
    """`ours`: the transcript, if there is one."""
    options = {"temperature": 0.0, **options}
    expected = reference.transcribe(audio, fp16=False, **options)
    ours = ours or transcribe(model, audio, **options)
    assert ours["language"] == expected["language"]
    assert ours["text"] == expected["text"]
    seeks = [*dict.fromkeys(segment["seek"] for segment in expected["segments"]), len(audio) // 160]
    clips = parse_clips(options.get("clip_timestamps", "0"), len(audio) // 160)
    clip_ends = {seek: end for start, end in clips for seek in seeks if start <= seek < end}
    ends_s = {seek: min(seek + 3000, later, clip_ends[seek]) / 100 for seek, later in itertools.pairwise(seeks)}
    expected = {**expected, "segments": placed(expected["segments"], ends_s)}
    assert len(ours["segments"]) == len(expected["segments"])
    shifted, timed = [], 0
    for segment, wanted in zip(ours["segments"], expected["segments"], strict=True):
        assert segment["tokens"] == wanted["tokens"]
        assert {key: segment[key] for key in ("id", "seek", "text", "temperature")} == {
            key: wanted[key] for key in ("id", "seek", "text", "temperature")
        }
        for key, tolerance in WITHIN.items():
            assert segment[key] == pytest.approx(wanted[key], abs=tolerance), key
        words = wanted["words"] if options.get("word_timestamps") else []
        assert [word["word"] for word in segment.get("words", [])] == [word["word"] for word in words]
        for word, other in zip(segment.get("words", []), words, strict=True):
            assert word["start"] == pytest.approx(other["start"], abs=0.0201)
            assert word["end"] == pytest.approx(other["end"], abs=0.0201)
            assert word["probability"] == pytest.approx(other["probability"], abs=1e-3)
            timed += 1
            if any(abs(word[key] - other[key]) > 0.001 for key in ("start", "end")):
                shifted.append(word["word"])
    # Steps of 20 ms at a boundary, which two words share, where two paths cost the same to 1e-4.
    assert len(shifted) <= max(2, 0.02 * timed), shifted
    return ours, expected


def boundary_errors_s(transcript, true_words: list[dict]) -> list[float]:
    """By how much starts and ends of the words that were heard rightly are off."""
    words = [word for segment in transcript["segments"] for word in segment["words"]]
    heard = [word["word"].strip(" .,").lower() for word in words]
    spoken = [word["word"].lower() for word in true_words]
    pairs = [
        (words[block.a + i], true_words[block.b + i])
        for block in difflib.SequenceMatcher(None, heard, spoken, autojunk=False).get_matching_blocks()
        for i in range(block.size)
    ]
    return [abs(word[key] - true[key]) for word, true in pairs for key in ("start", "end")]


@pytest.mark.parametrize("name", marked(ALL_OVER))
@pytest.mark.slow
def test_recordings_are_transcribed_as_by_openai_whisper(name, recordings, model, reference, shared):
    """Its words are no further from the true times than the reference's are."""
    errors_s: tuple[list[float], list[float]] = [], []
    options, chosen = ALL_OVER[name]
    for recording in chosen:
        both = compare(model, reference, recordings[recording], **options)
        truth = shared / "audio" / f"{recording}.words.json"
        if truth.exists():
            for all_s, transcript in zip(errors_s, both, strict=True):
                all_s += boundary_errors_s(transcript, json.loads(truth.read_text())["words"])
    assert len(errors_s[0]) > (150 if name == "words" else 30)
    assert median(errors_s[0]) <= median(errors_s[1]) + 1e-6


@pytest.mark.parametrize("name", marked(ON_SOME))
def test_options_mean_what_they_mean_in_openai_whisper(name, recordings, model, reference):
    """On two windows of speech, silence, and noise."""
    compare(model, reference, recordings["en_mixed_75s"][: 45 * 16_000], **ON_SOME[name])
    compare(model, reference, recordings["silence_12s"], **ON_SOME[name])
    if name in ON_NOISE_TOO:
        compare(model, reference, recordings["noise_only_30s"], **ON_SOME[name])

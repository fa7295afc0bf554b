"""Decoder inputs and labels made of segments."""

import json

import numpy as np
import pytest

from tests.small import small_tokenizer, small_tokenizer_files
from whisper_nnx.data.manifest import Span
from whisper_nnx.text.tokenizer import Tokenizer
from whisper_nnx.training.targets import Format, Target, TargetSegment, TooLong, encode_target, spoken_tokens

TOKENIZER = small_tokenizer(languages=("en", "de", "es", "zh"))
SPECIAL = TOKENIZER.special
FORM = Format(TOKENIZER, positions=50, length=40, max_prompt=10)


def segment(
    start: float, end: float, text: str, words=(), language: str = "en", tokenizer: Tokenizer = TOKENIZER
) -> TargetSegment:
    timed = [Span(*times, word) for word, *times in words]
    return spoken_tokens(tokenizer, language, "transcribe", Span(start, end, text), timed)


def target(
    *segments: TargetSegment, form: Format = FORM, language="en", task="transcribe", timestamps=True, **more
) -> Target:
    return encode_target(form, language, task, segments, timestamps=timestamps, **more)


def learned(it: Target, tokenizer: Tokenizer = TOKENIZER) -> str:
    """Decodes the labels with weight."""
    return tokenizer.decode_with_timestamps(it.labels[it.weights > 0].tolist())


def read(it: Target, tokenizer: Tokenizer = TOKENIZER) -> str:
    """Decodes the inputs without padding."""
    return tokenizer.decode_with_timestamps(it.ids[: np.flatnonzero(it.weights)[-1] + 1].tolist())


ONE_TWO = (segment(0.1, 0.4, "one"), segment(0.5, 0.9, "two"))


def test_labels_with_timestamps_decode_to_segments_and_times():
    text = "<|en|><|transcribe|><|0.10|> one<|0.40|><|0.50|> two<|0.90|>"
    assert learned(target(*ONE_TWO)) == text + "<|endoftext|>"
    assert read(target(*ONE_TWO)) == "<|startoftranscript|>" + text


def test_labels_without_timestamps_decode_to_the_text():
    it = target(*ONE_TWO, timestamps=False, language="de", task="translate")
    assert learned(it) == "<|de|><|translate|><|notimestamps|> one two<|endoftext|>"


def test_labels_are_shifted_inputs_padded_with_the_end_token():
    it = target(*ONE_TWO, previous_text="and")
    assert it.labels[:-1].tolist() == it.ids[1:].tolist()
    assert set(it.ids[it.weights.nonzero()[0][-1] + 1 :].tolist()) == {SPECIAL.eot}
    for array, dtype in ((it.ids, np.int32), (it.labels, np.int32), (it.weights, np.float32)):
        assert (array.shape, array.dtype) == ((40,), dtype)
    assert (it.spans.shape, it.spans.dtype) == ((40, 2), np.int32)


def test_timestamps_are_relative_to_the_window_and_spans_to_the_clip():
    form = Format(TOKENIZER, positions=20, length=40, max_prompt=10)
    it = target(segment(0.1, 0.3, "one", [("one", 0.1, 0.3)]), form=form, first_position=30)
    assert learned(it) == "<|en|><|transcribe|><|0.70|> one<|0.90|><|endoftext|>"
    assert it.spans[2:6].tolist() == [[4, 7], [5, 15], [14, 17], [15, 18]]
    assert not it.spans[:2].any()
    assert not it.spans[6:].any()


def test_a_partial_segment_is_a_start_timestamp_and_the_end():
    it = target(ONE_TWO[0], TargetSegment(0.8, None))
    assert learned(it) == "<|en|><|transcribe|><|0.10|> one<|0.40|><|0.80|><|endoftext|>"
    last = np.flatnonzero(it.weights)[-1]
    assert it.labels[last] == SPECIAL.eot
    assert not it.spans[last].any()  # the segment continues, so the end has no position
    assert it.ctc_weight == 0
    assert (it.ctc == -1).all()


def test_previous_text_is_input_but_not_label():
    it, without = target(*ONE_TWO, previous_text=" the one "), target(*ONE_TWO)
    assert read(it) == "<|startofprev|> the one" + read(without)
    assert learned(it) == learned(without)
    count = 1 + len(TOKENIZER.encode(" the one"))
    assert not it.weights[:count].any()
    assert it.ids[count] == SPECIAL.sot
    assert it.weights[count] == 1  # sot predicts the language


@pytest.mark.parametrize(("length", "kept"), [(40, 10), (20, 10), (18, 8), (11, 1), (10, 0), (9, 0)])
def test_previous_text_is_truncated_on_the_left(length, kept):
    text = "and " * 9 + "xyzxyzxyz"
    form = Format(TOKENIZER, positions=50, length=length, max_prompt=10)
    it = target(*ONE_TWO, form=form, previous_text=text)
    assert learned(it) == learned(target(*ONE_TWO))
    at = it.ids.tolist().index(SPECIAL.sot)
    assert at == (kept + 1 if kept else 0)
    if kept:
        assert it.ids[0] == SPECIAL.sot_prev
        assert it.ids[1:at].tolist() == TOKENIZER.encode(" " + text)[-kept:]


@pytest.mark.parametrize("timestamps", [True, False])
def test_previous_segments_are_encoded_like_current_ones(timestamps):
    it = target(*ONE_TWO, previous=[ONE_TWO, ONE_TWO[:1]], timestamps=timestamps)
    text = "<|0.10|> one<|0.40|><|0.50|> two<|0.90|><|0.10|> one<|0.40|>" if timestamps else " one two one"
    assert read(it) == "<|startofprev|>" + text + read(target(*ONE_TWO, timestamps=timestamps))
    assert learned(it) == learned(target(*ONE_TWO, timestamps=timestamps))


def test_windows_without_speech_have_no_speech_and_an_empty_transcript():
    it = target(no_speech=True, language="de")
    assert read(it) == "<|startoftranscript|><|de|><|transcribe|><|0.00|>"
    assert learned(it) == "<|nospeech|><|0.00|><|endoftext|>"
    assert it.weights[:5].tolist() == [1, 0, 1, 1, 0]
    assert not it.spans.any()
    assert it.ctc_weight == 1
    assert (it.ctc == -1).all()
    without = target(no_speech=True, timestamps=False, previous_text="one")
    assert learned(without) == "<|nospeech|><|notimestamps|><|endoftext|>"


def test_an_english_only_model_has_no_language_and_task_labels():
    files = {**small_tokenizer_files(), "generation_config.json": json.dumps({"is_multilingual": False}).encode()}
    english = Tokenizer.from_files(files)
    form = Format(english, positions=50, length=40, max_prompt=10)
    one = segment(0.1, 0.4, "one", tokenizer=english)
    assert learned(target(one, form=form), english) == "<|0.10|> one<|0.40|><|endoftext|>"
    assert learned(target(form=form, no_speech=True), english) == "<|nospeech|><|endoftext|>"


def test_a_words_time_is_divided_by_bytes():
    it = segment(0.0, 1.0, "one, andxyz", [("one", 0.2, 0.4), ("andxyz", 0.4, 1.0)])
    spans = dict(zip(TOKENIZER.token_bytes(it.tokens), it.spans, strict=True))
    assert list(spans) == [b" one", b",", b" and", b"x", b"y", b"z"]
    assert spans[b" one"] == pytest.approx((0.2, 0.4))
    assert spans[b" and"] == pytest.approx((0.4, 0.7))
    assert [spans[b] for b in (b"x", b"y", b"z")] == [pytest.approx((0.4 + t, 0.5 + t)) for t in (0.3, 0.4, 0.5)]


def test_punctuation_gets_the_time_of_the_pause_after_its_word():
    """transcribe() joins punctuation to the word but does not use its time."""
    it = segment(0.0, 0.9, "one, two.", [("one,", 0.2, 0.4), ("two.", 0.6, 0.8)])
    spans = dict(zip(TOKENIZER.token_bytes(it.tokens), it.spans, strict=True))
    assert (spans[b" one"], spans[b","], spans[b" two"]) == ((0.2, 0.4), (0.4, 0.6), (0.6, 0.8)), spans
    assert spans[b"."] == (0.8, 0.8)


@pytest.mark.parametrize(("after", "end"), [((), 50), ([0.9], 45)])
def test_punctuation_at_a_segments_end_gets_the_pause_to_the_next(after, end):
    it = target(segment(0.1, 0.4, "one.", [("one.", 0.1, 0.4)]), *(segment(start, 1.0, "two") for start in after))
    assert it.spans[it.labels.tolist().index(TOKENIZER.encode(".")[0])].tolist() == [20, end]


def test_a_zero_length_last_word_is_not_a_pause():
    it = target(segment(0.1, 0.4, "one", [("one", 0.4, 0.4)]), segment(0.9, 1.0, "two"))
    assert it.spans[it.labels.tolist().index(TOKENIZER.encode(" one")[0])].tolist() == [20, 21]


def test_a_repeated_word_has_two_times():
    it = segment(0.0, 1.0, "one one", [("one", 0.2, 0.4), ("one", 0.6, 0.8)])
    assert it.spans == (pytest.approx((0.2, 0.4)), pytest.approx((0.6, 0.8)))


def test_words_missing_from_the_text_are_ignored():
    it = segment(0.0, 1.0, "one two", [("one", 0.2, 0.4), ("three", 0.4, 0.5), ("two", 0.6, 0.8)])
    assert it.spans == (pytest.approx((0.2, 0.4)), pytest.approx((0.6, 0.8)))
    assert segment(0.0, 1.0, "one two").spans == (None, None)


def test_text_of_unspaced_languages_starts_without_a_space():
    assert TOKENIZER.decode(segment(0.0, 1.0, "一", language="zh").tokens) == "一"
    assert TOKENIZER.decode(segment(0.0, 1.0, "one", language="en").tokens) == " one"


def test_the_end_is_positioned_after_the_last_word_within_the_clip():
    for end, expected in ((0.5, [25, 28]), (0.97, [49, 50]), (1.0, [49, 50])):
        it = target(segment(0.0, 1.0, "one", [("one", 0.1, end)]))
        assert it.spans[np.flatnonzero(it.weights)[-1]].tolist() == expected


def test_ctc_has_only_spoken_words():
    it = target(*ONE_TWO)
    tokens = [*ONE_TWO[0].tokens, *ONE_TWO[1].tokens]
    assert it.ctc[: len(tokens)].tolist() == tokens
    assert (it.ctc[len(tokens) :] == -1).all()
    assert (it.ctc_weight, it.ctc.shape, it.ctc.dtype) == (1, (20,), np.int32)  # 20 for each second
    assert target(*ONE_TWO, task="translate").ctc_weight == 0
    assert (target(*ONE_TWO, task="translate").ctc == -1).all()
    long = Format(TOKENIZER, positions=50, length=400, max_prompt=10)
    assert target(segment(0, 1, "x" * 21), form=long).ctc_weight == 0


def test_ctc_of_bytes_is_lower_case_text():
    form = Format(TOKENIZER, positions=50, length=40, max_prompt=10, ctc_units="bytes")
    it = target(segment(0, 0.5, "One"), segment(0.5, 1.0, "é!"), form=form)
    assert bytes(it.ctc[it.ctc >= 0].tolist()).decode() == " one é!"


def test_frames_are_letters_or_unknown():
    form = Format(TOKENIZER, positions=50, length=40, max_prompt=10, ctc_units="bytes")
    frames = target(segment(0.0, 1.0, "Two one", [("Two", 0.1, 0.4), ("one", 0.6, 0.9)]), form=form).frames
    assert (frames.shape, frames.dtype) == ((50,), np.int32)
    for positions, letters in ((slice(5, 20), "two"), (slice(30, 45), "one")):
        assert frames[positions].tolist() == [ord(letter) for letter in letters for _ in range(5)]
    assert (np.delete(frames, [*range(5, 20), *range(30, 45)]) == -1).all()
    assert (target(segment(0.0, 1.0, "Two one"), form=form).frames == -1).all()
    assert (target(*ONE_TWO, form=form, task="translate").frames == -1).all()
    assert (target(no_speech=True, form=form).frames == 256).all()


def test_times_are_monotonic_and_within_the_window():
    rng = np.random.default_rng(0)
    for _ in range(200):
        edges = np.sort(rng.choice([rng.uniform(0, 1.02, 6), rng.integers(0, 26, 6) / 25]))
        it = target(*(segment(a, b, "one") for a, b in zip(edges[::2], edges[1::2], strict=True)))
        times = [i - SPECIAL.timestamp_begin for i in it.labels.tolist() if TOKENIZER.is_timestamp(i)]
        assert len(times) == 6
        assert times == sorted(times)
        assert times[-1] <= 50
        assert (it.spans[:, 0] <= it.spans[:, 1]).all()
        assert it.spans.max() <= 50


def test_segments_have_positive_length_and_do_not_overlap():
    it = target(segment(0.2, 0.203, "one"), segment(0.203, 0.4, "two"))
    assert learned(it) == "<|en|><|transcribe|><|0.20|> one<|0.22|><|0.22|> two<|0.40|><|endoftext|>"


def test_too_long_texts_are_rejected():
    with pytest.raises(TooLong, match="has 53 tokens, max_label_length is 40"):
        target(segment(0, 1, "x" * 47))
    assert learned(target(segment(0, 1, "x" * 34))).count("x" * 34) == 1

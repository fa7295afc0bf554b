"""Words from token times: what joins what, and how overlong words are cut."""

import pytest

from tests.small import small_tokenizer
from whisper_nnx.timing.words import WordTiming, add_words, merge_punctuations, words_from_tokens
from whisper_nnx.transcription.hallucination import find_hallucination, is_anomaly, last_end_s, leading_silence_s


def word(text: str, start: float = 0.0, end: float = 0.2, tokens: int = 1) -> WordTiming:
    return WordTiming(text, [7] * tokens, start, end, 0.9)


def segment(start: float, end: float, words=(), probability: float = 0.9) -> dict:
    timed = [{"word": w, "start": s, "end": e, "probability": probability} for w, s, e in words]
    return {"start": start, "end": end, "text": "".join(w for w, _, _ in words), "words": timed}


def test_punctuation_joins_its_word_and_keeps_its_place_empty():
    words = [word(' "'), word("Hi"), word("!"), word('"'), word(" you")]
    merge_punctuations(words)
    assert [w.word for w in words] == ["", ' "Hi!"', "", "", " you"]
    assert [len(w.tokens) for w in words] == [0, 4, 0, 0, 1]


def test_words_begin_and_end_where_their_tokens_do():
    tokenizer = small_tokenizer()
    tokens = tokenizer.encode(" one two")
    times = [0.1 * i for i in range(len(tokens) + 1)]
    words = words_from_tokens(tokenizer, tokens, times, [0.5] * len(tokens), "de")
    assert [w.word for w in words] == [" one", " two"]
    assert words[0].start == 0.0
    assert words[0].end == words[1].start
    assert words[1].end == times[-1]
    assert {w.probability for w in words} == {0.5}


def test_each_segment_gets_its_own_words_and_lies_where_they_do():
    segments = [segment(10.0, 11.0), segment(11.0, 12.0)]
    words = [word(" a", 0.2, 0.4), word(" b", 0.4, 0.6), word(" c", 1.1, 1.3)]
    add_words(segments, words, [[7, 7], [7]], offset_s=10.0, last_speech_s=10.0)
    assert [[w["word"] for w in s["words"]] for s in segments] == [[" a", " b"], [" c"]]
    assert [(s["start"], s["end"]) for s in segments] == [(10.2, 10.6), (11.1, 11.3)]


def test_a_word_that_fills_a_pause_is_cut_to_twice_the_typical_length():
    segments = [segment(0.0, 6.0)]
    words = [word(" a", 0.0, 5.0), *(word(" b", 5.0 + 0.2 * i, 5.2 + 0.2 * i) for i in range(5))]
    add_words(segments, words, [[7] * 6], offset_s=0.0, last_speech_s=0.0)
    first = segments[0]["words"][0]
    assert first["end"] == 5.0
    assert first["end"] - first["start"] == pytest.approx(0.4)


def test_segments_without_text_get_an_empty_list_of_words():
    segments = [segment(0.0, 1.0)]
    add_words(segments, [], [[]], offset_s=0.0, last_speech_s=0.0)
    assert segments[0]["words"] == []


def test_improbable_short_words_are_an_anomaly_and_ordinary_ones_are_not():
    words = [(" a", 0.0, 0.3), (" b", 0.3, 0.6), (" c", 0.6, 0.9)]
    assert not is_anomaly(segment(0.0, 0.9, words))
    assert is_anomaly(segment(0.0, 0.9, words, probability=0.01))
    assert is_anomaly(segment(0.0, 9.0, [(" a", 0.0, 9.0)]))
    assert not is_anomaly(segment(0.0, 1.0))
    assert not is_anomaly(None)


def test_an_anomaly_between_silences_is_found_and_one_in_speech_is_not():
    ordinary = segment(0.0, 10.0, [(f" w{i}", i, i + 0.5) for i in range(10)])
    strange = segment(15.0, 16.0, [(" x", 15.0, 15.05), (" y", 15.9, 15.95)], probability=0.01)
    after = segment(20.0, 21.0, [(" z", 20.0, 20.5), (" z", 20.5, 21.0)])
    assert find_hallucination([ordinary, strange, after], 0, 3000, 3000, 0.0, 1.0) == 1
    near = segment(10.1, 11.0, [(" x", 10.1, 10.2)], probability=0.01)
    close = segment(11.2, 12.0, [(" z", 11.2, 11.5), (" z", 11.5, 12.0)])
    assert find_hallucination([ordinary, near, close], 0, 3000, 3000, 0.0, 1.0) is None


def test_silence_before_a_strange_beginning_is_found():
    strange = segment(4.0, 5.0, [(" x", 4.0, 4.01)], probability=0.01)
    assert leading_silence_s([strange], 1.0, 2.0) == 3.0
    assert leading_silence_s([strange], 1.0, 3.5) is None
    assert leading_silence_s([segment(4.0, 5.0, [(" x", 4.0, 4.5), (" y", 4.5, 5.0)])], 1.0, 2.0) is None


def test_speech_ends_with_the_last_word_or_else_with_the_segment():
    assert last_end_s([]) is None
    assert last_end_s([segment(0.0, 3.0)]) == 3.0
    assert last_end_s([segment(0.0, 3.0, [(" a", 0.5, 1.5)]), segment(3.0, 4.0)]) == 1.5

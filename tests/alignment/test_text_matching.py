"""Words of a known text, found among the recognized ones."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.small import small_tokenizer
from whisper_nnx.alignment.text_matching import match, similarity, spelled_as, spoken_words
from whisper_nnx.text.words import normalized, split_tail, words_of

words = st.lists(st.sampled_from(["one", "two", "three", "four"]), max_size=7)


def edit_plainly(a: list[str], b: list[str], pairs: dict[tuple[int, int], float]) -> float:
    """The cost of the cheapest way to edit a into b, cell by cell: 1 for a word that the other lacks."""
    cost = np.add.outer(np.arange(len(a) + 1.0), np.arange(len(b) + 1.0))
    for i in range(len(a)):
        for j in range(len(b)):
            cost[i + 1, j + 1] = min(cost[i, j] + pairs[i, j], cost[i, j + 1] + 1, cost[i + 1, j] + 1)
    return float(cost[-1, -1])


@settings(deadline=None, max_examples=200)
@given(words, words)
def test_the_match_of_two_texts_is_a_cheapest_edit(a, b):
    found = match(a, b)
    alike = similarity(a, b)
    pairs = {(i, j): round(10 * (1 - alike[i, j])) / 10 for i in range(len(a)) for j in range(len(b))}
    taken = [(i, int(j)) for i, j in enumerate(found.at) if j >= 0]
    assert [j for _, j in taken] == sorted({j for _, j in taken})
    cost = sum(pairs[pair] for pair in taken) + len(a) + len(b) - 2 * len(taken)
    assert cost == pytest.approx(edit_plainly(a, b, pairs))
    assert [bool(same) for same in found.same] == [j >= 0 and a[i] == b[j] for i, j in enumerate(found.at)]


def test_case_punctuation_and_small_misspellings_do_not_hide_a_word():
    found = match([" Color,", " of", " Éclairs"], [" the", " color", " of", " éclairs."])
    assert found.at.tolist() == [1, 2, 3]
    assert found.same.all()


def test_thousands_of_words_are_matched_in_seconds():
    random = np.random.default_rng(0)
    vocabulary = ["".join(random.choice(list("abcdefghij"), 6)) for _ in range(1500)]
    text = [vocabulary[i] for i in random.integers(0, 1500, 4000)]
    recognized = [word for word in text if random.random() > 0.1]
    begin = time.perf_counter()
    found = match(text, recognized)
    assert time.perf_counter() - begin < 10
    assert found.same.mean() > 0.89


def test_words_keep_their_spelling_and_take_punctuation_that_stands_alone():
    text = "— Hello ,  world !\n\nNext line."
    found = words_of(text, small_tokenizer(), "en")
    assert [word.text for word in found] == [" — Hello ,", " world !", " Next", " line."]
    assert [word.ends_line for word in found] == [False, True, False, True]
    assert [word.ends_sentence for word in found] == [False, True, False, True]


def test_languages_without_spaces_are_cut_into_characters():
    found = words_of("你好，世界。", small_tokenizer(), "zh")
    assert [word.text for word in found] == ["你", "好，", "世", "界。"]


def test_a_word_is_spelled_as_the_one_recognized_in_its_place():
    assert spelled_as(" seven", " Seven.") == " Seven."
    assert spelled_as(" nine", " Five,") == " Nine,"
    assert spelled_as(" Nine!", " five") == " nine"
    assert normalized("Don’t!") == "dont"
    assert split_tail(' "Well",') == (' "Well', '",')
    assert split_tail(" ...") == (" ...", "")


def likelihoods(n: int, lacking: set[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a window that says n words but for those that are lacking: each but the next one is unlikely."""
    spoken = [i for i in range(n) if i not in lacking]
    first, end = np.full((n + 1, n), -9.0), np.full(n + 1, -9.0)
    for i in range(n + 1):
        following = [j for j in spoken if j >= i]
        if following:
            first[i, following[0]] = -0.1
        else:
            end[i] = -0.1
    return first, np.zeros(n), end


def test_words_that_a_window_does_not_say_are_left_out():
    for lacking in (set(), {0, 1, 2}, {3, 4, 5}, {7, 8, 9}):
        recognized = np.array([i not in lacking for i in range(10)])
        read = spoken_words(*likelihoods(10, lacking), recognized)
        assert {i for i in range(10) if np.isinf(read[i])} == lacking


def test_a_word_that_is_merely_unlikely_is_kept():
    first, rest, end = likelihoods(6, set())
    first[3, 3] = -6.0
    assert np.isfinite(spoken_words(first, rest, end, np.arange(6) != 3)).all()


def test_what_a_neighbor_may_say_is_left_out_at_no_cost():
    """One word alone would not be worth a gap."""
    lacking = {0, 5}
    recognized = np.array([i not in lacking for i in range(6)])
    first, rest, end = likelihoods(6, lacking)
    first[first == -9.0], end[end == -9.0] = -4.0, -4.0
    assert np.isfinite(spoken_words(first, rest, end, recognized)).all()
    read = spoken_words(first, rest, end, recognized, before=1, after=1)
    assert {i for i in range(6) if np.isinf(read[i])} == lacking

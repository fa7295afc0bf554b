"""N-gram models over words: against kenlm, against plain Python over all words, and decoding with them."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from tests.decoding.test_fusion import softmax
from tests.decoding.test_ngram import START, UNKNOWN, arpa, logprobs, plain_logprob
from tests.oracle import ROWS, PlainDecoder, is_text
from tests.small import quick_compilation, small_mel, small_model, small_tokenizer  # noqa: F401
from whisper_nnx import WordNgramModel, transcribe
from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.text.spellings import spell
from whisper_nnx.transcription.language_models import window_with_lm
from whisper_nnx.transcription.windows import decode, decode_windows, encode_windows

FOLDER = Path(__file__).parent / "ngram"
TOKENIZER = small_tokenizer()
V = TOKENIZER.vocab_size
TEXT = TOKENIZER.text_tokens(range(V))
PIECES = dict(zip(TEXT, TOKENIZER.token_bytes(TEXT), strict=True))
WORDS = ["the", "then", "there", "a", "an", "and", "one", "on", "once", "two", "twos", "anders", "other", "er"]
WORDS += ["mr.", "o'clock", "well-on"]
GERMAN = DecodingOptions(language="de")
LOG_10 = np.log(10)


def test_log_probabilities_of_texts_are_kenlms():
    """By kenlm 0.3.0: the sum of `Model.BaseScore` of the words, in natural logarithms. Marks are no words of it."""
    model = WordNgramModel.from_arpa(FOLDER / "words.arpa", TOKENIZER)
    texts = json.loads((FOLDER / "kenlm_words.json").read_text())
    tokens = [TOKENIZER.encode(one["text"]) for one in texts]
    scores = iter(logprobs(model, [ids[:n] for ids in tokens for n in range(len(ids))]))
    totals = [sum(next(scores)[token] for token in ids) for ids in tokens]
    np.testing.assert_allclose(totals, [one["logprob"] for one in texts], rtol=1e-5)


# Random models, against the definition.

Model = dict[tuple[str, ...], tuple[float, float]]


def random_model(seed: int, order: int, count: int, words: Sequence[str], has_unknown: bool = True) -> Model:
    """n-gram -> logarithms, to base 10, of its probability and its backoff weight."""
    rng = np.random.default_rng(seed)
    words = [*words, *[UNKNOWN] * has_unknown]
    ngrams = [(word,) for word in (START, "</s>", *words)]
    for n in range(2, order + 1):
        contexts = [one for one in ngrams if len(one) == n - 1 and one[-1] != "</s>"]
        picked = {(*contexts[rng.integers(len(contexts))], str(rng.choice([*words, "</s>"]))) for _ in range(count)}
        ngrams += sorted(picked)
    return {one: (-1 - 1.5 * rng.random(), -rng.random() * (rng.random() < 0.8)) for one in ngrams}


@dataclass(frozen=True)
class PlainModel:
    """The definition over all words, one token at a time. `spelled`: tokens -> word."""

    model: Model
    spelled: dict[tuple[int, ...], str]
    order: int

    def word(self, context: tuple[str, ...], word: str) -> float:
        used = context[-(self.order - 1) :] if self.order > 1 else ()
        return LOG_10 * plain_logprob(self.model, used, word)

    def prefix(self, context: tuple[str, ...], prefix: tuple[int, ...]) -> float:
        """log S."""
        below = [word for tokens, word in self.spelled.items() if tokens[: len(prefix)] == prefix]
        return float(np.log(sum(np.exp(self.word(context, word)) for word in below))) if below else -np.inf

    def begins(self, context: tuple[str, ...], token: int) -> tuple[float, bool]:
        """Its score as the first token of a word, or as a mark, and whether it is one."""
        score = self.prefix(context, (spaced(token),))
        is_mark = score == -np.inf and is_marked(token)
        return (self.word(context, UNKNOWN) if score == -np.inf else score), is_mark

    def average(self, context: tuple[str, ...]) -> float:
        firsts = {tokens[:1] for tokens in self.spelled}
        logs = np.array([self.prefix(context, first) for first in firsts])
        return float((np.exp(logs) * logs).sum() / np.exp(logs).sum())

    def score(self, state: tuple, token: int) -> tuple[float, tuple]:
        """Its log-probability, and the state after it: (words before, tokens of this word or None, after a mark)."""
        context, prefix, after_mark = state
        end = leave = 0.0
        after = context
        if prefix is None:
            after = (*context, UNKNOWN)
        elif prefix:
            below = self.prefix(context, prefix)
            leave = min(0.0, self.word(context, UNKNOWN) - below)
            word = self.spelled.get(prefix)
            end = leave if word is None else self.word(context, word) - below
            after = (*context, UNKNOWN if word is None else word)
        back = self.average(after) if after_mark else 0.0
        longer = None if prefix is None else (*prefix, token)
        if prefix and any(tokens[: len(longer)] == longer for tokens in self.spelled):
            return self.prefix(context, longer) - self.prefix(context, prefix), (context, longer, False)
        if prefix == () or PIECES[token].startswith(b" "):
            score, is_mark = self.begins(after, token)
            if is_mark:
                return end + self.average(after) - back, (after, (), True)
            known = self.prefix(after, (spaced(token),)) > -np.inf
            return end + score - back, (after, (spaced(token),) if known else None, False)
        if is_marked(token):
            return end + self.average(after) - back, (after, (), True)
        return leave - back, (context, None, False)

    def scores(self, history: Sequence[int]) -> list[float]:
        """Of all text tokens after this one."""
        state: tuple = ((START,), (), False)
        for token in history:
            state = self.score(state, token)[1]
        return [self.score(state, token)[0] for token in TEXT]


def is_marked(token: int) -> bool:
    text = PIECES[token].decode(errors="ignore")
    return not any(map(str.isalnum if text.startswith(" ") else str.isalpha, text))


def spaced(token: int) -> int:
    by_piece = {piece: i for i, piece in PIECES.items()}
    return by_piece.get(b" " + PIECES[token], token)


def spelled(words: Sequence[str], *, capitals: bool) -> dict[tuple[int, ...], str]:
    forms = {word: word for word in words} | ({word.capitalize(): word for word in words} if capitals else {})
    return {tuple(TOKENIZER.encode(f" {text}")): word for text, word in forms.items()}


TEXTS = [
    "",
    " the",
    " the one",
    " The one and two",
    " the one, and the other",
    ' "the one" (two) - an o\'clock',
    " one thing",
    " one 3.5 two",
    " well-on",
    " well-two, mr. a mr, a",
    "one and",
    " an ande",
    " on",
    " t",
    " the then there a an and one on once two other one two the then there a an and one on once two other",
]


@pytest.mark.parametrize(
    ("order", "count", "capitals", "has_unknown"),
    [(1, 0, True, True), (2, 40, True, True), (3, 60, False, True), (4, 80, True, False)],
)
def test_log_probabilities_are_those_of_the_definition(tmp_path, order, count, capitals, has_unknown):
    words = WORDS if capitals else [*WORDS, "One", "THE"]
    model = random_model(order, order, count, words, has_unknown)
    (tmp_path / "words.arpa").write_text(arpa(model, order))
    if not has_unknown:
        model[UNKNOWN,] = (min(model[word,][0] for word in words), 0.0)
    plain = PlainModel(model, spelled(words, capitals=capitals), order)
    histories = [TOKENIZER.encode(text)[-64:] for text in TEXTS]
    found = logprobs(WordNgramModel.from_arpa(tmp_path / "words.arpa", TOKENIZER), histories)[:, TEXT]
    for row, history, text in zip(found, histories, TEXTS, strict=True):
        np.testing.assert_allclose(row, plain.scores(history), rtol=1e-5, atol=2e-4, err_msg=text)


def test_words_of_one_case_are_also_written_with_a_capital():
    def texts(words):
        return {TOKENIZER.decode(one.tokens): words[one.word] for one in spell(words, TOKENIZER)}

    assert texts(["one", "über", "7"]) == {" one": "one", " One": "one", " über": "über", " Über": "über", " 7": "7"}
    assert texts(["ONE", "TWO'S"]) == {" one": "ONE", " One": "ONE", " two's": "TWO'S", " Two's": "TWO'S"}
    assert texts(["one", "Two"]) == {" one": "one", " Two": "Two"}
    assert texts(["a", "x" * 99]) == {" a": "a", " A": "a"}


GOOD = (FOLDER / "words.arpa").read_text()


def test_what_is_in_brackets_has_no_case():
    assert len(spell(["STRAßE", "DIE", "<sil>"], TOKENIZER)) == 2 + 2 + 1


def words_file(*words: str, more: str = "", backoff: float = -0.2) -> str:
    one = "".join(f"-1.2\t{word}\t{backoff}\n" for word in words)
    return (
        f"\\data\\\nngram 1={len(words) + 3}\nngram 2=1\n\n\\1-grams:\n-99\t<s>\t-0.3\n-1.5\t</s>\n-4\t<unk>\n{one}"
        + (f"\n\\2-grams:\n-0.1\t{words[0]} </s>\n\n\\end\\\n")
    )


@pytest.mark.parametrize("backoff", [-0.2, -99])
def test_scores_are_numbers_also_where_no_word_can_follow(tmp_path, backoff):
    file = tmp_path / "words.arpa"
    file.write_text(words_file("one", "two", backoff=backoff))
    model = WordNgramModel.from_arpa(file, TOKENIZER)
    scores = logprobs(model, [[], TOKENIZER.encode(" one"), TOKENIZER.encode(" one,"), TOKENIZER.encode(" one, two")])
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("words", [("0", "1", "9"), ("à", "la", "le", "e"), ("Ġunju", "Malta", "il")])
def test_words_that_look_like_tokens_are_words(tmp_path, words):
    file = tmp_path / "words.arpa"
    file.write_text(words_file(*words), encoding="utf-8")
    assert isinstance(window_with_lm(TOKENIZER, DecodingOptions(lm=str(file))).lm, WordNgramModel)


def test_an_absurd_backoff_weight_is_refused(tmp_path):
    file = tmp_path / "words.arpa"
    file.write_text(words_file("one", backoff=50))
    with pytest.raises(ValueError, match="absurd backoff weight"):
        WordNgramModel.from_arpa(file, TOKENIZER)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD.replace("anders", "bärs").encode("latin-1"), r"'b\ufffdrs' is not UTF-8; convert the file"),
        (GOOD.replace("\ttwos the and\n", "\ttwos the the\n").encode(), "an n-gram occurs twice"),
        (re.sub(r"\bthen\b", "the", GOOD).encode(), "a 1-gram occurs twice"),
        (
            arpa({(word,): (-1.0, 0.0) for word in (START, "x" * 99)}, 1).encode(),
            "no word that the tokenizer can write",
        ),
        ((FOLDER / "ids.arpa").read_bytes(), "is a model of tokens; read it with NgramModel"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(tmp_path, content, message):
    (tmp_path / "words.arpa").write_bytes(content)
    with pytest.raises(ValueError, match=rf"words\.arpa.*({message})") as error:
        WordNgramModel.from_arpa(tmp_path / "words.arpa", TOKENIZER)
    assert "\n" not in str(error.value)


# Decoding with them.


@pytest.fixture(scope="module")
def model():
    return small_model(decoder_layers=1)


@pytest.fixture
def files(tmp_path):
    """Two models of different sizes."""
    for seed in (1, 2):
        content = arpa(random_model(seed, 3, 50 * seed, WORDS[: 8 * seed]), 3)
        (tmp_path / f"{seed}.arpa").write_text(content)
    return [str(tmp_path / f"{seed}.arpa") for seed in (1, 2)]


def test_greedy_text_equals_the_plain_decoder(model, tmp_path):
    ngrams, mel = random_model(1, 3, 50, WORDS), small_mel(ROWS)
    (tmp_path / "words.arpa").write_text(arpa(ngrams, 3))
    plain, special = PlainModel(ngrams, spelled(WORDS, capitals=True), 3), TOKENIZER.special
    options = replace(GERMAN, lm_weight=0.7, sample_len=8)
    is_word = np.array([is_text(token, special) for token in range(V)])
    results = decode(model, mel, options, lm=tmp_path / "words.arpa")
    start = [special.sot, dict(special.languages)["de"], special.transcribe]
    for result, window in zip(results[:1], mel, strict=False):
        decoder, tokens = PlainDecoder(model, window, options, start), list[int]()
        while len(tokens) < options.sample_len:
            own = decoder.logprobs(tokens)
            scores = np.full(V, -100.0)  # of ids without a token, too
            scores[TEXT] = plain.scores([token for token in tokens if is_word[token]])
            own_text = own[is_word] if (own[is_word] > -np.inf).any() else np.zeros(is_word.sum())
            scores[~is_word] = (softmax(own_text) * scores[is_word]).sum()
            best = int(np.argmax(own + options.lm_weight * scores))
            if best == special.eot:
                break
            tokens.append(best)
        assert result.tokens == tuple(tokens)
    assert [one.tokens for one in results] != [one.tokens for one in decode(model, mel, GERMAN, sample_len=8)]


def test_a_file_of_words_is_found_out_and_another_of_its_size_compiles_nothing(model, files, compilations):
    encoded = encode_windows(model, small_mel(ROWS))

    def run(file):
        options = window_with_lm(TOKENIZER, replace(GERMAN, beam_size=2, lm=file, lm_weight=1.0))
        assert isinstance(options.lm, WordNgramModel)
        return [r.tokens for r in decode_windows(model, encoded, [options] * ROWS, range(ROWS))]

    first = run(files[0])
    compilations.clear()
    assert run(files[1]) != first
    assert compilations == []


@pytest.mark.parametrize(
    "strategy", [{"beam_size": None, "temperature": 0.0}, {"beam_size": 2, "temperature": 0.0}, {"temperature": 1.0}]
)
def test_recordings_with_files_of_their_own_are_the_same_in_any_company(model, files, strategy):
    noise = np.random.default_rng(0).normal(0, 0.1, (3, 16_000)).astype(np.float32)
    options = {"language": "de", "no_speech_threshold": None, "lm_weight": 1.0, "seed": 3, **strategy}
    lms = [files[0], files[1], files[0]]
    sources = [{"audio": audio, "lm": lm} for audio, lm in zip(noise, lms, strict=True)]
    together = [one["text"] for one in transcribe(model, sources, batch_size=2, **options)]
    assert together == [transcribe(model, source, **options)["text"] for source in sources]

"""`align`: when each word of a given transcript was spoken, in recordings of any length.

The recording is cut where it is quiet, and each piece is transcribed. The recognized words show which part of the text
belongs to each piece, and how the model spells it. Then the decoder reads the text itself in each piece: once to find
the words that were never spoken, once to time the others by its attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any, TypedDict, cast

import jax.numpy as jnp
import numpy as np

from whisper_nnx.alignment.likelihood import following_logprobs
from whisper_nnx.alignment.pieces import Piece, batches, transcribe_pieces
from whisper_nnx.alignment.text_matching import match, spelled_as, spoken_words
from whisper_nnx.audio.loading import load_audio
from whisper_nnx.model.heads import Heads as Pairs
from whisper_nnx.model.sharding import mesh_of
from whisper_nnx.model.whisper import Whisper
from whisper_nnx.output.results import Segment, Transcript, Word
from whisper_nnx.runtime.devices import fetch, rounded_up
from whisper_nnx.text.languages import language_or_none
from whisper_nnx.text.tokenizer import Tokenizer
from whisper_nnx.text.words import TextWord, words_of
from whisper_nnx.timing.token_times import padded_ids
from whisper_nnx.timing.word_times import Heads, Layout, SpelledWord, word_heads, word_times
from whisper_nnx.transcription.attempts import compression_ratio
from whisper_nnx.transcription.windows import encode_windows, tokenizer_of

PAUSE_S = 1.0  # a pause that starts a new segment


class AlignedWord(TypedDict):
    """A word of the text; start and end in s, None where it is not spoken.

    probability: the geometric mean of its tokens' probabilities, 0 where it is not spoken.
    """

    word: str
    start: float | None
    end: float | None
    probability: float


class AlignedTranscript(Transcript):
    """The spoken text, in segments that have words; words: those of the whole text; unspoken: what was never spoken."""

    words: list[AlignedWord]
    unspoken: list[str]


def align(
    model: Whisper,
    audio: Any,
    text: str,
    *,
    language: str | None = None,
    task: str = "transcribe",
    alignment_heads: Pairs | int | None = None,
    batch_size: int = 1,
    sampling_rate: int | None = None,
) -> AlignedTranscript:
    """Finds the times of the words of a known text, in a recording of any length.

    Words keep their spelling. A segment ends with a sentence, a line of the text or its piece, or before a pause. Words
    that the recording does not contain are `unspoken`, and in no segment.

    Args:
      model: a model with a tokenizer.
      audio: anything that `load_audio` takes.
      text: the transcript.
      language: a code or name; None detects it for each piece of up to 30 s.
      task: "transcribe", or "translate" for an English text of speech in another language.
      alignment_heads: (layer, head) pairs that follow short pieces of text, see `find_alignment_heads`.
      batch_size: pieces to align together.
      sampling_rate: of an array, in Hz.

    Raises:
      ValueError: a text without words, an unknown language or task, or (as AudioError) unreadable audio.
      OSError: a file that cannot be opened.
    """
    tokenizer, language = tokenizer_of(model), language_or_none(language)
    heads = word_heads(model.config, alignment_heads)
    if language is not None or not tokenizer.is_multilingual:
        tokenizer.sot_sequence(language, task)  # raises for what it does not know
    if not text.strip():
        raise ValueError(f"text {text!r} has no words to align; give a transcript")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    batch_size = rounded_up(batch_size, mesh_of(model))
    pieces = transcribe_pieces(model, load_audio(audio, sampling_rate), language, task, batch_size)
    languages = [piece.language for piece in pieces]
    spoken = max(languages, key=languages.count, default=language or "en")
    words = words_of(text, tokenizer, spoken)
    reader = Reader(
        model, [piece for piece in pieces if piece.recognized], [word.text for word in words], task, batch_size
    )
    owner, probability = reader.owners()
    timed = np.column_stack([reader.times(owner, heads), probability])
    return _transcript(words, timed, reader.pieces, owner, tokenizer, spoken)


@dataclass(frozen=True)
class Reader:
    """Reads the words [N] of a text in the pieces [P] that contain speech."""

    model: Whisper
    pieces: list[Piece]
    words: list[str]
    task: str
    batch_size: int

    def owners(self) -> tuple[np.ndarray, np.ndarray]:
        """The piece of each word [N], -1 where it is not spoken; and the mean probability [N] of the word's tokens.

        Words between two that are known to be in neighboring pieces are tried in both.
        """
        n, numbers = len(self.words), range(len(self.pieces))
        owner, owners_logprob = np.full(n, -1), np.full(n, -np.inf)
        spelled, recognized_in, _ = self.spellings(np.arange(n))
        anchors = np.flatnonzero(recognized_in >= 0)
        first = np.concatenate([[0], anchors + 1])[np.searchsorted(recognized_in[anchors], numbers, "left")]
        last = np.concatenate([anchors, [n]])[np.searchsorted(recognized_in[anchors], numbers, "right")]  # and one more
        offered = [self._offered(p, np.arange(first[p], last[p]), spelled, recognized_in) for p in numbers]
        logprobs = np.full((len(numbers), n), -np.inf, np.float32)
        for chunk, rows in batches(numbers, self.batch_size):
            likelihoods = self._likelihoods(rows, [[spelled[i] for i in offered[p]] for p in rows])
            for p, likelihood in zip(chunk, likelihoods, strict=False):
                before = int(np.sum(offered[p] < last[p - 1])) if p else 0
                after = int(np.sum(offered[p] >= first[p + 1])) if p + 1 < len(numbers) else 0
                logprobs[p, offered[p]] = spoken_words(*likelihood, recognized_in[offered[p]] == p, before, after)
        # Words that two neighbors may both contain are divided where that explains most.
        gains = np.where(np.isfinite(logprobs), np.maximum(logprobs + _SURELY_NOT, 0.01), 0.0)
        begin = 0
        for p in numbers:
            end = n
            if p + 1 < len(numbers):
                shared = slice(max(begin, first[p + 1]), max(begin, first[p + 1], last[p]))
                here, there = (np.cumsum([0, *row[shared]]) for row in gains[p : p + 2])
                end = shared.start + int(np.argmax(here - there))
            owner[begin:end] = np.where(gains[p, begin:end] > 0, p, -1)
            owners_logprob[begin:end] = np.where(gains[p, begin:end] > 0, logprobs[p, begin:end], -np.inf)
            begin = end
        sizes = [max(1, len(tokenizer_of(self.model).encode(word))) for word in spelled]
        return owner, np.exp(owners_logprob / sizes)

    def times(self, owner: np.ndarray, heads: Heads) -> np.ndarray:
        """Start and end of each word [N,2], in s from the recording's beginning; NaN without an owner."""
        timed = np.full((len(self.words), 2), np.nan)
        spoken = np.flatnonzero(owner >= 0)
        spelled, recognized_in, spans = self.spellings(spoken)
        spans[recognized_in != owner[spoken]] = np.nan
        numbers = [p for p in range(len(self.pieces)) if np.any(owner == p)]
        for chunk, rows in batches(numbers, self.batch_size):
            at = [np.flatnonzero(owner[spoken] == p) for p in rows]
            layouts = [
                self.layout(p, [spelled[i] for i in own], heads.short_pieces, spans[own])
                for p, own in zip(rows, at, strict=True)
            ]
            pauses = [self.pieces[p].pauses for p in rows]
            config, eot = self.model.config, tokenizer_of(self.model).special.eot
            times = word_times(
                self.model.decoder, self.cross(rows), config, eot=eot, layouts=layouts, pauses=pauses, heads=heads
            )
            for p, own, times_s in zip(chunk, at, times, strict=False):
                timed[spoken[own]] = self.pieces[p].start_s + times_s
        return timed

    def spellings(self, at: np.ndarray) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Of words [n]: how the model spells them; the piece that each was recognized in, or -1; where [n,2], in s."""
        recognized = [(p, word) for p, piece in enumerate(self.pieces) for word in piece.recognized]
        curly = any(set(word.word) & _CURLY.keys() for _, word in recognized)
        words = [self.words[i] if curly else self.words[i].translate(_STRAIGHT) for i in at]
        found = match(words, [word.word for _, word in recognized])
        spelled = [spelled_as(w, recognized[j][1].word) if j >= 0 else w for w, j in zip(words, found.at, strict=True)]
        known = [recognized[j] if same else None for j, same in zip(found.at, found.same, strict=True)]
        recognized_in = np.array([p[0] if p else -1 for p in known], int)
        spans = np.array([(k[1].start_s, k[1].end_s) if k else (np.nan, np.nan) for k in known])
        return spelled, recognized_in, spans.reshape(-1, 2)

    def _offered(self, p: int, at: np.ndarray, spelled: Sequence[str], recognized_in: np.ndarray) -> np.ndarray:
        """Those of the words `at` that piece p may contain: if these exceed the context, the likeliest to be near."""
        room = self.model.config.max_target_positions - len(self._start(p)) - 1
        sizes = np.array([len(tokenizer_of(self.model).encode(spelled[i])) for i in at], int)
        if sizes.sum() <= room:
            return at
        own = np.flatnonzero(recognized_in[at] == p)
        if len(own):
            far = np.abs(np.arange(len(at))[:, None] - own).min(axis=1)
        else:  # nothing was recognized: an even pace is assumed
            known = np.flatnonzero(recognized_in >= 0)
            pieces, words = [0, *recognized_in[known] + 0.5, len(self.pieces)], [0, *known, len(self.words)]
            far = np.abs(at - np.interp(p + 0.5, pieces, words))
        order = np.argsort(far, kind="stable")
        return at[np.sort(order[np.cumsum(sizes[order]) <= room])]

    def _likelihoods(
        self, pieces: Sequence[int], texts: Sequence[Sequence[str]]
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each piece and its words [n]: arguments of `spoken_words`. A first letter may have either case."""
        tokenizer = tokenizer_of(self.model)
        tokens = [[tokenizer.encode(word) for word in text] for text in texts]
        sequences = [
            [*self._start(p), *chain.from_iterable(words), tokenizer.special.eot]
            for p, words in zip(pieces, tokens, strict=True)
        ]
        ids, _ = padded_ids(sequences, self.model.config, tokenizer.special.eot)
        others = np.zeros_like(ids)
        for row, text in zip(others, texts, strict=True):
            row[: len(text)] = [next(iter(tokenizer.encode(_other_case(word))), 0) for word in text]
        tables = following_logprobs(self.model.decoder, self.cross(pieces), ids, np.concatenate([ids, others], axis=1))
        for p, words, table in zip(pieces, tokens, fetch(tables), strict=True):
            ends = np.cumsum([len(self._start(p)), *map(len, words)])  # of the first 0 to n words
            behind, starts = table[ends - 1], ends[:-1]
            first = np.maximum(behind[:, starts], behind[:, ids.shape[1] + np.arange(len(words))])
            total = np.concatenate([[0.0], np.cumsum(np.diagonal(table, offset=1))])  # of the ids up to each
            yield first, total[ends[1:] - 1] - total[starts], behind[:, ends[-1]]

    def layout(self, p: int, spelled: Sequence[str], short: bool, spans: np.ndarray | None = None) -> Layout:
        """Words [n] placed along piece p's audio; spans [n,2]: where each is expected, in s, NaN: not known."""
        tokenizer, context = tokenizer_of(self.model), self.model.config.max_target_positions
        words = [SpelledWord(word, tokenizer.encode(word)) for word in spelled]
        return Layout.of(tokenizer, self._start(p), words, context, short=short, spans=spans)

    def _start(self, p: int) -> tuple[int, ...]:
        return tokenizer_of(self.model).sot_sequence(self.pieces[p].language, self.task, timestamps=False)

    def cross(self, pieces: Sequence[int]) -> Any:
        return encode_windows(self.model, jnp.stack([self.pieces[p].features for p in pieces])).cross


_CURLY = dict(zip("’‘“”", "''\"\"", strict=True))  # most models write straight ones, and find the others improbable
_STRAIGHT = str.maketrans(_CURLY)
_SURELY_NOT = 20.0  # a word that is less likely than exp(-20) explains nothing


def _other_case(word: str) -> str:
    start = len(word) - len(word.lstrip())
    return word[:start] + word[start : start + 1].swapcase() + word[start + 1 :]


def _transcript(
    words: Sequence[TextWord],
    timed: np.ndarray,
    pieces: Sequence[Piece],
    owner: np.ndarray,
    tokenizer: Tokenizer,
    language: str,
) -> AlignedTranscript:
    """Words [N], their times [N,3] and owners [N] -> segments and words."""
    aligned: list[AlignedWord] = [
        {"word": word.text, "start": round(start, 2), "end": round(end, 2), "probability": probability}
        if p >= 0
        else {"word": word.text, "start": None, "end": None, "probability": 0.0}
        for word, p, (start, end, probability) in zip(words, owner.tolist(), timed.tolist(), strict=True)
    ]
    segments: list[Segment] = []
    for number, own in enumerate(_segments(words, timed, owner)):
        piece, text = pieces[owner[own[0]]], "".join(words[i].text for i in own)
        probabilities = np.maximum(timed[own, 2], 1e-10)
        segments.append(
            {
                "id": number,
                "seek": piece.start_frame,
                "start": round(float(timed[own[0], 0]), 2),
                "end": round(float(timed[own[-1], 1]), 2),
                "text": text,
                "tokens": tokenizer.encode(text),
                "temperature": 0.0,
                "avg_logprob": float(np.log(probabilities).mean()),
                "compression_ratio": compression_ratio(text),
                "no_speech_prob": piece.no_speech_prob,
                "words": [cast(Word, aligned[i]) for i in own],
            }
        )
    return {
        "text": "".join(segment["text"] for segment in segments),
        "segments": segments,
        "language": language,
        "words": aligned,
        "unspoken": ["".join(words[i].text for i in own).strip() for spoken, own in _runs(owner >= 0) if not spoken],
    }


def _runs(flags: np.ndarray) -> Iterator[tuple[bool, list[int]]]:
    """Indices of neighbors with the same flag."""
    for flag, run in groupby(range(len(flags)), lambda i: bool(flags[i])):
        yield flag, list(run)


def _segments(words: Sequence[TextWord], timed: np.ndarray, owner: np.ndarray) -> Iterator[list[int]]:
    """Indices of the words of each segment; those that were never spoken are in none."""
    own: list[int] = []
    for i in np.flatnonzero(owner >= 0).tolist():
        if own:
            ended = any(word.ends_line or word.ends_sentence for word in words[own[-1] : i])
            if ended or owner[i] != owner[own[-1]] or timed[i, 0] - timed[own[-1], 1] > PAUSE_S:
                yield own
                own = []
        own.append(i)
    if own:
        yield own

"""How likely texts are, given the audio: teacher forcing, for ranking and for judging transcripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np

from whisper_nnx.alignment.pieces import batches
from whisper_nnx.audio.features import RecordingMel
from whisper_nnx.audio.loading import FRAMES_PER_SECOND, load_audio
from whisper_nnx.model.cache import KeysValues
from whisper_nnx.model.sharding import mesh_of
from whisper_nnx.model.whisper import TextDecoder, Whisper
from whisper_nnx.runtime.devices import fetch, rounded_up
from whisper_nnx.runtime.programs import program
from whisper_nnx.text.languages import language_or_none
from whisper_nnx.timing.token_times import padded_ids
from whisper_nnx.transcription.windows import (
    EncodedWindows,
    detect_languages,
    encode_windows,
    most_probable,
    tokenizer_of,
)

Text = str | Sequence[int]


@dataclass(frozen=True)
class TextScore:
    """The log-likelihood (natural logarithm) of each token of a text, and that it ends there.

    Nothing is filtered: the probabilities are those among the whole vocabulary.
    """

    tokens: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    end_logprob: float

    @property
    def logprob(self) -> float:
        """Of the whole text, its end included: by this, texts are ranked."""
        return sum(self.token_logprobs) + self.end_logprob

    @property
    def avg_logprob(self) -> float:
        """For each token and the end, as DecodingResult.avg_logprob: by this, transcripts of any length are judged."""
        return self.logprob / (len(self.tokens) + 1)


@program(rows=("cross", "ids", "wanted"))
def following_logprobs(
    decoder: TextDecoder, cross: tuple[KeysValues, ...], ids: jax.Array, wanted: jax.Array
) -> jax.Array:
    """ids [B,S], wanted [B,W] -> [B,S,W]: log-probability that the id wanted[w] follows the first s + 1 ids."""
    logits = decoder.logits(decoder.hidden_states(ids, cross).last)
    at = jnp.broadcast_to(wanted[:, None], (*ids.shape, wanted.shape[1]))
    return jnp.take_along_axis(logits, at, axis=-1) - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


@overload
def score(
    model: Whisper,
    audio: list[Any] | tuple[Any, ...],
    texts: Sequence[Sequence[Text]],
    *,
    language: str | None = ...,
    task: str = ...,
    batch_size: int = ...,
    sampling_rate: int | None = ...,
) -> list[list[TextScore]]: ...
@overload
def score(
    model: Whisper,
    audio: Any,
    texts: Sequence[Text],
    *,
    language: str | None = ...,
    task: str = ...,
    batch_size: int = ...,
    sampling_rate: int | None = ...,
) -> list[TextScore]: ...
def score(
    model: Whisper,
    audio: Any,
    texts: Sequence[Any],
    *,
    language: str | None = None,
    task: str = "transcribe",
    batch_size: int = 8,
    sampling_rate: int | None = None,
) -> list[TextScore] | list[list[TextScore]]:
    """The log-likelihood of each of several texts, given a recording, without timestamps.

    Each recording is encoded once. All texts padded to the same length share one compiled program.

    Args:
      model: a model with a tokenizer.
      audio: anything that `load_audio` takes, of at most 30 s; or a list of recordings.
      texts: texts or token ids; for a list of recordings, a list of texts for each.
      language: a code or name; None detects it for each recording.
      task: "transcribe" or "translate".
      batch_size: texts to score together.
      sampling_rate: of an array, in Hz.

    Raises:
      ValueError: a longer recording; a text that is empty or exceeds the context; an unknown language or task; or (as
        AudioError) unreadable audio.
      OSError: a file that cannot be opened.
    """
    many = isinstance(audio, list | tuple)
    recordings, given = (audio, texts) if many else ([audio], [texts])
    if len(recordings) != len(given):
        raise ValueError(f"{len(recordings)} recordings, but {len(given)} lists of texts; give one list for each")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    tokens = [[_ids(model, text) for text in row] for row in given]
    pairs = [(recording, i) for recording, row in enumerate(tokens) for i in range(len(row))]
    size = min(batch_size, 1 << max(0, len(pairs) - 1).bit_length())  # few different ones, as each is compiled
    size = rounded_up(size, mesh_of(model))
    windows: dict[int, _Window] = {}
    scores: list[TextScore] = []
    for chunk, rows in batches(pairs, size):
        for number in {recording for recording, _ in chunk} - windows.keys():
            samples = load_audio(recordings[number], sampling_rate)
            windows[number] = _open(model, samples, language, task)
        windows = {number: windows[number] for number, _ in chunk}  # the others are done, or have not begun
        scores += _score(model, [(windows[number], tokens[number][i]) for number, i in rows])[: len(chunk)]
    rest = iter(scores)
    results = [[next(rest) for _ in row] for row in given]
    return results if many else results[0]


@dataclass(frozen=True)
class _Window:
    encoded: EncodedWindows
    start: tuple[int, ...]  # the ids that a text follows


def _ids(model: Whisper, text: Text) -> tuple[int, ...]:
    tokenizer = tokenizer_of(model)
    ids = tokenizer.encode(" " + text.strip() if text.strip() else "") if isinstance(text, str) else list(text)
    if not ids:
        raise ValueError(f"text {text!r} is empty; give at least one word")
    if bad := [i for i in ids if not 0 <= i < tokenizer.vocab_size]:
        raise ValueError(f"token {bad[0]} of a text is outside the vocabulary of {tokenizer.vocab_size}")
    return tuple(ids)


def _open(model: Whisper, samples: np.ndarray, language: str | None, task: str) -> _Window:
    tokenizer, frames = tokenizer_of(model), 2 * model.config.max_source_positions
    mel = RecordingMel(samples, model.config.num_mel_bins, frames)
    if mel.content_frames > frames:
        duration_s, most_s = mel.content_frames / FRAMES_PER_SECOND, frames / FRAMES_PER_SECOND
        raise ValueError(f"a recording of {duration_s:.2f} s is longer than a window of {most_s:g} s; cut it")
    encoded = encode_windows(model, mel.window(0, frames)[None])
    language = language_or_none(language)
    if language is None and tokenizer.is_multilingual:
        language = most_probable(detect_languages(model, encoded)[0])
    return _Window(encoded, tokenizer.sot_sequence(language, task, timestamps=False))


def _score(model: Whisper, rows: Sequence[tuple[_Window, tuple[int, ...]]]) -> list[TextScore]:
    """Of all rows at once."""
    eot = tokenizer_of(model).special.eot
    ids, _ = padded_ids([[*window.start, *text, eot] for window, text in rows], model.config, eot)
    cross = jax.tree.map(lambda *x: jnp.concatenate(x), *(window.encoded.cross for window, _ in rows))
    following = fetch(following_logprobs(model.decoder, cross, ids, ids))
    scores = []
    for (window, text), table in zip(rows, following, strict=True):
        first = len(window.start)
        *logprobs, end = np.diagonal(table, offset=1)[first - 1 : first + len(text)].tolist()
        scores.append(TextScore(text, tuple(logprobs), end))
    return scores


@overload
def classify(
    model: Whisper,
    audio: list[Any] | tuple[Any, ...],
    phrases: Sequence[str],
    *,
    language: str | None = ...,
    task: str = ...,
    batch_size: int = ...,
    sampling_rate: int | None = ...,
) -> list[dict[str, float]]: ...
@overload
def classify(
    model: Whisper,
    audio: Any,
    phrases: Sequence[str],
    *,
    language: str | None = ...,
    task: str = ...,
    batch_size: int = ...,
    sampling_rate: int | None = ...,
) -> dict[str, float]: ...
def classify(
    model: Whisper,
    audio: Any,
    phrases: Sequence[str],
    *,
    language: str | None = None,
    task: str = "transcribe",
    batch_size: int = 16,
    sampling_rate: int | None = None,
) -> dict[str, float] | list[dict[str, float]]:
    """The probability of each phrase of a list, given that a recording is one of them (whisper.cpp's guided commands).

    A recording is encoded once, and its phrases are scored together. Their likelihoods are divided by their sum.

    Args:
      model: a model with a tokenizer.
      audio: anything that `load_audio` takes, of at most 30 s; or a list of recordings.
      phrases: as Whisper would write them, with their capitals and punctuation.
      language: a code or name; None detects it for each recording.
      task: "transcribe" or "translate".
      batch_size: phrases to score together.
      sampling_rate: of an array, in Hz.

    Returns:
      {phrase: probability} in the order of the phrases; for a list of recordings, a list of them.

    Raises:
      ValueError: phrases that are none or occur twice; and what `score` refuses.
      OSError: a file that cannot be opened.
    """
    if isinstance(phrases, str) or not phrases or len({str(p).strip() for p in phrases}) < len(phrases):
        raise ValueError(f"phrases={phrases!r} must be a list of different texts, at least one; correct it")
    recordings = audio if isinstance(audio, list | tuple) else [audio]
    texts = [list(phrases)] * len(recordings)
    about: dict[str, Any] = {"language": language, "task": task}
    about |= {"batch_size": batch_size, "sampling_rate": sampling_rate}
    results = []
    for scores in score(model, list(recordings), texts, **about):
        logprobs = np.array([one.logprob for one in scores])
        likelihood = np.exp(logprobs - logprobs.max())
        results.append(dict(zip(phrases, (likelihood / likelihood.sum()).tolist(), strict=True)))
    return results if isinstance(audio, list | tuple) else results[0]

"""Recordings that share a batch: who is decoded when, and that company changes nothing."""

import string
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.small import quick_compilation, small_mel, small_model  # noqa: F401
from tests.transcription.scripted import scripted
from whisper_nnx import load_audio, load_model, ops, transcribe
from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.model.cache import KeysValues
from whisper_nnx.transcription.attempts import DecodingResult
from whisper_nnx.transcription.batch import Batch
from whisper_nnx.transcription.fallback import FallbackOptions
from whisper_nnx.transcription.longform import LongformOptions
from whisper_nnx.transcription.queue import RoundRobin
from whisper_nnx.transcription.recording import Recording
from whisper_nnx.transcription.row_decoder import RowDecoder
from whisper_nnx.transcription.rows import Live
from whisper_nnx.transcription.windows import EncodedWindows

LADDER = FallbackOptions(temperatures=(0.0, 0.4, 0.8))


class Decoder:
    """Stands in for the decoding of windows: that of recording n passes at its `passes[n]`-th try."""

    def __init__(self, model, passes: list[int], windows: int, silent: bool = False):
        self.model, self.passes = model, passes
        self.rows_in_memory: int | None = None
        self.encoded: list[int] = []  # numbers of the recordings whose windows were encoded, in order
        self.calls: list[list[tuple[int, int, float, int] | None]] = []  # recording, window, temperature, seed
        frames = small_mel().shape[-1]
        self.lives = [
            Live(
                Recording(
                    model.tokenizer,
                    "de",
                    windows * frames,
                    LongformOptions(initial_prompt="one " * n),
                    window_frames=frames,
                ),
                SimpleNamespace(
                    window=lambda start, n, i=n: jnp.array([i, start], jnp.float32),
                    fingerprint=lambda start, n, i=n: 0 if silent else i,
                ),
                DecodingOptions(language="de"),
                fallback=LADDER,
                seed=7,
                number=n - 1,
            )
            for n in range(1, len(passes) + 1)
        ]
        self.tries: dict[tuple[int, int], int] = {}

    def encode(self, model, mel):
        self.encoded.append(int(mel[0, 0]) - 1)
        return EncodedWindows(mel, (KeysValues(mel, mel),))

    def decode(self, model, encoded, options, seeds, meanwhile=None):
        if self.rows_in_memory is not None and len(options) > self.rows_in_memory:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes.")
        rows, results = [], []
        for o, seed, row in zip(options, seeds, self.batch._rows, strict=True):
            if o is None:
                rows.append(None)
                results.append(None)
                continue
            n = row.live.number
            key = (n, row.window.start_frame)
            assert encoded.cross[0].k[len(rows), 1] == row.window.start_frame  # each window lies in its own row
            self.tries[key] = self.tries.get(key, 0) + 1
            logprob = -0.5 if self.tries[key] >= self.passes[n] else -2.0
            rows.append((n, row.window.start_frame, o.temperature, seed))
            results.append(DecodingResult(None, "de", avg_logprob=logprob, temperature=o.temperature, tokens=(1, 2)))
        self.calls.append(rows)
        if meanwhile is not None:
            meanwhile()
        return results

    def make_batch(self, size: int, **options) -> Batch:
        self.batch = Batch(self.model, size, encode=self.encode, make_decoder=scripted(self.decode), **options)
        return self.batch

    def run(self, size: int) -> list[int]:
        """Runs all recordings -> their numbers, in the order in which they were done."""
        self.make_batch(size)
        done = []
        for live, segments in self.batch.run(iter(self.lives)):
            if isinstance(segments, Exception):
                raise segments
            done += [live.number] if segments is None else []
        return done

    def segments(self) -> list:
        return [live.recording.segments for live in self.lives]


@pytest.fixture(scope="module")
def model():
    return small_model()


def test_only_rows_that_failed_are_tried_again_beside_the_first_tries_of_others(model):
    decoder = Decoder(model, [1, 3, 1], 2)
    assert sorted(decoder.run(size=2)) == [0, 1, 2]
    tried = [(n, start, temperature) for call in decoder.calls for n, start, temperature, _ in filter(None, call)]
    assert len(tried) == len(set(tried)) == 2 + 2 * 3 + 2
    first_row = [call[0] and (call[0][0], call[0][2]) for call in decoder.calls]
    second_row = [call[1] and (call[1][0], call[1][2]) for call in decoder.calls]
    assert second_row[:3] == [(1, 0.0), (1, 0.4), (1, 0.8)]
    assert {temperature for _, temperature in filter(None, first_row[:3])} == {0.0}


def test_the_last_try_stands_even_if_it_fails(model):
    decoder = Decoder(model, [9], 1)
    decoder.run(size=1)
    assert [call[0][2] for call in decoder.calls] == [0.0, 0.4, 0.8]
    assert decoder.lives[0].recording.segments[0]["temperature"] == 0.8


def test_seeds_differ_from_try_to_try_and_not_by_company(model):
    crowded = Decoder(model, [3, 2, 3], 2)
    crowded.run(size=3)
    alone = Decoder(model, [3], 2)
    alone.run(size=1)
    seeds = [call[0][3] for call in alone.calls]
    assert len(set(seeds)) == len(seeds) == 6
    assert seeds == [row[3] for call in crowded.calls for row in filter(None, call) if row[0] == 0]


@pytest.mark.parametrize("silent", [False, True])
def test_seeds_differ_between_recordings_unless_their_audio_is_the_same(model, silent):
    decoder = Decoder(model, [3, 3], 2, silent)
    decoder.run(size=2)
    sampled = [call for call in decoder.calls if call[0][2] > 0]
    assert len(sampled) == 4
    assert {a[3] == b[3] for a, b in sampled} == {silent}


def test_samples_of_unrelated_recordings_are_independent():
    """At a temperature at which all letters are equally probable, 260 recordings begin with each of them about as often
    (chi-squared with 25 degrees of freedom: above 60 once in 10,000 seeds); one shared noise would give 6,500."""
    model = small_model()
    letters = [model.tokenizer.encode(letter)[0] for letter in string.ascii_lowercase]
    others = tuple(set(range(model.config.vocab_size)) - set(letters))
    sounds = np.random.default_rng(5).normal(0, 0.1, (260, 1600)).astype(np.float32)
    never_silent = {"no_speech_threshold": None, "logprob_threshold": None, "compression_ratio_threshold": None}
    options = {"language": "en", "without_timestamps": True, "max_new_tokens": 1, "suppress_tokens": others}

    def texts(seed):
        results = transcribe(model, list(sounds), batch_size=20, temperature=1e6, seed=seed, **options, **never_silent)
        return [result["text"] for result in results]

    first = texts(0)
    counts = [first.count(letter) for letter in string.ascii_lowercase]
    assert sum(counts) == len(sounds)
    assert sum((count - 10) ** 2 / 10 for count in counts) < 60
    same = sum(a == b for a, b in zip(first, texts(1), strict=True))
    assert same < 26  # 10 are expected


def test_a_free_row_goes_to_the_next_recording_at_the_next_step(model):
    decoder = Decoder(model, [1, 1, 1, 1], 1)
    assert decoder.run(size=2) == [0, 1, 2, 3]
    assert [[row and row[0] for row in call] for call in decoder.calls] == [[0, 1], [2, 3]]


def test_first_windows_of_the_next_recordings_are_encoded_while_others_decode(model):
    decoder = Decoder(model, [1] * 7, 2)
    seen_at_call: list[list[int]] = []
    decode = decoder.decode
    decoder.decode = lambda *a, **k: (seen_at_call.append(list(decoder.encoded)), decode(*a, **k))[1]
    assert decoder.run(size=2) == [0, 1, 2, 3, 4, 5, 6]
    assert seen_at_call[0] == [0, 1]
    assert seen_at_call[1] == [0, 1, 2, 3, 0, 1]  # 2 and 3 are ready; 0 and 1, in progress, come first
    assert sorted(decoder.encoded) == sorted([*range(7)] * 2)


def test_a_finished_recording_comes_before_the_next_is_decoded(model):
    decoder = Decoder(model, [1, 1, 1], 1)
    events = decoder.make_batch(1).run(iter(decoder.lives))
    calls = [len(decoder.calls) for _, segments in events if segments is None]
    assert calls == [1, 2, 3]


@pytest.mark.parametrize("fits", [1, 3])
def test_without_enough_memory_half_the_rows_do_the_same_work(model, fits):
    roomy = Decoder(model, [1, 3, 2, 1, 1], 2)
    roomy.run(size=8)
    tight = Decoder(model, [1, 3, 2, 1, 1], 2)
    tight.rows_in_memory = fits
    with pytest.warns(UserWarning, match="out of memory") as warned:
        assert sorted(tight.run(size=8)) == [0, 1, 2, 3, 4]
    assert str(warned[0].message) == "out of memory with batch_size=8: going on with 4"
    assert {len(call) for call in tight.calls} == {1 if fits == 1 else 2}
    assert tight.segments() == roomy.segments()


def test_all_rows_are_used_again_after_all_is_done(model):
    decoder = Decoder(model, [1] * 5, 1)
    batch = decoder.make_batch(size=4)
    decoder.rows_in_memory = 2
    with pytest.warns(UserWarning, match="out of memory"):
        list(batch.run(iter(decoder.lives[:4])))
    decoder.rows_in_memory = None
    list(batch.run(iter(decoder.lives[4:])))
    assert [len(call) for call in decoder.calls] == [2, 2, 4]


def test_one_row_that_does_not_fit_is_an_error(model):
    decoder = Decoder(model, [1], 1)
    decoder.rows_in_memory = 0
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        decoder.run(size=1)


def test_an_error_that_is_not_of_memory_is_raised(model):
    decoder = Decoder(model, [1, 1], 1)

    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: a defect")

    decoder.decode = fail
    with pytest.raises(jax.errors.JaxRuntimeError, match="a defect"):
        decoder.run(size=2)


def test_a_recording_without_audio_is_done_at_once(model):
    decoder = Decoder(model, [1, 1], 0)
    assert decoder.run(size=2) == [0, 1]
    assert decoder.calls == []


# Driven from outside.


def step_all(batch: Batch) -> list[int]:
    """Steps while there is something to do -> the numbers of the recordings, in the order in which they were done."""
    done = []
    while batch.busy:
        for live, segments in batch.step():
            assert not isinstance(segments, Exception)
            done += [live.number] if segments is None else []
    return done


@pytest.mark.parametrize("size", [1, 2, 4])
def test_recordings_submitted_while_others_are_in_progress_equal_those_of_run(model, size):
    passes = [1, 3, 2, 1, 2]
    alone = Decoder(model, passes, 2)
    alone.run(size=1)
    driven = Decoder(model, passes, 2)
    batch = driven.make_batch(size)
    assert not batch.busy
    assert batch.step() == []
    done = []
    for live in driven.lives:  # one more before each step
        batch.submit(live)
        done += [live.number for live, segments in batch.step() if segments is None]
    assert sorted(done + step_all(batch)) == [0, 1, 2, 3, 4]
    assert driven.segments() == alone.segments()
    assert not batch.busy


@pytest.mark.parametrize("by_number", [True, False])
def test_a_cancelled_recording_is_decoded_no_further_and_the_others_are_not_affected(model, by_number):
    alone = Decoder(model, [1, 9, 2, 1], 3)
    alone.run(size=1)
    driven = Decoder(model, [1, 9, 2, 1], 3)
    batch = driven.make_batch(2)
    for live in driven.lives:
        batch.submit(live)
    batch.step()  # 0 and 1 are in the rows, 2 and 3 are prepared
    for cancelled in (1, 3):
        batch.cancel(cancelled if by_number else driven.lives[cancelled])
    calls = len(driven.calls)
    assert sorted(step_all(batch)) == [0, 2]
    assert {row[0] for call in driven.calls[calls:] for row in call if row} == {0, 2}
    assert [driven.segments()[n] for n in (0, 2)] == [alone.segments()[n] for n in (0, 2)]


def test_a_number_that_was_cancelled_may_be_submitted_again(model):
    driven = Decoder(model, [1, 1], 1)
    batch = driven.make_batch(1)
    batch.submit(driven.lives[0])
    batch.cancel(0)
    assert not batch.busy
    batch.submit(driven.lives[0])
    assert step_all(batch) == [0]


def test_cancelling_in_run_ends_all_pieces_also_those_that_the_iterator_has_not_given_yet(model):
    decoder = Decoder(model, [1, 1, 1, 1], 2)
    for live, number in zip(decoder.lives, (0, 1, 0, 1), strict=True):  # two recordings of two pieces
        live.number = number
    batch, done = decoder.make_batch(1), []
    for live, segments in batch.run(iter(decoder.lives)):
        if live.number == 0:
            batch.cancel(live)
        done += [live] if segments is None else []
    assert done == [decoder.lives[1], decoder.lives[3]]
    assert not decoder.segments()[2]


def test_what_is_submitted_during_run_is_stepped_too(model):
    decoder = Decoder(model, [1, 1, 1], 1)
    batch, done = decoder.make_batch(2), []
    for live, segments in batch.run(iter(decoder.lives[:1])):
        if segments is None:
            done.append(live.number)
        elif live.number == 0:
            batch.submit(decoder.lives[1])
            batch.submit(decoder.lives[2])
    assert sorted(done) == [0, 1, 2]


def test_each_step_takes_as_few_rows_as_suffice_and_keeps_the_windows_that_are_tried_again(model):
    passes = [3, 1, 2, 1, 3, 1]
    alone = Decoder(model, passes, 2)
    alone.run(size=1)
    driven = Decoder(model, passes, 2)
    batch = driven.make_batch(4, sizes=(1, 2, 4), queue=RoundRobin(), ahead=0)
    for arrivals in (driven.lives[:1], driven.lives[1:2], driven.lives[2:]):
        for live in arrivals:
            batch.submit(live)
        batch.step()
    step_all(batch)
    assert driven.segments() == alone.segments()
    assert sum(batch.retries.values()) == 2 * sum(n - 1 for n in passes)
    used = [len([row for row in call if row]) for call in driven.calls]
    assert [len(call) for call in driven.calls] == [next(size for size in (1, 2, 4) if size >= n) for n in used]
    assert {len(call) for call in driven.calls} == {1, 2, 4}  # the decoder above checks what is in each row


@pytest.mark.parametrize("size", [1, 2])
def test_a_recording_of_many_pieces_delays_no_other(model, size):
    decoder = Decoder(model, [1] * 8, 1)
    *pieces, late, later = decoder.lives
    for piece in pieces:
        piece.number = 0
    queue = RoundRobin()
    batch = decoder.make_batch(size, queue=queue, ahead=0)
    opened = []
    queue.add(0, lambda: opened.append(0) or pieces)
    orders = []
    for arrival in (None, late, None, later, None, None):
        if arrival is not None:
            queue.add(arrival.number, lambda arrival=arrival: opened.append(arrival.number) or [arrival])
        queue.start_round()
        batch.step()
        orders.append([row[0] for row in decoder.calls[-1] if row])
    assert opened == [0, late.number, later.number]
    assert orders[1][0] == late.number
    assert orders[3][0] == later.number
    assert all(order == [0] * size for order in (orders[0], orders[2]))


def test_recordings_take_turns_where_there_are_more_than_rows(model):
    decoder = Decoder(model, [1] * 3, 3)
    queue = RoundRobin()
    batch = decoder.make_batch(1, queue=queue, ahead=0)
    for live in decoder.lives:
        batch.submit(live)
    while batch.busy:
        queue.start_round()
        batch.step()
    assert [call[0][0] for call in decoder.calls] == [0, 1, 2] * 3


def test_a_discarded_recording_is_not_opened(model):
    queue = RoundRobin()
    queue.add(5, lambda: pytest.fail("it was opened"))
    assert len(queue) == 1
    queue.discard(5)
    assert not len(queue)
    assert queue.get(started=False) is None


@pytest.fixture(scope="module")
def digits_model(digits):
    return load_model(str(digits))


@pytest.mark.filterwarnings("ignore:.*digital silence")
@pytest.mark.slow
def test_beams_find_the_same_transcript_in_any_company(digits_model, shared):
    """Mixed languages and lengths; one of the files is not there. For the rest see test_batches."""
    size, options = 2, {"beam_size": 3, "temperature": 0.0}
    short, german, silence, missing = (
        shared / "audio" / f"{name}.flac" for name in ("en_short_3s", "de_40s", "silence_12s", "missing")
    )
    sources = [short, load_audio(german)[: 12 * 16_000], missing, silence]
    together = transcribe(digits_model, sources, batch_size=size, **options)
    assert isinstance(together.pop(2), FileNotFoundError)
    del sources[2]
    assert [result["language"] for result in together][:2] == ["en", "de"]
    for source, result in zip(sources, together, strict=True):
        alone = transcribe(digits_model, source, **options)
        assert result["text"] == alone["text"]
        assert result["language"] == alone["language"]
        assert len(result["segments"]) == len(alone["segments"])
        for segment, other in zip(result["segments"], alone["segments"], strict=True):
            assert segment["tokens"] == other["tokens"]
            assert segment["temperature"] == other["temperature"]
            assert times(segment) == times(other)
            np.testing.assert_allclose(segment["avg_logprob"], other["avg_logprob"], atol=1e-4)


def times(segment) -> list[tuple[str, float, float]]:
    return [(word["word"], word["start"], word["end"]) for word in segment.get("words", [])]


def test_progress_of_a_list_grows_to_the_sum_of_all_recordings(digits_model, shared):
    audio = load_audio(shared / "audio" / "en_short_3s.flac")
    calls: list[tuple[float, float]] = []
    pieces = [audio[: 16_000 + 160 * n] for n in range(6)]
    transcribe(digits_model, pieces, language="en", temperature=0.0, progress=lambda *at: calls.append(at))
    assert calls == sorted(calls)
    assert calls[-1] == (6.15, 6.15)


def test_options_that_cannot_be_met_are_no_result_of_a_list(digits_model):
    with pytest.raises(ValueError, match="clip_timestamps='x'"):
        transcribe(digits_model, ["a.wav", "b.wav"], clip_timestamps="x")


def test_a_batch_of_no_rows_is_refused(digits_model):
    with pytest.raises(ValueError, match="batch_size=0"):
        transcribe(digits_model, [], batch_size=0)
    with pytest.raises(ValueError, match="progress=False must be a function"):
        transcribe(digits_model, [], progress=False)


@pytest.mark.slow
@pytest.mark.real
def test_hard_recordings_do_not_begin_with_the_same_invented_words(real_tiny_en, shared):
    model, random = load_model(str(real_tiny_en)), np.random.default_rng(0)
    files = sorted((shared / "real" / "audio").iterdir())[:8]
    clips = [load_audio(file)[16_000:80_000] * 0.05 for file in files]
    hard = [clip + random.normal(0, 0.03, len(clip)).astype(np.float32) for clip in clips]
    ladder = {"temperature": (0.0, 1.0), "logprob_threshold": 0.0, "no_speech_threshold": None}
    together = transcribe(model, hard, batch_size=8, **ladder)
    assert len({result["text"].split()[0] for result in together}) >= 5
    assert transcribe(model, hard[3], **ladder)["text"] == together[3]["text"]


@pytest.mark.filterwarnings("ignore:out of memory")
@pytest.mark.parametrize("message", ["RESOURCE_EXHAUSTED: out of memory", "INTERNAL: once"])
@pytest.mark.parametrize("where", ["open", "encode", "put", "decode"])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_what_fails_once_loses_and_doubles_no_window(model, monkeypatch, where, message, call):
    """In groups of windows, as accelerators take them."""
    passes = [1, 3, 1, 2, 1, 1]
    alone, driven = Decoder(model, passes, 2), Decoder(model, passes, 2)
    alone.run(size=1)
    calls = 0

    def once(work):
        def attempt(*args, **options):
            nonlocal calls
            calls += 1
            if calls == call:
                raise jax.errors.JaxRuntimeError(message)
            return work(*args, **options)

        return attempt

    class Source:
        def __init__(self, lives):
            self.lives, self.next = lives, 0
            self.take = once(self.take) if where == "open" and message.startswith("RES") else self.take

        def __iter__(self):
            return self

        def __next__(self):
            if self.next == len(self.lives):
                raise StopIteration
            return self.take()

        def take(self):
            self.next += 1
            return self.lives[self.next - 1]

    def encode(_, mel):
        driven.encoded += [int(window[0]) - 1 for window in mel]
        return EncodedWindows(mel, (KeysValues(mel, mel),))

    monkeypatch.setattr(driven, "encode", once(encode) if where == "encode" else encode)
    if where == "decode":
        monkeypatch.setattr(driven, "decode", once(driven.decode))
    if where == "put":
        monkeypatch.setattr(RowDecoder, "put", once(RowDecoder.put))
    with ops.using("accelerator"):
        batch, done, failed = driven.make_batch(4), [], []
        for live, segments in batch.run(Source(driven.lives)):
            failed += [live.number] if isinstance(segments, Exception) else []
            done += [live.number] if segments is None else []
    assert sorted(done + failed) == [*range(len(passes))]
    assert len(failed) <= (where == "encode" and message.startswith("INTERNAL"))  # it was alone in its group
    # The script counts the tries of windows that begin again, too, so temperatures differ.
    seeks = [[[segment["seek"] for segment in one] for one in decoder.segments()] for decoder in (driven, alone)]
    assert [seeks[0][n] for n in done] == [seeks[1][n] for n in done]

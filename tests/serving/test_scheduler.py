"""The scheduler: requests that share a model, and that company changes nothing."""

import asyncio
import io
import threading

import numpy as np
import pytest

from tests.output.test_progress import write_wav
from tests.small import quick_compilation as quick_compilation
from tests.small import small_model
from whisper_nnx import transcribe, warmup
from whisper_nnx.audio.loading import AudioError
from whisper_nnx.serving.models import ModelSlot, programs_of
from whisper_nnx.serving.scheduler import Busy, Scheduler, Unavailable, UnknownModel
from whisper_nnx.serving.spool import Spool
from whisper_nnx.serving.uploads import Upload
from whisper_nnx.transcription.drafts import with_draft
from whisper_nnx.transcription.options import NGRAM, TranscribeOptions

GREEDY = TranscribeOptions.of(language="en", temperature=0.0, logprob_threshold=None, no_speech_threshold=None)
OPTIONS = [GREEDY, TranscribeOptions.of(GREEDY, beam_size=2), TranscribeOptions.of(GREEDY, word_timestamps=True)]


@pytest.fixture(scope="module")
def model():
    return small_model()


def noise(seed: int, seconds: float) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * 16000)).astype(np.float32)


def run(model, work, **options):
    """`work(scheduler)` in an event loop, and the scheduler's end."""

    async def main():
        scheduler = Scheduler.of({"small": model}, **{"sizes": (1, 2), **options})
        try:
            return await work(scheduler)
        finally:
            await scheduler.close(grace_s=0)

    return asyncio.run(main())


def tokens(transcript) -> list:
    return [segment["tokens"] for segment in transcript["segments"]]


def test_requests_together_equal_each_alone(model):
    recordings = [noise(seed, seconds) for seed, seconds in enumerate([0.6, 3.5, 1.2, 2.4, 0.3, 5.0])]
    chosen = [OPTIONS[i % 3] for i in range(len(recordings))]

    async def work(scheduler):
        async def ask(audio, options):
            async with scheduler.submit("small", audio, options) as job:
                parts = [segment async for segments in job for segment in segments]
                return job.transcript, parts

        return await asyncio.gather(*map(ask, recordings, chosen))

    for audio, options, (together, parts) in zip(recordings, chosen, run(model, work), strict=True):
        alone = transcribe(model, audio, options)
        assert together["text"] == alone["text"]
        assert tokens(together) == tokens(alone)
        assert parts == together["segments"]
        assert [s.get("words") and [w["word"] for w in s["words"]] for s in together["segments"]] == [
            s.get("words") and [w["word"] for w in s["words"]] for s in alone["segments"]
        ]


def test_a_draft_changes_no_result(model):
    recordings = [noise(seed, seconds) for seed, seconds in enumerate([0.6, 1.5, 2.4])]

    async def work(scheduler):
        jobs = [scheduler.submit("small", audio, GREEDY) for audio in recordings]
        return await asyncio.gather(*(job.result() for job in jobs))

    drafted = with_draft(model, NGRAM)
    assert ModelSlot("small", lambda: drafted, (1,), model=drafted).memory_bytes > 0
    for audio, result in zip(recordings, run(drafted, work), strict=True):
        assert tokens(result) == tokens(transcribe(model, audio, GREEDY))


def test_the_same_window_is_encoded_once(model):
    async def work(scheduler):
        for options in OPTIONS:
            await scheduler.submit("small", noise(0, 0.5), options).result()
        return scheduler.stats

    assert run(model, work).cache_hits == 2


def test_what_a_model_has_counted_outlives_its_release(model):
    slot = ModelSlot("small", lambda: model, (1,))
    for _ in range(2):
        slot.insert(model)
        slot.encode.hits, slot.batch.retries["logprob"] = 3, slot.batch.retries["logprob"] + 1
        slot.release()
    assert (slot.cache_hits, slot.retries) == (6, {"logprob": 2})


def test_what_a_request_raises_is_its_own(model, tmp_path):
    async def work(scheduler):
        bad = scheduler.submit("small", tmp_path / "missing.wav", GREEDY)
        unknown_language = scheduler.submit("small", noise(1, 0.5), TranscribeOptions.of(language="uk"))
        good = scheduler.submit("small", noise(0, 0.5), GREEDY)
        with pytest.raises(FileNotFoundError):
            await bad.result()
        with pytest.raises(ValueError, match="uk"):
            await unknown_language.result()
        return await good.result()

    assert tokens(run(model, work)) == tokens(transcribe(model, noise(0, 0.5), GREEDY))


def test_processes_decode_uploads_and_one_that_dies_is_replaced(model, tmp_path):
    whole, cut = write_wav(tmp_path / "whole.wav", 0.5).read_bytes(), write_wav(tmp_path / "cut.wav", 2.0).read_bytes()

    async def work(scheduler):
        results, [process] = [], scheduler._readers.processes
        for data in (whole, cut[:30_000], whole):
            upload = Upload(io.BytesIO(data), "an upload.wav")
            async with scheduler.submit("small", upload, GREEDY) as job:
                results.append((tokens(await job.result()), job.warnings))
            process._process.kill()
        broken = scheduler.submit("small", Upload(io.BytesIO(b"no audio"), "text.wav"), GREEDY)
        with pytest.raises(AudioError, match=r"text.wav cannot be read as audio"):
            await broken.result()
        return results, process

    (first, damaged, last), process = run(model, work, readers=1)
    alone = tokens(transcribe(model, tmp_path / "whole.wav", GREEDY))
    assert (first, last) == ((alone, []), (alone, []))
    assert [warning.split(" (")[0] for warning in damaged[1]] == ["an upload.wav is damaged"]
    assert process._process is None


def test_a_request_whose_context_is_left_is_cancelled(model):
    async def work(scheduler):
        async with scheduler.submit("small", noise(0, 60), GREEDY) as job:
            async for _ in job:
                break
        while scheduler.stats.requests:
            await asyncio.sleep(0.01)
        return scheduler.stats.steps

    assert run(model, work) < 10  # of 60


def test_a_queue_that_is_full_and_an_unknown_model_are_refused(model):
    async def work(scheduler):
        first = scheduler.submit("small", noise(0, 5), GREEDY)
        with pytest.raises(Busy) as refused:
            scheduler.submit("small", noise(1, 1), GREEDY)
        assert refused.value.retry_after_s >= 1
        with pytest.raises(UnknownModel, match=r"'large'.*small"):
            scheduler.submit("large", noise(1, 1), GREEDY)
        await first.result()
        await scheduler.submit("small", noise(1, 1), GREEDY).result()

    run(model, work, max_requests=1)


def test_closing_finishes_what_was_taken_and_refuses_the_rest(model):
    async def work(scheduler):
        job = scheduler.submit("small", noise(0, 3), GREEDY)
        closing = asyncio.create_task(scheduler.close(grace_s=60))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="stopping"):
            scheduler.submit("small", noise(1, 1), GREEDY)
        await closing
        return await job.result()

    assert tokens(run(model, work)) == tokens(transcribe(model, noise(0, 3), GREEDY))


def test_closing_without_grace_fails_what_is_not_done(model):
    async def work(scheduler):
        job = scheduler.submit("small", noise(0, 60), GREEDY)
        await scheduler.close(grace_s=0)
        with pytest.raises(Unavailable, match="stopped"):
            await job.result()
        assert not scheduler.alive

    run(model, work)


def test_models_are_loaded_on_first_use_once_and_idle_ones_make_room(model):
    loaded, ready = [], threading.Event()

    def loader(name):
        def load():
            ready.wait()
            loaded.append(name)
            return model

        return load

    async def main():
        slots = [ModelSlot(name, loader(name), (1, 2)) for name in ("a", "b")]
        scheduler = Scheduler(slots, memory_bytes=1)
        with pytest.raises(Unavailable, match="starting"):
            scheduler.submit("a", noise(0, 0.5), GREEDY)
        scheduler.ready = True
        jobs = [scheduler.submit("a", noise(0, 0.5), GREEDY) for _ in range(2)]
        await asyncio.sleep(0.05)
        assert not scheduler.stats.models
        ready.set()
        for job in jobs:
            await job.result()
        assert scheduler.stats.models == ("a",)
        await scheduler.submit("b", noise(0, 0.5), GREEDY).result()
        assert scheduler.stats.models == ("b",)
        both = [scheduler.submit(name, noise(0, 0.5), GREEDY) for name in ("b", "a", "b", "a")]
        for job in both:
            await job.result()
        assert len(scheduler.stats.models) == 1  # whichever was last in use
        await scheduler.close()

    asyncio.run(main())
    assert loaded == ["a", "b", "a"]


def test_a_model_that_cannot_be_loaded_fails_its_requests_and_is_tried_again():
    def load():
        raise ValueError("no such folder")

    async def main():
        scheduler = Scheduler([ModelSlot("gone", load, (1,))])
        with pytest.raises(ValueError, match="no such folder"):
            await scheduler.load("gone")
        scheduler.ready = True
        for _ in range(2):
            with pytest.raises(Unavailable, match="'gone' cannot be loaded: no such folder"):
                await scheduler.submit("gone", noise(0, 0.5), GREEDY).result()
        await scheduler.close()

    asyncio.run(main())


def test_nothing_is_compiled_for_a_new_mix_of_lengths_and_rows(model, compilations):
    warmup(model, (1, 2, 4), GREEDY)

    async def work(scheduler):
        async def ask(seed, seconds):
            return await scheduler.submit("small", noise(seed, seconds), GREEDY).result()

        await asyncio.gather(*(ask(seed, 1.5) for seed in range(3)))
        before = len(compilations)
        await asyncio.gather(*(ask(seed, 0.4 + seed) for seed in range(5)))
        return compilations[before:]

    assert run(model, work) == []


def test_programs_of_unusual_options_are_compiled_beside_other_requests(model, compilations):
    unusual = TranscribeOptions.of(GREEDY, beam_size=3, no_repeat_ngram_size=4)
    asked, ready, counts = [], threading.Event(), list[int]()

    def compile(model, options):
        assert ready.wait(60)
        asked.append(options)
        warmup(model, (1,), options)
        counts.append(len(compilations))

    async def main():
        slot = ModelSlot("small", lambda: model, (1,), compile=compile, compiled=programs_of(GREEDY))
        scheduler = Scheduler([slot])
        scheduler.ready = True
        waiting = [scheduler.submit("small", noise(0, 0.5), unusual) for _ in range(2)]
        await scheduler.submit("small", noise(1, 0.5), GREEDY).result()
        assert not waiting[0].has_opened
        ready.set()
        for job in waiting:
            await job.result()
        await scheduler.close()

    asyncio.run(main())
    assert asked == [unusual]
    assert counts == [len(compilations)]


def test_samples_beyond_the_limit_are_kept_in_a_file_without_a_name():
    spool = Spool(limit_bytes=1000)
    small, large = np.arange(200, dtype=np.float32), np.arange(300, dtype=np.float32)
    kept, held = spool.keep(small)
    assert kept is small
    assert held == small.nbytes
    mapped, none = spool.keep(large)
    assert isinstance(mapped, np.memmap)
    assert none == 0
    assert np.array_equal(mapped, large)
    spool.release(held)
    assert spool.keep(small)[1] == small.nbytes

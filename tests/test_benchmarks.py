"""The benchmarks' own parts: loops are told apart, sound is cut without loss, documents hold what was measured."""

import json
import time

import numpy as np
import pytest

from benchmarks import estimate, gpu, plan, speech, tables
from benchmarks.nonspeech_sounds import speechless
from benchmarks.scoring import score, without_loops, write_result
from benchmarks.systems import FORMATS, ON_REQUEST, SYSTEMS, Work, chosen, formats, is_able
from benchmarks.worker import Stopped, Worker


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("no no no", "no no no"),
        ("no no no no", "no"),
        ("a b c b c b c b c b d", "a b c d"),  # with the beginning of another round
        ("we ask and ask and ask and we ask", "we ask and ask and ask and we ask"),
        (" ".join([*map(str, range(16))] * 4), " ".join(map(str, range(16)))),
        ("", ""),
    ],
)
def test_a_phrase_four_times_in_a_row_is_left_once(text, left):
    words = text.split()
    kept, removed = without_loops(words)
    assert kept == left.split()
    assert removed == len(words) - len(kept)


def test_a_loop_is_no_error_and_every_word_is_counted():
    found = score(["He sees sees sees sees a dog.", "真昼"], ["He saw a big dog.", "真っ昼"], ["en", "ja"])
    assert found == {
        "words": 9,
        "spoken": 8,
        "substitutions": 1,
        "deletions": 2,
        "insertions": 0,
        "loop_words": 3,
        "loops": 1,
    }


def test_clips_hold_all_of_the_sound_and_are_cut_where_it_is_quiet():
    audio = np.random.default_rng(0).normal(0, 0.1, 80 * 16_000).astype(np.float32)
    audio[25 * 16_000 : 26 * 16_000] = 0
    clips = speech.cut(audio)
    np.testing.assert_array_equal(np.concatenate(clips), audio)
    assert max(map(len, clips)) <= 30 * 16_000
    assert 25.0 <= len(clips[0]) / 16_000 <= 26.0


def test_noise_stands_below_speech_by_what_was_asked_for():
    speaker = speech.Recording(np.sin(np.arange(16_000)).astype(np.float32), "a", "en", "name")
    noise = speech.noisy(speaker, 5.0).audio - speaker.audio
    assert 10 * np.log10((speaker.audio**2).mean() / (noise**2).mean()) == pytest.approx(5, abs=0.01)


def test_every_sound_without_speech_is_as_long_as_asked_for_and_within_full_scale():
    for name, sound in speechless(2.0).items():
        assert sound.shape == (32_000,), name
        assert sound.dtype == np.float32
        assert np.abs(sound).max() <= 1, name


def test_systems_that_are_slow_somewhere_run_only_when_named():
    assert set(chosen("")) == set(SYSTEMS) - set(ON_REQUEST)
    assert chosen("^transformers, bfloat16$")[-1] == "transformers, bfloat16"
    assert formats(list(SYSTEMS)) == set(FORMATS.values())
    assert is_able("faster-whisper, batched", Work(vad=True, batch_size=8))
    assert not is_able("faster-whisper, batched", Work())  # of a long clip it would transcribe the first 30 s
    assert not is_able("faster-whisper, batched", None)
    assert is_able("whisper.cpp, f16", Work())
    assert not is_able("whisper.cpp, f16", Work(words=True))


def test_tables_show_seconds_beside_the_words_written(tmp_path):
    row = {"s": 2.0, "runs": 5, "first_s": 3.5, "mb": 400, "tokens": 9}
    row |= {"words": 9, "spoken": 10, "substitutions": 1, "deletions": 1, "insertions": 0, "loop_words": 0, "loops": 0}
    systems = {"whisper_nnx": row, "peer, int8": row | {"s": 4.0}}
    found = {"one window": {"audio_s": 23.5, "systems": systems}}
    versions = {"whisper_nnx": "1", "peer, int8": "2"}
    write_result(tmp_path / "base.timings.json", "base", versions, timings=found)
    text = tables.filled("a\n<!-- table base.timings -->\nold\n<!-- end -->\nb\n", tmp_path)
    assert "| peer, int8 | 4.00 | 0.50 | 9 | 20.0 % | 400 | 3.50 |" in text
    assert "words of 10" in text
    assert "old" not in text
    assert json.loads((tmp_path / "base.timings.json").read_text())["date"] in text
    assert tables.filled(text, tmp_path) == text
    assert "| peer, int8 | 4.00 |  |" in tables.filled("<!-- table base.summary -->\n<!-- end -->\n", tmp_path)


@pytest.mark.parametrize("document", tables.DOCUMENTS)
def test_documents_hold_the_tables_of_the_results(document):
    text = (tables.ROOT / document).read_text()
    assert tables.filled(text) == text, "run python benchmarks/tables.py"


def test_a_batch_takes_its_longest_row_and_refilled_rows_wait_for_none():
    assert estimate.steps([7, 2, 5, 3], 2, None) == (7 + 5, 2, 0)
    assert estimate.steps([7, 2, 5, 3], 2, 1) == (10, 3, 0)
    assert estimate.steps([7, 2, 5, 3], 2, 2) == (12, 2, 0)
    assert estimate.steps([7, 2, 5, 3], 4, None) == estimate.steps([7, 2, 5, 3], 4, 1) == (7, 1, 0)
    assert estimate.steps([100, 100, 30, 30], 2, None) == (130, 2, 1)
    assert estimate.steps([100, 10, 30, 30], 2, 1) == (100, 3, 0)  # the first row still reads all


def test_an_estimate_is_what_its_programs_take_at_the_rates_of_the_data_sheet():
    program = {"arguments_mb": 1.0, "gflop": 989.0, "mb": 1.0}  # 1 ms
    rows = {
        ("h200", "large-v3", "encode"): program | {"batch": 16},
        ("h200", "large-v3", "prompt"): program | {"batch": 128},
        ("h200", "large-v3", "step"): {"arguments_mb": 1.0, "gflop": 1.0, "mb": 48_000.0, "batch": 128},  # 10 ms
        ("h200", "large-v3", "move up"): program | {"mb": 9_600.0, "batch": 128},  # 2 ms
    }
    host = estimate.Host(decoding_s=1.6, processes=16, program_ms=0.0, window_ms=0.0)
    found = estimate.estimate(estimate.Case("h200", "large-v3"), rows, [100], 28.125, host)  # 128 windows
    assert found["sheet"]["parts"] == {
        "encoder": 0.008,
        "prompt": 0.001,
        "steps": 1.0,
        "moves": 0.0,
        "dispatch": 0.0,
        "decoding": 0.1,
        "driver": 0.0,
    }
    assert (found["sheet"]["s"], found["sheet"]["bound"], found["sheet"]["step_bound"]) == (1.009, "steps", "memory")
    alone = estimate.estimate(estimate.Case("h200", "large-v3", files=1), rows, [100], 28.125, host)
    assert (alone["sheet"]["s"], alone["sheet"]["bound"]) == (1.6, "decoding")
    two = estimate.estimate(estimate.Case("h200", "large-v3", 2), rows, [100], 28.125, host)
    assert two["sheet"]["parts"]["moves"] == 0.002  # before the second batch
    cross_mb = 128 * 2 * 32 * 1500 * 1280 * 2 / 1e6  # half of which 8 bits save
    eight = estimate.estimate(estimate.Case("h200", "large-v3", cross_bytes=1), rows, [100], 28.125, host)
    assert eight["sheet"]["step_ms"] == pytest.approx(10 - cross_mb / 2 / 4.8e3, abs=1e-3)


def test_a_program_that_needs_more_than_a_tenth_more_is_worse_than_the_table():
    expected = {"mb": 100.0, "gflop": 10.0, "date": "2026-11-29"}
    assert plan.worse({"mb": 109.0, "gflop": 5.0}, expected) == []
    assert plan.worse({"mb": 111.0, "gflop": 10.0}, expected) == ["mb is 111.0, 11 % above 100.0"]
    assert set(plan.CHECKED) <= set(plan.read()), "run python benchmarks/accelerator.py"


class OutOfMemoryFrom:
    """Stands for a worker of which batches of more than `most` do not fit into the device's memory."""

    def __init__(self, most):
        self.most, self.batches = most, []

    def run(self, audio, work, limit_s):
        self.batches.append(work.batch_size)
        if work.batch_size > self.most:
            raise Stopped("a system: OutOfMemoryError: CUDA out of memory")
        return {"s": 2.0, "mb": 100.0, "texts": ["a b"], "tokens": 2}


def task_and_run(tmp_path, batch_size=8, limit_s=60.0):
    run = gpu.Run("base", tmp_path / "gpu.base.timings.json", time.monotonic() + limit_s, repeats=2, is_random=False)
    return gpu.Task(tmp_path / "clips.npz", Work(batch_size=batch_size), 30.0, "a b c"), run


def test_what_does_not_fit_on_a_gpu_is_tried_with_half_the_batch_and_each_figure_is_written(tmp_path):
    (task, run), worker = task_and_run(tmp_path), OutOfMemoryFrom(3)
    for row in gpu.measure(worker, task, run):
        run.add("clips", task, "a system", row)
        written = json.loads(run.result.read_text())["timings"]["clips"]["systems"]["a system"]
        assert written == row
    assert worker.batches == [8, 4, 2, 2, 2]
    assert (row["s"], row["runs"], row["batch_size"], row["words"], row["deletions"]) == (2.0, 2, 2, 2, 1)
    with pytest.raises(Stopped, match="out of memory"):
        list(gpu.measure(OutOfMemoryFrom(0), task, run))


def test_a_missing_system_leaves_its_reason_and_the_others_their_time(tmp_path, monkeypatch):
    task, run = task_and_run(tmp_path, limit_s=20.0)
    monkeypatch.setitem(SYSTEMS, "missing", SYSTEMS["faster-whisper"])  # here, but not in the worker's process
    gpu.measure_system("missing", tmp_path, {"one window": task._replace(work=Work())}, run, 0.5)
    assert json.loads(run.result.read_text())["failed"] == {"one window": {"missing": "missing: KeyError: 'missing'"}}
    assert run.left_s() > 10
    late = time.monotonic() + 0.01
    run.deadline = late
    gpu.measure_system("missing", tmp_path, {"one window": task._replace(work=Work())}, run, 1)
    assert run.failed["one window"]["missing"] == "no time was left"
    with pytest.raises(Stopped, match="missing was stopped after 0 s"):
        Worker("missing", tmp_path, limit_s=0.01)


def test_the_summary_of_a_gpu_names_the_goal_and_what_is_not_the_same_work(tmp_path):
    run = gpu.Run("large-v3", tmp_path / "gpu.large-v3.timings.json", time.monotonic() + 60, repeats=1, is_random=True)
    task = gpu.Task(tmp_path / "clips.npz", Work(batch_size=128), 1800.0, "")
    for system, s, tokens in ((gpu.OURS[0], 1.0, 84), (gpu.OURS[1], 1.2, 84), (gpu.PEERS[0], 5.0, 80)):
        run.add("clips", task, system, {"s": s, "first_s": 9.0, "tokens": tokens})
    assert list(gpu.summary([run])) == [
        f"large-v3, clips, {gpu.OURS[0]}: 1.00 s; the goal of 1.15 s is reached",
        f"large-v3, clips, {gpu.OURS[1]}: 1.20 s; the goal of 1.15 s is missed",
        f"large-v3, clips, {gpu.PEERS[0]}: 5.0 times as long as {gpu.OURS[0]}",
        f"large-v3, clips, {gpu.PEERS[0]}: 80 tokens, not 84: not the same work",
    ]

"""Endless batches, independent of readers and resumable."""

import json
import logging
import os
import pickle
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.small import small_tokenizer
from tests.training.waveforms import RATE, steady, write
from whisper_nnx.audio.loading import load_audio
from whisper_nnx.data.manifest import Row
from whisper_nnx.text.tokenizer import Tokenizer
from whisper_nnx.training import make_pipeline, read_manifest
from whisper_nnx.training.config import AugmentConfig, DataConfig
from whisper_nnx.training.pipeline import Batch, Pipeline

TOKENIZER = small_tokenizer()
AUGMENT = AugmentConfig(speed=0.1, gain_db=6.0, noise_rate=0.5)


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    paths = [write(tmp_path, f"{k}.wav", steady(k, 0.2 + 0.02 * k)) for k in range(7)]
    return [Row(path, "abcdefg"[k], "en", 0.2 + 0.02 * k, k + 1, manifest="m") for k, path in enumerate(paths)]


def pipeline(
    rows: list[Row], batch_size: int = 4, seed: int = 3, process: tuple[int, int] = (0, 1), **data: Any
) -> Pipeline:
    config = DataConfig(**{"window_s": 1.0, "max_label_length": 48, "no_speech_rate": 0.1, **data})
    sizes = {"batch_size": batch_size, "seed": seed, "max_target_positions": 48}
    index, count = process
    return make_pipeline(config, AUGMENT, rows, TOKENIZER, **sizes, process_index=index, process_count=count)


def take(batches: Any, count: int) -> list[Batch]:
    return list(islice(batches, count))


def assert_equal(some: list[Batch], others: list[Batch]) -> None:
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert np.array_equal(one[name], other[name]), name


def test_batches_have_fixed_shapes(rows):
    shapes = {
        "waveform": ((4, RATE), np.float32),
        "first_position": ((4,), np.int32),
        "ids": ((4, 48), np.int32),
        "labels": ((4, 48), np.int32),
        "weights": ((4, 48), np.float32),
        "spans": ((4, 48, 2), np.int32),
        "ctc": ((4, 20), np.int32),
        "ctc_weight": ((4,), np.float32),
        "frames": ((4, 50), np.int32),
        "rows": ((4, 8), np.int32),
    }
    for batch in take(iter(pipeline(rows)), 5):
        assert {name: (array.shape, array.dtype) for name, array in batch.items()} == shapes


def test_a_restored_iterator_continues_with_the_same_batches(rows):
    uninterrupted = iter(pipeline(rows))
    take(uninterrupted, 3)
    state = json.loads(json.dumps(uninterrupted.get_state()))
    expected = take(uninterrupted, 3)
    restored = iter(pipeline(rows))
    restored.set_state(state)
    assert_equal(take(restored, 3), expected)
    restored.set_state(state)
    assert_equal(take(restored, 3), expected)
    assert restored.get_state() == uninterrupted.get_state() != state


def test_workers_do_not_change_batches_or_positions(rows):
    alone, helped = iter(pipeline(rows)), iter(pipeline(rows, workers=2))
    take(alone, 2)
    helped.set_state(alone.get_state())
    try:
        assert_equal(take(helped, 5), take(alone, 5))
        assert helped.get_state() == alone.get_state()
    finally:
        helped.close()


def test_workers_end_when_their_parent_is_killed(rows, tmp_path):
    program = f"""
import pickle
from tests.training.test_pipeline import pipeline
if __name__ == "__main__":
    batches = iter(pipeline(pickle.loads({pickle.dumps(rows[:1])!r}), workers=1))
    next(batches)
    print("ready", flush=True)
    input()
"""
    script = write(tmp_path, "program.py", program.encode())
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen([sys.executable, script], env=environment, text=True, **pipes) as process:
        lines = list(takewhile(lambda line: line != "ready\n", process.stdout))
        assert process.poll() is None, lines
        process.kill()
        process.communicate(timeout=60)  # returns when the last process with the pipe has ended


def test_hosts_together_get_the_batches_of_one(rows):
    one = take(iter(pipeline(rows)), 4)
    parts = [take(iter(pipeline(rows, process=(index, 2))), 4) for index in range(2)]
    joined = [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*parts, strict=True)]
    assert_equal(joined, one)


def test_another_seed_gives_other_batches(rows):
    (one,), (other,) = take(iter(pipeline(rows)), 1), take(iter(pipeline(rows, seed=4)), 1)
    assert not np.array_equal(one["waveform"], other["waveform"])


def firsts(batches: list[Batch]) -> list[int]:
    return [int(row) for batch in batches for row in batch["rows"][:, 0]]


def test_every_row_starts_one_window_per_pass_in_changing_order(rows):
    seen = firsts(take(iter(pipeline(rows, batch_size=7, no_speech_rate=0.0, pack=False)), 4))
    passes = [seen[at : at + 7] for at in range(0, 28, 7)]
    assert all(sorted(part) == list(range(7)) for part in passes)
    assert len(set(map(tuple, passes))) > 1


def test_weights_are_the_shares_of_manifests(rows):
    two = [replace(row, manifest="few" if k < 2 else "many") for k, row in enumerate(rows)]
    plain = firsts(take(iter(pipeline(two, no_speech_rate=0.0, pack=False)), 14))
    assert sum(row < 2 for row in plain) == 16  # 2 of 7
    weighted = firsts(take(iter(pipeline(two, no_speech_rate=0.0, pack=False, weights=(3.0, 1.0))), 14))
    assert sum(row < 2 for row in weighted) == 42
    assert Counter(row for row in weighted if row < 2) == {0: 21, 1: 21}
    assert all(row < 2 for row in firsts(take(iter(pipeline(two, no_speech_rate=0.0, weights=(1.0, 0.0))), 3)))


def test_a_missing_file_is_reported_once_with_its_line(rows, caplog):
    rows[4].audio.unlink()
    batches = iter(pipeline(rows, pack=False, no_speech_rate=0.0))
    with caplog.at_level(logging.WARNING):
        many = take(batches, 14)
    (message,) = caplog.messages
    assert message.startswith(f"m:5: {rows[4].audio}: No such file or directory")
    assert list(batches.troubles) == [4]
    weightless = [row for batch in many for row in np.flatnonzero(~batch["weights"].any(axis=1))]
    assert len(weightless) == 56 // 7


def test_damaged_audio_inside_a_manifest_is_reported_by_line(rows, caplog):
    rows[0] = replace(rows[0], audio=b"not audio")
    with caplog.at_level(logging.WARNING):
        take(iter(pipeline(rows, pack=False, no_speech_rate=0.0)), 2)
    (message,) = caplog.messages
    assert message.startswith("m:1: the given data cannot be read as audio")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"batch_size": 3, "process": (0, 2)}, "batch_size=3 must be a multiple of the 2 processes"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"weights": (1.0, 2.0)}, "must be one number of at least 0 for each of m"),
        ({"weights": (-1.0,)}, "of at least 0"),
        ({"weights": (0.0,)}, "of at least 0"),
    ],
)
def test_invalid_options_are_rejected_at_once(rows, changes, reason):
    with pytest.raises(ValueError, match=reason):
        pipeline(rows, **changes)


def test_a_manifest_without_rows_is_rejected_at_once():
    with pytest.raises(ValueError, match="no row can be used"):
        pipeline([])


def test_windows_of_real_speech_match_the_manifest(shared, digits, tmp_path):
    truth = json.loads((shared / "audio" / "en_short_3s.words.json").read_text())
    entry = {"audio": str(shared / "audio" / "en_short_3s.flac"), "text": "six zero nine", "language": "en"}
    timed = {"segments": truth["segments"], "words": truth["words"], "previous_text": "one two"}
    write(tmp_path, "m.jsonl", json.dumps({**entry, **timed}).encode())
    tokenizer = Tokenizer.from_folder(digits)
    rows = read_manifest(tmp_path / "m.jsonl", tokenizer.languages, 30.0).rows
    config = DataConfig(pack=False, no_speech_rate=0.0, no_timestamps_rate=0.0, previous_text_rate=1.0)
    (batch,) = take(iter(make_pipeline(config, AugmentConfig(), rows, tokenizer, batch_size=1, seed=0)), 1)
    ids, labels, spans = (batch[name][0] for name in ("ids", "labels", "spans"))
    text = tokenizer.decode_with_timestamps(labels[batch["weights"][0] > 0].tolist())
    assert text == "<|en|><|transcribe|><|0.10|> six zero nine<|1.66|><|endoftext|>"
    assert tokenizer.decode(ids[:3].tolist()) == "<|startofprev|> one two"
    samples = load_audio(rows[0].audio)
    assert batch["waveform"].shape == (1, 480_000)
    assert np.array_equal(batch["waveform"][0, : len(samples)], samples)
    for word in truth["words"]:
        (token,) = tokenizer.encode(f" {word['word']}")
        first, end = spans[labels.tolist().index(token)]
        assert 0.02 * first <= word["start"] < 0.02 * (first + 1)
        assert 0.02 * (end - 1) < word["end"] <= 0.02 * end

"""What a job in Python stores of models and functions."""

import json
import random
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.audio.test_loading import as_int16, write_wav
from tests.decoding.test_word_ngram import FOLDER as LM_FOLDER
from tests.small import small_model
from whisper_nnx import __version__, jobs
from whisper_nnx.audio.options import VadOptions
from whisper_nnx.decoding.ngram import NgramModel
from whisper_nnx.jobs.in_process import digest, planned, require_model, run
from whisper_nnx.jobs.job import Job
from whisper_nnx.jobs.status import results
from whisper_nnx.text.tokenizer import Tokenizer
from whisper_nnx.transcription.drafts import with_draft
from whisper_nnx.transcription.opening import read_samples
from whisper_nnx.transcription.stream import iter_transcripts


def even(tokens: jax.Array) -> jax.Array:
    return jnp.zeros((tokens.shape[0], 300))


class Network(nnx.Module):
    def __init__(self, seed: int, scale: float = 0.5):
        self.embed, self.scale, self.act = nnx.Embed(10, 4, rngs=nnx.Rngs(seed)), scale, jax.nn.gelu

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.act(self.embed(tokens)) * self.scale


def ngrams(value: float, order: int = 2) -> NgramModel:
    return NgramModel(*[jnp.full(3, value)] * 8, order)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sounds").mkdir()
    (tmp_path / "sounds" / "a.wav").write_bytes(b"x")
    return tmp_path


def plan_with(folder: Path, name: str, **options) -> Job:
    return planned(folder / "sounds", folder / name, 60.0, options, {})


def test_run_is_a_function_of_the_package() -> None:
    assert jobs.run is run
    with pytest.raises(AttributeError, match=r"no attribute 'walk'"):
        jobs.walk  # noqa: B018


@pytest.mark.parametrize(
    ("create", "others"),
    [
        (lambda: {"draft": small_model()}, [lambda: {"draft": small_model(seed=2)}, lambda: {"draft": "ngram"}]),
        (lambda: {"lm": ngrams(1)}, [lambda: {"lm": ngrams(2)}, lambda: {"lm": ngrams(1, order=3)}]),
        (lambda: {"lm": Network(1)}, [lambda: {"lm": Network(2)}, lambda: {"lm": Network(1, scale=1.0)}]),
        (
            lambda: {"vad_filter": True, "vad_parameters": VadOptions(0.3)},
            [lambda: {"vad_filter": True, "vad_parameters": VadOptions(0.4)}],
        ),
    ],
)
def test_a_job_continues_with_equal_models_and_refuses_others(folder, create, others):
    plan_with(folder, "job", **create())
    again = plan_with(folder, "job", **create())
    assert " at 0x" not in json.dumps(again.settings)
    for other in others:
        with pytest.raises(ValueError, match=r"holds a job with .*; choose another folder"):
            plan_with(folder, "job", **other())


def test_models_functions_and_numbers_are_stored_by_what_they_are_and_what_changes_no_result_is_not(folder):
    options = {"lm": even, "draft": small_model(), "temperature": (np.float32(0), 0.5), "bias": [{"text": "a"}]}
    job = plan_with(folder, "job", **options, progress=lambda done, total: None, verbose=False)
    own = {name: value for name, value in job.settings.items() if name not in ("input", "version", "shard_s")}
    assert own.pop("planned_by") == "python"
    assert own == {
        "lm": f"{__name__}.even",
        "draft": f"model {digest(small_model())}",
        "temperature": [0.0, 0.5],
        "bias": [{"text": "a"}],
    }


def test_a_shard_that_is_interrupted_has_the_same_bytes_however_long_reading_takes(tmp_path, monkeypatch):
    (tmp_path / "sounds").mkdir()
    for n in range(8):
        sound = np.random.default_rng(n).normal(size=16000 * (1 + n % 3)) / 10
        write_wav(tmp_path / "sounds" / f"{n}.wav", as_int16(sound))
    (tmp_path / "sounds" / "5.wav").write_bytes(b"no sound")
    model, chance = small_model(), random.Random(3)
    options: Any = {"batch_size": 3, "temperature": 0, "language": "en", "max_new_tokens": 20}
    run(model, tmp_path / "sounds", tmp_path / "expected", **options)

    def slowly(*args):
        time.sleep(chance.random() / 10)
        return read_samples(*args)

    def interrupted(*args, **options):
        for count, found in enumerate(iter_transcripts(*args, **options)):
            if count == 3:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr("whisper_nnx.transcription.stream.read_samples", slowly)
    with monkeypatch.context() as patch:
        patch.setattr("whisper_nnx.jobs.in_process.iter_transcripts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "sounds", tmp_path / "job", **options)
    assert run(model, tmp_path / "sounds", tmp_path / "job", **options).done == 7
    for name in ("results", "failed"):
        assert len({(tmp_path / job / name / "000000.jsonl").read_bytes() for job in ("job", "expected")}) == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, False), ({"batch_size": 1}, False), ({"batch_size": 2}, True), ({"devices": 1}, True)],
)
def test_a_shard_is_done_as_a_whole_where_recordings_share_batches(folder, monkeypatch, options, expected):
    found = list[bool]()
    monkeypatch.setattr("whisper_nnx.jobs.in_process.work", lambda *_, batched, **more: found.append(batched))
    run(small_model(), folder / "sounds", folder / "job", **options)
    assert found == [expected]


def test_each_row_says_how_it_was_made(folder):
    write_wav(folder / "sounds" / "b.wav", as_int16(np.zeros(8000) + 0.1))
    run(small_model(), folder / "sounds", folder / "job", language="en", beam_size=2, temperature=0, max_new_tokens=2)
    [row] = results(Job.open(folder / "job"))
    options = {"language": "en", "beam_size": 2, "temperature": 0, "max_new_tokens": 2}
    assert (row["version"], row["model"], row["options"]) == (__version__, digest(small_model()), options)


@pytest.mark.parametrize("known", ["", "0123"])
def test_another_model_is_refused_also_where_the_known_digest_is_empty(folder, known):
    job = plan_with(folder, "job")
    (job.folder / "model.txt").write_text(known)
    with pytest.raises(ValueError, match=rf"was started with another model \(digest {known}, this one has .*\)"):
        require_model(job, small_model())


@pytest.mark.parametrize(
    ("options", "error"),
    [({"beam_sise": 5}, TypeError), ({"beam_size": 0}, ValueError), ({"beam_size": 5, "draft": "ngram"}, ValueError)],
)
def test_wrong_options_are_refused_before_anything_is_written(folder, options, error):
    with pytest.raises(error, match=next(iter(options))):
        plan_with(folder, "job", **options)
    assert not (folder / "job").exists()


@pytest.mark.parametrize(
    "nameless",
    [lambda tokens: tokens, partial(even), Network(1).__call__, jax.tree_util.Partial(lambda tokens: tokens)],
)
def test_a_function_without_a_name_is_refused_before_anything_is_written(folder, nameless):
    with pytest.raises(ValueError, match=r"lm=.* has no name by which another process would find it.*; define it at"):
        plan_with(folder, "job", lm=nameless)
    assert not (folder / "job").exists()


def test_a_language_model_that_changed_at_its_path_is_refused_and_read_once_by_a_worker(folder, monkeypatch):
    write_wav(folder / "sounds" / "b.wav", as_int16(np.zeros(8000) + 0.1))
    shutil.copy(LM_FOLDER / "words.arpa", path := folder / "lm.arpa")
    options: Any = {"lm": path, "language": "en", "temperature": 0, "max_new_tokens": 2}

    def interrupted(*args, **options):
        assert not isinstance(options["lm"], str | Path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("whisper_nnx.jobs.in_process.iter_transcripts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(small_model(), folder / "sounds", folder / "job", **options)
    path.write_text(path.read_text().replace("-1.", "-1.5", 1))
    with pytest.raises(ValueError, match=r"was started with another language model \(digest .*\); use that one"):
        run(small_model(), folder / "sounds", folder / "job", **options)
    shutil.copy(LM_FOLDER / "words.arpa", path)
    assert run(small_model(), folder / "sounds", folder / "job", **options).done == 1


@pytest.mark.parametrize("changed", ["tokenizer", "draft"])
def test_a_model_with_another_tokenizer_or_draft_is_another_one(folder, changed):
    job, models = plan_with(folder, "job"), [with_draft(small_model(), small_model(seed=n)) for n in (2, 3, 2)]
    if changed == "tokenizer":
        models[1] = with_draft(other := small_model(), small_model(seed=2))
        files = dict(other.tokenizer.files)
        other.tokenizer = Tokenizer(files, other.tokenizer.vocab_size + 1)
    require_model(job, models[0])
    with pytest.raises(ValueError, match="was started with another model"):
        require_model(job, models[1])
    require_model(job, models[2])


def test_a_list_of_which_no_recording_is_there_is_not_planned(folder):
    (folder / "list.txt").write_text("away/a.wav\naway/b.wav\n")
    message = f"none of the recordings exists, such as {folder}/away/a.wav; check that they are mounted"
    with pytest.raises(FileNotFoundError, match=message):
        planned(folder / "list.txt", folder / "job", None, {}, {})
    assert not (folder / "job").exists()
    (folder / "list.txt").write_text("away/a.wav\nsounds/a.wav\n")
    assert planned(folder / "list.txt", folder / "job", None, {}, {}).recordings == 2

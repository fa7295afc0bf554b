"""OpenAI's tiny.en and base on real speech: the transcripts of openai-whisper, token by token, and no more errors."""

import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import whisper

from tests.reference.test_transcribe import compare
from tests.small import compiling_quickly
from weight_loader.load import read_content
from weight_loader.writers import write_checkpoint
from whisper_nnx import load_audio, load_model
from whisper_nnx.data.manifest import read_manifest
from whisper_nnx.evaluation.error_rates import error_rates
from whisper_nnx.evaluation.run import evaluate
from whisper_nnx.transcription import stream
from whisper_nnx.transcription.stream import iter_transcripts

pytestmark = [
    pytest.mark.real,
    pytest.mark.filterwarnings("ignore:unclosed file.*tiktoken:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*translation"),
    pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning"),  # numpy.argsort of a torch tensor
]

WORDS = {"word_timestamps": True}
BEAM = {"beam_size": 5, "word_timestamps": True}
LADDER = {  # temperature 0 in every attempt, none of which is good enough
    "temperature": (0.0, 0.0),
    "logprob_threshold": -0.01,
    "compression_ratio_threshold": 1.0,
    "no_speech_threshold": None,
}
FIRST_S = {"es_libri_17s.opus": 8, "en_lj_8s.wav": 5}
CASES = [
    (
        "tiny.en",
        "en_libri_16s.wav",
        {**WORDS, "clip_timestamps": "1.5,6,9.25,14", "hallucination_silence_threshold": 1},
    ),
    ("tiny.en", "en_libri_5s.flac", LADDER),
    ("tiny.en", "en_lj_8s.wav", {**BEAM, "patience": 2.0}),
    ("tiny.en", "en_lj_8s.wav", {"without_timestamps": True, "initial_prompt": "Oswald."}),
    ("tiny.en", "en_meeting_6s.wav", {"temperature": (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)}),
    ("base", "es_libri_17s.opus", {**WORDS, "task": "translate"}),
    pytest.param("base", "en_lj_2s.wav", BEAM, marks=pytest.mark.slow),
    pytest.param("base", "en_lj_2s.wav", LADDER, marks=pytest.mark.slow),
    ("base", "ja_common_voice_6s.mp3", {}),
    pytest.param("base", "de_simplicissimus_68s.mp3", {}, marks=pytest.mark.slow),
    pytest.param("base", "de_simplicissimus_68s.mp3", LADDER, marks=pytest.mark.slow),
    ("base", "en_lj_8s.wav", {"language": "en", "initial_prompt": "The Warren report.", "carry_initial_prompt": True}),
]


@pytest.fixture(scope="session")
def both_models(real_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """By a checkpoint's name: our model, and openai-whisper's with the same weights and alignment heads."""

    @functools.cache
    def load(name: str):
        file = tmp_path_factory.mktemp("openai") / f"{name}.pt"
        write_checkpoint(read_content(real_models / name), file, "openai")
        ours, theirs = load_model(real_models / name), whisper.load_model(str(file), device="cpu")
        heads = torch.zeros(theirs.dims.n_text_layer, theirs.dims.n_text_head, dtype=torch.bool)
        heads[tuple(np.transpose(ours.config.alignment_heads))] = True
        theirs.register_buffer("alignment_heads", heads.to_sparse(), persistent=False)
        return ours, theirs

    return load


@pytest.fixture(autouse=True)
def base_is_compiled_quickly(request: pytest.FixtureRequest) -> Iterator[None]:
    """Programs as users have them are compared on tiny.en."""
    with compiling_quickly() if request.node.callspec.params["name"] == "base" else nullcontext():
        yield


@pytest.mark.parametrize(("name", "recording", "options"), CASES, ids=str)
def test_options_mean_what_they_mean_in_openai_whisper(name, recording, options, both_models, real_speech):
    audio = load_audio(real_speech(recording))
    compare(*both_models(name), audio[: FIRST_S.get(recording, 30) * 16_000], **options)


@pytest.mark.parametrize(
    ("name", "languages", "most", "batch_size"),
    [
        ("tiny.en", ["en"], 2, 2),
        pytest.param("tiny.en", ["en"], 4, 4, marks=pytest.mark.slow),
        pytest.param("base", ["es", "ja"], 2, 2, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_recordings_are_transcribed_as_by_openai_whisper_and_evaluated_with_no_more_errors(
    name, languages, most, batch_size, both_models, shared, monkeypatch
):
    """Recordings of up to three windows, together; the texts are what the speakers read."""
    transcripts = {}

    def remembered(*given, **options):
        transcripts.update(iter_transcripts(*given, **options))
        return transcripts.items()

    monkeypatch.setattr(stream, "iter_transcripts", remembered)
    rows = [row for row in read_manifest(shared / "real" / "manifest.jsonl").rows if row.language in languages][:most]
    ours, reference = both_models(name)
    found = evaluate(ours, rows, batch_size=batch_size, temperature=0.0, word_timestamps=True)
    assert not found.failed
    audio = [load_audio(row.audio) for row in rows]
    pairs = [compare(ours, reference, x, transcripts[n], word_timestamps=True) for n, x in enumerate(audio)]
    expected = [theirs["text"] for _, theirs in pairs]
    wanted = error_rates([row.text for row in rows], expected, [row.language for row in rows])
    assert found.total.rates.wer <= wanted.wer < 0.35
    assert found.total.rates.cer <= wanted.cer < 0.2

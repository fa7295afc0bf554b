"""A server with a language model: the texts are those of `transcribe`, with each weight, together and alone."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.decoding.test_ngram import FOLDER
from tests.serving.server import recording, started
from tests.small import quick_compilation as quick_compilation
from tests.small import small_model
from whisper_nnx import transcribe
from whisper_nnx.serving.settings import ServerSettings

ARPA = str(FOLDER / "ids.arpa")
WITHOUT = dict.fromkeys(("logprob_threshold", "no_speech_threshold", "compression_ratio_threshold"))
COMMON = {"model": "small", "language": "de", "temperature": "0", "max_new_tokens": "8"}
AUDIO = recording(1.7)


def answer(server: Any, **fields: str) -> Any:
    data = {**COMMON, **dict.fromkeys(WITHOUT, "none"), **fields}
    return server.http.post("/v1/audio/transcriptions", data=data, files={"file": ("a.wav", AUDIO)})


def test_texts_are_those_of_transcribe_with_each_weight_and_weights_compile_nothing(compilations) -> None:
    model = small_model(decoder_layers=1)
    with (
        started({"small": model}, ServerSettings(lm=ARPA, lm_weight=2.0), sizes=(2,)) as server,
        ThreadPoolExecutor(4) as pool,
    ):
        requests: list[dict[str, str]] = [{}, {"lm_weight": "0"}, {"lm_weight": "4"}]
        first = answer(server).json()["text"]
        compilations.clear()
        alone = [answer(server, **fields).json()["text"] for fields in requests]
        assert compilations == []
        together = list(pool.map(lambda fields: answer(server, **fields).json()["text"], requests))
        assert answer(server, lm="/etc/passwd").headers["x-warning"] == "unknown field 'lm' has no effect"
        refused = answer(server, lm_weight="-1")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "lm_weight")
    options = {"language": "de", "temperature": 0.0, "max_new_tokens": 8, **WITHOUT}
    sources = [{"audio": AUDIO, "lm": ARPA, "lm_weight": weight} for weight in (2.0, 0.0, 4.0)]
    expected = [one["text"].strip() for one in transcribe(model, sources, batch_size=2, **options)]
    assert alone == together == expected
    assert first == alone[0]
    assert len(set(alone)) == 3


def test_a_weight_without_a_language_model_is_refused() -> None:
    with started({"small": small_model(decoder_layers=1)}) as server:
        found = answer(server, lm_weight="0.5")
        assert found.status_code == 400
        assert "lm_weight=0.5 needs a server with a language model" in found.json()["error"]["message"]


def test_a_file_that_is_missing_and_a_weight_below_zero_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lm='none\.arpa' is not a file"):
        ServerSettings(lm="none.arpa")
    with pytest.raises(ValueError, match="lm_weight=-1"):
        ServerSettings(lm=ARPA, lm_weight=-1)

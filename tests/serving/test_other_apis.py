"""Requests as Bazarr and other clients of whisper-asr-webservice send them, and those of whisper.cpp's server."""

import json

import pytest
import requests

from tests.serving.server import recording, started
from tests.small import quick_compilation as quick_compilation
from tests.small import small_model
from whisper_nnx import transcribe
from whisper_nnx.output.writers import WRITERS

WAV = recording()
RAW = WAV[44:]  # s16le
ONCE = {"logprob_threshold": "none", "no_speech_threshold": "none", "compression_ratio_threshold": "none"}
ONCE_HERE = dict.fromkeys(ONCE, None)


@pytest.fixture(scope="module")
def model():
    return small_model(alignment_heads=((1, 0),))


@pytest.fixture(scope="module")
def http(model):
    with started({"small": model}) as server:
        yield server.http


@pytest.fixture(scope="module")
def expected(model):
    return transcribe(model, WAV, language="en", **ONCE_HERE)


@pytest.mark.parametrize("video", ["/films/Ein Film (2001) – Über.mkv", None])
def test_bazarr(http, model, video) -> None:
    """As its provider whisperai sends them, by requests: detect the language, then transcribe or translate."""
    with requests.Session() as session:
        session.headers["User-Agent"] = "Subliminal/2.1"

        def post(route, **query):
            params = {**query, "encode": "false", "video_file": video}
            address = f"{http.base_url}/{route}"
            return session.post(address, params=params, files={"audio_file": RAW}, timeout=(10, 60))

        found = post("detect-language").json()
        assert found["language_code"] == transcribe(model, WAV)["language"]
        for task in ["transcribe", "translate"]:
            response = post("asr", task=task, language="de", output="srt")
            assert response.content.decode() == WRITERS["srt"](transcribe(model, WAV, language="de", task=task))
            assert "x-warning" not in response.headers


@pytest.mark.parametrize("output", ["txt", "vtt", "srt", "tsv", "json"])
def test_outputs_of_a_file_with_a_header(http, expected, output) -> None:
    for encode in ["true", "false"]:
        query = {**ONCE, "language": "english", "output": output, "encode": encode}
        response = http.post("/asr", params=query, files={"audio_file": ("film.wav", WAV)})
        if output == "json":
            assert response.json() == json.loads(WRITERS["json"](expected))
        else:
            assert response.text == WRITERS[output](expected)


def test_the_language(http, model) -> None:
    found = http.post("/detect-language?encode=false&video_file=x", files={"audio_file": RAW}).json()
    assert found["language_code"] == transcribe(model, WAV, **ONCE_HERE)["language"]
    assert found["detected_language"] in ("english", "german", "spanish", "french")
    assert 0.25 < found["confidence"] <= 1


def test_bad_parameters(http) -> None:
    for query, param in [("output=docx", "output"), ("encode=maybe", "encode"), ("beam_size=x", "beam_size")]:
        response = http.post(f"/asr?{query}", files={"audio_file": RAW})
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert http.post("/asr", files={"file": RAW}).json()["error"]["param"] == "audio_file"
    assert "beam_siz" in http.post("/asr?beam_siz=2&encode=0", files={"audio_file": RAW}).headers["x-warning"]


def test_whisper_cpp(http, expected, model) -> None:
    def infer(**fields):
        data = {**ONCE, "temperature": "0.0", "temperature_inc": "0.2", "language": "en", **fields}
        return http.post("/inference", data=data, files={"file": ("a.wav", WAV)})

    lines = "".join(f"{segment['text']}\n" for segment in expected["segments"])
    assert infer().json() == {"text": lines}
    assert infer(response_format="text").text == lines
    for form in ["srt", "vtt"]:
        assert infer(response_format=form).text == WRITERS[form](expected)
    verbose = infer(response_format="verbose_json", beam_size="-1", max_len="0").json()
    assert [segment["text"] for segment in verbose["segments"]] == [segment["text"] for segment in expected["segments"]]
    assert (verbose["detected_language"], verbose["duration"]) == ("english", 2.5)
    translated = transcribe(
        model, WAV, language="de", task="translate", offset_s=0.5, initial_prompt="the", **ONCE_HERE
    )
    found = infer(language="de", translate="true", offset_t="500", prompt="the", response_format="verbose_json").json()
    assert [segment["tokens"] for segment in found["segments"]] == [s["tokens"] for s in translated["segments"]]
    short = infer(response_format="srt", max_len="5", split_on_word="true").text
    assert short.count("-->") > len(expected["segments"])
    assert infer(vad_threshold="0.5", entropy_thold="2.4").headers["x-warning"].startswith("vad_threshold: no effect")
    assert infer(duration="long").json()["error"]["message"] == "duration='long' must be a whole number of ms"

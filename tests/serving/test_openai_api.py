"""OpenAI's audio API, driven by its own client, which refuses what does not fit its types."""

import asyncio
import json
import logging
import re

import numpy as np
import openai
import pytest

from tests.serving.server import recording, started
from tests.small import quick_compilation as quick_compilation
from tests.small import small_model
from whisper_nnx import load_model, transcribe
from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.output.writers import WRITERS
from whisper_nnx.serving.fields import OPTION_FIELDS, RECORDING_FIELDS
from whisper_nnx.transcription.fallback import FallbackOptions
from whisper_nnx.transcription.longform import LongformOptions
from whisper_nnx.transcription.options import TranscribeOptions

# What the small model says is improbable: without thresholds each window is decoded once.
ONCE = {"logprob_threshold": "none", "no_speech_threshold": "none", "compression_ratio_threshold": "none"}
ONCE_HERE = dict.fromkeys(ONCE, None)
WAV, STEREO = recording(), recording(channels=2)
FILE = ("speech.wav", WAV)
REFERENCE_KEYS = {
    "id", "seek", "start", "end", "text", "tokens", "temperature", "avg_logprob", "compression_ratio", "no_speech_prob"
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return small_model(alignment_heads=((1, 0),))


@pytest.fixture(scope="module")
def server(model):
    with started({"small": model}) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return server.openai()


@pytest.fixture(scope="module")
def create(client):
    def create(file=FILE, model="whisper-1", extra_body=None, language="en", **fields):
        body = {**ONCE, **(extra_body or {})}
        if language:
            fields["language"] = language
        return client.audio.transcriptions.create(file=file, model=model, extra_body=body, **fields)

    return create


@pytest.fixture(scope="module")
def expected(model):
    return transcribe(model, WAV, language="en", **ONCE_HERE)


def test_json(create, expected) -> None:
    found = create()
    assert found.text == expected["text"].strip()
    assert (found.usage.type, found.usage.seconds) == ("duration", 2.5)
    assert found.model_dump(exclude_unset=True).keys() == {"text", "usage"}


def test_text_and_subtitles_are_raw(create, server, expected) -> None:
    assert create(response_format="text") == expected["text"].strip() + "\n"
    for form, kind in [("srt", "application/x-subrip"), ("vtt", "text/vtt")]:
        assert create(response_format=form) == WRITERS[form](expected)
        fields = {**ONCE, "model": "small", "response_format": form, "language": "en"}
        raw = server.http.post("/v1/audio/transcriptions", data=fields, files={"file": FILE})
        assert raw.headers["content-type"] == f"{kind}; charset=utf-8"


def test_verbose_json_has_the_references_fields(create, expected) -> None:
    found = create(response_format="verbose_json")
    assert (found.task, found.language, found.duration) == ("transcribe", "english", 2.5)
    assert [segment.model_dump() for segment in found.segments] == expected["segments"]
    assert all(segment.model_dump().keys() == REFERENCE_KEYS for segment in found.segments)
    assert "words" not in found.model_fields_set


@pytest.mark.parametrize("name", ["timestamp_granularities", "timestamp_granularities[]"])
def test_words_come_where_they_are_asked_for(server, model, name) -> None:
    data = {**ONCE, "model": "small", "language": "en", "response_format": "verbose_json", name: ["word", "segment"]}
    found = server.http.post("/v1/audio/transcriptions", data=data, files={"file": FILE}).json()
    expected = transcribe(model, WAV, language="en", word_timestamps=True, **ONCE_HERE)
    words = [word for segment in expected["segments"] for word in segment["words"]]
    assert found["words"] == [{**word, "word": word["word"].strip()} for word in words]
    assert all(segment.keys() == REFERENCE_KEYS for segment in found["segments"])


def test_log_probabilities_of_tokens(create, expected, model) -> None:
    found = create(include=["logprobs"])
    text = bytes(int(byte) for token in found.logprobs for byte in token.bytes)
    assert text.decode(errors="replace").strip() == found.text
    ids = [token for segment in expected["segments"] for token in segment["tokens"]]
    assert len(found.logprobs) == len(model.tokenizer.text_tokens(ids))
    assert all(token.logprob <= 0 for token in found.logprobs)


def test_speakers_are_those_of_the_channels(create, server) -> None:
    found = create(file=("talk.wav", STEREO), response_format="diarized_json", known_speaker_names=["Ann", "Ben"])
    assert found.task == "transcribe"
    assert {segment.speaker for segment in found.segments} == {"Ann"}  # the other channel is silent
    assert {s.speaker for s in create(file=("talk.wav", STEREO), response_format="diarized_json").segments} == {"A"}
    with pytest.raises(openai.BadRequestError, match=r"1 channel.*give a stereo recording"):
        create(response_format="diarized_json")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # OpenAI ends its own translations
def test_a_translation(client, model) -> None:
    body = {**ONCE, "language": "de"}
    found = client.audio.translations.create(file=FILE, model="small", response_format="verbose_json", extra_body=body)
    expected = transcribe(model, WAV, language="de", task="translate", **ONCE_HERE)
    assert (found.text, found.language) == (expected["text"].strip(), "english")
    assert client.audio.translations.create(file=FILE, model="small", extra_body=body).text == found.text


@pytest.mark.parametrize("form", ["json", "verbose_json", "diarized_json"])
def test_the_deltas_of_a_stream_are_its_text(create, form) -> None:
    more = {} if form == "diarized_json" else {"include": ["logprobs"], "timestamp_granularities": ["word"]}
    fields = {"file": ("talk.wav", STEREO), "response_format": form, **more}
    events = list(create(stream=True, **fields))
    deltas = [event for event in events if event.type == "transcript.text.delta"]
    segments = [event for event in events if event.type == "transcript.text.segment"]
    assert [event.type for event in events].count("transcript.text.done") == 1
    done = events[-1]
    assert done.type == "transcript.text.done"
    assert "".join(event.delta for event in deltas) == done.text
    assert "".join(event.text for event in segments).replace(" ", "") == done.text.replace(" ", "")
    assert len(segments) > 1
    assert done.usage.total_tokens == done.usage.input_tokens + done.usage.output_tokens
    assert [language.code for language in done.languages] == ["en"]
    if more:
        tokens = [token.model_dump() for event in deltas for token in event.logprobs]
        assert [token.model_dump() for token in done.logprobs] == tokens


def test_a_stream_ends_with_done(server) -> None:
    data = {**ONCE, "model": "small", "language": "en", "stream": "True"}
    with server.http.stream("POST", "/v1/audio/transcriptions", data=data, files={"file": FILE}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line for line in response.iter_lines() if line]
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["type"] == "transcript.text.done"


def test_a_failure_after_the_start_of_a_stream_is_raised_by_the_client(server, create, monkeypatch, caplog) -> None:
    from whisper_nnx.transcription.opening import Opened

    add, calls = Opened.add, []

    def fail(self, live, segments):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("the device burns")
        return add(self, live, segments)

    monkeypatch.setattr(Opened, "add", fail)
    monkeypatch.setattr(logging.getLogger("whisper_nnx.serving"), "propagate", True)
    seen = []
    events = create(stream=True)
    with pytest.raises(openai.APIError, match="its log says why"):
        seen.extend(event.type for event in events)
    assert seen[0] == "transcript.text.delta"
    assert "the device burns" in caplog.text


def test_many_at_once_with_the_asynchronous_client(server, create, expected) -> None:
    async def main() -> None:
        async with server.openai(openai.AsyncOpenAI) as client:

            async def one(i: int) -> str:
                fields = {"file": FILE, "model": "small", "language": "en", "extra_body": ONCE}
                if i % 2:
                    return (await client.audio.transcriptions.create(**fields)).text
                stream = await client.audio.transcriptions.create(**fields, stream=True)
                events = [event async for event in stream]
                return events[-1].text

            assert set(await asyncio.gather(*map(one, range(6)))) == {expected["text"].strip()}

    asyncio.run(main())


def test_models(client) -> None:
    assert [model.id for model in client.models.list()] == ["small", "whisper-1"]
    assert client.models.retrieve("small").object == "model"
    with pytest.raises(openai.NotFoundError, match="choose from small"):
        client.models.retrieve("large")


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"model": ""}, "model", "is missing"),
        ({"response_format": "docx"}, "response_format", "is not one of json, text, srt, vtt"),
        ({"beam_size": "0"}, "beam_size", "at least 1"),
        ({"beam_size": "99"}, "beam_size", "at most 16"),
        ({"vad_threshold": "0.5"}, "vad_threshold", "needs vad_filter=true"),
        ({"temperature": "hot"}, "temperature", "must be a number"),
        ({"temperature": "nan"}, "temperature", "must be a number"),
        ({"stream": "perhaps"}, "stream", "neither true nor false"),
        ({"language": "Klingon"}, "language", "unknown to Whisper"),
        ({"timestamp_granularities[]": "line"}, "timestamp_granularities", "is not one of word, segment"),
        ({"stream": "1", "response_format": "srt"}, "stream", "sends events"),
        ({"suppress_regex": "(a+)+b"}, "suppress_regex", "too long"),
        ({"regex": "(a"}, "regex", "not a valid regular expression"),
        ({"grammar": "/etc/passwd"}, "grammar", "neither an existing file nor a grammar"),
        ({"regex": "a" * 30_000}, "regex", "at most 20000"),
        ({"clip_timestamps": ",".join(["0,80000"] * 4)}, "clip_timestamps", "longer than max_hours"),
        ({"max_hours": "1000"}, "max_hours", "at most 24"),
        ({"response_format": "srt", "max_line_width": "20"}, "max_line_width", "needs word_timestamps=true"),
        ({"chunking_strategy": "never"}, "chunking_strategy", "neither auto"),
        ({"chunking_strategy": '{"type": "server_vad", "threshold": 7}'}, "vad_threshold", "probability"),
        ({"prompt": "one", "initial_prompt": "two"}, "prompt", "drop one"),
        ({"temperature_increment_on_fallback": "1e-9"}, "temperature_increment_on_fallback", "at least"),
    ],
)  # fmt: skip
def test_a_bad_option_is_named(server, fields, param, message) -> None:
    data = {"model": "small", **fields}
    response = server.http.post("/v1/audio/transcriptions", data=data, files={"file": FILE})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert message in error["message"]
    assert error.keys() == {"message", "type", "param", "code"}


def test_what_cannot_be_read_is_a_bad_request(create, server) -> None:
    for data, message in [(b"nonsense", "x.wav cannot be read"), (b"", "x.wav is empty")]:
        with pytest.raises(openai.BadRequestError, match=message):
            create(file=("../x.wav", data))
    for files, data, message in [({}, {"file": "text"}, "send it as a file"), ({"music": FILE}, {}, "is missing")]:
        response = server.http.post("/v1/audio/transcriptions", data=data, files=files or {"other": ("", b"")})
        assert response.status_code == 400
        assert message in response.json()["error"]["message"]
    response = server.http.post("/v1/audio/transcriptions", json={"model": "small"})
    assert (response.status_code, response.json()["error"]["type"]) == (415, "invalid_request_error")


def test_unknown_models_routes_and_methods(create, server) -> None:
    with pytest.raises(openai.NotFoundError, match="'large' does not exist; choose from small") as error:
        create(model="large")
    assert error.value.code == "model_not_found"
    for path, status in [("/v1/nothing", 404), ("/v1/audio/translations", 405)]:
        response = server.http.get(path)
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_what_has_no_effect_is_named_in_a_header(server, model) -> None:
    data = {**ONCE, "model": "small", "language": "en", "beam_siz": "5", "num_beams": "2", "max_line_width": "20"}
    data |= {"known_speaker_references[]": "data:audio/wav;base64,AA", "größe": "1"}
    headers = server.http.post("/v1/audio/transcriptions", data=data, files={"file": FILE}).headers
    for part in [
        "'beam_siz' has no effect; did you mean beam_size?",
        "it is beam_size here",
        "max_line_width: for srt",
    ]:
        assert part in headers["x-warning"]
    assert "gr\\xf6\\xdfe" in headers["x-warning"]
    assert "known_speaker_references has no effect" in headers["x-warning"]


def test_the_options_reach_the_recording(create, model) -> None:
    options = {"beam_size": 2, "max_new_tokens": 6, "without_timestamps": True, "offset_s": 0.5, "suppress_tokens": "3"}
    options |= {"bias": "two, one", "bias_weight": 6.0}
    expected = transcribe(model, WAV, language="de", hotwords="one, two", initial_prompt="the", **options, **ONCE_HERE)
    body = {**options, "keywords": ["one", "two"], "without_timestamps": "Yes"}
    assert create(language="German", prompt="the", extra_body=body).text == expected["text"].strip()
    expected = transcribe(model, WAV, allowed_languages=["de", "fr"], temperature=0.7, **ONCE_HERE)
    found = create(language=None, languages=["de", "fr"], temperature=0.7, response_format="verbose_json")
    assert found.text == expected["text"].strip()
    assert {segment.temperature for segment in found.segments} == {0.7}
    assert found.language in ("german", "french")


def test_every_option_is_a_field_and_documented(server) -> None:
    spec = server.http.get("/openapi.json").json()
    body = spec["paths"]["/v1/audio/transcriptions"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    fields = body["properties"]
    assert body["required"] == ["file", "model"]
    assert {"beam_size", "vad_filter", "vad_threshold", "hotwords", "max_repeats", "seed", "max_len"} <= fields.keys()
    python_names = TranscribeOptions.of.__doc__ and {
        name
        for kind in (LongformOptions, FallbackOptions, DecodingOptions, TranscribeOptions)
        for name in kind.__dataclass_fields__
    }
    left_out = python_names - RECORDING_FIELDS.keys()
    assert left_out == {
        "longform", "fallback", "decoding", "temperatures", "sampling_rate", "fp16", "vad_parameters", "prompt", "lm"
    }  # fmt: skip
    assert all(field.read for field in OPTION_FIELDS.values())
    assert fields["beam_size"]["type"] == "integer"
    page = server.http.get("/docs").text
    assert all(f"<code>{name}</code>" in page for name in fields)
    assert not re.search(r"https?://|<script>", page)  # nothing from elsewhere, nothing inline
    assert server.http.get("/docs").status_code == 200


def test_voice_activity(create, server, monkeypatch) -> None:
    loud = np.frombuffer(WAV[44:], "<i2")
    assert loud.any()
    found = create(chunking_strategy={"type": "server_vad", "threshold": 0.99, "silence_duration_ms": 100})
    assert found.text == ""  # noise is no speech
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(openai.BadRequestError, match=r"pip install .*whisper-nnx\[vad\]") as error:
        create(chunking_strategy="auto")
    assert error.value.code == "not_installed"


@pytest.mark.real
def test_real_speech(real_tiny_en, real_speech) -> None:
    model = load_model(real_tiny_en)
    path = real_speech("en_libri_5s.flac")
    expected = transcribe(model, path, language="en")
    with started({"tiny.en": model}) as server:
        client = server.openai()
        with path.open("rb") as file:
            found = client.audio.transcriptions.create(file=file, model="whisper-1", response_format="verbose_json")
        assert found.text == expected["text"].strip()
        assert [segment.model_dump() for segment in found.segments] == expected["segments"]
        with path.open("rb") as file:
            events = list(client.audio.transcriptions.create(file=file, model="tiny.en", stream=True))
        assert events[-1].text == found.text

"""The routes of other servers: whisper-asr-webservice's (Bazarr, subtitle tools) and whisper.cpp's."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from whisper_nnx.output.writers import WRITERS
from whisper_nnx.serving.asked import SUBTITLES, Asked
from whisper_nnx.serving.errors import bad_request
from whisper_nnx.serving.fields import (
    INCREMENT,
    OPTION_FIELDS,
    SUBTITLE_FIELDS,
    Fields,
    schema,
    subtitle_options,
    temperatures,
    transcribe_options,
)
from whisper_nnx.serving.job import Job
from whisper_nnx.serving.openai_api import ERROR_RESPONSES, FILE, answer, form_body
from whisper_nnx.serving.responses import as_verbose_json, json_response, language_name, text_response, to_json, words
from whisper_nnx.serving.run import receive_form, serving_of
from whisper_nnx.serving.uploads import Form, Upload

router = APIRouter()
ASR_OUTPUTS = ("txt", "vtt", "srt", "tsv", "json")
CPP_FORMATS = ("json", "text", "srt", "vtt", "verbose_json")
_HEADERLESS = {"encode": {"type": "boolean", "default": True}}
_ASR_OPTIONS = ("task", "language", "initial_prompt", "vad_filter", "word_timestamps", "diarize", "beam_size")
_ASR_QUERY = {
    "output": {"type": "string", "enum": list(ASR_OUTPUTS), "default": "txt"},
    **_HEADERLESS,
    "model": {"type": "string", "default": "whisper-1"},
    **{name: schema(OPTION_FIELDS[name]) for name in _ASR_OPTIONS},
}
_ASR_BODY = form_body({"audio_file": FILE}, ["audio_file"])
_IGNORED = ("video_file", "min_speakers", "max_speakers")  # of Bazarr, a name for its log; of other diarization
# whisper.cpp's fields, with our names of them.
_CPP_NAMES = {
    "prompt": "initial_prompt",
    "logprob_thold": "logprob_threshold",
    "no_speech_thold": "no_speech_threshold",
    "entropy_thold": "entropy_threshold",
    "no_timestamps": "without_timestamps",
    "vad": "vad_filter",
    "temperature_inc": INCREMENT,
}
_CPP_MILLISECONDS = {"offset_t": "offset_s", "duration": "duration_s"}
_CPP_UNSET = {"beam_size": "-1", "best_of": "-1", "max_context": "-1", "max_len": "0", "duration": "0"}
_CPP_SHOWN = ("language", "temperature", "beam_size", "best_of", "max_context", "hotwords", "word_timestamps")


def _parameters(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {"parameters": [{"name": name, "in": "query", "schema": of} for name, of in properties.items()]}


@router.post(
    "/asr",
    openapi_extra={**_ASR_BODY, **_parameters(_ASR_QUERY)},
    responses=ERROR_RESPONSES,
    summary="Transcribe, as whisper-asr-webservice does",
)
async def asr(request: Request) -> Response:
    """Any other option of a transcription may be a parameter, too. `encode=false`: 16 kHz mono s16le without header."""
    form = await receive_form(request, request.query_params.get("model", ""))

    def asked() -> tuple[Asked, Upload]:
        fields = Fields([*form.fields, *request.query_params.multi_items()])
        audio = _audio(form, fields)
        output = fields.take_choice("output", ASR_OUTPUTS, "txt")
        return _asked(fields, request, output, ignored=_IGNORED), audio

    return await answer(request, form, asked, _asr_response)


def _asr_response(job: Job, asked: Asked, headers: Mapping[str, str]) -> Response:
    named = {**headers, "Asr-Engine": "whisper_nnx"}
    if asked.format == "json":
        return Response(to_json(job.transcript), media_type="application/json", headers=named)
    content = WRITERS[asked.format](job.transcript, **asked.subtitles)
    return text_response(asked.format, content, named)


@router.post(
    "/detect-language",
    openapi_extra={**_ASR_BODY, **_parameters(_HEADERLESS)},
    responses=ERROR_RESPONSES,
    summary="Detect the language, as whisper-asr-webservice does",
)
async def detect_language(request: Request) -> Response:
    form = await receive_form(request, request.query_params.get("model", ""))

    def asked() -> tuple[Asked, Upload]:
        fields = Fields([*form.fields, *request.query_params.multi_items()])
        audio = _audio(form, fields)
        nothing = [("clip_timestamps", "0,0")]  # the language is that of the first 30 s
        fields = Fields([*((name, value) for name in ("model",) if (value := fields.take(name))), *nothing])
        return _asked(fields, request, "json"), audio

    return await answer(request, form, asked, _language_response)


def _language_response(job: Job, asked: Asked, headers: Mapping[str, str]) -> Response:
    code, probabilities = job.language, job.opened.language_probs
    body = {"detected_language": language_name(code), "language_code": code}
    return json_response({**body, "confidence": float(probabilities.get(code, 1.0))}, headers)


@router.post(
    "/inference",
    openapi_extra=form_body(
        {
            "file": FILE,
            "response_format": {"type": "string", "enum": list(CPP_FORMATS), "default": "json"},
            "temperature_inc": {"type": "number", "default": 0.2},
            "prompt": {"type": "string"},
            "translate": {"type": "boolean", "default": False},
            **{name: schema(OPTION_FIELDS[name]) for name in _CPP_SHOWN},
        },
        ["file"],
    ),
    responses=ERROR_RESPONSES,
    summary="Transcribe, as whisper.cpp's server does",
)
async def inference(request: Request) -> Response:
    form = await receive_form(request)

    def asked() -> tuple[Asked, Upload]:
        fields = Fields(_from_cpp(form.fields))
        output = fields.take_choice("response_format", CPP_FORMATS, "json")
        return _asked(fields, request, output, cpp=True), form.file("file")

    return await answer(request, form, asked, _cpp_response)


def _cpp_response(job: Job, asked: Asked, headers: Mapping[str, str]) -> Response:
    transcript = job.transcript
    lines = "".join(f"{segment['text']}\n" for segment in transcript["segments"])
    if asked.format == "text":
        return text_response("text", WRITERS["txt"](transcript) if asked.options.diarize else lines, headers)
    if asked.format in SUBTITLES:
        return text_response(asked.format, WRITERS[asked.format](transcript, **asked.subtitles), headers)
    if asked.format == "json":
        return json_response({"text": lines}, headers)
    body = as_verbose_json(job, asked)
    probabilities = job.opened.language_probs
    detected = {
        "detected_language": language_name(job.language),
        "detected_language_probability": float(probabilities.get(job.language, 1.0)),
        "language_probabilities": {code: float(value) for code, value in probabilities.items()},
    }
    if asked.words:
        for shown, segment in zip(body["segments"], transcript["segments"], strict=True):
            shown["words"] = words([segment])
    return json_response({**body, "text": lines, **detected}, headers)


def _from_cpp(fields: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """whisper.cpp's fields by our names."""
    found = []
    for name, value in fields:
        value = value.strip() if name != "prompt" else value
        if _CPP_UNSET.get(name) == value or not value:
            continue
        if name in _CPP_MILLISECONDS:
            try:
                found.append((_CPP_MILLISECONDS[name], str(int(value) / 1000)))
            except ValueError:
                raise bad_request(f"{name}={value[:100]!r} must be a whole number of ms", name) from None
        else:
            found.append((_CPP_NAMES.get(name, name), value))
    return found


def _asked(fields: Fields, request: Request, output: str, ignored: Iterable[str] = (), cpp: bool = False) -> Asked:
    """What any of these routes asks for, without streams."""
    settings = serving_of(request).settings
    model = fields.take("model") or ""
    for name in ignored:
        fields.take(name)
    translate, no_context = (fields.take_flag(name) if cpp else False for name in ("translate", "no_context"))
    values = fields.take_options(OPTION_FIELDS)
    subtitles = fields.take_options(SUBTITLE_FIELDS)
    if (ladder := temperatures(values.pop("temperature", None), fields.take(INCREMENT))) is not None:
        values["temperature"] = ladder
    if translate:
        values["task"] = "translate"
    if no_context:
        values["condition_on_previous_text"] = False
    warnings = []
    unused = [name for name in values if name.startswith("vad_") and name != "vad_filter"]
    if unused and not values.get("vad_filter"):
        warnings.append(f"{', '.join(unused)}: no effect without {'vad' if cpp else 'vad_filter'}=true")
        values = {name: value for name, value in values.items() if name not in unused}
    if subtitles and output not in SUBTITLES:
        warnings.append(f"{', '.join(subtitles)}: for srt and vtt; no effect on {output}")
        subtitles = {}
    if subtitles.get("max_len") and not subtitles.get("split_on_word"):
        values["token_timestamps"] = True
    elif any(subtitles.values()):
        values["word_timestamps"] = True
    options = transcribe_options(values, settings)
    if not subtitles.get("max_len") and "split_on_word" in subtitles:
        subtitles = {name: value for name, value in subtitles.items() if name != "split_on_word"}
    warnings += [*options.doubts, *fields.warnings([*OPTION_FIELDS, *SUBTITLE_FIELDS])]
    chosen = Asked(model, options, output, words=options.longform.word_timestamps, warnings=warnings)
    return replace(chosen, subtitles=subtitle_options(subtitles, options))


def _audio(form: Form, fields: Fields) -> Upload:
    """The file; without a header of its own it gets one."""
    audio = form.file("audio_file")
    encode = fields.take("encode")
    fields_of_flag = Fields([("encode", encode)]) if encode else None
    if fields_of_flag is None or fields_of_flag.take_flag("encode"):
        return audio
    start = audio.read(4)
    audio.seek(0)
    if start != b"RIFF":
        size = audio.size // 2 * 2
        length = min(size, 0xFFFFFFFF - 36)
        audio.head = struct.pack(
            "<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + length, b"WAVE", b"fmt ", 16, 1, 1, 16000, 32000, 2, 16, b"data", length
        )
    return audio

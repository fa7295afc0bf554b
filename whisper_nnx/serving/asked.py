"""What a request asks for, from the fields of OpenAI's API and those of our options."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from whisper_nnx.serving.errors import bad_request
from whisper_nnx.serving.fields import (
    INCREMENT,
    OPTION_FIELDS,
    SUBTITLE_FIELDS,
    Fields,
    not_one_of,
    subtitle_options,
    temperatures,
    transcribe_options,
)
from whisper_nnx.serving.settings import ServerSettings
from whisper_nnx.transcription.options import TranscribeOptions

FORMATS = ("json", "text", "srt", "vtt", "verbose_json", "diarized_json")
TRANSLATION_FORMATS = FORMATS[:-1]
SUBTITLES = ("srt", "vtt")
GRANULARITIES = ("word", "segment")
# Fields of OpenAI's API, with what /docs shows of them.
OPENAI_FIELDS: dict[str, dict[str, Any]] = {
    "model": {"type": "string", "description": "A name of /v1/models; whisper-1 is the first one."},
    "response_format": {
        "type": "string",
        "enum": list(FORMATS),
        "default": "json",
        "description": "verbose_json has segments and their times, diarized_json the speakers of a stereo recording.",
    },
    "prompt": {"type": "string", "description": "Text before the first window (initial_prompt): names, spelling."},
    "stream": {"type": "boolean", "default": False, "description": "Send the text as it is decoded, as events."},
    "timestamp_granularities[]": {
        "type": "array",
        "items": {"type": "string", "enum": list(GRANULARITIES)},
        "description": "word adds words and their times to verbose_json.",
    },
    "include[]": {
        "type": "array",
        "items": {"type": "string", "enum": ["logprobs"]},
        "description": "logprobs adds the log-probability of each token.",
    },
    "chunking_strategy": {
        "type": "string",
        "description": '"auto" transcribes only speech (vad_filter); or an object with type "server_vad", threshold, '
        "prefix_padding_ms and silence_duration_ms, as JSON or in bracketed fields.",
    },
    "keywords[]": {"type": "array", "items": {"type": "string"}, "description": "Words that may occur (hotwords)."},
    "languages[]": {"type": "array", "items": {"type": "string"}, "description": "allowed_languages, as a list."},
    "known_speaker_names[]": {
        "type": "array",
        "items": {"type": "string"},
        "description": "Names of the speakers of the left and the right channel, for diarized_json.",
    },
    "known_speaker_references[]": {"type": "array", "items": {"type": "string"}, "description": "Has no effect."},
    INCREMENT: {"type": "string", "description": "Added to the temperature for each retry, up to 1; none: no retry."},
}
_CHUNKING = {
    "threshold": "vad_threshold",
    "prefix_padding_ms": "vad_speech_pad_ms",
    "silence_duration_ms": "vad_min_silence_duration_ms",
}


@dataclass
class Asked:
    """A request.

    Attributes:
      model: its name; "" is the first one.
      options: of the recording.
      format: of the response.
      stream: whether events are sent.
      words: whether verbose_json has words.
      logprobs: whether json has the log-probabilities of the tokens.
      speakers: names of the speakers of the channels.
      subtitles: fields of SubtitleOptions.
      warnings: what the client should know.
    """

    model: str
    options: TranscribeOptions
    format: str = "json"
    stream: bool = False
    words: bool = False
    logprobs: bool = False
    speakers: tuple[str, ...] = ()
    subtitles: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def task(self) -> str:
        return self.options.decoding.task


def ask(fields: Fields, settings: ServerSettings, translate: bool = False) -> Asked:
    """From the fields of a request to OpenAI's API. Raises ApiError."""
    if not (model := fields.take("model")):
        raise bad_request("the field 'model' is missing; /v1/models lists the names", "model")
    form = fields.take_choice("response_format", TRANSLATION_FORMATS if translate else FORMATS, "json")
    stream = fields.take_flag("stream")
    granularities = _chosen(fields, "timestamp_granularities", GRANULARITIES)
    include = _chosen(fields, "include", ["logprobs"])
    speakers, references = fields.take_list("known_speaker_names", split=False), fields.take("known_speaker_references")
    values = _chunking(fields) | fields.take_options(OPTION_FIELDS)
    _add_openai_options(values, fields)
    warnings = []
    if translate and values.setdefault("task", "translate") != "translate":
        raise bad_request("task=transcribe is for /v1/audio/transcriptions; drop it", "task")
    if form == "diarized_json":
        values["diarize"] = True
    if "word" in granularities:
        if form == "verbose_json":
            values["word_timestamps"] = True
        else:
            warnings.append(f"timestamp_granularities needs response_format=verbose_json, not {form}; no effect")
    logprobs = "logprobs" in include
    if logprobs:
        if form in ("text", "srt", "vtt"):
            raise bad_request(f"include=logprobs goes with response_format=json, not {form}; drop one", "include")
        values["token_timestamps"] = True
    subtitles = fields.take_options(SUBTITLE_FIELDS)
    if subtitles and form not in SUBTITLES:
        warnings.append(f"{', '.join(subtitles)}: for srt and vtt; no effect on response_format={form}")
        subtitles = {}
    if stream and form in SUBTITLES:
        raise bad_request(f"stream=true sends events, not {form}; drop it or choose json or verbose_json", "stream")
    if references:
        warnings.append("known_speaker_references has no effect: speakers are distinguished by the channels of stereo")
    if speakers and form != "diarized_json":
        warnings.append(f"known_speaker_names is for diarized_json; no effect on response_format={form}")
    options = transcribe_options(values, settings)
    warnings += [*options.doubts, *fields.warnings([*OPTION_FIELDS, *SUBTITLE_FIELDS])]
    return Asked(
        model,
        options,
        form,
        stream,
        options.longform.word_timestamps,
        logprobs,
        tuple(speakers),
        subtitle_options(subtitles, options),
        warnings,
    )


def _chosen(fields: Fields, name: str, choices: Any) -> list[str]:
    given = fields.take_list(name)
    for value in given:
        if value not in choices:
            raise not_one_of(name, value, choices)
    return given


def _add_openai_options(values: dict[str, Any], fields: Fields) -> None:
    """OpenAI's names of some of our options."""
    ours = {
        "initial_prompt": ("prompt", fields.take("prompt")),
        "hotwords": ("keywords", ", ".join(fields.take_list("keywords", split=False))),
        "allowed_languages": ("languages", ",".join(fields.take_list("languages"))),
    }
    for name, (theirs, text) in ours.items():
        if not text:
            continue
        if values.get(name):
            raise bad_request(f"{theirs} and {name} are the same; drop one", theirs)
        values[name] = OPTION_FIELDS[name].read(text)
    ladder = temperatures(values.pop("temperature", None), fields.take(INCREMENT))
    if ladder is not None:
        values["temperature"] = ladder


def _chunking(fields: Fields) -> dict[str, Any]:
    """Options of voice detection from chunking_strategy: "auto", JSON, or its parts in brackets."""
    parts: dict[str, Any] = {}
    for name in ("type", *_CHUNKING):
        if (value := fields.take(f"chunking_strategy[{name}]")) is not None:
            parts[name] = value
    text = (fields.take("chunking_strategy") or "").strip()
    if text.startswith("{"):
        try:
            parts |= json.loads(text)
        except (ValueError, RecursionError):
            raise bad_request(f"chunking_strategy={text[:100]!r} is not valid JSON", "chunking_strategy") from None
    elif text not in ("", "auto", "none", "null"):
        message = f"chunking_strategy={text[:100]!r} is neither auto nor an object with type server_vad"
        raise bad_request(message, "chunking_strategy")
    if not parts and text != "auto":
        return {}
    if (kind := parts.pop("type", "server_vad")) != "server_vad":
        raise not_one_of("chunking_strategy[type]", kind, ["server_vad"])
    if unknown := [name for name in parts if name not in _CHUNKING]:
        raise not_one_of("chunking_strategy", unknown[0], ["type", *_CHUNKING])
    read = {ours: OPTION_FIELDS[ours].read(str(parts[name])) for name, ours in _CHUNKING.items() if name in parts}
    return {"vad_filter": True, **read}

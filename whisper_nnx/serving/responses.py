"""Responses in OpenAI's formats, from transcripts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastapi.responses import Response

from whisper_nnx.audio.features import POSITIONS_PER_SECOND
from whisper_nnx.output.results import Segment
from whisper_nnx.output.writers import WRITERS
from whisper_nnx.serving.asked import Asked
from whisper_nnx.serving.job import Job
from whisper_nnx.text.languages import LANGUAGES

_REFERENCE_KEYS = (
    "id",
    "seek",
    "start",
    "end",
    "text",
    "tokens",
    "temperature",
    "avg_logprob",
    "compression_ratio",
    "no_speech_prob",
)
# Of segments, where an option asks for them: speakers, languages, tokens.
_EXTRA_KEYS = ("speaker", "speaker_turn", "language", "token_details")
_MEDIA_TYPES = {
    "text": "text/plain",
    "txt": "text/plain",
    "srt": "application/x-subrip",
    "vtt": "text/vtt",
    "tsv": "text/tab-separated-values",
}


def to_json(content: Any) -> bytes:
    """Strict JSON: what is not finite is null."""
    try:
        return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(errors="replace")
    except ValueError:
        return to_json(_finite(content))


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    return [_finite(value) for value in content] if isinstance(content, list | tuple) else content


def json_response(content: Any, headers: Mapping[str, str] | None = None) -> Response:
    return Response(to_json(content), media_type="application/json", headers=dict(headers or {}))


def text_response(form: str, content: str, headers: Mapping[str, str] | None = None) -> Response:
    """form: text, or a name of `WRITERS`."""
    return Response(
        content.encode(errors="replace"),
        media_type=f"{_MEDIA_TYPES[form]}; charset=utf-8",
        headers=dict(headers or {}),
    )


def warning_headers(warnings: Iterable[str]) -> dict[str, str]:
    """`X-Warning`, in one line of ASCII."""
    text = "; ".join(" ".join(warning.split()) for warning in dict.fromkeys(warnings))
    return {"X-Warning": text.encode("ascii", "backslashreplace").decode()[:4000]} if text else {}


def response(job: Job, asked: Asked, headers: Mapping[str, str]) -> Response:
    """Of a job that is done."""
    if asked.format in ("json", "verbose_json", "diarized_json"):
        make = {"json": as_json, "verbose_json": as_verbose_json, "diarized_json": as_diarized_json}[asked.format]
        return json_response(make(job, asked), headers)
    transcript = job.transcript
    if asked.format == "text":
        labeled = any("speaker" in segment or "speaker_turn" in segment for segment in transcript["segments"])
        content = WRITERS["txt"](transcript) if labeled else f"{transcript['text'].strip()}\n"
    else:
        content = WRITERS[asked.format](transcript, **asked.subtitles)
    return text_response(asked.format, content, headers)


def as_json(job: Job, asked: Asked) -> dict[str, Any]:
    transcript = job.transcript
    body: dict[str, Any] = {"text": transcript["text"].strip()}
    if asked.logprobs:
        body["logprobs"] = logprobs(job, transcript["segments"])
    return {**body, "usage": seconds_used(job)}


def as_verbose_json(job: Job, asked: Asked) -> dict[str, Any]:
    transcript = job.transcript
    segments = transcript["segments"]
    body: dict[str, Any] = {
        "task": asked.task,
        "language": language_name("en" if asked.task == "translate" else job.language),
        "duration": float(job.duration_s),
        "text": transcript["text"].strip(),
        "segments": [verbose_segment(segment) for segment in segments],
    }
    if asked.words:
        body["words"] = words(segments)
    if asked.logprobs:
        body["logprobs"] = logprobs(job, segments)
    if "alternatives" in transcript:
        body["alternatives"] = transcript["alternatives"]
    return {**body, "usage": seconds_used(job)}


def as_diarized_json(job: Job, asked: Asked) -> dict[str, Any]:
    transcript = job.transcript
    body: dict[str, Any] = {
        "task": "transcribe",
        "duration": float(job.duration_s),
        "text": transcript["text"].strip(),
        "segments": [diarized_segment(segment, asked) for segment in transcript["segments"]],
    }
    if asked.logprobs:
        body["logprobs"] = logprobs(job, transcript["segments"])
    return {**body, "usage": seconds_used(job)}


def verbose_segment(segment: Segment) -> dict[str, Any]:
    return {key: segment[key] for key in (*_REFERENCE_KEYS, *_EXTRA_KEYS) if key in segment}  # type: ignore[literal-required]


def words(segments: Sequence[Segment]) -> list[dict[str, Any]]:
    """Without the spaces around them."""
    return [{**word, "word": word["word"].strip()} for segment in segments for word in segment.get("words", [])]


def diarized_segment(segment: Segment, asked: Asked) -> dict[str, Any]:
    return {
        "type": "transcript.text.segment",
        "id": f"seg_{segment['id']}",
        "start": segment["start"],
        "end": segment["end"],
        "text": segment["text"].strip(),
        "speaker": speaker_name(segment, asked),
    }


def speaker_name(segment: Segment, asked: Asked) -> str:
    """That of the channel; A and B where they are not known, "?" where neither channel is louder."""
    label = segment.get("speaker", "")
    return [*asked.speakers, *"AB"[len(asked.speakers) :]][int(label)] if label in ("0", "1") else label


def logprobs(job: Job, segments: Sequence[Segment]) -> list[dict[str, Any]]:
    """Token, log-probability and bytes of each text token."""
    if not job.opened.lives:
        return []
    tokenizer = job.opened.lives[0].recording.tokenizer
    found = []
    for segment in segments:
        for token in segment.get("token_details", []):
            if tokenizer.text_tokens([token["id"]]):
                (raw,) = tokenizer.token_bytes([token["id"]])
                found.append({"token": token["text"], "logprob": token["logprob"], "bytes": list(raw)})
    return found


def language_name(code: str) -> str:
    return LANGUAGES.get(code, code)


def seconds_used(job: Job) -> dict[str, Any]:
    return {"type": "duration", "seconds": float(job.duration_s)}


def tokens_used(job: Job) -> dict[str, Any]:
    """Encoder positions of the audio, and sampled tokens; the event that ends a stream has no other form of usage."""
    audio = math.ceil(job.duration_s * POSITIONS_PER_SECOND)
    text = sum(len(segment["tokens"]) for segment in job.transcript["segments"])
    details = {"audio_tokens": audio, "text_tokens": 0}
    used = {"input_tokens": audio, "output_tokens": text, "total_tokens": audio + text, "input_token_details": details}
    return {"type": "tokens", **used, "seconds": float(job.duration_s)}

"""Requests with grammars and lists of phrases: their texts are those of `transcribe`, together and alone."""

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.serving.server import recording, started
from tests.small import quick_compilation as quick_compilation
from tests.small import small_model
from whisper_nnx import transcribe

ENDLESS = r"(one|two)( and (one|two))*!"
RULES = 'root ::= " a"\nother ::= " the " ("one" | "two")+ "."'
# Form fields, options where they differ from these, and what the text of each window matches.
REQUESTS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"choices[]": ["one, two", "the one"]}, {"choices": ["one, two", "the one"]}, "one, two|the one"),
    ({"choices": "two,and"}, {"choices": ["two", "and"]}, "two|and"),
    ({"regex": ENDLESS}, {}, ENDLESS),
    ({"grammar": RULES, "grammar_rule": "other"}, {}, r"the (one|two)+\."),
    ({"grammar": 'root ::= " a" root? "n" | " a"'}, {}, "a( a)*n*"),  # parsed on the host
    ({"json_schema": '{"type": "boolean"}'}, {}, "true|false"),
    ({"bias[]": ["one, two", "and"], "bias_weight": "6"}, {"bias": ["one, two", "and"], "bias_weight": 6.0}, ".*"),
    ({}, {}, ".*"),
]
WITHOUT = dict.fromkeys(("logprob_threshold", "no_speech_threshold", "compression_ratio_threshold"))
COMMON = {"model": "small", "language": "de", "temperature": "0", "response_format": "verbose_json"}


def windows_of(result: dict[str, Any]) -> list[str]:
    """The text of each window, without the spaces around it."""
    texts: dict[int, str] = {}
    for segment in result["segments"]:
        texts[segment["seek"]] = texts.get(segment["seek"], "") + segment["text"]
    return [text.strip() for text in texts.values()]


def test_grammars_and_phrases_work_as_in_transcribe_in_any_company() -> None:
    model, audio = small_model(decoder_layers=1), recording(1.7)
    with started({"small": model}, sizes=(2,)) as server, ThreadPoolExecutor(len(REQUESTS)) as pool:

        def post(fields: dict[str, Any]) -> list[str]:
            data = {**COMMON, **dict.fromkeys(WITHOUT, "none"), **fields}
            answer = server.http.post("/v1/audio/transcriptions", data=data, files={"file": ("a.wav", audio)})
            assert answer.status_code == 200, answer.text
            return windows_of(answer.json())

        every = [fields for fields, *_ in REQUESTS]
        together, alone = list(pool.map(post, every)), list(map(post, every))
    sources = []
    for fields, changed, _ in REQUESTS:
        options = {name: value for name, value in fields.items() if name.removesuffix("[]") not in changed} | changed
        sources.append({"audio": audio, "temperature": 0.0, **WITHOUT, **options})
    expected = list(map(windows_of, transcribe(model, sources, language="de", batch_size=2)))
    assert together == alone == expected
    for (fields, _, pattern), texts in zip(REQUESTS, expected, strict=True):
        assert texts, fields
        assert all(re.fullmatch(pattern, text, re.DOTALL) for text in texts), fields
    assert expected[-1] != expected[-2]

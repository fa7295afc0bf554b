"""The options as editors and type checkers see them, for `**changes: Unpack[...]`.

Written by `python -m tests.transcription.test_changes` from the fields of the options classes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

from jax.sharding import Mesh

from whisper_nnx.audio.options import VadOptions
from whisper_nnx.model.whisper import Whisper


class DecodingChanges(TypedDict, total=False):
    """Fields of `DecodingOptions`."""

    task: str
    language: str | None
    temperature: float
    sample_len: int | None
    best_of: int | None
    beam_size: int | None
    patience: float | None
    length_penalty: float | None
    prompt: str | Sequence[int] | None
    prefix: str | Sequence[int] | None
    suppress_tokens: str | Sequence[int] | None
    suppress_blank: bool
    without_timestamps: bool
    max_initial_timestamp: float | None
    fp16: bool | None
    suppress_regex: str | None
    max_new_tokens: int | None
    max_repeats: int | None
    repetition_penalty: float
    no_repeat_ngram_size: int
    bias: str | Sequence[str | tuple[Any, ...] | Mapping[str, Any]] | None
    bias_weight: float
    lm: Callable[[Any], Any] | str | os.PathLike[str] | None
    lm_weight: float
    n_best: int
    tinydiarize: bool
    grammar: str | os.PathLike[str] | None
    grammar_rule: str
    grammar_penalty: float | None
    choices: Sequence[str] | None
    regex: str | None
    json_schema: str | Mapping[str, Any] | None


class RecordingChanges(TypedDict, total=False):
    """Options of a recording: all that `TranscribeOptions.of` takes."""

    temperature: float | Sequence[float]
    best_of: int | None
    beam_size: int | None
    patience: float | None
    n_best: int
    compression_ratio_threshold: float | None
    logprob_threshold: float | None
    entropy_threshold: float | None
    no_speech_threshold: float | None
    task: str
    language: str | None
    sample_len: int | None
    length_penalty: float | None
    prefix: str | Sequence[int] | None
    suppress_tokens: str | Sequence[int] | None
    suppress_blank: bool
    without_timestamps: bool
    max_initial_timestamp: float | None
    fp16: bool | None
    suppress_regex: str | None
    max_new_tokens: int | None
    max_repeats: int | None
    repetition_penalty: float
    no_repeat_ngram_size: int
    bias: str | Sequence[str | tuple[Any, ...] | Mapping[str, Any]] | None
    bias_weight: float
    lm: Callable[[Any], Any] | str | os.PathLike[str] | None
    lm_weight: float
    tinydiarize: bool
    grammar: str | os.PathLike[str] | None
    grammar_rule: str
    grammar_penalty: float | None
    choices: Sequence[str] | None
    regex: str | None
    json_schema: str | Mapping[str, Any] | None
    initial_prompt: str | None
    carry_initial_prompt: bool
    hotwords: str | None
    condition_on_previous_text: bool | None
    max_context: int | None
    clip_timestamps: str | Sequence[float]
    offset_s: float
    duration_s: float | None
    independent_clips: bool
    multilingual: bool
    word_timestamps: bool
    refine_word_times: bool
    token_timestamps: bool
    alignment_heads: int | Sequence[tuple[int, int]] | None
    prepend_punctuations: str
    append_punctuations: str
    hallucination_silence_threshold: float | None
    seed: int
    sampling_rate: float | None
    audio_track: int | None
    follow_timestamps: bool
    max_hours: float
    allowed_languages: Sequence[str] | str | None
    language_detection_segments: int
    language_detection_threshold: float | None
    diarize: bool
    hallucination: str | None
    vad_filter: bool
    vad_parameters: VadOptions | Mapping[str, Any] | None


class TranscribeChanges(RecordingChanges, total=False):
    """All that `transcribe` takes."""

    batch_size: int
    devices: int | str | Mesh | None
    audio_ctx: int | None
    masked_heads: str | Sequence[tuple[int, int]] | None
    draft: Whisper | str | None
    readers: int | None
    verbose: bool | None
    print_colors: bool
    print_special: bool
    progress: Callable[[float, float], None] | None

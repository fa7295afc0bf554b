"""Makes training windows from rows: packing, partial segments, windows without speech."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from whisper_nnx.audio.loading import SAMPLE_RATE, load_audio
from whisper_nnx.data.manifest import Row, Span
from whisper_nnx.text.tokenizer import Tokenizer
from whisper_nnx.training import augment as augmentation
from whisper_nnx.training.config import AugmentConfig, DataConfig
from whisper_nnx.training.targets import STEP_S, Format, Target, TargetSegment, encode_target, spoken_tokens

ROWS = 8  # row indices per window listed in a batch; a window may have more
_REASON_LENGTH = 300
_SLACK_S = 1e-3  # for rounding
_PARTIAL_S = 0.2  # shortest part of a cut segment; a shorter one is dropped with its audio
_MAX_PREVIOUS = 24  # rows that make up the previous text
_PLAIN_PREVIOUS = 0.2  # how often previous text is plain, like a user's prompt, instead of with timestamps
_FULLEST = 1.5  # the target fill is uniform from 0 to this, so a third of windows are completely filled

Group = tuple[str, str, str, str]


@dataclass
class _Clip:
    """A window being filled. at: start of the next row in s; room: tokens left for segments."""

    waveform: np.ndarray
    room: int
    segments: list[TargetSegment] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    at: float = 0.0


class Windows:
    """Makes the window of an index that starts with a row; it depends only on the seed and the index.

    Raises ValueError for an invalid configuration, and for languages or tasks that the tokenizer lacks.
    """

    def __init__(
        self,
        config: DataConfig,
        augment: AugmentConfig,
        rows: Sequence[Row],
        tokenizer: Tokenizer,
        seed: int,
        max_target_positions: int,
    ):
        self.config, self.augment, self.rows, self.seed = config, augment, rows, seed
        self.window_positions = tokenizer.special.timestamp_end - tokenizer.special.timestamp_begin
        positions = round(config.window_s / STEP_S)
        if not 0 < positions <= self.window_positions or abs(positions * STEP_S - config.window_s) > 1e-6:
            longest = self.window_positions * STEP_S
            raise ValueError(f"window_s={config.window_s} must be a multiple of 0.02 s up to {longest:g}")
        if not 8 <= config.max_label_length <= max_target_positions:
            raise ValueError(
                f"max_label_length={config.max_label_length} must be from 8 to the model's {max_target_positions} "
                "positions"
            )
        self.form = Format(
            tokenizer, positions, config.max_label_length, max_target_positions // 2 - 1, config.ctc_units
        )
        self.samples = round(config.window_s * SAMPLE_RATE)
        groups: dict[Group, list[int]] = defaultdict(list)
        for index, row in enumerate(rows):
            if not row.no_speech:
                groups[_group(row)].append(index)
        self.groups: Mapping[Group, np.ndarray] = {group: np.array(indices) for group, indices in groups.items()}
        some = next(iter(tokenizer.languages), "en")
        self.starts = sorted({(language, task) for language, task, *_ in groups}) or [(some, "transcribe")]
        for language, task in self.starts:
            tokenizer.sot_sequence(language, task)

    def __call__(self, index: int, first: int) -> dict[str, np.ndarray]:
        """Returns one row of each array of a batch; trouble: "row<tab>reason" of the first row that cannot be used."""
        rng = np.random.default_rng((self.seed, index))
        timestamps = bool(rng.random() >= self.config.no_timestamps_rate)
        first_position = self._first_position(rng)
        trouble: list[str] = []
        clip = _Clip(np.zeros(self.samples, np.float32), self.form.room)
        row, made = self.rows[first], rng.random() < self.config.no_speech_rate
        if made:
            clip.waveform = augmentation.non_speech(self.samples, rng)
        elif row.no_speech:
            self._add_non_speech(clip, first, trouble)
        else:
            self._fill(clip, first, timestamps, rng, trouble)
        no_speech = made or row.no_speech or not clip.segments
        language, task = (row.language, row.task) if clip.segments else self.starts[rng.integers(len(self.starts))]
        target = encode_target(
            self.form,
            language,
            task,
            clip.segments,
            timestamps=timestamps,
            first_position=first_position,
            **self._previous(first, rng),
            no_speech=no_speech,
        )
        usable = made or bool(clip.rows)
        waveform = augmentation.add_noise_and_gain(clip.waveform, self.augment, rng)
        return _arrays(waveform, first_position, target, clip.rows, usable, trouble)

    def _first_position(self, rng: np.random.Generator) -> int:
        """Draws the clip's position in the model's window: half of the time at its start."""
        free = self.window_positions - self.form.positions
        return 0 if rng.random() < 0.5 else int(rng.integers(free + 1))

    def _previous(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """Draws previous text for `encode_target`: the row's own, or that of other rows of its group."""
        row = self.rows[index]
        group = self.groups.get(_group(row), np.zeros(0, int))
        wanted, plain = rng.random() < self.config.previous_text_rate, rng.random() < _PLAIN_PREVIOUS
        picks = rng.integers(max(len(group), 1), size=rng.integers(1, _MAX_PREVIOUS + 1) if self.config.pack else 1)
        if not wanted:
            return {}
        if row.previous_text or len(group) < 2:
            return {"previous_text": row.previous_text}
        others = [self.rows[other] for other in group[picks] if other != index]
        if plain:
            return {"previous_text": " ".join(other.text for other in others)}
        windows: list[list[TargetSegment]] = [[]]
        at = 0.0
        for other in others:
            at += self._gap(rng)
            if at + other.duration > self.config.window_s:
                windows.append([])
                at = 0.0
            for segment in other.segments or (Span(0.0, other.duration, other.text),):
                moved = Span(at + segment.start, at + segment.end, segment.text)
                windows[-1].append(spoken_tokens(self.form.tokenizer, row.language, row.task, moved, ()))
            at += other.duration
        return {"previous": windows}

    def _gap(self, rng: np.random.Generator) -> float:
        least, most = self.config.pack_gap_s
        return least + (most - least) * float(rng.random()) ** 3 if self.config.pack else 0.0

    def _load(self, index: int, trouble: list[str]) -> np.ndarray | None:
        try:
            return load_audio(self.rows[index].audio)
        except (ValueError, OSError) as error:
            trouble.append(f"{index}\t{error}")
            return None

    def _add_non_speech(self, clip: _Clip, index: int, trouble: list[str]) -> None:
        """Adds a recording without speech."""
        waveform = self._load(index, trouble)
        if waveform is not None:
            clip.waveform[: len(waveform)] = waveform[: self.samples]
            clip.rows.append(index)

    def _fill(self, clip: _Clip, first: int, timestamps: bool, rng: np.random.Generator, trouble: list[str]) -> None:
        """Adds rows of one group to the clip until the drawn fill is reached."""
        group = self.groups[_group(self.rows[first])]
        until = min(rng.uniform(0, _FULLEST), 1.0) * self.config.window_s if self.config.pack else 0.0
        index = first
        while True:
            gap, speed = self._gap(rng), augmentation.draw_speed(self.augment, rng)
            waveform = self._load(index, trouble)
            if waveform is None:
                return
            if not clip.rows and len(waveform) <= self.samples:  # a row that fits alone is not cut
                speed = max(speed, len(waveform) / self.samples)
                gap = min(gap, self.config.window_s - len(waveform) / speed / SAMPLE_RATE)
            waveform = augmentation.change_speed(waveform, speed)
            clip.at += gap
            reason = self._place(clip, index, waveform, speed, timestamps)
            if reason and not clip.rows:
                trouble.append(f"{index}\t{reason}")
            if reason or clip.at >= until:
                return
            index = int(group[rng.integers(len(group))])

    def _place(self, clip: _Clip, index: int, waveform: np.ndarray, speed: float, timestamps: bool) -> str:
        """Adds as many of a row's segments as fit, with their audio; returns why no more fit, or "".

        With timestamps, a segment cut by the window's end is started: its start timestamp and audio are included.
        """
        row, window_s = self.rows[index], self.config.window_s
        begin, end = clip.at, clip.at + len(waveform) / SAMPLE_RATE

        def moved(span: Span) -> Span:
            return Span(min(begin + span.start / speed, end), min(begin + span.end / speed, end), span.text)

        words = [moved(word) for word in row.words or ()]
        segments: list[TargetSegment] = []
        room, cut, reason = clip.room, window_s, "the window is full" if end > window_s else ""
        for segment in [moved(span) for span in row.segments or (Span(0.0, np.inf, row.text),)]:
            if segment.end > window_s + _SLACK_S:
                reason = f"lasts {row.duration:.1f} s, and no segment of it ends within window_s={window_s:g}; cut it"
                if timestamps and segments + clip.segments and segment.start <= window_s - _PARTIAL_S and room:
                    segments.append(TargetSegment(segment.start, None))
                else:
                    cut = segment.start
                break
            inside = [word for word in words if segment.start <= (word.start + word.end) / 2 < segment.end]
            spoken = spoken_tokens(self.form.tokenizer, row.language, row.task, segment, inside)
            room -= len(spoken.tokens) + 2 * timestamps
            if room < 0:
                reason = f"its text does not fit into max_label_length={self.form.length}; raise it or cut the row"
                cut = segment.start
                break
            segments.append(spoken)
        if segments:
            at = round(begin * SAMPLE_RATE)
            waveform = waveform[: round((cut - begin) * SAMPLE_RATE)][: self.samples - at]
            clip.waveform[at : at + len(waveform)] = waveform
            clip.segments += segments
            clip.rows.append(index)
        clip.at, clip.room = end, room
        return reason


def _group(row: Row) -> Group:
    """Rows of one window share these values."""
    return row.language, row.task, row.source, row.manifest


def _arrays(
    waveform: np.ndarray, first_position: int, target: Target, rows: Sequence[int], usable: bool, trouble: Sequence[str]
) -> dict[str, np.ndarray]:
    listed = list(rows[:ROWS])
    return {
        "waveform": waveform,
        "first_position": np.array(first_position, np.int32),
        "ids": target.ids,
        "labels": target.labels,
        "weights": target.weights * np.float32(usable),
        "spans": target.spans,
        "ctc": target.ctc,
        "ctc_weight": np.array(target.ctc_weight * usable, np.float32),
        "frames": target.frames if usable else np.full_like(target.frames, -1),
        "rows": np.array(listed + [-1] * (ROWS - len(listed)), np.int32),
        "trouble": np.array(trouble[0][:_REASON_LENGTH] if trouble else "", f"U{_REASON_LENGTH}"),
    }

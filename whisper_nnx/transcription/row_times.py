"""Times of the tokens and words that were decoded in the rows of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from whisper_nnx.model.heads import Heads
from whisper_nnx.model.whisper import Whisper
from whisper_nnx.timing import word_times
from whisper_nnx.timing.token_times import align_tokens, text_ids
from whisper_nnx.timing.word_times import Heads as WordHeads
from whisper_nnx.timing.word_times import Layout
from whisper_nnx.timing.words import WordTiming, words_from_tokens
from whisper_nnx.transcription.recording import Draft
from whisper_nnx.transcription.row_decoder import RowDecoder
from whisper_nnx.transcription.rows import Row
from whisper_nnx.transcription.windows import tokenizer_of

Timed = tuple[list[float], list[float]]  # start of each text token and of what follows, probability of each
UNTIMED: Timed = ([0.0], [])


@dataclass(frozen=True)
class RowTimes:
    """Times rows of a batch by the encoder output that they were decoded from, in groups."""

    model: Whisper
    decoder: RowDecoder

    def tokens(self, drafts: dict[int, tuple[Row, Draft]]) -> dict[int, Timed]:
        """Times of the text tokens of those rows whose options ask for any."""
        wanted = {i: x for i, x in drafts.items() if x[0].live.recording.options.timed and x[1].text_tokens}
        times: dict[int, Timed] = {}
        for heads in {row.live.heads for row, _ in wanted.values()}:
            for group in self.decoder.groups.split([i for i, x in wanted.items() if x[0].live.heads == heads]):
                times |= self._align(group, wanted, heads)
        return times

    def _align(self, group: list[int | None], drafts: dict[int, tuple[Row, Draft]], heads: Heads) -> dict[int, Timed]:
        any_row = next(i for i in group if i is not None)  # fills up the group
        rows = [drafts[any_row if i is None else i] for i in group]
        aligned = align_tokens(
            *self._arguments(group),
            starts=[self._start(row) for row, _ in rows],
            texts=[draft.text_tokens for _, draft in rows],
            positions=[self._positions(row) for row, _ in rows],
            eot=tokenizer_of(self.model).special.eot,
            heads=heads,
            is_text=text_ids(tokenizer_of(self.model)),
        )
        return {i: times for i, times in zip(group, aligned, strict=True) if i is not None}

    def words(self, timed: dict[int, tuple[Row, Draft, Timed]]) -> dict[int, list[WordTiming] | None]:
        """The words of those rows' windows; None where the options ask for none."""
        words: dict[int, list[WordTiming] | None] = {}
        for i, (row, draft, times) in timed.items():
            recording, wanted = row.live.recording, row.live.recording.options.word_timestamps
            text = draft.text_tokens
            words[i] = words_from_tokens(recording.tokenizer, text, *times, row.language or "en") if wanted else None
        refined = {i: (row, own) for i, (row, _, _) in timed.items() if row.live.word_heads and (own := words[i])}
        self._refine(refined)
        return words

    def _refine(self, timed: dict[int, tuple[Row, list[WordTiming]]]) -> None:
        """Gives words the times of a second pass, over the text in short pieces."""
        for heads in {row.live.word_heads for row, _ in timed.values()}:
            assert heads is not None
            for group in self.decoder.groups.split([i for i, x in timed.items() if x[0].live.word_heads == heads]):
                self._refine_group(group, timed, heads)

    def _refine_group(
        self, group: list[int | None], timed: dict[int, tuple[Row, list[WordTiming]]], heads: WordHeads
    ) -> None:
        tokenizer, room = tokenizer_of(self.model), self.model.config.max_target_positions
        any_row = next(i for i in group if i is not None)
        layouts, pauses = [], []
        for i in group:
            row, words = timed[any_row if i is None else i]
            spelled, _ = word_times.spelled_words(words)
            layouts.append(Layout.of(tokenizer, self._start(row), spelled, room, short=heads.short_pieces))
            first = word_times.first_sample(row.window.start_frame)
            pauses.append(word_times.pause_scores(row.live.mel.waveform, first, self._positions(row)))
        texts: dict[str, Any] = {"eot": tokenizer.special.eot, "layouts": layouts, "pauses": pauses}
        times = word_times.word_times(*self._arguments(group), **texts, heads=heads)
        for at, i in enumerate(group):
            if i is not None:
                word_times.retime(timed[i][1], times[at])

    def _arguments(self, group: list[int | None]) -> tuple[Any, Any, Any]:
        return self.model.decoder, self.decoder.windows(group).cross, self.model.config

    def _start(self, row: Row) -> tuple[int, ...]:
        return tokenizer_of(self.model).sot_sequence(row.language, row.live.options.task, timestamps=False)

    def _positions(self, row: Row) -> int:
        frames = row.live.recording.window_frames
        return max(1, row.window.n_frames * self.model.config.max_source_positions // frames)

"""What openai-whisper's segments become here: none empty, none over another one or beyond the sound."""

import copy
from collections.abc import Mapping, Sequence


def placed(segments: Sequence[Mapping], ends_s: Mapping[int, float]) -> list[dict]:
    """Copies of the reference's segments, numbered anew; ends_s: where the sound of the window at each `seek` ends."""
    result: list[dict] = []
    for seek in dict.fromkeys(segment["seek"] for segment in segments):
        window = [copy.deepcopy(dict(s)) for s in segments if s["seek"] == seek and s["text"]]
        at, end_s, kept = seek / 100, ends_s[seek], []
        for segment in window:
            segment["start"] = at = sorted((at, segment["start"], end_s))[1] if at < end_s else end_s
            segment["end"] = at = sorted((at, segment["end"], end_s))[1] if at < end_s else end_s
            if kept and min(s["end"] - s["start"] for s in (kept[-1], segment)) < 0.005:
                for key in ("text", "tokens", "words"):
                    if key in segment:
                        kept[-1][key] = kept[-1][key] + segment[key]
                kept[-1]["end"] = segment["end"]
            else:
                kept.append(segment)
        if kept and kept[0]["end"] - kept[0]["start"] < 0.005:
            kept[0].update(start=seek / 100, end=end_s)
        at = seek / 100
        for word in (word for segment in kept for word in segment.get("words", [])):
            word["start"] = max(at, min(word["start"], end_s))
            word["end"] = at = max(word["start"], min(word["end"], end_s))
        result += kept
    return [{**segment, "id": number} for number, segment in enumerate(result)]

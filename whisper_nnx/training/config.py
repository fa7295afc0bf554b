"""A training run as data: dataclasses, with their descriptions, ranges and what belongs together."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from typing import Annotated, Any, get_type_hints


@dataclass(frozen=True)
class ModelConfig:
    """The model to train."""

    init: Annotated[
        str, "checkpoint to start from: a name, a Hugging Face id or a folder; empty: a new model of model.shape"
    ] = ""
    shape: Annotated[
        dict[str, int], "fields of a new model's WhisperConfig, such as d_model, or the name of a size"
    ] = field(default_factory=dict)
    tokenizer: Annotated[str, "folder with the tokenizer's files, for a new model"] = ""
    dtype: Annotated[str, "type of the computation; the trained weights are kept in float32"] = "float32"
    product_dtype: Annotated[
        str, "type that factors of matmuls are rounded to: faster on CPUs with bfloat16; empty: dtype"
    ] = ""
    conv_init_scale: Annotated[float, "factor on a new model's initial convolutions (docs/design/training.md)"] = 1.0


@dataclass(frozen=True)
class DataConfig:
    """The recordings, and how they become windows."""

    train: Annotated[tuple[str, ...], "manifests: JSON lines, .csv, .tsv or folders of Hugging Face datasets"] = ()
    weights: Annotated[
        tuple[float, ...], "share of the windows drawn from each of data.train; empty: by their lengths"
    ] = ()
    language: Annotated[str, "language of rows that name none, in training and evaluation"] = ""
    window_s: Annotated[float, "seconds that the encoder sees; below 30 they are placed at random in its window"] = 30.0
    pack: Annotated[bool, "put several short rows into one window, with timestamps"] = True
    pack_gap_s: Annotated[tuple[float, float], "silence before each packed row: from, to; short ones more often"] = (
        0.0,
        1.0,
    )
    no_speech_rate: Annotated[float, "share of windows without speech"] = 0.02
    previous_text_rate: Annotated[float, "share of windows that get the text before them, where there is one"] = 0.5
    no_timestamps_rate: Annotated[float, "share of windows that are written without timestamps"] = 0.5
    max_label_length: Annotated[int, "tokens of a window, prompt included; longer windows are dropped and counted"] = (
        448
    )
    ctc_units: Annotated[str, "what the auxiliary CTC spells: text tokens, or the bytes of lower-case text"] = "tokens"
    workers: Annotated[int, "processes that read ahead; 0: the training process reads"] = 0


@dataclass(frozen=True)
class AugmentConfig:
    """Changes to the sound; 0 switches each off."""

    speed: Annotated[float, "largest change of speed: 0.1 is from 10 % slower to 10 % faster; times move along"] = 0.0
    gain_db: Annotated[float, "largest change of loudness, up or down"] = 0.0
    noise_rate: Annotated[float, "share of windows that get noise"] = 0.0
    noise_snr_db: Annotated[tuple[float, float], "how far the noise is below the speech: from, to"] = (5.0, 30.0)
    time_masks: Annotated[int, "stretches of the mel that are blanked: SpecAugment (Park et al. 2019)"] = 0
    time_mask_s: Annotated[float, "longest of these"] = 0.5
    frequency_masks: Annotated[int, "bands of the mel that are blanked"] = 0
    frequency_mask_bins: Annotated[int, "widest of these"] = 15


@dataclass(frozen=True)
class LossConfig:
    """What is minimized beside the cross-entropy."""

    label_smoothing: Annotated[float, "probability spread over all tokens; 0.1 helps against overconfidence"] = 0.0
    ctc_weight: Annotated[float, "weight of an auxiliary CTC on the encoder's output"] = 0.0
    frame_weight: Annotated[float, "weight of classifying each position by its CTC unit (needs word times)"] = 0.0
    guide_weight: Annotated[float, "weight of guiding attention to where each token is spoken (needs word times)"] = 0.0
    guide_heads: Annotated[
        tuple[tuple[int, int], ...], "decoder heads to guide, as 2:0 2:1; they become alignment_heads"
    ] = ()


@dataclass(frozen=True)
class DistillConfig:
    """A smaller decoder that learns from a larger one (Gandhi et al. 2023, distil-whisper)."""

    teacher: Annotated[str, "checkpoint of the teacher; empty: no distillation"] = ""
    decoder_layers: Annotated[
        int, "layers of the student, copied from the teacher's, spread evenly from first to last"
    ] = 2
    kl_weight: Annotated[float, "weight of the divergence from the teacher's distribution"] = 0.8
    cross_entropy_weight: Annotated[float, "weight of the cross-entropy with the labels"] = 1.0
    temperature: Annotated[float, "temperature of both distributions"] = 2.0


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank additions to frozen matrices (Hu et al. 2021)."""

    rank: Annotated[int, "rank of the additions; 0: none, all weights are trained"] = 0
    alpha: Annotated[float, "additions are scaled by alpha / rank"] = 16.0
    targets: Annotated[tuple[str, ...], "layers that get one, by the end of their path"] = ("q_proj", "v_proj")


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights are updated."""

    method: Annotated[str, "muon is for training from scratch: it orthogonalizes the updates of matrices"] = "adamw"
    learning_rate: Annotated[float, "highest learning rate"] = 1e-4
    warmup_steps: Annotated[int, "steps in which the rate rises from 0"] = 100
    decay: Annotated[str, "how the rate then falls to 0 at the last step; constant: it does not"] = "linear"
    betas: Annotated[tuple[float, float], "decay of the averages of the gradient and its square"] = (0.9, 0.98)
    epsilon: Annotated[float, "added to the denominator"] = 1e-6
    weight_decay: Annotated[float, "of matrices, not of biases and norms"] = 0.1
    clip_norm: Annotated[float, "largest norm of the gradient; 0: any"] = 1.0
    accumulate: Annotated[int, "batches for one update"] = 1
    ema_decay: Annotated[float, "decay of averaged weights, which are then evaluated and exported; 0: none"] = 0.0
    freeze: Annotated[tuple[str, ...], "weights to leave as they are, by the start of their path: encoder"] = ()
    remat: Annotated[bool, "recompute activations in the backward pass: slower, with less memory"] = False


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation during training."""

    manifest: Annotated[tuple[str, ...], "manifests to evaluate on; empty: no evaluation"] = ()
    every: Annotated[int, "steps between evaluations; 0: only at the end"] = 0
    max_rows: Annotated[int, "rows to evaluate, from the first; 0: all"] = 0
    options: Annotated[dict[str, object], "options of `transcribe` and `evaluate`, such as beam_size"] = field(
        default_factory=dict
    )


@dataclass(frozen=True)
class TrainConfig:
    """The run."""

    output: Annotated[str, "folder for checkpoints/, metrics.jsonl, tensorboard/, curves.png, best/, export/"] = (
        "runs/train"
    )
    seed: Annotated[int, "of the data's order and of all random numbers"] = 0
    steps: Annotated[int, "batches to train on"] = 1000
    batch_size: Annotated[int, "windows in a batch, over all devices"] = 8
    log_every: Annotated[int, "steps between records in metrics.jsonl, each the mean since the last"] = 10
    save_every: Annotated[int, "steps between checkpoints"] = 200
    keep: Annotated[int, "checkpoints to keep: the last ones, beside the best by word error rate"] = 3
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


# Where numbers must lie, of tuples each of them; ( and ) leave the end out.
_RANGES = {
    **dict.fromkeys(("steps", "batch_size", "log_every", "save_every", "keep", "optimizer.accumulate"), "[1, inf)"),
    **dict.fromkeys(("seed", "data.workers", "lora.rank", "evaluate.every", "evaluate.max_rows"), "[0, inf)"),
    **dict.fromkeys(("data.no_speech_rate", "data.previous_text_rate", "data.no_timestamps_rate"), "[0, 1]"),
    **dict.fromkeys(("augment.noise_rate",), "[0, 1]"),
    **dict.fromkeys(("augment.speed", "loss.label_smoothing", "optimizer.betas", "optimizer.ema_decay"), "[0, 1)"),
    **dict.fromkeys(("model.conv_init_scale", "data.weights", "lora.alpha", "distill.temperature"), "(0, inf)"),
    **dict.fromkeys(("optimizer.learning_rate", "optimizer.epsilon"), "(0, inf)"),
    **dict.fromkeys(
        ("augment.gain_db", "augment.time_mask_s", "augment.time_masks", "optimizer.clip_norm"), "[0, inf)"
    ),
    **dict.fromkeys(("augment.frequency_masks", "augment.frequency_mask_bins"), "[0, inf)"),
    **dict.fromkeys(("loss.ctc_weight", "loss.frame_weight", "loss.guide_weight", "distill.kl_weight"), "[0, inf)"),
    **dict.fromkeys(("distill.cross_entropy_weight", "optimizer.warmup_steps", "optimizer.weight_decay"), "[0, inf)"),
    "data.window_s": "(0, 30]",
    "data.pack_gap_s": "[0, 30]",
    "data.max_label_length": "[8, inf)",
    "augment.noise_snr_db": "(-inf, inf)",
    "distill.decoder_layers": "[1, inf)",
}
_CHOICES = {
    "data.ctc_units": ("tokens", "bytes"),
    "optimizer.method": ("adamw", "muon"),
    "optimizer.decay": ("linear", "cosine", "constant"),
    "model.dtype": ("float32", "bfloat16"),
    "model.product_dtype": ("", "bfloat16"),
}
_ASCENDING = ("data.pack_gap_s", "augment.noise_snr_db")
# What may differ when a run goes on: how far it goes, who reads its data, and what it writes.
_MAY_CHANGE = ("output", "steps", "log_every", "save_every", "keep", "evaluate.", "data.workers")


def describe(kind: Any = None, prefix: str = "") -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Sections as (title, keys); keys as (dotted name, description with what it may be and its default)."""
    kind = kind or TrainConfig
    hints, own = get_type_hints(kind, include_extras=True), []
    for key in fields(kind):
        if not is_dataclass(hints[key.name]):
            name, (text,) = f"{prefix}{key.name}", hints[key.name].__metadata__
            own.append(
                (name, text + _facts(name, key.default)) if key.default is not MISSING else (f"{name}.KEY", text)
            )
    yield kind.__doc__.rstrip("."), own
    for key in fields(kind):
        if is_dataclass(hints[key.name]):
            yield from describe(hints[key.name], f"{prefix}{key.name}.")


def _facts(name: str, default: Any) -> str:
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    allowed = ", ".join(filter(None, _CHOICES.get(name, ())))
    facts = [f"one of {allowed}"] * bool(allowed) + [f"default: {shown}"] * (shown != "")
    return f" ({'; '.join(facts)})" * bool(facts)


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Nested dicts and lists, as JSON keeps them."""
    return dict(json.loads(json.dumps(asdict(config))))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What keeps a run described by `before` from going on as `now` (both of `to_dict`), as "name: old -> new"."""
    defaults = _flat(to_dict(TrainConfig()))  # a key that is newer than the run has had no effect on it
    old, new = {**defaults, **_flat(before)}, _flat(now)
    names = [name for name in sorted({*old, *new}) if not name.startswith(_MAY_CHANGE)]
    return [f"{name}: {old.get(name)!r} -> {new.get(name)!r}" for name in names if old.get(name) != new.get(name)]


def check(config: TrainConfig) -> None:
    """Raises ValueError for values that are out of range, or that exclude or need each other."""
    values = _flat(asdict(config))
    for name, interval in _RANGES.items():
        value = values[name]
        for number in value if isinstance(value, tuple) else (value,):
            if not _lies_in(number, interval):
                raise ValueError(f"{name}={number!r} must be {_in_words(interval)}")
    for name, choices in _CHOICES.items():
        if values[name] not in choices:
            near = get_close_matches(str(values[name]), choices, 1)
            meant = f"; did you mean {near[0]}?" * len(near)
            raise ValueError(f"{name}={values[name]!r} is none of {', '.join(filter(None, choices))}{meant}")
    for name in _ASCENDING:
        if values[name][0] > values[name][1]:
            raise ValueError(f"{name}={list(values[name])} must be two numbers, from and to; swap them")
    _check_sources(config)


def _check_sources(config: TrainConfig) -> None:
    """What a run begins with, and what belongs together."""
    model, data, distill = config.model, config.data, config.distill
    if not data.train:
        raise ValueError("data.train is empty; give at least one manifest: --data.train train.jsonl")
    if data.weights and len(data.weights) != len(data.train):
        raise ValueError(
            f"data.weights has {len(data.weights)} numbers for {len(data.train)} of data.train; give each one"
        )
    starts = {"model.init": model.init, "model.shape": model.shape, "distill.teacher": distill.teacher}
    given = [name for name, value in starts.items() if value]
    if "model.shape" in given and len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are both given; drop one: weights are loaded, or made anew")
    if not given:
        raise ValueError(
            f"there is no model to train; give one of {', '.join(starts)}, as --model.init openai/whisper-small"
        )
    if model.shape and not model.tokenizer:
        raise ValueError(
            "model.shape makes a new model, which needs model.tokenizer: a folder with a tokenizer's files"
        )
    for name, value in model.shape.items():
        if isinstance(value, str) != (name == "size"):
            kind = "the name of a size" if name == "size" else "a number"
            raise ValueError(f"model.shape.{name}={value!r} must be {kind}")
    if config.loss.guide_weight and not config.loss.guide_heads:
        raise ValueError(f"loss.guide_weight={config.loss.guide_weight} needs loss.guide_heads, as [[2, 0], [2, 1]]")
    if config.lora.rank and not config.lora.targets:
        raise ValueError(f"lora.rank={config.lora.rank} needs lora.targets, as q_proj v_proj")
    if config.evaluate.every and not config.evaluate.manifest:
        raise ValueError(f"evaluate.every={config.evaluate.every} needs evaluate.manifest: recordings to evaluate on")


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in content.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def _ends(interval: str) -> tuple[float, float]:
    low, high = interval[1:-1].split(",")
    return float(low), float(high)


def _lies_in(number: float, interval: str) -> bool:
    low, high = _ends(interval)
    above = low <= number if interval[0] == "[" else low < number
    return above and (number <= high if interval[-1] == "]" else number < high)


def _in_words(interval: str) -> str:
    low, high = _ends(interval)
    words = [f"{'at least' if interval[0] == '[' else 'above'} {low:g}"] if low > -math.inf else []
    words += [f"{'at most' if interval[-1] == ']' else 'below'} {high:g}"] if high < math.inf else []
    return " and ".join(words) or "a number"

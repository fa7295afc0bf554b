"""Configuration of a training run: dataclasses with descriptions, ranges and consistency checks."""

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
        str, "checkpoint to start from: a name, Hugging Face id or folder; empty: a new model of model.shape"
    ] = ""
    shape: Annotated[
        dict[str, int], "fields of a new model's WhisperConfig, such as d_model, or the name of a size"
    ] = field(default_factory=dict)
    tokenizer: Annotated[str, "folder with the tokenizer's files, for a new model"] = ""
    dtype: Annotated[str, "dtype of the computation; trained weights stay in float32"] = "float32"
    product_dtype: Annotated[
        str, "dtype to which matmul operands are rounded: faster on CPUs with bfloat16; empty: dtype"
    ] = ""
    conv_init_scale: Annotated[float, "scale of a new model's initial convolutions (docs/design/training.md)"] = 1.0


@dataclass(frozen=True)
class DataConfig:
    """The recordings and how they are cut into windows."""

    train: Annotated[tuple[str, ...], "manifests: JSON lines, .csv, .tsv or folders of Hugging Face datasets"] = ()
    weights: Annotated[
        tuple[float, ...], "share of windows drawn from each of data.train; empty: by their lengths"
    ] = ()
    language: Annotated[str, "language of rows without one, in training and evaluation"] = ""
    window_s: Annotated[float, "seconds of audio per window; below 30 at a random place in the encoder's window"] = 30.0
    pack: Annotated[bool, "pack several short rows into one window, with timestamps"] = True
    pack_gap_s: Annotated[tuple[float, float], "silence before each packed row: from, to; mostly short"] = (
        0.0,
        1.0,
    )
    no_speech_rate: Annotated[float, "share of windows without speech"] = 0.02
    previous_text_rate: Annotated[float, "share of windows prompted with previous text, if there is any"] = 0.5
    no_timestamps_rate: Annotated[float, "share of windows without timestamps"] = 0.5
    max_label_length: Annotated[int, "tokens per window, prompt included; longer windows are dropped and counted"] = 448
    ctc_units: Annotated[str, "labels of the auxiliary CTC: text tokens, or the bytes of lower-case text"] = "tokens"
    workers: Annotated[int, "processes that prefetch data; 0: the training process reads it"] = 0


@dataclass(frozen=True)
class AugmentConfig:
    """Audio augmentation; 0 disables each."""

    speed: Annotated[float, "largest change of speed: 0.1 is 10 % slower to 10 % faster; times are adjusted"] = 0.0
    gain_db: Annotated[float, "largest gain or attenuation"] = 0.0
    noise_rate: Annotated[float, "share of windows with added noise"] = 0.0
    noise_snr_db: Annotated[tuple[float, float], "signal-to-noise ratio: from, to"] = (5.0, 30.0)
    time_masks: Annotated[int, "masked time spans of the mel: SpecAugment (Park et al. 2019)"] = 0
    time_mask_s: Annotated[float, "longest masked time span"] = 0.5
    frequency_masks: Annotated[int, "masked frequency bands of the mel"] = 0
    frequency_mask_bins: Annotated[int, "widest masked frequency band"] = 15


@dataclass(frozen=True)
class LossConfig:
    """Losses in addition to the cross-entropy."""

    label_smoothing: Annotated[float, "probability spread over all tokens; 0.1 helps against overconfidence"] = 0.0
    ctc_weight: Annotated[float, "weight of an auxiliary CTC loss on the encoder output"] = 0.0
    frame_weight: Annotated[float, "weight of classifying each position by its CTC unit (needs word times)"] = 0.0
    guide_weight: Annotated[float, "weight of guiding attention to where each token is spoken (needs word times)"] = 0.0
    guide_heads: Annotated[
        tuple[tuple[int, int], ...], "decoder heads to guide, as 2:0 2:1; they become alignment_heads"
    ] = ()


@dataclass(frozen=True)
class DistillConfig:
    """Distillation to a smaller decoder (Gandhi et al. 2023, distil-whisper)."""

    teacher: Annotated[str, "checkpoint of the teacher; empty: no distillation"] = ""
    decoder_layers: Annotated[
        int, "decoder layers of the student, copied from the teacher's at even spacing from first to last"
    ] = 2
    kl_weight: Annotated[float, "weight of the divergence from the teacher's distribution"] = 0.8
    cross_entropy_weight: Annotated[float, "weight of the cross-entropy with the labels"] = 1.0
    temperature: Annotated[float, "temperature of both distributions"] = 2.0


@dataclass(frozen=True)
class LoraConfig:
    """LoRA: low-rank updates of frozen matrices (Hu et al. 2021)."""

    rank: Annotated[int, "rank of the updates; 0: no LoRA, all weights are trained"] = 0
    alpha: Annotated[float, "updates are scaled by alpha / rank"] = 16.0
    targets: Annotated[tuple[str, ...], "layers with LoRA, by the end of their path"] = ("q_proj", "v_proj")


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights are updated."""

    method: Annotated[str, "muon, for training from scratch, orthogonalizes the updates of matrices"] = "adamw"
    learning_rate: Annotated[float, "peak learning rate"] = 1e-4
    warmup_steps: Annotated[int, "steps of linear warm-up from 0"] = 100
    decay: Annotated[str, "schedule from the peak to 0 at the last step; constant: no decay"] = "linear"
    betas: Annotated[tuple[float, float], "decay of the moving averages of the gradient and its square"] = (0.9, 0.98)
    epsilon: Annotated[float, "added to the denominator"] = 1e-6
    weight_decay: Annotated[float, "weight decay of matrices; biases and norms have none"] = 0.1
    clip_norm: Annotated[float, "largest gradient norm; 0: no clipping"] = 1.0
    accumulate: Annotated[int, "batches per update"] = 1
    ema_decay: Annotated[float, "decay of averaged weights, which are evaluated and exported; 0: no averaging"] = 0.0
    freeze: Annotated[tuple[str, ...], "frozen weights, by the start of their path, such as encoder"] = ()
    remat: Annotated[bool, "recompute activations in the backward pass: slower, less memory"] = False


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation during training."""

    manifest: Annotated[tuple[str, ...], "manifests to evaluate on; empty: no evaluation"] = ()
    every: Annotated[int, "steps between evaluations; 0: only at the end"] = 0
    max_rows: Annotated[int, "evaluate only the first rows; 0: all"] = 0
    options: Annotated[dict[str, object], "options of `transcribe` and `evaluate`, such as beam_size"] = field(
        default_factory=dict
    )


@dataclass(frozen=True)
class TrainConfig:
    """The run."""

    output: Annotated[str, "folder for checkpoints/, metrics.jsonl, tensorboard/, curves.png, best/, export/"] = (
        "runs/train"
    )
    seed: Annotated[int, "seed of the data order and of all random numbers"] = 0
    steps: Annotated[int, "batches to train on"] = 1000
    batch_size: Annotated[int, "windows per batch, over all devices"] = 8
    model_parallel: Annotated[int, "devices that each layer is divided over; the batch is divided over the others"] = 1
    log_every: Annotated[int, "steps between records in metrics.jsonl, each a mean since the previous one"] = 10
    save_every: Annotated[int, "steps between checkpoints"] = 200
    keep: Annotated[int, "number of latest checkpoints to keep, in addition to the best by word error rate"] = 3
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


# Intervals of valid numbers, for tuples of each element; ( and ) exclude the end.
_RANGES = {
    **dict.fromkeys(
        ("steps", "batch_size", "model_parallel", "log_every", "save_every", "keep", "optimizer.accumulate"), "[1, inf)"
    ),
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
# Keys that may change when a run is resumed: they affect its length, data workers and outputs.
_MAY_CHANGE = ("output", "steps", "model_parallel", "log_every", "save_every", "keep", "evaluate.", "data.workers")


def describe(kind: Any = None, prefix: str = "") -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yields sections as (title, keys); keys are (dotted name, description with choices and default)."""
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
    """Converts a configuration to nested dicts and lists, as in JSON."""
    return dict(json.loads(json.dumps(asdict(config))))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lists differences, as "name: old -> new", that prevent resuming the run `before` as `now` (from `to_dict`)."""
    defaults = _flat(to_dict(TrainConfig()))  # keys newer than the run had their default value
    old, new = {**defaults, **_flat(before)}, _flat(now)
    names = [name for name in sorted({*old, *new}) if not name.startswith(_MAY_CHANGE)]
    return [f"{name}: {old.get(name)!r} -> {new.get(name)!r}" for name in names if old.get(name) != new.get(name)]


def check(config: TrainConfig) -> None:
    """Raises ValueError for values that are out of range or inconsistent."""
    values = _flat(asdict(config))
    for name, interval in _RANGES.items():
        value = values[name]
        for number in value if isinstance(value, tuple) else (value,):
            if not _is_in(number, interval):
                raise ValueError(f"{name}={number!r} must be {_in_words(interval)}")
    for name, choices in _CHOICES.items():
        if values[name] not in choices:
            near = get_close_matches(str(values[name]), choices, 1)
            hint = f"; did you mean {near[0]}?" * len(near)
            raise ValueError(f"{name}={values[name]!r} must be one of {', '.join(filter(None, choices))}{hint}")
    for name in _ASCENDING:
        if values[name][0] > values[name][1]:
            raise ValueError(f"{name}={list(values[name])} must be two numbers in ascending order; swap them")
    _check_sources(config)


def _check_sources(config: TrainConfig) -> None:
    """Checks the sources of model and data, and keys that need each other."""
    model, data, distill = config.model, config.data, config.distill
    if not data.train:
        raise ValueError("data.train is empty; give at least one manifest: --data.train train.jsonl")
    if data.weights and len(data.weights) != len(data.train):
        raise ValueError(
            f"data.weights has {len(data.weights)} values but data.train has {len(data.train)}; give one weight each"
        )
    starts = {"model.init": model.init, "model.shape": model.shape, "distill.teacher": distill.teacher}
    given = [name for name, value in starts.items() if value]
    if "model.shape" in given and len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are both given; drop one: weights are either loaded or new")
    if not given:
        raise ValueError(
            f"there is no model to train; give one of {', '.join(starts)}, such as --model.init openai/whisper-small"
        )
    if model.shape and not model.tokenizer:
        raise ValueError(
            "model.shape creates a new model, which needs model.tokenizer: a folder with a tokenizer's files"
        )
    for name, value in model.shape.items():
        if isinstance(value, str) != (name == "size"):
            kind = "the name of a size" if name == "size" else "a number"
            raise ValueError(f"model.shape.{name}={value!r} must be {kind}")
    if config.loss.guide_weight and not config.loss.guide_heads:
        raise ValueError(f"loss.guide_weight={config.loss.guide_weight} needs loss.guide_heads, like [[2, 0], [2, 1]]")
    if config.lora.rank and not config.lora.targets:
        raise ValueError(f"lora.rank={config.lora.rank} needs lora.targets, such as q_proj v_proj")
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


def _is_in(number: float, interval: str) -> bool:
    low, high = _ends(interval)
    above = low <= number if interval[0] == "[" else low < number
    return above and (number <= high if interval[-1] == "]" else number < high)


def _in_words(interval: str) -> str:
    low, high = _ends(interval)
    words = [f"{'at least' if interval[0] == '[' else 'above'} {low:g}"] if low > -math.inf else []
    words += [f"{'at most' if interval[-1] == ']' else 'below'} {high:g}"] if high < math.inf else []
    return " and ".join(words) or "a number"

"""A training run as data: what `configs/*.toml` and the command line's overrides can say."""

from __future__ import annotations

import json
import math
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


@dataclass(frozen=True)
class ModelConfig:
    """Where the weights come from."""

    init: str = ""  # a checkpoint as `load_model` takes it; "": a new model of `shape`
    shape: dict[str, int] = field(default_factory=dict)  # of a new model, WhisperConfig's fields; or {"size": "tiny"}
    tokenizer: str = ""  # a folder with the tokenizer's files, for a new model
    dtype: str = "float32"  # of the computation; masters are float32
    product_dtype: str = ""  # "bfloat16" rounds factors of products: faster on CPUs that multiply it; "": as dtype
    conv_init_scale: float = 1.0  # a new model's convolutions start this much larger (see IMPLEMENTATION.md)


@dataclass(frozen=True)
class DataConfig:
    """Which recordings, and how they become windows."""

    train: tuple[str, ...] = ()  # manifests (JSON lines) or Hugging Face datasets' folders
    weights: tuple[float, ...] = ()  # how often each of `train` is drawn from, in windows; (): by their lengths
    window_s: float = 30.0  # length of what the encoder sees; below 30: a part of the window, placed at random in it
    pack: bool = True  # several short rows in one window, with timestamps
    pack_gap_s: tuple[float, float] = (0.0, 1.0)  # silence before each packed row: from, to; short ones more often
    no_speech_rate: float = 0.02  # windows without speech
    previous_text_rate: float = 0.5  # windows that are given the text before, where there is one
    no_timestamps_rate: float = 0.5  # windows written without timestamps
    max_label_length: int = 448  # tokens, prompt and all; longer windows are dropped and counted
    ctc_units: str = "tokens"  # what the auxiliary CTC spells: text tokens, or the "bytes" of lower-case text
    workers: int = 0  # processes that read ahead; 0: the training process does it


@dataclass(frozen=True)
class AugmentConfig:
    """What is done to the sound; 0 switches off."""

    speed: float = 0.0  # rate drawn from 1 - speed to 1 + speed (times move along)
    gain_db: float = 0.0  # drawn from -gain_db to +gain_db
    noise_rate: float = 0.0  # windows that get noise
    noise_snr_db: tuple[float, float] = (5.0, 30.0)
    time_masks: int = 0  # SpecAugment (Park et al. 2019)
    time_mask_s: float = 0.5  # longest
    frequency_masks: int = 0
    frequency_mask_bins: int = 15  # widest


@dataclass(frozen=True)
class LossConfig:
    label_smoothing: float = 0.0
    ctc_weight: float = 0.0  # of the auxiliary CTC on the encoder's output
    frame_weight: float = 0.0  # of telling, at each position, which unit of the CTC is spoken there (needs word times)
    guide_weight: float = 0.0  # of the attention that is told where each token is spoken
    guide_heads: tuple[tuple[int, int], ...] = ()  # (layer, head) of the decoder; they become alignment_heads


@dataclass(frozen=True)
class DistillConfig:
    """A smaller decoder that learns from a larger one (Gandhi et al. 2023, distil-whisper)."""

    teacher: str = ""  # a checkpoint; "": no distillation
    decoder_layers: int = 2  # of the student, copied from the teacher's, spread evenly from first to last
    kl_weight: float = 0.8
    cross_entropy_weight: float = 1.0
    temperature: float = 2.0


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank additions to frozen products (Hu et al. 2021)."""

    rank: int = 0  # 0: none, all weights are trained
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")


@dataclass(frozen=True)
class OptimizerConfig:
    method: str = "adamw"  # or "muon": for training from nothing; the layers' matrices are moved by orthogonal steps
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    decay: str = "linear"  # or "cosine", "constant"; to 0 at the last step
    betas: tuple[float, float] = (0.9, 0.98)
    epsilon: float = 1e-6
    weight_decay: float = 0.1  # of matrices, not of biases and norms
    clip_norm: float = 1.0
    accumulate: int = 1  # batches for one update
    ema_decay: float = 0.0  # 0: none; else the averaged weights are evaluated and exported
    freeze: tuple[str, ...] = ()  # parameter paths that begin so: "encoder", "decoder.embed_tokens"
    remat: bool = False  # computes activations again in the backward pass: slower, smaller


@dataclass(frozen=True)
class EvaluateConfig:
    manifest: tuple[str, ...] = ()
    every: int = 0  # steps; 0: at the end alone
    max_rows: int = 0  # 0: all
    options: dict[str, object] = field(default_factory=dict)  # of `transcribe`


@dataclass(frozen=True)
class TrainConfig:
    """One run. steps: batches, of batch_size windows each, over all devices."""

    output: str = "runs/train"  # checkpoints/, metrics.jsonl, tensorboard/, curves.png, export/
    seed: int = 0
    steps: int = 1000
    batch_size: int = 8
    log_every: int = 10
    save_every: int = 200
    keep: int = 3  # the last so many checkpoints, beside the best by WER
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


def load_config(file: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> TrainConfig:
    """A run as a TOML file (None: the defaults) and a command line's `--name value ...` describe it.

    overrides: names are dotted, `--optimizer.learning_rate 1e-4 --data.train a.jsonl b.jsonl`; they win over the file.
    Raises ValueError, in one line, for what is unknown, of the wrong type or out of range; OSError for no such file.
    """
    content: dict[str, Any] = {}
    if file is not None:
        try:
            content = tomllib.loads(Path(file).read_text("utf-8"))
        except ValueError as error:  # no TOML, or no UTF-8
            raise ValueError(f"{file} is no TOML file: {error}") from None
        try:
            from_dict(content)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
    for name, texts in _options(overrides):
        *sections, last = name.split(".")
        within = content
        for section in sections:
            within = within.setdefault(section, {})
        within[last] = _from_texts(name, texts)
    config = from_dict(content)
    check(config)
    return config


def from_dict(content: Mapping[str, Any]) -> TrainConfig:
    """From nested mappings, as TOML or `to_dict` have them. Raises ValueError for an unknown name or a wrong type."""
    return _make(TrainConfig, content, "")


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Nested dicts and lists, as JSON keeps them."""
    return dict(json.loads(json.dumps(asdict(config))))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What keeps a run described by `before` from going on as `now` (both of `to_dict`), as "name: old -> new"."""
    old, new = _flat(before), _flat(now)
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


def _make(kind: type[T], content: Any, prefix: str) -> T:
    """A dataclass of this module from what stands under its name."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{prefix[:-1]}={content!r} must be a table of names and values")
    hints = get_type_hints(kind)
    for name in content:
        if name not in hints:
            raise ValueError(_unknown(f"{prefix}{name}"))
    return kind(**{name: _typed(f"{prefix}{name}", value, hints[name]) for name, value in content.items()})


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value as its field's type has it."""
    if is_dataclass(hint):
        return _make(cast(type, hint), value, f"{name}.")
    if get_origin(hint) is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{name}={value!r} must be a table of names and values")
        return dict(value)
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name}={value!r} must be a list: [{value!r}]")
        kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        if len(value) != len(kinds):
            raise ValueError(f"{name}={list(value)} must be {len(kinds)} values, not {len(value)}")
        return tuple(_typed(name, item, kind) for item, kind in zip(value, kinds, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{name}={value!r} must be {_KINDS[hint]}")
    return value


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """`--a.b 1 2 --c=3` -> (a.b, [1, 2]), (c, [3]). Names may have hyphens for underscores."""
    found: list[tuple[str, list[str]]] = []
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            found.append((name.replace("-", "_"), [value] if equals else []))
        elif found:
            found[-1][1].append(argument)
        else:
            raise ValueError(f"{argument!r} follows no option; write --name value, or --config {argument}")
    yield from found


def _from_texts(name: str, texts: list[str]) -> Any:
    """What was written behind --name, as TOML would have it."""
    hint = _fields().get(name)
    if hint is None:
        parent = name.rpartition(".")[0]
        if get_origin(_fields().get(parent)) is not dict:  # only of these, names are not known here
            raise ValueError(_unknown(name))
        values = [_from_toml(text) for text in texts]
        return values[0] if len(values) == 1 else values
    if get_origin(hint) is dict:
        raise ValueError(f"{name} is a table; give its values one by one: --{name}.KEY VALUE")
    if get_origin(hint) is tuple:
        return [_parsed(name, text, get_args(hint)[0]) for text in texts]
    if len(texts) != 1:
        raise ValueError(f"{name} needs one value, but {' '.join(texts) or 'none'} was given")
    return _parsed(name, texts[0], hint)


def _parsed(name: str, text: str, hint: Any) -> Any:
    if hint is str:
        return text
    try:
        if get_origin(hint) is tuple:  # a (layer, head), as --alignment_heads has them
            return [int(part) for part in text.split(":")]
        return {"true": True, "false": False}[text.lower()] if hint is bool else hint(text)
    except (KeyError, ValueError):
        raise ValueError(f"{name}={text!r} must be {_KINDS.get(hint, 'layer:head')}") from None


def _from_toml(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        return text


@cache
def _fields(kind: Any = None, prefix: str = "") -> dict[str, Any]:
    """Dotted names of all values -> their types."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(kind or TrainConfig).items():
        found |= _fields(cast(Any, hint), f"{prefix}{name}.") if is_dataclass(hint) else {f"{prefix}{name}": hint}
    return found


def _unknown(name: str) -> str:
    """Says so, and which name is meant: the same one in another place, or the most like it."""
    names = [*_fields(), *{field.partition(".")[0] for field in _fields()}]
    last = name.rpartition(".")[2]
    near = [known for known in names if known.rpartition(".")[2] == last] or get_close_matches(name, names, 1, 0.5)
    near = near or get_close_matches(last, names, 1, 0.5)
    return f"{name} is unknown" + (f"; did you mean {near[0]}?" if near else f"; there are {', '.join(_fields())}")


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

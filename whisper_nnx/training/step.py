"""One step of training: a batch in, weights moved. Jitted, donated, on one device or many with the same code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.traverse_util import unflatten_dict
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from whisper_nnx import ops
from whisper_nnx.audio.features import log_mel_spectrogram
from whisper_nnx.model.config import RELEASED, WhisperConfig
from whisper_nnx.model.layers import Linear
from whisper_nnx.model.outputs import DecoderStates
from whisper_nnx.model.summary import Module
from whisper_nnx.model.whisper import TextDecoder, Whisper
from whisper_nnx.text.tokenizer import Tokenizer
from whisper_nnx.training import loss
from whisper_nnx.training.config import ModelConfig, TrainConfig
from whisper_nnx.training.ctc_head import load_ctc_head
from whisper_nnx.training.lora import LoraParam, add_lora, merge
from whisper_nnx.training.optimizer import averaged, learning_rate, make_optimizer
from whisper_nnx.training.products import training_ops
from whisper_nnx.training.projection import projected_cross_entropy
from whisper_nnx.training.spec_augment import spec_augment
from whisper_nnx.training.targets import blank_of

Batch = Mapping[str, Any]
Arrays = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Path = tuple[Any, ...]
_ALL = PartitionSpec("data")
# Of a batch; its rows are for people.
_USED = ("waveform", "first_position", "ids", "labels", "weights", "spans", "ctc", "ctc_weight", "frames")


class Trainee(Module):
    """A Whisper and what it has in training alone: a CTC head on the encoder, or None."""

    def __init__(self, whisper: Whisper, ctc_head: nnx.Linear | None = None):
        self.whisper = whisper
        self.ctc_head = ctc_head


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes, and the weights that it does not. Arrays by their path in the model.

    step: int32 [], batches done. params: trained, float32. frozen: the others. ema: averaged params, or None.
    """

    step: jax.Array
    params: Arrays
    frozen: Arrays
    opt_state: Any
    ema: Arrays | None


@dataclass(frozen=True)
class Static:
    """What is no array: the structure of a trainee, its shape, and the place of each path in it."""

    graph: Any
    places: Mapping[str, Path]
    config: WhisperConfig

    def trainee(self, arrays: Mapping[str, jax.Array]) -> Trainee:
        return nnx.merge(self.graph, unflatten_dict({self.places[path]: array for path, array in arrays.items()}))


def new_model(config: ModelConfig, tokenizer: Tokenizer, rngs: nnx.Rngs) -> Whisper:
    """A model with random weights of `config.shape`; the vocabulary's size is the tokenizer's unless it is given.

    Raises ValueError for an unknown size or field, or a shape that cannot be built.
    """
    shape: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, **config.shape}
    size = shape.pop("size", None)
    if size is not None and size not in RELEASED:
        raise ValueError(f"model.shape.size={size!r} is unknown; choose one of {', '.join(RELEASED)}")
    try:
        whisper = replace(RELEASED[size], **shape) if size is not None else WhisperConfig(**shape)
    except TypeError as error:
        raise ValueError(f"model.shape: {error}; its fields are those of WhisperConfig") from None
    model = Whisper(whisper, rngs=rngs, dtype=jnp.dtype(config.dtype), param_dtype=jnp.float32, tokenizer=tokenizer)
    for conv in (model.encoder.conv1, model.encoder.conv2):
        conv.kernel.set_value(conv.kernel[...] * config.conv_init_scale)
    return model


def make_trainee(model: Whisper, config: TrainConfig, rngs: nnx.Rngs) -> Trainee:
    """A copy of the model, with float32 weights, ready to be trained: LoRA and the CTC head are added as configured.

    The head is that of an earlier stage where `config.model.init` has one, else random.

    Raises ValueError for guided heads that the decoder lacks, unknown LoRA targets, or CTC without a tokenizer.
    """
    graph, weights = nnx.split(model)
    model = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.float32), weights))
    if config.loss.guide_weight:
        if not config.loss.guide_heads:
            raise ValueError(
                f"loss.guide_weight={config.loss.guide_weight} needs loss.guide_heads; name some, or give 0"
            )
        model.config = replace(model.config, alignment_heads=config.loss.guide_heads)
    if config.lora.rank:
        model = add_lora(model, config.lora, rngs)
    if not (config.loss.ctc_weight or config.loss.frame_weight):
        return Trainee(model)
    if model.tokenizer is None:
        raise ValueError("loss.ctc_weight and frame_weight need the number of text tokens; give the model a tokenizer")
    dtype = model.decoder.dtype
    products: dict[str, Any] = {"dtype": dtype, "precision": ops.precision_of(dtype), "rngs": rngs}
    init = nnx.initializers.normal(0.02)
    classes = blank_of(model.tokenizer, config.data.ctc_units) + 1
    head = Linear(model.config.d_model, classes, kernel_init=init, **products)
    load_ctc_head(head, config.model.init)
    return Trainee(model, head)


def make_mesh() -> Mesh:
    """All devices in a row, each of which takes its part of every batch."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def put_batch(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch, on its devices. Raises ValueError where the rows cannot be shared out evenly."""
    rows, devices = len(batch["ids"]), jax.local_device_count()
    if rows % devices:
        raise ValueError(f"batch_size: {rows} rows cannot be shared out evenly to {devices} devices")
    sharding = NamedSharding(mesh, _ALL)
    arrays = {name: np.asarray(x) for name, x in batch.items() if name in _USED}
    return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in arrays.items()}


def create_state(trainee: Trainee, config: TrainConfig, mesh: Mesh) -> tuple[TrainState, Static]:
    """The state before the first step, with its own copies of all arrays on every device, and the structure.

    Raises ValueError where `optimizer.freeze` has a path that no parameter begins with, or leaves none.
    """
    graph, weights = nnx.split(trainee)
    variables = {_dotted(path): (path, variable) for path, variable in nnx.to_flat_state(weights)}
    for prefix in config.optimizer.freeze:
        if not any(_begins(path, prefix) for path in variables):
            raise ValueError(f"optimizer.freeze: no parameter's path begins with {prefix!r}")
    trained = {path for path, (_, variable) in variables.items() if _is_trained(path, variable, config)}
    if not trained:
        raise ValueError(f"optimizer.freeze={config.optimizer.freeze} leaves no parameter to train")

    def copies(chosen: set[str]) -> Arrays:
        return {path: jnp.array(variables[path][1][...], copy=True) for path in sorted(chosen)}

    params = copies(trained)
    opt_state = make_optimizer(config.optimizer, config.steps).init(params)
    ema = copies(trained) if config.optimizer.ema_decay else None
    state = TrainState(jnp.zeros((), jnp.int32), params, copies(variables.keys() - trained), opt_state, ema)
    static = Static(graph, {path: place for path, (place, _) in variables.items()}, trainee.whisper.config)
    return jax.device_put(state, NamedSharding(mesh, PartitionSpec())), static


def _dotted(path: Path) -> str:
    return ".".join(map(str, path[1:] if path[0] == "whisper" else path))


def _begins(path: str, prefix: str) -> bool:
    return f"{path}.".startswith(f"{prefix}.")


def _is_trained(path: str, variable: nnx.Variable, config: TrainConfig) -> bool:
    if not isinstance(variable, nnx.Param) or any(_begins(path, prefix) for prefix in config.optimizer.freeze):
        return False
    return not config.lora.rank or isinstance(variable, LoraParam) or _begins(path, "ctc_head")


def trained_model(static: Static, state: TrainState, use_ema: bool = True, dtype: Any = None) -> Whisper:
    """The model as it is now, with its own arrays: averaged where there is an average, LoRA merged, without CTC head.

    dtype: of the parameters; default: float32.
    """
    params = state.ema if use_ema and state.ema is not None else state.params
    arrays = {path: jnp.array(x, copy=True) for path, x in (state.frozen | params).items()}
    model = merge(static.trainee(arrays).whisper)
    if dtype is None:
        return model
    graph, weights = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lambda x: x.astype(dtype), weights))


def make_step(
    static: Static, config: TrainConfig, mesh: Mesh, teacher: Whisper | None = None
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """step(state, batch) -> (state, metrics); compiled at its first call. The state that is given is used up.

    metrics: float32 scalars of this batch before the update: loss, cross_entropy, ctc, frames, guide, kl, accuracy (of
    labels, given those before), gradient_norm (before clipping), learning_rate.
    Raises ValueError for a teacher that hears or says other things than the student.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    if teacher is not None:
        for name in ("num_mel_bins", "vocab_size", "max_source_positions"):
            ours, theirs = getattr(static.config, name), getattr(teacher.config, name)
            if ours != theirs:
                raise ValueError(
                    f"distill.teacher has {name}={theirs}, its student {ours}; take one of the same family"
                )
        teacher = jax.device_put(teacher, everywhere)
    step = partial(_step, static=static, config=config, mesh=mesh)
    compiled = jax.jit(step, donate_argnums=0, out_shardings=everywhere, static_argnums=3)
    shares: bool | None = None

    def run(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        nonlocal shares
        if shares is None:
            shares = teacher is not None and _has_encoder_of(teacher, state, static)
        return compiled(state, batch, teacher, shares)

    return run


def _has_encoder_of(teacher: Whisper, state: TrainState, static: Static) -> bool:
    """Whether what the student hears is what the teacher hears: it need not be computed twice then."""
    theirs = {_dotted(("encoder", *path)): x[...] for path, x in nnx.to_flat_state(nnx.state(teacher.encoder))}
    if static.config.dropout or {path for path in static.places if _begins(path, "encoder")} != theirs.keys():
        return False
    return all(path in state.frozen and bool(jnp.array_equal(x, state.frozen[path])) for path, x in theirs.items())


def _step(
    state: TrainState,
    batch: Batch,
    teacher: Whisper | None,
    shares_encoder: bool,
    *,
    static: Static,
    config: TrainConfig,
    mesh: Mesh,
) -> tuple[TrainState, Metrics]:
    settings = config.optimizer
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)

    def losses(params: Arrays) -> tuple[jax.Array, Metrics]:
        trainee = static.trainee(state.frozen | params)
        return _losses(trainee, teacher, batch, key, config, mesh, shares_encoder)

    gradient, metrics = jax.grad(losses, has_aux=True)(state.params)
    updates, opt_state = make_optimizer(settings, config.steps).update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema, updates_done = state.ema, state.step // settings.accumulate
    if ema is not None:
        is_update = (state.step + 1) % settings.accumulate == 0
        moved = averaged(ema, params, settings.ema_decay, updates_done)
        ema = jax.tree.map(lambda new, old: jnp.where(is_update, new, old), moved, ema)
    rate = learning_rate(settings, config.steps)(updates_done * settings.accumulate)
    metrics |= {"gradient_norm": _norm(gradient), "learning_rate": jnp.asarray(rate, jnp.float32)}
    return replace(state, step=state.step + 1, params=params, opt_state=opt_state, ema=ema), metrics


def _factors(trainee: Trainee, config: TrainConfig) -> str:
    """The dtype of what is multiplied."""
    return config.model.product_dtype or jnp.dtype(trainee.whisper.decoder.dtype).name


def _norm(arrays: Arrays) -> jax.Array:
    return jnp.sqrt(sum(jnp.vdot(x, x) for x in arrays.values()))


def _features(batch: Batch, whisper: Whisper, key: jax.Array, config: TrainConfig, mesh: Mesh) -> jax.Array:
    """Log-mel of the batch's waveforms [B,M,T], with SpecAugment."""
    mels = partial(log_mel_spectrogram, n_mels=whisper.config.num_mel_bins)
    # It takes row after row, which a device is to do with its own rows alone.
    mel = jax.shard_map(mels, mesh=mesh, in_specs=_ALL, out_specs=_ALL, check_vma=False)(batch["waveform"])
    return spec_augment(mel, key, config.augment)


def _losses(
    trainee: Trainee,
    teacher: Whisper | None,
    batch: Batch,
    key: jax.Array,
    config: TrainConfig,
    mesh: Mesh,
    shares_encoder: bool,
) -> tuple[jax.Array, Metrics]:
    """(what is made smaller, its parts)."""
    whisper, settings = trainee.whisper, config.loss
    feature_key, dropout_key = jax.random.split(key)
    mel = _features(batch, whisper, feature_key, config, mesh)
    whole = mel.shape[2] == 2 * whisper.config.max_source_positions
    first = None if whole else batch["first_position"]
    rngs = nnx.Rngs(dropout=dropout_key) if whisper.config.dropout else None
    options: dict[str, Any] = {"deterministic": rngs is None, "rngs": rngs, "remat": config.optimizer.remat}
    rounds = bool(config.model.product_dtype)
    with ops.using(training_ops(ops.current(), _factors(trainee, config), rounds)):
        heard = whisper.encode(mel, first_position=first, **options)
        hidden, scores, *_ = _say(whisper, heard, batch["ids"], settings.guide_heads, **options)
        spelled = trainee.ctc_head(heard) if trainee.ctc_head is not None else None
    said = batch["labels"], batch["weights"], settings.label_smoothing
    if teacher is None and ops.current().window_by_window:
        table = _output_table(whisper.decoder)
        entropy, accuracy = projected_cross_entropy(hidden, table, *said, _factors(trainee, config))
    else:
        logits = whisper.decoder.logits(hidden)
        entropy, accuracy = loss.cross_entropy(logits, *said)
    zero = jnp.zeros((), jnp.float32)
    parts = {"cross_entropy": entropy.value, "ctc": zero, "frames": zero, "guide": zero, "kl": zero}
    total = entropy.value
    if teacher is not None:
        heard_by_teacher = heard if shares_encoder else teacher.encode(mel, first_position=first)
        theirs = teacher.decoder.logits(_say(teacher, heard_by_teacher, batch["ids"], ()).last)
        parts["kl"] = loss.divergence(logits, theirs, batch["weights"], config.distill.temperature).value
        total = config.distill.cross_entropy_weight * total + config.distill.kl_weight * parts["kl"]
    if spelled is not None:
        blank = spelled.shape[-1] - 1
        parts["ctc"] = loss.ctc(spelled, batch["ctc"], batch["ctc_weight"], blank).value
        parts["frames"] = loss.frames(spelled, batch["frames"]).value
        total += settings.ctc_weight * parts["ctc"] + settings.frame_weight * parts["frames"]
    if settings.guide_weight:
        parts["guide"] = loss.guide(scores, batch["spans"]).value
        total += settings.guide_weight * parts["guide"]
    return total, {"loss": total, "accuracy": accuracy.value, **parts}


def _say(
    whisper: Whisper, heard: jax.Array, ids: jax.Array, heads: tuple[tuple[int, int], ...], **options: Any
) -> DecoderStates:
    """Of encoder_output [B,T,D] and ids [B,S]: hidden states, and the audio scores of the heads [B,A,S,T]."""
    return whisper.decoder.hidden_states(ids, whisper.decoder.cross_attention(heard), heads, **options)


def _output_table(decoder: TextDecoder) -> jax.Array:
    """[D,V], by which hidden states are multiplied."""
    untied = decoder.proj_out
    return (decoder.embed_tokens.embedding[...].T if untied is None else untied.kernel[...]).astype(decoder.dtype)

"""One training step, jitted with a donated state; the same code runs on one or many devices."""

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
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from whisper_nnx import ops
from whisper_nnx.audio.features import log_mel_spectrogram
from whisper_nnx.model.config import RELEASED, WhisperConfig
from whisper_nnx.model.layers import Linear, audio_scores
from whisper_nnx.model.sharding import check_fits, shard_model, spec_of
from whisper_nnx.model.summary import Module
from whisper_nnx.model.whisper import TextDecoder, Whisper
from whisper_nnx.runtime import devices as devices_
from whisper_nnx.runtime.devices import DATA, MODEL, put
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
_ALL = PartitionSpec(DATA)
# The parts of a batch that go to the devices.
_USED = ("waveform", "first_position", "ids", "labels", "weights", "spans", "ctc", "ctc_weight", "frames")


class Trainee(Module):
    """A Whisper with an optional CTC head on the encoder, used only in training."""

    def __init__(self, whisper: Whisper, ctc_head: nnx.Linear | None = None):
        self.whisper = whisper
        self.ctc_head = ctc_head


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Training state; arrays by path in the model.

    step: int32 [], batches done. params: trained, float32. frozen: all other arrays. ema: averaged params, or None.
    """

    step: jax.Array
    params: Arrays
    frozen: Arrays
    opt_state: Any
    ema: Arrays | None


@dataclass(frozen=True)
class Static:
    """Static part of a trainee: its graph, its configuration and the position of each path."""

    graph: Any
    places: Mapping[str, Path]
    config: WhisperConfig

    def trainee(self, arrays: Mapping[str, jax.Array]) -> Trainee:
        return nnx.merge(self.graph, unflatten_dict({self.places[path]: array for path, array in arrays.items()}))


def new_model(config: ModelConfig, tokenizer: Tokenizer, rngs: nnx.Rngs) -> Whisper:
    """Makes a model of `config.shape` with random weights; its default vocabulary size is the tokenizer's.

    Raises ValueError for an unknown size or field, or an invalid shape.
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
    """Copies the model with float32 weights and adds LoRA and the CTC head as configured.

    The CTC head is loaded from `config.model.init` if it has one, else random. Raises ValueError for guided heads that
    the decoder lacks, unknown LoRA targets, or CTC without a tokenizer.
    """
    graph, weights = nnx.split(model)
    model = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.float32), weights))
    if config.loss.guide_weight:
        if not config.loss.guide_heads:
            raise ValueError(
                f"loss.guide_weight={config.loss.guide_weight} needs loss.guide_heads; give them, or weight 0"
            )
        model.config = replace(model.config, alignment_heads=config.loss.guide_heads)
    if config.lora.rank:
        model = add_lora(model, config.lora, rngs)
    if not (config.loss.ctc_weight or config.loss.frame_weight):
        return Trainee(model)
    if model.tokenizer is None:
        raise ValueError("loss.ctc_weight and frame_weight need the number of text tokens; give the model a tokenizer")
    dtype = model.decoder.dtype
    options: dict[str, Any] = {"dtype": dtype, "precision": ops.precision_of(dtype), "rngs": rngs}
    init = nnx.initializers.normal(0.02)
    classes = blank_of(model.tokenizer, config.data.ctc_units) + 1
    head = Linear(model.config.d_model, classes, kernel_init=init, **options)
    load_ctc_head(head, config.model.init)
    return Trainee(model, head)


def make_mesh(model_parallel: int = 1) -> Mesh:
    """Makes a mesh of all devices of all processes: so many divide each layer, the others the batch.

    Raises ValueError for a number that does not divide the devices of a process.
    """
    if (devices := jax.local_device_count()) % model_parallel:
        raise ValueError(f"model_parallel={model_parallel} does not divide the {devices} devices of a process")
    return devices_.make_mesh(model=model_parallel, devices=jax.devices())


def put_batch(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's rows of a batch on its devices. Raises ValueError if they cannot be split evenly."""
    rows, devices = len(batch["ids"]), jax.local_device_count() // mesh.shape[MODEL]
    if rows % devices:
        parts = "devices" if mesh.shape[MODEL] == 1 else f"groups of {mesh.shape[MODEL]} devices"
        raise ValueError(f"batch_size: {rows} rows cannot be split evenly over {devices} {parts}")
    sharding = NamedSharding(mesh, _ALL)
    arrays = {name: np.asarray(x) for name, x in batch.items() if name in _USED}
    return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in arrays.items()}


def create_state(trainee: Trainee, config: TrainConfig, mesh: Mesh) -> tuple[TrainState, Static]:
    """Makes the initial state, with copies of all arrays on every device or divided, and the static part.

    Raises ValueError if `optimizer.freeze` matches no parameter, or all, or the mesh does not divide the model's heads.
    """
    check_fits(trainee.whisper.config, mesh)
    graph, weights = nnx.split(trainee)
    variables = {_dotted(path): (path, variable) for path, variable in nnx.to_flat_state(weights)}
    for prefix in config.optimizer.freeze:
        if not any(_starts_with(path, prefix) for path in variables):
            raise ValueError(f"optimizer.freeze: no parameter's path starts with {prefix!r}")
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
    return jax.tree.map(put, state, _shardings(state, mesh)), static


def _shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """Where each array is: as the table says of the parameter whose path and shape it has, else everywhere."""
    shapes = {path: x.shape for path, x in (state.frozen | state.params).items()}

    def place(path: Path, x: jax.Array) -> NamedSharding:
        name = next((str(key.key) for key in reversed(path) if isinstance(key, jax.tree_util.DictKey)), "")
        return NamedSharding(mesh, spec_of(name, mesh) if shapes.get(name) == x.shape else PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, state)


def _dotted(path: Path) -> str:
    return ".".join(map(str, path[1:] if path[0] == "whisper" else path))


def _starts_with(path: str, prefix: str) -> bool:
    return f"{path}.".startswith(f"{prefix}.")


def _is_trained(path: str, variable: nnx.Variable, config: TrainConfig) -> bool:
    if not isinstance(variable, nnx.Param) or any(_starts_with(path, prefix) for prefix in config.optimizer.freeze):
        return False
    return not config.lora.rank or isinstance(variable, LoraParam) or _starts_with(path, "ctc_head")


def trained_model(static: Static, state: TrainState, use_ema: bool = True, dtype: Any = None) -> Whisper:
    """Returns a copy of the current model: averaged weights if there are any, LoRA merged, without CTC head.

    Args:
      static: from `create_state`.
      state: the current state.
      use_ema: whether to use averaged weights.
      dtype: of the parameters, by default float32.
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
    """Makes step(state, batch) -> (state, metrics), compiled at its first call; it donates the given state.

    metrics: float32 scalars of this batch before the update: loss, cross_entropy, ctc, frames, guide, kl, accuracy (of
    labels, given the previous ones), gradient_norm (before clipping), learning_rate.
    Raises ValueError for a teacher whose mels, positions or vocabulary differ from the student's.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    if teacher is not None:
        for name in ("num_mel_bins", "vocab_size", "max_source_positions"):
            ours, theirs = getattr(static.config, name), getattr(teacher.config, name)
            if ours != theirs:
                raise ValueError(
                    f"distill.teacher has {name}={theirs}, its student {ours}; take one of the same family"
                )
        teacher = shard_model(teacher, mesh)
    step = partial(_step, static=static, config=config, mesh=mesh)
    compiled: Any = None
    shares: bool | None = None

    def run(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        nonlocal compiled, shares
        if shares is None:
            shares = teacher is not None and _has_encoder_of(teacher, state, static)
            places = _shardings(state, mesh), everywhere
            compiled = jax.jit(step, donate_argnums=0, out_shardings=places, static_argnums=3)
        return compiled(state, batch, teacher, shares)

    return run


def _has_encoder_of(teacher: Whisper, state: TrainState, static: Static) -> bool:
    """Whether student and teacher have the same frozen encoder, whose output is then computed only once."""
    theirs = {_dotted(("encoder", *path)): x[...] for path, x in nnx.to_flat_state(nnx.state(teacher.encoder))}
    if static.config.dropout or {path for path in static.places if _starts_with(path, "encoder")} != theirs.keys():
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


def _operand_dtype(trainee: Trainee, config: TrainConfig) -> str:
    """Returns the dtype of matmul operands."""
    return config.model.product_dtype or jnp.dtype(trainee.whisper.decoder.dtype).name


def _norm(arrays: Arrays) -> jax.Array:
    return jnp.sqrt(sum(jnp.vdot(x, x) for x in arrays.values()))


def _features(batch: Batch, whisper: Whisper, key: jax.Array, config: TrainConfig, mesh: Mesh) -> jax.Array:
    """Returns the log-mel spectrogram of the batch, [B,M,T], with SpecAugment."""
    mels = partial(log_mel_spectrogram, n_mels=whisper.config.num_mel_bins)
    # It loops over rows, so each device must process its own rows only.
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
    """Returns (the loss to minimize, its parts)."""
    whisper, settings = trainee.whisper, config.loss
    feature_key, dropout_key = jax.random.split(key)
    mel = _features(batch, whisper, feature_key, config, mesh)
    whole = mel.shape[2] == 2 * whisper.config.max_source_positions
    first = None if whole else batch["first_position"]
    rngs = nnx.Rngs(dropout=dropout_key) if whisper.config.dropout else None
    options: dict[str, Any] = {"deterministic": rngs is None, "rngs": rngs, "remat": config.optimizer.remat}
    rounds = bool(config.model.product_dtype)
    with ops.using(training_ops(ops.current(), _operand_dtype(trainee, config), rounds)):
        encoded = whisper.encode(mel, first_position=first, **options)
        cross = whisper.decoder.cross_attention(encoded)
        hidden, queries, *_ = whisper.decoder.hidden_states(batch["ids"], cross, settings.guide_heads, **options)
        ctc_logits = trainee.ctc_head(encoded) if trainee.ctc_head is not None else None
    targets = batch["labels"], batch["weights"], settings.label_smoothing
    if teacher is None and ops.current().window_by_window:
        table = _output_table(whisper.decoder)
        entropy, accuracy = projected_cross_entropy(hidden, table, *targets, _operand_dtype(trainee, config))
    else:
        logits = whisper.decoder.logits(hidden)
        entropy, accuracy = loss.cross_entropy(logits, *targets)
    zero = jnp.zeros((), jnp.float32)
    parts = {"cross_entropy": entropy.value, "ctc": zero, "frames": zero, "guide": zero, "kl": zero}
    total = entropy.value
    if teacher is not None:
        teacher_encoded = encoded if shares_encoder else teacher.encode(mel, first_position=first)
        theirs = teacher.decoder(batch["ids"], teacher_encoded)
        parts["kl"] = loss.divergence(logits, theirs, batch["weights"], config.distill.temperature).value
        total = config.distill.cross_entropy_weight * total + config.distill.kl_weight * parts["kl"]
    if ctc_logits is not None:
        blank = ctc_logits.shape[-1] - 1
        parts["ctc"] = loss.ctc(ctc_logits, batch["ctc"], batch["ctc_weight"], blank).value
        parts["frames"] = loss.frames(ctc_logits, batch["frames"]).value
        total += settings.ctc_weight * parts["ctc"] + settings.frame_weight * parts["frames"]
    if settings.guide_weight:
        scores = audio_scores(queries, cross, settings.guide_heads)
        parts["guide"] = loss.guide(scores, batch["spans"]).value
        total += settings.guide_weight * parts["guide"]
    return total, {"loss": total, "accuracy": accuracy.value, **parts}


def _output_table(decoder: TextDecoder) -> jax.Array:
    """Returns the output projection [D,V]."""
    untied = decoder.proj_out
    return (decoder.embed_tokens.embedding[...].T if untied is None else untied.kernel[...]).astype(decoder.dtype)

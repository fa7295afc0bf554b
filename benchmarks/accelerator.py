"""What our programs cost on accelerators, by their compilers, which need no device.

    python benchmarks/accelerator.py --chip v5e h200 --size base --batch 64 --result FILE

The weights are abstract. Figures: flops and bytes as XLA counts them (custom calls, such as fused attention, count as
nothing), the memory of the arguments and the temporary one, and on TPUs the cycles that the compiler estimates, those
of loops times their number. `prompt` and `step` are one pass of the decoder, over 32 ids and over one, with the next
token; `beam` is a step of five beams. Needs libtpu for TPUs, jax-cuda13-plugin and jax-cuda13-pjrt for GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # the chips are described, not there
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# Without a device nothing is tuned by trial; this chooses tiles of matmuls by XLA's model of their cost.
os.environ.setdefault("XLA_FLAGS", "--xla_gpu_experimental_cost_model_gemm_tiling_options=top=1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from benchmarks.scoring import write_result
from weight_loader.load import abstract_model
from whisper_nnx import ops
from whisper_nnx.decoding.loop import PREFILL_CHUNK, padded_positions
from whisper_nnx.model.cache import KVCache
from whisper_nnx.model.config import RELEASED
from whisper_nnx.model.whisper import TextDecoder, Whisper
from whisper_nnx.timing import token_times as timing
from whisper_nnx.timing.alignment_heads import alignment_heads
from whisper_nnx.transcription import windows

TPUS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
PROGRAMS = ("encode", "prompt", "step", "beam", "align")
BEAMS = 5
TEXT = 128  # ids of a window that is aligned
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.\-]+) .*?\{\n(.*?)^\}", re.M | re.S)
_LOOP = re.compile(r" while\(.*?condition=%([\w.\-]+), body=%([\w.\-]+)")
_LIMIT = re.compile(r"s32\[\]\S* constant\((\d+)\)")


@cache
def device(chip: str, gpu_description: Path | None = None) -> Any:
    """A device of a chip that need not be there. `gpu_description`: text of XLA's GpuTargetConfigProto."""
    if chip in TPUS:
        return topologies.get_topology_desc(platform="tpu", topology_name=TPUS[chip]).devices[0]
    if gpu_description is None:
        raise SystemExit(f"--chip {chip} needs --gpu_description, the text of XLA's GpuTargetConfigProto of the GPU")
    described = {"target_config": gpu_description.read_text(), "topology": "1x1x1"}
    return topologies.get_topology_desc(platform="cuda", topology_name="", **described).devices[0]


def advance(decoder: TextDecoder, cache: KVCache, ids: jax.Array, rows: jax.Array | None) -> tuple[jax.Array, KVCache]:
    """ids [R,n] -> the most probable next tokens [R]; beams first go on from `rows` [R]."""
    hidden, cache = decoder.step(ids, cache if rows is None else cache.reorder(rows))
    return ops.argmax(decoder.logits(hidden[:, -1])), cache


def program(name: str, model: Whisper, batch: int) -> tuple[Any, tuple[Any, ...]]:
    """A jitted function by its name, and its abstract arguments for a batch of windows."""
    config, decoder = model.config, model.decoder
    ints, bools = partial(jax.ShapeDtypeStruct, dtype=jnp.int32), partial(jax.ShapeDtypeStruct, dtype=jnp.bool_)
    mel = jax.ShapeDtypeStruct((batch, config.num_mel_bins, 2 * config.max_source_positions), jnp.float32)
    if name == "encode":
        return windows._encode.jitted, (model.encoder, decoder, mel)
    cross = jax.eval_shape(windows._encode.jitted, model.encoder, decoder, mel).cross
    if name == "align":
        text = timing.AlignedText(*map(ints, ((batch, TEXT), (batch,), (batch, TEXT), (batch,), (batch,))))
        aligned = partial(timing.token_times.jitted, heads=alignment_heads(config))
        return jax.jit(aligned), (decoder, cross, text, bools((config.vocab_size,)))
    group = BEAMS if name == "beam" else 1
    size = padded_positions(config.max_target_positions)
    held = jax.eval_shape(lambda cross: KVCache.init(cross, size).repeat(group), cross)
    ids = ints((batch * group, PREFILL_CHUNK if name == "prompt" else 1))
    rows = ints((batch * group,)) if name == "beam" else None
    return jax.jit(advance, donate_argnums=1), (decoder, held, ids, rows)


def compiled(name: str, chip: str, model: Whisper, batch: int, gpu: Path | None = None) -> Any:
    """A program, compiled for a chip."""
    place = jax.sharding.SingleDeviceSharding(device(chip, gpu))

    def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    with ops.using("accelerator"):
        function, args = program(name, model, batch)
        return function.lower(*jax.tree.map(abstract, args)).compile()


def figures(program: Any, chip: str) -> dict[str, float]:
    """Flops, bytes and memory of a compiled program, and on TPUs the cycles."""
    memory = program.memory_analysis()
    found = {"arguments_mb": memory.argument_size_in_bytes / 1e6, "temporary_mb": memory.temp_size_in_bytes / 1e6}
    if chip in TPUS:
        costs = program.cost_analysis()
        found["mcycles"] = cycles(program.as_text()) / 1e6
    else:  # a GPU's executable has no analysis of its own
        from jaxlib import _jax

        [module] = program.runtime_executable().hlo_modules()
        costs = _jax.hlo_module_cost_analysis(jax.devices("cpu")[0].client, module)
    return found | {"gflop": costs["flops"] / 1e9, "mb": costs["bytes accessed"] / 1e6}


def cycles(text: str) -> int:
    """Estimated cycles of a TPU's program, given as text; a loop that counts to a constant does so that many times."""
    parts = dict(_COMPUTATION.findall(text))

    def total(name: str) -> int:
        body = parts.get(name, "")
        found = sum(map(int, _CYCLES.findall(body)))
        for condition, inner in _LOOP.findall(body):
            limits = _LIMIT.findall(parts.get(condition, ""))
            found += (int(limits[0]) if len(limits) == 1 else 1) * total(inner)
        return found

    return total(next(name for name in parts if f"\nENTRY %{name} " in text))


def table(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for size in args.size:
        config = RELEASED[size]
        if args.layers:
            heads = tuple((layer, head) for layer, head in alignment_heads(config) if layer < args.layers)
            changes = {"encoder_layers": args.layers, "decoder_layers": args.layers}
            config = replace(config, alignment_heads=heads or ((args.layers - 1, 0),), **changes)
        model = abstract_model(config, jnp.bfloat16, jnp.bfloat16, kv_cache_dtype=args.kv_cache_dtype)
        for chip in args.chip:
            for batch in args.batch:
                for name in args.program:
                    began = time.monotonic()
                    made = compiled(name, chip, model, batch, args.gpu_description)
                    if args.text:
                        (args.text / f"{size}-{chip}-{batch}-{name}.txt").write_text(made.as_text())
                    found = {key: round(value, 3) for key, value in figures(made, chip).items()}
                    about = {"size": size, "layers": args.layers, "chip": chip, "batch": batch, "program": name}
                    about |= {"kv_cache_dtype": args.kv_cache_dtype} if args.kv_cache_dtype else {}
                    yield about | found | {"compiled_s": round(time.monotonic() - began)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", nargs="+", default=["v5e"])
    parser.add_argument("--size", nargs="+", default=["base"], choices=list(RELEASED))
    parser.add_argument("--batch", nargs="+", type=int, default=[64])
    parser.add_argument("--program", nargs="+", default=list(PROGRAMS), choices=PROGRAMS)
    parser.add_argument("--layers", type=int, help="of encoder and decoder each, where all take too long to compile")
    parser.add_argument("--kv_cache_dtype", help="of the audio's keys and values, as in load_model")
    parser.add_argument("--gpu_description", type=Path, help="text of XLA's GpuTargetConfigProto")
    parser.add_argument("--text", type=Path, help="folder for the compiled programs as text")
    parser.add_argument("--result", type=Path)
    args = parser.parse_args()
    rows = []
    for row in table(args):
        print(json.dumps(row), flush=True)
        rows.append(row)
    if args.result:
        write_result(args.result, "compiled", dict(_versions()), programs=rows)


def _versions() -> Iterator[tuple[str, str]]:
    for name in ("jax", "libtpu", "jax-cuda13-plugin"):
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


if __name__ == "__main__":
    main()

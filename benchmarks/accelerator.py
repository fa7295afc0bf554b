"""What our programs cost on accelerators, by their compilers, which need no device.

    python benchmarks/accelerator.py                                   # the whole table, into the documents
    python benchmarks/accelerator.py --chip h200 --size base --program step --batch 16 --layers 2

Figures of a compiled program, whose weights are abstract:

- gflop, mb: what XLA counts. It counts nothing for cuDNN's attention, whose own are added.
- arguments_mb, temporary_mb, peak_mb: memory of the device; the peak includes arguments and results.
- mcycles, on TPUs: what the compiler estimates, those of loops times their number, without kernels of our own.

The table is a file of JSON lines in `results/`. A finished row is appended at once, and is left out the next time
unless the program or a compiler has changed. Sizes whose layers take too long to compile are compiled with two small
numbers of layers, whose difference stands for each of the others. --batch prints figures and keeps nothing.

Needs `pip install -r benchmarks/compilers.txt`, and for GPUs their description (XLA's GpuTargetConfigProto as text).
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import itertools
import json
import math
import os
import re
import sys
import time
from dataclasses import replace
from functools import cache
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

from benchmarks import tables
from benchmarks.plan import CHECKED, CHIPS, TABLE, Row, plan, read, worse
from benchmarks.programs import PROGRAMS
from weight_loader.load import abstract_model
from whisper_nnx import ops
from whisper_nnx.model.config import RELEASED, WhisperConfig
from whisper_nnx.ops import fused, int8_attention
from whisper_nnx.ops.accelerator import for_gpus
from whisper_nnx.timing.alignment_heads import alignment_heads

TPUS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
SHARED = Path(os.environ.get("WHISPER_NNX_SHARED", Path(__file__).parents[2] / "shared"))
DESCRIPTIONS = {"h200": SHARED / "aot" / "h200.txtpb"}
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.\-]+) .*?\{\n(.*?)^\}", re.M | re.S)
_LOOP = re.compile(r" while\(.*?condition=%([\w.\-]+), body=%([\w.\-]+)")
_LIMIT = re.compile(r"s32\[\]\S* constant\((\d+)\)")
_OPERAND = re.compile(r"(bf16|s8)\[([\d,]+)\]")
_KERNEL = re.compile(r'\b(?:backend_config|ir) = "[^"]*"')  # of Pallas for TPUs, and for Triton
_BYTES = {"bf16": 2, "s8": 1}
_KERNELS = tuple(f'custom_call_target="{name}' for name in ("__cudnn$fmha", "__gpu$xla.gpu.triton", "tpu_custom_call"))


@cache
def device(chip: str) -> Any:
    """A device of a chip that need not be there."""
    if chip in TPUS:
        return topologies.get_topology_desc(platform="tpu", topology_name=TPUS[chip]).devices[0]
    path = DESCRIPTIONS[chip]
    if not path.is_file():
        raise SystemExit(f"{path} does not exist: set WHISPER_NNX_SHARED, or give --gpu_description FILE")
    described = {"target_config": path.read_text(), "topology": "1x1x1"}
    return topologies.get_topology_desc(platform="cuda", topology_name="", **described).devices[0]


def config_of(size: str, layers: int) -> WhisperConfig:
    """A released size with that many layers in encoder and decoder (turbo's few stay as they are); 0: all."""
    config = RELEASED[size]
    if not layers:
        return config
    encoder, decoder = layers, layers if config.decoder_layers == config.encoder_layers else config.decoder_layers
    heads = {(min(layer, decoder - 1), head) for layer, head in alignment_heads(config)}
    return replace(config, encoder_layers=encoder, decoder_layers=decoder, alignment_heads=tuple(sorted(heads)))


def lowered(row: Row, layers: int) -> Any:
    """A program with that many layers, traced for a chip."""
    place = jax.sharding.SingleDeviceSharding(device(row.chip))

    def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    operations = ops.named("accelerator")
    with ops.using(operations if row.chip in TPUS else for_gpus(operations)):
        model = abstract_model(config_of(row.size, layers), jnp.bfloat16, jnp.bfloat16, kv_cache_dtype=row.cross)
        function, args, static = PROGRAMS[row.program](model, row.batch)
        return function.lower(*jax.tree.map(abstract, args), **static)


def figures(program: Any, row: Row) -> dict[str, float]:
    """Flops, bytes and memory of a compiled program, and on TPUs the cycles."""
    memory, text = program.memory_analysis(), program.as_text()
    kernel = kernels(text, row)
    found = {"arguments_mb": memory.argument_size_in_bytes / 1e6, "temporary_mb": memory.temp_size_in_bytes / 1e6}
    found["peak_mb"] = memory.peak_memory_in_bytes / 1e6
    if row.chip in TPUS:
        costs = program.cost_analysis()
        found |= {"mcycles": cycles(text) / 1e6, "kernel_gflop": kernel["flops"] / 1e9}
    else:  # a GPU's executable has no analysis of its own
        from jaxlib import _jax

        [module] = program.runtime_executable().hlo_modules()
        costs = _jax.hlo_module_cost_analysis(jax.devices("cpu")[0].client, module)
        costs = {name: costs[name] + own for name, own in kernel.items()}
    return found | {"gflop": costs["flops"] / 1e9, "mb": costs["bytes accessed"] / 1e6}


def kernels(text: str, row: Row) -> dict[str, float]:
    """Flops and bytes of the attention kernels of a compiled program, given as text: they read all that they are given.

    Of a GPU's, the shapes are known: queries, keys, values, a bias; the result is like the queries.
    """
    config, found = RELEASED[row.size], {"flops": 0.0, "bytes accessed": 0.0}
    whole = (row.batch, config.max_source_positions, 1, config.d_model)  # the same products as all heads apart
    for call in (line for line in text.splitlines() if any(kernel in line for kernel in _KERNELS)):
        given = [("bf16", whole)] * 3
        if row.chip not in TPUS:
            operands = call.split("operand_layout_constraints={")[1].split("}}")[0]
            given = [(dtype, tuple(map(int, shape.split(",")))) for dtype, shape in _OPERAND.findall(operands)]
        (_, queries), (_, keys), *_ = given
        found["flops"] += 4 * math.prod(queries) * keys[1]
        found["bytes accessed"] += sum(_BYTES[dtype] * math.prod(shape) for dtype, shape in [given[0], *given])
    return found


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


def measured(row: Row, programs: list[Any]) -> dict[str, float]:
    """Figures of a row from its traced programs, one for each number of layers."""
    found = [figures(program.compile(), row) for program in programs]
    scale = 0.0
    if len(found) == 2:  # from the larger one on, each layer costs as much as those by which they differ
        fewer, more = row.layers
        scale = (RELEASED[row.size].encoder_layers - more) / (more - fewer)
    return {name: round(value + scale * (value - found[0][name]), 3) for name, value in found[-1].items()}


def compilers(row: Row) -> str:
    """The versions that decide the figures of a row."""
    names = ["jax", "libtpu"] if row.chip in TPUS else ["jax", "jax-cuda13-plugin", "nvidia-cudnn-cu13"]
    try:
        return ", ".join(f"{name} {version(name)}" for name in names)
    except PackageNotFoundError as error:
        raise SystemExit(f"{error.name} is not installed: pip install -r benchmarks/compilers.txt") from None


def fingerprint(programs: list[Any]) -> str:
    """Identifies traced programs, in any folder: a kernel, in which JAX notes the file, stands for its source."""
    texts = [_KERNEL.sub("", program.as_text()) for program in programs]
    sources = [fused, int8_attention] if any("gpu.triton" in text for text in texts) else [fused]
    texts += [Path(str(source.__file__)).read_text() for source in sources]
    return hashlib.sha256("".join(texts).encode()).hexdigest()[:16]


def fill(table: Path, rows: list[Row]) -> None:
    """Adds rows to a table, each as soon as it is known, and at last leaves out what is superseded."""
    done = read(table)
    for row in rows:
        began = time.monotonic()
        programs = [lowered(row, layers) for layers in row.layers]
        of = {"compilers": compilers(row), "fingerprint": fingerprint(programs)}
        if row in done and of.items() <= done[row].items():
            continue
        found = measured(row, programs) | of | {"date": datetime.datetime.now(datetime.UTC).date().isoformat()}
        done[row] = vars(row) | found
        line = json.dumps(done[row])
        print(line, f"# {time.monotonic() - began:.0f} s", flush=True)
        table.parent.mkdir(parents=True, exist_ok=True)
        with table.open("a") as file:
            file.write(line + "\n")
        jax.clear_caches()
    kept = [done[row] for row in plan() if row in done]
    partial = table.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
    partial.replace(table)


def check(table: Path) -> int:
    """Compiles what CI checks; returns how many programs have a figure that is worse than in the table."""
    expected, failed = read(table), 0
    for row in CHECKED:
        known, now = expected[row], compilers(row)
        if now != known["compilers"]:
            raise SystemExit(
                f"the table was made with {known['compilers']}, not {now}: fill it again (see CONTRIBUTING.md)"
            )
        problems = worse(measured(row, [lowered(row, layers) for layers in row.layers]), known)
        name = f"{row.chip}, {row.size}, {row.program}, {row.batch} windows{', ' + row.cross if row.cross else ''}"
        print(f"{name}: {'; '.join(problems) or 'no worse than the table'}", flush=True)
        failed += bool(problems)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", nargs="+", default=list(CHIPS), choices=CHIPS)
    parser.add_argument("--size", nargs="+", default=list(RELEASED), choices=list(RELEASED))
    parser.add_argument("--program", nargs="+", default=list(PROGRAMS), choices=list(PROGRAMS))
    parser.add_argument("--batch", type=int, help="print figures for this many windows, and keep nothing")
    parser.add_argument("--layers", type=int, default=0, help="with --batch: of encoder and decoder each; default: all")
    parser.add_argument("--kv_cache_dtype", help="with --batch: of the audio keys and values, as in load_model")
    parser.add_argument("--text", type=Path, help="with --batch: folder for the compiled programs as text")
    parser.add_argument("--gpu_description", type=Path, help=f"default: {DESCRIPTIONS['h200']}")
    parser.add_argument(
        "--check", action="store_true", help="fail where a few programs are over 10 %% worse than the table"
    )
    parser.add_argument("--table", type=Path, default=TABLE, help="default: %(default)s")
    args = parser.parse_args()
    if args.gpu_description:
        DESCRIPTIONS["h200"] = args.gpu_description
    if args.check:
        sys.exit(min(check(args.table), 1))
    if args.batch is None:
        order = itertools.product(args.chip, args.size, args.program)
        fill(args.table, [row for wanted in order for row in plan() if wanted == (row.chip, row.size, row.program)])
        tables.main([])
        return
    for chip, size, program in ((c, s, p) for c in args.chip for s in args.size for p in args.program):
        row = Row(chip, size, program, args.batch, (args.layers,), args.kv_cache_dtype)
        compiled = lowered(row, args.layers).compile()
        if args.text:
            (args.text / f"{size}-{chip}-{args.batch}-{program}.txt").write_text(compiled.as_text())
        print(json.dumps(vars(row) | figures(compiled, row)), flush=True)


if __name__ == "__main__":
    main()

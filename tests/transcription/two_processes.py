"""One of two processes that transcribe together, each with two devices: RANK PORT FOLDER -> what it got, as JSON."""

import json
import sys

import jax
import numpy as np
from flax import nnx

from weight_loader import load_model
from whisper_nnx import align, make_mesh, shard_model, transcribe
from whisper_nnx.model.whisper import Whisper
from whisper_nnx.runtime.devices import fetch, put_rows

RECORDINGS = [np.random.default_rng(n).normal(0, 0.1, 9_000 * (n + 1)).astype(np.float32) for n in range(3)]


def results(model: Whisper) -> list[object]:
    options = {"temperature": 0.0, "sample_len": 9, "no_speech_threshold": None, "word_timestamps": True}
    transcripts = transcribe(model, RECORDINGS, batch_size=2, **options)
    aligned = align(model, RECORDINGS[2], "one two and the one")["words"]
    return [
        [[(s["tokens"], [(w["word"], w["start"]) for w in s["words"]]) for s in t["segments"]] for t in transcripts],
        [(word["word"], word["start"]) for word in aligned],
    ]


def main(rank: int, port: int, folder: str) -> None:
    jax.config.update("jax_disable_most_optimizations", True)
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    assert (jax.device_count(), jax.local_device_count()) == (4, 2)
    mesh, local = make_mesh(2, 2, devices=jax.devices()), load_model(folder)
    fetch(
        put_rows(np.zeros(4), mesh)
    )  # connects the processes now: they wait 30 s at most, less than a slow compilation
    loaded, placed = load_model(folder, mesh=mesh), shard_model(local, mesh)
    for (_, a), (_, b) in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (loaded, placed)), strict=True):
        assert a.sharding == b.sharding
        for one, other in zip(a[...].addressable_shards, b[...].addressable_shards, strict=True):
            np.testing.assert_array_equal(one.data, other.data)
    assert not loaded.decoder.layers[0].fc1.kernel[...].is_fully_addressable
    print(json.dumps([results(loaded), results(local)]))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])

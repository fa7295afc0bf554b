"""Transcribes millions of recordings, in any number of processes that may die: see `run`, and `whisper-nnx batch`.

A job is a folder, and all that is known of it is in files:

    plan/job.json            what is done: input, settings, version
    plan/000012.jsonl        the recordings of a shard, in order
    model.txt, lm.txt        digests of weights and tokenizer, and of a language model, that all workers must have
    leases/000012            which worker has the shard, and how often it has renewed that
    work/000012.WORKER.jsonl what that worker has begun and finished
    results/000012.jsonl     the transcripts of the shard; it is done when this file exists
    failed/000012.jsonl      recordings without a transcript, and why
    retried/000012.jsonl     failures that were tried once more
    export/                  the transcripts of each shard in other formats, if the settings name any
    speed/WORKER.jsonl       how fast that worker was, a line a shard

A worker whose lease has expired writes no results. Where two workers have had the same shard, the first results stay.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whisper_nnx.jobs.in_process import run as run


def __getattr__(name: str) -> Any:
    if name != "run":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from whisper_nnx.jobs.in_process import run  # needs JAX, which the command's own process does not

    return run

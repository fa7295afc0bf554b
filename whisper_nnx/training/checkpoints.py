"""Checkpoints of training runs: state, data position and configuration, verified by digests."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from whisper_nnx.training.config import differences

State = TypeVar("State")
WER = "wer"
DIGESTS = "digests.json"  # of a checkpoint's files
DAMAGED = "damaged"  # folder to which damaged checkpoints are moved
_log = logging.getLogger(__name__)


class Checkpoints:
    """Keeps the last `keep` checkpoints in `folder` and the best by WER; a context manager that waits for all writes.

    run: the configuration from `to_dict`, stored in each checkpoint.
    """

    def __init__(self, folder: Path, keep: int, run: Mapping[str, Any]):
        logging.getLogger("absl").setLevel(logging.ERROR)  # orbax warns about checkpoints without a WER
        self.folder, self._run, self._saving = folder, run, 0
        latest = checkpoint_managers.LatestN(keep)
        best = checkpoint_managers.BestN(
            get_metric_fn=_word_errors, reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            best_fn=_word_errors,
            best_mode="min",
            preservation_policy=checkpoint_managers.AnyPreservationPolicy([latest, best]),
            cleanup_tmp_directories=True,  # left by a run that was killed while saving
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_digests),
        )
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: Any) -> None:
        self._manager.close()

    @property
    def steps(self) -> list[int]:
        """Steps of the existing checkpoints, in ascending order."""
        return sorted(self._manager.all_steps())

    def notes(self) -> dict[str, Any] | None:
        """Returns the notes saved with the newest state, or None without a checkpoint.

        Damaged checkpoints newer than the last intact one are moved away, with a warning. Raises ValueError if all are
        damaged, or if the newest belongs to another configuration.
        """
        damaged: dict[int, str] = {}
        restored: Any = None
        for step in reversed(self.steps):
            try:
                restored = self._verified(step)
                break
            except Exception as error:  # orbax raises whatever its readers meet in a damaged file
                damaged[step] = " ".join(str(error).split())[:200] or type(error).__name__
        if restored is None:
            if not damaged:
                return None
            reasons = "; ".join(f"{self.folder / str(step)}: {reason}" for step, reason in damaged.items())
            raise ValueError(f"all checkpoints are damaged ({reasons}); remove {self.folder} to start from scratch")
        if changes := differences(restored["run"], self._run):
            raise ValueError(
                f"{self.folder.parent} contains a run with another configuration ({'; '.join(changes)}); "
                "undo the changes or give another output"
            )
        self._move_away(damaged)
        return restored["notes"]

    def _verified(self, step: int) -> Any:
        """Returns the run and notes of a checkpoint; raises an exception of any kind if it is damaged."""
        path = self.folder / str(step)
        if (path / DIGESTS).is_file():
            for name, written in json.loads((path / DIGESTS).read_text("utf-8")).items():
                if not (path / name).is_file():
                    raise FileNotFoundError(f"{name} is missing")
                if _digest(path / name) != written:
                    raise ValueError(f"{name} has changed since it was written")
            items = {}
        else:  # written by an earlier version
            items = {"state": ocp.args.StandardRestore()}
        json_items = {"run": ocp.args.JsonRestore(), "notes": ocp.args.JsonRestore()}
        return self._manager.restore(step, args=ocp.args.Composite(**json_items, **items))

    def _move_away(self, damaged: Mapping[int, str]) -> None:
        """Moves damaged steps (step -> reason) to another folder and warns."""
        if not damaged:
            return
        multihost_utils.sync_global_devices("damaged checkpoints found")
        for step, reason in damaged.items() if jax.process_index() == 0 else ():
            aside = self.folder.parent / DAMAGED / str(step)
            while aside.exists():
                aside = aside.with_name(f"{aside.name}_")
            aside.parent.mkdir(exist_ok=True)
            (self.folder / str(step)).rename(aside)
            _log.warning("%s is damaged (%s); moved to %s", self.folder / str(step), reason, aside)
        multihost_utils.sync_global_devices("damaged checkpoints moved")
        self._manager.reload()

    def _write_digests(self) -> None:
        """Called in the background when a checkpoint is complete, before it is renamed."""
        for path in self.folder.glob(f"{self._saving}.orbax-checkpoint-tmp*") if jax.process_index() == 0 else ():
            # Files outside these folders contain only timestamps, and orbax is still writing them.
            files = sorted(file for file in path.glob("*/**/*") if file.is_file())
            digests = {file.relative_to(path).as_posix(): _digest(file) for file in files}
            (path / DIGESTS).write_text(json.dumps(digests, indent=1), "utf-8")

    def state(self, like: State) -> State:
        """Restores the newest state with the structure and devices of `like`."""
        named = _named(like)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, named)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        restored = self._manager.restore(self.steps[-1], args=items)["state"]
        return jax.tree.unflatten(jax.tree.structure(like), [restored[name] for name in named])

    def save(self, step: int, state: Any, notes: Mapping[str, Any], wer: float | None = None) -> None:
        """Writes `state` in the background; it may be donated once this returns. notes: JSON-serializable."""
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(_named(state)),
            notes=ocp.args.JsonSave(dict(notes)),
            run=ocp.args.JsonSave(dict(self._run)),
        )
        self._manager.wait_until_finished()  # including `_write_digests` of the previous checkpoint
        self._saving = step
        self._manager.save(step, args=items, metrics=None if wer is None else {WER: wer}, force=True)

    def wait(self) -> None:
        """Waits until all checkpoints are on disk."""
        self._manager.wait_until_finished()


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "blake2b").hexdigest()


def _word_errors(metrics: Mapping[str, float]) -> float:
    return metrics[WER]


def _named(tree: Any) -> dict[str, Any]:
    """Returns the leaves by path, such as params.whisper.encoder.conv1.kernel, in tree order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}

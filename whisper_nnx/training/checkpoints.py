"""What a run needs to go on where it stopped: its state, where it is in the data, and its configuration."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from whisper_nnx.training.config import differences

State = TypeVar("State")
WER = "wer"


class Checkpoints:
    """The last `keep` checkpoints in `folder`, and the best by WER. A context: its end waits until all are written.

    run: the configuration as `to_dict` has it, kept in each checkpoint.
    """

    def __init__(self, folder: Path, keep: int, run: Mapping[str, Any]):
        logging.getLogger("absl").setLevel(logging.ERROR)  # orbax warns of checkpoints without a WER; most have none
        self.folder, self._run = folder, run
        latest = checkpoint_managers.LatestN(keep)
        best = checkpoint_managers.BestN(
            get_metric_fn=_word_errors, reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            best_fn=_word_errors,
            best_mode="min",
            preservation_policy=checkpoint_managers.AnyPreservationPolicy([latest, best]),
            cleanup_tmp_directories=True,  # of a run that was killed while it saved
        )
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: Any) -> None:
        self._manager.close()

    @property
    def steps(self) -> list[int]:
        """Of the checkpoints that are there, in ascending order."""
        return sorted(self._manager.all_steps())

    def notes(self) -> dict[str, Any] | None:
        """What was saved beside the newest state; None without one. Raises ValueError if it is of another run."""
        if not self.steps:
            return None
        items = ocp.args.Composite(run=ocp.args.JsonRestore(), notes=ocp.args.JsonRestore())
        restored = self._manager.restore(self.steps[-1], args=items)
        if changes := differences(restored["run"], self._run):
            raise ValueError(
                f"{self.folder.parent} holds a run of another configuration ({'; '.join(changes)}); "
                "take that back, or give another output"
            )
        return restored["notes"]

    def state(self, like: State) -> State:
        """The newest state, on the devices of `like`, whose structure it has."""
        named = _named(like)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, named)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        restored = self._manager.restore(self.steps[-1], args=items)["state"]
        return jax.tree.unflatten(jax.tree.structure(like), [restored[name] for name in named])

    def save(self, step: int, state: Any, notes: Mapping[str, Any], wer: float | None = None) -> None:
        """Writes `state` in the background; it may be donated as soon as this returns. notes: what JSON can hold."""
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(_named(state)),
            notes=ocp.args.JsonSave(dict(notes)),
            run=ocp.args.JsonSave(dict(self._run)),
        )
        self._manager.save(step, args=items, metrics=None if wer is None else {WER: wer}, force=True)

    def wait(self) -> None:
        """Until all that was saved is on the disk."""
        self._manager.wait_until_finished()


def _word_errors(metrics: Mapping[str, float]) -> float:
    return metrics[WER]


def _named(tree: Any) -> dict[str, Any]:
    """The leaves by their paths, params.whisper.encoder.conv1.kernel, in the tree's order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}

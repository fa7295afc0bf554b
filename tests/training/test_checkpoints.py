"""Checkpoints: contents, donated states, retention, damage."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from whisper_nnx.training.checkpoints import DIGESTS, Checkpoints
from whisper_nnx.training.config import TrainConfig, to_dict

RUN = to_dict(TrainConfig())


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Has the kinds of leaves and nodes of a run's state; `b` before `a`, since field order is not alphabetical."""

    b: jax.Array
    a: dict[str, jax.Array]
    moments: tuple[Any, ...]
    ema: None = None


def state_of(value: int, size: int = 4) -> State:
    def kernels(shift: float) -> dict[str, jax.Array]:
        return {f"layers.{i}.kernel": jnp.full((size, 3), value + shift + i / 4) for i in range(2)}

    return State(jnp.int32(value), kernels(0.0), (jnp.full((), value, jnp.bfloat16), kernels(0.5)))


def assert_equal(found: State, expected: State) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (ours.dtype, ours.sharding) == (theirs.dtype, theirs.sharding)
        np.testing.assert_array_equal(ours, theirs)


def saved(folder: Path, steps: dict[int, float | None], keep: int = 2) -> list[int]:
    with Checkpoints(folder, keep, RUN) as checkpoints:
        for step, wer in steps.items():
            checkpoints.save(step, state_of(step), {"step": step}, wer)
        return checkpoints.steps


def test_the_newest_state_is_restored_with_its_notes(tmp_path):
    saved(tmp_path, {3: None, 5: None})
    with Checkpoints(tmp_path, 2, RUN) as checkpoints:
        assert checkpoints.notes() == {"step": 5}
        assert_equal(checkpoints.state(state_of(0)), state_of(5))


def test_an_empty_folder_has_no_notes(tmp_path):
    with Checkpoints(tmp_path / "new", 2, RUN) as checkpoints:
        assert checkpoints.notes() is None


def test_a_state_donated_during_saving_is_saved_unchanged(tmp_path):
    overwrite = jax.jit(partial(jax.tree.map, lambda x: x * 0 - 1), donate_argnums=0)
    size = 2**18  # takes longer to save than to overwrite
    state = state_of(7, size)
    with Checkpoints(tmp_path, 2, RUN) as checkpoints:
        checkpoints.save(1, state, {})
        state = jax.block_until_ready(overwrite(state))
    with Checkpoints(tmp_path, 2, RUN) as checkpoints:
        assert_equal(checkpoints.state(state_of(0, size)), state_of(7, size))


@pytest.mark.parametrize(
    ("wers", "kept"),
    [
        ({1: None, 2: None, 3: None, 4: None}, [3, 4]),
        ({1: 0.5, 2: 0.2, 3: 0.3, 4: None, 5: None}, [2, 4, 5]),
        ({1: None, 2: None, 3: 0.3, 4: 0.5}, [3, 4]),
        ({1: 0.3, 2: 0.3, 3: 0.4, 4: 0.4}, [2, 3, 4]),
    ],
    ids=str,
)
def test_the_last_and_the_best_are_kept(tmp_path, wers, kept):
    assert saved(tmp_path, wers) == kept
    assert sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()) == kept


def test_the_best_is_known_after_resuming(tmp_path):
    saved(tmp_path, {1: 0.5, 2: 0.2, 3: 0.3})
    assert saved(tmp_path, {4: None, 5: None, 6: 0.4}) == [2, 5, 6]


def test_another_configuration_is_rejected_with_its_differences(tmp_path):
    saved(tmp_path / "checkpoints", {1: None})
    other = {**RUN, "batch_size": 3, "steps": 5}
    with (
        Checkpoints(tmp_path / "checkpoints", 2, other) as checkpoints,
        pytest.raises(ValueError, match=r"another configuration \(batch_size: 8 -> 3\); undo the changes or give"),
    ):
        checkpoints.notes()


def test_partly_written_or_deleted_checkpoints_are_skipped(tmp_path):
    saved(tmp_path, {1: 0.1, 2: None, 3: None})
    half = tmp_path / "1" / "state"
    for path in [*half.rglob("*")][::-1]:
        path.rmdir() if path.is_dir() else path.unlink()
    os.rename(tmp_path / "3", tmp_path / "3.orbax-checkpoint-tmp-1")
    with Checkpoints(tmp_path, 2, RUN) as checkpoints:
        assert checkpoints.notes() == {"step": 2}
        assert_equal(checkpoints.state(state_of(0)), state_of(2))
        checkpoints.save(3, state_of(3), {"step": 3}, 0.2)
    assert not list(tmp_path.glob("*tmp*"))


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "a_bit_of_the_state": lambda step: flip(largest(step / "state")),
    "a_bit_of_the_notes": lambda step: flip(step / "notes" / "metadata"),
    "a_bit_of_the_configuration": lambda step: flip(step / "run" / "metadata"),
    "half_of_the_state": lambda step: os.truncate(path := largest(step / "state"), path.stat().st_size // 2),
    "an_empty_file": lambda step: os.truncate(step / "state" / "manifest.ocdbt", 0),
    "a_missing_file": lambda step: (step / "state" / "manifest.ocdbt").unlink(),
    "an_empty_folder": lambda step: (shutil.rmtree(step), step.mkdir()),
    "no_digests_and_half_of_the_state": lambda step: (
        (step / DIGESTS).unlink(),
        os.truncate(step / "state" / "manifest.ocdbt", 50),
    ),
}


# If a read fails, orbax may close its event loop before other reads end; their callbacks then raise unseen.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_named_and_replaced_by_the_last_intact_one(tmp_path, caplog, damage):
    folder = tmp_path / "checkpoints"
    saved(folder, {1: 0.3, 2: None, 3: 0.2}, keep=3)
    damage(folder / "3")
    with Checkpoints(folder, 3, RUN) as checkpoints:
        assert checkpoints.notes() == {"step": 2}
        assert_equal(checkpoints.state(state_of(0)), state_of(2))
        (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("whisper_nnx")]
        assert line.startswith(f"{folder / '3'} is damaged (")
        assert line.endswith(f"; moved to {tmp_path / 'damaged' / '3'}")
        checkpoints.save(3, state_of(30), {"step": 3}, 0.1)
    with Checkpoints(folder, 3, RUN) as checkpoints:
        assert checkpoints.notes() == {"step": 3}
        assert_equal(checkpoints.state(state_of(0)), state_of(30))


def test_the_reason_names_the_file(tmp_path, caplog):
    saved(tmp_path / "checkpoints", {1: None, 2: None})
    flip(tmp_path / "checkpoints" / "2" / "notes" / "metadata")
    with Checkpoints(tmp_path / "checkpoints", 2, RUN) as checkpoints:
        checkpoints.notes()
    assert "notes/metadata has changed since it was written" in caplog.text


def test_if_all_checkpoints_are_damaged_none_is_moved(tmp_path):
    folder = tmp_path / "checkpoints"
    saved(folder, {1: None, 2: None})
    for step in ("1", "2"):
        flip(largest(folder / step / "state"))
    with (
        Checkpoints(folder, 2, RUN) as checkpoints,
        pytest.raises(ValueError, match=r"all checkpoints are damaged \(.*checkpoints/2: state/.*; remove") as raised,
    ):
        checkpoints.notes()
    assert "\n" not in str(raised.value)
    assert [step for step in ("1", "2") if (folder / step).is_dir()] == ["1", "2"]


def test_a_rejected_configuration_moves_no_damaged_checkpoint(tmp_path):
    folder = tmp_path / "checkpoints"
    saved(folder, {1: None, 2: None})
    flip(largest(folder / "2" / "state"))
    with (
        Checkpoints(folder, 2, {**RUN, "batch_size": 3}) as checkpoints,
        pytest.raises(ValueError, match="another configuration"),
    ):
        checkpoints.notes()
    assert (folder / "2").is_dir()

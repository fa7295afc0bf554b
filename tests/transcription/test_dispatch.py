"""What a batch of 32 asks of the device: programs are counted, and waits for results."""

from collections import Counter

import jax
import numpy as np
import pytest
from jax._src import array, pjit
from jax._src.interpreters import pxla

from tests.small import quick_compilation, small_model  # noqa: F401
from whisper_nnx import ops
from whisper_nnx.transcription.batch import Batch
from whisper_nnx.transcription.opening import open_recording
from whisper_nnx.transcription.options import TranscribeOptions
from whisper_nnx.transcription.row_decoder import LARGEST_GROUP

SIZE = 32
IN_GROUPS = {"_louder", "_windows", "_encode", "language_probs", "_put", "_take", "begin"}


@pytest.fixture
def dispatched(monkeypatch):
    """Grows by the name of each program that runs, in order."""
    names: list[str] = []
    call = pxla.ExecuteReplicated.__call__

    def counted(self, *args):
        names.append(self.name.removeprefix("jit_").removeprefix("jit(").removesuffix(")"))
        return call(self, *args)

    jax.clear_caches()  # what is compiled already runs without Python
    monkeypatch.setattr(pjit, "_get_fastpath_data", lambda *_, **__: None)
    monkeypatch.setattr(pxla.ExecuteReplicated, "__call__", counted)
    yield names
    jax.clear_caches()


@pytest.fixture
def waits(monkeypatch):
    """Grows by one for each time that the host waits for results."""
    seen: list[int] = []
    value, get = array.ArrayImpl._value.fget, jax.device_get
    inside = [False]

    def read(self):
        seen.extend([] if inside[0] else [1])
        return value(self)

    def together(tree):
        inside[0] = True
        try:
            seen.extend([1] if jax.tree.leaves(tree) else [])
            return get(tree)
        finally:
            inside[0] = False

    monkeypatch.setattr(array.ArrayImpl, "_value", property(read))
    monkeypatch.setattr(jax, "device_get", together)
    return seen


@pytest.mark.parametrize("language", ["de", None])
def test_a_step_runs_few_programs_and_waits_once(dispatched, waits, language):
    with ops.using("accelerator"):
        model = small_model()
        random = np.random.default_rng(0)
        lives = []
        options = TranscribeOptions.of(language=language, temperature=0.0, sample_len=8)
        for number in range(3 * SIZE):
            noise = random.normal(0, 0.1, 16_000).astype(np.float32)
            lives += open_recording(model, noise, options, number, at_once=False).lives
        batch = Batch(model, SIZE)
        for live in lives:
            batch.submit(live)
        steps = 0
        while batch.busy:
            dispatched.clear()
            waits.clear()
            batch.step()
            steps += 1
            programs = Counter(dispatched)
            assert sum(n for name, n in programs.items() if name not in IN_GROUPS) <= 4, programs
            groups = SIZE // LARGEST_GROUP
            assert programs["advance"] == 1
            assert max(programs["_encode"], programs["_windows"], programs["begin"]) <= 2 * groups + 4, programs
            assert len(waits) <= (1 if language else 2)  # the languages are read before the step
        assert steps >= 3

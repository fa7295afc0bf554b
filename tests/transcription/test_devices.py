"""Several devices, in processes that have them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small import small_model
from weight_loader import save_pretrained

ROOT = Path(__file__).parents[2]


def environment(devices: int) -> dict[str, str]:
    return os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }


def test_eight_devices_transcribe_as_one() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, "tests/transcription/eight_devices.py"],
        cwd=ROOT,
        env=environment(8),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_two_processes_transcribe_together(tmp_path: Path) -> None:
    """Each gets all results: those of a single device."""
    model = small_model(encoder_attention_heads=8, decoder_attention_heads=8, alignment_heads=[[1, 0], [1, 5]])
    save_pretrained(model, tmp_path)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.transcription.two_processes"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(port), str(tmp_path)],
            cwd=ROOT,
            env=environment(2),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in outputs)
    assert first == second
    got, expected = first
    assert got == expected

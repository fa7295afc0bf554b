"""A virtual environment for each system, so that no peer's packages decide another's."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
TORCH = "torch==2.13.0"
REQUIREMENTS = {  # the name of a system, up to its comma
    "whisper_nnx": [str(ROOT)],
    "openai-whisper": [TORCH, "openai-whisper==20250625"],
    "transformers": [TORCH, "transformers"],
    "faster-whisper": ["faster-whisper"],
    "whisper.cpp": ["pywhispercpp", "numpy"],
    "mlx-whisper": [TORCH, "mlx[cpu]", "mlx-whisper"],
}


def python_of(system: str, folder: Path | None) -> Path:
    """The interpreter of a system: its environment's in that folder, made if there is none; without one, this one."""
    if folder is None:
        return Path(sys.executable)
    name = system.split(",")[0]
    place = folder / name
    python = place / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    if not (place / "complete").exists():
        venv.create(place, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS[name]], check=True, stdout=sys.stderr)
        (place / "complete").touch()
    return python

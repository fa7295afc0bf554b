"""A minimal server around faster-whisper, for `serving.py`: the same requests, answered one after the other.

python benchmarks/peer_server.py FOLDER PORT COMPUTE_TYPE
"""

from __future__ import annotations

import io
import os
import sys
import threading
from typing import Any

import uvicorn
from fastapi import FastAPI, Form, UploadFile
from faster_whisper import WhisperModel


def make_app(folder: str, compute_type: str) -> FastAPI:
    model = WhisperModel(folder, device="cpu", compute_type=compute_type, cpu_threads=os.cpu_count() or 1)
    one_by_one = threading.Lock()
    app = FastAPI()

    @app.get("/health")
    def health() -> dict[str, bool]:
        return {"ready": True}

    @app.post("/v1/audio/transcriptions")
    def transcribe(file: UploadFile, language: str = Form("en")) -> dict[str, Any]:
        with one_by_one:
            segments, _ = model.transcribe(io.BytesIO(file.file.read()), language=language, beam_size=1)
            return {"text": "".join(segment.text for segment in segments).strip()}

    return app


if __name__ == "__main__":
    uvicorn.run(make_app(sys.argv[1], sys.argv[3]), host="127.0.0.1", port=int(sys.argv[2]), log_level="error")

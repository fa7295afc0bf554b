"""Downloads OpenAI's .pt files and verifies them by the SHA-256 in their URLs.

The cache folder is openai-whisper's, so that both share downloads.
"""

from __future__ import annotations

import hashlib
import os
import re
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

from weight_loader.folder import CheckpointError

URL = "https://openaipublic.azureedge.net/main/whisper/models"
URL_VARIABLE = "WHISPER_NNX_OPENAI_URL"  # environment variable with a mirror

# https://github.com/openai/whisper/blob/v20250625/whisper/__init__.py
SHA256 = {
    "tiny.en.pt": "d3dd57d32accea0b295c96e26691aa14d8822fac7d9d27d5dc00b4ca2826dd03",
    "tiny.pt": "65147644a518d12f04e32d6f3b26facc3f8dd46e5390956a9424a650c0ce22b9",
    "base.en.pt": "25a8566e1d0c1e2231d1c762132cd20e0f96a85d16145c3a00adf5d1ac670ead",
    "base.pt": "ed3a0b6b1c0edf879ad9b11b1af5a0e6ab5db9205f891f668f8b0e6c6326e34e",
    "small.en.pt": "f953ad0fd29cacd07d5a9eda5624af0f6bcf2258be67c92b79389873d91e0872",
    "small.pt": "9ecf779972d90ba49c06d968637d720dd632c55bbf19d441fb42bf17a411e794",
    "medium.en.pt": "d7440d1dc186f76616474e0ff0b3b6b879abc9d1a4926b7adfa41db2d497ab4f",
    "medium.pt": "345ae4da62f9b3d59415adc60127b97c714f32e89e936602e85993674d08dcb1",
    "large-v1.pt": "e4b87e7e0bf463eb8e6956e646f1e277e901512310def2c24bf0e11bd3c28e9a",
    "large-v2.pt": "81f7c96c852ee8fc832187b0132e569d6c3065a3252ed18e56effd0b6a73e524",
    "large-v3.pt": "e5b1a55b89c1367dacf97e3e19bfd829a01529dbfdeefa8caeb59b3f1b81dadb",
    "large-v3-turbo.pt": "aff26ae408abcba5fbf8813c21e62b0941638c5f6eebfb145be0c9839262a19a",
}
_ADDRESS = re.compile(r"https?://[^\s?#]+/([0-9a-f]{64})/([\w.-]+\.pt)")
_CHUNK = 2**20  # bytes
_LARGEST = 2**34  # bytes; large's has 3 * 2**30
_TIMEOUT_S = 30


def address_of(name: str) -> str | None:
    """Returns the URL of one of OpenAI's files, given by name or URL; None for anything else."""
    if name in SHA256:
        return f"{os.environ.get(URL_VARIABLE, URL).rstrip('/')}/{SHA256[name]}/{name}"
    return name if _ADDRESS.fullmatch(name) else None


def download(address: str, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Returns the file of a URL in cache_dir (default: openai-whisper's), downloading it if necessary.

    Resumes interrupted downloads. Raises CheckpointError if the download fails or its SHA-256 differs from the URL's.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import WeakFileLock

    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise CheckpointError(f"{address} does not contain a SHA-256; download it yourself and give the file")
    digest, name = match.groups()
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(cache_dir or Path(caches) / "whisper").expanduser()
    file, partial = folder / name, folder / f"{name}.{digest[:16]}.partial"
    if file.is_file() and _sha256(file) == digest:
        return file
    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(f"{file} does not exist and HF_HUB_OFFLINE is set; unset it once to download")
    folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(f"{partial}.lock"):
        if not (file.is_file() and _sha256(file) == digest):  # unless another process was faster
            _fetch(address, partial)
            if (found := _sha256(partial)) != digest:
                partial.unlink()
                raise CheckpointError(f"{address} has the SHA-256 {found} instead of the one in its URL; try again")
            os.replace(partial, file)
    Path(f"{partial}.lock").unlink(missing_ok=True)
    return file


def _fetch(address: str, partial: Path) -> None:
    """Resumes the download if the server supports ranges, else restarts it."""
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            have = have if answer.status == 206 else 0
            _save(answer, partial, have)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # the partial file is complete
            return
        raise CheckpointError(f"cannot download {address} (HTTP {error.code} {error.reason}); check it") from error
    except (OSError, HTTPException) as error:  # includes URLError and a full disk
        why = " ".join(str(getattr(error, "reason", None) or error or type(error).__name__).split())
        raise CheckpointError(
            f"cannot download {address} ({why}); check the network and the disk, then try again"
        ) from error


def _save(answer, partial: Path, have: int) -> None:
    from tqdm import tqdm

    length = answer.headers.get("Content-Length")
    total = have + int(length) if length and length.isdigit() else None
    bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=partial.name.split(".")[0], disable=None)
    with partial.open("ab" if have else "wb") as stream, bar:
        while chunk := answer.read(_CHUNK):
            have += len(chunk)
            if have > _LARGEST:
                raise OSError(f"it has more than {_LARGEST} bytes")
            stream.write(chunk)
            bar.update(len(chunk))
    if total is not None and have < total:
        raise OSError(f"the connection ended after {have} of {total} bytes")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

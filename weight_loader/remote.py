"""Copies checkpoints from anywhere that fsspec knows (s3://, gs://, hf:// ...) into the user's cache."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weight_loader.folder import CheckpointError
from whisper_nnx.audio.remote import is_remote, remote_errors
from whisper_nnx.runtime.user_cache import user_cache_folder


def is_elsewhere(name: str) -> bool:
    """Whether it is a URL of a file system: by http, only OpenAI's files and those of the hub are downloaded."""
    return is_remote(name) and not name.startswith(("https://", "http://", "file://"))


def copy(
    url: str,
    common: Sequence[str],
    formats: Sequence[Sequence[str]],
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Returns a local copy of a file or a folder, which is made if there is none of what is there now.

    Args:
      url: of the file or the folder.
      common: patterns of the files of a folder that are copied.
      formats: of further ones: those of the first format of which there is any; of none, if there is none.
      cache_dir: default: `whisper_nnx` in the user's cache.

    Raises:
      CheckpointError: it cannot be read or stored.
    """
    try:
        with remote_errors(url):
            return _copy(url, common, formats, Path(cache_dir or user_cache_folder() / "whisper_nnx").expanduser())
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error)) from error


def _copy(url: str, common: Sequence[str], formats: Sequence[Sequence[str]], cache: Path) -> Path:
    from fsspec.core import url_to_fs
    from huggingface_hub.utils import WeakFileLock

    files, root = url_to_fs(url)
    names = [root] if files.isfile(root) else _chosen(files, root, common, formats)
    if not names:
        raise FileNotFoundError
    version = hashlib.sha256("\n".join([url, *(f"{name} {files.ukey(name)}" for name in names)]).encode())
    folder = cache / "copies" / version.hexdigest()[:32]
    partial = folder.with_suffix(".partial")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            for name in names:
                files.get_file(name, str(partial / os.path.basename(name)))
            os.rename(partial, folder)
    return folder / os.path.basename(names[0]) if names == [root] else folder


def _chosen(files: Any, root: str, common: Sequence[str], formats: Sequence[Sequence[str]]) -> list[str]:
    """The files in a folder that are needed."""
    found = sorted(one["name"] for one in files.ls(root, detail=True) if one["type"] == "file")

    def matching(patterns: Sequence[str]) -> list[str]:
        return [one for one in found if any(fnmatch.fnmatch(os.path.basename(one), pattern) for pattern in patterns)]

    weights = next(filter(None, map(matching, formats)), found if formats else [])
    return sorted({*matching(common), *weights})

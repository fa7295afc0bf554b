"""Names of models to folders on this machine, downloaded from the Hugging Face Hub where necessary."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from weight_loader.folder import CheckpointError
from whisper_nnx.config import ALIASES, RELEASED


def checkpoint_folder(
    name_or_path: str | os.PathLike[str],
    files: tuple[str, ...],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """The folder that is meant: a local one, or the snapshot of a repository with its `files` (patterns) in it.

    Raises FileNotFoundError for a path to nothing, CheckpointError for everything else that keeps it from being had.
    """
    text = os.fspath(name_or_path)
    path = Path(text).expanduser()
    if text and path.is_dir():
        return path
    if text and path.exists():
        raise CheckpointError(
            f"{path} is a file; give the folder of a Hugging Face checkpoint (another format: convert it first, "
            "with transformers' WhisperForConditionalGeneration and its save_pretrained(FOLDER))"
        )
    if isinstance(name_or_path, Path) or _looks_like_path(text):
        raise FileNotFoundError(f"{path} does not exist; give an existing folder, or a name such as 'tiny'")
    return _snapshot(_repository(text), files, revision=revision, token=token, cache_dir=cache_dir)


def _looks_like_path(text: str) -> bool:
    a_file = text.endswith((".pt", ".bin", ".safetensors"))
    return a_file or text.startswith((".", "/", "~")) or "\\" in text or text.count("/") > 1


def _repository(name: str) -> str:
    """'tiny' -> 'openai/whisper-tiny', 'distil-large-v3' -> 'distil-whisper/distil-large-v3', 'owner/name' as it is."""
    size = ALIASES.get(name, name)
    if size in RELEASED:
        return f"openai/whisper-{size}"
    if re.fullmatch(r"distil-[\w.-]+", name):
        return f"distil-whisper/{name}"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return name
    names = ", ".join([*RELEASED, *ALIASES])
    raise CheckpointError(f"unknown model {name!r}; give a folder, a repository as owner/name, or one of {names}")


def _snapshot(repository: str, files: tuple[str, ...], **options: Any) -> Path:
    from huggingface_hub import constants, snapshot_download, utils

    endpoint, revision = constants.ENDPOINT, options["revision"]
    try:
        return Path(snapshot_download(repository, allow_patterns=list(files), **options))
    except utils.GatedRepoError as error:
        why = f"is gated; ask for access at {endpoint}/{repository}, then give token=... or run `hf auth login`"
        raise CheckpointError(f"{repository} {why}") from error
    except utils.RepositoryNotFoundError as error:
        why = f"is neither a folder here nor a repository at {endpoint} that you may read; check its spelling"
        raise CheckpointError(f"{repository} {why}, for a private one give token=...") from error
    except utils.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{repository} has no revision {revision!r}; see {endpoint}/{repository}/commits for those that it has"
        ) from error
    except utils.LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            why = "is not in the cache and HF_HUB_OFFLINE is set; unset it once to download, or give a folder"
        else:
            why = f"is not in the cache and cannot be had from {endpoint} ({_line(error.__cause__ or error)})"
            why += "; check the network, or give a folder"
        raise CheckpointError(f"{repository} {why}") from error
    except utils.HFValidationError as error:
        raise CheckpointError(f"{_line(error)}; give a repository as owner/name, or a folder") from error
    except Exception as error:  # whatever the http client of the installed huggingface_hub raises, or a full disk
        raise CheckpointError(
            f"cannot download {repository} ({_line(error)}); check the network and the disk, then try again"
        ) from error


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0].rstrip(".: ")

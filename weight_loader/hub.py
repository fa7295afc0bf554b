"""Resolves model names to local folders and files, downloading from the Hugging Face Hub if necessary."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

from weight_loader.download import address_of, download
from weight_loader.folder import CONFIG_FILES, CheckpointError
from weight_loader.remote import copy, is_elsewhere
from whisper_nnx.model.config import ALIASES, RELEASED
from whisper_nnx.text.tokenizer import FILE_NAMES as TOKENIZER_FILES

# The first of these that a repository has is downloaded, since many contain the same weights in several formats. Shards
# are selected by their usual names, since some repositories also contain others, such as model.fp32-*.
_WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"),
    ("weights.safetensors", "weights.npz"),  # MLX
    ("model.bin", "vocabulary.*"),  # CTranslate2
    ("flax_model.msgpack", "flax_model.msgpack.index.json", "flax_model-*.msgpack"),
    ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),  # PEFT
)
DEMO = "demo"  # the model included in the package, trained by examples/train_demo
_FILE_ADDRESS = re.compile(r"/([\w.-]+/[\w.-]+)/(?:resolve|blob)/([^/?#]+)/([^?#*\[\]]+)(?:\?.*)?")


def checkpoint_path(name_or_path: str | os.PathLike[str], *, files: tuple[str, ...] = (), **options: Any) -> Path:
    """Returns a local folder or file, or the downloaded snapshot of a repository.

    Args:
      name_or_path: a path, repository, short name or URL.
      files: patterns of the files needed; by default all, in the first format of `_WEIGHTS` that the repository has.
      **options: revision, token and cache_dir of huggingface_hub's snapshot_download.

    Raises:
      FileNotFoundError: a path does not exist.
      CheckpointError: the checkpoint cannot be downloaded.
    """
    text = os.fspath(name_or_path)
    path = Path(text).expanduser()
    if text and path.exists():
        return path
    if text == DEMO:
        return _packaged(DEMO)
    if address := address_of(text):
        return download(address, options.get("cache_dir"))
    if text.startswith(("https://", "http://")):
        return _file(text, options)
    if is_elsewhere(text):
        common, formats = (files, ()) if files else ((*CONFIG_FILES, *TOKENIZER_FILES), _WEIGHTS)
        return copy(text, common, formats, options.get("cache_dir"))
    repository = _repository(name_or_path)
    if files:
        return _snapshot(repository, files, **options)
    for patterns in _WEIGHTS:
        folder = _snapshot(repository, (*CONFIG_FILES, *TOKENIZER_FILES, *patterns), **options)
        if any(match for pattern in patterns for match in folder.glob(pattern)):
            break
    return folder


def check_name(name: str) -> None:
    """Raises what `checkpoint_path` raises for a path that does not exist or an unknown name; downloads nothing."""
    is_found = os.path.exists(os.path.expanduser(name)) or name == DEMO
    if not (is_found or address_of(name) or name.startswith(("https://", "http://")) or is_elsewhere(name)):
        _repository(name)


def _repository(name_or_path: str | os.PathLike[str]) -> str:
    text = os.fspath(name_or_path)
    if isinstance(name_or_path, Path) or _looks_like_path(text):
        path = Path(text).expanduser()
        raise FileNotFoundError(f"{path} does not exist; give an existing folder or a name such as 'tiny'")
    return repository_of(text)


def _packaged(name: str) -> Path:
    """Returns the folder of a model included in the installed package."""
    spec = importlib.util.find_spec("whisper_nnx")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "assets" / name
    if not folder.is_dir():
        raise CheckpointError(f"this installation lacks {folder}; install whisper-nnx again")
    return folder


def _file(address: str, options: dict[str, Any]) -> Path:
    """Downloads a single file of a repository, such as .../ggerganov/whisper.cpp/resolve/main/ggml-tiny.bin."""
    from huggingface_hub import constants

    parts = _FILE_ADDRESS.fullmatch(address.removeprefix(constants.ENDPOINT))
    if not address.startswith(f"{constants.ENDPOINT}/") or parts is None:
        raise CheckpointError(
            f"{address} is neither a file at {constants.ENDPOINT} (.../OWNER/NAME/resolve/main/FILE) nor "
            "one of OpenAI's files with its SHA-256; download it yourself and give the file"
        )
    repository, revision, name = parts.groups()
    folder = _snapshot(repository, (name,), **{**options, "revision": options.get("revision") or revision})
    if not (folder / name).is_file():
        raise CheckpointError(f"{repository} has no file {name}; see {constants.ENDPOINT}/{repository}/tree/{revision}")
    return folder / name


def _looks_like_path(text: str) -> bool:
    a_file = text.endswith((".pt", ".bin", ".safetensors", ".npz", ".msgpack"))
    return a_file or text.startswith((".", "/", "~")) or "\\" in text or text.count("/") > 1


def repository_of(name: str) -> str:
    """Expands short names: 'tiny' to 'openai/whisper-tiny', 'distil-large-v3' to 'distil-whisper/distil-large-v3'."""
    size = ALIASES.get(name, name)
    if size in RELEASED:
        return f"openai/whisper-{size}"
    if re.fullmatch(r"distil-[\w.-]+", name):
        return f"distil-whisper/{name}"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return name
    names = ", ".join([*RELEASED, *ALIASES, DEMO])
    raise CheckpointError(f"unknown model {name!r}; give a folder, a repository as owner/name, or one of {names}")


def _snapshot(repository: str, files: tuple[str, ...], **options: Any) -> Path:
    from huggingface_hub import constants, snapshot_download, utils

    endpoint, revision = constants.ENDPOINT, options.get("revision")
    try:
        return Path(snapshot_download(repository, allow_patterns=list(files), **options))
    except utils.GatedRepoError as error:
        why = f"is gated; request access at {endpoint}/{repository}, then give token=... or run `hf auth login`"
        raise CheckpointError(f"{repository} {why}") from error
    except utils.RepositoryNotFoundError as error:
        why = f"is neither a local folder nor a repository that you can access at {endpoint}; check its spelling"
        raise CheckpointError(f"{repository} {why} or, if it is private, give token=...") from error
    except utils.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{repository} has no revision {revision!r}; see {endpoint}/{repository}/commits for existing ones"
        ) from error
    except utils.LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            why = "is not in the cache and HF_HUB_OFFLINE is set; unset it once to download, or give a folder"
        else:
            why = f"is not in the cache and cannot be downloaded from {endpoint} ({_line(error.__cause__ or error)})"
            why += "; check the network, or give a folder"
        raise CheckpointError(f"{repository} {why}") from error
    except utils.HFValidationError as error:
        raise CheckpointError(f"{_line(error)}; give a repository as owner/name, or a folder") from error
    except Exception as error:  # any exception of huggingface_hub's HTTP client, or a full disk
        raise CheckpointError(
            f"cannot download {repository} ({_line(error)}); check the network and the disk, then try again"
        ) from error


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0].rstrip(".: ")

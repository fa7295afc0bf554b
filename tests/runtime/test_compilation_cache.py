"""The compilation cache: programs come back in the next process, and only from a folder that is the user's alone."""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from whisper_nnx.runtime.compilation_cache import enable_compilation_cache
from whisper_nnx.runtime.user_cache import user_cache_folder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="folders have no modes there")
PROGRAM = """
import collections, sys
import jax
from whisper_nnx.runtime.compilation_cache import enable_compilation_cache
enable_compilation_cache(sys.argv[1])
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.rsplit("/", 1)[-1]]))
jax.jit(lambda x: x @ x.T + 1)(jax.numpy.ones((4, 4))).block_until_ready()
print(events["cache_hits"], events["cache_misses"])
"""


@pytest.fixture(autouse=True)
def as_in_a_new_process() -> Iterator[None]:
    names = ["jax_compilation_cache_dir", "jax_compilation_cache_max_size"]
    names += ["jax_persistent_cache_min_compile_time_secs", "jax_persistent_cache_min_entry_size_bytes"]
    before = {name: jax.config.values[name] for name in names}
    jax.config.update("jax_compilation_cache_dir", None)  # that of the tests
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def compile_in_a_new_process(folder: Path, **environment: str) -> tuple[int, int]:
    """-> hits and misses of the cache."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"} | environment,
    )
    assert not done.stderr
    hits, misses = map(int, done.stdout.split())
    return hits, misses


def refused(folder: Path) -> str:
    """Why the folder is refused."""
    with pytest.warns(UserWarning, match="no compilation cache: ") as caught:
        assert enable_compilation_cache(folder) is None
    (warning,) = caught
    return str(warning.message)


def mode(folder: Path) -> int:
    return stat.S_IMODE(folder.stat().st_mode)


def test_the_next_process_compiles_nothing_unless_it_has_other_threads(tmp_path: Path) -> None:
    hits, misses = compile_in_a_new_process(tmp_path, PJRT_NPROC="2")
    assert misses > hits == 0
    assert compile_in_a_new_process(tmp_path, PJRT_NPROC="2") == (misses, 0)
    assert compile_in_a_new_process(tmp_path, PJRT_NPROC="1") == (0, misses)


def test_the_folder_is_made_private_with_its_missing_parents(tmp_path: Path) -> None:
    folder = enable_compilation_cache(tmp_path / "a" / "b")
    assert folder is not None
    assert folder.parent == (tmp_path / "a" / "b").resolve()
    assert [mode(path) for path in (folder, folder.parent, folder.parent.parent)] == [0o700] * 3
    assert jax.config.values["jax_compilation_cache_dir"] == str(folder)


def test_a_folder_that_others_may_read_becomes_private(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o755)
    assert enable_compilation_cache(tmp_path / "cache")
    assert mode(tmp_path / "cache") == 0o700


@pytest.mark.parametrize("bits", [0o777, 0o1777, 0o702])
def test_a_folder_that_others_may_write_to_is_refused_and_left_alone(tmp_path: Path, bits: int) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(bits)
    assert f"other users can write to {tmp_path / 'cache'}" in refused(tmp_path / "cache")
    assert mode(tmp_path / "cache") == bits
    assert not list((tmp_path / "cache").iterdir())


def test_a_parent_that_others_may_write_to_is_refused_unless_it_is_sticky(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    assert f"other users can write to {tmp_path / 'open'}" in refused(tmp_path / "open" / "cache")
    (tmp_path / "open").chmod(0o1777)
    assert enable_compilation_cache(tmp_path / "open" / "cache")


def test_a_link_is_judged_by_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "open")
    assert f"other users can write to {tmp_path / 'open'}" in refused(tmp_path / "link")


def test_groups_may_write_only_if_they_are_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "parent").mkdir()
    (tmp_path / "parent").chmod(0o770)
    own: list[bool] = []
    monkeypatch.setattr("whisper_nnx.runtime.user_cache._is_own_group", lambda gid: own[-1])
    own.append(False)
    assert f"other users can write to {tmp_path / 'parent'}" in refused(tmp_path / "parent" / "cache")
    own.append(True)
    assert enable_compilation_cache(tmp_path / "parent" / "cache")


def test_another_users_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(os, "getuid", lambda: (tmp_path / "cache").stat().st_uid + 1)
    assert f"{tmp_path / 'cache'} belongs to another user" in refused(tmp_path / "cache")


def test_a_file_in_the_place_of_the_folder_is_refused_and_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "file").touch(0o644)
    before = mode(tmp_path / "file")
    assert f"{tmp_path / 'file'}: File exists; give another folder" in refused(tmp_path / "file")
    assert mode(tmp_path / "file") == before


def test_refusal_leaves_jax_without_a_cache(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    refused(tmp_path / "cache")
    assert jax.config.values["jax_compilation_cache_dir"] is None


def test_without_a_folder_it_lies_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = enable_compilation_cache()
    assert folder is not None
    assert folder.parent == tmp_path.resolve() / "whisper_nnx" / "jax"
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"XDG_CACHE_HOME": "/x/cache"}, "/x/cache"),
        ("linux", {"XDG_CACHE_HOME": "not/absolute"}, "/home/me/.cache"),
        ("linux", {"XDG_CACHE_HOME": ""}, "/home/me/.cache"),
        ("darwin", {}, "/home/me/Library/Caches"),
        ("win32", {"LOCALAPPDATA": "/x/local"}, "/x/local"),
    ],
)
def test_each_system_has_its_place_for_caches(
    monkeypatch: pytest.MonkeyPatch, platform: str, variables: dict[str, str], expected: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert user_cache_folder() == Path(expected)


def test_a_folder_that_jax_was_given_is_kept(tmp_path: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    assert enable_compilation_cache() == tmp_path / "theirs"
    assert not (tmp_path / "theirs").exists()


def test_without_a_home_there_is_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    with pytest.warns(UserWarning, match="no compilation cache: Could not determine home directory"):
        assert enable_compilation_cache() is None

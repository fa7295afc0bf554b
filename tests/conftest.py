"""Fixtures shared by all tests."""

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import jax
import pytest
from hypothesis import settings

# Half of the time would go into compiling the same programs in other files, processes, and runs.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "xla"))
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

# No test measures time; the first example often imports a package.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out tests marked `slow`, except with `-m slow` and those that are named: FILE::TEST.

    Modules that compile their programs in one way follow each other.
    """
    items.sort(key=lambda item: not is_quick(getattr(item, "module", None)))
    if "slow" in config.option.markexpr:
        return
    folder = config.invocation_params.dir
    named = [(folder / file, test) for file, _, test in (arg.partition("::") for arg in config.args) if test]

    def is_left_out(item: pytest.Item) -> bool:
        test = item.nodeid.partition("::")[2]
        is_named = any(item.path == file and test.startswith(name) for file, name in named)
        return item.get_closest_marker("slow") is not None and not is_named

    config.hook.pytest_deselected(items=[item for item in items if is_left_out(item)])
    items[:] = [item for item in items if not is_left_out(item)]


def missing(reason: str) -> None:
    """Skips the test; fails it where WHISPER_NNX_NO_SKIP is set, as in .ci/run."""
    if os.environ.get("WHISPER_NNX_NO_SKIP"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the trained checkpoint and the recordings; WHISPER_NNX_SHARED names it."""
    root = Path(__file__).parents[1]
    folder = Path(os.environ.get("WHISPER_NNX_SHARED", root.parent / "shared")).resolve()
    if not (folder / "checkpoints").is_dir():
        missing(f"{folder} holds no checkpoints; set WHISPER_NNX_SHARED")
    return folder


@pytest.fixture(scope="session")
def digits(shared: Path) -> Path:
    """A small trained Whisper as a Hugging Face folder (and, in openai.pt, as openai-whisper's)."""
    return shared / "checkpoints" / "digits"


@pytest.fixture(scope="session")
def real_models() -> Path:
    """The folder with OpenAI's tiny.en and base; WHISPER_NNX_REAL_MODELS names it, `real/models.sh` there makes it."""
    folder = Path(os.environ.get("WHISPER_NNX_REAL_MODELS", Path(__file__).parents[1] / "data" / "real")).resolve()
    if not all((folder / name / "model.bin").is_file() for name in ("tiny.en", "base")):
        missing(f"{folder} lacks tiny.en or base; run $WHISPER_NNX_SHARED/real/models.sh {folder}")
    return folder


@pytest.fixture(scope="session")
def real_tiny_en(real_models: Path) -> Path:
    """OpenAI's tiny.en as a CTranslate2 folder in float16."""
    return real_models / "tiny.en"


@pytest.fixture(scope="session")
def real_base(real_models: Path) -> Path:
    """OpenAI's base as a CTranslate2 folder in float16."""
    return real_models / "base"


@pytest.fixture(scope="session")
def real_speech(shared: Path) -> Callable[[str], Path]:
    """Path of a recording of real speech, by file name: "en_sonnet_53s.mp3"."""

    def path(name: str) -> Path:
        file = shared / "real" / "audio" / name
        if not file.is_file():
            missing(f"{file} does not exist; set WHISPER_NNX_SHARED")
        return file

    return path


_IN_MEMORY = {"quick": False}  # whether the programs are those of `quick_compilation`
_MOST_MAPPINGS = 25_000


def is_quick(module: ModuleType | None) -> bool:
    """Whether it imports `quick_compilation`."""
    return hasattr(module, "quick_compilation")


def forget_programs() -> None:
    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_go(request: pytest.FixtureRequest) -> Iterator[None]:
    """Keeps programs for later modules, except for those that count what is compiled or compile it in another way.

    What XLA compiles for the CPU holds memory mappings; where a process has Linux's 65,530 of them
    (`vm.max_map_count`), XLA crashes, which all tests in one process came to.
    """
    quick = is_quick(request.module)
    own = [item for item in request.session.items if getattr(item, "module", None) is request.module]
    if quick != _IN_MEMORY["quick"] or any("compilations" in item.fixturenames for item in own):
        _IN_MEMORY["quick"] = quick
        forget_programs()
    yield
    mappings = Path("/proc/self/maps")
    if not mappings.exists() or mappings.read_bytes().count(b"\n") > _MOST_MAPPINGS:
        forget_programs()


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """Grows by a name for each program that XLA compiles during the test."""
    seen: list[str] = []

    def listen(event: str, _: float, **details: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(str(details.get("fun_name", event)))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)

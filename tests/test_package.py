"""The package as a whole: light to import, complete, and free of surprises under `python -m`."""

import ast
import importlib
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest

import whisper_nnx


def python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=True)


def test_importing_the_package_imports_nothing_heavy():
    heavy = {"jax", "flax", "numpy", "av", "huggingface_hub", "tiktoken", "tqdm", "torch", "transformers"}
    loaded = python("import sys, whisper_nnx, weight_loader; print(*sys.modules)").stdout.split()
    assert not heavy & set(loaded)


def test_every_public_name_can_be_had_and_is_listed():
    for name in whisper_nnx.__all__:
        assert getattr(whisper_nnx, name) is not None
        assert name in dir(whisper_nnx)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = whisper_nnx.nonsense


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(whisper_nnx.__file__).read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        seen |= {alias.asname: getattr(importlib.import_module(node.module), alias.name) for alias in node.names}
    assert sorted(seen) == whisper_nnx.__all__
    assert all(value is getattr(whisper_nnx, name) for name, value in seen.items())
    assert (Path(whisper_nnx.__file__).parent / "py.typed").exists()


def test_transcribe_is_the_function_even_after_its_module_was_imported():
    import whisper_nnx.transcribe

    assert isinstance(whisper_nnx.transcribe, types.FunctionType)
    assert isinstance(sys.modules["whisper_nnx.transcribe"], types.ModuleType)


@pytest.mark.parametrize("module", ["whisper_nnx.transcribe", "whisper_nnx"])
def test_running_a_module_gives_no_warning(module):
    done = subprocess.run([sys.executable, "-W", "error", "-m", module, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "--word_timestamps" in done.stdout


def test_every_room_has_its_place_in_the_import_rules():
    rules = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["tool"]["importlinter"]
    [layers] = [contract["layers"] for contract in rules["contracts"] if contract["type"] == "layers"]
    placed = {name.removeprefix("whisper_nnx.") for layer in layers for name in layer.split(" | ")} - {"weight_loader"}
    folder = Path(whisper_nnx.__file__).parent
    found = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    assert placed == found - {"__init__"}


@pytest.mark.parametrize("name", ["transcribe", "evaluate"])
def test_the_facades_hold_the_functions(name):
    module = importlib.import_module(f"whisper_nnx.{name}")
    assert getattr(module, name) is getattr(whisper_nnx, name)
    assert set(module.__all__) <= set(whisper_nnx.__all__)


def test_files_and_functions_stay_short():
    root = Path(whisper_nnx.__file__).parents[1]
    for file in [*root.glob("whisper_nnx/**/*.py"), *root.glob("weight_loader/**/*.py")]:
        text = file.read_text()
        assert text.count("\n") <= 400, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{file}: {node.name}"

"""The documents name only what exists: files, modules, functions, options, flags; every public name has a page."""

import ast
import inspect
import itertools
import pkgutil
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import whisper_nnx
from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.transcription.fallback import FallbackOptions
from whisper_nnx.transcription.longform import LongformOptions
from whisper_nnx.transcription.options import CallOptions, TranscribeOptions

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS = [ROOT / name for name in ("README.md", "IMPLEMENTATION.md", "CONTRIBUTING.md", "benchmarks/README.md")]
TEXTS = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in [*DOCUMENTS, *PAGES]}
FOLDERS = r"(?:whisper_nnx|weight_loader|tests|benchmarks|configs|examples|docs|\.ci)"
every_document = pytest.mark.parametrize("document", TEXTS)


def code_blocks(document: str) -> list[ast.Module]:
    return [ast.parse(code) for code in re.findall(r"```python\n(.*?)```", TEXTS[document], re.DOTALL)]


@every_document
def test_paths_in_documents_exist(document):
    paths = re.findall(rf"(?<![\w./-]){FOLDERS}/[\w./-]*\w", TEXTS[document])
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_scripts_named_in_the_code_exist():
    scripts = [path for folder in ("whisper_nnx", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")]
    named = {
        (path.name, name)
        for path in scripts
        for name in re.findall(r"\b(?:benchmarks|examples)/\w+\.py", path.read_text("utf-8"))
    }
    assert [one for one in named if not (ROOT / one[1]).exists()] == []


@every_document
def test_dotted_names_in_documents_exist(document):
    for name in set(re.findall(r"(?<![\w./-])(?:whisper_nnx|weight_loader)(?:\.[A-Za-z_]\w*)+", TEXTS[document])):
        pkgutil.resolve_name(name)


@every_document
def test_samples_import_only_what_exists(document):
    for node in itertools.chain.from_iterable(map(ast.walk, code_blocks(document))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("whisper_nnx", "weight_loader")):
            for alias in node.names:
                pkgutil.resolve_name(f"{node.module}.{alias.name}")


@every_document
def test_samples_use_only_options_that_exist(document):
    kinds = (CallOptions, TranscribeOptions, LongformOptions, FallbackOptions, DecodingOptions)
    of_transcribe = {"temperature", *(field.name for kind in kinds for field in fields(kind))}
    for call in itertools.chain.from_iterable(map(ast.walk, code_blocks(document))):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
            continue
        if ast.unparse(call.func.value) != "whisper_nnx":
            continue
        known = inspect.signature(getattr(whisper_nnx, call.func.attr)).parameters
        open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
        used = {keyword.arg for keyword in call.keywords if keyword.arg}
        assert used <= {*known, *(of_transcribe if open_ended else ())}, ast.unparse(call)


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """All that the commands take."""
    commands = [["whisper_nnx"], ["whisper_nnx.train"], ["whisper_nnx.evaluate"], ["whisper_nnx.serve"]]
    commands += [["whisper_nnx", "batch"], ["weight_loader", "inspect"], ["weight_loader", "convert"]]
    helps = [
        subprocess.run([sys.executable, "-m", *command, "--help"], capture_output=True, text=True, check=True).stdout
        for command in commands
    ]
    return set(re.findall(r"--[a-z][\w.]*", "\n".join(helps)))


@pytest.mark.parametrize("document", [name for name in TEXTS if name.startswith(("README", "docs/"))])
def test_flags_in_documents_exist(document, flags):
    text = re.sub(
        r"^.*(?:pip install|mkdocs|pytest|jupyter|xla_|docker|--build-arg|--profile|lmplz).*$",
        "",
        TEXTS[document],
        flags=re.MULTILINE,
    )
    found = re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", text)
    assert {flag.replace("beam-size", "beam_size") for flag in found} <= flags


def test_every_public_name_has_its_place_in_the_reference():
    index = TEXTS["docs/reference/index.md"]
    linked = dict(re.findall(r"\[`(\w+)`\]\((\w[\w-]*\.md(?:#[\w.]+)?)\)", index))
    assert set(linked) == set(whisper_nnx.__all__)
    for name, target in linked.items():
        page, _, anchor = target.partition("#")
        text = TEXTS[f"docs/reference/{page}"]
        if anchor:
            assert f"::: {anchor}\n" in text
            assert pkgutil.resolve_name(anchor) is getattr(whisper_nnx, name)
        else:
            assert f"`{name}`" in text


def test_reference_pages_show_only_what_exists():
    for page in PAGES:
        for target in re.findall(r"^::: ([\w.]+)$", page.read_text("utf-8"), re.MULTILINE):
            pkgutil.resolve_name(target)


def test_the_architecture_fits_on_a_few_pages():
    assert len(TEXTS["IMPLEMENTATION.md"].encode()) <= 12 * 1024

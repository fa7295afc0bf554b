"""Formats without a tokenizer use that of the released models of the same size, from local sources if possible."""

from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

import weight_loader.released
from tests.small import small_model, small_tokenizer_files
from weight_loader import CheckpointError, get_whisper_config, load_model, save_model, save_pretrained
from weight_loader.__main__ import main
from weight_loader.released import released_tokenizer
from weight_loader.report import report
from whisper_nnx.model.config import RELEASED

COMMIT = "c0ffee" * 6 + "c0de"


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    """An empty Hub cache, no network, and no other package with a vocabulary."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(weight_loader.released, "_PACKAGES", ())
    return tmp_path / "cache"


@pytest.fixture
def small_is_released(monkeypatch) -> None:
    """Pretends that models with the tests' vocabulary were released under these names."""
    config = small_model().config
    monkeypatch.setattr(weight_loader.released, "RELEASED", {"tiny": config, "base": config})


def cached(cache: Path, repository: str, files: dict[str, bytes]) -> Path:
    """Imitates huggingface_hub's cache."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for name, content in files.items():
        (snapshot / name).write_bytes(content)
    return snapshot


@pytest.fixture
def openai_file(tmp_path) -> Path:
    save_model(small_model(encoder_ffn_dim=64, decoder_ffn_dim=64), tmp_path / "model.pt", "openai")
    return tmp_path / "model.pt"


@pytest.mark.parametrize("name", ["tiny", "base"])
def test_the_tokenizer_of_any_cached_released_model_is_used(offline, small_is_released, openai_file, name):
    cached(offline, f"openai/whisper-{name}", small_tokenizer_files())
    assert load_model(openai_file).tokenizer == small_model().tokenizer
    lines, _ = report(openai_file)
    assert any(line.startswith("tokenizer ") and line.endswith(" of the released models") for line in lines)


def test_convert_uses_it_too(offline, small_is_released, openai_file, tmp_path):
    cached(offline, "openai/whisper-tiny", small_tokenizer_files())
    assert main(["convert", str(openai_file), str(tmp_path / "hf"), "--to", "hf"]) == 0
    assert load_model(tmp_path / "hf").tokenizer == small_model().tokenizer


def test_a_given_cache_folder_is_searched(offline, small_is_released, openai_file, tmp_path):
    cached(tmp_path / "own", "openai/whisper-tiny", small_tokenizer_files())
    assert load_model(openai_file, cache_dir=tmp_path / "own").tokenizer == small_model().tokenizer


def test_files_next_to_the_weights_and_a_given_tokenizer_take_precedence(offline, small_is_released, openai_file):
    cached(offline, "openai/whisper-tiny", small_tokenizer_files())
    other = small_tokenizer_files(added=["hello"])
    for name, content in other.items():
        (openai_file.parent / name).write_bytes(content)
    assert "hello" in load_model(openai_file).tokenizer.vocabulary.added


def test_offline_the_warning_gives_the_fix(offline, small_is_released, openai_file):
    with pytest.warns(UserWarning, match="no tokenizer: ") as caught:
        assert load_model(openai_file).tokenizer is None
    message = str(caught[0].message)
    assert "openai/whisper-tiny is not in the cache and HF_HUB_OFFLINE is set; unset it once to download" in message
    assert "tokenizer=FOLDER" in message
    assert "\n" not in message


@pytest.mark.filterwarnings("ignore:.*no tokenizer:")
def test_an_unreleased_vocabulary_size_is_not_guessed(offline, openai_file):
    assert released_tokenizer(small_model().config.vocab_size) is None
    assert load_model(openai_file).tokenizer is None


@pytest.mark.filterwarnings("ignore:.*no tokenizer:")
def test_hugging_face_folders_need_their_own_tokenizer(offline, small_is_released, tmp_path):
    cached(offline, "openai/whisper-tiny", small_tokenizer_files())
    save_pretrained(small_model(), tmp_path / "hf")
    for name in ("vocab.json", "merges.txt", "added_tokens.json"):
        (tmp_path / "hf" / name).unlink()
    assert load_model(tmp_path / "hf").tokenizer is None


@pytest.mark.filterwarnings("ignore:unclosed file.*tiktoken:ResourceWarning")  # openai-whisper's own
@pytest.mark.parametrize("name", ["tiny.en", "tiny", "large-v3"])
def test_an_installed_openai_whisper_has_the_vocabularies(offline, monkeypatch, name):
    whisper = pytest.importorskip("whisper.tokenizer")
    monkeypatch.setattr(weight_loader.released, "_PACKAGES", ("whisper",))
    config = RELEASED[name]
    found = released_tokenizer(config.vocab_size, download=False)
    assert found.vocab_size == config.vocab_size
    assert found.is_multilingual == (name != "tiny.en")
    theirs = whisper.get_tokenizer(found.is_multilingual, num_languages=100 if name == "large-v3" else 99)
    text = " Don't go: 12,345 naïve 東京 🙂\n  ..."
    assert found.encode(text) == theirs.encode(text)
    assert found.special.eot == theirs.eot
    assert found.special.timestamp_begin == theirs.timestamp_begin
    assert found.non_speech_tokens == theirs.non_speech_tokens
    with_language = name != "tiny.en"
    assert not with_language or found.language_token("de") == theirs.to_language_token("de")


def test_a_package_of_that_name_without_vocabularies_is_ignored(offline, monkeypatch, tmp_path):
    monkeypatch.setattr(weight_loader.released, "_PACKAGES", ("whisper",))
    spec = ModuleSpec("whisper", None, origin=str(tmp_path / "whisper" / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    assert released_tokenizer(51865, download=False) is None
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        released_tokenizer(51865)


@pytest.mark.parametrize("format", ["hf", "openai", "mlx"])
def test_the_configuration_of_every_format_equals_the_models(offline, tmp_path, format):
    model = small_model(encoder_ffn_dim=64, decoder_ffn_dim=64)
    save_model(model, tmp_path / "saved", format)
    assert get_whisper_config(tmp_path / "saved") == model.config


@pytest.mark.real
def test_the_configuration_of_a_ctranslate2_folder(real_tiny_en):
    assert get_whisper_config(real_tiny_en) == load_model(real_tiny_en).config


@pytest.mark.real
def test_a_ctranslate2_folder_without_a_tokenizer_file_takes_the_released_one(real_tiny_en, tmp_path):
    pytest.importorskip("whisper")
    for name in ("config.json", "model.bin"):
        (tmp_path / name).symlink_to(real_tiny_en / name)
    found, own = load_model(tmp_path).tokenizer, load_model(real_tiny_en).tokenizer
    # Its file has Hebrew under its older code, iw, which an English-only model does not use.
    assert replace(found.special, languages=()) == replace(own.special, languages=())
    assert [i for _, i in found.special.languages] == [i for _, i in own.special.languages]
    text = " The quick brown fox, 1984; naïve."
    assert found.encode(text) == own.encode(text)

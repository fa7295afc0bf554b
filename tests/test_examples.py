"""Every script in `examples/`, run as a user would run it, and what it claims to show."""

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import pytest
from flax import nnx

from tests.small import quick_compilation, small_model  # noqa: F401
from whisper_nnx import load_model, save_model, save_pretrained, transcribe
from whisper_nnx.transcription.drafts import with_draft

EXAMPLES = Path(__file__).parents[1] / "examples"
Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a script with these arguments -> what it printed. In this process: the scripts share compiled programs."""

    def run(name: str, *args: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def code_cells(name: str) -> list[dict]:
    return [cell for cell in json.loads((EXAMPLES / name).read_text())["cells"] if cell["cell_type"] == "code"]


def run_notebook(name: str, cells: int | None = None) -> dict:
    """Runs a notebook's code cells, or the first few, one after the other, without Jupyter -> its variables."""
    variables: dict = {}
    for cell in code_cells(name)[:cells]:
        exec("".join(line for line in cell["source"] if not line.startswith("%")), variables)
    return variables


@pytest.fixture(scope="module")
def recording(shared: Path) -> Path:
    """Three words in three seconds."""
    return shared / "audio" / "en_short_3s.flac"


@pytest.fixture(scope="module")
def spoken(recording: Path) -> list[dict]:
    """The words of the recording, with the times at which they are spoken."""
    return json.loads(recording.with_suffix(".words.json").read_text())["words"]


def test_a_short_context_is_taught_without_texts(run: Run, recording: Path, tmp_path: Path):
    save_pretrained(small_model(), tmp_path / "small")
    options = ["--contexts", 20, "--steps", 30, "--learning_rate", 3e-3]
    printed = run("short_context.py", tmp_path / "small", tmp_path / "out", recording, *options)
    divergences = [float(number) for number in re.findall(r"divergence ([\d.]+)", printed)]
    assert divergences[-1] < 0.8 * divergences[0]
    taught, before = load_model(tmp_path / "out"), small_model()
    assert taught.config.max_source_positions == before.config.max_source_positions  # long windows, too
    assert (taught.encoder.conv1.kernel[...] != before.encoder.conv1.kernel[...]).any()
    assert (taught.decoder.embed_tokens.embedding[...] == before.decoder.embed_tokens.embedding[...]).all()


def test_every_example_is_tested_and_listed():
    names = {path.name for kind in ("*.py", "*.ipynb") for path in EXAMPLES.glob(kind)}
    assert names == set(re.findall(r"run\w*\(\"(\w+\.(?:py|ipynb))\"", Path(__file__).read_text()))
    assert names == set(re.findall(r"examples/(\w+\.(?:py|ipynb))", (EXAMPLES / "README.md").read_text()))


@pytest.mark.slow
def test_created_models_have_the_parameters_of_the_released_ones(run: Run):
    assert re.search(r"tiny +37,184,640 parameters +149 MB", run("create_models.py", "tiny"))


@pytest.mark.slow
def test_vmap_encodes_a_window_as_a_batch_does(run: Run):
    printed = run("encode_batch.py", "--batch", 1)
    assert "features (1, 1500, 384), float32" in printed
    [difference] = re.findall(r"differ by (\S+)", printed)
    assert float(difference) < 1e-3  # float32 through four layers, summed in another order


@pytest.mark.slow
def test_a_distilled_draft_has_the_same_encoder_and_changes_no_text(run: Run, digits: Path, recording: Path, tmp_path):
    printed = run("distil_draft.py", digits, tmp_path, recording, "--layers", 1, "--steps", 30, "--batch_size", 1)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert losses[-1] < 0.5 * losses[0]
    model, draft = load_model(digits), load_model(tmp_path)
    assert with_draft(model, draft).draft.encoder is None
    assert transcribe(model, recording, draft=draft)["text"] == transcribe(model, recording)["text"]


@pytest.mark.slow
def test_half_precision_takes_half_the_bytes_and_chooses_the_same_tokens(run: Run, digits: Path, recording: Path):
    printed = run("half_precision.py", digits, recording)
    row = r"(\w+) +([\d.]+) MB .* by ([\d.]+) on.*, ([\d.]+) at most.* (\d+) of (\d+)"
    (_, full, *same, _, _), *halves = re.findall(row, printed)
    assert [float(x) for x in same] == [0, 0]
    assert [name for name, *_ in halves] == ["bfloat16", "float16"]
    for _, megabytes, mean, largest, agreeing, positions in halves:
        assert float(megabytes) == pytest.approx(float(full) / 2, abs=0.1)
        assert 0 < float(mean) < 0.1
        assert float(largest) < 1
        assert agreeing == positions


def test_an_ensemble_averages_logits(run: Run, digits: Path, recording: Path, spoken: list[dict], tmp_path: Path):
    """Equal logits for all tokens change no choice, so a model of zeros leaves the choice to the other one."""
    model = load_model(str(digits))
    zeros = jax.tree.map(jnp.zeros_like, nnx.state(model.decoder, nnx.Param))
    nnx.update(model.decoder, zeros)
    save_model(model, tmp_path / "zeros")
    text = " ".join(word["word"] for word in spoken).capitalize() + "."
    assert run("ensemble.py", recording, tmp_path / "zeros", digits).strip() == text


def test_a_stream_says_what_the_transcript_says(run: Run, digits: Path, recording: Path, spoken: list[dict]):
    printed = run("transcribe_file.py", digits, recording)
    text = " ".join(word["word"] for word in spoken).capitalize() + "."
    assert printed.startswith(f"en: {text}\n")
    assert printed.endswith(f"the whole text: {text}\n")
    assert len(re.findall(r"probability", printed)) == len(spoken)


@pytest.mark.slow
def test_the_gradient_of_a_word_is_strongest_where_it_is_spoken(
    run: Run, digits: Path, recording: Path, spoken: list[dict], tmp_path: Path
):
    printed = run("word_saliency.py", digits, recording, "--out", tmp_path / "saliency.png")
    found = re.findall(r"(\w+) +strongest at +([\d.]+) s", printed)
    assert [text.lower() for text, _ in found] == [word["word"] for word in spoken]
    for (_, strongest_s), word in zip(found, spoken, strict=True):
        assert word["start"] <= float(strongest_s) <= word["end"]
    assert (tmp_path / "saliency.png").read_bytes().startswith(b"\x89PNG")


def test_a_word_that_is_not_heard_is_refused_with_those_that_are(
    run: Run, digits: Path, recording: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        run("word_saliency.py", digits, recording, "--words", "seven")
    assert "'Six zero nine.'" in capsys.readouterr().err


def test_the_notebook_runs_in_a_checkout_without_anything_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name in ("CHECKPOINT", "AUDIO", "WHISPER_NNX_SHARED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(EXAMPLES)  # Jupyter starts a notebook in its folder
    with matplotlib.rc_context():
        seen = run_notebook("transcript.ipynb")
    sentences = Path("audio/en.txt").read_text().split("\n")
    text = " ".join(filter(None, sentences))
    assert [line.split(maxsplit=3)[3] for line in capsys.readouterr().out.splitlines()] == list(filter(None, sentences))
    assert seen["transcript"]["text"].strip() == text
    assert "".join(seen["alignment"].labels).strip() == f"{text}(end)"


def test_the_notebook_takes_another_model_and_recording_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CHECKPOINT", "tiny")
    monkeypatch.setenv("AUDIO", "talk.mp3")
    with matplotlib.rc_context():
        seen = run_notebook("transcript.ipynb", cells=1)
    assert (seen["CHECKPOINT"], seen["AUDIO"]) == ("tiny", "talk.mp3")


def test_the_notebook_keeps_pictures_that_are_small():
    outputs = [output for cell in code_cells("transcript.ipynb") for output in cell["outputs"]]
    pictures = [output["data"]["image/png"] for output in outputs if "data" in output]
    assert len(pictures) == 4
    assert sum(map(len, pictures)) < 600_000


def test_training_lowers_the_loss(run: Run):
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", run("finetune_step.py"))]
    assert len(losses) == 20
    assert losses[-1] < 0.8 * losses[0]

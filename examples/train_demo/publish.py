"""Writes the trained demo model into the package, with its measurements and example recordings.

python examples/train_demo/publish.py --model runs/demo_finish/export --data data/demo
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from make_data import SAMPLE_RATE, write_flac
from speech import espeak, flite

from weight_loader import load_model, save_model
from whisper_nnx.data.manifest import read_manifest
from whisper_nnx.evaluation.results import Evaluation
from whisper_nnx.evaluation.run import evaluate

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "whisper_nnx" / "assets" / "demo"
AUDIO = ROOT / "examples" / "audio"
LARGEST_MB = 10

# Of each recording: (text, voice) of each sentence. No voice of espeak-ng and flite needs a licence for what it speaks.
RECORDINGS = {
    "en": [
        ("Good morning, how are you?", "slt"),
        ("Set the alarm for seven thirty.", "rms"),
        ("The train to London leaves at nine fifteen.", "en-us+f3"),
        ("Four one five nine two six.", "en+m3"),
    ],
    "de": [
        ("Guten Morgen, wie geht es dir?", "de"),
        ("Stell den Wecker auf sieben Uhr dreißig.", "de+f2"),
        ("Dreihundertfünfundzwanzig.", "de+m3"),
    ],
    "es": [
        ("Buenos días, ¿cómo estás?", "es"),
        ("Enciende la luz en la cocina.", "es-419+f2"),
        ("Trescientos veinticinco.", "es+m3"),
    ],
    "fr": [
        ("Bonjour, comment ça va?", "fr"),
        ("Le train pour Lyon part à neuf heures quinze.", "fr+f2"),
        ("Trois cent vingt-cinq.", "fr+m3"),
    ],
}

CARD = """---
license: cc-by-sa-4.0
language: [en, de, es, fr]
pipeline_tag: automatic-speech-recognition
---

# The demo model of whisper_nnx

A Whisper of {millions:.1f} million parameters (d_model {width}, {encoder} + {decoder} layers) with a vocabulary of
{vocabulary} tokens of its own, trained from nothing by `examples/train_demo`. It shows that everything works, without a
network. It is no general recognizer: it knows a few hundred words, the numbers up to ten thousand, dates, times and
short commands, in English, German, Spanish and French, spoken by the voices below. Of other speech it makes such
sentences as it knows.

- Speech by espeak-ng (formants; 10 variants of its voices) and flite (kal, awb, rms, slt), from sentences of
  `sentences.py`. No one's recordings are in it.
- Real digits, English, six people: the Free Spoken Digit Dataset (Jackson, Souza, Flaks, Pan, Nicolas, Thite;
  doi 10.5281/zenodo.1342401), CC BY-SA 4.0, and so is this model. Recordings 0 to 4 of each person and digit were not
  used, 5 to 7 were kept for the figures below.
- Tasks: transcribe with and without times, translate (numbers only), language, no speech, a prompt. Windows of a long
  recording are decoded without the previous text (`condition_on_prev_tokens` is false in generation_config.json), with
  which this model makes more errors.
- Not known: other voices, accents and rooms; names that are not in the sentences; several people at once; singing.

## Measured

By `transcribe` with five beams, as its command does, float16 weights; errors over texts in lower case without
punctuation (Whisper's basic normalizer). Sentences, noise and order are new, the voices are those of the training.

### Recordings of 30 s to 5 min, the language found by the model

{long}
### The same with word times, in s

With word times, each window starts where the last word of the previous one ends, at times a moment too early: on such
windows this model makes more errors.

{timed}
### Single sentences and their translations

{short}"""


def save(folder: str) -> None:
    """Saves float16 weights, which change no word, and the setting not to condition on previous text."""
    model = load_model(folder)
    model.config = replace(model.config, condition_on_prev_tokens=False)
    with tempfile.TemporaryDirectory() as temporary:
        save_model(model, f"{temporary}/demo", dtype="float16")
        shutil.rmtree(ASSETS, ignore_errors=True)
        shutil.copytree(f"{temporary}/demo", ASSETS)
    megabytes = sum(file.stat().st_size for file in ASSETS.iterdir()) / 1e6
    assert megabytes <= LARGEST_MB, f"{megabytes:.1f} MB"
    print(f"{ASSETS}: {megabytes:.2f} MB")


def tables(found: Evaluation) -> str:
    """Formats a Markdown table."""
    from whisper_nnx.evaluation.tables import group_tables

    lines = []
    for head, *body in group_tables(found):
        lines += [" | ".join(row).join(("| ", " |")) for row in (head, ["---"] * len(head), *body)] + [""]
    return "\n".join(lines)


def write_card(data: Path) -> None:
    model = load_model(ASSETS)
    options = {"normalizer": "basic", "batch_size": 4, "beam_size": 5}
    rows = read_manifest(data / "test.jsonl", None, None).rows
    long, timed = (
        evaluate(model, rows, detect_language=True, word_timestamps=wanted, **options) for wanted in (False, True)
    )
    short = evaluate(model, read_manifest(data / "validation.jsonl", None, None).rows, **options)
    size = model.config
    text = CARD.format(
        millions=sum(x.size for x in np_leaves(model)) / 1e6,
        width=size.d_model,
        encoder=size.encoder_layers,
        decoder=size.decoder_layers,
        vocabulary=size.vocab_size,
        long=tables(long),
        timed=tables(timed),
        short=tables(short),
    )
    (ASSETS / "README.md").write_text(text, encoding="utf-8")
    print(text)


def np_leaves(model) -> list:
    from flax import nnx

    return [variable[...] for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))]


def write_recordings() -> None:
    AUDIO.mkdir(exist_ok=True)
    pause = np.zeros(int(0.7 * SAMPLE_RATE), np.float32)
    for language, sentences in RECORDINGS.items():
        pieces = [pause]
        for text, voice in sentences:
            speech = flite(text, voice) if voice in ("slt", "rms") else espeak(text, voice, rate=160)
            pieces += [speech.waveform, pause]
        write_flac(AUDIO / f"{language}.flac", np.concatenate(pieces))
        text = "\n".join(text for text, _ in sentences)
        (AUDIO / f"{language}.txt").write_text(text + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="the export of the last stage")
    parser.add_argument("--data", type=Path, required=True, help="what make_data.py wrote")
    arguments = parser.parse_args()
    save(arguments.model)
    write_recordings()
    write_card(arguments.data)


if __name__ == "__main__":
    main()

"""Counts errors on listed and on other words, with `bias` and without it, and what it costs per token.

    python benchmarks/bias.py CHECKPOINT MANIFEST --result benchmarks/results/NAME.bias.json
    python benchmarks/bias.py CHECKPOINT MANIFEST --result benchmarks/results/NAME.bias_cost.json --cost

Each recording of the manifest (JSON lines with audio, text and language), clean and with pink noise 5 dB below it, is
cut into clips of up to 30 s, which are decoded greedily. The list has the rare words of the recordings in its language
(below, chosen from the texts alone) and 100 names that occur in none of them. Errors on listed words are those
substituted or missing; all others, and all inserted words, count for the other words.
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from benchmarks import speech
from benchmarks.scoring import write_result

RARE = {
    "de": "Christoffel Grimmelshausen Simplicissimus Simplicius Melchior Sternfels Fuchshaim Vaganten allenthalben "
    "abenteuerliche einfältigen Lebensbeschreibung gepraktizieret Annehmlich",
    "es": "Wentworth cuñada substitución fisonomía dibujó reprimidas asomaron",
    "en": "besiege livery thriftless wizard thereunder trenches youth's thou thy sunken succession Americans",
}
_NAMES = """
Aguirre Akhmatova Alcázar Almodóvar Andersson Archimedes Azerbaijan Babington Balakirev Barenboim Beauharnais
Bellerophon Bhattacharya Blenkinsop Boccherini Brzezinski Buxtehude Cadwallader Canterbury Castlereagh Charlemagne
Chatterjee Cholmondeley Clytemnestra Copernicus Czerny Daedalus Dnepropetrovsk Dostoevsky Dvořák Eisenhower Ellesmere
Euripides Featherstonehaugh Fitzwilliam Fontainebleau Gainsborough Ghirlandaio Gloucester Göttingen Guinevere
Hammarskjöld Heisenberg Hohenzollern Huygens Ibuprofen Iphigenia Jaroslavl Jekyll Kandinsky Kierkegaard Kolmogorov
Kubernetes Kurosawa Leicester Leibniz Liechtenstein Llewellyn Lovecraft Machiavelli Maimonides Marlborough Mendeleev
Metternich Mnemosyne Montgomery Nabokov Nebuchadnezzar Nietzsche Novosibirsk Oppenheimer Paracelsus Peloponnese
Persephone Poincaré Popocatepetl Prokofiev Pythagoras Quetzalcoatl Ramanujan Rawalpindi Rembrandt Robespierre Saoirse
Schleswig Schopenhauer Shostakovich Siobhan Solzhenitsyn Stanislavski Szymborska Tchaikovsky Themistocles Thessaloniki
Turgenev Vercingetorix Wittgenstein Worcestershire Xenophon Zarathustra
"""
DISTRACTORS = _NAMES.split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="in any format")
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--result", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--weights", type=float, nargs="*", default=[1.0, 2.0], help="bias_weight")
    parser.add_argument("--noise", type=float, nargs="*", default=[5.0], metavar="DB")
    parser.add_argument("--cost", action="store_true", help="measure seconds per token instead, on a quiet machine")
    args = parser.parse_args()

    from whisper_nnx import load_model

    model = load_model(str(args.checkpoint))
    languages = set(RARE) if model.tokenizer.is_multilingual else {"en"}
    recordings = speech.read(args.manifest, languages)
    versions = {"whisper_nnx": f"{version('whisper-nnx')}, jax {version('jax')}"}
    if args.cost:
        many = [f"{a}{b.lower()}" for a in DISTRACTORS for b in DISTRACTORS][:5000]
        lists: dict[str, Any] = {"none": {}, "100": {"bias": DISTRACTORS}, "5000": {"bias": many}}
        write_result(args.result, args.checkpoint.name, versions, cost_ms=cost(model, recordings[0].audio, lists))
        return
    sounds = {"alone": recordings}
    sounds |= {f"noise {ratio:g} dB below": [speech.noisy(one, ratio) for one in recordings] for ratio in args.noise}
    found = [
        {"sound": sound, "weight": weight, **errors(model, some, weight)}
        for sound, some in sounds.items()
        for weight in (0.0, *args.weights)
    ]
    write_result(args.result, args.checkpoint.name, versions, bias=found)


def listed(language: str) -> list[str]:
    return [*RARE[language].split(), *DISTRACTORS]


def errors(model: Any, recordings: list[speech.Recording], weight: float) -> dict[str, int]:
    """Counts words and errors with this weight; 0: without a list."""
    from whisper_nnx import transcribe

    clips = [(n, clip) for n, recording in enumerate(recordings) for clip in speech.cut(recording.audio)]
    sources = []
    for n, clip in clips:
        language = recordings[n].language
        bias = {"bias": listed(language), "bias_weight": weight} if weight else {}
        sources.append({"audio": clip, "language": language, **bias})
    written = [""] * len(recordings)
    for (n, _), result in zip(clips, transcribe(model, sources, batch_size=8, temperature=0.0), strict=True):
        written[n] += f" {result['text']}"
    counts = [count(recording, text) for recording, text in zip(recordings, written, strict=True)]
    total = {name: sum(one[name] for one in counts) for name in counts[0]}
    print(weight, total, file=sys.stderr, flush=True)
    return total


def count(recording: speech.Recording, written: str) -> dict[str, int]:
    import jiwer

    from whisper_nnx.evaluation.normalizers import split

    language = recording.language
    spoken, found = split(recording.text, language), split(written, language)
    rare = {part for word in RARE[language].split() for part in split(word, language)}
    total = {"listed": sum(word in rare for word in spoken), "listed_errors": 0, "others_errors": 0}
    total["others"] = len(spoken) - total["listed"]
    for change in jiwer.process_words(" ".join(spoken), " ".join(found)).alignments[0]:
        if change.type == "insert":
            total["others_errors"] += change.hyp_end_idx - change.hyp_start_idx
        elif change.type != "equal":
            wrong = [word in rare for word in spoken[change.ref_start_idx : change.ref_end_idx]]
            total["listed_errors"] += sum(wrong)
            total["others_errors"] += len(wrong) - sum(wrong)
    return total


def cost(model: Any, audio: np.ndarray, variants: dict[str, Any], tokens: int = 100) -> dict[str, float]:
    """Milliseconds per step of the loop for 1 and 16 windows, with each variant's options; the best of 5."""
    from whisper_nnx import log_mel_spectrogram
    from whisper_nnx.decoding.options import DecodingOptions
    from whisper_nnx.transcription.windows import decode_windows, encode_windows

    mel = log_mel_spectrogram(audio[: 30 * 16_000], model.config.num_mel_bins, padding=480_000)[:, :3000]
    taken: dict[str, float] = {}
    for rows in (1, 16):
        encoded = encode_windows(model, np.stack([mel] * rows))
        for name, own in variants.items():

            def seconds(n: int, own: Any = own, rows: int = rows, encoded: Any = encoded) -> float:
                ids = (-1, model.tokenizer.special.eot)
                options = DecodingOptions(language="en", suppress_tokens=ids, max_new_tokens=n, **own)
                start = time.perf_counter()
                decode_windows(model, encoded, [options] * rows, range(rows))
                return time.perf_counter() - start

            seconds(2)
            best = min(seconds(tokens + 2) for _ in range(5)) - min(seconds(2) for _ in range(5))
            taken[f"{rows} rows, {name}"] = round(1000 * best / tokens, 3)
            print(rows, name, taken, file=sys.stderr, flush=True)
    return taken


if __name__ == "__main__":
    main()

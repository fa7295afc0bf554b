"""Transcribes a recording and prints text, segments and word times; then again as a stream.

python examples/transcribe_file.py path/to/checkpoint recording.mp3
python examples/transcribe_file.py turbo recording.mp3
"""

import argparse
import time

from whisper_nnx import iter_segments, load_model, transcribe

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoint", help="a folder, a short name or a Hugging Face id")
parser.add_argument("audio")
args = parser.parse_args()

model = load_model(args.checkpoint)
result = transcribe(model, args.audio, word_timestamps=True)
print(f"{result['language']}:{result['text']}")
for segment in result["segments"]:
    print(f"\n{segment['start']:7.2f} - {segment['end']:5.2f} {segment['text']}")
    for word in segment["words"]:
        print(f"  {word['start']:7.2f} - {word['end']:5.2f} {word['word']:<12} probability {word['probability']:.2f}")

print("\nAs a stream, whose segments are available before the rest of the recording is decoded:")
start = time.perf_counter()
stream = iter_segments(model, args.audio, language=result["language"])
for segment in stream:
    print(f"after {time.perf_counter() - start:5.2f} s:{segment['text']}")
print(f"{stream.duration_s:.1f} s of audio; the whole text:{stream.transcript['text']}")

"""What a command's arguments name: files, folders, patterns; and the names of their outputs."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from whisper_nnx.cli.inputs import Input, find_inputs, named, require_distinct, without_existing


@pytest.fixture(autouse=True)
def talks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder with two recordings, one in a folder below it, and what is none."""
    monkeypatch.chdir(tmp_path)
    for file in ("one.wav", "two.v2.MP3", "notes.txt", "._one.wav", "deep/one.wav", "deep/er/three.mkv"):
        path = Path("talks", file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return


def stems(*arguments: str, recursive: bool = False) -> list[str]:
    found, problems = find_inputs(arguments, recursive)
    assert not problems
    return [one.stem.replace(os.sep, "/") for one in found]


def test_a_folder_stands_for_the_recordings_in_it() -> None:
    assert stems("talks") == ["one", "two.v2"]


def test_a_recursive_folder_keeps_the_places_of_those_below_it() -> None:
    assert stems("talks", recursive=True) == ["deep/er/three", "deep/one", "one", "two.v2"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("talks/*.wav", ["one"]),
        ("talks/[o]ne.*", ["one"]),
        ("talks/*/one.wav", ["deep/one"]),
        ("talks/**/*.wav", ["deep/one", "one"]),
    ],
)
def test_a_quoted_pattern_stands_for_what_matches(pattern: str, found: list[str]) -> None:
    assert stems(pattern) == found


def test_a_file_of_a_name_that_looks_like_a_pattern_is_that_file() -> None:
    Path("take[1].wav").touch()
    assert stems("take[1].wav") == ["take[1]"]


def test_a_file_that_is_named_is_read_whatever_it_is_called() -> None:
    assert stems("talks/notes.txt", "-") == ["notes", "stdin"]


def test_each_file_comes_once() -> None:
    assert stems("talks/one.wav", "talks", "./talks/one.wav") == ["one", "two.v2"]


def test_a_link_of_another_name_has_outputs_of_its_own() -> None:
    Path("other.wav").symlink_to("talks/one.wav")
    assert stems("talks/one.wav", "other.wav") == ["one", "other"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("missing.wav", "missing.wav: No such file or directory; check the path"),
        ("*.ogg", "*.ogg: no file matches; check the pattern"),
        ("empty", "empty holds no recordings (.wav, .mp3, .mp4 and others); --recursive True searches"),
    ],
)
def test_what_is_not_there_is_one_line_and_the_others_stay(argument: str, message: str) -> None:
    Path("empty").mkdir()
    found, [problem] = find_inputs([argument, "talks/one.wav"])
    assert str(problem).startswith(message)
    assert [one.stem for one in found] == ["one"]


def test_a_loop_of_links_ends() -> None:
    os.symlink("..", "talks/deep/up")
    assert len(stems("talks", recursive=True)) == 4


def test_one_recording_may_have_another_name() -> None:
    assert named([Input("a.wav", "a")], "b") == [Input("a.wav", "b")]
    assert named([Input("a.wav", "a")], None) == [Input("a.wav", "a")]


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("b", 2, "is for one recording, but there are 2"),
        ("x/b", 1, "must be a file's name without a folder"),
        ("", 1, "must be a file's name without a folder"),
        ("b.srt", 1, "has an extension; give b with --output_format srt"),
    ],
)
def test_a_name_that_cannot_be_is_refused(name: str, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        named([Input(f"{i}.wav", f"{i}") for i in range(count)], name)


def test_outputs_that_would_replace_each_other_are_refused() -> None:
    require_distinct([Input("a.wav", "a"), Input("x/a.wav", "x/a")], "srt")
    with pytest.raises(ValueError, match=r"a\.wav and a\.mp3 would all be written to a\.txt"):
        require_distinct([Input("a.wav", "a"), Input("a.mp3", "a")], "all")


def test_only_recordings_with_all_outputs_are_left_out() -> None:
    for file in ("a.srt", "a.vtt", "b.srt"):
        Path(file).touch()
    both = [Input("a.wav", "a"), Input("b.wav", "b")]
    assert without_existing(both, "srt,vtt", ".") == both[1:]

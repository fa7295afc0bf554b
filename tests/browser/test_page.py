"""The page as its users see it."""

import json
import re
import wave

import av
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from tests.browser.conftest import KEY
from whisper_nnx.audio.loading import load_audio
from whisper_nnx.output.writers import to_srt, to_txt, to_vtt

SENTENCE = "unless a system is established for the frequent formal review"  # in en_lj_8s.wav


def transcribe(page, *files):
    page.set_input_files("#files", [str(file) for file in files])
    page.locator(".item[data-state=done]").nth(len(files) - 1).wait_for()


def now(page):
    """Position of the player, in s."""
    return page.evaluate("document.querySelector('#audio').currentTime")


def download(page, kind):
    with page.expect_download() as waiting:
        page.click(f"[data-format={kind}]")
    return waiting.value.path().read_text()


def violations(page):
    found = Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]})
    return [(one["id"], [node["html"][:120] for node in one["nodes"]]) for one in found.response["violations"]]


def test_files_in_a_queue_become_transcripts(page, real_speech):
    page.set_input_files(
        "#files", [str(real_speech(name)) for name in ("en_lj_8s.wav", "en_libri_5s.flac", "en_lj_2s.wav")]
    )
    expect(page.locator(".item")).to_have_count(3)
    page.locator(".item[data-state=done]").nth(2).wait_for()
    expect(page.locator("#queue-count")).to_have_text("3 of 3 done")
    expect(page.locator("#announce")).to_contain_text("Done")
    expect(page.locator("#title")).to_have_text("en_lj_8s.wav")
    expect(page.locator("#segments")).to_contain_text(SENTENCE)
    page.locator(".item-open").nth(1).click()
    expect(page.locator("#title")).to_have_text("en_libri_5s.flac")
    expect(page.locator("#segments")).not_to_contain_text(SENTENCE)
    page.get_by_role("button", name="Remove en_libri_5s.flac").click()
    expect(page.locator(".item")).to_have_count(2)
    expect(page.locator("#title")).to_have_text("en_lj_2s.wav")


def test_text_is_there_before_the_recording_is_done(page, real_speech):
    page.set_input_files("#files", str(real_speech("en_sonnet_53s.mp3")))
    page.locator(".item[data-state=transcribing]").wait_for()
    page.locator(".word").first.wait_for()
    assert page.locator(".item").get_attribute("data-state") == "transcribing"
    assert re.fullmatch(r"Transcribing, [1-9]\d? %", page.locator(".item-state").inner_text())


def test_words_are_lit_while_they_play_and_play_when_clicked(page, real_speech):
    transcribe(page, real_speech("en_lj_8s.wav"))
    word = page.locator(".word", has_text="established").first
    word.click()
    at = now(page)
    expect(word).to_have_class(re.compile("now"))
    assert at > 0.5
    page.keyboard.press("Space")
    expect(page.locator("#play")).to_have_attribute("aria-label", "Pause")
    expect(word).not_to_have_class(re.compile("now"))
    page.keyboard.press("Space")
    later = page.locator(".word.now")
    expect(later).to_have_count(1)
    assert now(page) > at
    assert int(later.get_attribute("data-word")) > int(word.get_attribute("data-word"))


def test_the_waveform_shows_the_audio_and_seeks(page, real_speech):
    transcribe(page, real_speech("en_lj_8s.wav"))
    for canvas in ("#wave", "#overview"):
        drawn = f"new Set(document.querySelector('{canvas}').getContext('2d').getImageData(0, 0, 400, 40).data).size"
        assert page.evaluate(drawn) > 5
    overview = page.locator("#overview")
    overview.click(position={"x": overview.bounding_box()["width"] / 2, "y": 10})
    length = float(overview.get_attribute("aria-valuemax"))
    assert now(page) == pytest.approx(length / 2, abs=0.6)
    overview.press("Home")
    assert now(page) == 0


def test_downloads_hold_the_edits_and_equal_the_writers(page, real_speech):
    transcribe(page, real_speech("en_sonnet_53s.mp3"))
    before = page.locator("#segments").inner_text()
    page.locator(".word", has_text="winters").dblclick()
    page.keyboard.type("<summers> & so")
    page.keyboard.press("Enter")
    page.locator(".word", has_text="forty").dblclick()
    page.keyboard.press("Delete")
    page.keyboard.press("Enter")
    expect(page.locator("#about")).to_contain_text("2 edited")
    transcript = json.loads(download(page, "json"))
    assert "When <summers> & so shall" in transcript["text"]
    assert transcript["language"] == "en"
    assert download(page, "txt") == to_txt(transcript)
    assert download(page, "srt") == to_srt(transcript)
    vtt = download(page, "vtt")
    assert vtt == to_vtt(transcript)
    assert "&lt;summers&gt; &amp; so" in vtt
    for _ in range(2):
        page.locator("#segments").press("Control+z")
    assert page.locator("#segments").inner_text() == before


def test_files_of_odd_segments_equal_the_writers(page):
    def segment(i, start, end, text, words, **more):
        timed = [{"word": word, "start": s, "end": e, "probability": 0.9} for word, s, e in words]
        return {"id": i, "start": start, "end": end, "text": text, "words": timed, **more}

    segments = [
        segment(0, 0, 1, " a --> b", [(" a", 0.1, 0.3), (" -->", 0.3, 0.5), (" b", 0.5, 0.9)], speaker="0"),
        segment(1, 1, 2, " <i>x</i>", [(" <i>x</i>", 1.0, 1.0)], speaker="1"),
        segment(2, 3, 4, " ", [(" ", 3.0, 4.0)], speaker="?"),
        segment(3, 3599.5, 3661.25, "日本", [("日", 3599.5, 3600.0), ("本", 3660.0, 3661.25)], speaker="0"),
    ]
    made = page.evaluate(
        """async (segments) => {
          const { Transcript, FORMATS } = await import("/page/transcript.js");
          const transcript = new Transcript();
          for (const segment of segments) transcript.add(segment);
          return Object.fromEntries(Object.entries(FORMATS).map(([name, [, write]]) => [name, write(transcript)]));
        }""",
        segments,
    )
    transcript = json.loads(made["json"])
    assert made["txt"] == to_txt(transcript)
    assert made["srt"] == to_srt(transcript)
    assert made["vtt"] == to_vtt(transcript)


def test_everything_by_keyboard(page, real_speech):
    transcribe(page, real_speech("en_sonnet_53s.mp3"))
    page.keyboard.press("u")
    unsure = page.locator(".word:focus")
    expect(unsure).to_have_attribute("aria-description", re.compile(r"unsure, \d+ % probable"))
    page.keyboard.press("e")
    page.keyboard.type("mended")
    page.keyboard.press("Tab")  # saves, and edits the next word
    expect(page.locator(".word.edited")).to_have_text("mended")
    expect(page.locator("input.editing")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("input.editing")).to_have_count(0)
    start = now(page)
    page.keyboard.press("ArrowRight")
    assert now(page) > start
    page.keyboard.press("ArrowDown")
    assert now(page) > start
    page.keyboard.press("?")
    expect(page.locator("#shortcuts-dialog")).to_be_visible()
    page.locator("#single-keys").uncheck()
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    expect(page.locator("#shortcuts-dialog")).to_be_hidden()


def test_the_microphone(page):
    page.click("#record")
    expect(page.locator("#record")).to_have_text("Stop and transcribe")
    expect(page.locator("#live")).to_contain_text("system", timeout=30_000)
    assert int(page.locator("#level").get_attribute("aria-valuenow")) > 0
    page.click("#record")
    page.locator(".item[data-state=done]").wait_for()
    expect(page.locator("#title")).to_have_text(re.compile(r"Recording \d\d-\d\d-\d\d\.webm"))
    expect(page.locator("#segments")).to_contain_text("system")
    length = re.compile(r"0:(\d\d)")
    recorded, played = (length.fullmatch(page.locator(of).inner_text())[1] for of in ("#record-time", "#length"))
    assert int(played) == pytest.approx(int(recorded), abs=1)
    page.click("#record")
    page.click("#discard")
    expect(page.locator("#recording")).to_be_hidden()
    expect(page.locator(".item")).to_have_count(1)


def test_errors_are_sentences(page, open_page, tmp_path, real_speech):
    (tmp_path / "notes.wav").write_text("no audio")
    page.set_input_files("#files", str(tmp_path / "notes.wav"))
    page.locator(".item[data-state=failed]").wait_for()
    expect(page.locator("#failure")).to_have_text(re.compile(r"\w+ .*\w+"))
    page.click("summary")
    page.fill("[name=others]", "temperature")
    page.set_input_files("#files", str(real_speech("en_lj_2s.wav")))
    expect(page.locator("#problem")).to_contain_text("must be name=value")
    page.fill("[name=others]", "beam_size=0")
    page.set_input_files("#files", str(real_speech("en_lj_2s.wav")))
    page.locator(".item[data-state=failed]").nth(1).wait_for()
    expect(page.locator(".item-state").nth(1)).to_contain_text("beam_size")
    page.get_by_role("button", name="Reset").click()
    page.context.set_offline(True)
    page.set_input_files("#files", str(real_speech("en_lj_2s.wav")))
    page.locator(".item[data-state=failed]").nth(2).wait_for()
    expect(page.locator(".item-state").nth(2)).to_contain_text("The server cannot be reached")
    page.context.set_offline(False)
    page.get_by_role("button", name="Try en_lj_2s.wav again").last.click()
    page.locator(".item[data-state=done]").wait_for()


def test_a_browser_without_a_microphone_says_so(open_page):
    page = open_page(script="delete Navigator.prototype.mediaDevices")
    page.click("#record")
    expect(page.locator("#problem")).to_have_text("This browser cannot record. Choose a file instead.")
    page = open_page(
        script="""Object.defineProperty(Navigator.prototype, "mediaDevices", {
          value: { getUserMedia: () => Promise.reject(new DOMException("", "NotAllowedError")) } })"""
    )
    page.click("#record")
    expect(page.locator("#problem")).to_contain_text("Allow it beside the address bar")


def test_the_key_is_asked_for_and_kept_for_the_tab(open_page, locked_server, real_speech):
    page = open_page(locked_server)
    expect(page.locator("#key-dialog")).to_be_visible()
    expect(page.locator("#key-why")).to_contain_text("API key")
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-dialog")).to_be_visible()
    page.fill("#key", KEY)
    page.keyboard.press("Enter")
    page.locator("#server[data-state=ready]").wait_for()
    transcribe(page, real_speech("en_lj_2s.wav"))
    assert KEY not in page.evaluate("JSON.stringify(localStorage) + document.cookie")


def test_options_are_sent_and_remembered(open_page, real_speech):
    page = open_page(
        script="""const send = XMLHttpRequest.prototype.send;
      XMLHttpRequest.prototype.send = function (body) { window.sent = [...body]; send.call(this, body); };"""
    )
    page.locator("#server[data-state=ready]").wait_for()
    page.click("summary")
    page.fill("[name=hotwords]", "Gutenberg")
    page.fill("[name=others]", "max_initial_timestamp=0.5\nbeams=3")
    transcribe(page, real_speech("en_lj_2s.wav"))
    expect(page.locator("#warning")).to_contain_text("beams")  # the server does not know it
    sent = [(name, value) for name, value in page.evaluate("window.sent") if name != "file"]
    assert sorted(sent) == [
        ("beams", "3"),
        ("hotwords", "Gutenberg"),
        ("max_initial_timestamp", "0.5"),
        ("model", "tiny.en"),
        ("response_format", "verbose_json"),
        ("stream", "true"),
        ("timestamp_granularities[]", "word"),
    ]
    page.reload()
    expect(page.locator("#options-set")).to_have_text("2 set")


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility(open_page, real_speech, scheme, width):
    page = open_page(color_scheme=scheme, viewport={"width": width, "height": 844})
    page.locator("#server[data-state=ready]").wait_for()
    assert violations(page) == []
    page.click("summary")
    transcribe(page, real_speech("en_sonnet_53s.mp3"))
    page.keyboard.press("u")
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.keyboard.press("?")
    assert violations(page) == []


def test_the_chosen_theme_stays(open_page):
    page = open_page(color_scheme="light")
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.click("#theme")
    dark = page.evaluate(paper)
    assert dark != light
    page.reload()
    assert page.evaluate(paper) == dark
    expect(page.locator("#theme")).to_have_attribute("aria-pressed", "true")


def test_dropped_files_are_added(page, real_speech):
    data = page.evaluate_handle("new DataTransfer()")
    page.evaluate(
        """([data, bytes]) => data.items.add(new File([Uint8Array.from(bytes)], "dropped.wav"))""",
        [data, list(real_speech("en_lj_2s.wav").read_bytes())],
    )
    page.dispatch_event("#drop", "dragover", {"dataTransfer": data})
    expect(page.locator("#drop")).to_have_class(re.compile("over"))
    page.dispatch_event("#drop", "drop", {"dataTransfer": data})
    page.locator(".item[data-state=done]").wait_for()
    expect(page.locator("#title")).to_have_text("dropped.wav")


def _rising_wav(path):
    samples = (np.sin(np.arange(16000 * 400) / 12) * np.linspace(0, 32000, 16000 * 400)).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, len(samples), "NONE", ""))
        file.writeframes(samples.tobytes())


LOUDNESS = """async () => {
  const { readPeaks } = await import("/page/peaks.js");
  const file = await (await fetch("/page/long")).blob();
  const whole = await new OfflineAudioContext(1, 1, 8000).decodeAudioData(await file.arrayBuffer());
  const decode = BaseAudioContext.prototype.decodeAudioData;
  const sizes = [];
  BaseAudioContext.prototype.decodeAudioData = function (bytes) {
    sizes.push(bytes.byteLength);
    return decode.call(this, bytes);
  };
  const { values } = await readPeaks(file, whole.duration, new AbortController().signal);
  const samples = whole.getChannelData(0);
  const loudest = (at, step) => 255 * samples.slice(at, at + step).reduce((a, b) => Math.max(a, Math.abs(b)), 0);
  const seconds = Array.from({ length: Math.floor(whole.duration) }, (_, second) => second);
  const peak = (second) => values.slice(100 * second, 100 * second + 100).reduce((a, b) => Math.max(a, b), 0);
  return { sizes, read: seconds.map(peak), expected: seconds.map((second) => loudest(8000 * second, 8000)) };
}"""


def _opus(path, speech, kind):
    """Three minutes, at the highest rate."""
    samples = np.tile(load_audio(speech), 3)
    with av.open(str(path), "w", format=kind) as file:
        stream = file.add_stream("libopus", rate=48000, bit_rate=500_000)
        frame = av.AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
        frame.sample_rate = 16000
        for resampled in av.AudioResampler("flt", "mono", 48000, frame_size=960).resample(frame):
            file.mux(stream.encode(resampled))
        file.mux(stream.encode(None))


@pytest.mark.parametrize("kind", ["wav", "mp3", "ogg", "webm"])
def test_loudness_read_in_pieces_equals_that_of_the_whole(page, tmp_path, real_speech, kind):
    speech = real_speech("de_simplicissimus_68s.mp3")
    if kind == "wav":
        _rising_wav(tmp_path / "long")
    elif kind == "mp3":
        (tmp_path / "long").write_bytes(speech.read_bytes() * 18)
    else:
        _opus(tmp_path / "long", speech, kind)
    assert (tmp_path / "long").stat().st_size > 8 << 20  # three pieces
    page.route("**/page/long", lambda route: route.fulfill(path=tmp_path / "long"))
    found = page.evaluate(LOUDNESS)
    assert len(found["sizes"]) >= 3
    assert max(found["sizes"]) < 5 << 20
    difference = np.abs(np.subtract(found["read"], found["expected"]))
    assert np.max(found["expected"]) > 50
    assert np.mean(difference < 8) > 0.97  # the decoder of MP3 starts anew in each piece

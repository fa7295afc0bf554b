// Plays the recording that is shown, and moves the waveform and the words along.

import { readPeaks } from "./peaks.js";
import { clock } from "./transcript.js";
import { Waveform } from "./waveform.js";

const $ = (id) => document.getElementById(id);

export class Player {
  // `onTime(seconds, playing)` as the position changes.
  constructor(onTime) {
    this.audio = $("audio");
    this.onTime = onTime;
    this.item = null;
    this.waveform = new Waveform($("wave"), $("overview"), (seconds) => this.seek(seconds));
    const { audio } = this;
    for (const type of ["play", "pause"]) audio.addEventListener(type, () => this.#state());
    for (const type of ["seeked", "timeupdate"]) audio.addEventListener(type, () => this.#moved());
    audio.addEventListener("loadedmetadata", () => this.#loaded());
    audio.addEventListener("error", () => this.item && this.#unplayable());
    $("play").addEventListener("click", () => this.toggle());
    $("speed").addEventListener("change", () => (audio.playbackRate = Number($("speed").value)));
  }

  async show(item) {
    if (item === this.item) return;
    this.reading?.abort();
    this.audio.pause();
    this.item = item;
    $("unplayable").hidden = true;
    if (!item) {
      this.audio.removeAttribute("src");
      return;
    }
    item.url ??= URL.createObjectURL(item.file);
    this.audio.src = item.url;
    this.audio.playbackRate = Number($("speed").value);
    this.refresh();
    this.#moved();
  }

  // After the transcript has grown or changed.
  refresh() {
    const { item } = this;
    if (!item) return;
    $("length").textContent = clock(item.duration);
    this.waveform.set({ peaks: item.peaks, transcript: item.transcript, duration: item.duration });
  }

  seek(seconds, play = false) {
    if (!this.item) return;
    this.audio.currentTime = Math.max(0, seconds);
    this.#moved();
    if (play) this.audio.play().catch(() => {});
  }

  skip(seconds) {
    this.seek(Math.min(this.audio.currentTime + seconds, this.item?.duration ?? Infinity));
  }

  toggle() {
    if (this.audio.paused) this.audio.play().catch(() => {});
    else this.audio.pause();
  }

  async #loaded() {
    const { audio, item } = this;
    if (audio.duration === Infinity) {
      // Recordings of the browser lack their length, which is found by going beyond it.
      audio.currentTime = 1e7;
      await new Promise((resolve) => audio.addEventListener("durationchange", resolve, { once: true }));
      if (this.item !== item) return;
      audio.currentTime = 0;
    }
    if (Number.isFinite(audio.duration)) item.duration = audio.duration;
    this.refresh();
    this.#peaks(item);
  }

  async #peaks(item) {
    if (item.peaks === undefined) {
      this.reading = new AbortController();
      const { signal } = this.reading;
      const peaks = await readPeaks(item.file, item.duration, signal);
      if (signal.aborted) return;
      item.peaks = peaks;
      item.duration ??= peaks?.duration ?? null;
    }
    if (this.item === item) this.refresh();
  }

  #unplayable() {
    $("unplayable").hidden = false;
    $("unplayable").textContent = "This browser cannot play the recording; the transcript is not affected.";
    this.item.peaks = null;
    this.refresh();
  }

  #state() {
    const playing = !this.audio.paused;
    $("play").classList.toggle("playing", playing);
    $("play").setAttribute("aria-label", playing ? "Pause" : "Play");
    if (playing) this.#frame();
  }

  #frame() {
    this.#moved();
    if (!this.audio.paused) requestAnimationFrame(() => this.#frame());
  }

  #moved() {
    const seconds = this.audio.currentTime;
    $("now").textContent = clock(seconds);
    this.waveform.setTime(seconds);
    this.onTime(seconds, !this.audio.paused);
  }
}

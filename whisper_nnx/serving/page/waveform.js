// The waveform: some seconds around the playhead with the words under them, and below the whole recording as a slider.

import { PER_S } from "./peaks.js";
import { clock } from "./transcript.js";

const SECOND_PX = 110; // in the close view
const PLAYHEAD = 0.35; // of the close view's width
const BAR_PX = 3;
const LABELS_PX = 40; // two lines of words

export class Waveform {
  // `onSeek(seconds)` when a place is clicked, dragged to, or chosen by the keyboard.
  constructor(close, whole, onSeek) {
    Object.assign(this, { close, whole, onSeek, peaks: null, transcript: null, duration: 0, time: 0 });
    close.addEventListener("click", ({ offsetX }) => onSeek(this.#near(this.#start() + offsetX / SECOND_PX)));
    whole.addEventListener("pointerdown", (event) => {
      whole.setPointerCapture(event.pointerId);
      this.#scrub(event);
    });
    whole.addEventListener("pointermove", (event) => event.buttons && this.#scrub(event));
    whole.addEventListener("keydown", (event) => this.#key(event));
    new ResizeObserver(() => this.draw()).observe(whole);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  set({ peaks, transcript, duration }) {
    Object.assign(this, { peaks, transcript, duration: duration || 0 });
    this.whole.setAttribute("aria-valuemax", Math.round(this.duration));
    this.draw();
  }

  setTime(seconds) {
    this.time = seconds;
    this.whole.setAttribute("aria-valuenow", Math.round(seconds));
    this.whole.setAttribute("aria-valuetext", `${clock(seconds)} of ${clock(this.duration)}`);
    this.draw();
  }

  draw() {
    if (!this.whole.clientWidth) return;
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(`--${name}`);
    this.colors = { ink: color("ink"), faint: color("faint"), bar: color("bar"), accent: color("accent"), lit: color("lit"), on: color("on-accent") };
    this.font = `13px ${getComputedStyle(document.body).fontFamily}`;
    this.#drawClose();
    this.#drawWhole();
  }

  #start() {
    const span = this.close.clientWidth / SECOND_PX;
    return Math.max(0, Math.min(this.time - span * PLAYHEAD, this.duration - span));
  }

  // The start of the word at a time, or the time itself.
  #near(seconds) {
    const word = this.transcript?.words[this.transcript.wordAt(seconds)];
    return word && seconds <= word.end ? word.start : Math.max(0, Math.min(seconds, this.duration));
  }

  #scrub({ offsetX }) {
    this.onSeek(Math.max(0, Math.min(1, offsetX / this.whole.clientWidth)) * this.duration);
  }

  #key(event) {
    const step = { ArrowLeft: -5, ArrowDown: -5, ArrowRight: 5, ArrowUp: 5, PageDown: -30, PageUp: 30 }[event.key];
    const to = { Home: 0, End: this.duration }[event.key] ?? (step && this.time + step);
    if (to === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    this.onSeek(Math.max(0, Math.min(to, this.duration)));
  }

  // Half of a bar's height as a share, for the loudest value from `start` to `end` in s; small where it is unknown.
  #level(start, end) {
    const values = this.peaks?.values;
    if (!values) return this.#isSpoken(start, end) ? 0.3 : 0.02;
    let peak = 0;
    const first = Math.floor(start * PER_S);
    for (let i = first; i < Math.max(end * PER_S, first + 1); i++) peak = Math.max(peak, values[i] ?? 0);
    return Math.max(0.02, peak / this.peaks.loudest);
  }

  #isSpoken(start, end) {
    const word = this.transcript?.words[this.transcript.wordAt(end)];
    return word !== undefined && word.end > start;
  }

  #canvas(element) {
    const { clientWidth: width, clientHeight: height } = element;
    const scale = devicePixelRatio || 1;
    if (element.width !== Math.round(width * scale) || element.height !== Math.round(height * scale)) {
      Object.assign(element, { width: Math.round(width * scale), height: Math.round(height * scale) });
    }
    const canvas = element.getContext("2d");
    canvas.setTransform(scale, 0, 0, scale, 0, 0);
    canvas.clearRect(0, 0, width, height);
    return { canvas, width, height };
  }

  #bar(canvas, x, middle, half, color) {
    canvas.fillStyle = color;
    canvas.beginPath();
    canvas.roundRect(x, middle - half, BAR_PX - 1, Math.max(2, 2 * half), 1);
    canvas.fill();
  }

  #drawClose() {
    const { canvas, width, height } = this.#canvas(this.close);
    const start = this.#start();
    const x = (seconds) => (seconds - start) * SECOND_PX;
    const waveHeight = height - LABELS_PX;
    const now = this.transcript?.wordAt(this.time) ?? -1;
    const words = this.transcript?.words ?? [];
    const first = Math.max(0, (this.transcript?.wordAt(start) ?? 0) - 1);

    const word = words[now];
    if (word && this.time <= word.end + 0.05) {
      canvas.fillStyle = this.colors.lit;
      canvas.beginPath();
      canvas.roundRect(x(word.start), 0, Math.max(4, (word.end - word.start) * SECOND_PX), waveHeight, 6);
      canvas.fill();
    }
    const barSeconds = BAR_PX / SECOND_PX;
    for (let bar = Math.floor(start / barSeconds); x(bar * barSeconds) < width; bar++) {
      const at = bar * barSeconds;
      if (at > this.duration) break;
      const half = this.#level(at, at + barSeconds) * (waveHeight / 2 - 4);
      this.#bar(canvas, x(at), waveHeight / 2, half, at < this.time ? this.colors.accent : this.colors.bar);
    }
    this.#labels(canvas, words, first, now, x, width, waveHeight);
    canvas.fillStyle = this.colors.ink;
    canvas.fillRect(x(this.time), 0, 1.5, waveHeight);
  }

  // Writes words at their times, in the line that has room; the one that is spoken always.
  #labels(canvas, words, first, now, x, width, top) {
    canvas.font = this.font;
    canvas.textBaseline = "middle";
    const free = [0, 0]; // x from which each line is free
    for (let i = first; i < words.length && x(words[i].start) < width; i++) {
      const text = words[i].word.trim();
      const left = Math.max(2, x(words[i].start));
      const length = canvas.measureText(text).width;
      if (!text || left + length < 0) continue;
      const line = free.findIndex((from) => from <= left);
      if (line < 0) continue;
      free[line] = left + length + 8;
      const y = top + 11 + 19 * line;
      if (i === now) {
        canvas.fillStyle = this.colors.accent;
        canvas.beginPath();
        canvas.roundRect(left - 4, y - 10, length + 8, 19, 5);
        canvas.fill();
      }
      canvas.fillStyle = i === now ? this.colors.on : i < now ? this.colors.ink : this.colors.faint;
      canvas.fillText(text, left, y);
    }
  }

  #drawWhole() {
    const { canvas, width, height } = this.#canvas(this.whole);
    if (!this.duration) return;
    const perPx = this.duration / width;
    const shown = this.close.clientWidth / SECOND_PX; // seconds in the close view
    if (shown < this.duration) {
      canvas.fillStyle = this.colors.lit;
      canvas.beginPath();
      canvas.roundRect(this.#start() / perPx, 0, Math.max(6, shown / perPx), height, 4);
      canvas.fill();
    }
    for (let at = 0; at < width; at += BAR_PX) {
      const seconds = at * perPx;
      const half = this.#level(seconds, seconds + BAR_PX * perPx) * (height / 2 - 2);
      this.#bar(canvas, at, height / 2, half, seconds < this.time ? this.colors.accent : this.colors.bar);
    }
  }
}

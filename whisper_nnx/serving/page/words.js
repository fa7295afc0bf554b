// The transcript on the page: a word is lit while it is spoken, plays from there when clicked, and is edited in place.

import { clock } from "./transcript.js";

const STILL_MS = 4000; // after the reader scrolls, until the page follows the playback again

export class Words {
  // `onSeek(seconds, play)` on a click; `onEdit()` after a word has changed.
  constructor(root, { onSeek, onEdit }) {
    Object.assign(this, { root, onSeek, onEdit, transcript: null, spans: [], current: -1, focused: 0, scrolled: 0 });
    root.addEventListener("click", (event) => this.#click(event));
    root.addEventListener("dblclick", (event) => {
      if (event.target.dataset.word) this.edit(Number(event.target.dataset.word));
    });
    root.addEventListener("keydown", (event) => this.#key(event));
    for (const type of ["wheel", "touchmove"]) {
      addEventListener(type, () => (this.scrolled = performance.now()), { passive: true });
    }
  }

  // Shows a transcript, or what has been added to the one that is shown.
  show(transcript) {
    if (transcript !== this.transcript) {
      Object.assign(this, { transcript, spans: [], current: -1, focused: 0, shown: 0 });
      this.root.replaceChildren();
    }
    const added = document.createDocumentFragment();
    for (; this.shown < transcript.segments.length; this.shown++) added.append(this.#segment(transcript.segments[this.shown]));
    this.root.append(added);
    if (transcript.language) this.root.lang = transcript.task === "translate" ? "en" : transcript.language;
  }

  #segment(segment) {
    const row = document.createElement("div");
    row.className = "segment";
    const stamp = document.createElement("button");
    stamp.type = "button";
    stamp.className = "stamp";
    stamp.dataset.start = segment.start;
    stamp.textContent = clock(segment.start);
    stamp.setAttribute("aria-label", `Play from ${clock(segment.start)}`);
    const text = document.createElement("p");
    text.dir = "auto";
    if (segment.speaker !== undefined) {
      const speaker = document.createElement("span");
      speaker.className = "speaker";
      speaker.textContent = `Speaker ${segment.speaker}`;
      text.append(speaker);
    }
    for (let i = segment.first; i < segment.last; i++) {
      const span = document.createElement("span");
      span.dataset.word = i;
      span.setAttribute("role", "button");
      span.tabIndex = i === this.focused ? 0 : -1;
      this.spans.push(span);
      text.append(document.createTextNode(""), span);
      this.#fill(i);
    }
    row.append(stamp, text);
    return row;
  }

  // Writes a word's text and marks; the space before it stays outside of the mark.
  #fill(i) {
    const { word, edited, probability } = this.transcript.words[i];
    const span = this.spans[i];
    const unsure = this.transcript.isUnsure(i);
    span.previousSibling.data = word.match(/^\s*/)[0];
    span.textContent = word.trim();
    span.className = ["word", unsure && "unsure", edited && "edited", i === this.current && "now"].filter(Boolean).join(" ");
    const about = edited ? "edited" : unsure ? `unsure, ${Math.round(100 * probability)} % probable` : "";
    span.title = about;
    if (about) span.setAttribute("aria-description", about);
    else span.removeAttribute("aria-description");
  }

  setTime(seconds, follow) {
    if (!this.transcript) return;
    const at = this.transcript.wordAt(seconds);
    if (at === this.current) return;
    this.spans[this.current]?.classList.remove("now");
    this.spans[this.current]?.removeAttribute("aria-current");
    this.current = at;
    const span = this.spans[at];
    span?.classList.add("now");
    span?.setAttribute("aria-current", "true");
    if (follow && span && performance.now() - this.scrolled > STILL_MS) span.scrollIntoView({ block: "nearest" });
  }

  // The word of the keyboard's focus, or the one that is spoken.
  get chosen() {
    const focused = this.spans.indexOf(document.activeElement);
    return focused >= 0 ? focused : Math.max(0, this.current);
  }

  focus(i) {
    const span = this.spans[i];
    if (!span) return;
    if (this.spans[this.focused]) this.spans[this.focused].tabIndex = -1;
    this.focused = i;
    span.tabIndex = 0;
    span.focus({ preventScroll: true });
    span.scrollIntoView({ block: "nearest" });
  }

  #go(i, play = false) {
    if (!this.spans[i]) return;
    this.focus(i);
    this.onSeek(this.transcript.words[i].start, play);
  }

  // Moves to the next word below the threshold; false where there is none.
  nextUnsure() {
    const count = this.spans.length;
    for (let step = 1; step <= count; step++) {
      const i = (this.chosen + step) % count;
      if (this.transcript.isUnsure(i)) {
        this.#go(i);
        return true;
      }
    }
    return false;
  }

  #click({ target, detail }) {
    if (target.dataset.start) this.onSeek(Number(target.dataset.start), true);
    else if (target.dataset.word && detail < 2) this.#go(Number(target.dataset.word));
  }

  #key(event) {
    const i = this.spans.indexOf(event.target);
    if (i < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    const { segments, words } = this.transcript;
    const neighbour = (step) => segments[words[i].segment + step]?.first;
    const moves = {
      ArrowLeft: () => this.#go(i - 1),
      ArrowRight: () => this.#go(i + 1),
      ArrowUp: () => this.#go(neighbour(-1)),
      ArrowDown: () => this.#go(neighbour(1)),
      Enter: () => this.#go(i, true),
      F2: () => this.edit(i),
    };
    if (!moves[event.key]) return;
    event.preventDefault();
    event.stopPropagation();
    moves[event.key]();
  }

  // Puts an input in the word's place until it is saved (Enter, Tab, a click elsewhere) or cancelled (Esc).
  edit(i) {
    const span = this.spans[i];
    if (!span || span.hidden) return;
    const input = document.createElement("input");
    input.className = "editing";
    input.value = span.textContent;
    input.spellcheck = true;
    input.setAttribute("aria-label", `Edit “${span.textContent}”`);
    const fit = () => (input.style.width = `${Math.max(3, input.value.length + 1)}ch`);
    fit();
    span.hidden = true;
    span.after(input);
    input.select();
    input.focus();

    let over = false;
    const end = (save) => {
      if (over) return;
      over = true;
      const changed = save && this.transcript.edit(i, input.value);
      input.remove();
      span.hidden = false;
      if (changed) this.changed(i);
    };
    input.addEventListener("input", fit);
    input.addEventListener("blur", () => end(true));
    input.addEventListener("keydown", (event) => {
      event.stopPropagation();
      if (!["Enter", "Tab", "Escape"].includes(event.key) || event.isComposing) return;
      event.preventDefault();
      end(event.key !== "Escape");
      const next = event.key === "Tab" ? i + (event.shiftKey ? -1 : 1) : i;
      this.focus(this.spans[next] ? next : i);
      if (event.key === "Tab" && this.spans[next]) this.edit(next);
    });
  }

  // Shows a word anew after its text has changed.
  changed(i) {
    this.#fill(i);
    this.onEdit();
  }
}

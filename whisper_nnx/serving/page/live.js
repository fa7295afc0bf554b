// Text while the microphone still records: every few seconds the server transcribes what has been recorded, from the
// place up to which the text is settled. The whole recording is transcribed once more when it has ended.

import { transcribe } from "./api.js";

const EVERY_MS = 2000;
const LONGEST_S = 600; // every request uploads the whole recording

export class Live {
  // `soFar()` gives {file, name, seconds}; `onText(text)` gets all text up to now.
  constructor(soFar, fields, onText) {
    Object.assign(this, { soFar, fields, onText, text: "", settled: 0, abort: new AbortController() });
    this.#run();
  }

  stop() {
    this.abort.abort();
  }

  async #run() {
    const { signal } = this.abort;
    try {
      for (;;) {
        await new Promise((resolve) => setTimeout(resolve, EVERY_MS));
        const { file, name, seconds } = this.soFar();
        if (signal.aborted || seconds > LONGEST_S) return;
        if (file.size && seconds - this.settled > 1) await this.#ask(file, name, signal);
      }
    } catch {
      // Cancelled, or the server is busy or gone: the request for the whole recording reports that.
    }
  }

  async #ask(file, name, signal) {
    const fields = new FormData();
    for (const [field, value] of this.fields) fields.append(field, value);
    fields.set("offset_s", this.settled);
    const segments = [];
    const onEvent = (event) => event.type === "transcript.text.segment" && segments.push(event);
    await transcribe(file, name, fields, { onUpload: () => {}, onEvent, signal, words: false });
    const last = segments.pop(); // may change with what is spoken next
    for (const { text } of segments) this.text += text;
    this.settled = last && segments.length ? last.start : this.settled;
    if (!signal.aborted) this.onText(this.text + (last?.text ?? ""));
  }
}

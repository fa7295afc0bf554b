// The queue: recordings that wait, are being transcribed, or are done. No DOM; `onChange(item)` reports every step.

import { transcribe } from "./api.js";
import { Transcript } from "./transcript.js";

const AT_ONCE = 2; // requests; the server batches their windows
const MOST_RETRIES = 20; // of a busy or starting server

export class Queue {
  constructor(onChange) {
    this.items = [];
    this.onChange = onChange;
    this.next = 1;
  }

  add(file, name, fields) {
    const item = { id: this.next++, file, name, fields, duration: null, url: null };
    this.items.push(item);
    this.restart(item, fields);
    return item;
  }

  // Transcribes an item from the start, with the same or other options.
  restart(item, fields = item.fields) {
    item.abort?.abort();
    Object.assign(item, { fields, state: "waiting", progress: 0, error: null, warning: null, status: 0, partial: "", abort: null });
    item.transcript = new Transcript(fields.get("task") ?? "transcribe");
    this.onChange(item);
    this.#start();
  }

  // Stops an item's request; what has arrived stays.
  cancel(item) {
    item.abort?.abort();
    if (item.state !== "done") Object.assign(item, { state: "cancelled", partial: "" });
    this.onChange(item);
    this.#start();
  }

  remove(item) {
    item.abort?.abort();
    if (item.url) URL.revokeObjectURL(item.url);
    this.items = this.items.filter((other) => other !== item);
    this.#start();
  }

  get busy() {
    return this.items.filter((item) => item.abort);
  }

  #start() {
    for (const item of this.items) {
      if (this.busy.length >= AT_ONCE) return;
      if (item.state === "waiting") this.#run(item);
    }
  }

  async #run(item) {
    const abort = new AbortController();
    item.abort = abort;
    try {
      item.warning = await this.#request(item, abort.signal);
      item.transcript.done = true;
      Object.assign(item, { state: "done", progress: 1, partial: "" });
    } catch (error) {
      if (item.abort !== abort || error.name === "AbortError") return; // cancelled or started anew
      Object.assign(item, { state: "failed", error: error.message, status: error.status ?? 0, partial: "" });
    } finally {
      if (item.abort === abort) item.abort = null;
      if (this.items.includes(item)) this.onChange(item);
      this.#start();
    }
  }

  // Comes again for as long as the server is busy or starting.
  async #request(item, signal) {
    for (let attempt = 0; ; attempt++) {
      try {
        item.state = "uploading";
        return await transcribe(item.file, item.name, item.fields, {
          signal,
          onUpload: (share) => {
            Object.assign(item, share < 1 ? { state: "uploading", progress: share } : { state: "transcribing", progress: 0 });
            this.onChange(item);
          },
          onEvent: (event) => this.#take(item, event),
        });
      } catch (error) {
        if (![429, 503].includes(error.status) || attempt === MOST_RETRIES) throw error;
        const wait = Math.min(error.retryAfter ?? 2, 60);
        Object.assign(item, { state: "retrying", error: error.message, progress: 0 });
        this.onChange(item);
        await new Promise((resolve, reject) => {
          const timer = setTimeout(resolve, wait * 1000);
          signal.addEventListener("abort", () => (clearTimeout(timer), reject(new DOMException("Cancelled", "AbortError"))));
        });
        item.error = null;
      }
    }
  }

  #take(item, event) {
    const { transcript } = item;
    if (event.type === "transcript.text.delta") {
      item.partial += event.delta;
    } else if (event.type === "transcript.text.segment") {
      transcript.add(event);
      item.partial = "";
      if (item.duration) item.progress = Math.min(1, event.end / item.duration);
    } else if (event.type === "transcript.text.done") {
      transcript.language = event.languages?.[0]?.code ?? event.language ?? null; // as spoken
      transcript.duration = event.duration ?? item.duration;
      item.duration ??= transcript.duration;
      if (!transcript.segments.length && event.text.trim()) {
        transcript.add({ id: 0, start: 0, end: transcript.duration ?? 0, text: event.text });
      }
    }
    this.onChange(item);
  }
}

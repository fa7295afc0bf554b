// A transcript with timed words that can be edited, and the files that can be made of it. No DOM.

export const UNSURE_BELOW = 0.5; // probability of a word
const SHORTEST_S = 0.04; // of a subtitle whose words have no length

export class Transcript {
  constructor(task = "transcribe") {
    this.task = task;
    this.language = null;
    this.duration = null;
    this.segments = []; // {id, start, end, text, first, last, ...}: `words[first]` to before `words[last]`
    this.words = []; // {word, start, end, probability, segment}, in the order of the text
    this.done = false;
    this.undone = []; // edits, the last one last: {index, word, edited}
  }

  // Adds a segment of the server; without words, its text is one word.
  add({ type, words, speaker, ...segment }) {
    if (speaker) segment.speaker = speaker; // empty where it is not known
    const timed = words?.length ? words : [{ word: segment.text, start: segment.start, end: segment.end }];
    const first = this.words.length;
    for (const word of timed) this.words.push({ ...word, segment: this.segments.length });
    this.segments.push({ ...segment, first, last: this.words.length });
  }

  get edits() {
    return this.words.filter((word) => word.edited).length;
  }

  isUnsure(index) {
    const { probability, edited, word } = this.words[index];
    return !edited && word.trim() !== "" && probability !== undefined && probability < UNSURE_BELOW;
  }

  // Replaces a word's text and keeps its times and the space before it; an empty text removes the word.
  edit(index, text) {
    const entry = this.words[index];
    const changed = text.trim().replace(/\s+/g, " ");
    if (changed === entry.word.trim()) return false;
    this.undone.push({ index, word: entry.word, edited: entry.edited });
    entry.space ??= entry.word.match(/^\s*/)[0];
    entry.word = changed && entry.space + changed;
    entry.edited = true;
    return true;
  }

  // Takes the last edit back; returns the word's index, or null.
  undo() {
    const last = this.undone.pop();
    if (!last) return null;
    Object.assign(this.words[last.index], { word: last.word, edited: last.edited });
    return last.index;
  }

  wordsOf(segment) {
    return this.words.slice(segment.first, segment.last);
  }

  textOf(segment) {
    const words = this.wordsOf(segment);
    return words.some((word) => word.edited) ? words.map((word) => word.word).join("") : segment.text;
  }

  get text() {
    return this.segments.map((segment) => this.textOf(segment)).join("");
  }

  // Index of the word that is spoken at a time, or of the last one before it; -1 before the first.
  wordAt(seconds) {
    let low = 0;
    let high = this.words.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.words[middle].start <= seconds + 0.001) low = middle + 1;
      else high = middle;
    }
    return low - 1;
  }
}

function shownWords(transcript, segment) {
  return transcript.wordsOf(segment).filter((word) => word.word.trim() !== "");
}

// [start, end, text, speaker] of each segment with text, in s; times are those of its words.
function cues(transcript) {
  const found = [];
  for (const segment of transcript.segments) {
    const words = shownWords(transcript, segment);
    if (!words.length) continue;
    const [{ start }, { end }] = [words[0], words.at(-1)];
    found.push([start, end > start ? end : start + SHORTEST_S, transcript.textOf(segment).trim().replace(/[\r\n]+/g, "\n"), segment.speaker]);
  }
  return found;
}

export function formatTime(seconds, mark = ".", alwaysHours = false) {
  const whole = Math.round(seconds * 1000);
  const pad = (value, length = 2) => String(value).padStart(length, "0");
  const hours = Math.floor(whole / 3600000);
  const rest = `${pad(Math.floor(whole / 60000) % 60)}:${pad(Math.floor(whole / 1000) % 60)}${mark}${pad(whole % 1000, 3)}`;
  return hours || alwaysHours ? `${pad(hours)}:${rest}` : rest;
}

// As on a clock: 0:07, 12:30, 1:02:03.
export function clock(seconds) {
  const whole = Math.max(0, Math.floor(seconds || 0));
  const pad = (value) => String(value).padStart(2, "0");
  const minutes = Math.floor(whole / 60);
  return minutes < 60 ? `${minutes}:${pad(whole % 60)}` : `${Math.floor(minutes / 60)}:${pad(minutes % 60)}:${pad(whole % 60)}`;
}

const labelled = (text, speaker) => (speaker === undefined ? text : `(speaker ${speaker}) ${text}`);
const arrowless = (text) => text.replaceAll("-->", "->"); // which would end a cue

function toTxt(transcript) {
  return cues(transcript).map(([, , text, speaker]) => `${labelled(text, speaker).replaceAll("\n", " ")}\n`).join("");
}

function toSrt(transcript) {
  const time = (seconds) => formatTime(seconds, ",", true);
  return cues(transcript)
    .map(([start, end, text, speaker], i) => `${i + 1}\n${time(start)} --> ${time(end)}\n${arrowless(labelled(text, speaker))}\n\n`)
    .join("");
}

function toVtt(transcript) {
  const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const lines = cues(transcript).map(([start, end, text, speaker]) => {
    const voice = speaker === undefined ? "" : `<v Speaker${speaker}>`;
    return `${formatTime(start)} --> ${formatTime(end)}\n${voice}${escaped(text)}\n\n`;
  });
  return ["WEBVTT\n\n", ...lines].join("");
}

// Words stand in their segments, with the space before them, as `whisper-nnx --output_format json` writes them.
function toJson(transcript) {
  const segments = transcript.segments.map(({ first, last, ...segment }) => ({
    ...segment,
    text: transcript.textOf({ ...segment, first, last }),
    words: shownWords(transcript, { first, last }).map(({ segment: _, space: __, edited, ...word }) => (edited ? { ...word, edited } : word)),
  }));
  const { task, language, duration, text } = transcript;
  return `${JSON.stringify({ task, language, duration, text, segments }, null, 2)}\n`;
}

export const FORMATS = {
  txt: ["text/plain", toTxt],
  srt: ["application/x-subrip", toSrt],
  vtt: ["text/vtt", toVtt],
  json: ["application/json", toJson],
};

// Loudness of a recording, for the waveform: read in pieces where the format allows it, so that memory stays bounded.

export const PER_S = 100; // values
const RATE = 8000; // of the decoded samples, in Hz; enough for loudness
const CLUSTER = [0x1f, 0x43, 0xb6, 0x75]; // starts the parts of WebM
const QUIET = 24; // a recording whose loudest sample is below is drawn small
const PIECE_BYTES = 4 << 20;
const MOST_DECODED_BYTES = 500e6; // of a file that can only be decoded whole, at 48 kHz in stereo: 21 minutes

// Returns {values, loudest, duration}: the loudest sample (0-255) of each 10 ms, the loudest of all, and the length in s;
// null where the recording cannot be decoded here, or only in too much memory. `duration`, in s, is what the player
// knows, or null.
export async function readPeaks(file, duration, signal) {
  const pieces = await piecesOf(file);
  if (!pieces && (duration ?? 0) * 48000 * 2 * 4 > MOST_DECODED_BYTES) return null;
  const parts = [];
  for (const piece of pieces ?? [() => file.arrayBuffer()]) {
    if (signal.aborted) return null;
    try {
      parts.push(loudness(await new OfflineAudioContext(1, 1, RATE).decodeAudioData(await piece())));
    } catch {
      if (!parts.length) return null; // no audio that this browser knows
    }
  }
  const values = joined(parts);
  const loudest = values.reduce((a, b) => Math.max(a, b), QUIET);
  return { values: fitted(values, duration), loudest, duration: duration ?? values.length / PER_S };
}

function loudness(buffer) {
  const step = RATE / PER_S;
  const values = new Uint8Array(Math.ceil(buffer.length / step));
  for (let channel = 0; channel < buffer.numberOfChannels; channel++) {
    const samples = buffer.getChannelData(channel);
    for (let i = 0; i < values.length; i++) {
      let peak = 0;
      const end = Math.min(samples.length, (i + 1) * step);
      for (let j = i * step; j < end; j++) peak = Math.max(peak, Math.abs(samples[j]));
      values[i] = Math.max(values[i], Math.min(255, peak * 255));
    }
  }
  return values;
}

function joined(parts) {
  const values = new Uint8Array(parts.reduce((total, part) => total + part.length, 0));
  let at = 0;
  for (const part of parts) {
    values.set(part, at);
    at += part.length;
  }
  return values;
}

// Where pieces of MP3 lost a frame each, stretches the values over the whole length again.
function fitted(values, duration) {
  const length = Math.round((duration ?? 0) * PER_S);
  if (!length || Math.abs(length - values.length) < PER_S / 5) return values;
  return Uint8Array.from({ length }, (_, i) => values[Math.floor((i * values.length) / length)]);
}

// Functions that read pieces of the file, each of which can be decoded by itself; null for one that must be whole.
async function piecesOf(file) {
  if (file.size <= PIECE_BYTES) return null;
  const head = new DataView(await file.slice(0, 65536).arrayBuffer());
  const tag = (at) => String.fromCharCode(...new Uint8Array(head.buffer, at, 4));
  if (tag(0) === "RIFF" && tag(8) === "WAVE") return wavPieces(file, head, tag);
  if (tag(0) === "OggS") return markedPieces(file, oggHead(head), [...new TextEncoder().encode("OggS")]);
  if (head.getUint32(0) === 0x1a45dfa3) return markedPieces(file, find(new Uint8Array(head.buffer), CLUSTER), CLUSTER); // WebM
  const isMp3 = tag(0).startsWith("ID3") || (head.getUint16(0) & 0xffe6) === 0xffe2; // MPEG layer III
  return isMp3 ? slices(file, 0, PIECE_BYTES, (part) => part.arrayBuffer()) : null;
}

function wavPieces(file, head, tag) {
  let format = null;
  for (let at = 12; at + 24 <= head.byteLength; at += 8 + head.getUint32(at + 4, true)) {
    if (tag(at) === "fmt ") format = { at: at + 8, size: head.getUint32(at + 4, true), frame: head.getUint16(at + 20, true) };
    if (tag(at) !== "data" || !format?.frame) continue;
    const step = PIECE_BYTES - (PIECE_BYTES % format.frame);
    return slices(file, at + 8, step, (part) => new Blob([wavHeader(head, format, part.size), part]).arrayBuffer());
  }
  return null;
}

function wavHeader(head, { at, size }, bytes) {
  const text = (letters) => new TextEncoder().encode(letters);
  const number = (value) => new Uint8Array(new Uint32Array([value]).buffer);
  const format = new Uint8Array(head.buffer, at, size);
  return new Blob([text("RIFF"), number(20 + size + bytes), text("WAVEfmt "), number(size), format, text("data"), number(bytes)]);
}

// Size of the pages before the first one with audio, the first whose position is not 0; -1 where they are too long.
function oggHead(head) {
  let at = 0;
  while (at + 282 <= head.byteLength && head.getBigInt64(at + 6, true) === 0n) {
    const segments = new Uint8Array(head.buffer, at + 27, head.getUint8(at + 26));
    at += 27 + segments.length + segments.reduce((total, size) => total + size, 0);
  }
  return at + 282 <= head.byteLength ? at : -1;
}

// Pieces that start at a mark of the format, each behind the file's head.
async function markedPieces(file, headSize, mark) {
  if (headSize < 0) return null;
  const head = file.slice(0, headSize);
  const pieces = [];
  for (let start = headSize; start < file.size; ) {
    let end = start + PIECE_BYTES;
    const found = find(new Uint8Array(await file.slice(end, end + PIECE_BYTES).arrayBuffer()), mark);
    end = found < 0 ? file.size : end + found;
    const part = file.slice(start, end);
    pieces.push(() => new Blob([head, part]).arrayBuffer());
    start = end;
  }
  return pieces;
}

function find(bytes, mark) {
  for (let at = bytes.indexOf(mark[0]); at >= 0; at = bytes.indexOf(mark[0], at + 1)) {
    if (mark.every((value, i) => bytes[at + i] === value)) return at;
  }
  return -1;
}

function slices(file, start, step, read) {
  const pieces = [];
  for (let at = start; at < file.size; at += step) pieces.push(() => read(file.slice(at, Math.min(at + step, file.size))));
  return pieces;
}

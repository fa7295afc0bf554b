// Requests to the server: OpenAI's API, with every failure as a sentence.

const KEY = "api-key";
const UNREACHABLE = "The server cannot be reached. Check that it is running, then try again.";

export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (key) => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY)),
};

export class ApiError extends Error {
  constructor(message, status = 0, retryAfter = null) {
    super(message);
    Object.assign(this, { status, retryAfter });
  }
}

function errorOf(status, body, retryAfter) {
  let message;
  try {
    const { error, detail } = JSON.parse(body);
    message = error?.message ?? error ?? detail;
  } catch {
    // no JSON: from a proxy, say
  }
  if (typeof message !== "string" || !message) message = `The server answered with status ${status}.`;
  return new ApiError(message, status, retryAfter === null ? null : Number(retryAfter) || null);
}

function headers() {
  return apiKey.get() ? { Authorization: `Bearer ${apiKey.get()}` } : {};
}

export async function listModels() {
  let response;
  try {
    response = await fetch("v1/models", { headers: headers(), cache: "no-store" });
  } catch {
    throw new ApiError(UNREACHABLE);
  }
  const body = await response.text();
  if (!response.ok) throw errorOf(response.status, body, response.headers.get("Retry-After"));
  return JSON.parse(body).data;
}

// Returns a function that takes text as it arrives and calls `onEvent` with the data of each whole server-sent event.
export function eventReader(onEvent) {
  let rest = "";
  return (text) => {
    const events = (rest + text).split(/\r?\n\r?\n/);
    rest = events.pop();
    for (const event of events) {
      const data = event
        .split(/\r?\n/)
        .filter((line) => line.startsWith("data:"))
        .map((line) => line.slice(5).trimStart());
      if (data.length && data[0] !== "[DONE]") onEvent(JSON.parse(data.join("\n")));
    }
  };
}

// Uploads a recording and reports the transcript's events as they come; returns the server's warning, or null.
// XMLHttpRequest, because fetch does not report how much has been uploaded.
export function transcribe(file, name, fields, { onUpload, onEvent, signal, words = true }) {
  return new Promise((resolve, reject) => {
    const task = fields.get("task") === "translate" ? "translations" : "transcriptions";
    const body = new FormData();
    for (const [field, value] of fields) if (field !== "task") body.append(field, value);
    body.append("stream", "true");
    body.append("response_format", "verbose_json");
    if (words) body.append("timestamp_granularities[]", "word");
    body.append("file", file, name);

    const request = new XMLHttpRequest();
    let read = 0;
    let finished = false;
    let failure = null;
    const feed = eventReader((event) => {
      if (event.error) failure = new ApiError(event.error.message ?? String(event.error));
      else if (event.type === "transcript.text.done") finished = true;
      onEvent(event);
    });
    const readOn = () => {
      if (request.status !== 200) return;
      const text = request.responseText;
      feed(text.slice(read));
      read = text.length;
    };
    request.upload.onprogress = ({ loaded, total }) => onUpload(total ? loaded / total : 0);
    request.upload.onload = () => onUpload(1);
    request.onprogress = readOn;
    request.onerror = () => reject(new ApiError(read ? "The connection broke before the transcript was complete." : UNREACHABLE));
    request.onabort = () => reject(new DOMException("Cancelled", "AbortError"));
    request.onload = () => {
      if (request.status !== 200) {
        reject(errorOf(request.status, request.responseText, request.getResponseHeader("Retry-After")));
        return;
      }
      readOn();
      if (failure) reject(failure);
      else if (!finished) reject(new ApiError("The connection ended before the transcript was complete."));
      else resolve(request.getResponseHeader("X-Warning"));
    };
    signal.addEventListener("abort", () => request.abort());
    request.open("POST", `v1/audio/${task}`);
    for (const [header, value] of Object.entries(headers())) request.setRequestHeader(header, value);
    request.send(body);
  });
}

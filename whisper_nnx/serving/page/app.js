// Connects the parts of the page.

import { apiKey, listModels } from "./api.js";
import { List, describe } from "./list.js";
import { Live } from "./live.js";
import { Options } from "./options.js";
import { Player } from "./player.js";
import { Queue } from "./queue.js";
import { Recorder, whyNot } from "./recorder.js";
import { addShortcuts } from "./shortcuts.js";
import { FORMATS, clock } from "./transcript.js";
import { Words } from "./words.js";

const $ = (id) => document.getElementById(id);
const RECONNECT_MS = 5000;

let selected = null; // item of the queue
let live = null; // text of the recording in progress
const options = new Options($("options"), $("options-set"));
const queue = new Queue(onChange);
const list = new List($("queue"), {
  select,
  cancel: (item) => queue.cancel(item),
  remove,
  restart: (item) => restart(item, item.fields),
});
const words = new Words($("segments"), { onSeek: (seconds, play) => player.seek(seconds, play), onEdit: edited });
const player = new Player((seconds, playing) => words.setTime(seconds, playing));
const recorder = new Recorder($("level"), (seconds) => ($("record-time").textContent = clock(seconds)));

// Messages.

function announce(text) {
  $("announce").textContent = text;
}

function problem(text) {
  $("problem").hidden = !text;
  $("problem").textContent = text ?? "";
}

// Adding recordings.

function add(files) {
  let fields;
  try {
    fields = options.fields();
  } catch (error) {
    problem(error.message);
    return;
  }
  problem(null);
  const added = [...files].map(({ file, name }) => queue.add(file, name, fields));
  if (added.length && (!selected || added.length === 1)) select(added[0]);
}

const addFiles = (files) => add([...files].map((file) => ({ file, name: file.name })));

async function record() {
  problem(null);
  const button = $("record");
  if (button.disabled) return;
  button.disabled = true; // while the browser asks, or the last part is written
  try {
    if (recorder.active) await finishRecording(true);
    else await startRecording();
  } catch (error) {
    problem(error.message);
  }
  button.disabled = false;
  showRecording();
}

async function startRecording() {
  const fields = options.fields();
  await recorder.start();
  $("live").textContent = "Text appears here while you speak.";
  live = new Live(() => recorder.soFar(), fields, (text) => {
    $("live").textContent = text.trim();
    $("live").scrollTop = $("live").scrollHeight;
  });
}

async function finishRecording(keep) {
  live?.stop();
  const recorded = await recorder.stop(keep);
  showRecording();
  if (recorded) add([recorded]);
}

function showRecording() {
  $("record").setAttribute("aria-pressed", String(recorder.active));
  $("record-label").textContent = recorder.active ? "Stop and transcribe" : "Record";
  $("recording").hidden = !recorder.active;
}

$("choose").addEventListener("click", () => $("files").click());
$("files").addEventListener("change", ({ target }) => {
  addFiles(target.files);
  target.value = ""; // the same file may be chosen again
});
$("record").addEventListener("click", record);
$("discard").addEventListener("click", () => finishRecording(false));
for (const type of ["dragenter", "dragover", "dragleave", "drop"]) {
  addEventListener(type, (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    const over = type === "dragleave" ? event.relatedTarget !== null : type !== "drop";
    $("drop").classList.toggle("over", over);
    if (type === "drop") addFiles(event.dataTransfer.files);
  });
}

// The queue and the recording that is shown.

function onChange(item) {
  list.update(item, item === selected);
  showQueue();
  if (item === selected) showSoon();
  if (item.state === item.announced) return;
  item.announced = item.state;
  if (["done", "failed"].includes(item.state)) announce(`${item.name}: ${describe(item)}`);
  if (item.status === 401) askForKey(item.error);
}

function showQueue() {
  const all = queue.items.length;
  $("work").hidden = all === 0;
  $("input").classList.toggle("compact", all > 0);
  $("queue-count").textContent = `${queue.items.filter(({ state }) => state === "done").length} of ${all} done`;
}

function select(item) {
  const before = selected;
  selected = item;
  if (before && queue.items.includes(before)) list.update(before, false);
  if (item) list.update(item, true);
  player.show(item);
  if (item) show();
}

function remove(item) {
  if (item.edited && !confirm(`${item.name} has edits that were not downloaded. Remove it?`)) return;
  const place = queue.items.indexOf(item);
  queue.remove(item);
  list.remove(item);
  if (item === selected) select(queue.items[Math.min(place, queue.items.length - 1)] ?? null);
  showQueue();
  if (!queue.items.length) $("choose").focus();
}

function restart(item, fields) {
  if (item.edited && !confirm(`${item.name} has edits that were not downloaded. Transcribe it again?`)) return;
  item.edited = false;
  queue.restart(item, fields);
}

// Once for all events of the server that arrive before the next frame.
let waiting = false;
function showSoon() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    if (selected) show();
  });
}

// Shows the selected recording as it is now.
function show() {
  const { transcript, state, partial, error, warning } = selected;
  const running = ["waiting", "uploading", "transcribing", "retrying"].includes(state);
  $("title").textContent = selected.name;
  $("about").textContent = about(selected);
  $("failure").hidden = state !== "failed";
  $("failure").textContent = error ?? "";
  $("warning").hidden = !warning;
  $("warning").textContent = warning ?? "";
  words.show(transcript);
  $("transcript").setAttribute("aria-busy", String(running));
  $("partial").textContent = partial;
  $("partial").hidden = !partial;
  const empty = !transcript.words.length && !partial;
  $("nothing").hidden = !empty || state === "failed";
  $("nothing").textContent = state === "done" ? "No speech was found in this recording." : running ? "The text appears here while it is decoded." : "";
  $("downloads").hidden = running && empty;
  for (const button of $("downloads").querySelectorAll("[data-format], #copy")) button.disabled = !transcript.words.length;
  $("again").disabled = running;
  for (const id of ["edit", "unsure"]) $(id).disabled = !transcript.words.length;
  $("undo").disabled = !transcript.undone.length;
  player.refresh();
}

function about({ transcript, duration, state }) {
  const unsure = transcript.words.filter((_, i) => transcript.isUnsure(i)).length;
  const parts = [
    options.languageNames[transcript.language] ?? transcript.language,
    transcript.task === "translate" && "translated to English",
    duration && clock(duration),
    transcript.words.length && `${transcript.words.length} words`,
    unsure && `${unsure} unsure`,
    transcript.edits && `${transcript.edits} edited`,
  ];
  return parts.filter(Boolean).join(" · ") || describe({ transcript, duration, state, progress: 0 });
}

function edited() {
  selected.edited = true;
  show();
}

$("edit").addEventListener("click", () => words.edit(words.chosen));
$("undo").addEventListener("click", undo);
$("unsure").addEventListener("click", nextUnsure);
$("again").addEventListener("click", () => {
  try {
    restart(selected, options.fields());
  } catch (error) {
    problem(error.message);
  }
});

function undo() {
  const index = selected?.transcript.undo();
  if (typeof index === "number") words.changed(index);
}

function nextUnsure() {
  if (selected && !words.nextUnsure()) announce("No unsure words.");
}

// Downloads.

for (const button of $("downloads").querySelectorAll("[data-format]")) {
  button.addEventListener("click", () => {
    const [type, write] = FORMATS[button.dataset.format];
    const url = URL.createObjectURL(new Blob([write(selected.transcript)], { type }));
    const name = `${selected.name.replace(/\.[^.]+$/, "")}.${button.dataset.format}`;
    Object.assign(document.createElement("a"), { href: url, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
    selected.edited = false;
    announce(`${name} downloaded`);
  });
}
$("copy").hidden = !navigator.clipboard;
$("copy").addEventListener("click", async () => {
  await navigator.clipboard.writeText(FORMATS.txt[1](selected.transcript));
  announce("Text copied");
  $("copy").textContent = "Copied";
  setTimeout(() => ($("copy").textContent = "Copy text"), 2000);
});
addEventListener("beforeunload", (event) => {
  if (recorder.active || queue.items.some((item) => item.edited || item.abort)) event.preventDefault();
});

// The server, the key and the theme.

async function connect() {
  const show = (state, text) => {
    $("server").dataset.state = state;
    if ($("server").textContent !== text) $("server").textContent = text; // a screen reader reads each change
  };
  try {
    options.setModels(await listModels());
    if (!Object.keys(options.languageNames).length) options.setLanguages(await (await fetch("page/languages.json")).json());
    show("ready", "Server ready");
    return;
  } catch (error) {
    if (error.status === 401) {
      show("locked", "API key needed");
      askForKey(error.message);
      return;
    }
    show("offline", error.status === 503 ? "Server starting" : "Server offline");
  }
  setTimeout(connect, RECONNECT_MS);
}

function askForKey(why) {
  if ($("key-dialog").open) return;
  if (why) $("key-why").textContent = why;
  $("key").value = apiKey.get();
  $("key-dialog").showModal();
}

$("open-key").addEventListener("click", () => askForKey());
$("key-dialog").addEventListener("close", () => {
  if ($("key-dialog").returnValue !== "save") return;
  apiKey.set($("key").value.trim());
  connect();
  for (const item of queue.items) if (item.status === 401) queue.restart(item);
});
$("key").addEventListener("keydown", (event) => event.key === "Enter" && (event.preventDefault(), $("key-dialog").close("save")));

function isDark() {
  return (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
}

$("theme").setAttribute("aria-pressed", String(isDark()));
$("theme").addEventListener("click", () => {
  const theme = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("theme", theme);
  $("theme").setAttribute("aria-pressed", String(isDark()));
  player.waveform.draw();
});

$("open-shortcuts").addEventListener("click", () => $("shortcuts-dialog").showModal());
addShortcuts($("single-keys"), {
  " ": () => player.toggle(),
  ArrowLeft: () => player.skip(-5),
  ArrowRight: () => player.skip(5),
  e: () => words.edit(words.chosen),
  u: nextUnsure,
  r: record,
  o: () => $("files").click(),
  "?": () => $("shortcuts-dialog").showModal(),
  undo,
});
if (whyNot()) $("record").title = whyNot();
connect();

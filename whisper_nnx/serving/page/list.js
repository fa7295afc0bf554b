// The queue on the page: a row for each recording, with its state in words and its progress.

import { clock } from "./transcript.js";

export function describe(item) {
  const percent = `${Math.round(100 * item.progress)} %`;
  const texts = {
    waiting: "Waiting",
    uploading: `Uploading, ${percent}`,
    transcribing: item.progress ? `Transcribing, ${percent}` : "Transcribing",
    retrying: `Busy: ${item.error}`,
    done: item.duration ? `Done, ${clock(item.duration)}` : "Done",
    failed: `Failed: ${item.error}`,
    cancelled: "Cancelled",
  };
  return texts[item.state];
}

export class List {
  // `actions`: {select, cancel, remove, restart}, each of an item.
  constructor(root, actions) {
    Object.assign(this, { root, actions, rows: new Map() });
  }

  // Shows an item's state; a new item gets a row at the end.
  update(item, isSelected) {
    const row = this.rows.get(item.id) ?? this.#add(item);
    const running = ["uploading", "transcribing", "retrying", "waiting"].includes(item.state);
    row.root.dataset.state = item.state;
    row.open.setAttribute("aria-current", String(isSelected));
    row.state.textContent = describe(item);
    row.progress.hidden = !running || item.state === "waiting";
    if (item.progress) row.progress.value = item.progress;
    else row.progress.removeAttribute("value"); // unknown
    row.again.hidden = !["failed", "cancelled"].includes(item.state);
    row.end.title = running ? "Cancel" : "Remove";
    row.end.setAttribute("aria-label", `${row.end.title} ${item.name}`);
    row.end.onclick = () => (running ? this.actions.cancel(item) : this.actions.remove(item));
  }

  remove(item) {
    this.rows.get(item.id)?.root.remove();
    this.rows.delete(item.id);
  }

  #add(item) {
    const make = (tag, className, text = "") => Object.assign(document.createElement(tag), { className, textContent: text });
    const row = {
      root: make("li", "item"),
      open: make("button", "item-open"),
      name: make("span", "item-name", item.name),
      state: make("span", "item-state faint"),
      progress: make("progress", ""),
      again: make("button", "quiet small end", "↻"),
      end: make("button", "quiet small end", "×"),
    };
    const buttons = make("div", "item-buttons");
    row.open.type = row.again.type = row.end.type = "button";
    row.name.title = item.name;
    row.progress.max = 1;
    row.progress.setAttribute("aria-label", `Progress of ${item.name}`);
    row.again.title = "Try again";
    row.again.setAttribute("aria-label", `Try ${item.name} again`);
    row.open.onclick = () => this.actions.select(item);
    row.again.onclick = () => this.actions.restart(item);
    row.open.append(row.name, row.state);
    buttons.append(row.again, row.end);
    row.root.append(row.open, buttons, row.progress);
    this.root.append(row.root);
    this.rows.set(item.id, row);
    return row;
  }
}

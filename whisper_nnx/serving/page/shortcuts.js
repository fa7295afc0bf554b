// Keyboard shortcuts of the whole page; they leave fields, open dialogs, and buttons' own keys alone.

const STORED = "single-keys";

// `box` switches the shortcuts of a single key off; `actions`: function for each key, and `undo` for Ctrl+Z.
export function addShortcuts(box, actions) {
  box.checked = localStorage.getItem(STORED) !== "off";
  box.addEventListener("change", () => localStorage.setItem(STORED, box.checked ? "on" : "off"));
  addEventListener("keydown", (event) => {
    const { target, key } = event;
    if (event.defaultPrevented || document.querySelector("dialog[open]")) return;
    if (target.closest("input:not([type=checkbox], [type=file]), select, textarea")) return;
    const control = event.ctrlKey || event.metaKey;
    if (event.altKey || (control && (key !== "z" || event.shiftKey))) return;
    if (!control && !box.checked) return;
    if (key === " " && target.closest("button, summary, a, input")) return; // which it presses
    const action = control ? actions.undo : actions[key.length === 1 ? key.toLowerCase() : key];
    if (!action) return;
    event.preventDefault();
    if (!event.repeat || key.startsWith("Arrow")) action();
  });
}

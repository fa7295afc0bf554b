// The form of options: what is sent with a recording, remembered in this browser.

const STORED = "options";
const MAIN = ["model", "language", "task"]; // always visible
const ALIAS = "whisper-1"; // of the first model

export class Options {
  constructor(form, badge) {
    Object.assign(this, { form, badge, models: [], languageNames: {}, stored: stored() });
    for (const [name, value] of Object.entries(this.stored)) this.#set(name, value);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", () => this.#changed());
    form.addEventListener("reset", () => setTimeout(() => this.#changed()));
  }

  // The fields of a request that are set. Raises an error for a line that is no name=value.
  fields() {
    const fields = new FormData();
    for (const [name, value] of new FormData(this.form)) {
      if (name !== "others" && value.trim()) fields.append(name, value.trim());
    }
    for (const line of this.form.elements.others.value.split("\n").map((text) => text.trim()).filter(Boolean)) {
      const [, name, value] = line.match(/^([A-Za-z_]+(?:\[\])?)\s*=\s*(.*)$/) ?? [];
      if (!name) throw new Error(`Other options: “${line}” must be name=value, such as no_speech_threshold=0.5.`);
      fields.append(name, value);
    }
    return fields;
  }

  setModels(models) {
    const { model } = this.form.elements;
    const chosen = model.value || this.stored.model;
    const named = models.filter(({ id }) => id !== ALIAS);
    this.models = models = named.length ? named : models;
    model.replaceChildren(...models.map(({ id }) => new Option(id, id)));
    if (models.some(({ id }) => id === chosen)) model.value = chosen;
    this.#changed();
  }

  // `names`: English name of each code.
  setLanguages(names) {
    const capital = (name) => name.replace(/(^|\s)\p{L}/gu, (letter) => letter.toUpperCase());
    const sorted = Object.entries(names).map(([code, name]) => [code, capital(name)]).sort(([, a], [, b]) => a.localeCompare(b));
    this.languageNames = Object.fromEntries(sorted);
    this.form.elements.language.append(...sorted.map(([code, name]) => new Option(name, code)));
    this.#set("language", this.stored.language ?? "");
    this.#changed();
  }

  #set(name, value) {
    const element = this.form.elements[name];
    if (element?.type === "checkbox") element.checked = value === element.value;
    else if (element) element.value = value;
  }

  // English-only models have neither a language to choose nor anything to translate.
  #changed() {
    const { model, language, task } = this.form.elements;
    const { languages } = this.models.find(({ id }) => id === model.value) ?? {};
    const englishOnly = languages ? languages.length === 1 : /\.en\b/.test(model.value);
    for (const select of [language, task]) {
      select.disabled = englishOnly;
      select.title = englishOnly ? `${model.value} knows only English` : "";
    }
    const entries = [...new FormData(this.form)].filter(([, value]) => value.trim());
    const more = entries.filter(([name]) => !MAIN.includes(name)).length;
    this.badge.hidden = !more;
    this.badge.textContent = `${more} set`;
    localStorage.setItem(STORED, JSON.stringify(Object.fromEntries(entries)));
  }
}

function stored() {
  try {
    return JSON.parse(localStorage.getItem(STORED)) ?? {};
  } catch {
    return {};
  }
}

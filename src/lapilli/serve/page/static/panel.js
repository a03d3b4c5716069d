// The settings: for each column its model, system prompt and how answers are drawn. Beside the conversation on wide
// screens, a drawer over it on narrow ones.

import { byId, el, iconButton } from "./dom.js";
import { recall, remember } from "./store.js";

export const SIDES = ["Left", "Right"];

export class Panel {
  /** `changed` is called when the choice of a model, or any other setting, is another one. */
  constructor(changed) {
    this.changed = changed;
    this.limits = null;
    this.columns = [];
    this.dialog = byId("panel");
    this.dialog.querySelector("header").append(iconButton("close", "Close settings", () => this.close()));
    this.narrow = matchMedia("(max-width: 60rem)");
    this.narrow.addEventListener("change", () => this.dialog.open && (this.close(), this.open()));
    this.dialog.addEventListener(
      "click",
      (event) => event.target === this.dialog && this.narrow.matches && this.close(),
    );
  }

  /** Take over what the server serves; what the user chose before stays, where it is still served. */
  setLimits(limits, wanted) {
    this.limits = limits;
    const kept = this.columns.length ? this.columns : (recall("columns") ?? []);
    const names = limits.models.map((model) => model.name);
    const count = Math.min(2, Math.max(1, kept.length));
    this.columns = Array.from({ length: count }, (_, i) => {
      const column = { ...this.defaults(), ...kept[i] };
      if (i === 0 && names.includes(wanted)) column.model = wanted;
      if (!names.includes(column.model)) column.model = names[0] ?? "";
      column.max_tokens = Math.min(column.max_tokens, limits.new_tokens);
      return column;
    });
    this.draw();
  }

  defaults() {
    const { temperature, top_p, max_tokens } = this.limits.defaults;
    return {
      model: "",
      system: "",
      temperature,
      top_p,
      max_tokens: Math.min(max_tokens, this.limits.new_tokens),
      seed: null,
    };
  }

  /** One column or two; the second begins with another model where there is one. */
  setCount(count) {
    if (count === 1) this.columns.length = 1;
    else if (this.columns.length === 1) {
      const other = this.limits.models.find((model) => model.name !== this.columns[0].model);
      this.columns.push({ ...this.columns[0], model: other?.name ?? this.columns[0].model });
    }
    this.#save();
    this.draw();
  }

  open() {
    if (this.narrow.matches) this.dialog.showModal();
    else this.dialog.show();
  }

  close() {
    this.dialog.close();
  }

  toggle() {
    if (this.dialog.open) this.close();
    else this.open();
  }

  draw() {
    byId("models").replaceChildren(
      ...this.columns.map((column, i) => this.#modelChoice(column, i, `model-${i}`, "visually-hidden")),
    );
    byId("panel-body").replaceChildren(...this.columns.map((column, i) => this.#group(column, i)));
  }

  #save() {
    remember("columns", this.columns);
    this.changed();
  }

  #modelChoice(column, i, id, labelClass = "") {
    const names = this.limits.models.map((model) => model.name);
    const choice = el(
      "select",
      { id, title: column.model },
      names.map((name) => el("option", { value: name, selected: name === column.model }, name)),
    );
    choice.addEventListener("change", () => {
      column.model = choice.value;
      this.#save();
      this.draw();
      byId(id).focus();
    });
    const side = this.columns.length > 1 ? `${SIDES[i]} model` : "Model";
    return el("div", { class: "model" }, el("label", { for: id, class: labelClass }, side), choice);
  }

  #group(column, i) {
    const id = (name) => `${name}-${i}`;
    const system = el("textarea", { id: id("system"), rows: 3, value: column.system, placeholder: "The model's own" });
    system.addEventListener("input", () => this.#set(column, "system", system.value));
    const reset = el(
      "button",
      {
        type: "button",
        onclick: () => (Object.assign(column, this.defaults(), { model: column.model }), this.#save(), this.draw()),
      },
      "Defaults",
    );
    return el(
      "fieldset",
      {},
      el("legend", {}, this.columns.length > 1 ? SIDES[i] : "Answers"),
      this.#modelChoice(column, i, id("panel-model")),
      el("label", { for: id("system") }, "System prompt"),
      system,
      this.#slider(column, "temperature", "Temperature", id, 2, "0: always the likeliest word"),
      this.#slider(column, "top_p", "Top-p", id, 1, "draws among the likeliest words that add up to this"),
      this.#number(column, "max_tokens", "Longest answer (tokens)", id, {
        min: 1,
        max: this.limits.new_tokens,
        needed: true,
      }),
      this.#number(column, "seed", "Seed", id, { min: 0, max: Number.MAX_SAFE_INTEGER, placeholder: "none" }),
      el("div", { class: "buttons" }, reset),
    );
  }

  #set(column, name, value) {
    column[name] = value;
    this.#save();
  }

  #slider(column, name, label, id, max, help) {
    const shown = el("output", { for: id(name) }, column[name].toFixed(2));
    const field = el("input", {
      type: "range",
      id: id(name),
      min: 0,
      max,
      step: 0.05,
      "aria-describedby": id(`${name}-help`),
    });
    field.value = column[name];
    field.addEventListener("input", () => {
      shown.textContent = Number(field.value).toFixed(2);
      this.#set(column, name, Number(field.value));
    });
    return el(
      "div",
      { class: "setting" },
      el("label", { for: id(name) }, label),
      shown,
      field,
      el("small", { id: id(`${name}-help`) }, help),
    );
  }

  #number(column, name, label, id, { min, max, placeholder = "", needed = false }) {
    const trouble = el("small", { class: "trouble", role: "alert" });
    const field = el("input", { type: "number", id: id(name), min, max, step: 1, placeholder, inputMode: "numeric" });
    if (column[name] !== null) field.value = column[name];
    field.addEventListener("input", () => {
      const value = field.value === "" && !field.validity.badInput ? null : Number(field.value);
      const good =
        value === null ? !needed : field.value !== "" && Number.isInteger(value) && value >= min && value <= max;
      const range = `a whole number from ${min} to ${max.toLocaleString("en")}`;
      trouble.textContent = good ? "" : `${range}; until then ${column[name] ?? "none"} is used`;
      field.setAttribute("aria-invalid", String(!good));
      if (good) this.#set(column, name, value);
    });
    return el("div", { class: "setting" }, el("label", { for: id(name) }, label), field, trouble);
  }
}

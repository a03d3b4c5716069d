// Pieces of the conversation's view that know nothing of the rest of it.

import { el, plural } from "./dom.js";

/** What stands where no conversation is yet. */
export function welcome({ examples, columns, votes }, use) {
  const cards = examples.map((example) =>
    el(
      "button",
      { type: "button", class: "example", onclick: () => use(example) },
      el(
        "span",
        { class: "pictures" },
        example.pictures.map((picture) => el("img", { src: picture.url, alt: "" })),
      ),
      el("span", {}, example.text ? marked(example.text, example.pictures.length) : "These pictures"),
    ),
  );
  return el(
    "div",
    { class: "welcome" },
    el("h2", {}, columns.length > 1 ? "Two answers, side by side" : "What do you see?"),
    el(
      "p",
      {},
      votes
        ? "Paste, drop or choose pictures, and ask."
        : "Paste, drop or choose pictures, and ask. What is said here is forgotten when you leave, unless you export it.",
    ),
    cards.length ? el("div", { class: "examples", role: "group", "aria-label": "Examples" }, cards) : null,
  );
}

/** A question's text with a mark wherever a picture stands in it. */
export function marked(text, pictures) {
  if (!pictures) return text;
  return text
    .split("<image>")
    .flatMap((words, i) => (i ? [el("span", { class: "place" }, `picture ${i}`), words] : [words]));
}

/** Let a button wait until a time, in milliseconds since 1970, and say so. */
export function countDown(button, until) {
  const tick = () => {
    const left = Math.ceil((until - Date.now()) / 1000);
    button.textContent = left > 0 ? `Try again (in ${left} s)` : "Try again";
    button.disabled = left > 0;
    if (left > 0) setTimeout(tick, 250);
  };
  tick();
}

/**
 * A box to change what was written: `draft.text` follows what is typed, so that drawing anew loses nothing.
 * `save` gives null, or what is wrong; `above` stands over the box, `hint` beside the buttons.
 */
export function editor({ label, draft, words, save, cancel, above = null, hint = "" }) {
  const field = el("textarea", {
    value: draft.text,
    rows: Math.min(12, draft.text.split("\n").length + 1),
    "aria-label": label,
  });
  const trouble = el("p", { class: "trouble", role: "alert" });
  const done = () => {
    const problem = field.value.trim() ? save(field.value) : "There is nothing in it.";
    trouble.textContent = problem ?? "";
  };
  field.addEventListener("input", () => {
    draft.text = field.value;
  });
  field.addEventListener("keydown", (event) => {
    if (event.isComposing || event.keyCode === 229 || event.key !== "Enter" || !(event.ctrlKey || event.metaKey))
      return;
    event.preventDefault();
    done();
  });
  return el(
    "div",
    { class: "editing" },
    above,
    field,
    trouble,
    el(
      "div",
      { class: "buttons" },
      hint ? el("small", {}, hint) : null,
      el("button", { type: "button", onclick: cancel }, "Cancel"),
      el("button", { type: "button", class: "strong", onclick: done }, words),
    ),
  );
}

/** Tokens and their rate, and in the tooltip how the answer was asked for. */
export function figures(version) {
  const said = [];
  if (version.edited) said.push("edited");
  if (version.tokens !== null) said.push(plural(version.tokens, "token"));
  if (version.rate !== null) said.push(`${version.rate.toFixed(version.rate < 100 ? 1 : 0)} tokens/s`);
  const { settings } = version;
  const more = [];
  if (version.promptTokens !== null) more.push(`question and history: ${plural(version.promptTokens, "token")}`);
  if (version.firstSeconds !== null) more.push(`first word after ${version.firstSeconds.toFixed(2)} s`);
  if (settings)
    more.push(
      `temperature ${settings.temperature}`,
      `top-p ${settings.top_p}`,
      settings.seed === null ? "no seed" : `seed ${settings.seed}`,
    );
  return el("span", { class: "figures", title: more.join("\n") }, said.join(" · "));
}

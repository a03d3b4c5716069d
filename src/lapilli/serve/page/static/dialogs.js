// Questions to the user, and short notes with an undo.

import { byId, el, iconButton } from "./dom.js";

/** Show a dialog; resolves to what `close(value)` was given, or null when it was left by Escape. */
export function dialog(title, build, { wide = false } = {}) {
  return new Promise((resolve) => {
    let value = null;
    const box = el("dialog", { class: wide ? "ask wide-dialog" : "ask", "aria-label": title });
    const close = (given = null) => {
      value = given;
      box.close();
    };
    box.append(
      el(
        "header",
        {},
        el("h2", {}, title),
        iconButton("close", "Close", () => close()),
      ),
      el("div", { class: "ask-body" }, build(close)),
    );
    box.addEventListener("close", () => {
      box.remove();
      resolve(value);
    });
    document.body.append(box);
    box.showModal();
    box.querySelector("[autofocus]")?.focus();
  });
}

export function askKey(wrong) {
  return dialog("API key", (close) => {
    const field = el("input", { type: "password", id: "key", autocomplete: "off", autofocus: true, required: true });
    const trouble = el("p", { class: "trouble", role: "alert" }, wrong ? "The server does not take this key." : "");
    const submit = (event) => {
      event.preventDefault();
      const key = field.value.trim();
      if (/^[\x21-\x7e]+$/.test(key)) close(key);
      else trouble.textContent = "A key is made of letters, digits and signs, without spaces.";
    };
    return el(
      "form",
      { onsubmit: submit },
      el(
        "p",
        {},
        "This server answers to those who have a key. It is kept in this tab until you close it, and sent to this server only.",
      ),
      el("label", { for: "key" }, "Key"),
      field,
      trouble,
      el("div", { class: "buttons" }, el("button", { type: "submit", class: "strong" }, "Use this key")),
    );
  });
}

/** Choose among [label, value, strong?]. */
export function choose(title, words, options) {
  return dialog(title, (close) => [
    el("p", {}, words),
    el(
      "div",
      { class: "buttons" },
      options.map(([label, value, strong]) =>
        el("button", { type: "button", class: strong ? "strong" : "", onclick: () => close(value) }, label),
      ),
    ),
  ]);
}

/** Have the files chosen that an imported conversation names by path. */
export function findFiles(names) {
  return dialog("Pictures of this conversation", (close) => {
    const field = el("input", {
      type: "file",
      id: "picture-files",
      accept: "image/*",
      multiple: true,
      onchange: () => close([...field.files]),
    });
    return [
      el(
        "p",
        {},
        `The file names ${names.length === 1 ? "a picture" : `${names.length} pictures`} on a disk. A page can't open files by itself: please choose`,
      ),
      el(
        "ul",
        {},
        names.slice(0, 20).map((name) => el("li", {}, el("code", {}, name))),
      ),
      names.length > 20 ? el("p", {}, `and ${names.length - 20} more`) : null,
      el("label", { for: "picture-files" }, "Picture files"),
      field,
    ];
  });
}

export function shortcuts() {
  const modifier = /Mac|iP/.test(navigator.platform) ? "⌘" : "Ctrl";
  const keys = [
    [["Enter"], "send the question (on a touch screen: a new line)"],
    [["Shift", "Enter"], "a new line"],
    [["Escape"], "stop the answer, or close what is open"],
    [["↑"], "in an empty box: edit the last question"],
    [[modifier, "Enter"], "while editing: save"],
    [["Alt", "←"], "on a picture: move it forward; → back"],
    [["Delete"], "on a picture: take it out"],
    [[modifier, "V"], "in the box: paste pictures"],
    [[modifier, "/"], "this list"],
  ];
  return dialog("Keyboard", () =>
    el(
      "dl",
      { class: "keys" },
      keys.map(([names, what]) => [
        el(
          "dt",
          {},
          names.map((name) => el("kbd", {}, name)),
        ),
        el("dd", {}, what),
      ]),
    ),
  );
}

/** A note at the page's foot that goes by itself; with `undo`, a button that takes back what was done. */
export function note(text, { undo = null, bad = false } = {}) {
  const made = el("div", { class: bad ? "toast bad" : "toast", role: bad ? "alert" : "status" }, el("span", {}, text));
  if (undo) {
    const back = el("button", { type: "button", onclick: () => (undo(), made.remove()) }, "Undo");
    made.append(back);
  }
  made.append(iconButton("close", "Dismiss", () => made.remove()));
  byId("toasts").append(made);
  while (byId("toasts").children.length > 3) byId("toasts").firstChild.remove();
  setTimeout(() => made.remove(), undo || bad ? 12000 : 5000);
}

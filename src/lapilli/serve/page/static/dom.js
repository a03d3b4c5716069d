// Small helpers to build the page from DOM nodes. Text always becomes text nodes: nothing here parses markup, so
// whatever a model or a file says can't become part of the page.

const SVG = "http://www.w3.org/2000/svg";

// Strokes on a 24 x 24 grid.
const ICONS = {
  add: "M12 5v14M5 12h14",
  bad: "M7 4h9l3 7v3h-6l1 5-2 1-5-7V4M4 4v9",
  check: "M5 13l4 4L19 7",
  close: "M6 6l12 12M18 6L6 18",
  columns: "M4 5h16v14H4zM12 5v14",
  copy: "M9 9h10v11H9zM5 15V4h10",
  down: "M12 5v14M6 13l6 6 6-6",
  edit: "M4 20l1-5L16 4l4 4L9 19zM14 6l4 4",
  flag: "M6 21V4h12l-3 4 3 4H6",
  good: "M7 20h9l3-7v-3h-6l1-5-2-1-5 7v9M4 20v-9",
  image: "M4 5h16v14H4zM4 16l5-5 4 4 3-3 4 4M15 9h.01",
  more: "M5 11v2M12 11v2M19 11v2",
  next: "M9 5l7 7-7 7",
  previous: "M15 5l-7 7 7 7",
  redo: "M19 12a7 7 0 1 1-2-5l2 2M19 4v5h-5",
  send: "M12 20V5M5 12l7-7 7 7",
  sliders: "M4 7h9M17 7h3M4 17h3M11 17h9M15 5v4M9 15v4",
  stop: "M7 7h10v10H7z",
  trash: "M5 7h14M9 7V4h6v3M7 7l1 13h8l1-13",
  warning: "M12 4l9 16H3zM12 10v4M12 17h.01",
};

/** An element with properties, attributes (`aria-…`, `data-…`, `role`) and listeners (`onclick`), and its children. */
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name === "class") made.className = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name.includes("-") || name === "role" || name === "for") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

/** A drawing that says nothing to a screen reader. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** A button that shows an icon alone; `label` is its name and its tooltip. */
export function iconButton(name, label, onclick, properties = {}) {
  const { class: more = "", ...rest } = properties;
  return el(
    "button",
    { type: "button", class: `icon ${more}`, title: label, "aria-label": label, onclick, ...rest },
    icon(name),
  );
}

export const byId = (id) => document.getElementById(id);

/** Put a text on the clipboard; true if the browser let us. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Pages that are not on https or localhost have no clipboard of this kind.
    const box = el("textarea", { value: text, class: "visually-hidden", readOnly: true });
    document.body.append(box);
    box.select();
    const done = document.execCommand("copy");
    box.remove();
    return done;
  }
}

/** A copy button that says for a moment that it has worked. `text` is called when it is pressed. */
export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    const done = await copyText(text());
    button.replaceChildren(icon(done ? "check" : "close"));
    say(done ? "Copied" : "This browser does not let the page copy");
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

/** Make a screen reader say something. */
export function say(text) {
  byId("said").textContent = "";
  requestAnimationFrame(() => {
    byId("said").textContent = text;
  });
}

/** `plural(3, "picture")` is "3 pictures". */
export const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

/** Bytes as people say them: 1.2 MB. */
export function size(bytes) {
  if (bytes < 1000) return `${bytes} bytes`;
  if (bytes < 1e6) return `${Math.round(bytes / 1e3)} kB`;
  return `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;
}

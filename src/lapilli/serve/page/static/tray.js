// Pictures that wait for a question: thumbnails that can be taken out, moved and, where they are too large, made smaller.

import { el, iconButton, plural, say, size } from "./dom.js";
import { dialog } from "./dialogs.js";
import { readPicture, scaleDown } from "./pictures.js";

export class Tray {
  /** `limits()` are the server's; `changed` is called after every change. */
  constructor(list, limits, changed) {
    this.list = list;
    this.limits = limits;
    this.changed = changed;
    this.pictures = [];
    this.dragged = null;
    this.reading = 0;
  }

  /** Read files; resolves when all of them are shown. */
  async add(files) {
    this.reading++;
    try {
      const read = await Promise.all(files.map((file) => readPicture(file, this.limits())));
      this.pictures.push(...read);
      say(`${plural(read.length, "picture")} added`);
    } finally {
      this.reading--;
      this.draw();
    }
  }

  set(pictures) {
    this.pictures = [...pictures];
    this.draw();
  }

  /** Why these pictures can't be sent, or null. */
  get problem() {
    const bad = this.pictures.find((picture) => picture.problem);
    return bad ? `“${bad.name}” can't be sent: ${bad.problem}.` : null;
  }

  draw(focus = null) {
    this.list.hidden = this.pictures.length === 0;
    this.list.replaceChildren(...this.pictures.map((picture, i) => this.#item(picture, i)));
    if (focus !== null) this.list.children[Math.min(focus, this.pictures.length - 1)]?.focus();
    this.changed();
  }

  #item(picture, i) {
    const described = picture.width
      ? `${picture.name}, ${picture.width} × ${picture.height}, ${size(picture.bytes)}`
      : picture.name;
    const whole = picture.scaled ? `${described}; scaled down from ${picture.scaled}` : described;
    const item = el("li", {
      class: picture.problem ? "thumb bad" : "thumb",
      tabIndex: 0,
      draggable: true,
      "aria-label": `Picture ${i + 1}: ${whole}${picture.problem ? `. Can't be sent: ${picture.problem}` : ""}`,
    });
    item.append(
      picture.url
        ? el(
            "button",
            {
              type: "button",
              class: "look",
              title: whole,
              "aria-label": `Look at ${picture.name}`,
              onclick: () => look(picture),
            },
            el("img", { src: picture.url, alt: "" }),
          )
        : el("span", { class: "look" }, "?"),
      iconButton("close", `Take out ${picture.name}`, () => this.#remove(i), { class: "out" }),
    );
    if (picture.scaled) item.append(el("small", {}, `scaled to ${picture.width} × ${picture.height}`));
    if (picture.problem) {
      item.append(el("small", { class: "trouble" }, picture.problem));
      if (picture.canScale)
        item.append(el("button", { type: "button", onclick: () => this.#scale(picture) }, "Scale down"));
    }
    item.addEventListener("keydown", (event) => this.#key(event, item, i));
    item.addEventListener("dragstart", (event) => {
      this.dragged = i;
      event.dataTransfer.setData("text/x-lapilli-picture", String(i));
      event.dataTransfer.effectAllowed = "move";
    });
    item.addEventListener("dragend", () => {
      this.dragged = null;
    });
    item.addEventListener("dragover", (event) => this.dragged !== null && event.preventDefault());
    item.addEventListener("drop", (event) => {
      if (this.dragged === null) return;
      event.preventDefault();
      event.stopPropagation();
      this.#move(this.dragged, i);
      this.dragged = null;
    });
    return item;
  }

  #key(event, item, i) {
    if (event.target !== item) return;
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Delete" || event.key === "Backspace") this.#remove(i);
    else if (step && event.altKey) this.#move(i, i + step);
    else if (step) this.list.children[i + step]?.focus();
    else return;
    event.preventDefault();
  }

  #remove(i) {
    const [gone] = this.pictures.splice(i, 1);
    say(`${gone.name} taken out`);
    this.draw(i);
  }

  #move(from, to) {
    if (to < 0 || to >= this.pictures.length) return;
    this.pictures.splice(to, 0, ...this.pictures.splice(from, 1));
    say(`now picture ${to + 1}`);
    this.draw(to);
  }

  async #scale(picture) {
    let smaller;
    try {
      smaller = await scaleDown(picture, this.limits());
    } catch (error) {
      smaller = {
        ...picture,
        canScale: false,
        problem: `${picture.problem}; scaling it down failed (${error.message})`,
      };
    }
    const i = this.pictures.indexOf(picture);
    if (i < 0) return; // taken out in the meantime
    this.pictures[i] = smaller;
    this.draw(i);
  }
}

/** A picture in full. */
export function look(picture) {
  return dialog(
    `${picture.name} · ${picture.width} × ${picture.height} · ${size(picture.bytes)}`,
    () => el("img", { class: "full", src: picture.url, alt: picture.name }),
    { wide: true },
  );
}

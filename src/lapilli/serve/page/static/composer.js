// The box in which a question is written: text, pictures by choice, paste and drop, and the keys that send it.

import { misplaced } from "./conversation.js";
import { byId, icon } from "./dom.js";
import { note } from "./dialogs.js";
import { filesIn } from "./pictures.js";
import { recall, remember } from "./store.js";
import { Tray } from "./tray.js";

const touch = matchMedia("(hover: none) and (pointer: coarse)");

export class Composer {
  /**
   * `limits()` are the server's, `check(text, pictures)` gives a reason why the conversation can't take a question, or
   * null; `send(text, pictures)`, `stop()`, `editLast()` and `openFile(file)` carry out what the user asks for.
   */
  constructor({ limits, check, send, stop, editLast, openFile }) {
    Object.assign(this, { check, onSend: send, editLast, openFile });
    this.running = false;
    this.field = byId("question");
    this.tray = new Tray(byId("tray"), limits, () => this.update());
    byId("attach").prepend(icon("image"));
    byId("send").append(icon("send"));
    byId("stop").append(icon("stop"));
    this.field.value = recall("draft") ?? "";
    this.field.addEventListener("input", () => this.#typed());
    this.field.addEventListener("keydown", (event) => this.#key(event));
    this.field.addEventListener("paste", (event) => this.#paste(event));
    byId("composer").addEventListener("submit", (event) => (event.preventDefault(), this.send()));
    byId("stop").addEventListener("click", () => (stop(), this.field.focus()));
    byId("files").addEventListener("change", async (event) => {
      const files = [...event.target.files];
      event.target.value = "";
      await this.tray.add(files);
      this.field.focus();
    });
    this.#takeDrops();
    this.update();
  }

  /** Put a question into the box, in place of what is there. */
  fill(text, pictures) {
    this.field.value = text;
    this.tray.set(pictures);
    this.#typed();
    this.field.focus();
  }

  get text() {
    return this.field.value;
  }

  send() {
    const problem = this.running ? "An answer is under way; Escape stops it." : this.problem();
    if (problem || !this.field.value.trim()) {
      byId("composer-note").textContent =
        problem ?? (this.tray.pictures.length ? "Write a question about the pictures." : "");
      byId("composer-note").classList.toggle("trouble", Boolean(problem));
      this.field.focus();
      return;
    }
    const [text, pictures] = [this.field.value, this.tray.pictures];
    this.fill("", []);
    this.onSend(text, pictures);
  }

  problem() {
    const { pictures, problem, reading } = this.tray;
    if (reading) return "The pictures are still being read.";
    return problem ?? misplaced(this.field.value, pictures.length) ?? this.check(this.field.value, pictures);
  }

  setRunning(running) {
    this.running = running;
    const focused = document.activeElement === byId("stop") || document.activeElement === byId("send");
    byId("send").hidden = running;
    byId("stop").hidden = !running;
    if (focused) this.field.focus();
    this.update();
  }

  /** Say what stands in the way, and fit the box to its text. */
  update() {
    const problem = this.tray.pictures.length || this.field.value ? this.problem() : null;
    byId("composer-note").textContent = problem ?? "";
    byId("composer-note").classList.toggle("trouble", Boolean(problem));
    byId("send").disabled = !this.field.value.trim() && !this.tray.pictures.length;
    this.field.style.height = "auto";
    this.field.style.height = `${Math.min(this.field.scrollHeight, innerHeight * 0.4)}px`;
  }

  #typed() {
    remember("draft", this.field.value);
    this.update();
  }

  #key(event) {
    // While Korean, Chinese or Japanese is being composed, Enter chooses a syllable; Safari tells by code 229 only.
    if (event.isComposing || event.keyCode === 229) return;
    if (
      event.key === "Enter" &&
      !event.shiftKey &&
      !event.altKey &&
      (!touch.matches || event.ctrlKey || event.metaKey)
    ) {
      event.preventDefault();
      this.send();
    } else if (event.key === "ArrowUp" && !this.field.value && !this.tray.pictures.length && this.editLast()) {
      event.preventDefault();
    }
  }

  #paste(event) {
    const files = filesIn(event.clipboardData);
    if (!files.length || event.clipboardData.types.includes("text/plain")) return; // a cell of a table comes as both
    event.preventDefault();
    this.tray.add(files);
  }

  #takeDrops() {
    let depth = 0;
    const carries = (event) =>
      !event.dataTransfer?.types.includes("text/x-lapilli-picture") &&
      ["Files", "text/uri-list"].some((type) => event.dataTransfer?.types.includes(type));
    const shade = (on) => {
      depth = on ? depth : 0;
      byId("drop").hidden = !on;
    };
    addEventListener("dragenter", (event) => carries(event) && (depth++, shade(true)));
    addEventListener("dragleave", (event) => carries(event) && --depth <= 0 && shade(false));
    addEventListener("dragover", (event) => carries(event) && event.preventDefault());
    addEventListener("drop", (event) => {
      shade(false);
      if (!carries(event)) return;
      event.preventDefault();
      if (document.querySelector("dialog:modal")) return;
      const files = filesIn(event.dataTransfer);
      const saved = files.find((file) => file.name.toLowerCase().endsWith(".json"));
      if (saved) this.openFile(saved);
      else if (files.length) this.tray.add(files).then(() => this.field.focus());
      else
        note("That is a link, and this page loads nothing from elsewhere: save the picture and drop the file.", {
          bad: true,
        });
    });
  }
}

// The page: brings conversation, settings and views together, and carries out what the buttons ask for.

import { answer, requestOf } from "./answering.js";
import { Api } from "./api.js";
import { Composer } from "./composer.js";
import { Conversation, misplaced, newVersion } from "./conversation.js";
import { askKey, choose, findFiles, note, shortcuts } from "./dialogs.js";
import { byId, el, iconButton, plural, say, size } from "./dom.js";
import * as files from "./files.js";
import { Panel, SIDES } from "./panel.js";
import { readPicture } from "./pictures.js";
import { Thread } from "./thread.js";

const IDLE = { "data-idle": "", disabled: true }; // buttons that wait until nothing is under way
const OVERHEAD = 20_000; // bytes of a request beside its messages, generously

class Page {
  constructor() {
    this.api = new Api(askKey);
    this.conversation = new Conversation();
    this.settings = null;
    this.examples = [];
    this.asking = new Set(); // controllers of answers under way
    this.exported = true;
    this.panel = new Panel(() => this.composer?.update());
    this.thread = new Thread(this, () => this.state());
    this.composer = new Composer({
      limits: () => this.settings,
      check: (text, pictures) => this.check(text, pictures),
      send: (text, pictures) => this.ask(text, pictures),
      stop: () => this.stop(),
      editLast: () => this.editLast(),
      openFile: (file) => this.importFile(file),
    });
    this.#toolbar();
    addEventListener("keydown", (event) => this.#key(event));
    addEventListener("beforeunload", (event) => {
      if (!this.exported && !this.conversation.empty) event.preventDefault();
    });
  }

  state() {
    const { conversation, examples } = this;
    return { conversation, examples, columns: this.panel.columns, running: this.asking.size > 0, votes: Boolean(this.settings?.votes) };
  }

  /** Ask the server what it serves; until it answers, only the box for the question works. */
  async start() {
    try {
      this.settings = await this.api.settings();
    } catch (problem) {
      const again = el("button", { type: "button", onclick: () => (again.disabled = true, this.start()) }, "Try again");
      byId("thread").replaceChildren(el("div", { class: "welcome" }, el("div", { class: "problem" }, el("div", {}, el("strong", {}, problem.message), el("p", {}, problem.detail ?? "")), again)));
      return;
    }
    this.panel.setLimits(this.settings, new URLSearchParams(location.search).get("model"));
    byId("kept").textContent = this.settings.votes ? "This server keeps questions, answers and votes." : "";
    this.#showColumns();
    this.#running();
    document.documentElement.dataset.ready = "true";
    this.examples = await this.#openExamples();
    if (this.conversation.empty) this.thread.draw();
  }

  async #openExamples() {
    const open = async (path, i) => {
      const blob = await this.api.picture(path);
      return readPicture(new File([blob], `example ${i + 1}`, { type: blob.type }), this.settings);
    };
    const opened = await Promise.allSettled(this.settings.examples.map(async ({ text, images }) => ({ text, pictures: await Promise.all(images.map(open)) })));
    const lost = opened.filter((one) => one.status === "rejected").length;
    if (lost) note(`${plural(lost, "example")} can't be shown: ${opened.find((one) => one.reason).reason.message}`, { bad: true });
    return opened.filter((one) => one.status === "fulfilled").map((one) => one.value);
  }

  // --- asking -------------------------------------------------------------------------------------------------------

  /** Why a question can't be asked at `index` (by default: next), or null. */
  check(text, pictures, index = this.conversation.exchanges.length) {
    const { settings, conversation } = this;
    if (!settings) return "The server has not said yet what it serves.";
    if (!settings.models.length) return "The server serves no model at the moment.";
    for (const column of this.panel.columns.keys()) {
      const before = conversation.said(column, index).flatMap((exchange) => exchange.pictures);
      const count = before.length + pictures.length;
      if (count > settings.images) {
        const all = before.length ? `This conversation would hold ${plural(count, "picture")}` : plural(count, "picture");
        return `${all}; this server takes ${settings.images} in a request.`;
      }
      const said = conversation.said(column, index).reduce((sum, one) => sum + one.text.length + conversation.version(one, column).text.length, 0);
      const bytes = [...before, ...pictures].reduce((sum, picture) => sum + picture.url.length, 0) + 4 * (said + text.length) + OVERHEAD;
      if (bytes > settings.body_bytes && count) {
        return `With its pictures this is about ${size(bytes)}; this server takes ${size(settings.body_bytes)} in a request. Scale pictures down, or begin a new conversation.`;
      }
    }
    return null;
  }

  ask(text, pictures) {
    this.conversation.add(text, pictures, this.panel.columns.length);
    this.thread.follows = true;
    return this.#answerAll(this.conversation.exchanges.length - 1, [...this.panel.columns.keys()]);
  }

  /** Ask an earlier question in other words; null, or why it can't be asked. */
  askEdited(index, text, pictures) {
    const problem = misplaced(text, pictures.length) ?? this.check(text, pictures, index);
    if (problem) return problem;
    this.thread.editing = null;
    this.#cut(index + 1);
    this.conversation.exchanges.length = index;
    this.ask(text, pictures);
    return null;
  }

  /** Another answer to a question; what came after it leaves the conversation. */
  again(index, column) {
    this.#cut(index + 1);
    const settings = this.panel.columns[column];
    if (settings.temperature === 0) note("At temperature 0 the same question gets the same answer.");
    return this.#answerAll(index, [column], true);
  }

  /** Ask again what failed, in its place. */
  retry(index, column) {
    this.#cut(index + 1);
    const answers = this.conversation.answers(this.conversation.exchanges[index], column);
    answers.versions.splice(answers.shown, 1);
    answers.shown = Math.max(0, answers.versions.length - 1);
    return this.#answerAll(index, [column]);
  }

  /** Let the conversation end before exchange `end`; the user can take that back. */
  #cut(end) {
    const later = this.conversation.exchanges.length - end;
    if (later < 1) return;
    const undo = this.#undoable();
    this.conversation.exchanges.length = end;
    note(`${plural(later, "later question")} left the conversation`, { undo: undo.back });
  }

  async #answerAll(index, columns, repeated = false) {
    const exchange = this.conversation.exchanges[index];
    this.exported = false;
    const jobs = columns.map((column) => {
      const answers = this.conversation.answers(exchange, column);
      const settings = { ...this.panel.columns[column] };
      const messages = this.conversation.messages(column, index, settings.system);
      const body = requestOf(settings, messages, repeated ? answers.versions.length : 0);
      const version = newVersion({ ...settings, seed: body.seed ?? null });
      answers.shown = answers.versions.push(version) - 1;
      return { column, version, body };
    });
    const controller = new AbortController();
    this.asking.add(controller);
    this.#running();
    await Promise.all(jobs.map(({ version, body }) => answer(this.api, version, body, controller.signal, () => this.thread.grow(version))));
    this.asking.delete(controller);
    this.#running();
    for (const { column, version } of jobs) this.#finished(exchange, index, column, version, jobs.length > 1);
  }

  #running() {
    this.composer.setRunning(this.asking.size > 0);
    this.thread.draw();
    for (const button of document.querySelectorAll("[data-idle]")) button.disabled = this.asking.size > 0;
  }

  #finished(exchange, index, column, version, named) {
    const who = named ? `${SIDES[column]}: ` : "";
    const outcome = { done: version.text || "The model said nothing.", stopped: "Stopped.", failed: `${version.problem?.message} ${version.problem?.detail ?? ""}` }[version.state];
    say(who + outcome);
    if (!this.settings.votes || version.state !== "done" || !version.text) return;
    const { model, temperature, top_p, max_tokens, system } = version.settings;
    const messages = this.conversation.messages(column, index, system, true);
    const turn = { id: this.conversation.id, model, start: version.begun / 1000, finish: version.ended / 1000, messages, temperature, top_p, max_tokens };
    this.#keep("/page/turns", turn, "The server could not keep this turn");
  }

  stop() {
    for (const controller of this.asking) controller.abort();
  }

  // --- changing what was said ---------------------------------------------------------------------------------------

  #undoable() {
    const before = this.conversation.snapshot();
    return {
      exchanges: before.exchanges.length,
      back: () => {
        if (this.asking.size) {
          note("An answer is under way; stop it first.", { bad: true });
          return;
        }
        this.conversation.restore(before);
        this.exported = false;
        this.thread.draw();
      },
    };
  }

  remove(index) {
    const undo = this.#undoable();
    this.conversation.exchanges.splice(index, 1);
    this.thread.draw();
    note("Question deleted", { undo: undo.back });
  }

  clear() {
    if (this.conversation.empty) return;
    const undo = this.#undoable();
    this.conversation.clear();
    this.thread.editing = null;
    this.exported = true;
    this.thread.draw();
    byId("question").focus();
    note("New conversation", { undo: undo.back });
  }

  editLast() {
    const last = this.conversation.exchanges.at(-1);
    if (!last || this.asking.size) return false;
    this.thread.edit(last);
    return true;
  }

  saveAnswer(version, text) {
    if (text !== version.text) Object.assign(version, { text, edited: true, vote: null });
    this.exported = false;
    this.thread.stopEditing();
    return null;
  }

  showVersion(index, column, shown) {
    this.conversation.answers(this.conversation.exchanges[index], column).shown = shown;
    this.exported = false;
    this.thread.draw();
  }

  useExample({ text, pictures }) {
    this.composer.fill(text, pictures);
  }

  // --- votes --------------------------------------------------------------------------------------------------------

  async vote(version, index, column, type) {
    const { model, system } = version.settings;
    const messages = this.conversation.messages(column, index, system, true);
    version.vote = type;
    this.thread.draw();
    const kept = await this.#keep("/page/votes", { type, id: this.conversation.id, model, messages }, "The vote was not kept");
    if (kept) say("Thank you");
    else version.vote = null;
    this.thread.draw();
  }

  voteBoth(index, left, right) {
    const exchange = this.conversation.exchanges[index];
    [left, right].forEach((type, column) => this.vote(this.conversation.version(exchange, column), index, column, type));
  }

  async #keep(path, body, failed) {
    try {
      await this.api.keep(path, body);
      return true;
    } catch (problem) {
      note(`${failed}: ${problem.message} ${problem.detail ?? ""}`, { bad: true });
      return false;
    }
  }

  // --- two columns, files, keys -------------------------------------------------------------------------------------

  async compare() {
    if (this.panel.columns.length === 1) this.panel.setCount(2);
    else {
      const apart = this.conversation.exchanges.some((exchange) => exchange.answers.length > 1);
      const keep = apart ? await choose("Back to one column", "Which of the two conversations goes on?", [["Left", 0, true], ["Right", 1, true]]) : 0;
      if (keep === null) return;
      const undo = this.#undoable();
      const other = this.panel.columns[1 - keep];
      this.conversation.keepColumn(keep);
      this.panel.columns = [this.panel.columns[keep]];
      this.panel.setCount(1);
      if (apart) note(`The ${SIDES[1 - keep].toLowerCase()} column is gone`, { undo: () => (this.panel.columns.splice(1 - keep, 0, other), this.panel.draw(), undo.back(), this.#showColumns()) });
    }
    this.#showColumns();
    this.thread.draw();
  }

  #showColumns() {
    const two = this.panel.columns.length > 1;
    document.documentElement.dataset.columns = two ? "2" : "1";
    byId("compare").setAttribute("aria-pressed", String(two));
  }

  async exportFile() {
    let column = 0;
    if (this.conversation.exchanges.some((exchange) => exchange.answers.length > 1)) {
      column = await choose("Export", "Which of the two conversations?", [["Left", 0, true], ["Right", 1, true]]);
      if (column === null) return;
    }
    const said = this.conversation.said(column).length;
    if (!said) {
      note("Nothing to export yet: no question was answered.", { bad: true });
      return;
    }
    const text = files.write(this.conversation, column, this.panel.columns[column].system);
    const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    const stamp = new Date().toISOString().slice(0, 16).replace(/[:T]/g, "-");
    el("a", { href: url, download: `conversation-${stamp}.json` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
    this.exported = true;
    const left = this.conversation.exchanges.length - said;
    note(`Exported ${plural(said, "question")} with ${said === 1 ? "its answer" : "their answers"}${left ? `; ${plural(left, "question")} without an answer left out` : ""}.`);
  }

  chooseFile() {
    const field = el("input", { type: "file", accept: ".json,application/json", id: "import-file", hidden: true });
    field.addEventListener("change", () => (this.importFile(field.files[0]), field.remove()));
    document.body.append(field);
    field.click();
  }

  async importFile(file) {
    if (this.asking.size) {
      note("An answer is under way; stop it first.", { bad: true });
      return;
    }
    let opened;
    try {
      opened = await files.read(await file.text(), this.settings, findFiles);
    } catch (problem) {
      note(`${file.name}: ${problem instanceof files.FileProblem ? problem.message : `can't be read (${problem.message})`}`, { bad: true });
      return;
    }
    const undo = this.#undoable();
    this.conversation.clear();
    for (const { text, pictures, answer: words } of opened.exchanges) {
      const exchange = this.conversation.add(text, pictures, 1);
      exchange.answers[0].versions.push({ ...newVersion(null), state: "done", text: words });
    }
    for (const column of this.panel.columns) column.system = opened.system;
    this.panel.draw();
    this.exported = true;
    this.thread.follows = true;
    this.thread.draw();
    note(`${file.name}: ${plural(opened.exchanges.length, "question")}${opened.system ? ", and a system prompt" : ""}`, undo.exchanges ? { undo: undo.back } : {});
  }

  #toolbar() {
    const menu = byId("menu");
    const entry = (label, action, more = {}) => el("button", { type: "button", onclick: () => (menu.hidePopover(), action()), ...more }, label);
    const themes = ["system", "light", "dark"].map((theme) => {
      const choice = el("input", { type: "radio", name: "theme", value: theme, checked: window.lapilliTheme.get() === theme, onchange: () => window.lapilliTheme.set(theme) });
      return el("label", {}, choice, theme[0].toUpperCase() + theme.slice(1));
    });
    menu.append(
      entry("Export conversation", () => this.exportFile(), IDLE),
      entry("Import conversation", () => this.chooseFile(), IDLE),
      entry("Keyboard", () => shortcuts()),
      el("fieldset", { class: "themes" }, el("legend", {}, "Colours"), themes),
    );
    const more = iconButton("more", "More", undefined, { id: "more" });
    more.popoverTargetElement = menu;
    byId("tools").append(
      iconButton("add", "New conversation", () => this.clear(), IDLE),
      iconButton("columns", "Side by side", () => this.compare(), { id: "compare", "aria-pressed": "false", ...IDLE }),
      iconButton("sliders", "Settings", () => this.settings && this.panel.toggle(), { id: "settings" }),
      more,
    );
  }

  #key(event) {
    if (event.isComposing || event.keyCode === 229) return;
    if ((event.ctrlKey || event.metaKey) && event.key === "/") {
      event.preventDefault();
      if (!document.querySelector("dialog:modal")) shortcuts();
    } else if (event.key === "Escape" && !document.querySelector("dialog:modal, :popover-open")) {
      if (this.thread.stopEditing()) event.preventDefault();
      else if (this.asking.size) this.stop();
      else if (this.panel.dialog.open) this.panel.close();
    }
  }
}

new Page().start();

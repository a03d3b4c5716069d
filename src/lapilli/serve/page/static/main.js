// The page: brings conversation, settings and views together, and carries out what the buttons ask for.

import { answer, requestOf } from "./answering.js";
import { Api } from "./api.js";
import { Composer } from "./composer.js";
import { Conversation, misplaced, newVersion } from "./conversation.js";
import { askKey, choose, note, shortcuts } from "./dialogs.js";
import { byId, el, plural, say, size } from "./dom.js";
import { openExamples } from "./examples.js";
import { Panel, SIDES } from "./panel.js";
import { importFile } from "./saving.js";
import { Thread } from "./thread.js";
import { makeToolbar } from "./toolbar.js";

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
      openFile: (file) => importFile(this, file),
    });
    makeToolbar(this);
    addEventListener("keydown", (event) => this.#key(event));
    addEventListener("beforeunload", (event) => {
      if (!this.exported && !this.conversation.empty) event.preventDefault();
    });
  }

  state() {
    const { conversation, examples } = this;
    return {
      conversation,
      examples,
      columns: this.panel.columns,
      running: this.asking.size > 0,
      votes: Boolean(this.settings?.votes),
    };
  }

  /** Ask the server what it serves; until it answers, only the box for the question works. */
  async start() {
    try {
      this.settings = await this.api.settings();
    } catch (problem) {
      const again = el(
        "button",
        { type: "button", onclick: () => ((again.disabled = true), this.start()) },
        "Try again",
      );
      byId("thread").replaceChildren(
        el(
          "div",
          { class: "welcome" },
          el(
            "div",
            { class: "problem" },
            el("div", {}, el("strong", {}, problem.message), el("p", {}, problem.detail ?? "")),
            again,
          ),
        ),
      );
      return;
    }
    const wanted = new URLSearchParams(location.search).get("model");
    this.panel.setLimits(this.settings, wanted);
    if (wanted && this.panel.columns[0].model !== wanted) note(`No model is called “${wanted}” here.`, { bad: true });
    byId("kept").textContent = this.settings.votes ? "This server keeps questions, answers and votes." : "";
    this.#showColumns();
    this.#running();
    document.documentElement.dataset.ready = "true";
    this.examples = await openExamples(this.api, this.settings);
    if (this.conversation.empty) this.thread.draw();
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
        const all = before.length
          ? `This conversation would hold ${plural(count, "picture")}`
          : plural(count, "picture");
        return `${all}; this server takes ${settings.images} in a request.`;
      }
      const said = conversation
        .said(column, index)
        .reduce((sum, one) => sum + one.text.length + conversation.version(one, column).text.length, 0);
      const bytes =
        [...before, ...pictures].reduce((sum, picture) => sum + picture.url.length, 0) +
        4 * (said + text.length) +
        OVERHEAD;
      if (bytes > settings.body_bytes) {
        return `With all that was said and its pictures this is about ${size(bytes)}; this server takes ${size(settings.body_bytes)} in a request. Scale pictures down, or begin a new conversation.`;
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
    const undo = this.undoable();
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
    await Promise.all(
      jobs.map(({ version, body }) =>
        answer(this.api, version, body, controller.signal, () => this.thread.grow(version)),
      ),
    );
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
    const outcome = {
      done: version.text || "The model said nothing.",
      stopped: "Stopped.",
      failed: `${version.problem?.message} ${version.problem?.detail ?? ""}`,
    }[version.state];
    say(who + outcome);
    if (!this.settings.votes || version.state !== "done" || !version.text) return;
    const { model, temperature, top_p, max_tokens, system } = version.settings;
    const messages = this.conversation.messages(column, index, system, true);
    const turn = {
      id: this.conversation.id,
      model,
      start: version.begun / 1000,
      finish: version.ended / 1000,
      messages,
      temperature,
      top_p,
      max_tokens,
    };
    this.#keep("/page/turns", turn, "The server could not keep this turn");
  }

  stop() {
    for (const controller of this.asking) controller.abort();
  }

  // --- changing what was said ---------------------------------------------------------------------------------------

  /** The conversation as it is now, and the way `back` to it. */
  undoable() {
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
    const undo = this.undoable();
    this.conversation.exchanges.splice(index, 1);
    this.exported = false;
    this.thread.draw();
    note("Question deleted", { undo: undo.back });
  }

  clear() {
    if (this.conversation.empty) return;
    const undo = this.undoable();
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
    const kept = await this.#keep(
      "/page/votes",
      { type, id: this.conversation.id, model, messages },
      "The vote was not kept",
    );
    if (kept) say("Thank you");
    else version.vote = null;
    this.thread.draw();
  }

  voteBoth(index, left, right) {
    const exchange = this.conversation.exchanges[index];
    [left, right].forEach((type, column) =>
      this.vote(this.conversation.version(exchange, column), index, column, type),
    );
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

  // --- two columns, keys --------------------------------------------------------------------------------------------

  async compare() {
    if (this.panel.columns.length === 1) this.panel.setCount(2);
    else {
      const apart = this.conversation.exchanges.some((exchange) => exchange.answers.length > 1);
      const keep = apart
        ? await choose("Back to one column", "Which of the two conversations goes on?", [
            ["Left", 0, true],
            ["Right", 1, true],
          ])
        : 0;
      if (keep === null) return;
      const undo = this.undoable();
      const other = this.panel.columns[1 - keep];
      this.conversation.keepColumn(keep);
      this.panel.columns = [this.panel.columns[keep]];
      this.panel.setCount(1);
      if (apart)
        note(`The ${SIDES[1 - keep].toLowerCase()} column is gone`, {
          undo: () => (
            this.panel.columns.splice(1 - keep, 0, other),
            this.panel.draw(),
            undo.back(),
            this.#showColumns()
          ),
        });
    }
    this.#showColumns();
    this.thread.draw();
  }

  #showColumns() {
    const two = this.panel.columns.length > 1;
    document.documentElement.dataset.columns = two ? "2" : "1";
    byId("compare").setAttribute("aria-pressed", String(two));
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

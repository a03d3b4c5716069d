// The conversation as it is seen: questions, and below each its answers in one column or two.

import { isRunning } from "./conversation.js";
import { byId, copyButton, el, icon, iconButton, plural } from "./dom.js";
import { show } from "./markdown.js";
import { SIDES } from "./panel.js";
import { look } from "./tray.js";

const VOTES = [["upvote", "good", "Good answer"], ["downvote", "bad", "Bad answer"], ["flag", "flag", "Flag this answer"]];

export class Thread {
  /** `actions` are what the buttons do; `page()` gives {conversation, columns, running, votes, examples}. */
  constructor(actions, page) {
    this.actions = actions;
    this.page = page;
    this.box = byId("thread");
    this.views = new Map(); // a version to what of its view changes while it grows
    this.waiting = new Set();
    this.editing = null;
    this.follows = true;
    this.scroller = byId("thread");
    const latest = byId("latest");
    latest.append(icon("down"));
    latest.addEventListener("click", () => this.toEnd());
    this.scroller.addEventListener("scroll", () => {
      const { scrollHeight, scrollTop, clientHeight } = this.scroller;
      this.follows = scrollHeight - scrollTop - clientHeight < 60;
      latest.hidden = this.follows;
    }, { passive: true });
    new ResizeObserver(() => this.follows && this.toEnd()).observe(this.scroller);
  }

  toEnd() {
    this.follows = true;
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  /** Draw everything anew. */
  draw() {
    const { conversation } = this.page();
    this.views.clear();
    const exchanges = conversation.exchanges.map((exchange, i) => this.#exchange(exchange, i));
    this.box.replaceChildren(...(exchanges.length ? exchanges : [this.#welcome()]));
    if (this.follows) this.toEnd();
  }

  /** Draw what has grown, with the next frame. */
  grow(version) {
    if (!this.waiting.size) {
      requestAnimationFrame(() => {
        const grown = [...this.waiting];
        this.waiting.clear();
        for (const one of grown) this.views.get(one)?.();
        if (this.follows) this.toEnd();
      });
    }
    this.waiting.add(version);
  }

  #welcome() {
    const { examples, columns } = this.page();
    const cards = examples.map((example) =>
      el("button", { type: "button", class: "example", onclick: () => this.actions.useExample(example) }, el("span", { class: "pictures" }, example.pictures.map((picture) => el("img", { src: picture.url, alt: "" }))), el("span", {}, example.text ? marked(example.text, example.pictures.length) : "These pictures")),
    );
    return el(
      "div",
      { class: "welcome" },
      el("h2", {}, columns.length > 1 ? "Two answers, side by side" : "What do you see?"),
      el("p", {}, "Paste, drop or choose pictures, and ask. What is said here is forgotten when you leave, unless you export it."),
      cards.length ? el("div", { class: "examples", role: "group", "aria-label": "Examples" }, cards) : null,
    );
  }

  #exchange(exchange, i) {
    const { conversation, columns } = this.page();
    const shared = exchange.answers.length === 1;
    const count = shared ? 1 : columns.length;
    const answers = Array.from({ length: count }, (_, column) => this.#answer(conversation, exchange, i, column, shared));
    const both = count > 1 ? this.#compare(exchange, i) : null;
    return el("article", { class: "exchange", "aria-label": `Question ${i + 1}` }, this.#question(exchange, i), el("div", { class: count > 1 ? "answers two" : "answers" }, answers), both);
  }

  #question(exchange, i) {
    const { running } = this.page();
    if (this.editing === exchange) return this.#editQuestion(exchange, i);
    return el(
      "div",
      { class: "question" },
      exchange.pictures.length ? el("div", { class: "pictures" }, exchange.pictures.map((picture) => el("button", { type: "button", class: "look", "aria-label": `Look at ${picture.name}`, title: picture.name, onclick: () => look(picture) }, el("img", { src: picture.url, alt: picture.name })))) : null,
      el(
        "div",
        { class: "line" },
        el(
          "div",
          { class: "tools" },
          copyButton("Copy the question", () => exchange.text),
          iconButton("edit", "Edit the question", () => this.edit(exchange), { disabled: running }),
          iconButton("trash", "Delete this question and its answer", () => this.actions.remove(i), { disabled: running }),
        ),
        el("p", { class: "asked" }, marked(exchange.text, exchange.pictures.length)),
      ),
    );
  }

  /** Open a question or an answer for editing. */
  edit(what) {
    this.editing = what;
    this.draw();
    const field = this.box.querySelector(".editing textarea");
    field?.focus();
    field?.setSelectionRange(field.value.length, field.value.length);
    field?.scrollIntoView({ block: "nearest" });
  }

  stopEditing() {
    if (!this.editing) return false;
    this.editing = null;
    this.draw();
    byId("question").focus();
    return true;
  }

  #editor(label, text, words, save, before = null, hint = "") {
    const field = el("textarea", { value: text, rows: Math.min(12, text.split("\n").length + 1), "aria-label": label });
    const trouble = el("p", { class: "trouble", role: "alert" });
    const done = () => {
      const problem = field.value.trim() ? save(field.value) : "There is nothing in it.";
      trouble.textContent = problem ?? "";
    };
    field.addEventListener("keydown", (event) => {
      if (event.isComposing || event.keyCode === 229 || event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      done();
    });
    return el("div", { class: "editing" }, before, field, trouble, el("div", { class: "buttons" }, hint ? el("small", {}, hint) : null, el("button", { type: "button", onclick: () => this.stopEditing() }, "Cancel"), el("button", { type: "button", class: "strong", onclick: done }, words)));
  }

  #editQuestion(exchange, i) {
    let pictures = [...exchange.pictures];
    const list = el("div", { class: "pictures" });
    const draw = () =>
      list.replaceChildren(...pictures.map((picture) => el("span", { class: "thumb" }, el("img", { src: picture.url, alt: picture.name }), iconButton("close", `Take out ${picture.name}`, () => ((pictures = pictures.filter((one) => one !== picture)), draw()), { class: "out" }))));
    draw();
    const later = this.page().conversation.exchanges.length - i - 1;
    const hint = later ? `The conversation goes on from here; ${plural(later, "later question")} ${later === 1 ? "goes" : "go"}.` : "";
    return this.#editor("Edited question", exchange.text, "Ask", (text) => this.actions.askEdited(i, text, pictures), list, hint);
  }

  #answer(conversation, exchange, i, column, shared) {
    const version = conversation.version(exchange, column);
    const { columns } = this.page();
    const box = el("section", { class: "answer", "aria-label": shared ? "Answer" : `${SIDES[column]} answer` });
    if (!version) return box;
    const side = shared ? "" : `${SIDES[column]} · `;
    const by = version.settings ? `${side}${version.settings.model}` : `${side}imported`;
    const thought = el("details", { class: "thought" }, el("summary", {}, "Thoughts"), el("div", { class: "prose" }));
    const text = el("div", { class: "prose" });
    const foot = el("div", { class: "foot" });
    box.append(el("p", { class: columns.length > 1 && !shared ? "by" : "by quiet" }, by), thought);
    if (this.editing === version) {
      const note = i < conversation.exchanges.length - 1 ? "Later answers stay as they are." : "";
      box.append(this.#editor("Edited answer", version.text, "Save", (edited) => this.actions.saveAnswer(version, edited), null, note));
    } else box.append(text, foot);
    let drawn = null;
    const view = () => {
      thought.hidden = !version.thought;
      if (version.thought && thought.lastChild.dataset.length !== String(version.thought.length)) {
        show(thought.lastChild, version.thought);
        thought.lastChild.dataset.length = version.thought.length;
        thought.firstChild.textContent = version.text || !isRunning(version) ? "Thoughts" : "Thinking…";
      }
      if (version.text) thought.firstChild.textContent = "Thoughts";
      show(text, version.text);
      box.classList.toggle("running", isRunning(version));
      box.setAttribute("aria-busy", String(isRunning(version)));
      const state = `${version.state} ${this.page().running} ${version.vote}`;
      if (state !== drawn) foot.replaceChildren(...this.#foot(version, exchange, i, column));
      drawn = state;
    };
    this.views.set(version, view);
    view();
    return box;
  }

  #foot(version, exchange, i, column) {
    const { conversation, running, votes } = this.page();
    if (isRunning(version)) return [el("span", { class: "dots", "aria-label": "Answering" }, el("i"), el("i"), el("i"))];
    const made = [];
    if (version.state === "done" && !version.text.trim()) made.push(el("p", { class: "remark" }, "The model said nothing."));
    if (version.finish === "length") made.push(el("p", { class: "remark" }, "Cut off: the answer reached the longest length that was asked for, or the model's context is full."));
    if (version.state === "stopped") made.push(el("p", { class: "remark" }, version.text.trim() ? "Stopped." : "Stopped before the first word; this question is not part of the conversation."));
    if (version.state === "failed") made.push(this.#problem(version, i, column));
    const answers = conversation.answers(exchange, column);
    const tools = el("div", { class: "tools" });
    if (version.text) tools.append(copyButton("Copy the answer", () => version.text));
    if (version.state !== "failed") tools.append(iconButton("redo", "Answer again", () => this.actions.again(i, column), { disabled: running }));
    if (version.text) tools.append(iconButton("edit", "Edit the answer", () => this.edit(version), { disabled: running }));
    if (answers.versions.length > 1) {
      const at = answers.shown;
      tools.append(
        iconButton("previous", "Earlier answer", () => this.actions.showVersion(i, column, at - 1), { disabled: running || at === 0 }),
        el("span", { class: "count", "aria-label": `Answer ${at + 1} of ${answers.versions.length}` }, `${at + 1}/${answers.versions.length}`),
        iconButton("next", "Later answer", () => this.actions.showVersion(i, column, at + 1), { disabled: running || at === answers.versions.length - 1 }),
      );
    }
    if (votes && version.settings && version.text && !version.edited) {
      for (const [type, name, label] of VOTES) {
        tools.append(iconButton(name, label, () => this.actions.vote(version, i, column, type), { "aria-pressed": String(version.vote === type), disabled: version.vote !== null }));
      }
    }
    tools.append(this.#figures(version));
    made.push(tools);
    return made;
  }

  #figures(version) {
    const said = [];
    if (version.edited) said.push("edited");
    if (version.tokens !== null) said.push(plural(version.tokens, "token"));
    if (version.rate !== null) said.push(`${version.rate.toFixed(version.rate < 100 ? 1 : 0)} tokens/s`);
    const { settings } = version;
    const more = [];
    if (version.promptTokens !== null) more.push(`question and history: ${plural(version.promptTokens, "token")}`);
    if (version.firstSeconds !== null) more.push(`first word after ${version.firstSeconds.toFixed(2)} s`);
    if (settings) more.push(`temperature ${settings.temperature}`, `top-p ${settings.top_p}`, settings.seed === null ? "no seed" : `seed ${settings.seed}`);
    return el("span", { class: "figures", title: more.join("\n") }, said.join(" · "));
  }

  #problem(version, i, column) {
    const { message, detail, retrySeconds } = version.problem;
    const words = el("div", {}, el("strong", {}, message), detail ? el("p", {}, detail) : null);
    if (version.text.trim()) words.append(el("p", {}, "What had come is kept."));
    else words.append(el("p", {}, "The question is kept above, and not part of the conversation until it is answered."));
    const again = el("button", { type: "button", onclick: () => this.actions.retry(i, column) }, "Try again");
    if (retrySeconds) countDown(again, version.ended + retrySeconds * 1000);
    return el("div", { class: "problem" }, icon("warning"), words, again);
  }

  #compare(exchange, i) {
    const { conversation, running, votes } = this.page();
    const both = [0, 1].map((column) => conversation.version(exchange, column));
    if (!votes || running || both.some((one) => !one?.text || one.state !== "done" || one.edited || !one.settings)) return null;
    const voted = both.some((one) => one.vote !== null);
    const options = [["Left is better", "upvote", "downvote"], ["Both are good", "upvote", "upvote"], ["Both are bad", "downvote", "downvote"], ["Right is better", "downvote", "upvote"]];
    return el("div", { class: "compare", role: "group", "aria-label": "Compare the two answers" }, options.map(([label, left, right]) => el("button", { type: "button", disabled: voted, "aria-pressed": String(both[0].vote === left && both[1].vote === right), onclick: () => this.actions.voteBoth(i, left, right) }, label)));
  }
}

/** A question's text with a mark wherever a picture stands in it. */
function marked(text, pictures) {
  if (!pictures) return text;
  return text.split("<image>").flatMap((words, i) => (i ? [el("span", { class: "place" }, `picture ${i}`), words] : [words]));
}

function countDown(button, until) {
  const tick = () => {
    const left = Math.ceil((until - Date.now()) / 1000);
    button.textContent = left > 0 ? `Try again (in ${left} s)` : "Try again";
    button.disabled = left > 0;
    if (left > 0) setTimeout(tick, 250);
  };
  tick();
}

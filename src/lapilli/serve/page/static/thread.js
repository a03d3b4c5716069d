// The conversation as it is seen: questions, and below each its answers in one column or two.

import { isRunning } from "./conversation.js";
import { byId, copyButton, el, icon, iconButton, plural } from "./dom.js";
import { show } from "./markdown.js";
import { SIDES } from "./panel.js";
import { countDown, editor, figures, marked, welcome } from "./parts.js";
import { look } from "./tray.js";

const VOTES = [
  ["upvote", "good", "Good answer"],
  ["downvote", "bad", "Bad answer"],
  ["flag", "flag", "Flag this answer"],
];

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
    this.latest = byId("latest");
    this.latest.append(icon("down"));
    this.latest.addEventListener("click", () => this.toEnd());
    this.scroller.addEventListener(
      "scroll",
      () => {
        const { scrollHeight, scrollTop, clientHeight } = this.scroller;
        this.follows = scrollHeight - scrollTop - clientHeight < 60;
        this.latest.hidden = this.follows;
      },
      { passive: true },
    );
    new ResizeObserver(() => this.follows && this.toEnd()).observe(this.scroller);
  }

  toEnd() {
    this.follows = this.latest.hidden = true;
    this.scroller.scrollTop = this.page().conversation.empty ? 0 : this.scroller.scrollHeight;
  }

  /** Draw everything anew. */
  draw() {
    const { conversation } = this.page();
    const focused = this.#focused();
    this.views.clear();
    const exchanges = conversation.exchanges.map((exchange, i) => this.#exchange(exchange, i));
    this.box.replaceChildren(
      ...(exchanges.length ? exchanges : [welcome(this.page(), this.actions.useExample.bind(this.actions))]),
    );
    if (this.follows) this.toEnd();
    if (focused) this.#focus(focused);
  }

  /** What has the focus in here, in words that outlive the element. */
  #focused() {
    const here = document.activeElement;
    if (!this.box.contains(here) || here === this.box) return null;
    const exchange = [...this.box.children].findIndex((one) => one.contains(here));
    const label = here.getAttribute("aria-label") ?? here.textContent;
    const alike = this.#named(exchange, label);
    return { exchange, label, place: alike.indexOf(here), at: here.selectionStart ?? null };
  }

  #named(exchange, label) {
    const all = this.box.children[exchange]?.querySelectorAll("button, textarea, summary, a, [tabindex]") ?? [];
    return [...all].filter((one) => (one.getAttribute("aria-label") ?? one.textContent) === label);
  }

  #focus({ exchange, label, place, at }) {
    const same = this.#named(exchange, label)[place];
    if (!same || same.disabled) byId("question").focus();
    else {
      same.focus({ preventScroll: true });
      if (at !== null) same.setSelectionRange(at, at);
    }
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

  #exchange(exchange, i) {
    const { conversation, columns } = this.page();
    const shared = exchange.answers.length === 1;
    const count = shared ? 1 : columns.length;
    const answers = Array.from({ length: count }, (_, column) =>
      this.#answer(conversation, exchange, i, column, shared),
    );
    const both = count > 1 ? this.#compare(exchange, i) : null;
    return el(
      "article",
      { class: "exchange", "aria-label": `Question ${i + 1}` },
      this.#question(exchange, i),
      el("div", { class: count > 1 ? "answers two" : "answers" }, answers),
      both,
    );
  }

  #question(exchange, i) {
    const { running } = this.page();
    if (this.editing?.what === exchange) return this.#editQuestion(exchange, i);
    return el(
      "div",
      { class: "question" },
      exchange.pictures.length
        ? el(
            "div",
            { class: "pictures" },
            exchange.pictures.map((picture) =>
              el(
                "button",
                {
                  type: "button",
                  class: "look",
                  "aria-label": `Look at ${picture.name}`,
                  title: picture.name,
                  onclick: () => look(picture),
                },
                el("img", { src: picture.url, alt: picture.name }),
              ),
            ),
          )
        : null,
      el(
        "div",
        { class: "line" },
        el(
          "div",
          { class: "tools" },
          copyButton("Copy the question", () => exchange.text),
          iconButton("edit", "Edit the question", () => this.edit(exchange), { disabled: running }),
          iconButton("trash", "Delete this question and its answer", () => this.actions.remove(i), {
            disabled: running,
          }),
        ),
        el("p", { class: "asked" }, marked(exchange.text, exchange.pictures.length)),
      ),
    );
  }

  /** Open a question or an answer for editing. */
  edit(what) {
    this.editing = { what, text: what.text, pictures: what.pictures && [...what.pictures] };
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

  #editQuestion(exchange, i) {
    const draft = this.editing;
    const list = el("div", { class: "pictures" });
    const takeOut = (picture) => {
      draft.pictures = draft.pictures.filter((one) => one !== picture);
      draw();
    };
    const draw = () => {
      const thumbs = draft.pictures.map((picture) =>
        el(
          "span",
          { class: "thumb" },
          el("img", { src: picture.url, alt: picture.name }),
          iconButton("close", `Take out ${picture.name}`, () => takeOut(picture), { class: "out" }),
        ),
      );
      list.replaceChildren(...thumbs);
    };
    draw();
    const later = this.page().conversation.exchanges.length - i - 1;
    const go = later === 1 ? "goes" : "go";
    return editor({
      label: "Edited question",
      draft,
      words: "Ask",
      save: (text) => this.actions.askEdited(i, text, draft.pictures),
      cancel: () => this.stopEditing(),
      above: list,
      hint: later ? `The conversation goes on from here; ${plural(later, "later question")} ${go}.` : "",
    });
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
    if (this.editing?.what === version) {
      const edit = editor({
        label: "Edited answer",
        draft: this.editing,
        words: "Save",
        save: (edited) => this.actions.saveAnswer(version, edited),
        cancel: () => this.stopEditing(),
        hint: i < conversation.exchanges.length - 1 ? "Later answers stay as they are." : "",
      });
      box.append(edit);
    } else box.append(text, foot);
    thought.open = version.open;
    thought.addEventListener("toggle", () => {
      version.open = thought.open;
    });
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
    if (isRunning(version))
      return [el("span", { class: "dots", "aria-label": "Answering" }, el("i"), el("i"), el("i"))];
    const made = [];
    if (version.state === "done" && !version.text.trim())
      made.push(el("p", { class: "remark" }, "The model said nothing."));
    if (version.finish === "length")
      made.push(
        el(
          "p",
          { class: "remark" },
          "Cut off: the answer reached the longest length that was asked for, or the model's context is full.",
        ),
      );
    if (version.state === "stopped")
      made.push(
        el(
          "p",
          { class: "remark" },
          version.text.trim()
            ? "Stopped."
            : "Stopped before the first word; this question is not part of the conversation.",
        ),
      );
    if (version.state === "failed") made.push(this.#problem(version, i, column));
    const answers = conversation.answers(exchange, column);
    const tools = el("div", { class: "tools" });
    if (version.text) tools.append(copyButton("Copy the answer", () => version.text));
    if (version.state !== "failed")
      tools.append(iconButton("redo", "Answer again", () => this.actions.again(i, column), { disabled: running }));
    if (version.text)
      tools.append(iconButton("edit", "Edit the answer", () => this.edit(version), { disabled: running }));
    if (answers.versions.length > 1) {
      const at = answers.shown;
      tools.append(
        iconButton("previous", "Earlier answer", () => this.actions.showVersion(i, column, at - 1), {
          disabled: running || at === 0,
        }),
        el(
          "span",
          { class: "count", "aria-label": `Answer ${at + 1} of ${answers.versions.length}` },
          `${at + 1}/${answers.versions.length}`,
        ),
        iconButton("next", "Later answer", () => this.actions.showVersion(i, column, at + 1), {
          disabled: running || at === answers.versions.length - 1,
        }),
      );
    }
    if (votes && version.settings && version.text && !version.edited) {
      for (const [type, name, label] of VOTES) {
        tools.append(
          iconButton(name, label, () => this.actions.vote(version, i, column, type), {
            "aria-pressed": String(version.vote === type),
            disabled: version.vote !== null,
          }),
        );
      }
    }
    tools.append(figures(version));
    made.push(tools);
    return made;
  }

  #problem(version, i, column) {
    const { message, detail, retrySeconds } = version.problem;
    const words = el("div", {}, el("strong", {}, message), detail ? el("p", {}, detail) : null);
    if (version.text.trim()) words.append(el("p", {}, "What had come is kept."));
    else
      words.append(el("p", {}, "The question is kept above, and not part of the conversation until it is answered."));
    const again = el("button", { type: "button", onclick: () => this.actions.retry(i, column) }, "Try again");
    if (retrySeconds) countDown(again, version.ended + retrySeconds * 1000);
    return el("div", { class: "problem" }, icon("warning"), words, again);
  }

  #compare(exchange, i) {
    const { conversation, running, votes } = this.page();
    const both = [0, 1].map((column) => conversation.version(exchange, column));
    if (!votes || running || both.some((one) => !one?.text || one.state !== "done" || one.edited || !one.settings))
      return null;
    const voted = both.some((one) => one.vote !== null);
    const options = [
      ["Left is better", "upvote", "downvote"],
      ["Both are good", "upvote", "upvote"],
      ["Both are bad", "downvote", "downvote"],
      ["Right is better", "downvote", "upvote"],
    ];
    return el(
      "div",
      { class: "compare", role: "group", "aria-label": "Compare the two answers" },
      options.map(([label, left, right]) =>
        el(
          "button",
          {
            type: "button",
            disabled: voted,
            "aria-pressed": String(both[0].vote === left && both[1].vote === right),
            onclick: () => this.actions.voteBoth(i, left, right),
          },
          label,
        ),
      ),
    );
  }
}

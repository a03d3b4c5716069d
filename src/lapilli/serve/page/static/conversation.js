// What was said, without any view of it. An exchange is a question and, for each column of the page, its answers: asking
// again adds a version and keeps the others. A column that joined later shares the first column's earlier answers.

const PLACE = "<image>";

let lastNumber = 0;

/** One answer, while it grows and afterwards. */
export function newVersion(settings) {
  return {
    number: ++lastNumber,
    state: "waiting", // then "streaming", "done", "stopped" or "failed"
    text: "",
    thought: "",
    finish: null,
    problem: null,
    edited: false,
    vote: null,
    open: false, // whether its thoughts are unfolded
    settings,
    begun: Date.now(),
    ended: null,
    promptTokens: null,
    tokens: null,
    firstSeconds: null,
    rate: null,
  };
}

export class Conversation {
  constructor() {
    this.clear();
  }

  clear() {
    this.id = newId();
    this.exchanges = [];
  }

  get empty() {
    return this.exchanges.length === 0;
  }

  add(text, pictures, columns) {
    const answers = Array.from({ length: columns }, () => ({ versions: [], shown: 0 }));
    this.exchanges.push({ text, pictures, answers });
    return this.exchanges.at(-1);
  }

  /** The answers of a column to an exchange: the first column's where it has none of its own. */
  answers(exchange, column) {
    return exchange.answers[Math.min(column, exchange.answers.length - 1)];
  }

  /** The version that is shown, and so belongs to the conversation. */
  version(exchange, column) {
    const { versions, shown } = this.answers(exchange, column);
    return versions[shown] ?? null;
  }

  /** Exchanges before `end` that have an answer in this column; what got no word of an answer is not part of it. */
  said(column, end = this.exchanges.length) {
    const before = this.exchanges.slice(0, end);
    return before.filter(
      (exchange) => this.version(exchange, column)?.text.trim() && !isRunning(this.version(exchange, column)),
    );
  }

  /** OpenAI's messages for exchange number `index`, whose answer is wanted; with `answered`, its answer too. */
  messages(column, index, system, answered = false) {
    const made = system.trim() ? [{ role: "system", content: system }] : [];
    for (const exchange of this.said(column, index)) {
      made.push({ role: "user", content: content(exchange) });
      made.push({ role: "assistant", content: this.version(exchange, column).text });
    }
    const last = this.exchanges[index];
    made.push({ role: "user", content: content(last) });
    if (answered) made.push({ role: "assistant", content: this.version(last, column).text });
    return made;
  }

  /** Pictures that a question at `index` takes along in a column: its own and those of what was said before. */
  pictures(column, index) {
    return [...this.said(column, index), ...this.exchanges.slice(index, index + 1)].flatMap((one) => one.pictures);
  }

  /** Keep one column alone. */
  keepColumn(column) {
    for (const exchange of this.exchanges) exchange.answers = [this.answers(exchange, column)];
  }

  /** What `restore` needs to bring this state back. */
  snapshot() {
    const exchanges = this.exchanges.map((one) => ({
      ...one,
      answers: one.answers.map((each) => ({ ...each, versions: [...each.versions] })),
    }));
    return { id: this.id, exchanges };
  }

  restore(snapshot) {
    this.id = snapshot.id;
    this.exchanges = snapshot.exchanges;
  }
}

export const isRunning = (version) => version.state === "waiting" || version.state === "streaming";

/** A question with `<image>` at each picture: where it was written, else in front, a line break after each. */
export function placed(text, count) {
  return count && !text.includes(PLACE) ? `${PLACE}\n`.repeat(count) + text : text;
}

/** Why a question can't be asked as it is written, or null. */
export function misplaced(text, count) {
  const places = text.split(PLACE).length - 1;
  if (places === 0 || places === count) return null;
  const many = (number, word) => `${number} ${word}${number === 1 ? "" : "s"}`;
  return `The question has ${many(places, PLACE)}, but ${many(count, "picture")}: write ${PLACE} once for each picture, or leave it out to have them in front.`;
}

/** A question as the API takes it: a text, or text and picture parts in their order. */
function content({ text, pictures }) {
  if (!pictures.length) return text;
  const parts = [];
  placed(text, pictures.length)
    .split(PLACE)
    .forEach((words, i) => {
      if (i) parts.push({ type: "image_url", image_url: { url: pictures[i - 1].url } });
      if (words) parts.push({ type: "text", text: words });
    });
  return parts;
}

function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// Conversations as files: LLaVA's JSON with one record, as `lapilli chat` saves and opens it. Pictures stand inside as
// data URLs. A file that was saved elsewhere may name pictures by their path; those the user has to point at.

import { placed } from "./conversation.js";
import { fromDataUrl, readPicture } from "./pictures.js";

const ROLES = {
  human: "user",
  user: "user",
  gpt: "assistant",
  assistant: "assistant",
  chatgpt: "assistant",
  bing: "assistant",
  bard: "assistant",
  system: "system",
};
const PLACE = "<image>";

/** What is wrong with a file, in words. */
export class FileProblem extends Error {}

/** The conversation of a column as the text of a file. Questions without an answer are left out, as in `lapilli chat`. */
export function write(conversation, column, system) {
  const said = conversation.said(column);
  const turns = system.trim() ? [{ from: "system", value: system }] : [];
  for (const exchange of said) {
    turns.push({ from: "human", value: placed(exchange.text, exchange.pictures.length) });
    turns.push({ from: "gpt", value: conversation.version(exchange, column).text });
  }
  const urls = said.flatMap((exchange) => exchange.pictures.map((picture) => picture.url));
  const image = urls.length ? { image: urls.length === 1 ? urls[0] : urls } : {};
  return `${JSON.stringify([{ id: conversation.id, ...image, conversations: turns }], null, 2)}\n`;
}

/**
 * A file's conversation: {system, exchanges: [{text, pictures, answer}]}. `findFiles(names)` resolves to the files of
 * pictures that the record names by path, or to null. Rejects with a FileProblem that says what is wrong and where.
 */
export async function read(text, limits, findFiles) {
  const record = oneRecord(text);
  const names = pictureNames(record);
  const turns = turnsOf(record);
  const system = turns[0].role === "system" ? turns.shift().text : "";
  if (!turns.length || turns.length % 2)
    throw new FileProblem("questions and answers must alternate, and an answer come last");
  turns.forEach((turn, i) => {
    if (turn.role !== (i % 2 ? "assistant" : "user"))
      throw new FileProblem(
        `${turn.where}: is from the ${turn.role}; questions and answers must alternate, beginning with a question`,
      );
    if (i % 2 && turn.text.includes(PLACE)) throw new FileProblem(`${turn.where}: an answer can't hold ${PLACE}`);
  });
  const places = turns.reduce((sum, turn) => sum + count(turn.text), 0);
  if (places !== names.length)
    throw new FileProblem(`the turns have ${places} ${PLACE}, but the record names ${names.length} pictures`);
  if (names.length > limits.images)
    throw new FileProblem(`holds ${names.length} pictures; this server takes ${limits.images} in a request`);
  const pictures = await openAll(names, limits, findFiles);
  const exchanges = [];
  for (let i = 0; i < turns.length; i += 2) {
    const own = pictures.splice(0, count(turns[i].text));
    exchanges.push({ text: unplaced(turns[i].text, own.length), pictures: own, answer: turns[i + 1].text });
  }
  return { system, exchanges };
}

const count = (text) => text.split(PLACE).length - 1;

/** `placed` undone, where the pictures stand in front. */
function unplaced(text, pictures) {
  const front = `${PLACE}\n`.repeat(pictures);
  const rest = text.slice(front.length);
  return pictures && text.startsWith(front) && rest.trim() ? rest : text;
}

function oneRecord(text) {
  let value;
  try {
    value = JSON.parse(text.replace(/^\ufeff/, ""));
  } catch (error) {
    throw new FileProblem(`not JSON (${error.message})`);
  }
  const records = Array.isArray(value) ? value : [value];
  if (records.length !== 1) throw new FileProblem(`holds ${records.length} conversations; one can be gone on with`);
  if (!isObject(records[0])) throw new FileProblem("its record must be an object with `conversations`");
  return records[0];
}

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

function pictureNames(record) {
  if (record.image != null && record.images != null) throw new FileProblem("has both `image` and `images`; keep one");
  const field = record.images != null ? "images" : "image";
  const given = record[field];
  const names = given == null ? [] : Array.isArray(given) ? given : [given];
  return names.map((name, i) => {
    const value = isObject(name) ? (name.url ?? name.path) : name;
    if (typeof value !== "string" || !value)
      throw new FileProblem(`\`${field}\` ${i + 1}: must be a path or a data: address`);
    if (/^[a-z][a-z0-9+.-]{1,20}:\/\//i.test(value) && !/^file:/i.test(value)) {
      throw new FileProblem(
        `\`${field}\` ${i + 1}: is an address (${value.slice(0, 60)}); this page loads nothing from elsewhere`,
      );
    }
    return value;
  });
}

function turnsOf(record) {
  const field = "conversations" in record || !("messages" in record) ? "conversations" : "messages";
  const given = record[field];
  if (!Array.isArray(given)) throw new FileProblem(`\`${field}\` must be a list of turns`);
  if (!given.length) throw new FileProblem(`\`${field}\` is empty`);
  const turns = given.map((turn, i) => {
    const where = `${field} turn ${i + 1}`;
    if (!isObject(turn)) throw new FileProblem(`${where}: must be an object with \`from\` and \`value\``);
    const [role, text] = [turn.from ?? turn.role, turn.value ?? turn.content];
    if (typeof role !== "string" || !Object.hasOwn(ROLES, role))
      throw new FileProblem(
        `${where}: unknown role ${JSON.stringify(role) ?? "(none)"}; known are ${Object.keys(ROLES).join(", ")}`,
      );
    if (typeof text !== "string") throw new FileProblem(`${where}: \`value\` must be text`);
    if (!text.isWellFormed()) throw new FileProblem(`${where}: holds half of a character`);
    return { role: ROLES[role], text, where };
  });
  if (typeof record.system === "string" && record.system && turns[0].role !== "system")
    turns.unshift({ role: "system", text: record.system, where: "system" });
  return turns;
}

async function openAll(names, limits, findFiles) {
  const isData = (name) => /^data:/i.test(name);
  const base = (name) => name.split(/[/\\]/).at(-1);
  const wanted = [...new Set(names.filter((name) => !isData(name)).map(base))];
  const found = new Map();
  if (wanted.length) {
    const files = await findFiles(wanted);
    if (files === null) throw new FileProblem("names pictures as files, and they were not chosen");
    for (const file of files) found.set(file.name, file);
    const missing = wanted.filter((name) => !found.has(name));
    if (missing.length) throw new FileProblem(`these pictures were not among the chosen files: ${missing.join(", ")}`);
  }
  const made = [];
  for (const [i, name] of names.entries()) {
    let picture;
    try {
      picture = isData(name)
        ? await fromDataUrl(name, `picture ${i + 1}`, limits)
        : await readPicture(found.get(base(name)), limits);
    } catch {
      throw new FileProblem(`picture ${i + 1}: can't be opened`);
    }
    if (picture.problem) throw new FileProblem(`picture ${i + 1}: ${picture.problem}`);
    made.push(picture);
  }
  return made;
}

// The part of Markdown that models write, as DOM nodes: headings, lists, tables, code, quotes, emphasis, links.
//
// HTML in it stays text, pictures become links (nothing is loaded from elsewhere), and a link goes to http, https or
// mailto or stays text. A text that grows is drawn again from the first block that changed, so what was read stays put.

import { copyButton, el } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`\s]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*?)[ \t]*#*$/;
const RULE = /^ {0,3}([-*_])([ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^([ \t]*)([-*+]|\d{1,9}[.)])[ \t]+(.*)$/;
const DELIMITERS = /^ *\|? *:?-+:? *(\| *:?-+:? *)*\|? *$/;
const LINK =
  /!?\[([^[\]\n]{0,1000})\]\(<?([^\s<>()]{1,2000}(?:\([^\s<>()]{0,200}\)[^\s<>()]{0,200})?)>?(?: "[^"\n]{0,300}")?\)/y;
const ADDRESS = /https?:\/\/[^\s<>"'`]{1,2000}/y;
const DEEPEST = 8;

/** Show `text` in `box`; blocks that are the same as last time are left alone. */
export function show(box, text) {
  const before = shown.get(box) ?? [];
  const now = blocks(text);
  let same = 0;
  while (
    same < now.length &&
    same < before.length &&
    now[same].source === before[same].source &&
    now[same].kind === before[same].kind
  )
    same++;
  while (box.childNodes.length > same) box.lastChild.remove();
  for (const block of now.slice(same)) box.append(draw(block, 0));
  shown.set(box, now);
}

const shown = new WeakMap();

/** Nodes of a text, for tests and short texts. */
export function nodes(text) {
  return blocks(text).map((block) => draw(block, 0));
}

function blocks(text) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const made = [];
  let at = 0;
  const take = (kind, until, more = {}) => {
    made.push({ kind, lines: lines.slice(at, until), source: lines.slice(at, until).join("\n"), ...more });
    at = until;
  };
  while (at < lines.length) {
    const line = lines[at];
    const fence = FENCE.exec(line);
    if (!line.trim()) at++;
    else if (fence) {
      let end = at + 1;
      const closed = (one) => one.trim().startsWith(fence[1]) && !one.trim().replaceAll(fence[1][0], "");
      while (end < lines.length && !closed(lines[end])) end++;
      take("code", Math.min(end + 1, lines.length), { language: fence[2], body: lines.slice(at + 1, end).join("\n") });
    } else if (HEADING.test(line)) take("heading", at + 1);
    else if (RULE.test(line)) take("rule", at + 1);
    else if (QUOTE.test(line)) {
      let end = at + 1;
      while (end < lines.length && lines[end].trim() && (QUOTE.test(lines[end]) || !starts(lines[end]))) end++;
      take("quote", end);
    } else if (
      line.includes("|") &&
      DELIMITERS.test(lines[at + 1] ?? "") &&
      (lines[at + 1] ?? "").includes("-") &&
      cells(line).length === cells(lines[at + 1]).length
    ) {
      let end = at + 2;
      while (end < lines.length && lines[end].includes("|")) end++;
      take("table", end);
    } else if (ITEM.test(line)) take("list", listEnd(lines, at));
    else {
      let end = at + 1;
      while (end < lines.length && lines[end].trim() && !starts(lines[end])) end++;
      take("paragraph", end);
    }
  }
  return made;
}

const starts = (line) =>
  FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);

/** The end of a list: where a line that is neither an item nor indented follows something blank or starts a block. */
function listEnd(lines, begin) {
  const ordered = /\d/.test(ITEM.exec(lines[begin])[2]);
  let end = begin + 1;
  while (end < lines.length) {
    const line = lines[end];
    const item = ITEM.exec(line);
    const indented = /^(\t| {2,})/.test(line);
    if (!line.trim()) {
      const next = lines.slice(end).findIndex((one) => one.trim());
      if (next < 0) break;
      const after = lines[end + next];
      const goesOn = ITEM.exec(after);
      if (!/^(\t| {2,})/.test(after) && !(goesOn && /\d/.test(goesOn[2]) === ordered)) break;
      end += next;
    } else if (!indented && item && (/\d/.test(item[2]) !== ordered || RULE.test(line))) break;
    else if (!indented && !item && starts(line)) break;
    else end++;
  }
  return end;
}

function draw(block, depth) {
  const { kind, lines } = block;
  if (kind === "code") return code(block.body, block.language);
  if (kind === "rule") return el("hr");
  if (kind === "table") return table(lines);
  if (kind === "heading") {
    const [, marks, words] = HEADING.exec(lines[0]);
    return el(`h${Math.min(6, marks.length + 2)}`, { class: `level-${marks.length}` }, inline(words));
  }
  if (depth < DEEPEST && kind === "quote") {
    return el(
      "blockquote",
      {},
      inner(
        lines.map((line) => line.replace(QUOTE, "")),
        depth,
      ),
    );
  }
  if (depth < DEEPEST && kind === "list") return list(lines, depth);
  return el("p", {}, inline(lines.map((line) => line.trim()).join("\n")));
}

const inner = (lines, depth) => blocks(lines.join("\n")).map((block) => draw(block, depth + 1));

function list(lines, depth) {
  const first = ITEM.exec(lines[0]);
  const items = [];
  const margin = first[1].length;
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= margin + 1) items.push([item[3]]);
    else items.at(-1).push(line);
  }
  const made = items.map((item) => {
    const indents = item
      .slice(1)
      .filter((line) => line.trim())
      .map((line) => /^\s*/.exec(line)[0].length);
    const least = indents.length ? Math.min(...indents) : 0;
    const body = inner(
      [item[0], ...item.slice(1).map((line) => line.slice(Math.min(least, /^\s*/.exec(line)[0].length)))],
      depth,
    );
    // An item of one paragraph (and what is below it) stands without a paragraph's space around it.
    if (body[0]?.tagName === "P") body[0] = el("span", {}, [...body[0].childNodes]);
    return el("li", {}, body);
  });
  if (!/\d/.test(first[2])) return el("ul", {}, made);
  return el("ol", { start: parseInt(first[2], 10) }, made);
}

function cells(line) {
  const bare = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return bare.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function table(lines) {
  const sides = cells(lines[1]).map((cell) =>
    cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "left",
  );
  const row = (line, tag) => {
    const given = cells(line);
    return el(
      "tr",
      {},
      sides.map((side, i) => el(tag, { class: `to-${side}` }, inline(given[i] ?? ""))),
    );
  };
  const whole = el(
    "table",
    {},
    el("thead", {}, row(lines[0], "th")),
    el(
      "tbody",
      {},
      lines.slice(2).map((line) => row(line, "td")),
    ),
  );
  return el("div", { class: "wide", tabIndex: 0, role: "region", "aria-label": "Table" }, whole);
}

function code(body, language) {
  const head = el(
    "div",
    { class: "code-head" },
    el("span", {}, language || "code"),
    copyButton("Copy the code", () => body),
  );
  return el("div", { class: "code" }, head, el("pre", { tabIndex: 0 }, el("code", {}, body)));
}

/** Nodes of a run of text. Every unmatched mark stays as it was written. */
function inline(text, depth = 0) {
  const made = [];
  let plain = "";
  const hopeless = new Set();
  const flush = () => {
    if (plain) made.push(plain);
    plain = "";
  };
  const put = (node, length) => {
    flush();
    made.push(node);
    at += length;
  };
  let at = 0;
  while (at < text.length) {
    const here = text[at];
    if (here === "\n") put(el("br"), 1);
    else if (here === "\\" && "\\`*_~#|<>!-+".includes(text[at + 1] ?? "?")) {
      plain += text[at + 1];
      at += 2;
    } else if (here === "`") {
      const marks = /^`+/.exec(text.slice(at, at + 40))[0];
      const end = hopeless.has(marks) ? -1 : text.indexOf(marks, at + marks.length);
      if (end < 0) {
        hopeless.add(marks);
        plain += marks;
        at += marks.length;
      } else put(el("code", {}, text.slice(at + marks.length, end).trim()), end + marks.length - at);
    } else if ("*_~".includes(here) && depth < DEEPEST) {
      const found = emphasis(text, at, hopeless);
      if (found) put(el(found.tag, {}, inline(found.words, depth + 1)), found.length);
      else {
        const run = text.slice(at, at + 40).match(/^(\*+|_+|~+)/)[0];
        plain += run;
        at += run.length;
      }
    } else if (here === "[" || (here === "!" && text[at + 1] === "[")) {
      const link = match(LINK, text, at);
      if (link) put(anchor(link[2], link[1] || link[2], link[0]), link[0].length);
      else {
        plain += here;
        at++;
      }
    } else if (here === "h" && !/\w/.test(text[at - 1] ?? " ")) {
      const found = match(ADDRESS, text, at);
      const address = found && found[0].replace(/[.,;:!?)\]*_]+$/, "");
      if (address) put(anchor(address, address, address), address.length);
      else {
        plain += here;
        at++;
      }
    } else {
      plain += here;
      at++;
    }
  }
  flush();
  return made;
}

const TAGS = { "**": "strong", __: "strong", "*": "em", _: "em", "~~": "del" };

function emphasis(text, at, hopeless) {
  const here = text[at];
  const run = text.slice(at, at + 4).match(/^(\*+|_+|~+)/)[0];
  if (run.length > 3) return null;
  const mark = run.length === 3 ? run.slice(0, 2) : run;
  const inWord = (place) => here === "_" && /\w/.test(text[place] ?? " ");
  if (!TAGS[mark] || hopeless.has(mark) || /\s|^$/.test(text[at + mark.length] ?? "") || inWord(at - 1)) return null;
  for (let end = text.indexOf(mark, at + mark.length); end >= 0; end = text.indexOf(mark, end + 1)) {
    const longer = mark.length === 1 && (text[end + 1] === here || text[end - 1] === here);
    if (longer) {
      while (text[end + 1] === here) end++;
      continue;
    }
    while (mark.length === 2 && text[end + 2] === here) end++;
    if (end > at + mark.length && !/\s/.test(text[end - 1]) && !inWord(end + mark.length)) {
      return { tag: TAGS[mark], words: text.slice(at + mark.length, end), length: end + mark.length - at };
    }
  }
  hopeless.add(mark);
  return null;
}

function match(pattern, text, at) {
  pattern.lastIndex = at;
  return pattern.exec(text);
}

/** A link that leaves this page in another tab and tells the other side nothing; plain text for any other scheme. */
function anchor(address, words, source) {
  let url;
  try {
    url = new URL(address);
  } catch {
    return source;
  }
  if (!["http:", "https:", "mailto:"].includes(url.protocol)) return source;
  return el("a", { href: url.href, target: "_blank", rel: "noopener noreferrer nofollow", title: url.href }, words);
}

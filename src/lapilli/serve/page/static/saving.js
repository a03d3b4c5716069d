// The conversation out of the page and into it, as the menu and a dropped file ask for it.

import { newVersion } from "./conversation.js";
import { choose, findFiles, note } from "./dialogs.js";
import { el, plural } from "./dom.js";
import * as files from "./files.js";

/** Save the conversation as a file; of two columns, the one that the user chooses. */
export async function exportFile(page) {
  let column = 0;
  if (page.conversation.exchanges.some((exchange) => exchange.answers.length > 1)) {
    column = await choose("Export", "Which of the two conversations?", [
      ["Left", 0, true],
      ["Right", 1, true],
    ]);
    if (column === null) return;
  }
  const said = page.conversation.said(column).length;
  if (!said) {
    note("Nothing to export yet: no question was answered.", { bad: true });
    return;
  }
  const text = files.write(page.conversation, column, page.panel.columns[column].system);
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const stamp = new Date().toISOString().slice(0, 16).replace(/[:T]/g, "-");
  el("a", { href: url, download: `conversation-${stamp}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
  page.exported = true;
  const left = page.conversation.exchanges.length - said;
  note(
    `Exported ${plural(said, "question")} with ${said === 1 ? "its answer" : "their answers"}${left ? `; ${plural(left, "question")} without an answer left out` : ""}.`,
  );
}

/** Have a file chosen to go on with. */
export function chooseFile(page) {
  const field = el("input", { type: "file", accept: ".json,application/json", id: "import-file", hidden: true });
  field.addEventListener("change", () => (importFile(page, field.files[0]), field.remove()));
  document.body.append(field);
  field.click();
}

/** Go on with a saved conversation in place of this one; a file with errors changes nothing and is said. */
export async function importFile(page, file) {
  if (page.asking.size) {
    note("An answer is under way; stop it first.", { bad: true });
    return;
  }
  let opened;
  try {
    opened = await files.read(await file.text(), page.settings, findFiles);
  } catch (problem) {
    note(
      `${file.name}: ${problem instanceof files.FileProblem ? problem.message : `can't be read (${problem.message})`}`,
      { bad: true },
    );
    return;
  }
  const undo = page.undoable();
  page.conversation.clear();
  for (const { text, pictures, answer: words } of opened.exchanges) {
    const exchange = page.conversation.add(text, pictures, 1);
    exchange.answers[0].versions.push({ ...newVersion(null), state: "done", text: words });
  }
  for (const column of page.panel.columns) column.system = opened.system;
  page.panel.draw();
  page.exported = true;
  page.thread.follows = true;
  page.thread.draw();
  note(
    `${file.name}: ${plural(opened.exchanges.length, "question")}${opened.system ? ", and a system prompt" : ""}`,
    undo.exchanges ? { undo: undo.back } : {},
  );
}

// The buttons of the top bar, and the menu behind the last of them.

import { shortcuts } from "./dialogs.js";
import { byId, el, iconButton } from "./dom.js";
import { chooseFile, exportFile } from "./saving.js";

const IDLE = { "data-idle": "", disabled: true };

/** Fill the top bar and its menu; buttons marked idle wait until nothing is under way. */
export function makeToolbar(page) {
  const menu = byId("menu");
  const entry = (label, action, more = {}) =>
    el("button", { type: "button", onclick: () => (menu.hidePopover(), action()), ...more }, label);
  const themes = ["system", "light", "dark"].map((theme) => {
    const choice = el("input", {
      type: "radio",
      name: "theme",
      value: theme,
      checked: window.lapilliTheme.get() === theme,
      onchange: () => window.lapilliTheme.set(theme),
    });
    return el("label", {}, choice, theme[0].toUpperCase() + theme.slice(1));
  });
  menu.append(
    entry("Export conversation", () => exportFile(page), IDLE),
    entry("Import conversation", () => chooseFile(page), IDLE),
    entry("Keyboard", () => shortcuts()),
    el("fieldset", { class: "themes" }, el("legend", {}, "Colours"), themes),
  );
  const more = iconButton("more", "More", undefined, { id: "more" });
  more.popoverTargetElement = menu;
  byId("tools").append(
    iconButton("add", "New conversation", () => page.clear(), IDLE),
    iconButton("columns", "Side by side", () => page.compare(), { id: "compare", "aria-pressed": "false", ...IDLE }),
    iconButton("sliders", "Settings", () => page.settings && page.panel.toggle(), { id: "settings" }),
    more,
  );
}

// Light, dark or the system's choice, before anything is drawn. Not a module, so that the page never flashes.

"use strict";

(() => {
  const KEY = "lapilli.theme";
  const apply = (theme) => {
    document.documentElement.dataset.theme = theme;
  };
  const read = () => {
    try {
      return localStorage.getItem(KEY) ?? "system";
    } catch {
      return "system"; // a browser that lets this page keep nothing
    }
  };
  window.lapilliTheme = {
    get: () => document.documentElement.dataset.theme,
    set: (theme) => {
      apply(theme);
      try {
        localStorage.setItem(KEY, theme);
      } catch {
        // Then it lasts until the page is closed.
      }
    },
  };
  apply(read());
})();

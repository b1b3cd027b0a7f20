"use strict";
// Light or dark theme: that of the system until the button is pressed. Runs before the first paint.

const theme = (() => {
  const KEY = "segtrain-theme";
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = "";

  // Browsers may not offer local storage to pages opened from a file.
  try { chosen = localStorage.getItem(KEY) ?? ""; } catch { /* use the system's theme */ }

  const isDark = () => (chosen ? chosen === "dark" : system.matches);

  function apply() {
    if (chosen) document.documentElement.dataset.theme = chosen;
    document.getElementById("theme")?.setAttribute("aria-pressed", String(isDark()));
  }

  function toggle() {
    chosen = isDark() ? "light" : "dark";
    try { localStorage.setItem(KEY, chosen); } catch { /* kept for this visit only */ }
    apply();
  }

  system.addEventListener("change", apply);
  addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    button.hidden = false;
    button.addEventListener("click", toggle);
    apply();
  });
  apply();
})();

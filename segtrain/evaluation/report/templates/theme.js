"use strict";
// Light or dark: as the system says, until the button is pressed. Runs before anything is painted.

const theme = (() => {
  const KEY = "segtrain-theme";
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = "";

  // What was chosen is kept between visits, where the browser keeps anything for files.
  try { chosen = localStorage.getItem(KEY) ?? ""; } catch { /* it does not */ }

  const isDark = () => (chosen ? chosen === "dark" : system.matches);

  function apply() {
    if (chosen) document.documentElement.dataset.theme = chosen;
    document.getElementById("theme")?.setAttribute("aria-pressed", String(isDark()));
  }

  function toggle() {
    chosen = isDark() ? "light" : "dark";
    try { localStorage.setItem(KEY, chosen); } catch { /* only for this visit, then */ }
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

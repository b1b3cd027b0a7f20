"use strict";
// One picture large: truth left of a line, prediction right of it, and the line can be moved.

(() => {
  const find = (id) => document.getElementById(id);
  const viewer = find("viewer");
  const stage = find("stage");
  const wipe = find("wipe");
  const images = [...stage.querySelectorAll("img")];
  const layers = [...viewer.querySelectorAll("[data-layer]")];
  const HASH = /^#picture-(\d+)$/;

  let row = null;

  function show(next) {
    row = next;
    stage.style.setProperty("--ratio", row.width / row.height);
    for (const image of images) {
      image.width = row.width;
      image.height = row.height;
      image.src = gallery.file(row, image.dataset.kind);
    }
    images[0].alt = `Photo ${row.name}`;
    find("viewer-name").textContent = row.name;
    find("viewer-figures").textContent =
      `IoU ${gallery.percent(row.iou)}, ${gallery.wrong(row).join(", ")} of the frame; ` +
      `person ${gallery.percent(row.share)}`;
    const list = gallery.shown();
    const at = list.indexOf(row);
    find("viewer-place").textContent =
      at < 0 ? "" : `${(at + 1).toLocaleString("en")} of ${list.length.toLocaleString("en")}`;
    find("previous").disabled = at <= 0;
    find("next").disabled = at < 0 || at === list.length - 1;
    // The address leads back here, and the button "back" still leaves the page.
    history.replaceState(null, "", `#picture-${row.index}`);
    if (!viewer.open) viewer.showModal();
  }

  function step(by) {
    const list = gallery.shown();
    const at = list.indexOf(row);
    if (at >= 0 && list[at + by]) show(list[at + by]);
  }

  function moveLine(value) {
    wipe.value = value;
    stage.style.setProperty("--wipe", `${wipe.value}%`);
    wipe.setAttribute("aria-valuetext", `truth in the left ${wipe.value} per cent`);
  }

  function chooseLayers() {
    for (const box of layers) {
      stage.querySelector(`[data-kind="${box.dataset.layer}"]`).hidden = !box.checked;
      stage.classList.toggle(`with-${box.dataset.layer}`, box.checked);
    }
  }

  function openHash() {
    const index = Number(HASH.exec(location.hash)?.[1] ?? NaN);
    const wanted = gallery.rows.find((candidate) => candidate.index === index);
    if (wanted && wanted !== (viewer.open ? row : null)) show(wanted);
  }

  find("cards").addEventListener("click", (event) => {
    const button = event.target.closest("button[data-index]");
    if (button) show(gallery.rows.find((other) => other.index === Number(button.dataset.index)));
  });
  find("previous").addEventListener("click", () => step(-1));
  find("next").addEventListener("click", () => step(1));
  find("close").addEventListener("click", () => viewer.close());
  viewer.addEventListener("close", () => {
    history.replaceState(null, "", location.pathname + location.search);
    gallery.cardOf(row)?.focus();
  });
  // Beside the window is the dialog itself.
  viewer.addEventListener("click", (event) => {
    if (event.target === viewer) viewer.close();
  });
  viewer.addEventListener("keydown", (event) => {
    // The slider has arrow keys of its own.
    if (event.target === wipe || event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "ArrowLeft") step(-1);
    else if (event.key === "ArrowRight") step(1);
    else return;
    event.preventDefault();
  });

  wipe.addEventListener("input", () => moveLine(wipe.value));
  stage.addEventListener("pointerdown", (event) => {
    stage.setPointerCapture(event.pointerId);
    follow(event);
  });
  stage.addEventListener("pointermove", (event) => {
    if (stage.hasPointerCapture(event.pointerId)) follow(event);
  });
  function follow(event) {
    const { left, width } = stage.getBoundingClientRect();
    moveLine((100 * (event.clientX - left)) / width);
  }

  for (const box of layers) box.addEventListener("change", chooseLayers);
  addEventListener("hashchange", openHash);
  moveLine(50);
  chooseLayers();
  openHash();
})();

"use strict";
// The viewer: one large image, with ground truth left and prediction right of a movable divider.

(() => {
  const find = (id) => document.getElementById(id);
  const viewer = find("viewer");
  const stage = find("stage");
  const wipe = find("wipe");
  const images = [...stage.querySelectorAll("img")];
  const layers = [...viewer.querySelectorAll("[data-layer]")];
  const HASH = /^#image-(\d+)$/;

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
    find("viewer-metrics").textContent =
      `IoU ${gallery.percent(row.iou)}, ${gallery.errors(row).join(", ")} of the frame; ` +
      `person ${gallery.percent(row.person)}`;
    const list = gallery.shown();
    const at = list.indexOf(row);
    find("viewer-place").textContent =
      at < 0 ? "" : `${(at + 1).toLocaleString("en")} of ${list.length.toLocaleString("en")}`;
    find("previous").disabled = at <= 0;
    find("next").disabled = at < 0 || at === list.length - 1;
    // The address links to this image; replaceState keeps "back" leaving the page.
    history.replaceState(null, "", `#image-${row.index}`);
    if (!viewer.open) viewer.showModal();
  }

  function step(by) {
    const list = gallery.shown();
    const at = list.indexOf(row);
    if (at >= 0 && list[at + by]) show(list[at + by]);
  }

  function moveDivider(value) {
    wipe.value = value;
    stage.style.setProperty("--wipe", `${wipe.value}%`);
    wipe.setAttribute("aria-valuetext", `ground truth in the left ${wipe.value} percent`);
  }

  function showLayers() {
    for (const box of layers) {
      stage.querySelector(`[data-kind="${box.dataset.layer}"]`).hidden = !box.checked;
      stage.classList.toggle(`with-${box.dataset.layer}`, box.checked);
    }
  }

  function openHash() {
    const index = Number(HASH.exec(location.hash)?.[1] ?? NaN);
    const linked = gallery.rows.find((other) => other.index === index);
    if (linked && linked !== (viewer.open ? row : null)) show(linked);
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
  // A click on the backdrop targets the dialog itself.
  viewer.addEventListener("click", (event) => {
    if (event.target === viewer) viewer.close();
  });
  viewer.addEventListener("keydown", (event) => {
    // The slider handles the arrow keys itself.
    if (event.target === wipe || event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "ArrowLeft") step(-1);
    else if (event.key === "ArrowRight") step(1);
    else return;
    event.preventDefault();
  });

  wipe.addEventListener("input", () => moveDivider(wipe.value));
  stage.addEventListener("pointerdown", (event) => {
    stage.setPointerCapture(event.pointerId);
    follow(event);
  });
  stage.addEventListener("pointermove", (event) => {
    if (stage.hasPointerCapture(event.pointerId)) follow(event);
  });
  function follow(event) {
    const { left, width } = stage.getBoundingClientRect();
    moveDivider((100 * (event.clientX - left)) / width);
  }

  for (const box of layers) box.addEventListener("change", showLayers);
  addEventListener("hashchange", openHash);
  moveDivider(50);
  showLayers();
  openHash();
})();

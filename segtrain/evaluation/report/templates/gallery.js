"use strict";
// The gallery: sorts and filters the images, and adds their cards in batches.

const gallery = (() => {
  const CARDS_PER_BATCH = 48;
  const find = (id) => document.getElementById(id);
  const cards = find("cards");
  const more = find("more");
  const tools = find("tools");

  // Columns to rows. Names are untrusted: they are only ever set as text.
  const columns = JSON.parse(find("images-data").textContent);
  const rows = columns.index.map((index, at) => ({
    index,
    name: columns.name[at],
    iou: columns.iou[at],
    person: columns.person[at],
    falseNegatives: columns.false_negatives[at],
    falsePositives: columns.false_positives[at],
    width: columns.width[at],
    height: columns.height[at],
    slices: columns.slices.map((group) => group[at]),
  }));

  const collator = new Intl.Collator("en", { numeric: true });
  const ORDERS = {
    worst: (a, b) => a.iou - b.iou,
    best: (a, b) => b.iou - a.iou,
    "false-negatives": (a, b) => b.falseNegatives - a.falseNegatives,
    "false-positives": (a, b) => b.falsePositives - a.falsePositives,
    smallest: (a, b) => a.person - b.person,
    largest: (a, b) => b.person - a.person,
    name: (a, b) => collator.compare(a.name, b.name),
  };

  let shown = [];
  let layer = "errors";

  const file = (row, kind) =>
    `images/${row.index}-${kind}.${kind === "photo" || kind === "thumb" ? "jpg" : "png"}`;
  const percent = (value) => `${(100 * value).toFixed(1)}\u202f%`;
  const errors = (row) => [
    `false negatives ${percent(row.falseNegatives)}`,
    `false positives ${percent(row.falsePositives)}`,
  ];

  function filterAndSort() {
    const query = find("search").value.trim().toLowerCase();
    const filters = [...tools.querySelectorAll("[data-filter]")]
      .filter((select) => select.value !== "")
      .map((select) => [Number(select.dataset.filter), Number(select.value)]);
    return rows
      .filter((row) => filters.every(([group, slice]) => row.slices[group] === slice))
      .filter((row) => row.name.toLowerCase().includes(query))
      .sort((a, b) => ORDERS[find("order").value](a, b) || a.index - b.index);
  }

  function refresh() {
    shown = filterAndSort();
    cards.replaceChildren();
    addCards();
    const all = rows.length.toLocaleString("en");
    find("count").textContent =
      shown.length === rows.length
        ? `${all} ${rows.length === 1 ? "image" : "images"}`
        : `${shown.length.toLocaleString("en")} of ${all} images`;
  }

  function addCards(upTo = cards.childElementCount + CARDS_PER_BATCH) {
    const fragment = document.createDocumentFragment();
    for (const row of shown.slice(cards.childElementCount, upTo)) fragment.append(newCard(row));
    cards.append(fragment);
    more.hidden = cards.childElementCount >= shown.length;
  }

  function newCard(row) {
    const item = find("card").content.cloneNode(true).firstElementChild;
    const button = item.querySelector("button");
    button.dataset.index = row.index;
    item.querySelector(".name").textContent = row.name;
    item.querySelector(".name").title = row.name;
    item.querySelector(".iou").textContent = `IoU ${percent(row.iou)}`;
    const [falseNegatives, falsePositives] = item.querySelector(".errors").children;
    [falseNegatives.textContent, falsePositives.textContent] = errors(row);
    for (const image of item.querySelectorAll("img")) {
      image.width = row.width;
      image.height = row.height;
    }
    item.querySelector(".photo").src = file(row, "thumb");
    setLayer(item, row);
    return item;
  }

  // Show the selected layer on a card.
  function setLayer(item, row) {
    const image = item.querySelector(".layer");
    image.hidden = !layer;
    if (layer) image.src = file(row, layer);
  }

  function selectLayer(value) {
    layer = value;
    [...cards.children].forEach((item, at) => setLayer(item, shown[at]));
  }

  // Show only the images of a slice; called for the links of the table.
  function selectSlice(link) {
    tools.reset();
    const select = tools.querySelector(`[data-filter="${link.dataset.group}"]`);
    if (select) select.value = link.dataset.slice;
    refresh();
  }

  // The card of an image, added if necessary; null if the filters exclude the image.
  function cardOf(row) {
    const at = shown.indexOf(row);
    if (at >= cards.childElementCount) addCards(at + CARDS_PER_BATCH);
    return at < 0 ? null : cards.children[at].querySelector("button");
  }

  // Add cards when the end of the list comes near the viewport; the button is for keyboard users.
  new IntersectionObserver((entries, observer) => {
    if (!entries.some((entry) => entry.isIntersecting) || more.hidden) return;
    addCards();
    // Observe again, to be called even if the button has stayed in the viewport.
    observer.unobserve(more);
    observer.observe(more);
  }, { rootMargin: "600px" }).observe(more);
  more.addEventListener("click", () => {
    const first = cards.childElementCount;
    addCards();
    cards.children[first]?.querySelector("button").focus();
  });

  // The search box has no change listener: the event fires when a card is clicked, and a refresh
  // would remove that card.
  for (const select of tools.querySelectorAll("select")) select.addEventListener("change", refresh);
  find("search").addEventListener("input", refresh);
  tools.addEventListener("submit", (event) => event.preventDefault());
  // The fields are reset only after the event.
  tools.addEventListener("reset", () => setTimeout(refresh));
  for (const radio of document.querySelectorAll("[name=layer]")) {
    radio.addEventListener("change", () => selectLayer(radio.value));
  }
  for (const link of document.querySelectorAll("a[data-group]")) {
    link.addEventListener("click", () => selectSlice(link));
  }
  tools.hidden = false;
  document.querySelector(".status").hidden = false;
  refresh();

  return { rows, file, percent, errors, cardOf, shown: () => shown };
})();

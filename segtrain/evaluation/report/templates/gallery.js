"use strict";
// Which pictures are shown and in which order, and a card for each of them, a few at a time.

const gallery = (() => {
  const CARDS_AT_ONCE = 48;
  const find = (id) => document.getElementById(id);
  const cards = find("cards");
  const more = find("more");
  const tools = find("tools");

  // Columns → rows. Names come from strangers: they are only ever set as text.
  const columns = JSON.parse(find("pictures-data").textContent);
  const rows = columns.index.map((index, at) => ({
    index,
    name: columns.name[at],
    iou: columns.iou[at],
    share: columns.share[at],
    missed: columns.missed[at],
    invented: columns.invented[at],
    width: columns.width[at],
    height: columns.height[at],
    parts: columns.parts.map((part) => part[at]),
  }));

  const names = new Intl.Collator("en", { numeric: true });
  const ORDERS = {
    worst: (a, b) => a.iou - b.iou,
    best: (a, b) => b.iou - a.iou,
    missed: (a, b) => b.missed - a.missed,
    invented: (a, b) => b.invented - a.invented,
    smallest: (a, b) => a.share - b.share,
    largest: (a, b) => b.share - a.share,
    name: (a, b) => names.compare(a.name, b.name),
  };

  let shown = [];
  let layer = "errors";

  const file = (row, kind) =>
    `pictures/${row.index}-${kind}.${kind === "photo" || kind === "thumb" ? "jpg" : "png"}`;
  const percent = (value) => `${(100 * value).toFixed(1)}\u202f%`;
  const wrong = (row) => [`missed ${percent(row.missed)}`, `invented ${percent(row.invented)}`];

  function chosen() {
    const wanted = find("search").value.trim().toLowerCase();
    const filters = [...tools.querySelectorAll("[data-filter]")]
      .filter((select) => select.value !== "")
      .map((select) => [Number(select.dataset.filter), Number(select.value)]);
    return rows
      .filter((row) => filters.every(([group, part]) => row.parts[group] === part))
      .filter((row) => row.name.toLowerCase().includes(wanted))
      .sort((a, b) => ORDERS[find("order").value](a, b) || a.index - b.index);
  }

  function refresh() {
    shown = chosen();
    cards.replaceChildren();
    addCards();
    const all = rows.length.toLocaleString("en");
    find("count").textContent =
      shown.length === rows.length
        ? `${all} ${rows.length === 1 ? "picture" : "pictures"}`
        : `${shown.length.toLocaleString("en")} of ${all} pictures`;
  }

  function addCards(upTo = cards.childElementCount + CARDS_AT_ONCE) {
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
    const [missed, invented] = item.querySelector(".wrong").children;
    [missed.textContent, invented.textContent] = wrong(row);
    for (const image of item.querySelectorAll("img")) {
      image.width = row.width;
      image.height = row.height;
    }
    item.querySelector(".photo").src = file(row, "thumb");
    lay(item, row);
    return item;
  }

  // The layer chosen above the cards goes over one of them.
  function lay(item, row) {
    const image = item.querySelector(".layer");
    image.hidden = !layer;
    if (layer) image.src = file(row, layer);
  }

  function chooseLayer(value) {
    layer = value;
    [...cards.children].forEach((item, at) => lay(item, shown[at]));
  }

  // A link of the table of slices: only this part of this group.
  function chooseSlice(link) {
    tools.reset();
    const select = tools.querySelector(`[data-filter="${link.dataset.group}"]`);
    if (select) select.value = link.dataset.part;
    refresh();
  }

  // The card of a picture, made if it is not there yet; null where the filters leave it out.
  function cardOf(row) {
    const at = shown.indexOf(row);
    if (at >= cards.childElementCount) addCards(at + CARDS_AT_ONCE);
    return at < 0 ? null : cards.children[at].querySelector("button");
  }

  // What comes near the window gets its cards; the button serves where it is reached by Tab.
  new IntersectionObserver((entries, observer) => {
    if (!entries.some((entry) => entry.isIntersecting) || more.hidden) return;
    addCards();
    // Told again even if the button has not left the window.
    observer.unobserve(more);
    observer.observe(more);
  }, { rootMargin: "600px" }).observe(more);
  more.addEventListener("click", () => {
    const first = cards.childElementCount;
    addCards();
    cards.children[first]?.querySelector("button").focus();
  });

  // Not the change of the search box: it comes when a card is pressed, which must then stay.
  for (const select of tools.querySelectorAll("select")) select.addEventListener("change", refresh);
  find("search").addEventListener("input", refresh);
  tools.addEventListener("submit", (event) => event.preventDefault());
  // The fields have their first values only after the event.
  tools.addEventListener("reset", () => setTimeout(refresh));
  for (const radio of document.querySelectorAll("[name=layer]")) {
    radio.addEventListener("change", () => chooseLayer(radio.value));
  }
  for (const link of document.querySelectorAll("a[data-group]")) {
    link.addEventListener("click", () => chooseSlice(link));
  }
  tools.hidden = false;
  document.querySelector(".status").hidden = false;
  refresh();

  return { rows, file, percent, wrong, cardOf, shown: () => shown };
})();

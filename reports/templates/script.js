"use strict";
// Sorting and filters. Without this script the page says the same.
(() => {
  const make = (name, props) => Object.assign(document.createElement(name), props);

  // what a link or the address points at opens, with all that it lies in
  const open = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target || !target.closest("details")) return;
    for (let at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
    target.scrollIntoView();
  };
  addEventListener("hashchange", open);
  open();

  const order = (row, index) => {
    const cell = row.cells[index];
    if (!cell) return null;
    const text = (cell.dataset.value ?? cell.textContent).replace("−", "-").replace("< ", "");
    const number = parseFloat(text);
    return cell.classList.contains("num") ? (Number.isNaN(number) ? null : number) : text;
  };
  const sort = (table, index, head) => {
    const up = head.getAttribute("aria-sort") === "descending";
    table.querySelectorAll("[aria-sort]").forEach((th) => th.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    for (const body of table.tBodies) {
      const rows = [...body.rows].filter((row) => !row.classList.contains("rowgroup"));
      rows.sort((a, b) => {
        const [x, y] = [order(a, index), order(b, index)];
        if (x === null || y === null) return (x === null) - (y === null);
        const sign = x < y ? -1 : x > y ? 1 : 0;
        return up ? sign : -sign;
      });
      body.append(...rows);
    }
  };

  // header cells in the order of the columns, whichever of the two header rows they stand in
  const heads = (table) => {
    const [first, second] = table.tHead.rows;
    if (!second) return [...first.cells];
    const lower = [...second.cells];
    return [...first.cells].flatMap((th) => (th.rowSpan > 1 ? [th] : lower.splice(0, th.colSpan)));
  };

  for (const table of document.querySelectorAll("table.sortable")) {
    heads(table).forEach((head, index) => {
      const button = make("button", { type: "button", className: "sort", title: "Sort" });
      button.append(...head.childNodes);
      button.addEventListener("click", () => sort(table, index, head));
      head.append(button);
    });
  }

  // tables that have room enough do not say that they scroll
  const room = () => document.querySelectorAll(".swipe").forEach((told) => {
    const box = told.nextElementSibling;
    told.hidden = box.scrollWidth <= box.clientWidth;
  });
  addEventListener("resize", room);
  room();

  const filter = (name, items, before) => {
    const box = make("p", { className: "tools" });
    const input = make("input", { type: "search", placeholder: "Filter " + name });
    input.setAttribute("aria-label", "Filter " + name);
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const [item, text] of items) item.hidden = !words.every((word) => text.includes(word));
    });
    box.append(input);
    before.before(box);
  };
  const texts = (selector, part) => [...document.querySelectorAll(selector)].map(
    (item) => [item, (part(item)).textContent.toLowerCase()]);
  const records = texts("details.record", (item) => item.querySelector("summary"));
  if (records.length) filter("records", records, records[0][0]);
  const values = texts("table.values tbody tr", (item) => item);
  if (values.length) filter("values", values, document.querySelector("#values .scroll"));
})();

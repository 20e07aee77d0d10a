"use strict";
// Without this script the page shows the same; with it, tables sort and filter.
for (const table of document.querySelectorAll("table:not([data-fixed])")) {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  if (rows.length < 2) continue;
  const heads = [...table.tHead.rows[0].cells];
  const key = (row, column) => {
    const cell = row.cells[column];
    if (cell.dataset.value === undefined) return cell.textContent.trim();
    return cell.dataset.value === "" ? NaN : Number(cell.dataset.value);
  };
  const compare = (one, two) => {
    if (typeof one === "string") return one.localeCompare(two, undefined, { numeric: true });
    return one - two;
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const numeric = head.classList.contains("number");
      const first = numeric ? "descending" : "ascending";
      const other = numeric ? "ascending" : "descending";
      const order = head.getAttribute("aria-sort") === first ? other : first;
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const empty = (value) => Number.isNaN(value); // what has no number stays at the end
      const sorted = [...rows].sort((a, b) => {
        const one = key(a, column), two = key(b, column);
        if (empty(one) || empty(two)) return empty(one) - empty(two);
        return sign * compare(one, two);
      });
      body.append(...sorted);
    });
  });
  if (rows.length < 5) continue;
  const figure = table.closest("figure");
  const bar = document.createElement("div");
  bar.className = "bar";
  const title = figure.querySelector("h3");
  if (title) bar.append(title);
  const input = document.createElement("input");
  input.type = "search";
  input.placeholder = "Filter rows";
  input.setAttribute("aria-label", "Filter rows");
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  });
  bar.append(input);
  figure.prepend(bar);
}

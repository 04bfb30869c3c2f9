"use strict";
// Sorting the table and choosing the example shown: without this, the page shows everything in its first order.
(() => {
  const table = document.querySelector("table.sortable");
  const body = table.tBodies[0];
  const headers = [...table.tHead.rows[1].cells];

  const compare = (column, words) => (one, other) => {
    const a = one.cells[column], b = other.cells[column];
    if (words) return a.textContent.localeCompare(b.textContent, "en");
    return Number(a.dataset.value) - Number(b.dataset.value);
  };

  const sort = (column) => {
    const header = headers[column];
    const words = header.classList.contains("words");
    const descending = header.getAttribute("aria-sort") === "ascending";
    const rows = [...body.rows];
    // what was not measured comes last in both directions
    const known = rows.filter((row) => words || "value" in row.cells[column].dataset);
    const unknown = rows.filter((row) => !known.includes(row));
    known.sort(compare(column, words));
    if (descending) known.reverse();
    body.append(...known, ...unknown);
    headers.forEach((other) => other.removeAttribute("aria-sort"));
    header.setAttribute("aria-sort", descending ? "descending" : "ascending");
  };

  headers.forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = header.textContent;
    button.addEventListener("click", () => sort(column));
    header.replaceChildren(button);
  });
  document.querySelectorAll(".needs-script").forEach((found) => { found.hidden = false; });

  const picker = document.querySelector(".picker");
  if (!picker) return;
  const select = picker.querySelector("select");
  const examples = [...document.querySelectorAll(".example")];
  const show = () => examples.forEach((example, number) => { example.hidden = number !== select.selectedIndex; });
  select.addEventListener("change", show);
  picker.querySelectorAll("button").forEach((button) => {
    button.addEventListener("click", () => {
      const count = examples.length;
      select.selectedIndex = (select.selectedIndex + Number(button.dataset.step) + count) % count;
      show();
    });
  });
  picker.hidden = false;
  show();
})();

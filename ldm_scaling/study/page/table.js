"use strict";
// Sorting and filtering of the record table; the rows themselves are in the page.
{
  const table = document.getElementById("records-table");
  const body = table.tBodies[0], rows = [...body.rows];
  const selects = [...document.querySelectorAll("#records-controls select")];
  const search = document.getElementById("records-search");
  const count = document.getElementById("records-count");
  const heads = [...table.tHead.rows[0].cells].map((head) => head.textContent);
  const told = (cell) => ({ value: cell.dataset.value.toLowerCase(),
    text: cell.firstChild ? cell.firstChild.textContent.trim().toLowerCase() : "" });
  const cells = new Map(rows.map((row) => [row, [...row.cells].map(told)]));
  const names = new Intl.Collator();
  const sizes = new Set([...cells.values()].map((row) => row[heads.indexOf("size")].value));

  /** Whether one word of the search is of a cell: a number is its number, a name's beginning a size
      (the whole of one that is a size), any part a sampler or spacing. */
  function fit(word, { value, text }, head) {
    if (head === "size") return sizes.has(word) ? value === word : value.startsWith(word) && !(word > 0);
    if (head === "record") return word.length > 3 && value.startsWith(word);
    const number = !Number.isNaN(Number(word));
    if (head === "sampler" || head === "spacing") return !number && `${text} ${value}`.includes(word);
    return text === word || (number && value !== ""
      && (Number(value) === Number(word) || (word.includes(".") && text.startsWith(word))));
  }

  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const fits = selects.every((s) => !s.value || row.dataset[s.dataset.column] === s.value)
        && words.every((w) => cells.get(row).some((cell, k) => fit(w, cell, heads[k])));
      row.hidden = !fits;
      shown += fits;
    }
    count.textContent = `${shown} of ${rows.length} records`;
  }

  function sort(head) {
    const k = head.cellIndex;
    const rising = head.getAttribute("aria-sort") !== "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const keys = new Map(rows.map((row) => [row, cells.get(row)[k].value]));
    const order = (a, b) => {
      const [x, y] = [keys.get(a), keys.get(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const numbers = !Number.isNaN(Number(x)) && !Number.isNaN(Number(y));
      const less = numbers ? Number(x) - Number(y) : names.compare(x, y);
      return rising ? less : -less;
    };
    body.replaceChildren();  // Moved one by one, 10,000 take half a minute.
    body.append(...rows.sort(order));
  }

  for (const head of table.tHead.rows[0].cells) {
    head.querySelector("button").addEventListener("click", () => sort(head));
  }
  for (const control of [...selects, search]) control.addEventListener("input", filter);
  filter();
}

"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const first = Array.from(body.rows);
  const heads = Array.from(table.tHead.rows[0].cells);
  const keyed = (row, column) => {
    const cell = row.cells[column];
    const key = cell.dataset.key;
    return key === undefined ? cell.textContent.trim() : key === "" ? null : Number(key);
  };
  const compared = (one, other) =>
    typeof one === "number" ? one - other : one.localeCompare(other, undefined, { numeric: true });
  const arranged = (column, way) => {
    const rows = first.map((row) => [row, keyed(row, column)]);
    const there = rows.filter(([, key]) => key !== null).sort(([, one], [, other]) => way * (compared(one, other) || 0));
    return there.concat(rows.filter(([, key]) => key === null)).map(([row]) => row);
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const was = head.getAttribute("aria-sort");
      const now = was === null ? "ascending" : was === "ascending" ? "descending" : null;
      for (const other of heads) other.removeAttribute("aria-sort");
      if (now !== null) head.setAttribute("aria-sort", now);
      body.append(...(now === null ? first : arranged(column, now === "ascending" ? 1 : -1)));
    });
  });
}

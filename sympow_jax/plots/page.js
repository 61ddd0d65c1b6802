// A click, or Enter, on a head of a table of class "sortable" sorts its rows by that column; again, the other way round.
for (const table of document.querySelectorAll(".sortable table")) {
  const heads = [...table.querySelectorAll("th")], body = table.querySelector("tbody");
  const text = (row, column) => (row.cells[column].firstChild?.textContent ?? "").replaceAll(",", "");
  heads.forEach((head, column) => {
    const sort = () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
      const compare = (a, b) => {
        const [x, y] = [text(a, column), text(b, column)], [p, q] = [parseFloat(x), parseFloat(y)];
        if (Number.isNaN(p) !== Number.isNaN(q)) return Number.isNaN(p) ? 1 : -1;
        return sign * (Number.isNaN(p) ? x.localeCompare(y) : p - q);
      };
      body.append(...[...body.rows].sort(compare));
    };
    head.tabIndex = 0;
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
  });
}

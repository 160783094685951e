for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up > 0 ? "ascending" : "descending");
    const key = (row) => {
      const { dataset, textContent } = row.cells[column];
      return "n" in dataset ? Number(dataset.n) : textContent;
    };
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1;
      return up * (typeof x === "number" ? x - y : x.localeCompare(y));
    };
    table.classList.add("sorted");
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  }));
}

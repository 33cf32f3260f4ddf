// A click on a column's title sorts the table's rows by it, a second one the other way round.
for (const button of document.querySelectorAll("th button")) {
  const title = button.parentElement;
  button.addEventListener("click", () => {
    const rising = title.ariaSort !== "ascending";
    for (const other of title.parentElement.children) other.ariaSort = null;
    title.ariaSort = rising ? "ascending" : "descending";
    const body = title.closest("table").tBodies[0];
    const key = (row) => {
      const words = row.cells[title.cellIndex]?.dataset.key ?? "";
      return words !== "" && !isNaN(words) ? Number(words) : words;
    };
    const compared = (a, b) => {
      if (typeof a === typeof b) return a < b ? -1 : a > b ? 1 : 0;
      return typeof a === "number" ? -1 : 1;
    };
    const rows = [...body.rows].sort((a, b) => {
      const [one, other] = [key(a), key(b)];
      if (one === "" || other === "") return (one === "") - (other === "");
      return rising ? compared(one, other) : compared(other, one);
    });
    body.classList.add("sorted");
    body.append(...rows);
  });
}

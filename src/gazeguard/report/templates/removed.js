// The table of removed rows.

function suspicionText(value) {
  if (value === null) return "–";
  return value > 0.999 && value < 1 ? "> 0.999" : value.toFixed(3);
}

function removedRow(row) {
  const bar = make("meter", { min: 0, max: 1, value: row.suspicion ?? 0, "aria-hidden": "true" });
  return tableRow(
    row,
    make("td", { role: "cell", class: "c-suspicion" }, make("span", {}, suspicionText(row.suspicion)), bar),
    make("td", { role: "cell", class: "c-score" }, row.score === null ? "–" : row.score.toFixed(2).replace("-", "−")),
  );
}
startTable(removedRow, "suspicion");

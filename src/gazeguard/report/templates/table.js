// A table over the embedded rows: filter, sort and pages. `makeRow` gives a row its cells.
const PAGE_ROWS = 25;

// A row's number, with the turn where it has several answers.
function rowName(row) {
  return row.turn ? `${whole.format(row.row)}, turn ${row.turn}` : whole.format(row.row);
}

function imageCell(row) {
  const image = row.image
    ? make("img", { src: row.image, alt: `Image of row ${rowName(row)}` })
    : make("span", { class: "no-image" }, "no image");
  const file = row.file ? make("bdi", { class: "file muted" }, row.file) : "";
  return make("td", { role: "cell", class: "c-image" }, image, file);
}

function numberCell(row) {
  const id = row.id ? make("code", { class: "muted", title: row.id }, row.id.slice(0, 8)) : "";
  return make("th", { role: "rowheader", scope: "row", class: "c-row" }, rowName(row), id);
}

function textCell(kind, text, missing) {
  const words = make("bdi", text ? {} : { class: "muted" }, text || missing);
  const cell = make("td", { role: "cell", class: `c-${kind}` }, make("div", { class: "clamp" }, words));
  if (text.length > 140) cell.title = text;
  return cell;
}

function tableRow(row, ...own) {
  return make(
    "tr", { role: "row" },
    imageCell(row),
    numberCell(row),
    textCell("prompt", row.prompt, "(no prompt)"),
    textCell("answer", row.answer, "(no answer)"),
    ...own,
  );
}

function startTable(makeRow, key) {
  const body = byId("rows");
  if (!body) return;
  const filter = byId("filter");
  const outcome = byId("outcome"); // not on every page
  const [previous, next] = [byId("previous"), byId("next")];
  const texts = new Map(DATA.rows.map((row) => [row, `${row.prompt}\n${row.answer}\n${row.file ?? ""}\n${row.id}`.toLocaleLowerCase()]));
  const state = { key, ascending: false, page: 0 };

  function matching() {
    const wanted = filter.value.trim().toLocaleLowerCase();
    const number = wanted.replaceAll(",", "");
    const rows = DATA.rows.filter(
      (row) => (!outcome?.value || row.outcome === outcome.value)
        && (!wanted || texts.get(row).includes(wanted) || `${row.row}` === number),
    );
    const sign = state.ascending ? 1 : -1;
    return rows.sort((a, b) => sign * ((a[state.key] ?? -1) - (b[state.key] ?? -1)) || (a.score ?? 0) - (b.score ?? 0) || a.row - b.row || (a.turn ?? 0) - (b.turn ?? 0));
  }

  function update() {
    const rows = matching();
    const pages = Math.max(1, Math.ceil(rows.length / PAGE_ROWS));
    state.page = Math.min(state.page, pages - 1);
    const first = state.page * PAGE_ROWS;
    body.replaceChildren(...rows.slice(first, first + PAGE_ROWS).map(makeRow));
    byId("no-match").hidden = rows.length > 0;
    byId("page").textContent = `Page ${whole.format(state.page + 1)} of ${whole.format(pages)}`;
    byId("found").textContent = filter.value.trim() || outcome?.value
      ? `${whole.format(rows.length)} of ${whole.format(DATA.rows.length)} rows match`
      : `${whole.format(rows.length)} ${rows.length === 1 ? "row" : "rows"}`;
    // aria-disabled keeps the focus where it is when the last page is reached.
    previous.setAttribute("aria-disabled", `${state.page === 0}`);
    next.setAttribute("aria-disabled", `${state.page >= pages - 1}`);
    for (const button of document.querySelectorAll("[data-sort]")) {
      const order = state.ascending ? "ascending" : "descending";
      button.closest("th").setAttribute("aria-sort", button.dataset.sort === state.key ? order : "none");
    }
  }

  function turn(by, button) {
    if (button.getAttribute("aria-disabled") === "true") return;
    state.page += by;
    update();
  }

  for (const button of document.querySelectorAll("[data-sort]")) {
    button.addEventListener("click", () => {
      const same = state.key === button.dataset.sort;
      state.ascending = same ? !state.ascending : button.dataset.sort === "row";
      state.key = button.dataset.sort;
      state.page = 0;
      update();
    });
  }
  for (const control of [filter, outcome]) {
    control?.addEventListener("input", () => {
      state.page = 0;
      update();
    });
  }
  previous.addEventListener("click", () => turn(-1, previous));
  next.addEventListener("click", () => turn(1, next));
  update();
}

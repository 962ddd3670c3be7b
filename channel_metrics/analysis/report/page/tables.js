// Tables: sorted by a column, searched together with the legend, small curves in the rows.
const cellValue = (cell) => {
  const value = cell.dataset.value;
  return value === undefined ? cell.textContent.trim() : value === "" ? null : Number(value);
};

const compare = (a, b, sign) => {
  if (a === null || b === null) return (a === null) - (b === null); // Without a value: last.
  return sign * (typeof a === "number" ? a - b : a.localeCompare(b));
};

for (const table of findAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    button?.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => compare(cellValue(a.cells[column]), cellValue(b.cells[column]), sign));
      table.tBodies[0].append(...rows);
    });
  });
}

// Of the texts and tables, those of the channels or of the chosen axis.
const showAxis = () => {
  for (const part of findAll("[data-axis]")) part.hidden = part.dataset.axis !== state.axis;
};

const filterTables = () => {
  for (const row of findAll("tr[data-channel]")) row.hidden = !matches(Number(row.dataset.channel));
};

const drawSpark = (cell) => {
  sparks.unobserve(cell);
  const own = DATA.curves.filter(
    (curve) =>
      curve.metric === "loss" &&
      curve.split === "train" &&
      curve.channel === Number(cell.dataset.spark) &&
      curve.run === Number(cell.dataset.run),
  );
  const curve = own.find((c) => c.smooth === 2) ?? own[0];
  if (!curve) return;
  const values = curve.values.filter((value) => value !== null);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const [first, last] = [curve.steps[0], curve.steps.at(-1)];
  const svg = drawn("svg", { width: 96, height: 24, class: "spark", "aria-hidden": "true" });
  const x = (step) => 2 + (92 * (step - first)) / (last - first || 1);
  const y = (value) => 21 - (18 * (value - low)) / (high - low || 1);
  svg.append(drawn("path", { d: sparkPath(curve, x, y) }));
  cell.replaceChildren(svg);
};

const sparkPath = (curve, x, y) => {
  let pen = false;
  return curve.steps
    .map((step, i) => {
      const value = curve.values[i];
      const part = value === null ? "" : `${pen ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`;
      pen = value !== null;
      return part;
    })
    .join("");
};

// Many small curves take a while: drawn when they come into view.
const sparks = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (isIntersecting) drawSpark(target);
  }
});
for (const cell of findAll("[data-spark]")) sparks.observe(cell);
addEventListener("beforeprint", () => findAll("[data-spark]:empty").forEach(drawSpark));

for (const button of findAll("button[data-isolate]")) {
  button.addEventListener("click", () => {
    const channel = Number(button.dataset.isolate);
    if (state.isolated !== channel) isolate(channel);
    find("#curves").scrollIntoView();
    find(".plot").focus({ preventScroll: true });
  });
}

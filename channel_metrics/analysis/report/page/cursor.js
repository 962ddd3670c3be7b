// What the cursor of a chart reads, and how it is shown.
const nearest = (sorted, value) => {
  let [low, high] = [0, sorted.length - 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low > 0 && value - sorted[low - 1] < sorted[low] - value ? low - 1 : low;
};

const cursorTitle = (at) => X_AXES[state.x].say(at);

// The values of all curves near `at`, the highest first; those without a point near it are left out.
const readAt = (chart, at) => {
  const [low, high] = chart.x.domain;
  let places = chart.curves.map((curve) => ({ curve, i: nearest(positions(curve), at) }));
  const distance = ({ curve, i }) => Math.abs(positions(curve)[i] - at);
  const first = places.reduce((a, b) => (distance(b) < distance(a) ? b : a));
  const exact = positions(first.curve)[first.i];
  places = chart.curves.map((curve) => ({ curve, i: nearest(positions(curve), exact) }));
  const near = places.filter(
    ({ curve, i }) =>
      Math.abs(positions(curve)[i] - exact) <= (high - low) / 60 &&
      isOn(chart.x, positions(curve)[i]) &&
      drawable(curve.values[i], chart.y),
  );
  return near
    .sort((a, b) => b.curve.values[b.i] - a.curve.values[a.i])
    .map(({ curve, i }) => ({
      at: exact,
      curve,
      value: curve.values[i],
      label: curveLabel(curve),
      text: chart.percent ? asPercent(curve.values[i]) : asNumber(curve.values[i]),
    }));
};

const curveLabel = (curve) => {
  const parts = [nameOf(curve.channel)];
  if (curve.split !== "train") parts.push(curve.split);
  if (curve.estimate) parts.push("estimated");
  if (curve.overwritten) parts.push("before the resume");
  if (DATA.runs.length > 1) parts.push(DATA.runs[curve.run]);
  return parts.join(" · ");
};

const drawCursor = (chart, read) => {
  const x = chart.x(read[0].at);
  const { top, bottom } = chart.area;
  chart.mark.append(drawn("line", { x1: x, x2: x, y1: top, y2: bottom }));
  for (const { curve, value } of read) {
    chart.mark.append(drawn("circle", { class: colorOf(curve.channel), cx: x, cy: chart.y(value), r: 3.5 }));
  }
  const [low, high] = chart.x.domain;
  const near = marksNow().filter((mark) => Math.abs(mark.at - read[0].at) <= (high - low) / 120);
  const events = [...new Set(near.map((mark) => mark.text))].slice(0, MAX_READ);
  const rows = read.slice(0, MAX_READ).map(({ curve, label, text }) =>
    element(
      "li",
      {},
      element("span", { class: `swatch ${colorOf(curve.channel)}` }),
      element("bdi", {}, cutName(label, 40)),
      element("b", {}, text),
    ),
  );
  if (read.length > MAX_READ) rows.push(element("li", { class: "more" }, `and ${read.length - MAX_READ} more`));
  for (const text of events) rows.push(element("li", { class: "more" }, element("bdi", {}, cutName(text, 40))));
  chart.tip.replaceChildren(element("strong", {}, cursorTitle(read[0].at)), element("ul", {}, ...rows));
  chart.tip.hidden = false;
  const room = chart.plot.clientWidth - chart.tip.offsetWidth - 4;
  const side = x > chart.plot.clientWidth / 2 ? x - chart.tip.offsetWidth - 14 : x + 14;
  chart.tip.style.transform = `translate(${Math.max(0, Math.min(room, side))}px, 8px)`;
};

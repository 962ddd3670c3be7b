// Curves as SVG paths.
// The curves of one metric that are to be drawn now; smooth ones beside what they are made of.
const curvesNow = (metric) => {
  const channels = new Set(visible());
  channels.add(WHOLE_RUN); // It has no tokens of its own, so it is drawn over steps only.
  const chosen = DATA.curves.filter(
    (curve) =>
      curve.metric === metric &&
      channels.has(curve.channel) &&
      state.runs.has(curve.run) &&
      state.splits.has(curve.split) &&
      positions(curve) &&
      (!curve.smooth || curve.smooth === state.smooth),
  );
  if (!state.difference) return chosen;
  return differences(chosen.filter((curve) => !curve.overwritten && !hasSmoothTwin(curve, chosen)));
};

const hasSmoothTwin = (curve, curves) =>
  !curve.smooth &&
  curves.some(
    (other) =>
      other.smooth &&
      other.run === curve.run &&
      other.channel === curve.channel &&
      other.split === curve.split,
  );

const drawable = (value, scale) => value !== null && (!scale.log || value > 0);
const isOn = (scale, at) => !scale.log || at > 0;

const linePath = (curve, x, y) => {
  const at = positions(curve);
  let path = "";
  let pen = false;
  for (let i = 0; i < at.length; i++) {
    const value = curve.values[i];
    if (!drawable(value, y) || !isOn(x, at[i])) {
      pen = false;
      continue;
    }
    path += `${pen ? "L" : "M"}${x(at[i]).toFixed(1)} ${y(value).toFixed(1)}`;
    pen = true;
  }
  return path;
};

const bandPath = (curve, x, y) => {
  const at = positions(curve);
  const top = [];
  const bottom = [];
  for (let i = 0; i < at.length; i++) {
    if (!drawable(curve.low[i], y) || !drawable(curve.high[i], y) || !isOn(x, at[i])) continue;
    top.push(`${x(at[i]).toFixed(1)} ${y(curve.high[i]).toFixed(1)}`);
    bottom.unshift(`${x(at[i]).toFixed(1)} ${y(curve.low[i]).toFixed(1)}`);
  }
  return top.length > 1 ? `M${[...top, ...bottom].join("L")}Z` : "";
};

const MAX_MARKS = 60;
const MAX_RAW = 12;
const MAX_CLEAR = 600;

// Draws the curves into a group.
const drawCurves = (group, curves, x, y) => {
  const count = new Set(curves.map((curve) => curve.channel)).size;
  const several = count > MAX_RAW;
  const crowded = count > 2 * MAX_RAW;
  const raws = new Set(curves.filter((curve) => curve.overwritten || hasSmoothTwin(curve, curves)));
  const own = curves.filter((curve) => !raws.has(curve));
  // What says most is drawn last: smooth over raw, the whole run over its channels.
  own.sort((a, b) => (a.channel === WHOLE_RUN) - (b.channel === WHOLE_RUN));
  for (const curve of [...raws, ...own]) {
    const raw = raws.has(curve);
    if (raw && several) continue;
    const classes = ["line", colorOf(curve.channel), `run${curve.run}`];
    if (raw) classes.push("raw");
    if (curve.overwritten) classes.push("overwritten");
    if (crowded && curve.channel !== WHOLE_RUN) classes.push("thin");
    if (raw && curve.steps.length > MAX_CLEAR) classes.push("dense");
    if (curve.split !== "train") classes.push("other");
    if (curve.low) {
      group.append(drawn("path", { class: `band ${colorOf(curve.channel)}`, d: bandPath(curve, x, y) }));
    }
    const path = drawn("path", { class: classes.join(" "), d: linePath(curve, x, y) });
    path.dataset.channel = curve.channel;
    group.append(path);
    if (curve.split === "train" && lonePoints(curve).length === 0) continue;
    const marked = curve.split === "train" ? lonePoints(curve) : [...curve.values.keys()];
    if (marked.length > MAX_MARKS) continue;
    for (const i of marked) {
      if (!drawable(curve.values[i], y) || !isOn(x, positions(curve)[i])) continue;
      const [cx, cy] = [x(positions(curve)[i]).toFixed(1), y(curve.values[i]).toFixed(1)];
      group.append(drawn("circle", { class: `mark ${colorOf(curve.channel)}`, cx, cy, r: 3 }));
    }
  }
};

// Points between two breaks, of which a path would show nothing.
const lonePoints = (curve) => {
  const lone = [];
  const there = (i) => curve.values[i] !== null && curve.values[i] !== undefined;
  for (let i = 0; i < curve.values.length; i++) {
    if (there(i) && !there(i - 1) && !there(i + 1)) lone.push(i);
  }
  return lone;
};

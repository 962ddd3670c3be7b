// Which curves are drawn, and how each looks.
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
  const raws = rawOf(chosen);
  return differences(chosen.filter((curve) => !curve.overwritten && !raws.has(curve)));
};

// The curves of one metric that stand behind a smooth one.
const rawOf = (curves) => {
  const twin = (curve) => `${curve.run} ${curve.channel} ${curve.split}`;
  const smooth = new Set(curves.filter((curve) => curve.smooth).map(twin));
  return new Set(curves.filter((curve) => !curve.smooth && smooth.has(twin(curve))));
};

const MAX_MARKS = 60;
const MAX_RAW = 12;
const MAX_CLEAR = 600;

// Draws the curves into a group.
const drawCurves = (group, curves, x, y) => {
  const count = new Set(curves.map((curve) => curve.channel)).size;
  const several = count > MAX_RAW;
  const crowded = count > 2 * MAX_RAW;
  const raws = rawOf(curves);
  for (const curve of curves) if (curve.overwritten) raws.add(curve);
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

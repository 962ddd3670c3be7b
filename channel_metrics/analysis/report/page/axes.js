// What stands around the curves: ticks, marks, and the configured shares.
const drawAxes = (chart) => {
  const group = drawn("g", { class: "axes" });
  const { left, right, top, bottom } = chart.area;
  const [floor, roof] = chart.y.domain;
  const across = acrossTicks(chart);
  const xAxis = X_AXES[state.x];
  const up = chart.log ? logTicks(floor, roof) : linearTicks(floor, roof, (bottom - top) / 48).ticks;
  const step = chart.log ? null : linearTicks(floor, roof, (bottom - top) / 48).step;
  const text = chart.log ? (value) => String(value) : tickText(chart.percent, step);
  for (const tick of up) {
    const y = Math.round(chart.y(tick)) + 0.5;
    group.append(drawn("line", { class: tick === 0 ? "base" : "grid", x1: left, x2: right, y1: y, y2: y }));
    group.append(drawn("text", { class: "tick", x: left - 8, y: y + 4, "text-anchor": "end" }, text(tick)));
  }
  for (const tick of across) {
    const x = Math.round(chart.x(tick)) + 0.5;
    group.append(drawn("line", { class: "base", x1: x, x2: x, y1: bottom, y2: bottom + 4 }));
    group.append(drawn("text", { class: "tick", x, y: bottom + 18, "text-anchor": "middle" }, xAxis.tick(tick, chart.x.domain[1])));
  }
  group.append(drawn("text", { class: "title", x: right, y: bottom + 35, "text-anchor": "end" }, xAxis.title));
  return group;
};

const acrossTicks = (chart) => {
  const [low, high] = chart.x.domain;
  const { left, right } = chart.area;
  if (state.logX && high / low > 3) {
    const ticks = logTicks(low, high);
    const every = Math.ceil(ticks.length / Math.max(1, (right - left) / 70));
    return ticks.filter((_, i) => i % every === 0);
  }
  const [unit] = state.x === "time" ? timeUnit(high) : [1];
  const { ticks } = linearTicks(low / unit, high / unit, (right - left) / 72, X_AXES[state.x].least);
  return ticks.map((tick) => tick * unit);
};

// Where the job was resumed, alerted or evaluated.
const drawEvents = (chart) => {
  const group = drawn("g", { class: "events" });
  const [low, high] = chart.x.domain;
  const { top, bottom } = chart.area;
  for (const { kind, at } of marksNow()) {
    if (at < low || at > high || !isOn(chart.x, at)) continue;
    const x = chart.x(at).toFixed(1);
    group.append(drawn("path", { class: `event ${kind}`, d: `M${x} ${kind === "evaluation" ? bottom - 6 : top}V${bottom}` }));
  }
  return group;
};

// The configured shares of what is drawn, which stand beside those that were reached.
const planNow = (chart) =>
  chart.metric !== "mix" || state.difference
    ? []
    : [...state.runs].flatMap((run) =>
        visible()
          .map((channel) => ({ channel, share: DATA.plan[run][channel] }))
          .filter(({ share }) => share != null),
      );

const drawPlan = (chart) => {
  const group = drawn("g", { class: "plans" });
  const { left, right } = chart.area;
  const [floor, roof] = chart.y.domain;
  for (const { channel, share } of planNow(chart)) {
    if (share < floor || share > roof) continue;
    group.append(drawn("path", { class: `line plan ${colorOf(channel)}`, d: `M${left} ${chart.y(share).toFixed(1)}H${right}` }));
  }
  return group;
};

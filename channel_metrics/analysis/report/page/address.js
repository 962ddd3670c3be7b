// What is chosen stands in the address, so that a view can be sent: #x=tokens&smooth=3&channels=0.2
const SETTINGS = {
  x: [() => state.x, (text) => (state.x = Object.hasOwn(X_AXES, text) && hasAxis(text) ? text : state.x)],
  logx: [() => state.logX, (text) => (state.logX = text === "true")],
  log: [() => state.log, (text) => (state.log = text === "true")],
  zero: [() => state.fromZero, (text) => (state.fromZero = text === "true")],
  smooth: [() => state.smooth, (text) => (state.smooth = Math.min(3, Math.max(0, Number(text) || 0)))],
  minus: [() => state.difference, (text) => (state.difference = severalRuns && text === "true")],
  marks: [() => state.marks, (text) => (state.marks = text === "true")],
  zoom: [() => state.zoom?.join("..") ?? "", (text) => (state.zoom = range(text))],
  runs: [() => [...state.runs].join("."), (text) => (state.runs = new Set(indices(text, DATA.runs.length)))],
  splits: [() => [...state.splits].join("."), (text) => (state.splits = new Set(text.split(".").filter((split) => splits.includes(split))))],
  of: [() => state.axis, (text) => (state.axis = DATA.label_axes.includes(text) ? text : "")],
  order: [() => state.order, (text) => (state.order = Object.hasOwn(ORDERS, text) ? text : state.order)],
  top: [() => (state.top === Infinity ? "all" : state.top), (text) => (state.top = text === "all" ? Infinity : [5, 8, 16, 32].find((count) => count === Number(text)) ?? NUM_COLORS)],
  find: [() => state.query, (text) => (state.query = text)],
  channels: [() => [...state.shown].join("."), (text) => (state.shown = new Set(indices(text, DATA.channels.length)))],
  only: [() => state.isolated ?? "", (text) => (state.isolated = indices(text, DATA.channels.length)[0] ?? null)],
};
const range = (text) => {
  const ends = text.split("..").map(Number);
  return ends.length === 2 && ends.every(Number.isFinite) && ends[0] < ends[1] ? ends : null;
};
const indices = (text, count) =>
  text === "" ? [] : text.split(".").map(Number).filter((i) => Number.isInteger(i) && i >= 0 && i < count);

const readAll = () => Object.fromEntries(Object.entries(SETTINGS).map(([name, [read]]) => [name, String(read())]));
const usual = readAll();

const address = () => {
  const now = readAll();
  const parts = Object.keys(now).filter((name) => now[name] !== usual[name]).map((name) => [name, now[name]]);
  for (const [metric, ends] of Object.entries(state.zoomY)) parts.push([`y.${metric}`, ends.join("..")]);
  for (const chart of charts) if (chart.isExtra) parts.push(["chart", chart.metric]);
  return String(new URLSearchParams(parts));
};

const goTo = (hash) => {
  const wanted = new URLSearchParams(hash.replace(/^#/, ""));
  for (const metric of wanted.getAll("chart")) addChart(metric);
  for (const [name, [, write]] of Object.entries(SETTINGS)) write(wanted.get(name) ?? usual[name]);
  state.zoomY = Object.create(null);
  for (const [name, text] of wanted) if (name.startsWith("y.") && range(text)) state.zoomY[name.slice(2)] = range(text);
  orderLegend();
  if (wanted.has("channels")) recolor();
  else showTop();
  showControls();
  filterTables();
  drawLegend();
  renderCharts();
};

listeners.push(() => {
  const text = address();
  if (text !== location.hash.slice(1)) history.replaceState(null, "", `#${text}`);
});
const isView = () => location.hash.includes("=");
addEventListener("hashchange", () => isView() && goTo(location.hash));
if (isView()) goTo(location.hash);
document.documentElement.dataset.ready = "true";

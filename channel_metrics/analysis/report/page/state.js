// What is chosen: which channels and runs are drawn, and how. Everything else follows from it.
const NUM_COLORS = 8;
const state = {
  x: "steps", // one of X_AXES
  logX: false,
  log: false,
  fromZero: true,
  smooth: hasSmooth ? 2 : 0, // The strength; 0 is none.
  difference: false, // Later runs minus the first, in place of the runs.
  marks: true,
  splits: new Set(splits),
  runs: new Set(DATA.runs.keys()),
  shown: new Set(),
  isolated: null,
  query: "",
  axis: "", // The labels of this axis are in place of the channels.
  order: "tokens",
  top: DATA.label_axes.filter((axis) => axis === "").length <= 12 ? Infinity : NUM_COLORS,
  zoom: null, // [low, high] on the x axis
  zoomY: Object.create(null), // {metric: [low, high]}
};

const listeners = [];
const changed = (what) => listeners.forEach((listener) => listener(what));

// A channel keeps its colour for as long as it is drawn.
const slots = new Map();
const recolor = () => {
  const drawnNow = visible();
  for (const channel of [...slots.keys()]) if (!drawnNow.includes(channel)) slots.delete(channel);
  for (const channel of drawnNow) {
    if (slots.has(channel)) continue;
    const used = new Map();
    for (const slot of slots.values()) used.set(slot, (used.get(slot) ?? 0) + 1);
    let best = 0;
    for (let slot = 1; slot < NUM_COLORS; slot++) {
      if ((used.get(slot) ?? 0) < (used.get(best) ?? 0)) best = slot;
    }
    slots.set(channel, best);
  }
};
const colorOf = (channel) =>
  channel === WHOLE_RUN ? "whole" : slots.has(channel) ? `s${slots.get(channel)}` : "off";

const visible = () => (state.isolated === null ? [...state.shown] : [state.isolated]);

const ORDERS = {
  tokens: (row) => -(row?.tokens ?? -1),
  loss: (row) => -(row?.loss ?? -1),
  change: (row) => -(row?.change ?? -9),
  name: () => 0,
};
const ordered = () => {
  const key = ORDERS[state.order];
  const names = (a, b) => DATA.channels[a].localeCompare(DATA.channels[b]);
  const byKey = (a, b) => key(rowOf[a]) - key(rowOf[b]) || (state.order === "name" ? names(a, b) : a - b);
  return [...DATA.channels.keys()].filter((channel) => DATA.label_axes[channel] === state.axis).sort(byKey);
};

const matches = (channel) =>
  [DATA.channels[channel], DATA.labels[channel]].some((text) =>
    text.toLocaleLowerCase().includes(state.query.toLocaleLowerCase().trim()),
  );

const showTop = () => {
  state.shown = new Set(ordered().slice(0, state.top));
  recolor();
};

const isolate = (channel) => {
  if (channel !== null && !slots.has(channel)) slots.set(channel, 0);
  state.isolated = state.isolated === channel ? null : channel;
  // Meanwhile nobody has lost a colour, so those that come back look as before.
  if (state.isolated === null) recolor();
  changed("channels");
};

const toggle = (channel) => {
  if (!state.shown.delete(channel)) state.shown.add(channel);
  state.isolated = null;
  recolor();
  changed("channels");
};

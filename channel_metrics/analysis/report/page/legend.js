// The list of channels: search, order, how many are drawn; a click isolates one.
const legend = find("#legend-list");

const legendItem = (channel) => {
  const row = rowOf[channel];
  const box = element("input", { type: "checkbox", tabindex: "-1", "aria-label": `draw ${nameOf(channel)}` });
  const button = element(
    "button",
    { type: "button", class: "channel", tabindex: "-1", "aria-pressed": "false", title: nameOf(channel) },
    element("span", { class: "swatch" }),
    element("bdi", {}, nameOf(channel)),
    element("span", { class: "value" }, row?.loss == null ? "" : asNumber(row.loss)),
  );
  const item = element("li", {}, box, button);
  item.dataset.channel = channel;
  box.addEventListener("change", () => toggle(channel));
  button.addEventListener("click", (event) =>
    event.ctrlKey || event.metaKey || event.shiftKey ? toggle(channel) : isolate(channel),
  );
  return item;
};

const items = new Map(DATA.channels.map((_, channel) => [channel, legendItem(channel)]));

// One stop of the tab key for the whole list; the arrows move in it.
let focused = null;
const listed = () => [...legend.children].filter((item) => !item.hidden);
const moveFocus = (item) => {
  if (!item) return;
  focused = item;
  for (const other of legend.children) other.querySelector("button").tabIndex = other === item ? 0 : -1;
};

const drawLegend = () => {
  const drawnNow = new Set(visible());
  for (const [channel, item] of items) {
    const [box, button] = item.children;
    box.checked = state.shown.has(channel);
    button.setAttribute("aria-pressed", String(state.isolated === channel));
    button.querySelector(".swatch").setAttribute("class", `swatch ${colorOf(channel)}`);
    item.classList.toggle("dim", !drawnNow.has(channel));
    item.hidden = !matches(channel);
  }
  const shown = listed();
  if (!shown.includes(focused)) moveFocus(shown[0]);
  find("#legend-none").hidden = shown.length > 0;
  const found = state.query ? `${shown.length} of ${legend.children.length} found, ` : "";
  const isolated = state.isolated === null ? `${drawnNow.size} of ${legend.children.length} drawn` : "1 isolated";
  find("#legend-count").textContent = found + isolated;
  find("#show-all").hidden = state.isolated === null;
};

// The lines of one channel stand out while the pointer or the focus is on its name.
const highlight = (channel) => {
  find("#charts").classList.toggle("fading", channel !== null);
  for (const path of findAll("path.line")) {
    path.classList.toggle("lit", channel !== null && path.dataset.channel === String(channel));
  }
};
const pointedAt = (event) => {
  const channel = event.target.closest?.("li")?.dataset.channel;
  highlight(channel !== undefined && visible().includes(Number(channel)) ? channel : null);
};
legend.addEventListener("pointerover", pointedAt);
legend.addEventListener("focusin", pointedAt);
for (const gone of ["pointerleave", "focusout"]) legend.addEventListener(gone, () => highlight(null));

const orderLegend = () => legend.replaceChildren(...ordered().map((channel) => items.get(channel)));

legend.addEventListener("focusin", (event) => moveFocus(event.target.closest("li")));
legend.addEventListener("keydown", (event) => {
  const shown = listed();
  const at = shown.indexOf(event.target.closest("li"));
  const moves = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: shown.length - 1 };
  if (event.key === " ") {
    event.preventDefault();
    toggle(Number(shown[at].dataset.channel));
  } else if (event.key in moves) {
    event.preventDefault();
    const next = shown[Math.max(0, Math.min(shown.length - 1, moves[event.key]))];
    moveFocus(next);
    next.querySelector("button").focus();
  }
});

find("#search").addEventListener("input", (event) => {
  state.query = event.target.value;
  changed("search");
});
find("#search").addEventListener("keydown", (event) => {
  const shown = listed();
  if (event.key === "Enter" && shown.length) {
    state.shown = new Set(shown.map((item) => Number(item.dataset.channel)));
    state.isolated = null;
    recolor();
    changed("channels");
  } else if (event.key === "ArrowDown" && shown.length) {
    event.preventDefault();
    shown[0].querySelector("button").focus();
  }
});
// Labels of an axis in place of the channels, or the channels again.
const setAxis = (axis) => {
  state.axis = axis;
  state.isolated = null;
  orderLegend();
  showTop();
  showControls();
  changed("channels");
};
find("#axis")?.addEventListener("change", (event) => setAxis(event.target.value));
find("#order").addEventListener("change", (event) => {
  state.order = event.target.value;
  orderLegend();
  showTop();
  changed("channels");
});
find("#top").addEventListener("change", (event) => {
  state.top = event.target.value === "all" ? Infinity : Number(event.target.value);
  state.isolated = null;
  showTop();
  changed("channels");
});
find("#show-all").addEventListener("click", () => {
  isolate(state.isolated);
  (focused?.querySelector("button") ?? find("#search")).focus();
});

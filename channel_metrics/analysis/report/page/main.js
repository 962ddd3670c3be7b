// The switches of the page, and what is drawn anew when something changes.
const charts = findAll(".chart").map((figure, number) => new Chart(figure, number));

const renderCharts = () => {
  highlight(null); // The lines that stood out are gone.
  for (const chart of charts) chart.render();
  find("#reset-zoom").hidden = state.zoom === null;
};

listeners.push((what) => {
  if (what !== "view") drawLegend();
  if (what === "search") filterTables();
  else renderCharts();
});

// A press button that turns `read` on and off.
const pressable = (button, read, write) => {
  const show = () => button.setAttribute("aria-pressed", String(read()));
  button.addEventListener("click", () => {
    write(!read());
    show();
    changed("view");
  });
  show();
};

const choose = (name, write) => {
  for (const input of findAll(`input[name="${name}"]`)) {
    input.addEventListener("change", () => {
      write(input.value);
      changed("view");
    });
  }
};

choose("x", (value) => {
  state.x = value;
  state.zoom = null;
});
pressable(find("#log"), () => state.log, (on) => (state.log = on));
pressable(find("#zero"), () => state.fromZero, (on) => (state.fromZero = on));
pressable(find("#smooth"), () => state.smooth, (on) => (state.smooth = on));
find("#smooth").hidden = !hasSmooth;
find("#x-axis").hidden = !hasTokens;
find("#reset-zoom").addEventListener("click", () => zoomTo(null));

const choices = (host, values, chosen, make) => {
  host.hidden = values.length < 2;
  for (const value of values) {
    const button = element("button", { type: "button", class: "chip" }, ...make(value));
    const write = (on) => (on ? chosen.add(value) : chosen.delete(value));
    pressable(button, () => chosen.has(value), write);
    host.append(button);
  }
};
const runSample = (run) => {
  const svg = drawn("svg", { width: 28, height: 10, "aria-hidden": "true" });
  svg.append(drawn("path", { class: `line whole-sample run${run}`, d: "M1 5H27" }));
  return svg;
};
choices(find("#runs"), [...DATA.runs.keys()], state.runs, (run) => [runSample(run), element("bdi", {}, DATA.runs[run])]);
choices(find("#splits"), splits, state.splits, (split) => [split]);

// The theme: that of the system, until somebody chooses.
const THEMES = ["auto", "light", "dark"];
const applyTheme = (theme) => {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  for (const input of findAll('input[name="theme"]')) input.checked = input.value === theme;
};
const remembered = () => {
  try {
    return localStorage.getItem("channel_metrics_theme");
  } catch {
    return null; // A browser may forbid a file to remember anything.
  }
};
for (const input of findAll('input[name="theme"]')) {
  input.addEventListener("change", () => {
    applyTheme(input.value);
    try {
      localStorage.setItem("channel_metrics_theme", input.value);
    } catch {
      // Then it is chosen anew next time.
    }
  });
}
applyTheme(THEMES.includes(remembered()) ? remembered() : "auto");

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && state.isolated !== null) isolate(state.isolated);
  else if (event.key === "Escape" && state.zoom) zoomTo(null);
  else if (event.key === "/" && !event.target.matches("input, select")) {
    event.preventDefault();
    find("#search").focus();
  }
});

// Also called once at the start, when nothing has changed.
let resizing = 0;
let width = find("#charts").clientWidth;
new ResizeObserver(() => {
  if (find("#charts").clientWidth === width) return;
  width = find("#charts").clientWidth;
  cancelAnimationFrame(resizing);
  resizing = requestAnimationFrame(renderCharts);
}).observe(find("#charts"));

find("#top").value = state.top === Infinity ? "all" : String(state.top);
orderLegend();
showTop();
drawLegend();
renderCharts();
document.documentElement.dataset.ready = "true";

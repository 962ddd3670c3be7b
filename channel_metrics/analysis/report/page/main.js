// The switches of the page, and what is drawn anew when something changes.
const charts = findAll(".chart").map((figure, number) => new Chart(figure, number));

const renderCharts = () => {
  highlight(null); // The lines that stood out are gone.
  const sizes = charts.map((chart) => chart.size()); // First, since reading one lays out what was drawn.
  charts.forEach((chart, i) => chart.render(sizes[i]));
  find("#reset-zoom").hidden = state.zoom === null && !Object.keys(state.zoomY).length;
  find("#minus").hidden = !state.difference;
};

// A chart of a series that has none of its own, for as long as somebody wants it.
const others = [...new Set(DATA.curves.map((curve) => curve.metric))].filter(
  (metric) => !charts.some((chart) => chart.metric === metric),
);
const addChart = (metric) => {
  if (!others.includes(metric) || charts.some((chart) => chart.metric === metric)) return null;
  const figure = find("#other-chart").content.firstElementChild.cloneNode(true);
  figure.dataset.metric = metric;
  figure.querySelector("figcaption").prepend(element("h3", {}, metric));
  const plot = figure.querySelector(".plot");
  plot.setAttribute("aria-label", `${metric}. ${plot.getAttribute("aria-label")}`);
  for (const button of figure.querySelectorAll("[data-save]")) {
    button.setAttribute("aria-label", `Save ${metric} as ${button.textContent}`);
  }
  find("#charts").append(figure);
  const chart = new Chart(figure, charts.length);
  figure.querySelector(".remove").setAttribute("aria-label", `Remove ${metric}`);
  figure.querySelector(".remove").addEventListener("click", () => {
    charts.splice(charts.indexOf(chart), 1);
    figure.remove();
    find("#other").focus();
    changed("view");
  });
  charts.push(chart);
  return chart;
};
find("#other").append(...others.map((metric) => element("option", { value: metric }, cutName(metric, 50))));
find("#other-label").hidden = others.length === 0;
find("#other").addEventListener("change", () => {
  const chart = addChart(find("#other").value);
  find("#other").value = "";
  if (!chart) return;
  changed("view");
  chart.figure.scrollIntoView({ block: "nearest" });
});

listeners.push((what) => {
  if (what !== "view") drawLegend();
  if (what === "search") filterTables();
  else renderCharts();
});

// Shows what is chosen in all controls.
const controls = [];
const showControls = () => controls.forEach((show) => show());

// A press button that turns `read` on and off.
const pressable = (button, read, write) => {
  const show = () => button.setAttribute("aria-pressed", String(read()));
  button.addEventListener("click", () => {
    write(!read());
    show();
    changed("view");
  });
  controls.push(show);
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
controls.push(() => {
  for (const input of findAll('input[name="x"]')) input.checked = input.value === state.x;
  for (const name of ["order", "top", "smooth"]) find(`#${name}`).value = state[name] === Infinity ? "all" : state[name];
  find("#search").value = state.query;
  if (find("#axis")) find("#axis").value = state.axis;
});
controls.push(showAxis);
pressable(find("#log-x"), () => state.logX, (on) => (state.logX = on));
pressable(find("#difference"), () => state.difference, (on) => {
  state.difference = on;
  state.zoomY = Object.create(null);
});
pressable(find("#marks"), () => state.marks, (on) => (state.marks = on));
find("#smooth").addEventListener("change", (event) => {
  state.smooth = Number(event.target.value);
  changed("view");
});
find("#difference").hidden = !severalRuns;
find("#marks").hidden = !DATA.marks.some((marks) => marks.length);
pressable(find("#log"), () => state.log, (on) => (state.log = on));
pressable(find("#zero"), () => state.fromZero, (on) => (state.fromZero = on));
find("#smooth-label").hidden = !hasSmooth;
for (const input of findAll('input[name="x"]')) input.parentElement.hidden = !hasAxis(input.value);
find("#x-axis").hidden = !Object.keys(X_AXES).some((name) => name !== "steps" && hasAxis(name));
find("#reset-zoom").addEventListener("click", resetZoom);

const choices = (host, values, chosen, make) => {
  host.hidden = values.length < 2;
  for (const value of values) {
    const button = element("button", { type: "button", class: "chip" }, ...make(value));
    const write = (on) => (on ? chosen().add(value) : chosen().delete(value));
    pressable(button, () => chosen().has(value), write);
    host.append(button);
  }
};
choices(find("#runs"), [...DATA.runs.keys()], () => state.runs, (run) => [sample(`whole-sample run${run}`), element("bdi", {}, DATA.runs[run])]);
choices(find("#splits"), splits, () => state.splits, (split) => [split]);

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
  else if (event.key === "Escape" && (state.zoom || Object.keys(state.zoomY).length)) resetZoom();
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

orderLegend();
showTop();
showControls();
drawLegend();
renderCharts();

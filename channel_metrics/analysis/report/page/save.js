// A chart as CSV, PNG or SVG: what is drawn at this moment.
const STYLES = [
  "fill", "fill-opacity", "stroke", "stroke-width", "stroke-opacity", "stroke-dasharray", "stroke-linejoin",
  "stroke-linecap", "opacity", "font-size", "font-family", "text-anchor", "paint-order",
];

const offer = (blob, name) => {
  const link = element("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
};

// Quoted where CSV wants it; a spreadsheet would take some beginnings for a formula.
const csvCell = (value) => {
  const text = /^[=+\-@\t\r]/.test(value) && Number.isNaN(Number(value)) ? `'${value}` : String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
};

const chartCsv = (chart) => {
  const head = ["run", "split", "channel", "metric", "smoothing", "step", X_AXES[state.x].title, "value"];
  const rows = chart.drawn.flatMap((curve) =>
    curve.steps.flatMap((step, i) =>
      curve.values[i] === null
        ? []
        : [[DATA.runs[curve.run], curve.split, nameOf(curve.channel), curve.metric + (curve.overwritten ? " before the resume" : ""), curve.smooth ?? 0, step, positions(curve)[i], curve.values[i]]],
    ),
  );
  return [head, ...rows].map((row) => row.map(csvCell).join(",")).join("\r\n") + "\r\n";
};

// The colours and widths of the page's style, in the elements themselves.
const chartSvg = (chart) => {
  const copy = chart.svg.cloneNode(true);
  const copies = [copy, ...copy.querySelectorAll("*")];
  [chart.svg, ...chart.svg.querySelectorAll("*")].forEach((from, i) => {
    const style = getComputedStyle(from);
    for (const name of STYLES) copies[i].setAttribute(name, style.getPropertyValue(name));
  });
  copy.querySelector(".cursor")?.remove();
  const [width, height, room] = [chart.svg.clientWidth, chart.svg.clientHeight, 26];
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  copy.setAttribute("viewBox", `0 ${-room} ${width} ${height + room}`);
  copy.setAttribute("height", height + room);
  const style = getComputedStyle(document.body);
  const ground = getComputedStyle(chart.figure).backgroundColor;
  copy.prepend(drawn("rect", { x: 0, y: -room, width, height: height + room, fill: ground }));
  const title = { x: 8, y: -8, fill: style.color, "font-family": style.fontFamily, "font-size": "14px", "font-weight": 600 };
  copy.append(drawn("text", title, chart.label));
  return new XMLSerializer().serializeToString(copy);
};

const savePng = async (chart, name) => {
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(chartSvg(chart))}`;
  await image.decode();
  const canvas = element("canvas", { width: image.width * 2, height: image.height * 2 });
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  canvas.toBlob((blob) => offer(blob, name));
};

const saveAs = (chart, format) => {
  const name = `${chart.metric.replace(/[^\w-]+/g, "_")}.${format}`;
  if (format === "csv") offer(new Blob([chartCsv(chart)], { type: "text/csv" }), name);
  else if (format === "svg") offer(new Blob([chartSvg(chart)], { type: "image/svg+xml" }), name);
  else savePng(chart, name);
};

find("#charts").addEventListener("click", (event) => {
  const format = event.target.dataset.save;
  if (format) saveAs(charts.find((chart) => chart.figure.contains(event.target)), format);
});

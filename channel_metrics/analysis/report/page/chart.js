// One chart: scales, curves, a cursor that reads values, zoom.
const MAX_LABELS = 12;
const MAX_READ = 10;
// A name further than this from the end of its line stands at the end of the line.
const FAR = 40;

class Chart {
  constructor(figure, number) {
    this.number = number;
    this.metric = figure.dataset.metric;
    this.percent = "percent" in figure.dataset;
    this.label = figure.querySelector("h3").textContent;
    this.isExtra = "extra" in figure.dataset;
    this.figure = figure;
    this.plot = figure.querySelector(".plot");
    this.tip = figure.querySelector(".tip");
    this.live = figure.querySelector(".live");
    this.cursor = null;
    this.svg = null;
    this.plot.addEventListener("pointermove", (event) => this.onMove(event));
    this.plot.addEventListener("pointerleave", () => this.setCursor(null));
    this.plot.addEventListener("pointerdown", (event) => this.onDown(event));
    this.plot.addEventListener("pointerup", (event) => this.onUp(event));
    this.plot.addEventListener("dblclick", () => resetZoom());
    this.plot.addEventListener("keydown", (event) => this.onKey(event));
    this.plot.addEventListener("blur", () => this.setCursor(null));
  }

  size() {
    return [this.plot.clientWidth, this.plot.clientHeight];
  }

  render([width, height]) {
    const curves = curvesNow(this.metric);
    this.drawn = curves;
    const raws = rawOf(curves);
    this.curves = curves.filter((curve) => !raws.has(curve));
    const labels = width > 560 && new Set(curves.map((c) => c.channel)).size <= MAX_LABELS;
    this.area = { left: 50, right: width - (labels ? 118 : 30), top: 10, bottom: height - 40 };
    this.setScales(curves);
    this.svg?.remove();
    this.svg = drawn("svg", { width, height, "aria-hidden": "true" });
    this.svg.append(drawAxes(this), drawPlan(this), drawEvents(this), this.lines(curves));
    if (labels) this.svg.append(this.labels());
    this.mark = drawn("g", { class: "cursor" });
    this.svg.append(this.mark);
    this.plot.prepend(this.svg);
    this.figure.classList.toggle("empty", curves.length === 0);
    this.setCursor(null);
  }

  setScales(curves) {
    const ends = curves.map(positions).filter((at) => at.length);
    const first = (at) => (state.logX ? at.find((place) => place > 0) ?? Infinity : at[0]);
    let [low, high] = state.zoom ?? [Math.min(...ends.map(first)), Math.max(...ends.map((at) => at.at(-1)))];
    if (state.logX && low <= 0) low = Math.min(...ends.map(first));
    if (!state.zoom && !state.logX && state.x !== "steps") low = 0;
    if (!Number.isFinite(low) || !Number.isFinite(high)) [low, high] = [0, 1];
    if (low === high) [low, high] = state.logX ? [low / 2, high * 2] : [low - 1, high + 1];
    const { left, right, top, bottom } = this.area;
    const [there, back] = state.logX ? [Math.log, Math.exp] : [Number, Number];
    const [from, size] = [there(low), there(high) - there(low)];
    this.x = (value) => left + ((there(value) - from) / size) * (right - left);
    this.x.invert = (pixel) => back(from + ((pixel - left) / (right - left)) * size);
    this.x.domain = [low, high];
    this.x.log = state.logX;
    const [floor, roof] = this.yDomain(curves, low, high);
    const bend = this.log ? Math.log : (value) => value;
    this.y = (value) => bottom - ((bend(value) - bend(floor)) / (bend(roof) - bend(floor))) * (bottom - top);
    this.y.invert = (pixel) => {
      const bent = bend(floor) + ((bottom - pixel) / (bottom - top)) * (bend(roof) - bend(floor));
      return this.log ? Math.exp(bent) : bent;
    };
    this.y.domain = [floor, roof];
    this.y.log = this.log;
  }

  yDomain(curves, low, high) {
    this.log = state.log && this.metric === "loss" && !state.difference;
    const chosen = state.zoomY[this.metric];
    if (chosen && (!this.log || chosen[0] > 0)) return chosen;
    let floor = Infinity;
    let roof = -Infinity;
    for (const curve of curves) {
      const at = positions(curve);
      for (let i = 0; i < at.length; i++) {
        const value = curve.values[i];
        if (value === null || at[i] < low || at[i] > high || (this.log && value <= 0)) continue;
        floor = Math.min(floor, value);
        roof = Math.max(roof, value);
      }
    }
    for (const { share } of planNow(this)) [floor, roof] = [Math.min(floor, share), Math.max(roof, share)];
    if (!Number.isFinite(floor)) return this.log ? [0.1, 1] : [0, 1];
    if (state.difference) [floor, roof] = [Math.min(floor, 0), Math.max(roof, 0)];
    if (this.log) return floor === roof ? [floor / 2, roof * 2] : [floor * 0.92, roof * 1.08];
    if (state.fromZero && floor >= 0 && !state.difference) {
      return [0, this.metric === "token_acc" && roof <= 1 ? 1 : roof * 1.04 || 1];
    }
    const room = (roof - floor || Math.abs(roof) || 1) * 0.05;
    return [floor - room, roof + room];
  }

  lines(curves) {
    const { left, right, top, bottom } = this.area;
    const id = `clip-${this.number}`;
    const alone = curves.length > 0 && curves.every((curve) => curve.channel === WHOLE_RUN);
    const group = drawn("g", { "clip-path": `url(#${id})`, class: alone ? "alone" : "curves" });
    const clip = drawn("clipPath", { id });
    const size = { x: left - 4, y: top - 6, width: right - left + 8, height: bottom - top + 10 };
    clip.append(drawn("rect", size));
    group.append(clip);
    drawCurves(group, curves, this.x, this.y);
    return group;
  }

  // Names at the ends of the lines, moved apart where they would overlap.
  labels() {
    const group = drawn("g", { class: "labels" });
    const ends = new Map();
    for (const curve of this.curves) {
      if (curve.split !== "train" || curve.overwritten || ends.has(curve.channel)) continue;
      const last = curve.values.findLastIndex((value, i) => drawable(value, this.y) && positions(curve)[i] <= this.x.domain[1]);
      if (last >= 0) ends.set(curve.channel, { x: this.x(positions(curve)[last]), y: this.y(curve.values[last]) });
    }
    const placed = [...ends].map(([channel, end]) => ({ channel, ...end, at: end.y })).sort((a, b) => a.y - b.y);
    const gap = 15;
    placed.forEach((label, i) => {
      if (i) label.at = Math.max(label.at, placed[i - 1].at + gap);
    });
    let limit = this.area.bottom + 2;
    for (const label of placed.toReversed()) {
      label.at = Math.min(label.at, limit);
      limit = label.at - gap;
    }
    for (const { channel, x, y, at } of placed) {
      const from = Math.min(x + 3, this.area.right);
      // A long leader would read as a line that goes on.
      const to = x < this.area.right - FAR ? from : this.area.right;
      group.append(drawn("path", { class: `lead ${colorOf(channel)}`, d: `M${from} ${y}L${to + 9} ${at}` }));
      const text = drawn("text", { class: `name ${colorOf(channel)}`, x: to + 13, y: at + 4 }, cutName(nameOf(channel), 15));
      group.append(text);
    }
    return group;
  }

  onMove(event) {
    const [pixel, height] = this.pixels(event);
    if (this.dragFrom !== undefined) this.drag(pixel, height);
    const inside = pixel >= this.area.left - 6 && pixel <= this.area.right + 6;
    this.setCursor(inside ? this.x.invert(pixel) : null);
  }

  onDown(event) {
    if (event.button !== 0 || event.pointerType === "touch") return;
    this.dragFrom = this.pixels(event);
    this.box = drawn("rect", { class: "zoom" });
    this.svg.append(this.box);
  }

  pixels(event) {
    const { left, top } = this.plot.getBoundingClientRect();
    return [event.clientX - left, event.clientY - top];
  }

  // Ends on both axes; null for an axis along which the pointer has hardly moved.
  dragged(x, y) {
    const { top, bottom } = this.area;
    const ends = ([a, b], least) => (Math.abs(a - b) > least ? [Math.min(a, b), Math.max(a, b)] : null);
    const inside = (pixel) => Math.max(top, Math.min(bottom, pixel));
    return [ends([this.dragFrom[0], x], 8), ends([inside(this.dragFrom[1]), inside(y)], 24)];
  }

  drag(x, y) {
    const { left, right, top, bottom } = this.area;
    const [across, up] = this.dragged(x, y);
    const [[x0, x1], [y0, y1]] = [across ?? [left, right], up ?? [top, bottom]];
    for (const [name, value] of Object.entries({ x: x0, width: x1 - x0, y: y0, height: y1 - y0 })) this.box.setAttribute(name, value);
  }

  onUp(event) {
    if (this.dragFrom === undefined) return;
    const [across, up] = this.dragged(...this.pixels(event));
    this.dragFrom = undefined;
    this.box.remove();
    if (up) state.zoomY[this.metric] = [this.y.invert(up[1]), this.y.invert(up[0])];
    if (across) state.zoom = across.map((pixel) => this.x.invert(pixel));
    if (up || across) changed("view");
  }

  onKey(event) {
    const [low, high] = this.x.domain;
    const at = this.cursor ?? low;
    const moves = {
      ArrowLeft: () => this.setCursor(this.neighbour(at, -1), true),
      ArrowRight: () => this.setCursor(this.cursor === null ? low : this.neighbour(at, 1), true),
      Home: () => this.setCursor(low, true),
      End: () => this.setCursor(high, true),
      "+": () => zoomTo([at - (at - low) / 2, at + (high - at) / 2]),
      "-": () => zoomTo(null),
      ArrowUp: () => this.zoomUp(0.5),
      ArrowDown: () => this.zoomUp(2),
    };
    if (!moves[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    moves[event.key]();
  }

  // Half or twice the values, around the highest one at the cursor.
  zoomUp(factor) {
    const middle = (this.cursor === null ? null : readAt(this, this.cursor)[0]?.value) ?? (this.y.domain[0] + this.y.domain[1]) / 2;
    const [low, high] = this.y.domain.map((end) => middle + (end - middle) * factor);
    if (!this.log || low > 0) state.zoomY[this.metric] = [low, high];
    changed("view");
  }

  // The next point of any curve, at least a fiftieth of the axis away where there are many.
  neighbour(at, sign) {
    const [low, high] = this.x.domain;
    const least = at + sign * ((high - low) / 200);
    let best = sign > 0 ? high : low;
    for (const curve of this.curves) {
      for (const position of positions(curve)) {
        const is = sign > 0 ? position > least && position < best : position < least && position > best;
        if (is) best = position;
      }
    }
    return best;
  }

  setCursor(at, aloud = false) {
    this.cursor = at;
    this.mark?.replaceChildren();
    this.tip.hidden = true;
    if (at === null || !this.curves?.length) return;
    const read = readAt(this, at);
    if (!read.length) return;
    drawCursor(this, read);
    if (aloud) this.live.textContent = [cursorTitle(read[0].at), ...read.map(({ label, text }) => `${label}: ${text}`)].join(", ");
  }
}

// Names often differ only at their ends, so the middle is left out.
const cutName = (name, length) => {
  const letters = [...name];
  if (letters.length <= length) return name;
  const end = Math.floor(length / 2);
  return `${letters.slice(0, length - 1 - end).join("")}…${letters.slice(-end).join("")}`;
};

const zoomTo = (ends) => {
  state.zoom = ends;
  changed("view");
};

const resetZoom = () => {
  state.zoomY = Object.create(null);
  zoomTo(null);
};

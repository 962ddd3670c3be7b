// Curves as SVG paths.
const drawable = (value, scale) => value !== null && (!scale.log || value > 0);
const isOn = (scale, at) => !scale.log || at > 0;

// Points outside the axis are left out, but for the next one on each side. Of the points in one
// column of pixels, the first, the lowest, the highest and the last are drawn: more cannot be seen.
const linePath = (curve, x, y) => {
  const at = positions(curve);
  const [start, end] = x.domain;
  let path = "";
  let pen = "M";
  let column = null;
  const draw = () => {
    if (!column) return;
    const { first, low, high, last } = column;
    for (const i of new Set([first, Math.min(low, high), Math.max(low, high), last])) {
      path += `${pen}${x(at[i]).toFixed(1)} ${y(curve.values[i]).toFixed(1)}`;
      pen = "L";
    }
    column = null;
  };
  for (let i = 0; i < at.length; i++) {
    if (at[i + 1] < start || at[i - 1] > end) continue;
    const value = curve.values[i];
    if (!drawable(value, y) || !isOn(x, at[i])) {
      draw();
      pen = "M";
      continue;
    }
    const pixel = Math.floor(x(at[i]));
    if (column?.pixel !== pixel) {
      draw();
      column = { pixel, first: i, low: i, high: i, last: i };
    } else {
      column.last = i;
      if (value < curve.values[column.low]) column.low = i;
      if (value > curve.values[column.high]) column.high = i;
    }
  }
  draw();
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

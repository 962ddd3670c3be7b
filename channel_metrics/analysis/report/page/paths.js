// Curves as SVG paths.
const drawable = (value, scale) => value !== null && (!scale.log || value > 0);
const isOn = (scale, at) => !scale.log || at > 0;

// Points outside the axis are left out, but for the next one on each side. Of the points in one
// column of pixels, the lowest and the highest are drawn: the line between them covers the others.
const linePath = (curve, x, y) => {
  const at = positions(curve);
  const [start, end] = x.domain;
  let path = "";
  let pen = "M";
  let [column, low, high] = [null, 0, 0];
  const point = (i) => {
    path += `${pen}${x(at[i]).toFixed(1)} ${y(curve.values[i]).toFixed(1)}`;
    pen = "L";
  };
  const finish = () => {
    if (column !== null) point(Math.min(low, high));
    if (low !== high) point(Math.max(low, high));
    [column, low, high] = [null, 0, 0];
  };
  for (let i = 0; i < at.length; i++) {
    if (at[i + 1] < start || at[i - 1] > end) continue;
    const value = curve.values[i];
    if (!drawable(value, y) || !isOn(x, at[i])) {
      finish();
      pen = "M";
      continue;
    }
    const pixel = Math.floor(x(at[i]));
    if (pixel !== column) {
      finish();
      [column, low, high] = [pixel, i, i];
    }
    if (value < curve.values[low]) low = i;
    if (value > curve.values[high]) high = i;
  }
  finish();
  return path;
};

const bandPath = (curve, x, y) => {
  const at = positions(curve);
  const top = [];
  const bottom = [];
  for (let i = 0; i < at.length; i++) {
    if (!drawable(curve.low[i], y) || !drawable(curve.high[i], y) || !isOn(x, at[i])) continue;
    top.push(`${x(at[i]).toFixed(1)} ${y(curve.high[i]).toFixed(1)}`);
    bottom.push(`${x(at[i]).toFixed(1)} ${y(curve.low[i]).toFixed(1)}`);
  }
  return top.length > 1 ? `M${[...top, ...bottom.reverse()].join("L")}Z` : "";
};

// Numbers as text, and the ticks of axes.
const asCount = (value) => Math.round(value).toLocaleString("en-US");

// A tick of an axis that goes up to `high`: all of them in one unit.
const asTick = (value, high) => {
  if (value === 0 || high < 1e4) return asCount(value);
  const [unit, letter] = [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]].find(([size]) => high >= size);
  return `${Number((value / unit).toPrecision(6))}${letter}`;
};

const asNumber = (value) => {
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return value.toExponential(2);
  return value.toFixed(size < 1 ? 4 : 3);
};

const asPercent = (value) => `${(100 * value).toFixed(1)}%`;

const tickText = (percent, step) => (value) => {
  if (percent) return `${Number((100 * value).toFixed(6))}%`;
  // As many digits as the distance between ticks has: two for 0.25.
  const exact = (count) => Math.abs(step * 10 ** count - Math.round(step * 10 ** count)) < 1e-6;
  const digits = [0, 1, 2, 3, 4, 5].find(exact) ?? 6;
  return value >= 1e5 ? value.toExponential(0) : value.toFixed(digits);
};

// Round numbers inside [low, high], about `count` of them, and the distance between them.
const linearTicks = (low, high, count, least = 0) => {
  const rough = (high - low) / Math.max(1, count) || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const round = [1, 2, 2.5, 5, 10].map((n) => n * power).find((n) => n >= rough * 0.999);
  const step = Math.max(least, round);
  const ticks = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) ticks.push(n * step + 0); // No -0.
  return { ticks, step };
};

const logTicks = (low, high) => {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const n of high / low > 1e4 ? [1] : [1, 2, 5]) {
      const tick = n * 10 ** power;
      if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(Number(tick.toPrecision(2)));
    }
  }
  return ticks;
};

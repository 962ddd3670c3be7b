// Where the points of curves and the marks stand on the horizontal axis.
const asPlain = (value) => String(Number(value.toPrecision(4)));
const timeUnit = (high) => [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]].find(([size]) => high >= 2 * size) ?? [1, "s"];
const asTime = (seconds, high = seconds) => {
  const [size, name] = timeUnit(high);
  return `${asPlain(seconds / size)} ${name}`;
};
const X_AXES = {
  steps: { title: "step", least: 1, tick: asTick, say: (at) => `step ${asCount(at)}` },
  tokens: { title: "supervised tokens of the channel itself", least: 1, tick: asTick, say: (at) => `${asCount(at)} tokens` },
  all_tokens: { title: "supervised tokens of all channels", least: 1, tick: asTick, say: (at) => `${asCount(at)} tokens of all channels` },
  epoch: { title: "epoch", least: 0, tick: asPlain, say: (at) => `epoch ${asPlain(at)}` },
  time: { title: "time since the first value", least: 0, tick: asTime, say: (at) => asTime(at) },
};
const hasAxis = (name) =>
  name === "steps" || (name === "tokens" ? DATA.curves.some((curve) => curve.tokens) : DATA.axes.some((axes) => axes[name]));

// The value of a sorted series at a place between its points.
const interpolate = (places, values, at) => {
  let [low, high] = [0, places.length - 1];
  if (at <= places[low]) return values[low];
  if (at >= places[high]) return values[high];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (places[middle] <= at) low = middle;
    else high = middle;
  }
  if (places[low] === at) return values[low];
  if (values[low] === null || values[high] === null) return null;
  return values[low] + ((at - places[low]) / (places[high] - places[low])) * (values[high] - values[low]);
};

// The tokens of a channel stand in its first curve.
const tokenAxes = DATA.runs.map(() => new Map());
for (const { run, channel, steps, tokens } of DATA.curves) {
  if (tokens) tokenAxes[run].set(channel, { steps, values: tokens });
}

const positions = (curve) => {
  if (state.x === "steps") return curve.steps;
  const axis = state.x === "tokens" ? tokenAxes[curve.run].get(curve.channel) : DATA.axes[curve.run][state.x];
  if (!axis) return undefined;
  curve.places ??= {};
  return (curve.places[state.x] ??= curve.steps.map((step) => interpolate(axis.steps, axis.values, step)));
};

const MAX_EVALUATIONS = 60;

// The marks of the runs that are drawn, each with its place; own tokens have no common axis for them.
const marksNow = () => {
  if (!state.marks || state.x === "tokens") return [];
  return [...state.runs].flatMap((run) => {
    const axis = DATA.axes[run][state.x];
    if (state.x !== "steps" && !axis) return [];
    const few = DATA.marks[run].filter((mark) => mark.kind === "evaluation").length <= MAX_EVALUATIONS;
    return DATA.marks[run]
      .filter((mark) => few || mark.kind !== "evaluation")
      .map((mark) => ({ ...mark, run, at: axis ? interpolate(axis.steps, axis.values, mark.step) : mark.step }));
  });
};

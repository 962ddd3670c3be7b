// In place of the curves of the later runs: what they have more than the first one, at the same place.
const kindOf = ({ channel, metric, split, smooth }) => JSON.stringify([channel, metric, split, smooth]);
const inFirstRun = new Map();
for (const curve of DATA.curves) {
  if (curve.run === 0 && !inFirstRun.has(kindOf(curve))) inFirstRun.set(kindOf(curve), curve);
}

const minus = (curve, base) => {
  const [at, others] = [positions(curve), positions(base)];
  if (!at?.length || !others?.length) return null;
  const values = at.map((place, i) => {
    if (curve.values[i] === null || place < others[0] || place > others.at(-1)) return null;
    const other = interpolate(others, base.values, place);
    return other === null ? null : curve.values[i] - other;
  });
  return { ...curve, values, low: undefined, high: undefined };
};

const differences = (curves) =>
  curves.flatMap((curve) => {
    const base = curve.run && inFirstRun.get(kindOf(curve));
    const difference = base && minus(curve, base);
    return difference ? [difference] : [];
  });

/* Ranges and ticks of axes: 1, 2 and 5 on logarithmic axes, never more than six. figure_style.py
   has the same rules for the PNG. */

export const MAX_TICKS = 6;
const DIGITS = [1, 2, 5];

/* room: ticks that fit side by side. Where fewer than two of 1, 2 and 5 are inside, linear ones. */
export function logTicks(low, high, room = MAX_TICKS) {
  const span = Math.log10(high / low), most = Math.max(2, Math.min(MAX_TICKS, room));
  const decades = [];
  for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p++) decades.push(p);
  let found = [];
  for (const [digits, gap] of [[DIGITS, 0.3], [[1, 5], 0.3], [[1], 1]]) {
    found = decades.flatMap((p) => digits.map((d) => +`${d}e${p}`)).filter((v) =>
      v >= low && v <= high
    );
    if (found.length < 2) return linearTicks(low, high, most);
    if (found.length <= most && gap * (room + 1) >= span) return found;
  }
  const every = Math.ceil(found.length / most);
  return found.filter((_, i) => i % every === 0);
}

export function linearTicks(low, high, most = MAX_TICKS) {
  const power = Math.floor(Math.log10((high - low) / most));
  for (const step of [power, power + 1].flatMap((p) => DIGITS.map((d) => +`${d}e${p}`))) {
    const first = Math.ceil(low / step - 1e-6), last = Math.floor(high / step + 1e-6);
    if (last - first >= most) continue;
    return Array.from({ length: last - first + 1 }, (_, n) => +((first + n) * step).toPrecision(8));
  }
  return [];
}

export function tickText(v) {
  if (!v || (Math.abs(v) >= 1e-3 && Math.abs(v) < 1e5)) return String(+v.toPrecision(4));
  const [digits, power] = v.toExponential(3).split("e");
  return `${+digits === 1 ? "" : `${+digits}×`}10<sup>${+power}</sup>`.replace("-", "−");
}

/* Give an axis its range, with a margin, and its ticks. room: ticks that fit. */
export function setAxis(axis, low, high, isLog, room, suffix = "") {
  const of = (v) => (isLog ? Math.log10(v) : v), pad = (of(high) - of(low)) * 0.05 || 0.05;
  const range = [of(low) - pad, of(high) + pad];
  const ends = isLog ? range.map((v) => 10 ** v) : range;
  const tickvals = isLog
    ? logTicks(...ends, room)
    : linearTicks(...ends, Math.max(2, Math.min(MAX_TICKS, room)));
  Object.assign(axis, {
    type: isLog ? "log" : "linear",
    range,
    tickmode: "array",
    tickvals,
    ticktext: tickvals.map((v) => tickText(v) + suffix),
  });
}

/* The positions (px) that can have labels of this width: [index, ...], six at most. */
export function apart(places, width) {
  const shown = [], order = places.map((_, i) => i).sort((a, b) => places[a] - places[b]);
  const reach = places.length ? places[order.at(-1)] - places[order[0]] : 0;
  const gap = Math.max(width, reach / (MAX_TICKS - 0.99));
  for (const i of order) {
    if (!shown.length || places[i] - places[shown.at(-1)] >= gap - 1e-6) shown.push(i);
  }
  return shown;
}

/* Move places (px, rising) apart until they differ by `gap`, as little as possible. */
export function spread(places, gap) {
  let most = -Infinity;
  const moved = places.map((p, i) => (most = Math.max(most, p - i * gap)) + i * gap);
  const shift = places.reduce((a, p, i) => a + p - moved[i], 0) / (places.length || 1);
  return moved.map((p) => p + shift);
}

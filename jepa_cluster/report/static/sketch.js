/* The first picture, by hand on a canvas: axes, laws and marks of a figure of one panel. It stands while Plotly starts,
   which then draws the same traces for good. It answers no pointer. */

const LEFT = 70, RIGHT = 15, TOP = 12;

/* holder: an element that is empty; traces, plan: as for Plotly -> whether there was anything that it can draw. */
export function sketch(holder, traces, plan, t) {
  const drawn = traces.filter((d) => d.type === "scatter");
  if (plan.xaxis2 || !drawn.length || drawn.length < traces.length) return false;
  const width = holder.clientWidth, height = plan.height, dots = window.devicePixelRatio || 1;
  const canvas = Object.assign(document.createElement("canvas"), { width: width * dots, height: height * dots });
  canvas.style.cssText = `width: ${width}px; height: ${height}px`;
  const pen = canvas.getContext("2d");
  pen.scale(dots, dots);
  pen.font = "13px system-ui, sans-serif";
  const x = axis(plan.xaxis, drawn.flatMap((d) => d.x), LEFT, width - RIGHT);
  const y = axis(plan.yaxis, drawn.flatMap((d) => d.y), height - plan.margin.b, TOP);
  frame(pen, x, y, plan, t);
  pen.beginPath();
  pen.rect(LEFT, TOP, width - RIGHT - LEFT, height - plan.margin.b - TOP);
  pen.clip();
  for (const d of drawn) {
    if (d.mode === "lines") line(pen, d, x, y, t);
    else marks(pen, d, x, y, t);
  }
  holder.replaceChildren(canvas);
  return true;
}

/* -> {at: value -> px, ticks}; a little room is left around the values. */
function axis(plan, values, from, to) {
  const log = plan.type === "log", of = (v) => (log ? Math.log10(v) : v);
  const known = values.filter((v) => Number.isFinite(v) && (!log || v > 0)).map(of);
  let low = known.reduce((a, b) => Math.min(a, b)), high = known.reduce((a, b) => Math.max(a, b));
  const room = (high - low) * 0.05 || 0.5;
  [low, high] = plan.range || [low - room, high + room];
  const step = [1, 2, 5, 10].map((m) => m * 10 ** Math.floor(Math.log10((high - low) / 5))).find((s) => (high - low) / s < 9);
  const ticks = [];
  if (log && high - low > 1) for (let p = Math.ceil(low); p <= high; p++) ticks.push(10 ** p);
  else if (log) for (let p = Math.floor(low); p <= high; p++) for (let m = 1; m < 10; m += 0.5) ticks.push(+(m * 10 ** p).toPrecision(2));
  else for (let v = Math.ceil(low / step) * step; v <= high; v += step) ticks.push(+v.toPrecision(6));
  const inside = ticks.filter((v) => of(v) >= low && of(v) <= high), every = Math.ceil(inside.length / 9);
  if (plan.tickvals) return { at: (v) => from + ((of(v) - low) / (high - low)) * (to - from), ticks: plan.tickvals };
  return { at: (v) => from + ((of(v) - low) / (high - low)) * (to - from), ticks: inside.filter((_, i) => i % every === 0) };
}

function frame(pen, x, y, plan, t) {
  const text = (v) => (v >= 1e5 || v < 1e-3 ? v.toExponential(0).replace("e+", "e") : String(v));
  const [left, right, low] = [LEFT, parseInt(pen.canvas.style.width), plan.height - plan.margin.b];
  Object.assign(pen, { fillStyle: t.ink, strokeStyle: t.line, lineWidth: 1 });
  const rule = (...p) => { pen.beginPath(); pen.moveTo(p[0], p[1]); pen.lineTo(p[2], p[3]); pen.stroke(); };
  pen.textAlign = "center";
  for (const v of x.ticks) { rule(x.at(v), TOP, x.at(v), low); pen.fillText(text(v), x.at(v), low + 20); }
  pen.fillText(plan.xaxis.title.text, (left + right) / 2, low + 48);
  pen.textAlign = "right";
  for (const v of y.ticks) { rule(left, y.at(v), right - RIGHT, y.at(v)); pen.fillText(text(v), left - 4, y.at(v) + 4); }
  pen.save();
  pen.translate(16, (TOP + low) / 2);
  pen.rotate(-Math.PI / 2);
  pen.textAlign = "center";
  pen.fillText(plan.yaxis.title.text, 0, 0);
  pen.restore();
}

function line(pen, d, x, y, t) {
  Object.assign(pen, { strokeStyle: d.line.color || t.ink, fillStyle: d.fillcolor || t.ink, lineWidth: d.line.width, globalAlpha: d.opacity ?? 1 });
  pen.setLineDash(d.line.dash ? [7, 6] : []);
  pen.beginPath();
  let last;
  d.x.forEach((v, i) => {
    const at = v > 0 && Number.isFinite(d.y[i]) ? [x.at(v), y.at(d.y[i])] : undefined;
    if (at && last && d.line.shape === "hv") pen.lineTo(at[0], last[1]);
    if (at) last ? pen.lineTo(...at) : pen.moveTo(...at);
    last = at;
  });
  d.fill ? pen.fill() : pen.stroke();
  pen.setLineDash([]);
  pen.globalAlpha = 1;
}

function marks(pen, d, x, y, t) {
  const { color, size, symbol, line: edge } = d.marker;
  Object.assign(pen, { lineWidth: edge?.width || 1 });
  d.x.forEach((v, i) => {
    if (!(v > 0)) return; // of the legend only
    const shape = [].concat(symbol ?? "circle"), kind = shape[i % shape.length], open = kind.endsWith("-open");
    const [a, b, r] = [x.at(v), y.at(d.y[i]), size / 2], whisker = d.error_y;
    Object.assign(pen, { strokeStyle: color || t.ink, fillStyle: color || t.ink });
    if (whisker?.array[i]) {
      pen.beginPath();
      pen.moveTo(a, y.at(Math.max(d.y[i] - whisker.arrayminus[i], d.y[i] / 10)));
      pen.lineTo(a, y.at(d.y[i] + whisker.array[i]));
      pen.stroke();
    }
    pen.beginPath();
    if (kind.startsWith("square")) pen.rect(a - 0.9 * r, b - 0.9 * r, 1.8 * r, 1.8 * r);
    else if (kind.startsWith("triangle-up")) for (const [dx, dy] of [[0, -1.2], [1, 0.6], [-1, 0.6]]) pen.lineTo(a + dx * r, b + dy * r);
    else if (kind.startsWith("diamond")) for (const [dx, dy] of [[0, -r], [r, 0], [0, r], [-r, 0]]) pen.lineTo(a + 1.3 * dx, b + 1.3 * dy);
    else pen.arc(a, b, r, 0, 2 * Math.PI);
    pen.closePath();
    if (!open) pen.fill();
    if (edge) { pen.strokeStyle = open ? color : edge.color; pen.stroke(); }
  });
}

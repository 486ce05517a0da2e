/* Heat maps of two axes, one per model size: the error at each pair of levels against the mean of
   the size, by the model of all trials. Cells in which nothing has finished show why. */

import { HEAT_COLORS } from "scaling/constants.js";
import { markOf } from "scaling/marks.js";
import { appendTo, axisName, formatPercent, plain, signed } from "scaling/format.js";
import { documents } from "scaling/api.js";
import { axisOf, left, MAX_FACETS, place, textWidth, write, writeX } from "scaling/layout.js";
import { sizeOf, sizes } from "scaling/palette.js";
import { chosenSweeps, loadedRows, state } from "scaling/state.js";
import { apart } from "scaling/ticks.js";
import { stateWords } from "scaling/traces.js";

const CELL = 44; // px, below which a cell has no text
const CELL_INK = "#1c1e21"; // on HEAT_COLORS, in light and dark
const percent = (ratio) => (ratio === null ? null : 100 * (ratio - 1));

/* The maps of the chosen error: [{sweep, x, y, model, ...}]. */
export function heatMaps() {
  return chosenSweeps().flatMap((sweep) =>
    (documents.get(sweep)?.heat?.[state.y] || []).map((m) => ({ ...m, sweep }))
  ).slice(0, MAX_FACETS);
}

/* The groups of panels of maps, one per pair of axes, for layout.place. */
export function heatGroups(maps, t) {
  const pairs = new Map(), several = chosenSweeps().length > 1;
  for (const m of maps) appendTo(pairs, `${m.sweep} ${m.x} ${m.y}`, m);
  return [...pairs.values()].map((of) => {
    const [{ x_levels, y_levels, y }] = of;
    const names = Math.max(...y_levels.map((l) => textWidth(l, t)));
    const title = (m) => `${several ? `${m.sweep}: ` : ""}${m.model?.label || ""}`;
    return {
      titles: of.map(title),
      minWidth: Math.min(t.width - names - 60, Math.max(120, x_levels.length * CELL)),
      maxWidth: Math.max(320, x_levels.length * 64),
      height: Math.min(360, Math.max(72, y_levels.length * CELL)),
      left: names + (y === "model" ? 16 : 40),
      inner: 16,
      above: 28,
    };
  });
}

export function drawHeat(plan, boxes, first, maps, t) {
  const traces = [];
  const all = maps.flatMap((m) => m.values.flat().filter((v) => v !== null).map(percent));
  const most = Math.max(0.1, ...all.map(Math.abs));
  const colorscale = HEAT_COLORS.map((color, i) => [i / (HEAT_COLORS.length - 1), color]);
  plan.coloraxis = { colorscale, cmin: -most, cmax: most, showscale: false };
  maps.forEach((m, i) => {
    const n = first + i, box = boxes[n], where = axisOf(n), cells = cellsOf(m);
    traces.push(cellTrace(m, cells, where, box, t), missingTrace(m, cells, where, t));
    const axis = (letter) => plan[`${letter}axis${n ? n + 1 : ""}`];
    const ticks = (levels, size, width) => {
      const places = levels.map((_, k) => (k * size) / levels.length);
      const tickvals = levels.length * width <= size
        ? levels.map((_, k) => k)
        : apart(places, width);
      return { tickvals, ticktext: tickvals.map((k) => levels[k]), tickmode: "array" };
    };
    const wide = Math.max(...m.x_levels.map((l) => textWidth(l, t))) + 8;
    const range = (levels) => [-0.5, levels.length - 0.5];
    const plainAxis = { showgrid: false, type: "linear", ticks: "" };
    Object.assign(axis("x"), plainAxis, { range: range(m.x_levels) });
    Object.assign(axis("x"), ticks(m.x_levels, box.w, wide), { tickangle: 0 });
    Object.assign(axis("y"), plainAxis, { range: range(m.y_levels) });
    Object.assign(axis("y"), ticks(m.y_levels, box.h, t.size + 4));
    axis("y").showticklabels = box.column === 0;
    if (box.isLast || box.column === 0) writeX(plan, t, box, axisName(m.x));
    if (box.column === 0 && m.y !== "model") {
      write(plan, t, 10, box.y + box.h / 2, axisName(m.y), { textangle: -90 });
    }
  });
  return traces;
}

/* Trials by cell: "x y" -> rows. */
function cellsOf(m) {
  const known = sizes(), cells = new Map();
  const own = m.model && sizeOf(known, m.model.name, m.model.parameters);
  for (const r of loadedRows().filter((r) => r.sweep === m.sweep)) {
    const size = sizeOf(known, r.model_name, r.parameters);
    if (own && size !== own) continue;
    appendTo(cells, `${r[m.x]} ${m.y === "model" ? size.label : r[m.y]}`, r);
  }
  return cells;
}

function cellTrace(m, cells, where, box, t) {
  const every = (of) => m.y_levels.map((y, j) => m.x_levels.map((x, i) => of(j, i, x, y)));
  const hasText = box.w / m.x_levels.length >= CELL && box.h / m.y_levels.length >= 30;
  const at = (k, j, i) => signed(formatPercent(m[k][j][i] - 1));
  const text = (j, i) => m.count[j][i] ? `${at("values", j, i)} %<br>n = ${m.count[j][i]}` : "";
  return {
    type: "heatmap",
    ...where,
    z: m.values.map((line) => line.map(percent)),
    coloraxis: "coloraxis",
    xgap: 1,
    ygap: 1,
    text: every(text),
    texttemplate: hasText ? "%{text}" : "",
    textfont: { size: Math.min(11, t.size), color: CELL_INK },
    customdata: every((j, i, x, y) => (cells.get(`${x} ${y}`) || []).map((r) => r.trial)),
    hovertext: every((j, i, x, y) =>
      `${plain(axisName(m.x))} ${plain(x)}, ${plain(axisName(m.y))} ${plain(y)}<br>` +
      (m.count[j][i] ? `${text(j, i)}<br>[${at("low", j, i)}, ${at("high", j, i)}] %` : "")
    ),
    hovertemplate: "%{hovertext}<extra></extra>",
  };
}

/* The cells with trials, none of which has finished: [[x, y, rows], ...]. */
function missing(m, cells) {
  return m.y_levels.flatMap((y, j) => m.x_levels.map((x, i) => [i, j, cells.get(`${x} ${y}`)]))
    .filter(([i, j, rows]) => rows && !m.count[j][i]);
}

function missingTrace(m, cells, where, t) {
  const found = missing(m, cells);
  return {
    type: "scatter",
    mode: "markers",
    ...where,
    x: found.map((f) => f[0]),
    y: found.map((f) => f[1]),
    marker: {
      symbol: found.map(([, , rows]) => markOf(rows[0].state).symbol),
      size: 10,
      color: t.ink,
      line: { width: 1.5, color: t.ink },
    },
    customdata: found.map(([, , rows]) => rows.map((r) => r.trial)),
    hovertemplate: found.map(([, , rows]) =>
      `${rows.length} trials: ${[...new Set(rows.map((r) => r.state))].join(", ")}<extra></extra>`
    ),
  };
}

/* The words of the colours and marks that maps have. */
export function heatKey(maps) {
  if (!maps.length) return "";
  const states = maps.flatMap((m) => missing(m, cellsOf(m)).map(([, , rows]) => rows[0].state));
  const most = Math.max(...maps.flatMap((m) => m.values.flat()).map((v) => Math.abs((v ?? 1) - 1)));
  const reach = formatPercent(most);
  return [
    `Cells: error against the mean of the size, from −${reach} % (blue) to +${reach} % (orange); ` +
    "n finished trials",
    ...stateWords(states).map((word) => `nothing finished: ${word}`),
  ].join(" · ");
}

export function heat(t) {
  const all = heatMaps(),
    maps = all.slice(0, t.panels),
    groups = maps.length ? heatGroups(maps, t) : [];
  const none = { titles: [""], minWidth: 200, height: 200 };
  const { plan, boxes } = place(groups.length ? groups : [none], t);
  if (!maps.length) {
    plan.xaxis.visible = plan.yaxis.visible = false;
    return [[], plan, "No two settings are compared: choose another Y or view.", ""];
  }
  const key = [left(maps.length, all.length), heatKey(maps)].filter(Boolean).join(". ");
  return [drawHeat(plan, boxes, 0, maps, t), plan, "", key];
}

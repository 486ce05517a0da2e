/* What each setting does: the error of a model at each level over the mean of its levels, with the
   90 % interval as a band, a mark per trial, and the best level with its interval. Below: heat maps
   of two settings, and how much each setting matters. */

import { MASK_COLORS } from "scaling/constants.js";
import { axisName, axisTitle, formatPercent, plain, shortTitle, signed } from "scaling/format.js";
import { documents } from "scaling/api.js";
import { drawHeat, heatGroups, heatKey, heatMaps } from "scaling/heat.js";
import {
  axisOf,
  belowPanel,
  isSmall,
  labelEnds,
  left,
  MAX_FACETS,
  pixel,
  place,
  textWidth,
  write,
  writeX,
  writeY,
} from "scaling/layout.js";
import { sizeOf, sizes } from "scaling/palette.js";
import { chosenSweeps, loadedRows, selectedRows, state } from "scaling/state.js";
import { apart, setAxis } from "scaling/ticks.js";

const maskSize = (t) => 3 * t.size; // px, of a picture
const percent = (ratio) => 100 * (ratio - 1);
const relative = (ratio) => formatPercent(ratio - 1);

/* The effects on the chosen error: [{sweep, axis, models, relative}], mask axes first. Each model
   has its size, colour, and places on the X axis. */
function effects() {
  const known = sizes(),
    found = chosenSweeps().flatMap((sweep) => {
      const axes = documents.get(sweep)?.effects?.[state.y] || [];
      return axes.map((axis) => ({ ...axis, sweep }));
    });
  return found.map((e) => {
    const names = [...new Set(e.models.flatMap((m) => m.levels))];
    const fraction = e.models.every((m) => m.fractions[state.levels]) ? state.levels : "";
    const models = e.models.map((m) => ({
      ...m,
      size: sizeOf(known, m.name, m.parameters),
      at: fraction ? m.fractions[fraction] : m.x || m.levels.map((l) => names.indexOf(l)),
    }));
    return { ...e, models, names, fraction, log: e.log && !fraction };
  });
}

function effectTraces(effect, where) {
  const rows = selectedRows().filter((r) => r.sweep === effect.sweep), known = sizes();
  return effect.models.flatMap((m) => {
    const { color } = m.size, style = { type: "scatter", name: m.label, ...where };
    const own = rows.filter((r) =>
      r.trial in effect.relative &&
      sizeOf(known, r.model_name, r.parameters)?.label === m.size.label
    );
    const at = (r) => m.at[m.levels.indexOf(String(r[effect.axis]))];
    const placed = own.filter((r) => at(r) !== undefined);
    const order = m.at.map((_, i) => i).sort((a, b) => m.at[a] - m.at[b]);
    const sorted = (values) => order.map((i) => values[i]);
    const x = sorted(m.at), high = sorted(m.high).map(percent), low = sorted(m.low).map(percent);
    return [
      {
        ...style,
        mode: "lines",
        x: [...x, ...[...x].reverse()],
        y: [...high, ...[...low].reverse()],
        fill: "toself",
        fillcolor: `${color}22`,
        line: { width: 0 },
        hoverinfo: "skip",
      },
      {
        ...style,
        mode: "markers",
        x: placed.map(at),
        y: placed.map((r) => percent(effect.relative[r.trial])),
        customdata: placed.map((r) => [r.trial]),
        marker: { color, size: 5, opacity: 0.5 },
        hovertemplate: placed.map((r) =>
          `${plain(r.label)}: ${signed(relative(effect.relative[r.trial]))} %<extra></extra>`
        ),
      },
      {
        ...style,
        mode: "lines+markers",
        x,
        y: sorted(m.value).map(percent),
        line: { color, width: 2 },
        marker: { color, size: 8 },
        hovertemplate: order.map((i) =>
          `<b>${plain(m.label)}</b> ${plain(m.levels[i])}: ${signed(relative(m.value[i]))} % [` +
          `${relative(m.low[i])}, ${relative(m.high[i])}]<extra></extra>`
        ),
      },
    ];
  });
}

/* Marks at the best level of each model, below its line, with their intervals. */
function optimumTraces(effect, where, low, step) {
  const known = effect.fraction ? [] : effect.models.filter((m) => m.optimum);
  return known.map((m, i) => ({
    type: "scatter",
    mode: "markers",
    ...where,
    x: [m.optimum.value],
    y: [low - step * (i + 1)],
    error_x: {
      type: "data",
      symmetric: false,
      array: [m.optimum.high - m.optimum.value],
      arrayminus: [m.optimum.value - m.optimum.low],
      color: m.size.color,
    },
    marker: { symbol: "triangle-up", size: 10, color: m.size.color },
    hovertemplate: `best of ${plain(m.best)}<extra></extra>`,
  }));
}

/* Draw the panel of an axis; returns its traces. */
function drawEffect(plan, boxes, i, effect, t) {
  const box = boxes[i], where = axisOf(i), n = i ? i + 1 : "", traces = effectTraces(effect, where);
  const y = traces.flatMap((d) => d.y), x = effect.models.flatMap((m) => m.at);
  const low = Math.min(...y), high = Math.max(...y), step = 0.05 * (high - low);
  const best = optimumTraces(effect, where, low, step);
  const ends = [Math.min(...x), Math.max(...x)];
  setAxis(plan[`yaxis${n}`], low - step * best.length, high, false, box.h / 32, " %");
  setAxis(plan[`xaxis${n}`], ...ends, effect.log, box.w / 56);
  Object.assign(plan[`yaxis${n}`], { zeroline: true, zerolinecolor: t.ink });
  labelEnds(
    plan,
    t,
    box,
    i,
    effect.models.map((m) => ({
      text: m.label,
      color: m.size.color,
      y: percent(m.value[m.at.indexOf(Math.max(...m.at))]),
    })),
  );
  if (!effect.fraction) nameLevels(plan, box, i, effect, t);
  writeX(plan, t, box, effect.fraction ? axisTitle(effect.fraction) : axisName(effect.axis));
  if (!box.column) {
    writeY(
      plan,
      t,
      box,
      `${shortTitle(state.y)}, ${isSmall(t) ? "relative" : "against the size's mean"}`,
    );
  }
  return [...traces, ...best];
}

/* Ticks at the levels that have room, with pictures of their masks below. */
function nameLevels(plan, box, i, effect, t) {
  const axis = plan[`xaxis${i ? i + 1 : ""}`], at = new Map();
  for (const m of effect.models) m.levels.forEach((l, k) => at.set(l, m.at[k]));
  const levels = [...at.keys()], px = levels.map((l) => pixel(plan, box, i, "x", at.get(l)));
  const pictures = levels.map((l) => pictureOf(effect, l, t));
  const width = Math.max(
    ...levels.map((l) => textWidth(l, t)),
    pictures.some((p) => p) ? maskSize(t) : 0,
  );
  const shown = apart(px, width + 6);
  axis.tickvals = shown.map((k) => at.get(levels[k]));
  axis.ticktext = shown.map((k) => plain(levels[k]));
  for (const k of shown.filter((k) => pictures[k])) {
    plan.images.push({
      source: pictures[k],
      xref: "paper",
      yref: "paper",
      x: px[k] / plan.width,
      y: 1 - (box.y + box.h + 24) / plan.height,
      sizex: maskSize(t) / plan.width,
      sizey: maskSize(t) / plan.height,
      xanchor: "center",
      yanchor: "top",
    });
  }
}

/* A mask at a level of a mask axis, as the address of a picture; "" without one. */
function pictureOf(effect, level, t) {
  if (!effect.axis.startsWith("mask.")) return "";
  const row = loadedRows().find((r) => r.sweep === effect.sweep && r[effect.axis] === level);
  const found = documents.get(effect.sweep)?.masks?.[row?.own_setting];
  if (!found?.samples.length) return "";
  const cell = Math.ceil((2 * maskSize(t)) / found.grid);
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = cell * found.grid;
  const pen = canvas.getContext("2d");
  [...found.samples[0]].forEach((c, k) => {
    pen.fillStyle = MASK_COLORS[c] || t.line;
    pen.fillRect((k % found.grid) * cell, Math.floor(k / found.grid) * cell, cell, cell);
  });
  return canvas.toDataURL();
}

/* ---- how much each setting matters */

const bars = () =>
  chosenSweeps().flatMap((sweep) => {
    const several = chosenSweeps().length > 1;
    return (documents.get(sweep)?.importance?.[state.y] || []).map((b) => ({
      ...b,
      text: `${several ? `${sweep}: ` : ""}${axisName(b.name)}`,
    }));
  });

function drawBars(plan, boxes, n, found, t) {
  const box = boxes[n], axis = (letter) => plan[`${letter}axis${n + 1}`];
  const at = (k) => found.map((b) => 100 * b[k]), places = found.map((_, k) => -k);
  const isSeed = (b) => ["seeds", "unexplained"].includes(b.name);
  const most = Math.max(...found.map((b) => (isSeed(b) ? b.value : b.high)));
  setAxis(axis("x"), 0, 100 * most, false, box.w / 56, " %");
  axis("x").range[0] = 0;
  Object.assign(axis("y"), {
    range: [0.6 - found.length, 0.6],
    tickmode: "array",
    tickvals: places,
    ticktext: found.map((b) => plain(b.text)),
    showgrid: false,
  });
  write(plan, t, 8, box.y - 12, "worst level above best; last: standard deviation", {
    xanchor: "left",
  });
  return [{
    type: "bar",
    orientation: "h",
    ...axisOf(n),
    x: at("value"),
    y: places,
    width: 0.5,
    marker: { color: found.map((b) => (isSeed(b) ? "#888888" : t.ink)), opacity: 0.7 },
    error_x: {
      type: "data",
      symmetric: false,
      array: found.map((b) => 100 * (b.high - b.value)),
      arrayminus: found.map((b) => 100 * (b.value - b.low)),
      color: t.ink,
      thickness: 1.2,
    },
    hovertemplate: found.map((b) =>
      `${plain(b.text)}: ${formatPercent(b.value)} % [${formatPercent(b.low)}, ` +
      `${formatPercent(b.high)}]<extra></extra>`
    ),
  }];
}

/* ---- the figure */

function groupsOf(found, maps, t) {
  const several = chosenSweeps().length > 1,
    labels = sizes().map((s) => textWidth(`● ${s.label}`, t));
  const pictures = found.some((e) => !e.fraction && e.axis.startsWith("mask."));
  const groups = [{
    titles: found.map((e) => (several ? `${e.sweep}: ${axisName(e.axis)}` : "")),
    minWidth: 150,
    height: isSmall(t) ? 240 : 304,
    left: isSmall(t) ? 64 : 72,
    inner: 56,
    right: Math.max(...labels) + 12,
    above: several ? 28 : 8,
    below: belowPanel(t) + (pictures ? 8 + maskSize(t) : 0),
  }];
  groups.push(...heatGroups(maps, t));
  const names = Math.max(...bars().map((b) => textWidth(b.text, t)));
  const height = 28 * bars().length;
  groups.push({
    titles: [""],
    minWidth: 120,
    maxWidth: 480,
    height,
    least: height / 2,
    left: names + 12,
    above: 32,
    below: 32,
  });
  return groups;
}

export function effect(t) {
  const all = effects(), allMaps = heatMaps().filter((m) => m.model), most = t.panels || Infinity;
  const found = all.slice(0, Math.min(most, MAX_FACETS)),
    maps = allMaps.slice(0, most - found.length);
  if (!found.length) {
    const { plan } = place([{ titles: [""], minWidth: 200, height: 200 }], t);
    plan.xaxis.visible = plan.yaxis.visible = false;
    return [[], plan, "No setting is compared: choose another Y or view.", ""];
  }
  const { plan, boxes } = place(groupsOf(found, maps, t), t), traces = [];
  found.forEach((e, i) => traces.push(...drawEffect(plan, boxes, i, e, t)));
  traces.push(...drawHeat(plan, boxes, found.length, maps, t));
  traces.push(...drawBars(plan, boxes, boxes.length - 1, bars(), t));
  const words = ["band: 90 % interval", "small: trials"];
  if (found.some((e) => !e.fraction && e.models.some((m) => m.optimum))) {
    words.push("▲ best level with its interval");
  }
  const cut = [left(found.length + maps.length, all.length + allMaps.length)];
  if (plan.images.length) words.push("squares: context blue, targets orange");
  return [traces, plan, "", [...cut, words.join(" · "), heatKey(maps)].filter(Boolean).join(". ")];
}

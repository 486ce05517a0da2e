/* The figures: points with curves and laws; the other views are in their own modules. */

import { NEAR, SHAPES } from "scaling/constants.js";
import {
  axisName,
  axisTitle,
  formatPercent,
  groupBy,
  isError,
  mean,
  pointLabel,
  REFERENCE,
  shortTitle,
  TRIAL_METRICS,
} from "scaling/format.js";
import { documents } from "scaling/api.js";
import { effect } from "scaling/effect.js";
import { heat } from "scaling/heat.js";
import { iso } from "scaling/iso.js";
import {
  axisOf,
  isSmall,
  panels,
  pixel,
  place,
  showLegend,
  write,
  writeX,
  writeY,
} from "scaling/layout.js";
import { groupsBy } from "scaling/palette.js";
import { chosenSweeps, findings, isOn, state, visibleRows } from "scaling/state.js";
import { setAxis } from "scaling/ticks.js";
import {
  curveTraces,
  isOff,
  lawTraces,
  legendTraces,
  MAX_CURVES,
  pointTraces,
  referenceTrace,
  seedTraces,
  selectedFit,
  stateWords,
  valueName,
  xRange,
  yRange,
} from "scaling/traces.js";

const MAX_LEGEND = 24; // names in the legend

export function curvesOf() {
  const { rows } = visibleRows();
  return state.view === "scatter" && isOn("curves") && rows.length <= MAX_CURVES &&
      !TRIAL_METRICS.includes(state.x)
    ? rows
    : [];
}

function scatter(t) {
  const { rows, note } = visibleRows(), groups = groupsBy(state.color);
  const facetGroups = groupsBy(state.facet || "model");
  const shown = panels(rows, facetGroups.of, facetGroups.names, t.panels);
  const { byFacet, facets } = shown;
  const kinds = state.shape ? groupsBy(state.shape) : { names: [], of: () => "" };
  const used = kinds.names.filter((v) => rows.some((r) => kinds.of(r) === v));
  const shapeOf = (v) => SHAPES[Math.max(0, kinds.names.indexOf(v)) % SHAPES.length];
  const traces = [], withCurves = new Set(curvesOf().map((r) => r.trial));
  const comparable = isError(state.y) && state.x in REFERENCE[0];
  const shape = (r) => shapeOf(kinds.of(r));
  facets.forEach((facet, i) => {
    const where = axisOf(i), members = groupBy(byFacet.get(facet) || [], groups.of);
    traces.push(...lawTraces(t, where, i === 0));
    for (const name of groups.names.filter((n) => members.has(n))) {
      const own = members.get(name), color = groups.colors.get(name);
      if (withCurves.size) traces.push(curveTraces(own, color, where));
      traces.push(
        pointTraces(own, name, color, shape, t, where),
        seedTraces(own, name, color, t, where),
      );
    }
    if (isOn("reference") && comparable) traces.push(referenceTrace(t, where, i === 0));
  });
  const many = facets.length > 1, start = rows.map((r) => r[`initial/${state.y}`]);
  const { plan, boxes } = place([{
    titles: facets.map((f) => (many ? valueName(state.facet, f) : "")),
    minWidth: 180,
    height: many ? 260 : isSmall(t) ? 280 : 440,
    left: isSmall(t) ? 56 : 72,
    inner: 16,
    above: many ? 28 : 8,
  }], t);
  const known = start.filter(Number.isFinite), level = known.length ? mean(known) : null;
  setScatterAxes(plan, boxes, traces, level, t);
  legend(plan, traces, groups, used, shapeOf, rows, t);
  return [traces, plan, [...notes(rows, comparable), note].join(" "), key(rows, shown.left)];
}

function setScatterAxes(plan, boxes, traces, level, t) {
  const ys = yRange(traces, state.facet || level === null ? [] : [level]), xs = xRange(traces);
  boxes.forEach((box, i) => {
    const x = plan[`xaxis${i ? i + 1 : ""}`], y = plan[`yaxis${i ? i + 1 : ""}`];
    if (xs) setAxis(x, ...xs, isOn("logx"), box.w / 56);
    if (ys) setAxis(y, ...ys, isOn("logy"), box.h / 32);
    if (!xs || !ys) x.visible = y.visible = false;
    y.showticklabels = box.column === 0;
    if (i) Object.assign(x, { matches: "x" }), Object.assign(y, { matches: "y" });
    if (box.isLast) writeX(plan, t, box, axisTitle(state.x));
    if (!box.column) writeY(plan, t, box, boxes.length > 1 ? shortTitle(state.y) : yTitle(t));
  });
  if (level === null || !ys || boxes.length > 1) return;
  plan.shapes.push({
    type: "line",
    xref: "paper",
    x0: plan.xaxis.domain[0],
    x1: plan.xaxis.domain[1],
    y0: level,
    y1: level,
    line: { dash: "dot", color: t.ink, width: 1 },
  });
  const [box] = boxes, at = pixel(plan, box, 0, "y", level);
  const words = { xanchor: "right", yanchor: "top" };
  write(plan, t, box.x + box.w, at + 2, "randomly initialised encoder", words);
}

const yTitle = (t) => (isSmall(t) ? shortTitle : axisTitle)(state.y);

/* Colours, shapes and states that are drawn, below the figure. */
function legend(plan, traces, groups, used, shapeOf, rows, t) {
  const drawn = groups.names.filter((n) => rows.some((r) => groups.of(r) === n));
  const same = state.shape === state.color;
  const entries = drawn.length < 2 && !same ? [] : drawn.map((v) => ({
    name: valueName(state.color, v),
    color: groups.colors.get(v),
    symbol: same ? shapeOf(v) : "circle",
  }));
  if (!same && used.length > 1) {
    for (const v of used) {
      entries.push({ name: valueName(state.shape, v), color: t.ink, symbol: shapeOf(v) });
    }
  }
  traces.push(...legendTraces(entries.slice(0, MAX_LEGEND)));
  const names = traces.filter((d) => d.showlegend).map((d) => d.name);
  if (names.length) showLegend(plan, t, names);
}

function notes(rows, comparable) {
  const found = [];
  if (isOn("curves") && rows.length > MAX_CURVES) {
    found.push(`Curves are left out above ${MAX_CURVES} trials: choose a setting.`);
  }
  for (const fit of isOn("law") ? chosenSweeps().map((s) => selectedFit(findings(s))) : []) {
    if (fit && !fit.c) {
      found.push(`${fit.text[0].toUpperCase()}${fit.text.slice(1).split("; E = ")[0]}.`);
    }
  }
  if (isOn("reference") && !comparable) {
    found.push("The paper's numbers are probe errors over FLOPs, images or parameters.");
  }
  return found;
}

/* What the marks mean, of those that are drawn. */
function key(rows, left) {
  const isSeveral = ([, axis]) => axis && new Set(rows.map((r) => r[axis])).size > 1;
  const meanings = Object.entries({ colour: state.color, shape: state.shape }).filter(isSeveral);
  const words = [
    ...(left ? [left] : []),
    ...meanings.map(([what, axis]) => `${what}: ${axisName(axis)}`),
    ...stateWords(rows.map((r) => r.state)),
  ];
  if (rows.some(isOff)) {
    words.push(
      `dark rim: learning rate not known to be within a factor of ${NEAR} of the best one`,
    );
  }
  const done = rows.filter((r) => r.state === "done");
  if (new Set(done.map((r) => `${r.sweep} ${pointLabel(r)}`)).size < done.length) {
    words.push("small: each seed");
  }
  const reach = done.map((r) => documents.get(r.sweep)?.reach?.[state.y]).find((v) => v);
  if (reach) {
    const percent = formatPercent(Math.expm1(reach));
    words.push(
      `whisker: 90 % interval of the mean, by the noise of all seeds of the sweep (${percent} % ` +
        "for one seed, less by the root of their number)",
    );
  }
  return words.join(" · ");
}

/* Returns [traces, layout, note above the figure, key below it]. */
export function figure(t) {
  return { effect, scatter, iso, heat }[state.view](t);
}

/* What each setting does: the error of a model at each level over the mean of its levels, with the
   90 % interval as a band, a mark per trial, and the best level with its interval. */

import { COLORS } from "scaling/constants.js";
import { axisName, naturalOrder, plain, shortTitle } from "scaling/format.js";
import { documents } from "scaling/api.js";
import { axisOf, layout, MAX_FACETS } from "scaling/layout.js";
import { chosenSweeps, selectedRows as allRows, state } from "scaling/state.js";

/* The effects on the chosen error: [{sweep, axis, models, relative}], mask axes first. */
function effects() {
  const found = chosenSweeps().flatMap((sweep) => {
    const axes = documents.get(sweep)?.effects?.[state.y] || [];
    return axes.map((axis) => ({ ...axis, sweep }));
  });
  return found.sort((a, b) => b.axis.startsWith("mask") - a.axis.startsWith("mask"));
}

const percent = (ratio) => 100 * (ratio - 1);

/* shown: models that are in the legend. */
function effectTraces(effect, where, colors, shown) {
  const traces = [], rows = allRows().filter((r) => r.sweep === effect.sweep);
  effect.models.forEach((m) => {
    const color = colors.get(m.model), x = m.x || m.levels, style = { ...where, color };
    traces.push(band(x, m.low.map(percent), m.high.map(percent), m.model, style));
    traces.push({
      type: "scatter",
      mode: "lines+markers",
      name: m.model,
      legendgroup: m.model,
      showlegend: !shown.has(m.model),
      ...where,
      x,
      y: m.value.map(percent),
      line: { color, width: 2 },
      marker: { color, size: 8 },
      hovertemplate: m.levels.map((level, n) =>
        `<b>${plain(m.model)}</b> ${plain(level)}: %{y:+.1f} % [${percent(m.low[n]).toFixed(1)}, ` +
        `${percent(m.high[n]).toFixed(1)}]<extra></extra>`
      ),
    });
    shown.add(m.model);
    const own = rows.filter((r) => r.model === m.model && r.trial in effect.relative);
    const at = (r) => x[m.levels.indexOf(String(r[effect.axis]))];
    const placed = own.filter((r) => at(r) !== undefined);
    traces.push({
      type: "scatter",
      mode: "markers",
      legendgroup: m.model,
      showlegend: false,
      ...where,
      x: placed.map(at),
      y: placed.map((r) => percent(effect.relative[r.trial])),
      customdata: placed.map((r) => [r.trial]),
      marker: { color, size: 5, opacity: 0.5 },
      hovertemplate: placed.map((r) => `${plain(r.label)}: %{y:+.1f} %<extra></extra>`),
    });
  });
  return traces;
}

function band(x, low, high, model, style) {
  return {
    type: "scatter",
    mode: "lines",
    legendgroup: model,
    showlegend: false,
    xaxis: style.xaxis,
    yaxis: style.yaxis,
    x: [...x, ...[...x].reverse()],
    y: [...high, ...[...low].reverse()],
    fill: "toself",
    fillcolor: `${style.color}22`,
    line: { width: 0 },
    hoverinfo: "skip",
  };
}

/* Marks at the best level of each model, on the lower edge, with their intervals. */
function optimumTraces(effect, where, colors) {
  const known = effect.models.map((m) => ({ ...m, color: colors.get(m.model) }))
    .filter((m) => m.optimum);
  return known.map((m, i) => ({
    type: "scatter",
    mode: "markers",
    legendgroup: m.model,
    showlegend: false,
    ...where,
    x: [m.optimum.value],
    y: [lowest(effect) - 2 - i],
    error_x: {
      type: "data",
      symmetric: false,
      array: [m.optimum.high - m.optimum.value],
      arrayminus: [m.optimum.value - m.optimum.low],
      color: m.color,
    },
    marker: { symbol: "triangle-up", size: 11, color: m.color },
    hovertemplate: `best of ${plain(m.best)}<extra></extra>`,
  }));
}

const lowest = (effect) =>
  Math.min(
    ...effect.models.flatMap((m) => m.low.map(percent)),
    ...Object.values(effect.relative).map(percent),
  );

/* Titles and ticks of the panel of an axis. */
function effectAxes(effect) {
  const m = effect.models[0], names = [...new Set(effect.models.flatMap((each) => each.levels))];
  const title = { text: axisName(effect.axis) };
  if (!m.x) {
    return { type: "category", title, categoryarray: names.sort(naturalOrder), tickformat: "" };
  }
  const places = new Map(
    effect.models.flatMap((each) => each.levels.map((l, n) => [l, each.x[n]])),
  );
  const type = effect.log ? "log" : "linear";
  return { type, title, tickvals: [...places.values()], ticktext: [...places.keys()] };
}

/* The figure: a panel per setting. */

export function effect(t) {
  const found = effects().slice(0, MAX_FACETS), several = chosenSweeps().length > 1;
  const names = found.map((e) => (several ? `${e.sweep}: ` : "") + axisName(e.axis));
  const plan = layout(names.length ? names : [""], t, true);
  if (!several) plan.annotations = []; // the title of the X axis says as much
  const models = [...new Set(found.flatMap((e) => e.models.map((m) => m.model)))];
  const colors = new Map(models.map((m, i) => [m, COLORS[i % COLORS.length]])), shown = new Set();
  const traces = found.flatMap((e, i) => [
    ...effectTraces(e, axisOf(i), colors, shown),
    ...optimumTraces(e, axisOf(i), colors),
  ]);
  found.forEach((e, i) => {
    const n = i ? i + 1 : "";
    Object.assign(plan[`xaxis${n}`], effectAxes(e));
    Object.assign(plan[`yaxis${n}`], {
      type: "linear",
      tickformat: "",
      ticksuffix: " %",
      zeroline: true,
      zerolinecolor: t.ink,
      title: { text: i ? "" : `${shortTitle(state.y)} against the mean of the size` },
    });
  });
  if (!found.length) plan.xaxis.visible = plan.yaxis.visible = false;
  const note = found.length
    ? "Lines: the error at each level, with its 90 % interval. Small marks: trials. Triangles: the best level."
    : "No setting is compared: choose another Y or view.";
  return [traces, plan, note];
}

/* Iso-FLOP: error against size at equal compute, and how the best size grows. */

import { AXIS_TITLES } from "scaling/constants.js";
import { axisTitle, FITTED, formatNumber, shortTitle } from "scaling/format.js";
import { axisOf, isSmall, labelEnds, place, textWidth, writeX, writeY } from "scaling/layout.js";
import { otherColor } from "scaling/palette.js";
import { chosenSweeps, findings, isOn, state } from "scaling/state.js";
import { setAxis } from "scaling/ticks.js";
import { yRange } from "scaling/traces.js";

const LINE = { type: "scatter", mode: "lines", hoverinfo: "skip" };

export function iso(t) {
  const found = chosenSweeps().map((s) => findings(s) || {});
  const budgets = found.flatMap((f) => f.iso || []).sort((a, b) => a.compute - b.compute);
  const unit = axisTitle(state.x).match(/\[(.*)\]/)?.[1] || axisTitle(state.x);
  const traces = [], ends = [];
  budgets.forEach((b, i) => {
    const color = otherColor(i, budgets.length),
      text = `${formatNumber(b.compute, FITTED)} ${unit}`;
    traces.push(...budgetTraces(b, color, text));
    const y = b.curve_e.length ? b.curve_e.at(-1) : b.e[b.n.indexOf(Math.max(...b.n))];
    ends.push({ text, y, color });
  });
  const key = ["★ lowest error of a budget, by its parabola"];
  for (const [kind, dash, mark] of [["growth", "dash", "- -"], ["size_law", "solid", "—"]]) {
    for (const law of found.map((f) => f[kind]).filter(Boolean)) {
      const line = { color: t.ink, width: 1.5, dash };
      traces.push({ ...LINE, x: law.c, y: law.n, ...axisOf(1), line });
      key.push(`${mark} ${law.text}`);
    }
  }
  const grows = traces.some((x) => x.yaxis === "y2");
  const { plan, boxes } = place([{
    titles: grows ? ["at equal compute", "the best size"] : [""],
    minWidth: 220,
    height: isSmall(t) ? 280 : 400,
    left: 72,
    right: Math.max(0, ...ends.map((e) => textWidth(`● ${e.text}`, t))) + 12,
    above: 28,
  }], t);
  const none = "No budget is shared by three sizes, so there is no iso-FLOP curve. " +
    "Give small models longer horizons, or fork trunks.";
  if (!budgets.length) {
    plan.xaxis.visible = plan.yaxis.visible = false;
    if (grows) setGrowthAxes(plan, boxes[1], traces, t);
    return [traces, plan, none, grows ? key.slice(1).join(" · ") : ""];
  }
  const sizes = budgets.flatMap((b) => [...b.n, ...b.curve_n]);
  setAxis(plan.xaxis, Math.min(...sizes), Math.max(...sizes), true, boxes[0].w / 56);
  setAxis(plan.yaxis, ...yRange(traces), isOn("logy"), boxes[0].h / 32);
  labelEnds(plan, t, boxes[0], 0, ends);
  writeX(plan, t, boxes[0], AXIS_TITLES.parameters);
  writeY(plan, t, boxes[0], shortTitle(state.y));
  if (grows) setGrowthAxes(plan, boxes[1], traces, t);
  const flat = budgets.filter((b) => !b.curve_e.length).length;
  const note = flat
    ? `Without a parabola, because it would open downwards: ${flat} of ${budgets.length} budgets.`
    : "";
  return [traces, plan, note, key.join(" · ")];
}

function setGrowthAxes(plan, box, traces, t) {
  const on = traces.filter((d) => d.yaxis === "y2");
  const reach = (k) =>
    on.flatMap((d) => d[k]).reduce(
      ([a, b], v) => [Math.min(a, v), Math.max(b, v)],
      [Infinity, -Infinity],
    );
  setAxis(plan.xaxis2, ...reach("x"), true, box.w / 56);
  setAxis(plan.yaxis2, ...reach("y"), true, box.h / 32);
  writeX(plan, t, box, axisTitle(state.x));
  writeY(plan, t, box, `N_opt, ${AXIS_TITLES.parameters}`, box.x - 62);
}

function budgetTraces(b, color, name) {
  const style = { type: "scatter", mode: "markers", name };
  const star = { symbol: "star", size: 14, color };
  const traces = [
    {
      ...style,
      x: b.n,
      y: b.e,
      marker: { color, size: 9 },
      hovertemplate: b.n.map((n, i) =>
        `${AXIS_TITLES.parameters}: ${formatNumber(n)}<br>` +
        `${axisTitle(state.y)}: ${formatNumber(b.e[i])}<extra>${name}</extra>`
      ),
    },
    {
      ...style,
      mode: "lines",
      x: b.curve_n,
      y: b.curve_e,
      line: { color, dash: "dot" },
      hoverinfo: "skip",
    },
  ];
  if (!b.optimum) return traces;
  const optimum = formatNumber(b.optimum, FITTED);
  return [
    ...traces,
    {
      ...style,
      x: [b.optimum],
      y: [Math.min(...b.curve_e)],
      marker: star,
      hovertemplate: `N_opt = ${optimum}<extra>${name}</extra>`,
    },
    {
      ...style,
      x: [b.compute],
      y: [b.optimum],
      ...axisOf(1),
      marker: star,
      hovertemplate: `N_opt = ${optimum}<extra>${name}</extra>`,
    },
  ];
}

/* The panels of a figure: colours of the page, domains and axes of each facet. */

import { axisTitle, groupBy, isNarrow, naturalOrder, plain, shortTitle } from "scaling/format.js";
import { isOn, state } from "scaling/state.js";

export const MAX_FACETS = 12; // facets that are drawn

export const axisOf = (i) => ({ xaxis: `x${i ? i + 1 : ""}`, yaxis: `y${i ? i + 1 : ""}` });

export function theme() {
  const css = getComputedStyle(document.documentElement);
  const get = (n) => css.getPropertyValue(n).trim();
  return { ink: get("--ink"), line: get("--line"), paper: get("--paper") };
}

export function panels(rows) {
  const byFacet = state.facet ? groupBy(rows, (r) => r[state.facet]) : new Map([["", rows]]);
  const names = [...byFacet.keys()].sort(naturalOrder);
  const left = names.length > MAX_FACETS
    ? ` The first ${MAX_FACETS} of ${names.length} facets.`
    : "";
  return { byFacet, facets: names.length ? names.slice(0, MAX_FACETS) : [""], left };
}

export function layout(facets, t, apart = false) {
  const columns = Math.min(
    facets.length,
    isNarrow() ? 1 : facets.length === 2 || facets.length === 4 ? 2 : 3,
  );
  const rowCount = Math.ceil(facets.length / columns),
    gapX = columns > 1 ? (apart ? 0.16 : 0.07) : 0,
    gapY = rowCount > 1 ? 0.3 / rowCount : 0;
  const out = {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: t.ink, size: 13 },
    margin: { l: 70, r: 15, t: facets.length > 1 ? 30 : 10, b: isNarrow() ? 150 : 105 },
    hovermode: "closest",
    annotations: [],
    height: Math.max(isNarrow() ? 420 : 560, rowCount * (isNarrow() ? 280 : 300) + 100),
    hoverlabel: { font: { size: 12 } },
    legend: {
      orientation: "h",
      yref: "container",
      y: 0.01,
      yanchor: "bottom",
      x: 0,
      itemsizing: "constant",
    },
    showlegend: true,
    shapes: [],
  };
  facets.forEach((name, i) => {
    const n = i ? i + 1 : "", column = i % columns, line = Math.floor(i / columns);
    const w = (1 - gapX * (columns - 1)) / columns, h = (1 - gapY * (rowCount - 1)) / rowCount;
    const x0 = column * (w + gapX), y1 = 1 - line * (h + gapY);
    const common = {
      gridcolor: t.line,
      zeroline: false,
      linecolor: t.line,
      exponentformat: "power",
      automargin: true,
      ticklabelstandoff: 2,
    };
    const few = isOn("logy") ? { nticks: 9, tickformat: ".3~g" } : {};
    out[`xaxis${n}`] = {
      ...common,
      domain: [x0, x0 + w],
      anchor: `y${n}`,
      type: isOn("logx") ? "log" : "linear",
      nticks: columns > 1 || isNarrow() ? 5 : 7,
      title: {
        text: apart || line === rowCount - 1 || i + columns >= facets.length
          ? axisTitle(state.x)
          : "",
      },
      ...(i && !apart ? { matches: "x" } : {}),
    };
    out[`yaxis${n}`] = {
      ...common,
      ...few,
      showticklabels: apart || !column,
      domain: [Math.max(0, y1 - h), y1],
      anchor: `x${n}`,
      type: isOn("logy") ? "log" : "linear",
      title: {
        standoff: 14,
        text: column && !apart ? "" : rowCount > 1 ? shortTitle(state.y) : axisTitle(state.y),
      },
      ...(i && !apart ? { matches: "y" } : {}),
    };
    if (facets.length > 1) {
      out.annotations.push({
        text: plain(name),
        xref: "paper",
        yref: "paper",
        x: x0 + w / 2,
        y: y1,
        xanchor: "center",
        yanchor: "bottom",
        showarrow: false,
      });
    }
  });
  return out;
}

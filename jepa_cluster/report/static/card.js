/* The card of a trial, or of the trials of a mark: state, results, costs, links and a picture of
   the setting. It follows the pointer until one is pinned, which the address holds. */

import { MASK_COLORS } from "scaling/constants.js";
import { $, element, FITTED, formatNumber, formatPercent, pointLabel } from "scaling/format.js";
import { documents, runLink, sweeps } from "scaling/api.js";
import { metricName, stateMark } from "scaling/marks.js";
import { change, loadedRows, state, trialId } from "scaling/state.js";

const HINT = "Hover over a point to see its trial. A click on a point or on a line of the table " +
  "pins it here.";

/* Pin the trials of a mark. */
export function pin(names) {
  const rows = loadedRows().filter((r) => names.includes(r.trial));
  if (rows.length) change({ trial: [...new Set(rows.map(trialId))].join(",") });
}

export const unpin = () => change({ trial: "" });

/* Show the pinned trials of the address, after they or their data have changed. */
export function showPinned() {
  const ids = state.trial.split(","), rows = loadedRows().filter((r) => ids.includes(trialId(r)));
  const wasPinned = $("trial").classList.toggle("pinned", rows.length > 0);
  document.body.classList.toggle("has-card", wasPinned);
  if (rows.length) fill(rows);
  else if (!$("trial").querySelector("h3") || $("unpin")) {
    $("trial").replaceChildren(element("p", HINT));
  }
}

/* Show the trials of a mark unless others are pinned. */
export function fillCard(names) {
  if ($("trial").classList.contains("pinned")) return;
  const rows = loadedRows().filter((r) => names.includes(r.trial));
  if (rows.length) fill(rows);
}

function fill(rows) {
  const [first] = rows, doc = documents.get(first.sweep), out = [];
  if ($("trial").classList.contains("pinned")) {
    const button = Object.assign(element("button", "×"), {
      type: "button",
      id: "unpin",
      title: "Unpin (Escape)",
      ariaLabel: "Unpin",
      onclick: unpin,
    });
    out.push(button);
  }
  out.push(element("h3", rows.length > 1 ? pointLabel(first) : first.label));
  const picture = doc?.masks?.[first.own_setting];
  if (picture) {
    const box = element("p");
    box.className = "masks";
    box.title = `masks of ${first.own_setting}: blue context, orange targets`;
    box.append(...picture.samples.slice(0, 4).map((sample) => mask(sample, picture.grid)));
    out.push(box);
  }
  for (const r of rows) out.push(...facts(r, rows.length > 1));
  $("trial").replaceChildren(...out);
}

/* What is known of one trial. */
function facts(r, isOneOfSeveral) {
  const head = element("p"), list = element("dl"), links = element("p");
  if (isOneOfSeveral) head.append(`seed ${r.seed} `);
  head.append(stateMark(r.state));
  if (r.cause && r.cause !== "done") head.append(`, the last attempt ended: ${r.cause}`);
  const values = {
    [state.y ? metricName(state.y) : "error"]: formatNumber(r[state.y]),
    untrained: formatNumber(r[`initial/${state.y}`]),
    loss: formatNumber(r.loss),
    RankMe: formatNumber(r["probe/rankme"]),
    ...learningRate(r),
    attempts: formatNumber(r.attempts),
    [documents.get(r.sweep)?.unit || "GPU-h"]: formatNumber(r.gpu_hours, FITTED),
  };
  for (const [name, text] of Object.entries(values)) {
    list.append(element("dt", name), element("dd", text));
  }
  if (r.trunk) list.append(element("dt", "branch of"), element("dd", r.trunk));
  if (r.run) {
    const link = Object.assign(element("a", "MLflow run"), { href: runLink(r), className: "run" });
    links.append(link, " ");
  }
  const { sweep } = sweeps.find((k) => k.name === r.sweep);
  links.append(element("code", `jepa why ${sweep} ${trialId(r)}`));
  return [head, list, links];
}

/* The learning rate over the best one of a calibration, and what that costs. */
function learningRate(r) {
  if (!r["lr/relative"]) return {};
  const cost = r["lr/excess_error"];
  return {
    "rate / best": formatNumber(r["lr/relative"], FITTED) +
      (cost === undefined ? "" : ` (costs ${formatPercent(cost)} %)`),
  };
}

function mask(letters, grid) {
  const canvas = Object.assign(element("canvas"), { width: grid, height: grid });
  const pen = canvas.getContext("2d");
  [...letters].forEach((c, i) => {
    pen.fillStyle = MASK_COLORS[c] || "#9993";
    pen.fillRect(i % grid, Math.floor(i / grid), 1, 1);
  });
  return canvas;
}

/* Panels beside the figure: findings, the table of trials, one trial with its masks, and the
   CSV. */

import { MASK_COLORS } from "scaling/constants.js";
import { $, download, element, formatNumber, pointLabel } from "scaling/format.js";
import { documents, runLink, sweeps } from "scaling/api.js";
import { allRows, chosenSweeps, findings, state } from "scaling/state.js";

const MAX_ROWS = 2000; // lines of the table

export function showFindings() {
  const names = chosenSweeps(), doc = documents.get(names[0]) || {};
  $("title").textContent = names.length === 1 ? doc.question || names[0] : names.join(", ");
  $("expect").textContent = names.length === 1 && doc.expect ? `Expected: ${doc.expect}` : "";
  document.title = `Scaling: ${names.join(", ")}`;
  const prefixed = (s, lines) => lines.map((line) => (names.length > 1 ? `${s}: ${line}` : line));
  const answer = names.flatMap((s) => prefixed(s, findings(s)?.answer || []));
  const none = () => ["no law is fitted to this pair of axes"];
  const lines = names.flatMap((s) => prefixed(s, findings(s)?.summary || none(s)));
  $("answer").replaceChildren(...answer.map((line) => element("li", line)));
  $("findings").replaceChildren(
    ...lines.filter((line) => !answer.includes(line)).map((line) => element("li", line)),
  );
  table();
}

function table() {
  const head = element("tr"),
    names = [
      "trial",
      "state",
      "setting",
      "parameters",
      state.x,
      "before training",
      state.y,
      "GPU-hours",
    ];
  head.append(...names.map((h) => element("th", h)));
  const body = allRows().slice(0, MAX_ROWS).map((r) => {
    const line = element("tr");
    const values = [
      r.label,
      r.state,
      r.setting,
      formatNumber(r.parameters),
      formatNumber(r[state.x]),
      formatNumber(r[`initial/${state.y}`]),
      formatNumber(r[state.y]),
      formatNumber(r.gpu_hours),
    ];
    line.append(...values.map((v) => element("td", v)));
    if (r.run) {
      line.firstChild.replaceChildren(Object.assign(element("a", values[0]), { href: runLink(r) }));
    }
    line.tabIndex = 0;
    line.onfocus = line.onclick = () => showTrial([r.trial]);
    return line;
  });
  $("table").replaceChildren(head, ...body);
}

/* Show the trials of a mark: their state and results, links to their runs, and samples of their
   masks. */
export function showTrial(names) {
  const rows = allRows().filter((r) => names.includes(r.trial));
  if (!rows.length) return;
  const out = [element("h3", pointLabel(rows[0]))];
  for (const r of rows) {
    const facts = [
      `seed ${r.seed}: ${r.state}`,
      `${r.attempts} attempt${r.attempts === 1 ? "" : "s"}`,
      r.cause && r.cause !== "done" ? `the last one ended: ${r.cause}` : "",
      r.trunk ? `a branch of ${r.trunk}` : "",
      `${formatNumber(r.gpu_hours)} GPU-h`,
      `${formatNumber(r[state.y])}, before training ${formatNumber(r[`initial/${state.y}`])}`,
    ];
    const line = element("p", facts.filter(Boolean).join(", ") + ". ");
    if (r.run) {
      line.append(
        Object.assign(element("a", "MLflow run"), { href: runLink(r), className: "run" }),
        " ",
      );
    }
    const { sweep } = sweeps.find((k) => k.name === r.sweep);
    line.append(element("code", `jepa why ${sweep} ${r.trial.split("-").pop()}`));
    out.push(line);
  }
  const picture = documents.get(rows[0].sweep)?.masks?.[rows[0].setting];
  if (picture) {
    out.push(element("p", `masks of ${rows[0].setting} (blue context, orange targets):`));
    for (const sample of picture.samples.slice(0, 4)) out.push(mask(sample, picture.grid));
  }
  $("trial").replaceChildren(...out);
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

export function csv() {
  const rows = allRows(), columns = [...new Set(rows.flatMap((r) => Object.keys(r)))];
  const quote = (
    v,
  ) => (/[",\n]/.test(String(v ?? "")) ? `"${String(v).replaceAll('"', '""')}"` : String(v ?? ""));
  download(
    "scaling.csv",
    "text/csv",
    [columns, ...rows.map((r) => columns.map((c) => r[c]))].map((l) => l.map(quote).join(",")).join(
      "\n",
    ),
  );
}

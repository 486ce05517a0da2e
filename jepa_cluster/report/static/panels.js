/* Title and findings of the chosen sweeps, and the CSV. */

import { $, download, element } from "scaling/format.js";
import { showAnswer } from "scaling/answer.js";
import { documents } from "scaling/api.js";
import { chosenSweeps, findings, selectedRows } from "scaling/state.js";

export function showFindings() {
  const names = chosenSweeps(), doc = documents.get(names[0]) || {};
  $("title").textContent = names.length === 1
    ? doc.question || names[0]
    : names.join(", ") || "Scaling";
  $("expect").textContent = names.length === 1 && doc.expect ? `Expected: ${doc.expect}` : "";
  document.title = `Scaling: ${names.join(", ")}`;
  const lines = names.flatMap((s) => {
    const found = findings(s)?.evidence || ["no law is fitted to this pair of axes"];
    return found.map((line) => (names.length > 1 ? `${s}: ${line}` : line));
  });
  showAnswer();
  $("findings").replaceChildren(...lines.map((line) => element("li", line)));
}

const INTERNAL = ["run", "experiment", "model_name", "own_setting"]; // of this page alone

export function csv() {
  const rows = selectedRows(),
    columns = [...new Set(rows.flatMap((r) => Object.keys(r)))]
      .filter((c) => !INTERNAL.includes(c));
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

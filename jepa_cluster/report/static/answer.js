/* The answer above the figure: a line per setting with the best level of each size, whether it
   moves with size, and how much the setting matters; below it what else is known. */

import { $, axisName, element } from "scaling/format.js";
import { documents } from "scaling/api.js";
import { chosenSweeps, findings, state } from "scaling/state.js";

/* A line of the table. The head of each cell is beside it on a phone. */
function line(axis, heads) {
  const best = new Map(axis.models.map((m) => [m.label, m.best]));
  const cells = heads.map((head) => {
    const text = head in FIXED ? FIXED[head](axis) : best.get(head) || "–";
    const cell = element("td", text);
    cell.dataset.head = head;
    return cell;
  });
  const row = element("tr"), name = element("th", axisName(axis.axis));
  name.scope = "row";
  if (axis.at_equal) name.append(element("small", axis.at_equal));
  const isRange = axis.models.some((m) =>
    m.optimum && m.levels.some((level) => /\d-[.\d]/.test(level))
  );
  if (isRange) name.append(element("small", "middle of the range"));
  row.append(name, ...cells);
  return row;
}

const FIXED = { "moves with size": (a) => a.moves_text, "worst above best": (a) => a.effect_text };

function table(sweep, axes) {
  const labels = [...new Map(axes.flatMap((a) => a.models.map((m) => [m.label, m.parameters])))]
    .sort((a, b) => a[1] - b[1]).map(([label]) => label);
  const heads = [...Object.keys(FIXED), ...labels].filter((h) =>
    labels.length > 1 || h !== "moves with size"
  );
  const made = element("table"), head = element("tr");
  head.append(
    element("th", chosenSweeps().length > 1 ? sweep : "best level"),
    ...heads.map((h) => Object.assign(element("th", h), { scope: "col" })),
  );
  made.append(element("thead"), element("tbody"));
  made.tHead.append(head);
  made.tBodies[0].append(...axes.map((axis) => line(axis, heads)));
  return made;
}

export function showAnswer() {
  const several = chosenSweeps().length > 1, parts = [];
  for (const sweep of chosenSweeps()) {
    const doc = documents.get(sweep) || {}, axes = doc.effects?.[state.y] || [];
    if (axes.length) parts.push(table(sweep, axes));
    const notes = [findings(sweep)?.headline, ...(doc.notes?.[state.y] || [])].filter(Boolean);
    const list = element("ul");
    list.append(...notes.map((note) => element("li", several ? `${sweep}: ${note}` : note)));
    if (notes.length) parts.push(list);
  }
  $("answer").replaceChildren(...parts);
}

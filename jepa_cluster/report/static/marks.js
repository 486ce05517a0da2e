/* States with their marks, and short names of metrics, as the table and the card show them. */

import { STATE_MARKS } from "scaling/constants.js";
import { element, shortTitle } from "scaling/format.js";

/* A user may have edited the tag of a state. */
export const markOf = (name) => STATE_MARKS[name] || STATE_MARKS.unknown;

export const stateMark = (name) =>
  Object.assign(element("span", `${markOf(name).glyph} ${name}`), {
    className: `state ${name}`,
  });

/* A metric as the head of a column: "class error", "class error, online", "RankMe". */
export function metricName(metric) {
  const words = metric.replace("probe/", "").replace(/^(.*)\/(.*)$/, "$2, $1");
  return /_(error|top1|r2)$/.test(metric)
    ? words.replaceAll("_", " ")
    : shortTitle(metric).replace(/,.*/, "");
}

/* Selects trials by words, with the grammar and the results of `jepa status SWEEP WORDS`
   (sweep/select_trials.py). Rows have index, id, name, label, seed, state and point: axis -> value
   as labels show it. */

import { ABBREVIATIONS, STATES } from "scaling/constants.js";
import { appendTo, general } from "scaling/format.js";

const COLUMNS = ["state", "seed", "class", "id", "name", "action"];
const NAME = /^(?!(?:true|false|null)$)[A-Za-z][\p{L}\p{N}_.-]*$/u; // needs no axis name

/* Returns the selected rows. Throws an error with a sentence for an unknown key, and when no row
   matches. */
export function select(rows, words) {
  const known = new Set([...COLUMNS, ...rows.flatMap((r) => Object.keys(r.point))]);
  const shown = shownInLabels(rows), groups = new Map(), removed = [];
  for (const word of words) {
    const condition = parse(word.replace(/^!/, ""), shown, known);
    if (word.startsWith("!")) removed.push(condition);
    else appendTo(groups, word.includes("=") ? word : condition.about, condition);
  }
  let selected = rows;
  for (const group of groups.values()) {
    selected = selected.filter((r) => group.some((condition) => holds(condition, r)));
  }
  selected = selected.filter((r) => !removed.some((condition) => holds(condition, r)));
  if (words.length && rows.length && !selected.length) {
    const alone = [...groups.values()].flat().find((c) => !rows.some((r) => holds(c, r)));
    const what = alone ? alone.word : words.join(" ");
    throw new Error(`No trial matches ${what}${alone ? hint(alone, rows) : "."}`);
  }
  return selected;
}

/* word of a label -> the axes that show it, with their values. */
function shownInLabels(rows) {
  const shown = new Map();
  for (const r of rows) {
    const axes = Object.keys(r.point);
    for (const axis of axes) add(axisWord(axis, r.point[axis], axes), axis, r.point[axis]);
    add(`s${r.seed}`, "seed", r.seed);
  }
  function add(word, axis, value) {
    if (!shown.has(word)) shown.set(word, new Map());
    shown.get(word).set(axis, String(value));
  }
  return shown;
}

/* The word of a label: 'ts=.15-.2', or only the value if it is a name or many steps. */
export function axisWord(axis, text, axes) {
  if (NAME.test(text) || (axis === "optim.steps" && text.endsWith("k"))) return text;
  const last = axis.split(".").pop();
  const isAlone = axes.every((other) => other === axis || other.split(".").pop() !== last);
  return `${ABBREVIATIONS[axis] || (isAlone ? last : axis)}=${text}`;
}

function parse(word, shown, known) {
  const axes = shown.get(word);
  if (axes?.size === 1) {
    const [[about, text]] = axes;
    return { word, about, values: [text] };
  }
  const [key, ...rest] = word.split("="), value = rest.join("=");
  if (!rest.length) return { word, about: "", values: [word] };
  const short = value.replace(/\d*\.\d+/g, (number) => formatFloat(+number));
  return { word, about: findAxis(key, known), values: [...value.split(","), ...short.split(",")] };
}

function findAxis(key, known) {
  const names = [...known].filter((name) =>
    `.${name}`.endsWith(`.${key}`) || ABBREVIATIONS[name] === key
  );
  if (!names.length) {
    throw new Error(`Trials have no '${key}'${suggestion(key, known)}`);
  }
  return names.reduce((a, b) => (b.length < a.length ? b : a));
}

function holds({ about, values }, row) {
  if (!about) return values.some((word) => isCalled(row, word));
  const texts = spellings(cell(row, about));
  return values.some((value) => texts.some((text) => pattern(value).test(text)));
}

const cell = (row, about) => (COLUMNS.includes(about) ? row[about] : row.point[about]);

function isCalled(row, word) {
  if (/^\d{1,5}$/.test(word)) return String(row.index) === word;
  return row.name.includes(word) || row.label.includes(word) || row.id.startsWith(word);
}

/* A value as labels show it, and as Python writes it. */
function spellings(value) {
  const text = String(value ?? "null");
  if (/^\d+(\.\d+)?k$/.test(text)) return [text, (parseFloat(text) * 1000).toFixed()];
  if (/^\d{4,7}$/.test(text) && text.endsWith("00")) return [text, `${+text / 1000}k`];
  const python = { null: "None", true: "True", false: "False" }[text];
  return python ? [text, python] : [text];
}

const formatFloat = (v) => (v < 1 ? general(v).replace("0.", ".") : general(v));

/* A pattern of a shell as a regular expression. */
function pattern(text) {
  const parts = text.match(/\[!?[^\]]+\]|[^]/g) || [];
  const source = parts.map((part) => {
    if (part === "*") return "[^]*";
    if (part === "?") return "[^]";
    if (part.length > 1 && part[0] === "[") return part.replace("\\", "\\\\").replace("[!", "[^");
    return part.replace(/[\\^$.*+?()[\]{}|/]/, "\\$&");
  });
  return new RegExp(`^${source.join("")}$`, "u");
}

function hint({ word, about, values }, rows) {
  if (!about) return STATES.includes(word) ? `: did you mean 'state=${word}'?` : ".";
  const possible = about === "state" ? STATES : rows.map((r) => String(cell(r, about)));
  return suggestion(values[0], new Set(possible));
}

function suggestion(word, known) {
  const [close] = nearest(word, known);
  return close === undefined ? "." : `: did you mean '${close}'?`;
}

/* The names that are most like a word, the closest first. */
export function nearest(word, known) {
  const found = [...known].map((name) => [likeness(word, name), name]);
  const close = found.filter(([share]) => share >= 0.6).sort((a, b) => b[0] - a[0]);
  return close.slice(0, 3).map(([, name]) => name);
}

/* Twice the longest common subsequence over the length of both. */
function likeness(a, b) {
  const longest = new Array(b.length + 1).fill(0);
  for (const c of a) {
    let before = 0;
    for (let j = 1; j <= b.length; j++) {
      const above = longest[j];
      longest[j] = c === b[j - 1] ? before + 1 : Math.max(above, longest[j - 1]);
      before = above;
    }
  }
  return 2 * longest[b.length] / Math.max(a.length + b.length, 1);
}

"use strict";
// The data of the page, and what its other scripts share.

const find = (id) => document.getElementById(id);
const data = JSON.parse(find("data").textContent);
const SAMPLED = "1";
const KINDS = ["tool", "sampled", "forced"]; // what a token is, by its digit in `kinds`
const FIGURES = { logprob: "log-prob", ratio: "ratio", advantage: "advantage", value: "value" };

// Every rollout with the number of its run, and with its tokens in `whole` if the page has them
const rollouts = data.runs.flatMap((run, number) =>
  run.rows.map((row) => Object.fromEntries([["run", number], ...row.map((value, place) => [data.fields[place], value])])),
);

function append(parent, tag, className, text) {
  const child = document.createElement(tag);
  if (className) child.className = className;
  if (text !== undefined) child.textContent = text;
  parent.append(child);
  return child;
}

function shown(value, digits = 4) {
  return value === null || value === undefined ? "none" : String(+value.toPrecision(digits));
}

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

// A new element; children that are strings become text, whatever is in them
function create(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function shown(value, digits = 4) {
  return typeof value === "number" ? String(+value.toPrecision(digits)) : String(value ?? "none");
}

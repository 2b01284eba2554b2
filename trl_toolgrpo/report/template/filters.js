// Which rollouts are listed, and in which order.

const filters = find("filters");

function options(select, choices) {
  for (const [value, label] of choices) select.append(new Option(label, value));
}

function fillFilters() {
  const distinct = (values) => [...new Set(values)].sort();
  const stops = distinct(rollouts.map((rollout) => rollout.stop));
  const tools = distinct(rollouts.flatMap((rollout) => rollout.tools));
  options(filters.elements.stop, [["", "any"], ["!stop", "cut off (all but stop)"], ...stops.map((stop) => [`=${stop}`, stop])]);
  options(filters.elements.tool, [["", "any"], ["!", "none called"], ...tools.map((tool) => [`=${tool}`, tool])]);
  options(filters.elements.run, [["", "both"], ...data.runs.map((run, number) => [String(number), run.name])]);
  find("run-filter").hidden = data.runs.length < 2;
  find("whole-filter").hidden = rollouts.every((rollout) => rollout.whole);
}

function number(name) {
  const text = filters.elements[name].value;
  return text === "" ? null : Number(text);
}

function passing() {
  const least = number("least"), most = number("most"), from = number("from"), until = number("until");
  const { stop, tool, run, failed, whole, order } = filters.elements;
  const found = rollouts.filter((rollout) => {
    if (run.value !== "" && rollout.run !== Number(run.value)) return false;
    if (least !== null && !(rollout.reward !== null && rollout.reward >= least)) return false;
    if (most !== null && !(rollout.reward !== null && rollout.reward <= most)) return false;
    if (from !== null && rollout.step < from) return false;
    if (until !== null && rollout.step > until) return false;
    if (failed.checked && !rollout.failed) return false;
    if (whole.checked && !rollout.whole) return false;
    if (stop.value === "!stop" ? rollout.stop === "stop" : stop.value && rollout.stop !== stop.value.slice(1)) return false;
    return tool.value === "!" ? !rollout.tools.length : !tool.value || rollout.tools.includes(tool.value.slice(1));
  });
  const keys = { worst: (rollout) => rollout.reward ?? Infinity, best: (rollout) => -(rollout.reward ?? -Infinity), longest: (rollout) => -rollout.tokens };
  const key = keys[order.value];
  return key ? found.sort((a, b) => key(a) - key(b)) : found;
}

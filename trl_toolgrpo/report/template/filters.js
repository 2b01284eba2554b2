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
}

const LIMITS = [["least", "reward", 1], ["most", "reward", -1], ["from", "step", 1], ["until", "step", -1]];

function passing() {
  const { stop, tool, run, failed, whole, order } = filters.elements;
  const limits = LIMITS.map(([name, field, sign]) => [filters.elements[name].value, field, sign]).filter(([limit]) => limit !== "");
  const found = rollouts.filter((rollout) => {
    if (run.value !== "" && rollout.run !== Number(run.value)) return false;
    if (!limits.every(([limit, field, sign]) => sign * ((rollout[field] ?? NaN) - limit) >= 0)) return false;
    if (failed.checked && !rollout.failed) return false;
    if (whole.checked && !rollout.whole) return false;
    if (stop.value === "!stop" ? rollout.stop === "stop" : stop.value && rollout.stop !== stop.value.slice(1)) return false;
    return tool.value === "!" ? !rollout.tools.length : !tool.value || rollout.tools.includes(tool.value.slice(1));
  });
  const keys = { worst: (rollout) => rollout.reward ?? Infinity, best: (rollout) => -(rollout.reward ?? -Infinity), longest: (rollout) => -rollout.tokens };
  const key = keys[order.value];
  return key ? found.sort((a, b) => key(a) - key(b)) : found;
}

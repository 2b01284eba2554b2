// Values under the pointer, in the caption of a panel.

const points = JSON.parse(find("points").textContent);
const SVG = "http://www.w3.org/2000/svg";

function valueAt(run, metric, step) {
  const [steps, values] = run.curves[metric] || [[], []];
  let best = -1;
  steps.forEach((known, place) => {
    if (best < 0 || Math.abs(known - step) < Math.abs(steps[best] - step)) best = place;
  });
  return best < 0 ? null : [steps[best], values[best]];
}

function showValues(figure, event) {
  const svg = figure.querySelector("svg"), [first, last, left, right, width] = figure.dataset.x.split(" ").map(Number);
  const box = svg.getBoundingClientRect();
  const share = ((event.clientX - box.left) / box.width * width - left) / (right - left);
  const wanted = first + Math.min(1, Math.max(0, share)) * (last - first);
  const said = [];
  let step = null;
  for (const run of points) {
    const found = valueAt(run, figure.dataset.metric, wanted);
    if (found === null) continue;
    step = found[0];
    said.push(shown(found[1]));
  }
  if (step === null) return;
  const x = left + (right - left) * (last > first ? (step - first) / (last - first) : 0.5);
  let cursor = svg.querySelector(".cursor");
  if (!cursor) {
    cursor = document.createElementNS(SVG, "line");
    cursor.setAttribute("class", "cursor");
    svg.append(cursor);
  }
  for (const [name, value] of Object.entries({ x1: x, x2: x, y1: 0, y2: 122 })) cursor.setAttribute(name, value);
  const values = figure.querySelector(".at");
  values.textContent = `step ${step}: ${said.join(" / ")}`;
  values.hidden = false;
  figure.querySelectorAll(".last").forEach((last) => (last.hidden = true));
}

function hideValues(figure) {
  figure.querySelector(".cursor")?.remove();
  figure.querySelector(".at").hidden = true;
  figure.querySelectorAll(".last").forEach((last) => (last.hidden = false));
}

for (const figure of document.querySelectorAll(".panel[data-metric]")) {
  const svg = figure.querySelector("svg");
  svg.addEventListener("pointermove", (event) => showValues(figure, event));
  svg.addEventListener("pointerdown", (event) => showValues(figure, event));
  svg.addEventListener("pointerleave", () => hideValues(figure));
}

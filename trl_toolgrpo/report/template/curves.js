// Values under the pointer, in the caption of a panel.

function showValues(figure, event) {
  const svg = figure.querySelector("svg"), [low, high] = JSON.parse(figure.dataset.steps);
  const grid = svg.querySelector(".grid"), left = grid.x1.baseVal.value, right = grid.x2.baseVal.value;
  const box = svg.getBoundingClientRect();
  const share = ((event.clientX - box.left) / box.width * svg.viewBox.baseVal.width - left) / (right - left);
  const wanted = low + Math.min(1, Math.max(0, share)) * (high - low);
  const nearest = (line) => line.reduce((a, b) => (Math.abs(b[0] - wanted) < Math.abs(a[0] - wanted) ? b : a));
  const found = JSON.parse(figure.dataset.lines).map(nearest);
  if (!found.length) return;
  const step = found[found.length - 1][0], x = left + (right - left) * (high > low ? (step - low) / (high - low) : 0.5);
  const cursor = svg.querySelector(".cursor") || svg.appendChild(grid.cloneNode());
  cursor.setAttribute("class", "cursor");
  for (const [name, value] of Object.entries({ x1: x, x2: x, y1: 0, y2: 122 })) cursor.setAttribute(name, value);
  const caption = figure.querySelector(".at");
  caption.textContent = `step ${step}: ${found.map((point) => shown(point[1])).join(" / ")}`;
  caption.hidden = false;
}

for (const svg of document.querySelectorAll(".panel svg")) {
  const figure = svg.closest(".panel");
  for (const kind of ["pointermove", "pointerdown"]) svg.addEventListener(kind, (event) => showValues(figure, event));
  svg.addEventListener("pointerleave", () => {
    svg.querySelector(".cursor")?.remove();
    figure.querySelector(".at").hidden = true;
  });
}

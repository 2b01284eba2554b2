// Wires the parts together.

if (rollouts.length) {
  find("browser").hidden = false;
  fillFilters();
  listRollouts();
  performance.mark("listed");
  filters.addEventListener("input", listRollouts);
  filters.addEventListener("reset", () => setTimeout(listRollouts));
  filters.addEventListener("submit", (event) => event.preventDefault());
  addEventListener("resize", drawRows);
}

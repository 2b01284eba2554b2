// The list of rollouts. Only the rows in view are in the document, so that ten thousand cost what thirty do.

const ROW = 52;
const list = find("list"), rows = find("rows");
let listed = [], active = 0, selected = null;
let widest = 1;

function rowOf(rollout, index) {
  const row = document.createElement("div");
  row.className = index === active ? "row active" : "row";
  row.id = `row-${index}`;
  row.style.top = `${index * ROW}px`;
  row.setAttribute("role", "option");
  row.setAttribute("aria-selected", String(rollout === selected));
  row.setAttribute("aria-posinset", String(index + 1));
  row.setAttribute("aria-setsize", String(listed.length));
  const reward = append(row, "div", "reward", rollout.reward === null ? "none" : shown(rollout.reward, 3));
  if (rollout.reward !== null) {
    append(reward, "span", "bar").style.width = `${(100 * Math.abs(rollout.reward)) / widest}%`;
  }
  const first = append(row, "div", "", "");
  if (data.runs.length > 1) append(first, "span", `run${rollout.run}`, `${data.runs[rollout.run].name} `);
  append(first, "span", "", `step ${rollout.step}, group ${rollout.group}, ${rollout.tokens} tokens${rollout.whole ? "" : ", left out"}`);
  if (rollout.assisted) append(first, "span", "", ", assisted");
  const second = append(row, "div", "second", "");
  if (rollout.stop !== "stop") append(second, "span", "cut", `${rollout.stop} `);
  if (rollout.failed) append(second, "span", "bad", `${rollout.failed} failed `);
  append(second, "span", "", rollout.tools.join(", ") || "no call");
  return row;
}

function drawRows() {
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 4);
  const last = Math.min(listed.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 4);
  const wanted = Array.from({ length: Math.max(0, last - first) }, (_, place) => first + place);
  if (active < listed.length && (active < first || active >= last)) wanted.push(active); // the one screen readers are on
  rows.replaceChildren(...wanted.map((index) => rowOf(listed[index], index)));
  if (listed.length) list.setAttribute("aria-activedescendant", `row-${active}`);
  else list.removeAttribute("aria-activedescendant");
}

function listRollouts() {
  listed = passing();
  widest = Math.max(1e-9, ...listed.slice(0, 50000).map((rollout) => Math.abs(rollout.reward || 0)));
  active = Math.max(0, listed.indexOf(selected));
  rows.style.height = `${listed.length * ROW}px`;
  find("count").textContent = `${listed.length} of ${rollouts.length} rollouts`;
  list.scrollTop = Math.max(0, active * ROW - list.clientHeight / 2);
  drawRows();
  if (!listed.length) {
    selected = null;
    closeRollout("No rollout passes these filters.");
  } else if (!listed.includes(selected)) choose(0);
}

function choose(index) {
  if (!listed.length) return;
  active = Math.min(listed.length - 1, Math.max(0, index));
  selected = listed[active];
  const top = active * ROW;
  if (top < list.scrollTop) list.scrollTop = top;
  if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
  drawRows();
  openRollout(selected);
}

const LIST_KEYS = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity };

list.addEventListener("keydown", (event) => {
  if (event.key in LIST_KEYS) {
    event.preventDefault();
    choose(active + LIST_KEYS[event.key]);
  } else if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    if (selected !== listed[active]) choose(active);
    find("tokens").focus();
  }
});
list.addEventListener("scroll", drawRows, { passive: true });
list.addEventListener("click", (event) => {
  const row = event.target.closest(".row");
  if (!row) return;
  choose(Number(row.id.slice(4)));
  if (getComputedStyle(list.parentElement).display === "block") find("conversation").scrollIntoView(); // on a phone
});

// The list of rollouts. Only the rows in view are in the document, so that ten thousand cost what thirty do.

const ROW = 52;
const list = find("list"), rows = find("rows");
let listed = [], active = 0, selected = null;
let widest = 1;

function rowOf(rollout, index) {
  const { run, step, group, reward, stop, failed } = rollout, span = (className, text) => create("span", { className }, text);
  const size = `${rollout.tokens} tokens${rollout.whole ? "" : ", left out"}${rollout.assisted ? ", assisted" : ""}`;
  const first = [`step ${step}, group ${group}, ${size}`], second = [span("", rollout.tools.join(", ") || "no call")];
  if (data.runs.length > 1) first.unshift(span(`run${run}`, `${data.runs[run].name} `));
  if (failed) second.unshift(span("bad", `${failed} failed `));
  if (stop !== "stop") second.unshift(span("cut", `${stop} `));
  const bar = create("span", { className: "bar", style: `width: ${(100 * Math.abs(reward)) / widest}%` });
  const attributes = { role: "option", ariaSelected: rollout === selected, ariaPosInSet: index + 1, ariaSetSize: listed.length };
  return create(
    "div",
    { ...attributes, id: `row-${index}`, className: `row${index === active ? " active" : ""}`, style: `top: ${index * ROW}px` },
    create("div", { className: "reward" }, shown(reward, 3), bar),
    create("div", {}, ...first),
    create("div", { className: "second" }, ...second),
  );
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

// One rollout, token by token: who wrote each token, and its figures.

const tokens = find("tokens"), color = find("color");
let rollout = null, texts = [], current = -1;

async function openRollout(entry) {
  let found;
  try {
    found = await rolloutOf(entry);
  } catch (error) {
    if (entry === selected) closeRollout(`This rollout cannot be unpacked: ${error.message}`);
    return;
  }
  if (entry !== selected) return; // another one was chosen meanwhile
  rollout = found;
  for (const part of [find("prompt"), find("legend")]) part.hidden = false;
  texts = data.runs[entry.run].tokens;
  drawFacts(entry);
  drawPrompt();
  drawColors();
  drawTokens();
  find("conversation").scrollTop = 0;
  point(Math.max(0, rollout.kinds.indexOf(SAMPLED)), false);
  performance.mark("opened");
}

// Nothing of a rollout is left in the pane, only why
function closeRollout(why) {
  rollout = null;
  current = -1;
  find("facts").textContent = why;
  for (const part of [find("prompt"), find("legend")]) part.hidden = true;
  for (const part of [find("prompt").querySelector(".text"), tokens, find("token")]) part.replaceChildren();
}

function drawFacts(entry) {
  const facts = find("facts");
  facts.replaceChildren();
  const add = (name, value) => {
    const fact = append(facts, "span", "", `${name} `);
    append(fact, "b", "", value);
  };
  add("step", entry.step);
  if (entry.batch >= 0) add("rollout batch", entry.batch);
  add("group", entry.group);
  add("rollout", entry.rollout);
  add("reward", shown(entry.reward));
  const parts = Object.entries(rollout.rewards);
  if (parts.length > 1 || (parts.length && parts[0][1] !== entry.reward)) {
    for (const [name, value] of parts) add(name, typeof value === "number" || value === null ? shown(value) : String(value));
  }
  add("stop", entry.stop);
  add("turns", rollout.turns.length);
  if (entry.assisted) add("step is", "assisted");
}

function drawPrompt() {
  const box = find("prompt").querySelector(".text");
  const text = rollout.text ? pretty(rollout.text[0]) : rollout.prompt.map((token) => texts[token]).join("");
  find("prompt").querySelector("summary").textContent = `Prompt, ${rollout.prompt.length} tokens`;
  box.textContent = text;
  box.tabIndex = 0;
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

function drawColors() {
  const kept = color.value;
  color.replaceChildren(new Option("who wrote them", "kind"));
  for (const name in rollout.figures) color.append(new Option(FIGURES[name], name));
  color.value = kept in rollout.figures ? kept : "kind";
}

function drawTokens() {
  const colors = colorsOf(color.value), heat = colors && colors.heat;
  drawLegend(colors);
  tokens.className = heat ? "heat" : "";
  const parts = [];
  let place = 0;
  const block = (end) => {
    for (; place < Math.min(end, rollout.tokens.length); place++) parts.push(tokenOf(place, heat));
  };
  rollout.turns.forEach((turn, number) => {
    block(turn.start);
    const heading = document.createElement("div");
    heading.className = "turn";
    heading.textContent = turnInWords(turn, number);
    parts.push(heading);
    block(turn.end);
  });
  block(rollout.tokens.length);
  if (rollout.text) {
    const readable = document.createElement("details");
    append(readable, "summary", "", "The same as messages");
    append(readable, "div", "text", pretty(rollout.text[1])).tabIndex = 0;
    parts.push(readable);
  }
  tokens.replaceChildren(...parts);
}

function turnInWords(turn, number) {
  const said = [`turn ${number + 1}`];
  if (turn.seconds) said.push(`sampled in ${shown(turn.seconds, 2)} s`);
  if (turn.stop) said.push(`cut off (${turn.stop})`);
  for (const [name, status, seconds] of turn.calls) said.push(`${name}: ${status}${seconds ? `, ${shown(seconds, 2)} s` : ""}`);
  if (turn.reward) said.push(`reward ${shown(turn.reward, 3)}`);
  return said.join(" · ");
}

function tokenOf(place, heat) {
  const token = document.createElement("span");
  token.className = `t ${KINDS[rollout.kinds[place]]}`;
  token.dataset.place = place;
  const text = texts[rollout.tokens[place]];
  token.textContent = text.trim() === "" ? text.replace(/ /g, "\u00b7").replace(/\n/g, "\u21b5\n") || "\u2205" : text;
  if (heat && rollout.kinds[place] === SAMPLED) {
    const [tint, strength] = heat(place);
    token.style.setProperty("--tint", `var(--${tint})`);
    token.style.setProperty("--heat", strength.toFixed(2));
  }
  return token;
}

const FULL = 0.75; // the strongest color

// How a figure colors sampled tokens: `heat` gives which color, --up or --down, and how strong; `ends` are the figures
// at which it is strongest, from left to right of the scale, with what is in the middle between them
function colorsOf(name) {
  const values = rollout.figures[name];
  if (!values) return null;
  const strength = (share) => FULL * Math.min(1, Math.max(0, share || 0));
  if (name === "logprob") return { ends: ["-4 or less", "0"], heat: (place) => ["down", strength(-values[place] / 4)] };
  if (name === "ratio") {
    const ends = [`${shown(Math.exp(-0.4), 2)} or less`, "1", `${shown(Math.exp(0.4), 2)} or more`];
    return { ends, heat: (place) => [values[place] > 1 ? "up" : "down", strength(Math.abs(Math.log(values[place])) / 0.4)] };
  }
  const written = values.filter((value, place) => rollout.kinds[place] === SAMPLED && Number.isFinite(value));
  const largest = Math.max(0, ...written.map(Math.abs));
  const ends = largest ? [`-${shown(largest, 3)}`, "0", shown(largest, 3)] : ["0"];
  return { ends, heat: (place) => [values[place] > 0 ? "up" : "down", strength(Math.abs(values[place]) / (largest || 1))] };
}

function drawLegend(colors) {
  const keys = find("keys");
  keys.replaceChildren();
  if (!colors) append(keys, "span", "key sampled", "sampled");
  else {
    const scale = append(keys, "span", "scale"), ends = colors.ends;
    append(scale, "span", "", `sampled, by ${FIGURES[color.value]}: ${ends[0]}`);
    if (ends.length > 1) {
      const bar = append(scale, "span", "bar"), middle = ends.length > 2 ? [`rgba(var(--up), ${FULL})`] : [];
      bar.style.backgroundImage = `linear-gradient(to right, ${[`rgba(var(--down), ${FULL})`, "transparent", ...middle].join(", ")})`;
      bar.setAttribute("aria-hidden", "true");
      append(scale, "span", "", ends.length > 2 ? `${ends[1]} in the middle, ${ends[2]}` : ends[1]);
    }
  }
  append(keys, "span", "key forced", "forced");
  append(keys, "span", "key tool", "tool output and template");
}

function point(place, scroll = true) {
  if (!rollout || place < 0 || place >= rollout.tokens.length) return;
  tokens.querySelector(".current")?.classList.remove("current");
  current = place;
  const token = tokens.querySelector(`[data-place="${place}"]`);
  token.classList.add("current");
  if (scroll) token.scrollIntoView({ block: "nearest" });
  const panel = find("token"), kind = rollout.kinds[place], writer = ["tool output or template", "sampled", "forced"][kind];
  panel.replaceChildren();
  append(panel, "code", "", JSON.stringify(texts[rollout.tokens[place]]));
  const id = data.runs[selected.run].ids[rollout.tokens[place]];
  append(panel, "span", "", `token ${place + 1} of ${rollout.tokens.length}, id ${id}, ${writer}`);
  for (const name in rollout.figures) {
    const figure = append(panel, "span", "", "");
    append(figure, "span", "", `${FIGURES[name]} `);
    append(figure, "b", "", kind === SAMPLED ? shown(rollout.figures[name][place]) : "\u2013");
  }
}

const TOKEN_KEYS = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity };

tokens.addEventListener("keydown", (event) => {
  if (event.target !== tokens) return;
  if (event.key in TOKEN_KEYS && rollout) {
    event.preventDefault();
    point(Math.min(rollout.tokens.length - 1, Math.max(0, current + TOKEN_KEYS[event.key])));
  } else if (event.key === "Escape") {
    list.focus();
  }
});
tokens.addEventListener("click", (event) => {
  const token = event.target.closest(".t");
  if (token) point(Number(token.dataset.place), false);
});
color.addEventListener("change", () => {
  if (!rollout) return;
  drawTokens();
  point(current, false);
});

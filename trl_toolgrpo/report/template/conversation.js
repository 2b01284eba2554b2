// One rollout, token by token: who wrote each token, and its figures.

const tokens = find("tokens"), color = find("color"), promptText = find("prompt").querySelector(".text");
let rollout = null, texts = {}, current = -1;

function openRollout(entry) {
  if (!entry.whole) {
    closeRollout("The tokens of this rollout were left out to keep the page small; make the report with a larger --max_size to see them.");
    return;
  }
  rollout = entry.whole;
  texts = data.runs[entry.run].texts;
  for (const part of [find("prompt"), find("legend")]) part.hidden = false;
  drawFacts(entry);
  drawPrompt(data.runs[entry.run].prompts[rollout.prompt]);
  drawColors();
  drawTokens();
  find("conversation").scrollTop = 0;
  point(Math.max(0, rollout.kinds.indexOf(SAMPLED)), false);
  performance.mark("opened");
}

// Empty the pane, and say why
function closeRollout(why) {
  rollout = null;
  find("facts").textContent = why;
  for (const part of [find("prompt"), find("legend")]) part.hidden = true;
  for (const part of [promptText, tokens, find("token")]) part.replaceChildren();
}

function drawFacts(entry) {
  const facts = find("facts");
  facts.replaceChildren();
  const add = (name, value) => append(append(facts, "span", "", `${name} `), "b", "", value);
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

function drawPrompt(ids) {
  find("prompt").querySelector("summary").textContent = `Prompt, ${ids.length} tokens`;
  promptText.textContent = rollout.text ? pretty(rollout.text[0]) : ids.map((id) => texts[id]).join("");
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
  const scale = scaleOf(color.value);
  drawLegend(scale);
  tokens.className = scale ? "heat" : "";
  const spans = rollout.tokens.map((_, place) => tokenOf(place, scale));
  const parts = [];
  let place = 0;
  rollout.turns.forEach((turn, number) => {
    parts.push(...spans.slice(place, turn.start));
    append({ append: (heading) => parts.push(heading) }, "div", "turn", turnInWords(turn, number));
    place = Math.max(place, turn.start);
  });
  parts.push(...spans.slice(place));
  tokens.replaceChildren(...parts);
  if (rollout.text) {
    const readable = append(tokens, "details");
    append(readable, "summary", "", "The same as messages");
    append(readable, "div", "text", pretty(rollout.text[1])).tabIndex = 0;
  }
}

function turnInWords(turn, number) {
  const parts = [`turn ${number + 1}`];
  if (turn.seconds) parts.push(`sampled in ${shown(turn.seconds, 2)} s`);
  if (turn.stop !== "stop") parts.push(`cut off (${turn.stop})`);
  for (const [name, status, seconds] of turn.calls) parts.push(`${name}: ${status}${seconds ? `, ${shown(seconds, 2)} s` : ""}`);
  if (turn.reward) parts.push(`reward ${shown(turn.reward, 3)}`);
  return parts.join(" · ");
}

function tokenOf(place, scale) {
  const token = document.createElement("span");
  token.className = `t ${KINDS[rollout.kinds[place]]}`;
  token.dataset.place = place;
  const text = texts[rollout.tokens[place]];
  token.textContent = text.trim() === "" ? text.replace(/ /g, "\u00b7").replace(/\n/g, "\u21b5\n") || "\u2205" : text;
  if (scale && rollout.kinds[place] === SAMPLED) {
    const value = rollout.figures[color.value][place], level = value === null ? 0 : scale.level(value);
    token.style.setProperty("--tint", `var(--${level > 0 ? "up" : "down"})`);
    token.style.setProperty("--heat", (FULL * Math.min(1, Math.abs(level))).toFixed(2));
  }
  return token;
}

const FULL = 0.75; // the strongest color

// How a figure colors sampled tokens: `level` is from -1, the strongest --down, to 1, the strongest --up; `ends` are the
// figures at both ends of the scale, with the middle between them
function scaleOf(name) {
  if (!(name in rollout.figures)) return null;
  if (name === "logprob") return { ends: ["-4 or less", "0"], level: (value) => value / 4 };
  if (name === "ratio") {
    const ends = [`${shown(Math.exp(-0.4), 2)} or less`, "1", `${shown(Math.exp(0.4), 2)} or more`];
    return { ends, level: (value) => Math.log(value) / 0.4 };
  }
  const sampled = rollout.figures[name].filter((value, place) => rollout.kinds[place] === SAMPLED && value !== null);
  const largest = Math.max(0, ...sampled.map(Math.abs));
  const ends = largest ? [`-${shown(largest, 3)}`, "0", shown(largest, 3)] : ["0"];
  return { ends, level: (value) => value / (largest || 1) };
}

function drawLegend(scale) {
  const keys = find("keys");
  keys.replaceChildren();
  if (!scale) append(keys, "span", "key sampled", "sampled");
  else {
    const key = append(keys, "span", "scale"), [low, middle, high] = scale.ends;
    append(key, "span", "", `sampled, by ${FIGURES[color.value]}: ${low}`);
    if (middle !== undefined) {
      append(key, "span", high === undefined ? "bar down" : "bar").setAttribute("aria-hidden", "true");
      append(key, "span", "", high === undefined ? middle : `${middle} in the middle, ${high}`);
    }
  }
  append(keys, "span", "key forced", "forced");
  append(keys, "span", "key tool", "tool output and template");
}

function point(place, scroll = true) {
  const token = rollout && tokens.querySelector(`[data-place="${place}"]`);
  if (!token) return;
  tokens.querySelector(".current")?.classList.remove("current");
  current = place;
  token.classList.add("current");
  if (scroll) token.scrollIntoView({ block: "nearest" });
  const panel = find("token"), id = rollout.tokens[place], kind = rollout.kinds[place];
  panel.replaceChildren();
  append(panel, "code", "", JSON.stringify(texts[id]));
  const writer = ["tool output or template", "sampled", "forced"][kind];
  append(panel, "span", "", `token ${place + 1} of ${rollout.tokens.length}, id ${id}, ${writer}`);
  for (const name in rollout.figures) {
    const figure = append(panel, "span");
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
  drawTokens();
  point(current, false);
});

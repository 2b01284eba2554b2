// One rollout, token by token: who wrote each token, and its figures.

const tokens = find("tokens"), color = find("color"), promptText = find("prompt").querySelector(".text");
let rollout = null, texts = {}, current = -1;

for (const name in FIGURES) if (rollouts.some(({ whole }) => whole && name in whole.figures)) color.append(new Option(FIGURES[name], name));

function openRollout(entry) {
  const run = data.runs[entry.run];
  if (!entry.whole) {
    closeRollout("The tokens of this rollout were left out to keep the page small. A larger --max_size has room for more.");
    return;
  }
  rollout = entry.whole;
  texts = run.texts;
  for (const part of [find("prompt"), find("legend")]) part.hidden = false;
  drawFacts(entry);
  drawPrompt(run.prompts[rollout.prompt]);
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
  const facts = [["step", entry.step], ["rollout batch", entry.batch], ["group", entry.group], ["rollout", entry.rollout]];
  facts.push(["reward", entry.reward]);
  const parts = Object.entries(rollout.rewards);
  if (parts.length > 1 || (parts.length && parts[0][1] !== entry.reward)) facts.push(...parts);
  facts.push(["stop", entry.stop], ["turns", rollout.turns.length]);
  if (entry.assisted) facts.push(["step is", "assisted"]);
  const fact = ([name, value]) => create("span", {}, `${name} `, create("b", {}, shown(value)));
  find("facts").replaceChildren(...facts.map(fact));
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

function drawTokens() {
  const scale = scaleOf(color.value);
  drawLegend(scale);
  tokens.className = scale ? "heat" : "";
  const spans = rollout.tokens.map((_, place) => tokenOf(place, scale));
  const parts = [];
  let place = 0;
  rollout.turns.forEach((turn, number) => {
    parts.push(...spans.slice(place, turn.start), create("div", { className: "turn", textContent: turnInWords(turn, number) }));
    place = turn.start;
  });
  tokens.replaceChildren(...parts, ...spans.slice(place));
  if (rollout.text) {
    const messages = create("div", { className: "text", tabIndex: 0 }, pretty(rollout.text[1]));
    tokens.append(create("details", {}, create("summary", {}, "The same as messages"), messages));
  }
}

function turnInWords(turn, number) {
  const parts = [`turn ${number + 1}`];
  if (turn.seconds) parts.push(`sampled in ${shown(turn.seconds, 2)} s`);
  if (turn.stop !== "stop") parts.push(`cut off (${turn.stop})`);
  for (const [tool, outcome, seconds] of turn.calls) parts.push(`${tool}: ${outcome}${seconds ? `, ${shown(seconds, 2)} s` : ""}`);
  if (turn.reward) parts.push(`reward ${shown(turn.reward, 3)}`);
  return parts.join(" · ");
}

function tokenOf(place, scale) {
  const text = texts[rollout.tokens[place]], kind = rollout.kinds[place];
  const visible = text.trim() ? text : text.replace(/ /g, "\u00b7").replace(/\n/g, "\u21b5\n") || "\u2205";
  const token = create("span", { id: `t${place}`, className: `t ${KINDS[kind]}` }, visible);
  if (scale && kind === SAMPLED) {
    const value = rollout.figures[color.value][place], level = value === null ? 0 : scale.level(value);
    const share = Math.round(75 * Math.min(1, Math.abs(level)));
    token.style = `--tint: var(--${level > 0 ? "up" : "down"}); --heat: ${share}%`;
  }
  return token;
}

// How a figure colors sampled tokens: `level` is from -1, the strongest --down, to 1, the strongest --up; `ends` are the
// figures at both ends of the scale, with the middle between them
function scaleOf(name) {
  const values = rollout.figures[name];
  if (!values) return null;
  if (name === "logprob") return { ends: ["-4 or less", "0"], level: (value) => value / 4 };
  if (name === "ratio") return { ends: ["0.67 or less", "1", "1.5 or more"], level: (value) => Math.log(value) / 0.4 };
  const largest = Math.max(0, ...values.filter((_, place) => rollout.kinds[place] === SAMPLED).map(Math.abs));
  const ends = largest ? [`-${shown(largest, 3)}`, "0", shown(largest, 3)] : ["0"];
  return { ends, level: (value) => value / (largest || 1) };
}

function drawLegend(scale) {
  const key = (className, ...children) => create("span", { className }, ...children);
  const keys = [key("key forced", "forced"), key("key tool", "tool output and template")];
  if (scale) {
    const [low, middle, high] = scale.ends, parts = [`sampled, by ${FIGURES[color.value]}: ${low}`];
    if (high !== undefined) parts.push(key("bar"), `${middle} in the middle, ${high}`);
    else if (middle !== undefined) parts.push(key("bar down"), middle);
    keys.unshift(key("scale", ...parts));
  } else keys.unshift(key("key sampled", "sampled"));
  find("keys").replaceChildren(...keys);
}

function point(place, scroll = true) {
  const token = rollout && find(`t${place}`);
  if (!token) return;
  tokens.querySelector(".current")?.classList.remove("current");
  current = place;
  token.classList.add("current");
  if (scroll) token.scrollIntoView({ block: "nearest" });
  const id = rollout.tokens[place], kind = rollout.kinds[place], writer = ["tool output or template", "sampled", "forced"][kind];
  const figures = Object.entries(rollout.figures).map(([name, values]) => {
    const value = create("b", {}, kind === SAMPLED ? shown(values[place]) : "\u2013");
    return create("span", {}, create("span", {}, `${FIGURES[name]} `), value);
  });
  const title = create("span", {}, `token ${place + 1} of ${rollout.tokens.length}, id ${id}, ${writer}`);
  find("token").replaceChildren(create("code", {}, JSON.stringify(texts[id])), title, ...figures);
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
  if (token) point(Number(token.id.slice(1)), false);
});
color.addEventListener("change", () => {
  drawTokens();
  point(current, false);
});

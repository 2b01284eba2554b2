"use strict";
// The data of the page: chunks of rollouts are unpacked when one of them is opened. The format is that of packing.py.

const find = (id) => document.getElementById(id);
const data = JSON.parse(find("data").textContent);
const TOOL = 0, SAMPLED = 1, FORCED = 2;
const KINDS = ["tool", "sampled", "forced"];
const FIGURES = { logprob: "log-prob", ratio: "ratio", advantage: "advantage", value: "value" };

function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24);
}

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function decode(bytes) {
  const size = new DataView(bytes.buffer, bytes.byteOffset).getUint32(0);
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + size)));
  let place = 4 + size;
  const column = (count, width, read) => {
    const start = place;
    place += count * width;
    return Array.from({ length: count }, (_, index) => {
      let value = 0;
      for (let plane = 0; plane < width; plane++) value = value * 256 + bytes[start + plane * count + index];
      return read ? read(value) : value;
    });
  };
  const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);
  const width = header.wide ? 4 : 2, count = sum(header.rollouts.map((rollout) => rollout.tokens));
  const prompts = column(sum(header.prompts), width), tokens = column(count, width), kinds = column(count, 1);
  const figures = {};
  for (const name of header.figures) {
    figures[name] = column(count, 2, name === "ratio" ? (bits) => 1 + half(bits) : half);
  }
  let start = 0;
  return header.rollouts.map((rollout) => {
    const end = start + rollout.tokens, first = sum(header.prompts.slice(0, rollout.prompt));
    const part = (values) => values.slice(start, end);
    const own = Object.fromEntries(Object.entries(figures).map(([name, values]) => [name, part(values)]));
    const prompt = prompts.slice(first, first + header.prompts[rollout.prompt]);
    const found = { ...rollout, prompt, tokens: part(tokens), kinds: part(kinds), figures: own };
    start = end;
    return found;
  });
}

// The text of a chunk, which may still be on its way: it is whole when something follows it
async function textOf(id) {
  while (!find(id)?.nextSibling && document.readyState === "loading") await new Promise((done) => setTimeout(done, 20));
  return find(id).textContent;
}

const opened = new Map(); // the last few chunks

async function chunkOf(run, number) {
  const id = `chunk-${run}-${number}`;
  if (!opened.has(id)) {
    opened.set(id, textOf(id).then(unpack).then(decode));
    if (opened.size > 8) opened.delete(opened.keys().next().value);
  }
  return opened.get(id);
}

// Every rollout as { run, place } with what the list shows of it
const rollouts = data.runs.flatMap((run, number) => {
  const starts = [];
  run.sizes.reduce((start, size, chunk) => {
    for (let place = 0; place < size; place++) starts.push([chunk, place]);
    return start + size;
  }, 0);
  return starts.map(([chunk, place], row) => {
    const entry = { run: number, chunk, place };
    for (const name in run.index) entry[name] = run.index[name][row];
    return entry;
  });
});

const rolloutOf = async (entry) => (await chunkOf(entry.run, entry.chunk))[entry.place];

function shown(value, digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "none";
  return Number.isFinite(value) ? String(+value.toPrecision(digits)) : String(value);
}

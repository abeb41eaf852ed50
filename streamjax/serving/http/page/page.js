// The chat, and what it shows of the stream behind it.

import { bytes, plot, short, thin } from "./plots.js";

const WINDOW = 64; // generated tokens over which perplexity is the mean
const MOST_MESSAGES = 200; // that the browser keeps of a conversation; the model's memory is the server's
const at = (id) => document.getElementById(id);

let about = null; // the server's model, cache and engine
let running = null; // AbortController of the answer under way
let name = null; // of the conversation
let seen = 0; // tokens of its stream
let nats = []; // of the newest generated tokens
let series = { tokens: [], perplexity: [], seen: [] };
let began = null; // of the first answer that the page has seen
let drawing = false;
let waiting = false; // whether what is in the box was sent before the server had said what it is

function stored(key, otherwise) {
  try { return JSON.parse(localStorage.getItem(key)) ?? otherwise; } catch { return otherwise; }
}
function store(key, value) {
  try { localStorage.setItem(key, JSON.stringify(value)); } catch { /* a full or forbidden store: nothing is kept */ }
}

async function call(path, options = {}) {
  const headers = { "Content-Type": "application/json", ...options.headers };
  const key = sessionStorage.getItem("key");
  if (key) headers.Authorization = `Bearer ${key}`;
  const answer = await fetch(path, { ...options, headers });
  at("key-form").hidden = answer.status !== 401;
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  const error = new Error(body?.error?.message ?? `the server answers ${answer.status}`);
  error.status = answer.status;
  throw error;
}
const json = async (path, options) => (await call(path, options)).json();

function complain(error) {
  at("error").hidden = !error;
  at("error").textContent = error ? error.message : "";
}

function show(message) {
  const element = document.createElement("div");
  element.className = `message ${message.role}`;
  element.textContent = message.content;
  at("messages").append(element);
  at("messages").scrollTop = at("messages").scrollHeight;
  return element;
}

// Drawing

function record() {
  series.tokens = thin([...series.tokens, [began === null ? 0 : (performance.now() - began) / 1000, seen]]);
  series.seen = thin([...series.seen, seen]);
  if (nats.length) {
    const mean = nats.reduce((sum, value) => sum + value, 0) / nats.length;
    series.perplexity = thin([...series.perplexity, [seen, Math.exp(mean)]]);
  }
  if (!drawing) { drawing = true; requestAnimationFrame(draw); }
}

// Bytes of a stream that kept every token, from what this one's tiers take for one.
function dense(tokens) {
  const layers = new Map();
  for (const part of about.cache.parts) {
    if (part.tokens) for (const layer of part.layers) {
      layers.set(layer, Math.max(layers.get(layer) ?? 0, part.content / part.tokens));
    }
  }
  return tokens * [...layers.values()].reduce((sum, value) => sum + value, 0);
}

function draw() {
  drawing = false;
  if (!about) return;
  const size = about.cache.bytes, points = series.seen;
  at("bytes-now").textContent = `${bytes(size)} a stream`;
  plot(at("bytes"), [
    { kind: "two", points: points.map((tokens) => [tokens, dense(tokens)]) },
    { kind: "one", points: points.map((tokens) => [tokens, size]) },
  ], { word: bytes, unit: "tokens" });
  at("tokens-now").textContent = seen.toLocaleString("en");
  plot(at("tokens"), [{ kind: "one", points: series.tokens }], { unit: "s" });
  const last = series.perplexity.at(-1);
  at("perplexity-now").textContent = last ? last[1].toPrecision(3) : "";
  plot(at("perplexity"), [{ kind: "one", points: series.perplexity }], { unit: "tokens", bottom: 1 });
  drawTiers();
}

function layerWords(layers) {
  if (!layers.length) return "";
  const runs = layers.at(-1) - layers[0] === layers.length - 1 && layers.length > 1;
  return ` (layers ${runs ? `${layers[0]}–${layers.at(-1)}` : layers.join(", ")})`;
}

// A tier takes what the one before it has no room for.
function drawTiers() {
  const rows = [], left = new Map();
  for (const part of about.cache.parts) {
    if (!part.tokens) continue;
    const key = part.layers.join();
    const held = Math.min(part.tokens, left.get(key) ?? seen);
    left.set(key, (left.get(key) ?? seen) - held);
    rows.push({ part, held });
  }
  const box = at("tiers");
  while (box.children.length > rows.length) box.lastChild.remove();
  rows.forEach(({ part, held }, i) => {
    let row = box.children[i];
    if (!row) {
      row = document.createElement("div");
      row.className = "tier";
      row.innerHTML = '<div class="words"><span></span><span></span></div><div class="track"><div class="fill"></div></div>';
      row.lastChild.setAttribute("role", "meter");
      box.append(row);
    }
    const [words, count] = row.firstChild.children;
    words.textContent = part.part + layerWords(part.layers);
    count.textContent = `${short(held)} of ${short(part.tokens)} · ${bytes(part.bytes * part.layers.length)}`;
    const meter = row.lastChild;
    meter.firstChild.style.width = `${(100 * held) / part.tokens}%`;
    meter.setAttribute("aria-label", part.part);
    meter.setAttribute("aria-valuemin", 0);
    meter.setAttribute("aria-valuemax", part.tokens);
    meter.setAttribute("aria-valuenow", held);
  });
  const forgotten = Math.max(0, Math.min(...left.values()));
  at("forgotten").textContent = Number.isFinite(forgotten) && forgotten > 0
    ? `${forgotten.toLocaleString("en")} tokens have left the cache.` : "";
}

// Conversations

function choose(next) {
  name = next;
  store("streamjax.name", name);
  nats = [];
  began = null;
  series = { tokens: [], perplexity: [], seen: [] };
  at("messages").replaceChildren();
  for (const message of stored(`streamjax.${name}`, [])) show(message);
  complain(null);
}

async function refresh() {
  const listed = (await json("/v1/conversations")).data;
  const names = listed.map((each) => each.id);
  if (!names.includes(name)) names.push(name);
  at("conversation").replaceChildren(...names.map((each) => new Option(each, each, false, each === name)));
  seen = listed.find((each) => each.id === name)?.tokens_seen ?? 0;
  record();
}

function fresh() {
  choose(`chat-${crypto.getRandomValues(new Uint32Array(1))[0].toString(36)}`);
  seen = 0;
  at("text").focus();
  return refresh();
}

async function remove() {
  if (!confirm(`Delete ${name}? The model forgets it.`)) return;
  await call(`/v1/conversations/${encodeURIComponent(name)}`, { method: "DELETE" })
    .catch((error) => { if (error.status !== 404) throw error; });
  localStorage.removeItem(`streamjax.${name}`);
  await fresh();
}

// Answers

async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const lines = held.split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

async function ask(text) {
  const mine = { role: "user", content: text }, answer = { role: "assistant", content: "" };
  complain(null);
  show(mine);
  const element = show(answer), box = at("messages");
  running = new AbortController();
  began ??= performance.now();
  busy(true);
  try {
    const request = { model: about.model, messages: [mine], conversation: name, stream: true, logprobs: true };
    const got = await call("/v1/chat/completions", { method: "POST", body: JSON.stringify(request), signal: running.signal });
    for await (const piece of eventsOf(got)) {
      if (piece.error) throw new Error(piece.error.message);
      const choice = piece.choices[0];
      if (!choice) continue;
      for (const entry of choice.logprobs?.content ?? []) {
        nats = [...nats, -entry.logprob].slice(-WINDOW);
        seen += 1;
      }
      if (choice.delta.content) {
        const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
        answer.content += choice.delta.content;
        element.textContent = answer.content;
        if (atEnd) box.scrollTop = box.scrollHeight;
      }
      record();
    }
  } catch (error) {
    if (error.name !== "AbortError") complain(error);
    if (!answer.content) element.remove();
  } finally {
    running = null;
    busy(false);
    store(`streamjax.${name}`, [...stored(`streamjax.${name}`, []), mine, answer].slice(-MOST_MESSAGES));
    await refresh().catch(complain);
  }
}

function busy(yes) {
  at("send").hidden = yes;
  at("stop").hidden = !yes;
  for (const id of ["conversation", "new", "delete"]) at(id).disabled = yes;
  if (!yes) at("text").focus();
}

async function start() {
  about = await json("/v1/streamjax");
  at("model").textContent = `${about.model}, trained at ${about.trained_length.toLocaleString("en")} tokens`;
  at("cache-words").textContent = about.cache.name;
  await refresh();
  if (waiting) { waiting = false; at("ask").requestSubmit(); }
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = at("text").value;
  if (!text.trim() || running) return;
  if (!about) { waiting = true; return; }
  at("text").value = "";
  ask(text);
});
at("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
at("stop").addEventListener("click", () => running?.abort());
at("new").addEventListener("click", () => fresh().catch(complain));
at("delete").addEventListener("click", () => remove().catch(complain));
at("conversation").addEventListener("change", (event) => { choose(event.target.value); refresh().catch(complain); });
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", at("key").value);
  start().catch(complain);
});
addEventListener("resize", () => requestAnimationFrame(draw));

choose(stored("streamjax.name", null) ?? `chat-${crypto.getRandomValues(new Uint32Array(1))[0].toString(36)}`);
start().catch(complain);

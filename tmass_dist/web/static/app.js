"use strict";
// Every text from the gallery is set by textContent, never as markup.

const by = (id) => document.getElementById(id);
const form = by("form"), query = by("query"), nameFilter = by("name"), number = by("number");
const status = by("status"), results = by("results"), template = by("card");
let latest = 0; // answers to earlier questions are dropped

function say(text, isError = false) {
  status.textContent = text;
  status.classList.toggle("error", isError);
}

async function ask(url, describe) {
  const turn = ++latest;
  say("Searching …");
  let answer;
  try {
    const response = await fetch(url);
    answer = await response.json();
    if (!response.ok) throw new Error(answer.error || `status ${response.status}`);
  } catch (error) {
    if (turn === latest) say(error.message === "Failed to fetch" ? "The server does not answer." : error.message, true);
    return;
  }
  if (turn === latest) show(answer, describe(answer));
}

function show(answer, title) {
  const absent = answer.absent ? `; ${answer.absent} of these files no longer exist` : "";
  say(`${title}: ${answer.results.length} of ${answer.videos} videos${absent}`);
  by("labels").textContent = answer.label ? `Scores: ${answer.label}.` : "";
  results.replaceChildren(...answer.results.map(card));
}

function card(result) {
  const item = template.content.cloneNode(true).firstElementChild;
  const image = item.querySelector("img");
  image.src = result.thumbnails[result.frame];
  image.alt = `Frame of ${result.id} at ${seconds(result.time_s)}`;
  item.querySelector(".id").textContent = result.id;
  item.querySelector(".time").textContent = `${seconds(result.time_s)} / ${seconds(result.seconds)}`;
  item.querySelector(".score").textContent = result.score.toFixed(3);
  const strip = item.querySelector(".attention");
  const largest = Math.max(...result.attention, 1e-9);
  result.attention.forEach((weight, frame) => {
    const bar = document.createElement("button");
    const fill = document.createElement("span");
    fill.style.height = `${Math.max(4, 100 * weight / largest)}%`;
    bar.type = "button";
    bar.tabIndex = -1;
    bar.title = `${seconds(result.times_s[frame])}: attention ${(100 * weight).toFixed(1)} %`;
    bar.classList.toggle("moment", frame === result.frame);
    bar.append(fill);
    bar.addEventListener("click", (event) => { event.stopPropagation(); play(item, result, frame); });
    strip.append(bar);
  });
  item.querySelector(".media").addEventListener("click", () => play(item, result, result.frame));
  item.querySelector(".similar").addEventListener("click", () => similar(result));
  item.addEventListener("keydown", (event) => {
    if (event.target !== item) return;
    if (event.key === "Enter") play(item, result, result.frame);
    if (event.key === "m") similar(result);
  });
  return item;
}

// What the player needs to know of a result.
function playable(result) {
  return {
    url: result.video,
    count: result.thumbnails.length,
    time: (frame) => result.times_s[frame],
    label: (frame) => seconds(result.times_s[frame]),
    picture: (frame) => {
      const image = document.createElement("img");
      image.src = result.thumbnails[frame];
      image.alt = `Frame of ${result.id} at ${seconds(result.times_s[frame])}`;
      return image;
    },
  };
}

function play(item, result, frame) {
  playIn(item.querySelector(".media"), playable(result), frame);
}

function similar(result) {
  window.scrollTo({ top: 0 });
  const url = `/api/similar?${new URLSearchParams({ row: result.row, k: number.value })}`;
  ask(url, (answer) => `Videos like ${answer.similar_to}`);
}

function search() {
  const asked = { q: query.value.trim(), k: number.value, name: nameFilter.value.trim() };
  if (!asked.q) {
    latest++;
    results.replaceChildren();
    say("Type what you look for.");
    return;
  }
  if (!asked.name) delete asked.name;
  history.replaceState(null, "", `?${new URLSearchParams(asked)}`);
  ask(`/api/search?${new URLSearchParams(asked)}`, (answer) => `“${answer.query}”`);
}

form.addEventListener("submit", (event) => { event.preventDefault(); search(); });
number.addEventListener("change", () => { if (query.value.trim()) search(); });

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, select, video");
  if (event.key === "/" && !typing) {
    event.preventDefault();
    query.focus();
    query.select();
  }
  if (typing || !["ArrowLeft", "ArrowRight"].includes(event.key)) return;
  const cards = [...results.children], at = cards.indexOf(document.activeElement);
  const next = cards[Math.min(cards.length - 1, Math.max(0, at + (event.key === "ArrowRight" ? 1 : -1)))];
  if (next) { next.focus(); event.preventDefault(); }
});

async function start() {
  for (;;) {
    let state = { state: "failed", message: "The server does not answer." };
    try { state = await (await fetch("/api/state")).json(); } catch { /* said below */ }
    say(state.message, state.state === "failed");
    if (state.state === "ready") {
      if (!state.message) say(`${state.videos} videos. Type what you look for.`);
      break;
    }
    await new Promise((resolve) => setTimeout(resolve, 500));
  }
  const asked = new URLSearchParams(location.search);
  query.value ||= asked.get("q") || "";
  nameFilter.value ||= asked.get("name") || "";
  if ([...number.options].some((option) => option.value === asked.get("k"))) number.value = asked.get("k");
  if (query.value.trim() && status.textContent.endsWith("look for.")) search();
}
start();

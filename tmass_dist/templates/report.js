// The list of all queries. Its data comes from a file beside the page; every text of it is set by textContent.

const AT_ONCE = 25;
const at = (id) => document.getElementById(id);
const source = at("script").dataset.queries;
const folder = source.slice(0, source.lastIndexOf("/") + 1);
let data = null; // what the file holds
let found = []; // numbers of the queries that match, in order
let shown = 0;

function make(name, className, ...content) {
  const element = document.createElement(name);
  if (className) element.className = className;
  element.append(...content);
  return element;
}

const score = (value) => (value !== 0 && Math.abs(value) < 0.001 ? value.toExponential(2) : value.toFixed(3));
const quoted = (text) => `“${text}”`;

// A thumbnail is a part of a sheet: a row for each video, a column for each of its frames.
function thumbnail(video, frame) {
  const picture = make("div", "thumbnail");
  if (!data.sheets.length || data.isMissing.has(video)) return picture;
  const sheet = Math.floor(video / data.perSheet), first = sheet * data.perSheet;
  const rows = Math.min(data.perSheet, data.videos.length - first);
  const part = (position, count) => (count > 1 ? (100 * position) / (count - 1) : 0);
  picture.style.backgroundImage = `url("${folder}${data.sheets[sheet]}")`;
  picture.style.backgroundSize = `${100 * data.frames}% ${100 * rows}%`;
  picture.style.backgroundPosition = `${part(frame, data.frames)}% ${part(video - first, rows)}%`;
  return picture;
}

function player(video) {
  const media = make("div", "media");
  const middle = Math.floor(data.frames / 2);
  media.append(thumbnail(video, middle));
  const url = data.urls[video];
  if (url || (data.frames > 1 && !data.isMissing.has(video))) {
    const button = make("button", "play", "▶");
    button.type = "button";
    button.setAttribute("aria-label", `play ${data.videos[video]}`);
    media.append(button);
    media.addEventListener("click", () => playIn(media, {
      url: url ? folder + url : null,
      count: data.isMissing.has(video) ? 0 : data.frames,
      time: () => data.starts[video] || 0,
      label: (frame) => `${frame + 1} of ${data.frames}`,
      picture: (frame) => thumbnail(video, frame),
    }, 0));
  }
  return media;
}

function card(video, role, value, isCorrect) {
  const facts = make("p", isCorrect ? "correct" : "", `${role} · ${score(value)}`);
  return make("div", isCorrect ? "card right" : "card", player(video), facts, make("p", "", data.videos[video]),
    make("p", "quiet", quoted(data.texts[data.ofVideo[video][0]])));
}

function textQuery(text) {
  const { rank, own, answers, scores } = data.t2v;
  const truth = data.owner[text];
  const cards = [card(truth, `correct, rank ${rank[text]}`, own[text], true)];
  answers[text].forEach((video, n) => {
    if (video !== truth) cards.push(card(video, `retrieved ${n + 1}`, scores[text][n], false));
  });
  const title = make("h3", "", make("b", "", `rank ${rank[text]}`), `: ${quoted(data.texts[text])}`);
  return make("li", "query", title, make("div", "cards", ...cards));
}

function videoQuery(video) {
  const { rank, own, answers, scores } = data.v2t;
  const title = make("h3", "", make("b", "", `rank ${rank[video]}`), `: ${data.videos[video]}`);
  const captions = data.ofVideo[video].slice(0, 3).map((text) => make("p", "correct", quoted(data.texts[text])));
  const more = data.ofVideo[video].length - captions.length;
  if (more > 0) captions.push(make("p", "quiet", `and ${more} more captions`));
  const texts = answers[video].map((text, n) =>
    make("li", data.owner[text] === video ? "correct" : "", `${quoted(data.texts[text])} (${score(scores[video][n])})`));
  const words = make("div", "", make("p", "", `Its captions (${score(own[video])}):`), ...captions,
    make("p", "", "Retrieved:"), make("ol", "texts", ...texts));
  return make("li", "query", title, make("div", "pair", make("div", "card", player(video)), words));
}

function margin(direction, query) {
  const { own, answers, scores } = data[direction];
  const isWrong = (answer) => (direction === "t2v" ? answer !== data.owner[query] : data.owner[answer] !== query);
  const first = answers[query].findIndex(isWrong);
  return first < 0 ? Infinity : own[query] - scores[query][first];
}

function search() {
  const direction = at("direction").value, order = at("order").value, { rank } = data[direction];
  const words = at("words").value.toLowerCase().split(/\s+/).filter(Boolean);
  const from = Number(at("from").value) || 1, to = Number(at("to").value) || Infinity;
  const texts = data.haystack[direction];
  found = rank.map((_, query) => query)
    .filter((query) => rank[query] >= from && rank[query] <= to && words.every((word) => texts[query].includes(word)));
  if (order !== "split") {
    const margins = new Map(found.map((query) => [query, margin(direction, query)]));
    const worse = (one, other) => rank[other] - rank[one]
      || (margins.get(one) === margins.get(other) ? one - other : margins.get(one) - margins.get(other));
    found.sort(order === "worst" ? worse : (one, other) => worse(other, one) || one - other);
  }
  const recall = (k) => (100 * found.filter((query) => rank[query] <= k).length / found.length).toFixed(1);
  const numbers = found.length ? `: R@1 ${recall(1)}, R@5 ${recall(5)}, R@10 ${recall(10)} of these` : "";
  at("count").textContent = `${found.length} of ${rank.length} queries${numbers}`;
  at("list").replaceChildren();
  shown = 0;
  showMore();
}

function showMore() {
  const item = at("direction").value === "t2v" ? textQuery : videoQuery;
  at("list").append(...found.slice(shown, shown + AT_ONCE).map(item));
  shown = Math.min(shown + AT_ONCE, found.length);
  at("more").hidden = shown === found.length;
  at("more").textContent = `Show more (${found.length - shown} left)`;
}

function showQueries(content) {
  data = content;
  data.isMissing = new Set(data.missing);
  data.ofVideo = data.videos.map(() => []);
  data.owner.forEach((video, text) => data.ofVideo[video].push(text));
  const lower = (texts) => texts.join("\n").toLowerCase();
  data.haystack = {
    t2v: data.texts.map((text, number) => lower([text, data.videos[data.owner[number]]])),
    v2t: data.videos.map((id, video) => lower([id, ...data.ofVideo[video].map((text) => data.texts[text])])),
  };
  at("notes").textContent = data.notes.join(" ");
  at("filter").addEventListener("submit", (event) => event.preventDefault());
  at("filter").addEventListener("input", search);
  at("more").addEventListener("click", showMore);
  search();
}

at("count").textContent = "Loading …";
const loader = document.createElement("script");
loader.src = source;
loader.addEventListener("error", () => {
  at("count").textContent = `${source} is not beside this page: copy the folder ${folder} together with report.html.`;
});
document.body.append(loader);

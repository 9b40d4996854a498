"use strict";
// Draws the report from the JSON block of the page.  Texts of models and data files reach the page as text nodes, or on
// one line in an aria-label; what cannot be seen or would turn the reading direction is shown as an escape.

const SVG = "http://www.w3.org/2000/svg";
const TREES_PER_PAGE = 8;
const SHORT_TEXT = 700; // characters shown before "show all"
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

// ---------------------------------------------------------------- elements

function make(tag, classes, ...children) {
  const element = document.createElement(tag);
  if (classes) element.className = classes;
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function draw(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// ---------------------------------------------------------------- numbers

function digits(value, places) {
  return value === null || value === undefined ? "\u2013" : value.toFixed(places);
}

function signed(value, places) {
  if (value === null || value === undefined) return "\u2013";
  return (value > 0 ? "+" : value < 0 ? "\u2212" : "") + Math.abs(value).toFixed(places);
}

function compact(value) {
  if (value === null || value === undefined) return "\u2013";
  const size = Math.abs(value);
  if (size >= 1e9) return (value / 1e9).toFixed(2) + "B";
  if (size >= 1e6) return (value / 1e6).toFixed(2) + "M";
  if (size >= 1e4) return (value / 1e3).toFixed(1) + "k";
  if (Number.isInteger(value)) return String(value);
  if (size !== 0 && size < 1e-3) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

function reward(value) {
  if (value === null || value === undefined) return "no reward";
  if (value === 1) return "+1 \u2713 right";
  if (value === -1) return "\u22121 \u2717 wrong";
  return signed(value, 2); // a reward function of one's own
}

function kind(value) {
  return value > 0 ? "right" : value < 0 ? "wrong" : "other";
}

// ---------------------------------------------------------------- text of others

// Control characters (but line break and tab), invisible format characters (but the joiners, which letters and emoji
// need) and halves of surrogate pairs.
const INVISIBLE = /(?:(?![\n\t\u200c\u200d])[\p{Cc}\p{Cf}\p{Cs}\u2028\u2029])+/gu;

function escaped(run) {
  return Array.from(run, (character) => {
    const code = character.codePointAt(0);
    if (code < 0x100) return "\\x" + code.toString(16).padStart(2, "0");
    return code < 0x10000 ? "\\u" + code.toString(16).padStart(4, "0") : "\\u{" + code.toString(16) + "}";
  }).join("");
}

function addText(parent, text) {
  let end = 0;
  for (const match of text.matchAll(INVISIBLE)) {
    parent.append(text.slice(end, match.index), make("span", "escape", escaped(match[0])));
    end = match.index + match[0].length;
  }
  parent.append(text.slice(end));
}

function oneLine(text, longest) {
  const short = text.length > longest ? text.slice(0, longest) + "\u2026" : text;
  return short.replace(INVISIBLE, escaped).replace(/\s+/g, " ");
}

// A text in the data is a string, or {head, tail, length} where its middle was left out.
function plain(text) {
  if (text === null || text === undefined) return "";
  return typeof text === "string" ? text : text.head + "\n" + text.tail;
}

function piecesOf(text, style) {
  if (text === null || text === undefined || text === "") return [];
  if (typeof text === "string") return [{ text, style }];
  const missing = text.length - text.head.length - text.tail.length;
  return [
    { text: text.head, style },
    { text: ` [\u2026 ${missing} characters left out of this page \u2026] `, style: "gap" },
    { text: text.tail, style },
  ];
}

function addPieces(parent, pieces, longest) {
  let room = longest;
  for (const piece of pieces) {
    if (room <= 0) break;
    let shown = piece.text.slice(0, room);
    if (/[\ud800-\udbff]$/.test(shown)) shown = piece.text.slice(0, room + 1); // not through the middle of a pair
    room -= shown.length;
    const target = make(piece.style === "mark" ? "mark" : "span", piece.style === "mark" ? "piece" : "piece " + piece.style);
    if (piece.style === "rest") target.title = "written after the cut, not part of the segment";
    addText(target, shown);
    parent.append(target);
  }
}

// A block of text, the beginning of it with a button where it is long.
function textBlock(pieces, classes) {
  const text = make("div", "text " + (classes || ""));
  text.dir = "auto";
  const length = pieces.reduce((sum, piece) => sum + piece.text.length, 0);
  if (length === 0) {
    text.append(make("span", "gap", "(empty)"));
    return text;
  }
  if (length <= SHORT_TEXT * 1.2) {
    addPieces(text, pieces, Infinity);
    return text;
  }
  const button = make("button", "more-button");
  button.type = "button";
  const show = (open) => {
    text.replaceChildren();
    addPieces(text, pieces, open ? Infinity : SHORT_TEXT);
    if (!open) text.append(make("span", "gap", " \u2026"));
    button.textContent = open ? "Show less" : `Show all (${length.toLocaleString("en")} characters)`;
    button.setAttribute("aria-expanded", String(open));
  };
  button.addEventListener("click", () => show(button.getAttribute("aria-expanded") !== "true"));
  show(false);
  return make("div", "", text, button);
}

// ---------------------------------------------------------------- overview

function setting(name) {
  const found = data.config.find((pair) => pair[0] === name);
  return found ? found[1].replace(/^"|"$/g, "") : null;
}

function card(name, value, more) {
  return make("div", "card", make("p", "name", name), make("p", "value", value), more ? make("p", "more", more) : null);
}

function drawOverview() {
  const kindOfRun = `${oneLine(setting("method.name") || "skpo", 40).toUpperCase()} run`;
  document.title = `${kindOfRun} ${oneLine(data.run, 100)}`;
  document.querySelector(".brand").textContent = kindOfRun;
  addText(byId("run"), data.run);
  const model = setting("actor_rollout_ref.model.path");
  const group = setting("skpo.group_size");
  const about = [model && model.split("/").slice(-1)[0], group && "G = " + group, setting("trainer.experiment_name")];
  addText(byId("about"), [...new Set(about.filter(Boolean))].join("  \u00b7  "));
  const cards = byId("cards");
  for (const { source, first, last, rows, change } of data.headline.sources.slice(0, 3)) {
    const [measure, before, after] = rows[0];
    const many = data.headline.sources.length > 1;
    const moved = measure === "acc" ? `${signed(100 * (after - before), 1)} points` : signed(after - before, 3);
    const told = change ? `: ${change.replace("+-", "\u00b1")}` : before === null ? "" : `: ${moved}`;
    const main = card("Held-out " + data.labels[measure] + (many ? `, ${oneLine(source, 60)}` : ""),
      `${digits(before, 3)} \u2192 ${digits(after, 3)}`, `step ${first} \u2192 ${last}${told}`);
    main.classList.add("main");
    cards.append(main);
  }
  const { steps, tokens, minutes } = data.headline;
  cards.append(card("Steps", String(steps), ""));
  if (tokens !== null) cards.append(card("Tokens generated", compact(tokens), "in training, discarded ones included"));
  if (minutes !== null) cards.append(card("Minutes", digits(minutes, 1), "of steps and validations, in all launches"));
  if (data.trees.length) cards.append(card("Rollout trees", String(data.trees.length), "to look at below"));

  if (data.warning) {
    byId("warning").hidden = false;
    addText(byId("warning"), data.warning);
  }
  for (const { source, first, last, rows, problems, interval } of data.headline.sources) {
    const sure = (name) => (name === "acc" && interval ? toWords(interval) : "");
    const body = rows.map(([name, before, after]) => [data.labels[name] || name, digits(before, 3), digits(after, 3),
      sure(name), before === null ? "" : signed(after - before, 3)]);
    const titles = [heldOut(source, problems, data.decoding), `step ${first}`, `step ${last}`, interval ? "95% interval" : "", "change"];
    const kept = (row) => row.filter((_, index) => titles[index]);
    byId("held-out").append(make("div", "scroll", table(kept(titles), body.map(kept))));
  }
}

function toWords(interval) {
  return interval.map((bound) => digits(bound, 3)).join(" to ");
}

function heldOut(source, problems, how) {
  return [`held-out ${oneLine(source, 80)}`, problems && `${problems} problems`, how].filter(Boolean).join(", ");
}

// Titles and rows of texts and elements; the first of each row is its head.
function table(titles, rows) {
  const line = (cells, tags, scopes) => make("tr", "", ...cells.map((content, index) => {
    const cell = make(tags[index ? 1 : 0], index ? "number" : "");
    if (scopes[index ? 1 : 0]) cell.scope = scopes[index ? 1 : 0];
    if (typeof content === "string") addText(cell, content);
    else cell.append(content);
    return cell;
  }));
  return make("table", "", make("thead", "", line(titles, ["th", "th"], ["col", "col"])),
    make("tbody", "", ...rows.map((row) => line(row, ["th", "td"], ["row", ""]))));
}

function drawNotes() {
  if (data.notes.length) {
    byId("left-out").hidden = false;
    byId("left-out").querySelector("ul").append(...data.notes.map((note) => make("li", "", note)));
  }
}

// ---------------------------------------------------------------- curves

// Distance of about ``count`` ticks over a span: 1, 2 or 5 times a power of ten.
function tickStep(span, count) {
  const power = 10 ** Math.floor(Math.log10(span / count));
  return [1, 2, 5, 10].map((factor) => factor * power).find((value) => value >= (span / count) * 0.999);
}

function ticks(low, high, step) {
  const from = Math.ceil(low / step - 1e-6);
  const to = Math.floor(high / step + 1e-6);
  return Array.from({ length: to - from + 1 }, (_, index) => Number(((from + index) * step).toPrecision(12)));
}

function nearest(sorted, value) {
  let low = 0;
  let high = sorted.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low > 0 && value - sorted[low - 1] <= sorted[low] - value ? low - 1 : low;
}

// What a place on the x axis is called.
const UNITS = {
  step: (x) => `step ${x}`,
  tokens: (x) => `${compact(x)} generated tokens`,
  seconds: (x) => `${compact(x)} seconds`,
};

// A line is {label, xs, ys, style}; ``style`` numbers its colour and dash, 16 of them.
function chart(title, drawn, unit = "step") {
  const say = UNITS[unit];
  const steps = [...new Set(drawn.flatMap((line) => line.xs))].sort((a, b) => a - b);
  const values = drawn.flatMap((line) => line.ys);
  let low = Math.min(...values);
  let high = Math.max(...values);
  if (low === high) {
    const room = Math.abs(low) * 0.1;
    low -= room;
    high += room || 1; // a share that is always 0 is not drawn over negative ones
  }
  const apart = tickStep(high - low, 4);
  low = Math.floor(low / apart + 1e-6) * apart;
  high = Math.ceil(high / apart - 1e-6) * apart;
  const first = steps[0];
  const last = steps[steps.length - 1] === first ? first + 1 : steps[steps.length - 1];
  const svg = draw("svg", { role: "application", tabindex: "0", "aria-roledescription": "chart" });
  const said = drawn.map((line) => `${oneLine(line.label, 80)}: ${compact(line.ys[0])} at ${say(line.xs[0])}, ` +
    `${compact(line.ys[line.ys.length - 1])} at ${say(line.xs[line.xs.length - 1])}`);
  svg.setAttribute("aria-label", `${oneLine(title, 200)}. ${said.join("; ")}. Arrow keys read single points.`);
  const at = make("p", "at");
  at.setAttribute("role", "status");
  const readouts = drawn.map(() => make("b", ""));
  const colour = (line) => `s${line.style % 4}`;
  const style = (line) => `path ${colour(line)} d${(line.style + Math.floor(line.style / 4)) % 4}`;
  const legend = make("ul", "legend", ...drawn.map((line, index) => {
    const label = make("span", "");
    addText(label, line.label);
    const sample = draw("svg", { "aria-hidden": "true" },
      draw("line", { x1: 0, x2: 24, y1: 4, y2: 4, class: style(line), "stroke-width": 2 }));
    return make("li", "", sample, label, readouts[index]);
  }));
  let place = null;
  let scale = null;

  // Steps are common to all lines; of tokens and seconds each run has its own, so a line is read at its last one before.
  const itemAt = (line, step) => (unit === "step" ? line.xs.indexOf(step) : line.xs.findLastIndex((x) => x <= step));
  const end = (line) => line.xs[line.xs.length - 1];

  const read = (step) => {
    drawn.forEach((line, index) => {
      const found = step === null ? line.xs.length - 1 : itemAt(line, step);
      readouts[index].textContent = found < 0 ? "\u2013" : compact(line.ys[found]);
    });
    const together = drawn.every((line) => end(line) === end(drawn[0]));
    at.textContent = step !== null ? say(step) : together ? `${say(end(drawn[0]))}, the last` : "the last of each line";
  };

  const paint = () => {
    const width = Math.max(200, svg.clientWidth || 360);
    const height = 190;
    const yTicks = ticks(low, high, apart);
    const labels = yTicks.map(compact);
    const left = 14 + 6.6 * Math.max(...labels.map((label) => label.length));
    const box = { left, right: width - 10, top: 10, bottom: height - 22 };
    const x = (step) => box.left + ((step - first) / (last - first)) * (box.right - box.left);
    const y = (value) => box.bottom - ((value - low) / (high - low)) * (box.bottom - box.top);
    scale = { x, box };
    const shapes = [];
    yTicks.forEach((value, index) => {
      shapes.push(draw("line", { x1: box.left, x2: box.right, y1: y(value), y2: y(value), class: "grid" }));
      shapes.push(draw("text", { x: box.left - 9, y: y(value) + 4, "text-anchor": "end", class: "tick" }, labels[index]));
    });
    for (const value of ticks(first, last, Math.max(1, tickStep(last - first, Math.max(2, Math.floor(width / 90)))))) {
      shapes.push(draw("text", { x: x(value), y: height - 6, "text-anchor": "middle", class: "tick" }, compact(value)));
    }
    drawn.forEach((line) => {
      const points = line.xs.map((step, item) => `${x(step).toFixed(1)},${y(line.ys[item]).toFixed(1)}`);
      shapes.push(draw("polyline", { points: points.join(" "), class: style(line) }));
      if (points.length <= 12) {
        line.xs.forEach((step, item) => shapes.push(draw("circle", { cx: x(step), cy: y(line.ys[item]), r: 3, class: `dot ${colour(line)}` })));
      }
    });
    if (place !== null) {
      const step = steps[place];
      shapes.push(draw("line", { x1: x(step), x2: x(step), y1: box.top, y2: box.bottom, class: "cursor" }));
      drawn.forEach((line) => {
        const item = itemAt(line, step);
        if (item >= 0) shapes.push(draw("circle", { cx: x(line.xs[item]), cy: y(line.ys[item]), r: 4, class: `dot ${colour(line)}` }));
      });
    }
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.replaceChildren(...shapes);
  };

  const go = (to) => {
    place = to === null ? null : Math.max(0, Math.min(steps.length - 1, to));
    read(place === null ? null : steps[place]);
    paint();
  };
  svg.addEventListener("pointermove", (event) => {
    const { left } = svg.getBoundingClientRect();
    const share = (event.clientX - left - scale.box.left) / (scale.box.right - scale.box.left);
    go(nearest(steps, first + share * (last - first)));
  });
  svg.addEventListener("pointerleave", () => go(null));
  svg.addEventListener("blur", () => go(null));
  svg.addEventListener("keydown", (event) => {
    const here = place === null ? steps.length - 1 : place;
    const to = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: steps.length - 1, Escape: null }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    go(to);
  });
  new ResizeObserver(paint).observe(svg);

  const numbers = make("details", "", make("summary", "", "Numbers"));
  numbers.addEventListener("toggle", () => {
    if (!numbers.open || numbers.children.length > 1) return;
    const head = make("tr", "", ...[unit, ...drawn.map((line) => oneLine(line.label, 80))].map((name) => make("th", "number", name)));
    const maps = drawn.map((line) => new Map(line.xs.map((step, item) => [step, line.ys[item]])));
    const rows = steps.map((step) => make("tr", "", make("td", "number", String(step)),
      ...maps.map((map) => make("td", "number", map.has(step) ? compact(map.get(step)) : ""))));
    const scroll = make("div", "scroll", make("table", "", make("thead", "", head), make("tbody", "", ...rows)));
    scroll.tabIndex = 0;
    numbers.append(scroll);
  });
  const heading = make("h3", "");
  addText(heading, title);
  read(null);
  return make("div", "chart", heading, legend, svg, at, numbers);
}

function meaningOf(name) {
  const { meanings } = data.curves || data;
  return Object.hasOwn(meanings, name) ? meanings[name] : ""; // a metric may be called __proto__
}

// Draws the known curves and the one that is picked; returns a function that draws them again.
// ``groups`` are pairs of a title and what is drawn under it; ``lineUp`` makes the lines of that, or of a metric's name;
// ``title`` is that of a picked metric.
function drawCurves(groups, names, lineUp, unit, title) {
  byId("any").hidden = names.length === 0;
  const pick = byId("metric");
  names.forEach((name, index) => {
    const option = make("option", "", oneLine(name, 120));
    option.value = String(index);
    pick.append(option);
  });
  const one = (heading, what) => {
    const lines = lineUp(what);
    return lines.length ? chart(heading, lines, unit()) : null;
  };
  const show = () => {
    const name = names[Number(pick.value)];
    byId("metric-chart").replaceChildren(one(title(name), name) || make("p", "empty", "No run has logged this."));
  };
  const paint = () => {
    byId("charts").replaceChildren(...groups.map(([heading, what]) => one(heading, what)).filter(Boolean));
    if (names.length) show();
  };
  pick.addEventListener("change", show);
  paint();
  return paint;
}

function drawRunCurves() {
  const { groups, series } = data.curves;
  const lineUp = (what) => (typeof what === "string" ? [{ label: meaningOf(what) || "value", name: what }] : what)
    .map(({ label, name }, style) => ({ label, xs: series[name][0], ys: series[name][1], style }));
  drawCurves(groups.map((group) => [group.title, group.lines]), Object.keys(series).sort(), lineUp, () => "step", (name) => name);
}

// ---------------------------------------------------------------- trees

function squares(tree) {
  const right = tree.responses.filter((response) => response.reward > 0).length;
  const all = make("span", "squares");
  all.setAttribute("role", "img");
  all.setAttribute("aria-label", `${right} of ${tree.responses.length} responses right`);
  for (const response of tree.responses.slice(0, 32)) {
    const sort = kind(response.reward);
    all.append(make("span", "square " + sort, { right: "+", wrong: "\u2212", other: "0" }[sort]));
  }
  return all;
}

function fact(name, value) {
  const bold = make("b", "");
  addText(bold, value);
  return make("span", "", name + " ", bold);
}

function meter(value, most) {
  const width = most > 0 && value > 0 ? (80 * value) / most : 0;
  return draw("svg", { class: "meter", viewBox: "0 0 80 8", preserveAspectRatio: "none", "aria-hidden": "true" },
    draw("rect", { width: 80, height: 8, rx: 2, class: "back" }), draw("rect", { width, height: 8, rx: 2, class: "fill" }));
}

function candidateRows(tree) {
  const order = tree.candidates.map((candidate, index) => ({ ...candidate, index })).sort((a, b) => a.d - b.d || a.index - b.index);
  const most = Math.max(...order.map((candidate) => candidate.d || 0));
  return make("ol", "rows", ...order.map((candidate) => {
    const head = make("div", "head", `#${candidate.index + 1}`, make("span", "", "d ", make("b", "", digits(candidate.d, 3))),
      meter(candidate.d, most),
      candidate.chosen ? make("span", "chip chosen", "chosen: segment s") : null,
      candidate.early ? make("span", "", "ended early, first half kept") : null);
    const pieces = [...piecesOf(candidate.text, candidate.chosen ? "mark" : "kept"), ...piecesOf(candidate.rest, "rest")];
    return make("li", "row" + (candidate.chosen ? " chosen" : ""), head, textBlock(pieces));
  }));
}

function responseRows(tree) {
  return make("ol", "rows", ...tree.responses.map((response) => {
    const sort = kind(response.reward);
    const head = make("div", "head", make("span", "chip " + sort, reward(response.reward)),
      make("span", "", "A ", make("b", "", signed(response.advantage, 2))),
      make("span", "", `${response.length} tokens`));
    const answer = oneLine(plain(response.answer), 80);
    if (response.answer !== null) head.append(fact("answer", answer || "none found"));
    return make("li", "row is-" + sort, head, textBlock(piecesOf(response.text, "kept")));
  }));
}

// [s, q] with s marked where it stands: at the front, after a BOS at the most.
function skipPieces(tree) {
  const chosen = tree.candidates.find((candidate) => candidate.chosen);
  const pieces = piecesOf(tree.skip, "kept");
  if (!chosen || typeof chosen.text !== "string" || !chosen.text || !pieces.length) return pieces;
  const text = pieces[0].text;
  const start = text.slice(0, chosen.text.length + 64).indexOf(chosen.text);
  if (start < 0) return pieces;
  const end = start + chosen.text.length;
  const parts = [[text.slice(0, start), "kept"], [text.slice(start, end), "mark"], [text.slice(end), "kept"]];
  return [...parts.filter(([part]) => part).map(([part, style]) => ({ text: part, style })), ...pieces.slice(1)];
}

function treeBody(tree) {
  const { segment } = tree;
  const problem = make("div", "across", make("h3", "", "Problem q"), textBlock(piecesOf(tree.problem, "kept"), "plain block"),
    make("div", "facts", fact("expected answer", oneLine(plain(tree.answer), 200)), fact("prompt", oneLine(plain(tree.prompt), 200)),
      fact("step", String(tree.step))));
  const upstream = make("div", "",
    make("h3", "", `Upstream: ${tree.candidates.length} candidates, cut at t`, make("sub", "", "q"), ` = ${tree.split}, by d`),
    candidateRows(tree),
    make("div", "facts", fact("segment reward", signed(segment.reward, 2)), fact("baseline", signed(segment.baseline, 2)),
      fact("advantage", signed(segment.advantage, 2))));
  const skip = make("div", "", make("h3", "", "Skip prompt [s, q]"), textBlock(skipPieces(tree), "block"));
  const downstream = make("div", "", make("h3", "", `Downstream: ${tree.responses.length} responses to [s, q]`), responseRows(tree));
  return make("div", "body", problem, make("div", "stack", upstream, skip), downstream);
}

function treeCard(tree, open) {
  const snippet = make("span", "snippet", oneLine(plain(tree.problem), 160));
  snippet.dir = "auto";
  const advantage = make("span", "signed", "A(s) ", make("b", "", signed(tree.segment.advantage, 2)));
  const element = make("details", "tree", make("summary", "", make("span", "step", `step ${tree.step}`), snippet, squares(tree), advantage));
  const fill = () => {
    if (element.open && element.children.length === 1) element.append(treeBody(tree));
  };
  element.addEventListener("toggle", fill);
  element.open = open;
  fill();
  return element;
}

function haystack(tree) {
  const texts = [tree.problem, tree.answer, tree.prompt, tree.skip];
  for (const candidate of tree.candidates) texts.push(candidate.text, candidate.rest);
  for (const response of tree.responses) texts.push(response.text, response.answer);
  return texts.map(plain).join("\n").toLowerCase();
}

function outcome(tree) {
  const right = tree.responses.filter((response) => response.reward > 0).length;
  return right === 0 ? "wrong" : right === tree.responses.length ? "right" : "mixed";
}

function drawTrees() {
  const trees = data.trees;
  let texts = null; // made at the first search
  let shown = trees;
  let page = 0;
  if (!trees.length) {
    for (const part of document.querySelectorAll("#trees .hint, #filter, .pager")) part.hidden = true;
    byId("found").textContent = "No trees are stored in this run.";
    return;
  }
  const [from, to] = [byId("from"), byId("to")];
  from.placeholder = String(trees[0].step);
  to.placeholder = String(trees[trees.length - 1].step);

  const paint = () => {
    const pages = Math.max(1, Math.ceil(shown.length / TREES_PER_PAGE));
    page = Math.max(0, Math.min(page, pages - 1));
    const here = shown.slice(page * TREES_PER_PAGE, (page + 1) * TREES_PER_PAGE);
    byId("list").replaceChildren(...here.map((tree, index) => treeCard(tree, index === 0)));
    if (!here.length) byId("list").append(make("p", "empty", "Nothing matches. Clear the filter to see all trees."));
    byId("found").textContent = shown.length === trees.length ? `${trees.length} trees` : `${shown.length} of ${trees.length} trees`;
    byId("page").textContent = `page ${page + 1} of ${pages}`;
    byId("previous").disabled = page === 0;
    byId("next").disabled = page === pages - 1;
  };
  const filter = () => {
    const words = byId("search").value.toLowerCase().trim();
    if (words && !texts) texts = trees.map(haystack);
    const low = from.value === "" ? -Infinity : Number(from.value);
    const high = to.value === "" ? Infinity : Number(to.value);
    const wanted = byId("outcome").value;
    shown = trees.filter((tree, index) => tree.step >= low && tree.step <= high &&
      (wanted === "all" || outcome(tree) === wanted) && (!words || texts[index].includes(words)));
    page = 0;
    paint();
  };
  const turn = (by) => {
    page += by;
    paint();
    byId("trees").scrollIntoView();
    const button = byId(by > 0 ? "next" : "previous");
    if (button.disabled) byId(by > 0 ? "previous" : "next").focus(); // a disabled button would lose the focus
  };
  byId("filter").addEventListener("input", filter);
  byId("filter").addEventListener("reset", () => setTimeout(filter)); // after the fields are empty
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
  paint();
}

// ---------------------------------------------------------------- config

function drawConfig() {
  const sections = new Map();
  for (const pair of data.config) {
    const top = pair[0].split(".")[0];
    if (!sections.has(top)) sections.set(top, []);
    sections.get(top).push(pair);
  }
  const paint = () => {
    const words = byId("setting").value.toLowerCase().trim();
    const blocks = [];
    let count = 0;
    for (const [top, pairs] of sections) {
      const found = pairs.filter((pair) => !words || pair.join(" ").toLowerCase().includes(words));
      if (!found.length) continue;
      count += found.length;
      const rows = found.map(([name, value]) => {
        const head = make("th", "");
        head.scope = "row";
        addText(head, name);
        const cell = make("td", "");
        addText(cell, value);
        return make("tr", "", head, cell);
      });
      const title = make("b", "");
      addText(title, top);
      const block = make("details", "settings", make("summary", "", title, make("span", "count", ` ${found.length}`)),
        make("div", "scroll", make("table", "", make("tbody", "", ...rows))));
      block.open = words !== "";
      blocks.push(block);
    }
    byId("settings").replaceChildren(...blocks);
    byId("settings-found").textContent = words ? `${count} of ${data.config.length} settings` : `${count} settings`;
  };
  byId("setting").addEventListener("input", paint);
  paint();
}

// ---------------------------------------------------------------- comparison

// A number with what is said of it below, a line each.
function cellOf(value, ...more) {
  const said = make("div", "said");
  addText(said, more.filter(Boolean).join("\n"));
  const shown = make("b", "");
  addText(shown, value);
  return make("div", "", shown, said);
}

function drawFinalNumbers() {
  document.title = `Comparison of ${data.runs.length} runs`;
  document.querySelector(".brand").textContent = "Comparison";
  byId("overview-title").textContent = "Final numbers";
  byId("run").textContent = `${data.runs.length} runs`;
  addText(byId("about"), data.runs.map((run) => run.name).join("  \u00b7  "));
  const row = (title, cell) => [title, ...data.runs.map((run) => cell(run) || cellOf("\u2013"))];
  const rows = [row("method", ({ method }) => method && cellOf(method))];
  const heldOutCell = (run, source, name) => {
    const found = run.headline.sources.find((other) => other.source === source);
    const numbers = found && found.rows.find(([measure]) => measure === name);
    if (!numbers) return null;
    const { first, last, problems, interval } = found;
    const [, before, after] = numbers;
    const moved = `step ${last}` + (first < last && before !== null ? `, from ${digits(before, 3)} at step ${first}` : "");
    if (name !== "acc") return cellOf(digits(after, 3), moved);
    return cellOf(digits(after, 3), interval && `95% interval ${toWords(interval)}`, moved,
      [problems && `${problems} problems`, run.decoding].filter(Boolean).join(", "));
  };
  for (const source of new Set(data.runs.flatMap((run) => run.headline.sources.map((found) => found.source)))) {
    for (const [name, label] of Object.entries(data.labels)) {
      const cells = data.runs.map((run) => heldOutCell(run, source, name));
      if (cells.some(Boolean)) rows.push([`${heldOut(source)}: ${label}`, ...cells.map((cell) => cell || cellOf("\u2013"))]);
    }
  }
  for (const { name, at, cells } of data.equal) {
    rows.push([`${name} at ${compact(at)} generated tokens, which each of these runs has`, ...cells.map((cell) => cell
      ? cellOf(digits(cell[0], 3), cell[1] && `95% interval ${toWords(cell[1])}`) : cellOf("\u2013"))]);
  }
  rows.push(row("steps", ({ headline }) => cellOf(String(headline.steps))),
    row("tokens generated in training, discarded ones included", ({ headline }) => cellOf(compact(headline.tokens))),
    row("minutes of steps and validations, in all launches", ({ headline }) => cellOf(digits(headline.minutes, 1))));
  byId("held-out").append(make("div", "scroll compared", table(["", ...data.runs.map((run) => run.name)], rows)),
    make("p", "hint", "An interval covers the choice of validation problems, not the spread over seeds."));
}

function drawComparedCurves() {
  const unit = () => document.querySelector("#axis input:checked").value;
  const lineUp = (name) => data.runs.flatMap((run, style) => {
    const places = run.axes[unit()];
    const values = Object.hasOwn(run.series, name) && run.series[name];
    if (!places || !values) return [];
    const known = [...values.keys()].filter((item) => values[item] !== null && places[item] !== null);
    return known.length === 0 ? [] : [{ label: run.name, xs: known.map((item) => places[item]), ys: known.map((item) => values[item]), style }];
  });
  const names = [...new Set(data.runs.flatMap((run) => Object.keys(run.series)))].sort();
  const paint = drawCurves(data.groups.map((group) => [group.title, group.name]), names, lineUp, unit,
    (name) => [name, meaningOf(name)].filter(Boolean).join(": ")); // the runs label the lines
  const say = () => {
    const missing = data.runs.filter((run) => !run.axes[unit()]).map((run) => oneLine(run.name, 80));
    byId("missing").textContent = missing.length ? `Not drawn, because this was not logged: ${missing.join(", ")}` : "";
  };
  byId("axis").addEventListener("change", () => {
    paint();
    say();
  });
  say();
}

function drawDifferences() {
  const rows = data.differences.map(({ names, values }) => [names.join("\n"), ...values.map((value) => (value === null ? "\u2013" : value))]);
  const titles = ["setting", ...data.runs.map((run) => run.name)];
  byId("differing").append(rows.length ? table(titles, rows) : make("p", "empty", "None."));
}

const compared = Object.hasOwn(data, "runs");
for (const part of document.querySelectorAll("[data-of]")) part.hidden = (part.dataset.of === "comparison") !== compared;
if (compared) {
  drawFinalNumbers();
  drawComparedCurves();
  drawDifferences();
} else {
  drawOverview();
  drawRunCurves();
  drawTrees();
  drawConfig();
}
drawNotes();
document.documentElement.dataset.ready = "yes";

"use strict";
// Draws what data.json tells of running studies, anew every second.
const SVG = "http://www.w3.org/2000/svg";
const main = document.querySelector("main");
const status = document.getElementById("status");
// Name of the study that is shown; "": the first.
let chosen = "";

function make(tag, content = "", kind = "") {
  const element = document.createElement(tag);
  if (kind) element.className = kind;
  element.append(...[content].flat());
  return element;
}

function draw(tag, attributes, text = "") {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) {
    element.setAttribute(name, value);
  }
  element.textContent = text;
  return element;
}

function clock(seconds) {
  if (seconds === null || seconds === undefined) return "";
  const whole = Math.round(seconds);
  const minutes = Math.floor(whole / 60);
  const rest = String(whole % 60).padStart(2, "0");
  const hours = Math.floor(minutes / 60);
  return hours ? `${hours} h ${minutes % 60} min` : `${minutes}:${rest}`;
}

const percent = (value) => (value === null ? "" : `${(100 * value).toFixed(1)} %`);
const short = (value) => String(Number(value.toPrecision(3)));

function table(head, rows, label) {
  const heads = make("tr", head.map((name) => make("th", name)));
  for (const cell of heads.children) cell.scope = "col";
  const body = rows.map((cells) => {
    const line = make("tr", cells.map((cell, i) => make(i ? "td" : "th", cell)));
    line.firstChild.scope = "row";
    return line;
  });
  const region = make(
    "div", make("table", [make("thead", heads), make("tbody", body)]), "scroll");
  region.tabIndex = 0;
  region.setAttribute("role", "region");
  region.setAttribute("aria-label", label);
  return region;
}

// Lines over steps; those of accuracies lie in 0..1.
function curve({ title, step, lines }) {
  const entries = Object.entries(lines);
  const names = Math.ceil(entries.length / 2);
  const [width, height, left, bottom] = [320, 180 + 13 * names, 46, 28 + 13 * names];
  const values = entries.flatMap(([, line]) => line).filter((v) => v !== null);
  const shares = entries.every(([name]) => name.endsWith("accuracy"));
  const low = shares ? 0 : Math.min(0, ...values);
  const high = shares ? 1 : Math.max(...values, low + 1e-9);
  const last = Math.max(...step, 1);
  const x = (at) => left + (at / last) * (width - left - 10);
  const y = (v) => height - bottom - ((v - low) / (high - low)) * (height - bottom - 10);
  const label = `${title}: ${entries
    .map(([name, line]) => `${name} ${short(line.at(-1) ?? 0)}`).join(", ")}`;
  const svg = draw("svg", {
    viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  for (const v of [low, (low + high) / 2, high]) {
    svg.append(
      draw("line", { x1: left, x2: width - 10, y1: y(v), y2: y(v), class: "grid" }),
      draw("text", { x: left - 5, y: y(v) + 4, class: "end" }, short(v)));
  }
  svg.append(
    draw("text", { x: left, y: height - bottom + 15 }, "0"),
    draw("text", { x: width - 10, y: height - bottom + 15, class: "end" }, last));
  entries.forEach(([name, line], i) => {
    const points = step
      .map((at, j) => (line[j] === null ? "" : `${x(at)},${y(line[j])}`)).join(" ");
    const kind = `line c${i % 6}`;
    svg.append(
      draw("polyline", { points, class: kind }),
      draw("circle", { cx: x(step.at(-1)), cy: y(line.at(-1) ?? low), r: 3, class: kind }),
      draw("text", { x: left + 130 * (i % 2), y: height - 13 * (names - Math.floor(i / 2)) + 9,
        class: `c${i % 6}` }, name));
  });
  return make("figure", [svg, make("figcaption", title)]);
}

function stages(study) {
  const items = study.stages.map((name) => {
    const done = study.done.includes(name);
    const now = !done && name === study.stage;
    const item = make("li", name, done ? "done" : now ? "now" : "");
    if (now) item.setAttribute("aria-current", "step");
    return item;
  });
  return make("ol", items, "stages");
}

function card(value, name) {
  return make("li", [make("strong", value), make("span", name)]);
}

function cards(study) {
  const items = [card(study.state, "state")];
  if (study.state === "running") {
    if (study.seconds_left !== null) items.push(card(clock(study.seconds_left), "left"));
    if (study.num_steps) {
      items.push(card(`${study.step} of ${study.num_steps}`, `steps of ${study.stage}`));
    }
  }
  if (study.test_accuracy !== null) {
    items.push(card(percent(study.test_accuracy), "test accuracy now"));
  }
  return make("ul", items, "cards");
}

function held(counts) {
  const head = ["client", "images", ...counts[0].map((_, k) => `class ${k}`)];
  const rows = counts.map((row, i) => [
    String(i), String(row.reduce((a, b) => a + b, 0)),
    ...row.map((n) => (n ? String(n) : "")),
  ]);
  return table(head, rows, "Training images of each class at each client");
}

// One that is there already is shown again, so that nothing flickers.
function picture(address) {
  const there = [...document.images].find(
    (image) => image.getAttribute("src") === address);
  const image = there ?? make("img");
  if (!there) image.src = address;
  return image;
}

function section(title, ...content) {
  return make("section", [make("h2", title), ...content]);
}

function detail(study, found) {
  const parts = [make("h2", study.what || study.name), cards(study), stages(study)];
  if (study.doing && study.state === "running") parts.push(make("p", study.doing, "quiet"));
  if (study.why) parts.push(make("p", study.why));
  if (study.state === "interrupted") {
    parts.push(make("p", "The command that began it goes on with it."));
  }
  if (study.age > 60 && study.state === "running") {
    parts.push(make("p", `No news for ${clock(study.age)}: the run may have ended.`));
  }
  if (study.report) parts.push(make("p", `The report is drawn: ${study.report}`));
  const accuracies = Object.entries(found.accuracy);
  if (found.curves.length) {
    const drawn = make("div", found.curves.map(curve), "figures small");
    parts.push(section("Training", drawn));
  }
  if (accuracies.length) {
    const rows = accuracies.map(([name, value]) => [name, percent(value)]);
    parts.push(section("Models", table(["model", "test accuracy"], rows, "Models")));
  }
  if (found.pictures.length) {
    const images = found.pictures.map(({ stage, age }, i) => {
      const name = encodeURIComponent(study.name);
      const image = picture(`picture.png?study=${name}&number=${i}&age=${age}`);
      image.alt = `Images that the clients' generators draw, stage ${stage}`;
      return make("figure", [image, make("figcaption", `${stage}: a row for each client`)]);
    });
    parts.push(section("Generated images", make("div", images, "generated")));
  }
  if (found.clients.length) parts.push(section("Clients", held(found.clients)));
  return parts;
}

function overview(studies) {
  const rows = studies.map((study) => {
    const button = make("button", study.name);
    button.type = "button";
    button.setAttribute("aria-pressed", String(study.name === chosen));
    button.addEventListener("click", () => {
      chosen = study.name;
      look();
    });
    const at = study.state === "running" ? study.doing || study.stage : "";
    const left = study.state === "running" ? clock(study.seconds_left) : "";
    return [button, study.state, at, left, percent(study.test_accuracy)];
  });
  const head = ["study", "state", "at", "left", "test accuracy"];
  return section("Studies", table(head, rows, "All studies"));
}

// The page is built anew only where something has changed, so that what is selected
// or focused stays.
let shown = "";

async function look() {
  let wait = 1000;
  try {
    const asked = chosen;
    const answer = await fetch(`data.json?study=${encodeURIComponent(asked)}`);
    const told = await answer.json();
    if (asked !== chosen) return; // a click asked anew meanwhile
    const { studies, detail: found } = told;
    if (!studies.some((study) => study.name === chosen)) chosen = studies[0]?.name ?? "";
    const steady = JSON.stringify({ ...told, chosen, studies: studies.map(
      (study) => ({ ...study, age: study.age > 60 ? Math.round(study.age) : 0 })) });
    if (steady !== shown) {
      const focused = document.activeElement?.textContent;
      const parts = studies.length > 1 ? [overview(studies)] : [];
      const study = studies.find((one) => one.name === chosen);
      if (found && study) parts.push(...detail(study, found));
      if (!studies.length) parts.push(make("p", "Nothing there yet."));
      main.replaceChildren(...parts);
      for (const button of main.querySelectorAll("button")) {
        if (button.textContent === focused) button.focus();
      }
      shown = steady;
    }
    const running = studies.filter((study) => study.state === "running").length;
    const done = studies.filter((study) => study.state === "done").length;
    const count = studies.length === 1 ? "1 study" : `${studies.length} studies`;
    status.textContent = `${count}: ${running} running, ${done} done`;
    if (studies.length && done === studies.length) wait = 5000;
  } catch {
    status.textContent = "No answer from mosaic watch: was it ended?";
    wait = 5000;
  }
  clearTimeout(look.timer);
  look.timer = setTimeout(look, wait);
}

look();

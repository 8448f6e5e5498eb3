"use strict";
// Draws the page from its data. What comes from a model is set as text, never as HTML.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const longest = Math.max(...data.panels.map((panel) => panel.steps.length));
  const state = { at: 0, sample: 0, map: "", timer: 0 };
  const RULES = 6; // colours of rules, which then repeat
  const SVG = "http://www.w3.org/2000/svg";

  function make(tag, props = {}, ...children) {
    const node = Object.assign(document.createElement(tag), props);
    node.append(...children);
    return node;
  }

  function makeSvg(tag, attributes, ...children) {
    const node = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }

  const number = (value) => value === null ? "–" : String(Number(value.toPrecision(3)));
  const percent = (share) => `${(100 * share).toFixed(1)}%`;
  const bytes = (base64) => Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const letter = (rule) => String.fromCharCode(65 + (rule % 26)) + (rule < 26 ? "" : Math.floor(rule / 26));

  // Samples

  /** The number of the text at every position after each frame: one array a frame, made when it is first asked for. */
  function textsOf(sample) {
    const made = [];
    return (frame) => {
      while (made.length <= frame) {
        const row = Int32Array.from(made.length ? made[made.length - 1] : sample.start);
        const changes = sample.changes[made.length];
        for (let i = 0; i < changes.length; i += 2) row[changes[i]] = changes[i + 1];
        made.push(row);
      }
      return made[frame];
    };
  }

  const changedAt = (sample, frame) => new Set(sample.changes[frame].filter((_, i) => i % 2 === 0));

  /** Values of a map from 0 to 254, 255 where there is none, frame by frame. */
  function cellsOf(sample, name, frames) {
    const n = sample.given.length;
    if (name in sample.maps) return bytes(sample.maps[name]);
    const cells = new Uint8Array(frames * n).fill(name === "commits" ? 0 : 255);
    for (let frame = 0; frame < frames; frame++) {
      if (name === "changes" && frame <= sample.last) {
        for (let i = 0; i < n; i++) cells[frame * n + i] = sample.given[i] ? 255 : 0;
        for (const i of changedAt(sample, frame)) cells[frame * n + i] = 254;
      }
      if (name === "commits") {
        for (let i = 0; i < n; i++) {
          const when = sample.commits[i];
          if (when < 0) cells[frame * n + i] = 255;
          else if (when <= frame) cells[frame * n + i] = 254 - Math.round((150 * when) / frames);
        }
      }
    }
    return cells;
  }

  const MAPS = {
    confidence: ["Confidence", "probability of the most likely token", (top) => `0 to ${number(top)}`],
    entropy: ["Entropy", "of the distribution over tokens", (top) => `0 to ${number(top)} nats`],
    changes: ["Changes", "positions whose text changed", () => "no, yes"],
    commits: ["Commits", "when a position was decided", () => "open; late to early"],
  };

  function mapsOf(panel) {
    const commits = panel.samples.some((sample) => sample.commits) ? ["commits"] : [];
    return [...Object.keys(panel.maps), "changes", ...commits];
  }

  // Panels: each has parts that are made once, a part of a sample, and a part of a frame.

  function makePanel(panel, place) {
    const frames = panel.steps.length;
    const section = make("section", { ariaLabel: `Model ${panel.name}` });
    const part = {
      facts: make("p", { className: "facts" }),
      text: make("div", { className: "text", lang: "", dir: "auto" }),
      mapTitle: make("h3"),
      map: make("div", { className: "plot map" }),
      ramp: make("p", { className: "legend" }),
      readout: make("p", { className: "facts", ariaLive: "polite" }),
      curves: make("div", { className: "curves" }),
      rules: make("ol", { className: "rules" }),
    };
    const commits = panel.samples.some((sample) => sample.commits);
    section.append(
      make("h2", { textContent: panel.name }),
      make("p", { className: "facts", textContent: `${panel.family}, ${panel.budget.toLocaleString("en")} steps` }),
      ...panel.notes.map((note) => make("p", { className: "note", textContent: note })),
      part.text,
      legend(commits),
      part.facts, part.mapTitle, part.map, part.ramp, part.readout,
      make("h3", { textContent: "Signals" }), part.curves,
    );
    if (panel.rules.length) {
      const heading = make("h3", { textContent: "Where rules would have halted " });
      heading.append(make("small", { textContent: "and what would then have been read" }));
      section.append(heading, part.rules);
    }
    section.append(make("details", {}, make("summary", { className: "facts", textContent: "How it was sampled" }),
      make("p", { className: "facts", textContent: panel.sampling })));
    place.append(section);

    let sample, texts, view = {};
    const frameAt = () => longest < 2 ? 0 : Math.round((state.at * (frames - 1)) / (longest - 1));
    const goTo = (frame) => setPlace(frames < 2 ? 0 : Math.round((frame * (longest - 1)) / (frames - 1)));
    const across = (frame) => frames < 2 ? 50 : (100 * (frame + 0.5)) / frames;

    function clickable(box) {
      box.addEventListener("click", (event) => {
        const { left, width } = box.getBoundingClientRect();
        goTo(Math.min(frames - 1, Math.max(0, Math.floor(((event.clientX - left) / width) * frames))));
      });
    }

    /** Lines where rules halt and where the slider stands, over a map or a curve. */
    function marks() {
      const now = makeSvg("line", { class: "now", y1: 0, y2: 100 });
      const halts = sample.halts.flatMap((halt, rule) => {
        if (!halt.halted) return [];
        const x = across(halt.frame);
        return [makeSvg("line", { class: `halt rule-${rule % RULES}`, x1: x, x2: x, y1: 0, y2: 100 })];
      });
      const box = makeSvg("svg", { class: "marks", viewBox: "0 0 100 100", preserveAspectRatio: "none" }, ...halts, now);
      box.setAttribute("aria-hidden", "true");
      view.now.push(now);
      return box;
    }

    /** The letters of the rules where they halt, over a map; those at one step stand below one another. */
    function tags() {
      const there = new Map();
      return sample.halts.flatMap((halt, rule) => {
        if (!halt.halted) return [];
        const above = there.get(halt.frame) ?? 0;
        there.set(halt.frame, above + 1);
        const tag = make("span", { className: `tag rule-${rule % RULES}`, textContent: letter(rule), ariaHidden: "true" });
        tag.style.left = `${across(halt.frame)}%`;
        tag.style.top = `${1.1 * above}em`;
        return [tag];
      });
    }

    function drawText(frame) {
      const now = texts(frame), changed = frame ? changedAt(sample, frame) : new Set();
      part.text.replaceChildren(...Array.from(now, (piece, i) => {
        const classes = [];
        if (sample.given[i]) classes.push("given");
        else if (sample.commits && sample.commits[i] > frame && frame < sample.last) classes.push("open");
        if (changed.has(i)) classes.push("changed");
        if (!sample.text[i]) classes.push("after");
        return make("span", { className: classes.join(" "), textContent: panel.pieces[piece] });
      }));
    }

    function drawMap() {
      const known = mapsOf(panel), name = known.includes(state.map) ? state.map : known[0];
      const n = sample.given.length, cells = cellsOf(sample, name, frames);
      const [title, what, range] = MAPS[name];
      part.mapTitle.replaceChildren(`${title} `, make("small", { textContent: `${what}; step to the right, position down` }));
      const canvas = make("canvas", { width: frames, height: n, tabIndex: 0 });
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", `${title} of ${n} positions over ${frames} steps`);
      part.map.style.height = `${Math.min(360, Math.max(90, n * 5))}px`;
      part.map.replaceChildren(canvas, marks(), ...tags());
      paint(canvas, cells, n, frames);
      part.ramp.replaceChildren(make("span", { className: "ramp" }), range(panel.maps[name] ?? 1));
      view.cells = cells; view.map = name;
    }

    part.map.addEventListener("pointermove", (event) => {
      const { left, top, width, height } = part.map.getBoundingClientRect(), n = sample.given.length;
      const frame = Math.min(frames - 1, Math.max(0, Math.floor(((event.clientX - left) / width) * frames)));
      const i = Math.min(n - 1, Math.max(0, Math.floor(((event.clientY - top) / height) * n)));
      read(frame, i);
    });
    part.map.addEventListener("pointerleave", () => read(frameAt(), null));
    clickable(part.map);

    /** What stands at a position at a step, below the map; and the position in the text. */
    function read(frame, i) {
      for (const [k, span] of [...part.text.children].entries()) span.classList.toggle("here", k === i);
      if (i === null) { part.readout.textContent = " "; return; }
      const cell = view.cells[frame * sample.given.length + i], top = panel.maps[view.map];
      const value = top && cell < 255 ? `, ${view.map} ${number((cell / 254) * top)}` : "";
      const text = JSON.stringify(panel.pieces[texts(frame)[i]]);
      part.readout.textContent = `step ${panel.steps[frame]}, position ${i + 1}: ${text}${value}`;
    }

    function drawCurves() {
      view.values = [];
      part.curves.replaceChildren(...Object.entries(panel.curves).map(([name, curve]) => {
        const value = make("span");
        view.values.push([value, sample.curves[name]]);
        const box = make("div", { className: "plot" }, line(sample.curves[name], curve.logarithmic, across), marks());
        clickable(box);
        const scale = curve.logarithmic ? ", log" : "";
        const head = make("p", {}, make("span", { textContent: curve.title, title: `${curve.unit}${scale}` }), value);
        const unit = make("p", { className: "unit", textContent: `${curve.unit}${scale}` });
        return make("div", { className: "curve" }, head, box, unit);
      }));
    }

    function drawRules() {
      view.rules = [];
      part.rules.replaceChildren(...panel.rules.map((rule, i) => {
        const halt = sample.halts[i];
        const go = make("button", { type: "button", className: `rule-${i % RULES}`, textContent: letter(i) });
        go.setAttribute("aria-label", `Go to the step of rule ${rule}`);
        go.addEventListener("click", () => goTo(halt.frame));
        const facts = halt.halted
          ? `step ${halt.step}, ${halt.calls} calls (${percent(halt.saved)} saved), ${percent(halt.same)} of the tokens as in the full run`
          : `does not halt: ${halt.calls} calls, and the text of the last step`;
        const head = make("div", { className: "head" }, go, make("code", { textContent: rule }),
          make("span", { className: "facts", textContent: facts }));
        const read = halt.halted ? [make("p", { className: "read", dir: "auto", textContent: halt.text.trim() })] : [];
        const item = make("li", {}, head, ...read);
        view.rules.push([item, halt]);
        return item;
      }));
    }

    return {
      showSample() {
        sample = panel.samples[Math.min(state.sample, panel.samples.length - 1)];
        texts = textsOf(sample);
        view = { now: [] };
        drawMap(); drawCurves(); drawRules();
      },
      showFrame() {
        const frame = frameAt(), x = across(frame);
        drawText(frame);
        const calls = sample.nfe[frame], end = frame >= sample.last ? `; done, ${sample.reason}` : "";
        part.facts.textContent = `step ${panel.steps[frame]} of ${panel.budget}, ${calls} calls of the model${end}`;
        for (const now of view.now) { now.setAttribute("x1", x); now.setAttribute("x2", x); }
        for (const [value, values] of view.values) value.textContent = number(values[frame]);
        for (const [item, halt] of view.rules) item.classList.toggle("passed", halt.halted && halt.frame <= frame);
        read(frame, null);
        return panel.steps[frame];
      },
      maps: mapsOf(panel),
      steps: panel.steps,
      goTo,
    };
  }

  function legend(commits) {
    const key = (name, text) => make("i", { className: name, textContent: text });
    const open = commits ? [key("open", "open: likeliest token")] : [];
    return make("p", { className: "legend" }, key("given", "given"), key("changed", "changed at this step"), ...open);
  }

  // Drawing

  function paint(canvas, cells, n, frames) {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim().slice(1).match(/../g).map((hex) => parseInt(hex, 16));
    const [low, high, none] = ["--low", "--high", "--none"].map(colour);
    const context = canvas.getContext("2d"), image = context.createImageData(frames, n);
    for (let frame = 0; frame < frames; frame++) {
      for (let i = 0; i < n; i++) {
        const cell = cells[frame * n + i], at = 4 * (i * frames + frame), share = cell / 254;
        for (let k = 0; k < 3; k++) image.data[at + k] = cell === 255 ? none[k] : low[k] + share * (high[k] - low[k]);
        image.data[at + 3] = 255;
      }
    }
    context.putImageData(image, 0, 0);
  }

  /** A curve with gaps where there is no value. */
  function line(values, logarithmic, across) {
    const scaled = values.map((v) => v === null || (logarithmic && v <= 0) ? null : logarithmic ? Math.log10(v) : v);
    const known = scaled.filter((v) => v !== null), box = makeSvg("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none" });
    box.setAttribute("aria-hidden", "true");
    const least = known.reduce((a, b) => Math.min(a, b), Infinity), most = known.reduce((a, b) => Math.max(a, b), -Infinity);
    let points = [];
    const end = () => { if (points.length) box.append(makeSvg("polyline", { points: points.join(" ") })); points = []; };
    scaled.forEach((v, frame) => {
      if (v === null) return end();
      const y = most > least ? 95 - (90 * (v - least)) / (most - least) : 50;
      points.push(`${across(frame).toFixed(3)},${y.toFixed(2)}`);
    });
    end();
    return box;
  }

  // Controls

  const panels = data.panels.map((panel) => makePanel(panel, byId("panels")));

  function setPlace(at) {
    state.at = Math.min(longest - 1, Math.max(0, at));
    byId("slider").value = state.at;
    const steps = panels.map((panel) => panel.showFrame());
    byId("place").textContent = `step ${steps.join(" | ")}`;
    byId("slider").setAttribute("aria-valuetext", `step ${steps.join(" and ")}`);
  }

  function redraw() {
    for (const panel of panels) panel.showSample();
    setPlace(state.at);
  }

  function play(on) {
    clearInterval(state.timer);
    state.timer = 0;
    if (on) {
      if (state.at === longest - 1) setPlace(0);
      state.timer = setInterval(() => state.at < longest - 1 ? setPlace(state.at + 1) : play(false), 1000 / byId("speed").value);
    }
    byId("play").textContent = on ? "⏸" : "▶";
    byId("play").setAttribute("aria-label", on ? "Pause" : "Play");
  }

  const KEYS = {
    ArrowLeft: () => setPlace(state.at - 1), ArrowRight: () => setPlace(state.at + 1),
    Home: () => setPlace(0), End: () => setPlace(longest - 1), " ": () => play(!state.timer),
  };

  /** A place to begin at, in the address: #step=5&sample=1&map=entropy. */
  function follow() {
    const asked = new URLSearchParams(location.hash.slice(1));
    const sample = Number(asked.get("sample") ?? state.sample);
    if (Number.isInteger(sample) && sample >= 0 && sample < byId("sample").length) state.sample = sample;
    if (asked.get("map") in MAPS) state.map = asked.get("map");
    byId("sample").value = state.sample;
    if (state.map) byId("map").value = state.map;
    redraw();
    const step = Number(asked.get("step"));
    if (step > 0) {
      const frame = panels[0].steps.findIndex((known) => known >= step);
      panels[0].goTo(frame < 0 ? panels[0].steps.length - 1 : frame);
    }
  }

  function start() {
    const counts = data.panels.map((panel) => panel.samples.length), most = Math.max(...counts);
    const first = data.panels[counts.indexOf(most)].samples;
    byId("sample").append(...first.map((sample, i) => {
      const prompt = sample.prompt ? `: ${sample.prompt.slice(0, 40)}` : "";
      return make("option", { value: i, textContent: `${sample.index}${prompt}` });
    }));
    byId("sample-label").hidden = most < 2;
    const maps = [...new Set(panels.flatMap((panel) => panel.maps))];
    byId("map").append(...maps.map((name) => make("option", { value: name, textContent: MAPS[name][0].toLowerCase() })));
    byId("slider").max = longest - 1;
    byId("slider").addEventListener("input", (event) => setPlace(Number(event.target.value)));
    byId("sample").addEventListener("change", (event) => { state.sample = Number(event.target.value); redraw(); });
    byId("map").addEventListener("change", (event) => { state.map = event.target.value; redraw(); });
    byId("speed").addEventListener("change", () => { if (state.timer) play(true); });
    byId("play").addEventListener("click", () => play(!state.timer));
    byId("back").addEventListener("click", () => setPlace(state.at - 1));
    byId("forth").addEventListener("click", () => setPlace(state.at + 1));
    document.addEventListener("keydown", (event) => {
      const own = event.target.closest("select, summary, input") || (event.key === " " && event.target.closest("button"));
      if (own || event.altKey || event.ctrlKey || event.metaKey || !(event.key in KEYS)) return;
      event.preventDefault();
      KEYS[event.key]();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
    addEventListener("hashchange", follow);
    state.at = longest - 1;
    follow();
  }

  start();
})();

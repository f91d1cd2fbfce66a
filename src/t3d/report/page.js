"use strict";
(() => {
  // A table that does not fit says so, and its edge fades until it is scrolled to its end.
  for (const box of document.querySelectorAll(".scroll")) {
    const look = () => {
      box.classList.toggle("wide", box.scrollWidth > box.clientWidth + 1);
      box.classList.toggle("more", box.scrollLeft + box.clientWidth < box.scrollWidth - 1);
    };
    box.addEventListener("scroll", look, { passive: true });
    addEventListener("resize", look);
    look();
  }

  const data = JSON.parse(document.getElementById("data").textContent);
  if (!data.problems.length) return;
  const $ = (id) => document.getElementById(id);
  const make = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text; // never as HTML: answers may contain any text
    return node;
  };
  const option = (value, text) => Object.assign(make("option", "", text), { value });

  // Forward pass after which each text is there, counting denoising forwards from 1; the prompt's tail is there at 0.
  function schedule(answer) {
    const times = [];
    let before = 0;
    for (let start = 0; start < answer.texts.length; start += answer.block) {
      let most = 0;
      for (let i = start; i < Math.min(start + answer.block, answer.texts.length); i++) {
        const given = i < answer.tail;
        const step = given ? 0 : answer.steps[i - answer.tail] + 1;
        times.push(given ? 0 : before + step);
        most = Math.max(most, step);
      }
      before += most;
    }
    return { times, forwards: before };
  }

  // The space before a word stays outside its coloured span, so that lines break between words and not after it.
  const leading = (text) => (/^ +(?=\S)/.exec(text) || [""])[0];
  const visible = (text) =>
    text === "" ? "·" : text.slice(leading(text).length).replace(/\n/g, "↵\n").replace(/\t/g, "⇥\t");

  class Pane {
    constructor(side, row) {
      this.row = row;
      this.node = make("div", "pane");
      const choose = make("div", "choose");
      const label = make("label", "grow", side + " ");
      this.select = make("select");
      data.rows.forEach((r, i) => this.select.append(option(i, `${r.label}, ${r.setting}`)));
      this.select.value = row;
      this.select.setAttribute("aria-label", side + " side");
      this.select.addEventListener("change", () => { this.row = +this.select.value; show(); });
      label.append(this.select);
      choose.append(label);
      this.verdict = make("p", "verdict");
      this.text = make("div", "text");
      this.about = make("p", "about");
      this.about.setAttribute("aria-live", "polite");
      this.node.append(choose, this.verdict, this.text, this.about);
      for (const event of ["mouseover", "focusin", "click"])
        this.text.addEventListener(event, (e) => { if (e.target.dataset.i) this.explain(+e.target.dataset.i); });
      this.text.addEventListener("keydown", (e) => {
        const next = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
        const target = next && this.tokens[+e.target.dataset.i + next];
        if (target) { e.preventDefault(); target.focus(); }
      });
    }

    load(problem) {
      const a = (this.answer = problem.answers[this.row]);
      ({ times: this.times, forwards: this.forwards } = schedule(a));
      this.verdict.replaceChildren();
      const word = { true: ["✓ correct", "yes"], false: ["✗ wrong", "no"], null: ["not verified", ""] }[a.correct];
      this.verdict.append(make("b", word[1], word[0]));
      const facts = [`${a.length} tokens in ${this.forwards} forwards`];
      if (a.extracted !== null) facts.push(`answer ${a.extracted.length > 80 ? a.extracted.slice(0, 80) + "…" : a.extracted}`);
      if (!a.stopped) facts.push("cut at the token limit");
      if (a.correct === false && a.reason) facts.push(a.reason);
      this.verdict.append(" · " + facts.join(" · "));
      this.tokens = a.texts.map((text, i) => {
        const node = make("span", "t", visible(text));
        const j = i - a.tail;
        node.dataset.i = i;
        node.tabIndex = i === 0 ? 0 : -1; // one stop for Tab; arrow keys go on from there
        if (i % a.block === 0) node.classList.add("edge");
        if (j < 0) node.classList.add("given");
        else {
          node.style.setProperty("--c", `var(--s${a.steps[j]})`);
          node.style.setProperty("--u", a.confidence[j] === null ? 0 : 1 - a.confidence[j]);
        }
        if (j >= a.length) node.classList.add("after");
        if (/^<\|.*\|>$/.test(text) || text === "") node.classList.add("special");
        return node;
      });
      this.text.replaceChildren(...this.tokens.flatMap((node, i) => [leading(a.texts[i]), node]));
      this.about.textContent = "Point at a token, or tap it.";
    }

    at(time) {
      this.tokens.forEach((node, i) => node.classList.toggle("masked", this.times[i] > time));
    }

    explain(i) {
      const a = this.answer, j = i - a.tail;
      const block = Math.floor(i / a.block) + 1, text = JSON.stringify(a.texts[i]);
      if (j < 0) { this.about.textContent = `${text} · end of the prompt, in block ${block}`; return; }
      const c = a.confidence[j] === null ? "unknown" : a.confidence[j].toFixed(3);
      const after = j >= a.length ? " · after the end, does not count" : "";
      this.about.textContent = `${text} · block ${block} · step ${a.steps[j] + 1} · forward ${this.times[i]} · confidence ${c}${after}`;
    }
  }

  // Left and right: the teacher with the most forwards, the last row of another model.
  const last = data.rows.length - 1;
  const panes = [new Pane("left", 0), new Pane("right", last)];
  document.querySelector(".panes").append(...panes.map((p) => p.node));

  const filters = {
    "all": () => true,
    "left right, right wrong": (p) => p.answers[panes[0].row].correct === true && p.answers[panes[1].row].correct === false,
    "left wrong, right right": (p) => p.answers[panes[0].row].correct === false && p.answers[panes[1].row].correct === true,
    "both wrong": (p) => panes.every((q) => p.answers[q.row].correct === false),
  };
  const names = { "all": "all", "left right, right wrong": "only left correct", "left wrong, right right": "only right correct", "both wrong": "both wrong" };
  Object.keys(filters).forEach((key) => $("filter").append(option(key, names[key])));

  let current = 0, timer = null;
  const most = () => Math.max(...panes.map((p) => p.forwards));

  function list() {
    const kept = data.problems.map((p, i) => [p, i]).filter(([p]) => filters[$("filter").value](p));
    if (!kept.length) { $("problem").replaceChildren(option(-1, "none of the problems shown here")); return; }
    $("problem").replaceChildren(...kept.map(([p, i]) => option(i, `${p.id}: ${p.question.slice(0, 60)}`)));
    if (!kept.some(([, i]) => i === current)) current = kept[0][1];
    $("problem").value = current;
  }

  function show() {
    pause();
    list();
    const problem = data.problems[current];
    $("question").textContent = problem.question;
    $("context").replaceChildren(...problem.context.map((passage) => {
      const found = make("details", "", "");
      found.append(make("summary", "", `retrieved: ${passage.source}`), make("p", "", passage.text));
      return found;
    }));
    $("answer").textContent = problem.answer === null ? "" : `reference answer: ${problem.answer}`;
    panes.forEach((p) => p.load(problem));
    const steps = Math.max(...panes.flatMap((p) => p.answer.steps)) + 1;
    $("steps").replaceChildren(...Array.from({ length: steps }, (_, s) => {
      const item = make("li", "", `step ${s + 1}`);
      item.style.setProperty("--c", `var(--s${s})`);
      return item;
    }));
    $("time").max = most();
    seek(most());
  }

  function seek(time) {
    $("time").value = time;
    $("clock").textContent = `forward ${time} of ${most()}`;
    panes.forEach((p) => p.at(time));
  }

  function pause() {
    clearInterval(timer);
    timer = null;
    $("play").textContent = "▶";
    $("play").setAttribute("aria-label", "play the denoising");
  }

  $("play").addEventListener("click", () => {
    if (timer) return pause();
    if (+$("time").value >= most()) seek(0);
    $("play").textContent = "❚❚";
    $("play").setAttribute("aria-label", "pause");
    const pace = Math.min(350, Math.max(40, 12000 / most()));
    timer = setInterval(() => {
      seek(+$("time").value + 1);
      if (+$("time").value >= most()) pause();
    }, pace);
  });
  $("time").addEventListener("input", () => { pause(); seek(+$("time").value); });
  $("filter").addEventListener("change", show);
  $("problem").addEventListener("change", () => { current = Math.max(0, +$("problem").value); show(); });
  const move = (by) => {
    const choices = [...$("problem").options].map((o) => +o.value);
    current = choices[(choices.indexOf(current) + by + choices.length) % choices.length];
    if (current < 0) current = 0;
    show();
  };
  document.addEventListener("keydown", (e) => {
    if (e.ctrlKey || e.metaKey || e.altKey || /^(SELECT|INPUT|BUTTON|SUMMARY)$/.test(e.target.tagName)) return;
    const own = /\b(t|scroll)\b/.test(e.target.className); // arrows there go from token to token, or scroll
    const act = {
      " ": () => $("play").click(),
      ArrowRight: () => own || (pause(), seek(Math.min(most(), +$("time").value + 1))),
      ArrowLeft: () => own || (pause(), seek(Math.max(0, +$("time").value - 1))),
      n: () => move(1),
      p: () => move(-1),
    }[e.key];
    if (!act) return;
    if (e.key === " ") e.preventDefault();
    act();
  });
  $("previous").addEventListener("click", () => move(-1));
  $("next").addEventListener("click", () => move(1));
  show();
})();

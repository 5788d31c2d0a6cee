// Draws what is known. Nothing here asks the service. Everything that a program or a file can name goes through
// textContent, and into elements that keep its direction to themselves; sizes are set on the elements' style objects,
// since the content security policy takes no style from markup. A part is drawn anew when what it shows has changed,
// and only then, so that focus, selection and what was unfolded stay.

const STEPS = ["CHOOSING", "STAGING", "STARTING", "PROBING", "REPLACING", "PROBATION"];
const NAMES = {
  CHOOSING: "Choose", STAGING: "Copy", STARTING: "Start", PROBING: "Test", REPLACING: "Hand over", PROBATION: "Watch",
  ABORTING: "Undo", ROLLING_BACK: "Take back", STOPPING: "Stop",
};
const STATES = { todo: "to come", now: "under way", done: "done", failed: "failed" };
const WAY_BACK = ["ABORTING", "ROLLING_BACK", "STOPPING"];
const LABELLED = 0.2; // the share of a timeline from which on a phase has room for its name

export const COPY = "Copy digest";

export const at = (id) => document.getElementById(id);
const SVG = at("icons").namespaceURI;

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const use = document.createElementNS(SVG, "use");
  svg.setAttribute("class", `icon ${name}`);
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

const bdi = (text) => make("bdi", {}, text);
const unseen = (text) => make("span", { class: "unseen" }, text);
const way = (from, to) => [bdi(from), " → ", bdi(to || "?")];

const drawn = new Map();

/** Tell whether the part `name` shows something else than `value`, and remember that it does now. */
function differs(name, value) {
  const text = JSON.stringify(value);
  if (drawn.get(name) === text) return false;
  drawn.set(name, text);
  return true;
}

/** Have `list` show one child for each of `items`; what has not changed keeps its element. */
function list(element, items, key, draw, empty) {
  const before = new Map([...element.children].map((child) => [child.dataset.key, child]));
  const children = items.map((item) => {
    const old = before.get(key(item));
    const text = JSON.stringify(item);
    if (old && old.shows === text) return old;
    const child = draw(item);
    const details = child.querySelector("details");
    if (details && old) details.open = old.querySelector("details").open;
    return Object.assign(child, { shows: text }, void (child.dataset.key = key(item)));
  });
  if (!children.length) children.push(make("li", { class: "empty" }, empty));
  if (children.some((child, place) => element.children[place] !== child) || element.children.length !== children.length) {
    element.replaceChildren(...children);
  }
}

function show(element, ...content) {
  element.hidden = !content.length;
  element.replaceChildren(...content);
}

/** Say how long something took, from milliseconds; with tenths of a second where it still goes on. */
export function duration(ms, goesOn = false) {
  const s = Math.max(0, ms) / 1000;
  if (s < 1 && !goesOn) return `${Math.round(s * 1000)} ms`;
  if (s < 60) return `${s.toFixed(1)} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${Math.floor(s % 60)} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

const day = (time) => new Date(time).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "medium" });
const moment = (time) => make("time", { datetime: time, title: day(time) },
  new Date(time).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" }));
const sentence = (text) => (/[.!?…]$/.test(text) ? text : `${text}.`);

/** Return the paragraphs that say why something is so, and what to do about it. */
function because({ reason, remedy }, before = "") {
  const said = reason ? [make("p", { class: "reason" }, before, bdi(sentence(reason)))] : [];
  if (remedy) said.push(make("p", { class: "remedy" }, "To mend it: ", bdi(sentence(remedy))));
  return said;
}

// What runs.

const STANDS = { RUNNING: "Running", TRIAL: "Running, on trial", STOPPING: "Stopping", RETIRED: "Handed over" };

function standingOf(status) {
  if (STANDS[status.phase]) return STANDS[status.phase];
  return status.upgrade ? "Running, upgrade under way" : "Running, about to get its first process id back";
}

export function drawStatus(status, pidNotKept) {
  if (!differs("status", [status.version, status.pid, status.generation, status.phase, status.bind, status.installed,
    status.trust, Boolean(status.upgrade), pidNotKept])) return;
  at("could-run").hidden = false;
  at("is-running").textContent = standingOf(status);
  at("version").textContent = status.version;
  const { running, checked } = status.trust;
  const signer = running ? bdi(running.name) : checked ? "not known: no upgrade brought it" : "nobody, it was not checked";
  const facts = {
    Since: moment(status.started_at),
    Process: String(status.pid),
    Generation: String(status.generation),
    Address: bdi(status.bind.split(",").join(", ")),
    "Signed by": signer,
    "After a restart": status.installed.version === status.version ? "this version" : bdi(status.installed.version),
  };
  at("facts").replaceChildren(...Object.entries(facts).map(([name, value]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, value))));
  drawBanners(status, pidNotKept);
}

function drawBanners({ version, phase, installed, trust }, pidNotKept) {
  const banners = [];
  if (!trust.checked) {
    banners.push(["warning", "Signatures are not checked: whoever can write to the upgrade directory decides what runs."]);
  }
  if (trust.reason) banners.push(["warning", ...because(trust)]);
  if (trust.running && trust.running.reason) {
    banners.push(["warning", bdi(sentence(`What runs was signed by ${trust.running.name}: ${trust.running.reason}`))]);
  }
  if (installed.version !== version && phase === "RUNNING") { // before that it is only not installed yet
    const why = installed.reason ? `: ${installed.reason}` : "";
    banners.push(["note", bdi(sentence(`A restart will bring ${installed.version} back${why}`))]);
  }
  if (pidNotKept) banners.push(["note", bdi(sentence(`The service has another process id than before: ${pidNotKept}`))]);
  show(at("banners"), ...banners.map(([kind, ...text]) =>
    make("li", { class: kind }, icon(kind), unseen(kind === "warning" ? "Warning: " : "Note: "), make("div", {}, ...text))));
}

/** Show what can be shown of a program that does not know this page. */
export function drawForeign(version) {
  if (!differs("status", version)) return;
  for (const part of ["progress", "could-run"]) at(part).hidden = true;
  at("is-running").textContent = "Running";
  at("version").textContent = version;
  at("facts").replaceChildren();
  show(at("banners"), make("li", { class: "note" }, icon("note"), unseen("Note: "),
    make("div", {}, "Another program serves now, which tells this page no more than its version.")));
}

// What could run.

const HOW_TO_OFFER = ". Copy a newer version into the upgrade directory, and it appears here.";

export function drawOffer(status, listing, fault, best) {
  if (!differs("offer", [status, listing, fault])) return;
  let said = ["Looking for candidates…"];
  if (status.trust.reason) said = ["Upgrades are off. What turns them on stands above."];
  else if (fault) said = [bdi(fault)];
  else if (best) said = [make("strong", {}, bdi(best.version)), " can take over: ", bdi(best.name), ...signed(best, ", ")];
  else if (listing) said = ["Nothing is newer than ", bdi(status.version), HOW_TO_OFFER];
  at("offer").replaceChildren(...said);
}

const signed = ({ signer }, before = "") => (signer ? [`${before}signed by `, bdi(signer)] : [`${before}signed by nobody`]);

/** List the candidates; `acts` says what a candidate's button does, or nothing. */
export function drawCandidates(candidates, latest, acts, handlers, empty) {
  const items = candidates.map((candidate) => ({ ...candidate, isBest: candidate.name === latest, act: acts(candidate) }));
  list(at("candidates"), items, (item) => item.name, (item) => drawCandidate(item, handlers), empty);
}

function drawCandidate(item, { copy, choose }) {
  const head = make("div", { class: "head" },
    make("h4", {}, bdi(item.version || "unknown version")), make("p", { class: "name" }, bdi(item.name)));
  const facts = make("p", { class: "facts-line" }, ...signed(item));
  if (item.sha256) {
    const button = make("button", { type: "button", class: "link-button" }, COPY);
    button.append(unseen(" of "), unseen(item.name));
    button.addEventListener("click", () => copy(item.sha256, button.firstChild));
    facts.append(" · SHA-256 ", make("code", { title: item.sha256 }, `${item.sha256.slice(0, 12)}…`), " ", button);
  }
  const verdict = make("div", { class: "verdict" });
  if (item.isBest) verdict.append(make("p", { class: "chosen" }, icon("done"), "Upgrade takes this one"));
  else verdict.append(...because(item, "Not chosen: "));
  const body = make("div", { class: "body" }, head, facts, verdict);
  const line = make("li", { class: item.isBest ? "best" : item.eligible ? "" : "refused" }, body);
  if (item.act) {
    const button = make("button", { type: "button", class: "button act" }, bdi(item.act));
    button.addEventListener("click", () => choose(item));
    line.append(button);
  }
  return line;
}

// What is happening.

function nameOf(record) {
  return record.kind === "rollback" ? "Rollback" : "Upgrade";
}

/** Return each phase with the time that it took, in milliseconds; the last one is the end, or goes on. */
function phases(record) {
  return record.timeline.map(({ phase, at: begun }, place) => {
    const next = record.timeline[place + 1];
    return { phase, at: begun, ms: next ? Date.parse(next.at) - Date.parse(begun) : null };
  });
}

function standing(record) {
  const begun = record.timeline.map((entry) => entry.phase);
  const last = STEPS.findLast((step) => begun.includes(step));
  const hasFailed = record.outcome === null ? begun.some((phase) => WAY_BACK.includes(phase)) : record.outcome !== "committed";
  return STEPS.map((step) => {
    if (step === last && hasFailed) return "failed";
    if (step === last && record.outcome === null) return "now";
    return begun.includes(step) ? "done" : "todo";
  });
}

function saying(record) {
  const { from, reason } = record;
  const to = record.to || "the new version";
  if (record.outcome === "committed") return `${to} serves.`;
  if (record.outcome === "interrupted") return `Interrupted: ${sentence(reason || "the service was stopped")}`;
  if (record.outcome !== null) {
    const failed = STEPS[standing(record).indexOf("failed")];
    return `Failed at “${NAMES[failed] || "Choose"}”. ${from} serves on.`;
  }
  return {
    CHOOSING: "Choosing: what is there, who signed it, which is the greatest?",
    STAGING: `Looking at the private copy of ${to}: is it still what was chosen?`,
    STARTING: `Starting ${to} beside ${from}, which serves.`,
    PROBING: `Testing ${to}: the right version, the right process, healthy?`,
    REPLACING: `Handing over: connections wait until ${to} accepts them.`,
    PROBATION: `${to} serves, on trial. ${from} stays warm, to take over again.`,
    ABORTING: `It failed: ending ${to}. ${from} never stopped serving.`,
    ROLLING_BACK: `It failed: ${from} takes over again.`,
    STOPPING: "The service is stopping.",
  }[record.phase] || record.phase;
}

export function drawProgress(record) {
  at("progress").hidden = !record;
  if (!record || !differs("progress", record)) return;
  at("progress").dataset.outcome = record.outcome || "";
  at("progress-title").replaceChildren(`${nameOf(record)} `, ...(record.to ? way(record.from, record.to) : [bdi(`from ${record.from}`)]));
  const states = standing(record);
  const took = new Map(phases(record).map(({ phase, ms }) => [phase, ms]));
  at("steps").replaceChildren(...STEPS.map((step, place) => {
    const state = states[place];
    const ms = took.get(step);
    const time = make("span", { class: "time" }, ms === null || ms === undefined ? "" : duration(ms));
    const name = make("span", { class: "name" }, NAMES[step]);
    const item = make("li", { class: state }, icon(state), name, unseen(`, ${STATES[state]}`), time);
    if (state === "now") item.setAttribute("aria-current", "step");
    return item;
  }));
  const said = saying(record);
  if (at("now").textContent !== said) at("now").textContent = said; // a live region: it speaks when it changes
  show(at("failure"), ...(record.reason && record.outcome !== "interrupted" ? because(record) : []));
  drawLog(record);
}

function drawLog({ log, to, outcome }) {
  at("writes").hidden = !log;
  at("writes-title").replaceChildren("What ", bdi(to || "it"), outcome === null ? " writes" : " wrote");
  const isAtEnd = at("log").scrollTop + at("log").clientHeight >= at("log").scrollHeight - 8;
  if (at("log").textContent !== (log || "")) at("log").textContent = log || "";
  if (isAtEnd) at("log").scrollTop = at("log").scrollHeight;
}

/** Let the times go on that go on; `now` is the service's own time of day, in milliseconds. */
export function tick(record, now) {
  if (!record) return;
  const end = record.ended_at ? Date.parse(record.ended_at) : now;
  at("elapsed").textContent = duration(end - Date.parse(record.started_at), record.outcome === null);
  const time = at("steps").querySelector(".now .time");
  if (time) time.textContent = duration(now - Date.parse(record.timeline.at(-1).at), true);
}

// What happened before.

export function drawHistory(records, empty) {
  list(at("history"), records, (record) => record.id, drawEntry, empty);
}

function drawEntry(record) {
  const is = record.outcome === "committed" ? "done" : "failed";
  const what = make("p", { class: "what" }, icon(is), make("strong", {}, nameOf(record), " ", ...way(record.from, record.to)),
    " ", make("span", { class: "outcome" }, record.outcome.replace("-", " ")));
  const took = duration(Date.parse(record.ended_at) - Date.parse(record.started_at));
  const when = make("p", { class: "when" }, moment(record.started_at), " · ", took);
  const notes = because(record);
  const note = (text) => notes.push(make("p", { class: "reason" }, bdi(sentence(text))));
  if (record.not_installed) note(`Not installed: ${record.not_installed}`);
  if (record.pid_not_kept) note(`The process id is another since: ${record.pid_not_kept}`);
  return make("li", { class: `entry ${is}` },
    make("div", { class: "row" }, what, when), ...notes, drawTimeline(record), drawDetails(record));
}

/** Draw the phases as a line on which each is as long as it took. */
function drawTimeline(record) {
  const parts = phases(record).filter(({ ms }) => ms !== null);
  const whole = parts.reduce((sum, { ms }) => sum + ms, 0);
  const failed = STEPS[standing(record).indexOf("failed")];
  const said = parts.map(({ phase, ms }) => `${NAMES[phase] || phase} ${duration(ms)}`).join(", ");
  const line = make("div", { class: "timeline", role: "img", "aria-label": `Timeline: ${said}` });
  for (const { phase, ms } of parts) {
    const kind = WAY_BACK.includes(phase) ? "back" : phase === failed ? "broken" : "";
    const part = make("span", { class: kind, title: `${NAMES[phase] || phase} ${duration(ms)}` });
    part.style.flexGrow = ms;
    if (ms / whole >= LABELLED) part.textContent = part.title;
    line.append(part);
  }
  return line;
}

function drawDetails(record) {
  const cell = (text) => make("td", {}, text);
  const rows = phases(record).map(({ phase, at: begun, ms }) => make("tr", {},
    make("th", { scope: "row" }, phase), cell(begun.slice(11, 23)), cell(ms === null ? "" : duration(ms))));
  const names = ["Phase", "Began (UTC)", "Took"].map((name) => make("th", { scope: "col" }, name));
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...names)), make("tbody", {}, ...rows));
  const facts = {
    Name: record.name, "Signed by": record.signer || (record.name ? "nobody" : null), "SHA-256": record.sha256, Id: record.id,
  };
  const terms = Object.entries(facts).filter(([, value]) => value).map(([name, value]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, bdi(value))));
  const of = ` of the ${nameOf(record).toLowerCase()} of ${day(record.started_at)}`;
  const details = make("details", {}, make("summary", {}, "Details", unseen(of)),
    make("div", { class: "inside" }, table, make("dl", {}, ...terms)));
  if (record.log) {
    const name = `The end of what it wrote${of}`;
    details.append(make("pre", { class: "log", tabindex: "0", role: "region", "aria-label": name }, record.log));
  }
  return details;
}

/** Ask in the page whether to go `from` a version `to` another; resolves to whether to. */
export function confirm({ verb, from, to, text }) {
  at("confirm-title").textContent = `${verb}?`;
  at("confirm-way").replaceChildren(...way(from, to));
  at("confirm-text").replaceChildren(bdi(text));
  at("confirm-yes").textContent = verb;
  const dialog = at("confirm");
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

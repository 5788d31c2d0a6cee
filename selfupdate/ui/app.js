"use strict";
// Shows the service's state and asks for upgrades. Everything that a program or a file can name goes
// through textContent. A token is kept for this tab alone, and sent with nothing but our own requests. Nothing waits a fixed time for an upgrade: the state is asked for again, after a
// pause that grows from SOON to LATER (to SOMETIMES during an upgrade) and starts anew whenever something has changed.

const SOON = 100;
const SOMETIMES = 800;
const LATER = 3000;
const STEPS = ["CHOOSING", "STAGING", "STARTING", "PROBING", "REPLACING", "PROBATION"];
const NAMES = {
  CHOOSING: "choose", STAGING: "copy", STARTING: "start", PROBING: "probe", REPLACING: "hand over", PROBATION: "watch",
};

const at = (id) => document.getElementById(id);
let following = null; // the id of the upgrade that this page follows
let pause = SOON;
let timer = null;
let seen = "";

async function ask(path, options = {}) {
  const token = sessionStorage.getItem("token");
  const headers = options.method === "POST" && token ? { Authorization: `Bearer ${token}` } : {};
  const response = await fetch(path, { cache: "no-store", headers, ...options });
  const body = await response.json();
  if (!response.ok) throw Object.assign(new Error(body.detail), { status: response.status, body });
  return body;
}

function say(text, kind = "") {
  at("message").textContent = text;
  at("message").className = kind;
}

function show(id, text) {
  at(id).hidden = !text;
  at(id).textContent = text || "";
}

function withRemedy({ reason, remedy }) {
  return remedy ? `${reason}. To mend it: ${remedy}` : reason;
}

function row(cells) {
  const line = document.createElement("tr");
  for (const [text, kind] of cells) {
    const cell = line.insertCell();
    cell.textContent = text;
    cell.className = kind || "";
  }
  return line;
}

function fill(id, lines, columns, empty) {
  const nothing = row([[empty, "empty"]]);
  nothing.cells[0].colSpan = columns;
  at(id).replaceChildren(...(lines.length ? lines : [nothing]));
}

function showStatus(status) {
  at("version").textContent = status.version;
  document.title = `self-update ${status.version}`;
  at("facts").textContent = `process ${status.pid}, generation ${status.generation}, ${status.phase}, ` +
    `on ${status.bind} since ${new Date(status.started_at).toLocaleString()}`;
  const { version, reason } = status.installed;
  show("restart", version !== status.version && `A restart will bring ${version}${reason ? `: ${reason}` : ""}.`);
  const { checked, running, ...trust } = status.trust;
  at("unsigned").hidden = checked;
  show("off", trust.reason && (trust.remedy ? `${trust.reason} To mend it: ${trust.remedy}.` : trust.reason));
  show("signer", running && (running.reason
    ? `The running version was signed by ${running.name}: ${running.reason}.` : `Signed by ${running.name}.`));
}

function showSteps(record) {
  const begun = record.timeline.map((entry) => entry.phase);
  const reached = STEPS.filter((step) => begun.includes(step));
  const last = reached[reached.length - 1];
  at("steps").hidden = false;
  at("steps").replaceChildren(...STEPS.map((step) => {
    const item = document.createElement("li");
    item.textContent = NAMES[step];
    if (step !== last) item.className = reached.includes(step) ? "done" : "";
    else if (record.outcome === null) item.className = record.reason === null ? "now" : "failed";
    else item.className = record.outcome === "committed" ? "done" : "failed";
    if (item.className === "now") item.setAttribute("aria-current", "step");
    return item;
  }));
}

function showRecord(record) {
  showSteps(record);
  if (record.outcome === "committed") say(`${record.to} serves.`, "good");
  else if (record.outcome !== null) say(`${record.outcome}: ${withRemedy(record)}.`, "bad");
  else say(`Upgrading from ${record.from}${record.to ? ` to ${record.to}` : ""}…`);
}

function showCandidates({ current, latest, candidates }, isUnderWay) {
  const best = candidates.find((candidate) => candidate.name === latest);
  at("offer").textContent = best ? `${current} → ${best.version} (${best.name})` : `Nothing is newer than ${current}.`;
  at("upgrade").disabled = !best || isUnderWay;
  fill("candidates", candidates.map((candidate) => row([
    [candidate.version || "unknown"],
    [candidate.name],
    [candidate.signer || "nobody", "signer"],
    [candidate.sha256 ? candidate.sha256.slice(0, 12) : "", "digest"],
    [candidate.reason ? withRemedy(candidate) : "would be chosen", candidate.reason ? "" : "good"],
  ])), 5, "The upgrade directory holds no candidate.");
}

function showHistory(upgrades) {
  fill("history", upgrades.map((record) => row([
    [new Date(record.started_at).toLocaleString()],
    [record.from],
    [record.to || ""],
    [(record.outcome || record.phase) + (record.reason ? `: ${withRemedy(record)}` : "") +
      (record.pid_not_kept ? `; the process id is another, since ${record.pid_not_kept}` : ""), record.outcome === "committed" ? "good" : ""],
  ])), 4, "No upgrade so far.");
}

async function look() {
  const status = await ask("/status");
  showStatus(status);
  if (status.upgrade) following = status.upgrade.id;
  if (following) {
    const record = await ask(`/upgrades/${following}`).catch((error) => {
      if (error.status !== 404) throw error;
      return null; // a version that was told nothing of it
    });
    if (record) showRecord(record);
    if (!record || record.outcome !== null) following = null;
  }
  const { upgrades } = await ask("/upgrades?limit=50");
  showHistory(upgrades);
  try {
    showCandidates(await ask("/candidates"), following !== null);
  } catch (error) {
    if (!error.body) throw error;
    fill("candidates", [], 5, status.trust.reason ? "None is looked at while upgrades are off." : error.message);
    at("offer").textContent = "";
    at("upgrade").disabled = true;
  }
  return JSON.stringify([status, upgrades]);
}

async function tick() {
  clearTimeout(timer);
  try {
    const state = await look();
    pause = state === seen ? Math.min(pause * 2, following ? SOMETIMES : LATER) : SOON;
    seen = state;
  } catch (error) {
    // Between two versions a connection can end: the next one answers.
    pause = Math.min(pause * 2, LATER);
    if (pause === LATER) say(`The service does not answer (${error.message}); this page keeps asking.`, "bad");
  }
  timer = setTimeout(tick, pause);
}

async function upgrade() {
  at("upgrade").disabled = true;
  say("Choosing…");
  try {
    const answer = await ask("/upgrade", { method: "POST" });
    if (answer.id) following = answer.id;
    else say("Nothing is newer than what runs.");
  } catch (error) {
    if (error.body && error.body.id) following = error.body.id;
    else say(error.message, "bad");
    if (error.status === 401) askForToken();
  }
  pause = SOON;
  tick();
}

function askForToken() {
  sessionStorage.removeItem("token");
  at("token-form").hidden = false;
  at("token").focus();
}

at("upgrade").addEventListener("click", upgrade);
at("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", at("token").value);
  at("token").value = "";
  at("token-form").hidden = true;
  upgrade();
});

tick();

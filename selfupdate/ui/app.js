// Knows what the service says, and asks it to act. What happens comes as events (GET /events); where there are none,
// or too many listen, the state is asked for instead, after a pause that grows from SOON to LATER (to SOMETIMES during
// an upgrade) and starts anew whenever something has changed. Candidates are asked for apart: to look at them takes
// the service seconds, and nothing else waits for that. A token is kept for this tab alone, and sent with orders alone.

import * as view from "/view.js";

const { at } = view;

const SOON = 100;
const SOMETIMES = 800;
const LATER = 3000;
const AGAIN = 30000; // until events are tried again, where there were none
const SILENCE = 3000; // without events, until they are taken for lost
const LOOK = 4000; // between two looks at the candidates
const NO_ANSWER = "No answer; this page keeps asking";
const SHORT_HISTORY = 50;
const WHOLE_HISTORY = 999;

// Refusals that do not count for a candidate that is asked for by name, with what its button says then.
const BY_NAME = {
  "not-greatest": (candidate) => `Upgrade to ${candidate.version}…`,
  blocked: (candidate) => `Try ${candidate.version} again…`,
  "version-timeout": () => "Ask it again…",
  "version-exit": () => "Ask it again…",
  "version-signal": () => "Ask it again…",
};

const known = {
  status: null,
  records: null, // newest first
  limit: SHORT_HISTORY,
  listing: null,
  fault: null, // why the candidates can't be listed
  followed: null, // the id of the upgrade that is shown, under way or ended
  isAsking: false, // an order is on its way
  isWaiting: null, // the order that waits for the token
  lag: Infinity, // how much later it is here than where the service runs, in milliseconds
};

async function ask(path, options = {}) {
  const token = sessionStorage.getItem("token");
  const headers = options.method === "POST" && token ? { Authorization: `Bearer ${token}` } : {};
  const response = await fetch(path, { cache: "no-store", headers, ...options });
  noteTime(response.headers.get("Date"));
  const body = await response.json();
  if (!response.ok) throw Object.assign(new Error(body.detail), { status: response.status, body });
  return body;
}

// What is known.

/** Take a time of the service's clock that has passed by now: the least lag is the best guess. */
function noteTime(text) {
  known.lag = Math.min(known.lag, Date.now() - Date.parse(text) || known.lag);
}

const underWay = () => known.records && known.records.find((record) => record.outcome === null);

function takeStatus(status) {
  const before = known.status;
  known.status = status;
  if (status.upgrade) takeRecord(status.upgrade);
  const open = underWay();
  if (open && (!status.upgrade || status.upgrade.id !== open.id)) readHistory().catch(() => {}); // it ended unseen, or was none
  if (!before || before.version !== status.version) look();
  draw();
}

function takeRecord(record) {
  noteTime(record.timeline.at(-1).at);
  if (!known.records) known.records = [];
  const place = known.records.findIndex((other) => other.id === record.id);
  if (place < 0) known.records.unshift(record);
  else known.records[place] = further(known.records[place], record);
  if (place < 0 || record.outcome === null) known.followed = record.id;
  if (record.outcome !== null) look();
  draw();
}

/** Return which of two states of a record is the later one; `newer` came later, perhaps on a slower way. */
function further(older, newer) {
  const isAhead = older.timeline.length > newer.timeline.length || (older.installed !== null && newer.installed === null);
  return isAhead ? older : newer;
}

async function readHistory() {
  const before = known.records && new Set(known.records.map((record) => record.id));
  const { upgrades } = await ask(`/upgrades?limit=${known.limit}`);
  const listed = new Set(upgrades.map((record) => record.id));
  const now = new Map((known.records || []).map((record) => [record.id, record]));
  const begun = [...now.values()].filter((record) => !listed.has(record.id) && !(before && before.has(record.id)));
  known.records = [...begun, ...upgrades.map((record) => further(now.get(record.id) || record, record))];
  const newest = known.records[0];
  if (newest && (newest.outcome === null || (before && !before.has(newest.id)))) known.followed = newest.id;
  draw();
}

// How it comes to be known.

const stream = { source: null, lost: null, next: 0 };
const polls = { timer: null, isAsking: false, pause: SOON, seen: "" };

function listen() {
  const source = new EventSource("/events");
  stream.source = source;
  source.addEventListener("open", () => readHistory().catch(() => stream.source === source && leave(0)), { once: true });
  source.addEventListener("open", () => {
    clearTimeout(stream.lost);
    clearTimeout(polls.timer);
    stream.lost = polls.timer = null;
    link("live", "Live");
  });
  source.addEventListener("status", (event) => takeStatus(JSON.parse(event.data)));
  source.addEventListener("phase", (event) => takeRecord(JSON.parse(event.data).record));
  source.addEventListener("record", (event) => takeRecord(JSON.parse(event.data)));
  source.addEventListener("error", () => {
    // Between two versions a stream ends, and is opened again by the browser, which says what it has seen.
    if (source.readyState === EventSource.CLOSED) leave(AGAIN);
    else stream.lost ??= setTimeout(giveUp, SILENCE);
  });
}

function giveUp() {
  link("silent", NO_ANSWER);
  leave(0);
}

/** Listen no more, and ask instead; try again to listen after `pause`, when the service answers. */
function leave(pause) {
  clearTimeout(stream.lost);
  stream.lost = null;
  stream.source.close();
  stream.source = null;
  stream.next = Date.now() + pause;
  polls.pause = SOON;
  clearTimeout(polls.timer);
  if (!document.hidden) poll();
}

async function poll() {
  if (polls.isAsking) return;
  polls.isAsking = true;
  clearTimeout(polls.timer);
  try {
    const status = await ask("/status");
    if (!status.trust) {
      known.status = null;
      view.drawForeign(status.version);
    } else {
      takeStatus(status);
      await readHistory();
    }
    const state = JSON.stringify([status, known.records]);
    polls.pause = state === polls.seen ? Math.min(polls.pause * 2, underWay() ? SOMETIMES : LATER) : SOON;
    polls.seen = state;
    link("asking", "Asking now and then");
    if (!stream.source && Date.now() >= stream.next) listen();
  } catch {
    polls.pause = Math.min(polls.pause * 2, LATER);
    stream.next = 0;
    if (polls.pause === LATER) link("silent", NO_ANSWER);
  }
  polls.isAsking = false;
  if (document.hidden) return;
  if (!stream.source || stream.source.readyState !== EventSource.OPEN) polls.timer = setTimeout(poll, polls.pause);
}

function link(kind, text) {
  at("link").className = `link ${kind}`;
  at("link").hidden = false;
  if (at("link").textContent !== text) at("link").textContent = text;
}

const looks = { timer: null, isLooking: false, isOutdated: false };

/** List the candidates, and do so again later. */
async function look() {
  clearTimeout(looks.timer);
  looks.isOutdated = looks.isLooking;
  if (looks.isLooking || !known.status) return;
  if (document.hidden || (underWay() && known.listing) || known.status.trust.reason) {
    looks.timer = setTimeout(look, LOOK); // nobody looks, the answer is about to change, or there is none
    return;
  }
  looks.isLooking = true;
  const begun = Date.now();
  try {
    known.listing = await ask("/candidates");
    known.fault = null;
  } catch (error) {
    if (error.body) [known.listing, known.fault] = [null, error.message];
  }
  looks.isLooking = false;
  draw();
  const pause = looks.isOutdated ? SOON : Math.max(LOOK, 10 * (Date.now() - begun));
  looks.timer = setTimeout(look, pause);
}

// What can be asked for.

/** Return what is known of the candidates, if it was said by the version that runs. */
function listed() {
  const { listing, status } = known;
  return listing && listing.current === status.version ? listing : null;
}

function best() {
  const listing = listed();
  return listing && listing.candidates.find((candidate) => candidate.name === listing.latest);
}

/** Return the version that Roll back goes to, or nothing. */
function previous() {
  const last = (known.records || []).find((record) => record.outcome === "committed");
  return last && last.from_sha256 && last.to === known.status.version ? last.from : null;
}

async function chooseCandidate(candidate) {
  const { version } = known.status;
  const verb = candidate.code === "blocked" ? "Try again" : "Upgrade";
  const who = candidate.signer ? `signed by ${candidate.signer}` : "signed by nobody";
  const text = `${candidate.name}, ${who}, is started beside ${version}, tested, and takes over. ` +
    `No request is lost, and should anything fail, ${version} serves on.`;
  const to = candidate.version || "what it says then";
  const body = JSON.stringify({ name: candidate.name });
  if (await view.confirm({ verb, from: version, to, text })) order({ path: "/upgrade", options: { method: "POST", body } });
}

async function goBack() {
  const { version } = known.status;
  const text = `${previous()} takes over again by the same handover. ${version} is then not chosen again unasked.`;
  if (await view.confirm({ verb: "Roll back", from: version, to: previous(), text })) {
    order({ path: "/rollback", options: { method: "POST" } });
  }
}

async function order(what) {
  if (known.isAsking) return;
  known.isAsking = true;
  known.followed = null;
  say("");
  draw();
  try {
    takeRecord(await ask(what.path, what.options));
  } catch (error) {
    if (error.status === 401) askForToken(what);
    else if (error.body && error.body.id) known.followed = error.body.id; // its record says why
    else say(error.body ? error.message : `There was no answer (${error.message}). Look at what happened before asking again.`);
  }
  known.isAsking = false;
  draw();
  if (!at("progress").hidden) at("progress-title").focus(); // the button that was pressed can't be pressed any more
}

function say(text) {
  at("message").hidden = !text;
  at("message").textContent = text;
}

function askForToken(what) {
  if (sessionStorage.getItem("token")) say("That is not the service's token.");
  sessionStorage.removeItem("token");
  known.isWaiting = what;
  at("token-form").hidden = false;
  at("token").focus();
}

// What is shown.

function draw() {
  const { status, records } = known;
  if (!status || !records) return;
  const listing = listed();
  at("page").hidden = false;
  const open = underWay();
  const last = records.find((record) => record.outcome === "committed");
  view.drawStatus(status, last && last.to === status.version ? last.pid_not_kept : null);
  const shown = records.find((record) => record.id === known.followed) || null;
  view.drawProgress(shown);
  view.drawOffer(status, listing, known.fault, best());
  drawChoices(status, listing, open);
  view.drawHistory(records.filter((record) => record.outcome !== null), "No upgrade so far.");
  at("older").hidden = known.limit !== SHORT_HISTORY || records.length < SHORT_HISTORY;
  document.title = open && open.to ? `${open.from} → ${open.to} · self-update` : `${status.version} · self-update`;
  tick();
}

function drawChoices(status, listing, open) {
  const isFree = !open && !known.isAsking && !status.trust.reason;
  at("upgrade").disabled = !isFree || !best();
  at("upgrade").textContent = best() ? `Upgrade to ${best().version}…` : "Upgrade";
  at("rollback").hidden = !previous();
  at("rollback").disabled = Boolean(open) || known.isAsking;
  at("rollback").textContent = `Roll back to ${previous()}…`;
  const acts = (candidate) => (isFree && listing && BY_NAME[candidate.code] ? BY_NAME[candidate.code](candidate) : null);
  const isOff = Boolean(status.trust.reason);
  if (known.listing || known.fault || isOff) {
    // A list that another version gave stays until there is a new one, but nothing of it can be chosen.
    view.drawCandidates(known.listing && !isOff ? known.listing.candidates : [], listing && listing.latest, acts,
      { copy, choose: chooseCandidate }, isOff ? "None is looked at while upgrades are off." : "There is none.");
  }
}

let ticking = null;

/** Let the times of an upgrade go on while it does. */
function tick() {
  const shown = known.records.find((record) => record.id === known.followed);
  view.tick(shown, Date.now() - known.lag);
  const rest = matchMedia("(prefers-reduced-motion: reduce)").matches ? 1000 : 100;
  clearTimeout(ticking);
  if (shown && shown.outcome === null) ticking = setTimeout(tick, rest);
}

async function copy(text, label) {
  try {
    await navigator.clipboard.writeText(text); // which pages have over TLS and from this machine alone
    label.data = "Copied";
  } catch {
    const area = document.createElement("textarea");
    area.value = text;
    label.parentNode.append(area);
    area.select();
    label.data = document.execCommand("copy") ? "Copied" : "Not copied";
    area.remove();
    label.parentNode.focus();
  }
  setTimeout(() => (label.data = view.COPY), 2000);
}

at("upgrade").addEventListener("click", () => chooseCandidate(best()));
at("rollback").addEventListener("click", goBack);
at("older").addEventListener("click", () => {
  known.limit = WHOLE_HISTORY;
  readHistory().catch((error) => say(error.message));
});
at("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", at("token").value);
  at("token").value = "";
  at("token-form").hidden = true;
  order(known.isWaiting);
});
// A browser opens few connections to one service, and the service takes few listeners: who does not look leaves.
document.addEventListener("visibilitychange", () => {
  if (document.hidden && stream.source && !underWay()) leave(0);
  if (document.hidden) return clearTimeout(polls.timer);
  if (!stream.source) poll();
  look();
});

listen();

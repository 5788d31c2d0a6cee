#!/bin/sh
":" /*
# The shell runs what stands here up to `exec`; to Node.js it is a comment. Node.js has no Unix datagram sockets, so it
# could not announce itself, and nobody may do it for another process. Python connects the socket and then becomes
# Node.js, which keeps the process id, and only has to write to the descriptor.
[ -n "$NOTIFY_SOCKET" ] || exec node "$0" "$@"
exec python3 -IS -c '
import os, socket, sys
manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
name = os.environ["NOTIFY_SOCKET"]
manager.connect("\0" + name[1:] if name[0] == "@" else name)
manager.set_inheritable(True)
os.environ["NOTIFY_FD"] = str(manager.fileno())
os.execvp("node", ["node", *sys.argv[1:]])
' "$0" "$@"
*/;
// A service in Node.js (18 or newer) that takes over from self-update, and hands over to it.
//
// As a successor it speaks the full protocol where a listening socket was passed on, else the plain one. On SIGHUP it
// is an incumbent of the plain protocol: it starts the program that the variable SUCCESSOR names, and leaves to it.

"use strict";

const { spawn } = require("node:child_process");
const dns = require("node:dns");
const { once } = require("node:events");
const fs = require("node:fs");
const http = require("node:http");
const { setTimeout: pause } = require("node:timers/promises");

const VERSION = "2.0.0";
const FIRST_FD = 3; // of those that are passed on
const BACKLOG = 4096; // connections that wait; Node.js would cut the inherited listener's to 511
const REQUEST_TIME = 10_000; // milliseconds for a client to go on
const SUCCESSOR_TIME = 30_000; // milliseconds for a successor to stand by
const LOOK_INTERVAL = 20; // milliseconds between two looks at it

// What was said to this process is not said to the next one, which gets the others alone.
const { LISTEN_FDS, LISTEN_FDNAMES, LISTEN_PID, NOTIFY_FD, NOTIFY_SOCKET, SELF_UPDATE_HANDOVER_FD, ...others } =
  process.env;
const bind = flag("-bind", "localhost:8080");
const upgradeBind = flag("-upgrade-bind", "localhost:8081");
const inheritsListener = LISTEN_PID === String(process.pid) && Number(LISTEN_FDS) >= 1;
const secret = SELF_UPDATE_HANDOVER_FD && JSON.parse(readMessage(Number(SELF_UPDATE_HANDOVER_FD))).secret;

const service = server(serve);
const temporary = server((request, response) =>
  request.url === "/replace" ? replace(request, response) : serve(request, response),
);
let successor = null; // while it is started and does not serve
let isLeaving = false;

function flag(name, otherwise) {
  const place = process.argv.indexOf(name);
  return place < 0 ? otherwise : process.argv[place + 1];
}

function address(text) {
  const [, host, port] = text.match(/^(.*):(\d+)$/);
  return { host: host || undefined, port: Number(port) };
}

// A channel of messages (SOCK_SEQPACKET) gives one with each read.
function readMessage(fd) {
  const buffer = Buffer.alloc(1 << 18);
  return buffer.toString("utf8", 0, fs.readSync(fd, buffer));
}

function server(respond) {
  const wholly = (request, response) => request.resume().once("end", () => respond(request, response));
  return http.createServer(wholly).setTimeout(REQUEST_TIME);
}

function isHealthy() {
  return true;
}

function serve(request, response) {
  answer(response, request.method !== "GET" ? 400 : isHealthy() ? 200 : 503);
}

function answer(response, status) {
  const body = JSON.stringify({ version: VERSION, pid: process.pid });
  const headers = { "Content-Type": "application/json", "Content-Length": body.length, Connection: "close" };
  response.writeHead(status, headers).end(body);
}

// ---- The successor ---------------------------------------------------------------------------------------------------

function standBy() {
  temporary.listen(address(upgradeBind), () => {
    if (NOTIFY_FD) fs.writeSync(Number(NOTIFY_FD), inheritsListener ? "READY=1\nX_SELF_UPDATE=1" : "READY=1");
  });
}

async function replace(request, response) {
  if (secret && request.headers.authorization !== `Bearer ${secret}`) return answer(response, 403);
  try {
    service.listen(inheritsListener ? { fd: FIRST_FD } : address(bind), BACKLOG);
    await once(service, "listening");
  } catch (error) {
    console.error(`cannot take over: ${error.message}`);
    return answer(response, 503);
  }
  answer(response, 200);
  temporary.close();
}

// ---- The incumbent ---------------------------------------------------------------------------------------------------

async function handOver() {
  if (!others.SUCCESSOR || successor || !service.listening) return;
  const flags = ["-upgrade", "true", "-upgrade-bind", upgradeBind, "-bind", bind];
  successor = spawn(others.SUCCESSOR, flags, { env: others, stdio: "inherit" });
  try {
    await standsBy(successor);
    service.close();
    if ((await ask("/replace")) !== 200) throw new Error("did not take over");
    successor.unref(); // nothing is left to wait for but the requests under way: the process ends with them
  } catch (error) {
    console.error(`the successor ${error.message}`);
    successor.kill("SIGKILL");
    if (!service.listening && !isLeaving) service.listen(address(bind), BACKLOG);
  }
  successor = null;
}

// Nothing tells when a successor of the plain protocol stands by: it does once it answers, whatever that is.
async function standsBy(child) {
  let end = null;
  child.once("error", (error) => (end = error)).once("exit", () => (end = new Error("ended before it stood by")));
  for (const deadline = Date.now() + SUCCESSOR_TIME; !(await ask("/healthz").catch(() => 0)); ) {
    if (end) throw end;
    if (Date.now() > deadline) throw new Error("did not stand by in time");
    await pause(LOOK_INTERVAL);
  }
}

// Resolves to the status. (fetch() would say that it is a browser, and self-update takes over for none.)
function ask(path) {
  return new Promise((resolve, reject) => {
    const request = http.get({ ...address(upgradeBind), path, agent: false, timeout: REQUEST_TIME });
    request.once("response", (response) => resolve(response.resume().statusCode));
    request.once("timeout", () => request.destroy(new Error("did not answer in time")));
    request.once("error", reject);
  });
}

// ---- The process -----------------------------------------------------------------------------------------------------

function leave() {
  isLeaving = true;
  successor?.kill();
  temporary.close();
  service.close();
}

if (process.argv[2] === "-version") {
  console.log(VERSION);
} else {
  dns.setDefaultResultOrder("ipv4first"); // `localhost` is 127.0.0.1 to self-update
  process.on("SIGTERM", leave).on("SIGINT", leave).on("SIGHUP", handOver);
  if (flag("-upgrade", "false") === "true") standBy();
  else service.listen(address(bind), BACKLOG);
}

# A foreign successor that takes the inherited listeners: the full protocol in the smallest form.
# VERSION and MODE stand above: "serves", or what it does wrong.
import http.server
import json
import os
import signal
import socket
import sys
import threading
import time


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path == "/replace" and MODE == "drips":
            while True:
                self.wfile.write(b"H")
                time.sleep(0.1)  # the pace of the drip: the fault itself
        if self.path == "/replace":
            if MODE == "dies before it accepts":
                self.answer(200)
                os._exit(7)
            for service in services:
                threading.Thread(target=service.serve_forever).start()
        self.answer(200)

    do_POST = do_GET

    def answer(self, status):
        if self.command == "POST":
            self.rfile.read(int(self.headers["Content-Length"]))
            status = 400
        body = json.dumps({"status": "ok", "version": VERSION, "pid": os.getpid()}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if self.server in services:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        if MODE == "dies with requests under way" and self.server in services and next(answers) == 100:
            os.kill(os.getpid(), signal.SIGKILL)

    def log_message(self, *_):
        if MODE == "talks":
            print(self.command, self.path, file=sys.stderr, flush=True)


class Server(http.server.ThreadingHTTPServer):
    def service_actions(self):
        self.socket.setblocking(False)


if sys.argv[1:] == ["-version"]:
    print(VERSION)
    sys.exit()

assert os.environ["LISTEN_PID"] == str(os.getpid())
answers = iter(range(1 << 30))
services = []
for fd in range(3, 3 + int(os.environ["LISTEN_FDS"])):
    service = Server(("", 0), Handler, bind_and_activate=False)
    service.socket = socket.socket(fileno=fd)
    service.socket.setblocking(MODE == "blocks the listener")
    if MODE == "shuts the listener down":
        service.socket.shutdown(socket.SHUT_RDWR)
    services.append(service)
if MODE in {"blocks the listener", "shuts the listener down"}:
    sys.exit(3)
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
notify.connect("\0" + os.environ["NOTIFY_SOCKET"][1:])
if MODE == "does not listen":
    notify.send(b"READY=1\nX_SELF_UPDATE=1")
    signal.pause()
host, _, port = sys.argv[sys.argv.index("-upgrade-bind") + 1].rpartition(":")
temporary = http.server.HTTPServer((host, int(port)), Handler)
notify.send(b"READY=1\nX_SELF_UPDATE=1")
temporary.serve_forever()

# A foreign successor: it knows the plain protocol, and nothing of this project.
# VERSION and MODE stand above: "serves", or what it does wrong when it is to take over.
import http.server
import json
import os
import pathlib
import socket
import socketserver
import sys
import threading


def flag(name):
    return sys.argv[sys.argv.index(name) + 1]


def address(name):
    host, _, port = flag(name).rpartition(":")
    return host, int(port)


class Service(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        status = 500 if MODE == "answers 500" else 200
        body = json.dumps({"version": VERSION, "arguments": sys.argv[1:]}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        if MODE == "dies after its first answer":
            os._exit(7)

    def log_message(self, *_):
        pass


class UnixServer(http.server.ThreadingHTTPServer):
    address_family = getattr(socket, "AF_UNIX", None)  # which Windows has not
    server_bind = socketserver.TCPServer.server_bind


def serve():
    texts = [sys.argv[at + 1] for at, name in enumerate(sys.argv) if name == "-bind"]
    for text in texts[:1] if MODE == "serves the first" else texts:
        host, _, port = text.rpartition(":")
        if host == "unix":
            service = UnixServer(port, Service)
        else:
            service = http.server.ThreadingHTTPServer((host, int(port)), Service)
        threading.Thread(target=service.serve_forever).start()


class Temporary(Service):
    def do_GET(self):
        if self.path != "/replace":
            self.send_error(404)
            return
        if MODE.startswith("waits for "):
            pathlib.Path(MODE.removeprefix("waits for ")).read_bytes()
        elif MODE != "never serves":
            serve()
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
        if MODE == "dies":
            os._exit(7)


def go_deaf():
    """Listen without room for more than the first who looks, and take nobody."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address("-upgrade-bind"))
    listener.listen(0)
    threading.Event().wait()


if sys.argv[1:] == ["-version"]:
    print(VERSION)
elif MODE == "goes deaf" and "LISTEN_FDS" not in os.environ:
    go_deaf()
elif sys.argv[1:2] == ["-upgrade"]:
    http.server.HTTPServer(address("-upgrade-bind"), Temporary).serve_forever()

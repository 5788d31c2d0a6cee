# A foreign successor: it knows the plain protocol, and nothing of this project.
# VERSION and MODE stand above: "serves", or what it does wrong when it is to take over.
import http.server
import json
import os
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


class Temporary(Service):
    def do_GET(self):
        if self.path != "/replace":
            self.send_error(404)
            return
        if MODE != "never serves":
            service = http.server.ThreadingHTTPServer(address("-bind"), Service)
            threading.Thread(target=service.serve_forever).start()
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
        if MODE == "dies":
            os._exit(7)


if sys.argv[1:] == ["-version"]:
    print(VERSION)
elif sys.argv[1:2] == ["-upgrade"]:
    http.server.HTTPServer(address("-upgrade-bind"), Temporary).serve_forever()

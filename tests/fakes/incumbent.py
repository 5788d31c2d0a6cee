# A foreign incumbent: it knows the plain protocol, and nothing of this project.
# Usage: incumbent.py BIND UPGRADE-BIND PROGRAM; it upgrades at once, then ends.
# VERSION and MODE stand above: "stops first", "asks first" or "dies".
import http.client
import http.server
import socket
import subprocess
import sys
import threading
import time


class Service(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"the old one")


def address(text):
    host, _, port = text.rpartition(":")
    return host, int(port)


def wait_until_it_listens(target):
    while True:
        try:
            return socket.create_connection(target).close()
        except ConnectionRefusedError:
            time.sleep(0.01)  # the plain protocol has no announcement: a stranger can only look again


bind, upgrade_bind, program = sys.argv[1:]
server = http.server.HTTPServer(address(bind), Service)
threading.Thread(target=server.serve_forever, daemon=True).start()
subprocess.Popen([program, "-upgrade", "true", "-upgrade-bind", upgrade_bind, "-bind", bind])
wait_until_it_listens(address(upgrade_bind))
if MODE == "dies":
    sys.exit()


def stop():
    server.shutdown()
    server.server_close()


if MODE == "stops first":
    stop()
else:
    threading.Timer(0.3, stop).start()
connection = http.client.HTTPConnection(*address(upgrade_bind))
connection.request("GET", "/replace")
print(connection.getresponse().status, flush=True)

"""`http.server` as it comes, with the same answer: the service that anybody would write first.

Run as a program, with a port.
"""

from __future__ import annotations

import http.server
import sys

with open("version", "rb") as _file:  # noqa: PTH123 - its start is measured, so it imports what it needs alone
    _BODY = b'{"version": "%s"}' % _file.read()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # or no connection would be kept

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(_BODY)))
        self.end_headers()
        self.wfile.write(_BODY)


if __name__ == "__main__":
    http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), _Handler).serve_forever()

"""Programs that run on a machine in these tests, as texts for its Python."""

from __future__ import annotations

from typing import Final

WEB: Final = """
import http.server, socket, sys
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"the page")
    def log_message(self, *_): pass
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
Server((sys.argv[1], int(sys.argv[2])), Page).serve_forever()
"""
"""ADDRESS PORT: a web server of one page."""

ECHO_DATAGRAMS: Final = """
import socket, sys
s = socket.socket(type=socket.SOCK_DGRAM)
s.bind(("127.0.0.1", int(sys.argv[1])))
while True: s.sendto(*s.recvfrom(65536))
"""
"""PORT: says every datagram back."""

ECHO: Final = """
import socket, sys, threading
def serve(peer):
    with peer:
        while data := peer.recv(65536): peer.sendall(data)
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
while True: threading.Thread(target=serve, args=listener.accept()[:1], daemon=True).start()
"""
"""PORT: says everything back."""

DOCKER: Final = """
import http.server, os, socket, sys
class Docker(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = b"OK" if self.path.endswith("/_ping") else b'{"Version": "made up"}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    do_HEAD = do_GET
    def address_string(self): return "unix"
    def log_message(self, *_): pass
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_UNIX
    def server_bind(self):
        self.socket.bind(self.server_address)
        os.chmod(self.server_address, int(sys.argv[2], 8))
        self.server_name, self.server_port = "unix", 0
    def get_request(self): return self.socket.accept()[0], ("unix", 0)
Server(sys.argv[1], Docker).serve_forever()
"""
"""SOCKET MODE: answers what Docker is asked for to see that it is there."""

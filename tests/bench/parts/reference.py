"""References for the benches, as processes of their own.

usage: reference.py hello [CERT KEY]          a bare http.server that says hello, keep-alive, TCP_NODELAY; prints its port
       reference.py sink CERT KEY FOLDER      takes files over a plain TLS socket: sha256 and onto the disk (0, 1, ...), fsynced; prints its port
"""
import hashlib
import itertools
import os
import socket
import ssl
import struct
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from socketserver import ThreadingMixIn

CHUNK = 256 << 10


class Hello(BaseHTTPRequestHandler):
    """As http.server is, apart from TCP_NODELAY (without it: 23 answers a second)."""
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "12")
        self.end_headers()
        self.wfile.write(b'{"hello": 1}')

    do_POST = do_GET

    def log_message(self, *words):
        pass


class Server(ThreadingMixIn, HTTPServer):
    daemon_threads, request_queue_size = True, 128


def hello(cert="", key=""):
    server = Server(("127.0.0.1", 0), Hello)
    if cert:
        server.socket = tls(cert, key).wrap_socket(server.socket, server_side=True)
    print(server.server_address[1], flush=True)
    server.serve_forever()


def tls(cert, key):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return context


def sink(cert, key, folder):
    """A connection: 8 bytes of length, then the file; answered with its sha256 when it is on the disk."""
    context, listener = tls(cert, key), socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(4)
    print(listener.getsockname()[1], flush=True)
    for number in itertools.count():
        sock = listener.accept()[0]
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock = context.wrap_socket(sock, server_side=True)
        left, digest, view = struct.unpack(">Q", sock.recv(8))[0], hashlib.sha256(), memoryview(bytearray(CHUNK))
        path = os.path.join(folder, "%d" % number)
        with open(path, "wb", buffering=0) as out:
            while left:
                count = sock.recv_into(view[:min(CHUNK, left)])
                if not count:
                    break
                out.write(view[:count])
                digest.update(view[:count])
                left -= count
            os.fsync(out.fileno())
        sock.sendall(digest.digest())
        sock.close()


if __name__ == "__main__":
    {"hello": hello, "sink": sink}[sys.argv[1]](*sys.argv[2:])

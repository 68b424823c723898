"""A judge's server on this machine."""

import json
import os
import re
import signal
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from ranks import everywhere

import core
import eval as script
from lab.compare import judge


class Server(ThreadingHTTPServer):
    """Answers by `answer(text)`, after `fault(number, handler)` if that returns True: it has seen to it."""

    daemon_threads = True

    def __init__(self, answer, fault=lambda number, handler: False, port=0, delay=0.0):
        super().__init__(("127.0.0.1", port), Handler)
        self.answer, self.fault, self.delay = answer, fault, delay
        self.lock, self.over = threading.Lock(), threading.Event()
        self.bodies, self.headers, self.times = [], [], []
        self.asked, self.replied, self.now, self.most = Counter(), Counter(), 0, 0
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self):
        self.over.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *args):
        pass  # a judge that gave up closes its end


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.text = body["messages"][0]["content"]
        with server.lock:
            server.bodies.append(body)
            server.headers.append(dict(self.headers))
            server.times.append(time.monotonic())
            server.asked[self.text] += 1
            self.nth, number = server.asked[self.text], len(server.bodies)
        if server.fault(number, self):
            return
        with server.lock:
            server.now += 1
            server.most = max(server.most, server.now)
        server.over.wait(server.delay)
        with server.lock:  # counted before it is sent: who has the reply may look
            server.now -= 1
            server.replied[self.text] += self.path == "/v1/chat/completions"
        self.send(200, json.dumps({"choices": [{"message": {"content": server.answer(self.text)}}]}))

    def send(self, status, body, reason=None, size=None, **headers):
        self.send_response(status, reason)
        for name, value in {"Content-Length": size or len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body.encode())
        return True

    def raw(self, reply, pause=0.0):
        self.close_connection = True
        for i in range(len(reply)) if pause else [slice(None)]:
            self.wfile.write(reply[i : i + 1] if pause else reply)
            self.server.over.wait(pause)
        return True

    def reset(self):
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())
        self.close_connection = True
        return True

    def hang(self):
        return self.server.over.wait(60)

    def log_message(self, *args):
        pass


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """Starts servers; a cache of this test's own, quick further attempts, no key."""
    monkeypatch.setenv("TOKEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    everywhere(monkeypatch.setattr, judge, "BACK_OFF", 0.01)
    servers, handlers = [], {number: signal.getsignal(number) for number in (2, 1, 15)}

    def start(answer=grade, *args, **options):
        servers.append(Server(answer, *args, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
    for number, handler in handlers.items():  # main() has set its own
        signal.signal(number, handler)


def grade(text):
    return re.search(r"answer (\d+)", text)[1]


def row(number=0, **changes):
    texts = {"instruction": f"Name thing {number}.", "input": "", "output": f"reference {number}"}
    return texts | {"model_response": f"answer {number}"} | changes


def judge_of(server, key=None, model="m", **patience):
    return judge.Judge(server.url, model, key, **patience)


def in_process(*argv):
    """eval.py as it is typed; its exit code."""
    try:
        cfg = core.parse_config(script.Config, {}, {}, "", ["--mode", "judge", *map(str, argv)])
        with core.distributed(cfg.backend) as world:
            script.main(cfg, world)
    except SystemExit as end:
        return end.code
    return 0


def write(some, name="responses.json"):
    core.write_json(Path(name), some)
    return name

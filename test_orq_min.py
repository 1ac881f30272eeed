"""Tests of orq_min.py, and a stand-in of the service that they run against.

    python3 -m unittest                         run the tests
    python3 test_orq_min.py serve [PORT]        run the stand-in, to play with
    python3 test_orq_min.py demo ["text"]       run the command line against it
    python3 test_orq_min.py bench               measure, side by side with others

Nothing but the standard library is needed, and no network but loopback.
"""

import asyncio
import base64
import binascii
import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import datetime
import decimal
import email.utils
import enum
import functools
import gc
import gzip
import http.client
import http.server
import inspect
import io
import itertools
import json
import logging
import os
import pathlib
import pickle
import pydoc
import random
import re
import select
import shlex
import shutil
import signal
import socket
import socketserver
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import types
import unittest
import urllib.parse
import urllib.request
import uuid
import warnings
import zipfile
import zlib
from typing import List, NamedTuple, Tuple
from unittest import mock

import orq_min

MODULE = os.path.abspath(orq_min.__file__)

# ----------------------------------------------------------------------------
# The stand-in of the service
# ----------------------------------------------------------------------------


class Recorded(
    NamedTuple(
        "Recorded",
        [
            ("method", str),
            ("path", str),
            ("headers", List[Tuple[str, str]]),
            ("body", bytes),
        ],
    )
):
    """A request as it came."""

    def json(self):
        return json.loads(self.body.decode("utf-8"))

    def header(self, name):
        """The values sent under this name, in any case."""
        return [value for key, value in self.headers if key.lower() == name.lower()]


class Refusal(Exception):
    """What the service answers in place of a run."""

    def __init__(self, status, body):
        super().__init__(status, body)
        self.status, self.body = status, body


# The request tables of the contract: a field whose name ends in "!" is required.
ANY = object
NAMED_FILE = {"mimeType": str, "name": str}
PARTS = {
    "text": {"kind!": str, "text!": str},
    "file": {"kind!": str, "file!": "file", "metadata": dict},
    "tool_result": {
        "kind!": str,
        "tool_call_id!": str,
        "result": ANY,
        "metadata": dict,
    },
}
BODY = {
    "message!": {"role!": ("user", "tool"), "parts!": ["part"], "messageId": str},
    "task_id": str,
    "variables": dict,
    "contact": {
        "id!": str,
        "display_name": str,
        "email": str,
        "logo_url": str,
        "metadata": [dict],
        "tags": [str],
    },
    "thread": {"id!": str, "tags": [str]},
    "memory": {"entity_id!": str},
    "metadata": dict,
    "background": bool,
    # fields that the service has and the client under test does not know
    "identity": {"id!": str},
    "engine": str,
    "conversation": dict,
}


def wrong_fields(shape, value, path):
    """What is wrong with a value, one text for each thing."""
    if shape == "part":
        kind = value.get("kind") if isinstance(value, dict) else None
        if not isinstance(kind, str) or kind not in PARTS:
            return ["%s.kind is not one of %s" % (path, ", ".join(PARTS))]
        return wrong_fields(PARTS[kind], value, path)
    if shape == "file":
        if not isinstance(value, dict) or ("bytes" in value) == ("uri" in value):
            return ["%s has not exactly one of bytes and uri" % path]
        one = {"bytes!": "base64"} if "bytes" in value else {"uri!": str}
        return wrong_fields(dict(NAMED_FILE, **one), value, path)
    if shape == "base64":
        try:
            good = bool(base64.b64decode(value, validate=True))
        except (TypeError, ValueError, binascii.Error):
            good = False
        return [] if good else ["%s is not base64 text" % path]
    if isinstance(shape, tuple):
        return [] if value in shape else ["%s is not one of %s" % (path, shape)]
    if isinstance(shape, list):
        if not isinstance(value, list):
            return ["%s is not an array" % path]
        found = [
            wrong_fields(shape[0], item, "%s[%d]" % (path, index))
            for index, item in enumerate(value)
        ]
        return sum(found, [])
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return ["%s is not an object" % path]
        fields = {name.rstrip("!"): inner for name, inner in shape.items()}
        wrong = ["%s.%s is unknown" % (path, name) for name in set(value) - set(fields)]
        for name, inner in fields.items():
            if name in value:
                wrong += wrong_fields(inner, value[name], "%s.%s" % (path, name))
            elif name + "!" in shape:
                wrong.append("%s.%s is missing" % (path, name))
        return wrong
    return [] if isinstance(value, shape) else ["%s is of a wrong type" % path]


class Task:
    """A run of an agent, which can be continued."""

    def __init__(self, agent):
        self.agent = agent
        self.active = False
        self.pending = {}  # call id -> (name, arguments)


class StandIn(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """The service, as far as the contract goes, on loopback.

        with StandIn() as service:
            ...

    It answers at any path prefix. `requests` is what came, `connections` counts the
    TCP connections, and `next` has it misbehave. `tls` is the server's SSLContext.
    """

    daemon_threads = True
    block_on_close = False  # __exit__ joins them, once their sockets are shut down
    request_queue_size = 256
    background_seconds = 0.3

    def __init__(self, key="test-key-123", agents=("my-agent",), port=0, tls=None):
        self.key = key
        self.agents = {"task-agent", *agents}
        self.requests = []
        self.connections = 0
        self.tasks = {}
        self._tls = tls
        self._steps = collections.deque()
        self._lock = threading.Lock()
        self._count = 0
        self._open = set()
        self._workers = []
        self._closing = threading.Event()
        super().__init__(("127.0.0.1", port), Handler)
        scheme = "https" if tls else "http"
        self.url = "%s://127.0.0.1:%d" % (scheme, self.server_address[1])

    def open_connections(self):
        return len(self._open)

    def next(self, *steps):
        """How to treat the next requests, one step each, before it behaves again.

        A step is dict(status=200, headers={}, body=bytes, text or what JSON has,
        delay=seconds), or a function that is given the request's handler, after the
        request was read, and does what it likes with its `wfile`, `connection` and
        `close_connection`. A dict without `status` and `body` only delays.
        """
        self._steps.extend(steps)

    def __enter__(self):
        self._start(self.serve_forever, 0.02)
        return self

    def __exit__(self, *exception):
        self._closing.set()
        self.shutdown()
        self.server_close()
        with self._lock:
            sockets, threads = list(self._open), list(self._workers)
        for sock in sockets:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        for thread in threads:
            thread.join(5)

    def _start(self, work, *arguments):
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        with self._lock:
            self._workers = [t for t in self._workers if t.is_alive()] + [thread]
            thread.start()

    # What socketserver calls

    def server_bind(self):
        socketserver.TCPServer.server_bind(self)  # HTTPServer's looks up the name
        self.server_name, self.server_port = self.server_address[:2]

    def get_request(self):
        sock, address = super().get_request()
        self.connections += 1
        if self._tls:  # the handshake is left to the thread that reads first
            try:
                sock = self._tls.wrap_socket(
                    sock, server_side=True, do_handshake_on_connect=False
                )
            except OSError:
                sock.close()
                raise
        return sock, address

    def process_request(self, request, client_address):
        with self._lock:
            self._open.add(request)
        self._start(self.process_request_thread, request, client_address)

    def shutdown_request(self, request):
        with self._lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):  # clients may hang up
            super().handle_error(request, client_address)

    # What the handler calls

    def take_step(self):
        return self._steps.popleft() if self._steps else None

    def wait(self, seconds):
        """Sleep, though not past the end of the server."""
        self._closing.wait(seconds)

    def answer(self, recorded):
        """(status, JSON body) for a request."""
        try:
            return 200, self._run(recorded)
        except Refusal as refusal:
            return refusal.status, refusal.body

    def _new_id(self):
        with self._lock:
            self._count += 1
            return "01K6STANDIN%015d" % self._count

    def _run(self, recorded):
        match = re.fullmatch(r".*/v2/agents/([^/?#]+)/responses", recorded.path)
        if not match:
            raise Refusal(404, {"message": "no such operation"})
        if recorded.method != "POST":
            raise Refusal(405, {"message": "method not allowed"})
        key = self.key if self.key.lower().startswith("bearer ") else None
        if recorded.header("authorization") != [key or "Bearer " + self.key]:
            raise Refusal(401, {"error": "invalid API key"})
        agent = urllib.parse.unquote(match.group(1))
        if agent not in self.agents:
            raise Refusal(404, {"code": 404, "message": "no agent %r" % agent})
        body = self._read_body(recorded)
        message, background = body["message"], body.get("background", False)
        with self._lock:
            task = self.tasks.get(body["task_id"]) if "task_id" in body else Task(agent)
            if task is None:
                raise Refusal(404, {"code": 404, "message": "no such task"})
            if task.active:
                raise Refusal(409, {"error": {"message": "the task is active"}})
            results = self._take_results(task, message)
            task.active = background
        task_id = body.get("task_id") or self._new_id()
        self.tasks[task_id] = task
        answer = {"_id": self._new_id(), "task_id": task_id}
        answer["created_at"] = "2025-11-20T09:30:00.000Z"
        answer["model"] = "openai/gpt-4o"
        said = self._speak(task, body, results)
        if background:
            self._start(self._finish, task)
            return answer
        answer.update(said)
        return self._as_task(agent, answer) if agent == "task-agent" else answer

    def _finish(self, task):
        self.wait(self.background_seconds)
        task.active = False

    def _read_body(self, recorded):
        def refuse(constant):
            raise ValueError(constant)

        if recorded.header("content-type") != ["application/json"]:
            raise Refusal(415, {"message": "the body must be application/json"})
        try:
            text = recorded.body.decode("utf-8")
            body = json.loads(text, parse_constant=refuse)
        except ValueError:
            raise Refusal(400, {"message": "the body is not JSON"})
        wrong = wrong_fields(BODY, body, "body")
        if wrong:
            raise Refusal(422, {"code": 422, "message": "; ".join(sorted(wrong))})
        return body

    @staticmethod
    def _take_results(task, message):
        """The results of a tool message; they must be those that are waited for."""
        results = {}
        for part in message["parts"]:
            if (part["kind"] == "tool_result") != (message["role"] == "tool"):
                raise Refusal(422, {"message": "role and parts do not go together"})
            if part["kind"] == "tool_result":
                results[part["tool_call_id"]] = part.get("result")
        if message["role"] == "tool" and set(results) != set(task.pending):
            raise Refusal(422, {"message": "these tool calls do not wait"})
        task.pending = {}
        return results

    def _speak(self, task, body, results):
        """The agent's turn."""
        text, seen = "", []
        for part in body["message"]["parts"]:
            text += part.get("text", "")
            if part["kind"] == "file":
                seen.append("file: %s" % self._describe(part["file"]))
        for name, value in body.get("variables", {}).items():
            shown = value if isinstance(value, str) else json.dumps(value)
            seen.append("%s: %s" % (name, shown))
        output, calls = [], []
        if results:
            said = "The tool says: %s" % ", ".join(map(json.dumps, results.values()))
        elif "weather" in text:
            call_id = "call_" + self._new_id()
            task.pending[call_id] = "get_weather"
            calls.append(
                {
                    "id": call_id,
                    "type": "function",
                    "function": {
                        "name": "get_weather",
                        "arguments": '{"city": "Paris"}',
                    },
                }
            )
            said = "Let me look that up."
            call = {"kind": "tool_call", "tool_name": "get_weather"}
            call.update(tool_call_id=call_id, arguments={"city": "Paris"})
            output.append(self._message([call]))
        else:
            said = "You said: %s" % text if text else "You said nothing."
        said = " ".join([said, *("[%s]" % item for item in seen)])
        output.append(self._message([{"kind": "text", "text": said}]))
        counts = len(text.split()), len(said.split())
        return {
            "output": output,
            "usage": {
                "prompt_tokens": counts[0],
                "completion_tokens": counts[1],
                "total_tokens": sum(counts),
                "prompt_tokens_details": {"cached_tokens": 0},
                "completion_tokens_details": None,
            },
            "finish_reason": "function_call" if calls else "stop",
            "telemetry": {"trace_id": self._new_id(), "span_id": self._new_id()},
            **({"pending_tool_calls": calls} if calls else {}),
        }

    @staticmethod
    def _describe(file):
        shown = [file.get("name"), file.get("mimeType"), file.get("uri")]
        if "bytes" in file:
            shown.append("%d bytes" % len(base64.b64decode(file["bytes"])))
        return ", ".join(filter(None, shown))

    def _message(self, parts):
        return {"messageId": self._new_id(), "role": "agent", "parts": parts}

    @staticmethod
    def _as_task(agent, answer):
        """The other shape that the service's guides show."""
        parts = answer["output"][-1]["parts"]
        return {
            "id": answer["task_id"],
            "contextId": "0ae1c2d3-0000-4000-8000-000000000000",
            "kind": "task",
            "status": {
                "state": "completed",
                "timestamp": answer["created_at"],
                "message": {"role": "agent", "parts": parts},
            },
            "output": [{"parts": parts}],
            "metadata": {"orq_agent_key": agent},
        }


class Handler(http.server.BaseHTTPRequestHandler):
    """Reads requests of one connection, and answers as its StandIn says."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one packet, as the service sends it
    disable_nagle_algorithm = True

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        recorded = Recorded(self.command, self.path, self.headers.items(), body)
        self.server.requests.append(recorded)
        step = self.server.take_step()
        if callable(step):
            step(self)
            if getattr(self.connection, "_closed", False):  # by the step
                self.close_connection = True
            return
        step = step or {}
        if step.get("delay"):
            self.server.wait(step["delay"])
        if "status" in step or "body" in step:
            self.send(**{k: v for k, v in step.items() if k != "delay"})
        else:
            self.send(*self.server.answer(recorded))

    do_GET = do_HEAD = do_PUT = do_PATCH = do_DELETE = do_POST

    def send(self, status=200, body=b"", headers=None):
        """A whole answer; bytes and text are sent as they are, the rest as JSON."""
        if not isinstance(body, (bytes, str)):
            body = json.dumps(body)
        data = body if isinstance(body, bytes) else body.encode("utf-8")
        given = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        given.update(headers or {})
        self.send_response(status)
        for name, value in given.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def handle(self):
        with contextlib.suppress(ConnectionError, socket.timeout):
            super().handle()

    def finish(self):
        with contextlib.suppress(OSError, ValueError):
            super().finish()
        self.rfile.close()

    def log_message(self, format, *args):
        pass


def reset(handler):
    """A step that breaks the connection off with a reset."""
    linger = struct.pack("ii", 1, 0)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    handler.connection.close()


def hang_up(handler):
    """A step that closes the connection without an answer."""
    handler.close_connection = True


# ----------------------------------------------------------------------------
# Helpers of the tests
# ----------------------------------------------------------------------------


def clean_environment(**more):
    """This process's environment without what would disturb a test, and `more`."""
    disturbing = re.compile("(ORQ|SSL_CERT|PYTHON|LC)_?.*|LANG.*|.*_proxy", re.I)
    kept = {k: v for k, v in os.environ.items() if not disturbing.fullmatch(k)}
    return dict(kept, **more)


def run(*argv, stdin=None, env=None, timeout=30):
    """Run the module as a command; stdout and stderr are bytes."""
    given = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
    return subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", MODULE, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=clean_environment(**(env or {})),
        timeout=timeout,
        **given,
    )


def client(service, **options):
    """A client of the stand-in."""
    given = dict({"api_key": service.key, "server_url": service.url}, **options)
    return orq_min.Orq(**given)


class LoopbackTest(unittest.TestCase):
    """Has a stand-in, `service`, and a client of it, `orq`."""

    maxDiff = None

    def setUp(self):
        environment = mock.patch.dict(os.environ, clean_environment(), clear=True)
        environment.start()
        self.addCleanup(environment.stop)
        self.service = StandIn()
        self.service.__enter__()
        self.addCleanup(self.service.__exit__)
        self.orq = client(self.service)
        self.addCleanup(self.orq.close)

    def create(self, **given):
        given = dict({"agent_key": "my-agent", "message": "hi"}, **given)
        return self.orq.agents.responses.create(**given)


# ----------------------------------------------------------------------------
# Helpers of the tests of the network
# ----------------------------------------------------------------------------

# An authority of our own, a leaf for localhost, 127.0.0.1 and ::1, and one for
# another host; both leaves have the same key. They are good for nothing else.
AUTHORITY = """\
-----BEGIN CERTIFICATE-----
MIIBYjCCAQmgAwIBAgIBATAKBggqhkjOPQQDAjAYMRYwFAYDVQQDDA1vcnFfbWlu
IHRlc3RzMCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAYMRYwFAYD
VQQDDA1vcnFfbWluIHRlc3RzMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEqPWm
3MdCluhhr6TzEVvEHIu6Rj6PL9UUc7Ke6XYvXp8UXoD+K6fYEqZQWIiP94lTpCfG
ZJ5h5xBUC7dfGR54WaNCMEAwDwYDVR0TAQH/BAUwAwEB/zAOBgNVHQ8BAf8EBAMC
AQYwHQYDVR0OBBYEFJqroGArAAHpWqdt6ztK0RiIjuixMAoGCCqGSM49BAMCA0cA
MEQCIFr+Tf7VdAaZSrN49js1TFSg31Kuc6jvfZ3JtB7JAigyAiB+dr5K3EH/ZZqH
N+dibyDdOHCXAZF7giNYXoWxbfab5A==
-----END CERTIFICATE-----
"""
LEAF_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgmSqOfN40b0Hz4NL3
113oYwNaW3IfrncSgLOgD1OkNimhRANCAAQfxdZSlOs+5sks72Or+QRsbrYDWCwi
UPLZKo5eGC1+Eu3KYHLUir06iu/rWZWsg7SzC/qyP/fJDo3mfCGIm9IX
-----END PRIVATE KEY-----
"""
LEAF = """\
-----BEGIN CERTIFICATE-----
MIIBwjCCAWigAwIBAgIBAjAKBggqhkjOPQQDAjAYMRYwFAYDVQQDDA1vcnFfbWlu
IHRlc3RzMCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAUMRIwEAYD
VQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAQfxdZSlOs+
5sks72Or+QRsbrYDWCwiUPLZKo5eGC1+Eu3KYHLUir06iu/rWZWsg7SzC/qyP/fJ
Do3mfCGIm9IXo4GkMIGhMAwGA1UdEwEB/wQCMAAwDgYDVR0PAQH/BAQDAgeAMBMG
A1UdJQQMMAoGCCsGAQUFBwMBMB8GA1UdIwQYMBaAFJqroGArAAHpWqdt6ztK0RiI
juixMB0GA1UdDgQWBBS37llKUTwnFiuTJTgwsX6a7FmfFjAsBgNVHREEJTAjggls
b2NhbGhvc3SHBH8AAAGHEAAAAAAAAAAAAAAAAAAAAAEwCgYIKoZIzj0EAwIDSAAw
RQIhAJfmiWamj+bmfHSyiOMuJS6VKVp25/iJilRn5+pvbu5mAiBf++gG+wbGkW6x
iee1Nia+yaRKlwjpVVgOsXt5TqwSfg==
-----END CERTIFICATE-----
"""
ELSEWHERE = """\
-----BEGIN CERTIFICATE-----
MIIBsjCCAVigAwIBAgIBAzAKBggqhkjOPQQDAjAYMRYwFAYDVQQDDA1vcnFfbWlu
IHRlc3RzMCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAUMRIwEAYD
VQQDDAllbHNld2hlcmUwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAQfxdZSlOs+
5sks72Or+QRsbrYDWCwiUPLZKo5eGC1+Eu3KYHLUir06iu/rWZWsg7SzC/qyP/fJ
Do3mfCGIm9IXo4GUMIGRMAwGA1UdEwEB/wQCMAAwDgYDVR0PAQH/BAQDAgeAMBMG
A1UdJQQMMAoGCCsGAQUFBwMBMB8GA1UdIwQYMBaAFJqroGArAAHpWqdt6ztK0RiI
juixMB0GA1UdDgQWBBS37llKUTwnFiuTJTgwsX6a7FmfFjAcBgNVHREEFTATghFl
bHNld2hlcmUuaW52YWxpZDAKBggqhkjOPQQDAgNIADBFAiAvxPEqUPzPmnFGfTJf
b5WeLeIGfTc8VVDSVOeMLrnjOgIhAPVkPGOy6w9e74hcCrZPXoIU6FvwHBCIqw5m
Tv0TnmTl
-----END CERTIFICATE-----
"""


def server_context(certificate=LEAF):
    """The TLS side of a server; a context loads certificates from files alone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with temporary_file(certificate + LEAF_KEY) as path:
        context.load_cert_chain(path)
    return context


@contextlib.contextmanager
def temporary_file(text, suffix=".pem"):
    handle, path = tempfile.mkstemp(suffix)
    try:
        with open(handle, "w") as stream:
            stream.write(text)
        yield path
    finally:
        os.remove(path)


def trusting_context():
    return ssl.create_default_context(cadata=AUTHORITY)


def until(true, seconds=5):
    """Wait until `true()`; return what it said last."""
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.005)
    return true()


class Peer:
    """A connection that a Wire accepted."""

    def __init__(self, wire, sock, number):
        self.wire, self.sock, self.number = wire, sock, number
        self.file = None
        self.request = None  # as it came last

    def send(self, *pieces, pause=0.0):
        for piece in pieces:
            self.sock.sendall(piece)
            if pause:
                self.wire.closing.wait(pause)

    def drip(self, data, seconds=10.0):
        """A byte at a time, for as long as the other side listens."""
        end = time.monotonic() + seconds
        for byte in data:
            if time.monotonic() > end or self.wire.closing.is_set():
                break
            self.send(bytes([byte]), pause=0.02)

    def pause(self, seconds):
        self.wire.closing.wait(seconds)

    def hang(self, seconds=10.0):
        """Say nothing, for as long as the other side waits."""
        self.sock.settimeout(seconds)
        while self.sock.recv(65536):
            pass
        raise ConnectionAbortedError("the client has gone")

    def close(self, reset=False):
        if reset:
            linger = struct.pack("ii", 1, 0)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        else:  # Python forgets the descriptor before it closes it
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self.sock, socket.SHUT_WR)
        if self.file:
            self.file.close()
        self.sock.close()

    def read_head(self):
        """Method, path and headers of the next request; None at the end."""
        self.file = self.file or self.sock.makefile("rb")
        first = self.file.readline()
        if not first.endswith(b"\r\n"):
            return None
        method, path, _ = first.decode("latin-1").split(" ")
        headers = []
        for line in iter(self.file.readline, b"\r\n"):
            if not line:
                return None
            name, _, value = line.decode("latin-1").partition(":")
            headers.append((name, value.strip()))
        return Recorded(method, path, headers, b"")

    def read_request(self):
        head = self.read_head()
        if head is None or self.wire.early:
            return head
        length = int((head.header("content-length") or ["0"])[0])
        body = self.file.read(length)
        return head._replace(body=body) if len(body) == length else None


class Wire:
    """A server of which a test decides each byte.

        with Wire(step, step) as wire:
            ...

    A step treats one request, whichever connection it comes on; bytes are sent as
    they are, a function is given the Peer. The last step is used for all that follow.
    `greet` is given each Peer before the first request, `early` has the steps run
    when a request's head has come. `requests` is what came, and `on` by which
    connection; `gone` are the connections that the client has closed.
    """

    def __init__(self, *steps, tls=None, greet=None, early=False, host="127.0.0.1"):
        self.steps, self.tls, self.greet, self.early = list(steps), tls, greet, early
        self.requests, self.on, self.peers, self.gone = [], [], [], []
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self.threads = []
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        self._listener.bind((host, 0))
        self._listener.listen(256)
        self.port = self._listener.getsockname()[1]
        shown = "[%s]" % host if ":" in host else host
        self.netloc = "%s:%d" % (shown, self.port)
        self.url = "%s://%s" % ("https" if tls else "http", self.netloc)

    def __enter__(self):
        self._start(self._accept)
        return self

    def __exit__(self, *exception):
        self.closing.set()
        with socket.socket(self._listener.family, socket.SOCK_STREAM) as waker:
            waker.connect(self._listener.getsockname())
        self.threads[0].join(5)
        self._listener.close()
        for peer in self.peers:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(peer.sock, socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(5)

    def _start(self, work, *arguments):
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self.threads.append(thread)
        thread.start()

    def _accept(self):
        while True:
            sock, _ = self._listener.accept()
            if self.closing.is_set():
                return sock.close()
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer = Peer(self, sock, len(self.peers))
            self.peers.append(peer)
            self._start(self._serve, peer)

    def _serve(self, peer):
        try:
            if self.tls:
                peer.sock = self.tls.wrap_socket(peer.sock, server_side=True)
            if self.greet:
                self.greet(peer)
            while peer.sock.fileno() >= 0 and not self.closing.is_set():
                if not self._serve_one(peer):
                    break
        except OSError:
            self.gone.append(peer.number)
        finally:
            peer.close()

    def _serve_one(self, peer):
        peer.request = peer.read_request()
        if peer.request is None:
            self.gone.append(peer.number)
            return False
        with self._lock:
            self.requests.append(peer.request)
            self.on.append(peer.number)
            step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        peer.send(step) if isinstance(step, bytes) else step(peer)
        return True


def head(status, *headers):
    return "\r\n".join(["HTTP/1.1 " + status, *headers, "", ""]).encode("latin-1")


def saying(text):
    """The body of an answer."""
    parts = [{"kind": "text", "text": text}]
    output = [{"role": "agent", "parts": parts}]
    return json.dumps({"task_id": "t1", "output": output}).encode()


def reply(body=b"", status="200 OK", *headers):
    """A well-formed answer; a text is what the agent says."""
    body = saying(body) if isinstance(body, str) else body
    return head(status, *headers, "Content-Length: %d" % len(body)) + body


def chunked(body, *headers, status="200 OK", size=1000):
    blocks = [body[i : i + size] for i in range(0, len(body), size)] + [b""]
    chunks = [b"%x\r\n%s\r\n" % (len(block), block) for block in blocks]
    return head(status, "Transfer-Encoding: chunked", *headers) + b"".join(chunks)


def then_close(data):
    """A step that sends this and closes the connection."""

    def step(peer):
        peer.send(data)
        peer.close()

    return step


def break_off(peer):
    peer.close(reset=True)


def repeat_text(peer):
    """A step that answers what was said."""
    said = peer.request.json()["message"]["parts"][0]["text"]
    peer.send(reply(said))


@contextlib.contextmanager
def full_backlog():
    """An address that lets nobody in, and refuses nobody."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(8):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            with contextlib.suppress(OSError):
                waiting.connect(full.getsockname())
        yield full.getsockname()


class Proxy(Wire):
    """A real proxy, which tunnels CONNECT and forwards absolute URLs.

    `requests` is what it was asked, `passed` the bytes that went through, and
    `credentials` what it wants, such as "user:password"; `refusal` is an answer to
    all.
    """

    greeting = head("200 Go Ahead")

    def __init__(self, credentials="", refusal=b"", greeting=greeting):
        super().__init__(self.forward)
        self.credentials, self.refusal = credentials, refusal
        self.greeting = greeting
        self.passed = bytearray()

    def forward(self, peer):
        wanted = "Basic " + base64.b64encode(self.credentials.encode()).decode()
        given = peer.request.header("proxy-authorization")
        if self.refusal:
            return peer.send(self.refusal)
        if self.credentials and given != [wanted]:
            return peer.send(reply(b"", "407 Who Are You"))
        if peer.request.method == "CONNECT":
            self.tunnel(peer)
        else:
            self.pass_on(peer)

    def tunnel(self, peer):
        target = urllib.parse.urlsplit("//" + peer.request.path)
        with socket.create_connection((target.hostname, target.port)) as server:
            peer.send(self.greeting)
            back = threading.Thread(target=self.pump, args=(server, peer.sock))
            back.start()
            self.pump(peer.sock, server)
            back.join()
        peer.close()

    def pass_on(self, peer):
        target = urllib.parse.urlsplit(peer.request.path)
        lines = ["%s %s HTTP/1.1" % (peer.request.method, target.path)]
        for name, value in peer.request.headers:
            if name.lower() != "proxy-authorization":
                lines.append("%s: %s" % (name, value))
        data = "\r\n".join([*lines, "", ""]).encode("latin-1") + peer.request.body
        with socket.create_connection((target.hostname, target.port)) as server:
            server.sendall(data)
            with http.client.HTTPResponse(server) as answer:
                answer.begin()
                peer.send(reply(answer.read(), "%d X" % answer.status))

    def pump(self, source, sink):
        with contextlib.suppress(OSError):
            for block in iter(lambda: source.recv(65536), b""):
                self.passed += block
                sink.sendall(block)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)


class WireTest(unittest.TestCase):
    """Starts Wires, and clients of them that try once."""

    maxDiff = None

    def setUp(self):
        environment = mock.patch.dict(os.environ, clean_environment(), clear=True)
        environment.start()
        self.addCleanup(environment.stop)

    def enter(self, resource):
        value = resource.__enter__()
        self.addCleanup(resource.__exit__, None, None, None)
        return value

    def wire(self, *steps, **options):
        return self.enter(Wire(*(steps or (repeat_text,)), **options))

    def client(self, server, **options):
        given = {"server_url": server.url, "timeout_ms": 10000, "retry_config": None}
        given.update(options)
        if server.url.startswith("https") and "ssl_context" not in options:
            given["ssl_context"] = trusting_context()
        return self.enter(orq_min.Orq("test-key-123", **given))

    def call(self, orq, text="hi", **given):
        given = dict({"agent_key": "my-agent", "message": text}, **given)
        return orq.agents.responses.create(**given).text

    def outcome(self, orq, text):
        try:
            return self.call(orq, text)
        except orq_min.OrqError as error:
            return error

    def failure(self, orq, kind=orq_min.OrqError, **given):
        with self.assertRaises(kind) as caught:
            self.call(orq, **given)
        return caught.exception


def script(code, *argv, **env):
    """Start a Python program, with `orq_min` to be imported."""
    start = "import signal, sys; sys.path.insert(0, %r)\n" % os.path.dirname(MODULE)
    if hasattr(signal, "default_int_handler"):  # a shell's `&` has it ignored
        start += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", start + textwrap.dedent(code), *argv],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=clean_environment(**env),
    )


# ----------------------------------------------------------------------------
# For a person to play with
# ----------------------------------------------------------------------------


def serve(argv):
    """`serve [PORT]`: run the stand-in until Ctrl-C."""
    if len(argv) > 1 or not all(re.fullmatch("[0-9]{1,5}", text) for text in argv):
        print("usage: serve [PORT]", file=sys.stderr)
        return 2
    try:
        service = StandIn(port=int(argv[0]) if argv else 0)
    except (OSError, OverflowError) as error:
        print("cannot listen on port %s: %s" % (argv[0], error), file=sys.stderr)
        return 1
    with service:
        print("export ORQ_BASE_URL=" + service.url)
        print("export ORQ_API_KEY=" + service.key)
        print('python3 %s my-agent "Hello"' % shlex.quote(os.path.relpath(MODULE)))
        print("(Ctrl-C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(60)
    return 0


def demo(argv):
    """`demo ["text"]`: run the command line against the stand-in, and show it all."""
    with StandIn() as service:
        command = [MODULE, "my-agent", *(argv or ["Hello"])]
        given = {"ORQ_BASE_URL": service.url, "ORQ_API_KEY": service.key}
        done = run(*command[1:], env=given)
    shown = ["%s=%s" % pair for pair in given.items()]
    shown += ["python3", os.path.relpath(MODULE), *map(shlex.quote, command[1:])]
    out = sys.stdout.buffer
    out.write(b"$ " + os.fsencode(" ".join(shown)) + b"\n" + done.stdout)
    if done.stderr:
        out.write(b"(on standard error:)\n" + done.stderr)
    out.write(b"(exit status %d)\n" % done.returncode)
    out.flush()
    return done.returncode


# ----------------------------------------------------------------------------
# The file
# ----------------------------------------------------------------------------

# How a test loads a copy of the file: (names of its copies, code that makes `m`)
WAYS_TO_LOAD = {
    "under another name": (["vendored.py"], "import vendored as m"),
    "inside a package": (["host/net/orq.py"], "from host.net import orq as m"),
    "from a zip": (["lib.zip"], "sys.path[0] += '/lib.zip'; import orq_min as m"),
    "from a read-only directory": (["orq_min.py"], "import orq_min as m"),
    "by importlib, without being registered": (
        ["plugin.py"],
        "import importlib.util as u\n"
        "spec = u.spec_from_file_location('plugin', sys.path[0] + '/plugin.py')\n"
        "m = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(m)\n"
        "assert 'plugin' not in sys.modules",
    ),
}

STATE = """
import logging, os, signal, socket, sys, threading, urllib.request, warnings
def state():
    logger = logging.getLogger("orq_min")
    return (
        urllib.request._opener, logging.root.handlers[:], logging.root.level,
        logger.handlers[:], logger.level, logger.propagate, logging.raiseExceptions,
        warnings.filters[:], socket.getdefaulttimeout(), sys.excepthook,
        [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)],
        threading.active_count(), dict(os.environ), sys.path[:],
        sys.getrecursionlimit(),
    )
"""


class OneFile(LoopbackTest):
    """It is one file that is copied anywhere, and importing it does nothing else."""

    def python(self, code, *argv, flags=("-I", "-S", "-B")):
        command = [sys.executable, *flags, "-W", "error", "-c", code, *argv]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        done = subprocess.run(command, env=clean_environment(), timeout=30, **pipes)
        self.assertEqual(done.stderr.decode(), "")
        return done.stdout.decode().strip()

    def test_importing_it_pulls_in_nothing_that_a_call_may_not_need(self):
        code = (
            "import sys; sys.path.insert(0, sys.argv[1])\n"
            "import urllib.request, json, dataclasses, typing, logging\n"
            "before = set(sys.modules); import orq_min\n"
            "print(*set(sys.modules) - before)"
        )
        pulled_in = self.python(code, os.path.dirname(MODULE)).split()
        self.assertIn("orq_min", pulled_in)
        late = "argparse asyncio base64 difflib mimetypes decimal uuid gzip shlex"
        self.assertEqual(set(late.split()) & set(pulled_in), set())

    def test_importing_it_prints_and_configures_nothing(self):
        code = (
            STATE
            + "sys.path.insert(0, sys.argv[1]); before = state(); import orq_min\n"
            "after = state()\n"
            "print([pair for pair in zip(before, after) if pair[0] != pair[1]])"
        )
        self.assertEqual(self.python(code, os.path.dirname(MODULE)), "[]")

    def test_it_works_wherever_it_is_copied_to(self):
        call = "\nprint(m.create_response('my-agent', 'hi', **eval(sys.argv[2])).text)"
        given = repr({"api_key": self.service.key, "server_url": self.service.url})
        for way, (names, load) in WAYS_TO_LOAD.items():
            with self.subTest(way), tempfile.TemporaryDirectory() as place:
                for name in names:
                    path = os.path.join(place, *name.split("/"))
                    os.makedirs(os.path.dirname(path), exist_ok=True)
                    if name.endswith(".zip"):
                        with zipfile.ZipFile(path, "w") as archive:
                            archive.write(MODULE, "orq_min.py")
                    else:
                        shutil.copy(MODULE, path)
                flags = ("-I", "-S", "-B")
                if "read-only" in way:
                    os.chmod(place, 0o555)
                    flags = ("-I", "-S")  # so that it tries to write a cache
                code = "import sys; sys.path.insert(0, sys.argv[1])\n" + load + call
                said = self.python(code, place, given, flags=flags)
                os.chmod(place, 0o755)
                self.assertEqual(said, "You said: hi")

    def test_it_works_without_docstrings(self):
        code = "import sys; sys.path.insert(0, sys.argv[1]); import orq_min\n"
        code += "print(orq_min.create_response('my-agent', 'hi', **eval(sys.argv[2])).text)"
        given = repr({"api_key": self.service.key, "server_url": self.service.url})
        flags = ("-I", "-S", "-B", "-OO")
        said = self.python(code, os.path.dirname(MODULE), given, flags=flags)
        self.assertEqual(said, "You said: hi")

    def test_it_names_its_licence_and_version_at_its_head(self):
        with open(MODULE, encoding="ascii") as file:
            head = [file.readline() for _ in range(2)]
        self.assertEqual(head[0], "# SPDX-License-Identifier: MIT-0\n")
        self.assertIn("orq_min.py %s" % orq_min.__version__, head[1])

    def test_the_repository_holds_the_promised_files_and_no_others(self):
        top = os.path.dirname(os.path.abspath(__file__))
        if not os.path.isdir(os.path.join(top, ".git")) or not shutil.which("git"):
            self.skipTest("not a git checkout")
        ask = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        done = subprocess.run(ask, cwd=top, stdout=subprocess.PIPE, check=True)
        promised = "orq_min.py test_orq_min.py README.md LICENSE .ci/run .gitignore"
        self.assertEqual(set(done.stdout.decode().split()), set(promised.split()))

    def test_help_says_what_every_parameter_and_field_is(self):
        self.assertIn("create_response", pydoc.plain(pydoc.render_doc(orq_min)))
        create = orq_min.Responses.create
        others = orq_min.Responses.create_async, orq_min.create_response
        for name in list(inspect.signature(create).parameters)[1:]:
            with self.subTest(parameter=name):
                self.assertRegex(inspect.getdoc(create), r"\b%s\b" % name)
                for function in others:
                    shown = pydoc.plain(pydoc.render_doc(function))
                    self.assertRegex(shown, r"\b%s\b" % name)
        for model in MODELS:
            for field in dataclasses.fields(getattr(orq_min, model)):
                with self.subTest(model=model, field=field.name):
                    shown = inspect.getdoc(getattr(orq_min, model))
                    self.assertRegex(shown, r"\b%s\b" % field.name)


# ----------------------------------------------------------------------------
# How programs use it
# ----------------------------------------------------------------------------

# The example of the service's documentation, with only its import changed
SEED_EXAMPLE = """
from orq_min import Orq
import os


with Orq(
    api_key=os.getenv("ORQ_API_KEY", ""),
) as orq:

    res = orq.agents.responses.create(agent_key="<value>", message={
        "role": "user",
        "parts": [],
    }, contact={
        "id": "contact_01ARZ3NDEKTSV4RRFFQ69G5FAV",
        "display_name": "Jane Doe",
        "email": "jane.doe@example.com",
        "metadata": [
            {
                "department": "Engineering",
                "role": "Senior Developer",
            },
        ],
        "logo_url": "https://example.com/avatars/jane-doe.jpg",
        "tags": [
            "hr",
            "engineering",
        ],
    }, thread={
        "id": "thread_01ARZ3NDEKTSV4RRFFQ69G5FAV",
        "tags": [
            "customer-support",
            "priority-high",
        ],
    }, background=False)

    assert res is not None

    # Handle response
    print(res)
"""

# Class -> its fields, as the contract names them
MODELS = {
    "A2AMessage": "role parts message_id",
    "TextPart": "text kind",
    "FilePart": "file metadata kind",
    "BinaryFormat": "bytes_ mime_type name",
    "FileInURIFormat": "uri mime_type name",
    "ToolResultPart": "tool_call_id result metadata kind",
    "Contact": "id display_name email metadata logo_url tags",
    "CreateAgentResponseThread": "id tags",
    "Memory": "entity_id",
    "RetryConfig": "strategy backoff retry_connection_errors status_codes_override",
    "BackoffStrategy": "initial_interval max_interval exponent max_elapsed_time"
    " jitter_ms",
    "CreateAgentResponseResponseBody": "id task_id output created_at model usage"
    " finish_reason pending_tool_calls telemetry raw",
    "Output": "message_id role parts metadata",
    "ToolCallPart": "tool_name tool_call_id arguments metadata kind",
    "DataPart": "data metadata kind",
    "ErrorPart": "error code kind",
    "CreateAgentResponseUsage": "completion_tokens prompt_tokens total_tokens"
    " prompt_tokens_details completion_tokens_details",
    "PromptTokensDetails": "cached_tokens cache_creation_tokens audio_tokens",
    "CompletionTokensDetails": "reasoning_tokens accepted_prediction_tokens"
    " rejected_prediction_tokens audio_tokens",
    "PendingToolCalls": "id function type",
    "Function": "name arguments",
    "Telemetry": "trace_id span_id",
}


class PortedPrograms(LoopbackTest):
    """Programs for the official package work with only their import changed."""

    def test_the_documented_example(self):
        self.service.agents.add("<value>")
        environment = {
            "ORQ_API_KEY": self.service.key,
            "ORQ_BASE_URL": self.service.url,
        }
        printed = io.StringIO()
        with mock.patch.dict(os.environ, environment):
            with contextlib.redirect_stdout(printed):
                exec(SEED_EXAMPLE, {})
        self.assertIn("text='You said nothing.'", printed.getvalue())
        (request,) = self.service.requests
        self.assertEqual(request.path, "/v2/agents/%3Cvalue%3E/responses")
        expected = {
            "message": {"role": "user", "parts": []},
            "contact": {
                "id": "contact_01ARZ3NDEKTSV4RRFFQ69G5FAV",
                "display_name": "Jane Doe",
                "email": "jane.doe@example.com",
                "metadata": [{"department": "Engineering", "role": "Senior Developer"}],
                "logo_url": "https://example.com/avatars/jane-doe.jpg",
                "tags": ["hr", "engineering"],
            },
            "thread": {
                "id": "thread_01ARZ3NDEKTSV4RRFFQ69G5FAV",
                "tags": ["customer-support", "priority-high"],
            },
            "background": False,
        }
        self.assertEqual(request.json(), expected)

    def test_one_namespace_has_the_official_names(self):
        for name, fields in MODELS.items():
            with self.subTest(name):
                model = getattr(orq_min, name)
                found = {field.name for field in dataclasses.fields(model)}
                self.assertEqual(found, set(fields.split()))

    def test_output_parts_are_instances_of_the_classes_that_a_request_takes(self):
        import orq_min as models

        question = models.A2AMessage(
            role="user", parts=[models.TextPart(kind="text", text="Hello")]
        )
        res = self.create(message=question)
        said = [
            p.text
            for m in res.output
            if m.role == "agent"
            for p in m.parts
            if isinstance(p, models.TextPart)
        ]
        self.assertEqual(said, ["You said: Hello"])
        self.assertEqual(res.output[0].parts[0].text, "You said: Hello")
        self.assertEqual(getattr(res.output[0].parts[0], "kind", None), "text")
        self.assertEqual(res.usage.total_tokens, 4)
        self.assertEqual(res.usage.prompt_tokens_details.cached_tokens, 0)
        self.assertIsNone(res.usage.completion_tokens_details)
        self.assertIsNone(res.pending_tool_calls)
        self.assertEqual(res.finish_reason, "stop")
        self.assertIsInstance(res.telemetry, models.Telemetry)

    def test_a_conversation_goes_on_with_the_task_id(self):
        first = self.create(message="one")
        second = self.create(message="two", task_id=first.task_id)
        self.assertEqual(second.task_id, first.task_id)
        self.assertNotEqual(second.id, first.id)
        self.assertEqual(self.service.requests[1].json()["task_id"], first.task_id)

    def test_a_tool_loop_runs_until_no_call_is_pending(self):
        res = self.create(message="What is the weather?")
        asked = []
        while getattr(res, "pending_tool_calls", None) or []:
            (call,) = res.pending_tool_calls
            asked.append((call.type, call.function.name, call.function.arguments))
            part = {"kind": "tool_result", "tool_call_id": call.id}
            part["result"] = {"celsius": 21}
            res = self.create(
                task_id=res.task_id, message={"role": "tool", "parts": [part]}
            )
        self.assertEqual(asked, [("function", "get_weather", '{"city": "Paris"}')])
        self.assertEqual(res.text, 'The tool says: {"celsius": 21}')

    def test_a_background_run_answers_at_once_and_can_be_continued(self):
        res = self.create(background=True)
        self.assertEqual((res.output, res.text, res.usage), ([], "", None))
        with self.assertRaises(orq_min.APIError) as caught:
            self.create(task_id=res.task_id)
        self.assertEqual(caught.exception.status_code, 409)
        for _ in range(100):
            time.sleep(0.05)
            with contextlib.suppress(orq_min.APIError):
                later = self.create(task_id=res.task_id)
                break
        self.assertEqual(later.task_id, res.task_id)

    def test_a_task_shaped_answer_can_be_continued(self):
        res = self.create(agent_key="task-agent")
        self.assertEqual(res.text, "You said: hi")
        self.assertEqual(res.id, res.raw["id"])
        self.assertEqual(res.task_id, res.raw["id"])
        again = self.create(agent_key="task-agent", task_id=res.task_id)
        self.assertEqual(again.task_id, res.task_id)

    def test_threads_and_tasks_share_one_client(self):
        async def ask():
            loop = asyncio.get_running_loop()
            create = self.orq.agents.responses.create
            calls = []
            for n in range(12):
                call = functools.partial(create, agent_key="my-agent", message=str(n))
                calls.append(loop.run_in_executor(None, call))  # as asyncio.to_thread
                calls.append(
                    self.orq.agents.responses.create_async(
                        agent_key="my-agent", message=str(n)
                    )
                )
            return [res.text for res in await asyncio.gather(*calls)]

        expected = ["You said: %d" % n for n in range(12) for _ in range(2)]
        self.assertEqual(asyncio.run(ask()), expected)

    def test_create_async_does_not_block_the_event_loop(self):
        self.service.next(dict(delay=0.5))

        async def ask():
            async with client(self.service) as orq:
                call = orq.agents.responses.create_async(
                    agent_key="my-agent", message="hi"
                )
                task = asyncio.ensure_future(call)
                ticks = 0
                while not task.done():
                    await asyncio.sleep(0.01)
                    ticks += 1
                return await task, ticks

        res, ticks = asyncio.run(ask())
        self.assertEqual(res.text, "You said: hi")
        self.assertGreater(ticks, 5)

    def test_create_async_raises_what_create_raises(self):
        create_async = self.orq.agents.responses.create_async
        with self.assertRaises(orq_min.ValidationError):
            asyncio.run(create_async(agent_key="", message="hi"))
        with self.assertRaises(orq_min.APIError):
            asyncio.run(create_async(agent_key="unknown", message="hi"))
        with self.assertRaises(TypeError):
            asyncio.run(create_async(agent_key="my-agent", mesage="hi"))

    def test_server_timeout_and_headers_can_be_given_for_one_call(self):
        with StandIn(key=self.service.key) as other:
            headers = {
                "X-Trace": "7",
                "user-agent": "mine",
                "AUTHORIZATION": "Bearer x",
            }
            self.create(server_url=other.url)
            with self.assertRaises(orq_min.APIError):
                self.create(server_url=other.url, http_headers=headers)
            for name, value in headers.items():
                self.assertEqual(other.requests[1].header(name), [value])
        self.assertEqual(self.service.requests, [])
        self.service.next(dict(delay=20))
        started = time.monotonic()
        with self.assertRaises(orq_min.APITimeoutError):
            self.create(timeout_ms=300)
        self.assertLess(time.monotonic() - started, 10)

    def test_retry_settings_of_old_and_new_programs_are_taken(self):
        quick = orq_min.BackoffStrategy(1, 2, 1.5, 3600000)
        old = orq_min.RetryConfig("backoff", quick, True)
        new = orq_min.RetryConfig(
            strategy="backoff",
            backoff=orq_min.BackoffStrategy(1, 2, 1.5, 60000, jitter_ms=1),
            retry_connection_errors=True,
            status_codes_override=["429", "5XX"],
        )
        for config in (old, new):
            with client(self.service, retry_config=config) as orq:
                create = functools.partial(
                    orq.agents.responses.create, agent_key="my-agent", message="hi"
                )
                self.service.next(dict(status=500), dict(status=502))
                self.assertEqual(create().text, "You said: hi")
                self.service.next(dict(status=500), dict(status=502))
                self.assertEqual(self.create(retries=config).text, "You said: hi")
                self.service.next(dict(status=503))
                with self.assertRaises(orq_min.APIError):
                    create(retries=None)

    def test_the_key_and_the_server_come_from_the_environment(self):
        padded = {"ORQ_API_KEY": self.service.key + "\n"}
        padded["ORQ_BASE_URL"] = " %s/some/prefix/\n" % self.service.url
        with mock.patch.dict(os.environ, padded):
            with orq_min.Orq() as orq:
                orq.agents.responses.create(agent_key="my-agent", message="hi")
            orq_min.create_response("my-agent", "hi")
            with orq_min.Orq("other", server_url=self.service.url) as orq:
                with self.assertRaises(orq_min.APIError):
                    orq.agents.responses.create(agent_key="my-agent", message="hi")
        paths = [request.path for request in self.service.requests]
        prefixed = "/some/prefix/v2/agents/my-agent/responses"
        self.assertEqual(paths, [prefixed] * 2 + [prefixed[len("/some/prefix") :]])
        self.assertEqual(
            self.service.requests[2].header("authorization"), ["Bearer other"]
        )

    def test_the_default_server_is_orqs(self):
        prepare = orq_min.Orq("key").agents.responses.prepare
        for empty in ("", " \n"):
            with mock.patch.dict(os.environ, ORQ_BASE_URL=empty):
                url = prepare(agent_key="a", message="b").url
            self.assertEqual(url, "https://my.orq.ai/v2/agents/a/responses")

    def test_a_function_that_gives_the_key_is_asked_at_each_call(self):
        keys = iter(["one", self.service.key])
        with client(self.service, api_key=lambda: next(keys)) as orq:
            with self.assertRaises(orq_min.APIError):
                orq.agents.responses.create(agent_key="my-agent", message="hi")
            res = orq.agents.responses.create(agent_key="my-agent", message="hi")
        self.assertEqual(res.text, "You said: hi")

    def test_connections_are_closed_with_the_client(self):
        given = {"agent_key": "my-agent", "message": "hi"}
        with client(self.service) as left:
            left.agents.responses.create(**given)
            self.assertEqual(self.service.open_connections(), 1)
        closed = client(self.service)
        closed.agents.responses.create(**given)
        closed.close()
        server = {"api_key": self.service.key, "server_url": self.service.url}
        res = orq_min.create_response("my-agent", "hi", **server)
        self.assertEqual(res.text, "You said: hi")

        async def ask():
            async with client(self.service) as orq:
                await orq.agents.responses.create_async(**given)

        asyncio.run(ask())
        for _ in range(100):
            if not self.service.open_connections():
                break
            time.sleep(0.02)
        self.assertEqual(self.service.open_connections(), 0)
        self.assertEqual(self.service.connections, 4)

    def test_all_ways_to_call_have_the_same_parameters(self):
        responses = self.orq.agents.responses
        expected = list(inspect.signature(responses.create).parameters.values())
        names = (
            "agent_key message task_id variables contact thread memory metadata"
            " background retries server_url timeout_ms http_headers extra_body"
        )
        self.assertEqual([p.name for p in expected], names.split())
        self.assertEqual({p.kind for p in expected}, {inspect.Parameter.KEYWORD_ONLY})
        asynchronous = inspect.signature(responses.create_async).parameters
        self.assertEqual(list(asynchronous.values()), expected)
        quick = dict(inspect.signature(orq_min.create_response).parameters)
        del quick["api_key"], quick["ssl_context"]
        first = [p.name for p in quick.values() if p.kind != p.KEYWORD_ONLY]
        self.assertEqual(first, ["agent_key", "message"])
        quick = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in quick.values()]
        self.assertEqual(quick, expected)
        options = inspect.signature(orq_min.Orq).parameters
        names = "api_key server_url timeout_ms retry_config ssl_context"
        self.assertEqual(list(options), names.split())
        kinds = [p.kind for p in options.values()]
        self.assertEqual(kinds[1:], [inspect.Parameter.KEYWORD_ONLY] * 4)
        self.assertEqual({p.default for p in list(options.values())[:3]}, {None})


# ----------------------------------------------------------------------------
# What goes out
# ----------------------------------------------------------------------------


class Color(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


@dataclasses.dataclass
class Point:
    x: int
    y: object = None


UTC = datetime.timezone.utc
EAST = datetime.timezone(datetime.timedelta(hours=2))
IDENTIFIER = uuid.UUID("12345678-1234-5678-1234-567812345678")

SHARED = [1]

# Free-form values, and what the service gets
CONVERSIONS = [
    (None, None),
    ({"a": [None, True, 1, 1.5, "é\ud800"]}, {"a": [None, True, 1, 1.5, "é\ud800"]}),
    (datetime.datetime(2025, 1, 2, 3, 4, 5), "2025-01-02T03:04:05"),
    (datetime.datetime(2025, 1, 2, 3, 4, tzinfo=EAST), "2025-01-02T03:04:00+02:00"),
    (datetime.datetime(2025, 1, 2, 3, 4, tzinfo=UTC), "2025-01-02T03:04:00Z"),
    (datetime.date(2025, 1, 2), "2025-01-02"),
    (datetime.time(3, 4, 5), "03:04:05"),
    (decimal.Decimal("1.10"), "1.10"),
    (IDENTIFIER, "12345678-1234-5678-1234-567812345678"),
    (Color.RED, "red"),
    (Level.HIGH, 3),
    ({Color.RED: 1, Level.HIGH: 2, 7: 3}, {"red": 1, "3": 2, "7": 3}),
    ({5}, [5]),
    (frozenset(["a"]), ["a"]),
    ((1, (2, 3)), [1, [2, 3]]),
    (collections.deque([1]), [1]),
    ([SHARED, SHARED], [[1], [1]]),
    (range(2), [0, 1]),
    (Point(1, [Point(2)]), {"x": 1, "y": [{"x": 2, "y": None}]}),
    (types.MappingProxyType({"a": {}}), {"a": {}}),
    (collections.OrderedDict(a=[]), {"a": []}),
    (10**300, 10**300),
]


def circle():
    value = {}
    value["me"] = [value]
    return value


def deep():
    value = []
    for _ in range(100000):
        value = [value]
    return value


# Free-form values without an honest JSON form, and the path that is named
REFUSALS = [
    (float("nan"), ""),
    ([1, {"a": float("inf")}], "[1].a"),
    ({"b": b"raw"}, ".b"),
    ([bytearray(b"x")], "[0]"),
    (object(), ""),
    (datetime.timedelta(1), ""),
    ((n for n in [1]), ""),
    (Point, ""),
    (1j, ""),
    ({1.5: 1}, "[1.5]"),
    ({None: 1}, "[None]"),
    ({True: 1}, "[True]"),
    ({(1, 2): 1}, "[(1, 2)]"),
    ({7: 1, "7": 2}, "['7']"),
    ({"two words": b""}, "['two words']"),
    (Point(1, b""), ".y"),
    (circle(), ".me[0]"),
]


class Outgoing(LoopbackTest):
    """What goes out is what the contract's request tables say."""

    def sent(self, **given):
        self.create(**given)
        return self.service.requests[-1].json()

    def test_a_plain_text_message_is_the_users(self):
        message = {"role": "user", "parts": [{"kind": "text", "text": "hi"}]}
        self.assertEqual(self.sent(), {"message": message, "background": False})

    def test_the_headers_of_a_request(self):
        self.create()
        (request,) = self.service.requests
        expected = {
            "Authorization": "Bearer test-key-123",
            "Content-Type": "application/json",
            "Accept": "application/json",
            "Host": self.service.url[len("http://") :],
            "Content-Length": str(len(request.body)),
        }
        for name, value in expected.items():
            self.assertEqual(request.header(name), [value])
        self.assertIn("orq_min", request.header("User-Agent")[0])

    def test_every_field_reaches_the_service_whether_object_or_mapping(self):
        file = {"bytes": "aGk=", "mimeType": "text/plain", "name": "a.txt"}
        place = {"uri": "https://example.com/a.pdf", "mimeType": "application/pdf"}
        parts = [
            {"kind": "text", "text": "look"},
            {"kind": "file", "file": file, "metadata": {"a": 1}},
            {"kind": "file", "file": dict(place, name="b")},
        ]
        expected = {
            "message": {"role": "user", "parts": parts, "messageId": "01ARZ3"},
            "variables": {"name": "Ada", "empty": {}, "none": None},
            "contact": {
                "id": "c",
                "display_name": "Ada",
                "email": "a@b",
                "logo_url": "https://x/y",
                "metadata": [{"k": None}],
                "tags": ["t"],
            },
            "thread": {"id": "t", "tags": []},
            "memory": {"entity_id": "e"},
            "metadata": {},
            "background": True,
        }
        as_mappings = copy.deepcopy(expected)
        self.assertEqual(self.sent(**as_mappings), expected)
        self.assertEqual(as_mappings, expected, "the caller's mappings were changed")

        pythonic = copy.deepcopy(expected)
        pythonic["message"]["message_id"] = pythonic["message"].pop("messageId")
        for part in pythonic["message"]["parts"][1:]:
            part["file"]["mime_type"] = part["file"].pop("mimeType")
        inner = pythonic["message"]["parts"][1]["file"]
        inner["bytes_"] = inner.pop("bytes")
        self.assertEqual(self.sent(**pythonic), expected)

        m = orq_min
        text = m.TextPart(text="look")
        binary = m.FilePart(m.BinaryFormat("aGk=", "text/plain", "a.txt"), {"a": 1})
        uri = m.FilePart(file=m.FileInURIFormat(place["uri"], "application/pdf", "b"))
        objects = {
            "message": m.A2AMessage("user", (text, binary, uri), "01ARZ3"),
            "contact": m.Contact(
                "c", "Ada", "a@b", ({"k": None},), "https://x/y", collections.deque("t")
            ),
            "thread": m.CreateAgentResponseThread("t", ()),
            "memory": types.MappingProxyType({"entity_id": "e"}),
        }
        self.assertEqual(self.sent(**dict(expected, **objects)), expected)
        mixed = {"role": "user", "parts": [text, parts[1], uri], "message_id": "01ARZ3"}
        self.assertEqual(self.sent(**dict(expected, message=mixed)), expected)

    def test_what_is_none_is_left_out(self):
        names = "task_id variables contact thread memory metadata background"
        body = self.sent(**dict.fromkeys(names.split()))
        self.assertEqual(list(body), ["message"])
        contact = {"id": "c", "email": None, "tags": None}
        self.assertEqual(self.sent(contact=contact)["contact"], {"id": "c"})
        contact = orq_min.Contact("c", email=None)
        self.assertEqual(self.sent(contact=contact)["contact"], {"id": "c"})

    def test_a_tool_result_may_be_any_json(self):
        for result in ({"a": None}, [], "text", 0, False, 1.5):
            first = self.create(message="weather")
            call_id = first.pending_tool_calls[0].id
            part = orq_min.ToolResultPart(call_id, result)
            message = orq_min.A2AMessage("tool", [part])
            body = self.sent(message=message, task_id=first.task_id)
            expected = {"kind": "tool_result", "tool_call_id": call_id}
            expected["result"] = result
            self.assertEqual(body["message"]["parts"], [expected])

    def test_an_agent_key_is_one_segment_of_the_path(self):
        for agent in (
            "a/../b",
            "x?y",
            "a b",
            "é#%2F",
            "...",
            "..a",
            "~",
            "\x00",
            "a;b",
        ):
            with self.subTest(agent):
                self.service.agents.add(agent)
                self.assertEqual(self.create(agent_key=agent).text, "You said: hi")
                path = self.service.requests[-1].path
                self.assertRegex(path, "^/v2/agents/[A-Za-z0-9._~%-]+/responses$")

    def test_free_form_values_are_converted_as_the_official_client_does(self):
        for value, expected in CONVERSIONS:
            for where in ("variables", "metadata"):
                with self.subTest(value=value, where=where):
                    body = self.sent(**{where: {"v": value}})
                    self.assertEqual(body[where], {"v": expected})
        body = self.sent(
            extra_body={"conversation": {"at": datetime.date(2025, 1, 2)}},
            contact={"id": "c", "metadata": [{"at": (Color.RED,)}]},
        )
        self.assertEqual(body["conversation"], {"at": "2025-01-02"})
        self.assertEqual(body["contact"]["metadata"], [{"at": ["red"]}])

    def test_none_in_one_spelling_leaves_the_other(self):
        part = {"kind": "file", "file": {"bytes": None, "bytes_": "eA=="}}
        message = {
            "role": "user",
            "parts": [part],
            "messageId": None,
            "message_id": "x",
        }
        self.create(message=message)
        sent = self.service.requests[-1].json()["message"]
        self.assertEqual(sent["messageId"], "x")
        self.assertEqual(sent["parts"][0]["file"], {"bytes": "eA=="})

    def test_free_form_values_without_a_json_form_are_refused_by_path(self):
        for value, path in REFUSALS:
            with self.subTest(value=value):
                with self.assertRaises(orq_min.ValidationError) as caught:
                    self.create(variables={"v": value})
                paths = [where for where, _ in caught.exception.errors]
                self.assertEqual(paths, ["variables.v" + path])
        for value in (deep(), 10**100000, {10**5000: 1}):
            with self.assertRaises(orq_min.ValidationError) as caught:
                self.create(metadata={"v": value})
            self.assertLess(len(str(caught.exception)), 2000)
        self.assertEqual(self.service.requests, [])

    def test_extra_body_adds_fields_and_may_not_overwrite_a_named_one(self):
        extra = {"engine": "jinja", "identity": {"id": "i"}}
        body = self.sent(extra_body=types.MappingProxyType(extra))
        self.assertEqual((body["engine"], body["identity"]), ("jinja", {"id": "i"}))
        for name in list(BODY)[1:-3] + ["message"]:
            with self.assertRaises(orq_min.ValidationError) as caught:
                self.create(extra_body={name: None}, background=None)
            self.assertEqual(caught.exception.errors[0][0], "extra_body." + name)
        self.assertEqual(len(self.service.requests), 1)

    def test_files_are_attached_with_their_type_guessed(self):
        kinds = {"a.txt": "text/plain", "b.PDF": "application/pdf", "c": None}
        with tempfile.TemporaryDirectory() as place:
            for name, mime_type in kinds.items():
                path = os.path.join(place, name)
                with open(path, "wb") as file:
                    file.write(b"\x00\xff" + name.encode())
                for part in (
                    orq_min.FilePart.from_path(path),
                    orq_min.FilePart.from_path(pathlib.Path(path)),
                ):
                    self.assertEqual(part.file.mime_type, mime_type)
                    self.assertEqual(part.file.name, name)
                    content = base64.b64decode(part.file.bytes_)
                    self.assertEqual(content, b"\x00\xff" + name.encode())
            shown = self.create(message=orq_min.A2AMessage("user", [part])).text
            self.assertIn("[file: c, 3 bytes]", shown)
            with self.assertRaises(OSError):
                orq_min.FilePart.from_path(os.path.join(place, "missing"))
            open(path, "wb").close()
            with self.assertRaises(orq_min.ValidationError):
                orq_min.FilePart.from_path(path)
        part = orq_min.FilePart.from_uri("https://example.com/a/report.pdf?x=1.txt#y")
        self.assertEqual(part.file.mime_type, "application/pdf")
        self.assertEqual(part.file.uri, "https://example.com/a/report.pdf?x=1.txt#y")


# Parameters of a call, and every path that must be named
WRONG_CALLS = [
    (dict(agent_key=""), "agent_key"),
    (dict(agent_key="."), "agent_key"),
    (dict(agent_key=".."), "agent_key"),
    (dict(agent_key=None), "agent_key"),
    (dict(agent_key=b"x"), "agent_key"),
    (dict(agent_key="\ud800"), "agent_key"),
    (dict(message=None), "message"),
    (dict(message=5), "message"),
    (dict(message=b"hi"), "message"),
    (dict(message=[]), "message"),
    (dict(message=orq_min.TextPart("hi")), "message"),
    (dict(message={}), "message.role message.parts"),
    (dict(message={"role": "agent", "parts": []}), "message.role"),
    (dict(message={"role": "user", "parts": "hi"}), "message.parts"),
    (dict(message={"role": "user", "parts": {}}), "message.parts"),
    (dict(message={"role": "user", "parts": ["hi"]}), "message.parts[0]"),
    (dict(message={"role": "user", "parts": [None]}), "message.parts[0]"),
    (dict(message={"role": "user", "parts": [{}]}), "message.parts[0].kind"),
    (
        dict(message={"role": "user", "parts": [{"kind": "data"}]}),
        "message.parts[0].kind",
    ),
    (
        dict(message={"role": "user", "parts": [{"kind": ["text"]}]}),
        "message.parts[0].kind",
    ),
    (
        dict(message={"role": "user", "parts": [{"kind": "text", "texd": "x"}]}),
        "message.parts[0].text message.parts[0].texd",
    ),
    (
        dict(message={"role": "user", "parts": [{"kind": "file", "file": {}}]}),
        "message.parts[0].file",
    ),
    (
        dict(message={"role": "tool", "parts": [{"kind": "tool_result"}]}),
        "message.parts[0].tool_call_id",
    ),
    (
        dict(
            message={"role": "user", "parts": [], "messageId": "a", "message_id": "b"}
        ),
        "message.messageId",
    ),
    (dict(task_id=5), "task_id"),
    (dict(variables=[]), "variables"),
    (dict(variables="a=b"), "variables"),
    (dict(variables={5.5: 1, "a": b""}), "variables[5.5] variables.a"),
    (dict(contact="c"), "contact"),
    (dict(contact={"display_name": "Ada"}), "contact.id"),
    (dict(contact={"id": None}), "contact.id"),
    (dict(contact={"id": 5, "email": 5}), "contact.id contact.email"),
    (dict(contact={"id": "c", "tags": "abc"}), "contact.tags"),
    (dict(contact={"id": "c", "tags": ["a", 5]}), "contact.tags[1]"),
    (dict(contact={"id": "c", "tags": {"a"}}), "contact.tags"),
    (dict(contact={"id": "c", "metadata": {"a": 1}}), "contact.metadata"),
    (dict(contact={"id": "c", "metadata": ["a"]}), "contact.metadata[0]"),
    (dict(contact={"id": "c", 5: 1}), "contact[5]"),
    (dict(contact=orq_min.Memory("x")), "contact"),
    (dict(thread={}), "thread.id"),
    (dict(thread={"id": "t", "tag": []}), "thread.tag"),
    (dict(memory={"entity": "x"}), "memory.entity_id memory.entity"),
    (dict(metadata=3), "metadata"),
    (dict(background="yes"), "background"),
    (dict(background=1), "background"),
    (dict(retries="backoff"), "retries"),
    (dict(timeout_ms=0), "timeout_ms"),
    (dict(timeout_ms=-1), "timeout_ms"),
    (dict(timeout_ms="5"), "timeout_ms"),
    (dict(timeout_ms=True), "timeout_ms"),
    (dict(timeout_ms=float("nan")), "timeout_ms"),
    (dict(timeout_ms=float("inf")), "timeout_ms"),
    (dict(timeout_ms=10**400), "timeout_ms"),
    (dict(extra_body=[]), "extra_body"),
    (dict(extra_body={"x": b""}), "extra_body.x"),
    (dict(http_headers=["a"]), "http_headers"),
    (dict(server_url=5), "server_url"),
]

# What builds a dataclass wrongly, and the paths that must be named
WRONG_OBJECTS = [
    (lambda m: m.TextPart(text=1), "text"),
    (lambda m: m.TextPart(None), "text"),
    (lambda m: m.TextPart("hi", kind="file"), "kind"),
    (lambda m: m.BinaryFormat(bytes_=b"raw"), "bytes"),
    (lambda m: m.BinaryFormat("not base64!"), "bytes"),
    (lambda m: m.TextPart("hi", kind=None), "kind"),
    (lambda m: m.BinaryFormat(""), "bytes"),
    (lambda m: m.BinaryFormat("\n"), "bytes"),
    (lambda m: m.BinaryFormat("aGk=", 5, 6), "mimeType name"),
    (lambda m: m.FileInURIFormat(5), "uri"),
    (lambda m: m.FilePart("a.txt"), "file"),
    (lambda m: m.FilePart({"bytes": "aGk=", "uri": "x"}), "file.uri"),
    (lambda m: m.FilePart({"bytes": ""}, metadata=[]), "file.bytes metadata"),
    (lambda m: m.FilePart.from_uri(None), "uri"),
    (lambda m: m.ToolResultPart(5, result=float("nan")), "tool_call_id result"),
    (lambda m: m.A2AMessage("agent", "hi", 5), "role parts messageId"),
    (lambda m: m.A2AMessage("user", [m.Contact("c")]), "parts[0]"),
    (lambda m: m.Contact(None, tags=[1]), "id tags[0]"),
    (lambda m: m.CreateAgentResponseThread("t", tags="ab"), "tags"),
    (lambda m: m.Memory(5), "entity_id"),
    (lambda m: m.RetryConfig("sometimes"), "strategy"),
    (lambda m: m.RetryConfig(backoff=5), "backoff"),
    (lambda m: m.RetryConfig(None, None), "strategy backoff"),
    (lambda m: m.BackoffStrategy(None), "initial_interval"),
    (lambda m: m.RetryConfig(retry_connection_errors="no"), "retry_connection_errors"),
    (lambda m: m.RetryConfig(status_codes_override="5XX"), "status_codes_override"),
    (lambda m: m.RetryConfig(status_codes_override=["6Y"]), "status_codes_override"),
    (lambda m: m.RetryConfig(status_codes_override=[429]), "status_codes_override[0]"),
    (lambda m: m.BackoffStrategy(-1, -1), "initial_interval max_interval"),
    (lambda m: m.BackoffStrategy(exponent=float("nan")), "exponent"),
    (lambda m: m.BackoffStrategy(exponent="2"), "exponent"),
    (lambda m: m.BackoffStrategy(max_elapsed_time=-1), "max_elapsed_time"),
    (lambda m: m.BackoffStrategy(jitter_ms=-1), "jitter_ms"),
]


class Refused(LoopbackTest):
    """A wrong call is refused before anything is sent, all of it at once, by path."""

    def refused(self, call, **given):
        with self.assertRaises(orq_min.ValidationError) as caught:
            call(**given)
        self.assertEqual(self.service.connections, 0)
        self.assertIsInstance(caught.exception, ValueError)
        return caught.exception

    def test_all_that_is_wrong_is_said_at_once_by_its_path(self):
        error = self.refused(
            self.create,
            message={"role": "user", "parts": [{}]},
            contact={"id": "c", "display_nmae": "Ada"},
            variables={"when": [1, 2, float("nan")]},
        )
        expected = [
            ("message.parts[0].kind", "required"),
            ("contact.display_nmae", "unknown field (did you mean 'display_name'?)"),
            ("variables.when[2]", "NaN has no JSON form"),
        ]
        self.assertEqual(sorted(error.errors), sorted(expected))
        for path, problem in expected:
            self.assertIn("%s: %s" % (path, problem), str(error))

    def test_wrong_parameters_are_named(self):
        for given, paths in WRONG_CALLS:
            with self.subTest(given=str(given)[:200]):
                error = self.refused(self.create, **given)
                self.assertEqual({p for p, _ in error.errors}, set(paths.split()))

    def test_names_that_python_cannot_write_out_are_refused_as_well(self):
        name = 10**5000  # more digits than str() and repr() may write
        for given in (
            {"contact": {"id": "c", name: 1}},
            {"http_headers": {name: "x"}},
            {"extra_body": {name: 1}},
        ):
            with self.subTest(parameter=list(given)):
                self.assertLess(len(str(self.refused(self.create, **given))), 20000)

    def test_problems_of_every_kind_come_together(self):
        wrong = dict(agent_key="..", server_url="ftp://x", timeout_ms=0, task_id=5)
        wrong.update(http_headers={"Host": "x"}, extra_body={"message": 1}, retries=5)
        with orq_min.Orq("") as orq:
            create = orq.agents.responses.create
            error = self.refused(create, message=5, **wrong)
        paths = {path.partition(".")[0] for path, _ in error.errors}
        self.assertEqual(paths, set(wrong) | {"message", "api_key"})

    def test_wrong_objects_are_refused_when_they_are_built(self):
        for build, paths in WRONG_OBJECTS:
            with self.subTest(paths=paths):
                error = self.refused(build, m=orq_min)
                spelt = [path.replace("bytes_", "bytes") for path, _ in error.errors]
                spelt = [path.replace("mime_type", "mimeType") for path in spelt]
                spelt = [path.replace("message_id", "messageId") for path in spelt]
                self.assertEqual(set(spelt), set(paths.split()))

    def test_an_object_that_was_changed_is_checked_again_at_the_call(self):
        part = orq_min.TextPart("hi")
        message = orq_min.A2AMessage("user", [part])
        part.text = 5
        error = self.refused(self.create, message=message)
        self.assertEqual(error.errors[0][0], "message.parts[0].text")

    def test_a_type_error_speaks_of_the_argument_and_not_of_our_insides(self):
        given = {"agent_key": "my-agent", "message": "hi", "taskid": "x"}
        for call in (self.orq.agents.responses.create, orq_min.create_response):
            with self.assertRaisesRegex(TypeError, "unexpected.*'taskid'") as caught:
                call(**given)
            self.assertNotIn("_Call", str(caught.exception))
        with self.assertRaisesRegex(TypeError, "missing.*'message'") as caught:
            self.orq.agents.responses.create(agent_key="my-agent")
        self.assertNotIn("_Call", str(caught.exception))

    def test_missing_and_unexpected_arguments_are_pythons_own_type_error(self):
        create = self.orq.agents.responses.create
        for call, given in (
            (orq_min.TextPart, {}),
            (orq_min.TextPart, {"txt": "hi"}),
            (create, {"agent_key": "my-agent"}),
            (create, {"agent_key": "my-agent", "message": "hi", "taskid": "x"}),
            (orq_min.Orq, {"key": "x"}),
        ):
            with self.subTest(call=call, given=given):
                with self.assertRaises(TypeError):
                    call(**given)

    def test_a_missing_or_empty_key_is_named_at_the_call(self):
        for key in (None, "", " \n", lambda: None, lambda: "", 5, b"key", lambda: 5):
            with self.subTest(key=key), client(self.service, api_key=key) as orq:
                create = orq.agents.responses.create
                error = self.refused(create, agent_key="my-agent", message="hi")
                self.assertEqual([path for path, _ in error.errors], ["api_key"])

    def test_wrong_settings_of_a_client_are_refused_at_the_latest_at_the_call(self):
        for option, value in (
            ("server_url", "nonsense"),
            ("timeout_ms", -5),
            ("retry_config", "backoff"),
        ):

            def call():
                with client(self.service, **{option: value}) as orq:
                    orq.agents.responses.create(agent_key="my-agent", message="hi")

            with self.subTest(option):
                self.refused(call)


# ----------------------------------------------------------------------------
# What comes in
# ----------------------------------------------------------------------------

PUBLISHED = {
    "_id": "r1",
    "task_id": "t1",
    "output": [
        {"messageId": "m0", "role": "user", "parts": [{"kind": "text", "text": "?"}]},
        {"messageId": "m1", "role": "agent", "parts": [{"kind": "text", "text": "A"}]},
        {"role": "agent", "parts": [{"kind": "data", "data": {"a": 1}}]},
        {
            "role": "agent",
            "metadata": {"k": 1},
            "parts": [
                {"kind": "text", "text": "B"},
                {
                    "kind": "tool_call",
                    "tool_name": "f",
                    "tool_call_id": "c",
                    "arguments": {"x": 1},
                },
                {"kind": "error", "error": "oops", "code": 7},
                {"kind": "tool_result", "tool_call_id": "c", "result": [1]},
                {"kind": "file", "file": {"bytes": "aGk=", "mimeType": "a/b"}},
                {"kind": "file", "file": {"uri": "https://x", "name": "n"}},
                {"kind": "reasoning", "text": "hm"},
                {"kind": "text", "text": "C", "brand_new": 5},
            ],
        },
        {"role": "tool", "parts": [{"kind": "text", "text": "never"}]},
        {"parts": [{"kind": "text", "text": "D"}]},
    ],
    "created_at": "2025-11-20T09:30:00Z",
    "model": "p/m",
    "usage": {"total_tokens": 3, "completion_tokens_details": {"reasoning_tokens": 1}},
    "pending_tool_calls": [
        {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    ],
    "telemetry": {"trace_id": "a", "span_id": "b"},
    "brand_new": {"x": 1},
}

SURPRISES = [None, True, 5, 1.5, "text", [], [None, 5, "x", [], {}], {}, {"kind": 5}]


class Incoming(LoopbackTest):
    """No 200 with a JSON object is refused, and nothing of it is lost."""

    def answer(self, body):
        self.service.next(dict(body=body))
        return self.create()

    def test_the_published_shape_becomes_objects(self):
        m, res = orq_min, self.answer(PUBLISHED)
        self.assertEqual((res.id, res.task_id), ("r1", "t1"))
        self.assertEqual((res.model, res.created_at), ("p/m", "2025-11-20T09:30:00Z"))
        self.assertEqual(res.output[1].message_id, "m1")
        self.assertIsNone(res.output[2].message_id)
        self.assertEqual(res.output[3].metadata, {"k": 1})
        expected = [m.TextPart, m.ToolCallPart, m.ErrorPart, m.ToolResultPart]
        expected += [m.FilePart, m.FilePart, dict, m.TextPart]
        parts = res.output[3].parts
        self.assertEqual([type(part) for part in parts], expected)
        call, error, result, binary, place = parts[1:6]
        self.assertEqual((call.tool_name, call.arguments), ("f", {"x": 1}))
        self.assertEqual((error.error, error.code), ("oops", 7))
        self.assertEqual((result.tool_call_id, result.result), ("c", [1]))
        self.assertEqual(binary.file, m.BinaryFormat("aGk=", "a/b"))
        self.assertEqual(place.file, m.FileInURIFormat("https://x", name="n"))
        self.assertEqual(res.output[2].parts[0].data, {"a": 1})
        self.assertEqual(res.usage.total_tokens, 3)
        self.assertIsNone(res.usage.prompt_tokens)
        self.assertIsNone(res.usage.prompt_tokens_details)
        self.assertEqual(res.usage.completion_tokens_details.reasoning_tokens, 1)
        self.assertEqual(res.pending_tool_calls[0].function.arguments, "{}")
        self.assertEqual((res.telemetry.trace_id, res.telemetry.span_id), ("a", "b"))

    def test_what_this_file_does_not_know_is_kept(self):
        res = self.answer(PUBLISHED)
        self.assertEqual(res.raw, PUBLISHED)
        self.assertEqual(res.output[3].parts[6], {"kind": "reasoning", "text": "hm"})
        self.assertEqual(res.raw["brand_new"], {"x": 1})

    def test_text_is_what_the_agent_said(self):
        self.assertEqual(self.answer(PUBLISHED).text, "A\nBC\nD")

    def test_an_answer_without_any_field_has_none_in_their_place(self):
        res = self.answer({})
        self.assertEqual((res.output, res.text, res.raw), ([], "", {}))
        names = MODELS["CreateAgentResponseResponseBody"].split()
        for name in set(names) - {"output", "raw"}:
            self.assertIsNone(getattr(res, name), name)
        (output,) = self.answer({"output": [{}]}).output
        self.assertEqual((output.parts, output.role, output.metadata), ([], None, None))

    def test_surprising_types_stay_as_they_came(self):
        """Each value of the published shape is replaced by each surprise in turn."""

        def places(value, path=()):
            yield path
            pairs = value.items() if isinstance(value, dict) else ()
            pairs = enumerate(value) if isinstance(value, list) else pairs
            for key, inner in pairs:
                yield from places(inner, (*path, key))

        bodies = []
        for path in list(places(PUBLISHED))[1:]:
            for surprise in SURPRISES:
                body = copy.deepcopy(PUBLISHED)
                inner = functools.reduce(lambda v, key: v[key], path[:-1], body)
                inner[path[-1]] = surprise
                bodies.append(body)
        self.assertGreater(len(bodies), 500)
        for body in bodies:
            res = self.answer(body)
            self.assertEqual(res.raw, body)
            self.assertIsInstance(res.text, str)
            repr(res)
        res = self.answer({"usage": "none", "output": {"a": 1}, "model": 5, "_id": []})
        self.assertEqual((res.usage, res.output), ("none", {"a": 1}))
        self.assertEqual((res.model, res.id, res.text), (5, [], ""))

    def test_names_that_python_uses_do_no_harm(self):
        body = {
            "text": 5,
            "raw": 6,
            "__class__": 7,
            "__dict__": 8,
            "__reduce_ex__": 8,
            "_id": "r",
            "self": 1,
        }
        body["output"] = [{"__init__": 9, "parts": [{"kind": "text", "__class__": 1}]}]
        res = self.answer(body)
        self.assertEqual((res.id, res.text, res.raw), ("r", "", body))
        self.assertEqual(copy.deepcopy(res), res)
        self.assertIsInstance(res.output[0].parts[0], orq_min.TextPart)

    def test_an_answer_may_be_any_json_that_python_reads(self):
        for body in (
            b'\xef\xbb\xbf{"_id": "r"}',
            b' {"_id": "r", "n": 1e999, "m": NaN}\n',
            b'{"_id": "r", "n": ' + b"9" * 6000 + b"}",
            b'{"_id": "x", "_id": "r"}',
            b'{"_id": "r", "n": "\\ud800"}',
            b'{"_id": "r", "n": "\xff"}',
            json.dumps({"_id": "r"}).encode("utf-16"),
        ):
            with self.subTest(body[:40]):
                self.assertEqual(self.answer(body).id, "r")

    def test_an_answer_pickles_and_copies(self):
        res = self.answer(PUBLISHED)
        self.assertEqual(copy.deepcopy(res), res)
        again = pickle.loads(pickle.dumps(res))
        self.assertEqual((again, again.raw, again.text), (res, res.raw, res.text))


# ----------------------------------------------------------------------------
# Errors
# ----------------------------------------------------------------------------


class Errors(LoopbackTest):
    """One family of errors, with what the server said, which travels anywhere."""

    def error(self, kind, *steps, **given):
        self.service.next(*steps)
        with self.assertRaises(kind) as caught:
            self.create(retries=None, **given)
        self.assertIs(type(caught.exception), kind)
        return caught.exception

    def test_the_tree_of_errors(self):
        m = orq_min
        self.assertEqual(m.OrqError.__bases__, (Exception,))
        self.assertEqual(set(m.ValidationError.__bases__), {m.OrqError, ValueError})
        self.assertEqual(m.APIError.__bases__, (m.OrqError,))
        self.assertEqual(m.APIConnectionError.__bases__, (m.OrqError,))
        self.assertEqual(m.APITimeoutError.__bases__, (m.APIConnectionError,))

    def test_the_servers_own_words_are_the_message(self):
        words = "no such thing"
        for body in (
            {"message": words},
            {"code": 404, "message": words},
            {"error": words},
            {"error": {"message": words}},
        ):
            with self.subTest(body=body):
                step = dict(status=404, body=body, headers={"X-Request-Id": "7"})
                error = self.error(orq_min.APIError, step)
                self.assertEqual((error.status_code, error.message), (404, words))
                self.assertEqual(error.data, body)
                self.assertEqual(json.loads(error.body), body)
                self.assertEqual(error.headers["x-request-id"], "7")
                self.assertEqual(error.headers["X-REQUEST-ID"], "7")
                url = self.service.url + "/v2/agents/my-agent/responses"
                for piece in ("POST", url, "404", words):
                    self.assertIn(piece, str(error))

    def test_any_other_body_is_kept_as_text(self):
        for body in (b"<html>\n<b>Bad gateway</b>", b"", b"\xff\xfe", b"[1]", b'"x"'):
            for status in (400, 403, 404, 418, 500, 599):
                with self.subTest(body=body, status=status):
                    step = dict(status=status, body=body)
                    error = self.error(orq_min.APIError, step)
                    self.assertEqual(error.status_code, status)
                    self.assertIsInstance(error.body, str)
                    self.assertIsInstance(error.message, str)
                    self.assertNotIn("\n", str(error))
        error = self.error(orq_min.APIError, dict(status=500, body=b"<p>\xc3\xa9</p>"))
        self.assertEqual((error.body, error.data), ("<p>é</p>", None))
        self.assertIn("<p>é</p>", str(error))

    def test_odd_json_in_an_error_does_no_harm(self):
        for value in SURPRISES:
            for body in (
                {"message": value},
                {"error": value},
                {"error": {"message": 5}},
            ):
                step = dict(status=400, body=body)
                error = self.error(orq_min.APIError, step)
                self.assertEqual(error.data, body)
                self.assertIsInstance(error.message, str)

    def test_a_long_body_is_cut_in_the_text_and_whole_in_the_attribute(self):
        for body in ("x" * 100000, json.dumps({"message": "y" * 100000})):
            error = self.error(orq_min.APIError, dict(status=500, body=body))
            self.assertLess(len(str(error)), 2000)
            self.assertEqual(error.body, body)

    def test_a_200_without_a_json_object_is_an_api_error(self):
        for body in (b"", b"null", b"[]", b'"ok"', b"5", b"<html>", b"{", b"[" * 99999):
            with self.subTest(body=body[:20]):
                error = self.error(orq_min.APIError, dict(body=body))
                self.assertEqual(error.status_code, 200)
        for status in (201, 202, 206):
            step = dict(status=status, body={"_id": "r"})
            error = self.error(orq_min.APIError, step)
            self.assertEqual(error.status_code, status)

    def test_no_complete_answer_is_a_connection_error_with_its_cause(self):
        def garbage(handler):
            handler.wfile.write(b"SSH-2.0-OpenSSH\r\n\r\n")
            handler.close_connection = True

        cut = dict(headers={"Content-Length": "99", "Connection": "close"}, body={})
        for step in (reset, hang_up, garbage, cut):
            with self.subTest(step=step):
                error = self.error(orq_min.APIConnectionError, step)
                self.assertIsInstance(error.__cause__, Exception)
                self.assertIn(self.service.url, str(error))
        error = self.error(orq_min.APITimeoutError, dict(delay=20), timeout_ms=200)
        self.assertIsInstance(error.__cause__, socket.timeout)
        self.assertIn("0.2 s", str(error))
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            url = "http://127.0.0.1:%d" % closed.getsockname()[1]
            error = self.error(orq_min.APIConnectionError, server_url=url)
        self.assertIsInstance(error.__cause__, ConnectionRefusedError)

    def test_a_failed_call_leaves_one_line_and_no_noise(self):
        given = {"ORQ_API_KEY": "k", "ORQ_BASE_URL": self.service.url}
        self.service.next(hang_up, reset, dict(status=500, body="<p>"))
        for status in (3, 3, 1):
            done = run("--no-retry", "my-agent", "hi", env=given)
            self.assertEqual((done.returncode, done.stdout), (status, b""))
            self.assertEqual(len(done.stderr.splitlines()), 1, done.stderr)

    def test_errors_pickle_and_copy(self):
        step = dict(status=404, body={"message": "no"}, headers={"X-Id": "7"})
        errors = [
            self.error(orq_min.APIError, step),
            self.error(orq_min.APIConnectionError, hang_up),
            self.error(orq_min.APITimeoutError, dict(delay=20), timeout_ms=100),
            self.error(orq_min.ValidationError, agent_key=""),
            orq_min.OrqError("x"),
        ]
        copies = [copy.copy, copy.deepcopy]
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            copies.append(
                lambda error, protocol=protocol: pickle.loads(
                    pickle.dumps(error, protocol)
                )
            )
        for error in errors:
            for duplicate in copies:
                again = duplicate(error)
                self.assertIs(type(again), type(error))
                self.assertIsNot(again, error)
                self.assertEqual((str(again), repr(again)), (str(error), repr(error)))
                self.assertEqual(set(vars(again)), set(vars(error)))
                for name in ("status_code", "body", "data", "message", "errors"):
                    found = getattr(again, name, None)
                    self.assertEqual(found, getattr(error, name, None))
                if isinstance(error, orq_min.APIError):
                    self.assertEqual(again.headers["x-ID"], "7")

    def test_a_key_function_without_a_key_ends_an_async_call(self):
        async def call():
            async with orq_min.Orq(iter(()).__next__) as orq:
                create = orq.agents.responses.create_async
                await asyncio.wait_for(create(agent_key="a", message="b"), 5)

        with self.assertRaises(RuntimeError):
            asyncio.run(call())

    def test_a_debugger_that_looks_at_variables_does_no_harm(self):
        def trace(frame, event, argument):
            return trace if frame.f_locals is not None else None

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            answer = self.create(message="traced")
        finally:
            sys.settrace(before)
        self.assertEqual(answer.text, "You said: traced")


# ----------------------------------------------------------------------------
# The key, headers and server
# ----------------------------------------------------------------------------

BAD_SERVERS = (
    """
    nonsense my.orq.ai //my.orq.ai ftp://my.orq.ai file:///etc/passwd http:// http:///x
    https://user@my.orq.ai https://user:pw@my.orq.ai https://my.orq.ai?x=1
    https://my.orq.ai/? https://my.orq.ai/# https://my.orq.ai/a#b https://my.orq.ai:x
    https://my.orq.ai:99999 https://my.orq.ai:0 https://my.orq.ai:-1 http://[::1
    http://::1/ http://[::zz] http://[] http://[1.2.3.4] https:/my.orq.ai
    https:my.orq.ai https://a\\b http://[::1]x https://my..orq.ai
""".split()
    + [
        "",
        " ",
        "https://my orq.ai",
        "https://my.orq.ai/a b",
        "https://my.orq.ai\r\nX: y",
        "https://my.orq\t.ai",
        "https://my.orq.ai/\x00",
        "http\u017f://x:1",  # a long s, which is an s where case does not matter
        "http\u017f://x",
        "https://my.orq.ai/\x7f",
        "https://my.orq.ai/\u2028x",
        "https://%s.ai" % ("x" * 64),
        "https://my.orq.ai/\ud800",
        "https://my.orq.ai\u2100.example",  # IDNA makes my.orq.aia/c.example of it
        "https://my.orq.ai\uff0f.example",  # a slash of full width
        "https://user\uff20my.orq.ai",  # an at sign of full width
    ]
)

# Server URL -> what a request to it begins with
GOOD_SERVERS = {
    "https://my.orq.ai": "https://my.orq.ai/v2/",
    "https://my.orq.ai/": "https://my.orq.ai/v2/",
    " https://my.orq.ai\n": "https://my.orq.ai/v2/",
    "https://host/some/prefix": "https://host/some/prefix/v2/",
    "https://host/some/prefix///": "https://host/some/prefix/v2/",
    "http://host:8080/x%20y": "http://host:8080/x%20y/v2/",
    "HTTPS://HOST": "https://host/v2/",
    "http://[::1]:8080": "http://[::1]:8080/v2/",
    "https://[2001:db8::1]/p": "https://[2001:db8::1]/p/v2/",
    "https://host/über": "https://host/%C3%BCber/v2/",
    "https://bücher.example": "https://xn--bcher-kva.example/v2/",
}

SECRET = "sk-SECRET/with+\"odd'é-0123456789"


class TheKeyAndTheServer(LoopbackTest):
    """The key goes to one place: what could send it elsewhere is refused."""

    def refused(self, path, **given):
        with self.assertRaises(orq_min.ValidationError) as caught:
            self.create(**given)
        self.assertEqual(self.service.connections, 0)
        self.assertEqual([where for where, _ in caught.exception.errors], [path])
        return caught.exception

    def test_a_server_url_is_an_address_and_nothing_else(self):
        prepare = functools.partial(
            self.orq.agents.responses.prepare, agent_key="a", message="hi"
        )
        for url in BAD_SERVERS:  # not sent, as a mistake would reach the network
            with self.subTest(url=ascii(url)):
                with self.assertRaises(orq_min.ValidationError) as caught:
                    prepare(server_url=url)
                paths = [where for where, _ in caught.exception.errors]
                self.assertEqual(paths, ["server_url"])
        for url, expected in GOOD_SERVERS.items():
            with self.subTest(url=url):
                request = prepare(server_url=url)
                self.assertEqual(request.url, expected + "agents/a/responses")

    def test_prefixes_and_ipv6_servers_work(self):
        res = self.create(server_url=self.service.url + "/some/prefix/")
        self.assertEqual(res.text, "You said: hi")
        path = "/some/prefix/v2/agents/my-agent/responses"
        self.assertEqual(self.service.requests[0].path, path)

    def test_a_key_that_says_bearer_is_sent_as_it_is(self):
        for key, sent in (
            ("  k\n", "Bearer k"),
            ("Bearer k", "Bearer k"),
            ("bEARER k\r\n", "bEARER k"),
            ("Bearerk", "Bearer Bearerk"),
            ("ké", "Bearer ké"),
        ):
            with self.subTest(key=key), client(self.service, api_key=key) as orq:
                with self.assertRaises(orq_min.APIError):
                    orq.agents.responses.create(agent_key="my-agent", message="hi")
                (got,) = self.service.requests[-1].header("authorization")
                self.assertEqual(got.encode("latin-1"), sent.encode("latin-1"))

    def test_a_key_that_no_header_can_hold_is_refused_and_not_repeated(self):
        for bad in ("\n", "\r", "\0", "\x7f", "€", "\ud800", "\x85", "\t"):
            key = "SECRET%sSECRET" % bad
            with self.subTest(key=ascii(key)), client(self.service, api_key=key) as orq:
                with self.assertRaises(orq_min.ValidationError) as caught:
                    orq.agents.responses.create(agent_key="my-agent", message="hi")
                error = caught.exception
                self.assertEqual([path for path, _ in error.errors], ["api_key"])
                shown = "".join(traceback.format_exception(None, error, None))
                self.assertNotIn("SECRET", shown + repr(error) + str(error))
        self.assertEqual(self.service.connections, 0)

    def test_headers_replace_ours_whatever_their_case_and_are_sent_once(self):
        given = {
            "AUTHORIZATION": "Bearer " + self.service.key,
            "content-type": "application/json",
            "aCCept": "text/plain",
            "User-agent": "mine",
            "X-own": " padded é ",
        }
        with client(self.service, api_key="another") as orq:
            orq.agents.responses.create(
                agent_key="my-agent", message="hi", http_headers=given
            )
        (request,) = self.service.requests
        for name, value in given.items():
            sent = value.strip().encode("latin-1")
            self.assertEqual(
                [v.encode("latin-1") for v in request.header(name)], [sent]
            )
        names = [name.lower() for name, _ in request.headers]
        self.assertEqual(sorted(names), sorted(set(names)))

    def test_wrong_headers_are_refused(self):
        for name in ("Host", "content-LENGTH", "Transfer-Encoding", "connection"):
            self.refused("http_headers" + self.shown(name), http_headers={name: "1"})
        for name in ("", "a b", "a:b", "a\r\nb", "é", "a\n", " a"):
            with self.subTest(name=name):
                self.refused(
                    "http_headers" + self.shown(name), http_headers={name: "1"}
                )
        for value in ("a\r\nX: b", "\0", "€", "\x7f", 5, None, b"x", ["a"]):
            with self.subTest(value=value):
                self.refused("http_headers.x", http_headers={"x": value})
        self.refused("http_headers[5]", http_headers={5: "x"})
        self.refused("http_headers['X-A']", http_headers={"x-a": "1", "X-A": "2"})

    @staticmethod
    def shown(name):
        return "." + name if name.isidentifier() else "[%r]" % name

    def test_the_key_is_in_no_text_of_ours(self):
        """Whatever goes wrong, and although the server repeats the key."""

        def echo(handler):
            handler.wfile.write(SECRET.encode("latin-1") + b"\r\n\r\n")
            handler.close_connection = True

        escaped = urllib.parse.quote(SECRET, safe="")
        steps = [
            dict(status=401, body={"message": "no key " + SECRET}),
            dict(
                status=400, body={"error": {"message": "no %s, %s" % (SECRET, escaped)}}
            ),
            dict(status=500, body="<p>%s</p>" % SECRET),
            dict(status=400, body={"oddly": SECRET}),
            dict(body="[%s]" % json.dumps(SECRET)),
            dict(status=302, headers={"Location": "http://x/?key=" + escaped}),
            dict(status=503, body=SECRET),  # is logged, as it is retried
            echo,
            hang_up,
            reset,
        ]
        backoff = orq_min.BackoffStrategy(1, 1, 1, 20)
        config = orq_min.RetryConfig("backoff", backoff, False)
        with client(self.service, api_key=SECRET, retry_config=config) as orq:
            texts = [repr(x) for x in (orq, orq.agents, orq.agents.responses)]
            create = orq.agents.responses.create
            prepared = orq.agents.responses.prepare(agent_key="a", message="hi")
            texts += [repr(prepared), str(prepared)]
            logger = logging.getLogger(orq_min.__name__)
            with self.assertLogs(logger, logging.DEBUG) as logs:
                for n, step in enumerate(steps):
                    self.service.next(step)
                    agent = SECRET if n % 2 else "my-agent"  # even as the agent
                    with self.assertRaises(orq_min.OrqError) as caught:
                        create(agent_key=agent, message="hi")
                    error = caught.exception
                    lines = traceback.format_exception(
                        type(error), error, error.__traceback__
                    )
                    texts += [str(error), repr(error), "".join(lines)]
                    texts.append(str(getattr(error, "message", "")))
        forms = {SECRET, escaped, json.dumps(SECRET)[1:-1], repr(SECRET)[1:-1]}
        for text in texts + logs.output:
            for form in forms:
                self.assertNotIn(form, text)
            self.assertNotIn("sk-SECRET", text)

    def test_the_body_of_an_error_stays_as_it_came(self):
        body = "<p>%s</p>" % self.service.key
        self.service.next(dict(status=500, body=body))
        with self.assertRaises(orq_min.APIError) as caught:
            self.create()
        self.assertEqual(caught.exception.body, body)
        self.assertIn("<p>***</p>", str(caught.exception))


# ----------------------------------------------------------------------------
# This file's own commands
# ----------------------------------------------------------------------------


class ToPlayWith(unittest.TestCase):
    """`demo` and `serve` need no account."""

    def start(self, *argv):
        process = subprocess.Popen(
            [sys.executable, "-W", "error", os.path.abspath(__file__), *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=clean_environment(PYTHONPATH=os.path.dirname(MODULE)),
        )
        watchdog = threading.Timer(30, process.kill)
        watchdog.start()
        self.addCleanup(watchdog.cancel)
        return process

    def test_demo_shows_what_was_run_and_what_came_back(self):
        with self.start("demo", 'Hi "there"') as process:
            out, err = process.communicate(timeout=30)
        self.assertEqual((process.returncode, err), (0, b""))
        self.assertRegex(out.decode(), r"python3 .*orq_min\.py my-agent 'Hi \"there\"'")
        self.assertIn(b'\nYou said: Hi "there"\n', out)

    @unittest.skipIf(os.name == "nt", "there is no SIGINT to send")
    def test_serve_runs_until_ctrl_c(self):
        # where a shell's `&` has it ignored, a child would inherit that
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.addCleanup(signal.signal, signal.SIGINT, before)
        with self.start("serve") as process:
            lines = [process.stdout.readline().decode() for _ in range(4)]
            given = dict(re.findall(r"export (\w+)=(\S+)\n", "".join(lines)))
            done = run("my-agent", "hi", env=given)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
        self.assertEqual(done.stdout, b"You said: hi\n")
        self.assertIn("orq_min.py my-agent", lines[2])
        self.assertEqual((process.returncode, out, err), (0, b"", b""))


try:
    import pty
except ImportError:  # Windows
    pty = None

posix_only = unittest.skipUnless(os.name == "posix", "needs a POSIX system")


# ----------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------


def answer_of(text, **more):
    """An answer in which the agent says this."""
    parts = [{"kind": "text", "text": text}]
    output = [{"role": "agent", "parts": parts}]
    return dict({"_id": "r1", "task_id": "t1", "output": output}, **more)


def at_once(function, cases):
    """The results for all cases, some at a time: starting a Python takes a while."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return list(pool.map(function, cases))


class CommandTest(LoopbackTest):
    """Runs the real command line against the stand-in."""

    def setUp(self):
        super().setUp()
        self.env = {"ORQ_API_KEY": self.service.key, "ORQ_BASE_URL": self.service.url}
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)

    def command(self, *argv, env=None, **options):
        return run(*argv, env=dict(self.env, **(env or {})), **options)

    def start(self, *argv, **options):
        """Start it, with what `run` cannot give; SIGINT is not ignored."""
        ours = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
        ours.update(stderr=subprocess.PIPE, env=clean_environment(**self.env))
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            process = subprocess.Popen(
                [sys.executable, "-W", "error", MODULE, *argv], **dict(ours, **options)
            )
        finally:
            signal.signal(signal.SIGINT, before)
        self.addCleanup(process.wait, 30)
        self.addCleanup(process.kill)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream:
                self.addCleanup(stream.close)
        return process

    def shell(self, line, *argv):
        """Run it in a shell line, in which "$@" is the command."""
        return subprocess.run(
            ["sh", "-c", line, "sh", sys.executable, "-W", "error", MODULE, *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=clean_environment(**self.env),
            timeout=30,
        )

    def write(self, name, content):
        path = os.path.join(self.folder, name)
        with open(path, "wb") as stream:
            stream.write(content if isinstance(content, bytes) else content.encode())
        return path

    def said(self, *argv, **options):
        """What it prints when all goes well; standard error must be empty."""
        done = self.command(*argv, **options)
        self.assertEqual((done.stderr, done.returncode), (b"", 0))
        return done.stdout.decode()

    def sent(self, *argv, **options):
        """The body that it sends when all goes well."""
        self.said(*argv, **options)
        return self.service.requests[-1].json()

    def assertAllSend(self, wanted, argvs, **options):
        """All these command lines send the same body."""
        at_once(lambda argv: self.said(*argv, **options), argvs)
        bodies = [request.json() for request in self.service.requests]
        self.assertEqual(bodies, [wanted] * len(argvs))

    def assertFails(self, done, status, *words):
        """One line on standard error with these words, and nothing else."""
        error = done.stderr.decode()
        self.assertEqual(done.returncode, status, error)
        self.assertEqual(done.stdout, b"")
        self.assertRegex(error, r"\Aorq_min: [^\r\n]+\n\Z")
        self.assertNotIn("Traceback", error)
        self.assertNotIn(self.service.key, error)
        for word in words:
            self.assertIn(word, error)


def only_text(text):
    return {"role": "user", "parts": [{"kind": "text", "text": text}]}


class TheCommandTakesAMessage(CommandTest):
    """What is typed, piped or named reaches the service as it was meant."""

    def test_a_message_is_sent_and_only_the_answer_is_printed(self):
        self.assertEqual(self.said("my-agent", "Hello"), "You said: Hello\n")
        (request,) = self.service.requests
        self.assertEqual(request.header("authorization"), ["Bearer test-key-123"])
        body = {"message": only_text("Hello"), "background": False}
        self.assertEqual(request.json(), body)

    def test_each_option_sets_its_field(self):
        task_id = self.create().task_id
        options = ["--task-id", task_id, "--variables", '{"n": [1, null]}']
        options += ["--metadata", '{"m": 1.5}', "--contact", '{"id": "c", "tags": []}']
        options += ["--thread", '{"id": "t"}', "--memory", '{"entity_id": "e"}']
        options += ["--extra-body", '{"engine": "x"}', "--background"]
        wanted = {
            "message": only_text("Hello"),
            "task_id": task_id,
            "variables": {"n": [1, None]},
            "metadata": {"m": 1.5},
            "contact": {"id": "c", "tags": []},
            "thread": {"id": "t"},
            "memory": {"entity_id": "e"},
            "engine": "x",
            "background": True,
        }
        self.assertEqual(self.sent(*options, "my-agent", "Hello"), wanted)

    def test_options_stand_before_between_and_after_the_positionals(self):
        wanted = dict(message=only_text("Hello"), thread={"id": "t"}, background=False)
        argvs = [
            ["--thread", "t", "my-agent", "Hello"],
            ["my-agent", "--thread", "t", "Hello"],
            ["my-agent", "Hello", "--thread", "t"],
            ["--thread=t", "my-agent", "--no-retry", "Hello", "--timeout", "20"],
        ]
        self.assertAllSend(wanted, argvs)

    def test_a_message_that_begins_with_a_dash_follows_two_dashes(self):
        wanted = {"message": only_text("--json"), "background": False}
        argvs = [
            ["my-agent", "--", "--json"],
            ["--", "my-agent", "--json"],
            ["my-agent", "--no-retry", "--", "--json"],
            ["--no-retry", "my-agent", "--", "--json"],
        ]
        self.assertAllSend(wanted, argvs)

    def test_a_value_is_read_from_a_file(self):
        message = {"role": "user", "parts": [{"kind": "text", "text": "grüß"}]}
        content = json.dumps(message, ensure_ascii=False).encode("utf-8")
        text = self.write("message.json", content)
        windows = self.write("bom.json", b"\xef\xbb\xbf" + b'{"id": "a"}\r\n')
        place = "@" + self.write("object.json", b'{"a": 1}')
        argv = ["my-agent", "--message", "@" + text, "--contact", "@" + windows]
        argv += ["--variables", place, "--metadata", place, "--thread", "@" + windows]
        body = self.sent(*argv, "--extra-body", "@" + self.write("e", '{"engine":"x"}'))
        self.assertEqual(body["message"], message)
        self.assertEqual((body["contact"], body["thread"]), ({"id": "a"},) * 2)
        self.assertEqual((body["variables"], body["metadata"]), ({"a": 1},) * 2)
        self.assertEqual(body["engine"], "x")

    def test_name_and_value_may_be_repeated_and_the_value_is_text(self):
        values = ["n=1", "e=a=b", "empty=", "who=@me", 'o={"a": 1}', '{"j": 2}']
        wanted = dict(n="1", e="a=b", empty="", who="@me", o='{"a": 1}', j=2)
        argv = [["--variables", value, "--metadata", value] for value in values]
        body = self.sent("my-agent", "Hello", *itertools.chain(*argv))
        self.assertEqual(body["variables"], wanted)
        self.assertEqual(body["metadata"], wanted)

    def test_a_bare_word_is_the_id(self):
        argv = ["--contact", "12", "--thread", "true", "--memory", "ada@example.com"]
        body = self.sent("my-agent", "Hello", *argv)
        self.assertEqual(body["contact"], {"id": "12"})
        self.assertEqual(body["thread"], {"id": "true"})
        self.assertEqual(body["memory"], {"entity_id": "ada@example.com"})

    def test_files_are_attached_after_the_text_in_order(self):
        path = self.write("report.pdf", b"%PDF")
        url = "https://example.com/a/figures.csv?x=1"
        body = self.sent("my-agent", "Hello", "--file", path, "--file", url)
        text, first, second = body["message"]["parts"]
        self.assertEqual(text, {"kind": "text", "text": "Hello"})
        content = base64.b64encode(b"%PDF").decode()
        file = {"bytes": content, "mimeType": "application/pdf", "name": "report.pdf"}
        self.assertEqual(first, {"kind": "file", "file": file})
        self.assertEqual(second["kind"], "file")
        self.assertEqual(second["file"]["uri"], url)

    def test_a_whole_message_is_given_as_json(self):
        message = {"role": "user", "parts": [], "messageId": "01K6"}
        sent = self.sent("my-agent", "--message", json.dumps(message))
        self.assertEqual(sent["message"], message)

    def test_standard_input_is_the_message_when_asked_for_or_alone(self):
        wanted = {"message": only_text("zwei\nZeilen – ü"), "background": False}
        argvs = [["my-agent"], ["my-agent", "-"], ["--timeout", "20", "my-agent"]]
        stdin = "zwei\nZeilen – ü\n".encode("utf-8")
        ascii_only = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
        given = dict(stdin=stdin, env=dict(ascii_only, PYTHONIOENCODING="utf-8"))
        self.assertAllSend(wanted, argvs, **given)
        for given, sent in ((b"a\n\n", "a\n"), (b"a\r\n\r\n", "a\r\n"), (b"a", "a")):
            body = self.sent("my-agent", stdin=given)  # without its last newline
            self.assertEqual(body["message"], only_text(sent))
        path = self.write("a.txt", b"a")
        body = self.sent("my-agent", "-", "--file", path, stdin=b"both")
        self.assertEqual(
            [p["kind"] for p in body["message"]["parts"]], ["text", "file"]
        )

    def test_standard_input_is_not_read_when_something_else_says_what_to_send(self):
        path = self.write("a.txt", b"a")
        task = self.create(message="weather")
        call_id = task.pending_tool_calls[0].id
        whole = json.dumps(only_text("whole"))
        running = []
        for argv in (
            ["Hello"],
            ["--message", whole],
            ["--file", path],
            ["--task-id", task.task_id, "--tool-result", call_id + "=1"],
        ):
            # a pipe that stays open: who reads it waits for ever
            process = self.start("my-agent", *argv, stdin=subprocess.PIPE)
            running.append((argv, process))
        for argv, process in running:
            with self.subTest(argv=argv):
                self.assertEqual(process.wait(20), 0, process.stderr.read())
        sent = [request.json()["message"]["parts"] for request in self.service.requests]
        self.assertEqual([len(parts) for parts in sent], [1] * 5)

    @posix_only
    def test_text_typed_in_any_locale_arrives_as_it_was_typed(self):

        for env in ({}, dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")):
            with self.subTest(env=env):
                env = clean_environment(**dict(self.env, **env))
                argv = ["my-agent".encode(), "naïve".encode("utf-8")]
                self.start(*argv, env=env).wait(20)
                message = self.service.requests[-1].json()["message"]
                self.assertEqual(message, only_text("naïve"))
                words = "--variables a=ï --contact ï --thread {\"id\":\"ï\"} --task-id ï"
                words += " --extra-body {\"ï\":1} --dry-run my-agent naïve"
                done = self.command(*[word.encode() for word in words.split()], env=env)
                body = json.loads(done.stdout.splitlines()[-1].decode())
                self.assertEqual(body.pop("message"), only_text("naïve"))
                expected = {"variables": {"a": "ï"}, "contact": {"id": "ï"}}
                expected.update(thread={"id": "ï"}, task_id="ï", background=False)
                self.assertEqual(body, dict(expected, **{"ï": 1}))
                path = self.write("é.json", b'{"id": "from a file"}')
                words = ["--dry-run", "--contact", "@" + path, "my-agent", "hi"]
                done = self.command(*[word.encode() for word in words], env=env)
                self.assertIn(b'"from a file"', done.stdout)

    def test_the_server_option_takes_the_place_of_the_environment(self):
        env = {"ORQ_BASE_URL": "http://127.0.0.1:1"}
        url = self.service.url + "/prefix/"
        self.said("my-agent", "Hello", "--server-url", url, env=env)
        path = "/prefix/v2/agents/my-agent/responses"
        self.assertEqual(self.service.requests[0].path, path)


class WrongUsageSendsNothing(CommandTest):
    """What is wrong is said in one line with exit status 2, and nothing is sent."""

    def main(self, argv):
        """Run it in this process, which is faster."""
        out, error = io.StringIO(), io.StringIO()
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.dict(os.environ, self.env))
            stack.enter_context(mock.patch("sys.stdin", io.StringIO("piped")))
            stack.enter_context(contextlib.redirect_stdout(out))
            stack.enter_context(contextlib.redirect_stderr(error))
            try:
                status = orq_min.main(argv)
            except SystemExit as end:
                status = end.code
        streams = [stream.getvalue().encode() for stream in (out, error)]
        return subprocess.CompletedProcess(argv, status, *streams)

    def assertRefused(self, *cases, **options):
        """Each case is its arguments and the words that its error must hold."""
        if options:
            results = at_once(lambda case: self.command(*case[0], **options), cases)
        else:
            results = [self.main(argv) for argv, *_ in cases]
        for (argv, *words), done in zip(cases, results):
            with self.subTest(argv=argv):
                self.assertFails(done, 2, *words)
        self.assertEqual(self.service.requests, [])

    def test_what_cannot_go_together_is_refused(self):
        message = ["--message", json.dumps(only_text("x"))]
        result, file = ["--tool-result", "c=1"], ["--file", self.write("a", b"a")]
        together = [
            ["Hello", *message],
            ["-", *message],
            ["", *message],
            ["Hello", *result],
            [*message, *result],
            [*message, *file],
            [*result, *file],
            ["Hello", "--retry", "--no-retry"],
            ["Hello", "world"],
        ]
        cases = [[["my-agent", *argv]] for argv in together]
        self.assertRefused(*cases)
        self.assertRefused(*cases[:2], stdin=b"piped")

    def test_an_empty_message_with_nothing_attached_is_refused(self):
        empty = ["my-agent"], "empty"
        self.assertRefused(empty, (["my-agent", ""], "empty"), stdin=b"")
        self.assertRefused((["my-agent", "-"], "empty"), empty, stdin=b"\n")

    def test_a_missing_agent_or_key_is_said(self):
        self.assertRefused(
            ([], "AGENT_KEY"),
            (["", "Hello"], "agent_key"),
            (["..", "Hello"], "agent_key"),
        )
        case = ["my-agent", "Hello"], "ORQ_API_KEY"
        self.assertRefused(case, env={"ORQ_API_KEY": " \n"})

    def test_wrong_values_are_named(self):
        missing = os.path.join(self.folder, "missing")
        empty = self.write("empty", b"")
        wrong = [
            (["--nonsense"], "--nonsense"),
            (["--contact", '{"id": "a", "display_nmae": "b"}'], "display_name"),
            (["--contact", "[1]"], "contact"),
            (["--variables", "[1]"], "--variables"),
            (["--variables", "word"], "--variables"),
            (["--variables", '{"a": [NaN]}'], "variables.a[0]"),
            (["--variables", "[" * 100000], "--variables"),
            (["--metadata", "{"], "--metadata"),
            (["--thread", "@" + missing], missing),
            (["--memory", "@" + empty], "--memory"),
            (["--extra-body", '{"task_id": "x"}'], "task_id"),
            (["--extra-body", "word"], "--extra-body"),
            (["--file", missing], missing),
            (["--file", self.folder], self.folder),
            (["--file", empty], empty),
            (["--timeout", "soon"], "--timeout"),
            (["--timeout", "0"], "timeout"),
            (["--timeout", "-1"], "timeout"),
            (["--timeout", "nan"], "timeout"),
            (["--timeout", "inf"], "timeout"),
            (["--server-url", "ftp://127.0.0.1"], "server_url"),
            (["--server-url", "http://u:%s@x" % self.service.key], "server_url"),
            (["--serv", self.service.url], "--serv"),  # no abbreviations: they break
            (["--dry-run", "--timeout", "0"], "timeout"),
        ]
        self.assertRefused(*((["my-agent", "Hello", *argv], w) for argv, w in wrong))

    def test_wrong_messages_and_results_are_named(self):
        wrong = [
            (["--message", "hello"], "--message"),
            (["--message", '{"role": "user"}'], "message.parts"),
            (["--message", "[]"], "message"),
            (["--message", "null"], "message"),
            (["--tool-result", "call"], "--tool-result"),
            (["--tool-result", "=1"], "--tool-result"),
            (["--tool-result", "call="], "--tool-result"),
            (["--tool-result", "call=sunny"], "--tool-result"),
        ]
        self.assertRefused(*((["my-agent", *argv], word) for argv, word in wrong))
        self.assertRefused((["my-agent", "-"], "UTF-8"), stdin=b"\xff\xfe")

    @unittest.skipUnless(pty, "needs a terminal")
    def test_a_terminal_is_not_waited_for(self):
        master, slave = pty.openpty()
        self.addCleanup(os.close, master)
        self.addCleanup(os.close, slave)
        process = self.start("my-agent", stdin=slave)
        self.assertEqual(process.wait(20), 2)
        self.assertIn(b"MESSAGE", process.stderr.read())


class StandardOutputHoldsTheAnswer(CommandTest):
    """Standard output holds the answer alone, in any locale, and --json all of it."""

    LOCALES = (
        {"LC_ALL": "C"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
    )
    ODD_TEXT = "na\u00efve \U0001f389 \ud800 end"

    def run_in_locales(self, answer, *options):
        def command(env):
            return env, self.command("my-agent", "Hello", *options, env=env)

        self.service.next(*[{"body": answer}] * len(self.LOCALES))
        return at_once(command, self.LOCALES)

    def test_any_text_is_printed_in_any_locale(self):
        for env, done in self.run_in_locales(answer_of(self.ODD_TEXT)):
            with self.subTest(env=env):
                self.assertEqual((done.stderr, done.returncode), (b"", 0))
                self.assertRegex(done.stdout, rb"\Ana.{1,4}ve .+ \\ud800 end\n\Z")

    def test_json_is_the_whole_answer_indented_in_any_locale(self):
        answer = answer_of(self.ODD_TEXT, new_field=[1.5, None, {"a": "\u2028"}])
        for env, done in self.run_in_locales(answer, "--json"):
            with self.subTest(env=env):
                self.assertEqual((done.stderr, done.returncode), (b"", 0))
                encoding = env.get("PYTHONIOENCODING", "utf-8")
                self.assertEqual(json.loads(done.stdout.decode(encoding)), answer)
                self.assertIn(b'\n  "', done.stdout)
                if env == {"LC_ALL": "C"}:  # which is UTF-8 to Python
                    self.assertIn("na\u00efve".encode(), done.stdout)

    def test_a_deeply_nested_answer_is_printed_as_far_as_python_reads_it(self):
        for depth in (900, 1200):
            deep = "[" * depth + "]" * depth
            body = ('{"_id": "r", "deep": %s}' % deep).encode()
            self.service.next({"body": body})
            done = self.command("my-agent", "Hello", "--json")
            if b"is not a JSON object" in done.stderr:
                self.assertGreater(depth, 900)  # it could not be read
                continue
            self.assertEqual((done.stderr, done.returncode), (b"", 0))
            printed = b"".join(done.stdout.split())
            self.assertEqual(printed, body.replace(b" ", b""))

    def test_an_error_in_any_script_is_printed_in_any_locale(self):
        for env in self.LOCALES[1:3]:
            self.service.next(
                {"status": 400, "body": {"message": "schlie\u00dfen \u4e2d"}}
            )
            done = self.command("my-agent", "Hello", env=env)
            self.assertFails(done, 1, "schlie\\xdfen \\u4e2d")

    def test_an_answer_without_text_prints_nothing(self):
        self.service.next({"body": {"_id": "r1"}})
        self.assertEqual(self.said("my-agent", "Hello"), "")

    def test_background_prints_the_task_id(self):
        task_id = self.said("my-agent", "Hello", "--background")
        self.assertEqual([task_id], [name + "\n" for name in self.service.tasks])
        whole = json.loads(self.said("my-agent", "Hello", "--background", "--json"))
        self.assertIn(whole["task_id"], self.service.tasks)

    def test_a_dry_run_needs_no_key_and_no_network(self):
        env = {"ORQ_BASE_URL": "http://unknown.invalid/prefix"}
        done = run("my-agent", "Hello", "--thread", "t", "--dry-run", env=env)
        self.assertEqual((done.stderr, done.returncode), (b"", 0))
        head, _, body = done.stdout.decode().partition("\n\n")
        first, *headers = head.split("\n")
        url = "http://unknown.invalid/prefix/v2/agents/my-agent/responses"
        self.assertEqual(first, "POST " + url)
        headers = dict(line.split(": ", 1) for line in headers)
        self.assertRegex(headers["Authorization"], r"\A(Bearer )?\*+\Z")
        self.assertEqual(headers["Content-Type"], "application/json")
        wanted = {"message": only_text("Hello"), "thread": {"id": "t"}}
        self.assertEqual(json.loads(body), dict(wanted, background=False))

    def test_a_dry_run_shows_what_is_then_sent(self):
        argv = ["my-agent", "Hello", "--variables", "a=b"]
        shown = self.said(*argv, "--dry-run")
        self.assertEqual(self.service.requests, [])
        self.assertNotIn(self.service.key, shown)
        self.said(*argv)
        (request,) = self.service.requests
        self.assertEqual(shown.partition("\n\n")[2].strip(), request.body.decode())
        for name, value in request.headers:
            if name != "Authorization" and name.lower() != "connection":
                self.assertIn("%s: %s\n" % (name, value), shown)

    def test_the_version_is_printed(self):
        for option in ("-v", "--version"):
            self.assertEqual(self.said(option), "orq_min %s\n" % orq_min.__version__)

    def test_verbose_tells_more_on_standard_error_only(self):
        done = self.command("-v", "my-agent", "Hello")
        self.assertEqual((done.stdout, done.returncode), (b"You said: Hello\n", 0))
        self.assertIn(b"200", done.stderr)
        self.assertNotIn(self.service.key.encode(), done.stderr)

    def test_help_names_the_exit_statuses_and_the_environment(self):
        shown = self.said("--help")
        for word in ("AGENT_KEY", "MESSAGE", "ORQ_API_KEY", "ORQ_BASE_URL", "130"):
            self.assertIn(word, shown)
        self.assertNotIn(self.service.key, shown)

    @posix_only
    def test_head_ends_it_quietly(self):
        self.service.next({"body": answer_of("line\n" * 200000)})
        process = self.start("my-agent", "Hello")
        self.assertEqual(process.stdout.readline(), b"line\n")
        process.stdout.close()
        self.assertEqual(process.stderr.read(), b"")
        self.assertEqual(process.wait(20), 0)

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_a_full_disk_is_an_error_in_one_line(self):
        done = self.shell('"$@" >/dev/full', "my-agent", "Hello")
        self.assertRegex(done.stderr.decode(), r"\Aorq_min: [^\n]+\n\Z")
        self.assertNotEqual(done.returncode, 0)
        done = self.shell('"$@" >/dev/full', "my-agent", "--dry-run", "Hello")
        self.assertRegex(done.stderr.decode(), r"\Aorq_min: [^\n]+\n\Z")
        self.assertNotEqual(done.returncode, 0)

    @posix_only
    def test_a_full_standard_error_changes_no_exit_status(self):
        cases = [
            (["my-agent", "Hello"], 0),
            (["unknown", "Hello"], 1),
            (["--bogus"], 2),
            (["my-agent", "Hello", "--no-retry", "--server-url", closed_url()], 3),
        ]
        for argv, status in cases:
            done = self.shell('"$@" 2>/dev/full', *argv)
            self.assertEqual(done.returncode, status, argv)

    @posix_only
    def test_closed_streams_do_no_harm(self):
        said = b"You said: Hello\n"
        cases = [
            ('"$@" <&-', ["my-agent", "Hello"], 0, said),
            ('"$@" <&-', ["my-agent"], 2, b""),
            ('"$@" 2>&-', ["my-agent", "Hello"], 0, said),
            ('"$@" 2>&-', ["my-agent", ""], 2, b""),
            ('"$@" 2>&-', ["unknown", "Hello"], 1, b""),
            ('"$@" <&- >&- 2>&-', ["my-agent", "Hello"], 0, b""),
        ]
        results = at_once(lambda case: self.shell(case[0], *case[1]), cases)
        for (line, argv, status, out), done in zip(cases, results):
            with self.subTest(line=line, argv=argv):
                self.assertEqual((done.stdout, done.returncode), (out, status))
                self.assertNotIn(b"Traceback", done.stderr)


class StandardErrorHoldsTheRest(CommandTest):
    """Standard error tells what is waited for, and what to do next."""

    def test_each_retry_is_shown_with_its_reason(self):
        again = {"status": 503, "headers": {"retry-after-ms": "20"}}
        self.service.next(dict(again, body=self.service.key), again)
        done = self.command("my-agent", "Hello")
        self.assertEqual((done.stdout, done.returncode), (b"You said: Hello\n", 0))
        lines = done.stderr.decode().splitlines()
        self.assertEqual(len(lines), 2, lines)
        for number, line in enumerate(lines, 1):
            self.assertRegex(line, r"\Aorq_min: .*503")
            self.assertRegex(line, r"\b%d\b.*\b0\.0" % number)
        self.assertNotIn(b"\r", done.stderr)  # it is no terminal
        self.assertNotIn(self.service.key.encode(), done.stderr)

    def test_what_is_retried_can_be_chosen(self):
        for options, step, attempts in (
            (["--no-retry"], {"status": 503}, 1),
            ([], {"status": 500}, 1),
            ([], hang_up, 1),
            (["--retry"], {"status": 500, "headers": {"retry-after-ms": "20"}}, 2),
        ):
            with self.subTest(options=options, step=step):
                del self.service.requests[:]
                self.service.next(step)
                self.command("my-agent", "Hello", *options)
                self.assertEqual(len(self.service.requests), attempts)

    def shown_options(self, done):
        """The options that are shown for the pending tool calls."""
        self.assertEqual(done.returncode, 0, done.stderr)
        found = re.findall("(--task-id.*)", done.stderr.decode())
        return [shlex.split(options) for options in found]

    def test_the_option_shown_for_a_tool_call_answers_it(self):
        done = self.command("my-agent", "the weather?")
        self.assertEqual(done.stdout, b"Let me look that up.\n")
        self.assertIn(b'get_weather({"city": "Paris"})', done.stderr)
        (options,) = self.shown_options(done)
        options = [option.replace("=JSON", '={"sky": "clear"}') for option in options]
        said = self.said("my-agent", *options)
        self.assertEqual(said, 'The tool says: {"sky": "clear"}\n')
        part = self.service.requests[-1].json()["message"]["parts"][0]
        self.assertEqual(part["result"], {"sky": "clear"})

    def test_the_option_shown_is_safe_to_paste_whatever_the_ids_are(self):
        ids = ["a b", "$(touch x)'\"", "-dash", "-v"]
        calls = [{"id": name, "function": {"name": "f"}} for name in ids]
        answer = answer_of("", task_id="-t t", pending_tool_calls=calls)
        self.service.next({"body": answer}, {"body": answer_of("done")})
        shown = self.shown_options(self.command("my-agent", "Hello"))
        options = [option.replace("JSON", "[1]") for option in sum(shown, [])]
        body = self.sent("my-agent", *options)
        self.assertEqual(body["task_id"], "-t t")
        results = [
            (part["tool_call_id"], part["result"]) for part in body["message"]["parts"]
        ]
        self.assertEqual(results, [(name, [1]) for name in ids])

    def test_surprising_tool_calls_do_no_harm(self):
        odd = ["x", {}, [None, {}, {"id": 1, "function": "f"}], [[]]]
        steps = [{"body": answer_of("ok", pending_tool_calls=calls)} for calls in odd]
        self.service.next(*steps)
        for done in at_once(lambda step: self.command("my-agent", "Hello"), steps):
            self.assertEqual((done.stdout, done.returncode), (b"ok\n", 0))
            self.assertNotIn(b"Traceback", done.stderr)

    def test_several_results_are_sent_together(self):
        argv = ["--tool-result", 'a={"x": "="}', "--tool-result", "b=null"]
        self.service.next({"body": answer_of("done")})
        message = self.sent("my-agent", "--task-id", "t", *argv)["message"]
        self.assertEqual(message["role"], "tool")
        first, second = message["parts"]
        self.assertEqual((first["tool_call_id"], first["result"]), ("a", {"x": "="}))
        self.assertEqual((second["tool_call_id"], second.get("result")), ("b", None))

    @unittest.skipUnless(pty, "needs a terminal")
    def test_only_a_terminal_sees_the_seconds_and_the_task_to_continue(self):
        master, slave = pty.openpty()
        self.addCleanup(os.close, master)
        self.service.next({"delay": 1.4}, {"delay": 1.4})
        seen = self.start("my-agent", "Hello", stderr=slave)
        os.close(slave)
        unseen = self.start("my-agent", "Hello")
        shown = b""
        with contextlib.suppress(OSError):  # what Linux says at the end
            for _ in range(100):
                block = os.read(master, 4096)
                shown += block
                if not block:
                    break
        self.assertEqual((seen.wait(20), unseen.wait(20)), (0, 0))
        self.assertEqual(seen.stdout.read(), b"You said: Hello\n")
        self.assertIn(b"1 s", shown)
        task_id = re.search(rb"--task-id[ =](\S+)", shown).group(1).decode()
        self.assertIn(task_id, self.service.tasks)
        self.assertEqual(unseen.stderr.read(), b"")


class TheExitStatusTells(CommandTest):
    """The exit status says what happened, with one line and no traceback."""

    def test_an_error_of_the_service_is_1(self):
        self.assertFails(self.command("unknown", "Hello"), 1, "404", "no agent")
        env = {"ORQ_API_KEY": "other-key"}
        done = self.command("my-agent", "Hello", env=env)
        self.assertFails(done, 1, "401", "invalid API key")
        self.assertNotIn(b"other-key", done.stderr)
        html = "<html>\n<h1>gateway\x1b[31m</h1>\r\n" + "x" * 100000
        for step in (
            {"status": 200, "body": html},
            {"status": 302, "headers": {"Location": "http://127.0.0.1:1/"}},
            {"status": 400, "body": {"message": "your key is " + self.service.key}},
        ):
            with self.subTest(step=step):
                self.service.next(step)
                done = self.command("my-agent", "Hello")
                self.assertFails(done, 1, str(step["status"]))
                self.assertLess(len(done.stderr), 2000)
                self.assertNotIn(b"\x1b", done.stderr)

    def test_no_answer_is_3(self):
        url = closed_url()
        self.service.next(hang_up, {"delay": 20})
        started = time.monotonic()
        refused, *others = at_once(
            lambda options: self.command("my-agent", "Hello", *options),
            [["--no-retry", "--server-url", url]] + [["--timeout", "0.4"]] * 2,
        )
        self.assertFails(refused, 3, url)
        for done in others:
            self.assertFails(done, 3)
        errors = b"".join(done.stderr for done in others)
        self.assertIn(b"0.4 s", errors)
        self.assertIn(b"closed", errors)
        self.assertLess(time.monotonic() - started, 15)

    @posix_only
    def test_an_interrupt_is_130_wherever_it_comes(self):
        waiting = {"status": 503, "headers": {"Retry-After": "20"}}
        for name, step in (("answer", {"delay": 20}), ("retry", waiting)):
            with self.subTest(waits_for=name):
                count = len(self.service.requests)
                self.service.next(step)
                process = self.start("my-agent", "Hello")
                wait_until(lambda: len(self.service.requests) > count)
                if name == "retry":
                    self.assertIn(b"503", process.stderr.readline())
                self.assertInterrupted(process)

    @posix_only
    def test_an_interrupt_while_standard_input_is_read_is_130(self):
        process = self.start("my-agent", stdin=subprocess.PIPE)
        process.stdin.write(b"x" * 2**18)  # more than a pipe holds: it reads
        time.sleep(0.3)  # CPython may miss a signal between two reads
        self.assertInterrupted(process)

    def assertInterrupted(self, process):
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        self.assertEqual(process.wait(20), 130)
        self.assertLess(time.monotonic() - started, 5)
        self.assertNotIn(b"Traceback", process.stderr.read())
        self.assertEqual(process.stdout.read(), b"")


def closed_url():
    """A URL on which nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return "http://127.0.0.1:%d" % sock.getsockname()[1]


def wait_until(condition):
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within 20 s")


# ----------------------------------------------------------------------------
# Retries
# ----------------------------------------------------------------------------


def cut_off(handler):
    """A step that breaks off within the body."""
    handler.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"output":')
    handler.close_connection = True


class RetryTest(LoopbackTest):
    """Sleeps at once: `waits` are the seconds that the client would have slept."""

    def setUp(self):
        super().setUp()
        self.waits = []
        self.uniform = random.uniform
        monotonic, clock = time.monotonic, time.time
        for name, fake in (
            ("time.sleep", self.waits.append),
            ("time.monotonic", lambda: monotonic() + sum(self.waits)),
            ("time.time", lambda: clock() + sum(self.waits)),
            ("random.uniform", lambda low, high: high),
        ):
            patch = mock.patch(name, fake)
            patch.start()
            self.addCleanup(patch.stop)

    def waits_after(self, *headers, times=1, **given):
        """Have the service fail so often with 503; return the waits of one call."""
        del self.waits[:]
        self.service.next(*[{"status": 503, "headers": dict(headers)}] * times)
        self.assertEqual(self.create(**given).text, "You said: hi")
        return [round(wait, 6) for wait in self.waits]

    def refused(self, **given):
        """The waits of a call to a server that is not there."""
        with self.assertRaises(orq_min.APIConnectionError):
            self.create(server_url=closed_url(), **given)
        return self.waits


def backoff(*given, **more):
    return orq_min.RetryConfig("backoff", orq_min.BackoffStrategy(*given), **more)


class WaitsBetweenAttempts(RetryTest):
    """How long is waited: doubling, as the server asks, and never past the end."""

    def test_the_default_waits_half_a_second_doubling_to_8_within_30(self):
        self.assertEqual(self.refused(), [0.5, 1, 2, 4, 8, 8])
        self.service.next(*[{"status": 503}] * 20)
        with self.assertRaises(orq_min.APIError) as caught:
            self.create()
        self.assertEqual(caught.exception.status_code, 503)
        self.assertEqual(len(self.service.requests), 7)

    def test_the_default_waits_are_not_all_alike(self):
        seen = []
        for _ in range(8):
            with mock.patch("random.uniform", self.uniform):
                seen += self.waits_after()
        self.assertGreater(len(set(seen)), 1)
        self.assertTrue(all(0.375 <= wait <= 0.5 for wait in seen), seen)

    def test_waits_grow_by_the_exponent_to_the_longest(self):
        config = backoff(100, 1000, 3, 60000)
        self.assertEqual(self.waits_after(times=4, retries=config), [0.1, 0.3, 0.9, 1])

    def test_the_wait_that_the_server_asks_for_is_kept(self):
        later = email.utils.formatdate(time.time() + 20, usegmt=True)
        for headers, low, high in (
            ([("Retry-After", "3")], 3, 3),
            ([("Retry-After", " 20 ")], 20, 20),
            ([("Retry-After", "0.25")], 0.25, 0.25),
            ([("retry-after-ms", "250")], 0.25, 0.25),
            ([("Retry-After", "3"), ("Retry-After-Ms", "2500")], 2.5, 2.5),
            ([("Retry-After", later)], 15, 20),
        ):
            with self.subTest(headers=headers):
                (wait,) = self.waits_after(*headers)
                self.assertTrue(low <= wait <= high, wait)

    def test_nonsense_from_the_server_is_passed_over(self):
        past = "Wed, 21 Oct 2015 07:28:00 GMT"
        for value in ("", "soon", "-5", "nan", "inf", "-inf", "1e400", past, "0x10"):
            for name in ("Retry-After", "retry-after-ms"):
                with self.subTest(header=name, value=value):
                    self.assertEqual(self.waits_after((name, value)), [0.5])
        for date in (
            "Wed, 99 Foo 2025 07:28:00 GMT",
            "Mon, 1 Jan 0000 0:0:0 GMT",
            ", :",
        ):
            self.assertEqual(self.waits_after(("Retry-After", date)), [0.5])
        for value in ("soon", "-5", "nan", "inf"):
            with self.subTest(value=value):
                headers = ("Retry-After", "3"), ("retry-after-ms", value)
                self.assertEqual(self.waits_after(*headers), [3])

    @unittest.skipUnless(hasattr(time, "tzset"), "needs a settable time zone")
    def test_a_date_is_greenwich_time_in_each_form_that_http_knows(self):
        self.addCleanup(time.tzset)
        with mock.patch.dict(os.environ, TZ="EST5"):
            time.tzset()
            for form in (
                "%a, %d %b %Y %H:%M:%S GMT",
                "%A, %d-%b-%y %H:%M:%S GMT",
                "%a %b %d %H:%M:%S %Y",
            ):
                with self.subTest(form=form):
                    del self.waits[:]  # the clock is theirs
                    date = time.strftime(form, time.gmtime(time.time() + 20))
                    (wait,) = self.waits_after(("Retry-After", date))
                    self.assertTrue(15 <= wait <= 20, wait)

    def test_a_wait_that_would_pass_the_end_is_not_begun(self):
        later = email.utils.formatdate(time.time() + 90, usegmt=True)
        for value in ("31", "86400", later):
            with self.subTest(value=value):
                count = len(self.service.requests)
                first = {"status": 503, "headers": {"Retry-After": "1"}}
                last = {"status": 429, "headers": {"Retry-After": value}}
                self.service.next(first, last)
                del self.waits[:]
                with self.assertRaises(orq_min.APIError) as caught:
                    self.create()
                self.assertEqual(caught.exception.status_code, 429)
                self.assertEqual(self.waits, [1])
                self.assertEqual(len(self.service.requests), count + 2)

    def test_the_attempts_count_towards_the_end(self):
        self.service.next({"status": 503, "delay": 0.3}, {"status": 503})
        with self.assertRaises(orq_min.APIError):
            self.create(retries=backoff(100, 100, 1, 350))
        self.assertEqual(self.waits, [])

    def test_nothing_overflows_however_long_it_runs(self):
        waits = self.refused(retries=backoff(1, 1, 2, 4000))
        self.assertGreater(len(waits), 1030)  # 2.0**1024 is too large
        self.assertEqual(set(waits), {0.001})
        for exponent in (1e308, 10**308, 2**64):
            with self.subTest(exponent=exponent):
                del self.waits[:]
                config = backoff(500, 2000, exponent, 10000)
                self.assertEqual(self.refused(retries=config), [0.5, 2, 2, 2, 2])
        self.assertEqual(
            self.waits_after(retries=backoff(1e308, 7, 1e308, 1e308)), [0.007]
        )
        config = backoff(0, 7000, 1e308, 1e6)  # zero times what is too large is zero
        self.assertEqual(self.waits_after(times=4, retries=config), [0, 0, 0, 0])

    def test_jitter_is_added_and_bounded(self):
        config = backoff(100, 60000, 2, 60000, 50)
        self.assertEqual(self.waits_after(times=3, retries=config), [0.15, 0.25, 0.45])
        config = backoff(100, 60000, 2, 60000, 0)
        with mock.patch("random.uniform", lambda low, high: low):
            self.assertEqual(self.waits_after(times=3, retries=config), [0.1, 0.2, 0.4])


class WhatIsRetried(RetryTest):
    """What is tried again: as the README's table says, or as the caller chose."""

    FAILURES = (  # those of each row of the table
        ("refused", "http://again.invalid"),
        ({"status": 429}, {"status": 503}),
        ({"status": 500}, {"status": 502}, {"status": 504}),
        ({"delay": 9}, reset, hang_up, cut_off),
        (
            "http://unknown.invalid",
            {"status": 400},
            {"status": 401},
            {"status": 501},
            {"status": 200, "body": b"<html>"},
            {"status": 200, "body": []},
        ),
    )

    def setUp(self):
        super().setUp()
        real = socket.getaddrinfo

        def look_up(host, *given, **more):
            if host == "again.invalid":
                raise socket.gaierror(socket.EAI_AGAIN, "try again")
            if host == "unknown.invalid":
                raise socket.gaierror(socket.EAI_NONAME, "unknown")
            return real(host, *given, **more)

        patch = mock.patch("socket.getaddrinfo", look_up)
        patch.start()
        self.addCleanup(patch.stop)

    def is_retried(self, failure, **given):
        """Whether a second attempt follows this failure."""
        del self.waits[:], self.service.requests[:]
        if isinstance(failure, str):
            given["server_url"] = closed_url() if failure == "refused" else failure
        else:
            self.service.next(failure)
        if failure == {"delay": 9}:
            given["timeout_ms"] = 150
        try:
            self.create(**given)
        except (orq_min.APIError, orq_min.APIConnectionError):
            return bool(self.waits)
        self.assertEqual(len(self.service.requests), 2)
        return True

    def test_what_is_retried_is_what_the_table_says(self):
        waits = orq_min.BackoffStrategy(max_elapsed_time=1000)
        columns = [{}] + [
            {"retries": orq_min.RetryConfig("backoff", waits, choice)}
            for choice in (False, True)
        ]
        rows = readme_table("Failure")
        self.assertEqual(len(rows), len(self.FAILURES))
        for (row, *cells), failures in zip(rows, self.FAILURES):
            for failure, column in itertools.product(failures, range(3)):
                with self.subTest(failure=failure, column=column):
                    retried = self.is_retried(failure, **columns[column])
                    self.assertEqual("retried" if retried else "no", cells[column])

    def test_none_for_connection_errors_retries_what_cannot_have_run(self):
        waits = orq_min.BackoffStrategy(max_elapsed_time=1000)
        config = orq_min.RetryConfig("backoff", waits, None)
        self.assertTrue(self.is_retried("refused", retries=config))
        self.assertFalse(self.is_retried(hang_up, retries=config))

    def test_none_and_the_strategy_none_try_once(self):
        for retries in (None, orq_min.RetryConfig("none")):
            for failure in ("refused", {"status": 503}, {"status": 500}, hang_up):
                with self.subTest(retries=retries, failure=failure):
                    self.assertFalse(self.is_retried(failure, retries=retries))

    def test_a_call_overrides_the_client_which_overrides_the_default(self):
        for of_client in (None, orq_min.RetryConfig("none")):
            with client(self.service, retry_config=of_client) as orq:
                with mock.patch.object(self, "orq", orq):
                    self.assertFalse(self.is_retried({"status": 503}))
                    config = orq_min.RetryConfig()
                    retried = self.is_retried({"status": 500}, retries=config)
                    self.assertTrue(retried)
        with client(self.service, retry_config=orq_min.RetryConfig()) as orq:
            with mock.patch.object(self, "orq", orq):
                self.assertTrue(self.is_retried({"status": 500}))
                self.assertFalse(self.is_retried({"status": 500}, retries=None))

    def test_other_statuses_take_the_place_of_the_table(self):
        for statuses, retried, not_retried in (
            (["429", "5XX"], (429, 500, 503, 501, 599), (400, 408)),
            (["5xx"], (500, 503), (429,)),
            (("4Xx", "418"), (400, 418, 429, 499), (503,)),
            (["418"], (418,), (429, 500, 503)),
            ([], (), (429, 500, 503)),
        ):
            config = orq_min.RetryConfig(status_codes_override=statuses)
            for status in retried + not_retried:
                with self.subTest(statuses=statuses, status=status):
                    step = {"status": status}
                    is_retried = self.is_retried(step, retries=config)
                    self.assertEqual(is_retried, status in retried)
        config = orq_min.RetryConfig(status_codes_override=["2XX", "200", "3XX"])
        step = {"status": 200, "body": b"<html>"}  # the agent has run
        self.assertFalse(self.is_retried(step, retries=config))

    def test_the_last_error_is_raised(self):
        self.service.next({"status": 503}, {"status": 429}, {"status": 400})
        with self.assertRaises(orq_min.APIError) as caught:
            self.create()
        self.assertEqual(caught.exception.status_code, 400)
        self.assertEqual(self.waits, [0.5, 1])


class RetrySettingsAreChecked(LoopbackTest):
    """Bad values are a ValidationError that names them, before anything is sent."""

    def assertRefused(self, path, build):
        with self.assertRaises(orq_min.ValidationError) as caught:
            build()
        self.assertEqual([found for found, _ in caught.exception.errors], [path])

    def test_bad_numbers_are_refused(self):
        bad = (-1, "1", True, float("nan"), float("inf"), [1], 10**400)
        for name in inspect.signature(orq_min.BackoffStrategy).parameters:
            for value in bad:
                with self.subTest(name=name, value=value):
                    given = {name: value}
                    self.assertRefused(name, lambda: orq_min.BackoffStrategy(**given))

    def test_bad_choices_are_refused(self):
        for name, value, path in (
            ("strategy", "linear", "strategy"),
            ("strategy", 1, "strategy"),
            ("backoff", 500, "backoff"),
            ("retry_connection_errors", "yes", "retry_connection_errors"),
            ("retry_connection_errors", 1, "retry_connection_errors"),
            ("status_codes_override", "5XX", "status_codes_override"),
            ("status_codes_override", [429], "status_codes_override[0]"),
            ("status_codes_override", ["429", None], "status_codes_override[1]"),
            ("status_codes_override", ["5X"], "status_codes_override"),
            ("status_codes_override", ["600"], "status_codes_override"),
            ("status_codes_override", ["4290"], "status_codes_override"),
            ("status_codes_override", ["429\n"], "status_codes_override"),
            ("status_codes_override", ["\u0664\u0662\u0669"], "status_codes_override"),
        ):
            with self.subTest(name=name, value=value):
                self.assertRefused(path, lambda: orq_min.RetryConfig(**{name: value}))

    def test_a_bad_policy_is_refused_at_the_call(self):
        config = orq_min.RetryConfig()
        config.backoff.exponent = "2"
        broken = "retries.backoff.exponent"
        self.assertRefused(broken, lambda: self.create(retries=config))
        for retries in ("backoff", True, {}, orq_min.BackoffStrategy()):
            with self.subTest(retries=retries):
                self.assertRefused("retries", lambda: self.create(retries=retries))
        self.assertEqual(self.service.requests, [])

    def test_the_positional_form_of_existing_programs_works(self):
        waits = orq_min.BackoffStrategy(500, 60000, 1.5, 3600000)
        config = orq_min.RetryConfig("backoff", waits, True)
        self.assertEqual(config, orq_min.RetryConfig())
        self.assertEqual(self.create(retries=config).text, "You said: hi")


class RetriesAreLogged(RetryTest):
    """Each retry is logged: why, how long, which attempt; no header and no body."""

    def test_each_retry_is_one_record_of_the_level_info(self):
        step = {"status": 503, "body": {"message": "secret-body"}}
        step["headers"] = {"X-Secret": "secret-header", "Retry-After": "3"}
        self.service.next(step, dict(step, headers={"Retry-After": "7"}))
        with self.assertLogs(orq_min.__name__, "INFO") as logs:
            self.create(http_headers={"X-Mine": "secret-mine"})
        self.assertEqual([record.levelname for record in logs.records], ["INFO"] * 2)
        messages = [record.getMessage() for record in logs.records]
        for number, (wait, message) in enumerate(zip((3, 7), messages), 1):
            self.assertRegex(message, r"\b%d\b.*\b%d(\.0)? s" % (number, wait))
            self.assertIn("503", message)
            self.assertNotRegex(message, "secret-|" + self.service.key)

    def test_a_retry_without_an_answer_is_logged_with_its_cause(self):
        self.service.next(hang_up)
        with self.assertLogs(orq_min.__name__, "INFO") as logs:
            self.create(retries=orq_min.RetryConfig())
        (message,) = [record.getMessage() for record in logs.records]
        self.assertIn("closed", message)
        self.assertNotIn(self.service.key, message)

    def test_nothing_is_logged_for_what_is_not_tried_again(self):
        self.service.next({"status": 500})
        with self.assertRaises(AssertionError):  # what assertLogs raises: no records
            with self.assertLogs(orq_min.__name__, "INFO"):
                with contextlib.suppress(orq_min.APIError):
                    self.create()


class RetriesWithAsyncio(LoopbackTest):
    """create_async follows the same policy, and never blocks the event loop."""

    def test_it_waits_without_blocking_the_loop(self):
        step = {"status": 503, "headers": {"retry-after-ms": "200"}}
        self.service.next(step, step)
        ticks = []

        async def tick():
            while True:
                ticks.append(time.monotonic())
                await asyncio.sleep(0.01)

        async def main():
            ticking = asyncio.ensure_future(tick())
            create = self.orq.agents.responses.create_async
            started = time.monotonic()
            answer = await create(agent_key="my-agent", message="hi")
            ticking.cancel()
            return answer.text, time.monotonic() - started

        with self.assertLogs(orq_min.__name__, "INFO") as logs:
            text, seconds = asyncio.run(main())
        self.assertEqual((text, len(logs.records)), ("You said: hi", 2))
        self.assertGreaterEqual(seconds, 0.39)
        self.assertGreater(len(ticks), 8)

    def test_it_tries_once_or_raises_at_once_where_create_does(self):
        create = self.orq.agents.responses.create_async
        late = {"status": 503, "headers": {"Retry-After": "31"}}
        for step, given in (({"status": 503}, {"retries": None}), (late, {})):
            self.service.next(step)
            with self.assertRaises(orq_min.APIError):
                asyncio.run(create(agent_key="my-agent", message="hi", **given))
        self.assertEqual(len(self.service.requests), 2)

    def test_a_cancelled_wait_sends_nothing_more(self):
        self.service.next({"status": 503, "headers": {"retry-after-ms": "1000"}})

        async def main():
            create = self.orq.agents.responses.create_async
            task = asyncio.ensure_future(create(agent_key="my-agent", message="hi"))
            while not self.service.requests:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            task.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await task

        asyncio.run(main())
        time.sleep(1.2)  # past the end of the wait
        self.assertEqual(len(self.service.requests), 1)


# ----------------------------------------------------------------------------
# The README
# ----------------------------------------------------------------------------

HERE = os.path.dirname(os.path.abspath(__file__))
TESTS = os.path.abspath(sys.modules[StandIn.__module__].__file__)


def readme():
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as stream:
        return stream.read()


def readme_blocks(language):
    return re.findall("^```%s\n(.*?)^```" % language, readme(), re.M | re.S)


def readme_table(*headers):
    """The rows of the one table whose header begins so, as lists of cells."""
    found = []
    for table in re.findall(r"(?:^\|.*\n)+", readme(), re.M):
        rows = [
            [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row)]
            for row in table.splitlines()
        ]
        rows = [row[1:-1] for row in rows]
        if rows[0][: len(headers)] == list(headers):
            found.append(rows[2:])
    (rows,) = found
    return rows


def code(cell):
    """What stands between back quotes in a cell."""
    return re.findall("`([^`]+)`", cell)


class TheReadmeRuns(CommandTest):
    """Each command and example of the README runs as it is printed there."""

    def setUp(self):
        super().setUp()
        shutil.copy(MODULE, os.path.join(self.folder, "orq_min.py"))
        shutil.copy(TESTS, os.path.join(self.folder, "test_orq_min.py"))
        os.mkdir(os.path.join(self.folder, "my_project"))
        self.write("report.pdf", b"%PDF")
        self.write("question.txt", b"What is a comet?\n")
        self.write("message.json", json.dumps(only_text("from a file")))
        self.write("python3", '#!/bin/sh\nexec %s -W error "$@"\n' % self.python)
        os.chmod(os.path.join(self.folder, "python3"), 0o755)
        path = self.folder + os.pathsep + os.environ.get("PATH", os.defpath)
        self.env = clean_environment(**dict(self.env, PATH=path))

    python = shlex.quote(sys.executable)

    def example(self, *argv):
        return subprocess.run(
            argv,
            cwd=self.folder,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=60,
        )

    def test_each_python_example_runs(self):
        blocks = readme_blocks("python")
        self.assertGreaterEqual(len(blocks), 8)

        def run_block(block):
            return self.example(sys.executable, "-W", "error", "-c", block)

        for block, done in zip(blocks, at_once(run_block, blocks)):
            with self.subTest(block=block):
                self.assertEqual(done.returncode, 0, done.stderr.decode())
                self.assertNotIn(b"Traceback", done.stderr)
                self.assertNotEqual(done.stdout, b"")

    @posix_only
    def test_each_shell_example_runs(self):
        demo, copy, *others = readme_blocks("sh")
        self.assertEqual(demo, "python3 test_orq_min.py demo\n")
        results = [self.example("sh", "-eu", "-c", copy)]
        results += at_once(
            lambda b: self.example("sh", "-eu", "-c", b), [demo, *others]
        )
        for done in results:
            self.assertEqual((done.stderr.decode(), done.returncode), ("", 0))
        self.assertTrue(
            os.path.exists(os.path.join(self.folder, "my_project/orq_min.py"))
        )
        said = "".join(done.stdout.decode() for done in results)
        for words in (
            "You said: Hello",
            "You said: What is a comet?",
            "You said: Summarise this [file: report.pdf",
            "You said: from a file",
            "You said: -5 degrees, is that cold?",
            "You said: Now in one sentence",
            "Authorization: ",
            "# orq_min.py " + orq_min.__version__,
        ):
            self.assertIn(words, said)
        self.assertNotIn("Bearer " + self.service.key, said)

    @posix_only
    def test_the_stand_in_says_how_to_reach_it(self):
        self.assertIn("`python3 test_orq_min.py serve`", readme())
        argv = ["python3", "test_orq_min.py", "serve"]
        with subprocess.Popen(
            argv, cwd=self.folder, env=self.env, stdout=subprocess.PIPE
        ) as process:
            self.addCleanup(process.kill)
            lines = [process.stdout.readline().decode() for _ in range(3)]
            done = self.example("sh", "-eu", "-c", "".join(lines))
            process.terminate()
        self.assertEqual(done.stdout, b"You said: Hello\n", (lines, done.stderr))


class TheReadmeIsTrue(unittest.TestCase):
    """The tables of the README say what the code says."""

    def assertParameters(self, rows, function):
        """The table holds all parameters of the function with their defaults."""
        parameters = dict(inspect.signature(function).parameters)
        parameters.pop("self", None)
        self.assertEqual([code(row[0])[0] for row in rows], list(parameters))
        for name, default, _ in rows:
            found = parameters[code(name)[0]].default
            with self.subTest(parameter=name):
                if default == "required":
                    self.assertIs(found, inspect.Parameter.empty)
                else:
                    self.assertEqual(eval(code(default)[0], vars(orq_min)), found)

    def test_the_parameters_are_those_of_the_code(self):
        responses = orq_min.Orq().agents.responses
        self.assertParameters(readme_table("`Orq`"), orq_min.Orq.__init__)
        for function in (responses.create, responses.create_async, responses.prepare):
            with self.subTest(function=function):
                self.assertParameters(readme_table("`create`"), function)
        quick = set(inspect.signature(orq_min.create_response).parameters)
        own = {"api_key", "ssl_context"}
        named = {code(row[0])[0] for row in readme_table("`create`")}
        self.assertEqual(quick, named | own)

    def test_the_fields_are_those_of_the_classes(self):
        for name, described in readme_table("Class"):
            with self.subTest(name=name):
                fields = dataclasses.fields(getattr(orq_min, code(name)[0]))
                outside = re.sub(r"\([^)]*\)", "", described)
                self.assertEqual(code(outside), [field.name for field in fields])

    def test_the_retry_settings_are_those_of_the_code(self):
        for name in ("RetryConfig", "BackoffStrategy"):
            rows = readme_table("`%s`" % name)
            missing = dataclasses.MISSING
            fields = dataclasses.fields(getattr(orq_min, name))
            self.assertEqual(
                [code(row[0])[0] for row in rows], [f.name for f in fields]
            )
            for field, (_, default, _) in zip(fields, rows):
                with self.subTest(field=field.name):
                    made = field.default_factory
                    found = field.default if made is missing else made()
                    self.assertEqual(eval(code(default)[0], vars(orq_min)), found)

    def test_the_options_are_those_of_the_command_line(self):
        rows = readme_table("Option")
        shown = run("--help", env={"COLUMNS": "200"}).stdout.decode()
        shown = shown.partition("[MESSAGE]\n")[2].partition("Exit status")[0]
        named = {word for row in rows for word in re.findall("--?[a-z-]+", row[0])}
        found = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", shown))
        self.assertEqual(named, found)
        for row in rows:
            for option in code(row[0]):
                with self.subTest(option=option):
                    self.assertIn(option, shown)

    def test_the_tree_of_errors_is_that_of_the_classes(self):
        (tree,) = readme_blocks("text")
        parents = {-2: Exception}
        for indent, name in re.findall(r"^( *)(\w+)", tree, re.M):
            found = getattr(orq_min, name)
            self.assertIs(found.__bases__[0], parents[len(indent) - 2])
            parents[len(indent)] = found
        self.assertTrue(issubclass(orq_min.ValidationError, ValueError))
        self.assertEqual(set(parents), {-2, 0, 2, 4})

    def test_the_exit_statuses_are_those_of_the_help(self):
        shown = run("--help").stdout.decode()
        statuses = [row[0] for row in readme_table("Exit status")]
        self.assertEqual(statuses, ["0", "1", "2", "3", "130"])
        for status in statuses:
            self.assertRegex(shown, r"\b%s\b" % status)

    def test_the_sections_come_in_the_order_in_which_a_stranger_needs_them(self):
        headings = re.findall("^## (.*)", readme(), re.M)
        wanted = ["Try it", "Copy it", "Use it from Python", "Use it from a shell"]
        wanted += ["Every parameter", "Retries", "Errors", "The environment"]
        wanted += ["What differs from the official package", "Update a copy"]
        self.assertEqual(headings, wanted)


# ----------------------------------------------------------------------------
# The network
# ----------------------------------------------------------------------------

FORGED = reply("the answer to somebody else")


class ConnectionsAreKept(WireTest):
    """Calls share connections, and nobody reads the answer to another's request."""

    def test_calls_in_a_row_share_one_connection(self):
        for tls in (None, server_context()):
            wire = self.wire(tls=tls)
            orq = self.client(wire)
            for number in range(5):
                self.assertEqual(self.call(orq, "n%d" % number), "n%d" % number)
            self.assertEqual(wire.on, [0] * 5)

    def test_errors_and_chunks_do_not_cost_the_connection(self):
        wire = self.wire(
            reply(b'{"message": "no"}', "404 Not Found"),
            chunked(saying("in chunks"), size=7),
            reply(gzip.compress(saying("packed")), "200 OK", "Content-Encoding: gzip"),
            repeat_text,
        )
        orq = self.client(wire)
        self.assertEqual(self.failure(orq, orq_min.APIError).status_code, 404)
        self.assertEqual(self.call(orq), "in chunks")
        self.assertEqual(self.call(orq), "packed")
        self.assertEqual(self.call(orq), "hi")
        self.assertEqual(wire.on, [0] * 4)

    def test_an_odd_answer_costs_the_connection(self):
        body = saying("odd")
        length = "Content-Length: %d" % len(body)
        too_long = b" " * 2000
        odd = {
            "bytes past its end": reply("odd") + FORGED,
            "bytes past the last chunk": chunked(body) + FORGED,
            "asks to close": reply(body, "200 OK", "Connection: close"),
            "HTTP/1.0": reply(body).replace(b"HTTP/1.1", b"HTTP/1.0"),
            "101": head("101 Switching Protocols", "Upgrade: x", "Connection: Upgrade"),
            "101 with a length": head("101 Switching Protocols", "Content-Length: 0"),
            "a length and chunks": chunked(body, length),
            "two lengths": head("200 OK", length, "Content-Length: 9999") + body,
            "the same length twice": head("200 OK", length, length) + body,
            "a length with a sign": head("200 OK", length.replace(": ", ": +")) + body,
            "an unread body": reply(too_long),
            "an unread body of an error": reply(too_long, "500 Oops"),
            "no such content": head("204 No Content", "Content-Length: 5"),
            "not modified": head("304 Not Modified", "Content-Length: 5"),
            "a line that is no header": head("200 OK", length, "what is this") + body,
        }
        for name, answer in odd.items():
            with self.subTest(name), mock.patch("orq_min.MAX_ANSWER_BYTES", 1000):
                wire = self.wire(answer, repeat_text)
                orq = self.client(wire)
                with contextlib.suppress(orq_min.OrqError):
                    self.assertEqual(self.call(orq), "odd")
                self.assertEqual(self.call(orq, "mine"), "mine")
                self.assertEqual(wire.on, [0, 1])

    def test_an_answer_without_a_length_ends_with_its_connection(self):
        wire = self.wire(
            then_close(head("200 OK") + saying("till the end")), repeat_text
        )
        orq = self.client(wire)
        self.assertEqual(self.call(orq), "till the end")
        self.assertEqual(self.call(orq), "hi")
        self.assertEqual(wire.on, [0, 1])

    def test_an_early_close_costs_the_connection_and_the_answer(self):
        for cut in (0, 10, 40, -1):
            wire = self.wire(then_close(reply("cut short")[:cut]), repeat_text)
            orq = self.client(wire)
            error = self.failure(orq, orq_min.APIConnectionError)
            self.assertTrue(error.sent)
            self.assertEqual(self.call(orq), "hi")
            self.assertEqual(wire.on, [0, 1])

    def test_a_connection_is_kept_for_less_than_four_seconds(self):
        real = time.monotonic
        for seconds, connections in ((3.5, [0, 0]), (4.5, [0, 1])):
            wire = self.wire()
            orq = self.client(wire)
            self.call(orq)
            with mock.patch("time.monotonic", lambda: real() + seconds):
                self.call(orq)
            self.assertEqual(wire.on, connections, seconds)

    def test_a_connection_that_the_server_closed_is_not_used(self):
        for tls in (None, server_context()):
            wire = self.wire(then_close(reply("one")), repeat_text, tls=tls)
            orq = self.client(wire)
            self.assertEqual(self.call(orq), "one")
            self.assertTrue(until(lambda: wire.peers[0].sock.fileno() < 0))
            self.assertEqual(self.call(orq, "two"), "two")
            self.assertEqual(wire.on, [0, 1])

    def test_a_connection_that_the_server_reset_is_not_used(self):
        def answer_and_reset(peer):
            peer.send(reply("one"))
            peer.pause(0.05)
            peer.close(reset=True)

        wire = self.wire(answer_and_reset, repeat_text)
        orq = self.client(wire)
        self.assertEqual(self.call(orq), "one")
        self.assertTrue(until(lambda: wire.peers[0].sock.fileno() < 0))
        self.assertEqual(self.call(orq, "two"), "two")
        self.assertEqual(wire.on, [0, 1])

    def test_a_client_that_is_dropped_closes_its_connections(self):
        wire = self.wire()
        orq = orq_min.Orq("k", server_url=wire.url)
        self.assertEqual(self.call(orq), "hi")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            gc.disable()  # at once, as a script may drop many
            self.addCleanup(gc.enable)
            del orq
        self.assertEqual([str(warning.message) for warning in caught], [])
        self.assertTrue(until(lambda: wire.gone == [0], 1))

    def test_async_calls_in_a_row_share_one_connection(self):
        wire = self.wire()
        orq = self.client(wire)
        given = {"agent_key": "my-agent", "message": "hi"}
        for _ in range(3):
            asyncio.run(orq.agents.responses.create_async(**given))
        self.assertEqual(wire.on, [0, 0, 0])

    def test_a_connection_into_which_bytes_came_unasked_is_not_used(self):
        for tls in (None, server_context()):
            wire = self.wire(tls=tls)
            orq = self.client(wire)
            self.assertEqual(self.call(orq, "one"), "one")
            wire.peers[0].send(FORGED)
            time.sleep(0.02)
            self.assertEqual(self.call(orq, "two"), "two")
            self.assertEqual(wire.on, [0, 1])

    @unittest.skipUnless(hasattr(os, "fork"), "the platform does not fork")
    def test_a_connection_is_not_used_in_another_process(self):
        wire = self.wire()
        code = """
            import os, orq_min
            orq = orq_min.Orq("k", server_url=sys.argv[1], timeout_ms=5000)
            def say(text):
                create = orq.agents.responses.create
                assert create(agent_key="a", message=text).text == text
            say("parent")
            child = os.fork()
            say("child" if child == 0 else "meanwhile")
            if child == 0:
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            say("parent again")
            orq.close()
        """
        process = script(code, wire.url)
        self.assertEqual(process.communicate(timeout=20), (b"", b""))
        spoke = [r.json()["message"]["parts"][0]["text"] for r in wire.requests]
        by = dict(zip(spoke, wire.on))
        self.assertEqual(by.pop("child"), 1)
        self.assertEqual(set(by.values()), {0})

    @unittest.skipUnless(hasattr(os, "fork"), "the platform does not fork")
    def test_a_fork_while_another_thread_calls_leaves_a_working_client(self):
        wire = self.wire(tls=server_context())
        code = """
            import os, ssl, threading, time, warnings, orq_min
            warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads
            make, making = ssl.create_default_context, threading.Event()
            def make_slowly():
                making.set()
                time.sleep(0.3)
                return make()
            ssl.create_default_context = make_slowly
            orq = orq_min.Orq("k", timeout_ms=5000, retry_config=None)
            def say(text):
                create = orq.agents.responses.create
                assert create(agent_key="a", message=text).text == text
            thread = threading.Thread(target=say, args=("thread",))
            thread.start()
            making.wait()
            child = os.fork()
            if child == 0:
                say("child")
                os._exit(0)
            thread.join()
            end = time.monotonic() + 3
            ended = 0, 0
            while ended[0] == 0 and time.monotonic() < end:
                time.sleep(0.02)
                ended = os.waitpid(child, os.WNOHANG)
            if ended != (child, 0):
                os.kill(child, 9)
                sys.exit("the child hangs" if ended[0] == 0 else "the child failed")
        """
        with temporary_file(AUTHORITY) as path:
            process = script(code, ORQ_BASE_URL=wire.url, SSL_CERT_FILE=path)
            self.assertEqual(process.communicate(timeout=20), (b"", b""))

    def test_a_connection_serves_one_server_alone(self):
        one, two = self.wire(), self.wire()
        orq = self.client(one)
        for number, wire in enumerate([one, two, one, two, two]):
            text = "n%d" % number
            self.assertEqual(self.call(orq, text, server_url=wire.url), text)
        self.assertEqual((len(one.requests), len(two.requests)), (2, 3))

    def test_close_and_leaving_with_close_the_connections(self):
        def close(orq):
            orq.close()

        def leave(orq):
            with orq:
                pass

        def leave_async(orq):
            async def inner():
                async with orq:
                    pass

            asyncio.run(inner())

        for end in (close, leave, leave_async):
            wire = self.wire()
            orq = self.client(wire)
            self.call(orq)
            self.assertEqual(wire.gone, [])
            end(orq)
            self.assertTrue(until(lambda: wire.gone == [0]), end.__name__)

    def test_a_call_during_and_after_close_is_answered_and_leaves_no_connection(self):
        arrived, closed = threading.Event(), threading.Event()

        def wait(peer):
            arrived.set()
            closed.wait(5)
            repeat_text(peer)

        wire = self.wire(wait, repeat_text)
        orq = self.client(wire)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            during = pool.submit(self.call, orq, "during")
            self.assertTrue(arrived.wait(5))
            orq.close()
            closed.set()
            self.assertEqual(during.result(5), "during")
        self.assertTrue(until(lambda: wire.gone == [0]))
        self.assertEqual(self.call(orq, "after"), "after")
        self.assertTrue(until(lambda: wire.gone == [0, 1]))

    def test_create_response_leaves_no_connection(self):
        wire = self.wire()
        orq_min.create_response("a", "hi", api_key="k", server_url=wire.url)
        self.assertTrue(until(lambda: wire.gone == [0]))

    def test_a_failed_call_leaves_no_connection(self):
        for step in (b"what?\r\n\r\n", reply(b" " * 2000), chunked(b"")[:-9]):
            wire = self.wire(lambda peer, step=step: (peer.send(step), peer.hang()))
            orq = self.client(wire, timeout_ms=50)
            with mock.patch("orq_min.MAX_ANSWER_BYTES", 1000):
                self.failure(orq)
            self.assertTrue(until(lambda: wire.gone == [0]))

    def test_sixteen_threads_on_one_client_get_their_own_answers(self):
        wire = self.wire()
        orq = self.client(wire)

        def talk(thread):
            for number in range(20):
                text = "%d of %d" % (number, thread)
                if self.call(orq, text) != text:
                    return False
            return True

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            self.assertEqual(set(pool.map(talk, range(16))), {True})
        self.assertEqual(len(wire.requests), 320)
        self.assertLessEqual(len(wire.peers), 16)

    def test_the_tls_context_is_made_once_and_when_needed(self):
        wire = self.wire(tls=server_context())
        wire.steps = [reply("fine", "200 OK", "Connection: close")]
        plain = self.wire()
        with temporary_file(AUTHORITY) as path:
            os.environ["SSL_CERT_FILE"] = path
            make = mock.patch(
                "ssl.create_default_context", wraps=ssl.create_default_context
            )
            with make as made:
                orq = self.client(wire, ssl_context=None)
                self.call(orq, server_url=plain.url)
                self.assertEqual(made.call_count, 0)
                with concurrent.futures.ThreadPoolExecutor(4) as pool:
                    done = pool.map(lambda _: self.call(orq), range(8))
                    self.assertEqual(set(done), {"fine"})
                self.assertEqual(made.call_count, 1)
        self.assertEqual(len(wire.peers), 8)

    def test_the_system_is_asked_to_keep_a_silent_connection_alive(self):
        wire = self.wire()
        options = set()

        def remember(sock, *option):
            options.add(option)
            return original(sock, *option)

        original = socket.socket.setsockopt
        orq = self.client(wire)
        with mock.patch.object(socket.socket, "setsockopt", remember):
            self.call(orq)
        wanted = {(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)}
        for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL"):
            if hasattr(socket, name):
                wanted.add((socket.IPPROTO_TCP, getattr(socket, name), 60))
        self.assertLessEqual(wanted, options)

    def test_interim_answers_are_read_past(self):
        early = head("100 Continue") + head("103 Early Hints", "Link: </x>; rel=y")
        early += head("102 Processing") * 3 + head("199 Whatever", "Content-Length: 9")
        answers = {
            "at once": lambda peer: peer.send(early + reply("final")),
            "in pieces": lambda peer: peer.send(
                early[:30], early[30:99], early[99:] + reply("final"), pause=0.01
            ),
        }
        for name, step in answers.items():
            with self.subTest(name):
                wire = self.wire(step, repeat_text)
                orq = self.client(wire)
                self.assertEqual(self.call(orq), "final")
                self.assertEqual(self.call(orq, "next"), "next")
                self.assertEqual(wire.on, [0, 0])
        with self.subTest("an error is final too"):
            orq = self.client(self.wire(early + reply(b"", "404 Not Found")))
            self.assertEqual(self.failure(orq, orq_min.APIError).status_code, 404)

    def test_each_header_is_sent_once(self):
        wire = self.wire()
        orq = self.client(wire)
        self.call(orq)
        mine = {
            "authorization": "Bearer x",
            "ACCEPT": "a/b",
            "uSER-agent": "me",
            "X": "y",
        }
        self.call(orq, http_headers=mine)
        for request in wire.requests:
            names = [name.lower() for name, _ in request.headers]
            self.assertEqual(len(names), len(set(names)), names)
            self.assertEqual(request.header("host"), [wire.netloc])
            self.assertEqual(request.header("content-length"), [str(len(request.body))])
        for name, value in mine.items():
            self.assertEqual(wire.requests[1].header(name), [value])
        self.assertEqual(
            wire.requests[0].header("authorization"), ["Bearer test-key-123"]
        )

    LARGE = "x" * (16 << 20)  # more than any socket's buffers hold

    def assert_early_refusal(self, status, then, tls):
        def refuse(peer):
            peer.send(reply(b'{"message": "go away"}', status))
            then(peer)

        wire = self.wire(refuse, tls=tls, early=True)
        error = self.failure(self.client(wire, timeout_ms=600), text=self.LARGE)
        self.assertIsInstance(error, orq_min.APIError)
        self.assertEqual(error.status_code, int(status[:3]))
        self.assertEqual(error.message, "go away")
        self.assertEqual(len(wire.requests), 1)

    def test_an_early_refusal_of_a_large_upload_is_reported(self):
        for tls in (None, server_context()):
            for status in ("401 Unauthorized", "413 Payload Too Large"):
                with self.subTest(status, tls=bool(tls)):
                    self.assert_early_refusal(status, Peer.close, tls)

    def test_an_early_refusal_is_reported_though_the_rest_is_read(self):
        for tls in (None, server_context()):
            with self.subTest(tls=bool(tls)):
                self.assert_early_refusal("413 Payload Too Large", self.drain, tls)

    @staticmethod
    def drain(peer):
        with contextlib.suppress(OSError):
            peer.hang()

    def test_a_failed_call_leaves_no_noise(self):
        """Nothing of http.client's own complains when it is collected."""
        cut = (b"", b"what?\r\n", head("200 OK")[:-2], reply("cut")[:-1])
        wire = self.wire(*map(then_close, cut))
        code = """
            import gc, orq_min
            for _ in range(4):
                try:
                    orq_min.create_response("a", "b", retries=None)
                except orq_min.APIConnectionError:
                    gc.collect()
        """
        env = {"ORQ_BASE_URL": wire.url, "ORQ_API_KEY": "k", "PYTHONDEVMODE": "1"}
        process = script(code, **env)
        self.assertEqual(process.communicate(timeout=20), (b"", b""))
        self.assertEqual(process.returncode, 0)

    def test_an_address_that_this_machine_cannot_use_is_passed_over(self):
        wire = self.wire()
        found = socket.getaddrinfo("127.0.0.1", 80, type=socket.SOCK_STREAM)
        port = int(wire.netloc.rpartition(":")[2])
        good = (*found[0][:4], ("127.0.0.1", port))
        with mock.patch("socket.getaddrinfo", return_value=[(999, *good[1:]), good]):
            self.assertEqual(self.call(self.client(wire)), "hi")

    def test_each_of_two_servers_keeps_its_connection(self):
        wires = [self.wire(), self.wire()]
        orq = self.client(wires[0])
        for wire in wires * 3:
            self.assertEqual(self.call(orq, server_url=wire.url), "hi")
        self.assertEqual([len(wire.peers) for wire in wires], [1, 1])

    def test_idle_connections_of_a_burst_are_not_kept_for_ever(self):
        """Of those that were not used for 4 s, none is left open by later calls."""
        gate = threading.Barrier(8, timeout=5)

        def together(peer):
            gate.wait()
            peer.sock.sendall(reply("hi"))

        wire = self.wire(*[together] * 8, repeat_text)
        orq = self.client(wire)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: self.call(orq), range(8)))
        self.assertEqual(len(wire.peers), 8)
        real = time.monotonic
        for seconds in (3, 6, 9):
            with mock.patch("time.monotonic", lambda: real() + seconds):
                self.call(orq)
        self.assertTrue(until(lambda: len(wire.gone) >= 7, 1), wire.gone)


class TheDeadlineBoundsAnAttempt(WireTest):
    """`timeout_ms` bounds an attempt from connect to last byte, at most 1 s late."""

    def assert_cut_off(self, orq, **given):
        """The failures that this is about would take ten seconds and more."""
        started = time.monotonic()
        error = self.failure(orq, orq_min.APITimeoutError, **given)
        seconds = time.monotonic() - started
        self.assertGreater(seconds, 0.09)
        self.assertLess(seconds, 3)
        return error

    def test_a_server_that_drips_is_cut_off(self):
        long = saying("x" * 2000)
        drips = {
            "nothing": (b"", b""),
            "the status line": (b"", b"HTTP/1.1 200 " + b"O" * 2000),
            "the header": (b"HTTP/1.1 200 OK\r\n", b"A: b\r\n" * 500),
            "interim answers": (b"", head("102 Processing") * 100),
            "a body with a length": (head("200 OK", "Content-Length: 9999"), long),
            "a body without": (head("200 OK"), long),
            "chunks": (
                head("200 OK", "Transfer-Encoding: chunked"),
                b"1\r\nx\r\n" * 500,
            ),
            "a chunk's size": (
                head("200 OK", "Transfer-Encoding: chunked"),
                b"0" * 999,
            ),
            "trailers": (chunked(b"{}")[:-2], b"A: b\r\n" * 500),
            "a compressed body": (
                head("200 OK", "Content-Encoding: gzip"),
                gzip.compress(os.urandom(2000)),
            ),
            "an error's body": (head("500 Oops", "Content-Length: 9999"), long),
            "the answer of a redirect": (
                head("307 X", "Location: /y", "Content-Length: 9999"),
                long,
            ),
        }
        for name, (start, rest) in drips.items():
            with self.subTest(name):

                def step(peer, start=start, rest=rest):
                    peer.send(start)
                    peer.drip(rest)
                    peer.hang()

                wire = self.wire(step)
                error = self.assert_cut_off(self.client(wire, timeout_ms=100))
                self.assertTrue(error.sent)
                self.assertTrue(until(lambda: wire.gone or not wire.peers), name)

    def test_redirects_share_the_deadline(self):
        def step(peer):
            peer.pause(0.1)
            peer.send(head("307 X", "Location: /again", "Content-Length: 0"))

        wire = self.wire(step)
        self.assert_cut_off(self.client(wire, timeout_ms=250))
        self.assertLess(len(wire.requests), 4)

    def test_a_server_that_reads_slowly_is_cut_off(self):
        def read_slowly(peer):  # but steadily, each piece in time
            while peer.sock.recv(65536):
                peer.pause(0.005)

        for tls in (None, server_context()):
            wire = self.wire(read_slowly, tls=tls, early=True)
            orq = self.client(wire, timeout_ms=300)
            error = self.assert_cut_off(orq, text="x" * (16 << 20))
            self.assertFalse(error.sent)

    def test_a_stalled_handshake_is_cut_off(self):
        def drip(peer):  # the start of a record with a ServerHello in it
            peer.drip(b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc" + b"\x03" * 2000)

        for greet in (Peer.hang, drip):
            wire = self.wire(greet=greet)
            secure = wire.url.replace("http:", "https:")
            error = self.assert_cut_off(
                self.client(wire, timeout_ms=100), server_url=secure
            )
            self.assertFalse(error.sent)

    def test_a_stalled_proxy_is_cut_off(self):
        wire = self.wire(greet=lambda peer: peer.drip(b"HTTP/1.1 200 " + b"O" * 2000))
        os.environ["https_proxy"] = wire.url
        orq = self.client(wire, server_url="https://localhost:9", timeout_ms=100)
        self.assertFalse(self.assert_cut_off(orq).sent)

    def test_connecting_is_bounded_for_all_addresses_together(self):
        address = self.enter(full_backlog())
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address)] * 20
        orq = self.enter(orq_min.Orq("k", retry_config=None))
        url = "http://127.0.0.1:%d" % address[1]
        with mock.patch("socket.getaddrinfo", lambda *_, **__: found):
            error = self.assert_cut_off(orq, server_url=url, timeout_ms=300)
        self.assertFalse(error.sent)

    def test_the_next_address_is_tried(self):
        wire = self.wire()
        with socket.socket() as closed:  # bound, and refuses
            closed.bind(("127.0.0.1", 0))
            found = [
                (socket.AF_INET, socket.SOCK_STREAM, 6, "", address)
                for address in (closed.getsockname(), ("127.0.0.1", wire.port))
            ]
            with mock.patch("socket.getaddrinfo", lambda *_, **__: found):
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    self.assertEqual(self.call(self.client(wire), "hi"), "hi")
                    gc.collect()
        self.assertEqual([str(warning.message) for warning in caught], [])


class CallsCanBeEnded(WireTest):
    """Ctrl-C ends a program within a second; a cancelled task ends its call."""

    def silent(self):
        return self.wire(Peer.hang)

    @unittest.skipIf(os.name == "nt", "there is no SIGINT to send")
    def test_ctrl_c_ends_a_call_and_a_wait_between_retries(self):
        call = "(agent_key='a', message='hi')"
        codes = {
            "create": "orq.agents.responses.create%s" % call,
            "create_async": "asyncio.run(orq.agents.responses.create_async%s)" % call,
        }
        later = reply(b"", "503 Busy", "Retry-After: 20")
        servers = {"a call": self.silent(), "a wait": self.wire(later)}
        running = []
        for how, code in codes.items():
            for when, wire in servers.items():
                code = "import asyncio, orq_min\norq = orq_min.Orq('k')\n" + code
                running.append((how, when, script(code, ORQ_BASE_URL=wire.url)))
        for wire in servers.values():
            self.assertTrue(until(lambda: len(wire.requests) == 2, 20))
        time.sleep(0.2)  # until the retries wait
        for how, when, process in running:
            with self.subTest(how + " during " + when):
                self.assertIsNone(process.poll())
                started = time.monotonic()
                process.send_signal(signal.SIGINT)
                out, err = process.communicate(timeout=30)
                self.assertLess(time.monotonic() - started, 3)
                self.assertNotEqual(process.returncode, 0)
                self.assertIn(b"KeyboardInterrupt", err)
                self.assertNotIn(b"Exception ignored", err)

    def test_a_cancelled_task_ends_at_once_and_so_does_its_connection(self):
        secure = server_context()
        for tls in (None, secure):
            wire = self.silent()
            wire.tls = tls
            wire.url = wire.url.replace("http:", "https:") if tls else wire.url
            orq = self.client(wire)

            async def cancel(orq=orq, wire=wire):
                create = orq.agents.responses.create_async
                task = asyncio.ensure_future(create(agent_key="a", message="hi"))
                while not wire.requests:
                    await asyncio.sleep(0.01)
                started = time.monotonic()
                task.cancel()
                with self.assertRaises(asyncio.CancelledError):
                    await task
                return time.monotonic() - started

            self.assertLess(asyncio.run(cancel()), 1)
            self.assertTrue(until(lambda: wire.gone == [0]))
            self.assertTrue(until(lambda: len(threading.enumerate()) < 20))

    def test_a_task_cancelled_in_a_wait_ends_its_thread_and_does_not_try_again(self):
        wire = self.wire(reply(b"", "503 Busy", "Retry-After-Ms: 5000"))
        orq = self.client(wire, retry_config=orq_min.RetryConfig())
        threads = set(threading.enumerate())

        def added():
            return [t for t in set(threading.enumerate()) - threads if t not in wires]

        wires = wire.threads

        async def cancel():
            create = orq.agents.responses.create_async(agent_key="a", message="hi")
            with self.assertRaises(asyncio.TimeoutError):
                await asyncio.wait_for(create, 0.2)

        asyncio.run(cancel())
        self.assertEqual(len(wire.requests), 1)
        self.assertTrue(until(lambda: not added(), 2), added())
        self.assertEqual(len(wire.requests), 1)

    @unittest.skipIf(os.name == "nt", "there is no SIGINT to send")
    def test_ctrl_c_ends_a_task_in_a_name_lookup_that_nothing_can_interrupt(self):
        code = """
            import asyncio, socket, time, orq_min
            def look_up(*arguments, **more):
                print("looking up", flush=True)
                time.sleep(20)
            socket.getaddrinfo = look_up
            orq = orq_min.Orq("k", server_url="http://a.invalid")
            create_async = orq.agents.responses.create_async
            asyncio.run(create_async(agent_key="a", message="hi"))
        """
        process = script(code)
        self.assertEqual(process.stdout.readline().strip(), b"looking up")
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        self.assertLess(time.monotonic() - started, 5)
        self.assertIn(b"KeyboardInterrupt", err)

    def test_two_hundred_calls_at_once_take_as_long_as_one(self):
        def late(peer):
            peer.pause(1)
            repeat_text(peer)

        wire = self.wire(late)
        orq = self.client(wire)
        create = orq.agents.responses.create_async
        ticks = []

        async def tick():
            while True:
                ticks.append(time.monotonic())
                await asyncio.sleep(0.01)

        async def all_at_once():
            ticking = asyncio.ensure_future(tick())
            texts = ["n%d" % number for number in range(200)]
            calls = [create(agent_key="a", message=text) for text in texts]
            answers = await asyncio.gather(*calls)
            ticking.cancel()
            self.assertEqual([answer.text for answer in answers], texts)

        started = time.monotonic()
        asyncio.run(all_at_once())
        self.assertLess(time.monotonic() - started, 8)  # in turns it would be 30 s
        pauses = [after - before for before, after in zip(ticks, ticks[1:])]
        self.assertLess(max(pauses), 0.9, "the event loop was blocked")


class AnswersAreBounded(WireTest):
    """An answer larger than 256 MiB is an APIError that says so."""

    def test_the_bound_is_256_mib(self):
        self.assertEqual(orq_min.MAX_ANSWER_BYTES, 256 * 2**20)

    def test_gzip_is_decoded_however_its_header_is_spelt(self):
        for coding in ("gzip", "GZIP", "x-gzip", "gzip ", "identity, gzip"):
            with self.subTest(coding):
                packed = gzip.compress(saying("small"))
                answer = reply(packed, "200 OK", "Content-Encoding: " + coding)
                self.assertEqual(self.call(self.client(self.wire(answer))), "small")

    def test_a_larger_answer_is_an_error_that_says_so(self):
        large = saying("x" * 100000)
        packed = gzip.compress(large)
        self.assertLess(len(packed), 1000)
        answers = {
            "with a length": reply(large),
            "in chunks": chunked(large),
            "of an error": reply(large, "500 Oops"),
            "gzip": reply(packed, "200 OK", "Content-Encoding: gzip"),
            "gzip in chunks": chunked(packed, "Content-Encoding: gzip"),
        }
        for name, answer in answers.items():
            with self.subTest(name):
                wire = self.wire(answer)
                orq = self.client(wire)
                with mock.patch("orq_min.MAX_ANSWER_BYTES", len(large) - 1):
                    error = self.failure(orq, orq_min.APIError)
                    self.assertRegex(str(error), "larger than")
                    self.assertEqual(error.status_code, int(answer[9:12]))
                with mock.patch("orq_min.MAX_ANSWER_BYTES", len(large)):
                    if name != "of an error":
                        self.assertEqual(len(self.call(orq)), 100000)

    def test_no_more_is_read_than_may_be_held(self):
        sent = []

        def endless(peer):
            peer.send(head("200 OK", "Transfer-Encoding: chunked"))
            for _ in range(10000):
                peer.send(b"2710\r\n" + b"x" * 10000 + b"\r\n")
                sent.append(10000)

        wire = self.wire(endless)
        with mock.patch("orq_min.MAX_ANSWER_BYTES", 100000):
            self.failure(self.client(wire), orq_min.APIError)
        self.assertTrue(until(lambda: wire.gone == [0]))
        self.assertLess(sum(sent), 60e6)  # what sockets buffer, and not all

    def test_compressed_answers_are_decoded_though_not_asked_for(self):
        for coding in ("gzip", "x-gzip", "GZIP"):
            packed = gzip.compress(saying("packed"))
            header = "Content-Encoding: " + coding
            wire = self.wire(reply(packed, "200 OK", header), chunked(packed, header))
            orq = self.client(wire)
            self.assertEqual([self.call(orq), self.call(orq)], ["packed", "packed"])
            self.assertNotIn(
                "gzip", "".join(wire.requests[0].header("accept-encoding"))
            )

    def test_a_damaged_compressed_answer_is_no_complete_answer(self):
        packed = gzip.compress(saying("packed"))
        damaged = {
            "truncated": packed[:-9],
            "without its trailer": packed[:-8],
            "of a wrong checksum": packed[:-8] + b"\0" * 8,
            "not gzip": saying("plain"),
            "broken inside": packed[:20] + b"\xff" * 8 + packed[28:],
        }
        for name, body in damaged.items():
            with self.subTest(name):
                wire = self.wire(reply(body, "200 OK", "Content-Encoding: gzip"))
                error = self.failure(self.client(wire), orq_min.APIConnectionError)
                self.assertTrue(error.sent)

    def test_an_error_whose_body_breaks_off_is_no_complete_answer(self):
        body = b'{"message": "Busy"}'
        broken = {
            "a length": reply(body, "503 Busy")[:-3],
            "chunks": chunked(body, status="503 Busy")[:-9],
            "gzip": reply(
                gzip.compress(body)[:-4], "503 Busy", "Content-Encoding: gzip"
            ),
        }
        for name, data in broken.items():
            with self.subTest(name):
                wire = self.wire(then_close(data), repeat_text)
                orq = self.client(wire)
                default = orq_min.Orq("k", server_url=wire.url)
                error = self.failure(self.enter(default), orq_min.APIConnectionError)
                self.assertTrue(error.sent)
                self.assertEqual(len(wire.requests), 1)
                self.assertEqual(self.call(orq), "hi")


class RedirectsStayAtHome(WireTest):
    """The key goes to one origin, and a POST never becomes a GET."""

    def test_307_and_308_are_followed_with_the_same_request(self):
        for status in ("307 Temporary Redirect", "308 Permanent Redirect"):
            wire = self.wire()
            places = [
                "/other?a=b",
                "other/%2F",
                wire.url + "/x",
                "//" + wire.netloc + "/y",
            ]
            shouted = wire.url.replace("http:", "HTTP:") + "/z"
            wire.steps = [
                reply(b"moved", status, "Location: " + place)
                for place in [*places, shouted]
            ]
            wire.steps.append(repeat_text)
            self.assertEqual(self.call(self.client(wire)), "hi")
            self.assertEqual(
                [request.path for request in wire.requests[1:]],
                ["/other?a=b", "/other/%2F", "/x", "/y", "/z"],
            )
            first = wire.requests[0]
            for request in wire.requests[1:]:
                self.assertEqual(request._replace(path=first.path), first)

    def test_the_host_may_be_spelt_in_another_way(self):
        wire = self.wire()
        url = wire.url.replace("127.0.0.1", "localhost")
        wire.steps = [
            reply(b"", "307 X", "Location: %s/one" % url.replace("local", "LOCAL")),
            reply(b"", "307 X", "Location: /two"),
            repeat_text,
        ]
        self.assertEqual(self.call(self.client(wire), server_url=url), "hi")
        self.assertEqual([r.path for r in wire.requests[1:]], ["/one", "/two"])

    def test_the_sixth_redirect_is_an_error(self):
        wire = self.wire(reply(b"", "308 Moved", "Location: /round"))
        error = self.failure(self.client(wire), orq_min.APIError)
        self.assertEqual(error.status_code, 308)
        self.assertIn(wire.url + "/round", str(error))
        self.assertEqual(len(wire.requests), 6)

    def test_every_other_redirect_is_an_error_that_names_its_target(self):
        wire, other, secure = self.wire(), self.wire(), self.wire(tls=server_context())
        same = wire.url + "/elsewhere"
        refused = [(status, same) for status in (300, 301, 302, 303, 305, 306)]
        places = [
            other.url + "/x",  # another port
            "//" + other.netloc + "/x",
            "http://localhost:%d/x" % wire.port,  # another name
            "https://127.0.0.1:%d/x" % wire.port,  # another scheme
            secure.url + "/x",
            "http://user@%s/x" % wire.netloc,  # credentials
            "http://user:word@%s/x" % wire.netloc,
            "http://:@%s/x" % wire.netloc,
            "http://%s@%s/x" % (wire.netloc, other.netloc),
            "ftp://%s/x" % wire.netloc,
            "file:///etc/passwd",
            "http://127.0.0.1:99999/x",
        ]
        refused += [(status, place) for status in (307, 308) for place in places]
        for status, place in refused:
            with self.subTest(status=status, place=place):
                wire.requests.clear()
                wire.steps = [reply(b"", "%d X" % status, "Location: " + place)]
                orq = self.client(wire, retry_config=orq_min.RetryConfig())
                error = self.failure(orq, orq_min.APIError)
                self.assertEqual(error.status_code, status)
                target = "http:" + place if place.startswith("//") else place
                self.assertIn(target, str(error))
                self.assertEqual(len(wire.requests), 1)
        self.assertEqual([other.requests, secure.requests], [[], []])
        self.assertEqual([other.peers, secure.peers], [[], []])

    def test_a_target_that_is_no_url_is_an_error(self):
        targets = [
            "http://[",
            "//[::1",
            "http://[x]/",
            "http://a:b:c/",
            "http:// /",
            "\\\\x",
        ]
        for target in [
            *targets,
            "http://\xe9.example/",
            "http://" + "a" * 70 + "/",
            "a\tb://",
        ]:
            for status in (302, 307):
                with self.subTest(target, status=status):
                    wire = self.wire(reply(b"", "%d X" % status, "Location: " + target))
                    error = self.failure(self.client(wire))
                    self.assertIsInstance(error, orq_min.APIError)
                    self.assertEqual(error.status_code, status)

    def test_a_redirect_to_nowhere_is_an_error(self):
        for headers in ([], ["Location:"], ["Location:  "]):
            wire = self.wire(reply(b"", "307 X", *headers))
            error = self.failure(self.client(wire), orq_min.APIError)
            self.assertEqual((error.status_code, len(wire.requests)), (307, 1))


class ProxiesTunnel(WireTest):
    """Proxies come from the environment; the key passes only inside their tunnels."""

    def through(self, proxy, server, userinfo="", **options):
        url = "http://%s%s" % (userinfo and userinfo + "@", proxy.netloc)
        os.environ["https_proxy"] = os.environ["http_proxy"] = url
        return self.client(server, **options)

    def test_https_is_tunnelled_with_the_key_inside_alone(self):
        for userinfo, credentials in (
            ("", ""),
            ("me:sesame", "me:sesame"),
            ("me:p%40ss%2Fw%3Ard", "me:p@ss/w:rd"),
        ):
            with self.subTest(userinfo):
                wire = self.wire(tls=server_context())
                proxy = self.enter(Proxy(credentials))
                orq = self.through(proxy, wire, userinfo)
                self.assertEqual([self.call(orq, "a"), self.call(orq, "b")], ["a", "b"])
                (connect,) = proxy.requests  # for one connection
                self.assertEqual(connect.method, "CONNECT")
                self.assertEqual(connect.path, wire.netloc)
                self.assertEqual(connect.header("host"), [wire.netloc])
                self.assertEqual(connect.header("authorization"), [])
                self.assertNotIn("test-key-123", str(connect))
                self.assertNotIn(b"test-key-123", proxy.passed)
                self.assertGreater(len(proxy.passed), 1000)
                for request in wire.requests:
                    self.assertEqual(
                        request.header("authorization"), ["Bearer test-key-123"]
                    )
                    self.assertEqual(request.header("proxy-authorization"), [])
                    self.assertTrue(request.path.startswith("/v2/agents/"))

    def test_an_ipv6_server_is_tunnelled_to(self):
        try:
            wire = self.wire(tls=server_context(), host="::1")
        except OSError as error:
            self.skipTest("no IPv6 here: %s" % error)
        self.assertEqual(self.call(self.client(wire), "direct"), "direct")
        proxy = self.enter(Proxy())
        self.assertEqual(self.call(self.through(proxy, wire), "hi"), "hi")
        self.assertEqual(proxy.requests[0].path, wire.netloc)

    def test_plain_http_goes_through_a_proxy_too(self):
        wire = self.wire()
        proxy = self.enter(Proxy("me:sesame"))
        orq = self.through(proxy, wire, "me:sesame")
        self.assertEqual([self.call(orq, "a"), self.call(orq, "b")], ["a", "b"])
        self.assertEqual([r.method for r in proxy.requests], ["POST", "POST"])
        for request in wire.requests:
            self.assertEqual(request.header("proxy-authorization"), [])
            self.assertEqual(request.header("host"), [wire.netloc])
            self.assertEqual(request.path, "/v2/agents/my-agent/responses")

    def test_no_proxy_is_obeyed(self):
        wire = self.wire()
        proxy = self.enter(Proxy())
        for no_proxy, used in (("127.0.0.1", 0), ("*", 0), ("elsewhere.invalid", 1)):
            os.environ["no_proxy"] = no_proxy
            self.assertEqual(self.call(self.through(proxy, wire)), "hi")
            self.assertEqual(len(proxy.requests), used, no_proxy)

    def test_a_proxy_that_refuses_is_named_with_its_status_and_not_asked_again(self):
        words = b"Basic " + base64.b64encode(b"me:swordfish") + b" swordfish"
        refusals = {
            407: b"",  # asks for other credentials
            403: reply(words, "403 swordfish"),
            503: reply(words, "503 Busy", "Retry-After: 0"),
            302: reply(words, "302 Found", "Location: http://127.0.0.1:9/"),
            101: head("101 Switching Protocols"),
        }
        again = orq_min.RetryConfig(backoff=orq_min.BackoffStrategy(1, 1))
        for retries in (orq_min.UNSET, again):
            for status, refusal in refusals.items():
                with self.subTest(status):
                    wire = self.wire(tls=server_context())
                    proxy = self.enter(Proxy("me:sesame", refusal))
                    orq = self.through(proxy, wire, "me:swordfish")
                    error = self.failure(
                        orq, orq_min.APIConnectionError, retries=retries
                    )
                    self.assertFalse(error.sent)
                    self.assertIn(str(status), str(error))
                    self.assert_no_password(error)
                    self.assertEqual((len(proxy.requests), wire.peers), (1, []))

    def assert_no_password(self, error):
        text = "".join(
            traceback.format_exception(type(error), error, error.__traceback__)
        )
        text += str(error) + repr(error) + repr(vars(error))
        self.assertNotIn("swordfish", text)
        self.assertNotIn(base64.b64encode(b"me:swordfish").decode(), text)

    def test_a_refusal_to_forward_plain_http_is_no_answer_of_the_server(self):
        proxy = self.enter(Proxy("me:sesame"))
        orq = self.through(proxy, self.wire(), "me:swordfish")
        error = self.failure(orq, orq_min.APIConnectionError)
        self.assertFalse(error.sent)
        self.assertIn("407", str(error))
        self.assertIn("(proxy %s)" % proxy.netloc, str(error))
        self.assert_no_password(error)
        self.assertEqual(len(proxy.requests), 1)

    def test_a_proxy_of_another_kind_gets_nothing(self):
        other, wire = self.wire(), self.wire()
        os.environ["http_proxy"] = "socks5://me:swordfish@" + other.netloc
        error = self.failure(self.client(wire), orq_min.APIConnectionError)
        self.assertEqual((error.sent, error.temporary), (False, False))
        self.assertIn("not the URL of an HTTP proxy", str(error))
        self.assert_no_password(error)
        self.assertEqual((other.peers, wire.peers), ([], []))

    def test_a_407_without_a_proxy_is_an_answer_of_the_server(self):
        wire = self.wire(reply(b'{"message": "who are you"}', "407 Who"))
        error = self.failure(self.client(wire), orq_min.APIError)
        self.assertEqual((error.status_code, error.message), (407, "who are you"))

    def test_the_password_of_a_bad_proxy_is_in_no_text(self):
        secret = base64.b64encode(b"me:swordfish")
        wire = self.wire(tls=server_context())
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            nobody = "127.0.0.1:%d" % closed.getsockname()[1]
            for url in (
                "http://me:swordfish@" + nobody,
                "http://me:swordfish@",
                "http://me:swordfish@127.0.0.1:99999",
                "http://me:swordfish@127.0.0.1:port",
                "http://me:swordfish@[::1",
                "http://me:swordfish@nowhere..invalid:1",
                "me:swordfish@" + nobody,
                "//me:swordfish@" + nobody,
                "http:me:swordfish@" + nobody,
                "http:/me:swordfish@" + nobody,
                "socks5://me:swordfish@" + nobody,
            ):
                for server_url in (wire.url, "http://127.0.0.1:9"):
                    with self.subTest(url, server_url=server_url):
                        os.environ["https_proxy"] = os.environ["http_proxy"] = url
                        orq = self.client(wire, timeout_ms=1000)
                        error = self.failure(orq, server_url=server_url)
                        self.assertIsInstance(error, orq_min.APIConnectionError)
                        self.assert_no_password(error)
        for answer in (b"HTTP/1.1 " + secret + b"\r\n\r\n", secret + b"\r\n\r\n"):
            with self.subTest(answer):
                proxy = self.enter(Proxy("", answer))
                orq = self.through(proxy, wire, "me:swordfish", timeout_ms=500)
                self.assert_no_password(self.failure(orq, orq_min.APIConnectionError))

    def test_what_a_proxy_says_before_tls_is_not_taken_for_the_answer(self):
        wire = self.wire(tls=server_context())
        proxy = self.enter(Proxy(greeting=head("200 Go Ahead") + FORGED))
        said = self.outcome(self.through(proxy, wire), "hi")
        self.assertTrue(said == "hi" or isinstance(said, orq_min.OrqError), said)

    def test_a_proxy_that_breaks_off_has_not_sent_the_request(self):
        wire = self.wire(tls=server_context())
        for answer in (b"HTTP/1.1 200", b"nonsense\r\n\r\n", head("200 OK")):
            proxy = self.wire(then_close(answer))
            orq = self.through(proxy, wire)
            error = self.failure(orq, orq_min.APIConnectionError)
            self.assertFalse(error.sent)


class CertificatesAreVerified(WireTest):
    """Certificates and host names are verified, and a failure says what to do."""

    def setUp(self):
        super().setUp()
        self.secure = self.wire(tls=server_context())

    def assert_refused(self, orq, **given):
        again = orq_min.RetryConfig(backoff=orq_min.BackoffStrategy(1, 1))
        peers = len(self.secure.peers)
        for retries in (orq_min.UNSET, again):
            error = self.failure(
                orq, orq_min.APIConnectionError, retries=retries, **given
            )
            self.assertFalse(error.sent)
            self.assertIn("SSL_CERT_FILE", str(error))
            self.assertNotIn("\n", str(error))
            self.assertIsInstance(error.__cause__, ssl.SSLError)
        self.assertEqual(len(self.secure.peers) - peers, 2, "not tried again")
        self.assertEqual(self.secure.requests, [])

    def test_an_unknown_authority_is_refused(self):
        self.assert_refused(self.client(self.secure, ssl_context=None))

    def test_a_certificate_of_another_host_is_refused(self):
        self.secure.tls = server_context(ELSEWHERE)
        self.assert_refused(self.client(self.secure))

    def test_both_are_checked_inside_a_tunnel_too(self):
        proxy = self.enter(Proxy())
        os.environ["https_proxy"] = proxy.url
        self.assert_refused(self.client(self.secure, ssl_context=None))
        self.secure.tls = server_context(ELSEWHERE)
        self.assert_refused(self.client(self.secure))

    def test_each_name_in_the_certificate_is_accepted(self):
        for host in ("localhost", "127.0.0.1", "LOCALHOST"):
            url = "https://%s:%d" % (host, self.secure.port)
            self.assertEqual(self.call(self.client(self.secure), server_url=url), "hi")

    def test_ssl_cert_file_and_ssl_cert_dir_are_used(self):
        directory = self.enter(tempfile.TemporaryDirectory())
        path = os.path.join(directory, "e5c6d7d4.0")  # the hash of its subject
        with open(path, "w") as stream:
            stream.write(AUTHORITY)
        for name, value in (("SSL_CERT_FILE", path), ("SSL_CERT_DIR", directory)):
            with mock.patch.dict(os.environ, {name: value}):
                orq = self.client(self.secure, ssl_context=None)
                self.assertEqual(self.call(orq, name), name)

    def test_the_name_in_the_url_is_the_one_that_is_checked(self):
        self.secure.tls = server_context(ELSEWHERE)
        address = ("127.0.0.1", self.secure.port)
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address)]
        orq = self.client(self.secure)
        with mock.patch("socket.getaddrinfo", lambda *_, **__: found):
            url = "https://elsewhere.invalid:%d" % self.secure.port
            self.assertEqual(self.call(orq, server_url=url), "hi")

    def test_the_context_of_the_caller_is_used(self):
        lax = ssl.create_default_context()
        lax.check_hostname = False
        lax.verify_mode = ssl.CERT_NONE
        for context in (trusting_context(), lax):
            orq = self.client(self.secure, ssl_context=context)
            self.assertEqual(self.call(orq), "hi")
            answer = orq_min.create_response(
                "a",
                "once",
                api_key="k",
                ssl_context=context,
                server_url=self.secure.url,
            )
            self.assertEqual(answer.text, "once")

    def test_a_server_without_tls_is_an_error(self):
        plain = self.wire()
        url = plain.url.replace("http:", "https:")
        orq = self.client(self.secure, server_url=url, timeout_ms=500)
        error = self.failure(orq, orq_min.APIConnectionError)
        self.assertFalse(error.sent)
        self.assertEqual(plain.requests, [])


class TheKeyIsInNoText(WireTest):
    """A key that a server echoes is masked in whatever we say."""

    KEY = "sk-/+\"'\\key~\xe9 %41"

    def setUp(self):
        super().setUp()
        self.stream = io.StringIO()
        handler = logging.StreamHandler(self.stream)
        logger = logging.getLogger(orq_min.__name__)
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        self.addCleanup(logger.setLevel, level)
        self.addCleanup(logger.removeHandler, handler)

    def test_an_echoed_key_is_masked(self):
        for key in ("test-key-123", self.KEY):
            data = key.encode("latin-1")
            as_json = json.dumps({"message": "bad key " + key}).encode()
            as_json_8 = json.dumps({"error": key}, ensure_ascii=False).encode()
            quoted = urllib.parse.quote(key, safe="").encode()
            chunks = head("200 OK", "Transfer-Encoding: chunked").decode()
            echoes = {
                "a JSON body": reply(as_json, "401 No"),
                "a JSON body in UTF-8": reply(as_json_8, "401 No"),
                "a text body": reply(b"<b>" + key.encode() + b"</b>", "403 No"),
                "a 200 that is no object": reply(json.dumps([key]).encode()),
                "the phrase": reply(b"", "401 " + key),
                "headers": reply(b"", "401 No", "WWW-Authenticate: " + key),
                "a status line that is none": data + b"\r\n\r\n",
                "a version": b"HTTP/" + data + b" 200 OK\r\n\r\n",
                "a status": b"HTTP/1.1 " + data + b" OK\r\n\r\n",
                "a length": head("200 OK", "Content-Length: " + key) + b"[]",
                "a chunk's size": head("200 OK", "Transfer-Encoding: chunked")
                + data
                + b"\r\nx\r\n",
                "a later chunk's size": chunks.encode()
                + b"1\r\n{\r\n"
                + data
                + b"\r\n",
                "a trailer": chunked(b"[]")[:-2] + b"X: " + data + b"\r\n\r\n",
                "a coding": reply(b"x", "200 OK", "Content-Encoding: " + key),
                "gzip": reply(data, "200 OK", "Content-Encoding: gzip"),
                "gzip broken off": reply(
                    gzip.compress(data)[:-4], "200 OK", "Content-Encoding: gzip"
                ),
                "the target of a redirect": reply(b"", "302 X", "Location: /?k=" + key),
                "the quoted target": head("302 X", "Location: /?" + quoted.decode()),
                "another target": reply(b"", "307 X", "Location: http://h/" + key),
                "credentials in a target": reply(
                    b"", "307 X", "Location: http://u:%s@h/" % quoted.decode()
                ),
                "a redirect that is followed": reply(
                    b"", "307 X", "Location: /" + quoted.decode()
                ),
                "a body that breaks off": reply(data, "500 No")[:-2],
                "a retried status": reply(as_json, "503 " + key),
            }
            again = orq_min.RetryConfig(
                backoff=orq_min.BackoffStrategy(1, 1, 1, max_elapsed_time=8)
            )
            for where, answer in echoes.items():
                with self.subTest(where, key=key):
                    self.stream.truncate(self.stream.seek(0))
                    wire = self.wire(then_close(answer))
                    options = {"server_url": wire.url, "retry_config": again}
                    orq = self.enter(orq_min.Orq(key, **options))
                    error = self.failure(orq, orq_min.OrqError)
                    self.assert_masked(error, key, quoted.decode())
                    self.assert_masked(pickle.loads(pickle.dumps(error)), key, "\0")
                    self.assertNotIn(key, repr(orq) + repr(vars(orq)))

    def test_each_usual_escaping_of_an_echoed_key_is_masked(self):
        for key, echo in (
            ("ab/cd+1", r"ab\/cd+1"),
            ("sk/x", "sk%2fx"),
            ("test-key", "test%2Dkey"),
            ("sk-\xe9x", r"sk-\u00E9x"),
            ("a&b'c<d", "a&amp;b&#39;c&lt;d"),
            ("k.k", "k.k kxk"),
        ):
            with self.subTest(key):
                wire = self.wire(reply(b"<i>%s</i>" % echo.encode(), "403 No"))
                options = {"server_url": wire.url, "retry_config": None}
                error = self.failure(self.enter(orq_min.Orq(key, **options)))
                shown = str(error).rpartition(": ")[2]
                self.assertEqual(shown.replace(" kxk", ""), "<i>***</i>")

    def test_a_large_error_of_almost_the_key_does_not_stop_the_program(self):
        key = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.abc/d+e=="
        wire = self.wire(reply(b"eyJhbGciOi" * 1000000, "500 No"))
        code = """
            import orq_min
            try:
                orq_min.create_response("a", "b", retries=None)
            except orq_min.APIError:
                print("done")
        """
        process = script(code, ORQ_BASE_URL=wire.url, ORQ_API_KEY=key)
        self.addCleanup(process.kill)  # it took a minute
        self.assertEqual(process.communicate(timeout=20), (b"done\n", b""))

    def test_an_error_that_quotes_a_part_of_the_key_does_not_stop_the_program(self):
        key = "sk-%s" % "-".join(["._~ab"] * 8)
        body = ("invalid token %s... " % key[:-2] + "and more " * 50).encode()
        wire = self.wire(reply(body, "401 No"))
        code = """
            import orq_min
            try:
                orq_min.create_response("a", "b", retries=None)
            except orq_min.APIError:
                print("done")
        """
        process = script(code, ORQ_BASE_URL=wire.url, ORQ_API_KEY=key)
        self.addCleanup(process.kill)  # each form twice would take for ever
        self.assertEqual(process.communicate(timeout=20), (b"done\n", b""))

    def test_an_empty_authorization_leaves_the_text_as_it_is(self):
        wire = self.wire(reply(b"no key", "401 No"))
        headers = {"Authorization": ""}
        error = self.failure(self.client(wire), http_headers=headers)
        self.assertTrue(str(error).endswith("401 Unauthorized: no key"), error)

    def assert_masked(self, error, *forms):
        self.assertTrue(until(lambda: ": " in self.stream.getvalue(), 1), "no log")
        texts = {
            "str": str(error),
            "repr": repr(error),
            "message": getattr(error, "message", ""),
            "traceback": "".join(
                traceback.format_exception(type(error), error, error.__traceback__)
            ),
            "log": self.stream.getvalue(),
        }
        for form in forms:
            for escaped in (form, repr(form)[1:-1], json.dumps(form)[1:-1]):
                for name, text in texts.items():
                    self.assertNotIn(escaped, text, name)

    def test_the_body_of_an_error_stays_as_it_came(self):
        body = b'{"message": "the key test-key-123 is bad"}'
        error = self.failure(self.client(self.wire(reply(body, "401 No"))))
        self.assertEqual(error.body, body.decode())
        self.assertIn("the key *** is bad", str(error))
        self.assertEqual(error.message, "the key *** is bad")

    def test_a_key_that_a_proxy_echoes_is_masked(self):
        wire = self.wire(tls=server_context())
        for answer in (
            reply(b"test-key-123", "403 test-key-123"),
            b"HTTP/1.1 test-key-123 x\r\n\r\n",
        ):
            proxy = self.wire(then_close(answer))
            os.environ["https_proxy"] = proxy.url
            error = self.failure(self.client(wire), orq_min.APIConnectionError)
            self.assert_masked(error, "test-key-123")


class OnlyWhatCannotHaveRunIsRetried(WireTest):
    """Each row of the retry table, for the three policies, and for no retries.

    A row is `yny`: whether the default policy, RetryConfig(..., False) and
    RetryConfig(..., True) try again.
    """

    real_sleep = staticmethod(time.sleep)

    def sleep(self, seconds):
        """The default policy's waits, cut short."""
        self.real_sleep(min(seconds, 0.001))

    def assert_row(self, row, make, text="hi"):
        """`make` gives a client whose first attempt fails, and what counts attempts."""
        soon = orq_min.BackoffStrategy(1, 2, 1.5, 60000)
        policies = {
            "default": {},
            "False": {"retry_config": orq_min.RetryConfig("backoff", soon, False)},
            "True": {"retry_config": orq_min.RetryConfig("backoff", soon, True)},
            "none": {"retry_config": None},
        }
        made = []
        for options in policies.values():
            orq, count = make(**options)
            made.append((self.enter(orq), count))
        with mock.patch("time.sleep", self.sleep):
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                calls = [pool.submit(self.outcome, orq, text) for orq, _ in made]
        rows = zip(policies, row + "n", calls, made)
        for policy, retried, call, (_, count) in rows:
            with self.subTest(policy=policy):
                said = call.result()
                if retried == "y":
                    self.assertEqual(said, "hi")
                else:
                    self.assertIsInstance(said, orq_min.OrqError)
                self.assertEqual(count(), 2 if retried == "y" else 1)

    def requests_row(self, row, step, timeout_ms=10000):
        """The first request is treated as `step` says."""

        def make(**policy):
            wire = self.wire(step, repeat_text)
            orq = orq_min.Orq("k", server_url=wire.url, timeout_ms=timeout_ms, **policy)
            return orq, lambda: len(wire.requests)

        self.assert_row(row, make)

    def connections_row(self, row, greet, tls=None, timeout_ms=10000, text="hi"):
        """The first connection is treated as `greet` says, before any request."""

        def treat(peer):
            if peer.number == 0:
                greet(peer)
            elif tls:
                peer.sock = tls.wrap_socket(peer.sock, server_side=True)

        def make(**policy):
            wire = self.wire(reply("hi"), greet=treat)
            url = wire.url.replace("http:", "https:") if tls else wire.url
            given = {"ssl_context": trusting_context(), **policy}
            orq = orq_min.Orq("k", server_url=url, timeout_ms=timeout_ms, **given)
            return orq, lambda: len(wire.peers)

        self.assert_row(row, make, text)

    def lookups_row(self, row, first, timeout_ms=10000):
        """The first look-up of a name gives the address `first`, or raises it."""
        lookups = collections.Counter()

        def look_up(host, port, *_, **__):
            lookups[port] += 1
            address = ("127.0.0.1", port)
            if lookups[port] == 1:
                if isinstance(first, Exception):
                    raise first
                address = first
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address)]

        def make(**policy):
            wire = self.wire()
            orq = orq_min.Orq("k", server_url=wire.url, timeout_ms=timeout_ms, **policy)
            return orq, lambda: lookups[wire.port]

        with mock.patch("socket.getaddrinfo", look_up):
            self.assert_row(row, make)

    def test_a_name_that_cannot_be_looked_up_now_is_retried(self):
        self.lookups_row("yny", socket.gaierror(socket.EAI_AGAIN, "Try again"))

    def test_an_unknown_host_is_not_retried(self):
        self.lookups_row("nnn", socket.gaierror(socket.EAI_NONAME, "Not known"))

    def test_a_refused_connection_is_retried(self):
        closed = self.enter(socket.socket())  # bound, but it does not listen
        closed.bind(("127.0.0.1", 0))
        self.lookups_row("yny", closed.getsockname())

    def test_a_connect_timeout_is_retried(self):
        self.lookups_row("yny", self.enter(full_backlog()), timeout_ms=500)

    def test_tls_that_breaks_off_is_retried(self):
        failures = {
            "a close": Peer.close,
            "a reset": lambda peer: (peer.sock.recv(99), break_off(peer)),
            "an alert": lambda peer: (peer.send(b"\x15\3\1\0\2\2\x50"), peer.close()),
            "a timeout": Peer.hang,
        }
        tls = server_context()
        for name, failure in failures.items():
            with self.subTest(failure=name):
                timeout_ms = 500 if failure is Peer.hang else 10000
                self.connections_row("yny", failure, tls, timeout_ms)

    def test_a_request_that_never_completely_left_is_retried(self):
        """What no socket's buffers can hold, of which only the start is read."""
        large = "x" * (8 << 20)

        def break_off_early(peer):
            peer.sock.recv(1000)
            break_off(peer)

        self.connections_row("yny", break_off_early, text=large)

    def test_statuses(self):
        rows = {429: "yyy", 503: "yyy", 500: "nyy", 502: "nyy", 504: "nyy"}
        others = (201, 204, 304, 400, 401, 403, 404, 408, 409, 413, 422, 501, 505, 599)
        rows.update((status, "nnn") for status in others)
        for status, row in rows.items():
            with self.subTest(status=status):
                self.requests_row(row, reply(b"{}", "%d X" % status))

    def test_a_request_that_left_is_retried_only_if_asked(self):
        failures = {
            "a reset": break_off,
            "a close": Peer.close,
            "a read timeout": Peer.hang,
            "a cut status line": then_close(b"HTTP/1.1 503"),
            "a cut header": then_close(b"HTTP/1.1 200 OK\r\nContent-"),
            "a cut header of an error": then_close(b"HTTP/1.1 503 Busy\r\nRetry-"),
            "a cut body": then_close(reply(b"{}")[:-1]),
            "cut chunks": then_close(chunked(b"{}")[:-6]),
            "a cut error": then_close(reply(b"{}", "503 Busy")[:-1]),
            "no HTTP": then_close(b"SMTP ready\r\n\r\n"),
        }
        for name, step in failures.items():
            with self.subTest(failure=name):
                self.requests_row("nny", step, 500 if step is Peer.hang else 10000)

    def test_an_unusable_200_is_not_retried(self):
        for body in (b"", b"[]", b"<html>", b"null", b'{"a": '):
            with self.subTest(body=body):
                self.requests_row("nnn", reply(body))

    def test_a_bad_certificate_is_not_retried(self):
        def make(**policy):
            wire = self.wire(tls=server_context(ELSEWHERE))
            given = {"ssl_context": trusting_context(), **policy}
            return orq_min.Orq("k", server_url=wire.url, **given), lambda: len(
                wire.peers
            )

        self.assert_row("nnn", make)

    def test_a_kept_connection_that_breaks_is_no_licence_to_send_twice(self):
        """The server may have run the agent before the connection broke."""
        wire = self.wire(repeat_text, break_off, repeat_text)
        orq = self.enter(orq_min.Orq("k", server_url=wire.url))
        self.assertEqual(self.call(orq), "hi")
        self.assertTrue(self.failure(orq, orq_min.APIConnectionError).sent)
        self.assertEqual(len(wire.requests), 2)


class BrokenAnswersDoNoHarm(WireTest):
    """Whatever a server sends, a call ends in an answer or an OrqError."""

    ANSWERS = 2000
    STATUSES = ("200 OK", "200 OK", "404 Not Found", "500 Oops", "503 Busy", "307 X")

    def well_formed(self, chance, text):
        """One of the forms in which a server may answer."""
        body = saying(text)
        status = chance.choice(self.STATUSES)
        headers = ["Content-Type: application/json", "X: y"]
        if status.startswith("307"):
            headers.append("Location: /again")
        if chance.random() < 0.3:
            body = gzip.compress(body, 1)
            headers.append("Content-Encoding: gzip")
        if chance.random() < 0.5:
            return chunked(body, *headers, status=status, size=chance.randint(1, 99))
        return reply(body, status, *headers)

    def broken(self, chance, text):
        """A well-formed answer with one to three things done to it."""
        answer = self.well_formed(chance, text)
        for _ in range(chance.randint(1, 3)):
            start = chance.randrange(len(answer) + 1)
            end = min(len(answer), start + chance.randint(1, 40))
            noise = bytes(chance.randrange(256) for _ in range(chance.randint(1, 6)))
            lines = answer.split(b"\r\n")
            one, two = chance.randrange(len(lines)), chance.randrange(len(lines))
            kind = chance.randrange(8)
            if kind == 0:  # cut at the end
                answer = answer[:start]
            elif kind == 1:  # cut out of the middle
                answer = answer[:start] + answer[end:]
            elif kind == 2:  # duplicated
                answer = answer[:end] + answer[start:]
            elif kind == 3:  # random bytes between or instead
                answer = answer[:start] + noise + answer[chance.choice((start, end)) :]
            elif kind == 4:  # lines in another order
                lines[one], lines[two] = lines[two], lines[one]
                answer = b"\r\n".join(lines)
            elif kind == 5:  # a line twice
                lines.insert(one, lines[two])
                answer = b"\r\n".join(lines)
            elif kind == 6:  # a number of the head, or a chunk's size, changed
                numbers = list(re.finditer(rb"[0-9]+", answer))
                number = chance.choice(numbers or [re.match(b"", b"")])
                other = chance.choice((b"0", b"-1", b"7", b"503", b"99999999", noise))
                answer = answer[: number.start()] + other + answer[number.end() :]
            else:  # more than was announced
                answer += chance.choice((noise, FORGED, b"\r\n", answer))
        return answer

    def test_thousands_of_broken_answers(self):
        chance = random.Random(20251120)
        broken, sent, seen = {}, {}, collections.Counter()  # by the text of a call
        settled = threading.Event()
        over, wake = socket.socketpair()
        self.enter(over), self.enter(wake)

        def step(peer):
            text = peer.request.json()["message"]["parts"][0]["text"]
            again = not peer.request.path.endswith("/responses")  # by a redirect
            seen[text] += not again
            if text not in broken or again or text in sent:
                return peer.send(reply(text))
            sent[text] = broken[text]
            peer.send(sent[text])
            # Some servers hang up. This one does so at once, or when the client, in
            # want of more, has waited a little; if at all before the next call.
            keep = hash_of(text) % 16 == 0
            if not keep or not select.select([over, peer.sock], [], [], 0.003)[0]:
                peer.close()
            settled.set()

        def hash_of(text):
            return zlib.crc32(text.encode())

        wire = self.wire(step)
        orq = self.enter(orq_min.Orq("k", server_url=wire.url, timeout_ms=3000))
        soon = orq_min.BackoffStrategy(0, 0, 1, 60000)
        columns = [  # of the retry table, and the statuses after which it tries again
            (orq_min.UNSET, rb"429|503"),
            (orq_min.RetryConfig("backoff", soon, False), rb"429|5[0-9][0-9]"),
            (orq_min.RetryConfig("backoff", soon, True), rb""),
            (None, rb"(?!)"),
        ]
        outcomes = collections.Counter()
        with mock.patch("random.uniform", lambda *_: 0):
            for number in range(self.ANSWERS):
                text = "token %08x." % hash_of(str(number))
                retries, statuses = columns[number % len(columns)]
                broken[text] = self.broken(chance, text)
                try:
                    said = self.call(orq, text, retries=retries) or ""
                    outcomes["answer"] += 1
                    others = set(re.findall(r"token \w{8}\.", said)) - {text}
                    self.assertFalse(others & set(broken), broken[text])
                except orq_min.OrqError as error:
                    outcomes[type(error).__name__] += 1
                except Exception as error:
                    self.fail("%r after %r" % (error, broken[text]))
                wake.send(b".")
                self.assertTrue(settled.wait(5))
                settled.clear()
                over.recv(1)
                good = "good %d" % number
                self.assertEqual(self.call(orq, good), good, broken[text])
                may = re.search(statuses, broken[text], re.DOTALL)
                self.assertLessEqual(seen[text], 2 if may else 1, broken[text])
                self.assertEqual(seen[good], 1)
        for kind in ("answer", "APIError", "APIConnectionError"):
            self.assertGreater(outcomes[kind], 100, outcomes)


# ----------------------------------------------------------------------------
# The benchmark
# ----------------------------------------------------------------------------

MIB = 2**20
BENCH_PATH = "/v2/agents/%s/responses"
# what a fresh process says of its memory; ru_maxrss outlives an exec on Linux
MEMORY = """
def memory(what):
    try:
        with open("/proc/self/status") as status:
            return 1024 * int(re.search(what + r":\\s+(\\d+)", status.read()).group(1))
    except OSError:
        import resource
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
"""


class BenchServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Answers at once, or as the agent's key says: `large`, `late`."""

    daemon_threads = True
    request_queue_size = 512
    allow_reuse_address = True
    context = None

    def finish_request(self, sock, address):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError):
            if self.context:
                sock = self.context.wrap_socket(sock, server_side=True)
            with sock, sock.makefile("rb") as stream:
                while self.answer(sock, stream):
                    pass

    def answer(self, sock, stream):
        path, length = stream.readline(), 0
        for line in iter(stream.readline, b"\r\n"):
            if not line:
                return False
            name, _, value = line.partition(b":")
            length = int(value) if name.lower() == b"content-length" else length
        while length:
            length -= len(stream.read(min(length, 65536)))
        if b"/late/" in path:
            time.sleep(1)
        sock.sendall(self.large if b"/large/" in path else self.small)
        return True

    small = large = b""


def bench_server():
    """The servers of the benchmark, in a process of their own, until its input ends."""
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    part = {"kind": "text", "text": "Hello, how can I help you today?"}
    message = {"messageId": "m1", "role": "agent", "parts": [part]}
    whole = {"_id": "r1", "task_id": "t1", "output": [message], "usage": usage}
    whole.update(created_at="2025-11-20T09:30:00.000Z", model="openai/gpt-4o")
    is_json = "Content-Type: application/json"
    BenchServer.small = reply(json.dumps(whole).encode(), "200 OK", is_json)
    large = saying("x" * (32 * MIB - len(saying(""))))
    BenchServer.large = reply(large, "200 OK", is_json)
    ports = []
    for context in (None, server_context()):
        server = BenchServer(("127.0.0.1", 0), None)
        server.context = context
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ports.append(server.server_address[1])
    print(*ports, flush=True)
    sys.stdin.read()


def fresh_process(code, *argv):
    """The numbers that a program prints."""
    code = "import re, sys, time\n" + MEMORY + textwrap.dedent(code)
    command = [sys.executable, "-c", code, *map(str, argv)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return [float(word) for word in done.stdout.split()]


def side_by_side(works, rounds):
    """The median seconds of each work, all of them in turns."""
    for work in works:
        work()
    seconds = [[] for _ in works]
    for _ in range(rounds):
        for work, taken in zip(works, seconds):
            started = time.perf_counter()
            work()
            taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in seconds]


class Bench:
    """Measures each row, and prints it."""

    def __init__(self, http_port, https_port, directory):
        self.url = "http://127.0.0.1:%d" % http_port
        self.https_url = "https://127.0.0.1:%d" % https_port
        self.directory = directory
        self.missed = 0
        try:
            import orq_ai_sdk

            self.sdk = orq_ai_sdk
        except ImportError:
            self.sdk = None

    ROW = "%-34s %-26s %10s %10s %9s %10s  %s"

    def print_row(self, what, than, ours, theirs, value, bound="", good=None):
        verdict = "" if good is None else "ok" if good else "MISSED"
        self.missed += good is False
        print(self.ROW % (what, than, ours, theirs, value, bound, verdict), flush=True)

    def run(self):
        print("CPython %s" % sys.version.split()[0])
        self.print_row("what", "against", "ours", "theirs", "ratio", "bound")
        self.imports()
        self.calls("HTTP", self.url, 1.75)
        self.calls("TLS", self.https_url, 1.5)
        self.sizes()
        self.many_tasks()
        self.many_threads()

    def imports(self):
        code = """
            {}
            print(memory("VmHWM"))
        """
        # a copy, so that what Python compiles is kept wherever the module lies
        with open(MODULE, "rb") as source:
            with open(os.path.join(self.directory, "orq_min.py"), "wb") as copy:
                copy.write(source.read())
        path = "sys.path.insert(0, %r); sys.dont_write_bytecode = False; import " % (
            self.directory
        )
        names = ["urllib.request, json, dataclasses, typing, logging", "orq_min"]
        names += ["orq_ai_sdk"] if self.sdk else []
        codes = [code.format(path + name) for name in names]
        taken = [[] for _ in codes]
        for round_ in range(25):
            for code, results in zip(codes, taken):
                started = time.perf_counter()
                (memory,) = fresh_process(code)
                results.append((time.perf_counter() - started, memory))
        medians = [
            [statistics.median(column) for column in zip(*results[1:])]
            for results in taken
        ]
        base, ours = medians[:2]
        for name, (seconds, memory) in zip(
            ["stdlib imports", "orq_ai_sdk"], [base, *medians[2:]]
        ):
            bound = name != "orq_ai_sdk"
            ratio, more = ours[0] / seconds, (ours[1] - memory) / MIB
            self.print_row(
                "import, time",
                name,
                "%.1f ms" % (ours[0] * 1e3),
                "%.1f ms" % (seconds * 1e3),
                "%.2f" % ratio,
                *(("<= 1.25", ratio <= 1.25) if bound else ()),
            )
            self.print_row(
                "import, memory",
                name,
                "%.1f MiB" % (ours[1] / MIB),
                "%.1f MiB" % (memory / MIB),
                "%+.1f MiB" % more,
                *(("<= 2 MiB", more <= 2) if bound else ()),
            )

    def calls(self, name, url, bound, count=100):
        context = trusting_context() if url.startswith("https") else None
        path = BENCH_PATH % "any"
        message = {"role": "user", "parts": [{"kind": "text", "text": "Hello"}]}
        body = {"message": message, "background": False}
        headers = {"Authorization": "Bearer k", "Content-Type": "application/json"}
        headers.update(Accept="application/json")
        with contextlib.ExitStack() as stack:
            orq = orq_min.Orq("k", server_url=url, ssl_context=context)
            stack.enter_context(orq)
            netloc = url.partition("//")[2]
            if context:
                bare = http.client.HTTPSConnection(netloc, context=context)
            else:
                bare = http.client.HTTPConnection(netloc)
            stack.enter_context(contextlib.closing(bare))

            def ours():
                for _ in range(count):
                    orq.agents.responses.create(agent_key="any", message="Hello")

            def by_http_client():
                for _ in range(count):
                    bare.request("POST", path, json.dumps(body).encode(), headers)
                    json.loads(bare.getresponse().read().decode())

            def by_urlopen():
                for _ in range(count // 10):
                    data = json.dumps(body).encode()
                    request = urllib.request.Request(url + path, data, headers)
                    with urllib.request.urlopen(request, context=context) as answer:
                        json.loads(answer.read().decode())

            works = [ours, by_http_client, by_urlopen]
            if self.sdk:
                works.append(self.by_sdk(stack, url, count // 10))
            seconds = side_by_side(works, 15)
        shares = [1, 1, 10, 10]
        each = [taken / count * share for taken, share in zip(seconds, shares)]
        shown = ["%.0f us" % (one * 1e6) for one in each]
        what = "one call, %s" % name
        ratio = each[0] / each[1]
        self.print_row(
            what,
            "bare http.client",
            shown[0],
            shown[1],
            "%.2f" % ratio,
            "<= %.2f" % bound,
            ratio <= bound,
        )
        for index, than in ((2, "urlopen"), (3, "orq_ai_sdk"))[: len(each) - 2]:
            faster = each[index] / each[0]
            limit = (
                (">= 5 x", faster >= 5) if (than, name) == ("urlopen", "TLS") else ()
            )
            text = "%.1f x" % faster
            self.print_row(what, than, shown[0], shown[index], text, *limit)

    def by_sdk(self, stack, url, count):
        import httpx

        made = httpx.Client(verify=trusting_context())
        orq = self.sdk.Orq(api_key="k", server_url=url, client=made)
        stack.callback(made.close)
        message = {"role": "user", "parts": [{"kind": "text", "text": "Hello"}]}

        def work():
            for _ in range(count):
                orq.agents.responses.create(agent_key="any", message=message)

        return work

    def sizes(self):
        code = """
            sys.path.insert(0, sys.argv[1])
            import orq_min
            orq = orq_min.Orq("k", server_url=sys.argv[2])
            create = orq.agents.responses.create
            create(agent_key="any", message="Hello")
            idle = memory("VmRSS")
            part = {}
            answer = create(agent_key={!r}, message={{"role": "user", "parts": [part]}})
            print(memory("VmHWM") - idle)
            orq.close()
        """
        path = os.path.join(self.directory, "file.bin")
        with open(path, "wb") as stream:
            stream.write(os.urandom(16 * MIB))
        file = "orq_min.FilePart.from_path(%r)" % path
        for what, part, agent, size, bound in (
            ("16 MiB file attached, memory", file, "any", 16 * MIB, 6),
            ("32 MiB answer, memory", "orq_min.TextPart('x')", "large", 32 * MIB, 5),
        ):
            program = code.format(part, agent)
            (more,) = fresh_process(program, os.path.dirname(MODULE), self.url)
            ratio = more / size
            self.print_row(
                what,
                "its size",
                "%.0f MiB" % (more / MIB),
                "%.0f MiB" % (size / MIB),
                "%.2f" % ratio,
                "<= %d" % bound,
                ratio <= bound,
            )

    def many_tasks(self):
        async def run():
            async with orq_min.Orq("k", server_url=self.url) as orq:
                create = orq.agents.responses.create_async
                tasks = [create(agent_key="late", message="hi") for _ in range(200)]
                await asyncio.gather(*tasks)

        started = time.perf_counter()
        asyncio.run(run())
        seconds = time.perf_counter() - started
        self.print_row(
            "200 create_async of 1 s at once",
            "one",
            "%.2f s" % seconds,
            "1 s",
            "%.2f" % seconds,
            "<= 3",
            seconds <= 3,
        )

    def many_threads(self, threads=16, count=25):
        with contextlib.ExitStack() as stack:
            clients = [
                stack.enter_context(orq_min.Orq("k", server_url=self.url))
                for _ in range(threads)
            ]
            pool = concurrent.futures.ThreadPoolExecutor(threads)
            stack.enter_context(pool)

            def talk(orq):
                for _ in range(count):
                    orq.agents.responses.create(agent_key="any", message="Hello")

            one, many = side_by_side(
                [
                    lambda: list(pool.map(talk, [clients[0]] * threads)),
                    lambda: list(pool.map(talk, clients)),
                ],
                15,
            )
        shown = ["%.0f us" % (1e6 * taken / threads / count) for taken in (one, many)]
        ratio = one / many  # 0.1 is noise
        self.print_row(
            "16 threads on one client, a call",
            "16 clients",
            *shown,
            "%.2f" % ratio,
            "<= 1.1",
            ratio <= 1.1,
        )


def bench(argv):
    """`bench`: measure each row of a table, side by side with others."""
    if argv == ["serve"]:
        return bench_server()
    environment = mock.patch.dict(os.environ, clean_environment(), clear=True)
    with environment, tempfile.TemporaryDirectory() as directory:
        here = os.path.abspath(__file__)
        path = os.pathsep.join([os.path.dirname(MODULE), os.path.dirname(here)])
        server = subprocess.Popen(
            [sys.executable, here, "bench", "serve"],
            env=dict(os.environ, PYTHONPATH=path),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        with server:  # which ends when its input does
            measured = Bench(*map(int, server.stdout.readline().split()), directory)
            measured.run()
    print("%d missed" % measured.missed)
    return 1 if measured.missed else 0


# ----------------------------------------------------------------------------
# The three commands
# ----------------------------------------------------------------------------


def main():
    commands = {"serve": serve, "demo": demo, "bench": bench}
    if len(sys.argv) > 1 and commands.get(sys.argv[1]):
        return commands[sys.argv[1]](sys.argv[2:])
    return unittest.main()


if __name__ == "__main__":
    sys.exit(main())

"""Tests of orq_min.py, and a stand-in of the service that they run against.

    python3 -m unittest                         run the tests
    python3 test_orq_min.py serve [PORT]        run the stand-in, to play with
    python3 test_orq_min.py demo                show a whole small session
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
import enum
import errno
import functools
import gc
import gzip
import http.client
import importlib.util
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
import urllib.response
import uuid
import warnings
import zipfile
import zlib
from typing import List, NamedTuple, Tuple
from unittest import mock

import orq_min

try:
    import pty
except ImportError:  # Windows
    pty = None

MODULE = os.path.abspath(orq_min.__file__)
logging.getLogger(orq_min.__name__).addHandler(logging.NullHandler())  # no noise
posix_only = unittest.skipUnless(os.name == "posix", "needs a POSIX system")

# ----------------------------------------------------------------------------
# The stand-in of the service
# ----------------------------------------------------------------------------


class Recorded(NamedTuple):
    """A request as it came."""

    method: str
    path: str
    headers: List[Tuple[str, str]]
    body: bytes

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
CONTACT = {
    "id!": str,
    "display_name": str,
    "email": str,
    "logo_url": str,
    "metadata": [dict],
    "tags": [str],
}
BODY = {
    "message!": {"role!": ("user", "tool"), "parts!": ["part"], "messageId": str},
    "task_id": str,
    "variables": dict,
    "contact": CONTACT,
    "identity": CONTACT,
    "thread": {"id!": str, "tags": [str]},
    "memory": {"entity_id!": str},
    "metadata": dict,
    "background": bool,
    "stream": (False,),  # today's official client always sends it
    # fields that the service has and the client under test does not know
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
    """A run of an agent, which can be asked for and continued."""

    def __init__(self, agent):
        self.agent = agent
        self.pending = set()  # the tool calls that wait for a result
        self.ends = 0.0  # when a run in the background is over
        self.answer = {}  # what it comes to

    def active(self, now=time.perf_counter):  # a clock that no test moves
        return now() < self.ends


class Contract:
    """What the service answers to a request, without any network.

    A task in the background is in progress for `background_seconds`, and fails then
    if its message contains the word "fail". The agent "task-agent" answers with tasks.
    """

    background_seconds = 0.3

    def __init__(self, key="test-key-123", agents=("my-agent",)):
        self.key = key
        self.agents = {"task-agent", *agents}
        self.tasks = {}
        self._lock = threading.Lock()
        self._ids = itertools.count(1)

    def behave(self, recorded):
        """(status, JSON body) for a request."""
        try:
            agent, task_id = self._find(recorded)
            if task_id:
                answer = self._state(agent, task_id)
            else:
                answer = self._run(agent, self._read_body(recorded))
        except Refusal as refusal:
            return refusal.status, refusal.body
        return 200, self._as_task(agent, answer) if agent == "task-agent" else answer

    def _find(self, recorded):
        """The agent, and the id of the task that a GET asks for."""
        pattern = r".*/v2/agents/([^/?#]+)/responses(?:/([^/?#]+))?"
        match = re.fullmatch(pattern, recorded.path)
        if not match:
            raise Refusal(404, {"message": "no such operation"})
        agent, task_id = (urllib.parse.unquote(part or "") for part in match.groups())
        if recorded.method != ("GET" if task_id else "POST"):
            raise Refusal(405, {"message": "method not allowed"})
        key = self.key if self.key.lower().startswith("bearer ") else None
        if recorded.header("authorization") != [key or "Bearer " + self.key]:
            raise Refusal(401, {"error": "invalid API key"})
        if agent not in self.agents:
            raise Refusal(404, {"code": 404, "message": "no agent %r" % agent})
        return agent, task_id

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

    def _task(self, task_id):
        if task_id not in self.tasks:
            raise Refusal(404, {"code": 404, "message": "no such task"})
        return self.tasks[task_id]

    def _run(self, agent, body):
        background = body.get("background", False)
        with self._lock:
            task = self._task(body["task_id"]) if "task_id" in body else Task(agent)
            if task.active():
                raise Refusal(409, {"error": {"message": "the task is active"}})
            results = self._take_results(task, body["message"])
            if background:
                task.ends = time.perf_counter() + self.background_seconds
        task_id = body.get("task_id") or self._new_id()
        self.tasks[task_id] = task
        begun = {"_id": self._new_id(), "task_id": task_id}
        begun["created_at"] = "2025-11-20T09:30:00.000Z"
        begun["model"] = "openai/gpt-4o"
        task.answer = dict(begun, **self._speak(task, body, results))
        if not background:
            return task.answer
        if "fail" in json.dumps(body["message"]):
            task.answer = dict(begun, error="The agent failed, as it was told to.")
        return dict(begun, status="in_progress") if agent == "task-agent" else begun

    def _state(self, agent, task_id):
        """What a GET is told of a task."""
        task = self._task(task_id)
        if task.agent != agent:
            raise Refusal(404, {"code": 404, "message": "no such task"})
        if not task.active():
            status = "failed" if "error" in task.answer else "completed"
            return dict(task.answer, status=status)
        begun = ("_id", "task_id", "created_at", "model")
        return dict({name: task.answer[name] for name in begun}, status="in_progress")

    @staticmethod
    def _take_results(task, message):
        """The results of a tool message; they must be those that are waited for."""
        results = {}
        for part in message["parts"]:
            if (part["kind"] == "tool_result") != (message["role"] == "tool"):
                raise Refusal(422, {"message": "role and parts do not go together"})
            if part["kind"] == "tool_result":
                results[part["tool_call_id"]] = part.get("result")
        if message["role"] == "tool" and set(results) != task.pending:
            raise Refusal(422, {"message": "these tool calls do not wait"})
        task.pending = set()
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
            task.pending.add(call_id)
            function = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
            calls.append({"id": call_id, "type": "function", "function": function})
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

    def _new_id(self):
        return "01K6STANDIN%015d" % next(self._ids)

    @staticmethod
    def _as_task(agent, answer):
        """The other shape that the service's guides show."""
        state = answer.get("status", "completed")
        status = {"state": "working" if state == "in_progress" else state}
        status["timestamp"] = answer["created_at"]
        shape = {"id": answer["task_id"], "kind": "task", "status": status}
        shape["contextId"] = "0ae1c2d3-0000-4000-8000-000000000000"
        shape["metadata"] = {"orq_agent_key": agent}
        parts = [{"kind": "text", "text": answer.get("error")}]
        if "output" in answer:
            parts = answer["output"][-1]["parts"]
            shape["output"] = [{"parts": parts}]
        if state != "in_progress":
            status["message"] = {"role": "agent", "parts": parts}
        return shape


class StandIn(Contract):
    """The service on loopback, which can be told to misbehave byte by byte.

        with StandIn() as service:
            ...

    It answers at any path prefix, as the contract says, unless told otherwise: `next`
    says how to treat the next requests, one step each, and `then` is the step for all
    others. A step is

      - dict(status=200, headers={}, body=bytes, text or what JSON has, delay=seconds);
        without `status` and `body` it answers as the contract says, after the delay,
      - bytes, which are sent as they are, or
      - a function, which is given the Connection and does what it likes with it.

    StandIn(a, b, c) is told next(a, b) and then = c. `tls` is the server's SSLContext,
    `greet` is given each Connection before anything is read from it or any handshake,
    and with `early` a step is taken when the head has come, the body being unread.
    `log` is called with one line for each answer.

    `requests` is what came, and `on` the number of the connection that it came on;
    `peers` are the connections, `connections` is how many, and `gone` has the numbers
    of those that the client closed.
    """

    def __init__(
        self,
        *steps,
        host="127.0.0.1",
        port=0,
        tls=None,
        greet=None,
        early=False,
        log=None,
        **contract,
    ):
        super().__init__(**contract)
        self.host, self.tls, self.greet, self.early = host, tls, greet, early
        self.log = log or (lambda line: None)
        self.requests, self.on, self.peers, self.gone = [], [], [], []
        self.closing = threading.Event()
        self.threads = []
        self._steps = collections.deque(steps[:-1])
        self.then = steps[-1] if steps else {}
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._listener.bind((host, port))
            self._listener.listen(256)
        except BaseException:
            self._listener.close()
            raise
        self.port = self._listener.getsockname()[1]

    @property
    def netloc(self):
        return "%s:%d" % (
            "[%s]" % self.host if ":" in self.host else self.host,
            self.port,
        )

    @property
    def url(self):
        return "%s://%s" % ("https" if self.tls else "http", self.netloc)

    @property
    def connections(self):
        return len(self.peers)

    def next(self, *steps):
        """How to treat the next requests, one step each."""
        self._steps.extend(steps)

    def take_step(self, connection):
        with self._lock:
            self.requests.append(connection.request)
            self.on.append(connection.number)
            return self._steps.popleft() if self._steps else self.then

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
            with contextlib.suppress(OSError):  # below TLS, which would wait
                socket.socket.shutdown(peer.sock, socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(5)

    def _start(self, work):
        thread = threading.Thread(target=work, daemon=True, name="stand-in")
        self.threads.append(thread)
        thread.start()

    def _accept(self):
        while True:
            sock, _ = self._listener.accept()
            if self.closing.is_set():
                return sock.close()
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.peers.append(Connection(self, sock, len(self.peers)))
            self._start(self.peers[-1].serve)


class Connection:
    """A connection that a StandIn accepted. `request` is what came last."""

    def __init__(self, service, sock, number):
        self.service, self.sock, self.number = service, sock, number
        self.stream = self.request = None

    def is_open(self):
        return self.sock.fileno() >= 0

    def serve(self):
        """Treat one request after the other, until somebody hangs up."""
        try:
            if self.service.greet:
                self.service.greet(self)
            if self.is_open() and self.service.tls:
                self.start_tls(self.service.tls)
            while self.is_open() and not self.service.closing.is_set():
                self.request = self.read_request()
                if self.request is None:
                    raise ConnectionAbortedError("the client has gone")
                self.take(self.service.take_step(self))
        except OSError:
            self.service.gone.append(self.number)
        finally:
            self.close()

    def start_tls(self, context):
        self.sock = context.wrap_socket(
            self.sock, server_side=True, do_handshake_on_connect=False
        )
        self.sock.do_handshake()

    def read_request(self):
        """The next request; None at the end."""
        self.stream = self.stream or self.sock.makefile("rb")
        if self.stream.peek(1)[:1] == b"\x16":  # the first byte of a TLS handshake
            self.answer(400, "this port speaks plain HTTP")
            return None
        first = self.stream.readline().decode("latin-1").split(" ")
        if len(first) != 3:
            return None
        headers = []
        for line in iter(self.stream.readline, b"\r\n"):
            if not line:
                return None
            name, _, value = line.decode("latin-1").partition(":")
            headers.append((name, value.strip()))
        request = Recorded(*first[:2], headers, b"")
        if self.service.early:
            return request
        length = int((request.header("content-length") or ["0"])[0])
        body = self.stream.read(length)
        return request._replace(body=body) if len(body) == length else None

    def take(self, step):
        if callable(step):
            step(self)
        elif isinstance(step, bytes):
            self.send(step)
        else:
            self.pause(step.get("delay", 0))
            if "status" in step or "body" in step:
                self.answer(**{k: v for k, v in step.items() if k != "delay"})
            else:
                self.answer(*self.service.behave(self.request))

    # What a step may use

    def answer(self, status=200, body=b"", headers=None):
        """A whole answer; bytes and text are sent as they are, the rest as JSON."""
        if not isinstance(body, (bytes, str)):
            body = json.dumps(body)
        data = body if isinstance(body, bytes) else body.encode("utf-8")
        given = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        given.update(headers or {})
        lines = ["%s: %s" % pair for pair in given.items()]
        if self.request:
            why = "" if status < 400 else " " + data.decode("utf-8", "replace")
            line = "%s %s: %d%s" % (*self.request[:2], status, why)
            self.service.log(line)
        reason = http.client.responses.get(status, "X")
        self.send(head("%d %s" % (status, reason), *lines) + data)

    def send(self, *pieces, pause=0.0):
        for piece in pieces:
            self.sock.sendall(piece)
            if pause:
                self.pause(pause)

    def drip(self, data, seconds=10.0):
        """Send a byte at a time, for as long as the other side listens."""
        end = time.perf_counter() + seconds
        for byte in data:
            if time.perf_counter() > end or self.service.closing.is_set():
                break
            self.send(bytes([byte]), pause=0.02)

    def pause(self, seconds):
        """Do nothing, though not past the end of the server."""
        self.service.closing.wait(seconds)

    def hang(self, seconds=10.0):
        """Say nothing, for as long as the other side waits."""
        self.sock.settimeout(seconds)
        while self.sock.recv(65536):
            pass
        raise ConnectionAbortedError("the client has gone")

    def close(self, reset=False):
        if reset and self.is_open():
            linger = struct.pack("ii", 1, 0)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        else:  # Python forgets the descriptor before it closes it
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self.sock, socket.SHUT_WR)
        if self.stream:
            self.stream.close()
        self.sock.close()


# Answers, byte by byte


def head(status, *headers):
    return "\r\n".join(["HTTP/1.1 " + status, *headers, "", ""]).encode("latin-1")


def answer_of(text, **more):
    """An answer in which the agent says this."""
    parts = [{"kind": "text", "text": text}]
    output = [{"role": "agent", "parts": parts}]
    return dict({"_id": "r1", "task_id": "t1", "output": output}, **more)


def saying(text):
    """The body of an answer."""
    return json.dumps(answer_of(text)).encode()


def reply(body=b"", status="200 OK", *headers):
    """A well-formed answer; a text is what the agent says."""
    body = saying(body) if isinstance(body, str) else body
    return head(status, *headers, "Content-Length: %d" % len(body)) + body


def chunked(body, *headers, status="200 OK", size=1000):
    blocks = [body[i : i + size] for i in range(0, len(body), size)] + [b""]
    chunks = [b"%x\r\n%s\r\n" % (len(block), block) for block in blocks]
    return head(status, "Transfer-Encoding: chunked", *headers) + b"".join(chunks)


# Steps


def said(request):
    """The text that a request holds."""
    return request.json()["message"]["parts"][0]["text"]


def repeat_text(peer):
    """Answer what was said."""
    peer.send(reply(said(peer.request)))


def then_close(data):
    """Send this, and close the connection."""

    def step(peer):
        peer.send(data)
        peer.close()

    return step


hang_up = Connection.close  # without an answer
cut_off = then_close(reply("cut off")[:-9])  # within the body


def break_off(peer):
    """Reset the connection."""
    peer.close(reset=True)


def read_slowly(peer):
    """Read what comes, but not as fast as anybody would like."""
    while peer.sock.recv(65536):
        peer.pause(0.005)


class Proxy(StandIn):
    """A real proxy, which tunnels CONNECT and forwards absolute URLs.

    `requests` is what it was asked, `passed` the bytes that went through, and
    `credentials` what it wants, such as "user:password"; `refusal` is an answer to
    all, and `greeting` the one to a CONNECT.
    """

    def __init__(self, credentials="", refusal=b"", greeting=head("200 Go Ahead")):
        super().__init__(refusal or self.forward)
        self.credentials, self.greeting = credentials, greeting
        self.passed = bytearray()

    def forward(self, peer):
        wanted = "Basic " + base64.b64encode(self.credentials.encode()).decode()
        given = peer.request.header("proxy-authorization")
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


# An authority of our own (and the same without what VERIFY_X509_STRICT wants), and
# certificates for localhost, 127.0.0.1 and ::1, for another host, and one that has
# expired, all with the same key. They are good for nothing else.
AUTHORITY = """\
-----BEGIN CERTIFICATE-----
MIIBZDCCAQmgAwIBAgIBAjAKBggqhkjOPQQDAjAYMRYwFAYDVQQDDA1vcnFfbWlu
IHRlc3RzMCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAYMRYwFAYD
VQQDDA1vcnFfbWluIHRlc3RzMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEOvD0
9dNjALaySNaS/NHsOnrOWwH+qWkKt6CMlz0RbaDIQk9XK2T5bfEVYVKYQ2edokoK
W8Rw6ZP3n9pdkMZl66NCMEAwDwYDVR0TAQH/BAUwAwEB/zAOBgNVHQ8BAf8EBAMC
AQYwHQYDVR0OBBYEFH6zU5pWEZzM/dvDtymUpw35MgdzMAoGCCqGSM49BAMCA0kA
MEYCIQD5INzGptcLbcdwc+0SqmNQQoEQkLG7SQwEXJ+gxfhaAwIhAILXeoLmkUEk
nUnLJLoiZFTYlcgMKX6+VFbP7BfCmt/Q
-----END CERTIFICATE-----
"""
LAX_AUTHORITY = """\
-----BEGIN CERTIFICATE-----
MIIBUTCB+aADAgECAgEDMAoGCCqGSM49BAMCMBgxFjAUBgNVBAMMDW9ycV9taW4g
dGVzdHMwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBgxFjAUBgNV
BAMMDW9ycV9taW4gdGVzdHMwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAQ68PT1
02MAtrJI1pL80ew6es5bAf6paQq3oIyXPRFtoMhCT1crZPlt8RVhUphDZ52iSgpb
xHDpk/ef2l2QxmXrozIwMDAPBgNVHRMBAf8EBTADAQH/MB0GA1UdDgQWBBR+s1Oa
VhGczP3bw7cplKcN+TIHczAKBggqhkjOPQQDAgNHADBEAiAwXVi5br2+1xZODog7
DmZYQahcmWel7YDHRX3D3z6wBgIgdbDjfJ7Ni06OsMt15fo8YEaxhRqrxSrK3SUK
Tf4CwcU=
-----END CERTIFICATE-----
"""
LEAF_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgos2lHtdw2KbuLh/O
xsGoncdcrLlQcT4D7pT+4RxL2T+hRANCAASHeKuxb9KPrac1n+pgklvDK5BSP4xV
rJdA0AdW4YtQdeQNktlyoya4jhnLns/qjyCszFFvGRpEGN9dofTNQtIq
-----END PRIVATE KEY-----
"""
LEAF = """\
-----BEGIN CERTIFICATE-----
MIIBwzCCAWigAwIBAgIBBDAKBggqhkjOPQQDAjAYMRYwFAYDVQQDDA1vcnFfbWlu
IHRlc3RzMCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAUMRIwEAYD
VQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAASHeKuxb9KP
rac1n+pgklvDK5BSP4xVrJdA0AdW4YtQdeQNktlyoya4jhnLns/qjyCszFFvGRpE
GN9dofTNQtIqo4GkMIGhMAwGA1UdEwEB/wQCMAAwDgYDVR0PAQH/BAQDAgeAMBMG
A1UdJQQMMAoGCCsGAQUFBwMBMB8GA1UdIwQYMBaAFH6zU5pWEZzM/dvDtymUpw35
MgdzMB0GA1UdDgQWBBSQ2BLrLW/cMaM8IfNZSQlRLLElxTAsBgNVHREEJTAjggls
b2NhbGhvc3SHBH8AAAGHEAAAAAAAAAAAAAAAAAAAAAEwCgYIKoZIzj0EAwIDSQAw
RgIhANUGnrnO4T0OtnU8zynKHCUAQkJ5rjrvb9WEBGLUTb6iAiEAktfdvDUkmNxf
Bzlz+6/giVDWHaRnIjaS9zv4aUVnS8c=
-----END CERTIFICATE-----
"""
ELSEWHERE = """\
-----BEGIN CERTIFICATE-----
MIIBsjCCAVigAwIBAgIBBjAKBggqhkjOPQQDAjAYMRYwFAYDVQQDDA1vcnFfbWlu
IHRlc3RzMCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAUMRIwEAYD
VQQDDAllbHNld2hlcmUwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAASHeKuxb9KP
rac1n+pgklvDK5BSP4xVrJdA0AdW4YtQdeQNktlyoya4jhnLns/qjyCszFFvGRpE
GN9dofTNQtIqo4GUMIGRMAwGA1UdEwEB/wQCMAAwDgYDVR0PAQH/BAQDAgeAMBMG
A1UdJQQMMAoGCCsGAQUFBwMBMB8GA1UdIwQYMBaAFH6zU5pWEZzM/dvDtymUpw35
MgdzMB0GA1UdDgQWBBSQ2BLrLW/cMaM8IfNZSQlRLLElxTAcBgNVHREEFTATghFl
bHNld2hlcmUuaW52YWxpZDAKBggqhkjOPQQDAgNIADBFAiEA11z23ozphE4FBr82
TzXWVowSxyk1jEX6uDd1Yoa84MMCIF2xBFyW+ZmEwb1Y2jnV1Rl137lPSiO6gZCU
cuOnCbQY
-----END CERTIFICATE-----
"""
EXPIRED = """\
-----BEGIN CERTIFICATE-----
MIIBvzCCAWagAwIBAgIBBTAKBggqhkjOPQQDAjAYMRYwFAYDVQQDDA1vcnFfbWlu
IHRlc3RzMB4XDTIwMDEwMTAwMDAwMFoXDTIxMDEwMTAwMDAwMFowFDESMBAGA1UE
AwwJbG9jYWxob3N0MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEh3irsW/Sj62n
NZ/qYJJbwyuQUj+MVayXQNAHVuGLUHXkDZLZcqMmuI4Zy57P6o8grMxRbxkaRBjf
XaH0zULSKqOBpDCBoTAMBgNVHRMBAf8EAjAAMA4GA1UdDwEB/wQEAwIHgDATBgNV
HSUEDDAKBggrBgEFBQcDATAfBgNVHSMEGDAWgBR+s1OaVhGczP3bw7cplKcN+TIH
czAdBgNVHQ4EFgQUkNgS6y1v3DGjPCHzWUkJUSyxJcUwLAYDVR0RBCUwI4IJbG9j
YWxob3N0hwR/AAABhxAAAAAAAAAAAAAAAAAAAAABMAoGCCqGSM49BAMCA0cAMEQC
IDSdDsizhq6/2TKdPLWpcDgaxRyYUBuO2uoTFMSMc0phAiAHsCQtdgSeh0SfU/vs
W8pXmlQapZw5NBWVDjIvpUGhYg==
-----END CERTIFICATE-----
"""


def server_context(certificate=LEAF):
    """The TLS side of a server; a context loads certificates from files alone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with temporary_file(certificate + LEAF_KEY) as path:
        context.load_cert_chain(path)
    return context


def trusting_context():
    return ssl.create_default_context(cadata=AUTHORITY)


# ----------------------------------------------------------------------------
# Helpers of the tests
# ----------------------------------------------------------------------------


@contextlib.contextmanager
def temporary_file(text, suffix=".pem"):
    handle, path = tempfile.mkstemp(suffix)
    try:
        with open(handle, "w") as stream:
            stream.write(text)
        yield path
    finally:
        os.remove(path)


def until(true, seconds=20, now=time.perf_counter, wait=threading.Event().wait):
    """Wait until `true()`, and return what it said; no patch of a test stops this."""
    end = now() + seconds
    while True:
        found = true()
        if found:
            return found
        if now() > end:
            raise AssertionError("it did not happen within %s s" % seconds)
        wait(0.005)


@contextlib.contextmanager
def within(seconds, now=time.perf_counter):
    """What is done in this context must not take longer."""
    started = now()
    yield
    taken = now() - started
    if taken > seconds:
        raise AssertionError("it took %.1f s, not %s s" % (taken, seconds))


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


def at_once(function, cases):
    """The results for all cases, some at a time: starting a Python takes a while."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return list(pool.map(function, cases))


def closed_url():
    """A URL on which nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return "http://127.0.0.1:%d" % sock.getsockname()[1]


def texts_of(error):
    """All that a program may show of an error, its chain included."""
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    return "\n".join(
        [str(error), repr(error), str(getattr(error, "message", "")), *lines]
    )


@contextlib.contextmanager
def logged(level=logging.DEBUG):
    """The records that the module writes, of this level and above."""
    logger, handler, records = (
        logging.getLogger(orq_min.__name__),
        logging.Handler(),
        [],
    )
    handler.emit = records.append
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield records
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)


@contextlib.contextmanager
def resolving(*addresses):
    """Every name has these addresses, of either family."""
    families = [
        socket.AF_INET6 if ":" in one[0] else socket.AF_INET for one in addresses
    ]
    pairs = zip(families, addresses)
    found = [(family, socket.SOCK_STREAM, 6, "", one) for family, one in pairs]
    with mock.patch("socket.getaddrinfo", lambda *_, **__: found):
        yield


@contextlib.contextmanager
def full_backlog(host="127.0.0.1"):
    """An address that lets nobody in, and refuses nobody."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket(family))
        full.bind((host, 0))
        full.listen(0)
        for _ in range(8):
            waiting = stack.enter_context(socket.socket(family))
            waiting.setblocking(False)
            with contextlib.suppress(OSError):
                waiting.connect(full.getsockname())
        yield full.getsockname()


def client(service, **options):
    """A client of the stand-in."""
    given = dict({"api_key": service.key, "server_url": service.url}, **options)
    if service.tls and "ssl_context" not in options:
        given["ssl_context"] = trusting_context()
    return orq_min.Orq(**given)


class ServerTest(unittest.TestCase):
    """Starts stand-ins that repeat what is said, and clients of them that try once."""

    maxDiff = None

    def setUp(self):
        environment = mock.patch.dict(os.environ, clean_environment(), clear=True)
        environment.start()
        self.addCleanup(environment.stop)

    def enter(self, resource):
        value = resource.__enter__()
        self.addCleanup(resource.__exit__, None, None, None)
        return value

    def server(self, *steps, **options):
        return self.enter(StandIn(*(steps or (repeat_text,)), **options))

    def client(self, server, **options):
        given = dict({"timeout_ms": 10000, "retry_config": None}, **options)
        return self.enter(client(server, **given))

    def call(self, orq, text="hi", **given):
        given = dict({"agent_key": "my-agent", "message": text}, **given)
        return orq.agents.responses.create(**given).text

    def failure(self, orq, kind=orq_min.OrqError, **given):
        with self.assertRaises(kind) as caught:
            self.call(orq, **given)
        return caught.exception

    def outcome(self, orq, text="hi", **given):
        """What a call returns or raises."""
        try:
            return self.call(orq, text, **given)
        except orq_min.OrqError as error:
            return error


class LoopbackTest(ServerTest):
    """Has a stand-in that behaves, `service`, and a client of it, `orq`."""

    def setUp(self):
        super().setUp()
        self.service = self.enter(StandIn())
        self.orq = self.enter(client(self.service))

    def create(self, **given):
        given = dict({"agent_key": "my-agent", "message": "hi"}, **given)
        return self.orq.agents.responses.create(**given)


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


# ----------------------------------------------------------------------------
# The file
# ----------------------------------------------------------------------------

PUBLIC_NAMES = """
    A2AMessage APIConnectionError APIError APITimeoutError BackoffStrategy BinaryFormat
    CompletionTokensDetails Contact CreateAgentResponseResponseBody
    CreateAgentResponseThread CreateAgentResponseUsage DEFAULT_RETRY DataPart ErrorPart
    FileInURIFormat FilePart Function Identity Memory Orq OrqError Output
    PendingToolCalls PromptTokensDetails Responses RetryConfig Telemetry TextPart
    ToolCallPart ToolResultPart UNSET UnknownPart ValidationError create_response
""".split()

STATE = """
import logging, os, signal, socket, threading, urllib.request, warnings
def state():
    root, logger = logging.root, logging.getLogger("orq_min")
    return (
        urllib.request._opener, root.handlers[:], root.level, logger.handlers[:],
        logger.level, logger.propagate, logging.raiseExceptions, warnings.filters[:],
        socket.getdefaulttimeout(), sys.excepthook, dict(os.environ), sys.path[:],
        signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM),
        threading.active_count(), sys.getrecursionlimit(),
    )
before = state()
import orq_min
print([pair for pair in zip(before, state()) if pair[0] != pair[1]])
"""

# How a test loads a copy of the file: (its name, code that makes `m`)
AS_IT_IS = ("orq_min.py", "import orq_min as m")
WAYS_TO_LOAD = {
    "under another name": ("vendored.py", "import vendored as m"),
    "inside a package": ("host/net/orq.py", "from host.net import orq as m"),
    "from a zip": ("lib.zip", "sys.path[0] += '/lib.zip'; import orq_min as m"),
    "from a read-only directory": AS_IT_IS,
    "without docstrings": AS_IT_IS,
    "with annotations that are text": AS_IT_IS,
    "by importlib, without being registered": (
        "plugin.py",
        "import importlib.util as u\n"
        "spec = u.spec_from_file_location('plugin', sys.path[0] + '/plugin.py')\n"
        "m = u.module_from_spec(spec); spec.loader.exec_module(m)\n"
        "assert 'plugin' not in sys.modules",
    ),
}

USE = """
message = m.A2AMessage("user", [m.TextPart("hi"), m.FilePart.from_bytes(b"x", "a.csv")])
res = m.create_response("my-agent", message, **eval(sys.argv[2]))
assert isinstance(res.output[0].parts[0], m.TextPart)
try:
    m.Memory(5)
except m.ValidationError as error:
    print(res.text, error)
"""

RELOAD = """
import copy, importlib, logging, pickle, orq_min
logging.disable()
given, options = {"agent_key": "my-agent", "message": "hi"}, eval(sys.argv[2])
policies = [orq_min.UNSET, orq_min.DEFAULT_RETRY]
clients = [orq_min.Orq(**options)]
importlib.reload(orq_min)
clients += [orq_min.Orq(retry_config=policies[1], **options), orq_min.Orq(**options)]
for new in (orq_min.UNSET, orq_min.DEFAULT_RETRY):
    policies += [new, pickle.loads(pickle.dumps(new)), copy.deepcopy(new)]
for orq in clients:
    for retries in policies:
        print(orq.agents.responses.create(retries=retries, **given).text)
"""


class OneFile(LoopbackTest):
    """It is one file that is copied anywhere, and importing it does nothing else."""

    def python(self, code, place=os.path.dirname(MODULE), flags="-ISB"):
        """What a Python prints that finds the file in this place."""
        options = {"api_key": self.service.key, "server_url": self.service.url}
        code = "import sys; sys.path.insert(0, sys.argv[1])\n" + code
        command = [sys.executable, flags, "-W", "error", "-c", code, place]
        command.append(repr(options))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        done = subprocess.run(command, env=clean_environment(), timeout=30, **pipes)
        self.assertEqual(done.stderr.decode(), "")
        return done.stdout.decode().strip()

    def test_importing_it_pulls_in_little_and_prints_and_configures_nothing(self):
        self.assertEqual(self.python(STATE), "[]")
        code = "import urllib.request, json, dataclasses, typing, logging\n"
        code += "before = set(sys.modules); import orq_min\n"
        pulled_in = self.python(code + "print(*set(sys.modules) - before)").split()
        self.assertIn("orq_min", pulled_in)
        late = "argparse asyncio base64 difflib mimetypes decimal uuid gzip shlex"
        self.assertEqual(set(late.split()) & set(pulled_in), set())

    def test_it_works_wherever_it_is_copied_to(self):
        """And names its licence and its version at its head."""
        source = pathlib.Path(MODULE).read_text(encoding="ascii")
        head = "#!/usr/bin/env python3\n# SPDX-License-Identifier: MIT-0\n"
        self.assertEqual(source[: len(head)], head)
        self.assertIn("orq_min.py %s" % orq_min.__version__, source.split("\n")[2])
        for way, (name, load) in WAYS_TO_LOAD.items():
            with self.subTest(way), tempfile.TemporaryDirectory() as place:
                path, text = pathlib.Path(place, name), source
                path.parent.mkdir(parents=True, exist_ok=True)
                if "text" in way:
                    first = "\nfrom __future__ import annotations\nimport "
                    text = source.replace("\nimport ", first, 1)
                if "zip" in way:
                    with zipfile.ZipFile(str(path), "w") as archive:
                        archive.writestr("orq_min.py", text)
                else:
                    path.write_text(text, encoding="ascii")
                flags = "-ISBOO" if "docstrings" in way else "-ISB"
                if "read-only" in way:
                    os.chmod(place, 0o555)
                    flags = "-IS"  # so that it tries to write a cache
                said = self.python(load + USE, place, flags)
                os.chmod(place, 0o755)
                wanted = "You said: hi [file: a.csv, text/csv, 1 bytes]"
                self.assertEqual(said, wanted + " entity_id: must be text, not int")

    def test_unset_and_the_default_policy_outlive_a_reload_and_a_copy(self):
        """Each request is refused with 429 once, so that a policy must be followed."""
        slow = {"status": 429, "headers": {"Retry-After-Ms": "20"}}
        self.service.next(*[slow, reply("hi")] * 24)
        self.assertEqual(self.python(RELOAD).split(), ["hi"] * 24)
        self.assertEqual(len(self.service.requests), 48)

    def shown(self, thing, names):
        """The help on something, which must show these names."""
        text = pydoc.plain(pydoc.render_doc(thing))
        for name in names:
            self.assertRegex(text, r"\b%s\b" % name)

    def test_its_public_names_are_the_promised_ones_and_no_others(self):
        namespace = {}
        exec("from orq_min import *", namespace)
        del namespace["__builtins__"]
        self.assertEqual(sorted(namespace), sorted(PUBLIC_NAMES))
        self.assertEqual(sorted(orq_min.__all__), sorted(PUBLIC_NAMES))
        self.shown(orq_min, PUBLIC_NAMES)
        for model in filter(dataclasses.is_dataclass, namespace.values()):
            if isinstance(model, type):
                self.shown(model, [field.name for field in dataclasses.fields(model)])

    def test_all_lists_of_parameters_agree(self):
        def parameters(function, names):
            self.assertFalse(hasattr(function, "__signature__"))  # but its source
            found = dict(inspect.signature(function).parameters)
            self.shown(function, found)
            found.pop("self", None)
            self.assertEqual(list(found), names.split())
            return list(found.values())

        def named(found):
            return [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in found]

        responses, names = orq_min.Responses, "agent_key message task_id variables"
        names += " identity contact thread memory metadata background retries"
        names += " server_url timeout_ms http_headers extra_body"
        create = parameters(responses.create, names)
        self.assertEqual(create, named(create))
        needed = [p.name for p in create if p.default is inspect.Parameter.empty]
        self.assertEqual(needed, ["agent_key", "message"])
        for name in names.split():
            self.assertRegex(inspect.getdoc(responses.create), r"(?m)^%s: \w" % name)
        self.assertEqual(parameters(responses.create_async, names), create)
        found = parameters(orq_min.create_response, names + " api_key ssl_context")
        self.assertEqual((named(found[:-2]), found[2:-2]), (create, create[2:]))
        names = "agent_key task_id retries server_url timeout_ms http_headers"
        get = parameters(responses.get, names)
        self.assertEqual(parameters(responses.get_async, names), get)
        self.assertIs(get.pop(1).default, inspect.Parameter.empty)
        self.assertLessEqual(set(get), set(create))
        public = {name for name in vars(responses) if name[0] != "_"}
        self.assertEqual(public, {"create", "create_async", "get", "get_async"})
        names = "api_key server_url timeout_ms retry_config ssl_context"
        options = parameters(orq_min.Orq, names)
        self.assertEqual(options[1:], named(options[1:]))
        self.assertEqual({p.default for p in options[:3]}, {None})

    def test_wrong_arguments_are_pythons_own_type_error(self):
        call = self.orq.agents.responses.create
        for words, given in (("unexpected", {"taskid": "x"}), ("missing", {})):
            with self.assertRaisesRegex(TypeError, words):
                call(agent_key="a", **given)
        self.assertRaisesRegex(TypeError, "positional", call, "a", "hi")


# ----------------------------------------------------------------------------
# How programs use it
# ----------------------------------------------------------------------------

# The example of the service's documentation, with only its import changed
SEED_EXAMPLE = """
from orq_min import Orq
import os

with Orq(api_key=os.getenv("ORQ_API_KEY", ""),) as orq:

    res = orq.agents.responses.create(agent_key="<value>", message={
        "role": "user", "parts": [],
    }, contact={
        "id": "contact_01ARZ3NDEKTSV4RRFFQ69G5FAV", "display_name": "Jane Doe",
        "email": "jane.doe@example.com", "tags": ["hr", "engineering"],
        "metadata": [{"department": "Engineering", "role": "Senior Developer"}],
        "logo_url": "https://example.com/avatars/jane-doe.jpg",
    }, thread={
        "id": "thread_01ARZ3NDEKTSV4RRFFQ69G5FAV",
        "tags": ["customer-support", "priority-high"],
    }, background=False)

    assert res is not None
    print(res)
"""


class PortedPrograms(LoopbackTest):
    """Programs for the official package work with only their import changed."""

    def test_the_documented_example(self):
        self.service.agents.add("<value>")
        os.environ.update(ORQ_API_KEY=self.service.key, ORQ_BASE_URL=self.service.url)
        printed, official = io.StringIO(), mock.MagicMock()
        with contextlib.redirect_stdout(printed):
            exec(SEED_EXAMPLE, {})
            exec(SEED_EXAMPLE.partition("Orq\n")[2], {"Orq": official})
        self.assertIn("text='You said nothing.'", printed.getvalue())
        (request,) = self.service.requests
        self.assertEqual(request.path, "/v2/agents/%3Cvalue%3E/responses")
        orq = official.return_value.__enter__.return_value
        given = orq.agents.responses.create.call_args[1]
        self.assertEqual(dict(request.json(), agent_key="<value>"), given)

    def test_a_tool_loop_runs_until_no_call_is_pending(self):
        part = orq_min.TextPart(kind="text", text="What is the weather?")
        first = res = self.create(message=orq_min.A2AMessage(role="user", parts=[part]))
        asked = []
        while getattr(res, "pending_tool_calls", None) or []:
            (call,) = res.pending_tool_calls
            asked.append((call.type, call.function.name, call.function.arguments))
            part = {"kind": "tool_result", "tool_call_id": call.id}
            part["result"] = {"celsius": 21}
            message = {"role": "tool", "parts": [part]}
            res = self.create(task_id=res.task_id, message=message)
        self.assertEqual(asked, [("function", "get_weather", '{"city": "Paris"}')])
        ((said,),) = [m.parts for m in res.output if m.role == "agent"]
        self.assertIsInstance(said, orq_min.TextPart)
        self.assertEqual((said.text, said.kind), (res.text, "text"))
        self.assertEqual(res.text, 'The tool says: {"celsius": 21}')
        self.assertEqual((res.usage.total_tokens, res.finish_reason), (5, "stop"))
        self.assertEqual(res.task_id, first.task_id)
        self.assertNotEqual(res.id, first.id)
        self.assertIsNone(res.pending_tool_calls)

    def test_create_async_answers_and_raises_as_create_does(self):
        def call(orq=self.orq, **given):
            create = orq.agents.responses.create_async
            return asyncio.run(asyncio.wait_for(create(**given), 9))

        given = {"agent_key": "my-agent", "message": "hi"}
        self.assertEqual(call(**given).text, "You said: hi")
        self.assertRaises(orq_min.ValidationError, call, task_id=5, **given)
        self.assertRaises(orq_min.APIError, call, task_id="unknown", **given)
        self.assertRaises(TypeError, call, taskid="x", **given)
        without_keys = client(self.service, api_key=iter(()).__next__)
        self.assertRaises(RuntimeError, call, without_keys, **given)

    def test_each_way_to_call_passes_every_parameter_on(self):
        responses, server = self.orq.agents.responses, self.server(reply("hi"))
        task = {"agent_key": "a", "task_id": "t"}
        body = {"variables": {"v": 1}, "identity": {"id": "i"}, "thread": {"id": "t"}}
        body.update(memory={"entity_id": "e"}, metadata={"m": 1}, background=True)
        whole = dict(body, message="hi", extra_body={"x": 1}, **task)
        message = from_user(text_part("hi"))

        def in_loop(coroutine_function):
            return lambda **given: asyncio.run(coroutine_function(**given))

        quick = functools.partial(orq_min.create_response, api_key="k")
        create, get = in_loop(responses.create_async), in_loop(responses.get_async)
        for call in (responses.create, create, quick, responses.get, get):
            given = task if call in (responses.get, get) else whole
            given = dict(given, server_url=server.url + "/p/")
            self.assertEqual(call(http_headers={"X-T": "7"}, **given).text, "hi")
            request = server.requests[-1]
            self.assertTrue(request.path.startswith("/p/v2/agents/a/responses"))
            self.assertEqual(request.header("x-t"), ["7"])
            if request.method == "POST":
                wanted = dict(body, x=1, task_id="t", message=message)
                self.assertEqual(request.json(), wanted)
                call(**dict(given, identity=None, contact={"id": "c"}))
                self.assertEqual(server.requests[-1].json()["contact"], {"id": "c"})
            server.next({"status": 429}, Connection.hang)
            given["retries"] = None
            self.assertRaises(orq_min.APIError, call, **given)
            self.assertRaises(orq_min.APITimeoutError, call, timeout_ms=200, **given)

    def test_the_key_and_the_server_come_from_the_environment_or_a_function(self):
        os.environ["ORQ_API_KEY"] = self.service.key + "\n"
        os.environ["ORQ_BASE_URL"] = " %s/some/prefix/\n" % self.service.url
        with orq_min.Orq() as orq:
            self.call(orq)
        self.assertEqual(orq_min.create_response("my-agent", "hi").text, "You said: hi")
        keys = iter(["other", self.service.key])  # one for each call
        with client(self.service, api_key=lambda: next(keys)) as orq:
            self.assertEqual(self.failure(orq).status_code, 401)
            self.assertEqual(self.call(orq), "You said: hi")
        paths = [request.path for request in self.service.requests]
        path = "/v2/agents/my-agent/responses"
        self.assertEqual(paths, ["/some/prefix" + path] * 2 + [path] * 2)

    def test_a_debugger_that_looks_at_variables_does_no_harm(self):
        def trace(frame, event, argument):
            return trace if frame.f_locals is not None else None

        self.addCleanup(sys.settrace, sys.gettrace())
        sys.settrace(trace)
        self.assertEqual(self.call(self.orq, "traced"), "You said: traced")

    def test_a_program_is_tested_with_answers_made_by_hand(self):
        m, given = orq_min, {"agent_key": "a", "message": "Hello"}
        said = [m.TextPart("Hel"), m.TextPart("lo you")]
        output = [m.Output(role="user", parts=said[:1]), m.Output(parts=said)]
        answer = m.CreateAgentResponseResponseBody(output=output)
        with mock.patch("orq_min.Responses.create", autospec=True) as create:
            create.return_value = answer
            with m.Orq("any key") as orq:
                res = orq.agents.responses.create(**given)
                self.assertEqual((res.text, res.error), ("Hello you", None))
                self.assertEqual(create.call_args[1], given)
                self.assertRaises(TypeError, orq.agents.responses.create, mesage="b")
            self.assertEqual(m.create_response("a", "b").text, "Hello you")
            create.side_effect = m.APITimeoutError("no answer")
            self.assertRaises(m.APITimeoutError, m.create_response, "a", "b")
        call = m.PendingToolCalls("c", m.Function("look_up"))
        self.assertEqual((call.type, call.function.arguments), ("function", "{}"))
        empty, other = (m.CreateAgentResponseResponseBody() for _ in range(2))
        self.assertEqual((empty.output, empty.text, empty.task_id), ([], "", ""))
        empty.output.append(m.Output(parts=[m.ErrorPart("out of money")]))
        self.assertEqual((empty.error, other.output), ("out of money", []))
        other.status = "failed"
        self.assertEqual(other.error, "failed")


# ----------------------------------------------------------------------------
# What goes out
# ----------------------------------------------------------------------------


def odd(module, name, *bases, **methods):
    """A class of another library."""
    return type(name, bases, dict(methods, __module__=module))


def dumped(content):
    return odd("pydantic", "Model", model_dump=lambda self: content)()


def place(content):
    return odd("paths", "Place", __fspath__=lambda self: content)()


Color, Level = enum.Enum("Color", {"RED": "red"}), enum.IntEnum("Level", {"HIGH": 3})
Point = dataclasses.make_dataclass("Point", ["x", ("y", object, None)])
UTC = datetime.timezone.utc
EAST = datetime.timezone(datetime.timedelta(hours=2))
CIRCLE = {}
CIRCLE["me"] = [CIRCLE]
NO_DATE = odd("pandas", "NaTType", datetime.datetime, __eq__=lambda *_: False)
ITSELF = odd("pydantic", "Model", model_dump=lambda self: self)
DEEP = functools.reduce(lambda value, _: [value], range(100000), [])

# fmt: off
CONVERSIONS = [  # free-form values, and what the service gets
    ({"a": [None, True, 1, 1.5, "é\ud800"]}, {"a": [None, True, 1, 1.5, "é\ud800"]}),
    (datetime.datetime(2025, 1, 2, 3, 4, 5), "2025-01-02T03:04:05"),
    (datetime.datetime(2025, 1, 2, 3, 4, tzinfo=EAST), "2025-01-02T03:04:00+02:00"),
    (datetime.datetime(2025, 1, 2, 3, 4, tzinfo=UTC), "2025-01-02T03:04:00Z"),
    (datetime.date(2025, 1, 2), "2025-01-02"), (datetime.time(3, 4, 5), "03:04:05"),
    (decimal.Decimal("1.10"), "1.10"), (10**300, 10**300), (None, None),
    (uuid.UUID(int=5), "00000000-0000-0000-0000-000000000005"),
    ([Color.RED, Level.HIGH], ["red", 3]), ([{5}, frozenset(["a"])], [[5], ["a"]]),
    ({Color.RED: 1, Level.HIGH: 2, 7: 3}, {"red": 1, "3": 2, "7": 3}),
    ([collections.deque([1]), range(2)], [[1], [0, 1]]), ([[1]] * 2, [[1], [1]]),
    ((1, (2, 3)), [1, [2, 3]]), (types.MappingProxyType({"a": {}}), {"a": {}}),
    (Point(1, [Point(2)]), {"x": 1, "y": [{"x": 2, "y": None}]}),
    ([pathlib.PurePosixPath("/a/b"), place("x")], ["/a/b", "x"]),
    (dumped({"at": datetime.date(2025, 1, 2)}), {"at": "2025-01-02"}),
    (dumped([dumped(None), dumped(5)]), [None, 5]),
]
REFUSALS = [  # free-form values without an honest JSON form, and words that name them
    (float("nan"), "NaN has no JSON form"), (float("-inf"), "-Infinity has"),
    (b"raw", "bytes has"), (bytearray(b"x"), "bytearray has"), (object(), "object has"),
    (datetime.timedelta(1), "datetime.timedelta has"), (1j, "complex has"),
    ((n for n in [1]), "generator has"), (Point, "type has"), (ITSELF, "type has"),
    (odd("numpy", "int64")(), "numpy.int64 has no JSON form"), (DEEP, "deep"),
    (NO_DATE(2025, 1, 2), "pandas.NaTType has"), (place(b"raw"), "paths.Place has"),
    (decimal.Decimal("NaN"), "decimal.Decimal has"), (10**100000, "int has"),
    (decimal.Decimal("sNaN"), "decimal.Decimal has"), (ITSELF(), "itself"),
    (decimal.Decimal("-Infinity"), "decimal.Decimal has"),
]
REFUSALS_WITHIN = [  # the same inside of others, and the path that is named
    ([1, {"a": float("inf")}], "[1].a"), ({1.5: 1}, "[1.5]"), ({None: 1}, "[None]"),
    ({True: 1}, "[True]"), ({(1, 2): 1}, "[(1, 2)]"), ({10**5000: 1}, "[...]"),
    ({7: 1, "7": 2}, "['7']"), ({"two words": b""}, "['two words']"),
    (Point(1, b""), ".y"), (dumped({"a": b""}), ".a"), (CIRCLE, ".me[0]"),
]
# fmt: on
MIME_TYPES = """
    txt text/plain csv text/csv md text/markdown html text/html json application/json
    pdf application/pdf doc application/msword xls application/vnd.ms-excel
    ppt application/vnd.ms-powerpoint docx {}wordprocessingml.document
    xlsx {}spreadsheetml.sheet pptx {}presentationml.presentation zip application/zip
    png image/png jpg image/jpeg jpeg image/jpeg gif image/gif webp image/webp
    svg image/svg+xml mp3 audio/mpeg wav audio/wav mp4 video/mp4 odd of/machine
""".replace("{}", "application/vnd.openxmlformats-officedocument.").split()


def text_part(text, **more):
    return dict({"kind": "text", "text": text}, **more)


def from_user(*parts, **more):
    return dict({"role": "user", "parts": list(parts)}, **more)


class Outgoing(LoopbackTest):
    """What goes out is what the contract's request tables say."""

    def sent(self, **given):
        self.create(**given)
        return self.service.requests[-1].json()

    def test_the_default_request(self):
        wanted = {"message": from_user(text_part("hi")), "background": False}
        self.assertEqual(self.sent(), wanted)
        (request,) = self.service.requests
        for name in ("Content-Type", "Accept"):
            self.assertEqual(request.header(name), ["application/json"])
        self.assertEqual(request.header("Authorization"), ["Bearer test-key-123"])
        self.assertEqual(request.header("Host"), [self.service.netloc])
        self.assertIn("orq_min", request.header("User-Agent")[0])
        self.assertIs(self.sent(extra_body={"stream": False})["stream"], False)

    def test_every_field_reaches_the_service_whether_object_or_mapping(self):
        file = {"bytes": "aGk=", "mimeType": "text/plain", "name": "a.txt"}
        uri = {"uri": "https://x/a.pdf", "mimeType": "application/pdf", "name": "b"}
        person = {"id": "c", "display_name": "Ada", "email": "a@b", "tags": ["t"]}
        person.update(logo_url="https://x/y", metadata=[{"k": None}])
        attached = {"kind": "file", "file": file, "metadata": {"a": 1}}
        parts = [text_part("look"), attached, {"kind": "file", "file": uri}]
        expected = {"message": from_user(*parts, messageId="01ARZ3"), "metadata": {}}
        expected["variables"] = {"name": "Ada", "empty": {}, "none": None}
        expected.update(thread={"id": "t", "tags": []}, memory={"entity_id": "e"})
        expected.update(identity=person, background=True)
        given = copy.deepcopy(expected)
        self.assertEqual(self.sent(**given), expected)
        self.assertEqual(given, expected, "the caller's mappings were changed")

        given["message"]["message_id"] = given["message"].pop("messageId")
        files = [part["file"] for part in given["message"]["parts"][1:]]
        for inner in files:
            inner["mime_type"] = inner.pop("mimeType")
        files[0]["bytes_"] = files[0].pop("bytes")
        self.assertEqual(self.sent(**given), expected)

        m = orq_min
        text = m.TextPart(text="look")
        binary = m.FilePart(m.BinaryFormat("aGk=", "text/plain", "a.txt"), {"a": 1})
        link = m.FilePart(file=m.FileInURIFormat(*uri.values()))
        objects = {
            "message": m.A2AMessage("user", (text, binary, link), "01ARZ3"),
            "identity": m.Identity(**dict(person, tags=collections.deque("t"))),
            "thread": m.CreateAgentResponseThread("t", ()),
            "memory": types.MappingProxyType({"entity_id": "e"}),
        }
        self.assertEqual(self.sent(**dict(expected, **objects)), expected)
        mixed = from_user(text, attached, link, message_id="01ARZ3")
        self.assertEqual(self.sent(**dict(expected, message=mixed)), expected)
        for older in (m.Contact(**person), person):
            self.assertEqual(self.sent(contact=older)["contact"], person)

    def test_what_is_none_is_left_out(self):
        names = "task_id variables identity contact thread memory metadata background"
        body = self.sent(**dict.fromkeys(names.split()))
        self.assertEqual(list(body), ["message"])
        person = {"id": "c", "email": None, "tags": None}
        for given in (person, orq_min.Contact("c", email=None)):
            self.assertEqual(self.sent(contact=given)["contact"], {"id": "c"})
        part = {"kind": "file", "file": {"bytes": None, "bytes_": "eA=="}}
        message = from_user(part, messageId="x", message_id=None)
        wanted = from_user({"kind": "file", "file": {"bytes": "eA=="}}, messageId="x")
        self.assertEqual(self.sent(message=message)["message"], wanted)

    def test_a_tool_result_may_be_any_json(self):
        for result in ({"a": None}, [], "text", 0, False, 1.5):
            first = self.create(message="weather")
            call_id = first.pending_tool_calls[0].id
            part = orq_min.ToolResultPart(call_id, result)
            message = orq_min.A2AMessage("tool", [part])
            body = self.sent(message=message, task_id=first.task_id)
            wanted = {"kind": "tool_result", "tool_call_id": call_id, "result": result}
            self.assertEqual(body["message"]["parts"], [wanted])

    def test_an_agent_key_is_one_segment_of_the_path(self):
        for agent in ("a b", *"a/../b x?y é#%2F ... ..a ~ a;b \x00".split(" ")):
            with self.subTest(agent):
                self.service.agents.add(agent)
                self.assertEqual(self.create(agent_key=agent).text, "You said: hi")
                path = self.service.requests[-1].path
                self.assertRegex(path, "^/v2/agents/[A-Za-z0-9._~%-]+/responses$")

    def test_free_form_values_are_converted_as_the_official_client_does(self):
        for value, expected in CONVERSIONS:
            with self.subTest(value=value):
                free, wanted = {"v": value}, {"v": expected}
                extra = types.MappingProxyType({"conversation": free})
                given = {
                    "contact": {"id": "c", "metadata": [free]},
                    "extra_body": extra,
                }
                body = self.sent(variables=free, metadata=free, **given)
                for where in ("variables", "metadata", "conversation"):
                    self.assertEqual(body[where], wanted)
                self.assertEqual(body["contact"]["metadata"], [wanted])

    def test_files_are_attached_with_their_type(self):
        m, content = orq_min, b"\x00\xffabc"
        text = base64.b64encode(content).decode()
        with tempfile.TemporaryDirectory() as folder:
            names = {"b.PDF": "application/pdf", "c": None, "d.txt": "text/x-mine"}
            for name, mime_type in names.items():
                given = mime_type if name == "d.txt" else None
                path = pathlib.Path(folder, name)
                path.write_bytes(content)
                made = [m.FilePart.from_path(path, mime_type=given)]
                made += [m.FilePart.from_path(str(path), given)]
                made += [m.FilePart.from_bytes(content, name, mime_type=given)]
                made += [m.FilePart.from_bytes(memoryview(content), name, given)]
                wanted = m.FilePart(m.BinaryFormat(text, mime_type, name))
                self.assertEqual(made, [wanted] * 4)
            shown = self.create(message=m.A2AMessage("user", made[:1])).text
            self.assertIn("[file: d.txt, text/x-mine, 5 bytes]", shown)
            self.assertRaises(OSError, m.FilePart.from_path, folder + "/missing")
            path.write_bytes(b"")
            with self.assertRaisesRegex(m.ValidationError, "d.txt.*empty"):
                m.FilePart.from_path(path)
        uri = "https://example.com/a/report.pdf?x=1.txt#y"
        for given, wanted in ((None, "application/pdf"), ("a/b", "a/b")):
            part = m.FilePart.from_uri(uri, mime_type=given)
            self.assertEqual(part.file, m.FileInURIFormat(uri, wanted))

    def test_the_usual_types_are_the_same_on_every_machine(self):
        of_machine = mock.Mock(return_value=("of/machine", None))
        with mock.patch("mimetypes.guess_type", of_machine):
            for ending, mime_type in zip(MIME_TYPES[::2], MIME_TYPES[1::2]):
                for name in ("a." + ending, "b.c." + ending.upper()):
                    file = orq_min.FilePart.from_bytes(b"x", name).file
                    self.assertEqual(file.mime_type, mime_type)


# Parameter -> what is added to it in the paths that must be named -> wrong values
# fmt: off
HUGE = 10**5000  # of more digits than str() and repr() may write
WRONG_VALUES = {
    "message": {
        "": [None, 5, b"hi", [], orq_min.TextPart("hi")],
        ".role .parts": [{}, {"role": "agent", "parts": "hi"}],
        ".parts": [{"role": "user", "parts": {}}],
        ".messageId": [from_user(messageId="a", message_id="b")],
        ".parts[0] .parts[1]": [from_user("hi", None)],
        ".parts[0].kind .parts[1].kind": [from_user({}, {"kind": ["text"]})],
        ".parts[0].kind": [from_user({"kind": "data", "data": {}})],
        ".parts[0].text .parts[0].texd": [from_user({"kind": "text", "texd": "x"})],
        ".parts[0].tool_call_id": [from_user({"kind": "tool_result"})],
        ".parts[0].file": [from_user({"kind": "file", "file": x}) for x in ({}, None)],
    },
    "task_id": {"": [5]}, "metadata": {"": [3]}, "background": {"": ["yes", 1]},
    "variables": {"": [[], "a=b"], "[5.5] .a": [{5.5: 1, "a": b""}]},
    "contact": {
        "": ["c", orq_min.Memory("x")], ".id .email": [{"id": 5, "email": 5}],
        ".id": [{"display_name": "Ada"}, {"id": None}], "[...]": [{"id": "c", HUGE: 1}],
        ".tags": [{"id": "c", "tags": tags} for tags in ("abc", {"a"}, {})],
        ".tags[1]": [{"id": "c", "tags": ["a", 5]}],
        ".metadata": [{"id": "c", "metadata": {"a": 1}}],
        ".metadata[0] [5]": [{"id": "c", "metadata": ["a"], 5: 1}],
    },
    "identity": {"": [5], ".id .name": [{"name": "a"}]},
    "thread": {".id": [{}], ".tag": [{"id": "t", "tag": []}]},
    "memory": {".entity_id .entity": [{"entity": "x"}]},
    "extra_body": {
        "": [[]], ".x": [{"x": b""}], "[...]": [{HUGE: 1}],
        ".stream": [{"stream": True}],
    },
}
WRONG_VALUES["extra_body"].update(  # which overwrites none of them
    {"." + name: [{name: None}] for name in WRONG_VALUES if name != "extra_body"}
)
WRONG_VALUES_OF_BOTH = {  # and of `get`
    "agent_key": {"": ["", ".", "..", None, b"x", "\ud800"]},
    "retries": {"": ["backoff", True, {}, orq_min.BackoffStrategy()]},
    "timeout_ms": {"": [0, -1, "5", True, float("nan"), float("inf"), 10**400]},
    "http_headers": {"": [["a"]], "[...]": [{HUGE: "x"}]}, "server_url": {"": [5]},
}
WRONG_VALUES_OF_GET = {"task_id": {"": [None, "", " ", ".", "..", 5]}}

WRONG_OBJECTS = {  # what builds one, and the paths that must be named
    "TextPart(None)": "text", "TextPart(1, kind='file')": "text kind",
    "TextPart('hi', kind=None)": "kind", "BinaryFormat(bytes_=b'raw')": "bytes",
    "BinaryFormat('not base64!')": "bytes", r"BinaryFormat('\n')": "bytes",
    "BinaryFormat('', 5, 6)": "bytes mimeType name", "FileInURIFormat(5)": "uri",
    "FilePart('a.txt')": "file", "FilePart({'bytes': 'aGk=', 'uri': 'x'})": "file.uri",
    "FilePart({'bytes': ''}, metadata=[])": "file.bytes metadata",
    "FilePart.from_uri(None)": "uri", "FilePart.from_bytes('text', 'a.txt')": "content",
    "FilePart.from_bytes(b'', 'a.txt')": "content", "Memory(5)": "entity_id",
    "FilePart.from_bytes(b'x', 5, 5)": "name mimeType",
    "ToolResultPart(5, result=float('nan'))": "tool_call_id result",
    "A2AMessage('agent', 'hi', 5)": "role parts messageId",
    "A2AMessage('user', [Contact('c')])": "parts[0]",
    "Identity(None, email=5, tags=[1])": "id email tags[0]",
    "CreateAgentResponseThread('t', tags='ab')": "tags",
}
# fmt: on


class RefusalTest(LoopbackTest):
    """Makes wrong calls, after none of which anything was sent."""

    def refused(self, call, *args, **given):
        """{path: what is wrong there}."""
        with self.assertRaises(orq_min.ValidationError) as caught:
            call(*args, **given)
        self.assertEqual(self.service.connections, 0)
        error = caught.exception
        self.assertIsInstance(error, ValueError)
        for problem in error.errors:
            self.assertIn("%s: %s" % problem, str(error))
        return dict(error.errors)

    def assert_refused(self, call, table):
        """Each wrong value of such a table, by its paths."""
        for name, rows in table.items():
            for suffixes, values in rows.items():
                paths = [name + suffix for suffix in suffixes.split(" ")]
                for number, value in enumerate(values):
                    with self.subTest(paths=paths, number=number):
                        found = self.refused(call, **{name: value})
                        self.assertEqual(sorted(found), sorted(paths))


class Refused(RefusalTest):
    """A wrong call is refused before anything is sent, all of it at once, by path."""

    def test_all_that_is_wrong_is_said_at_once_by_its_path(self):
        wrong = dict(agent_key="..", server_url="ftp://x", timeout_ms=0, task_id=5)
        wrong.update(http_headers={"Host": "x"}, extra_body={"message": 1}, retries=5)
        wrong["contact"] = {"id": "c", "display_nmae": "Ada"}
        wrong["variables"] = {"when": [1, 2, float("nan")]}
        wrong["message"] = from_user({})
        with orq_min.Orq("") as orq:
            found = self.refused(orq.agents.responses.create, **wrong)
        paths = {path.partition(".")[0] for path in found}
        self.assertEqual(paths, {*wrong, "api_key"})
        self.assertEqual(found["message.parts[0].kind"], "required")
        unknown = "unknown field (did you mean 'display_name'?)"
        self.assertEqual(found["contact.display_nmae"], unknown)
        self.assertEqual(found["variables.when[2]"], "NaN has no JSON form")

    def test_wrong_parameters_are_named(self):
        task = {"agent_key": "my-agent", "task_id": "t"}

        def get(**given):
            self.orq.agents.responses.get(**dict(task, **given))

        self.assert_refused(get, dict(WRONG_VALUES_OF_BOTH, **WRONG_VALUES_OF_GET))
        self.assert_refused(self.create, dict(WRONG_VALUES_OF_BOTH, **WRONG_VALUES))
        found = self.refused(self.create, thread=[])["thread"]
        self.assertRegex(found, "CreateAgentResponseThread.* an object.*, not list")
        both = self.refused(self.create, identity={"id": "a"}, contact={"id": "a"})
        self.assertEqual(list(both), ["identity"])

    def test_free_form_values_without_a_json_form_are_refused_by_path(self):
        values = [value for value, _ in REFUSALS]
        found = self.refused(self.create, variables={"v": values})
        self.assertEqual(len(found), len(values))
        for n, (path, problem) in enumerate(found.items()):
            self.assertEqual(path[: len("variables.v[%d]" % n)], "variables.v[%d]" % n)
            self.assertIn(REFUSALS[n][1], problem)
        for value, path in REFUSALS_WITHIN:
            with self.subTest(path):
                found = self.refused(self.create, metadata={"v": value})
                self.assertEqual(list(found), ["metadata.v" + path])

    def test_wrong_objects_are_refused_when_they_are_built(self):
        for code, paths in WRONG_OBJECTS.items():
            with self.subTest(code):
                found = self.refused(eval, code, dict(vars(orq_min)))
                self.assertEqual(set(found), set(paths.split()))

    def test_an_object_that_was_changed_is_checked_again_at_the_call(self):
        part = orq_min.TextPart("hi")
        message = orq_min.A2AMessage("user", [part])
        part.text = 5
        found = self.refused(self.create, message=message)
        self.assertEqual(list(found), ["message.parts[0].text"])

    def test_wrong_settings_of_a_client_are_refused_at_the_latest_at_the_call(self):
        def call(**options):
            self.call(client(self.service, **options))

        wrong = {"server_url": "nonsense", "timeout_ms": -5, "retry_config": "backoff"}
        for option, value in dict(wrong, ssl_context=5).items():
            with self.subTest(option):
                self.refused(call, **{option: value})


# ----------------------------------------------------------------------------
# What comes in
# ----------------------------------------------------------------------------


def from_agent(*parts, **more):
    return dict({"role": "agent", "parts": list(parts)}, **more)


def task_that(state, **more):
    return {"id": "t", "kind": "task", "status": dict({"state": state}, **more)}


MORE = {"metadata": {"k": 1}}
OOPS = {"kind": "error", "error": "oops", "code": 7}
CALL = {"kind": "tool_call", "tool_name": "f", "tool_call_id": "c", "arguments": {}}
PARTS_OF_ALL_KINDS = [
    *(text_part("B"), dict(CALL, **MORE), OOPS),
    {"kind": "tool_result", "tool_call_id": "c", "result": [1], **MORE},
    {"kind": "file", "file": {"bytes": "aGk=", "mimeType": "a/b"}, **MORE},
    {"kind": "file", "file": {"uri": "https://x", "name": "n"}},
    {"kind": "reasoning", "text": "hm", "_own": 1, "keys": 2},
    text_part("C", brand_new=5),
]
FUNCTION = {"name": "f", "arguments": "{}"}
# fmt: off
PUBLISHED = {
    "_id": "r1", "task_id": "t1", "created_at": "2025-11-20T09:30:00Z", "model": "p/m",
    "output": [
        {"messageId": "m0", "role": "user", "parts": [text_part("?")]},
        from_agent(text_part("A"), messageId="m1"),
        from_agent({"kind": "data", "data": {"a": 1}, **MORE}),
        from_agent(*PARTS_OF_ALL_KINDS, **MORE),
        {"role": "tool", "parts": [text_part("never")]},
        {"parts": [text_part("D")]},
    ],
    "usage": {
        "completion_tokens": 1, "total_tokens": 3,
        "prompt_tokens_details": {"audio_tokens": 0, "cache_creation_tokens": 2},
        "completion_tokens_details": {"reasoning_tokens": 1, "audio_tokens": 0},
    },
    "pending_tool_calls": [{"id": "c", "type": "function", "function": FUNCTION}],
    "telemetry": {"trace_id": "a", "span_id": "b"}, "finish_reason": "stop",
    "status": "completed", "brand_new": {"x": 1},
}
# fmt: on
SURPRISES = [None, True, 5, 1.5, "text", [], [None, 5, "x", [], {}], {}, {"kind": 5}]

WHY = from_agent(text_part("be"), text_part("cause"))
NOT_FAILED = [{"error": empty} for empty in (None, "", {}, [])]
NOT_FAILED += [{"output": [from_agent(OOPS, role=role)]} for role in ("user", "tool")]
NOT_FAILED += [{"output": [from_agent(text_part("fine"))]}]
NOT_FAILED += [task_that(state, message=WHY) for state in ("completed", "working", 5)]
NOT_FAILED += [{"status": status} for status in ("in_progress", "new", ["failed"])]
# fmt: off
FAILED = [  # answer, its `error`
    ({"output": [from_agent(text_part("half"), OOPS, role=None)]}, "oops"),
    ({"output": [from_agent({"kind": "error"})]}, "error"),
    ({"output": [from_agent({"kind": "error", "error": {"message": "m"}})]}, "m"),
    ({"output": [from_agent(OOPS)], "error": "no"}, "no; oops"),
    ({"error": {"message": "no", "code": 5}}, "no"), ({"error": ["a", "b"]}, "a; b"),
    ({"error": {"code": 5}}, '{"code": 5}'), ({"status": "failed"}, "failed"),
    ({"status": "failed", "error": "no"}, "no"), (task_that("failed"), "failed"),
    (task_that("canceled", message={"parts": []}), "canceled"),
    (task_that("rejected", message=WHY), "because"),
    (task_that("failed", message=from_agent(OOPS)), "oops"),
]
# fmt: on


class Incoming(LoopbackTest):
    """No 2XX with a JSON object is refused, and nothing of it is lost."""

    def answer(self, body):
        self.service.next(dict(body=body))
        return self.create()

    def test_the_published_shape_becomes_objects(self):
        m, res = orq_min, self.answer(PUBLISHED)
        for name in "task_id created_at model finish_reason status".split():
            self.assertEqual(getattr(res, name), PUBLISHED[name])
        self.assertEqual((res.id, res.text), ("r1", "A\nBC\nD"))
        output = res.output
        self.assertEqual(output[1], m.Output("m1", "agent", [m.TextPart("A")], None))
        self.assertEqual(output[2].parts[0], m.DataPart({"a": 1}, {"k": 1}))
        self.assertIsNone(output[2].message_id)
        self.assertEqual(output[3].metadata, {"k": 1})
        self.assertEqual(output[4].parts, [m.TextPart("never")])
        parts = [
            m.ToolCallPart("f", "c", {}, {"k": 1}),
            m.ErrorPart("oops", 7),
            m.ToolResultPart("c", [1], {"k": 1}),
            m.FilePart(m.BinaryFormat("aGk=", "a/b"), {"k": 1}),
            m.FilePart(m.FileInURIFormat("https://x", name="n")),
        ]
        self.assertEqual(output[3].parts[1:6], parts)
        details = m.PromptTokensDetails(None, 2, 0)
        details = details, m.CompletionTokensDetails(1, None, None, 0)
        self.assertEqual(res.usage, m.CreateAgentResponseUsage(1, None, 3, *details))
        call = m.PendingToolCalls("c", m.Function("f", "{}"), "function")
        self.assertEqual(res.pending_tool_calls, [call])
        self.assertEqual(res.telemetry, m.Telemetry("a", "b"))
        # and what this file does not know is kept
        self.assertEqual(json.loads(json.dumps(res.raw)), PUBLISHED)
        self.assertEqual(res.brand_new, {"x": 1})
        unknown, text = output[3].parts[6:]
        self.assertIsInstance(unknown, orq_min.UnknownPart)
        self.assertEqual((unknown.kind, unknown.text), ("reasoning", "hm"))
        self.assertIn("'hm'", repr(unknown))
        self.assertFalse(hasattr(unknown, "_own"))
        self.assertNotEqual(unknown, orq_min.UnknownPart("reasoning"))
        self.assertEqual(text.brand_new, 5)

    def assert_reads_as(self, value, came):
        """An object reads as the JSON that came, down to the last."""
        if isinstance(came, list):
            for pair in zip(value, came):
                self.assert_reads_as(*pair)
        elif not hasattr(value, "keys"):
            self.assertEqual(value, came)
        else:
            for names in (value, value.keys(), dict(value)):
                self.assertEqual(list(names), list(came))
            for name, content in came.items():
                self.assertIn(name, value)
                self.assert_reads_as(value[name], content)
                self.assertIs(value.get(name), value[name])
            self.assert_lacks(value, "absent")
            self.assertEqual(value.get("absent", 5), 5)

    def assert_lacks(self, value, name):
        self.assertNotIn(name, value)
        self.assertIsNone(value.get(name))
        self.assertRaises(KeyError, lambda: value[name])

    def test_answers_and_copies_of_them_can_be_read_as_dicts(self):
        res = self.answer(PUBLISHED)
        for again in (res, copy.deepcopy(res), pickle.loads(pickle.dumps(res))):
            self.assertEqual((again, again.raw, again.text), (res, res.raw, res.text))
            self.assertEqual(again.error, "oops")
            self.assert_reads_as(again, PUBLISHED)
        parts = res["output"][3]["parts"]
        self.assertEqual([p.get("kind") for p in parts], [p.kind for p in parts])
        file, (_, message, other, *_) = parts[4]["file"], res["output"]
        for one, json_name, name in (
            (res, "_id", "id"),
            (message, "messageId", "message_id"),
            (file, "bytes", "bytes_"),
            (file, "mimeType", "mime_type"),
        ):
            for spelling in (json_name, name):
                self.assertIn(spelling, one)
                self.assertEqual(one[spelling], getattr(one, name))
                self.assertEqual(one.get(spelling), getattr(one, name))
        self.assert_lacks(parts[5], "metadata")
        self.assert_lacks(res["usage"], "prompt_tokens")
        self.assert_lacks(file, "name")
        self.assert_lacks(other, "messageId")
        self.assert_lacks(other, "message_id")

    def test_what_is_built_by_hand_can_be_read_as_a_dict_too(self):
        part = orq_min.FilePart.from_bytes(b"hi", "a.txt")
        self.assertEqual(part["file"]["mimeType"], "text/plain")
        self.assertEqual(list(part), ["file", "kind"])
        self.assertNotIn("metadata", part)
        part.metadata = {}
        self.assertEqual(part.get("metadata", 5), {})
        res = orq_min.CreateAgentResponseResponseBody(id="r")
        self.assertEqual((res["_id"], res["id"], res.get("usage", 5)), ("r", "r", 5))

    def test_an_answer_without_any_field_has_none_in_their_place(self):
        res = self.answer({})
        names = "id task_id created_at model usage finish_reason pending_tool_calls"
        for name in (names + " telemetry status error").split():
            self.assertIsNone(getattr(res, name), name)
        self.assertEqual((res.output, res.text, res.raw), ([], "", {}))
        (output,) = self.answer({"output": [{}]}).output
        self.assertEqual((output.parts, output.role, output.metadata), ([], None, None))

    def test_a_run_that_failed_says_so_in_error_and_status(self):
        for body, error in FAILED + [(body, None) for body in NOT_FAILED]:
            with self.subTest(body=body):
                res, status = self.answer(body), body.get("status")
                self.assertEqual(res.error, error)
                state = status.get("state") if isinstance(status, dict) else status
                self.assertEqual(res.status, state if isinstance(state, str) else None)

    def test_a_task_shaped_answer_can_be_continued(self):
        res = self.create(agent_key="task-agent")
        self.assertEqual(res.text, "You said: hi")
        self.assertEqual((res.id, res.task_id), (res.raw["id"],) * 2)
        self.assertEqual(res.raw["status"]["state"], res.status)
        again = self.create(agent_key="task-agent", task_id=res.task_id)
        self.assertEqual(again.task_id, res.task_id)

    def test_surprising_types_stay_as_they_came(self):
        """Each value of the published shape is replaced by each surprise in turn."""

        def places(value, path=()):
            yield path
            if isinstance(value, (dict, list)):
                for key in value if isinstance(value, dict) else range(len(value)):
                    yield from places(value[key], (*path, key))

        bodies = [dict(PUBLISHED, error=surprise) for surprise in SURPRISES]
        bodies += [task_that("failed", message=surprise) for surprise in SURPRISES]
        for path, surprise in itertools.product(places(PUBLISHED), SURPRISES):
            body = {"whole": copy.deepcopy(PUBLISHED)}
            *outer, last = ("whole", *path)
            functools.reduce(lambda v, key: v[key], outer, body)[last] = surprise
            bodies.append(body["whole"])
        bodies = [body for body in bodies if isinstance(body, dict)]
        self.assertGreater(len(bodies), 500)
        for body in bodies:
            res = self.answer(body)
            self.assertEqual(res.raw, body)
            self.assertIsInstance(res.text, str)
            self.assertIsInstance(res.error, (str, type(None)))
            self.assertIsInstance(repr(res), str)
        res = self.answer({"usage": "none", "output": {"a": 1}, "model": 5, "_id": []})
        self.assertEqual((res.usage, res.output), ("none", {"a": 1}))
        self.assertEqual((res.model, res.id, res.text), (5, [], ""))

    def test_names_that_python_uses_do_no_harm(self):
        names = "text error keys get __class__ __dict__ __reduce_ex__ _came self"
        body = dict(dict.fromkeys(names.split(), 7), _id="r", id="another")
        inner = {"__init__": 9, "kind": "text", "__class__": 1, "_came": 2, "keys": 3}
        file = {"kind": "file", "file": {"uri": "x", "mime_type": "a/b", "bytes_": 1}}
        body["output"] = [{"message_id": 9, "parts": [inner, file]}]
        res = self.answer(body)
        self.assertEqual((res.text, res.raw, res.error), ("", body, "7"))
        self.assertEqual(copy.deepcopy(res), res)
        self.assertIsInstance(res.output[0].parts[0], orq_min.TextPart)
        self.assert_reads_as(res, body)
        self.assertEqual(self.answer({"raw": 6}).raw, {"raw": 6})

    def test_an_answer_may_be_any_json_that_python_reads(self):
        bodies = [b'\xef\xbb\xbf{"_id": "r"}', '{"_id": "r"}'.encode("utf-16")]
        bodies += [
            b'{"_id": "x", "_id": "r"}',
            b' {"_id": "r", "n": 1e999, "m": NaN}\n',
        ]
        bodies += [b'{"_id": "r", "n": "\\ud800"}', b'{"_id": "r", "n": "\xff"}']
        for body in bodies:
            with self.subTest(body[:40]):
                self.assertEqual(self.answer(body).id, "r")


class FetchingAnswers(LoopbackTest):
    """`get` fetches what came of a run in the background, and runs no agent."""

    def get(self, agent_key="my-agent", task_id="t", **given):
        call = self.orq.agents.responses.get
        return call(agent_key=agent_key, task_id=task_id, **given)

    def get_async(self, agent_key="my-agent", task_id="t", **given):
        call = self.orq.agents.responses.get_async
        return asyncio.run(call(agent_key=agent_key, task_id=task_id, **given))

    def test_a_run_in_the_background_is_in_progress_and_then_completed(self):
        begun = self.create(background=True)
        self.assertEqual((begun.output, begun.text, begun.usage), ([], "", None))
        for get in (self.get, self.get_async):
            res = get(task_id=begun.task_id)
            self.assertEqual((res.status, res.text), ("in_progress", ""))
            self.assertIsNone(res.error)
        error = self.failure(self.orq, orq_min.APIError, task_id=begun.task_id)
        self.assertEqual(error.status_code, 409)  # it is not over yet
        until(lambda: self.get(task_id=begun.task_id).status != "in_progress")
        for get in (self.get, self.get_async):
            res = get(task_id=begun.task_id)
            self.assertIsInstance(res, orq_min.CreateAgentResponseResponseBody)
            self.assertEqual((res.status, res.error), ("completed", None))
            self.assertEqual((res.text, res.task_id), ("You said: hi", begun.task_id))
        self.assertEqual(self.create(task_id=begun.task_id).task_id, begun.task_id)

    def test_a_run_that_failed_raises_nothing_and_says_why(self):
        for agent, began in (("my-agent", None), ("task-agent", "working")):
            begun = self.create(agent_key=agent, message="fail", background=True)
            self.assertEqual((begun.status, begun.error), (began, None))
            get = functools.partial(self.get, agent_key=agent, task_id=begun.task_id)
            until(lambda get=get: get().status == "failed")
            self.assertEqual(get().error, "The agent failed, as it was told to.")
        self.assertEqual(get().raw["status"]["state"], "failed")

    def test_its_request_has_no_body_and_its_ids_are_segments_of_the_path(self):
        task_id = "a/../b?c"
        self.service.tasks[task_id] = self.service.tasks[self.create().task_id]
        self.get(task_id=task_id)
        request = self.service.requests[-1]
        path = "/v2/agents/my-agent/responses/a%2F..%2Fb%3Fc"
        self.assertEqual((request[:2], request.body), (("GET", path), b""))
        for name in ("Content-Type", "Content-Length", "Transfer-Encoding"):
            self.assertEqual(request.header(name), [])

    def test_its_failures_never_say_that_the_agent_may_have_run(self):
        for get in (self.get, self.get_async):
            wanted = "GET %s/v2/.*404.*no such task" % self.service.url
            self.assertRaisesRegex(orq_min.APIError, wanted, get, task_id="unknown")
            self.service.next(hang_up)
            with self.assertRaises(orq_min.APIConnectionError) as caught:
                get(retries=None)
            error = caught.exception
            self.assertEqual((error.sent, error.temporary), (False, True))
            self.assertNotRegex(str(error), "may have run|not sent")


# ----------------------------------------------------------------------------
# Errors
# ----------------------------------------------------------------------------

WORDS = "no such thing"
ITEMS = [{"path": "body.x", "message": "too long"}, {"path": "body.y"}]
LONG = {"message": "no", "errors": [{"path": "p%d" % n} for n in range(999)]}
# fmt: off
OWN_WORDS = [  # of the server: the body of an answer, the message of the error
    ({"message": WORDS}, WORDS), ({"code": 404, "message": WORDS}, WORDS),
    ({"error": WORDS}, WORDS), ({"error": {"message": WORDS}}, WORDS),
    ({"error": [WORDS]}, WORDS), ({"message": [WORDS, "too"]}, WORDS + "; too"),
    ({"message": {"en": WORDS}}, '{"en": "no such thing"}'),
]
ALL_WORDS = [  # what the error's text shows of a body, once
    ({"message": "bad", "errors": ITEMS}, "body.x", "too long", "body.y"),
    ({"error": {"message": "bad", "errors": ITEMS}}, "bad", "too long"),
    ({"message": ["is bad", "is odd"], "error": "Gone"}, "is bad; is odd"),
    ({"message": "bad", "error": "is locked"}, "bad", "is locked"),
    ({"message": "bad", "error": {"message": "odd", "n": [3]}}, "odd", "3"),
    ({"message": "bad", "code": "E7", "hint": {"a": {"b": 5}}}, "E7", '"b": 5'),
    ({"error": {"code": "E7"}}, "E7"), (["odd", {"a": 1}], "odd", '"a": 1'),
    ({"detail": [{"loc": ["body"], "msg": "missing"}]}, "loc", "missing"),
]
# fmt: on


class Errors(LoopbackTest):
    """One family of errors, with what the server said, which travels anywhere."""

    def error(self, kind, *steps, **given):
        self.service.next(*steps)
        error = self.failure(self.orq, kind, retries=None, **given)
        self.assertIs(type(error), kind)
        return error

    def api_error(self, body=b"", status=422, **headers):
        headers = {name.replace("_", "-"): text for name, text in headers.items()}
        step = dict(status=status, body=body, headers=headers)
        return self.error(orq_min.APIError, step)

    def errors(self):
        """One of each kind, as they are raised."""
        return [
            self.api_error({"message": "no"}, 404, X_Id="7"),
            self.error(orq_min.APIConnectionError, hang_up),
            self.error(orq_min.APITimeoutError, Connection.hang, timeout_ms=100),
            self.error(orq_min.ValidationError, agent_key=""),
            orq_min.OrqError("x"),
        ]

    def test_the_tree_of_errors(self):
        m = orq_min
        self.assertEqual(m.OrqError.__bases__, (Exception,))
        self.assertEqual(set(m.ValidationError.__bases__), {m.OrqError, ValueError})
        self.assertEqual(m.APIError.__bases__, (m.OrqError,))
        self.assertEqual(m.APIConnectionError.__bases__, (m.OrqError,))
        self.assertEqual(m.APITimeoutError.__bases__, (m.APIConnectionError,))

    def test_each_has_a_message_and_the_attributes_of_an_answer(self):
        error, *others = self.errors()
        self.assertEqual((error.message, error.status_code), ("no", 404))
        self.assertEqual((error.headers["x-ID"], error.headers["X-id"]), ("7", "7"))
        self.assertEqual(error.data, {"message": "no"})
        self.assertEqual(json.loads(error.body), error.data)
        for error in others:
            for name in ("status_code", "headers", "body", "data"):
                self.assertIsNone(getattr(error, name))
            self.assertEqual(error.message, str(error))
        for kind in (orq_min.OrqError, orq_min.APIError, orq_min.APITimeoutError):
            self.assertEqual((kind("x").message, kind().message), ("x", ""))
        one, other = orq_min.APIError("a"), orq_min.APIError("b")
        one.headers["X"] = "1"
        self.assertNotIn("X", other.headers)
        self.assertEqual((one.status_code, one.body, one.data), (0, "", None))
        one = orq_min.APIConnectionError("a")
        self.assertEqual((one.sent, one.temporary), (False, True))

    def test_the_servers_own_words_are_the_message(self):
        url = self.service.url + "/v2/agents/my-agent/responses"
        for body, message in OWN_WORDS:
            with self.subTest(body=body):
                error = self.api_error(body, 404)
                self.assertEqual((error.message, error.data), (message, body))
                wanted = "POST %s: 404 Not Found: %s" % (url, message)
                self.assertEqual(str(error), wanted)

    def test_its_text_shows_all_that_the_service_said(self):
        for body, *wanted in ALL_WORDS:
            with self.subTest(body=body):
                text = str(self.api_error(body, 410, X_Request_Id="r-1"))
                said = text.partition(": 410 ")[2]
                for words in (*wanted, "r-1", "Gone"):
                    self.assertEqual(said.count(words), 1, said)
        error = self.api_error({"message": "no"}, 429, CF_Ray="c-2", Retry_After="60")
        self.assertRegex(str(error), "c-2.*(?i:retry-after): 60")

    def test_a_long_body_is_cut_in_the_text_and_whole_in_the_attribute(self):
        overhead = len(str(self.api_error(X_Request_Id="r-1")))
        for body in ("x" * 999, '{"message": "%s"}' % ("y" * 999), json.dumps(LONG)):
            error = self.api_error(body, X_Request_Id="r-1")
            self.assertEqual(error.body, body)
            self.assertRegex(str(error), r"\.\.\. \(\d+ characters\).*r-1")
            self.assertIn(len(str(error)), range(overhead + 450, overhead + 550))
        self.assertIn("z" * 480, str(self.api_error(dict(LONG, errors="z" * 480))))

    def test_any_other_body_is_kept_as_text(self):
        bodies = b"<html>\n<b>Bad gateway</b>", b"", b"\xff\xfe", b"[1]", b'"x"'
        for body, status in itertools.product(bodies, (400, 418, 599)):
            with self.subTest(body=body, status=status):
                error = self.api_error(body, status)
                self.assertEqual(error.status_code, status)
                self.assertIsInstance(error.body, str)
                self.assertNotIn("\n", str(error))
                self.assertEqual(error.message, http.client.responses.get(status, ""))
        error = self.api_error(b"<p>\xc3\xa9</p>", 500)
        self.assertEqual((error.body, error.data), ("<p>é</p>", None))
        self.assertIn("<p>é</p>", str(error))
        odd = '{"message": %s}', '{"error": %s}', '{"error": {"message": %s}}'
        for value, body in itertools.product(SURPRISES, odd):
            body %= json.dumps(value)
            error = self.api_error(body)
            self.assertEqual(error.data, json.loads(body))
            self.assertIsInstance(error.message, str)

    def test_a_2xx_without_a_json_object_that_can_be_read_is_an_api_error(self):
        bodies = [b"", b"null", b"[]", b'"ok"', b"5", b"<html>", b"{", b"[" * 99999]
        if hasattr(sys, "set_int_max_str_digits"):  # more than Python reads
            bodies.append(b'{"_id": "r", "n": ' + b"9" * 6000 + b"}")
        for body, status in itertools.product(bodies, (200, 202)):
            with self.subTest(body=body[:20], status=status):
                error = self.api_error(body, status)
                self.assertEqual(
                    (error.status_code, error.body), (status, body.decode())
                )
                self.assertIn("JSON", str(error))

    def test_no_complete_answer_is_a_connection_error_that_says_what_happened(self):
        for step in (hang_up, break_off, cut_off, then_close(b"SSH-2.0-x\r\n\r\n")):
            error = self.error(orq_min.APIConnectionError, step)
            self.assertRegex(str(error), "POST %s.*may have run" % self.service.url)
            self.assertEqual((error.sent, error.temporary), (True, True))
        error = self.error(orq_min.APITimeoutError, Connection.hang, timeout_ms=200)
        self.assertIn("0.2 s", str(error))
        error = self.error(orq_min.APIConnectionError, server_url=closed_url())
        self.assertIsInstance(error.__cause__, ConnectionRefusedError)
        self.assertIn("not sent", str(error))
        self.assertEqual((error.sent, error.temporary), (False, True))

    def test_they_pickle_and_copy(self):
        copies = [copy.copy, copy.deepcopy]
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            copies.append(lambda e, p=protocol: pickle.loads(pickle.dumps(e, p)))
        for error, duplicate in itertools.product(self.errors(), copies):
            again = duplicate(error)
            self.assertIs(type(again), type(error))
            self.assertIsNot(again, error)
            self.assertEqual((str(again), repr(again)), (str(error), repr(error)))
            self.assertEqual(set(vars(again)), set(vars(error)))
            for name, value in vars(error).items():
                found = getattr(again, name)
                self.assertEqual((type(found), str(found)), (type(value), str(value)))


# ----------------------------------------------------------------------------
# The key, headers and server
# ----------------------------------------------------------------------------

BAD_SERVERS = r"""
    nonsense my.orq.ai //my.orq.ai ftp://my.orq.ai file:///etc/passwd http:// http:///x
    https://user@my.orq.ai https://user:pw@my.orq.ai https://my.orq.ai?x=1
    https://my.orq.ai/? https://my.orq.ai/# https://my.orq.ai/a#b https://my.orq.ai:x
    https://my.orq.ai:99999 https://my.orq.ai:0 https://my.orq.ai:-1 http://[::1
    http://::1/ http://[::zz] http://[] http://[1.2.3.4] https:/my.orq.ai
    https:my.orq.ai https://a\b http://[::1]x https://my..orq.ai https://my.orq.ai/a\b
""".split()
BAD_SERVERS += ["", " ", "https://my orq.ai", "https://my.orq.ai/a b"]
BAD_SERVERS += ["https://my.orq.ai\r\nX: y", "https://my.orq\t.ai"]
BAD_SERVERS += ["https://my.orq.ai/" + o for o in ("\0x", "\x7f", "\u2028x", "\ud800")]
BAD_SERVERS += ["https://%s.ai" % ("x" * 64), "http\u017f://x"]  # a long s is no s
NOT_ASCII = [
    "https://bücher.example",
    "https://my.orq.ai\u2100.example",  # IDNA makes my.orq.aia/c.example of it
    "https://my.orq.ai\uff0f.example",  # a slash of full width
    "https://user\uff20my.orq.ai",  # an at sign of full width
]
GOOD_SERVERS = {  # what a request to it begins with
    "https://my.orq.ai": "https://my.orq.ai/v2/",
    "https://my.orq.ai/": "https://my.orq.ai/v2/",
    " https://my.orq.ai\n": "https://my.orq.ai/v2/",
    "https://host/some/prefix///": "https://host/some/prefix/v2/",
    "http://host:8080/x%20y": "http://host:8080/x%20y/v2/",
    "HTTPS://HOST": "https://host/v2/",
    "http://[::1]:8080": "http://[::1]:8080/v2/",
    "https://[2001:db8::1]/p": "https://[2001:db8::1]/p/v2/",
    "https://xn--bcher-kva.example": "https://xn--bcher-kva.example/v2/",
}
# fmt: off
NO_KEYS = [None, "", " \n", "Bearer", 5, b"k", lambda: None, lambda: "", lambda: 5]
KEYS = {  # and what is sent
    "  k\n": "Bearer k", "Bearer k": "Bearer k", "bEARER k\r\n": "bEARER k",
    "Bearerk": "Bearer Bearerk", "ké": "Bearer ké", "'k": "Bearer 'k",
    "\ufeffk\n": "Bearer k", "\ufeff Bearer k": "Bearer k",
}
# fmt: on


class TheKeyAndTheServer(RefusalTest):
    """The key goes to one place: what could send it elsewhere is refused."""

    def test_a_server_url_is_an_address_and_nothing_else(self):
        unknown = socket.gaierror(socket.EAI_NONAME, "unknown")
        # so that a mistake does not reach the network
        with mock.patch("socket.getaddrinfo", side_effect=unknown):
            for url in BAD_SERVERS + NOT_ASCII:
                with self.subTest(url=ascii(url)):
                    found = self.refused(self.create, server_url=url)
                    self.assertEqual(list(found), ["server_url"])
                    self.assertEqual("xn--" in str(found), url in NOT_ASCII)
            for url, expected in GOOD_SERVERS.items():
                with self.subTest(url=url), logged():
                    error = self.failure(self.orq, server_url=url)
                    wanted = "POST %sagents/my-agent/responses: " % expected
                    self.assertIn(wanted, str(error))
            orq = orq_min.Orq("key")
            for empty in ("", " \n"):  # the default is Orq's own
                os.environ["ORQ_BASE_URL"] = empty
                wanted = "POST https://my.orq.ai/v2/agents/my-agent/responses: "
                self.assertIn(wanted, str(self.failure(orq)))

    def test_a_key_that_cannot_be_sent_is_refused_and_not_repeated(self):
        wrong = [(key, "ORQ_API_KEY") for key in NO_KEYS]
        for key in ('"SECRET"', "'SECRET'", ' "Bearer SECRET"\n', '\ufeff"SECRET"'):
            wrong.append((key, "quotes"))
        for bad in "\n\r\0\x7f€\ud800\x85\t\ufeff\u201c":
            wrong.append((" SECRET%sSECRET" % bad, r"\b7\b.*U\+%04X" % ord(bad)))
        for key, words in wrong:
            with self.subTest(key=key), client(self.service, api_key=key) as orq:
                found = self.refused(self.call, orq)
                self.assertEqual(list(found), ["api_key"])
                self.assertRegex(found["api_key"], words)
                self.assertNotIn("SECRET", found["api_key"])

    def test_a_key_is_sent_without_what_files_and_shells_leave_at_its_ends(self):
        for key, sent in KEYS.items():
            with self.subTest(key=key), client(self.service, api_key=key) as orq:
                self.failure(orq, orq_min.APIError)
                got = self.service.requests[-1].header("authorization")
                self.assertEqual(got, [sent])

    def test_an_authorization_of_the_callers_stands_for_the_key(self):
        whole = {"auTHORIZATION": "Bearer " + self.service.key}
        for key in (None, '"in quotes"', "\u20ac", lambda: 1 / 0):
            with client(self.service, api_key=key) as orq:
                self.assertEqual(self.call(orq, http_headers=whole), "You said: hi")
                given = {"agent_key": "my-agent", "task_id": "unknown"}
                with self.assertRaisesRegex(orq_min.APIError, "404"):
                    orq.agents.responses.get(http_headers=whole, **given)
        for request in self.service.requests:
            self.assertEqual(request.header("authorization"), list(whole.values()))

    def test_headers_are_latin_1_on_one_line_and_none_of_the_clients_own(self):
        names = ["Host", "content-LENGTH", "Transfer-Encoding", "connection"]
        names += ["", "a b", "a:b", "a\r\nb", "é", "a\n", " a"]
        values = "a\r\nX: b", "\0", "€", "\x7f", 5, None, b"x", ["a"]
        wrong = [({name: "1"}, name) for name in names]
        wrong += [({"x": value}, "x") for value in values]
        wrong += [({5: "x"}, 5), ({"x-a": "1", "X-A": "2"}, "X-A")]
        wrong += [({"Authorization": "a\nb"}, "Authorization")]
        for headers, name in wrong:
            with self.subTest(headers=headers):
                found = self.refused(self.create, http_headers=headers)
                is_word = isinstance(name, str) and name.isidentifier()
                path = ".%s" % name if is_word else "[%r]" % (name,)
                self.assertEqual(list(found), ["http_headers" + path])
        self.create(http_headers={"X-own": " padded é "})
        self.assertEqual(self.service.requests[0].header("x-own"), ["padded é"])

    def test_no_local_variable_shows_a_key_whatever_gives_it(self):
        """Nor what repeats its own arguments, such as functools.partial."""
        key, given = "sk-SECRET-of-ours", {"agent_key": "my-agent", "message": "hi"}

        def broken(key):
            raise LookupError("no key today")

        def responses(function):
            return self.enter(client(self.service, api_key=function)).agents.responses

        once = dict(given, server_url=self.service.url)
        task = {"agent_key": "my-agent", "task_id": "t"}
        calls = [
            lambda f: responses(f).create(**given),
            lambda f: asyncio.run(responses(f).create_async(**given)),
            lambda f: responses(f).get(**task),
            lambda f: asyncio.run(responses(f).get_async(**task)),
            lambda f: orq_min.create_response(api_key=f, **once),
            lambda f: orq_min.create_response(api_key=f, ssl_context=5, **given),
            lambda f: orq_min.Orq(f, ssl_context=5),
        ]
        functions = [functools.partial(f, key) for f in (str, broken, '"{}"'.format)]
        for call, function in itertools.product(calls, [key, *functions]):
            with self.subTest(function=function):
                with self.assertRaises(Exception) as caught:
                    call(function)
                assert_no_local_holds(key, caught.exception)
                self.assertNotIn(key, str(caught.exception))


# ----------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------


def only_text(*texts):
    return {"role": "user", "parts": [{"kind": "text", "text": t} for t in texts]}


def encoded(text):
    """What a shell may write for this text: UTF-8, or with a byte order mark."""
    codecs = "utf-8", "utf-16-le", "utf-16-be"
    return [text.encode(), *(("\ufeff" + text).encode(codec) for codec in codecs)]


def bodies(*answers):
    return [{"body": answer} for answer in answers]


def screen(shown):
    """The lines that a terminal shows in the end."""
    lines = []
    for line in shown.decode().split("\n"):
        seen = ""
        for piece in line.split("\r"):
            seen = piece + seen[len(piece) :]
        lines.append(seen.rstrip())
    return lines


class MainTest(CommandTest):
    """Runs the command line within this process, which is faster."""

    process = CommandTest.command

    def command(self, *argv, stdin=b"", env=None):
        if isinstance(stdin, bytes):
            stdin = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
        out, error = (
            io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="")
            for _ in range(2)
        )
        given = mock.patch.dict(os.environ, dict(self.env, **(env or {})))
        streams = mock.patch.multiple("sys", stdin=stdin, stdout=out, stderr=error)
        with given, streams:
            try:
                status = orq_min.main(argv)
            except SystemExit as end:
                status = end.code
        out.flush()
        error.flush()
        shown = (stream.buffer.getvalue() for stream in (out, error))
        return subprocess.CompletedProcess(argv, status, *shown)

    def dry(self, *argv, **options):
        """The body that it would send."""
        shown = self.said("--dry-run", *argv, **options)
        return json.loads(shown.partition("\n\n")[2])

    def assertRefused(self, *cases, **options):
        """Each case is a line or its words, and what its error must hold."""
        for argv, *words in cases:
            argv = argv.split() if isinstance(argv, str) else argv
            with self.subTest(argv=argv, **options):
                self.assertFails(self.command(*argv, **options), 2, *words)
        self.assertEqual(self.service.requests, [])

    def on_terminal(self, *argv, **options):
        """Start it on a terminal, and return it with what reads all that is shown."""
        master, slave = pty.openpty()
        self.addCleanup(os.close, master)
        process = self.start(*argv, **dict(dict(stdout=slave, stderr=slave), **options))
        os.close(slave)

        def read():
            shown = b""
            with contextlib.suppress(OSError):  # what Linux says at the end
                for block in iter(lambda: os.read(master, 4096), b""):
                    shown += block
            process.wait(20)
            return shown

        return process, read


JSON_OPTIONS = ["--variables", "--metadata", "--identity", "--contact", "--thread"]
JSON_OPTIONS += ["--memory", "--extra-body", "--message"]
HELLO = ["my-agent", "Hello"]
CPYTHON = sys.implementation.name == "cpython"
WRONG_SECONDS = ("soon", "0", "-1", "nan", "inf")
CONTROLS = "".join(map(chr, [*range(32), *range(127, 160)]))


class TheCommandTakesAMessage(MainTest):
    """What is typed, piped or named reaches the service as it was meant."""

    def test_a_message_is_sent_and_only_the_answer_is_printed(self):
        done = self.process(*HELLO)
        self.assertEqual((done.stdout, done.stderr), (b"You said: Hello\n", b""))
        (request,) = self.service.requests
        self.assertEqual(request.header("authorization"), ["Bearer test-key-123"])
        body = {"message": only_text("Hello"), "background": False}
        self.assertEqual(request.json(), body)

    def test_each_option_sets_its_field(self):
        wanted = {
            "task_id": self.create().task_id,
            "variables": {"n": [1, None]},
            "metadata": {"m": 1.5},
            "identity": {"id": "c", "tags": []},
            "thread": {"id": "t"},
            "memory": {"entity_id": "e"},
        }
        options = ["--background", "--extra-body", '{"engine": "x"}']
        for name, value in wanted.items():
            given = value if name == "task_id" else json.dumps(value)
            options += ["--" + name.replace("_", "-"), given]
        wanted.update(message=only_text("Hello"), engine="x", background=True)
        self.assertEqual(self.sent(*options, "my-agent", "Hello"), wanted)
        body = self.sent("my-agent", "hi", "--contact", '{"id": "a", "email": "b"}')
        self.assertEqual(body["contact"], {"id": "a", "email": "b"})

    def test_options_stand_anywhere_before_two_dashes(self):
        wanted = dict(message=only_text("--json"), thread={"id": "t"}, background=False)
        for line in (
            "--thread t my-agent -- --json",
            "my-agent --thread t -- --json",
            "--thread=t --no-retry -- my-agent --json",
        ):
            self.assertEqual(self.dry(*line.split()), wanted)
        for line in ("my-agent --thread t hi", "my-agent hi --thread t --timeout 9"):
            wanted["message"] = only_text("hi")
            self.assertEqual(self.dry(*line.split()), wanted)

    def test_json_is_read_from_the_option_a_file_and_standard_input(self):
        values = {"--message": only_text("grüß"), "--memory": {"entity_id": "é"}}
        for option in JSON_OPTIONS:
            value = values.get(option, {"id": "é"})
            text = json.dumps(value, ensure_ascii=False) + "\r\n"
            argv = HELLO[: 1 if option == "--message" else 2]
            for piped in encoded(text):
                path = self.write("é.json", piped)
                for given in (text, "@" + path, "@-"):
                    with self.subTest(option=option, piped=piped, given=given):
                        body = self.dry(*argv, option, given, stdin=piped)
                        body["extra-body"] = {"id": body.get("id")}
                        self.assertEqual(body[option[2:]], value)
        body = self.dry("my-agent", "--tool-result", "c=@" + path)
        self.assertEqual(body["message"]["parts"][0]["result"], value)

    def test_name_and_value_may_be_repeated_and_the_value_is_text(self):
        values = ["n=1", "e=a=b", "empty=", "who=@me", 'o={"a": 1}', '{"j": 2}']
        wanted = dict(n="1", e="a=b", empty="", who="@me", o='{"a": 1}', j=2)
        argv = [["--variables", value, "--metadata", value] for value in values]
        body = self.sent(*HELLO, *itertools.chain(*argv))
        self.assertEqual(body["variables"], wanted)
        self.assertEqual(body["metadata"], wanted)

    def test_a_bare_word_is_the_id(self):
        for option in ("identity", "contact", "thread", "memory"):
            name = "entity_id" if option == "memory" else "id"
            for word in ("12", "true", "ada@example.com"):
                body = self.dry(*HELLO, "--" + option, word)
                self.assertEqual(body[option], {name: word})

    def test_files_are_attached_after_the_text_in_order(self):
        path = self.write("report.pdf", b"%PDF")
        url = "https://example.com/a/figures.csv?x=1"
        piped = b"\xff\xfe\x00 not text \n"
        files = ["--file", path, "--file", url, "--file", "-"]
        parts = self.sent(*HELLO, *files, stdin=piped)["message"]["parts"]
        self.assertEqual(parts[0], {"kind": "text", "text": "Hello"})
        self.assertEqual({part["kind"] for part in parts[1:]}, {"file"})
        first, second, third = (part["file"] for part in parts[1:])
        self.assertEqual(first["name"], "report.pdf")
        self.assertEqual(first["mimeType"], "application/pdf")
        self.assertEqual(base64.b64decode(first["bytes"]), b"%PDF")
        self.assertEqual(second["uri"], url)
        self.assertEqual(base64.b64decode(third["bytes"]), piped)
        body = self.sent("my-agent", "--file", "-", stdin=piped)
        self.assertEqual(body["message"]["parts"], parts[3:])

    def test_standard_input_is_the_message_when_asked_for_or_alone(self):
        pairs = [("zwei\nü\n", "zwei\nü"), ("a\n\n", "a\n"), (" a", " a")]
        pairs.append(("a\r\n\r\n", "a\r\n"))  # it loses its last newline
        lines = "my-agent", "my-agent -", "--no-retry my-agent"
        for (piped, text), line in itertools.product(pairs, lines):
            for stdin in [*encoded(piped), io.StringIO(piped)]:
                body = self.dry(*line.split(), stdin=stdin)
                self.assertEqual(body["message"], only_text(text))

    def test_a_dash_after_the_message_is_standard_input_as_a_second_text(self):
        lines = "my-agent Review -", "my-agent Review --no-retry -"
        for line, stdin in itertools.product(lines, encoded(" - old\n + neü\n")):
            body = self.sent(*line.split(), stdin=stdin)
            self.assertEqual(body["message"], only_text("Review", " - old\n + neü"))
        path = self.write("a.txt", b"a")
        for line in ("my-agent -", *lines):
            body = self.sent(*line.split(), "--file", path, stdin=b"b")
            kinds = [part["kind"] for part in body["message"]["parts"]]
            self.assertEqual(kinds, ["text"] * len(kinds[1:]) + ["file"])
            self.assertEqual(len(kinds), 2 + ("Review" in line))

    def test_standard_input_is_not_read_when_something_else_says_what_to_send(self):
        stdin = mock.Mock(**{"isatty.return_value": False})
        stdin.read.side_effect = stdin.buffer.read.side_effect = AssertionError
        task = self.create(message="weather")
        result = task.pending_tool_calls[0].id + "=1"
        for argv in (
            ["Hello"],
            ["--message", json.dumps(only_text("whole"))],
            ["--file", self.write("a.txt", b"a")],
            ["--task-id", task.task_id, "--tool-result", result],
            ["--wait", task.task_id],
        ):
            self.said("my-agent", *argv, stdin=stdin)

    @posix_only
    def test_loops_over_lines_keep_working(self):
        loop = 'printf "one\ntwo\nthree\n" | while read -r line; do %s; done'
        self.shell(loop % '"$@" "$line"', "my-agent")
        texts = [said(request) for request in self.service.requests]
        self.assertEqual(texts, ["one", "two", "three"])

    @posix_only
    def test_text_typed_in_any_locale_arrives_as_it_was_typed(self):
        name = "é" if CPYTHON else "e"  # PyPy takes arguments, but no names, for UTF-8
        path = self.write(name, b'{"entity_id": "from a file"}')
        line = '--variables a=ï --identity ï --thread {"id":"ï"} --task-id ï'
        line += ' --extra-body {"ï":1} --memory @%s --dry-run my-agent naïve -' % path
        wanted = dict(variables={"a": "ï"}, identity={"id": "ï"}, thread={"id": "ï"})
        wanted.update({"task_id": "ï", "ï": 1, "memory": {"entity_id": "from a file"}})
        wanted.update(message=only_text("naïve", "piped ü"), background=False)
        argv = [word.encode() for word in line.split()]
        for env in ({}, dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")):
            with self.subTest(env=env):
                done = self.process(*argv, stdin="piped ü".encode(), env=env)
                body = done.stdout.splitlines()[-1].decode()
                self.assertEqual(json.loads(body), wanted)

    @posix_only
    def test_copied_to_a_bin_directory_it_runs(self):
        copied = shutil.copy(MODULE, os.path.join(self.folder, "orq"))
        python = self.write("python3", '#!/bin/sh\nexec "%s" "$@"\n' % sys.executable)
        for path in (copied, python):
            os.chmod(path, 0o755)
        self.env["PATH"] = self.folder + os.pathsep + os.environ.get("PATH", os.defpath)
        done = self.shell("orq my-agent Hello")
        self.assertEqual((done.stdout, done.stderr), (b"You said: Hello\n", b""))


class WrongUsageSendsNothing(MainTest):
    """What is wrong is said in one line with exit status 2, and nothing is sent."""

    def test_what_cannot_go_together_is_refused(self):
        message = ["--message", json.dumps(only_text("x"))]
        file = self.write("a", b"a")
        self.assertRefused(
            *([["my-agent", text, *message]] for text in ("Hello", "-", "")),
            [["my-agent", *message, "--tool-result", "c=1"]],
            [["my-agent", *message, "--file", file]],
            [["my-agent", "--tool-result", "c=1", "--file", file]],
            ["my-agent Hello --tool-result c=1"],
            ["my-agent Hello - --tool-result c=1"],
            ["my-agent Hello --retry --no-retry"],
            ["my-agent Hello --identity a --contact a", "identity", "contact"],
            stdin=b"piped",
        )

    def test_the_second_text_is_only_ever_standard_input(self):
        lines = "my-agent Hello world", "my-agent - world", "my-agent Hello - -"
        cases = [(line, "MESSAGE", "'-'") for line in lines]
        self.assertRefused(*cases, ([*HELLO, ""], "MESSAGE"), stdin=b"piped")

    def test_standard_input_is_read_once(self):
        options = [option + " @-" for option in JSON_OPTIONS[:-1]]
        lines = ["my-agent - -", "my-agent - --file -", "my-agent Hello - --file -"]
        lines += ["my-agent Hello - " + option for option in options]
        lines += ["my-agent " + option for option in options]  # nothing else to send
        pairs = itertools.combinations(["--file -", *options], 2)
        lines += ["my-agent Hello %s %s" % pair for pair in pairs]
        lines.append("my-agent --tool-result a=@- --tool-result b=@-")
        cases = [(line, "standard input", "once") for line in lines]
        self.assertRefused(*cases, stdin=b'{"id": "x"}')

    def test_what_is_empty_is_refused(self):
        lines = ["my-agent", "my-agent -", "my-agent Hello -", "my-agent --message @-"]
        lines += ["my-agent Hello %s @-" % option for option in JSON_OPTIONS[:-1]]
        besides = [], ["-"], ["--file", self.write("a.txt", b"a")]
        marks = [b"\xef\xbb\xbf", "\n".encode("utf-16")]
        for stdin in [b"", b"\n", b" \t\r\n", *marks]:
            also = [] if stdin in marks else ["my-agent Hello --file -"]
            self.assertRefused(*((line, "empty") for line in lines + also), stdin=stdin)
        self.assertRefused(
            *((["my-agent", "", *beside], "MESSAGE", "empty") for beside in besides),
            ([*HELLO, "--task-id", ""], "--task-id", "earlier answer"),
            (["my-agent", "--wait", ""], "--wait", "--background"),
            *(([*HELLO, option, ""], option, "empty") for option in JSON_OPTIONS[2:6]),
            stdin=b"piped",
        )

    def test_a_missing_agent_message_or_key_is_said_with_what_to_do(self):
        lines = "", "--json", "--verbose --wait task"
        self.assertRefused(*((line, "AGENT_KEY", "message") for line in lines))
        self.assertRefused((["", "Hello"], "agent_key"), (".. Hello", "agent_key"))
        for stdin in (b"", None):  # as in cron
            self.assertRefused(("my-agent", "MESSAGE", "give a text"), stdin=stdin)
        lines = "my-agent Hello", "my-agent --wait task"
        cases = [(line, "set ORQ_API_KEY") for line in lines]
        self.assertRefused(*cases, env={"ORQ_API_KEY": " \n"})

    @unittest.skipUnless(pty, "needs a terminal")
    def test_a_terminal_is_not_waited_for(self):
        master, slave = pty.openpty()
        self.addCleanup(os.close, master)
        self.addCleanup(os.close, slave)
        argvs = ["my-agent"], ["my-agent", "Hello", "-"], ["my-agent", "--file", "-"]
        running = [self.start(*argv, stdin=slave) for argv in argvs]
        for process, what in zip(running, (b"MESSAGE", b"second text", b"--file")):
            self.assertEqual(process.wait(20), 2)
            self.assertRegex(process.stderr.read(), what + b".* pipe ")

    def test_a_misspelt_option_is_answered_with_the_one_that_was_meant(self):
        cases = {
            "my-agent Hello --varables name=Ada": "mean --variables?",
            "--taskid=t my-agent Hello": "mean --task-id?",
            "my-agent Hello --time-out 9": "mean --timeout?",
            "my-agent Hello --indentity me": "mean --identity?",
            "my-agent --waits task": "mean --wait?",
            "my-agent Hello -json": "mean --json?",
            "my-agent Hello --serv x": "--serv",  # no abbreviations: they break
            "my-agent Hello --nonsense": "unknown option --nonsense",
            # a key must not be repeated where a log keeps it
            "my-agent Hello --api-key=" + self.service.key: "--api-key",
        }
        self.assertRefused(*cases.items())

    def test_wrong_values_are_named(self):
        empty = self.write("empty", b"")
        wrong = [
            (["--identity", '{"id": "a", "display_nmae": "b"}'], "display_name"),
            (["--variables", "[1]"], "--variables"),
            (["--variables", "word"], "--variables"),
            (["--variables", '{"a": [NaN]}'], "variables.a[0]"),
            (["--variables", "[" * 100000], "--variables"),
            (["--variables", "a=1", "--variables", "a=2"], "twice"),
            (["--extra-body", '{"identity": {"id": "x"}}'], "identity"),
            (["--extra-body", '{"stream": true}'], "stream"),
            (["--extra-body", "word"], "--extra-body"),
            (["--file", empty], empty),
            *((["--timeout", number], "timeout") for number in WRONG_SECONDS),
            (["--server-url", "http://u:%s@x" % self.service.key], "server_url"),
        ]
        self.assertRefused(*(([*HELLO, *argv], word) for argv, word in wrong))
        wrong = [("--message", text) for text in ("hello", '{"role": "user"}', "null")]
        wrong += [("--tool-result", r) for r in ("call", "=1", "call=", "call=sunny")]
        self.assertRefused(*((["my-agent", *argv], argv[0][2:]) for argv in wrong))

    def test_what_cannot_be_read_or_is_not_json_is_named_by_its_file(self):
        contents = b"{bad", b"", b"\xff\xfe", b'"\xfc"', b"\xff\xfe{", None
        paths = [os.path.join(self.folder, name) for name in "abcdef"]
        for path, content in zip(paths, contents):
            if content is not None:
                self.write(path, content)
        for option in [*JSON_OPTIONS, "--tool-result"]:
            is_whole = option in ("--message", "--tool-result")
            argv = [*HELLO[: 2 - is_whole], option]
            given = "c=@" if option == "--tool-result" else "@"
            cases = [([*argv, given + p], option, p) for p in [*paths, self.folder]]
            self.assertRefused(*cases)
            for piped in (b"{bad", b'"\xfc"'):
                case = [*argv, given + "-"], "standard input"
                self.assertRefused(case, stdin=piped)
        for path in (paths[-1], self.folder):
            self.assertRefused((["my-agent", "--file", path], "--file", path))
        for piped in (b"\xfc", b"\xff\xfea"):
            for line in ("my-agent", "my-agent Hello -"):
                self.assertRefused((line, "standard input", "UTF-"), stdin=piped)


class StandardOutputHoldsTheAnswer(MainTest):
    """Standard output holds the answer alone, in any locale, and --json all of it."""

    LOCALES = (
        {"LC_ALL": "C"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
    )

    def test_any_text_and_all_of_it_as_json_is_printed_in_any_locale(self):
        text = "na\u00efve \U0001f389 \ud800 end"
        answer = answer_of(text, new_field=[1.5, None, {"a": "\u2028"}])
        self.service.then = {"body": answer}
        argvs = HELLO, [*HELLO, "--json"]
        cases = list(itertools.product(argvs, self.LOCALES))
        done = at_once(lambda case: self.process(*case[0], env=case[1]), cases)
        for (argv, env), done in zip(cases, done):
            with self.subTest(argv=argv, env=env):
                self.assertEqual((done.stderr, done.returncode), (b"", 0))
                if argv is HELLO:
                    self.assertRegex(done.stdout, rb"\Ana.{1,4}ve .+ \\ud800 end\n\Z")
                    continue
                encoding = env.get("PYTHONIOENCODING", "utf-8")
                self.assertEqual(json.loads(done.stdout.decode(encoding)), answer)
                self.assertIn(b'\n  "', done.stdout)  # it is indented
                if env == {"LC_ALL": "C"}:  # which is UTF-8 to Python
                    self.assertIn("na\u00efve".encode(), done.stdout)

    def test_a_deeply_nested_answer_is_printed_as_far_as_python_reads_it(self):
        for depth in (900, 1200):
            deep = "[" * depth + "]" * depth
            self.service.next({"body": '{"_id":"r","deep":%s}' % deep})
            done = self.process(*HELLO, "--json")
            if done.returncode and (depth > 900 or not CPYTHON):
                self.assertFails(done, 1)  # this Python cannot read or write it
            else:
                self.assertEqual((done.stderr, done.returncode), (b"", 0))
                self.assertIn(deep.encode(), b"".join(done.stdout.split()))

    def test_an_error_in_any_script_is_printed_in_any_locale(self):
        body = {"message": "schlie\u00dfen \u4e2d"}
        self.service.then = {"status": 400, "body": body}
        for env in self.LOCALES[1:3]:
            done = self.process(*HELLO, env=env)
            self.assertFails(done, 1, "schlie\\xdfen \\u4e2d")

    def test_to_a_pipe_everything_is_passed_as_it_came(self):
        text = "a%s\r\nz\r" % CONTROLS
        self.service.next(*bodies(answer_of(text)))
        self.assertEqual(self.said(*HELLO), text + "\n")

    @unittest.skipUnless(pty, "needs a terminal")
    def test_on_a_terminal_control_characters_are_shown_and_not_obeyed(self):
        answer = answer_of("a%s\r\nz" % CONTROLS)
        self.service.next(*bodies(answer, answer))
        text, whole = (
            self.on_terminal(*HELLO, *options, stderr=subprocess.PIPE)[1]
            for options in ([], ["--json"])
        )
        safe = [c if c in "\t\n" else "\\x%02x" % ord(c) for c in CONTROLS]
        shown = re.sub("\r+\n", "\n", text().decode())  # a terminal's ends of lines
        self.assertEqual(shown, "a%s\nz\n" % "".join(safe))
        self.assertEqual(set(CONTROLS) & set(whole().decode()), {"\r", "\n"})

    def test_background_prints_the_task_id(self):
        task_id = self.said(*HELLO, "--background")
        self.assertEqual([task_id], [name + "\n" for name in self.service.tasks])
        whole = json.loads(self.said(*HELLO, "--background", "--json"))
        self.assertIn(whole["task_id"], self.service.tasks)
        task_id = self.said("task-agent", "Hello", "--background")
        self.assertIn(task_id.strip(), self.service.tasks)

    def test_a_dry_run_needs_no_key_and_no_network(self):
        url = "http://unknown.invalid/prefix"
        argv = [*HELLO, "--dry-run", "--server-url", url + "/"]  # before ORQ_BASE_URL
        head, _, body = self.said(*argv, env={"ORQ_API_KEY": ""}).partition("\n\n")
        self.assertTrue(head.startswith("POST %s/v2/agents/my-agent/resp" % url), head)
        self.assertRegex(head, r"\nAuthorization: (Bearer )?\*+\n")
        wanted = {"message": only_text("Hello"), "background": False}
        self.assertEqual(json.loads(body), wanted)

    def test_a_dry_run_shows_what_is_then_sent(self):
        argv = [*HELLO, "--variables", "a=b"]
        shown = self.said(*argv, "--dry-run")
        self.assertEqual(self.service.requests, [])
        self.assertNotIn(self.service.key, shown)
        self.said(*argv)
        (request,) = self.service.requests
        self.assertEqual(shown.partition("\n\n")[2].strip(), request.body.decode())
        for name, value in request.headers:
            if name != "Authorization" and name.lower() != "connection":
                self.assertIn("%s: %s\n" % (name, value), shown)

    def test_verbose_tells_the_version_or_more_on_standard_error(self):
        for option in ("-v", "--version"):
            self.assertEqual(self.said(option), "orq_min %s\n" % orq_min.__version__)
        log = logging.getLogger(orq_min.__name__)
        before = log.level, list(log.handlers)
        done = self.command("-v", *HELLO)
        self.assertEqual((done.stdout, done.returncode), (b"You said: Hello\n", 0))
        self.assertIn(b"200", done.stderr)
        self.assertNotIn(self.service.key.encode(), done.stderr)
        self.assertEqual((log.level, log.handlers), before)

    def test_help_tells_what_a_caller_must_know(self):
        shown = " ".join(self.said("--help", env={"COLUMNS": "200"}).split())
        for words in (
            r"AGENT_KEY \[MESSAGE\] \[-\] .*'-'.*standard input.* second text .*-h,",
            r"--file PATH\S* attach [^|]*standard input",
            r"--message JSON\|@FILE [^|]*'@-'[^|]*standard input",
            r"--timeout SECONDS [^|]*attempt[^|]*--wait[^|]*waiting",
            "ORQ_API_KEY.*ORQ_BASE_URL.*130",
        ):
            self.assertRegex(shown, words)
        self.assertNotIn(self.service.key, shown)

    @posix_only
    def test_head_ends_it_quietly(self):
        for error in (None, "no money"):  # which head has not seen
            self.service.next(*bodies(answer_of("line\n" * 200000, error=error)))
            process = self.start(*HELLO)
            self.assertEqual(process.stdout.readline(), b"line\n")
            process.stdout.close()
            told = b"" if error is None else b"orq_min: .*no money\n"
            self.assertRegex(process.stderr.read(), rb"\A%s\Z" % told)
            self.assertEqual(process.wait(20), 0 if error is None else 1)

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_a_full_disk_is_an_error_in_one_line(self):
        for options in ([], ["--dry-run"]):
            done = self.shell('"$@" >/dev/full', *HELLO, *options)
            self.assertFails(done, 1, "cannot print")

    @posix_only
    def test_streams_that_are_closed_or_full_do_no_harm(self):
        refused = "--no-retry --server-url %s my-agent Hello" % closed_url()
        answer = b"You said: Hello\n"
        cases = [
            ('"$@" <&-', "my-agent Hello", 0, answer),
            ('"$@" <&-', "my-agent", 2, b""),
            ('"$@" 0>/dev/null', "my-agent", 2, b""),  # it cannot be read
            ('"$@" 2>&-', "my-agent Hello", 0, answer),
            ('"$@" 2>&-', "unknown Hello", 1, b""),
            ('"$@" <&- >&- 2>&-', "my-agent Hello", 0, b""),
            ('"$@" 2>/dev/full', "-v my-agent Hello", 0, answer),
            ('"$@" 2>/dev/full', "my-agent weather", 0, b"Let me look that up.\n"),
            ('"$@" 2>/dev/full', "unknown Hello", 1, b""),
            ('"$@" 2>/dev/full', "--bogus", 2, b""),
            ('"$@" 2>/dev/full', refused, 3, b""),
        ]
        results = at_once(lambda case: self.shell(case[0], *case[1].split()), cases)
        for (line, argv, status, out), done in zip(cases, results):
            if os.path.exists("/dev/full") or "full" not in line:
                with self.subTest(line=line, argv=argv):
                    self.assertEqual((done.stdout, done.returncode), (out, status))
                    self.assertNotIn(b"Traceback", done.stderr)


class StandardErrorHoldsTheRest(MainTest):
    """Standard error tells what is waited for, and what to do next."""

    def test_each_retry_is_shown_with_its_reason(self):
        again = {"status": 429, "headers": {"retry-after-ms": "20"}}
        self.service.next(dict(again, body=self.service.key), again)
        done = self.command(*HELLO)
        self.assertEqual((done.stdout, done.returncode), (b"You said: Hello\n", 0))
        line = r"orq_min: [^\n\r]*\b%d\b[^\n\r]*\b0\.0[^\n\r]*429\n"
        self.assertRegex(done.stderr.decode(), r"\A%s%s\Z" % (line % 1, line % 2))
        self.assertNotIn(self.service.key.encode(), done.stderr)

    def test_what_is_retried_can_be_chosen(self):
        cases = ("--json", 429, 2), ("--no-retry", 429, 1), ("--retry", 503, 2)
        for option, status, attempts in cases:
            del self.service.requests[:]
            self.service.next({"status": status})
            with mock.patch("time.sleep"):
                self.command(*HELLO, option)
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

    def test_the_options_shown_are_safe_to_paste_and_go_together(self):
        ids = ["a b", "$(touch x)'\"", "-dash", "-v", "YQ=="]
        calls = [{"id": name, "function": {"name": "f"}} for name in ids]
        answer = answer_of("", task_id="-t t", pending_tool_calls=calls)
        self.service.next(*bodies(answer, answer_of("done")))
        shown = self.shown_options(self.command(*HELLO))
        options = [option.replace("JSON", '{"x": "="}') for option in sum(shown, [])]
        body = self.sent("my-agent", *options)
        self.assertEqual((body["task_id"], body["message"]["role"]), ("-t t", "tool"))
        parts = body["message"]["parts"]
        results = [(part["tool_call_id"], part["result"]) for part in parts]
        self.assertEqual(results, [(name, {"x": "="}) for name in ids])

    def test_surprising_tool_calls_do_no_harm(self):
        for calls in ("x", {}, [None, {}, {"id": 1, "function": "f"}], [[]]):
            self.service.next(*bodies(answer_of("ok", pending_tool_calls=calls)))
            done = self.command(*HELLO)
            self.assertEqual((done.stdout, done.returncode), (b"ok\n", 0))

    @unittest.skipUnless(pty, "needs a terminal")
    def test_the_seconds_that_a_terminal_sees_leave_no_trace(self):
        answer, retry = bodies(answer_of("7"))[0], {"retry-after-ms": "10"}
        steps = {
            "answered": [dict(answer, delay=1.3)],
            "retried": [{"status": 429, "delay": 1.3, "headers": retry}, answer],
            "refused": [{"status": 400, "delay": 1.3, "body": {"message": "no"}}],
            "interrupted": [{"delay": 20}],
            "unseen": [dict(answer, delay=1.3)],
        }
        self.service.then = lambda peer: peer.take(steps[said(peer.request)].pop(0))
        unseen = self.start("my-agent", "unseen")
        seen = {text: self.on_terminal("my-agent", text) for text in list(steps)[:4]}
        until(lambda: len(self.service.requests) >= len(steps))
        threading.Event().wait(1.2)
        seen["interrupted"][0].send_signal(signal.SIGINT)
        shown = {text: read() for text, (_, read) in seen.items()}
        for text in shown:
            self.assertIn(b"1 s", shown[text])
        hint = "orq_min: continue with --task-id=t1"
        lines = {text: screen(shown[text]) for text in shown}
        self.assertEqual(lines["answered"], ["7", hint, ""])
        self.assertRegex(lines["retried"][0], r"\Aorq_min: .*429\Z")
        self.assertEqual(lines["retried"][1:], ["7", hint, ""])
        self.assertRegex(lines["refused"][0], r"\Aorq_min: POST .* no\Z")
        self.assertRegex(lines["interrupted"][0], r"\Aorq_min: .*agent may run on\Z")
        self.assertEqual((lines["refused"][1:], lines["interrupted"][1:]), ([""], [""]))
        self.assertEqual((unseen.wait(20), unseen.stderr.read()), (0, b""))

    @unittest.skipUnless(pty, "needs a terminal")
    def test_a_terminal_is_told_how_to_fetch_a_background_answer(self):
        process, read = self.on_terminal(*HELLO, "--background")
        (task_id,) = re.findall(r"--wait[= ](\S+)", read().decode())
        self.assertEqual([task_id], list(self.service.tasks))


class AFailedRunIsNotASuccess(MainTest):
    """A 2XX may say that the run failed, was cut, or has no text to show."""

    ERROR = {"kind": "error", "error": "no\nmoney", "code": 402}

    def test_it_is_a_line_on_standard_error_and_exit_status_1(self):
        why = [{"kind": "text", "text": "out of credit"}]
        message = {"role": "agent", "parts": why}
        failed = {"id": "t1", "status": {"state": "failed", "message": message}}
        canceled = {"id": "t1", "status": {"state": "canceled"}}
        rejected = answer_of("half", status={"state": "rejected"})
        parts = [{"kind": "text", "text": "half"}, self.ERROR]
        for body, text, why in (
            ({"output": [{"role": "agent", "parts": parts}]}, "half\n", "no money"),
            ({"output": [{"parts": [self.ERROR]}]}, "", "no money"),
            ({"error": "no\nmoney"}, "", "no money"),
            (answer_of("half", error={"message": "no money"}), "half\n", "no money"),
            ({"error": {"code": 17}}, "", "17"),
            (failed, "", "out of credit"),
            (canceled, "", "canceled"),
            (rejected, "half\n", "rejected"),
        ):
            for options in ([], ["--json"], ["--background"]):
                with self.subTest(body=body, options=options):
                    self.service.next(*bodies(body))
                    done = self.command(*HELLO, *options)
                    self.assertEqual(done.returncode, 1)
                    self.assertRegex(done.stderr.decode(), r"\Aorq_min: [^\n]*\n\Z")
                    self.assertIn(why.encode(), done.stderr)
                    if options == ["--json"]:
                        self.assertEqual(json.loads(done.stdout.decode()), body)
                    elif not options:
                        self.assertEqual(done.stdout.decode(), text)

    def test_other_runs_did_not_fail(self):
        others = [{"role": role, "parts": [self.ERROR]} for role in ("tool", "user")]
        cases = [{"output": [*others, *answer_of("ok")["output"]]}]
        cases += [answer_of("ok", error=empty) for empty in ("", None, {}, [])]
        cases.append(answer_of("ok", status={"state": "input-required"}))
        for body in cases:
            with self.subTest(body=body):
                self.service.next(*bodies(body))
                self.assertEqual(self.said(*HELLO), "ok\n")

    def test_an_answer_that_a_limit_cut_is_printed_and_told(self):
        for reason in ("length", "max_iterations", "max_time", "content_filter"):
            for options in ([], ["--json"]):
                self.service.next(*bodies(answer_of("half", finish_reason=reason)))
                done = self.command(*HELLO, *options)
                told = r"\Aorq_min: .*cut.*\b%s\b.*\n\Z" % reason
                self.assertRegex(done.stderr.decode(), told)
                self.assertIn(b"half", done.stdout)
                self.assertEqual(done.returncode, 0)
        for reason in ("stop", "tool_calls", "function_call", None, "new"):
            self.service.next(*bodies(answer_of("all", finish_reason=reason)))
            self.assertEqual(self.said(*HELLO), "all\n")

    def test_an_answer_without_any_text_says_so(self):
        calls = [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]
        data = [{"role": "agent", "parts": [{"kind": "data", "data": {"a": 1}}]}]
        for answer in ({"_id": "r1"}, {"output": data}, answer_of("")):
            with self.subTest(answer=answer):
                waiting = dict(answer, pending_tool_calls=calls)
                known = dict(answer, task_id="t1")
                self.service.next(*bodies(answer, waiting, answer, known, answer))
                done = self.command(*HELLO)
                self.assertEqual((done.stdout, done.returncode), (b"", 0))
                self.assertRegex(done.stderr, rb"\Aorq_min: [^\n]*no text[^\n]*\n\Z")
                self.assertNotIn(b"no text", self.command(*HELLO).stderr)
                for option in ("--json", "--background"):
                    self.said(*HELLO, option)
                if "task_id" not in answer:  # which a script would take for one
                    error = self.command(*HELLO, "--background").stderr
                    self.assertRegex(error, rb"\Aorq_min: [^\n]*no task id[^\n]*\n\Z")


class WaitFetchesTheAnswer(MainTest):
    """--wait prints the answer of a task when it is there."""

    DONE = answer_of("done", status="completed")

    def setUp(self):
        super().setUp()
        self.waits = []

    def wait(self, *options, status=0, skip=True):
        """Wait for t1, though not in real time; (output, error)."""

        def sleep(seconds):
            self.waits.append(seconds)
            self.assertLess(len(self.waits), 300, "it does not end")

        with mock.patch("time.sleep", sleep if skip else time.sleep):
            done = self.command("my-agent", "--wait", "t1", *options)
        self.assertEqual(done.returncode, status, done.stderr)
        return done.stdout.decode(), done.stderr.decode()

    def test_a_background_task_is_fetched_as_a_call_would_have_ended(self):
        self.service.background_seconds = 0.05
        nap = threading.Event().wait
        agents = "my-agent", "task-agent"
        for agent, text in itertools.product(agents, ("hi", "fail")):
            with self.subTest(agent=agent, text=text):
                task = self.said(agent, text, "--background").strip()
                with mock.patch("time.sleep", lambda seconds: nap(0.05)):
                    done = self.command(agent, "--wait", task)
                status, out, error = 0, b"You said: hi\n", rb"\A\Z"
                if text == "fail":
                    status, out, error = 1, b"", rb"\Aorq_min: [^\n]* told to\.\n\Z"
                self.assertEqual((done.returncode, done.stdout), (status, out))
                self.assertRegex(done.stderr, error)
                whole = self.command(agent, "--wait", task, "--json").stdout
                self.assertIn(task, json.loads(whole.decode()).values())

    def test_it_asks_every_second_for_30_s_and_every_5_s_after_that(self):
        going = {"status": "in_progress"}
        self.service.next(*bodies(*[going] * 100, self.DONE))
        self.assertEqual(self.wait(), ("done\n", ""))
        self.assertEqual(self.waits, [1] * 30 + [5] * 70)
        path = "/v2/agents/my-agent/responses/t1"
        asked = {(request.method, request.path) for request in self.service.requests}
        self.assertEqual(asked, {("GET", path)})

    def test_it_asks_each_time_for_30_s_at_most(self):
        slow = orq_min.APITimeoutError("no complete answer within 30 s")
        answer = orq_min.CreateAgentResponseResponseBody(status="completed")
        for options, most in (([], 30000), (["--timeout", "9"], 9000)):
            with mock.patch("orq_min.Responses.get", autospec=True) as get:
                get.side_effect = [slow, slow, answer]
                self.wait(*options)
            asked = [call[1]["timeout_ms"] for call in get.call_args_list]
            self.assertEqual(len(asked), 3)
            self.assertTrue(most - 3000 < min(asked) <= max(asked) <= most, asked)

    def test_states_in_which_it_waits_on_and_in_which_it_has_ended(self):
        going = ["in_progress", {"state": "submitted"}, {"state": "working"}]
        ended = ["completed", "stopped", "", None, {}, {"state": None}]
        ended += [{"state": "completed"}, {"state": "input-required"}]
        self.service.then = {"body": self.DONE}
        for status in going + ended:
            with self.subTest(status=status):
                self.service.next(*bodies(answer_of("first", status=status)))
                wanted = "first\n" if status in ended else "done\n"
                self.assertEqual(self.wait(), (wanted, ""))
        for status in ("failed", {"state": "failed"}, {"state": "rejected"}):
            self.service.next(*bodies(answer_of("half", status=status)))
            output, error = self.wait(status=1)
            self.assertEqual(output, "half\n")
            self.assertRegex(error, r"\Aorq_min: [^\n]*(failed|rejected)\n\Z")

    def test_it_waits_through_what_is_temporary_and_says_why(self):
        self.service.then = {"body": self.DONE}
        steps = [{"status": status, "body": "no"} for status in (429, 502, 503, 504)]
        for step in [*steps, hang_up, break_off, cut_off]:
            with self.subTest(step=step):
                self.service.next(step, step)
                output, error = self.wait()
                self.assertEqual(output, "done\n")
                why = str(step["status"]) if step in steps else "no (complete )?answer"
                self.assertRegex(error, r"\A(orq_min: [^\n]*%s[^\n]*\n)+\Z" % why)
        self.waits = []
        self.service.next(dict(steps[0], headers={"Retry-After": "7"}))
        self.wait()
        self.assertEqual(self.waits, [7])

    def test_anything_else_ends_it_at_once(self):
        self.service.then = {"body": self.DONE}
        steps = [{"status": s, "body": "no"} for s in (302, 400, 401, 404, 422, 500)]
        for step in [*steps, {"body": "<html>"}]:
            with self.subTest(step=step):
                self.service.next(step)
                _, error = self.wait(status=1)
                self.assertRegex(error, r"\Aorq_min: GET [^\n]*\n\Z")
        url = self.service.url.replace("http", "https")
        _, error = self.wait("--server-url", url, status=3)
        self.assertIn("TLS", error)
        self.assertEqual(self.waits, [])

    def test_timeout_bounds_the_waiting_as_a_whole(self):
        here, nobody = self.service.url, closed_url()
        later = {"status": 503, "headers": {"Retry-After": "100"}}
        going = {"body": {"status": "in_progress"}}
        cases = [(step, here) for step in (later, hang_up, going)]
        for step, url in [*cases, (None, nobody)]:
            with self.subTest(step=step, url=url):
                self.service.then = step or going
                options = ["--timeout", "0.3", "--server-url", url]
                started = time.perf_counter()
                output, error = self.wait(*options, status=3, skip=False)
                self.assertLess(time.perf_counter() - started, 5)
                self.assertEqual(output, "")
                self.assertRegex(error.splitlines()[-1], r"\Aorq_min: .*t1.*0\.3 s")
        self.service.then = {"delay": 20}  # an attempt may take all of it
        self.wait("--timeout", "0.3", status=3)
        self.assertLess(sum(self.waits), 0.1)
        self.waits, self.service.then = [], going
        self.wait("--timeout", "42", status=3)  # a wait counts, even one skipped
        self.assertEqual(self.waits[:31], [1] * 30 + [5])
        self.assertAlmostEqual(sum(self.waits), 42, delta=1)

    def test_it_is_refused_beside_a_message_and_what_is_part_of_one(self):
        file = self.write("a", b'{"id": "a"}')
        beside = ["Hello", "-", "Hello -", "--background", "--tool-result c=1"]
        beside += ["--task-id t1", "--dry-run", "--file " + file]
        beside += ["%s @%s" % (option, file) for option in JSON_OPTIONS]
        beside += ["--timeout " + seconds for seconds in WRONG_SECONDS]
        for text in beside:
            name = text.split()[0] if text.startswith("--") else "MESSAGE"
            self.assertRefused(("my-agent --wait t1 " + text, name), stdin=b"piped")
        self.assertRefused(("my-agent --wait ..", "task_id"))


class TheExitStatusTells(MainTest):
    """The exit status says what happened, with one line and no traceback."""

    def test_an_error_of_the_service_is_1(self):
        self.assertFails(self.command("unknown", "Hello"), 1, "404", "no agent")
        done = self.command(*HELLO, env={"ORQ_API_KEY": "other-key"})
        self.assertFails(done, 1, "401", "invalid API key")
        self.assertNotIn(b"other-key", done.stderr)
        html = "<html>\n<h1>gateway\x1b[31m</h1>\r\n" + "x" * 100000
        for status in (200, 302, 400):
            self.service.next({"status": status, "body": html + self.service.key})
            done = self.command(*HELLO)
            self.assertFails(done, 1, str(status))
            self.assertLess(len(done.stderr), 2000)
            self.assertNotIn(b"\x1b", done.stderr)

    def test_no_answer_is_3(self):
        url = closed_url()
        done = self.command(*HELLO, "--no-retry", "--server-url", url)
        self.assertFails(done, 3, url)
        self.service.next(hang_up, {"delay": 20})
        self.assertFails(self.command(*HELLO), 3, "closed")
        self.assertFails(self.command(*HELLO, "--timeout", "0.4"), 3, "0.4 s")

    def test_an_interrupt_is_130_to_who_calls_main(self):
        for name, argv in (("create", ["hi"]), ("get", ["--wait", "t"])):
            with mock.patch("orq_min.Responses." + name, autospec=True) as method:
                method.side_effect = KeyboardInterrupt
                done = self.command("my-agent", *argv)
            self.assertEqual(done.returncode, 130)
            # a task that is waited for is left alone, so there is nothing to say
            self.assertEqual(b"agent may run on" in done.stderr, name == "create")

    @posix_only
    def test_a_program_dies_of_an_interrupt_wherever_it_comes(self):
        waiting = {"status": 429, "headers": {"Retry-After": "20"}}
        self.service.then = lambda peer: peer.take(
            waiting if b"retry" in peer.request.body else {"delay": 20}
        )
        answer = self.start(*HELLO)
        retry = self.start("my-agent", "retry")
        wait = self.start("my-agent", "--wait", "t1")
        reads = self.start("my-agent", stdin=subprocess.PIPE)
        reads.stdin.write(b"x" * 2**18)  # more than a pipe holds: it reads
        until(lambda: len(self.service.requests) == 3)
        self.assertIn(b"429", retry.stderr.readline())
        threading.Event().wait(0.3)  # CPython may miss a signal between two reads
        for process in (answer, retry, wait, reads):
            process.send_signal(signal.SIGINT)
            self.assertEqual(process.wait(5), -signal.SIGINT)
            self.assertNotIn(b"Traceback", process.stderr.read())
            self.assertEqual(process.stdout.read(), b"")
        # the task is left alone
        methods = [request.method for request in self.service.requests]
        self.assertEqual(sorted(methods), ["GET", "POST", "POST"])


# ----------------------------------------------------------------------------
# Retries
# ----------------------------------------------------------------------------


class RetryTest(RefusalTest):
    """Sleeps at once: `waits` are the seconds that the client would have slept.

    They count as elapsed nevertheless; no clock is moved.
    """

    def setUp(self):
        super().setUp()
        self.waits, self.uniform = [], random.uniform
        self.enter(mock.patch("time.sleep", self.waits.append))
        self.enter(mock.patch("random.uniform", lambda low, high: high))

    def waits_after(self, *headers, times=1, **given):
        """Have the service say 429 so often; return the waits of one call."""
        del self.waits[:]
        self.service.next(*[{"status": 429, "headers": dict(headers)}] * times)
        self.assertEqual(self.create(**given).text, "You said: hi")
        return [round(wait, 6) for wait in self.waits]

    def waits_without_a_server(self, **given):
        del self.waits[:]
        kind = orq_min.APIConnectionError
        self.failure(self.orq, kind, server_url=closed_url(), **given)
        return self.waits


def backoff(*given, **more):
    return orq_min.RetryConfig("backoff", orq_min.BackoffStrategy(*given), **more)


def in_seconds(seconds, form="%a, %d %b %Y %H:%M:%S GMT"):
    return time.strftime(form, time.gmtime(time.time() + seconds))


class WaitsBetweenAttempts(RetryTest):
    """How long is waited: doubling, as the server asks, and never past the end."""

    def test_the_default_waits_half_a_second_doubling_to_8_within_30(self):
        wanted = [0.5, 1, 2, 4, 8, 8]
        self.assertEqual(self.waits_without_a_server(), wanted)
        del self.waits[:]
        self.service.next(*[{"status": 429}] * 7)
        self.assertEqual(self.failure(self.orq).status_code, 429)
        self.assertEqual((self.waits, len(self.service.requests)), (wanted, 7))
        with mock.patch("random.uniform", self.uniform):  # they are not all alike
            seen = {wait for _ in range(8) for wait in self.waits_after()}
        self.assertGreater(len(seen), 1)
        self.assertTrue(all(0.375 <= wait <= 0.5 for wait in seen), seen)

    def test_waits_grow_by_the_exponent_to_the_longest_with_jitter_on_top(self):
        config = backoff(100, 1000, 3, 60000)
        self.assertEqual(self.waits_after(times=4, retries=config), [0.1, 0.3, 0.9, 1])
        config = backoff(100, 400, 2, 60000, 50)
        self.assertEqual(self.waits_after(times=3, retries=config), [0.15, 0.25, 0.4])
        config = backoff(100, 60000, 2, 60000, 0)
        with mock.patch("random.uniform", lambda low, high: low):
            self.assertEqual(self.waits_after(times=3, retries=config), [0.1, 0.2, 0.4])

    def test_the_wait_that_the_server_asks_for_is_kept(self):
        for headers, low, high in (
            ([("Retry-After", "3")], 3, 3),
            ([("Retry-After", " 20 ")], 20, 20),
            ([("Retry-After", "0.25")], 0.25, 0.25),
            ([("retry-after-ms", "250")], 0.25, 0.25),
            ([("Retry-After", "3"), ("Retry-After-Ms", "2500")], 2.5, 2.5),
            ([("Retry-After", "3"), ("retry-after-ms", "-5")], 3, 3),
            ([("Retry-After", in_seconds(20))], 10, 20),
        ):
            with self.subTest(headers=headers):
                (wait,) = self.waits_after(*headers)
                self.assertTrue(low <= wait <= high, wait)

    def test_nonsense_from_the_server_is_passed_over(self):
        values = ["", ", :", *"soon -5 nan inf -inf 1e400 0x10 \xb2".split()]
        values += ["Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 99 Foo 2025 07:28:00 GMT"]
        values += ["Mon, 1 Jan 0000 0:0:0 GMT"]
        pairs = [*itertools.product(("Retry-After", "retry-after-ms"), values)]
        for pair in (*pairs, ("retry-after-ms", "0.1")):  # that would be a storm
            with self.subTest(pair):
                self.assertEqual(self.waits_after(pair), [0.5])

    @unittest.skipUnless(hasattr(time, "tzset"), "needs a settable time zone")
    def test_a_date_is_greenwich_time_in_each_form_that_http_knows(self):
        self.addCleanup(time.tzset)
        with mock.patch.dict(os.environ, TZ="EST5"):
            time.tzset()
            for form in ("%a, %d %b %Y %T GMT", "%A, %d-%b-%y %T GMT", "%c"):
                with self.subTest(form=form):
                    (wait,) = self.waits_after(("Retry-After", in_seconds(20, form)))
                    self.assertTrue(10 <= wait <= 20, wait)

    def test_a_wait_that_would_pass_the_end_is_not_begun(self):
        for value in ("31", "86400", in_seconds(90)):
            with self.subTest(value=value):
                del self.waits[:], self.service.requests[:]
                for seconds in ("1", value):
                    headers = {"Retry-After": seconds}
                    self.service.next({"status": 429, "headers": headers})
                error = self.failure(self.orq, orq_min.APIError)
                self.assertEqual(error.headers["retry-after"], value)
                self.assertIn(value, str(error))  # as it was not waited for
                self.assertEqual((self.waits, len(self.service.requests)), ([1], 2))

    def test_the_attempts_count_towards_the_end(self):
        self.service.next({"status": 429, "delay": 0.3}, {"status": 429})
        error = self.failure(self.orq, retries=backoff(100, 100, 1, 350))
        self.assertEqual((error.status_code, self.waits), (429, []))

    def test_nothing_overflows_however_long_it_runs(self):
        for exponent in (1e308, 10**308, 2**64):
            with self.subTest(exponent=exponent):
                config = backoff(500, 2000, exponent, 62000)
                waits = self.waits_without_a_server(retries=config)
                self.assertEqual(waits, [0.5] + [2] * 30)
        for first, times, wanted in ((1e308, 1, 0.007), (0, 4, 0)):
            config = backoff(first, 7, 1e308, 1e308)
            found = self.waits_after(times=times, retries=config)
            self.assertEqual(found, [wanted] * times)

    def test_the_last_error_is_raised(self):
        self.service.next({"status": 429}, {"status": 429}, {"status": 400})
        self.assertEqual(self.failure(self.orq).status_code, 400)
        self.assertEqual(self.waits, [0.5, 1])


# fmt: off
WRONG_POLICIES = {  # as WRONG_VALUES are
    "strategy": {"": ["linear", 1, None]}, "retry_connection_errors": {"": ["yes", 1]},
    "backoff": {"": [500, None, {"initial_interval": 1}]},
    "status_codes_override": {
        "": ["5XX", {"429"}], "[1]": [["429", None]],
        "[0]": [[429], ["5X"], ["600"], ["4290"], ["429\n"], ["\u0664\u0662\u0669"]],
    },
}
UNSET, DEFAULT = orq_min.UNSET, orq_min.DEFAULT_RETRY
ALL = backoff(1, 1, 1, 1000, retry_connection_errors=True)
CHOSEN = [  # policy of the client, of the call; a status, and the attempts that follow
    (UNSET, UNSET, 429, 2), (UNSET, None, 429, 1), (UNSET, ALL, 500, 2),
    (None, UNSET, 429, 1), (None, DEFAULT, 429, 2), (ALL, UNSET, 500, 2),
    (ALL, DEFAULT, 500, 1), (ALL, orq_min.RetryConfig("none"), 500, 1),
]
# fmt: on
NO_NUMBERS = [-1, "1", True, float("nan"), float("inf"), [1], 10**400]


class PoliciesAreChosen(RetryTest):
    """Which policy a call follows; what each retries is a table, further below."""

    def test_a_call_overrides_the_client_which_overrides_the_default(self):
        for of_client, of_call, status, attempts in CHOSEN:
            with self.subTest(client=of_client, call=of_call, status=status):
                del self.service.requests[:]
                self.service.next({"status": status})
                options = {} if of_client is UNSET else {"retry_config": of_client}
                with client(self.service, **options) as orq:
                    said = self.outcome(orq, retries=of_call)
                self.assertEqual(said == "You said: hi", attempts == 2, said)
                self.assertEqual(len(self.service.requests), attempts)

    def test_the_settings_of_old_and_new_programs_are_taken(self):
        m = orq_min
        strategy = m.BackoffStrategy(500, 60000, 1.5, 3600000)
        given = {"strategy": "backoff", "status_codes_override": ["429", "5XX"]}
        given["backoff"] = m.BackoffStrategy(500, 60000, 1.5, 60000, jitter_ms=1)
        new = m.RetryConfig(retry_connection_errors=True, **given)
        for config in (m.RetryConfig("backoff", strategy, True), new):
            self.service.next({"status": 500}, hang_up, {"status": 502})
            self.assertEqual(self.create(retries=config).text, "You said: hi")
        self.assertEqual(m.BackoffStrategy(), strategy)
        config = m.RetryConfig()
        self.assertIsNone(config.retry_connection_errors)
        self.assertEqual(config, m.RetryConfig("backoff", m.BackoffStrategy(), None))

    def test_wrong_settings_are_refused_when_they_are_given(self):
        names = [field.name for field in dataclasses.fields(orq_min.BackoffStrategy)]
        numbers = {name: {"": NO_NUMBERS + [None]} for name in names}
        numbers["jitter_ms"] = {"": NO_NUMBERS}
        self.assert_refused(orq_min.BackoffStrategy, numbers)
        self.assert_refused(orq_min.RetryConfig, WRONG_POLICIES)
        found = self.refused(orq_min.BackoffStrategy, -1, -1)
        self.assertEqual(list(found), ["initial_interval", "max_interval"])
        found = self.refused(orq_min.RetryConfig, "sometimes", 5)
        self.assertEqual(list(found), ["strategy", "backoff"])

    def test_a_policy_cannot_be_changed_but_another_made_of_it(self):
        before = backoff(1, 2, 3, 4, 5)
        for whole in (orq_min.DEFAULT_RETRY, before):
            for policy in (whole, whole.backoff):
                for field in dataclasses.fields(policy):
                    with self.assertRaises(dataclasses.FrozenInstanceError):
                        setattr(policy, field.name, True)
                self.assertEqual(copy.deepcopy(policy), policy)
                self.assertEqual(pickle.loads(pickle.dumps(policy)), policy)
        other = dataclasses.replace(before, retry_connection_errors=True)
        self.assertEqual(other.backoff, before.backoff)
        self.refused(dataclasses.replace, before, strategy="x")


class RetriesAreLogged(RetryTest):
    """Each retry is logged: why, how long, which attempt; no header and no body."""

    def test_each_retry_is_one_record_of_the_level_warning(self):
        step = {"status": 429, "body": {"message": "secret-body"}}
        step["headers"] = {"X-Secret": "secret-header", "Retry-After": "3"}
        self.service.next(step, dict(step, headers={"Retry-After": "7"}))
        with logged() as records:
            self.create(http_headers={"X-Mine": "secret-mine"})
        for record in records:
            self.assertNotRegex(record.getMessage(), "secret-|" + self.service.key)
        retries = [r.getMessage() for r in records if r.levelname == "WARNING"]
        self.assertEqual(len(retries), 2)
        for number, (wait, message) in enumerate(zip((3, 7), retries), 1):
            self.assertRegex(message, r"\b%d\b.*\b%d(\.0)? s.*429" % (number, wait))
        others = {r.levelname for r in records if r.getMessage() not in retries}
        self.assertLessEqual(others, {"DEBUG"})
        self.service.next(hang_up)
        with logged(logging.WARNING) as records:
            self.create(retries=orq_min.RetryConfig(retry_connection_errors=True))
        (record,) = records
        self.assertIn("closed", record.getMessage())

    def test_nothing_is_logged_for_what_is_not_tried_again(self):
        late = {"status": 429, "headers": {"Retry-After": "99"}}
        self.service.next({"status": 500}, late)
        with logged(logging.INFO) as records:
            self.failure(self.orq, orq_min.APIError)
            self.failure(self.orq, orq_min.APIError)
            self.create()
        self.assertEqual(records, [])


class RetriesWithAsyncio(LoopbackTest):
    """create_async and get_async follow the same policy, and never block the loop."""

    def create_async(self):
        create = self.orq.agents.responses.create_async
        return create(agent_key="my-agent", message="hi")

    def test_they_wait_without_blocking_the_loop(self):
        step = {"status": 429, "headers": {"retry-after-ms": "200"}}
        get, task_id = self.orq.agents.responses.get_async, self.create().task_id

        async def main(call):
            task, ticks = asyncio.ensure_future(call), 0
            started = time.perf_counter()
            while not task.done():
                await asyncio.sleep(0.01)
                ticks += 1
            return (await task).text, time.perf_counter() - started, ticks

        for call in (self.create_async(), get(agent_key="my-agent", task_id=task_id)):
            self.service.next(step, step)
            with logged(logging.WARNING) as records:
                text, seconds, ticks = asyncio.run(main(call))
            self.assertEqual((text, len(records)), ("You said: hi", 2))
            self.assertGreaterEqual(seconds, 0.39)
            self.assertGreater(ticks, 8)

    def test_a_cancelled_wait_sends_nothing_more(self):
        self.service.next({"status": 429, "headers": {"retry-after-ms": "600"}})
        before = threading.active_count()

        async def main():
            task = asyncio.ensure_future(self.create_async())
            while not records:
                await asyncio.sleep(0.01)
            task.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await task

        with logged(logging.WARNING) as records:
            asyncio.run(main())
        time.sleep(0.8)  # past the end of the wait
        self.assertEqual(len(self.service.requests), 1)
        self.assertLessEqual(threading.active_count(), before + 1)  # the server's


# ----------------------------------------------------------------------------
# The network
# ----------------------------------------------------------------------------

FORGED = reply("the answer to somebody else")
LARGE = "x" * (16 << 20)  # more than any socket's buffers hold
SOON = orq_min.BackoffStrategy(1, 2, 1.5, 60000)
AT_ALL_COSTS = orq_min.RetryConfig("backoff", SOON, True)  # retries all it ever may


def assert_no_local_holds(key, error):
    """No variable of ours that a traceback reaches; error trackers record them."""
    while error:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if frame.f_globals.get("__name__") == orq_min.__name__:
                for name, value in frame.f_locals.items():
                    if key in repr(value):
                        where = frame.f_code.co_name
                        raise AssertionError("%s in %s: %r" % (name, where, value))
        error = error.__cause__ or error.__context__


class ConnectionsAreKept(ServerTest):
    """Calls share connections, and nobody reads the answer to another's request."""

    def assert_used(self, server, connections, between=lambda server: None):
        """Two calls use these connections; what the first one comes to."""
        orq = self.client(server)
        first = self.outcome(orq, "one")
        between(server)
        self.assertEqual(self.call(orq, "two"), "two")
        self.assertEqual(server.on, connections)
        return first

    def test_calls_in_a_row_share_one_connection(self):
        packed = reply(gzip.compress(saying("p")), "200 OK", "Content-Encoding: gzip")
        steps = reply(b"", "404 No"), chunked(saying("c"), size=7), packed, repeat_text
        for tls in (None, server_context()):
            server = self.server(*steps, tls=tls)
            orq = self.client(server)
            self.assertEqual(self.failure(orq, orq_min.APIError).status_code, 404)
            create_async = orq.agents.responses.create_async
            answer = asyncio.run(create_async(agent_key="my-agent", message="hi"))
            got = [answer.text] + [self.call(orq) for _ in range(3)]
            self.assertEqual(got, ["c", "p", "hi", "hi"])
            self.assertEqual(server.on, [0] * 5)

    def test_an_odd_answer_costs_the_connection(self):
        body = saying("odd")
        length = "Content-Length: %d" % len(body)
        upgrade = "Upgrade: x", "Connection: Upgrade"
        odd = {
            "bytes past its end": reply("odd") + FORGED,
            "bytes past the last chunk": chunked(body) + FORGED,
            "asks to close": reply(body, "200 OK", "Connection: close"),
            "HTTP/1.0": reply(body).replace(b"HTTP/1.1", b"HTTP/1.0"),
            "101": head("101 Switching Protocols", *upgrade),
            "101 with a length": head("101 Switching Protocols", "Content-Length: 0"),
            "no length": then_close(head("200 OK") + body),
            "a length and chunks": chunked(body, length),
            "two lengths": head("200 OK", length, "Content-Length: 9999") + body,
            "the same length twice": head("200 OK", length, length) + body,
            "a length with a sign": head("200 OK", length.replace(": ", ": +")) + body,
            "an unread body": reply(b" " * 2000),
            "an unread body of an error": reply(b" " * 2000, "500 Oops"),
            "an early end": then_close(reply(body)[:-1]),
            "no such content": head("204 No Content", "Content-Length: 5"),
            "not modified": head("304 Not Modified", "Content-Length: 5"),
            "a line that is no header": head("200 OK", length, "what is this") + body,
        }
        for name, answer in odd.items():
            with self.subTest(name), mock.patch("orq_min.MAX_ANSWER_BYTES", 1000):
                got = self.assert_used(self.server(answer, repeat_text), [0, 1])
                self.assertTrue(got == "odd" or isinstance(got, orq_min.OrqError), got)

    def test_a_connection_that_was_ended_or_used_unasked_is_not_used(self):
        def reset(peer):
            peer.send(reply("one"))
            peer.pause(0.05)
            break_off(peer)

        def ended(server):
            until(lambda: not server.peers[0].is_open())

        def unasked(server):
            server.peers[0].send(FORGED)
            time.sleep(0.02)

        close = then_close(reply("one"))
        for step, what in ((close, ended), (reset, ended), (repeat_text, unasked)):
            for tls in (None, server_context()):
                server = self.server(step, repeat_text, tls=tls)
                self.assertEqual(self.assert_used(server, [0, 1], what), "one")

    def test_a_connection_is_kept_for_a_while(self):
        with mock.patch("orq_min.IDLE_SECONDS", 0.2):
            self.assert_used(self.server(), [0, 1], lambda server: time.sleep(0.3))

    def burst(self, *servers):
        """A client after ten calls to each server, all at once."""
        gate = threading.Barrier(10 * len(servers), timeout=20)
        for server in servers:
            server.next(*[lambda peer: (gate.wait(), repeat_text(peer))] * 10)
        orq = self.client(servers[0])
        with concurrent.futures.ThreadPoolExecutor(10 * len(servers)) as pool:
            urls = [server.url for server in servers] * 10
            list(pool.map(lambda url: self.call(orq, server_url=url), urls))
        return orq

    def test_at_most_sixteen_idle_connections_are_kept_for_all_servers(self):
        servers = self.server(), self.server()
        self.burst(*servers)
        self.assertEqual([server.connections for server in servers], [10, 10])
        until(lambda: sum(len(server.gone) for server in servers) == 4)
        time.sleep(0.05)
        self.assertEqual(sum(len(server.gone) for server in servers), 4)

    def test_connections_that_were_not_used_for_a_while_are_closed_by_later_calls(self):
        server = self.server()
        with mock.patch("orq_min.IDLE_SECONDS", 0.3):
            orq = self.burst(server)
            time.sleep(0.4)
            self.call(orq)
        until(lambda: len(server.gone) == 10)

    def test_a_client_that_is_dropped_closes_its_connections(self):
        server = self.server()
        orq = client(server)
        self.assertEqual(self.call(orq), "hi")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if sys.implementation.name == "cpython":
                gc.disable()  # at once, as a script may drop many
                self.addCleanup(gc.enable)
            del orq
            until(lambda: (gc.isenabled() and gc.collect(), server.gone == [0])[1])
        self.assertEqual([str(warning.message) for warning in caught], [])

    @unittest.skipUnless(hasattr(os, "fork"), "the platform does not fork")
    def test_a_fork_shares_no_connection_and_no_lock(self):
        server = self.server(tls=server_context())
        code = """
            import os, ssl, threading, time, warnings, orq_min
            warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads
            make, making = ssl.create_default_context, threading.Event()
            def make_slowly(*given, **more):
                making.set()
                time.sleep(0.3)
                return make(*given, **more)
            ssl.create_default_context = make_slowly
            orq = orq_min.Orq("k", timeout_ms=5000, retry_config=None)
            def say(text):
                create = orq.agents.responses.create
                assert create(agent_key="a", message=text).text == text
            def fork(text, meanwhile):
                child = os.fork()
                if child == 0:
                    say(text)
                    os._exit(0)
                meanwhile()
                end, ended = time.monotonic() + 5, (0, 0)
                while ended[0] == 0 and time.monotonic() < end:
                    time.sleep(0.02)
                    ended = os.waitpid(child, os.WNOHANG)
                if ended != (child, 0):
                    os.kill(child, 9)
                    sys.exit(text + (" hangs" if ended[0] == 0 else " failed"))
            thread = threading.Thread(target=say, args=("thread",))
            thread.start()
            making.wait()
            fork("a child while the context is made", thread.join)
            fork("a child", lambda: say("meanwhile"))
            say("parent again")
            orq.close()
        """
        with temporary_file(AUTHORITY) as path:
            process = script(code, ORQ_BASE_URL=server.url, SSL_CERT_FILE=path)
            self.assertEqual(process.communicate(timeout=20), (b"", b""))
        by = dict(zip(map(said, server.requests), server.on))
        self.assertEqual(by["thread"], by["meanwhile"], by["parent again"])
        self.assertEqual(len(set(by.values())), 3)

    def test_each_of_two_servers_keeps_its_connection(self):
        one, two = self.server(), self.server()
        orq = self.client(one)
        for number, server in enumerate([one, two, one, two, two]):
            text = "n%d" % number
            self.assertEqual(self.call(orq, text, server_url=server.url), text)
        self.assertEqual((one.on, two.on), ([0] * 2, [0] * 3))

    def test_close_and_leaving_with_close_the_connections(self):
        def leave(orq):
            with orq:
                pass

        async def leave_async(orq):
            async with orq:
                pass

        ends = (orq_min.Orq.close, leave, lambda orq: asyncio.run(leave_async(orq)))
        for end in ends:
            server = self.server()
            orq = self.client(server)
            self.call(orq)
            self.assertEqual(server.gone, [])
            end(orq)
            until(lambda server=server: server.gone == [0])

    def test_a_call_during_and_after_close_is_answered_and_leaves_no_connection(self):
        def close_first(peer):
            orq.close()
            repeat_text(peer)

        server = self.server(close_first, repeat_text)
        orq = self.client(server)
        self.assertEqual(self.call(orq, "during"), "during")
        until(lambda: server.gone == [0])
        self.assertEqual(self.call(orq, "after"), "after")
        until(lambda: server.gone == [0, 1])

    def test_create_response_and_a_failed_call_leave_no_connection(self):
        server = self.server()
        orq_min.create_response("a", "hi", api_key="k", server_url=server.url)
        until(lambda: server.gone == [0])
        for data in (b"what?\r\n\r\n", reply(b" " * 2000), chunked(b"")[:-9]):
            server = self.server(lambda peer, data=data: (peer.send(data), peer.hang()))
            orq = self.client(server, timeout_ms=50)
            with mock.patch("orq_min.MAX_ANSWER_BYTES", 1000):
                self.failure(orq)
            until(lambda server=server: server.gone == [0])

    def test_sixteen_threads_on_one_client_get_their_own_answers(self):
        server = self.server()
        orq = self.client(server)

        def talk(thread):
            texts = ["%d of %d" % (number, thread) for number in range(20)]
            return [self.call(orq, text) for text in texts] == texts

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            self.assertEqual(set(pool.map(talk, range(16))), {True})
        self.assertLessEqual(server.connections, 16)

    def test_the_system_is_asked_to_send_at_once_and_to_notice_a_dead_peer(self):
        options = mock.Mock(side_effect=socket.socket.setsockopt)
        with mock.patch.object(socket.socket, "setsockopt", lambda *a: options(*a)):
            self.call(self.client(self.server()))
        asked = [call[0][1:] for call in options.call_args_list]
        self.assertIn((socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), asked)
        self.assertIn((socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), asked)
        times = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}
        for name, value in times.items():
            if hasattr(socket, name):
                self.assertIn((socket.IPPROTO_TCP, getattr(socket, name), value), asked)


class RequestsAndAnswersTravelWhole(ServerTest):
    """What HTTP allows a server to do, and what it may expect of a client."""

    def test_interim_answers_are_read_past(self):
        early = head("100 Continue") + head("103 Early Hints", "Link: </x>; rel=y")
        early += head("102 Processing") * 3 + head("199 Whatever", "Content-Length: 9")
        pieces = early[:30], early[30:99], early[99:] + reply("final")
        slowly = functools.partial(Connection.send, pause=0.01)
        for step in (early + reply("final"), lambda peer: slowly(peer, *pieces)):
            server = self.server(step, early + reply(b"", "404 Not Found"))
            orq = self.client(server)
            self.assertEqual(self.call(orq), "final")
            self.assertEqual(self.failure(orq, orq_min.APIError).status_code, 404)
            self.assertEqual(server.on, [0, 0])

    def test_each_header_is_sent_once(self):
        server = self.server()
        orq = self.client(server)
        self.call(orq)
        mine = {"authorization": "Bearer x", "ACCEPT": "a/b", "uSER-agent": "me"}
        self.call(orq, http_headers=dict(mine, X="y"))
        for request in server.requests:
            names = [name.lower() for name, _ in request.headers]
            self.assertEqual(len(names), len(set(names)), names)
            self.assertEqual(request.header("host"), [server.netloc])
            self.assertEqual(request.header("content-length"), [str(len(request.body))])
        for name, value in dict(mine, X="y").items():
            self.assertEqual(server.requests[1].header(name), [value])
        sent = server.requests[0].header("authorization")
        self.assertEqual(sent, ["Bearer test-key-123"])

    def test_an_early_refusal_of_a_large_upload_is_reported(self):
        """Whether the server then hangs up or reads the rest."""
        refusal = reply(b'{"message": "go away"}', "413 Payload Too Large")
        for tls in (None, server_context()):
            for then in (hang_up, Connection.hang):
                with self.subTest(tls=bool(tls), then=then.__name__):

                    def refuse(peer, then=then):
                        peer.send(refusal)
                        then(peer)

                    server = self.server(refuse, tls=tls, early=True)
                    orq = self.client(server, timeout_ms=600)
                    error = self.failure(orq, orq_min.APIError, text=LARGE)
                    self.assertEqual(error.status_code, 413)
                    self.assertEqual(error.message, "go away")
                    self.assertEqual(len(server.requests), 1)

    def test_any_2xx_with_a_json_object_is_an_answer(self):
        for status in (200, 201, 202, 203, 206, 299):
            with self.subTest(status):
                server = self.server(reply("paid for", "%d Fine" % status))
                self.assertEqual(self.call(self.client(server)), "paid for")

    def test_what_broke_off_is_said_in_words(self):
        no_http = then_close(b"SMTP ready\r\n\r\n")
        for step, words in (
            (hang_up, "closed without an answer"),
            (cut_off, "broke off"),
            (no_http, "no HTTP answer"),
        ):
            error = self.failure(self.client(self.server(step)))
            self.assertIn("the agent may have run, but", str(error))
            self.assertIn(words, str(error))

    def test_a_failed_call_leaves_no_noise(self):
        """Nothing of http.client's own complains when it is collected."""
        cut = (b"", b"what?\r\n", head("200 OK")[:-2], reply("cut")[:-1])
        server = self.server(*map(then_close, cut))
        code = """
            import gc, orq_min
            for _ in range(4):
                try:
                    orq_min.create_response("a", "b", retries=None)
                except orq_min.APIConnectionError:
                    gc.collect()
        """
        env = {"ORQ_BASE_URL": server.url, "ORQ_API_KEY": "k", "PYTHONDEVMODE": "1"}
        process = script(code, **env)
        self.assertEqual(process.communicate(timeout=20), (b"", b""))
        self.assertEqual(process.returncode, 0)


class ConnectingTakesSeconds(ServerTest):
    """Addresses are tried as RFC 8305 says; an attempt to connect ends in 10 s."""

    def reach(self, server, *others):
        """Call this server by a name that has all these addresses, it being the last."""
        with resolving(*others, ("127.0.0.1", server.port)):
            return self.call(self.client(server))

    def dead(self, host="127.0.0.1"):
        try:
            return self.enter(full_backlog(host))
        except OSError as error:
            self.skipTest("no such address here: %s" % error)

    def refusing(self):
        closed = self.enter(socket.socket())  # bound, but it does not listen
        closed.bind(("127.0.0.1", 0))
        return closed.getsockname()

    def test_dead_addresses_are_passed_over(self):
        for count, seconds in ((1, 1), (7, 3)):
            with within(seconds):
                got = self.reach(self.server(), *[self.dead()] * count)
            self.assertEqual(got, "hi")

    def test_an_address_that_refuses_does_not_hold_up_the_next(self):
        with within(2):  # in turns it would be 3
            self.assertEqual(self.reach(self.server(), *[self.refusing()] * 12), "hi")
        with resolving(self.refusing()):
            self.assertIn("refused", str(self.failure(self.client(self.server()))))

    def test_the_families_take_turns(self):
        with within(2):  # after all of the first family it would be 3
            self.assertEqual(self.reach(self.server(), *[self.dead("::1")] * 12), "hi")

    def test_an_address_that_this_machine_cannot_use_is_passed_over(self):
        server = self.server()
        good = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", server.port))
        found = [(999, *good[1:]), good]
        with mock.patch("socket.getaddrinfo", lambda *_, **__: found):
            self.assertEqual(self.call(self.client(server)), "hi")

    def test_the_first_that_connects_wins_and_the_others_are_closed(self):
        server, spare = self.server(), self.server()
        addresses = [("255.255.255.255", 9), self.dead(), self.refusing()]
        addresses.append(("127.0.0.1", server.port))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with resolving(*addresses, ("127.0.0.1", spare.port)):
                self.assertEqual(self.call(self.client(server)), "hi")
            gc.collect()
        self.assertEqual([str(warning.message) for warning in caught], [])
        self.assertEqual((server.connections, spare.connections), (1, 0))
        with resolving(("255.255.255.255", 9)):
            error = self.failure(self.client(server), orq_min.APIConnectionError)
        self.assertNotIn("no address", str(error))

    def assert_no_connection(self, server_url, seconds):
        orq = self.enter(orq_min.Orq("k", server_url=server_url))  # of ten minutes
        with within(seconds):
            error = self.failure(orq, orq_min.APITimeoutError, retries=None)
        self.assertEqual((error.sent, error.temporary), (False, True))
        self.assertRegex(str(error), "no connection")

    def test_an_attempt_ends_though_the_agent_has_ten_minutes(self):
        silent = self.server(greet=Connection.hang).url
        with mock.patch("orq_min.CONNECT_SECONDS", 0.3):
            with resolving(*[self.dead()] * 3):
                self.assert_no_connection(silent, 2)
            self.assert_no_connection(silent.replace("http:", "https:"), 2)
            with mock.patch.dict(os.environ, https_proxy=silent):
                self.assert_no_connection("https://localhost:9", 2)

    def test_tunnel_and_handshake_share_the_seconds(self):
        def greet(peer):
            peer.read_request()
            peer.pause(1.2)
            peer.send(head("200 Go Ahead"))
            peer.hang()

        os.environ["https_proxy"] = self.server(greet=greet).url
        with mock.patch("orq_min.CONNECT_SECONDS", 1.5):
            self.assert_no_connection("https://localhost:9", 2.5)

    def test_neither_the_lookup_nor_the_agent_is_bound_by_them(self):
        server = self.server({"delay": 0.5})
        found = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", server.port))

        def look_up(*_, **__):
            time.sleep(0.5)
            return [found]

        with mock.patch("orq_min.CONNECT_SECONDS", 0.3):
            with mock.patch("socket.getaddrinfo", look_up):
                self.assertEqual(self.call(self.client(server)), "You said: hi")


class TheDeadlineBoundsAnAttempt(ServerTest):
    """`timeout_ms` bounds an attempt from connect to last byte, at most 1 s late."""

    def assert_cut_off(self, orq, **given):
        """The failures that this is about would take ten seconds and more."""
        with within(3):
            return self.failure(orq, orq_min.APITimeoutError, **given)

    @staticmethod
    def slowly(start, rest=b""):
        """A step that sends one byte after the other, and then nothing."""

        def step(peer):
            peer.send(start)
            peer.drip(rest)
            peer.hang()

        return step

    LONG = saying("x" * 2000)

    def test_a_server_that_drips_is_cut_off(self):
        in_chunks = head("200 OK", "Transfer-Encoding: chunked")
        drips = {
            "nothing": (b"", b""),
            "the status line": (b"", b"HTTP/1.1 200 " + b"O" * 2000),
            "the header": (b"HTTP/1.1 200 OK\r\n", b"A: b\r\n" * 500),
            "the header of an error": (b"HTTP/1.1 500 No\r\n", b"A: b\r\n" * 500),
            "interim answers": (b"", head("102 Processing") * 100),
            "a body with a length": (head("200 OK", "Content-Length: 9999"), self.LONG),
            "a body without": (head("200 OK"), self.LONG),
            "chunks": (in_chunks, b"1\r\nx\r\n" * 500),
            "a chunk's size": (in_chunks, b"0" * 999),
            "trailers": (chunked(b"{}")[:-2], b"A: b\r\n" * 500),
            "a compressed body": (
                head("200 OK", "Content-Encoding: gzip"),
                gzip.compress(os.urandom(2000)),
            ),
        }
        for name, (start, rest) in drips.items():
            with self.subTest(name):
                server = self.server(self.slowly(start, rest))
                error = self.assert_cut_off(self.client(server, timeout_ms=100))
                self.assertTrue(error.sent)
                until(lambda server=server: server.gone)

    def test_waiting_costs_no_time_of_the_processor(self):
        orq = self.client(self.server(Connection.hang), timeout_ms=600)
        before = time.process_time()
        self.assert_cut_off(orq)
        self.assertLess(time.process_time() - before, 0.4)

    def test_the_body_of_an_error_has_ten_seconds_within_the_deadline(self):
        start = head("401 No", "Content-Length: 9999") + b'{"message": "bad key"'
        for seconds, timeout_ms in ((0.3, 600000), (10, 300)):
            for rest in (b"", b" " * 2000):
                server = self.server(self.slowly(start, rest))
                orq = self.client(server, timeout_ms=timeout_ms)
                with mock.patch("orq_min.ERROR_BODY_SECONDS", seconds), within(3):
                    error = self.failure(orq, orq_min.APIError)
                self.assertEqual(error.status_code, 401)
                self.assertIn("bad key", error.body)
                until(lambda server=server: server.gone)

    def test_a_server_that_reads_slowly_is_cut_off(self):
        for tls in (None, server_context()):
            server = self.server(read_slowly, tls=tls, early=True)
            orq = self.client(server, timeout_ms=300)
            self.assertFalse(self.assert_cut_off(orq, text=LARGE).sent)

    def test_a_stalled_handshake_or_tunnel_is_cut_off(self):
        def drip_tls(peer):  # the start of a record with a ServerHello in it
            peer.drip(b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc" + b"\x03" * 2000)

        def drip_http(peer):
            peer.drip(b"HTTP/1.1 200 " + b"O" * 2000)

        for greet in (Connection.hang, drip_tls, drip_http):
            server = self.server(greet=greet)
            secure = server.url.replace("http:", "https:")
            if greet is drip_http:
                os.environ["https_proxy"] = server.url
            orq = self.client(server, server_url=secure, timeout_ms=100)
            self.assertFalse(self.assert_cut_off(orq).sent)


class CallsCanBeEnded(ServerTest):
    """Ctrl-C ends a program within a second; a cancelled task ends its call."""

    @posix_only
    def test_ctrl_c_ends_a_call_and_a_wait_between_retries(self):
        call = "(agent_key='a', message='hi')"
        codes = (
            "orq.agents.responses.create%s" % call,
            "asyncio.run(orq.agents.responses.create_async%s)" % call,
        )
        later = reply(b"", "429 Slow Down", "Retry-After: 20")
        running = []
        for step in (Connection.hang, later):
            server = self.server(step)
            for code in codes:
                code = "import asyncio, orq_min\norq = orq_min.Orq('k')\n" + code
                running.append(script(code, ORQ_BASE_URL=server.url))
            until(lambda server=server: len(server.requests) == 2)
        time.sleep(0.2)  # until the retries wait
        for process in running:
            with self.subTest(process.args):
                self.assertIsNone(process.poll())
                self.assert_interrupted(process)
                self.assertNotEqual(process.returncode, 0)

    def assert_interrupted(self, process):
        with within(3):
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
        self.assertIn(b"KeyboardInterrupt", err)
        self.assertNotIn(b"Exception ignored", err)

    @posix_only
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
        self.assert_interrupted(process)

    def cancel(self, orq, arrived):
        """Cancel a call when this has come true, and see what stays behind."""

        async def call_and_cancel():
            create = orq.agents.responses.create_async
            task = asyncio.ensure_future(create(agent_key="a", message="hi"))
            while not arrived():
                await asyncio.sleep(0.01)
            with within(1), self.assertRaises(asyncio.CancelledError):
                task.cancel()
                await task

        before = set(threading.enumerate())
        asyncio.run(call_and_cancel())

        def added():
            threads = set(threading.enumerate()) - before
            return [one for one in threads if one.name != "stand-in"]

        until(lambda: not added())

    def test_a_cancelled_task_ends_at_once_and_so_do_its_thread_and_connection(self):
        endless = {"headers": {"Content-Length": "9999"}, "body": b"{"}
        wait = reply(b"", "429 Slow Down", "Retry-After-Ms: 5000")
        for step in (Connection.hang, endless, dict(endless, status=500), wait):
            for tls in (None, server_context()):
                server = self.server(step, tls=tls)
                orq = self.client(server, retry_config=AT_ALL_COSTS)
                self.cancel(orq, lambda server=server: server.requests)
                if step is not wait:
                    until(lambda server=server: server.gone == [0])
                self.assertEqual(len(server.requests), 1)

    def test_a_cancelled_task_stops_connecting(self):
        server = self.server(greet=Connection.hang, tls=server_context())
        self.cancel(self.client(server), lambda: server.peers)
        until(lambda: server.gone == [0])
        with full_backlog() as address, resolving(address):
            soon = iter([False] * 9)
            self.cancel(self.client(server), lambda: next(soon, True))


class TimeLimit(Exception):
    """What a signal's handler raises: Celery and RQ have such classes."""


@posix_only
class OnlyTheNetworksFailuresAreOurs(ServerTest):
    """Any other exception leaves a call as it is, and no attempt follows it."""

    def raised(self, orq, exception, **given):
        """What a call raises where a signal's handler raises this."""

        def handler(*_):
            raise exception

        before = signal.signal(signal.SIGALRM, handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.15)
            with within(3), self.assertRaises(Exception) as caught:
                self.call(orq, retries=AT_ALL_COSTS, **given)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        return caught.exception

    def in_each_place(self):
        """Where the signal may find a call: (server, what to call)."""
        endless = {"Content-Length": "9999"}
        slow = reply(b"", "429 Slow Down", "Retry-After: 20")
        silent, hang = self.server(greet=Connection.hang), Connection.hang
        secure = {"server_url": silent.url.replace("http:", "https:")}
        yield "an answer", self.server(hang), {}
        yield "an answer over TLS", self.server(hang, tls=server_context()), {}
        yield "a body", self.server({"headers": endless, "body": b"{"}), {}
        error = {"status": 500, "headers": endless, "body": b"{"}
        yield "the body of an error", self.server(error), {}
        yield "sending", self.server(read_slowly, early=True), {"text": LARGE}
        yield "a wait", self.server(slow), {}
        yield "a handshake", silent, secure
        with mock.patch.dict(os.environ, https_proxy=silent.url):
            yield "a tunnel", silent, secure
        with full_backlog() as address, resolving(address):
            yield "connecting", self.server(), {}

    def assert_ended(self, exception, *classes):
        for place, server, given in self.in_each_place():
            with self.subTest(place):
                peers = server.connections
                error = self.raised(self.client(server), exception, **given)
                self.assertIsInstance(error, classes)
                assert_no_local_holds(server.key, error)
                self.assertLessEqual(len(server.requests), 1)
                self.assertLessEqual(server.connections, peers + 1)
                if place != "a wait":
                    until(lambda server=server: len(server.gone) == server.connections)

    def test_what_a_signals_handler_raises_ends_the_call(self):
        self.assert_ended(TimeLimit("over"), TimeLimit)

    def test_a_time_out_that_a_signals_handler_raises_ends_the_call(self):
        """Which is the most common recipe, and the class of socket.timeout."""
        self.assert_ended(TimeoutError("over"), TimeoutError, orq_min.APITimeoutError)

    def test_what_forbids_sockets_is_heard(self):
        """pytest-socket replaces the class in this way."""
        made = []

        class Guarded(socket.socket):
            def __new__(cls, *given, **more):
                made.append(given)
                raise TimeLimit("sockets are forbidden")

        orq = self.client(self.server())
        with mock.patch("socket.socket", Guarded), self.assertRaises(TimeLimit):
            self.call(orq, retries=AT_ALL_COSTS)
        self.assertEqual(len(made), 1)

    def test_what_is_raised_after_the_answer_is_never_followed_by_an_attempt(self):
        original = urllib.request.OpenerDirector.open
        for failure in (TimeLimit, ConnectionError, ValueError, socket.timeout):

            def fail_late(opener, *given, failure=failure, **more):
                original(opener, *given, **more)
                raise failure("after the answer")

            server = self.server()
            orq = self.client(server)
            with mock.patch.object(urllib.request.OpenerDirector, "open", fail_late):
                with self.assertRaises(failure):
                    self.call(orq, retries=AT_ALL_COSTS)
            self.assertEqual(len(server.requests), 1, failure)


class Tracer:
    """Wraps all openers as tracing libraries do, and keeps whatever it can see."""

    PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

    def __enter__(self):
        self.statuses, self.seen = [], []
        original = urllib.request.OpenerDirector.open

        def traced(opener, request, data=None, timeout=None):
            self.look(request)
            request.headers.update(traceparent=self.PARENT, Host="of.the.tracer")
            try:
                result = original(opener, request, data=data, timeout=timeout)
            except Exception as error:
                self.seen += [texts_of(error), repr(vars(error))]
                raise
            self.look(request)
            self.statuses.append(result.getcode())
            self.seen.append("%r %s %s" % (result, result.version, result.geturl()))
            return result

        opener = urllib.request.OpenerDirector
        self.patch = mock.patch.object(opener, "open", traced)
        self.patch.start()
        return self

    def look(self, request):
        items = request.headers, request.header_items(), vars(request)
        self.seen += [repr(items), request.get_full_url(), request.get_method()]

    def __exit__(self, *exception):
        self.patch.stop()


class TracersSeeNoKey(ServerTest):
    """Calls work under OpenTelemetry and its like, which learn nothing secret."""

    def test_each_call_works_is_sent_once_and_has_its_status(self):
        server = self.server(repeat_text, {"status": 404}, repeat_text)
        with Tracer() as tracer:
            orq = self.client(server, retry_config=AT_ALL_COSTS)
            said = [self.outcome(orq) for _ in range(3)]
        self.assertEqual([said[0], said[1].status_code, said[2]], ["hi", 404, "hi"])
        self.assertEqual(tracer.statuses, [200, 404, 200])
        self.assertEqual(server.on, [0, 0, 0])

    def test_its_header_is_sent_once_in_place_of_the_callers(self):
        server = self.server()
        headers = {"TraceParent": "mine", "x-other": "1"}
        with Tracer():
            self.call(self.client(server), http_headers=headers)
        (request,) = server.requests
        self.assertEqual(request.header("traceparent"), [Tracer.PARENT])
        self.assertEqual(request.header("x-other"), ["1"])
        self.assertEqual(request.header("host"), [server.netloc])

    def test_the_key_is_in_nothing_that_it_sees(self):
        key = b"test-key-123"
        for answer in (
            reply("hi"),
            reply(key, "401 No"),
            key + b"\r\n\r\n",
            b"HTTP/1.1 " + key + b"\r\n\r\n",
            head("200 OK", "Transfer-Encoding: chunked") + key + b"\r\n",
            reply(key, "200 OK", "Content-Encoding: gzip"),
        ):
            with self.subTest(answer), Tracer() as tracer:
                self.outcome(self.client(self.server(then_close(answer))))
                self.assertGreater(len(tracer.seen), 3)
                self.assertNotIn("test-key-123", "\n".join(tracer.seen))

    def test_a_proxys_password_and_tunnel_are_none_of_its_business(self):
        server, proxy = self.server(tls=server_context()), self.enter(Proxy("me:pass"))
        os.environ["https_proxy"] = "http://me:pass@" + proxy.netloc
        with Tracer() as tracer:
            self.assertEqual(self.call(self.client(server)), "hi")
        self.assertEqual(tracer.statuses, [200])
        self.assertEqual(server.requests[0].header("traceparent"), [Tracer.PARENT])
        self.assertEqual(proxy.requests[0].header("traceparent"), [])

    def test_opentelemetry(self):
        try:
            from opentelemetry.instrumentation.urllib import URLLibInstrumentor
            from opentelemetry.sdk import trace
            from opentelemetry.sdk.trace.export import SimpleSpanProcessor
            from opentelemetry.sdk.trace.export.in_memory_span_exporter import (
                InMemorySpanExporter,
            )
        except ImportError:
            self.skipTest("opentelemetry-instrumentation-urllib is not installed")
        exporter, provider = InMemorySpanExporter(), trace.TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        server = self.server(repeat_text, {"status": 404}, hang_up, repeat_text)
        orq = self.client(server, retry_config=orq_min.RetryConfig(backoff=SOON))
        URLLibInstrumentor().instrument(
            tracer_provider=provider,
            captured_request_headers=[".*"],
            captured_response_headers=[".*"],
        )
        try:
            outcomes = [self.outcome(orq) for _ in range(4)]
        finally:
            URLLibInstrumentor().uninstrument()
        self.assertEqual((outcomes[0], outcomes[3]), ("hi", "hi"))
        spans = exporter.get_finished_spans()
        statuses = [span.attributes.get("http.status_code") for span in spans]
        self.assertEqual(statuses, [200, 404, None, 200])
        shown = "".join(span.to_json() for span in spans)
        self.assertNotIn("test-key-123", shown)
        parents = [request.header("traceparent") for request in server.requests]
        self.assertEqual([len(parent) for parent in parents], [1] * 4)


@contextlib.contextmanager
def clocks_that_say(now):
    with mock.patch("time.time", now), mock.patch("time.monotonic", now):
        with mock.patch("time.perf_counter", now):
            yield


class NoClockMisleads(ServerTest):
    """Waits and deadlines hold, whatever a test does to the clocks and to sleep."""

    @staticmethod
    def clocks():
        """(name, context in which the clocks are wrong), for each way to do that."""
        jumps = itertools.count(1e6, 1e4)
        yield "frozen", clocks_that_say(lambda: 1e6)
        yield "running", clocks_that_say(lambda: next(jumps))
        with contextlib.suppress(ImportError):
            import freezegun

            yield "freezegun", freezegun.freeze_time("2030-01-01")
            yield "freezegun, ticking", freezegun.freeze_time("2030-01-01", tick=True)
        with contextlib.suppress(ImportError):
            import time_machine

            yield "time-machine", time_machine.travel("2030-01-01", tick=False)

    def test_retries_end_though_nothing_waits(self):
        """A patched time.sleep is a common fixture; there were 91,335 requests."""
        soon = orq_min.RetryConfig(backoff=orq_min.BackoffStrategy(20, 20, 1, 70))
        for name, clock in (("right", contextlib.ExitStack()), *self.clocks()):
            server = self.server(reply(b"", "429 Slow Down", "Retry-After: 8"))
            orq = self.client(server, retry_config=orq_min.UNSET)
            again = self.server(reply(b"", "429 Slow Down"))
            create_async = self.client(again).agents.responses.create_async
            with self.subTest(name), within(9), clock, mock.patch("time.sleep"):
                self.failure(orq, orq_min.APIError)
                with self.assertRaises(orq_min.APIError):
                    call = create_async(agent_key="a", message="hi", retries=soon)
                    asyncio.run(call)
            self.assertEqual(len(server.requests), 4, name)
            self.assertLessEqual(len(again.requests), 6, name)

    def test_a_call_neither_ends_early_nor_stays_alive(self):
        for name, clock in self.clocks():
            server = self.server({"delay": 0.3})
            orq = self.client(server)
            silent = self.client(self.server(Connection.hang), timeout_ms=300)
            create = orq.agents.responses.create_async
            with self.subTest(name), within(9), clock:
                self.assertEqual(self.call(orq), "You said: hi")
                answer = asyncio.run(create(agent_key="my-agent", message="async"))
                self.assertEqual(answer.text, "You said: async")
                self.assertEqual(server.on, [0, 0])
                self.failure(silent, orq_min.APITimeoutError)


class AnswersAreBounded(ServerTest):
    """An answer is read whole or not at all; one that is too large is an APIError."""

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
                orq = self.client(self.server(answer))
                with mock.patch("orq_min.MAX_ANSWER_BYTES", len(large) - 1):
                    error = self.failure(orq, orq_min.APIError)
                    self.assertRegex(str(error), "larger than")
                    self.assertFalse(error.body)
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

        server = self.server(endless)
        with mock.patch("orq_min.MAX_ANSWER_BYTES", 100000):
            self.failure(self.client(server), orq_min.APIError)
        until(lambda: server.gone == [0])
        self.assertLess(sum(sent), 60e6)  # what sockets buffer, and not all

    def test_compressed_answers_are_decoded_though_not_asked_for(self):
        packed = gzip.compress(saying("packed"))
        for coding in ("gzip", "GZIP", "x-gzip", "gzip ", "identity, gzip"):
            with self.subTest(coding):
                header = "Content-Encoding: " + coding
                answers = reply(packed, "200 OK", header), chunked(packed, header)
                server = self.server(*answers)
                orq = self.client(server)
                self.assertEqual([self.call(orq), self.call(orq)], ["packed"] * 2)
                asked = server.requests[0].header("accept-encoding")
                self.assertNotIn("gzip", "".join(asked))

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
                server = self.server(reply(body, "200 OK", "Content-Encoding: gzip"))
                error = self.failure(self.client(server), orq_min.APIConnectionError)
                self.assertTrue(error.sent)

    def test_an_error_whose_body_breaks_off_keeps_its_status_and_what_was_read(self):
        body = json.dumps({"message": "Busy", "more": "x" * 99}).encode()
        is_gzip = "Content-Encoding: gzip"
        broken = {
            "a length": reply(body, "%d No")[:-3],
            "chunks": chunked(body, status="%d No", size=9)[:-9],
            "gzip": reply(gzip.compress(body)[:-4], "%d No", is_gzip),
            "no gzip": reply(body, "%d No", is_gzip),
        }
        for status in (401, 429):
            for name, data in broken.items():
                with self.subTest(name, status=status):
                    data = data.replace(b"%d", b"%d" % status)
                    server = self.server(then_close(data), repeat_text)
                    orq = self.client(server)
                    error = self.failure(orq, orq_min.APIError)
                    self.assertEqual(error.status_code, status)
                    self.assertIn("Busy", error.body)
                    self.assertEqual(self.call(orq), "hi")
                    self.assertEqual(server.on, [0, 1])


class NoRedirectIsFollowed(ServerTest):
    """The key goes to one place: a redirect is an error that says where it points."""

    def redirected(self, status, place):
        server = self.server(reply(b"", "%d X" % status, "Location: " + place))
        orq = self.client(server, retry_config=AT_ALL_COSTS)
        error = self.failure(orq, orq_min.APIError)
        self.assertEqual(error.status_code, status)
        self.assertEqual(len(server.requests), 1)
        return str(error)

    def test_each_is_an_error_that_names_its_target_and_server_url(self):
        other = self.server()
        for place in (other.url + "/x?y=z", "/elsewhere", "//h/x", "ftp://h/x"):
            for status in (300, 301, 302, 303, 305, 306, 307, 308):
                with self.subTest(place, status=status):
                    text = self.redirected(status, place)
                    self.assertIn(place.lstrip("/"), text)
                    self.assertIn("server_url", text)
        self.assertEqual(other.connections, 0)

    def test_a_user_and_a_password_in_it_are_not_shown(self):
        for place in ("http://me:sesame@h/x", "//me:sesame@h/x", "http://me:sesame@h"):
            text = self.redirected(307, place)
            self.assertNotIn("sesame", text)
            self.assertIn("h", text.partition("307")[2])

    def test_a_target_that_is_no_url_or_is_missing_does_no_harm(self):
        bad = "http://[|//[::1|http://[x]/|http://a:b:c/|http:// /|\\\\x|a\tb://| ||"
        bad += "|http://\xe9.example/|http://%s/" % ("a" * 70)
        for place in bad.split("|"):
            for status in (302, 307):
                with self.subTest(place, status=status):
                    self.redirected(status, place)


class ProxiesTunnel(ServerTest):
    """Proxies come from the environment; the key passes only inside their tunnels."""

    def through(self, proxy, server, userinfo="", **options):
        url = "http://%s%s" % (userinfo and userinfo + "@", proxy.netloc)
        os.environ["https_proxy"] = os.environ["http_proxy"] = url
        return self.client(server, **options)

    def test_https_is_tunnelled_with_the_key_inside_alone(self):
        users = {"": "", "me:sesame": "me:sesame", "me:p%40ss%2Fw%3Ard": "me:p@ss/w:rd"}
        for userinfo, credentials in users.items():
            with self.subTest(userinfo):
                server = self.server(tls=server_context())
                proxy = self.enter(Proxy(credentials))
                orq = self.through(proxy, server, userinfo)
                self.assertEqual([self.call(orq, "a"), self.call(orq, "b")], ["a", "b"])
                (connect,) = proxy.requests  # for one connection
                self.assertEqual(connect[:2], ("CONNECT", server.netloc))
                self.assertEqual(connect.header("host"), [server.netloc])
                given = connect.header("proxy-authorization")
                self.assertEqual(len(given), 1 if userinfo else 0)
                self.assertNotIn("test-key-123", str(connect))
                self.assertNotIn(b"test-key-123", proxy.passed)
                self.assertGreater(len(proxy.passed), 1000)
                for request in server.requests:
                    sent = request.header("authorization")
                    self.assertEqual(sent, ["Bearer test-key-123"])
                    self.assertEqual(request.header("proxy-authorization"), [])
                    self.assertEqual(request.path, "/v2/agents/my-agent/responses")

    def test_an_ipv6_server_is_tunnelled_to(self):
        try:
            server = self.server(tls=server_context(), host="::1")
        except OSError as error:
            self.skipTest("no IPv6 here: %s" % error)
        self.assertEqual(self.call(self.client(server), "direct"), "direct")
        proxy = self.enter(Proxy())
        self.assertEqual(self.call(self.through(proxy, server), "hi"), "hi")
        self.assertEqual(proxy.requests[0].path, server.netloc)

    def test_plain_http_goes_through_a_proxy_too(self):
        server, proxy = self.server(), self.enter(Proxy("me:sesame"))
        orq = self.through(proxy, server, "me:sesame")
        self.assertEqual([self.call(orq, "a"), self.call(orq, "b")], ["a", "b"])
        self.assertEqual([r.method for r in proxy.requests], ["POST", "POST"])
        for request in server.requests:
            self.assertEqual(request.header("proxy-authorization"), [])
            self.assertEqual(request.header("host"), [server.netloc])
            self.assertEqual(request.path, "/v2/agents/my-agent/responses")

    def test_no_proxy_is_obeyed(self):
        server, proxy = self.server(), self.enter(Proxy())
        for no_proxy, used in (("127.0.0.1", 0), ("*", 0), ("elsewhere.invalid", 1)):
            os.environ["no_proxy"] = no_proxy
            self.assertEqual(self.call(self.through(proxy, server)), "hi")
            self.assertEqual(len(proxy.requests), used, no_proxy)

    def refused(self, orq, *words, **given):
        """A failure that is the proxy's, and lets its password show nowhere."""
        error = self.failure(orq, orq_min.APIConnectionError, **given)
        self.assertFalse(error.sent)
        text = texts_of(error) + repr(vars(error))
        self.assertNotIn("swordfish", text)
        self.assertNotIn(base64.b64encode(b"me:swordfish").decode(), text)
        for word in words:
            self.assertIn(word, str(error))
        return error

    def test_a_proxy_that_refuses_is_named_with_its_status_and_not_asked_again(self):
        words = b"Basic " + base64.b64encode(b"me:swordfish") + b" swordfish"
        refusals = {
            407: b"",  # asks for other credentials
            403: reply(words, "403 swordfish"),
            503: reply(words, "503 Busy", "Retry-After: 0"),
            302: reply(words, "302 Found", "Location: http://127.0.0.1:9/"),
            101: head("101 Switching Protocols"),
        }
        for tls in (None, server_context()):
            for status, refusal in refusals.items():
                if tls or status == 407:  # any other may be the server's
                    with self.subTest(status, tls=bool(tls)):
                        server = self.server(tls=tls)
                        proxy = self.enter(Proxy("me:sesame", refusal))
                        orq = self.through(proxy, server, "me:swordfish")
                        words = str(status), "(proxy %s)" % proxy.netloc
                        self.refused(orq, *words, retries=AT_ALL_COSTS)
                        self.assertEqual((len(proxy.requests), server.peers), (1, []))

    def test_a_407_without_a_proxy_is_an_answer_of_the_server(self):
        server = self.server(reply(b'{"message": "who are you"}', "407 Who"))
        error = self.failure(self.client(server), orq_min.APIError)
        self.assertEqual((error.status_code, error.message), (407, "who are you"))

    def test_a_proxy_of_another_kind_is_named_and_gets_nothing(self):
        other, server = self.server(), self.server()
        for kind in ("socks5", "socks5h", "socks4"):
            os.environ["http_proxy"] = "%s://me:swordfish@%s" % (kind, other.netloc)
            orq = self.client(server, retry_config=AT_ALL_COSTS)
            self.assertFalse(self.refused(orq, kind + " ").temporary)
        self.assertEqual((other.peers, server.peers), ([], []))

    def test_a_bad_proxy_is_an_error_that_does_not_show_the_password(self):
        server = self.server(tls=server_context())
        nobody = closed_url().partition("//")[2]
        places = "http://me:swordfish@%s me:swordfish@%s //me:swordfish@%s"
        places += " http:me:swordfish@%s http:/me:swordfish@%s socks5://me:swordfish@%s"
        urls = places.replace("%s", nobody).split() + ["me:swordfish@x://" + nobody]
        for bad in ("", "127.0.0.1:99999", "127.0.0.1:port", "[::1", "no..where:1"):
            urls.append("http://me:swordfish@" + bad)
        for url in urls:
            for server_url in (server.url, "http://127.0.0.1:9"):
                with self.subTest(url, server_url=server_url):
                    os.environ["https_proxy"] = os.environ["http_proxy"] = url
                    orq = self.client(server, timeout_ms=1000)
                    self.refused(orq, "prox", server_url=server_url)
        secret = base64.b64encode(b"me:swordfish")
        nonsense = (
            b"HTTP/1.1 200",
            b"nonsense\r\n\r\n",
            head("200 OK"),
            secret + b"\r\n",
        )
        for answer in (*nonsense, b"HTTP/1.1 " + secret + b"\r\n\r\n"):
            with self.subTest(answer):
                proxy = self.server(then_close(answer))
                self.refused(self.through(proxy, server, "me:swordfish"), "proxy")

    def test_what_a_proxy_says_before_tls_is_not_taken_for_the_answer(self):
        server = self.server(tls=server_context())
        proxy = self.enter(Proxy(greeting=head("200 Go Ahead") + FORGED))
        got = self.outcome(self.through(proxy, server))
        self.assertTrue(got == "hi" or isinstance(got, orq_min.OrqError), got)


class CertificatesAreVerified(ServerTest):
    """Certificates and host names are verified, and a failure says what to do."""

    def setUp(self):
        super().setUp()
        self.secure = self.server(tls=server_context())

    def assert_refused(self, words, tls, helps=False, **options):
        """At once, and in these words; SSL_CERT_FILE is named where it `helps`."""
        server = self.server(tls=tls)
        orq = self.client(server, retry_config=AT_ALL_COSTS, **options)
        error = self.failure(orq, orq_min.APIConnectionError)
        self.assertEqual((error.sent, error.temporary), (False, False))
        self.assertRegex(str(error), words)
        self.assertEqual("SSL_CERT_FILE" in str(error), helps, error)
        self.assertNotIn("\n", str(error))
        self.assertEqual((server.connections, server.requests), (1, []))

    def test_what_is_wrong_with_a_certificate_is_said(self):
        proxy = self.enter(Proxy())
        for through in ("", proxy.url):  # a tunnel
            os.environ["https_proxy"] = through
            unknown = {"helps": True, "ssl_context": None}
            self.assert_refused("certificate", server_context(), **unknown)
            self.assert_refused("certificate.*127.0.0.1", server_context(ELSEWHERE))
            self.assert_refused("certificate.*expired", server_context(EXPIRED))
        self.assertEqual(len(proxy.requests), 3)

    def test_each_name_in_the_certificate_is_accepted(self):
        for host in ("localhost", "127.0.0.1", "LOCALHOST"):
            url = "https://%s:%d" % (host, self.secure.port)
            self.assertEqual(self.call(self.client(self.secure), server_url=url), "hi")

    def test_the_name_in_the_url_is_the_one_that_is_checked(self):
        self.secure.tls = server_context(ELSEWHERE)
        orq = self.client(self.secure)
        with resolving(("127.0.0.1", self.secure.port)):
            url = "https://elsewhere.invalid:%d" % self.secure.port
            self.assertEqual(self.call(orq, server_url=url), "hi")

    def test_the_context_of_the_caller_is_used(self):
        lax = ssl.create_default_context()
        lax.check_hostname = False
        lax.verify_mode = ssl.CERT_NONE
        given = {"api_key": "k", "server_url": self.secure.url}
        for context in (trusting_context(), lax):
            orq = self.client(self.secure, ssl_context=context)
            self.assertEqual(self.call(orq), "hi")
            answer = orq_min.create_response("a", "b", ssl_context=context, **given)
            self.assertEqual(answer.text, "b")

    def test_another_protocol_version_or_cipher_is_said_in_words(self):
        plain = self.server()
        ssh = self.server(greet=then_close(b"SSH-2.0-OpenSSH_9.6\r\n"))
        alert = self.server(greet=then_close(b"\x15\3\1\0\2\2\x2a"))
        no_tls = "not speak TLS"
        for server, words in (
            (plain, no_tls),
            (ssh, no_tls),
            (alert, "refused the TLS"),
        ):
            url = server.url.replace("http:", "https:")
            error = self.failure(self.client(self.secure, server_url=url))
            self.assertIn(words, str(error))
            self.assertNotRegex(str(error), "[A-Z]_[A-Z]|_ssl.c")
        self.assertEqual(plain.requests, [])
        old, ours, same = server_context(), trusting_context(), trusting_context()
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        old.set_ciphers("ECDHE-ECDSA-AES256-GCM-SHA384")
        ours.minimum_version = ssl.TLSVersion.TLSv1_3
        same.set_ciphers("ECDHE-ECDSA-AES128-GCM-SHA256")
        for context in (ours, same):
            self.assert_refused("no TLS.* in common", old, ssl_context=context)


class TheAuthoritiesOfTheEnvironment(ServerTest):
    """SSL_CERT_FILE and SSL_CERT_DIR are used, and named where they are wrong."""

    def setUp(self):
        super().setUp()
        self.secure = self.server(tls=server_context())
        self.folder = self.enter(tempfile.TemporaryDirectory())
        self.authority = self.write("e5c6d7d4.0", AUTHORITY)  # the hash of its subject

    def write(self, name, text):
        path = os.path.join(self.folder, name)
        pathlib.Path(path).write_text(text, "ascii")
        return path

    def say_hi(self, **environment):
        """What a call of a new client comes to where these variables are set."""
        with mock.patch.dict(os.environ, environment):
            return self.outcome(self.client(self.secure, ssl_context=None))

    def test_they_are_used(self):
        directories = os.pathsep.join([self.folder + "/none", self.folder])
        both = {"SSL_CERT_DIR": "", "SSL_CERT_FILE": self.authority}
        self.assertEqual(self.say_hi(**both), "hi")
        self.assertEqual(self.say_hi(SSL_CERT_FILE=self.authority), "hi")
        self.assertEqual(self.say_hi(SSL_CERT_DIR=directories), "hi")

    def test_what_cannot_be_used_is_refused_by_its_name_before_anything_is_sent(self):
        file, none = self.authority, self.folder + "/none"
        bad = {
            "SSL_CERT_FILE": (
                none,
                self.folder,
                self.write("empty.pem", ""),
                self.write("no.pem", "<html>not found</html>\n"),
                self.write("cut.pem", AUTHORITY[:200]),
            ),
            "SSL_CERT_DIR": (none, os.pathsep.join([none, file])),
        }
        for name, values in bad.items():
            for value in values:
                with self.subTest(value):
                    error = self.say_hi(**{name: value})
                    self.assertIsInstance(error, orq_min.ValidationError)
                    self.assertEqual([path for path, _ in error.errors], [name])
        self.assertEqual(self.secure.connections, 0)

    def test_a_call_that_does_not_need_them_does_not_look(self):
        plain = self.server()
        with mock.patch.dict(os.environ, SSL_CERT_FILE="/none", SSL_CERT_DIR="/none"):
            self.assertEqual(self.call(self.client(plain, ssl_context=None)), "hi")
            self.assertEqual(self.call(self.client(self.secure)), "hi")
        error = self.say_hi(SSL_CERT_FILE="", SSL_CERT_DIR="")
        self.assertIsInstance(error, orq_min.APIConnectionError)

    def contexts(self, change=lambda context: None):
        """The list of the contexts that are made from now on, and changed so."""
        made, original = [], ssl.create_default_context

        def make(*given, **more):
            made.append(original(*given, **more))
            change(made[-1])
            return made[-1]

        patch = mock.patch("ssl.create_default_context", make)
        patch.start()
        self.addCleanup(patch.stop)
        return made

    def test_a_company_authority_that_is_not_strict_is_accepted(self):
        """Python 3.13 sets VERIFY_X509_STRICT; nobody who names a file wants that."""

        def as_in_3_13(context):
            context.verify_flags |= ssl.VERIFY_X509_STRICT

        made = self.contexts(as_in_3_13)
        lax = self.write("lax.pem", LAX_AUTHORITY)
        self.assertEqual(self.say_hi(SSL_CERT_FILE=lax), "hi")
        self.say_hi()
        self.assertTrue(made[-1].verify_flags & ssl.VERIFY_X509_STRICT)

    def test_no_tls_below_1_2_is_spoken(self):
        def as_in_3_9(context):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                context.minimum_version = ssl.TLSVersion.TLSv1_1

        made = self.contexts(as_in_3_9)
        self.assertEqual(self.say_hi(SSL_CERT_FILE=self.authority), "hi")
        self.assertGreaterEqual(made[0].minimum_version, ssl.TLSVersion.TLSv1_2)

    def test_the_context_is_made_once_and_when_needed(self):
        self.secure.then = reply("fine", "200 OK", "Connection: close")
        made = self.contexts()
        os.environ["SSL_CERT_FILE"] = self.authority
        orq = self.client(self.secure, ssl_context=None)
        self.call(orq, server_url=self.server().url)
        self.assertEqual(len(made), 0)
        gate = threading.Barrier(8, timeout=20)  # none of them has proven it yet
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            got = pool.map(lambda _: gate.wait() >= 0 and self.call(orq), range(8))
            self.assertEqual(set(got), {"fine"})
        self.assertEqual(self.call(orq), "fine")
        self.assertEqual((len(made), self.secure.connections), (1, 9))

    def test_it_is_kept_only_once_a_handshake_has_succeeded(self):
        os.environ["SSL_CERT_FILE"] = self.write("mine.pem", ELSEWHERE)
        orq = self.client(self.secure, ssl_context=None)
        self.assertIn("certificate", str(self.failure(orq)))
        self.write("mine.pem", AUTHORITY)
        self.assertEqual(self.call(orq), "hi")

    @posix_only
    def test_a_process_short_of_file_descriptors_has_a_passing_fault(self):
        code = """
            import os, resource, orq_min
            def call(orq):
                try:
                    return orq.agents.responses.create(agent_key="a", message="hi").text
                except orq_min.OrqError as error:
                    return type(error).__name__
            assert call(orq_min.Orq("k")) == "hi"  # all modules are loaded
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, limit))
            for free in range(4):
                orq, held = orq_min.Orq("k", retry_config=None), []
                try:
                    while True:
                        held.append(os.open(os.devnull, os.O_RDONLY))
                except OSError:
                    for _ in range(free):
                        os.close(held.pop())
                said = call(orq)
                for one in held:
                    os.close(one)
                print(said, call(orq))
                orq.close()
        """
        env = {"ORQ_BASE_URL": self.secure.url, "SSL_CERT_FILE": self.authority}
        out, err = script(code, **env).communicate(timeout=30)
        self.assertEqual(err.decode(), "")
        lines = out.decode().splitlines()
        self.assertEqual(lines[0], "APIConnectionError hi")
        self.assertLessEqual(set(lines), {"APIConnectionError hi", "hi hi"})
        self.assertEqual(len(lines), 4)


class TheKeyIsInNoText(ServerTest):
    """A key that a server echoes is masked in whatever we say."""

    KEY = "sk-/+\"'\\key~\xe9 %41"

    def ways_to_echo(self, key):
        data = key.encode("latin-1")
        as_json = json.dumps({"message": "bad key " + key}).encode()
        as_json_8 = json.dumps({"error": key}, ensure_ascii=False).encode()
        nested = {"message": "no", "errors": [{"path": key, "message": key}]}
        quoted = urllib.parse.quote(key, safe="")
        in_chunks = head("200 OK", "Transfer-Encoding: chunked")
        is_gzip, packed = "Content-Encoding: gzip", gzip.compress(data)
        return {
            "a JSON body": reply(as_json, "401 No"),
            "a JSON body in UTF-8": reply(as_json_8, "401 No"),
            "details in JSON": reply(json.dumps(nested).encode(), "422 No"),
            "JSON without words": reply(json.dumps({"odd": key}).encode(), "400 No"),
            "a text body": reply(b"<b>" + key.encode() + b"</b>", "403 No"),
            "a quoted body": reply(quoted.encode(), "403 No"),
            "a body that breaks off": reply(data, "500 No")[:-2],
            "a 200 that is no object": reply(json.dumps([key]).encode()),
            "the phrase": reply(b"", "401 " + key),
            "a header": reply(b"", "401 No", "X-Request-Id: " + key),
            "a status line that is none": data + b"\r\n\r\n",
            "a version": b"HTTP/" + data + b" 200 OK\r\n\r\n",
            "a status": b"HTTP/1.1 " + data + b" OK\r\n\r\n",
            "a length": head("200 OK", "Content-Length: " + key) + b"[]",
            "a chunk's size": in_chunks + b"1\r\n{\r\n" + data + b"\r\n",
            "a trailer": chunked(b"[]")[:-2] + b"X: " + data + b"\r\n\r\n",
            "a coding": reply(b"x", "200 OK", "Content-Encoding: " + key),
            "no gzip": reply(data, "200 OK", is_gzip),
            "gzip broken off": reply(packed[:-4], "200 OK", is_gzip),
            "an error in gzip": reply(packed[:-4], "400 No", is_gzip),
            "a target": reply(b"", "302 X", "Location: http://h/?k=" + key),
            "a quoted target": head("302 X", "Location: /?" + quoted),
            "credentials": reply(b"", "307 X", "Location: http://u:%s@h/" % quoted),
            "a retried status": reply(as_json, "429 " + key),
        }

    def assert_masked(self, key, error, records):
        texts = {
            "error": texts_of(error),
            "pickled": texts_of(pickle.loads(pickle.dumps(error))),
            "log": "\n".join(record.getMessage() for record in records),
        }
        self.assertIn(": ", texts["log"], "no log")
        for form in (key, urllib.parse.quote(key, safe="")):
            for escaped in (form, repr(form)[1:-1], json.dumps(form)[1:-1]):
                for name, text in texts.items():
                    self.assertNotIn(escaped, text, name)
        assert_no_local_holds(key, error)

    def test_an_echoed_key_is_masked(self):
        again = orq_min.BackoffStrategy(1, 1, 1, max_elapsed_time=8)
        policy = orq_min.RetryConfig("backoff", again, True)
        for key in ("test-key-123", self.KEY):
            for where, answer in self.ways_to_echo(key).items():
                with self.subTest(where, key=key), logged() as records:
                    server = self.server(then_close(answer))
                    orq = self.client(server, api_key=key, retry_config=policy)
                    agent = key if where == "a JSON body" else "a"  # mistaken for it
                    error = self.failure(orq, agent_key=agent)
                    self.assert_masked(key, error, records)
                    self.assertNotIn(key, repr(orq) + repr(vars(orq)))

    def test_a_key_that_a_proxy_echoes_is_masked(self):
        server = self.server(tls=server_context())
        status = b"HTTP/1.1 test-key-123 x\r\n\r\n"
        for answer in (reply(b"test-key-123", "403 test-key-123"), status):
            os.environ["https_proxy"] = self.server(then_close(answer)).url
            with logged() as records:
                error = self.failure(self.client(server), orq_min.APIConnectionError)
            self.assert_masked("test-key-123", error, records)

    def test_the_body_of_an_error_stays_as_it_came(self):
        body = b'{"message": "the key test-key-123 is bad"}'
        error = self.failure(self.client(self.server(reply(body, "401 No"))))
        self.assertEqual(error.body, body.decode())
        self.assertIn("the key *** is bad", str(error))
        self.assertEqual(error.message, "the key *** is bad")

    def test_an_empty_authorization_leaves_the_text_as_it_is(self):
        orq = self.client(self.server(reply(b"no key", "401 No")))
        error = self.failure(orq, http_headers={"Authorization": ""})
        self.assertTrue(str(error).endswith("401 Unauthorized: no key"), error)

    def test_a_large_error_of_almost_the_key_does_not_stop_the_program(self):
        key = "sk-%s" % "-".join(["._~ab"] * 8)
        server = self.server(reply(key[:-1].encode() * 200000, "500 No"))
        with within(9):  # it took a minute
            self.failure(self.client(server, api_key=key), orq_min.APIError)

    def test_no_local_variable_shows_it(self):
        key, closed = "test-key-123", closed_url()
        secure, plain = self.server(tls=server_context()).url, self.server().url

        def create(server_url=plain, ssl_context=None, **given):
            options = {"server_url": server_url, "ssl_context": ssl_context}
            with orq_min.Orq(key, retry_config=None, **options) as orq:
                self.call(orq, **given)

        def create_async():
            orq = orq_min.Orq(lambda: key, server_url=closed, retry_config=None)
            call = orq.agents.responses.create_async(agent_key="a", message="b")
            asyncio.run(call)

        once = functools.partial(orq_min.create_response, "a", "b", api_key=key)
        calls = (
            *(lambda url=url: create(url) for url in (closed, secure, "nonsense", 5)),
            lambda: create(plain.replace("http:", "https:")),
            lambda: create(text=5),
            lambda: create(ssl_context=5),
            lambda: create(http_headers={"a b": "c"}),
            lambda: once(server_url=closed, retries=None),
            lambda: once(server_url="nonsense"),
            lambda: once(server_url=plain, ssl_context=5),
            create_async,
            lambda: self.call(orq_min.Orq(key + "\n\u20ac", server_url=closed)),
        )
        for number, fail in enumerate(calls):
            with self.subTest(number), self.assertRaises(Exception) as caught:
                fail()
            assert_no_local_holds(key, caught.exception)

    def test_a_key_that_goes_in_clear_is_worth_one_warning_a_client(self):
        server = self.server()
        for host, warned in (("service.invalid", 1), ("localhost", 0), ("[::1]", 0)):
            url = "http://%s:%d" % (host, server.port)
            with resolving(("127.0.0.1", server.port)), logged("WARNING") as records:
                for _ in range(2):
                    orq = self.client(server, server_url=url)
                    self.assertEqual([self.call(orq), self.call(orq)], ["hi", "hi"])
            texts = [record.getMessage() for record in records]
            self.assertEqual(len(texts), 2 * warned, texts)
            self.assertNotIn("test-key-123", "".join(texts))


class OnlyWhatCannotHaveRunIsRetried(ServerTest):
    """Each row of the retry table, for each policy; this is the only table.

    A row is `yny`: whether the default policy, RetryConfig(..., False) and
    RetryConfig(..., True) try again. One's own RetryConfig without a choice, and with
    None, are as the default; `retries=None` never does.
    """

    POLICIES = (  # (of which column, policy)
        (0, orq_min.UNSET),
        (0, orq_min.RetryConfig(backoff=SOON)),
        (0, orq_min.RetryConfig("backoff", SOON, None)),
        (1, orq_min.RetryConfig("backoff", SOON, False)),
        (2, AT_ALL_COSTS),
        (3, orq_min.RetryConfig("none", SOON, True)),
        (3, None),
    )

    def outcome_of(self, server, policy, get=False, text="hi", timeout_ms=10000):
        orq = self.client(server, retry_config=orq_min.UNSET, timeout_ms=timeout_ms)
        if not get:
            return self.outcome(orq, text, retries=policy)
        given = {"agent_key": "a", "task_id": "t", "retries": policy}
        try:
            return orq.agents.responses.get(**given).text
        except orq_min.OrqError as error:
            self.assertNotIn("may have run", str(error))
            return error

    def assert_row(
        self, row, *steps, greet=None, tls=None, lookups=None, policies=POLICIES, **call
    ):
        """A first request or connection that fails: whether a second one follows."""
        first = greet and (lambda peer: peer.number or greet(peer))
        steps += (reply("hi"),)
        servers = [self.server(*steps, greet=first, tls=tls) for _ in policies]
        wait = threading.Event().wait
        with mock.patch("time.sleep", lambda seconds: wait(0.001)):
            with concurrent.futures.ThreadPoolExecutor(10) as pool:
                outcome = functools.partial(self.outcome_of, **call)
                outcomes = pool.map(outcome, servers, [each[1] for each in policies])
        for (column, policy), server, got in zip(policies, servers, outcomes):
            with self.subTest(policy=policy):
                retried = (row + "n")[column] == "y"
                self.assertEqual(got == "hi", retried, got)
                attempts = max(len(server.requests), server.connections)
                attempts = lookups[server.port] if lookups else attempts
                self.assertEqual(attempts, 2 if retried else 1, got)

    def lookups_row(self, row, first):
        """The first look-up of a name gives the address `first`, or raises it."""
        lookups = collections.Counter()

        def look_up(host, port, *_, **__):
            lookups[port] += 1
            address = ("127.0.0.1", port) if lookups[port] > 1 else first
            if isinstance(address, Exception):
                raise address
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address)]

        with mock.patch("socket.getaddrinfo", look_up):
            self.assert_row(row, lookups=lookups)

    def test_names_and_addresses(self):
        self.lookups_row("yny", socket.gaierror(socket.EAI_AGAIN, "Try again"))
        self.lookups_row("nnn", socket.gaierror(socket.EAI_NONAME, "Not known"))
        closed = self.enter(socket.socket())  # bound, but it does not listen
        closed.bind(("127.0.0.1", 0))
        self.lookups_row("yny", closed.getsockname())
        with mock.patch("orq_min.CONNECT_SECONDS", 0.4):
            self.lookups_row("yny", self.enter(full_backlog()))

    def test_tls_that_breaks_off(self):
        failures = {
            "a close": hang_up,
            "a close after the start": lambda p: (p.sock.recv(99), p.close()),
            "a reset": lambda p: (p.sock.recv(99), break_off(p)),
            "a timeout": Connection.hang,
        }
        for name, failure in failures.items():
            seconds = 0.4 if failure is Connection.hang else 9
            with self.subTest(name), mock.patch("orq_min.CONNECT_SECONDS", seconds):
                self.assert_row("yny", greet=failure, tls=server_context())

    def test_tls_that_another_attempt_cannot_mend(self):
        failures = {
            "plain HTTP": reply(b"", "400 Bad Request"),
            "something else": b"220 mail.example ESMTP\r\n",
            "no common version": b"\x15\3\1\0\2\2\x46",
            "no common cipher": b"\x15\3\1\0\2\2\x28",
            "a bad certificate": b"\x15\3\1\0\2\2\x2a",
        }
        for name, data in failures.items():
            with self.subTest(name):
                self.assert_row("nnn", greet=then_close(data), tls=server_context())
        for certificate in (ELSEWHERE, EXPIRED):
            self.assert_row("nnn", tls=server_context(certificate))

    def test_a_request_that_never_completely_left(self):
        """What no socket's buffers can hold, of which only the start is read."""

        def break_off_early(peer):
            peer.sock.recv(1000)
            break_off(peer)

        self.assert_row("yny", greet=break_off_early, text=LARGE)

    def test_statuses(self):
        """503 too: gateways answer so after the request was delivered."""
        rows = {429: "yyy", 500: "nyy", 502: "nyy", 503: "nyy", 504: "nyy"}
        others = "301 304 307 400 401 403 404 408 409 413 422 425 501 505 599"
        rows.update((int(status), "nnn") for status in others.split())
        for status, row in rows.items():
            with self.subTest(status=status):
                self.assert_row(row, reply(b"{}", "%d X" % status, "Retry-After: 0"))

    def test_an_error_whose_body_breaks_off_is_retried_by_its_status(self):
        for status, row in ((401, "nnn"), (429, "yyy"), (503, "nyy")):
            with self.subTest(status=status):
                data = reply(b"{}", "%d X" % status)[:-1]
                self.assert_row(row, then_close(data))
                with mock.patch("orq_min.ERROR_BODY_SECONDS", 0.2):
                    self.assert_row(row, lambda p, d=data: (p.send(d), p.hang()))

    LEFT = {
        "a reset": break_off,
        "a close": hang_up,
        "a read timeout": Connection.hang,
        "a cut status line": then_close(b"HTTP/1.1 503"),
        "a cut header": then_close(b"HTTP/1.1 200 OK\r\nContent-"),
        "a cut header of an error": then_close(b"HTTP/1.1 503 Busy\r\nRetry-"),
        "a cut body": cut_off,
        "cut chunks": then_close(chunked(b"{}")[:-6]),
        "no HTTP": then_close(b"SMTP ready\r\n\r\n"),
    }

    def test_a_request_that_left_is_retried_only_if_asked(self):
        """A GET runs no agent, and so has never left."""
        for get, row in ((False, "nny"), (True, "yny")):
            for name, step in self.LEFT.items():
                timeout_ms = 300 if step is Connection.hang else 10000
                with self.subTest(name, get=get):
                    self.assert_row(row, step, get=get, timeout_ms=timeout_ms)
        for status, row in ((429, "yyy"), (503, "nyy"), (404, "nnn")):
            self.assert_row(row, reply(b"{}", "%d X" % status), get=True)

    def test_tls_that_breaks_once_the_request_has_left(self):
        def below_tls(peer):
            socket.socket.send(peer.sock, b"this is no record of TLS")
            peer.close()

        self.assert_row("nny", below_tls, tls=server_context())

    def test_a_2xx_that_cannot_be_used_is_never_retried(self):
        always = ["200", "2XX", "204", "429"]
        policies = [
            (3, orq_min.RetryConfig("backoff", SOON, choice, always))
            for choice in (None, False, True)
        ]
        for status in (200, 202, 204):
            for body in (b"", b"[]", b"<html>", b"null", b'{"a": '):
                with self.subTest(status=status, body=body):
                    answer = reply(body, "%d X" % status)
                    self.assert_row("nnn", answer)
                    self.assert_row("nnn", answer, policies=policies)

    def test_other_statuses_take_the_place_of_the_table(self):
        for statuses, retried, not_retried in (
            (["429", "5XX"], (429, 500, 503, 501, 599), (400, 408)),
            (["5xx"], (500, 503), (429,)),
            (("4Xx", "418"), (400, 418, 429, 499), (503,)),
            (["418"], (418,), (429, 500, 503)),
            ([], (), (429, 500, 503)),
        ):
            policies = [
                (column, orq_min.RetryConfig("backoff", SOON, choice, statuses))
                for column, choice in enumerate((None, False, True))
            ]
            for status in retried + not_retried:
                with self.subTest(statuses=statuses, status=status):
                    row = "yyy" if status in retried else "nnn"
                    self.assert_row(row, reply(b"", "%d X" % status), policies=policies)
            self.assert_row("nny", hang_up, policies=policies)

    def test_a_kept_connection_that_breaks_is_no_licence_to_send_twice(self):
        """The server may have run the agent before the connection broke."""
        server = self.server(repeat_text, break_off, repeat_text)
        orq = self.client(server, retry_config=orq_min.UNSET)
        self.assertEqual(self.call(orq), "hi")
        self.assertTrue(self.failure(orq, orq_min.APIConnectionError).sent)
        self.assertEqual(len(server.requests), 2)

    def test_a_script_that_waits_says_why_without_any_configuration(self):
        later = reply(b"", "429 Slow Down", "Retry-After-Ms: 1")
        server = self.server(later, repeat_text)
        code = "import orq_min; print(orq_min.create_response('a', 'hi').text)"
        process = script(code, ORQ_BASE_URL=server.url, ORQ_API_KEY="k")
        out, err = process.communicate(timeout=20)
        self.assertEqual(out.strip(), b"hi")
        self.assertIn(b"429", err)


class BrokenAnswersDoNoHarm(ServerTest):
    """Whatever a server sends, a call ends in an answer or an OrqError."""

    ANSWERS = 1500
    STATUSES = ("200 OK", "200 OK", "202 Accepted", "404 Not Found", "429 Slow")
    STATUSES += ("500 Oops", "503 Busy", "307 X")

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
                other = chance.choice((b"0", b"-1", b"7", b"429", b"99999999", noise))
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
            text = said(peer.request)
            seen[text] += 1
            if text not in broken or text in sent:
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

        server = self.server(step)
        orq = self.client(server, timeout_ms=3000)
        soon = orq_min.BackoffStrategy(0, 0, 1, 60000)
        columns = [  # of the retry table, and the statuses after which it tries again
            (orq_min.UNSET, rb"429"),
            (orq_min.RetryConfig("backoff", soon, None), rb"429"),
            (orq_min.RetryConfig("backoff", soon, False), rb"429|5[0-9][0-9]"),
            (orq_min.RetryConfig("backoff", soon, True), rb""),
            (None, rb"(?!)"),
        ]
        outcomes = collections.Counter()
        wait = threading.Event().wait
        with mock.patch("time.sleep", lambda seconds: wait(0.001)):
            for number in range(self.ANSWERS):
                text = "token %08x." % hash_of(str(number))
                retries, statuses = columns[number % len(columns)]
                broken[text] = self.broken(chance, text)
                try:
                    got = self.call(orq, text, retries=retries) or ""
                    outcomes["answer"] += 1
                    others = set(re.findall(r"token \w{8}\.", got)) - {text}
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


class WrappersOfTheOpener(ServerTest):
    """Whatever wraps urllib's opener sees an ordinary answer, and can do no harm."""

    def wrapped(self, wrap):
        """`wrap` is given the request, and what performs it."""
        original = urllib.request.OpenerDirector.open

        def open_(opener, request, *given, **more):
            return wrap(request, lambda: original(opener, request, *given, **more))

        return mock.patch.object(urllib.request.OpenerDirector, "open", open_)

    def test_an_error_of_ours_that_it_raises_after_the_answer_is_its_own(self):
        busy, refused = orq_min.APIError("busy"), orq_min.APIConnectionError("refused")
        busy.status_code = 429
        for error in (busy, refused):

            def fail(request, perform, error=error):
                perform()
                raise error

            for policy in (orq_min.RetryConfig(backoff=SOON), AT_ALL_COSTS):
                server = self.server()
                with self.wrapped(fail):
                    caught = self.failure(self.client(server), retries=policy)
                self.assertIs(caught, error)
                self.assertEqual(len(server.requests), 1)

    def test_it_may_read_the_answer_and_replace_it(self):
        read = []

        def replace(request, perform):
            answer = perform()
            self.assertEqual((answer.getcode(), answer.geturl()), (200, server.url_of))
            read.append(answer.read(3) + answer.read())
            return urllib.response.addinfourl(io.BytesIO(), {}, "x:", 500)

        server = self.server()
        server.url_of = server.url + "/v2/agents/my-agent/responses"
        with self.wrapped(replace):
            self.assertEqual(self.call(self.client(server)), "hi")
        self.assertEqual(read, [saying("hi")])

    def test_it_may_swallow_a_failure_or_the_request(self):
        def swallow(request, perform):
            with contextlib.suppress(orq_min.OrqError):
                perform()

        for wrap, words in ((swallow, "closed"), (lambda *_: None, "wrapper")):
            server = self.server(hang_up)
            with self.wrapped(wrap):
                error = self.failure(self.client(server), orq_min.APIConnectionError)
            self.assertIn(words, str(error))

    def test_a_header_of_its_own_is_checked_and_replaces_none_of_ours(self):
        server = self.server()
        orq = self.client(server)
        for value in ("\u5f20", "a\r\nX-Evil: 1"):

            def add(request, perform, value=value):
                request.add_header("X-User", value)
                return perform()

            with self.wrapped(add):
                error = self.failure(orq, orq_min.ValidationError)
            self.assertNotIn(server.key, texts_of(error) + ascii(vars(error)))
            assert_no_local_holds(server.key, error)
        self.assertEqual(server.requests, [])

        def take_over(request, perform):
            for name in ("Authorization", "Host", "Content-Length"):
                request.add_header(name, "0")
            return perform()

        with self.wrapped(take_over):
            self.assertEqual(self.call(orq), "hi")
        (request,) = server.requests
        self.assertEqual(request.header("authorization"), ["Bearer " + server.key])
        self.assertEqual(request.header("host"), [server.netloc])


class SignalsAreNotTheNetworks(ServerTest):
    """A time-out that no socket raised is never followed by another attempt."""

    def assert_left(self, server, late, patch):
        with patch, self.assertRaises(TimeoutError) as caught:
            self.call(self.client(server), retries=AT_ALL_COSTS)
        self.assertIs(caught.exception, late)
        self.assertLessEqual(len(server.requests), 1)

    def test_wherever_it_comes(self):
        packed = gzip.compress(saying("hi"))
        unpacking = reply(packed, "200 OK", "Content-Encoding: gzip")
        for late in (TimeoutError("late"), TimeoutError(errno.ETIME, "late")):
            raises = {"side_effect": late}
            with self.subTest(late):
                self.assert_left(
                    self.server(unpacking),
                    late,
                    mock.patch("gzip.GzipFile.read1", **raises),
                )
                self.assert_left(
                    self.server(), late, mock.patch("socket.getaddrinfo", **raises)
                )
                self.assert_left(
                    self.server(), late, mock.patch("socket.socket.connect", **raises)
                )

    def test_while_the_authorities_are_read(self):
        late = TimeoutError("late")
        with temporary_file(AUTHORITY) as path:
            os.environ["SSL_CERT_FILE"] = path
            server = self.server(tls=server_context())
            load = "ssl.SSLContext.load_verify_locations"
            with mock.patch(load, side_effect=late), self.assertRaises(TimeoutError):
                self.call(self.client(server, ssl_context=None), retries=AT_ALL_COSTS)
        self.assertEqual(server.connections, 0)


class ServersThatAnswerEarly(ServerTest):
    """A server that answers while a large request is sent is heard, as by curl."""

    def test_a_refusal_ends_the_sending(self):
        refusal = reply(b'{"message": "go away"}', "413 Payload Too Large")
        whole = head("100 Continue") + refusal
        for tls, cut in itertools.product((None, server_context()), (0, 8, 20, 33)):

            def refuse(peer, cut=cut):
                peer.send(whole[:cut])
                peer.pause(0.4 if cut else 0)
                peer.send(whole[cut:])
                peer.pause(20)  # and reads no more

            server = self.server(refuse, tls=tls, early=True)
            with self.subTest(tls=bool(tls), cut=cut), within(5):
                error = self.failure(self.client(server), orq_min.APIError, text=LARGE)
                self.assertEqual(error.status_code, 413)

    def test_an_answer_that_began_in_time_has_run_the_agent(self):
        def begin(peer):
            peer.send(head("200 OK", "Content-Length: 9"))
            while peer.sock.recv(4096):  # and goes on reading, slowly
                peer.pause(0.002)

        server = self.server(begin, early=True)
        orq = self.client(server, timeout_ms=200)
        error = self.failure(orq, orq_min.APIConnectionError, text=LARGE)
        self.assertTrue(error.sent)

    def test_an_interim_answer_does_not(self):
        def read_late(peer):
            peer.send(head("102 Processing"))
            peer.pause(0.6)
            left = len(LARGE) - 200000  # of which some was read with the head
            while left > 0:
                left -= len(peer.sock.recv(65536))
            peer.send(reply("whole"))
            peer.hang()

        for tls in (None, server_context()):
            server = self.server(read_late, tls=tls, early=True)
            self.assertEqual(self.call(self.client(server), LARGE), "whole")


class MoreFaultsInWords(ServerTest):
    """What cannot be mended fails at once; what is said is true and holds no key."""

    def test_a_server_that_wants_a_certificate(self):
        context = server_context()
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=AUTHORITY)
        server = self.server(tls=context)
        error = self.failure(self.client(server), retries=AT_ALL_COSTS)
        self.assertFalse(getattr(error, "temporary", True), error)
        self.assertRegex(str(error), "refused the TLS|handshake")
        self.assertEqual((server.connections, server.requests), (1, []))

    @unittest.skipUnless(
        hasattr(ssl.SSLContext, "keylog_filename"), "this Python logs no TLS keys"
    )
    def test_a_log_of_tls_keys_that_cannot_be_written_is_named(self):
        os.environ["SSLKEYLOGFILE"] = os.path.join(tempfile.gettempdir(), "no", "where")
        server = self.server(tls=server_context())
        orq = self.client(server, ssl_context=None)
        error = self.failure(orq, orq_min.ValidationError)
        self.assertEqual([path for path, _ in error.errors], ["SSLKEYLOGFILE"])
        self.assertEqual(server.connections, 0)

    def test_a_key_that_a_cut_would_halve_is_masked(self):
        for pad in (95, 470):
            echo = "X-Request-Id: " + "a" * pad + "test-key-123"
            error = self.failure(self.client(self.server(reply(b"", "400 No", echo))))
            self.assertIn("aaa", str(error))
            self.assertNotRegex(str(error), "test|key")

    def test_a_key_that_goes_in_clear_through_a_proxy_is_worth_a_warning(self):
        proxy = self.server()
        os.environ["http_proxy"] = proxy.url
        for url, warned in (("http://service.invalid", 1), ("http://localhost:9", 0)):
            orq = self.client(proxy, server_url=url)
            with logged("WARNING") as records:
                self.assertEqual(self.call(orq), "hi")
            self.assertEqual(len(records), warned)

    def test_a_key_after_two_spaces_is_masked_too(self):
        server = self.server(reply(b'{"message": "bad test-key-123"}', "401 No"))
        orq = self.client(server, api_key="Bearer  test-key-123")
        self.assertEqual(self.failure(orq).message, "bad ***")

    def test_a_key_that_a_url_writes_in_small_letters_is_masked(self):
        for echo in (b"sek%2Fret%2B1", b"sek%2fret%2b1", b"sek/ret%2b1"):
            server = self.server(reply(b"bad " + echo, "401 No"))
            error = self.failure(self.client(server, api_key="sek/ret+1"))
            self.assertTrue(str(error).endswith("bad ***"), error)

    def test_a_2xx_that_began_to_come_is_followed_by_no_attempt(self):
        """The agent has run, though not all of the request had left."""

        for start in (
            head("200 OK", "Content-Length: 9") + b"{",
            b"HTTP/1.1 200 OK\r\nX: ",
        ):

            def begin(peer, start=start):
                peer.send(start)
                peer.close()

            server = self.server(begin, early=True)
            config = orq_min.RetryConfig(backoff=SOON)
            error = self.failure(self.client(server), text=LARGE, retries=config)
            self.assertIsInstance(error, orq_min.APIConnectionError)
            self.assertTrue(error.sent)
            self.assertEqual(len(server.requests), 1)

    def test_a_field_in_pythons_spelling_takes_no_others_place(self):
        file = {"bytes": "good", "bytes_": "other"}
        parts = [{"kind": "file", "file": file}]
        body = json.dumps({"output": [{"parts": parts}]}).encode()
        create = self.client(self.server(reply(body))).agents.responses.create
        (message,) = create(agent_key="a", message="hi").output
        self.assertEqual(message.parts[0].file.bytes_, "good")


# ----------------------------------------------------------------------------
# For a person to play with
# ----------------------------------------------------------------------------

HOW_TO_USE_IT = """\
The stand-in of the service runs until Ctrl-C. In another terminal:

export ORQ_BASE_URL=%s
export ORQ_API_KEY=%s
%s my-agent "Hello"

It repeats what it is told. "weather" in a message makes it ask for a tool, "fail" in
one with --background makes that run fail, and "task-agent" answers with tasks.
"""


def shown_command():
    """How a person here types the command."""
    return "python3 " + shlex.quote(os.path.relpath(MODULE))


def serve(argv):
    """`serve [PORT]`: run the stand-in until Ctrl-C, with a line for each request."""
    if len(argv) > 1 or not all(re.fullmatch("[0-9]{1,5}", text) for text in argv):
        print("usage: serve [PORT]", file=sys.stderr)
        return 2
    try:
        port = int(argv[0]) if argv else 0
        service = StandIn(port=port, log=functools.partial(print, flush=True))
    except (OSError, OverflowError) as error:
        print("cannot listen on port %s: %s" % (argv[0], error), file=sys.stderr)
        return 1
    with service:
        given = (service.url, service.key, shown_command())
        print(HOW_TO_USE_IT % given, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(60)
    return 0


class Session:
    """Commands that are shown as they are typed, with what comes back."""

    def __init__(self, service, folder):
        self.folder, self.all_went_well = folder, True
        given = {"ORQ_BASE_URL": service.url, "ORQ_API_KEY": service.key}
        self.env = clean_environment(PYTHONIOENCODING="utf-8", **given)

    def type(self, *argv):
        """Run it; what it says, on standard error too, is returned."""
        print("$ %s %s" % (shown_command(), " ".join(map(shlex.quote, argv))))
        done = subprocess.run(
            [sys.executable, MODULE, *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
            env=self.env,
            cwd=self.folder,
        )
        print(done.stdout, flush=True)
        self.all_went_well &= done.returncode == 0
        return done.stdout


def demo(argv):
    """`demo`: show a small session of the command line with the stand-in."""
    if argv:
        print("usage: demo", file=sys.stderr)
        return 2
    with StandIn() as service, tempfile.TemporaryDirectory() as folder:
        session = Session(service, folder)
        session.type("my-agent", "Hello")
        print("$ echo Monday,20 > sales.csv")
        with open(os.path.join(folder, "sales.csv"), "w", newline="\n") as file:
            file.write("Monday,20\n")
        session.type("my-agent", "Sum this up", "--file", "sales.csv")
        said = session.type("my-agent", "What is the weather in Paris?")
        options = re.findall(r"--(?:task-id|tool-result)=\S+", said)
        options = [option.replace("=JSON", '={"sky": "clear"}') for option in options]
        session.type("my-agent", *options)
        task_id = session.type("my-agent", "Write the report", "--background")
        session.type("my-agent", "--wait", task_id.strip())
        busy = {"status": 429, "headers": {"Retry-After": "1"}}
        service.next(dict(busy, body={"message": "too many requests"}))
        session.type("my-agent", "Hello again")
    return 0 if session.all_went_well else 1


# ----------------------------------------------------------------------------
# This file's own commands, and the README
# ----------------------------------------------------------------------------

HERE = os.path.dirname(os.path.abspath(__file__))


def read_readme():
    """The README beside this file; "" if there is none."""
    try:
        with open(os.path.join(HERE, "README.md"), encoding="utf-8") as stream:
            return stream.read()
    except (OSError, ValueError):
        return ""


README = read_readme()
beside_our_readme = unittest.skipUnless(
    README.startswith("# orq_min\n"), "no README.md of orq_min is beside this file"
)


def readme_blocks(language):
    return re.findall("^```%s\n(.*?)^```" % language, README, re.M | re.S)


class ToPlayWith(ServerTest):
    """`demo` and `serve` need no account."""

    def start(self, *argv):
        process = subprocess.Popen(
            [sys.executable, "-W", "error", os.path.abspath(__file__), *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=clean_environment(PYTHONPATH=os.path.dirname(MODULE)),
        )
        watchdog = threading.Timer(60, process.kill)
        watchdog.start()
        self.addCleanup(watchdog.cancel)
        return process

    def finish(self, *argv):
        with self.start(*argv) as process:
            out, err = process.communicate()
        return process.returncode, out.decode(), err.decode()

    def test_demo_shows_a_whole_session_with_what_was_typed(self):
        status, out, err = self.finish("demo")
        self.assertEqual((status, err), (0, ""))
        self.assertIn(len(out.splitlines()), range(15, 26), out)
        command = r"\$ python3 \S*orq_min\.py my-agent "
        task, call = "01K6STANDIN[0-9]{15}", "call_01K6STANDIN[0-9]{15}"
        wanted = (
            command + r"Hello\nYou said: Hello\n",
            command
            + r"'Sum this up' --file sales\.csv\n.*\[file: sales\.csv, text/csv",
            r"get_weather\(.*\) waits for its result: --task-id=%s" % task,
            command + r"--task-id=%s '--tool-result=%s=\{.*\}'\n" % (task, call),
            r"\nThe tool says: \{\"sky\": \"clear\"\}\n",
            command + r"'Write the report' --background\n%s\n" % task,
            command + r"--wait %s\nYou said: Write the report\n" % task,
            r"\norq_min: .* status 429\nYou said: Hello again\n",
        )
        for pattern in wanted:
            self.assertRegex(out, pattern)

    @unittest.skipIf(os.name == "nt", "there is no SIGINT to send")
    def test_serve_says_how_to_use_it_and_logs_each_request_until_ctrl_c(self):
        # where a shell's `&` has it ignored, a child would inherit that
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.addCleanup(signal.signal, signal.SIGINT, before)
        with self.start("serve") as process:
            lines = [process.stdout.readline().decode() for _ in range(9)]
            given = dict(re.findall(r"export (\w+)=(\S+)\n", "".join(lines)))
            done = [
                run("my-agent", "hi", env=given),
                run("nobody", "hi", env=given),
                run("my-agent", "hi", env=dict(given, ORQ_API_KEY="another")),
            ]
            process.send_signal(signal.SIGINT)
            out, err = process.communicate()
        self.assertEqual(done[0].stdout, b"You said: hi\n")
        self.assertRegex("".join(lines), r'\npython3 \S*orq_min\.py my-agent "Hello"\n')
        self.assertEqual((process.returncode, err), (0, b""))
        path = "POST /v2/agents/%s/responses: "
        logged_lines = out.decode().splitlines()
        self.assertEqual(logged_lines[0], path % "my-agent" + "200")
        self.assertIn(path % "nobody" + "404 ", logged_lines[1])
        self.assertIn(path % "my-agent" + "401 ", logged_lines[2])
        self.assertEqual(len(logged_lines), 3)
        self.assertNotIn("another", out.decode())

    def test_a_wrong_use_of_them_is_said_in_a_line(self):
        service = self.enter(StandIn())
        wrong = {
            ("serve", "1", "2"): (2, "usage: serve"),
            ("serve", "web"): (2, "usage: serve"),
            ("demo", "Hello"): (2, "usage: demo"),
            ("serve", str(service.port)): (1, "cannot listen on port"),
            ("serve", "99999"): (1, "cannot listen on port 99999"),
        }
        results = at_once(lambda argv: self.finish(*argv), wrong)
        for (argv, (wanted, words)), (status, out, err) in zip(wrong.items(), results):
            with self.subTest(argv):
                self.assertEqual((status, out), (wanted, ""))
                self.assertIn(words, err)
                self.assertEqual(err.count("\n"), 1, err)


class WithoutUsage(StandIn):
    """The service, when it leaves out what an answer need not hold."""

    def behave(self, recorded):
        status, body = super().behave(recorded)
        for name in ("usage", "finish_reason", "telemetry", "created_at", "model"):
            body.pop(name, None)
        return status, body


@beside_our_readme
class TheReadmeRuns(ServerTest):
    """Who follows the README in a checkout, from its first line on, gets what it says."""

    def setUp(self):
        super().setUp()
        top = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, top)
        self.checkout = os.path.join(top, "checkout")
        os.mkdir(self.checkout)
        shutil.copy(MODULE, os.path.join(self.checkout, "orq_min.py"))
        shutil.copy(__file__, os.path.join(self.checkout, "test_orq_min.py"))
        shutil.copy(os.path.join(HERE, "README.md"), self.checkout)
        with open(os.path.join(top, "python3"), "w") as file:
            file.write('#!/bin/sh\nexec %s "$@"\n' % shlex.quote(sys.executable))
        os.chmod(file.name, 0o755)
        self.path = top + os.pathsep + os.environ.get("PATH", os.defpath)
        self.key = re.search('export ORQ_API_KEY="(.+)"', README).group(1)

    def follow(self, *argv, service=None, **env):
        """Run it in the checkout."""
        url = service.url if service else closed_url()
        return subprocess.run(
            argv,
            cwd=self.checkout,
            env=clean_environment(PATH=self.path, ORQ_BASE_URL=url, **env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            universal_newlines=True,
            timeout=120,
        )

    @posix_only
    def test_its_commands_work_one_after_the_other(self):
        blocks = readme_blocks("sh")
        self.assertRegex(blocks[0], r"\Amkdir .*cp orq_min.py test_orq_min.py .*cd ")
        others = [block for block in blocks if "unittest" not in block]
        self.assertEqual(len(blocks) - len(others), 1)
        service = self.enter(StandIn(key=self.key))
        done = self.follow("sh", "-euc", "\n".join(others), service=service)
        self.assertEqual((done.stderr, done.returncode), ("", 0))
        session = readme_blocks("text")[0]
        self.assertTrue(session.startswith("$ python3 orq_min.py my-agent Hello\n"))
        for words in (
            session,  # which is what `demo` shows
            "\nYou said: Answer in one sentence:What is a comet?\n",
            "\nYou said: From a file\n",
            '"total_tokens": ',  # --json
            "\nAuthorization: Bearer ***\n",  # --dry-run
            "\nYou said: -5 degrees, is that cold?\n",
            "\nYou said: Now in one sentence\n",
            "\n# orq_min.py %s" % orq_min.__version__,
        ):
            self.assertIn(words, done.stdout)
        sent = [request.json() for request in service.requests if request.body]
        self.assertIn({"id": "ada"}, [body.get("identity") for body in sent])
        self.assertNotIn(self.key, done.stdout)

    def test_its_tests_run_where_its_first_command_leads(self):
        (command,) = [block for block in readme_blocks("sh") if "unittest" in block]
        self.assertEqual(command, "python3 -m unittest\n")
        self.checkout = os.path.join(self.checkout, "another repository")
        os.makedirs(os.path.join(self.checkout, ".git"))
        for name in ("orq_min.py", "test_orq_min.py"):
            above = os.path.join(self.checkout, "..", name)
            shutil.copy(above, os.path.join(self.checkout, name))
        for foreign in ("", "# another project\n"):
            if foreign:
                with open(os.path.join(self.checkout, "README.md"), "w") as file:
                    file.write(foreign)
            # all that look at the files beside them, or the whole would take a minute
            some = ["-k", "Readme", "-k", "Repository", "-k", "wrong_use"]
            done = self.follow(
                sys.executable, "-W", "error", *command.split()[1:], *some
            )
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertRegex(done.stderr, r"\nOK \(skipped=[1-9]")

    def test_each_python_example_runs_whatever_the_answer_lacks(self):
        blocks = readme_blocks("python")
        self.assertGreaterEqual(len(blocks), 9)
        for kind in (StandIn, WithoutUsage):
            service = self.enter(kind(key=self.key))
            give = {"service": service, "ORQ_API_KEY": self.key}

            def run_block(block, give=give):
                return self.follow(sys.executable, "-W", "error", "-c", block, **give)

            for block, done in zip(blocks, at_once(run_block, blocks)):
                with self.subTest(kind=kind.__name__, block=block):
                    self.assertEqual((done.returncode, done.stderr), (0, ""))
                    self.assertNotEqual(done.stdout.strip(), "")

    @unittest.skipUnless(importlib.util.find_spec("mypy"), "mypy cannot be imported")
    def test_its_python_examples_pass_mypy_as_they_stand(self):
        names = []
        for number, block in enumerate(readme_blocks("python")):
            names.append("example_%d.py" % number)
            with open(os.path.join(self.checkout, names[-1]), "w") as file:
                file.write(block)
        done = self.follow(sys.executable, "-m", "mypy", "--strict", *names)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)


@beside_our_readme
class TheReadmeTellsAll(ServerTest):
    """It names each thing that a reader may use, and the first screen is a first use."""

    def test_the_first_screen_is_the_whole_of_a_first_use(self):
        screen = "\n".join(README.splitlines()[:36])
        places = [
            screen.index(words)
            for words in (
                "cp orq_min.py test_orq_min.py",
                "export ORQ_API_KEY=",
                "python3 orq_min.py my-agent",
                "from orq_min import",
                "python3 test_orq_min.py demo",
            )
        ]
        self.assertEqual(places, sorted(places))
        self.assertEqual(readme_blocks("python")[0].count("\n"), 3)

    def test_it_names_what_is_public_and_nothing_else_of_ours(self):
        names = set(orq_min.__all__)
        errors = "message status_code headers body data errors sent temporary"
        responses = orq_min.Responses
        for function in (responses.create, responses.get, orq_min.Orq.__init__):
            names |= set(inspect.signature(function).parameters) - {"self"}
        for name in orq_min.__all__:
            names |= set(getattr(getattr(orq_min, name), "__dataclass_fields__", ()))
        options = run("--help", env={"COLUMNS": "200"}).stdout.decode()
        names |= set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", options))
        names |= set(re.findall(r"\b(?:ORQ|SSL)[A-Z_]+", orq_min.__doc__))
        names |= {*errors.split(), "0", "1", "2", "3", "130"}
        code = "".join(re.findall("`[^`\n]+`", README))
        code += " ".join(re.findall(r"^ *\w+", readme_blocks("text")[1], re.M))
        words = set(re.findall(r"[\w-]+", code))
        self.assertEqual(names - words, set())
        known = [getattr(orq_min, name) for name in orq_min.__all__]
        for word in words:
            found = getattr(orq_min, word, None)
            if getattr(found, "__module__", "") == orq_min.__name__:
                self.assertIn(found, known, word)
        for words in ("orq_ai_sdk", "4.0.0rc69", "4.17.13", "deprecated", "vcrpy"):
            self.assertIn(words, README)

    def test_its_tree_of_errors_is_that_of_the_classes(self):
        parents = {-2: Exception}
        for indent, name in re.findall(r"^( *)(\w+)", readme_blocks("text")[1], re.M):
            found = getattr(orq_min, name)
            self.assertIs(found.__bases__[0], parents[len(indent) - 2])
            parents[len(indent)] = found
        self.assertEqual(set(parents), {-2, 0, 2, 4})


@beside_our_readme
class TheRepository(unittest.TestCase):
    """It holds what was promised."""

    def test_it_holds_the_promised_files_and_no_others(self):
        if not os.path.isdir(os.path.join(HERE, ".git")) or not shutil.which("git"):
            self.skipTest("not a git checkout")
        ask = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        done = subprocess.run(ask, cwd=HERE, stdout=subprocess.PIPE, check=True)
        promised = "orq_min.py test_orq_min.py README.md LICENSE .ci/run .gitignore"
        self.assertEqual(set(done.stdout.decode().split()), set(promised.split()))

    @posix_only
    def test_what_can_be_run_is_executable(self):
        if not os.path.exists(os.path.join(HERE, ".ci", "run")):
            self.skipTest("not a checkout")
        for name in ("orq_min.py", ".ci/run"):
            self.assertTrue(os.access(os.path.join(HERE, name), os.X_OK), name)


# ----------------------------------------------------------------------------
# The benchmark
# ----------------------------------------------------------------------------

MIB = 2**20
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
EXPLANATION = """\
Each row is measured some times, ours and theirs in turn, and shows the medians. A bound
is "ok" if three of four such pairs hold it, and MISSED if three of four do not; else
noise decides, and the row is "near the bound". PyPy has no bounds."""


def bench_server():
    """The stand-in in a process of its own, over HTTP and TLS, until its input ends."""
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    more = {"created_at": "2025-11-20T09:30:00.000Z", "model": "openai/gpt-4o"}
    small = answer_of("Hello, how can I help you today?", usage=usage, **more)
    small["output"][0]["messageId"] = "m1"  # without which the SDK refuses it
    is_json = "Content-Type: application/json"
    small = reply(json.dumps(small).encode(), "200 OK", is_json)
    large = reply(saying("x" * (32 * MIB - len(saying("")))), "200 OK", is_json)

    def greet(peer):  # before it does more for a request than must be
        if peer.service.tls:
            peer.start_tls(peer.service.tls)
        peer.stream = peer.sock.makefile("rb")
        first = peer.stream.readline()
        while first:
            length = 0
            for line in iter(peer.stream.readline, b"\r\n"):
                name, _, value = line.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            while length:
                length -= len(peer.stream.read(min(length, 65536)))
            if b"/late/" in first:
                peer.pause(1)
            peer.send(large if b"/large/" in first else small)
            first = peer.stream.readline()
        peer.close()

    with StandIn(greet=greet) as plain:
        with StandIn(greet=greet, tls=server_context()) as secure:
            print(plain.url, secure.url, flush=True)
            sys.stdin.read()


def fresh_process(code, *argv):
    """(its seconds, the number that it prints), of a Python that runs a program."""
    code = "import re, sys, time\n" + MEMORY + textwrap.dedent(code)
    started = time.perf_counter()
    command = [sys.executable, "-c", code, *argv]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return time.perf_counter() - started, float(done.stdout)


def timed(work):
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def in_turn(measures, rounds):
    """What each of them measures in all rounds, after one that does not count."""
    found = [[] for _ in measures]
    for number in range(rounds + 1):
        # there and back, as what comes first may have it harder
        for index in list(range(len(measures)))[:: 1 if number % 2 else -1]:
            value = measures[index]()
            if number:
                found[index].append(value)
    return found


def verdict(values, bound):
    """What EXPLANATION says of a bound that none of these should pass."""
    values = sorted(values)
    if values[-1 - len(values) // 4] <= bound:
        return "ok"
    return "MISSED" if values[len(values) // 4] > bound else "near the bound"


class Bench:
    """Measures each row, and prints it."""

    ROW = "%-32s  %-16s %10s %10s %10s  %10s  %s"

    def __init__(self, url, https_url, directory):
        self.url, self.https_url, self.directory = url, https_url, directory
        self.verdicts = []
        try:
            import orq_ai_sdk

            self.sdk = orq_ai_sdk
        except ImportError:
            self.sdk = None

    def row(self, what, than, shown, ours, theirs, bound=None, compared=None):
        """`shown` is how to write a value; `compared` what is bounded, for each pair."""
        values, form, sign = compared or ratios(ours, theirs), "%.2f", "<="
        if than in ("urlopen", "orq_ai_sdk") and not compared:  # how much faster
            values, form, sign = ratios(theirs, ours), "%.1f x", ">="
        if compared:
            form = shown
        judged = ""
        if sys.implementation.name != "cpython":
            bound = None
        if bound is not None:
            turned = -1 if sign == ">=" else 1
            judged = verdict([turned * value for value in values], turned * bound)
            self.verdicts.append(judged)
        limit = "" if bound is None else "%s %s" % (sign, form % bound)
        medians = [statistics.median(taken) for taken in (ours, theirs, values)]
        texts = [shown % medians[0], shown % medians[1], form % medians[2]]
        print(self.ROW % (what, than, *texts, limit, judged), flush=True)

    def run(self):
        name = sys.implementation.name
        print("%s %s\n%s\n" % (name, sys.version.split()[0], EXPLANATION))
        print(self.ROW % ("what", "against", "ours", "theirs", "ratio", "bound", ""))
        self.imports()
        self.calls("HTTP", self.url, 1.75)
        self.calls("TLS", self.https_url, 1.5)
        self.sizes()
        self.many_tasks()
        self.many_threads()

    def imports(self):
        # a copy, so that what Python compiles is kept wherever the module lies
        shutil.copy(MODULE, os.path.join(self.directory, "orq_min.py"))
        start = "sys.path.insert(0, %r); sys.dont_write_bytecode = False\n"
        code = start % self.directory + 'import %s\nprint(memory("VmHWM"))'
        names = ["orq_min", "urllib.request, json, dataclasses, typing, logging"]
        names += ["orq_ai_sdk"] if self.sdk else []
        measures = [functools.partial(fresh_process, code % name) for name in names]
        found = [list(zip(*taken)) for taken in in_turn(measures, 24)]
        times = [[1e3 * seconds for seconds in taken[0]] for taken in found]
        sizes = [[size / MIB for size in taken[1]] for taken in found]
        than = ["the stdlib's", "orq_ai_sdk"]
        for name, theirs, size, bounds in zip(
            than, times[1:], sizes[1:], [(1.25, 2), (None, None)]
        ):
            self.row("import", name, "%.1f ms", times[0], theirs, bounds[0])
            more = [ours - theirs for ours, theirs in zip(sizes[0], size)]
            self.row(
                "import, memory", name, "%.1f MiB", sizes[0], size, bounds[1], more
            )

    def calls(self, name, url, bound, count=40):
        context = trusting_context() if name == "TLS" else None
        path = "/v2/agents/any/responses"
        message = {"role": "user", "parts": [{"kind": "text", "text": "Hello"}]}
        body = {"message": message, "background": False}
        headers = {"Authorization": "Bearer k", "Content-Type": "application/json"}
        headers.update(Accept="application/json")
        with contextlib.ExitStack() as stack:
            orq = stack.enter_context(
                orq_min.Orq("k", server_url=url, ssl_context=context)
            )
            kind, given = http.client.HTTPConnection, {}
            if context:
                kind, given = http.client.HTTPSConnection, {"context": context}
            bare = kind(url.partition("//")[2], **given)
            stack.enter_context(contextlib.closing(bare))

            def by_us():
                orq.agents.responses.create(agent_key="any", message="Hello")

            def by_http_client():
                bare.request("POST", path, json.dumps(body).encode(), headers)
                json.loads(bare.getresponse().read().decode())

            def by_urlopen():
                data = json.dumps(body).encode()
                request = urllib.request.Request(url + path, data, headers)
                with urllib.request.urlopen(request, context=context) as answer:
                    json.loads(answer.read().decode())

            works = [by_us, by_http_client, by_urlopen]
            works += [self.by_sdk(stack, url, message)] if self.sdk else []
            found = in_turn([repeated(work, count) for work in works], 40)
        bounds = [bound, 5 if context else None, None]
        for than, theirs, limit in zip(
            ("bare http.client", "urlopen", "orq_ai_sdk"), found[1:], bounds
        ):
            self.row("one call, " + name, than, "%.0f us", found[0], theirs, limit)

    def by_sdk(self, stack, url, message):
        import httpx

        made = httpx.Client(verify=trusting_context())
        stack.callback(made.close)
        orq = self.sdk.Orq(api_key="k", server_url=url, client=made)
        create = orq.agents.responses.create
        return lambda: create(agent_key="any", message=message)

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
            ("16 MiB file attached, memory", file, "any", 16, 6),
            ("32 MiB answer, memory", "orq_min.TextPart('x')", "large", 32, 5),
        ):
            program = code.format(part, agent)
            argv = (os.path.dirname(MODULE), self.url)
            more = [fresh_process(program, *argv)[1] / MIB for _ in range(3)]
            self.row(what, "its size", "%.0f MiB", more, [size] * 3, bound)

    def many_tasks(self):
        async def run():
            async with orq_min.Orq("k", server_url=self.url) as orq:
                create = orq.agents.responses.create_async
                tasks = [create(agent_key="late", message="hi") for _ in range(200)]
                await asyncio.gather(*tasks)

        taken = [timed(lambda: asyncio.run(run())) for _ in range(3)]
        what = "200 create_async of 1 s at once"
        self.row(what, "one", "%.2f s", taken, [1.0] * 3, 3)

    def many_threads(self, threads=16, count=25):
        with contextlib.ExitStack() as stack:
            clients = [
                stack.enter_context(orq_min.Orq("k", server_url=self.url))
                for _ in range(threads)
            ]
            pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(threads))

            def talk(orq):
                for _ in range(count):
                    orq.agents.responses.create(agent_key="any", message="Hello")

            works = [
                lambda: list(pool.map(talk, [clients[0]] * threads)),
                lambda: list(pool.map(talk, clients)),
            ]
            each = 1e6 / threads / count
            measures = [lambda work=work: each * timed(work) for work in works]
            one, many = in_turn(measures, 24)
        what = "16 threads on one client, a call"  # 0.1 is noise
        self.row(what, "16 clients", "%.0f us", one, many, 1.1)


def ratios(ours, theirs):
    return [one / other for one, other in zip(ours, theirs)]


def repeated(work, count):
    """A measure of the microseconds of a work, one of them taking too little time."""
    return lambda: 1e6 / count * timed(lambda: [work() for _ in range(count)])


def bench(argv):
    """`bench`: measure each row of a table, side by side with others."""
    if argv == ["serve"]:
        return bench_server()
    environment = mock.patch.dict(os.environ, clean_environment(), clear=True)
    with environment, tempfile.TemporaryDirectory() as directory:
        here = os.path.abspath(__file__)
        server = subprocess.Popen(
            [sys.executable, here, "bench", "serve"],
            env=dict(os.environ, PYTHONPATH=os.path.dirname(MODULE)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        with server:  # which ends when its input does
            measured = Bench(*server.stdout.readline().decode().split(), directory)
            measured.run()
    missed = measured.verdicts.count("MISSED")
    print("%d missed" % missed)
    return 1 if missed else 0


# ----------------------------------------------------------------------------
# The commands
# ----------------------------------------------------------------------------


def main():
    commands = {"serve": serve, "demo": demo, "bench": bench}
    if len(sys.argv) > 1 and sys.argv[1] in commands:
        return commands[sys.argv[1]](sys.argv[2:])
    return unittest.main()


if __name__ == "__main__":
    sys.exit(main())

"""Tests of orq_min.py, and a stand-in of the service that they run against.

    python3 -m unittest                         run the tests
    python3 test_orq_min.py serve [PORT]        run the stand-in, to play with
    python3 test_orq_min.py demo                show a whole small session
    python3 test_orq_min.py bench               measure, side by side with others

Nothing but the standard library is needed, and no network but loopback.
"""

import asyncio
import base64
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
from unittest import mock

import orq_min

pty = importlib.import_module("pty") if os.name == "posix" else None
MODULE = os.path.abspath(orq_min.__file__)
logging.getLogger(orq_min.__name__).addHandler(logging.NullHandler())  # no noise
posix_only = unittest.skipUnless(os.name == "posix", "needs a POSIX system")
clock = time.perf_counter  # which no test moves by a patch of `time`

# ----------------------------------------------------------------------------
# The stand-in of the service
# ----------------------------------------------------------------------------


class Recorded(collections.namedtuple("Recorded", "method path headers body")):
    """A request as it came; its headers are pairs, and its body is bytes."""

    def json(self):
        return json.loads(self.body.decode("utf-8"))

    def header(self, name):
        """The values sent under this name, in any case."""
        return [value for key, value in self.headers if key.lower() == name.lower()]


# The request tables of the contract: the name of a required field ends in "!", and a
# tuple holds alternatives.
# fmt: off
CONTACT = {"id!": str, "metadata": [dict], "tags": [str]}
CONTACT.update(display_name=str, email=str, logo_url=str)
A_FILE = {"mimeType": str, "name": str}
USER_PART = (
    {"kind!": "text", "text!": str},
    {"kind!": "file", "file!": {"bytes!": str, **A_FILE}, "metadata": dict},
    {"kind!": "file", "file!": {"uri!": str, **A_FILE}, "metadata": dict},
)
TOOL_PART = {"kind!": "tool_result", "tool_call_id!": str, "result": object}
TOOL_PART.update(metadata=dict)
BODY = {
    "message!": (
        {"role!": "user", "parts!": [USER_PART], "messageId": str},
        {"role!": "tool", "parts!": [TOOL_PART], "messageId": str},
    ),
    "task_id": str, "variables": dict, "metadata": dict, "background": bool,
    "contact": CONTACT, "identity": CONTACT, "memory": {"entity_id!": str},
    "thread": {"id!": str, "tags": [str]}, "stream": False,  # the official client's
    "engine": str, "conversation": dict,  # the client under test does not know these
}
# fmt: on


def fits(shape, value):
    if isinstance(shape, tuple):
        return any(fits(one, value) for one in shape)
    if isinstance(shape, type):
        return isinstance(value, shape)
    if isinstance(shape, list) and isinstance(value, list):
        return all(fits(shape[0], item) for item in value)
    if isinstance(shape, dict) and isinstance(value, dict):
        fields = {name.rstrip("!"): inner for name, inner in shape.items()}
        missing = {name for name in fields if name + "!" in shape} - set(value)
        return not missing and all(fits(fields.get(n, ()), value[n]) for n in value)
    return shape == value


class Refusal(Exception):
    """The status and the body that the service answers in place of a run."""


class Contract:
    """What the service answers to a request, without any network.

    A task in the background is in progress for `background_seconds`, and fails then
    if its message contains the word "fail". The agent "task-agent" answers with tasks.
    """

    background_seconds = 0.3

    def __init__(self, key="test-key-123", log=None):
        self.key, self.log, self.agents = key, log, {"my-agent", "task-agent"}
        self.tasks, self._lock = {}, threading.Lock()
        self._new_id = map("01K6STANDIN%015d".__mod__, itertools.count(1)).__next__

    def behave(self, recorded):
        """(status, JSON body) for a request."""
        try:
            agent, task_id = self._find(recorded)
            if task_id:
                answer = self._state(self._task(agent, task_id))
            else:
                answer = self._run(agent, recorded)
        except Refusal as refusal:
            return refusal.args
        except ValueError:
            return 400, {"message": "the body is not JSON, or a file is not base64"}
        return 200, self._as_task(answer) if agent == "task-agent" else answer

    def _find(self, recorded):
        """The agent, and the id of the task that a GET asks for."""
        pattern = r".*/v2/agents/([^/?#]+)/responses(?:/([^/?#]+))?"
        match = re.fullmatch(pattern, recorded.path)
        if not match or recorded.method != ("GET" if match.group(2) else "POST"):
            raise Refusal(404, {"message": "no such operation"})
        agent, task_id = (urllib.parse.unquote(part or "") for part in match.groups())
        if recorded.header("authorization") != ["Bearer " + self.key]:
            raise Refusal(401, {"error": "invalid API key"})
        if agent not in self.agents:
            raise Refusal(404, {"code": 404, "message": "no agent %r" % agent})
        return agent, task_id

    def _task(self, agent, task_id):
        task = self.tasks.get(task_id)
        if task is None or task.agent != agent:
            raise Refusal(404, {"code": 404, "message": "no such task"})
        return task

    def _run(self, agent, recorded):
        if recorded.header("content-type") != ["application/json"]:
            raise Refusal(415, {"message": "the body must be application/json"})
        text = recorded.body.decode("utf-8")
        body = json.loads(text, parse_constant=int)  # which refuses NaN
        if not fits(BODY, body):
            raise Refusal(422, {"message": "it breaks the contract: " + text})
        background, message = body.get("background", False), body["message"]
        results = {part.get("tool_call_id") for part in message["parts"]}
        with self._lock:
            if "task_id" in body:
                task = self._task(agent, body["task_id"])
            else:
                task = types.SimpleNamespace(agent=agent, pending=set(), ends=0.0)
            if clock() < task.ends:
                raise Refusal(409, {"error": {"message": "the task is active"}})
            if message["role"] == "tool" and results != task.pending:
                raise Refusal(422, {"message": "these tool calls do not wait"})
            task.ends = clock() + self.background_seconds * background
        task_id = body.get("task_id") or self._new_id()
        self.tasks[task_id] = task
        task.begun = {"_id": self._new_id(), "task_id": task_id}
        task.begun.update(created_at="2025-11-20T09:30:00.000Z", model="openai/gpt-4o")
        task.answer = dict(task.begun, **self._speak(task, body))
        if background and "fail" in json.dumps(message):
            task.answer = dict(task.begun, error="The agent failed, as it was told to.")
        return task.begun if background else task.answer

    @staticmethod
    def _state(task):
        if clock() < task.ends:
            return dict(task.begun, status="in_progress")
        status = "failed" if "error" in task.answer else "completed"
        return dict(task.answer, status=status)

    def _speak(self, task, body):
        """The agent's turn."""
        text, results, seen = "", [], []
        for part in body["message"]["parts"]:
            text += part.get("text", "")
            if part["kind"] == "file":
                file = part["file"]
                size = len(base64.b64decode(file.get("bytes", ""), validate=True))
                content = file.get("uri") or "%d bytes" % size
                shown = file.get("name"), file.get("mimeType"), content
                seen.append("[file: %s]" % ", ".join(filter(None, shown)))
            elif part["kind"] == "tool_result":
                results.append(json.dumps(part.get("result")))
        for name, value in body.get("variables", {}).items():
            shown = value if isinstance(value, str) else json.dumps(value)
            seen.append("[%s: %s]" % (name, shown))
        said = "You said: %s" % text if text else "You said nothing."
        if results:
            said = "The tool says: %s" % ", ".join(results)
        output, calls, task.pending = [], [], set()
        if "weather" in text:
            said = "Let me look that up."
            call_id = "call_" + self._new_id()
            task.pending.add(call_id)
            function = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
            calls.append({"id": call_id, "type": "function", "function": function})
            call = {"kind": "tool_call", "tool_name": "get_weather"}
            call.update(tool_call_id=call_id, arguments={"city": "Paris"})
            output.append(from_agent(call, messageId=self._new_id()))
        said = " ".join([said, *seen])
        output.append(from_agent(text_part(said), messageId=self._new_id()))
        usage = {"prompt_tokens": len(text.split())}
        usage.update(completion_tokens=len(said.split()))
        return {
            "output": output,
            "usage": dict(usage, total_tokens=sum(usage.values())),
            "finish_reason": "function_call" if calls else "stop",
            "telemetry": {"trace_id": self._new_id(), "span_id": self._new_id()},
            **({"pending_tool_calls": calls} if calls else {}),
        }

    @staticmethod
    def _as_task(answer):
        """The other shape that the service's guides show."""
        task = {"id": answer["task_id"], "kind": "task"}
        status = {"state": "working", "timestamp": answer["created_at"]}
        if "error" in answer:
            why = text_part(answer["error"])
            status.update(state="failed", message=from_agent(why))
        elif "output" in answer:
            parts = answer["output"][-1]["parts"]
            status.update(state="completed", message=from_agent(*parts))
            task["output"] = [{"parts": parts}]
        return dict(task, status=status)


class StandIn(Contract):
    """The service on loopback, which can be told to misbehave byte by byte.

    It answers at any path prefix, as the contract says, unless told otherwise: `next`
    says how to treat the next requests, one step each, and `then` is the step for all
    others. StandIn(a, b, c) is told next(a, b) and then = c. A step is a dict with any
    of `status`, `headers`, `body` (bytes, text, or what JSON has) and `delay` (which
    alone delays what the contract says), or bytes, which are sent as they are, or a
    function, which is given the Connection and does what it likes with it.

    `greet` is given each Connection before anything is read from it. With `early` a
    step is taken before the body is read. `requests` came, `on` has the numbers of
    their connections, and `gone` those of the connections that a client closed.
    """

    def __init__(
        self, *steps, host="127.0.0.1", port=0, tls=None, greet=None, early=False, **kw
    ):
        super().__init__(**kw)
        self.tls, self.greet, self.early = tls, greet, early
        self.requests, self.on, self.peers, self.gone = [], [], [], []
        self.connections, self.threads, self.closing = 0, [], threading.Event()
        self._steps = collections.deque(steps[:-1])
        self.then = steps[-1] if steps else {}
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.socket(family)
        try:
            self._listener.bind((host, port))
            self._listener.listen(256)
        except BaseException:
            self._listener.close()
            raise
        self.port = self._listener.getsockname()[1]
        self.netloc = ("[%s]:%d" if ":" in host else "%s:%d") % (host, self.port)
        self.url = "%s://%s" % ("https" if tls else "http", self.netloc)

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
        with socket.socket(self._listener.family) as waker:
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
            self.peers.append(Connection(self, sock, self.connections))
            self.connections += 1
            self._start(self.peers[-1].serve)


class Connection:
    """A connection that a StandIn accepted. `request` is what came last."""

    def __init__(self, service, sock, number):
        self.service, self.sock, self.number = service, sock, number
        self.stream = self.request = None

    def serve(self):
        """Treat one request after the other, until somebody hangs up."""
        try:
            if self.service.greet:
                self.service.greet(self)
            if self.service.tls and self.sock.fileno() >= 0:
                self.start_tls(self.service.tls)
            while self.sock.fileno() >= 0:  # it is not closed
                self.request = self.read_request()
                self.take(self.service.take_step(self))
        except OSError:
            self.service.gone.append(self.number)
        finally:
            self.close()

    def start_tls(self, context):
        options = {"server_side": True, "do_handshake_on_connect": False}
        self.sock = context.wrap_socket(self.sock, **options)
        self.sock.do_handshake()

    def read_request(self):
        self.stream = self.stream or self.sock.makefile("rb")
        if self.stream.peek(1)[:1] == b"\x16":  # the first byte of a TLS handshake
            self.answer(400, "this port speaks plain HTTP")
            raise ConnectionAbortedError("the client speaks TLS")
        lines = []
        while not lines or lines[-1] != "\r\n":
            lines.append(self.stream.readline().decode("latin-1"))
            if not lines[-1]:
                raise ConnectionAbortedError("the client has gone")
        pairs = [line.partition(":")[::2] for line in lines[1:-1]]
        headers = [(name, value.strip()) for name, value in pairs]
        request = Recorded(*lines[0].split(" ")[:2], headers, b"")
        if self.service.early:
            return request
        length = int((request.header("content-length") or ["0"])[0])
        body = self.stream.read(length)
        if len(body) < length:
            raise ConnectionAbortedError("the client has gone")
        return request._replace(body=body)

    def take(self, step):
        if callable(step):
            return step(self)
        if isinstance(step, bytes):
            return self.send(step)
        answer = dict(step)
        self.pause(answer.pop("delay", 0))
        if not answer:
            answer["status"], answer["body"] = self.service.behave(self.request)
        self.answer(**answer)

    def answer(self, status=200, body=b"", headers=None):
        """A whole answer; bytes and text are sent as they are, the rest as JSON."""
        if not isinstance(body, (bytes, str)):
            body = json.dumps(body)
        data = body if isinstance(body, bytes) else body.encode("utf-8")
        given = {"Content-Type": "application/json", "Content-Length": len(data)}
        given.update(headers or {})
        if self.request and self.service.log:
            why = "" if status < 400 else " " + data.decode("utf-8", "replace")
            self.service.log("%s %s: %d%s" % (*self.request[:2], status, why))
        line = "%d %s" % (status, http.client.responses.get(status, "X"))
        self.send(head(line, *map("%s: %s".__mod__, given.items())) + data)

    def send(self, data):
        self.sock.sendall(data)

    def drip(self, data):
        """Send a byte at a time, for as long as the other side listens."""
        for byte in data[:500]:  # which takes ten seconds
            if self.service.closing.wait(0.02):
                break
            self.send(bytes([byte]))

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
        if reset:
            linger = struct.pack("ii", 1, 0)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        else:  # Python forgets the descriptor before it closes it
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self.sock, socket.SHUT_WR)
        if self.stream:
            self.stream.close()
        self.sock.close()


def text_part(text, **more):
    return dict({"kind": "text", "text": text}, **more)


def from_user(*parts, **more):
    return dict({"role": "user", "parts": list(parts)}, **more)


def from_agent(*parts, **more):
    return from_user(*parts, **dict({"role": "agent"}, **more))


def answer_of(text, **more):
    """An answer in which the agent says this."""
    output = [from_agent(text_part(text))]
    return dict({"_id": "r1", "task_id": "t1", "output": output}, **more)


def saying(text):
    """The body of an answer."""
    return json.dumps(answer_of(text)).encode()


def head(status, *headers):
    return "\r\n".join(["HTTP/1.1 " + status, *headers, "", ""]).encode("latin-1")


def reply(body=b"", status="200 OK", *headers):
    """A well-formed answer; a text is what the agent says."""
    body = saying(body) if isinstance(body, str) else body
    return head(status, *headers, "Content-Length: %d" % len(body)) + body


def chunked(body, *headers, status="200 OK", size=1000):
    blocks = [body[i : i + size] for i in range(0, len(body), size)] + [b""]
    chunks = [b"%x\r\n%s\r\n" % (len(block), block) for block in blocks]
    return head(status, "Transfer-Encoding: chunked", *headers) + b"".join(chunks)


def said(request):
    """The text that a request holds."""
    return request.json()["message"]["parts"][0]["text"]


def repeat_text(peer):
    peer.send(reply(said(peer.request)))


def then_close(data):
    return lambda peer: (peer.send(data), peer.close())


hang_up = Connection.close  # without an answer
break_off = functools.partial(Connection.close, reset=True)
cut_off = then_close(reply("cut off")[:-9])  # within the body


def read_slowly(peer):
    while peer.sock.recv(65536):
        peer.pause(0.005)


class Proxy(StandIn):
    """A real proxy, which tunnels CONNECT and forwards absolute URLs.

    `credentials` are what it wants, such as "user:password"; `passed` went through.
    """

    def __init__(self, credentials="", greeting=head("200 Go Ahead")):
        super().__init__(self.forward)
        self.credentials, self.greeting = credentials, greeting
        self.passed = bytearray()

    def forward(self, peer):
        method, url, headers, body = peer.request
        wanted = "Basic " + base64.b64encode(self.credentials.encode()).decode()
        if self.credentials and peer.request.header("proxy-authorization") != [wanted]:
            return peer.send(reply(b"", "407 Who Are You"))
        if method == "CONNECT":
            return self.tunnel(peer, urllib.parse.urlsplit("//" + url))
        target = urllib.parse.urlsplit(url)
        headers = {k: v for k, v in headers if k.lower() != "proxy-authorization"}
        with contextlib.closing(http.client.HTTPConnection(target.netloc)) as server:
            server.request(method, target.path, body or None, headers)
            with server.getresponse() as answer:
                peer.send(reply(answer.read(), "%d X" % answer.status))

    def tunnel(self, peer, target):
        with socket.create_connection((target.hostname, target.port)) as server:
            peer.send(self.greeting)
            back = threading.Thread(target=self.pump, args=(server, peer.sock))
            back.start()
            self.pump(peer.sock, server)
            back.join()
        peer.close()

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
pem = "-----BEGIN CERTIFICATE-----\n%s-----END CERTIFICATE-----\n".__mod__
AUTHORITY = pem("""\
MIIBZDCCAQmgAwIBAgIBAjAKBggqhkjOPQQDAjAYMRYwFAYDVQQDDA1vcnFfbWlu
IHRlc3RzMCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAYMRYwFAYD
VQQDDA1vcnFfbWluIHRlc3RzMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEOvD0
9dNjALaySNaS/NHsOnrOWwH+qWkKt6CMlz0RbaDIQk9XK2T5bfEVYVKYQ2edokoK
W8Rw6ZP3n9pdkMZl66NCMEAwDwYDVR0TAQH/BAUwAwEB/zAOBgNVHQ8BAf8EBAMC
AQYwHQYDVR0OBBYEFH6zU5pWEZzM/dvDtymUpw35MgdzMAoGCCqGSM49BAMCA0kA
MEYCIQD5INzGptcLbcdwc+0SqmNQQoEQkLG7SQwEXJ+gxfhaAwIhAILXeoLmkUEk
nUnLJLoiZFTYlcgMKX6+VFbP7BfCmt/Q
""")
LAX_AUTHORITY = pem("""\
MIIBUTCB+aADAgECAgEDMAoGCCqGSM49BAMCMBgxFjAUBgNVBAMMDW9ycV9taW4g
dGVzdHMwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBgxFjAUBgNV
BAMMDW9ycV9taW4gdGVzdHMwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAQ68PT1
02MAtrJI1pL80ew6es5bAf6paQq3oIyXPRFtoMhCT1crZPlt8RVhUphDZ52iSgpb
xHDpk/ef2l2QxmXrozIwMDAPBgNVHRMBAf8EBTADAQH/MB0GA1UdDgQWBBR+s1Oa
VhGczP3bw7cplKcN+TIHczAKBggqhkjOPQQDAgNHADBEAiAwXVi5br2+1xZODog7
DmZYQahcmWel7YDHRX3D3z6wBgIgdbDjfJ7Ni06OsMt15fo8YEaxhRqrxSrK3SUK
Tf4CwcU=
""")
LEAF_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgos2lHtdw2KbuLh/O
xsGoncdcrLlQcT4D7pT+4RxL2T+hRANCAASHeKuxb9KPrac1n+pgklvDK5BSP4xV
rJdA0AdW4YtQdeQNktlyoya4jhnLns/qjyCszFFvGRpEGN9dofTNQtIq
-----END PRIVATE KEY-----
"""
LEAF = pem("""\
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
""")
ELSEWHERE = pem("""\
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
""")
EXPIRED = pem("""\
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
""")


def server_context(certificate=LEAF):
    """The TLS side of a server; a context loads certificates from files alone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "server.pem")
        path.write_text(certificate + LEAF_KEY)
        context.load_cert_chain(str(path))
    return context


def trusting_context():
    return ssl.create_default_context(cadata=AUTHORITY)


# ----------------------------------------------------------------------------
# Helpers of the tests
# ----------------------------------------------------------------------------


def setUpModule():
    """A shell's `&` has SIGINT ignored, which the commands would inherit."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def until(true, seconds=20):
    """Wait until `true()`, and return what it said."""
    end, pause = clock() + seconds, threading.Event().wait  # not a patched time.sleep
    while clock() < end:
        found = true()
        if found:
            return found
        pause(0.005)
    raise AssertionError("it did not happen within %s s" % seconds)


@contextlib.contextmanager
def within(seconds):
    """What is done in this context must not take longer."""
    started = clock()
    yield
    if clock() - started > seconds:
        raise AssertionError("it took more than %s s" % seconds)


def clean_environment(**more):
    """This process's environment without what would disturb a test, and `more`."""
    disturbing = re.compile("(ORQ|SSL_CERT|PYTHON|LC)_?.*|LANG.*|.*_proxy", re.I)
    kept = {k: v for k, v in os.environ.items() if not disturbing.fullmatch(k)}
    return dict(kept, **more)


PIPES = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
PYTHON = [sys.executable, "-W", "error"]


def run(*argv, stdin=None, env=None, timeout=30):
    """Run the module as a command; stdout and stderr are bytes."""
    given = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
    given.update(PIPES, env=clean_environment(**(env or {})), timeout=timeout)
    return subprocess.run([*PYTHON, "-X", "dev", MODULE, *argv], **given)


def script(code, *argv, **env):
    """Start a Python program, with `orq_min` to be imported."""
    start = "import signal, sys; sys.path.insert(0, %r)\n" % os.path.dirname(MODULE)
    given = dict(PIPES, stdin=subprocess.DEVNULL, env=clean_environment(**env))
    code = start + textwrap.dedent(code)
    return subprocess.Popen([*PYTHON, "-c", code, *argv], **given)


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
    return "\n".join([str(error), repr(error), getattr(error, "message", ""), *lines])


@contextlib.contextmanager
def logged(level=logging.DEBUG):
    """The records that the module writes, of this level and above."""
    logger, records = logging.getLogger(orq_min.__name__), []
    handler, before = logging.Handler(), logger.level
    handler.emit = records.append
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield records
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)


def resolving(*addresses):
    """Every name has these addresses."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", one) for one in addresses]
    return mock.patch("socket.getaddrinfo", lambda *_, **__: found)


@contextlib.contextmanager
def full_backlog():
    """An address that lets nobody in, and refuses nobody."""
    with contextlib.ExitStack() as stack:
        full, *waiting = (stack.enter_context(socket.socket()) for _ in range(9))
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for sock in waiting:
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        yield full.getsockname()


def client(service, **options):
    """A client of the stand-in."""
    given = dict({"api_key": service.key, "server_url": service.url}, **options)
    if service.tls and "ssl_context" not in options:
        given["ssl_context"] = trusting_context()
    return orq_min.Orq(**given)


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
                    if key in repr(value) and name not in ("api_key", "authorization"):
                        raise AssertionError("%s in %s" % (name, frame.f_code.co_name))
        error = error.__cause__ or error.__context__


class ServerTest(unittest.TestCase):
    """Starts stand-ins that repeat what is said, and clients of them that try once."""

    def setUp(self):
        self.enter(mock.patch.dict(os.environ, clean_environment(), clear=True))

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

    def outcome(self, orq, text="hi", kind=orq_min.OrqError, **given):
        """What a call returns or raises."""
        try:
            return self.call(orq, text, **given)
        except kind as error:
            return error

    def failure(self, orq, kind=orq_min.OrqError, **given):
        """What a call raises, with its frames, which assertRaises would clear."""
        error = self.outcome(orq, kind=kind, **given)
        self.assertIsInstance(error, kind)
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


class RefusalTest(LoopbackTest):
    """Makes wrong calls, after none of which anything was sent."""

    def refused(self, call, *args, **given):
        """{path: what is wrong there}."""
        with self.assertRaises(orq_min.ValidationError) as caught:
            call(*args, **given)
        self.assertEqual(self.service.connections, 0)
        error = caught.exception
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


class CommandTest(LoopbackTest):
    """Runs the real command line against the stand-in."""

    def setUp(self):
        super().setUp()
        self.env = {"ORQ_API_KEY": self.service.key, "ORQ_BASE_URL": self.service.url}
        self.folder = self.enter(tempfile.TemporaryDirectory())

    def command(self, *argv, env=None, **options):
        return run(*argv, env=dict(self.env, **(env or {})), **options)

    def start(self, *argv, **options):
        """Start it, with what `run` cannot give."""
        given = dict(PIPES, stdin=subprocess.DEVNULL, env=clean_environment(**self.env))
        given.update(options)
        process = subprocess.Popen([*PYTHON, MODULE, *argv], **given)
        self.addCleanup(process.wait, 30)
        self.addCleanup(process.kill)
        for stream in filter(None, (process.stdin, process.stdout, process.stderr)):
            self.addCleanup(stream.close)
        return process

    def shell(self, line, *argv):
        """Run it in a shell line, in which "$@" is the command."""
        given = dict(PIPES, stdin=subprocess.DEVNULL, env=clean_environment(**self.env))
        command = ["sh", "-c", line, "sh", *PYTHON, MODULE, *argv]
        return subprocess.run(command, timeout=30, **given)

    def write(self, name, content):
        path = pathlib.Path(self.folder, name)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

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
        self.assertNotIn(self.service.key, error)
        for word in words:
            self.assertIn(word, error)


# ----------------------------------------------------------------------------
# The file
# ----------------------------------------------------------------------------

WAYS_TO_LOAD = {  # the name of a copy, and code that makes `m` of it
    "host/net/orq.py": "from host.net import orq as m",
    "lib.zip": "sys.path[0] += '/lib.zip'; import orq_min as m",
    "plugin.py": """if True:  # not registered among the modules
        import importlib.util as u
        spec = u.spec_from_file_location('plugin', sys.path[0] + '/plugin.py')
        m = u.module_from_spec(spec); spec.loader.exec_module(m)""",
}
USE = """
message = m.A2AMessage("user", [m.TextPart("hi"), m.FilePart.from_bytes(b"x", "a.csv")])
res = m.create_response("my-agent", message)
print(m.__file__.startswith(sys.argv[1]), res.text, type(res.output[0].parts[0]))
"""
COPY = """
import copy, pickle, orq_min
orq = orq_min.Orq()
for _ in range(2):  # before its first call, and after it
    for refuse in (copy.deepcopy, pickle.dumps):
        try:
            refuse(orq)
        except TypeError as error:
            print(error)
    orq.agents.responses.create(agent_key="my-agent", message="hi")
"""


class OneFile(LoopbackTest):
    """It is one file that works wherever it is copied to, and help() explains it."""

    def python(self, code, *argv, **env):
        """What a Python prints that finds the key and the server."""
        env.update(ORQ_API_KEY=self.service.key, ORQ_BASE_URL=self.service.url)
        with script(code, *argv, **env) as process:
            output, error = process.communicate(timeout=30)
        self.assertEqual(error.decode(), "")
        return output.decode().strip()

    def test_it_works_wherever_it_is_copied_to_and_without_docstrings(self):
        source = pathlib.Path(MODULE).read_text(encoding="ascii")

        def use(name):
            with tempfile.TemporaryDirectory() as place:
                path = pathlib.Path(place, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                text = source
                if name == "host/net/orq.py":  # its annotations are text (PEP 563)
                    later = "\nfrom __future__ import annotations\nimport "
                    text = source.replace("\nimport ", later, 1)
                path.write_text(text, encoding="ascii")
                if name == "lib.zip":
                    with zipfile.ZipFile(str(path), "w") as archive:
                        archive.writestr("orq_min.py", source)
                code = "sys.path.insert(0, sys.argv[1])\n" + WAYS_TO_LOAD[name] + USE
                return self.python(code, place, PYTHONOPTIMIZE="2")

        wanted = r"True You said: hi \[file: a.csv, text/csv, 1 bytes\] .*TextPart'>"
        for printed in at_once(use, WAYS_TO_LOAD):
            self.assertRegex(printed, wanted)

    def test_a_client_cannot_be_copied_which_plain_words_say_at_any_time(self):
        printed = self.python(COPY).splitlines()
        self.assertEqual((len(printed), len(set(printed))), (4, 1), printed)
        self.assertIn("a client cannot be copied or pickled", printed[0])

    def test_help_shows_all_parameters(self):
        responses = orq_min.Responses
        for name in ("create", "get"):
            parameters = inspect.signature(getattr(responses, name)).parameters
            in_loop = inspect.signature(getattr(responses, name + "_async"))
            self.assertEqual(in_loop.parameters, parameters)
        text = pydoc.plain(pydoc.render_doc(responses.create_async))
        for name in list(inspect.signature(responses.create).parameters)[1:]:
            self.assertRegex(text, r"(?m)^ *%s: \w" % name)


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

    def test_the_documented_example_with_key_and_server_from_the_environment(self):
        self.service.agents.add("<value>")
        os.environ["ORQ_API_KEY"] = self.service.key + "\n"
        os.environ["ORQ_BASE_URL"] = " %s/some/prefix/\n" % self.service.url
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(SEED_EXAMPLE, {})
        self.assertIn("text='You said nothing.'", printed.getvalue())
        path = "/some/prefix/v2/agents/%3Cvalue%3E/responses"
        self.assertEqual(self.service.requests[0].path, path)

    def test_each_way_to_call_passes_everything_on_and_raises_the_same(self):
        responses, server = self.orq.agents.responses, self.server(reply("hi"))
        task = {"agent_key": "a", "task_id": "t", "server_url": server.url + "/p/"}
        body = {"variables": {"v": 1}, "contact": {"id": "c"}, "thread": {"id": "t"}}
        body.update(memory={"entity_id": "e"}, metadata={"m": 1}, background=True)
        whole = dict(body, message="hi", extra_body={"x": 1}, **task)
        wanted = dict(body, x=1, task_id="t", message=from_user(text_part("hi")))

        def in_loop(coroutine_function):
            return lambda **given: asyncio.run(coroutine_function(**given))

        quick = functools.partial(orq_min.create_response, api_key="k")
        create, get = in_loop(responses.create_async), in_loop(responses.get_async)
        ways = [(call, whole) for call in (responses.create, create, quick)]
        for call, given in [*ways, (responses.get, task), (get, task)]:
            self.assertEqual(call(http_headers={"X-T": "7"}, **given).text, "hi")
            request = server.requests[-1]
            self.assertTrue(request.path.startswith("/p/v2/agents/a/responses"))
            self.assertEqual(request.header("x-t"), ["7"])
            if given is whole:
                self.assertEqual(request.json(), wanted)
            server.next({"status": 429}, Connection.hang)
            for kind, more in (
                (orq_min.APIError, {}),
                (orq_min.APITimeoutError, {"timeout_ms": 200}),
                (orq_min.ValidationError, {"agent_key": ""}),
            ):
                self.assertRaises(kind, call, retries=None, **dict(given, **more))

    def test_no_exception_of_a_function_for_the_key_keeps_a_task_waiting(self):
        orq = client(self.service, api_key=iter(()).__next__)
        call = orq.agents.responses.create_async(agent_key="a", message="hi")
        with self.assertRaises(RuntimeError):  # Python makes it of a StopIteration
            asyncio.run(asyncio.wait_for(call, 2))


# ----------------------------------------------------------------------------
# What goes out
# ----------------------------------------------------------------------------


def dumped(content):
    """As pydantic's models are."""
    return types.SimpleNamespace(model_dump=lambda: content)


Color, Level = enum.Enum("Color", {"RED": "red"}), enum.IntEnum("Level", {"HIGH": 3})
Point = dataclasses.make_dataclass("Point", ["x", ("y", object, None)])
EAST = datetime.timezone(datetime.timedelta(hours=2))
CIRCLE = {}
CIRCLE["me"] = [CIRCLE]
ITSELF = types.SimpleNamespace(model_dump=lambda: ITSELF)
NO_DATE = type("NaTType", (datetime.date,), {"__eq__": lambda *_: False})  # pandas'
DEEP = functools.reduce(lambda value, _: [value], range(100000), [])

# fmt: off
CONVERSIONS = [  # free-form values, and what the service gets
    ({"a": [None, True, 1, 1.5, "é\ud800"]}, {"a": [None, True, 1, 1.5, "é\ud800"]}),
    (datetime.datetime(2025, 1, 2, 3, 4, tzinfo=EAST), "2025-01-02T03:04:00+02:00"),
    (datetime.datetime.fromtimestamp(0, datetime.timezone.utc), "1970-01-01T00:00:00Z"),
    (datetime.date(2025, 1, 2), "2025-01-02"), (datetime.time(3, 4, 5), "03:04:05"),
    (decimal.Decimal("1.10"), "1.10"), (uuid.UUID(int=5), str(uuid.UUID(int=5))),
    ([Color.RED, Level.HIGH], ["red", 3]), ([{5}, frozenset(["a"])], [[5], ["a"]]),
    ({Color.RED: 1, Level.HIGH: 2, 7: 3}, {"red": 1, "3": 2, "7": 3}),
    ((1, range(2), collections.deque([10**300])), [1, [0, 1], [10**300]]),
    ([[1]] * 2, [[1], [1]]), (types.MappingProxyType({"a": {}}), {"a": {}}),
    (Point(1, [Point(2)]), {"x": 1, "y": [{"x": 2, "y": None}]}),
    (pathlib.PurePosixPath("/a/b"), "/a/b"),
    (dumped([dumped(None), {"at": datetime.time(3)}]), [None, {"at": "03:00:00"}]),
]
REFUSALS = [  # free-form values without an honest JSON form; the path and the words
    (float("nan"), "", "nan has no JSON form"), (float("-inf"), "", "-inf has"),
    (b"raw", "", "bytes has"), (Point, "", "type has"), (10**100000, "", "int has"),
    (decimal.Decimal("sNaN"), "", "decimal.Decimal has"), (ITSELF, "", "amespace has"),
    (NO_DATE(2025, 1, 2), "", "NaTType has"), (CIRCLE, ".me[0]", "itself"),
    (DEEP, "[0]" * 98, "deep"), ([1, {"a": 1j}], "[1].a", "complex"),
    ({"a b": b""}, "['a b']", "bytes"), ({1.5: 1}, "[1.5]", "be a name"),
    (Point(1, b""), ".y", "bytes"),
]
OFFICE = "application/vnd.openxmlformats-officedocument."
FILES = {
    "a.csv": "text/csv", "b.c.MD": "text/markdown", "c.webp": "image/webp",
    "d.docx": OFFICE + "wordprocessingml.document",
    "e.xlsx": OFFICE + "spreadsheetml.sheet",
    "f.pptx": OFFICE + "presentationml.presentation",
    **dict.fromkeys(("a.odd", "a.tgz", "csv")),
}
# fmt: on


class Outgoing(LoopbackTest):
    """What goes out is what the contract's request tables say."""

    def sent(self, **given):
        self.create(**given)
        return self.service.requests[-1].json()

    def test_the_default_request_and_one_with_none(self):
        message = from_user(text_part("hi"))
        self.assertEqual(self.sent(), {"message": message, "background": False})
        wanted = {
            ("Content-Type", "application/json"),
            ("Accept", "application/json"),
            ("Authorization", "Bearer test-key-123"),
            ("Host", self.service.netloc),
            ("User-Agent", "orq_min/" + orq_min.__version__),
        }
        self.assertLessEqual(wanted, set(self.service.requests[0].headers))
        given = dict.fromkeys("task_id variables identity metadata background".split())
        given.update(contact={"id": "c", "email": None}, memory=None)
        body = self.sent(thread=orq_min.CreateAgentResponseThread("t", None), **given)
        wanted = {"message": message, "contact": {"id": "c"}, "thread": {"id": "t"}}
        self.assertEqual(body, wanted)

    def test_every_field_reaches_the_service_whether_object_or_mapping(self):
        m, uri = orq_min, {"uri": "https://x", "mimeType": "a/b", "name": "b"}
        file = {"bytes": "aGk=", "mimeType": "a/b", "name": "a.txt"}
        person = {"id": "c", "display_name": "Ada", "email": "a@b", "tags": ["t"]}
        person.update(logo_url="https://x/y", metadata=[{"k": None}])
        parts = [text_part("look"), {"kind": "file", "file": uri}]
        parts += [{"kind": "file", "file": file, "metadata": {"a": 1}}]
        expected = {"message": from_user(*parts, messageId="01ARZ3"), "metadata": {}}
        expected["variables"] = {"name": "Ada", "empty": {}, "none": None}
        expected.update(thread={"id": "t", "tags": []}, memory={"entity_id": "e"})
        expected.update(identity=person, background=True)
        given = copy.deepcopy(expected)
        body = self.sent(extra_body={"stream": False, "engine": "x"}, **given)
        self.assertEqual(body, dict(expected, stream=False, engine="x"))
        self.assertEqual(given, expected, "the caller's mappings were changed")

        given.update(identity=m.Identity(**dict(person, tags=collections.deque("t"))))
        given.update(thread=m.CreateAgentResponseThread("t", ()))
        given.update(memory=types.MappingProxyType({"entity_id": "e"}))
        file = {"bytes_": "aGk=", "mime_type": "a/b", "name": "a.txt"}
        for file in (file, m.BinaryFormat(**file)):
            objects = [m.TextPart("look"), m.FilePart(m.FileInURIFormat(*uri.values()))]
            objects += [m.FilePart(file, {"a": 1})]
            given.update(message=m.A2AMessage("user", objects, "01ARZ3"))
            self.assertEqual(self.sent(**given), expected)
        self.assertEqual(self.sent(contact=m.Contact(**person))["contact"], person)

    def test_a_tool_result_may_be_any_json(self):
        results = [{"a": None}, [], "text", 0, False]
        parts = [orq_min.ToolResultPart("c", each, {"m": 1}) for each in results]
        self.service.next(reply("thanks"))
        body = self.sent(message=orq_min.A2AMessage("tool", parts))
        wanted = [vars(part) for part in parts]  # none of whose names differs in JSON
        self.assertEqual(body["message"], {"role": "tool", "parts": wanted})

    def test_an_agent_key_is_one_segment_of_the_path(self):
        for agent in ("a b", *"a/../b x?y é#%2F ... a;b \x00".split(" ")):
            self.service.agents.add(agent)
            self.assertEqual(self.create(agent_key=agent).text, "You said: hi")
            path = self.service.requests[-1].path
            self.assertRegex(path, "^/v2/agents/[A-Za-z0-9._~%-]+/responses$")

    def test_free_form_values_are_converted_as_the_official_client_does(self):
        free, wanted = ({"v": list(column)} for column in zip(*CONVERSIONS))
        given = {"contact": {"id": "c", "metadata": [free]}}
        given["extra_body"] = types.MappingProxyType({"conversation": free})
        body = self.sent(variables=free, metadata=free, **given)
        for where in ("variables", "metadata", "conversation"):
            self.assertEqual(body[where], wanted)
        self.assertEqual(body["contact"]["metadata"], [wanted])

    def test_files_are_attached_with_their_type(self):
        m, uri = orq_min, "https://example.com/a/report.pdf?x=1.txt#y"
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "b.PDF")
            path.write_bytes(b"\x00\xffabc")
            for given, mime_type in ((None, "application/pdf"), ("a/b", "a/b")):
                by_path = m.FilePart.from_path(path, mime_type=given)
                made = m.FilePart.from_bytes(bytearray(b"\x00\xffabc"), "b.PDF", given)
                wanted = m.FilePart(m.BinaryFormat("AP9hYmM=", mime_type, "b.PDF"))
                self.assertEqual([by_path, made], [wanted] * 2)
                file = m.FilePart.from_uri(uri, mime_type=given).file
                self.assertEqual(file, m.FileInURIFormat(uri, mime_type))
            self.assertRaises(OSError, m.FilePart.from_path, folder + "/missing")
        for place in ("https://host.pdf", "https://host?f=/a.pdf", "http://[/a#/b.pdf"):
            self.assertIsNone(m.FilePart.from_uri(place).file.mime_type)
        with self.assertRaisesRegex(m.ValidationError, "content.*'a'.*, not empty"):
            m.FilePart.from_bytes(b"", "a")
        with mock.patch("mimetypes.guess_type", return_value=("of/machine", None)):
            made = [m.FilePart.from_bytes(b"x", name).file for name in FILES]
        self.assertEqual({file.name: file.mime_type for file in made}, FILES)


# Parameter -> what is added to it in the paths that must be named -> wrong values
# fmt: off
WRONG_VALUES = {
    "message": {
        "": [None, 5, [], orq_min.TextPart("hi")],
        ".role .parts": [{}, {"role": "agent", "parts": "hi"}],
        ".parts[0] .parts[1].kind": [from_user("hi", {"kind": ["text"]})],
        ".parts[0].text .parts[0].texd": [from_user({"kind": "text", "texd": "x"})],
        ".parts[0].file.uri": [from_user({"kind": "file", "file": {}})],
    },
    "task_id": {"": [5]}, "metadata": {"": [3]}, "background": {"": ["yes", 1]},
    "variables": {"": [[], "a=b"], "[5.5] .a": [{5.5: 1, "a": b""}]},
    "contact": {
        "": ["c", orq_min.Memory("x")], ".id .email": [{"email": 5}],
        ".tags": [{"id": "c", "tags": tags} for tags in ("abc", {"a"}, {})],
        ".metadata[0] [5]": [{"id": "c", "metadata": ["a"], 5: 1}],
    },
    "identity": {"": [5], ".id .name": [{"name": "a"}]},
    "thread": {".id": [{"id": None}]}, "memory": {".entity_id .x": [{"x": 1}]},
    "extra_body": {"": [[]], ".x": [{"x": b""}], ".stream": [{"stream": True}]},
}
WRONG_VALUES["extra_body"].update(  # which overwrites none of them
    {"." + name: [{name: None}] for name in WRONG_VALUES if name != "extra_body"}
)
WRONG_VALUES_OF_BOTH = {  # and of `get`
    "agent_key": {"": ["", " ", ".", "..", None, b"x", "\ud800"]},
    "retries": {"": ["backoff", True, {}, orq_min.BackoffStrategy()]},
    "timeout_ms": {"": [0, -1, "5", True, float("nan"), float("inf"), 10**400]},
    "http_headers": {"": [["a"]]},
}
WRONG_OBJECTS = {  # what builds one, and the text of the error
    "TextPart(1, kind='file')": "text: must be text; kind: must be 'text'",
    "BinaryFormat(b'', 5)": "bytes: must be text; mimeType: must be text",
    "FilePart('a.txt', 5)": "file: must be an object; metadata: must be an object",
    "FilePart({'bytes': '', 'uri': 'x'})": "file.uri: unknown field",
    "A2AMessage('agent', 'hi')":
        "role: must be 'user' or 'tool'; parts: must be a list",
    "Identity(None, tags=[1])": "id: required; tags[0]: must be text",
    "BackoffStrategy(-1)": "initial_interval: must be a number, 0 or more",
}
# fmt: on


class Refused(RefusalTest):
    """A wrong call is refused before anything is sent, all of it at once, by path."""

    def test_all_that_is_wrong_is_said_at_once_by_its_path(self):
        wrong = {"agent_key": "..", "http_headers": {"Host": "x"}, "background": 1}
        wrong.update(extra_body={"message": 1}, message=from_user({}), task_id=5)
        wrong["contact"] = {"id": "c", "display_nmae": "Ada"}
        wrong["variables"] = {"when": [1, 2, float("nan")]}
        of_client = {"server_url": "nonsense", "timeout_ms": -5, "retry_config": 5}
        with orq_min.Orq("", **of_client) as orq:
            found = self.refused(orq.agents.responses.create, **wrong)
        wanted = {*wrong, "api_key", "server_url", "timeout_ms", "retries"}
        self.assertEqual({path.partition(".")[0] for path in found}, wanted)
        self.assertIn("'tool_result'", found["message.parts[0].kind"])
        self.assertEqual(found["contact.display_nmae"], "unknown field")
        self.assertEqual(found["background"], "must be true or false")
        self.assertIn("ssl_context", self.refused(orq_min.Orq, ssl_context=5))

    def test_wrong_parameters_are_named(self):
        get = functools.partial(self.orq.agents.responses.get, agent_key="a")
        self.assert_refused(get, {"task_id": WRONG_VALUES_OF_BOTH["agent_key"]})
        self.assert_refused(functools.partial(get, task_id="t"), WRONG_VALUES_OF_BOTH)
        self.assert_refused(self.create, dict(WRONG_VALUES_OF_BOTH, **WRONG_VALUES))

    def test_free_form_values_without_a_json_form_are_refused_by_path(self):
        values = [value for value, _, _ in REFUSALS]
        found = self.refused(self.create, variables={"v": values})
        self.assertEqual(len(found), len(values))
        for n, (_, path, words) in enumerate(REFUSALS):
            self.assertIn(words, found["variables.v[%d]%s" % (n, path)])

    def test_wrong_objects_are_refused_when_they_are_built_and_at_the_call(self):
        for code, text in WRONG_OBJECTS.items():
            with self.subTest(code):
                found = self.refused(eval, code, dict(vars(orq_min)))
                self.assertEqual("; ".join(map("%s: %s".__mod__, found.items())), text)
        message = orq_min.A2AMessage("user", [orq_min.TextPart("hi")])
        message.parts[0].text = 5
        found = self.refused(self.create, message=message)
        self.assertEqual(list(found), ["message.parts[0].text"])


# ----------------------------------------------------------------------------
# What comes in
# ----------------------------------------------------------------------------


def task_that(state, **more):
    return {"id": "t", "kind": "task", "status": dict({"state": state}, **more)}


MORE = {"metadata": {"k": 1}}
OOPS = {"kind": "error", "error": "oops", "code": 7}
# fmt: off
PUBLISHED = {
    "_id": "r1", "task_id": "t1", "created_at": "2025-11-20T09:30:00Z", "model": "p/m",
    "output": [
        {"messageId": "m0", "role": "user", "parts": [text_part("?")]},
        {"role": "tool", "parts": [text_part("never")]},
        {"parts": [text_part("A")]},
        from_agent(
            text_part("B", brand_new=5), OOPS,
            {"kind": "tool_call", "tool_name": "f", "arguments": {}, **MORE},
            {"kind": "data", "data": {"a": 1}, **MORE},
            {"kind": "tool_result", "tool_call_id": "c", "result": [1], **MORE},
            {"kind": "file", "file": {"bytes": "aGk=", "mimeType": "a/b"}, **MORE},
            {"kind": "file", "file": {"uri": "https://x", "name": "n"}},
            {"kind": "reasoning", "text": "hm", "keys": 2, "get": 3, "__class__": 1},
            text_part("C", __init__=9, get=3), **MORE
        ),
    ],
    "usage": {
        "completion_tokens": 1, "total_tokens": 3,
        "prompt_tokens_details": {"audio_tokens": 0, "cache_creation_tokens": 2},
        "completion_tokens_details": {"reasoning_tokens": 1, "audio_tokens": 0},
    },
    "pending_tool_calls": [
        {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}},
    ],
    "telemetry": {"trace_id": "a", "span_id": "b"}, "finish_reason": "stop",
    "status": "completed", "brand_new": {"x": 1}, "id": "another",
    "text": 7, "raw": 7, "__dict__": 7, "self": 7,
}
PUBLISHED_TYPES = """
    CreateAgentResponseResponseBody Output TextPart Output TextPart Output TextPart
    Output TextPart ErrorPart ToolCallPart DataPart ToolResultPart FilePart BinaryFormat
    FilePart FileInURIFormat UnknownPart TextPart CreateAgentResponseUsage
    PromptTokensDetails CompletionTokensDetails PendingToolCalls Function Telemetry
""".split()
# Names of Python's, which do no harm, and what is read otherwise
HIDDEN = set("_id id get text raw __class__ __dict__ __init__".split())
SURPRISES = [None, 1.5, "text", [], [None, 5, "x", [], {}], {"kind": 5}]

WHY = from_agent(text_part("be"), text_part("cause"))
RECOVERED = {"output": [from_agent(OOPS, text_part("fine"))], "error": "no"}
ERRORS = [  # answer, its `error`
    ({"output": [from_agent(OOPS, role="user")], "error": {}}, None),
    *((task_that(state, message=WHY), None) for state in ("completed", "working", 5)),
    ({"status": ["failed"]}, None), (dict(RECOVERED, status="completed"), None),
    (dict(task_that("completed"), **RECOVERED), None),
    (RECOVERED, "no; oops"), (dict(RECOVERED, status="working"), "no; oops"),
    ({"output": [from_agent({"kind": "error"}, role=None)]}, "error"),
    ({"error": {"message": "no", "code": 5}}, "no"), ({"error": ["é"]}, '["é"]'),
    ({"status": "failed"}, "failed"), ({"status": "failed", "error": "no"}, "no"),
    (task_that("canceled", message={"parts": []}), "canceled"),
    (task_that("rejected", message=WHY), "because"),
]
# fmt: on


class Incoming(LoopbackTest):
    """No 2XX with a JSON object is refused, and nothing of it is lost."""

    def answer(self, body):
        self.service.next(dict(body=body))
        return self.create()

    def assert_reads_as(self, value, came):
        """An object reads as the JSON that came, down to the last."""
        if isinstance(came, list):
            for pair in zip(value, came):
                self.assert_reads_as(*pair)
        elif isinstance(value, dict) or not isinstance(came, dict):
            self.assertEqual(value, came)
        else:
            for name in came.keys() - HIDDEN:
                self.assertIn(name, value)
                self.assertIs(value.get(name), value[name])
                self.assert_reads_as(value[name], came[name])
            self.assertEqual((value.get("absent"), value.get("absent", 5)), (None, 5))
            self.assertRaises(KeyError, lambda: value["absent"])

    def test_the_published_shape_becomes_objects_that_read_as_dicts_too(self):
        res = self.answer(PUBLISHED)
        for again in (res, copy.deepcopy(res), pickle.loads(pickle.dumps(res))):
            self.assertEqual((again, again.raw), (res, PUBLISHED))
            self.assertEqual((again.text, again.error), ("A\nBC", None))
            self.assert_reads_as(again, PUBLISHED)
        shown = repr(res).replace("namespace(", "UnknownPart(")  # as PyPy shows it
        self.assertEqual(re.findall(r"\w+(?=\()", shown), PUBLISHED_TYPES)
        self.assertEqual((res.id, res["id"], res.brand_new), ("r1", "r1", {"x": 1}))
        asked, _, _, message = res.output
        unknown, file = message.parts[7], message.parts[5].file
        self.assertEqual((unknown.kind, unknown.text), ("reasoning", "hm"))
        self.assertIn("kind='reasoning', text='hm'", repr(unknown))
        self.assertEqual((asked.message_id, asked["message_id"]), ("m0", "m0"))
        self.assertEqual((file.mime_type, file["bytes_"]), ("a/b", "aGk="))
        self.assertEqual((res.usage.prompt_tokens, message.message_id), (None, None))
        self.assertNotIn("messageId", message)  # None counts as missing

    def test_a_field_that_did_not_come_is_none_or_a_default_if_built_by_hand(self):
        m, nothing = orq_min, [None] * 7
        res = self.answer({})
        wanted = m.CreateAgentResponseResponseBody(None, None, [], *nothing, {})
        self.assertEqual((res, res.text, res.error), (wanted, "", None))
        (output,) = self.answer({"output": [{}]}).output
        self.assertEqual(output, m.Output(None, None, [], None))
        parts = [m.TextPart("Hel"), m.TextPart("lo"), m.ErrorPart("no money")]
        res = m.CreateAgentResponseResponseBody(output=[m.Output(parts=parts)])
        self.assertEqual((res.text, res.error, res.task_id), ("Hello", "no money", ""))

    def test_a_run_that_failed_says_so_in_error_and_one_that_recovered_does_not(self):
        for body, error in ERRORS:
            with self.subTest(body=body):
                res, status = self.answer(body), body.get("status")
                self.assertEqual((res.error, res.id), (error, body.get("id")))
                state = status.get("state") if isinstance(status, dict) else status
                self.assertEqual(res.status, state if isinstance(state, str) else None)

    def test_surprising_types_stay_as_they_came(self):
        def variants(value, surprise):
            """The value with each thing in it replaced by the surprise in turn."""
            yield surprise
            length = len(value) if isinstance(value, list) else 0
            for key in value if isinstance(value, dict) else range(length):
                for changed in variants(value[key], surprise):
                    variant = copy.copy(value)
                    variant[key] = changed
                    yield variant

        bodies = []
        for surprise in SURPRISES:
            bodies += [{"error": surprise}, task_that("failed", message=surprise)]
            bodies += list(variants(PUBLISHED, surprise))[1:]
        for body in bodies:
            res = self.answer(body)
            self.assertEqual(res.raw, body)
            self.assertIsInstance(res.text, str)
            self.assertIsInstance(res.error, (str, type(None)))

    def test_an_answer_may_be_any_json_that_python_reads(self):
        for body in (
            b'\xef\xbb\xbf{"_id": "r"}',
            '{"_id": "r"}'.encode("utf-16"),
            b' {"_id": "x", "n": "\\ud800\xff", "m": [NaN, 1e999], "_id": "r"}\n',
        ):
            self.assertEqual(self.answer(body).id, "r")

    def test_get_fetches_what_came_of_a_run_in_the_background(self):
        self.service.background_seconds = float("inf")
        get = self.orq.agents.responses.get
        for agent, text, state, words in (
            ("my-agent", "fail", "failed", "The agent failed, as it was told to."),
            ("task-agent", "hi", "completed", "You said: hi"),
        ):
            begun = self.create(agent_key=agent, message=text, background=True)
            self.assertEqual((begun.output, begun.text, begun.error), ([], "", None))
            fetch = functools.partial(get, agent_key=agent, task_id=begun.task_id)
            self.assertIn(fetch().status, ("in_progress", "working"))
            self.service.tasks[begun.task_id].ends = 0
            res = fetch()
            self.assertEqual((res.status, res.task_id), (state, begun.task_id))
            self.assertEqual(res.error or res.text, words)
        self.assertRaises(orq_min.APIError, get, agent_key="a", task_id="a/../b?c")
        request = self.service.requests[-1]
        path = "/v2/agents/a/responses/a%2F..%2Fb%3Fc"
        self.assertEqual((request[:2], request.body), (("GET", path), b""))
        self.assertEqual(request.header("Content-Type"), [])


# ----------------------------------------------------------------------------
# Errors
# ----------------------------------------------------------------------------

WORDS, XS = "no such thing", "x" * 999
# fmt: off
MESSAGES = [  # the body of an answer, the message of the error
    ({"code": 404, "message": WORDS, "error": "Not Found"}, WORDS), ({"error": XS}, XS),
    ({"message": {"fr": "é"}}, '{"fr": "é"}'),
    ({"error": {"message": WORDS}}, WORDS), ({"error": [WORDS]}, '["%s"]' % WORDS),
    ({"detail": [{"msg": WORDS}]}, "Not Found"), ([WORDS], "Not Found"),
]
NO_OBJECTS = {  # a body, its data; one is nested too deeply for Python
    b"": None, b"<b>\nBad \x1b[2Jgateway": None, b"\xc3\xa9 \xe9": None,
    b"[" * 99999: None, b"null": None, b"[]": [], b"5": 5,
}
# fmt: on


class Errors(LoopbackTest):
    """One family of errors, with what the server said, which travels anywhere."""

    def error(self, *steps, **given):
        self.service.next(*steps)
        return self.failure(self.orq, retries=None, **given)

    def api_error(self, body, status):
        headers = {"X-Request-Id": "r-1"}
        return self.error(dict(status=status, body=body, headers=headers))

    def errors(self):
        """One of each class, as they are raised."""
        return [
            self.api_error({"message": "no"}, 404),
            self.error(hang_up),
            self.error(Connection.hang, timeout_ms=200),
            self.error(agent_key=""),
            orq_min.OrqError("x"),
        ]

    def test_each_has_a_message_and_the_attributes_of_an_answer(self):
        error, *others = self.errors()
        self.assertEqual((error.message, error.status_code), ("no", 404))
        self.assertEqual(error.body, '{"message": "no"}')
        self.assertEqual(error.headers["x-request-ID"], "r-1")
        for error in (*others, orq_min.APIError("as a test makes one")):
            for name in ("status_code", "headers", "body", "data"):
                self.assertIsNone(getattr(error, name))
            self.assertEqual(error.message, str(error))

    def test_the_message_is_the_servers_and_the_text_shows_the_body(self):
        start = "POST %s/v2/agents/my-agent/responses: 404 Not" % self.service.url
        for body, message in MESSAGES:
            with self.subTest(body=body):
                error = self.api_error(body, 404)
                self.assertEqual((error.message, error.data), (message, body))
                shown = json.dumps(body, ensure_ascii=False)[:500]
                wanted = "%s Found: %s (x-request-id: r-1)" % (start, shown)
                self.assertEqual(str(error), wanted)

    def test_any_other_body_is_kept_as_text_whatever_the_status(self):
        cases = itertools.product(NO_OBJECTS.items(), (200, 202, 400, 599))
        for (body, data), status in cases:
            with self.subTest(body=body[:20], status=status):
                error = self.api_error(body, status)
                self.assertEqual((error.status_code, error.data), (status, data))
                self.assertEqual(error.body, body.decode("utf-8", "replace"))
                self.assertEqual(error.message, http.client.responses.get(status, ""))
                self.assertEqual("no readable JSON" in str(error), status < 300)
                self.assertIn(error.body[:3], str(error))
                self.assertTrue(str(error).isprintable(), str(error))  # on one line

    def test_no_complete_answer_is_a_connection_error_that_says_what_happened(self):
        for step in (hang_up, break_off, cut_off, then_close(b"SSH-2.0-x\r\n\r\n")):
            error = self.error(step)
            self.assertRegex(str(error), "POST %s.*may have run" % self.service.url)
            self.assertEqual((error.sent, error.temporary), (True, True))
        self.assertIn("0.2 s", str(self.error(Connection.hang, timeout_ms=200)))
        error = self.error(server_url=closed_url())
        self.assertRegex(str(error), "not sent: .*refused")
        self.assertEqual((error.sent, error.temporary), (False, True))

    def test_they_pickle_and_copy(self):
        def traits(error):
            return repr(error), str(error), {n: str(v) for n, v in vars(error).items()}

        for error in self.errors():
            for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
                again = pickle.loads(pickle.dumps(error, protocol))
                self.assertEqual(traits(again), traits(error))
            self.assertEqual(traits(copy.deepcopy(error)), traits(error))


# ----------------------------------------------------------------------------
# The key, headers and server
# ----------------------------------------------------------------------------

BAD_SERVERS = r"""
    my.orq.ai ftp://my.orq.ai http:///x https://user@my.orq.ai https://my.orq.ai/a\b
    https://my.orq.ai/? https://my.orq.ai/# https://my.orq.ai:0 https://my.orq.ai:65536
    http://[::1 http://::1/ http://[1.2.3.4] https://a\b https://my..orq.ai
""".split()
BAD_SERVERS += ["", " ", 5, "https://my orq.ai", "https://my.orq.ai/a b"]
BAD_SERVERS += ["https://%s.ai" % ("x" * 64), "https://x\r\nX: y", "http\u017f://x"]
BAD_SERVERS += ["https://my.orq.ai" + c for c in ("é.x", "\uff0f.x", "/\0", "/\ud800")]
GOOD_SERVERS = {  # what a request to it begins with
    " https://my.orq.ai\n": "https://my.orq.ai/v2/",
    "HTTP://host:8080/x%20y///": "HTTP://host:8080/x%20y/v2/",
    "https://[2001:db8::1]/p": "https://[2001:db8::1]/p/v2/",
}
# fmt: off
BAD_KEYS = {  # what is said of them
    "required: set ORQ_API_KEY": [None, "", " \n", "Bearer", lambda: None],
    "must be text, or a function": [5, b"SECRET", lambda: b"SECRET",
                                    functools.partial(asyncio.sleep, 0)],  # a coroutine
    "a quote": ['"SECRET"', ' "Bearer SECRET"\n', functools.partial(str, "'SECRET'")],
    "character": ["SECRET%sX" % c for c in "\n\0\x7f€\ud800\x85\t"],
}
KEYS = {  # and what is sent
    "  k\n": "Bearer k", "bEARER k\r\n": "bEARER k", "Bearerk": "Bearer Bearerk",
    "ké": "Bearer ké", "\ufeff Bearer k": "Bearer k",
}
BAD_HEADERS = {  # what is said of the last header of each
    "an invalid name, a duplicate, or set by us": [
        *({name: "1"} for name in ("Host", "content-LENGTH", "Transfer-Encoding")),
        *({name: "1"} for name in ("connection", "", "a b", "a:b", "a\r\nb", "é", 5)),
        {"x-a": "1", "X-A": "2"},
    ],
    "must be text in latin-1, on one line, not empty": [
        *({"x": text} for text in ("a\r\nX: b", "a\nb", "\0", "€", 5, None, b"x")),
        *({"authorization": text} for text in ("", " \t", "a\nb")),
    ],
}
# fmt: on


class TheKeyAndTheServer(RefusalTest):
    """The key goes to one place: what could send it elsewhere is refused."""

    def test_a_server_url_is_an_address_and_nothing_else(self):
        unknown = socket.gaierror(socket.EAI_NONAME, "unknown")
        # so that a mistake does not reach the network
        self.enter(mock.patch("socket.getaddrinfo", side_effect=unknown))
        self.assert_refused(self.create, {"server_url": {"": BAD_SERVERS}})
        for url, expected in GOOD_SERVERS.items():
            error = self.failure(self.orq, server_url=url)
            self.assertIn("POST %sagents/my-agent/" % expected, str(error))
        os.environ["ORQ_BASE_URL"] = " \n"  # the default is Orq's own
        with orq_min.Orq("key") as orq:
            self.assertIn("POST https://my.orq.ai/v2/agents/", str(self.failure(orq)))

    def test_a_key_that_cannot_be_sent_is_refused_and_not_repeated(self):
        self.enter(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # nobody awaits the coroutine
        for words, keys in BAD_KEYS.items():
            for key in keys:
                with self.subTest(key=key), client(self.service, api_key=key) as orq:
                    error = self.failure(orq, orq_min.ValidationError)
                    self.assertRegex(str(error), "^api_key: [^;]*" + words)
                    self.assertNotIn("SECRET", "%s %r" % (error, error))
                    assert_no_local_holds("SECRET", error)
        self.assertEqual(self.service.connections, 0)

    def test_a_key_is_sent_without_what_files_and_shells_leave_at_its_ends(self):
        keys = iter(KEYS)  # the function is asked for each call
        orq = self.enter(client(self.service, api_key=lambda: next(keys)))
        for sent in KEYS.values():
            self.failure(orq, orq_min.APIError)
            self.assertEqual(self.service.requests[-1].header("authorization"), [sent])

    def test_an_authorization_of_the_callers_stands_for_the_key(self):
        whole = {"auTHORIZATION": "Bearer " + self.service.key}
        for key in (None, '"in quotes"', lambda: 1 / 0):
            orq = self.enter(client(self.service, api_key=key))
            self.assertEqual(self.call(orq, http_headers=whole), "You said: hi")

    def test_headers_are_latin_1_on_one_line_and_none_of_the_clients_own(self):
        for words, wrong in BAD_HEADERS.items():
            for headers in wrong:
                with self.subTest(headers=headers):
                    *_, name = headers
                    found = self.refused(self.create, http_headers=headers)
                    ((path, problem),) = found.items()
                    paths = "http_headers.%s" % name, "http_headers[%r]" % name
                    self.assertIn(path, paths)
                    self.assertIn(words, problem)
        self.create(http_headers={"X-own": " padded é\r\n"})
        self.assertEqual(self.service.requests[0].header("x-own"), ["padded é"])


# ----------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------


def only_text(*texts):
    return from_user(*map(text_part, texts))


class MainTest(CommandTest):
    """Runs the command line within this process, which is faster."""

    def setUp(self):
        super().setUp()
        log = logging.getLogger(orq_min.__name__)
        self.addCleanup(log.setLevel, log.level)
        self.addCleanup(setattr, log, "handlers", log.handlers[:])

    def command(self, *argv, stdin=b"", env=None, encoding="utf-8"):
        if isinstance(stdin, bytes):
            stdin = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
        given = mock.patch.dict(os.environ, dict(self.env, **(env or {})))
        new = functools.partial(tempfile.TemporaryFile, "w+", encoding=encoding)
        with new() as stdout, new() as stderr, given:
            streams = {"stdin": stdin, "stdout": stdout, "stderr": stderr}
            with mock.patch.multiple("sys", **streams):
                try:
                    status = orq_min.main(argv)
                except SystemExit as end:  # of --help and --version
                    status = end.code
            for stream in (stdout, stderr):
                stream.seek(0)
            shown = stdout.buffer.read(), stderr.buffer.read()
        return subprocess.CompletedProcess(argv, status, *shown)

    def dry(self, *argv, **options):
        """The body that it would send."""
        shown = self.said("--dry-run", *argv, **options)
        return json.loads(shown.partition("\n\n")[2])

    def shown(self, body, *options):
        """(exit status, output, errors) for such an answer of the service."""
        self.service.next({"body": body})
        done = self.command(*HELLO, *options)
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    def assertRefused(self, *cases, **options):
        """Each case is a line or its words, and what its error must hold."""
        for argv, *words in cases:
            argv = argv.split() if isinstance(argv, str) else argv
            with self.subTest(argv=argv, **options):
                self.assertFails(self.command(*argv, **options), 2, *words)
        self.assertEqual(self.service.requests, [])


ID_OPTIONS = ["--identity", "--contact", "--thread", "--memory"]
JSON_OPTIONS = ["--variables", "--metadata", *ID_OPTIONS, "--extra-body"]
HELLO = ["my-agent", "Hello"]
ANSWER = "You said: Hello\n"
ONE_LINE = r"\Aorq_min: [^\n]*%s[^\n]*\n\Z"
WRONG_SECONDS = "soon", "0", "-1", "nan", "inf"


class TheCommandTakesAMessage(MainTest):
    """What is typed, piped or named reaches the service as it was meant."""

    def test_each_option_sets_its_field(self):
        self.assertEqual(self.said(*HELLO), ANSWER)
        body = {"message": only_text("Hello"), "background": False}
        self.assertEqual(self.service.requests[-1].json(), body)
        wanted = {"variables": {"n": [1, None]}, "metadata": {"m": 1.5}}
        wanted.update(identity={"id": "c", "tags": []}, thread={"id": "t"})
        wanted.update(memory={"entity_id": "e"})
        task_id = self.create().task_id
        options = ["--background", "--task-id", task_id]
        options += ["--extra-body", '{"engine": "x"}']
        for name, value in wanted.items():
            options += ["--" + name, json.dumps(value)]
        wanted.update(body, background=True, task_id=task_id, engine="x")
        self.assertEqual(self.sent(*options, *HELLO), wanted)
        for option in ID_OPTIONS:
            name = "entity_id" if option == "--memory" else "id"
            self.assertEqual(self.dry(*HELLO, option, "12")[option[2:]], {name: "12"})
        values = ["n=1", "e=a=b", "empty=", "who=@me", 'o={"a": 1}', '{"j": "="}']
        wanted = dict(n="1", e="a=b", empty="", who="@me", o='{"a": 1}', j="=")
        for option in ("--variables", "--metadata"):
            argv = itertools.chain(*([option, value] for value in values))
            self.assertEqual(self.dry(*HELLO, *argv)[option[2:]], wanted)

    def test_options_stand_anywhere_before_two_dashes(self):
        for line, text in (
            ("--thread=t --no-retry -- my-agent --json", "--json"),
            ("my-agent --thread t hi --timeout 9", "hi"),
        ):
            wanted = {"message": only_text(text), "thread": {"id": "t"}}
            self.assertEqual(self.dry(*line.split()), dict(wanted, background=False))

    def test_json_is_read_from_the_option_a_file_and_standard_input(self):
        result = dict(kind="tool_result", tool_call_id="c", result={"x": "é"})
        tool = {"role": "tool", "parts": [result]}
        text, memory = only_text("é"), {"entity_id": "é"}
        for line, name, value, sent in (
            ("--message ", "message", text, text),
            ("hi --memory ", "memory", memory, memory),
            ("hi --variables ", "variables", memory, memory),
            ("--tool-result c=", "message", result["result"], tool),
        ):
            *argv, begun = line.split(" ")
            value = json.dumps(value, ensure_ascii=False) + "\r\n"
            for codec in ("utf-8", "utf-8-sig", "utf-16"):  # as a shell may write it
                content = value.encode(codec)
                for given in (value, "@" + self.write("é.json", content), "@-"):
                    body = self.dry("my-agent", *argv, begun + given, stdin=content)
                    self.assertEqual(body[name], sent)

    def test_files_are_attached_after_the_texts_in_order(self):
        url = "https://example.com/a/figures.csv?x=1"
        files = ["--file", self.write("report.pdf", b"%PDF"), "--file", url]
        piped = b"\xff\xfe\x00 not text \n"
        body = self.sent(*files, "--file", "-", *HELLO, stdin=piped)
        parts = body["message"]["parts"]
        self.assertEqual(parts[0], text_part("Hello"))
        first, second, third = (part["file"] for part in parts[1:])
        named = first["name"], first["mimeType"], base64.b64decode(first["bytes"])
        self.assertEqual(named, ("report.pdf", "application/pdf", b"%PDF"))
        self.assertEqual(second["uri"], url)
        self.assertEqual(base64.b64decode(third["bytes"]), piped)
        body = self.sent("my-agent", "--file", "-", stdin=piped)
        self.assertEqual(body["message"]["parts"], parts[3:])
        body = self.sent(*files, *HELLO, "-", stdin=b"b")
        wanted = [text_part("Hello"), text_part("b"), *parts[1:3]]
        self.assertEqual(body["message"]["parts"], wanted)

    def test_standard_input_is_the_message_or_a_second_text(self):
        pairs = [("zwei\nü\n", "zwei\nü"), (" a\r\n\r\n", " a\r\n"), ("a", "a")]
        lines = "my-agent", "--no-retry my-agent -", "my-agent Look -"
        for (piped, text), line in itertools.product(pairs, lines):
            wanted = only_text(*(["Look"] if "Look" in line else []), text)
            for codec in ("utf-8", "utf-8-sig"):
                body = self.dry(*line.split(), stdin=piped.encode(codec))
                self.assertEqual(body["message"], wanted)
        # Else it is not read: a shell's loop over its lines keeps working.
        stdin = mock.Mock(**{"isatty.return_value": False})
        stdin.read.side_effect = stdin.buffer.read.side_effect = AssertionError
        file, message = self.write("a", b"a"), json.dumps(only_text("x"))
        for argv in (["Hello"], ["--message", message], ["--file", file]):
            self.dry("my-agent", *argv, stdin=stdin)
        self.dry("my-agent", "--tool-result", "c=1", stdin=stdin)
        self.service.background_seconds = 0
        task_id = self.said(*HELLO, "--background", stdin=stdin).strip()
        done = self.said("my-agent", "--wait", task_id, stdin=stdin)
        self.assertEqual(done, ANSWER)


class WrongUsageSendsNothing(MainTest):
    """What is wrong is said in one line with exit status 2, and nothing is sent."""

    def test_what_does_not_go_together_is_refused(self):
        message = json.dumps(only_text("x"))
        a, b = (self.write(name, message) for name in ("a.csv", "b.csv"))
        whole = "my-agent --message @" + a
        self.assertRefused(
            *((whole + more, "--message") for more in (" Hello", " -", " --file " + b)),
            ("my-agent Hello --tool-result c=1", "--tool-result"),
            ("my-agent Hello --retry --no-retry", "--retry", "--no-retry"),
            # so does a shell expand *.csv: the second name would be the message
            (["my-agent", "--file", a, b], "MESSAGE", "--file"),
            *((line, "MESSAGE", "'-'") for line in ("a b c", "a - c", "a b - -")),
            stdin=b"piped",
        )

    def test_what_is_empty_missing_or_was_read_before_is_refused(self):
        options = ["--file -", *(option + " @-" for option in JSON_OPTIONS)]
        lines = ["my-agent Hello " + option for option in options]
        lines += ["my-agent", "my-agent Hello -", "my-agent --message @-"]
        self.assertRefused(*((line, "empty") for line in lines), stdin=b" \t\r\n")
        lines = ["my-agent - -", "my-agent --tool-result a=@- --tool-result b=@-"]
        lines += ["my-agent Hello - " + option for option in options]
        lines += ["my-agent " + option for option in options[1:]]  # no other message
        cases = [(line, "was read before") for line in lines]
        self.assertRefused(*cases, stdin=b'{"id": "x", "entity_id": "x"}')
        self.assertRefused(
            (["my-agent", ""], "MESSAGE", "empty"),
            ([*HELLO, "--task-id", ""], "--task-id", "empty", "earlier answer"),
            (["my-agent", "--wait", ""], "task_id", "empty"),
            ([*HELLO, "--file", self.write("empty", b"")], "--file", "empty"),
            *(([*HELLO, option, ""], option) for option in JSON_OPTIONS),
            *((line, "AGENT_KEY") for line in ("", "--verbose --wait t")),
            *((words, "agent_key") for words in (["", "Hello"], ["..", "Hello"])),
            stdin=b"piped",
        )
        self.assertRefused(("my-agent", "MESSAGE"), stdin=None)  # as in cron
        terminal = mock.Mock(**{"isatty.return_value": True})  # it is not waited for
        cases = [("my-agent Hello -", "MESSAGE", "pipe"), ("a --file -", "--file")]
        self.assertRefused(("my-agent", "MESSAGE", "pipe"), *cases, stdin=terminal)
        cases = [(line, "set ORQ_API_KEY") for line in ("a Hello", "a --wait t")]
        self.assertRefused(*cases, env={"ORQ_API_KEY": " \n"})

    def test_wrong_values_are_named(self):
        key = self.service.key
        self.write("bad", b"{bad")
        self.write("latin", b'"\xfc"')
        files = ["@%s/%s" % (self.folder, f) for f in ("bad", "latin", "missing", ".")]
        wrong = [
            ("--serv x", "--serv"),  # no abbreviations: they break
            ("--api-key=" + key, "--api-key"),  # assertFails looks for the key
            ("--api-key " + key, "--api-key"),
            ("--server-url http://u:%s@x" % key, "server_url"),
            ("--variables [1]", "--variables"),
            ("--variables " + "[" * 100000, "--variables"),
            ("--variables a=1 --variables a=2", "--variables"),
            ('--extra-body {"identity":{"id":"x"}}', "extra_body.identity"),
            ("--file " + self.folder, "--file"),
            *(("--memory " + file, "--memory: ") for file in files),
            *(("--timeout " + number, "timeout") for number in WRONG_SECONDS),
        ]
        self.assertRefused(*((HELLO + line.split(), word) for line, word in wrong))
        wrong = ["--message hello", '--message {"role":"user"}', "--message null"]
        wrong += ["--tool-result call", "--tool-result c=x"]
        self.assertRefused(*(("my-agent " + w, w.split()[0][2:]) for w in wrong))
        self.assertRefused(("my-agent Hello -", "MESSAGE", "UTF-8"), stdin=b"\xfc")


class StandardOutputHoldsTheAnswer(MainTest):
    """Standard output holds the answer alone, in any locale, and --json all of it."""

    def test_any_text_is_printed_in_any_locale_and_json_is_json(self):
        answer = answer_of("na\u00efve \U0001f389 \ud800 end", new=[1.5, "\u2028"])
        answer["numbers"] = float("inf"), -float("inf"), float("nan")
        text = json.dumps(answer).replace("Infinity", "1e400")  # which Python reads so
        answer["numbers"] = [None] * 3
        self.service.then = {"body": text}
        for name in ("ascii", "utf-8"):
            out = self.command(*HELLO, encoding=name).stdout.decode(name)
            self.assertRegex(out, r"\Ana.{1,4}ve .+ \\ud800 end\n\Z")
            out = self.command(*HELLO, "--json", encoding=name).stdout.decode(name)
            self.assertEqual(json.loads(out, parse_constant=self.fail), answer)
            self.assertEqual("\n  " in out and "na\u00efve" in out, name == "utf-8")

    def test_a_dry_run_shows_what_is_then_sent_and_needs_no_key(self):
        argv = [*HELLO, "--variables", "a=b", "--server-url", self.service.url + "/x/"]
        shown = self.said(*argv, "--dry-run", "--json", env={"ORQ_API_KEY": ""})
        self.assertEqual(self.service.requests, [])
        self.said(*argv)
        (request,) = self.service.requests
        head, _, body = shown.partition("\n\n")
        self.assertEqual(body, request.body.decode() + "\n")
        first, *lines = head.split("\n")
        self.assertEqual(first, "POST " + self.service.url + request.path)
        self.assertIn("Authorization: ***", lines)
        unseen = {pair[0] for pair in request.headers if "%s: %s" % pair not in lines}
        self.assertLessEqual(unseen, {"Authorization", "Connection", "Content-Length"})

    def test_verbose_version_and_help(self):
        self.assertEqual(self.said("--version"), "orq_min %s\n" % orq_min.__version__)
        error = self.command("-v", *HELLO).stderr.decode()
        self.assertRegex(error, ONE_LINE % "200")
        shown = " ".join(self.said("--help", env={"COLUMNS": "200"}).split())
        words = r"AGENT_KEY \[MESSAGE\] \[-\] .*standard input.*--timeout SECONDS .*"
        self.assertRegex(shown, words + "ORQ_API_KEY.*ORQ_BASE_URL.*130")

    @posix_only
    def test_a_printed_answer_is_whole_or_an_error_that_names_the_task(self):
        lines = ['"$@" >&-']
        if os.path.exists("/dev/full"):
            lines += ['"$@" >/dev/full', 'PYTHONUNBUFFERED=1 "$@" >/dev/full']
        cases = [(line, []) for line in lines]
        cases += [(lines[-1], ["--json"]), (lines[-1], ["--background"])]
        self.service.then = {"body": answer_of("paid")}
        for line, argv in cases:
            with self.subTest(line=line, argv=argv):
                done = self.shell(line, *HELLO, *argv)
                self.assertFails(done, 1, "cannot print", "t1")
        self.assertFails(self.shell(lines[-1], *HELLO, "--dry-run"), 1)
        self.service.then = {"body": answer_of("x" * 2**20)}
        ours, theirs = os.pipe()
        os.set_blocking(theirs, False)  # and nobody reads
        env = clean_environment(PYTHONUNBUFFERED="1", **self.env)
        process = self.start(*HELLO, stdout=theirs, env=env)
        os.close(theirs)
        error = process.stderr.read().decode()
        os.close(ours)
        self.assertRegex(error, ONE_LINE % "cannot print.*t1")
        self.assertEqual(process.wait(20), 1)

    @posix_only
    def test_streams_that_are_closed_or_full_do_no_harm(self):
        cases = [
            ("<&-", "my-agent Hello", 0, ANSWER),
            ("<&- >&- 2>&-", "my-agent Hello", 1, ""),
            ("2>/dev/full", "-v my-agent weather", 0, "Let me look that up.\n"),
        ]
        for line, argv, status, out in cases[: 2 + os.path.exists("/dev/full")]:
            done = self.shell('"$@" ' + line, *argv.split())
            self.assertEqual((done.stdout.decode(), done.returncode), (out, status))
            self.assertNotIn(b"Traceback", done.stderr)
        self.service.next({"body": answer_of("line\n" * 200000)})
        process = self.start(*HELLO)
        self.assertEqual(process.stdout.readline(), b"line\n")
        process.stdout.close()  # as head does
        self.assertEqual((process.stderr.read(), process.wait(20)), (b"", 0))


class StandardErrorHoldsTheRest(MainTest):
    """Standard error tells what is waited for, and what to do next."""

    def test_each_retry_is_shown_and_retrying_ends_after_30_s(self):
        again = {"status": 429, "headers": {"retry-after-ms": "20"}}
        self.service.next(again, again)
        done = self.command(*HELLO)
        self.assertEqual((done.stdout.decode(), done.returncode), (ANSWER, 0))
        line = r"orq_min: [^\n\r]*\b%d\b[^\n\r]*\b0\.0[^\n\r]*429\n"
        self.assertRegex(done.stderr.decode(), r"\A%s%s\Z" % (line % 1, line % 2))
        for option, status, goes_on in (
            ("--json", 503, False),
            ("--no-retry", 429, False),
            ("--retry", 503, True),
        ):
            self.service.then = {"status": status}
            with mock.patch("time.sleep") as sleep:
                self.assertEqual(self.command(*HELLO, option).returncode, 1)
            waits = [call[0][0] for call in sleep.call_args_list]
            self.assertTrue(15 < sum(waits) <= 30 if goes_on else not waits, waits)

    def test_the_options_shown_for_tool_calls_answer_them(self):
        ids = ["a b", "$(touch x)'\"", "-dash", "-v"]  # safe to paste, and go together
        function = {"name": "f", "arguments": '{"x": 1}'}
        calls = [{"id": name, "function": function} for name in ids]
        answer = answer_of("", task_id="-t t", pending_tool_calls=calls)
        status, out, error = self.shown(answer)
        self.assertEqual((status, out), (0, ""))
        self.assertRegex(error, r'\A(orq_min: f\({"x": 1}\) [^\n]*\n){4}\Z')
        pasted = shlex.split(" ".join(re.findall("(--task-id.*)", error)))
        body = self.dry("my-agent", *(word.replace("JSON", '"="') for word in pasted))
        self.assertEqual((body["task_id"], body["message"]["role"]), ("-t t", "tool"))
        parts = body["message"]["parts"]
        results = [(part["tool_call_id"], part["result"]) for part in parts]
        self.assertEqual(results, [(name, "=") for name in ids])
        one = {"id": "c1", "type": "function"}  # without a function
        for calls in (5, [None, {"id": 1, "function": "f"}], [[]], [one]):
            status, out, error = self.shown(answer_of("ok", pending_tool_calls=calls))
            self.assertEqual((status, out), (0, "ok\n"))
            self.assertEqual("--tool-result=c1=JSON" in error, calls == [one])

    @unittest.skipUnless(pty, "needs a terminal")
    def test_a_terminal_sees_seconds_that_leave_no_trace_and_no_controls(self):
        answer = {"body": answer_of("7\x1b\x9b\t"), "delay": 1.4}
        steps = {"answered": answer, "unseen": answer, "interrupted": {"delay": 20}}
        self.service.then = lambda peer: peer.take(steps[said(peer.request)])
        unseen, terminals = self.start("my-agent", "unseen"), []
        for text in ("answered", "interrupted"):
            master, slave = pty.openpty()
            terminals.append(master)
            self.addCleanup(os.close, master)
            process = self.start("my-agent", text, stdout=slave, stderr=slave)
            os.close(slave)
        until(lambda: len(self.service.requests) == 3)
        threading.Event().wait(1.4)
        process.send_signal(signal.SIGINT)
        wanted = [r"7\\x1b\\x9b\t\norq_min: continue with --task-id=t1"]
        wanted += [r"orq_min: interrupted[^\n]* may go on"]
        for master, line in zip(terminals, wanted):
            shown = b""
            with contextlib.suppress(OSError):  # what Linux says at the end
                for block in iter(lambda: os.read(master, 4096), b""):
                    shown += block
            shown = shown.decode().replace("\r\n", "\n")  # a terminal's ends of lines
            # the seconds, and as many blanks, are written over
            self.assertRegex(shown, r"\A(\d s\r)+   \r%s\n\Z" % line)
        out, error = unseen.communicate(timeout=20)
        self.assertEqual((out.decode(), error), ("7\x1b\x9b\t\n", b""))


class WaitFetchesTheAnswer(MainTest):
    """--wait prints the answer of a task when it has ended."""

    def wait(self, *options, status=0):
        """(output, error) of a wait for t1. `waits` has the sleeps; none takes time."""
        self.waits, slept = [], [0.0]

        def sleep(seconds):
            self.assertGreaterEqual(seconds, 0)
            self.waits.append(seconds)
            slept[0] += seconds
            self.assertLess(len(self.waits), 100, "it does not end")

        now = mock.patch("orq_min._now", lambda: time.perf_counter() + slept[0])
        with mock.patch("time.sleep", sleep), now:
            done = self.command("my-agent", "--wait", "t1", *options)
        self.assertEqual(done.returncode, status, done.stderr)
        return done.stdout.decode(), done.stderr.decode()

    def test_it_goes_on_until_the_task_has_ended(self):
        going = "in_progress working queued running pending new Completed".split()
        failed = ["failed", "canceled", "rejected"]
        ended = ["completed", "input-required", "auth-required", None, *failed]
        self.service.then = {"body": answer_of("done", status="completed")}
        for state, is_task in itertools.product(going + ended, (False, True)):
            with self.subTest(state=state, is_task=is_task):
                status = {"state": state} if is_task else state
                self.service.next({"body": answer_of("first", status=status)})
                output, error = self.wait(status=int(state in failed))
                self.assertEqual(output, "first\n" if state in ended else "done\n")
                line = ONE_LINE % state if state in failed else r"\A\Z"
                self.assertRegex(error, line)
        self.service.next(*[{"body": {"status": "in_progress"}}] * 36)
        self.assertEqual(self.wait(), ("done\n", ""))
        self.assertEqual(self.waits[:29] + self.waits[31:], [1] * 29 + [5] * 5)

    def test_it_waits_through_what_is_temporary_and_says_why(self):
        self.service.then = {"body": answer_of("done")}
        gone = "no (complete )?answer"
        cases = [({"status": s}, str(s)) for s in (429, 500, 502, 503, 504)]
        for step, why in [*cases, (hang_up, gone), (break_off, gone), (cut_off, gone)]:
            with self.subTest(step=step):
                self.service.next(step, step)
                output, error = self.wait()
                self.assertEqual((output, len(self.waits)), ("done\n", 2))
                self.assertRegex(error, r"\A(orq_min: [^\n]*%s[^\n]*\n)+\Z" % why)
        self.service.next({"status": 429, "headers": {"Retry-After": "7"}})
        self.wait()
        self.assertEqual(self.waits, [7])
        for status in (302, 400, 401, 404, 422, 200, 503):
            self.service.next({"status": status, "body": "no"})
            once = ["--no-retry"] if status == 503 else []
            _, error = self.wait(*once, status=1)
            self.assertRegex(error, ONE_LINE % ("GET .*%d" % status))
            self.assertEqual(self.waits, [])

    def test_timeout_bounds_the_waiting_as_a_whole(self):
        later = {"status": 503, "headers": {"Retry-After": "100"}}
        for step, more in itertools.product(
            (later, hang_up, {"body": {"status": "in_progress"}}),
            ([], ["--retry"], ["--server-url", closed_url()]),
        ):
            with self.subTest(step=step, more=more):
                self.service.then = step
                output, error = self.wait("--timeout=3.5", *more, status=3)
                self.assertEqual(output, "")
                self.assertRegex(error.splitlines()[-1], r"\bt1 .*\b3\.5 s")
                self.assertLessEqual(sum(self.waits), 3.5)
        self.service.then = {"delay": 20}  # an attempt may take all of it
        with within(5):
            self.wait("--timeout", "0.3", status=3)

    def test_it_is_refused_beside_a_message_and_what_is_part_of_one(self):
        file = self.write("a", b'{"id": "a"}')
        beside = ["Hello", "-", "Hello -", "--background", "--tool-result c=1"]
        beside += ["--task-id t1", "--file " + file, "--message @" + file]
        beside += ["%s @%s" % (option, file) for option in JSON_OPTIONS]
        cases = [("my-agent --wait t1 " + text, "--wait") for text in beside]
        wrong = WRONG_SECONDS[:-1]  # "inf" is no end, as without it
        cases += [("my-agent --wait t1 --timeout " + each, "timeout") for each in wrong]
        self.assertRefused(*cases, ("my-agent --wait ..", "task_id"), stdin=b"piped")


class TheExitStatusTells(MainTest):
    """The exit status says what happened, with one line and no traceback."""

    def test_an_error_of_the_service_is_1_and_no_answer_is_3(self):
        self.assertFails(self.command("unknown", "Hello"), 1, "404", "no agent")
        html = "<html>\n<h1>gateway\x1b[31m</h1>\r\n" + "x" * 100000
        self.service.next({"status": 400, "body": self.service.key + html})
        done = self.command(*HELLO)
        self.assertFails(done, 1, "400", "gateway")
        self.assertLess(len(done.stderr), 2000)
        self.assertNotIn(b"\x1b", done.stderr)
        url = closed_url()
        done = self.command(*HELLO, "--no-retry", "--server-url", url)
        self.assertFails(done, 3, url)
        self.service.next(hang_up, {"delay": 20})
        self.assertFails(self.command(*HELLO), 3, "may have run")
        self.assertFails(self.command(*HELLO, "--timeout", "0.4"), 3, "0.4 s")
        with mock.patch("orq_min.Responses.create", side_effect=KeyboardInterrupt):
            done = self.command(*HELLO)
        self.assertFails(done, 130, "interrupted; a run that was begun may go on")

    def test_a_run_that_failed_or_was_cut_or_has_nothing_to_print_is_told(self):
        error = {"kind": "error", "error": "no\nmoney", "code": 402}
        half = {"output": [from_agent(text_part("half"), error)]}
        cases = [(half, 1, "half\n", "no money")]
        cases += [({"status": {"state": "canceled"}}, 1, "", "canceled")]
        cases += [({"_id": "r1"}, 0, "", "nothing to print.*--json")]
        for reason in ("length", "max_iterations", "max_time", "content_filter"):
            body = answer_of("half", finish_reason=reason)
            cases += [(body, 0, "half\n", r"cut.*\b%s\b" % reason)]
        for body, status, text, why in cases:
            with self.subTest(body=body):
                *found, error = self.shown(body)
                self.assertEqual(found, [status, text])
                self.assertRegex(error, ONE_LINE % why)
                found, out, _ = self.shown(body, "--json")
                self.assertEqual((found, json.loads(out)), (status, body))
        self.assertIn("nothing to print", self.shown({"_id": "r1"}, "--background")[2])
        recovered = dict(half, status="completed")
        self.assertEqual(self.shown(recovered), (0, "half\n", ""))

    @posix_only
    def test_a_program_dies_of_an_interrupt_wherever_it_comes(self):
        self.service.then = {"delay": 20}
        running = [self.start(*line.split()) for line in ("a hi", "a --wait t")]
        until(lambda: len(self.service.requests) == 2)
        for process in running:
            process.send_signal(signal.SIGINT)
            self.assertEqual(process.wait(5), -signal.SIGINT)
            self.assertNotIn(b"Traceback", process.stderr.read())
            self.assertEqual(process.stdout.read(), b"")


# ----------------------------------------------------------------------------
# Retries
# ----------------------------------------------------------------------------


def backoff(*given, **more):
    return orq_min.RetryConfig("backoff", orq_min.BackoffStrategy(*given), **more)


NONSENSE = [*"soon 0 -5 nan inf 1e4".split(), "", "Wed, 21 Oct 2099 07:28:00 GMT"]
UNSET, DEFAULT, ALL = orq_min.UNSET, orq_min.DEFAULT_RETRY, AT_ALL_COSTS
# fmt: off
ASKED_WAITS = [  # headers, the seconds that are waited; 0.5 is our own wait
    ({"Retry-After": "0.2"}, 0.2), ({"retry-AFTER": " 20 "}, 20),
    ({"retry-after-ms": "10"}, 0.01), ({"retry-after-ms": "9.9"}, 0.5),  # else a storm
    ({"Retry-After": "3", "Retry-After-Ms": "250"}, 0.25),
    ({"Retry-After": "3", "Retry-After-Ms": "soon"}, 3),
    *(({"Retry-After": text}, 0.5) for text in NONSENSE),
]
CHOSEN = [  # policy of the client, of the call; a status, and the attempts that follow
    (UNSET, None, 429, 1), (UNSET, ALL, 500, 2), (None, UNSET, 429, 1),
    (None, DEFAULT, 429, 2), (ALL, UNSET, 500, 2), (ALL, DEFAULT, 500, 1),
    (ALL, orq_min.RetryConfig("none"), 429, 1),
]
WRONG_POLICIES = {  # as WRONG_VALUES are
    "strategy": {"": ["linear", 1, None]}, "retry_connection_errors": {"": ["yes"]},
    "backoff": {"": [500, None, {"initial_interval": 1}]},
    "status_codes_override": {"": ["5XX", {"429"}], "[1]": [["1", 5], ["1", None]]},
}
# fmt: on


class Retries(RefusalTest):
    """How long is waited, by which policy; what each retries is a table, further below.

    It sleeps at once: `waits` are the seconds that the client would have slept.
    They count as elapsed nevertheless; no clock is moved.
    """

    def setUp(self):
        super().setUp()
        self.waits, self.uniform = [], random.uniform
        self.enter(mock.patch("time.sleep", self.waits.append))
        self.enter(mock.patch("random.uniform", lambda low, high: high))

    def waits_after(self, headers=None, times=1, **given):
        """Have the service say 429 so often; return the waits of one call."""
        del self.waits[:]
        self.service.next(*[{"status": 429, "headers": headers}] * times)
        self.assertEqual(self.create(**given).text, "You said: hi")
        return [round(wait, 6) for wait in self.waits]

    def test_the_default_waits_half_a_second_doubling_to_8_within_30(self):
        wanted = [0.5, 1, 2, 4, 8, 8]
        self.failure(self.orq, orq_min.APIConnectionError, server_url=closed_url())
        self.assertEqual(self.waits, wanted)
        self.service.next(*[{"status": 429}] * 6, {"status": 400})
        self.assertEqual(self.failure(self.orq).status_code, 400)  # the last error
        self.assertEqual(self.waits, wanted * 2)
        with mock.patch("random.uniform", self.uniform):  # they are not all alike
            seen = {wait for _ in range(8) for wait in self.waits_after()}
            exact = self.waits_after(retries=backoff(100, 100, 1, 1000, 0))
        self.assertGreater(len(seen), 1)
        self.assertTrue(all(0.375 <= wait <= 0.5 for wait in seen), seen)
        self.assertEqual(exact, [0.1])

    def test_waits_grow_by_the_exponent_to_the_longest_with_jitter_on_top(self):
        for numbers, wanted in (
            ((100, 1000, 3, 60000), [0.1, 0.3, 0.9, 1]),
            ((100, 400, 2, 60000, 50), [0.15, 0.25, 0.4]),
            ((500, 2000, 1e308, 60000), [0.5, 2, 2, 2]),  # nothing overflows
        ):
            found = self.waits_after(times=len(wanted), retries=backoff(*numbers))
            self.assertEqual(found, wanted)

    def test_a_wait_that_the_server_asks_for_is_kept_if_it_makes_sense(self):
        for headers, wait in ASKED_WAITS:
            with self.subTest(headers):
                self.assertEqual(self.waits_after(headers), [wait])

    def test_a_wait_that_would_pass_the_end_is_not_begun(self):
        long = {"status": 429, "headers": {"Retry-After": "29.5"}}
        late = {"status": 429, "delay": 0.3}  # an attempt counts too
        for step, end in ((long, 29000), (late, 350)):
            self.service.next(step)
            with logged(logging.INFO) as records:
                error = self.failure(self.orq, retries=backoff(100, 100, 1, end))
            self.assertEqual((error.status_code, self.waits, records), (429, [], []))

    def test_each_retry_is_logged_without_headers_and_bodies(self):
        step = {"status": 429, "body": {"message": "secret-body"}}
        step["headers"] = {"X-Secret": "secret-header", "Retry-After": "3"}
        self.service.next(step, hang_up)
        with logged() as records:
            self.create(http_headers={"X-Mine": "secret-mine"}, retries=ALL)
        for record in records:
            self.assertNotRegex(record.getMessage(), "secret-|" + self.service.key)
        one, other = [r for r in records if r.levelname != "DEBUG"]
        self.assertEqual((one.levelname, other.levelname), ("WARNING", "WARNING"))
        self.assertRegex(one.getMessage(), r"\b1\b.*\b3\.0 s.*429")
        self.assertRegex(other.getMessage(), r"\b2\b.*\b0\.0 s.*closed")

    def test_a_call_overrides_the_client_which_overrides_the_default(self):
        for of_client, of_call, status, attempts in CHOSEN:
            with self.subTest(client=of_client, call=of_call, status=status):
                del self.service.requests[:]
                self.service.next({"status": status})
                orq = self.enter(client(self.service, retry_config=of_client))
                said = self.outcome(orq, retries=of_call)
                self.assertEqual(said == "You said: hi", attempts == 2, said)
                self.assertEqual(len(self.service.requests), attempts)

    def test_wrong_settings_are_refused_when_they_are_given(self):
        wrong = [-1, "1", True, float("nan"), float("inf"), [1], 10**400]
        names = [field.name for field in dataclasses.fields(orq_min.BackoffStrategy)]
        numbers = {name: {"": [*wrong, None]} for name in names}
        numbers["jitter_ms"] = {"": wrong}
        self.assert_refused(orq_min.BackoffStrategy, numbers)
        self.assert_refused(orq_min.RetryConfig, WRONG_POLICIES)

    def test_a_policy_cannot_be_changed_but_another_made_of_it(self):
        before = backoff(500, 60000, 1.5, 3600000)
        self.assertEqual(before, orq_min.RetryConfig())  # the official client's numbers
        for policy, name in ((before, "strategy"), (before.backoff, "exponent")):
            with self.assertRaises(dataclasses.FrozenInstanceError):
                setattr(policy, name, getattr(policy, name))
        self.assertEqual(pickle.loads(pickle.dumps(before)), before)
        other = dataclasses.replace(before, retry_connection_errors=True)
        self.assertEqual((other.backoff, other.strategy), (before.backoff, "backoff"))
        self.assertNotEqual(other, before)


class RetriesWithAsyncio(LoopbackTest):
    """create_async waits by the same policy; get_async is made of the same code."""

    def test_a_wait_does_not_block_the_loop(self):
        async def main():
            call = self.orq.agents.responses.create_async
            task = asyncio.ensure_future(call(agent_key="my-agent", message="hi"))
            ticks = 0
            while not task.done():
                await asyncio.sleep(0.01)
                ticks += 1
            return (await task).text, ticks

        self.service.next({"status": 429, "headers": {"retry-after-ms": "250"}})
        text, ticks = asyncio.run(main())
        self.assertEqual((text, len(self.service.requests)), ("You said: hi", 2))
        self.assertGreater(ticks, 5)

    def test_a_cancelled_wait_ends_at_once_and_sends_nothing_more(self):
        self.create()  # the stand-in has started its thread
        self.service.next({"status": 429, "headers": {"Retry-After": "20"}})
        before = set(threading.enumerate())

        async def main():
            call = self.orq.agents.responses.create_async
            task = asyncio.ensure_future(call(agent_key="my-agent", message="hi"))
            while not (records or task.done()):
                await asyncio.sleep(0.01)
            task.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await task

        with logged(logging.WARNING) as records:
            asyncio.run(main())
        until(lambda: before.issuperset(threading.enumerate()), 5)
        self.assertEqual(len(self.service.requests), 2)


# ----------------------------------------------------------------------------
# The network
# ----------------------------------------------------------------------------


class ConnectionsAreKept(ServerTest):
    """Calls share connections, and nobody reads the answer to another's request."""

    def test_calls_in_a_row_share_the_connection_to_their_server(self):
        """Any 2XX with an object is an answer, in chunks or packed."""
        packed = reply(gzip.compress(saying("p")), "299 Fine", "Content-Encoding: gzip")
        steps = reply(b"", "404 No"), chunked(saying("c"), size=7), packed, repeat_text
        for tls in (None, server_context()):
            server, other = self.server(*steps, tls=tls), self.server(tls=tls)
            orq = self.client(server)
            self.assertEqual(self.failure(orq, orq_min.APIError).status_code, 404)
            create_async = orq.agents.responses.create_async
            answer = asyncio.run(create_async(agent_key="my-agent", message="hi"))
            urls = [server.url, other.url] * 2
            got = [self.call(orq, server_url=url) for url in urls]
            self.assertEqual([answer.text, *got], ["c", "p", "hi", "hi", "hi"])
            self.assertEqual((server.on, other.on), ([0] * 4, [0] * 2))

    def test_a_connection_is_not_used_again_after(self):
        body, large = saying("odd"), b" " * 200000
        length = "Content-Length: %d" % len(body)
        odd = {
            "bytes past the end": [reply("odd") + FORGED],
            "bytes that nobody asked for": [reply("odd"), FORGED],
            "a close": [reply("odd"), hang_up],
            "a reset": [reply("odd"), break_off],
            "an announced close": [reply(body, "200 OK", "Connection: close")],
            "another protocol": [head("101 Switching", "Content-Length: 0")],
            "a length and chunks": [chunked(body, length)],
            "a coding": [reply(body, "200 OK", "Transfer-Encoding: gzip, chunked")],
            "a line that is no header": [head("200 OK", length, "what is this") + body],
            "an unread body": [reply(large)[:3000], large[:3000]],
        }

        def step(peer):
            with contextlib.suppress(OSError):
                for part in odd[name]:
                    peer.take(part)
                    peer.pause(0.02)
            done.set()

        for name, tls in itertools.product(odd, (None, server_context())):
            with self.subTest(name), mock.patch("orq_min.MAX_ANSWER_BYTES", 1000):
                done = threading.Event()
                server = self.server(step, repeat_text, tls=tls)
                orq = self.client(server, timeout_ms=2000)
                got = self.outcome(orq)
                self.assertTrue(done.wait(9))
                self.assertEqual((self.call(orq, "two"), server.on), ("two", [0, 1]))
                self.assertTrue(got == "odd" or isinstance(got, orq_min.OrqError), got)

    def test_a_connection_is_kept_no_longer_than_either_side_wants(self):
        def use(row):
            header, seconds, connections = row
            server = self.server(reply("one", "200 OK", *header), repeat_text)
            orq = self.client(server)
            self.assertEqual(self.call(orq), "one")
            time.sleep(seconds)
            self.assertEqual(self.call(orq), "hi")
            self.assertEqual(server.on, connections)

        brief, long = ["Keep-Alive: timeout=1, max=9"], ["Keep-Alive: timeout=60"]
        cases = [(brief, 0.6, [0, 1]), (long, 0.6, [0, 0]), ([], 0.6, [0, 0])]
        at_once(use, [*cases, (['Keep-Alive: max=9, Timeout = "1"'], 0.6, [0, 1])])
        with mock.patch("orq_min.IDLE_SECONDS", 0.2):
            at_once(use, [(long, 0.3, [0, 1]), ([], 0.3, [0, 1])])

    def test_at_most_sixteen_are_kept_for_all_servers_and_old_ones_closed(self):
        one, other = self.server(), self.server()
        gate = threading.Barrier(20, timeout=20)
        for server in (one, other):
            server.next(*[lambda peer: (gate.wait(), repeat_text(peer))] * 10)
        orq = self.client(one)
        with mock.patch("orq_min.IDLE_SECONDS", 0.2):
            with concurrent.futures.ThreadPoolExecutor(20) as pool:
                urls = [one.url, other.url] * 10
                list(pool.map(lambda url: self.call(orq, server_url=url), urls))
            until(lambda: len(one.gone + other.gone) == 4)
            time.sleep(0.3)
            self.assertEqual(len(one.gone + other.gone), 4)
            self.call(orq)
            until(lambda: len(one.gone + other.gone) == 20)

    def test_a_client_that_ends_closes_its_connections(self):
        server = self.server()
        orq = self.client(server)
        self.call(orq)
        asyncio.run(orq.__aexit__(None, None, None))
        until(lambda: len(server.gone) == 1)
        self.assertEqual(self.call(orq), "hi")  # on a connection that is not kept
        until(lambda: len(server.gone) == 2)
        orq_min.create_response("a", "hi", api_key="k", server_url=server.url)
        until(lambda: len(server.gone) == 3)
        orq = client(server)
        self.call(orq)
        del orq
        if sys.implementation.name != "cpython":
            gc.collect()
        until(lambda: len(server.gone) == 4)

    @unittest.skipUnless(hasattr(os, "fork"), "the platform does not fork")
    def test_a_fork_shares_no_connection(self):
        server = self.server()
        code = """
            import os, orq_min
            create = orq_min.Orq("k", retry_config=None).agents.responses.create
            def say(text):
                assert create(agent_key="a", message=text).text == text
            say("parent")
            if os.fork() == 0:
                signal.alarm(9)  # so that it fails if it hangs
                say("child")
                os._exit(0)
            assert os.wait()[1] == 0
            say("parent again")
        """
        process = script(code, ORQ_BASE_URL=server.url)
        self.assertEqual(process.communicate(timeout=30), (b"", b""))
        self.assertEqual(server.on, [0, 1, 0])

    def test_sixteen_threads_on_one_client_get_their_own_answers(self):
        server, texts = self.server(), ["number %d" % number for number in range(320)]
        call = functools.partial(self.call, self.client(server))
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            self.assertEqual(list(pool.map(call, texts)), texts)
        self.assertLessEqual(server.connections, 16)

    def test_the_system_is_asked_to_notice_a_dead_peer_but_may_refuse(self):
        original, server, asked = socket.socket.setsockopt, self.server(), []

        def set_option(sock, *option):
            if sock.getpeername()[1] != server.port:
                return original(sock, *option)  # it is the server's own
            asked.append(option)
            if refused:
                raise OSError(errno.ENOPROTOOPT, "not in this sandbox")

        with mock.patch.object(socket.socket, "setsockopt", set_option):
            for refused in (True, False):
                self.assertEqual(self.call(self.client(server)), "hi")
        self.assertIn((socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), asked)


class RequestsAndAnswersTravelWhole(ServerTest):
    """What HTTP allows a server to do, and what it may expect of a client."""

    def test_interim_answers_are_read_past_but_another_protocol_is_an_error(self):
        final = head("100 Continue") * 2 + head("103 Early Hints", "Link: </a>", "X: y")
        final += head("102 Processing") + head("100 Continue") + reply("final")
        server = self.server(final, head("101 Switching Protocols"), repeat_text)
        orq = self.client(server)
        self.assertEqual(self.call(orq), "final")
        self.assertEqual(self.failure(orq, orq_min.APIError).status_code, 101)
        self.assertEqual(self.call(orq), "hi")
        self.assertEqual(server.on, [0, 0, 1])

    def test_each_header_is_sent_once(self):
        server = self.server()
        given = {"authorization": "Bearer x", "ACCEPT": "a/b", "uSER-agent": "me"}
        self.call(self.client(server), http_headers=given)
        (request,) = server.requests
        length = str(len(request.body))
        wanted = dict(given, **{"Host": server.netloc, "Content-Length": length})
        for name, value in wanted.items():
            self.assertEqual(request.header(name), [value])
        names = [name.lower() for name, _ in request.headers]
        self.assertEqual(len(names), len(set(names)), names)

    def test_an_early_refusal_is_reported_whether_or_not_the_upload_goes_on(self):
        def refuse(peer):
            peer.send(reply(b'{"message": "go away"}', "413 No"))
            then(peer)

        sides = (None, server_context()), (hang_up, Connection.hang)
        for tls, then in itertools.product(*sides):
            with self.subTest(tls=tls, then=then.__name__):
                server = self.server(refuse, tls=tls, early=True)
                error = self.failure(self.client(server), orq_min.APIError, text=LARGE)
                self.assertEqual((error.status_code, error.message), (413, "go away"))
                self.assertEqual(len(server.requests), 1)

    def test_failed_calls_print_neither_complaints_nor_the_key(self):
        """Not when they are collected, nor if a program debugs http.client."""
        cut = (b"", b"what?\r\n", head("200 OK")[:-2], reply("cut")[:-1])
        server = self.server(*map(then_close, cut))
        code = """
            import contextlib, gc, http.client, orq_min
            http.client.HTTPConnection.debuglevel = 1
            for url in sys.argv[1:]:
                with contextlib.suppress(orq_min.OrqError):
                    orq_min.create_response("a", "b", server_url=url, retries=None)
                gc.collect()
        """
        env = {"ORQ_API_KEY": "k", "PYTHONDEVMODE": "1"}
        process = script(code, closed_url(), *[server.url] * 4, **env)
        self.assertEqual(process.communicate(timeout=20), (b"", b""))
        self.assertEqual((process.returncode, len(server.requests)), (0, 4))


class ConnectingTakesSeconds(ServerTest):
    """A dead address costs half a second, and an attempt to connect ends in 10 s."""

    def test_addresses_that_are_of_no_use_are_passed_over(self):
        server = self.server()
        closed = self.enter(socket.socket())  # bound, but it does not listen
        closed.bind(("127.0.0.1", 0))
        for family, address in (
            (socket.AF_INET, self.enter(full_backlog())),
            (socket.AF_INET, closed.getsockname()),
            (999, ("::1", 9)),  # as IPv6 is to a machine without it
        ):
            pairs = (family, address), (socket.AF_INET, ("127.0.0.1", server.port))
            found = [(pair[0], socket.SOCK_STREAM, 6, "", pair[1]) for pair in pairs]
            look_up = mock.patch("socket.getaddrinfo", lambda *_, **__: found)
            with self.subTest(address=address), look_up, within(3):
                self.assertEqual(self.call(self.client(server)), "hi")

    def test_a_slow_address_has_a_fair_share_of_a_second_round(self):
        slow = StandIn(repeat_text)
        slow._listener.listen(0)
        for _ in range(8):
            waiting = self.enter(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", slow.port))
        start = threading.Timer(0.45, self.enter, (slow,))
        start.start()
        self.addCleanup(start.join)
        brief = mock.patch.multiple("orq_min", ADDRESS_SECONDS=0.2, CONNECT_SECONDS=1.5)
        with brief, resolving(self.enter(full_backlog()), ("127.0.0.1", slow.port)):
            self.assertEqual(self.call(self.client(slow)), "hi")

    def test_an_attempt_to_connect_ends_before_the_attempt_or_with_it(self):
        def late(peer):
            peer.read_request()
            peer.pause(0.7)
            peer.send(head("200 Go Ahead"))

        def greeted(greet):
            return self.server(greet=lambda peer: (greet(peer), peer.hang())).netloc

        hello = b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc" + b"\x03" * 2000
        http = b"HTTP/1.1 200 " + b"O" * 2000
        dead = "http://%s:%d" % self.enter(full_backlog())
        drips = "https://" + greeted(lambda peer: peer.drip(hello))
        for url, proxy, connect_seconds, timeout_ms in (
            (dead, "", 0.1, 600000),
            (drips, "", 10, 100),
            ("https://a:9", greeted(lambda peer: peer.drip(http)), 10, 100),
            ("https://a:9", greeted(late), 0.8, 600000),  # in all, not for each
        ):
            os.environ["https_proxy"] = proxy
            orq = self.enter(orq_min.Orq("k", server_url=url, timeout_ms=timeout_ms))
            with mock.patch("orq_min.CONNECT_SECONDS", connect_seconds), within(1.4):
                error = self.failure(orq, orq_min.APITimeoutError, retries=None)
            self.assertEqual((error.sent, error.temporary), (False, True))
            self.assertIn("no connection", str(error))

    def test_neither_the_lookup_nor_the_agent_is_bound_by_them(self):
        """Waiting for the agent costs no time of the processor."""
        server, look_up = self.server({"delay": 0.4}), socket.getaddrinfo
        late = {"side_effect": lambda *_, **__: time.sleep(0.4) or mock.DEFAULT}
        with mock.patch("socket.getaddrinfo", wraps=look_up, **late):
            with mock.patch("orq_min.CONNECT_SECONDS", 0.3):
                before = time.process_time()
                self.assertEqual(self.call(self.client(server)), "You said: hi")
        self.assertLess(time.process_time() - before, 0.3)


class TheDeadlineBoundsAnAttempt(ServerTest):
    """`timeout_ms` bounds an attempt from connect to last byte, at most 1 s late."""

    def cut_off(self, step, kind, text="hi", timeout_ms=300, **options):
        """The error of a call that would take ten seconds and more."""
        server = self.server(step, **options)
        with within(3):
            orq = self.client(server, timeout_ms=timeout_ms)
            error = self.failure(orq, kind, text=text)
        until(lambda: server.gone)
        return error

    def test_a_server_that_drips_is_cut_off(self):
        def check(step):
            self.assertTrue(self.cut_off(step, orq_min.APITimeoutError).sent)

        sized = head("200 OK", "Content-Length: 9999")
        in_chunks = head("200 OK", "Transfer-Encoding: chunked")
        steps = [
            lambda peer: peer.drip(b"HTTP/1.1 200 " + b"O" * 2000),
            lambda peer: peer.drip(head("100 Continue") * 100),
            lambda peer: peer.drip(head("103 Early Hints") * 100),
            lambda peer: (peer.send(sized), peer.drip(b" " * 2000)),
            lambda peer: (peer.send(in_chunks), peer.drip(b"1\r\nx\r\n" * 500)),
        ]
        at_once(check, steps)

    def test_an_error_keeps_its_status_if_its_body_drips(self):
        def drip(peer):
            peer.send(head("401 No", "Content-Length: 9999") + b'{"message": "bad key"')
            peer.drip(b" " * 2000)

        error = self.cut_off(drip, orq_min.APIError)
        self.assertEqual(error.status_code, 401)
        self.assertIn("bad key", error.body)

    def test_a_server_that_reads_slowly_is_cut_off(self):
        options = {"tls": server_context(), "early": True}
        error = self.cut_off(read_slowly, orq_min.APITimeoutError, LARGE, **options)
        self.assertFalse(error.sent)


class CallsCanBeEnded(ServerTest):
    """Ctrl-C ends a program within a second; a cancelled task ends its call."""

    @posix_only
    def test_ctrl_c_ends_a_program_whatever_its_task_waits_for(self):
        code = """
            import asyncio, socket, time, orq_min
            def look_up(*_, **__):
                print("looking up", flush=True)
                time.sleep(20)  # nothing can interrupt it
            if "invalid" in sys.argv[1]:
                socket.getaddrinfo = look_up
            responses = orq_min.Orq("k", server_url=sys.argv[1]).agents.responses
            asyncio.run(responses.create_async(agent_key="a", message="hi"))
        """
        later = reply(b"", "429 Slow Down", "Retry-After: 20")
        server = self.server(Connection.hang, later)
        running = [script(code, "http://a.invalid")]
        running += [script(code, server.url) for _ in range(2)]
        until(lambda: len(server.requests) == 2)
        self.assertIn(b"looking up", running[0].stdout.readline())
        time.sleep(0.2)  # until the retry waits
        for process in running:
            self.assertIsNone(process.poll())
            with within(3):
                process.send_signal(signal.SIGINT)
                _, err = process.communicate(timeout=30)
            self.assertIn(b"KeyboardInterrupt", err)
            self.assertNotIn(b"Exception ignored", err)
            self.assertNotEqual(process.returncode, 0)

    def test_a_cancelled_task_ends_at_once_and_so_do_its_thread_and_connection(self):
        async def call_and_cancel():
            creates = [orq.agents.responses.create_async for orq in clients]
            calls = [create(agent_key="a", message="hi") for create in creates]
            tasks = [asyncio.ensure_future(call) for call in calls]
            await asyncio.sleep(0.3)  # until they wait
            with within(1):
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
            self.assertEqual({task.cancelled() for task in tasks}, {True})

        tls, full = server_context(), self.enter(full_backlog())
        servers = [self.server(Connection.hang, tls=tls)]
        servers.append(self.server(greet=Connection.hang, tls=tls))
        clients = [self.client(one, retry_config=AT_ALL_COSTS) for one in servers]
        clients.append(orq_min.Orq("k", server_url="http://%s:%d" % full))
        before = set(threading.enumerate())
        asyncio.run(call_and_cancel())
        until(lambda: before.issuperset(threading.enumerate()))
        for server in servers:
            until(lambda: len(server.gone) == server.connections == 1)


class OnlyTheNetworksFailuresAreOurs(ServerTest):
    """Any other exception leaves a call as it is, and no attempt follows it."""

    @posix_only
    def test_what_a_signals_handler_raises_ends_the_call(self):
        """A TimeoutError is the most common recipe, and the class of socket.timeout."""

        def handler(*_):
            raise exception

        self.addCleanup(signal.signal, signal.SIGALRM, signal.getsignal(signal.SIGALRM))
        signal.signal(signal.SIGALRM, handler)
        endless = {"headers": {"Content-Length": "9999"}, "body": b"{"}
        full = "http://%s:%d" % self.enter(full_backlog())
        places = {
            "an answer": (self.server(Connection.hang, tls=server_context()), {}),
            "a body": (self.server(endless), {}),
            "the body of an error": (self.server(dict(endless, status=500)), {}),
            "sending": (self.server(read_slowly, early=True), {"text": LARGE}),
            "connecting": (self.server(), {"server_url": full}),
        }
        for exception, classes in (
            (EOFError("over"), EOFError),
            (TimeoutError("over"), (TimeoutError, orq_min.APIConnectionError)),
        ):
            for place, (server, given) in places.items():
                with self.subTest(place, exception=exception), within(3):
                    orq, before = self.client(server), server.connections
                    signal.setitimer(signal.ITIMER_REAL, 0.07)
                    self.failure(orq, classes, retries=AT_ALL_COSTS, **given)
                    self.assertLessEqual(server.connections, before + 1)
                    until(lambda: len(server.gone) == server.connections)


FOR_8_MS = orq_min.BackoffStrategy(1, 1, 1, max_elapsed_time=8)
EAGER = orq_min.RetryConfig("backoff", FOR_8_MS, True)  # retries all it ever may
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class TracersSeeNoKey(ServerTest):
    """Calls work under OpenTelemetry and its like, which learn nothing secret."""

    def test_each_call_is_sent_once_with_the_tracers_header(self):
        seen, original = [], urllib.request.OpenerDirector.open

        def traced_open(opener, request, data=None, timeout=None):
            request.headers.update(traceparent=PARENT, Host="of.the.tracer")
            result = original(opener, request, data=data, timeout=timeout)
            statuses.append(result.getcode())
            seen.extend([repr(result), result.geturl(), repr(request.header_items())])
            return result

        self.enter(mock.patch("urllib.request.OpenerDirector.open", traced_open))
        proxy, key = self.enter(Proxy("me:swordfish")), b"test-key-123"
        os.environ["https_proxy"] = "http://me:swordfish@" + proxy.netloc
        steps = reply(key, "401 No"), then_close(key + b"\r\n\r\n"), repeat_text
        headers = {"TraceParent": "mine", "authorization": "Bearer test-key-123"}
        for tls in (None, server_context()):
            server, statuses = self.server(repeat_text, *steps, tls=tls), []
            orq = self.client(server)
            got = [self.outcome(orq, http_headers=headers) for _ in range(4)]
            self.assertEqual((got[0], got[3], statuses), ("hi", "hi", [200, 401, 200]))
            self.assertEqual(server.on, [0, 0, 0, 1])
            for request in server.requests:
                self.assertEqual(request.header("traceparent"), [PARENT])
                self.assertEqual(request.header("host"), [server.netloc])
            seen += map(texts_of, got[1:3])
        self.assertNotRegex("".join(seen), "test-key-123|swordfish")
        self.assertEqual([r.header("traceparent") for r in proxy.requests], [[], []])


class NoClockMisleads(ServerTest):
    """Waits and deadlines hold, whatever a test does to the clocks and to sleep."""

    def test_calls_neither_last_nor_are_repeated_for_ever(self):
        busy = self.server(reply(b"", "429 Slow Down", "Retry-After: 8"))
        orq = self.client(busy, retry_config=orq_min.UNSET)
        silent = self.client(self.server(Connection.hang), timeout_ms=100)
        frozen = dict.fromkeys(["time", "monotonic", "perf_counter"], lambda: 1e6)
        with within(9), mock.patch.multiple("time", sleep=mock.DEFAULT, **frozen):
            self.failure(orq, orq_min.APIError)
            self.failure(silent, orq_min.APITimeoutError)
        self.assertEqual(len(busy.requests), 4)


class AnswersAreBounded(ServerTest):
    """An answer is read whole or not at all; one that is too large is an APIError."""

    def test_a_larger_answer_is_an_error_that_has_its_status(self):
        large = saying("x" * 400000)
        for status, answer in (
            (200, reply(large)),
            (500, reply(large, "500 Oops")),
            (200, reply(gzip.compress(large))),
        ):
            orq = self.client(self.server(answer))
            with mock.patch("orq_min.MAX_ANSWER_BYTES", len(large) // 2):
                error = self.failure(orq, orq_min.APIError)
            self.assertEqual(error.status_code, status)
            self.assertEqual("no readable JSON" in str(error), status == 200)
            with mock.patch("orq_min.MAX_ANSWER_BYTES", len(large)):
                self.assertEqual(self.outcome(orq) == "x" * 400000, status == 200)

    def test_no_more_is_read_than_may_be_held(self):
        def endless(peer):
            peer.send(head("200 OK", "Transfer-Encoding: chunked"))
            while True:
                peer.send(b"2710\r\n" + b"x" * 10000 + b"\r\n")

        server = self.server(endless)
        with mock.patch("orq_min.MAX_ANSWER_BYTES", 100000):
            error = self.failure(self.client(server), orq_min.APIError)
        self.assertLess(len(error.body), 300000)
        until(lambda: server.gone == [0])

    def test_gzip_is_decoded_though_not_asked_for(self):
        packed = gzip.compress(saying("packed"))
        bodies = packed, packed[:-8] + bytes(8), packed[:-20]
        server = self.server(*map(reply, bodies))
        orq = self.client(server)
        self.assertEqual(self.call(orq), "packed")
        self.assertTrue(self.failure(orq, orq_min.APIConnectionError).sent)
        self.assertIn("no readable JSON", str(self.failure(orq, orq_min.APIError)))
        self.assertNotIn("gzip", str(server.requests[0].headers))

    def test_an_error_whose_body_breaks_off_keeps_its_status_and_what_was_read(self):
        body = json.dumps({"message": "Busy", "more": "x" * 99}).encode()
        packed = gzip.compress(body)[:-4]
        for data in (
            reply(body, "429 No")[:-3],
            chunked(body, status="429 No", size=9)[:-9],
            reply(packed, "429 No", "Connection: close"),
        ):
            server = self.server(then_close(data), repeat_text)
            orq = self.client(server)
            error = self.failure(orq, orq_min.APIError)
            self.assertEqual(error.status_code, 429)
            self.assertIn("Busy", error.body)
            self.assertEqual((self.call(orq), server.on), ("hi", [0, 1]))


class NoRedirectIsFollowed(ServerTest):
    """The key goes to one place: a redirect is an error that says where it points."""

    def test_each_is_an_error_that_names_its_target_and_server_url(self):
        other = self.server()
        targets = {other.url + "/x?y=z": other.url + "/x?y=z", "/x": "/x", " ": ""}
        targets.update({"http://me:sesame@h/x": "http://h/x", "http://[": "http://["})
        for place, status in itertools.product(targets, (300, 302, 303, 307, 308)):
            with self.subTest(place, status=status):
                server = self.server(reply(b"", "%d X" % status, "Location: " + place))
                orq = self.client(server, retry_config=EAGER)
                error = self.failure(orq, orq_min.APIError)
                self.assertEqual(error.status_code, status)
                self.assertEqual(len(server.requests), 1)
                self.assertIn("server_url", str(error))
                shown = str(error).partition(str(status))[2]
                self.assertIn(targets[place], shown)
                self.assertNotIn("sesame", shown)
        self.assertEqual(other.connections, 0)


class ProxiesTunnel(ServerTest):
    """Proxies come from the environment; the key passes only inside their tunnels."""

    def through(self, proxy, server, userinfo=""):
        url = "http://%s%s" % (userinfo and userinfo + "@", proxy.netloc)
        os.environ["https_proxy"] = os.environ["http_proxy"] = url
        return self.client(server)

    def test_https_is_tunnelled_with_the_key_inside_alone(self):
        server = self.server(tls=server_context())
        proxy = self.enter(Proxy("me:p@ss/w:rd"))
        orq = self.through(proxy, server, "me:p%40ss%2Fw%3Ard")
        self.assertEqual([self.call(orq, "a"), self.call(orq, "b")], ["a", "b"])
        (connect,) = proxy.requests  # for one connection
        self.assertEqual(connect[:2], ("CONNECT", server.netloc))
        self.assertEqual(connect.header("host"), [server.netloc])
        self.assertNotIn("test-key-123", str(connect))
        self.assertNotIn(b"test-key-123", proxy.passed)
        self.assertGreater(len(proxy.passed), 1000)
        for request in server.requests:
            self.assertEqual(request.header("proxy-authorization"), [])
            self.assertEqual(request.path, "/v2/agents/my-agent/responses")

    def test_plain_http_goes_through_a_proxy_too_unless_no_proxy_says_not(self):
        server, proxy = self.server(), self.enter(Proxy("me:sesame"))
        orq = self.through(proxy, server, "me:sesame")
        self.assertEqual([self.call(orq, "a"), self.call(orq, "b")], ["a", "b"])
        self.assertEqual([r.method for r in proxy.requests], ["POST", "POST"])
        for request in server.requests:
            self.assertEqual(request.header("proxy-authorization"), [])
            self.assertEqual(request.header("host"), [server.netloc])
        orq = self.through(proxy, server, "me:no")
        self.assertEqual(self.failure(orq, orq_min.APIError).status_code, 407)
        for no_proxy in ("127.0.0.1", "*"):
            os.environ["no_proxy"] = no_proxy
            self.assertEqual(self.call(self.through(proxy, server)), "hi")

    def refused(self, orq, *words, **given):
        """A failure that is the proxy's, and lets its password show nowhere."""
        error = self.failure(orq, orq_min.APIConnectionError, **given)
        self.assertFalse(error.sent)
        text = texts_of(error) + repr(vars(error))
        self.assertNotRegex(text, "swordfish|bWU6c3dvcmRmaXNo")  # nor in base64
        for word in words:
            self.assertIn(word, str(error))
        return error

    def test_a_variable_that_is_no_proxys_url_is_named_without_its_password(self):
        server = self.server()
        places = "http://%sproxy:port http://%s http://%sa..b:1 http://%s[::1 %sa..b"
        places += (
            " http://%s127.0.0.1:99999 http://%s127.0.0.1:0 http:/%sx socks5://%sx"
        )
        urls = [place.replace("%s", "me:swordfish@") for place in places.split()]
        for url, scheme in itertools.product(urls, ("http", "https")):
            with self.subTest(url, scheme=scheme):
                os.environ[scheme + "_proxy"] = url
                orq = self.client(server, server_url=scheme + "://" + server.netloc)
                error = self.refused(orq, scheme + "_proxy", retries=EAGER)
                self.assertFalse(error.temporary)
        self.assertEqual(server.peers, [])
        for url in ("http://me:1234#swordfish@h:1", "http://me:\udcff@h:1"):
            os.environ["http_proxy"] = url
            self.refused(self.client(server), "http_proxy")

    def test_a_proxy_that_opens_no_tunnel_is_named_with_its_status(self):
        server, secret = self.server(tls=server_context()), "Basic bWU6c3dvcmRmaXNo"
        body = secret.encode() + b" swordfish"
        for answer, status in (
            (reply(body, "407 swordfish"), "407"),
            (reply(body, "503 Busy", "Retry-After: 0"), "503"),
            (head("200 OK"), ""),
            (b"HTTP/1.1 " + body + b"\r\n\r\n", ""),
        ):
            with self.subTest(answer):
                proxy = self.server(then_close(answer))
                orq = self.through(proxy, server, "me:swordfish")
                again = {"retries": EAGER} if status else {}
                self.refused(orq, status, "(proxy %s)" % proxy.netloc, **again)
                self.assertEqual((len(proxy.requests), server.peers), (1, []))
        nobody = closed_url().partition("//")[2]
        os.environ["https_proxy"] = "me:swordfish@" + nobody
        self.refused(self.client(server), "(proxy %s)" % nobody)


class CertificatesAreVerified(ServerTest):
    """Certificates and host names are verified, and a failure says what to do."""

    def assert_refused(self, server, words, helps=False, **options):
        """At once, and in these words; SSL_CERT_FILE is named where it `helps`."""
        url = "https://" + server.netloc
        given = dict({"ssl_context": trusting_context(), "server_url": url}, **options)
        orq = self.client(server, retry_config=EAGER, **given)
        error = self.failure(orq, orq_min.APIConnectionError)
        self.assertEqual((error.sent, error.temporary), (False, False))
        self.assertRegex(str(error), words)
        help_given = [name in str(error) for name in ("SSL_CERT_FILE", "ssl_context")]
        self.assertEqual(help_given, [helps] * 2, error)
        until(lambda: server.connections)
        self.assertEqual((server.connections, server.requests), (1, []))

    def test_what_is_wrong_with_a_certificate_is_said(self):
        proxy, unknown = self.enter(Proxy()), {"helps": True, "ssl_context": None}
        some = ssl.get_default_verify_paths()._replace(cafile="/some/file")
        none = some._replace(cafile=None, capath=None)
        rows = [
            (ELSEWHERE, some, "certificate.*127.0.0.1", {}),
            (EXPIRED, some, "certificate.*expired", {}),
            (LEAF, some, "certificate[^(]*its authority( .proxy.*)?$", unknown),
        ]
        if os.name == "posix":  # the authorities of Windows are in no file
            rows.append((LEAF, none, "this machine has no authorities", unknown))
        for through in ("", proxy.url):  # a tunnel
            os.environ["https_proxy"] = through
            for certificate, paths, words, options in rows:
                server = self.server(tls=server_context(certificate))
                with mock.patch("ssl.get_default_verify_paths", return_value=paths):
                    self.assert_refused(server, words, **options)
        self.assertEqual(len(proxy.requests), len(rows))

    def test_the_callers_context_and_the_name_in_the_url_are_used(self):
        server = self.server(tls=server_context(ELSEWHERE))
        given = {"api_key": "k", "ssl_context": trusting_context()}
        given["server_url"] = "https://elsewhere.invalid:%d" % server.port
        with resolving(("127.0.0.1", server.port)):
            self.assertEqual(orq_min.create_response("a", "hi", **given).text, "hi")

    def test_a_failure_of_tls_is_said_in_the_words_of_openssl(self):
        words = ": TLS: (wrong version number|record layer failure)$"
        self.assert_refused(self.server(), words)
        weak = ssl.SSLError(1, "[SSL: DH_KEY_TOO_SMALL] dh key too small (_ssl.c:9)")
        weak.reason = "DH_KEY_TOO_SMALL"
        with mock.patch.object(ssl.SSLSocket, "do_handshake", side_effect=weak):
            self.assert_refused(self.server(), ": TLS: dh key too small$")


class TheAuthoritiesOfTheEnvironment(ServerTest):
    """SSL_CERT_FILE and SSL_CERT_DIR are used, by a context that is made once."""

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
        self.assertEqual(self.say_hi(SSL_CERT_FILE=self.authority), "hi")
        self.assertEqual(self.say_hi(SSL_CERT_DIR=self.folder), "hi")
        error = self.say_hi(SSL_CERT_FILE=self.write("other.pem", ELSEWHERE))
        self.assertIsInstance(error, orq_min.APIConnectionError)

    def test_they_need_not_be_strict_and_tls_is_1_2_at_least(self):
        """Python 3.13 sets VERIFY_X509_STRICT; nobody who names a file wants that."""
        made, original = [], ssl.create_default_context

        def make():
            made.append(original())
            made[-1].verify_flags |= ssl.VERIFY_X509_STRICT
            return made[-1]

        with mock.patch("ssl.create_default_context", make):
            lax = self.write("lax.pem", LAX_AUTHORITY)
            self.assertEqual(self.say_hi(SSL_CERT_FILE=lax), "hi")
            self.say_hi()
        self.assertTrue(made[1].verify_flags & ssl.VERIFY_X509_STRICT)
        for context in made:
            self.assertGreaterEqual(context.minimum_version, ssl.TLSVersion.TLSv1_2)

    def test_the_context_is_made_once_and_not_for_plain_http(self):
        plain, original = self.server().url, ssl.create_default_context
        os.environ["SSL_CERT_FILE"] = self.authority
        with mock.patch("ssl.create_default_context", side_effect=original) as make:
            orq = self.client(self.secure, ssl_context=None, server_url=plain)
            self.assertEqual((self.call(orq), make.call_count), ("hi", 0))
            for _ in range(2):
                self.assertEqual(self.call(orq, server_url=self.secure.url), "hi")
            self.client(self.secure, ssl_context=None)
            self.assertEqual(make.call_count, 2)


class TheKeyIsInNoText(ServerTest):
    """A key that a server echoes is masked in whatever we say."""

    def assert_unseen(self, key, error):
        """In no text, nor in the frames; those of http.client are none of them."""
        self.assertNotIn(key, texts_of(error))
        self.assertIsNone(error.__cause__ or error.__context__)
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        modules = {frame.f_globals["__name__"] for frame in frames}
        self.assertIn(orq_min.__name__, modules)
        self.assertNotIn("http.client", modules)
        assert_no_local_holds(key, error)

    def test_an_echoed_key_is_masked(self):
        for key in ("test-key-123", "k\xe9y-of-ours"):
            data = key.encode("latin-1")
            as_json = json.dumps({"message": "bad key " + key}).encode()
            for answer in (
                reply(as_json, "401 No"),
                reply(as_json, "429 " + key),  # which is tried again
                reply(b"<b>" + key.encode() + b"</b>", "403 " + key),
                reply(b"", "302 X", "Location: http://h/?k=" + key),
                data + b"\r\n\r\n",
                b"HTTP/1.1 " + data + b" OK\r\n\r\n",
                head("200 OK", "Transfer-Encoding: chunked") + data + b"\r\n",
            ):
                with self.subTest(answer), logged() as records:
                    server = self.server(then_close(answer))
                    orq = self.client(server, api_key=key, retry_config=EAGER)
                    error = self.failure(orq)
                    self.assert_unseen(key[:6], error)  # nor half of it
                    log = "\n".join(record.getMessage() for record in records)
                    self.assertIn(": ", log)
                    objects = orq, orq.agents, orq.agents.responses
                    self.assertNotIn(key[:6], "%s %r" % (log, objects))

    def test_one_in_http_headers_is_in_no_frame_of_ours(self):
        server = self.server(reply(b"{}", "401 No"))
        responses, key = self.client(server).agents.responses, "key-of-a-gateway"
        given = {"agent_key": "a", "http_headers": {"authorization": "Bearer " + key}}
        calls = [
            lambda **more: responses.create(message="hi", **more),
            lambda **more: responses.get(task_id="t", **more),
            lambda **more: asyncio.run(responses.create_async(message="hi", **more)),
            lambda **more: asyncio.run(responses.get_async(task_id="t", **more)),
            lambda **more: orq_min.create_response(message="hi", **more),
        ]
        urls = {server.url: orq_min.APIError, "nonsense": orq_min.ValidationError}
        urls[closed_url()] = orq_min.APIConnectionError
        for call, (url, kind) in itertools.product(calls, urls.items()):
            with self.subTest(kind=kind):
                try:  # assertRaises would clear the frames
                    self.fail(call(**given, server_url=url, retries=None))
                except kind as error:
                    self.assert_unseen(key, error)
        self.assertIn(key, str(server.requests))

    def test_one_that_is_in_the_url_is_masked(self):
        key = "test-key-123"
        for url in (self.server({"status": 404}).url, closed_url()):
            with logged() as records:
                orq = self.client(self.server(), server_url=url)
                text = texts_of(self.failure(orq, agent_key=key))
            text += "".join(record.getMessage() for record in records)
            self.assertIn("***/responses", text)
            self.assertNotIn(key, text)

    def test_only_a_text_that_is_long_enough_for_a_key_is_masked(self):
        body = '{"message": "it is bad.."}'
        server = self.server(reply(body.encode(), "401 No"))
        for key in ("is bad.", "Bearer is bad.", "is bad..", "Bearer is bad.."):
            error = self.failure(self.client(server, api_key=key), orq_min.APIError)
            message = "it ***" if key.endswith("..") else "it is bad.."
            self.assertEqual((error.message, error.body), (message, body))
            self.assertIn('"%s"' % message, str(error))

    def test_no_variable_of_another_name_shows_it(self):
        def call(api_key, **given):
            create_async = orq_min.Orq(api_key).agents.responses.create_async
            asyncio.run(create_async(agent_key="a", message="b", **given))

        def call_once(api_key, **given):
            orq_min.create_response("a", "b", api_key=api_key, **given)

        plain, secure = self.server(), self.server(tls=server_context())
        os.environ["ORQ_BASE_URL"] = plain.url  # whose clients are made at once
        key, closed = "test-key-123", {"server_url": closed_url()}
        calls = [(key + "\n\u20ac", closed), (functools.partial(str, key), closed)]
        for given in (
            closed,
            {"server_url": secure.url},
            {"server_url": "https://" + plain.netloc},
            {"http_headers": {"a b": "c"}},
        ):
            calls.append((key, given))
        for function, (api_key, given) in itertools.product((call, call_once), calls):
            with self.subTest(function.__name__, key=api_key, given=given):
                try:
                    function(api_key, retries=None, **given)
                except orq_min.OrqError as error:
                    self.assert_unseen(key, error)
                else:
                    self.fail("nothing was raised")

    def test_a_key_that_goes_in_clear_is_worth_one_warning_a_client(self):
        server = self.server()
        near = "localhost LOCALHOST 127.0.0.1 127.1.2.3 [::1]".split()
        far = "service.invalid localhost.evil.com 127.evil.com 127.0.0.1.evil.com"
        for host in near + far.split():
            url = "http://%s:%d" % (host, server.port)
            with resolving(("127.0.0.1", server.port)), logged("WARNING") as records:
                orq = self.client(server, server_url=url)
                self.assertEqual([self.call(orq), self.call(orq)], ["hi", "hi"])
            texts = [record.getMessage() for record in records]
            self.assertEqual(len(texts), 0 if host in near else 1, texts)
            self.assertNotIn("test-key-123", "".join(texts))


class OnlyWhatCannotHaveRunIsRetried(ServerTest):
    """Each row of the table in RetryConfig's docstring, under each policy.

    A row such as `yny` says whether another attempt is made by default, with
    `retry_connection_errors=False`, and with True. That attempt always succeeds.
    """

    def setUp(self):
        super().setUp()
        wait = threading.Event().wait
        self.enter(mock.patch("time.sleep", lambda seconds: wait(0.001)))

    def assert_row(self, row, statuses=None, **given):
        """What comes after a failure: another attempt, or an error."""
        policies = [
            (letter, orq_min.RetryConfig("backoff", SOON, choice, statuses))
            for letter, choice in zip(row, (None, False, True))
        ]
        if statuses is None:
            policies.append((row[0], orq_min.UNSET))
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            calls = [pool.submit(self.fail_once, each[1], **given) for each in policies]
        for (letter, policy), call in zip(policies, calls):
            with self.subTest(policy=policy):
                got, requests = call.result()
                self.assertEqual(got == "hi", letter == "y", got)
                self.assertLessEqual(requests, 2 if letter == "y" else 1)

    def fail_once(self, retries, step=None, greet=None, tls=None, get=False, **given):
        """(What a call comes to if a request or a connection fails first, requests)."""
        steps = [step, reply("hi")] if step else [reply("hi")]
        first = greet and (lambda peer: peer.number or greet(peer))
        server = self.server(*steps, greet=first, tls=tls)
        responses = self.client(server, retry_config=orq_min.UNSET).agents.responses
        call = responses.get if get else responses.create
        given.setdefault("task_id" if get else "message", "hi")
        try:
            got = call(agent_key="a", retries=retries, **given).text
        except orq_min.OrqError as error:
            got = error
        return got, len(server.requests)

    def test_names_and_addresses(self):
        closed = self.enter(socket.socket())  # bound, but it does not listen
        closed.bind(("127.0.0.1", 0))
        for row, first in (
            ("yny", socket.gaierror(socket.EAI_AGAIN, "Try again")),
            ("nnn", socket.gaierror(socket.EAI_NONAME, "Not known")),
            ("yny", closed.getsockname()),
            ("yny", self.enter(full_backlog())),
        ):
            seen = set()

            def look_up(host, port, *_, seen=seen, first=first, **__):
                address = ("127.0.0.1", port) if port in seen else first
                seen.add(port)
                if isinstance(address, Exception):
                    raise address
                return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address)]

            with mock.patch("socket.getaddrinfo", look_up), self.subTest(first):
                with mock.patch("orq_min.CONNECT_SECONDS", 1):
                    self.assert_row(row)

    def test_tls(self):
        for name, row, failure, seconds in (
            ("a close", "yny", hang_up, 9),
            ("a reset", "yny", lambda p: (p.sock.recv(99), break_off(p)), 9),
            ("a timeout", "yny", Connection.hang, 1),
            ("plain HTTP", "nnn", then_close(reply(b"", "400 Bad Request")), 9),
        ):
            with self.subTest(name), mock.patch("orq_min.CONNECT_SECONDS", seconds):
                self.assert_row(row, greet=failure, tls=server_context())
        self.assert_row("nnn", tls=server_context(ELSEWHERE))

    def test_statuses(self):
        """503 too: gateways say so after the service has had the request."""
        for statuses, override, row, row_of_get in (
            ("301 307 400 401 404 408 409 425 501 599", None, "nnn", "nnn"),
            ("500 502 503 504", None, "nyy", "yyy"),
            ("429", None, "yyy", "yyy"),
            ("429", [], "nnn", "nnn"),
            ("429 503 599", ["429", "5xx"], "yyy", "yyy"),
            ("400 429 503", ("4XX", "503"), "yyy", "yyy"),
            ("500", ("4XX", "503"), "nnn", "nnn"),
        ):
            for status in statuses.split():
                answer = reply(b"{}", status + " X", "Retry-After: 0")
                with self.subTest(status=status, override=override):
                    self.assert_row(row, override, step=answer)
                    self.assert_row(row, override, step=then_close(answer[:-1]))
                    self.assert_row(row_of_get, override, step=answer, get=True)
        self.assert_row("nny", ["5XX"], step=hang_up)

    def test_a_request_that_left_is_retried_only_if_asked(self):
        for name, step in {
            "a reset": break_off,
            "a close": hang_up,
            "a cut status line": then_close(b"HTTP/1.1 5"),
            "a cut body": cut_off,
            "cut chunks": then_close(chunked(b"{}")[:-6]),
            "no HTTP": then_close(b"SMTP ready\r\n\r\n"),
        }.items():
            with self.subTest(name):
                self.assert_row("nny", step=step)
                self.assert_row("yny", step=step, get=True)
        self.assert_row("nnn", step=reply("hi", "200 OK", *["X: y"] * 99))  # too many
        self.assert_row("nn", step=then_close(b"HTTP/1.1 200 OK\r\nContent-"))
        self.assert_row("nny", step=Connection.hang, timeout_ms=800)

        def below_tls(peer):
            socket.socket.send(peer.sock, b"this is no record of TLS")
            peer.close()

        self.assert_row("nny", step=below_tls, tls=server_context())

    def test_a_request_that_never_completely_left(self):
        large = {"message": LARGE}  # of which only a piece is read
        self.assert_row("yny", greet=lambda p: (p.sock.recv(99), break_off(p)), **large)

    def test_a_2xx_that_cannot_be_used_is_never_retried(self):
        bodies = (200, b""), (202, b"<html>"), (204, b""), (200, b"\x1f\x8b, damaged")
        for status, body in bodies:
            for statuses in (None, ["200", "2XX", "429"]):
                with self.subTest(status=status, statuses=statuses):
                    self.assert_row("nnn", statuses, step=reply(body, "%d X" % status))

    def test_a_kept_connection_that_breaks_is_no_licence_to_send_twice(self):
        """The server may have run the agent before the connection broke."""
        server = self.server(repeat_text, break_off, repeat_text)
        orq = self.client(server, retry_config=orq_min.UNSET)
        self.assertEqual(self.call(orq), "hi")
        self.assertTrue(self.failure(orq, orq_min.APIConnectionError).sent)
        self.assertEqual(server.on, [0, 0])


class BrokenAnswersDoNoHarm(ServerTest):
    """Whatever a server sends, a call ends in an answer or an OrqError."""

    ANSWERS = 400
    STATUSES = "200 200 202 404 429 500 503 307".split()
    POLICIES = (  # (policy, the statuses after which it tries again)
        (orq_min.UNSET, rb"429"),
        (orq_min.RetryConfig("backoff", SOON, False), rb"429|5[0-9][0-9]"),
        (AT_ALL_COSTS, rb""),
    )

    def broken(self, chance, text):
        """A well-formed answer with one to three things done to it."""
        body, status = saying(text), "%s X" % chance.choice(self.STATUSES)
        if chance.random() < 0.3:
            body = gzip.compress(body, 1)
        answer = reply(body, status, "Location: /again")
        if chance.random() < 0.5:
            answer = chunked(body, "Location: /again", status=status, size=50)
        for _ in range(chance.randint(1, 3)):
            start = chance.randrange(len(answer) + 1)
            end = min(len(answer), start + chance.randint(1, 40))
            noise = bytes(chance.randrange(256) for _ in range(chance.randint(1, 6)))
            lines = answer.split(b"\r\n")
            first, last = chance.choice([*re.finditer(b"[0-9]+|$", answer)]).span()
            number = chance.choice((b"0", b"-1", b"7", b"429", b"99999999", noise))
            changed = (
                answer[:start],  # cut at the end
                answer[:start] + answer[end:],  # cut out of the middle
                answer[:end] + answer[start:],  # a piece twice
                answer[:start] + noise + answer[end:],
                b"\r\n".join(chance.sample(lines, len(lines))),
                answer[:first] + number + answer[last:],
                answer + chance.choice((noise, FORGED, b"\r\n", answer)),
            )
            answer = chance.choice(changed)
        return answer

    def test_hundreds_of_broken_answers(self):
        chance, seen = random.Random(20251120), collections.Counter()
        ended, settled = threading.Event(), threading.Event()

        def step(peer):
            text = said(peer.request)
            seen[text] += 1
            if text.startswith("good") or seen[text] > 1:
                return peer.send(reply(text))
            peer.send(answer)
            # Most servers hang up at once. The others do so if the client waits for
            # more, or else keep the connection for the next request.
            if number % 8 or not ended.wait(0.01):
                peer.close()
            settled.set()

        orq, outcomes = self.client(self.server(step), timeout_ms=3000), []
        wait = threading.Event().wait
        self.enter(mock.patch("time.sleep", lambda seconds: wait(0.001)))
        for number in range(self.ANSWERS):
            text, good = "token %08x." % zlib.crc32(b"%d" % number), "good %d" % number
            answer = self.broken(chance, text)
            retries, may = self.POLICIES[number % len(self.POLICIES)]
            ended.clear(), settled.clear()
            with self.subTest(answer=answer):
                got = self.outcome(orq, text, retries=retries) or ""
                ended.set()
                self.assertTrue(settled.wait(5))
                self.assertEqual([self.call(orq, good), seen[good]], [good, 1])
                tokens = set(re.findall(r"token \w{8}\.", str(got)))
                self.assertFalse((tokens & set(seen)) - {text})
                self.assertLessEqual(seen[text], 2 if re.search(may, answer) else 1)
                outcomes.append(type(got))
        for kind in (str, orq_min.APIError, orq_min.APIConnectionError):
            self.assertGreater(outcomes.count(kind), self.ANSWERS // 16, kind)


class WrappersOfTheOpener(ServerTest):
    """Whatever wraps urllib's opener does no harm."""

    def test_it_changes_no_answer_no_key_no_host_and_causes_no_attempt(self):
        server = self.server()
        orq = self.client(server, retry_config=AT_ALL_COSTS)
        original = urllib.request.OpenerDirector.open

        def wrapper(opener, request, *given, **more):
            request.add_header("Authorization", "x")
            request.add_header("Host", "x")
            original(opener, request, *given, **more)
            if len(server.requests) == 2:
                raise OSError("of the wrapper")
            return urllib.response.addinfourl(io.BytesIO(), {}, "x:", 500)

        with mock.patch.object(urllib.request.OpenerDirector, "open", wrapper):
            self.assertEqual(self.call(orq), "hi")
            self.assertRaisesRegex(OSError, "of the wrapper", self.call, orq)
        self.assertEqual(len(server.requests), 2)
        for request in server.requests:
            self.assertEqual(request.header("authorization"), ["Bearer " + server.key])
            self.assertEqual(request.header("host"), [server.netloc])


class SignalsAreNotTheNetworks(ServerTest):
    """What no socket raised is not ignored, nor followed by another attempt."""

    def test_wherever_it_comes(self):
        server = self.server(reply(gzip.compress(saying("hi"))))
        self.enter(resolving(*[("127.0.0.1", server.port)] * 2))
        places = "socket.getaddrinfo socket.socket.connect_ex socket.socket.send"
        places = (*places.split(), "zlib.decompressobj")
        for place, kind in itertools.product(places, (TimeoutError, ConnectionError)):
            late = mock.patch(place, side_effect=[kind("late")])
            orq = self.client(server, retry_config=AT_ALL_COSTS)
            with self.subTest(place, kind=kind), late as patched:
                with self.assertRaises((kind, orq_min.APIConnectionError)):
                    self.call(orq)
                self.assertEqual(patched.call_count, 1)


class ServersThatAnswerEarly(ServerTest):
    """A 2XX that begins before the request has left: the agent has run."""

    def test_the_request_is_sent_to_its_end_and_not_again(self):
        start = head("200 OK", "Content-Length: %d" % len(saying("whole"))) + b"{"

        def answer(peer):
            peer.send(start)
            length = int(peer.request.header("content-length")[0])
            self.assertEqual(len(peer.stream.read(length)), length)
            peer.send(saying("whole")[1:])

        for tls in (None, server_context()):
            server = self.server(answer, then_close(start), FORGED, tls=tls, early=True)
            orq = self.client(server, retry_config=orq_min.UNSET)
            self.assertEqual(self.call(orq, LARGE), "whole")
            error = self.failure(orq, orq_min.APIConnectionError, text=LARGE)
            self.assertTrue(error.sent)
            self.assertEqual(len(server.requests), 2)

    def test_one_that_stops_the_upload_until_the_deadline_is_not_retried(self):
        done = threading.Event()

        def stop(peer):
            peer.send(reply("hi"))
            done.wait(5)

        server = self.server(stop, early=True)
        orq = self.client(server, retry_config=orq_min.UNSET, timeout_ms=900)
        error = self.failure(orq, orq_min.APITimeoutError, text=LARGE)
        done.set()
        self.assertTrue(error.sent)
        self.assertEqual(len(server.requests), 1)


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


def demo(argv):
    """`demo`: show a small session of the command line with the stand-in."""
    if argv:
        print("usage: demo", file=sys.stderr)
        return 2
    statuses = []

    def type_in(*argv):
        """Show a command and what it says, which is returned too."""
        print("$ %s %s" % (shown_command(), " ".join(map(shlex.quote, argv))))
        done = subprocess.run(
            [sys.executable, MODULE, *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
            env=clean_environment(PYTHONIOENCODING="utf-8", **given),
            cwd=folder,
        )
        print(done.stdout, flush=True)
        statuses.append(done.returncode)
        return done.stdout

    with StandIn() as service, tempfile.TemporaryDirectory() as folder:
        given = {"ORQ_BASE_URL": service.url, "ORQ_API_KEY": service.key}
        service.background_seconds = 0  # nobody likes to wait
        type_in("my-agent", "Hello")
        print("$ echo Monday,20 > sales.csv")
        with open(os.path.join(folder, "sales.csv"), "w", newline="\n") as file:
            file.write("Monday,20\n")
        type_in("my-agent", "Sum this up", "--file", "sales.csv")
        said = type_in("my-agent", "What is the weather in Paris?")
        options = re.findall(r"--(?:task-id|tool-result)=\S+", said)
        options = [option.replace("=JSON", '={"sky": "clear"}') for option in options]
        type_in("my-agent", *options)
        task_id = type_in("my-agent", "Write the report", "--background")
        type_in("my-agent", "--wait", task_id.strip())
        service.next({"status": 429, "headers": {"Retry-After": "1"}})
        type_in("my-agent", "Hello again")
    return 1 if any(statuses) else 0


# ----------------------------------------------------------------------------
# This file's own commands, and the README
# ----------------------------------------------------------------------------

HERE = os.path.dirname(os.path.abspath(__file__))
README = ""
with contextlib.suppress(OSError, ValueError):
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as stream:
        README = stream.read()
beside_our_readme = unittest.skipUnless(
    README.startswith("# orq_min\n"), "no README.md of orq_min is beside this file"
)


def readme_blocks(language):
    return re.findall("^```%s\n(.*?)^```" % language, README, re.M | re.S)


class ToPlayWith(ServerTest):
    """`serve` and `demo` need no account; the README's tests run `demo`."""

    @unittest.skipIf(os.name == "nt", "there is no SIGINT to send")
    def test_serve_says_how_to_use_it_and_logs_each_request_until_ctrl_c(self):
        code = """
            import runpy
            sys.exit(runpy.run_path(sys.argv[1])["serve"]([]))
        """
        with script(code, os.path.abspath(__file__)) as process:
            self.addCleanup(process.kill)
            lines = "".join(process.stdout.readline().decode() for _ in range(9))
            given = dict(re.findall(r"export (\w+)=(\S+)\n", lines))
            other = dict(given, ORQ_API_KEY="another")
            calls = ("my-agent", given), ("nobody", given), ("my-agent", other)
            done = [run(agent, "hi", env=env).stdout for agent, env in calls]
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
        self.assertEqual(done[0], b"You said: hi\n")
        self.assertRegex(lines, r'\npython3 \S*orq_min\.py my-agent "Hello"\n')
        self.assertEqual((process.returncode, err), (0, b""))
        pattern = "^POST /v2/agents/(.*)/responses: ([0-9]+)(?: .*)?$"
        found = re.findall(pattern, out.decode(), re.M)
        wanted = [("my-agent", "200"), ("nobody", "404"), ("my-agent", "401")]
        self.assertEqual(found, wanted)
        self.assertNotIn("another", out.decode())

    def test_a_wrong_use_of_them_is_said_in_a_line(self):
        taken = str(self.enter(StandIn()).port)
        self.enter(mock.patch("time.sleep", side_effect=KeyboardInterrupt))
        for command, argv, wanted, words in (
            (serve, ["1", "2"], 2, "usage: serve"),
            (serve, ["web"], 2, "usage: serve"),
            (serve, [taken], 1, "cannot listen on port " + taken),
            (serve, ["99999"], 1, "cannot listen on port 99999"),
            (demo, ["Hello"], 2, "usage: demo"),
        ):
            with self.subTest(argv), contextlib.redirect_stderr(io.StringIO()) as err:
                self.assertEqual(command(argv), wanted)
                self.assertRegex(err.getvalue(), r"\A%s.*\n\Z" % words)


class WithoutUsage(StandIn):
    """The service, if it leaves out what an answer need not hold."""

    def behave(self, recorded):
        status, body = super().behave(recorded)
        for name in ("usage", "finish_reason", "telemetry", "created_at", "model"):
            body.pop(name, None)
        return status, body


@beside_our_readme
class TheReadmeRuns(ServerTest):
    """Who follows the README from its first line on gets what it says."""

    def setUp(self):
        super().setUp()
        top = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, top)
        self.checkout = os.path.join(top, "checkout")
        os.mkdir(self.checkout)
        for path in (MODULE, __file__, os.path.join(HERE, "README.md")):
            shutil.copy(path, self.checkout)
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
        others = [block for block in blocks if "unittest" not in block]
        self.assertEqual(len(blocks) - len(others), 1)
        others.remove("python3 test_orq_min.py demo\n")
        service = self.enter(StandIn(key=self.key))
        service.background_seconds = 0

        def follow(commands):
            return self.follow("sh", "-euc", commands, service=service)

        shown, done = at_once(follow, ["python3 test_orq_min.py demo", "".join(others)])
        self.assertEqual((shown.stderr, shown.returncode), ("", 0))
        self.assertEqual(shown.stdout.strip(), readme_blocks("text")[0].strip())
        self.assertEqual((done.stderr, done.returncode), ("", 0))
        self.assertNotIn(self.key, done.stdout)  # but --dry-run shows the rest
        self.assertRegex(done.stdout, r"POST \S+\nAuthorization: .*\*\*\*\n")
        self.assertIn("You said: Hello\n", done.stdout)

    def test_each_python_example_runs_whatever_the_answer_lacks(self):
        blocks = readme_blocks("python")
        self.assertGreaterEqual(len(blocks), 9)
        service = self.enter(WithoutUsage(key=self.key))
        given = {"service": service, "ORQ_API_KEY": self.key}

        def run_block(block):
            return self.follow(sys.executable, "-W", "error", "-c", block, **given)

        for block, done in zip(blocks, at_once(run_block, blocks)):
            with self.subTest(block=block):
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
    """It names each thing that a reader may use."""

    def test_it_names_what_a_reader_needs(self):
        small = "Function Telemetry PromptTokensDetails CompletionTokensDetails"
        names = set(orq_min.__all__) - set(small.split())  # those of an answer
        for function in (orq_min.Responses.create, orq_min.Responses.get, orq_min.Orq):
            names |= set(inspect.signature(function).parameters) - {"self"}
        for config in (orq_min.RetryConfig, orq_min.BackoffStrategy):
            names |= {field.name for field in dataclasses.fields(config)}
        options = run("--help", env={"COLUMNS": "200"}).stdout.decode()
        names |= set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", options))
        names |= set(re.findall(r"\b(?:ORQ|SSL)[A-Z_]+", orq_min.__doc__))
        names |= set("status_code headers body data errors sent temporary".split())
        names |= set("create_async get_async text error status raw".split())
        names |= set("0 1 2 3 130".split())  # exit statuses
        code = "".join(re.findall("`[^`\n]+`", README)) + readme_blocks("text")[1]
        self.assertEqual(names - set(re.findall(r"[\w-]+", code)), set())

    def test_its_tree_of_errors_is_that_of_the_classes(self):
        parents = {-2: Exception}
        for indent, name in re.findall(r"^( *)(\w+)", readme_blocks("text")[1], re.M):
            found = getattr(orq_min, name)
            self.assertIs(found.__bases__[0], parents[len(indent) - 2])
            parents[len(indent)] = found
        self.assertEqual(set(parents), {-2, 0, 2, 4})


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
        for first in iter(peer.stream.readline, b""):
            headers = b"".join(iter(peer.stream.readline, b"\r\n"))
            length = re.search(rb"(?i)^content-length: *(\d+)", headers, re.M).group(1)
            peer.stream.read(int(length))
            if b"/late/" in first:
                peer.pause(1)
            peer.send(large if b"/large/" in first else small)
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


def timed(work, count=1):
    """The seconds that a work takes, one of several in a row."""
    started = time.perf_counter()
    for _ in range(count):
        work()
    return (time.perf_counter() - started) / count


def in_turn(measures, rounds):
    """What each of them measures in all rounds, after one that does not count."""
    found = [[] for _ in measures]
    for number in range(rounds + 1):
        # there and back, as what comes first may have it harder
        for index in list(range(len(measures)))[:: 1 if number % 2 else -1]:
            found[index].append(measures[index]())
    return [values[1:] for values in found]


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
        has_sdk = importlib.util.find_spec("orq_ai_sdk")
        self.sdk = has_sdk and importlib.import_module("orq_ai_sdk")

    def row(self, what, than, shown, ours, theirs, bound=None, compared=None):
        """`shown` is how to write a value; `compared` is bounded, for each pair."""
        form, sign, turn = shown if compared else "%.2f", "<=", 1
        if than in ("urlopen", "orq_ai_sdk") and not compared:  # how much faster
            form, sign, turn = "%.1f x", ">=", -1
        values = compared or [(a / b) ** turn for a, b in zip(ours, theirs)]
        limit = judged = ""
        if bound is not None and sys.implementation.name == "cpython":
            limit = "%s %s" % (sign, form % bound)
            judged = verdict([turn * value for value in values], turn * bound)
            self.verdicts.append(judged)
        medians = [statistics.median(taken) for taken in (ours, theirs, values)]
        texts = [shown % medians[0], shown % medians[1], form % medians[2]]
        print(self.ROW % (what, than, *texts, limit, judged), flush=True)

    def run(self):
        print("Python %s\n%s\n" % (sys.version, EXPLANATION))
        print(self.ROW % ("what", "against", "ours", "theirs", "ratio", "bound", ""))
        self.imports()
        self.calls("HTTP", self.url)
        self.calls("TLS", self.https_url)
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
        rows = zip(["the stdlib's", "orq_ai_sdk"], times[1:], sizes[1:], [1.25, None])
        for than, time_, size, bound in rows:
            self.row("import", than, "%.1f ms", times[0], time_, bound)
            more = [ours - theirs for ours, theirs in zip(sizes[0], size)]
            most = bound and 2  # MiB
            self.row("import, memory", than, "%.1f MiB", sizes[0], size, most, more)

    def calls(self, name, url):
        context = trusting_context() if name == "TLS" else None
        path, netloc = "/v2/agents/any/responses", url.partition("//")[2]
        message = {"role": "user", "parts": [{"kind": "text", "text": "Hello"}]}
        body = {"message": message, "background": False}
        headers = {"Authorization": "Bearer k", "Content-Type": "application/json"}
        headers.update(Accept="application/json")
        bare = http.client.HTTPConnection(netloc)
        if context:
            bare = http.client.HTTPSConnection(netloc, context=context)

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
        if self.sdk:
            made = importlib.import_module("httpx").Client(verify=trusting_context())
            sdk = self.sdk.Orq(api_key="k", server_url=url, client=made)
            create = sdk.agents.responses.create
            works.append(functools.partial(create, agent_key="any", message=message))
        with orq_min.Orq("k", server_url=url, ssl_context=context) as orq:
            measures = [lambda work=work: 1e6 * timed(work, 40) for work in works]
            found = in_turn(measures, 40)
        bare.close()
        others = ["bare http.client", "urlopen", "orq_ai_sdk"]
        for than, theirs, bound in zip(others, found[1:], [2, context and 5, None]):
            self.row("one call, " + name, than, "%.0f us", found[0], theirs, bound)

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
        """
        path = os.path.join(self.directory, "file.bin")
        pathlib.Path(path).write_bytes(os.urandom(16 * MIB))
        file = "orq_min.FilePart.from_path(%r)" % path
        for what, part, agent, size, bound in (
            ("16 MiB file attached, memory", file, "any", 16, 6),
            ("32 MiB answer, memory", "orq_min.TextPart('x')", "large", 32, 5),
        ):
            given = code.format(part, agent), os.path.dirname(MODULE), self.url
            more = [fresh_process(*given)[1] / MIB for _ in range(3)]
            self.row(what, "its size", "%.0f MiB", more, [size] * 3, bound)

    def many_tasks(self):
        async def run():
            async with orq_min.Orq("k", server_url=self.url) as orq:
                create = orq.agents.responses.create_async
                tasks = [create(agent_key="late", message="hi") for _ in range(200)]
                await asyncio.gather(*tasks)

        taken = [timed(lambda: asyncio.run(run())) for _ in range(3)]
        what = "200 create_async of 1 s at once"
        self.row(what, "one", "%.2f s", taken, [1.0] * 3, 1.3)

    def many_threads(self):
        def talk(orq):
            for _ in range(25):
                orq.agents.responses.create(agent_key="any", message="Hello")

        def measure(chosen):
            return 1e6 / 16 / 25 * timed(lambda: list(pool.map(talk, chosen)))

        clients = [orq_min.Orq("k", server_url=self.url) for _ in range(16)]
        works = [clients[:1] * 16, clients]
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            measures = [functools.partial(measure, chosen) for chosen in works]
            one, many = in_turn(measures, 24)
        what = "16 threads on one client, a call"  # 0.1 is noise
        self.row(what, "16 clients", "%.0f us", one, many, 1.1)


def bench(argv):
    """`bench`: measure each row of a table, side by side with others."""
    if argv == ["serve"]:
        return bench_server()
    environment = mock.patch.dict(os.environ, clean_environment(), clear=True)
    with environment, tempfile.TemporaryDirectory() as directory:
        server = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), "bench", "serve"],
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

#!/usr/bin/env python3
# SPDX-License-Identifier: MIT-0
# orq_min.py 3.0.0: Orq.ai's create-response operation in one file, for Python 3.7+.
# ruff: noqa: I001, PYI034, UP006, UP007, UP033, UP035, UP045 (for Python 3.7)
# pyright: basic
"""Send a message to an Orq.ai agent and get back what it did.

    from orq_min import Orq

    with Orq() as orq:  # the key is in ORQ_API_KEY
        res = orq.agents.responses.create(agent_key="my-agent", message="Hello")
        print(res.text, res.task_id)

A quick script may call `create_response("my-agent", "Hello").text`, and a program on
asyncio `create_async`. In a shell, see `python3 orq_min.py --help`.

Each call is checked before anything is sent. A 2XX that holds a JSON object is never
refused. An agent run costs money: by default, `create` tries again only if its request
was not sent completely, or after a 429. No redirect is followed.

    OrqError                 base of every error of this module
      ValidationError        the call is wrong; nothing was sent (a ValueError too)
      APIError               the server answered, but not with a usable 2XX
      APIConnectionError     no complete answer came
        APITimeoutError      ... in time

Environment: ORQ_API_KEY, ORQ_BASE_URL, SSL_CERT_FILE, SSL_CERT_DIR, and the proxies as
urllib reads them. The logger has this module's name. It logs each retry, and a key that
goes in clear, at WARNING and each attempt at DEBUG, but never a header or a body.
"""

import base64
import contextlib
import contextvars
import datetime
import enum
import errno
import functools
import http.client
import io
import json
import logging
import mimetypes
import os
import random
import re
import select
import socket
import ssl
import sys
import threading
import time
import types
import typing
import urllib.parse
import urllib.request
import zlib
from collections import abc
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Callable, Coroutine, Dict, Iterator, List
from typing import Mapping, NamedTuple, NoReturn, Optional, Sequence, Tuple, TypeVar
from typing import Union, cast

if TYPE_CHECKING:
    from typing_extensions import Concatenate, ParamSpec

    P = ParamSpec("P")

# fmt: off
__all__ = [
    "DEFAULT_RETRY", "UNSET", "A2AMessage", "APIConnectionError", "APIError",
    "APITimeoutError", "BackoffStrategy", "BinaryFormat", "CompletionTokensDetails",
    "Contact", "CreateAgentResponseResponseBody", "CreateAgentResponseThread",
    "CreateAgentResponseUsage", "DataPart", "ErrorPart", "FileInURIFormat", "FilePart",
    "Function", "Identity", "Memory", "Orq", "OrqError", "Output", "PendingToolCalls",
    "PromptTokensDetails", "Responses", "RetryConfig", "Telemetry", "TextPart",
    "ToolCallPart", "ToolResultPart", "UnknownPart", "ValidationError",
    "create_response",
]
# fmt: on

__version__ = "3.0.0"

MAX_WAIT_MS = 2**31 - 1  # 25 days, the most that the system's waits take
MAX_ANSWER_BYTES = 256 * 2**20
CONNECT_SECONDS = 10.0  # to connect, to open a tunnel and to start TLS
ADDRESS_SECONDS = 0.5  # for each address of a host, in a first round
TURN_SECONDS = 0.25  # from one look at the clock to the next
IDLE_SECONDS = 4.0  # many servers close an idle connection after 5
MAX_IDLE = 16  # connections that a client keeps
BLOCK_BYTES = 64 * 2**10  # read or sent at once

UNSET: Any = ...  # "not given", where None means something else

T = TypeVar("T")
Problems = List[Tuple[str, str]]  # (path, what is wrong there)
_Path = Union[str, "os.PathLike[str]"]

_log = logging.getLogger(__name__)

# --- Errors -----------------------------------------------------------------


class OrqError(Exception):
    """The base of our errors. Without an answer, these four attributes are None."""

    status_code: Any = None
    headers: Any = None  # found by names in any case
    body: Any = None  # the text as it came
    data: Any = None  # the decoded JSON of the body

    def __init__(self, text: Any = "") -> None:  # one argument, for copy and pickle
        super().__init__(text)
        self.message = str(self)


class ValidationError(OrqError, ValueError):
    """The call is wrong; nothing was sent. `errors` is a list of (path, problem)."""

    def __init__(self, errors: Problems) -> None:
        self.errors = errors
        super().__init__(errors)

    def __str__(self) -> str:
        return "; ".join(f"{path}: {problem}" for path, problem in self.errors)


class APIError(OrqError):
    """The server answered, but not with a usable 2XX. `message` is its own, if any."""


class APIConnectionError(OrqError):
    """No complete answer came."""

    sent: bool = False  # the agent may have run, as the whole request was sent
    temporary: bool = True  # another attempt may do better


class APITimeoutError(APIConnectionError):
    """No complete answer came in time."""


# --- Request types ----------------------------------------------------------
# An annotation says what its field may hold. A mapping may stand for any of these.


class _Checked:
    """Base of classes that are checked when built. Raises ValidationError."""

    def __post_init__(self) -> None:
        problems: Problems = []
        _encode_object((type(self),), self, "", problems)
        if problems:
            raise ValidationError(problems)


class _Readable:
    """Base of classes that can be read as dicts too: `part["text"]`."""

    def __contains__(self, name: object) -> bool:
        return self.get(str(name)) is not None

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise KeyError(name)
        return self.get(name)

    def get(self, name: str, default: Any = None) -> Any:
        value = vars(self).get(_PYTHON_NAMES.get(name, name), vars(self).get(name))
        return default if value is None else value


@dataclass
class TextPart(_Checked, _Readable):
    text: str
    kind: str = "text"


@dataclass
class BinaryFormat(_Checked, _Readable):
    bytes_: str  # base64; `bytes` in JSON
    mime_type: Optional[str] = None
    name: Optional[str] = None


@dataclass
class FileInURIFormat(_Checked, _Readable):
    uri: str  # from which the service fetches the file
    mime_type: Optional[str] = None
    name: Optional[str] = None


@dataclass
class FilePart(_Checked, _Readable):
    """A file. Without `mime_type`, `from_...` go by the ending of its name."""

    file: Union[BinaryFormat, FileInURIFormat, Mapping[str, Any]]
    metadata: Optional[Mapping[str, Any]] = None
    kind: str = "file"

    @classmethod
    def from_path(cls, path: _Path, mime_type: Optional[str] = None) -> "FilePart":
        """Attach a file that is read now. OSError if it cannot be read."""
        with open(path, "rb") as stream:
            content = stream.read()
        return cls.from_bytes(content, os.path.basename(os.fspath(path)), mime_type)

    @classmethod
    def from_bytes(
        cls, content: bytes, name: str, mime_type: Optional[str] = None
    ) -> "FilePart":
        """Attach bytes as a file of this name."""
        if not isinstance(content, (bytes, bytearray, memoryview)) or not content:
            raise ValidationError([(f"content ({name!r})", "must be bytes, not empty")])
        text = base64.b64encode(content).decode("ascii")
        return cls(BinaryFormat(text, mime_type or _mime_type(name), name))

    @classmethod
    def from_uri(cls, uri: str, mime_type: Optional[str] = None) -> "FilePart":
        """Attach a file that the service fetches."""
        path = re.sub(r"^[^/]*//[^/?#]*|[?#].*", "", str(uri))
        return cls(FileInURIFormat(uri, mime_type or _mime_type(path)))


@dataclass
class ToolResultPart(_Checked, _Readable):
    """The result of a pending tool call: any JSON value, or None to leave it out."""

    tool_call_id: str
    result: Any = None
    metadata: Optional[Mapping[str, Any]] = None
    kind: str = "tool_result"


@dataclass
class A2AMessage(_Checked):
    role: str  # "user", or "tool" for tool results
    parts: Sequence[Union[TextPart, FilePart, ToolResultPart, Mapping[str, Any]]]
    message_id: Optional[str] = None  # a ULID


@dataclass
class Identity(_Checked):
    """On whose behalf the agent runs."""

    id: str
    display_name: Optional[str] = None
    email: Optional[str] = None
    metadata: Optional[Sequence[Mapping[str, Any]]] = None
    logo_url: Optional[str] = None
    tags: Optional[Sequence[str]] = None


@dataclass
class Contact(Identity):
    """The older name of Identity."""


@dataclass
class CreateAgentResponseThread(_Checked):
    id: str  # of all requests that belong together
    tags: Optional[Sequence[str]] = None


@dataclass
class Memory(_Checked):
    entity_id: str  # whose memories the agent uses: a user, a session or the like


_OFFICE = "application/vnd.openxmlformats-officedocument."
_MIME_TYPES = {  # what Python's own table lacks, in some version
    ".docx": f"{_OFFICE}wordprocessingml.document",
    ".xlsx": f"{_OFFICE}spreadsheetml.sheet",
    ".pptx": f"{_OFFICE}presentationml.presentation",
    ".md": "text/markdown",
    ".webp": "image/webp",
}


def _mime_type(name: Any) -> Optional[str]:
    """The MIME type of a name's ending, by Python's table and not the machine's."""
    ending = os.path.splitext(str(name))[1].lower()
    mime_type, encoding = mimetypes.MimeTypes().guess_type(f"x{ending}")
    return _MIME_TYPES.get(ending) or (None if encoding else mime_type)


# --- Answer types -----------------------------------------------------------
# An answer is not checked. A field that does not come is None (`output` and `parts` are
# an empty list). The defaults are for whoever builds an answer by hand.


@dataclass
class DataPart(_Readable):
    data: Dict[str, Any]
    metadata: Optional[Dict[str, Any]] = None
    kind: str = "data"


@dataclass
class ToolCallPart(_Readable):
    tool_name: str
    tool_call_id: str
    arguments: Dict[str, Any]
    metadata: Optional[Dict[str, Any]] = None
    kind: str = "tool_call"


@dataclass
class ErrorPart(_Readable):
    error: str
    code: Optional[float] = None
    kind: str = "error"


@dataclass(repr=False, eq=False)  # SimpleNamespace's show all fields
class UnknownPart(types.SimpleNamespace, _Readable):
    """A part of a kind that is unknown here. Its fields are its attributes."""

    kind: str = ""


if TYPE_CHECKING:
    OutputPart = Any  # so that `res.output[0].parts[0].text` needs no cast
else:
    _SentPart = Union[TextPart, FilePart, ToolResultPart]
    OutputPart = Union[_SentPart, DataPart, ToolCallPart, ErrorPart, UnknownPart]


@dataclass
class Output(_Readable):
    message_id: str = ""
    role: str = "agent"  # or "user", "tool", "system"
    parts: List[OutputPart] = field(default_factory=list)
    metadata: Optional[Dict[str, Any]] = None


@dataclass
class PromptTokensDetails(_Readable):
    cached_tokens: Optional[int] = None
    cache_creation_tokens: Optional[int] = None
    audio_tokens: Optional[int] = None


@dataclass
class CompletionTokensDetails(_Readable):
    reasoning_tokens: Optional[float] = None
    accepted_prediction_tokens: Optional[float] = None
    rejected_prediction_tokens: Optional[float] = None
    audio_tokens: Optional[int] = None


@dataclass
class CreateAgentResponseUsage(_Readable):
    completion_tokens: float = 0
    prompt_tokens: float = 0
    total_tokens: float = 0
    prompt_tokens_details: Optional[PromptTokensDetails] = None
    completion_tokens_details: Optional[CompletionTokensDetails] = None


@dataclass
class Function(_Readable):
    name: str = ""
    arguments: str = "{}"  # JSON text


@dataclass
class PendingToolCalls(_Readable):
    """A tool call that waits for a ToolResultPart with its id."""

    id: str = ""
    function: Function = field(default_factory=Function)
    type: str = "function"


@dataclass
class Telemetry(_Readable):
    trace_id: str = ""
    span_id: str = ""


@dataclass
class CreateAgentResponseResponseBody(_Readable):
    """What the agent did: `text` is what it said, `error` is why it failed."""

    id: str = ""  # of the answer; `_id` in JSON
    task_id: str = ""  # continues the task, and fetches a background run's answer
    output: List[Output] = field(default_factory=list)
    created_at: str = ""  # ISO 8601
    model: str = ""  # provider/model
    usage: Optional[CreateAgentResponseUsage] = None
    finish_reason: Optional[str] = None  # "stop", "length", "tool_calls" or another
    pending_tool_calls: Optional[List[PendingToolCalls]] = None
    telemetry: Optional[Telemetry] = None
    status: Optional[str] = None  # "in_progress", "completed", "failed" or another
    raw: Dict[str, Any] = field(default_factory=dict, repr=False)  # the whole answer

    @property
    def text(self) -> str:
        """The text of the agent's messages, with a newline between messages."""
        return _text_of(self.output)

    @property
    def error(self) -> Optional[str]:
        """Why the run failed, or else its state. None if it did not fail."""
        if self.status == "completed":  # whatever went wrong on the way
            return None
        reasons = [self.raw.get("error")]
        for m in _messages_of_agent(self.output):
            reasons += [p.error or "error" for p in m.parts if isinstance(p, ErrorPart)]
        if self.status in _FAILED_STATES and not any(reasons):
            status = self.raw.get("status")
            why = status.get("message") if isinstance(status, dict) else None
            reason = _text_of(_decode(_allowed_by(List[Output]), [why]))
            reasons = [reason or self.status]
        return "; ".join(_error_text(reason) for reason in reasons if reason) or None


_Result = CreateAgentResponseResponseBody
_FAILED_STATES = ("failed", "canceled", "rejected")


def _messages_of_agent(output: Any) -> List[Output]:
    """The messages whose role is agent. Anything else is skipped."""
    items = output if isinstance(output, list) else []
    messages = [m for m in items if isinstance(m, Output) and isinstance(m.parts, list)]
    return [message for message in messages if message.role in ("agent", None)]


def _text_of(output: Any) -> str:
    texts = []
    for message in _messages_of_agent(output):
        parts = [part for part in message.parts if isinstance(part, TextPart)]
        texts.append("".join(str(part.text or "") for part in parts))
    return "\n".join(text for text in texts if text)


def _error_text(error: Any) -> str:
    """The words of an error: a text, or an object's message; else its JSON."""
    if isinstance(error, dict) and error.get("message"):
        error = error["message"]
    return error if isinstance(error, str) else json.dumps(error, ensure_ascii=False)


# --- Checking and JSON ------------------------------------------------------
# The `_encode` functions return the JSON form of a value, and add to `problems`.

_PYTHON_NAMES = {"messageId": "message_id", "mimeType": "mime_type", "bytes": "bytes_"}
_JSON_NAMES = {python: name for name, python in _PYTHON_NAMES.items()}
_CHOICES = {"role": ("user", "tool"), "strategy": ("backoff", "none")}
_CLASS_WORDS: Dict[Any, str] = {str: "text", bool: "true or false"}
_CLASS_WORDS.update({float: "a number, 0 or more", abc.Sequence: "a list"})


class _Allowed(NamedTuple):
    """What an annotation allows a value to be."""

    classes: Tuple[Any, ...]
    models: Tuple[Any, ...]  # those of the classes that are dataclasses
    items: "Optional[_Allowed]"  # what the items of a list may be


@functools.lru_cache(maxsize=None)
def _allowed_by(annotation: Any) -> _Allowed:
    is_union = getattr(annotation, "__origin__", None) is Union
    members = annotation.__args__ if is_union else (annotation,)
    classes = tuple(getattr(member, "__origin__", None) or member for member in members)
    lists = [m for m, cls in zip(members, classes) if cls in (list, abc.Sequence)]
    items = _allowed_by(lists[0].__args__[0]) if lists else None
    return _Allowed(classes, tuple(filter(is_dataclass, classes)), items)


@functools.lru_cache(maxsize=None)
def _fields_of(model: Any) -> Dict[str, Tuple[str, _Allowed]]:
    """(name in JSON, what is allowed) for each field, by its name in Python."""
    hints = typing.get_type_hints(model, globals())  # also if they are text (PEP 563)
    return {n: (_JSON_NAMES.get(n, n), _allowed_by(hint)) for n, hint in hints.items()}


def _choose(models: Sequence[Any], values: Mapping[Any, Any]) -> Any:
    """The dataclass of an object: by its `kind`, or by where a file's content is."""
    if len(models) == 1:
        return models[0]
    if BinaryFormat in models:
        return BinaryFormat if {"bytes", "bytes_"} & {*values} else FileInURIFormat
    unknown = UnknownPart if UnknownPart in models else None
    return next((m for m in models if m.kind == values.get("kind")), unknown)


def _encode(allowed: _Allowed, value: Any, path: str, problems: Problems) -> Any:
    """The JSON form of what a field holds."""
    classes, models, items = allowed
    if _is_plain(value, classes):
        return value
    is_mapping = isinstance(value, abc.Mapping)
    if models and (is_mapping or isinstance(value, models)):
        return _encode_object(models, value, path, problems)
    if Any in classes or (is_mapping and abc.Mapping in classes):
        return _encode_free(value, path, problems)
    if items and _is_list(value):
        located = [(f"{path}[{n}]", item) for n, item in enumerate(value)]
        return [_encode(items, item, at, problems) for at, item in located]
    problems.append((path, f"must be {_CLASS_WORDS.get(classes[0], 'an object')}"))


def _is_plain(value: Any, classes: Sequence[Any]) -> bool:
    """Whether it is a text, a boolean or a number from 0 up, and that is allowed."""
    if isinstance(value, bool):
        return bool in classes
    if isinstance(value, str):
        return str in classes
    return float in classes and _is_number(value) and value >= 0


def _encode_object(models: Any, value: Any, path: str, problems: Problems) -> Any:
    """The JSON form of one of the dataclasses, or of a mapping that stands for it."""
    is_built = isinstance(value, models)
    if is_built:
        values, model = dict(vars(value)), cast(Any, type(value))
    else:
        values = {_PYTHON_NAMES.get(name, name): value[name] for name in value}
        model = _choose(models, values)
    if model is None:
        kinds = " or ".join(repr(each.kind) for each in models)
        problems.append((_join(path, "kind"), f"must be {kinds}"))
        return {}
    encoded = {}
    for python_name, (name, allowed) in _fields_of(model).items():
        content, at = values.pop(python_name, None), _join(path, name)
        if content is not None:
            encoded[name] = _encode(allowed, content, at, problems)
        elif type(None) not in allowed.classes and Any not in allowed.classes:
            problems.append((at, "required"))
        choices = (model.kind,) if name == "kind" else _CHOICES.get(name, ())
        if choices and isinstance(content, str) and content not in choices:
            problems.append((at, "must be " + " or ".join(map(repr, choices))))
    if not is_built:
        for name in values:
            problems.append((_join(path, _JSON_NAMES.get(name, name)), "unknown field"))
    return encoded


def _encode_free(value: Any, path: str, problems: Problems, parents: Any = ()) -> Any:
    """The JSON form of a free-form value. `parents` are the ids of its containers."""
    if value is None or isinstance(value, str) or _is_number(value):
        return value
    if id(value) in parents or len(parents) == 100:  # levels
        problems.append((path, "contains itself, or is nested too deeply"))
        return None
    parents, simpler = (*parents, id(value)), _simplify(value)
    if isinstance(simpler, abc.Mapping):
        encoded = {}
        for key, item in simpler.items():
            name = _simplify(key)
            at = _join(path, name)
            if not isinstance(name, str) and type(name) is not int:
                problems.append((at, f"{_describe(name)} cannot be a name in JSON"))
            encoded[str(name)] = _encode_free(item, at, problems, parents)
        return encoded
    if _is_list(simpler):
        located = [(f"{path}[{n}]", item) for n, item in enumerate(simpler)]
        return [_encode_free(item, at, problems, parents) for at, item in located]
    if simpler is not value:
        return _encode_free(simpler, path, problems, parents)
    problems.append((path, f"{_describe(value)} has no JSON form"))


def _simplify(value: Any) -> Any:
    """A simpler value, for one of a class that JSON does not know; else the value."""
    import decimal
    import uuid

    if isinstance(value, (type, enum.Enum)):
        return value.value if isinstance(value, enum.Enum) else value
    if isinstance(value, (datetime.date, datetime.time)):
        is_real = value == value  # noqa: PLR0124 (pandas.NaT differs from itself)
        return re.sub(r"\+00:00$", "Z", value.isoformat()) if is_real else value
    is_finite = isinstance(value, decimal.Decimal) and value.is_finite()
    if is_finite or isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, abc.Set):
        return list(value)
    if is_dataclass(value):
        return {each.name: getattr(value, each.name) for each in fields(value)}
    return value.model_dump() if hasattr(value, "model_dump") else value  # pydantic's


def _is_number(value: Any) -> bool:
    """Whether JSON can hold it: not NaN, nor an infinity, nor a huge integer."""
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


def _is_list(value: Any) -> bool:
    text_like = (str, bytes, bytearray, memoryview)  # sequences, but no lists
    return isinstance(value, abc.Sequence) and not isinstance(value, text_like)


def _join(path: str, name: Any) -> str:
    if isinstance(name, str) and name.isidentifier():
        return f"{path}.{name}" if path else name
    return f"{path}[{name!r}]"


def _describe(value: Any) -> str:
    """The class of a value, but a float as it is, such as NaN."""
    cls = type(value)
    name = f"{cls.__module__}.{cls.__qualname__}".replace("builtins.", "")
    return str(value) if isinstance(value, float) else name


def _decode(allowed: _Allowed, value: Any) -> Any:
    """What a JSON value becomes in a field. One that does not fit stays as it is."""
    if allowed.items and isinstance(value, list):
        return [_decode(allowed.items, item) for item in value]
    if not allowed.models or not isinstance(value, dict):
        return value
    model = _choose(allowed.models, value)
    decoded = model.__new__(model)  # without __init__, which would check a request part
    attributes = vars(decoded)
    for python_name, (name, inner) in _fields_of(model).items():
        content = value.get(name)
        if content is None and name in ("output", "parts"):
            content = []  # programs loop over them
        attributes[python_name] = _decode(inner, content)
    for name in value:
        is_known = name in attributes or _PYTHON_NAMES.get(name) in attributes
        # what is unknown must not hide a method or a property
        if not is_known and not name.startswith("_") and not hasattr(model, name):
            attributes[name] = value[name]
    return decoded


def _decode_answer(data: Dict[str, Any]) -> _Result:
    """An answer of the published shape, or a task of A2A."""
    values = {**data, "id": data.get("_id", data.get("id"))}
    if "_id" not in data and "id" in data:
        values.setdefault("task_id", data["id"])
    res: _Result = _decode(_allowed_by(_Result), values)
    status = data.get("status")
    state = status.get("state") if isinstance(status, dict) else status
    res.status = state if isinstance(state, str) else None
    res.raw = data
    return res


# --- Retry policy -----------------------------------------------------------


@dataclass(frozen=True)
class BackoffStrategy(_Checked):
    """The waits between attempts, in milliseconds. ValidationError if negative."""

    initial_interval: float = 500  # the first wait
    max_interval: float = 60_000  # the longest wait, unless the server asks for more
    exponent: float = 1.5  # the growth from one wait to the next
    max_elapsed_time: float = 3_600_000  # no attempt begins after this time
    jitter_ms: Optional[float] = None  # added at random (None: up to 25% less)


@dataclass(frozen=True)
class RetryConfig(_Checked):
    """What to try again, and when. Passing None instead means one attempt.

    `retry_connection_errors` chooses what is retried (AGAIN: the agent may run again):
        what came of an attempt         None      False     True
        it was not sent completely      retried   -         retried
        429 (RFC 6585)                  retried   retried   retried
        500, 502, 503 or 504            -         AGAIN     AGAIN
        sent, but no complete answer    -         -         AGAIN
    For `get`, which runs no agent, None means True. `status_codes_override`, such as
    ["429", "5XX"], takes the place of the statuses. A complete 2XX is never retried,
    nor is what a retry cannot help, such as a certificate that is not accepted.
    """

    strategy: str = "backoff"  # "none" tries once
    backoff: BackoffStrategy = BackoffStrategy()
    retry_connection_errors: Optional[bool] = None
    status_codes_override: Optional[Sequence[str]] = None

    def __post_init__(self) -> None:
        if not isinstance(self.backoff, BackoffStrategy):  # no mapping stands for it
            raise ValidationError([("backoff", "must be a BackoffStrategy")])
        super().__post_init__()


_WITHIN_30_S = BackoffStrategy(500, 8_000, exponent=2, max_elapsed_time=30_000)
DEFAULT_RETRY = RetryConfig(backoff=_WITHIN_30_S)


def _should_retry(error: OrqError, config: RetryConfig, runs_agent: bool) -> bool:
    policy = config.retry_connection_errors
    if policy is None and not runs_agent:
        policy = True
    if config.strategy == "none":
        return False
    if isinstance(error, APIConnectionError):
        return error.temporary and (policy or (policy is None and not error.sent))
    status = str(error.status_code)
    statuses = ["429"] if policy is None else ["429", "500", "502", "503", "504"]
    if config.status_codes_override is not None:
        statuses = [each.upper() for each in config.status_codes_override]
    is_listed = status in statuses or f"{status[0]}XX" in statuses
    return is_listed and status[0] != "2"  # a 2XX has run the agent


def _retry_wait(error: OrqError, backoff: BackoffStrategy, number: int) -> float:
    """Seconds to wait after the failed attempt of this number, the first being 1."""
    wait_ms = float(backoff.initial_interval)
    for _ in range(number - 1):
        wait_ms *= backoff.exponent  # a float grows to infinity, and never raises
    wait_ms += random.uniform(0, backoff.jitter_ms or 0)
    wait_ms = min(wait_ms, backoff.max_interval, MAX_WAIT_MS)
    if backoff.jitter_ms is None:
        wait_ms *= random.uniform(0.75, 1)
    return _asked_wait(error) or wait_ms / 1000


def _asked_wait(error: OrqError) -> float:
    """The seconds that the server asks for; 0 if it names no sensible number."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        text = (error.headers or {}).get(name, "").strip()
        is_number = re.fullmatch(r"[0-9]{1,9}(\.[0-9]+)?", text)
        if is_number and float(text) / unit >= 0.01:  # less would be a storm
            return min(float(text) / unit, MAX_WAIT_MS / 1000)
    return 0


# --- Transport --------------------------------------------------------------
# urllib's opener hands each attempt to `_Handler`, so that tracing tools see it. The
# opener has no other handler: no redirect is followed, and no other scheme exists.
# http.client writes the request and reads the answer, on a connection of ours.

# TCP's keep-alive, in seconds: it finds a dead peer, and keeps a NAT's entry alive.
_TCP = {"TCP_KEEPIDLE": 60, "TCP_KEEPALIVE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}

_LABEL = "[a-z0-9_-]{1,63}"
_HOST = rf"(({_LABEL}\.)*{_LABEL}\.?|\[[0-9a-f.]*:[0-9a-f:.]*\])(:[0-9]{{1,5}})?"
_BLOCKED = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

_cancel_event: Any = contextvars.ContextVar("_cancel_event", default=None)


class _GivenUp(Exception):
    """We ended the attempt ourselves; the system reported no error."""


class _TimeUp(_GivenUp):
    """... as it took too long: another attempt may do better."""


_FAILURES = (_GivenUp, OSError, http.client.HTTPException, zlib.error)
_BROKE_OFF = (http.client.IncompleteRead, http.client.BadStatusLine)


def _now(clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds, from a clock that libraries which freeze time do not replace."""
    return clock()


def _wait(sock: Any, for_writing: bool, seconds: float) -> bool:
    """Wait until a socket is ready. False if it takes longer."""
    if hasattr(select, "poll"):  # select.select fails if 1024 files are open
        poll = select.poll()
        poll.register(sock, select.POLLOUT if for_writing else select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    readers, writers = ([], [sock]) if for_writing else ([sock], [])
    return any(select.select(readers, writers, writers, seconds))


class _Attempt(urllib.request.Request):
    """One try of a call. Wrappers of urllib's opener may see and add `headers`.

    How far it came decides what its failure means:

        is_connected   was_sent   the error says             by default, if it may help
        False          False      not sent                   is tried again
        True           False      not sent completely        is tried again
        True           True       the agent may have run     is not tried again
    """

    def __init__(
        self, url: str, headers: Any, authorization: str, body: Any, seconds: float
    ) -> None:
        super().__init__(url, headers=headers, method="GET" if body is None else "POST")
        self.authorization = authorization  # not among `headers`
        self.body = body  # not urllib's `data`, which wrappers may record
        self.runs_agent = body is not None
        self.seconds = seconds
        self.deadline = self.step_deadline = _now() + seconds
        self.cancelled = _cancel_event.get()
        self.proxy: Any = None  # a parsed URL
        self.is_connected = False
        self.was_sent = False  # the system took all of the request, or a 2XX came
        self.answer: Optional[_Answer] = None

    def begin_step(self, seconds: float) -> None:
        """Set `step_deadline`, never later than `deadline`."""
        self.step_deadline = min(_now() + seconds, self.deadline)

    def turn(self) -> float:
        """Seconds until the next check. Raises if late or cancelled."""
        if self.cancelled is not None and self.cancelled.is_set():
            raise _GivenUp("the task was cancelled")
        left = self.step_deadline - _now()
        if left <= 0:
            what = "complete answer" if self.is_connected else "connection"
            most = self.seconds if self.is_connected else CONNECT_SECONDS
            raise _TimeUp(f"no {what} within {min(most, self.seconds):g} s")
        return min(TURN_SECONDS, left)

    def sent_headers(self) -> Dict[str, str]:
        """All but Authorization. A wrapper's `traceparent` replaces the caller's."""
        headers = {name.title(): value for name, value in self.header_items()}
        return {**headers, "Host": self.host}

    def mask(self, text: str) -> str:
        """The text without the key. A key below 8 characters is not masked."""
        key = self.authorization.split(None, 1)[-1]
        return text.replace(key, "***") if len(key) >= 8 else text


class _Answer(http.client.HTTPResponse):
    """An answer. `content` is what has come of its body."""

    content: Union[bytes, bytearray] = b""

    def read_content(self) -> None:
        """Read the body. Raises if it breaks off; stops at the size limit."""
        self.content = content = bytearray()
        block = self.read1(BLOCK_BYTES)
        while block and len(content) < MAX_ANSWER_BYTES:
            content += block
            block = self.read1(BLOCK_BYTES)
        if block:
            self.will_close = True
        elif self.length:  # at an early end, read1 just returns b""
            raise http.client.IncompleteRead(b"", self.length)
        if content[:2] == b"\x1f\x8b":  # gzip, which was not asked for; 31: its header
            self.content = zlib.decompressobj(31).decompress(content, MAX_ANSWER_BYTES)

    def idle_seconds(self) -> float:
        """How long its connection may be kept (RFC 9112, sections 6.3 and 9.3)."""
        lengths = self.headers.get_all("content-length", [])
        is_coded = "transfer-encoding" in self.headers
        is_framed = len(lengths) + is_coded == 1 and not self.headers.defects
        if not is_framed or self.will_close or self.status < 200:
            return 0  # its end was in doubt
        # the server may hang up sooner, and its closing takes a moment to arrive
        asked = re.search(r"(?i)timeout\W*(\d+)", self.headers.get("keep-alive", ""))
        return min(IDLE_SECONDS, float(asked[1]) - 0.5) if asked else IDLE_SECONDS


class _Client(http.client.HTTPConnection):
    response_class = _Answer
    debuglevel = 0  # if a program sets http.client's own, that prints the key


class _Reader(io.BufferedReader):
    def close(self) -> None:
        """Do nothing: `end_exchange` looks for bytes after the answer."""


class _Connection(io.RawIOBase):
    """A connection to a server, perhaps through a proxy. It serves many attempts.

    http.client uses it as its socket. The real socket never blocks. We wait for it in
    turns, between which the deadline, a cancelled task and Ctrl-C are noticed.
    """

    attempt: Any = None  # the one in progress; without one, reads do not wait

    def __init__(self, route: Tuple[Any, ...], attempt: _Attempt) -> None:
        self.route = route  # only attempts with an equal one may use it
        place = attempt.proxy or urllib.parse.urlsplit(attempt.full_url)
        default_port = 80 if attempt.proxy or attempt.type == "http" else 443
        self.sock: Any = _dial(place.hostname, place.port or default_port, attempt)

    def start_tls(self, attempt: _Attempt, context: ssl.SSLContext) -> None:
        """Start TLS with the server, in a tunnel (RFC 9110, 9.3.6) behind a proxy."""
        self.attempt, server = attempt, urllib.parse.urlsplit(attempt.full_url)
        if attempt.proxy:
            name = server.netloc if server.port else f"{server.netloc}:443"
            headers = {"Host": name, **_proxy_authorization(attempt.proxy)}
            lines = "".join(f"{key}: {value}\r\n" for key, value in headers.items())
            self.sendall(f"CONNECT {name} HTTP/1.1\r\n{lines}\r\n".encode("latin-1"))
            answer = http.client.HTTPResponse(cast(Any, self), method="CONNECT")
            answer.begin()
            if not 200 <= answer.status < 300:
                raise _GivenUp(f"the proxy refused with {answer.status}")
        self.sock = context.wrap_socket(
            self.sock, server_hostname=server.hostname, do_handshake_on_connect=False
        )
        self._in_turns(False, self.sock.do_handshake)

    def exchange(self, attempt: _Attempt) -> _Answer:
        """Send the request and read the answer."""
        self.attempt, attempt.is_connected = attempt, True
        attempt.begin_step(attempt.seconds)
        client: Any = _Client(attempt.host)
        client.sock = self
        headers = {**attempt.sent_headers(), "Authorization": attempt.authorization}
        target = attempt.selector
        if attempt.proxy and attempt.type == "http":
            target = attempt.full_url
            headers.update(_proxy_authorization(attempt.proxy))
        try:
            client.request(attempt.get_method(), target, attempt.body, headers)
            attempt.was_sent = True
        except (ConnectionError, ssl.SSLError) as error:
            # the server may have answered (401, 413) before reading it all
            if error.errno is None:
                raise  # a signal's handler raised it
        except _TimeUp:  # if it has answered, it may have run the agent
            attempt.was_sent = not self.is_quiet()
            raise
        answer: _Answer = client.getresponse()
        while 101 < answer.status < 200:  # such as 103: the answer comes after it
            answer.headers = cast(Any, None)  # http.client itself skips 100 alone
            answer.begin()
        answer.url = attempt.full_url  # a wrapper of the opener may ask for it
        answer.will_close = answer.will_close or not attempt.was_sent
        is_2xx = 200 <= answer.status < 300  # the agent has run, whatever was sent
        attempt.was_sent = attempt.was_sent or is_2xx
        try:
            answer.read_content()
        except _FAILURES as error:
            # without an errno, a signal's handler raised it
            if is_2xx or getattr(error, "errno", 0) is None:
                raise
            answer.will_close = True  # its status counts, whatever came of its body
        return answer

    def _in_turns(self, for_writing: bool, operation: Any, *arguments: Any) -> Any:
        """Repeat an operation of the socket until it does not block."""
        while True:
            turn = self.attempt.turn()
            try:
                return operation(*arguments)
            except _BLOCKED as error:
                wants_write = isinstance(error, ssl.SSLWantWriteError)
                is_plain_write = for_writing and isinstance(error, BlockingIOError)
            _wait(self.sock, wants_write or is_plain_write, turn)

    def makefile(self, mode: str) -> io.BufferedReader:
        self.reader = _Reader(self)
        return self.reader

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> Any:
        if self.attempt is None:
            return None  # `end_exchange` asks for no more than has come
        return self._in_turns(False, self.sock.recv_into, buffer)

    def sendall(self, content: Any) -> None:
        view = memoryview(content)
        while view:
            view = view[self._in_turns(True, self.sock.send, view[:BLOCK_BYTES]) :]

    def end_exchange(self) -> bool:
        """Let go of the attempt. False if more has come than its answer."""
        self.attempt = None
        return not self.reader.peek(1)

    def is_quiet(self) -> bool:
        """Whether the peer has neither closed it nor sent anything."""
        try:
            self.sock.recv(1)
        except OSError as error:
            return isinstance(error, _BLOCKED)
        return False

    def close(self) -> None:
        """Do nothing: http.client closes after an answer; `_Handler` closes `sock`."""


def _proxy_authorization(proxy: Any) -> Dict[str, str]:
    if proxy.username is None:
        return {}
    pair = urllib.parse.unquote(f"{proxy.username}:{proxy.password or ''}")
    return {"Proxy-Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}


def _split_url(url: str, pattern: str) -> Any:
    """The parts of a URL; None if it is wrong, such as its port."""
    try:
        parts = urllib.parse.urlsplit(url)
        return parts if re.fullmatch(pattern, url) and parts.port != 0 else None
    except ValueError:
        return None


def _dial(host: Any, port: int, attempt: _Attempt) -> socket.socket:
    """A connected socket.

    Each address has half a second in a first round. Those that did not answer share
    the rest in a second one. A dead address delays the next one by half a second.
    """
    addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    attempt.begin_step(CONNECT_SECONDS)
    failure: Exception = OSError(errno.EHOSTUNREACH, "no address found")
    for most in (ADDRESS_SECONDS, CONNECT_SECONDS):
        silent = []
        for n, address in enumerate(addresses):
            share = (attempt.step_deadline - _now()) / (len(addresses) - n)
            try:
                return _connect(address, min(most, share), attempt)
            except _TimeUp as error:
                silent.append(address)
                failure = error
            except OSError as error:  # such as of a family that the machine lacks
                if error.errno is None:
                    raise  # a signal's handler raised it
                failure = error
        addresses = silent
    raise failure


def _connect(address: Any, seconds: float, attempt: _Attempt) -> socket.socket:
    end = _now() + seconds
    sock = socket.socket(*address[:3])
    try:
        sock.setblocking(False)
        code = sock.connect_ex(address[4])
        while code in (errno.EINPROGRESS, errno.EWOULDBLOCK):
            if _wait(sock, True, max(0, min(attempt.turn(), seconds))):
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            elif _now() >= end:
                raise _TimeUp("no connection in time")
        if code:
            raise OSError(code, os.strerror(code))
        with contextlib.suppress(OSError):  # a sandbox may refuse what is not essential
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name in _TCP.keys() & vars(socket).keys():
                option = getattr(socket, name)
                sock.setsockopt(socket.IPPROTO_TCP, option, _TCP[name])
        return sock
    except BaseException:
        sock.close()
        raise


def _make_tls_context() -> ssl.SSLContext:
    """A context with the authorities of the platform or of the environment."""
    context = ssl.create_default_context()
    # up to Python 3.9, the default is what the system allows
    context.minimum_version = max(context.minimum_version, ssl.TLSVersion.TLSv1_2)
    if os.environ.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_DIR"):
        # Python 3.13 asks for what the authorities of many companies lack
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def _cause(error: Exception, is_connected: bool) -> Tuple[str, bool]:
    """(what went wrong, without the server's words; whether a retry may help)"""
    what = getattr(error, "strerror", None) or str(error)
    if isinstance(error, _GivenUp):
        return what, isinstance(error, _TimeUp)
    if isinstance(error, ssl.SSLCertVerificationError):
        what = f"the server's certificate was not accepted: {error.verify_message}"
        # OpenSSL's X509_V_ERR_...: the issuer is unknown, or it is the server itself
        if error.verify_code in (2, 18, 19, 20, 21):
            what += "; SSL_CERT_FILE or an ssl_context can name its authority"
            paths = ssl.get_default_verify_paths()  # Windows has another store
            if os.name == "posix" and not (paths.cafile or paths.capath):
                what += " (this machine has no authorities at all)"
        return what, False
    if isinstance(error, ssl.SSLError):
        # before TLS is up, a retry may help only if the peer hung up
        words = re.sub(r"\[.*?\] |\(_ssl.*", "", what).strip().lower()
        return f"TLS: {words}", is_connected or "eof" in words
    if isinstance(error, socket.gaierror):
        return f"no address found: {what}", error.errno == socket.EAI_AGAIN
    if not isinstance(error, OSError):
        what = f"the answer broke off, or is damaged ({type(error).__name__})"
    # zlib's and http.client's other errors would recur; no errno: a handler raised it
    is_numbered = getattr(error, "errno", None) is not None
    return what, is_numbered or isinstance(error, _BROKE_OFF)


def _explain(error: Exception, attempt: _Attempt) -> APIConnectionError:
    """The error for the caller."""
    what, temporary = _cause(error, attempt.is_connected)
    if attempt.proxy:
        what += f" (proxy {attempt.proxy.hostname}:{attempt.proxy.port or 80})"
    outcome = "not sent completely:" if attempt.is_connected else "not sent:"
    if attempt.was_sent:
        outcome = "the agent may have run, but" if attempt.runs_agent else "no answer:"
    is_late = isinstance(error, (_TimeUp, TimeoutError))
    error_class = APITimeoutError if is_late else APIConnectionError
    text = f"{attempt.get_method()} {attempt.full_url}: {outcome} {what}"
    failure = error_class(attempt.mask(text))
    failure.sent, failure.temporary = attempt.was_sent and attempt.runs_agent, temporary
    return failure


class _Handler(urllib.request.BaseHandler):
    """Performs attempts for urllib's opener, and keeps connections."""

    def __init__(self, context: Optional[ssl.SSLContext]) -> None:
        # in order of use, with the time until which each is fresh; popping one
        # claims it, so that neither threads nor a signal's handler need a lock
        self._idle: Dict[_Connection, float] = {}
        self._is_closed = self._has_warned = False
        self._proxies = urllib.request.getproxies()
        self._context = context

    def __reduce__(self) -> NoReturn:
        raise TypeError("a client cannot be copied or pickled: make another Orq")

    def add_parent(self, parent: Any) -> None:
        """Do not keep the opener, as the base does: clients are freed at once."""

    def http_open(self, attempt: _Attempt) -> _Answer:
        """The answer to an attempt. APIConnectionError if no complete one comes."""
        try:
            answer = attempt.answer = self._perform(attempt)
        except _FAILURES as error:
            failure = _explain(error, attempt)
        else:
            _log.debug("%s: %d", attempt.mask(attempt.full_url), answer.status)
            return answer
        _log.debug("%s", failure)
        raise failure  # here, without the frames of http.client, which hold the key

    https_open = http_open

    def _perform(self, attempt: _Attempt) -> _Answer:
        attempt.turn()  # the task may have been cancelled during a wait
        attempt.proxy = self._find_proxy(attempt)
        context = self._find_context(attempt)
        # the process too, as the two sides of a fork may not share a connection
        route = (os.getpid(), attempt.type, attempt.host, attempt.proxy)
        idle, idle_seconds = self._take(route), 0.0
        connection = idle or _Connection(route, attempt)
        try:
            if context and not idle:
                connection.start_tls(attempt, context)
            answer = connection.exchange(attempt)
            if connection.end_exchange():
                idle_seconds = answer.idle_seconds()
            return answer
        finally:
            if idle_seconds > 0 and not self._is_closed and len(self._idle) < MAX_IDLE:
                self._idle[connection] = _now() + idle_seconds
            else:
                connection.sock.close()

    def _find_proxy(self, attempt: _Attempt) -> Any:
        url = self._proxies.get(attempt.type or "")
        if not url or urllib.request.proxy_bypass(attempt.host):
            return None
        # as urllib does, we speak plain HTTP to an https:// proxy too
        url = url if "://" in url else f"http://{url}"
        proxy = _split_url(url, rf"(?ai)https?://([^/?#\ud800-\udfff]*@)?{_HOST}/*")
        if proxy is None:
            raise _GivenUp(f"{attempt.type}_proxy is not the URL of an HTTP proxy")
        return proxy

    def _find_context(self, attempt: _Attempt) -> Optional[ssl.SSLContext]:
        """The TLS context; for http://, None and a warning: the key goes in clear."""
        if attempt.type == "https":
            self._context = self._context or _make_tls_context()
            return self._context
        near = r"(?i)(localhost|127(\.[0-9]+){3}|\[::1\])(:[0-9]+)?"
        if not self._has_warned and not re.fullmatch(near, attempt.host):
            self._has_warned = True
            _log.warning("the key goes in clear to http://%s", attempt.host)
        return None

    def _take(self, route: Tuple[Any, ...]) -> Optional[_Connection]:
        """The newest idle connection of this route. Closes old ones that it meets."""
        for connection, fresh_until in reversed([*self._idle.copy().items()]):
            is_fresh = _now() < fresh_until and not self._is_closed
            if is_fresh and connection.route != route:
                continue
            if self._idle.pop(connection, None) is None:
                continue  # another thread has it
            if is_fresh and connection.is_quiet():
                return connection
            connection.sock.close()
        return None

    def close(self) -> None:
        """Close what is idle. What is in use is closed when its answer has come."""
        self._is_closed = True
        self._take(())  # no connection has this route: all are closed

    __del__ = close


# --- Client -----------------------------------------------------------------

_HEADER_NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110, section 5.6.2
_FIXED_HEADERS = ("Host", "Content-Length", "Transfer-Encoding", "Connection")
_SENDABLE = r"[\x20-\x7e\xa0-\xff]+"  # as a header's value: latin-1 without controls
_OBJECT = Mapping[str, Any]


def _find_server(url: Any, problems: Problems) -> str:
    """The server's URL, or that of the environment, without a slash at its end."""
    path = "server_url"
    if url is None and os.environ.get("ORQ_BASE_URL", "").strip():
        url, path = os.environ["ORQ_BASE_URL"], "ORQ_BASE_URL"
    text = str("https://my.orq.ai" if url is None else url).strip().rstrip("/")
    if _split_url(text, rf"(?ai)https?://{_HOST}(/[!$-;=@-\[\]-~]*)?") is None:
        problems.append((path, "must be http(s)://HOST[:PORT][/PATH], ASCII, no query"))
    return text


def _segment(name: str, value: Any, problems: Problems) -> str:
    """A parameter as one segment of a URL's path."""
    text = value if isinstance(value, str) else ""
    # the dots would leave the path; half of a surrogate pair has no UTF-8 form
    if text.strip() in ("", ".", "..") or re.search("[\ud800-\udfff]", text):
        problems.append((name, "must be a text, not empty, and not '.' or '..'"))
    return urllib.parse.quote(text, safe="", errors="replace")


def _check_headers(http_headers: Any, problems: Problems) -> Tuple[Dict[str, str], str]:
    """(the caller's headers, by names in the usual spelling; their Authorization)"""
    headers: Dict[str, str] = {}
    if not isinstance(http_headers, abc.Mapping):
        problems.append(("http_headers", "must be an object"))
        http_headers = {}
    for name, value in http_headers.items():
        title = name.title() if isinstance(name, str) else ""
        at = _join("http_headers", name)
        is_taken = title in headers or title in _FIXED_HEADERS
        if is_taken or not re.fullmatch(_HEADER_NAME, title):
            problems.append((at, "is an invalid name, a duplicate, or set by us"))
        elif not isinstance(value, str) or not re.fullmatch(_SENDABLE, value.strip()):
            problems.append((at, "must be text in latin-1, on one line, not empty"))
        else:
            headers[title] = value.strip()
    authorization = headers.pop("Authorization", "")
    return headers, authorization


def _authorization(api_key: Any, problems: Problems) -> str:
    """The value of the Authorization header that stands for the key."""
    path = "api_key"
    if api_key is None and os.environ.get("ORQ_API_KEY"):
        api_key, path = os.environ["ORQ_API_KEY"], "ORQ_API_KEY"
    api_key = api_key() if callable(api_key) else api_key
    if not isinstance(api_key or "", str):
        problems.append((path, "must be text, or a function that returns text"))
        return ""
    api_key = (api_key or "").strip(" \t\r\n\ufeff")  # \ufeff: a byte order mark
    if api_key.lower() in ("", "bearer"):
        problems.append(("api_key", "required: set ORQ_API_KEY, or give a text"))
    elif api_key[0] in "\"'" or not re.fullmatch(_SENDABLE, api_key):
        problems.append((path, "starts with a quote, or has an invalid character"))
    return api_key if api_key[:7].lower() == "bearer " else f"Bearer {api_key}"


def _one_line(text: str) -> str:
    """A server's words, made safe for a terminal and a log."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _read_answer(attempt: _Attempt) -> Any:
    """What the agent did, or an APIError: returned, as this frame may hold the key."""
    answer = cast(_Answer, attempt.answer)
    body = answer.content.decode(json.detect_encoding(answer.content), "replace")
    is_2xx = 200 <= answer.status < 300
    try:
        data: Any = json.loads(body, strict=False)
        if is_2xx and isinstance(data, dict):
            return _decode_answer(data)
        shown = json.dumps(data, ensure_ascii=False)
    except (ValueError, RecursionError):
        data, shown = None, body  # no JSON, or none that Python reads
    phrase = http.client.responses.get(answer.status, "")
    text = f"{attempt.get_method()} {attempt.full_url}: {answer.status} {phrase}"
    if is_2xx:
        text += f": no readable JSON object of at most {MAX_ANSWER_BYTES} bytes"
    if "location" in answer.headers:
        target = re.sub("//[^/]*@", "//", answer.headers["location"])
        text += f": redirect to {target} not followed; set server_url if it is right"
    text += f": {attempt.mask(shown)[:500]}"  # masked before a cut leaves half a key
    if "x-request-id" in answer.headers:
        text += f" (x-request-id: {attempt.mask(answer.headers['x-request-id'])[:100]})"
    error = APIError(_one_line(attempt.mask(text)))
    error.status_code, error.headers = answer.status, answer.headers
    error.body, error.data = body, data
    message = isinstance(data, dict) and (data.get("message") or data.get("error"))
    error.message = attempt.mask(_error_text(message)) if message else phrase
    return error


def _in_thread(
    method: "Callable[Concatenate[Any, P], T]",
) -> "Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]":
    """A method as a coroutine function. Each call runs in a daemon thread.

    An event loop's executor has few threads, and a program that ends waits for them.
    """

    @functools.wraps(method)
    async def call(self: Any, *args: Any, **parameters: Any) -> T:
        import asyncio
        import concurrent.futures

        cancelled = threading.Event()
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        future.set_running_or_notify_cancel()  # only `cancelled` can end it

        def work() -> None:
            _cancel_event.set(cancelled)
            try:
                future.set_result(method(self, *args, **parameters))
            except StopIteration as error:  # before Python 3.12, a task would hang
                future.set_exception(RuntimeError(repr(error)))
            except BaseException as error:  # noqa: BLE001 (the task raises it)
                future.set_exception(error)

        run = contextvars.copy_context().run
        threading.Thread(target=run, args=(work,), daemon=True).start()
        try:
            return await asyncio.wrap_future(future)
        finally:
            cancelled.set()
            parameters.clear()  # `http_headers` may hold a key

    return call  # type: ignore[return-value]


class Responses:
    """The operation, as `orq.agents.responses`."""

    def __init__(self, handler: _Handler, *settings: Any) -> None:
        self._api_key, self._server_url, self._timeout_ms, self._retry_config = settings
        self._opener = urllib.request.OpenerDirector()
        self._opener.add_handler(handler)

    def create(
        self,
        *,
        agent_key: str,
        message: Union[str, A2AMessage, Mapping[str, Any]],
        task_id: Optional[str] = None,
        variables: Optional[Mapping[str, Any]] = None,
        identity: Union[Identity, Mapping[str, Any], None] = None,
        contact: Union[Contact, Mapping[str, Any], None] = None,
        thread: Union[CreateAgentResponseThread, Mapping[str, Any], None] = None,
        memory: Union[Memory, Mapping[str, Any], None] = None,
        metadata: Optional[Mapping[str, Any]] = None,
        background: Optional[bool] = False,
        extra_body: Optional[Mapping[str, Any]] = None,
        retries: Optional[RetryConfig] = UNSET,
        server_url: Optional[str] = None,
        timeout_ms: Optional[float] = None,
        http_headers: Optional[Mapping[str, str]] = None,
    ) -> CreateAgentResponseResponseBody:
        """Send a message to an agent and return what the agent did.

        agent_key: the agent's key or id
        message: a text, an A2AMessage, or a mapping of that shape
        task_id: an inactive task to continue
        variables: any values, for the agent's templates
        identity: on whose behalf the agent runs
        contact: the older name of `identity`
        thread: groups requests
        memory: whose memories the agent uses
        metadata: any values, shown in the traces
        background: answer at once, and let the agent run on; see `get`
        extra_body: fields of the body that this file does not know
        retries: what to try again; None tries once (default: the client's)
        server_url: in place of the client's
        timeout_ms: milliseconds for each attempt, in place of the client's
        http_headers: added to ours, or sent in place of ours (Authorization too)

        Raises ValidationError before anything is sent, APIError for any answer but a
        usable 2XX, and APIConnectionError or APITimeoutError if no complete answer
        comes. A run that failed raises nothing: see `error` of what is returned.
        """
        problems: Problems = []
        http_headers, authorization = _check_headers(http_headers or {}, problems)

        def encode(annotation: Any, value: Any, name: str) -> Any:
            if value is None and name != "message":
                return None
            return _encode(_allowed_by(annotation), value, name, problems)

        if isinstance(message, str):
            message = {"role": "user", "parts": [{"kind": "text", "text": message}]}
        body = {
            "message": encode(Union[str, A2AMessage], message, "message"),
            "task_id": encode(str, task_id, "task_id"),
            "variables": encode(_OBJECT, variables, "variables"),
            "identity": encode(Identity, identity, "identity"),
            "contact": encode(Contact, contact, "contact"),
            "thread": encode(CreateAgentResponseThread, thread, "thread"),
            "memory": encode(Memory, memory, "memory"),
            "metadata": encode(_OBJECT, metadata, "metadata"),
            "background": encode(bool, background, "background"),
        }
        extra = encode(_OBJECT, extra_body, "extra_body") or {}
        for name in body.keys() & extra.keys():
            problems.append((f"extra_body.{name}", "is a parameter of its own"))
        if extra.get("stream"):
            problems.append(("extra_body.stream", "streaming is not supported"))
        body = {n: value for n, value in {**body, **extra}.items() if value is not None}
        path = f"/{_segment('agent_key', agent_key, problems)}/responses"
        content = b"" if problems else json.dumps(body).encode("ascii")
        settings = (retries, server_url, timeout_ms, http_headers)
        return self._run(path, content, problems, authorization, *settings)

    create_async = _in_thread(create)

    def get(
        self,
        *,
        agent_key: str,
        task_id: str,
        retries: Optional[RetryConfig] = UNSET,
        server_url: Optional[str] = None,
        timeout_ms: Optional[float] = None,
        http_headers: Optional[Mapping[str, str]] = None,
    ) -> CreateAgentResponseResponseBody:
        """Fetch what has come of a task, which is "in_progress" until it has ended.

        Like `create`, but it runs no agent: by default, it retries whatever may help.
        """
        problems: Problems = []
        http_headers, authorization = _check_headers(http_headers or {}, problems)
        path = f"/{_segment('agent_key', agent_key, problems)}/responses"
        path += f"/{_segment('task_id', task_id, problems)}"
        settings = (retries, server_url, timeout_ms, http_headers)
        return self._run(path, None, problems, authorization, *settings)

    get_async = _in_thread(get)

    def _run(
        self, path: str, body: Any, problems: Any, authorization: str, *settings: Any
    ) -> _Result:
        """Check the settings, and perform the call. Raises ValidationError first."""
        retries, server_url, timeout_ms, http_headers = settings
        server = self._server_url if server_url is None else server_url
        url = f"{_find_server(server, problems)}/v2/agents{path}"
        config = self._retry_config if retries is UNSET else retries
        if config is not None and not isinstance(config, RetryConfig):
            problems.append(("retries", "must be a RetryConfig or None"))
        limits = (timeout_ms, self._timeout_ms, 600_000)
        limit = next(ms for ms in limits if ms is not None)
        if type(limit) not in (int, float) or not 0 < limit <= MAX_WAIT_MS:
            problems.append(("timeout_ms", f"must be above 0, up to {MAX_WAIT_MS}"))
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        headers["User-Agent"] = f"orq_min/{__version__}"
        if body is not None:
            headers["Content-Type"] = "application/json"
        headers.update(http_headers)
        authorization = authorization or _authorization(self._api_key, problems)
        if problems:
            raise ValidationError(problems)
        return self._try(
            lambda: _Attempt(url, headers, authorization, body, limit / 1000), config
        )

    def _try(self, new_attempt: Callable[[], _Attempt], config: Any) -> _Result:
        """The first answer that is usable, or the error of the last attempt."""
        number, elapsed, cancelled = 0, 0.0, _cancel_event.get()
        while True:
            number, started, attempt = number + 1, _now(), new_attempt()
            try:
                self._opener.open(attempt)  # what a wrapper returns is not looked at
                result = _read_answer(attempt)
            except APIConnectionError as error:
                result = error
            if isinstance(result, _Result):
                return result
            elapsed += _now() - started
            if config is None or not _should_retry(result, config, attempt.runs_agent):
                raise result
            seconds = _retry_wait(result, config.backoff, number)
            if (elapsed + seconds) * 1000 > config.backoff.max_elapsed_time:
                raise result
            reason = f"status {result.status_code}" if result.status_code else result
            message = "attempt %d failed, next in %.1f s: %s"
            _log.warning(message, number, seconds, reason)
            # on Windows, Ctrl-C ends a sleep, but not the wait for an event
            cancelled.wait(seconds) if cancelled else time.sleep(seconds)
            elapsed += seconds  # counted here, as a test may replace the sleep


class Agents:
    """What `orq.agents` is: the official client's way to `responses`."""

    def __init__(self, responses: Responses) -> None:
        self.responses = responses


class Orq:
    """A client, which threads and tasks can share. Close it, or use `with`.

    api_key: a text, or a function that returns one (default: ORQ_API_KEY)
    server_url: (default: ORQ_BASE_URL, else https://my.orq.ai)
    timeout_ms: for each attempt, from connecting to the last byte, in milliseconds
        (default: 600000); the look-up of a host's name has no limit
    retry_config: what to try again; None tries once (default: DEFAULT_RETRY)
    ssl_context: (default: the platform's, with SSL_CERT_FILE and SSL_CERT_DIR)
    """

    def __init__(
        self,
        api_key: Union[str, Callable[[], Optional[str]], None] = None,
        *,
        server_url: Optional[str] = None,
        timeout_ms: Optional[float] = None,
        retry_config: Optional[RetryConfig] = DEFAULT_RETRY,
        ssl_context: Optional[ssl.SSLContext] = None,
    ) -> None:
        config = DEFAULT_RETRY if retry_config is UNSET else retry_config
        if ssl_context is not None and not isinstance(ssl_context, ssl.SSLContext):
            raise ValidationError([("ssl_context", "must be an ssl.SSLContext")])
        server = str(server_url or os.environ.get("ORQ_BASE_URL", "")).strip()
        if ssl_context is None and not server.lower().startswith("http:"):
            # it takes 15 to 50 ms: now, since later many threads may need it at once
            ssl_context = _make_tls_context()
        self._handler = _Handler(ssl_context)
        responses = Responses(self._handler, api_key, server_url, timeout_ms, config)
        self.agents = Agents(responses)

    def close(self) -> None:
        """Close the idle connections. A later call works, but keeps none."""
        self._handler.close()

    def __enter__(self) -> "Orq":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    async def __aenter__(self) -> "Orq":
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.close()


def create_response(
    agent_key: str,
    message: Union[str, A2AMessage, Mapping[str, Any]],
    *,
    api_key: Union[str, Callable[[], Optional[str]], None] = None,
    ssl_context: Optional[ssl.SSLContext] = None,
    **parameters: Any,
) -> CreateAgentResponseResponseBody:
    """Make one call, with a client of its own. See `Orq` and `Responses.create`."""
    with Orq(api_key, ssl_context=ssl_context) as orq, contextlib.ExitStack() as end:
        end.callback(parameters.clear)  # `http_headers` may hold a key
        create = orq.agents.responses.create
        return create(agent_key=agent_key, message=message, **parameters)


# --- Command line -----------------------------------------------------------

_JSON_OR_FILE = r"@|\s*[{[]"  # how a value begins that is not just a word
_CUT_REASONS = ("length", "max_iterations", "max_time", "content_filter")
# of A2A: in the last two, the task waits for a person
_ENDED_STATES = ("completed", *_FAILED_STATES, "input-required", "auth-required")


def _fail(path: str, problem: str) -> NoReturn:
    raise ValidationError([(path, problem)])


def _print(stream: Any, text: str) -> None:
    """Print a whole text, or raise OSError. A terminal gets no control characters."""
    if stream is None:
        raise OSError("it is closed")
    if stream.isatty():
        controls = r"[\x00-\x08\x0b-\x1f\x7f-\x9f]"  # a tab and a newline may pass
        text = re.sub(controls, lambda match: f"\\x{ord(match[0]):02x}", text)
    content = f"{text}\n".encode(stream.encoding or "utf-8", "backslashreplace")
    # Python's own stream may lose the rest of a text, or fail only when Python ends
    with open(stream.fileno(), "wb", buffering=0, closefd=False) as raw:
        while content:
            written = raw.write(content)
            if written is None:
                raise OSError("it is full")  # and does not block
            content = content[written:]


def _note(text: str) -> None:
    """Print a line on standard error. If that fails, it changes nothing."""
    with contextlib.suppress(OSError):
        _print(sys.stderr, f"orq_min: {_one_line(text)}")


class _LogHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _note(self.format(record))


def _add_options(parser: Any) -> None:
    add = parser.add_argument
    many: Any = {"action": "append", "default": []}
    flag: Any = {"action": "store_true"}
    whole, pairs, an_id = "JSON|@FILE", "NAME=VALUE|JSON|@FILE", "ID|JSON|@FILE"
    add("words", nargs="*", metavar="AGENT_KEY [MESSAGE] [-]")
    add("--file", **many, metavar="PATH|URL|-", help="attach a file; repeatable")
    add("--tool-result", **many, metavar=f"CALL_ID={whole}", help="answer a tool call")
    add("--message", metavar=whole, help="a whole message")
    add("--task-id", metavar="ID", help="an inactive task to continue")
    add("--variables", **many, metavar=pairs, help="for the templates; repeatable")
    add("--metadata", **many, metavar=pairs, help="for the traces; repeatable")
    add("--identity", metavar=an_id, help="on whose behalf the agent runs")
    add("--contact", metavar=an_id, help="the older name of --identity")
    add("--thread", metavar=an_id, help="groups requests")
    add("--memory", metavar=an_id, help="whose memories the agent uses")
    add("--background", **flag, help="print the task's id, and let the agent run on")
    add("--wait", metavar="TASK_ID", help="print a task's answer when it has ended")
    add("--extra-body", metavar=whole, help="fields that this file does not know")
    add("--server-url", metavar="URL", help="in place of ORQ_BASE_URL")
    add("--timeout", type=float, metavar="SECONDS", help="for each attempt, or --wait")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--retry", **flag, help="retry for 30 s what may help (agents may rerun)")
    either("--no-retry", **flag, help="try once")
    add("--json", **flag, help="print the whole answer, indented")
    add("--dry-run", **flag, help="print the request, and send nothing")
    add("-v", "--verbose", **flag, help="log each attempt")
    add("--version", action="version", version=f"orq_min {__version__}")


def _parse(argv: List[str]) -> Any:
    """The options. ValidationError if they are wrong."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            message = re.sub("(arguments: [^ =]*).*", r"\1", message)  # no key in it
            _fail("usage", f"{message} (--help says more)")

    parser = Parser(
        usage="%(prog)s [options] AGENT_KEY [MESSAGE] [-]",
        description="Send a message to an Orq.ai agent and print what it says. '-', or"
        " no MESSAGE: standard input. '-' after MESSAGE: standard input as a second"
        " text. '@-': JSON from standard input. A VALUE is text.",
        epilog="ORQ_API_KEY is the key, ORQ_BASE_URL the server. Exit status: 0"
        " answered, 1 an error of the service, a run that failed or failed printing, 2"
        " wrong usage or request, nothing sent, 3 no answer, 130 interrupted.",
        allow_abbrev=False,
    )
    _add_options(parser)
    # what follows "--" is no option; Python 3.13 changed what argparse makes of it
    end = argv.index("--") if "--" in argv else len(argv)
    options = parser.parse_intermixed_args(argv[:end])
    words = options.words + argv[end + 1 :]
    if not words:
        parser.error("AGENT_KEY is missing: first the agent's key, then a message")
    options.agent_key, *options.texts = words
    if options.texts[1:] not in ([], ["-"]):
        parser.error("give one MESSAGE, in quotes; only '-' may follow it")
    messages = [options.texts or options.file, options.tool_result]
    messages += [options.message, options.wait]
    if sum(message not in (None, []) for message in messages) > 1:
        parser.error("give one: MESSAGE or --file, --message, --tool-result, --wait")
    if options.file and os.path.isfile("".join(options.texts[:1])):
        parser.error("MESSAGE is the name of a file: write --file before each file")
    if options.task_id == "":
        parser.error("--task-id is empty: give the task_id of an earlier answer")
    names = "task_id variables metadata identity contact thread memory extra_body"
    others = [getattr(options, name) for name in f"{names} background".split()]
    if options.wait is not None and any(others):
        parser.error("--wait sends no message: give none, and no option for one")
    return options


def _read(option: str, place: str) -> bytes:
    """What a file or standard input holds, if it is not empty: a run costs money."""
    try:
        if place != "-":
            with open(place, "rb") as stream:
                content = stream.read()
        elif sys.stdin is None or sys.stdin.isatty():
            _fail(option, "is missing: give a text, or pipe one in")
        else:
            content = sys.stdin.buffer.read()
    except OSError as error:
        _fail(option, f"cannot read {place!r}: {error.strerror}")
    if not content.strip():
        _fail(option, f"{place!r} is empty, or was read before")
    return content


def _json_option(option: str, value: Optional[str], id_name: str = "") -> Any:
    """The value of JSON or @FILE. With `id_name`, a plain word is an id."""
    if value is None:
        return None
    if id_name and value and not re.match(_JSON_OR_FILE, value):
        return {id_name: value}
    content = _read(option, value[1:]) if value[:1] == "@" else value
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        _fail(option, f"{value[:80]!r} is not JSON: {error}")


def _pairs_option(option: str, values: List[str]) -> Any:
    """The object that all the option's values make together."""
    merged: Dict[str, Any] = {}
    for value in values:
        name, equals, text = value.partition("=")
        is_json = re.match(_JSON_OR_FILE, value) or not equals
        pairs = _json_option(option, value) if is_json else {name: text}
        if not isinstance(pairs, dict) or pairs.keys() & merged.keys():
            _fail(option, f"{value[:80]!r} is no NAME=VALUE or object, or given twice")
        merged.update(pairs)
    return merged if values else None


def _read_message(options: Any) -> Any:
    """The message of MESSAGE, --message, --file, --tool-result and standard input."""
    if options.message is not None:
        return _json_option("--message", options.message)
    parts: List[Any] = []
    for value in options.tool_result:
        call_id, _, result = value.partition("=")
        parts.append(ToolResultPart(call_id, _json_option("--tool-result", result)))
    if parts:
        return A2AMessage("tool", parts)
    for text in options.texts or ([] if options.file else ["-"]):
        if text == "-":
            try:
                text = _read("MESSAGE", "-").decode("utf-8-sig")
            except UnicodeDecodeError:
                _fail("MESSAGE", "is not text in UTF-8")
            text = re.sub(r"\r?\n\Z", "", text)
        if not text.strip():
            _fail("MESSAGE", "must not be empty")
        parts.append(TextPart(text))
    for place in options.file:
        if "://" in place:
            parts.append(FilePart.from_uri(place))
        else:
            name = "stdin" if place == "-" else os.path.basename(place)
            parts.append(FilePart.from_bytes(_read("--file", place), name))
    return A2AMessage("user", parts)


def _wait_for(get: Callable[..., Any], options: Any, settings: Dict[str, Any]) -> Any:
    """The answer of a task that has ended, within --timeout if that is given."""
    limit = float("inf") if options.timeout is None else options.timeout
    started, left = _now(), limit
    while True:
        settings["timeout_ms"] = 1000 * min(left, 30.0)
        pause = 1.0 if _now() - started < 30 else 5.0
        try:
            res = get(**settings, task_id=options.wait, retries=None)
            if res.status is None or res.status in _ENDED_STATES:
                return res
        except (APIError, APIConnectionError) as error:
            if options.no_retry or not _should_retry(error, DEFAULT_RETRY, False):
                raise
            pause = max(pause, min(60, _asked_wait(error)))
            _note(f"asking again in {pause:g} s: {error}")
        time.sleep(max(0, min(pause, limit - (_now() - started))))
        left = limit - (_now() - started)
        if left <= 0:
            raise APITimeoutError(f"{options.wait} has not ended within {limit:g} s")


def _make_call(responses: Responses, options: Any) -> Any:
    """Make the call that the options stand for."""
    settings = {"agent_key": options.agent_key, "server_url": options.server_url}
    if options.timeout is not None:
        settings["timeout_ms"] = options.timeout * 1000
    if options.wait is not None:
        return _wait_for(responses.get, options, settings)
    settings["retries"] = None if options.no_retry else UNSET
    if options.retry:
        settings["retries"] = RetryConfig("backoff", DEFAULT_RETRY.backoff, True)
    return responses.create(
        **settings,
        message=_read_message(options),
        task_id=options.task_id,
        variables=_pairs_option("--variables", options.variables),
        identity=_json_option("--identity", options.identity, "id"),
        contact=_json_option("--contact", options.contact, "id"),
        thread=_json_option("--thread", options.thread, "id"),
        memory=_json_option("--memory", options.memory, "entity_id"),
        metadata=_pairs_option("--metadata", options.metadata),
        background=options.background,
        extra_body=_json_option("--extra-body", options.extra_body),
    )


class _DryRun(Responses):
    """Prints a request in place of sending it."""

    def _try(self, new_attempt: Callable[[], _Attempt], config: Any) -> _Result:
        attempt = new_attempt()
        lines = [f"{attempt.get_method()} {attempt.full_url}", "Authorization: ***"]
        lines += [f"{name}: {value}" for name, value in attempt.sent_headers().items()]
        _print(sys.stdout, "\n".join([*lines, "", (attempt.body or b"").decode()]))
        return _Result()


def _show_seconds(done: threading.Event) -> None:
    """Show the seconds that pass on a terminal, and erase them in the end."""
    started, shown = _now(), ""
    while sys.stderr is not None and sys.stderr.isatty() and not done.wait(1):
        shown = f"{_now() - started:.0f} s"
        print(f"{shown}\r", end="", file=sys.stderr, flush=True)  # to be written over
    if shown:
        print(f"{' ' * len(shown)}\r", end="", file=sys.stderr, flush=True)


def _notes(res: _Result, text: str, options: Any) -> Iterator[str]:
    """What standard error says of an answer."""
    import shlex

    if res.error:
        yield f"the run failed: {res.error}"
    if res.finish_reason in _CUT_REASONS:
        yield f"the answer was cut (finish_reason: {res.finish_reason})"
    task = shlex.quote(str(res.task_id or ""))
    calls = res.pending_tool_calls if isinstance(res.pending_tool_calls, list) else []
    for call in calls:
        function = getattr(call, "function", None)
        name, arguments = (getattr(function, n, None) for n in ("name", "arguments"))
        result = shlex.quote(f"{getattr(call, 'id', None)}=JSON")
        answer = f"--task-id={task} --tool-result={result}"
        yield f"{name}({arguments}) waits for its result: {answer}"
    if not (res.error or calls or text):
        yield "the answer has nothing to print (--json shows all of it)"
    elif res.task_id and sys.stderr is not None and sys.stderr.isatty():
        yield f"continue with {'--wait' if options.background else '--task-id'}={task}"


def _print_answer(res: _Result, options: Any) -> int:
    """Print an answer and what is to be said of it. Return the exit status."""
    status, text = 1 if res.error else 0, res.text
    try:
        if options.json:  # 1e400 was read as infinity: print null
            raw = json.loads(json.dumps(res.raw), parse_constant=lambda _: None)
            is_utf = str(sys.stdout and sys.stdout.encoding).lower().startswith("utf")
            text = json.dumps(raw, indent=2, ensure_ascii=not is_utf)
        elif options.background:
            text = str(res.task_id or "")
        if text:
            _print(sys.stdout, text)
    except BrokenPipeError:
        pass  # `| head -1` has seen enough
    except (OSError, RecursionError) as error:  # json reads deeper than it writes
        _note(f"cannot print the answer of task {res.task_id}: {error}")
        status = 1
    for note in _notes(res, text, options):
        _note(note)
    return status


def _run_command(options: Any) -> int:
    with Orq(server_url=options.server_url) as orq:
        if options.dry_run:  # with a key of its own: it needs no ORQ_API_KEY
            _make_call(_DryRun(orq._handler, "***", None, None, None), options)
            return 0
        done = threading.Event()
        clock = threading.Thread(target=_show_seconds, args=(done,), daemon=True)
        clock.start()
        try:
            res = _make_call(orq.agents.responses, options)
        finally:
            done.set()
            clock.join()
    return _print_answer(res, options)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line. Return its exit status."""
    _log.handlers = [_LogHandler()]
    try:
        options = _parse(list(sys.argv[1:] if argv is None else argv))
        _log.setLevel(logging.DEBUG if options.verbose else logging.INFO)
        return _run_command(options)
    except OrqError as error:
        _note(str(error))
        return {ValidationError: 2, APIError: 1}.get(type(error), 3)
    except (OSError, RecursionError) as error:
        _note(f"failed: {error}")
        return 1
    except KeyboardInterrupt:
        _note("interrupted; a run that was begun may go on")
        return 130


if __name__ == "__main__":
    status = main()
    if status == 130 and os.name == "posix":  # die by SIGINT: shell loops end too
        import signal

        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    sys.exit(status)

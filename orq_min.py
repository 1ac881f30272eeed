#!/usr/bin/env python3
# SPDX-License-Identifier: MIT-0
# orq_min.py 2.0.0: Orq.ai's create-response operation in one file.
# ruff: noqa: I001, PYI034, UP006, UP007, UP017, UP033, UP035, UP045 (for 3.7)
"""Send a message to an Orq.ai agent and get back what it did.

One file, Python 3.7 or newer, the standard library alone: copy it and import it.

    from orq_min import Orq

    with Orq() as orq:  # the key is in ORQ_API_KEY
        res = orq.agents.responses.create(agent_key="my-agent", message="Hello")
        print(res.text, res.task_id)

A quick script needs one line, `create_response("my-agent", "Hello").text`; a
program on asyncio awaits `create_async`; a shell runs `python3 orq_min.py --help`.

What goes out is checked first: all that is wrong is said at once, by its path, and
nothing is sent. What comes back is kept: a 2XX that holds a JSON object is never
refused for what it lacks. An agent run costs money and is not idempotent, so by
default only what did not leave completely, and 429, are retried. No redirect is
followed: the key goes to `server_url` alone (if that is http://, then in clear, and
through any proxy).

    OrqError                 base of every error of this module
      ValidationError        the call is wrong; nothing was sent (a ValueError too)
      APIError               the server answered, and not with a usable 2XX
      APIConnectionError     no complete answer came
        APITimeoutError      ... in time

Environment: ORQ_API_KEY, ORQ_BASE_URL, the proxy variables that urllib reads, and
those of Python's ssl: SSL_CERT_FILE and SSL_CERT_DIR (with either of them,
VERIFY_X509_STRICT is off) and SSLKEYLOGFILE. Logger: this module's name; each retry is
logged at WARNING, and once a key that goes in clear; each attempt at DEBUG; never a
header or a body.
"""

import datetime
import email.utils
import enum
import errno
import functools
import http.client
import io
import json
import logging
import os
import random
import re
import select
import selectors
import signal
import socket
import ssl
import string
import sys
import threading
import time
import typing
import urllib.parse
import urllib.request
import zlib
from collections import abc
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Mapping
from typing import NamedTuple, NoReturn, Optional, Sequence, Tuple, Type, TypeVar
from typing import Union, cast

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

# --- Constants --------------------------------------------------------------

__version__ = "2.0.0"

DEFAULT_SERVER = "https://my.orq.ai"
DEFAULT_TIMEOUT_MS = 600_000
MAX_WAIT_MS = 2**31 - 1  # for an answer or a retry: 25 days, as far as poll counts
MAX_ANSWER_BYTES = 256 * 2**20
MAX_NESTING = 100  # levels of a free-form value; json gives up near 1000
MAX_NUMBER = sys.float_info.max
CONNECT_SECONDS = 10.0  # to connect, tunnel and start TLS, once addresses are found
ERROR_BODY_SECONDS = 10.0  # for the body of an answer that is no 2XX
TURN_SECONDS = 0.25  # from one look at the clock to the next
ADDRESS_SECONDS = 0.25  # from one address of a host to the next (RFC 8305, section 5)
IDLE_SECONDS = 4.0  # many servers close an idle connection after 5
MAX_IDLE = 16  # connections that a client keeps
BLOCK_BYTES = 64 * 2**10  # read or sent at once
QUOTED_CHARACTERS = 500  # of a server's words in the text of an error

UNSET: Any = ...  # "not given", where None means something; a reload or copy keeps it

T = TypeVar("T")
Problems = List[Tuple[str, str]]  # (path, what is wrong there)

_log = logging.getLogger(__name__)

# --- Errors -----------------------------------------------------------------
# Each is built of one argument: so pickle and copy build it, before they restore its
# attributes.


class OrqError(Exception):
    """Base of every error of this module.

    `message` is a text. The rest is None where no answer came: `status_code`;
    `headers`, found by names whose case does not matter; `body`, the text as it came;
    `data`, its decoded JSON. These are as the server wrote them; if it repeats the
    key, they hold it, and the error's own text does not.
    """

    status_code: Any = None
    headers: Any = None
    body: Any = None
    data: Any = None

    def __init__(self, text: Any = "") -> None:
        super().__init__(text)
        self.message = str(self)


class ValidationError(OrqError, ValueError):
    """The call is wrong, and nothing was sent.

    `errors` is a list of (path, problem), one for each thing that is wrong.
    """

    def __init__(self, errors: Problems) -> None:
        self.errors = errors
        super().__init__(errors)

    def __str__(self) -> str:
        return "; ".join(f"{path}: {problem}" for path, problem in self.errors)


class APIError(OrqError):
    """The server answered, and not with a usable 2XX.

    `message` is the server's own words where its JSON holds them, else the standard
    phrase for the `status_code`; `data` is None where the `body` is not JSON.
    """

    status_code: int = 0
    headers: http.client.HTTPMessage
    body: str = ""

    def __init__(self, text: str = "") -> None:
        super().__init__(text)
        self.headers = http.client.HTTPMessage()


class APIConnectionError(OrqError):
    """No complete answer came.

    `sent`: the agent may have run, as the whole request had left, or a 2XX had begun.
    `temporary`: another attempt may do better.
    """

    sent: bool = False
    temporary: bool = True


class APITimeoutError(APIConnectionError):
    """No complete answer came in time."""


# --- Request types ----------------------------------------------------------
# What each may hold is said by the service's published schema (operation
# CreateAgentResponse). A mapping may stand for any of them in a call. What they are
# checked with, and how they become JSON, is in the section "Checking and JSON".


class _Checked:
    """Base of what checks itself when it is built. ValidationError says what is wrong."""

    def __post_init__(self) -> None:
        problems: Problems = []
        _encode_object((type(self),), self, "", problems)  # to encode is to check
        if problems:
            raise ValidationError(problems)


class _Readable:
    """Base of what can be read as a dict too: `part["text"]`, `"text" in part`.

    By the name in JSON, or in Python. What did not come is not in it.
    """

    _received: Optional[Dict[str, Any]] = None  # the JSON object, where it was one

    def keys(self) -> List[str]:
        """The names, in JSON, of what came."""
        if self._received is not None:
            return list(self._received)
        model: Any = type(self)
        known = _json_fields(model).items()
        return [k for k, own in known if getattr(self, own.python_name) is not None]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, name: object) -> bool:
        keys = self.keys()
        return name in keys or _json_name(type(self), name) in keys

    def __getitem__(self, name: str) -> Any:
        model: Any = type(self)
        keys, known = self.keys(), _json_fields(model)
        json_name = name if name in keys else _json_name(model, name)
        if json_name not in keys:
            raise KeyError(name)
        if json_name in known:
            return getattr(self, known[json_name].python_name)
        return (self._received or {})[json_name]

    def get(self, name: str, default: Any = None) -> Any:
        """The value of this name, or the default if it did not come."""
        try:
            return self[name]
        except KeyError:
            return default


@dataclass
class TextPart(_Checked, _Readable):
    """A text."""

    text: str
    kind: str = "text"


@dataclass
class BinaryFormat(_Checked, _Readable):
    """The content of a file, in base64."""

    bytes_: str  # `bytes` in JSON
    mime_type: Optional[str] = None
    name: Optional[str] = None


@dataclass
class FileInURIFormat(_Checked, _Readable):
    """The place from which the service fetches a file."""

    uri: str
    mime_type: Optional[str] = None
    name: Optional[str] = None


@dataclass
class FilePart(_Checked, _Readable):
    """A file. `from_path`, `from_bytes` and `from_uri` build one.

    Without `mime_type`, they tell the MIME type by the ending of the file's name.
    """

    file: Union[BinaryFormat, FileInURIFormat, Mapping[str, Any]]
    metadata: Optional[Mapping[str, Any]] = None
    kind: str = "file"

    @classmethod
    def from_path(
        cls, path: "Union[str, os.PathLike[str]]", mime_type: Optional[str] = None
    ) -> "FilePart":
        """Attach a file that is read now. OSError if it can't be."""
        with open(path, "rb") as stream:
            content = stream.read()
        if not content:
            raise ValidationError([("path", f"{os.fspath(path)!r} is empty")])
        return cls.from_bytes(content, os.path.basename(os.fspath(path)), mime_type)

    @classmethod
    def from_bytes(
        cls, content: bytes, name: str, mime_type: Optional[str] = None
    ) -> "FilePart":
        """Attach a content under a file's name."""
        import base64

        if not isinstance(content, (bytes, bytearray, memoryview)) or not content:
            raise ValidationError([("content", "must be bytes, and not empty")])
        text = base64.b64encode(content).decode("ascii")
        return cls(BinaryFormat(text, mime_type or _mime_type(name), name))

    @classmethod
    def from_uri(cls, uri: str, mime_type: Optional[str] = None) -> "FilePart":
        """Attach a file that the service fetches."""
        place = re.split("[?#]", uri)[0] if isinstance(uri, str) else ""
        _, _, path = place.partition("://")[2].partition("/")  # not of a host's name
        return cls(FileInURIFormat(uri, mime_type or _mime_type(path)))


@dataclass
class ToolResultPart(_Checked, _Readable):
    """The result of a pending tool call, any JSON value."""

    tool_call_id: str
    result: Any = None
    metadata: Optional[Mapping[str, Any]] = None
    kind: str = "tool_result"


@dataclass
class A2AMessage(_Checked):
    """A message to the agent, with any number of parts, or none."""

    role: str  # "user", or "tool" for tool results
    parts: Sequence[Union[TextPart, FilePart, ToolResultPart, Mapping[str, Any]]]
    message_id: Optional[str] = None  # a ULID


@dataclass
class Identity(_Checked):
    """On whose behalf the agent runs. The service makes one whose id is new."""

    id: str
    display_name: Optional[str] = None
    email: Optional[str] = None
    metadata: Optional[Sequence[Mapping[str, Any]]] = None
    logo_url: Optional[str] = None
    tags: Optional[Sequence[str]] = None


@dataclass
class Contact(Identity):
    """An Identity, by its older name."""


@dataclass
class CreateAgentResponseThread(_Checked):
    """What groups requests that belong together."""

    id: str
    tags: Optional[Sequence[str]] = None


@dataclass
class Memory(_Checked):
    """Whose memories the agent uses."""

    entity_id: str  # of a user, a session or the like


@dataclass
class _Body:
    """The body of a request. `Responses.create` says what its fields are."""

    message: Union[str, A2AMessage, Mapping[str, Any]]
    task_id: Optional[str] = None
    variables: Optional[Mapping[str, Any]] = None
    identity: Union[Identity, Mapping[str, Any], None] = None
    contact: Union[Contact, Mapping[str, Any], None] = None
    thread: Union[CreateAgentResponseThread, Mapping[str, Any], None] = None
    memory: Union[Memory, Mapping[str, Any], None] = None
    metadata: Optional[Mapping[str, Any]] = None
    background: Optional[bool] = None


# The platform's own table differs from one machine to the next: Windows calls a .csv
# a spreadsheet, and a slim container knows no .docx.
_OFFICE = "application/vnd.openxmlformats-officedocument"
# fmt: off
_MIME_TYPES = {
    "csv": "text/csv", "htm": "text/html", "html": "text/html", "md": "text/markdown",
    "txt": "text/plain", "json": "application/json", "xml": "application/xml",
    "yaml": "application/yaml", "yml": "application/yaml", "pdf": "application/pdf",
    "rtf": "application/rtf", "doc": "application/msword",
    "docx": f"{_OFFICE}.wordprocessingml.document",
    "xls": "application/vnd.ms-excel", "xlsx": f"{_OFFICE}.spreadsheetml.sheet",
    "ppt": "application/vnd.ms-powerpoint",
    "pptx": f"{_OFFICE}.presentationml.presentation",
    "odt": "application/vnd.oasis.opendocument.text",
    "bmp": "image/bmp", "gif": "image/gif", "jpeg": "image/jpeg", "jpg": "image/jpeg",
    "png": "image/png", "svg": "image/svg+xml", "tif": "image/tiff",
    "tiff": "image/tiff", "webp": "image/webp", "aac": "audio/aac",
    "flac": "audio/flac", "m4a": "audio/mp4", "mp3": "audio/mpeg", "ogg": "audio/ogg",
    "wav": "audio/wav", "mp4": "video/mp4", "webm": "video/webm",
    "gz": "application/gzip", "zip": "application/zip",
}
# fmt: on


def _mime_type(name: Any) -> Optional[str]:
    """The MIME type that the ending of a file's name stands for, if that is known."""
    if not isinstance(name, str):
        return None  # it is refused for that in a moment
    _, dot, ending = name.rpartition(".")
    if dot and ending.lower() in _MIME_TYPES:
        return _MIME_TYPES[ending.lower()]
    import mimetypes

    mime_type, encoding = mimetypes.guess_type(name)
    return None if encoding else mime_type


# --- Answer types -----------------------------------------------------------
# The annotations are what the schema promises, and the defaults are for one who builds
# an answer by hand, as in a test. What comes is not checked but kept: a field that did
# not come is None (`output` and `parts` are a list), one of another type stays as it
# came, and one that is unknown here becomes an attribute of its name if that is free and
# does not begin with "_".


@dataclass
class DataPart(_Readable):
    """Any values."""

    data: Dict[str, Any]
    metadata: Optional[Dict[str, Any]] = None
    kind: str = "data"


@dataclass
class ToolCallPart(_Readable):
    """A tool call that the agent made."""

    tool_name: str
    tool_call_id: str
    arguments: Dict[str, Any]
    metadata: Optional[Dict[str, Any]] = None
    kind: str = "tool_call"


@dataclass
class ErrorPart(_Readable):
    """What went wrong in the run."""

    error: str
    code: Optional[float] = None
    kind: str = "error"


@dataclass(eq=False, repr=False)
class UnknownPart(_Readable):
    """A part of a kind that is not known here, with what came as attributes."""

    kind: str = ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UnknownPart) and vars(self) == vars(other)

    def __repr__(self) -> str:
        return f"UnknownPart({self._received or self.kind!r})"


if TYPE_CHECKING:
    OutputPart = Any  # so that `res.output[0].parts[0].text` needs no cast
else:
    # fmt: off
    OutputPart = Union[
        TextPart, FilePart, ToolResultPart, DataPart, ToolCallPart, ErrorPart,
        UnknownPart,
    ]
    # fmt: on


@dataclass
class Output(_Readable):
    """A message of the run."""

    message_id: str = ""
    role: str = "agent"  # or "user", "tool", "system"
    parts: List[OutputPart] = field(default_factory=list)
    metadata: Optional[Dict[str, Any]] = None


@dataclass
class PromptTokensDetails(_Readable):
    """Tokens that went in, by kind."""

    cached_tokens: Optional[int] = None  # read from a cache
    cache_creation_tokens: Optional[int] = None  # written to one
    audio_tokens: Optional[int] = None


@dataclass
class CompletionTokensDetails(_Readable):
    """Tokens that came out, by kind."""

    reasoning_tokens: Optional[float] = None
    accepted_prediction_tokens: Optional[float] = None  # predicted, and used
    rejected_prediction_tokens: Optional[float] = None  # predicted, and not used
    audio_tokens: Optional[int] = None


@dataclass
class CreateAgentResponseUsage(_Readable):
    """Tokens that the run used."""

    completion_tokens: float = 0
    prompt_tokens: float = 0
    total_tokens: float = 0
    prompt_tokens_details: Optional[PromptTokensDetails] = None
    completion_tokens_details: Optional[CompletionTokensDetails] = None


@dataclass
class Function(_Readable):
    """A tool to call, with its arguments as JSON text."""

    name: str = ""
    arguments: str = "{}"


@dataclass
class PendingToolCalls(_Readable):
    """A tool call that waits for a ToolResultPart with its id."""

    id: str = ""
    function: Function = field(default_factory=Function)
    type: str = "function"


@dataclass
class Telemetry(_Readable):
    """Where the run is found in the traces."""

    trace_id: str = ""
    span_id: str = ""


# What a finished run that did not succeed is called.
_FAILED_STATES = ("failed", "canceled", "rejected")


@dataclass
class CreateAgentResponseResponseBody(_Readable):
    """What the agent did: `text` is what it said, `error` why it failed.

    `raw` is the whole decoded answer; `json.dumps(res.raw)` makes JSON of it.
    """

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
    raw: Dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def text(self) -> str:
        """The text of the agent's messages, with a newline between messages."""
        texts = [_text_of(message) for message in _agent_messages(self.output)]
        return "\n".join(filter(None, texts))

    @property
    def error(self) -> Optional[str]:
        """Why the run failed, or the state if no text says so; None if it did not."""
        told = [self.raw.get("error")]
        for message in _agent_messages(self.output):
            told += _error_parts(message)
        if self.status in _FAILED_STATES and not any(told):
            told += _reasons(self.raw.get("status")) or [self.status]
        return "; ".join(_words(value) for value in told if value) or None


def _reasons(status: Any) -> List[Any]:
    """What the status of a failed task says, which may be an object with a message."""
    said = status.get("message") if isinstance(status, dict) else None
    if not isinstance(said, dict):
        return [said] if said else []
    message = _decode_object(Output, said)
    return _error_parts(message) or list(filter(None, [_text_of(message)]))


def _error_parts(message: Output) -> List[Any]:
    return [part.error or "error" for part in _all_of(ErrorPart, message.parts)]


def _all_of(model: Type[T], value: Any) -> List[T]:
    """Those of a list's items that came as the schema promises."""
    items = value if isinstance(value, list) else []
    return [item for item in items if isinstance(item, model)]


def _agent_messages(output: Any) -> List[Output]:
    return [m for m in _all_of(Output, output) if m.role in ("agent", None)]


def _text_of(message: Output) -> str:
    texts = [part.text for part in _all_of(TextPart, message.parts)]
    return "".join(text for text in texts if isinstance(text, str))


def _words(said: Any) -> str:
    """What an error says: a text, some texts, the message of an object; else its JSON."""
    if isinstance(said, dict) and said.get("message"):
        said = said["message"]
    if isinstance(said, list) and all(isinstance(item, str) for item in said):
        said = "; ".join(said)
    return said if isinstance(said, str) else _json_text(said) or "error"


def _json_text(value: Any) -> str:
    """JSON, or "" if it is nested too deeply: Python 3.12 reads deeper than it writes."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return ""


# --- Checking and JSON ------------------------------------------------------
# To encode is to check: `_encode` and its like return the JSON form of a value, and add
# what is wrong with it to `problems`, each with its path, which grows by a name or an
# index on the way down. What a field may hold is said by its annotation, and by these.

_JSON_NAMES: Dict[Any, Dict[str, str]] = {  # where they differ from Python's
    A2AMessage: {"message_id": "messageId"},
    BinaryFormat: {"bytes_": "bytes", "mime_type": "mimeType"},
    CreateAgentResponseResponseBody: {"id": "_id"},
    FileInURIFormat: {"mime_type": "mimeType"},
    Output: {"message_id": "messageId"},
}
_CHOICES: Dict[Any, Dict[str, Tuple[str, ...]]] = {
    A2AMessage: {"role": ("user", "tool")},
    FilePart: {"kind": ("file",)},
    TextPart: {"kind": ("text",)},
    ToolResultPart: {"kind": ("tool_result",)},
}
_CLASS_NAMES: Dict[Any, str] = {
    str: "text",
    bool: "true or false",
    abc.Mapping: "an object",
    abc.Sequence: "a list",
    type(None): "None",
}


class _Allowed(NamedTuple):
    """What an annotation allows a value to be."""

    classes: Tuple[Any, ...]  # all that it names
    models: Tuple[Any, ...]  # those of them that are dataclasses
    items: "Optional[_Allowed]"  # what the items of a list may be
    required: bool


def _allowed_by(annotation: Any) -> _Allowed:
    is_union = getattr(annotation, "__origin__", None) is Union
    members = annotation.__args__ if is_union else (annotation,)
    classes = tuple(getattr(member, "__origin__", member) for member in members)
    models = tuple(cls for cls in classes if is_dataclass(cls))
    items = None
    for member, cls in zip(members, classes):
        if cls in (list, abc.Sequence):
            items = _allowed_by(member.__args__[0])
    required = type(None) not in classes and Any not in classes
    return _Allowed(classes, models, items, required)


class _JsonField(NamedTuple):
    """A field of a dataclass, as JSON has it."""

    python_name: str
    allowed: _Allowed
    choices: Tuple[str, ...]  # of a text; () if it is free
    is_special: bool  # see `_check_text`


@functools.lru_cache(maxsize=None)  # so that the annotations of a class are read once
def _json_fields(model: Any) -> Dict[str, _JsonField]:
    """The fields of a dataclass by their names in JSON."""
    # given our names, it works where annotations are text or the module is not listed
    annotations = typing.get_type_hints(model, globals())
    found = {}
    for name in [own.name for own in fields(model) if own.name != "raw"]:
        allowed, choices = _allowed_by(annotations[name]), _entry_for(_CHOICES, model)
        is_special = name in choices or name == "bytes_"
        own = _JsonField(name, allowed, choices.get(name, ()), is_special)
        found[_json_name(model, name)] = own
    return found


def _json_name(model: Any, name: Any) -> Any:
    return _entry_for(_JSON_NAMES, model).get(name, name)


def _entry_for(table: Dict[Any, Any], model: Any) -> Dict[str, Any]:
    """What a table says of a class, or of the class that it is derived from."""
    return next((table[cls] for cls in model.__mro__ if cls in table), {})


def _choose(models: Sequence[Any], given: Mapping[Any, Any]) -> Any:
    """The dataclass of an object: by its `kind`, or by where a file's content is."""
    if len(models) == 1:
        return models[0]
    if BinaryFormat in models:
        if "bytes" in given or "bytes_" in given:
            return BinaryFormat
        return FileInURIFormat if "uri" in given else None
    kind = given.get("kind")
    unknown = UnknownPart if UnknownPart in models else None
    return next((model for model in models if model.kind == kind), unknown)


def _at(path: str, name: Any) -> str:
    if isinstance(name, str) and name.isidentifier():
        return f"{path}.{name}" if path else name
    try:
        return f"{path}[{name!r}]"
    except ValueError:  # an integer of more digits than Python writes
        return f"{path}[...]"


def _shown(value: Any) -> str:
    """A float itself, as NaN is one; of any other value its class, with its module."""
    if value is None or isinstance(value, float):
        return "None" if value is None else json.dumps(float(value))
    cls = type(value)
    is_builtin = cls.__module__ == "builtins"
    return cls.__qualname__ if is_builtin else f"{cls.__module__}.{cls.__qualname__}"


def _is_list(value: Any) -> bool:
    text_like = (str, bytes, bytearray, memoryview)  # sequences, but no lists
    return isinstance(value, abc.Sequence) and not isinstance(value, text_like)


def _encode(allowed: _Allowed, value: Any, path: str, problems: Problems) -> Any:
    """The JSON form of what a field holds."""
    classes, models, items, _ = allowed
    if Any in classes:
        return _encode_free(value, path, problems)
    is_right = _is_list(value) if items is not None else isinstance(value, classes)
    if not is_right:
        names = [_CLASS_NAMES.get(cls) or cls.__name__ for cls in classes]
        problems.append((path, f"must be {' or '.join(names)}, not {_shown(value)}"))
        return None
    if items is not None:
        numbered = enumerate(value)
        return [_encode(items, item, f"{path}[{n}]", problems) for n, item in numbered]
    if models:
        return _encode_object(models, value, path, problems)
    return _encode_free(value, path, problems) if abc.Mapping in classes else value


def _encode_object(
    models: Tuple[Any, ...], value: Any, path: str, problems: Problems
) -> Dict[str, Any]:
    """The JSON form of one of the dataclasses, or of a mapping that stands for it."""
    is_mapping = not isinstance(value, models)
    given = dict(value) if is_mapping else vars(value)
    model: Any = _choose(models, given) if is_mapping else type(value)
    if model is None:
        problems.append(_no_model(models, given, path))
        return {}
    encoded: Dict[str, Any] = {}
    for name, own in _json_fields(model).items():
        if is_mapping:
            content = _pop(given, name, own.python_name, path, problems)
        else:
            content = given.get(own.python_name)
        if content is not None:
            where, count = _at(path, name), len(problems)
            encoded[name] = _encode(own.allowed, content, where, problems)
            if own.is_special and len(problems) == count:
                _check_text(own, content, where, problems)
        elif own.allowed.required:
            problems.append((_at(path, name), "required"))
    if is_mapping:
        known = list(_json_fields(model))
        problems += [(_at(path, name), _unknown(name, known)) for name in given]
    return encoded


def _pop(
    given: Dict[Any, Any], name: str, python_name: str, path: str, problems: Problems
) -> Any:
    """The value of a field of a mapping, which may name it as Python does, too."""
    content, other = given.pop(name, None), given.pop(python_name, None)
    if content is not None and other is not None:
        problems.append((_at(path, name), "given in two spellings"))
    return other if content is None else content


def _no_model(
    models: Sequence[Any], given: Mapping[Any, Any], path: str
) -> Tuple[str, str]:
    """The problem of a mapping for which `_choose` finds no dataclass."""
    if BinaryFormat in models:
        return path, "must have 'bytes' or 'uri'"
    kinds = " or ".join(repr(model.kind) for model in models)
    is_missing = given.get("kind") is None
    return _at(path, "kind"), "required" if is_missing else f"must be {kinds}"


def _check_text(own: _JsonField, text: str, path: str, problems: Problems) -> None:
    """Check a text that may not be any text."""
    if own.choices and text not in own.choices:
        problems.append((path, "must be " + " or ".join(map(repr, own.choices))))
    if own.python_name == "bytes_":  # of BinaryFormat
        alphabet = string.ascii_letters + string.digits + "+/=-_\r\n"
        # translate, as a regular expression takes a second for a large file; whether
        # the padding is right is for the service to say
        others = text.encode("utf-8", "replace").translate(None, alphabet.encode())
        if others or not text.strip():
            wrong = "must be base64 text (FilePart.from_path makes it of a file)"
            problems.append((path, wrong))


def _unknown(name: Any, known: Sequence[str]) -> str:
    close = _closest(name, known)
    return "unknown field" + (f" (did you mean {close!r}?)" if close else "")


def _closest(name: Any, known: Sequence[str]) -> str:
    """The one that was meant, or ""."""
    import difflib

    # 80 characters, as difflib takes time in proportion to the square of the length
    short = name[:80] if isinstance(name, str) else ""
    close = difflib.get_close_matches(short, known, 1)
    return close[0] if close else ""


def _encode_free(
    value: Any, path: str, problems: Problems, parents: Tuple[int, ...] = ()
) -> Any:
    """The JSON form of a free-form value.

    `parents` are the ids of what it is inside of.
    """
    if isinstance(value, enum.Enum):
        return _encode_free(value.value, path, problems, parents)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and abs(value) <= MAX_NUMBER:  # NaN is not
        return value
    text = _text_form(value)
    if text is not None:
        return text
    content = _content(value)
    if content is UNSET:
        problems.append((path, f"{_shown(value)} has no JSON form"))
    elif id(value) in parents or len(parents) == MAX_NESTING:
        problems.append((path, "contains itself, or is nested too deeply"))
    else:
        return _encode_content(content, path, problems, (*parents, id(value)))
    return None


def _text_form(value: Any) -> Optional[str]:
    """The text that stands for a value of one of these classes."""
    if isinstance(value, (datetime.date, datetime.time)):
        is_itself = value == value  # noqa: PLR0124 (pandas.NaT is a date, but is not)
        return re.sub(r"\+00:00$", "Z", value.isoformat()) if is_itself else None
    if isinstance(value, os.PathLike):
        path = os.fspath(value)
        return path if isinstance(path, str) else None
    from decimal import Decimal
    from uuid import UUID

    is_number = isinstance(value, Decimal) and value.is_finite()
    return str(value) if is_number or isinstance(value, UUID) else None


def _content(value: Any) -> Any:
    """What a container holds, as a mapping or a list; UNSET if it is no container."""
    if isinstance(value, abc.Mapping):
        return value
    if isinstance(value, abc.Set) or _is_list(value):
        return list(value)
    if isinstance(value, type):
        return UNSET
    if isinstance(value, _Readable):  # with all that came
        return {name: value[name] for name in value}
    if is_dataclass(value):
        return {own.name: getattr(value, own.name) for own in fields(value)}
    return value.model_dump() if hasattr(value, "model_dump") else UNSET  # pydantic's


def _encode_content(
    content: Any, path: str, problems: Problems, parents: Tuple[int, ...]
) -> Any:
    if isinstance(content, list):
        placed = [(f"{path}[{n}]", item) for n, item in enumerate(content)]
        return [_encode_free(item, where, problems, parents) for where, item in placed]
    if not isinstance(content, abc.Mapping):  # of pydantic, too
        return _encode_free(content, path, problems, parents)
    encoded: Dict[str, Any] = {}
    for key, item in content.items():
        name = key.value if isinstance(key, enum.Enum) else key
        where, is_integer = _at(path, name), type(name) is int
        if not isinstance(name, str) and not (is_integer and abs(name) <= MAX_NUMBER):
            problems.append((where, f"{_shown(name)} as a name has no JSON form"))
        elif str(name) in encoded:
            problems.append((where, "given twice"))
        else:
            encoded[str(name)] = _encode_free(item, where, problems, parents)
    return encoded


_encode_json = json.JSONEncoder(separators=(",", ":")).encode


def _decode_json(text: str) -> Any:
    """The value, or None where the text is not JSON that Python reads."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _decode(allowed: _Allowed, value: Any) -> Any:
    """What a JSON value becomes in a field; one that does not fit it stays."""
    if allowed.items is not None and isinstance(value, list):
        return [_decode(allowed.items, item) for item in value]
    if not allowed.models or not isinstance(value, dict):
        return value
    model = _choose(allowed.models, value)
    return value if model is None else _decode_object(model, value)


def _decode_object(model: Any, given: Dict[str, Any]) -> Any:
    decoded = model.__new__(model)  # not built: a request part would be checked
    attributes, rest = vars(decoded), dict(given)
    attributes["_received"] = given
    for name, own in _json_fields(model).items():
        content = rest.pop(name, None)
        if content is None and name in ("output", "parts"):
            content = []  # programs loop over it
        attributes[own.python_name] = _decode(own.allowed, content)
    for name, content in rest.items():
        is_free = name not in attributes and not hasattr(model, name)
        if is_free and not name.startswith("_"):
            attributes[name] = content
    return decoded


def _decode_answer(data: Dict[str, Any]) -> CreateAgentResponseResponseBody:
    given = dict(data)
    if "_id" not in given and "id" in given:  # a task
        given["_id"] = given.pop("id")
        given.setdefault("task_id", given["_id"])
    res: CreateAgentResponseResponseBody
    res = _decode_object(CreateAgentResponseResponseBody, given)
    status = res.status
    state = status.get("state") if isinstance(status, dict) else status
    res.status = state if isinstance(state, str) else None
    res.raw = data
    return res


# --- Retry policy -----------------------------------------------------------


@dataclass(frozen=True)
class BackoffStrategy:
    """How long to wait between attempts, in milliseconds.

    A wait that would end after `max_elapsed_time` is not begun. Up to `jitter_ms` is
    added at random, within `max_interval`; if it is None, up to a quarter of the wait
    is taken away.
    ValidationError if one is not a number, or negative.
    """

    initial_interval: float = 500  # the first wait
    max_interval: float = 60_000  # the longest wait, unless the server asks for more
    exponent: float = 1.5  # the growth from one wait to the next
    max_elapsed_time: float = 3_600_000
    jitter_ms: Optional[float] = None

    def __post_init__(self) -> None:
        problems: Problems = []
        numbers: Dict[str, Any] = dict(vars(self))
        if self.jitter_ms is None:
            del numbers["jitter_ms"]
        for name, value in numbers.items():
            # a bool is an int, but no number; NaN compares as false
            if type(value) not in (int, float) or not 0 <= value <= MAX_NUMBER:
                wanted = f"must be a number, 0 or more, not {_shown(value)}"
                problems.append((name, wanted))
        if problems:
            raise ValidationError(problems)


@dataclass(frozen=True)
class RetryConfig:
    """What to try again, and when. None in its place tries once.

    `retry_connection_errors` names one of three policies. None, the safe one: what
    cannot have run the agent, that is, a request that did not leave completely, and
    429. False and True are those of the official client, under which an agent may run
    again and again: 429, 500, 502, 503 and 504, and, if True, whatever brought no
    complete answer. `status_codes_override`, such as ["429", "5XX"], takes the place
    of the statuses. Never retried is a complete 2XX, or what another attempt cannot mend,
    such as a bad certificate or a proxy that refuses (`temporary` of the error). The default of `backoff` goes on
    for an hour, DEFAULT_RETRY's for 30 s. ValidationError if a value is another.
    """

    strategy: str = "backoff"  # "none" tries once
    backoff: BackoffStrategy = BackoffStrategy()
    retry_connection_errors: Optional[bool] = None
    status_codes_override: Optional[Sequence[str]] = None

    def __post_init__(self) -> None:
        problems: Problems = []
        if self.strategy not in ("backoff", "none"):
            problems.append(("strategy", "must be 'backoff' or 'none'"))
        if not _is_a(BackoffStrategy, self.backoff):
            wanted = f"must be a BackoffStrategy, not {_shown(self.backoff)}"
            problems.append(("backoff", wanted))
        if type(self.retry_connection_errors) not in (bool, type(None)):
            wanted = "must be True, False or None"
            problems.append(("retry_connection_errors", wanted))
        statuses = self.status_codes_override
        if statuses is not None and not _is_list(statuses):
            wanted = f"must be a list, not {_shown(statuses)}"
            problems.append(("status_codes_override", wanted))
        elif statuses is not None:
            for n, status in enumerate(statuses):
                is_text = isinstance(status, str)
                if not is_text or not re.fullmatch("[1-5]([0-9]{2}|[Xx]{2})", status):
                    where = f"status_codes_override[{n}]"
                    problems.append((where, "must be text such as '429' or '5XX'"))
        if problems:
            raise ValidationError(problems)


def _is_a(cls: Any, value: Any) -> bool:
    """Whether it is of this class, or of what the class was before a reload."""
    return isinstance(value, cls) or repr(type(value)) == repr(cls)


# An agent run is not idempotent (RFC 9110, section 9.2.2), so only what failed before
# the agent ran: a request that did not leave completely, and 429, which says so. A
# gateway may answer 503 after the service has had the request.
DEFAULT_RETRY = RetryConfig(
    backoff=BackoffStrategy(
        initial_interval=500, max_interval=8_000, exponent=2, max_elapsed_time=30_000
    )
)


def _should_retry(
    error: Union[APIError, APIConnectionError], config: RetryConfig
) -> bool:
    wanted = config.retry_connection_errors
    if config.strategy == "none":
        return False
    if isinstance(error, APIConnectionError):
        if wanted is None:
            return error.temporary and not error.sent
        return error.temporary and wanted
    status = str(error.status_code)
    if status[0] == "2":  # the agent has run, and its run is paid for
        return False
    retried: Sequence[str] = ("429", "500", "502", "503", "504")
    if wanted is None:
        retried = ("429",)
    if config.status_codes_override is not None:
        retried = [chosen.upper() for chosen in config.status_codes_override]
    return status in retried or f"{status[0]}XX" in retried


def _asked_wait(headers: http.client.HTTPMessage) -> Optional[float]:
    """The seconds that the server asks for, where that makes sense."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        text = headers.get(name, "").strip()
        try:
            if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
                seconds = float(text) / unit
            else:  # a date is in GMT, said or not (RFC 9110, section 5.6.7)
                date = email.utils.parsedate_to_datetime(text)
                date = date.replace(tzinfo=datetime.timezone.utc)
                seconds = date.timestamp() - time.time()
        except (TypeError, ValueError, IndexError, OverflowError):
            continue  # no date either
        if 0.01 <= seconds <= MAX_WAIT_MS / 1000:
            return seconds
    return None


def _retry_wait(
    error: OrqError, config: RetryConfig, number: int, elapsed: float
) -> Optional[float]:
    """Seconds to wait after the failed attempt of this number, the first being 1.

    None if that wait would pass `max_elapsed_time`, `elapsed` seconds being over.
    """
    backoff = config.backoff
    seconds = _asked_wait(error.headers) if isinstance(error, APIError) else None
    if seconds is None:
        wait_ms = float(backoff.initial_interval)
        for _ in range(number - 1):
            wait_ms *= backoff.exponent  # a float grows to infinity, and never raises
        wait_ms += random.uniform(0, backoff.jitter_ms or 0)
        seconds = min(wait_ms, backoff.max_interval, MAX_WAIT_MS) / 1000
        if backoff.jitter_ms is None:
            seconds *= random.uniform(0.75, 1)
    return seconds if (elapsed + seconds) * 1000 <= backoff.max_elapsed_time else None


# --- Building a request -----------------------------------------------------

_HEADER_NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110, section 5.6.2
_OWN_HEADERS = ("Host", "Content-Length", "Transfer-Encoding", "Connection")
_UNSENDABLE = r"[^\x20-\x7e\xa0-\xff]"  # in a header's value: no latin-1, or a control


class _Hidden:
    """A value that nobody sees who shows or records the variables of a traceback."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hidden) and self.value == other.value

    def __repr__(self) -> str:
        return "'***'"


@dataclass(repr=False, eq=False)  # no repr, as it would show the body
class _Request:
    """A request that was checked and can be sent."""

    method: str
    url: str
    headers: Dict[str, str]  # all but the one with the key
    authorization: _Hidden  # the value of that one
    body: bytes
    seconds: float  # for one attempt
    retries: Optional[RetryConfig]

    def mask(self, text: str) -> str:
        """The text without the key: as it is, and as JSON and a URL write it."""
        for spelling in _spellings(self.authorization):
            if spelling.value:
                text = text.replace(spelling.value, "***")
        return text


def _spellings(authorization: _Hidden) -> Iterator[_Hidden]:
    words = _Hidden(authorization.value.split(None, 1) or [""])
    key = _Hidden(words.value[-1])
    yield key
    yield _Hidden(json.dumps(key.value)[1:-1])
    yield _Hidden(json.dumps(key.value)[1:-1].replace("/", r"\/"))
    yield _Hidden(json.dumps(key.value, ensure_ascii=False)[1:-1])
    for safe in ("/", ""):
        quoted = _Hidden(urllib.parse.quote(key.value, safe))
        yield quoted
        # some servers write %2f for %2F (RFC 3986, section 2.1)
        yield _Hidden(re.sub("%..", lambda match: match[0].lower(), quoted.value))


@functools.lru_cache(maxsize=16)
def _check_server_url(url: str) -> Tuple[str, str]:
    """(the URL in one spelling, without a slash at its end, or ""; what is wrong)."""
    scheme, _, rest = url.strip().partition("://")
    server, slash, path = rest.rstrip("/").partition("/")
    is_right = scheme.lower() in ("http", "https") and _is_server(server)
    if is_right and not re.search(r"[\s\\?#\x00-\x1f\x7f\ud800-\udfff]", path):
        path = urllib.parse.quote(slash + path, string.punctuation)
        return f"{scheme.lower()}://{server.lower()}{path}", ""
    if re.search(r"[^\x00-\x7f]", server):
        return "", "must have its host's name in ASCII, such as xn--bcher-kva.example"
    return "", "must be http(s)://HOST[:PORT][/PATH], without credentials or query"


def _is_server(server: str) -> bool:
    """Whether it is HOST or HOST:PORT, the host being a name or an address."""
    pattern = r"(?a)([\w.-]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?"
    match = re.fullmatch(pattern, server)
    if not match or not 0 < int(match[2] or 80) < 2**16:
        return False
    host = match[1]
    if host[0] != "[":
        return all(0 < len(label) < 64 for label in host.rstrip(".").split("."))
    try:
        return bool(socket.inet_pton(socket.AF_INET6, host[1:-1]))
    except OSError:
        return False


def _segment(name: str, value: Any, problems: Problems) -> str:
    """A parameter as one segment of a URL's path."""
    text = value if isinstance(value, str) else ""
    # the dots would leave the path; half of a surrogate pair has no UTF-8 form
    if text.strip() in ("", ".", "..") or re.search("[\ud800-\udfff]", text):
        problems.append((name, "must be a text, not empty, and not '.' or '..'"))
    return urllib.parse.quote(text, safe="", errors="replace")


def _authorization(api_key: _Hidden, problems: Problems) -> _Hidden:
    """The value of the Authorization header that stands for the key."""
    key = api_key
    if callable(key.value):
        key = _Hidden(key.value())
    elif key.value is None:
        key = _Hidden(os.environ.get("ORQ_API_KEY"))
    key = _Hidden(key.value if isinstance(key.value, str) else "")
    key = _Hidden(key.value.strip().lstrip("\ufeff").strip())  # a byte order mark
    unsendable = re.search(_UNSENDABLE, key.value)
    if key.value.lower() in ("", "bearer"):
        problems.append(
            ("api_key", "required: set ORQ_API_KEY (export ORQ_API_KEY=...)")
        )
    elif key.value[0] in "\"'" and key.value[-1] == key.value[0]:
        wrong = "is in quotes, as `docker --env-file` keeps them: remove them"
        problems.append(("api_key", wrong))
    elif unsendable:
        code, place = ord(unsendable[0]), unsendable.start() + 1
        wrong = f"cannot be sent: its character {place} is U+{code:04X}"
        problems.append(("api_key", wrong))
    has_scheme = key.value[:7].lower() == "bearer "
    return key if has_scheme else _Hidden(f"Bearer {key.value}")


def _check_headers(given: Any, problems: Problems) -> Dict[str, str]:
    """The caller's headers, by their names in the usual spelling."""
    headers: Dict[str, str] = {}
    if given is not None and not isinstance(given, abc.Mapping):
        problems.append(("http_headers", f"must be an object, not {_shown(given)}"))
        given = None
    for name, value in (given or {}).items():
        where = _at("http_headers", name)
        if not isinstance(name, str) or not re.fullmatch(_HEADER_NAME, name):
            problems.append((where, "is not a header's name"))
        elif name.title() in headers:
            problems.append((where, "given twice"))
        elif name.title() in _OWN_HEADERS:
            problems.append((where, "is set by the client"))
        elif not isinstance(value, str) or re.search(_UNSENDABLE, value.strip()):
            problems.append((where, "must be text in latin-1, on one line"))
        else:
            headers[name.title()] = value.strip()
    return headers


# --- Transport --------------------------------------------------------------
# urllib.request says which proxy to use, and its opener is where tools for tracing look
# in. The opener has the handler below alone, so that no other scheme exists, and no
# redirect is followed. http.client reads the answer. The connection is ours: its socket
# never blocks, and what has to be waited for is waited for in turns, between which a
# deadline, a cancelled task and Ctrl-C are noticed.

# A NAT forgets a silent connection after some minutes, and a peer that is gone is to be
# noticed in two: it is asked after a minute, then every 15 s, 4 times.
_KEEPALIVE = (
    ("TCP_KEEPIDLE", 60),
    ("TCP_KEEPALIVE", 60),  # what macOS calls the first
    ("TCP_KEEPINTVL", 15),
    ("TCP_KEEPCNT", 4),
)


class _TimeUp(Exception):
    """Our own deadline. No OSError, so that none of the system's is taken for it."""


class _CallEnded(Exception):
    """The task was cancelled for which a call was made."""


class _AnsweredEarly(Exception):
    """A server has answered (401, 413), and reads no more of the request."""


class _ProxyFault(OSError):
    """A proxy that cannot be used, or refused."""


class _Proxy(NamedTuple):
    host: str
    port: int
    authorization: _Hidden  # of "" if its URL has no user


def _now(clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds. Bound here as a default, the clock is not one that a test has patched.

    Libraries that freeze time replace the attributes of modules, and some of them
    time.monotonic itself.
    """
    return clock()


def _wait_until_ready(sock: Any, for_writing: bool, seconds: float) -> bool:
    """Whether a socket can be read from or written to, by then."""
    if hasattr(select, "poll"):  # not on Windows, nor under gevent
        poll = select.poll()  # select fails where a process has 1024 files open
        poll.register(sock, select.POLLOUT if for_writing else select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    sockets = [sock]
    if for_writing:
        return bool(select.select([], sockets, [], seconds)[1])
    return bool(select.select(sockets, [], [], seconds)[0])


class _Attempt(urllib.request.Request):
    """One try of a request, on its way through urllib's opener.

    Our own headers are not among its `headers`: what a wrapper of the opener adds there
    is sent too, and what it records does not hold the key.

    How far it came: `is_connected`; `has_left`, all of the request was given to the
    system; `is_accepted`, a 2XX began to come, whatever had left. With one of the last
    two, a POST counts as `sent`: the agent may have run.
    """

    def __init__(self, request: _Request, cancelled: Optional[threading.Event]) -> None:
        super().__init__(request.url, method=request.method)
        self.request = request
        self.proxy: Optional[_Proxy] = None
        self.answer: Optional[_Answer] = None
        self.failure: Optional[APIConnectionError] = None  # or why there is no answer
        self.is_connected = False
        self.has_left = False
        self.is_accepted = False
        self._cancelled = cancelled  # set by another thread, to end the call
        self._last = _now() + request.seconds
        self.allow(request.seconds, "no complete answer came")

    def allow(self, seconds: float, failure: str) -> None:
        """Bound what is done next, within what is left of the attempt."""
        self._seconds, self._failure = min(seconds, self.request.seconds), failure
        self._ends = min(_now() + seconds, self._last)

    def time_left(self) -> float:
        """Seconds for what is done now; raises if there are none, or the call ended."""
        left = self._ends - _now()
        if left <= 0:
            raise _TimeUp(f"{self._failure} within {self._seconds:g} s")
        if self._cancelled is not None and self._cancelled.is_set():
            raise _CallEnded()
        return left

    @property
    def sent(self) -> bool:
        """Whether the agent may have run. A GET runs none."""
        is_there = self.has_left or self.is_accepted
        return is_there and self.request.method == "POST"

    def head(self) -> bytes:
        """The request's line and headers (RFC 9112, sections 2 and 3)."""
        proxied = self.proxy is not None and self.type == "http"
        target = self.full_url if proxied else self.selector
        headers = dict(self.request.headers)
        fixed = (*_OWN_HEADERS, "Authorization")
        added = {k: v for k, v in self.header_items() if k.title() not in fixed}
        problems: Problems = []
        headers.update(
            _check_headers(added, problems)
        )  # a wrapper's, such as of traces
        if problems:
            raise ValidationError(problems)
        # no variable is the whole: it has the key, and a traceback may be recorded
        to_proxy = self.proxy.authorization if proxied and self.proxy else _Hidden("")
        lines = (f"{name}: {value}\r\n" for name, value in headers.items())
        key = self.request.authorization
        return (
            f"{self.request.method} {target} HTTP/1.1\r\n"
            f"{to_proxy.value}Authorization: {key.value}\r\n{''.join(lines)}\r\n"
        ).encode("latin-1")


class _Answer(http.client.HTTPResponse):
    """An answer, of which `content` was read; `problem` is what is wrong with it."""

    def __init__(self, connection: "_Connection", method: str) -> None:
        # what http.client asks of a socket, a connection has: makefile
        super().__init__(cast(Any, connection), method=method)
        self.content = bytearray()
        self.problem = ""
        self.is_whole = False
        self._offset = 0

    def read(self, amt: Optional[int] = None) -> bytes:
        """Give a wrapper of the opener the content, which we have read."""
        start = self._offset
        end = len(self.content) if amt is None or amt < 0 else start + amt
        self._offset = min(end, len(self.content))
        return bytes(self.content[start:end])

    def read_content(self) -> None:
        """Read and unpack the body. Raises if it breaks off; `content` is what came."""
        self._collect(self.read1)
        if self.length and not self.problem:  # at an early end, read1 just returns b""
            raise http.client.IncompleteRead(b"", self.length)
        if "gzip" in self.headers.get("content-encoding", "").lower():
            self._unpack()
        self.is_whole = not self.problem

    def _collect(self, read: Callable[[int], bytes]) -> None:
        block = read(BLOCK_BYTES)
        while block:
            self.content += block
            if len(self.content) > MAX_ANSWER_BYTES:
                self.content.clear()
                size = f"{MAX_ANSWER_BYTES >> 20} MiB"
                self.problem = f"the answer is larger than {size}"
                return
            block = read(BLOCK_BYTES)

    def _unpack(self) -> None:
        import gzip

        packed, self.content = self.content, bytearray()
        try:
            self._collect(gzip.GzipFile(fileobj=io.BytesIO(packed)).read1)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            if _is_of_a_signal(error):
                raise
            self.content = self.content or packed
            raise http.client.IncompleteRead(b"") from error

    def is_framed(self) -> bool:
        """Whether its end is beyond doubt, so another may follow (RFC 9112, 6.3)."""
        framings = self.headers.get_all("content-length", [])
        framings += self.headers.get_all("transfer-encoding", [])
        if self.will_close or not self.is_whole or self.headers.defects:
            return False
        if self.status in (101, 204, 304) or len(framings) != 1:
            return False
        return framings[0] == "chunked" or framings[0].isdigit()


class _Incoming(io.RawIOBase):
    """The bytes that a connection receives, as a file."""

    def __init__(self, connection: "_Connection") -> None:
        self._connection = connection
        self.at_end = False  # the peer has closed the connection
        self.ahead = bytearray()  # taken while a request was sent, not read yet

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> Optional[int]:
        connection = self._connection
        if connection.attempt is None:
            return None  # is_done looks at what is there, and reads nothing
        if self.ahead:
            count = min(len(buffer), len(self.ahead))
            buffer[:count] = self.ahead[:count]
            del self.ahead[:count]
            return count
        received: int = connection.in_turns(False, connection.sock.recv_into, buffer)
        self.at_end = not received
        return received

    def look_ahead(self) -> None:
        """Take what has come while a request is sent; `readinto` gives it out later."""
        try:
            self.ahead += self._connection.sock.recv(BLOCK_BYTES)
        except (BlockingIOError, ConnectionError, ssl.SSLError):
            pass  # nothing is there; if the connection is broken, sending says so

    def close(self) -> None:
        """Stay open, as this is no more than a view of the connection."""


class _Reader(io.BufferedReader):
    def close(self) -> None:
        """Stay open: http.client closes after an answer, but others may follow."""


class _Connection:
    """A connection, which serves one attempt at a time."""

    def __init__(self, route: Tuple[Any, ...]) -> None:
        self.route = route  # an attempt with an equal one may use it
        self.attempt: Optional[_Attempt] = None  # none, while it is idle
        self.is_sending = False
        self.sock: Any = None
        self._make_reader()

    def _make_reader(self) -> None:
        # one reader for all answers: what it has read of the next one is not lost
        self._incoming = _Incoming(self)
        self._reader = _Reader(self._incoming)

    def makefile(self, mode: str) -> io.BufferedReader:
        """Give http.client what it reads."""
        return self._reader

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()

    def in_turns(self, for_writing: bool, operation: Any, *arguments: Any) -> Any:
        """What an operation on the socket returns, which never blocks itself."""
        while True:
            left = cast(_Attempt, self.attempt).time_left()
            try:
                return operation(*arguments)
            except ssl.SSLWantReadError:
                writing = False
            except ssl.SSLWantWriteError:
                writing = True
            except BlockingIOError:
                writing = for_writing
            is_ready = _wait_until_ready(self.sock, writing, min(TURN_SECONDS, left))
            if self.is_sending and not is_ready and self._is_answered(b"2345"):
                raise _AnsweredEarly()

    def _is_answered(self, statuses: bytes) -> bool:
        """Whether a final answer has begun to come; those of 1XX are passed over."""
        self._incoming.look_ahead()
        ahead = self._incoming.ahead
        while ahead[9:10] == b"1" and b"\r\n\r\n" in ahead:
            del ahead[: ahead.index(b"\r\n\r\n") + 4]
        return len(ahead) > 9 and ahead[9] in statuses

    def send(self, view: memoryview) -> None:
        while view:
            view = view[self.in_turns(True, self.sock.send, view[:BLOCK_BYTES]) :]

    def connect(self, attempt: _Attempt, context: Optional[ssl.SSLContext]) -> None:
        """Connect; open a tunnel to a server behind a proxy; start TLS."""
        parts, proxy = urllib.parse.urlsplit(attempt.full_url), attempt.proxy
        host, port = parts.hostname or "", parts.port or (443 if context else 80)
        addresses = _look_up(proxy.host, proxy.port) if proxy else _look_up(host, port)
        attempt.allow(CONNECT_SECONDS, "no connection could be made")
        self.sock = _dial(addresses, attempt)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE:
            if hasattr(socket, name):  # each system has some of them
                option = getattr(socket, name)
                self.sock.setsockopt(socket.IPPROTO_TCP, option, value)
        if context:
            if proxy:
                server = parts.netloc if parts.port else f"{parts.netloc}:443"
                self._open_tunnel(server, proxy)
            self.sock = context.wrap_socket(
                self.sock, server_hostname=host, do_handshake_on_connect=False
            )
            self._make_reader()  # nothing from before TLS may be taken for what came in it
            self.in_turns(False, self.sock.do_handshake)
        attempt.allow(attempt.request.seconds, "no complete answer came")

    def _open_tunnel(self, server: str, proxy: _Proxy) -> None:
        """Ask the proxy for a tunnel (RFC 9110, section 9.3.6)."""
        start = f"CONNECT {server} HTTP/1.1\r\nHost: {server}\r\n"
        head = _Hidden(f"{start}{proxy.authorization.value}\r\n".encode("latin-1"))
        self.send(memoryview(head.value))
        status = self._read_head("CONNECT").status
        if not 200 <= status < 300:
            phrase = http.client.responses.get(status, "")
            raise _ProxyFault(f"the proxy refused with {status} {phrase}".rstrip())

    def _read_head(self, method: str) -> _Answer:
        """The start of the final answer (RFC 9110, section 15.2)."""
        while True:
            answer = _Answer(self, method)
            try:
                answer.begin()
            finally:  # its status comes first, even if its head breaks off
                is_2xx = str(answer.status).startswith("2")
                attempt = cast(_Attempt, self.attempt)
                attempt.is_accepted = is_2xx and method != "CONNECT"
            if self._incoming.at_end:  # http.client takes that for the end of a head
                raise http.client.IncompleteRead(b"")
            if answer.status == 101 or answer.status >= 200:
                return answer

    def exchange(self, attempt: _Attempt) -> _Answer:
        """Send the request, and return the answer."""
        body = attempt.request.body
        attempt.is_connected = True
        self.is_sending = True
        try:  # the start of the body in one packet with the head, if it fits
            self.send(memoryview(attempt.head() + body[:BLOCK_BYTES]))
            self.send(memoryview(body)[BLOCK_BYTES:])
            attempt.has_left = True
        except _TimeUp:
            attempt.is_accepted = self._is_answered(b"2")
            raise
        except (_AnsweredEarly, ConnectionError, ssl.SSLError):
            # A server may answer (401, 413) before it has all: read that, if it is there.
            # has_left stays false, so without a 2XX this does not count as sent.
            pass
        finally:
            self.is_sending = False
        answer = self._read_head(attempt.request.method)
        if attempt.is_accepted:
            answer.read_content()
            return answer
        attempt.allow(ERROR_BODY_SECONDS, "the answer did not end")
        try:
            answer.read_content()
        except (_TimeUp, OSError, http.client.HTTPException) as error:
            if _is_of_a_signal(error):
                raise
        return answer  # with its status, whatever came of its body

    def is_done(self) -> bool:
        """Whether all that was received has been read."""
        is_tls = isinstance(self.sock, ssl.SSLSocket)
        is_read = not self._reader.peek(1) and not self._incoming.ahead
        return is_read and not (is_tls and self.sock.pending())

    def is_quiet(self) -> bool:
        """Whether the peer has neither closed it nor sent anything unasked."""
        return not _wait_until_ready(self.sock, False, 0)


def _look_up(host: str, port: int) -> List[Any]:
    """The addresses of a host. This cannot be interrupted."""
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:  # of Python's IDNA codec
        raise socket.gaierror(socket.EAI_NONAME, "not a host's name") from None


def _dial(addresses: List[Any], attempt: _Attempt) -> socket.socket:
    """A socket connected to the address that answers first (RFC 8305).

    The two families take turns (section 4).
    """
    first = [address for address in addresses if address[0] == addresses[0][0]]
    others = [address for address in addresses if address[0] != addresses[0][0]]
    ordered = []
    while first or others:
        ordered += first[:1] + others[:1]
        first, others = first[1:], others[1:]
    with selectors.DefaultSelector() as selector:
        try:
            return _race(ordered, selector, attempt)
        finally:  # close the others
            for key in list(selector.get_map().values()):
                cast(socket.socket, key.fileobj).close()


def _race(addresses: List[Any], selector: Any, attempt: _Attempt) -> socket.socket:
    """Ask one more address in each turn, and as soon as one has failed (section 5)."""
    failure = OSError("no address found")
    while addresses or selector.get_map():
        if addresses:
            try:
                sock = _start_to_connect(addresses.pop(0))
            except OSError as error:  # such as of a family that is not to be had
                if _is_of_a_signal(error):
                    raise
                failure = error
                continue
            selector.register(sock, selectors.EVENT_WRITE)
        for key, _ in selector.select(min(ADDRESS_SECONDS, attempt.time_left())):
            sock = cast(socket.socket, key.fileobj)
            selector.unregister(sock)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if not code:
                return sock
            sock.close()
            failure = OSError(code, os.strerror(code))
    raise failure


def _start_to_connect(address: Any) -> socket.socket:
    family, sock_type, protocol, _, sock_address = address
    sock = socket.socket(family, sock_type, protocol)
    try:
        sock.setblocking(False)
        sock.connect(sock_address)
    except BlockingIOError:
        pass  # as a rule: the selector tells when it is connected
    except BaseException:
        sock.close()
        raise
    return sock


def _parse_proxy(url: str) -> _Proxy:
    """The proxy that a variable of the environment names."""
    kind, separator, rest = url.rpartition("://")
    # one of https:// is spoken to in plain HTTP, too, as urllib does
    if separator and kind.lower() not in ("http", "https"):
        kind = kind if re.fullmatch("[A-Za-z0-9+.-]+", kind) else "such"
        raise _ProxyFault(f"{kind} proxies cannot be used, only those of HTTP")
    fault = _ProxyFault("what the environment names is not the URL of an HTTP proxy")
    try:
        parts = urllib.parse.urlsplit(f"//{rest}")
        host, port = parts.hostname, parts.port or 80
    except ValueError:  # whose text may quote a password
        raise fault from None
    if not host:
        raise fault
    authorization = _Hidden("")
    if parts.username is not None:
        import base64

        user = urllib.parse.unquote(parts.username)
        pair = f"{user}:{urllib.parse.unquote(parts.password or '')}"
        encoded = base64.b64encode(pair.encode("utf-8", "surrogateescape")).decode()
        authorization = _Hidden(f"Proxy-Authorization: Basic {encoded}\r\n")
    return _Proxy(host, port, authorization)


def _make_tls_context() -> ssl.SSLContext:
    """A context with the platform's authorities, or those that the environment names.

    ValidationError, with the variable as its path, if these cannot be used.
    """
    try:
        context = ssl.create_default_context()
    except OSError as error:
        if isinstance(error, ssl.SSLError) or "SSLKEYLOGFILE" not in os.environ:
            raise
        raise _error_of_file("SSLKEYLOGFILE", error) from None
    # up to Python 3.9, the default is what the system allows
    context.minimum_version = max(context.minimum_version, ssl.TLSVersion.TLSv1_2)
    file = os.environ.get("SSL_CERT_FILE")
    directories = os.environ.get("SSL_CERT_DIR")
    if file or directories:
        # Python 3.13 asks for what the authorities of many companies lack, and one who
        # uses the command line has no other way out
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    try:
        if file:  # Python itself passes over one that it cannot read
            context.load_verify_locations(file)
    except ssl.SSLError:
        wrong = f"{file!r} holds no certificates in PEM"
        raise ValidationError([("SSL_CERT_FILE", wrong)]) from None
    except OSError as error:
        raise _error_of_file("SSL_CERT_FILE", error) from None
    if directories and not any(map(os.path.isdir, directories.split(os.pathsep))):
        wrong = f"{directories!r} names no directory that exists"
        raise ValidationError([("SSL_CERT_DIR", wrong)])
    return context


def _error_of_file(variable: str, error: OSError) -> Exception:
    """What it means that the file cannot be opened which a variable names."""
    if error.errno in (errno.EMFILE, errno.ENFILE) or _is_of_a_signal(error):
        return error  # no fault of the file
    wrong = f"{os.environ.get(variable)!r} cannot be used: {error.strerror}"
    return ValidationError([(variable, wrong)])


def _is_of_a_signal(error: Exception) -> bool:
    """Whether it is a time-out that a signal's handler raised, and so must pass.

    Our sockets have none; the system's own has ETIMEDOUT, on Windows 10060
    (socket.timeout is TimeoutError since Python 3.10).
    """
    is_time_out = isinstance(error, (TimeoutError, socket.timeout))
    return is_time_out and cast(OSError, error).errno not in (errno.ETIMEDOUT, 10060)


def _explain(error: Exception, attempt: _Attempt) -> Tuple[str, bool]:
    """(what went wrong, whether another attempt may do better)."""
    if isinstance(error, (_TimeUp, _ProxyFault)):
        return str(error), isinstance(error, _TimeUp)
    if isinstance(error, ssl.SSLCertVerificationError):
        return _explain_certificate(error), False
    if isinstance(error, ssl.SSLError):
        return _explain_tls(error, attempt.is_connected)
    if isinstance(error, socket.gaierror):
        host = attempt.proxy.host if attempt.proxy else attempt.host
        what = f"no address found for {host} ({error.strerror})"
        return what, error.errno == socket.EAI_AGAIN
    if isinstance(error, http.client.RemoteDisconnected):
        return "the connection was closed without an answer", True
    if isinstance(error, http.client.IncompleteRead):
        return "the answer broke off, or is damaged", True
    if isinstance(error, http.client.HTTPException):  # which may quote the server
        return f"what came is no HTTP answer ({type(error).__name__})", True
    return getattr(error, "strerror", None) or str(error), True


def _explain_certificate(error: ssl.SSLCertVerificationError) -> str:
    what = f"the server's certificate was not accepted: {error.verify_message}"
    # OpenSSL's X509_V_ERR_...: no issuer is found (2, 20, 21), or it is the server's
    # own (18, 19)
    if error.verify_code in (2, 18, 19, 20, 21):
        advice = "SSL_CERT_FILE to its certificate, or pass an ssl_context"
        what += f"; for an authority of your own, set {advice}"
    return what


def _explain_tls(error: ssl.SSLError, is_connected: bool) -> Tuple[str, bool]:
    """The same, for an error of TLS that is not about a certificate."""
    # OpenSSL's own words, such as "wrong version number"; Python 3.7 mistakes some of
    # the numbers of which it makes the `reason`
    words = re.sub(r"\[.*?\] |\(_ssl.*", "", str(error)).strip().lower()
    broken_off = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)
    if isinstance(error, broken_off) or "eof" in words or "internal error" in words:
        return "the TLS connection was broken off", True
    if "protocol" in words or "cipher" in words:
        what = "the server and this Python have no TLS version or cipher in common"
    elif "handshake failure" in words:
        what = "the server has no TLS cipher in common, or wants a certificate"
    elif words.startswith(("sslv3", "tlsv1", "ssl/tls")):  # what it says in an alert
        # which, in TLS 1.3, may come after the handshake
        what = "the server refused the TLS connection"
    elif is_connected:
        return f"the TLS connection failed ({words})", True
    else:
        what = "the server does not speak TLS on this port"
    return f"{what} ({words})", False


class _Handler(urllib.request.BaseHandler):
    """Performs attempts for urllib's opener, and keeps connections for the next ones."""

    def __init__(self, context: Optional[ssl.SSLContext]) -> None:
        self._proxies = urllib.request.getproxies()
        self._context = context  # given, or proven by a handshake
        self._new_context: Optional[ssl.SSLContext] = None  # not proven yet
        self._locks: Dict[int, threading.RLock] = {}  # by process, to make one
        # by when they were used last, the oldest first; who pops one has it, so that
        # neither threads nor a signal's handler need a lock
        self._idle: Dict[_Connection, float] = {}
        self._is_closed = False
        self._has_warned = False

    def add_parent(self, parent: Any) -> None:
        """Keep no reference to the opener, so that a dropped client is freed at once."""

    def http_open(self, attempt: _Attempt) -> _Answer:
        """The answer to an attempt. APIConnectionError if no complete one comes.

        What is raised here passes through the wrappers of the opener: it is masked.
        """
        try:
            attempt.answer = self._perform(attempt)
            return attempt.answer
        except (_TimeUp, OSError, http.client.HTTPException) as error:
            if _is_of_a_signal(error):
                raise
            what, temporary = _explain(error, attempt)
            is_late = isinstance(error, (_TimeUp, TimeoutError))
            cause = error if isinstance(error, OSError) else None
        if attempt.proxy:
            what += f" (proxy {attempt.proxy.host}:{attempt.proxy.port})"
        outcome = "not sent completely:" if attempt.is_connected else "not sent:"
        if attempt.sent:
            outcome = "the agent may have run, but"
        elif attempt.request.method == "GET":
            outcome = "no answer:"
        text = f"{attempt.request.method} {attempt.full_url}: {outcome} {what}"
        error_class = APITimeoutError if is_late else APIConnectionError
        failure = error_class(attempt.request.mask(text))
        failure.sent, failure.temporary = attempt.sent, temporary
        attempt.failure = failure
        _log.debug("%s", failure)
        # other causes quote what the server wrote, and a traceback shows them
        raise failure from cause

    https_open = http_open

    def _perform(self, attempt: _Attempt) -> _Answer:
        attempt.time_left()  # the task may have been cancelled during a wait
        attempt.proxy = self._find_proxy(attempt)
        self._warn_of_plain_http(attempt)
        # the process too, as the two sides of a fork may not share a connection
        route = (os.getpid(), attempt.type, attempt.host, attempt.proxy)
        connection = self._take(route) or _Connection(route)
        connection.attempt = attempt
        is_usable = False
        try:
            if connection.sock is None:
                self._connect(connection, attempt)
            answer = connection.exchange(attempt)
            connection.attempt = None
            is_over = attempt.has_left and answer.is_framed()
            is_usable = is_over and connection.is_done()
        finally:
            if is_usable:
                self._keep(connection)
            else:
                connection.close()
        if answer.status == 407 and attempt.proxy and attempt.type == "http":
            attempt.has_left = False  # for the server: the proxy has kept it
            raise _ProxyFault(
                "the proxy refused with 407 Proxy Authentication Required"
            )
        answer.url = attempt.full_url  # as urllib's own handlers do
        if _log.isEnabledFor(logging.DEBUG):
            url = attempt.request.mask(attempt.full_url)
            _log.debug("%s: %d", url, answer.status)
        return answer

    def _find_proxy(self, attempt: _Attempt) -> Optional[_Proxy]:
        url = self._proxies.get(attempt.type or "")
        if not url or urllib.request.proxy_bypass(attempt.host):
            return None
        return _parse_proxy(url)

    def _warn_of_plain_http(self, attempt: _Attempt) -> None:
        if attempt.type == "https" or self._has_warned:
            return
        hosts = [attempt.host, *([attempt.proxy.host] if attempt.proxy else [])]
        near = r"(localhost|127\.[0-9.]+|\[?::1\]?)(:[0-9]+)?"
        if not all(re.fullmatch(near, host) for host in hosts):
            self._has_warned = True
            _log.warning("the key goes in clear to http://%s", attempt.host)

    def _connect(self, connection: _Connection, attempt: _Attempt) -> None:
        if attempt.type == "http":
            return connection.connect(attempt, None)
        context = self._tls_context()
        try:
            connection.connect(attempt, context)
        except BaseException:
            # made by a process short of file descriptors, it has no authorities
            if self._new_context is context:
                self._new_context = None
            raise
        self._context = context

    def _tls_context(self) -> ssl.SSLContext:
        if self._context is not None:
            return self._context
        # Calls that start together share one. A fork may leave a parent's lock locked
        # for ever, and a signal's handler may make a call.
        with self._locks.setdefault(os.getpid(), threading.RLock()):
            if self._new_context is None:
                self._new_context = _make_tls_context()
            return self._new_context

    def _take(self, route: Tuple[Any, ...]) -> Optional[_Connection]:
        """The usable connection that was used last; those that are too old go."""
        oldest = _now() - IDLE_SECONDS
        kept = self._idle.copy()
        for connection in kept:
            if kept[connection] < oldest and self._claim(connection):
                connection.close()
        for connection in reversed(list(kept)):
            if connection.route == route and self._claim(connection):
                if connection.is_quiet():
                    return connection
                connection.close()
        return None

    def _claim(self, connection: _Connection) -> bool:
        return self._idle.pop(connection, None) is not None

    def _keep(self, connection: _Connection) -> None:
        self._idle[connection] = _now()
        self._keep_at_most(0 if self._is_closed else MAX_IDLE)

    def _keep_at_most(self, count: int) -> None:
        kept = list(self._idle)
        for connection in kept[: max(0, len(kept) - count)]:
            if self._claim(connection):
                connection.close()

    def close(self) -> None:
        """Close what is idle; what is in use is closed when its answer has come."""
        self._is_closed = True
        self._keep_at_most(0)

    __del__ = close


# --- Client -----------------------------------------------------------------


def _one_line(text: str) -> str:
    """A server's words, made safe for a terminal and a log."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _error_words(data: Any, status: int) -> Tuple[str, str]:
    """(the message in an error's JSON, the JSON of the details beside it)."""
    outer = data if isinstance(data, dict) else {}
    error = outer.get("error")
    inner = error if isinstance(error, dict) else {}
    message = outer.get("message") or (inner.get("message") if inner else error)
    words = _words(message) if message else ""
    beside = {**outer, **inner}
    if inner and "error" not in inner:
        del beside["error"]
    known = (None, message, status, http.client.responses.get(status))
    details = {name: beside[name] for name in beside if beside[name] not in known}
    return words, _json_text(details) if details else ""


def _told_by_headers(request: _Request, headers: http.client.HTTPMessage) -> str:
    """A request's id, and how long to wait."""
    names = ("x-request-id", "cf-ray", "retry-after")
    told = [(name, request.mask(headers[name])) for name in names if name in headers]
    return "".join(f" ({name}: {words[:100]})" for name, words in told)


def _target(location: str) -> str:
    """A redirect's target, without a user and password."""
    return re.sub(r"^([A-Za-z0-9+.-]+:[/\\]*|[/\\]{2,})[^/\\?#]*@", r"\1", location)


def _read_answer(
    request: _Request, answer: _Answer
) -> Union[CreateAgentResponseResponseBody, APIError]:
    """What the agent did, or an APIError if the answer is no usable 2XX."""
    body = answer.content.decode(json.detect_encoding(answer.content), "replace")
    data = _decode_json(body)
    problem = answer.problem
    if 200 <= answer.status < 300 and not problem:
        if isinstance(data, dict):
            return _decode_answer(data)
        problem = "the answer is not a JSON object that Python reads"
    location = answer.headers.get("location")
    if 300 <= answer.status < 400 and location:
        problem = f"redirect to {_target(location)} not followed; server_url can be set"
    words, details = _error_words(data, answer.status)
    said = request.mask(f"{words}: {details}" if words and details else words or body)
    shown = _one_line(said[:QUOTED_CHARACTERS])  # masked before a cut hides a key in it
    if len(said) > QUOTED_CHARACTERS:
        shown += f"... ({len(said)} characters)"
    phrase = http.client.responses.get(answer.status, "")
    what = f"{request.method} {request.url}: {answer.status} {phrase}".rstrip()
    text = ": ".join(filter(None, (what, problem, shown)))
    text += _told_by_headers(request, answer.headers)
    error = APIError(_one_line(request.mask(text)))
    error.status_code, error.headers = answer.status, answer.headers
    error.body, error.data = body, data
    error.message = request.mask(words) or phrase
    return error


async def _in_thread(work: Callable[[threading.Event], T]) -> T:
    """What work returns, in a daemon thread of its own; it is given what ends it.

    The event loop's executor has few threads, and a program's end waits for them.
    """
    import asyncio
    import concurrent.futures
    import contextvars

    cancelled = threading.Event()
    future: concurrent.futures.Future[T] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()  # it is ended by `cancelled` alone

    def run() -> None:
        try:
            future.set_result(work(cancelled))
        except StopIteration as error:  # before 3.12, the task would wait for ever
            future.set_exception(RuntimeError(repr(error)))
        except BaseException as error:  # noqa: BLE001 (the task raises it)
            future.set_exception(error)

    target = contextvars.copy_context().run
    threading.Thread(target=target, args=(run,), daemon=True).start()
    try:
        return await asyncio.wrap_future(future)
    finally:
        cancelled.set()


def _encode_extra(extra_body: Any, problems: Problems) -> Dict[str, Any]:
    """The fields that a caller adds to the body."""
    if extra_body is None:
        return {}
    if not isinstance(extra_body, abc.Mapping):
        wrong = f"must be an object, not {_shown(extra_body)}"
        problems.append(("extra_body", wrong))
        return {}
    extra: Dict[str, Any] = _encode_free(extra_body, "extra_body", problems)
    for name in extra:
        if name in _json_fields(_Body):
            problems.append((f"extra_body.{name}", "is a parameter of its own"))
    if extra.get("stream") not in (None, False):
        wrong = "is not possible: the answer could not be read"
        problems.append(("extra_body.stream", wrong))
    return extra


class _Settings(NamedTuple):
    """The parameters of a call that are not about the agent."""

    retries: Optional[RetryConfig]
    server_url: Optional[str]
    timeout_ms: Optional[float]
    http_headers: Optional[Mapping[str, str]]


class Responses:
    """The operation, as `orq.agents.responses`."""

    def __init__(
        self,
        handler: _Handler,
        api_key: _Hidden,
        server_url: Optional[str],
        timeout_ms: Optional[float],
        retry_config: Optional[RetryConfig],
    ) -> None:
        self._opener = urllib.request.OpenerDirector()
        self._opener.add_handler(handler)
        self._api_key = api_key
        self._server_url = server_url
        self._timeout_ms = timeout_ms
        self._retry_config = retry_config

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
        retries: Optional[RetryConfig] = UNSET,
        server_url: Optional[str] = None,
        timeout_ms: Optional[float] = None,
        http_headers: Optional[Mapping[str, str]] = None,
        extra_body: Optional[Mapping[str, Any]] = None,
    ) -> CreateAgentResponseResponseBody:
        """Send a message to an agent and return what the agent did.

        agent_key: the agent's key or id
        message: a text, an A2AMessage, or a mapping of that shape
        task_id: an inactive task to continue
        variables: any values, for the agent's templates
        identity: on whose behalf the agent runs
        contact: the same, by its older name
        thread: what groups requests
        memory: whose memories the agent uses
        metadata: any values, shown in the traces
        background: answer at once, and let the agent run on; see `get`
        retries: what to try again; None tries once (default: the client's)
        server_url: in place of the client's
        timeout_ms: milliseconds for each attempt, in place of the client's
        http_headers: to add, or to send in place of ours; Authorization, too, which
            the variables of a traceback then show
        extra_body: fields of the body that this file does not know

        Raises ValidationError before anything is sent, APIError for any answer but a
        usable 2XX, and APIConnectionError or APITimeoutError without one. A run that
        failed raises nothing: see `error` of what is returned.
        """
        # fmt: off
        request = self._prepare(
            agent_key=agent_key, message=message, task_id=task_id,
            variables=variables, identity=identity, contact=contact,
            thread=thread, memory=memory, metadata=metadata,
            background=background, retries=retries, server_url=server_url,
            timeout_ms=timeout_ms, http_headers=http_headers, extra_body=extra_body,
        )
        # fmt: on
        return self._run(request)

    async def create_async(
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
        retries: Optional[RetryConfig] = UNSET,
        server_url: Optional[str] = None,
        timeout_ms: Optional[float] = None,
        http_headers: Optional[Mapping[str, str]] = None,
        extra_body: Optional[Mapping[str, Any]] = None,
    ) -> CreateAgentResponseResponseBody:
        """Do what `create` does, without blocking the event loop.

        Each call takes a thread. Cancelling the task closes the connection; the agent
        may run on.
        """

        def work(cancelled: threading.Event) -> CreateAgentResponseResponseBody:
            # fmt: off
            request = self._prepare(
                agent_key=agent_key, message=message, task_id=task_id,
                variables=variables, identity=identity, contact=contact,
                thread=thread, memory=memory, metadata=metadata,
                background=background, retries=retries, server_url=server_url,
                timeout_ms=timeout_ms, http_headers=http_headers, extra_body=extra_body,
            )
            # fmt: on
            return self._run(request, cancelled)

        return await _in_thread(work)

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
        """Fetch what has come of a task, such as of a run in the background.

        Its `status` is "in_progress" until it has ended. The parameters and the errors
        are those of `create`; no agent is run, so `sent` is never true.
        """
        options = _Settings(retries, server_url, timeout_ms, http_headers)
        return self._run(self._prepare_get(agent_key, task_id, options))

    async def get_async(
        self,
        *,
        agent_key: str,
        task_id: str,
        retries: Optional[RetryConfig] = UNSET,
        server_url: Optional[str] = None,
        timeout_ms: Optional[float] = None,
        http_headers: Optional[Mapping[str, str]] = None,
    ) -> CreateAgentResponseResponseBody:
        """Do what `get` does, without blocking the event loop; see `create_async`."""
        options = _Settings(retries, server_url, timeout_ms, http_headers)

        def work(cancelled: threading.Event) -> CreateAgentResponseResponseBody:
            request = self._prepare_get(agent_key, task_id, options)
            return self._run(request, cancelled)

        return await _in_thread(work)

    def _prepare(
        self,
        *,
        agent_key: str,
        extra_body: Optional[Mapping[str, Any]] = None,
        retries: Optional[RetryConfig] = UNSET,
        server_url: Optional[str] = None,
        timeout_ms: Optional[float] = None,
        http_headers: Optional[Mapping[str, str]] = None,
        **fields_of_body: Any,
    ) -> _Request:
        """The request of `create`. Raises ValidationError."""
        problems: Problems = []
        body = _Body(**fields_of_body)
        if isinstance(body.message, str):
            part = {"kind": "text", "text": body.message}
            body.message = {"role": "user", "parts": [part]}
        content = _encode_object((_Body,), body, "", problems)
        if body.identity is not None and body.contact is not None:
            problems.append(("identity", "is the newer name of contact: give one"))
        content.update(_encode_extra(extra_body, problems))
        encoded = b"" if problems else _encode_json(content).encode("ascii")
        path = f"/v2/agents/{_segment('agent_key', agent_key, problems)}/responses"
        options = _Settings(retries, server_url, timeout_ms, http_headers)
        return self._prepare_request("POST", path, encoded, options, problems)

    def _prepare_get(
        self, agent_key: str, task_id: str, options: _Settings
    ) -> _Request:
        """The request of `get`. Raises ValidationError."""
        problems: Problems = []
        agent = _segment("agent_key", agent_key, problems)
        path = f"/v2/agents/{agent}/responses/{_segment('task_id', task_id, problems)}"
        return self._prepare_request("GET", path, b"", options, problems)

    def _prepare_request(
        self,
        method: str,
        path: str,
        body: bytes,
        options: _Settings,
        problems: Problems,
    ) -> _Request:
        """What the two have in common."""
        url = self._find_server(options.server_url, problems) + path
        seconds = self._find_timeout(options.timeout_ms, problems)
        config = self._retry_config if options.retries is UNSET else options.retries
        if config is not None and not _is_a(RetryConfig, config):
            wanted = f"must be a RetryConfig or None, not {_shown(config)}"
            problems.append(("retries", wanted))
        headers = {
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "User-Agent": f"orq_min/{__version__}",
        }
        if method == "POST":
            headers["Content-Type"] = "application/json"
        headers.update(_check_headers(options.http_headers, problems))
        headers["Host"] = urllib.parse.urlsplit(url).netloc
        if method == "POST":
            headers["Content-Length"] = str(len(body))
        if "Authorization" in headers:  # it stands for the key
            authorization = _Hidden(headers.pop("Authorization"))
        else:
            authorization = _authorization(self._api_key, problems)
        if problems:
            raise ValidationError(problems)
        return _Request(method, url, headers, authorization, body, seconds, config)

    def _find_server(self, server_url: Any, problems: Problems) -> str:
        server = self._server_url if server_url is None else server_url
        if server is None:
            server = os.environ.get("ORQ_BASE_URL", "").strip() or DEFAULT_SERVER
        url, wrong = _check_server_url(server if isinstance(server, str) else "")
        if wrong:
            problems.append(("server_url", wrong))
        return url

    def _find_timeout(self, timeout_ms: Any, problems: Problems) -> float:
        """Seconds."""
        timeout = self._timeout_ms if timeout_ms is None else timeout_ms
        timeout = DEFAULT_TIMEOUT_MS if timeout is None else timeout
        if type(timeout) in (int, float) and 0 < timeout <= MAX_WAIT_MS:
            return timeout / 1000
        wanted = f"must be a number of milliseconds above 0, up to {MAX_WAIT_MS}"
        problems.append(("timeout_ms", wanted))
        return 0

    def _run(
        self, request: _Request, cancelled: Optional[threading.Event] = None
    ) -> CreateAgentResponseResponseBody:
        """The answer of the first attempt that has one, or the last one's error."""
        config, number, elapsed, begun = request.retries, 0, 0.0, _now()
        # on Windows, Ctrl-C ends a sleep, but not the wait for an event
        pause: Callable[[float], Any] = cancelled.wait if cancelled else time.sleep
        while True:
            number, started = number + 1, _now()
            result = self._try(_Attempt(request, cancelled))
            if isinstance(result, CreateAgentResponseResponseBody):
                return result
            elapsed = max(elapsed + _now() - started, _now() - begun)
            seconds = None
            if config is not None and _should_retry(result, config):
                seconds = _retry_wait(result, config, number, elapsed)
            if seconds is None:
                raise result
            # an APIError's text quotes the body; an APIConnectionError's does not
            is_answer = isinstance(result, APIError)
            reason = f"status {result.status_code}" if is_answer else str(result)
            message = "attempt %d failed, next in %.1f s: %s"
            _log.warning(message, number, seconds, reason)
            pause(seconds)
            elapsed += seconds  # no clock tells of a sleep that a test has replaced

    def _try(
        self, attempt: _Attempt
    ) -> Union[CreateAgentResponseResponseBody, APIError, APIConnectionError]:
        """What one attempt brings. What another raises, such as a wrapper, passes."""
        try:
            self._opener.open(attempt)
        except APIConnectionError as error:
            if error is not attempt.failure:
                raise
            return error
        if attempt.answer is None:
            failure = APIConnectionError("a wrapper of urllib's opener gave no answer")
            failure.sent, failure.temporary = attempt.sent, False
            return attempt.failure or failure
        return _read_answer(attempt.request, attempt.answer)


class Agents:
    """The operations of `orq.agents`."""

    def __init__(self, responses: Responses) -> None:
        self.responses = responses


class Orq:
    """A client, which threads and tasks can share. Close it, or use `with`.

    api_key: a text, or a function that returns one (default: ORQ_API_KEY)
    server_url: (default: ORQ_BASE_URL, else https://my.orq.ai)
    timeout_ms: for each attempt, from connecting to the last byte, in
        milliseconds (default: 600000); nothing ends the look-up of a host's name
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
        hidden = api_key if isinstance(api_key, _Hidden) else _Hidden(api_key)
        del api_key  # or an error's traceback would show it
        if ssl_context is not None and not isinstance(ssl_context, ssl.SSLContext):
            raise ValidationError([("ssl_context", "must be an ssl.SSLContext")])
        if retry_config is UNSET:
            retry_config = DEFAULT_RETRY
        self._handler = _Handler(ssl_context)
        self.agents = Agents(
            Responses(self._handler, hidden, server_url, timeout_ms, retry_config)
        )

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
    task_id: Optional[str] = None,
    variables: Optional[Mapping[str, Any]] = None,
    identity: Union[Identity, Mapping[str, Any], None] = None,
    contact: Union[Contact, Mapping[str, Any], None] = None,
    thread: Union[CreateAgentResponseThread, Mapping[str, Any], None] = None,
    memory: Union[Memory, Mapping[str, Any], None] = None,
    metadata: Optional[Mapping[str, Any]] = None,
    background: Optional[bool] = False,
    retries: Optional[RetryConfig] = UNSET,
    server_url: Optional[str] = None,
    timeout_ms: Optional[float] = None,
    http_headers: Optional[Mapping[str, str]] = None,
    extra_body: Optional[Mapping[str, Any]] = None,
    api_key: Union[str, Callable[[], Optional[str]], None] = None,
    ssl_context: Optional[ssl.SSLContext] = None,
) -> CreateAgentResponseResponseBody:
    """Make one call, with a client of its own. See `Orq` and `Responses.create`."""
    hidden: Any = _Hidden(api_key)
    del api_key  # or an error's traceback would show it
    with Orq(hidden, ssl_context=ssl_context) as orq:
        # fmt: off
        return orq.agents.responses.create(
            agent_key=agent_key, message=message, task_id=task_id,
            variables=variables, identity=identity, contact=contact,
            thread=thread, memory=memory, metadata=metadata,
            background=background, retries=retries, server_url=server_url,
            timeout_ms=timeout_ms, http_headers=http_headers, extra_body=extra_body,
        )
        # fmt: on


# --- Command line -----------------------------------------------------------


def _fail(what: str, problem: str) -> NoReturn:
    raise ValidationError([(what, problem)])


def _print(stream: Any, text: str) -> None:
    """Print in any locale; what the stream, or a terminal, cannot show is escaped."""
    if stream is None:
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    if stream.isatty():  # which obeys them; a newline and a tab may pass
        controls = r"\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"
        text = re.sub(controls, lambda match: f"\\x{ord(match[0]):02x}", text)
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()
    except OSError:
        # what is still held back must not fail again when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise


def _say(text: str) -> None:
    """Print a line on standard error, whose failure changes nothing."""
    try:
        if sys.stderr is not None and sys.stderr.isatty():
            sys.stderr.write("\r")  # over the seconds that are shown there
        _print(sys.stderr, _one_line(f"orq_min: {text}"))
    except OSError:
        pass


class _LogHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _say(self.format(record))


def _add_options(parser: Any) -> None:
    add = parser.add_argument
    text = "the agent's key or id, and a text; '-' or none: standard input; '-' after"
    text += " a text: standard input as a second text"
    add("words", metavar="AGENT_KEY [MESSAGE] [-]", nargs="*", help=text)
    text = "attach a file ('-': standard input); may be repeated"
    add("--file", metavar="PATH|URL|-", action="append", default=[], help=text)
    text = "answer a tool call that waits; may be repeated"
    metavar = "CALL_ID=JSON|@FILE"
    add("--tool-result", metavar=metavar, action="append", default=[], help=text)
    text = "a whole message ('@-', here and below: JSON from standard input)"
    add("--message", metavar="JSON|@FILE", help=text)
    add("--task-id", metavar="ID", help="an inactive task to continue")
    metavar = "NAME=VALUE|JSON|@FILE"
    text = "for the agent's templates; may be repeated; a VALUE is text"
    add("--variables", metavar=metavar, action="append", help=text)
    text = "for the traces; may be repeated; a VALUE is text"
    add("--metadata", metavar=metavar, action="append", help=text)
    metavar = "ID|JSON|@FILE"
    add("--identity", metavar=metavar, help="on whose behalf the agent runs")
    add("--contact", metavar=metavar, help="the same, by its older name")
    add("--thread", metavar=metavar, help="what groups requests")
    add("--memory", metavar=metavar, help="whose memories the agent uses")
    text = "print the task's id, and let the agent run on"
    add("--background", action="store_true", help=text)
    text = "in place of a message: print the answer of a task, once it has ended"
    add("--wait", metavar="TASK_ID", help=text)
    add("--extra-body", metavar="JSON|@FILE", help="fields that this file lacks")
    add("--server-url", metavar="URL", help="in place of ORQ_BASE_URL")
    text = "for each attempt (600); with --wait, for all of the waiting (no end)"
    add("--timeout", metavar="SECONDS", type=float, help=text)
    either = parser.add_mutually_exclusive_group().add_argument
    text = "for an hour, whatever may help: the agent may run many times"
    either("--retry", action="store_true", help=text)
    either("--no-retry", action="store_true", help="try once")
    add("--json", action="store_true", help="print the whole answer, indented")
    add("--dry-run", action="store_true", help="print the request, and send nothing")
    text = "tell what happens; alone, print the version"
    add("-v", "--verbose", action="store_true", help=text)
    add("--version", action="version", version=f"orq_min {__version__}")


def _parse(argv: List[str]) -> Any:
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            _fail("usage", f"{_one_line(message)} (--help says more)")

    parser = Parser(
        prog="orq_min.py",
        usage="%(prog)s [options] AGENT_KEY [MESSAGE] [-]",
        description="Send a message to an Orq.ai agent and print what it says.",
        epilog="ORQ_API_KEY is the key, ORQ_BASE_URL the server. Exit status: 0"
        " answered, 1 an error of the service or a run that failed, 2 wrong usage or"
        " request, nothing sent, 3 no answer, 130 interrupted.",
        allow_abbrev=False,
    )
    _add_options(parser)
    # what follows "--" is no option; Python 3.13 changed what argparse makes of it
    end = argv.index("--") if "--" in argv else len(argv)
    options, unknown = parser.parse_known_intermixed_args(argv[:end])
    if unknown:
        known = re.findall("--[a-z-]+", parser.format_help())
        option = unknown[0].partition("=")[0]
        close = _closest(option, known)
        parser.error(f"unknown option {option}{close and f', did you mean {close}?'}")
    words = [_recode(word) for word in options.words + argv[end + 1 :]]
    if not words and argv not in (["-v"], ["--verbose"]):
        parser.error("AGENT_KEY is missing: first the agent's key, then a message")
    if len(words) > 3 or (len(words) == 3 and words[2] != "-"):
        parser.error("one MESSAGE is wanted, in quotes; only '-' may follow it")
    options.agent_key = words[0] if words else None
    options.text = words[1] if len(words) > 1 else None
    options.has_second = len(words) == 3
    return options


def _recode(word: str) -> str:
    """UTF-8 text that Python took for another encoding, as in an ASCII locale."""
    if re.search("[\udc80-\udcff]", word):
        return os.fsencode(word).decode("utf-8", "surrogateescape")
    return word


class _Stdin:
    """Standard input, which can be read once."""

    EMPTY = "standard input is empty: give a text, or pipe one in (--help says more)"

    def __init__(self) -> None:
        self._reader = ""  # what has read it

    def read(self, reader: str) -> bytes:
        """All of it. It is refused if it is empty, as an empty diff costs a run too."""
        if self._reader:
            both = f"{self._reader} and {reader}"
            _fail("usage", f"standard input can be read once, not for {both}")
        self._reader = reader
        if sys.stdin is None or sys.stdin.isatty():
            _fail(reader, "is missing: give a text, or pipe one in (--help says more)")
        try:
            content = getattr(sys.stdin, "buffer", sys.stdin).read()
        except OSError as error:
            _fail(reader, f"cannot read standard input: {error.strerror}")
        content = content.encode() if isinstance(content, str) else content
        if not content.strip():
            _fail(reader, self.EMPTY)
        return cast(bytes, content)

    def read_text(self, reader: str) -> str:
        text = _to_text(self.read(reader), "standard input")
        if not text.strip():
            _fail(reader, self.EMPTY)
        return re.sub(r"\r?\n\Z", "", text)


def _to_text(content: bytes, source: str) -> str:
    """Text in UTF-8, or in UTF-16 as PowerShell writes it."""
    is_utf_16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    try:
        return content.decode("utf-16" if is_utf_16 else "utf-8-sig")
    except UnicodeDecodeError:
        _fail(source, "is not text in UTF-8 or UTF-16")


_JSON_OR_FILE = r"@|\s*[{[]"  # how an option begins that is not just a word


def _json_option(option: str, text: Optional[str], stdin: _Stdin) -> Any:
    """JSON text, or what @FILE holds."""
    if text is None:
        return None
    source = ""
    if text == "@-":
        source, content = "standard input ", stdin.read_text(option)
    elif text.startswith("@"):
        source = f"{text[1:]!r} "
        content = _to_text(_read_file(option, text[1:]), f"{option}: {text[1:]!r}")
    else:
        content = _recode(text)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        _fail(option, f"{source}is not JSON: {error}")


def _read_file(option: str, path: str) -> bytes:
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except OSError as error:
        _fail(option, f"cannot read {path!r}: {error.strerror}")


def _id_option(option: str, text: Optional[str], name: str, stdin: _Stdin) -> Any:
    """An object; a word is its id."""
    if text is None or re.match(_JSON_OR_FILE, text):
        return _json_option(option, text, stdin)
    if not text:
        _fail(option, "is empty")
    return {name: _recode(text)}


def _pairs_option(option: str, texts: Optional[List[str]], stdin: _Stdin) -> Any:
    """What all that was given for the option holds together."""
    if texts is None:
        return None
    merged: Dict[str, Any] = {}
    for text in texts:
        name, equals, value = _recode(text).partition("=")
        is_json = re.match(_JSON_OR_FILE, text)
        if not equals and not is_json:
            _fail(option, f"{text!r} is neither NAME=VALUE nor JSON nor @FILE")
        pairs = _json_option(option, text, stdin) if is_json else {name: value}
        if not isinstance(pairs, dict):
            _fail(option, "must be an object")
        for name in pairs:
            if name in merged:
                _fail(option, f"{name!r} is given twice")
        merged.update(pairs)
    return merged


def _tool_result(text: str, stdin: _Stdin) -> ToolResultPart:
    call_id, _, result = text.partition("=")
    while result.startswith("="):  # an id may end so (base64), and no JSON begins so
        call_id, result = f"{call_id}=", result[1:]
    if not call_id:
        _fail("--tool-result", f"{text!r} is not CALL_ID=JSON")
    content = _json_option("--tool-result", result, stdin)
    return ToolResultPart(_recode(call_id), content)


def _attachment(place: str, stdin: _Stdin) -> FilePart:
    if place == "-":
        return FilePart.from_bytes(stdin.read("--file"), "stdin")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", place):
        return FilePart.from_uri(place)
    content = _read_file("--file", place)
    if not content:
        _fail("--file", f"{place!r} is empty")
    return FilePart.from_bytes(content, os.path.basename(place))


def _read_message(options: Any, stdin: _Stdin) -> Any:
    """What MESSAGE, --message, --file, --tool-result and standard input say."""
    is_whole, is_tool = options.message is not None, options.tool_result != []
    is_user = options.text is not None or options.file != []
    if is_whole + is_tool + is_user > 1:
        _fail("usage", "give one: --message, --tool-result, or MESSAGE and --file")
    if is_whole:
        return _json_option("--message", options.message, stdin)
    if is_tool:
        results = [_tool_result(given, stdin) for given in options.tool_result]
        return A2AMessage("tool", results)
    texts = [] if options.text is None else [options.text]
    if texts == ["-"] or not is_user:
        texts = [stdin.read_text("MESSAGE")]
    if options.has_second:
        texts.append(stdin.read_text("the second text"))
    if "" in map(str.strip, texts):
        _fail("MESSAGE", "must not be empty (--help says more)")
    files = [_attachment(place, stdin) for place in options.file]
    return A2AMessage("user", [*map(TextPart, texts), *files])


def _read_call(options: Any) -> Dict[str, Any]:
    """The parameters of `create` that the options stand for."""
    stdin = _Stdin()
    if options.task_id == "":
        _fail("--task-id", "is empty: give the task_id of an earlier answer")
    retries = RetryConfig(retry_connection_errors=True) if options.retry else UNSET
    return {
        "agent_key": options.agent_key,
        "message": _read_message(options, stdin),
        "task_id": None if options.task_id is None else _recode(options.task_id),
        "variables": _pairs_option("--variables", options.variables, stdin),
        "identity": _id_option("--identity", options.identity, "id", stdin),
        "contact": _id_option("--contact", options.contact, "id", stdin),
        "thread": _id_option("--thread", options.thread, "id", stdin),
        "memory": _id_option("--memory", options.memory, "entity_id", stdin),
        "metadata": _pairs_option("--metadata", options.metadata, stdin),
        "background": options.background,
        "extra_body": _json_option("--extra-body", options.extra_body, stdin),
        "retries": None if options.no_retry else retries,
        "server_url": options.server_url,
        "timeout_ms": None if options.timeout is None else options.timeout * 1000,
    }


def _check_wait(options: Any) -> None:
    """Refuse what says something about a message beside --wait."""
    if options.wait == "":
        _fail("--wait", "is empty: give the task's id, which --background prints")
    others = "text file tool_result message task_id variables metadata identity contact"
    others += " thread memory background extra_body retry no_retry dry_run"
    for name in others.split():
        if getattr(options, name) not in (None, [], False):
            option = f"--{name.replace('_', '-')}" if name != "text" else "MESSAGE"
            _fail("usage", f"{option} does not go with --wait")


def _wait_for(responses: Responses, options: Any) -> CreateAgentResponseResponseBody:
    """The answer of a task, asked for until it has ended."""
    limit = float("inf") if options.timeout is None else options.timeout
    elapsed, failure = 0.0, ""
    while elapsed < limit:
        started, last_failure = _now(), failure
        res, failure, asked = _ask(responses, options, min(30.0, limit - elapsed))
        if res is not None:
            return res
        if failure and not last_failure:
            _log.warning("asking again, after %s", failure)
        elapsed += _now() - started
        pause = max(1.0 if elapsed < 30 else 5.0, asked)
        pause = max(0.0, min(pause, limit - elapsed))
        time.sleep(pause)
        elapsed += pause
    text = f"task {options.wait} has not ended within {limit:g} s {failure}"
    raise APITimeoutError(text.rstrip())


def _ask(
    responses: Responses, options: Any, seconds: float
) -> Tuple[Optional[CreateAgentResponseResponseBody], str, float]:
    """(the answer, or None if there is none yet; why; seconds to wait at least)."""
    try:
        res = responses.get(
            agent_key=options.agent_key,
            task_id=_recode(options.wait),
            retries=None,
            server_url=options.server_url,
            timeout_ms=1000 * seconds,
        )
    except APIConnectionError as error:
        if not error.temporary:
            raise
        return None, f"({error})", 0
    except APIError as error:
        if error.status_code not in (429, 502, 503, 504):
            raise
        failure = f"(status {error.status_code})"
        return None, failure, min(_asked_wait(error.headers) or 0, 60)
    runs_on = res.status in ("in_progress", "submitted", "working")
    return (None if runs_on else res), "", 0


def _print_answer(res: CreateAgentResponseResponseBody, options: Any) -> int:
    """Print an answer, and what there is to say of it; return the exit status."""
    text = str(res.task_id or "") if options.background else res.text
    if options.json:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        ensure_ascii = not encoding.lower().startswith("utf")
        try:
            text = json.dumps(res.raw, indent=2, ensure_ascii=ensure_ascii)
        except RecursionError:  # Python 3.12 reads deeper than it indents
            text = json.dumps(res.raw, ensure_ascii=ensure_ascii)
    status = 1 if res.error else 0
    try:
        if text:
            _print(sys.stdout, text)
    except BrokenPipeError:
        pass  # `| head -1` has seen enough
    except OSError as error:
        of_task = f" of task {res.task_id}" if res.task_id else ""
        _say(f"cannot print the answer{of_task}: {error.strerror}")
        status = 1
    for line in _notes(res, options):
        _say(line)
    return status


# The finish_reason of an answer that a limit cut.
_CUT = ("length", "max_iterations", "max_time", "content_filter")


def _notes(res: CreateAgentResponseResponseBody, options: Any) -> Iterator[str]:
    """What standard error says beside an answer."""
    if res.error:
        yield f"the run failed: {res.error}"
    if res.finish_reason in _CUT:
        yield f"the answer was cut (finish_reason: {res.finish_reason})"
    yield from _next_steps(res, options.background)
    is_told = res.text or res.error or res.pending_tool_calls
    if options.background and not (res.task_id or res.error):
        yield "the answer has no task id (--json shows all of it)"
    elif not (is_told or options.json or options.background):
        yield "the answer has no text (--json shows all of it)"


def _next_steps(
    res: CreateAgentResponseResponseBody, background: bool
) -> Iterator[str]:
    """The options that answer the tool calls that wait, or go on with the task."""
    import shlex

    task_id = res.task_id if isinstance(res.task_id, str) else ""
    task = f"--task-id={shlex.quote(task_id)}" if task_id else ""
    for call in _all_of(PendingToolCalls, res.pending_tool_calls):
        function = call.function if isinstance(call.function, Function) else Function()
        asked = f"{function.name}({function.arguments})"
        reply = f"--tool-result={shlex.quote(f'{call.id}=JSON')}"
        yield f"{asked} waits for its result: {task} {reply}"
    if task and sys.stderr is not None and sys.stderr.isatty():
        fetch = f"fetch its answer with --wait={shlex.quote(task_id)}"
        runs_on = background and not res.error
        yield fetch if runs_on else f"continue with {task}"


def _show_seconds(done: threading.Event) -> None:
    """Show the seconds that pass, if a terminal is there, and then nothing of them."""
    if sys.stderr is None or not sys.stderr.isatty():
        return
    started, shown = _now(), ""
    try:
        while not done.wait(1):
            shown = f"{_now() - started:.0f} s"
            sys.stderr.write(f"\r{shown}")
            sys.stderr.flush()
        sys.stderr.write(f"\r{' ' * len(shown)}\r" if shown else "")
        sys.stderr.flush()
    except OSError:
        pass


def _run_command(options: Any) -> int:
    if options.agent_key is None:
        _print(sys.stdout, f"orq_min {__version__}")
        return 0
    if options.timeout is not None and not 0 < options.timeout <= MAX_WAIT_MS / 1000:
        _fail("--timeout", "must be a number of seconds above 0")
    if options.wait is not None:
        _check_wait(options)
    call = _read_call(options) if options.wait is None else {}
    with Orq("***" if options.dry_run else None) as orq:
        responses = orq.agents.responses
        if options.dry_run:
            request = responses._prepare(**call)
            lines = [f"{request.method} {request.url}"]
            lines += [f"Authorization: {request.authorization.value}"]
            lines += [f"{name}: {value}" for name, value in request.headers.items()]
            _print(sys.stdout, "\n".join([*lines, "", request.body.decode()]))
            return 0
        done, is_wait = threading.Event(), options.wait is not None
        clock = threading.Thread(target=_show_seconds, args=(done,), daemon=True)
        clock.start()
        try:
            res = _wait_for(responses, options) if is_wait else responses.create(**call)
        except KeyboardInterrupt:
            if not is_wait:
                _say("interrupted; the agent may run on")
            raise
        finally:
            done.set()
            clock.join()
    return _print_answer(res, options)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; return its exit status."""
    log_handler, level = _LogHandler(), _log.level
    _log.addHandler(log_handler)
    try:
        options = _parse(list(sys.argv[1:] if argv is None else argv))
        _log.setLevel(logging.DEBUG if options.verbose else logging.INFO)
        return _run_command(options)
    except OrqError as error:
        _say(str(error))
        if isinstance(error, ValidationError):
            return 2
        return 1 if isinstance(error, APIError) else 3
    except BrokenPipeError:  # of standard output
        return 0
    except OSError as error:
        _say(f"cannot print: {error.strerror}")
        return 1
    except RecursionError:  # PyPy reads deeper than it writes
        _say("cannot print: the answer is nested too deeply")
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        _log.removeHandler(log_handler)
        _log.setLevel(level)


if __name__ == "__main__":
    status = main()
    if status == 130 and os.name == "posix":  # die of it, which ends a loop around it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    sys.exit(status)

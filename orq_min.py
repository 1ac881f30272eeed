# SPDX-License-Identifier: MIT-0
# orq_min.py 1.0.0: Orq.ai's create-response operation in one file.
# ruff: noqa: I001, RUF009, UP006, UP007, UP017, UP035, UP041, UP045 (it runs on Python 3.7)
"""Send a message to an Orq.ai agent and get back what it did.

One file, Python 3.7 or newer, the standard library alone: copy it and import it.

    from orq_min import Orq

    with Orq() as orq:  # the key is in ORQ_API_KEY
        res = orq.agents.responses.create(agent_key="my-agent", message="Hello")
        print(res.text, res.task_id)

A quick script needs one line, `create_response("my-agent", "Hello").text`; a
program on asyncio awaits `create_async`; a shell runs `python3 orq_min.py --help`.

What goes out is checked first: all that is wrong is said at once, by its path, and
nothing is sent. What comes back is kept: a 200 that holds a JSON object is never
refused for what it lacks. An agent run costs money and is not idempotent, so by
default only what did not leave whole, 429 and 503 are retried.

    OrqError                 base of every error of this module
      ValidationError        the call is wrong; nothing was sent (a ValueError too)
      APIError               the server answered, and not with a usable 200
      APIConnectionError     no complete answer came
        APITimeoutError      ... in time

Environment: ORQ_API_KEY, ORQ_BASE_URL, the proxy variables that urllib reads, and
those of Python's ssl: SSL_CERT_FILE, SSL_CERT_DIR, SSLKEYLOGFILE. Logger: this
module's name; each retry is logged at INFO, each attempt at DEBUG, never with a
header or a body.
"""

import datetime
import email.utils
import enum
import functools
import http.client
import inspect
import io
import json
import logging
import math
import os
import random
import re
import socket
import string
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections import abc
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, NamedTuple
from typing import Optional, Sequence, Tuple, Type, TypeVar, Union, cast

if TYPE_CHECKING:  # what Python 3.7 lacks, or a call may not need
    import argparse
    from ssl import SSLContext as _SSLContext
    from typing import Concatenate, Hashable, NoReturn, ParamSpec, Self

    P = ParamSpec("P")
else:
    _SSLContext = Any  # no text, for which dataclasses needs this module in sys.modules

# --- Constants --------------------------------------------------------------

__version__ = "1.0.0"

DEFAULT_SERVER = "https://my.orq.ai"
DEFAULT_TIMEOUT_MS = 600_000
MAX_TIMEOUT_MS = 2**31 - 1  # poll takes milliseconds as an int; waits are bounded too
MAX_ANSWER_BYTES = 256 * 2**20
MAX_REDIRECTS = 5
MAX_NESTING = 100  # levels of a free-form value; json gives up near 1000
MAX_NUMBER = sys.float_info.max
MAX_INTEGER_DIGITS = 640  # Python may be set to refuse more, not fewer (gh-95778)
IDLE_SECONDS = 4.0  # many servers close an idle connection after 5
KEEPALIVE_SECONDS = 60  # a NAT forgets a silent connection after some minutes
BLOCK_BYTES = 64 * 2**10  # read or sent at once
QUOTED_CHARACTERS = 500  # of a server's words in the text of an error

T = TypeVar("T")
Problems = List[Tuple[str, str]]  # (path, what is wrong there)

_log = logging.getLogger(__name__)


class _Unset:
    def __repr__(self) -> str:
        return "UNSET"


UNSET: Any = _Unset()  # "not given", for a parameter to which None means something

# --- Errors -----------------------------------------------------------------
# Each takes its text as the first argument, and needs no other to be built: that is
# how pickle and copy build it before they restore its attributes.


class OrqError(Exception):
    """Base of every error of this module."""


class ValidationError(OrqError, ValueError):
    """The call is wrong, and nothing was sent.

    `errors`: a list of (path, problem), one for each thing that is wrong.
    """

    def __init__(self, errors: Problems) -> None:
        super().__init__(errors)
        self.errors = errors

    def __str__(self) -> str:
        return "; ".join(f"{path}: {problem}" for path, problem in self.errors)


class APIError(OrqError):
    """The server answered, and not with a usable 200.

    `status_code`; `headers`, by names whose case does not matter; `body`, the text
    as it came; `data`, its decoded JSON or None; `message`, the server's own words
    where its JSON holds them, else the standard phrase for the status.
    """

    status_code: int = 0
    headers: http.client.HTTPMessage = http.client.HTTPMessage()
    body: str = ""
    data: Any = None
    message: str = ""


class APIConnectionError(OrqError):
    """No complete answer came.

    `sent`: the whole request had left, so the agent may have run.
    `temporary`: another attempt may do better.
    """

    sent: bool = False
    temporary: bool = True


class APITimeoutError(APIConnectionError):
    """No complete answer came in time."""


# --- Request types ----------------------------------------------------------
# A field is declared once: its type, one line about it, its JSON name where that
# differs, and a check where the type does not say all. Checking, JSON, docstrings and
# the command line's options follow. The rules are those of the service's published
# schema (operation CreateAgentResponse).


_Check = Optional[Callable[[Any], str]]  # returns what is wrong with a value, or ""


def _about(text: str, json_name: Optional[str] = "", check: _Check = None) -> Any:
    """A field's metadata; its JSON name is its own where "", and None outside JSON."""
    return {"about": text, "json_name": json_name, "check": check}


def _optional(
    about: str, json_name: Optional[str] = "", check: _Check = None, default: Any = None
) -> Any:
    return field(default=default, metadata=_about(about, json_name, check))


def _one_of(*choices: str) -> Callable[[Any], str]:
    problem = "must be " + " or ".join(map(repr, choices))
    return lambda value: "" if value in choices else problem


def _kind(name: str) -> Any:
    return _optional(f"always {name!r}", check=_one_of(name), default=name)


def _base64_problem(value: str) -> str:
    """What is surely no base64; the padding is the service's to judge."""
    alphabet = string.ascii_letters + string.digits + "+/=-_\r\n"
    # translate, as a regular expression takes a second for a large file
    if value.encode("utf-8", "replace").translate(None, alphabet.encode()):
        return "must be base64 text (FilePart.from_path makes it of a file)"
    return "" if value.strip() else "must not be empty"


class _Declared:
    """Base of the dataclasses: completes the docstring from the fields."""

    def __init_subclass__(cls) -> None:
        lines = [cls.__doc__ or cls.__name__, ""]
        for name, value in vars(cls).items():  # before @dataclass replaces them
            if isinstance(value, Field) and value.metadata:
                lines.append(f"    {name}: {value.metadata['about']}")
        cls.__doc__ = "\n".join(lines)


class _Checked(_Declared):
    """Base of the dataclasses whose values are checked when one is built."""

    def __post_init__(self) -> None:
        # to check is to encode; see the section "Checking and JSON"
        problems: Problems = []
        _encode_object((type(self),), self, "", problems)
        if problems:
            raise ValidationError(problems)


@dataclass
class TextPart(_Checked):
    text: str = field(metadata=_about("the text"))
    kind: str = _kind("text")


@dataclass
class BinaryFormat(_Checked):
    """The content of a file."""

    bytes_: str = field(metadata=_about("base64 text", "bytes", _base64_problem))
    mime_type: Optional[str] = _optional("MIME type", "mimeType")
    name: Optional[str] = _optional("name of the file")


@dataclass
class FileInURIFormat(_Checked):
    """Where the content of a file is to be had."""

    uri: str = field(metadata=_about("URL of the content"))
    mime_type: Optional[str] = _optional("MIME type", "mimeType")
    name: Optional[str] = _optional("name of the file")


FileContent = Union[BinaryFormat, FileInURIFormat, Mapping[str, Any]]


def _guess_mime_type(name: str) -> Optional[str]:
    import mimetypes

    mime_type, encoding = mimetypes.guess_type(name)
    if encoding:  # what is sent of report.tar.gz is a gzip file
        return "application/gzip" if encoding == "gzip" else None
    return mime_type


@dataclass
class FilePart(_Checked):
    """A file. `from_path` and `from_uri` build one, with the MIME type guessed."""

    file: FileContent = field(metadata=_about("the content, or where it is to be had"))
    metadata: Optional[Mapping[str, Any]] = _optional("any values")
    kind: str = _kind("file")

    @classmethod
    def from_path(cls, path: "Union[str, os.PathLike[str]]") -> "FilePart":
        """Attach a file that is read now. OSError if it can't be."""
        import base64

        with open(path, "rb") as stream:
            text = base64.b64encode(stream.read()).decode("ascii")
        if not text:
            raise ValidationError([("path", f"{os.fspath(path)!r} is empty")])
        name = os.path.basename(os.fspath(path))
        return cls(BinaryFormat(text, _guess_mime_type(name), name))

    @classmethod
    def from_uri(cls, uri: str) -> "FilePart":
        """Attach a file that the service fetches."""
        path = re.split("[?#]", uri)[0] if isinstance(uri, str) else ""
        return cls(FileInURIFormat(uri, _guess_mime_type(path.rpartition("/")[2])))


@dataclass
class ToolResultPart(_Checked):
    """The result of a tool call that the agent waits for."""

    tool_call_id: str = field(metadata=_about("id of the pending tool call"))
    result: Any = _optional("any JSON value")
    metadata: Optional[Mapping[str, Any]] = _optional("any values")
    kind: str = _kind("tool_result")


InputPart = Union[TextPart, FilePart, ToolResultPart, Mapping[str, Any]]


@dataclass
class A2AMessage(_Checked):
    """A message to the agent."""

    role: str = field(
        metadata=_about("'tool' for tool results", check=_one_of("user", "tool"))
    )
    parts: Sequence[InputPart] = field(metadata=_about("the parts; there may be none"))
    message_id: Optional[str] = _optional("a ULID", "messageId")


@dataclass
class Contact(_Checked):
    """On whose behalf the agent runs. The service makes one that it doesn't know."""

    id: str = field(metadata=_about("the contact's id"))
    display_name: Optional[str] = _optional("name to show")
    email: Optional[str] = _optional("e-mail address")
    metadata: Optional[Sequence[Mapping[str, Any]]] = _optional("any objects")
    logo_url: Optional[str] = _optional("URL of a picture")
    tags: Optional[Sequence[str]] = _optional("any texts")


@dataclass
class CreateAgentResponseThread(_Checked):
    """What groups requests that belong together."""

    id: str = field(metadata=_about("the thread's id"))
    tags: Optional[Sequence[str]] = _optional("any texts")


@dataclass
class Memory(_Checked):
    """Whose memories the agent uses."""

    entity_id: str = field(metadata=_about("id of a user, a session or the like"))


MessageLike = Union[A2AMessage, Mapping[str, Any]]
ContactLike = Union[Contact, Mapping[str, Any]]
ThreadLike = Union[CreateAgentResponseThread, Mapping[str, Any]]
MemoryLike = Union[Memory, Mapping[str, Any]]

# --- Answer types -----------------------------------------------------------
# The annotations are what the schema promises. What comes is not checked but kept:
# a field that did not come is None, one of another type stays as it came, and one
# that is unknown here becomes an attribute of its name if that is free, and does not
# begin with "_"; it is in `raw` in any case.


@dataclass
class DataPart(_Declared):
    data: Dict[str, Any] = field(metadata=_about("any values"))
    metadata: Optional[Dict[str, Any]] = _optional("any values")
    kind: str = _kind("data")


@dataclass
class ToolCallPart(_Declared):
    """A tool call that the agent made."""

    tool_name: str = field(metadata=_about("the tool"))
    tool_call_id: str = field(metadata=_about("the call's id"))
    arguments: Dict[str, Any] = field(metadata=_about("what the tool was given"))
    metadata: Optional[Dict[str, Any]] = _optional("any values")
    kind: str = _kind("tool_call")


@dataclass
class ErrorPart(_Declared):
    error: str = field(metadata=_about("what went wrong in the run"))
    code: Optional[float] = _optional("a number for it")
    kind: str = _kind("error")


if TYPE_CHECKING:
    OutputPart = Any  # so that `res.output[0].parts[0].text` needs no cast
else:
    OutputPart = Union[InputPart, DataPart, ToolCallPart, ErrorPart]


@dataclass
class Output(_Declared):
    """A message of the run."""

    message_id: str = _optional("a ULID", "messageId")
    role: str = _optional("'user', 'agent', 'tool' or 'system'")
    parts: List[OutputPart] = _optional("the parts; one of an unknown kind is a dict")
    metadata: Optional[Dict[str, Any]] = _optional("any values")


@dataclass
class PromptTokensDetails(_Declared):
    cached_tokens: Optional[int] = _optional("read from a cache")
    cache_creation_tokens: Optional[int] = _optional("written to a cache")
    audio_tokens: Optional[int] = _optional("of sound")


@dataclass
class CompletionTokensDetails(_Declared):
    reasoning_tokens: Optional[float] = _optional("of reasoning")
    accepted_prediction_tokens: Optional[float] = _optional("predicted and used")
    rejected_prediction_tokens: Optional[float] = _optional("predicted, not used")
    audio_tokens: Optional[int] = _optional("of sound")


@dataclass
class CreateAgentResponseUsage(_Declared):
    """Tokens that the run used."""

    completion_tokens: float = _optional("came out")
    prompt_tokens: float = _optional("went in")
    total_tokens: float = _optional("both together")
    prompt_tokens_details: Optional[PromptTokensDetails] = _optional("by kind")
    completion_tokens_details: Optional[CompletionTokensDetails] = _optional("by kind")


@dataclass
class Function(_Declared):
    name: str = _optional("the tool to call")
    arguments: str = _optional("JSON text")


@dataclass
class PendingToolCalls(_Declared):
    """A tool call that waits for a ToolResultPart with its id."""

    id: str = _optional("the call's id")
    function: Function = _optional("what to call")
    type: str = _optional("always 'function'")


@dataclass
class Telemetry(_Declared):
    trace_id: str = _optional("the trace in which the run is found")
    span_id: str = _optional("the span in it")


def _items(value: Any, kind: Type[T]) -> List[T]:
    """Those of a list's items that came as the schema promises."""
    items = value if isinstance(value, list) else []
    return [item for item in items if isinstance(item, kind)]


@dataclass
class CreateAgentResponseResponseBody(_Declared):
    """What the agent did: `text` is what it said, `raw` the whole decoded answer."""

    id: str = _optional("the response's id", "_id")
    task_id: str = _optional("hand it back to continue")
    output: List[Output] = _optional("the messages of the run")
    created_at: str = _optional("ISO 8601 time")
    model: str = _optional("provider/model")
    usage: Optional[CreateAgentResponseUsage] = _optional("tokens used")
    finish_reason: Optional[str] = _optional("'stop', 'function_call' or another")
    pending_tool_calls: Optional[List[PendingToolCalls]] = _optional("open tool calls")
    telemetry: Optional[Telemetry] = _optional("where the run is found in the traces")
    raw: Dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def text(self) -> str:
        """The text of the agent's messages, with a newline between messages."""
        texts = []
        for message in _items(self.output, Output):
            if message.role in ("agent", None):
                found = [part.text for part in _items(message.parts, TextPart)]
                texts.append("".join(text for text in found if isinstance(text, str)))
        return "\n".join(filter(None, texts))


# --- Checking and JSON ------------------------------------------------------

_WORDS = {str: "text", bool: "true or false", float: "a number", list: "a list"}
_TEXT_LIKE = (str, bytes, bytearray, memoryview)  # sequences, but no lists


class _Shape(NamedTuple):
    """What an annotation says that a value may be."""

    plain: Any  # str, bool, float, list, dict, Any, or None for none of these
    models: Tuple[Any, ...] = ()  # dataclasses
    items: Any = None  # the shape of a list's items
    optional: bool = False  # None will do


def _read_annotation(annotation: Any) -> _Shape:
    origin = getattr(annotation, "__origin__", annotation)
    members = [a for a in getattr(annotation, "__args__", ()) if a is not type(None)]
    if origin in (list, abc.Sequence):
        return _Shape(list, (), _read_annotation(members[0]))
    if origin in (dict, abc.Mapping):
        return _Shape(dict)
    if is_dataclass(annotation):
        return _Shape(None, (annotation,))
    if not members:
        return _Shape(annotation, optional=annotation is Any)
    # besides its models, a Union here allows what its last member says; the text
    # that `message` may be is made an object before it is checked
    shapes = [_read_annotation(member) for member in members]
    models = tuple(model for shape in shapes for model in shape.models)
    optional = type(None) in annotation.__args__
    return _Shape(shapes[-1].plain, models, shapes[-1].items, optional)


@functools.lru_cache(maxsize=256)
def _json_fields(model: "Hashable") -> "Dict[str, Tuple[Field[Any], _Shape]]":
    """The fields that JSON has too and their shapes, by their names there."""
    own = [item for item in fields(cast(Any, model)) if item.metadata]
    declared = [item for item in own if item.metadata["json_name"] is not None]
    names = [item.metadata["json_name"] or item.name for item in declared]
    shapes = [_read_annotation(item.type) for item in declared]
    return dict(zip(names, zip(declared, shapes)))


def _choose(models: Sequence[Any], given: Mapping[Any, Any]) -> Any:
    """The model of an object: by its `kind`, else by what only that model has."""
    if len(models) == 1:
        return models[0]
    if BinaryFormat in models:
        if "bytes" in given or "bytes_" in given:
            return BinaryFormat
        return FileInURIFormat if "uri" in given else None
    kind = given.get("kind")
    return next((model for model in models if model.kind == kind), None)


def _at(path: str, key: Any) -> str:
    if isinstance(key, str) and key.isidentifier():
        return f"{path}.{key}" if path else key
    try:
        return f"{path}[{key!r}]"
    except ValueError:  # an integer of more digits than Python writes
        return f"{path}[...]"


def _type_name(value: Any) -> str:
    return "None" if value is None else type(value).__name__


def _is_list(value: Any) -> bool:
    return isinstance(value, abc.Sequence) and not isinstance(value, _TEXT_LIKE)


def _unknown(name: Any, known: Sequence[str]) -> str:
    import difflib

    # difflib takes the square of the length
    name = name[:80] if isinstance(name, str) else ""
    close = difflib.get_close_matches(name, known, 1)
    return "unknown field" + (f" (did you mean {close[0]!r}?)" if close else "")


def _encode(shape: _Shape, value: Any, path: str, problems: Problems) -> Any:
    """The JSON form of what a field holds; what is wrong with it joins `problems`."""
    plain, models, items, _ = shape
    if plain in (str, bool) and isinstance(value, plain):
        return value
    is_object = plain is dict and isinstance(value, abc.Mapping)
    if models and (is_object or isinstance(value, models)):
        return _encode_object(models, value, path, problems)
    if plain is Any or is_object:
        return _encode_free(value, path, problems)
    if plain is list and _is_list(value):
        places = enumerate(value)
        return [_encode(items, item, f"{path}[{n}]", problems) for n, item in places]
    if plain is float and type(value) in (int, float) and abs(value) <= MAX_NUMBER:
        return value
    names = " or ".join(model.__name__ for model in models)
    given = repr(value) if type(value) is float else _type_name(value)
    wanted = names or _WORDS.get(plain, "an object")
    if names and plain is dict:
        wanted += " or a mapping"
    problems.append((path, f"must be {wanted}, not {given}"))
    return None


def _encode_object(
    models: Sequence[Any], value: Any, path: str, problems: Problems
) -> Dict[str, Any]:
    """The JSON form of a dataclass of ours, or of a mapping that stands for one."""
    is_model = isinstance(value, tuple(models))
    given = dict(vars(value) if is_model else value)
    model: Any = type(value) if is_model else _choose(models, given)
    encoded: Dict[str, Any] = {}
    if model is None and BinaryFormat in models:
        problems.append((path, "must have 'bytes' or 'uri'"))
        return encoded
    if model is None:
        kind = given.get("kind")
        wrong = _one_of(*(model.kind for model in models))(kind)
        problems.append((_at(path, "kind"), "required" if kind is None else wrong))
        return encoded
    for json_name, (item, shape) in _json_fields(model).items():
        name, content = json_name, given.pop(json_name, None)
        again = given.pop(item.name, None)  # the other spelling, where there is one
        if content is None:
            name, content, again = item.name, again, None
        if content is None and shape.optional:
            continue
        where = _at(path, name)
        if content is None:
            problems.append((where, "required"))
            continue
        if again is not None:
            problems.append((where, f"given as {item.name!r} too"))
        found: Problems = []
        encoded[json_name] = _encode(shape, content, where, found)
        check = item.metadata["check"]
        if check and not found and check(content):
            found.append((where, check(content)))
        problems += found
    if not is_model:
        known = list(_json_fields(model))
        problems += [(_at(path, name), _unknown(name, known)) for name in given]
    return encoded


def _encode_free(
    value: Any, path: str, problems: Problems, parents: Tuple[int, ...] = ()
) -> Any:
    """The JSON form of a free-form value (contract, "Request").

    `parents`: the ids of the containers that it is in.
    """
    if isinstance(value, enum.Enum):
        return _encode_free(value.value, path, problems, parents)
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, int) and abs(value) < 10**MAX_INTEGER_DIGITS:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, (datetime.date, datetime.time)):  # a datetime is a date
        return re.sub(r"\+00:00$", "Z", value.isoformat())
    is_model = is_dataclass(value) and not isinstance(value, type)
    if is_model or isinstance(value, (abc.Mapping, abc.Set)) or _is_list(value):
        if id(value) not in parents and len(parents) < MAX_NESTING:
            return _encode_container(value, path, problems, (*parents, id(value)))
        wrong = "contains itself" if id(value) in parents else "is nested too deeply"
        problems.append((path, wrong))
        return None
    from decimal import Decimal
    from uuid import UUID

    if isinstance(value, (Decimal, UUID)):
        return str(value)
    wrong = json.dumps(value) if isinstance(value, float) else _type_name(value)
    problems.append((path, f"{wrong} has no JSON form"))
    return None


def _encode_container(
    value: Any, path: str, problems: Problems, parents: Tuple[int, ...]
) -> Any:
    if is_dataclass(value):
        value = {item.name: getattr(value, item.name) for item in fields(value)}
    if not isinstance(value, abc.Mapping):
        places = [(f"{path}[{index}]", item) for index, item in enumerate(value)]
        return [_encode_free(item, at, problems, parents) for at, item in places]
    encoded: Dict[str, Any] = {}
    for key, item in value.items():
        name = key.value if isinstance(key, enum.Enum) else key
        where = _at(path, name)
        huge = isinstance(name, int) and abs(name) >= 10**MAX_INTEGER_DIGITS
        if huge or isinstance(name, bool) or not isinstance(name, (str, int)):
            problems.append((where, f"{_type_name(name)} as a name has no JSON form"))
        elif str(name) in encoded:
            problems.append((where, "given twice"))
        else:
            encoded[str(name)] = _encode_free(item, where, problems, parents)
    return encoded


def _decode(shape: _Shape, value: Any) -> Any:
    """What a shape makes of a JSON value; what does not fit it stays."""
    if isinstance(value, list) and shape.plain is list:
        return [_decode(shape.items, item) for item in value]
    if not shape.models or not isinstance(value, dict):
        return value
    model = _choose(shape.models, value)
    return _decode_object(model, value) if model else value


def _decode_object(model: Any, given: Mapping[str, Any]) -> Any:
    decoded = model.__new__(model)  # not built: a request part would be checked
    attributes, rest = vars(decoded), dict(given)
    for json_name, (item, shape) in _json_fields(model).items():
        value = rest.pop(json_name, None)
        if isinstance(value, (list, dict)):
            value = _decode(shape, value)
        elif value is None and json_name in ("output", "parts"):
            value = []  # programs loop over it
        attributes[item.name] = value
    for name, value in rest.items():
        if not name.startswith("_") and not hasattr(model, name):
            attributes[name] = value
    return decoded


def _decode_answer(data: Dict[str, Any]) -> CreateAgentResponseResponseBody:
    given = dict(data)
    if "_id" not in given and "id" in given:  # a task (contract, "Answers")
        given["_id"] = given.pop("id")
        given.setdefault("task_id", given["_id"])
    answer: CreateAgentResponseResponseBody
    answer = _decode_object(CreateAgentResponseResponseBody, given)
    answer.raw = data
    return answer


_encode_json = json.JSONEncoder(separators=(",", ":")).encode


def _read_integer(digits: str) -> Union[int, str]:
    return int(digits) if len(digits.lstrip("-")) <= MAX_INTEGER_DIGITS else digits


_read_json = json.JSONDecoder(parse_int=_read_integer).decode


def _decode_json(text: str) -> Any:
    """The value, or None where the text is not JSON."""
    try:
        return _read_json(text)
    except (ValueError, RecursionError):
        return None


def _server_words(data: Any) -> str:
    """What an error's JSON says, in the shapes that were seen (contract, "Answers")."""
    outer = data if isinstance(data, dict) else {}
    inner = outer.get("error")
    inner = inner.get("message") if isinstance(inner, dict) else inner
    words = (outer.get("message"), inner)
    return next((word for word in words if isinstance(word, str) and word), "")


# --- Retry policy -----------------------------------------------------------

# What the official client retries unless it is told otherwise.
RETRIED_STATUSES = ("429", "500", "502", "503", "504")


def _negative(value: float) -> str:
    return "must not be negative" if value < 0 else ""


def _no_statuses(values: Sequence[str]) -> str:
    wrong = [v for v in values if not re.fullmatch("[1-5]([0-9]{2}|[Xx]{2})", v)]
    return f"{wrong[0]!r} is no status such as '429' or '5XX'" if wrong else ""


@dataclass
class BackoffStrategy(_Checked):
    """How long to wait between attempts, in milliseconds.

    Without `jitter_ms`, each wait is shortened at random by up to a quarter.
    """

    initial_interval: float = _optional("first wait", check=_negative, default=500)
    max_interval: float = _optional("longest wait", check=_negative, default=60_000)
    exponent: float = _optional("growth of the wait", check=_negative, default=1.5)
    max_elapsed_time: float = _optional(
        "time in all", check=_negative, default=3_600_000
    )
    jitter_ms: Optional[float] = _optional("most to add at random", check=_negative)


@dataclass
class RetryConfig(_Checked):
    """What to try again, and when. None in its place tries once.

    As in the official client, the defaults may run an agent twice; DEFAULT_RETRY,
    which a client has by default, does not.

    `retry_connection_errors` is about attempts without a complete answer: all of
    them (True), none (False), or those after which the agent cannot have run (None).
    """

    strategy: str = _optional(
        "'none' tries once", check=_one_of("backoff", "none"), default="backoff"
    )
    backoff: BackoffStrategy = field(
        default_factory=BackoffStrategy, metadata=_about("how long to wait")
    )
    retry_connection_errors: Optional[bool] = _optional("as above", default=True)
    status_codes_override: Optional[Sequence[str]] = _optional(
        f"instead of {', '.join(RETRIED_STATUSES)}", check=_no_statuses
    )


# An agent run is not idempotent (RFC 9110, section 9.2.2), so only what failed before
# the agent ran: a request that did not leave whole, and 429 and 503, which say so.
DEFAULT_RETRY = RetryConfig(
    "backoff", BackoffStrategy(500, 8_000, 2, 30_000), None, ("429", "503")
)


def _should_retry(
    error: Union[APIError, APIConnectionError], config: RetryConfig
) -> bool:
    if config.strategy == "none":
        return False
    if isinstance(error, APIConnectionError):
        wanted = config.retry_connection_errors
        return error.temporary and (not error.sent if wanted is None else wanted)
    status = str(error.status_code)
    chosen = config.status_codes_override
    retried = RETRIED_STATUSES if chosen is None else [s.upper() for s in chosen]
    return status != "200" and (status in retried or f"{status[0]}XX" in retried)


def _asked_wait(headers: http.client.HTTPMessage) -> Optional[float]:
    """The seconds that the server asks for, where that makes sense."""
    after = headers.get("retry-after", "")
    waits: List[float] = []
    for text, unit in ((headers.get("retry-after-ms", ""), 1000), (after, 1)):
        if re.fullmatch(r"\s*[0-9]+(\.[0-9]+)?\s*", text):
            waits.append(float(text) / unit)
    try:  # a date is in GMT, said or not (RFC 9110, section 5.6.7)
        date = email.utils.parsedate_to_datetime(after)
        date = date.replace(tzinfo=datetime.timezone.utc)
        waits.append(date.timestamp() - time.time())
    except (TypeError, ValueError, IndexError, OverflowError):
        pass
    sensible = (wait for wait in waits if 0 < wait <= MAX_TIMEOUT_MS / 1000)
    return next(sensible, None)


def _retry_wait(
    error: OrqError, config: RetryConfig, attempt: int, elapsed: float
) -> Optional[float]:
    """Seconds to wait after the failed attempt of this number, the first being 1.

    None if that wait would pass `max_elapsed_time`, `elapsed` seconds being over.
    """
    backoff = config.backoff
    wait = _asked_wait(error.headers) if isinstance(error, APIError) else None
    if wait is None:
        try:
            wait = backoff.initial_interval * float(backoff.exponent) ** (attempt - 1)
            wait += random.uniform(0, backoff.jitter_ms or 0)
        except OverflowError:
            wait = math.inf if backoff.initial_interval else 0.0
        wait = min(wait, backoff.max_interval, MAX_TIMEOUT_MS) / 1000
        if backoff.jitter_ms is None:
            wait *= random.uniform(0.75, 1)
    return wait if (elapsed + wait) * 1000 <= backoff.max_elapsed_time else None


# --- Transport --------------------------------------------------------------
# urllib.request routes a request: its opener holds the proxy handler and the handler
# below, so that no other scheme exists, and nothing copies credentials to where a
# redirect points. http.client reads the answer. The connection is ours.

_SERVER_URL = (
    r"((?ai:https?))://(\[[0-9A-Fa-f:.]+\]|[^][/?#@:]+)(?::([0-9]{1,5}))?"
    r"(/[^\s?#\\\x00-\x1f\x7f]*)?"
)
_HOST = r"\[.*\]|[0-9a-z._~-]+"  # of the above, after its conversion to ASCII
_OWN_HEADERS = ("host", "content-length", "transfer-encoding", "connection")
_HEADER_NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110, section 5.6.2
_UNSENDABLE = r"[^\x20-\x7e\xa0-\xff]"


@functools.lru_cache(maxsize=16)
def _read_server_url(url: str) -> Tuple[str, str]:
    """(origin, path), both ASCII; two empty texts if it is no server's URL."""
    match = re.fullmatch(_SERVER_URL, url.strip())
    if not match or not 0 < int(match[3] or 80) < 2**16:
        return "", ""
    scheme, host, port, path = match.groups("")
    scheme = scheme.lower()
    try:
        host = host.lower().encode("idna").decode("ascii")
        path = urllib.parse.quote(path.rstrip("/"), string.punctuation)
        if host[0] == "[":
            socket.inet_pton(socket.AF_INET6, host[1:-1])
    except (UnicodeError, OSError):
        return "", ""
    if not re.fullmatch(_HOST, host):
        return "", ""
    if port and int(port) != {"http": 80, "https": 443}[scheme]:
        host += f":{int(port)}"
    return f"{scheme}://{host}", path


def _operation_url(server_url: Any, agent_key: Any, problems: Problems) -> str:
    origin, path = _read_server_url(server_url if isinstance(server_url, str) else "")
    if not origin:
        wanted = "http(s)://HOST[:PORT][/PATH], without credentials, query or fragment"
        problems.append(("server_url", f"must be {wanted}"))
    key = _encode(_Shape(str), agent_key, "agent_key", problems) or ""
    if isinstance(agent_key, str) and key.strip() in ("", ".", ".."):
        problems.append(("agent_key", "must name an agent"))
    try:
        key = urllib.parse.quote(key, safe="")
    except UnicodeEncodeError:
        problems.append(("agent_key", "has no UTF-8 form"))
    return f"{origin}{path}/v2/agents/{key}/responses"


def _request_headers(api_key: Any, given: Any, problems: Problems) -> Dict[str, str]:
    """Our headers, with the caller's added or in their place."""
    unsendable = "must not have control characters or text outside latin-1"
    key = api_key.strip() if isinstance(api_key, str) else ""
    if key.lower() in ("", "bearer"):
        problems.append(("api_key", "required (or set ORQ_API_KEY)"))
    elif re.search(_UNSENDABLE, key):
        problems.append(("api_key", unsendable))
    headers = {
        "Authorization": key if key[:7].lower() == "bearer " else f"Bearer {key}",
        "Content-Type": "application/json",
        "Accept": "application/json",
        "Accept-Encoding": "identity",
        "User-Agent": f"orq_min/{__version__}",
    }
    if given is not None and not isinstance(given, abc.Mapping):
        problems.append(("http_headers", f"must be an object, not {_type_name(given)}"))
        given = None
    seen = set(_OWN_HEADERS)
    for name, value in (given or {}).items():
        wrong = ""
        if not isinstance(name, str) or not re.fullmatch(_HEADER_NAME, name):
            wrong = "is not a header's name"
        elif name.lower() in seen:
            wrong = "is set by the client, or given twice"
        elif not isinstance(value, str):
            wrong = f"must be text, not {_type_name(value)}"
        elif re.search(_UNSENDABLE, value.strip()):
            wrong = unsendable
        else:
            seen.add(name.lower())
            headers[name.title()] = value.strip()
        problems += [(_at("http_headers", name), wrong)] if wrong else []
    return headers


def _spellings(character: str) -> str:
    """A pattern for a character as it is, or escaped as in JSON, a URL or HTML."""
    plain, code = re.escape(character), ord(character)
    if character.isalnum() and code < 128:
        return plain  # nothing escapes it, and re finds a literal text fast
    # no form twice: re would try each, and double its time for each character
    percent = "".join(f"%{byte:02x}" for byte in character.encode())
    coded = f"{percent}|\\\\u{code:04x}|&#{code};|&#x{code:x};|&[a-z]+;"
    return f"(?:{plain}|\\\\{plain}|(?i:{coded}))"


@dataclass(eq=False)
class PreparedRequest:
    """A request that was checked and can be sent.

    `headers` hold the key; the repr leaves them and the body out.
    """

    method: str
    url: str
    headers: Dict[str, str] = field(repr=False)
    body: bytes = field(repr=False)
    timeout: float  # seconds, for one attempt
    retries: Optional[RetryConfig]

    def mask(self, text: str) -> str:
        """The text without the key, as it is or in a usual escaping."""
        scheme, _, key = self.headers["Authorization"].partition(" ")
        spellings = map(_spellings, key or scheme)
        return re.sub("".join(spellings) or "(?!)", "***", text)


class _Answer(NamedTuple):
    """A complete answer; `problem`: what is wrong with it as a whole."""

    status: int
    headers: http.client.HTTPMessage
    body: bytearray
    problem: str = ""


class _Cancellation:
    """How another thread ends a call."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self._lock = threading.Lock()
        self._connection: Optional[_Connection] = None

    def watch(self, connection: "Optional[_Connection]") -> None:
        """Note the connection in use."""
        with self._lock:  # else cancel could shut one that serves another call
            self._connection = connection

    def pause(self, seconds: float) -> None:
        """Wait; on Windows, Ctrl-C ends a sleep, but not the wait for an event."""
        if threading.current_thread() is threading.main_thread():
            time.sleep(seconds)
        else:
            self.event.wait(seconds)

    def cancel(self) -> None:
        with self._lock:
            self.event.set()
            if self._connection is not None:
                self._connection.shut()


class _Attempt(urllib.request.Request):
    """A request on its way, whose destination urllib's ProxyHandler may change."""

    prepared: PreparedRequest
    cancellation: _Cancellation
    deadline: float  # of time.monotonic
    sent = False  # its last byte was handed to the system

    def time_left(self) -> float:
        """Seconds; raises if there are none, or the call has been ended."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise socket.timeout("the deadline has passed")
        if self.cancellation.event.is_set():
            raise ConnectionAbortedError("cancelled")
        return left


def _host_and_port(netloc: str, default_port: int) -> Tuple[str, int]:
    parts = urllib.parse.urlsplit(f"//{netloc}")
    return parts.hostname or "", parts.port or default_port


class _ProxyRefusal(OSError):
    """A proxy that opened no tunnel."""


class _Reader(io.BufferedReader):
    def close(self) -> None:
        """Stay open: http.client closes after an answer, but others may follow."""


def _is_framed(answer: _Answer) -> bool:
    """Whether the end of the answer is beyond doubt (RFC 9112, section 6.3)."""
    lengths = answer.headers.get_all("content-length", [])
    codings = answer.headers.get_all("transfer-encoding", [])
    if answer.headers.defects or answer.status in (101, 204, 304):
        return False
    if codings:
        return not lengths and codings == ["chunked"]
    return len(lengths) == 1 and lengths[0].isdigit()


def _read_answer(response: http.client.HTTPResponse) -> _Answer:
    """The whole answer; raises if it breaks off."""
    body = bytearray()
    source: Any = response
    if "gzip" in response.headers.get("content-encoding", "").lower():
        import gzip

        source = gzip.GzipFile(fileobj=source)
    for block in iter(lambda: source.read(BLOCK_BYTES), b""):
        if len(body) + len(block) > MAX_ANSWER_BYTES:
            problem = f"the answer is larger than {MAX_ANSWER_BYTES / 2**20:g} MiB"
            return _Answer(response.status, response.headers, bytearray(), problem)
        body += block
    if response.length:  # at an early end, read(amount) just returns b""
        raise http.client.IncompleteRead(b"", response.length)
    return _Answer(response.status, response.headers, body)


class _Connection(io.RawIOBase):
    """A connection, which serves one attempt at a time, as the stream it receives."""

    def __init__(self, peer: Tuple[Any, ...]) -> None:
        self.peer = peer
        self.sock: Any = None
        self.attempt: Any = None  # None: nothing is to be read
        self.ended = False  # the peer has closed it
        self.idle_since = 0.0
        self.reader = _Reader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> Optional[int]:
        if self.attempt is None:
            return None
        self.sock.settimeout(self.attempt.time_left())
        received: int = self.sock.recv_into(buffer)
        self.ended = not received
        return received

    def makefile(self, mode: str) -> io.BufferedReader:
        """What HTTPResponse reads, one for all answers: no byte past one is lost."""
        return self.reader

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()

    def shut(self) -> None:
        """End what another thread is doing with it."""
        try:  # past SSLSocket.shutdown, after which it would send plain text
            if self.sock is not None:
                socket.socket.shutdown(self.sock, socket.SHUT_RDWR)
        except OSError:
            pass  # not connected yet, or no longer

    def dial(self, host: str, port: int) -> None:
        """Connect to the first address that accepts; each has its share of the time.

        The lookup of the name cannot be interrupted.
        """
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        left = len(addresses)
        for family, sock_type, protocol, _, address in addresses:
            try:
                self.sock = socket.socket(family, sock_type, protocol)
                self.sock.settimeout(self.attempt.time_left() / left)
                self.sock.connect(address)
                break
            except OSError:
                self.close()
                left -= 1
                if not left:
                    raise
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name in ("TCP_KEEPIDLE", "TCP_KEEPALIVE", "TCP_KEEPINTVL"):  # 2nd: macOS
            if hasattr(socket, name):
                option = getattr(socket, name)
                self.sock.setsockopt(socket.IPPROTO_TCP, option, KEEPALIVE_SECONDS)

    def open_tunnel(self, server: str, credentials: str) -> None:
        """Ask the proxy for a tunnel (RFC 9110, section 9.3.6)."""
        target = server if re.search(":[0-9]+$", server) else f"{server}:443"
        head = f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n"
        if credentials:
            head += f"Proxy-Authorization: {credentials}\r\n"
        self.send(f"{head}\r\n".encode("latin-1"))
        status = self.read_head("CONNECT").status
        if not 200 <= status < 300:
            phrase = http.client.responses.get(status, "")
            raise _ProxyRefusal(f"{status} {phrase}".rstrip())

    def start_tls(self, context: _SSLContext, host: str) -> None:
        self.sock = context.wrap_socket(
            self.sock, server_hostname=host, do_handshake_on_connect=False
        )
        self.reader = _Reader(self)  # nothing from before TLS may be taken for it
        self.sock.settimeout(self.attempt.time_left())
        self.sock.do_handshake()

    def send(self, data: Union[bytes, memoryview]) -> None:
        # not sendall: over TLS it would grant the timeout to each piece anew
        view = memoryview(data)
        while view:
            self.sock.settimeout(self.attempt.time_left())
            view = view[self.sock.send(view[:BLOCK_BYTES]) :]

    def read_head(self, method: str) -> http.client.HTTPResponse:
        """The start of the final answer (RFC 9110, section 15.2)."""
        while True:
            response = http.client.HTTPResponse(cast(Any, self), method=method)
            response.begin()
            if self.ended:  # http.client takes that for the end of the headers
                raise http.client.IncompleteRead(b"")
            if response.status == 101 or not 100 <= response.status < 200:
                return response

    def exchange(self) -> Tuple[_Answer, bool]:
        """The answer, and whether another attempt can use the connection."""
        attempt: _Attempt = self.attempt
        prepared = attempt.prepared
        # for a proxy of plain HTTP, urllib has made the selector the whole URL, and
        # added its credentials to the attempt, which has no other header
        headers = [*prepared.headers.items(), *attempt.header_items()]
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
        head = f"{prepared.method} {attempt.selector} HTTP/1.1\r\n{lines}\r\n"
        body = memoryview(prepared.body)
        broken: Optional[Exception] = None
        try:  # head and body in one packet where they fit
            self.send(head.encode("latin-1") + body[:BLOCK_BYTES])
            self.send(body[BLOCK_BYTES:])
            attempt.sent = True
        except socket.timeout:
            raise  # no time is left for an answer
        except OSError as error:
            broken = error  # but a server may answer (401, 413) before it has read all
        try:
            response = self.read_head(prepared.method)
            answer = _read_answer(response)
        except Exception as error:  # noqa: BLE001 (it is raised)
            raise broken or error
        self.attempt = None  # so that peek shows what is held, and reads nothing
        unread = bool(self.reader.peek(1))
        if hasattr(self.sock, "pending"):  # TLS: decrypted, but not read
            unread = unread or self.sock.pending() > 0
        odd = broken or answer.problem or unread or response.will_close
        return answer, not odd and _is_framed(answer)

    def is_quiet(self) -> bool:
        """Whether the peer has neither closed it nor sent anything unasked."""
        self.sock.settimeout(0)
        try:  # past SSLSocket.recv, which cannot peek
            socket.socket.recv(self.sock, 1, socket.MSG_PEEK)
        except OSError as error:
            return isinstance(error, BlockingIOError)
        return False


class _ConnectionHandler(urllib.request.BaseHandler):
    """Performs an attempt for urllib's opener, on a kept connection or a new one."""

    def __init__(self, context: Optional[_SSLContext]) -> None:
        self._context = context
        # A fork may leave a lock locked for ever. So there is one for each process,
        # and none for the list, whose append, pop and remove are atomic.
        self._context_locks: Dict[int, threading.Lock] = {}
        self._idle: List[_Connection] = []
        self._closed = False

    def http_open(self, attempt: _Attempt) -> _Answer:
        if attempt.type not in ("http", "https"):
            raise ValueError("a proxy of another kind")  # such as socks, for http
        # the server behind a proxy; urllib has no public name for it
        tunnel = getattr(attempt, "_tunnel_host", None)
        credentials = attempt.get_header("Proxy-authorization", "")  # urllib's spelling
        if tunnel:  # they are for the proxy alone
            attempt.remove_header("Proxy-authorization")
        # the process too, as the two sides of a fork may not share a connection
        peer = (os.getpid(), attempt.type, attempt.host, tunnel, credentials)
        kept = self._take(peer)
        connection = kept or _Connection(peer)
        connection.attempt = attempt
        try:
            attempt.cancellation.watch(connection)
            if kept is None:
                self._connect(connection, tunnel, credentials)
            answer, clean = connection.exchange()
            attempt.cancellation.watch(None)
            if answer.status == 407 and attempt.has_proxy():
                attempt.sent = False
                raise _ProxyRefusal("407 Proxy Authentication Required")
        except BaseException:
            connection.close()
            raise
        connection.idle_since = time.monotonic()
        if clean:
            self._idle.append(connection)
        else:
            connection.close()
        if self._closed:
            self.close()
        return answer

    https_open = http_open

    def _connect(
        self, connection: _Connection, tunnel: Optional[str], credentials: str
    ) -> None:
        secure, host = connection.attempt.type == "https", connection.attempt.host
        connection.dial(*_host_and_port(host, 443 if secure and not tunnel else 80))
        if tunnel:
            connection.open_tunnel(tunnel, credentials)
        if secure:
            server, _ = _host_and_port(tunnel or host, 443)
            connection.start_tls(self._tls_context(), server)

    def _tls_context(self) -> _SSLContext:
        with self._context_locks.setdefault(os.getpid(), threading.Lock()):
            if self._context is None:
                import ssl

                self._context = ssl.create_default_context()
            return self._context

    def _take(self, peer: Tuple[Any, ...]) -> Optional[_Connection]:
        """The usable connection that was used last; those that are too old go."""
        chosen: Optional[_Connection] = None
        for connection in self._idle[::-1]:
            fresh = time.monotonic() - connection.idle_since < IDLE_SECONDS
            if fresh and (chosen or connection.peer != peer):
                continue
            try:
                self._idle.remove(connection)
            except ValueError:
                continue  # another thread took it
            if fresh and connection.is_quiet():
                chosen = connection
            else:
                connection.close()
        return chosen

    def close(self) -> None:
        """Close what is idle; what is in use is closed when its answer has come."""
        self._closed = True
        while self._idle:
            try:
                self._idle.pop().close()
            except IndexError:
                break  # another thread took the last one


def _explain(error: Exception, attempt: _Attempt) -> Tuple[str, bool]:
    """(what went wrong, whether another attempt may do better)."""
    if isinstance(error, socket.timeout) and not error.errno:  # the system's has one
        return f"no complete answer within {attempt.prepared.timeout:g} s", True
    if isinstance(error, _ProxyRefusal):
        return f"the proxy refused with {error}", False
    if isinstance(error, socket.gaierror):
        what = f"no address found for {attempt.host} ({error.strerror})"
        return what, error.errno == socket.EAI_AGAIN
    if hasattr(error, "verify_message"):  # ssl.SSLCertVerificationError
        what = f"the certificate was not accepted ({error.verify_message})"
        advice = "set SSL_CERT_FILE to its certificate, or pass an ssl_context"
        return f"{what}; for a private authority, {advice}", False
    if isinstance(error, ValueError) and not attempt.sent:
        return "what the environment names is not the URL of an HTTP proxy", False
    if isinstance(error, http.client.RemoteDisconnected):
        return "the connection was closed without an answer", True
    if isinstance(error, (http.client.IncompleteRead, EOFError)):
        return "the answer broke off", True
    if isinstance(error, (http.client.HTTPException, ValueError)):
        return f"what came is not HTTP ({type(error).__name__})", True
    what = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return what, attempt.sent or isinstance(error, OSError)


def _connection_error(error: Exception, attempt: _Attempt) -> APIConnectionError:
    """What a failure means for the caller and for the retry policy."""
    late = isinstance(error, (socket.timeout, TimeoutError))
    what, temporary = _explain(error, attempt)
    if attempt.host != urllib.parse.urlsplit(attempt.full_url).netloc:
        what += f" (proxy {attempt.host})"
    outcome = "the agent may have run, but" if attempt.sent else "not sent:"
    text = f"{attempt.get_method()} {attempt.full_url}: {outcome} {what}"
    text = attempt.prepared.mask(text)
    failure = (APITimeoutError if late else APIConnectionError)(text)
    failure.sent, failure.temporary = attempt.sent, temporary
    # a traceback shows the cause too, where what the server wrote may be quoted
    error.__cause__ = error.__context__ = None
    if isinstance(error, (http.client.HTTPException, ValueError)):
        error.args = (what,)
    return failure


class _Transport:
    """Brings a prepared request to its server, and a complete answer back."""

    def __init__(self, context: Optional[_SSLContext]) -> None:
        self._connections = _ConnectionHandler(context)
        self._opener = urllib.request.OpenerDirector()
        self._opener.add_handler(urllib.request.ProxyHandler())
        self._opener.add_handler(self._connections)

    def close(self) -> None:
        self._connections.close()

    __del__ = close  # here, as the opener and its handler hold each other

    def exchange(self, prepared: PreparedRequest, stop: _Cancellation) -> _Answer:
        """The answer, after redirects within the origin (RFC 9110, section 15.4).

        Raises APIConnectionError if no complete one comes.
        """
        url = prepared.url
        home, _ = _read_server_url(url)
        deadline = time.monotonic() + prepared.timeout
        for _ in range(MAX_REDIRECTS + 1):
            attempt = _Attempt(url, method=prepared.method)
            attempt.prepared, attempt.cancellation = prepared, stop
            attempt.deadline = deadline
            try:
                answer = cast(_Answer, self._opener.open(attempt))
            except Exception as error:
                failure = _connection_error(error, attempt)
                _log.debug("%s", failure)
                raise failure from error
            if _log.isEnabledFor(logging.DEBUG):
                _log.debug("%s: %d", prepared.mask(url), answer.status)
            moved = 300 <= answer.status < 400
            location = answer.headers.get("location") if moved else None
            if not location:
                break
            try:
                location = urllib.parse.quote(location, string.punctuation)
                location = urllib.parse.urljoin(url, location).partition("#")[0]
            except ValueError:
                pass  # no URL, so of no origin
            answer = answer._replace(problem=f"redirect to {location} not followed")
            origin, _ = _read_server_url(location.partition("?")[0])
            # 301 to 303 may turn a POST into a GET; the key stays in its origin
            if answer.status not in (307, 308) or origin != home:
                break
            url = location
        return answer


# --- Client -----------------------------------------------------------------

APIKey = Union[str, Callable[[], Optional[str]], None]
ResponseBody = CreateAgentResponseResponseBody


@dataclass
class _Call(_Declared):
    """The parameters of a call; nothing else lists them."""

    agent_key: str = field(metadata=_about("the agent's key or id", None))
    message: Union[str, MessageLike] = field(metadata=_about("a message, or its text"))
    task_id: Optional[str] = _optional("id of an inactive task to continue")
    variables: Optional[Mapping[str, Any]] = _optional("values for the templates")
    contact: Optional[ContactLike] = _optional("on whose behalf the agent runs")
    thread: Optional[ThreadLike] = _optional("what groups requests")
    memory: Optional[MemoryLike] = _optional("whose memories the agent uses")
    metadata: Optional[Mapping[str, Any]] = _optional("any values, for the traces")
    background: Optional[bool] = _optional("do not wait for the agent", default=False)
    retries: Optional[RetryConfig] = _optional("None tries once", None, default=UNSET)
    server_url: Optional[str] = _optional("in place of the client's", None)
    timeout_ms: Optional[float] = _optional("milliseconds for each attempt", None)
    http_headers: Optional[Mapping[str, str]] = _optional("to add or replace", None)
    extra_body: Optional[Mapping[str, Any]] = _optional("fields unknown here", None)


@dataclass
class _SingleCall(_Call):
    api_key: APIKey = _optional("a text, or a function that returns one", None)
    ssl_context: Optional[_SSLContext] = _optional("None: the platform's", None)


def _show_parameters(function: Any, call: Any) -> Any:
    """Show, to help() and editors, the parameters of a call in place of **given."""
    shown = inspect.signature(function)
    own = [p for p in shown.parameters.values() if p.kind != p.VAR_KEYWORD]
    names = [parameter.name for parameter in own]
    more = inspect.signature(call).parameters.values()
    own += [p.replace(kind=p.KEYWORD_ONLY) for p in more if p.name not in names]
    function.__signature__ = shown.replace(parameters=own)
    about = "\n".join(f"    {f.name}: {f.metadata['about']}" for f in fields(call))
    text = inspect.cleandoc(function.__doc__ or "")  # -OO leaves none
    function.__doc__ = f"{text}\n\n{about}"
    return function


def _takes(
    call: "Callable[P, Any]",
) -> "Callable[[Callable[..., T]], Callable[Concatenate[Any, P], T]]":
    """Give a method of **given the parameters of a call."""
    return lambda method: cast(Any, _show_parameters(method, call))


def _one_line(text: str) -> str:
    """A server's words, made safe for a terminal and a log."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _finish(prepared: PreparedRequest, answer: _Answer) -> ResponseBody:
    """The agent's answer. APIError if it is no usable 200."""
    text = answer.body.decode(json.detect_encoding(answer.body), "replace")
    data = _decode_json(text)
    if answer.status == 200 and isinstance(data, dict) and not answer.problem:
        return _decode_answer(data)
    words = prepared.mask(_server_words(data))
    quoted = words or prepared.mask(text)
    shown = _one_line(quoted[:QUOTED_CHARACTERS])
    if len(quoted) > QUOTED_CHARACTERS:
        shown += f"... ({len(quoted)} characters)"
    phrase = http.client.responses.get(answer.status, "")
    problem = "" if answer.status != 200 else "the answer is not a JSON object"
    about = f"{prepared.method} {prepared.url}: {answer.status} {phrase}".rstrip()
    what = (about, answer.problem or problem, shown)
    error = APIError(prepared.mask(": ".join(filter(None, what))))
    error.status_code, error.headers = answer.status, answer.headers
    error.body, error.data, error.message = text, data, words or phrase
    raise error


async def _in_thread(work: Callable[[], T], stop: _Cancellation) -> T:
    """What work returns, in a daemon thread of its own.

    The event loop's executor has few threads, and a program's end waits for them.
    """
    import asyncio
    import concurrent.futures
    import contextvars

    future: concurrent.futures.Future[T] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()  # it is ended by `stop` alone

    def run() -> None:
        try:
            future.set_result(work())
        except StopIteration as error:  # before 3.12, the task would wait for ever
            future.set_exception(RuntimeError(repr(error)))
        except BaseException as error:  # noqa: BLE001 (the task raises it)
            future.set_exception(error)

    target = contextvars.copy_context().run
    threading.Thread(target=target, args=(run,), daemon=True).start()
    try:
        return await asyncio.wrap_future(future)
    finally:
        stop.cancel()


@dataclass(repr=False, eq=False)  # no repr, as it would show the key
class Responses:
    """The operation, as `orq.agents.responses`."""

    _transport: _Transport
    _api_key: APIKey
    _server_url: Optional[str]
    _timeout_ms: Optional[float]
    _retry_config: Optional[RetryConfig]

    @_takes(_Call)
    def create(self, **given: Any) -> ResponseBody:
        """Send a message to an agent and return what the agent did.

        Raises ValidationError before anything is sent, APIError for any answer but a
        usable 200, and APIConnectionError or APITimeoutError without one.
        """
        return self._run(self.prepare(**given), _Cancellation())

    @_takes(_Call)
    async def create_async(self, **given: Any) -> ResponseBody:
        """Do what `create` does, without blocking the event loop.

        Each call takes a thread. Cancelling the task closes the connection; the agent
        may run on.
        """
        stop = _Cancellation()

        def work() -> ResponseBody:
            return self._run(self.prepare(**given), stop)

        return await _in_thread(work, stop)

    @_takes(_Call)
    def prepare(self, **given: Any) -> PreparedRequest:
        """Return what `create` would send, checked. Raises ValidationError."""
        try:
            call = _Call(**given)
        except TypeError:  # which speaks of _Call
            inspect.signature(self.create).bind(**given)
            raise
        problems: Problems = []
        if isinstance(call.message, str):
            part = {"kind": "text", "text": call.message}
            call.message = {"role": "user", "parts": [part]}
        content = _encode_object((_Call,), call, "", problems)
        if call.extra_body is not None:
            extra = _encode(_Shape(dict), call.extra_body, "extra_body", problems) or {}
            for name in filter(_json_fields(_Call).__contains__, extra):
                problems.append((f"extra_body.{name}", "is a parameter of its own"))
            content.update(extra)
        server = self._server_url if call.server_url is None else call.server_url
        if server is None:
            server = os.environ.get("ORQ_BASE_URL", "").strip() or DEFAULT_SERVER
        url = _operation_url(server, call.agent_key, problems)
        key = self._api_key
        if key is None:
            key = os.environ.get("ORQ_API_KEY")
        key = key() if callable(key) else key
        headers = _request_headers(key, call.http_headers, problems)
        timeout = self._timeout_ms if call.timeout_ms is None else call.timeout_ms
        timeout = DEFAULT_TIMEOUT_MS if timeout is None else timeout
        timeout = _encode(_Shape(float), timeout, "timeout_ms", problems)
        if timeout is not None and not 0 < timeout <= MAX_TIMEOUT_MS:
            problems.append(("timeout_ms", f"must be above 0, up to {MAX_TIMEOUT_MS}"))
        config = self._retry_config if call.retries is UNSET else call.retries
        # the default is skipped, as a check costs a call a twentieth of its time
        if config is not None and config is not DEFAULT_RETRY:
            _encode(_Shape(None, (RetryConfig,)), config, "retries", problems)
        if problems:
            raise ValidationError(problems)
        data = _encode_json(content).encode("ascii")
        headers["Host"] = urllib.parse.urlsplit(url).netloc
        headers["Content-Length"] = str(len(data))
        return PreparedRequest("POST", url, headers, data, timeout / 1000, config)

    def _run(self, prepared: PreparedRequest, stop: _Cancellation) -> ResponseBody:
        """The answer of the first attempt that has one, or the last one's error."""
        started, config = time.monotonic(), prepared.retries
        attempt = 0
        while True:
            attempt += 1
            try:
                return _finish(prepared, self._transport.exchange(prepared, stop))
            except (APIError, APIConnectionError) as error:
                if config is None or not _should_retry(error, config):
                    raise
                elapsed = time.monotonic() - started
                wait = _retry_wait(error, config, attempt, elapsed)
                if wait is None or stop.event.is_set():
                    raise
                # an APIError's text quotes the body; an APIConnectionError's does not
                status = getattr(error, "status_code", None)
                reason = f"status {status}" if status else str(error)
            _log.info("attempt %d failed, next in %.1f s: %s", attempt, wait, reason)
            stop.pause(wait)


class Agents:
    """The operations of `orq.agents`."""

    def __init__(self, responses: Responses) -> None:
        self.responses = responses


class Orq:
    """A client, which threads and tasks can share. Close it, or use `with`.

    api_key: a text, or a function that returns one (default: ORQ_API_KEY)
    server_url: (default: ORQ_BASE_URL, else https://my.orq.ai)
    timeout_ms: for each attempt, from connecting to the last byte, in
        milliseconds (default: 600000)
    retry_config: what to try again; None tries once (default: DEFAULT_RETRY)
    ssl_context: (default: the platform's, with SSL_CERT_FILE and SSL_CERT_DIR)
    """

    def __init__(
        self,
        api_key: APIKey = None,
        *,
        server_url: Optional[str] = None,
        timeout_ms: Optional[float] = None,
        retry_config: Optional[RetryConfig] = DEFAULT_RETRY,
        ssl_context: Optional[_SSLContext] = None,
    ) -> None:
        if ssl_context is not None and not hasattr(ssl_context, "wrap_socket"):
            raise ValidationError([("ssl_context", "must be an ssl.SSLContext")])
        self._transport = _Transport(ssl_context)
        self.agents = Agents(
            Responses(self._transport, api_key, server_url, timeout_ms, retry_config)
        )

    def close(self) -> None:
        """Close the idle connections. A later call works, but keeps none."""
        self._transport.close()

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    async def __aenter__(self) -> "Self":
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.close()


def _takes_alone(
    call: "Callable[P, Any]",
) -> "Callable[[Callable[..., T]], Callable[P, T]]":
    """Give a function of **given the parameters of a call."""
    return lambda function: cast(Any, _show_parameters(function, call))


@_takes_alone(_SingleCall)
def create_response(
    agent_key: str, message: Union[str, MessageLike], **given: Any
) -> ResponseBody:
    """Make one call, with a client of its own. See `Orq` and `Responses.create`."""
    client = {name: given.pop(name, None) for name in ("api_key", "ssl_context")}
    with Orq(**client) as orq:
        create = orq.agents.responses.create
        return create(agent_key=agent_key, message=message, **given)


# --- Command line -----------------------------------------------------------


def _print(stream: Any, text: str) -> None:
    """Print in any locale: what the stream cannot show is escaped."""
    if stream is None:
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()
    except OSError:
        # what is still held back must not fail again when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if stream is not sys.stderr:  # whose failure changes no outcome
            raise


def _fail(option: str, problem: str) -> "NoReturn":
    raise ValidationError([(option, problem)])


def _option_name(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _option_parser() -> "argparse.ArgumentParser":
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> "NoReturn":
            _fail("usage", f"{_one_line(message)} (--help says more)")

    parser = Parser(
        "orq_min.py",
        "%(prog)s [options] AGENT_KEY [MESSAGE]",
        "Send a message to an Orq.ai agent and print what it says.",
        "ORQ_API_KEY is the key, ORQ_BASE_URL the server. Exit status: 0 answered,"
        " 1 the service answered with an error, 2 wrong usage or request, nothing"
        " sent, 3 no answer, 130 interrupted.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    about = "the agent's key or id, and a text; '-' or none: standard input"
    add("words", metavar="AGENT_KEY [MESSAGE]", nargs="*", help=about)
    add("--file", metavar="PATH|URL", action="append", help="attach it")
    about = "answer a tool call"
    add("--tool-result", metavar="CALL_ID=JSON", action="append", help=about)
    for name, (item, shape) in _json_fields(_Call).items():
        option, about = _option_name(name), item.metadata["about"]
        if shape.plain is bool:
            add(option, action="store_true", help=about)
        elif shape.plain is str:
            add(option, metavar="ID", help=about)
        elif name == "message":
            add(option, metavar="JSON|@FILE", help="a whole message")
        elif shape.models:
            add(option, metavar="ID|JSON|@FILE", help=about)
        else:
            add(option, metavar="NAME=VALUE|JSON|@FILE", action="append", help=about)
    add("--extra-body", metavar="JSON|@FILE", help="fields that this file lacks")
    add("--server-url", metavar="URL", help="instead of ORQ_BASE_URL")
    add("--timeout", metavar="SECONDS", type=float, help="for an attempt (600)")
    group = parser.add_mutually_exclusive_group()
    again = "try whatever failed again, even if the agent runs twice"
    group.add_argument("--retry", action="store_true", help=again)
    group.add_argument("--no-retry", action="store_true", help="try once")
    add("--json", action="store_true", help="print the whole answer")
    add("--dry-run", action="store_true", help="print the request, send nothing")
    about = "tell what happens; alone, the version"
    add("-v", "--verbose", action="store_true", help=about)
    add("--version", action="version", version=f"orq_min {__version__}")
    return parser


def _recode(word: str) -> str:
    """UTF-8 text that Python took for another encoding, as in an ASCII locale."""
    if re.search("[\udc80-\udcff]", word):
        return os.fsencode(word).decode("utf-8", "surrogateescape")
    return word


_JSON_OR_FILE = r"@|\s*[{[]"  # how an option begins that is not just a word


def _json_option(option: str, text: str) -> Any:
    """JSON text, or what @FILE holds."""
    try:
        if text.startswith("@"):
            with open(text[1:], encoding="utf-8-sig") as stream:
                return json.loads(stream.read())
        return json.loads(_recode(text))
    except OSError as error:
        _fail(option, f"cannot read {text[1:]!r}: {error.strerror}")
    except (ValueError, RecursionError) as error:
        _fail(option, f"is not JSON: {error}")


def _read_option(name: str, given: Any) -> Any:
    """What an option that stands for a field of the body says."""
    option, shape = _option_name(name), _json_fields(_Call)[name][1]
    if shape.models and re.match(_JSON_OR_FILE, given):
        return _json_option(option, given)
    if shape.models:  # a word is the id, the first field of each
        return {next(iter(_json_fields(shape.models[0]))): _recode(given)}
    if not isinstance(given, list):
        return _recode(given) if isinstance(given, str) else given
    merged: Dict[str, Any] = {}
    for text in given:
        key, equals, value = _recode(text).partition("=")
        is_pair = equals and not re.match(_JSON_OR_FILE, text)
        pairs = {key: value} if is_pair else _json_option(option, text)
        if not isinstance(pairs, dict):
            _fail(option, "must be an object")
        for key in pairs:
            if key in merged:
                _fail(option, f"{key!r} is given twice")
        merged.update(pairs)
    return merged


def _tool_result(text: str) -> ToolResultPart:
    # an id may end in "=" (base64), with which no JSON begins
    match = re.match(r'(.+?)=\s*([@[{"0-9-]|true|false|null)', text, re.DOTALL)
    if not match:
        _fail("--tool-result", f"{text!r} is not CALL_ID=JSON")
    result = _json_option("--tool-result", text[match.start(2) :])
    return ToolResultPart(_recode(match[1]), result)


def _read_stdin() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        _fail("MESSAGE", "required (--help says more)")
    try:
        data = getattr(sys.stdin, "buffer", sys.stdin).read()
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        _fail("standard input", f"cannot be read as UTF-8 text: {error}")
    return re.sub(r"\r?\n\Z", "", text)


def _read_message(options: Any) -> Any:
    """What MESSAGE, --message, --file, --tool-result and standard input say."""
    text, files, results = options.text, options.file or [], options.tool_result or []
    plain = text is not None or bool(files)
    if plain + bool(results) + (options.message is not None) > 1:
        _fail("usage", "give one: --message, --tool-result, or MESSAGE and --file")
    if options.message is not None:
        return _json_option("--message", options.message)
    if results:
        return A2AMessage("tool", [_tool_result(text) for text in results])
    if text == "-" or not plain:
        text = _read_stdin()
    parts: List[Any] = [TextPart(text)] if text and text.strip() else []
    for place in files:
        is_url = re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", place)
        try:
            parts.append((FilePart.from_uri if is_url else FilePart.from_path)(place))
        except OSError as error:
            _fail("--file", f"cannot read {place!r}: {error.strerror}")
    if not parts:
        _fail("MESSAGE", "must not be empty (--help says more)")
    return A2AMessage("user", parts)


def _print_answer(answer: ResponseBody, options: Any) -> None:
    import shlex

    text = str(answer.task_id or "") if options.background else answer.text
    if options.json:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        is_unicode = encoding.lower().startswith("utf")
        style: Dict[str, Any] = {"ensure_ascii": not is_unicode}
        try:
            text = json.dumps(answer.raw, indent=2, **style)
        except RecursionError:  # Python 3.12 reads deeper than it indents
            text = json.dumps(answer.raw, **style)
    if text:
        _print(sys.stdout, text)
    task_id = answer.task_id if isinstance(answer.task_id, str) else ""
    task = f"--task-id={shlex.quote(task_id)}" if task_id else ""
    for call in _items(answer.pending_tool_calls, PendingToolCalls):
        function = call.function if isinstance(call.function, Function) else Function()
        reply = f"{task} --tool-result={shlex.quote(f'{call.id}=JSON')}"
        line = f"{function.name}({function.arguments}) waits for its result: {reply}"
        if isinstance(call.id, str):
            _print(sys.stderr, _one_line(f"orq_min: {line}"))
    if task and sys.stderr is not None and sys.stderr.isatty():
        _print(sys.stderr, _one_line(f"orq_min: continue with {task}"))


def _tick(done: threading.Event) -> None:
    """Show the seconds that pass, if a terminal is there."""
    if sys.stderr is None or not sys.stderr.isatty():
        return
    started = time.monotonic()
    while not done.wait(1):
        sys.stderr.write(f"\r{time.monotonic() - started:.0f} s ")
        sys.stderr.flush()
    sys.stderr.write("\r")


def _parse(argv: List[str]) -> Any:
    parser = _option_parser()
    end = argv.index("--") if "--" in argv else len(argv)  # what follows is text
    options = parser.parse_intermixed_args(argv[:end])
    words = [_recode(word) for word in options.words + argv[end + 1 :]]
    if len(words) > 2 or not (words or options.verbose):
        parser.error("AGENT_KEY and at most one MESSAGE are wanted")
    options.agent_key, options.text = (*words, None, None)[:2]
    return options


def _run_command(argv: List[str]) -> None:
    options = _parse(argv)
    _log.setLevel(logging.DEBUG if options.verbose else logging.INFO)
    if options.agent_key is None:
        return _print(sys.stdout, f"orq_min {__version__}")
    call = {"agent_key": options.agent_key, "message": _read_message(options)}
    for name in list(_json_fields(_Call))[1:]:
        given = getattr(options, name)
        call[name] = None if given is None else _read_option(name, given)
    if options.extra_body is not None:
        call["extra_body"] = _json_option("--extra-body", options.extra_body)
    if options.timeout is not None:
        call["timeout_ms"] = options.timeout * 1000
    if options.retry or options.no_retry:
        call["retries"] = RetryConfig() if options.retry else None
    with Orq("***" if options.dry_run else None, server_url=options.server_url) as orq:
        if options.dry_run:
            prepared = orq.agents.responses.prepare(**call)
            lines = [f"{prepared.method} {prepared.url}"]
            lines += [f"{name}: {value}" for name, value in prepared.headers.items()]
            return _print(sys.stdout, "\n".join([*lines, "", prepared.body.decode()]))
        done = threading.Event()
        clock = threading.Thread(target=_tick, args=(done,), daemon=True)
        clock.start()
        try:
            answer = orq.agents.responses.create(**call)
        finally:
            done.set()
            clock.join()
    _print_answer(answer, options)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; return its exit status."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("orq_min: %(message)s"))
    _log.addHandler(handler)
    try:
        _run_command(list(sys.argv[1:] if argv is None else argv))
        return 0
    except OrqError as error:
        _print(sys.stderr, f"orq_min: {error}")
        return {ValidationError: 2, APIError: 1}.get(type(error), 3)
    except OSError as error:  # of standard output
        if isinstance(error, BrokenPipeError):  # `| head -1` has seen enough
            return 0
        _print(sys.stderr, f"orq_min: cannot print the answer: {error.strerror}")
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        _log.removeHandler(handler)
        _log.setLevel(logging.NOTSET)


if __name__ == "__main__":
    sys.exit(main())

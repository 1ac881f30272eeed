# SPDX-License-Identifier: MIT-0
# orq_min.py 1.0.0: Orq.ai's create-response operation in one file.
"""Send a message to an Orq.ai agent and get back what it did.

One file, Python 3.7 or newer, the standard library alone: copy it and import it.

    from orq_min import Orq

    with Orq() as orq:  # the key is in ORQ_API_KEY
        res = orq.agents.responses.create(agent_key="my-agent", message="Hello")
        print(res.text, res.task_id)

A quick script needs one line, `create_response("my-agent", "Hello").text`; a
program on asyncio awaits `create_async`; a shell runs `python3 orq_min.py --help`.

What goes out is checked first: all that is wrong is said at once, by its path, and
nothing is sent. What comes back is kept: no 200 that holds a JSON object is refused.
An agent run costs money and is not idempotent, so by default only those failures
are retried after which the agent cannot have run.

    OrqError                 base of every error of this module
      ValidationError        the call is wrong; nothing was sent (a ValueError too)
      APIError               the server answered, and not with a usable 200
      APIConnectionError     no complete answer came
        APITimeoutError      ... in time

Environment: ORQ_API_KEY, ORQ_BASE_URL, the proxy variables that urllib reads, and
OpenSSL's SSL_CERT_FILE and SSL_CERT_DIR. Logger: this module's name; each retry is
logged at INFO, each attempt at DEBUG, never with a header or a body.
"""

import datetime
import email.message
import email.utils
import enum
import functools
import http.client
import io
import itertools
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
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, NamedTuple
from typing import Optional, Sequence, Tuple, Type, TypeVar, Union, cast

if TYPE_CHECKING:  # what Python 3.7 lacks, or a call may not need
    import argparse
    import ssl
    from typing import NoReturn, ParamSpec

    P = ParamSpec("P")

# ----------------------------------------------------------------------------
# Constants
# ----------------------------------------------------------------------------

__version__ = "1.0.0"

DEFAULT_SERVER = "https://my.orq.ai"
DEFAULT_TIMEOUT_MS = 600_000
MAX_TIMEOUT_MS = 2**31 - 1  # the most that a socket's timeout can hold
MAX_ANSWER_BYTES = 256 * 2**20
MAX_REDIRECTS = 5
IDLE_SECONDS = 4.0  # many servers close an idle connection after 5
KEEPALIVE_SECONDS = 60  # a NAT forgets a silent connection after some minutes
MAX_NESTING = 200  # levels of a free-form value; json gives up near 1000
MAX_INTEGER_BITS = 2_000  # Python may refuse to write out more than 640 digits
QUOTED_CHARACTERS = 500  # of a server's words in the text of an error
BLOCK_BYTES = 256 * 2**10  # read or sent at once

T = TypeVar("T")
Problems = List[Tuple[str, str]]  # (path, what is wrong there)

_log = logging.getLogger(__name__)


class _Unset(enum.Enum):
    UNSET = "not given"


UNSET = _Unset.UNSET  # for `retries`, where None has a meaning of its own

# ----------------------------------------------------------------------------
# Errors
# ----------------------------------------------------------------------------

# Each takes its text as the only positional argument and keeps the rest as plain
# attributes: all that pickle and copy need.


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

    def __init__(self, text: str, **attributes: Any) -> None:
        super().__init__(text)
        self.status_code: int = attributes.get("status_code", 0)
        self.headers = attributes.get("headers") or email.message.Message()
        self.body: str = attributes.get("body", "")
        self.data: Any = attributes.get("data")
        self.message: str = attributes.get("message", "")


class APIConnectionError(OrqError):
    """No complete answer came.

    `sent`: the whole request had left, so the agent may have run.
    `temporary`: another attempt may do better.
    """

    def __init__(self, text: str, sent: bool = False, temporary: bool = True) -> None:
        super().__init__(text)
        self.sent = sent
        self.temporary = temporary


class APITimeoutError(APIConnectionError):
    """No complete answer came in time."""


# ----------------------------------------------------------------------------
# Request types
# ----------------------------------------------------------------------------

# A field is declared once: its type, one line about it, its JSON name where that
# differs, and a check where the type does not say all. Checking, JSON, the class's
# docstring and the command line's options follow. The rules are those of the
# service's published schema (operation CreateAgentResponse).


def _about(
    text: str, json_name: str = "", check: Optional[Callable[[Any], str]] = None
) -> Dict[str, Any]:
    """A field's metadata; `check` returns what is wrong with a value, or ''."""
    return {"about": text, "json_name": json_name, "check": check}


def _optional(*about: Any, default: Any = None) -> Any:
    return field(default=default, metadata=_about(*about))


def _one_of(*choices: str) -> Callable[[Any], str]:
    problem = "must be " + " or ".join(map(repr, choices))
    return lambda value: "" if value in choices else problem


def _kind(name: str) -> Any:
    return _optional(f"always {name!r}", "", _one_of(name), default=name)


def _base64_problem(value: str) -> str:
    alphabet = string.ascii_letters + string.digits + "+/=-_\r\n"
    # translate, as a regular expression takes a second for a large file
    if value.encode("utf-8", "replace").translate(None, alphabet.encode()):
        return "must be base64 text (FilePart.from_path makes it of a file)"
    return "" if value else "must not be empty"


class _Declared:
    """Base of the dataclasses: completes the docstring from the fields."""

    def __init_subclass__(cls) -> None:
        lines = [cls.__doc__ or cls.__name__, ""]
        for name, value in vars(cls).items():
            if isinstance(value, Field) and value.metadata:
                lines.append(f"    {name}: {value.metadata['about']}")
        cls.__doc__ = "\n".join(lines)


class _Checked(_Declared):
    """Base of the dataclasses whose values are checked when one is built."""

    def __post_init__(self) -> None:
        problems: Problems = []
        _encode_object((type(self),), self, "", problems)
        if problems:
            raise ValidationError(problems)


@dataclass
class TextPart(_Checked):
    """Text."""

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
    """Where a file is to be had."""

    uri: str = field(metadata=_about("URL of the content"))
    mime_type: Optional[str] = _optional("MIME type", "mimeType")
    name: Optional[str] = _optional("name of the file")


@dataclass
class FilePart(_Checked):
    """A file. `from_path` and `from_uri` build one."""

    file: Union[BinaryFormat, FileInURIFormat, Mapping[str, Any]] = field(
        metadata=_about("its content, or where it is to be had")
    )
    metadata: Optional[Mapping[str, Any]] = _optional("any values")
    kind: str = _kind("file")

    @classmethod
    def from_path(cls, path: "Union[str, os.PathLike[str]]") -> "FilePart":
        """Attach the file at `path`, read now, its MIME type guessed from its name.

        Raises OSError if it can't be read, ValidationError if it is empty.
        """
        import base64

        with open(path, "rb") as stream:
            text = base64.b64encode(stream.read()).decode("ascii")
        if not text:
            raise ValidationError([("path", f"{os.fspath(path)!r} is empty")])
        name = os.path.basename(os.fspath(path))
        return cls(BinaryFormat(text, _guess_mime_type(name), name))

    @classmethod
    def from_uri(cls, uri: str) -> "FilePart":
        """Attach the file at `uri`, for the service to fetch; MIME type guessed."""
        name = uri.partition("?")[0].rpartition("/")[2] if isinstance(uri, str) else ""
        return cls(FileInURIFormat(uri, _guess_mime_type(name)))


def _guess_mime_type(name: str) -> Optional[str]:
    import mimetypes

    mime_type, encoding = mimetypes.guess_type(name)
    if encoding:  # of report.tar.gz, what is sent is the gzip file
        return "application/gzip" if encoding == "gzip" else None
    return mime_type


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
        metadata=_about("'user' or 'tool'", check=_one_of("user", "tool"))
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


Message = Union[A2AMessage, Mapping[str, Any]]
AContact = Union[Contact, Mapping[str, Any]]
AThread = Union[CreateAgentResponseThread, Mapping[str, Any]]
AMemory = Union[Memory, Mapping[str, Any]]


@dataclass
class CreateAgentResponseRequestBody(_Declared):
    """What a request carries."""

    message: Message = field(metadata=_about("the message; plain text is the user's"))
    task_id: Optional[str] = _optional("inactive task to continue")
    variables: Optional[Mapping[str, Any]] = _optional("values for the templates")
    contact: Optional[AContact] = _optional("on whose behalf the agent runs")
    thread: Optional[AThread] = _optional("what groups requests")
    memory: Optional[AMemory] = _optional("whose memories the agent uses")
    metadata: Optional[Mapping[str, Any]] = _optional("any values, for the traces")
    background: Optional[bool] = _optional(
        "answer at once and let the agent run on", default=False
    )


# ----------------------------------------------------------------------------
# Answer types
# ----------------------------------------------------------------------------

# The annotations are what the schema promises. What comes is not checked but kept:
# a field that did not come is None, one of another type stays as it came, and one
# that is unknown here becomes an attribute of its own name.


@dataclass
class DataPart(_Declared):
    """Structured data."""

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
    """What went wrong in the run."""

    error: str = field(metadata=_about("what went wrong"))
    code: Optional[float] = _optional("a number for it")
    kind: str = _kind("error")


if TYPE_CHECKING:
    OutputPart = Any  # so that `res.output[0].parts[0].text` needs no cast
else:
    OutputPart = Union[
        TextPart, FilePart, DataPart, ToolCallPart, ToolResultPart, ErrorPart
    ]


@dataclass
class Output(_Declared):
    """A message of the run."""

    message_id: str = _optional("a ULID", "messageId")
    role: str = _optional("'user', 'agent', 'tool' or 'system'")
    parts: List[OutputPart] = field(
        default_factory=list, metadata=_about("parts; one of an unknown kind is a dict")
    )
    metadata: Optional[Dict[str, Any]] = _optional("any values")


@dataclass
class PromptTokensDetails(_Declared):
    """Kinds of tokens that went in."""

    cached_tokens: Optional[int] = _optional("read from a cache")
    cache_creation_tokens: Optional[int] = _optional("written to a cache")
    audio_tokens: Optional[int] = _optional("of sound")


@dataclass
class CompletionTokensDetails(_Declared):
    """Kinds of tokens that came out."""

    reasoning_tokens: Optional[float] = _optional("of reasoning")
    accepted_prediction_tokens: Optional[float] = _optional("predicted and used")
    rejected_prediction_tokens: Optional[float] = _optional("predicted, not used")
    audio_tokens: Optional[int] = _optional("of sound")


@dataclass
class CreateAgentResponseUsage(_Declared):
    """Tokens that the run used."""

    completion_tokens: float = _optional("tokens that came out")
    prompt_tokens: float = _optional("tokens that went in")
    total_tokens: float = _optional("both together")
    prompt_tokens_details: Optional[PromptTokensDetails] = _optional("kinds, in")
    completion_tokens_details: Optional[CompletionTokensDetails] = _optional(
        "kinds, out"
    )


@dataclass
class Function(_Declared):
    """What a tool call calls."""

    name: str = _optional("the tool")
    arguments: str = _optional("JSON text")


@dataclass
class PendingToolCalls(_Declared):
    """A tool call that waits for a ToolResultPart with its id."""

    id: str = _optional("the call's id")
    function: Function = _optional("what to call")
    type: str = _optional("always 'function'")


@dataclass
class Telemetry(_Declared):
    """Where the run is found in the traces."""

    trace_id: str = _optional("the trace")
    span_id: str = _optional("the span in it")


@dataclass
class CreateAgentResponseResponseBody(_Declared):
    """What the agent did: `text` is what it said, `raw` the whole decoded answer."""

    id: str = _optional("the response's id", "_id")
    task_id: str = _optional("hand it back to continue")
    output: List[Output] = field(
        default_factory=list, metadata=_about("the messages of the run")
    )
    created_at: str = _optional("ISO 8601 time")
    model: str = _optional("provider/model")
    usage: Optional[CreateAgentResponseUsage] = _optional("tokens used")
    finish_reason: Optional[str] = _optional("'stop', 'function_call' or another")
    pending_tool_calls: Optional[List[PendingToolCalls]] = _optional("open tool calls")
    telemetry: Optional[Telemetry] = _optional("where the run is found in the traces")
    raw: Dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def text(self) -> str:
        """The text of the agent's messages, with a newline between messages."""
        texts = []
        for message in self.output if isinstance(self.output, list) else ():
            if isinstance(message, Output) and message.role in ("agent", None):
                parts = message.parts if isinstance(message.parts, list) else []
                found = [part.text for part in parts if isinstance(part, TextPart)]
                texts.append("".join(text for text in found if isinstance(text, str)))
        return "\n".join(filter(None, texts))


# ----------------------------------------------------------------------------
# Checking and JSON
# ----------------------------------------------------------------------------

_TYPE_NAMES = {
    str: "text",
    bool: "true or false",
    float: "a number",
    list: "a list",
    dict: "an object",
}
_TEXT_LIKE = (str, bytes, bytearray, memoryview)  # sequences, but no lists


class _Type(NamedTuple):
    """What an annotation says."""

    plain: Any  # str, bool, float, list, dict or Any; None for dataclasses alone
    models: Tuple[Type[Any], ...]  # the dataclasses that a value may be one of
    items: Any  # the annotation of a list's items


@functools.lru_cache(maxsize=None)
def _read_annotation(annotation: Any) -> _Type:
    origin = getattr(annotation, "__origin__", annotation)
    if origin in (list, abc.Sequence):
        return _Type(list, (), annotation.__args__[0])
    if origin in (dict, abc.Mapping):
        return _Type(dict, (), Any)
    if is_dataclass(annotation):
        return _Type(None, (annotation,), Any)
    members = [_read_annotation(a) for a in getattr(annotation, "__args__", ())]
    members = [member for member in members if member.plain is not type(None)]
    if not members:
        return _Type(annotation, (), Any)
    models = tuple(model for member in members for model in member.models)
    return _Type(members[-1].plain, models, members[-1].items)


class _JSONField(NamedTuple):
    """A dataclass field that JSON has."""

    name: str
    json_name: str
    annotation: Any
    required: bool
    about: str
    check: Callable[[Any], str]


@functools.lru_cache(maxsize=None)
def _json_fields(model: Type[Any]) -> Tuple[_JSONField, ...]:
    return tuple(
        _JSONField(
            item.name,
            item.metadata["json_name"] or item.name,
            item.type,
            item.default is MISSING and item.default_factory is MISSING,
            item.metadata["about"],
            item.metadata["check"] or (lambda value: ""),
        )
        for item in fields(model)
        if item.metadata
    )


def _choose(models: Sequence[Type[Any]], given: Mapping[Any, Any]) -> Any:
    """The model of an object: by its `kind`, else by what only that model has."""
    if len(models) == 1:
        return models[0]
    for model in models:
        first, kind = _json_fields(model)[0], getattr(model, "kind", None)
        if kind and given.get("kind") == kind:
            return model
        if not kind and (first.name in given or first.json_name in given):
            return model
    return None


def _at(path: str, key: Any) -> str:
    if not isinstance(key, str) or not key.isidentifier():
        return f"{path}[{key!r}]"
    return f"{path}.{key}" if path else key


def _is_list(value: Any) -> bool:
    return isinstance(value, abc.Sequence) and not isinstance(value, _TEXT_LIKE)


def _encode(annotation: Any, value: Any, path: str, problems: Problems) -> Any:
    """The JSON form of a field's value; what is wrong with it joins `problems`."""
    plain, models, items = _read_annotation(annotation)
    is_mapping = isinstance(value, abc.Mapping)
    if isinstance(value, models) or (models and plain is dict and is_mapping):
        return _encode_object(models, value, path, problems)
    if plain is Any or (plain is dict and not models and is_mapping):
        return _encode_free(value, path, problems)
    if plain is list and _is_list(value):
        places = enumerate(value)
        return [_encode(items, item, f"{path}[{n}]", problems) for n, item in places]
    if plain in (str, bool) and isinstance(value, plain):
        return value
    if plain is float and type(value) in (int, float) and math.isfinite(value):
        return value
    wanted = " or ".join(model.__name__ for model in models) or _TYPE_NAMES[plain]
    given = repr(value) if type(value) is float else _type_name(value)
    problems.append((path, f"must be {wanted}, not {given}"))
    return None


def _type_name(value: Any) -> str:
    return "None" if value is None else type(value).__name__


def _encode_object(
    models: Tuple[Type[Any], ...], value: Any, path: str, problems: Problems
) -> Dict[str, Any]:
    """The JSON form of a dataclass of ours, or of a mapping that stands for one."""
    is_model = isinstance(value, models)
    given = dict(vars(value) if is_model else value)
    model = type(value) if is_model else _choose(models, given)
    encoded: Dict[str, Any] = {}
    if model is None:
        problems.append(_no_model(models, given, path))
        return encoded
    for item in _json_fields(model):
        names = [n for n in dict.fromkeys((item.json_name, item.name)) if n in given]
        where = _at(path, names[0] if names else item.json_name)
        values = [given.pop(name) for name in names]
        if len(values) > 1:
            problems.append((where, f"given twice, as {names[1]!r} too"))
        elif values and values[0] is not None:
            known = len(problems)
            encoded[item.json_name] = _encode(
                item.annotation, values[0], where, problems
            )
            problem = item.check(values[0]) if len(problems) == known else ""
            problems.extend([(where, problem)] if problem else [])
        elif item.required:
            problems.append((where, "required"))
    if not is_model:
        names = [item.json_name for item in _json_fields(model)]
        problems.extend((_at(path, key), _unknown(key, names)) for key in given)
    return encoded


def _no_model(
    models: Sequence[Type[Any]], given: Mapping[Any, Any], path: str
) -> Tuple[str, str]:
    kinds = [getattr(model, "kind", "") for model in models]
    if not all(kinds):
        names = [repr(_json_fields(model)[0].json_name) for model in models]
        return path, f"must have {' or '.join(names)}"
    known = given.get("kind") is not None
    return _at(path, "kind"), _one_of(*kinds)(None) if known else "required"


def _unknown(name: Any, names: Sequence[str]) -> str:
    import difflib

    close = difflib.get_close_matches(str(name)[:80], names, 1)
    return "unknown field" + (f" (did you mean {close[0]!r}?)" if close else "")


def _encode_free(
    value: Any, path: str, problems: Problems, parents: Tuple[int, ...] = ()
) -> Any:
    """The JSON form of a free-form value (contract: Request).

    `parents` holds the ids of the containers that it is in.
    """
    if isinstance(value, enum.Enum):
        return _encode_free(value.value, path, problems, parents)
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, int) and value.bit_length() <= MAX_INTEGER_BITS:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, (datetime.date, datetime.time)):  # a datetime is a date
        text = value.isoformat()
        return text[: -len("+00:00")] + "Z" if text.endswith("+00:00") else text
    if not isinstance(value, type) and (
        is_dataclass(value)
        or isinstance(value, (abc.Mapping, abc.Set))
        or _is_list(value)
    ):
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
        return [
            _encode_free(item, f"{path}[{index}]", problems, parents)
            for index, item in enumerate(value)
        ]
    encoded: Dict[str, Any] = {}
    for key, item in value.items():
        name = key.value if isinstance(key, enum.Enum) else key
        where = _at(path, name)
        if isinstance(name, bool) or not isinstance(name, (str, int)):
            problems.append((where, "a name must be text or an integer"))
        elif str(name) in encoded:
            problems.append((where, "given twice"))
        else:
            encoded[str(name)] = _encode_free(item, where, problems, parents)
    return encoded


def _decode(annotation: Any, value: Any) -> Any:
    """What an annotation makes of a JSON value; what does not fit it stays."""
    plain, models, items = _read_annotation(annotation)
    if plain is list and isinstance(value, list):
        return [_decode(items, item) for item in value]
    model = _choose(models, value) if models and isinstance(value, dict) else None
    return _decode_object(model, value) if model else value


def _decode_object(model: Type[T], given: Mapping[str, Any]) -> T:
    decoded = model.__new__(model)  # not built: a request part would be checked
    rest = dict(given)
    for item in _json_fields(model):
        value = rest.pop(item.json_name, None)
        if value is None and getattr(item.annotation, "__origin__", None) is list:
            value = []  # `output` and `parts`, which programs loop over
        vars(decoded)[item.name] = _decode(item.annotation, value)
    for name, value in rest.items():
        if not name.startswith("_") and not hasattr(model, name):
            vars(decoded)[name] = value
    return decoded


def _decode_answer(data: Dict[str, Any]) -> CreateAgentResponseResponseBody:
    given = dict(data)
    if "_id" not in given and "id" in given:  # a task (contract: Answers)
        given["_id"] = given.pop("id")
        given.setdefault("task_id", given["_id"])
    answer = _decode_object(CreateAgentResponseResponseBody, given)
    answer.raw = data
    return answer


def _decode_text(body: bytes) -> str:
    return body.decode(json.detect_encoding(body), "replace")


def _decode_json(text: str) -> Any:
    """The value, or None where the text is not JSON."""

    def read_integer(digits: str) -> Union[int, str]:
        try:
            return int(digits)
        except ValueError:  # more digits than Python reads: CVE-2020-10735
            return digits

    try:
        return json.loads(text, parse_int=read_integer)
    except (ValueError, RecursionError):
        return None


def _server_words(data: Any) -> str:
    """What an error's JSON says, in one of the shapes seen (contract: Answers)."""
    error = data.get("error") if isinstance(data, dict) else None
    inner = error.get("message") if isinstance(error, dict) else error
    words = [data.get("message"), inner] if isinstance(data, dict) else []
    return next((word for word in words if isinstance(word, str) and word), "")


# ----------------------------------------------------------------------------
# Retry policy
# ----------------------------------------------------------------------------


def _negative(value: float) -> str:
    return "must not be negative" if value < 0 else ""


def _not_statuses(value: Sequence[str]) -> str:
    wrong = [v for v in value if not re.fullmatch("[1-5]([0-9]{2}|[xX]{2})", v)]
    return f"{wrong[0]!r} is not a status such as '429' or '5XX'" if wrong else ""


@dataclass
class BackoffStrategy(_Checked):
    """How long to wait between attempts, in milliseconds."""

    initial_interval: float = _optional("the first wait", "", _negative, default=500)
    max_interval: float = _optional("the longest wait", "", _negative, default=60_000)
    exponent: float = _optional("factor per attempt", "", _negative, default=1.5)
    max_elapsed_time: float = _optional(
        "no wait begins that would end later", "", _negative, default=3_600_000
    )
    jitter_ms: Optional[float] = _optional(
        "the most to add at random; None: each wait is shortened by up to a quarter",
        "",
        _negative,
    )


@dataclass
class RetryConfig(_Checked):
    """What to try again. None in its place, or strategy 'none', tries once."""

    strategy: str = _optional(
        "'backoff' or 'none'", "", _one_of("backoff", "none"), default="backoff"
    )
    backoff: BackoffStrategy = field(
        default_factory=BackoffStrategy, metadata=_about("how long to wait")
    )
    retry_connection_errors: bool = _optional(
        "also when no complete answer came, even if the agent may have run",
        default=True,
    )
    status_codes_override: Optional[Sequence[str]] = _optional(
        "instead of 429, 500, 502, 503 and 504; '5XX' is a class", "", _not_statuses
    )


class _Policy(NamedTuple):
    """A row of the retry table for each field."""

    unsent: bool  # the request never completely left
    sent: bool  # it left, and no complete answer came
    statuses: Sequence[str]
    backoff: BackoffStrategy


# An agent run is not idempotent (RFC 9110, section 9.2.2): not for a failure after
# which the agent may have run. 429 and 503 say that it has not.
_DEFAULT_POLICY = _Policy(
    True, False, ("429", "503"), BackoffStrategy(500, 8_000, 2, 30_000)
)


def _policy(config: Optional[RetryConfig]) -> _Policy:
    if config is None or config.strategy == "none":
        return _Policy(False, False, (), BackoffStrategy())
    statuses = config.status_codes_override
    if statuses is None:
        statuses = ("429", "500", "502", "503", "504")
    connection = config.retry_connection_errors
    return _Policy(connection, connection, statuses, config.backoff)


def _should_retry(error: OrqError, policy: _Policy) -> bool:
    if isinstance(error, APIConnectionError):
        return error.temporary and (policy.sent if error.sent else policy.unsent)
    if not isinstance(error, APIError) or error.status_code == 200:
        return False
    status = str(error.status_code)
    return bool({status, status[0] + "XX", status[0] + "xx"} & set(policy.statuses))


def _retry_wait(
    error: OrqError, policy: _Policy, attempt: int, elapsed: float
) -> Optional[float]:
    """Seconds to wait after failed attempt `attempt` (1 for the first).

    None if the wait would pass `max_elapsed_time`, `elapsed` seconds being over.
    """
    backoff = policy.backoff
    wait = _asked_wait(error.headers) if isinstance(error, APIError) else None
    if wait is None:
        try:
            grown = backoff.initial_interval * float(backoff.exponent) ** (attempt - 1)
        except OverflowError:
            grown = backoff.max_interval
        if backoff.jitter_ms is None:
            wait = min(grown, backoff.max_interval) * random.uniform(0.75, 1) / 1000
        else:
            grown += random.uniform(0, backoff.jitter_ms)
            wait = min(grown, backoff.max_interval) / 1000
    return None if elapsed + wait > backoff.max_elapsed_time / 1000 else wait


def _asked_wait(headers: email.message.Message) -> Optional[float]:
    """Seconds that the server asks for, the more precise header first."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1)):
        try:
            wait = float(headers.get(name, "")) * unit
        except ValueError:
            continue
        if 0 < wait < math.inf:
            return wait
    try:  # a date: RFC 9110, section 10.2.3
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
        wait = date.timestamp() - time.time()
    except (TypeError, ValueError, IndexError, OverflowError):
        return None
    return wait if wait > 0 else None


# ----------------------------------------------------------------------------
# Transport
# ----------------------------------------------------------------------------

# urllib.request routes a request: its opener holds the proxy handler and the one
# below, and neither follows a redirect nor raises for a status. http.client reads
# the answer. The connection, its deadline and its reuse are ours.


@dataclass
class PreparedRequest:
    """A request that was checked and is ready to send. Its repr holds no secret."""

    method: str
    url: str
    headers: Dict[str, str] = field(repr=False)
    body: bytes = field(repr=False)
    timeout: float  # seconds for one attempt
    policy: _Policy

    def mask(self, text: str) -> str:
        """The text without the key, however it may be escaped there."""
        scheme, _, key = self.headers["Authorization"].partition(" ")
        key = key or scheme
        for form in (key, json.dumps(key)[1:-1], urllib.parse.quote(key, safe="")):
            text = text.replace(form, "***") if form else text
        return text


class _Answer(NamedTuple):
    """A complete answer; `problem` says what is wrong with it as a whole."""

    status: int
    headers: email.message.Message
    body: bytes
    problem: str = ""


class _Cancellation:
    """Lets another thread end a call."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self._lock = threading.Lock()  # a connection given back is not shut down
        self._sock: Optional[socket.socket] = None

    def watch(self, sock: Optional[socket.socket]) -> None:
        """Take note of the socket in use; ConnectionError if the call has ended."""
        with self._lock:
            self._sock = sock
            if self.event.is_set():
                raise ConnectionAbortedError("cancelled")

    def cancel(self) -> None:
        with self._lock:
            self.event.set()
            if self._sock is not None:
                _shut_down(self._sock)


def _shut_down(sock: socket.socket) -> None:
    """Wake the thread that waits for the socket, without a word to the peer.

    SSLSocket.shutdown would have that thread go on in plain text.
    """
    try:
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
    except OSError:
        pass  # not connected yet, or no longer


class _Attempt(urllib.request.Request):
    """One request on its way."""

    def __init__(
        self,
        request: PreparedRequest,
        url: str,
        deadline: float,
        cancellation: _Cancellation,
    ) -> None:
        super().__init__(url, request.body, request.headers, method=request.method)
        self.request = request
        self.deadline = deadline  # of time.monotonic
        self.cancellation = cancellation
        self.sent = False  # the last byte of it has left

    def time_left(self) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise socket.timeout("the deadline has passed")
        return left


class _Stream(io.RawIOBase):
    """What a socket receives, up to the deadline of the attempt."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.attempt: Optional[_Attempt] = None  # None: nothing is to be read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> Optional[int]:
        if self.attempt is None:
            return None
        self._sock.settimeout(self.attempt.time_left())
        return self._sock.recv_into(buffer)


class _Reader(io.BufferedReader):
    def close(self) -> None:
        """Stay open: http.client closes after each answer, but others may follow."""


class _Connection:
    """A connection to a server or a proxy, used for one attempt at a time."""

    def __init__(self, sock: socket.socket, peer: Tuple[Any, ...]) -> None:
        self.sock = sock
        self.peer = peer
        self.process = os.getpid()
        self.idle_since = 0.0
        self._stream = _Stream(sock)
        self._reader = _Reader(self._stream)

    def makefile(self, mode: str) -> io.BufferedReader:
        """What HTTPResponse reads; bytes past an answer stay in it and are seen."""
        return self._reader

    def send(self, data: bytes, attempt: _Attempt) -> None:
        # not sendall: over TLS it would grant the timeout to each piece anew
        view = memoryview(data)
        while view:
            self.sock.settimeout(attempt.time_left())
            view = view[self.sock.send(view[:BLOCK_BYTES]) :]

    def read_head(self, method: str, attempt: _Attempt) -> http.client.HTTPResponse:
        """Status and headers of the final answer (RFC 9110, section 15.2)."""
        self._stream.attempt = attempt
        while True:
            response = http.client.HTTPResponse(cast(Any, self), method=method)
            response.begin()
            if response.status == 101 or not 100 <= response.status < 200:
                return response

    def exchange(self, attempt: _Attempt) -> Tuple[_Answer, bool]:
        """The answer, and whether the connection can serve another attempt."""
        broken: Optional[Exception] = None
        try:
            self._send_request(attempt)
        except ConnectionError as error:
            broken = error  # a server may answer (401, 413) and not read to the end
        try:
            response = self.read_head(attempt.get_method(), attempt)
            answer = _read_answer(response)
        except Exception as error:
            raise broken or error
        clean = not broken and not response.will_close and _is_framed(response)
        return answer, clean and not answer.problem and self._is_drained()

    def _send_request(self, attempt: _Attempt) -> None:
        lines = [f"{attempt.get_method()} {attempt.selector} HTTP/1.1"]
        lines += [f"{name.title()}: {value}" for name, value in attempt.header_items()]
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        body = attempt.request.body
        if len(body) < BLOCK_BYTES:  # in one packet where it fits
            self.send(head + body, attempt)
        else:
            self.send(head, attempt)
            self.send(body, attempt)
        attempt.sent = True

    def _is_drained(self) -> bool:
        self._stream.attempt = None
        pending = getattr(self.sock, "pending", None)  # decrypted, but not yet read
        return not self._reader.peek(1) and not (pending and pending())

    def is_usable(self, peer: Tuple[Any, ...]) -> bool:
        """Whether an idle one can serve an attempt to this peer, in this process."""
        fresh = time.monotonic() - self.idle_since < IDLE_SECONDS
        if not fresh or self.peer != peer or self.process != os.getpid():
            return False
        self.sock.settimeout(0)
        try:  # past TLS, which allows no peeking
            socket.socket.recv(self.sock, 1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False  # closed, or something came unasked

    def close(self) -> None:
        self.sock.close()


def _is_framed(response: http.client.HTTPResponse) -> bool:
    """Whether the end of the answer is beyond doubt (RFC 9112, section 6.3)."""
    lengths = response.headers.get_all("content-length", [])
    codings = response.headers.get_all("transfer-encoding", [])
    if codings:
        return not lengths and codings == ["chunked"]
    return len(lengths) == 1 and re.fullmatch("[0-9]+", lengths[0]) is not None


def _read_answer(response: http.client.HTTPResponse) -> _Answer:
    """The whole answer; raises where it breaks off before its end."""
    status, headers = response.status, response.headers
    body = bytearray()
    source: Any = response
    if headers.get("content-encoding", "").strip().lower() in ("gzip", "x-gzip"):
        import gzip

        source = gzip.GzipFile(fileobj=cast(Any, response))
    while True:
        block = source.read(BLOCK_BYTES)
        if not block:
            break
        if len(body) + len(block) > MAX_ANSWER_BYTES:
            limit = f"{MAX_ANSWER_BYTES >> 20} MiB"
            return _Answer(status, headers, b"", f"the answer is larger than {limit}")
        body += block
    if response.length:  # read(amount) does not tell
        raise http.client.IncompleteRead(b"", response.length)
    return _Answer(status, headers, bytes(body))


class _ConnectionHandler(urllib.request.BaseHandler):
    """Performs an attempt for urllib's opener, on a kept connection or a new one.

    A list's pop, append and remove are atomic, so that no lock is needed, which a
    fork could leave locked for ever.
    """

    def __init__(self, context: "Optional[ssl.SSLContext]") -> None:
        self._context = context
        self._context_lock = threading.Lock()
        self._idle: List[_Connection] = []
        self._closed = False

    def http_open(self, attempt: _Attempt) -> _Answer:
        tunnel = getattr(attempt, "_tunnel_host", None)  # set by Request.set_proxy
        credentials = attempt.headers.get("Proxy-authorization")
        if tunnel:  # they are for the proxy, the rest is for the server
            attempt.headers.pop("Proxy-authorization", None)
        peer = (attempt.type, attempt.host, tunnel, credentials)
        connection = self._take(peer)
        try:
            if connection is None:
                connection = _Connection(self._connect(attempt, credentials), peer)
            attempt.cancellation.watch(connection.sock)
            answer, clean = connection.exchange(attempt)
            attempt.cancellation.watch(None)
        except BaseException:
            if connection is not None:
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

    def _take(self, peer: Tuple[Any, ...]) -> Optional[_Connection]:
        """A kept connection to this peer, the one used last first."""
        for connection in self._idle[::-1]:
            try:
                self._idle.remove(connection)
            except ValueError:
                continue  # another thread took it
            if connection.is_usable(peer):
                return connection
            connection.close()
        return None

    def close(self) -> None:
        """Close what is idle; what is in use is closed when its answer has come."""
        self._closed = True
        while self._idle:
            try:
                self._idle.pop().close()
            except IndexError:
                break  # another thread took the last one

    def _connect(self, attempt: _Attempt, credentials: Optional[str]) -> socket.socket:
        tunnel = getattr(attempt, "_tunnel_host", None)
        default_port = 443 if attempt.type == "https" and not tunnel else 80
        host, port = _host_and_port(attempt.host, default_port)
        sock = _dial(host, port, attempt)
        try:
            if tunnel:
                _open_tunnel(sock, tunnel, credentials, attempt)
                host, _ = _host_and_port(tunnel, 443)
            if attempt.type == "https":
                sock = self._start_tls(sock, host, attempt)
        except BaseException:
            sock.close()
            raise
        return sock

    def _start_tls(
        self, sock: socket.socket, host: str, attempt: _Attempt
    ) -> "ssl.SSLSocket":
        with self._context_lock:
            if self._context is None:
                import ssl

                self._context = ssl.create_default_context()
        secured = self._context.wrap_socket(
            sock, server_hostname=host, do_handshake_on_connect=False
        )
        try:
            attempt.cancellation.watch(secured)
            secured.settimeout(attempt.time_left())
            secured.do_handshake()
        except BaseException:
            secured.close()
            raise
        return secured


def _host_and_port(netloc: str, default_port: int) -> Tuple[str, int]:
    parts = urllib.parse.urlsplit(f"//{netloc}")
    return parts.hostname or "", parts.port or default_port


def _dial(host: str, port: int, attempt: _Attempt) -> socket.socket:
    """Connect to the first address that answers; each has its share of the time."""
    failure: OSError = OSError(f"{host} has no address")
    addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for tried, (family, kind, protocol, _, address) in enumerate(addresses):
        sock = socket.socket(family, kind, protocol)
        try:
            attempt.cancellation.watch(sock)
            sock.settimeout(attempt.time_left() / (len(addresses) - tried))
            sock.connect(address)
            _keep_alive(sock)
            return sock
        except OSError as error:
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
    raise failure


def _keep_alive(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # TCP_KEEPALIVE is what macOS calls TCP_KEEPIDLE
    for name in ("TCP_KEEPIDLE", "TCP_KEEPALIVE", "TCP_KEEPINTVL"):
        if hasattr(socket, name):
            option = getattr(socket, name)
            sock.setsockopt(socket.IPPROTO_TCP, option, KEEPALIVE_SECONDS)


class _ProxyRefusal(OSError):
    """A proxy that would not open a tunnel."""


def _open_tunnel(
    sock: socket.socket, server: str, credentials: Optional[str], attempt: _Attempt
) -> None:
    """CONNECT through a proxy (RFC 9110, section 9.3.6)."""
    host, port = _host_and_port(server, 443)
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
    if credentials:
        lines.append(f"Proxy-Authorization: {credentials}")
    connection = _Connection(sock, ())
    connection.send("\r\n".join([*lines, "", ""]).encode("latin-1"), attempt)
    status = connection.read_head("CONNECT", attempt).status
    if not 200 <= status < 300:
        phrase = http.client.responses.get(status, "")
        raise _ProxyRefusal(f"it answered {status} {phrase}".rstrip())


class _Transport:
    """Brings a prepared request to its server, and a complete answer back."""

    def __init__(self, context: "Optional[ssl.SSLContext]") -> None:
        self._connections = _ConnectionHandler(context)
        self._opener = urllib.request.OpenerDirector()
        self._opener.add_handler(urllib.request.ProxyHandler())
        self._opener.add_handler(self._connections)

    def close(self) -> None:
        self._connections.close()

    __del__ = close

    def exchange(
        self, request: PreparedRequest, cancellation: _Cancellation
    ) -> _Answer:
        """Send, follow redirects within the origin (RFC 9110, section 15.4), read.

        Raises APIConnectionError where no complete answer comes.
        """
        url = request.url
        deadline = time.monotonic() + request.timeout
        for _ in range(MAX_REDIRECTS + 1):
            answer = self._attempt(_Attempt(request, url, deadline, cancellation))
            location = answer.headers.get("location")
            if not 300 <= answer.status < 400 or not location:
                return answer
            target = urllib.parse.urljoin(url, location)
            target = urllib.parse.quote(target, string.punctuation).partition("#")[0]
            refused = answer._replace(problem=f"redirect to {target} not followed")
            if answer.status not in (307, 308) or not _same_origin(target, url):
                return refused  # another method, or another place to send the key to
            url = target
        return refused

    def _attempt(self, attempt: _Attempt) -> _Answer:
        started = time.monotonic()
        result = "no answer"
        try:
            answer = self._opener.open(attempt)
            if not isinstance(answer, _Answer):
                raise ValueError("the proxy's URL is of an unknown kind")
            result = str(answer.status)
            return answer
        except Exception as error:
            raise _connection_error(error, attempt) from error
        finally:
            seconds = time.monotonic() - started
            url = attempt.request.mask(attempt.full_url)
            _log.debug(
                "%s %s: %s in %.3f s", attempt.get_method(), url, result, seconds
            )


def _connection_error(error: Exception, attempt: _Attempt) -> APIConnectionError:
    """What a failure means: whether the agent may have run, and whether to go on."""
    mask = attempt.request.mask
    what, temporary = _explain(error, attempt)
    # a traceback shows the cause as well, in which a server's words may be
    error.args = tuple(mask(arg) if isinstance(arg, str) else arg for arg in error.args)
    error.__context__ = None
    outcome = "the agent may have run, but" if attempt.sent else "not sent:"
    text = mask(f"{attempt.get_method()} {attempt.full_url}: {outcome} {what}")
    late = isinstance(error, (socket.timeout, TimeoutError))
    kind = APITimeoutError if late else APIConnectionError
    return kind(text, attempt.sent, temporary)


def _explain(error: Exception, attempt: _Attempt) -> Tuple[str, bool]:
    """(what went wrong, whether another attempt may do better)."""
    if isinstance(error, socket.timeout):
        return f"no complete answer came within {attempt.request.timeout:g} s", True
    if isinstance(error, _ProxyRefusal):
        return f"the proxy {attempt.host} opened no tunnel, {error}", False
    if isinstance(error, socket.gaierror):
        what = f"the name of {attempt.host} was not found ({error.strerror})"
        return what, error.errno == socket.EAI_AGAIN
    if hasattr(error, "verify_message"):  # an ssl.SSLCertVerificationError
        what = f"the certificate was not accepted ({getattr(error, 'verify_message')})"
        advice = "set SSL_CERT_FILE to its certificate, or pass an ssl_context"
        return f"{what}; for a private authority, {advice}", False
    if isinstance(error, ValueError) and not attempt.sent:
        error.args = ("not the URL of an HTTP proxy",)  # its password may be in it
        return f"the proxy setting is {error}", False
    if isinstance(error, http.client.RemoteDisconnected):
        return "the connection was closed without an answer", True
    if isinstance(error, (http.client.IncompleteRead, EOFError)):
        return "the answer broke off", True
    if isinstance(error, (http.client.HTTPException, ValueError)):
        return f"what came is not HTTP ({type(error).__name__})", True
    return getattr(error, "strerror", "") or str(error) or type(error).__name__, True


# An http(s) address and nothing else: no credentials, query, fragment, white space.
_ADDRESS = re.compile(
    r"(https?)://(\[[0-9a-f:.]+\]|[^][\s/?#@\\:%\x00-\x1f\x7f]+)(?::([0-9]{1,5}))?"
    r"(/[^\s?#\\\x00-\x1f\x7f]*)?",
    re.IGNORECASE,
)


def _read_address(url: str) -> Optional[Tuple[str, str, str]]:
    """(scheme, host with any port, path), all ASCII; None if it is no address."""
    match = _ADDRESS.fullmatch(url)
    if not match or not 0 < int(match[3] or 80) < 2**16:
        return None
    scheme = match[1].lower()
    try:
        host = match[2].lower().encode("idna").decode("ascii")
        path = urllib.parse.quote(match[4] or "", string.punctuation)
    except UnicodeError:
        return None
    port = int(match[3] or 0)
    default = {"http": 80, "https": 443}[scheme]
    return scheme, f"{host}:{port}" if port not in (0, default) else host, path


def _same_origin(url: str, other: str) -> bool:
    one, two = _read_address(url.partition("?")[0]), _read_address(other)
    return one is not None and two is not None and one[:2] == two[:2]


def _endpoint(server_url: Any, agent_key: Any, problems: Problems) -> str:
    """The URL of the operation for this agent (contract: Request)."""
    address = _read_address(server_url.strip()) if isinstance(server_url, str) else None
    if address is None:
        wanted = "http(s)://HOST[:PORT][/PATH], with no credentials, query or fragment"
        problems.append(("server_url", f"must be {wanted}"))
    segment = ""
    _encode(str, agent_key, "agent_key", problems)
    if isinstance(agent_key, str):
        try:
            segment = urllib.parse.quote(agent_key, safe="")
        except UnicodeEncodeError:
            problems.append(("agent_key", "has no UTF-8 form"))
        if agent_key.strip() in ("", ".", ".."):
            problems.append(("agent_key", "must be the key of an agent"))
    scheme, host, path = address or ("", "", "")
    return f"{scheme}://{host}{path.rstrip('/')}/v2/agents/{segment}/responses"


_OWN_HEADERS = ("host", "content-length", "transfer-encoding", "connection")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, section 5.6.2
_NO_HEADER_VALUE = re.compile(r"[\x00-\x1f\x7f-\x9f]|[^\x00-\xff]")
_BAD_VALUE = "must not have control characters or text outside latin-1"


def _request_headers(api_key: Any, extra: Any, problems: Problems) -> Dict[str, str]:
    """Our headers with the caller's in place of those that he gives."""
    key = api_key.strip() if isinstance(api_key, str) else ""
    if not key:
        problems.append(("api_key", "required (or set ORQ_API_KEY)"))
    if _NO_HEADER_VALUE.search(key):
        problems.append(("api_key", _BAD_VALUE))
    headers = {
        "Authorization": key if key[:7].lower() == "bearer " else f"Bearer {key}",
        "Content-Type": "application/json",
        "Accept": "application/json",
        "Accept-Encoding": "identity",
        "User-Agent": f"orq_min/{__version__}",
    }
    given = set()
    if extra is not None and not isinstance(extra, abc.Mapping):
        problems.append(("http_headers", f"must be an object, not {_type_name(extra)}"))
        return headers
    for name, value in (extra or {}).items():
        where = _at("http_headers", name)
        if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name):
            problems.append((where, "is not the name of a header"))
        elif name.lower() in _OWN_HEADERS:
            problems.append((where, "is set by the client alone"))
        elif name.lower() in given:
            problems.append((where, "given twice"))
        elif not isinstance(value, str) or _NO_HEADER_VALUE.search(value.strip()):
            wrong = _BAD_VALUE if isinstance(value, str) else "must be text"
            problems.append((where, wrong))
        else:
            given.add(name.lower())
            headers[name.title()] = value.strip()
    return headers


# ----------------------------------------------------------------------------
# Client
# ----------------------------------------------------------------------------

APIKey = Union[str, Callable[[], Optional[str]], None]


def _api_error(
    request: PreparedRequest, answer: _Answer, text: str, data: Any
) -> APIError:
    words = request.mask(_server_words(data))
    quoted = words or request.mask(text)
    printable = "".join(
        c if c.isprintable() else " " for c in quoted[: 4 * QUOTED_CHARACTERS]
    )
    shown = " ".join(printable.split())
    if len(shown) > QUOTED_CHARACTERS:
        shown = f"{shown[:QUOTED_CHARACTERS]}... ({len(quoted)} characters)"
    phrase = http.client.responses.get(answer.status, "")
    problem = answer.problem
    if answer.status == 200 and not problem:
        problem = "the answer is not a JSON object"
    what = f"{request.method} {request.url}: {answer.status} {phrase}".rstrip()
    return APIError(
        request.mask(": ".join(filter(None, (what, problem, shown)))),
        status_code=answer.status,
        headers=answer.headers,
        body=text,
        data=data,
        message=words or phrase,
    )


def _same_parameters(
    function: "Callable[P, Any]",
) -> "Callable[[Callable[..., T]], Callable[P, T]]":
    """Show the parameters of one function for another, to help() and type checkers."""
    return cast(Any, functools.wraps(function, assigned=()))


def _with_body_parameters(function: T) -> T:
    """Complete the docstring with the declared fields of the body."""
    fields_doc = (CreateAgentResponseRequestBody.__doc__ or "").partition("\n")[2]
    function.__doc__ = f"{function.__doc__}{fields_doc}"
    return function


async def _in_thread(work: Callable[[], T], cancellation: _Cancellation) -> T:
    """The result of work in a thread of its own, which ends if the task is cancelled.

    The loop's executor has few threads, and a program waits for them at its end.
    """
    import asyncio
    import contextvars

    loop = asyncio.get_running_loop()
    future = loop.create_future()

    def settle(result: Optional[T], error: Optional[BaseException]) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as failure:
            error = failure
        try:
            loop.call_soon_threadsafe(settle, result, error)
        except RuntimeError:
            pass  # the loop is closed, and nobody waits any more

    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(run,), daemon=True).start()
    try:
        return cast(T, await future)
    finally:
        cancellation.cancel()


class Responses:
    """The operation, as `orq.agents.responses`."""

    def __init__(
        self,
        transport: _Transport,
        api_key: APIKey,
        server_url: Optional[str],
        timeout_ms: Optional[float],
        retry_config: Union[RetryConfig, _Unset, None],
    ) -> None:
        self._transport = transport
        self._api_key = api_key
        self._server_url = server_url
        self._timeout_ms = timeout_ms
        self._retry_config = retry_config

    @_with_body_parameters
    def create(
        self,
        *,
        agent_key: str,
        message: Union[str, Message],
        task_id: Optional[str] = None,
        variables: Optional[Mapping[str, Any]] = None,
        contact: Optional[AContact] = None,
        thread: Optional[AThread] = None,
        memory: Optional[AMemory] = None,
        metadata: Optional[Mapping[str, Any]] = None,
        background: Optional[bool] = False,
        retries: Union[RetryConfig, _Unset, None] = UNSET,
        server_url: Optional[str] = None,
        timeout_ms: Optional[float] = None,
        http_headers: Optional[Mapping[str, str]] = None,
        extra_body: Optional[Mapping[str, Any]] = None,
    ) -> CreateAgentResponseResponseBody:
        """Send a message to an agent and return what the agent did.

        Raises ValidationError, APIError, APIConnectionError or APITimeoutError.

            agent_key: the agent's key or id
            retries: what to try again; None tries once (default: the client's)
            server_url, timeout_ms: in place of the client's; milliseconds
            http_headers: in addition to the headers of this client, or in their place
            extra_body: fields of the body that this file does not know
        """
        given = {name: value for name, value in locals().items() if name != "self"}
        return self._run(self.prepare(**given), _Cancellation(), time.sleep)

    @_same_parameters(create)
    async def create_async(self, **given: Any) -> CreateAgentResponseResponseBody:
        """Do what `create` does, without blocking the event loop.

        Cancelling the task closes the connection.
        """
        cancellation = _Cancellation()

        def work() -> CreateAgentResponseResponseBody:
            request = self.prepare(**given)
            return self._run(request, cancellation, cancellation.event.wait)

        return await _in_thread(work, cancellation)

    @_same_parameters(create)
    def prepare(
        self,
        *,
        agent_key: str,
        message: Any,
        retries: Any = UNSET,
        server_url: Optional[str] = None,
        timeout_ms: Optional[float] = None,
        http_headers: Optional[Mapping[str, str]] = None,
        extra_body: Optional[Mapping[str, Any]] = None,
        **body_fields: Any,
    ) -> PreparedRequest:
        """Check what `create` is given, and return the request that it would send.

        Raises ValidationError.
        """
        problems: Problems = []
        if isinstance(message, str):
            message = A2AMessage("user", [TextPart(message)])
        body = CreateAgentResponseRequestBody(message, **body_fields)
        content = _encode_object((type(body),), body, "", problems)
        content.update(_encode_extra(extra_body, problems))
        url = _endpoint(self._choose_server(server_url), agent_key, problems)
        key = self._api_key() if callable(self._api_key) else self._api_key
        key = os.environ.get("ORQ_API_KEY") if self._api_key is None else key
        headers = _request_headers(key, http_headers, problems)
        seconds = self._choose_timeout(timeout_ms, problems)
        policy = self._choose_policy(retries, problems)
        if problems:
            raise ValidationError(problems)
        data = json.dumps(content, separators=(",", ":")).encode("ascii")
        headers["Host"] = urllib.parse.urlsplit(url).netloc
        headers["Content-Length"] = str(len(data))
        return PreparedRequest("POST", url, headers, data, seconds, policy)

    def _choose_server(self, given: Any) -> Any:
        if given is None:
            given = self._server_url
        from_environment = os.environ.get("ORQ_BASE_URL", "").strip()
        return (from_environment or DEFAULT_SERVER) if given is None else given

    def _choose_timeout(self, given: Any, problems: Problems) -> float:
        chosen = self._timeout_ms if given is None else given
        chosen = DEFAULT_TIMEOUT_MS if chosen is None else chosen
        milliseconds = _encode(float, chosen, "timeout_ms", problems)
        if milliseconds is not None and not 0 < milliseconds <= MAX_TIMEOUT_MS:
            problems.append(("timeout_ms", f"must be in 0 < ms <= {MAX_TIMEOUT_MS}"))
        return (milliseconds or 0) / 1000

    def _choose_policy(self, given: Any, problems: Problems) -> _Policy:
        chosen = self._retry_config if given is UNSET else given
        if chosen is UNSET:
            return _DEFAULT_POLICY
        known = len(problems)
        if chosen is not None:
            _encode(RetryConfig, chosen, "retries", problems)
        return _policy(chosen) if len(problems) == known else _DEFAULT_POLICY

    def _run(
        self,
        request: PreparedRequest,
        cancellation: _Cancellation,
        pause: Callable[[float], Any],
    ) -> CreateAgentResponseResponseBody:
        started = time.monotonic()
        for attempt in itertools.count(1):
            try:
                return self._attempt(request, cancellation)
            except OrqError as error:
                elapsed = time.monotonic() - started
                wait = None
                if _should_retry(error, request.policy):
                    wait = _retry_wait(error, request.policy, attempt, elapsed)
                if wait is None or cancellation.event.is_set():
                    raise
                reason = str(error)
                if isinstance(error, APIError):  # whose text has words of the body
                    reason = f"status {error.status_code}"
            _log.info("attempt %d failed, next in %.1f s: %s", attempt, wait, reason)
            pause(wait)
        raise AssertionError("unreachable")

    def _attempt(
        self, request: PreparedRequest, cancellation: _Cancellation
    ) -> CreateAgentResponseResponseBody:
        answer = self._transport.exchange(request, cancellation)
        text = _decode_text(answer.body)
        data = _decode_json(text)
        if answer.status == 200 and not answer.problem and isinstance(data, dict):
            return _decode_answer(data)
        raise _api_error(request, answer, text, data)


def _encode_extra(extra: Any, problems: Problems) -> Dict[str, Any]:
    named = {item.json_name for item in _json_fields(CreateAgentResponseRequestBody)}
    if extra is None:
        return {}
    known = len(problems)
    content = _encode(Mapping[str, Any], extra, "extra_body", problems)
    if len(problems) > known:
        return {}
    for name in named & set(content):
        problems.append((f"extra_body.{name}", "is a parameter of its own"))
    return cast(Dict[str, Any], content)


class Agents:
    """Holds the operations of `orq.agents`."""

    def __init__(self, responses: Responses) -> None:
        self.responses = responses


class Orq:
    """A client; safe to share among threads. Close it, or use `with`.

    api_key: a text, or a function that gives one (default: ORQ_API_KEY)
    server_url: (default: ORQ_BASE_URL, else https://my.orq.ai)
    timeout_ms: for each attempt, from connecting to the last byte, in
        milliseconds (default: 600000)
    retry_config: what to try again; None tries once (default: only failures
        after which the agent cannot have run, for 30 s in all)
    ssl_context: (default: the platform's authorities, SSL_CERT_FILE, SSL_CERT_DIR)
    """

    def __init__(
        self,
        api_key: APIKey = None,
        *,
        server_url: Optional[str] = None,
        timeout_ms: Optional[float] = None,
        retry_config: Union[RetryConfig, _Unset, None] = UNSET,
        ssl_context: "Optional[ssl.SSLContext]" = None,
    ) -> None:
        self._transport = _Transport(ssl_context)
        self._server_url = server_url
        self.agents = Agents(
            Responses(self._transport, api_key, server_url, timeout_ms, retry_config)
        )

    def close(self) -> None:
        """Close the idle connections. A later call opens one for itself alone."""
        self._transport.close()

    def __enter__(self) -> "Orq":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    async def __aenter__(self) -> "Orq":
        return self

    async def __aexit__(self, *exception: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Orq(server_url={self._server_url!r})"


@_with_body_parameters
def create_response(
    agent_key: str,
    message: Union[str, Message],
    *,
    api_key: APIKey = None,
    ssl_context: "Optional[ssl.SSLContext]" = None,
    task_id: Optional[str] = None,
    variables: Optional[Mapping[str, Any]] = None,
    contact: Optional[AContact] = None,
    thread: Optional[AThread] = None,
    memory: Optional[AMemory] = None,
    metadata: Optional[Mapping[str, Any]] = None,
    background: Optional[bool] = False,
    retries: Union[RetryConfig, _Unset, None] = UNSET,
    server_url: Optional[str] = None,
    timeout_ms: Optional[float] = None,
    http_headers: Optional[Mapping[str, str]] = None,
    extra_body: Optional[Mapping[str, Any]] = None,
) -> CreateAgentResponseResponseBody:
    """Make one call with a client of its own; see `Orq` and `Responses.create`."""
    given = dict(locals())
    key, context = given.pop("api_key"), given.pop("ssl_context")
    with Orq(key, ssl_context=context) as orq:
        return orq.agents.responses.create(**given)


# ----------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------


def _option_parser() -> "argparse.ArgumentParser":
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> "NoReturn":
            self.exit(2, f"orq_min: {message} (--help says more)\n")

    parser = Parser(
        "orq_min.py",
        "%(prog)s [options] AGENT_KEY [MESSAGE]",
        "Send a message to an Orq.ai agent and print what it answers.",
        "The key is read from ORQ_API_KEY, the server from ORQ_BASE_URL. Exit status:"
        " 0 answered, 1 the service answered with an error, 2 wrong usage or request,"
        " nothing sent, 3 no answer, 130 interrupted.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("agent_key", metavar="AGENT_KEY", nargs="?", help="the agent's key or id")
    add("text", metavar="MESSAGE", nargs="?", help="its text; '-' for standard input")
    add("--file", metavar="PATH|URL", action="append", default=[], help="attach it")
    add(
        "--tool-result",
        metavar="CALL_ID=JSON",
        action="append",
        default=[],
        help="answer a tool call that waits",
    )
    for item in _json_fields(CreateAgentResponseRequestBody):
        plain, models, _ = _read_annotation(item.annotation)
        option = "--" + item.name.replace("_", "-")
        if plain is bool:
            add(option, action="store_true", help=item.about)
        elif plain is str:
            add(option, metavar="ID", help=item.about)
        elif item.name == "message":
            add(option, metavar="JSON|@FILE", help="a whole message instead")
        elif models:
            add(option, metavar="ID|JSON|@FILE", help=item.about)
        else:
            shape = "NAME=VALUE|JSON|@FILE"
            add(option, metavar=shape, action="append", default=[], help=item.about)
    add("--extra-body", metavar="JSON|@FILE", help="fields that this file lacks")
    add("--server-url", metavar="URL", help="instead of ORQ_BASE_URL")
    add("--timeout", metavar="SECONDS", type=float, help="for one attempt (600)")
    group = parser.add_mutually_exclusive_group()
    again = "try again whatever failed: the agent may run twice"
    group.add_argument("--retry", action="store_true", help=again)
    group.add_argument("--no-retry", action="store_true", help="try once")
    add("--json", action="store_true", help="print the whole answer")
    add("--dry-run", action="store_true", help="print the request, do not send it")
    about = "tell what happens; alone, print the version"
    add("-v", "--verbose", action="store_true", help=about)
    add("--version", action="version", version=f"orq_min {__version__}")
    return parser


def _read_json(option: str, text: str) -> Any:
    """JSON text, or what @FILE holds."""
    try:
        if text.startswith("@"):
            with open(text[1:], encoding="utf-8-sig") as stream:
                text = stream.read()
        return json.loads(text)
    except OSError as error:
        problem = f"cannot read {text[1:]!r}: {error.strerror}"
    except (ValueError, RecursionError) as error:
        problem = f"not JSON: {error}"
    raise ValidationError([(option, problem)])


def _read_pairs(option: str, texts: Sequence[str]) -> Optional[Dict[str, Any]]:
    """NAME=VALUE, and objects as JSON or @FILE, together."""
    merged: Dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        pairs: Any = {name: value}
        if not equals or text.lstrip()[:1] in ("{", "@"):
            pairs = _read_json(option, text)
        if not isinstance(pairs, dict):
            raise ValidationError([(option, "must be an object")])
        merged.update(pairs)
    return merged if texts else None


def _read_message(
    options: "argparse.Namespace", parser: "argparse.ArgumentParser"
) -> Any:
    """What MESSAGE, --message, --file, --tool-result and standard input say."""
    kinds = (options.message is not None, bool(options.tool_result))
    others = options.text is not None or options.file
    if sum(kinds) > 1 or (any(kinds) and others):
        parser.error("MESSAGE, --file, --message and --tool-result do not go together")
    if options.message is not None:
        return _read_json("--message", options.message)
    if options.tool_result:
        results = [_read_result(text) for text in options.tool_result]
        return {"role": "tool", "parts": results}
    text = options.text
    if text == "-" or (text is None and not options.file):
        text = _read_stdin(parser)
    parts: List[Any] = [TextPart(text)] if text and text.strip() else []
    for place in options.file:
        is_url = re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", place)
        try:
            parts.append((FilePart.from_uri if is_url else FilePart.from_path)(place))
        except OSError as error:
            problem = f"cannot read {place!r}: {error.strerror}"
            raise ValidationError([("--file", problem)]) from None
    if not parts:
        parser.error("the message is empty")
    return A2AMessage("user", parts)


def _read_result(text: str) -> ToolResultPart:
    call_id, equals, result = text.partition("=")
    if not call_id or not equals:
        raise ValidationError([("--tool-result", "must be CALL_ID=JSON")])
    return ToolResultPart(call_id, _read_json(f"--tool-result {call_id}", result))


def _read_stdin(parser: "argparse.ArgumentParser") -> str:
    if sys.stdin is None or sys.stdin.isatty():
        parser.error("MESSAGE is missing")
    data = getattr(sys.stdin, "buffer", sys.stdin).read()
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValidationError(
            [("standard input", f"not UTF-8 text: {error}")]
        ) from None
    return text[:-1] if text.endswith("\n") else text


def _print(stream: Any, text: str) -> None:
    """Print in any locale: what the stream cannot show is escaped."""
    if stream is None:
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    stream.flush()


def _print_answer(answer: CreateAgentResponseResponseBody, options: Any) -> None:
    text = answer.task_id if options.background else answer.text
    if options.json:
        text = json.dumps(answer.raw, indent=2, ensure_ascii=False)
        try:
            text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
        except UnicodeEncodeError:
            text = json.dumps(answer.raw, indent=2)
    try:
        if text:
            _print(sys.stdout, str(text))
    except BrokenPipeError:  # `| head -1` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    import shlex

    task = f"--task-id {shlex.quote(str(answer.task_id))}"
    calls = answer.pending_tool_calls
    for call in calls if isinstance(calls, list) else ():
        if isinstance(call, PendingToolCalls):
            function = (
                call.function if isinstance(call.function, Function) else Function()
            )
            result = shlex.quote(f"{call.id}=") + "JSON"
            asked = " ".join(f"{function.name}({function.arguments})".split())
            _print(
                sys.stderr,
                f"waiting for {asked}; answer with {task} --tool-result {result}",
            )
    if sys.stderr is not None and sys.stderr.isatty():
        _print(sys.stderr, f"continue with {task}")


def _tick(done: threading.Event) -> None:
    """Show the seconds that have passed."""
    started = time.monotonic()
    while not done.wait(1):
        sys.stderr.write(f"\r{time.monotonic() - started:.0f} s ")
        sys.stderr.flush()
    sys.stderr.write("\r        \r")


def _print_request(request: PreparedRequest) -> None:
    _print(sys.stdout, f"{request.method} {request.url}")
    for name, value in request.headers.items():
        _print(sys.stdout, f"{name}: {value}")
    _print(sys.stdout, "\n" + request.body.decode("ascii"))


def _run_command(options: Any, parser: Any) -> None:
    call: Dict[str, Any] = {"agent_key": options.agent_key}
    call["message"] = _read_message(options, parser)
    call.update(task_id=options.task_id, background=options.background)
    for name in ("variables", "metadata"):
        call[name] = _read_pairs(f"--{name}", getattr(options, name))
    for name, key in (("contact", "id"), ("thread", "id"), ("memory", "entity_id")):
        text = getattr(options, name)
        if text is not None:
            is_json = text.lstrip()[:1] in ("{", "[", "@")
            call[name] = _read_json(f"--{name}", text) if is_json else {key: text}
    if options.extra_body is not None:
        call["extra_body"] = _read_json("--extra-body", options.extra_body)
    if options.timeout is not None:
        call["timeout_ms"] = options.timeout * 1000
    if options.retry or options.no_retry:
        call["retries"] = RetryConfig() if options.retry else None
    key = "***" if options.dry_run else None
    with Orq(key, server_url=options.server_url) as orq:
        if options.dry_run:
            return _print_request(orq.agents.responses.prepare(**call))
        done = threading.Event()
        clock = threading.Thread(target=_tick, args=(done,), daemon=True)
        if sys.stderr is not None and sys.stderr.isatty():
            clock.start()
        try:
            answer = orq.agents.responses.create(**call)
        finally:
            done.set()
            if clock.ident:
                clock.join()
    _print_answer(answer, options)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line and return its exit status."""
    parser = _option_parser()
    options = parser.parse_intermixed_args(argv)
    if options.agent_key is None:
        if not options.verbose:
            parser.error("AGENT_KEY is missing")
        _print(sys.stdout, f"orq_min {__version__}")
        return 0
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("\rorq_min: %(message)s"))
    _log.addHandler(handler)
    _log.setLevel(logging.DEBUG if options.verbose else logging.INFO)
    status = 0
    try:
        _run_command(options, parser)
    except OrqError as error:
        _print(sys.stderr, f"orq_min: {error}")
        statuses = {ValidationError: 2, APIError: 1}
        status = statuses.get(type(error), 3)
    except KeyboardInterrupt:
        status = 130
    finally:
        _log.removeHandler(handler)
    return status


if __name__ == "__main__":
    sys.exit(main())

"""Tables, as API servers make them for kubectl.

https://kubernetes.io/docs/reference/using-api/api-concepts/#receiving-resources-as-tables
"""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any, Final

from fakes_http import JsonObject, encode

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fakes_http import Request

_COLUMNS: Final = {
    "Pod": ("Name", "Ready", "Status", "Restarts", "Age"),
    "Job": ("Name", "Status", "Completions", "Duration", "Age"),
}
_PARTIAL: Final = {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1"}


def wants_table(request: Request) -> bool:
    """Tell whether a client would rather have a Table."""
    return "as=Table" in request.headers.get("accept", "")


@functools.lru_cache(maxsize=16)
def table_of_list(body: bytes) -> bytes:
    """Return a list of objects as a Table."""
    listed = json.loads(body)
    return encode(_table(listed["kind"].removesuffix("List"), listed["items"], listed["metadata"], columns=True))


def table_of_event(line: bytes, *, first: bool) -> bytes:
    """Return an event of a watch with a Table of one row; only a watch's first one tells the columns."""
    event = json.loads(line)
    obj = event["object"]
    version = {"resourceVersion": obj["metadata"]["resourceVersion"]}
    return encode({"type": event["type"], "object": _table(obj["kind"], [obj], version, columns=first)}) + b"\n"


def _table(kind: str, objects: Iterable[JsonObject], metadata: JsonObject, *, columns: bool) -> JsonObject:
    definitions = [
        {"name": name, "type": "string", "format": "", "description": "", "priority": 0} for name in _COLUMNS[kind]
    ]
    return {
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": metadata,
        "columnDefinitions": definitions if columns else None,
        "rows": [{"cells": _cells(kind, obj), "object": {**_PARTIAL, "metadata": obj["metadata"]}} for obj in objects],
    }


def _cells(kind: str, obj: JsonObject) -> list[Any]:
    name = obj["metadata"]["name"]
    if kind == "Job":
        return [name, "Running", "0/1", "10m", "10m"]
    return [name, "1/1", obj["status"]["phase"], "0", "10m"]

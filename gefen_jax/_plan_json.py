"""A plan as a file: JSON that a person can read, one leaf per line, with a checksum."""

import hashlib
import json
import os
import uuid
from typing import Any

FORMAT = "gefen_jax plan"
VERSION = (
    3  # 1 differs in the dual code, whose bytes were laid out in another way; 2 has no checksum
)


def write(path: str | os.PathLike, data: dict[str, Any]) -> None:
    """Writes the fields of a plan; the file appears whole or not at all."""
    data = {"format": FORMAT, "version": VERSION} | data
    data["checksum"] = _checksum(data)
    lines = []
    for key, value in data.items():
        text = json.dumps(value)
        if key == "leaves":
            text = "[\n    " + ",\n    ".join(map(json.dumps, value)) + "\n  ]"
        lines.append(f"  {json.dumps(key)}: {text}")
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    # A name of its own: threads have one process id, and so may the hosts of one file system.
    temporary = f"{os.fsdecode(path)}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def read(path: str | os.PathLike) -> dict[str, Any]:
    """What `write` wrote; an error of some kind if it is not that."""
    with open(path, encoding="utf-8") as file:
        data = json.load(file)
    if data["format"] != FORMAT:
        raise ValueError(f"its format is {data['format']!r}")
    if data["version"] not in range(1, VERSION + 1):
        raise ValueError(f"its version is {data['version']!r}, this package reads {VERSION}")
    found = data.pop("checksum", None)
    if found != (_checksum(data) if data["version"] == VERSION else None):
        raise ValueError(
            "its checksum does not fit: it is damaged, or was edited (`Plan.with_kind` changes a"
            " plan)"
        )
    if data["version"] == 1 and any(x["kind"] == "dual_code" for x in data["leaves"]):
        raise ValueError(
            "its version is 1, whose dual code laid out bytes in another way: make the plan anew,"
            " and the optimizer's state with it"
        )
    return data


def _checksum(data: dict[str, Any]) -> str:
    """Of all other fields, however they are spaced."""
    text = json.dumps(data, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

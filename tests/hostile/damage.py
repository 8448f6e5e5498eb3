"""Damage to files: what may be wrong with one of each format, from tables.

A damage reads a sound file and gives a `Change`: what it does in words, and how to do it to a copy. What it does is
drawn from a generator, and nothing else decides.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml


@dataclass(frozen=True)
class Change:
    """What is done to a file."""

    what: str
    make: Callable[[Path], Any]


Damage = Callable[[Path, Random], Change]


def written(what: str, content: bytes) -> Change:
    """Other content."""
    return Change(what, lambda path: path.write_bytes(content))


def short(value: Any) -> str:
    """A value in few characters."""
    return repr(value)[:60]


# --- values inside of values -----------------------------------------------------------------------------------------

PLANTED = "hostile.planted.run"
"""A function that no file may have called."""
PLAIN: Sequence[Any] = (
    None, True, False, 0, -1, 1, 2, 7, 2**20, 10**6, 2**31, 2**40, 2**62, 2**63, 10**23, 0.5, -1.5, 1e308, math.nan,
    math.inf, -math.inf, "", "nope", "1", "../..", "../outside", "/etc/passwd", "a\nb", "\x1b[31m", "\0", "\ud800", [],
    [1], [[1]], ["x"], [None], {}, {"a": 1}, {"class_path": PLANTED}, {"auto_map": PLANTED}, 1000 * "x",
)  # fmt: skip
"""Odd values of files of text."""
FEW = 6
"""Parts of a list or a large mapping that are tried: further ones are alike."""


def places(value: Any, name: str = "") -> Iterator[tuple[Any, Any, str]]:
    """Each part of nested mappings and lists: what holds it, its key there, and its path in words."""
    if isinstance(value, dict):
        keys = list(value)[: None if len(value) < 40 else FEW]
    elif isinstance(value, list):
        keys = list(range(len(value)))[:FEW]
    else:
        return
    for key in keys:
        path = f"{name}.{key}".lstrip(".")
        yield value, key, path
        yield from places(value[key], path)


def alter(value: Any, draw: Random, odd: Sequence[Any] = PLAIN) -> str:
    """Set a part to something odd, leave it out, or add one, in place.

    Returns:
        what was done.
    """
    how = draw.choices(("set", "drop", "add"), (8, 2, 1))[0]
    new = draw.choice(odd)
    found = list(places(value))
    if how == "add" or not found:
        value["unknown"] = new
        return f"added: {short(new)}"
    holder, key, path = draw.choice(found)
    if how == "drop":
        del holder[key]
        return f"left out: {path}"
    holder[key] = new
    return f"{path} set to {short(new)}"


def damage_json(file: Path, draw: Random) -> Change:
    """A value in a JSON file."""
    value = json.loads(file.read_text())
    what = alter(value, draw)
    return written(what, json.dumps(value).encode())


def damage_lines(file: Path, draw: Random) -> Change:
    """A value in a line of a JSONL file."""
    lines = file.read_text().splitlines()
    number = draw.randrange(len(lines))
    value = json.loads(lines[number])
    what = alter(value, draw)
    lines[number] = json.dumps(value)
    return written(what, "".join(f"{line}\n" for line in lines).encode())


LAUGHS = ", ".join("&a0 [x]" if i == 0 else f"&a{i} [{', '.join(9 * [f'*a{i - 1}'])}]" for i in range(12))
RAW: Sequence[str] = (
    f"!!python/name:{PLANTED}", f"!!python/object/apply:{PLANTED} []", f"!!python/object/new:{PLANTED} []",
    f"!!python/module:{PLANTED.rpartition('.')[0]}", f"{{class_path: {PLANTED}}}", PLANTED,
    f"{{class_path: {PLANTED}, init_args: {{n: 3}}}}", f"{{n: {{class_path: {PLANTED}}}}}", "&a [*a]", f"[{LAUGHS}]",
    "*nobody", "!x 5", "!!binary aGk=", "!!set {a, b}", "1:30", "2001-01-01", "0x10", "1_000", ".nan", "|\n  x", "> ",
    "{a: 1, a: 2}", "[" * 2000, "{? [a] : 1}", "!!int x", "<<: {a: 1}", "\t", "'", "%TAG", "--- 5", "@x",
)  # fmt: skip
"""What may stand for a value in YAML."""
HERE = "HERE"


def damage_yaml(file: Path, draw: Random) -> Change:
    """A value in a YAML file, or the text of one."""
    value = yaml.safe_load(file.read_text())
    if draw.random() < 0.4:
        raw = draw.choice(RAW)
        what = alter(value, draw, [HERE])
        text = yaml.safe_dump(value, sort_keys=False).replace(HERE, raw)
        return written(what.replace(repr(HERE), raw[:60]), text.encode())
    what = alter(value, draw)
    return written(what, yaml.safe_dump(value, sort_keys=False).encode(errors="surrogatepass"))


# --- tensors ---------------------------------------------------------------------------------------------------------

TYPES = ("I64", "I32", "F16", "BF16", "BOOL", "F8_E4M3", "F64", "U8", "F4", "C64", "XX", None, 5)
SHAPES: Sequence[Callable[[list[int]], Any]] = (
    lambda shape: [1, *shape], lambda shape: shape[::-1], lambda _: [-1], lambda _: [2**40], lambda _: [2**62, 4],
    lambda _: [], lambda _: [0], lambda _: ["x"], lambda _: None, lambda shape: [*shape[:-1], 0], lambda _: 40 * [1],
)  # fmt: skip
HEADERS = (
    "", "x", "-1", "[]", "{}", "null", "1e400", 30 * "9", "[1]", '{"a": [1]}', "NaN", 5000 * "[", "\ud800", "0", 5,
)  # fmt: skip
FILLS: Mapping[str, bytes] = {
    "NaN": np.float32(math.nan).tobytes(), "NaN of 64 bits": np.float64(math.nan).tobytes(), "ones": b"\xff",
    "infinity": np.float32(math.inf).tobytes(), "zeros": b"\0", "a huge number": np.float32(1e38).tobytes(),
    "a large token": np.int64(60_000).tobytes(),
}  # fmt: skip
"""Bytes that are repeated over the values of a tensor."""


def damage_tensors(file: Path, draw: Random) -> Change:
    """A tensor of a safetensors file, or what stands in its header."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8:end]), bytearray(content[end:])
    what = draw.choice(list(TENSORS))(header, body, draw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return written(what, len(text).to_bytes(8, "little") + text + bytes(body))


def _a_tensor(header: dict[str, Any], draw: Random) -> str:
    return draw.choice(sorted(header.keys() - {"__metadata__"}))


def _other_type(header: dict[str, Any], body: bytearray, draw: Random) -> str:
    name, kind = _a_tensor(header, draw), draw.choice(TYPES)
    header[name]["dtype"] = kind
    return f"{name} of type {kind}"


def _other_shape(header: dict[str, Any], body: bytearray, draw: Random) -> str:
    name = _a_tensor(header, draw)
    shape = header[name]["shape"] = draw.choice(SHAPES)(header[name]["shape"])
    return f"{name} of shape {shape}"


def _other_place(header: dict[str, Any], body: bytearray, draw: Random) -> str:
    name = _a_tensor(header, draw)
    place = header[name]["data_offsets"] = [draw.choice((0, 8, -1, 2**20, 2**62)), draw.choice((0, 8, 2**20, 2**63))]
    return f"{name} at {place}"


def _other_values(header: dict[str, Any], body: bytearray, draw: Random) -> str:
    """All values of a tensor, or the first eight bytes of them."""
    name, fill = _a_tensor(header, draw), draw.choice(list(FILLS))
    start, end = header[name]["data_offsets"]
    end = draw.choice((end, min(end, start + 8)))
    body[start:end] = (FILLS[fill] * (end - start))[: end - start]
    return f"{name} full of {fill}"


def _no_tensor(header: dict[str, Any], body: bytearray, draw: Random) -> str:
    name = _a_tensor(header, draw)
    del header[name]
    return f"no {name}"


def _other_name(header: dict[str, Any], body: bytearray, draw: Random) -> str:
    name = _a_tensor(header, draw)
    header[f"{name}x"] = header.pop(name)
    return f"{name} is {name}x"


def _one_more(header: dict[str, Any], body: bytearray, draw: Random) -> str:
    header["more"] = {"dtype": "F32", "shape": [0], "data_offsets": [len(body), len(body)]}
    return "one tensor more"


def _other_header(header: dict[str, Any], body: bytearray, draw: Random) -> str:
    about = header.setdefault("__metadata__", {"format": "pt"})
    name, value = draw.choice(sorted(about)), draw.choice(HEADERS)
    about[name] = value
    return f"header {name} is {short(value)}"


def _header_inside(header: dict[str, Any], body: bytearray, draw: Random) -> str:
    """A part of a JSON value that stands in the header."""
    about = header.get("__metadata__", {})
    nested = [name for name in sorted(about) if about[name][:1] in ("{", "[")]
    if not nested:
        return _other_header(header, body, draw)
    name = draw.choice(nested)
    value = {name: json.loads(about[name])}
    what = alter(value, draw)
    about[name] = json.dumps(value.get(name))
    return f"header: {what}"


TENSORS = (
    _other_type, _other_shape, _other_place, _other_values, _other_values, _no_tensor, _other_name, _one_more,
    _other_header, _header_inside,
)  # fmt: skip

WEIGHTS: Sequence[Any] = (
    *PLAIN, torch.tensor(math.nan), torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64), torch.tensor(2**62),
    torch.tensor([math.inf] * 4), torch.zeros(0), torch.zeros(3, dtype=torch.bool),
)  # fmt: skip
"""Odd values of files of torch."""


def damage_checkpoint(file: Path, draw: Random) -> Change:
    """A value or a tensor of a checkpoint."""
    value = torch.load(file, weights_only=True)
    tensors = [(holder, key, path) for holder, key, path in places(value) if isinstance(holder[key], torch.Tensor)]
    if draw.random() < 0.3:
        holder, key, path = draw.choice(tensors)
        name = draw.choice(list(SPOILT))
        holder[key], what = SPOILT[name](holder[key]), f"{path} {name}"
    else:
        what = alter(value, draw, WEIGHTS)
    content = io.BytesIO()
    torch.save(value, content)
    return written(what, content.getvalue())


SPOILT: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "is NaN": lambda tensor: torch.full(tensor.shape, math.nan), "is infinite": lambda tensor: tensor + math.inf,
    "as whole numbers": lambda tensor: tensor.long(), "of 64 bits": lambda tensor: tensor.double(),
    "with an axis more": lambda tensor: tensor[None], "of another length": lambda tensor: tensor.flatten()[:-1],
    "of truths": lambda tensor: tensor.bool(), "of complex numbers": lambda tensor: tensor * 1j,
}  # fmt: skip

# --- arrays and tables -----------------------------------------------------------------------------------------------

ARRAYS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "backwards": lambda array: array[::-1], "of floats": lambda array: array.astype(float),
    "larger": lambda array: array + array.dtype.type(7), "shorter": lambda array: array[:-1],
    "longer": lambda array: np.append(array, array[-1]), "of two axes": lambda array: array[None],
    "below zero": lambda array: (-array.astype(int)).astype(array.dtype),
    "of objects": lambda array: array.astype(object), "of texts": lambda array: array.astype(str),
    "of large values": lambda array: np.full_like(array, np.iinfo(array.dtype).max),
    "with a large value": lambda array: np.where(np.arange(len(array)) == 5, np.iinfo(array.dtype).max, array),
    "of the other order": lambda array: array.astype(array.dtype.newbyteorder()),
    "of times": lambda array: array.astype("M8[s]"), "of zeros": np.zeros_like, "empty": lambda array: array[:0],
}  # fmt: skip


def damage_array(file: Path, draw: Random) -> Change:
    """An array of a npy file."""
    name = draw.choice(list(ARRAYS))
    content = io.BytesIO()
    np.save(content, ARRAYS[name](np.load(file)), allow_pickle=True)
    return written(name, content.getvalue())


CELLS = (
    "", "x", "-1", "1.5", "NaN", "[-1]", "[[0, 999]]", "[[5, 1]]", "[[1]]", "{}", 9999 * "[", "1e9999", 5000 * "9",
    "[null]", "\x1b[31m", "a\nb", "true", "null", '"', "[99999]", "=1+1", str(2**63), "inf",
)  # fmt: skip


def damage_csv(file: Path, draw: Random) -> Change:
    """A cell of a CSV file, the header's too, or the length of a row."""
    rows = list(csv.reader(io.StringIO(file.read_text())))
    row, cell = draw.randrange(len(rows)), draw.choice(CELLS)
    column = draw.randrange(len(rows[row]))
    if draw.random() < 0.1:
        rows[row] = draw.choice(([], rows[row][:column], [*rows[row], cell]))
        what = f"row {row} of {len(rows[row])} cells"
    else:
        rows[row][column], what = cell, f"{rows[0][column]} of row {row} is {short(cell)}"
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return written(what, text.getvalue().encode())


COLUMNS: Sequence[Any] = (
    None, 1.5, "x", -1, [[0, 999]], [-1], [["a"]], {"a": 1}, math.nan, True, b"\xff", [], [[5, 1]], 2**62, [None], "",
)  # fmt: skip


def damage_parquet(file: Path, draw: Random) -> Change:
    """A column of a parquet file."""
    rows = pq.read_table(file).to_pylist()
    name, value = draw.choice(list(rows[0])), draw.choice(COLUMNS)
    if draw.random() < 0.2:
        rows, what = [{key: row[key] for key in row if key != name} for row in rows], f"no {name}"
    else:
        rows, what = [{**row, name: value} for row in rows], f"{name} is {short(value)}"
    content = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), content)
    return written(what, content.getvalue())


# --- any file --------------------------------------------------------------------------------------------------------


def _flipped(content: bytes, draw: Random) -> bytes:
    """Some bits, most often near the beginning, where headers are."""
    made = bytearray(content)
    for _ in range(draw.choice((1, 3, 20))):
        place = draw.randrange(min(len(made), draw.choice((200, 2000, len(made)))))
        made[place] ^= 1 << draw.randrange(8)
    return bytes(made)


BYTES: Mapping[str, Callable[[bytes, Random], bytes]] = {
    "cut": lambda content, draw: content[: draw.randrange(len(content))], "bits flipped": _flipped,
    "twice": lambda content, _: 2 * content, "empty": lambda *_: b"", "junk": lambda _, draw: draw.randbytes(500),
    "zeros": lambda content, _: bytes(len(content)), "deep mappings": lambda *_: 60_000 * b'{"a":',
    "deep lists": lambda *_: 60_000 * b"[", "a line ending cut": lambda content, _: content[:-1],
    "not UTF-8": lambda content, _: content.replace(b"a", b"\xff"), "UTF-16": lambda *_: "{}".encode("utf-16"),
    "one long line": lambda *_: 300_000 * b"a", "a number of many digits": lambda *_: 6000 * b"9",
    "NUL": lambda *_: b"\0",
    "a mark at the beginning": lambda content, _: b"\xef\xbb\xbf" + content, "no object": lambda *_: b"[]",
}  # fmt: skip


def damage_bytes(file: Path, draw: Random) -> Change:
    """The bytes of a file."""
    name = draw.choice(list(BYTES))
    return written(name, BYTES[name](file.read_bytes(), draw))


def _linked(target: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.unlink()
        os.symlink(target, path)

    return make


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


STANDS: Mapping[str, Callable[[Path], None]] = {
    "gone": lambda path: path.unlink(), "a folder": _folder, "a link to nothing": _linked("nobody"),
    "a link to a device": _linked("/dev/zero"), "a link to a folder": _linked("/"),
    "a link to a process": _linked("/proc/self/mem"),
}  # fmt: skip


def damage_place(file: Path, draw: Random) -> Change:
    """What stands in the file's place."""
    name = draw.choice([*STANDS, "a link to itself"])
    return Change(name, STANDS.get(name, _linked(file.name)))


DAMAGES: Mapping[str, Damage] = {
    ".json": damage_json, ".jsonl": damage_lines, ".yaml": damage_yaml, ".safetensors": damage_tensors,
    ".ckpt": damage_checkpoint, ".npy": damage_array, ".csv": damage_csv, ".parquet": damage_parquet,
}  # fmt: skip
"""By the ending of a file's name."""
ANY = (damage_bytes, damage_bytes, damage_bytes, damage_place)
OWN = 0.7
"""Share of damages that know the format."""


def damage(file: Path, draw: Random) -> Change:
    """Some damage to a file."""
    if file.suffix in DAMAGES and draw.random() < OWN:
        return DAMAGES[file.suffix](file, draw)
    return draw.choice(ANY)(file, draw)

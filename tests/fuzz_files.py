"""Damage and forge stored estimators: each is refused as documented, or loads and predicts.

    python tests/fuzz_files.py --count 10000 --seed 0

Case i of a seed is the same everywhere.  Most mutations compute the checksum anew, so that what
lies behind it is reached.  The process may not take more than a gigabyte of address space beyond
what it has after a first load, and writes down how much its memory really grew.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import random
import resource
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import sinfkit
from sinfkit.persistence import KEY, checksum, load

FOLDER = Path(__file__).parent / "stored"
ADDRESS_SPACE = 2**30
PACKAGE = os.path.join(os.path.dirname(sinfkit.__file__), "")
MEMORY = 256 * 2**20  # bytes that resident memory may grow by over all cases
OPENED: list[str] = []  # whatever was opened, run or connected to since the last look

Tensors = dict[str, tuple[str, list[int], bytes]]


class Stored:
    """A file taken apart: manifest, and (dtype, shape, bytes) of each tensor."""

    def __init__(self, manifest: dict[str, Any], tensors: Tensors) -> None:
        self.manifest, self.tensors = manifest, tensors

    @classmethod
    def parse(cls, data: bytes) -> Stored:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        manifest = json.loads(header.pop("__metadata__")[KEY])
        del manifest["sha256"]
        tensors = {}
        for name, entry in header.items():
            begin, end = (8 + length + n for n in entry["data_offsets"])
            tensors[name] = (entry["dtype"], entry["shape"], data[begin:end])
        return cls(manifest, tensors)

    def header(self) -> dict[str, Any]:
        """The header with a checksum that fits."""
        digest = checksum(self.manifest, self.tensors)
        text = json.dumps({**self.manifest, "sha256": digest})
        header: dict[str, Any] = {"__metadata__": {KEY: text}}
        at = 0
        for name, (dtype, shape, content) in self.tensors.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(content)]}
            at += len(content)
        return header

    def body(self) -> bytes:
        return b"".join(content for _, _, content in self.tensors.values())

    def pack(self) -> bytes:
        return join(json.dumps(self.header()).encode(), self.body())


def join(header: bytes, body: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + body


@functools.cache
def originals() -> dict[str, bytes]:
    """The valid files."""
    return {path.name: path.read_bytes() for path in sorted(FOLDER.glob("v*.sinf"))}


HOSTILE: list[Callable[[random.Random], Any]] = [
    lambda r: None,
    lambda r: r.random() < 0.5,
    lambda r: r.choice([-1, 0, 1, 2, 3, 7, 2**31, 2**63 - 1, -(2**63), 10**19]),
    lambda r: r.choice([-1.0, 0.0, 0.5, 1e-300, 1e308, -1e308]),
    lambda r: r.choice(["", "auto", "cuda:0", "cuda:999", "meta", "base", "custom", "\ud800", "é"]),
    lambda r: r.choice(["../../etc/passwd", "/dev/zero", "os.system", "__class__", "a\x00b", "."]),
    lambda r: "x" * r.choice([100, 100_000]),
    lambda r: [],
    lambda r: {},
    lambda r: [r.randrange(10) for _ in range(r.choice([1, 3, 1000]))],
    lambda r: [2**20] * r.choice([1, 3]),
    lambda r: {"float": r.choice(["nan", "inf", "-inf", "1", None])},
    lambda r: {"tuple": r.choice([[], [1, 8, 8], [2**20, 2**20, 2**20], [-1], "ab", None])},
    lambda r: {"dict": r.choice([[], [["a", 1]], [["a", 1], ["a", 2]], [[[1], 2]], ["ab"], 3])},
    lambda r: {"set": [1, 1]},
    lambda r: {"tensor": r.choice(["base/0.weight", "outputs", "nothing", 7])},
    lambda r: {
        "array": {
            "dtype": r.choice(["str", "object", "uint64", "float64", "O", "|V8", 3]),
            "shape": r.choice([[2], [0], [2**40, 2**40], [-2], "2", [2.0]]),
            "values": r.choice([["a", "b"], [1, 2], [-1, 2], [], ["x" * 9999, "y"], None]),
        }
    },
    lambda r: nested(r.choice([5, 30, 200])),
]
NAMES = ("__class__", "__init__", "model", "predict", "../x", "", "network_", "memory", "schema")


def nested(depth: int) -> Any:
    value: Any = 0
    for i in range(depth):
        value = [value] if i % 2 else {"tuple": [value]}
    return value


def places(node: Any, found: list[tuple[Any, Any]] | None = None) -> list[tuple[Any, Any]]:
    """Every (container, key) in a manifest."""
    found = [] if found is None else found
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        found.append((node, key))
        if isinstance(value, (dict, list)):
            places(value, found)
    return found


# Bytes of the file, whose checksum then does not fit.


def flip_bytes(r: random.Random, data: bytes) -> bytes:
    new = bytearray(data)
    for _ in range(r.choice([1, 1, 3, 50])):
        new[r.randrange(len(new))] ^= 1 << r.randrange(8)
    return bytes(new)


def flip_header(r: random.Random, data: bytes) -> bytes:
    new = bytearray(data)
    (length,) = struct.unpack("<Q", data[:8])
    for _ in range(r.choice([1, 2, 5])):
        new[r.randrange(8 + length)] = r.randrange(256)
    return bytes(new)


def truncate(r: random.Random, data: bytes) -> bytes:
    return data[: r.choice([0, 1, 7, 8, 9, r.randrange(len(data)), len(data) - 1])]


def append(r: random.Random, data: bytes) -> bytes:
    return data + r.randbytes(r.choice([1, 8, 1000]))


def header_length(r: random.Random, data: bytes) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    new = r.choice([0, 1, 2**63, 2**64 - 1, length - 1, length + 1, len(data), len(data) - 8])
    return struct.pack("<Q", new) + data[8:]


def replace_block(r: random.Random, data: bytes) -> bytes:
    begin = r.randrange(len(data))
    size = r.choice([1, 16, 500])
    return data[:begin] + r.choice([b"\0", b"\xff", r.randbytes(1)]) * size + data[begin + size :]


# The header's text.


def header_entry(r: random.Random, data: bytes) -> bytes:
    stored = Stored.parse(data)
    header, body = stored.header(), stored.body()
    entry = header[r.choice([*stored.tensors])]
    field = r.choice(["dtype", "shape", "data_offsets"])
    new = r.choice(HOSTILE)(r)
    if r.random() < 0.5:
        old = entry["data_offsets"]
        new = {
            "dtype": r.choice(["F64", "I32", "BF16", "F8_E4M3", "C64", "x"]),
            "shape": r.choice([[2**40], [2**63, 2], [0], [-1], [], [1] * 99, [10**30, 0]]),
            "data_offsets": r.choice(
                [[0, 2**63], [old[1], old[0]], [0, 0], [-1, old[1]], [old[0], old[1] + 1], [1]]
            ),
        }[field]
    entry[field] = new
    return join(json.dumps(header).encode(), body)


def header_text(r: random.Random, data: bytes) -> bytes:
    stored = Stored.parse(data)
    header = stored.header()
    text = json.dumps(header)
    first = next(iter(stored.tensors))
    entry = json.dumps(header[first])
    kinds = [
        text[:-1] + f", {json.dumps(first)}: {entry}}}",  # a tensor twice
        text[:-1] + ', "__metadata__": {"sinfkit": "{}"}}',
        text[:-1] + f', "x": {"[" * 100_000}',
        text[:-1] + f', "x": {"[" * 100_000}{"]" * 100_000}}}',
        text[:-1] + f', "x": {"9" * 100_000}}}',
        text[:-1] + ', "x": NaN}',
        text[:-1] + ', "x": 1e400}',
        text.replace('"sinfkit"', '"other"'),
        "[" + text + "]",
        "null",
        text + " ",
        text.replace("\\", "", 1),
        text.replace("{", "{ ", 3),  # benign
    ]
    encoded = r.choice(kinds).encode()
    if r.random() < 0.1:
        encoded = encoded.replace(b"dtype", b"dty\xffe", 1)
    return join(encoded, stored.body())


def manifest_text(r: random.Random, data: bytes) -> bytes:
    stored = Stored.parse(data)
    header = stored.header()
    text = header["__metadata__"][KEY]
    header["__metadata__"][KEY] = r.choice(
        [
            text[:-1] + ', "schema": 1}',
            text[:-1] + ', "sha256": "0"}',
            text.replace('"stored"', '"stored": [], "stored"', 1),
            text.replace("null", "NaN", 1),
            text.replace(": 1,", ": 1e999,", 1),
            text.replace(": 1,", ": " + "1" * 5000 + ",", 1),
            text.replace("null", "[" * 50_000, 1),
            text[: r.randrange(len(text))],
            "",
            "3",
            text + text,
        ]
    )
    return join(json.dumps(header).encode(), stored.body())


# Forged manifests and tensors, whose checksum fits.


def manifest_value(r: random.Random, stored: Stored) -> None:
    for _ in range(r.choice([1, 1, 1, 2, 5])):
        container, key = r.choice(places(stored.manifest))
        container[key] = r.choice(HOSTILE)(r)


def manifest_near(r: random.Random, stored: Stored) -> None:
    """A value of the right type, and yet another one."""
    numbers = [(c, k) for c, k in places(stored.manifest) if type(c[k]) in (bool, int, float, str)]
    container, key = r.choice(numbers)
    old = container[key]
    if isinstance(old, bool):
        container[key] = not old
    elif isinstance(old, int):
        container[key] = r.choice([old + 1, old - 1, -old, 0, old * 2, 10**9, 2**53])
    elif isinstance(old, float):
        container[key] = r.choice([-old, 0.0, old * 2, old + 1, 1e30, 1e-30, int(old)])
    else:
        others = [c[k] for c, k in numbers if isinstance(c[k], str)]
        container[key] = r.choice([r.choice(others), old[:-1], old + "0", old.upper()])


def manifest_schema(r: random.Random, stored: Stored) -> None:
    stored.manifest["schema"] = r.choice([2, 99, 0, -1, "1", 1.0, True, None, [1], 2**62])


def manifest_delete(r: random.Random, stored: Stored) -> None:
    container, key = r.choice(places(stored.manifest))
    if isinstance(container, dict) and r.random() < 0.4:
        container[r.choice(NAMES)] = container.pop(key)
    else:
        del container[key]


def manifest_swap(r: random.Random, stored: Stored) -> None:
    first, second = r.sample(places(stored.manifest), 2)
    a, b = (copy.deepcopy(c[k]) for c, k in (first, second))
    first[0][first[1]] = b
    if second[1] in (second[0] if isinstance(second[0], dict) else range(len(second[0]))):
        second[0][second[1]] = a


def manifest_size(r: random.Random, stored: Stored) -> None:
    """Sizes that would be enormous."""
    base = stored.manifest["base"]["architecture"]
    huge = r.choice([10**6, 2**20, 2**31, 10**12, 63.9, 1e300])
    place = r.choice([*(key for key in base if key != "name")])
    base[place] = [huge] * 3 if isinstance(base[place], list) else huge
    if r.random() < 0.5:
        shape = r.choice(
            [[2**11, 2**11, 1], [3, 2**20, 2**20], [3, 1100, 1100], [2**22], [1, 1, 1]]
        )
        stored.manifest["attributes"]["input_shape_"] = {"tuple": shape}
        stored.manifest["attributes"]["n_features_in_"] = shape[0]


def tensor_bytes(r: random.Random, stored: Stored) -> None:
    name = r.choice([*stored.tensors])
    dtype, shape, content = stored.tensors[name]
    new = bytearray(content)
    for _ in range(r.choice([1, 3, 20])):
        if new:
            new[r.randrange(len(new))] = r.randrange(256)
    stored.tensors[name] = (dtype, shape, bytes(new))


def tensor_fill(r: random.Random, stored: Stored) -> None:
    name = r.choice([*stored.tensors])
    dtype, shape, content = stored.tensors[name]
    kinds = {"F32": "<f4", "F64": "<f8", "I32": "<i4", "I64": "<i8"}
    if dtype not in kinds:
        stored.tensors[name] = (dtype, shape, r.choice([b"\0", b"\1", b"\xff"]) * len(content))
        return
    values = np.frombuffer(content, kinds[dtype]).copy()
    if dtype[0] == "F":
        new = r.choice([np.nan, np.inf, -np.inf, 0.0, 3e38, -1.0, 1e-40])
    else:
        new = r.choice([-1, 0, 1, 2**31 - 1, -(2**31), 999])
    if r.random() < 0.5:
        values[:] = new
    elif len(values):
        values[r.randrange(len(values))] = new
    stored.tensors[name] = (dtype, shape, values.tobytes())


def tensor_swap(r: random.Random, stored: Stored) -> None:
    first, second = r.sample([*stored.tensors], 2)
    tensors = stored.tensors
    tensors[first], tensors[second] = tensors[second], tensors[first]


def tensor_twin(r: random.Random, stored: Stored) -> None:
    """Swap two tensors of one type and shape: only the values change."""
    kinds: dict[str, list[str]] = {}
    for name, (dtype, shape, _) in stored.tensors.items():
        kinds.setdefault(f"{dtype}{shape}", []).append(name)
    first, second = r.sample(r.choice([names for names in kinds.values() if len(names) > 1]), 2)
    tensors = stored.tensors
    tensors[first], tensors[second] = tensors[second], tensors[first]


def tensor_kind(r: random.Random, stored: Stored) -> None:
    """The same bytes as another shape or type."""
    name = r.choice([*stored.tensors])
    dtype, shape, content = stored.tensors[name]
    twin = {"F32": "I32", "I32": "F32", "F64": "I64", "I64": "F64", "BOOL": "U8"}
    new = r.choice([shape[::-1], [1, *shape], [*shape, 1], [int(np.prod(shape))], shape])
    stored.tensors[name] = (twin.get(dtype, dtype) if r.random() < 0.5 else dtype, new, content)


def tensor_cut(r: random.Random, stored: Stored) -> None:
    """Fewer, or more, rows."""
    name = r.choice([n for n, (_, shape, _) in stored.tensors.items() if shape])
    dtype, shape, content = stored.tensors[name]
    row = len(content) // max(shape[0], 1)
    n = r.choice([0, 1, shape[0] - 1, shape[0] + 1, 2 * shape[0]])
    stored.tensors[name] = (dtype, [n, *shape[1:]], (content * 3)[: n * row])


def tensor_name(r: random.Random, stored: Stored) -> None:
    name = r.choice([*stored.tensors])
    new = r.choice(["../../x", "/etc/passwd", "__class__", "", name + "x", "base/" + name, "\x00"])
    kept = stored.tensors if r.random() < 0.3 else dict(stored.tensors)
    content = kept[name] if kept is stored.tensors else kept.pop(name)
    kept[new] = content
    stored.tensors = kept


def tensor_drop(r: random.Random, stored: Stored) -> None:
    del stored.tensors[r.choice([*stored.tensors])]


def other_estimator(r: random.Random, stored: Stored) -> None:
    """Parts of one file in another."""
    other = Stored.parse(originals()[r.choice([*originals()])])
    for key in r.sample([*stored.manifest], r.choice([1, 2, 4])):
        stored.manifest[key] = other.manifest[key]
    if r.random() < 0.5:
        stored.tensors = {**stored.tensors, **other.tensors}


RAW = (flip_bytes, flip_header, truncate, append, header_length, replace_block)
TEXT = (header_entry, header_text, manifest_text)
FORGED = (
    manifest_value,
    manifest_near,
    manifest_schema,
    manifest_delete,
    manifest_swap,
    manifest_size,
    tensor_bytes,
    tensor_fill,
    tensor_swap,
    tensor_twin,
    tensor_kind,
    tensor_cut,
    tensor_name,
    tensor_drop,
    other_estimator,
)
# Most of the cases go where most of the code is.
WEIGHTS = [2] * len(RAW) + [3] * len(TEXT) + [8, 8, 1, 4, 4, 3] + [4] * 8 + [2]


def mutate(seed: int, case: int) -> tuple[str, bytes]:
    """Name of the mutation, and the file."""
    r = random.Random(f"{seed}/{case}")
    data = originals()[r.choice([*originals()])]
    how: Any = r.choices([*RAW, *TEXT, *FORGED], WEIGHTS)[0]
    if how not in FORGED:
        return how.__name__, how(r, data)
    stored = Stored.parse(data)
    try:
        how(r, stored)
        return how.__name__, stored.pack()
    except (
        KeyError,
        TypeError,
        IndexError,
        OverflowError,
    ):  # two of them got into each other's way
        return "flip_bytes", flip_bytes(r, data)


def try_file(path: Path) -> str:
    """Load and predict: what came of it.  Anything that is not as documented is an AssertionError.

    A wrong device is no damage: the file says where the networks were.
    """
    OPENED.clear()
    try:
        estimator = load(path, max_bytes=256 * 2**20)
    except sinfkit.StorageError as error:
        outcome = "refused by the last net" if "do not fit together (" in str(error) else "refused"
        assert str(error).startswith(repr(str(path))) and len(str(error)) < 2000
    else:
        outcome = "loaded"
        try:
            check_predictions(estimator)
        except ValueError as error:
            # Other weights are a network too, even one that answers with NaN, and predict says so.
            assert "NaN or infinite" in str(error), error
    strange = [event for event in OPENED if event != f"open {path}"]
    assert not strange, strange
    return outcome


def check_predictions(estimator: Any) -> None:
    """What was loaded answers."""
    n = 3
    X = np.sin(np.arange(n * np.prod(estimator.input_shape_))).astype(np.float32)
    X = X.reshape(n, *estimator.input_shape_)
    if estimator.n_features_in_ != X.shape[1]:
        X = X.reshape(n, -1)
    answers = estimator.predict(X)
    assert answers.shape == (n,)
    if isinstance(estimator, sinfkit.SemanticClusterer):
        assert set(answers) <= set(range(len(estimator.cluster_names_)))
        assert estimator.transform(X).shape == (n, len(estimator.cluster_names_))
        return
    assert set(answers) <= set(estimator.classes_)
    assert estimator.predict_proba(X).shape == (n, len(estimator.classes_))
    if isinstance(estimator, sinfkit.SINFClassifier):
        assert set(estimator.predict_cluster(X)) <= set(range(len(estimator.cluster_names_)))


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Write down what touches files, processes or the network."""
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        name = os.fsdecode(arguments[0])
        # Modules that are imported at their first use, and the source lines of tracebacks, are
        # read from where Python, torch and the package lie.
        ours = name.startswith(PACKAGE) and name.endswith(".py")
        python = name.startswith((sys.prefix, sys.base_prefix)) or "/torch/" in name
        if not ours and not python:
            OPENED.append(f"open {name}")
    elif event.startswith(
        ("subprocess.", "os.system", "os.exec", "os.spawn", "socket.", "os.remove")
    ):
        OPENED.append(event)


def memory() -> int:
    """Largest resident memory so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(count: int, seed: int, start: int = 0) -> tuple[Counter[tuple[str, str]], int]:
    """Try `count` files; outcomes by mutation, and growth of the resident memory in bytes.

    Raises
    ------
    AssertionError
        At the first file that is not handled as documented; it names the case.
    """
    outcomes: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "case.sinf"
        for data in originals().values():
            path.write_bytes(data)
            assert try_file(path) == "loaded"
        before = memory()
        for case in range(start, start + count):
            name, data = mutate(seed, case)
            path.write_bytes(data)
            try:
                outcomes[name, try_file(path)] += 1
            except BaseException as error:
                raise AssertionError(f"case {case} of seed {seed}, {name}: {error!r}") from error
    return outcomes, memory() - before


def main() -> None:
    """Run the long form, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="first case")
    options = parser.parse_args()
    sys.addaudithook(watch)
    run(0, 0)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_SPACE,) * 2)
    began = time.perf_counter()
    outcomes, growth = run(options.count, options.seed, options.start)
    assert growth < MEMORY, f"memory grew by {growth / 2**20:.0f} MiB"
    results = sorted({outcome for _, outcome in outcomes})
    print(f"{'':18}" + "".join(f"{result:>26}" for result in results))
    for name in sorted({name for name, _ in outcomes}):
        print(f"{name:18}" + "".join(f"{outcomes[name, result]:>26}" for result in results))
    totals = [sum(n for (_, r), n in outcomes.items() if r == result) for result in results]
    print(f"{'all':18}" + "".join(f"{n:>26}" for n in totals))
    seconds = time.perf_counter() - began
    print(f"{sum(totals)} files in {seconds:.0f} s; memory grew by {growth / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()

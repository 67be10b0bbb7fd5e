"""What devices send to one another in a compiled program.

Owns how XLA's text of a program is read: its computations, how often each is carried out, its collective operations with their
groups, and which axes of the mesh these run along. Must not know what is computed.

Bytes are those that a device sends where n of them work as a ring, which is the least: an all-gather n - 1 times its part, a
reduce-scatter or all-to-all (n - 1) / n of its input, an all-reduce twice that, a permute its input (Thakur et al., 2005).
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

__all__ = ["Collective", "collectives", "sent"]

_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_HEAD = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|c\d+|f8\w*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLS = re.compile(
    r"\b(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    r"|\b(?:branch_computations|called_computations|calls)=\{([^}]*)\}"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_MESH = re.compile(r"mesh\[(?P<dims>[^\]]*)\](?:, device_ids=\((?P<ids>\S*)\))? ?\{(?P<axes>[^}]*)\}")
_IOTA = re.compile(r"\[(?P<shape>[\d,]+)\]<=\[(?P<dims>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?")
_MIXED = re.compile(r"\[(?P<dims>[\d,]+)\]T\((?P<order>[\d,]+)\)")


class Collective(NamedTuple):
    """One collective operation of a program."""

    kind: str  # as XLA calls it, without what says that it is asynchronous
    axes: tuple[str, ...]  # of the mesh, along which devices differ that take part in one
    bytes: float  # that a device sends each time
    times: int  # in one execution of the program


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    given: str  # its operands, or the value of a constant, in brackets
    attributes: str

    @property
    def operands(self) -> list[str]:
        return _NAME.findall(self.given)


def collectives(text: str, mesh: Mapping[str, int], unknown: int = 1) -> list[Collective]:
    """The collective operations of a compiled program.

    Args:
      text: `jax.stages.Compiled.as_text()`.
      mesh: axes and sizes, as of `jax.sharding.Mesh.shape`, in whose order the program numbers devices.
      unknown: how often a loop goes round whose count neither the program nor its condition says.

    Raises:
      ValueError: groups are written in a way that is not known here.
    """
    computations, entry = _read(text)
    times = _times(computations, entry, unknown)
    size = {one.name: _bytes(one.shape) for some in computations.values() for one in some}
    found, channels = list[Collective](), set[str]()
    for name, some in computations.items():
        for one in some:
            kind = one.opcode.removesuffix("-start")
            if kind not in _KINDS or not times[name]:
                continue
            members = _members(one, math.prod(mesh.values()))
            if members.shape[1] < 2:
                continue
            if "fus" in name and (channel := re.search(r"\bchannel_id=(\d+)", one.attributes)):
                # TPU: the fusions that it goes on beside name it again.
                if channel[1] in channels:
                    continue
                channels.add(channel[1])
            if name.startswith("all-reduce-scatter"):  # TPU: one operation, written as a fusion of an all-reduce and a slice
                kind = "reduce-scatter"
            given = sum(size[operand] for operand in one.operands)
            found.append(Collective(kind, _axes(members, mesh), _sent(kind, members.shape[1], given), times[name]))
    return found


def sent(found: list[Collective]) -> dict[tuple[str, tuple[str, ...]], float]:
    """Kind and axes → bytes that a device sends in one execution of the program."""
    total = Counter[tuple[str, tuple[str, ...]]]()
    for one in found:
        total[one.kind, one.axes] += one.bytes * one.times  # type: ignore[assignment]
    return dict(total)


def _sent(kind: str, n: int, given: int) -> float:
    if kind == "all-gather":
        return float(given * (n - 1))
    if kind == "collective-permute":
        return float(given)
    return given * (n - 1) / n * (2 if kind == "all-reduce" else 1)


# --- the text -----------------------------------------------------------------------------------------------------------


def _read(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Computation → instructions, and the name of the one that is called first."""
    computations, entry, here = dict[str, list[_Instruction]](), "", list[_Instruction]()
    for line in text.splitlines():
        if (head := _HEAD.match(line)) and " = " not in line.partition("(")[0]:
            here = computations[head["name"]] = []
            entry = head["name"] if head["entry"] else entry
        elif found := _LINE.match(line):
            shape, rest = _cut(found["rest"])
            opcode, _, after = rest.partition("(")
            here.append(_Instruction(found["name"], shape, opcode, *_closed("(" + after)))
    return computations, entry


def _cut(rest: str) -> tuple[str, str]:
    """A shape, which may be a tuple, and what follows."""
    if rest.startswith("("):
        shape, after = _closed(rest)
        return shape, after.lstrip()
    shape, _, after = rest.partition(" ")
    return shape, after


def _closed(text: str) -> tuple[str, str]:
    """What the bracket at the beginning holds, and what follows it."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[: place + 1], text[place + 1 :]
    return text, ""


def _bytes(shape: str) -> int:
    def each(kind: str, dims: str) -> int:
        bits = 8 if kind == "pred" or kind.startswith("f8") else int(re.sub(r"\D", "", kind))
        return math.prod(int(n) for n in dims.split(",") if n) * bits // 8

    return sum(each(*array) for array in _ARRAY.findall(shape))


# --- how often ----------------------------------------------------------------------------------------------------------


def _times(computations: dict[str, list[_Instruction]], entry: str, unknown: int) -> Counter[str]:
    """How often each computation is carried out."""
    times = Counter[str]()

    def enter(name: str, count: int) -> None:
        times[name] += count
        for one in computations[name]:
            if one.opcode.endswith(("-done", "-update")):  # they name again what their start carries out
                continue
            rounds = _rounds(one, computations, unknown) if one.opcode == "while" else 1
            for single, several in _CALLS.findall(one.attributes):
                for called in (single, *_NAME.findall(several)):
                    if called in computations:
                        enter(called, count * rounds)

    enter(entry, 1)
    return times


def _rounds(loop: _Instruction, computations: dict[str, list[_Instruction]], unknown: int) -> int:
    """How often a loop goes round: as XLA says, or else by its condition, where that compares a counter with a constant."""
    if known := _TRIPS.search(loop.attributes):
        return int(known[1])
    condition = re.search(r"\bcondition=%?([\w.\-]+)", loop.attributes)
    if condition is None:
        return unknown
    here = {one.name: one for one in computations[condition[1]]}
    last = computations[condition[1]][-1]
    if last.opcode != "compare" or "direction=LT" not in last.attributes:
        return unknown
    bound = here.get(last.operands[1])
    # The counter of a scan, and of a product whose parts are exchanged meanwhile, goes from 0 by 1.
    return int(bound.given.strip("()")) if bound is not None and bound.opcode == "constant" else unknown


# --- between whom -------------------------------------------------------------------------------------------------------


def _members(one: _Instruction, devices: int) -> np.ndarray:
    """The devices of each group, by their number in the program: [groups, members]; of a permute each pair is one."""
    given = one.attributes
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", given):
        ends = np.array([[int(number) for number in pair.split(",")] for pair in re.findall(r"(\d+,\d+)", pairs[1])])
        moved = ends[ends[:, 0] != ends[:, 1]]
        return moved if len(moved) else np.zeros((1, 1), int)
    groups = given.partition("replica_groups=")[2]
    if named := _MESH.match(groups):
        dims = {name: int(number) for name, number in re.findall(r"'(\w+)'=(\d+)", named["dims"])}
        along = [list(dims).index(axis) for axis in re.findall(r"'(\w+)'", named["axes"])]
        ids = _mixed(named["ids"], devices)
        if ":" not in named["axes"] and ids is not None and ids.size == math.prod(dims.values()):  # no axis in parts
            numbered = ids.reshape(tuple(dims.values()))
            members = math.prod(numbered.shape[axis] for axis in along)
            return np.moveaxis(numbered, along, range(-len(along), 0)).reshape(-1, members)
    elif iota := _IOTA.match(groups):
        sizes = _numbers(iota["dims"])
        order = _numbers(iota["order"]) if iota["order"] else range(len(sizes))
        return np.arange(math.prod(sizes)).reshape(sizes).transpose(order).reshape(_numbers(iota["shape"]))
    elif groups.startswith("{}"):
        return np.arange(devices)[None]
    elif listed := re.match(r"\{(\{[\d,]+\},?)+\}", groups):
        return np.array([_numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed[0])])
    raise ValueError(f"{one.name}: groups are written as {groups[:100]!r}")


def _mixed(ids: str | None, devices: int) -> np.ndarray | None:
    """The devices of a mesh in its order, counted up where nothing is said; None: written in a way that is not known here."""
    if ids is None:
        return np.arange(devices)
    if mixed := _MIXED.fullmatch(ids):
        sizes = _numbers(mixed["dims"])
        return np.arange(math.prod(sizes)).reshape(sizes).transpose(_numbers(mixed["order"])).reshape(-1)
    return np.array(_numbers(ids)) if re.fullmatch(r"[\d,]+", ids) else None


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _axes(members: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which the members of a group differ; the program numbers devices as the mesh lays them."""
    places = np.stack(np.unravel_index(members, tuple(mesh.values())))
    return tuple(axis for axis, place in zip(mesh, places, strict=True) if (place != place[:, :1]).any())

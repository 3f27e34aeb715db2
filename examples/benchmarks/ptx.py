"""Runs the PTX of a kernel on a CPU: what a compiler made of it, without a GPU.

The 32 threads of a warp go in step, those that are behind first, so that branches meet again.
Between barriers warps go in any order, drawn by a seed: one that should have waited may find what
another has written already. Arithmetic is NumPy's, approximations are rounded correctly, and a
product that is added is rounded in float64. Addresses are checked. Instructions are those that our
kernels have: others raise.
"""

import operator
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

WARP = 32
_LANES = np.arange(WARP)
_BUFFER = 40  # bits of an address within a buffer; those above are the buffer's number
_WORDS = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_TYPES: dict[str, Any] = {
    **{f"{kind}{bits}": word for bits, word in _WORDS.items() for kind in "ub"},
    **{f"s{bits}": np.dtype(f"int{bits}").type for bits in _WORDS},
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "f32": np.float32,
    "pred": np.bool_,
}


class Instruction(NamedTuple):
    """One line: ``@guard opcode.modifiers args``."""

    guard: str | None  # a predicate, with ! if it must be false
    opcode: str
    modifiers: tuple[str, ...]
    args: tuple[str, ...]

    @property
    def type(self) -> str:
        """The last modifier."""
        return self.modifiers[-1]


class Kernel(NamedTuple):
    """A function of a PTX text."""

    instructions: list[Instruction]
    labels: dict[str, int]
    parameters: int


def parse(text: str) -> Kernel:
    """The one kernel of a text."""
    body = text[text.index("{", text.index(".entry")) :]
    found, labels = [], {}
    for raw in body.splitlines():
        line = raw.split("//")[0].strip()
        if label := re.fullmatch(r"(\$\w+):", line):
            labels[label[1]] = len(found)
        elif line.endswith(";") and not line.startswith("."):
            guard, head, rest = re.findall(r"(?:@(\S+)\s+)?(\S+)\s*(.*);", line)[0]
            # Commas part arguments, but not within brackets.
            args = tuple(re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^\s,]+", rest))
            opcode, *modifiers = head.split(".")
            found.append(Instruction(guard or None, opcode, tuple(modifiers), args))
    return Kernel(found, labels, len(set(re.findall(r"_param_(\d+)\]", body))))


class _Warp:
    """Registers, as words of 64 bits, and where each thread is."""

    def __init__(self, number: int):
        self.thread = number * WARP + _LANES
        self.registers: dict[str, np.ndarray] = {}
        self.at = np.zeros(WARP, int)
        self.done, self.waits = np.zeros(WARP, bool), False


def _approximate(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: function(*(x.astype(np.float64) for x in args)).astype(np.float32)


def _shifted(x: np.ndarray, n: np.ndarray, shift: Any) -> np.ndarray:
    bits = 8 * x.itemsize
    return np.where(n < bits, shift(x, n.astype(x.dtype) % bits), np.zeros_like(x))


def _extreme(number: Any, nan: Any) -> Callable[..., Any]:
    def of(i: Instruction, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (nan if "NaN" in i.modifiers else number)(x, y)

    return of


def _product(i: Instruction, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if "wide" not in i.modifiers and "hi" not in i.modifiers:
        return x * y
    wide = np.int64 if i.type[0] == "s" else np.uint64
    product, bits = x.astype(wide) * y.astype(wide), int(i.type[1:])
    return product if "wide" in i.modifiers else (product >> wide(bits)).astype(x.dtype)


# Of an instruction and its sources, all of its type.
_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "cvta": lambda i, x: x,
    "neg": lambda i, x: -x,
    "abs": lambda i, x: np.abs(x),
    "not": lambda i, x: ~x,
    "rcp": lambda i, x: _approximate(lambda x: 1 / x)(x),
    "div": lambda i, x, y: _approximate(np.divide)(x, y),
    "sqrt": lambda i, x: _approximate(np.sqrt)(x),
    "rsqrt": lambda i, x: _approximate(lambda x: 1 / np.sqrt(x))(x),
    "add": lambda i, x, y: x + y,
    "sub": lambda i, x, y: x - y,
    "mul": _product,
    "and": lambda i, x, y: x & y,
    "or": lambda i, x, y: x | y,
    "xor": lambda i, x, y: x ^ y,
    "max": _extreme(np.fmax, np.maximum),
    "min": _extreme(np.fmin, np.minimum),
    "mad": lambda i, x, y, z: x * y + z,
    "fma": lambda i, x, y, z: _approximate(lambda x, y, z: x * y + z)(x, y, z),
}
_COMPARISONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq")},
    "ne": lambda x, y: (x < y) | (x > y),
    "nan": lambda x, y: np.isnan(x) | np.isnan(y),
}
_NOTHING = ("fence", "griddepcontrol")


class _Machine:
    """A block of threads, and the memory."""

    def __init__(self, kernel: Kernel, buffers: list[np.ndarray], threads: int, block: int):
        self.kernel, self.block = kernel, block
        self.buffers = [x.reshape(-1).view(np.uint8) for x in buffers]
        self.shared = np.zeros(1 << 16, np.uint8)
        self.warps = [_Warp(i) for i in range(threads // WARP)]

    def run(self, rng: np.random.Generator) -> None:
        """To the end."""
        while not all(warp.done.all() for warp in self.warps):
            ready = [w for w in self.warps if not w.waits and not w.done.all()]
            if ready:
                self._go(ready[rng.integers(len(ready))])
            else:
                for warp in self.warps:
                    warp.waits = False

    def _go(self, warp: _Warp) -> None:
        """To the next barrier."""
        while not warp.done.all():
            at = warp.at[~warp.done].min()
            here = ~warp.done & (warp.at == at)
            i = self.kernel.instructions[at]
            warp.at[here] = at + 1
            if i.guard is not None:
                value = self._read(warp, i.guard.lstrip("!"), "pred")
                here &= ~value if i.guard[0] == "!" else value
            if i.opcode == "bra":
                warp.at[here] = self.kernel.labels[i.args[0]]
            elif i.opcode == "ret":
                warp.done |= here
            elif i.opcode == "bar":
                warp.waits = True
                return
            elif here.any() and i.opcode not in _NOTHING:
                with np.errstate(all="ignore"):
                    self._execute(warp, i, here)

    def _read(self, warp: _Warp, name: str, kind: str) -> np.ndarray:
        """A register, or a constant, as numbers of a type."""
        if name.startswith(("%tid", "%ctaid")):
            raw = warp.thread if name.startswith("%tid") else np.full(WARP, self.block)
        elif name.startswith("%"):
            raw = warp.registers[name]
        elif "shmem" in name:  # where it begins
            raw = np.zeros(WARP, np.uint64)
        else:
            number = int(name[2:], 16) if name.startswith("0f") else int(name, 0)
            raw = np.full(WARP, number & (2**64 - 1), np.uint64)
        if kind == "pred":
            return raw.astype(bool)
        dtype = np.dtype(_TYPES[kind])
        return raw.astype(_WORDS[8 * dtype.itemsize]).view(dtype)

    def _write(self, warp: _Warp, name: str, value: np.ndarray, here: np.ndarray) -> None:
        word = np.uint8 if value.dtype == bool else _WORDS[8 * value.dtype.itemsize]
        old = warp.registers.get(name, np.zeros(WARP, np.uint64))
        warp.registers[name] = np.where(here, value.view(word).astype(np.uint64), old)

    def _execute(self, warp: _Warp, i: Instruction, here: np.ndarray) -> None:
        target = i.args[0]
        if i.opcode in ("ld", "st"):
            self._access(warp, i, here)
        elif i.opcode == "mov":
            self._move(warp, i, here)
        elif i.opcode == "elect":
            self._write(warp, target.split("|")[1], here & (_LANES == _LANES[here][0]), here)
        elif i.opcode == "setp":
            x, y = (self._read(warp, name, i.type) for name in i.args[1:3])
            value = _COMPARISONS[i.modifiers[0]](x, y)
            if i.modifiers[1] in ("and", "or"):
                other = self._read(warp, i.args[3], "pred")
                value = value & other if i.modifiers[1] == "and" else value | other
            self._write(warp, target, value, here)
        else:
            self._write(warp, target, self._value(warp, i, here), here)

    def _value(self, warp: _Warp, i: Instruction, here: np.ndarray) -> np.ndarray:
        """What an instruction without side effects gives."""
        if i.opcode in ("shfl", "redux"):
            assert here.all(), "exchanged by a part of a warp"
            x = self._read(warp, i.args[1], i.type)
            if i.opcode == "redux":
                return np.full(WARP, x.max())
            lane = self._read(warp, i.args[2], "u32")
            return x[_LANES ^ lane if "bfly" in i.modifiers else lane % WARP]
        if i.opcode == "selp":
            x, y = (self._read(warp, name, i.type) for name in i.args[1:3])
            return np.where(self._read(warp, i.args[3], "pred"), x, y)
        if i.opcode in ("shl", "shr"):
            shift = np.left_shift if i.opcode == "shl" else np.right_shift
            x, n = self._read(warp, i.args[1], i.type), self._read(warp, i.args[2], "u32")
            return _shifted(x, n, shift)
        if i.opcode == "cvt":
            x, dtype = self._read(warp, i.args[1], i.type), _TYPES[i.modifiers[-2]]
            if "rzi" in i.modifiers:  # beyond the integers their ends, and of NaN 0
                ends = np.iinfo(dtype)
                x = np.clip(np.nan_to_num(np.trunc(x.astype(np.float64))), ends.min, ends.max)
            return x.astype(dtype)
        kind = "u64" if i.opcode == "cvta" else i.type
        return _ARITHMETIC[i.opcode](i, *(self._read(warp, name, kind) for name in i.args[1:]))

    def _move(self, warp: _Warp, i: Instruction, here: np.ndarray) -> None:
        """Of a register, or of one to the parts of another or back."""
        bits, (target, source) = int(i.type[1:]), (_parts(x) for x in i.args)
        each = bits // len(source)
        words = [self._read(warp, x, f"u{each}").astype(np.uint64) for x in source]
        whole = sum(word << np.uint64(each * k) for k, word in enumerate(words))
        each = bits // len(target)
        for k, name in enumerate(target):
            if name != "_":
                part = (np.asarray(whole) >> np.uint64(each * k)).astype(_WORDS[each])
                self._write(warp, name, part, here)

    def _access(self, warp: _Warp, i: Instruction, here: np.ndarray) -> None:
        """A load or a store, of one number or of several in a row."""
        loads = i.opcode == "ld"
        names, address = _parts(i.args[0 if loads else 1]), i.args[1 if loads else 0].strip("[]")
        if "param" in i.modifiers[0]:
            (number,) = re.findall(r"_param_(\d+)$", address)
            return self._write(warp, names[0], np.full(WARP, int(number) << _BUFFER), here)
        base, _, offset = address.partition("+")
        start = self._read(warp, base, "s64") + int(offset or 0)
        dtype = np.dtype(_TYPES[i.type])
        for k, name in enumerate(names):
            at = start + k * dtype.itemsize
            if loads:
                value = np.zeros(WARP, dtype)
                for lane in _LANES[here]:
                    value[lane] = self._memory(i, int(at[lane]), dtype, True)[0]
                self._write(warp, name, value.astype(np.int64) if i.type[0] == "s" else value, here)
                continue
            value = self._read(warp, name, i.type)
            for lane in _LANES[here]:
                self._memory(i, int(at[lane]), dtype, False)[0] = value[lane]
        return None

    def _memory(self, i: Instruction, at: int, dtype: np.dtype, loads: bool) -> np.ndarray:
        """The one number at an address."""
        memory = self.shared
        if "shared" not in i.modifiers:
            memory, at = self.buffers[at >> _BUFFER], at & ((1 << _BUFFER) - 1)
            # A wide load may end behind a buffer, where nothing is used of it.
            if loads and memory.nbytes <= at < -(-memory.nbytes // 16) * 16:
                return np.zeros(1, dtype)
        assert at % dtype.itemsize == 0 and 0 <= at <= memory.nbytes - dtype.itemsize, (i, at)
        return memory[at : at + dtype.itemsize].view(dtype)


def _parts(argument: str) -> list[str]:
    """The names of a vector, or the one."""
    return [name.strip() for name in argument.strip("{}").split(",")]


def run(text: str, buffers: list[np.ndarray], programs: int, threads: int, seed: int) -> None:
    """Runs a kernel over a grid; buffers, its parameters, are written in place."""
    kernel, rng = parse(text), np.random.default_rng(seed)
    assert kernel.parameters == len(buffers), (kernel.parameters, len(buffers))
    for block in range(programs):
        _Machine(kernel, buffers, threads, block).run(rng)

"""Evaluates AMD's published pseudocode of CDNA instructions, one lane at a time, in plain Python.

The text is data of the package tinygrad. This evaluator shares nothing with the emulator. It works
on Python integers and on `fractions`, so that the two agree only if both are right. It does not
know the whole language, and raises `UnsupportedError` for the rest.
"""

import math
import re
from fractions import Fraction
from functools import cache

from tinygrad.runtime.autogen.amd.cdna.str_pcode import PCODE

from tests.support.gfx950_values import (
    SILENT,
    NaN,
    UnsupportedError,
    Value,
    convert,
    exact_float,
    exact_fma,
    from_bits,
    round_to_bf16,
    rounded,
    small_float,
    special_float,
    to_bits,
    to_small,
)


@cache
def pseudocode() -> dict[str, str]:
    """The pseudocode by mnemonic, in lower case and without the encoding suffix."""
    return {re.sub(r"_e(32|64)$", "", op.name.lower()): text for op, text in PCODE.items()}


TOKEN = re.compile(
    r"\s*(\d+'(?:0x[0-9a-fA-F]+U?|\d+U?|[A-Z]+)|0x[0-9a-fA-F]+(?:ULL|LL|U)?|\d+\.\d+F?|\d+(?:ULL|LL|U|F)?"
    r"|[A-Za-z_]\w*|<>|<=|>=|==|!=|<<|>>|&&|\|\||\*\*|\+=|[-+*/%&|^~!?:;,.=<>()\[\]{}])"
)
LEVELS = [
    ["||"],
    ["&&"],
    ["|"],
    ["^"],
    ["&"],
    ["==", "!=", "<>"],
    ["<", "<=", ">", ">="],
    ["<<", ">>"],
]
LEVELS += [["+", "-"], ["*", "/", "%"], ["**"]]


class Parser:
    """Parses a text into a list of statements, as nested tuples."""

    def __init__(self, text: str) -> None:
        text = re.sub(r"//.*", "", text).strip()
        self.tokens: list[str] = []
        place = 0
        while place < len(text):
            match = TOKEN.match(text, place)
            if match is None:
                if not text[place:].strip():
                    break
                raise UnsupportedError(f"text {text[place : place + 20]!r}")
            self.tokens.append(match[1])
            place = match.end()
        self.place = 0

    def peek(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def take(self, expected: str | None = None) -> str:
        token = self.peek()
        if not token or (expected is not None and token != expected):
            raise UnsupportedError(f"{token!r} where {expected!r} should be")
        self.place += 1
        return token

    def block(self, *ends: str) -> list:
        statements = []
        while self.peek() and self.peek() not in ends:
            statements.append(self.statement())
            while self.peek() == ";":
                self.take()
        return statements

    def statement(self) -> tuple:
        if self.peek() == "if":
            return self.conditional()
        if self.peek() == "for":
            self.take()
            name = self.take()
            self.take("in")
            first = self.expression(1)
            self.take(":")
            last = self.expression(1)
            self.take("do")
            body = self.block("endfor")
            self.take("endfor")
            return "for", name, first, last, body
        if self.peek() == "break":
            self.take()
            return ("break",)
        if self.peek() == "declare":
            while self.peek() != ";":
                self.take()
            return ("pass",)
        targets = [self.expression(1)]
        operator = self.take()
        if operator not in ("=", "+="):
            raise UnsupportedError(f"statement with {operator!r}")
        value = self.expression()
        while self.peek() == "=":
            self.take()
            targets.append(value)
            value = self.expression()
        return "assign", targets, operator, value

    def conditional(self) -> tuple:
        self.take()  # if or elsif
        condition = self.expression()
        self.take("then")
        body = self.block("elsif", "else", "endif")
        if self.peek() == "elsif":
            return "if", condition, body, [self.conditional()]
        otherwise = []
        if self.peek() == "else":
            self.take()
            otherwise = self.block("endif")
        self.take("endif")
        return "if", condition, body, otherwise

    def expression(self, level: int = -1) -> tuple:
        if level == -1:
            condition = self.expression(0)
            if self.peek() != "?":
                return condition
            self.take()
            yes = self.expression()
            self.take(":")
            return "choose", condition, yes, self.expression()
        if level == len(LEVELS):
            return self.unary()
        left = self.expression(level + 1)
        while self.peek() in LEVELS[level]:
            left = ("binary", self.take(), left, self.expression(level + 1))
        return left

    def unary(self) -> tuple:
        if self.peek() in ("-", "+", "~", "!"):
            return "unary", self.take(), self.unary()
        node = self.primary()
        while self.peek() in (".", "["):
            if self.take() == ".":
                node = ("view", node, self.take())
                continue
            first = self.expression()
            if self.peek() == ":":
                self.take()
                node = ("bits", node, first, self.expression())
            else:
                node = ("bits", node, first, first)
            self.take("]")
        return node

    def primary(self) -> tuple:
        token = self.take()
        if token == "(":
            inside = self.expression()
            self.take(")")
            return inside
        if token == "{":
            parts = [self.expression()]
            while self.peek() == ",":
                self.take()
                parts.append(self.expression())
            self.take("}")
            return "join", parts
        if cast := re.fullmatch(r"(\d+)'([A-Z]+)", token):
            self.take("(")
            inside = self.expression()
            self.take(")")
            return "cast", inside, cast[2].lower(), int(cast[1])
        if literal := re.fullmatch(r"(\d+)'(0x[0-9a-fA-F]+|\d+)U?", token):
            return "value", Value("u", int(literal[1]), int(literal[2], 0))
        if literal := re.fullmatch(r"(0x[0-9a-fA-F]+|\d+)(ULL|LL|U)?", token):
            suffix = literal[2] or ""
            return "value", Value(
                "u" if "U" in suffix else "i", 64 if "LL" in suffix else 32, int(literal[1], 0)
            )
        if literal := re.fullmatch(r"(\d+(?:\.\d+)?)(F?)", token):
            return "value", Value("f", 32 if literal[2] else 64, float(literal[1]))
        if self.peek() == "(":
            self.take()
            arguments = []
            while self.peek() != ")":
                arguments.append(self.expression())
                if self.peek() == ",":
                    self.take()
            self.take(")")
            return "call", token, arguments
        return "name", token


class BreakError(Exception):
    """A `break`."""


@cache
def parsed(mnemonic: str) -> list:
    text = pseudocode()[mnemonic]
    text = text.replace("VGPR[laneId][VDST.u32]", "D0")
    text = re.sub(r"VGPR\[laneId\]\[SRC(\d)\.u32\]", r"S\1", text)
    if "lambda" in text or "VGPR" in text or "MEM" in text:
        raise UnsupportedError("lambda, VGPR or MEM")
    return Parser(text).block()


class Machine:
    """Runs statements for one lane. registers: raw bits by name (S0, S1, S2, D0, VCC, SCC, EXEC,
    OPSEL). variables: values by name."""

    def __init__(self, lane: int = 0, **registers: int) -> None:
        self.lane = lane
        self.registers: dict[str, int] = {
            "D0": 0,
            "D1": 0,
            "VCC": 0,
            "SCC": 0,
            "EXEC": 0,
            **registers,
        }
        self.variables: dict[str, Value] = {}
        self.is_silent = False  # whether arithmetic gave a NaN, whose bits the text does not define

    def run(self, statements: list) -> "Machine":
        for statement in statements:
            match statement:
                case ("pass",):
                    pass
                case ("break",):
                    raise BreakError
                case ("assign", targets, operator, value):
                    result = self.value(value)
                    for target in targets:
                        if operator == "+=":
                            result = self.binary("+", self.value(target), result)
                        self.assign(target, result)
                case ("if", condition, body, otherwise):
                    self.run(body if self.value(condition).value else otherwise)
                case ("for", name, first, last, body):
                    try:
                        for i in range(
                            int(self.value(first).value), int(self.value(last).value) + 1
                        ):
                            self.variables[name] = Value("i", 32, i)
                            self.run(body)
                    except BreakError:
                        pass
        return self

    def assign(self, target: tuple, value: Value) -> None:
        match target:
            case ("name", name) if name in self.registers:
                self.registers[name] = to_bits(value)
            case ("name", name):
                self.variables[name] = value
            case ("view", inner, view):
                kind, width = type_of(view)
                self.assign(inner, from_bits(to_bits(self.cast(value, kind, width)), "b", width))
            case ("bits", inner, high, low):
                first, last = int(self.value(low).value), int(self.value(high).value)
                if inner[0] == "view":
                    inner = inner[1]
                name = inner[1]
                mask = ((1 << (last - first + 1)) - 1) << first
                if name in self.registers:
                    old = self.registers[name]
                else:
                    old = to_bits(self.variables.get(name, Value("b", 64, 0)))
                bits = (old & ~mask) | ((to_bits(value) << first) & mask)
                if name in self.registers:
                    self.registers[name] = bits
                else:
                    self.variables[name] = Value("b", 64, bits)
            case ("join", parts):
                bits = to_bits(value)
                for part in reversed(parts):
                    width = type_of(part[2])[1]
                    self.assign(part, Value("b", width, bits & ((1 << width) - 1)))
                    bits >>= width
            case _:
                raise UnsupportedError(f"assignment to {target[0]}")

    def cast(self, v: Value, kind: str, width: int) -> Value:
        """Convert the number, not its bits."""
        if kind == "b":
            return v
        if kind in ("f", "bf"):
            if v.kind == "b":
                return from_bits(int(v.value), kind, width)
            if v.is_float and not math.isfinite(v.value):
                return Value(kind, width, v.value)
            exact = Fraction(v.value) if v.value else v.value
            return Value(kind, width, rounded(exact, width) if kind == "f" else float(v.value))
        if v.is_float and not math.isfinite(v.value):
            raise UnsupportedError("infinity or NaN as an integer")
        if v.is_float:
            return from_bits(to_bits(v), kind, width)
        return from_bits(int(v.value), kind, width)

    def value(self, node: tuple) -> Value:
        match node:
            case ("value", value):
                return value
            case ("name", "laneId"):
                return Value("u", 32, self.lane)
            case ("name", "INF"):
                return Value("f", 64, math.inf)
            case ("name", name) if name in self.variables:
                return self.variables[name]
            case ("name", name) if name in self.registers:
                return Value("b", 64, self.registers[name])
            case ("name", "ROUND_MODE" | "ROUND_NEAREST_EVEN"):
                return Value("b", 64, 0)
            case ("name", name):
                raise UnsupportedError(f"name {name}")
            case ("view", ("name", "WAVE_MODE"), "IEEE"):
                return Value("u", 1, 1)
            case ("view", ("name", "NAN"), _):
                return Value("f", 32, NaN(0x7FF8 << 48))
            case ("view", ("name", "INF"), _):
                return Value("f", 32, math.inf)
            case ("view", ("name", "DENORM"), _):
                raise UnsupportedError("DENORM")
            case ("view", inner, view):
                kind, width = type_of(view)
                v = self.value(inner)
                if v.is_float and kind == "b":
                    return Value("b", width, to_bits(v))
                return from_bits(to_bits(v), kind, width)
            case ("bits", inner, high, low):
                bits, first = to_bits(self.value(inner)), int(self.value(low).value)
                width = int(self.value(high).value) - first + 1
                if width < 1:
                    raise UnsupportedError("a reversed range of bits")
                return Value("u", width, bits >> first & ((1 << width) - 1))
            case ("cast", ("value", literal), "f", 32) if literal.value == 0xFFC00000:
                return from_bits(0xFFC00000, "f", 32)  # this constant stands for its bits
            case ("cast", inner, kind, width):
                return self.cast(self.value(inner), kind, width)
            case ("join", parts):
                bits, total = 0, 0
                for part in parts:
                    v = self.value(part)
                    bits, total = bits << v.width | to_bits(v), total + v.width
                return Value("b", total, bits)
            case ("choose", condition, yes, no):
                return self.value(yes if self.value(condition).value else no)
            case ("unary", operator, inner):
                v = self.value(inner)
                if operator == "!":
                    return Value("u", 1, int(not v.value))
                if operator == "-" and v.is_float:
                    return Value(v.kind, v.width, -v.value)
                if v.is_float:
                    return v
                result = {"-": -v.value, "~": ~int(v.value), "+": v.value}[operator]
                return from_bits(result, v.kind, v.width)
            case ("binary", "==", left, ("unary", ("+" | "-") as sign, ("value", zero))) if (
                zero.value == 0
            ):
                x = self.value(left).value  # this comparison distinguishes the sign of zero
                return Value("u", 1, int(x == 0 and (math.copysign(1, x) < 0) == (sign == "-")))
            case ("binary", operator, left, right):
                return self.binary(operator, self.value(left), self.value(right))
            case ("call", name, arguments):
                return self.call(name, [self.value(argument) for argument in arguments])
        raise UnsupportedError(node[0])

    def binary(self, operator: str, a: Value, b: Value) -> Value:
        x, y = a.value, b.value
        logic = {"||": bool(x or y), "&&": bool(x and y), "==": x == y, "!=": x != y}
        logic |= {"<": x < y, "<=": x <= y, ">": x > y, ">=": x >= y, "<>": x < y or x > y}
        if operator in logic:
            return Value("u", 1, int(logic[operator]))
        if a.is_float or b.is_float:
            width = max(v.width for v in (a, b) if v.is_float)
            return Value("f", width, exact_float(operator, x, y, width))
        x, y = int(x), int(y)
        kind, width = ("u" if "u" in (a.kind, b.kind) else a.kind), max(a.width, b.width)
        if operator in ("<<", ">>"):
            if y < 0:
                raise UnsupportedError("shift by a negative number")
            shifted = x << y if operator == "<<" else x >> y
            return from_bits(shifted, a.kind, a.width)
        operations = {"+": x + y, "-": x - y, "*": x * y, "&": x & y, "|": x | y, "^": x ^ y}
        if operator not in operations:
            raise UnsupportedError(f"integer {operator}")
        return from_bits(operations[operator], kind, width)

    def call(self, name: str, arguments: list[Value]) -> Value:
        first = arguments[0]
        x = first.value
        if name in pseudocode():
            registers = {f"S{i}": to_bits(v) for i, v in enumerate(arguments)}
            inner = Machine(**registers).run(parsed(name))
            return from_bits(inner.registers["D0"], first.kind, first.width)
        if name == "fma":
            return Value("f", first.width, exact_fma(*[v.value for v in arguments], first.width))
        if name == "isNAN":
            return Value("u", 1, int(math.isnan(x)))
        if name == "isQuietNAN":
            return Value("u", 1, int(isinstance(x, NaN) and x.is_quiet))
        if name == "isSignalNAN":
            return Value("u", 1, int(isinstance(x, NaN) and not x.is_quiet))
        if name == "cvtToQuietNAN":
            return Value(first.kind, first.width, x.quieted() if isinstance(x, NaN) else x)
        if name == "abs":
            return Value(first.kind, first.width, abs(x))
        if name == "sign" and isinstance(x, NaN):
            return Value("u", 1, x.bits >> 63)
        if name == "sign":
            return Value("u", 1, int(math.copysign(1, x) < 0))
        if name == "exponent":
            return Value("i", 32, to_bits(first) >> 23 & 0xFF)
        if name in ("floor", "trunc", "sqrt", "log2"):
            return Value("f", first.width, special_float(name, x, first.width))
        if name == "pow":
            return Value(
                "f", first.width, rounded(exact_float("**", x, arguments[1].value, 64), first.width)
            )
        if name == "bitCount":
            return Value("u", 32, to_bits(first).bit_count())
        if name == "signext_from_bit":
            width = int(arguments[1].value)
            extended = from_bits(int(x), "i", width).value if width else 0
            return from_bits(extended, "i", first.width)
        if name == "signext":
            return from_bits(int(x), "i", first.width)
        if name == "isEven":
            return Value("u", 1, int(x % 2 == 0))
        if match := re.fullmatch(r"(fp4|fp8|bf8)_to_(bf16|f16|f32)_scale", name):
            small = small_float(int(x), match[1])
            scale = 2.0 ** (int(arguments[1].value) - 127)
            exact = small if math.isnan(small) else small * scale
            if match[2] == "bf16":
                return Value("b", 16, round_to_bf16(exact))
            width = 16 if match[2] == "f16" else 32
            return Value("b", width, to_bits(Value("f", width, rounded(exact, width))))
        if match := re.fullmatch(r"(fp8|bf8)_to_f32", name):
            return Value("f", 32, small_float(to_bits(first), match[1]))
        if match := re.fullmatch(r"(?:f32|f16|bf16)_to_(fp4|fp8|bf8)(_scale)?", name):
            scale = 2.0 ** (int(arguments[1].value) - 127) if match[2] else 1.0
            scaled = x if math.isnan(x) else x / scale
            return Value("b", 4 if match[1] == "fp4" else 8, to_small(scaled, match[1]))
        if name == "bf16_to_f32":
            return Value("f", 32, from_bits(to_bits(first), "bf", 16).value)
        if name == "f32_to_bf16":
            return Value("b", 16, round_to_bf16(x))
        if match := re.fullmatch(r"([uif]|bf)(\d+)_to_([uif]|bf)(\d+)", name):
            return convert(first, match[3], int(match[4]))
        raise UnsupportedError(f"{name}()")


def type_of(view: str) -> tuple[str, int]:
    if view in ("fp4", "fp8", "bf8"):
        return "b", int(view[-1])
    if match := re.fullmatch(r"(bf|[uifb])(\d+)", view):
        return match[1], int(match[2])
    raise UnsupportedError(f".{view}")


def evaluate(mnemonic: str, lane: int = 0, **registers: int) -> Machine:
    """Run an instruction's pseudocode. UnsupportedError if there is none, or if this evaluator does
    not know a part of it."""
    if mnemonic not in pseudocode():
        raise UnsupportedError("no pseudocode")
    SILENT.clear()
    machine = Machine(lane, **registers).run(parsed(mnemonic))
    machine.is_silent = bool(SILENT)
    return machine

"""Chat templates and tokenizers that do not end, grow or call themselves, for tools.hostile."""

from typing import Any

_DEEP = 5000

# Contents of chat_template.jinja.
TEMPLATES: dict[str, str] = {
    "two ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "ranges that print": "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}"
    "{% endfor %}",
    "a range beyond the sandbox's": "{% for i in range(10 ** 12) %}{% endfor %}",
    "a list of a range": "{{ range(99999) | list * 99999 }}",
    "a text doubled": "{% set ns = namespace(x='ab') %}{% for i in range(99) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "a text added to itself": "{% set ns = namespace(x='ab') %}{% for i in range(99) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "a block doubled": "{% set x %}ab{% endset %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "a list doubled": "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "joined": "{% set ns = namespace(x='ab') %}{% for i in range(99) %}"
    "{% set ns.x = [ns.x, ns.x, ns.x] | join(ns.x) %}{% endfor %}",
    "replaced": "{% set ns = namespace(x='a') %}{% for i in range(99) %}"
    "{% set ns.x = ns.x | replace('a', 'aaaa') %}{% endfor %}",
    "formatted": "{% set ns = namespace(x='a') %}{% for i in range(99) %}"
    "{% set ns.x = '%s%s%s' | format(ns.x, ns.x, ns.x) %}{% endfor %}",
    "a width": "{{ '%1000000000d' | format(1) }}",
    "a width in braces": "{{ '{:10000000000}'.format(1) }}",
    "a centre": "{{ 'x' | center(10 ** 10) }}",
    "an indent": "{{ ('x\n' * 1000) | indent(10 ** 8) }}",
    "an indent of JSON": "{{ messages | tojson(indent=10 ** 9) }}",
    "a multiple": "{{ 'x' * 10 ** 10 }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "powers of variables": "{% set n = messages | length + 8 %}{{ n ** (n ** n) }}",
    "a factorial": "{% set ns = namespace(n=1) %}{% for i in range(99999) %}"
    "{% set ns.n = ns.n * (i + 1) ** 99 %}{% endfor %}",
    "a number to text": "{{ 10 ** 99999 }}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "two macros": "{% macro f(n) %}{{ g(n) }}{% endmacro %}{% macro g(n) %}{{ f(n) }}{% endmacro %}"
    "{{ f(1) }}",
    "a tree of macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}x{% endmacro %}"
    "{{ f(60) }}",
    "a loop that calls itself": "{% for i in [[1]] recursive %}{{ loop([i]) }}{% endfor %}",
    "a caller": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f() %}" * 40
    + "x"
    + "{% endcall %}" * 40,
    "parentheses": "{{ " + "(" * _DEEP + "1" + ")" * _DEEP + " }}",
    "brackets": "{{ " + "[" * _DEEP + "]" * _DEEP + " }}",
    "conditions in conditions": "{% if 1 %}" * _DEEP + "x" + "{% endif %}" * _DEEP,
    "loops in loops": "{% for i in [1, 2] %}" * 19 + "x" + "{% endfor %}" * 19,
    "filters in a row": "{{ 'x' " + "| upper " * _DEEP + "}}",
    "nots in a row": "{{ " + "not " * _DEEP + "1 }}",
    "a sum of 5,000 terms": "{{ " + "1 + " * _DEEP + "1 }}",
    "attributes in a row": "{{ messages" + ".a" * _DEEP + " }}",
    "unclosed": "{% for m in messages %}",
    "an opening alone": "{{",
    "openings": "{{" * 99999,
    "comments": "{#" * 99999,
    "spaces": " " * 5_000_000 + "{{ x",
    "a long text": "x" * 5_000_000,
    "a date of a million": "{{ strftime_now('%Y' * 1000000) }}",
    "an error of a million": "{{ raise_exception('x' * 1000000) }}",
    "an error of lines": "{{ raise_exception('a\nb\n\x1b[31mc') }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a file": "{% include '/etc/passwd' %}",
    "Python": "{{ cycler.__init__.__globals__.os.system('sleep 60') }}",
    "an unknown name": "{{ nobody.knows.this }}",
    "a generator that does not end": "{% for x in cycler('a') %}{% endfor %}",
    "sorted": "{{ (range(99999) | list * 999) | sort | length }}",
    "a wrap of words": "{{ ('x ' * 9999999) | wordwrap(1) | length }}",
    "no UTF-8 when written": "{{ '\\ud800' }}",
    "nothing": "",
}


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _chain(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"normalizer": {"type": "Sequence", "normalizers": list(steps)}}


def _split(regex: str, **more: Any) -> dict[str, Any]:
    return {
        "pre_tokenizer": {
            "type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False, **more,
        }
    }  # fmt: skip


def _nested(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"type": "NFC"}
    for _ in range(depth):
        inner = {"type": "Sequence", "normalizers": [inner]}
    return {"normalizer": inner}


def _decoder(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"decoder": {"type": "Sequence", "decoders": list(steps)}}


def _added(*contents: str, **flags: bool) -> dict[str, Any]:
    usual = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    return {
        "added_tokens": [
            {"id": 1984 + i, "content": content, **usual, **flags}
            for i, content in enumerate(contents)
        ]
    }


_A_TO_AA = _replace({"String": "a"}, "aa")

# Changes to tokenizer.json: its keys, with their new values.
TOKENIZERS: dict[str, dict[str, Any]] = {
    "doubled 10 times": _chain(*[_A_TO_AA] * 10),
    "doubled 22 times": _chain(*[_A_TO_AA] * 22),
    "doubled 60 times": _chain(*[_A_TO_AA] * 60),
    "before each character": _chain(*[_replace({"Regex": ""}, "a" * 10)] * 6),
    "a million for one": _chain(_replace({"String": "a"}, "b" * 1_000_000)),
    "a million before": _chain({"type": "Prepend", "prepend": "x" * 1_000_000}),
    "prepended 10,000 times": _chain(*[{"type": "Prepend", "prepend": "x"}] * 10_000),
    "decomposed 1,000 times": _chain(*[{"type": "NFKD"}] * 1000),
    "sequences 100 deep": _nested(100),
    "sequences 300 deep": _nested(300),
    "a normalizer of no kind": _chain({"type": "Nothing"}),
    "a normalizer that is a number": {"normalizer": 5},
    "a text that vanishes": _chain(_replace({"Regex": "."}, "")),
    "a bad expression": _split("("),
    "backtracking, anchored": _split(r"(a+)+$"),
    "backtracking, alternatives": _split(r"(a|a)*$"),
    "backtracking, optional": _split(r"(?:a?){40}a{40}$"),
    "backtracking, pairs": _split(r"(?:a|b|ab)*c"),
    "backtracking, words": _split(r"(\w+\s?)*$"),
    "backtracking, back reference": _split(r"(a*)*\1c"),
    "backtracking, look ahead": _split(r"(?=(a+))+$"),
    "backtracking, look behind": _split(r"(?<=a)(a+)+c"),
    "backtracking in a normalizer": _chain(_replace({"Regex": r"(a+)+$"}, "x")),
    "backtracking in the decoder": _decoder(_replace({"Regex": r"(\w+)+$"}, "x")),
    "repetitions of repetitions": _split(r"((a{1,1000}){1,1000}){1,1000}"),
    "a repetition without end": _split(r"a{99999999}"),
    "an empty expression": _split(""),
    "every position": _split(r"(?=.)"),
    "an expression of a million": _split("a|" * 500_000 + "b"),
    "parentheses 10,000 deep": _split("(" * 10_000 + "a" + ")" * 10_000),
    "a class of everything": _split(r"[\x00-\U0010ffff]"),
    "removed": _split(r".", behavior="Removed"),
    "inverted": _split(r"", invert=True),
    "a behaviour of no kind": _split(r".", behavior="Nothing"),
    "a decoder that grows": _decoder(*[_A_TO_AA] * 40),
    "a decoder of no kind": {"decoder": {"type": "Nothing"}},
    "a decoder that vanishes": _decoder(_replace({"Regex": "."}, "")),
    "a fuse of fuses": _decoder(*[{"type": "Fuse"}] * 1000),
    "no model": {"model": None},
    "a model of no kind": {"model": {"type": "Nothing"}},
    "an empty vocabulary": {"model": {"type": "BPE", "vocab": {}, "merges": []}},
    "merges of what is not there": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}},
    "ids beyond": {"model": {"type": "BPE", "vocab": {"a": 2**31, "b": 2**32 - 1}, "merges": []}},
    "ids below": {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
    "words of one": {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}},
    "pieces that cost nothing": {
        "model": {"type": "Unigram", "vocab": [["a" * n, 0.0] for n in range(1, 300)], "unk_id": 0}
    },
    "pieces that cost no number": {
        "model": {"type": "Unigram", "vocab": [["a", 1e308]] * 9, "unk_id": 99}
    },
    "an added token of a million": _added("x" * 1_000_000),
    "an added token that is empty": _added(""),
    "an added token of one letter": _added("a", lstrip=True, rstrip=True),
    "10,000 added tokens": _added(*(f"<{i}>" for i in range(10_000))),
    "added tokens in one another": _added(*("a" * n for n in range(1, 300))),
    "padding of a billion": {
        "padding": {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None,
                    "pad_id": 0, "pad_type_id": 0, "pad_token": "x"},
    },
    "truncation to nothing": {
        "truncation": {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 0},
    },
    "no normalizer": {"normalizer": None},
    "no splitting": {"pre_tokenizer": None},
    "no decoder": {"decoder": None},
}  # fmt: skip

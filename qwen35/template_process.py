"""The process that renders chat templates, which are untrusted code: one line of JSON in, one out.

`template.py` starts this file, and ends it if it takes too long. A sandbox restricts the objects
that a template can use; the process limits its time and memory. Nothing of the project is imported,
so that it starts fast.
"""

import datetime
import json
import resource
import sys
from collections.abc import Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 2**30  # bytes of address space


class Generation(Extension):
    """The tag `{% generation %}`, which marks assistant text for training. Here its body is only
    rendered."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def environment() -> jinja2.Environment:
    """Build a sandbox with the helpers that templates of the hub expect."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(  # jinja's own filter escapes characters for HTML
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
            sort_keys=sort_keys,
        )  # fmt: skip

    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    env.filters["tojson"] = tojson
    return env


def render(template: str, variables: Mapping[str, Any]) -> dict[str, str]:
    """Return {"text": what was rendered} or {"error": the reason}."""
    try:
        return {"text": environment().from_string(template).render(variables)}
    except Exception as error:  # a template may raise anything
        return {"error": f"{type(error).__name__}: {error}"}


def serve() -> None:
    """Write an empty line when ready, then answer each line until standard input ends."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    if most == resource.RLIM_INFINITY or most > MEMORY:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, most))
    print(flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(render(asked["template"], asked["variables"])), flush=True)


if __name__ == "__main__":
    serve()

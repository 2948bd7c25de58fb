"""The page at /docs: the OpenAPI description in plain HTML, which loads nothing from anywhere and runs no script."""

from html import escape
from typing import Any

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>WeightNet: HTTP reference</title>
<style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin: 2rem 0 0; font-size: 1.1rem }
table { border-collapse: collapse } td { padding: .1rem 1rem .1rem 0; vertical-align: top }
</style></head><body>
"""


def reference_page(openapi: dict[str, Any]) -> str:
    """Return the page for an OpenAPI description.

    >>> page = reference_page({"info": {"title": "T", "version": "1", "description": "A < B"}, "paths": {}})
    >>> "A &lt; B" in page
    True
    """
    info = openapi["info"]
    parts = [_HEAD, f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>"]
    parts += [f'<p>{escape(info["description"])} For programs: <a href="/openapi.json">/openapi.json</a>.</p>']
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation['summary'])}.</p>")
            parts.append(_table(_rows(operation)))
    return "\n".join([*parts, "</body></html>"])


def _rows(operation: dict[str, Any]) -> list[tuple[str, str]]:
    parameters = [
        (f"?{parameter['name']}=", parameter.get("description", "")) for parameter in operation.get("parameters", ())
    ]
    body = [("body", " or ".join(operation["requestBody"]["content"]))] if "requestBody" in operation else []
    answers = [(status, answer["description"]) for status, answer in sorted(operation["responses"].items())]
    return parameters + body + answers


def _table(rows: list[tuple[str, str]]) -> str:
    cells = (f"<tr><td><code>{escape(name)}</code></td><td>{escape(text)}</td></tr>" for name, text in rows)
    return f"<table>{''.join(cells)}</table>"

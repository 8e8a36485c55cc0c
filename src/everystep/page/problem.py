"""A page that shows an error, in the style of the others; it needs no file of the server."""

from __future__ import annotations

import base64
import hashlib
import html

__all__ = ["STYLE_SOURCE", "problem_page"]

_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1c1d20; --muted: #676b73; --accent: #2a5db0;
}
@media (prefers-color-scheme: dark) {
  :root { --paper: #17181b; --ink: #e4e5e9; --muted: #9a9ea8; --accent: #86aef0; }
}
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 40rem; margin: 0 auto; padding: 15vh 1.25rem 3rem; }
.brand { margin: 0 0 0.5rem; color: var(--muted); font-weight: 600; }
h1 { margin: 0 0 0.75rem; font-size: 1.5rem; line-height: 1.2; }
p { margin: 0 0 1rem; overflow-wrap: anywhere; }
a { color: var(--accent); }
"""
#: The source in a Content-Security-Policy that allows the page's own style.
STYLE_SOURCE = f"'sha256-{base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()}'"


def problem_page(title: str, text: str, *, has_link: bool = False) -> str:
    """Return the page. has_link: whether it leads to all runs."""
    link = '<p><a href="/">All runs</a></p>' if has_link else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>everystep: {html.escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<p class="brand">everystep</p>
<h1>{html.escape(title)}</h1>
<p>{html.escape(text[:1].upper() + text[1:])}.</p>
{link}
</main>
</body>
</html>
"""

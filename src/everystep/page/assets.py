"""The files that the page consists of: a table of names, so that no name from outside is a path.

The page that reports a problem needs none of them.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from everystep.views.loss_table import rendered

__all__ = ["STYLE_SOURCE", "asset", "index", "problem"]

_HERE = Path(__file__).parent / "static"
_VIEWS = Path(__file__).parent.parent / "views"
_MEDIA_TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript"}


def index(request: Request) -> Response:
    """Answer with the page; its address determines what it shows."""
    html = (_HERE / "index.html").read_text(encoding="utf-8")
    if request.url.path.startswith("/runs/"):
        # Modules import each other in chains; listed here, they load in parallel.
        folders = ("shared/", "run/", "plot/", "table/", "step/", "tensor/")
        modules = [each for each in _table() if each.endswith(".js") and each.startswith(folders)]
        links = (f'<link rel="modulepreload" href="/static/{name}">' for name in modules)
        html = html.replace("</head>", "\n".join([*links, "</head>"]))
    return Response(html, media_type="text/html")


def asset(request: Request) -> Response:
    """Answer with a file, or with "not modified" if the browser has it."""
    # A name is looked up, never joined to a directory: `../` leads nowhere.
    path = _table().get(request.path_params["path"])
    if path is None:
        raise HTTPException(404)
    content = path.read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:20]}"'
    # Asked for again each time: after an update, modules of two versions would not fit together.
    headers = {"ETag": tag, "Cache-Control": "no-cache"}
    if tag in [each.strip() for each in request.headers.get("if-none-match", "").split(",")]:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=_MEDIA_TYPES[path.suffix])


@cache
def _table() -> dict[str, Path]:
    vendored = _VIEWS / "vendored" / "uplot-1.6.32"
    own = {path.relative_to(_HERE).as_posix(): path for path in sorted(_HERE.rglob("*.*"))}
    itables = find_spec("itables")  # it contains DataTables; importing it would import pandas
    assert itables is not None and itables.origin is not None
    return own | {
        "base.css": _VIEWS / "templates" / "page.css",
        "facts.css": _VIEWS / "templates" / "facts.css",
        "table.css": _VIEWS / "templates" / "table.css",
        "uPlot.js": vendored / "uPlot.iife.min.js",
        "uPlot.min.css": vendored / "uPlot.min.css",
        "datatables.js": Path(itables.origin).parent / "html" / "dt_bundle.js",
    }


_STYLE = (_VIEWS / "templates" / "page.css").read_text(encoding="utf-8")
#: What a Content-Security-Policy has among the sources of styles, so that the page may have its own.
STYLE_SOURCE = f"'sha256-{base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()}'"


def problem(path: str, status: int, title: str, text: str, *, has_link: bool = False) -> Response:
    """Return an answer that reports a problem: JSON for the page itself, else a page of its own.

    path: of the request; has_link: whether the page leads to all runs.
    """
    if path.startswith("/api/"):
        return JSONResponse({"error": text}, status)
    page = rendered("problem.html", title=title, text=text, has_link=has_link)
    return HTMLResponse(page, status)

"""Watch a running study, or all of a comparison or sweep, in the browser.

mosaic watch runs/digits_mosaic

The page draws itself anew as the run goes on: stage, time left, accuracies, losses,
images of the clients' generators. It reads the run directory and changes nothing; only
this machine can open it. Of a run on another machine, start this there and, here,
ssh -L 8642:127.0.0.1:8642 MACHINE
"""

import http
import http.server
import json
import math
import pathlib
import sys
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

if __name__ == "__main__":
    from mosaic_jax.run import programs

    programs.end_on_interrupt()

import mosaic_jax.report
from mosaic_jax.core import errors, files
from mosaic_jax.report import live
from mosaic_jax.run import programs

PORT = 8642
# Nothing from outside, nothing inline, no frame around it.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_ASSETS = pathlib.Path(mosaic_jax.report.__file__).parent
_FILES = {"/live.js": "text/javascript", "/style.css": "text/css"}
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>mosaic watch</title><link rel="stylesheet" href="style.css">
<link rel="icon" href="data:,"></head><body>
<header><h1>mosaic watch</h1><p class="quiet" id="status" role="status"></p></header>
<main></main><script src="live.js"></script></body></html>
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the page until Ctrl-C.

    Args:
      arguments: of the command line; None: of this process.

    Returns:
      The exit code: 2 for a user's error.
    """
    parser = programs.parser("watch", __doc__)
    parser.add_argument("workdir", type=pathlib.Path, help="as of mosaic run or sweep")
    parser.add_argument("--port", type=int, default=PORT, help=f"by default {PORT}")
    args = parser.parse_args(arguments)

    def program() -> None:
        with server(args.workdir, args.port) as serving:
            if not live.studies(args.workdir):
                print(f"no study in {args.workdir} yet: waiting for one")
            print(
                f"http://127.0.0.1:{serving.server_port}  (Ctrl-C ends it, not the run)"
            )
            sys.stdout.flush()
            serving.serve_forever()

    return programs.exit_code(program)


def server(workdir: pathlib.Path, port: int) -> http.server.ThreadingHTTPServer:
    """A server of this machine alone that shows the studies in `workdir`.

    Args:
      workdir: run directory, or a folder of several.
      port: to listen at; 0: any that is free.

    Raises:
      ConfigError: the folder is a file, or the port is in use.
    """
    files.check_folder("workdir", workdir)
    handler = type("Handler", (_Handler,), {"workdir": workdir})
    try:
        return http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    except (OSError, OverflowError) as error:
        raise errors.ConfigError(
            f"--port = {port}: {errors.reason(error)}: must be a free one"
        ) from error


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers GET, and nothing else, from the files of `workdir`."""

    workdir: pathlib.Path

    def do_GET(self) -> None:
        if _host(self.headers.get("Host", "")) not in ("127.0.0.1", "localhost"):
            # Another site's name that was made to lead here.
            self._answer("text/plain", b"", http.HTTPStatus.FORBIDDEN)
            return
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        if url.path == "/":
            self._answer("text/html; charset=utf-8", _PAGE.encode())
        elif url.path in _FILES:
            self._answer(_FILES[url.path], (_ASSETS / url.path[1:]).read_bytes())
        elif url.path == "/data.json":
            self._answer("application/json", self._data(query))
        elif url.path == "/picture.png" and (drawn := self._picture(query)):
            self._answer("image/png", drawn)
        else:
            self._answer("text/plain", b"", http.HTTPStatus.NOT_FOUND)

    def _data(self, query: dict[str, str]) -> bytes:
        found = live.studies(self.workdir)
        shown = _one(self.workdir, found, query.get("study", ""))
        told = {
            "studies": [live.overview(self.workdir, path) for path in found],
            "detail": shown and live.safely(live.detail, shown),
        }
        return json.dumps(_finite(told), allow_nan=False).encode()

    def _picture(self, query: dict[str, str]) -> bytes | None:
        path = _one(self.workdir, live.studies(self.workdir), query.get("study", ""))
        number = query.get("number", "")
        if path is None or not number.isdecimal():
            return None
        return live.safely(live.picture, path, int(number))

    def _answer(
        self, kind: str, content: bytes, code: http.HTTPStatus = http.HTTPStatus.OK
    ) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a page asks every second."""


def _host(header: str) -> str | None:
    """The name in a request's Host, without its port; None: there is none."""
    try:
        return urllib.parse.urlsplit(f"//{header}").hostname
    except ValueError:
        return None


def _one(
    workdir: pathlib.Path, found: Sequence[pathlib.Path], name: str
) -> pathlib.Path | None:
    """The study of that name, "": the first; None if there is none."""
    if not name:
        return next(iter(found), None)
    named = (path for path in found if live.name_of(workdir, path) == name)
    return next(named, None)


def _finite(told: Any) -> Any:
    """`told` with None in place of numbers that JSON has not: NaN and infinities."""
    if isinstance(told, Mapping):
        return {key: _finite(value) for key, value in told.items()}
    if isinstance(told, list | tuple):
        return [_finite(value) for value in told]
    return None if isinstance(told, float) and not math.isfinite(told) else told


if __name__ == "__main__":
    sys.exit(main())

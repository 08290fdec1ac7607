"""Range requests over HTTP: pieces of large files, fetched whatever the connection does.

A range [start, end) is bytes start to end - 1 of a file. What a server says is not believed: ranges and lengths are
checked against what was asked. Failures that may pass (a broken connection, a short body, 5xx, 429) are tried again
with exponential back-off; the rest are final at once.
"""

import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from ddm_training.errors import InputError

CHUNK = 1 << 16  # bytes; what a broken connection can cost, and what is held in memory of each


class RemoteError(InputError):
    """A server's answer or an archive on it cannot be used; trying again does not help."""


class NotFoundError(RemoteError):
    """The server has no such archive (404, 410)."""


class RangeIgnoredError(RemoteError):
    """The server sends whole archives where a range was asked for."""


class TransientError(RemoteError):
    """A failure that may pass. ``retry_after`` are the seconds that the server asked to wait, else None."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Stopped(Exception):
    """The stop event was set while a transfer was under way."""


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """When to try again, and when to give up."""

    retries: int = 8
    """Tries after the first one that end without a single new byte."""
    backoff: float = 1.0
    """Seconds before the first new try; doubled each time."""
    longest: float = 60.0
    """Upper bound of that, in seconds."""
    longest_retry_after: float = 300.0
    """Upper bound of what a server may ask for with Retry-After, in seconds."""
    timeout: float = 30.0
    """Seconds without a byte after which a connection counts as broken."""

    def delay(self, attempt: int, retry_after: float | None = None) -> float:
        """Seconds before try number ``attempt`` + 1: jittered, so that connections do not come back all at once."""
        wait = random.uniform(0.5, 1.0) * min(self.longest, self.backoff * 2.0 ** min(attempt - 1, 30))
        return max(wait, min(retry_after or 0.0, self.longest_retry_after))


@dataclass(frozen=True)
class ContentRange:
    """What a Content-Range header says: bytes [start, end) of ``size``."""

    start: int
    end: int
    size: int

    @classmethod
    def parse(cls, value: str | None) -> "ContentRange | None":
        """``bytes 0-9/100`` -> (0, 10, 100); None where there is no such header or it does not say the size."""
        match = re.fullmatch(r"\s*bytes\s+(\d+)-(\d+)/(\d+)\s*", value or "")
        return cls(int(match[1]), int(match[2]) + 1, int(match[3])) if match else None


class RangeClient:
    """Range requests over connections that are kept alive, one for each thread that uses it.

    Args:
        policy: when to try again.
        stop: once set, transfers end with `Stopped` at the next chunk.
    """

    def __init__(self, policy: RetryPolicy | None = None, stop: threading.Event | None = None) -> None:
        self.policy = policy or RetryPolicy()
        self.stop = stop or threading.Event()
        self._local = threading.local()

    def size(self, url: str) -> int:
        """Bytes of the file at ``url``, from the Content-Range of a request for its first byte."""
        return self._with_retries(lambda: self._probe(url))

    def read(self, url: str, start: int, end: int, *, size: int) -> bytes:
        """Bytes [start, end) at once."""
        return b"".join(self.stream(url, start, end, size=size))

    def stream(self, url: str, start: int, end: int, *, size: int) -> Iterator[bytes]:
        """Bytes [start, end) of a file of ``size`` bytes, in chunks. A broken transfer goes on where it broke.

        Raises:
            RemoteError: the answer is final, or `RetryPolicy.retries` tries in a row brought nothing new.
            Stopped: the stop event was set.
        """
        position, attempt = start, 0
        while position < end:
            try:
                for chunk in self._request(url, position, end, size):
                    position += len(chunk)
                    attempt = 0
                    yield chunk
            except TransientError as error:
                attempt += 1
                self._wait_or_give_up(error, attempt)

    def _with_retries(self, action: Callable[[], int]) -> int:
        attempt = 0
        while True:
            try:
                return action()
            except TransientError as error:
                attempt += 1
                self._wait_or_give_up(error, attempt)

    def _wait_or_give_up(self, error: TransientError, attempt: int) -> None:
        if attempt > self.policy.retries:
            raise RemoteError(f"{error} Given up after {attempt} tries.") from error
        if self.stop.wait(self.policy.delay(attempt, error.retry_after)):
            raise Stopped from error

    def _probe(self, url: str) -> int:
        with closing(self._open(url, 0, 1)) as response:
            found = ContentRange.parse(response.headers.get("Content-Range"))
            if found is None:
                raise RemoteError(
                    f"{url}: the server does not say how long the file is "
                    f"(Content-Range {response.headers.get('Content-Range')!r})."
                )
            promised = self._check_lengths(response, url, 0, 1, found.size)
            for _ in self._body(response, url, promised):  # a body that is read to its end keeps the connection alive
                pass
        return found.size

    def _request(self, url: str, start: int, end: int, size: int) -> Iterator[bytes]:
        """One request; yields bytes from ``start`` on, as far as the server says that it sends them."""
        with closing(self._open(url, start, end)) as response:
            yield from self._body(response, url, self._check_lengths(response, url, start, end, size))

    def _body(self, response: Any, url: str, promised: int) -> Iterator[bytes]:
        import requests
        import urllib3

        received = 0
        try:
            for chunk in response.iter_content(CHUNK):
                if self.stop.is_set():
                    raise Stopped
                received += len(chunk)
                if received > promised:
                    raise TransientError(f"{url}: the server sent more than the {promised} bytes it promised.")
                yield chunk
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            raise TransientError(
                f"{url}: connection broke after {received} of {promised} bytes ({type(error).__name__})."
            ) from error
        if received < promised:
            raise TransientError(f"{url}: the server sent {received} bytes and had promised {promised}.")

    def _check_lengths(self, response: Any, url: str, start: int, end: int, size: int) -> int:
        """The number of bytes that the answer will hold; a server may send less than was asked for (RFC 9110, 14.2)."""
        found = ContentRange.parse(response.headers.get("Content-Range"))
        if found is None or found.start != start or not start < found.end <= end or found.size != size:
            raise TransientError(
                f"{url}: asked for bytes {start}-{end - 1}/{size}, the server answered "
                f"{response.headers.get('Content-Range')!r}."
            )
        promised, length = found.end - found.start, response.headers.get("Content-Length")
        if length is not None and length != str(promised):
            raise TransientError(
                f"{url}: the server's Content-Length {length} contradicts its own Content-Range of {promised} bytes."
            )
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise TransientError(f"{url}: the server re-encoded the file ({response.headers['Content-Encoding']}).")
        return promised

    def _open(self, url: str, start: int, end: int) -> Any:
        """An open 206 response. Errors by status: see the classes above."""
        import requests

        session = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = requests.Session()
            session.headers.update({"Accept-Encoding": "identity", "User-Agent": "ddm-hypersim-download"})
        try:
            response = session.get(
                url, headers={"Range": f"bytes={start}-{end - 1}"}, stream=True, timeout=self.policy.timeout
            )
        except (requests.RequestException, OSError) as error:
            final = isinstance(error, (ValueError, requests.TooManyRedirects)) or "CERTIFICATE_VERIFY" in str(error)
            raise (RemoteError if final else TransientError)(f"{url}: no connection ({error}).") from error
        if response.status_code == 206:
            return response
        response.close()
        raise _status_error(url, response.status_code, response.headers, f"bytes {start}-{end - 1}")


def _status_error(url: str, status: int, headers: Any, asked: str) -> RemoteError:
    if status == 200:
        return RangeIgnoredError(
            f"{url}: the server ignores range requests (it answered 200 with {headers.get('Content-Length', '?')} "
            f"bytes to a request for {asked}; expected 206). Single members cannot be fetched from it: use another "
            "--base-url, or a network without a proxy that strips ranges."
        )
    if status in (404, 410):
        return NotFoundError(f"{url}: not found (HTTP {status}).")
    if status in (408, 425, 429) or status >= 500:
        return TransientError(f"{url}: HTTP {status}.", _retry_after(headers.get("Retry-After")))
    if status == 416:
        return RemoteError(
            f"{url}: the server has no {asked} (HTTP 416): the archive is empty or shorter than it said."
        )
    return RemoteError(f"{url}: HTTP {status}, expected 206.")


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date."""
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return None

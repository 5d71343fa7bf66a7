"""The state of a cache as JSON over HTTP, for `kvcache top` and whoever else wants to look.

A daemon thread listens, on loopback unless told otherwise. It reads and never changes anything, what it answers is
bounded, and a look at the cache is reused for a moment, so that any number of clients cost the engine one look then.
"""

import ipaddress
import json
import os
import selectors
import socket
import threading
import time
import weakref
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from kvcache._version import __version__
from kvcache.block_map import cells_of
from kvcache.errors import CacheClosed, Suspended
from kvcache.health import promised_part

MOST_CELLS = 2048  # of the block map
MOST_SEQUENCES = 200  # the oldest
MOST_QUEUES = 16
MOST_TENANTS = 20  # of a queue, those of whom most wait
MOST_CHARACTERS = 80  # of a request id
MOST_CLIENTS = 8  # at once; who comes then is turned away
CLIENT_SECONDS = 5.0  # that a client may keep us waiting
SAME_LOOK = 0.1  # seconds that a look at the cache is good for


# ---- what is told


def snapshot(cache):
    """One moment of a cache, as what JSON can say.

    Parameters
    ----------
    cache : KVCache

    Returns
    -------
    dict
    """
    owners = cache._owners()
    per_cell, cells = cells_of(owners, MOST_CELLS)
    stats = cache.stats()
    return {
        "kvcache": __version__,
        "pid": os.getpid(),
        "seconds": time.monotonic(),
        "placement": cache.placement,
        "backend": cache.backend,
        "block_size": cache.spec.block_size,
        "stats": stats._asdict(),
        "promised": promised_part(stats, cache.overcommit),
        "hit_rate": stats.hit_tokens / stats.query_tokens if stats.query_tokens else None,
        "findings": [finding.message for finding in cache.check_health()],
        "block_map": {"blocks_per_cell": per_cell, "cells": cells.tolist()},
        "sequences": list(_sequences(cache, owners)),
        "queues": [_queue(queue.stats()) for queue in cache.queues[:MOST_QUEUES]],
    }


def _queue(stats):
    """A `QueueStats`, with counts of all tenants, and the tenants of whom most wait."""
    tenants = stats.tenants
    refused = Counter()
    for tenant in tenants.values():
        refused.update(tenant.refused)
    busiest = sorted(tenants, key=lambda name: (-tenants[name].waiting, -tenants[name].granted, name))
    return {
        "name": _shown(stats.name),
        "waiting": stats.waiting,
        "oldest_age": stats.oldest_age,
        "warn_after": stats.warn_after,
        "granted": sum(tenant.granted for tenant in tenants.values()),
        "failed": sum(tenant.failed for tenant in tenants.values()),
        "refused": dict(refused),
        "grown": sum(tenant.grown for tenant in tenants.values()),
        "growth_refused": sum(sum(tenant.growth_refused.values()) for tenant in tenants.values()),
        "evicted": sum(tenant.evicted for tenant in tenants.values()),
        "tenants": [{"name": name, **tenants[name]._asdict()} for name in busiest[:MOST_TENANTS]],
    }


def _sequences(cache, owners):
    """The oldest sequences: id, tokens, limit, whether it is one run and in the arena, its place in the map or None."""
    for request_id in list(cache)[:MOST_SEQUENCES]:
        try:
            tokens, limit = cache.used_tokens(request_id), cache.limit(request_id)
            contiguous, place = _place(cache, owners, request_id)
            suspended = False
        except Suspended:
            contiguous, place, suspended = True, None, True
        except KeyError:
            continue  # freed since
        yield {
            "id": _shown(request_id),
            "tokens": tokens,
            "limit": limit,
            "contiguous": contiguous,
            "suspended": suspended,
            "place": place,
        }


def _place(cache, owners, request_id):
    """Whether a sequence is one run, and its place in the block map, None where it has no block there."""
    slot, tokens, _ = cache._locate(request_id)
    blocks = [slot // cache.spec.block_size] if slot >= 0 else cache.block_table(request_id)[:1].tolist()
    owner = int(owners[blocks[0]]) if tokens and blocks else -1
    return slot >= 0, owner & (1 << 30) - 1 if owner >= 0 else None


def _shown(request_id):
    text = request_id if isinstance(request_id, str) else repr(request_id)
    return text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1] + "…"


class _Look:
    """The newest snapshot of a cache as text, made by one thread at a time."""

    def __init__(self, cache, clock):
        self._cache = weakref.ref(cache)
        self._clock = clock
        self._lock = threading.Lock()
        self._seen = -SAME_LOOK, b""

    def text(self):
        """JSON, or None when the cache is gone or closed."""
        with self._lock:
            cache = self._cache()
            if cache is None or cache.closed:
                return None
            seen, text = self._seen
            if text and self._clock() - seen < SAME_LOOK:
                return text
            try:
                text = json.dumps(snapshot(cache)).encode()
            except CacheClosed:
                return None
            self._seen = self._clock(), text
            return text


# ---- who is told


class _Handler(BaseHTTPRequestHandler):
    """GET and HEAD of ``/`` and ``/status``; nothing else is answered with anything but an error."""

    timeout = CLIENT_SECONDS
    server_version = f"kvcache/{__version__}"
    sys_version = ""

    def do_GET(self):
        """Answer."""
        if self.server.loopback and not _is_plain(self.headers.get("Host", "localhost")):
            self.send_error(
                403, "this address is no name of the machine"
            )  # a web page that had a name point here
        elif self.path.partition("?")[0] not in ("/", "/status"):
            self.send_error(404)
        else:
            text = self.server.look.text()
            self._answer(503 if text is None else 200, text or b'{"error": "the cache is closed"}')

    do_HEAD = do_GET  # noqa: N815

    def _answer(self, code, text):
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def log_message(self, *arguments):
        """Nothing goes to standard error."""


def _is_plain(host):
    """Whether a ``Host`` is an address or ``localhost``, not a name that somebody else may have made."""
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    name = name.strip("[]")
    try:
        return name == "localhost" or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 16

    def __init__(self, address, look, loopback):
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.look = look
        self.loopback = loopback
        self._room = threading.BoundedSemaphore(MOST_CLIENTS)
        super().__init__(address, _Handler)

    def server_bind(self):
        """Without the look-up of a name that `http.server` does."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.server_address[:2]

    def process_request(self, request, client_address):
        """In a thread of its own, unless there are too many."""
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._room.release()
            raise

    def process_request_thread(self, request, client_address):
        """Until the client has been answered, or has kept us waiting too long."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request, client_address):
        """A client that goes away or stays silent is none of the engine's business."""


class StatusServer:
    """Answers who asks for the state of a cache; made by `KVCache.serve_status`.

    Attributes
    ----------
    host : str
    port : int
        Where it listens.
    """

    def __init__(self, cache, host="127.0.0.1", port=0, pid_file=None, any_host=False, clock=time.monotonic):
        loopback = is_loopback(host)
        if not loopback and not any_host:
            raise ValueError(
                f"{host!r} is not a loopback address, and everybody who can reach it could read the ids of requests: "
                "say any_host=True if that is meant"
            )
        server = _Server((host, port), _Look(cache, clock), loopback)
        self.host, self.port = server.server_address[:2]
        self._pid_file = None if pid_file is None else Path(pid_file)
        self._wake, woken = socket.socketpair()
        try:
            if self._pid_file is not None:
                self._write_pid_file()
        except OSError:
            server.server_close()
            self._wake.close()
            woken.close()
            raise
        self._thread = threading.Thread(
            target=_serve, args=(server, woken), name="kvcache-status", daemon=True
        )
        self._thread.start()
        self._gone = weakref.finalize(cache, self._stop)
        self._gone.atexit = False

    def __repr__(self):
        return f"<StatusServer at {self.address}>"

    @property
    def address(self):
        """``HOST:PORT``, as `kvcache top` takes it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def closed(self):
        """Whether it has stopped listening."""
        return not self._thread.is_alive()

    def close(self):
        """Stop listening. A second time: nothing happens."""
        self._stop()
        if threading.current_thread() is not self._thread:
            self._thread.join(CLIENT_SECONDS)

    def _stop(self):
        """Never waits: a finalizer may call it."""
        try:
            self._wake.send(b"x")
        except OSError:
            return  # stopped already
        self._wake.close()
        if self._pid_file is not None:
            self._pid_file.unlink(missing_ok=True)

    def _write_pid_file(self):
        """Whole or not at all."""
        fresh = self._pid_file.with_name(f"{self._pid_file.name}.{os.getpid()}")
        fresh.write_text(json.dumps({"pid": os.getpid(), "address": self.address}) + "\n", encoding="utf-8")
        fresh.replace(self._pid_file)


def _serve(server, woken):
    """Accepts clients until somebody wakes it."""
    with server, woken, selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        selector.register(woken, selectors.EVENT_READ)
        while True:
            ready = {key.fileobj for key, _ in selector.select()}
            if woken in ready:
                return
            try:
                request, address = server.get_request()
            except OSError:
                continue  # it has gone again
            try:
                server.process_request(request, address)
            except Exception:  # noqa: BLE001 - no thread to be had: this client is turned away
                server.shutdown_request(request)


def is_loopback(host):
    """Whether only this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

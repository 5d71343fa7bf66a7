"""A cache that lets others look: JSON over HTTP on loopback, whatever the clients do."""

import gc
import http.client
import json
import os
import socket
import threading
import time
from contextlib import suppress

import pytest
from crowd import Crowd

from kvcache import CacheClosed, KVCache, KVCacheError
from kvcache.admission import AllocationQueue, Reject, Wait
from kvcache.status import (
    MOST_CELLS,
    MOST_CHARACTERS,
    MOST_CLIENTS,
    MOST_QUEUES,
    MOST_SEQUENCES,
    MOST_TENANTS,
    SAME_LOOK,
    is_loopback,
)

PATIENCE = 10.0


def ask(server, method="GET", path="/status", headers=None):
    connection = http.client.HTTPConnection(server.host, server.port, timeout=PATIENCE)
    try:
        connection.request(method, path, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def told(server):
    status, text = ask(server)
    assert status == 200
    return json.loads(text)


def send(server, text):
    """The answer to raw bytes, as much of it as came before the server hung up."""
    answer = b""
    with socket.create_connection((server.host, server.port), PATIENCE) as client, suppress(OSError):
        client.sendall(text)
        client.shutdown(socket.SHUT_WR)
        while part := client.recv(65536):
            answer += part
    return answer


def refuses(server):
    try:
        socket.create_connection((server.host, server.port), PATIENCE).close()
    except OSError:
        return True
    return False


# ---- what is told


def test_the_answer_is_what_stats_says(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 9, max_tokens=20)
    cache.allocate_for(("tuple", 1), 5)
    seen = told(cache.serve_status())
    stats = cache.stats()._asdict()
    assert {name: seen["stats"][name] for name in ("used_blocks", "claimed_blocks", "admissions")} == {
        name: stats[name] for name in ("used_blocks", "claimed_blocks", "admissions")
    }
    assert set(seen["stats"]) == set(stats)
    first, second = seen["sequences"]
    assert (first["id"], first["tokens"], first["limit"]) == ("a", 9, 20)
    assert second["id"] == "('tuple', 1)"
    cells = seen["block_map"]["cells"]
    assert seen["block_map"]["blocks_per_cell"] == 1
    assert [cells.count(each["place"]) for each in (first, second)] == [3, 2]
    assert cells.count(-1) == 11


def test_what_is_told_is_bounded(make_cache):
    cache = make_cache(1, 1, 1, 20_000, 2, backend="none")
    for number in range(MOST_SEQUENCES + 50):
        cache.allocate_for("x" * 500 + str(number), 3)
    server = cache.serve_status()
    seen = told(server)
    assert len(seen["sequences"]) == MOST_SEQUENCES
    assert max(len(each["id"]) for each in seen["sequences"]) == MOST_CHARACTERS
    assert len(seen["block_map"]["cells"]) <= MOST_CELLS
    assert len(ask(server)[1]) < 1 << 18


@pytest.mark.parametrize("placement", ["contiguous", "paged"])
def test_scattered_and_empty_sequences_are_told_too(make_cache, placement):
    cache = make_cache(placement=placement, max_move_tokens=0)
    for number in range(16):
        cache.allocate_for(number, 4)
    for number in range(0, 16, 2):
        cache.free_for(number)
    cache.allocate_for("scattered", 12)
    cache.truncate(1, 0)
    seen = {each["id"]: each for each in told(cache.serve_status())["sequences"]}
    assert seen["scattered"]["contiguous"] is False and seen["scattered"]["place"] is not None
    assert seen["1"]["place"] is None


@pytest.mark.parametrize("placement", ["contiguous", "paged"])
def test_a_cache_with_suspended_sequences_is_told_of(make_cache, placement):
    cache = make_cache(placement=placement)
    cache.allocate_for("away", 9, max_tokens=20)
    cache.allocate_for("here", 5)
    assert cache.suspend("away").wait(PATIENCE)
    seen = told(cache.serve_status())
    assert seen["stats"]["suspended_sequences"] == 1
    away, here = seen["sequences"]
    assert away == {
        "id": "away",
        "tokens": 9,
        "limit": 20,
        "contiguous": True,
        "suspended": True,
        "place": None,
    }
    assert (here["id"], here["suspended"]) == ("here", False)
    assert seen["block_map"]["cells"].count(here["place"]) == 2


def test_the_hit_rate_is_that_of_prompts_given_as_ids(make_cache):
    cache = make_cache()
    cache.allocate_for("counted", 9)
    server = cache.serve_status()
    assert told(server)["hit_rate"] is None
    for name in ("a", "b"):
        cache.allocate_for(name, list(range(10)))
        cache.commit(name)
        cache.free_for(name)
    time.sleep(2 * SAME_LOOK)
    seen = told(server)
    assert (seen["hit_rate"], seen["stats"]["cached_blocks"]) == (8 / 20, 2)


def test_queues_are_told_with_the_tenants_of_whom_most_wait(make_cache):
    cache = make_cache(1, 1, 4, 64, 4)
    clients = Crowd(cache, Wait(), name="chat", warn_after=2.0)
    AllocationQueue(cache)
    clients.ask("a", 64, tenant="holder")
    for number in range(3):
        clients.ask(number, 8, tenant="waits")
    clients.ask("refused", 8, strategy=Reject())
    clients.pass_time(2.5)
    seen = told(cache.serve_status())
    chat, other = seen["queues"]
    assert (chat["name"], chat["waiting"], chat["oldest_age"], chat["warn_after"]) == ("chat", 3, 2.5, 2.0)
    assert (chat["granted"], chat["refused"]["arena_full"], chat["evicted"]) == (1, 1, 0)
    assert [(each["name"], each["waiting"]) for each in chat["tenants"]] == [
        ("waits", 3),
        ("holder", 0),
        ("", 0),
    ]
    assert (other["name"], other["waiting"], other["oldest_age"]) == ("default", 0, 0.0)
    assert (seen["stats"]["waiting_requests"], seen["stats"]["oldest_wait"]) == (3, 2.5)
    clients.close()


def test_queues_and_tenants_that_are_told_are_bounded(make_cache):
    cache = make_cache()
    queues = [AllocationQueue(cache, name="n" * 500 + str(number)) for number in range(MOST_QUEUES + 2)]
    for number in range(200):
        queues[0].allocate(number, 1, tenant=f"{number} " + "t" * 500).free()
    seen = told(cache.serve_status())["queues"]
    assert len(seen) == MOST_QUEUES and len(seen[0]["tenants"]) == MOST_TENANTS
    assert max(len(each["name"]) for each in (*seen, *seen[0]["tenants"])) == MOST_CHARACTERS
    assert seen[0]["granted"] == 200


def test_findings_are_told(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 64)
    assert "newcomers will be refused" in told(cache.serve_status())["findings"][0]


def test_a_look_is_good_for_a_moment(make_cache, monkeypatch):
    cache = make_cache()
    server = cache.serve_status()
    looks = []
    monkeypatch.setattr("kvcache.status.snapshot", lambda of: looks.append(of) or {"kvcache": "x"})
    for _ in range(5):
        ask(server)
    assert 1 <= len(looks) <= 4


# ---- requests


def test_head_has_no_body_and_queries_are_ignored(make_cache):
    server = make_cache().serve_status()
    assert ask(server, "HEAD") == (200, b"")
    assert ask(server, path="/?x=1")[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_can_be_changed(make_cache, method):
    assert ask(make_cache().serve_status(), method)[0] == 501


def test_other_paths_are_not_there(make_cache):
    server = make_cache().serve_status()
    for path in ("/../etc/passwd", "/status/x", "/favicon.ico"):
        assert ask(server, path=path)[0] == 404


def test_a_web_page_that_points_a_name_here_gets_nothing(make_cache):
    server = make_cache().serve_status()
    assert ask(server, headers={"Host": "evil.example:80"})[0] == 403
    for host in ("localhost", "localhost:1", "127.0.0.1:1", "[::1]:1", "[::1]"):
        assert ask(server, headers={"Host": host})[0] == 200


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\r\n\r\n",
        b"\x00\xff\x16\x03\x01" * 50,
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 500 + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: \xff\xfe\r\n\r\n",
    ],
    ids=["nothing", "empty lines", "bytes", "half", "version", "long", "headers", "host"],
)
def test_garbage_is_survived(make_cache, capfd, garbage):
    server = make_cache().serve_status()
    answer = send(server, garbage)
    assert len(answer) < 2000 and b"Traceback" not in answer
    assert ask(server)[0] == 200
    assert capfd.readouterr() == ("", "")


# ---- clients that misbehave


def test_clients_that_never_read_block_nobody(make_cache):
    cache = make_cache()
    server = cache.serve_status()
    clients = [socket.create_connection((server.host, server.port), PATIENCE) for _ in range(4)]
    for client in clients:
        client.sendall(b"GET /status HTTP/1.0\r\n\r\n")
    began = time.monotonic()
    for _ in range(100):
        assert cache.allocate_for("a", 20) and cache.free_for("a")
    assert ask(server)[0] == 200
    assert time.monotonic() - began < PATIENCE / 2
    for client in clients:
        client.close()


def test_silent_clients_take_all_places_for_a_while_only(make_cache, monkeypatch):
    monkeypatch.setattr("kvcache.status._Handler.timeout", 0.2)
    cache = make_cache()
    server = cache.serve_status()
    silent = [socket.create_connection((server.host, server.port), PATIENCE) for _ in range(MOST_CLIENTS)]
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            assert ask(server)[0] == 200
            break
        except (OSError, http.client.HTTPException):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    for client in silent:
        client.close()


def test_many_clients_at_once_are_answered_or_turned_away(make_cache):
    cache = make_cache()
    server = cache.serve_status()
    results = []

    def client():
        try:
            results.append(ask(server)[0])
        except (OSError, http.client.HTTPException):
            results.append(None)

    threads = [threading.Thread(target=client) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(results) <= {200, None} and 200 in results
    assert ask(server)[0] == 200


def test_a_cache_that_is_held_is_told_of(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 8)
    server = cache.serve_status()
    with cache.hold():
        cache.free_for("a")
        assert told(server)["block_map"]["cells"].count(-2) == 2


# ---- its life


def test_closing_the_cache_stops_it(make_cache):
    cache = make_cache()
    server = cache.serve_status()
    cache.close()
    assert server.closed and refuses(server)
    cache.close()
    server.close()


def test_a_cache_that_closes_while_a_client_is_connected_says_so(make_cache):
    cache = make_cache()
    server = cache.serve_status()
    before = set(threading.enumerate())
    with socket.create_connection((server.host, server.port), PATIENCE) as client:
        client.sendall(b"GET /status HTTP/1.0\r\n")
        deadline = time.monotonic() + PATIENCE
        while not set(threading.enumerate()) - before and time.monotonic() < deadline:
            time.sleep(0.005)
        cache.close()
        client.sendall(b"\r\n")
        answer = b""
        while part := client.recv(65536):
            answer += part
    assert answer.startswith(b"HTTP/1.0 503") and b"the cache is closed" in answer


def test_it_can_be_stopped_and_served_again(make_cache):
    cache = make_cache()
    server = cache.serve_status()
    with pytest.raises(KVCacheError, match=server.address):
        cache.serve_status()
    server.close()
    assert refuses(server)
    assert ask(cache.serve_status())[0] == 200


def test_a_cache_that_is_forgotten_is_not_kept_and_its_server_stops():
    cache = KVCache(2, 2, 4, 64, 4)
    server = cache.serve_status()
    ask(server)
    del cache
    deadline = time.monotonic() + PATIENCE
    while not server.closed and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert server.closed and refuses(server)


def test_a_closed_cache_is_not_served(make_cache):
    cache = make_cache()
    cache.close()
    with pytest.raises(CacheClosed):
        cache.serve_status()


def test_the_file_tells_process_and_address_until_the_end(make_cache, tmp_path):
    file = tmp_path / "kvcache.pid"
    server = make_cache().serve_status(pid_file=file)
    assert json.loads(file.read_text()) == {"pid": os.getpid(), "address": server.address}
    server.close()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_leaves_nothing_listening(make_cache, tmp_path):
    cache = make_cache()
    before = threading.active_count()
    with pytest.raises(OSError):
        cache.serve_status(pid_file=tmp_path / "nowhere" / "kvcache.pid")
    assert threading.active_count() == before
    assert ask(cache.serve_status())[0] == 200


def test_a_port_that_is_taken_is_an_error(make_cache):
    server = make_cache().serve_status()
    with pytest.raises(OSError):
        make_cache().serve_status(port=server.port)


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "192.0.2.1", "example.org", "127.0.0.1.example.org"])
def test_other_machines_are_kept_out_unless_told(make_cache, host):
    assert not is_loopback(host)
    with pytest.raises(ValueError, match="any_host=True"):
        make_cache().serve_status(host)


def test_any_host_is_listened_to_when_told(make_cache):
    server = make_cache().serve_status("0.0.0.0", any_host=True)
    assert ask(server, headers={"Host": "engine.example"})[0] == 200


def test_the_sixth_version_of_the_protocol_is_spoken(make_cache):
    try:
        server = make_cache().serve_status("::1")
    except OSError:
        pytest.skip("this machine has no ::1")
    assert server.address == f"[::1]:{server.port}" and ask(server)[0] == 200

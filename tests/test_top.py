"""`kvcache top`, against a server on loopback."""

import io
import json
import re
import socket
import threading

import numpy as np
import pytest
from crowd import Crowd

from kvcache.admission import AllocationQueue, Reject, Wait
from kvcache.cli import main
from kvcache.status import snapshot

pytest.importorskip("rich")


@pytest.fixture
def busy(make_cache):
    cache = make_cache(placement="paged")
    for name, tokens in (("req_1", 9), ("req_2", 17)):
        cache.allocate_for(name, tokens)
    cache.fork("req_1", "twin")
    cache.allocate_for("hopeless", 64)
    return cache


def pictured(now, last=None, width=80, height=None):
    from rich.console import Console

    from kvcache.top_view import frame

    console = Console(file=io.StringIO(), width=width)
    console.print(frame(now, last, width, height))
    return console.file.getvalue()


def lines_of(text):
    """Each line's words, without bars and edges."""
    return [" ".join(re.sub("[│━╸╺]", " ", line).split()) for line in text.splitlines()]


def test_a_single_picture_where_there_is_no_terminal(busy, capsys):
    assert main(["top", busy.serve_status().address]) == 0
    text = capsys.readouterr().out
    for part in ("8 of 16 blocks", "req_2", "twin", "refused: arena full", "paged"):
        assert part in text
    assert text.count("▒") == 4  # three blocks, and the legend


def test_what_is_cached_is_drawn_low_and_counted(make_cache):
    cache = make_cache()
    for name in ("a", "b"):
        cache.allocate_for(name, list(range(13)), max_new_tokens=4)
        cache.commit(name)
        cache.free_for(name)
    text = pictured(snapshot(cache))
    assert text.count("▂") == 3 + 1  # three blocks, and the legend
    words = [line.strip("│ ").split() for line in text.splitlines()]
    assert ["prompt", "tokens", "26"] in words and ["of", "these", "cached", "12"] in words


def test_what_a_pin_alone_holds_is_drawn_between_cached_and_used(make_cache):
    cache = make_cache()
    cache.allocate_for("a", list(range(9)))
    cache.commit("a")
    cache.pin("a")
    cache.free_for("a")
    text = pictured(snapshot(cache))
    assert text.count("▄") == 2 + 1  # two blocks, and the legend
    assert "cached 0 blocks; 2 pinned; 0 sequences suspended" in lines_of(text)


def test_suspended_sequences_are_counted_and_marked(make_cache):
    cache = make_cache()
    for name in ("here", "away"):
        cache.allocate_for(name, 9, max_tokens=20)
    assert cache.suspend("away").wait(30)
    lines = lines_of(pictured(snapshot(cache)))
    assert "cached 0 blocks; 0 pinned; 1 sequence suspended" in lines
    assert any(line.endswith("█ away 9 20 suspended") for line in lines)
    assert any(line.endswith("█ here 9 20") for line in lines)
    assert not any("more" in line for line in lines)


def test_a_long_id_leaves_room_for_what_stands_beside_it(make_cache):
    cache = make_cache()
    for number in range(2):
        cache.allocate_for(f"chatcmpl-6f1e2d3c4b5a69788796a5b4c3d2e1f{number}", 9)
    assert cache.suspend(next(iter(cache))).wait(30)
    now = snapshot(cache)
    lines = lines_of(pictured(now, now | {"seconds": now["seconds"] - 1.0}))
    assert "admitted 2 0.0 █ cha…e1f0 9 12 suspended" in lines
    assert "freed 1 0.0 █ cha…e1f1 9 12" in lines


def test_the_hit_rate_is_told_since_the_start_and_since_the_last_look(make_cache):
    cache = make_cache()

    def ask(number):
        cache.allocate_for(number, [*range(9), number])
        cache.commit(number)
        cache.free_for(number)

    empty = snapshot(cache)
    assert "hits no prompt was given as ids" in lines_of(pictured(empty))
    ask(100)
    ask(101)
    last = snapshot(cache)
    assert "hits 40% of prompt tokens since the start" in lines_of(pictured(last))
    assert "hits 40% of prompt tokens since the start, 40% now" in lines_of(pictured(last, empty))
    assert "hits 40% of prompt tokens since the start" in lines_of(pictured(last, last))
    ask(102)
    ask(103)
    text = pictured(snapshot(cache), last)
    assert "hits 60% of prompt tokens since the start, 80% now" in lines_of(text)


def test_evictions_are_told_each_second(make_cache):
    cache = make_cache()
    cache.allocate_for("a", list(range(33)))
    cache.commit("a")
    cache.free_for("a")
    last = snapshot(cache)
    cache.allocate_for("b", 64)
    now = snapshot(cache) | {"seconds": last["seconds"] + 2.0}
    assert "blocks evicted 8 4.0" in lines_of(pictured(now, last))


@pytest.mark.parametrize("height", [24, 30, 50])
@pytest.mark.parametrize("queued", [False, True])
def test_it_fits_into_the_lines_of_a_terminal(make_cache, height, queued):
    cache = make_cache(1, 1, 4, 4 * 2048, 4, backend="none", overcommit=1.5)
    queue = AllocationQueue(cache, name="chat") if queued else None
    for number in range(40):
        cache.allocate_for(number, 130, max_tokens=260)
    for number in range(4 if queued else 0):
        queue.allocate(("queued", number), 8, tenant=f"tenant {number}")
    now = snapshot(cache)
    text = pictured(now, now | {"seconds": now["seconds"] - 1.0}, height=height)
    lines = text.splitlines()
    assert len(lines) <= height and "and " in text and "more" in text
    assert any("admitted" in line for line in lines) and ("granted" in text) == queued
    drawn = [line for line in lines if line.count("█") + line.count("·") > 60]
    assert len(drawn) >= 2 and "1 block a cell" in pictured(now)


@pytest.mark.parametrize("height", [1, 10])
def test_a_terminal_with_hardly_a_line_is_no_error(busy, height):
    assert "8 of 16 blocks" in pictured(snapshot(busy), height=height)


def test_with_few_lines_what_has_never_been_counted_is_left_out(make_cache):
    cache = make_cache(1, 1, 4, 4 * 512, 4, backend="none")
    queue = AllocationQueue(cache, name="chat")
    queue.allocate("a", list(range(2048)))
    queue.allocate("b", 8)
    text = pictured(snapshot(cache), height=24)
    assert "refused: arena full" in text and "prompt tokens" in text and "tokens copied" not in text


def test_the_address_is_found_through_the_file(busy, capsys, tmp_path):
    busy.serve_status(pid_file=tmp_path / "pid")
    assert main(["top", "--pid-file", str(tmp_path / "pid"), "--frames", "2", "--interval", "0.1"]) == 0
    assert "req_1" in capsys.readouterr().out


def test_json_is_the_snapshot(busy, capsys):
    assert main(["top", busy.serve_status().address, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == set(snapshot(busy))


@pytest.mark.parametrize("dark", [False, True])
def test_the_picture_has_a_square_of_ten_pixels_for_each_block(busy, tmp_path, dark):
    image = pytest.importorskip("matplotlib.image")
    with busy.hold():
        busy.free_for("req_2")
        file = tmp_path / "blocks.png"
        assert (
            main(["top", busy.serve_status().address, "--plot", str(file), *(["--dark"] if dark else [])])
            == 0
        )
        expected = busy.block_map_image(64, dark=dark)
    read = np.round(255 * image.imread(file)).astype(np.uint8)
    assert read.shape == (10, 640, 3)
    assert (read == expected.repeat(10, axis=0).repeat(10, axis=1)).all()
    colours = {tuple(pixel) for pixel in read[0, :160].tolist()}
    ground = (18, 18, 20) if dark else (255, 255, 255)
    assert ground in colours and (128, 128, 128) in colours and len(colours) > 2


def test_the_picture_of_a_large_arena_has_a_square_for_several_blocks(make_cache, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    cache = make_cache(1, 1, 1, 4 * 2048, 1, backend="none")
    cache.allocate_for("half", 4096)
    assert main(["top", cache.serve_status().address, "--plot", str(tmp_path / "x.png")]) == 0
    read = image.imread(tmp_path / "x.png")
    assert read.shape == (320, 640, 3)
    assert len(np.unique(read[:160].reshape(-1, 3), axis=0)) == 1
    assert (read[160:] == 1.0).all() and (read[0, 0] != 1.0).any()


def test_a_picture_and_json_are_of_one_look(busy, tmp_path, capsys):
    file = tmp_path / "x.PNG"
    assert main(["top", busy.serve_status().address, "--json", "--plot", str(file)]) == 0
    assert json.loads(capsys.readouterr().out)["stats"]["used_blocks"] == 8
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name, said", [("x.svg", "ends in .png"), ("nowhere/x.png", "No such file")])
def test_a_picture_that_cannot_be_written_is_an_error(busy, tmp_path, capsys, name, said):
    assert main(["top", busy.serve_status().address, "--plot", str(tmp_path / name)]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_rates_are_differences_over_time(busy):
    last = snapshot(busy)
    busy.free_for("twin")
    for _ in range(5):
        busy.allocate_for("a", 4)
        busy.free_for("a")
    now = snapshot(busy) | {"seconds": last["seconds"] + 2.0}
    text = pictured(now, last)
    words = [line.split() for line in text.splitlines()]
    rates = {line[1]: line[3] for line in words if len(line) > 3}
    assert (rates["admitted"], rates["freed"], rates["moves"]) == ("2.5", "3.0", "0.0")


def test_queues_are_shown_with_lengths_ages_and_rates(make_cache):
    cache = make_cache(1, 1, 4, 64, 4)
    clients = Crowd(cache, Wait(), name="chat", warn_after=2.0)
    clients.ask("a", 64, tenant="holder")
    last = snapshot(cache)
    for number in range(3):
        clients.ask(number, 8, tenant="waits")
    for number in range(5):
        clients.ask(("refused", number), 8, strategy=Reject())
    clients.ask("late", 8, strategy=Wait(1.0))
    clients.pass_time(2.5)
    now = snapshot(cache) | {"seconds": last["seconds"] + 2.0}
    rows = [line.strip("│ ").split() for line in pictured(now, last).splitlines()]
    assert ["chat", "3", "2.5", "s", "1", "1", "0", "5", "0"] in rows
    assert ["a", "second", "0.0", "0.5", "0.0", "2.5", "0.0"] in rows
    assert ["waits", "3", "2.5", "s", "0", "0", "0", "0", "0"] in rows
    assert ["holder", "0", "1", "0", "0", "0", "0"] in rows
    clients.close()


def test_a_cache_without_queues_and_a_status_without_them_have_no_such_table(busy):
    now = snapshot(busy)
    assert now["queues"] == [] and "oldest  " not in pictured(now)
    del now["queues"]
    assert "req_1" in pictured(now)


def test_names_of_queues_and_tenants_cannot_write_to_the_terminal(make_cache):
    cache = make_cache()
    queue = AllocationQueue(cache, name="\x1b[2J\x07[red]q")
    queue.allocate("a", 4, tenant="\x1b[2J[red]t")
    text = pictured(snapshot(cache))
    assert "\x1b" not in text and "\x07" not in text and "?[2J?[red]q" in text and "?[2J[red]t" in text


def test_ids_cannot_write_to_the_terminal(make_cache):
    cache = make_cache()
    cache.allocate_for("\x1b[2J\x07[red]x", 4)
    text = pictured(snapshot(cache))
    assert "\x1b" not in text and "\x07" not in text and "?[2J?[red]x" in text


def test_it_fits_into_a_narrow_terminal(busy):
    assert max(map(len, pictured(snapshot(busy), width=40).splitlines())) <= 40


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["here"],
        ["127.0.0.1:"],
        ["127.0.0.1:99999"],
        ["127.0.0.1:1", "--pid-file", "x"],
        ["--pid-file", "gone"],
    ],
    ids=["nothing", "no port", "empty port", "large port", "both", "no file"],
)
def test_what_is_no_address_is_bad_usage(arguments, capsys):
    assert main(["top", *arguments]) == 2
    assert capsys.readouterr().err.startswith("kvcache: ")


def test_nobody_there_is_said(make_cache, capsys):
    server = make_cache().serve_status()
    server.close()
    assert main(["top", server.address]) == 2
    assert "does not answer" in capsys.readouterr().err


HEAD = b"HTTP/1.0 200 OK\r\n\r\n"


@pytest.mark.parametrize(
    "answer", [b"hello\r\n", HEAD + b"[1]", HEAD + b"nonsense", HEAD + b'{"kvcache": "9"}', HEAD]
)
def test_somebody_else_there_is_said(answer, capsys):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            client, _ = listener.accept()
            with client:
                client.recv(65536)
                client.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        assert main(["top", "{}:{}".format(*listener.getsockname())]) == 2
        thread.join()
    assert capsys.readouterr().err.startswith("kvcache: 127.0.0.1:")

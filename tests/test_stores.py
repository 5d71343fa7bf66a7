"""Stores: what is put comes back whole or not at all, in bounded room, and nothing raises for I/O."""

import errno
import os
import threading
import time

import pytest

from kvcache import store_files
from kvcache.store import ChunkStore, Job, Outcome
from kvcache.store_files import DirectoryStore
from kvcache.store_jobs import WorkerPool
from kvcache.store_memory import MemoryStore

OK, MISS, FULL, FAILED = Outcome.OK, Outcome.MISS, Outcome.FULL, Outcome.FAILED
SIZE = 4096  # bytes of the strings here
SOON = 30.0  # seconds: far more than anything here takes


def key(number):
    return f"{number:064x}"


def text(number):
    return bytes([number % 251]) * SIZE


def done(job):
    assert job.wait(SOON) and job.done()
    return list(job.outcomes())


def put(store, *numbers):
    return done(store.put([key(n) for n in numbers], [memoryview(text(n)) for n in numbers], timeout=SOON))


def get(store, number, size=SIZE):
    buffer = bytearray(size)
    (outcome,) = done(store.get([key(number)], [memoryview(buffer)], timeout=SOON))
    return bytes(buffer) if outcome is OK else outcome


def there(store, *numbers):
    return [n for n in numbers if done(store.contains([key(n)], timeout=SOON)) == [OK]]


def memory(slots, **options):
    return MemoryStore(slots * SIZE, SIZE, **options)


@pytest.fixture
def make(request, tmp_path):
    """Makes a store of one kind with room for a number of strings; closes it at the end."""
    made = []

    def one(slots, **options):
        if request.param == "memory":
            made.append(memory(slots, **options))
        else:
            made.append(DirectoryStore(tmp_path / "store", slots * SIZE, **options))
        return made[-1]

    yield one
    for store in made:
        store.close(SOON)


each_store = pytest.mark.parametrize("make", ["memory", "files"], indirect=True)


# ---- both stores


@each_store
def test_a_store_has_the_methods_of_the_protocol(make):
    store = make(4)
    assert isinstance(store, ChunkStore)
    assert isinstance(store.contains([key(1)], timeout=SOON), Job)
    store.register(memoryview(bytearray(SIZE)))


@each_store
def test_what_is_put_comes_back_as_it_was(make):
    store = make(4)
    assert put(store, 1, 2) == [OK, OK]
    assert get(store, 1) == text(1)
    assert get(store, 2) == text(2)


@each_store
def test_what_was_not_put_is_a_miss_and_leaves_the_buffer_alone(make):
    store = make(4)
    buffer = bytearray(b"x" * SIZE)
    assert done(store.get([key(7)], [buffer], timeout=SOON)) == [MISS]
    assert buffer == b"x" * SIZE


@each_store
@pytest.mark.parametrize("size", [SIZE - 1, SIZE + 1, 1])
def test_a_string_of_another_size_than_the_buffer_is_a_miss(make, size):
    store = make(4)
    put(store, 1)
    assert get(store, 1, size) is MISS


@each_store
def test_a_key_that_is_put_again_has_the_new_bytes(make):
    store = make(4)
    put(store, 1)
    assert done(store.put([key(1)], [text(9)], timeout=SOON)) == [OK]
    assert get(store, 1) == text(9)


@each_store
def test_contains_answers_for_each_key(make):
    store = make(4)
    put(store, 1, 3)
    assert done(store.contains([key(1), key(2), key(3)], timeout=SOON)) == [OK, MISS, OK]


@each_store
def test_what_is_deleted_is_a_miss_and_its_room_is_free(make):
    store = make(1, evict=False)
    put(store, 1)
    assert put(store, 2) == [FULL]
    assert done(store.delete([key(1)], timeout=SOON)) == [OK]
    assert done(store.delete([key(1)], timeout=SOON)) == [MISS]
    assert get(store, 1) is MISS
    assert put(store, 2) == [OK]


@each_store
def test_a_full_store_gives_away_what_was_used_least_recently(make):
    store = make(3)
    for number in (1, 2, 3):  # one after another: a batch is in no order
        put(store, number)
    assert get(store, 1) == text(1)
    put(store, 4)
    assert there(store, 1, 2, 3, 4) == [1, 3, 4]


@each_store
def test_a_full_store_that_does_not_evict_refuses_and_keeps_what_it_has(make):
    store = make(2, evict=False)
    assert put(store, 1) + put(store, 2) + put(store, 3) == [OK, OK, FULL]
    assert there(store, 1, 2, 3) == [1, 2]
    assert get(store, 2) == text(2)


@each_store
def test_a_string_larger_than_the_whole_store_evicts_nothing(make):
    store = make(2)
    put(store, 1)
    assert done(store.put([key(2)], [bytes(2 * SIZE + 1)], timeout=SOON)) == [FULL]
    assert there(store, 1, 2) == [1]


@each_store
@pytest.mark.parametrize(
    "bad", ["", "0" * 63, "0" * 65, "G" * 64, "A" * 64, "../" + "0" * 61, "0" * 64 + "\n"]
)
def test_a_key_that_is_not_64_hex_digits_is_refused(make, bad):
    store = make(2)
    for call in (store.contains, store.delete):
        with pytest.raises(ValueError, match="64 hexadecimal"):
            call([bad], timeout=SOON)
    for call in (store.put, store.get):
        with pytest.raises(ValueError, match="64 hexadecimal"):
            call([bad], [bytearray(SIZE)], timeout=SOON)


@each_store
def test_a_key_that_is_no_str_is_a_type_error(make):
    with pytest.raises(TypeError, match="bytes"):
        make(2).contains([b"0" * 64], timeout=SOON)


@each_store
def test_keys_and_buffers_must_be_as_many(make):
    with pytest.raises(ValueError, match="1 keys and 2 buffers"):
        make(2).put([key(1)], [text(1), text(2)], timeout=SOON)


@each_store
def test_a_buffer_to_be_filled_must_be_writable(make):
    with pytest.raises(ValueError, match="read-only"):
        make(2).get([key(1)], [text(1)], timeout=SOON)


@each_store
def test_a_closed_store_fails_everything_and_raises_nothing(make):
    store = make(2)
    put(store, 1)
    store.close(SOON)
    store.close(SOON)
    assert put(store, 2) == [FAILED]
    assert get(store, 1) is FAILED
    assert done(store.contains([key(1)], timeout=SOON)) == [FAILED]
    assert done(store.delete([key(1)], timeout=SOON)) == [FAILED]


@each_store
def test_threads_never_see_half_a_string(make):
    store = make(2)
    wrong = []

    def churn(number):
        for round_ in range(60):
            store.put([key(round_ % 3)], [text(round_ % 3)], timeout=SOON).wait(SOON)
            found = get(store, (round_ + number) % 3)
            if not (isinstance(found, Outcome) or found == text((round_ + number) % 3)):
                wrong.append(found[:8])

    threads = [threading.Thread(target=churn, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---- in memory


def test_the_memory_of_a_store_is_bounded_by_its_slots():
    store = memory(3)
    for number in range(20):
        put(store, number)
    assert len(store) == 3
    assert store._bytes_made == 3 * SIZE


def test_a_store_in_memory_without_a_slot_is_refused():
    with pytest.raises(ValueError, match="one slot alone has 4096"):
        MemoryStore(4095, 4096)


def test_memory_without_slots_takes_what_each_string_has():
    store = MemoryStore(100, evict=False)
    strings = {f"{number:064x}": bytes([number]) * size for number, size in enumerate((1, 60, 39))}
    for key, data in strings.items():
        assert list(store.put([key], [memoryview(data)], timeout=SOON).outcomes()) == [Outcome.OK]
    extra = f"{9:064x}"
    assert list(store.put([extra], [memoryview(b"x")], timeout=SOON).outcomes()) == [Outcome.FULL]
    for key, data in strings.items():
        found = bytearray(len(data))
        assert list(store.get([key], [memoryview(found)], timeout=SOON).outcomes()) == [Outcome.OK]
        assert found == data
    assert list(store.delete([f"{1:064x}"], timeout=SOON).outcomes()) == [Outcome.OK]
    assert list(store.put([extra], [memoryview(b"x" * 60)], timeout=SOON).outcomes()) == [Outcome.OK]
    assert list(store.put([extra], [memoryview(b"x" * 101)], timeout=SOON).outcomes()) == [Outcome.FULL]


def test_memory_without_slots_gives_away_as_many_as_it_takes():
    store = MemoryStore(100)
    for number in range(10):
        store.put([f"{number:064x}"], [memoryview(b"x" * 10)], timeout=SOON)
    store.put([f"{10:064x}"], [memoryview(b"y" * 25)], timeout=SOON)
    there = store.contains([f"{number:064x}" for number in range(11)], timeout=SOON).outcomes()
    assert list(there) == [Outcome.MISS] * 3 + [Outcome.OK] * 8


def test_a_string_that_was_put_is_a_copy():
    store = memory(2)
    buffer = bytearray(text(1))
    store.put([key(1)], [buffer], timeout=SOON)
    buffer[:] = text(2)
    assert get(store, 1) == text(1)


def test_no_memory_for_a_slot_is_full(monkeypatch):
    store = memory(2)

    def empty(*arguments):
        raise MemoryError

    monkeypatch.setattr("kvcache.store_memory.np.empty", empty)
    assert put(store, 1) == [FULL]


# ---- in a directory


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def files(folder):
    store = DirectoryStore(folder, 8 * SIZE)
    yield store
    store.close(SOON)


def names(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_file_lies_in_the_folder_of_its_first_two_digits(files, folder):
    name = "ab" + "0" * 62
    done(files.put([name], [text(1)], timeout=SOON))
    assert (folder / "ab" / name).read_bytes() == text(1)
    assert names(folder) == [name]


def test_another_process_finds_what_was_left(files, folder):
    put(files, 1, 2)
    files.close(SOON)
    later = DirectoryStore(folder, 8 * SIZE)
    assert later.used_bytes == 2 * SIZE
    assert get(later, 2) == text(2)
    later.close(SOON)


def test_a_store_that_opens_with_too_much_deletes_the_oldest_when_it_needs_room(files, folder):
    for number in range(4):
        put(files, number)
        os.utime(folder / "00" / key(number), (number, number))
    files.close(SOON)
    later = DirectoryStore(folder, 3 * SIZE)
    put(later, 9)
    assert there(later, 0, 1, 2, 3, 9) == [2, 3, 9]
    assert later.used_bytes == 3 * SIZE
    later.close(SOON)


def test_files_of_others_in_the_directory_are_left_alone(files, folder):
    put(files, 1)
    (folder / "00" / "notes.txt").write_text("mine")
    (folder / "README").write_text("mine")
    (folder / "01").mkdir()
    (folder / "01" / key(1)).write_text("a key in a folder that is not its own")
    files.close(SOON)
    later = DirectoryStore(folder, SIZE)
    put(later, 2)
    assert later.used_bytes == SIZE
    assert (folder / "00" / "notes.txt").read_text() == (folder / "README").read_text() == "mine"
    assert (folder / "01" / key(1)).exists()
    later.close(SOON)


def test_what_a_crash_in_the_middle_of_a_put_has_left_is_not_found_and_goes(files, folder):
    put(files, 1)
    half = folder / "00" / f"{key(2)}.123.0.tmp"
    half.write_bytes(text(2)[:100])
    os.utime(half, (1, 1))
    fresh = folder / "00" / f"{key(3)}.124.0.tmp"  # of a process that may be at it right now
    fresh.write_bytes(b"x")
    files.close(SOON)
    later = DirectoryStore(folder, 8 * SIZE)
    assert there(later, 1, 2, 3) == [1]
    assert not half.exists() and fresh.exists()
    later.close(SOON)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_full_and_leaves_nothing_behind(files, folder, monkeypatch, number):
    put(files, 1)

    def write(descriptor, data):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(store_files.os, "write", write)
    assert put(files, 2) == [FULL]
    monkeypatch.undo()
    assert names(folder) == [key(1)]
    assert files.used_bytes == SIZE
    assert put(files, 2) == [OK]


def test_any_other_error_of_the_disk_fails_one_key_and_not_the_store(files, folder, monkeypatch):
    def replace(source, target):
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(store_files.os, "replace", replace)
    assert put(files, 1) == [FAILED]
    monkeypatch.undo()
    assert names(folder) == [] and files.used_bytes == 0
    assert put(files, 1) == [OK]


def test_an_error_while_reading_fails_the_key(files, monkeypatch):
    put(files, 1)

    def readv(descriptor, buffers):
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(store_files.os, "readv", readv)
    assert get(files, 1) is FAILED


def test_an_error_that_nobody_has_thought_of_ends_no_thread(files, monkeypatch):
    def write(descriptor, data):
        raise RuntimeError("unheard of")

    monkeypatch.setattr(store_files.os, "write", write)
    assert put(files, 1, 2, 3) == [FAILED] * 3
    monkeypatch.undo()
    assert put(files, 1) == [OK]


def test_a_file_that_has_been_cut_short_is_a_miss(files, folder):
    put(files, 1)
    os.truncate(folder / "00" / key(1), SIZE - 1)
    assert get(files, 1) is MISS


def test_a_file_that_is_cut_while_it_is_read_is_a_miss(files, folder, monkeypatch):
    put(files, 1)
    path = folder / "00" / key(1)
    readv = os.readv

    def cut(descriptor, buffers):
        count = readv(descriptor, [buffers[0][:100]])
        os.truncate(path, 100)
        return count

    monkeypatch.setattr(store_files.os, "readv", cut)
    assert get(files, 1) is MISS


def test_a_file_that_another_process_deleted_is_a_miss_and_no_longer_counted(files, folder):
    put(files, 1, 2)
    (folder / "00" / key(1)).unlink()
    assert get(files, 1) is MISS
    assert files.used_bytes == SIZE


def test_a_file_that_another_process_has_put_is_found_and_counted(files, folder):
    other = DirectoryStore(folder, 8 * SIZE)
    put(other, 1)
    assert get(files, 1) == text(1)
    assert files.used_bytes == SIZE
    other.close(SOON)


def test_a_folder_in_a_files_place_is_no_string(files, folder):
    (folder / "00" / key(1)).mkdir(parents=True)
    assert get(files, 1) is MISS
    assert put(files, 1) == [FAILED]
    assert files.used_bytes == 0


@pytest.fixture
def stuck(monkeypatch):
    """Writes that take as long as the test says."""
    gate, begun = threading.Event(), threading.Event()
    write = os.write

    def slow(descriptor, data):
        begun.set()
        assert gate.wait(SOON)
        return write(descriptor, data)

    monkeypatch.setattr(store_files.os, "write", slow)
    yield begun, gate
    gate.set()


def test_no_call_waits_for_the_disk(files, stuck):
    _, gate = stuck
    job = files.put([key(1)], [text(1)], timeout=SOON)
    assert not job.done() and not job.wait(0.01)
    gate.set()
    assert done(job) == [OK]


def test_a_job_past_its_deadline_fails_and_gives_its_buffers_back(files, folder, stuck):
    begun, gate = stuck
    job = files.put([key(1), key(2), key(3)], [text(1), text(2), text(3)], timeout=0.05)
    assert begun.wait(SOON)
    time.sleep(0.06)
    assert not job.done()  # a write is under way: its buffer is lent still
    gate.set()
    assert done(job) == [FAILED] * 3
    assert names(folder) == [] and files.used_bytes == 0


def test_a_job_that_is_cancelled_leaves_nothing_behind(files, folder, stuck):
    begun, gate = stuck
    job = files.put([key(number) for number in range(4)], [text(number) for number in range(4)], timeout=SOON)
    assert begun.wait(SOON)
    job.cancel()
    gate.set()
    assert done(job) == [FAILED] * 4
    assert names(folder) == []


def test_too_much_at_once_is_full_now(folder, stuck):
    begun, gate = stuck
    store = DirectoryStore(folder, 100 * SIZE, max_pending=2)
    first = store.put([key(1), key(2)], [text(1), text(2)], timeout=SOON)
    assert begun.wait(SOON)
    assert done(store.contains([key(1)], timeout=SOON)) == [FULL]
    gate.set()
    assert done(first) == [OK, OK]
    assert put(store, 3) == [OK]
    store.close(SOON)


def test_close_lets_finish_what_is_under_way(files, folder):
    jobs = [files.put([key(number)], [text(number)], timeout=SOON) for number in range(6)]
    files.close(SOON)
    assert [done(job) for job in jobs] == [[OK]] * 6
    assert len(names(folder)) == 6


def test_close_gives_up_after_its_timeout(files, stuck):
    begun, gate = stuck
    job = files.put([key(1)], [text(1)], timeout=SOON)
    assert begun.wait(SOON)
    before = time.monotonic()
    files.close(0.05)
    assert time.monotonic() - before < 5
    gate.set()
    assert done(job) == [FAILED]


def test_a_store_that_is_let_go_leaves_no_thread():
    def count():
        return sum(thread.name == "kvcache-store" for thread in threading.enumerate())

    before = count()
    pool = WorkerPool(2, 8)
    assert count() == before + 2
    threads = pool._threads
    del pool
    for thread in threads:
        thread.join(SOON)
    assert count() == before


def test_a_directory_that_cannot_be_made_is_an_error_of_the_system(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        DirectoryStore(tmp_path / "file" / "store", SIZE)

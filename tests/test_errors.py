"""Errors: a sentence with numbers, the numbers as attributes, and both survive pickling and copying."""

import copy
import pickle

import pytest

from kvcache import errors

CASES = [
    (
        errors.RequestTooLarge,
        {"what": "prompt", "tokens": 40000, "blocks_needed": 2500, "num_blocks": 2048},
        "prompt of 40000 tokens needs 2500 blocks, the arena has 2048",
    ),
    (
        errors.RequestTooLarge,
        {"what": "max_tokens", "tokens": 40000, "blocks_needed": 2500, "num_blocks": 2048},
        "max_tokens of 40000 needs 2500 blocks, the arena has 2048",
    ),
    (errors.UnknownSequence, {"request_id": ("user", 7)}, "no live sequence has the id ('user', 7)"),
    (errors.SequenceExists, {"request_id": "user"}, "a sequence with the id 'user' exists already"),
    (
        errors.InvalidFree,
        {"start": 3, "length": 4, "reason": "it was freed before"},
        "run of 4 blocks from block 3 is refused: it was freed before",
    ),
    (
        errors.CacheFull,
        {"blocks_needed": 2, "blocks_available": 1},
        "the call needs 2 more blocks, 1 available",
    ),
    (errors.CacheClosed, {}, "the cache is closed"),
    (
        errors.UnreadableConfig,
        {"model_type": "llama", "fields": ("head_dim",), "reason": "head_dim is missing"},
        "the config of a 'llama' model cannot be read: head_dim is missing",
    ),
    (
        errors.CorruptCacheFile,
        {"path": "/a/b", "reason": "it has 3 bytes, too few for a header"},
        "'/a/b' holds no cache that can be loaded: it has 3 bytes, too few for a header",
    ),
    (
        errors.IncompatibleCacheFile,
        {"path": "/a/b", "field": "block_size", "found": 32, "wanted": 16},
        "'/a/b' was made for another cache: its block_size is 32, not 16",
    ),
    (
        errors.Suspended,
        {"request_id": "user"},
        "the sequence with the id 'user' is suspended: resume it first",
    ),
    (errors.CacheHeld, {"holds": 2}, "the call would wait for 2 open holds, and this thread has one"),
]
BUILTIN = {
    errors.RequestTooLarge: ValueError,
    errors.UnknownSequence: KeyError,
    errors.SequenceExists: ValueError,
    errors.InvalidFree: ValueError,
    errors.CorruptCacheFile: ValueError,
    errors.IncompatibleCacheFile: ValueError,
    errors.UnreadableConfig: ValueError,
}

each = pytest.mark.parametrize(("kind", "numbers", "sentence"), CASES)


def of_module():
    return {kind for kind in vars(errors).values() if isinstance(kind, type)} - {errors.KVCacheError}


def test_every_error_of_the_module_is_tried_here():
    assert {kind for kind, _, _ in CASES} == of_module()


@each
def test_the_message_is_a_sentence_with_the_numbers(kind, numbers, sentence):
    assert str(kind(**numbers)) == sentence


@each
def test_the_numbers_are_attributes(kind, numbers, sentence):
    error = kind(**numbers)
    assert {name: getattr(error, name) for name in numbers} == numbers


@each
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickling_keeps_sentence_and_numbers(kind, numbers, sentence, protocol):
    error = pickle.loads(pickle.dumps(kind(**numbers), protocol))
    assert type(error) is kind
    assert str(error) == sentence
    assert vars(error) == numbers


@each
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copying_keeps_sentence_and_numbers(kind, numbers, sentence, copied):
    error = copied(kind(**numbers))
    assert (type(error), str(error), vars(error)) == (kind, sentence, numbers)


@each
def test_each_is_also_the_builtin_that_the_misuse_calls_for(kind, numbers, sentence):
    assert issubclass(kind, errors.KVCacheError)
    assert issubclass(kind, BUILTIN.get(kind, errors.KVCacheError))
    assert issubclass(kind, (ValueError, KeyError)) == (kind in BUILTIN)


def test_what_is_noted_on_an_error_is_pickled_too():
    error = errors.CacheClosed()
    error.rank = 3
    assert pickle.loads(pickle.dumps(error)).rank == 3


def test_a_subclass_with_its_own_constructor_survives_pickling():
    error = Odd("extra", request_id="a")
    restored = pickle.loads(pickle.dumps(error))
    assert (type(restored), restored.extra, restored.request_id) == (Odd, "extra", "a")


class Odd(errors.UnknownSequence):
    def __init__(self, extra, *, request_id):
        super().__init__(request_id=request_id)
        self.extra = extra


class Shy:
    def __repr__(self):
        raise RuntimeError("no")


def test_an_id_whose_repr_raises_is_named_by_its_type():
    assert str(errors.UnknownSequence(request_id=Shy())) == "no live sequence has the id <Shy>"


def test_a_long_id_is_cut_in_the_sentence_and_whole_in_the_attribute():
    error = errors.SequenceExists(request_id="x" * 1000)
    assert len(str(error)) < 300
    assert error.request_id == "x" * 1000

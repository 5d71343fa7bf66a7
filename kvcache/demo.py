"""Continuous batching on one cache, and the proof that every token is right: what `kvcache demo` runs.

`Serving` is the loop of an engine: admit from a queue, decode one token for everybody, free who is finished.
In a conversation the next turn, which repeats all that was said before, enters the queue then.
`run` does that, then has every request decoded again alone, without this package, and compares. Which model
library does the arithmetic is the decoder's business, how it looks on a terminal is `demo_view`'s.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

PROMPT_MEDIAN, PROMPT_SIGMA = 64, 0.8  # tokens; the spread of a chat service, its lengths scaled down
OUTPUT_MEDIAN, OUTPUT_SIGMA = 36, 0.65
SMALLEST_LENGTH = 4  # tokens, of a prompt, of what is said in a later turn, and of an answer
SMALLEST_ARENA = 128  # tokens
SYSTEM_PROMPTS, SYSTEM_TOKENS = 3, 96  # of conversations; in small arenas a sixteenth of it


class Decoder(Protocol):
    """What serves the requests, `kvcache.mlx_lm.Decoder` for one; choices have token, logprob and margin."""

    cache: Any

    def prefill(self, request_id, prompt, cached_tokens): ...
    def step(self, tokens): ...
    def finish(self, request_id): ...
    def alone(self, prompt, num_tokens): ...


class Message(NamedTuple):
    """What is said in a later turn of a conversation, and how many tokens are decoded for it."""

    text: tuple[int, ...]
    num_tokens: int


@dataclass(frozen=True)
class Request:
    """A prompt, how many tokens are decoded for it, and what is said to the answer."""

    conversation: str
    prompt: tuple[int, ...]
    num_tokens: int
    turn: int = 1
    later: tuple[Message, ...] = ()

    @property
    def request_id(self) -> str:
        """The conversation's name; after the first turn, with the number of the turn."""
        return self.conversation if self.turn == 1 else f"{self.conversation}.{self.turn}"

    def following(self, answer: Sequence[int]) -> "Request | None":
        """The next turn: this prompt, the answer to it and what is said then; `None` after the last."""
        if not self.later:
            return None
        (text, num_tokens), *later = self.later
        prompt = (*self.prompt, *answer, *text)
        return Request(self.conversation, prompt, num_tokens, self.turn + 1, tuple(later))


@dataclass(frozen=True)
class Difference:
    """The first token that came out differently: served from the arena, and alone."""

    request_id: str
    position: int  # among the tokens decoded, from 0
    expected: int | None  # alone
    got: int | None
    margin: float | None  # of the logit of what was got over the second best: tiny where rounding may decide

    def __str__(self):
        won = "" if self.margin is None else f" (won by a logit margin of {self.margin:.1e})"
        return (
            f"request {self.request_id} differs at decoded token {self.position}: "
            f"{self.got} from the arena{won}, {self.expected} alone with mlx-lm's own cache"
        )


@dataclass(frozen=True)
class Turn:
    """What was found of the prompts of one turn, in all conversations."""

    turn: int
    requests: int
    hits: int  # requests of which a beginning was there
    prompt_tokens: int
    skipped_tokens: int


@dataclass(frozen=True)
class Result:
    """What a run came to. Speeds are decoded tokens per second, prompts included in the time."""

    requests: int
    turns: int
    prompt_tokens: int
    skipped_tokens: int  # of the prompts, those whose K and V were there
    skipped_share: float
    revived_tokens: int  # of the skipped ones: continued where they were
    copied_tokens: int  # copied from where they were
    shared_tokens: int  # read where they are by several
    by_turn: tuple[Turn, ...]
    tokens: int
    equal: bool
    difference: Difference | None
    moves: int
    moved_tokens: int
    arena_copies: int
    tokens_per_second: float
    mlx_lm_tokens_per_second: float
    seconds: float
    mlx_lm_seconds: float
    steps: int
    largest_batch: int
    peak_used_blocks: int
    num_blocks: int
    arena_bytes: int
    distinct_tokens: int
    smallest_margin: float  # of a chosen token's logit over the second best
    largest_logprob_difference: float  # between the arena and mlx-lm's cache, of a chosen token

    def as_dict(self):
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Progress:
    """Where a run is, for who watches it."""

    phase: str  # "serve" or "replay"
    requests: int
    finished: int
    tokens: int  # decoded so far in this phase
    seconds: float  # in this phase
    waiting: int
    live: tuple[str, ...]  # ids, in batch order
    cache: Any


Watch = Callable[[Progress], None]


def make_requests(
    count: int, corpus: Sequence[int], arena_tokens: int, seed: int, turns: int = 1
) -> list[Request]:
    """Draw requests with lengths like a chat service's, cut from a text.

    Parameters
    ----------
    count : int
        How many.
    corpus : sequence of int
        Token ids; prompts begin anywhere in it, and go on at its beginning after its end.
    arena_tokens : int
        No request takes more than a quarter of it, whatever its turn.
    seed : int
        Of lengths and places.
    turns : int
        With more than one, each is the first request of a conversation, and begins with one of a few system
        prompts.

    Returns
    -------
    list of Request

    Raises
    ------
    ValueError
        More than `most_turns`.
    """
    if turns > most_turns(arena_tokens):
        raise ValueError(
            f"{turns} turns, an arena of {arena_tokens} tokens has room for {most_turns(arena_tokens)}"
        )
    rng = np.random.default_rng(seed)
    systems = _system_prompts(corpus, arena_tokens, seed) if turns > 1 else [()]
    longest = (arena_tokens // 4 - len(systems[0])) // (2 * turns)
    requests = []
    for number in range(count):
        (prompt, num_tokens), *later = (_message(rng, corpus, longest) for _ in range(turns))
        prompt = systems[number % len(systems)] + prompt
        requests.append(Request(f"r{number:03}", prompt, num_tokens, later=tuple(later)))
    return requests


def most_turns(arena_tokens: int) -> int:
    """Turns of the longest conversation in a quarter of an arena, when all lengths are the smallest."""
    return (arena_tokens // 4 - _system_length(arena_tokens)) // (2 * SMALLEST_LENGTH)


def random_ids(count: int, vocabulary: int, seed: int) -> list[int]:
    """Token ids below `vocabulary`, for models that have no text."""
    return np.random.default_rng(seed).integers(vocabulary, size=count).tolist()


def _system_prompts(corpus, arena_tokens, seed):
    rng = np.random.default_rng([seed, SYSTEM_PROMPTS])
    return [_cut(rng, corpus, _system_length(arena_tokens)) for _ in range(SYSTEM_PROMPTS)]


def _system_length(arena_tokens):
    return min(SYSTEM_TOKENS, arena_tokens // 16)


def _message(rng, corpus, longest):
    length = _length(rng, PROMPT_MEDIAN, PROMPT_SIGMA, longest)
    num_tokens = _length(rng, OUTPUT_MEDIAN, OUTPUT_SIGMA, longest)
    return Message(_cut(rng, corpus, length), num_tokens)


def _length(rng, median, sigma, longest):
    return int(np.clip(round(rng.lognormal(math.log(median), sigma)), SMALLEST_LENGTH, longest))


def _cut(rng, corpus, length):
    """A piece of the corpus."""
    start = int(rng.integers(len(corpus)))
    return tuple(int(corpus[(start + i) % len(corpus)]) for i in range(length))


class Serving:
    """Continuous batching: requests come from a queue as they fit, and leave as they finish.

    When a turn of a conversation is answered the next one joins the queue: before conversations that have
    not begun, whose memory may be taken, and behind others that are under way.

    Parameters
    ----------
    decoder : Decoder
        Of an empty cache.
    requests : iterable of Request
        First turns.

    Attributes
    ----------
    admitted : dict
        Request to the tokens of its prompt that were there already, in order of admission.
    choices : dict
        Request id to the choices made so far, one per decoded token.
    seconds : float
        Time spent in `run`, without that of its watcher.
    """

    def __init__(self, decoder, requests):
        self.decoder = decoder
        self.cache = decoder.cache
        self.waiting = deque(requests)
        self.live = {}  # request id -> Request, in batch order
        self.admitted = {}
        self.choices = {}
        self.seconds = 0.0
        self.steps = 0
        self.largest_batch = 0
        self._count = _count(self.waiting)

    def run(self, watch: Watch) -> None:
        """Serve until the queue and the batch are empty."""
        while self.waiting or self.live:
            started = time.perf_counter()
            self.admit()
            self.step()
            self.seconds += time.perf_counter() - started
            watch(self.progress())

    def admit(self) -> None:
        """Take requests from the head of the queue while they fit."""
        while self.waiting:
            request = self.waiting[0]
            granted = self.cache.allocate_for(
                request.request_id, request.prompt, max_new_tokens=request.num_tokens
            )
            if granted is None and not self.live:
                raise RuntimeError(
                    f"{request.request_id} is refused by an idle cache: others hold its blocks"
                )
            if granted is None:
                return
            self.waiting.popleft()
            self.live[request.request_id] = request
            self.admitted[request] = granted.cached_tokens
            first = self.decoder.prefill(request.request_id, request.prompt, granted.cached_tokens)
            self.choices[request.request_id] = [first]
            self._finish()

    def step(self) -> None:
        """Decode one token for every live request."""
        if not self.live:
            return
        self.steps += 1
        self.largest_batch = max(self.largest_batch, len(self.live))
        newest = [self.choices[request_id][-1].token for request_id in self.live]
        for request_id, choice in zip(self.live, self.decoder.step(newest), strict=True):
            self.choices[request_id].append(choice)
        self._finish()

    def _finish(self):
        for request_id, request in list(self.live.items()):
            choices = self.choices[request_id]
            if len(choices) == request.num_tokens:
                self.decoder.finish(request_id)
                del self.live[request_id]
                following = request.following([choice.token for choice in choices])
                if following is not None:
                    self._join(following)

    def _join(self, following):
        under_way = sum(request.turn > 1 for request in self.waiting)  # they are at its head
        self.waiting.insert(under_way, following)

    def progress(self) -> Progress:
        """Where it is."""
        tokens = sum(map(len, self.choices.values()))
        finished = len(self.choices) - len(self.live)
        return Progress(
            "serve",
            self._count,
            finished,
            tokens,
            self.seconds,
            len(self.waiting),
            tuple(self.live),
            self.cache,
        )


class Replay:
    """Every request again, alone, without this package: each turn from the beginning of its prompt.

    A prompt repeats the answers that were decoded here, not those that were served.

    Parameters
    ----------
    decoder : Decoder
    requests : iterable of Request
        First turns.

    Attributes
    ----------
    requests : list of Request
        Those decoded so far, turn after turn of one conversation after the other.
    choices : dict
        Request id to choices.
    seconds : float
    """

    def __init__(self, decoder, requests):
        self.decoder = decoder
        self.requests = []
        self.choices = {}
        self.seconds = 0.0
        self._openings = list(requests)

    def run(self, watch: Watch) -> None:
        """Decode one request after the other."""
        for opening in self._openings:
            request = opening
            while request is not None:
                request = self._decode(request)
                watch(self.progress())

    def _decode(self, request):
        """Returns the next turn."""
        started = time.perf_counter()
        choices = self.decoder.alone(request.prompt, request.num_tokens)
        self.seconds += time.perf_counter() - started
        self.requests.append(request)
        self.choices[request.request_id] = choices
        return request.following([choice.token for choice in choices])

    def progress(self) -> Progress:
        """Where it is."""
        tokens = sum(map(len, self.choices.values()))
        count, finished = _count(self._openings), len(self.choices)
        return Progress(
            "replay", count, finished, tokens, self.seconds, count - finished, (), self.decoder.cache
        )


def _count(openings):
    """Requests of all turns."""
    return sum(1 + len(request.later) for request in openings)


def first_difference(requests, served, alone) -> Difference | None:
    """Compare all tokens, in the order of the requests; `None` where they are the same.

    Parameters
    ----------
    requests : iterable of Request
    served, alone : dict
        Request id to choices.
    """
    for request in requests:
        got, expected = served.get(request.request_id, ()), alone.get(request.request_id, ())
        for position in range(max(len(got), len(expected), request.num_tokens)):
            mine, theirs = _at(got, position), _at(expected, position)
            if mine is None or theirs is None or mine.token != theirs.token:
                return Difference(
                    request.request_id,
                    position,
                    expected=theirs and theirs.token,
                    got=mine and mine.token,
                    margin=mine and mine.margin,
                )
    return None


def _at(choices, position):
    return choices[position] if position < len(choices) else None


def run(decoder: Decoder, requests: Sequence[Request], watch: Watch = lambda progress: None) -> Result:
    """Serve all requests from the cache, replay each alone, and compare.

    Parameters
    ----------
    decoder : Decoder
        Of an empty cache.
    requests : sequence of Request
        First turns.
    watch : callable
        Called with a `Progress` after every step and every replayed request; its time is not counted.

    Returns
    -------
    Result
    """
    serving, replay = Serving(decoder, requests), Replay(decoder, requests)
    serving.run(watch)
    replay.run(watch)
    return _result(decoder.cache, serving, replay)


def _result(cache, serving, replay):
    requests = replay.requests
    difference = first_difference(requests, serving.choices, replay.choices)
    served = [choice for request in requests for choice in serving.choices[request.request_id]]
    alone = [choice for request in requests for choice in replay.choices[request.request_id]]
    by_turn = tuple(_by_turn(serving.admitted))
    prompt_tokens = sum(turn.prompt_tokens for turn in by_turn)
    skipped_tokens = sum(turn.skipped_tokens for turn in by_turn)
    stats = cache.stats()
    return Result(
        requests=len(requests),
        turns=len(by_turn),
        prompt_tokens=prompt_tokens,
        skipped_tokens=skipped_tokens,
        skipped_share=skipped_tokens / prompt_tokens,
        revived_tokens=stats.revived_tokens,
        copied_tokens=stats.copied_tokens,
        shared_tokens=skipped_tokens - stats.revived_tokens - stats.copied_tokens,
        by_turn=by_turn,
        tokens=len(served),
        equal=difference is None,
        difference=difference,
        moves=stats.moves,
        moved_tokens=stats.moved_tokens,
        arena_copies=stats.arena_copies,
        tokens_per_second=len(served) / serving.seconds,
        mlx_lm_tokens_per_second=len(alone) / replay.seconds,
        seconds=serving.seconds,
        mlx_lm_seconds=replay.seconds,
        steps=serving.steps,
        largest_batch=serving.largest_batch,
        peak_used_blocks=stats.peak_used_blocks,
        num_blocks=stats.total_blocks,
        arena_bytes=stats.arena_bytes,
        distinct_tokens=len({choice.token for choice in served}),
        smallest_margin=min(choice.margin for choice in served),
        largest_logprob_difference=max(
            abs(one.logprob - other.logprob) for one, other in zip(served, alone, strict=False)
        ),
    )


def _by_turn(admitted):
    """`Turn` of each turn, from what was skipped of each request."""
    for turn in sorted({request.turn for request in admitted}):
        skipped = {request: tokens for request, tokens in admitted.items() if request.turn == turn}
        yield Turn(
            turn=turn,
            requests=len(skipped),
            hits=sum(tokens > 0 for tokens in skipped.values()),
            prompt_tokens=sum(len(request.prompt) for request in skipped),
            skipped_tokens=sum(skipped.values()),
        )

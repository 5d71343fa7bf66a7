"""How a budget of memory divides, and how many tokens and sequences it holds: arithmetic only."""

from dataclasses import dataclass, field

from kvcache.costs import PREFILL_TOKENS, Costs, activation_bytes, costs_of, whole_blocks
from kvcache.errors import KVCacheError
from kvcache.model_weights import parameters_of, weight_bytes
from kvcache.spec import ITEMSIZE, MAX_TOKENS

OVERHEAD = 0.05  # of the memory: 2 of 40, as in the integration guide
KEPT_FREE = 0.1  # of the arena, so that moves stay cheap
USUAL_CONTEXT = 8192
BLOCK_SIZES = (16, 32, 64)
BLOCK_WASTE = 0.001  # of a sequence, that half a block may be in a block larger than the smallest
UNITS = {"TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10}


class BudgetTooSmall(KVCacheError, ValueError):
    """The memory does not hold what is there before the first token.

    Attributes
    ----------
    memory, weights, activations, overhead, needed : int
        Bytes: that there are, that the three take, and that they and one block of the arena take.
    """

    def __init__(self, *, memory, weights, activations, overhead, needed):
        super().__init__(
            f"{size(memory)} of memory do not hold weights of {size(weights)}, activations of {size(activations)}, "
            f"{size(overhead)} of overhead and one block: {size(needed)} are needed"
        )
        self.memory = memory
        self.weights = weights
        self.activations = activations
        self.overhead = overhead
        self.needed = needed


def size(count):
    """Bytes as text, in the largest unit that they fill."""
    for unit, scale in UNITS.items():
        if abs(count) >= scale:
            return f"{count / scale:,.2f} {unit}"
    return f"{count:,} B"


def recommended_block_size(context):
    """The largest block size of which half a block is next to nothing of a sequence."""
    return max(each for each in BLOCK_SIZES if each == BLOCK_SIZES[0] or each / 2 <= BLOCK_WASTE * context)


@dataclass(frozen=True)
class Budget:
    """How memory divides, in bytes; they sum to `memory`."""

    memory: int
    weights: int
    weights_from: str
    activations: int
    activations_from: str
    overhead: int
    state: int
    arena: int
    remaining: int


@dataclass(frozen=True)
class Wishes:
    """What a plan is made for.

    Attributes
    ----------
    memory, weights, activations : int or None
        Bytes. Without memory only costs are told; what else is None is estimated from the config.
    context : int or None
        Tokens of a sequence; None: 8192, or what the model is made for if that is less.
    concurrency : int or None
        Sequences at a time; None: as many as fit.
    block_size : int or None
        None: by the length of the context.
    """

    memory: int | None = None
    weights: int | None = None
    activations: int | None = None
    context: int | None = None
    concurrency: int | None = None
    block_size: int | None = None


@dataclass(frozen=True)
class Plan:
    """What to make, and why.

    Attributes
    ----------
    model : ModelConfig
    costs : Costs
    context : int
        Tokens of a sequence that is planned for.
    concurrency : int or None
        Sequences at a time that were asked for.
    block_size, max_total_tokens : int
        Of the arena to make; `max_total_tokens` is None where there is nothing to size it by.
    budget : Budget or None
        None where no memory is given.
    tokens, sequences : int or None
        That fit: tokens in the largest arena, sequences of `context` tokens.
    reasons : dict
        Why this block size and this many tokens.
    warnings, notes : tuple of str
    """

    model: object
    costs: Costs
    context: int
    concurrency: int | None
    block_size: int
    max_total_tokens: int | None
    budget: Budget | None
    tokens: int | None
    sequences: int | None
    reasons: dict = field(default_factory=dict)
    warnings: tuple = ()
    notes: tuple = ()


def make_plan(model, wishes):
    """Divide memory for a model.

    Parameters
    ----------
    model : ModelConfig
    wishes : Wishes

    Returns
    -------
    Plan

    Raises
    ------
    BudgetTooSmall
        Nothing remains for the arena.
    UnreadableConfig
        Something is to be estimated, and a field that it follows from is missing.
    """
    longest = model.max_position_embeddings
    context = wishes.context or min(USUAL_CONTEXT, longest or USUAL_CONTEXT)
    block_size = wishes.block_size or recommended_block_size(context)
    costs = costs_of(model)
    wanted = _wanted_tokens(costs, context, wishes.concurrency, block_size)
    warnings = []
    if longest is not None and context > longest:
        warnings.append(
            f"a context of {context:,} tokens is more than the {longest:,} that the model is made for"
        )
    budget = tokens = sequences = None
    if wishes.memory is not None:
        budget, tokens, sequences = _divide(model, costs, wishes, context, block_size, wanted)
        warnings += _complaints(
            costs, context, wishes.concurrency, block_size, budget, wanted, tokens, sequences
        )
    total = min((each for each in (wanted, tokens) if each is not None), default=0)
    return Plan(
        model=model,
        costs=costs,
        context=context,
        concurrency=wishes.concurrency,
        block_size=block_size,
        max_total_tokens=total or None,
        budget=budget,
        tokens=tokens,
        sequences=sequences,
        reasons=_reasons(context, wishes, block_size, total, wanted),
        warnings=tuple(warnings),
        notes=tuple(_notes(model, costs)),
    )


def _most_tokens(block_size):
    return (MAX_TOKENS - 1) // block_size * block_size


def _wanted_tokens(costs, context, concurrency, block_size):
    """Tokens of an arena for so many sequences, with room for cheap moves; None where nothing says how many."""
    if concurrency is None or not costs.arena_bytes_per_token:
        return None
    held = concurrency * whole_blocks(context, block_size)
    return min(whole_blocks(round(held / (1 - KEPT_FREE)), block_size), _most_tokens(block_size))


def _divide(model, costs, wishes, context, block_size, wanted):
    """The budget, and how many tokens and sequences fit into it."""
    memory = wishes.memory
    weights, weights_from = _weights(model, wishes.weights)
    activations, activations_from = wishes.activations, "given"
    if activations is None:
        activations = activation_bytes(model, wishes.concurrency)
        activations_from = f"estimate: {PREFILL_TOKENS:,} tokens at once"
    overhead = round(memory * OVERHEAD)
    room = memory - weights - activations - overhead
    block_bytes = costs.arena_bytes_per_token * block_size
    if room < block_bytes + costs.state_bytes:
        raise BudgetTooSmall(
            memory=memory,
            weights=weights,
            activations=activations,
            overhead=overhead,
            needed=round((weights + activations + block_bytes + costs.state_bytes) / (1 - OVERHEAD)) + 1,
        )
    sequences = _sequences(costs, room, context, block_size)
    held = max(1, sequences if wishes.concurrency is None else min(wishes.concurrency, sequences))
    state = held * costs.state_bytes
    tokens = 0
    if block_bytes:
        tokens = min((room - state) // block_bytes * block_size, _most_tokens(block_size))
    arena = costs.arena_bytes_per_token * (tokens if wanted is None else min(tokens, wanted))
    left = room - state - arena
    budget = Budget(
        memory, weights, weights_from, activations, activations_from, overhead, state, arena, left
    )
    return budget, tokens, sequences


def _sequences(costs, room, context, block_size):
    """How many sequences of `context` tokens have room for their blocks and their states."""
    fit = room // costs.arena_sequence_bytes(context, block_size)
    if costs.arena_bytes_per_token:
        fit = min(fit, _most_tokens(block_size) // whole_blocks(context, block_size))
    return fit


def _weights(model, given):
    """Bytes of the weights, and where that is from."""
    if given is not None:
        return given, "given"
    parameters = parameters_of(model)
    count, stored = weight_bytes(model, parameters, ITEMSIZE[_stored_dtype(model)])
    return count, f"estimate: {parameters.total / 1e9:,.2f} billion x {stored}"


def _stored_dtype(model):
    """Of weights: what the config says, whatever K and V are kept in."""
    for values in (model.fields.values, model.fields.outer):
        for name in ("dtype", "torch_dtype"):
            if isinstance(values.get(name), str) and values[name] in ITEMSIZE:
                return values[name]
    return "bfloat16"


def _complaints(costs, context, concurrency, block_size, budget, wanted, tokens, sequences):
    if sequences == 0:
        yield (
            f"not one sequence of {context:,} tokens fits: it takes "
            f"{size(costs.arena_sequence_bytes(context, block_size))}, and {size(budget.arena)} remain for the arena"
        )
    elif concurrency is not None and sequences < concurrency:
        yield f"{concurrency:,} sequences of {context:,} tokens do not fit at a time: {sequences:,} do"
    elif wanted is not None and tokens < wanted:
        yield (
            f"all {concurrency:,} sequences fit, but with less than {100 * KEPT_FREE:.0f} % of the arena free moves "
            "cost more"
        )


def _reasons(context, wishes, block_size, total, wanted):
    concurrency = wishes.concurrency
    reasons = {
        "block_size": f"half a block, {block_size / 2:g} of {context:,} tokens, is lost per sequence",
    }
    if total and wanted is None:
        reasons["max_total_tokens"] = "all that fits, in whole blocks"
    elif total == wanted and total:
        reasons["max_total_tokens"] = (
            f"{concurrency:,} sequences of {context:,} tokens, and {100 * KEPT_FREE:.0f} % free"
        )
    elif total:
        reasons["max_total_tokens"] = f"all that fits, less than {concurrency:,} sequences and room for moves"
    return reasons


def _notes(model, costs):
    if model.dtype_field is None:
        yield f"the config names no dtype: K and V are taken to be {model.dtype}"
    if any(layer.state for layer in model.layers):
        if model.state_dtype_field is None:
            yield f"the config names no dtype for recurrent states: they are taken to be {model.state_dtype}"
        yield "recurrent states are in no arena: the engine keeps them, the budget counts them"
    if costs.windows:
        yield (
            f"windows are not released yet: in an arena a token costs {size(costs.arena_bytes_per_token)}, "
            "and fits are counted with that"
        )
    fields = model.fields
    extra = fields.first("num_nextn_predict_layers", "mtp_num_hidden_layers")
    if fields.count(extra, 0, least=0):
        yield f"{extra}: layers that only predict further tokens are not counted"

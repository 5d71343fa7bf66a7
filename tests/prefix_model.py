"""The oracle of prompts alone: a dictionary of prefixes, every victim searched for, nothing imported from the package.

A prefix is a tuple of ids, one for each whole block. Equal ids in other places of a prompt are other blocks.
"""

from fractions import Fraction


class Entry:
    def __init__(self, call):
        self.inserted = self.touched = call
        self.hits = 0


def score(policy, entry):
    """Who has the least goes first."""
    return {
        "lru": (entry.touched,),
        "fifo": (entry.inserted,),
        "lfu": (entry.hits, entry.touched),
    }[policy]


def leaves(cached, held):
    """What may be evicted: no longer prefix of a cached one, and not of the prompt in hand."""
    parents = {prefix[:-1] for prefix in cached}
    return [prefix for prefix in cached if prefix not in parents and prefix not in held]


def prefill(prompts, block_size, num_blocks, policy="lru"):
    """Figures of prompts, each `(ids, tokens)` with an id for every block begun."""
    cached, call = {}, 0
    halves = [[0, 0], [0, 0]]  # tokens found, tokens of prompts
    evicted = refused = 0
    for turn, (ids, length) in enumerate(prompts):
        begun = -(-length // block_size)
        if begun > num_blocks:
            refused += 1
            continue
        call += 1
        whole = [tuple(ids[: count + 1]) for count in range(length // block_size)]
        found = []
        for prefix in whole[: max(0, (length - 1) // block_size)]:
            if prefix not in cached:
                break
            found.append(prefix)
        for prefix in found:
            cached[prefix].touched = call
            cached[prefix].hits += 1
        while len(cached) + begun - len(found) > num_blocks:
            victim = min(leaves(cached, found), key=lambda prefix: score(policy, cached[prefix]))
            del cached[victim]
            evicted += 1
        call += 1  # committed
        for prefix in whole:
            if prefix not in cached:
                cached[prefix] = Entry(call)
            elif prefix not in found:  # the last block, computed again since its last token had to be
                cached[prefix].touched = call
                cached[prefix].hits += 1
        call += 1  # freed
        for prefix in whole:
            cached[prefix].touched = call
        half = halves[2 * turn >= len(prompts) - len(prompts) % 2]
        half[0] += len(found) * block_size
        half[1] += length
    tokens, total = (sum(column) for column in zip(*halves, strict=True))
    return {
        "requests": len(prompts),
        "refused": refused,
        "finished": len(prompts) - refused,
        "prompt_tokens": total,
        "cached_tokens": tokens,
        "prefix_hit_ratio": Fraction(tokens, max(1, total)),
        "prefix_hit_ratio_last_half": Fraction(halves[1][0], max(1, halves[1][1])),
        "evicted_blocks": evicted,
    }

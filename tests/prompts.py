"""Prompts as ids, and K/V that say after which prefix they stand: whoever is served another one's shows it."""

import numpy as np


def values(tokens):
    """One number a position, that depends on every token up to it; exact in float32."""
    told, out = 7, []
    for token in tokens:
        told = (told * 1_000_003 + int(token) + 1) % (2**31 - 1)
        out.append(told % 65_521)
    return np.array(out, np.float32)


def planes(cache, layer, tokens, start=0):
    """K and V of positions from `start` on, `(heads, n, width)` each."""
    rows = values(tokens)[start:]
    return [
        np.ascontiguousarray(
            np.broadcast_to(rows[None, :, None] * sign, (plane.heads, len(rows), plane.width))
        )
        for plane, sign in zip(cache.spec.layers[layer].planes, (1, -1), strict=True)
    ]


def fill(cache, request_id, tokens, start=0):
    """Writes K/V of `tokens`, the whole sequence so far, from position `start` on, in all layers."""
    for layer in range(cache.spec.num_layers):
        if start < len(tokens):
            cache.write(request_id, layer, *planes(cache, layer, tokens, start), start=start)


def run(cache, request_id, tokens, **options):
    """What an engine does with a prompt: admits it, sees that what was found is right, computes the rest."""
    grant = cache.allocate_for(request_id, tokens, **options)
    if grant is not None:
        shows(cache, request_id, tokens, grant.cached_tokens)
        fill(cache, request_id, list(tokens), grant.cached_tokens)
    return grant


def leave(cache, tokens, **options):
    """A prompt that has been computed and has ended: what it leaves is cached."""
    grant = run(cache, ("gone", len(tokens)), tokens, **options)
    cache.free_for(("gone", len(tokens)))
    return grant


def shows(cache, request_id, tokens, count=None):
    """The first `count` positions of a sequence have K/V of exactly this prefix, in all layers."""
    count = len(tokens) if count is None else count
    for layer in range(cache.spec.num_layers):
        for view, wanted in zip(
            cache.get_kv_views(request_id, layer), planes(cache, layer, list(tokens)), strict=True
        ):
            assert np.array_equal(view[:, :count], wanted[:, :count])

"""A plan as one object for ``--json``, and as the call that makes its cache."""

from dataclasses import asdict

from kvcache.spec import ITEMSIZE


def layer_groups(model):
    """Layers that keep the same, as dicts, in the order in which the first of each comes."""
    element, state_element = ITEMSIZE[model.dtype], ITEMSIZE[model.state_dtype]
    groups = {}
    for layer in model.layers:
        groups.setdefault(layer, []).append(layer)
    return [
        {
            "kind": layer.kind,
            "layers": len(same),
            "planes": [{"name": name, "heads": heads, "width": width} for name, heads, width in layer.planes],
            "window": layer.window,
            "bytes_per_token": len(same) * layer.elements_per_token * element,
            "state_bytes": len(same) * (layer.conv * element + layer.state * state_element),
        }
        for layer, same in groups.items()
    ]


def record_of(plan):
    """Everything that is known of a plan, for JSON.

    Parameters
    ----------
    plan : Plan

    Returns
    -------
    dict
    """
    model, costs = plan.model, plan.costs
    return {
        "model_type": model.model_type,
        "num_layers": len(model.layers),
        "kv_layers": list(model.kv_layers),
        "layers": layer_groups(model),
        "dtype": model.dtype,
        "state_dtype": model.state_dtype,
        "max_position_embeddings": model.max_position_embeddings,
        "bytes_per_token": costs.bytes_per_token,
        "windows": [{"bytes_per_token": each, "window": window} for each, window in costs.windows],
        "state_bytes": costs.state_bytes,
        "state_bytes_by_dtype": costs.state_bytes_by_dtype,
        "context": plan.context,
        "concurrency": plan.concurrency,
        "sequence_bytes": costs.sequence_bytes(plan.context),
        "arena_bytes_per_token": costs.arena_bytes_per_token,
        "arena_sequence_bytes": costs.arena_sequence_bytes(plan.context, plan.block_size),
        "block_size": plan.block_size,
        "max_total_tokens": plan.max_total_tokens,
        "budget": None if plan.budget is None else asdict(plan.budget),
        "fits": None if plan.budget is None else {"tokens": plan.tokens, "sequences": plan.sequences},
        "reasons": plan.reasons,
        "warnings": list(plan.warnings),
        "notes": list(plan.notes),
    }


def constructor_of(plan):
    """Python that makes the cache of a plan.

    Parameters
    ----------
    plan : Plan
        With `max_total_tokens`.

    Returns
    -------
    str
        Whole lines; `cache` is what they make.
    """
    model = plan.model
    kept = [model.layers[number].planes for number in model.kv_layers]
    comment = '# backend="mlx" for MLX arrays'
    if len(kept) < len(model.layers):
        numbers = ", ".join(map(str, model.kv_layers[:4])) + (", ..." if len(model.kv_layers) > 4 else "")
        comment += f"; its layers are these of the model: {numbers}"
    names = [name for name, _, _ in kept[0]]
    if len(set(kept)) == 1 and names == ["k", "v"] and kept[0][0][1] == kept[0][1][1] and not _latent(model):
        return f"from kvcache import KVCache, KVCacheSpec\n\n{_alike(plan, kept)}cache = KVCache(spec)  {comment}\n"
    return (
        "from kvcache import KVCache, KVCacheSpec, LayerSpec, PlaneSpec\n\n"
        f"{_differing(plan, kept)}cache = KVCache(spec)  {comment}\n"
    )


def _latent(model):
    return any(layer.kind.startswith("latent") for layer in model.layers)


def _alike(plan, kept):
    (_, heads, width), (_, _, v_width) = kept[0]
    options = "" if width == v_width else f"    v_head_dim={v_width},\n"
    return (
        "spec = KVCacheSpec(\n"
        f"    num_layers={len(kept)},\n"
        f"    num_kv_heads={heads},\n"
        f"    head_dim={width},\n{options}"
        f"{_sizes(plan)}"
        f'    dtype="{plan.model.dtype}",\n'
        ")\n"
    )


def _sizes(plan):
    return f"    max_total_tokens={plan.max_total_tokens:_},\n    block_size={plan.block_size},\n"


def _differing(plan, kept):
    names = {planes: f"layer_{chr(97 + number)}" for number, planes in enumerate(dict.fromkeys(kept))}
    text = ""
    for planes, name in names.items():
        text += f"{name} = LayerSpec(\n    (\n"
        for plane, heads, width in planes:
            text += (
                f'        PlaneSpec("{plane}", heads={heads}, width={width}, dtype="{plan.model.dtype}"),\n'
            )
        text += "    )\n)\n"
    return f"{text}spec = KVCacheSpec.from_layers(\n    {_sum_of(kept, names)},\n{_sizes(plan)})\n"


def _sum_of(kept, names):
    """The layers in order, as a sum of lists; a pattern that repeats is written once."""
    order = [names[planes] for planes in kept]
    for period in range(1, len(order) // 2 + 1):
        times, rest = divmod(len(order), period)
        if order == order[:period] * times + order[:rest]:
            first = f"({_runs(order[:period])})" if len(set(order[:period])) > 1 else _list(order[:period])
            tail = f" + {_runs(order[:rest])}" if rest else ""
            return f"{first} * {times}{tail}"
    return _runs(order)


def _runs(order):
    parts, start = [], 0
    for number in range(1, len(order) + 1):
        if number == len(order) or order[number] != order[start]:
            parts.append(f"[{order[start]}]" + (f" * {number - start}" if number - start > 1 else ""))
            start = number
    return " + ".join(parts)


def _list(order):
    return f"[{', '.join(order)}]"

"""How many heads a model has, and how wide they are, under the names that its type gives to the fields."""

QUERIES = ("num_attention_heads", "n_head", "n_heads")


def query_heads(fields):
    """Heads of queries."""
    return fields.count(fields.first(*QUERIES))


def kv_heads(fields):
    """Heads of K and V."""
    if fields.has("attn_config") and fields.model_type in ("dbrx", "mpt"):
        inner = fields.inner("attn_config")
        if inner.has("kv_n_heads") or fields.model_type == "dbrx":
            return inner.count("kv_n_heads")
        if inner.values.get("attn_type", "multihead_attention") != "multihead_attention":
            inner.refuse(
                "attn_type is not multihead_attention, and kv_n_heads is missing", "attn_type", "kv_n_heads"
            )
    if fields.model_type == "gpt_bigcode" and fields.flag("multi_query", True):
        return 1
    if fields.model_type == "falcon" and not fields.flag("new_decoder_architecture"):
        return 1 if fields.flag("multi_query", True) else query_heads(fields)
    name = fields.first("num_key_value_heads", "num_kv_heads", "n_kv_heads")
    heads = fields.count(name, None)
    return query_heads(fields) if heads is None else _dividing(fields, name, heads)


def _dividing(fields, name, heads):
    queries = query_heads(fields)
    if queries % heads:
        fields.refuse(f"{fields.prefix}{name} is {heads}, which does not divide {queries} heads", name)
    return heads


def head_dim(fields):
    """Width of a head of K."""
    if fields.model_type == "zamba2":  # its attention reads two hidden states side by side
        fields.need("hidden_size", "num_attention_heads")
        return 2 * fields.count("hidden_size") // query_heads(fields)
    name = fields.first("head_dim", "attention_head_dim", "kv_channels")
    if fields.has(name):
        return fields.count(name)
    name = hidden_field(fields)
    fields.need(name, fields.first(*QUERIES))
    hidden, heads = fields.count(name), query_heads(fields)
    if hidden % heads:
        fields.refuse(
            f"{fields.prefix}head_dim is missing, and {name} of {hidden} is no multiple of {heads} heads",
            "head_dim",
            name,
        )
    return hidden // heads


def hidden_field(fields):
    """Name of the field that says how wide the model is."""
    return fields.first("hidden_size", "n_embd", "n_embed", "d_model")

"""How the results of `serving.py` are shown: the columns of its two tables, as (heading, text of a row)."""

MOVES = (
    ("kept free", lambda row: f"{row['keep_free']:.0%}"),
    ("sequences", lambda row: f"{row['mean_sequences']:.1f}"),
    ("utilisation", lambda row: f"{row['utilization']:.3f}"),
    ("moved / attended", lambda row: f"{row['moved_over_attended']:.2%}"),
    ("moves, ms a step", lambda row: f"{row['moves_ms']:.1f}"),
    ("books", lambda row: f"{row['books_ms']:.3f}"),
    ("MLX attention", lambda row: f"{row['mlx_attention_ms']:,.0f}"),
    ("NumPy attention", lambda row: f"{row['numpy_attention_ms']:,.0f}"),
    ("moves / MLX", lambda row: f"{row['moves_over_mlx_attention']:.2%}"),
    ("moves / NumPy", lambda row: f"{row['moves_over_numpy_attention']:.2%}"),
)

MLX_LM = (
    ("sequences", lambda row: f"{row['sequences']}"),
    ("layers", lambda row: f"{row['layers']}"),
    ("copied a token", lambda row: f"{row['ours_copied_per_token'] / row['token_bytes']:.2f} tokens"),
    ("10 % free", lambda row: f"{row['ours_copied_per_token_more_free'] / row['token_bytes']:.2f}"),
    ("mlx-lm", lambda row: f"{row['theirs_copied_per_token'] / row['token_bytes']:.2f}"),
    ("peak", lambda row: f"{row['ours_peak_bytes'] / row['ours_live_bytes']:.2f} x"),
    ("mlx-lm", lambda row: f"{row['theirs_peak_bytes'] / row['theirs_live_bytes']:.2f} x"),
    ("updates a second", lambda row: f"{row['ours_update_steps_per_second']:.3g}"),
    ("mlx-lm", lambda row: f"{row['theirs_update_steps_per_second']:.3g}"),
    ("times", lambda row: f"{row['update_ratio']:.2f}"),
    ("in all", lambda row: f"{row['update_ratio_of_sums']:.2f}"),
    ("with attention", lambda row: f"{row['ours_attend_steps_per_second']:.3g}"),
    ("mlx-lm", lambda row: f"{row['theirs_attend_steps_per_second']:.3g}"),
    ("times", lambda row: f"{row['attend_ratio']:.2f}"),
)


def cells(columns, rows):
    """Headings and texts: a list of rows."""
    return [[heading for heading, _ in columns], *[[show(row) for _, show in columns] for row in rows]]


def machine_text(machine):
    versions = ", ".join(f"{name} {machine[name]}" for name in ("numpy", "mlx", "mlx-lm"))
    return f"{machine['cpu']}, {machine['cores']} cores, {versions}."

"""How a plan looks on a terminal. Needs rich."""

from rich.table import Table
from rich.text import Text

from kvcache.plan_record import layer_groups
from kvcache.planning import size

BAR = 12  # cells of the whole budget
EIGHTHS = " ▏▎▍▌▋▊▉█"
COLOURS = {
    "weights": "blue",
    "activations": "yellow",
    "overhead": "magenta",
    "states": "cyan",
    "arena": "green",
    "remains": "bright_black",
}


def print_plan(console, plan, caption):
    """Print a plan.

    Parameters
    ----------
    console : rich.console.Console
    plan : Plan
    caption : str
        What it is for.
    """
    parts = [Text(caption, "bold"), _layers(plan), _costs(plan)]
    if plan.budget is not None:
        parts.append(_budget(plan.budget))
    parts.append(_advice(plan))
    for part in parts[:-1]:
        console.print(part, Text(), sep="\n", highlight=False)
    console.print(parts[-1], highlight=False)
    if plan.notes or plan.warnings:
        console.print()
    for note in plan.notes:
        console.print(Text(f"note: {note}", "dim"), highlight=False)
    for warning in plan.warnings:
        console.print(Text(f"warning: {warning}", "yellow"), highlight=False)


def _rows(*justify):
    table = Table.grid(padding=(0, 2))
    for each in justify:
        table.add_column(justify=each)
    return table


def _layers(plan):
    table = _rows("right", "left", "left", "right")
    for group in layer_groups(plan.model):
        table.add_row(str(group["layers"]), group["kind"], _kept(group, plan.model), Text(_price(group)))
    return table


def _kept(group, model):
    planes, told = group["planes"], []
    if planes and len({(plane["heads"], plane["width"]) for plane in planes}) == 1 and len(planes) == 2:
        told.append(f"K, V {planes[0]['heads']} x {planes[0]['width']}")
    elif planes:
        told.append(
            ", ".join(f"{_upper(plane['name'])} {plane['heads']} x {plane['width']}" for plane in planes)
        )
    if group["window"] is not None:
        told.append(f"last {group['window']:,} tokens")
    if group["state_bytes"] and model.state_dtype != model.dtype:
        told.append(f"state {model.state_dtype}")
    return Text("; ".join(told), "dim")


def _upper(name):
    return name.upper() if len(name) == 1 else name


def _price(group):
    prices = []
    if group["bytes_per_token"]:
        prices.append(f"{group['bytes_per_token']:,} B/token")
    if group["state_bytes"]:
        prices.append(f"{size(group['state_bytes'])} state")
    return " + ".join(prices) or "nothing"


def _costs(plan):
    costs = plan.costs
    table = _rows("left", "right", "left")
    table.add_row("a token", f"{costs.bytes_per_token:,} B", "without bound")
    for each, window in costs.windows:
        table.add_row("", f"+ {each:,} B", f"for the last {window:,}")
    if costs.state_bytes:
        table.add_row("a state", size(costs.state_bytes), "however long the sequence is")
    table.add_row(
        f"{plan.context:,} tokens", Text(size(costs.sequence_bytes(plan.context)), "bold"), "a sequence"
    )
    arena = costs.arena_sequence_bytes(plan.context, plan.block_size)
    if costs.windows and arena != costs.sequence_bytes(plan.context):
        table.add_row("", size(arena), "in an arena, where windows keep all tokens")
    return table


def _budget(budget):
    rows = {
        "weights": (budget.weights, budget.weights_from),
        "activations": (budget.activations, budget.activations_from),
        "overhead": (budget.overhead, "system and allocator"),
        "states": (budget.state, "of recurrent layers"),
        "arena": (budget.arena, "K and V"),
        "remains": (budget.remaining, ""),
    }
    table = _rows("left", "right", "right", "left", "left")
    table.add_row(Text("memory", "bold"), Text(size(budget.memory), "bold"))
    for name, (count, told) in rows.items():
        if name == "states" and not count:
            continue
        share = count / budget.memory
        table.add_row(
            name, size(count), f"{100 * share:.1f} %", Text(_bar(share), COLOURS[name]), Text(told, "dim")
        )
    return table


def _bar(share):
    eighths = round(share * BAR * 8)
    whole, part = divmod(max(eighths, 1 if share > 0 else 0), 8)
    return EIGHTHS[8] * whole + (EIGHTHS[part] if part else "")


def _advice(plan):
    table = _rows("left", "left")
    if plan.budget is not None:
        fits = f"{plan.sequences:,} of {plan.context:,} tokens at a time"
        if plan.tokens:
            fits += f", {plan.tokens:,} tokens in all"
        table.add_row("fits", Text(fits, "bold"))
    table.add_row("block_size", _told(plan.block_size, plan.reasons["block_size"]))
    if plan.max_total_tokens is not None:
        table.add_row("max_total_tokens", _told(plan.max_total_tokens, plan.reasons["max_total_tokens"]))
    elif not plan.costs.arena_bytes_per_token:
        table.add_row("max_total_tokens", Text("none: no layer keeps K and V, an arena would be empty"))
    else:
        table.add_row("max_total_tokens", Text("give --memory, --device or --concurrency", "yellow"))
    return table


def _told(value, reason):
    return Text(f"{value:,}", "bold").append(f"  {reason}", "not bold dim")

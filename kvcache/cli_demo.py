"""`kvcache demo`: a small model decodes many requests, and every token is proven."""

import argparse

from kvcache import demo
from kvcache.cli_arguments import UsageError, add_json, check_folder, count, require, write_json

CORPUS_TOKENS = 65536  # of random ids, that the prompts for a random model are cut from
TEXT = """\
Could you help me plan a week of dinners for four people, one of whom does not eat meat? We have an oven, two
pans and about forty minutes every evening. On Tuesday we come home late, so that should be something from the
day before. Also, my sister visits on Friday and she likes anything with mushrooms. Of course! Here is a plan
that uses leftovers well. Monday: a large pot of lentil soup with carrots, celery and a spoon of mustard; keep
half of it. Why does ice float on water, while most other solids sink in their own liquid? Because water
molecules form an open lattice when they freeze, the solid takes up more room than the liquid, and so it
weighs less for its size. Please translate the following into French, and keep the tone friendly: Dear Ms.
Laurent, thank you for your letter of the third of May. We are happy to tell you that the bicycle has been
found. Write a short function that returns the second largest number of a list, and say what it does when the
list has only one. Then explain how you tested it.
"""


def add_demo(commands):
    """Add the command."""
    command = commands.add_parser(
        "demo",
        help="decode many requests on one arena, and prove every token",
        description="Decodes requests from a queue with continuous batching on one KVCache, then every "
        "request alone with mlx-lm's own cache, and compares all tokens. Exit code 1 if one differs. With "
        "--turns they are conversations: each turn repeats what was said before, and is computed from where "
        "the K and V that are still there end.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument(
        "--model", metavar="PATH_OR_REPO", help="a model for mlx_lm.load, in place of a small random Llama"
    )
    command.add_argument("--requests", type=count, default=48, metavar="N", help="how many are in the queue")
    command.add_argument(
        "--turns",
        type=count,
        default=1,
        metavar="N",
        help="of a conversation; with more than one, --requests counts conversations",
    )
    command.add_argument(
        "--arena-tokens", type=count, default=4096, metavar="N", help="what all sequences share"
    )
    command.add_argument("--block-size", type=count, default=16, metavar="N", help="tokens per block")
    command.add_argument(
        "--placement",
        choices=("contiguous", "paged"),
        default="contiguous",
        help="how sequences lie in the arena",
    )
    command.add_argument(
        "--prefix-cache",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep what finished sequences leave, for prompts that begin the same",
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, lengths and prompts")
    add_json(command)
    command.set_defaults(run=_demo)


def _demo(arguments):
    _check_demo(arguments)
    import mlx.core as mx
    from rich.console import Console

    from . import demo_view, mlx_lm

    if mx.default_device() == mx.cpu:
        mx.disable_compile()  # on the CPU it runs a C++ compiler, which not every machine has
    console = Console(stderr=arguments.json == "-")
    model, corpus, caption = _model_of(mlx_lm, arguments)
    requests = demo.make_requests(
        arguments.requests, corpus, arguments.arena_tokens, arguments.seed, arguments.turns
    )
    options = {name: getattr(arguments, name) for name in ("block_size", "placement", "prefix_cache")}
    with (
        mlx_lm.cache_for(model, arguments.arena_tokens, **options) as cache,
        demo_view.DemoView(console) as view,
    ):
        cache.warmup()
        result = demo.run(mlx_lm.Decoder(model, cache), requests, view)
    demo_view.print_result(console, result, caption)
    write_json(arguments.json, [result.as_dict() | _settings(arguments)], indent=2)
    return 0 if result.equal else 1


def _check_demo(arguments):
    """Refuse what cannot work before anything is computed."""
    require("the demo", "demo", {"mlx": "mlx", "mlx_lm": "mlx-lm", "rich": "rich"})
    if arguments.arena_tokens < demo.SMALLEST_ARENA:
        raise UsageError(
            f"an arena of {arguments.arena_tokens} tokens is too small to share: "
            f"give --arena-tokens at least {demo.SMALLEST_ARENA}"
        )
    if arguments.arena_tokens < 8 * arguments.block_size:
        raise UsageError(
            f"{arguments.arena_tokens} tokens are {arguments.arena_tokens // arguments.block_size} blocks of "
            f"{arguments.block_size}: give --block-size at most {arguments.arena_tokens // 8}"
        )
    if arguments.turns > demo.most_turns(arguments.arena_tokens):
        raise UsageError(
            f"{arguments.turns} turns are too many for a quarter of an arena of {arguments.arena_tokens} "
            f"tokens: give --turns at most {demo.most_turns(arguments.arena_tokens)}"
        )
    if arguments.seed < 0:
        raise UsageError(f"--seed is {arguments.seed}, expected at least 0")
    check_folder("--json", arguments.json)


def _model_of(mlx_lm, arguments):
    """The model, token ids to cut prompts from, and a line that says what runs."""
    what = "requests" if arguments.turns == 1 else f"conversations of {arguments.turns} turns"
    size = f"{arguments.requests} {what}, {arguments.placement} arena of {arguments.arena_tokens:,} tokens"
    if arguments.model is None:
        model = mlx_lm.random_llama(arguments.seed)
        vocabulary = model.args.vocab_size
        corpus = demo.random_ids(CORPUS_TOKENS, vocabulary, arguments.seed)
        return model, corpus, f"small random Llama, {size}"
    try:
        model, tokenizer = mlx_lm.load(arguments.model)
    except Exception as error:  # loaders and tokenizers raise what they like
        raise UsageError(
            f"{arguments.model} does not load: {type(error).__name__}: {error}\n--model takes a folder with "
            "config.json, weights and tokenizer, or the name of a repository on the Hugging Face hub"
        ) from error
    return model, tokenizer.encode(TEXT), f"{arguments.model}, {size}"


def _settings(arguments):
    names = ("model", "arena_tokens", "block_size", "placement", "prefix_cache", "seed")
    return {name: getattr(arguments, name) for name in names}

"""The tokens of a trace's requests, made from the ids of their prefixes: equal ids give equal tokens, others do not.

A block of an id begins with its lower 31 bits, then come the others, then the lower ones again. What no id stands for
has tokens of the request's own. In a session whose next turn begins with all the ids of a request, what follows these
ids there is how that request went on: the end of its prompt, and what it generated.
"""

import numpy as np

LOW = (1 << 31) - 1
HIGH = 1 << 30  # added to the second token of a block: no token of a request's own is as large


class Prompts:
    """The tokens of requests, made when asked for.

    Parameters
    ----------
    trace : Trace
        Whose file tells which requests begin alike, by ids below 2**61.
    """

    def __init__(self, trace):
        if trace.prefixes is None:
            raise ValueError(f"{trace.name} does not tell which prompts begin alike")
        self._prefixes = trace.prefixes
        self._size = trace.prefixes.block_tokens
        if self._size < 2:
            raise ValueError(
                f"ids of blocks of {self._size} token: blocks of at least 2 tokens can be told apart"
            )
        if len(trace) > HIGH:
            raise ValueError(f"{len(trace)} requests, at most {HIGH} have tokens of their own")
        self._next_turns = trace.prefixes.next_turns()
        self._lengths = trace.prompts

    def tokens(self, number, count):
        """The first tokens of a request: its prompt, then what it generates.

        Parameters
        ----------
        number : int
            Of the request.
        count : int

        Returns
        -------
        array of int32
        """
        source = int(self._next_turns[number])
        if source < 0:
            source = number
        ids = self._prefixes.ids(source)[: -(-count // self._size)]
        told = min(count, len(ids) * self._size, int(self._lengths[source]))
        tokens = np.empty(max(count, len(ids) * self._size), np.int32)
        blocks = tokens[: len(ids) * self._size].reshape(len(ids), self._size)
        blocks[:] = (ids & LOW)[:, None]
        blocks[:, 1] = (ids >> 31) + HIGH
        tokens[told:] = number
        return tokens[:count]

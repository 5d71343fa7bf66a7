"""Traffic to replay when there is no trace at hand: lengths and arrivals like those of published traces.

A length is log-normal, with the spread taken anew between the percentiles that are published: the logarithm runs
through median, 90th and 99th percentile and maximum, in a straight line of the normal score between any two. Below
the median the spread is that of just above it.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from kvcache.traces import Trace

LEAST_SCORE = -8.0  # below it nothing is ever drawn
SCORE_OF_LONGEST = 3.8  # the longest of some ten thousand


@dataclass(frozen=True)
class Lengths:
    """Published percentiles of a length in tokens."""

    median: int
    p99: int
    longest: int
    p90: int | None = None

    def draw(self, rng, count):
        """So many lengths, as an int32 array; none is longer than the longest."""
        score = NormalDist().inv_cdf
        points = [(0.0, self.median), (score(0.99), self.p99), (SCORE_OF_LONGEST, self.longest)]
        if self.p90 is not None:
            points.insert(1, (score(0.9), self.p90))
        scores, logs = np.array([(each, np.log(length)) for each, length in points]).T
        below = logs[0] + LEAST_SCORE * (logs[1] - logs[0]) / scores[1]
        drawn = np.interp(rng.standard_normal(count), [LEAST_SCORE, *scores], [below, *logs])
        return np.clip(np.rint(np.exp(drawn)), 1, self.longest).astype(np.int32)


@dataclass(frozen=True)
class Workload:
    """What is known of the traffic of a service."""

    like: str  # whose
    prompts: Lengths
    outputs: Lengths
    requests: int
    seconds: float  # in which they came
    gap_variation: float = 1.0  # standard deviation of the time between two, over its mean

    def make(self, name, seed, requests=None):
        """Draw a trace; the same of the same seed.

        Parameters
        ----------
        name : str
            What it is called.
        seed : int
        requests : int, optional
            How many, by default as many as were published.

        Returns
        -------
        Trace
        """
        count = self.requests if requests is None else requests
        of_prompts, of_outputs, of_gaps = np.random.default_rng(seed).spawn(3)
        return Trace(
            name,
            np.cumsum(self._gaps(of_gaps, count)),
            self.prompts.draw(of_prompts, count),
            self.outputs.draw(of_outputs, count),
        )

    def _gaps(self, rng, count):
        """Seconds between two: exponential, or log-normal where they come in bursts."""
        mean = self.seconds / self.requests
        if self.gap_variation == 1.0:
            return rng.exponential(mean, count)
        variance = np.log1p(self.gap_variation**2)
        return rng.lognormal(np.log(mean) - variance / 2, np.sqrt(variance), count)


WORKLOADS = {
    "chat": Workload(
        like="Azure's conversations of 2023",
        prompts=Lengths(median=1020, p90=2734, p99=4142, longest=14050),
        outputs=Lengths(median=129, p99=601, longest=1000),
        requests=19366,
        seconds=3502,
    ),
    "code": Workload(
        like="Azure's code completions of 2023",
        prompts=Lengths(median=1469, p90=5186, p99=7436, longest=7437),
        outputs=Lengths(median=13, p99=249, longest=1899),
        requests=8819,
        seconds=3436,
        gap_variation=13.2,
    ),
    "long": Workload(
        like="Mooncake's conversations",
        prompts=Lengths(median=6909, p90=27367, p99=85399, longest=126195),
        outputs=Lengths(median=350, p99=1115, longest=2000),
        requests=12031,
        seconds=3537,
    ),
}

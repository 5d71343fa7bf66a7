"""The cells of a sweep: one replay for every combination of settings, on all cores or on a Dask cluster."""

import itertools
import os
from dataclasses import asdict, replace

from kvcache.replay import replay

CONNECT_SECONDS = 10  # to wait for a Dask scheduler


def cells_of(settings, **choices):
    """Every combination of some settings, the last varying fastest.

    Parameters
    ----------
    settings : Settings
        What all cells have in common.
    **choices : list
        Of a setting.

    Returns
    -------
    list of Settings
    """
    return [
        replace(settings, **dict(zip(choices, values, strict=True)))
        for values in itertools.product(*choices.values())
    ]


def record_of(trace, settings, figures):
    """What ``--json`` prints of a cell: what was replayed and how, then the figures."""
    bound = settings.claims_bound
    how = asdict(settings) | {"overcommit": str(bound) if bound == float("inf") else bound}
    return {"trace": trace.name, "bad_rows": trace.bad_rows} | how | figures.as_dict()


def sweep(trace, cells, jobs=None, dask=None):
    """Replay a trace with each of some settings, at once.

    Parameters
    ----------
    trace : Trace
    cells : list of Settings
    jobs : int, optional
        Processes, by default one a core.
    dask : str, optional
        Address of a Dask scheduler whose workers take the cells.

    Yields
    ------
    Figures
        In the order of the cells.
    """
    if dask is None and jobs == 1:
        yield from (replay(trace, settings) for settings in cells)
        return
    import joblib

    tasks = [joblib.delayed(replay)(trace, settings) for settings in cells]
    if dask is None:
        jobs = min(len(cells), jobs or os.cpu_count() or 1)
        yield from joblib.Parallel(n_jobs=jobs, return_as="generator")(tasks)
        return
    from distributed import Client

    with Client(dask, timeout=CONNECT_SECONDS, set_as_default=True), joblib.parallel_config(backend="dask"):
        yield from joblib.Parallel(return_as="generator")(tasks)

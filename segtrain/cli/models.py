"""`segtrain models`."""

import json

from segtrain.cli.console import print_loading
from segtrain.cli.options import JsonOption
from segtrain.runtime.signals import raise_if_stopped


def models(as_json: JsonOption = False) -> None:
    """List the networks: parameters, multiply-adds, training memory, pretrained weights."""
    print_loading()
    from dataclasses import asdict

    from rich.console import Console

    from segtrain.models.summary import build_cost_table, compute_cost, model_variants
    from segtrain.runtime.progress import progress_bar

    networks, costs = list(model_variants()), []
    with progress_bar(total=len(networks), desc="counting", unit="network") as bar:
        for name, kwargs in networks:
            costs.append(compute_cost(name, **kwargs))
            raise_if_stopped()
            bar.update()
    if as_json:
        print(json.dumps([asdict(cost) for cost in costs], indent=2))
    else:
        Console().print(build_cost_table(costs))

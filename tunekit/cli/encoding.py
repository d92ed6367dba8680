"""The command encode."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunekit.cli import screen
from tunekit.cli.options import AsJson, Cluster, Config, Devices, Overrides, names_of, not_both

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tunekit.config import Loaded, TrainingRunConfig
    from tunekit.leases import Peer


def encode(
    config: Config,
    overrides: Overrides = None,
    cluster: Cluster = None,
    devices: Devices = None,
    processes: Annotated[
        int, typer.Option(min=1, max=64, help="on each device; several keep a fast card busy")
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Encode a config's pictures and captions ahead of training. The same command again continues."""
    from tunekit import leases, workspace
    from tunekit.config import load
    from tunekit.encoding import training_config
    from tunekit.progress import console

    not_both(cluster, devices)
    err = screen.console(stderr=True)
    loaded = load(config, overrides or ())
    asked = training_config(loaded)
    workspace.ready(loaded)
    folder = asked.cache_dir.absolute()
    with ExitStack() as stack:
        if cluster is None:
            peers = _here(asked, names_of(devices), processes)
        else:
            peers = _on_cluster(loaded, config, cluster, processes, stack)
        where = ", ".join(peer.name for peer in peers)
        err.print(f"encodes on {where}, into {folder}", style="dim", soft_wrap=True)
        filled = leases.fill(
            peers,
            config,
            overrides or (),
            folder,
            sharers=processes,
            say=lambda line: err.print(line, soft_wrap=True, highlight=False),
            shown=console(),
        )
    if as_json:
        screen.print_json(filled.as_json())
        return
    print(filled)
    if filled.encoded:
        from tunekit.units import format_seconds

        took = format_seconds(filled.seconds)
        print(f"{took}, {filled.encoded / max(filled.seconds, 1e-9):.3g}/s in {len(filled.peers)} processes")


def _here(config: TrainingRunConfig, asked: Sequence[str], processes: int) -> list[Peer]:
    """Processes on the devices of this machine."""
    from tunekit import hardware, worker
    from tunekit.leases import LocalPeer

    names = worker.devices(asked or [config.memory.device])
    peers: list[Peer] = []
    for name in names:
        told = {} if ":" in config.memory.device else hardware.seen_alone([name])
        if name == "cpu" and processes > 1:
            told |= {"OMP_NUM_THREADS": str(max(1, hardware.processors() // processes))}
        for number in range(processes):
            peers.append(LocalPeer(f"{name}/{number + 1}" if processes > 1 else name, told))
    return peers


def _on_cluster(loaded: Loaded, named: str, address: str, processes: int, stack: ExitStack) -> list[Any]:
    """Processes on the nodes of a cluster, each of which sees the cache, the config and the pictures."""
    from tunekit import cluster, preconditions

    config = loaded.config
    reads = {path: key for key, path in preconditions.reads(loaded).items()}
    if not Path(named).is_file():  # a ready-made one comes with tunekit
        reads.pop(loaded.path.absolute(), None)
    nodes = stack.enter_context(cluster.cluster(address, config.cache_dir, reads, "data.cache=/shared/cache"))
    return cluster.encoders(nodes, config.memory.device, processes)

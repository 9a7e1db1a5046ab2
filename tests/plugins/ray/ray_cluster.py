"""A Ray cluster of two nodes on this machine, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from opd_env.plugins.ray import connect_ray
from opd_env.tools.builtin.python import run_programs_by
from opd_env.tools.run.process import run_processes_by


@contextmanager
def two_nodes() -> Iterator[Any]:
    """Starts it, connects the tools to it, and ends both."""
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
        connect_ray(cluster.address)
        yield cluster
    finally:
        run_processes_by(None)
        run_programs_by(None)
        ray.shutdown()
        cluster.shutdown()

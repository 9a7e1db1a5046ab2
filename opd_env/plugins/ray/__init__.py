"""Tools and sandboxes on the machines of a Ray cluster.

Read first: ``workers``. Test it alone: ``make test-ray``
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opd_env._lazy import lazy_face

if TYPE_CHECKING:
    from opd_env.plugins.ray.sandbox import RaySandbox as RaySandbox
    from opd_env.plugins.ray.workers import RayUnavailable as RayUnavailable
    from opd_env.plugins.ray.workers import connect_ray as connect_ray

__getattr__, __dir__, __all__ = lazy_face(
    __name__,
    {
        "sandbox": ("RaySandbox",),
        "workers": ("RayUnavailable", "connect_ray"),
    },
)

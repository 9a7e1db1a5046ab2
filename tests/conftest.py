"""Settings of the whole suite."""

from hypothesis import HealthCheck, settings

# Machines that run tests are shared: what matters is the result, not how long one example took.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")
